# Random Synthesizer, causal. Use after config/shakespeare_small.py.
out_dir = 'out-synthesizer-random'
mixer = 'synthesizer'
synthesizer = 'random'
mlp_ratio = 4.5
