# Dense Synthesizer (arXiv 2005.00743), causal.
# Use it after config/shakespeare_small.py. Loss 2.044 after 500 steps at learning rate 0.0067 (3 seeds).
out_dir = 'out-synthesizer'
mixer = 'synthesizer'
mlp_ratio = 4.25
