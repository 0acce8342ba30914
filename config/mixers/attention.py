# Plain causal attention. Use after config/shakespeare_small.py.
out_dir = 'out-attention'
