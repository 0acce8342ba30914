# minGPT-tuned's claim: attention without position embedding, but with time-weighting.
# Use after config/shakespeare_small.py; reaches 2.032 over the whole validation split (one seed).
out_dir = 'out-time-weighting'
pos_emb = 'none'
time_weighting = 'full'
mlp_ratio = 3.5 # pays for 4 tables of 64 x 64 a layer
