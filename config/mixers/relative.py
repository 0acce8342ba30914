# Attention with a learned bias by distance.
# Use after config/shakespeare_small.py; reaches 1.969 over the whole validation split (one seed).
out_dir = 'out-relative'
pos_emb = 'relative'
