# CONTAINER, causal. Use after config/shakespeare_small.py.
out_dir = 'out-container'
mixer = 'container'
mlp_ratio = 3.5
