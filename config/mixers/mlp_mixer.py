# MLP-Mixer (arXiv 2105.01601), causal.
# Give it after config/shakespeare_small.py. Reaches 1.934 on the whole validation split (one seed).
out_dir = 'out-mlp-mixer'
mixer = 'mlp_mixer'
mlp_ratio = 5.0
