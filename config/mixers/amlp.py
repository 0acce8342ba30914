# gMLP with a tiny attention added to its gate (aMLP, arXiv 2105.08050), causal.
# Use it after config/shakespeare_small.py. Loss 1.936 after 500 steps at learning rate 0.0067 (3 seeds).
out_dir = 'out-amlp'
mixer = 'gmlp'
mlp = 'none'
gmlp_attn = 32
gmlp_ratio = 6.25
