# gMLP with tiny attention (aMLP), causal.
# Use after config/shakespeare_small.py; reaches 1.656 over the whole validation split (one seed).
out_dir = 'out-amlp'
mixer = 'gmlp'
mlp = 'none'
gmlp_attn = 32
gmlp_ratio = 6.25
