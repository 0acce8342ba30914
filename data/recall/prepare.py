"""
Synthetic tasks that test a mixer's memory, with one example in every `length` tokens. Only the underlined tokens are
training targets (train.mask, val.mask).

    mqar            3a7fBc   7f 3a  Bc       multi-query associative recall (arXiv 2312.04927): pairs of a key and its
                             -   -   -       value, then each key again, most of them soon
    noisy_recall    x3ay7fzyx7f3az           the same among noise symbols (arXiv 2403.17844)
                              - -
    fuzzy_recall    12fa3Z3Z12fa             the same with keys and values of one to three symbols (arXiv 2403.17844)
                           -  --
    compression     faZ|2Z0f1a               the symbol at each place, asked for in any order (arXiv 2403.17844)
                         - - -
    hops            ca ab bc *bc**ac         each * leads from a key to its value, the next key (arXiv 2402.09268)
                               -   -
    copy            f3aZ|f3aZ                repeat the symbols
                         ----
    selective_copy  f  3 a   Z|f3aZ          the same, with blanks in between (arXiv 2312.00752)
                              ----
    induction       a3f*Zk0d9a*Z             the symbol after the first * (arXiv 2212.14052)
                               -
    parity          0110101|0                1 if the number of ones is odd (arXiv 2411.12537)
                            -

In compression, the state after | must hold every symbol, since any can be asked for. The paper's decoder has nothing
but this state; attention can still look back at the symbols.

    python data/recall/prepare.py --task=mqar --sizes=2,4,8
    python train.py config/recall.py
    python data/recall/evaluate.py --out_dir=out-recall
"""
import math
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

task: Literal['mqar', 'noisy_recall', 'fuzzy_recall', 'compression', 'hops', 'copy', 'selective_copy', 'induction',
              'parity'] = 'mqar'
sizes = (2, 4, 8) # difficulty, alternating: number of pairs, symbols to copy, symbols since the mark, bits, or hops
length = 32 # tokens per example, filled with blanks [1, inf)
symbols = 32 # number of different symbols; half are keys (in compression, places) and half are values; in
    # noisy_recall a third each, and the others noise; in hops all are both [2, 8192]
examples = 100000 # training examples [1, inf)
val_examples = 3000 # held-out examples [1, inf)
test_fraction = 0.0 # further examples to seal, as a fraction of the training ones: tests/compare.py --confirm alone
    # reads them [0, 1)
seed = 1337
out = 'recall' # dataset to write: a name in data/, or a folder

BLANK, BAR, MARK, FIRST = range(4) # FIRST is the first symbol's id
NEAR = 0.01 # mqar: the probability of a query is proportional to distance ** (NEAR - 1), as in the paper
PARTS = 3 # fuzzy_recall: the most symbols of a key or of a value, as in the paper


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


def noisy_recall(n, rng):
    third = symbols // 3
    row = FIRST + 2 * third + rng.integers(symbols - 2 * third, size=length)
    at = np.sort(rng.choice(length - 2 * n, 2 * n, replace=False)) + np.arange(2 * n) # two tokens each
    pair = np.concatenate([np.arange(n), rng.permutation(n)])
    row[at] = FIRST + rng.choice(third, n, replace=False)[pair]
    row[at + 1] = FIRST + third + rng.integers(third, size=n)[pair]
    return row, at[n:] + 1


def fuzzy_recall(n, rng):
    half, pairs = symbols // 2, {}
    while len(pairs) < n:
        key, value = (first + rng.integers(half, size=rng.integers(1, PARTS + 1)) for first in (FIRST, FIRST + half))
        pairs.setdefault(tuple(key), value)
    pairs = list(pairs.items())
    said = [part for i in (*range(n), *rng.permutation(n)) for part in pairs[i]]
    ends = np.cumsum([len(part) for part in said])
    row = np.full(length, BLANK)
    row[:ends[-1]] = np.concatenate(said)
    return row, np.concatenate([np.arange(*ends[i:i + 2]) for i in range(2 * n, 4 * n, 2)])


def compression(n, rng):
    row = np.full(length, BLANK)
    row[:n] = FIRST + symbols // 2 + rng.integers(symbols // 2, size=n)
    place = rng.permutation(n)
    row[n], row[n + 1:3 * n + 1:2], row[n + 2:3 * n + 1:2] = BAR, FIRST + place, row[place]
    return row, np.arange(n + 2, 3 * n + 1, 2)


def hops(n, rng):
    m = 2 * max(sizes) + 1 # pairs in a circle: backwards is never shorter
    circle = FIRST + rng.choice(symbols, m, replace=False)
    row, key = np.full(length, BLANK), rng.permutation(m)
    row[0:3 * m:3], row[1:3 * m:3] = circle[key], circle[(key + 1) % m] # blanks between show which one is the key
    queries = np.full((min(m, (length - 3 * m) // (n + 2)), n + 2), MARK) # as many as fit, no key twice
    start = rng.permutation(m)[:len(queries)]
    queries[:, n], queries[:, n + 1] = circle[start], circle[(start + n) % m]
    row[3 * m:3 * m + queries.size] = queries.ravel()
    return row, 3 * m + np.arange(n + 1, queries.size, n + 2)


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


# task -> (function that makes an example of size n: tokens, positions of the answers; function of n: the least length
# and the fewest symbols)
TASKS = dict(mqar=(mqar, lambda n: (4 * n, 2 * n)), noisy_recall=(noisy_recall, lambda n: (4 * n + 1, 3 * n)),
             fuzzy_recall=(fuzzy_recall, lambda n: (4 * n * PARTS, 2 * math.ceil(n ** (1 / PARTS)))),
             compression=(compression, lambda n: (3 * n + 1, 2 * n)),
             hops=(hops, lambda n: (3 * (2 * n + 1) + n + 2, 2 * n + 1)), copy=(copy, lambda n: (2 * n + 1, 2)),
             selective_copy=(selective_copy, lambda n: (2 * n + 1, 2)), induction=(induction, lambda n: (n + 3, 2)),
             parity=(parity, lambda n: (n + 2, 2)))

settings = configure(globals())
explain_errors()
if not sizes or min(sizes) < 1:
    raise DataError(f"sizes={sizes} must be one or more numbers from 1 up, as in --sizes=2,4,8")
example, needed = TASKS[task]
for name, least in zip(('length', 'symbols'), needed(max(sizes))):
    if settings.config[name] < least:
        raise DataError(f"{name}={settings.config[name]} is too small for {task} with sizes up to {max(sizes)}: use "
                        f"--{name}={least} or more")
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
