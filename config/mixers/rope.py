# Attention with rotary positions. Use after config/shakespeare_small.py.
out_dir = 'out-rope'
pos_emb = 'rope'
