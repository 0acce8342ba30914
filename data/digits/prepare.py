"""
Handwritten digits, 8 x 8 pixels in 17 greys (scikit-learn's copy of the UCI set: no download), in the style of iGPT:
one token per pixel, row by row, and one that starts each picture. 1,797 pictures, of which 180 are held out.

    pip install scikit-learn
    python data/digits/prepare.py
    python train.py config/digits.py
    python sample.py --out_dir=out-digits --num_samples=64                 new pictures
    python sample.py --out_dir=out-digits --num_samples=8 --start=3        completes the upper half of held-out digits
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np

from configurator import configure, explain_errors
from data.pictures import PictureTokenizer, write_pictures
from data.tokens import DataError, dataset_folder
from data.writer import summarize

val_fraction = 0.1 # fraction of the pictures to hold out (0, 1)
test_fraction = 0.0 # fraction of the training pictures to seal: tests/compare.py --confirm alone reads it [0, 1)
seed = 1337 # selects the held-out pictures
out = 'digits' # dataset to write: a name in data/, or a folder
configure(globals())

explain_errors()
try:
    from sklearn.datasets import load_digits
except ImportError:
    raise DataError("the digits come with scikit-learn: pip install scikit-learn") from None
pictures = load_digits().images[:, :, :, None] * 255 / 16 # (N, 8, 8, 1)
pictures = pictures[np.random.default_rng(seed).permutation(len(pictures))]
tokenizer = PictureTokenizer(8, 8, [[i * 255 / 16] for i in range(17)])
writer = write_pictures(dataset_folder(out), tokenizer, pictures, val_fraction, test_fraction)
summarize(writer, 'config/digits.py', out)
