"""Token files, tokenizers, sampling, and the prepare scripts run for real on small input."""
import abc
import io
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import helpers
from data import stream as hub
from data import tokens as T
from data.dataset import Dataset
from data.tokenizers import (EOT, ByteTokenizer, CharTokenizer, JsonTokenizer, TiktokenTokenizer, load_tokenizer,
                             read_argument, read_text, text_pieces)
from data.tokens import DataError, Split, dataset_folder, load_meta, prefetch
from data.writer import Writer, cuts, lock_folder, sealed_dataset, split_of

needs_gpt2 = pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ,
                                reason='TIKTOKEN_CACHE_DIR names no folder with the vocabulary of GPT-2')
needs_shakespeare = pytest.mark.skipif('TINYSHAKESPEARE' not in os.environ,
                                       reason='TINYSHAKESPEARE names no file with the text')


def raw(folder, split='train', ids=range(100), dtype='<u2'):
    """A file as nanoGPT writes them."""
    folder.mkdir(exist_ok=True)
    np.array(ids, dtype).tofile(folder / f'{split}.bin')
    return folder


def sharded(path, ids, magic=20240520, version=1, dtype='<u2', count=None):
    """A shard as llm.c writes them."""
    header = np.zeros(256, '<i4')
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())


def shards_of(folder, lengths, split='train'):
    """Shards in which every token of the split is its own number: token t of shard s is 1000 * s + t."""
    for s, n in enumerate(lengths):
        np.array(1000 * s + np.arange(n), '<u2').tofile(folder / f'{split}_{s:03d}.bin')
    return Split(folder, split)


def message(error):
    text = str(error.value)
    assert '\n' not in text
    return text


# ---- text

@settings(deadline=None)
@given(st.text(alphabet='ab\r\n é東👍\ufeff', max_size=40), st.integers(1, 9), st.booleans())
def test_text_comes_as_it_is(text, n_bytes, mark):
    """In pieces of any size, and by lines; line ends too; without the mark before it, and with those further on."""
    data = b'\xef\xbb\xbf' * mark + text.encode()
    expected = text if mark else text.removeprefix('\ufeff')
    assert read_text(io.BytesIO(data)) == ''.join(text_pieces(io.BytesIO(data), n_bytes=n_bytes)) == expected
    lines = list(text_pieces(io.BytesIO(data), lines=True))
    assert lines == [*expected.encode().splitlines(True)] or lines[-1] == '' and ''.join(lines) == expected
    assert read_argument(os.fsdecode(data), 'start') == expected


@pytest.mark.parametrize('data, words', [
    ('Latin text'.encode('utf-16'), 'UTF-16'), ('Latin text'.encode('utf-16-le'), 'UTF-16'),
    ('Latin text'.encode('utf-16-be'), 'UTF-16'), ('Latin text'.encode('utf-32-le'), 'UTF-32'),
    ('привет, как дела и все такое\n'.encode('utf-16-le'), 'UTF-16'), # whose bytes are all below 128
    (b'caf\xe9', 'not UTF-8 at byte 3'), (b'\xef\xbb\xbf\xc3', 'not UTF-8 at byte 3')], ids=range(7))
def test_bytes_that_are_no_text(data, words):
    for read in read_text, lambda *where: list(text_pieces(*where, n_bytes=60)):
        with pytest.raises(DataError, match=f'somewhere .*{words}') as error:
            read(io.BytesIO(data), 'somewhere')
        message(error)
    assert read_text(io.BytesIO(b'a\0b' * 9 + b'text' * 99)) == 'a\0b' * 9 + 'text' * 99 # zeros on both sides


# ---- tokenizers

@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    if EOT not in text and text.isprintable():
        assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids, special=True) == text
    assert tokenizer.n_bytes(ids) == len(text.replace(EOT, '').encode())
    assert max(ids, default=0) < tokenizer.vocab_size


@given(st.text(min_size=1).filter(lambda text: EOT not in text), st.booleans())
def test_char_round_trip(text, eot):
    tokenizer = CharTokenizer.from_text([text], eot)
    again = load_tokenizer(json.loads(json.dumps(tokenizer.meta())))
    ids = tokenizer.encode(text)
    assert again.encode(text) == ids and len(ids) == len(text)
    assert again.decode(ids) == text
    assert tokenizer.n_bytes(ids) == len(text.encode())
    assert set(ids) == set(range(len(set(text))))
    assert tokenizer.vocab_size == len(set(text)) + eot
    assert tokenizer.eot == (len(set(text)) if eot else None)


@needs_gpt2
def test_gpt2_round_trip():
    tokenizer = load_tokenizer({'tokenizer': 'tiktoken', 'encoding': 'gpt2'})
    text = 'Hello, wörld! 東京\n\n  def f(x):\n\treturn 1 👍'
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encoding.encode(text) and tokenizer.decode(ids) == text
    assert tokenizer.n_bytes(ids) == len(text.encode())
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ('gpt2', 50257, 50256)
    assert load_tokenizer(tokenizer.meta()).encode(text) == ids


@pytest.mark.parametrize('tokenizer', [ByteTokenizer(), CharTokenizer('ab', eot=True),
                                       pytest.param('gpt2', marks=needs_gpt2)], ids=['bytes', 'char', 'gpt2'])
def test_special_token(tokenizer):
    if tokenizer == 'gpt2':
        tokenizer = TiktokenTokenizer('gpt2')
    ids = tokenizer.encode('a' + EOT + 'b' + EOT)
    assert ids[1] == ids[3] == tokenizer.eot and len(ids) == 4
    assert tokenizer.decode(ids) == 'ab'
    assert tokenizer.decode(ids, special=True) == 'a' + EOT + 'b' + EOT
    assert tokenizer.n_bytes(np.array([ids, [-1, -1, ids[0], 10 ** 6]])) == 3 # targets of -1 and surplus ids: none
    assert tokenizer.decode([ids[0], 10 ** 6, -1]) == 'a\ufffd\ufffd'
    if tokenizer.name != 'char':
        plain = tokenizer.encode(EOT, allow_special=False)
        assert tokenizer.eot not in plain and tokenizer.decode(plain) == EOT


def test_special_token_in_text_of_characters():
    tokenizer = CharTokenizer.from_text(['ba', 'a' + EOT + 'c'])
    assert tokenizer.characters == 'abc' and tokenizer.eot == 3
    assert CharTokenizer.from_text(['ab']).eot is None


def test_bytes_cut_within_a_character():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode('é')
    assert tokenizer.decode(ids[:1]) == '\ufffd'
    assert tokenizer.decode_bytes(ids[:1]) + tokenizer.decode_bytes(ids[1:]) == 'é'.encode()
    assert tokenizer.decode(tokenizer.encode('a\ud800')) == 'a?'


def test_unknown_characters_are_named():
    with pytest.raises(DataError) as error:
        CharTokenizer('abc').encode('a\nXbX')
    assert "'\\n', 'X'" in message(error) and 'more' not in message(error)
    with pytest.raises(DataError) as error:
        CharTokenizer('abc').encode('0123456789ABCDEF')
    assert "'9' and 6 more" in message(error)


@pytest.mark.parametrize('meta', [
    {'tokenizer': 'sentencepiece'}, {'tokenizer': ['char']}, {'tokenizer': 'char'},
    {'tokenizer': 'char', 'characters': 'aa'}, {'tokenizer': 'char', 'characters': ''},
    {'tokenizer': 'char', 'characters': ['a']}, {'tokenizer': 'tiktoken'},
    {'tokenizer': 'tiktoken', 'encoding': 'gpt7'}, {'tokenizer': 'tiktoken', 'encoding': '/etc/passwd'},
    {'tokenizer': 'tiktoken', 'encoding': ['gpt2']}])
def test_metadata_that_makes_no_tokenizer(meta):
    with pytest.raises(DataError) as error:
        load_tokenizer(meta)
    message(error)


def test_no_tokenizer_in_metadata():
    assert load_tokenizer({}) is None
    assert load_tokenizer({'vocab_size': 50304}) is None


# ---- metadata

def test_meta_pkl_of_nanogpt(tmp_path):
    characters = 'zab\n' # ids as given, not as sorted
    meta = {'vocab_size': 4, 'itos': dict(enumerate(characters)), 'stoi': {c: i for i, c in enumerate(characters)}}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    assert load_meta(tmp_path) == {'vocab_size': 4, 'tokenizer': 'char', 'characters': characters}
    assert load_tokenizer(load_meta(tmp_path)).encode('az') == [1, 0]
    (tmp_path / 'meta.json').write_text('{"vocab_size": 7}', encoding='utf-8') # goes first
    assert load_meta(tmp_path) == {'vocab_size': 7}


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_malicious_pickle_is_refused(tmp_path, protocol):
    victim = tmp_path / 'victim'
    for thing in (Attack(str(victim)), {'stoi': {'a': Attack(str(victim))}}):
        (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(thing, protocol))
        with pytest.raises(DataError) as error:
            load_meta(tmp_path)
        assert 'io.open' in message(error) or 'open' in message(error)
    assert not victim.exists()


@pytest.mark.parametrize('data', [
    b'', b'not a pickle', pickle.dumps({'stoi': {}})[:-3], pickle.dumps([1]), pickle.dumps({'vocab_size': 'x'}),
    pickle.dumps({'vocab_size': -1}), b'cos\nsystem\n.', b'(S"ls"\nios\nsystem\n.'])
def test_damaged_pickle(tmp_path, data):
    (tmp_path / 'meta.pkl').write_bytes(data)
    with pytest.raises(DataError) as error:
        load_meta(tmp_path)
    message(error)


def test_pickle_that_asks_for_memory(tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(b'\x80\x02}r\xff\xff\xff\x7f.') # memo entry 2**31 - 1
    with pytest.raises(DataError, match='memo entry 2147483647'):
        load_meta(tmp_path)


@pytest.mark.parametrize('text', ['', '{', '[]', '3', '{"dtype": "float32"}', '{"vocab_size": "65"}',
                                  '{"vocab_size": 0}', '{"vocab_size": true}', '{"tokens": 3}',
                                  '{"tokens": {"train": -1}}', '{"unfinished": true}', '[' * 100000])
def test_damaged_meta_json(tmp_path, text):
    (tmp_path / 'meta.json').write_text(text, encoding='utf-8')
    with pytest.raises(DataError) as error:
        load_meta(tmp_path)
    message(error)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_metadata(tmp_path_factory, data):
    for name in ('meta.json', 'meta.pkl'):
        folder = tmp_path_factory.mktemp('meta')
        (folder / name).write_bytes(data)
        try:
            load_tokenizer(load_meta(folder))
        except DataError as error:
            assert '\n' not in str(error)


# ---- files

def test_raw_files(tmp_path):
    split = Split(raw(tmp_path), 'train')
    assert split.n_tokens == 100 and split.meta == {}
    x, y = split.batch(0, 1, 99)
    assert x.tolist() == [list(range(99))] and y.tolist() == [list(range(1, 100))]
    assert x.dtype == y.dtype == np.int64


def test_uint32_files(tmp_path):
    (tmp_path / 'meta.json').write_text('{"dtype": "uint32", "vocab_size": 200000}', encoding='utf-8')
    split = Split(raw(tmp_path, ids=[100000, 70000, 3], dtype='<u4'), 'train')
    assert split.n_tokens == 3 and split.batch(0, 1, 2)[1].tolist() == [[70000, 3]]


@pytest.mark.parametrize('names', [['train.bin'], ['train_000001.bin', 'train_000002.bin'],
                                   ['fineweb_train_000001.bin', 'fineweb_train_000002.bin'],
                                   ['tiny_shakespeare_train.bin']])
@pytest.mark.parametrize('magic, version, dtype', [(20240520, 1, '<u2'), (20240801, 7, '<u4')])
def test_shards_with_header(tmp_path, names, magic, version, dtype):
    for i, name in enumerate(names):
        sharded(tmp_path / name, range(10 * i, 10 * i + 10), magic, version, dtype)
    sharded(tmp_path / 'fineweb_val_000000.bin', [7] * 5) # neither one of train
    (tmp_path / 'training.bin').write_bytes(b'123')
    split = Split(tmp_path, 'train')
    assert split.n_tokens == 10 * len(names)
    batches = list(split.all_batches(8, 4))
    assert np.concatenate([y[y >= 0] for _, y in batches]).tolist() == [
        i for s in range(len(names)) for i in range(10 * s + 1, 10 * s + 10)]


@pytest.mark.parametrize('change, words', [
    (dict(version=2), 'version 2'), (dict(count=11), '11 tokens'), (dict(count=9), '9 tokens'), (dict(count=-1), '-1')])
def test_wrong_headers(tmp_path, change, words):
    sharded(tmp_path / 'train_0.bin', range(10), **change)
    with pytest.raises(DataError) as error:
        Split(tmp_path, 'train')
    assert words in message(error) and 'train_0.bin' in message(error)


def test_truncated_shard(tmp_path):
    sharded(tmp_path / 'train_0.bin', range(10))
    os.truncate(tmp_path / 'train_0.bin', 1024 + 8)
    with pytest.raises(DataError, match='10 tokens.* 1044 bytes.* 1032'):
        Split(tmp_path, 'train')
    os.truncate(tmp_path / 'train_0.bin', 500)
    with pytest.raises(DataError, match='500'):
        Split(tmp_path, 'train')


def test_odd_and_empty_files(tmp_path):
    (tmp_path / 'train.bin').write_bytes(b'12345')
    with pytest.raises(DataError, match='5 bytes'):
        Split(tmp_path, 'train')
    (tmp_path / 'train.bin').write_bytes(b'')
    with pytest.raises(DataError, match='empty'):
        Split(tmp_path, 'train')
    (tmp_path / 'meta.json').write_text('{"dtype": "uint32"}', encoding='utf-8')
    (tmp_path / 'train.bin').write_bytes(b'123456')
    with pytest.raises(DataError, match='6 bytes.*uint32'):
        Split(tmp_path, 'train')


def test_files_that_metadata_does_not_know(tmp_path):
    raw(tmp_path, ids=range(98))
    (tmp_path / 'meta.json').write_text('{"tokens": {"train": 100}}', encoding='utf-8')
    with pytest.raises(DataError, match='promises 100 tokens.* have 98'):
        Split(tmp_path, 'train')
    (tmp_path / 'meta.json').unlink()
    raw(tmp_path)
    (tmp_path / 'train_000.bin').write_bytes(b'12')
    with pytest.raises(DataError, match='both train.bin and train_000.bin'):
        Split(tmp_path, 'train')


@pytest.mark.parametrize('written, meta, words', [
    ('<u4', {}, r'0, so these look like numbers of 32 bits, .*read as uint16: .*"dtype": "uint32"'),
    ('<u8', {}, 'numbers of 64 bits, .*write them as uint16'),
    ('<i8', dict(dtype='uint32'), 'numbers of 64 bits, .*read as uint32'),
    ('<i4', dict(dtype='uint16', vocab_size=900), 'numbers of 32 bits'),
    ('<u4', dict(vocab_size=50257), 'numbers of 32 bits')], ids=str)
def test_wider_numbers_than_they_are_read_as(tmp_path, written, meta, words):
    """Read as 16 bits every other id would be a 0."""
    (tmp_path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    ids = np.random.default_rng(0).integers(900, size=3000)
    with pytest.raises(DataError, match=words) as error:
        Split(raw(tmp_path, ids=ids, dtype=written), 'train')
    message(error)
    assert Split(raw(tmp_path, ids=ids, dtype='<u4' if meta.get('dtype') == 'uint32' else '<u2'), 'train')
    for even in np.zeros(3000), np.arange(3000) % 2 * 9: # every token 0; the last place, in which no width shows
        Split(raw(tmp_path, ids=even, dtype='<u4' if meta.get('dtype') == 'uint32' else '<u2'), 'train')


def test_large_vocabularies_have_32_bits(tmp_path):
    """Also where nothing says so: ids above 65,535 fit in no 16 bits."""
    ids = np.random.default_rng(0).integers(100_000, size=3000)
    with pytest.raises(DataError, match='every other token is below 256, .* 32 bits'):
        Split(raw(tmp_path, ids=ids, dtype='<u4'), 'train')
    for name, content in ('meta.pkl', pickle.dumps(dict(vocab_size=100_000))), ('meta.json', b'{"vocab_size": 1e5}'):
        (tmp_path / name).write_bytes(content.replace(b'1e5', b'100000'))
        split = Split(tmp_path, 'train')
        assert split.read(np.array([0]), np.array([0]), 2999)[0][0].tolist() == list(ids[:-1])
    with pytest.raises(DataError, match='vocab_size is 100000'): # 16 bits after all
        Split(raw(tmp_path, ids=ids % 50000), 'train').scan(100_000)


def test_names_and_links_that_would_mix_the_splits(tmp_path):
    raw(tmp_path, 'train'), raw(tmp_path, 'val')
    (tmp_path / '.ipynb_checkpoints').mkdir()
    (tmp_path / '._train.bin').write_bytes(b'what a Mac leaves beside a file')
    assert Split(tmp_path, 'train').n_tokens == 100
    for name in 'train_val.bin', 'x_val_train_1.bin':
        raw(tmp_path, name.removesuffix('.bin'))
        for split in 'train', 'val':
            with pytest.raises(DataError, match=f'{name} has the name of both splits: rename it'):
                Split(tmp_path, split)
        (tmp_path / name).unlink()
    (tmp_path / 'val.bin').unlink()
    (tmp_path / 'val.bin').symlink_to(tmp_path / 'train.bin')
    for split in 'train', 'val':
        with pytest.raises(DataError, match='train.bin and val.bin are the same file'):
            Split(tmp_path, split)


def test_fingerprint_of_whole_files(tmp_path, monkeypatch):
    """Any byte of tokens or masks, in the middle too; and each file is read once, if its folder can keep the hash."""
    with Writer(tmp_path, ByteTokenizer()) as out:
        out.write('train', np.arange(30000) % 256, np.arange(30000) % 3 > 0), out.write('val', [1, 2])
    opened = []

    def fingerprint():
        opened.clear()
        return Split(tmp_path, 'train').fingerprint()

    def spy(path, mode='r', *more, **options):
        opened.append(os.path.basename(path)) if mode == 'rb' else None
        return open(path, mode, *more, **options)

    monkeypatch.setattr(T, 'open', spy, raising=False)
    seen = [fingerprint()]
    for name in 'train.bin', 'train.mask':
        for _ in range(2): # one change just after the other, with the same size
            with open(tmp_path / name, 'r+b') as file:
                file.seek(15000)
                byte = file.read(1)[0]
                file.seek(15000)
                file.write(bytes([byte ^ 1]))
            seen.append(fingerprint())
    assert seen == [seen[0], seen[1], seen[0], seen[3], seen[0]] and len(set(seen)) == 3
    now = time.time_ns
    monkeypatch.setattr(T.time, 'time_ns', lambda: now() + 10 ** 10)
    assert fingerprint() == seen[0] and sorted(opened) == ['train.bin', 'train.mask']
    assert fingerprint() == seen[0] and opened == []
    np.array([7], '<u2').tofile(tmp_path / 'val.bin')
    assert fingerprint() == seen[0] and opened == [] # another file of the folder
    (tmp_path / T.HASHES).write_text('[3]')
    assert fingerprint() == seen[0] and len(opened) == 2 # damaged
    (tmp_path / 'train.mask').unlink()
    assert fingerprint() not in seen
    assert sorted(content(tmp_path)) == [T.HASHES, 'meta.json', 'train.bin', 'val.bin']


def test_fingerprint_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    asked, now = [], time.time_ns

    def refuse(*paths):
        asked.append(paths)
        raise PermissionError(13, 'Permission denied')

    split = Split(raw(tmp_path), 'train')
    monkeypatch.setattr(os, 'replace', refuse)
    monkeypatch.setattr(T.time, 'time_ns', lambda: now() + 10 ** 10)
    assert split.fingerprint() == split.fingerprint() and sorted(content(tmp_path)) == ['train.bin']
    assert len(asked) == 2


def test_odd_masks_are_told(tmp_path):
    for name in 'train_0', 'train_1', 'val_0':
        raw(tmp_path, name)
    splits = [Split(tmp_path, split) for split in ('train', 'val')]
    assert T.odd_masks(splits) == []
    (tmp_path / 'train_0.mask').write_bytes(bytes(100))
    (tmp_path / 'val.mask').write_bytes(bytes(100))
    one, two = T.odd_masks([Split(tmp_path, split) for split in ('train', 'val')])
    assert one.startswith('train_1.bin, val_0.bin: no mask, so every token is a target, unlike in ')
    assert two == f'{tmp_path}/val.mask is not read: there is no val.bin'


def test_masks_must_leave_targets(tmp_path):
    """In what is read for an evaluation; a shard's first token is never a target."""
    for name in 'train', 'val_0', 'val_1':
        raw(tmp_path, name)
        (tmp_path / f'{name}.mask').write_bytes(bytes([1, *bytes(99)]))
    data = Dataset(str(tmp_path), {})
    for name, place in ('train', 99), ('val_1', 1): # one target will do
        with pytest.raises(DataError, match=rf'tokens of {name.split("_")[0]} that evaluations read, none is '):
            data.check_targets(lambda split: split.all_batches(2, 9))
        (tmp_path / f'{name}.mask').write_bytes(bytes([*bytes(place), 255, *bytes(99 - place)]))
    data.check_targets(lambda split: split.all_batches(2, 9))
    with pytest.raises(DataError, match='tokens of train that'):
        data.check_targets(lambda split: split.fixed_batches(1, 1, 9))


def test_missing_data(tmp_path, monkeypatch):
    monkeypatch.setattr(T, 'PROJECT', tmp_path)
    (tmp_path / 'data' / 'poems').mkdir(parents=True)
    (tmp_path / 'data' / 'poems' / 'prepare.py').touch()
    for name, words in [('poems', 'run: python data/poems/prepare.py'), ('peoms', 'poems')]:
        with pytest.raises(DataError) as error:
            Split(dataset_folder(name), 'train')
        assert words in message(error) and name in message(error)
    raw(tmp_path / 'data' / 'poems')
    with pytest.raises(DataError, match='no val.bin'):
        Split(dataset_folder('poems'), 'val')


def test_dataset_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine').mkdir()
    assert dataset_folder('mine') == ROOT / 'data' / 'mine'
    assert dataset_folder('./mine') == tmp_path / 'mine'
    assert dataset_folder(str(tmp_path / 'elsewhere')) == tmp_path / 'elsewhere'
    assert dataset_folder('data/calc') == ROOT / 'data/calc'


# ---- batches

def test_random_batches_are_a_pure_function(tmp_path):
    split = shards_of(tmp_path, [50, 30, 80])
    x, y = split.batch(1000, 64, 16, seed=3)
    assert (y[:, :-1] == x[:, 1:]).all() and (np.diff(x, axis=1) == 1).all() # windows stay within a shard
    again = np.concatenate([Split(tmp_path, 'train').batch(1000 + i, 8, 16, seed=3)[0] for i in range(0, 64, 8)])
    assert (again == x).all() # however the samples are cut in batches
    assert (split.batch(1001, 64, 16, seed=3)[0][:-1] == x[1:]).all()
    assert (split.batch(1000, 64, 16, seed=4)[0] != x).any()
    assert split.batch(10 ** 15, 1, 16, seed=-1)[0].shape == (1, 16)


def test_random_batches_reach_every_start(tmp_path):
    split = shards_of(tmp_path, [20, 4, 18])
    starts = split.batch(0, 20000, 8)[0][:, 0]
    valid = [*range(12), *range(2000, 2010)] # the shard of 4 has no window of 8
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 0.05
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == valid
    assert abs(counts - 20000 / 22).max() < 5 * (20000 / 22) ** 0.5


@pytest.mark.parametrize('lengths', [[101], [50, 9, 33, 77], [11], [6], [900, 999]])
def test_epoch_covers_every_window_once(tmp_path, lengths):
    split = shards_of(tmp_path, lengths)
    windows = sorted(1000 * s + t for s, n in enumerate(lengths) for t in range(0, n - 5, 5))
    n, orders = len(windows), []
    for epoch in range(3):
        x, y = split.batch(epoch * n, n, 5, 'epoch', seed=9)
        assert sorted(x[:, 0].tolist()) == windows
        assert (y == x + 1).all() and (np.diff(x, axis=1) == 1).all()
        orders.append(x[:, 0].tolist())
    if n > 10:
        assert orders[0] != orders[1] != orders[2] and orders[0] != windows
        assert split.batch(0, n, 5, 'epoch', seed=8)[0][:, 0].tolist() != orders[0]
    x = split.batch(0, 2 * n, 3, 'epoch', seed=9, stride=5)[0] # shorter windows, over the end of an epoch
    assert x.shape == (2 * n, 3) and x[:, 0].tolist() == orders[0] + orders[1]


def test_epoch_on_several_ranks(tmp_path):
    split = shards_of(tmp_path, [400, 300])
    n, ranks, batch = 399 // 4 + 299 // 4, 3, 2
    seen = [[split.batch((step * ranks + rank) * batch, batch, 4, 'epoch')[0][:, 0].tolist()
             for step in range(n // (ranks * batch))] for rank in range(ranks)]
    seen = [set(sum(of_rank, [])) for of_rank in seen]
    assert sum(map(len, seen)) == n // (ranks * batch) * ranks * batch == len(set.union(*seen))


def test_permutation_is_one():
    for n in [*range(1, 70), 1000, 4096, 4097]:
        key = np.full(n, n * 77, np.uint64)
        assert sorted(T.permute(np.arange(n, dtype=np.uint64), n, key).tolist()) == list(range(n))


def test_permutation_looks_random():
    # of a random permutation, the correlation with the order and between neighbours is about 1/sqrt(n)
    n = 10000
    p = T.permute(np.arange(n, dtype=np.uint64), n, np.zeros(n, np.uint64)).astype(float)
    assert abs(np.corrcoef(p, np.arange(n))[0, 1]) < 0.05
    assert abs(np.corrcoef(p[1:], p[:-1])[0, 1]) < 0.05


def test_fixed_batches(tmp_path):
    split = shards_of(tmp_path, [200, 300])
    batches = [list(split.fixed_batches(20, 5, 10)) for _ in range(2)]
    assert len(batches[0]) == 4
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(*batches))
    starts = [start for x, _ in batches[0] for start in x[:, 0].tolist()]
    assert len(set(starts)) == 20 and min(starts) < 20 and max(starts) > 1250 # from one end to the other
    assert all((x + 1 == y).all() for x, y in batches[0])
    small = list(split.fixed_batches(500, 5, 100)) # there are but 1 + 2 windows of 100
    assert [x[:, 0].tolist() for x, _ in small] == [[0, 1000, 1100]]


@pytest.mark.parametrize('lengths', [[100], [2], [9], [10], [1, 8, 33]])
def test_all_batches_cover_each_target_once(tmp_path, lengths):
    split = shards_of(tmp_path, lengths)
    targets = []
    for x, y in split.all_batches(3, 8):
        assert x.shape == y.shape == (len(x), 8) and 1 <= len(x) <= 3
        real = y >= 0
        assert (y[real] == x[real] + 1).all() and (x[~real] == 0).all() and (y[~real] == -1).all()
        targets += y[real].tolist()
    assert targets == [1000 * s + t for s, n in enumerate(lengths) for t in range(1, n)]


def test_dataset_shorter_than_a_window(tmp_path):
    split = shards_of(tmp_path, [16, 10])
    assert split.batch(0, 1, 15)[0].shape == (1, 15)
    for sampling in ('random', 'epoch'):
        with pytest.raises(DataError) as error:
            split.batch(0, 1, 16, sampling)
        assert '16 tokens' in message(error) and '17' in message(error) and 'block_size below 16' in message(error)
    with pytest.raises(DataError):
        next(split.fixed_batches(1, 1, 16))
    with pytest.raises(DataError, match='shuffle'):
        split.batch(0, 1, 4, 'shuffle')
    with pytest.raises(DataError, match='beyond the stride'):
        split.batch(0, 1, 4, 'epoch', stride=3)


def test_ids_beyond_the_vocabulary(tmp_path, monkeypatch):
    np.zeros(100, '<u2').tofile(tmp_path / 'train_0.bin')
    sharded(tmp_path / 'train_1.bin', [0] * 42 + [65] + [0] * 57)
    split = Split(tmp_path, 'train')
    split.vocab_size = 65
    words = r'train_1\.bin: token 42 is 65, but vocab_size is 65'
    with pytest.raises(DataError, match=words):
        split.batch(0, 100, 30)
    with pytest.raises(DataError, match=words):
        list(split.all_batches(4, 8))
    with pytest.raises(DataError, match=words):
        Split(tmp_path, 'train').scan(65)
    read = []
    assert Split(tmp_path, 'train').scan(66, read.append) == 200 == sum(read)
    (tmp_path / 'meta.json').write_text('{"vocab_size": 65}', encoding='utf-8') # known without being told
    with pytest.raises(DataError, match=words):
        Split(tmp_path, 'train').batch(0, 100, 30)


@pytest.mark.parametrize('name', ['train.bin', 'train.mask'])
@pytest.mark.parametrize('size', [20, 0])
def test_file_that_shrinks_while_in_use(tmp_path, name, size):
    (raw(tmp_path) / 'train.mask').write_bytes(bytes(100))
    split = Split(tmp_path, 'train')
    os.truncate(tmp_path / name, size)
    with pytest.raises(DataError, match=rf'{name} has become shorter while in use'):
        split.batch(0, 1, 50)


@pytest.mark.skipif(sys.platform != 'linux', reason='needs sparse files and /proc')
def test_large_dataset(tmp_path):
    """10**11 tokens in 100 shards: opening reads headers only, and memory stays flat while batches are drawn."""
    for i in range(100):
        with open(tmp_path / f'train_{i:03d}.bin', 'wb') as file:
            file.truncate(2 * 10 ** 9)

    def resident():
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    reads = []
    original = T.np.fromfile
    T.np.fromfile = lambda path, dtype, count, **more: reads.append(count) or original(path, dtype, count, **more)
    try:
        split = Split(tmp_path, 'train')
    finally:
        T.np.fromfile = original
    assert split.n_tokens == 10 ** 11 and sum(reads) <= 300
    for sampling in ('random', 'epoch'):
        split.batch(0, 16, 1024, sampling)
        before = resident()
        for i in range(int(os.environ.get('BATCHES', 1000))):
            split.batch(10 ** 9 + 16 * i, 16, 1024, sampling)
        assert resident() - before < 8e6


# ---- prefetch

def test_prefetch_order_and_depth():
    made = []
    batches = prefetch(lambda i: made.append(i) or i, 5, depth=2)
    assert [next(batches) for _ in range(20)] == list(range(5, 25))
    batches.close()
    assert len(made) <= 20 + 3 and made == list(range(5, 5 + len(made)))


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == 'prefetch']


def test_prefetch_passes_exceptions_on():
    def make(i):
        if i == 3:
            raise DataError('three')
        return i

    batches = prefetch(make, 0)
    got = []
    with pytest.raises(DataError, match='three'):
        for batch in batches:
            got.append(batch)
    assert got == [0, 1, 2] and not prefetch_threads()


def test_prefetch_shuts_down():
    full, made = threading.Event(), []

    def make(i):
        made.append(i)
        if i == 3:
            full.set()
        return i

    batches = prefetch(make, 0, depth=3)
    next(batches)
    assert full.wait(10)
    time.sleep(0.05) # the thread now waits for room
    batches.close()
    assert not prefetch_threads() and made == [0, 1, 2, 3]
    prefetch(make, 0).close() # never begun
    assert not prefetch_threads()


def test_prefetch_ends_before_python_does():
    """The first exit handler is the last to be called. The thread has ended by then, or Python 3.13 would hang."""
    code = """
        import atexit, sys, threading
        atexit.register(lambda: print([t.name for t in threading.enumerate()]))
        from data.tokens import prefetch
        batches = prefetch(lambda i: i, 0)
        next(batches)
        sys.exit(3)"""
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "['MainThread']\n", '')


# ---- writing

def write(folder, ids_by_split, tokenizer=ByteTokenizer(), **more):
    with Writer(folder, tokenizer, **more) as out:
        for split, ids in ids_by_split.items():
            out.write(split, ids)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_writer_and_meta(tmp_path):
    tokenizer = CharTokenizer('abc')
    with Writer(tmp_path / 'new' / 'folder', tokenizer) as out:
        out.write('train', tokenizer.encode('abcabc'))
        out.write('val', np.array([0, 1], np.int64))
        out.write('train', [])
        out.write('train', [2])
    folder = tmp_path / 'new' / 'folder'
    assert load_meta(folder) == {'dtype': 'uint16', 'vocab_size': 3, 'tokenizer': 'char', 'characters': 'abc',
                                 'tokens': {'train': 7, 'val': 2}}
    assert np.fromfile(folder / 'train.bin', '<u2').tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert sorted(content(folder)) == ['meta.json', 'train.bin', 'val.bin']
    assert out.n_bytes == 9


def test_writer_dtype(tmp_path):
    class Large(ByteTokenizer):
        vocab_size = 65537

        def meta(self):
            return {'vocab_size': 65537}

    write(tmp_path, {'train': [65536, 1], 'val': [2]}, Large())
    assert load_meta(tmp_path)['dtype'] == 'uint32'
    assert Split(tmp_path, 'train').batch(0, 1, 1)[0].tolist() == [[65536]]


@pytest.mark.parametrize('n', [1, 9, 10, 11, 35])
def test_writer_shards(tmp_path, n):
    ids = np.arange(n)
    with Writer(tmp_path, ByteTokenizer(), shard_tokens=10) as out:
        for part in np.array_split(ids, 3):
            out.write('train', part)
        out.write('val', ids)
    names = [f'train_{i:06d}.bin' for i in range(-(-n // 10))]
    assert sorted(p.name for p in tmp_path.glob('train*')) == names
    assert np.concatenate([np.fromfile(tmp_path / name, '<u2') for name in names]).tolist() == ids.tolist()
    write(tmp_path, {'train': [1], 'val': [1]}, shard_tokens=10) # fewer shards: the old ones go
    assert sorted(content(tmp_path)) == ['meta.json', 'train_000000.bin', 'val_000000.bin']
    write(tmp_path, {'train': [1], 'val': [1]})
    assert sorted(content(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('exception', [KeyboardInterrupt, OSError, DataError])
@pytest.mark.parametrize('shard_tokens', [None, 10])
def test_interrupted_writer_leaves_nothing(tmp_path, exception, shard_tokens):
    for before in ({}, {'train': [1, 2], 'val': [3]}): # a new folder, and one that holds a dataset
        if before:
            write(tmp_path, before, shard_tokens=shard_tokens)
        files = content(tmp_path)
        with pytest.raises(exception):
            with Writer(tmp_path, ByteTokenizer(), shard_tokens) as out:
                out.write('train', range(25))
                out.write('val', range(5))
                raise exception
        assert content(tmp_path) == files


@pytest.mark.parametrize('given, words', [({'train': [1, 2]}, 'val split is empty'), ({'val': [1]}, 'train split'),
                                          ({'train': [257], 'val': [1]}, 'id 257'), ({'train': [7, -1]}, 'id -1 is')])
def test_writer_refuses(tmp_path, given, words):
    with pytest.raises(DataError, match=words):
        write(tmp_path, given)
    assert content(tmp_path) == {}


def test_writer_refuses_a_run_a_file_and_the_folder_of_all_datasets(tmp_path):
    (tmp_path / 'ckpt.pt').touch()
    (tmp_path / 'file').touch()
    for folder, words in ((tmp_path, r'holds a run \(ckpt.pt\)'), (tmp_path / 'file', 'is a file'),
                          (Path(T.__file__).parent, 'holds the datasets')):
        with pytest.raises(DataError, match=f'{words}: give the dataset a folder of its own'):
            write(folder, {'train': [1, 2], 'val': [1]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ['ckpt.pt', 'file']


def test_writer_killed_while_replacing(tmp_path, monkeypatch):
    """What os.replace has done so far is never trusted, at whichever call the process dies."""
    replace = os.replace
    for last in range(1, 6):
        folder = tmp_path / str(last)
        write(folder, {'train': [1] * 10, 'val': [1] * 10})
        calls = []

        def dies(source, target):
            calls.append(target)
            if len(calls) == last:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, 'replace', dies)
        if last <= 4: # the mark, two splits, meta.json
            with pytest.raises(KeyboardInterrupt):
                write(folder, {'train': [2] * 10, 'val': [2] * 10})
        else:
            write(folder, {'train': [2] * 10, 'val': [2] * 10})
        monkeypatch.undo()
        if last == 1:
            assert Split(folder, 'train').batch(0, 1, 1)[0].item() == 1
        elif last <= 4:
            with pytest.raises(DataError, match='interrupted'):
                Split(folder, 'train')
        write(folder, {'train': [2] * 10, 'val': [2] * 10})
        assert Split(folder, 'val').batch(0, 1, 1)[0].item() == 2


def job(folder, steps, stop=None, shard_tokens=10, **settings):
    """Writes 7 tokens a step and saves every other one; stops before step `stop`. Returns the step it began with."""
    with Writer(folder, ByteTokenizer(), shard_tokens, job={'name': 'x', **settings}) as out:
        begin = out.state or 0
        for step in range(begin, steps):
            if step == stop:
                raise KeyboardInterrupt
            out.write('train', range(7 * step, 7 * step + 7))
            out.write('val', [step])
            if step % 2:
                out.save(step + 1)
        return begin


@pytest.mark.parametrize('shard_tokens', [10, 7, None])
def test_writer_resumes(tmp_path, shard_tokens):
    job(tmp_path / 'whole', 12, shard_tokens=shard_tokens)
    folder = tmp_path / 'parts'
    for stop, begins in [(1, 0), (5, 0), (6, 4), (9, 6), (None, 8)]:
        if stop:
            with pytest.raises(KeyboardInterrupt):
                job(folder, 12, stop, shard_tokens=shard_tokens)
            with pytest.raises(DataError, match='there is no train.bin'):
                Split(folder, 'train')
        else:
            assert job(folder, 12, shard_tokens=shard_tokens) == begins
    assert content(folder) == content(tmp_path / 'whole') and not list(folder.glob('*.tmp'))
    assert Split(folder, 'train').n_tokens == 84


def test_writer_resumes_before_a_split_has_tokens(tmp_path):
    for val in [], [2], [3]: # two interruptions, before and after the first token of val
        with suppress(KeyboardInterrupt), Writer(tmp_path, ByteTokenizer(), job={}) as out:
            if not out.state:
                out.write('train', [1])
                out.save(1)
            out.write('val', val)
            if val != [3]:
                raise KeyboardInterrupt
    assert out.state == 1 and [text_of(tmp_path, split) for split in ('train', 'val')] == ['\x01', '\x03']


def test_writer_resumes_after_dying_while_replacing(tmp_path, monkeypatch):
    job(tmp_path / 'whole', 12)
    replace, renamed = os.replace, []

    def dies(source, target):
        if str(target).endswith('.bin'):
            renamed.append(target)
            if len(renamed) == 4:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, 'replace', dies)
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path / 'parts', 12)
    monkeypatch.undo()
    assert job(tmp_path / 'parts', 12) == 12
    assert content(tmp_path / 'parts') == content(tmp_path / 'whole')


def test_writer_does_not_mix_jobs(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, 12, 5, seed=1)
    with pytest.raises(DataError) as error:
        job(tmp_path, 12, seed=2)
    assert 'seed=1' in message(error) and '*.tmp' in message(error)
    with pytest.raises(DataError, match='another shard size'):
        job(tmp_path, 12, seed=1, shard_tokens=11)
    assert job(tmp_path, 12, seed=1) == 4


def test_two_writers_at_once(tmp_path):
    """The second one is refused before it deletes anything, also of another process; then the folder is free again."""
    prepare_it = ('import sys; sys.path.insert(0, sys.argv[1]); from data.writer import Writer, DataError\n'
                  'from data.tokenizers import ByteTokenizer\n'
                  'try:\n with Writer(sys.argv[2], ByteTokenizer()) as o: o.write("train", [1]), o.write("val", [1])\n'
                  'except DataError as e: print(e)')

    def other():
        return subprocess.run([sys.executable, '-c', prepare_it, ROOT, tmp_path], capture_output=True, check=True,
                              encoding='utf-8').stdout

    for job in None, {'name': 'x'}:
        with Writer(tmp_path, ByteTokenizer(), job=job) as out:
            out.write('train', range(9))
            assert f'another preparation is at work in {tmp_path}' in other()
            with pytest.raises(DataError, match='at work in .*--out'):
                lock_folder(tmp_path, f'at work in {tmp_path}: --out')
            out.write('val', [3])
        assert Split(tmp_path, 'train').n_tokens == 9 and other() == '' and Split(tmp_path, 'train').n_tokens == 1
    assert lock_folder(tmp_path / 'none', '') is None


# ---- prepare scripts

def prepare(name, *arguments, error=None):
    """Runs data/<name>/prepare.py (or another script there) and returns what it prints; error: what it fails with."""
    script = ROOT / 'data' / (name if name.endswith('.py') else f'{name}/prepare.py')
    result = helpers.run(script, arguments)
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    if error is None:
        assert result.returncode == 0, result.stderr
        return result.stdout
    assert result.returncode == 2, result.stdout + result.stderr
    assert re.fullmatch(rf'error: .*{error}.*\n', result.stderr), result.stderr


def text_of(folder, split, special=True):
    data = Split(folder, split)
    ids = np.concatenate([np.fromfile(s.path, s.dtype) for s in data.shards])
    return load_tokenizer(data.meta).decode(ids, special=special)


def test_prepare_python_stdlib(tmp_path):
    printed = prepare('python_stdlib', f'--out={tmp_path}', '--max_bytes=1_000_000')
    train, val = text_of(tmp_path, 'train'), text_of(tmp_path, 'val')
    assert 1_000_000 <= len((train + val).replace(EOT, '').encode()) < 2_000_000
    assert Path(abc.__file__).read_text(encoding='utf-8') in (train + val).split(EOT)
    assert train.endswith(EOT) and val.endswith(EOT) and train.count(EOT) > val.count(EOT)
    assert 'config/quick.py' in printed and 'vocab_size 257' in printed


def problems_of(folder, split):
    return re.findall(r'^(\d+)([-+*/])(\d+)=(-?\d+)$', text_of(folder, split), re.MULTILINE)


PLAIN_CALC = ('--operators=+-*/', '--reverse=', '--pad=False', '--scratch=False', '--val_fraction=0.1') # 12+34=46


def test_prepare_calc(tmp_path):
    prepare('calc', f'--out={tmp_path}', '--examples=500', '--digits=2', *PLAIN_CALC)
    train, val = problems_of(tmp_path, 'train'), problems_of(tmp_path, 'val')
    assert len(set(train + val)) == len(train + val) == 2000 and 100 < len(val) < 300
    for a, operator, b, answer in train + val:
        assert eval(f'{a}{operator}{b}') == int(answer) and int(a) < (100 if operator != '/' else 10000)
    assert {p[1] for p in val} == set('+-*/')
    assert not {(b, o, a) for a, o, b, _ in train if o in '+*'} & {(a, o, b) for a, o, b, _ in val}
    before = content(tmp_path)
    prepare('calc', f'--out={tmp_path}', '--examples=500', '--digits=2', *PLAIN_CALC)
    assert content(tmp_path) == before
    prepare('calc', f'--out={tmp_path}', '--operators=+x', error="operators is '\\+x'")
    prepare('calc', f'--out={tmp_path}', '--reverse=True', error="reverse is 'True'")
    assert content(tmp_path) == before
    prepare('calc', f'--out={tmp_path}', *PLAIN_CALC, '--examples=500', '--operators=+*+') # + is named twice
    problems = problems_of(tmp_path, 'train') + problems_of(tmp_path, 'val')
    assert len(set(problems)) == len(problems) == 1500 and sum(p[1] == '+' for p in problems) == 1000


def test_prepare_calc_small_space_and_reversed(tmp_path):
    printed = prepare('calc', f'--out={tmp_path}', *PLAIN_CALC, '--digits=1', '--operators=+-/', '--reverse=+-/',
                      '--examples=95')
    assert printed.count('using all') == 1 and 'only 90 problems a/b' in printed
    problems = problems_of(tmp_path, 'train') + problems_of(tmp_path, 'val')
    assert len(problems) == 95 + 95 + 90
    assert ('9', '+', '9', '81') in problems or ('8', '+', '9', '71') in problems
    assert any(answer.startswith('-') for *_, answer in problems)
    for a, operator, b, answer in problems:
        digits = answer.removeprefix('-')[::-1]
        assert int(digits) == abs(eval(f'{a}{operator}{b}'))


@pytest.mark.parametrize('pad', [False, True])
@pytest.mark.parametrize('reverse', ['', '+*'])
def test_prepare_calc_with_its_steps(tmp_path, reverse, pad):
    """Each number of each step is right, and the last is the answer. Padded, an operator's lines have one length."""
    prepare('calc', f'--out={tmp_path}', *PLAIN_CALC, '--digits=3', '--examples=300', '--scratch=True',
            f'--reverse={reverse}', f'--pad={pad}')
    read = lambda text: int(text[::-1] if operator in reverse else text)
    written, lengths = 0, set()
    for line in (text_of(tmp_path, 'train') + text_of(tmp_path, 'val')).splitlines():
        a, operator, b, rest = re.fullmatch(r'(\d+)([-+*/])(\d+)=(.*)', line).groups()
        a, b, (*steps, answer) = int(a), int(b), rest.split('=')
        lengths.add((operator, len(line) - ('-' in answer)))
        if operator in '+-' or not steps:
            assert abs(eval(f'{a}{operator}{b}')) == read(answer.removeprefix('-')) and not steps
            assert operator in '+-' or not pad and (b < 10 or operator == '/' and a // b < 10)
            continue
        written += 1
        if operator == '*':
            total = read(steps[0].split('+')[0])
            assert total == a * (b % 10) and len(steps) == (2 if pad else len(str(b)) - 1)
            for i, (step, after) in enumerate(zip(steps, [*steps[1:], answer]), 1):
                before, product = map(read, step.split('+'))
                assert before == total and product == a * (b // 10 ** i % 10) * 10 ** i
                total += product
                assert read(after.split('+')[0]) == total
            assert total == a * b
        else:
            digits = ''
            for step in steps[0].split('+'):
                digit, product, left = re.fullmatch(r'(\d)\*(\d+)-(\d+)', step).groups()
                digits += digit
                zeros = len(steps[0].split('+')) - len(digits)
                assert read(product) == int(digit) * b * 10 ** zeros and read(left) == a - read(product)
                a = read(left)
            assert a == 0 and len(steps) == 1 and int(digits) == read(answer)
    assert written > 400 and (len(lengths) == 4) == pad


def test_calc_accuracy(tmp_path):
    from data.calc.evaluate import accuracy, read_problems, table
    prepare('calc', f'--out={tmp_path}', '--examples=300', '--digits=2', *PLAIN_CALC)
    problems = read_problems(tmp_path)
    assert problems == [(f'{a}{operator}{b}=', answer) for a, operator, b, answer in problems_of(tmp_path, 'val')]
    answers, done = dict(problems), []

    def generate(prompts, n):
        assert len({len(p) for p in prompts}) == 1 and len(prompts) <= 8
        assert all(len(answers[p]) < n for p in prompts)
        # sums right; differences without an end; products right with more behind them; quotients one too long
        return [{'+': '{}\n', '-': '{}', '*': '{}\n1+', '/': '{}0\n'}[re.search(r'[-+*/]', p)[0]].format(answers[p])
                for p in prompts]

    counts = accuracy(generate, problems, batch_size=8, progress=done.append)
    assert sum(done) == len(problems) == sum(total for _, total in counts.values())
    steps = [('12*34=', '48+360=408')] # what comes before the answer does not count, whatever it is
    for text, right in ('48+360=408\n', 1), ('1=2=408\n', 1), ('408=48\n', 0), ('4081\n', 0):
        assert accuracy(lambda prompts, n: [text], steps) == {('*', 2): (right, 1)}
    for (operator, digits), (solved, total) in counts.items():
        assert solved == (total if operator in '+*' else 0)
    n_products = sum('*' in p for p, _ in problems)
    assert re.search(rf'^\* .* 100\.0% of {n_products}$', table(counts), re.MULTILINE)
    assert counts['+', 2][1] == sum(max(map(len, re.findall(r'\d+', p))) == 2 for p, _ in problems if '+' in p)
    assert {digits for _, digits in counts} == {1, 2} # of the divisor and the result in a division, too
    padded = [('012+005=', '017'), ('000-000=', '000'), ('000408/034=', '012')]
    assert set(accuracy(lambda prompts, n: ['017\n'], padded, batch_size=1)) == {('+', 2), ('-', 1), ('/', 2)}


def test_calc_evaluate_a_checkpoint(tmp_path):
    import torch
    from data.calc.evaluate import load_generator
    from data.checkpoints import save_checkpoint, stored_config
    from model import GPT, GPTConfig
    prepare('calc', f'--out={tmp_path}/calc', '--examples=20', *PLAIN_CALC)
    meta = load_meta(tmp_path / 'calc')
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=meta['vocab_size'], n_layer=1, n_head=1, n_embd=8)
    model = GPT(config)
    (tmp_path / 'run').mkdir()
    weights = {'model': model.state_dict(), 'model_args': stored_config(config)}
    save_checkpoint(tmp_path / 'run' / 'ckpt.pt', {**weights, 'meta': meta})
    printed = prepare('calc/evaluate.py', f'--out_dir={tmp_path}/run', f'--dataset={tmp_path}/calc', '--device=cpu')
    assert f'of {len(problems_of(tmp_path / "calc", "val"))}' in printed.splitlines()[-1]
    tokenizer, ids = load_tokenizer(meta), load_tokenizer(meta).encode('\n9*12=')
    for _ in range(4):
        ids.append(model.eval()(torch.tensor([ids]))[0][0, -1].argmax().item())
    generate = load_generator(tmp_path / 'run' / 'ckpt.pt', 'cpu')
    assert generate(['9*12=', '0*12='], 4)[0] == tokenizer.decode(ids[-4:])
    save_checkpoint(tmp_path / 'other.pt', weights)
    with pytest.raises(DataError, match='other.pt names no tokenizer'):
        load_generator(tmp_path / 'other.pt', 'cpu')


def test_prepare_text_by_position(tmp_path):
    text = ''.join(f'line {i} of a long text — with “quotes”\r\n' for i in range(600))
    (tmp_path / 'book.txt').write_text(text, encoding='utf-8', newline='')
    for tokenizer in ('bytes', 'char'):
        out = tmp_path / tokenizer
        printed = prepare('text', f'--input={tmp_path}/book.txt', f'--tokenizer={tokenizer}', f'--out={out}')
        assert text_of(out, 'train') + text_of(out, 'val') == text
        assert len(text_of(out, 'val')) == len(text) - int(len(text) * 0.9)
        assert 'held out: the end\n' in printed and f'read 1 file: {tmp_path}/book.txt' in printed
        command = f'python train.py config/text.py --dataset={out} --max_iters=200 --out_dir=out-{tokenizer}'
        assert f'next: {command}\n' in printed
    meta = load_meta(tmp_path / 'char')
    assert meta['characters'] == ''.join(sorted(set(text))) and 'eot' not in meta


def test_prepare_text_holds_out_the_end_of_each_file(tmp_path):
    (tmp_path / 'in').mkdir()
    texts = {name: ''.join(f'{name} {i} é\n' for i in range(n)) for name, n in dict(a=400, b=30, c=200).items()}
    for name, text in texts.items():
        (tmp_path / f'in/{name}.txt').write_text(text, encoding='utf-8', newline='')
    (tmp_path / 'in/photo.jpg').write_bytes(b'no text')
    printed = prepare('text', f'--input={tmp_path}/in', f'--out={tmp_path}/out')
    train, val = (text_of(tmp_path / 'out', split).split(EOT)[:-1] for split in ('train', 'val'))
    assert [a + b for a, b in zip(train, val, strict=True)] == list(texts.values())
    assert [len(b) for b in val] == [len(text) - int(len(text) * 0.9) for text in texts.values()]
    assert 'held out: the end of each file' in printed and 'read 3 files: ' in printed
    assert f'skipped, for their suffixes: {tmp_path}/in/photo.jpg' in printed


def test_prepare_text_by_documents(tmp_path):
    (tmp_path / 'in').mkdir()
    documents = [f'{{"number": {i}}}, "text" \n\n of document é{i}' for i in range(300)]
    with open(tmp_path / 'in' / 'a.jsonl', 'w', encoding='utf-8') as file:
        for document in documents[:200]:
            file.write(json.dumps({'body': document, 'text': 3}) + '\n')
        file.write('\n')
        file.write(json.dumps({'body': f'{documents[200]}{EOT}{EOT}{documents[201]}{EOT}'}) + '\n')
    (tmp_path / 'in' / 'b.txt').write_text(EOT.join(documents[202:299]), encoding='utf-8')
    (tmp_path / 'in' / 'c.txt').write_text('\ufeff' + documents[299], encoding='utf-8')
    (tmp_path / 'in' / 'd.bin').write_bytes(b'\xff')
    printed = prepare('text', f'--input={tmp_path}/in', '--field=body', '--tokenizer=char', f'--out={tmp_path}/out')
    train, val = text_of(tmp_path / 'out', 'train'), text_of(tmp_path / 'out', 'val')
    assert train.endswith(EOT) and val.endswith(EOT)
    train, val = train.split(EOT)[:-1], val.split(EOT)[:-1]
    assert sorted(train + val) == sorted(documents) and 15 < len(val) < 50
    assert [d for d in documents if d in set(train)] == train # order is kept
    assert '300 documents' in printed and 'whole documents' in printed
    assert load_meta(tmp_path / 'out')['eot'] is True


def test_prepare_text_few_documents(tmp_path):
    (tmp_path / 'a.txt').write_text('abc' * 30, encoding='utf-8')
    (tmp_path / 'b.txt').write_text('def' * 30, encoding='utf-8')
    prepare('text', f'--input={tmp_path}/b.txt,{tmp_path}/a.txt', '--tokenizer=char', f'--out={tmp_path}/out')
    assert text_of(tmp_path / 'out', 'train') == 'def' * 27 + EOT + 'abc' * 27 + EOT
    assert text_of(tmp_path / 'out', 'val') == 'def' * 3 + EOT + 'abc' * 3 + EOT


def test_prepare_text_mistakes(tmp_path):
    (tmp_path / 'bad.txt').write_bytes(b'a' + 'é'.encode() * 3_000_000 + b'\xff') # pieces end within an é
    (tmp_path / 'bad.jsonl').write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    (tmp_path / 'torn.jsonl').write_bytes(b'{"text": "a"}\n{"text": "b\n')
    (tmp_path / 'other.jsonl').write_bytes(b'{"body": "a"}\n')
    (tmp_path / 'empty.txt').write_bytes(b'')
    (tmp_path / 'one.txt').write_bytes(b'x')
    (tmp_path / 'folder').mkdir()
    out = tmp_path / 'out'
    for name, words in [('bad.txt', r'bad\.txt is not UTF-8 at byte 6000001'), ('bad.jsonl', 'byte 24'),
                        ('torn.jsonl', 'line 2'), ('other.jsonl', "line 1 .*'text'.*--field"), ('empty.txt', 'no text'),
                        ('one.txt', 'train split is empty'), ('folder', '--suffixes'), ('absent', 'absent'),
                        ('', '--input=PATH')]:
        prepare('text', f'--input={tmp_path / name if name else ""}', f'--out={out}', error=words)
        assert content(out) == {}
    prepare('text', f'--input={tmp_path}/one.txt', f'--out={out}', '--tokenizer=gpt7', error='gpt7.*bytes')
    prepare('text', f'--input={tmp_path}/one.txt', f'--out={out}', '--val_fraction=1',
            error=r'val_fraction=1\.0 must lie in \(0, 1\)')


def windows_in(folder, n=32):
    """How many windows of n held-out tokens stand in the training split, too, of how many."""
    train, val = (np.fromfile(folder / f'{split}.bin', '<u2').tobytes() for split in ('train', 'val'))
    windows = [val[i:i + 2 * n] for i in range(0, len(val) - 2 * n, 2 * n)]
    return sum(window in train for window in windows), len(windows)


def test_each_text_once(tmp_path):
    """However it is named, linked or copied; what was held out of it would train otherwise."""
    rng, words = np.random.default_rng(0), 'the fox ran over hills and cat dog said river'.split()
    folder = tmp_path / 'in'
    (folder / 'sub').mkdir(parents=True)
    for name in 'a.txt', 'sub/b.txt':
        (folder / name).write_text(' '.join(rng.choice(words, 900)) + '\n')
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'c.txt').write_text(' '.join(rng.choice(words, 900)) + '\n')
    (folder / 'linked').symlink_to(outside)
    (outside / 'back').symlink_to(folder) # a circle
    (folder / 'sub/link.txt').symlink_to(folder / 'a.txt')
    (folder / 'sub/copy.txt').write_bytes((folder / 'a.txt').read_bytes())
    (folder / 'sub/dead.txt').symlink_to(folder / 'gone')
    for name in '.ipynb_checkpoints/b.txt', '.cache/x/b.txt':
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text('hidden ' * 99)
    (folder / '.b.txt').write_text('hidden ' * 99)
    for names in (f'{folder}', f'{folder},{folder}/a.txt', f'{folder}/a.txt,{folder},{folder}/sub/../sub',
                  f'{folder}/'):
        printed = prepare('text', f'--input={names}', f'--out={tmp_path}/out')
        assert 'read 3 files: ' in printed and windows_in(tmp_path / 'out')[0] <= 1 # a few may be there by chance
        assert windows_in(tmp_path / 'out')[1] > 20 and 'hidden' not in text_of(tmp_path / 'out', 'train')
        for line in (f'skipped, hidden: {folder}/.b.txt, {folder}/.cache, {folder}/.ipynb_checkpoints\n',
                     f'skipped, no files: {folder}/sub/dead.txt'):
            assert line in printed
        assert re.search(r'skipped, the same text as another: .*copy.txt', printed)
    assert not (folder / T.HASHES).exists()
    prepare('text', f'--input={folder}/.cache', f'--out={tmp_path}/hidden') # named, it is read
    assert 'hidden' in text_of(tmp_path / 'hidden', 'train')


def test_names_with_commas(tmp_path):
    for name, text in {'a': 'no', 'a,b.txt': 'yes', 'c.txt': 'too'}.items():
        (tmp_path / name).write_text(f'{text} ' * 50)
    printed = prepare('text', f'--input={tmp_path}/a,b.txt,{tmp_path}/c.txt', f'--out={tmp_path}/out')
    assert f'read 2 files: {tmp_path}/a,b.txt, {tmp_path}/c.txt' in printed
    assert set(text_of(tmp_path / 'out', 'train', special=False).split()) <= {'yes', 'too', 'ye', 'y'}


def test_prepare_json(tmp_path):
    """An array is its items and not one text, whatever its suffix; null is no document; marks come before JSON, too."""
    values = [dict(text=f'document {i}') for i in range(300)] + [dict(text=None)] * 2
    array, lines = json.dumps(values, indent=1), ''.join(json.dumps(value) + '\n' for value in values)
    texts = [f'document {i}' for i in range(300)]
    for name, written in (('a.json', array), ('a.jsonl', array), ('b.json', lines), ('c.ndjson', lines),
                          ('d.jsonl', lines)):
        for mark in '', '\ufeff':
            (tmp_path / name).write_text(mark + written, encoding='utf-8')
            printed = prepare('text', f'--input={tmp_path}/{name}', f'--out={tmp_path}/out')
            found = [text_of(tmp_path / 'out', split).split(EOT)[:-1] for split in ('train', 'val')]
            assert sorted(sum(found, [])) == sorted(texts) and '300 documents' in printed
            place = 'item' if written is array else 'line'
            places = f'{tmp_path}/{name}, {place} 301, {tmp_path}/{name}, {place} 302'
            assert f'skipped, text is null: {places}\n' in printed
    for written, words in (('[{"text": "a"}, 3]', "item 2 has no text in a field 'text'"),
                           ('[{"text": "a"}', 'not JSON'), ('{\n"text": "a"}', 'line 1 is not'),
                           ('{"text": 3}', "line 1 has no text in a field 'text'")):
        (tmp_path / 'bad.json').write_text(written)
        prepare('text', f'--input={tmp_path}/bad.json', f'--out={tmp_path}/out', error=words)


def test_marks_and_line_ends_everywhere(tmp_path):
    text = 'First Citizen:\r\nBefore we proceed\rhear me — speak.\n' * 30
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    for script, flag in ('text', 'input'), ('shakespeare_char', 'input_file'):
        prepare(script, f'--{flag}={tmp_path}/a.txt', f'--out={tmp_path}/out')
        assert text_of(tmp_path / 'out', 'train') + text_of(tmp_path / 'out', 'val') == text
    (tmp_path / 'a.txt').write_bytes(text.encode('utf-16-le'))
    for script, flag in ('text', 'input'), ('shakespeare_char', 'input_file'):
        prepare(script, f'--{flag}={tmp_path}/a.txt', f'--out={tmp_path}/out', error='looks like UTF-16')
    (tmp_path / 'out/meta.json').write_bytes(b'\xef\xbb\xbf' + (tmp_path / 'out/meta.json').read_bytes())
    assert load_meta(tmp_path / 'out')['tokenizer'] == 'char'


@pytest.mark.parametrize('text, tokenizer, more', [
    ('a text of one line and nothing else ' * 90, 'char', ' --sample_prompt=a'),
    ('0123 ' * 900, 'char', ' --sample_prompt=0'), ('+ ' * 1500, 'char', " --sample_prompt=' '"),
    ('\\' * 3000, 'char', " --sample_prompt='\\\\'"), ('short text\n' * 20, 'bytes', ' --block_size=21')],
    ids=range(5))
def test_the_command_works_as_printed(tmp_path, text, tokenizer, more):
    """With a space in the dataset's name, without a line end, shorter than config/text.py's window."""
    (tmp_path / 'a.txt').write_text(text)
    out = tmp_path / "it's mine"
    printed = prepare('text', f'--input={tmp_path}/a.txt', f'--tokenizer={tokenizer}', f'--out={out}')
    command = printed.split('next: python ')[1].strip()
    assert command.startswith(f'train.py config/text.py --dataset={shlex.quote(str(out))}{more} --max_iters=')
    script, *args = shlex.split(command)
    args += [f'--out_dir={tmp_path}/run', '--device=cpu', '--max_iters=1', '--eval_iters=1', '--sample_tokens=3',
             '--batch_size=2', '--n_layer=1', '--n_head=2', '--n_embd=16', '--proof=quick']
    helpers.well(helpers.run(script, args, cwd=ROOT, first=helpers.NO_PICTURES))


def test_commands_name_the_dataset(tmp_path):
    for name, more in ('recall', ['--examples=100']), ('calc', ['--examples=1000']), ('digits', []), \
            ('python_stdlib', ['--max_bytes=1_000_000']):
        if name == 'digits':
            pytest.importorskip('sklearn')
        printed = prepare(name, f'--out={tmp_path}/a b', *more)
        assert re.search(f"\nnext: python train.py config/\\w+.py --dataset='{tmp_path}/a b'", printed)


def test_long_names_are_a_line(tmp_path):
    long = 'x' * 300
    prepare('text', f'--input={long}', error='name too long')
    prepare('text', f'--input={__file__}', f'--out={tmp_path}/{long}', error='name too long')
    prepare('calc', '--examples=50', f'--out={tmp_path}/{long}', error='name too long')


def text_script(chunk):
    """The functions of data/text/prepare.py, reading `chunk` bytes at once."""
    source = (ROOT / 'data/text/prepare.py').read_text(encoding='utf-8').split('\nexplain_errors()\n')[0]
    namespace = {'__file__': str(ROOT / 'data/text/prepare.py'), '__name__': 'script'}
    exec(source.replace('configure(globals())', ''), namespace)
    namespace['CHUNK'] = chunk
    return namespace


@settings(deadline=None)
@example('a\n' + EOT + 'b', 1)
@given(st.lists(st.sampled_from(['a', ' ', '\n', 'é', '東京', '<|', EOT, 'word\nword'])).map(''.join),
       st.integers(1, 9))
def test_text_is_read_in_pieces(tmp_path_factory, text, chunk):
    path = tmp_path_factory.mktemp('text') / 'a.txt'
    path.write_bytes(text.encode())
    documents = ['']
    for _, piece, ends in text_script(chunk)['read']([path], None):
        documents[-1] += piece
        documents += [''] * ends
    assert documents == [document for document in text.split(EOT) if document] + ['']


@needs_gpt2
def test_text_pieces_give_the_same_tokens():
    tokenizer = TiktokenTokenizer('gpt2')
    cut = text_script(10000)['place_to_cut']
    source = Path(T.__file__).read_text(encoding='utf-8').replace('\n    ', '\n') # has lines of each kind
    rest, ids, n_pieces = source, [], 0
    while rest:
        at = cut(rest[:500]) or cut(rest[:2000]) or cut(rest[:8000]) or len(rest)
        ids += tokenizer.encode(rest[:at], allow_special=False)
        rest, n_pieces = rest[at:], n_pieces + 1
    assert ids == tokenizer.encode(source, allow_special=False) and n_pieces > 20


def test_prepare_shakespeare_char(tmp_path):
    text = 'First Citizen:\nBefore we proceed — hear me speak.\n' * 20
    (tmp_path / 'input.txt').write_text(text, encoding='utf-8')
    prepare('shakespeare_char', f'--input_file={tmp_path}/input.txt', f'--out={tmp_path}/out')
    ids = np.fromfile(tmp_path / 'out' / 'train.bin', '<u2')
    order = sorted(set(text))
    assert ids.tolist() == [order.index(c) for c in text[:int(0.9 * len(text))]]
    assert text_of(tmp_path / 'out', 'val') == text[int(0.9 * len(text)):]
    prepare('shakespeare_char', f'--input_file={tmp_path}/absent.txt', f'--out={tmp_path}/out', error='absent.txt')


def test_download_is_all_or_nothing(tmp_path, monkeypatch):
    from data.shakespeare_char import text as module
    monkeypatch.setattr(module, '__file__', str(tmp_path / 'text.py'))
    (tmp_path / 'served.txt').write_text('thou', encoding='utf-8')
    monkeypatch.setattr(module, 'URL', (tmp_path / 'served.txt').as_uri())
    with pytest.raises(DataError, match='4 bytes that are not the expected text'):
        module.tiny_shakespeare()
    assert sorted(content(tmp_path)) == ['served.txt']
    monkeypatch.setattr(module, 'SHA256', module.hashlib.sha256(b'thou').hexdigest())
    assert module.tiny_shakespeare() == 'thou'
    monkeypatch.setattr(module, 'URL', (tmp_path / 'gone.txt').as_uri())
    assert module.tiny_shakespeare() == 'thou' # not downloaded again
    (tmp_path / 'input.txt').unlink()
    with pytest.raises(DataError, match='cannot download.*--input_file'):
        module.tiny_shakespeare()


@needs_shakespeare
def test_prepare_tinyshakespeare(tmp_path):
    file = os.environ['TINYSHAKESPEARE']
    printed = prepare('shakespeare_char', f'--input_file={file}', f'--out={tmp_path}/char')
    assert 'train has 1,003,854 tokens, val has 111,540' in printed and 'vocab_size 65' in printed
    if 'TIKTOKEN_CACHE_DIR' in os.environ:
        printed = prepare('shakespeare', f'--input_file={file}', f'--out={tmp_path}/gpt2')
        assert 'train has 301,966 tokens, val has 36,059' in printed


@pytest.fixture
def jsonl(tmp_path):
    """1000 documents in four files."""
    pytest.importorskip('datasets')
    for f in range(4):
        with open(tmp_path / f'{f}.jsonl', 'w', encoding='utf-8') as file:
            for i in range(250):
                file.write(json.dumps({'id': i, 'text': f'Document {250 * f + i} has {EOT} in its text.'}) + '\n')
    return f'{tmp_path}/*.jsonl'


@needs_gpt2
@pytest.mark.parametrize('name', ['openwebtext', 'fineweb_edu'])
def test_prepare_from_the_hub(tmp_path, jsonl, name):
    out = tmp_path / 'out'
    printed = prepare(name, '--source=json', f'--data_files={jsonl}', '--subset=', '--val_fraction=0.01',
                      f'--out={out}')
    train, val = text_of(out, 'train'), text_of(out, 'val')
    assert train.count('Document') == 990 and val.count('Document') == 10 and '1,000 documents' in printed
    assert val.startswith(f'Document 0 has {EOT} in its text.{EOT}Document 100 has')
    assert Split(out, 'train').shards[0].path.endswith('train_000000.bin')
    eot = np.fromfile(out / 'train_000000.bin', '<u2') == 50256
    assert eot.sum() == 990 and eot[-1] # what looks like it in a document is text


@needs_gpt2
def test_hub_goes_on_after_an_interruption(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(hub, 'BATCH', 30)
    monkeypatch.setattr(hub, 'SAVE_EVERY', 3)
    monkeypatch.setattr(hub, 'SHARD_TOKENS', 3000)
    begun = []

    class Stream:
        """The dataset; reading stops with an error after `limit` documents."""

        def __init__(self, limit):
            self.dataset, self.limit = hub.open_stream('json', '', '', jsonl), limit
            self.state_dict, self.load_state_dict = self.dataset.state_dict, self.dataset.load_state_dict

        def __iter__(self):
            for i, document in enumerate(self.dataset):
                if i == 0:
                    begun.append(document['text'].split()[1])
                if i == self.limit:
                    raise ConnectionError('the line is dead')
                yield document

    def run(folder, limit=None, val_fraction=0.02):
        job = {'val_fraction': val_fraction}
        hub.write_shards(tmp_path / folder, Stream(limit), job, TiktokenTokenizer('gpt2'), 'text', 0, 0,
                         val_fraction, 1)

    run('whole')
    for limit in (50, 200, 400):
        with pytest.raises(DataError, match='the line is dead.*same command again'):
            run('parts', limit)
        with pytest.raises(DataError, match='no train.bin'):
            Split(tmp_path / 'parts', 'train')
    with pytest.raises(DataError, match='val_fraction=0.02'):
        run('parts', val_fraction=0.1)
    run('parts')
    assert begun == ['0', '0', '0', '180', '540', '540'][:len(begun)] and len(begun) >= 5
    assert content(tmp_path / 'parts') == content(tmp_path / 'whole')
    assert len(content(tmp_path / 'whole')) > 5
    assert not prefetch_threads()


def test_hub_skips_documents_without_text(tmp_path):
    """Wherever they stand, also after an interruption; which text is held out does not change."""
    class Stream(list):
        at = 0

        def state_dict(self):
            return self.at

        def load_state_dict(self, state):
            self.at = state

        def __iter__(self):
            while self.at < len(self):
                self.at += 1
                if self.at == self.limit:
                    raise ConnectionError('the line is dead')
                yield dict(text=self[self.at - 1])

    texts = [None if i % 7 == 3 else f'text {i}' for i in range(4 * hub.BATCH)]

    def run(folder, texts, limit=None):
        stream = Stream(texts)
        stream.limit = limit
        hub.write_shards(tmp_path / folder, stream, {}, ByteTokenizer(), 'text', 0, 0, 0.1, 1)
        return [text_of(tmp_path / folder, split).split(EOT) for split in ('train', 'val')]

    expected = run('whole', [text for text in texts if text])
    assert run('holes', texts) == expected
    every, hub.SAVE_EVERY = hub.SAVE_EVERY, 1
    try:
        with pytest.raises(DataError, match='stopped after'):
            run('cut', texts, 3 * hub.BATCH)
        assert run('cut', texts) == expected
    finally:
        hub.SAVE_EVERY = every
    with pytest.raises(DataError, match="have no text in a field 'text', but 'text'"):
        run('numbers', ['a', 3])


def test_hub_counts_what_it_skips(tmp_path, capsys):
    pytest.importorskip('datasets')
    with open(tmp_path / 'a.jsonl', 'w') as file:
        for i in range(300):
            file.write(json.dumps(dict(text=None if i in (5, 250) else f'the fox {i}')) + '\n')
    for tokenizer in ['--tokenizer=bytes'], ['--tokenizer=bpe', '--vocab_size=260']:
        printed = prepare('hub', '--source=json', f'--data_files={tmp_path}/a.jsonl', '--val_fraction=0.1',
                          f'--out={tmp_path}/out', *tokenizer)
        assert '298 documents\n' in printed and "skipped: 2 documents without text, whose 'text' is null" in printed


@needs_gpt2
def test_hub_stops_at_max_tokens(tmp_path, jsonl, capsys):
    hub.write_shards(tmp_path / 'out', hub.open_stream('json', '', '', jsonl), {}, TiktokenTokenizer('gpt2'),
                     'text', 10 ** 15, 3000, 0.01, 1)
    total = Split(tmp_path / 'out', 'train').n_tokens + Split(tmp_path / 'out', 'val').n_tokens
    assert 3000 <= total < 3030
    assert 'needs about 0.0 GB' in capsys.readouterr().out


@needs_gpt2
def test_hub_refuses_a_full_disk(tmp_path, jsonl):
    with pytest.raises(DataError, match='GB are needed.*--max_tokens='):
        hub.write_shards(tmp_path / 'out', hub.open_stream('json', '', '', jsonl), {}, TiktokenTokenizer('gpt2'),
                         'text', 10 ** 15, 0, 0.01, 1)


def test_hub_dataset_that_is_a_script(monkeypatch):
    datasets = pytest.importorskip('datasets')

    def refuses(*_, **__):
        raise RuntimeError('Dataset scripts are no longer supported, but found x.py')

    monkeypatch.setattr(datasets, 'load_dataset', refuses)
    with pytest.raises(DataError, match='no longer supported.*--revision=refs/convert/parquet'):
        hub.open_stream('x', '', '', '')


# ---- recall: tasks with masked targets

def answers_by_hand(task, row, letters):
    """{position: the token that belongs there}, by reading the row (text) from left to right as the task says."""
    third, half = len(letters) // 3, len(letters) // 2
    if task == 'mqar':
        pairs, expected = {}, {}
        for i in range(0, len(row), 2):
            if row[i] in pairs:
                expected[i + 1] = pairs[row[i]]
            elif row[i] != ' ':
                pairs[row[i]] = row[i + 1]
        return expected
    if task == 'noisy_recall':
        pairs, expected, i, row = {}, {}, 0, row.rstrip()
        while i < len(row):
            if row[i] in letters[2 * third:]:
                i += 1
                continue
            assert row[i] in letters[:third]
            if row[i] in pairs:
                expected[i + 1] = pairs.pop(row[i]) # each is asked once
            else:
                assert row[i + 1] in letters[third:2 * third]
                pairs[row[i]] = row[i + 1]
            i += 2
        return expected
    if task == 'fuzzy_recall':
        pairs, expected, i = {}, {}, 0
        while i < len(row) and row[i] in letters:
            key, value = '', ''
            while i < len(row) and row[i] in letters[:half]:
                key, i = key + row[i], i + 1
            begin = i
            while i < len(row) and row[i] in letters[half:]:
                value, i = value + row[i], i + 1
            assert 1 <= len(key) <= 3 and 1 <= len(value) <= 3
            if key in pairs:
                expected |= {begin + j: c for j, c in enumerate(pairs.pop(key))}
                assert i == max(expected) + 1
            else:
                pairs[key] = value
        return expected
    if task == 'compression':
        bar, expected = row.index('|'), {}
        symbols = dict(zip(letters, row[:bar]))
        for i in range(bar + 1, len(row.rstrip()), 2):
            expected[i + 1] = symbols.pop(row[i])
        return expected
    if task == 'hops':
        after, expected, i = {}, {}, 0
        while row[i] != '*':
            assert row[i] not in after and row[i + 2] == ' '
            after[row[i]] = row[i + 1]
            i += 3
        walk = row[0]
        for _ in range(len(after) - 1):
            walk += after[walk[-1]]
        assert len(set(walk)) == len(after) # one circle
        while i < len(row) and row[i] == '*':
            n = 0
            while row[i] == '*':
                n, i = n + 1, i + 1
            assert row[i] in walk
            answer, walk = row[i], walk.replace(row[i], '')
            for _ in range(n):
                answer = after[answer]
            expected[i + 1] = answer
            i += 2
        return expected
    if task == 'induction':
        return {len(row) - 1: row[row.index('*') + 1]}
    before, bar, after = row.partition('|')
    if task == 'parity':
        return {len(before) + 1: str(before.count('1') % 2)}
    said = before.replace(' ', '')
    return {len(before) + 1 + i: c for i, c in enumerate(said)}


def answering(tokenizer, answers):
    """A network that predicts what answers(text of a row) says: {position: character}."""
    import torch

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(1, 1)

        def forward(self, x):
            logits = torch.zeros(*x.shape, tokenizer.vocab_size)
            for b, row in enumerate(x.tolist()):
                for at, c in answers(tokenizer.decode(row)).items():
                    logits[b, at - 1, tokenizer.characters.index(c)] = 1.0
            return logits, None
    return Reader()


@pytest.mark.parametrize('task, length, symbols', [
    ('mqar', 30, 20), ('copy', 30, 40), ('selective_copy', 30, 20), ('induction', 30, 20), ('parity', 30, 20),
    ('noisy_recall', 36, 23), ('fuzzy_recall', 84, 6), ('compression', 30, 61), ('hops', 70, 17)])
def test_prepare_recall(tmp_path, task, length, symbols):
    from data.recall.evaluate import accuracy
    options = ['recall', f'--task={task}', f'--out={tmp_path}', '--sizes=3,7', f'--length={length}',
               f'--symbols={symbols}', '--val_examples=50']
    prepare(*options, '--examples=201')
    meta = load_meta(tmp_path)
    assert meta['recall'] == dict(task=task, sizes=[3, 7], length=length)
    tokenizer, rows, numbers = load_tokenizer(meta), {}, {}
    letters = tokenizer.characters[3:]
    for split, n in ('train', 201), ('val', 50):
        rows[split] = tokens_of(tmp_path / f'{split}.bin', (n, length))
        mask = np.fromfile(tmp_path / f'{split}.mask', np.uint8).reshape(n, length)
        for i, (row, targets) in enumerate(zip(rows[split], mask)):
            text = tokenizer.decode(row)
            expected = answers_by_hand(task, text, letters)
            assert {int(at): text[at] for at in np.flatnonzero(targets)} == expected, text
            size = (3, 7)[i % 2]
            numbers[split, i] = len(expected)
            if task == 'fuzzy_recall':
                assert size <= len(expected) <= 3 * size
            elif task == 'hops': # 15 pairs take 45 of 70 tokens, and a query 2 more than its hops
                assert len(expected) == 25 // (size + 2) and text.count('*') == size * len(expected)
            else:
                assert len(expected) == (1 if task in ('induction', 'parity') else size)
            if task == 'induction':
                assert text.index('*') == 27 - size
    assert not np.array_equal(rows['train'][:50], rows['val'])

    reader = answering(tokenizer, lambda text: answers_by_hand(task, text, letters))
    answers = [sum(numbers['val', i] for i in range(first, 50, 2)) for first in (0, 1)]
    assert accuracy(reader, Split(tmp_path, 'val'), 7) == {3: [answers[0], answers[0], 25, 25],
                                                           7: [answers[1], answers[1], 25, 25]}
    before = content(tmp_path)
    prepare(*options, '--examples=201', '--test_fraction=0.25') # further ones: 50
    sealed = {split: tokens_of(tmp_path / f'{split}.bin', (-1, length)) for split in ('train', 'test', 'val')}
    assert all(np.array_equal(sealed[split], rows[split]) for split in rows) and len(sealed['test']) == 50
    seen = [{row.tobytes() for row in split} for split in sealed.values()]
    assert task == 'parity' or len(set().union(*seen)) == sum(map(len, seen)) # of 3 bits there are only 8
    masks = [np.fromfile(tmp_path / f'{split}.mask', np.uint8).sum() for split in ('test', 'val')]
    assert masks[0] == masks[1] > 0 or task == 'fuzzy_recall' # values of random length
    prepare(*options, '--examples=201')
    assert content(tmp_path) == before


def tokens_of(path, shape):
    return np.fromfile(path, '<u2').reshape(shape)


def test_prepare_recall_mistakes(tmp_path):
    out = f'--out={tmp_path}/x'
    prepare('recall', out, '--sizes=4,17', error='length=32 is too small for mqar with sizes up to 17: use --length=68')
    prepare('recall', out, '--sizes=0,4', error='sizes=\\(0, 4\\) must be')
    prepare('recall', out, '--symbols=10', '--sizes=6', error='symbols=10 is too small for mqar .* 6: .*--symbols=12')
    for task, length, symbols in [('noisy_recall', 17, 12), ('fuzzy_recall', 48, 4), ('compression', 13, 8),
                                  ('hops', 33, 9)]:
        options = [f'--task={task}', '--sizes=2,4', '--examples=9', '--val_examples=9', f'--out={tmp_path}/{task}']
        prepare('recall', *options, f'--length={length - 1}', error=f'length={length - 1} .*: use --length={length} or')
        prepare('recall', *options, f'--length={length}', f'--symbols={symbols - 1}',
                error=f'symbols={symbols - 1} .*: use --symbols={symbols} or')
        prepare('recall', *options, f'--length={length}', f'--symbols={symbols}') # the least that it names is enough
    prepare('recall', out, '--task=guess', error="task='guess' is not one of mqar, noisy_recall")
    assert not (tmp_path / 'x').exists()


def test_masked_targets(tmp_path):
    """A target is -1 where its byte in the mask is 0: in batches, in fixed windows, and over the whole split."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(60, size=95), rng.integers(2, size=95)
    with Writer(tmp_path, CharTokenizer(''.join(map(chr, range(48, 108))))) as out:
        for i in range(0, 95, 19):
            out.write('train', ids[i:i + 19], mask[i:i + 19] > 0)
        out.write('val', ids)
    split = Split(tmp_path, 'train')
    expected = np.where(mask > 0, ids, -1)
    for offset in range(85):
        x, y = split.read(np.array([0]), np.array([offset]), 10)
        assert np.array_equal(x[0], ids[offset:offset + 10]) and np.array_equal(y[0], expected[offset + 1:offset + 11])
    targets = np.concatenate([y.ravel() for _, y in split.all_batches(3, 10)])[:94]
    assert np.array_equal(targets, expected[1:])
    assert sum((y >= 0).sum() for _, y in split.all_batches(3, 10)) == (expected[1:] >= 0).sum()
    fixed = np.concatenate([y for _, y in split.fixed_batches(9, 1, 10)])
    assert np.array_equal(fixed.ravel(), expected[1:91])
    other = [s.fingerprint() for s in (split, Split(tmp_path, 'val'))]
    (tmp_path / 'train.mask').write_bytes(bytes(95))
    assert Split(tmp_path, 'train').fingerprint() != other[0]
    # the other split has none, and one of another length is refused
    assert (Split(tmp_path, 'val').read(np.array([0]), np.array([0]), 10)[1] >= 0).all()
    (tmp_path / 'train.mask').write_bytes(bytes(94))
    with pytest.raises(DataError, match='train.mask: 94 bytes are not one for each of the 95 tokens of train.bin') as e:
        Split(tmp_path, 'train')
    message(e)
    with Writer(tmp_path, ByteTokenizer()) as out: # another preparation takes the mask with it
        out.write('train', ids), out.write('val', ids)
    assert not list(tmp_path.glob('*.mask'))


def test_evaluate_recall(tmp_path):
    """Against a network that knows the rule, but not the last key's value."""
    from data.recall.evaluate import accuracy
    prepare('recall', f'--out={tmp_path}', '--sizes=3,5', '--length=24', '--examples=4', '--val_examples=31')
    split = Split(tmp_path, 'val')
    tokenizer = load_tokenizer(split.meta)

    def answers(text):
        n = next(n for n in (3, 5) if text[2 * n] == ' ' or text[2 * n] in text[:2 * n:2])
        expected = answers_by_hand('mqar', text, tokenizer.characters[3:])
        return {at: c for at, c in expected.items() if text[at - 1] != text[2 * (n - 1)]}

    counts = accuracy(answering(tokenizer, answers), split, 7)
    assert counts == {3: [2 * 16, 3 * 16, 0, 16], 5: [4 * 15, 5 * 15, 0, 15]}


@pytest.mark.parametrize('steps', [3, pytest.param(300, marks=pytest.mark.long('300 steps'))])
def test_recall_from_data_to_accuracy(tmp_path, steps):
    """The three commands; also with an idea's file, on longer examples than it was trained on."""
    prepare('recall', f'--out={tmp_path}/short', '--sizes=2', '--length=8', '--symbols=4', '--examples=2000',
            '--val_examples=40')
    prepare('recall', f'--out={tmp_path}/long', '--sizes=2', '--length=20', '--symbols=4', '--examples=10',
            '--val_examples=40')
    small = [f'--out_dir={tmp_path}/run', f'--dataset={tmp_path}/short', '--block_size=8', '--n_embd=32',
             f'--max_iters={steps}', f'--eval_interval={steps}', '--device=cpu']
    files = ['config/recall.py', 'config/mixers/gated_delta.py']
    helpers.well(helpers.run('train.py', [*files, *small], cwd=ROOT, first=helpers.NO_PICTURES))
    printed = prepare('recall/evaluate.py', files[1], f'--out_dir={tmp_path}/run', f'--dataset={tmp_path}/short')
    answers, examples, state = printed.splitlines()[1:]
    assert steps < 300 or float(answers.split()[-1].rstrip('%')) > 60 # guessing one of two values gives 50%
    assert float(examples.split()[-1].rstrip('%')) <= float(answers.split()[-1].rstrip('%'))
    # layers, bytes, heads, D x D; and the token before's shifted half of the channels
    assert state.split()[0].replace(',', '') == str(2 * 4 * 2 * 16 * 16 + 2 * 4 * 16)
    printed = prepare('recall/evaluate.py', files[1], f'--out_dir={tmp_path}/run', f'--dataset={tmp_path}/long')
    assert 'after 20 tokens' in printed and printed.splitlines()[-1].split()[0] == state.split()[0]
    prepare('recall/evaluate.py', f'--out_dir={tmp_path}/run', f'--dataset={tmp_path}/long',
            error="the mixer 'gated_delta' of the checkpoint is not in model.py")
    prepare('recall/evaluate.py', f'--out_dir={tmp_path}/run', '--dataset=calc', error='calc')


# ---- the sealed third split

def ids_of(folder, split):
    return [int(i) for shard in Split(folder, split).shards for i in T.map_tokens(shard)]


@pytest.mark.parametrize('shard_tokens', [None, 10])
def test_writer_seals_a_third_split(tmp_path, shard_tokens):
    """It is counted, may not be empty, and goes with the next preparation that seals nothing."""
    parts = {'train': range(25), 'test': range(100, 112), 'val': range(5)}
    write(tmp_path, parts, shard_tokens=shard_tokens, test_fraction=0.1)
    assert load_meta(tmp_path)['tokens'] == {'train': 25, 'val': 5, 'test': 12}
    assert [ids_of(tmp_path, split) for split in parts] == list(map(list, parts.values()))
    names = ['test_000000.bin', 'test_000001.bin'] if shard_tokens else ['test.bin']
    assert sorted(path.name for path in tmp_path.glob('*test*')) == names
    files = content(tmp_path)
    with pytest.raises(DataError, match='the test split is empty: .* test_fraction') as error:
        write(tmp_path, {'train': [1], 'val': [1]}, shard_tokens=shard_tokens, test_fraction=0.1)
    assert message(error) and content(tmp_path) == files
    with open(tmp_path / names[0], 'ab') as file:
        file.write(b'\0\0')
    with pytest.raises(DataError, match='promises 12 tokens of test, but the files have 13'):
        Split(tmp_path, 'test')
    write(tmp_path, {'train': [1], 'val': [1]}, shard_tokens=shard_tokens)
    assert not list(tmp_path.glob('*test*')) and load_meta(tmp_path)['tokens'] == {'train': 1, 'val': 1}


def test_training_ignores_the_sealed_split(tmp_path):
    """Whatever stands in it: training sees the same dataset, and says nothing."""
    for split in 'train', 'val':
        raw(tmp_path, f'test_{split}_0', range(100 + len(split))) # test_: of the dataset's name
        (tmp_path / f'test_{split}_0.mask').write_bytes(bytes(100 + len(split)))

    def seen():
        data = Dataset(str(tmp_path), {})
        return data.fingerprints(), str(data), data.check(200, 10, 'epoch'), data.meta

    before = seen()
    assert before[2] == []
    with pytest.raises(DataError, match='test_train_0.bin has the name of both splits: rename it'):
        Split(tmp_path, 'test')
    for split in 'train', 'val':
        (tmp_path / f'test_{split}_0.bin').rename(tmp_path / f'{split}.bin')
        (tmp_path / f'test_{split}_0.mask').rename(tmp_path / f'{split}.mask')
    before = seen()
    raw(tmp_path, 'test', range(30)), (tmp_path / 'test.mask').write_bytes(bytes(30))
    assert seen() == before and ids_of(tmp_path, 'test') == list(range(30))
    raw(tmp_path, 'text_test_2', range(3)) # left from another preparation
    assert seen() == before
    with pytest.raises(DataError, match='holds both test.bin and text_test_2.bin'):
        Split(tmp_path, 'test')
    (tmp_path / 'test.bin').unlink()
    assert ids_of(tmp_path, 'test') == [0, 1, 2]
    (tmp_path / 'text_test_2.bin').write_bytes(b'odd')
    (tmp_path / 'text_test_2.mask').write_bytes(b'')
    (tmp_path / 'test.mask').unlink()
    assert seen() == before
    (tmp_path / 'text_test_2.bin').unlink()
    (tmp_path / 'text_test_2.bin').symlink_to(tmp_path / 'val.bin')
    assert seen() == before
    with pytest.raises(DataError, match='val.bin and text_test_2.bin are the same file'):
        Split(tmp_path, 'test')


def test_sealed_items_are_that_fraction_of_the_training_items():
    for val_fraction, test_fraction in (0.1, 0.25), (0.5, 0.5), (0.001, 0.05):
        plain, sealed = ([split_of(f'item {i}', val_fraction, part) for i in range(20_000)]
                         for part in (0.0, test_fraction))
        assert [split == 'val' for split in sealed] == [split == 'val' for split in plain] and 'test' not in plain
        assert sealed.count('val') / 20_000 == pytest.approx(val_fraction, abs=0.01) # three standard deviations
        assert sealed.count('test') / plain.count('train') == pytest.approx(test_fraction, abs=0.015)
    assert cuts(1_115_394, 0.1, 0.0) == (1_003_854, 1_003_854) and cuts(100, 0.1, 0.1) == (81, 90)


@pytest.mark.parametrize('name, more, cut', [
    ('shakespeare_char', ['--input_file=TEXT'], True), ('text', ['--input=TEXT'], True),
    ('text', ['--input=TEXT,MORE'], False), ('text', ['--input=LINES'], False),
    ('python_stdlib', ['--max_bytes=1_000_000'], False), ('calc', ['--examples=500'], False),
    pytest.param('shakespeare', ['--input_file=TEXT'], True, marks=needs_gpt2)], ids=str)
def test_prepare_scripts_seal_training_text(tmp_path, name, more, cut):
    """val does not change, train and test together are what train was: cut at one place, or by whole items."""
    text = ''.join(f'line {i} of a long text\n' for i in range(600))
    files = dict(TEXT=text, MORE=text.upper(), LINES=text.replace('\n', EOT))
    for key, content in files.items():
        (tmp_path / key).write_text(content, encoding='utf-8', newline='')
    more = [re.sub('[A-Z]{4,}', lambda match: f'{tmp_path}/{match[0]}', argument) for argument in more]
    prepare(name, *more, f'--out={tmp_path}/plain')
    printed = prepare(name, *more, f'--out={tmp_path}/sealed', '--test_fraction=0.25')
    assert (tmp_path / 'plain/val.bin').read_bytes() == (tmp_path / 'sealed/val.bin').read_bytes()
    train, test, before = (text_of(tmp_path / folder, split) for folder, split in
                           (('sealed', 'train'), ('sealed', 'test'), ('plain', 'train')))
    assert 0.15 < len(test) / len(before) < 0.35
    if cut:
        assert train + test == before and len(train) == int(0.75 * len(before))
    else:
        ends = '\n' if name == 'calc' else EOT
        train, test, before = (part.split(ends)[:-1] for part in (train, test, before))
        whole = train + test if len(before) > 2 else [a + b for a, b in zip(train, test, strict=True)]
        assert sorted(whole) == sorted(before) and test
    n = Split(tmp_path / 'sealed', 'test').n_tokens
    assert f', test (sealed) has {n:,}\n' in printed and load_meta(tmp_path / 'sealed')['tokens']['test'] == n


@pytest.mark.parametrize('name', ['text', 'hub'])
def test_no_vocabulary_is_trained_on_sealed_text(tmp_path, name):
    if name == 'hub':
        pytest.importorskip('datasets')
    documents = [f'{{"text": "Document number {i}: the cat sat, the mouse ran."}}\n' for i in range(400)]
    file = tmp_path / 'a.jsonl'
    file.write_text(''.join(documents), encoding='utf-8')
    source = dict(text=[f'--input={file}'], hub=['--source=json', f'--data_files={file}'])[name]
    prepare(name, *source, '--tokenizer=bpe', '--vocab_size=330', '--val_fraction=0.1', '--test_fraction=0.3',
            f'--out={tmp_path}/out')
    parts = {split: text_of(tmp_path / 'out', split).split(EOT)[:-1] for split in ('train', 'test', 'val')}
    numbers = sorted(int(re.search('[0-9]+', text)[0]) for part in parts.values() for text in part)
    assert numbers == list(range(400)) and 70 < len(parts['test']) < 150 and 20 < len(parts['val']) < 60
    vocabularies = [JsonTokenizer.train(texts, 330).json for texts in
                    (parts['train'], parts['train'] + parts['test'], parts['train'] + parts['val'])]
    assert [load_meta(tmp_path / 'out')['json'] == vocabulary for vocabulary in vocabularies] == [True, False, False]


def test_hub_does_not_go_on_with_another_test_fraction(tmp_path, monkeypatch):
    """Documents stay in their splits after an interruption, and those held out do not depend on what is sealed."""
    class Stream(list):
        at, limit = 0, None

        def state_dict(self):
            return self.at

        def load_state_dict(self, state):
            self.at = state

        def __iter__(self):
            for self.at in range(self.at + 1, len(self) + 1):
                if self.at == self.limit:
                    raise ConnectionError('the line is dead')
                yield dict(text=self[self.at - 1])

    def run(folder, test_fraction, limit=None):
        stream = Stream(f'text {i}' for i in range(900))
        stream.limit = limit
        hub.write_shards(tmp_path / folder, stream, dict(test_fraction=test_fraction), ByteTokenizer(), 'text', 0, 0,
                         0.1, 1, test_fraction)
        return content(tmp_path / folder)

    monkeypatch.setattr(hub, 'BATCH', 10), monkeypatch.setattr(hub, 'SAVE_EVERY', 3)
    monkeypatch.setattr(hub, 'SHARD_TOKENS', 1000)
    whole, plain = run('whole', 0.2), run('plain', 0.0)
    assert {name for name in whole if 'test' in name} == {f'test_{i:06d}.bin' for i in range(2)}
    assert whole['val_000000.bin'] == plain['val_000000.bin'] and not any('test' in name for name in plain)
    assert text_of(tmp_path / 'whole', 'val').split(EOT)[:-1] == [f'text {i}' for i in range(0, 900, 10)]
    with pytest.raises(DataError, match='the line is dead'):
        run('parts', 0.2, 400)
    with pytest.raises(DataError, match='unfinished preparation with test_fraction=0.2: repeat those settings'):
        run('parts', 0.0)
    assert run('parts', 0.2) == whole


def targets_of(split):
    return [array.tolist() for x, y in split.all_batches(4, 8) for array in (x, y)]


@pytest.mark.parametrize('links', [True, False])
@pytest.mark.parametrize('shard_tokens', [None, 40])
def test_sealed_dataset(tmp_path, monkeypatch, links, shard_tokens):
    """It trains on the same files, validates on the sealed ones, and leaves the dataset as it is, times included."""
    def prepared(n):
        parts = {'train': range(n), 'test': range(n, n + 75), 'val': range(50)}
        write(folder, parts, shard_tokens=shard_tokens, test_fraction=0.1, about={'topic': 'numbers'})
        for file in folder.glob('*.bin'):
            file.with_suffix('.mask').write_bytes(bytes(i % 3 > 0 for i in range(file.stat().st_size // 2)))

    def times(): # by which the files' hashes are kept
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ctime_ns)
                for path in folder.iterdir() if path.name != T.HASHES}

    def sealed():
        before = times()
        fingerprint = sealed_dataset(folder, out)
        assert times() == before
        source, data = Dataset(str(folder), {}), Dataset(str(out), {})
        test = Split(folder, 'test')
        assert fingerprint == test.fingerprint() and data.train.fingerprint() == source.train.fingerprint()
        assert targets_of(data.val) == targets_of(test) != targets_of(source.val)
        assert targets_of(data.train) == targets_of(source.train) and data.check(257, 8, 'random') == []
        assert data.meta == source.meta | {'tokens': {'train': source.train.n_tokens, 'val': 75}}
        assert not list(out.glob('*.tmp')) and (out / Path(data.train.shards[0].path).name).is_symlink() == links
        return fingerprint

    folder, out = tmp_path / 'data', tmp_path / 'comparison/sealed'
    if not links:
        monkeypatch.setattr(os, 'symlink', lambda *paths: (_ for _ in ()).throw(OSError(1314, 'no privilege')))
    prepared(90)
    assert sealed() == sealed()
    other = sealed()
    prepared(30) # fewer shards: none is left of those before
    assert sealed() != other
    monkeypatch.chdir(tmp_path)
    sealed_dataset('data', 'elsewhere') # relative paths
    assert targets_of(Split('elsewhere', 'val')) == targets_of(Split('data', 'test'))
    write(folder, {'train': [1, 2], 'val': [1, 2]}, shard_tokens=shard_tokens)
    with pytest.raises(DataError, match=r'no test.bin \(and no test_\*.bin\) in .* --test_fraction=0.1') as error:
        sealed_dataset(folder, tmp_path / 'none')
    assert message(error) and not (tmp_path / 'none').exists()


def test_sealed_dataset_of_other_formats(tmp_path):
    """nanoGPT's files with their meta.pkl, bare shards with headers, and a vocabulary in files of its own."""
    characters, ids = helpers.write_nano_data(tmp_path / 'nano')
    (tmp_path / 'nano/val.bin').rename(tmp_path / 'nano/test.bin')
    sealed_dataset(tmp_path / 'nano', tmp_path / 'a')
    raw(tmp_path / 'nano', 'val', ids[:100])
    assert Dataset(str(tmp_path / 'a'), {}).meta == Dataset(str(tmp_path / 'nano'), {}).meta
    assert ids_of(tmp_path / 'a', 'val') == ids.tolist()
    (tmp_path / 'shards').mkdir()
    for i, split in enumerate(('train', 'test', 'val')):
        sharded(tmp_path / f'shards/fineweb_{split}_000001.bin', range(i, 99))
    (tmp_path / 'shards/tokenizer.json').write_text(JsonTokenizer.train(['the cat sat'], 260).json)
    sealed_dataset(tmp_path / 'shards', tmp_path / 'b')
    before, after = (Dataset(str(tmp_path / folder), {}) for folder in ('shards', 'b'))
    assert after.meta == before.meta and after.tokenizer.name == 'tokenizers'
    assert after.train.fingerprint() == before.train.fingerprint()
    assert ids_of(tmp_path / 'b', 'val') == list(range(1, 99))


def test_train_on_a_sealed_dataset(tmp_path):
    """An unmodified train.py ends with the same numbers as where the sealed text is an ordinary validation split."""
    text = helpers.corpus()
    tokenizer = CharTokenizer.from_text([text])
    parts = {'train': text[:2000], 'test': text[2000:2600], 'val': text[2600:]}
    parts = {split: tokenizer.encode(part) for split, part in parts.items()}
    write(tmp_path / 'whole', parts, tokenizer, test_fraction=0.1)
    write(tmp_path / 'data', {'train': parts['train'], 'val': parts['test']}, tokenizer)
    sealed_dataset(tmp_path / 'whole', tmp_path / 'sealed')
    for name in 'data', 'sealed':
        helpers.train(tmp_path, f'out-{name}', dataset=tmp_path / name, max_iters=2, eval_interval=2)
    ordinary, sealed = (helpers.history(tmp_path / f'out-{name}') for name in ('data', 'sealed'))
    assert ordinary == sealed and 'val_loss' in sealed[-1]
