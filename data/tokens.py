"""
Reads token files: what train.py needs of a dataset.

A dataset is a folder. It has one token file per split (train.bin, val.bin), or any number of shards (train_*.bin,
val_*.bin; a prefix is fine too, as in fineweb_train_000001.bin). A third split, test.bin or test_*.bin, may be there:
training never reads it. meta.json describes them:

    {"dtype": "uint16", "vocab_size": 65, "tokenizer": "char", "characters": "...", "tokens": {"train": n, "val": n}}

Token files are bare little-endian ids. nanoGPT's files work unchanged, with or without their meta.pkl. So do the shards
of llm.c and modded-nanogpt, which begin with a header. An optional train.mask next to train.bin has one byte per token;
0 means that the token is not a training target.

Anything wrong with a file raises DataError with a one-line message: the value and the way out.
"""
import hashlib
import io
import itertools
import json
import mmap
import os
import pickle
import pickletools
import queue
import re
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent


class DataError(ValueError):
    """Something is wrong with a dataset, a token file or a tokenizer."""


# ---------------------------------------------------------------------------------------------------------------------
# Dataset folders and their metadata

def find_path(name):
    """
    The single rule for paths in settings: a relative path is relative to the current directory if it exists there or
    begins with ./ or ../, and otherwise to the project.
    """
    name = os.path.expanduser(str(name))
    here = name in ('.', '..') or name.startswith(('./', '../', f'.{os.sep}', f'..{os.sep}')) or os.path.exists(name)
    return Path(name).resolve() if here else PROJECT / name


def dataset_folder(name):
    """Path of a dataset, which need not exist: a plain name means <project>/data/<name>; for others see find_path."""
    name = str(name)
    if not any(separator and separator in name for separator in ('/', os.sep, os.altsep)):
        return PROJECT / 'data' / os.path.expanduser(name)
    return find_path(name)


def first_few(names, most=8):
    """The first names of a list, and how many more there are."""
    return ', '.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def how_to_prepare(folder, flags=''):
    """End of an error message about a dataset folder: the command that prepares it, or the names of all datasets."""
    if folder.parent == PROJECT / 'data' and (folder / 'prepare.py').is_file():
        small = "; or begin small: python data/python_stdlib/prepare.py, then python train.py config/quick.py"
        return f"run: python data/{folder.name}/prepare.py{flags or (small if folder.name == 'openwebtext' else '')}"
    names = sorted(path.parent.name for path in (PROJECT / 'data').glob('*/prepare.py'))
    return f"run python data/NAME/prepare.py{flags}, where NAME is one of {', '.join(names)}"


def load_meta(folder):
    """
    Metadata of a dataset folder: the dict in meta.json, or nanoGPT's meta.pkl converted to that form, or {}. Raises
    DataError for a file that is damaged, unfinished or would run code.
    """
    folder = Path(folder)
    path = folder / 'meta.json'
    if not path.is_file():
        path = folder / 'meta.pkl'
        return load_meta_pickle(path) if path.is_file() else {}
    try:
        meta = json.loads(path.read_text(encoding='utf-8-sig')) # editors may add a byte order mark
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): prepare the dataset again; {how_to_prepare(folder)}") from None
    if not isinstance(meta, dict):
        raise DataError(f"{path} holds a {type(meta).__name__} instead of an object; {how_to_prepare(folder)}")
    if meta.get('unfinished'):
        raise DataError(f"{folder}: preparing this dataset was interrupted; {how_to_prepare(folder)}")
    if meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
        raise DataError(f"{path}: dtype is {meta['dtype']!r}, but must be uint16 or uint32")
    check_count(path, 'vocab_size', meta.get('vocab_size', 1), minimum=1)
    tokens = meta.get('tokens', {})
    if not isinstance(tokens, dict):
        raise DataError(f"{path}: tokens is {tokens!r}, but must give a count for each split")
    for split, count in tokens.items():
        check_count(path, f'tokens of {split}', count, minimum=0)
    return meta


def check_count(path, name, value, minimum):
    if type(value) is not int or value < minimum: # not isinstance, since True is not a count
        raise DataError(f"{path}: {name} is {value!r}, but must be a whole number from {minimum} up")


class PlainUnpickler(pickle.Unpickler):
    """Builds only containers, strings and numbers. A pickle that names a class or function is refused."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_meta_pickle(path):
    """nanoGPT's meta.pkl (vocab_size, stoi, itos), converted to the form of meta.json."""
    data = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # pickle's memo is an array: a few bytes that name entry 2**32 would make it allocate 64 GB
            if opcode.name.endswith('PUT') and int(argument) > len(data):
                raise pickle.UnpicklingError(f"memo entry {argument} in {len(data)} bytes")
        raw = PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error: # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is refused ({str(error) or type(error).__name__}): only plain containers, strings and "
                        "numbers are read from a pickle; prepare the dataset again to get a meta.json") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path} holds a {type(raw).__name__} instead of a dict")
    meta = {}
    if 'vocab_size' in raw:
        check_count(path, 'vocab_size', raw['vocab_size'], minimum=1)
        meta['vocab_size'] = raw['vocab_size']
    stoi = raw.get('stoi')
    if isinstance(stoi, dict) and all(isinstance(c, str) and len(c) == 1 for c in stoi):
        by_id = {i: c for c, i in stoi.items() if type(i) is int}
        if sorted(by_id) == list(range(len(stoi))): # otherwise the meaning of the ids is unknown
            meta.update(tokenizer='char', characters=''.join(by_id[i] for i in range(len(by_id))))
            meta.setdefault('vocab_size', len(by_id))
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# Token files

HEADER_BYTES = 256 * 4
# magic number -> (version, dtype) of llm.c's files: for GPT-2, which modded-nanogpt has too, and for Llama 3
HEADERS = {20240520: (1, '<u2'), 20240801: (7, '<u4')}


class Shard(NamedTuple):
    path: str
    dtype: np.dtype
    start: int # byte offset of the first token
    n_tokens: int
    mask: str | None = None # path of a file with one byte per token; 0: not a training target


def open_shard(path, dtype):
    """Opens a file as a Shard and checks its size. dtype is used for a file without a header."""
    size = os.path.getsize(path)
    if size == 0:
        raise DataError(f"{path} is empty; {how_to_prepare(path.parent)}")
    start = 0
    header = np.fromfile(path, '<i4', 3) if size >= 12 else ()
    if len(header) and int(header[0]) in HEADERS:
        version, dtype = HEADERS[int(header[0])]
        if header[1] != version:
            raise DataError(f"{path}: its header says version {header[1]}, but only version {version} is known: "
                            "get or write the file again")
        dtype, start = np.dtype(dtype), HEADER_BYTES
        expected = start + int(header[2]) * dtype.itemsize
        if size != expected or header[2] < 1:
            raise DataError(f"{path}: its header says {header[2]} tokens, which makes {expected} bytes, but the file "
                            f"has {size}: get or write the file again")
    elif size % dtype.itemsize:
        raise DataError(f"{path}: {size} bytes are not a whole number of {dtype.name} tokens, so the file is cut short "
                        f"or not a token file; {how_to_prepare(path.parent)}")
    n_tokens, mask = (size - start) // dtype.itemsize, path.with_suffix('.mask')
    if mask.is_file() and mask.stat().st_size != n_tokens:
        raise DataError(f"{mask}: {mask.stat().st_size} bytes are not one for each of the {n_tokens} tokens of "
                        f"{path.name}; {how_to_prepare(path.parent)}")
    return Shard(str(path), dtype, start, n_tokens, str(mask) if mask.is_file() else None)


def check_width(shard):
    """DataError if the numbers in a file are wider than dtype: every other token is then a high half."""
    tokens = map_tokens(shard)[:1 << 16]
    low, high = tokens[0::2], tokens[1::2]
    if len(high) < 16 or low.max() == 0 or high.max() > low.max() // 256: # high halves are 0, or small for large ids
        return
    bits = 8 * shard.dtype.itemsize * (2 if tokens[2::4].max() else 4)
    way_out = ('say so in meta.json, as {"dtype": "uint32"}' if bits == 32 else
               'write them as uint16, or as uint32 with a meta.json that says {"dtype": "uint32"}')
    raise DataError(f"{shard.path}: every other token is {'0' if high.max() == 0 else 'below 256'}, so these look like "
                    f"numbers of {bits} bits, and they would be read as {shard.dtype.name}: {way_out}")


def map_file(path, dtype, start, n):
    """n numbers of a file as a memory map. DataError if it has become too short, as reading a map beyond the end of its
    file would kill the process with SIGBUS.
    """
    if os.path.getsize(path) < start + n * np.dtype(dtype).itemsize:
        raise DataError(f"{path} has become shorter while in use: start again when it is complete")
    return np.memmap(path, dtype, 'r', start, (n,))


def map_tokens(shard, windows=False):
    """
    The tokens of a shard as a memory map, opened anew for each batch. Every page read through a map counts as memory of
    this process until the map is closed, so a map that stays open looks like a memory leak. windows: only short, random
    pieces are read.
    """
    tokens = map_file(shard.path, shard.dtype, shard.start, shard.n_tokens)
    # the kernel would read megabytes ahead for each window; for a small file that helps, as it is soon in memory
    if windows and shard.n_tokens > 1e8 and hasattr(mmap, 'MADV_RANDOM'):
        tokens.base.madvise(mmap.MADV_RANDOM)
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Splits and their batches

def split_files(folder, splits=('train', 'val')):
    """{split: sorted names of its token files}. DataError for a file that is in two splits, or twice in one."""
    there = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith('.'))
    names = {split: [name for name in there if re.fullmatch(rf'(.+_)?{split}(_.+)?\.bin', name)]
             for split in splits}
    first = {} # resolved path -> the first split and name for it
    for split, name in ((split, name) for split in splits for name in names[split]):
        other_split, other = first.setdefault(os.path.realpath(folder / name), (split, name))
        if other != name:
            raise DataError(f"{folder}: {other} and {name} are the same file: remove one of them")
        if other_split != split:
            raise DataError(f"{folder}: {name} has the name of both splits: rename it, so that it is of one")
    return names


def odd_masks(splits):
    """One line for each problem with the masks of the splits: a missing mask, or a mask that nothing reads."""
    shards = [shard for split in splits for shard in split.shards]
    masked = [shard.mask for shard in shards if shard.mask]
    bare = [os.path.basename(shard.path) for shard in shards if masked and not shard.mask]
    lines = [f"{first_few(bare, 4)}: no mask, so every token is a target, unlike in {masked[0]}"] if bare else []
    folders = dict.fromkeys(split.folder for split in splits)
    unused = [path for folder in folders for path in sorted(folder.glob('*.mask'))
              if not path.with_suffix('.bin').exists()] # as a sealed split's file does
    return lines + [f"{path} is not read: there is no {path.stem}.bin" for path in unused]


class Split:
    """
    One split ('train', 'val' or 'test') of a dataset folder.

    shards      list of Shard, sorted by name
    n_tokens    total over all shards
    meta        the folder's metadata (load_meta)
    vocab_size  every id must be below it; from meta, and not checked if meta has none

    Opening takes a few system calls per shard, whatever its size. Raises DataError for missing or damaged files.
    """
    def __init__(self, folder, split):
        folder = Path(folder)
        self.folder, self.split = folder, split
        if not folder.is_dir():
            raise DataError(f"there is no dataset folder {folder}; {how_to_prepare(folder)}")
        self.meta = load_meta(folder)
        self.vocab_size = self.meta.get('vocab_size')
        names = split_files(folder, dict.fromkeys(('train', 'val', split)))[split]
        if not names:
            flags = ' --test_fraction=0.1' if split == 'test' else ''
            raise DataError(f"there is no {split}.bin (and no {split}_*.bin) in {folder}; "
                            f"{how_to_prepare(folder, flags)}")
        if f'{split}.bin' in names and len(names) > 1:
            other = next(name for name in names if name != f'{split}.bin')
            raise DataError(f"{folder} holds both {split}.bin and {other}: one of them is left from another "
                            "preparation, remove it")
        wide = (self.vocab_size or 0) > 65536 # more ids than 16 bits have
        dtype = np.dtype('<u4' if self.meta.get('dtype', 'uint32' if wide else 'uint16') == 'uint32' else '<u2')
        self.shards = [open_shard(folder / name, dtype) for name in names]
        if split not in self.meta.get('tokens', {}): # otherwise the number of tokens, or a header, shows the width
            for shard in self.shards:
                if not shard.start:
                    check_width(shard)
        self.sizes = np.array([shard.n_tokens for shard in self.shards], dtype=np.int64)
        self.n_tokens = int(self.sizes.sum())
        promised = self.meta.get('tokens', {}).get(split, self.n_tokens)
        if promised != self.n_tokens:
            raise DataError(f"{folder}: meta.json promises {promised} tokens of {split}, but the files have "
                            f"{self.n_tokens}; {how_to_prepare(folder)}")

    def batch(self, first_sample, batch_size, block_size, sampling='random', seed=1337, stride=None):
        """
        Samples first_sample ... first_sample + batch_size - 1 of a run as (x, y). Both are int64 (batch_size,
        block_size), and y is x shifted by one token. Samples are numbered over all steps, micro-batches and ranks, so a
        batch is a pure function of the arguments: each rank takes a range of numbers, and resuming needs no state.

        'random'  each sample is drawn from all windows, with replacement
        'epoch'   the split is cut into n windows of `stride` tokens (None: block_size). Samples k*n ... k*n+n-1 visit
                  each window once, in a different order in each epoch. If block_size is below stride, only the first
                  tokens of each window are used, so block_size may vary within an epoch.
        """
        sample = np.arange(first_sample, first_sample + batch_size, dtype=np.uint64)
        key = splitmix(np.uint64(seed % (1 << 64)))
        if sampling == 'random':
            counts = np.maximum(self.sizes - block_size, 0)
            total = self.sum_windows(counts, block_size)
            window = splitmix(key + sample * GOLDEN_GAMMA) % np.uint64(total)
            shard, offset = locate(window, counts)
        elif sampling == 'epoch':
            stride = stride or block_size
            if block_size > stride:
                raise DataError(f"block_size {block_size} is beyond the stride of the windows, {stride}")
            counts = (self.sizes - 1) // stride
            total = self.sum_windows(counts, stride)
            epoch, position = np.divmod(sample, np.uint64(total))
            shard, index = locate(permute(position, total, splitmix(key + epoch * GOLDEN_GAMMA)), counts)
            offset = index * stride
        else:
            raise DataError(f"unknown sampling {sampling!r}: it must be random or epoch")
        return self.read(shard, offset, block_size)

    def count_targets(self, first_sample, batch_size, block_size, **order):
        """Number of targets in that batch: all tokens except those that are masked."""
        if not any(shard.mask for shard in self.shards):
            return batch_size * block_size
        return int((self.batch(first_sample, batch_size, block_size, **order)[1] >= 0).sum())

    def fixed_batches(self, n_windows, batch_size, block_size):
        """
        Yields (x, y) like batch, but the same ones at every call: up to n_windows windows, evenly spaced over the
        split. They do not overlap, so a small split gives fewer. The last batch may be smaller.
        """
        counts = (self.sizes - 1) // block_size
        total = self.sum_windows(counts, block_size)
        wanted = min(n_windows, total)
        chosen = np.arange(wanted, dtype=np.int64) * total // wanted
        for i in range(0, wanted, batch_size):
            shard, index = locate(chosen[i:i + batch_size], counts)
            yield self.read(shard, index * block_size, block_size)

    def all_batches(self, batch_size, block_size):
        """
        Yields (x, y) over the whole split. Each token is a target once, except the first of each shard: it has no
        predecessor. If the last window of a shard is short, x is padded with 0 and y with -1.
        """
        counts = -(-(self.sizes - 1) // block_size)
        total = self.sum_windows(counts, 1)
        for i in range(0, total, batch_size):
            shard, index = locate(np.arange(i, min(i + batch_size, total), dtype=np.int64), counts)
            yield self.read(shard, index * block_size, block_size, pad=True)

    def scan(self, vocab_size, progress=None):
        """
        Reads the whole split and returns the number of tokens. Raises DataError at the first id that is not below
        vocab_size. progress is called with the number of tokens read since its last call.
        """
        step = 1 << 22
        for shard in self.shards:
            for offset in range(0, shard.n_tokens, step):
                tokens = map_tokens(shard)[offset:offset + step]
                check_ids(shard, offset, tokens, vocab_size)
                if progress:
                    progress(len(tokens))
        return self.n_tokens

    def fingerprint(self):
        """Hash of the shards' names, dtypes and full contents, and of their masks. Each file is read only once."""
        parts = [[os.path.basename(shard.path), shard.dtype.name, kept_hash(shard.path),
                  shard.mask and kept_hash(shard.mask)] for shard in self.shards]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def sum_windows(self, counts, length):
        """Sum of counts, the number of windows per shard. DataError if there are none: every shard is too short."""
        total = int(counts.sum())
        if total == 0:
            longest = int(self.sizes.max())
            shorter = f"set block_size below {longest}, or " if longest > 1 else ""
            raise DataError(f"{self.folder}: the longest token file of {self.split} has {longest} tokens, but a window "
                            f"and its targets take {length + 1}: {shorter}prepare more data")
        return total

    def read(self, shards, offsets, block_size, pad=False):
        """(x, y) of the windows at these offsets in these shards. pad: windows may extend past the end of a shard."""
        x = np.zeros((len(shards), block_size), dtype=np.int64)
        y = np.full_like(x, -1)
        maps = {shard: map_tokens(self.shards[shard], windows=True) for shard in set(shards.tolist())}
        masks = {shard: map_file(self.shards[shard].mask, np.uint8, 0, self.shards[shard].n_tokens)
                 for shard in maps if self.shards[shard].mask}
        for row, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist())):
            n = min(block_size, len(maps[shard]) - 1 - offset) if pad else block_size
            tokens = maps[shard][offset:offset + n + 1]
            if self.vocab_size:
                check_ids(self.shards[shard], offset, tokens, self.vocab_size)
            x[row, :n], y[row, :n] = tokens[:-1], tokens[1:]
            if shard in masks:
                y[row, :n][masks[shard][offset + 1:offset + n + 1] == 0] = -1
        return x, y


HASHES = '.hashes.json' # in the dataset's folder


def hash_file(path):
    """Hash of a whole file."""
    digest, buffer = hashlib.blake2b(digest_size=16), bytearray(1 << 20)
    with open(path, 'rb', buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(memoryview(buffer)[:n])
    return digest.hexdigest()


def kept_hash(path):
    """
    The hash of a dataset's file. The dataset's folder caches it with the file's size and times, so the file is read
    only once; if the folder is not writable, the hash is computed each time.
    """
    path = Path(path)
    kept, about = path.with_name(HASHES), path.stat()
    key = f'{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} '
    known = {}
    with suppress(OSError, ValueError, TypeError): # none yet, or damaged
        known = dict(json.loads(kept.read_text(encoding='utf-8')))
    if str(known.get(path.name)).startswith(key):
        return known[path.name].removeprefix(key)
    digest = hash_file(path)
    # a file this new may change again within the resolution of its timestamp
    if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > 2e9:
        new = path.with_name(f'{HASHES}.{os.getpid()}.tmp')
        with suppress(OSError):
            new.write_text(json.dumps(known | {path.name: key + digest}), encoding='utf-8')
            os.replace(new, kept)
        with suppress(OSError):
            new.unlink()
    return digest


def check_ids(shard, offset, tokens, vocab_size):
    """DataError if any of the tokens is not below vocab_size. offset: position of the first one in the shard."""
    if tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise DataError(f"{shard.path}: token {offset + at} is {tokens[at]}, but vocab_size is {vocab_size}: the file "
                        "is damaged or belongs to another tokenizer, prepare the dataset again")


def locate(index, counts):
    """Converts an index over all shards' items to (shard, index in the shard), where shard i has counts[i] items."""
    index = np.asarray(index).astype(np.int64)
    ends = np.cumsum(counts)
    shard = np.searchsorted(ends, index, side='right')
    return shard, index - (ends - counts)[shard]


GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix(z):
    """One step of SplitMix64 (Steele, Lea and Flood 2014), a scrambling bijection of uint64. z may be an array."""
    z = np.atleast_1d(z) + GOLDEN_GAMMA # always an array: numpy warns of overflow in scalars only
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(position, n, key):
    """
    Image of `position` under a pseudorandom permutation of range(n) selected by `key`. Both are uint64 arrays of one
    shape. There is no table, so an epoch of 10**9 windows costs no memory. A Feistel network permutes the next power of
    four. Values outside the range are permuted again until they are inside (cycle walking: at most four rounds on
    average).
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = position.copy()
    todo = np.arange(len(position))
    while len(todo):
        left, right = result[todo] >> half, result[todo] & mask
        for i in range(6):
            left, right = right, left ^ (splitmix(splitmix(key[todo] + np.uint64(i)) ^ right) & mask)
        result[todo] = (left << half) | right
        todo = todo[result[todo] >= np.uint64(n)]
    return result


def prefetch(make, first, depth=2):
    """
    Yields make(first), make(first + 1), ... forever. A thread computes up to `depth` of them ahead. An exception in
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
    # also called at interpreter exit: daemon threads freeze then, and from Python 3.13 on a join never returns
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
