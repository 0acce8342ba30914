"""
Trains a GPT on a dataset folder of token files. From any directory:

    python train.py config/quick.py                          on a GPU, or small on a CPU
    python train.py config/train_shakespeare_char.py --n_layer=4 --mixer=gmlp
    python train.py --out_dir=out-x --init_from=resume       goes on where that run stopped, with its settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Config files and --key=value change the settings below; --help lists them all. out_dir gets ckpt.pt (the latest), best.pt
(the lowest validation loss), config.json, metrics.jsonl and loss.png.
"""
import atexit
import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path

gc.disable() # until everything is imported: searching what imports leave, again and again, takes a sixth of a second
import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import configure, exit_on_error
from data.tokens import Split, dataset_folder, load_meta, load_tokenizer, prefetch
from model import (GPT, Block, GPTConfig, clip_adaptively, find_peak_flops, full_state, keep_freed_memory, load_checkpoint,
                   load_optimizer, recompute_what_is_cheap, resolve, save_checkpoint)

# ---------------------------------------------------------------------------------------------------------------------
# files and evaluation
out_dir = 'out' # a run's folder, relative to the project
overwrite = False # start from scratch even if out_dir holds a run, which is deleted
init_from = 'scratch' # scratch | resume | auto (resume if there is something to resume) | gpt2, gpt2-medium, gpt2-large,
    # gpt2-xl | a checkpoint or a folder with one, or with a GPT-2 in Hugging Face's layout, to finetune
eval_interval = 2000 # steps between evaluations
eval_iters = 200 # batches in an evaluation: fixed windows, the same every time
eval_only = False # evaluate the whole validation split and exit
always_save_checkpoint = True # save ckpt.pt before every evaluation; False: at the end and every checkpoint_interval only
checkpoint_interval = 0 # steps between saves of ckpt.pt; 0: see always_save_checkpoint
snapshot_interval = 0 # steps between checkpoints that are kept, as step-1000.pt; 0: none
allow_changes = False # use a checkpoint although the architecture or the tokenizer has become another
dry_run = False # scan the data, take three steps, write a checkpoint and read it back, say how long the run takes
max_bad_steps = 20 # stop after this many steps in a row whose loss or gradient is not finite; such a step is skipped
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
min_block_size = 0 # above 0: each step draws one of 8 window lengths from here to block_size
# model; more settings at the end
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0 # for pretraining 0 is good, for finetuning try 0.1+
bias = False # biases inside LayerNorm and Linear layers?
# optimizer
optimizer = 'adamw' # adamw | muon (of the hidden matrices; AdamW for the rest) | sm3 (half of Adam's memory)
learning_rate = 6e-4 # the highest
hidden_lr: float | None = None # of Linear layers' matrices, where it is to differ from learning_rate
embedding_lr: float | None = None # of the embeddings and the head
other_lr: float | None = None # of biases, norms and tables along time
max_iters = 600000 # steps
weight_decay = 1e-1 # of Linear and Embedding matrices, nothing else
hidden_decay: float | None = None # of Linear layers' matrices, where it is to differ from weight_decay
embedding_decay: float | None = None # of the embeddings and the head
beta1 = 0.9 # AdamW's, also beside Muon
beta2 = 0.95
momentum = 0.95 # muon's and sm3's
nesterov = True
grad_clip = 1.0 # norm to which gradients are clipped; 0.0: not
adaptive_clip = 0.0 # before that, the gradient of each row to this share of the row's norm, such as 0.003; 0.0: not
ema = 0.0 # decay a step of an average of the weights, such as 0.99, which is evaluated and sampled from; 0.0: none
# learning rate schedule
decay_lr = True # False: constant after the warmup
schedule = 'cosine' # cosine | cosine_floor (minGPT's: to zero, but never below min_lr) | linear (to min_lr) | wsd (warmup,
    # stable, linear decay over the last wsd_decay_iters)
warmup_iters = 2000 # steps of linear warmup
lr_decay_iters = 600000 # the step at which min_lr is reached
wsd_decay_iters = 60000 # length of wsd's decay
min_lr = 6e-5 # about learning_rate / 10
batch_warmup_iters = 0 # steps in which batches grow from min_batch_size to batch_size, in up to 8 stages
min_batch_size = 0
block_warmup_iters = 0 # steps in which windows grow from min_block_size to block_size, instead of being drawn
# machine
seed = 1337
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto' # auto | float32 | bfloat16 | float16
deterministic = False # on a GPU: slower kernels that give a resumed run the same bits; a CPU's always do
compile: bool | str = 'auto' # torch.compile: True | False | auto (on a GPU) | reduce-overhead (CUDA graphs) | max-autotune (the
    # fastest kernels and CUDA graphs) | max-autotune-no-cudagraphs
peak_flops: float | str = 'auto' # FLOP/s that MFU is a share of: a number | auto (table of GPUs) | measure
parallel = 'ddp' # under torchrun: ddp (each process holds the model) | fsdp (they share it out)
backend = 'auto' # torch.distributed's: auto | nccl | gloo
# ---------------------------------------------------------------------------------------------------------------------
config, given = configure(globals(), GPTConfig)

with exit_on_error():
    project = Path(__file__).resolve().parent
    out = project / os.path.expanduser(out_dir) # an absolute path stays absolute
    latest, best, metrics = out / 'ckpt.pt', out / 'best.pt', out / 'metrics.jsonl'

    if out.exists() and not out.is_dir():
        raise ValueError(f"out_dir={out_dir!r} is a file: choose another --out_dir")

    # where the weights come from
    resuming = init_from == 'resume' or init_from == 'auto' and (latest.exists() or best.exists())
    scratch = init_from == 'scratch' or init_from == 'auto' and not resuming
    start = next((p for p in (Path(init_from).expanduser(), project / init_from) if p.exists()), Path(init_from))
    pretrained = init_from in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl') or (start / 'model.safetensors').is_file()
    checkpoint = None
    if not (resuming or eval_only or dry_run or overwrite):
        if latest.exists() or best.exists():
            raise ValueError(f"out_dir={out_dir!r} already holds a run: go on with it by --init_from=resume, choose another "
                             "--out_dir, or replace it by --overwrite=True")
        # auto begins again what was killed before its first checkpoint
        if any(out.glob('step-*.pt')) or init_from != 'auto' and metrics.exists() and metrics.stat().st_size:
            raise ValueError(f"out_dir={out_dir!r} already holds a run, which left no ckpt.pt to go on with: choose another "
                             "--out_dir, or replace it by --overwrite=True")
    if resuming:
        try:
            checkpoint = load_checkpoint(latest if latest.exists() or not best.exists() else best)
        except ValueError as e:
            good = []
            for path in (best, *out.glob('step-*.pt')):
                with suppress(ValueError, OSError):
                    good.append(f"{path} (step {load_checkpoint(path)['iter_num']})")
            raise ValueError(f"{e}; {'good: ' + ', '.join(good) + ': copy one to ckpt.pt' if good else 'there is no other'}") from None
    elif not scratch and not pretrained:
        checkpoint = load_checkpoint(next((p for p in (start / 'best.pt', start / 'ckpt.pt') if p.exists()), start))
    changed = {}
    if resuming: # the run's settings hold where nothing else was asked for
        mine = 'format' in checkpoint # nanoGPT's checkpoint names the device of another machine, perhaps
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in checkpoint.get('config', {}).items()
                if k in config and k not in given
                and k not in ('out_dir', 'init_from', 'overwrite', 'eval_only', 'dry_run', 'allow_changes')
                and (mine or k not in ('device', 'dtype', 'compile', 'backend'))}
        changed = {k: (checkpoint['config'][k], v) for k, v in given.items()
                   if checkpoint.get('config', {}).get(k, v) != v and k not in ('out_dir', 'init_from')}
        config |= kept
        globals().update({k: v for k, v in kept.items() if k in globals()})

    # checks that cost neither memory nor time
    wrong = []
    def check(name, right, rule):
        if not right:
            wrong.append(f"{name}={globals()[name]!r} must be {rule}")
    for name, choices in dict(
            sampling=('random', 'epoch'), schedule=('cosine', 'cosine_floor', 'linear', 'wsd'),
            optimizer=('adamw', 'muon', 'sm3'), parallel=('ddp', 'fsdp'),
            compile=(True, False, 'auto', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')).items():
        check(name, globals()[name] in choices, f"one of {', '.join(map(str, choices))}")
    for name in ('batch_size', 'gradient_accumulation_steps', 'eval_iters', 'eval_interval', 'log_interval'):
        check(name, globals()[name] > 0, 'at least 1')
    for name in ('learning_rate', 'hidden_lr', 'embedding_lr', 'other_lr', 'min_lr', 'weight_decay', 'hidden_decay', 'embedding_decay',
                 'grad_clip', 'adaptive_clip', 'max_iters', 'warmup_iters', 'patience', 'checkpoint_interval', 'snapshot_interval',
                 'sample_tokens'):
        check(name, globals()[name] is None or globals()[name] >= 0, 'at least 0')
    for name in ('beta1', 'beta2', 'momentum', 'ema'):
        check(name, 0 <= globals()[name] < 1, 'at least 0 and below 1')
    if decay_lr:
        check('warmup_iters', warmup_iters <= lr_decay_iters, f'at most lr_decay_iters={lr_decay_iters}')
        check('wsd_decay_iters', schedule != 'wsd' or warmup_iters + wsd_decay_iters <= lr_decay_iters,
              f'at most lr_decay_iters - warmup_iters = {lr_decay_iters - warmup_iters}')
    check('batch_warmup_iters', 0 <= batch_warmup_iters <= max_iters, f'from 0 to max_iters={max_iters}')
    check('min_batch_size', 0 < min_batch_size <= batch_size if batch_warmup_iters else min_batch_size == 0,
          f'from 1 to batch_size={batch_size} with batch_warmup_iters={batch_warmup_iters}, and 0 without')
    check('min_block_size', 0 <= min_block_size <= block_size, f'0 (off) to block_size={block_size}')
    check('block_warmup_iters', 0 <= block_warmup_iters <= max_iters * (min_block_size > 0),
          f'from 0 to max_iters={max_iters}, and needs min_block_size={min_block_size} above 0')
    if wrong:
        raise ValueError('; '.join(wrong))
    for name, default in dict(momentum=0.95, nesterov=True).items():
        if optimizer == 'adamw' and globals()[name] != default:
            raise ValueError(f"{name}={globals()[name]!r}: only optimizer='muon' and 'sm3' read it, and optimizer='adamw' is set "
                             "(its momentum is beta1)")

    # processes: torchrun sets these variables
    rank, local_rank, world = (int(os.environ.get(k, v)) for k, v in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items())
    main = rank == 0 # writes files and speaks
    before = checkpoint.get('config', {}).get('optimizer', 'adamw') if resuming else optimizer
    if before != optimizer:
        raise ValueError(f"optimizer={optimizer!r} cannot go on with the state of optimizer={before!r}: resume with that, or begin "
                         f"a new run with --init_from={latest}")
    for name, value, reason in (('optimizer', optimizer, 'works on whole matrices'), ('ema', ema, 'keeps whole weights')):
        if world > 1 and parallel == 'fsdp' and value not in ('adamw', 0.0):
            raise ValueError(f"{name}={value!r} {reason}, and parallel='fsdp' shares them out: use --parallel=ddp")
    if gradient_accumulation_steps % world:
        raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps} is not divisible by the {world} processes")
    if compile in ('reduce-overhead', 'max-autotune') and gradient_accumulation_steps > world:
        raise ValueError(f"compile={compile!r} replays CUDA graphs, which overwrite the gradients of the micro-batch before: "
                         f"gradient_accumulation_steps={gradient_accumulation_steps} must be {world} then, or take --compile=True "
                         "or max-autotune-no-cudagraphs")
    if world > 1 and device in ('auto', 'cuda') and torch.cuda.is_available():
        device = f'cuda:{local_rank}'
    device, dtype = resolve(device, dtype)
    device_type = torch.device(device).type
    if device_type == 'cpu':
        keep_freed_memory()
    peak, peak_source = find_peak_flops(peak_flops, device, getattr(torch, dtype))

    # data
    meta = load_meta(dataset_folder(dataset))
    splits = {name: Split(dataset_folder(dataset), name) for name in ('train', 'val')}
    known = (checkpoint or {}).get('meta') or (dict(tokenizer='tiktoken', encoding='gpt2') if pretrained else {})
    for key in ('tokenizer', 'encoding', 'characters'):
        if not allow_changes and 'tokenizer' in known and 'tokenizer' in meta and known.get(key) != meta.get(key):
            raise ValueError(f"dataset={dataset!r} has the {key} {meta.get(key)!r}, and the weights were trained with "
                             f"{known.get(key)!r}: take another dataset, or --allow_changes=True")
    if 'tokenizer' not in meta: # bare token files: the checkpoint knows, or they are GPT-2's as nanoGPT takes them
        meta |= known or dict(tokenizer='tiktoken', encoding='gpt2')
    tokenizer = load_tokenizer(meta) if sample_tokens or eval_only else None # training itself needs only ids

    # model, on the CPU first
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
        model = GPT.from_pretrained(start, dict(dropout=dropout) | asked)
    else:
        weights = checkpoint['model'] if resuming else checkpoint.get('average') or checkpoint['model']
        model, added = GPT.from_weights(checkpoint['model_args'], weights, allow_changes,
                                        **dict(dropout=dropout) | asked)
    model_args = vars(model.config)
    config |= model_args
    block_size = model.config.block_size
    for split in splits.values():
        split.vocab_size = model.config.vocab_size # every batch is checked against it,
        if split.n_tokens <= 1e8: # and a dataset that is read in a moment as a whole, before anything is written
            split.scan(split.vocab_size)
    splits['train'].batch(0, 1, block_size, sampling) # long enough for a window?
    next(splits['val'].fixed_batches(1, 1, block_size))

if world > 1:
    if device_type == 'cuda':
        torch.cuda.set_device(device)
    # torchrun keeps its store when it restarts lost processes: without a prefix they would read the addresses of the dead
    store, _, _ = next(dist.rendezvous('env://'))
    dist.init_process_group(backend if backend != 'auto' else 'nccl' if device_type == 'cuda' else 'gloo', rank=rank, world_size=world,
                            store=dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store))
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
torch.set_float32_matmul_precision('high') # TF32 where float32 remains on a GPU
amp = torch.autocast(device_type, getattr(torch, dtype)) if dtype != 'float32' else nullcontext()
model.to(device)
n_params = model.get_num_params(False)
n_decayed = sum(p.numel() for name, group in model.optimizer_groups().items() if name != 'rest' for _, p in group)
n_embedding = sum(m.weight.numel() for m in (model.transformer.wte, model.transformer.wpe) if m is not None)
# batch sizes and window lengths: few, since a compiler may compile each; a length's cost is exact FLOPs
sizes = sorted({round(min_batch_size + (batch_size - min_batch_size) * i / 7) for i in range(8)} if batch_warmup_iters else {batch_size})
lengths = sorted({round(min_block_size + (block_size - min_block_size) * i / 7) for i in range(8)} if min_block_size else {block_size})
costs = {T: model.cost(T, getattr(torch, dtype)) for T in lengths} # (FLOPs, bytes kept) a token

raw_model = model # without the wrappers of compile and DDP
sharded = parallel == 'fsdp' and world > 1
if sharded: # imported here: it takes a second
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device_type, (world,))
    for module in [m for m in model.modules() if isinstance(m, Block)] + [model]:
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, 'hidden') # which generation calls
lrs = dict(hidden=hidden_lr, embeddings=embedding_lr, head=embedding_lr, rest=other_lr)
decays = dict(hidden=hidden_decay, embeddings=embedding_decay, head=embedding_decay)
opt = raw_model.configure_optimizers(
    weight_decay, learning_rate, (beta1, beta2), device_type, optimizer, momentum, nesterov,
    *({name: value for name, value in own.items() if value is not None} for own in (lrs, decays)))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
gc.enable() # torch's optimizers import its compiler
if compile == 'auto':
    try:
        compile = device_type == 'cuda' and torch.compile(lambda x: x + 1)(torch.ones(1, device=device)).item() == 2
    except Exception as e: # no compiler, no triton, too new a Python, ...
        print(f"not compiling, since torch.compile fails here: {str(e).strip().splitlines()[0]}")
        compile = False
if compile:
    torch._dynamo.config.recompile_limit = 2 * len(lengths) * len(sizes) + 8 # for training and for evaluations
    if device_type == 'cuda':
        recompute_what_is_cheap()
    # each length once: symbolic lengths are compiled three times as often
    model = torch.compile(model, dynamic=False, mode=compile if isinstance(compile, str) else None)
fast_model = model # without DDP, for evaluations
if world > 1 and not sharded:
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device_type == 'cuda' else None)

# the loop's state, all of which a checkpoint holds. stale: evaluations since the best one
step, samples, tokens, seconds, best_val_loss, stale = 0, 0, 0, 0.0, math.inf, 0
if resuming:
    step, best_val_loss = checkpoint['iter_num'], float(checkpoint['best_val_loss'])
    samples = checkpoint.get('samples', step * gradient_accumulation_steps * batch_size)
    tokens, seconds, stale = checkpoint.get('tokens', samples * block_size), checkpoint.get('seconds', 0.0), checkpoint.get('stale', 0)
    settings = [{k: v for k, v in group.items() if k != 'params'} for group in opt.param_groups]
    load_optimizer(raw_model, opt, checkpoint['optimizer'])
    for group, now in zip(opt.param_groups, settings): # of now, not of the checkpoint
        group.update(now)
    scaler.load_state_dict(checkpoint.get('scaler') or scaler.state_dict())
params = list(raw_model.parameters())
average = [p.detach().clone() for p in params] if ema else [] # of the weights
if ema and resuming and 'average' in checkpoint:
    for a, name in zip(average, dict(raw_model.named_parameters())):
        a.copy_(checkpoint['average'][name])
checkpoint = None # frees its memory

def say(text):
    if main:
        tqdm.write(text)
        sys.stdout.flush() # into a pipe or a file, too, when it happens

def stage(i, warmup_iters, values):
    """The value of step i in a warmup of equally long stages."""
    return values[i * len(values) // warmup_iters] if i < warmup_iters else values[-1]

def window_length(i):
    if block_warmup_iters:
        return stage(i, block_warmup_iters, lengths)
    return lengths[0] if len(lengths) == 1 else random.Random(f'{seed} {i}').choice(lengths)

def samples_until(i):
    """Sequences in all steps before step i."""
    warmup = min(i, batch_warmup_iters)
    return gradient_accumulation_steps * (warmed_up[warmup] + (i - warmup) * batch_size)
warmed_up = [0, *itertools.accumulate(stage(i, batch_warmup_iters, sizes) for i in range(batch_warmup_iters))]

def load(i):
    """The micro-batches of this process in step i: a function of seed and sample numbers, so that nothing is to be resumed."""
    first, size = samples_before + samples_until(i) - samples_until(step_before), stage(i, batch_warmup_iters, sizes)
    return [[to_device(array) for array in splits['train'].batch(first + micro * size, size, window_length(i),
                                                                 sampling, seed, stride=block_size)]
            for micro in range(rank, gradient_accumulation_steps, world)]

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
    raw_model.eval()
    losses, counts, batches = [], [], iter(batches)
    while True:
        with exit_on_error():
            group = list(itertools.islice(batches, world)) # every process runs equally often, as sharded models must
        if not group:
            break
        x, y = group[min(rank, len(group) - 1)]
        with amp:
            loss = fast_model(to_device(x), to_device(y))[1]
        losses.append(loss.clone()) # read at the end: a GPU works on while batches are loaded. A CUDA graph's next run overwrites it
        counts.append((y >= 0).sum() * (rank < len(group)))
    raw_model.train()
    counts = torch.tensor(counts, dtype=torch.float64)
    total = torch.stack([torch.stack(losses).cpu().double() @ counts, counts.sum()]) # nats, targets
    if world > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()

@contextmanager
def averaged():
    """The average of the weights in their place, if there is one."""
    current = [p.detach().clone() for p in params] if ema else []
    with torch.no_grad():
        for p, a in zip(params, average):
            p.copy_(a)
        yield
        for p, c in zip(params, current):
            p.copy_(c)

@averaged()
def evaluate():
    return [mean_loss(split.fixed_batches(eval_iters, batch_size, block_size)) for split in (splits['train'], splits['val'])]

def save(*paths):
    """Writes checkpoints. A full disk or the like is no reason to stop: the old one is kept and the next save tries again."""
    weights, moments = full_state(raw_model, opt) if sharded else (raw_model.state_dict(), opt.state_dict())
    more = dict(average=dict(zip(dict(raw_model.named_parameters()), average))) if ema else {}
    for path in paths if main else ():
        try:
            save_checkpoint(path, dict(
                format=1, model=weights, optimizer=moments, scaler=scaler.state_dict(), model_args=model_args, iter_num=step,
                samples=samples, tokens=tokens, seconds=seconds, best_val_loss=best_val_loss, stale=stale, config=config,
                meta=meta, **more))
            unwritten.discard(path)
        except (OSError, RuntimeError) as e: # torch's writer raises RuntimeError where Python's raises OSError
            unwritten.add(path)
            say(f"warning: {path} could not be written, the old one is kept: {str(e).splitlines()[0]}")

def log(**values):
    """Appends to metrics.jsonl, and to wandb if it is on."""
    if main:
        try:
            with open(metrics, 'a', encoding='utf-8') as f:
                f.write(json.dumps(dict(step=step, tokens=tokens, seconds=round(seconds, 3), **{
                    k: v if v is None or math.isfinite(v) else None for k, v in values.items()})) + '\n') # JSON has no NaN
        except OSError as e:
            say(f"warning: {metrics} could not be written, training goes on: {e}")
        if wandb_log:
            wandb.log(dict(tokens=tokens, **values), step=step)

def read_metrics():
    for line in open(metrics, encoding='utf-8') if metrics.exists() else ():
        try:
            yield json.loads(line)
        except ValueError: # a line that a crash cut short
            pass

def plot():
    """loss.png: training and validation loss against tokens."""
    global plotted
    plotted = time.perf_counter()
    from matplotlib.figure import Figure # takes a while, so not at start-up
    lines = list(read_metrics())
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for key, name, style in (('loss', 'training', dict(alpha=0.5, linewidth=0.8)), ('val_loss', 'validation', dict(marker='.'))):
        points = [(line['tokens'], line[key]) for line in lines if key in line]
        axes.plot([t for t, _ in points], [loss for _, loss in points], label=name, **style)
    axes.set(xlabel='tokens', ylabel='nats a token', title=f'{out.name}: best validation loss {best_val_loss:.4f}')
    axes.legend()
    axes.grid(alpha=0.3)
    try:
        figure.savefig(out / 'loss.png.tmp', format='png', dpi=120)
        os.replace(out / 'loss.png.tmp', out / 'loss.png')
    except OSError as e:
        say(f"warning: {out / 'loss.png'} could not be written, training goes on: {e}")

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
        git = lambda *args: subprocess.run(['git', '-C', project, *args], capture_output=True,
                                           text=True, check=True).stdout.strip()
        return git('rev-parse', 'HEAD') + '+' * bool(git('status', '--porcelain'))
    except (OSError, subprocess.CalledProcessError):
        return None

def leave(status):
    """Ends the process. One of several skips Python's teardown, which a gloo thread may abort (pytorch issue 190489)."""
    if world > 1:
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

def explain(kind, error, trace):
    """What usually helps, under the traceback of a run that is out of memory."""
    sys.__excepthook__(kind, error, trace)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        print(f"out of memory: halve batch_size={batch_size} and double gradient_accumulation_steps="
              f"{gradient_accumulation_steps} (the same steps), or lower block_size={block_size}, n_layer or n_embd",
              file=sys.stderr)
sys.excepthook = explain

# what this run is, in a few lines
if given:
    say('settings ' + ', '.join(f'{name}={value!r}' for name, value in given.items()))
for name, (old, new) in changed.items():
    say(f"changed  {name}={new!r}, was {old!r}")
for line in added:
    say(f"added    {line}")
if optimizer == 'sm3':
    say(f"note     sm3 has momentum={momentum}: beta1 and beta2 are AdamW's")
how = f"{dtype}, {'compiled' if compile else 'eager'}, {world} process{'es' * (world > 1)}{', sharded' * sharded}"
step_tokens, n_tokens = gradient_accumulation_steps * batch_size * block_size, splits['train'].n_tokens
state = (16 - 4 * (optimizer == 'sm3') + 4 * bool(ema)) * n_params / 1e9 # GB
activations = costs[block_size][1] * batch_size * block_size / 1e9
say(f"model    {n_params / 1e6:.2f}M parameters, {(n_params - n_embedding) / 1e6:.2f}M without embeddings, {n_decayed / 1e6:.2f}M "
    f"decayed; {costs[block_size][0] / 1e9:.4g} GFLOP a token")
say(f"machine  {device}, {how}; peak {f'{peak / 1e12:.4g} TFLOP/s ({peak_source})' if peak else peak_source}")
say(f"data     {dataset}: {n_tokens:,} tokens to train on, {splits['val'].n_tokens:,} to validate; "
    f"{meta.get('encoding', meta['tokenizer'])}, vocabulary {model_args['vocab_size']:,}")
say(f"run      {max_iters:,} steps of {step_tokens:,} tokens = {max_iters * step_tokens:,}: "
    f"{max_iters * step_tokens / n_tokens:.3g} epochs")
say(f"memory   about {state + activations:.3g} GB: {state:.3g} of weights, gradients and optimizer, {activations:.3g} of activations")
if eval_only:
    val = splits['val']
    loss = mean_loss((x, y) for x, y, _ in val.all_batches(batch_size, block_size))
    n_targets, n_bytes = 0, 0
    for _, y, n in val.all_batches(batch_size, block_size):
        n_targets, n_bytes = n_targets + n, n_bytes + tokenizer.n_bytes(y[y >= 0])
    say(f"whole validation split, {n_targets:,} tokens: loss {loss:.4f}, perplexity {math.exp(loss):.4g}, "
        f"{loss * n_targets / n_bytes / math.log(2):.4f} bits per byte")
    leave(0)
if dry_run:
    with exit_on_error():
        for name, split in splits.items():
            with tqdm(total=split.n_tokens, desc=f'scanning {name}', unit='token', unit_scale=True, disable=not main) as scan:
                split.scan(model_args['vocab_size'], scan.update)
    max_iters_of_run, max_iters, log_interval, wandb_log = max_iters, step + 3, 1, False
    out = Path(tempfile.mkdtemp(prefix='.dry_run-', dir=next(p for p in (out, *out.parents) if p.exists()))) # the same disk
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    metrics = out / 'metrics.jsonl'
elif main:
    out.mkdir(parents=True, exist_ok=True)
    # steps after the checkpoint are done again, and so is the evaluation that comes before its next step
    kept = [line for line in read_metrics() if line['step'] < step or line['step'] == step and 'loss' in line] if resuming else []
    for path in (latest, best, out / 'loss.png', *out.glob('step-*.pt')) if not resuming else ():
        path.unlink(missing_ok=True)
    metrics.write_text(''.join(json.dumps(line) + '\n' for line in kept), encoding='utf-8')
    (out / 'config.json').write_text(json.dumps(config | dict(
        resolved=dict(device=device, dtype=dtype, compile=compile, world=world), python=sys.version.split()[0], torch=torch.__version__,
        git=git_commit(), data=[split.fingerprint() for split in splits.values()]), indent=1), encoding='utf-8')
    if wandb_log:
        import wandb
        wandb.init(project=wandb_project, name=wandb_run_name, config=config, dir=out)

# ---------------------------------------------------------------------------------------------------------------------
asked_to_stop = 0 # the signal: the step is finished, saved, and then the process ends
def on_signal(number, frame):
    global asked_to_stop
    asked_to_stop = number
    signal.signal(number, signal.SIG_DFL) # a second one ends it at once
for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'): # Ctrl-C, kill, a scheduler's warning
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), on_signal)

step_before, samples_before = step, samples
batches = prefetch(load, step)
plotted = time.perf_counter() # when loss.png was drawn last
bar = tqdm(total=max_iters, initial=step, unit='step', disable=not main or not sys.stderr.isatty(), dynamic_ncols=True)
bad_steps = torch.zeros((), device=device) # steps in a row without a finite gradient
stopping = torch.zeros((), device=device)
unwritten = set() # checkpoints whose last save failed
t0, tokens0, work, stop_now = time.perf_counter(), tokens, 0, 0
model.train()
while True:
    if (step % eval_interval == 0 or step >= max_iters) and not dry_run:
        seconds += time.perf_counter() - t0
        if step > step_before and (always_save_checkpoint or step >= max_iters): # first: an evaluation can fail, too
            save(latest)
        train_loss, val_loss = evaluate()
        better = val_loss < best_val_loss or resuming and step == step_before and val_loss == best_val_loss # best.pt's own
        best_val_loss, stale = (val_loss, 0) if better else (best_val_loss, stale + 1)
        say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{' *' * better}")
        log(train_loss=train_loss, val_loss=val_loss)
        if better and step > 0:
            save(best)
        if main and time.perf_counter() - plotted > 60: # each takes a fifth of a second, the first one a second
            plot()
        if sample_tokens:
            raw_model.eval()
            prompt = torch.tensor([tokenizer.encode(sample_prompt)], device=device)
            with averaged(), amp:
                text = raw_model.generate(prompt, sample_tokens, vocab_size=tokenizer.vocab_size, static=False if sharded else None,
                                          generator=torch.Generator(device).manual_seed(seed))
            raw_model.train()
            say(tokenizer.decode(text[0].tolist()) + '\n')
        if patience and stale >= patience:
            say(f"no better validation loss in {stale} evaluations: stopping")
            save(latest)
            break
        t0, tokens0, work = time.perf_counter(), tokens, 0
    if step >= max_iters:
        break

    # dropout is a function of seed, step and rank, so that a resumed run draws the same masks
    torch.manual_seed(((seed * 1_000_003 + step) * 4096 + rank) % 2 ** 63)
    lr = get_lr(step)
    for group in opt.param_groups:
        group['lr'] = lr * group['lr_scale']
    mean = 0.0
    with exit_on_error():
        micro_batches = next(batches)
    for i, (x, y) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1 # processes exchange gradients once a step
        if sharded:
            raw_model.set_requires_gradient_sync(last)
        else:
            model.require_backward_grad_sync = last
        with amp:
            loss = model(x, y)[1] / len(micro_batches)
        scaler.scale(loss).backward()
        mean += loss.detach()
    scaler.unscale_(opt)
    if adaptive_clip:
        clip_adaptively(raw_model, adaptive_clip)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    norm = norm.full_tensor() if sharded else norm
    bad = ~torch.isfinite(norm)
    bad_steps = (bad_steps + 1) * bad
    if (sharded or optimizer == 'sm3') and bad.item():
        opt.zero_grad(set_to_none=True)
    elif not scaler.is_enabled() and not sharded:
        opt.grad_scale, opt.found_inf = None, bad.float() # the step is skipped on the device, without waiting for it
    before = [p.detach().clone() for p in params] if (step + 1) % (10 * log_interval) == 0 else None
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    with torch.no_grad():
        for a, p in zip(average, params): # a short memory at first, so that the start does not linger
            a.lerp_(p, 1 - min(ema, (1 + step) / (10 + step)))
    step, samples = step + 1, samples + gradient_accumulation_steps * x.size(0)
    tokens += gradient_accumulation_steps * x.numel()
    work += gradient_accumulation_steps * x.numel() * costs[x.size(1)][0]
    bar.update()

    if step % log_interval == 0: # reading the loss waits for the device: nothing else in a step does
        if world > 1:
            dist.all_reduce(mean)
        mean = mean.item() / world
        dt = time.perf_counter() - t0
        seconds += dt
        speed, mfu = (tokens - tokens0) / dt, work / dt / (peak * world) if peak else None
        t0, tokens0, work = time.perf_counter(), tokens, 0
        update = {}
        if before: # how far the weights moved: every tenth time, since it takes a copy of them
            update_norm = torch.nn.utils.get_total_norm([p.detach() - b for p, b in zip(params, before)])
            update = dict(update_norm=(update_norm.full_tensor() if sharded else update_norm).item())
        log(loss=mean, lr=lr, grad_norm=norm.item(), tokens_per_s=round(speed), mfu=mfu, peak_memory=peak_memory(), **update)
        bar.set_postfix_str(f"loss {mean:.4f}, {speed:,.0f} tokens/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}")
        if bar.disable:
            say(f"iter {step}: loss {mean:.4f}, {speed:,.0f} tokens/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}, lr {lr:.3g}, "
                f"norm {norm.item():.3f}")
        if bad_steps > 0:
            with amp:
                where = raw_model.first_nonfinite(x, y) if not sharded else None
            say(f"warning: {int(bad_steps)} step{'s' * (bad_steps > 1)} in a row skipped, loss {mean:.4g}, gradient norm "
                f"{norm.item():.4g}; first output that is not finite: {where or 'none in a forward pass, so it is the backward'}")
        if bad_steps >= max_bad_steps:
            say(f"stopping after {int(bad_steps)} such steps; the weights are those before them. What usually helps: a lower "
                f"learning_rate (now {learning_rate:g}), a longer warmup_iters ({warmup_iters}), grad_clip={grad_clip or 1.0:g}, "
                "dtype=bfloat16 or float32 instead of float16")
            save(latest)
            leave(1)
    if snapshot_interval and step % snapshot_interval == 0:
        save(out / f'step-{step}.pt')
    if checkpoint_interval and step % checkpoint_interval == 0 and not dry_run:
        save(latest)
    if world > 1: # all processes stop at the same step: what was asked in the step before, which is there by now
        stop_now = int(stopping.item())
        stopping = torch.tensor(float(asked_to_stop), device=device)
        dist.all_reduce(stopping, dist.ReduceOp.MAX)
    else:
        stop_now = asked_to_stop
    if stop_now:
        say(f"{signal.Signals(stop_now).name}: saving step {step} to {latest}; go on with --init_from=resume")
        save(latest)
        break
bar.close()
batches.close()
if main and step > step_before and not dry_run:
    plot()
if dry_run:
    path = out / 'ckpt.pt'
    save(path)
    with exit_on_error():
        size = load_checkpoint(path) and path.stat().st_size if main else 0
    say(f"dry run passed: {max_iters_of_run:,} steps take about {seconds / 3 * (max_iters_of_run - step_before) / 3600:.3g} hours without "
        f"evaluations; a checkpoint has {size / 1e9:.3g} GB; peak memory {(peak_memory() or 0) / 1e9:.3g} GB")
if latest in unwritten:
    say(f"error: the state of step {step} is not on disk: free some space and resume from the checkpoint that is left")
    leave(1)
leave(128 + stop_now if stop_now else 0)
