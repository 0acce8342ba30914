# Attention with a learned bias by distance. Use after config/shakespeare_small.py.
out_dir = 'out-relative'
pos_emb = 'relative'
