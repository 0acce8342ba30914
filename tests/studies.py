"""
Studies that tests/compare.py cannot express: with a peer, of solved problems, of generated text.

    python tests/studies.py recipe --peer=PATH     seconds until a speed-run config reaches nanoGPT's loss
    python tests/studies.py arithmetic             what zeros, steps, mixer and optimizer bring in config/train_calc.py
    python tests/studies.py repetition --run=out-x how often greedy text of a model loops, and what helps
    python tests/studies.py verdict                how often tests/compare.py is wrong: simulated searches and verdicts
    python tests/studies.py planted                the same with tiny real runs whose truth is known

GPTConfig's fields change the model of recipe and arithmetic: --n_layer=2. Raw numbers go to tests/results/.
"""
import json
import math
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Literal

import numpy as np
import torch
from scipy import stats
from scipy.special import expit

import compare
import evidence
from bench import PROJECT, SMALL_RUN, begin, choose, end, in_turn, run_train, show, write_data
from configurator import explain_errors
from data.checkpoints import NANOGPT_FIELDS, load_model
from data.machine import Machine
from data.tokens import Split, dataset_folder, load_meta
from helpers import ForkingSubprocess
from model import GPTConfig, beam_search

# ---------------------------------------------------------------------------------------------------------------------
# what is studied
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
out = '' # the JSON file; '': tests/results/COMMAND-DEVICE.json
seeds: tuple[int, ...] = (1, 2, 3)
variants: tuple[str, ...] = () # arithmetic and verdict: rows of the table; (): all
iterations = 0 # training steps; 0: the config's
# recipe
recipe_of: Literal['shakespeare_cpu', 'shakespeare'] = 'shakespeare_cpu' # which config/speedrun_*.py
dataset = 'shakespeare_char' # a folder in data/, or a path with a slash
peer: str | None = None # a checkout of nanoGPT, which trains alternately
# arithmetic and repetition
problems = 2000 # held-out problems to solve
run = '' # folder of the run
prompts = 32 # number of texts, each with a prompt of 32 validation tokens
length = 400 # tokens to generate for each
# verdict
repeats = 2000 # simulated comparisons of two arms; fewer with more arms [10, inf)
# planted
comparisons = 10 # real ones [2, inf)
# ---------------------------------------------------------------------------------------------------------------------

# the target loss (shakespeare_cpu: nanoGPT's mean of three seeds on the whole split), and nanoGPT's flags
RECIPES = {
    'shakespeare_cpu': (1.901, SMALL_RUN),
    'shakespeare': (1.4697, {}), # config/train_shakespeare_char.py unchanged: hours on a CPU
}
# changes to the calc dataset, and to its config
ARITHMETIC = {
    'as it is': ({}, {}),
    'no results backwards': (dict(reverse=''), {}),
    'all results backwards': (dict(reverse='+-*/'), {}),
    'no leading zeros': (dict(pad=False), {}),
    'no steps': (dict(scratch=False), {}),
    'as many of each operator': (dict(operators='+-*/', examples=150000), {}),
    'no time-mixing': ({}, dict(time_mixing=0.0)),
    'AdamW': ({}, dict(optimizer='adamw', hidden_lr=None)),
    'attention': ({}, dict(mixer='attention', pos_emb='rope', mlp='relu2', n_layer=4)),
}
WAYS = { # options of generate or, with beams, of beam_search
    'greedy': dict(temperature=0.0),
    'greedy, repetition_penalty 1.1': dict(temperature=0.0, repetition_penalty=1.1),
    'greedy, repetition_penalty 1.3': dict(temperature=0.0, repetition_penalty=1.3),
    'greedy, repetition_penalty 1.3, window 16': dict(temperature=0.0, repetition_penalty=1.3, repetition_window=16),
    'greedy, no_repeat_ngram 4': dict(temperature=0.0, no_repeat_ngram=4),
    'greedy, no_repeat_ngram 8': dict(temperature=0.0, no_repeat_ngram=8),
    'greedy, no_repeat_ngram 12': dict(temperature=0.0, no_repeat_ngram=12),
    '4 beams': dict(beams=4),
    '4 beams, no_repeat_ngram 8': dict(beams=4, no_repeat_ngram=8),
    'temperature 0.8': dict(temperature=0.8),
    'temperature 0.8, top_k 10': dict(temperature=0.8, top_k=10),
    'temperature 0.8, top_p 0.9': dict(temperature=0.8, top_p=0.9),
    'temperature 0.8, min_p 0.1': dict(temperature=0.8, min_p=0.1),
    'temperature 0.4': dict(temperature=0.4),
}
NOISE = { # with a standard deviation near one; of outliers, that of the other runs
    'normal': lambda rng, shape: rng.normal(size=shape),
    't with 3 df': lambda rng, shape: rng.standard_t(3, size=shape) / math.sqrt(3),
    'one in ten an outlier': lambda rng, shape: rng.normal(size=shape) * np.where(rng.random(shape) < 0.1, 10, 1),
}
SD = 0.012 # of a run, in nats
WORLDS = { # changes to World
    'as it is': {}, 'correlation 0.44': dict(correlation=0.44), 'curvature 0.005': dict(curvature=0.005),
    'curvature 0.01': dict(curvature=0.01), 'curvature 0.2': dict(curvature=0.2), 'steeper above': dict(above=3.0),
    'runs fail above': dict(cliff=0.75), 'an edge of stability': dict(edge=-0.5),
    'an edge far below': dict(edge=-1.5), 'an edge of 0.1 nats': dict(edge=-0.5, spike=0.1),
    'one sd is 3 times as large': dict(sds=(1.0, 3.0)),
    '4 arms beside the first': dict(arms=5), '16 arms beside the first': dict(arms=17),
}
given = {} # what the command line set

# ---------------------------------------------------------------------------------------------------------------------
# Training

def model_flags():
    """The fields of GPTConfig that the command line set."""
    return {name: value for name, value in given.items() if name in GPTConfig.__dataclass_fields__}


def step_flags(steps):
    """Flags for a run of this many steps, evaluated at the end; 0: as in the config."""
    if not steps:
        return {}
    return dict(max_iters=steps, lr_decay_iters=steps, eval_interval=steps, warmup_iters=min(20, steps // 2))


def train(folder, files, flags):
    """Runs train.py in folder. Returns its last validation loss and the seconds until then, without evaluations."""
    with tempfile.TemporaryDirectory() as parent:
        lines = run_train(folder, *files, out_dir=f'{parent}/run', **flags)
    before = evaluating = 0.0
    for seconds, line in lines:
        found = re.match(r'step \d+: train loss [\d.]+, val loss ([\d.]+)', line)
        if found: # an evaluation lasts from the previous line to its own
            result = dict(seconds=before - evaluating, val_loss=float(found[1]))
            evaluating += seconds - before
        before = seconds
    return result


def spread(values):
    """Mean (lowest-highest)."""
    return f'{sum(values) / len(values):.4f} ({min(values):.4f}-{max(values):.4f})' if values else '-'


def chosen(table):
    """The rows that `variants` names."""
    for name in variants:
        if name not in table:
            raise ValueError(f"variants={name!r} is not one of {', '.join(table)}")
    return {name: row for name, row in table.items() if not variants or name in variants}


def recipe_job(changes, seed):
    flags = dict(dataset=dataset) | step_flags(iterations) | changes | model_flags() | dict(seed=seed)
    return partial(train, PROJECT, [f'config/speedrun_{recipe_of}.py'], flags)

# ---------------------------------------------------------------------------------------------------------------------
# Studies

def recipe():
    target, flags = RECIPES[recipe_of]
    flags = flags | step_flags(iterations) | {name: given[name] for name in NANOGPT_FIELDS if name in given}
    vocab_size = load_meta(dataset_folder(dataset))['vocab_size']
    flags |= dict(device=device, dataset=write_data(vocab_size, dataset))
    title, runs = f'recipe, {recipe_of}', {'ours': [], 'peer': []}
    for seed in seeds: # alternating
        jobs = {f'ours, seed {seed}': recipe_job({}, seed)}
        if peer:
            jobs[f'peer, beside seed {seed}'] = partial(train, peer, ['config/train_shakespeare_char.py'], flags)
        for name, results in in_turn(title, jobs, 1).items():
            runs[name[:4]] += results
    rows = []
    for name, results in runs.items():
        if results:
            rows.append({'': name, 'seconds': spread([r['seconds'] for r in results]),
                         'val loss': spread([r['val_loss'] for r in results]), 'raw': results})
    ratios = [b['seconds'] / a['seconds'] for a, b in zip(runs['ours'], runs['peer'])]
    if ratios:
        rows.append({'': 'peer/ours', 'seconds': (median(ratios), min(ratios), max(ratios))})
    show(f'{title}: seconds to {target}, without evaluations; seeds {seeds}, mean (lowest-highest)', rows)


def solve(prepare, changes, seed):
    """Prepares the calc dataset, trains, evaluates: {operator or all: percent of held-out problems solved}."""
    with tempfile.TemporaryDirectory() as folder:
        def script(path, **flags):
            command = [sys.executable, path, *(f'--{name}={value}' for name, value in flags.items())]
            done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, errors='replace')
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ['it said nothing'])[-1])
            return done.stdout
        script('data/calc/prepare.py', **dict(out=f'{folder}/calc') | prepare)
        flags = dict(dataset=f'{folder}/calc', eval_iters=1, seed=seed) | step_flags(iterations) | changes
        run_train(PROJECT, 'config/train_calc.py', out_dir=f'{folder}/run', **flags | model_flags())
        text = script('data/calc/evaluate.py', dataset=f'{folder}/calc', out_dir=f'{folder}/run',
                      max_problems=problems)
    return {name: float(share) for name, share in re.findall(r'^(\S+) .* ([\d.]+)% of \d+$', text, re.MULTILINE)}


def arithmetic():
    rows = []
    for name, (prepare, changes) in chosen(ARITHMETIC).items():
        jobs = {seed: partial(solve, prepare, changes, seed) for seed in seeds}
        runs = in_turn(f'arithmetic: {name}', jobs, 1)
        results = [result for by_seed in runs.values() for result in by_seed]
        row = {'what': name, 'raw': results}
        for operator in '+-*/' if results else '':
            row[operator] = median(result[operator] for result in results)
        rows.append(row)
        show(f'arithmetic: percent of held-out problems solved, median of seeds {seeds}', rows)


def loops(tokens, longest=100):
    """Whether this list ends with the same sequence of up to `longest` tokens at least three times in a row."""
    return any(tokens[-p:] * 3 == tokens[-3 * p:] for p in range(1, longest + 1) if 3 * p <= len(tokens))


def generate(model, idx, beams=None, **options):
    if beams:
        return torch.cat([beam_search(model, row[None], length, beams, **options) for row in idx])
    return model.generate(idx, length, generator=torch.Generator(device).manual_seed(1), **options)


def repetition():
    """Effect of each way to control repetition on greedy text, with sampled text for comparison."""
    model, checkpoint = load_model(run, device)
    T = model.config.block_size
    split = Split(dataset_folder(checkpoint['config']['dataset']), 'val')
    x, _ = next(iter(split.fixed_batches(prompts, prompts, T)))
    idx = torch.from_numpy(x[:, :32]).to(device)
    rows = []
    for name, options in WAYS.items():
        print(f'... repetition: {name}', flush=True)
        texts = generate(model, idx, **options)
        written = texts[:, idx.size(1):].tolist()
        grams = [[tuple(text[i:i + 8]) for i in range(len(text) - 7)] for text in written]
        distinct = sum(len(set(g)) for g in grams) / sum(len(g) for g in grams)
        with torch.no_grad(): # in windows of block_size, as in training
            windows = texts.unfold(1, T + 1, T).unbind(1)
            nats = [model(w[:, :-1].contiguous(), w[:, 1:].contiguous())[1].item() for w in windows]
        rows.append({'way': name, 'end in a loop': sum(map(loops, written)) / len(written),
                     'distinct 8-grams': distinct, 'nats a token': sum(nats) / len(nats)})
    show(f'repetition: {len(idx)} texts of {length} tokens by {Path(run).name}', rows)


# ---------------------------------------------------------------------------------------------------------------------
# The verdict's own errors

@dataclass
class World:
    """Arms of the same best loss, each with its best rate. A rate's log2 beside it costs curvature times its square."""
    rng: np.random.Generator
    noise: str = 'normal'
    curvature: float = 0.04
    above: float = 1.0 # how many times as steep above the best rate
    cliff: float = math.inf # octaves above the best rate from which on runs fail
    edge: float = math.inf # octaves above it at which half of the runs end higher: the edge of stability
    spike: float = 0.2 # by so many nats
    correlation: float = 0.0 # of two arms with the same seed
    sds: tuple = (1.0, 1.0) # of the first arm's runs and of the others', in any order
    arms: int = 2

    def __post_init__(self):
        self.best = self.rng.uniform(-1.5, 1.5, self.arms)
        first, others = self.rng.permutation(self.sds)
        self.sd = SD * np.array([first] + [others] * (self.arms - 1))
        self.luck = NOISE[self.noise](self.rng, evidence.FINAL_SEEDS) # of the search's seeds

    def cost(self, arm, x):
        beside = x - self.best[arm]
        return self.curvature * beside ** 2 * (self.above if beside > 0 else 1) if beside < self.cliff else math.inf

    def losses(self, arm, x, luck):
        own = NOISE[self.noise](self.rng, len(luck))
        own = self.correlation ** 0.5 * luck + (1 - self.correlation) ** 0.5 * own
        beyond = x - self.best[arm] - self.edge
        higher = self.rng.random(len(luck)) < expit(beyond / 0.15) if self.edge < math.inf else 0
        return self.cost(arm, x) + self.sd[arm] * own + self.spike * higher

    def search(self):
        """As tests/compare.py does. Returns each arm's {x: losses} and Rate."""
        found = [{} for _ in range(self.arms)]
        wanted = [dict.fromkeys((-1.0, 0.0, 1.0), 1)] * self.arms
        while any(wanted):
            for arm, searched in enumerate(found):
                for x, n in wanted[arm].items():
                    old = searched.get(x, [])
                    searched[x] = old + self.losses(arm, x, self.luck[len(old):n]).tolist()
            sd = evidence.run_sd(losses for searched in found for losses in searched.values())
            wanted = [evidence.next_rates(searched, 1.0, sd) for searched in found]
        return found, [evidence.best_rate(searched, 1.0, sd) for searched in found]


FRESH = 1_000_000 # the first seed: the constants of evidence.py were chosen with lower ones
LOOKS = np.arange(evidence.MIN_SEEDS, evidence.MAX_SEEDS + 1)


def comparison(seed, searched=True, **world):
    """
    One comparison: what evidence.differences says at each look, an array (looks, arms - 1, 4); runs of the search for
    an arm; the losses of the old way, which took the best of three rates.
    """
    world = World(np.random.default_rng(seed), **world)
    found, rates = world.search() if searched else ([{}] * world.arms, [evidence.Rate(x) for x in world.best])
    old = [min((-1.0, 0.0, 1.0), key=lambda x: runs[x][0]) for runs in found] if searched else world.best
    luck = NOISE[world.noise](world.rng, evidence.MAX_SEEDS)
    losses = np.array([world.losses(arm, rate.x, luck) for arm, rate in enumerate(rates)])
    old = losses + [[world.cost(arm, old[arm]) - world.cost(arm, rates[arm].x)] for arm in range(world.arms)]
    said = []
    for n in LOOKS:
        runs = [{s: v for s, v in enumerate(row[:n]) if math.isfinite(v)} for row in losses.tolist()]
        differences = evidence.differences(runs, rates, [[*searched.values()] for searched in found])
        said.append([(d.value, d.seeds_variance, d.rate_variance, d.df) if d else (0, 1, 0, 9) for d in differences])
    return np.array(said), sum(len(v) for runs in found for v in runs.values()) / world.arms, old


def told(said, gap=0.0, level=0.05):
    """Which arms, all worse by gap, are told from the first: (repeats, looks, arms - 1)."""
    value, seeds_variance, rate_variance, df = np.moveaxis(said, -1, 0)
    z = evidence.Difference(value + gap, seeds_variance, rate_variance, df).z
    return np.abs(z) > evidence.boundary(level / z.shape[-1])


def paired_t(losses, gap=0.0):
    """The same by a paired t-test of the second arm at each look alone."""
    d = losses[:, 1] - losses[:, 0] + gap
    t = [d[:, :n].mean(axis=1) / d[:, :n].std(axis=1, ddof=1) * math.sqrt(n) for n in LOOKS]
    return np.array([abs(v) > stats.t.isf(0.025, n - 1) for v, n in zip(t, LOOKS)]).T[..., None]


def follows(said, wrong):
    """Whether a person who starts with 5 seeds and adds as many as the tool asks for ends with a wrong verdict."""
    n = 5
    while not wrong[n - LOOKS[0]].any() and n < evidence.MAX_SEEDS:
        level = 0.05 / wrong.shape[-1]
        needed = [evidence.Difference(*d).seeds_needed(n, level) for d in said[n - LOOKS[0]]]
        more = [m for m in needed if m and m > n]
        if not more:
            break
        n = min(more)
    return wrong[n - LOOKS[0]].any()


def errors_of(wrong):
    """How many of the verdicts are wrong, by what a person does."""
    wrong = wrong.any(axis=-1)
    first = LOOKS[0]
    def at(a, b):
        return int(wrong[:, a - first:b - first + 1].any(axis=1).sum())
    spans = {'5 seeds': (5, 5), '20 seeds': (20, 20), '3 to 20': (3, 20), '5 to 20': (5, 20), '5 to 50': (5, 50),
             '3 to 50': (3, 50)}
    return {name: at(*span) for name, span in spans.items()}


def power_of(found):
    """Percent of verdicts at 3, 5, 10 seeds; and of those until decided with their mean runs of both arms, cap 20."""
    found = found[..., 0]
    row = {f'{n} seeds': 100 * float(found[:, n - LOOKS[0]].mean()) for n in (3, 5, 10)}
    upto = found[:, :20 - LOOKS[0] + 1]
    ends = np.where(upto.any(axis=1), LOOKS[0] + upto.argmax(axis=1), 20)
    return row | {'until decided': 100 * float(upto.any(axis=1).mean()), 'runs': 2 * float(ends.mean())}


def verdict():
    rows, power = [], []
    for name, changes in chosen(WORLDS).items():
        for noise in NOISE:
            n = max(10, 2 * repeats // changes.get('arms', 2))
            print(f'... verdict: {name}, {noise}, {n} comparisons', flush=True)
            said, runs, old = zip(*[comparison(seed, noise=noise, **changes) for seed in range(FRESH, FRESH + n)])
            said, old = np.array(said), np.array(old)
            wrong = told(said)
            counts = errors_of(wrong) | {'as told': int(sum(map(follows, said, wrong)))}
            row = {'arms': name, 'noise': noise} | {key: 100 * count / n for key, count in counts.items()}
            before = errors_of(paired_t(old)) if said.shape[2] == 1 and name != 'runs fail above' else None
            row |= {'search runs': float(np.mean(runs)), 'raw': dict(of=n, wrong=counts, wrong_before=before)}
            rows.append(row | {f'before, {key}': 100 * before[key] / n for key in ('5 seeds', '5 to 50') if before})
            show('percent of false verdicts at a nominal 5%, by what a person does', rows)
            if noise == 'normal' and name in ('as it is', 'correlation 0.44'):
                known, _, at_best = zip(*[comparison(seed, False, **changes) for seed in range(FRESH, FRESH + n)])
                known, at_best = np.array(known), np.array(at_best)
                for sds in (0.5, 1, 2, 4):
                    ways = {'rates searched': told(said, sds * SD), 'rates known': told(known, sds * SD),
                            'before, rates searched': paired_t(old, sds * SD),
                            'before, rates known': paired_t(at_best, sds * SD)}
                    power += [{'arms': name, 'sds': sds, 'way': way} | power_of(found) for way, found in ways.items()]
                show('percent of differences found, in sds of a run', power)
    show('arms of tests/results/mixers-1000-steps-cpu.json told from the first, of 16, at 5% for all', published())


def published():
    path = PROJECT / 'tests/results/mixers-1000-steps-cpu.json'
    rows = json.loads(path.read_text(encoding='utf-8'))['tables'][0]['rows']
    losses = [row['losses'] for row in rows]
    searches = [{math.log2(float(x)): [v] for x, v in row['lr_losses'].items()} for row in rows]
    runs, level = [dict(enumerate(v)) for v in losses], 0.05
    sd = evidence.run_sd(losses)
    def by_model(rates):
        return evidence.differences(runs, rates, [[]] * len(rows))
    def count(ps):
        return int(sum(p * n < level for p, n in zip(ps, evidence.holm(ps, level))))
    given_rates = by_model([evidence.Rate(math.log2(row['lr'])) for row in rows])
    searched = [evidence.best_rate(found, 1.0, sd) for found in searches] # the verdict ran at the best that ran
    for rate, row in zip(searched, rows):
        rate.excess = 0.0
    ways = {
        'paired t': [stats.ttest_rel(v, losses[0]).pvalue for v in losses[1:]],
        'Welch': [stats.ttest_ind(v, losses[0], equal_var=False).pvalue for v in losses[1:]],
        "this model's variances, one look": [2 * stats.norm.sf(abs(d.z)) for d in given_rates],
        'any look': [evidence.p_value(d.z) for d in given_rates],
        "any look, with the rates' errors": [evidence.p_value(d.z) for d in by_model(searched)]}
    return [{'test': way, 'told': count(ps), 'raw': dict(zip([row['arm'] for row in rows[1:]], map(float, ps)))}
            for way, ps in ways.items()]


def planted():
    """
    Comparisons of tiny arms whose truth is known, each with seeds of its own: how often a verdict is false, and how
    often it finds what is there. The truth of an arm is its mean difference over all repetitions.
    """
    arms = ('pos_emb=rope', 'mlp_ratio=2.667', 'warmup_iters=0', 'A/A')
    found = {name: [] for name in arms}
    compare.subprocess = ForkingSubprocess # starts train.py twice as fast
    with tempfile.TemporaryDirectory() as folder:
        for r in range(comparisons):
            compare.SEARCH_SEED, compare.FIRST_SEED = 10_000 + 100 * r, 1 + 100 * r
            with suppress(SystemExit): # of somebody undecided
                compare.main([
                    'config/shakespeare_small.py', f'--dataset={dataset}', '--n_layer=2', '--n_embd=64', '--n_head=2',
                    f'--max_iters={iterations or 300}', '--learning_rate=4e-3', '--min_lr=4e-4', '--warmup_iters=20',
                    '--device=cpu', f"--arms={','.join(arms[:-1])}", '--aa', '--seeds=3', '--until=decided',
                    '--max_seeds=6', '--evaluations=1', f'--ledger={folder}/ledger.jsonl', f'--out={folder}/{r}'])
            table = json.loads(Path(folder, str(r), 'compare.json').read_text(encoding='utf-8'))['tables'][0]['rows']
            for row in table[1:]:
                found[row['arm']].append({key: row.get(key) for key in (
                    'word', 'difference', 'half', 'p', 'seeds', 'runs', 'losses', 'lr_losses')})
    rows = []
    for name, raw in found.items():
        differences = [row['difference'] for row in raw]
        truth, half = mean(differences), stats.t.isf(0.025, comparisons - 1) * stats.sem(differences)
        rows.append({'arm': name, 'truth': f'{truth:+.4f} ± {half:.4f}', 'raw': raw} | {
            word: sum(row['word'] == word for row in raw) for word in ('better', 'worse', 'cannot tell')})
    show(f'planted truths: verdicts of {comparisons} comparisons', rows)


COMMANDS = dict(recipe=recipe, arithmetic=arithmetic, repetition=repetition, verdict=verdict, planted=planted)


def main(argv):
    global given, device
    name, given = choose(argv, COMMANDS, globals())
    explain_errors()
    device = Machine(device).device
    begin(name, device, out)
    COMMANDS[name]()
    end()


if __name__ == '__main__':
    main(sys.argv[1:])
