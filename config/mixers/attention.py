# Plain causal attention.
# Give it after config/shakespeare_small.py. Reaches 1.898 on the whole validation split (one seed).
out_dir = 'out-attention'
