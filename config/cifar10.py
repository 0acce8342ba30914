# CIFAR-10 in the style of iGPT, at the size of minGPT's play_image: 32 x 32 pixels in 512 colours, 1,025 tokens per
# picture, 10M parameters, 10 epochs. For a GPU; not measured yet.
# Prepare: python data/cifar10/prepare.py

out_dir = 'out-cifar10'
dataset = 'cifar10'
sampling = 'epoch' # each window is one whole picture, never parts of two
eval_interval = 400
eval_tokens = 512_500 # 500 pictures
log_interval = 20

batch_size = 32
gradient_accumulation_steps = 4
block_size = 1025 # 1,024 pixels after the token that starts the picture
n_layer = 12
n_head = 8
n_embd = 256

learning_rate = 3e-3
min_lr = 3e-4
max_iters = 4200
warmup_iters = 400
beta2 = 0.95
