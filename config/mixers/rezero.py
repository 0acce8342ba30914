# Attention with ReZero (arXiv 2003.04887): each branch is scaled by one learned number that starts at zero.
# Give it after config/shakespeare_small.py. Reaches 1.979 on the whole validation split (one seed).
out_dir = 'out-rezero'
rezero = True
