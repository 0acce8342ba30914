# minGPT-tuned's time-weighting with fewer parameters: w_ij = alpha_{i-j} beta_j.
# Give it after config/shakespeare_small.py. Reaches 1.978 on the whole validation split (one seed).
out_dir = 'out-time-weighting-circulant'
pos_emb = 'none'
time_weighting = 'circulant'
