# Random Synthesizer (arXiv 2005.00743), causal: the attention weights are learned and ignore the tokens.
# Give it after config/shakespeare_small.py. Reaches 2.055 on the whole validation split (one seed).
out_dir = 'out-synthesizer-random'
mixer = 'synthesizer'
synthesizer = 'random'
mlp_ratio = 4.5
