# GPT-2 124M on FineWeb-Edu with what the CPU speed runs proved: Muon, rotary positions, QK-norm, relu2, token shift, linear decay.
# 6,000 steps x 491,520 tokens = 2.95B tokens x 0.86 GFLOP = 2.5e18 FLOP: 1.4 hours of one H100 if its MFU were 50%, an eighth of
# that on eight. No GPU has run this yet, so neither the MFU nor the loss is measured: --dry_run times three steps on your
# machine and says how long the run takes there. llm.c's mark on FineWeb is 3.28.
# Prepare: python data/fineweb_edu/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/speedrun_gpt2.py

out_dir = 'out-speedrun-gpt2'
dataset = 'fineweb_edu'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8 # over all GPUs together
max_iters = 6000
lr_decay_iters = 6000
eval_interval = 500
eval_iters = 200
log_interval = 10

pos_emb = 'rope'
mlp = 'relu2'
qk_norm = True
time_mixing = 0.25

optimizer = 'muon'
learning_rate = 1.5e-3
hidden_lr = 3e-3
schedule = 'linear'
warmup_iters = 250
min_lr = 0.0
weight_decay = 0.1
