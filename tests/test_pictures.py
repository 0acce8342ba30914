"""Pictures as tokens: there and back, windows that are whole pictures, bits per dimension, samples in a PNG."""
import json
import math

import numpy as np
import pytest

from data.pictures import PictureTokenizer, held_out, write_pictures
from data.tokenizers import load_tokenizer
from data.tokens import DataError, Split, load_meta
from helpers import flags, metrics, random_model, run, train, well, write_checkpoint

image = pytest.importorskip('PIL.Image')
GREYS = PictureTokenizer(4, 4, [[0], [85], [170], [255]])


def pictures(n=40, channels=1, seed=0):
    return np.random.default_rng(seed).choice([0, 85, 170, 255], (n, 4, 4, channels))


def test_there_and_back():
    """Pixels in raster order, each the nearest colour; the metadata makes the tokenizer again."""
    original = pictures()
    ids = GREYS.ids_of(original + np.random.default_rng(1).integers(-40, 41, original.shape))
    assert ids.shape == (40, 17) and (ids[:, 0] == GREYS.eot).all()
    assert ids[3, 1 + 4 * 2 + 1] == original[3, 2, 1, 0] // 85
    again = load_tokenizer(json.loads(json.dumps(GREYS.meta())))
    assert np.array_equal(again.pictures_of(ids[:, 1:]), original)
    assert GREYS.n_bytes(ids[:2].flatten()) == 32 and GREYS.decode(ids[0]).count('\n') == 3
    colours = PictureTokenizer(2, 1, [[0, 0, 0], [250, 0, 0], [0, 0, 250]])
    assert colours.ids_of([[[[9, 9, 200]], [[200, 20, 0]]]]).tolist() == [[3, 2, 1]] and colours.n_bytes([3, 2, 1]) == 6


@pytest.mark.parametrize('meta', [dict(), dict(height=0, width=4, palette=[[0]]), dict(height=4, width=4, palette=[]),
                                  dict(height=4, width=4, palette=[[0, 1]]), dict(height='x', width=4, palette=[[0]]),
                                  dict(height=4, width=4, palette='x')], ids=str)
def test_metadata_that_makes_no_tokenizer(meta):
    with pytest.raises(DataError, match='prepare the dataset again'):
        load_tokenizer(dict(meta, tokenizer='pictures'))


def test_from_pictures_to_samples(tmp_path):
    write_pictures(tmp_path / 'data', GREYS, pictures(), 0.25)
    for x, y in [Split(tmp_path / 'data', 'train').batch(0, 30, 17, 'epoch'),
                 *Split(tmp_path / 'data', 'val').fixed_batches(99, 99, 17)]:
        assert (x[:, 0] == GREYS.eot).all() and (x[:, 1:] < 4).all() and (y[:, -1] == GREYS.eot).all()
    said = train(tmp_path, first='', sampling='epoch', block_size=17, sample_tokens=16, max_iters=5)
    last = [line for line in metrics(tmp_path / 'out') if 'val_loss' in line][-1]
    assert last['bits_per_dimension'] == pytest.approx(last['val_loss'] * 17 / 16 / math.log(2))
    assert 'bits per dimension' in said and (tmp_path / 'out/loss.png').exists()
    well(run('sample.py', flags(out_dir=tmp_path / 'out', num_samples=5)))
    assert image.open(tmp_path / 'out/samples.png').size == (3 * 5 * 32 + 32, 2 * 5 * 32 + 32)


def test_completes_the_upper_half(tmp_path):
    write_pictures(tmp_path / 'data', GREYS, pictures(), 0.25)
    write_checkpoint(tmp_path / 'out/ckpt.pt', random_model(5, block_size=17), meta=load_meta(tmp_path / 'data'),
                     config=dict(dataset=str(tmp_path / 'data')))
    well(run('sample.py', flags(out_dir=tmp_path / 'out', num_samples=4, start=7)))
    shown = np.asarray(image.open(tmp_path / 'out/samples.png'))
    scale = shown.shape[0] // 11
    shown = shown[scale // 2::scale, scale // 2::scale] # one a pixel
    expected = pictures()[30 + 7, :2, :, 0]
    halves = [shown[1 + 5 * i:3 + 5 * i, 1 + 5 * j:5 + 5 * j] for i in range(2) for j in range(2)]
    assert all(np.array_equal(half, expected) for half in halves)
    assert np.array_equal(held_out(tmp_path / 'data', GREYS, 7)[1:].reshape(4, 4) * 85, pictures()[37, :, :, 0])
    done = run('sample.py', flags(out_dir=tmp_path / 'out', start=10))
    assert done.returncode == 2 and 'there are 10, from 0 on' in done.stderr.decode()


def test_sealed_pictures(tmp_path):
    """They are cut from those to train on; the held-out ones stay."""
    def rows(name, split):
        return np.fromfile(tmp_path / f'{name}/{split}.bin', '<u2')[:-1].reshape(-1, 17).tolist()

    for name, test_fraction in ('plain', 0.0), ('sealed', 0.2):
        write_pictures(tmp_path / name, GREYS, pictures(), 0.25, test_fraction)
    assert rows('sealed', 'train') + rows('sealed', 'test') == rows('plain', 'train')
    assert len(rows('sealed', 'test')) == 6 and rows('sealed', 'val') == rows('plain', 'val')
    assert not (tmp_path / 'plain/test.bin').exists()


def test_digits(tmp_path):
    pytest.importorskip('sklearn')
    said = well(run('data/digits/prepare.py', flags(out=tmp_path / 'data')))
    assert 'train has 105,106 tokens, val has 11,701' in said
    tokenizer = load_tokenizer(load_meta(tmp_path / 'data'))
    from sklearn.datasets import load_digits
    known = {picture.tobytes() for picture in load_digits().images.astype(np.uint8)}
    for split, n in ('train', 1617), ('val', 180):
        ids = np.fromfile(tmp_path / f'data/{split}.bin', '<u2')[:-1].reshape(n, 65)
        assert (ids[:, 0] == tokenizer.eot).all() and {row[1:].astype(np.uint8).tobytes() for row in ids} <= known


def test_pictures_of_the_hub(tmp_path):
    datasets = pytest.importorskip('datasets')
    pytest.importorskip('sklearn')
    def write(name, shapes):
        feature = datasets.Features({'img': datasets.Image(), 'label': datasets.Value('int64')})
        rows = [image.fromarray(np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8))
                for i, shape in enumerate(shapes)]
        datasets.Dataset.from_dict(dict(img=rows, label=[0] * len(rows)), feature).to_parquet(tmp_path / name)
    write('a.parquet', [(6, 5)] * 20)
    write('b.parquet', [(6, 5), (5, 6)])
    args = flags(source='parquet', colours=8, out=tmp_path / 'data')
    well(run('data/cifar10/prepare.py', [*args, *flags(data_files=tmp_path / 'a.parquet')]))
    tokenizer = load_tokenizer(load_meta(tmp_path / 'data'))
    assert (tokenizer.height, tokenizer.width, tokenizer.vocab_size) == (6, 5, 9)
    ids = np.fromfile(tmp_path / 'data/train.bin', '<u2')[:-1].reshape(18, 31)
    original = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    error = np.abs(tokenizer.pictures_of(ids[:1, 1:])[0].astype(float) - original).mean()
    assert error < 50 # of 8 colours for noise
    before = (tmp_path / 'data/train.bin').read_bytes()
    for more, words in (dict(data_files=tmp_path / 'b.parquet'), 'differ in size'), \
            (dict(data_files=tmp_path / 'a.parquet', field='label'), "no picture in a field 'label'"):
        done = run('data/cifar10/prepare.py', [*args, *flags(**more)])
        assert done.returncode == 2 and words in done.stderr.decode().splitlines()[-1]
    assert (tmp_path / 'data/train.bin').read_bytes() == before
