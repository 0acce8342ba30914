"""
Measures the speed and memory of this project, and of a peer: a checkout of nanoGPT.

    python tests/bench.py train --preset=baby --peer=PATH   tokens/s, MFU, peak memory, where a step's time goes
    python tests/bench.py sample --peer=PATH                tokens/s of the prompt and of decoding, short and long
    python tests/bench.py mixers                            every token mixer and a UNet, and their cost as T grows
    python tests/bench.py unet                              the published UNet, 100 blocks inside, beside a flat GPT
    python tests/bench.py scale                             cost against T, width, depth and the dataset's size
    python tests/bench.py startup --peer=PATH               seconds from the command to the end of the first step
    python tests/bench.py process --peer=PATH               nanoGPT's small CPU run, from start to end
    python tests/bench.py profile --peer=PATH               the operators that a training step's time goes to
    python tests/bench.py head                              the head's loss: in chunks, by torch, with all logits
    python tests/bench.py loss --peer=PATH                  losses from the same weights on the same batches
    python tests/bench.py all --device=cuda --peer=PATH     all of it, and each goal beside what was measured

Every measurement is a fresh process. This project and the peer run in turn: A B A B. Tables show medians over the
rounds; a ratio is taken within each round, and its lowest and highest stand in brackets. The raw numbers go to
tests/results/COMMAND-DEVICE.json. GPTConfig's fields change the model of any command: --n_layer=2. Memory on a CPU is
the whole process's. What ideas are worth, not speed, is measured by tests/studies.py.
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
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from configurator import configure, exit_on_error, fail, find_peak_flops, resolve
from data.checkpoints import load_weights
from data.run import git_commit, peak_memory
from data.tokens import Split, dataset_folder, load_meta, prefetch
from model import GPT, GPTConfig, LinearCrossEntropy, MIXERS, cost, keep_freed_memory, recompute_what_is_cheap

# ---------------------------------------------------------------------------------------------------------------------
# what is measured
preset: Literal['auto', 'readme', 'baby', 'gpt2', 'gpt2-medium'] = 'auto' # auto: what suits the command
peer: str | None = None # a checkout of nanoGPT, measured in turn with this project
peer_compile = True # the peer's torch.compile in training, as it has it; False is faster for some models
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto' # auto: what train.py and sample.py choose
compile: bool | Literal['auto', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'] = 'auto' # auto: too
batch_size = 0 # sequences in a micro-batch; 0: the preset's
gradient_accumulation_steps = 1 # micro-batches in a training step
dataset = '' # a folder in data/, or any folder given with a slash; '': synthetic tokens
repeats = 5 # rounds
steps = 5 # timings in a round of training; on a GPU each is the mean of 10 steps
iterations = 0 # training steps of process and loss; 0: 2000 and 500
out = '' # the JSON file; '': tests/results/COMMAND-DEVICE.json
# sample
batches = (1, 32) # sequences at once
contexts = (1, 900) # tokens of the prompt
new_tokens = 64 # generated after each prompt
# mixers and scale
variants: tuple[str, ...] = () # mixers by their names in the table; (): all
equal_params = False # mixers with as many parameters as attention, by n_layer and mlp_ratio, not of equal width
lengths = (256, 512, 1024, 2048, 4096, 8192) # T
# ---------------------------------------------------------------------------------------------------------------------

PRESETS = { # fields of GPTConfig, and the batch size
    'readme': (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False), 12),
    'baby': (dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False), 64),
    'gpt2': (dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, bias=False), 12),
    'gpt2-medium': (dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024, vocab_size=50304, bias=False), 12),
}
NANOGPT_FIELDS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'dropout', 'bias')
# the flags of nanoGPT's README for a CPU, which both projects take
SMALL_RUN = dict(device='cpu', compile=False, eval_iters=20, log_interval=1, block_size=64, batch_size=12, n_layer=4,
                 n_head=4, n_embd=128, dropout=0.0)
WIDTHS, DEPTHS = (128, 256, 512, 1024), (2, 4, 8, 16) # of scale
SIZES = (10**6, 10**8, 10**10, 10**11) # tokens of a dataset
LONGEST = 10.0 # seconds after which a generation is cut short
report = dict(about={}, errors={}, tables={}) # what the JSON file holds
temporary = tempfile.TemporaryDirectory() # of the datasets

# ---------------------------------------------------------------------------------------------------------------------
# Inside a worker process: a job is a dict of plain values, and so is its result

def work(job):
    """Does a job with the choices that train.py makes."""
    job = SimpleNamespace(**job)
    job.device, job.dtype = resolve(job.device, 'float32' if job.peer and 'cpu' in job.device else job.dtype)
    job.on_gpu = torch.device(job.device).type == 'cuda'
    job.amp = nullcontext()
    if job.dtype != 'float32':
        job.amp = torch.autocast(torch.device(job.device).type, getattr(torch, job.dtype))
    if job.compile == 'auto':
        job.compile = job.on_gpu and can_compile(job.device)
    torch.set_float32_matmul_precision('high')
    if not job.on_gpu:
        keep_freed_memory()
    if job.on_gpu and job.compile and not job.peer:
        recompute_what_is_cheap()
    return WORK[job.kind](job)


def can_compile(device):
    try:
        return torch.compile(lambda x: x + 1)(torch.ones(1, device=device)).item() == 2
    except Exception: # no compiler, no triton, or too new a Python
        return False


def build(job, source):
    """The model that a job asks for, on its device. source: the peer's folder, or None."""
    torch.manual_seed(1337)
    if source is None:
        return GPT(GPTConfig(**job.config)).to(job.device)
    spec = importlib.util.spec_from_file_location('peer_model', Path(source) / 'model.py')
    sys.modules['peer_model'] = module = importlib.util.module_from_spec(spec) # dataclasses look it up there
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(**{name: job.config[name] for name in NANOGPT_FIELDS})).to(job.device)


def make_step(job):
    """-> (model, step): step(i, micro_batches, lr, mark) trains as train.py's i-th step, and returns the loss."""
    model = build(job, job.peer)
    if job.init: # the peer's weights
        load_weights(model, build(job, job.init).state_dict())
    kind = torch.device(job.device).type
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), kind)
    scaler = torch.amp.GradScaler(kind, enabled=job.dtype == 'float16')
    mode = job.compile if isinstance(job.compile, str) else None
    forward = torch.compile(model, dynamic=False, mode=mode) if job.compile else model
    model.train()

    def step(i, micro_batches, lr=1e-3, mark=lambda name: None):
        if not job.peer:
            torch.manual_seed((1337 * 1_000_003 + i) * 4096)
        for group in optimizer.param_groups:
            group['lr'] = lr * group.get('lr_scale', 1.0)
        loss_sum = 0.0
        for x, y in micro_batches:
            with job.amp:
                loss = forward(x, y)[1] / len(micro_batches)
            mark('forward')
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
            mark('backward')
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not job.peer and not scaler.is_enabled(): # train.py skips a step that is not finite
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        mark('optimizer')
        return loss_sum

    return model, step


def load_batches(job):
    """Yields the micro-batches of each step, fetched ahead by a thread as in train.py."""
    split, B, T = Split(job.data, 'train'), job.batch_size, job.config['block_size']

    def to_device(array):
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(job.device, non_blocking=True) if job.on_gpu else tensor.to(job.device)

    def load(i):
        first = i * job.accumulation
        return [[to_device(array) for array in split.batch(n * B, B, T)] for n in range(first, first + job.accumulation)]
    return prefetch(load, 0)


def wait():
    """Until the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(function):
    """How long a call takes."""
    wait()
    t0 = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - t0


def work_train(job):
    _, step = make_step(job)
    batches, numbers = load_batches(job), itertools.count()

    def take(n, mark=lambda name: None):
        for i in itertools.islice(numbers, n):
            micro_batches = next(batches)
            mark('data')
            step(i, micro_batches, mark=mark)

    at_once = 10 if job.on_gpu else 1 # train.py does not wait for the GPU in every step either
    take(max(2, at_once)) # compilation, first allocations, the optimizer's state
    if job.on_gpu:
        wait()
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(partial(take, at_once)) / at_once for _ in range(job.steps)]
    memory = peak_memory(job.device)

    parts, last = dict(data=0.0, forward=0.0, backward=0.0, optimizer=0.0), time.perf_counter()
    def mark(name): # waits for the device, so the parts are longer together than a step
        nonlocal last
        wait()
        now = time.perf_counter()
        parts[name] += (now - last) / job.steps
        last = now
    take(job.steps, mark)
    batches.close()

    with torch.device('meta'):
        model = GPT(GPTConfig(**job.config))
    flops = cost(model, dtype=getattr(torch, job.dtype), device_type=torch.device(job.device).type)[0]
    peak, _ = find_peak_flops('auto', job.device, getattr(torch, job.dtype))
    speed = job.accumulation * job.batch_size * job.config['block_size'] / median(times)
    how = f"{job.dtype}, {job.compile if isinstance(job.compile, str) else 'compiled' if job.compile else 'eager'}"
    return dict(how=how, step=median(times), times=times, memory=memory, speed=speed, parts=parts, flops=flops,
                mfu=speed * flops / peak if peak else None, parameters=model.get_num_params(False))


def generator(job):
    """-> stream(idx, n), which yields n new tokens as sample.py does; the peer's are those of its generate()."""
    model, options = build(job, job.peer).eval(), dict(temperature=0.8, top_k=200)
    if not job.peer:
        if job.choose_dtype and not job.on_gpu and model.get_num_params() < 5e7:
            job.dtype = 'float32' # as sample.py
        model.to(getattr(torch, job.dtype))
        if job.compile:
            model.hidden = torch.compile(model.hidden, dynamic=True)
        return partial(model.stream, **options)

    def stream(idx, n): # what generate(idx, n) does, one turn of its loop at a time
        for _ in range(n):
            with job.amp:
                idx = model.generate(idx, 1, **options)
            yield idx[:, -1:]
    return stream


def time_generation(stream, idx, n, on_gpu):
    """-> (tokens/s of the prompt, tokens/s of decoding)"""
    tokens = stream(idx, n)
    prompt = idx.numel() / seconds(lambda: next(tokens))
    if on_gpu:
        next(tokens) # captures a CUDA graph
    wait()
    start, count = time.perf_counter(), 0
    for _ in tokens:
        count += 1
        if time.perf_counter() - start > LONGEST:
            break
    wait()
    return prompt, idx.size(0) * count / (time.perf_counter() - start)


@torch.inference_mode()
def work_sample(job):
    """Tokens/s, and which share that is of what the machine can do, for each (batch, context)."""
    weights = torch.ones(2 ** 14, 2 ** 14, device=job.device) # a GiB, read as decoding reads weights
    bandwidth = weights.nbytes / min(seconds(lambda: weights @ weights[0]) for _ in range(5))
    del weights
    stream, results = generator(job), []
    peak, _ = find_peak_flops('auto', job.device, getattr(torch, job.dtype))
    config = GPTConfig(**job.config)
    with torch.device('meta'):
        model = GPT(config)
    width = 4 if job.peer else getattr(torch, job.dtype).itemsize # autocast keeps float32 weights
    for batch, context in job.shapes:
        idx = torch.randint(config.vocab_size, (batch, context), device=job.device)
        time_generation(stream, idx, job.new_tokens, job.on_gpu) # warms up
        prompt, decode = time_generation(stream, idx, job.new_tokens, job.on_gpu)
        flops = cost(model, context)[0] / 3 - 2 * config.n_embd * config.vocab_size # forward, without logits
        results.append(dict(batch=batch, context=context, how=job.dtype, prompt=prompt, decode=decode,
                            of_peak=prompt * flops / peak if peak else None,
                            of_bandwidth=decode / batch * width * model.get_num_params(False) / bandwidth))
    return results


def work_loss(job):
    """The losses of the first training steps, and at the end the one of the validation split."""
    model, step = make_step(job)
    batches = load_batches(job)
    losses = [step(i, next(batches), lr=1e-3 * min(1.0, (i + 1) / 100)) for i in range(job.steps)]
    batches.close()
    model.eval()
    val = []
    with torch.no_grad(), job.amp:
        for batch in Split(job.data, 'val').fixed_batches(20, job.batch_size, job.config['block_size']):
            val.append(model(*(torch.from_numpy(array).to(job.device) for array in batch))[1].item())
    return dict(how=job.dtype, losses=torch.stack(losses).tolist(), val_loss=sum(val) / len(val))


def work_fetch(job):
    """Seconds to open a dataset and to fetch a batch from it; its shards are holes that take no disk."""
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, job.tokens, 10 ** 8):
            with open(Path(folder) / f'train_{first // 10 ** 8:06d}.bin', 'wb') as f:
                f.truncate(2 * min(10 ** 8, job.tokens - first))
        splits = []
        opened = seconds(lambda: splits.append(Split(folder, 'train')))
        fetch = median(seconds(lambda: splits[0].batch(12 * i, 12, 1024)) for i in range(200))
    return dict(open=opened, fetch=fetch, memory=peak_memory('cpu'))


def work_profile(job):
    """Milliseconds a step of the ten operators that take longest, and their share of all."""
    _, step = make_step(job)
    batches = load_batches(job)
    for i in range(2):
        step(i, next(batches))
    with torch.profiler.profile() as profile:
        for i in range(job.steps):
            step(2 + i, next(batches))
        wait()
    batches.close()
    took = {}
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU: # a GPU's kernels are counted at their operators
            time_us = event.self_device_time_total if job.on_gpu else event.self_cpu_time_total
            took[event.key] = time_us / job.steps / 1e3
    total = sum(took.values())
    if not total:
        raise ValueError("torch's profiler saw no work on the GPU: this user may not read its counters")
    longest = sorted(took, key=took.get, reverse=True)[:10]
    return [{'operator': name, 'ms/step': took[name], 'share': took[name] / total} for name in longest]


def work_head(job):
    """Forward and backward of the head alone: x (N, C) to the mean cross-entropy."""
    C, V, N = job.config['n_embd'], job.config['vocab_size'], job.batch_size * job.config['block_size']
    x = torch.randn(N, C, device=job.device, requires_grad=True)
    weight = (torch.randn(V, C, device=job.device) * 0.02).requires_grad_()
    y = torch.randint(V, (N,), device=job.device)
    F = torch.nn.functional

    def loss(x, weight):
        if job.way == 'chunks':
            return LinearCrossEntropy.apply(x, weight, y, True)
        if job.way == 'torch':
            return F.linear_cross_entropy(x, weight, y, options=torch.nn.LinearCrossEntropyOptions())
        return F.cross_entropy(F.linear(x, weight), y)
    fast_loss = torch.compile(loss, dynamic=False) if job.compile else loss

    losses = []
    def step():
        with job.amp:
            losses.append(fast_loss(x, weight))
        losses[-1].backward()
        losses[-1] = losses[-1].item()
        x.grad = weight.grad = None

    before = peak_memory(job.device)
    step()
    times = [seconds(step) for _ in range(job.steps)]
    return dict(step=median(times), times=times, memory=peak_memory(job.device) - before, loss=losses[-1],
                how='compiled' if job.compile else 'eager')


WORK = dict(train=work_train, sample=work_sample, loss=work_loss, fetch=work_fetch, profile=work_profile,
            head=work_head)

# ---------------------------------------------------------------------------------------------------------------------
# Starting processes

def job_of(kind, config, batch, theirs=False, **more):
    """What a worker needs to know."""
    job = dict(kind=kind, config=vars(config), peer=peer if theirs else None, init=None, device=device, dtype=dtype,
               compile=peer_compile if theirs else compile, batch_size=batch, steps=steps,
               accumulation=gradient_accumulation_steps, data=data(config.vocab_size))
    return partial(run_worker, job | more)


def both(kind, config, batch, **more):
    """The same job for this project and, if there is one, for the peer."""
    jobs = {'ours': job_of(kind, config, batch, **more)}
    if peer:
        jobs['peer'] = job_of(kind, config, batch, True, **more)
    return jobs


def run_worker(job):
    """The result of a job, from a fresh process. RuntimeError if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / 'result.json' # not stdout: the peer prints there
        command = [sys.executable, __file__, 'worker', json.dumps(job), str(result)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors='replace')
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f'ended with status {done.returncode}, without a word']
            raise RuntimeError(next((line for line in lines if 'OutOfMemory' in line), lines[-1]))
        return json.loads(result.read_text(encoding='utf-8'))


def run_train(folder, config_file, flags, until_first_step=False):
    """
    train.py in folder -> seconds of the process, seconds to the first step, seconds without evaluations (each lasts
    from the line before it to its own), the last validation loss, and the lines of metrics.jsonl.
    """
    with tempfile.TemporaryDirectory() as parent:
        run = Path(parent) / 'run'
        command = [sys.executable, '-u', 'train.py', config_file, *words(flags), f'--out_dir={run}']
        t0 = last = time.perf_counter()
        lines, evaluating, result = [], 0.0, dict(first_step=None, val_loss=None)
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors='replace') as process:
            for line in process.stdout:
                now = time.perf_counter()
                lines.append(line)
                found = re.match(r'step \d+: train loss [\d.]+, val loss ([\d.]+)', line)
                if found:
                    result |= dict(training=last - t0 - evaluating, val_loss=float(found[1]))
                    evaluating += now - last
                if result['first_step'] is None and re.match(r'iter \d+:', line):
                    result['first_step'] = now - t0
                    if until_first_step:
                        process.kill()
                last = now
        if result['first_step'] is None or process.returncode and not until_first_step:
            raise RuntimeError((lines or ['train.py said nothing'])[-1].strip())
        metrics = run / 'metrics.jsonl' # nanoGPT has none
        logged = metrics.read_text(encoding='utf-8').splitlines() if metrics.exists() else []
        return result | dict(seconds=time.perf_counter() - t0, metrics=[json.loads(line) for line in logged])


def words(flags):
    return [f'--{name}={value}' for name, value in flags.items()]


def in_turn(title, jobs, rounds):
    """{name: function} -> {name: results of all rounds}, A B A B. A failure is printed and gives []."""
    results = {name: [] for name in jobs}
    for r, name in itertools.product(range(rounds), jobs):
        if f'{title}: {name}' in report['errors']:
            continue
        print(f'... {title}, round {r + 1} of {rounds}: {name}', flush=True)
        try:
            results[name].append(jobs[name]())
        except RuntimeError as e:
            print(f'    failed: {e}', flush=True)
            report['errors'][f'{title}: {name}'] = str(e)
            results[name] = []
    return results


def data(vocab_size):
    return write_data(Path(temporary.name) / str(vocab_size), vocab_size, dataset)


def write_data(folder, vocab_size, dataset):
    """
    A dataset folder for both projects: the dataset's files, or a million synthetic tokens. Each of these is followed by
    one of four others, so that there is something to learn.
    """
    if folder.exists():
        return str(folder)
    folder.mkdir()
    if dataset:
        for path in dataset_folder(dataset).glob('*.bin'):
            (folder / path.name).symlink_to(path.resolve())
    else:
        rng = np.random.default_rng(0)
        successors = rng.integers(vocab_size, size=(vocab_size, 4))
        choices = rng.choice(4, p=(0.6, 0.2, 0.1, 0.1), size=(1000, 1100))
        chains = [rng.integers(vocab_size, size=1100)] # side by side, one row a step
        for choice in choices[1:]:
            chains.append(successors[chains[-1], choice])
        tokens = np.stack(chains, axis=1).astype('<u2')
        tokens[:1000].tofile(folder / 'train.bin')
        tokens[1000:].tofile(folder / 'val.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=vocab_size))) # as nanoGPT has it; ours reads it too
    return str(folder)

