# MLP-Mixer, causal.
# Use after config/shakespeare_small.py; reaches 1.934 over the whole validation split (one seed).
out_dir = 'out-mlp-mixer'
mixer = 'mlp_mixer'
mlp_ratio = 5.0
