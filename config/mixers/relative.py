# Attention with a learned relative position bias.
# Use it after config/shakespeare_small.py. Loss 1.899 ± 0.009 after 1000 steps at learning rate 0.008 (5 seeds).
out_dir = 'out-relative'
pos_emb = 'relative'
