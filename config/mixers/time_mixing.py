# Attention whose input is half from the previous token. Use after config/shakespeare_small.py.
out_dir = 'out-time-mixing'
time_mixing = 0.5
