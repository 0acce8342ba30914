"""
CIFAR-10's 60,000 pictures of 32 x 32 pixels (Krizhevsky 2009), or another dataset of small pictures on the Hugging Face
Hub, in the style of iGPT: one token per pixel, the nearest colour in a palette found by k-means. The last tenth is held
out. Bits per dimension refer to the colours of the palette.

    pip install scikit-learn
    python data/cifar10/prepare.py
    python data/cifar10/prepare.py --source=ylecun/mnist --field=image --colours=16 --out=mnist
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np

from configurator import configure, explain_errors
from data.pictures import PictureTokenizer, write_pictures
from data.stream import open_stream
from data.tokens import DataError, dataset_folder
from data.writer import summarize

source = 'uoft-cs/cifar10' # name on the Hub; parquet: local files, see data_files
field = 'img' # the field of a document that holds its picture
colours = 512 # size of the palette [2, 4096]
max_pictures = 0 # stop after this many; 0: take all [0, inf)
val_fraction = 0.1 # fraction of the pictures to hold out (0, 1)
test_fraction = 0.0 # fraction of the training pictures to seal: tests/compare.py --confirm alone reads it [0, 1)
revision = '' # git revision on the Hub
data_files = '' # local files, if source is parquet; may be a pattern with *
out = 'cifar10' # dataset to write: a name in data/, or a folder
configure(globals())


def read_pictures():
    """Returns bytes (N, H, W, 1 or 3)."""
    pictures = []
    for i, document in enumerate(open_stream(source, '', revision, data_files)):
        if not hasattr(document.get(field), 'convert'):
            raise DataError(f"the documents have no picture in a field {field!r}, but "
                            f"{', '.join(map(repr, document))}: name it with --field=NAME")
        picture = document[field]
        picture = np.asarray(picture.convert('L' if picture.mode in ('1', 'L') else 'RGB'))
        pictures.append(picture.reshape(*picture.shape[:2], -1))
        if pictures[-1].shape != pictures[0].shape:
            raise DataError(f"the pictures differ in size or colours: the first is {pictures[0].shape}, number {i} is "
                            f"{pictures[-1].shape}: take a set in which all are alike")
        if len(pictures) == max_pictures:
            break
    if len(pictures) < 2:
        raise DataError(f"{source} has {len(pictures)} pictures: at least 2 are needed")
    return np.stack(pictures)


explain_errors()
try:
    from sklearn.cluster import MiniBatchKMeans
except ImportError:
    raise DataError("the palette needs scikit-learn: pip install scikit-learn") from None
pictures = read_pictures()
pixels = pictures.reshape(-1, pictures.shape[-1])
some = np.random.default_rng(0).choice(len(pixels), min(len(pixels), 200_000), replace=False)
n = min(colours, len(np.unique(pixels[some], axis=0)))
palette = MiniBatchKMeans(n, n_init=3, random_state=0).fit(pixels[some].astype(float)).cluster_centers_
tokenizer = PictureTokenizer(*pictures.shape[1:3], palette.round(1).tolist())
writer = write_pictures(dataset_folder(out), tokenizer, pictures, val_fraction, test_fraction)
if out == 'cifar10':
    summarize(writer, 'config/cifar10.py', out)
else:
    summarize(writer, 'config/digits.py', out, block_size=1 + tokenizer.height * tokenizer.width,
              out_dir=f'out-{Path(out).name}')
