"""
Generated arithmetic, one problem per line:

    012+034=6400            results of + and * are written backwards, in the order they are computed
    003-012=-009
    12*34=48+360=408        * and / include their steps (shown here neither padded nor backwards)
    408/34=1*340-68+2*68-0=12

A validation problem is never in the training data, not even with its operands swapped (34+12 for 12+34).
By default there are 600,000 problems with numbers of up to three digits, of which 12,074 are held out: 14.1M training
tokens and 288K validation tokens, with a vocabulary of 16 characters. To see how many problems a model solves:

    python data/calc/prepare.py
    python train.py config/train_calc.py
    python data/calc/evaluate.py
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, explain_errors
from data.tokenizers import CharTokenizer
from data.tokens import DataError, dataset_folder
from data.writer import Writer, split_of, summarize

digits = 3 # maximum digits of an operand; for /, of the divisor and the result
examples = 100000 # problems per operator, training and validation together
operators = '++--*/' # any of + - * /; an operator given twice gets twice as many problems
reverse = '+*' # operators whose results and steps are written with the last digit first, in the order they are computed
pad = True # write leading zeros, so that each place has its own column: 012+345=0357
scratch = True # write the steps of * and / before the answer
val_fraction = 0.02 # fraction of the problems to hold out
test_fraction = 0.0 # fraction of the training problems to seal: tests/compare.py --confirm alone reads it [0, 1)
seed = 1337 # selects the problems
out = 'calc' # dataset to write: a name in data/, or a folder
configure(globals())


def problem(operator, i):
    """The i-th problem of an operator as (a, b, result), for i below n_problems."""
    n = 10 ** digits
    a, b = divmod(i, n - (operator == '/'))
    if operator == '/': # a is the result so far
        return a * (b + 1), b + 1, a
    return a, b, {'+': a + b, '-': a - b, '*': a * b}[operator]


def n_problems(operator):
    return 10 ** digits * (10 ** digits - (operator == '/')) # no division by zero


def padded(n, places):
    return str(n).zfill(places if pad else 0)


def number(operator, n, places):
    """A result or a number in a step, below 10^places, as text."""
    text = padded(abs(n), places)
    if operator in reverse:
        text = text[::-1]
    return f'-{text}' if n < 0 else text


def steps(operator, a, b, result):
    """The steps of a problem followed by =, one for each digit of b or of the result; '' if one step is enough."""
    n_steps = digits if pad else len(str(b if operator == '*' else result))
    if n_steps == 1 or operator not in '*/':
        return ''
    return product_steps(a, b, n_steps) if operator == '*' else division_steps(a, b, result, n_steps)


def product_steps(a, b, n_steps):
    """Sum so far + the product of a and the next digit of b, starting with the last digit."""
    total = a * (b % 10)
    text = number('*', total, digits + 1)
    for i in range(1, n_steps):
        product = a * (b // 10 ** i % 10) * 10 ** i
        total += product
        text += f"+{number('*', product, digits + i + 1)}="
        if i < n_steps - 1: # the last sum is the answer
            text += number('*', total, digits + i + 1)
    return text


def division_steps(a, b, result, n_steps):
    """Digit of the result * b (with its zeros) - remainder of a, starting with the first digit."""
    parts = []
    for i in reversed(range(n_steps)):
        digit = result // 10 ** i % 10
        product = b * digit * 10 ** i
        a -= product
        parts.append(f"{digit}*{number('/', product, digits + i + 1)}-{number('/', a, digits + i)}")
    return '+'.join(parts) + '='


def line(operator, a, b, result):
    places = {'+': digits + 1, '-': digits, '*': 2 * digits, '/': digits}[operator] # of the result
    operands = f"{padded(a, 2 * digits if operator == '/' else digits)}{operator}{padded(b, digits)}"
    return f"{operands}={steps(operator, a, b, result) if scratch else ''}{number(operator, result, places)}\n"


explain_errors()
if not operators or set(operators) - set('+-*/'):
    raise DataError(f"operators is {operators!r}, but must be some of + - * /")
if set(reverse) - set('+-*/'):
    raise DataError(f"reverse is {reverse!r}, but must be some of + - * /, or empty")
if not 1 <= digits <= 9:
    raise DataError(f"digits is {digits}, but must be from 1 to 9")
if examples < 1:
    raise DataError(f"examples is {examples}, but must be at least 1")
lines = {'train': [], 'val': [], 'test': []}
for operator in dict.fromkeys(operators):
    n, wanted = n_problems(operator), examples * operators.count(operator)
    if wanted > n:
        print(f"there are only {n:,} problems a{operator}b of {digits} digits, not {wanted:,}: using all")
    for i in random.Random(f'{seed} {operator}').sample(range(n), min(wanted, n)):
        a, b, result = problem(operator, i)
        same = sorted((a, b)) if operator in '+*' else (a, b)
        split = split_of(f'{seed} {same[0]}{operator}{same[1]}', val_fraction, test_fraction)
        lines[split].append(line(operator, a, b, result))
tokenizer = CharTokenizer.from_text(lines['train'] + lines['val'] + lines['test'])
with Writer(dataset_folder(out), tokenizer, test_fraction=test_fraction) as writer:
    for split in lines:
        random.Random(seed).shuffle(lines[split])
        writer.write(split, tokenizer.encode(''.join(lines[split])))
print(f"{len(lines['train']):,} problems to train on, {len(lines['val']):,} held out, "
      f"such as {lines['val'][0].strip()}")
summarize(writer, 'config/train_calc.py', out)
