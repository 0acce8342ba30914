# Attention with minGPT-tuned's time-mixing: half of the input channels come from the previous token.
# Give it after config/shakespeare_small.py. Reaches 1.849 on the whole validation split (one seed).
out_dir = 'out-time-mixing'
time_mixing = 0.5
