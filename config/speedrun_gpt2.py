# GPT-2 124M on FineWeb-Edu, with options that lowered the mean loss of small runs on a CPU (Muon, rotary positions,
# QK-norm, time-mixing), and with relu2 and a linear decay of the learning rate, which did not.
# 6,000 steps x 491,520 tokens = 2.95B tokens x 0.86 GFLOP = 2.5e18 FLOP.
# No GPU has run this yet: neither time nor loss is measured. The estimate for one H100 is 1.8 hours, without the
# optimizer (tests/results). --dry_run takes three steps on your machine and estimates the time of the whole run
# there. llm.c reports 3.28 on FineWeb for GPT-2 124M.
# Prepare: python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/speedrun_gpt2.py

out_dir = 'out-speedrun-gpt2'
dataset = 'fineweb_edu'
# Compiled, this takes 31 GB on each of eight GPUs; 30 and 16 below take 18 GB, 12 and 5 * 8 take 9 GB. Computed, not
# measured on a card.
batch_size = 60
block_size = 1024
gradient_accumulation_steps = 8 # summed over all GPUs
max_iters = 6000
eval_interval = 500
eval_iters = 200
log_interval = 10

pos_emb = 'rope'
mlp = 'relu2'
qk_norm = True
time_mixing = 0.25
narrow_residual = True # estimated to shorten a step by 4%; paired seeds of small models cannot tell its cost in loss

optimizer = 'muon'
learning_rate = 1.5e-3
hidden_lr = 3e-3
schedule = 'linear'
warmup_iters = 250
min_lr = 0.0
weight_decay = 0.1
