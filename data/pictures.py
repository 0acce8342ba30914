"""
Pictures as tokens (iGPT, Chen et al. 2020; minGPT's play_image): one token per pixel, row by row: the nearest colour in
a palette. One more id starts each picture.
"""
import numpy as np

from data.tokenizers import EOT, Tokenizer
from data.tokens import DataError, Split
from data.writer import Writer

SHADES = ' .:-=+*#%@'


class PictureTokenizer(Tokenizer):
    """palette: a list of colours, each of one number (grey) or three (red, green, blue), from 0 to 255."""
    name = 'pictures'
    unit = 'dimension' # bits per dimension: per number of a pixel's colour

    def __init__(self, height, width, palette):
        try:
            self.height, self.width, self.palette = int(height), int(width), np.asarray(palette, np.float64)
            right = self.palette.ndim == 2 and self.palette.shape[1] in (1, 3) and len(self.palette)
        except (TypeError, ValueError):
            right = False
        if not right or min(self.height, self.width) < 1:
            raise DataError("the metadata's pictures need a height, a width, and a palette of greys or colours: "
                            "prepare the dataset again")
        self.eot = len(palette)
        self.vocab_size = self.eot + 1
        self.special = {self.eot: EOT}
        shades = (self.palette.mean(1) / 256 * len(SHADES)).astype(int)
        self.token_bytes = [*(SHADES[i].encode() for i in shades), EOT.encode()]
        self.lengths = np.array([self.palette.shape[1]] * len(palette) + [0, 0]) # see Tokenizer

    def encode(self, text, allow_special=True):
        """The id that starts a picture, whatever the text is."""
        return [self.eot]

    def decode(self, ids, special=False):
        """Rows of characters; darker pixels become sparser characters."""
        text = super().decode(ids)
        return '\n'.join(text[i:i + self.width] for i in range(0, len(text), self.width))

    def ids_of(self, pictures):
        """Pictures (N, H, W, 1 or 3) -> ids (N, 1 + H * W)."""
        pixels = np.asarray(pictures, np.float64).reshape(len(pictures), -1, self.palette.shape[1])
        nearest = [((row[:, None] - self.palette) ** 2).sum(2).argmin(1) for row in pixels]
        return np.concatenate([np.full((len(pictures), 1), self.eot), np.stack(nearest)], axis=1)

    def pictures_of(self, ids):
        """Ids (N, H * W) -> pictures (N, H, W, 1 or 3) of bytes."""
        colours = self.palette.round().clip(0, 255).astype(np.uint8)
        return colours[np.asarray(ids)].reshape(-1, self.height, self.width, self.palette.shape[1])

    def meta(self):
        return {'tokenizer': 'pictures', 'vocab_size': self.vocab_size, 'height': self.height, 'width': self.width,
                'palette': self.palette.tolist()}


def write_pictures(folder, tokenizer, pictures, val_fraction, test_fraction=0.0):
    """Writes a dataset of pictures (N, H, W, 1 or 3), holding out the last ones. Returns the finished Writer."""
    held_out = len(pictures) - round(val_fraction * len(pictures))
    sealed = round(held_out * (1 - test_fraction))
    parts = {'train': pictures[:sealed], 'test': pictures[sealed:held_out], 'val': pictures[held_out:]}
    with Writer(folder, tokenizer, test_fraction=test_fraction) as out:
        for split, part in parts.items():
            if len(part):
                out.write(split, tokenizer.ids_of(part).flatten())
                out.write(split, [tokenizer.eot]) # so that windows and their targets are whole pictures
    return out


def held_out(folder, tokenizer, number):
    """The ids (1 + H * W) of a picture of the validation split."""
    split, size = Split(folder, 'val'), 1 + tokenizer.height * tokenizer.width
    n = (split.n_tokens - 1) // size
    if not 0 <= number < n:
        raise DataError(f"start={number} is no held-out picture: there are {n}, from 0 on")
    x, _ = split.read(np.array([0]), np.array([number * size]), size)
    return x[0]


def save_grid(pictures, path, columns):
    """Saves pictures (N, H, W, 1 or 3) side by side in one PNG, enlarged."""
    from PIL import Image # comes with matplotlib
    n, height, width, channels = pictures.shape
    rows, pad = -(-n // columns), 1
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, channels), 64, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + pad) + pad, (i % columns) * (width + pad) + pad
        grid[top:top + height, left:left + width] = picture
    scale = max(1, 512 // max(grid.shape[:2]))
    grid = grid.repeat(scale, 0).repeat(scale, 1)
    Image.fromarray(grid[:, :, 0] if channels == 1 else grid).save(path)
