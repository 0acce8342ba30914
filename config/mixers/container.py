# CONTAINER, causal.
# Use after config/shakespeare_small.py; reaches 1.841 over the whole validation split (one seed).
out_dir = 'out-container'
mixer = 'container'
mlp_ratio = 3.5
