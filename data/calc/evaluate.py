"""
How many held-out problems of the calc dataset a model solves, by operator and by the number of digits. A problem is
solved if the greedy answer is an exact match. Digits are counted in the longer operand; for /, in the longer of the
divisor and the result.

    python data/calc/evaluate.py --out_dir=out-calc

Evaluate on the dataset that the model was trained on: other seeds hold out other problems.
"""
import re
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, explain_errors
from data.tokenizers import load_tokenizer
from data.tokens import DataError, Split, dataset_folder, find_path, map_tokens

out_dir = 'out-calc' # folder of the run
checkpoint = 'ckpt.pt' # file in out_dir: ckpt.pt is the latest, best.pt has the lowest validation loss
dataset = 'calc' # a name in data/, or a folder
max_problems = 0 # use only the first ones; 0: all [0, inf)
batch_size = 256 # problems to solve at once [1, inf)
device = 'auto' # auto | cpu | cuda | cuda:1 | mps


def read_problems(folder):
    """The held-out problems of a calc dataset: a list of (prompt, rest of the line), such as ('12+34=', '46')."""
    split = Split(folder, 'val')
    tokenizer = load_tokenizer(split.meta)
    if tokenizer is None:
        raise DataError(f"{folder} is not a calc dataset: run python data/calc/prepare.py")
    ids = [i for shard in split.shards for i in map_tokens(shard).tolist()]
    problems = [re.fullmatch(r'(\d+[-+*/]\d+=)([-+*=\d]*\d)', line) for line in tokenizer.decode(ids).splitlines()]
    if not problems or None in problems:
        raise DataError(f"{folder} holds something else than problems: run python data/calc/prepare.py")
    return [match.groups() for match in problems]


def accuracy(generate_answers, problems, batch_size=256, progress=None):
    """
    {(operator, digits): (solved, total)}. A problem is solved if the text after the last = matches exactly; the steps
    before it do not count.

    generate_answers  (prompts of one length, n) -> a text of up to n characters for each
    progress          is called with the number of answers since its last call
    """
    by_length = {}
    for prompt, answer in problems:
        by_length.setdefault(len(prompt), []).append((prompt, answer))
    counts = {}
    for group in by_length.values():
        for i in range(0, len(group), batch_size):
            batch = group[i:i + batch_size]
            longest = max(len(answer) for _, answer in batch) + 1 # includes the newline
            texts = generate_answers([prompt for prompt, _ in batch], longest)
            for (prompt, answer), text in zip(batch, texts):
                a, operator, b = re.fullmatch(r'(\d+)([-+*/])(\d+)=', prompt).groups()
                a, b = int(a), int(b) # without leading zeros
                key = operator, len(str(max(a // b if operator == '/' else a, b)))
                solved, total = counts.get(key, (0, 0))
                right = '\n' in text and text.split('\n')[0].rsplit('=')[-1] == answer.rsplit('=')[-1]
                counts[key] = solved + right, total + 1
            if progress:
                progress(len(batch))
    return counts


def table(counts):
    """The counts as text: a row for each operator and one for all, a column for each number of digits."""
    digits = sorted({d for _, d in counts})
    operators = [o for o in '+-*/' if any(o == key[0] for key in counts)]

    def cell(wanted_operators, wanted_digits):
        pairs = [counts.get((o, d), (0, 0)) for o in wanted_operators for d in wanted_digits]
        solved, total = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        return f'{solved / total:.1%} of {total}' if total else '-'

    rows = [['', *(f'{d} digit' if d == 1 else f'{d} digits' for d in digits), 'all']]
    for name, wanted in [*((o, [o]) for o in operators), ('all', operators)]:
        rows.append([name, *(cell(wanted, [d]) for d in digits), cell(wanted, digits)])
    return '\n'.join(f'{row[0]:<4}' + ''.join(f'{text:>17}' for text in row[1:]) for row in rows)


def load_generator(path, device):
    """A checkpoint's model as generate_answers for accuracy()."""
    import torch

    from data.checkpoints import load_model
    from data.machine import Machine
    device = Machine(device).device
    model, checkpoint = load_model(path, device)
    tokenizer = load_tokenizer(checkpoint.get('meta') or {})
    if tokenizer is None:
        raise DataError(f"{path} names no tokenizer: it was not trained on a calc dataset, use another --out_dir")

    def generate_answers(prompts, n):
        # a newline first: in the training data, each line follows another
        ids = torch.tensor([tokenizer.encode('\n' + prompt) for prompt in prompts], device=device)
        with torch.inference_mode():
            out = model.generate(ids, n, temperature=0.0)
        return [tokenizer.decode(row[ids.shape[1]:]) for row in out.tolist()]

    return generate_answers


if __name__ == '__main__':
    configure(globals())
    explain_errors()
    problems = read_problems(dataset_folder(dataset))[:max_problems or None]
    generate_answers = load_generator(find_path(out_dir) / checkpoint, device)
    with tqdm(total=len(problems), unit='problem', disable=None) as bar:
        counts = accuracy(generate_answers, problems, batch_size, bar.update)
    print(table(counts))
