"""
Trains a GPT on a dataset folder of token files. From any directory:

    python train.py config/quick.py                          a quick start on a GPU or a CPU
    python train.py config/train_shakespeare_char.py --n_layer=4 --mixer=gmlp
    python train.py --out_dir=out-x --init_from=resume       continues that run with its own settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Config files and --key=value change the settings below; --help lists them all. The run writes to out_dir: ckpt.pt (the
latest state), best.pt (the lowest validation loss), config.json, metrics.jsonl and loss.png.
"""
import gc
import math
import random
import shutil
import textwrap
from dataclasses import fields
from typing import Literal

from configurator import answer_early, configure, explain_errors, yield_if_busy

explain_errors() # also for a missing package, or Ctrl-C while torch is imported
answer_early('train.py', 'model.py')
yield_if_busy()
gc.disable() # until the network is built: it would look through torch's million objects again and again
import torch

from data.causality import NOT_FINITE, find_leak
from data.checkpoints import State, architecture, build_model, load_checkpoint, open_weights
from data.dataset import Dataset
from data.machine import Machine, process_number
from data.run import Run, duration
from data.tokens import prefetch
from model import (BUILT_IN, GPT, MIXERS, GPTConfig, add_mixer, clip_adaptively, cost, first_nonfinite,
                   optimizer_groups, peak_bytes)

# ---------------------------------------------------------------------------------------------------------------------
# files and evaluation
out_dir = 'out' # folder of the run
overwrite = False # start from scratch even if out_dir holds a run; that run is deleted
init_from = 'scratch' # scratch | resume | auto (resume if there is a checkpoint) | to finetune: gpt2, gpt2-medium,
    # gpt2-large, gpt2-xl, a checkpoint, a run's folder, or a folder in Hugging Face's format
eval_interval = 2000 # steps between evaluations [1, inf)
eval_iters = 200 # batches per evaluation; always the same fixed windows [1, inf)
eval_tokens = 0 # tokens per evaluation, independent of batch_size and block_size; 0: use eval_iters [0, inf)
eval_only = False # evaluate the whole validation split and exit
always_save_checkpoint = True # save ckpt.pt before every evaluation; False: at the end and every checkpoint_interval
checkpoint_interval = 0 # steps between saves of ckpt.pt; 0: only as always_save_checkpoint says [0, inf)
allow_changes = False # use a checkpoint even if the architecture or tokenizer differs
allow_leak = False # train even if the network is not causal
proof: float | Literal['auto', 'full', 'quick'] = 'auto' # time limit of the search for leaks, in seconds; full: test
    # every cut of the text; quick: one batch of cuts; auto: 2% of the run, between 10 and 20 seconds [0, inf)
dry_run = False # scan the data, take three steps, write and reload a checkpoint, and estimate the time of the run
max_bad_steps = 20 # stop after this many non-finite gradients in a row; such steps are skipped [1, inf)
patience = 0 # early stopping: evaluations without a lower validation loss; 0: never stop [0, inf)
log_interval = 1 # steps between log lines [1, inf)
sample_tokens = 0 # tokens of text to generate and print at each evaluation; 0: none [0, inf)
sample_prompt = '\n' # the prompt for that text; \n is a newline
# logging in addition to metrics.jsonl
wandb_log = False # WANDB_MODE=offline works without a network
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext' # a folder in data/, or a path with a slash
sampling: Literal['random', 'epoch'] = 'random' # random: with replacement; epoch: each window once per epoch
gradient_accumulation_steps = 5 * 8 # micro-batches per step, summed over all processes [1, inf)
batch_size = 12 # sequences per micro-batch [1, inf)
block_size = 1024 # context length in tokens [1, inf)
min_block_size = 0 # above 0: each step draws one of 8 context lengths from this to block_size [0, inf)
# model; more settings at the end
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0 # 0 is good for pretraining, 0.1 or more for finetuning
bias = False # biases in LayerNorm and Linear layers
# optimizer
optimizer: Literal['adamw', 'muon', 'sm3'] = 'adamw' # muon: for hidden matrices, AdamW for the rest; sm3: half of
    # Adam's memory
learning_rate = 6e-4 # peak learning rate [0, inf)
hidden_lr: float | None = None # peak learning rate of Linear layers' matrices; None: learning_rate [0, inf)
max_iters = 600000 # training steps [0, inf)
weight_decay = 1e-1 # for the matrices of Linear and Embedding layers only [0, inf)
beta1 = 0.9 # of AdamW, including its share under muon [0, 1)
beta2 = 0.95 # of AdamW [0, 1)
momentum = 0.95 # Nesterov momentum of muon and sm3 [0, 1)
grad_clip = 1.0 # clip the gradient norm to this; 0 is off [0, inf)
adaptive_clip = 0.0 # adaptive clipping (arXiv 2102.06171): limit per row, as a fraction of the row's norm; 0 is off
    # [0, inf)
# learning rate schedule
decay_lr = True # False: constant after warmup
schedule: Literal['cosine', 'cosine_floor', 'linear', 'wsd'] = 'cosine' # cosine_floor: minGPT's cosine to zero, clamped
    # at min_lr; wsd: warmup, stable, then linear decay over the last wsd_decay_iters steps
warmup_iters = 2000 # steps of linear warmup [0, inf)
lr_decay_iters: int | None = None # step at which min_lr is reached; None: max_iters [0, inf)
wsd_decay_iters = 60000 # steps of wsd's decay [0, inf)
min_lr = 6e-5 # final learning rate, about learning_rate / 10 [0, inf)
# machine
seed = 1337 # of batches, dropout and the initial weights
init_offset = 0 # added to seed for the initial weights alone: other weights, the same batches
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto' # auto: the fastest on this machine
deterministic = False # on a GPU: slower kernels that make a resumed run bit-identical; a CPU needs no setting
compile: bool | Literal['auto'] = 'auto' # torch.compile; auto: on a GPU
peak_flops: float | Literal['auto', 'measure'] = 'auto' # peak FLOP/s, for MFU; auto: from a table of GPUs (0, inf)
parallel: Literal['ddp', 'fsdp'] = 'ddp' # under torchrun: replicate the model (ddp) or shard it (fsdp)
backend: Literal['auto', 'nccl', 'gloo'] = 'auto' # of torch.distributed
# ---------------------------------------------------------------------------------------------------------------------
settings = configure(globals(), GPTConfig, adopt=add_mixer)

# ---------------------------------------------------------------------------------------------------------------------
# What run is this?

def hint_at_memory(error):
    """Advice printed below the traceback of a run that is out of memory."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    return known and (f"out of memory: halve batch_size={batch_size} and double gradient_accumulation_steps="
                      f"{gradient_accumulation_steps} (the same steps), or lower block_size={block_size}, n_layer or "
                      "n_embd")


def window_lengths():
    """The lengths of training windows: only a few, since each may be compiled separately."""
    n = 8 if min_block_size else 1
    return sorted({round(block_size + (min_block_size - block_size) * i / 7) for i in range(n)})


# settings that a resumed run does not take from its checkpoint
OF_THIS_COMMAND = ('out_dir', 'init_from', 'overwrite', 'eval_only', 'dry_run', 'allow_changes')

explain_errors(settings.files, hint_at_memory)
run = Run(out_dir, speaks=process_number() == 0)
resuming = init_from == 'resume' or init_from == 'auto' and run.has_checkpoint()
run.claim(resuming or overwrite or eval_only, restart=init_from == 'auto', lock=not eval_only)
checkpoint, notes = {}, []
if resuming: # keep the run's settings except for those given now
    checkpoint = run.load()
    notes += [f"changed  {line}" for line in settings.take(checkpoint['config'], OF_THIS_COMMAND)]
else:
    parts = ['lr_decay_iters', 'warmup_iters', *(['wsd_decay_iters'] if schedule == 'wsd' else [])]
    notes += [f"note     {line}" for line in settings.shorten('max_iters', *parts)]
    checkpoint = open_weights(init_from) if init_from not in ('scratch', 'auto') else {}
settings.update(lr_decay_iters=max_iters if lr_decay_iters is None else lr_decay_iters)
machine = Machine(device, dtype, peak_flops, parallel, deterministic)
trained_by = checkpoint.get('config', {}).get('optimizer', 'adamw') if resuming else optimizer
settings.refuse([
    (decay_lr and schedule == 'wsd' and warmup_iters + wsd_decay_iters > lr_decay_iters,
     "wsd_decay_iters={wsd_decay_iters} must be at most lr_decay_iters - warmup_iters = {lr_decay_iters} - "
     "{warmup_iters}"),
    (decay_lr and min_lr > learning_rate,
     "min_lr={min_lr} is above learning_rate={learning_rate}, so the rate would rise: lower it to a tenth of that"),
    (min_block_size > block_size, "min_block_size={min_block_size} must be at most block_size={block_size}"),
    (optimizer == 'adamw' and momentum != 0.95,
     "momentum={momentum}: only optimizer='muon' and 'sm3' read it, and optimizer='adamw' is set (its momentum is "
     "beta1)"),
    (trained_by != optimizer,
     f"optimizer={{optimizer!r}} cannot continue from the state of optimizer={trained_by!r}: resume with that, or "
     "start a new run with --init_from=FOLDER"),
    (machine.sharded and optimizer != 'adamw',
     "optimizer={optimizer!r} works on whole matrices, and parallel='fsdp' shares them out: use --parallel=ddp"),
    (gradient_accumulation_steps % machine.world > 0,
     "gradient_accumulation_steps={gradient_accumulation_steps} is not divisible by the number of processes, "
     f"{machine.world}: take a multiple of that"),
])
data = Dataset(dataset, checkpoint, allow_changes)
if sample_tokens:
    data.prompt(sample_prompt) # fail now, not at the first evaluation

# ---------------------------------------------------------------------------------------------------------------------
# Build it

torch.manual_seed((seed + init_offset) % 2 ** 64) # all that it takes
if checkpoint:
    changes = {name: value for name, value in settings.given.items() if name in GPTConfig.__dataclass_fields__}
    changes |= dict(dropout=dropout)
    network, added = build_model(architecture(checkpoint), checkpoint['model'], allow_changes, **changes)
    notes += [f"added    {line}" for line in added]
else:
    args = {field.name: settings.config[field.name] for field in fields(GPTConfig)}
    network = GPT(GPTConfig(**dict(args, vocab_size=settings.given.get('vocab_size', data.vocab_size))))
settings.update(**vars(network.config))
notes += data.check(network.config.vocab_size, block_size, sampling)
costs = {T: cost(network, T) for T in window_lengths()} # FLOPs per token
model, more = machine.wrap(network.to(machine.device), compile, backend, len(costs)) # for training and evaluation
notes += more
state = State(network, network.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), machine.kind,
                                                    optimizer, momentum, hidden_lr), machine.scaler)
if resuming:
    notes += state.restore(checkpoint, settings.config)
notes += state.judge_by(f'{data.val.fingerprint()} {eval_tokens or eval_iters * batch_size} {block_size}')
del checkpoint, network # frees the checkpoint's memory
gc.enable()

# ---------------------------------------------------------------------------------------------------------------------
# What the loop calls

def load(step):
    """This process's micro-batches of a step, as (x, y, targets in the step / targets in y): a function of seed and
    step, so resuming needs no state. The loss of a step is the mean over all of its targets.
    """
    lengths, n = window_lengths(), gradient_accumulation_steps
    T = random.Random(f'{seed} {step}').choice(lengths)
    first = state.first_samples + (step - state.first_step) * n * batch_size
    order = dict(block_size=T, sampling=sampling, seed=seed, stride=block_size)
    n_targets = max(1, data.train.count_targets(first, n * batch_size, **order)) # over all processes
    micro_batches = []
    for i in range(machine.rank, n, machine.world):
        x, y = data.train.batch(first + i * batch_size, batch_size, **order)
        parts = n_targets / max(1, (y >= 0).sum()) / machine.world # DDP and FSDP average over processes
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
    """Mean cross-entropy over (x, y) batches, split among the processes; every target has equal weight."""
    model.eval()
    losses, counts = [], []
    for (x, y), counts_here in machine.deal(batches):
        run.tick(text=f"evaluating, batch {len(losses) + 1}")
        with machine.autocast:
            losses.append(model(*machine.put(x, y))[1]) # read at the end: no synchronization here
        counts.append((y >= 0).sum() * counts_here)
        run.stop = max(run.stop, machine.agree(run.asked_to_stop)) # agree() mostly has no news
        if run.stop:
            break
    model.train()
    counts = torch.tensor(counts, dtype=torch.float64)
    sums = machine.reduce([(torch.stack(losses).cpu().double() @ counts).item(), counts.sum().item()])
    nats, n_targets = torch.tensor(sums, dtype=torch.float64)
    return (nats / n_targets).item() # nan if every token is masked


def due(interval):
    return interval > 0 and state.step % interval == 0


def is_done():
    return state.step >= max_iters or patience and state.evals_since_best >= patience


def eval_batches(split):
    windows = max(1, eval_tokens // block_size) if eval_tokens else eval_iters * batch_size
    return split.fixed_batches(windows, batch_size, block_size)


def evaluate():
    """Computes training and validation loss; saves best.pt if it improved; plots and samples."""
    if state.evaluated == state.step: # the first step of a resumed run
        return
    state.seconds += machine.lap()[0]
    if (always_save_checkpoint or state.step >= max_iters) and state.step > state.first_step:
        save(run.latest) # first: an evaluation can fail, too
    train_loss, val_loss = (mean_loss(eval_batches(split)) for split in (data.train, data.val))
    if run.stop: # the evaluation was interrupted
        return
    better = state.keep_score(val_loss)
    bits = bits_of(val_loss, eval_batches(data.val))
    run.say(f"step {state.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{in_words(bits)}"
            f"{', the best so far' if better else f', none better for {state.evals_since_best} evaluations'}")
    run.log(state, train_loss=train_loss, val_loss=val_loss, **bits)
    if better and state.step > 0:
        save(run.best)
    run.plot(pause=60)
    if sample_tokens and math.isfinite(val_loss): # a model that has diverged writes nothing
        run.say(sample() + '\n')
    machine.lap()


def bits_of(loss, batches):
    return data.bits(loss, (y for _, y in batches)) if run.speaks else {}


def in_words(bits):
    return ''.join(f", {value:.4f} {name.replace('_', ' ')}" for name, value in bits.items())


def sample():
    model.eval()
    prompt = torch.tensor([data.prompt(sample_prompt)], device=machine.device)
    with machine.autocast:
        text = state.model.generate(prompt, sample_tokens, vocab_size=data.tokenizer.vocab_size,
                                    static=False if machine.sharded else None,
                                    generator=torch.Generator(machine.device).manual_seed(seed % 2 ** 64))
    model.train()
    return data.tokenizer.decode(text[0].tolist())


def save(path):
    run.save(path, state.to_checkpoint(settings.config, data.meta))


def report(loss, lr, norm):
    """Logs a step. Reading the loss waits for the device, which nothing else in a step does."""
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
    """Says which module produced the first non-finite number. Too many such steps in a row end the run."""
    with machine.autocast:
        where = None if machine.sharded else first_nonfinite(state.model, x, y)
    n = int(machine.bad_steps)
    run.say(f"warning: step skipped, {n} in a row: gradient norm {norm.item():.4g}; first output that is not finite: "
            f"{where or 'none in the forward pass, so it is in the backward pass'}")
    if n >= max_bad_steps:
        run.say(f"stopping after {n} such steps; the weights are those before them. What usually helps: a lower "
                f"learning_rate (now {learning_rate:g}), a longer warmup_iters ({warmup_iters}), "
                f"grad_clip ({grad_clip:g}), dtype=bfloat16 or float32 instead of float16")
        run.stop = 1 # in all processes at this step


def describe():
    """Describes this run in a few lines."""
    network, n_params, flops = state.model, state.model.get_num_params(False), costs[block_size]
    n_rest, n_hidden = (sum(p.numel() for _, p in optimizer_groups(network)[name]) for name in ('rest', 'hidden'))
    embeddings = [m.weight.numel() for m in (network.transformer.wte, network.transformer.wpe) if m is not None]
    tokens = gradient_accumulation_steps * batch_size * block_size
    epochs = max_iters * tokens / data.train.n_tokens
    days = max_iters * tokens * flops / (0.4 * (machine.peak[0] or math.inf) * machine.world) / 86400
    given = '  '.join(f'{name}={value!r}' for name, value in settings.given.items())
    lines = [
        textwrap.fill(given, shutil.get_terminal_size().columns, initial_indent='settings ',
                      subsequent_indent=' ' * 9, break_long_words=False, break_on_hyphens=False),
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
    moments = 2 * n_params - dict(adamw=0, muon=n_hidden, sm3=n_params)[optimizer] # where Adam has two, these have one
    activations = peak_bytes(network, batch_size, block_size, machine.torch_dtype, machine.kind, machine.compiled,
                             machine.sharded)
    return lines + machine.budget(network, moments, activations, gradient_accumulation_steps > machine.world)


def prove_causal(when=''):
    """Looks for an output that depends on a later token, using real text, the real batch and the real networks."""
    windows, _ = machine.put(*data.train.batch(0, 2 * batch_size, block_size, sampling, seed))
    passes = 3 * max_iters * gradient_accumulation_steps / machine.world # length of the run in forward passes
    limits = dict(auto=(20, passes), full=(math.inf, math.inf), quick=(0, math.inf)).get(proof, (proof, math.inf))
    machine.exchange_gradients(machine.sharded) # no step follows
    with machine.autocast: # test DDP's wrapper: it compiles the network its own way, to overlap the gradient exchange
        found = find_leak(state.model, windows, batch_size, machine.compiled and (model, model), *limits)
    if found.leak and found.leak != NOT_FINITE and not allow_leak: # of those, evaluations and steps will say more
        raise ValueError(f"the network is not causal{when}: {found.leak}; its losses would mean nothing. To train it "
                         "anyway, --allow_leak=True")
    run.say('\n'.join([f"causal   {found}{', with compiling' if machine.compiled else ''}{when}", *found.warnings]))


def evaluate_all():
    """--eval_only: evaluates the whole validation split."""
    loss = mean_loss(data.val.all_batches(batch_size, block_size))
    bits = bits_of(loss, data.val.all_batches(batch_size, block_size))
    n = sum(int((y >= 0).sum()) for _, y in data.val.all_batches(batch_size, block_size))
    run.say(f"whole validation split, {n:,} tokens: loss {loss:.4f}, perplexity "
            f"{torch.tensor(loss).exp():.4g}{in_words(bits)}")
    if state.step > 0: # resumed: the folder belongs to this run
        run.log(state, whole_val_loss=loss, **bits)


for name in sorted(MIXERS.keys() - BUILT_IN):
    if not any(isinstance(module, MIXERS[name]) for module in state.model.modules()):
        notes.append(f"note     {name} of a config file is not used: mixer = {MIXERS[name].__name__} in the file, or "
                     f"--mixer={name}, instead of {settings.config['mixer']!r}")
run.say('\n'.join(describe() + notes))
prove_causal()
if eval_only:
    evaluate_all()
    machine.exit(0)
data.check_targets(eval_batches)
if dry_run: # read all data and take three steps in a temporary folder
    data.scan(state.model.config.vocab_size, run.speaks)
    planned, max_iters, eval_tokens, sample_tokens = max_iters - state.step, state.step + 3, 1, 0
    state.seconds = 0.0 # of these steps
run.begin(state, settings, data, resuming, resolved=dict(device=machine.device, dtype=machine.dtype,
                                                         compile=machine.compiled, world=machine.world))

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
    machine.seed(seed, state.step) # for dropout
    lr = get_lr(state.step)
    for group in state.optimizer.param_groups:
        group['lr'] = lr * group['lr_scale']
    micro_batches, loss_sum = next(batches), 0.0
    for i, (x, y, parts) in enumerate(micro_batches, 1):
        machine.exchange_gradients(i == len(micro_batches)) # once per step
        with machine.autocast:
            loss = model(x, y)[1] / parts
        machine.scaler.scale(loss).backward()
        loss_sum += loss.detach()
    machine.scaler.unscale_(state.optimizer)
    clip_adaptively(state.model, adaptive_clip)
    norm = machine.clip_gradients(grad_clip)
    machine.step(state.optimizer, norm) # no update if norm is not finite
    state.count(gradient_accumulation_steps * batch_size, x.size(1))
    machine.count(gradient_accumulation_steps * x.numel(), costs[x.size(1)])
    run.tick(1)

    # once in a while: log, save a checkpoint
    if state.step % log_interval == 0:
        report(loss_sum, lr, norm)
        if machine.bad_steps > 0:
            explain_bad_steps(x, y, norm)
    if due(checkpoint_interval):
        save(run.latest)
    run.stop = max(run.stop, machine.agree(run.asked_to_stop)) # all processes at the same step

batches.close()
save(run.latest) # at its first step, too: a signal may have come in an evaluation
run.plot()
if status := run.status(state.step):
    machine.exit(status)
if dry_run:
    size = run.speaks and load_checkpoint(run.latest) and run.latest.stat().st_size
    run.say(f"dry run passed: {planned:,} steps take about {duration(state.seconds / 3 * planned)} without "
            f"evaluations; a checkpoint has {size / 1e9:.3g} GB; peak memory {(machine.peak_memory or 0) / 1e9:.3g} GB")
else:
    explain_errors(settings.files, hint_at_memory)
    prove_causal(', after training') # which may open a path that was closed at the start
    own_mixer = set(state.model.config.mixers()) - {MIXERS[name] for name in BUILT_IN}
    run.sum_up(state, settings.files if own_mixer else [])
machine.exit(0)
