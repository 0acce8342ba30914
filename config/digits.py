# Handwritten digits of 8 x 8 pixels, one token per pixel and one picture per window; 0.80M parameters.
# 300 steps at --learning_rate=4e-3: 2.04 bits per dimension, UNet 1.98, gMLP 1.82 (means of 3 seeds).
# Prepare: python data/digits/prepare.py
#   python train.py config/digits.py config/mixers/unet.py --out_dir=out-digits-unet

out_dir = 'out-digits'
dataset = 'digits'
sampling = 'epoch' # each window is one whole picture, never parts of two
eval_interval = 200
eval_tokens = 11_700 # all 180 pictures
log_interval = 20

batch_size = 32
gradient_accumulation_steps = 1
block_size = 65 # 64 pixels after the token that starts the picture
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.2

learning_rate = 2e-3
min_lr = 2e-4
max_iters = 2000 # 40 epochs
warmup_iters = 100
beta2 = 0.99
compile = False
