"""
Which idea is better, and how certain is that? Trains each arm with several seeds at its own best learning rate.

    python tests/compare.py config/shakespeare_small.py --arms=config/mixers/gmlp.py,qk_norm=True --jobs=2 \\
        --equal=params --seeds=3 --until=decided --max_seeds=12 --out=compare-x

The first arm is the config itself. Every other arm adds a config file, a setting, or several of them joined by +:
config/mixers/rope.py+qk_norm=True. train.py's settings on the command line apply to all arms. Datasets of the same text
with another vocabulary (dataset=my_bpe) are compared in bits per byte; their batches differ.

First each arm is proven causal. Then its learning rate is searched, with seeds that the verdict does not use. Then all
arms train alternately with the same seeds, and so on the same batches and from the same start of what they share. What
is printed holds whenever one stops: arms and seeds can be added later (evidence.py). An interrupted comparison resumes,
a finished one prints its table at once: a run with known settings, code and data is not repeated. This includes failed
runs; to repeat one, delete its folder in runs/. The results go to --out: compare.json, a table and plots.

The dataset's ledger counts the ideas that one text has judged. The best of many is partly luck: --confirm=ARM compares
one again on text that a prepare.py sealed (--test_fraction), once.

Exit status: 0 if each arm has a verdict, 1 if one is undecided, 2 for a mistake.
"""
import hashlib
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from json import dumps, loads
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from configurator import configure, explain_errors, fail, settings_of
from data.causality import Proof, find_leak
from data.checkpoints import GPT2_NAMES, architecture, find_weights, open_weights
from data.dataset import Dataset
from data.run import Run, git_commit, replace_file
from data.tokenizers import load_tokenizer
from data.tokens import Split, dataset_folder, find_path, hash_file, load_meta
from data.writer import sealed_dataset
from model import GPT, GPTConfig, add_mixer, cost
try:
    import evidence
except ImportError as error: # scipy
    fail(f"{error}: pip install -r tests/requirements.txt")
import verdicts
from evidence import MAX_SEEDS, Rate
from verdicts import AA, CANNOT_TELL, factor

# ---------------------------------------------------------------------------------------------------------------------
arms = '' # the other arms, separated by commas
seeds = 5 # seeds of the verdict [1, 50]
until: Literal['seeds', 'decided'] = 'seeds' # decided: go on with one more seed for each arm that is not decided
max_seeds = 0 # with until=decided: at most this many seeds [0, 50]
hours = 0.0 # with until=decided: begin no seed after this many hours [0, inf)
margin: float | None = None # losses that differ by less are the same, in the unit of the table (0, inf)
lrs: Literal['auto'] | tuple[float, ...] = 'auto' # factors on the config's learning rates that begin each arm's search;
    # auto: 0.5,1,2; a single one is not searched (0, inf)
equal: Literal['steps', 'params', 'flops', 'seconds'] = 'steps' # what to equalize. params: via the width of the MLP
    # (or of gMLP's gate); flops, seconds: via the number of steps
horizons: tuple[int, ...] = () # steps at which to compare, up to max_iters: a run decays from a common trunk to each
scale = () # widths (n_embd) at which to repeat the comparison: does the gain shrink as models grow?
aa = False # A/A test: add the first arm with other initial weights; there should be no difference
out = 'out-compare' # folder for the results
ledger = '' # the file that gets a line for each idea; '': ledger.jsonl in the dataset's folder
confirm = '' # one of the arms: compare it with fresh seeds on the dataset's sealed text, once
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
FIRST_SEED, SEARCH_SEED, CONFIRM_SEED = 1, 10_000, 30_000 # of the verdict, the search and --confirm
AA_OFFSET = 20_000 # init_offset of the A/A arm
DECAY = 0.2 # share of each horizon's steps in which its learning rate decays
RATES = ('learning_rate', 'hidden_lr', 'min_lr') # all are multiplied by an arm's factor

# ---------------------------------------------------------------------------------------------------------------------
# Arms

@dataclass
class Arm:
    name: str
    argv: list # arguments of train.py, with the common settings
    config: dict # settings of train.py
    model: dict # fields of GPTConfig
    sources: list # its config files and the modules that they import, except installed ones
    first_seed: int = field(default_factory=lambda: FIRST_SEED)
    params: int = 0
    flops: float = 0.0 # per token
    steps: int = 0
    leak: str | None = None
    proof: str = '' # what was proven
    lr: float = 1.0 # the factor of the verdict
    searched: dict = field(default_factory=dict) # log2 of a factor -> losses; inf where a run failed
    rate: Rate | None = None

    def told(self):
        """Its arguments, as results say them."""
        return [a.removeprefix(f'{PROJECT}/') for a in self.argv]

    def with_settings(self, settings, **changes):
        return replace(self, argv=self.argv + [f'--{k}={v}' for k, v in settings.items()],
                       config=self.config | settings, **changes)


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
    proof = known_proof(arm) # now: the next arm's file may have a mixer of the same name
    arm.leak, arm.proof = proof.leak, proof.words + bool(proof.decoding) * '; but samples will be wrong or fail'
    return arm


def count(arm):
    with torch.device('meta'):
        network = GPT(GPTConfig(**arm.model))
    arm.params, arm.flops = network.get_num_params(False), cost(network)
    more = optimizer_flops(network, arm.config) / tokens(arm)
    arm.flops += more if more > 0.01 * arm.flops else 0.0
    return arm


def tokens(arm):
    """Tokens of a training step."""
    return math.prod(arm.config[name] for name in ('batch_size', 'block_size', 'gradient_accumulation_steps'))


def optimizer_flops(network, config):
    """FLOPs of the matrix products in a step of the optimizer. network: on the meta device."""
    optimizer = network.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'meta', config['optimizer'], 0.9, None)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops()


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


def known_proof(arm):
    """prove_causal(arm), from the results' folder if its network and code were proven before."""
    what = dumps([arm.model, CODE, hash_sources(arm)], default=str)
    name = hashlib.sha256(what.encode()).hexdigest()[:16]
    with suppress(OSError, ValueError): # none yet, or damaged
        return Proof(*loads(Path(out, 'proofs', name).read_text(encoding='utf-8')))
    proof = prove_causal(arm)
    if proof.leak or proof.cuts == proof.T - 1: # a quieter machine may finish the others
        PROOFS[name] = proof
    return proof


def prove_causal(arm):
    """A Proof at the run's length, in float64, for up to about 20 seconds."""
    torch.manual_seed(0)
    network, T = GPT(GPTConfig(**arm.model | dict(dropout=0.0))).double(), arm.model['block_size']
    rows = max(1, min(16, 4096 // T))
    return find_leak(network, torch.randint(arm.model['vocab_size'], (2 * rows, T)), seconds=20)


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
    horizons: tuple = () # ends of its decays, of which the last is steps

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
        if horizons:
            self.settings |= dict(schedule='wsd', wsd_decay_iters=round(DECAY * self.steps))
        what = [config | self.settings | dict(out_dir=''), CODE, fingerprint(self.arm), *self.horizons]
        what = dumps(what, default=str)
        self.folder = Path(out) / 'runs' / hashlib.sha256(what.encode()).hexdigest()[:16]

    def __str__(self):
        return f'{self.arm.name}, learning rate x{self.factor:g}, seed {self.seed}'

    def stages(self):
        """What to run: (its folder, train.py's command, the folder whose checkpoint it continues or None)."""
        if not self.horizons:
            return [(self.folder.resolve(), self.command(self.folder), None)]
        stages, trunk = [], self.folder.resolve() / 'trunk'
        for h in self.horizons:
            decay, end = round(DECAY * h), trunk.parent / str(h)
            stages.append((trunk, self.command(trunk, max_iters=h - decay, wsd_decay_iters=0), None))
            stages.append((end, self.command(end, max_iters=h, lr_decay_iters=h, wsd_decay_iters=decay), trunk))
        return stages

    def command(self, folder, **settings):
        more = [f'--{name}={value}' for name, value in (self.settings | settings).items()]
        finetunes = self.arm.config['init_from'] not in UNTRAINED
        begins = finetunes and not Run(folder).has_checkpoint() # later it resumes its own checkpoint
        return [sys.executable, str(PROJECT / 'train.py'), *self.arm.argv, *more, f'--out_dir={folder.resolve()}',
                '--overwrite=True' if begins else '--init_from=auto']

    def result(self, horizon=None):
        """The result (at a horizon), with losses in UNIT; None if the run is not finished."""
        path = self.folder / 'result.json'
        try:
            result = loads(path.read_text(encoding='utf-8')) if path.exists() else None
        except ValueError: # a damaged file: repeat the run
            return None
        if result and horizon and not result['failed']:
            result['loss'], result['bits'] = result['at'][str(horizon)]
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
PROOFS = {} # {hash of an arm: its Proof}, to be kept
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
    return FINGERPRINTS[name] + FINGERPRINTS[start] + hash_sources(arm)


def hash_sources(arm):
    return [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in arm.sources]


def execute(stages, folder, env=None):
    """Runs a cell's stages and writes its result.json, even if it fails. Cluster nodes call this too."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    t0, at = time.time(), {}
    for place, command, trunk in stages:
        place = Path(place)
        place.mkdir(exist_ok=True)
        if trunk and not Run(place).has_checkpoint():
            for name in ('metrics.jsonl', 'ckpt.pt'): # in this order: with a checkpoint, all is there
                new = shutil.copy(Path(trunk, name), place / f'{name}.tmp')
                os.replace(new, place / name)
        status = run_stage(command, place, env)
        if status is None:
            return # stopped or killed, or still active: it will be resumed
        result = read_run(place, status)
        if result['failed']:
            break
        at[place.name] = result['loss'], result['bits']
    result |= dict(status=status, took=time.time() - t0, at=at)
    if not keep:
        for path in folder.rglob('*.pt'):
            path.unlink()
    replace_file(folder / 'result.json', dumps(result))


def run_stage(command, folder, env):
    """Runs train.py in folder. Returns its exit status; None if somebody stopped it or it is still at work."""
    run = Run(folder)
    try:
        run.lock()
    except ValueError: # its comparison was killed, but the run was not
        return None
    run.unlock()
    with open(folder / 'log.txt', 'w', encoding='utf-8') as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=PROJECT,
                                   env=os.environ | (env or {}))
        PROCESSES.add(process)
        status = process.wait()
        PROCESSES.discard(process)
    stops = {getattr(signal, name, None) for name in ('SIGINT', 'SIGTERM', 'SIGKILL', 'SIGHUP', 'SIGUSR1')}
    return None if STOPPING.is_set() or status and (-status in stops or status - 128 in stops) else status


PROCESSES, STOPPING = set(), threading.Event()


def read_run(folder, status):
    """Curve and figures of a run. If it failed, loss is None and failed says how."""
    lines = Run(folder).read_metrics()
    ends = [line['val_loss'] for line in lines if 'val_loss' in line] # None: not finite
    evaluated = [line for line in lines if line.get('val_loss') is not None]
    logged = [line for line in lines if 'tokens_per_s' in line]
    text = (folder / 'log.txt').read_text(encoding='utf-8', errors='replace').strip()
    last = (text.splitlines() or ['it said nothing'])[-1]
    failed = None
    if status:
        failed = ('ran out of memory' if 'out of memory' in text else
                  'had no finite step' if 'stopping after' in text else f'ended with status {status}: {last}')
    elif not ends or ends[-1] is None:
        failed = 'ended with a loss that is not finite'
    end = evaluated[-1] if evaluated and not failed else {}
    return dict(
        loss=end.get('val_loss'), bits=end.get('bits_per_byte'), train_loss=end.get('train_loss'), failed=failed,
        curve=[[line[key] for key in ('step', 'tokens', 'seconds', 'val_loss')] for line in evaluated],
        tokens_per_s=median(line['tokens_per_s'] for line in logged) if logged else None,
        peak_memory=max((line['peak_memory'] or 0 for line in logged), default=0) or None)


def train_all(cells, what):
    """Trains the cells that have no result yet, in order, `jobs` at a time."""
    todo = list({cell.folder: cell for cell in cells if cell.result() is None}.values())
    if not todo:
        return
    report(f'{what}: {len(cells)} runs, {len(cells) - len(todo)} of them known')
    if cluster:
        return submit(todo)
    n_gpus, slots, done = torch.cuda.device_count(), queue.SimpleQueue(), []
    for i in range(jobs):
        slots.put(i)
    t0 = time.time()

    def train(cell):
        if STOPPING.is_set():
            return
        slot = slots.get()
        env = dict(CUDA_VISIBLE_DEVICES=str(slot % n_gpus)) if n_gpus and jobs > 1 else {}
        if jobs > 1 and not n_gpus: # or the threads of several runs would compete
            env = dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // jobs)))
        execute(cell.stages(), cell.folder, env)
        slots.put(slot)
        if result := cell.result():
            done.append(cell)
            left = (time.time() - t0) / len(done) * (len(todo) - len(done))
            came = f"{result['failed']}; see {cell.folder / 'log.txt'}" if result['failed'] else f"{result['loss']:.4f}"
            report(f"  {len(done)}/{len(todo)}  {cell}: {came}"
                   f"{f'; about {left / 60:.0f} min left' if left > 60 else ''}")

    with ThreadPoolExecutor(jobs) as pool:
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
    submitted = [executor.submit(subprocess.run, [sys.executable, '-c', code, dumps(cell.stages(), default=str),
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
    if equal == 'flops':
        for arm in arms:
            if math.isnan(arm.flops):
                raise ValueError(f"the FLOPs of {arm.name} cannot be counted on torch's meta device: "
                                 "compare at --equal=seconds or params")
            arm.steps = max(1, round(base.steps * base.flops * tokens(base) / (arm.flops * tokens(arm))))
    if equal == 'seconds':
        timing = [Cell(arm, 1.0, seed, 60, timed=True) for seed in (1, 2) for arm in arms] # alternating
        train_all(timing, 'timing 60 steps')
        speeds = {}
        for cell in timing:
            speed = cell.result()['tokens_per_s'] or 0.0
            speeds[cell.arm.name] = max(speed, speeds.get(cell.arm.name, 0.0))
        if not speeds[base.name]:
            raise ValueError(f"the first arm could not be timed: it {timing[0].result()['failed']}")
        for arm in arms:
            arm.steps = max(1, round(base.steps * tokens(base) / tokens(arm) * speeds[arm.name] / speeds[base.name]))


def search_rates(arms):
    """Finds each arm's best rate, see evidence.py. All arms search at the same time."""
    start = sorted(round(math.log2(f), 4) for f in ((0.5, 1.0, 2.0) if lrs == 'auto' else lrs))
    step = max((b - a for a, b in zip(start, start[1:])), default=0.0)
    wanted = {arm.name: dict.fromkeys(start, 1) for arm in arms if step}
    while any(wanted.values()):
        new = {arm.name: [Cell(arm, factor(x), SEARCH_SEED + s, arm.steps) for x, n in wanted[arm.name].items()
                          for s in range(len(arm.searched.get(x, ())), n)] for arm in arms}
        train_all([cell for row in zip_longest(*new.values()) for cell in row if cell], 'learning rates')
        for arm in arms:
            for x, n in wanted[arm.name].items():
                arm.searched[x] = losses([Cell(arm, factor(x), SEARCH_SEED + s, arm.steps) for s in range(n)])
        sd = evidence.run_sd(runs for arm in arms for runs in arm.searched.values())
        wanted = {arm.name: evidence.next_rates(arm.searched, step, sd) for arm in arms}
    for arm in arms:
        arm.rate = evidence.best_rate(arm.searched, step, sd) if step else Rate(start[0])
        arm.lr = factor(arm.rate.x)


def make_arms(common, names):
    everyone = [make_arm('', common)]
    for name in names:
        everyone.append(make_arm(name, common, everyone[0].params if equal == 'params' else None))
    known, start = {}, everyone[0].config['init_from']
    if aa and start not in UNTRAINED:
        raise ValueError(f"aa compares other initial weights, but init_from={start!r} gives them: leave out one of both")
    if horizons and horizons[-1] != everyone[0].steps:
        raise ValueError(f"horizons={','.join(map(str, horizons))} must end with max_iters={everyone[0].steps}")
    for arm in everyone:
        warmup = arm.config['warmup_iters']
        if horizons and warmup + round(DECAY * horizons[0]) > horizons[0]:
            raise ValueError(f"horizons={horizons[0]},… has no room for warmup_iters={warmup} and the decay: leave out "
                             f"{horizons[0]}, or lower --warmup_iters")
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
    if aa:
        running.append(base.with_settings(dict(init_offset=AA_OFFSET), name=AA, searched={}))
    search_rates(running)
    if horizons or confirm: # the search, whose runs decay otherwise, or on other text, promises nothing
        for arm in running:
            arm.rate.loss = math.inf
    judged, text = on_sealed_text(*running[:2]) if confirm and len(running) > 1 else (running, text_of(base))
    rows = decide(judged)
    for arm, row in zip(running[1:], rows[1:]):
        if arm.name != AA:
            enter(arm, text, row)
    return rows + [dict(arm=arm.name, leak=arm.leak, word='refused', verdict=f'refused: it is not causal: {arm.leak}')
                   for arm in everyone if arm not in running and arm.leak]


def ledger_of(arm):
    return find_path(ledger) if ledger else dataset_folder(arm.config['dataset']) / 'ledger.jsonl'


def read_ledger(arm):
    path = ledger_of(arm)
    try:
        return [loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): mend its line, or choose another --ledger") from None


def enter(arm, text, row):
    """Adds a line to the ledger: an idea, the text that judged it, and how."""
    line = dict(arm=arm.name, idea=idea_of(arm), text=text, settings=arm.told(),
                **{key: row.get(key) for key in ('word', 'difference', 'half', 'p', 'seeds')})
    if all(line | dict(date=old['date']) != old for old in read_ledger(arm)):
        with open(ledger_of(arm), 'a', encoding='utf-8') as f:
            f.write(dumps(line | dict(date=time.strftime('%Y-%m-%d'))) + '\n')


def idea_of(arm):
    """Hash of an arm's name and files: an edited file is another idea, at another size it is the same one."""
    return hashlib.sha256(dumps([arm.name, hash_sources(arm)]).encode()).hexdigest()[:16]


def luck(base):
    """What the ledger says of the validation text."""
    text = text_of(base)
    ideas = {line['idea'] for line in read_ledger(base) if line['text'] == text}
    return (f"{len(ideas)} idea{'s were' if len(ideas) > 1 else ' was'} compared on this text, says {ledger_of(base)}: "
            "the best of several is partly luck. --confirm=ARM asks text that nothing has seen." if ideas else '')


def text_of(arm):
    return Split(dataset_folder(arm.config['dataset']), 'val').fingerprint()


def on_sealed_text(base, arm):
    """Both arms as the dataset's sealed text judges them, with fresh seeds. ValueError if it judged another arm."""
    judged = []
    for one in base, arm:
        folder = dataset_folder(one.config['dataset'])
        place = Path(out).resolve() / 'sealed' / folder.name
        sealed = sealed_dataset(folder, place)
        judged.append(one.with_settings(dict(dataset=str(place)), first_seed=CONFIRM_SEED))
    for line in read_ledger(arm):
        if line['text'] == sealed and line['idea'] != idea_of(arm):
            raise ValueError(f"the sealed text of {folder} judged {line['arm']} on {line['date']}, and a second look "
                             "is no confirmation: seal other text, see --test_fraction of its prepare.py")
    enter(arm, sealed, dict(word='begun'))
    return judged, sealed


def decide(running):
    """Trains the verdict's seeds and judges; with until=decided, goes on with the arms that are not decided."""
    n, began, limit = dict.fromkeys([arm.name for arm in running], seeds), time.time(), max_seeds or MAX_SEEDS
    while True:
        cells = {arm.name: [Cell(arm, arm.lr, arm.first_seed + s, arm.steps, horizons=horizons)
                            for s in range(n[arm.name])] for arm in running}
        train_all([cell for row in zip_longest(*cells.values()) for cell in row if cell], 'verdict')
        rows = judge(running, cells)
        for h in horizons:
            for row, earlier in zip(rows, judge(running, cells, h)):
                row.setdefault('at', {})[h] = {key: earlier.get(key) for key in ('losses', 'difference', 'half')}
        undecided = [row['arm'] for row in rows[1:] if row['word'] == CANNOT_TELL and n[row['arm']] < limit]
        if until == 'seeds' or not undecided or hours and time.time() - began > 3600 * hours:
            return rows
        for name in undecided:
            n[name] += 1
        most = max(n[name] for name in undecided)
        share = min(2.0, math.sqrt(len(undecided))) # of the first arm: its seeds count for all of them
        n[running[0].name] = max(n[running[0].name], min(limit, math.ceil(share * most)))


def judge(running, cells, horizon=None):
    runs = [{cell.seed: cell.result(horizon) for cell in cells[arm.name]} for arm in running]
    return verdicts.judge(running, runs, UNIT, margin)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def check():
    if not out.strip():
        raise ValueError("out='' is no folder: choose one, such as --out=out-compare")
    if lrs != 'auto' and (not lrs or len(set(lrs)) < len(lrs) or len(lrs) > 1 and max(lrs) < 1.2 * min(lrs)):
        raise ValueError(f"lrs={lrs} must be clearly different factors, as in 0.5,1,2")
    if until == 'decided' and not max_seeds and not hours:
        raise ValueError("until=decided needs a limit: give --max_seeds=20 or --hours=8")
    if list(horizons) != sorted(set(horizons)) or horizons and equal in ('flops', 'seconds'):
        raise ValueError(f"horizons={horizons} must be growing numbers of steps, with --equal=steps or params")
    if until == 'decided' and 0 < max_seeds < seeds:
        raise ValueError(f"max_seeds={max_seeds} is below seeds={seeds}, with which the verdict begins")
    if until == 'seeds' and (max_seeds or hours):
        raise ValueError(f"max_seeds={max_seeds} and hours={hours:g} are limits of --until=decided, which is not given")
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
        (folder / 'proofs').mkdir(exist_ok=True)
        for name, proof in PROOFS.items():
            (folder / 'proofs' / name).write_text(dumps(proof), encoding='utf-8')
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
    at_width, names = {}, split_arms(arms)
    if confirm and confirm not in names:
        raise ValueError(f"confirm={confirm!r} is not one of arms={','.join(names)!r}")
    names = [name for name in names if not confirm or name == confirm]
    for width in scale or (None,):
        more = []
        if width:
            first = configured(*common).config
            more = [f'--n_embd={width}', f"--n_head={max(1, round(first['n_head'] * width / first['n_embd']))}"]
        at_width[width] = make_arms(common + more, names)
    UNIT = unit_of([arm for everyone in at_width.values() for arm in everyone])
    base = next(iter(at_width.values()))[0]
    open(ledger_of(base), 'a', encoding='utf-8').close() # fail now, not after the runs
    read_ledger(base)
    with claimed(Path(out), common):
        everything = [(width, compare(everyone)) for width, everyone in at_width.items()]
        lines, slopes = verdicts.trends(everything, horizons)
        made_by = dict(command=argv, commit=git_commit(), torch=torch.__version__, equal=equal, unit=UNIT)
        results = dict(about=made_by, trends=slopes, tables=[dict(n_embd=w, rows=rows) for w, rows in everything])
        folder, text = Path(out), []
        (folder / 'compare.json').write_text(dumps(results, indent=1), encoding='utf-8')
        for width, rows in everything:
            place = folder / f'n_embd-{width}' if width else folder
            place.mkdir(exist_ok=True)
            try:
                verdicts.draw(rows, place, UNIT)
            except ImportError:
                report('no pictures: pip install matplotlib')
            text += [f'n_embd={width}'] * bool(width) + [verdicts.short_table(rows), '']
            text += [f"{row['arm']}: {row['verdict']}" for row in rows if 'verdict' in row]
            text += [verdicts.about(rows, equal), '']
        text = '\n'.join(text + lines + [luck(base)]).strip()
        more = '\n\n'.join(verdicts.long_table(rows) for _, rows in everything)
        (folder / 'table.md').write_text(f'{text}\n\n{more}\n', encoding='utf-8')
        print(dumps(results) if json else text)
        compared = [row for _, rows in everything for row in rows[1:] if row['arm'] != AA]
        if any(row['word'] == CANNOT_TELL for row in compared):
            sys.exit(1) # somebody is without a verdict


if __name__ == '__main__':
    main(sys.argv[1:])
