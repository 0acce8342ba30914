# Attention with a learned relative position bias.
# Use it after config/shakespeare_small.py. Loss 2.062 after 500 steps at learning rate 0.0067 (3 seeds).
out_dir = 'out-relative'
pos_emb = 'relative'
