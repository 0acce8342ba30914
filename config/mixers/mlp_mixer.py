# MLP-Mixer, causal. Use after config/shakespeare_small.py.
out_dir = 'out-mlp-mixer'
mixer = 'mlp_mixer'
mlp_ratio = 5.0
