# Dense Synthesizer, causal.
# Use after config/shakespeare_small.py; reaches 1.869 over the whole validation split (one seed).
out_dir = 'out-synthesizer'
mixer = 'synthesizer'
mlp_ratio = 4.25
