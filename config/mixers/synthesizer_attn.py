# Dense Synthesizer (arXiv 2005.00743) mixed with dot-product attention.
# Use it after config/shakespeare_small.py. Loss 2.060 after 500 steps at learning rate 0.0067 (3 seeds).
out_dir = 'out-synthesizer-attn'
mixer = 'synthesizer'
synthesizer_attn = True
mlp_ratio = 3.25
