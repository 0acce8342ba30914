# The CPU run of nanoGPT's README: tinyshakespeare characters, 0.80M parameters, 2000 steps of 12 x 64 characters.
# Takes 38 s on 2 cores of a Xeon with AMX.
# 1.910 ± 0.028 on the whole split, nanoGPT 1.901 ± 0.011: means of three seeds, which do not tell the two apart.
# Prepare: python data/shakespeare_char/prepare.py
# A second config file selects another mixer with about the same number of parameters:
#   python train.py config/shakespeare_small.py config/mixers/gmlp.py

out_dir = 'out-shakespeare-small'
dataset = 'shakespeare_char'
eval_interval = 250
eval_iters = 20
log_interval = 10

batch_size = 12
gradient_accumulation_steps = 1
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 1e-3
min_lr = 1e-4
max_iters = 2000
warmup_iters = 100
beta2 = 0.99
compile = False
