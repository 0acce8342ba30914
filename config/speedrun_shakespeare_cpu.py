# Reaches the validation loss of nanoGPT's small CPU run on tinyshakespeare as fast as possible: 70 steps of 48 x 64
# characters.
# Takes 3.6 s on 2 cores of a Xeon with AMX; nanoGPT takes 45.7 s there. Evaluations are not counted.
# 1.884 ± 0.029 on the whole split, nanoGPT 1.901 ± 0.011: means of three seeds.
# Prepare: python data/shakespeare_char/prepare.py

out_dir = 'out-speedrun-shakespeare-cpu'
dataset = 'shakespeare_char'
device = 'cpu'
compile = False
eval_interval = 70 # once, at the end
eval_iters = 37 # 37 batches of 48 windows are the whole validation split
log_interval = 10

mixer = 'gmlp' # contains its own MLP
mlp = 'none'
pos_emb = 'none'
time_mixing = 0.5
n_layer = 3
n_head = 2
n_embd = 128
block_size = 64
batch_size = 48
gradient_accumulation_steps = 1

optimizer = 'muon'
learning_rate = 1e-2
hidden_lr = 3.5e-2
weight_decay = 0.0
momentum = 0.9
beta2 = 0.95
schedule = 'linear'
warmup_iters = 5
max_iters = 70
min_lr = 0.0
