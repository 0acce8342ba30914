# Recall of what was said before: synthetic tasks on which token mixers differ. Give an idea's file after this one.
# Prepare: python data/recall/prepare.py
# Evaluate: python data/recall/evaluate.py --out_dir=out-recall

out_dir = 'out-recall'
dataset = 'recall'
sampling = 'epoch' # whole examples: each window is one
block_size = 32 # the dataset's length
eval_interval = 200
eval_iters = 20
log_interval = 20

n_layer = 2
n_head = 2
n_embd = 64
time_mixing = 0.5 # each value sees its key, as by the papers' short convolution; without, attention learns far later

batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
max_iters = 600
beta2 = 0.99
compile = False # compiling takes longer than it saves in a run this short
