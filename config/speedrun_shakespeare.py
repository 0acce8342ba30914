# About the validation loss that nanoGPT reports for its baby GPT on tinyshakespeare, with less compute.
# 2600 steps of 32 x 128 characters; 17 to 19 minutes on 1 core of a Xeon with AMX.
# 1.4672 ± 0.0085 on the whole split in windows of 128: the mean of three seeds (1.4648, 1.4657, 1.4711).
# nanoGPT's 1.4697 is its best loss on random windows of 256.
# Prepare: python data/shakespeare_char/prepare.py

out_dir = 'out-speedrun-shakespeare'
dataset = 'shakespeare_char'
eval_interval = 500
eval_iters = 40
log_interval = 50

mixer = 'gmlp' # contains its own MLP
mlp = 'none'
pos_emb = 'none'
time_mixing = 0.5
n_layer = 6
n_head = 4
n_embd = 320
block_size = 128
batch_size = 32
gradient_accumulation_steps = 1
dropout = 0.2

optimizer = 'muon'
learning_rate = 5e-3
hidden_lr = 2e-2
weight_decay = 0.1
beta2 = 0.95
schedule = 'linear'
warmup_iters = 20
max_iters = 2600
min_lr = 0.0
