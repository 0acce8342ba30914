# gMLP in its own block shape, causal.
# Use after config/shakespeare_small.py; reaches 1.736 over the whole validation split (one seed).
out_dir = 'out-gmlp'
mixer = 'gmlp'
mlp = 'none'
gmlp_ratio = 7.25
