# minGPT-tuned's time-weighting with fewer parameters: w_ij = alpha_{i-j} beta_j.
# Use it after config/shakespeare_small.py. Loss 1.899 ± 0.014 after 1000 steps at learning rate 0.008 (5 seeds).
out_dir = 'out-time-weighting-circulant'
pos_emb = 'none'
time_weighting = 'circulant'
