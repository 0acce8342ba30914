# Dense Synthesizer (arXiv 2005.00743) mixed with dot-product attention.
# Give it after config/shakespeare_small.py. Reaches 1.849 on the whole validation split (one seed).
out_dir = 'out-synthesizer-attn'
mixer = 'synthesizer'
synthesizer_attn = True
mlp_ratio = 3.25
