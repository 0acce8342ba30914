# The same with w_ij = alpha_{i-j} beta_j. Use after config/shakespeare_small.py.
out_dir = 'out-time-weighting-circulant'
pos_emb = 'none'
time_weighting = 'circulant'
