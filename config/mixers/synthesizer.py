# Dense Synthesizer, causal. Use after config/shakespeare_small.py.
out_dir = 'out-synthesizer'
mixer = 'synthesizer'
mlp_ratio = 4.25
