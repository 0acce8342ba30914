# Dense Synthesizer mixed with dot-product attention. Use after config/shakespeare_small.py.
out_dir = 'out-synthesizer-attn'
mixer = 'synthesizer'
synthesizer_attn = True
mlp_ratio = 3.25
