# gMLP with tiny attention (aMLP), causal. Use after config/shakespeare_small.py.
out_dir = 'out-amlp'
mixer = 'gmlp'
mlp = 'none'
gmlp_attn = 32
gmlp_ratio = 6.25
