"""
Trains a GPT on a dataset folder of token files. From any directory:

    python train.py config/quick.py                          on a GPU, or small on a CPU
    python train.py config/train_shakespeare_char.py --n_layer=4 --mixer=gmlp
    python train.py --out_dir=out-x --init_from=resume       goes on where that run stopped, with its settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Config files and --key=value change the settings below; --help lists them all. out_dir gets ckpt.pt (the latest),
best.pt (the lowest validation loss), config.json, metrics.jsonl and loss.png.
"""
import atexit
import importlib.util
import inspect
import itertools
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from typing import Literal

from configurator import (check_ranges, configure, exit_on_error, find_peak_flops, resolve, shorten_schedule,
                          take_settings, yield_if_busy)

yield_if_busy()
with exit_on_error(): # a missing package, or Ctrl-C while torch is imported
    import torch
    import torch._functorch.config
    import torch.distributed as dist
    from tqdm import tqdm

from data.causality import find_leak
from data.checkpoints import (architecture, build_model, evaluated_weights, find_weights, full_state, is_pretrained,
                              load_checkpoint, load_latest, load_optimizer, load_pretrained, save_checkpoint,
                              stored_config, stored_state)
from data.run import RunFolder, memory_of, peak_memory
from data.tokenizers import load_tokenizer, with_line_ends
from data.tokens import Split, dataset_folder, find_path, load_meta, prefetch
from model import (BUILT_IN, GPT, MIXERS, Block, GPTConfig, add_mixer, clip_adaptively, cost, first_nonfinite,
                   keep_freed_memory, optimizer_groups)

# ---------------------------------------------------------------------------------------------------------------------
# files and evaluation
out_dir = 'out' # a run's folder
overwrite = False # start from scratch even if out_dir holds a run, which is deleted
init_from = 'scratch' # scratch | resume | auto (resume if there is something to resume) | gpt2, gpt2-medium,
    # gpt2-large, gpt2-xl | a checkpoint, a run's folder, or one in Hugging Face's layout, to finetune
eval_interval = 2000 # steps between evaluations
eval_iters = 200 # batches in an evaluation: fixed windows, the same every time
eval_tokens = 0 # tokens in an evaluation, whatever batch_size and block_size are; 0: see eval_iters
eval_only = False # evaluate the whole validation split and exit
always_save_checkpoint = True # save ckpt.pt before every evaluation; False: at the end and every checkpoint_interval
checkpoint_interval = 0 # steps between saves of ckpt.pt; 0: see always_save_checkpoint
snapshot_interval = 0 # steps between checkpoints that are kept, as step-1000.pt; 0: none
allow_changes = False # use a checkpoint even if the architecture or tokenizer differs
allow_leak = False # train even if the network is not causal
proof: float | Literal['auto', 'full', 'quick'] = 'auto' # seconds for the proof that it is, or: full, every cut of a
    # row; quick, one batch of cuts; auto: 2% of the run, from 3 to 20 seconds
dry_run = False # scan the data, take three steps, write a checkpoint, read it back, and say how long the run takes
max_bad_steps = 20 # stop after this many steps in a row whose gradient is not finite; each is skipped
patience = 0 # stop after this many evaluations without a better validation loss; 0: never
log_interval = 1 # steps between log lines
sample_tokens = 0 # tokens of generated text to show at each evaluation; 0: none
sample_prompt = '\n' # what that text continues; \n is a line end
# logging beside metrics.jsonl
wandb_log = False # WANDB_MODE=offline works without a network
wandb_project = 'owt'
wandb_run_name = 'gpt2'
tensorboard_log = False # in out_dir: tensorboard --logdir=. shows it
# data
dataset = 'openwebtext' # a folder in data/, or any folder given with a slash
sampling: Literal['random', 'epoch'] = 'random' # random: windows with replacement; epoch: each window once an epoch
gradient_accumulation_steps = 5 * 8 # micro-batches a step, over all processes together
batch_size = 12 # sequences in a micro-batch
block_size = 1024 # tokens of context
min_block_size = 0 # above 0: each step draws one of 8 window lengths from here to block_size
# model; more settings at the end
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0 # 0 is good for pretraining, 0.1 or more for finetuning
bias = False # biases in LayerNorm and Linear layers
# optimizer
optimizer: Literal['adamw', 'muon', 'sm3'] = 'adamw' # muon: of hidden matrices, AdamW for the rest; sm3: half of
    # Adam's memory
learning_rate = 6e-4 # the highest
hidden_lr: float | None = None # of Linear layers' matrices; None: learning_rate
embedding_lr: float | None = None # of the embeddings and the head; None: learning_rate
other_lr: float | None = None # of biases, norms and tables along time; None: learning_rate
max_iters = 600000 # steps
weight_decay = 1e-1 # of Linear and Embedding matrices, nothing else
hidden_decay: float | None = None # of Linear layers' matrices; None: weight_decay
embedding_decay: float | None = None # of the embeddings and the head; None: weight_decay
beta1 = 0.9 # AdamW's, also beside Muon
beta2 = 0.95
momentum = 0.95 # muon's and sm3's
nesterov = True
grad_clip = 1.0 # clip the gradient norm to this; 0 is off
adaptive_clip = 0.0 # adaptive clipping (arXiv 2102.06171): limit per row, as a fraction of the row's norm; 0 is off
ema = 0.0 # EMA of the weights, used for evaluation and sampling: decay per step, e.g. 0.99; 0 is off
# learning rate schedule
decay_lr = True # False: constant after the warmup
schedule: Literal['cosine', 'cosine_floor', 'linear', 'wsd'] = 'cosine' # cosine_floor: minGPT's, to zero but never
    # below min_lr; wsd: warmup, stable, linear decay over the last wsd_decay_iters
warmup_iters = 2000 # steps of linear warmup
lr_decay_iters: int | None = None # the step at which min_lr is reached; None: max_iters
wsd_decay_iters = 60000 # length of wsd's decay
min_lr = 6e-5 # about learning_rate / 10
# machine
seed = 1337
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto' # auto: what the machine multiplies fast
deterministic = False # on a GPU: slower kernels that give a resumed run the same bits; a CPU's always do
compile: bool | Literal['auto', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'] = 'auto' # auto: on a
    # GPU; reduce-overhead: CUDA graphs; max-autotune: the fastest kernels and CUDA graphs
peak_flops: float | Literal['auto', 'measure'] = 'auto' # FLOP/s that MFU is a share of; auto: a table of GPUs
parallel: Literal['ddp', 'fsdp'] = 'ddp' # under torchrun: each process holds the model, or they share it out
backend: Literal['auto', 'nccl', 'gloo'] = 'auto' # torch.distributed's
# ---------------------------------------------------------------------------------------------------------------------
config, given, replaced, files = configure(globals(), GPTConfig, adopt=add_mixer)

RANGES = {
    '[1, inf)': 'batch_size gradient_accumulation_steps eval_iters eval_interval log_interval max_bad_steps',
    '[0, inf)': 'learning_rate hidden_lr embedding_lr other_lr min_lr weight_decay hidden_decay embedding_decay '
                'grad_clip adaptive_clip max_iters warmup_iters lr_decay_iters wsd_decay_iters patience '
                'checkpoint_interval snapshot_interval sample_tokens eval_tokens min_block_size',
    '[0, 1)': 'beta1 beta2 momentum ema',
}
# what a resumed run does not take from its checkpoint
OF_THIS_COMMAND = ('out_dir', 'init_from', 'overwrite', 'eval_only', 'dry_run', 'allow_changes')

# ---------------------------------------------------------------------------------------------------------------------
# What run is this?

def say(text):
    """Prints a line above the progress bar; of several processes, one speaks."""
    if is_main:
        tqdm.write(text)
        sys.stdout.flush() # into a pipe or a file, too, when it happens


def find_checkpoint():
    """The dict of the checkpoint to resume or to finetune; None: weights from scratch or GPT-2's."""
    if not out_dir.strip():
        raise ValueError("out_dir='' names no folder: choose one, such as --out_dir=out-x")
    run.refuse_if_no_place()
    if not eval_only:
        if is_main:
            run.lock()
        if not (resuming or overwrite):
            run.refuse_if_taken(restart=init_from == 'auto')
    if resuming:
        return load_latest(run.path)
    return None if scratch or pretrained else load_checkpoint(find_weights(init_from))


def check_settings():
    """What costs neither memory nor time to find out."""
    check_ranges(config, RANGES)
    if decay_lr and schedule == 'wsd' and warmup_iters + wsd_decay_iters > lr_decay_iters:
        raise ValueError(f"wsd_decay_iters={wsd_decay_iters} must be at most lr_decay_iters - warmup_iters = "
                         f"{lr_decay_iters - warmup_iters}")
    if not isinstance(proof, str) and proof < 0:
        raise ValueError(f"proof={proof:g} is a time: 0 seconds or more, or auto, full or quick")
    if min_block_size > block_size:
        raise ValueError(f"min_block_size={min_block_size} must be at most block_size={block_size}")
    for name, value, default in ('momentum', momentum, 0.95), ('nesterov', nesterov, True):
        if optimizer == 'adamw' and value != default:
            raise ValueError(f"{name}={value!r}: only optimizer='muon' and 'sm3' read it, and optimizer='adamw' is set "
                             "(its momentum is beta1)")
    trained_by = checkpoint.get('config', {}).get('optimizer', 'adamw') if resuming else optimizer
    if trained_by != optimizer:
        raise ValueError(f"optimizer={optimizer!r} cannot go on with the state of optimizer={trained_by!r}: resume "
                         f"with that, or begin a new run with --init_from={run.latest}")
    if sharded and optimizer != 'adamw':
        raise ValueError(f"optimizer={optimizer!r} works on whole matrices, and parallel='fsdp' shares them out: use "
                         "--parallel=ddp")
    if sharded and ema:
        raise ValueError(f"ema={ema!r} keeps whole weights, and parallel='fsdp' shares them out: use --parallel=ddp")
    if gradient_accumulation_steps % world:
        raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps} is not divisible by the {world} "
                         f"processes: take {math.ceil(gradient_accumulation_steps / world) * world}")
    if compile in ('reduce-overhead', 'max-autotune') and (sharded or gradient_accumulation_steps > world):
        why = ("and parallel='fsdp' moves the weights that they read: " if sharded else
               "which overwrite the gradients of the micro-batch before: "
               f"gradient_accumulation_steps={gradient_accumulation_steps} must be {world} then, or ")
        raise ValueError(f"compile={compile!r} replays CUDA graphs, {why}take --compile=True or "
                         "max-autotune-no-cudagraphs")
    for name, asked in ('wandb', wandb_log), ('tensorboard', tensorboard_log):
        if asked and importlib.util.find_spec(name) is None:
            raise ValueError(f"{name}_log=True needs {name}: pip install {name}, or leave it out")


def open_data():
    """-> (meta, {'train': Split, 'val': Split}), with the tokenizer that the weights know."""
    folder = dataset_folder(dataset)
    try:
        meta = load_meta(folder)
        splits = {name: Split(folder, name) for name in ('train', 'val')}
    except ValueError as e:
        if 'dataset' in given or resuming:
            raise
        raise ValueError(f"{e}; or begin small: python data/python_stdlib/prepare.py, then python train.py "
                         "config/quick.py") from None
    known = (checkpoint or {}).get('meta') or (dict(tokenizer='tiktoken', encoding='gpt2') if pretrained else {})
    fits = meta.get('vocab_size', 0) <= (checkpoint or {}).get('model_args', {}).get('vocab_size', 50257)
    for key in ('tokenizer', 'encoding', 'characters', 'json'):
        if not allow_changes and 'tokenizer' in known and 'tokenizer' in meta and known.get(key) != meta.get(key):
            what = (f"the {key} {meta.get(key)!r}, and the weights were trained with {known.get(key)!r}"
                    if key != 'json' else "another tokenizer.json than the weights were trained with")
            raise ValueError(f"dataset={dataset!r} has {what}: take another dataset"
                             f"{', or --allow_changes=True' if fits else ''}")
    if 'tokenizer' not in meta: # bare token files: the checkpoint knows, or they are GPT-2's as nanoGPT takes them
        is_gpt2 = given.get('vocab_size', 50257) >= 50257
        meta |= known or (dict(tokenizer='tiktoken', encoding='gpt2') if is_gpt2 else {})
    return meta, splits


def open_tokenizer():
    """The dataset's. None where nothing but bits per byte would use it, and it cannot be had or is not shown."""
    if not (is_main or sample_tokens):
        return None
    try:
        tokenizer = load_tokenizer(meta)
    except ValueError:
        if sample_tokens or eval_only:
            raise
        return None
    if tokenizer is None and sample_tokens:
        raise ValueError(f"sample_tokens={sample_tokens}, but dataset={dataset!r} names no tokenizer to read and write "
                         "with: --sample_tokens=0")
    return tokenizer


def check_prompt():
    """A prompt that cannot be read would end the run at its first evaluation."""
    try:
        empty = not tokenizer.encode(with_line_ends(sample_prompt))
    except ValueError as e:
        raise ValueError(f"sample_prompt={sample_prompt!r}: {e}; or --sample_tokens=0") from None
    if empty:
        raise ValueError("sample_prompt='' is empty: give a text to continue, or --sample_tokens=0")


def build_network():
    """-> (GPT on the CPU, a line for each thing that was added to trained weights)."""
    torch.manual_seed(seed)
    asked = dict(dropout=dropout) | {k: v for k, v in given.items() if k in GPTConfig.__dataclass_fields__}
    if pretrained:
        return load_pretrained(init_from if init_from.startswith('gpt2') else find_weights(init_from), asked), []
    if checkpoint:
        weights = checkpoint['model'] if resuming else evaluated_weights(checkpoint)
        return build_model(architecture(checkpoint), weights, allow_changes, **asked)
    args = {f.name: config[f.name] for f in fields(GPTConfig)}
    if 'vocab_size' not in given: # a large vocabulary is padded: multiples of 64 make faster matrix products
        size = meta.get('vocab_size', 50257)
        args['vocab_size'] = size if size < 1024 else math.ceil(size / 64) * 64
    return GPT(GPTConfig(**args)), []


def check_data():
    """Every batch is checked against the vocabulary; a dataset that is read in a moment, as a whole and at once."""
    for split in splits.values():
        split.vocab_size = model.config.vocab_size
        if split.n_tokens <= 1e8:
            split.scan(split.vocab_size)
    splits['train'].batch(0, 1, block_size, sampling) # long enough for a window?
    next(splits['val'].fixed_batches(1, 1, block_size))


# torchrun sets these variables
rank, local_rank, world = (int(os.environ.get(k, v)) for k, v in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items())
is_main = rank == 0 # writes files and speaks
run = RunFolder(find_path(out_dir))
resuming = init_from == 'resume' or init_from == 'auto' and run.has_checkpoint()
scratch = init_from == 'scratch' or init_from == 'auto' and not resuming
pretrained = not resuming and not scratch and is_pretrained(init_from)
changed = {}
with exit_on_error(files):
    checkpoint = find_checkpoint()
    if resuming: # the run's settings hold where nothing else was asked for
        # nanoGPT's checkpoint names the device of another machine, perhaps
        own = OF_THIS_COMMAND if 'format' in checkpoint else (*OF_THIS_COMMAND, 'device', 'dtype', 'compile', 'backend')
        changed = take_settings(globals(), config, given, checkpoint.get('config', {}), own)
    shortened = [] if resuming else shorten_schedule(globals(), config, replaced)
    if lr_decay_iters is None:
        lr_decay_iters = config['lr_decay_iters'] = max_iters
    sharded = parallel == 'fsdp' and world > 1
    check_settings()
    if world > 1 and device in ('auto', 'cuda') and torch.cuda.is_available():
        device = f'cuda:{local_rank}'
    device, dtype = resolve(device, dtype)
    if deterministic: # before the first matrix product
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    peak, peak_source = find_peak_flops(peak_flops, device, getattr(torch, dtype))
    meta, splits = open_data()
    tokenizer = open_tokenizer()
    if sample_tokens:
        check_prompt()
    model, added = build_network()
    block_size = model.config.block_size
    config |= vars(model.config)
    check_data()

# ---------------------------------------------------------------------------------------------------------------------
# Build it

@dataclass
class State:
    """What the loop changes, besides weights and optimizer. A checkpoint stores and restores it as a whole."""
    step: int = 0 # steps done
    samples: int = 0 # sequences in them
    tokens: int = 0
    seconds: float = 0.0 # of training, without evaluations
    best_val_loss: float = math.inf
    best_step: int = 0 # of that loss
    evals_since_best: int = 0


def can_compile():
    """Whether torch.compile works here, which takes a compiler, triton, and a Python that it knows."""
    try:
        return torch.compile(lambda x: x + 1)(torch.ones(1, device=device)).item() == 2
    except Exception as e:
        say(f"not compiling, since torch.compile fails here: {str(e).strip().splitlines()[0]}")
        return False


device_type = torch.device(device).type
on_gpu = device_type == 'cuda'
if device_type == 'cpu':
    keep_freed_memory()
if world > 1:
    # torchrun keeps its store when it restarts lost processes: the prefix hides the addresses of the dead ones
    store, _, _ = next(dist.rendezvous('env://'))
    store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
    name = backend if backend != 'auto' else 'nccl' if on_gpu else 'gloo'
    dist.init_process_group(name, rank=rank, world_size=world, store=store)
    on_cpus = None # the group for a question that must not wait for a GPU
    if on_gpu:
        with suppress(RuntimeError): # where hosts do not know their own names the GPUs' group has to do
            on_cpus = dist.new_group(backend='gloo')
        everywhere = torch.tensor(int(on_cpus is not None), device=device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        on_cpus = on_cpus if everywhere else None
torch.set_float32_matmul_precision('high') # TF32 where float32 remains on a GPU
amp = torch.autocast(device_type, getattr(torch, dtype)) if dtype != 'float32' else nullcontext()
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
# window lengths: few, since a compiler may compile each
lengths = [block_size]
if min_block_size:
    lengths = sorted({round(min_block_size + (block_size - min_block_size) * i / 7) for i in range(8)})
with exit_on_error(files): # here the mixers run for the first time
    costs = {T: cost(model, T, getattr(torch, dtype), device_type) for T in lengths} # (FLOPs, bytes kept) a token

# sharding, compiling, several processes: raw_model has no wrappers, and fast_model, for evaluations, has not DDP's
raw_model = model.to(device)
n_params = raw_model.get_num_params(False)
if sharded:
    from torch.distributed.device_mesh import init_device_mesh # these take a second to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, Replicate
    mesh = init_device_mesh(device_type, (world,))
    # what has nothing but matrices travels in the dtype of their products, half of the bytes; the rest in float32
    policy = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32)
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        for part in filter(None, (block.attn, block.mlp)):
            if all(isinstance(m, torch.nn.Linear) for m in part.modules() if m._parameters):
                fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, 'hidden') # which generation calls
if compile == 'auto':
    compile = on_gpu and can_compile()
if raw_model.config.recompute == 'cheap' and not compile:
    say("note     recompute='cheap' is for torch.compile, which is off: it changes nothing")
if compile:
    torch._dynamo.config.recompile_limit = 2 * len(lengths) + 8 # for training and for evaluations
    torch._functorch.config.ban_recompute_materialized_backward = raw_model.config.recompute != 'cheap'
    # each length once: symbolic lengths are compiled three times as often
    model = torch.compile(model, dynamic=False, mode=compile if isinstance(compile, str) else None)
fast_model = model
if world > 1 and not sharded:
    # buffers are constants here, and gradients need no copy beside the one that travels
    DDP = torch.nn.parallel.DistributedDataParallel
    names = inspect.signature(DDP).parameters
    constant = 'forward_sync_buffers' if 'forward_sync_buffers' in names else 'broadcast_buffers' # before torch 2.13
    model = DDP(model, device_ids=[device] if on_gpu else None, gradient_as_bucket_view=True, **{constant: False})

lrs = dict(hidden=hidden_lr, embeddings=embedding_lr, head=embedding_lr, rest=other_lr)
decays = dict(hidden=hidden_decay, embeddings=embedding_decay, head=embedding_decay)
lrs, decays = ({name: value for name, value in own.items() if value is not None} for own in (lrs, decays))
opt = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, optimizer, momentum,
                                     nesterov, lrs, decays)
params = list(raw_model.parameters())
average = [p.detach().clone() for p in params] if ema else [] # of the weights
state = State()
if resuming:
    state = State(**stored_state(checkpoint, config))
    settings = [{k: v for k, v in group.items() if k != 'params'} for group in opt.param_groups]
    load_optimizer(raw_model, opt, checkpoint['optimizer'])
    for group, now in zip(opt.param_groups, settings): # of now, not of the checkpoint
        group.update(now)
    scaler.load_state_dict(checkpoint.get('scaler') or scaler.state_dict())
    if ema and 'average' in checkpoint:
        for a, (name, _) in zip(average, raw_model.named_parameters()):
            a.copy_(checkpoint['average'][name])
first_step, first_samples = state.step, state.samples
last_step = state.step + 3 if dry_run else max_iters
checkpoint = None # frees its memory

# ---------------------------------------------------------------------------------------------------------------------
# What the loop calls

def window_length(i):
    return lengths[0] if len(lengths) == 1 else random.Random(f'{seed} {i}').choice(lengths)


def load(i):
    """The micro-batches of this process in step i: a function of the seed and i, so resuming needs no state."""
    first = first_samples + (i - first_step) * gradient_accumulation_steps * batch_size
    return [[to_device(array) for array in splits['train'].batch(first + micro * batch_size, batch_size,
                                                                 window_length(i), sampling, seed, block_size)]
            for micro in range(rank, gradient_accumulation_steps, world)]


def to_device(array):
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)


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
    raw_model.eval()
    losses, counts, batches = [], [], iter(batches)
    while True:
        with exit_on_error():
            group = list(itertools.islice(batches, world)) # every process runs equally often, as sharded models must
        if not group:
            break
        if bar is not None and not bar.disable:
            bar.set_postfix_str(f"evaluating, batch {len(losses) + 1}")
        x, y = group[min(rank, len(group) - 1)]
        with amp:
            loss = fast_model(to_device(x), to_device(y))[1]
        losses.append(loss.clone()) # a copy: a CUDA graph's next run overwrites it. Read at the end, not to wait here
        counts.append((y >= 0).sum() if rank < len(group) else 0)
    raw_model.train()
    counts = torch.tensor(counts, dtype=torch.float64)
    total = torch.stack([torch.stack(losses).cpu().double() @ counts, counts.sum()]) # nats, targets
    if world > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


@contextmanager
@torch.no_grad()
def averaged():
    """The EMA of the weights in their place, if there is one."""
    current = [p.detach().clone() for p in params] if ema else []
    for p, a in zip(params, average):
        p.copy_(a)
    yield
    for p, c in zip(params, current):
        p.copy_(c)


def eval_batches(name):
    windows = max(1, eval_tokens // block_size) if eval_tokens else eval_iters * batch_size
    return splits[name].fixed_batches(windows, batch_size, block_size)


def bits_per_byte(loss, targets):
    """A mean loss over arrays of targets in bits per byte of text; None where the tokenizer is not known."""
    n_targets = n_bytes = 0
    for y in targets if tokenizer else ():
        n_targets, n_bytes = n_targets + (y >= 0).sum(), n_bytes + tokenizer.n_bytes(y)
    return float(loss * n_targets / n_bytes / math.log(2)) if n_bytes else None


def bits_by_name(bits):
    return {f'bits_per_{tokenizer.unit}': bits} if bits else {}


def evaluate():
    """Training and validation loss, best.pt if it is the best one, the picture, a sample. -> whether to stop."""
    with averaged():
        train_loss, val_loss = (mean_loss(eval_batches(name)) for name in ('train', 'val'))
    bits = bits_per_byte(val_loss, (y for _, y in eval_batches('val')))
    # a resumed run repeats the evaluation that made best.pt
    again = resuming and state.step == first_step and val_loss == state.best_val_loss
    better = val_loss < state.best_val_loss or again
    state.evals_since_best = 0 if better else state.evals_since_best + 1
    if better:
        state.best_val_loss, state.best_step = val_loss, state.step
    say(f"step {state.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
        f"{f', {bits:.4f} bits per {tokenizer.unit}' if bits else ''}{', the best so far' if better else ''}")
    log(train_loss=train_loss, val_loss=val_loss, **bits_by_name(bits))
    if better and state.step > 0:
        save(run.best)
    if is_main and time.perf_counter() - last_plot > 60: # each takes a fifth of a second, the first one a second
        plot()
    if sample_tokens:
        say(sample() + '\n')
    return patience and state.evals_since_best >= patience


def sample():
    raw_model.eval()
    prompt = torch.tensor([tokenizer.encode(with_line_ends(sample_prompt))], device=device)
    with averaged(), amp:
        text = raw_model.generate(prompt, sample_tokens, vocab_size=tokenizer.vocab_size,
                                  static=False if sharded else None,
                                  generator=torch.Generator(device).manual_seed(seed))
    raw_model.train()
    return tokenizer.decode(text[0].tolist())


def save(path):
    """Writes a checkpoint. A full disk is no reason to stop: the old file is kept, and the next save tries again."""
    weights, moments = full_state(raw_model, opt) if sharded else (raw_model.state_dict(), opt.state_dict())
    if not is_main:
        return
    content = dict(format=2, model=weights, optimizer=moments, scaler=scaler.state_dict(), state=asdict(state),
                   model_args=stored_config(raw_model.config), config=config, meta=meta,
                   iter_num=state.step, best_val_loss=state.best_val_loss) # as nanoGPT's readers expect them
    if ema:
        content['average'] = dict(zip(dict(raw_model.named_parameters()), average))
    try:
        save_checkpoint(path, content)
        unwritten.discard(path)
    except OSError as e:
        unwritten.add(path)
        say(f"warning: {e}; the old one is kept")


def log(**values):
    """Appends to metrics.jsonl, and to wandb and tensorboard if they are on."""
    for name, write in list(logs.items()) if is_main else ():
        try:
            write(**values)
        except OSError as e:
            if name != 'metrics.jsonl': # these cannot recover
                del logs[name]
            say(f"warning: {name} could not be written, training goes on{'' if name in logs else ' without it'}: {e}")


def log_to_tensorboard(**values):
    for name, value in values.items():
        if value is not None:
            tensorboard.add_scalar(name, value, state.step)


def plot():
    global last_plot
    last_plot = time.perf_counter()
    try:
        run.plot()
    except ImportError:
        say("no loss.png: pip install matplotlib draws it")
    except OSError as e:
        say(f"warning: {run.path / 'loss.png'} could not be written, training goes on: {e}")


def report(loss, lr, norm, weights_before):
    """The log line of a step. Reading the loss waits for the device: nothing else in a step does."""
    if world > 1:
        dist.all_reduce(loss)
    loss, norm, dt = loss.item() / world, norm.item(), time.perf_counter() - t0
    state.seconds += dt
    tokens_per_s, mfu = (state.tokens - tokens0) / dt, flops_done / dt / (peak * world) if peak else None
    values = dict(loss=loss, lr=lr, grad_norm=norm, tokens_per_s=round(tokens_per_s), mfu=mfu,
                  peak_memory=peak_memory(device))
    if weights_before: # how far the weights moved
        update_norm = torch.nn.utils.get_total_norm([p.detach() - b for p, b in zip(params, weights_before)])
        values['update_norm'] = (update_norm.full_tensor() if sharded else update_norm).item()
    log(**values)
    speed = f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}"
    bar.set_postfix_str(speed)
    if bar.disable:
        say(f"step {state.step}: {speed}, lr {lr:.3g}, norm {norm:.3f}")


def explain_bad_steps(x, y, norm):
    """Says where the first number that is not finite comes from. After too many in a row the run ends."""
    with amp:
        where = None if sharded else first_nonfinite(raw_model, x, y)
    n = int(bad_steps)
    say(f"warning: {n} step{'s' if n > 1 else ''} in a row skipped, gradient norm {norm.item():.4g}; first output that "
        f"is not finite: {where or 'none in a forward pass, so it is the backward'}")
    if n >= max_bad_steps:
        say(f"stopping after {n} such steps; the weights are those before them. What usually helps: a lower "
            f"learning_rate (now {learning_rate:g}), a longer warmup_iters ({warmup_iters}), "
            f"grad_clip={grad_clip or 1.0:g}, dtype=bfloat16 or float32 instead of float16")
        save(run.latest)
        exit_run(1)


def exit_run(status):
    """Ends the process. One of several skips Python's teardown: a gloo thread may abort in it (pytorch 190489)."""
    if world > 1:
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def hint_at_memory(kind, error, trace):
    """What usually helps, under the traceback of a run that is out of memory."""
    sys.__excepthook__(kind, error, trace)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        print(f"out of memory: halve batch_size={batch_size} and double gradient_accumulation_steps="
              f"{gradient_accumulation_steps} (the same steps), or lower block_size={block_size}, n_layer or n_embd",
              file=sys.stderr)
sys.excepthook = hint_at_memory


def duration(seconds):
    """As people say it: 38 s, 2.9 min, 5.1 hours, 12 days."""
    for unit, size in ('days', 86400), ('hours', 3600), ('min', 60):
        if seconds >= 1.5 * size:
            return f'{seconds / size:.2g} {unit}' if seconds < 99 * size else f'{seconds / size:,.0f} {unit}'
    return f'{seconds:.2g} s' if seconds < 10 else f'{seconds:.0f} s'


def table(words):
    """Lines of columns as wide as the terminal."""
    width = max(map(len, words)) + 2
    n = max(1, (shutil.get_terminal_size().columns - 9) // width)
    return [''.join(word.ljust(width) for word in words[i:i + n]).rstrip() for i in range(0, len(words), n)]


def describe_run():
    """What this run is, in a few lines."""
    for i, line in enumerate(table([f'{name}={value!r}' for name, value in given.items()]) if given else ()):
        say(f"{'' if i else 'settings':<9}{line}")
    for line in shortened:
        say(f"note     {line}")
    for name, (old, new) in changed.items():
        say(f"changed  {name}={new!r}, was {old!r}")
    for line in added:
        say(f"added    {line}")
    for name in sorted(MIXERS.keys() - BUILT_IN):
        if not any(isinstance(module, MIXERS[name]) for module in raw_model.modules()):
            say(f"note     {MIXERS[name].__name__} of a config file is not used, as mixer={raw_model.config.mixer!r}: "
                f"mixer = {MIXERS[name].__name__} in the file, or --mixer={name}")
    if optimizer == 'sm3':
        say(f"note     sm3 has momentum={momentum}: beta1 and beta2 are AdamW's")
    how = f"{dtype}, {'compiled' if compile else 'eager'}, {world} process{'es' if world > 1 else ''}"
    ceiling = f'{peak / 1e12:.4g} TFLOP/s ({peak_source})' if peak else peak_source
    embeddings = [m.weight for m in (raw_model.transformer.wte, raw_model.transformer.wpe) if m is not None]
    n_embedding = sum(w.numel() for w in embeddings)
    groups = optimizer_groups(raw_model)
    n_decayed = n_params - sum(p.numel() for _, p in groups['rest'])
    flops, kept = costs[block_size]
    step_tokens, n_tokens = gradient_accumulation_steps * batch_size * block_size, splits['train'].n_tokens
    epochs = max_iters * step_tokens / n_tokens
    bytes_a_parameter = 16 - (4 if optimizer == 'sm3' else 0) + (4 if ema else 0)
    fixed = bytes_a_parameter * n_params / (world if sharded else 1) / 1e9 # GB
    activations = kept * batch_size * block_size / 1e9
    say(f"model    {n_params / 1e6:.2f}M parameters, {(n_params - n_embedding) / 1e6:.2f}M without embeddings, "
        f"{n_decayed / 1e6:.2f}M decayed; {flops / 1e9:.4g} GFLOP a token")
    say(f"machine  {device}, {how}{', sharded' if sharded else ''}; peak {ceiling}")
    say(f"data     {dataset}: {n_tokens:,} tokens to train on, {splits['val'].n_tokens:,} to validate; "
        f"{meta.get('encoding') or meta.get('tokenizer', 'unknown tokens')}, "
        f"vocabulary {raw_model.config.vocab_size:,}")
    say(f"run      {max_iters:,} steps of {step_tokens:,} tokens = {max_iters * step_tokens:,}: "
        f"{epochs:,.3g} epochs")
    if not resuming and epochs > 100:
        say(f"warning: {epochs:,.0f} times the same {n_tokens:,} tokens; for 20 times, --max_iters="
            f"{max(1, round(20 * max_iters / epochs))}")
    seconds = max_iters * step_tokens * flops / (0.4 * peak * world) if peak else 0.0
    if not resuming and seconds > 86400:
        say(f"warning: at 40% of the peak that takes about {duration(seconds)}; fewer steps: --max_iters")
    say(f"memory   about {fixed + activations:.3g} GB: {fixed:.3g} of weights, gradients and optimizer, "
        f"{activations:.3g} of activations")
    there = memory_of(device)
    if there and fixed + activations > there / 1e9:
        say(f"warning: {device} has {there / 1e9:.3g} GB: if it does not fit, a lower batch_size and as many more "
            "gradient_accumulation_steps take the same steps")


def prove_causal():
    """Looks for an output that sees a later token, with real text, the batch and the networks that will train."""
    windows, _ = splits['train'].batch(0, 2 * batch_size, block_size, sampling, seed)
    passes = 3 * max_iters * gradient_accumulation_steps / world # of the run, in forward passes
    limits = dict(auto=(20, passes), full=(math.inf, math.inf), quick=(0, math.inf)).get(proof, (proof, math.inf))
    if world > 1 and not sharded:
        model.require_backward_grad_sync = False # no backward pass follows
    with amp: # model, not fast_model: compiled inside DDP, the backward pass is split to exchange gradients meanwhile
        found = find_leak(raw_model, to_device(windows), batch_size, (fast_model, model) if compile else None, *limits)
    if found.leak and not allow_leak:
        raise ValueError(f"the network is not causal: {found.leak}; its losses would mean nothing. To train it all the "
                         "same, --allow_leak=True")
    say(f"causal   {found}{', with compiling' if compile else ''}")


def evaluate_all():
    """--eval_only: the whole validation split."""
    batches = splits['val'].all_batches
    loss = mean_loss((x, y) for x, y, _ in batches(batch_size, block_size))
    bits = bits_per_byte(loss, (y for _, y, _ in batches(batch_size, block_size)))
    n_targets = sum(n for _, _, n in batches(batch_size, block_size))
    say(f"whole validation split, {n_targets:,} tokens: loss {loss:.4f}, perplexity {math.exp(loss):.4g}"
        f"{f', {bits:.4f} bits per {tokenizer.unit}' if bits else ''}")
    if resuming: # the folder is this run's
        log(whole_val_loss=loss, **bits_by_name(bits))


def sum_up():
    """What came of the run, and what to do next."""
    best = 'no best.pt'
    if run.best.exists():
        best = f"lowest validation loss {state.best_val_loss:.4f} at step {state.best_step:,}"
    elif state.step > state.best_step == 0 and math.isfinite(state.best_val_loss):
        best += f", for none was better than step 0's {state.best_val_loss:.4f}"
    say(f"done     {state.step:,} steps, {state.tokens:,} tokens in {duration(state.seconds)}; {best}")
    if first_step == state.step >= max_iters:
        say(f"note     the run was at step {state.step} already: to go on, --max_iters={2 * state.step or 1000}")
    if (run.path / 'loss.png').exists():
        say(f"picture  {run.path / 'loss.png'}")
    own = files if not set(raw_model.config.mixers()) <= {MIXERS[name] for name in BUILT_IN} else []
    say(f"next     python sample.py {' '.join([*own, f'--out_dir={out_dir}'])}")


def begin_dry_run():
    """Reads all data, and makes a folder for the checkpoint on the disk that out_dir is on."""
    global run
    for name, split in splits.items():
        with tqdm(total=split.n_tokens, desc=f'scanning {name}', unit='token', unit_scale=True,
                  disable=not is_main) as progress:
            split.scan(raw_model.config.vocab_size, progress.update)
    parent = next(p for p in (run.path, *run.path.parents) if p.exists())
    run = RunFolder(tempfile.mkdtemp(prefix='.dry_run-', dir=parent))
    atexit.register(shutil.rmtree, run.path, ignore_errors=True)


def end_dry_run():
    save(run.latest)
    with exit_on_error():
        size = load_checkpoint(run.latest) and run.latest.stat().st_size if is_main else 0
    took = duration(state.seconds / 3 * (max_iters - first_step))
    say(f"dry run passed: {max_iters:,} steps take about {took} without evaluations; a checkpoint has "
        f"{size / 1e9:.3g} GB; peak memory {(peak_memory(device) or 0) / 1e9:.3g} GB")


def begin_wandb():
    import wandb
    try:
        wandb.init(project=wandb_project, name=wandb_run_name, config=config, dir=run.path)
    except wandb.Error as e:
        raise ValueError(f"wandb_log=True: {str(e).rstrip('.')}; or WANDB_MODE=offline, or leave it out") from None
    logs['wandb'] = lambda **values: wandb.log(dict(tokens=state.tokens, **values), step=state.step)


def begin_run():
    """The run's folder: made, locked, and rid of what a new run replaces or a resumed one writes again."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.lock()
    if not (resuming or overwrite): # another run may have begun since the first look
        run.refuse_if_taken(restart=init_from == 'auto')
    if wandb_log: # before anything is deleted: it may refuse
        begin_wandb()
    if resuming:
        run.forget_after(state.step, evaluates=state.step % eval_interval == 0 or state.step >= last_step)
    else:
        run.remove_run()
    if code_changed := run.keep_code(files, state.step):
        say(f"note     the code has changed: {', '.join(code_changed)}; {run.code()[-2]} has what made the run so far")
    run.write_config(config | dict(resolved=dict(device=device, dtype=dtype, compile=compile, world=world),
                                   data=[split.fingerprint() for split in splits.values()]))


bar = None # of progress, once there is any
logs = {'metrics.jsonl': lambda **values: run.log(step=state.step, tokens=state.tokens, seconds=round(state.seconds, 3),
                                                  **values)}
describe_run()
with exit_on_error(files):
    prove_causal()
    if eval_only:
        evaluate_all()
        exit_run(0)
    if dry_run:
        begin_dry_run()
    elif is_main:
        begin_run()
if tensorboard_log and is_main and not dry_run:
    from torch.utils.tensorboard import SummaryWriter
    tensorboard = SummaryWriter(run.path, purge_step=state.step + 1) # what a killed run wrote beyond is hidden
    logs["tensorboard's file"] = log_to_tensorboard
    @atexit.register
    def close_tensorboard():
        with suppress(OSError):
            tensorboard.close()

# ---------------------------------------------------------------------------------------------------------------------
# The loop

asked_to_stop = 0 # the signal: the step is finished, saved, and then the process ends
def on_signal(number, frame):
    global asked_to_stop
    asked_to_stop = number
    signal.signal(number, signal.SIG_DFL) # a second one ends it at once
for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'): # Ctrl-C, kill, a scheduler's warning
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), on_signal)

batches = prefetch(load, first_step)
bar = tqdm(total=last_step, initial=first_step, unit='step', disable=not is_main or not sys.stderr.isatty(),
           dynamic_ncols=True)
bad_steps = torch.zeros((), device=device) # steps in a row without a finite gradient
stop_now = 0
unwritten = set() # checkpoints whose last save failed
last_plot = time.perf_counter()
t0, tokens0, flops_done = time.perf_counter(), state.tokens, 0 # since the last log line
raw_model.train()
while True:
    # once in a while: evaluate
    if not dry_run and (state.step % eval_interval == 0 or state.step >= last_step):
        state.seconds += time.perf_counter() - t0
        if state.step > first_step and (always_save_checkpoint or state.step >= last_step):
            save(run.latest) # first: an evaluation can fail, too
        out_of_patience = evaluate()
        t0, tokens0, flops_done = time.perf_counter(), state.tokens, 0
        if out_of_patience:
            say(f"no better validation loss in {state.evals_since_best} evaluations: stopping")
        if out_of_patience or last_step == state.step > first_step and state.step % eval_interval:
            save(run.latest) # again: a resumed run would not evaluate this step
        if out_of_patience:
            break
    if state.step >= last_step:
        break

    # the step --------------------------------------------------------------------------------------------------------
    # dropout is a function of seed, step and rank, so that a resumed run draws the same masks
    torch.manual_seed(((seed * 1_000_003 + state.step) * 4096 + rank) % 2 ** 63)
    lr = get_lr(state.step)
    for group in opt.param_groups:
        group['lr'] = lr * group['lr_scale']
    with exit_on_error():
        micro_batches = next(batches)
    loss_sum = 0.0
    for i, (x, y) in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1 # processes exchange gradients once a step
        if sharded:
            raw_model.set_requires_gradient_sync(is_last)
        else:
            model.require_backward_grad_sync = is_last
        with amp:
            loss = model(x, y)[1] / len(micro_batches)
        scaler.scale(loss).backward()
        loss_sum += loss.detach()
    scaler.unscale_(opt)
    if adaptive_clip:
        clip_adaptively(raw_model, adaptive_clip)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    norm = norm.full_tensor() if sharded else norm
    bad = ~torch.isfinite(norm)
    bad_steps = (bad_steps + 1) * bad
    if device_type == 'mps' and bad: # its optimizer cannot decide that; without gradients it changes nothing
        opt.zero_grad(set_to_none=True)
    elif device_type != 'mps' and not scaler.is_enabled(): # it then changes nothing, decided without waiting for it
        found_inf = DTensor.from_local(bad.float(), mesh, [Replicate()]) if sharded else bad.float()
        opt.grad_scale, opt.found_inf = None, found_inf
    # how far the weights move is measured every tenth time: it takes a copy of them
    weights_before = [p.detach().clone() for p in params] if (state.step + 1) % (10 * log_interval) == 0 else None
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    with torch.no_grad():
        for a, p in zip(average, params): # a short memory at first, so that the start does not linger
            a.lerp_(p, 1 - min(ema, (1 + state.step) / (10 + state.step)))
    state.step += 1
    state.samples += gradient_accumulation_steps * batch_size
    state.tokens += gradient_accumulation_steps * x.numel()
    flops_done += gradient_accumulation_steps * x.numel() * costs[x.size(1)][0]
    bar.update()
    # -----------------------------------------------------------------------------------------------------------------

    # once in a while: tell how it goes
    if state.step % log_interval == 0:
        report(loss_sum, lr, norm, weights_before)
        t0, tokens0, flops_done = time.perf_counter(), state.tokens, 0
        if bad_steps > 0:
            explain_bad_steps(x, y, norm)
    # once in a while: keep a checkpoint
    if snapshot_interval and state.step % snapshot_interval == 0:
        save(run.path / f'step-{state.step}.pt')
    if checkpoint_interval and state.step % checkpoint_interval == 0 and not dry_run:
        save(run.latest)
    # once: stop when asked to
    stop_now = asked_to_stop
    if world > 1: # all processes stop at the same step
        asked = torch.tensor(stop_now, device='cpu' if on_cpus else device)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=on_cpus)
        stop_now = int(asked)
    if stop_now:
        say(f"{signal.Signals(stop_now).name}: saving step {state.step} to {run.latest}; go on with --init_from=resume")
        save(run.latest)
        break

bar.close()
batches.close()
if dry_run:
    end_dry_run()
elif is_main and state.step > first_step:
    plot()
if not (dry_run or stop_now):
    sum_up()
if run.latest in unwritten:
    say(f"error: the state of step {state.step} is not on disk: free some space and resume from the checkpoint that is "
        "left")
    exit_run(1)
exit_run(128 + stop_now if stop_now else 0)
