"""
Measures speed, memory and loss: this project's, and in turn with it a peer's, from a checkout of nanoGPT.

    python tests/bench.py train --preset=baby --peer=PATH   tokens/s, MFU, peak memory, where a step's time goes
    python tests/bench.py sample --peer=PATH                tokens/s of prefill and decoding, short and long context
    python tests/bench.py mixers                            every token mixer and a UNet, and their cost as T grows
    python tests/bench.py unet                              the published UNet, 100 blocks inside, beside the flat GPT
    python tests/bench.py scale                             cost against T, width, depth, dataset size, ranks
    python tests/bench.py startup --peer=PATH               seconds from the command to the first training step
    python tests/bench.py process --peer=PATH               the README's small CPU run, from start to end
    python tests/bench.py recipe --peer=PATH                seconds to the peer's loss by a speed-run config, several seeds
    python tests/bench.py ablations                         that config with each of its ingredients taken out
    python tests/bench.py optimizers                        AdamW, Muon and SM3 on MLP-Mixer: curves and memory
    python tests/bench.py arithmetic                        what zeros, steps, mixer and optimizer are worth to config/train_calc.py
    python tests/bench.py repetition --run=out-x            how often a trained model's greedy text loops, and what helps
    python tests/bench.py profile --peer=PATH               the operators that a training step's time goes to
    python tests/bench.py head                              the head's loss: in chunks, by torch's function, with all logits
    python tests/bench.py loss --peer=PATH                  loss curves from the same weights on the same batches
    python tests/bench.py all --device=cuda --peer=PATH     all of it, and each goal beside what was measured

Every measurement is a fresh process, ours and the peer's started in the same way and in turn: A B A B. What is printed
are medians over the rounds; a ratio is taken within each round, and its range over the rounds is printed too. The raw
numbers go to tests/results/COMMAND-DEVICE.json. GPTConfig's fields change the model of any command: --n_layer=2. Data
are synthetic unless --dataset names a real one. Memory on a CPU is the whole process's, torch's code included.
"""
import datetime
import importlib.util
import itertools
import json
import math
import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from configurator import configure, exit_on_error, fail
from data.tokens import Split, dataset_folder, load_meta, prefetch
from model import GPT, GPTConfig, LinearCrossEntropy, MIXERS, find_peak_flops, keep_freed_memory, recompute_what_is_cheap, resolve

# ---------------------------------------------------------------------------------------------------------------------
# what is measured
preset = 'auto' # readme (README's CPU run) | baby | gpt2 | gpt2-medium | auto: the one that suits the command
peer: str | None = None # a checkout of nanoGPT, measured in turn with this project
peer_compile: bool | str = 'auto' # the peer's torch.compile in training; auto: tried both ways, the faster counts
device = 'auto' # auto | cpu | cuda | mps
dtype = 'auto' # auto: what train.py and sample.py choose | float32 | bfloat16 | float16
compile: bool | str = 'auto' # ours; auto: what train.py and sample.py choose
batch_size = 0 # sequences in a training batch; 0: the preset's
dataset = '' # a folder in data/, or any folder given with a slash; none: synthetic tokens
repeats = 5 # rounds
steps = 5 # timings in a round of training; on a GPU each is the mean of 10 steps
out = '' # the JSON file; none: tests/results/COMMAND-DEVICE.json
# sample
batches = (1, 32) # sequences at once
contexts = (1, 900) # tokens of the prompt
new_tokens = 64 # generated after each prompt
seconds = 10.0 # after which a generation is cut short
# mixers and scale
variants: tuple[str, ...] = () # the mixers to measure, by the names in the table; none: all
equal_params = False # mixers: as many parameters as attention has, by n_layer and mlp_ratio, instead of equal width
lengths = (256, 512, 1024, 2048, 4096, 8192) # T
widths = (128, 256, 512, 1024) # n_embd, with heads of 64 channels
depths = (2, 4, 8, 16) # n_layer
sizes = (10**6, 10**7, 10**8, 10**9, 10**10, 10**11) # tokens of a dataset
ranks = (1, 2) # gloo processes, sharing the machine's cores
# startup, process, loss, all
iterations = 2000 # of the README's small CPU run
loss_steps = 500 # training steps before losses are compared
# recipe and ablations
recipe_of = 'shakespeare_cpu' # shakespeare_cpu | shakespeare: which config/speedrun_*.py
seeds = (1, 2, 3)
run = '' # repetition: folder of the run
prompts = 32 # repetition: texts, each begun by 32 tokens of the validation split
problems = 2000 # arithmetic: held-out problems to solve
length = 400 # repetition: tokens generated for each
peer_steps = 5 # steps of the peer that are timed where its run takes hours, and its whole run is as many times longer
goals = 'auto' # all: cpu | cuda | auto: the device's
# ---------------------------------------------------------------------------------------------------------------------

PRESETS = { # fields of GPTConfig, and the batch size
    'readme': (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False), 12),
    'baby': (dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False), 64),
    'gpt2': (dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, bias=False), 12),
    'gpt2-medium': (dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024, vocab_size=50304, bias=False), 12),
}
_NANOGPT_FIELDS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'dropout', 'bias')
# nanoGPT's README, training on a CPU: both projects take these words
SMALL_RUN = dict(device='cpu', compile=False, eval_iters=20, log_interval=1, block_size=64, batch_size=12, n_layer=4,
                 n_head=4, n_embd=128, dropout=0.0)
# speed runs: the loss to reach, the peer's run that does, and what taking out each ingredient means
RECIPES = {
    'shakespeare_cpu': (1.898, 'readme', 2000),
    'shakespeare': (1.4697, 'baby', 5000),
}
_ATTENTION = dict(mixer='attention', mlp='relu2', pos_emb='rope')
ABLATIONS = {
    'as it is': {}, 'AdamW for all matrices': dict(optimizer='adamw', momentum=0.95, hidden_lr=None),
    'AdamW at 0.004': dict(optimizer='adamw', momentum=0.95, hidden_lr=None, learning_rate=4e-3),
    'SM3 at 0.1': dict(optimizer='sm3', hidden_lr=None, learning_rate=0.1),
    'momentum 0.95': dict(momentum=0.95), 'no time-mixing': dict(time_mixing=0.0),
    'attention with rotary positions and relu2 MLP': _ATTENTION,
    'attention with QK-norm': _ATTENTION | dict(qk_norm=True), 'attention without time-mixing': _ATTENTION | dict(time_mixing=0.0), 'MLP-Mixer and relu2 MLP': dict(mixer='mlp_mixer', mlp='relu2'),
    'aMLP': dict(gmlp_attn=32), 'cosine to a tenth': dict(schedule='cosine', min_lr=1e-3), 'batch 12 with as many steps': dict(batch_size=12),
    'batch 12 with as many tokens': dict(batch_size=12, max_iters=280, lr_decay_iters=280, eval_interval=280, warmup_iters=20),
    'float32': dict(dtype='float32'), 'untied head': dict(tie_weights=False), 'ReZero': dict(rezero=True),
    'average of weights (0.9)': dict(ema=0.9), 'adaptive clipping 0.1': dict(adaptive_clip=0.1), 'clipping at 0.3': dict(grad_clip=0.3),
    'windows growing from 16': dict(min_block_size=16, block_warmup_iters=40), 'batch growing from 12': dict(min_batch_size=12, batch_warmup_iters=40),
    'weight decay 0.1': dict(weight_decay=0.1), '2 layers': dict(n_layer=2), '4 layers': dict(n_layer=4),
}
# what is taken out of the calc dataset, and of its config
ARITHMETIC = {
    'as it is': ({}, {}), 'no results backwards': (dict(reverse=''), {}), 'all results backwards': (dict(reverse='+-*/'), {}), 'no leading zeros': (dict(pad=False), {}),
    'no steps': (dict(scratch=False), {}), 'as many of each operator': (dict(operators='+-*/', examples=150000), {}),
    'no time-mixing': ({}, dict(time_mixing=0.0)), 'AdamW': ({}, dict(optimizer='adamw', hidden_lr=None)),
    'attention': ({}, dict(mixer='attention', pos_emb='rope', mlp='relu2', n_layer=4)),
}
# what the command line set; tables and failures by title; the machine's limits by dtype; dataset folders by vocabulary
given, records, errors, known, folders = {}, {}, {}, {}, {}

# ---------------------------------------------------------------------------------------------------------------------
# Inside of a worker process: a job is a dict of plain values, and so is what comes back.

def build(job):
    """The model that a job asks for, ours or the peer's, on its device."""
    config = job['config']
    torch.manual_seed(1337)
    if job['peer']:
        spec = importlib.util.spec_from_file_location('peer_model', Path(job['peer']) / 'model.py')
        sys.modules['peer_model'] = module = importlib.util.module_from_spec(spec) # dataclasses look it up there
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(**{k: config[k] for k in _NANOGPT_FIELDS}))
    else:
        model = GPT(GPTConfig(**config))
    return model.to(job['device'])


def trainer(job):
    """-> (model, step): step(i, x, y, lr, mark) is the i-th step as train.py makes it, and returns the loss."""
    kind = torch.device(job['device']).type
    torch.set_float32_matmul_precision('high')
    if kind == 'cpu' and not job['peer']: # as train.py
        keep_freed_memory()
    if kind == 'cuda' and not job['peer']:
        recompute_what_is_cheap()
    model = build(job)
    if job.get('init'): # start from the weights that the peer starts from
        model.load_weights(build(dict(job, peer=job['init'])).state_dict())
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), kind)
    scaler = torch.amp.GradScaler(kind, enabled=job['dtype'] == 'float16')
    amp = autocast(job)
    fast_model = torch.compile(model, mode=job['compile'] if isinstance(job['compile'], str) else None) if job['compile'] else model
    model.train()

    def step(i, x, y, lr=1e-3, mark=lambda name: None):
        if not job['peer']:
            torch.manual_seed((1337 * 1_000_003 + i) * 4096)
        for group in optimizer.param_groups:
            group['lr'] = lr * group.get('lr_scale', 1.0)
        with amp:
            loss = fast_model(x, y)[1]
        mark('forward')
        scaler.scale(loss).backward()
        mark('backward')
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not job['peer'] and not scaler.is_enabled(): # train.py skips steps that are not finite
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        mark('optimizer')
        return loss.detach()

    return model, step


def generator(job):
    """-> stream(idx, n), which yields n new tokens as sample.py makes them; the peer's are those of its generate()."""
    model, options = build(job).eval(), dict(temperature=0.8, top_k=200)
    if not job['peer']:
        model.to(getattr(torch, job['dtype']))
        if job['compile']:
            model.hidden = torch.compile(model.hidden, dynamic=True)
        return torch.inference_mode()(lambda idx, n: (yield from model.stream(idx, n, **options)))

    def stream(idx, n):
        with autocast(job):
            for _ in range(n): # what generate(idx, n) does, one turn of its loop at a time
                idx = model.generate(idx, 1, **options)
                yield idx[:, -1:]
    return stream


def autocast(job):
    kind = torch.device(job['device']).type
    return torch.autocast(kind, getattr(torch, job['dtype'])) if job['dtype'] != 'float32' else nullcontext()


def synchronize():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(job):
    """Bytes: of tensors on the GPU, or of this whole process; None where the system does not say."""
    if torch.device(job['device']).type == 'cuda':
        return torch.cuda.max_memory_allocated()
    status = Path('/proc/self/status') # Linux: ru_maxrss begins there with the memory of the parent process
    if status.exists():
        return int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1]) * 1024
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    except ImportError: # Windows
        return None


def loader(job):
    """Yields training batches on the device, fetched ahead by a thread as in train.py."""
    split, cuda = Split(job['data'], 'train'), torch.device(job['device']).type == 'cuda'
    def load(i):
        arrays = split.batch(i * job['batch_size'], job['batch_size'], job['config']['block_size'])
        tensors = [torch.from_numpy(array) for array in arrays]
        return [(t.pin_memory() if cuda else t).to(job['device'], non_blocking=True) for t in tensors]
    return prefetch(load, 0)


def work_train(job):
    cuda = torch.device(job['device']).type == 'cuda'
    memory_before = peak_memory(job)
    model, step = trainer(job)
    batches, numbers, parts = loader(job), itertools.count(), {}

    def run(n, mark=lambda name: None):
        for i in itertools.islice(numbers, n):
            x, y = next(batches)
            mark('data')
            step(i, x, y, mark=mark)

    run(10 if cuda else 2) # compilation, first allocations, the optimizer's state
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, n = [], 10 if cuda else 1 # train.py does not wait for the GPU in every step either
    for _ in range(job['steps']):
        t0 = time.perf_counter()
        run(n)
        synchronize()
        times.append((time.perf_counter() - t0) / n)
    result = dict(step=median(times), times=times, memory=peak_memory(job), memory_before=memory_before)
    last = time.perf_counter()
    def mark(name): # waits for the device, so the parts of a step are longer together than a step
        nonlocal last
        synchronize()
        now = time.perf_counter()
        parts.setdefault(name, []).append(now - last)
        last = now
    run(job['steps'], mark)
    batches.close()
    return result | {name: median(values) for name, values in parts.items()}


def work_sample(job):
    stream, results, begin = generator(job), [], 1 if torch.device(job['device']).type == 'cuda' and job['new_tokens'] > 2 else 0
    for batch, context in job['shapes']:
        idx = torch.randint(job['config']['vocab_size'], (batch, context), device=job['device'])
        for limit in (job['seconds'] / 4, job['seconds']): # warm-up, measurement
            synchronize()
            t0 = time.perf_counter()
            for i, token in enumerate(stream(idx, job['new_tokens'])):
                if i <= begin: # a CUDA graph is captured in the second token
                    synchronize()
                    now = time.perf_counter()
                    first, start = now if i == 0 else first, now
                elif time.perf_counter() - t0 > limit:
                    break
            synchronize()
            end = time.perf_counter()
        results.append(dict(prefill=first - t0, decode=(end - start) / (i - begin), decoded=i - begin))
    return dict(shapes=results)


def work_loss(job):
    """The losses of the first training steps, and at the end the one of the validation split."""
    model, step = trainer(job)
    batches = loader(job)
    losses = [step(i, *next(batches), lr=1e-3 * min(1.0, (i + 1) / 100)) for i in range(job['steps'])]
    batches.close()
    val = Split(job['data'], 'val').fixed_batches(20, job['batch_size'], job['config']['block_size'])
    with torch.no_grad(), autocast(job):
        model.eval()
        val = [model(*(torch.from_numpy(array).to(job['device']) for array in batch))[1].item() for batch in val]
    return dict(losses=torch.stack(losses).tolist(), val_loss=sum(val) / len(val))


def work_ceilings(job):
    """What the machine can do: FLOP/s of large matrix products, bytes/s of reading a GiB of weights once."""
    flops, source = find_peak_flops('auto', job['device'], getattr(torch, job['dtype']))
    weights = torch.ones(2 ** 14, 2 ** 14, device=job['device'])
    best = math.inf
    for read in [weights.sum, lambda: weights @ weights[0]] * 5:
        synchronize()
        t0 = time.perf_counter()
        read()
        synchronize()
        best = min(best, time.perf_counter() - t0)
    return dict(flops=flops, source=source, bandwidth=weights.nbytes / best)


def work_fetch(job):
    """Seconds to open a dataset of so many tokens and to fetch a batch; its shards are holes that take no disk."""
    with tempfile.TemporaryDirectory() as folder:
        shard = 10 ** 8
        for i in range(-(-job['tokens'] // shard)):
            with open(Path(folder) / f'train_{i:06d}.bin', 'wb') as f:
                f.truncate(2 * min(shard, job['tokens'] - i * shard))
        t0, times = time.perf_counter(), []
        split = Split(folder, 'train')
        opened = time.perf_counter() - t0
        for i in range(200):
            t0 = time.perf_counter()
            split.batch(12 * i, 12, 1024)
            times.append(time.perf_counter() - t0)
    return dict(open=opened, fetch=median(times), memory=peak_memory(dict(device='cpu')))


def work_profile(job):
    """{operator: ms of a step}, of the ten that take longest, and of all."""
    _, step = trainer(job)
    batches = loader(job)
    for i in range(2):
        step(i, *next(batches))
    with torch.profiler.profile() as profile:
        for i in range(job['steps']):
            step(2 + i, *next(batches))
        synchronize()
    batches.close()
    cuda = torch.device(job['device']).type == 'cuda'
    took = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / job['steps'] / 1e3 for e in profile.key_averages()
            if e.device_type == torch.autograd.DeviceType.CPU} # a GPU's kernels are counted at their operators
    if not any(took.values()):
        raise ValueError("torch's profiler saw no work on the GPU: this user may not read its counters")
    longest = sorted(took, key=took.get, reverse=True)[:10]
    return dict(operators={name: took[name] for name in longest}, all=sum(took.values()))


def work_head(job):
    """Forward and backward of the head alone: x (N, C) to the mean cross-entropy."""
    c, kind = GPTConfig(**job['config']), torch.device(job['device']).type
    N, dtype = job['batch_size'] * c.block_size, getattr(torch, job['dtype'])
    x = torch.randn(N, c.n_embd, device=job['device'], requires_grad=True)
    weight = (torch.randn(c.vocab_size, c.n_embd, device=job['device']) * 0.02).requires_grad_()
    y = torch.randint(c.vocab_size, (N,), device=job['device'])
    F = torch.nn.functional
    ways = dict(chunks=lambda: LinearCrossEntropy.apply(x, weight, y, True), logits=lambda: F.cross_entropy(F.linear(x, weight), y),
                torch=lambda: F.linear_cross_entropy(x, weight, y, options=torch.nn.LinearCrossEntropyOptions()))
    memory_before, times = peak_memory(job), []
    for _ in range(1 + job['steps']):
        synchronize()
        t0 = time.perf_counter()
        with autocast(job):
            loss = ways[job['way']]()
        loss.backward()
        x.grad = weight.grad = None
        synchronize()
        times.append(time.perf_counter() - t0)
    return dict(step=median(times[1:]), times=times, memory=peak_memory(job), memory_before=memory_before, loss=loss.item())


WORK = dict(train=work_train, profile=work_profile, head=work_head, sample=work_sample, loss=work_loss, ceilings=work_ceilings, fetch=work_fetch)

# ---------------------------------------------------------------------------------------------------------------------
# Starting processes

def run_worker(job):
    """The result of a job, from a fresh process. RuntimeError if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / 'result.json' # not stdout: the peer prints there
        done = subprocess.run([sys.executable, __file__, 'worker', json.dumps(job), str(result)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors='replace')
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f'ended with status {done.returncode}, without a word']
            raise RuntimeError(next((line for line in lines if 'OutOfMemory' in line), lines[-1]))
        return json.loads(result.read_text(encoding='utf-8'))


def run_script(folder, until_first_step=False):
    """The README's small CPU run by train.py in folder -> seconds, seconds to the first step, last validation loss."""
    vocab_size = model_of('readme')[0].vocab_size
    with tempfile.TemporaryDirectory() as out_dir:
        flags = SMALL_RUN | {k: v for k, v in given.items() if k in _NANOGPT_FIELDS and k != 'vocab_size'} | dict(
            max_iters=iterations, lr_decay_iters=iterations, warmup_iters=min(100, iterations // 2),
            out_dir=out_dir, dataset=data(vocab_size))
        command = [sys.executable, '-u', 'train.py', 'config/train_shakespeare_char.py',
                   *(f'--{k}={v}' for k, v in flags.items())]
        t0, lines, first = time.perf_counter(), [], None
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors='replace') as p:
            for line in p.stdout:
                lines.append(line)
                if first is None and re.match(r'iter \d+:', line):
                    first = time.perf_counter() - t0
                    if until_first_step:
                        p.kill()
        if first is None or p.returncode and not until_first_step:
            raise RuntimeError((lines or ['train.py said nothing'])[-1].strip())
        val = re.findall(r'val loss ([\d.]+)', ''.join(lines))
        return dict(seconds=time.perf_counter() - t0, first_step=first, val_loss=float(val[-1]) if val else None)


def run_recipe(folder, args):
    """
    train.py in folder -> seconds from the command to the last evaluation, without the time of evaluations (each from the line
    before it to its own); and its validation loss.
    """
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, '-u', 'train.py', *args, f'--out_dir={Path(out_dir) / "run"}']
        last = start = time.perf_counter()
        evaluating, lines, total, val = 0.0, [], 0.0, None
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace') as p:
            for line in p.stdout:
                now = time.perf_counter()
                lines.append(line)
                found = re.match(r'step \d+: train loss [\d.]+, val loss ([\d.]+)', line)
                if found:
                    total, val = last - start - evaluating, float(found[1])
                    evaluating += now - last
                last = now
        if p.returncode or val is None:
            raise RuntimeError((lines or ['train.py said nothing'])[-1].strip())
        metrics = Path(out_dir) / 'run' / 'metrics.jsonl' # not the peer's
        logged = [json.loads(line) for line in metrics.read_text(encoding='utf-8').splitlines()] if metrics.exists() else []
        return dict(seconds=total, val_loss=val, curve=[(line['step'], line['loss']) for line in logged if 'loss' in line],
                    val_curve=[(line['step'], line['val_loss']) for line in logged if 'val_loss' in line])


def run_ranks(n, config, batch):
    """Tokens/s of train.py in n processes on the CPU, which share its cores and the batch."""
    with tempfile.TemporaryDirectory() as folder:
        flags = vars(config) | dict(
            dataset=data(config.vocab_size), out_dir=folder, device='cpu', backend='gloo', compile=False,
            decay_lr=False, batch_size=max(1, batch // max(ranks)), gradient_accumulation_steps=math.lcm(*ranks),
            max_iters=2 + 2 * steps, eval_iters=1, eval_interval=10 ** 6)
        threads = int(os.environ.get('OMP_NUM_THREADS', os.cpu_count())) // n
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', 'train.py']
        done = subprocess.run(command + [f'--{k}={v}' for k, v in flags.items()], cwd=PROJECT, capture_output=True,
                              text=True, errors='replace', env=os.environ | dict(OMP_NUM_THREADS=str(max(1, threads))))
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if 'rror' in line]
            raise RuntimeError((lines or [f'ended with status {done.returncode}'])[0])
        lines = [json.loads(line) for line in (Path(folder) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
        return dict(speed=median([line['tokens_per_s'] for line in lines if 'loss' in line][2:]))


def in_turn(title, jobs, rounds=None):
    """{name: job, or a function to call} -> {name: results of all rounds}, A B A B; a failure is said and gives []."""
    results, rounds = {name: [] for name in jobs}, rounds or repeats
    for r in range(rounds):
        for name, job in list(jobs.items()):
            print(f'... {title}, round {r + 1} of {rounds}: {name}', flush=True)
            try:
                results[name].append(job() if callable(job) else run_worker(job))
            except RuntimeError as e:
                print(f'    failed: {e}', flush=True)
                errors[f'{title}: {name}'] = str(e)
                results[name] = []
                jobs = {k: v for k, v in jobs.items() if k != name}
    return results


def data(vocab_size):
    """
    A dataset folder for both projects: the one asked for, or a million synthetic tokens, each followed by one of four
    others, so that there is something to learn.
    """
    if vocab_size not in folders:
        folders[vocab_size] = temporary / str(vocab_size)
        folders[vocab_size].mkdir()
        if dataset:
            for path in dataset_folder(dataset).glob('*.bin'):
                os.symlink(path, folders[vocab_size] / path.name)
        else:
            rng = np.random.default_rng(0)
            successors = rng.integers(vocab_size, size=(vocab_size, 4))
            choices = rng.choice(4, p=(0.6, 0.2, 0.1, 0.1), size=(1000, 1100))
            chains = [rng.integers(vocab_size, size=1100)] # side by side, one row a step
            for choice in choices[1:]:
                chains.append(successors[chains[-1], choice])
            for split, part in (('train', slice(0, 1000)), ('val', slice(1000, 1100))):
                np.stack(chains, axis=1)[part].astype('<u2').tofile(folders[vocab_size] / f'{split}.bin')
        with open(folders[vocab_size] / 'meta.pkl', 'wb') as f: # as nanoGPT has it, and this project reads it too
            pickle.dump(dict(vocab_size=vocab_size), f)
    return str(folders[vocab_size])

# ---------------------------------------------------------------------------------------------------------------------
# Jobs, tables and files

def model_of(default, **changes):
    """-> (GPTConfig, batch size) of the preset asked for, with what the command line changes."""
    args, batch = PRESETS[default if preset == 'auto' else preset]
    if dataset:
        size = load_meta(dataset_folder(dataset)).get('vocab_size', 0)
        if size > args['vocab_size']:
            args = args | dict(vocab_size=math.ceil(size / 64) * 64)
    args = args | changes | {k: v for k, v in given.items() if k in GPTConfig.__dataclass_fields__}
    return GPTConfig(**args), batch_size or batch


def job_of(kind, config, theirs=False, **more):
    """What a worker needs to know, with the choices that train.py and sample.py make where nothing was asked for."""
    on_cpu, asked = torch.device(device).type == 'cpu', more.pop('dtype', dtype)
    if on_cpu and (theirs or kind == 'sample' and asked == 'auto' and facts(config)[0] < 5e7): # nanoGPT has no autocast on a CPU
        asked = 'float32'
    compiled = (not on_cpu and kind != 'sample') if compile == 'auto' else compile
    return dict(kind=kind, config=vars(config), peer=peer if theirs else None, device=device, compile=compiled,
                dtype=resolve(device, asked)[1], data=data(config.vocab_size)) | more


def facts(config):
    """-> (parameters, FLOPs a token, bytes a token kept for the backward pass), without allocating the model."""
    with torch.device('meta'):
        model = GPT(config)
    return model.get_num_params(False), *model.cost(dtype=getattr(torch, resolve(device, dtype)[1]), device_type=torch.device(device).type)


def ceilings(dtype):
    if dtype not in known:
        known[dtype] = run_worker(dict(kind='ceilings', device=device, dtype=dtype))
    return known[dtype]


def too_large(config, batch):
    """Why this would not fit into memory, or None. A GPU's allocator says so itself; a CPU's would hang the machine."""
    info = Path('/proc/meminfo')
    if torch.device(device).type != 'cpu' or not info.exists():
        return None
    free = int(re.search(r'MemAvailable: +(\d+)', info.read_text())[1]) * 1024
    params, _, kept = facts(config)
    need = 16 * params + 1.25 * kept * batch * config.block_size # weights, gradients, Adam; activations and theirs
    return f'skipped: about {need / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB free' if need > free else None


def med(runs, key, unit=1.0):
    """The median of the rounds, or None if there is none."""
    values = [run[key] / unit for run in runs if run.get(key) is not None]
    return median(values) if values else None


def over(a, b, key='step'):
    """Ratio a/b of the rounds -> (median, lowest, highest), or None."""
    ratios = [x[key] / y[key] for x, y in zip(a, b) if x.get(key) and y.get(key)]
    return (median(ratios), min(ratios), max(ratios)) if ratios else None


def divide(a, b):
    """a / b, or None where one of them is not known."""
    return a / b if a and b else None


def cell(value):
    if value is None:
        return '-'
    if isinstance(value, (tuple, list)):
        return f'{value[0]:.3g}x ({value[1]:.3g}-{value[2]:.3g})'
    if isinstance(value, float):
        return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'
    return str(value)


def show(title, rows):
    """Prints rows (dicts; 'raw' is for the file only) as a table, and writes the file with all there is so far."""
    records[title] = rows
    columns = list(dict.fromkeys(k for row in rows for k in row if k != 'raw'))
    table = [columns] + [[cell(row.get(c)) for c in columns] for row in rows]
    sizes = [max(map(len, column)) for column in zip(*table)]
    print(f'\n{title}')
    for line in table:
        first, *rest = zip(line, sizes)
        print('  '.join([first[0].ljust(first[1])] + [text.rjust(n) for text, n in rest]).rstrip())
    print(flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(about=about, ceilings=known, errors=errors, tables=records), indent=1)
    path.with_name(path.name + '.tmp').write_text(text, encoding='utf-8')
    os.replace(path.with_name(path.name + '.tmp'), path)


def picture(panels):
    """Curves beside the JSON file; panels: (title, x label, y label, {name: [(x, y), ...]})."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    figure = Figure(figsize=(5 * len(panels), 4.5))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for ax, (title, x, y, curves) in zip(axes[0], panels):
        for name, points in curves.items():
            points = [p for p in points if p[1]]
            if points:
                ax.loglog(*zip(*points), marker='.', label=name)
        ax.set(title=title, xlabel=x, ylabel=y)
        middle = math.prod(ax.get_ylim()) ** 0.5
        ax.set_ylim(min(ax.get_ylim()[0], middle / 4), max(ax.get_ylim()[1], middle * 4)) # what is flat looks flat
        marks = sorted({p[0] for points in curves.values() for p in points if p[1]})
        if len(marks) <= 8:
            ax.set_xticks(marks, [f'{mark:.2g}' if mark < 100 or mark >= 1e5 else f'{mark:.0f}' for mark in marks])
        ax.xaxis.set_minor_formatter('')
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.yaxis.set_minor_formatter('')
        ax.grid(alpha=0.3, which='both')
        ax.legend(fontsize=7) if len(curves) > 1 else None
    figure.tight_layout()
    figure.savefig(path.with_suffix('.png'), dpi=100)


def commit(folder):
    """A checkout's commit, with a + if files differ from it; None outside of git."""
    try:
        git = lambda *args: subprocess.run(['git', '-C', folder, *args], capture_output=True, text=True,
                                           check=True).stdout.strip()
        return git('rev-parse', 'HEAD') + '+' * bool(git('status', '--porcelain'))
    except (OSError, subprocess.CalledProcessError):
        return None


def about_machine():
    info = Path('/proc/cpuinfo')
    cpu = re.search(r'model name\s*: (.*)', info.read_text()) if info.exists() else None
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') if hasattr(os, 'sysconf') else None
    cuda = torch.cuda.is_available()
    return dict(
        command=' '.join([Path(sys.executable).name, *sys.argv]), commit=commit(PROJECT),
        peer_commit=peer and commit(peer), system=platform.platform(),
        date=datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
        cpu=cpu[1] if cpu else platform.processor(), cores=os.cpu_count(), threads=torch.get_num_threads(),
        memory=memory, gpu=torch.cuda.get_device_name() if cuda else None,
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if cuda else None,
        python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)

# ---------------------------------------------------------------------------------------------------------------------
# Commands

def train(title='train', default='baby', with_peer=True, **changes):
    """-> {what: ratio to the peer, or our MFU}"""
    config, batch = model_of(default, **changes)
    more = dict(batch_size=batch, steps=steps)
    jobs = {'ours': job_of('train', config, **more)}
    if compile == 'auto' and torch.device(device).type == 'cuda' and (default if preset == 'auto' else preset) == 'baby': # so small that launching kernels takes longest
        mine = {f'ours, {c}': job_of('train', config, **more) | dict(compile=c) for c in (True, 'reduce-overhead')}
        tried = in_turn(f'{title}, our best', mine, 1)
        jobs['ours'] = mine[min(mine, key=lambda name: med(tried[name], 'step') or math.inf)]
    if peer and with_peer:
        choices = (False, True) if peer_compile == 'auto' else (peer_compile,)
        theirs = {f"peer, {'compiled' if c else 'eager'}": job_of('train', config, True, **more, compile=c)
                  for c in choices}
        tried = in_turn(f"{title}, the peer's best", theirs, 1) if len(theirs) > 1 else dict.fromkeys(theirs, [])
        jobs['peer'] = theirs[min(theirs, key=lambda name: med(tried[name], 'step') or math.inf)]
    runs, rows = in_turn(title, jobs), []
    params, flops, _ = facts(config)
    for name, job in jobs.items():
        r, speed = runs[name], divide(batch * config.block_size, med(runs[name], 'step'))
        rows.append({
            'who': name, 'how': f"{job['dtype']}, {('compiled' if job['compile'] is True else job['compile']) if job['compile'] else 'eager'}", 'tokens/s': speed,
            'MFU': speed and divide(speed * flops, ceilings(job['dtype'])['flops']), 'GB': med(r, 'memory', 1e9),
            'ms/step': med(r, 'step', 1e-3),
            **{f'{part} ms': med(r, part, 1e-3) for part in ('data', 'forward', 'backward', 'optimizer')}, 'raw': r})
    figures = dict(mfu=rows[0]['MFU'])
    if peer and with_peer:
        figures |= dict(speed=over(runs['peer'], runs['ours']), memory=over(runs['ours'], runs['peer'], 'memory'))
        rows.append({'who': 'ours/peer', 'tokens/s': figures['speed'], 'GB': figures['memory']})
    title = f'{title}: {params / 1e6:.4g}M parameters, batch {batch} x {config.block_size}, dropout {config.dropout}'
    show(title, rows)
    return figures


def sample(title='sample', default='gpt2', shapes=None, dtypes=(None,), n=None):
    """shapes: (batch, context) -> {index in shapes: the row of the dtype that decodes fastest}"""
    config, _ = model_of(default)
    n = max(2, min(n or new_tokens, config.block_size - 1)) # the window never restarts, which would count as decoding
    shapes = [(b, min(c, config.block_size - n)) for b, c in shapes or itertools.product(batches, contexts)]
    more = dict(shapes=shapes, new_tokens=n, seconds=seconds)
    jobs = {}
    for name in dtypes:
        job = job_of('sample', config, dtype=name or dtype, **more)
        jobs[f"ours, {job['dtype']}"] = job
    if peer:
        jobs['peer'] = job_of('sample', config, True, **more, compile=False)
    runs, rows, figures = in_turn(title, jobs), [], {}
    params = facts(config)[0]
    for i, (batch, context) in enumerate(shapes):
        with torch.device('meta'):
            flops = GPT(config).cost(context)[0] / 3 - 2 * config.n_embd * config.vocab_size # forward, without logits
        for name, job in jobs.items():
            r, limits = [run['shapes'][i] for run in runs[name]], ceilings(job['dtype'])
            theirs = [run['shapes'][i] for run in runs['peer']] if peer else []
            width = 4 if job['peer'] else getattr(torch, job['dtype']).itemsize # autocast keeps float32 weights
            prefill, decode = divide(batch * context, med(r, 'prefill')), divide(batch, med(r, 'decode'))
            row = {'batch': batch, 'context': context, 'who': name, 'decode tokens/s': decode,
                   'of bandwidth': divide(decode, batch * limits['bandwidth'] / (params * width))}
            if context > 1: # a prompt of one token is decoding
                row |= {'prefill tokens/s': prefill, 'of matmul peak': divide(prefill, divide(limits['flops'], flops))}
            if peer and not job['peer']:
                row['decode, ours/peer'] = over(theirs, r, 'decode')
                row |= {'prefill, ours/peer': over(theirs, r, 'prefill')} if context > 1 else {}
            rows.append(row | {'raw': r})
            if not job['peer'] and decode and decode > figures.get(i, {'decode tokens/s': 0})['decode tokens/s']:
                figures[i] = row
    bandwidth = ceilings(next(iter(jobs.values()))['dtype'])['bandwidth'] / 1e9
    show(f'{title}: {params / 1e6:.4g}M parameters, memory read at {bandwidth:.3g} GB/s', rows)
    return figures


def mixer_variants(config):
    a = max(1, config.n_layer // 6) # the UNet has as many blocks as the flat stack
    every = {name: dict(mixer=name) for name in MIXERS} | {
        'time-weighting circulant': dict(time_weighting='circulant'),
        'time-weighting full': dict(time_weighting='full'), 'time-mixing': dict(time_mixing=0.5),
        'rope': dict(pos_emb='rope'), 'relative': dict(pos_emb='relative'),
        'unet': dict(unet_layers=(a, a), n_layer=max(1, config.n_layer - 4 * a))}
    for name in variants:
        if name not in every:
            raise ValueError(f"variants={name!r} is not one of {', '.join(every)}")
    return {name: changes for name, changes in every.items() if not variants or name in ('attention', *variants)}


def equalized(config, target):
    """config with n_layer, then mlp_ratio set so that it has about `target` parameters."""
    def count(**changes):
        with torch.device('meta'):
            return sum(p.numel() for p in GPT(replace(config, **changes)).parameters())
    one, two = count(n_layer=1), count(n_layer=2)
    config = replace(config, n_layer=max(1, round(1 + (target - one) / (two - one))))
    C, a = config.n_embd, count()
    per_ratio = (count(mlp_ratio=config.mlp_ratio + 4) - a) / 4
    hidden = max(1, round((config.mlp_ratio + (target - a) / per_ratio) * C / 64)) * 64 # multiples of 64 are fast
    return replace(config, mlp_ratio=(hidden + 0.01) / C) if abs(target - a) > 0.01 * target else config


def mixers(title='mixers', default='baby', chosen=None, equal=None, curves=True):
    """-> {variant: training speed as a ratio to attention's}"""
    base, batch = model_of(default)
    configs = {}
    for name, changes in (chosen or mixer_variants(base)).items():
        configs[name] = replace(base, **changes)
        if (equal_params if equal is None else equal) and changes:
            configs[name] = equalized(configs[name], facts(configs['attention'])[0])
    jobs, notes = {}, {}
    for name, config in configs.items():
        notes[name] = too_large(config, batch)
        if notes[name] is None:
            jobs[name] = job_of('train', config, batch_size=batch, steps=steps)
            half = config.block_size // 2
            jobs[f'{name}, decoding'] = job_of('sample', config, shapes=[(1, max(1, half))], seconds=seconds,
                                               new_tokens=max(2, min(new_tokens, half)))
    runs, rows, ratios = in_turn(title, jobs), [], {}
    for name, config in configs.items():
        r, decoding = runs.get(name, []), [run['shapes'][0] for run in runs.get(f'{name}, decoding', [])]
        params, flops, _ = facts(config)
        ratios[name] = over(runs.get('attention', []), r)
        rows.append({'mixer': name, 'n_layer': config.n_layer, 'mlp_ratio': config.mlp_ratio,
                     'M parameters': params / 1e6, 'MFLOP/token': flops / 1e6,
                     'train tokens/s': divide(batch * config.block_size, med(r, 'step')),
                     'to attention': ratios[name], 'decode tokens/s': divide(1, med(decoding, 'decode')),
                     'GB': med(r, 'memory', 1e9), 'note': notes[name] or errors.get(f'{title}: {name}', ''),
                     'raw': [r, decoding]})
    show(f'{title}: width {base.n_embd}, batch {batch} x {base.block_size}', rows)
    if curves and lengths:
        rows = sweep(title, {(name, T): (replace(config, block_size=T), max(1, max(lengths) // T))
                             for name, config in configs.items() for T in lengths}, 1, steps=2)
        lines = {name: [(row['value'], row['tokens/s']) for row in rows if row['what'] == name] for name in configs}
        show(f'{title}: cost against T, {max(lengths)} tokens a step', rows)
        picture([('training', 'T', 'tokens/s', lines)])
    return ratios


def sweep(title, cases, rounds=None, **more):
    """{(what, value): (config, batch)} -> rows of training speed and memory."""
    notes = {key: too_large(config, batch) for key, (config, batch) in cases.items()}
    name = lambda key: f'{key[0]} {key[1]}'
    runs = in_turn(title, {name(key): job_of('train', config, **dict(batch_size=batch, steps=steps) | more)
                           for key, (config, batch) in cases.items() if notes[key] is None}, rounds)
    rows = []
    for key, (config, batch) in cases.items():
        r, (params, flops, _) = runs.get(name(key), []), facts(config)
        rows.append({'what': key[0], 'value': key[1], 'batch': batch, 'M parameters': params / 1e6,
                     'MFLOP/token': flops / 1e6, 'tokens/s': divide(batch * config.block_size, med(r, 'step')),
                     'GB': med(r, 'memory', 1e9), 'note': notes[key] or errors.get(f'{title}: {name(key)}', ''),
                     'raw': r})
    return rows


def unet():
    """-> training speed of the published UNet, to the flat GPT's"""
    # its levels merge 32 tokens into one, so the 100 blocks inside see 32 of 1024
    deep = dict(unet_layers=(5, 2, 2, 2, 2), n_layer=100)
    return mixers('published UNet', 'gpt2', {'attention': {}, 'unet': deep}, False, curves=False)['unet']


def scale():
    base, batch = model_of('baby')
    tokens = batch * base.block_size
    cases = {('T', T): (replace(base, block_size=T), max(1, tokens // T)) for T in lengths}
    cases |= {('width', C): (replace(base, n_embd=C, n_head=max(1, C // 64)), batch) for C in widths}
    cases |= {('depth', n): (replace(base, n_layer=n), batch) for n in depths}
    rows = sweep('scale', cases)
    show('scale: training', rows)
    fetched = in_turn('scale, dataset size', {n: dict(kind='fetch', tokens=n) for n in sizes})
    show('scale: a batch of 12 x 1024 from a dataset', [
        {'tokens': n, 'open ms': med(r, 'open', 1e-3), 'batch ms': med(r, 'fetch', 1e-3),
         'process GB': med(r, 'memory', 1e9), 'raw': r} for n, r in fetched.items()])
    ranked = in_turn('scale, ranks', {n: lambda n=n: run_ranks(n, base, batch) for n in ranks})
    show('scale: processes (gloo) on one CPU, same batch',
         [{'ranks': n, 'tokens/s': med(r, 'speed'), 'raw': r} for n, r in ranked.items()])
    curve = lambda what, x='value': {'': [(row[x], row['tokens/s']) for row in rows if row['what'] == what]}
    picture([('sequence length', 'T', 'tokens/s', curve('T')),
             ('width', 'parameters, M', 'tokens/s', curve('width', 'M parameters')),
             ('depth', 'parameters, M', 'tokens/s', curve('depth', 'M parameters')),
             ('dataset', 'tokens', 'ms a batch', {'': [(n, med(r, 'fetch', 1e-3)) for n, r in fetched.items()]}),
             ('processes', 'ranks', 'tokens/s', {'': [(n, med(r, 'speed')) for n, r in ranked.items()]})])


def small_run(until_first_step):
    """-> (our seconds, ratio to the peer)"""
    title, key = ('startup: seconds from the command to the first step', 'first_step') if until_first_step else \
        ('process: seconds of the whole small CPU run', 'seconds')
    sides = {'ours': PROJECT} | ({'peer': Path(peer)} if peer else {})
    runs = in_turn(title, {name: lambda folder=folder: run_script(folder, until_first_step)
                           for name, folder in sides.items()})
    rows = [{'who': name, 'seconds': med(r, key), 'fastest': min((x[key] for x in r), default=None),
             'slowest': max((x[key] for x in r), default=None), 'val loss': med(r, 'val_loss'), 'raw': r}
            for name, r in runs.items()]
    ratio = over(runs.get('peer', []), runs['ours'], key)
    show(title, rows + [{'who': 'peer/ours', 'seconds': ratio}] * bool(peer))
    return rows[0]['seconds'], ratio


def recipe_flags():
    """What the command line changes in a speed run; and its data, which are real ones."""
    global dataset
    dataset = dataset or 'shakespeare_char'
    flags = {k: v for k, v in given.items() if k in GPTConfig.__dataclass_fields__ and k != 'vocab_size' or k == 'batch_size'}
    if iterations != 2000: # a trial of this command
        flags |= dict(max_iters=iterations, lr_decay_iters=iterations, eval_interval=iterations, warmup_iters=1, log_interval=1)
    return flags | dict(dataset=data(model_of('readme')[0].vocab_size))


def recipe_job(flags, seed):
    return lambda: run_recipe(PROJECT, [f'config/speedrun_{recipe_of}.py', f'--seed={seed}', *(f'--{k}={v}' for k, v in flags.items())])


def spread(values):
    return f'{sum(values) / len(values):.4f} ({min(values):.4f}-{max(values):.4f})' if values else '-'


def recipe():
    """-> (ratio of the seconds, the losses of all seeds)"""
    if recipe_of not in RECIPES:
        raise ValueError(f"recipe_of={recipe_of!r} is not one of {', '.join(RECIPES)}")
    target, default, peer_iters = RECIPES[recipe_of]
    jobs, short = {}, recipe_of != 'shakespeare_cpu'
    flags, peer_iters = recipe_flags(), iterations if iterations != 2000 else peer_iters
    runs, title = {'ours': [], 'peer': []}, f'recipe, {recipe_of}'
    for seed in seeds: # in turn
        jobs = {f'ours, seed {seed}': recipe_job(flags, seed)}
        if peer and not short:
            words = SMALL_RUN | {k: v for k, v in flags.items() if k in _NANOGPT_FIELDS + ('batch_size', 'dataset')} | dict(
                max_iters=peer_iters, lr_decay_iters=peer_iters, warmup_iters=min(100, peer_iters // 2))
            jobs['peer'] = lambda words=words: run_recipe(peer, ['config/train_shakespeare_char.py', *(f'--{k}={v}' for k, v in words.items())])
        elif peer:
            config, batch = model_of(default, dropout=0.2)
            on_cpu = torch.device(device).type == 'cpu'
            job = job_of('train', config, True, batch_size=batch, steps=peer_steps, compile=not on_cpu if peer_compile == 'auto' else peer_compile)
            jobs['peer'] = lambda job=job: dict(seconds=run_worker(job)['step'] * peer_iters)
        for name, result in in_turn(title, jobs, 1).items():
            runs['ours' if name.startswith('ours') else 'peer'] += result
    ratio, losses = over(runs['peer'], runs['ours'], 'seconds'), [run['val_loss'] for run in runs['ours']]
    rows = [{'who': who, 'seconds': med(r, 'seconds'), 'fastest': min((x['seconds'] for x in r), default=None),
             'slowest': max((x['seconds'] for x in r), default=None),
             'val loss': spread([x['val_loss'] for x in r if x.get('val_loss')]),
             'note': f'step time x {peer_iters}' if who == 'peer' and short else '', 'raw': r} for who, r in runs.items() if r]
    show(f'{title}: seconds to {target}, without evaluations; seeds {seeds}', rows + [{'who': 'peer/ours', 'seconds': ratio}] * bool(peer))
    return ratio, losses


def ablations():
    title, rows = f'ablations, {recipe_of}', []
    flags = recipe_flags()
    chosen = {name: changes for name, changes in ABLATIONS.items() if not variants or name in variants}
    runs = {name: in_turn(f'{title}: {name}', {seed: recipe_job(changes | flags, seed) for seed in seeds}, 1) for name, changes in chosen.items()}
    for name, by_seed in runs.items():
        results = [r[0] for r in by_seed.values() if r]
        losses = [r['val_loss'] for r in results]
        rows.append({'what': name, 'val loss': spread(losses), 'seconds': med(results, 'seconds'), 'raw': results})
    show(f'{title}: seeds {seeds}, mean (lowest-highest)', rows)


def profile():
    config, batch = model_of('baby')
    jobs = {'ours': job_of('profile', config, batch_size=batch, steps=steps, compile=False)}
    if peer:
        jobs['peer'] = job_of('profile', config, True, batch_size=batch, steps=steps, compile=False)
    for name, r in in_turn('profile', jobs, 1).items():
        if r:
            rows = [{'operator': op, 'ms/step': ms, 'share': ms / r[0]['all']} for op, ms in r[0]['operators'].items()]
            show(f"profile of {name}, eager, {jobs[name]['dtype']}, batch {batch} x {config.block_size}, dropout {config.dropout}", rows)


def head():
    config, batch = model_of('gpt2')
    batch = batch_size or (1 if torch.device(device).type == 'cpu' else batch)
    ways = ['chunks', 'logits'] + ['torch'] * hasattr(torch.nn, 'LinearCrossEntropyOptions')
    runs = in_turn('head', {way: job_of('head', config, batch_size=batch, steps=steps, way=way) for way in ways})
    rows = [{'way': way, 'ms': med(r, 'step', 1e-3), 'GB above the start': med([dict(m=x['memory'] - x['memory_before']) for x in r if x['memory']], 'm', 1e9),
             'to chunks': over(r, runs['chunks']) if way != 'chunks' else None, 'raw': r} for way, r in runs.items()]
    show(f'head: {batch * config.block_size} tokens of {config.n_embd} channels, vocabulary {config.vocab_size}', rows)


LEARNING_RATES = dict(adamw=(1e-3, 3e-3, 1e-2, 3e-2), muon=(3e-3, 1e-2, 3e-2), sm3=(0.03, 0.1, 0.3, 1.0))


def optimizers():
    """Learning rates around each optimizer's best, on MLP-Mixer of the size of nanoGPT's small CPU run."""
    choices = [(name, lr) for name, rates in LEARNING_RATES.items() for lr in rates]
    flags, steps_taken = recipe_flags(), iterations if iterations != 2000 else 1000
    flags |= dict(max_iters=steps_taken, lr_decay_iters=steps_taken, eval_interval=max(1, steps_taken // 4))
    config, rows, curves = model_of('readme')[0], [], {}
    model = GPT(replace(config, mixer='mlp_mixer'))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for name, lr in choices:
        args = ['config/shakespeare_small.py', 'config/mixers/mlp_mixer.py', '--warmup_iters=20' if steps_taken > 20 else '--warmup_iters=1',
                f'--optimizer={name}', f'--learning_rate={lr}', f'--min_lr={lr / 10}', *(f'--{k}={v}' for k, v in flags.items())]
        r = in_turn('optimizers', {f'{name} {lr}': lambda args=args: run_recipe(PROJECT, args)}, 1)[f'{name} {lr}']
        optimizer = model.configure_optimizers(0.1, lr, (0.9, 0.99), 'cpu', name)
        optimizer.step()
        size = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        curves[f'{name} {lr}'] = r[0]['curve'] if r else []
        rows.append({'optimizer': name, 'learning rate': lr, 'val loss': med(r, 'val_loss'), 'state, bytes a parameter': size / model.get_num_params(False),
                     'highest loss after a tenth': max((x for i, x in r[0]['curve'] if i > steps_taken / 10), default=None) if r else None, 'raw': r})
    show(f'optimizers: MLP-Mixer, {steps_taken} steps', rows)
    picture([('MLP-Mixer', 'step', 'training loss', curves)])


def run_arithmetic(prepare, flags, seed):
    """Prepares the calc dataset, trains, evaluates -> {operator or all: share of held-out problems that are solved}"""
    with tempfile.TemporaryDirectory() as folder:
        for script, words in (
                ('data/calc/prepare.py', dict(out=f'{folder}/calc') | prepare),
                ('train.py', dict(dataset=f'{folder}/calc', out_dir=f'{folder}/run', seed=seed, max_iters=iterations, lr_decay_iters=iterations,
                                  warmup_iters=min(100, iterations // 2), eval_interval=iterations, eval_iters=1) | flags),
                ('data/calc/evaluate.py', dict(dataset=f'{folder}/calc', out_dir=f'{folder}/run', max_problems=problems))):
            command = [sys.executable, script, *['config/train_calc.py'] * (script == 'train.py'), *(f'--{k}={v}' for k, v in words.items())]
            done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, errors='replace')
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ['it said nothing'])[-1])
    return {operator: float(share) / 100 for operator, share in re.findall(r'^(\S+) .* ([\d.]+)% of \d+$', done.stdout, re.MULTILINE)}


def arithmetic():
    rows, flags = [], {k: v for k, v in given.items() if k in GPTConfig.__dataclass_fields__ and k != 'vocab_size'}
    for name, (prepare, changes) in ARITHMETIC.items():
        if not variants or name in variants:
            runs = in_turn(f'arithmetic: {name}', {seed: lambda seed=seed: run_arithmetic(prepare, changes | flags, seed) for seed in seeds}, 1)
            results = [r[0] for r in runs.values() if r]
            rows.append({'what': name} | {operator: med(results, operator) for operator in '+-*/'} | {'raw': results})
            show(f'arithmetic: share of held-out problems solved after {iterations} steps, median of seeds {seeds}', rows)


def loops(tokens, longest=100):
    """Does this list end by saying the same again, three times in a row or more, in up to `longest` tokens?"""
    return any(tokens[-p:] * 3 == tokens[-3 * p:] for p in range(1, longest + 1) if 3 * p <= len(tokens))


def repetition():
    """What each way to control repetition does to greedy text and, beside it, to drawn text."""
    model, checkpoint = GPT.load(Path(run) / 'best.pt' if (Path(run) / 'best.pt').exists() else Path(run) / 'ckpt.pt', device)
    folder = dataset_folder(checkpoint['config']['dataset'])
    x = next(iter(Split(folder, 'val').fixed_batches(1, prompts, model.config.block_size)))[0]
    idx = torch.from_numpy(x[:, :32]).to(device)
    ways = {'greedy': dict(temperature=0.0)}
    ways |= {f'greedy, {text}': dict(temperature=0.0) | options for text, options in {
        'repetition_penalty 1.1': dict(repetition_penalty=1.1), 'repetition_penalty 1.3': dict(repetition_penalty=1.3),
        'repetition_penalty 1.3, window 16': dict(repetition_penalty=1.3, repetition_window=16),
        'no_repeat_ngram 4': dict(no_repeat_ngram=4), 'no_repeat_ngram 8': dict(no_repeat_ngram=8),
        'no_repeat_ngram 12': dict(no_repeat_ngram=12)}.items()}
    ways |= {'4 beams': dict(beams=4), '4 beams, no_repeat_ngram 8': dict(beams=4, no_repeat_ngram=8),
             'temperature 0.8': dict(temperature=0.8), 'temperature 0.8, top_k 10': dict(temperature=0.8, top_k=10),
             'temperature 0.8, top_p 0.9': dict(temperature=0.8, top_p=0.9), 'temperature 0.8, min_p 0.1': dict(temperature=0.8, min_p=0.1),
             'temperature 0.4': dict(temperature=0.4)}
    rows = []
    for name, options in ways.items():
        print(f'... repetition: {name}', flush=True)
        options = dict(options)
        if options.pop('beams', None):
            out = torch.cat([model.beam_search(row[None], length, 4, **options) for row in idx])
        else:
            out = model.generate(idx, length, generator=torch.Generator(device).manual_seed(1), **options)
        texts = out[:, idx.size(1):].tolist()
        grams = [[tuple(t[i:i + 8]) for i in range(len(t) - 7)] for t in texts]
        T = model.config.block_size
        with torch.no_grad(): # of each token in windows of block_size, as the model sees text in training
            nats = [model(w[:, :-1].contiguous(), w[:, 1:].contiguous())[1].item() for w in out.unfold(1, T + 1, T).unbind(1)]
        rows.append({'way': name, 'end in a loop': sum(map(loops, texts)) / len(texts),
                     'distinct 8-grams': sum(len(set(g)) for g in grams) / sum(map(len, grams)), 'nats a token': sum(nats) / len(nats)})
    show(f'repetition: {len(idx)} texts of {length} tokens by {Path(run).name}', rows)


def loss():
    """-> {dtype: difference of the validation loss to the peer's}"""
    on_cpu = torch.device(device).type == 'cpu'
    config, batch = model_of('readme' if on_cpu else 'baby')
    config = replace(config, dropout=0.0) # the masks that two models draw are not the same
    more, jobs = dict(batch_size=batch, steps=loss_steps, init=peer), {}
    for name in ('float32', 'bfloat16'):
        if peer and not (on_cpu and jobs):
            jobs[f'peer, {name}'] = job_of('loss', config, True, dtype=name, **more | dict(init=None))
        jobs[f'ours, {name}'] = job_of('loss', config, dtype=name, **more)
    runs, rows, differences = in_turn('loss', jobs, 1), [], {}
    recent = lambda losses: [sum(losses[max(0, i - 20):i]) / min(i, 20) for i in range(1, len(losses) + 1)]
    for name, r in runs.items():
        dtype = name.split(', ')[1]
        other = runs.get(f'peer, {dtype}', next(iter(runs.values()))) # on a CPU the peer has float32 only
        row = {'who': name, 'train loss': recent(r[0]['losses'])[-1] if r else None, 'val loss': med(r, 'val_loss'),
               'raw': r}
        if r and other and r is not other:
            row['val difference'] = r[0]['val_loss'] - other[0]['val_loss']
            row['train, largest'] = max(abs(a - b) for a, b in zip(*(recent(x[0]['losses']) for x in (r, other))))
            differences[dtype] = abs(row['val difference'])
        rows.append(row)
    show(f'loss after {loss_steps} steps, batch {batch} x {config.block_size}; train loss: mean of 20 steps', rows)
    return differences


def everything():
    """Each goal, what it asks for and what was measured."""
    rows = []
    def goal(figure, wanted, value):
        measured = value[0] if isinstance(value, tuple) else value
        sign, _, limit = wanted.partition(' ')
        met = 'yes' if measured is not None and limit and (measured >= float(limit)) == (sign == '>=') else 'no'
        met = met if measured is not None and limit else 'unmeasured' if limit else '-'
        rows.append({'goal': figure, 'wanted': wanted, 'measured': value, 'met': met})

    if goals == 'cpu' or goals == 'auto' and torch.device(device).type == 'cpu':
        for dropout, wanted in ((0.0, '>= 2.5'), (0.2, '>= 2')):
            goal(f'baby GPT, dropout {dropout}: training speed, ours/peer', wanted,
                 train(f'train, baby GPT, dropout {dropout}', 'baby', dropout=dropout).get('speed'))
        train('train, README run', 'readme')
        train('train, baby GPT, recompute', 'baby', False, recompute=True)
        gpt2 = sample('sample, GPT-2 124M', 'gpt2', [(1, 1), (1, 900), (32, 1), (32, 900)], ('float32', 'bfloat16'))
        long = gpt2.get(1, {})
        goal('GPT-2 124M, 900 tokens of context: decoding, ours/peer', '>= 25', long.get('decode, ours/peer'))
        goal('the same as a share of the bandwidth limit', '', long.get('of bandwidth'))
        goal('GPT-2 124M, prefill as a share of the matmul peak', '>= 0.3', long.get('of matmul peak'))
        baby = sample('sample, baby GPT', 'baby', [(1, 1)], n=255)
        goal('baby GPT, 256 tokens: decoding, ours/peer', '>= 6', baby.get(0, {}).get('decode, ours/peer'))
        mixers(default='baby')
        goal("README's small run: whole process, peer/ours", '>= 2', small_run(False)[1])
    else:
        for name, default in (('GPT-2 124M', 'gpt2'), ('GPT-2 350M', 'gpt2-medium')):
            measured = train(f'train, {name}', default)
            goal(f'{name}: MFU', '>= 0.5', measured['mfu'])
            goal(f'{name}: training speed, ours/peer', '>= 1.3', measured.get('speed'))
            goal(f'{name}: peak memory, ours/peer', '<= 0.6', measured.get('memory'))
        for name, default in (('GPT-2 124M', 'gpt2'), ('GPT-2 350M', 'gpt2-medium')):
            train(f'train, {name}, recompute', default, False, recompute=True)
        goal('baby GPT: training speed, ours/peer', '>= 2', train('train, baby GPT', 'baby', dropout=0.2).get('speed'))
        for name, ratio in mixers('mixers, equal parameters', 'gpt2', equal=True).items():
            if name != 'attention':
                goal(f'{name}: training speed to attention', '>= 0.6' if 'weighting' in name else '>= 0.8', ratio)
        ratio = unet()
        goal('published UNet: step time to the flat GPT', '<= 1.25', ratio and 1 / ratio[0])
        gpt2 = sample('sample, GPT-2 124M', 'gpt2', [(1, 1), (1, 900), (64, 1), (64, 900)])
        one, many = (gpt2.get(i, {}).get('decode tokens/s') for i in (0, 2))
        goal('GPT-2 124M, batch 1: decoded tokens/s', '>= 1000', one)
        goal('GPT-2 124M, batch 64: decoded tokens/s, to batch 1', '>= 20', divide(many, one))
        mixers('mixers', 'gpt2')
    head()
    for name, difference in loss().items():
        goal(f'{name}: validation loss after {loss_steps} steps, difference to the peer', '<= 0.01', difference)
    goal('seconds to the first step, small CPU run', '<= 5', small_run(True)[0])
    scale()
    show('goals', rows)


COMMANDS = dict(train=train, sample=sample, mixers=mixers, unet=unet, scale=scale, recipe=recipe, ablations=ablations, optimizers=optimizers, arithmetic=arithmetic, repetition=repetition, profile=profile, head=head, startup=lambda: small_run(True),
                process=lambda: small_run(False), loss=loss, all=everything)


def main(argv):
    global given, device, temporary, path, about
    if argv[:1] == ['worker']:
        result = WORK[json.loads(argv[1])['kind']](json.loads(argv[1]))
        Path(argv[2]).write_text(json.dumps(result), encoding='utf-8')
        return
    command, *flags = argv or ['']
    if command not in COMMANDS and not {'-h', '--help'} & set(argv):
        fail(f"the first argument must be a command, not {command!r}: {', '.join(COMMANDS)}; --help explains them")
    given = configure(globals(), GPTConfig, flags if command in COMMANDS else argv)[1]
    with exit_on_error(), tempfile.TemporaryDirectory() as folder:
        device, temporary = resolve(device, 'float32')[0], Path(folder)
        if peer and not (Path(peer) / 'model.py').is_file():
            raise ValueError(f'peer={peer!r} has no model.py: give the folder of a checkout of nanoGPT')
        path = Path(out) if out else PROJECT / 'tests' / 'results' / f'{command}-{torch.device(device).type}.json'
        about = about_machine()
        COMMANDS[command]()
        print(f'raw numbers: {path}')
    if any('OutOfMemory' not in error for error in errors.values()):
        sys.exit(1)


if __name__ == '__main__':
    main(sys.argv[1:])
