# Random Synthesizer, causal.
# Use after config/shakespeare_small.py; reaches 2.055 over the whole validation split (one seed).
out_dir = 'out-synthesizer-random'
mixer = 'synthesizer'
synthesizer = 'random'
mlp_ratio = 4.5
