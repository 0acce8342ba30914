"""
Ways in which a token mixer can see later tokens: the false loss that each gives, and whether the proof finds it.

    python tests/leaks.py --dataset=data/shakespeare_char --out=tests/results/leaks-cpu.json

Each mixer in LEAKS is attention plus a leak of a line or two. For each, trains a small network for 300 steps despite
the leak, and prints its validation loss and the result of the proof. Some leaks depend on the token or on the
mode, so the validation loss is computed as in train.py, in evaluation mode without gradients.
"""
import json
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from configurator import configure, explain_errors, yield_if_busy

yield_if_busy()
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.causality import find_leak
from data.tokens import Split, dataset_folder
from model import GPT, MIXERS, CausalSelfAttention, GPTConfig

dataset = 'shakespeare_char' # a folder in data/, or a path with a slash
iters = 300 # training steps per mixer
block_size = 128
n_layer = 1
n_embd = 64
batch_size = 16
learning_rate = 4e-3
seed = 1
only = '' # names of leaks, separated by commas, whose rows to measure again; empty: all
out = '' # JSON file for the raw numbers


class Leak(CausalSelfAttention):
    """Attention plus a linear layer on leak(self, x), one of LEAKS."""
    leak = None

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.c_leak = nn.Linear(config.n_embd, config.n_embd)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, *cache):
        return super().forward(x, *cache) + self.c_leak(self.leak(x))


def following(x):
    """The next token at each position."""
    return F.pad(x[:, 1:], (0, 0, 0, 1))


def end_of_chunk(size):
    """The last token of each chunk sees the first token of the next chunk."""
    def leak(self, x):
        ends = torch.arange(1, x.size(1) + 1, device=x.device) % size == 0
        return following(x) * ends[:, None]
    return leak


def last_but_one(self, x):
    return following(x) * (torch.arange(x.size(1), device=x.device) == x.size(1) - 2)[:, None]


def own_block(self, x):
    T = x.size(1)
    x = F.pad(x, (0, 0, 0, -T % 16)).unflatten(1, (-1, 16)) # (B, T/16, 16, C)
    return x.mean(2, keepdim=True).expand_as(x).flatten(1, 2)[:, :T]


def circular_convolution(self, x):
    decay = torch.linspace(0, 30, x.size(1), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    spectrum = torch.fft.rfft(x.to(decay.dtype), dim=1) * torch.fft.rfft(decay.neg().exp())[:, None]
    return torch.fft.irfft(spectrum, n=x.size(1), dim=1).to(x.dtype)


def norm_over_time(self, x):
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, correction=0) + 1e-5)


def chosen(self, x):
    """Selects half of the tokens: whether one is selected depends on those after it."""
    lowest = x[..., 0].topk(-(-x.size(1) // 2), dim=1)[0][:, -1:]
    return x * (x[..., 0] >= lowest)[..., None]


def fast_path(self, x, fast):
    """The mean of the tokens so far; the fast path lacks the mask and takes all tokens."""
    count = torch.arange(1, x.size(1) + 1, device=x.device)[:, None]
    return x.mean(1, keepdim=True).expand_as(x) if fast else x.cumsum(1) / count


def of_last_call(self, x):
    before, self.before = self.__dict__.get('before'), x.detach()
    return before if before is not None and before.shape == x.shape else torch.zeros_like(x)


LEAKS = { # name: what the mixer adds to attention
    'none': lambda self, x: torch.zeros_like(x),
    'neighbour': lambda self, x: following(x),
    'ends of chunks of 16': end_of_chunk(16),
    'ends of chunks of 64': end_of_chunk(64),
    'ends of chunks of 96': end_of_chunk(96),
    'ends of chunks of 100': end_of_chunk(100),
    'every 37th position': end_of_chunk(37),
    'the last position': last_but_one,
    'mean of the own block': own_block,
    'wrap-around by roll': lambda self, x: x.roll(1, 1),
    'circular convolution by FFT': circular_convolution,
    'norm over time': norm_over_time,
    'tokens chosen by top-k': chosen,
    'a leak of 1e-6': lambda self, x: 1e-6 * following(x),
    'in evaluation only': lambda self, x: fast_path(self, x, not self.training),
    'without gradients only': lambda self, x: fast_path(self, x, not torch.is_grad_enabled()),
    'detached': lambda self, x: following(x).detach(),
    'in training mode only': lambda self, x: fast_path(self, x, self.training),
    'behind zeros': lambda self, x: following(x), # c_leak starts at zero
    'behind a scale that starts at one': lambda self, x: (1 - self.scale) * following(x),
    'through a sort': lambda self, x: x.sort(dim=1)[0],
    'through the batch': lambda self, x: x.roll(1, 0),
    'state from batch to batch': of_last_call,
    'only where the token is a line end': lambda self, x: following(x) * (self.ids == self.line_end).unsqueeze(2),
}


def network(name, line_end=0, **settings):
    """A GPT whose mixer has this leak."""
    MIXERS['leak'] = type('Leak', (Leak,), dict(leak=LEAKS[name]))
    model = GPT(GPTConfig(mixer='leak', **settings))
    for block in model.transformer.h:
        block.attn.line_end = line_end
        if name == 'behind zeros':
            nn.init.zeros_(block.attn.c_leak.weight)

    def show_ids(module, args):
        for block in model.transformer.h:
            block.attn.ids = args[0]
    model.transformer.wte.register_forward_pre_hook(show_ids)
    return model


def train(model, split):
    """Trains as nanoGPT does, for `iters` steps."""
    opt = model.configure_optimizers(0.1, learning_rate, (0.9, 0.99), 'cpu')
    for step in range(iters):
        for group in opt.param_groups:
            group['lr'] = learning_rate * min(1.0, (step + 1) / 30) * (1 - 0.9 * step / iters)
        x, y = map(torch.from_numpy, split.batch(step * batch_size, batch_size, block_size, seed=seed))
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)


@torch.no_grad()
def mean_loss(model, split):
    losses = [model(*map(torch.from_numpy, batch))[1] for batch in split.fixed_batches(20 * batch_size, batch_size,
                                                                                      block_size)]
    return torch.stack(losses).mean().item()


def measure(name, splits):
    settings = dict(block_size=block_size, vocab_size=splits['train'].meta['vocab_size'], n_layer=n_layer, n_head=4,
                    n_embd=n_embd)
    line_end = splits['train'].meta.get('characters', '\n').index('\n')
    torch.manual_seed(seed)
    model = network(name, line_end, **settings)
    windows = torch.from_numpy(splits['train'].batch(0, 2 * batch_size, block_size, seed=seed)[0])
    proof = find_leak(model, windows)
    train(model, splits['train'])
    model.eval()
    train_loss, val_loss = (mean_loss(model, splits[split]) for split in ('train', 'val'))
    return dict(leak=name, train_loss=train_loss, val_loss=val_loss, proof=proof.leak or 'proven',
                ms=round(1000 * proof.seconds))


if __name__ == '__main__':
    settings = configure(globals())
    explain_errors()
    folder = dataset_folder(dataset)
    splits = {name: Split(folder, name) for name in ('train', 'val')}
    rows = json.loads(Path(out).read_text(encoding='utf-8'))['rows'] if only and out else []
    for name in only.split(',') if only else LEAKS:
        rows = [row for row in rows if row['leak'] != name] + [measure(name, splits)]
        print('| {leak} | {val_loss:.3f} | {proof} |'.format(**rows[-1]), flush=True)
    if out:
        rows.sort(key=lambda row: [*LEAKS].index(row['leak']))
        found = dict(torch=torch.__version__, threads=torch.get_num_threads(), config=settings.config, rows=rows)
        Path(out).write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
