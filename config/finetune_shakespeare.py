# Finetunes GPT-2 XL on tinyshakespeare: 20 steps of 32 x 1024 tokens = 2.2 epochs of 301,966 tokens. Not measured here.
# For a smaller GPU: --init_from=gpt2-medium
# Prepare: python data/shakespeare/prepare.py

out_dir = 'out-shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl'
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
warmup_iters = 0
decay_lr = False
