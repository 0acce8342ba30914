# The gated delta rule: a constant-size state that corrects what it stored, and time linear in the length.
# Use it after config/shakespeare_small.py. Loss 1.986 after 500 steps at learning rate 0.002 (3 seeds).
# Needs no position embedding, so decoding can continue beyond block_size.
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import NO_CACHE, Dropout, Linear, Mixer

out_dir = 'out-gated-delta'
mixer = 'gated_delta'
pos_emb = 'none'
mlp_ratio = 3.5


class GatedDelta(Mixer):
    """
    S_t = g_t (I - b_t k_t^T k_t) S_{t-1} + b_t k_t^T v_t and y_t = q_t S_t, S (D, D) per head: the value stored
    for the key k_t moves by b_t towards v_t (DeltaNet in parallel, arXiv 2406.06484; Gated DeltaNet, arXiv 2412.06464).
    Written as S_t = g_t S_{t-1} + k_t^T u_t with u_t = b_t (v_t - g_t k_t S_{t-1}), a chunk's u solve one triangular
    system: (1 + A) u = b (v - G k S), A_ij = b_i G_i / G_j k_i k_j for j < i, G the decay since the chunk began.
    """
    chunk: int = 64 # tokens per chunk
    bounded = False

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        C, H = config.n_embd, config.n_head
        self.n_head, self.chunk = H, config.chunk
        self.c_attn = Linear(C, 4 * C, bias=config.bias, parts=4) # queries, keys, values, output gate
        self.gates = Linear(C, 2 * H, bias=False, parts=2) # decay and b
        memory = torch.logspace(2, 9, H, base=2) # in tokens: from 4 to 512 over the heads
        self.decay_bias = nn.Parameter(torch.log(torch.expm1(1 / memory)))
        self.c_proj = Linear(C, C, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    @classmethod
    def check(cls, config):
        super().check(config)
        if config.chunk < 1:
            raise ValueError(f"chunk={config.chunk} must be at least 1")

    def forward(self, x, cache=NO_CACHE):
        B, T, C = x.size()
        q, k, v, gate = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(4, dim=2))
        decay, b = self.gates(x).transpose(1, 2).chunk(2, dim=1) # (B, H, T)
        # 16 bits are too few for a sum over the whole past. Autocast does not support the meta device
        with torch.autocast(x.device.type.replace('meta', 'cpu'), enabled=False):
            q, k, v, decay, b = (t if t.dtype == torch.float64 else t.float() for t in (q, k, v, decay, b))
            q, k, log_g = F.normalize(q, dim=-1), F.normalize(k, dim=-1), -F.softplus(decay + self.decay_bias[:, None])
            state, = cache.get('state', (q.new_zeros(B, self.n_head, C // self.n_head, C // self.n_head),))
            y, state = self.scan(q, k, v, log_g, b.sigmoid(), state)
            y = F.rms_norm(y, y.shape[-1:], eps=1e-6).to(x.dtype)
        cache.put('state', state)
        y = (y * F.silu(1 + gate)).transpose(1, 2).reshape(B, T, C) # 1: starts open, or recall is learned late
        return self.resid_dropout(self.c_proj(y))

    def scan(self, q, k, v, log_g, b, state):
        """q, k, v (B, H, T, D), log_g, b (B, H, T), state (B, H, D, D) -> (y (B, H, T, D), final state)."""
        T, c = q.size(2), min(self.chunk, q.size(2))
        n = math.ceil(T / c)
        # padding of the last chunk adds nothing to the state and does not decay it
        q, k, v = (F.pad(t, (0, 0, 0, n * c - T)).unflatten(2, (n, c)) for t in (q, k, v)) # (B, H, n, c, D)
        log_g, b = (F.pad(t, (0, n * c - T)).unflatten(2, (n, c)) for t in (log_g, b)) # (B, H, n, c)
        since = log_g.cumsum(3)
        future = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)
        decay = (since[..., None] - since[..., None, :]).masked_fill(future, -math.inf).exp() # (B, H, n, c, c)
        A = b[..., None] * (k @ k.mT * decay).tril(-1)
        right = b[..., None] * torch.cat([v, k * since.exp()[..., None]], dim=-1)
        own, of_state = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True).chunk(2, dim=-1)
        scores, from_state = q @ k.mT * decay, q * since.exp()[..., None]
        to_end, kept = k * (since[..., -1:] - since).exp()[..., None], since[..., -1].exp()[..., None, None]
        states, us = [state], []
        # unbind: the gradient of own[:, :, i] would be as large as own
        for keep, add, o, w in zip(*(t.unbind(2) for t in (kept, to_end.mT, own, of_state))):
            us.append(o - w @ states[-1]) # (B, H, c, D)
            states.append(keep * states[-1] + add @ us[-1])
        y = from_state @ torch.stack(states[:-1], dim=2) + scores @ torch.stack(us, dim=2)
        return y.flatten(2, 3)[:, :, :T], states[-1]
