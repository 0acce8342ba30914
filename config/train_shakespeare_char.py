# nanoGPT's baby GPT on tinyshakespeare, character by character: 10.6M parameters, 5000 steps of 64 x 256 characters.
# nanoGPT reports a best validation loss of 1.4697 after 3 minutes on an A100. Not measured here.
# Prepare: python data/shakespeare_char/prepare.py
# A smaller model for a CPU, with the flags of nanoGPT's README:
#   python train.py config/train_shakespeare_char.py --eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 \
#       --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
eval_interval = 250 # often, since it overfits and the best model comes before the end
eval_iters = 200
log_interval = 10
always_save_checkpoint = False # only best.pt matters, because it overfits

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3 # small models tolerate a higher one
min_lr = 1e-4
max_iters = 5000
warmup_iters = 100
beta2 = 0.99 # a longer average, because steps have few tokens
