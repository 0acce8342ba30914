"""
Measures the speed and memory of this project and, alternating with it, of a peer: a checkout of nanoGPT.

    python tests/bench.py train --preset=baby --peer=PATH   tokens/s, MFU, peak memory
    python tests/bench.py sample --peer=PATH                tokens/s of prompt and decoding, short and long context
    python tests/bench.py mixers                            all token mixers and a UNet, and their cost as T grows
    python tests/bench.py state                             decoding after 1, 1,000, 100,000 tokens; bytes of state
    python tests/bench.py unet                              the published UNet with 100 inner blocks, and a flat GPT
    python tests/bench.py scale                             cost versus T, width and depth
    python tests/bench.py startup --peer=PATH               seconds from the command to the end of the first step
    python tests/bench.py process --peer=PATH               nanoGPT's small CPU run, from start to end
    python tests/bench.py head                              loss of the head: in chunks, by torch, with all logits
    python tests/bench.py loss --peer=PATH                  loss from the same weights on the same batches

Ours and the peer's measurements alternate, each in a process of its own: A B A B. On a CPU every round starts them
afresh; on a GPU all of a table stay in its memory for all rounds, so that each compiles once (--stay=False: afresh, for
a small GPU). Tables show medians over rounds. Ratios are computed within each round, with their range in brackets,
which does not show how compilations differ where programs stay. Raw numbers go to tests/results/.
GPTConfig's fields change the model of any command: --n_layer=2. On a CPU, memory is that of the whole process.
"""
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
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from configurator import configure, explain_errors, fail
from data.checkpoints import NANOGPT_FIELDS, load_weights, stored_config
from data.machine import Machine
from data.run import git_commit
from data.tokens import Split, dataset_folder, load_meta, prefetch
from model import Cache, GPT, GPTConfig, LinearCrossEntropy, MIXERS, cost, pack, to_int8
from compare import configured

for file in sorted((PROJECT / 'config/mixers').glob('*.py')):
    if 'class ' in file.read_text(encoding='utf-8'): # a mixer that model.py does not have
        configured(file)

# ---------------------------------------------------------------------------------------------------------------------
# what is measured
preset: Literal['auto', 'readme', 'baby', 'gpt2', 'gpt2-medium'] = 'auto' # auto: depends on the command
peer: str | None = None # a checkout of nanoGPT, measured alternating with this project
peer_compile = True # torch.compile for the peer's training, its default; False is faster for some models
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto' # auto: as in train.py and sample.py
compile: bool | Literal['auto'] = 'auto' # as in train.py and sample.py
batch_size = 0 # sequences per micro-batch; 0: the preset's
gradient_accumulation_steps = 0 # micro-batches per training step; 0: 40 for GPT-2 on a GPU, as in its training, else 1
dataset = '' # a folder in data/, or a path with a slash; '': synthetic tokens
stay = True # on a GPU, all programs of a table stay in its memory; False: each round starts them afresh
repeats = 5 # rounds
steps = 5 # timings per round; for training on a GPU each is the mean over at least 10 micro-batches
iterations = 0 # training steps for process and loss; 0: 2000 and 500
out = '' # the JSON file; '': tests/results/COMMAND-DEVICE.json
# sample
batches = (1, 32) # sequences generated at once
contexts = (1, 900) # prompt lengths in tokens
new_tokens = 64 # tokens generated after each prompt
dtypes: tuple[str, ...] = () # compared with the first instead of with the peer, such as bfloat16,int8; (): dtype
# mixers and scale
variants: tuple[str, ...] = () # mixers, by their names in the table; (): all
equal_params = False # give mixers about as many parameters as attention, via n_layer
lengths = (256, 512, 1024, 2048, 4096, 8192) # T
# ---------------------------------------------------------------------------------------------------------------------

PRESETS = { # fields of GPTConfig, and the batch size
    'readme': (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False), 12),
    'baby': (dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False), 64),
    'gpt2': (dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, bias=False), 12),
    'gpt2-medium': (dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024, vocab_size=50304, bias=False), 12),
}
# the CPU flags of nanoGPT's README, which both projects accept
SMALL_RUN = dict(device='cpu', compile=False, eval_iters=20, log_interval=1, block_size=64, batch_size=12, n_layer=4,
                 n_head=4, n_embd=128, dropout=0.0, max_iters=2000, lr_decay_iters=2000)
WIDTHS, DEPTHS = (128, 256, 512, 1024), (2, 4, 8, 16) # for scale
UNET = dict(unet_layers=(5, 2, 2, 2, 2), n_layer=100) # merges 32 tokens into one: 100 blocks see 32 positions of 1024
LONGEST = 10.0 # maximum seconds of a generation
READ = 2 ** 28 # weights to read when measuring memory bandwidth: 1 GiB
given = {} # what the command line set
report = dict(about={}, errors={}, tables={}) # the JSON file

# ---------------------------------------------------------------------------------------------------------------------
# Inside a worker process: a job is a dict of plain values; its result is a row of a table

def work(job):
    """Sets a job up on the machine that train.py would choose and yields {}; then measures it each time: a row."""
    job = SimpleNamespace(**job)
    on_cpu = torch.device(job.device).type == 'cpu'
    dtype = 'float32' if job.peer and on_cpu else job.dtype # nanoGPT has no autocast there
    machine = Machine(job.device, dtype if dtype != 'int8' else 'auto') # of the activations, as in sample.py
    for result in WORK[job.kind](job, machine):
        yield result and {'how': machine.dtype + (', compiled' if machine.compiled else '')} | result


def build(job, source):
    """Builds the model of a job on its device. source: the peer's folder, or None."""
    torch.manual_seed(1337)
    if source is None:
        return GPT(GPTConfig(**job.config)).to(job.device)
    spec = importlib.util.spec_from_file_location('peer_model', Path(source) / 'model.py')
    sys.modules['peer_model'] = module = importlib.util.module_from_spec(spec) # dataclasses look it up there
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(**{name: job.config[name] for name in NANOGPT_FIELDS})).to(job.device)


def on_meta(config):
    """A model on the meta device, from a dict of GPTConfig's fields."""
    with torch.device('meta'):
        return GPT(GPTConfig(**config))


def make_step(job, machine):
    """Returns step(i, micro_batches), which does what train.py's i-th step does and returns the loss."""
    model = build(job, job.peer)
    if job.init: # the peer's weights
        load_weights(model, build(job, job.init).state_dict())
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), machine.kind)
    if job.peer:
        forward, machine.compiled = torch.compile(model) if job.compile else model, bool(job.compile)
    else:
        forward, _ = machine.wrap(model, job.compile)
    model.train()

    def step(i, micro_batches):
        if not job.peer:
            machine.seed(1337, i)
        for group in optimizer.param_groups:
            group['lr'] = 1e-3 * min(1.0, (i + 1) / 100) * group.get('lr_scale', 1.0)
        loss_sum = 0.0
        for x, y in micro_batches:
            with machine.autocast:
                loss = forward(x, y)[1] / len(micro_batches)
            machine.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        machine.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if job.peer:
            machine.scaler.step(optimizer)
            machine.scaler.update()
            optimizer.zero_grad(set_to_none=True)
        else: # a step that is not finite is skipped
            machine.step(optimizer, norm)
        return loss_sum

    return step


def load_batches(job, machine):
    """Yields (i, the micro-batches of step i), fetched ahead by a thread as in train.py."""
    split, n = Split(job.data, 'train'), job.accumulation

    def load(i):
        samples = [k * job.batch_size for k in range(i * n, i * n + n)]
        pairs = [split.batch(first, job.batch_size, job.config['block_size']) for first in samples]
        return i, [machine.put(*pair) for pair in pairs]
    return prefetch(load, 0)


def seconds(function):
    """How long a call takes, including its queued GPU work."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    t0 = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - t0


def work_train(job, machine):
    """Times at_once training steps together: train.py does not synchronize with the GPU in every step."""
    step, batches, losses = make_step(job, machine), load_batches(job, machine), []

    def take_steps():
        for i, micro_batches in itertools.islice(batches, job.at_once):
            losses.append(step(i, micro_batches))
    for _ in range(2): # warm up: compilation, first allocations, optimizer state
        seconds(take_steps)
    model, peak = on_meta(job.config), machine.peak[0]
    flops = cost(model)
    yield {}
    while True:
        if machine.kind == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        losses.clear()
        times = [seconds(take_steps) / job.at_once for _ in range(job.steps)]
        speed = job.accumulation * job.batch_size * job.config['block_size'] / median(times)
        every = torch.stack(losses).tolist()
        yield {'M parameters': model.get_num_params(False) / 1e6, 'MFLOP/token': flops / 1e6, 'tokens/s': speed,
               'MFU': speed * flops / peak if peak else None, 'ms/step': median(times) * 1e3,
               'GB': machine.peak_memory / 1e9, 'loss': sum(every[-20:]) / len(every[-20:]), 'losses': every,
               'times': times}


@torch.inference_mode()
def work_sample(job, machine):
    """Tokens/s of the prompt and of decoding, also as fractions of the machine's peak."""
    bare, peak = on_meta(job.config), machine.peak[0]
    model = build(job, job.peer).eval()
    if not job.peer:
        if job.dtype == 'int8':
            to_int8(model)
        model.to(machine.torch_dtype)
        machine.compiled = bool(job.compile)
        if job.compile:
            model.hidden = torch.compile(model.hidden, dynamic=True)
        elif machine.kind == 'cpu':
            pack(model)

    def generate(idx, options=dict(temperature=0.8, top_k=200)):
        """Generates like sample.py; for the peer, one iteration of its generate() at a time."""
        if not job.peer:
            yield from model.stream(idx, job.new_tokens, **options)
            return
        for _ in range(job.new_tokens):
            with machine.autocast:
                idx = model.generate(idx, 1, **options)
            yield idx

    idx = torch.randint(bare.config.vocab_size, (job.batch_size, job.context), device=job.device)

    def measure():
        """-> tokens/s of the prompt, and decoding steps a second."""
        tokens, n = generate(idx), 0
        prompt = idx.numel() / seconds(lambda: next(tokens))
        if machine.kind == 'cuda':
            next(tokens) # captures a CUDA graph
        def decode():
            nonlocal n
            end = time.perf_counter() + LONGEST
            while time.perf_counter() < end and next(tokens, None) is not None:
                n += 1
        decoding = seconds(decode)
        return prompt, n / decoding

    measure() # warms up
    # forward, and logits of the last position only
    flops = cost(bare, job.context) / 3 - 2 * bare.config.n_embd * bare.config.vocab_size
    size = 1 if job.dtype == 'int8' else machine.torch_dtype.itemsize
    n_bytes = bare.get_num_params(False) * (4 if job.peer else size) # autocast: float32
    yield {}
    weights = torch.ones(READ // 2 ** 14, 2 ** 14, device=job.device)
    bandwidth = weights.nbytes / min(seconds(lambda: weights @ weights[0]) for _ in range(5))
    del weights
    while True:
        prompt, decoded = measure()
        yield {'prompt tokens/s': prompt, 'of matmul peak': prompt * flops / peak if peak else None,
               'decode tokens/s': decoded * job.batch_size, 'of bandwidth': decoded * n_bytes / bandwidth}


def work_state(job, machine):
    """Decoding speed and bytes of state after a long context."""
    model = build(job, None).eval()
    idx = torch.randint(job.config['vocab_size'], (job.batch_size, job.context), device=job.device)
    yield {}
    while True:
        cache = Cache()
        with torch.inference_mode(), machine.autocast:
            for part in idx.split(1024, dim=1):
                model.hidden(part, cache)
            kept, token = cache.n_bytes(), idx[:, -1:]
            times = [seconds(lambda: model.lm_head(model.hidden(token, cache))) for _ in range(job.new_tokens)]
        yield {'decode tokens/s': job.batch_size / median(times), 'bytes of state': kept / job.batch_size,
               'times': times}


def work_head(job, machine):
    """Forward and backward pass of the head only: from x (N, C) to the mean cross-entropy."""
    C, V, N = job.config['n_embd'], job.config['vocab_size'], job.batch_size * job.config['block_size']
    x = torch.randn(N, C, device=job.device, requires_grad=True)
    weight = (torch.randn(V, C, device=job.device) * 0.02).requires_grad_()
    y = torch.randint(V, (N,), device=job.device)

    def loss(x, weight):
        if job.way == 'chunks':
            return LinearCrossEntropy.apply(x, weight, y, True)
        if job.way == 'torch':
            return F.linear_cross_entropy(x, weight, y, options=torch.nn.LinearCrossEntropyOptions())
        return F.cross_entropy(F.linear(x, weight), y)
    fast_loss = torch.compile(loss, dynamic=False) if job.compile is True else loss

    def step():
        x.grad = weight.grad = None
        with machine.autocast:
            losses.append(fast_loss(x, weight))
        losses[-1].backward()

    losses, before = [], machine.peak_memory
    step() # warms up
    yield {}
    while True:
        times = [seconds(step) for _ in range(job.steps)]
        yield {'ms': median(times) * 1e3, 'GB above the start': (machine.peak_memory - before) / 1e9,
               'loss': losses[-1].item(), 'times': times}


WORK = dict(train=work_train, sample=work_sample, state=work_state, head=work_head)

# ---------------------------------------------------------------------------------------------------------------------
# Starting processes

def both(kind, config, batch, theirs=True, **more):
    """{'ours': a Worker with this job, 'peer': the same for the peer, if given}"""
    as_trained = device != 'cpu' and config.vocab_size > 50000 and kind == 'train'
    n = gradient_accumulation_steps or (40 if as_trained else 1)
    job = dict(kind=kind, config=stored_config(config), batch_size=batch, accumulation=n,
               data=write_data(config.vocab_size, dataset), device=device, dtype=dtype, compile=compile, peer=None,
               init=None, steps=steps, stays=stay and device != 'cpu',
               at_once=1 if device == 'cpu' else math.ceil(10 / n))
    jobs = {'ours': Worker(job | more)}
    if peer and theirs:
        jobs['peer'] = Worker(job | dict(compile=peer_compile) | more | dict(peer=peer, init=None))
    return jobs


class Worker:
    """A job in a process of its own, which stays ready for more rounds or ends after each."""
    def __init__(self, job):
        self.job, self.process, self.stays = job, None, job['stays']

    def start(self):
        """Begins to set up, without waiting."""
        self.errors = tempfile.TemporaryFile('w+', errors='replace')
        self.process = subprocess.Popen([sys.executable, __file__, 'worker', json.dumps(self.job)], text=True,
                                        errors='replace', stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors)

    def read(self):
        """The next row, {} when it is set up. RuntimeError if the process has failed."""
        for line in self.process.stdout:
            if line.startswith('row '): # the peer prints too
                return json.loads(line[4:])
        status = self.stop()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() if status > 0 else []
        lines = lines or [f'ended with status {status}, without a word']
        raise RuntimeError(next((line for line in lines if 'OutOfMemory' in line), lines[-1]))

    def __call__(self):
        """Measures once -> a row of a table."""
        if not self.process:
            self.start()
            self.read()
        with suppress(BrokenPipeError): # it has ended: read() says why
            print(file=self.process.stdin, flush=True)
        row = self.read()
        if not self.stays:
            self.stop()
        return row

    def stop(self):
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        status, self.process = self.process.wait(), None
        return status


def run_train(folder, *files, **flags):
    """Runs train.py in folder. Returns [(seconds since its start, printed line)], with an empty line at the end."""
    command = [sys.executable, '-u', 'train.py', *files, *(f'--{name}={value}' for name, value in flags.items())]
    lines, t0 = [], time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors='replace') as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - t0, line.strip()))
    if process.returncode:
        raise RuntimeError(lines[-1][1] if lines else 'train.py said nothing')
    return [*lines, (time.perf_counter() - t0, '')]


def write_data(vocab_size, dataset):
    """Folder of a dataset for both projects; '': a million synthetic tokens, each followed by one of four others."""
    folder = Path(temporary.name) / str(vocab_size)
    if folder.exists():
        return str(folder)
    folder.mkdir()
    for path in dataset_folder(dataset).glob('*.bin') if dataset else ():
        (folder / path.name).symlink_to(path.resolve())
    if not dataset:
        strides = np.random.default_rng(0).choice((1, 2, 5, 17), p=(0.6, 0.2, 0.1, 0.1), size=1_100_000)
        tokens = (strides.cumsum() % vocab_size).astype('<u2')
        tokens[:1_000_000].tofile(folder / 'train.bin')
        tokens[1_000_000:].tofile(folder / 'val.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=vocab_size))) # in nanoGPT's format
    return str(folder)

# ---------------------------------------------------------------------------------------------------------------------
# Rounds and tables

def begin(command, device, out):
    """Starts a report with the facts about the machine and the code."""
    global temporary
    temporary = tempfile.TemporaryDirectory() # for datasets
    info, kind = Path('/proc/cpuinfo'), torch.device(device).type
    cpu = re.search(r'model name\s*: (.*)', info.read_text()) if info.exists() else None
    about = dict(command=' '.join(sys.argv), date=time.ctime(), commit=git_commit(), system=platform.platform(),
                 cpu=cpu[1] if cpu else platform.processor(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                 gpu=torch.cuda.get_device_name(device) if kind == 'cuda' else None,
                 python=platform.python_version(), torch=torch.__version__,
                 file=out or str(PROJECT / 'tests' / 'results' / f'{command}-{kind}.json'))
    report.update(about=about, errors={}, tables={})


def in_turn(title, jobs, rounds):
    """{name: function} -> {name: results of all rounds}, alternating A B A B. A failure is printed and gives []."""
    results = {name: [] for name in jobs}
    staying = {name: job for name, job in jobs.items() if getattr(job, 'stays', False)}
    turns = [(f'round {r + 1} of {rounds}', name, jobs[name]) for r in range(rounds) for name in jobs]
    try:
        for job in staying.values(): # together, since compiling takes longest
            job.start()
        for turn, name, call in [('set up', name, job.read) for name, job in staying.items()] + turns:
            if f'{title}: {name}' in report['errors']:
                continue
            print(f'... {title}, {turn}: {name}', flush=True)
            try:
                results[name].append(call())
            except RuntimeError as e:
                print(f'    failed: {e}', flush=True)
                report['errors'][f'{title}: {name}'] = str(e)
                results[name] = []
    finally:
        for job in staying.values():
            if job.process:
                job.stop()
    return {name: list(filter(None, rows)) for name, rows in results.items()} # set up, they gave {}


def compare(title, jobs, base='peer', ratios=()):
    """Runs jobs alternately and shows a row for each, with ratios of these columns to job `base`: {name: row}."""
    runs, rows = in_turn(title, jobs, repeats), {}
    for name, results in runs.items():
        rows[name] = {'': name}
        for key, value in results[0].items() if results else ():
            if isinstance(value, (int, float)):
                rows[name][key] = median(result[key] for result in results)
            elif not isinstance(value, list):
                rows[name][key] = value
        if name != base and results and runs.get(base):
            for key in ratios:
                values = [a[key] / b[key] for a, b in zip(results, runs[base])]
                rows[name][f'{key} to {base}'] = median(values), min(values), max(values)
        rows[name]['raw'] = results
    show(title, list(rows.values()))
    return rows


def cell(value):
    if isinstance(value, tuple):
        return f'{value[0]:.3g}x ({value[1]:.3g}-{value[2]:.3g})'
    if isinstance(value, float):
        return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'
    return '-' if value is None else str(value)


def show(title, rows):
    """Prints rows (dicts; 'raw' is only for the file) as a table, and writes the file with all results so far."""
    report['tables'][title] = rows
    columns = list(dict.fromkeys(key for row in rows for key in row if key != 'raw'))
    table = [columns] + [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f'\n{title}')
    for first, *rest in table:
        print('  '.join([first.ljust(widths[0])] + [text.rjust(n) for text, n in zip(rest, widths[1:])]).rstrip())
    print(flush=True)
    path = Path(report['about']['file'])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1).replace(f'{PROJECT}/', '') # the project's location is private
    path.with_suffix('.tmp').write_text(text, encoding='utf-8')
    os.replace(path.with_suffix('.tmp'), path)


def picture(panels, y, scale='log'):
    """Draws curves next to the JSON file; panels: {x label: {name: [(x, y), ...]}}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5 * len(panels), 4.5))
    for axes, (x, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, points in curves.items():
            axes.plot(*zip(*points), marker='.', label=name)
        axes.set(xlabel=x, ylabel=y, xscale=scale, yscale=scale)
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(Path(report['about']['file']).with_suffix('.png'), dpi=100)


def end():
    """Prints the path of the file. Exits with 1 if anything failed, except for lack of GPU memory."""
    print(f"raw numbers: {report['about']['file']}")
    if any('OutOfMemory' not in error for error in report['errors'].values()):
        sys.exit(1)

# ---------------------------------------------------------------------------------------------------------------------
# Commands

def model_of(default, **changes):
    """Returns (GPTConfig, batch size) of the preset, with changes from the command line."""
    args, batch = PRESETS[default if preset == 'auto' else preset]
    if dataset:
        size = load_meta(dataset_folder(dataset)).get('vocab_size', 50257)
        changes['vocab_size'] = size if size < 1024 else math.ceil(size / 64) * 64
    args = args | changes | {name: value for name, value in given.items() if name in GPTConfig.__dataclass_fields__}
    return GPTConfig(**args), batch_size or batch


def train():
    config, batch = model_of('baby' if device == 'cpu' else 'gpt2')
    title = f'train, width {config.n_embd}, batch {batch} x {config.block_size}, dropout {config.dropout}'
    compare(title, both('train', config, batch), ratios=('tokens/s', 'GB'))


def sample():
    config, _ = model_of('gpt2')
    n = min(new_tokens, config.block_size - 1) # so that the window never restarts, which would count as decoding
    # like sample.py: in float32 where bfloat16 is not faster, and not compiled
    more = dict(new_tokens=n, compile=compile is True)
    if dtype == 'auto' and device == 'cpu' and on_meta(vars(config)).get_num_params() < 5e7:
        more['dtype'] = 'float32'
    for batch, context in itertools.product(batches, contexts):
        context = min(context, config.block_size - n)
        jobs = both('sample', config, batch, context=context, **more)
        if dtypes:
            jobs = {name: both('sample', config, batch, context=context, **more | dict(dtype=name))['ours']
                    for name in dtypes}
        compare(f'sample, batch {batch}, context {context}', jobs, dtypes[0] if dtypes else 'peer',
                ratios=('decode tokens/s', 'prompt tokens/s'))


def sweep(title, cases, base=None):
    """{name: (config, batch)} -> {name: tokens/s in training}"""
    jobs = {name: both('train', config, batch, theirs=False)['ours'] for name, (config, batch) in cases.items()}
    rows = compare(title, jobs, base, ['tokens/s', 'GB'])
    return {name: row['tokens/s'] for name, row in rows.items() if 'tokens/s' in row}


def equalized(config, target):
    """config with the n_layer that is closest to `target` parameters."""
    def distance(n):
        return abs(on_meta(vars(replace(config, n_layer=n))).get_num_params(False) - target)
    return replace(config, n_layer=min(range(1, 3 * config.n_layer), key=distance))


def mixers():
    base, batch = model_of('baby' if device == 'cpu' else 'gpt2')
    a = max(1, base.n_layer // 6) # the UNet has as many blocks as the flat stack
    every = {name: dict(mixer=name) for name in MIXERS} | {
        'time-weighting circulant': dict(time_weighting='circulant'),
        'time-weighting full': dict(time_weighting='full'), 'time-mixing': dict(time_mixing=0.5),
        'short convolution': dict(short_conv=4),
        'rope': dict(pos_emb='rope'), 'relative': dict(pos_emb='relative'),
        'unet': dict(unet_layers=(a, a), n_layer=max(1, base.n_layer - 4 * a))}
    for name in variants:
        if name not in every:
            raise ValueError(f"variants={name!r} is not one of {', '.join(every)}")
    names = ['attention', *(name for name in every if name != 'attention' and (not variants or name in variants))]
    curves = {name: [] for name in names}
    for T in lengths:
        flat = replace(base, block_size=T)
        cases = {name: (replace(flat, **every[name]), max(1, batch * base.block_size // T)) for name in names}
        if equal_params:
            target = on_meta(vars(flat)).get_num_params(False)
            cases = {name: (equalized(config, target), n) for name, (config, n) in cases.items()}
        for name, speed in sweep(f'mixers, T={T}', cases, 'attention').items():
            curves[name].append((T, speed))
    picture({'T': curves}, 'tokens/s')


def state():
    config, _ = model_of('readme')
    kinds = dict(attention={}, gmlp=dict(mixer='gmlp'), window=dict(attention_window=256),
                 linear_attention=dict(mixer='linear_attention'), gated_delta=dict(mixer='gated_delta'))
    for context in contexts if "contexts" in given else (1, 1000, 100000):
        jobs = {}
        for name, changes in kinds.items():
            if name != 'gmlp' or context <= 1000: # its table is (T, T)
                long = replace(config, block_size=context + new_tokens, pos_emb='none', **changes)
                jobs[name] = both('state', long, 1, theirs=False, context=context, new_tokens=new_tokens,
                                  compile=False)['ours']
        compare(f'state after {context} tokens', jobs, 'attention', ['decode tokens/s'])


def unet():
    flat, batch = model_of('gpt2')
    sweep('published UNet', {'flat': (flat, batch), 'unet': (replace(flat, **UNET), batch)}, 'flat')


def scale():
    base, batch = model_of('baby')
    cases = {
        'T': {T: (replace(base, block_size=T), max(1, batch * base.block_size // T)) for T in lengths},
        'width': {C: (replace(base, n_embd=C, n_head=max(1, C // 64)), batch) for C in WIDTHS},
        'depth': {n: (replace(base, n_layer=n), batch) for n in DEPTHS}}
    panels = {what: {'training': list(sweep(f'scale, {what}', values).items())} for what, values in cases.items()}
    picture(panels, 'tokens/s')


def small_run(max_iters=None):
    """nanoGPT's small CPU run, on any device, the whole process; the time to the first step is the start-up time."""
    max_iters = max_iters or iterations or 2000
    flags = SMALL_RUN | {name: given[name] for name in NANOGPT_FIELDS if name in given and name != 'vocab_size'}
    flags |= dict(device=device, max_iters=max_iters, dataset=write_data(model_of('readme')[0].vocab_size, dataset))

    def run(folder):
        with tempfile.TemporaryDirectory() as parent:
            lines = run_train(folder, 'config/train_shakespeare_char.py', out_dir=f'{parent}/run', **flags)
        first = next(seconds for seconds, line in lines if re.match(r'(iter|step) \d+: loss', line))
        losses = [float(loss) for _, line in lines for loss in re.findall(r'val loss ([\d.]+)', line)]
        return {'s to the first step': first, 's to the end': lines[-1][0], 'val loss': losses[-1]}

    jobs = {'ours': partial(run, PROJECT)} | ({'peer': partial(run, peer)} if peer else {})
    compare(f'small CPU run, {max_iters} steps', jobs, ratios=('s to the first step', 's to the end'))


def head():
    config, batch = model_of('gpt2')
    batch = batch if batch_size or device != 'cpu' else 1
    ways = ['chunks', 'logits'] + (['torch'] if hasattr(torch.nn, 'LinearCrossEntropyOptions') else [])
    jobs = {way: both('head', config, batch, theirs=False, way=way)['ours'] for way in ways}
    compare(f'head: {batch * config.block_size} tokens, vocabulary {config.vocab_size}', jobs, 'chunks', ['ms'])


def loss():
    config, batch = model_of('readme' if device == 'cpu' else 'baby', dropout=0.0) # models would draw different masks
    n = iterations or 500
    jobs = both('train', config, batch, init=peer, steps=n, at_once=1, stays=False) # each round from the same weights
    compare(f'loss of the last 20 of {n} steps', jobs, ratios=['loss'])


COMMANDS = dict(train=train, sample=sample, mixers=mixers, unet=unet, scale=scale, startup=partial(small_run, 1),
                process=small_run, state=state, head=head, loss=loss)


def choose(argv, commands, namespace):
    """Reads the command at the start of argv and the settings after it. Returns (command, given settings)."""
    name = argv[0] if argv else ''
    if name not in commands and not {'-h', '--help'} & set(argv):
        fail(f"the first argument must be a command, not {name!r}: {', '.join(commands)}; --help explains them")
    return name, configure(namespace, GPTConfig, argv[1:] if name in commands else argv).given


def main(argv):
    global given, device
    if argv[:1] == ['worker']:
        for row in work(json.loads(argv[1])):
            print(f'\nrow {json.dumps(row)}', flush=True)
            if not sys.stdin.readline():
                return
    name, given = choose(argv, COMMANDS, globals())
    explain_errors()
    device = Machine(device).device
    if peer and not (Path(peer) / 'model.py').is_file():
        raise ValueError(f"peer={peer!r} has no model.py: give the folder of a checkout of nanoGPT")
    begin(name, device, out)
    COMMANDS[name]()
    end()


if __name__ == '__main__':
    main(sys.argv[1:])
