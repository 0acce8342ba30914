"""
The whole network in one file: a GPT whose token mixer is a setting.

Reading order: GPTConfig, the token mixers from the simplest on, the registry MIXERS, Block, the UNet stack, GPT.
To try an idea, write a Mixer, add it to MIXERS, and it trains, samples, reports MFU and is tested.

Letters mean one thing in the whole file: B batch, T tokens in this call, S tokens so far (past and present),
C channels (n_embd), H heads, D channels of a head, V vocabulary.
"""

import ctypes
import itertools
import json
import math
import os
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class GPTConfig:
    """The architecture. An illegal combination raises ValueError, which names the fields, the values and the way out."""
    block_size: int = 1024 # longest sequence, in tokens
    vocab_size: int = 50304 # GPT-2's 50257, rounded up to a multiple of 64 for faster matmuls
    n_layer: int = 12 # blocks; with unet_layers, the blocks at the narrowest level
    n_head: int = 12 # heads of every mixer
    n_embd: int = 768 # channels
    dropout: float = 0.0 # for pretraining 0 is good, for finetuning try 0.1+
    recompute: bool = False # activation checkpointing: blocks keep their input alone and run again in the backward pass
    bias: bool = True # biases in Linear and LayerNorm, as GPT-2 has them; False is a bit better and faster
    tie_weights: bool = True # one matrix for the embedding and the head
    mixer: str = 'attention' # how tokens talk to each other: a name in MIXERS
    pos_emb: str = 'learned' # learned | rope | relative (a bias per head and distance) | learned+relative | none
    mlp: str = 'gelu' # gelu | gelu_tanh (what OpenAI's GPT-2 has) | relu2 | swiglu | none
    mlp_ratio: float = 4.0 # hidden channels of the MLP, as a multiple of n_embd
    rezero: bool = False # scale every residual branch by one learned number that starts at zero
    time_mixing: float = 0.0 # fraction of a mixer's input channels taken from the previous token
    time_mixing_alternate: bool = False # shift the first channels in even layers, the last ones in odd layers
    time_weighting: str = 'none' # attention: none | circulant | full, learned weights after the softmax
    qk_norm: bool = False # attention, container: queries and keys of one length, times a learned number a head
    gmlp_ratio: float = 4.0 # gmlp: channels before the split in two halves, as a multiple of n_embd
    gmlp_tanh: bool = False # gmlp: tanh on the gate
    gmlp_attn: int = 0 # gmlp: head size of the tiny attention added to the gate (the paper uses 64); 0 is off
    synthesizer: str = 'dense' # synthesizer: dense (weights from each token) | random (weights learned outright)
    synthesizer_attn: bool = False # synthesizer: mix its scores with dot-product attention's
    unet_layers: tuple[int, ...] = () # blocks at each resolution on the way down (and up), outermost first; () is a flat stack
    unet_up_layers: tuple[int, ...] | None = None # blocks on the way up, outermost first; None: as unet_layers
    unet_factor: int | tuple[int, ...] = 2 # tokens merged into one at each level: one number, or one a level

    def __post_init__(self):
        for name in ('unet_layers', 'unet_up_layers', 'unet_factor'): # JSON and config files bring lists
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        for name, number in (('unet_layers', False), ('unet_up_layers', False), ('unet_factor', True)):
            value = getattr(self, name)
            if not (isinstance(value, tuple) and all(isinstance(n, int) for n in value) or number and isinstance(value, int)
                    or name == 'unet_up_layers' and value is None):
                raise ValueError(f"{name}={value!r} must be {'a whole number or ' * number}a tuple of them, such as (2, 2)")
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, choices in dict(mixer=MIXERS, pos_emb=('learned', 'rope', 'relative', 'learned+relative', 'none'),
                                  mlp=('gelu', 'gelu_tanh', 'relu2', 'swiglu', 'none'),
                                  time_weighting=('none', 'circulant', 'full'),
                                  synthesizer=('dense', 'random')).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if not 0.0 <= self.time_mixing <= 1.0:
            raise ValueError(f"time_mixing={self.time_mixing} is a fraction of the channels: 0.0 (off) to 1.0")
        if self.time_mixing and round(self.time_mixing * self.n_embd) == 0:
            raise ValueError(f"time_mixing={self.time_mixing} of n_embd={self.n_embd} is less than one channel: "
                             "raise it, or set 0.0")
        if round(self.mlp_ratio * self.n_embd) < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} of n_embd={self.n_embd} is less than one channel; mlp='none' "
                             "leaves the MLP out")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             f"try n_embd={math.ceil(self.n_embd / self.n_head) * self.n_head}")
        mixer = MIXERS[self.mixer]
        # a setting that only another choice reads would be a silent no-op
        unread = {name: f"only mixer={other!r} reads it, and mixer={self.mixer!r} is set" for other in MIXERS
                  for name in MIXERS[other].settings if name not in mixer.settings}
        if not self.unet_layers:
            unread |= dict.fromkeys(('unet_factor', 'unet_up_layers'), "only a UNet reads it, and unet_layers=() is set")
        if not self.time_mixing:
            unread['time_mixing_alternate'] = "only time_mixing reads it, and time_mixing=0.0 is set"
        if self.mlp == 'none':
            unread['mlp_ratio'] = "only an MLP reads it, and mlp='none' is set"
        for field in fields(self):
            if field.name in unread and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name}={getattr(self, field.name)!r}: {unread[field.name]}; "
                                 f"leave {field.name} at {field.default!r}")
        mixer.check(self)
        if self.unet_layers or self.unet_up_layers:
            down, up, factors = self.unet_levels()
            if not len(down) == len(up) == len(factors):
                raise ValueError(f"unet_layers={self.unet_layers} has {len(down)} levels, unet_up_layers={up} has "
                                 f"{len(up)}, unet_factor={self.unet_factor} has {len(factors)}: give as many of each")
            if min(down + up) < 0 or min(factors) < 2:
                raise ValueError(f"unet_factor={self.unet_factor} must be 2 or more, and unet_layers={down}, "
                                 f"unet_up_layers={up} must not be negative")
            if math.prod(factors) > self.block_size:
                raise ValueError(f"unet_layers={self.unet_layers} with unet_factor={self.unet_factor} makes one token of "
                                 f"{math.prod(factors)}, but block_size={self.block_size}: use fewer levels or a longer block")

    def unet_levels(self):
        """-> (blocks down, blocks up, factor), each a tuple with one entry a level, outermost first."""
        down = tuple(self.unet_layers)
        up = down if self.unet_up_layers is None else tuple(self.unet_up_layers)
        factors = (self.unet_factor,) * len(down) if isinstance(self.unet_factor, int) else tuple(self.unet_factor)
        return down, up, factors


# ---------------------------------------------------------------------------------------------------------------------
# Caches. A cache is a plain dict that its module owns: empty at the start of a sequence, and each call appends T more
# tokens, whatever T is. Every tensor in it has the batch first, so that a beam search can reorder it.

def sub(cache, name):
    """The part of a module's cache that its child `name` owns; None (no caching) stays None."""
    return None if cache is None else cache.setdefault(name, {})


def append(cache, name, new):
    """Appends new (B, ..., T, D) along time to what the cache holds -> everything so far (B, ..., S, D)."""
    if cache is None:
        return new
    T = new.size(-2)
    buffer, past = cache.get(name, (None, 0))
    if torch.is_tensor(past): # a Decoder's: of full size, and its length is known to the device alone
        return buffer.index_copy_(-2, past, new)
    S = past + T
    if buffer is None or S > buffer.size(-2): # a power of two: most appends copy nothing old and allocate nothing
        grown = new.new_empty(*new.shape[:-2], max(16, 1 << (S - 1).bit_length()), new.size(-1))
        if past:
            grown[..., :past, :] = buffer[..., :past, :]
        buffer = grown
    buffer[..., past:S, :] = new
    cache[name] = (buffer, S)
    return buffer[..., :S, :]


# ---------------------------------------------------------------------------------------------------------------------
# Token mixers

class Mixer(nn.Module):
    """
    Base of all token mixers: forward(x, cache=None) maps x (B, T, C) to (B, T, C), and no output depends on a later
    token. A subclass defines either mix(x), for whole sequences (decoding then recomputes the past: right, but slow),
    or forward with a cache of its own. block_size is the longest sequence that it meets: in a UNet, less than the
    config's.
    """
    settings = () # the fields of GPTConfig that only this mixer reads
    pos_embs = ('learned', 'none') # 'rope' and 'relative' act on queries and keys: not every mixer has them

    def __init__(self, config, block_size):
        super().__init__()

    @classmethod
    def check(cls, config):
        """Raises ValueError if this mixer cannot be built from config."""
        if config.pos_emb not in cls.pos_embs:
            raise ValueError(f"pos_emb={config.pos_emb!r} acts on queries and keys, which mixer={config.mixer!r} lacks: "
                             f"use {' or '.join(cls.pos_embs)}")

    def forward(self, x, cache=None):
        return self.mix(append(cache, 'x', x))[:, -x.size(1):]


class CausalSelfAttention(Mixer):
    """
    Multi-head attention. With time_weighting (minGPT-tuned), y_i = sum_{j<=i} softmax_j(q_i k_j / sqrt(D)) w_ij v_j:
    'full' learns every w_ij, 'circulant' learns w_ij = alpha_{i-j} beta_j; all of them start at one. qk_norm is arXiv
    2010.04245.
    """
    settings = ('time_weighting', 'qk_norm')
    pos_embs = ('learned', 'rope', 'relative', 'learned+relative', 'none')

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias, parts=3)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout, self.resid_dropout = Dropout(config.dropout), Dropout(config.dropout)
        H, D = config.n_head, config.n_embd // config.n_head
        self.rope = Rope(D, block_size) if config.pos_emb == 'rope' else None
        # zeros and ones: switched on over trained weights, they leave the logits as they were
        self.relative = nn.Parameter(torch.zeros(H, block_size)) if 'relative' in config.pos_emb else None
        self.qk_scale = nn.Parameter(torch.ones(H, 1, 1)) if config.qk_norm else None # how sharp a head can become
        self.time_weighting = config.time_weighting
        if self.time_weighting == 'full':
            self.weight = nn.Parameter(torch.ones(H, block_size, block_size).tril())
        elif self.time_weighting == 'circulant':
            self.alpha = nn.Parameter(torch.ones(H, block_size))
            self.beta = nn.Parameter(torch.ones(H, block_size))

    @classmethod
    def check(cls, config):
        super().check(config)
        if config.pos_emb == 'rope' and config.n_embd // config.n_head % 2:
            raise ValueError(f"pos_emb='rope' turns pairs of channels, but a head has n_embd/n_head="
                             f"{config.n_embd // config.n_head} channels: make that even")

    def forward(self, x, cache=None):
        B, T, C = x.size()
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2)) # (B, H, T, D)
        if self.qk_scale is not None:
            q, k = (F.rms_norm(t, t.shape[-1:], eps=1e-6).to(v.dtype) for t in (q, k))
            q = q * self.qk_scale.to(q.dtype)
        start = past_length(cache, 'k')
        if self.rope is not None:
            q, k = self.rope(q, start), self.rope(k, start)
        k, v = append(cache, 'k', k), append(cache, 'v', v) # (B, H, S, D)
        if torch.is_tensor(start): # a Decoder's cache: it has rows for tokens that are still to come
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache['mask'])
        else:
            y = self.attend(q, k, v) # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def attend(self, q, k, v):
        dropout = self.attn_dropout.p if self.training else 0.0
        # on a CPU the fused kernel has no dropout, and it trains short sequences more slowly in bfloat16
        fused = q.device.type != 'cpu' or not torch.is_grad_enabled() or \
            not dropout and (q.dtype != torch.bfloat16 or q.size(2) > 1024)
        if self.time_weighting == 'none' and self.relative is None and fused:
            return causal_attention(q, k, v, dropout)
        if self.time_weighting == 'circulant':
            v = v * self.beta[:, :v.size(2), None].to(v.dtype)
        return by_rows(lambda q, k, v: self.weights(q, k) @ v, q, k, v)

    def weights(self, q, k):
        """The weight of each of the S values in each of the last T outputs: (B, H, T, S)."""
        T, S = q.size(2), k.size(2)
        att = self.attn_dropout(causal_softmax(self.scores(q, k)).to(q.dtype))
        if self.time_weighting == 'full':
            att = att * self.weight[:, S - T:S, :S]
        elif self.time_weighting == 'circulant':
            att = att * toeplitz(self.alpha, T, S)
        return att.to(q.dtype)

    def scores(self, q, k):
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(2, 3) # (B, H, T, S)
        return scores if self.relative is None else scores + toeplitz(self.relative, q.size(2), k.size(2))


class Container(CausalSelfAttention):
    """
    CONTAINER (arXiv 2106.01401): (alpha softmax(q k) + beta tril(S)) v, with S a learned affinity of positions. Dropout is
    for the softmax alone.
    """
    settings = ('qk_norm',)

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        H = config.n_head
        self.affinity = nn.Parameter(causal_init(H, block_size))
        self.alpha = nn.Parameter(torch.ones(H, 1, 1))
        self.beta = nn.Parameter(torch.full((H, 1, 1), 0.1)) # attention leads at the start

    def attend(self, q, k, v):
        T, S = q.size(2), k.size(2)
        by_position = mix_time(self.affinity[:, S - T:S, :S].to(v.dtype), v)
        return (self.alpha * super().attend(q, k, v) + self.beta * by_position).to(v.dtype)


class Synthesizer(CausalSelfAttention):
    """
    Synthesizer (arXiv 2005.00743): the attention scores do not compare tokens. 'dense': token i proposes its whole row
    by an MLP, 'random': the rows are learned outright. synthesizer_attn adds q k as a second term of a learned mixture.
    """
    settings = ('synthesizer', 'synthesizer_attn')

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        C, H = config.n_embd, config.n_head
        self.dense, self.dot_product = config.synthesizer == 'dense', config.synthesizer_attn
        if not self.dot_product:
            self.c_attn = Linear(C, C, bias=config.bias) # values only
        if self.dense:
            self.c_fc = Linear(C, C, bias=config.bias)
            self.rows = nn.Parameter(torch.randn(H, C // H, block_size) * 0.02)
        else:
            self.table = nn.Parameter(causal_init(H, block_size))
        if self.dot_product:
            self.mixture = nn.Parameter(torch.zeros(2, H, 1, 1)) # a softmax over the two terms, equal at the start

    @classmethod
    def check(cls, config):
        if config.pos_emb not in Mixer.pos_embs and not config.synthesizer_attn:
            raise ValueError(f"pos_emb={config.pos_emb!r} acts on queries and keys, which mixer='synthesizer' has only "
                             "with synthesizer_attn=True")
        super().check(config)

    def forward(self, x, cache=None):
        B, T, C = x.size()
        heads = lambda t: t.view(B, T, self.n_head, -1).transpose(1, 2) # (B, H, T, D)
        past = past_length(cache, 'v')
        q, k, v = map(heads, self.c_attn(x).split(C, dim=2)) if self.dot_product else (None, None, heads(self.c_attn(x)))
        if self.rope is not None:
            q, k = self.rope(q, past), self.rope(k, past)
        v = append(cache, 'v', v) # (B, H, S, D)
        S = v.size(2)
        proposal = heads(F.relu(self.c_fc(x))) if self.dense else None # (B, H, T, D)
        if self.dot_product:
            scores = proposal @ self.rows[:, :, :S].to(x.dtype) if self.dense else self.table[:, past:S, :S] # (B, H, T, S)
            a = self.mixture.softmax(0)
            scores = a[0] * scores + a[1] * self.scores(q, append(cache, 'k', k))
            y = self.attn_dropout(causal_softmax(scores).to(v.dtype)) @ v
        elif self.dense: # is attention with one learned key for each position; attention divides by sqrt(D)
            keys = self.rows[:, :, :S].transpose(1, 2).contiguous() * math.sqrt(v.size(3)) # (H, S, D)
            y = self.attend(proposal, keys.to(proposal.dtype).expand(B, -1, -1, -1), v)
        else: # the same weights, and the same dropout, for all sequences
            y = mix_time(self.attn_dropout(causal_softmax(self.table[None, :, past:S, :S])[0].to(v.dtype)), v)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class TimeLinear(nn.Module):
    """A linear layer along time: y_t = sum_{s<=t} W_ts x_s + b_t, W (H, T, T). Maps (B, H, T, D) to (B, H, T, D)."""
    def __init__(self, n_head, block_size, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(causal_init(n_head, block_size, std))
        self.bias = nn.Parameter(torch.zeros(n_head, block_size))

    def forward(self, x, cache=None):
        T = x.size(2)
        x = append(cache, 'x', x) # (B, H, S, D)
        S = x.size(2)
        y = mix_time(self.weight[:, S - T:S, :S].to(x.dtype), x)
        return y + self.bias[:, S - T:S, None].to(y.dtype)


class MLPMixer(Mixer):
    """MLP-Mixer (arXiv 2105.01601) made causal: in each head, two triangular linear layers along time with a GELU between."""
    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.n_head = config.n_head
        self.c_fc = TimeLinear(config.n_head, block_size)
        self.c_proj = TimeLinear(config.n_head, block_size)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.size()
        u = self.c_fc(x.view(B, T, self.n_head, -1).transpose(1, 2), sub(cache, 'c_fc')) # (B, H, T, D)
        y = self.c_proj(F.gelu(u), sub(cache, 'c_proj'))
        return self.resid_dropout(y.transpose(1, 2).reshape(B, T, C))


class GatedMLP(Mixer):
    """
    gMLP (arXiv 2105.08050) made causal: the channels are split in (u, v), v is mixed along time and gates u. The gate
    starts as the identity. It brings its own MLP, so mlp='none' gives the paper's block. gmlp_attn adds a tiny attention
    to the gate (the paper's aMLP).
    """
    settings = ('gmlp_ratio', 'gmlp_tanh', 'gmlp_attn')

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.n_head, self.tanh = config.n_head, config.gmlp_tanh
        E = self.half_width(config)
        self.c_fc = Linear(config.n_embd, 2 * E, bias=config.bias, parts=2)
        self.ln = nn.LayerNorm(E, bias=config.bias)
        self.gate = TimeLinear(config.n_head, block_size, std=0.02 / block_size)
        nn.init.ones_(self.gate.bias)
        self.c_proj = Linear(E, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        if config.gmlp_attn:
            self.attn_qkv = Linear(config.n_embd, 3 * config.gmlp_attn, bias=config.bias, parts=3)
            self.attn_proj = Linear(config.gmlp_attn, E, bias=config.bias)
        self.attn_size = config.gmlp_attn

    @staticmethod
    def half_width(config):
        return round(config.gmlp_ratio * config.n_embd) // 2

    @classmethod
    def check(cls, config):
        super().check(config)
        E = cls.half_width(config)
        if E < 1 or E % config.n_head:
            raise ValueError(f"gmlp_ratio={config.gmlp_ratio} of n_embd={config.n_embd} gives a gate of {E} channels, "
                             f"which n_head={config.n_head} does not divide")
        if config.gmlp_attn < 0:
            raise ValueError(f"gmlp_attn={config.gmlp_attn} is a head size: 0 (off) or more")

    def forward(self, x, cache=None):
        B, T, C = x.size()
        u, v = F.gelu(self.c_fc(x)).chunk(2, dim=2) # (B, T, E) each
        v = self.ln(v).view(B, T, self.n_head, -1).transpose(1, 2)
        gate = self.gate(v, sub(cache, 'gate')).transpose(1, 2).reshape(B, T, -1)
        if self.attn_size:
            q, k, a = self.attn_qkv(x)[:, None].split(self.attn_size, dim=3) # (B, 1, T, D): one head
            a = causal_attention(q, append(cache, 'k', k), append(cache, 'v', a),
                                 self.resid_dropout.p if self.training else 0.0)
            gate = gate + self.attn_proj(a[:, 0])
        if self.tanh:
            gate = torch.tanh(gate)
        return self.resid_dropout(self.c_proj(u * gate))


MIXERS = {
    'attention': CausalSelfAttention,
    'mlp_mixer': MLPMixer,
    'gmlp': GatedMLP,
    'synthesizer': Synthesizer,
    'container': Container,
}


# ---------------------------------------------------------------------------------------------------------------------
# What the mixers share

class Linear(nn.Linear):
    """
    As torch's, but decoding one token in bfloat16 on a CPU reads the weights at the memory's speed, 1.6 times faster. parts:
    so many matrices lie in this one, below each other, which Muon takes apart.
    """
    def __init__(self, n_in, n_out, bias=True, parts=1):
        super().__init__(n_in, n_out, bias=bias)
        self.parts = parts

    def forward(self, x):
        if x.numel() == self.in_features and x.dtype == self.weight.dtype == torch.bfloat16 and x.device.type == 'cpu' and not torch.is_grad_enabled():
            y = torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class Dropout(nn.Module):
    """
    Inverted dropout. torch draws a float for every element, which takes half of a training step on a CPU. There, 16 random
    bits an element do: p is off by less than 1e-5, and the scale is that of the probability drawn.
    """
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != 'cpu':
            return F.dropout(x, self.p)
        dropped = round(self.p * 65536) # of the 65536 values
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
        keep = bits[:x.numel()].view(x.shape).ge_(dropped - 32768) # as integers: from bool the conversion is not vectorized
        return x * keep.to(x.dtype).mul_(65536 / (65536 - dropped))


class Rope(nn.Module):
    """Rotary position embedding (arXiv 2104.09864): turns the channel pairs (d, d + D/2) of x (B, H, T, D) by position."""
    def __init__(self, D, block_size, base=10000.0):
        super().__init__()
        frequency = base ** (-torch.arange(0, D, 2).float() / D)
        angle = torch.outer(torch.arange(block_size).float(), frequency) # (block_size, D/2)
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)

    def forward(self, x, start):
        positions = start if torch.is_tensor(start) else slice(start, start + x.size(2))
        cos, sin = (t[positions].to(x.dtype) for t in (self.cos, self.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def past_length(cache, name):
    return cache[name][1] if cache and name in cache else 0


def causal_init(n_head, block_size, std=0.02):
    """A lower-triangular (H, T, T) table. Small: at a scale of 1/sqrt(t) MLP-Mixer ends at a loss 0.6 higher."""
    return (torch.randn(n_head, block_size, block_size) * std).tril()


def row_blocks(T, size=256):
    """The rows of a triangle in blocks (first, end): work on rows first..end needs no column from end on."""
    return [(i, min(i + size, T)) for i in range(0, T, size)]


def by_rows(f, q, k, v):
    """f(q, k, v) for blocks of the last T of S positions: skips most of the half of the scores that causality removes."""
    T, past = q.size(2), k.size(2) - q.size(2)
    parts = [f(q[:, :, i:j], k[:, :, :past + j], v[:, :, :past + j]) for i, j in row_blocks(T)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def mix_time(W, x):
    """y_t = sum_{s<=t} W_ts x_s for the last T of S tokens: W (H, T, S), x (B, H, S, D) -> (B, H, T, D)."""
    T, S = W.shape[1:]
    # only the blocks on and below the diagonal are multiplied
    return torch.cat([torch.einsum('hts,bhsd->bhtd', W[:, i:j, :S - T + j].tril(S - T + i), x[:, :, :S - T + j])
                      for i, j in row_blocks(T)], dim=2)


def toeplitz(a, T, S):
    """M[h, i, j] = a[h, distance], where i is the i-th of the last T of S positions: a (H, block_size) -> (H, T, S)."""
    past = S - T
    ring = torch.cat([a[:, :past + 1].flip(1), a.new_zeros(a.size(0), T), a[:, past + 1:S].flip(1)], dim=1) # (H, S + T)
    # rows of length S + T read as rows of length S + T - 1 are each turned one step further: no gather, cheap backward
    rows = ring[:, None].expand(-1, T, -1).reshape(a.size(0), -1)[:, :T * (S + T - 1)]
    return rows.view(a.size(0), T, S + T - 1)[:, :, :S]


def causal_softmax(scores):
    """Softmax of scores (B, H, T, S) over the positions up to each token's own; the T tokens are the last of the S."""
    T, S = scores.shape[-2:]
    mask = scores.new_full((T, S), float('-inf')).triu(S - T + 1) # added: unlike masked_fill, no work in the backward pass
    # the softmax sums in float32 inside, so 16 bits do; autocast does not know the meta device, on which costs are counted
    with torch.autocast(scores.device.type.replace('meta', 'cpu'), enabled=False):
        return (scores + mask).softmax(dim=-1)


def causal_attention(q, k, v, dropout=0.0):
    """Causal scaled_dot_product_attention of the last T of S positions: q (B, H, T, D), k, v (B, H, S, D) -> (B, H, T, D)."""
    T, S = q.size(2), k.size(2)
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        with torch.autocast('cpu', enabled=False): # torch's backward in bfloat16 takes 7 times as long on a CPU as this
            return causal_attention(q.float(), k.float(), v.float(), dropout).to(q.dtype)
    if T == S or T == 1:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and stacks of blocks

class TimeMixing(nn.Module):
    """Takes a part of the channels from the previous token (minGPT-tuned); before the first token there are zeros."""
    def __init__(self, config, layer):
        super().__init__()
        n = round(config.time_mixing * config.n_embd)
        last = config.time_mixing_alternate and layer % 2
        self.channels = slice(config.n_embd - n, config.n_embd) if last else slice(0, n)

    def forward(self, x, cache=None):
        here = x[:, :, self.channels]
        before = torch.zeros_like(here[:, :1]) if not cache else cache['last']
        if cache is not None:
            cache['last'] = here[:, -1:].clone() # a view would keep the whole chunk alive
        shifted = torch.cat([before, here[:, :-1]], dim=1)
        return torch.cat([x[:, :, :self.channels.start], shifted, x[:, :, self.channels.stop:]], dim=2)


class MLP(nn.Module):
    """The feed-forward half of a block; relu2 is arXiv 2109.08668, swiglu is arXiv 2002.05202."""
    def __init__(self, config):
        super().__init__()
        hidden = round(config.mlp_ratio * config.n_embd)
        self.kind = config.mlp
        halves = 2 if self.kind == 'swiglu' else 1
        self.c_fc = Linear(config.n_embd, halves * hidden, bias=config.bias, parts=halves)
        self.c_proj = Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        if self.kind == 'swiglu':
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        elif self.kind == 'relu2':
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate='tanh' if self.kind == 'gelu_tanh' else 'none')
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Token mixer, then MLP, each on a normalized residual branch."""
    def __init__(self, config, layer, block_size):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.shift = TimeMixing(config, layer) if config.time_mixing else None
        self.attn = MIXERS[config.mixer](config, block_size) # called attn whatever it is: GPT-2's weights load by name
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias) if config.mlp != 'none' else None
        self.mlp = MLP(config) if config.mlp != 'none' else None
        # ReZero, arXiv 2003.04887: one number a branch
        self.scales = nn.Parameter(torch.zeros(1 + (config.mlp != 'none'))) if config.rezero else None

    def forward(self, x, cache=None):
        y = self.ln_1(x)
        if self.shift is not None:
            y = self.shift(y, sub(cache, 'shift'))
        y = self.attn(y, sub(cache, 'attn'))
        x = x + (y if self.scales is None else self.scales[0] * y)
        if self.mlp is not None:
            y = self.mlp(self.ln_2(x))
            x = x + (y if self.scales is None else self.scales[1] * y)
        return x


class Stack(nn.ModuleList):
    """n blocks, one after the other, on sequences of up to block_size tokens."""
    def __init__(self, config, n, block_size):
        super().__init__(Block(config, layer, block_size) for layer in range(n))
        self.recompute = config.recompute

    def forward(self, x, cache=None):
        for i, block in enumerate(self):
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, sub(cache, i))
        return x


class UNet(nn.Module):
    """
    Blocks at full resolution around a shorter sequence in which one token stands for `factor` (nanoGPT's UNet thread;
    Hourglass, arXiv 2110.13711), and so on inwards. No output sees a later token, at any length: coarse token i is made
    from the fine tokens that END at position factor * i (zeros before the start) and serves factor * i and the
    factor - 1 positions after it. Merging tokens into their own first position instead would show each the next one.
    In decoding, the inner level runs once every `factor` tokens.
    """
    def __init__(self, config, block_size, level=0):
        super().__init__()
        down, up, factors = config.unet_levels()
        self.factor, C = factors[level], config.n_embd
        inner_size = math.ceil(block_size / self.factor)
        self.down = Stack(config, down[level], block_size)
        self.merge = Linear(self.factor * C, C, bias=config.bias)
        self.inner = (UNet(config, inner_size, level + 1) if level + 1 < len(down)
                      else Stack(config, config.n_layer, inner_size))
        self.expand = Linear(C, self.factor * C, bias=config.bias)
        self.up = Stack(config, up[level], block_size)

    def forward(self, x, cache=None):
        B, T, C = x.size()
        f = self.factor
        x = self.down(x, sub(cache, 'down'))
        # `before` are the last f - 1 tokens of the past, `ready` the coarse vectors for the next positions of this level
        before, ready = cache['state'] if cache and 'state' in cache else (x.new_zeros(B, f - 1, C), x.new_zeros(B, 0, C))
        tokens = torch.cat([before, x], dim=1)
        n = math.ceil((T - ready.size(1)) / f) # coarse tokens that start in this chunk
        if n > 0:
            merged = self.merge(tokens[:, ready.size(1):ready.size(1) + n * f].reshape(B, n, f * C)).to(x.dtype) # as wide as outside
            inner = self.inner(merged, sub(cache, 'inner'))
            ready = torch.cat([ready, self.expand(inner).view(B, n * f, C)], dim=1)
        if cache is not None:
            cache['state'] = tokens[:, T:].clone(), ready[:, T:].clone()
        return self.up(x + ready[:, :T], sub(cache, 'up')) # the skip connection


# ---------------------------------------------------------------------------------------------------------------------

LOGITS_AT_ONCE = 2 ** 25 # 128 MB in float32; not the class', where torch.compile cannot read it


class LinearCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of the logits x @ weight.T without ever holding them all: x (N, C), weight (V, C), targets (N,) with -1
    for none. Rows are done in chunks, and each chunk's gradient at once, while its logits are there.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, with_grad):
        w = weight.to(x.dtype)
        if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type): # the matrix products in 16 bits, as autocast does them
            x, w = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
        # at most 4 chunks: each one adds to the whole gradient of weight, and a compiler makes one pass of 4 additions
        n, rows = (targets >= 0).sum(), max(1, LOGITS_AT_ONCE // weight.size(0), math.ceil(x.size(0) / 4))
        loss = x.new_zeros((), dtype=torch.float32 if x.dtype != torch.float64 else x.dtype)
        grad_x, grad_w = (torch.empty_like(x), torch.zeros_like(weight)) if with_grad else (None, None)
        for i in range(0, x.size(0), rows):
            part, target = x[i:i + rows], targets[i:i + rows, None]
            log_probs = (part @ w.t()).log_softmax(dim=1, dtype=loss.dtype) # (rows, V)
            valid = target >= 0
            target = target.clamp(min=0)
            right = log_probs.gather(1, target) # of the targets
            loss -= (right * valid).sum()
            if with_grad:
                scale = valid.to(loss.dtype) * 1024 / n # 1 / n alone is too small for float16
                grad = log_probs.exp_().mul_(scale).to(x.dtype) # of the logits
                grad.scatter_(1, target, ((right.exp() - 1) * scale).to(x.dtype)) # last: before, compilers would keep float32
                grad_x[i:i + rows] = grad @ w
                grad_w += grad.t() @ part
        ctx.save_for_backward(grad_x, grad_w)
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * (grad / 1024), grad_w * (grad / 1024), None, None


EVERY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class FusedAttention(TorchFunctionMode):
    """Attention without memory, on the meta device, keeps what a GPU's kernel keeps: torch takes its unfused formula there."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, is_causal=kwargs['is_causal'])[0]
        return func(*args, **(kwargs or {}))


class GPT(nn.Module):
    """
    A language model: forward(idx, targets=None) -> (logits, loss). Without targets, logits are (B, T, V) for every
    position and loss is None; with targets (B, T), where -1 is ignored, loss is the mean cross-entropy in nats a token
    and logits are None: in training nobody reads them, and they can be the largest tensor of all.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        h = UNet(config, config.block_size) if config.unet_layers else Stack(config, config.n_layer, config.block_size)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, C),
            wpe=nn.Embedding(config.block_size, C) if 'learned' in config.pos_emb else None,
            drop=Dropout(config.dropout),
            h=h,
            ln_f=nn.LayerNorm(C, bias=config.bias),
        ))
        self.lm_head = Linear(C, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        # GPT-2's initialization: what a block adds to the residual stream shrinks with their number
        n_blocks = sum(isinstance(m, Block) for m in self.modules())
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith(('c_proj', 'expand'))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * n_blocks) if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, idx, cache=None):
        """The normalized residual stream before the head: idx (B, T) -> (B, T, C)."""
        T = idx.size(1)
        past = cache.get('t', 0) if cache is not None else 0
        if not torch.is_tensor(past) and past + T > self.config.block_size:
            raise ValueError(f"a sequence of {past + T} tokens is longer than block_size={self.config.block_size}")
        x = self.transformer.wte(idx)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe.weight[past if torch.is_tensor(past) else slice(past, past + T)]
        x = self.transformer.h(self.transformer.drop(x), sub(cache, 'h'))
        if cache is not None and not torch.is_tensor(past):
            cache['t'] = past + T
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, cache=None):
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x), None
        return None, LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), torch.is_grad_enabled())

    # -- generation

    def next_logits(self, out, window, use_cache=True):
        """
        Logits (B, V) of the token after out (B, T). window is {} at first (or holds a decoder) and remembers what was read:
        at most block_size tokens. When it is full it restarts from its last half, which is read again (the same for every
        mixer, and much cheaper than sliding the window by one).
        """
        n, block = out.size(1), self.config.block_size
        first = 'start' not in window
        if first or n - window['start'] > block:
            start = max(0, n - block) if first else n - max(1, block // 2)
            window |= dict(start=start, done=start, cache={})
        decoder = window.get('decoder')
        if decoder and n - 1 == window['done'] > window['start']:
            logits = decoder(out[:, -1:])
        else:
            # not cuDNN's attention, torch's first choice on an H100: it takes tens of milliseconds to get ready for each length
            with sdpa_kernel(EVERY_LENGTH) if out.device.type == 'cuda' else nullcontext():
                x = self.hidden(out[:, window['done']:], window['cache']) if use_cache else self.hidden(out[:, window['start']:])
            logits = self.lm_head(x[:, -1])
            if decoder:
                decoder.load(window['cache'], n - window['start'])
        window['done'] = n
        return logits.float()

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
               repetition_window=None, no_repeat_ngram=0, min_p=0.0, vocab_size=None, use_cache=True, static=None, generator=None):
        """
        Yields max_new_tokens times the next token (B, 1) after idx (B, T).

        temperature 0 takes the most likely token; top_k keeps the k most likely, top_p (arXiv 1904.09751) the smallest
        set that holds this much probability, min_p (arXiv 2407.01082) those that have this share of the likeliest one's;
        repetition_penalty and no_repeat_ngram: see penalize; vocab_size leaves out a padded vocabulary's last ids.
        use_cache=False recomputes the window for every token: slow, for comparison. static: decode with a Decoder; None
        does so on a GPU, where the architecture allows it.
        """
        self.check_generation(idx, repetition_penalty, repetition_window, no_repeat_ngram)
        for name, value, right in (('temperature', temperature, temperature >= 0), ('top_k', top_k, top_k is None or top_k >= 1),
                                   ('top_p', top_p, top_p is None or 0 < top_p <= 1), ('min_p', min_p, 0 <= min_p <= 1)):
            if not right:
                raise ValueError(f"{name}={value} is out of range: temperature from 0, top_k from 1, top_p in (0, 1], min_p in [0, 1]")
        n = idx.size(1)
        out = torch.cat([idx, idx.new_empty(idx.size(0), max_new_tokens)], dim=1)
        if static is None:
            static = idx.device.type == 'cuda' and use_cache and Decoder.supports(self)
        window = dict(decoder=Decoder(self, idx.size(0))) if static and use_cache else {}
        for n in range(n, n + max_new_tokens):
            logits = self.next_logits(out[:, :n], window, use_cache)[:, :vocab_size]
            logits = penalize(logits, out[:, :n][:, -(repetition_window or self.config.block_size):], repetition_penalty, no_repeat_ngram)
            token = pick(logits, temperature, top_k, top_p, min_p, generator)
            out[:, n:n + 1] = token
            yield token

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **kwargs):
        """idx (B, T) -> (B, T + max_new_tokens): idx with the new tokens appended. More options: see stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, **kwargs)], dim=1)

    @torch.no_grad()
    def beam_search(self, idx, max_new_tokens, beams=4, length_penalty=1.0, repetition_penalty=1.0, repetition_window=None,
                    no_repeat_ngram=0, vocab_size=None, eot=None):
        """
        The likeliest continuation that a search of so many beams finds: idx (1, T) -> (1, T + n), n <= max_new_tokens; it
        ends with the token eot, if that is given and comes. Likeliest means the largest sum of log-probabilities divided
        by n ** length_penalty: above 0 favours long ones. Penalties change scores as in stream.
        """
        self.check_generation(idx, repetition_penalty, repetition_window, no_repeat_ngram)
        if beams < 1 or idx.size(0) != 1:
            raise ValueError(f"beams={beams} must be at least 1, and the prompt one row, not {idx.size(0)}")
        prompt, out, window = idx.size(1), idx, {}
        scores, finished = idx.new_zeros(1, 1, dtype=torch.float32), [] # finished: (score, sequence)
        for n in range(1, max_new_tokens + 1):
            logits = self.next_logits(out, window)[:, :vocab_size]
            logits = penalize(logits, out[:, -(repetition_window or self.config.block_size):], repetition_penalty, no_repeat_ngram)
            totals = scores + logits.log_softmax(dim=1) # (beams, V)
            # twice as many as are kept, since each beam may end with eot
            best, where = totals.flatten().topk(min(2 * beams, totals.numel()))
            rows, tokens = where // totals.size(1), where % totals.size(1)
            ends = tokens == eot if eot is not None else torch.zeros_like(tokens, dtype=torch.bool)
            for i in ends[:beams].nonzero().flatten().tolist():
                finished.append((best[i].item() / n ** length_penalty, torch.cat([out[rows[i]], tokens[i:i + 1]])))
            rows, tokens, scores = (t[~ends][:beams] for t in (rows, tokens, best))
            if len(finished) >= beams or not len(rows):
                break
            out = torch.cat([out[rows], tokens[:, None]], dim=1)
            window['cache'], scores = reorder(window['cache'], rows), scores[:, None]
        finished += [(score.item() / (out.size(1) - prompt) ** length_penalty, row) for score, row in zip(scores, out)] * (len(finished) < beams)
        return max(finished, key=lambda pair: pair[0])[1][None]

    def check_generation(self, idx, repetition_penalty, repetition_window, no_repeat_ngram):
        if idx.size(1) == 0:
            raise ValueError("generation continues a prompt of at least one token, and got none")
        if repetition_penalty <= 0 or no_repeat_ngram < 0:
            raise ValueError(f"repetition_penalty={repetition_penalty} must be above 0, no_repeat_ngram={no_repeat_ngram} at least 0")
        if repetition_window is not None and not 1 <= repetition_window <= self.config.block_size:
            raise ValueError(f"repetition_window={repetition_window} must be from 1 to block_size={self.config.block_size}: "
                             "the model sees no more tokens than that")

    # -- optimizer

    def optimizer_groups(self):
        """
        -> {group: [(name, parameter)]}: embeddings, hidden (the matrices of Linear layers), head (if it is not the
        embedding), rest. Weight decay is for the first three: a rule such as dim() >= 2 would pull time weights from one
        to zero.
        """
        kinds = {id(m.weight): 'hidden' for m in self.modules() if isinstance(m, nn.Linear)} | {id(self.lm_head.weight): 'head'}
        kinds |= {id(m.weight): 'embeddings' for m in self.modules() if isinstance(m, nn.Embedding)}
        groups = dict(embeddings=[], hidden=[], head=[], rest=[])
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups[kinds.get(id(p), 'rest')].append((name, p))
        return groups

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, optimizer='adamw', momentum=0.95,
                             nesterov=True, lrs={}, decays={}):
        """
        adamw (as nanoGPT has it) | muon (hidden matrices, AdamW for the rest) | sm3. lrs and decays: a group's learning
        rate and weight decay where they are to differ, by optimizer_groups' names. Each group's lr_scale is what to
        multiply a schedule's learning rate by.
        """
        groups = []
        for name, named in self.optimizer_groups().items():
            lr = lrs.get(name, learning_rate)
            if named:
                groups.append(dict(params=[p for _, p in named], lr=lr, lr_scale=lr / learning_rate if learning_rate else 1.0,
                                   weight_decay=decays.get(name, weight_decay) if name != 'rest' else 0.0, muon=name == 'hidden'))
        fused = device_type in ('cuda', 'cpu')
        if optimizer == 'muon':
            parts = {m.weight: m.parts for m in self.modules() if isinstance(m, Linear)}
            return Muon(groups, learning_rate, betas, fused, momentum, nesterov, parts)
        if optimizer == 'sm3':
            return SM3(groups, learning_rate, momentum, nesterov)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    # -- size and cost

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding leaves out the position table (as nanoGPT; the head shares wte)."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding and self.transformer.wpe is not None else n

    def cost(self, T=None, dtype=torch.float32, device_type=None):
        """
        -> (FLOPs a token, bytes a token that are kept for the backward pass), at length T (default block_size), on
        device_type (default: where the weights are). Counted on a copy without memory, so that it is right for any mixer:
        matrix products of the forward pass, times three for forward and backward; what a compiler saves is not seen.
        """
        T, device_type = T or self.config.block_size, device_type or self.lm_head.weight.device.type
        with torch.device('meta'):
            model = GPT(replace(self.config, dropout=0.0)).to(dtype)
            idx = torch.zeros(1, T, dtype=torch.long)
        kept = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
        weights = sum(s.nbytes() for s in kept.values())
        def keep(t):
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
            return t
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(idx)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), nullcontext() if device_type == 'cpu' else FusedAttention():
            model(idx, idx)
        if self.config.recompute: # checkpoint keeps these beside autograd
            n_blocks = sum(isinstance(m, Block) for m in model.modules())
            kept['inputs'] = torch.empty(n_blocks, T, self.config.n_embd, device='meta', dtype=dtype).untyped_storage()
        return 3 * counter.get_total_flops() / T, (sum(s.nbytes() for s in kept.values()) - weights) / T

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """Model FLOPs utilization (arXiv 2204.02311): the share of peak_flops that fwdbwd_per_iter sequences in dt seconds use."""
        return self.cost()[0] * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def first_nonfinite(self, idx, targets):
        """The name of the first module whose output is not finite in a forward pass, or None."""
        found = []
        def look(name):
            def hook(module, args, output):
                for t in output if isinstance(output, tuple) else (output,):
                    if torch.is_tensor(t) and not torch.isfinite(t).all():
                        found.append(name or 'the loss')
            return hook
        hooks = [module.register_forward_hook(look(name)) for name, module in self.named_modules()]
        with torch.no_grad():
            self(idx, targets)
        for hook in hooks:
            hook.remove()
        return found[0] if found else None

    # -- weights

    def load_weights(self, state, grow=False):
        """
        Loads a state dict by name: this project's, nanoGPT's or GPT-2's. With grow=True, parameters that start as the
        identity may be missing; returns their names. Anything else that does not fit raises ValueError with the list.
        """
        state = {k.removeprefix('module.').removeprefix('_orig_mod.'): v for k, v in state.items()}
        # old checkpoints hold causal masks under these names
        state = {k: v for k, v in state.items() if not k.endswith('.attn.masked_bias') and
                 not (k.endswith('.attn.bias') and v.dim() == 4)}
        own = dict(self.named_parameters())
        wte, head = state.get('transformer.wte.weight'), state.get('lm_head.weight')
        if wte is not None and head is None and not self.config.tie_weights:
            state['lm_head.weight'] = wte # untying starts from the tied matrix
        if self.config.tie_weights and head is not None and wte is not None:
            if head.shape != wte.shape or not torch.equal(head, wte):
                raise ValueError("the checkpoint's head differs from its embedding: set tie_weights=False")
            del state['lm_head.weight']
        surplus, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
        if surplus:
            raise ValueError(f"the checkpoint has parameters that this architecture lacks: {brief(surplus)}")
        identity = ('.attn.relative', '.attn.weight', '.attn.alpha', '.attn.beta', '.bias')
        lost = [k for k in missing if not (grow and k.endswith(identity))]
        if lost:
            raise ValueError(f"the checkpoint lacks parameters that this architecture has: {brief(lost)}")
        wrong = [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in state.items() if v.shape != own[k].shape]
        if wrong:
            raise ValueError(f"the checkpoint's parameters have other shapes than this architecture's: {brief(wrong)}; a "
                             "block_size beyond the checkpoint's needs an architecture without tables of positions")
        with torch.no_grad():
            for k, v in state.items():
                own[k].copy_(v)
        return missing

    def crop_block_size(self, block_size):
        """Shortens every table along time to block_size tokens: start from GPT-2's 1024, say, and train at 256."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size={block_size} is longer than the {self.config.block_size} positions of these "
                             f"weights: use block_size={self.config.block_size} or less")
        if block_size == self.config.block_size:
            return
        device, old = self.lm_head.weight.device, dict(self.named_parameters())
        with device:
            cropped = GPT(replace(self.config, block_size=block_size)).to(self.lm_head.weight.dtype)
        with torch.no_grad():
            for k, p in cropped.named_parameters():
                p.copy_(old[k][tuple(slice(n) for n in p.shape)])
        cropped.train(self.training)
        self.config, self.transformer, self.lm_head = cropped.config, cropped.transformer, cropped.lm_head

    @classmethod
    def from_weights(cls, args, state, allow_changes=False, **changes):
        """
        A GPT of GPTConfig(**args) with the weights in state -> (model, a line for each addition). changes are fields that
        leave the weights their meaning: dropout, another block_size, additions that start as the identity, and
        time_mixing, which has no identity and must be trained in. Others are refused unless allow_changes.
        """
        safe = dict(dropout=True, recompute=True, block_size=True, bias=True, tie_weights=True, time_mixing=True, time_weighting=True,
                    pos_emb=(args.get('pos_emb', 'learned'), changes.get('pos_emb'))
                    in (('none', 'relative'), ('learned', 'learned+relative')))
        defaults = vars(GPTConfig())
        other = [f"{k}={v!r} instead of {args.get(k, defaults.get(k))!r}" for k, v in changes.items()
                 if v != args.get(k, defaults.get(k)) and not safe.get(k)]
        if other and not allow_changes:
            raise ValueError(f"{brief(other)} changes what the checkpoint's weights mean: leave it as it was, or "
                             "--allow_changes=True")
        before, args = args, {**args, **changes}
        unknown = args.keys() - {f.name for f in fields(GPTConfig)}
        if unknown:
            raise ValueError(f"the checkpoint's architecture has {brief(sorted(unknown))}, which this model.py lacks")
        model = cls(GPTConfig(**args | dict(block_size=max(before['block_size'], args['block_size']))))
        grow = any(k in changes for k in ('time_weighting', 'pos_emb', 'bias', 'tie_weights'))
        added = model.load_weights(state, grow)
        model.crop_block_size(args['block_size'])
        added = [f"{name}, starting as the identity" for name in added]
        if args.get('time_mixing', 0.0) != before.get('time_mixing', 0.0):
            added.append(f"time_mixing={args['time_mixing']}, which has no identity: the logits change")
        return model, added

    @classmethod
    def load(cls, path, device='cpu', **changes):
        """A checkpoint of train.py (or nanoGPT's) -> (model in evaluation mode, the checkpoint's dict)."""
        checkpoint = load_checkpoint(path)
        try:
            model, _ = cls.from_weights(checkpoint['model_args'], checkpoint.get('average') or checkpoint['model'], **changes)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        return model.to(device).eval(), checkpoint

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """
        GPT-2's weights: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' (downloaded once from Hugging Face), or a local
        folder in Hugging Face's layout. override_args are changes as in from_weights, and what they add is printed.
        """
        from safetensors.torch import load_file # here: only those who load it need it
        if str(name) in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
            from huggingface_hub import hf_hub_download
            try:
                for file in ('config.json', 'model.safetensors'):
                    folder = Path(hf_hub_download(f'openai-community/{name}', file)).parent
            except Exception as e:
                raise OSError(f"{name} could not be downloaded from Hugging Face ({type(e).__name__}): check the network, "
                              "or give a local folder that has its config.json and model.safetensors") from e
        else:
            folder = Path(name)
        for file in ('config.json', 'model.safetensors'):
            if not (folder / file).is_file():
                raise OSError(f"{folder} has no {file}: expected 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' or a folder "
                              "with config.json and model.safetensors")
        try:
            hf = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
            state = load_file(folder / 'model.safetensors')
        except Exception as e: # whatever the parsers raise on a damaged file
            raise ValueError(f"{folder} is not readable as GPT-2 in Hugging Face's layout: {e}") from e
        if hf.get('model_type') != 'gpt2':
            raise ValueError(f"{folder}/config.json has model_type {hf.get('model_type')!r}, and only 'gpt2' can be loaded")
        activation = hf.get('activation_function', 'gelu_new')
        mlps = dict(gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', gelu='gelu', relu2='relu2')
        if activation not in mlps:
            raise ValueError(f"{folder}/config.json has activation_function {activation!r}: one of {', '.join(mlps)} is needed")
        for field, value in dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False).items():
            if hf.get(field, value) != value:
                raise ValueError(f"{folder}/config.json has {field}={hf[field]}, and this GPT only has {value}")
        C = hf['n_embd']
        args = dict(n_layer=hf['n_layer'], n_head=hf['n_head'], n_embd=C, block_size=hf['n_positions'],
                    vocab_size=hf['vocab_size'], mlp=mlps[activation], mlp_ratio=(hf.get('n_inner') or 4 * C) / C,
                    tie_weights=hf.get('tie_word_embeddings', True), dropout=hf.get('resid_pdrop', 0.1))
        # names without the prefix are how the hub has them; GPT-2's Conv1D holds a Linear's matrix transposed
        state = {k if k.startswith(('transformer.', 'lm_head.')) else 'transformer.' + k: v for k, v in state.items()}
        state = {k: v.t() if k.endswith(CONV1D) else v for k, v in state.items()}
        model, added = cls.from_weights(args, state, **(override_args or {}))
        for line in added:
            print(f"added    {line}")
        return model

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors as transformers' GPT2LMHeadModel has them, which gives the same logits."""
        from safetensors.torch import save_file
        c = self.config
        activations = dict(gelu='gelu', gelu_tanh='gelu_new', relu2='relu2')
        plain = GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.dropout, c.recompute, c.bias, c.tie_weights,
                          pos_emb=c.pos_emb, mlp=c.mlp, mlp_ratio=c.mlp_ratio if c.mlp != 'none' else 4.0)
        beyond = [f"{f.name}={getattr(c, f.name)!r}" for f in fields(c) if getattr(c, f.name) != getattr(plain, f.name)]
        beyond += [f"mlp={c.mlp!r}"] * (c.mlp not in activations) + [f"pos_emb={c.pos_emb!r}"] * (c.pos_emb not in ('learned', 'none'))
        if beyond:
            raise ValueError(f"Hugging Face's GPT-2 class cannot express {', '.join(beyond)}")
        state = {k: v.detach().cpu() for k, v in self.state_dict().items() if not (c.tie_weights and k == 'lm_head.weight')}
        if c.pos_emb == 'none': # a position table of zeros
            state['transformer.wpe.weight'] = torch.zeros(c.block_size, c.n_embd)
        if not c.bias:
            state |= {k.removesuffix('weight') + 'bias': v.new_zeros(v.size(0)) for k, v in state.items()
                      if k.endswith('weight') and '.h.' in k or k == 'transformer.ln_f.weight'}
        state = {k: (v.t() if k.endswith(CONV1D) else v).contiguous() for k, v in state.items()}
        config = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=c.vocab_size, n_positions=c.block_size,
                      n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, layer_norm_epsilon=1e-5,
                      n_inner=round(c.mlp_ratio * c.n_embd), activation_function=activations[c.mlp], resid_pdrop=c.dropout,
                      embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=c.tie_weights, bos_token_id=50256,
                      eos_token_id=50256, torch_dtype=str(self.lm_head.weight.dtype).removeprefix('torch.'))
        if c.vocab_size <= 50256: # another tokenizer than GPT-2's: what its special tokens are is not known here
            config |= dict(bos_token_id=None, eos_token_id=None)
        os.makedirs(folder, exist_ok=True)
        save_file(state, Path(folder) / 'model.safetensors', metadata={'format': 'pt'})
        (Path(folder) / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


CONV1D = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')


def brief(names, most=8):
    return ', '.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else '')


def penalize(logits, context, repetition_penalty=1.0, no_repeat_ngram=0):
    """
    Changes logits (B, V) by the tokens in context (B, S). repetition_penalty (arXiv 1909.05858) divides the positive logits
    of its tokens and multiplies the negative ones; no_repeat_ngram=n rules out what would complete n tokens in a row that
    are there already (arXiv 1705.04304).
    """
    if repetition_penalty != 1.0:
        seen = logits.gather(1, context)
        logits = logits.scatter(1, context, torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty))
    if 0 < no_repeat_ngram <= context.size(1):
        ngrams = context.unfold(1, no_repeat_ngram, 1) # (B, ., n)
        begun = context[:, None, context.size(1) - no_repeat_ngram + 1:] # the last n - 1 tokens
        repeats = (ngrams[:, :, :-1] == begun).all(dim=2)
        banned = torch.zeros_like(logits).scatter_add_(1, ngrams[:, :, -1], repeats.to(logits.dtype)) > 0
        logits = logits.masked_fill(banned & ~banned.all(dim=1, keepdim=True), float('-inf')) # something must be left
    return logits


def pick(logits, temperature, top_k, top_p, min_p, generator):
    """Draws the next token (B, 1) from logits (B, V); what the options mean: see GPT.stream."""
    if temperature == 0.0:
        return logits.argmax(dim=1, keepdim=True)
    logits, tokens = logits / temperature, None
    if top_k is not None and top_k < logits.size(1) or top_p is not None and top_p < 1.0:
        logits, tokens = logits.topk(min(top_k or logits.size(1), logits.size(1))) # the rest of the work is on k candidates
    probs = logits.softmax(dim=1)
    if top_p is not None and top_p < 1.0:
        probs = probs.masked_fill(probs.cumsum(dim=1) - probs >= top_p, 0.0) # the tokens before it already hold top_p
    if min_p > 0.0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=1, keepdim=True), 0.0)
    drawn = torch.multinomial(probs, 1, generator=generator)
    return drawn if tokens is None else tokens.gather(1, drawn)


def reorder(cache, rows):
    """The cache of a batch that is made of these rows of the old one."""
    return {k: reorder(v, rows) if isinstance(v, dict) else v[rows] if torch.is_tensor(v) else
            tuple(t[rows] if torch.is_tensor(t) else t for t in v) if isinstance(v, tuple) else v for k, v in cache.items()}


class Decoder:
    """
    Decodes token after token into caches of block_size tokens. The position is a tensor, so nothing depends on how long the
    context has become: on a GPU the whole step is captured once as a CUDA graph and replayed, and a compiler compiles once.
    """
    @staticmethod
    def supports(model):
        c = model.config # what reads positions or past tokens as Python numbers cannot be captured
        return c.mixer == 'attention' and c.time_weighting == 'none' and 'relative' not in c.pos_emb and \
            not c.time_mixing and not c.unet_layers

    def __init__(self, model, batch):
        device = model.lm_head.weight.device
        if not self.supports(model):
            raise ValueError("static=True decodes flat stacks of plain attention only: use static=False")
        self.model, self.cache, self.graph = model, {}, None
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.past = torch.zeros(1, dtype=torch.long, device=device)
        # added to the scores; one for all layers, which would otherwise launch several small kernels each to make their own
        self.mask = torch.zeros(1, model.config.block_size, dtype=model.lm_head.weight.dtype, device=device)

    def load(self, cache, n):
        """Takes over the cache of the n tokens read so far."""
        self.past.fill_(n)
        self.mask[:, :n], self.mask[:, n:] = 0.0, float('-inf')
        self.take(cache, self.cache)

    def take(self, cache, own):
        for key, value in cache.items():
            if isinstance(value, dict):
                self.take(value, own.setdefault(key, {}))
            elif isinstance(value, tuple):
                buffer, n = value
                own.setdefault(key, (buffer.new_zeros(*buffer.shape[:-2], self.model.config.block_size, buffer.size(-1)), self.past))
                own[key][0][..., :n, :] = buffer[..., :n, :]
                own['mask'] = self.mask
            else:
                own[key] = self.past

    def step(self):
        self.mask.index_fill_(1, self.past, 0.0)
        logits = self.model.lm_head(self.model.hidden(self.token, self.cache)[:, -1])
        self.past += 1
        return logits

    def __call__(self, token):
        """token (B, 1) -> logits (B, V), which the next call overwrites."""
        self.token.copy_(token)
        if self.token.device.type != 'cuda':
            return self.step()
        if self.graph is None:
            with torch.cuda.device(self.token.device), sdpa_kernel(EVERY_LENGTH): # as in next_logits
                self.capture()
        self.graph.replay()
        return self.logits

    def capture(self):
        position = self.past.clone()
        side = torch.cuda.Stream() # as CUDA asks for: the first calls allocate, which a graph cannot
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.past.copy_(position)
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.past.copy_(position)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side, capture_error_mode='thread_local'): # another thread may be pinning memory
            self.logits = self.step()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers

class Muon(torch.optim.AdamW):
    """
    Muon (kellerjordan.github.io/posts/muon) for the groups marked muon, AdamW for the others. A matrix's update is its
    Nesterov momentum made nearly orthogonal by five Newton-Schulz steps, and as long as AdamW's would be (arXiv
    2502.16982), so that both take the same learning rates. As torch.optim.Muon, but matrices of one shape are done at once,
    and those that lie in one parameter apart; parts: {parameter: how many}.
    """
    def __init__(self, groups, lr, betas, fused, momentum, nesterov, parts):
        super().__init__(groups, lr=lr, betas=betas, fused=fused)
        self.momentum, self.nesterov, self.parts = momentum, nesterov, parts

    @torch.no_grad()
    def step(self, closure=None):
        every = self.param_groups
        self.param_groups = [group for group in every if not group['muon']]
        super().step()
        self.param_groups = every
        for group in every:
            if group['muon']:
                self.orthogonal_step(group)

    def orthogonal_step(self, group):
        bad = getattr(self, 'found_inf', None) # 1 on the device: this step must change nothing
        alive = 1.0 if bad is None else 1.0 - bad
        same_shape = {}
        for p in group['params']:
            if p.grad is None:
                continue
            if not self.state[p]: # AdamW's loading looks for a step
                self.state[p] |= dict(momentum_buffer=torch.zeros_like(p), step=torch.zeros(()))
            buffer = self.state[p]['momentum_buffer']
            grad = p.grad if bad is None else torch.where(bad > 0, buffer, p.grad)
            buffer.lerp_(grad, 1 - self.momentum)
            update = grad.lerp(buffer, self.momentum) if self.nesterov else buffer
            p.mul_(1 - group['lr'] * group['weight_decay'] * alive)
            for w, u in zip(p.chunk(self.parts[p]), update.chunk(self.parts[p])):
                if w.size(0) > w.size(1):
                    w, u = w.t(), u.t()
                same_shape.setdefault(w.shape, []).append((w, u))
        for shape, pairs in same_shape.items():
            updates = orthogonalize(torch.stack([u for _, u in pairs])) * alive
            for (w, _), u in zip(pairs, updates):
                w.add_(u, alpha=-group['lr'] * 0.2 * math.sqrt(max(shape)))


def orthogonalize(x, steps=5, eps=1e-7):
    """x (N, rows, columns), rows <= columns -> for each matrix U S V^T about U V^T, in bfloat16 with singular values near 1."""
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps): # the quintic's slope at zero is as large as it can be, so small singular values grow fast
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class SM3(torch.optim.Optimizer):
    """
    SM3-II (arXiv 1901.11150): Adagrad whose sum of squared gradients is bounded by the smallest of one number a row and
    one a column, so that the momentum is all that is as large as the weights: half of Adam's memory. The sums only grow, so
    learning rates are larger than Adam's, 0.1 say, and need no decay.
    """
    def __init__(self, groups, lr, momentum=0.9, nesterov=False):
        super().__init__(groups, dict(lr=lr, weight_decay=0.0))
        self.momentum, self.nesterov = momentum, nesterov

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                state, dims = self.state[p], range(p.dim())
                if not state:
                    state['momentum_buffer'] = torch.zeros_like(p)
                    for d in dims: # an accumulator along each dimension, shaped so that it broadcasts
                        state[f'sum_{d}'] = p.new_zeros([n if d == i else 1 for i, n in enumerate(p.shape)])
                bound = state['sum_0']
                for d in dims[1:]:
                    bound = torch.minimum(bound, state[f'sum_{d}'])
                squares = bound + p.grad.square()
                for d in dims:
                    others = [i for i in dims if i != d]
                    state[f'sum_{d}'] = squares.amax(dim=others, keepdim=True) if others else squares
                update = torch.where(squares > 0, p.grad * squares.rsqrt(), 0.0) # no gradient so far: no update
                buffer = state['momentum_buffer'].lerp_(update, 1 - self.momentum)
                if self.nesterov:
                    buffer = update.lerp(buffer, self.momentum)
                p.mul_(1 - group['lr'] * group['weight_decay']).add_(buffer, alpha=-group['lr'])


@torch.no_grad()
def clip_adaptively(model, ratio):
    """
    Adaptive gradient clipping (arXiv 2102.06171): the gradient of each row is at most ratio times as long as the row, and a
    row counts for at least 0.001. The head is left out, as in the paper.
    """
    for p in model.parameters():
        if p.grad is not None and p is not model.lm_head.weight:
            longest = ratio * p.norm(dim=-1, keepdim=True).clamp(min=1e-3)
            p.grad.mul_((longest / p.grad.norm(dim=-1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a dict of tensors and plain values in torch's own zip format

def save_checkpoint(path, checkpoint):
    """Replaces path in one step: whatever happens, there is a whole checkpoint under this name, the old or the new."""
    path, temporary = Path(path), Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == 'posix': # the new name itself survives a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path):
    """The dict in a checkpoint file, on the CPU, with nothing executed. OSError or ValueError say what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"there is no checkpoint {path}: train one first, or check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() # reads everything against its CRC-32, which torch.load does not
            if damaged:
                raise ValueError(f"the checksum of its part {damaged} is wrong")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        for part in ('model', 'model_args'):
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(part), dict):
                raise ValueError(f"it holds no {part!r}")
    except Exception as e: # a damaged file can raise anything
        reason = str(e).split('\n')[0]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}): use another one") from e
    return checkpoint


def full_state(model, optimizer):
    """The state dicts of a model that fully_shard has shared out, as one process would have them (on rank 0; all must call)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names = itertools.count()
    index = {name: next(names) for group in moments.get('param_groups', ()) for name in group['params']}
    return weights, dict(state={index[name]: state for name, state in moments.get('state', {}).items()},
                         param_groups=[group | dict(params=[index[name] for name in group['params']])
                                       for group in moments.get('param_groups', ())])


def load_optimizer(model, optimizer, state):
    """Loads an optimizer's plain state dict, also into one whose model fully_shard has shared out."""
    params = [p for group in optimizer.param_groups for p in group['params']]
    if [len(g['params']) for g in state['param_groups']] != [len(g['params']) for g in optimizer.param_groups]:
        # nanoGPT has two groups: the parameters' order is the same
        indices = iter([i for g in state['param_groups'] for i in g['params']])
        groups = [{k: v for k, v in group.items() if k != 'params'} | dict(params=list(itertools.islice(indices, len(group['params']))))
                  for group in optimizer.param_groups]
        state = state | dict(param_groups=groups)
    if not hasattr(params[0], 'full_tensor'):
        return optimizer.load_state_dict(state)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    names = {id(p): name for name, p in model.named_parameters()}
    names = [names[id(p)] for p in params]
    state = dict(state={names[i]: s for i, s in state['state'].items()},
                 param_groups=[group | dict(params=[names[i] for i in group['params']]) for group in state['param_groups']])
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


# ---------------------------------------------------------------------------------------------------------------------

# Dense FLOP/s in bfloat16 (V100, T4: float16) with float32 accumulation, from NVIDIA's and AMD's datasheets (numbers
# "with sparsity" halved). The first name that the card's name contains as whole words counts.
PEAK_FLOPS = {
    'B200': 2250e12, 'H200 NVL': 835.5e12, 'H200': 989.4e12, 'GH200': 989.4e12, 'H100 PCIe': 756e12, 'H100 NVL': 835.5e12, 'H100': 989.4e12,
    'A100': 312e12, 'A40': 149.7e12, 'A30': 165e12, 'A10G': 70e12, 'A10': 125e12, 'L40S': 362e12, 'L40': 181e12,
    'L4': 121e12, 'T4': 65e12, 'V100': 125e12, 'RTX A6000': 154.8e12, 'RTX 3090': 71.2e12, 'RTX 4090': 165.2e12,
    'RTX 5090': 209.5e12, 'MI250X': 383e12, 'MI300X': 1307.4e12,
}


def resolve(device, dtype):
    """'auto' or a name for each -> (device type or name, dtype's name). ValueError if this machine cannot do it."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        kind = torch.device(device).type
        torch.empty(1, device=device)
        if kind == 'cuda' and torch.device(device).index is not None:
            torch.cuda.set_device(device) # streams, graphs and measurements are the current device's
    except (RuntimeError, AssertionError) as e: # what torch raises for a device that is not there
        there = ['cpu'] + [f'cuda:{i}' for i in range(torch.cuda.device_count())] + ['mps'] * torch.backends.mps.is_available()
        raise ValueError(f"device={device!r} is not there ({str(e).splitlines()[0]}): this machine has {', '.join(there)}; "
                         "use --device=auto") from None
    if dtype == 'auto' and kind == 'cuda':
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    elif dtype == 'auto':
        # only where the processor multiplies it: elsewhere bfloat16 is emulated and slow
        native = kind == 'cpu' and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
        dtype = 'bfloat16' if native else 'float32'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f"dtype={dtype!r} is not one of auto, float32, bfloat16, float16")
    return device, dtype


def keep_freed_memory():
    """
    Has glibc keep what is freed for the next allocation instead of returning it to the system, as it does with large blocks:
    fresh pages in every step are a fifth of a CPU's training time. Decoding, which has none, is not faster. Elsewhere than on
    glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        mallopt(-1, -1) # M_TRIM_THRESHOLD: never
        mallopt(-4, 0) # M_MMAP_MAX: no block of its own for a large one


def recompute_what_is_cheap():
    """
    Has torch.compile keep the results of matrix products and attention for the backward pass, and compute what lies between
    them again: the baby GPT keeps a third less. For GPUs, where that is fused into the kernels that need it.
    """
    torch._functorch.config.ban_recompute_used_far_apart = False
    torch._functorch.config.ban_recompute_materialized_backward = False


def find_peak_flops(setting, device, dtype):
    """
    -> (FLOP/s or None, where it came from). setting: a number; 'measure': the best of a few large matrix products in
    dtype on device, an honest ceiling on any machine; 'auto': the table for a GPU in a 16-bit dtype, measured on a CPU.
    """
    if not isinstance(setting, str):
        return float(setting), 'as set'
    device = torch.device(device)
    if setting == 'auto' and device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
        words = ' ' + name.replace('-', ' ') + ' '
        for card, flops in PEAK_FLOPS.items():
            if f' {card} ' in words and ' Laptop ' not in words and dtype != torch.float32:
                return flops, f'datasheet of {card}, dense'
        return None, f"n/a: no 16-bit figure for {name}; set --peak_flops=312e12 (its datasheet's) or --peak_flops=measure"
    if setting == 'auto' and device.type != 'cpu':
        return None, f'n/a: set --peak_flops=measure or a number for {device.type}'
    if setting not in ('auto', 'measure'):
        raise ValueError(f"peak_flops={setting!r} is not a number, 'auto' or 'measure'")
    n = 2048 if device.type == 'cpu' else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    best = math.inf
    for _ in range(5):
        t0 = time.perf_counter()
        (a @ a)[0, 0].item() # waits for the device
        best = min(best, time.perf_counter() - t0)
    return 2 * n ** 3 / best, f'measured: {n}x{n} matrix product in {str(dtype).removeprefix("torch.")}'
