# Attention with ReZero branches.
# Use after config/shakespeare_small.py; reaches 1.979 over the whole validation split (one seed).
out_dir = 'out-rezero'
rezero = True
