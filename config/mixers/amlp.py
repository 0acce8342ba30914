# gMLP with a tiny attention added to its gate (aMLP, arXiv 2105.08050), causal.
# Give it after config/shakespeare_small.py. Reaches 1.656 on the whole validation split (one seed).
out_dir = 'out-amlp'
mixer = 'gmlp'
mlp = 'none'
gmlp_attn = 32
gmlp_ratio = 6.25
