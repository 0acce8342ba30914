# Attention with ReZero branches. Use after config/shakespeare_small.py.
out_dir = 'out-rezero'
rezero = True
