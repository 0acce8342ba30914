# RWKV-7's time mixing: a constant-size state that corrects what it stored, with a decay for every channel.
# Use it after config/shakespeare_small.py. Loss 1.927 after 500 steps at learning rate 0.0048 (3 seeds).
# Needs no position embedding, so decoding can continue beyond block_size.
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import NO_CACHE, Dropout, Linear, Mixer

out_dir = 'out-rwkv7'
mixer = 'rwkv7'
pos_emb = 'none'
mlp_ratio = 3.0


class RWKV7(Mixer):
    """
    S_t = diag(w_t) S_{t-1} - (a_t e_t)^T u_t + k_t^T v_t with u_t = e_t S_{t-1}, and y_t = r_t S_t, S (D, D) per head:
    channels decay by w_t and lose the share a_t of the value u_t stored for the unit key e_t (RWKV-7, arXiv 2503.14456,
    S transposed). A chunk's u solve one triangular system. A mixer does not know its layer: the residual of the first
    layer's values is left out, and all start near the reference's middle layer, decays from slow to fast in each head.
    """
    bounded = False
    chunk = 32 # tokens. Not a setting: scan divides by the decay of a whole chunk, which is above exp(-0.61 * 32)

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        C, H, D = config.n_embd, config.n_head, config.n_embd // config.n_head
        low_rank = lambda rank, inner: nn.Sequential(Linear(C, rank, bias=False), inner, Linear(rank, C, bias=False))
        R = max(32, 32 * round(2.5 * math.sqrt(C) / 32)) # ranks as in the reference
        self.receptance, self.key, self.value, self.c_proj = (Linear(C, C, bias=config.bias) for _ in range(4))
        self.decay, self.rate, self.gate = map(low_rank, (R, R, 2 * R), (nn.Tanh(), nn.Identity(), nn.Sigmoid()))
        power = torch.tensor([0.1, 0.35, 0.35, 0.45, 0.45, 0.1])[:, None] # of r, k, v, decay, rate, gate
        self.mu = nn.Parameter(1 - (torch.arange(C) / C) ** power) # shares of the previous token, all of its channel 0
        self.decay_bias = nn.Parameter(torch.linspace(-5.5, 0.5, C).view(H, 1, D) + torch.linspace(-2.5, 2.5, D))
        self.rate_bias, self.bonus, self.norm_bias = (nn.Parameter(torch.zeros(H, 1, D)) for _ in range(3))
        self.removal, self.replacement, self.norm = (nn.Parameter(torch.ones(H, 1, D)) for _ in range(3))
        self.resid_dropout = Dropout(config.dropout)

    @classmethod
    def check(cls, config):
        super().check(config)
        if config.n_head == config.n_embd:
            raise ValueError(f"n_head={config.n_head} leaves one channel a head, which is normalized to 0: use fewer")

    def forward(self, x, cache=NO_CACHE):
        (B, T, C), (H, _, D), wide = x.size(), self.bonus.shape, torch.promote_types(x.dtype, torch.float32)
        last, state = cache.get('state', (torch.zeros_like(x[:, :1]), x.new_zeros(B, H, D, D, dtype=wide)))
        change = torch.cat([last, x[:, :-1]], dim=1) - x
        layers = self.receptance, self.key, self.value, self.decay, self.rate, self.gate
        *inner, gate = (layer(x + mu * change) for layer, mu in zip(layers, self.mu))
        r, k, v, decay, rate = (t.to(wide).view(B, T, H, D).transpose(1, 2) for t in inner)
        with torch.autocast(x.device.type.replace('meta', 'cpu'), enabled=False): # sums need 32 bits; meta has none
            log_w, a = -math.exp(-0.5) * (decay + self.decay_bias).sigmoid(), (rate + self.rate_bias).sigmoid()
            e, k = F.normalize(k * self.removal, dim=-1), k * (1 + (a - 1) * self.replacement)
            y, state = self.scan(r, k, v, log_w, e, a * e, state)
            y = F.layer_norm(y, (D,), eps=1e-5 * D) * self.norm + self.norm_bias
            y = (y + (r * k * self.bonus).sum(-1, keepdim=True) * v).to(x.dtype)
        cache.put('state', x[:, -1:], state)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C) * gate))

    def scan(self, r, k, v, log_w, e, b, state):
        """r, k, v, log_w, e, b = a e (B, H, T, D), state (B, H, D, D) -> (y (B, H, T, D), final state)."""
        T, c = r.size(2), min(self.chunk, r.size(2))
        # padding of the last chunk adds nothing to the state and does not decay it
        r, k, v, log_w, e, b = (F.pad(t, (0, 0, 0, -T % c)).unflatten(2, (-1, c)) for t in (r, k, v, log_w, e, b))
        since = log_w.cumsum(3) # (B, H, n, c, D)
        r, e = r * since.exp(), e * (since - log_w).exp() # u is read before its own token's decay
        k, b, kept = k * (-since).exp(), b * (-since).exp(), since[:, :, :, -1:].exp()
        A, right = (e @ b.mT).tril(-1), torch.cat([(e @ k.mT).tril(-1) @ v, e], dim=-1)
        own, of_state = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True).chunk(2, dim=-1)
        added, removed = (k * kept).mT @ v, (b * kept).mT
        states, us = [state], []
        # unbind: the gradient of own[:, :, i] would be as large as own
        for keep, add, remove, o, w in zip(*(t.unbind(2) for t in (kept.mT, added, removed, own, of_state))):
            us.append(o + w @ states[-1]) # (B, H, c, D)
            states.append(keep * states[-1] + add - remove @ us[-1])
        y = (r @ k.mT).tril() @ v + r @ torch.stack(states[:-1], dim=2) - (r @ b.mT).tril() @ torch.stack(us, dim=2)
        return y.flatten(2, 3)[:, :, :T], states[-1]
