"""
Synthetic tasks that test a mixer's memory, with one example in every `length` tokens. Only the underlined tokens are
training targets (train.mask, val.mask).

    mqar            3a7fBc   7f 3a  Bc       multi-query associative recall (arXiv 2312.04927): pairs of a key and its
                             -   -   -       value, then each key again, most of them soon
    copy            f3aZ|f3aZ                repeat the symbols
                         ----
    selective_copy  f  3 a   Z|f3aZ          the same, with blanks in between (arXiv 2312.00752)
                              ----
    induction       a3f*Zk0d9a*Z             the symbol after the first * (arXiv 2212.14052)
                               -
    parity          0110101|0                1 if the number of ones is odd (arXiv 2411.12537)
                            -

    python data/recall/prepare.py --task=mqar --sizes=2,4,8
    python train.py config/recall.py
    python data/recall/evaluate.py --out_dir=out-recall
"""
import string
import sys
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, explain_errors
from data.tokenizers import CharTokenizer
from data.tokens import DataError, dataset_folder
from data.writer import Writer, summarize

task: Literal['mqar', 'copy', 'selective_copy', 'induction', 'parity'] = 'mqar'
sizes = (2, 4, 8) # difficulty, alternating: number of pairs, symbols to copy, symbols since the mark, or bits
length = 32 # tokens per example, filled with blanks [1, inf)
symbols = 32 # number of different symbols; in mqar half are keys and half are values [2, 8192]
examples = 100000 # training examples [1, inf)
val_examples = 3000 # held-out examples [1, inf)
test_fraction = 0.0 # further examples to seal, as a fraction of the training ones: tests/compare.py --confirm alone
    # reads them [0, 1)
seed = 1337
out = 'recall' # dataset to write: a name in data/, or a folder

BLANK, BAR, MARK, FIRST = range(4) # FIRST is the first symbol's id
NEAR = 0.01 # mqar: the probability of a query is proportional to distance ** (NEAR - 1), as in the paper


def mqar(n, rng):
    keys = FIRST + rng.choice(symbols // 2, n, replace=False)
    values = FIRST + symbols // 2 + rng.integers(symbols // 2, size=n)
    slots = (length - 2 * n) // 2 # possible places of a query
    chance = np.arange(1, slots + 1) ** (NEAR - 1.0)
    at = 2 * n + 2 * rng.choice(slots, n, replace=False, p=chance / chance.sum())
    row = np.full(length, BLANK)
    row[0:2 * n:2], row[1:2 * n:2] = keys, values
    row[at], row[at + 1] = keys, values
    return row, at + 1


def copy(n, rng):
    row = np.full(length, BLANK)
    row[:n] = row[n + 1:2 * n + 1] = FIRST + rng.integers(symbols, size=n)
    row[n] = BAR
    return row, np.arange(n + 1, 2 * n + 1)


def selective_copy(n, rng):
    row = np.full(length, BLANK)
    at = np.sort(rng.choice(length - n - 1, n, replace=False))
    row[at] = row[length - n:] = FIRST + rng.integers(symbols, size=n)
    row[length - n - 1] = BAR
    return row, np.arange(length - n, length)


def induction(n, rng):
    row = FIRST + rng.integers(symbols, size=length)
    row[[length - 2, length - 3 - n]] = MARK
    row[length - 1] = row[length - 2 - n]
    return row, np.array([length - 1])


def parity(n, rng):
    row = np.full(length, BLANK)
    bits = rng.integers(2, size=n)
    row[:n], row[n], row[n + 1] = FIRST + bits, BAR, FIRST + bits.sum() % 2
    return row, np.array([n + 1])


# task -> (function that makes an example of size n: tokens, positions of the answers; number of tokens needed)
TASKS = dict(mqar=(mqar, lambda n: 4 * n), copy=(copy, lambda n: 2 * n + 1), induction=(induction, lambda n: n + 3),
             selective_copy=(selective_copy, lambda n: 2 * n + 1), parity=(parity, lambda n: n + 2))

configure(globals())
explain_errors()
if not sizes or min(sizes) < 1:
    raise DataError(f"sizes={sizes} must be one or more numbers from 1 up, as in --sizes=2,4,8")
example, needed = TASKS[task]
if needed(max(sizes)) > length:
    raise DataError(f"sizes has {max(sizes)}, for which {task} takes {needed(max(sizes))} tokens, and length is "
                    f"{length}: use --length={needed(max(sizes))} or more")
if task == 'mqar' and max(sizes) > symbols // 2:
    raise DataError(f"sizes has {max(sizes)}, but of symbols={symbols} only {symbols // 2} are keys: use "
                    f"--symbols={2 * max(sizes)} or more")
letters = string.digits + string.ascii_letters + ''.join(c for c in map(chr, range(0xC0, 0x4E00)) if c.isalpha())
tokenizer = CharTokenizer(' |*' + letters[:symbols])
about = dict(recall=dict(task=task, sizes=sizes, length=length))
with Writer(dataset_folder(out), tokenizer, about=about, test_fraction=test_fraction) as writer:
    for split, count in ('train', examples), ('test', int(examples * test_fraction)), ('val', val_examples):
        rng = np.random.default_rng([seed, ['train', 'val', 'test'].index(split)])
        rows, mask = np.empty((count, length), np.int64), np.zeros((count, length), bool)
        for i in range(count):
            rows[i], answers = example(sizes[i % len(sizes)], rng)
            mask[i, answers] = True
        writer.write(split, rows.ravel(), mask.ravel())
for i in range(min(len(sizes), val_examples)):
    print(f"{sizes[i]:>4}: {tokenizer.decode(rows[i])}")
summarize(writer, 'config/recall.py', out, block_size=length)
