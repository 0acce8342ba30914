# GPT-2 124M on OpenWebText: 30 x 1024 x 16 = 491,520 tokens per step, 600,000 steps = 295B tokens.
# nanoGPT reports a validation loss of about 2.85 after 4 days on 8 A100 40GB. Not measured here.
# Prepare: python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = 'out-gpt2'
dataset = 'openwebtext'
# Compiled, this takes 16 GB on each of eight GPUs and 15 GB on one; 12 and 5 * 8, as in nanoGPT, take 8.4 GB, 60 and 8
# take 26 GB. Computed; one H200 took what is computed for batches of 12 and of 32. 16 can also be shared by two
# machines of eight GPUs.
batch_size = 30
block_size = 1024
gradient_accumulation_steps = 16 # summed over all GPUs
max_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
