# Your own text, from kilobytes to gigabytes: a small model that trains within minutes on a CPU.
# Prepare: python data/text/prepare.py --input=PATH, which prints the next command, sized for the text.

out_dir = 'out-text'
dataset = 'text'
eval_interval = 100
eval_iters = 20
log_interval = 10
always_save_checkpoint = False # only best.pt matters: a small text is soon overfitted
patience = 5 # early stopping
sample_tokens = 100 # to see its progress

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
pos_emb = 'rope'
mlp = 'relu2'
time_mixing = 0.5
dropout = 0.1

batch_size = 16
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
max_iters = 2000
beta2 = 0.99
compile = False # for such a short run, compiling takes longer than it saves
