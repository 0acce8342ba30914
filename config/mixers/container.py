# CONTAINER (arXiv 2106.01401), causal.
# Give it after config/shakespeare_small.py. Reaches 1.883 ± 0.007 there in 1000 steps at 0.008 (5 seeds).
out_dir = 'out-container'
mixer = 'container'
mlp_ratio = 3.5
