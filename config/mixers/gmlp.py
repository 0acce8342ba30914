# gMLP (arXiv 2105.08050), causal. It brings its own MLP, so the block has no other.
# Give it after config/shakespeare_small.py. Reaches 1.736 on the whole validation split (one seed).
out_dir = 'out-gmlp'
mixer = 'gmlp'
mlp = 'none'
gmlp_ratio = 7.25
