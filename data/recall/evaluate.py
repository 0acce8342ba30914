"""
How well a model recalls: the fraction of right answers by problem size, and of examples with only right answers. Also
prints the bytes of state that the model keeps for one sequence.

    python data/recall/evaluate.py --out_dir=out-recall
    python data/recall/evaluate.py config/mixers/gated_delta.py --out_dir=out-recall-delta --dataset=recall-long

Each answer is the likeliest token given the true tokens before it. So an example without a wrong answer is one that
greedy decoding gets completely right.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, explain_errors, settings_of
from data.checkpoints import load_model
from data.machine import Machine
from data.tokens import DataError, Split, dataset_folder
from model import Cache, GPTConfig, add_mixer

out_dir = 'out-recall' # folder of the run
dataset = 'recall' # a name in data/, or a folder; its examples may be longer than the run's
batch_size = 100 # examples at once [1, inf)
device = 'auto' # auto | cpu | cuda | cuda:1 | mps


@torch.inference_mode()
def accuracy(model, split, batch_size=100):
    """{size: (right answers, answers, right examples, examples)} of a Split that data/recall/prepare.py made."""
    about = split.meta['recall']
    counts = {size: [0, 0, 0, 0] for size in about['sizes']}
    first = 0
    for x, y in split.all_batches(batch_size, about['length']):
        x, y = (torch.from_numpy(t).to(model.lm_head.weight.device) for t in (x, y))
        answers = y >= 0
        right = (model(x)[0].argmax(dim=-1) == y) & answers
        whole = right.sum(1) == answers.sum(1)
        for i in range(len(x)):
            size = about['sizes'][(first + i) % len(about['sizes'])]
            found = right[i].sum(), answers[i].sum(), whole[i], 1
            counts[size] = [a + int(b) for a, b in zip(counts[size], found)]
        first += len(x)
    return counts


@torch.inference_mode()
def state_bytes(model, T):
    """Bytes of state that the model keeps for one sequence of T tokens."""
    cache = Cache()
    model.hidden(torch.zeros(1, T, dtype=torch.long, device=model.lm_head.weight.device), cache)
    return cache.n_bytes()


if __name__ == '__main__':
    configure(globals(), adopt=add_mixer, foreign={*settings_of('train.py'), *vars(GPTConfig())})
    explain_errors()
    split = Split(dataset_folder(dataset), 'val')
    if 'recall' not in split.meta:
        raise DataError(f"{dataset} is not a recall dataset: run python data/recall/prepare.py")
    device = Machine(device).device
    model, _ = load_model(out_dir, device)
    split.vocab_size = model.config.vocab_size # larger ids end in a one-line error
    about = split.meta['recall']
    T = about['length']
    if model.bounded and T > model.config.block_size:
        raise DataError(f"the examples have {T} tokens, and the model's block_size is {model.config.block_size}: "
                        "use another dataset")
    counts = accuracy(model, split, batch_size)
    print(f"{about['task'] + ', size':<20}" + ''.join(f'{size:>8}' for size in counts))
    for name, i in ('answers right', 0), ('examples right', 2):
        print(f'{name:<20}' + ''.join(f'{c[i] / c[i + 1]:>8.1%}' for c in counts.values()))
    print(f"{state_bytes(model, T):,} bytes of state after {T} tokens")
