"""
A GPT whose token mixer is a setting. The whole network is in this file.

Reading order: configuration, cache, what mixers share, the mixers (simplest first), the registry MIXERS, Block, UNet,
GPT, generation. To add a mixer you need nothing below the line "Machinery".

To try an idea, write a Mixer in its own file (see config/mixers/), or write it here and add it to MIXERS. It then
trains, samples, reports MFU and gets tested.

Each letter has one meaning in the whole file: B batch, T tokens in this call, S tokens so far (past and present),
C channels (n_embd), H heads, D channels of a head, V vocabulary.
"""
import ctypes
import hashlib
import inspect
import itertools
import math
import re
import sys
import typing
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry


@dataclass
class GPTConfig:
    """The architecture. An invalid combination raises ValueError with the fields, their values and a way out."""
    block_size: int = 1024 # longest sequence, in tokens
    vocab_size: int = 50304 # GPT-2's 50257, rounded up to a multiple of 64 for faster matrix products
    n_layer: int = 12 # blocks; with unet_layers: blocks at the innermost level
    n_head: int = 12 # heads in every mixer
    n_embd: int = 768 # channels: the width of the residual stream
    dropout: float = 0.0 # 0 is good for pretraining, 0.1 or more for finetuning
    recompute: Literal[True, False, 'cheap'] = False # activation checkpointing: keep each block's input and rerun the
        # block in the backward pass; cheap: with torch.compile, recompute all but the matrix products
    bias: bool = True # biases in Linear and LayerNorm, as in GPT-2; False is slightly better and faster
    tie_weights: bool = True # one matrix for both the token embedding and the head
    mixer: str | tuple[str, ...] = 'attention' # how tokens exchange information: a name in MIXERS, or several for a
        # pattern that the layers repeat. A mixer's own settings are declared in its class
    pos_emb: Literal['learned', 'rope', 'relative', 'learned+relative', 'none'] = 'learned' # relative: a
        # learned bias per head and distance
    mlp: Literal['gelu', 'gelu_tanh', 'relu2', 'swiglu', 'none'] = 'gelu' # OpenAI's GPT-2 uses gelu_tanh
    mlp_ratio: float = 4.0 # hidden channels of the MLP, as a multiple of n_embd
    narrow_residual: bool = False # with 16-bit matrix products, keep the residual stream in 16 bits too
    rezero: bool = False # scale each residual branch by a learned scalar that starts at zero (arXiv 2003.04887)
    time_mixing: float = 0.0 # fraction of a mixer's input channels taken from the previous token
    time_mixing_alternate: bool = False # shift the first channels in even layers, the last ones in odd layers
    short_conv: int = 0 # tokens that a learned convolution in front of each mixer sees, such as 4; 0 is off
    unet_layers: tuple[int, ...] = () # blocks per level on the way down (and up), outermost first; (): no UNet
    unet_up_layers: tuple[int, ...] | None = None # blocks per level on the way up; None: the same as unet_layers
    unet_factor: int | tuple[int, ...] = 2 # tokens merged into one at each level: one number, or one per level

    def __post_init__(self):
        if isinstance(self.mixer, str) and ',' in self.mixer: # from the command line
            self.mixer = tuple(self.mixer.split(','))
        for name in ('mixer', 'unet_layers', 'unet_up_layers', 'unet_factor'): # JSON and config files give lists
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        check_config(self)

    def mixers(self):
        """The mixer classes of the layer pattern."""
        return [MIXERS[name] for name in ((self.mixer,) if isinstance(self.mixer, str) else self.mixer)]

    def unet_levels(self):
        """Returns (blocks down, blocks up, factors): tuples with one entry per level, outermost first."""
        down = tuple(self.unet_layers)
        up = down if self.unet_up_layers is None else tuple(self.unet_up_layers)
        factors = (self.unet_factor,) * len(down) if isinstance(self.unet_factor, int) else tuple(self.unet_factor)
        return down, up, factors


# ---------------------------------------------------------------------------------------------------------------------
# The cache: what a module remembers of earlier tokens during generation

class Cache:
    """
    A module's memory of earlier tokens, empty at the start of a sequence. Each call of the module adds T tokens, for
    any T. The batch is the first dimension of every tensor, so that beam search can reorder it.
    """
    mask = None # added to attention scores; None: every row returned by append is a real token

    def __init__(self):
        self.children, self.states, self.buffers, self.length = {}, {}, {}, 0

    def child(self, name):
        """The cache of the submodule called name."""
        return self.children.setdefault(name, Cache())

    def advance(self, T, limit=math.inf):
        """Positions of the next T tokens, as an index into a table. ValueError beyond limit tokens."""
        start, self.length = self.length, self.length + T
        if self.length > limit:
            raise ValueError(f"a sequence of {self.length} tokens is longer than block_size={limit}")
        return slice(start, self.length)

    def append(self, name, new, window=None):
        """Appends new (B, ..., T, D) along time; returns all so far (B, ..., S, D), or at least the last `window`."""
        buffer, past = self.buffers.get(name, (None, 0))
        if window and past >= 2 * window:
            buffer, past = buffer[..., past - window + 1:past, :], window - 1
        S = past + new.size(-2)
        if buffer is None or S > buffer.size(-2):
            # grow to a power of two, so that most appends neither allocate nor copy old tokens
            grown = new.new_empty(*new.shape[:-2], max(16, 1 << (S - 1).bit_length()), new.size(-1))
            if past:
                grown[..., :past, :] = buffer[..., :past, :]
            buffer = grown
        buffer[..., past:S, :] = new
        self.buffers[name] = buffer, S
        return buffer[..., :S, :]

    def get(self, name, default):
        """What put stored under this name, or default at the start of a sequence."""
        return self.states.get(name, default)

    def put(self, name, *tensors):
        """Stores tensors of fixed size for the next call."""
        self.states[name] = tuple(t.clone() for t in tensors) # a view would keep the whole chunk alive

    def reorder(self, rows):
        """Replaces row i of the batch by the old row rows[i]."""
        for child in self.children.values():
            child.reorder(rows)
        self.states = {name: tuple(t[rows] for t in tensors) for name, tensors in self.states.items()}
        self.buffers = {name: (buffer[rows], length) for name, (buffer, length) in self.buffers.items()}

    def n_bytes(self):
        """Size of the cached tensors in bytes."""
        kept = [t for tensors in self.states.values() for t in tensors]
        kept += [buffer[..., :length, :] for buffer, length in self.buffers.values()]
        return sum(t.nbytes for t in kept) + sum(child.n_bytes() for child in self.children.values())


class NoCache(Cache):
    """For training: every sequence is complete and starts at position 0, so nothing is remembered."""
    def child(self, name):
        return self

    def advance(self, T, limit=math.inf):
        if T > limit:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={limit}")
        return slice(0, T)

    def append(self, name, new, window=None):
        return new

    def put(self, name, *tensors):
        pass


NO_CACHE = NoCache()


# ---------------------------------------------------------------------------------------------------------------------
# What the mixers share. Linear and Dropout are torch's, adapted for CPUs: see the end of the file.

class Mixer(nn.Module):
    """
    Base class of token mixers: forward(x, cache=NO_CACHE) maps x (B, T, C) to (B, T, C). No output may depend on later
    tokens. block_size is the longest sequence that this mixer will see; inside a UNet it is less than the config's.

    A subclass defines either mix(x) for whole sequences (decoding then recomputes the past: correct but slow) or
    forward, which keeps what it needs in the cache. Its settings are annotated class attributes with defaults, such as
    `chunk: int = 64 # tokens per chunk`. It reads them from config; with any other mixer, setting them is an error.
    """
    pos_embs = ('learned', 'none') # 'rope' and 'relative' act on queries and keys, which not every mixer has
    bounded = True # by block_size; False: it can decode forever in constant memory

    def __init__(self, config, block_size):
        super().__init__()

    @classmethod
    def check(cls, config):
        """Raises ValueError if this mixer cannot be built from config."""

    def forward(self, x, cache=NO_CACHE):
        if cache is NO_CACHE:
            return self.mix(x)
        return self.mix(cache.append('x', x).clone())[:, -x.size(1):] # mix may change it in place


def causal_init(n_head, block_size, std=0.02):
    """A lower-triangular (H, T, T) table. Keep std small: with 1/sqrt(t), MLP-Mixer's loss ends 0.6 higher."""
    return (torch.randn(n_head, block_size, block_size) * std).tril()


def row_blocks(rows, dim):
    """Splits a triangle's rows into at most 8 blocks: [(block, end)], which only reads columns below end."""
    size = max(256, math.ceil(rows.size(dim) / 8))
    blocks = rows.split(size, dim) if size < rows.size(dim) else [rows] # a slice's gradient would be as large as rows
    return list(zip(blocks, itertools.accumulate(block.size(dim) for block in blocks)))


def mix_time(W, x):
    """y_t = sum_{s<=t} W_ts x_s for the last T of S tokens: W (H, T, S), x (B, H, S, D) -> (B, H, T, D)."""
    H, T, S = W.shape
    B, D = x.size(0), x.size(3)
    W = W.tril(S - T)
    x = x.permute(1, 2, 0, 3).reshape(H, S, B * D) # one copy, in the layout that every product below reads
    # only the blocks on and below the diagonal are multiplied
    rows = [block[:, :, :S - T + end] @ x[:, :S - T + end] for block, end in row_blocks(W, 1)]
    return torch.cat(rows, dim=1).view(H, T, B, D).permute(2, 0, 1, 3)


class TimeLinear(nn.Module):
    """A linear layer along time, W (H, T, T): y_t = sum_{s<=t} W_ts x_s + b_t, (B, H, T, D) -> (B, H, T, D)."""
    def __init__(self, n_head, block_size, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(causal_init(n_head, block_size, std))
        self.bias = nn.Parameter(torch.zeros(n_head, block_size))

    def forward(self, x, cache=NO_CACHE):
        T = x.size(2)
        x = cache.append('x', x) # (B, H, S, D)
        S = x.size(2)
        y = mix_time(self.weight[:, S - T:S, :S].to(x.dtype), x)
        return y + self.bias[:, S - T:S, None].to(y.dtype)


class Rope(nn.Module):
    """Rotary position embedding (arXiv 2104.09864): rotates the pairs (d, d + D/2) of x (B, T, H, D) by position."""
    def __init__(self, D, block_size):
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, D, 2).float() / D)
        angle = torch.outer(torch.arange(block_size).float(), frequency) # (block_size, D/2)
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)

    def forward(self, x, positions):
        cos, sin = (t[positions, None].to(x.dtype) for t in (self.cos, self.sin)) # (T, 1, D/2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def toeplitz(a, T, S):
    """M[h, i, j] = a[h, distance from j to the i-th of the last T of S positions]: a (H, block_size) -> (H, T, S)."""
    past = S - T
    ring = torch.cat([a[:, :past + 1].flip(1), a.new_zeros(a.size(0), T), a[:, past + 1:S].flip(1)], dim=1)
    # (H, S + T), read in rows of S + T - 1, so each row is shifted by one more. No gather: the backward pass is cheap
    rows = ring[:, None].expand(-1, T, -1).reshape(a.size(0), -1)[:, :T * (S + T - 1)]
    return rows.view(a.size(0), T, S + T - 1)[:, :, :S]


def causal_softmax(scores):
    """Softmax of scores (..., T, S) over the positions up to each token's own; the T tokens are the last of S."""
    T, S = scores.shape[-2:]
    # adding the causal mask costs nothing in the backward pass, unlike masked_fill
    mask = scores.new_full((T, S), float('-inf')).triu(S - T + 1)
    # softmax accumulates in float32, so 16-bit input will do. Autocast lacks the meta device, where costs are counted
    with torch.autocast(scores.device.type.replace('meta', 'cpu'), enabled=False):
        return (scores + mask).softmax(dim=-1)


def causal_attention(q, k, v, dropout, mask=None, window=None):
    """
    Attention of the last T of S tokens, each to the last `window` tokens: q (B, H, T, D), k and v (B, H, S, D) ->
    (B, H, T, D). A cache's mask replaces the causal mask.
    """
    T, S = q.size(2), k.size(2)
    if mask is None and (1 < T < S or window and S > window):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        mask = mask if window is None else mask.triu(S - T - window + 1)
    return fused_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1)


# ---------------------------------------------------------------------------------------------------------------------
# Token mixers, simplest first

class MLPMixer(Mixer):
    """MLP-Mixer (arXiv 2105.01601) made causal: per head, two triangular layers along time with a GELU between."""
    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.n_head = config.n_head
        self.c_fc = TimeLinear(config.n_head, block_size)
        self.c_proj = TimeLinear(config.n_head, block_size)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, cache=NO_CACHE):
        B, T, C = x.size()
        x = x.view(B, T, self.n_head, -1).transpose(1, 2) # (B, H, T, D)
        y = F.gelu(self.c_fc(x, cache.child('c_fc')))
        y = self.c_proj(y, cache.child('c_proj'))
        return self.resid_dropout(y.transpose(1, 2).reshape(B, T, C))


class GatedMLP(Mixer):
    """
    gMLP (arXiv 2105.08050) made causal: the channels are split into u and v; v is mixed along time and then gates u.
    The gate starts as the identity. gMLP includes a channel MLP, so mlp='none' gives the paper's block. gmlp_attn adds
    a tiny attention to the gate (the paper's aMLP).
    """
    gmlp_ratio: float = 4.0 # channels before the split into halves, as a multiple of n_embd
    gmlp_tanh: bool = False # apply tanh to the gate
    gmlp_attn: int = 0 # head size of the tiny attention added to the gate (the paper uses 64); 0 is off

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.n_head, self.tanh, self.attn_size = config.n_head, config.gmlp_tanh, config.gmlp_attn
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

    @staticmethod
    def half_width(config):
        return round(config.gmlp_ratio * config.n_embd) // 2

    @classmethod
    def check(cls, config):
        super().check(config)
        E = cls.half_width(config)
        if E < 1 or E % config.n_head:
            raise ValueError(f"gmlp_ratio={config.gmlp_ratio} of n_embd={config.n_embd} gives a gate of {E} channels, "
                             f"not divisible by n_head={config.n_head}")
        if config.gmlp_attn < 0:
            raise ValueError(f"gmlp_attn={config.gmlp_attn} is a head size: 0 (off) or more")

    def forward(self, x, cache=NO_CACHE):
        B, T, C = x.size()
        u, v = F.gelu(self.c_fc(x)).chunk(2, dim=2) # (B, T, E) each
        v = self.ln(v).view(B, T, self.n_head, -1).transpose(1, 2) # (B, H, T, E/H)
        gate = self.gate(v, cache.child('gate')).transpose(1, 2).reshape(B, T, -1)
        if self.attn_size:
            q, k, v = self.attn_qkv(x)[:, None].split(self.attn_size, dim=3) # (B, 1, T, D): one head
            dropout = self.resid_dropout.p if self.training else 0.0
            y = causal_attention(q, cache.append('k', k), cache.append('v', v), dropout)
            gate = gate + self.attn_proj(y[:, 0])
        if self.tanh:
            gate = torch.tanh(gate)
        return self.resid_dropout(self.c_proj(u * gate))


class CausalSelfAttention(Mixer):
    """
    Multi-head attention. With time_weighting (minGPT-tuned), y_i = sum_{j<=i} softmax_j(q_i k_j / sqrt(D)) w_ij v_j:
    'full' learns every w_ij, 'circulant' learns w_ij = alpha_{i-j} beta_j; all start at one. qk_norm: arXiv 2010.04245.
    value_residual: arXiv 2410.17897, with one learned share per layer. attention_gate: the gate per head of arXiv
    2505.06708, doubled and with weights that start at zero. Both start as the identity.
    """
    time_weighting: Literal['none', 'circulant', 'full'] = 'none' # learned weights that multiply the softmax
    qk_norm: bool = False # normalize queries and keys, then scale by a learned number per head
    attention_window: int | None = None # each token sees this many tokens, itself included; None: all
    value_residual: bool = False # mix into later layers' values a learned share of the first layer's
    attention_gate: bool = False # scale each head's output by a learned function of the token
    pos_embs = ('learned', 'rope', 'relative', 'learned+relative', 'none')

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        H, D = config.n_head, config.n_embd // config.n_head
        own = {name: getattr(config if name in own_settings(type(self)) else type(self), name)
               for name in own_settings(CausalSelfAttention)} # settings that a subclass does not declare are off
        self.n_head, self.window, self.time_weighting = H, own['attention_window'], own['time_weighting']
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias, parts=3)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout, self.resid_dropout = Dropout(config.dropout), Dropout(config.dropout)
        self.rope = Rope(D, block_size) if config.pos_emb == 'rope' else None
        # these start at zeros or ones: enabling them on trained weights leaves the logits unchanged
        self.relative = nn.Parameter(torch.zeros(H, block_size)) if 'relative' in config.pos_emb else None
        self.qk_scale = nn.Parameter(torch.ones(H, 1, 1)) if own['qk_norm'] else None # how sharp attention can get
        self.gate = nn.Parameter(torch.zeros(H, config.n_embd)) if own['attention_gate'] else None
        self.share = nn.Parameter(torch.zeros(1)) if own['value_residual'] else None # None: a stack's first
        if self.time_weighting == 'full':
            self.weight = nn.Parameter(torch.ones(H, block_size, block_size).tril())
        elif self.time_weighting == 'circulant':
            self.alpha = nn.Parameter(torch.ones(H, block_size))
            self.beta = nn.Parameter(torch.ones(H, block_size))

    @classmethod
    def check(cls, config):
        super().check(config)
        D = config.n_embd // config.n_head
        if config.pos_emb == 'rope' and D % 2:
            raise ValueError(f"pos_emb='rope' rotates pairs of channels, but a head has n_embd/n_head={D} channels: "
                             "make that even")
        if config.attention_window is not None and config.attention_window < 1:
            raise ValueError(f"attention_window={config.attention_window} must be at least 1, or None for all tokens")
        if config.attention_window and (config.time_weighting != 'none' or 'relative' in config.pos_emb):
            raise ValueError(f"attention_window={config.attention_window} loses token positions, which "
                             "time_weighting and pos_emb='relative' need: leave it at None")

    def forward(self, x, cache=NO_CACHE, first=None):
        B, T, C = x.size()
        positions = cache.advance(T)
        q, k, v = (t.view(B, T, self.n_head, -1) for t in self.c_attn(x).split(C, dim=2)) # (B, T, H, D)
        if first is not None and self.share is None:
            first.values = v
        elif first is not None:
            v = v.lerp(first.values, self.share.to(v.dtype))
        if self.qk_scale is not None:
            q, k = (F.rms_norm(t, t.shape[-1:], eps=1e-6).to(v.dtype) for t in (q, k))
            q = q * self.qk_scale.squeeze(2).to(q.dtype)
        if self.rope is not None: # before the transpose: after it, a GPU would make another copy
            q, k = self.rope(q, positions), self.rope(k, positions)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v)) # (B, H, T, D)
        k, v = cache.append('k', k, self.window), cache.append('v', v, self.window)
        y = self.attend(q, k, v, cache.mask).transpose(1, 2) # (B, T, H, D)
        if self.gate is not None:
            y = y * (2 * torch.sigmoid(F.linear(x, self.gate)))[..., None]
        return self.resid_dropout(self.c_proj(y.reshape(B, T, C)))

    def attend(self, q, k, v, mask=None):
        dropout = self.attn_dropout.p if self.training else 0.0
        plain = self.time_weighting == 'none' and self.bias(1, 1) is None
        if plain and (self.window or fused_attention_pays(q, v, dropout)):
            return causal_attention(q, k, v, dropout, mask, self.window)
        if self.time_weighting == 'circulant':
            v = v * self.beta[:, :v.size(2), None].to(v.dtype)
        T, past = q.size(2), k.size(2) - q.size(2)
        q, k, v = (t if past else t.contiguous() for t in (q, k, v)) # one copy for all blocks of rows
        # blocks skip most of the scores that the causal mask would remove
        rows = [self.weights(block, k[:, :, :past + end]) @ v[:, :, :past + end] for block, end in row_blocks(q, 2)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)

    def bias(self, T, S):
        """Term added to the scores of the last T of S tokens: (H, T, S), or None."""
        return None if self.relative is None else toeplitz(self.relative, T, S)

    def weights(self, q, k):
        """The weight of each of the S values in each of the last T outputs: (B, H, T, S)."""
        T, S = q.size(2), k.size(2)
        bias, scores = self.bias(T, S), (q / math.sqrt(q.size(-1))) @ k.transpose(2, 3) # (B, H, T, S)
        scores = scores if bias is None else scores + bias.to(scores.dtype) # 16 bits: its gradient's sum reads less
        att = self.attn_dropout(causal_softmax(scores).to(q.dtype))
        if self.time_weighting == 'full':
            att = att * self.weight[:, S - T:S, :S]
        elif self.time_weighting == 'circulant':
            att = att * toeplitz(self.alpha, T, S)
        return att.to(q.dtype)


class Container(CausalSelfAttention):
    """
    CONTAINER (arXiv 2106.01401): (alpha softmax(q k) + beta tril(A)) v, where A is a learned affinity of positions.
    Dropout acts on the softmax only.
    """
    qk_norm: bool = False # normalize queries and keys, then scale by a learned number per head

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        H = config.n_head
        self.affinity = nn.Parameter(causal_init(H, block_size))
        self.alpha = nn.Parameter(torch.ones(H, 1, 1))
        self.beta = nn.Parameter(torch.full((H, 1, 1), 0.1)) # attention dominates at the start

    def attend(self, q, k, v, mask=None):
        T, S = q.size(2), k.size(2)
        by_position = mix_time(self.affinity[:, S - T:S, :S].to(v.dtype), v)
        return (self.alpha * super().attend(q, k, v, mask) + self.beta * by_position).to(v.dtype)


class Synthesizer(CausalSelfAttention):
    """
    Synthesizer (arXiv 2005.00743): attention whose scores do not compare tokens. 'dense': an MLP predicts a token's row
    of scores; 'random': the rows are parameters. synthesizer_attn mixes in dot-product scores with learned weights.
    """
    synthesizer: Literal['dense', 'random'] = 'dense' # dense: each token predicts its scores; random: learned table
    synthesizer_attn: bool = False # mix in the scores of dot-product attention

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
            self.mixture = nn.Parameter(torch.zeros(2, H, 1, 1)) # softmax weights of the two terms, equal at the start

    @classmethod
    def check(cls, config):
        if config.pos_emb not in Mixer.pos_embs and not config.synthesizer_attn:
            raise ValueError(f"pos_emb={config.pos_emb!r} acts on queries and keys, which mixer='synthesizer' has only "
                             "with synthesizer_attn=True")
        super().check(config)

    def forward(self, x, cache=NO_CACHE):
        B, T, C = x.size()
        positions = cache.advance(T)
        heads = lambda t: t.view(B, T, self.n_head, -1).transpose(1, 2) # -> (B, H, T, D)
        *qk, v = map(heads, self.c_attn(x).split(C, dim=2)) # (q, k and) v
        v = cache.append('v', v) # (B, H, S, D)
        S, own = v.size(2), 1.0
        if self.dot_product:
            own, dot = self.mixture.softmax(0) # shares (H, 1, 1)
            q, k = qk if self.rope is None else (self.rope(t.transpose(1, 2), positions).transpose(1, 2) for t in qk)
            q, k = (dot * q).to(v.dtype), cache.append('k', k)
        if self.dense: # attention with one learned key per position; sqrt(D) cancels attention's division
            rows = self.rows[:, :, :S].transpose(1, 2).contiguous().to(v.dtype).expand(B, -1, -1, -1) # (B, H, S, D)
            proposal = (own * heads(F.relu(self.c_fc(x))) * math.sqrt(v.size(3))).to(v.dtype) # (B, H, T, D)
            # concatenated, one query-key product gives the sum of both scores
            q, k = (torch.cat([q, proposal], 3) * math.sqrt(2), torch.cat([k, rows], 3)) if qk else (proposal, rows)
        if self.dense or self.dot_product:
            y = self.attend(q, k, v)
        else: # all sequences share the same weights and the same dropout
            y = mix_time(self.attn_dropout(causal_softmax(self.bias(T, S)).to(v.dtype)), v)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def bias(self, T, S):
        own, dot = self.mixture.softmax(0) if self.dot_product else (1.0, 1.0)
        parts = [] if self.relative is None else [dot * super().bias(T, S)]
        parts += [] if self.dense else [own * self.table[:, S - T:S, :S]]
        return sum(parts) if parts else None


MIXERS = {
    'mlp_mixer': MLPMixer,
    'gmlp': GatedMLP,
    'attention': CausalSelfAttention,
    'container': Container,
    'synthesizer': Synthesizer,
} # add_mixer adds the ones defined in config files


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and stacks of blocks

class TimeMixing(nn.Module):
    """Takes some channels from the previous token (minGPT-tuned); the first token gets zeros."""
    def __init__(self, config, layer):
        super().__init__()
        n = round(config.time_mixing * config.n_embd)
        last = config.time_mixing_alternate and layer % 2
        self.channels = slice(config.n_embd - n, config.n_embd) if last else slice(0, n)

    def forward(self, x, cache=NO_CACHE):
        here = x[:, :, self.channels]
        previous, = cache.get('last', (torch.zeros_like(here[:, :1]),))
        cache.put('last', here[:, -1:])
        shifted = torch.cat([previous, here[:, :-1]], dim=1)
        return torch.cat([x[:, :, :self.channels.start], shifted, x[:, :, self.channels.stop:]], dim=2)


class ShortConv(nn.Module):
    """
    Sums each channel over the last K tokens (zeros before the first) with learned weights (C, K), the token's own last:
    (B, T, C) -> (B, T, C). It starts as the identity. The first of the Canon layers (arXiv 2512.17351).
    """
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(F.pad(torch.ones(config.n_embd, 1), (config.short_conv - 1, 0)))

    def forward(self, x, cache=NO_CACHE):
        T, weights = x.size(1), self.weight.to(x.dtype).unbind(1)
        past, = cache.get('past', (x.new_zeros(x.size(0), len(weights) - 1, x.size(2)),))
        x = torch.cat([past, x], dim=1)
        cache.put('past', x[:, T:])
        return sum(x[:, k:k + T] * w for k, w in enumerate(weights)) # F.conv1d is no faster, and wants time last


class MLP(nn.Module):
    """The feed-forward half of a block; relu2 is arXiv 2109.08668, swiglu is arXiv 2002.05202."""
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        hidden = round(config.mlp_ratio * config.n_embd)
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
    """Token mixer, then MLP, each on a pre-norm residual branch."""
    def __init__(self, config, layer, block_size):
        super().__init__()
        has_mlp = config.mlp != 'none'
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.shift = TimeMixing(config, layer) if config.time_mixing else None
        self.conv = ShortConv(config) if config.short_conv else None
        pattern = config.mixers()
        # named attn whatever it is, since GPT-2's weights load by name
        self.attn = pattern[layer % len(pattern)](config, block_size)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias) if has_mlp else None
        self.mlp = MLP(config) if has_mlp else None
        self.shares = config.value_residual and 'value_residual' in own_settings(type(self.attn))
        # ReZero (arXiv 2003.04887): one scalar per branch
        self.scales = nn.Parameter(torch.zeros(1 + has_mlp)) if config.rezero else None

    def forward(self, x, cache=NO_CACHE, first=None):
        y = self.ln_1(x)
        if self.shift is not None:
            y = self.shift(y, cache.child('shift'))
        if self.conv is not None:
            y = self.conv(y, cache.child('conv'))
        y = self.attn(y, cache.child('attn'), *([first] if self.shares else []))
        x = x + (y if self.scales is None else self.scales[0] * y)
        if self.mlp is not None:
            y = self.mlp(self.ln_2(x))
            x = x + (y if self.scales is None else self.scales[1] * y)
        return x


class Stack(nn.ModuleList):
    """n blocks in a row, for sequences of up to block_size tokens."""
    def __init__(self, config, n, block_size):
        super().__init__(apart(Block, config, layer, block_size) for layer in range(n))
        self.recompute = config.recompute is True
        for block in [block for block in self if block.shares][:1]:
            block.attn.share = None # this layer's values are the ones that are shared

    def forward(self, x, cache=NO_CACHE):
        values = None # for value_residual: the first attention layer's
        for i, block in enumerate(self):
            if self.recompute and torch.is_grad_enabled() and cache is NO_CACHE:
                x, values = checkpoint(run_block, block, x, NO_CACHE, values, use_reentrant=False)
            else:
                x, values = run_block(block, x, cache.child(i), values)
        return x


class UNet(nn.Module):
    """
    Blocks at full resolution around an inner level in which one token stands for `factor` tokens, and so on inwards
    (nanoGPT's UNet thread; Hourglass, arXiv 2110.13711). No output sees a later token, at any length: coarse token i is
    computed from the fine tokens that END at position factor * i (zeros before the start) and is used at factor * i and
    the factor - 1 positions after it. Merging tokens into their group's first position would leak the next token.
    During decoding, the inner level runs once every `factor` tokens.
    """
    def __init__(self, config, block_size, level=0):
        super().__init__()
        down, up, factors = config.unet_levels()
        self.factor, C = factors[level], config.n_embd
        inner_size = math.ceil(block_size / self.factor)
        self.down = Stack(config, down[level], block_size)
        self.merge = Linear(self.factor * C, C, bias=config.bias)
        if level + 1 < len(down):
            self.inner = UNet(config, inner_size, level + 1)
        else:
            self.inner = Stack(config, config.n_layer, inner_size)
        self.expand = Linear(C, self.factor * C, bias=config.bias)
        self.up = Stack(config, up[level], block_size)

    def forward(self, x, cache=NO_CACHE):
        B, T, C = x.size()
        f = self.factor
        x = self.down(x, cache.child('down'))
        # the last f - 1 tokens, and the coarse vectors that are ready for the next positions of this level
        past, ready = cache.get('state', (x.new_zeros(B, f - 1, C), x.new_zeros(B, 0, C)))
        tokens = torch.cat([past, x], dim=1)
        n = math.ceil((T - ready.size(1)) / f) # coarse tokens that start in this chunk
        if n > 0:
            groups = tokens[:, ready.size(1):ready.size(1) + n * f].reshape(B, n, f * C)
            inner = self.inner(self.merge(groups).to(x.dtype), cache.child('inner')) # (B, n, C): as wide as this level
            ready = torch.cat([ready, self.expand(inner).view(B, n * f, C)], dim=1)
        cache.put('state', tokens[:, T:], ready[:, T:])
        return self.up(x + ready[:, :T], cache.child('up')) # the skip connection


# ---------------------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """
    A language model: forward(idx, targets=None) -> (logits, loss). Without targets, logits are (B, T, V) for every
    position and loss is None. With targets (B, T), where -1 is ignored, loss is the mean cross-entropy in nats per
    token and logits are None: training does not need them, and they can be the largest tensor of all.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        C, T, start = config.n_embd, config.block_size, draw_seed()
        h = UNet(config, T) if config.unet_layers else Stack(config, config.n_layer, T)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, C),
            wpe=nn.Embedding(T, C) if 'learned' in config.pos_emb else None,
            drop=Dropout(config.dropout),
            h=h,
            ln_f=nn.LayerNorm(C, bias=config.bias)))
        self.lm_head = Linear(C, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        # GPT-2's initialization: the more blocks, the less each adds to the residual stream
        n_blocks = sum(isinstance(m, Block) for m in self.modules())
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02 / math.sqrt(2 * n_blocks) if name.endswith(('c_proj', 'expand')) else 0.02
                with seeded(start, name): # networks that share a layer share its start
                    nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # without position tables, sequences have no maximum length
        self.bounded = config.pos_emb != 'none' or bool(config.unet_layers) or any(m.bounded for m in config.mixers())

    def hidden(self, idx, cache=NO_CACHE):
        """The normalized residual stream before the head: idx (B, T) -> (B, T, C)."""
        positions = cache.advance(idx.size(1), self.config.block_size if self.bounded else math.inf)
        x = self.transformer.wte(idx)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe.weight[positions]
        x = self.transformer.drop(x)
        x = self.transformer.h(narrowed(x) if self.config.narrow_residual else x, cache.child('h'))
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, cache=NO_CACHE):
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x), None
        x, targets = x.flatten(0, 1), targets.flatten()
        return None, LinearCrossEntropy.apply(x, self.lm_head.weight, targets, torch.is_grad_enabled())

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
               repetition_window=None, no_repeat_ngram=0, min_p=0.0, vocab_size=None, static=None, generator=None):
        """
        Yields max_new_tokens times the next token (B, 1) after idx (B, T): -1 where the logits are not finite.

        temperature 0 takes the most likely token. top_k keeps the k most likely, top_p (arXiv 1904.09751) the smallest
        set that holds this much probability, min_p (arXiv 2407.01082) those with this share of the likeliest one's.
        repetition_penalty and no_repeat_ngram: see penalize. vocab_size leaves out a padded vocabulary's last ids.
        static: see Decoder.
        """
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        check_generation(self, idx, repetition_penalty, repetition_window, no_repeat_ngram, **options)
        window, n, out = Window(self, Decoder.choose(self, idx, static)), idx.size(1), idx
        for n in range(n, n + max_new_tokens):
            if n == out.size(1):
                out = torch.cat([out, torch.empty_like(out)], dim=1) # memory as the text grows
            logits = window.next_logits(out[:, :n])[:, :vocab_size]
            context = out[:, max(0, n - (repetition_window or self.config.block_size)):n]
            logits = penalize(logits, context, repetition_penalty, no_repeat_ngram)
            token = pick(logits, **options, generator=generator)
            out[:, n:n + 1] = token.clamp(min=0)
            yield token

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx (B, T) -> (B, T + max_new_tokens): idx with the new tokens appended. More options: see stream."""
        return finite(torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, **options)], dim=1))

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding leaves out wpe, as in nanoGPT. wte counts, since the head uses it."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding and self.transformer.wpe is not None else n

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """GPT-2's weights by name or from a folder; the interface is nanoGPT's. See data/checkpoints.py."""
        from data.checkpoints import load_model
        return load_model(name, **(override_args or {}))[0].train()

    def configure_optimizers(self, *args, **options):
        return configure_optimizers(self, *args, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

class Window:
    """
    The part of a growing sequence that the model sees: at most block_size tokens. A full window restarts from its last
    half, which is read again. This works for every mixer and is much cheaper than sliding the window by one token.
    """
    def __init__(self, model, decoder=None):
        self.model, self.decoder, self.cache = model, decoder, None

    def next_logits(self, out):
        """Logits (B, V) of the token after out (B, T), which must extend the last call's."""
        n, block_size = out.size(1), self.model.config.block_size
        if self.cache is None or n - self.start > block_size and self.model.bounded:
            begin = n - block_size if self.model.bounded else 0
            self.start = n - max(1, block_size // 2) if self.cache is not None else max(0, begin)
            self.done, self.cache = self.start, Cache()
        if self.decoder and n - 1 == self.done > self.start:
            logits = self.decoder(out[:, -1:])
        else:
            with attention_for_every_length(out.device):
                logits = self.model.lm_head(self.model.hidden(out[:, self.done:], self.cache)[:, -1])
            if self.decoder:
                self.decoder.load(self.cache, n - self.start)
        self.done = n
        return logits.float()


def penalize(logits, context, repetition_penalty, no_repeat_ngram):
    """
    Changes logits (B, V) by the tokens in context (B, S). repetition_penalty (arXiv 1909.05858) divides the positive
    logits of its tokens and multiplies the negative ones. no_repeat_ngram=n rules out what would complete n tokens in a
    row that are there already (arXiv 1705.04304).
    """
    if repetition_penalty != 1.0:
        repetition_penalty = min(max(repetition_penalty, 1e-20), 1e20) # beyond, float32 overflows
        seen = logits.gather(1, context)
        seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
        logits = logits.scatter(1, context, seen)
    if 0 < no_repeat_ngram <= context.size(1):
        ngrams = context.unfold(1, no_repeat_ngram, 1) # (B, ., n)
        begun = context[:, None, context.size(1) - no_repeat_ngram + 1:] # the last n - 1 tokens
        repeats = (ngrams[:, :, :-1] == begun).all(dim=2)
        banned = torch.zeros_like(logits).scatter_add_(1, ngrams[:, :, -1], repeats.to(logits.dtype)) > 0
        banned &= ~banned.all(dim=1, keepdim=True) # something must be left
        logits = logits.masked_fill(banned, float('-inf'))
    return logits


def pick(logits, temperature, top_k, top_p, min_p, generator):
    """Draws the next token (B, 1) from logits (B, V), as GPT.stream says."""
    diverged = ~logits.amax(dim=1, keepdim=True).isfinite() # the largest: -inf may be a token that is ruled out
    if temperature < 1e-6: # a division by it could overflow
        return logits.argmax(dim=1, keepdim=True).masked_fill(diverged, -1)
    logits, tokens, V = logits / min(temperature, 1e30), None, logits.size(1)
    if top_k is not None and top_k < V or top_p is not None and top_p < 1.0:
        logits, tokens = logits.topk(min(top_k or V, V)) # what follows is done on k candidates
    probs = logits.softmax(dim=1)
    if top_p is not None and top_p < 1.0:
        before = probs.cumsum(dim=1) - probs # the probability of the likelier ones
        probs = probs.masked_fill(before >= max(top_p, 1e-30), 0.0) # the likeliest one stays, if top_p rounds to 0
    if min_p > 0.0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=1, keepdim=True), 0.0)
    drawn = draw(probs, generator)
    return (drawn if tokens is None else tokens.gather(1, drawn)).masked_fill(diverged, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Machinery: you need none of this to add a mixer
# ---------------------------------------------------------------------------------------------------------------------

# What blocks share

class FirstValues:
    """The values (B, T, H, D) of a stack's first attention layer, for the later ones; None before that layer ran."""
    def __init__(self, values):
        self.values = values


def run_block(block, x, cache, values):
    """
    -> (the block's output, the values of the first attention layer up to it). They are an input and an output since
    torch.compile refuses a recomputed block that changes what was there before.
    """
    first = FirstValues(values)
    return block(x, cache, first), first.values


# ---------------------------------------------------------------------------------------------------------------------
# Settings of mixers, and the checks of a config

def own_settings(cls):
    """{name: type} of the settings that a Mixer class declares."""
    return inspect.get_annotations(cls)


def declare_settings(cls):
    """Adds the settings of a Mixer class to the fields of GPTConfig. ValueError if a name is taken."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception as e: # of whatever an annotation computes
        raise ValueError(f"a setting of {cls.__name__} has a type that cannot be read: {e}") from None
    for name in own_settings(cls):
        if name not in vars(cls):
            raise ValueError(f"the setting {name} of {cls.__name__} needs a default, as in {name}: int = 4")
        before = GPTConfig.declared_by.get(name) # another mixer may have the same setting, with the same default
        if hasattr(GPTConfig, name) and (before is None or (
                before.__name__ != cls.__name__ and getattr(GPTConfig, name) != vars(cls)[name])):
            raise ValueError(f"the setting {name} of {cls.__name__} is declared elsewhere, too: choose another name")
        GPTConfig.__annotations__[name] = hints[name]
        setattr(GPTConfig, name, vars(cls)[name])
        GPTConfig.declared_by[name] = cls
    for name in ('__init__', '__repr__', '__eq__', '__match_args__'): # dataclass makes new ones, with the new fields
        delattr(GPTConfig, name)
    dataclass(GPTConfig)


def add_mixer(cls):
    """
    Adds a config file's Mixer to MIXERS under its snake_case name, and its settings to GPTConfig. Returns that name, or
    None for any other class. ValueError if the mixer is unusable.
    """
    if not issubclass(cls, Mixer) or cls is Mixer:
        return None
    known = [name for name, other in MIXERS.items() if other is cls]
    if known:
        return known[0]
    if cls.forward is Mixer.forward and not callable(getattr(cls, 'mix', None)):
        raise ValueError(f"{cls.__name__} defines neither mix(x) nor forward(x, cache): see Mixer in model.py")
    for name, arguments in ('__init__', ('config', 'block_size')), ('forward', ('x', 'cache')), ('mix', ('x',)):
        try:
            inspect.signature(getattr(cls, name, lambda self, x: x)).bind(None, *arguments)
        except TypeError:
            raise ValueError(f"{cls.__name__}.{name} must take ({', '.join(arguments)}) by position: see Mixer "
                             "in model.py") from None
    name = re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', cls.__name__).lower()
    if name in BUILT_IN:
        raise ValueError(f"mixer={name!r} is model.py's own: choose another name than {cls.__name__}")
    declare_settings(cls)
    MIXERS[name] = cls
    return name


BUILT_IN = tuple(MIXERS)
GPTConfig.declared_by = {} # setting -> the class that declares it
for _cls in MIXERS.values():
    declare_settings(_cls)


def check_config(c):
    """Raises ValueError for an architecture that cannot be built or that has a setting which nothing reads."""
    for name in [c.mixer] if isinstance(c.mixer, str) else c.mixer:
        if name not in MIXERS:
            raise ValueError(f"mixer={name!r} is not one of {', '.join(MIXERS)}; a mixer defined in a file of its "
                             "own needs that file, as in config/mixers/NAME.py")
    choices = {name: typing.get_args(hint) for name, hint in typing.get_type_hints(GPTConfig).items()
               if typing.get_origin(hint) is Literal}
    for name, allowed in choices.items():
        if repr(getattr(c, name)) not in map(repr, allowed): # 1 is not True
            raise ValueError(f"{name}={getattr(c, name)!r} is not one of {', '.join(map(str, allowed))}")
    kinds = dict(unet_layers=tuple, unet_up_layers=(tuple, type(None)), unet_factor=(tuple, int))
    for name, kind in kinds.items():
        value = getattr(c, name)
        if not isinstance(value, kind) or isinstance(value, tuple) and not all(isinstance(n, int) for n in value):
            raise ValueError(f"{name}={value!r} must be a tuple of whole numbers, such as (2, 2)")
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        if getattr(c, name) < 1:
            raise ValueError(f"{name}={getattr(c, name)} must be at least 1")
    if not 0.0 <= c.dropout < 1.0:
        raise ValueError(f"dropout={c.dropout} must be in [0, 1)")
    if not 0.0 <= c.time_mixing <= 1.0:
        raise ValueError(f"time_mixing={c.time_mixing} is a fraction of the channels: 0.0 (off) to 1.0")
    if c.time_mixing and round(c.time_mixing * c.n_embd) == 0:
        raise ValueError(f"time_mixing={c.time_mixing} of n_embd={c.n_embd} is less than one channel: raise it, or set "
                         "0.0")
    if not 0 <= c.short_conv <= c.block_size:
        raise ValueError(f"short_conv={c.short_conv} is a number of tokens: 0 (off) to block_size={c.block_size}")
    if round(c.mlp_ratio * c.n_embd) < 1:
        raise ValueError(f"mlp_ratio={c.mlp_ratio} of n_embd={c.n_embd} is less than one channel; mlp='none' leaves "
                         "the MLP out")
    if c.n_embd % c.n_head:
        raise ValueError(f"n_embd={c.n_embd} is not divisible by n_head={c.n_head}: "
                         f"try n_embd={math.ceil(c.n_embd / c.n_head) * c.n_head}")
    longest = max([c.n_layer, *c.unet_layers, *(c.unet_up_layers or ())])
    if not c.mixers() or len(c.mixers()) > longest:
        raise ValueError(f"mixer={c.mixer!r} is a pattern of {len(c.mixers())} layers, but there are only {longest}")
    check_every_setting_is_read(c, longest)
    if not any(c.pos_emb in cls.pos_embs for cls in c.mixers()):
        raise ValueError(f"pos_emb={c.pos_emb!r} acts on queries and keys, which mixer={c.mixer!r} lacks: use "
                         f"{' or '.join(c.mixers()[0].pos_embs)}")
    for cls in c.mixers():
        cls.check(c)
    if c.unet_layers:
        check_unet(c)


def check_every_setting_is_read(c, longest):
    """Refuses settings that the chosen architecture ignores: they would silently do nothing."""
    unread = {}
    for other, cls in MIXERS.items():
        for name in own_settings(cls):
            if not any(name in own_settings(cls) for cls in c.mixers()):
                unread[name] = f"only mixer={other!r} reads it, and mixer={c.mixer!r} is set"
    reads = ['value_residual' in own_settings(c.mixers()[layer % len(c.mixers())]) for layer in range(longest)]
    if sum(reads) == 1:
        unread['value_residual'] = f"only a second layer of attention reads it, and mixer={c.mixer!r} has one at most"
    if not c.unet_layers:
        unread['unet_factor'] = unread['unet_up_layers'] = "only a UNet reads it, and unet_layers=() is set"
    if not c.time_mixing:
        unread['time_mixing_alternate'] = "only time_mixing reads it, and time_mixing=0.0 is set"
    if c.mlp == 'none':
        unread['mlp_ratio'] = "only an MLP reads it, and mlp='none' is set"
    for field in fields(c):
        value = getattr(c, field.name)
        if field.name in unread and value != field.default:
            raise ValueError(f"{field.name}={value!r}: {unread[field.name]}; leave {field.name} at {field.default!r}")


def check_unet(c):
    down, up, factors = c.unet_levels()
    if not len(down) == len(up) == len(factors):
        raise ValueError(f"unet_layers={c.unet_layers} has {len(down)} levels, unet_up_layers={up} has {len(up)}, "
                         f"unet_factor={c.unet_factor} has {len(factors)}: give as many of each")
    if min(down + up) < 0 or min(factors) < 2:
        raise ValueError(f"unet_factor={c.unet_factor} must be 2 or more, and unet_layers={down}, "
                         f"unet_up_layers={up} must not be negative")
    if math.prod(factors) > c.block_size:
        raise ValueError(f"unet_layers={c.unet_layers} with unet_factor={c.unet_factor} makes one token of "
                         f"{math.prod(factors)}, but block_size={c.block_size}: use fewer levels or a longer block")


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: beams, and CUDA graphs

def check_generation(model, idx, repetition_penalty, repetition_window, no_repeat_ngram, temperature=1.0, top_k=None,
                     top_p=None, min_p=0.0, length_penalty=1.0):
    """Raises ValueError for options that are out of range."""
    block_size = model.config.block_size
    in_window = repetition_window is None or 1 <= repetition_window <= block_size
    seen = repetition_window or block_size
    for name, value, right, rule in [
            ('prompt', idx.size(1), idx.size(1) > 0, 'at least one token'),
            ('temperature', temperature, temperature >= 0, 'at least 0'),
            ('top_k', top_k, top_k is None or top_k >= 1, 'at least 1, or None'),
            ('top_p', top_p, top_p is None or 0 < top_p <= 1, 'above 0 and at most 1, or None'),
            ('min_p', min_p, 0 <= min_p <= 1, 'from 0 to 1'),
            ('repetition_penalty', repetition_penalty, repetition_penalty > 0, 'above 0'),
            ('repetition_window', repetition_window, in_window, f'from 1 to block_size={block_size}, or None'),
            ('no_repeat_ngram', no_repeat_ngram, 0 <= no_repeat_ngram <= seen, f'from 0 to {seen}, the tokens it sees'),
            ('length_penalty', length_penalty, -30 <= length_penalty <= 30, 'from -30 to 30')]: # n ** 99 may overflow
        if not right:
            raise ValueError(f"{name}={value} must be {rule}")


def finite(tokens):
    """The tokens, once none of them is -1, which stands for logits that are not finite: then ValueError."""
    if (tokens < 0).any():
        raise ValueError("the logits are not finite: the model has diverged, or its dtype is too narrow; use another "
                         "checkpoint, or float32")
    return tokens


@torch.no_grad()
def beam_search(model, idx, max_new_tokens, beams=4, length_penalty=1.0, repetition_penalty=1.0,
                repetition_window=None, no_repeat_ngram=0, vocab_size=None, eot=None):
    """
    The likeliest continuation that a search of so many beams finds: idx (1, T) -> (1, T + n), n <= max_new_tokens.
    It ends with the token eot, if that is given and comes. Likeliest means the largest sum of log-probabilities
    divided by n ** length_penalty: above 0 favours long ones. Penalties change scores as in stream.
    """
    check_generation(model, idx, repetition_penalty, repetition_window, no_repeat_ngram, length_penalty=length_penalty)
    if beams < 1 or idx.size(0) != 1:
        raise ValueError(f"beams={beams} must be at least 1, and the prompt one row, not {idx.size(0)}")
    out, window, finished = idx, Window(model), [] # finished: (score, sequence)
    totals = idx.new_zeros(1, 1, dtype=torch.float32) # log-probability of each beam
    for n in range(1, max_new_tokens + 1):
        logits = window.next_logits(out)[:, :vocab_size]
        context = out[:, -(repetition_window or model.config.block_size):]
        logits = penalize(logits, context, repetition_penalty, no_repeat_ngram)
        candidates = totals + logits.log_softmax(dim=1) # (beams, V)
        # twice as many as are kept, since each beam may end with eot
        best, where = candidates.flatten().topk(min(2 * beams, candidates.numel()))
        rows, tokens = where // candidates.size(1), finite((where % candidates.size(1)).masked_fill(best.isnan(), -1))
        ends = tokens == eot if eot is not None else torch.zeros_like(tokens, dtype=torch.bool)
        for i in ends[:beams].nonzero().flatten().tolist():
            finished.append((best[i].item() / n ** length_penalty, torch.cat([out[rows[i]], tokens[i:i + 1]])))
        rows, tokens, totals = rows[~ends][:beams], tokens[~ends][:beams], best[~ends][:beams, None]
        if len(finished) >= beams or not len(rows):
            break
        out = torch.cat([out[rows], tokens[:, None]], dim=1)
        window.cache.reorder(rows)
    if len(finished) < beams:
        n = max(1, out.size(1) - idx.size(1))
        finished += [(total.item() / n ** length_penalty, row) for total, row in zip(totals, out)]
    return max(finished, key=lambda pair: pair[0])[1][None]


class StaticCache(Cache):
    """
    Buffers with room for block_size tokens; the current length is a tensor. No shape depends on the length of the
    context, so a step can be captured once as a CUDA graph.
    """
    def __init__(self, block_size, position, mask):
        super().__init__()
        self.block_size, self.position, self.mask = block_size, position, mask

    def child(self, name):
        return self.children.setdefault(name, StaticCache(self.block_size, self.position, self.mask))

    def advance(self, T, limit=math.inf):
        return self.position

    def append(self, name, new, window=None):
        return self.buffers[name].index_copy_(-2, self.position, new)

    def load(self, cache):
        """Copies the contents of a Cache."""
        for name, child in cache.children.items():
            self.child(name).load(child)
        for name, (buffer, n) in cache.buffers.items():
            if name not in self.buffers:
                self.buffers[name] = buffer.new_zeros(*buffer.shape[:-2], self.block_size, buffer.size(-1))
            self.buffers[name][..., :n, :] = buffer[..., :n, :]


class Decoder:
    """
    Decodes one token after another with a StaticCache: on a GPU as one CUDA graph, captured once and replayed.
    static=True asks for it, and None does so on a GPU where the architecture allows it.
    """
    streams = {} # one a device: CUDA's libraries keep tens of MB for each stream that they have run on

    @staticmethod
    def supports(model):
        c = model.config # what reads positions or past tokens as Python numbers cannot be captured
        return c.mixer == 'attention' and c.time_weighting == 'none' and 'relative' not in c.pos_emb and \
            not c.time_mixing and not c.short_conv and not c.unet_layers and not c.attention_window

    @classmethod
    def choose(cls, model, idx, static):
        """One for idx, or None. static may be one from before, which has its graph."""
        if isinstance(static, cls):
            if static.model is not model or len(static.token) != len(idx):
                raise ValueError(f"static=Decoder is for another model, or for other than {len(idx)} texts")
            return static
        if static is None:
            static = idx.device.type == 'cuda' and cls.supports(model)
        return cls(model, idx.size(0)) if static else None

    def __init__(self, model, batch):
        if not self.supports(model):
            raise ValueError("static=True decodes flat stacks of plain attention only: use static=False")
        weight, block_size = model.lm_head.weight, model.config.block_size
        self.model, self.graph = model, None
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.long, device=weight.device)
        # one mask for all layers, which would otherwise launch several small kernels each to make their own
        self.mask = torch.zeros(1, block_size, dtype=weight.dtype, device=weight.device)
        self.cache = StaticCache(block_size, self.position, self.mask)

    def load(self, cache, n):
        """Takes over the cache of the n tokens read so far."""
        self.position.fill_(n)
        self.mask[:, :n], self.mask[:, n:] = 0.0, float('-inf')
        self.cache.load(cache)

    def step(self):
        self.mask.index_fill_(1, self.position, 0.0)
        logits = self.model.lm_head(self.model.hidden(self.token, self.cache)[:, -1])
        self.position += 1
        return logits

    def __call__(self, token):
        """token (B, 1) -> logits (B, V), which the next call overwrites."""
        self.token.copy_(token)
        if self.token.device.type != 'cuda':
            return self.step()
        if self.graph is None:
            with torch.cuda.device(self.token.device), attention_for_every_length(self.token.device):
                self.capture()
        self.graph.replay()
        return self.logits

    def capture(self):
        position = self.position.clone()
        # as CUDA asks for: the first calls allocate, which a graph cannot
        side = self.streams.setdefault(self.token.device, torch.cuda.Stream())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.position.copy_(position)
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.position.copy_(position)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may be pinning memory
        with torch.cuda.graph(graph, stream=side, capture_error_mode='thread_local'):
            self.logits = self.step()
        self.graph = graph # only now: an interrupted capture cannot be replayed


def attention_for_every_length(device):
    """Disables cuDNN's attention, torch's first choice on an H100: it plans anew for every length, tens of ms."""
    if device.type != 'cuda':
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


# ---------------------------------------------------------------------------------------------------------------------
# Parameter groups and optimizers

def optimizer_groups(model):
    """
    Returns {group: [(name, parameter)]}: embeddings, hidden (the matrices of Linear layers), head (unless tied to the
    embedding), rest. Weight decay is for the first three. A rule such as dim() >= 2 would also pull time weights, which
    start at one, towards zero.
    """
    kinds = {id(m.weight): 'hidden' for m in model.modules() if isinstance(m, nn.Linear)}
    kinds[id(model.lm_head.weight)] = 'head'
    kinds |= {id(m.weight): 'embeddings' for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = dict(embeddings=[], hidden=[], head=[], rest=[])
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[kinds.get(id(p), 'rest')].append((name, p))
    return groups


def configure_optimizers(model, weight_decay, learning_rate, betas, device_type, optimizer='adamw', momentum=0.95,
                         hidden_lr=None):
    """
    optimizer: adamw (as in nanoGPT) | muon (hidden matrices; AdamW for the rest) | sm3. hidden_lr: learning rate of the
    matrices of Linear layers; None: learning_rate. A schedule multiplies the learning rate by each group's lr_scale.
    """
    groups = []
    for name, named in optimizer_groups(model).items():
        lr = hidden_lr if name == 'hidden' and hidden_lr is not None else learning_rate
        if named:
            groups.append(dict(params=[p for _, p in named], lr=lr, lr_scale=lr / (learning_rate or 1.0),
                               weight_decay=weight_decay if name != 'rest' else 0.0, muon=name == 'hidden'))
    fused = device_type in ('cuda', 'cpu')
    if optimizer == 'muon':
        parts = {m.weight: m.parts for m in model.modules() if isinstance(m, Linear)}
        return Muon(groups, learning_rate, betas, fused, momentum, parts)
    if optimizer == 'sm3':
        return SM3(groups, learning_rate, momentum)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


class Muon(torch.optim.AdamW):
    """
    Muon (kellerjordan.github.io/posts/muon) for the groups marked muon, AdamW for the others. A matrix's update is its
    Nesterov momentum, made nearly orthogonal by five Newton-Schulz steps and scaled to the size of AdamW's update
    (arXiv 2502.16982), so that both use the same learning rates. Like torch.optim.Muon, but matrices of equal shape are
    batched, and matrices stacked in one parameter are treated separately; parts: {parameter: how many}, default 1.
    """
    def __init__(self, groups, lr, betas, fused, momentum, parts):
        super().__init__(groups, lr=lr, betas=betas, fused=fused)
        self.momentum, self.parts = momentum, parts

    @torch.no_grad()
    def step(self, closure=None):
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if not group['muon']]
        super().step()
        self.param_groups = all_groups
        for group in all_groups:
            if group['muon']:
                self.orthogonal_step(group)

    def orthogonal_step(self, group):
        bad = getattr(self, 'found_inf', None) # 1 on the device: this step must change nothing
        alive = 1.0 if bad is None else 1.0 - bad
        same_shape = {}
        for p in group['params']:
            if p.grad is None:
                continue
            if not self.state[p]: # AdamW's load_state_dict expects a step
                self.state[p] |= dict(momentum_buffer=torch.zeros_like(p), step=torch.zeros(()))
            buffer = self.state[p]['momentum_buffer']
            grad = p.grad if bad is None else p.grad.masked_fill_(bad > 0, 0.0)
            buffer.lerp_(grad, (1 - self.momentum) * alive)
            update = grad.lerp(buffer, self.momentum)
            p.mul_(1 - group['lr'] * group['weight_decay'] * alive)
            parts = self.parts.get(p, 1)
            for w, u in zip(p.chunk(parts), update.chunk(parts)):
                if w.size(0) > w.size(1):
                    w, u = w.t(), u.t()
                same_shape.setdefault(w.shape, []).append((w, u))
        for shape, pairs in same_shape.items():
            updates = orthogonalize_together([u for _, u in pairs]) * alive
            for (w, _), u in zip(pairs, updates):
                w.add_(u, alpha=-group['lr'] * 0.2 * math.sqrt(max(shape)))


def orthogonalize_together(matrices):
    """orthogonalize for a list of matrices of equal shape, sharded over the processes if there are several."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    n = math.ceil(len(matrices) / world)
    first = n * dist.get_rank() if world > 1 else 0
    own = matrices[first:first + n]
    done = orthogonalize(torch.stack(own + matrices[:1] * (n - len(own)))) # padded: all must send as many
    if world == 1:
        return done
    together = done.new_empty(n * world, *done.shape[1:])
    dist.all_gather_into_tensor(together, done)
    return together[:len(matrices)]


def orthogonalize(x):
    """x (N, rows, columns), rows <= columns: each U S V^T -> about U V^T, in bfloat16, singular values near 1."""
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5): # the quintic's slope at zero is as large as possible, so small singular values grow fast
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class SM3(torch.optim.Optimizer):
    """
    SM3-II (arXiv 1901.11150): Adagrad with one sum of squared gradients per row and one per column; the smaller of the
    two bounds each entry's own sum. Only the momentum is as large as the weights: half of Adam's memory. The sums never
    shrink, so learning rates are larger than Adam's (e.g. 0.1) and need no decay.
    """
    _step_supports_amp_scaling = True # torch's name: step reads found_inf itself, without waiting for a GPU

    def __init__(self, groups, lr, momentum=0.9):
        super().__init__(groups, dict(lr=lr, weight_decay=0.0))
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    self.step_of(p, group['lr'], group['weight_decay'])

    def step_of(self, p, lr, weight_decay):
        bad = getattr(self, 'found_inf', None) # 1 on the device: this step must change nothing
        state, dims = self.state[p], range(max(1, p.dim())) # a lone number has a sum, too
        if not state:
            state['momentum_buffer'] = torch.zeros_like(p)
            for d in dims: # one accumulator per dimension, shaped to broadcast
                state[f'sum_{d}'] = p.new_zeros([n if d == i else 1 for i, n in enumerate(p.shape)])
        bound = state['sum_0']
        for d in dims[1:]:
            bound = torch.minimum(bound, state[f'sum_{d}'])
        squares = bound + p.grad.square()
        update = torch.where(squares > 0, p.grad * squares.rsqrt(), 0.0) # no gradient so far: no update
        if bad is not None:
            update = torch.where(bad > 0, state['momentum_buffer'], update)
        for d in dims:
            others = [i for i in dims if i != d]
            largest = squares.amax(dim=others, keepdim=True) if others else squares
            state[f'sum_{d}'] = largest if bad is None else torch.where(bad > 0, state[f'sum_{d}'], largest)
        buffer = state['momentum_buffer'].lerp_(update, 1 - self.momentum)
        moved = p.mul(1 - lr * weight_decay).add_(update.lerp(buffer, self.momentum), alpha=-lr) # Nesterov
        p.copy_(moved if bad is None else torch.where(bad > 0, p, moved))


@torch.no_grad()
def clip_adaptively(model, ratio):
    """
    Adaptive gradient clipping (arXiv 2102.06171): limits the norm of each row's gradient to ratio times the norm of
    the row, which counts as at least 0.001. The head is not clipped, as in the paper. ratio=0 is off.
    """
    for p in model.parameters() if ratio else ():
        if p.grad is not None and p is not model.lm_head.weight:
            longest = ratio * p.norm(dim=-1, keepdim=True).clamp(min=1e-3)
            p.grad.mul_((longest / p.grad.norm(dim=-1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Initial values that do not depend on what else the network has

def draw_seed():
    return torch.randint(2 ** 62, (), device='cpu').item()


@contextmanager
def seeded(*seeds):
    """Random numbers in this context are a function of these numbers and strings; outside, nothing is drawn."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:8], 'little') >> 1)
        yield


def apart(build, *args):
    """build(*args), which draws as if it drew a single number: its size does not change what is drawn after it."""
    with seeded(draw_seed()):
        return build(*args)


# ---------------------------------------------------------------------------------------------------------------------
# Cost, memory and diagnosis

PRODUCTS = {F.linear, F.conv1d, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm,
            torch.addmm, torch.bmm, torch.baddbmm, torch.einsum} # which autocast computes in 16 bits


def fused_on_meta(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class MetaOperations(TorchFunctionMode):
    """
    Lets operations on the meta device keep for the backward pass what they keep elsewhere: attention what a fused
    kernel does, and matrix products, under autocast, which the meta device lacks, 16-bit copies of what they read.
    cheap: matrix products keep nothing, as where a compiler computes it again.
    """
    def __init__(self, cheap=False):
        super().__init__()
        self.cheap = cheap

    def __torch_function__(self, func, types, args=(), kwargs=None):
        options = kwargs or {}
        if func is F.scaled_dot_product_attention and 'enable_gqa' not in options and \
                all(a.dim() == 4 for a in args[:3]): # what the kernel takes
            func = fused_on_meta
        if func not in PRODUCTS:
            return func(*args, **options)
        args = [narrowed(a) if torch.is_tensor(a) and a.dtype == torch.float32 else a for a in args]
        forget = torch.autograd.graph.saved_tensors_hooks(
            lambda t: (t.shape, t.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1], device='meta'))
        with forget if self.cheap else nullcontext():
            return func(*args, **options)

    def wrap(self, call):
        def inside(*args, **options):
            with self:
                return call(*args, **options)
        return inside


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """
    Counts the bytes of the tensors that are alive, besides those given. peak: the most there were after an operation;
    fused: after a matrix product, as a compiler stores nothing in between that no product waits for.
    """
    def __init__(self, given, fused):
        super().__init__()
        self.sizes = {t.untyped_storage()._cdata: 0 for t in given}
        self.fused, self.now, self.peak = fused, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in self.sizes:
                storage = t.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        if not self.fused or func.overloadpacket in flop_registry:
            self.peak = max(self.peak, self.now)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)


def solve_flops(matrix, right, *args, out_shape=None, **options):
    """Of a triangular solve: matrix (..., n, n), right (..., n, m)."""
    return math.prod(right) * matrix[-1]


@contextmanager
def replaced(**values):
    """Context in which these global variables of this file have other values."""
    before = {name: globals()[name] for name in values}
    globals().update(values)
    try:
        yield
    finally:
        globals().update(before)


def checked(mixer, name):
    """The mixer's method, with a ValueError if it does not return a tensor of x's shape and no wider type."""
    method = getattr(mixer, name)
    def call(x, *args, **options):
        y = method(x, *args, **options)
        if getattr(y, 'shape', None) != x.shape:
            what = f'a tensor of shape {tuple(y.shape)}' if torch.is_tensor(y) else type(y).__name__
            raise ValueError(f"{type(mixer).__name__}.{name} returned {what}, and must return one of x's shape, "
                             f"{tuple(x.shape)}")
        if y.dtype == torch.float64 != x.dtype:
            raise ValueError(f"{type(mixer).__name__}.{name} returned float64: return .to(x.dtype)")
        return y
    return call


def cost(model, T=None):
    """
    FLOPs per token at length T (default: block_size), counted on a meta-device copy of the network, so for any mixer:
    the matrix products of the forward pass and triangular solves, times three for forward and backward. A product with
    a causal mask counts in full, as in arXiv 2204.02311, whichever mixer it is in and whatever a kernel skips. It does
    not see what a compiler optimizes away. nan if a mixer does what the meta device cannot, such as nonzero() or
    item(). ValueError if a mixer changes the shape of its input.
    """
    T = T or model.config.block_size
    with torch.device('meta'):
        model = GPT(model.config)
        idx = torch.zeros(1, T, dtype=torch.long)
    for module in model.modules():
        if isinstance(module, Mixer):
            name = 'mix' if type(module).forward is Mixer.forward else 'forward'
            setattr(module, name, checked(module, name))
    formulas = {torch.ops.aten.linalg_solve_triangular: solve_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        # triangles as one block, as the counter takes attention's
        with replaced(row_blocks=lambda rows, dim: [(rows, rows.size(dim))]):
            try:
                model(idx)
            except RuntimeError:
                return math.nan
    return 3 * counter.get_total_flops() / T


def peak_bytes(model, B, T, dtype, device_type, compiled=False, sharded=False):
    """
    The most bytes that are alive, besides weights and gradients, in the forward and backward pass of idx (B, T) under
    autocast to dtype on this type of device: what the backward pass needs, 16-bit copies of weights, the head's chunk
    and gradient. compiled: with torch.compile. sharded: without copies; FSDP gathers the blocks' matrices in 16 bits.
    nan if a mixer does what the meta device, where the step runs, or its autocast cannot: no reason not to train.
    """
    some = min(B, max(1, 2 ** 20 // T)) # beyond, bytes are in proportion, and the head's loop would be long
    with torch.device('meta'):
        model = GPT(model.config)
        idx = torch.zeros(some, T, dtype=torch.long)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in (m for block in blocks for m in block.modules()):
        if sharded and isinstance(module, nn.Linear):
            module.to(dtype)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) # as if from an earlier micro-batch
    gradients = [p.grad for p in model.parameters()]
    mode = MetaOperations(cheap=compiled and model.config.recompute == 'cheap')
    for module in [model, *blocks]: # blocks, too: the backward pass, which leaves all such modes, may repeat them
        module.forward = mode.wrap(module.forward)
    with replaced(meta_kind=device_type), LiveBytes([idx, *model.parameters(), *model.buffers(), *gradients],
                                                    fused=compiled) as live:
        try: # the CPU's autocast speaks for the meta device, which has none: see narrowed
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                loss = model(idx, idx)[1]
            loss.backward()
        except Exception:
            return math.nan
    return live.peak * B / some


def first_nonfinite(model, idx, targets):
    """Name of the first module whose output is not finite in a forward pass, or None."""
    found = []
    def look(name):
        def hook(module, args, output):
            for t in output if isinstance(output, tuple) else (output,):
                if torch.is_tensor(t) and not torch.isfinite(t).all():
                    found.append(name or 'the loss')
        return hook
    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(idx, targets)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


def narrowed(x):
    """x in the dtype of autocast's matrix products, where autocast is on. The CPU's holds for the meta device."""
    kind = x.device.type.replace('meta', 'cpu')
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


LOGITS_AT_ONCE = 2 ** 26 # 256 MB in float32; not in the class, where torch.compile cannot read it


class LinearCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of the logits x @ weight.T without ever holding all of them: x (N, C), weight (V, C), targets
    (N,) with -1 ignored. Works in chunks of rows; a chunk's gradient is computed while its logits are in memory.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, with_grad):
        x, w = narrowed(x), narrowed(weight.to(x.dtype)) # matrix products in 16 bits, as under autocast
        # few chunks: each adds to the whole gradient of weight. At most 8192 rows, or a compiler would hold all logits
        rows = min(8192, max(1, LOGITS_AT_ONCE // weight.size(0), math.ceil(x.size(0) / 4)))
        n = (targets >= 0).sum().clamp(min=1) # a batch without targets has loss 0
        loss = x.new_zeros((), dtype=torch.float32 if x.dtype != torch.float64 else x.dtype)
        grad_x, grad_w = torch.empty_like(x) if with_grad else None, None
        for i in range(0, x.size(0), rows):
            part, target = x[i:i + rows], targets[i:i + rows, None]
            logits = part @ w.t() # (rows, V), alive beside their gradient in compiled code, too
            log_probs = logits.log_softmax(dim=1, dtype=loss.dtype)
            valid = target >= 0
            target = target.clamp(min=0)
            right = log_probs.gather(1, target) # of the targets
            loss -= (right * valid).sum()
            if with_grad:
                scale = valid.to(loss.dtype) * 1024 / n # 1 / n alone is too small for float16
                grad = log_probs.exp_().mul_(scale).to(x.dtype) # of the logits
                log_probs = None
                # last: earlier, compilers would keep float32
                grad.scatter_(1, target, ((right.exp() - 1) * scale).to(x.dtype))
                grad_x[i:i + rows] = grad @ w
                product = grad.t() @ part
                grad_w = product.to(weight.dtype) if grad_w is None else grad_w.add_(product)
            logits = log_probs = grad = product = None # or they would lie beside those of the next chunk
        ctx.save_for_backward(grad_x, grad_w)
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * (grad / 1024), grad_w * (grad / 1024), None, None


# ---------------------------------------------------------------------------------------------------------------------
# Adaptations for CPUs

meta_kind = 'cuda' # the type of device that the meta device stands for

def kind_of(x):
    return meta_kind if x.is_meta else x.device.type


HAS_AMX = torch.cpu._is_amx_tile_supported() # what pays differs: see pack, fused_attention and Linear


class Linear(nn.Linear):
    """
    torch's, except that decoding one token in bfloat16 on a CPU with AMX runs at memory bandwidth, 1.6 times faster.
    parts: number of matrices stacked in the weight (3 for QKV); Muon treats each separately.
    """
    def __init__(self, n_in, n_out, bias=True, parts=1):
        super().__init__(n_in, n_out, bias=bias)
        self.parts = parts

    def forward(self, x):
        one_token = x.numel() == self.in_features and x.device.type == 'cpu' and not torch.is_grad_enabled()
        if HAS_AMX and one_token and x.dtype == self.weight.dtype == torch.bfloat16:
            y = torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class Int8Linear(nn.Module):
    """
    A Linear layer whose weights take one byte each, for generation on a CPU: (..., n_in) -> (..., n_out). Each output
    row has a scale, its largest absolute weight / 127. Up to MOST_TOKENS tokens, torch's kernel reads these bytes
    alone; beyond, and where n_in is no multiple of 16, each call first converts them to the dtype of the activations.
    """
    MOST_TOKENS = 8 # the kernel reads the weights again for every 4 tokens, and is slow at arithmetic

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        # rounded to what the kernel takes before it divides, so that no error comes of it; a row of zeros has any scale
        self.register_buffer('scale', (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()) # (n_out,)
        rows = (weight / self.scale[:, None]).round().clamp(-127, 127)
        self.register_buffer('rows', rows.to(torch.int8)) # (n_out, n_in)
        self.bias = linear.bias

    @property
    def weight(self):
        return self.rows * self.scale[:, None]

    def forward(self, x):
        n_in = self.rows.size(1)
        if x.numel() > self.MOST_TOKENS * n_in or n_in % 16:
            y = F.linear(x, self.rows.to(x.dtype)) * self.scale
        else: # a copy: the kernel reads 16 numbers at once, and crashes the process if they begin at any address
            tokens = x.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format).view(-1, n_in)
            y = torch._weight_int8pack_mm(tokens, self.rows, self.scale.bfloat16())
            y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


def replace_linear(model, layer):
    """
    Replaces a model's Linear layers by layer(it), on a CPU and for generation alone. A tied embedding keeps its
    weights: a token reads a row.
    """
    keep_freed_memory() # what is converted in each call, of a large head tens of MB
    made = {} # a layer that several modules share stays shared
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            # a subclass may compute something else, and a hook, as of weight_norm, make the weights anew
            if type(linear) in (nn.Linear, Linear) and not linear._forward_pre_hooks and not linear._forward_hooks:
                if linear not in made:
                    made[linear] = layer(linear)
                made[linear].in_features, made[linear].out_features = linear.in_features, linear.out_features
                setattr(module, name, made[linear])


def to_int8(model):
    replace_linear(model, Int8Linear)


class PackedLinear(nn.Module):
    """
    A Linear layer whose weights lie in the order in which oneDNN multiplies, for generation on a CPU: (..., n_in) ->
    (..., n_out). torch's own reads few tokens' float32 weights with one thread unless the processor is Intel's.
    """
    FEWEST = 2 ** 17 # weights; with fewer, calling oneDNN takes longer than it saves

    def __init__(self, linear):
        super().__init__()
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), linear.bias

    @property
    def weight(self):
        return self.packed.to_dense()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


def pack(model):
    """
    Makes the Linear layers of a model on a CPU PackedLinear, where its dtype allows that and it pays: decoding is 1.3
    to 2 times as fast on an AMD EPYC. Not with AMX, where torch's own product is near the memory's bandwidth.
    """
    dtype = model.transformer.wte.weight.dtype
    x86 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')
    if x86 and not HAS_AMX and (
            dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        fewest = PackedLinear.FEWEST
        replace_linear(model, lambda linear: PackedLinear(linear) if linear.weight.numel() >= fewest else linear)


class Dropout(nn.Module):
    """
    Inverted dropout. torch draws a float per element, which takes half of a training step on a CPU. On CPUs this draws
    only 16 random bits per element: p is off by less than 1e-5, and the scale accounts for that.
    """
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        if kind_of(x) != 'cpu':
            return F.dropout(x, self.p)
        dropped = round(self.p * 65536) # of the 65536 values
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-2 ** 63, None)
        bits = bits.view(torch.int16)
        # compared as integers: converting from bool is not vectorized
        keep = bits[:x.numel()].view(x.shape).ge_(dropped - 32768)
        return x * keep.to(x.dtype).mul_(65536 / (65536 - dropped))


def fused_attention_pays(q, v, dropout):
    """
    Whether to use the fused kernel. On a CPU it supports neither dropout nor queries wider than the values, and in
    bfloat16 it is slower at training on short sequences.
    """
    if kind_of(q) != 'cpu':
        return True
    training_pays = not dropout and (q.dtype != torch.bfloat16 or q.size(2) > 1024)
    return q.size(3) == v.size(3) and (training_pays or not torch.is_grad_enabled())


def fused_attention(q, k, v, mask, dropout, is_causal):
    """
    torch's attention. On a CPU it trains in float32, since the bfloat16 backward pass takes 7 times as long, and so it
    decodes: without AMX one token of many takes 3 times as long in bfloat16. Row by row: its copy fits into a cache.
    """
    options, training = dict(attn_mask=mask, dropout_p=dropout, is_causal=is_causal), torch.is_grad_enabled()
    one_each = q.size(0) == k.size(0) == v.size(0) and (mask is None or mask.dim() <= 2) # rows that can be taken apart
    # fewer than 64 tokens are not worth the calls, and a compiler would unroll the loop
    decoding = q.size(2) == 1 and k.size(2) >= 64 and one_each and not HAS_AMX and not torch.compiler.is_compiling()
    if kind_of(q) != 'cpu' or q.dtype != torch.bfloat16 or not (training or decoding):
        return F.scaled_dot_product_attention(q, k, v, **options)
    if mask is not None and mask.dtype != torch.bool: # a number to add, of a cache
        options['attn_mask'] = mask.float()
    rows = [(q, k, v)] if training else zip(q.split(1), k.split(1), v.split(1))
    with torch.autocast('cpu', enabled=False):
        rows = [F.scaled_dot_product_attention(*(t.float() for t in row), **options).bfloat16() for row in rows]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def draw(probs, generator):
    """
    Draws a column of each row by its share of the row's sum: probs (B, V) -> (B, 1). Any column if there is nan.
    Not by torch.multinomial, which waits for a GPU twice, and draws a number a column, on a CPU one after another.
    """
    if kind_of(probs) != 'cpu': # the smallest of exponential times at these rates
        return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=1, keepdim=True)
    # one number a row, which falls into a column with the probability of its share. float32 would lose small shares
    ends = probs.cumsum(dim=1, dtype=torch.float64)
    at = torch.rand(probs.size(0), 1, dtype=torch.float64, generator=generator) * ends[:, -1:]
    return torch.searchsorted(ends, at, right=True).clamp(max=probs.size(1) - 1)


def keep_freed_memory():
    """
    Makes glibc keep freed memory for the next allocation instead of returning it to the system, as it does with large
    blocks: fresh pages in every step cost a fifth of the training time on a CPU. Without glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        mallopt(-1, -1) # M_TRIM_THRESHOLD: never
        mallopt(-4, 0) # M_MMAP_MAX: no separate mapping for large blocks
