"""
The proof that a network is causal: no output sees a later token.

A row of text is cut: the tokens after the cut are replaced, and every output up to it must stay as it is, to the last
bit. A leak from position s to position t < s shows at each cut in between, and at no other, so a proof takes all T - 1
cuts, each in a row of its own: two rows differ first at one place, so no fewer rows can do. They go through the network
together, as the rows of a batch, once as evaluation runs it and once as the training step does.

What depends on anything but the tokens so far is found by the same passes: a mixer that draws random numbers in
evaluation, that keeps something from call to call, or that looks at the other rows of the batch.
"""
import itertools
import math
import random
import re
import time
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from model import MLP, Block, Mixer, TimeMixing, UNet, own_settings

MODES = 'evaluation', 'training'


class Proof(NamedTuple):
    leak: str | None # what was found, in words
    T: int # tokens in a row
    cuts: int # looked at, of T - 1
    noise: float # smaller changes are a kernel's rounding, which is not the same each time
    seconds: float

    @property
    def words(self):
        if self.leak:
            return f'NO: {self.leak}'
        whole = self.cuts == self.T - 1
        words = f'proven at T={self.T:,}' if whole else f'no leak at {self.cuts:,} of {self.T - 1:,} cuts'
        return f'{words}, to {self.noise:.0e}' if self.noise else words

    def __str__(self):
        return self.words if self.leak else f'{self.words} in {1000 * self.seconds:,.0f} ms'


def find_leak(model, windows, rows=None, compiled=None, seconds=math.inf, passes=math.inf):
    """
    -> Proof. windows (N, T): real text, N at least twice the rows (default N / 2) of a batch. compiled: the modules
    that evaluate and that train, in this order, if they are compiled. All cuts are looked at if that takes no longer
    than `seconds`, and 2% of a run of so many forward passes, though always 10 seconds; else those where chunks may end,
    then others at random. The model is as before afterwards.
    """
    t0, T = time.perf_counter(), windows.size(1)
    rows = rows or max(1, len(windows) // 2)
    cuts, was_training = order_of_cuts(model.config, T), model.training
    torch.manual_seed(0) # several processes do the same
    with disturbed(model):
        # the eager network may take more memory than the compiled one
        search = Search(model, windows, max(1, rows // 4) if compiled else rows, seconds, passes)
        leak, looked = search.find_change(cuts)
        leak = leak or search.find_gradient(cuts[1:9] + cuts[-8:] if looked == T else cuts[1:5])
        if not leak:
            whole = Search(model, windows, rows if compiled else min(4, rows), seconds if compiled else 0, passes)
            leak, seen = whole.find_change_of_loss(cuts, compiled or (model, model))
            looked = min(looked, seen) if compiled else looked
            search.noise |= {'loss': max(whole.noise.values())}
    model.train(was_training)
    return Proof(leak, T, looked - 1, max(search.noise.values()), time.perf_counter() - t0)


def order_of_cuts(config, T):
    """
    All cuts, the likeliest ends of chunks first: cut c keeps position c and replaces what comes after. The first one
    keeps everything: with it the last position is looked at, too.
    """
    declared = {getattr(config, name) for cls in config.mixers() for name in own_settings(cls)}
    declared |= set(config.unet_levels()[2]) if config.unet_layers else set()
    sizes = {2 ** k for k in range(4, T.bit_length())} | {n for n in declared if type(n) is int and 2 <= n < T}
    draw, cuts = random.Random(0), [T - 1, 0, T - 2]
    for size in sorted(sizes, reverse=True):
        starts = list(range(size, T, size))
        draw.shuffle(starts)
        cuts += [start + d for start in starts for d in (-1, -2, 0)]
    return list(dict.fromkeys(c for c in cuts + draw.sample(range(T), T) if 0 <= c < T))


@contextmanager
@torch.no_grad()
def disturbed(model):
    """
    Meanwhile every weight that trains is a little off, since a leak may hide behind one that starts at zero or one.
    Then weights and buffers are as before.
    """
    local = [getattr(t, 'to_local', lambda t=t: t)() for t in model.parameters()] # a sharded one's own part
    before = [(t, t.clone()) for t in [*local, *model.buffers()]]
    for own, p in zip(local, model.parameters()):
        if p.requires_grad: # a constant, such as a mask, may be a parameter, too
            own += 0.02 * torch.randn_like(own)
    try:
        yield
    finally:
        for t, old in before:
            t.copy_(old)


def agreed(t):
    """The tensor of the first process, so that all decide alike: what one does alone would wait for the others."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(t, 0)
    return t


def gap(a, b):
    """By how much two outputs differ at each position: (..., C) -> (...). What is not a number is like its like."""
    same = (a == b) | (a.isnan() & b.isnan())
    return agreed((a - b).abs().nan_to_num(math.inf, math.inf).masked_fill(same, 0.0).amax(-1).float())


class Search:
    """Passes of rows of windows through a network, and what they show."""
    def __init__(self, model, windows, rows, seconds, passes):
        self.model, self.seconds, self.passes = model, seconds, passes
        self.windows, self.idx = windows, windows[:rows]
        self.rows, self.T, self.device = len(self.idx), windows.size(1), windows.device
        self.positions = torch.arange(self.T, device=self.device)
        self.seeds = itertools.count(1)
        self.noise = dict.fromkeys(MODES, 0.0)

    # -----------------------------------------------------------------------------------------------------------------
    # Passes

    def run(self, mode, call, *inputs):
        """The output of call(*inputs): in evaluation after another seed each time, in training after the same."""
        training = mode == 'training'
        self.model.train(training)
        seed = 0 if training else next(self.seeds)
        for set_seed in torch.manual_seed, random.seed, np.random.seed:
            set_seed(seed)
        before = [b.clone() for b in self.model.buffers()]
        with torch.set_grad_enabled(training):
            y = call(*inputs)
        if training: # it may count, or average, what it sees
            with torch.no_grad():
                for b, old in zip(self.model.buffers(), before):
                    b.copy_(old)
        return y.detach()

    def hidden(self, mode, idx):
        return self.run(mode, self.model.hidden, idx)

    def loss(self, mode, forward, idx, targets):
        """(1,): a copy, since a CUDA graph's next run overwrites it."""
        if forward is not self.model: # no backward pass follows, which CUDA graphs would wait for
            torch.compiler.cudagraph_mark_step_begin()
        return self.run(mode, lambda: forward(idx, targets)[1])[None].clone()

    def changed(self, cuts, k=0):
        """Rows with the tokens of other windows after their cuts, none of which is what it was."""
        V, other = self.model.config.vocab_size, self.windows.roll(-self.rows - k, 0)[:self.rows]
        other = torch.where(other == self.idx, (other + 1) % V, other)
        return torch.where(self.positions > cuts[:, None], other, self.idx)

    def parts(self, cuts):
        """Yields cuts as tensors (rows,), and stops when the time is up."""
        parts = [cuts[i:i + self.rows] for i in range(0, len(cuts), self.rows)]
        t0 = time.perf_counter()
        for k, part in enumerate(parts):
            yield torch.tensor(part + [self.T - 1] * (self.rows - len(part)), device=self.device)
            if k == 0 and self.seconds < math.inf:
                took = agreed(torch.tensor(time.perf_counter() - t0, device=self.device)).item()
                share = max(10.0, 0.02 * self.passes * took / len(MODES))
                del parts[1 + int(min(self.seconds, share) / took):]

    # -----------------------------------------------------------------------------------------------------------------
    # What an output depends on

    def find_change(self, cuts):
        """-> (what was found, how many cuts were looked at)."""
        before = [(name, t, t.clone()) for name, t in named_tensors(self.model)]
        self.base = {'evaluation': self.hidden('evaluation', self.idx)}
        for name, t, old in before:
            differs = (t != old) & ~(t.isnan() & old.isnan())
            if agreed(differs.any().to(torch.uint8)):
                return f"evaluation changes {name}", 0
        del before
        self.base['training'] = self.hidden('training', self.idx)
        looked = 0
        for k, part in enumerate(self.parts(cuts)):
            changed = self.changed(part, k)
            for mode in MODES: # in turn: what one leaves behind must not reach the other
                found = gap(self.hidden(mode, changed), self.base[mode])
                if self.beyond_noise(mode, found, part).any():
                    leak = self.explain(mode, found, part, changed)
                    if leak:
                        return leak, looked
            looked = min(len(cuts), looked + self.rows)
        return None, looked

    def beyond_noise(self, mode, found, cuts):
        return (found > self.noise[mode]) & (self.positions <= cuts[:, None])

    def limit(self, base):
        """How far rounding alone may take two equal passes apart."""
        kind = base.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
        eps = torch.finfo(dtype).eps
        if dtype == torch.float32: # where it is multiplied as TF32
            eps = 2 ** -10 if kind == 'cuda' else 8 * eps
        return 4 * eps * base.abs().nan_to_num(0.0, 0.0, 0.0).max().item()

    def learn_noise(self, mode, again, base):
        """Whether equal passes are equal but for rounding, which then counts as noise."""
        apart = max(gap(again(), base).max().item() for _ in range(3))
        if apart <= self.limit(base):
            self.noise[mode] = max(self.noise[mode], 4 * apart)
            return True
        return False

    def explain(self, mode, found, cuts, changed):
        """What is wrong where outputs were found changed, in words; None if it was a kernel's rounding."""
        again, base = (lambda: self.hidden(mode, self.idx)), self.base[mode]
        if not self.learn_noise(mode, again, base):
            return (f"two equal passes in {mode} differ, first in {self.name(mode, self.idx, changed)}: it draws "
                    "random numbers, or keeps something from call to call")
        wrong = self.beyond_noise(mode, found, cuts)
        if not wrong.any():
            return None
        row = int(torch.where(wrong.any(1), cuts, self.T).argmin()) # most of it was replaced
        c, alone, rest = int(cuts[row]), self.idx.clone(), self.changed(torch.full_like(cuts, -1))
        alone[row], rest[row] = changed[row], self.idx[row] # the row's future alone, and all other rows alone

        def seen(mode, idx):
            """Which positions up to the cut change with idx."""
            apart = gap(self.hidden(mode, idx), self.base[mode])[row, :c + 1]
            return (apart > self.noise[mode]).nonzero().flatten().tolist()
        by_future = seen(mode, alone)
        by_rows = [] if by_future else seen(mode, rest)
        if not by_future and not by_rows:
            return f"an output in {mode} changes with what other calls were given"
        cause = alone if by_future else rest
        elsewhere = MODES[mode == 'evaluation']
        only = '' if seen(elsewhere, cause) else f", in {mode} alone"
        where = f"first in {self.name(mode, self.idx, cause, row, c)}{only}"
        if by_rows:
            return f"position {by_rows[0]} of a row sees the other rows of the batch, {where}"
        t, s, end = by_future[0], c, self.T - 1
        while end - s > 1: # the last position that it sees
            middle = (s + end) // 2
            later = self.idx.clone()
            later[row, middle + 1:] = changed[row, middle + 1:]
            s, end = (middle, end) if t in seen(mode, later) else (s, middle)
        size = gap(self.hidden(mode, alone), base)[row, t].item()
        tiny = f": a change of {size:.0e}" if size <= self.limit(base) else ''
        return f"position {t} sees position {s + 1}, {where}{tiny}"

    def trace(self, mode, idx, row):
        """-> [(name of a module, input, output)] of a pass, in the order in which they end; row: of this row alone."""
        done = []
        rows = slice(None) if row is None else slice(row, row + 1)
        def keep(name):
            def hook(module, args, y):
                x = args[0] if args else y[:, :0]
                done.append((name, x.detach()[rows].clone(), y.detach()[rows].clone()))
            return hook
        with hooked(self.model, keep):
            self.hidden(mode, idx)
        return done

    def name(self, mode, idx, other, row=None, c=None):
        """The first module whose output changes from idx to other up to the cut, while its input does not."""
        first = self.trace(mode, idx, row)
        second = self.trace(mode, other, row)
        if row is None: # after another pass the same one again
            second = self.trace(mode, idx, row)
        for (name, x, y), (_, x2, y2) in zip(first, second):
            n = y.size(1) if c is None else self.length_at(name, c)
            noise = self.noise[mode] if row is not None else 0.0
            if not (gap(x[:, :n], x2[:, :n]) > noise).any() and (gap(y[:, :n], y2[:, :n]) > noise).any():
                return name
        return 'GPT itself'

    def length_at(self, name, c):
        """How many outputs of a module may be compared at cut c: inside a UNet, token i stands for those up to i f."""
        level = re.match(r'(transformer\.h(\.inner)*)?', name)[0].count('inner')
        return c // math.prod(self.model.config.unet_levels()[2][:level]) + 1

    # -----------------------------------------------------------------------------------------------------------------
    # Gradients show what is too small to change a rounded output

    def find_gradient(self, cuts):
        for i in range(0, len(cuts), self.rows):
            part = torch.tensor(cuts[i:i + self.rows], device=self.device)
            later = self.gradient_of_future(part)
            if later.any():
                row, s = divmod(int(later.argmax()), self.T)
                names = [name for name, _, _ in self.trace('training', self.idx, 0)]
                first = next((name for name in names if self.gradient_of_future(part, name, 'output').any() and not
                              self.gradient_of_future(part, name, 'input').any()), 'GPT itself')
                return (f"a position up to {int(part[row])} sees position {s}, first in {first}: a gradient of "
                        f"{later.max():.0e}")
        return None

    def gradient_of_future(self, cuts, name='', side=''):
        """(rows, T): how outputs up to each cut, of the network or of a module, depend on each later token."""
        seen = {}

        def embed(module, args, y):
            seen['x'] = y.detach().requires_grad_()
            return seen['x']

        def keep(module_name):
            def hook(module, args, y):
                if module_name == name:
                    seen['y'] = y if side == 'output' else args[0]
            return hook

        def call(idx):
            last = self.model.hidden(idx)
            y = seen.get('y', last)
            ends = torch.tensor([self.length_at(name, int(c)) for c in cuts], device=self.device)
            up_to = torch.arange(y.size(1), device=self.device) < ends[:, None]
            total = (y * torch.randn_like(y) * up_to[..., None]).sum() # at random: else a norm has none
            total = total + 0.0 * last.sum() # sharded weights are gathered where a backward pass begins at the end
            return torch.autograd.grad(total, seen['x'], materialize_grads=True)[0]
        hook = self.model.transformer.wte.register_forward_hook(embed)
        try:
            with hooked(self.model, keep):
                grad = self.run('training', call, self.idx[:len(cuts)])
        finally:
            hook.remove()
        later = self.positions > cuts[:, None]
        return agreed((grad.abs().amax(-1).nan_to_num(0.0, 0.0, 0.0) * later).float())

    # -----------------------------------------------------------------------------------------------------------------
    # The loss alone, which is all that a compiled network gives

    def find_change_of_loss(self, cuts, forwards):
        looked = 0
        for mode, forward in zip(MODES, forwards): # compiles
            self.loss(mode, forward, self.idx, self.idx.clone()) # as in a step: not one tensor for both
        for k, part in enumerate(self.parts(cuts)):
            changed = self.changed(part, k)
            targets = torch.where(self.positions == part[:, None], self.idx, -1) # at the cuts: each has its row
            for mode, forward in zip(MODES, forwards):
                def differs(targets):
                    a, b = (self.loss(mode, forward, idx, targets) for idx in (self.idx, changed))
                    return a, gap(a, b).item() > self.noise[mode]
                a, found = differs(targets)
                if not found:
                    continue
                if not self.learn_noise(mode, lambda: self.loss(mode, forward, self.idx, targets), a):
                    return f"two equal passes differ in the loss of {mode}, though no module's outputs do", looked
                if not differs(targets)[1]:
                    continue
                each = torch.arange(self.rows, device=self.device)[:, None]
                row = next((r for r in range(self.rows) if differs(targets.where(each == r, -1))[1]), 0)
                c = int(part[row])
                return (f"the loss of {mode} at position {c} changes with the tokens after it, though no module's "
                        "outputs do: what is compiled computes something else"), looked
            looked = min(len(cuts), looked + self.rows)
        return None, looked


def named_tensors(model):
    return [(name, getattr(t, 'to_local', lambda t=t: t)()) for name, t in [*model.named_parameters(),
                                                                            *model.named_buffers()]]


@contextmanager
def hooked(model, make_hook):
    """Meanwhile each module that may mix tokens calls make_hook(its name)(module, args, output)."""
    kinds = Mixer, TimeMixing, MLP, Block, UNet
    hooks = [module.register_forward_hook(make_hook(f'{name} ({type(module).__name__.removeprefix("FSDP")})'))
             for name, module in model.named_modules() if isinstance(module, kinds)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
