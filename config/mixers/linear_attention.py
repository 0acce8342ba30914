# Linear attention with a learned decay: a constant-size state instead of a KV cache, and time linear in the length.
# Use it after config/shakespeare_small.py. Loss 2.004 after 500 steps at learning rate 0.0028 (3 seeds).
# Needs no position embedding, so decoding can continue beyond block_size.
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import NO_CACHE, Dropout, Linear, Mixer

out_dir = 'out-linear-attention'
mixer = 'linear_attention'
pos_emb = 'none'
mlp_ratio = 3.5


class LinearAttention(Mixer):
    """
    S_t = g_t S_{t-1} + k_t^T v_t and y_t = q_t S_t, S (D, D) per head, g_t in (0, 1) one number per head,
    computed from the token. Related to RWKV (arXiv 2305.13048), gated linear attention (2312.06635) and Mamba-2
    (2405.21060). Training uses matrix products within chunks and passes a state from chunk to chunk.
    """
    chunk: int = 64 # tokens per chunk
    bounded = False

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        C, H = config.n_embd, config.n_head
        self.n_head, self.chunk = H, config.chunk
        self.c_attn = Linear(C, 4 * C, bias=config.bias, parts=4) # queries, keys, values, output gate
        self.decay = Linear(C, H, bias=False)
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
        # (B, H, T) directly: torch 2.13 cannot compile the gradient of a Linear layer's transposed output
        log_g = -F.softplus(self.decay.weight @ x.mT + self.decay_bias[:, None])
        # 16 bits are too few for a sum over the whole past. Autocast does not support the meta device
        with torch.autocast(x.device.type.replace('meta', 'cpu'), enabled=False):
            q, k, v, log_g = (t if t.dtype == torch.float64 else t.float() for t in (q, k, v, log_g))
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            state, = cache.get('state', (q.new_zeros(B, self.n_head, C // self.n_head, C // self.n_head),))
            y, state = self.scan(q, k, v, log_g, state)
            y = F.rms_norm(y, y.shape[-1:], eps=1e-6).to(x.dtype)
        cache.put('state', state)
        y = (y * F.silu(1 + gate)).transpose(1, 2).reshape(B, T, C) # 1: starts open, or recall is learned late
        return self.resid_dropout(self.c_proj(y))

    def scan(self, q, k, v, log_g, state):
        """q, k, v (B, H, T, D), log_g (B, H, T), state (B, H, D, D) -> (y (B, H, T, D), final state)."""
        T, c = q.size(2), min(self.chunk, q.size(2))
        n = math.ceil(T / c)
        # padding of the last chunk adds nothing to the state and does not decay it
        q, k, v = (F.pad(t, (0, 0, 0, n * c - T)).unflatten(2, (n, c)) for t in (q, k, v)) # (B, H, n, c, D)
        since = F.pad(log_g, (0, n * c - T)).unflatten(2, (n, c)).cumsum(3) # log of the decay since the chunk began
        future = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)
        decay = (since[..., None] - since[..., None, :]).masked_fill(future, -math.inf).exp() # (B, H, n, c, c)
        scores, from_state = q @ k.mT * decay, q * since.exp()[..., None]
        to_end = k * (since[..., -1:] - since).exp()[..., None]
        kept = since[..., -1].exp()[..., None, None]
        states = [state]
        # unbind: the gradient of kept[:, :, i] would be as large as kept
        for keep, add in zip(kept.unbind(2), (to_end.mT @ v).unbind(2)):
            states.append(keep * states[-1] + add)
        y = scores @ v + from_state @ torch.stack(states[:-1], dim=2)
        return y.flatten(2, 3)[:, :, :T], states[-1]
