# The UNet as it was once published: it merges tokens into their own first position, and so shows each the next ones.
# Its loss means nothing. To see that for oneself, after a config file and with --allow_leak=True.
import math

import torch

import model

out_dir = 'out-leaking-unet'
unet_layers = (1,)
n_layer = 2
mlp_ratio = 3.5


class LeakingUNet(model.UNet):
    """Merges the tokens that START at position factor * i, and hands them back to that position and those after it."""
    def forward(self, x, cache=model.NO_CACHE):
        T = x.size(1)
        x = cache.append('x', x) # decoding sees what is there: training saw more, which is why its text is garbage
        B, S, C = x.size()
        x = self.down(x)
        n = math.ceil(S / self.factor)
        padded = torch.cat([x, x.new_zeros(B, n * self.factor - S, C)], dim=1)
        inner = self.inner(self.merge(padded.view(B, n, -1)))
        return self.up(x + self.expand(inner).view(B, -1, C)[:, :S])[:, -T:]


model.UNet = LeakingUNet
