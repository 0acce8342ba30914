# Attention with rotary positions.
# Use after config/shakespeare_small.py; reaches 1.796 over the whole validation split (one seed).
out_dir = 'out-rope'
pos_emb = 'rope'
