# Recall of earlier tokens: synthetic tasks on which token mixers differ. Put the config file of a mixer after this one.
# Prepare: python data/recall/prepare.py
# Evaluate: python data/recall/evaluate.py --out_dir=out-recall

out_dir = 'out-recall'
dataset = 'recall'
sampling = 'epoch' # each window is one whole example
block_size = 32 # the dataset's length
eval_interval = 200
eval_iters = 20
log_interval = 20

n_layer = 2
n_head = 2
n_embd = 64
time_mixing = 0.5 # lets each value see its key, as the papers' short convolution does; else attention learns far later

batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
max_iters = 600
beta2 = 0.99
compile = False # for such a short run, compiling takes longer than it saves
