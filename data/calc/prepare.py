"""
Arithmetic, generated: one problem a line, as in 12+34=46, 3-12=-9, 7*8=56, 91/13=7 (divisions have no remainder).

No validation problem is in the training data, nor is the same one with its operands swapped (34+12 for 12+34).
With the default settings all 39,900 problems on numbers of up to two digits (3,953 of them held out) in 352,075
training tokens and 38,702 for validation, of 16 characters. How many a model solves:

    python data/calc/prepare.py
    python train.py config/train_calc.py
    python data/calc/evaluate.py
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, exit_on_error
from data.tokens import CharTokenizer, DataError, Writer, dataset_folder, fraction, summarize

digits = 2 # of the operands, at most (of the divisor and the result, in a division)
examples = 10000 # problems of each operator, training and validation together
operators = '+-*/' # any of + - * /
reverse = False # write results with their last digit first, the order in which they are computed: 12+39=15
scratch = False # write out the steps of * and / before the answer, as in 12*34=48+360=408 and 408/34=1*340-68+2*68-0=12
val_fraction = 0.1 # share of the problems that are held out
seed = 1337 # another seed, other problems
out = 'calc' # dataset to write: a name in data/, or a folder
configure(globals())


def problem(operator, i):
    """The i-th problem of an operator -> (a, b, result), for i below n_problems."""
    n = 10 ** digits
    a, b = divmod(i, n - (operator == '/'))
    if operator == '/':   # a is the result so far
        return a * (b + 1), b + 1, a
    return a, b, {'+': a + b, '-': a - b, '*': a * b}[operator]


def n_problems(operator):
    return 10 ** digits * (10 ** digits - (operator == '/'))


def number(n):
    return '-' * (n < 0) + (str(abs(n))[::-1] if reverse else str(abs(n)))


def steps(operator, a, b, result):
    """The steps of a problem, each digit of b or of the result a step, and = after them; nothing where one step does it."""
    if operator == '*' and b > 9: # what each digit of b adds, from the last one on, and the sum so far
        products = [a * int(digit) * 10 ** i for i, digit in enumerate(reversed(str(b)))]
        sums = [sum(products[:i + 1]) for i in range(len(products))]
        return number(products[0]) + ''.join(f'+{number(p)}={number(total)}' for p, total in list(zip(products, sums))[1:-1]) + f'+{number(products[-1])}='
    if operator == '/' and result > 9: # each digit of the result, from the first one on: digit * product - what is left of a
        text = []
        for i, digit in reversed(list(enumerate(reversed(str(result))))):
            product = b * int(digit) * 10 ** i
            a -= product
            text.append(f'{digit}*{number(product)}-{number(a)}')
        return '+'.join(text) + '='
    return ''


def line(operator, a, b, result):
    return f'{a}{operator}{b}={steps(operator, a, b, result) if scratch else ""}{number(result)}\n'


with exit_on_error():
    if not operators or set(operators) - set('+-*/') or len(set(operators)) < len(operators):
        raise DataError(f'operators is {operators!r}, but must be some of + - * /, each once')
    if not 1 <= digits <= 9:
        raise DataError(f'digits is {digits}, but must be from 1 to 9')
    if examples < 1:
        raise DataError(f'examples is {examples}, but must be at least 1')
    lines = {'train': [], 'val': []}
    for operator in operators:
        n = n_problems(operator)
        if examples > n:
            print(f'there are only {n:,} problems a{operator}b of {digits} digits, not {examples:,}: using all')
        for i in random.Random(f'{seed} {operator}').sample(range(n), min(examples, n)):
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
