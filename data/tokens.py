"""
Reads token files: what train.py needs of a dataset.

A dataset is a folder with one token file a split (train.bin, val.bin) or any number of shards (train_*.bin, val_*.bin;
a prefix as in fineweb_train_000001.bin is fine too), and meta.json:

    {"dtype": "uint16", "vocab_size": 65, "tokenizer": "char", "characters": "...", "tokens": {"train": n, "val": n}}

Token files are bare little-endian ids. nanoGPT's files are read as they are, with or without their meta.pkl, and so are
the shards of llm.c and modded-nanogpt, which begin with a header.

Whatever is wrong with a file raises DataError, a ValueError whose message is one line with the value and the way out.
"""
import hashlib
import itertools
import json
import os
import pickle
import pickletools
import queue
import re
import threading
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent


class DataError(ValueError):
    """Something is wrong with a dataset, a token file or a tokenizer."""


# ---------------------------------------------------------------------------------------------------------------------
# Dataset folders and their metadata

def dataset_folder(name):
    """
    Path of the dataset called `name`: <project>/data/<name>; a name with a path separator in it is a folder, looked up
    from the current directory, then from the project. The folder need not exist.
    """
    name = os.path.expanduser(str(name))
    if not any(separator and separator in name for separator in ('/', os.sep, os.altsep)):
        return PROJECT / 'data' / name
    return Path(name).resolve() if os.path.isdir(name) else PROJECT / name


def _way_out(folder):
    """What to do about a dataset that is not there: its prepare command, or the names that can be prepared."""
    if folder.parent == PROJECT / 'data' and (folder / 'prepare.py').is_file():
        return f'run: python data/{folder.name}/prepare.py'
    names = sorted(path.parent.name for path in (PROJECT / 'data').glob('*/prepare.py'))
    return f'datasets that can be prepared by python data/NAME/prepare.py: {", ".join(names)}'


def load_meta(folder):
    """
    Metadata of a dataset folder as a dict in meta.json's terms; {} where there is none. nanoGPT's meta.pkl is read
    where there is no meta.json. Raises DataError for a file that is damaged, unfinished or asks for code to be run.
    """
    folder = Path(folder)
    path = folder / 'meta.json'
    if not path.is_file():
        path = folder / 'meta.pkl'
        return _meta_of_pickle(path) if path.is_file() else {}
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path} is not JSON ({error}): prepare the dataset again; {_way_out(folder)}') from None
    if not isinstance(meta, dict):
        raise DataError(f'{path} holds a {type(meta).__name__} instead of an object; {_way_out(folder)}')
    if meta.get('unfinished'):
        raise DataError(f'{folder}: preparing this dataset was interrupted; {_way_out(folder)}')
    if meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
        raise DataError(f'{path}: dtype is {meta["dtype"]!r}, but must be uint16 or uint32')
    _check_count(path, 'vocab_size', meta.get('vocab_size', 1), minimum=1)
    tokens = meta.get('tokens', {})
    if not isinstance(tokens, dict):
        raise DataError(f'{path}: tokens is {tokens!r}, but must give a count for each split')
    for split, count in tokens.items():
        _check_count(path, f'tokens of {split}', count, minimum=0)
    return meta


def _check_count(path, name, value, minimum):
    if type(value) is not int or value < minimum: # not isinstance: True is no count
        raise DataError(f'{path}: {name} is {value!r}, but must be a whole number from {minimum} up')


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings and numbers, and nothing else: a pickle that names a class or function is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def _meta_of_pickle(path):
    """nanoGPT's meta.pkl (vocab_size, stoi, itos), in meta.json's terms."""
    try:
        data = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(data):
            # the memo is an array: a pickle of a few bytes that numbers an entry 2**32 would have 64 GB allocated
            if opcode.name.endswith('PUT') and int(argument) > len(data):
                raise pickle.UnpicklingError(f'memo entry {argument} in {len(data)} bytes')
        with open(path, 'rb') as file:
            raw = _PlainUnpickler(file).load()
    except OSError:
        raise
    except Exception as error: # damaged pickles raise nearly anything: IndexError, KeyError, UnicodeDecodeError...
        raise DataError(f'{path} is refused: only plain containers, strings and numbers are read from a pickle, and '
                        f'{str(error) or type(error).__name__}; prepare the dataset again for a meta.json') from None
    if not isinstance(raw, dict):
        raise DataError(f'{path} holds a {type(raw).__name__} instead of a dict')
    meta = {}
    if 'vocab_size' in raw:
        _check_count(path, 'vocab_size', raw['vocab_size'], minimum=1)
        meta['vocab_size'] = raw['vocab_size']
    stoi = raw.get('stoi')
    if isinstance(stoi, dict) and all(isinstance(c, str) and len(c) == 1 for c in stoi):
        by_id = {i: c for c, i in stoi.items() if type(i) is int}
        if sorted(by_id) == list(range(len(stoi))): # in any other form, what the ids mean stays unknown
            meta.update(tokenizer='char', characters=''.join(by_id[i] for i in range(len(by_id))))
            meta.setdefault('vocab_size', len(by_id))
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# Splits and their batches

_HEADER_BYTES = 256 * 4
# magic -> (version, dtype), of llm.c's data files for GPT-2 (and modded-nanogpt's) and for Llama 3
_HEADERS = {20240520: (1, '<u2'), 20240801: (7, '<u4')}


class Shard(NamedTuple):
    path: str
    dtype: np.dtype
    start: int # byte at which the tokens begin
    n_tokens: int


def _open_shard(path, dtype):
    size = os.path.getsize(path)
    if size == 0:
        raise DataError(f'{path} is empty; {_way_out(Path(path).parent)}')
    start = 0
    header = np.fromfile(path, '<i4', 3) if size >= 12 else ()
    if len(header) and int(header[0]) in _HEADERS:
        version, dtype = _HEADERS[int(header[0])]
        if header[1] != version:
            raise DataError(f'{path}: its header says version {header[1]}, but only version {version} is known: '
                            'get or write the file again')
        dtype, start = np.dtype(dtype), _HEADER_BYTES
        expected = start + int(header[2]) * dtype.itemsize
        if size != expected or header[2] < 1:
            raise DataError(f'{path}: its header says {header[2]} tokens, which makes {expected} bytes, but the file '
                            f'has {size}: get or write the file again')
    elif size % dtype.itemsize:
        raise DataError(f'{path}: {size} bytes are no whole number of {dtype.name} tokens, the file is cut short or no '
                        f'token file; {_way_out(Path(path).parent)}')
    return Shard(str(path), dtype, start, (size - start) // dtype.itemsize)


class Split:
    """
    One split ('train' or 'val') of a dataset folder.

    shards      list of Shard, sorted by name; n_tokens of all of them together
    meta        the folder's metadata (load_meta)
    vocab_size  every id read is checked against it, where it is known: the argument, else meta's

    Opening takes a few system calls a shard, whatever its size. Raises DataError for missing or damaged files.
    """

    def __init__(self, folder, split, vocab_size=None):
        folder = Path(folder)
        self.folder, self.split = folder, split
        if not folder.is_dir():
            raise DataError(f'there is no dataset folder {folder}; {_way_out(folder)}')
        self.meta = load_meta(folder)
        self.vocab_size = vocab_size or self.meta.get('vocab_size')
        pattern = re.compile(rf'(.+_)?{split}(_.+)?\.bin')
        names = sorted(entry.name for entry in os.scandir(folder) if pattern.fullmatch(entry.name))
        if not names:
            raise DataError(f'there is no {split}.bin (and no {split}_*.bin) in {folder}; {_way_out(folder)}')
        if f'{split}.bin' in names and len(names) > 1:
            other = next(name for name in names if name != f'{split}.bin')
            raise DataError(f'{folder} holds both {split}.bin and {other}: one of the two is left over from another '
                            'preparation, remove it')
        dtype = np.dtype('<u4' if self.meta.get('dtype') == 'uint32' else '<u2')
        self.shards = [_open_shard(folder / name, dtype) for name in names]
        self._sizes = np.array([shard.n_tokens for shard in self.shards], dtype=np.int64)
        self.n_tokens = int(self._sizes.sum())
        promised = self.meta.get('tokens', {}).get(split, self.n_tokens)
        if promised != self.n_tokens:
            raise DataError(f'{folder}: meta.json promises {promised} tokens of {split}, but the files have '
                            f'{self.n_tokens}; {_way_out(folder)}')

    def batch(self, first_sample, batch_size, block_size, sampling='random', seed=1337, stride=None):
        """
        Samples first_sample ... first_sample + batch_size - 1 of the run as (x, y), each int64 (batch_size,
        block_size); y is x moved on by one token. Samples are numbered over all steps, ranks and accumulation steps,
        so that a batch is a pure function of its arguments: resuming needs no state, and ranks take ranges of numbers.

        'random'  every sample is drawn from all windows, with replacement
        'epoch'   the split is cut into windows of `stride` tokens (block_size, if None), and samples k*n ... k*n+n-1
                  visit each of the n windows once, in an order that changes from epoch to epoch. With a block_size
                  below stride, the first tokens of each window are used: stride stays while lengths vary.
        """
        sample = np.arange(first_sample, first_sample + batch_size, dtype=np.uint64)
        key = _mix(np.uint64(seed % (1 << 64)))
        if sampling == 'random':
            counts = np.maximum(self._sizes - block_size, 0)
            total = self._require(counts, block_size)
            window = _mix(key + sample * _GAMMA) % np.uint64(total)
            shard, offset = _locate(window, counts)
        elif sampling == 'epoch':
            stride = stride or block_size
            if block_size > stride:
                raise DataError(f'block_size {block_size} is beyond the stride of the windows, {stride}')
            counts = (self._sizes - 1) // stride
            total = self._require(counts, stride)
            epoch, position = np.divmod(sample, np.uint64(total))
            shard, index = _locate(_permute(position, total, _mix(key + epoch * _GAMMA)), counts)
            offset = index * stride
        else:
            raise DataError(f'unknown sampling {sampling!r}: it must be random or epoch')
        return self._windows(shard, offset, block_size)

    def n_windows(self, stride):
        """How many windows of `stride` tokens (and a target for each) the split has: the samples of an epoch."""
        return int(((self._sizes - 1) // stride).sum())

    def fixed_batches(self, n_batches, batch_size, block_size):
        """
        Yields (x, y) as batch does, the same ones at every call: up to n_batches * batch_size windows, evenly spaced
        over the split. No two overlap, so a small split gives fewer (the last batch may then be smaller).
        """
        counts = (self._sizes - 1) // block_size
        total = self._require(counts, block_size)
        wanted = min(n_batches * batch_size, total)
        chosen = np.arange(wanted, dtype=np.int64) * total // wanted
        for i in range(0, wanted, batch_size):
            shard, index = _locate(chosen[i:i + batch_size], counts)
            yield self._windows(shard, index * block_size, block_size)

    def all_batches(self, batch_size, block_size):
        """
        Yields (x, y, n_targets) over the whole split: each token is a target once, but for the first of each shard,
        which nothing precedes. Where a shard's last window is short, x is padded with 0 and y with -1, and n_targets
        counts the rest.
        """
        counts = -(-(self._sizes - 1) // block_size)
        total = self._require(counts, 1)
        for i in range(0, total, batch_size):
            shard, index = _locate(np.arange(i, min(i + batch_size, total), dtype=np.int64), counts)
            x, y = self._windows(shard, index * block_size, block_size, pad=True)
            yield x, y, int((y >= 0).sum())

    def scan(self, vocab_size, progress=None):
        """
        Reads everything once and returns the number of tokens; raises DataError at the first id that is not below
        vocab_size. progress is called with the number of tokens read since its last call.
        """
        step = 1 << 22
        for shard in self.shards:
            for offset in range(0, shard.n_tokens, step):
                tokens = map_tokens(shard)[offset:offset + step]
                self._check(shard, offset, tokens, vocab_size)
                if progress:
                    progress(len(tokens))
        return self.n_tokens

    def fingerprint(self):
        """A hash of the shards' names, sizes and ends: tells one dataset from another, at once."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f'{os.path.basename(shard.path)} {shard.n_tokens} '.encode())
            tokens = map_tokens(shard)
            digest.update(tokens[:4096].tobytes() + tokens[-4096:].tobytes())
        return digest.hexdigest()[:16]

    def _require(self, counts, length):
        total = int(counts.sum())
        if total == 0:
            longest = int(self._sizes.max())
            raise DataError(f'{self.folder}: the longest token file of {self.split} has {longest} tokens, but a window '
                            f'and its targets take {length + 1}: set block_size below {longest}, or prepare more data')
        return total

    def _windows(self, shards, offsets, block_size, pad=False):
        x = np.zeros((len(shards), block_size), dtype=np.int64)
        y = np.full_like(x, -1)
        maps = {shard: map_tokens(self.shards[shard]) for shard in set(shards.tolist())}
        for row, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist())):
            n = min(block_size, len(maps[shard]) - 1 - offset) if pad else block_size
            tokens = maps[shard][offset:offset + n + 1]
            if self.vocab_size:
                self._check(self.shards[shard], offset, tokens, self.vocab_size)
            x[row, :n], y[row, :n] = tokens[:-1], tokens[1:]
        return x, y

    def _check(self, shard, offset, tokens, vocab_size):
        if tokens.max() >= vocab_size:
            at = int(np.argmax(tokens >= vocab_size))
            raise DataError(f'{shard.path}: token {offset + at} is {tokens[at]}, but vocab_size is {vocab_size}: the '
                            'file is damaged or belongs to another tokenizer, prepare the dataset again')


def map_tokens(shard):
    """
    A shard's tokens as a memory map. It is made anew for each batch: pages that are read through a map count as this
    process's memory until the map is closed, so that a map which stays open looks like a leak.
    """
    if os.path.getsize(shard.path) < shard.start + shard.n_tokens * shard.dtype.itemsize:
        raise DataError(f'{shard.path} has become shorter while in use: start again when it is complete')
    return np.memmap(shard.path, shard.dtype, 'r', shard.start, (shard.n_tokens,))


def _locate(index, counts):
    """Index over all shards' items -> (shard, index in the shard), where shard i has counts[i] items."""
    index = np.asarray(index).astype(np.int64)
    ends = np.cumsum(counts)
    shard = np.searchsorted(ends, index, side='right')
    return shard, index - (ends - counts)[shard]


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z):
    """Splitmix64's finalizer (Steele, Lea and Flood 2014), a bijection of uint64 that scatters; of arrays too."""
    z = np.atleast_1d(z) + _GAMMA # an array even for one value: numpy warns of overflow in scalars only
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _permute(position, n, key):
    """
    Where `position` goes in a pseudorandom permutation of range(n) chosen by `key` (uint64 arrays of one shape).
    A Feistel network permutes the next power of four; what falls outside the range is sent through again until it is
    inside (cycle walking, four rounds on average at most). No table: an epoch of 10**9 windows costs no memory.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = position.copy()
    todo = np.arange(len(position))
    while len(todo):
        left, right = result[todo] >> half, result[todo] & mask
        for i in range(6):
            left, right = right, left ^ (_mix(_mix(key[todo] + np.uint64(i)) ^ right) & mask)
        result[todo] = (left << half) | right
        todo = todo[result[todo] >= np.uint64(n)]
    return result


def prefetch(make, first, depth=2):
    """
    Yields make(first), make(first + 1), ... without end; a thread computes up to `depth` of them ahead. An exception in
    make is raised where its result would have been yielded. Closing the generator ends the thread.
    """
    results = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    closing = threading.Event()

    def work():
        for i in itertools.count(first):
            room.acquire()
            if closing.is_set():
                return
            try:
                results.put((make(i), None))
            except BaseException as error:
                results.put((None, error))
                return

    def stop():
        closing.set()
        room.release()
        thread.join()

    thread = threading.Thread(target=work, name='prefetch', daemon=True)
    thread.start()
    # called when Python ends, too: afterwards daemon threads stand still, and from Python 3.13 on a join never returns
    end = weakref.finalize(thread, stop)
    try:
        while True:
            result, error = results.get()
            if error is not None:
                raise error
            room.release()
            yield result
    finally:
        end()
