"""
The proof that a network is causal: no output sees a later token.

A row of text is cut: the tokens after the cut are replaced, and every output up to the cut must stay the same, bit for
bit. If position t sees a later position s, this shows at the cuts between t and s and at no others. So a proof needs
all T - 1 cuts, each in its own row; fewer rows cannot do, since two rows first differ at only one place. The rows run
through the network as a batch, once in evaluation mode and once in training mode, as the training step runs it.

The same passes find outputs that depend on anything but the tokens so far: a mixer that draws random numbers in
evaluation, that keeps state from call to call, or that looks at other rows of the batch. Last, a text is read in pieces
through a cache, as generation does: if the outputs differ, losses are still valid, but samples are not.
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

from model import MLP, Block, Cache, Mixer, ShortConv, TimeMixing, UNet, own_settings

MODES = 'evaluation', 'training'
NOT_FINITE = 'some of its outputs are not finite numbers, and hide what they depend on'


class Proof(NamedTuple):
    leak: str | None # description of the leak
    T: int # tokens per row
    cuts: int # number of cuts tested, of T - 1
    noise: float # smaller changes are rounding by kernels that are not deterministic
    seconds: float
    decoding: str = '' # what is wrong with it

    @property
    def words(self):
        if self.leak:
            return f'NO: {self.leak}'
        whole = self.cuts == self.T - 1
        words = f'proven at T={self.T:,}' if whole else f'no leak at {self.cuts:,} of {self.T - 1:,} cuts'
        return f'{words}, to {self.noise:.0e}' if self.noise else words

    def __str__(self):
        return self.words if self.leak else f'{self.words} in {1000 * self.seconds:,.0f} ms'

    @property
    def warnings(self):
        return [f'warning: samples will be wrong or fail: {self.decoding}'] if self.decoding else []


def find_leak(model, windows, rows=None, compiled=None, seconds=math.inf, passes=math.inf):
    """
    Returns a Proof. windows (N, T): real text, N at least twice the rows (default N / 2) of a batch. compiled: the
    modules for evaluation and for training, if they are compiled. Tests all cuts if that takes at most `seconds` and at
    most 2% of a run of `passes` forward passes (but 10 seconds are always allowed); otherwise those where chunks may
    end, then random ones. They are tested with slightly disturbed weights, and the first few with the weights as they
    are, as either may hide a leak. Afterwards the model is unchanged.
    """
    t0, T = time.perf_counter(), windows.size(1)
    rows = rows or max(1, len(windows) // 2)
    cuts, was_training = order_of_cuts(model.config, T), model.training
    noise, few, decoding = 0.0, min(4, rows), ''

    def look():
        """(leak, number of cuts tested, noise), with the weights of now"""
        # the eager network may need more memory than the compiled one
        search = Search(model, windows, max(1, rows // 4) if compiled else rows, seconds, passes)
        leak, looked = search.find_change(cuts)
        leak = leak or search.find_gradient(cuts[1:9] + cuts[-8:] if looked == T else cuts[1:5])
        if leak:
            return leak, looked, 0.0
        whole = Search(model, windows, rows if compiled else few, seconds if compiled else 0, passes)
        leak, seen = whole.find_change_of_loss(cuts, compiled or (model, model))
        return leak, min(looked, seen) if compiled else looked, max(*search.noise.values(), *whole.noise.values())

    leak, looked = Search(model, windows, few, 0, passes).find_change(cuts)
    for scale in [] if leak else [0.02, 0.002, 0.0]: # less where a weight leaves the domain of a root or a logarithm
        with disturbed(model, scale):
            leak, looked, noise = look()
            decoding = '' if leak else Search(model, windows, 1, 0, passes).find_wrong_decoding()
        if leak != NOT_FINITE:
            break
    model.train(was_training)
    return Proof(leak, T, looked - 1, noise, time.perf_counter() - t0, decoding)


def order_of_cuts(config, T):
    """
    All cuts, the likeliest ends of chunks first. Cut c keeps position c and replaces everything after it. The first cut
    keeps everything, so that the last position is tested too.
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
def disturbed(model, scale):
    """
    Context in which every trainable weight is slightly perturbed: a leak may hide behind a weight that starts at zero
    or one. On exit, weights and buffers are restored.
    """
    torch.manual_seed(0) # the same in all processes
    drop_gathered(model)
    before = [(t, t.clone()) for _, t in named_tensors(model)] # the parameters first
    for (own, _), p in zip(before, model.parameters()):
        if p.requires_grad: # constants such as masks may be parameters too
            own += scale * torch.randn_like(own)
    try:
        yield
    finally:
        for t, old in before:
            t.copy_(old)
        drop_gathered(model)


def drop_gathered(model):
    """Frees the whole weights that FSDP keeps after a forward pass that no backward pass followed."""
    for module in model.modules():
        if hasattr(module, 'reshard'):
            module.reshard()


def agreed(t):
    """Broadcasts rank 0's tensor, so that all processes decide alike and none waits for the others forever."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(t, 0)
    return t


def gap(a, b):
    """Largest difference of two outputs at each position: (..., C) -> (...). Two NaNs count as equal."""
    same = (a == b) | (a.isnan() & b.isnan())
    return agreed((a - b).abs().nan_to_num(math.inf, math.inf).masked_fill(same, 0.0).amax(-1).float())


class Search:
    """Runs rows of windows through a network and compares the outputs."""
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
        """The output of call(*inputs), with a new seed each time in evaluation and the same seed in training."""
        training = mode == 'training'
        self.model.train(training)
        seed = 0 if training else next(self.seeds)
        for set_seed in torch.manual_seed, random.seed, np.random.seed:
            set_seed(seed)
        before = [b.clone() for b in self.model.buffers()]
        with torch.set_grad_enabled(training):
            y = call(*inputs)
        if training: # buffers may hold counts or running averages
            with torch.no_grad():
                for b, old in zip(self.model.buffers(), before):
                    b.copy_(old)
        return y.detach()

    def hidden(self, mode, idx):
        return self.run(mode, self.model.hidden, idx)

    def loss(self, mode, forward, idx, targets):
        """The loss, (1,)"""
        return self.run(mode, lambda: forward(idx, targets)[1])[None]

    def changed(self, cuts, k=0):
        """The rows, in which every token after the cut is replaced by a different token from another window."""
        V, other = self.model.config.vocab_size, self.windows.roll(-self.rows - k, 0)[:self.rows]
        other = torch.where(other == self.idx, (other + 1) % V, other)
        return torch.where(self.positions > cuts[:, None], other, self.idx)

    def parts(self, cuts):
        """Yields the cuts as tensors (rows,), until the time is up."""
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
        """Returns (description of the leak or None, number of cuts tested)."""
        before = [(name, t, t.clone()) for name, t in named_tensors(self.model)]
        self.base = {'evaluation': self.hidden('evaluation', self.idx)}
        for name, t, old in before:
            differs = (t != old) & ~(t.isnan() & old.isnan())
            if agreed(differs.any().to(torch.uint8)):
                return f"evaluation changes {name}", 0
        del before
        self.base['training'] = self.hidden('training', self.idx)
        if agreed(torch.stack([~y.isfinite().all() for y in self.base.values()]).to(torch.uint8)).any():
            return NOT_FINITE, 0
        looked = 0
        for k, part in enumerate(self.parts(cuts)):
            changed = self.changed(part, k)
            for mode in MODES: # alternating: state left by one mode must not affect the other
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
        """The largest difference between two equal passes that rounding can explain."""
        kind = base.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
        eps = torch.finfo(dtype).eps
        if dtype == torch.float32: # a GPU may multiply it as TF32
            eps = 2 ** -10 if kind == 'cuda' else 8 * eps
        return 4 * eps * base.abs().nan_to_num(0.0, 0.0, 0.0).max().item()

    def learn_noise(self, mode, again, base):
        """Whether equal passes agree up to rounding, which is then recorded as noise."""
        apart = max(gap(again(), base).max().item() for _ in range(3))
        if apart <= self.limit(base):
            self.noise[mode] = max(self.noise[mode], 4 * apart)
            return True
        return False

    def explain(self, mode, found, cuts, changed):
        """Describes why the outputs changed; None if it was only rounding."""
        again, base = (lambda: self.hidden(mode, self.idx)), self.base[mode]
        if not self.learn_noise(mode, again, base):
            return (f"two equal passes in {mode} differ, first in {self.name(mode, self.idx, changed)}: it draws "
                    "random numbers, or keeps something from call to call")
        wrong = self.beyond_noise(mode, found, cuts)
        if not wrong.any():
            return None
        row = int(torch.where(wrong.any(1), cuts, self.T).argmin()) # the row with the earliest cut
        c, alone, rest = int(cuts[row]), self.idx.clone(), self.changed(torch.full_like(cuts, -1))
        alone[row], rest[row] = changed[row], self.idx[row] # only this row's future; only the other rows

        def seen(mode, idx):
            """The positions up to the cut whose outputs change with idx."""
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
        while end - s > 1: # bisect for the last position that it sees
            middle = (s + end) // 2
            later = self.idx.clone()
            later[row, middle + 1:] = changed[row, middle + 1:]
            s, end = (middle, end) if t in seen(mode, later) else (s, middle)
        size = gap(self.hidden(mode, alone), base)[row, t].item()
        tiny = f": a change of {size:.0e}" if size <= self.limit(base) else ''
        return f"position {t} sees position {s + 1}, {where}{tiny}"

    def trace(self, mode, idx, row):
        """Returns [(module name, input, output)] of a pass, in the order in which modules end; row: only this row."""
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
        """The first module whose output up to the cut differs between idx and other although its input does not."""
        first = self.trace(mode, idx, row)
        second = self.trace(mode, other, row)
        if row is None: # the same input again, after a different pass
            second = self.trace(mode, idx, row)
        for (name, x, y), (_, x2, y2) in zip(first, second):
            n = y.size(1) if c is None else self.length_at(name, c)
            noise = self.noise[mode] if row is not None else 0.0
            if not (gap(x[:, :n], x2[:, :n]) > noise).any() and (gap(y[:, :n], y2[:, :n]) > noise).any():
                return name
        return 'GPT itself'

    def length_at(self, name, c):
        """Number of a module's outputs to compare at cut c: inside a UNet, coarse token i covers those up to i * f."""
        level = re.match(r'(transformer\.h(\.inner)*)?', name)[0].count('inner')
        return c // math.prod(self.model.config.unet_levels()[2][:level]) + 1

    def find_wrong_decoding(self):
        """How outputs of a text read in pieces differ from those of the whole, beyond rounding; '' if they do not."""
        n = self.T // 2

        def read(idx):
            cache = Cache()
            pieces = [piece for piece in idx.tensor_split((n, n + 1), dim=1) if piece.size(1)]
            return torch.cat([self.model.hidden(piece, cache) for piece in pieces], dim=1)
        with torch.autocast(self.device.type, enabled=False):
            try:
                whole = self.hidden('evaluation', self.idx)
            except Exception: # a mixer may need autocast, and only then pass
                return ''
            # other embeddings, so that what rounds to TF32 or to 16 bits on the way rounds otherwise
            hook = self.model.transformer.wte.register_forward_hook(
                lambda module, args, y: y + 5e-5 * y * torch.randn_like(y))
            rounding = gap(self.hidden('evaluation', self.idx), whole).max()
            hook.remove()
            try:
                found = gap(self.run('evaluation', read, self.idx), whole).amax(0)
            except Exception as e: # of the mixer, which trains all the same
                return f"read in pieces of {n}, 1 and {self.T - n - 1} tokens, it ends in {type(e).__name__}: {e}"
        most = whole.abs().max().item()
        wrong = (found > 20 * rounding + 1e-4 * most).nonzero()
        if not len(wrong):
            return ''
        t = int(wrong[0])
        return (f"read in pieces, the output at position {t} is off by {found[t]:.1g} (outputs are up to {most:.1g}): "
                "a mixer's forward does not use its cache as it should, or depends on the length of the text")

    # -----------------------------------------------------------------------------------------------------------------
    # Gradients reveal leaks that are too small to change a rounded output

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
        """(rows, T): how strongly outputs up to each cut, of the network or a module, depend on each later token."""
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
            total = (y * torch.randn_like(y) * up_to[..., None]).sum() # random: a norm's plain sum has no gradient
            total = total + 0.0 * last.sum() # FSDP gathers weights only if the backward pass starts here
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
    # The loss only, since a compiled network returns nothing else

    def find_change_of_loss(self, cuts, forwards):
        looked = 0
        for mode, forward in zip(MODES, forwards): # compiles
            self.loss(mode, forward, self.idx, self.idx.clone()) # two tensors, as in a training step
        for k, part in enumerate(self.parts(cuts)):
            changed = self.changed(part, k)
            targets = torch.where(self.positions == part[:, None], self.idx, -1) # only at the cuts, one per row
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
    """Names and tensors of parameters and buffers; of a shard the local part."""
    return [(name, getattr(t, 'to_local', lambda t=t: t)()) for name, t in [*model.named_parameters(),
                                                                            *model.named_buffers()]]


@contextmanager
def hooked(model, make_hook):
    """Context in which each module that may mix tokens calls make_hook(its name)(module, args, output)."""
    kinds = Mixer, TimeMixing, ShortConv, MLP, Block, UNet
    hooks = [module.register_forward_hook(make_hook(f'{name} ({type(module).__name__.removeprefix("FSDP")})'))
             for name, module in model.named_modules() if isinstance(module, kinds)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
