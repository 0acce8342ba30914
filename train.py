"""
Trains a GPT on a dataset folder of token files. From any directory:

    python train.py config/quick.py                          on a GPU, or small on a CPU
    python train.py config/train_shakespeare_char.py --n_layer=4 --mixer=gmlp
    python train.py --out_dir=out-x --init_from=resume       goes on where that run stopped, with its settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Config files and --key=value change the settings below; --help lists them all. out_dir gets ckpt.pt (the latest),
best.pt (the lowest validation loss), config.json, metrics.jsonl and loss.png.
"""
import math
import random
import shlex
import time
from dataclasses import fields
from typing import Literal

from configurator import configure, explain_errors, yield_if_busy

explain_errors() # a missing package, or Ctrl-C while torch is imported
yield_if_busy()
import torch

from data.checkpoints import State, architecture, build_model, load_checkpoint, open_weights
from data.dataset import Dataset
from data.machine import Machine, process_number
from data.run import Run, duration, table
from data.tokens import prefetch
from model import (BUILT_IN, GPT, MIXERS, GPTConfig, add_mixer, clip_adaptively, cost, find_leak, first_nonfinite,
                   optimizer_groups)

# ---------------------------------------------------------------------------------------------------------------------
# files and evaluation
out_dir = 'out' # a run's folder
overwrite = False # start from scratch even if out_dir holds a run, which is deleted
init_from = 'scratch' # scratch | resume | auto (resume if there is something to resume) | gpt2, gpt2-medium,
    # gpt2-large, gpt2-xl | a checkpoint, a run's folder, or one in Hugging Face's layout, to finetune
eval_interval = 2000 # steps between evaluations [1, inf)
eval_iters = 200 # batches in an evaluation: fixed windows, the same every time [1, inf)
eval_tokens = 0 # tokens in an evaluation, whatever batch_size and block_size are; 0: see eval_iters [0, inf)
eval_only = False # evaluate the whole validation split and exit
always_save_checkpoint = True # save ckpt.pt before every evaluation; False: at the end and every checkpoint_interval
checkpoint_interval = 0 # steps between saves of ckpt.pt; 0: see always_save_checkpoint [0, inf)
allow_changes = False # use a checkpoint even if the architecture or tokenizer differs
allow_leak = False # train even if the network is not causal
dry_run = False # scan the data, take three steps, write a checkpoint, read it back, and say how long the run takes
max_bad_steps = 20 # stop after this many steps in a row whose gradient is not finite; each is skipped [1, inf)
patience = 0 # stop after this many evaluations without a better validation loss; 0: never [0, inf)
log_interval = 1 # steps between log lines [1, inf)
sample_tokens = 0 # tokens of generated text to show at each evaluation; 0: none [0, inf)
sample_prompt = '\n' # what that text continues; \n is a line end
# logging beside metrics.jsonl
wandb_log = False # WANDB_MODE=offline works without a network
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext' # a folder in data/, or any folder given with a slash
sampling: Literal['random', 'epoch'] = 'random' # random: windows with replacement; epoch: each window once an epoch
gradient_accumulation_steps = 5 * 8 # micro-batches a step, over all processes together [1, inf)
batch_size = 12 # sequences in a micro-batch [1, inf)
block_size = 1024 # tokens of context
min_block_size = 0 # above 0: each step draws one of 8 window lengths from here to block_size [0, inf)
# model; more settings at the end
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0 # 0 is good for pretraining, 0.1 or more for finetuning
bias = False # biases in LayerNorm and Linear layers
# optimizer
optimizer: Literal['adamw', 'muon', 'sm3'] = 'adamw' # muon: of hidden matrices, AdamW for the rest; sm3: half of
    # Adam's memory
learning_rate = 6e-4 # the highest [0, inf)
hidden_lr: float | None = None # of Linear layers' matrices; None: learning_rate [0, inf)
max_iters = 600000 # steps [0, inf)
weight_decay = 1e-1 # of Linear and Embedding matrices, nothing else [0, inf)
beta1 = 0.9 # AdamW's, also beside Muon [0, 1)
beta2 = 0.95 # [0, 1)
momentum = 0.95 # muon's and sm3's, Nesterov's way [0, 1)
grad_clip = 1.0 # clip the gradient norm to this; 0 is off [0, inf)
adaptive_clip = 0.0 # adaptive clipping (arXiv 2102.06171): limit per row, as a fraction of the row's norm; 0 is off
    # [0, inf)
# learning rate schedule
decay_lr = True # False: constant after the warmup
schedule: Literal['cosine', 'cosine_floor', 'linear', 'wsd'] = 'cosine' # cosine_floor: minGPT's, to zero but never
    # below min_lr; wsd: warmup, stable, linear decay over the last wsd_decay_iters
warmup_iters = 2000 # steps of linear warmup [0, inf)
lr_decay_iters: int | None = None # the step at which min_lr is reached; None: max_iters [0, inf)
wsd_decay_iters = 60000 # length of wsd's decay [0, inf)
min_lr = 6e-5 # about learning_rate / 10 [0, inf)
# machine
seed = 1337
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto' # auto: what the machine multiplies fast
deterministic = False # on a GPU: slower kernels that give a resumed run the same bits; a CPU's always do
compile: bool | Literal['auto'] = 'auto' # torch.compile; auto: on a GPU
peak_flops: float | Literal['auto', 'measure'] = 'auto' # FLOP/s that MFU is a share of; auto: a table of GPUs (0, inf)
parallel: Literal['ddp', 'fsdp'] = 'ddp' # under torchrun: each process holds the model, or they share it out
backend: Literal['auto', 'nccl', 'gloo'] = 'auto' # torch.distributed's
# ---------------------------------------------------------------------------------------------------------------------
settings = configure(globals(), GPTConfig, adopt=add_mixer)

# ---------------------------------------------------------------------------------------------------------------------
# What run is this?

def hint_at_memory(error):
    """What usually helps, under the traceback of a run that is out of memory."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    return known and (f"out of memory: halve batch_size={batch_size} and double gradient_accumulation_steps="
                      f"{gradient_accumulation_steps} (the same steps), or lower block_size={block_size}, n_layer or "
                      "n_embd")


def window_lengths():
    """The lengths of training windows: few, since a compiler may compile each."""
    n = 8 if min_block_size else 1
    return sorted({round(block_size + (min_block_size - block_size) * i / 7) for i in range(n)})


# what a resumed run does not take from its checkpoint
OF_THIS_COMMAND = ('out_dir', 'init_from', 'overwrite', 'eval_only', 'dry_run', 'allow_changes')

explain_errors(settings.files, hint_at_memory)
run = Run(out_dir, speaks=process_number() == 0)
resuming = init_from == 'resume' or init_from == 'auto' and run.has_checkpoint()
run.claim(resuming or overwrite or eval_only, restart=init_from == 'auto', lock=not eval_only)
checkpoint, notes = {}, []
if resuming: # the run's settings hold where nothing else was asked for
    checkpoint = run.load()
    notes += [f"changed  {line}" for line in settings.take(checkpoint['config'], OF_THIS_COMMAND)]
else:
    notes += [f"note     {line}" for line in settings.shorten('max_iters', 'lr_decay_iters', 'warmup_iters',
                                                              'wsd_decay_iters')]
    checkpoint = open_weights(init_from) if init_from not in ('scratch', 'auto') else {}
settings.update(lr_decay_iters=max_iters if lr_decay_iters is None else lr_decay_iters)
machine = Machine(device, dtype, peak_flops, parallel, deterministic)
trained_by = checkpoint.get('config', {}).get('optimizer', 'adamw') if resuming else optimizer
settings.refuse([
    (decay_lr and schedule == 'wsd' and warmup_iters + wsd_decay_iters > lr_decay_iters,
     "wsd_decay_iters={wsd_decay_iters} must be at most lr_decay_iters - warmup_iters = {lr_decay_iters} - "
     "{warmup_iters}"),
    (min_block_size > block_size, "min_block_size={min_block_size} must be at most block_size={block_size}"),
    (optimizer == 'adamw' and momentum != 0.95,
     "momentum={momentum}: only optimizer='muon' and 'sm3' read it, and optimizer='adamw' is set (its momentum is "
     "beta1)"),
    (trained_by != optimizer,
     f"optimizer={{optimizer!r}} cannot go on with the state of optimizer={trained_by!r}: resume with that, or begin a "
     "new run with --init_from=FOLDER"),
    (machine.sharded and optimizer != 'adamw',
     "optimizer={optimizer!r} works on whole matrices, and parallel='fsdp' shares them out: use --parallel=ddp"),
    (gradient_accumulation_steps % machine.world > 0,
     "gradient_accumulation_steps={gradient_accumulation_steps} is not divisible by the number of processes, "
     f"{machine.world}: take a multiple of that"),
])
data = Dataset(dataset, checkpoint, allow_changes)
if sample_tokens:
    data.prompt(sample_prompt) # one that cannot be read would end the run at its first evaluation

# ---------------------------------------------------------------------------------------------------------------------
# Build it

torch.manual_seed(seed)
if checkpoint:
    changes = {name: value for name, value in settings.given.items() if name in GPTConfig.__dataclass_fields__}
    changes |= dict(dropout=dropout)
    network, added = build_model(architecture(checkpoint), checkpoint['model'], allow_changes, **changes)
    notes += [f"added    {line}" for line in added]
else:
    args = {field.name: settings.config[field.name] for field in fields(GPTConfig)}
    network = GPT(GPTConfig(**dict(args, vocab_size=settings.given.get('vocab_size', data.vocab_size))))
settings.update(**vars(network.config))
data.check(network.config.vocab_size, block_size, sampling)
costs = {T: cost(network, T, machine.torch_dtype, machine.kind) for T in window_lengths()} # FLOPs and bytes a token
model, more = machine.wrap(network.to(machine.device), compile, backend, len(costs)) # as it trains and evaluates
notes += more
state = State(network, network.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), machine.kind,
                                                    optimizer, momentum, hidden_lr), machine.scaler)
if resuming:
    notes += state.restore(checkpoint, settings.config)
notes += state.judge_by(f'{data.val.fingerprint()} {eval_tokens or eval_iters * batch_size} {block_size}')
del checkpoint, network # the checkpoint's memory

# ---------------------------------------------------------------------------------------------------------------------
# What the loop calls

def load(step):
    """
    This process's micro-batches of a step, each (x, y, the step's targets as a multiple of this one's): a function of
    seed and step, so resuming needs no state. The mean over the targets of a whole step is what it descends.
    """
    lengths, n = window_lengths(), gradient_accumulation_steps
    T = lengths[0] if len(lengths) == 1 else random.Random(f'{seed} {step}').choice(lengths)
    first = state.first_samples + (step - state.first_step) * n * batch_size
    order = dict(block_size=T, sampling=sampling, seed=seed, stride=block_size)
    n_targets = max(1, data.train.count_targets(first, n * batch_size, **order)) # of all processes
    micro_batches = []
    for i in range(machine.rank, n, machine.world):
        x, y = data.train.batch(first + i * batch_size, batch_size, **order)
        parts = n_targets / max(1, (y >= 0).sum()) / machine.world # DDP and FSDP take the mean over processes
        micro_batches.append((*machine.put(x, y), parts))
    return micro_batches


def get_lr(step):
    # 1) linear warmup
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    # 2) before and after the decay
    if not decay_lr:
        return learning_rate
    if step >= lr_decay_iters:
        return min_lr
    # 3) in between, down to min_lr
    if schedule == 'linear':
        return min_lr + (learning_rate - min_lr) * (lr_decay_iters - step) / (lr_decay_iters - warmup_iters)
    if schedule == 'wsd':
        return min_lr + (learning_rate - min_lr) * min(1.0, (lr_decay_iters - step) / max(1, wsd_decay_iters))
    ratio = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
    if schedule == 'cosine_floor':
        return max(min_lr, learning_rate * 0.5 * (1.0 + math.cos(math.pi * ratio)))
    return min_lr + (learning_rate - min_lr) * 0.5 * (1.0 + math.cos(math.pi * ratio))


@torch.no_grad()
def mean_loss(batches):
    """Mean cross-entropy over (x, y) batches, shared out over the processes; every target counts the same."""
    model.eval()
    losses, counts = [], []
    for (x, y, *_), counts_here in machine.deal(batches):
        run.tick(text=f"evaluating, batch {len(losses) + 1}")
        with machine.autocast:
            losses.append(model(*machine.put(x, y))[1]) # read at the end, so that nothing waits here
        counts.append((y >= 0).sum() * counts_here)
        run.stop = machine.agree(run.stop)
        if run.stop:
            break
    model.train()
    counts = torch.tensor(counts, dtype=torch.float64)
    nats, n_targets = machine.reduce([(torch.stack(losses).cpu().double() @ counts).item(), counts.sum().item()])
    return nats / max(1, n_targets)


def due(interval):
    return interval > 0 and state.step % interval == 0


def is_done():
    return state.step >= max_iters or patience and state.evals_since_best >= patience


def eval_batches(split):
    windows = max(1, eval_tokens // block_size) if eval_tokens else eval_iters * batch_size
    return split.fixed_batches(windows, batch_size, block_size)


def evaluate():
    """Training and validation loss, best.pt if it is the best one, the picture, a sample."""
    if state.evaluated == state.step: # as a resumed run's first step
        return
    state.seconds += machine.lap()[0]
    if always_save_checkpoint and state.step > state.first_step:
        save(run.latest) # first: an evaluation can fail, too
    train_loss, val_loss = (mean_loss(eval_batches(split)) for split in (data.train, data.val))
    if run.stop: # it was not finished
        return
    better = state.keep_score(val_loss)
    bits = bits_of(val_loss, eval_batches(data.val))
    run.say(f"step {state.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{in_words(bits)}"
            f"{', the best so far' if better else f', none better for {state.evals_since_best} evaluations'}")
    run.log(state, train_loss=train_loss, val_loss=val_loss, **bits)
    if better and state.step > 0:
        save(run.best)
    run.plot(pause=60)
    if sample_tokens:
        run.say(sample() + '\n')
    machine.lap()


def bits_of(loss, batches):
    return data.bits(loss, (y for _, y, *_ in batches)) if run.speaks else {}


def in_words(bits):
    return ''.join(f", {value:.4f} {name.replace('_', ' ')}" for name, value in bits.items())


def sample():
    model.eval()
    prompt = torch.tensor([data.prompt(sample_prompt)], device=machine.device)
    try:
        with machine.autocast:
            text = state.model.generate(prompt, sample_tokens, vocab_size=data.tokenizer.vocab_size,
                                        static=False if machine.sharded else None,
                                        generator=torch.Generator(machine.device).manual_seed(seed))
    except ValueError as e: # the model has diverged: that is max_bad_steps' business
        return f"warning: no sample: {e}"
    finally:
        model.train()
    return data.tokenizer.decode(text[0].tolist())


def save(path):
    run.save(path, state.to_checkpoint(settings.config, data.meta))


def report(loss, lr, norm):
    """The log line of a step. Reading the loss waits for the device: nothing else in a step does."""
    loss, norm = machine.reduce(loss) / machine.world, norm.item()
    seconds, tokens_per_s, mfu = machine.lap()
    state.seconds += seconds
    run.log(state, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=round(tokens_per_s), mfu=mfu,
            peak_memory=machine.peak_memory)
    speed = f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}"
    run.tick(text=speed)
    if run.bar.disable:
        run.say(f"step {state.step}: {speed}, lr {lr:.3g}, norm {norm:.3f}")


def explain_bad_steps(x, y, norm):
    """Says where the first number that is not finite comes from. After too many in a row the run ends."""
    with machine.autocast:
        where = None if machine.sharded else first_nonfinite(state.model, x, y)
    n = int(machine.bad_steps)
    run.say(f"warning: step skipped, {n} in a row: gradient norm {norm.item():.4g}; first output that is not finite: "
            f"{where or 'none in a forward pass, so it is the backward'}")
    if n >= max_bad_steps:
        run.say(f"stopping after {n} such steps; the weights are those before them. What usually helps: a lower "
                f"learning_rate (now {learning_rate:g}), a longer warmup_iters ({warmup_iters}), "
                f"grad_clip ({grad_clip:g}), dtype=bfloat16 or float32 instead of float16")
        run.stop = 1


def describe(flops, kept):
    """What this run is, in a few lines. flops, and bytes kept for the backward pass: of a token."""
    network, n_params = state.model, state.model.get_num_params(False)
    n_rest = sum(p.numel() for _, p in optimizer_groups(network)['rest'])
    embeddings = [m.weight.numel() for m in (network.transformer.wte, network.transformer.wpe) if m is not None]
    tokens = gradient_accumulation_steps * batch_size * block_size
    epochs = max_iters * tokens / data.train.n_tokens
    days = max_iters * tokens * flops / (0.4 * (machine.peak[0] or math.inf) * machine.world) / 86400
    lines = [
        'settings ' + '\n         '.join(table([f'{name}={value!r}' for name, value in settings.given.items()])),
        f"model    {n_params / 1e6:.2f}M parameters, {(n_params - sum(embeddings)) / 1e6:.2f}M without embeddings, "
        f"{(n_params - n_rest) / 1e6:.2f}M decayed; {flops / 1e9:.4g} GFLOP a token",
        f"machine  {machine}",
        f"data     {data}, vocabulary {network.config.vocab_size:,}",
        f"run      {max_iters:,} steps of {tokens:,} tokens = {max_iters * tokens:,}: {epochs:,.3g} epochs"]
    if epochs > 100 and state.step == 0:
        lines.append(f"warning: {epochs:,.0f} times the same {data.train.n_tokens:,} tokens; for 20 times, --max_iters="
                     f"{max(1, round(20 * max_iters / epochs))}")
    if days > 1 and state.step == 0:
        lines.append(f"warning: at 40% of the peak that takes about {duration(86400 * days)}; fewer steps: --max_iters")
    bytes_a_parameter = 12 if optimizer == 'sm3' else 16
    return lines + machine.budget(n_params, bytes_a_parameter, kept * batch_size * block_size)


def prove_causal():
    """Looks for an output that sees a later token, with the model, the length and the dtype that will train."""
    t0 = time.perf_counter()
    torch.manual_seed(seed) # all processes do the same
    # each row tries one place to cut the text: 16 do; a compiled network takes the shape that will train
    rows = batch_size if machine.compiled else min(batch_size, 16)
    idx = torch.randint(state.model.config.vocab_size, (rows, block_size)).to(machine.device)
    machine.exchange_gradients(machine.sharded) # no step follows
    with machine.autocast:
        leak = find_leak(state.model, idx, model)
    if leak and not allow_leak:
        raise ValueError(f"the network is not causal: {leak}; its losses would mean nothing. To train it all the same, "
                         "--allow_leak=True")
    took = f"in {1000 * (time.perf_counter() - t0):,.0f} ms{', with compiling' if machine.compiled else ''}"
    run.say(f"causal   {'NO: ' + leak if leak else f'proven at T={block_size} {took}'}")


def evaluate_all():
    """--eval_only: the whole validation split."""
    loss = mean_loss(data.val.all_batches(batch_size, block_size))
    bits = bits_of(loss, data.val.all_batches(batch_size, block_size))
    n = sum(n for _, _, n in data.val.all_batches(batch_size, block_size))
    run.say(f"whole validation split, {n:,} tokens: loss {loss:.4f}, perplexity "
            f"{torch.tensor(loss).exp():.4g}{in_words(bits)}")
    if resuming: # the folder is this run's
        run.log(state, whole_val_loss=loss, **bits)


for name in sorted(MIXERS.keys() - BUILT_IN):
    if not any(isinstance(module, MIXERS[name]) for module in state.model.modules()):
        notes.append(f"note     {name} of a config file is not used: mixer = {MIXERS[name].__name__} in the file, or "
                     f"--mixer={name}, instead of {settings.config['mixer']!r}")
run.say('\n'.join(describe(*costs[block_size]) + notes))
prove_causal()
if eval_only:
    evaluate_all()
    machine.exit(0)
if dry_run: # all data are read, and three steps taken in a folder that is removed
    data.scan(state.model.config.vocab_size, run.speaks)
    planned, max_iters, eval_tokens, sample_tokens = max_iters - state.step, state.step + 3, 1, 0
run.begin(state, settings, resuming, data=data.fingerprints(), resolved=dict(
    device=machine.device, dtype=machine.dtype, compile=machine.compiled, world=machine.world))

# ---------------------------------------------------------------------------------------------------------------------
# The loop

batches = prefetch(load, state.step)
explain_errors(settings.files, hint_at_memory, trace=True)
run.catch_signals()
run.progress(max_iters, state.step)
machine.lap()
model.train()
while not run.stop:
    # once in a while: evaluate
    if due(eval_interval) or state.step >= max_iters:
        evaluate()
    if run.stop or is_done():
        break

    # the step
    machine.seed(seed, state.step) # of dropout
    lr = get_lr(state.step)
    for group in state.optimizer.param_groups:
        group['lr'] = lr * group['lr_scale']
    micro_batches, loss_sum = next(batches), 0.0
    for i, (x, y, parts) in enumerate(micro_batches, 1):
        machine.exchange_gradients(i == len(micro_batches)) # once a step
        with machine.autocast:
            loss = model(x, y)[1] / parts
        machine.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    machine.scaler.unscale_(state.optimizer)
    clip_adaptively(state.model, adaptive_clip)
    norm = machine.clip_gradients(grad_clip)
    machine.step(state.optimizer, norm) # one that is not finite changes nothing
    state.count(gradient_accumulation_steps * batch_size, x.size(1))
    machine.count(gradient_accumulation_steps * x.numel(), costs[x.size(1)][0])
    run.tick(1)

    # once in a while: tell how it goes, keep a checkpoint
    if state.step % log_interval == 0:
        report(loss_sum, lr, norm)
        if machine.bad_steps > 0:
            explain_bad_steps(x, y, norm)
    if due(checkpoint_interval):
        save(run.latest)
    run.stop = machine.agree(run.stop) # all processes at the same step

batches.close()
if state.step > state.first_step:
    save(run.latest)
    run.plot()
status = run.status(state.step)
if dry_run:
    size = run.speaks and load_checkpoint(run.latest) and run.latest.stat().st_size
    run.say(f"dry run passed: {planned:,} steps take about {duration(state.seconds / 3 * planned)} without "
            f"evaluations; a checkpoint has {size / 1e9:.3g} GB; peak memory {(machine.peak_memory or 0) / 1e9:.3g} GB")
elif not run.stop:
    own_mixer = set(state.model.config.mixers()) - {MIXERS[name] for name in BUILT_IN}
    run.sum_up(state, settings.files if own_mixer else [])
machine.exit(status)
