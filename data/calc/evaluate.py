"""
How many of the held-out problems of the calc dataset a model solves: exact matches of greedy answers, by operator and
by the number of digits of the longer operand (in a division, of the divisor or the result).

    python data/calc/evaluate.py --out_dir=out-calc

The dataset must be the one that the model was trained on, as another seed holds out other problems.
"""
import re
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from configurator import configure, exit_on_error
from data.tokenizers import load_tokenizer
from data.tokens import DataError, Split, dataset_folder

out_dir = 'out-calc' # folder of the run
checkpoint = 'ckpt.pt' # file in out_dir: ckpt.pt is the latest, best.pt the one of the lowest validation loss
dataset = 'calc' # a name in data/, or a folder
max_problems = 0 # take the first so many; 0: all
batch_size = 256 # problems that are solved at once
device = 'auto' # auto, cpu, cuda, mps


def read_problems(folder):
    """The held-out problems of a calc dataset as a list of (prompt, the rest of the line), such as ('12+34=', '46')."""
    split = Split(folder, 'val')
    tokenizer = load_tokenizer(split.meta)
    if tokenizer is None:
        raise DataError(f'{folder} is no calc dataset: run python data/calc/prepare.py')
    ids = []
    for x, y, _ in split.all_batches(64, 1024):
        ids.extend([int(x[0, 0])] * (not ids)) # the very first token is nobody's target
        ids.extend(y[y >= 0].tolist())
    problems = [re.fullmatch(r'(\d+[-+*/]\d+=)([-+*=\d]*\d)', line) for line in tokenizer.decode(ids).splitlines()]
    if not problems or None in problems:
        raise DataError(f'{folder} holds other things than problems: run python data/calc/prepare.py')
    return [match.groups() for match in problems]


def accuracy(generate_answers, problems, batch_size=256, progress=None):
    """
    Exact matches of what follows the last = (before it there may be steps) as {(operator, digits): (solved, total)}.
    generate_answers(prompts, n) -> as many texts, of up to n characters each; it is called with prompts of one length.
    progress is called with the number of answers got.
    """
    by_length = {}
    for prompt, answer in problems:
        by_length.setdefault(len(prompt), []).append((prompt, answer))
    counts = {}
    for group in by_length.values():
        for i in range(0, len(group), batch_size):
            batch = group[i:i + batch_size]
            longest = max(len(answer) for _, answer in batch) + 1 # and the end of the line
            texts = generate_answers([prompt for prompt, _ in batch], longest)
            for (prompt, answer), text in zip(batch, texts):
                a, operator, b = re.fullmatch(r'(\d+)([-+*/])(\d+)=', prompt).groups()
                a, b = int(a), int(b) # there may be leading zeros
                key = operator, len(str(max(a // b if operator == '/' else a, b)))
                solved, total = counts.get(key, (0, 0))
                right = '\n' in text and text.split('\n')[0].rsplit('=')[-1] == answer.rsplit('=')[-1]
                counts[key] = solved + right, total + 1
            if progress:
                progress(len(batch))
    return counts


def table(counts):
    """The counts as a table in text: a row for each operator and one for all, a column for each number of digits."""
    digits = sorted({d for _, d in counts})
    operators = [o for o in '+-*/' if any(o == key[0] for key in counts)]

    def cell(wanted_operators, wanted_digits):
        pairs = [counts.get((o, d), (0, 0)) for o in wanted_operators for d in wanted_digits]
        solved, total = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        return f'{solved / total:.1%} of {total}' if total else '-'

    rows = [['', *(f'{d} digit{"s" * (d > 1)}' for d in digits), 'all']]
    for name, wanted in [*((o, [o]) for o in operators), ('all', operators)]:
        rows.append([name, *(cell(wanted, [d]) for d in digits), cell(wanted, digits)])
    return '\n'.join(f'{row[0]:<4}' + ''.join(f'{text:>17}' for text in row[1:]) for row in rows)


def load_generator(path, device):
    """generate_answers of accuracy, with the model of a checkpoint."""
    import torch

    from model import GPT, resolve
    device, _ = resolve(device, 'float32')
    model, checkpoint = GPT.load(path, device)
    tokenizer = load_tokenizer(checkpoint.get('meta') or {})
    if tokenizer is None:
        raise DataError(f'{path} names no tokenizer: it was not trained on a calc dataset')

    def generate_answers(prompts, n):
        # a line begins after the end of another one, as in the training data
        ids = torch.tensor([tokenizer.encode('\n' + prompt) for prompt in prompts], device=device)
        with torch.inference_mode():
            out = model.generate(ids, n, temperature=0.0)
        return [tokenizer.decode(row[ids.shape[1]:]) for row in out.tolist()]

    return generate_answers


if __name__ == '__main__':
    configure(globals())
    with exit_on_error():
        problems = read_problems(dataset_folder(dataset))[:max_problems or None]
        generate_answers = load_generator(ROOT / out_dir / checkpoint, device)
        with tqdm(total=len(problems), unit='problem', disable=None) as bar:
            counts = accuracy(generate_answers, problems, batch_size, bar.update)
        print(table(counts))
