# Dense Synthesizer (arXiv 2005.00743), causal.
# Give it after config/shakespeare_small.py. Reaches 1.869 on the whole validation split (one seed).
out_dir = 'out-synthesizer'
mixer = 'synthesizer'
mlp_ratio = 4.25
