"""
Which idea is better, and how certain is that? Trains each arm with several seeds and compares them seed by seed.

    python tests/compare.py config/shakespeare_small.py --out=compare-x \\
        --arms=config/mixers/gmlp.py,config/mixers/rope.py,qk_norm=True --seeds=5 --lrs=0.5,1,2 --equal=params

The first arm is the config itself. Every other arm adds a config file, a setting, or several of them joined by +:
config/mixers/rope.py+qk_norm=True. train.py's settings on the command line apply to all arms. Datasets of the same text
with another vocabulary (dataset=my_bpe) are compared in bits per byte; their batches differ.

First each arm is proven causal. Then its learning rate is searched, with seeds that the verdict does not use. Then all
arms train alternately with the same seeds, and so on the same batches. An interrupted comparison resumes, a finished
one prints its table at once, and arms and seeds can be added later: a run with known settings, code and data is not
repeated. This includes failed runs, which the verdict mentions; to repeat one, delete its folder in runs/. The results
go to --out: compare.json, a table and plots.
"""
import bisect
import functools
import hashlib
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from json import dumps, loads
from pathlib import Path
from statistics import mean, median, stdev
from typing import Literal

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from configurator import configure, explain_errors, fail, settings_of
from data.causality import find_leak
from data.checkpoints import GPT2_NAMES, architecture, find_weights, open_weights
from data.dataset import Dataset
from data.run import Run, git_commit
from data.tokenizers import load_tokenizer
from data.tokens import Split, dataset_folder, find_path, hash_file, load_meta
from model import GPT, GPTConfig, add_mixer, cost

# ---------------------------------------------------------------------------------------------------------------------
arms = '' # the other arms, separated by commas
seeds = 5 # seeds of the verdict [1, inf)
lrs = (1.0,) # factors to try on the config's learning rates, such as 0.5,1,2 (0, inf)
lr_seeds = 1 # seeds of the learning rate search [1, inf)
equal: Literal['steps', 'params', 'flops', 'seconds'] = 'steps' # what to equalize. params: via the width of the MLP
    # (or of gMLP's gate); flops, seconds: via the number of steps
scale = () # widths (n_embd) at which to repeat the comparison: does the gain shrink as models grow?
aa = False # A/A test: add the first arm with other seeds; there should be no difference
out = 'out-compare' # folder for the results
eval_tokens = 65536 # tokens per evaluation [1, inf)
evaluations = 5 # evaluations per run [1, inf)
jobs = 1 # runs at the same time; with several GPUs, one run each [1, inf)
cluster: Literal['', 'slurm', 'local'] = '' # submit the runs to this via submitit
allow_leak = False # also train arms that are not causal
keep = False # keep the runs' checkpoints
json = False # print the results as JSON
# ---------------------------------------------------------------------------------------------------------------------
OWN = settings_of('tests/compare.py')
UNTRAINED = 'scratch', 'auto' # values of init_from
SEARCH_SEED, AA_SEED = 10_000, 20_000 # the first seeds of the search and of the A/A arm
RATES = ('learning_rate', 'hidden_lr', 'min_lr') # all are multiplied by an arm's factor

# ---------------------------------------------------------------------------------------------------------------------
# Statistics, on lists of numbers

def t_probability(t, n):
    """P(-t < T < t) for Student's t with n degrees of freedom: substitutes t = sqrt(n) tan(x), then Simpson's rule."""
    end, m = math.atan(t / math.sqrt(n)), 200
    x = [math.cos(i * end / m) ** (n - 1) for i in range(m + 1)]
    total = (x[0] + x[-1] + 4 * sum(x[1::2]) + 2 * sum(x[2:-1:2])) * end / m / 3
    return 2 * total * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(math.pi)


@functools.cache
def t_quantile(p, n):
    """The t with P(-t < T < t) = p."""
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(math.sqrt(n) * math.tan(middle), n) < p else (low, middle)
    return math.sqrt(n) * math.tan(low)


def interval(values):
    """Mean and half-width of the 95% t-interval (None for a single value)."""
    n = len(values)
    return mean(values), t_quantile(0.95, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None


def detectable(sd, n):
    """The true difference that n pairs detect at the 5% level with a power of 80%."""
    return (t_quantile(0.95, n - 1) + t_quantile(0.6, n - 1)) * sd / math.sqrt(n)


def paired(a, b):
    """b - a by pairs: dict(difference, half, p, detectable, needed: pairs that would detect such a difference)."""
    d = [y - x for x, y in zip(a, b)]
    n = len(d)
    if n < 2:
        return dict(difference=mean(d) if d else None, half=None, p=None, detectable=None, needed=None, pairs=n)
    difference, half = interval(d)
    sd = stdev(d)
    if sd == 0.0:
        p = 0.0 if difference else 1.0
    else:
        p = max(0.0, 1 - t_probability(abs(difference) * math.sqrt(n) / sd, n - 1))
    needed = 2 + bisect.bisect_left(range(2, 1000), -abs(difference), key=lambda m: -detectable(sd, m))
    needed = needed if difference and needed < 1000 else None
    return dict(difference=difference, half=half, p=p, detectable=detectable(sd, n), needed=needed, pairs=n)


def holm(ps):
    """p-values corrected for their number (Holm 1979); None stays None."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected, highest = list(ps), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[i] = highest
    return corrected


def line_fit(x, y):
    """Slope of y against x, and the half-width of its 95% t-interval (None for two points)."""
    mx, my = mean(x), mean(y)
    square = sum((a - mx) ** 2 for a in x)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y)) / square
    if len(x) < 3:
        return slope, None
    rest = sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y))
    return slope, t_quantile(0.95, len(x) - 2) * math.sqrt(rest / (len(x) - 2) / square)


# ---------------------------------------------------------------------------------------------------------------------
# Arms

@dataclass
class Arm:
    name: str
    argv: list # arguments of train.py, with the common settings
    config: dict # settings of train.py
    model: dict # fields of GPTConfig
    sources: list # its config files and the modules that they import, except installed ones
    first_seed: int = 1
    params: int = 0
    flops: float = 0.0 # per token
    steps: int = 0
    leak: str | None = None
    proof: str = '' # what was proven
    lr: float = 1.0 # the best factor
    lr_losses: dict = field(default_factory=dict) # factor -> mean loss; inf where a run failed
    bracketed: bool = True


def configured(*files):
    """The settings that train.py would get from these config files and flags. Registers their mixers."""
    return configure(settings_of('train.py'), GPTConfig, [str(f) for f in files], adopt=add_mixer)


def split_arms(text):
    """Splits at commas outside of brackets."""
    names, depth = [''], 0
    for c in text:
        depth += (c in '([') - (c in ')]')
        if c == ',' and depth == 0:
            names.append('')
        else:
            names[-1] += c
    return [name.strip() for name in names if name.strip()]


def unit_of(everyone):
    """The unit in which to compare losses: tokens of different vocabularies are different pieces of text."""
    metas = [load_meta(dataset_folder(arm.config['dataset'])) for arm in everyone]
    keys = 'tokenizer', 'encoding', 'characters', 'json', 'palette'
    vocabularies = [[meta.get(key) for key in keys] for meta in metas]
    if all(v == vocabularies[0] for v in vocabularies):
        return 'nats'
    for arm, meta in zip(everyone, metas):
        tokenizer, n_tokens = load_tokenizer(meta), Split(dataset_folder(arm.config['dataset']), 'val').n_tokens
        if tokenizer is None or tokenizer.unit != 'byte':
            raise ValueError(f"the arm {arm.name} has dataset={arm.config['dataset']!r}, whose tokens are not known as "
                             "bytes of text: losses in another vocabulary than the first arm's cannot be compared")
        if n_tokens > eval_tokens:
            report(f"note: {arm.name} is evaluated on {eval_tokens:,} of its {n_tokens:,} tokens, which are other text "
                   f"than the other arms': --eval_tokens={n_tokens} takes all")
    return 'bits per byte'


IMPORTED = {} # {name: file} of the modules that config files have imported


def is_own(module):
    """Whether a module is a file that is not installed: its user may be editing it."""
    path = getattr(module, '__file__', None) or ''
    return path.endswith('.py') and not path.startswith((sys.prefix, sys.base_prefix)) and 'site-packages' not in path


def make_arm(name, common, params=None):
    argv = list(common)
    for part in name.split('+') if name else ():
        if not part.endswith('.py') and '=' not in part:
            raise ValueError(f"the arm {name!r} has {part!r}: give a config file (x.py) or a setting (qk_norm=True)")
        argv.append(part if part.endswith('.py') else '--' + part.lstrip('-'))
    argv = [str(find_path(arg)) if arg.endswith('.py') else arg for arg in argv]
    for module_name in IMPORTED: # by another arm's files: this one's may import them too
        sys.modules.pop(module_name, None)
    before = set(sys.modules)
    settings = configured(*argv)
    IMPORTED.update({name: module.__file__ for name, module in sys.modules.items()
                     if name not in before and is_own(module)})
    imported = {IMPORTED[name] for name in sys.modules.keys() & IMPORTED.keys()}
    sources = settings.files + sorted(imported - {*map(os.path.abspath, settings.files)})
    settings.shorten('max_iters', 'lr_decay_iters', 'warmup_iters', 'wsd_decay_iters')
    config = settings.config
    # runs start in other folders, so resolve relative paths here
    paths = {'dataset': str(dataset_folder(config['dataset']))} if {'/', os.sep} & set(config['dataset']) else {}
    if config['init_from'] not in (*UNTRAINED, *GPT2_NAMES):
        paths['init_from'] = str(find_path(config['init_from']))
    argv += [f'--{name}={path}' for name, path in paths.items()]
    config |= paths
    model = {f.name: config[f.name] for f in fields(GPTConfig)}
    weights = open_weights(config['init_from']) if config['init_from'] not in UNTRAINED else {}
    model['vocab_size'] = Dataset(config['dataset'], weights).vocab_size
    if weights: # as train.py does: what is not set is theirs
        model |= {k: v for k, v in architecture(weights).items() if k in model and k not in settings.given}
    short = '+'.join(Path(part).stem if part.endswith('.py') else part for part in name.split('+'))
    explain_errors(settings.files)
    arm = count(Arm(short or 'as it is', argv, config, model, sources, steps=config['max_iters']))
    if params:
        fit_params(arm, params)
    arm.leak, arm.proof = prove_causal(arm) # now: the next arm's file may have a mixer of the same name
    return arm


def count(arm):
    with torch.device('meta'):
        network = GPT(GPTConfig(**arm.model))
    arm.params, arm.flops = network.get_num_params(False), cost(network, device_type='cpu')[0]
    return arm


def fit_params(arm, target):
    """Sets the width of the arm's MLP, or of gMLP's gate, so that the arm has about target parameters."""
    name, unit = ('mlp_ratio', 1) if arm.model['mlp'] != 'none' else ('gmlp_ratio', 2 * arm.model['n_head'])
    if name == 'gmlp_ratio' and arm.model['mixer'] != 'gmlp':
        raise ValueError(f"the arm {arm.name} has {arm.params:,} parameters and no MLP whose width could make them "
                         f"{target:,}: use --equal=flops or seconds")

    def n_params(width):
        with torch.device('meta'):
            return GPT(GPTConfig(**arm.model | {name: width / arm.model['n_embd']})).get_num_params(False)
    n1, n2 = n_params(unit), n_params(2 * unit) # linear in the width
    best = max(unit, round((target - n1) / (n2 - n1) + 1) * unit)
    if abs(n_params(best) - target) > 0.02 * target:
        raise ValueError(f"the arm {arm.name} has at least {n1:,} parameters and cannot have {target:,} by its {name}: "
                         "use --equal=flops or seconds")
    if abs(arm.params - target) > abs(n_params(best) - target):
        arm.model[name] = arm.config[name] = best / arm.model['n_embd']
        arm.argv.append(f'--{name}={arm.model[name]}')
        count(arm)


def prove_causal(arm):
    """Returns (leak or None, what was proven): at the run's length, in float64, for up to about 20 seconds."""
    torch.manual_seed(0)
    network, T = GPT(GPTConfig(**arm.model | dict(dropout=0.0))).double(), arm.model['block_size']
    rows = max(1, min(16, 4096 // T))
    proof = find_leak(network, torch.randint(arm.model['vocab_size'], (2 * rows, T)), seconds=20)
    return proof.leak, proof.words


# ---------------------------------------------------------------------------------------------------------------------
# Runs

@dataclass
class Cell:
    """One run of train.py, in a folder named after the hash of its settings, code and data."""
    arm: Arm
    factor: float
    seed: int
    steps: int
    timed: bool = False # only its speed matters: it evaluates as little as possible

    def __post_init__(self):
        share, config = self.steps / max(1, self.arm.config['max_iters']), self.arm.config
        decay = config['lr_decay_iters'] or config['max_iters']
        tokens, n = (1, 1) if self.timed else (eval_tokens, evaluations)
        self.settings = dict(
            seed=self.seed, max_iters=self.steps, lr_decay_iters=round(share * decay),
            warmup_iters=round(share * config['warmup_iters']),
            wsd_decay_iters=round(share * config['wsd_decay_iters']),
            eval_tokens=tokens, eval_interval=max(1, math.ceil(self.steps / n)),
            log_interval=max(1, self.steps // 100), always_save_checkpoint=False, patience=0, allow_leak=allow_leak,
            checkpoint_interval=max(100, math.ceil(self.steps / 4)), wandb_log=False,
            **{name: self.factor * config[name] for name in RATES if config[name] is not None})
        what = dumps([config | self.settings | dict(out_dir=''), CODE, fingerprint(self.arm)], default=str)
        self.folder = Path(out) / 'runs' / hashlib.sha256(what.encode()).hexdigest()[:16]

    def __str__(self):
        return f'{self.arm.name}, learning rate x{self.factor:g}, seed {self.seed}'

    def command(self):
        more = [f'--{name}={value}' for name, value in self.settings.items()]
        finetunes = self.arm.config['init_from'] not in UNTRAINED
        begins = finetunes and not Run(self.folder).has_checkpoint() # later it resumes its own checkpoint
        return [sys.executable, str(PROJECT / 'train.py'), *self.arm.argv, *more, f'--out_dir={self.folder.resolve()}',
                '--overwrite=True' if begins else '--init_from=auto']

    def result(self):
        """The result, with losses in UNIT; None if the run is not finished."""
        path = self.folder / 'result.json'
        try:
            result = loads(path.read_text(encoding='utf-8')) if path.exists() else None
        except ValueError: # a damaged file: repeat the run
            return None
        if result and result['loss'] and UNIT != 'nats':
            bits_a_nat = result['bits'] / result['loss'] # the same windows at every evaluation
            result |= dict(loss=result['bits'], train_loss=result['train_loss'] * bits_a_nat,
                           curve=[[*point[:-1], point[-1] * bits_a_nat] for point in result['curve']])
        return result


def sources():
    """Hash of the training code."""
    files = [PROJECT / name for name in ('model.py', 'train.py', 'configurator.py')]
    files += sorted((PROJECT / 'data').glob('*.py'))
    return hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()


CODE, FINGERPRINTS = sources(), {}
UNIT = 'nats' # of losses; see unit_of


def fingerprint(arm):
    """Hashes of the data, of the weights that it begins with, and of the arm's files."""
    name, start = arm.config['dataset'], arm.config['init_from']
    if name not in FINGERPRINTS:
        FINGERPRINTS[name] = [Split(dataset_folder(name), split).fingerprint() for split in ('train', 'val')]
    if start not in FINGERPRINTS:
        weights = find_weights(start)
        files = [] if start in UNTRAINED else [weights, *sorted(weights.glob('*'))]
        FINGERPRINTS[start] = [hash_file(path) for path in files if path.is_file()]
    sources = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in arm.sources]
    return FINGERPRINTS[name] + FINGERPRINTS[start] + sources


def execute(command, folder, env=None):
    """Runs a cell's command and writes its result.json, even if it fails. Cluster nodes call this too."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    t0, run = time.time(), Run(folder)
    try:
        run.lock()
    except ValueError: # this run is still active: its comparison was killed, but the run was not
        return
    run.unlock()
    with open(folder / 'log.txt', 'w', encoding='utf-8') as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=PROJECT,
                                   env=os.environ | (env or {}))
        PROCESSES.add(process)
        status = process.wait()
        PROCESSES.discard(process)
    stops = {getattr(signal, name, None) for name in ('SIGINT', 'SIGTERM', 'SIGKILL', 'SIGHUP', 'SIGUSR1')}
    if STOPPING.is_set() or status and (-status in stops or status - 128 in stops):
        return # stopped or killed: it will be resumed
    result = read_run(folder, status) | dict(status=status, took=time.time() - t0)
    if not keep:
        for path in folder.glob('*.pt'):
            path.unlink()
    new = folder / 'result.json.tmp'
    new.write_text(dumps(result), encoding='utf-8')
    os.replace(new, folder / 'result.json')


PROCESSES, STOPPING = set(), threading.Event()


def read_run(folder, status):
    """Curve and figures of a run. If it failed, loss is None and failed says how."""
    lines = Run(folder).read_metrics()
    evaluated = [line for line in lines if line.get('val_loss') is not None]
    logged = [line for line in lines if 'tokens_per_s' in line]
    text = (folder / 'log.txt').read_text(encoding='utf-8', errors='replace').strip()
    last = (text.splitlines() or ['it said nothing'])[-1]
    failed = None
    if status:
        failed = ('ran out of memory' if 'out of memory' in text else
                  'had no finite step' if 'stopping after' in text else f'ended with status {status}: {last}')
    elif not evaluated or not math.isfinite(evaluated[-1]['val_loss']):
        failed = 'ended with a loss that is not finite'
    end = evaluated[-1] if evaluated and not failed else {}
    return dict(
        loss=end.get('val_loss'), bits=end.get('bits_per_byte'), train_loss=end.get('train_loss'), failed=failed,
        curve=[[line[key] for key in ('step', 'tokens', 'seconds', 'val_loss')] for line in evaluated],
        tokens_per_s=median(line['tokens_per_s'] for line in logged) if logged else None,
        peak_memory=max((line['peak_memory'] or 0 for line in logged), default=0) or None)


def train_all(cells, what, at_once=None):
    """Trains the cells that have no result yet, in order, `jobs` at a time."""
    at_once = at_once or jobs
    todo = list({cell.folder: cell for cell in cells if cell.result() is None}.values())
    if not todo:
        return
    report(f'{what}: {len(cells)} runs, {len(cells) - len(todo)} of them known')
    if cluster:
        return submit(todo)
    n_gpus, slots, done = torch.cuda.device_count(), queue.SimpleQueue(), []
    for i in range(at_once):
        slots.put(i)
    t0 = time.time()

    def train(cell):
        if STOPPING.is_set():
            return
        slot = slots.get()
        env = dict(CUDA_VISIBLE_DEVICES=str(slot % n_gpus)) if n_gpus and at_once > 1 else {}
        if at_once > 1 and not n_gpus: # or the threads of several runs would compete
            env = dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // at_once)))
        execute(cell.command(), cell.folder, env)
        slots.put(slot)
        if result := cell.result():
            done.append(cell)
            left = (time.time() - t0) / len(done) * (len(todo) - len(done))
            came = f"{result['failed']}; see {cell.folder / 'log.txt'}" if result['failed'] else f"{result['loss']:.4f}"
            report(f"  {len(done)}/{len(todo)}  {cell}: {came}"
                   f"{f'; about {left / 60:.0f} min left' if left > 60 else ''}")

    with ThreadPoolExecutor(at_once) as pool:
        try:
            list(pool.map(train, todo))
        except KeyboardInterrupt:
            stop()
            raise
    refuse_unfinished(todo)


def refuse_unfinished(cells):
    for cell in cells:
        if cell.result() is None: # by others: a scheduler, the system when out of memory
            raise ValueError(f"the run of {cell} was stopped or killed before its end (its log: "
                             f"{cell.folder / 'log.txt'}), or is still at work: the same command goes on; or leave the "
                             "arm out")


def stop():
    """Ctrl-C: each run saves a checkpoint."""
    STOPPING.set()
    for process in list(PROCESSES):
        process.terminate()
    report('interrupted: the same command goes on')


def submit(cells):
    """Like train_all, but via submitit, which supports SLURM."""
    import submitit
    executor = submitit.AutoExecutor(folder=Path(out) / 'submitit', cluster=cluster)
    executor.update_parameters(timeout_min=24 * 60, name='compare')
    # as a separate process: a node's task is pickled, and this script's locks cannot be pickled
    code = (f"import sys, json; sys.path.insert(0, {str(PROJECT / 'tests')!r}); import compare; "
            f"compare.keep = {keep}; compare.execute(json.loads(sys.argv[1]), sys.argv[2])")
    submitted = [executor.submit(subprocess.run, [sys.executable, '-c', code, dumps(cell.command()),
                                                  str(cell.folder.resolve())]) for cell in cells]
    try:
        for cell, job in zip(cells, submitted):
            job.result()
            if result := cell.result():
                report(f"  {cell}: {result['failed'] or format(result['loss'], '.4f')}")
    except KeyboardInterrupt:
        for job in submitted:
            job.cancel()
        raise
    refuse_unfinished(cells)


def report(text):
    print(text, file=sys.stderr if json else sys.stdout, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison

def losses(cells):
    """Losses of finished cells; inf for failed ones."""
    return [math.inf if cell.result()['failed'] else cell.result()['loss'] for cell in cells]


def set_steps(arms, base):
    """Sets each arm's steps so that it takes as many FLOPs, or seconds, as the first arm."""
    def tokens(arm): # per step
        return math.prod(arm.config[name] for name in ('batch_size', 'block_size', 'gradient_accumulation_steps'))
    if equal == 'flops':
        for arm in arms:
            arm.steps = max(1, round(base.steps * base.flops * tokens(base) / (arm.flops * tokens(arm))))
    if equal == 'seconds':
        timing = [Cell(arm, 1.0, seed, 60, timed=True) for seed in (1, 2) for arm in arms] # alternating
        train_all(timing, 'timing 60 steps', at_once=1)
        speeds = {}
        for cell in timing:
            speed = cell.result()['tokens_per_s'] or 0.0
            speeds[cell.arm.name] = max(speed, speeds.get(cell.arm.name, 0.0))
        for arm in arms:
            arm.steps = max(1, round(base.steps * tokens(base) / tokens(arm) * speeds[arm.name] / speeds[base.name]))


def search_rates(arms):
    """Finds each arm's best factor. If it is at the end of the grid, extends the grid, at most twice."""
    for arm in arms:
        arm.lr = lrs[0]
    if len(lrs) == 1:
        return
    step = max(b / a for a, b in zip(sorted(lrs), sorted(lrs)[1:]))
    grids = {arm.name: sorted(lrs) for arm in arms}
    for attempt in range(3):
        train_all([Cell(arm, f, SEARCH_SEED + s, arm.steps) for s in range(lr_seeds)
                   for i in range(max(map(len, grids.values()))) for arm in arms for f in grids[arm.name][i:i + 1]],
                  'learning rates')
        open_ended = False
        for arm in arms:
            grid = grids[arm.name]
            arm.lr_losses = {f: mean(losses([Cell(arm, f, SEARCH_SEED + s, arm.steps) for s in range(lr_seeds)]))
                             for f in grid}
            arm.lr = min(grid, key=lambda f: arm.lr_losses[f])
            arm.bracketed = arm.lr not in (grid[0], grid[-1]) or not math.isfinite(arm.lr_losses[arm.lr])
            if not arm.bracketed and attempt < 2:
                open_ended = True
                grids[arm.name] = [grid[0] / step, *grid] if arm.lr == grid[0] else [*grid, grid[-1] * step]
        if not open_ended:
            return


def make_arms(common, names):
    everyone = [make_arm('', common)]
    for name in names:
        everyone.append(make_arm(name, common, everyone[0].params if equal == 'params' else None))
    known = {}
    for arm in everyone:
        if equal in ('steps', 'params') and arm.steps != everyone[0].steps:
            raise ValueError(f"the arm {arm.name} has max_iters={arm.steps} and the first one {everyone[0].steps}, and "
                             f"--equal={equal} compares equal steps: give --max_iters for all, or --equal=flops or "
                             "seconds")
        twin = known.setdefault(Cell(arm, 1.0, 1, arm.steps).folder, arm) # the same runs, even if other settings differ
        if twin is not arm:
            raise ValueError(f"the arms {twin.name} and {arm.name} are the same: leave one out")
    return everyone


def compare(everyone):
    """Runs the whole comparison at one size. Returns the rows of the table."""
    base = everyone[0]
    for arm in everyone:
        proof = f"LEAKS: {arm.leak}" if arm.leak else f"causal, {arm.proof}"
        report(f"{arm.name}: {proof}{' (trained all the same)' if arm.leak and allow_leak else ''}")
    running = [arm for arm in everyone if not arm.leak or allow_leak]
    if base not in running:
        raise ValueError(f"the first arm is not causal: {base.leak}; --allow_leak=True trains it all the same")
    set_steps(running, base)
    search_rates(running)
    if aa:
        running.append(replace(base, name='A/A', first_seed=AA_SEED, lr_losses={}))
    cells = {arm.name: [Cell(arm, arm.lr, arm.first_seed + s, arm.steps) for s in range(seeds)] for arm in running}
    train_all([cells[arm.name][s] for s in range(seeds) for arm in running], 'verdict')
    rows = [row_of(arm, cells[arm.name], base, cells[base.name]) for arm in running]
    for row, p in zip(rows[1:], holm([row['p'] for row in rows[1:]])):
        row['p_holm'] = p
        row['verdict'] = verdict(row, rows[0]['failed'])
    rows += [dict(arm=arm.name, leak=arm.leak, verdict=f'refused: it is not causal: {arm.leak}')
             for arm in everyone if arm.leak and not allow_leak]
    return rows


def row_of(arm, cells, base, base_cells):
    found = [cell.result() for cell in cells]
    good = [r for r in found if not r['failed']]
    pairs = [(b.result()['loss'], r['loss']) for b, r in zip(base_cells, found)
             if not r['failed'] and not b.result()['failed']]
    row = dict(arm=arm.name, lr=arm.lr, learning_rate=arm.lr * arm.config['learning_rate'], bracketed=arm.bracketed,
               lr_losses={f'{f:g}': loss if math.isfinite(loss) else None for f, loss in arm.lr_losses.items()},
               losses=[r['loss'] for r in found], bits=[r['bits'] for r in found], leak=arm.leak, proof=arm.proof,
               failed=[r['failed'] for r in found if r['failed']], params=arm.params, flops=arm.flops, steps=arm.steps,
               settings=[a.removeprefix(f'{PROJECT}/') for a in arm.argv if a not in base.argv],
               curves=[r['curve'] for r in found])
    if good:
        row |= dict(zip(('loss', 'loss_half'), interval([r['loss'] for r in good])))
        if all(r['bits'] for r in good):
            row |= dict(zip(('bits_per_byte', 'bits_half'), interval([r['bits'] for r in good])))
        row['tokens_per_s'] = median(r['tokens_per_s'] for r in good)
        row['peak_memory'] = max(r['peak_memory'] or 0 for r in good) or None
        reference = [b.result()['loss'] for b in base_cells if not b.result()['failed']]
        row['seconds_to_first'] = seconds_to(mean(reference), [r['curve'] for r in good]) if reference else None
    if arm is not base:
        row |= paired(*zip(*pairs)) if pairs else paired([], [])
    return row


def seconds_to(loss, curves):
    """Mean time at which runs reach a loss, interpolated between evaluations; None if a run does not reach it."""
    times = []
    for curve in curves:
        for (_, _, t0, l0), (_, _, t1, l1) in zip(curve, curve[1:]):
            if l1 <= loss:
                times.append(t1 if l0 <= loss or l0 == l1 else t0 + (t1 - t0) * (l0 - loss) / (l0 - l1))
                break
        else:
            return None
    return mean(times)


def verdict(row, failed_before=()):
    """The verdict as one sentence. failed_before: how runs of the first arm failed."""
    what = {'steps': 'steps', 'params': 'parameters and steps', 'flops': 'FLOPs', 'seconds': 'seconds'}[equal]
    bad = f"; {len(row['failed'])} of {seeds} runs failed: it {row['failed'][0]}" if row['failed'] else ''
    if failed_before:
        bad += f"; {len(failed_before)} of {seeds} runs of the first arm failed: it {failed_before[0]}"
    lr = '' if row['bracketed'] else '; its best learning rate is not bracketed'
    lr = lr if len(lrs) > 1 else '; learning rates were not searched'
    causal = 'NOT CAUSAL' if row['leak'] else f"causal: {row['proof']}"
    if row['difference'] is None:
        return f"no pair of runs to compare{bad}"
    if row['half'] is None:
        return f"one pair of seeds, which has no interval: {row['difference']:+.4f} {UNIT} is an anecdote{bad}"
    size = f"{abs(row['difference']):.4f} ± {row['half']:.4f} {UNIT}"
    rest = f"at equal {what}, {row['pairs']} paired seeds, p={row['p_holm']:.2g}, {causal}{lr}{bad}"
    if row['p_holm'] < 0.05:
        return f"{'better' if row['difference'] < 0 else 'worse'} by {size} {rest}"
    n = row['needed'] and max(1, row['needed'] - row['pairs'])
    more = 'more than 1,000 seeds' if n is None else f"about {n} more seed{'s' if n > 1 else ''}"
    found = f"{row['difference']:+.4f} ± {row['half']:.4f} {UNIT}"
    return f"cannot tell: {found} {rest}; {more} would, if it is that large"


# ---------------------------------------------------------------------------------------------------------------------
# Table and plots

def table(rows):
    """The table in Markdown, and the verdicts."""
    def pm(row, name, half):
        if row.get(name) is None:
            return '-'
        return f"{row[name]:.4f}" + (f" ± {row[half]:.4f}" if row.get(half) is not None else '')

    def number(value, text):
        return '-' if value is None else text.format(value)
    lines = [('arm', 'learning rate', 'loss', 'bits per byte', 'difference', 'p (Holm)', 'detectable', 'parameters',
              'FLOPs a token', 'steps', 'tokens/s', 'peak memory', "seconds to first arm's loss")]
    for row in rows:
        if 'losses' not in row:
            lines.append((row['arm'], 'refused', *'-' * 11))
            continue
        lines.append((
            row['arm'] + (' (LEAKS)' if row['leak'] else ''), f"{row['learning_rate']:.2g}" + (
                '' if row['bracketed'] or len(lrs) == 1 else ' (not bracketed)'),
            pm(row, 'loss', 'loss_half'), pm(row, 'bits_per_byte', 'bits_half'), pm(row, 'difference', 'half'),
            number(row.get('p_holm'), '{:.2g}'), number(row.get('detectable'), '{:.4f}'), f"{row['params']:,}",
            f"{row['flops'] / 1e6:.3g}M", f"{row['steps']:,}", number(row.get('tokens_per_s'), '{:,.0f}'),
            number(row.get('peak_memory') and row['peak_memory'] / 1e9, '{:.2f} GB'),
            number(row.get('seconds_to_first'), '{:.0f}')))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ['| ' + ' | '.join(cell.ljust(w) for cell, w in zip(line, widths)) + ' |' for line in lines]
    text.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
    return '\n'.join(text + [''] + [f"{row['arm']}: {row['verdict']}" for row in rows if 'verdict' in row])


def draw(rows, folder):
    """Draws curves.png, learning_rates.png and differences.png."""
    from matplotlib.figure import Figure
    shown = [row for row in rows if row.get('curves') and any(row['curves'])]
    if not shown: # all failed
        return
    figure = Figure(figsize=(15, 4.5), layout='constrained')
    for axes, (label, scale_of) in zip(figure.subplots(1, 3, sharey=True), {
            'tokens': lambda row, point: point[1], 'FLOPs': lambda row, point: point[1] * row['flops'],
            'seconds of training': lambda row, point: point[2]}.items()):
        for i, row in enumerate(shown):
            whole = [curve for curve, loss in zip(row['curves'], row['losses']) if loss is not None]
            points = [step for step in zip(*whole)][1:] # the first is the untrained network
            x = [mean(scale_of(row, point) for point in step) for step in points]
            y = [[point[3] for point in step] for step in points]
            axes.plot(x, [mean(v) for v in y], color=f'C{i}', label=row['arm'])
            axes.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=f'C{i}', alpha=0.2, linewidth=0)
        axes.set(xlabel=label, xscale='log')
        axes.grid(alpha=0.3, which='both')
    figure.axes[0].set_ylabel(f'validation loss, {UNIT} (band: all seeds)')
    figure.axes[0].legend()
    figure.savefig(folder / 'curves.png', dpi=120)
    if any(row['lr_losses'] for row in shown):
        figure = Figure(figsize=(6, 4.5), layout='constrained')
        axes = figure.subplots()
        for row in shown:
            points = [(float(f), loss) for f, loss in row['lr_losses'].items() if loss is not None]
            axes.plot(*zip(*points) if points else ([], []), marker='o', label=row['arm'])
        axes.set(xlabel="factor of the config's learning rate", ylabel=f'validation loss, {UNIT}', xscale='log')
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(folder / 'learning_rates.png', dpi=120)
    compared = [row for row in shown if row.get('half') is not None]
    if compared:
        figure = Figure(figsize=(7, 1 + 0.4 * len(compared)), layout='constrained')
        axes = figure.subplots()
        axes.errorbar([row['difference'] for row in compared], range(len(compared)), fmt='o',
                      xerr=[row['half'] for row in compared])
        axes.axvline(0, color='gray', linewidth=0.8)
        axes.set_yticks(range(len(compared)), [row['arm'] for row in compared])
        axes.invert_yaxis()
        axes.set_xlabel(f'difference to the first arm, {UNIT} (left is better; 95%)')
        axes.grid(alpha=0.3)
        figure.savefig(folder / 'differences.png', dpi=120)


def gains_by_size(by_width):
    """For each arm: its difference from the first arm at each size, and the change per factor 10 in FLOPs."""
    lines, results = [], []
    for i, row in enumerate(by_width[0][1][1:], 1):
        points = [(w, rows[0]['flops'] * rows[0]['steps'], rows[i]) for w, rows in by_width]
        pairs = [(math.log10(flops), b - a) for (_, flops, r), (_, rows) in zip(points, by_width)
                 for a, b in zip(rows[0]['losses'], r.get('losses', ())) if a is not None and b is not None]
        if not pairs or len({x for x, _ in pairs}) < 2:
            continue
        slope, half = line_fit(*zip(*pairs))
        gaps = ', '.join(f"{r['difference']:+.4f} ± {r['half'] or 0:.4f} at {w}" for w, _, r in points
                         if r.get('difference') is not None)
        closes = ('the sizes do not say how it changes' if half is None or abs(slope) < half else
                  f"it changes by {slope:+.4f} ± {half:.4f} for ten times the FLOPs")
        lines.append(f"{row['arm']} by n_embd: {gaps}; {closes}")
        results.append(dict(arm=row['arm'], slope=slope, half=half))
    return lines, results


def check():
    if not out.strip():
        raise ValueError("out='' is no folder: choose one, such as --out=out-compare")
    if not lrs or len(set(lrs)) < len(lrs):
        raise ValueError(f"lrs={lrs} must be different factors, as in 0.5,1,2")
    if cluster:
        try:
            import submitit # noqa: F401
        except ImportError:
            raise ValueError(f"cluster={cluster!r} needs submitit: pip install submitit") from None


@contextmanager
def claimed(folder, common):
    """Locks the folder of a comparison. Arms and seeds may be added, but the common settings may not change."""
    folder.mkdir(parents=True, exist_ok=True)
    run, path = Run(folder), folder / 'common.json'
    run.lock('out')
    try:
        if path.exists() and (before := loads(path.read_text(encoding='utf-8'))) != common:
            raise ValueError(f"{folder} holds the comparison of {' '.join(before)}: choose another --out")
        path.write_text(dumps(common), encoding='utf-8')
        yield
    finally:
        run.unlock()


def main(argv):
    global UNIT
    if {'--help', '-h'} & set(argv):
        configure(globals(), argv=['--help'])
    own = [arg for arg in argv if arg.startswith('--') and arg[2:].partition('=')[0] in OWN]
    common = [arg for arg in argv if arg not in own]
    if not any(arg.endswith('.py') for arg in common):
        fail("give a config file, as in python tests/compare.py config/shakespeare_small.py --arms=qk_norm=True")
    configure(globals(), argv=own)
    signal.signal(signal.SIGTERM, signal.default_int_handler) # like Ctrl-C: its runs stop too
    explain_errors()
    check()
    at_width = {}
    for width in scale or (None,):
        more = []
        if width:
            first = configured(*common).config
            more = [f'--n_embd={width}', f"--n_head={max(1, round(first['n_head'] * width / first['n_embd']))}"]
        at_width[width] = make_arms(common + more, split_arms(arms))
    UNIT = unit_of([arm for everyone in at_width.values() for arm in everyone])
    with claimed(Path(out), common):
        everything = [(width, compare(everyone)) for width, everyone in at_width.items()]
        lines, slopes = gains_by_size(everything) if scale else ([], [])
        about = dict(command=argv, commit=git_commit(), torch=torch.__version__, equal=equal, seeds=seeds)
        results = dict(about=about, by_size=slopes, tables=[dict(n_embd=w, rows=rows) for w, rows in everything])
        folder, text = Path(out), []
        (folder / 'compare.json').write_text(dumps(results, indent=1), encoding='utf-8')
        for width, rows in everything:
            place = folder / f'n_embd-{width}' if width else folder
            place.mkdir(exist_ok=True)
            try:
                draw(rows, place)
            except ImportError:
                report('no pictures: pip install matplotlib')
            text += [f'n_embd={width}'] * bool(width) + [table(rows), '']
        text = '\n'.join(text + lines)
        (folder / 'table.md').write_text(text + '\n', encoding='utf-8')
        print(dumps(results) if json else text)
        if all(row.get('loss') is None for _, rows in everything for row in rows):
            sys.exit(1) # no run finished


if __name__ == '__main__':
    main(sys.argv[1:])
