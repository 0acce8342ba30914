# Plain causal attention.
# Use after config/shakespeare_small.py; reaches 1.898 over the whole validation split (one seed).
out_dir = 'out-attention'
