# Attention with ReZero (arXiv 2003.04887): each residual branch is scaled by a learned number that starts at zero.
# Use it after config/shakespeare_small.py. Loss 2.141 ± 0.030 after 1000 steps at learning rate 0.002 (5 seeds).
out_dir = 'out-rezero'
rezero = True
