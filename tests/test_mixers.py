"""
The mixers' contract, checked for every entry of MIXERS by itself, in float64 with all weights random (weights that
start at zero hide leaks): no output sees a later token, prefixes and any chunks of a sequence give the numbers of the
whole, every parameter learns and is in one optimizer group. The same at a length of 263, for what works in chunks, and
in training mode; and each optimizer, 16 bits and a saved checkpoint. Then the checks against broken networks, which
they must refuse, and each mixer against its definition written as loops over positions.

Someone's new mixer needs no test: an entry in MIXERS or a file in config/mixers/ is enough, and a line in OPTIONS for
settings of its own. One anywhere: python -m pytest tests/test_mixers.py --mixer=PATH
"""

import itertools
import math
import os
import random
import re
import runpy
import shutil
from dataclasses import asdict, replace

import pytest
import torch
import torch._inductor.config
import torch.nn as nn

import leaks
from data.causality import find_leak, order_of_cuts
from data.checkpoints import load_model, save_checkpoint
from helpers import PROJECT, settings_of
from model import (GPT, MIXERS, MLP, Block, Cache, GPTConfig, MetaOperations, Mixer, ShortConv, Stack, TimeLinear,
                   TimeMixing, NO_CACHE, UNet, Window, cost, fused_attention, optimizer_groups, peak_bytes)

for path in sorted((PROJECT / 'config/mixers').glob('*.py')):
    settings_of(path) # its mixer is then in MIXERS
TESTED = list(MIXERS)
if 'MIXER' in os.environ: # the one of --mixer alone
    mixer = settings_of(os.environ['MIXER'])['mixer']
    TESTED = [mixer] if isinstance(mixer, str) else list(dict.fromkeys(mixer))

TOLERANCE = 1e-9 # the largest difference, in logits of size 1 to 10, that float64 rounding may make

# ---------------------------------------------------------------------------------------------------------------------
# The checks. They take a GPT (or its logits at every length), raise AssertionError where the contract is broken, and
# those that compare numbers return the largest difference.

def randomized(config, seed=0, model=None):
    torch.manual_seed(seed)
    model = (model or GPT(config)).double().eval()
    randomize(model)
    return model


def randomize(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.3)


def network(**args):
    return randomized(GPTConfig(**dict(block_size=7, vocab_size=11, n_layer=2, n_head=2, n_embd=8) | args))


def tokens(model, B):
    return torch.randint(model.config.vocab_size, (B, model.config.block_size))


@torch.no_grad()
def every_length(model):
    """-> logits (1 + T, T, V) at every length T: of random tokens, then of T copies, the t-th with another token t."""
    block_size = model.config.block_size
    idx = tokens(model, 1).repeat(1 + block_size, 1)
    for t in range(block_size):
        idx[1 + t, t] = (idx[1 + t, t] + 1) % model.config.vocab_size
    return [model(idx[:1 + T, :T])[0] for T in range(1, block_size + 1)]


def check_causal(outputs):
    """Changing token t changes no logits before t, for every t at every length; and it does change some from t on."""
    largest = 0.0
    for T, logits in enumerate(outputs, 1):
        change = (logits[1:] - logits[0]).abs().amax(dim=2) # (T, T): what token t (row) changes at each position
        leak = change.tril(-1)
        assert leak.max() < TOLERANCE, (f"at length {T}, token {leak.amax(1).argmax()} changes "
                                        f"the logits of position {leak.amax(0).argmax()} by {leak.max():.1e}")
        assert (change.triu().amax(1) > 1e-6).all(), f"at length {T}, a token changes nothing at all"
        largest = max(largest, leak.max().item())
    return largest


def check_prefixes(outputs):
    """The logits of a prefix are the first logits of the whole sequence."""
    largest = 0.0
    for T, logits in enumerate(outputs, 1):
        deviation = (logits - outputs[-1][:1 + T, :T]).abs().max().item()
        assert deviation < TOLERANCE, \
            f"the first {T} of {len(outputs)} tokens give logits that differ by {deviation:.1e}"
        largest = max(largest, deviation)
    return largest


@torch.no_grad()
def check_chunks(model):
    """Decoding with a cache, in any chunks, gives the logits of the whole sequence, even if beams change places."""
    idx = tokens(model, 2)
    T = idx.size(1)
    whole, _ = model(idx)
    largest = 0.0
    for chunks in ([T], [1] * T, random_chunks(T), random_chunks(T)):
        cache, rows, logits = Cache(), torch.arange(2), []
        for part in idx.split(chunks, dim=1):
            logits.append(model(part[rows], cache=cache)[0][rows])
            cache.reorder(torch.tensor([1, 0]))
            rows = rows.flip(0)
        deviation = (torch.cat(logits, dim=1) - whole).abs().max().item()
        assert deviation < TOLERANCE, \
            f"decoding in chunks of {chunks} tokens, with rows that change places, gives logits that differ by " \
            f"{deviation:.1e}"
        largest = max(largest, deviation)
    return largest


def random_chunks(T):
    chunks = []
    while sum(chunks) < T:
        chunks.append(int(torch.randint(1, T - sum(chunks) + 1, ())))
    return chunks


def check_gradients(model):
    """Every parameter gets a gradient: none that the forward pass forgets, none that is not a number."""
    model.zero_grad()
    model(tokens(model, 4), tokens(model, 4))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} gets no gradient"
        assert p.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert p.grad.any(), f"the gradient of {name} is zero"


def check_groups(model):
    """Every parameter is in one optimizer group; matrices of Linear and Embedding layers decay, and nothing else."""
    groups = {key: [name for name, _ in group] for key, group in optimizer_groups(model).items()}
    rest = groups.pop('rest')
    decayed = sum(groups.values(), [])
    assert sorted(decayed + rest) == sorted(name for name, _ in model.named_parameters())
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    for name, p in model.named_parameters():
        assert (name in decayed) == any(p is layer.weight for layer in layers), f"{name} is in the wrong group"


def check_contract(model):
    """All of the above -> the largest difference."""
    # the only token of a sequence has nothing to choose from: what a softmax compares has no gradient there
    if model.config.block_size > 2:
        check_gradients(model)
    check_groups(model)
    outputs = every_length(model)
    return max(check_causal(outputs), check_prefixes(outputs), check_chunks(model))


def check_at_length(model, seconds=math.inf):
    """What shorter sequences cannot show: a mixer may work in chunks, or differently in training mode."""
    idx = tokens(model, 64)
    proof = find_leak(model, idx, seconds=seconds)
    assert proof.leak is None, f"{proof.leak} ({idx.size(1)} tokens)"
    assert not proof.decoding, proof.decoding
    assert proof.cuts >= min(31 if seconds == 0 else math.inf, idx.size(1) - 1) and not proof.noise
    T, largest = idx.size(1), 0.0
    with torch.no_grad():
        whole, _ = model(idx[:2])
        for n in 17, T // 2, T - 1:
            deviation = (model(idx[:2, :n])[0] - whole[:, :n]).abs().max().item()
            assert deviation < TOLERANCE, f"the first {n} of {T} tokens give logits that differ by {deviation:.1e}"
            largest = max(largest, deviation)
        cache, chunks = Cache(), [T // 3 + 1, *[1] * 3, *random_chunks(T - T // 3 - 4)]
        logits = torch.cat([model(part, cache=cache)[0] for part in idx[:2].split(chunks, dim=1)], dim=1)
        deviation = (logits - whole).abs().max().item()
        assert deviation < TOLERANCE, f"decoding in chunks of {chunks} gives logits that differ by {deviation:.1e}"
    return max(largest, deviation)


def check_training(model):
    """A step of each optimizer moves every parameter; in bfloat16 the loss is the same but for rounding."""
    start, batch = {k: v.clone() for k, v in model.state_dict().items()}, (tokens(model, 4), tokens(model, 4))
    with torch.autocast('cpu', torch.bfloat16):
        rounded = model(*batch)[1]
        rounded.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), f"in bfloat16 {name} has no finite gradient"
    for optimizer in 'adamw', 'muon', 'sm3':
        model.load_state_dict(start)
        opt = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', optimizer)
        model.zero_grad()
        loss = model(*batch)[1]
        loss.backward()
        opt.step()
        for name, p in model.named_parameters():
            assert p.isfinite().all() and not torch.equal(p, start[name]), f"{optimizer} does not move {name}"
    assert (rounded - loss).abs() < 0.05, f"the loss is {loss:.4f}, and {rounded:.4f} in bfloat16"
    model.load_state_dict(start)
    with torch.no_grad(): # as sample.py holds it
        whole, cache = model.bfloat16()(batch[0])[0], Cache()
        logits = torch.cat([model(part, cache=cache)[0] for part in batch[0].split(3, dim=1)], dim=1)
    assert (logits - whole).abs().max() < 0.1 * (1 + whole.abs().max()), "in bfloat16 decoding differs"


def check_compiled(model, backend):
    """torch.compile makes one graph of the whole model, and gives the same loss and gradients."""
    idx, targets = tokens(model, 2), tokens(model, 2)
    results = []
    for forward in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        loss = forward(idx, targets)[1]
        loss.backward()
        results.append([loss] + [p.grad.clone() for p in model.parameters()])
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-6 # the loss is float32


def check_round_trip(model, path):
    """A saved checkpoint loads with the same weights, bit for bit, and gives the same logits."""
    model = model.float() # what GPT.load builds
    save_checkpoint(path, dict(model=model.state_dict(), model_args=asdict(model.config)))
    loaded, _ = load_model(path)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for (name, p), q in zip([*model.named_parameters(), *model.named_buffers()],
                            [*loaded.parameters(), *loaded.buffers()], strict=True):
        assert torch.equal(p, q), name
    idx = tokens(model, 2)
    with torch.no_grad():
        assert torch.equal(model(idx)[0], loaded(idx)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Every mixer, in every stack, with every position embedding, time-mixing and a short convolution

OPTIONS = { # settings of the mixers' own, each tried in all of the places below
    'attention': [{}, dict(time_weighting='circulant'), dict(time_weighting='full'), dict(attention_window=3),
                  dict(value_residual=True, attention_gate=True, n_layer=2)],
    'linear_attention': [{}, dict(chunk=3)],
    'gated_delta': [{}, dict(chunk=3)],
    'rwkv7': [dict(n_embd=16)], # at 8 channels the first gradients inside two UNets are too small to move a decay
    'gmlp': [dict(mlp='none'), dict(gmlp_tanh=True), dict(gmlp_attn=3),
             dict(gmlp_ratio=2.5, gmlp_tanh=True, gmlp_attn=3)],
    'synthesizer': [dict(synthesizer=kind, synthesizer_attn=mixed)
                    for kind in ('dense', 'random') for mixed in (False, True)],
    'windowed': [dict(sliding_window=3)],
}
STACKS = {
    'flat': dict(n_layer=2),
    'unet2': dict(n_layer=1, unet_layers=(1,)),
    'unet2x2': dict(n_layer=1, unet_layers=(1, 1)),
    'unet3': dict(n_layer=1, unet_layers=(1,), unet_factor=3),
    'unet3x2': dict(n_layer=1, unet_layers=(0, 2), unet_up_layers=(1, 0), unet_factor=(3, 2)),
}
POS_EMBS = ('learned', 'rope', 'relative', 'learned+relative', 'none')
TIME_MIXING = [{}, dict(time_mixing=0.5, time_mixing_alternate=True), dict(time_mixing=1.0, short_conv=2)]
BLOCKS = [dict(rezero=True), dict(mlp='swiglu', bias=False), dict(mlp='relu2', tie_weights=False), dict(mlp='none'),
          dict(mlp='gelu_tanh', mlp_ratio=1.5), dict(n_head=1), dict(n_head=8), dict(qk_norm=True, pos_emb='rope'),
          dict(short_conv=4)]
BLOCK_SIZES = (1, 2, 5), (13, 16) # each architecture has all of the first; every other one, one of the others, too


def architectures():
    """
    -> (id, configs), the configs differing in block_size; what GPTConfig refuses is left out. Each mixer has all pairs
    of position embedding, time-mixing and stack; other blocks in a flat stack and in one of the UNets in turn.
    """
    for m, mixer in enumerate(TESTED):
        own = [options | dict(pos_emb=pos_emb) for options in OPTIONS.get(mixer, [{}]) for pos_emb in POS_EMBS
               if pos_emb in MIXERS[mixer].pos_embs]
        places = [(time_mixing | place, stack) for i, place in enumerate(own) for j, stack in enumerate(STACKS)
                  for k, time_mixing in enumerate(TIME_MIXING) if len(own) < 3 or k == (i + j) % 3]
        places += [(block | TIME_MIXING[1], stack) for i, block in enumerate(BLOCKS)
                   for stack in ('flat', [*STACKS][1 + (i + m) % (len(STACKS) - 1)])]
        for n, (place, stack) in enumerate(places):
            levels, configs, sizes = STACKS[stack], [], BLOCK_SIZES[0]
            if n % 2 == 0 or stack == 'unet3x2': # which none of the first is enough for
                sizes += (BLOCK_SIZES[1][n // 2 % 2],)
            for block_size in sizes:
                args = dict(block_size=block_size, vocab_size=11, n_head=2, n_embd=8, mixer=mixer)
                try:
                    configs.append(GPTConfig(**args | levels | place))
                except ValueError:
                    pass
            if configs:
                yield '-'.join([mixer, stack] + [f'{k}={v}' for k, v in place.items()]), configs


def some(own):
    """For what takes longer, {name: config}: each of these settings in a flat stack, each UNet with one in turn."""
    unets = [stack for stack in STACKS if stack != 'flat']
    pairs = [('flat', i) for i in range(len(own))]
    pairs += [(unets[i % len(unets)], i % len(own)) for i in range(max(len(own), len(unets)))]
    found = {}
    for stack, i in pairs:
        mixer = own[i]['mixer']
        name = mixer if isinstance(mixer, str) else '+'.join(mixer)
        found[f'{name}-{stack}-{i}'] = GPTConfig(**dict(block_size=16, vocab_size=11, n_head=2, n_embd=8)
                                                 | STACKS[stack] | dict(n_layer=1) | own[i])
    return found


ARCHITECTURES, SOME = dict(architectures()), {}
for mixer in TESTED:
    SOME |= some([options | dict(mixer=mixer) for options in OPTIONS.get(mixer, [{}])])
if 'MIXER' not in os.environ:
    SOME |= some([
        dict(mixer=('gated_delta', 'linear_attention', 'attention'), attention_window=5, pos_emb='rope', chunk=4,
             n_layer=3),
        dict(mixer=('gmlp', 'synthesizer'), gmlp_attn=3, time_mixing=0.5, n_layer=2),
        dict(mixer=('attention', 'container'), time_weighting='full', qk_norm=True, n_layer=2),
        dict(mixer=('gmlp', 'attention'), value_residual=True, short_conv=3, n_layer=4),
        dict(mixer=('windowed', 'attention'), sliding_window=5, pos_emb='rope', qk_norm=True, n_layer=2)])


def test_the_contract_leaves_no_mixer_out():
    configs = [config for sizes in ARCHITECTURES.values() for config in sizes]
    for mixer in TESTED:
        cls = MIXERS[mixer]
        own = [config for config in configs if config.mixer == mixer]
        assert {config.pos_emb for config in own} == set(cls.pos_embs)
        assert {config.block_size for config in own} == set(sum(BLOCK_SIZES, ()))
        of = [lambda config: config.pos_emb, lambda config: config.time_mixing,
              lambda config: (config.unet_layers, config.unet_factor)]
        for a, b in itertools.combinations(of, 2):
            assert {(a(c), b(c)) for c in own} == {(a(c), b(d)) for c in own for d in own}
        for options in OPTIONS.get(mixer, [{}]):
            assert any(all(getattr(config, name) == value for name, value in options.items()) for config in own)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_contract(name, record_property):
    for config in ARCHITECTURES[name]:
        record_property('deviation', check_contract(randomized(config)))


@pytest.mark.parametrize('name', [pytest.param(name, marks=[] if '-flat-' in name else pytest.mark.long(
    "long sequences in UNets")) for name in SOME])
def test_contract_at_length_263(name, record_property):
    """All cuts take long: inside a UNet, of which one is looked at around attention, those at the ends of chunks do."""
    seconds = math.inf if '-flat-' in name or name.startswith('attention-unet3x2-') else 0
    record_property('deviation', check_at_length(randomized(replace(SOME[name], block_size=263)), seconds))


@pytest.mark.parametrize('name', SOME)
def test_training(name):
    torch.manual_seed(0)
    check_training(GPT(SOME[name]))


@pytest.mark.parametrize('name', SOME)
def test_round_trip(name, tmp_path):
    check_round_trip(randomized(SOME[name]), tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('args', [dict(mixer=mixer) for mixer in TESTED] + [
    dict(mixer='synthesizer', synthesizer='random')], ids=str)
def test_no_weights_of_every_pair_of_tokens(args):
    """Where attention is fused, as on a GPU, no mixer keeps weights (B, H, T, T): most of its time and memory."""
    B, T = 64, 128
    with torch.device('meta'):
        model = GPT(GPTConfig(block_size=T, vocab_size=11, n_layer=1, n_head=2, n_embd=16, **args))
        idx = torch.zeros(B, T, dtype=torch.long)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.untyped_storage().nbytes() // 4),
                                                  lambda _: None), MetaOperations():
        model(idx, idx)
    assert len(sizes) > 10 and max(sizes) < B * 2 * T * T
    for dtype in torch.float32, torch.bfloat16:
        assert peak_bytes(model, B, T, dtype, 'cuda') > 0 # not nan


@pytest.mark.parametrize('name', [f'{mixer}-flat-0' for mixer in TESTED] +
                         [name for name in SOME if name.startswith('attention-unet2-')])
def test_compile_gives_the_same_numbers(name):
    torch.compiler.reset()
    check_compiled(randomized(SOME[name]), 'aot_eager')


@pytest.mark.long('a C++ compiler')
@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'cl'))), reason='inductor needs a C++ compiler')
def test_inductor_gives_the_same_numbers():
    torch.compiler.reset()
    # to find out which vector instructions there are takes longer than all the rest
    with torch._inductor.config.patch({'cpp.vec_isa_ok': False}):
        check_compiled(network(n_layer=1, time_weighting='circulant'), 'inductor')


# ---------------------------------------------------------------------------------------------------------------------
# The checks refuse what is broken

class AverageOfAll(Mixer):
    def mix(self, x):
        return x.mean(dim=1, keepdim=True).expand_as(x)


class AverageOfPastAndFuture(Mixer):
    """Sees only the past, but knows the length of the whole sequence."""
    def mix(self, x):
        return x.cumsum(dim=1) / x.size(1)


class ForgetfulTimeMixing(TimeMixing):
    def forward(self, x, cache=None):
        return super().forward(x)


class Forgotten(Mixer):
    """Has a parameter that its output does not depend on."""
    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.unused = nn.Parameter(torch.zeros(1))

    def mix(self, x):
        return x.cumsum(dim=1)


class ChunkMean(Mixer):
    """Right in the first 16 tokens; from then on each sees the mean of its own chunk of 16, the future in it too."""
    def mix(self, x):
        chunks = [x[:, i:i + 16] for i in range(16, x.size(1), 16)]
        return x.cumsum(dim=1) / 16 + torch.cat([torch.zeros_like(x[:, :16])] +
                                                [c.mean(dim=1, keepdim=True).expand_as(c) for c in chunks], dim=1)


class NormalizedOverTime(Mixer):
    """As batch normalization: over all positions in training, by running statistics in evaluation."""
    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.norm = nn.BatchNorm1d(config.n_embd)

    def mix(self, x):
        return self.norm(x.cumsum(dim=1).transpose(1, 2)).transpose(1, 2)


class Rounded(Mixer):
    """What it takes from the future is rounded, and so has no gradient: as with experts that choose their tokens."""
    def mix(self, x):
        return x.cumsum(dim=1) * (1 + x.sum(dim=(1, 2), keepdim=True).round() % 8)


class LeakingAtZero(ChunkMean):
    """Leaks as soon as training moves its projection, which starts at zero."""
    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.projection = nn.Parameter(torch.zeros(config.n_embd, config.n_embd))

    def mix(self, x):
        return super().mix(x) @ self.projection


def long_network(cls, monkeypatch, random=True):
    monkeypatch.setitem(MIXERS, 'broken', cls)
    config = GPTConfig(block_size=301, vocab_size=11, n_layer=2, n_head=2, n_embd=8, mixer='broken')
    return randomized(config) if random else GPT(config)


def test_a_leak_within_chunks_is_refused(monkeypatch):
    monkeypatch.setitem(MIXERS, 'broken', ChunkMean)
    assert check_contract(network(mixer='broken', block_size=16)) < TOLERANCE # so this is not enough
    with pytest.raises(AssertionError, match=r'position \d+ sees position \d+, first in transformer.h.0.attn'):
        check_at_length(long_network(ChunkMean, monkeypatch))


def test_a_leak_in_training_mode_is_refused(monkeypatch):
    with pytest.raises(AssertionError, match=r'sees position .*, in training alone'):
        check_at_length(long_network(NormalizedOverTime, monkeypatch))


def test_a_leak_without_a_gradient_is_refused(monkeypatch):
    with pytest.raises(AssertionError, match=r'position 0 sees position \d+, first in .*h.[01].attn \(Rounded\)'):
        check_at_length(long_network(Rounded, monkeypatch))


class InPlace(Mixer):
    def mix(self, x):
        return x.mul_(0.5).cumsum(dim=1)


class WithoutCache(Mixer):
    def forward(self, x, cache=None):
        return x.cumsum(dim=1)


class OfOneLength(Mixer):
    def mix(self, x):
        if x.size(1) < 301:
            raise IndexError("of 301 tokens only")
        return x.cumsum(dim=1)


@pytest.mark.parametrize('cls, words', [
    (InPlace, '$'), (AverageOfPastAndFuture, r'read in pieces, the output at position \d+ is off by'),
    (WithoutCache, 'read in pieces, the output at position 150 is off by'),
    (OfOneLength, 'read in pieces of 150, 1 and 150 tokens, it ends in IndexError: of 301 tokens only')])
def test_wrong_decoding_is_told(cls, words, monkeypatch):
    """Of causal mixers, in 16 bits, too, which round more than the difference must be."""
    model = long_network(cls, monkeypatch).float()
    for autocast in False, True:
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            proof = find_leak(model, tokens(model, 16))
        assert proof.leak is None and re.match(words, proof.decoding), proof
        assert len(proof.warnings) == (words != '$')


class Convolution(Mixer):
    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.conv = nn.Conv1d(config.n_embd, config.n_embd, 4, padding=3, groups=config.n_embd)

    def mix(self, x):
        return self.conv(x.transpose(1, 2))[..., :x.size(1)].transpose(1, 2)


def test_a_convolution_with_a_bias_has_a_size(monkeypatch):
    model = long_network(Convolution, monkeypatch, random=False)
    assert peak_bytes(model, 2, 301, torch.bfloat16, 'cuda') > 0 and cost(model) > 0 # not nan
    proof = find_leak(model, tokens(model, 4), seconds=0.0, passes=0)
    assert proof.leak is None and not proof.decoding, proof


class InSixteenBits(Mixer):
    """Computes in bfloat16 by itself, or only under autocast."""
    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def mix(self, x):
        weight = self.c_proj.weight if self.needs_autocast else self.c_proj.weight.bfloat16()
        count = torch.arange(1, x.size(1) + 1)[:, None]
        return (nn.functional.linear(x.bfloat16(), weight).cumsum(1) / count).bfloat16().to(x.dtype)


@pytest.mark.parametrize('pattern', [('attention',), ('attention', 'half'), ('half', 'attention')])
@pytest.mark.parametrize('needs_autocast', [False, True])
def test_rounding_is_no_wrong_decoding(pattern, needs_autocast, monkeypatch):
    monkeypatch.setitem(MIXERS, 'half', InSixteenBits)
    monkeypatch.setattr(InSixteenBits, 'needs_autocast', needs_autocast, raising=False)
    torch.manual_seed(0)
    config = GPTConfig(block_size=512, vocab_size=65, n_layer=6, n_head=2, n_embd=128, mixer=pattern)
    model = GPT(config)
    with torch.autocast('cpu', torch.bfloat16):
        proof = find_leak(model, tokens(model, 4), seconds=0.0, passes=0)
    assert proof.leak is None and not proof.decoding, proof


FOUND = { # how what is said of these leaks begins; of the others: that a position sees a later one
    'in evaluation only': r'position \d+ sees position 128, .*, in evaluation alone',
    'without gradients only': r'position \d+ sees position 128, .*, in evaluation alone',
    'in training mode only': r'position \d+ sees position 128, .*, in training alone',
    'through the batch': 'position \\d+ of a row sees the other rows of the batch',
    'state from batch to batch': 'two equal passes in evaluation differ',
    'ends of chunks of 96': 'position 95 sees position 96',
    'wrap-around by roll': 'position 0 sees position 128',
}


@pytest.mark.parametrize('name', leaks.LEAKS)
def test_each_kind_of_leak_is_found(name, monkeypatch):
    """By the contract, with random weights in float64; and at the start of training in float32, of few rows."""
    monkeypatch.setitem(MIXERS, 'leak', None) # and back at the end
    settings = dict(block_size=129, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
    for is_random, rows in (True, 64), (False, 8):
        model = leaks.network(name, **settings)
        model = randomized(model.config, model=model) if is_random else model
        leak = find_leak(model, tokens(model, rows)).leak
        if name == 'none':
            assert leak is None
        else:
            words = FOUND.get(name, r'position \d+ sees position \d+')
            assert re.match(words, leak) and 'first in transformer.h.0.attn (Leak)' in leak


def test_a_leak_between_any_two_neighbours_is_found(monkeypatch):
    """One pair of 300, in either mode."""
    class OnePair(Mixer):
        def mix(self, x):
            here = torch.arange(x.size(1))[:, None] == self.pair
            return x.cumsum(dim=1) + here * x.roll(-1, 1) * (self.training == self.mode)
    model = long_network(OnePair, monkeypatch)
    for OnePair.pair, OnePair.mode in itertools.product((0, 113, 299), (True, False)):
        assert f'position {OnePair.pair} sees position {OnePair.pair + 1}, ' in find_leak(model, tokens(model, 50)).leak
    OnePair.pair = 300
    assert 'position 300 sees' not in (find_leak(model, tokens(model, 50)).leak or '')


def test_a_leak_behind_a_start_is_found_and_nothing_is_changed(monkeypatch):
    """Behind zeros, or a one. What a mixer counts and averages in training is as before, too."""
    model = long_network(LeakingAtZero, monkeypatch, random=False)
    assert not model.transformer.h[0].attn.projection.any()
    assert 'first in transformer.h.0.attn (LeakingAtZero)' in find_leak(model, tokens(model, 4)).leak
    model = long_network(NormalizedOverTime, monkeypatch, random=False).train()
    model.transformer.h[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert find_leak(model, tokens(model, 4)).leak
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


class Decaying(Mixer):
    """Sees all tokens. Its decays leave the domain of the root where the proof disturbs them."""
    start = 0.985

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.decay = nn.Parameter(torch.full((config.n_embd,), self.start))

    def mix(self, x):
        return x.mean(dim=1, keepdim=True) * (1 - self.decay ** 2).sqrt() + x


class Shortcut(Decaying):
    """Sees the next token as long as its weights are what they were at the start."""
    def mix(self, x):
        return x.cumsum(dim=1) + x.roll(-1, 1) * (self.decay == self.start).all()


class Diverged(Decaying):
    start = 1.01


@pytest.mark.parametrize('cls, words', [
    (Decaying, r'position 0 sees position 300, first in transformer.h.\d.attn'),
    (Shortcut, r'position \d+ sees position \d+, first in transformer.h.\d.attn'),
    (Diverged, 'some of its outputs are not finite numbers, and hide what they depend on')])
def test_a_leak_that_disturbed_weights_hide_is_found(cls, words, monkeypatch):
    model = long_network(cls, monkeypatch, random=False)
    assert re.match(words, find_leak(model, tokens(model, 8)).leak)


def test_what_disturbing_makes_infinite_is_proven_with_less(monkeypatch):
    class Fading(Decaying):
        def mix(self, x):
            return x.cumsum(dim=1) * (1 - self.decay ** 2).sqrt()

    class FadingLeak(Decaying): # behind a weight that starts at zero
        def __init__(self, config, block_size):
            super().__init__(config, block_size)
            self.share = nn.Parameter(torch.zeros(config.n_embd))

        def mix(self, x):
            return (x.cumsum(dim=1) + x.roll(-1, 1) * self.share) * (1 - self.decay ** 2).sqrt()
    for cls, leak, start in (Fading, None, 0.985), (FadingLeak, 'position ', 0.985), (Fading, None, 1 - 1e-6):
        monkeypatch.setattr(Decaying, 'start', start)
        model = long_network(cls, monkeypatch, random=False)
        found = find_leak(model, tokens(model, 8))
        assert found.words == 'proven at T=301' if leak is None else found.leak.startswith(leak)


def test_a_constant_is_left_alone(monkeypatch):
    """A mask that is a parameter without gradients has zeros that stay."""
    class Masked(Mixer):
        def __init__(self, config, block_size):
            super().__init__(config, block_size)
            self.mask = nn.Parameter(torch.ones(block_size, block_size).tril(), requires_grad=False)

        def mix(self, x):
            return self.mask[:x.size(1), :x.size(1)] @ x / 9
    model = long_network(Masked, monkeypatch, random=False)
    assert find_leak(model, tokens(model, 8)).leak is None
    model.transformer.h[1].attn.mask.requires_grad_()
    assert 'first in transformer.h.1.attn (Masked)' in find_leak(model, tokens(model, 8)).leak


def test_a_leak_is_found_in_a_single_row(monkeypatch):
    """As in micro-batches of one sequence; from an odd position to the next one only."""
    class NextOfOdd(Mixer):
        def mix(self, x):
            odd = torch.arange(x.size(1), device=x.device)[:, None] % 2
            return x.cumsum(dim=1) + odd * torch.cat([x[:, 1:], 0 * x[:, :1]], dim=1)
    model = long_network(NextOfOdd, monkeypatch)
    for windows in tokens(model, 1), tokens(model, 2), torch.zeros(2, 301, dtype=torch.long): # the last: no other text
        assert re.match(r'position (\d*[13579]) sees position \d+, first', find_leak(model, windows, 1).leak)


@pytest.mark.parametrize('settings', [dict(block_size=1), dict(block_size=2), dict(vocab_size=1)], ids=str)
def test_where_there_is_nothing_to_see(settings):
    model = network(**settings)
    for rows in 1, 4:
        proof = find_leak(model, tokens(model, 2 * rows), rows)
        assert proof.leak is None and proof.cuts == proof.T - 1 and str(proof).startswith('proven at T=')


@pytest.mark.parametrize('name, words', [
    ('another row', r'position \d+ of a row sees the other rows'), ('this many rows', 'position 0 sees position 1'),
    ('rows at the end', 'position 39 of a row sees the other rows'), ('last call', 'two equal passes in .* differ'),
    ('one pair', 'position 7 sees position 33'), ('a chance', 'two equal passes in evaluation differ'),
    ('ninth call', 'an output in .* changes with what other calls'), ('a chance in training', None)])
def test_further_leaks(name, words, monkeypatch):
    shared = {}
    class Sees(Mixer):
        calls = 0

        def mix(self, x):
            self.calls += 1
            last, shared['x'] = shared.get('x', x), x.detach()
            at = torch.arange(x.size(1))[:, None]
            return x.cumsum(dim=1) / 9 + {
                'another row': lambda: x.roll(-1, 0), 'rows at the end': lambda: x.roll(1, 0) * (at == 39),
                'this many rows': lambda: x.roll(-1, 1) * (len(x) == 8) * (at < 39),
                'last call': lambda: last.roll(-1, 1), 'one pair': lambda: x[:, 33:34] * (at == 7),
                'a chance': lambda: x * (1 if self.training else random.random()),
                'ninth call': lambda: x.roll(-1, 1) * (self.calls == 9),
                'a chance in training': lambda: x * (random.random() if self.training else 1)}[name]()
    monkeypatch.setitem(MIXERS, 'broken', Sees)
    leak = find_leak(network(block_size=40, mixer='broken', n_layer=1), torch.randint(11, (16, 40))).leak
    assert re.match(words, leak) if words else leak is None


def test_evaluation_must_be_a_function_of_the_text(monkeypatch):
    """Random numbers, something kept from call to call, changed weights: refused, and the module is named."""
    class Draws(Mixer):
        def mix(self, x):
            return x.cumsum(dim=1) * (torch.rand(()) if self.training == self.mode else 1.0)

    class Counts(Mixer):
        def __init__(self, config, block_size):
            super().__init__(config, block_size)
            self.register_buffer('seen', torch.zeros(()))
            self.weight = nn.Parameter(torch.ones(()))

        def mix(self, x):
            with torch.no_grad():
                if self.training == self.mode:
                    self.seen.data += 1
            return x.cumsum(dim=1) * self.weight

    class Keeps(Mixer):
        last = 0.0

        def mix(self, x):
            if self.training: # what the last training step saw
                self.last = x.detach()[:1, :1]
            return x.cumsum(dim=1) + (0.0 if self.training else self.last)

    def found(cls):
        model = long_network(cls, monkeypatch)
        return find_leak(model, tokens(model, 100)).leak
    Draws.mode = True
    assert found(Draws) is None # as dropout does
    Draws.mode = False
    assert found(Draws).startswith('two equal passes in evaluation differ, first in transformer.h.0.attn (Draws): it d')
    Counts.mode = False
    assert found(Counts) == 'evaluation changes transformer.h.0.attn.seen'
    Counts.mode = True
    assert found(Counts) is None # as batch norm does
    assert 'evaluation' in found(Keeps)


def test_a_leak_anywhere_in_a_block_is_named(monkeypatch):
    leaky = lambda forward: lambda self, x, *args: forward(self, x, *args) + x.roll(-1, 1)
    for cls, place in (MLP, 'h.0.mlp (MLP)'), (TimeMixing, 'h.0.shift (TimeMixing)'), (Block, 'h.0 (Block)'):
        with monkeypatch.context() as patch:
            patch.setattr(cls, 'forward', leaky(cls.forward))
            model = network(block_size=40, time_mixing=0.5)
            assert re.search(rf'sees position \d+, first in transformer.{re.escape(place)}$',
                             find_leak(model, tokens(model, 8)).leak)
    with monkeypatch.context() as patch: # beyond all blocks
        patch.setattr(nn.LayerNorm, 'forward', lambda self, x: x + x.roll(-1, 1) * (self is model.transformer.ln_f))
        model = network(block_size=40)
        assert 'first in GPT itself' in find_leak(model, tokens(model, 8)).leak


def test_a_leak_inside_a_unet_is_named(monkeypatch):
    """Its inner positions stand for several tokens each."""
    class NextOfInner(Mixer):
        def __init__(self, config, block_size):
            super().__init__(config, block_size)
            self.leaks = block_size < 20

        def mix(self, x):
            return x.cumsum(dim=1) + self.leaks * x.roll(-1, 1)
    monkeypatch.setitem(MIXERS, 'broken', NextOfInner)
    model = network(block_size=60, unet_layers=(1, 1), unet_factor=(2, 3), n_layer=1, mixer='broken')
    assert 'first in transformer.h.inner.inner.0.attn (NextOfInner)' in find_leak(model, tokens(model, 8)).leak


def test_too_small_for_rounded_outputs_has_a_gradient(monkeypatch):
    class Tiny(Mixer):
        def mix(self, x):
            return (x.cumsum(dim=1) / 9).bfloat16() + (1e-7 * x.roll(-1, 1)).bfloat16()
    monkeypatch.setitem(MIXERS, 'broken', Tiny)
    for unet in {}, dict(unet_layers=(1,)):
        model = network(block_size=40, mixer='broken', **unet).float()
        with torch.autocast('cpu', torch.bfloat16):
            leak = find_leak(model, tokens(model, 8)).leak
        assert re.search(r'sees position \d+, first in transformer.h(.down)?.0.attn \(Tiny\): a gradient of', leak)


def test_kernels_whose_last_bits_differ_are_no_leak_and_hide_none(monkeypatch):
    """As a GPU's: the threshold is what equal passes show, and the line says it."""
    class Rounds(Mixer):
        leak = 0.0

        def mix(self, x):
            noise = 1 + 1e-7 * torch.rand(x.shape, generator=self.draw)
            return x.cumsum(dim=1) / 9 * noise + self.leak * x.roll(-1, 1)
    Rounds.draw = torch.Generator()
    model = long_network(Rounds, monkeypatch, random=False)
    proof = find_leak(model, tokens(model, 64))
    assert proof.leak is None and 0 < proof.noise < 1e-5 and re.match(r'proven at T=301, to \de-0[67] in', str(proof))
    Rounds.leak = 1e-3
    assert 'first in transformer.h.0.attn (Rounds)' in find_leak(model, tokens(model, 64)).leak


def test_a_short_proof_says_what_it_looked_at(monkeypatch):
    model = network(block_size=300, mixer='attention', attention_window=70)
    proof = find_leak(model, tokens(model, 32), seconds=0.0, passes=0)
    if proof.cuts < 299: # three seconds do for all, unless the machine is busy
        assert str(proof).startswith(f'no leak at {proof.cuts:,} of 299 cuts in ')
    cuts = order_of_cuts(model.config, 300)
    assert sorted(cuts) == list(range(300)) and cuts[:3] == [299, 0, 298]
    near = {size * k + d for size in (16, 32, 64, 70, 128, 256) for k in range(1, 300 // size + 1) for d in (-2, -1, 0)}
    assert near & set(range(300)) == set(cuts[:3 + len(near - {299, 298})]) - ({299, 0, 298} - near)


@pytest.mark.parametrize('name', SOME)
def test_no_false_alarm(name):
    """In any dtype, at the start and with dropout."""
    model = GPT(replace(SOME[name], block_size=48, dropout=0.1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if name.endswith('-flat-0') else (torch.bfloat16,):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            proof = find_leak(model, tokens(model, 48))
        assert proof.leak is None and proof.noise == 0.0 and proof.cuts == 47


def test_a_mixer_of_mixers_may_call_its_parts_as_it_likes(monkeypatch):
    class Part(Mixer):
        def mix(self, x):
            return x

    class Whole(Mixer): # mix is whatever its own forward makes of it
        def __init__(self, config, block_size):
            super().__init__(config, block_size)
            self.inner, self.mix = Part(config, block_size), nn.Linear(config.n_embd, 3)

        def forward(self, x, cache=NO_CACHE):
            return self.inner(x, cache=cache.child('inner')) + self.mix(x).mean(2, keepdim=True)
    monkeypatch.setitem(MIXERS, 'whole', Whole)
    model = network(mixer='whole', n_layer=1)
    assert cost(model) > 0 and find_leak(model, tokens(model, 4)).leak is None


def test_a_leak_of_the_compiled_network_alone_is_found():
    model = network(block_size=40, n_layer=1)
    compiled = torch.compile(model, backend='eager')
    leaky = lambda idx, targets: (None, model(idx, targets)[1] + 1e-3 * idx.double().mean())
    random = lambda idx, targets: (None, model(idx, targets)[1] + torch.rand(()) * (not model.training))
    windows = tokens(model, 8)
    proof = find_leak(model, windows, compiled=(compiled, compiled))
    assert proof.leak is None and proof.cuts == 39
    for mode, pair in ('evaluation', (leaky, compiled)), ('training', (compiled, leaky)):
        leak = find_leak(model, windows, compiled=pair).leak
        assert leak.startswith(f'the loss of {mode} at position ') and 'compiled' in leak
    leak = find_leak(model, windows, compiled=(random, compiled)).leak
    assert leak.startswith('two equal passes differ in the loss of evaluation')


def test_a_leak_in_the_loss_itself_is_found(monkeypatch):
    """GPT.forward may be edited, too."""
    forward = GPT.forward
    monkeypatch.setattr(GPT, 'forward', lambda self, idx, targets=None: (
        None, forward(self, idx, targets)[1] + 1e-2 * idx.double().std()))
    model = network(block_size=40)
    assert find_leak(model, tokens(model, 8)).leak.startswith('the loss of evaluation at position')


def test_what_16_bits_cannot_do_is_refused(monkeypatch):
    class Solves(Mixer):
        def __init__(self, config, block_size):
            super().__init__(config, block_size)
            self.c_fc = nn.Linear(config.n_embd, config.n_embd)

        def mix(self, x):
            x = self.c_fc(x)
            return torch.linalg.solve_triangular(torch.ones(x.size(1), x.size(1)).tril().to(x.dtype), x, upper=False)
    monkeypatch.setitem(MIXERS, 'broken', Solves)
    config = GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8, mixer='broken')
    assert check_contract(randomized(config)) < TOLERANCE
    with pytest.raises(RuntimeError, match='BFloat16'):
        check_training(GPT(config))


def test_a_parameter_that_never_moves_is_refused(monkeypatch):
    monkeypatch.setitem(MIXERS, 'forgotten', Forgotten)
    model = network(mixer='forgotten', n_layer=1).float()
    with pytest.raises(AssertionError, match='attn.unused has no finite gradient'):
        check_training(model)


def test_a_lost_buffer_is_refused(monkeypatch, tmp_path):
    class Counting(Mixer):
        def __init__(self, config, block_size):
            super().__init__(config, block_size)
            self.register_buffer('seen', torch.zeros(()))

        def mix(self, x):
            return x.cumsum(dim=1) + self.seen
    model = long_network(Counting, monkeypatch)
    model.transformer.h[0].attn.seen += 3.0
    check_round_trip(model, tmp_path / 'ckpt.pt')
    monkeypatch.setitem(globals(), 'load_model', lambda path: (GPT(model.config), None))
    with pytest.raises(AssertionError):
        check_round_trip(model, tmp_path / 'ckpt.pt')


def test_a_leaking_unet_is_refused(monkeypatch):
    assert check_causal(every_length(network(unet_layers=(1,)))) < TOLERANCE
    monkeypatch.setattr('model.UNet', UNet) # and back at the end
    runpy.run_path(str(PROJECT / 'tests/leaking_unet.py'))
    with pytest.raises(AssertionError, match='token 1 changes the logits of position 0'):
        check_causal(every_length(network(unet_layers=(1,))))
    with pytest.raises(AssertionError, match=r'sees position \d+, first in transformer\.h \(LeakingUNet\)'):
        check_at_length(network(unet_layers=(1,), block_size=301))


def test_an_average_over_the_future_is_refused(monkeypatch):
    monkeypatch.setitem(MIXERS, 'average', AverageOfAll)
    with pytest.raises(AssertionError, match='changes the logits of position'):
        check_causal(every_length(network(mixer='average')))


def test_dependence_on_the_length_is_refused(monkeypatch):
    monkeypatch.setitem(MIXERS, 'average', AverageOfPastAndFuture)
    # no token leaks, and yet training and decoding differ
    assert check_causal(every_length(network(mixer='average'))) < TOLERANCE
    with pytest.raises(AssertionError, match='tokens give logits that differ'):
        check_prefixes(every_length(network(mixer='average')))


def test_a_forgetful_token_shift_is_refused(monkeypatch):
    assert check_chunks(network(time_mixing=0.5)) < TOLERANCE
    monkeypatch.setattr('model.TimeMixing', ForgetfulTimeMixing)
    assert check_causal(every_length(network(time_mixing=0.5))) < TOLERANCE # only decoding shows it
    with pytest.raises(AssertionError, match='decoding in chunks'):
        check_chunks(network(time_mixing=0.5))


def test_a_decayed_time_weight_is_refused(monkeypatch):
    def by_dim(self):
        named = list(self.named_parameters())
        return dict(hidden=[x for x in named if x[1].dim() >= 2], rest=[x for x in named if x[1].dim() < 2])
    monkeypatch.setitem(globals(), 'optimizer_groups', by_dim)
    check_groups(network()) # right for plain attention, which is how it came to be everywhere
    with pytest.raises(AssertionError, match='attn.alpha is in the wrong group'):
        check_groups(network(time_weighting='circulant'))


def test_a_parameter_in_no_group_or_in_two_is_refused(monkeypatch):
    groups = optimizer_groups
    one_less = lambda model: groups(model) | dict(rest=groups(model)['rest'][1:])
    monkeypatch.setitem(globals(), 'optimizer_groups', one_less)
    with pytest.raises(AssertionError):
        check_groups(network())
    one_twice = lambda model: groups(model) | dict(rest=groups(model)['rest'] + groups(model)['hidden'][:1])
    monkeypatch.setitem(globals(), 'optimizer_groups', one_twice)
    with pytest.raises(AssertionError):
        check_groups(network())


def test_a_parameter_without_a_gradient_is_refused(monkeypatch):
    monkeypatch.setitem(MIXERS, 'forgotten', Forgotten)
    with pytest.raises(AssertionError, match='attn.unused gets no gradient'):
        check_gradients(network(mixer='forgotten'))
    model = network()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.zero_()
    with pytest.raises(AssertionError, match='h.1.ln_2.weight is zero'):
        check_gradients(model)


def test_a_network_that_ignores_its_input_is_refused():
    model = network()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    with pytest.raises(AssertionError, match='changes nothing at all'):
        check_causal(every_length(model))


def test_a_lost_weight_is_refused(tmp_path):
    class Lossy(GPT):
        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            return state | {'transformer.wpe.weight': state['transformer.wpe.weight'].half()}
    model = network()
    model.__class__ = Lossy
    with pytest.raises(AssertionError, match='transformer.wpe.weight'):
        check_round_trip(model, tmp_path / 'ckpt.pt')


# ---------------------------------------------------------------------------------------------------------------------
# Each mixer against its definition, position by position

def weigh(values, n_head, row, bias=None):
    """y_i = sum over j <= i of row(b, h, i)_j values_j (+ bias_i), head by head: values (B, T, E) -> (B, T, E)."""
    B, T, E = values.size()
    D = E // n_head
    y = torch.zeros_like(values)
    for b, h, i in itertools.product(range(B), range(n_head), range(T)):
        head = slice(h * D, (h + 1) * D)
        y[b, i, head] = row(b, h, i) @ values[b, :i + 1, head]
        if bias is not None:
            y[b, i, head] += bias[h, i]
    return y


def softmax(scores):
    e = (scores - scores.max()).exp()
    return e / e.sum()


def layer_norm(x, ln):
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * ln.weight + ln.bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def compare(q, k, n_head, pos_emb='none', relative=None, scale=None):
    """-> scores(b, h, i): q_i k_j / sqrt(D) for j = 0..i, with the positions in it; scale: of QK-norm."""
    D = q.size(2) // n_head

    def scores(b, h, i):
        qi, kj = q[b, i, h * D:(h + 1) * D], k[b, :i + 1, h * D:(h + 1) * D]
        if scale is not None: # vectors of length sqrt(D)
            length = lambda x: (x.square().sum(-1, keepdim=True) + D * 1e-6).sqrt()
            qi, kj = scale[h, 0, 0] * math.sqrt(D) * qi / length(qi), math.sqrt(D) * kj / length(kj)
        if pos_emb == 'rope': # pairs of channels are complex numbers, and the angle between two grows with the distance
            qi, kj = torch.complex(qi[:D // 2], qi[D // 2:]), torch.complex(kj[:, :D // 2], kj[:, D // 2:])
            distance = torch.arange(i, -1, -1, dtype=torch.float64)
            frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
            turn = torch.exp(1j * distance[:, None] * frequency)
            s = (qi * kj.conj() * turn).sum(1).real / math.sqrt(D)
        else:
            s = kj @ qi / math.sqrt(D)
        if relative is not None:
            s = s + torch.stack([relative[h, i - j] for j in range(i + 1)])
        return s
    return scores


def naive_attention(config, mixer, x, first=None):
    q, k, v = mixer.c_attn(x).chunk(3, dim=2)
    if first is not None:
        v = (1 - mixer.share) * v + mixer.share * first
    scores = compare(q, k, config.n_head, config.pos_emb, mixer.relative, mixer.qk_scale)

    def row(b, h, i):
        own = scores(b, h, i)
        if config.attention_window:
            own[:max(0, i + 1 - config.attention_window)] = -math.inf
        att = softmax(own)
        if config.time_weighting == 'full':
            att = att * torch.stack([mixer.weight[h, i, j] for j in range(i + 1)])
        elif config.time_weighting == 'circulant':
            att = att * torch.stack([mixer.alpha[h, i - j] * mixer.beta[h, j] for j in range(i + 1)])
        return att
    y = weigh(v, config.n_head, row)
    if config.attention_gate:
        D = config.n_embd // config.n_head
        for b, i, h in itertools.product(range(x.size(0)), range(x.size(1)), range(config.n_head)):
            y[b, i, h * D:(h + 1) * D] *= 2 / (1 + math.exp(-(mixer.gate[h] @ x[b, i])))
    return mixer.c_proj(y)


def naive_container(config, mixer, x):
    q, k, v = mixer.c_attn(x).chunk(3, dim=2)
    scores = compare(q, k, config.n_head, config.pos_emb, mixer.relative, mixer.qk_scale)
    alpha, beta = mixer.alpha.flatten(), mixer.beta.flatten()
    return mixer.c_proj(weigh(v, config.n_head, lambda b, h, i: (
        alpha[h] * softmax(scores(b, h, i)) + beta[h] * mixer.affinity[h, i, :i + 1])))


def naive_synthesizer(config, mixer, x):
    H, D = config.n_head, config.n_embd // config.n_head
    if config.synthesizer_attn:
        q, k, v = mixer.c_attn(x).chunk(3, dim=2)
        dot = compare(q, k, H, config.pos_emb, mixer.relative)
    else:
        v = mixer.c_attn(x)

    def row(b, h, i):
        if config.synthesizer == 'dense':
            hidden = mixer.c_fc(x[b, i])[h * D:(h + 1) * D].clamp(min=0)
            scores = torch.stack([hidden @ mixer.rows[h, :, j] for j in range(i + 1)])
        else:
            scores = mixer.table[h, i, :i + 1]
        if config.synthesizer_attn:
            share = softmax(mixer.mixture[:, h].flatten())
            scores = share[0] * scores + share[1] * dot(b, h, i)
        return softmax(scores)
    return mixer.c_proj(weigh(v, H, row))


def along_time(layer, x, n_head):
    return weigh(x, n_head, lambda b, h, i: layer.weight[h, i, :i + 1], layer.bias)


def naive_mlp_mixer(config, mixer, x):
    return along_time(mixer.c_proj, gelu(along_time(mixer.c_fc, x, config.n_head)), config.n_head)


def naive_gmlp(config, mixer, x):
    u, v = gelu(mixer.c_fc(x)).chunk(2, dim=2)
    gate = along_time(mixer.gate, layer_norm(v, mixer.ln), config.n_head)
    if config.gmlp_attn:
        q, k, a = mixer.attn_qkv(x).chunk(3, dim=2)
        scores = compare(q, k, 1)
        gate = gate + mixer.attn_proj(weigh(a, 1, lambda b, h, i: softmax(scores(b, h, i))))
    return mixer.c_proj(u * (gate.tanh() if config.gmlp_tanh else gate))


def naive_toeplitz(config, mixer, x):
    zero = torch.zeros((), dtype=x.dtype)
    return mixer.c_proj(weigh(mixer.c_fc(x), config.n_head, lambda b, h, i: torch.stack(
        [mixer.table[h, i - j] if i - j < config.block_size else zero for j in range(i + 1)])))


def naive_windowed(config, mixer, x):
    plain = dict(mixer='attention', sliding_window=GPTConfig.sliding_window)
    return naive_attention(replace(config, attention_window=config.sliding_window, **plain), mixer, x)


NAIVE = dict(attention=naive_attention, mlp_mixer=naive_mlp_mixer, gmlp=naive_gmlp, synthesizer=naive_synthesizer,
             container=naive_container, toeplitz=naive_toeplitz, windowed=naive_windowed)
SIZES = {'small': dict(B=2, T=6, H=2, C=8), 'long': dict(B=1, T=300, H=1, C=4)} # long: more than one block of rows


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('mixer, options', [
    (mixer, options) for mixer in NAIVE for options in OPTIONS.get(mixer, [{}])] + [
    ('attention', dict(qk_norm=True)), ('attention', dict(qk_norm=True, time_weighting='circulant')),
    ('container', dict(qk_norm=True))])
def test_definition(mixer, options, size):
    B, T, H, C = SIZES[size].values()
    for pos_emb in MIXERS[mixer].pos_embs:
        if pos_emb not in Mixer.pos_embs and options.get('synthesizer_attn') is False:
            continue
        if options.get('attention_window') and 'relative' in pos_emb:
            continue
        if size == 'long' and pos_emb in ('learned', 'learned+relative', 'rope'):
            continue # nothing in them is done in blocks of rows
        config = GPTConfig(block_size=T + 2, n_head=H, n_embd=C, mixer=mixer, pos_emb=pos_emb, **options)
        torch.manual_seed(1)
        layer = MIXERS[mixer](config, config.block_size).double()
        randomize(layer)
        x = torch.randn(B, T, C, dtype=torch.float64)
        with torch.no_grad():
            expected = NAIVE[mixer](config, layer, x)
            # rope's angles are float32, whose rounding grows with the position
            tolerance = 1e-7 * T if pos_emb == 'rope' else 1e-11
            torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)
            with torch.enable_grad(): # in training other ways may be faster
                torch.testing.assert_close(layer(x).detach(), expected, rtol=tolerance, atol=tolerance)
            cache = Cache()
            chunks = [layer(part, cache) for part in x.split([T // 3, 1, T - 1 - T // 3], dim=1)]
            torch.testing.assert_close(torch.cat(chunks, dim=1), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('mixer, options', [
    ('attention', {}), ('synthesizer', {}), ('synthesizer', dict(synthesizer_attn=True))])
def test_fused_attention_trains_the_same(mixer, options, monkeypatch):
    """As on a GPU, whose kernel takes queries wider than the values, too: the same gradients."""
    config = GPTConfig(block_size=300, n_head=2, n_embd=8, mixer=mixer, **options)
    torch.manual_seed(1)
    layer = MIXERS[mixer](config, config.block_size).double()
    randomize(layer)
    x = torch.randn(2, 300, 8, dtype=torch.float64, requires_grad=True)
    direction, found, calls = torch.randn_like(x), [], []
    monkeypatch.setattr('model.fused_attention', lambda *args, **kw: calls.append(1) or fused_attention(*args, **kw))
    for pays in False, True:
        monkeypatch.setattr('model.fused_attention_pays', lambda *args: pays)
        found.append(torch.autograd.grad((layer(x) * direction).sum(), [x, *layer.parameters()]))
    assert len(calls) == 1
    for rows, whole in zip(*found):
        torch.testing.assert_close(whole, rows, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('layer', [0, 1])
@pytest.mark.parametrize('alternate', [False, True])
@pytest.mark.parametrize('fraction, n', [(0.5, 4), (0.4, 3), (1.0, 8)])
def test_time_mixing(fraction, n, alternate, layer):
    shift = TimeMixing(GPTConfig(n_embd=8, n_head=2, time_mixing=fraction, time_mixing_alternate=alternate), layer)
    x = torch.randn(2, 5, 8)
    expected = x.clone()
    for b, t, c in itertools.product(range(2), range(5), range(8)):
        if c >= 8 - n if alternate and layer == 1 else c < n:
            expected[b, t, c] = x[b, t - 1, c] if t > 0 else 0.0
    assert torch.equal(shift(x), expected)


def naive_conv(conv, x):
    y, K = torch.zeros_like(x), conv.weight.size(1)
    for b, t, c, back in itertools.product(*map(range, (*x.shape, K))):
        if t >= back:
            y[b, t, c] += conv.weight[c, K - 1 - back] * x[b, t - back, c]
    return y


@pytest.mark.parametrize('K', [1, 2, 4])
def test_short_conv(K):
    conv = ShortConv(GPTConfig(n_embd=8, n_head=2, short_conv=K)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(conv(x), x)
    randomize(conv)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), naive_conv(conv, x))


@pytest.mark.parametrize('args', [
    dict(n_layer=3), dict(n_layer=4, mixer=('gmlp', 'attention')), dict(n_layer=3, mixer=('attention', 'container')),
    dict(n_layer=3, unet_layers=(2,), unet_up_layers=(1,)), dict(n_layer=1, unet_layers=(1, 2))], ids=str)
@torch.no_grad()
def test_value_residual(args, monkeypatch):
    """In each stack, attention alone mixes in its first layer's values, which itself has none to mix in."""
    model = network(value_residual=True, short_conv=3, time_mixing=0.5, **args)

    def naive_stack(stack, x, cache):
        first = None
        for block in stack:
            y = naive_conv(block.conv, block.shift(layer_norm(x, block.ln_1)))
            if type(block.attn) is MIXERS['attention']:
                x = x + naive_attention(model.config, block.attn, y, first)
                first = block.attn.c_attn(y).chunk(3, dim=2)[2] if first is None else first
            else:
                x = x + block.attn(y)
            x = x + block.mlp(layer_norm(x, block.ln_2))
        return x
    idx = tokens(model, 2)
    logits = model(idx)[0]
    monkeypatch.setattr(Stack, 'forward', naive_stack)
    assert (logits - model(idx)[0]).abs().max() < TOLERANCE


def test_values_of_recomputed_blocks_compile():
    torch.compiler.reset()
    check_compiled(network(value_residual=True, short_conv=2, recompute=True, n_layer=3), 'aot_eager')


@pytest.mark.parametrize('rezero', [False, True])
@pytest.mark.parametrize('mlp', ['gelu', 'none'])
def test_block(mlp, rezero):
    model = network(rezero=rezero, mlp=mlp, time_mixing=0.5)
    block = model.transformer.h[0]
    a = block.scales if rezero else [1.0, 1.0]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = layer_norm(x, block.ln_1)
    y[:, 1:, :4], y[:, 0, :4] = y[:, :-1, :4].clone(), 0.0
    expected = x + a[0] * naive_attention(model.config, block.attn, y)
    if mlp != 'none':
        expected = expected + a[1] * block.mlp(layer_norm(expected, block.ln_2))
    torch.testing.assert_close(block(x), expected)


def test_rezero_starts_as_the_identity():
    model = GPT(GPTConfig(block_size=7, vocab_size=11, n_layer=2, n_head=2, n_embd=8, rezero=True))
    x = torch.randn(2, 7, 8)
    assert torch.equal(model.transformer.h(x), x)


@pytest.mark.parametrize('mlp', ['gelu', 'gelu_tanh', 'relu2', 'swiglu'])
def test_mlp(mlp):
    layer = MLP(GPTConfig(n_embd=8, n_head=2, mlp=mlp, mlp_ratio=1.5)).double()
    randomize(layer)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    h = layer.c_fc(x)
    if mlp == 'swiglu':
        h = h[..., :12] / (1 + (-h[..., :12]).exp()) * h[..., 12:]
    elif mlp == 'relu2':
        h = h.clamp(min=0) ** 2
    elif mlp == 'gelu_tanh':
        h = h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))) / 2
    else:
        h = gelu(h)
    assert h.size(2) == 12
    torch.testing.assert_close(layer(x), layer.c_proj(h))


@pytest.mark.parametrize('T', [1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize('factor', [2, 3, 4])
def test_unet(factor, T):
    unet = network(block_size=11, unet_layers=(1,), unet_up_layers=(2,), unet_factor=factor, n_layer=1).transformer.h
    assert (len(unet.down), len(unet.inner), len(unet.up)) == (1, 1, 2) and isinstance(unet.inner, Stack)
    x = torch.randn(2, T, 8, dtype=torch.float64)
    fine = unet.down(x)
    zero = torch.zeros(2, 8, dtype=torch.float64)
    coarse = []
    for i in range(math.ceil(T / factor)): # made from the tokens that end at position factor * i
        ends = range(factor * i - factor + 1, factor * i + 1)
        coarse.append(unet.merge(torch.cat([fine[:, p] if p >= 0 else zero for p in ends], dim=1)))
    inner = unet.inner(torch.stack(coarse, dim=1))
    wide = []
    for p in range(T): # serves positions factor * i to factor * i + factor - 1
        i, part = divmod(p, factor)
        wide.append(fine[:, p] + unet.expand(inner[:, i])[:, part * 8:(part + 1) * 8])
    torch.testing.assert_close(unet(x), unet.up(torch.stack(wide, dim=1)))


def test_the_inner_level_of_a_unet_runs_once_every_factor_tokens():
    model = network(block_size=16, unet_layers=(1, 1), unet_factor=(2, 3), n_layer=1)
    runs = []
    model.transformer.h.inner.inner.register_forward_hook(lambda module, args, output: runs.append(args[0].size(1)))
    cache, idx = Cache(), tokens(model, 1)
    for t in range(16):
        model(idx[:, t:t + 1], cache=cache)
    assert runs == [1, 1, 1] # for tokens 0, 6 and 12


def test_the_published_unet_can_be_built():
    config = GPTConfig(block_size=1024, vocab_size=64, n_layer=100, n_head=2, n_embd=8, unet_layers=(5, 2, 2, 2, 2))
    with torch.device('meta'):
        model = GPT(config)
    unet, levels = model.transformer.h, []
    for _ in range(5):
        levels.append((len(unet.down), len(unet.up)))
        unet = unet.inner
    assert levels == [(5, 5)] + [(2, 2)] * 4
    assert isinstance(unet, Stack) and len(unet) == 100
    assert model(torch.zeros(1, 1024, dtype=torch.long, device='meta'))[0].shape == (1, 1024, 64)


@pytest.mark.parametrize('mixer', ['linear_attention', 'gated_delta'])
def test_a_state_is_the_recurrence(mixer):
    """Chunks against one token after the other, with its gradients; and the state that is left."""
    B, H, T, D = 2, 2, 150, 4
    layer = MIXERS[mixer](GPTConfig(n_embd=H * D, n_head=H, mixer=mixer, pos_emb='none', chunk=16), T).double()
    q, k, v = (torch.randn(B, H, T, D, dtype=torch.float64, requires_grad=True) for _ in range(3))
    log_g = (-torch.rand(B, H, T, dtype=torch.float64)).requires_grad_()
    b = torch.rand(B, H, T, dtype=torch.float64, requires_grad=True)
    first = torch.randn(B, H, D, D, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        k /= k.norm(dim=-1, keepdim=True) # as the delta rule takes its keys
    state, rows = first, []
    for t in range(T):
        g, kt = log_g[:, :, t].exp()[..., None, None], k[:, :, t, :, None]
        vt = v[:, :, t, None, :]
        if mixer == 'gated_delta':
            beta = b[:, :, t, None, None]
            state = g * (state - beta * kt @ (kt.mT @ state)) + beta * kt @ vt
        else:
            state = g * state + kt @ vt
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    expected = torch.stack(rows, dim=2)
    inputs = [q, k, v, log_g, *([b] if mixer == 'gated_delta' else []), first]
    y, last = layer.scan(*inputs)
    assert (y - expected).abs().max() < 1e-9 and (last - state).abs().max() < 1e-9
    direction = torch.randn_like(y)
    for found, right in zip(*(torch.autograd.grad((z * direction).sum() + s.sum(), inputs)
                              for z, s in ((y, last), (expected, state)))):
        assert (found - right).abs().max() < 1e-9


class BytesWritten(torch.utils._python_dispatch.TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += sum(t.nbytes for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
        return out


@pytest.mark.parametrize('mixer, most', [('linear_attention', 4), ('gated_delta', 4), ('rwkv7', 4), ('gmlp', 16),
                                         ('mlp_mixer', 16)])
def test_a_step_grows_with_the_length_as_it_must(mixer, most):
    """Forwards and backwards, at four times the length: a slice in a loop has a gradient as large as the whole."""
    written = []
    for T in 512, 2048:
        with torch.device('meta'):
            config = GPTConfig(n_embd=32, n_head=2, mixer=mixer, mlp='none', pos_emb='none', block_size=T)
            layer = MIXERS[mixer](config, T)
            with BytesWritten() as count:
                layer(torch.empty(1, T, 32)).sum().backward()
        written.append(count.total)
    assert written[1] < 1.03 * most * written[0]


def naive_rwkv7(mixer, x):
    """As in the paper, token after token and head after head: x (T, C) -> (T, C)."""
    H, _, D = mixer.bonus.shape
    layers = mixer.receptance, mixer.key, mixer.value, mixer.decay, mixer.rate, mixer.gate
    states, last, rows = [x.new_zeros(D, D)] * H, torch.zeros_like(x[0]), []
    for token in x:
        *inner, gate = (layer((1 - mu) * token + mu * last) for layer, mu in zip(layers, mixer.mu))
        heads = []
        for h in range(H):
            r, k, v, decay, rate = (t[h * D:(h + 1) * D] for t in inner)
            w = (-math.exp(-0.5) / (1 + (-decay - mixer.decay_bias[h, 0]).exp())).exp()
            a = 1 / (1 + (-rate - mixer.rate_bias[h, 0]).exp())
            e = k * mixer.removal[h, 0]
            e, k = e / e.norm(), k * torch.lerp(torch.ones_like(a), a, mixer.replacement[h, 0])
            states[h] = states[h] @ (torch.diag(w) - torch.outer(e, a * e)) + torch.outer(v, k)
            y = states[h] @ r
            y = (y - y.mean()) / (y.var(correction=0) + 1e-5 * D).sqrt() * mixer.norm[h, 0] + mixer.norm_bias[h, 0]
            heads.append(y + (r * mixer.bonus[h, 0] * k).sum() * v)
        rows.append(mixer.c_proj(torch.cat(heads) * gate))
        last = token
    return torch.stack(rows)


def test_rwkv7_is_the_recurrence():
    """Chunks against one token after the other, with the gradients; in float32 with the fastest decay; in pieces."""
    layer = MIXERS['rwkv7'](GPTConfig(n_embd=8, n_head=2, mixer='rwkv7', pos_emb='none'), 150).double()
    randomize(layer)
    inputs = [torch.randn(1, 150, 8, dtype=torch.float64, requires_grad=True), *layer.parameters()]
    found, expected = layer(inputs[0]), naive_rwkv7(layer, inputs[0][0])[None]
    direction = torch.randn_like(found)
    gradients = (torch.autograd.grad((y * direction).sum(), inputs) for y in (found, expected))
    for a, b in [(found, expected), *zip(*gradients)]:
        assert (a - b).abs().max() < 1e-9 * b.abs().max()
    with torch.no_grad():
        cache = Cache()
        pieces = [layer(part, cache) for part in inputs[0].split([37, 1, 1, 16, 95], dim=1)]
        assert (torch.cat(pieces, dim=1) - expected).abs().max() < 1e-9
        layer.decay_bias.fill_(50.0)
        expected = naive_rwkv7(layer, inputs[0][0])
        assert (layer.float()(inputs[0].float())[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match='n_head=8 leaves one channel a head'):
        GPTConfig(n_embd=8, n_head=8, mixer='rwkv7', pos_emb='none')


@pytest.mark.parametrize('mixer', ['linear_attention', 'gated_delta', 'rwkv7', ('gated_delta', 'attention')])
def test_without_tables_of_positions_decoding_has_no_end(mixer):
    """Far beyond block_size, against whole sequences in a model of longer blocks; in constant memory."""
    def states(cache):
        children = sum(map(states, cache.children.values()))
        return children + sum(t.numel() for ts in cache.states.values() for t in ts)
    model = network(mixer=mixer, pos_emb='none', block_size=8)
    for name, p in model.named_parameters():
        if name.endswith('decay_bias'):
            torch.nn.init.constant_(p, -6.0) # a memory of hundreds of tokens
    longer = GPT(replace(model.config, block_size=64)).double().eval()
    longer.load_state_dict(model.state_dict())
    found = tokens(longer, 1)[:, :43]
    if mixer == ('gated_delta', 'attention'): # attention's past is bounded
        assert model.bounded and model.generate(found[:, :3], 40).size(1) == 43
        return
    for first in 3, 20: # a prompt beyond block_size, too
        window = Window(model)
        for n in range(first, 43):
            right = longer(found[:, :n])[0][0, -1]
            assert (window.next_logits(found[:, :n])[0] - right).abs().max() < 1e-4 # given in float32
    cache, sizes = Cache(), []
    for n in range(30):
        model(found[:, n:n + 1], cache=cache)
        sizes.append(states(cache))
    assert len(set(sizes)) == 1 and not any(c.buffers for c in [cache, *cache.children.values()])


def test_a_window_is_decoded_with_a_cache_of_its_length():
    model = network(attention_window=5, block_size=64, n_layer=1)
    cache, idx = Cache(), tokens(model, 1)
    logits = torch.cat([model(part, cache=cache)[0] for part in idx.split(1, dim=1)], dim=1)
    assert (logits - model(idx)[0]).abs().max() < TOLERANCE
    buffers = cache.child('h').child(0).child('attn').buffers
    assert max(buffer.size(-2) for buffer, _ in buffers.values()) <= 16
    # only the last five count
    other = idx.clone()
    other[:, :40] = (other[:, :40] + 1) % 11
    changed = (model(other)[0] - model(idx)[0]).abs().amax(2)[0]
    assert changed[43] > 1e-6 and changed[44:].max() == 0


def test_a_toeplitz_table_serves_any_length():
    """Nine times block_size, against loops; from a cache, which holds no more tokens than a few tables."""
    model = network(mixer='toeplitz', pos_emb='none', block_size=5)
    layer, x = model.transformer.h[0].attn, torch.randn(2, 45, 8, dtype=torch.float64)
    expected = naive_toeplitz(model.config, layer, x)
    for chunks in [45], [1] * 45, [3, 12, 1, 1, 28], [4, 7, 5, 1, 10, 18]:
        cache = Cache()
        y = torch.cat([layer(part, cache) for part in x.split(chunks, dim=1)], dim=1)
        assert (y - expected).abs().max() < 1e-12
        assert chunks[-1] > 1 or cache.buffers['x'][0].size(-2) <= 16
    idx, window = torch.randint(11, (1, 45)), Window(model)
    for n in range(3, 46): # the network, too
        assert (window.next_logits(idx[:, :n]) - model(idx[:, :n])[0][:, -1]).abs().max() < 1e-5 # given in float32


@pytest.mark.parametrize('args, words', [(dict(sliding_window=0), 'sliding_window=0 must be at least 1'),
                                         (dict(pos_emb='relative'), "pos_emb='relative' .* use learned or rope")])
def test_what_a_window_cannot_have_is_refused(args, words):
    with pytest.raises(ValueError, match=words):
        network(mixer=('windowed', 'attention'), **args)


def test_a_gate_starts_as_the_identity():
    gate = MIXERS['gmlp'](GPTConfig(n_embd=8, n_head=2, mixer='gmlp'), 7).gate
    assert isinstance(gate, TimeLinear) and (gate.bias == 1).all()
    assert gate.weight.abs().max() < 0.1 / 7 and gate.weight.any() and torch.equal(gate.weight, gate.weight.tril())
