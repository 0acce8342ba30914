# Plain causal attention.
# Use it after config/shakespeare_small.py. Loss 1.939 ± 0.018 after 1000 steps at learning rate 0.004 (5 seeds).
out_dir = 'out-attention'
