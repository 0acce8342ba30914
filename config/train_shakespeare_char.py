# nanoGPT's baby GPT on tinyshakespeare, character by character: 10.6M parameters, 5000 steps of 64 x 256 characters.
# Prepare: python data/shakespeare_char/prepare.py
# nanoGPT reports a best validation loss of 1.4697 after 3 minutes on an A100; not measured here yet.
# On a CPU, small (nanoGPT's README has these flags):
#   python train.py config/train_shakespeare_char.py --eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 \
#       --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
eval_interval = 250 # often, because it overfits
eval_iters = 200
log_interval = 10
always_save_checkpoint = False # only where the validation loss improves

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3 # small models stand more
min_lr = 1e-4
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99 # few tokens a step: a longer average
