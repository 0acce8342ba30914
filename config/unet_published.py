# The shape of the published UNet GPT (nanoGPT's UNet thread), without its leak: 5 levels of factor 2, from 1024 tokens
# down to 32, and 100 blocks there. Its loss near 1.0 came from seeing the next token. Its loss without the leak is not
# measured here. 16 x 1024 tokens x 4 = 65,536 tokens per step.
# Prepare: python data/openwebtext/prepare.py

out_dir = 'out-unet-published'
dataset = 'openwebtext'
batch_size = 16
gradient_accumulation_steps = 4
block_size = 1024
unet_layers = (5, 2, 2, 2, 2)
n_layer = 100
n_head = 12
n_embd = 768

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 100000
eval_interval = 1000
log_interval = 10
