# Arithmetic: + - * / of numbers of up to two digits, one problem a line, held-out problems in the validation split.
# 2.3 minutes on two CPU cores; then solves + 99.0%, - 92.9%, * 18.4%, / 77.8% of the held-out problems.
# Prepare: python data/calc/prepare.py. Evaluate: python data/calc/evaluate.py --checkpoint=best.pt

out_dir = 'out-calc'
dataset = 'calc'
eval_interval = 500
eval_iters = 20
log_interval = 50

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
pos_emb = 'rope'
mlp = 'relu2'
time_mixing = 0.5

batch_size = 32
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
max_iters = 3000
lr_decay_iters = 3000
beta2 = 0.99
compile = False
