# Attention with minGPT-tuned's time-mixing: half of the input channels come from the previous token.
# Use it after config/shakespeare_small.py. Loss 2.042 after 500 steps at learning rate 0.0024 (3 seeds).
out_dir = 'out-time-mixing'
time_mixing = 0.5
