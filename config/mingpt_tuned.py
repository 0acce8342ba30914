# minGPT-tuned's experiment on tinyshakespeare: 10.0M parameters, 150 epochs of 34 steps of 256 x 128 characters.
# Its author reports these training losses after epochs 1, 2, 3, 50, 100 and 150 (steps 34, 68, 102, 1700, 3400, 5100):
#   with the tricks          2.620, 2.228, 2.066, 1.004, 0.710, 0.609
#   minGPT, without them     2.647, 2.499, 2.432, 1.085, 0.807, 0.685
# To run it without them:
#   python train.py config/mingpt_tuned.py --time_weighting=none --time_mixing=0.0 --out_dir=out-mingpt
# Three seeds here gave 2.474, 2.156, 1.960 with the tricks and 2.639, 2.489, 2.376 without; later epochs were not
# measured. Two differences: a tenth of the text is held out for validation, and time weights are not decayed.
# Prepare: python data/shakespeare_char/prepare.py

out_dir = 'out-mingpt-tuned'
dataset = 'shakespeare_char'
eval_interval = 340
eval_iters = 10
log_interval = 34
always_save_checkpoint = False

batch_size = 256
gradient_accumulation_steps = 1
block_size = 128
n_layer = 3
n_head = 8
n_embd = 512
dropout = 0.1
bias = True
tie_weights = False
time_weighting = 'full'
time_mixing = 0.5

learning_rate = 6e-4
min_lr = 6e-5
schedule = 'cosine_floor'
warmup_iters = 1 # 10,240 tokens
max_iters = 5100
