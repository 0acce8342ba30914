"""
Studies that tests/compare.py cannot express: with a peer, of solved problems, of generated text.

    python tests/studies.py recipe --peer=PATH     seconds until a speed-run config reaches nanoGPT's loss
    python tests/studies.py arithmetic             what zeros, steps, mixer and optimizer bring in config/train_calc.py
    python tests/studies.py repetition --run=out-x how often greedy text of a model loops, and what helps

GPTConfig's fields change the model of any study but repetition: --n_layer=2. Raw numbers go to tests/results/.
"""
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from bench import PROJECT, SMALL_RUN, begin, choose, end, in_turn, run_train, show, write_data
from configurator import explain_errors
from data.checkpoints import NANOGPT_FIELDS, load_model
from data.machine import Machine
from data.tokens import Split, dataset_folder, load_meta
from model import GPTConfig, beam_search

# ---------------------------------------------------------------------------------------------------------------------
# what is studied
device = 'auto' # auto | cpu | cuda | cuda:1 | mps
out = '' # the JSON file; '': tests/results/COMMAND-DEVICE.json
seeds: tuple[int, ...] = (1, 2, 3)
variants: tuple[str, ...] = () # arithmetic: rows of the table; (): all
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
# ---------------------------------------------------------------------------------------------------------------------

# the target loss, and the flags with which nanoGPT reaches it
RECIPES = {
    'shakespeare_cpu': (1.898, SMALL_RUN),
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


COMMANDS = dict(recipe=recipe, arithmetic=arithmetic, repetition=repetition)


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
