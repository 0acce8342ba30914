# CONTAINER (arXiv 2106.01401), causal.
# Use it after config/shakespeare_small.py. Loss 2.030 after 500 steps at learning rate 0.0048 (3 seeds).
out_dir = 'out-container'
mixer = 'container'
mlp_ratio = 3.5
