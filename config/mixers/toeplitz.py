# Toeplitz mixer (arXiv 2605.06683): weights along time that depend on the distance alone.
# Use it after config/shakespeare_small.py. Loss 1.927 after 500 steps at learning rate 0.011 (3 seeds).
# Needs no position embedding, so decoding can continue beyond block_size.
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import NO_CACHE, Dropout, Linear, Mixer, mix_time, toeplitz

out_dir = 'out-toeplitz'
mixer = 'toeplitz'
pos_emb = 'none'
mlp_ratio = 5.0625


class Toeplitz(Mixer):
    """
    y_t = sum_{s<=t} a_{t-s} x_s per head, between an input and an output projection (Toeplitz MLP Mixer, arXiv
    2605.06683). A table has block_size distances; beyond them a is zero, at any length of the sequence. The authors add
    a bias per position along time, which would end at block_size: here the projections have the only biases.
    """
    bounded = False

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.n_head = config.n_head
        self.c_fc = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.table = nn.Parameter(torch.randn(config.n_head, block_size) * 0.02) # a, small as in causal_init
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, cache=NO_CACHE):
        B, T, C = x.size()
        x = self.c_fc(x).view(B, T, self.n_head, -1).transpose(1, 2) # (B, H, T, D)
        y = self.convolve(cache.append('x', x, self.table.size(1)), T)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def convolve(self, x, T):
        """The y above for the last T of S tokens: x (B, H, S, D) -> (B, H, T, D)."""
        S, reach = x.size(2), self.table.size(1)
        a, rows = F.pad(self.table, (0, reach)), [] # zero at distances that the table does not have
        # in blocks of rows: one where T <= reach, and beyond that no matrix is larger than reach x 2 reach. A matrix
        # product, since the rounding errors of a Fourier transform would carry later tokens into earlier outputs
        for i in range(S - T, S, reach):
            seen = x[:, :, max(0, i - reach + 1):i + reach]
            rows.append(mix_time(toeplitz(a, min(reach, S - i), seen.size(2)).to(x.dtype), seen))
        return torch.cat(rows, dim=2)
