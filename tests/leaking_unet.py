# The UNet as it was once published: it merges tokens into the first position of their group, which leaks later tokens.
# Its loss means nothing. To see that yourself, add this file after a config file, with --allow_leak=True.
import math

import torch

import model

out_dir = 'out-leaking-unet'
unet_layers = (1,)
n_layer = 2
mlp_ratio = 3.5


class LeakingUNet(model.UNet):
    """Merges the tokens that START at position factor * i, and returns them to that position and those after it."""
    def forward(self, x, cache=model.NO_CACHE):
        T = x.size(1)
        x = cache.append('x', x) # decoding lacks the later tokens that training saw, so its text is garbage
        B, S, C = x.size()
        x = self.down(x)
        n = math.ceil(S / self.factor)
        padded = torch.cat([x, x.new_zeros(B, n * self.factor - S, C)], dim=1)
        inner = self.inner(self.merge(padded.view(B, n, -1)))
        return self.up(x + self.expand(inner).view(B, -1, C)[:, :S])[:, -T:]


model.UNet = LeakingUNet
