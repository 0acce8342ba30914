"""
Arithmetic, generated: one problem a line, as in 012+034=6400 (backwards) and 003-012=-009; products and divisions (which have no
remainder) with their steps, as 12*34=48+360=408 and 408/34=1*340-68+2*68-0=12 are without the zeros in front.

No validation problem is in the training data, nor is the same one with its operands swapped (34+12 for 12+34).
With the default settings 600,000 problems on numbers of up to three digits, 12,074 of them held out, in 14.1M training
tokens and 288K for validation, of 16 characters. How many a model solves:

    python data/calc/prepare.py
    python train.py config/train_calc.py
    python data/calc/evaluate.py
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, exit_on_error
from data.tokenizers import CharTokenizer
from data.tokens import DataError, dataset_folder
from data.writer import Writer, fraction, summarize

digits = 3 # of the operands, at most (of the divisor and the result, in a division)
examples = 100000 # problems of each operator, training and validation together; longer problems have more tokens
operators = '++--*/' # any of + - * /; one that is named twice gets twice as many examples
reverse = '+*' # the operators whose results and steps are written with their last digit first, as they are computed: 12+39=15
pad = True # write leading zeros, so that each place has its fixed column: 012+345=0357
scratch = True # write out the steps of * and / before the answer, as in 12*34=48+360=408 and 408/34=1*340-68+2*68-0=12
val_fraction = 0.02 # share of the problems that are held out
seed = 1337 # another seed, other problems
out = 'calc' # dataset to write: a name in data/, or a folder
configure(globals())


def problem(operator, i):
    """The i-th problem of an operator -> (a, b, result), for i below n_problems."""
    n = 10 ** digits
    a, b = divmod(i, n - (operator == '/'))
    if operator == '/': # a is the result so far
        return a * (b + 1), b + 1, a
    return a, b, {'+': a + b, '-': a - b, '*': a * b}[operator]


def n_problems(operator):
    return 10 ** digits * (10 ** digits - (operator == '/'))


def number(operator, n, places):
    """A result or a number of a step, below 10^places."""
    text = str(abs(n)).zfill(places * pad)
    return '-' * (n < 0) + (text[::-1] if operator in reverse else text)


def steps(operator, a, b, result):
    """The steps of a problem, each digit of b or of the result a step, and = after them; nothing where one step does it."""
    n = digits if pad else len(str(b if operator == '*' else result)) # steps
    if n == 1 or operator not in '*/':
        return ''
    if operator == '*': # what each digit of b adds, from the last one on, and the sum so far
        total = a * (b % 10)
        text = number('*', total, digits + 1)
        for i in range(1, n):
            product = a * (b // 10 ** i % 10) * 10 ** i
            total += product
            text += f"+{number('*', product, digits + i + 1)}=" + number('*', total, digits + i + 1) * (i < n - 1)
        return text
    text = []
    for i in reversed(range(n)): # each digit of the result, from the first one on: digit * product - what is left of a
        digit = result // 10 ** i % 10
        product = b * digit * 10 ** i
        a -= product
        text.append(f"{digit}*{number('/', product, digits + i + 1)}-{number('/', a, digits + i)}")
    return '+'.join(text) + '='


def line(operator, a, b, result):
    places = {'+': (digits, digits + 1), '-': (digits, digits), '*': (digits, 2 * digits), '/': (2 * digits, digits)}[operator]
    operands = f'{str(a).zfill(places[0] * pad)}{operator}{str(b).zfill(digits * pad)}'
    return f'{operands}={steps(operator, a, b, result) if scratch else ""}{number(operator, result, places[1])}\n'


with exit_on_error():
    if not operators or set(operators) - set('+-*/'):
        raise DataError(f'operators is {operators!r}, but must be some of + - * /')
    if set(reverse) - set('+-*/'):
        raise DataError(f'reverse is {reverse!r}, but must be some of + - * /, or empty')
    if not 1 <= digits <= 9:
        raise DataError(f'digits is {digits}, but must be from 1 to 9')
    if examples < 1:
        raise DataError(f'examples is {examples}, but must be at least 1')
    lines = {'train': [], 'val': []}
    for operator in dict.fromkeys(operators):
        n, wanted = n_problems(operator), examples * operators.count(operator)
        if wanted > n:
            print(f'there are only {n:,} problems a{operator}b of {digits} digits, not {wanted:,}: using all')
        for i in random.Random(f'{seed} {operator}').sample(range(n), min(wanted, n)):
            a, b, result = problem(operator, i)
            same = sorted((a, b)) if operator in '+*' else (a, b)
            split = 'val' if fraction(f'{seed} {same[0]}{operator}{same[1]}') < val_fraction else 'train'
            lines[split].append(line(operator, a, b, result))
    tokenizer = CharTokenizer.from_text(lines['train'] + lines['val'])
    with Writer(dataset_folder(out), tokenizer) as writer:
        for split in lines:
            random.Random(seed).shuffle(lines[split])
            writer.write(split, tokenizer.encode(''.join(lines[split])))
    print(f'{len(lines["train"]):,} problems to train on, {len(lines["val"]):,} held out, '
          f'such as {lines["val"][0].strip()}')
    summarize(writer, 'python train.py config/train_calc.py')
