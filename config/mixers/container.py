# CONTAINER (arXiv 2106.01401), causal.
# Give it after config/shakespeare_small.py. Reaches 1.841 on the whole validation split (one seed).
out_dir = 'out-container'
mixer = 'container'
mlp_ratio = 3.5
