"""
Trains a GPT on a dataset folder of token files. From any directory:

    python train.py config/quick.py                          on a GPU, or small on a CPU
    python train.py config/train_shakespeare_char.py --n_layer=4 --mixer=gmlp
    python train.py --out_dir=out-x --init_from=resume       goes on where that run stopped, with its settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Config files and --key=value change the settings below; --help lists them all. out_dir gets ckpt.pt (the latest), best.pt
(the lowest validation loss), config.json, metrics.jsonl and loss.png.
"""
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import configure, exit_on_error
from data.tokens import Split, dataset_folder, load_meta, load_tokenizer, prefetch
from model import GPT, GPTConfig, find_peak_flops, load_checkpoint, resolve, save_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# files and evaluation
out_dir = 'out' # a run's folder, relative to the project
overwrite = False # start from scratch even if out_dir holds a run, which is deleted
init_from = 'scratch' # scratch | resume | auto (resume if there is something to resume) | gpt2, gpt2-medium, gpt2-large,
    # gpt2-xl | a checkpoint or a folder with one, or with a GPT-2 in Hugging Face's layout, to finetune
eval_interval = 2000 # steps between evaluations
eval_iters = 200 # batches in an evaluation: fixed windows, the same every time
eval_only = False # evaluate the whole validation split and exit
always_save_checkpoint = True # save ckpt.pt at every evaluation; False: only if the validation loss improves
patience = 0 # stop after this many evaluations without a better validation loss; 0: never
log_interval = 1 # steps between log lines
sample_tokens = 0 # tokens of generated text to show at each evaluation; 0: none
sample_prompt = '\n' # what that text continues
# wandb logging
wandb_log = False # WANDB_MODE=offline works without a network
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext' # a folder in data/, or any folder given with a slash
sampling = 'random' # random (windows with replacement) | epoch (every window once an epoch, in a seeded permutation)
gradient_accumulation_steps = 5 * 8 # micro-batches a step, over all processes together
batch_size = 12 # sequences in a micro-batch
block_size = 1024 # tokens of context
# model; more settings at the end
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0 # for pretraining 0 is good, for finetuning try 0.1+
bias = False # biases inside LayerNorm and Linear layers?
# AdamW
learning_rate = 6e-4 # the highest
max_iters = 600000 # steps
weight_decay = 1e-1 # of Linear and Embedding matrices, nothing else
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0 # norm to which gradients are clipped; 0.0: not
# learning rate schedule
decay_lr = True # False: constant after the warmup
schedule = 'cosine' # cosine | wsd (warmup, stable, linear decay over the last wsd_decay_iters)
warmup_iters = 2000 # steps of linear warmup
lr_decay_iters = 600000 # the step at which min_lr is reached
wsd_decay_iters = 60000 # length of wsd's decay
min_lr = 6e-5 # about learning_rate / 10
# machine
seed = 1337
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto' # auto | float32 | bfloat16 | float16
compile: bool | str = 'auto' # torch.compile: True | False | auto (on a GPU)
peak_flops: float | str = 'auto' # FLOP/s that MFU is a share of: a number | auto (table of GPUs) | measure
backend = 'auto' # torch.distributed's: auto | nccl | gloo
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), GPTConfig)

with exit_on_error():
    out = Path(__file__).resolve().parent / os.path.expanduser(out_dir) # an absolute path stays absolute
    latest, best, metrics = out / 'ckpt.pt', out / 'best.pt', out / 'metrics.jsonl'

    # where the weights come from
    resuming = init_from == 'resume' or init_from == 'auto' and (latest.exists() or best.exists())
    scratch = init_from == 'scratch' or init_from == 'auto' and not resuming
    pretrained = init_from in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl') or (Path(init_from) / 'config.json').is_file() \
        and (Path(init_from) / 'model.safetensors').is_file()
    checkpoint = None
    if not resuming and not eval_only and not overwrite and (latest.exists() or best.exists() or metrics.exists()):
        raise ValueError(f"out_dir={out_dir!r} already holds a run: go on with it by --init_from=resume, choose another "
                         "--out_dir, or replace it by --overwrite=True")
    if resuming:
        checkpoint = load_checkpoint(best if best.exists() and not latest.exists() else latest)
    elif not scratch and not pretrained:
        path = next((p for p in (Path(init_from) / 'best.pt', Path(init_from) / 'ckpt.pt') if p.exists()), Path(init_from))
        checkpoint = load_checkpoint(path)
    if resuming: # the run's settings hold where nothing else was asked for
        mine = 'format' in checkpoint # nanoGPT's checkpoint names the device of another machine, perhaps
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in checkpoint.get('config', {}).items()
                if k in config and k not in given and k not in ('out_dir', 'init_from', 'overwrite', 'eval_only')
                and (mine or k not in ('device', 'dtype', 'compile', 'backend'))}
        config |= kept
        globals().update({k: v for k, v in kept.items() if k in globals()})

    # checks that cost neither memory nor time
    for name, right, rule in [
            ('sampling', sampling in ('random', 'epoch'), 'random or epoch'), ('schedule', schedule in ('cosine', 'wsd'), 'cosine or wsd'),
            ('compile', compile in (True, False, 'auto'), 'True, False or auto'), ('batch_size', batch_size > 0, 'at least 1'),
            ('gradient_accumulation_steps', gradient_accumulation_steps > 0, 'at least 1'), ('eval_iters', eval_iters > 0, 'at least 1'),
            ('eval_interval', eval_interval > 0, 'at least 1'), ('log_interval', log_interval > 0, 'at least 1'),
            ('warmup_iters', not decay_lr or warmup_iters <= lr_decay_iters, f'at most lr_decay_iters={lr_decay_iters}'),
            ('wsd_decay_iters', not decay_lr or schedule == 'cosine' or warmup_iters + wsd_decay_iters <= lr_decay_iters,
             f'at most lr_decay_iters - warmup_iters = {lr_decay_iters - warmup_iters}')]:
        if not right:
            raise ValueError(f"{name}={globals()[name]!r} must be {rule}")

    # processes: torchrun sets these variables
    rank, local_rank, world = (int(os.environ.get(k, v)) for k, v in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items())
    main = rank == 0 # writes files and speaks
    if gradient_accumulation_steps % world:
        raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps} is not divisible by the {world} processes")
    if world > 1 and device in ('auto', 'cuda') and torch.cuda.is_available():
        device = f'cuda:{local_rank}'
    device, dtype = resolve(device, dtype)
    device_type = torch.device(device).type
    peak, peak_source = find_peak_flops(peak_flops, device, getattr(torch, dtype))

    # data
    meta = load_meta(dataset_folder(dataset))
    splits = {name: Split(dataset_folder(dataset), name) for name in ('train', 'val')}
    if 'tokenizer' not in meta: # bare token files: the checkpoint knows, or they are GPT-2's as nanoGPT takes them
        meta |= (checkpoint or {}).get('meta') or dict(tokenizer='tiktoken', encoding='gpt2')
    tokenizer = load_tokenizer(meta) if sample_tokens or eval_only else None # training itself needs only ids

    # model
    torch.manual_seed(seed)
    asked = {k: v for k, v in given.items() if k in GPTConfig.__dataclass_fields__} # fields that the user named
    added = []
    if scratch:
        args = {f.name: config[f.name] for f in fields(GPTConfig)}
        if 'vocab_size' not in asked: # a large vocabulary is padded: multiples of 64 make faster matmuls
            size = meta.get('vocab_size', 50257)
            args['vocab_size'] = size if size < 1024 else math.ceil(size / 64) * 64
        model = GPT(GPTConfig(**args))
    elif pretrained:
        model = GPT.from_pretrained(init_from, dict(dropout=dropout) | asked)
    else:
        model, added = GPT.from_weights(checkpoint['model_args'], checkpoint['model'], **dict(dropout=dropout) | asked)
    model_args = vars(model.config)
    config |= model_args
    block_size = model.config.block_size
    for split in splits.values():
        split.vocab_size = model.config.vocab_size # every batch is checked against it

if world > 1:
    if device_type == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group(backend if backend != 'auto' else 'nccl' if device_type == 'cuda' else 'gloo')
torch.set_float32_matmul_precision('high') # TF32 where float32 remains on a GPU
model.to(device)
raw_model = model # without the wrappers of compile and DDP
optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
amp = torch.autocast(device_type, getattr(torch, dtype)) if dtype != 'float32' else nullcontext()

# the loop's state, all of which a checkpoint holds
step, samples, tokens, seconds, best_val_loss, stale = 0, 0, 0, 0.0, math.inf, 0 # stale: evaluations since the best one
if resuming:
    step, best_val_loss = checkpoint['iter_num'], float(checkpoint['best_val_loss'])
    samples = checkpoint.get('samples', step * gradient_accumulation_steps * batch_size)
    tokens, seconds, stale = checkpoint.get('tokens', samples * block_size), checkpoint.get('seconds', 0.0), checkpoint.get('stale', 0)
    optimizer.load_state_dict(checkpoint['optimizer'])
    scaler.load_state_dict(checkpoint.get('scaler') or scaler.state_dict())
checkpoint = None # frees its memory

if compile == 'auto':
    try:
        compile = device_type == 'cuda' and torch.compile(lambda x: x + 1)(torch.ones(1, device=device)).item() == 2
    except Exception as e: # no compiler, no triton, too new a Python, ...
        print(f"not compiling, since torch.compile fails here: {str(e).strip().splitlines()[0]}")
        compile = False
if compile:
    model = torch.compile(model)
fast_model = model # without DDP, for evaluations
if world > 1:
    model = DistributedDataParallel(model, device_ids=[device] if device_type == 'cuda' else None)

def say(text):
    if main:
        tqdm.write(text)
        sys.stdout.flush() # into a pipe or a file, too, when it happens

def load(i):
    """The micro-batches of this process in step i."""
    first = samples_before + (i - step_before) * gradient_accumulation_steps * batch_size
    batches = []
    for micro in range(rank, gradient_accumulation_steps, world):
        batch = splits['train'].batch(first + micro * batch_size, batch_size, block_size, sampling, seed)
        batches.append([to_device(array) for array in batch])
    return batches

def to_device(array):
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device_type == 'cuda' else tensor.to(device)

def get_lr(step):
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    if step >= lr_decay_iters:
        return min_lr
    if schedule == 'wsd':
        return min_lr + (learning_rate - min_lr) * min(1.0, (lr_decay_iters - step) / max(1, wsd_decay_iters))
    ratio = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + (learning_rate - min_lr) * 0.5 * (1.0 + math.cos(math.pi * ratio))

@torch.no_grad()
def mean_loss(batches):
    """Mean cross-entropy over (x, y) batches, shared out over the processes; every target counts the same."""
    raw_model.eval()
    total = torch.zeros(2, dtype=torch.float64) # nats, targets
    for i, (x, y) in enumerate(batches):
        if i % world == rank:
            with amp:
                loss = fast_model(to_device(x), to_device(y))[1]
            n = (y >= 0).sum()
            total += torch.tensor([loss.item() * n, n], dtype=torch.float64)
    raw_model.train()
    if world > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()

def save(path):
    save_checkpoint(path, dict(
        format=1, model=raw_model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
        model_args=model_args, iter_num=step, samples=samples, tokens=tokens, seconds=seconds,
        best_val_loss=best_val_loss, stale=stale, config=config, meta=meta))

def log(**values):
    """Appends to metrics.jsonl, and to wandb if it is on."""
    if main:
        with open(metrics, 'a', encoding='utf-8') as f:
            f.write(json.dumps(dict(step=step, tokens=tokens, seconds=round(seconds, 3), **values)) + '\n')
        if wandb_log:
            wandb.log(dict(tokens=tokens, **values), step=step)

def peak_memory():
    """Bytes: of the GPU, or of the process."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    except ImportError: # Windows
        return None

def git_commit():
    """The project's commit, with a + if files differ from it; None outside of git."""
    try:
        git = lambda *args: subprocess.run(['git', '-C', Path(__file__).resolve().parent, *args], capture_output=True,
                                           text=True, check=True).stdout.strip()
        return git('rev-parse', 'HEAD') + '+' * bool(git('status', '--porcelain'))
    except (OSError, subprocess.CalledProcessError):
        return None

def plot():
    """loss.png: training and validation loss against tokens."""
    import matplotlib # takes a second, so not at start-up
    matplotlib.use('agg')
    from matplotlib import pyplot as plt
    lines = [json.loads(line) for line in open(metrics, encoding='utf-8')]
    figure, axes = plt.subplots(figsize=(8, 5))
    for key, style in (('loss', dict(alpha=0.5, linewidth=0.8)), ('val_loss', dict(marker='.'))):
        points = [(line['tokens'], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points), label='training' if key == 'loss' else 'validation', **style) if points else None
    axes.set(xlabel='tokens', ylabel='nats a token', title=f'{out.name}: best validation loss {best_val_loss:.4f}')
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out / 'loss.png.tmp', format='png', dpi=120)
    os.replace(out / 'loss.png.tmp', out / 'loss.png')
    plt.close(figure)

# what this run is, in a few lines
n_params, n_decayed = raw_model.get_num_params(False), sum(p.numel() for _, p in raw_model.optimizer_groups()[0])
n_embedding = sum(m.weight.numel() for m in (raw_model.transformer.wte, raw_model.transformer.wpe) if m is not None)
flops_per_token, kept_per_token = raw_model.cost(dtype=getattr(torch, dtype))
tokens_per_step, n_tokens = gradient_accumulation_steps * batch_size * block_size, splits['train'].n_tokens
if given:
    say('settings ' + ', '.join(f'{name}={value!r}' for name, value in given.items()))
say(f"""model    {n_params / 1e6:.2f}M parameters, {(n_params - n_embedding) / 1e6:.2f}M without embeddings, {n_decayed / 1e6:.2f}M decayed; {flops_per_token / 1e9:.4g} GFLOP a token
machine  {device}, {dtype}, {'compiled' if compile else 'eager'}, {world} process{'es' * (world > 1)}; peak {f'{peak / 1e12:.4g} TFLOP/s' * bool(peak)} ({peak_source})
data     {dataset}: {n_tokens:,} tokens to train on, {splits['val'].n_tokens:,} to validate; {meta.get('encoding', meta['tokenizer'])}, vocabulary {raw_model.config.vocab_size:,}
run      {max_iters:,} steps of {tokens_per_step:,} tokens = {max_iters * tokens_per_step:,}: {max_iters * tokens_per_step / n_tokens:.3g} epochs
memory   about {(16 * n_params + kept_per_token * batch_size * block_size) / 1e9:.3g} GB: {16 * n_params / 1e9:.3g} of weights, gradients and Adam, {kept_per_token * batch_size * block_size / 1e9:.3g} of activations""")
for name in added:
    say(f"added    {name}, starting as the identity")
if eval_only:
    val = splits['val']
    loss = mean_loss((x, y) for x, y, _ in val.all_batches(batch_size, block_size))
    n_targets, n_bytes = 0, 0
    for _, y, n in val.all_batches(batch_size, block_size):
        n_targets, n_bytes = n_targets + n, n_bytes + tokenizer.n_bytes(y[y >= 0])
    say(f"whole validation split, {n_targets:,} tokens: loss {loss:.4f}, perplexity {math.exp(loss):.4g}, "
        f"{loss * n_targets / n_bytes / math.log(2):.4f} bits per byte")
    sys.exit(0)
if main:
    out.mkdir(parents=True, exist_ok=True)
    kept = [line for line in open(metrics, encoding='utf-8') if json.loads(line)['step'] <= step] if resuming and metrics.exists() else []
    for name in ('ckpt.pt', 'best.pt', 'loss.png') * (not resuming):
        (out / name).unlink(missing_ok=True)
    metrics.write_text(''.join(kept), encoding='utf-8')
    (out / 'config.json').write_text(json.dumps(dict(config, torch=torch.__version__, git=git_commit()), indent=1), encoding='utf-8')
    if wandb_log:
        import wandb
        wandb.init(project=wandb_project, name=wandb_run_name, config=config, dir=out)

# ---------------------------------------------------------------------------------------------------------------------
step_before, samples_before = step, samples
batches = prefetch(load, step)
bar = tqdm(total=max_iters, initial=step, unit='step', disable=not main or not sys.stderr.isatty(), dynamic_ncols=True)
model.train()
evaluated = step if resuming else -1 # this step's evaluation is in the checkpoint
t0, tokens0 = time.perf_counter(), tokens
while True:
    if (step % eval_interval == 0 or step >= max_iters) and step != evaluated:
        seconds += time.perf_counter() - t0
        losses = {name: mean_loss(split.fixed_batches(eval_iters, batch_size, block_size)) for name, split in splits.items()}
        better = losses['val'] < best_val_loss
        best_val_loss, stale = (losses['val'], 0) if better else (best_val_loss, stale + 1)
        say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}{' *' * better}")
        log(train_loss=losses['train'], val_loss=losses['val'])
        if main and step > 0:
            plot()
            if better:
                save(best)
            if better or always_save_checkpoint:
                save(latest)
        if sample_tokens and main:
            raw_model.eval()
            prompt = torch.tensor([tokenizer.encode(sample_prompt)], device=device)
            with amp:
                text = raw_model.generate(prompt, sample_tokens, vocab_size=tokenizer.vocab_size,
                                          generator=torch.Generator(device).manual_seed(seed))
            raw_model.train()
            say(tokenizer.decode(text[0].tolist()) + '\n')
        if patience and stale >= patience:
            say(f"no better validation loss in {stale} evaluations: stopping")
            break
        t0, tokens0 = time.perf_counter(), tokens
    if step >= max_iters:
        break

    # dropout is a function of seed, step and rank, so that a resumed run draws the same masks
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank)
    lr = get_lr(step)
    for group in optimizer.param_groups:
        group['lr'] = lr
    mean = 0.0
    micro_batches = next(batches)
    for i, (x, y) in enumerate(micro_batches):
        model.require_backward_grad_sync = i == len(micro_batches) - 1 # DDP exchanges gradients once a step
        with amp:
            loss = model(x, y)[1] / len(micro_batches)
        scaler.scale(loss).backward()
        mean += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step, samples, tokens = step + 1, samples + gradient_accumulation_steps * batch_size, tokens + tokens_per_step
    bar.update()

    if step % log_interval == 0: # reading the loss waits for the device: nothing else in a step does
        if world > 1:
            dist.all_reduce(mean)
        mean = mean.item() / world
        dt = time.perf_counter() - t0
        speed = (tokens - tokens0) / dt
        mfu = speed * flops_per_token / (peak * world) if peak else None
        seconds += dt
        t0, tokens0 = time.perf_counter(), tokens
        log(loss=mean, lr=lr, grad_norm=norm.item(), tokens_per_s=round(speed), mfu=mfu, peak_memory=peak_memory())
        bar.set_postfix_str(f"loss {mean:.4f}, {speed:,.0f} tokens/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}")
        if bar.disable:
            say(f"iter {step}: loss {mean:.4f}, {speed:,.0f} tokens/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}, lr {lr:.3g}, "
                f"norm {norm.item():.3f}")
bar.close()
batches.close()
if world > 1:
    dist.destroy_process_group()
