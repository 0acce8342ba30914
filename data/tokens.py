"""
Token files and tokenizers: what the prepare scripts write, and what train.py and sample.py read.

A dataset is a folder with one token file a split (train.bin, val.bin) or any number of shards (train_*.bin, val_*.bin;
a prefix as in fineweb_train_000001.bin is fine too), and meta.json:

    {"dtype": "uint16", "vocab_size": 65, "tokenizer": "char", "characters": "...", "tokens": {"train": n, "val": n}}

Token files are bare little-endian ids. nanoGPT's files are read as they are, with or without their meta.pkl, and so are
the shards of llm.c and modded-nanogpt, which begin with a header.

Everything here is numpy and the standard library. Whatever is wrong with a file raises DataError, a ValueError whose
message is one line that holds the value and the way out.
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
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
EOT = '<|endoftext|>'


class DataError(ValueError):
    """Something is wrong with a dataset, a token file or a tokenizer."""


# ---------------------------------------------------------------------------------------------------------------------
# dataset folders and their metadata

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
    if type(value) is not int or value < minimum:   # not isinstance: True is no count
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
    except Exception as error:   # damaged pickles raise nearly anything: IndexError, KeyError, UnicodeDecodeError...
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
        if sorted(by_id) == list(range(len(stoi))):   # in any other form, what the ids mean stays unknown
            meta.update(tokenizer='char', characters=''.join(by_id[i] for i in range(len(by_id))))
            meta.setdefault('vocab_size', len(by_id))
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

class Tokenizer:
    """
    Text to token ids and back.

    name        'char', 'bytes' or the name of a tiktoken encoding
    vocab_size  number of ids
    eot         id of <|endoftext|>, or None
    """
    name = None
    vocab_size = 0
    eot = None
    special = {}   # id -> text, of the special tokens

    def _encode(self, text):
        raise NotImplementedError

    def _pieces(self):
        """The bytes of every id, in order."""
        raise NotImplementedError

    def meta(self):
        """What load_tokenizer needs to make this tokenizer again; goes to meta.json and into checkpoints."""
        raise NotImplementedError

    def encode(self, text, allow_special=True):
        """
        List of ids. '<|endoftext|>' in the text is the special token, unless allow_special is False; other special
        tokens are plain text. Raises DataError for characters that the vocabulary lacks.
        """
        if not allow_special or self.eot is None:
            return self._encode(text)
        first, *rest = text.split(EOT)
        ids = self._encode(first)
        for part in rest:
            ids.append(self.eot)
            ids.extend(self._encode(part))
        return ids

    @cached_property
    def _table(self):
        return self._pieces()

    @cached_property
    def _lengths(self):
        # one more entry, of 0 bytes, for ids that are not text: ignored targets (-1), a padded vocabulary's surplus
        lengths = np.array([len(piece) for piece in self._table] + [0], dtype=np.int64)
        lengths[list(self.special)] = 0
        return lengths

    def decode_bytes(self, ids, special=False):
        """UTF-8 bytes of the ids; special tokens are left out unless asked for. An id beyond the vocabulary: U+FFFD."""
        out = []
        for i in ids:
            i = int(i)
            if i in self.special:
                out.append(self.special[i].encode() if special else b'')
            else:
                out.append(self._table[i] if 0 <= i < len(self._table) else b'\xef\xbf\xbd')
        return b''.join(out)

    def decode(self, ids, special=False):
        """Text of the ids; invalid UTF-8 is replaced by U+FFFD."""
        return self.decode_bytes(ids, special).decode('utf-8', errors='replace')

    def n_bytes(self, ids):
        """How many UTF-8 bytes of text an array of ids is worth, for bits per byte; special tokens and -1 are 0."""
        ids = np.asarray(ids, dtype=np.int64)
        last = len(self._lengths) - 1
        return int(self._lengths[np.where((ids >= 0) & (ids < last), ids, last)].sum())


class CharTokenizer(Tokenizer):
    """One id a character, in the order of `characters`; then <|endoftext|>, if eot is True."""
    name = 'char'

    def __init__(self, characters, eot=False):
        if not isinstance(characters, str) or not characters or len(set(characters)) != len(characters):
            raise DataError('the char tokenizer needs a string of characters, each once: prepare the dataset again')
        self.characters = characters
        self.ids = {c: i for i, c in enumerate(characters)}
        self.eot = len(characters) if eot else None
        self.special = {self.eot: EOT} if eot else {}
        self.vocab_size = len(characters) + bool(eot)

    @classmethod
    def from_text(cls, texts, eot=False):
        """The sorted characters of an iterable of str. <|endoftext|> within one of the texts is a token of its own."""
        characters = set()
        for text in texts:
            if EOT in text:
                eot, text = True, text.replace(EOT, '')
            characters.update(text)
        return cls(''.join(sorted(characters)), eot)

    def _encode(self, text):
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            unknown = sorted(set(text) - self.ids.keys())
            more = f' and {len(unknown) - 10} more' if len(unknown) > 10 else ''
            raise DataError(f'the vocabulary of {len(self.characters)} characters lacks '
                            f'{", ".join(repr(c) for c in unknown[:10])}{more}: leave them out, or prepare the data '
                            f'with another tokenizer (bytes can write anything)') from None

    def _pieces(self):
        return [c.encode('utf-8', 'replace') for c in self.characters] + [EOT.encode()] * (self.eot is not None)

    def meta(self):
        meta = {'tokenizer': 'char', 'vocab_size': self.vocab_size, 'characters': self.characters}
        return meta if self.eot is None else {**meta, 'eot': True}


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and 256 for <|endoftext|>."""
    name = 'bytes'
    vocab_size = 257
    eot = 256
    special = {256: EOT}

    def _encode(self, text):
        return list(text.encode('utf-8', errors='replace'))   # a lone surrogate, as from a bad argv, becomes '?'

    def _pieces(self):
        return [bytes([i]) for i in range(256)] + [EOT.encode()]

    def meta(self):
        return {'tokenizer': 'bytes', 'vocab_size': 257}


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's own encodings, by name: gpt2, cl100k_base, o200k_base..."""

    def __init__(self, name):
        try:
            import tiktoken
        except ImportError:
            raise DataError(f'the tokenizer {name!r} needs tiktoken: pip install tiktoken') from None
        if name not in tiktoken.list_encoding_names():   # also keeps names that are paths or addresses away from it
            raise DataError(f'unknown tokenizer {name!r}: it is none of char, bytes, '
                            f'{", ".join(tiktoken.list_encoding_names())}')
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as error:
            raise DataError(f'cannot get the vocabulary of {name!r}, which tiktoken downloads once ({error}): connect, '
                            'or set TIKTOKEN_CACHE_DIR to a folder that has it') from None
        self.name = name
        self.vocab_size = self.encoding.n_vocab
        self.special = {self.encoding.encode_single_token(s): s for s in self.encoding.special_tokens_set}
        self.eot = next((i for i, s in self.special.items() if s == EOT), None)

    def _encode(self, text):
        return self.encoding.encode_ordinary(text)

    def _pieces(self):
        pieces = []
        for i in range(self.vocab_size):
            try:
                pieces.append(self.encoding.decode_single_token_bytes(i))
            except KeyError:   # some encodings have gaps in front of their special tokens
                pieces.append(b'\xef\xbf\xbd')
        return pieces

    def meta(self):
        return {'tokenizer': 'tiktoken', 'encoding': self.name, 'vocab_size': self.vocab_size}


def load_tokenizer(meta):
    """The tokenizer that a meta dict describes, or None where it names none. Opens no file that meta could name."""
    name = meta.get('tokenizer')
    if name is None:
        return None
    if name == 'char':
        return CharTokenizer(meta.get('characters'), bool(meta.get('eot')))
    if name == 'bytes':
        return ByteTokenizer()
    if name == 'tiktoken':
        return TiktokenTokenizer(meta.get('encoding'))
    raise DataError(f'unknown tokenizer {name!r} in the metadata: it must be char, bytes or tiktoken')


# ---------------------------------------------------------------------------------------------------------------------
# reading

_HEADER_BYTES = 256 * 4
# magic -> (version, dtype), of llm.c's data files for GPT-2 (and modded-nanogpt's) and for Llama 3
_HEADERS = {20240520: (1, '<u2'), 20240801: (7, '<u4')}


class Shard(NamedTuple):
    path: str
    dtype: np.dtype
    start: int      # byte at which the tokens begin
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
                tokens = self._read(shard, offset, min(step, shard.n_tokens - offset))
                self._check(shard, offset, tokens, vocab_size)
                if progress:
                    progress(len(tokens))
        return self.n_tokens

    def fingerprint(self):
        """A hash of the shards' names and sizes and of the ends of their tokens: tells one dataset from another, at once."""
        digest = hashlib.sha256()
        for shard in self.shards:
            n = min(4096, shard.n_tokens)
            digest.update(f'{os.path.basename(shard.path)} {shard.n_tokens} '.encode())
            digest.update(self._read(shard, 0, n).tobytes() + self._read(shard, shard.n_tokens - n, n).tobytes())
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
        for row, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist())):
            shard = self.shards[shard]
            n = min(block_size, shard.n_tokens - 1 - offset) if pad else block_size
            tokens = self._read(shard, offset, n + 1)
            if self.vocab_size:
                self._check(shard, offset, tokens, self.vocab_size)
            x[row, :n], y[row, :n] = tokens[:-1], tokens[1:]
        return x, y

    def _read(self, shard, offset, n):
        # Opening the file for each window (13 us for 1025 tokens) costs more than a memory map that stays open (3 us),
        # but pages read through such a map count as this process's memory until it ends: with a large dataset it seems
        # to leak, and limits on memory kill it. A new map for each window (22 us) is slower than this.
        tokens = np.fromfile(shard.path, shard.dtype, n, offset=shard.start + offset * shard.dtype.itemsize)
        if len(tokens) != n:
            raise DataError(f'{shard.path} has become shorter while in use: start again when it is complete')
        return tokens

    def _check(self, shard, offset, tokens, vocab_size):
        if tokens.max() >= vocab_size:
            at = int(np.argmax(tokens >= vocab_size))
            raise DataError(f'{shard.path}: token {offset + at} is {tokens[at]}, but vocab_size is {vocab_size}: the '
                            'file is damaged or belongs to another tokenizer, prepare the dataset again')


def _locate(index, counts):
    """Index over all shards' items -> (shard, index in the shard), where shard i has counts[i] items."""
    index = np.asarray(index).astype(np.int64)
    ends = np.cumsum(counts)
    shard = np.searchsorted(ends, index, side='right')
    return shard, index - (ends - counts)[shard]


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z):
    """Splitmix64's finalizer (Steele, Lea and Flood 2014), a bijection of uint64 that scatters; of arrays too."""
    z = np.atleast_1d(z) + _GAMMA   # an array even for one value: numpy warns of overflow in scalars only
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
    # called when Python ends, too: in the teardown after that daemon threads stand still, and from 3.13 on a join never returns
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


# ---------------------------------------------------------------------------------------------------------------------
# writing

class Writer:
    """
    Writes a dataset folder:

        with Writer(folder, tokenizer) as out:
            out.write('train', ids)   # list or array of ids, as often as needed
            out.write('val', ids)

    Everything goes to *.tmp files, and takes the place of what the folder held before when the block ends without an
    exception; after an exception the folder is as it was. If the process is killed in the moment of replacing, the
    folder is marked as unfinished, which load_meta refuses.

    shard_tokens  None: one file a split; else shards of that many tokens, train_000000.bin...
    job           a dict of plain values that describes what is written: then an interruption keeps the *.tmp files, and
                  a Writer for the same job goes on from the last out.save(state) (out.state is that state, or None).
    """

    def __init__(self, folder, tokenizer, shard_tokens=None, job=None):
        self.folder, self.tokenizer, self.shard_tokens, self.job = Path(folder), tokenizer, shard_tokens, job
        self.dtype = np.dtype('<u2' if tokenizer.vocab_size <= 65536 else '<u4')
        self.tokens = {'train': 0, 'val': 0}
        self.n_bytes = 0   # of text, in both splits
        self.state = None
        self._files = {}   # split -> the file that is being written

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.job is not None and self._progress_path.is_file():
            self._resume()
        else:
            self._remove_temporary()
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files.values():
                file.close()
            if self.job is None:
                self._remove_temporary()

    def write(self, split, ids):
        """Appends ids to a split, 'train' or 'val'."""
        ids = np.asarray(ids)
        if len(ids) == 0:
            return
        if ids.min() < 0 or ids.max() >= self.tokenizer.vocab_size:
            raise DataError(f'id {ids.max()} is outside the vocabulary of {self.tokenizer.vocab_size}')
        self.n_bytes += self.tokenizer.n_bytes(ids)
        ids = ids.astype(self.dtype)
        while len(ids):
            room = len(ids)
            if self.shard_tokens:
                room = self.shard_tokens - self.tokens[split] % self.shard_tokens
            self._file(split).write(ids[:room].data)
            self.tokens[split] += min(room, len(ids))
            ids = ids[room:]
            if self.shard_tokens and self.tokens[split] % self.shard_tokens == 0:
                self._sync(self._files[split])
                self._files.pop(split).close()

    def save(self, state):
        """Makes what is written so far outlast an interruption; `state` is any plain value to go on from."""
        for file in self._files.values():
            self._sync(file)
        self.state = state
        progress = {'job': self.job, 'shard_tokens': self.shard_tokens, 'state': state, 'tokens': self.tokens,
                    'n_bytes': self.n_bytes}
        self._write_json(self._progress_path, progress)

    @property
    def _progress_path(self):
        return self.folder / 'progress.json.tmp'

    def _names(self, split):
        if not self.shard_tokens:
            return [f'{split}.bin']
        return [f'{split}_{i:06d}.bin' for i in range(-(-self.tokens[split] // self.shard_tokens))]

    def _file(self, split):
        if split not in self._files:
            name = f'{split}.bin'
            if self.shard_tokens:
                name = f'{split}_{self.tokens[split] // self.shard_tokens:06d}.bin'
            self._files[split] = open(self.folder / f'{name}.tmp', 'ab')   # appends: see _resume
        return self._files[split]

    def _resume(self):
        progress = json.loads(self._progress_path.read_text(encoding='utf-8'))
        if progress['job'] != self.job or progress['shard_tokens'] != self.shard_tokens:
            changed = [f'{key}={progress["job"].get(key)!r}' for key in self.job
                       if progress['job'].get(key) != self.job[key]] or ['another shard size']
            raise DataError(f'{self.folder} holds an unfinished preparation with {", ".join(changed)}: repeat those '
                            f'settings to finish it, or delete {self.folder / "*.tmp"} to start again')
        self.state, self.tokens, self.n_bytes = progress['state'], progress['tokens'], progress['n_bytes']
        kept = []
        for split, count in self.tokens.items():
            for i, name in enumerate(self._names(split)):
                path = self.folder / f'{name}.tmp'
                if not path.exists() and (self.folder / name).exists():
                    os.replace(self.folder / name, path)   # interrupted within _finish, after this one was renamed
                tokens = min(self.shard_tokens, count - i * self.shard_tokens) if self.shard_tokens else count
                if not path.exists() or path.stat().st_size < tokens * self.dtype.itemsize:
                    raise DataError(f'{path} is missing or has lost its end: delete '
                                    f'{self.folder / "*.tmp"} to start again')
                os.truncate(path, tokens * self.dtype.itemsize)   # what came after the last save is done again
                kept.append(path)
        for path in self.folder.glob('*.bin.tmp'):
            if path not in kept:
                path.unlink()

    def _finish(self):
        for split, count in self.tokens.items():
            if count == 0:
                raise DataError(f'{self.folder}: the {split} split is empty: give more text, or another val_fraction')
        for file in self._files.values():
            self._sync(file)
            file.close()
        meta = self.folder / 'meta.json'
        names = [name for split in self.tokens for name in self._names(split)]
        self._write_json(meta, {'unfinished': True})
        for name in names:
            os.replace(self.folder / f'{name}.tmp', self.folder / name)
        for path in self.folder.glob('*.bin'):
            if path.name not in names and re.fullmatch(r'(train|val)(_\d+)?\.bin', path.name):
                path.unlink()   # left over from an earlier preparation with other shards
        self._write_json(meta, {'dtype': self.dtype.name, **self.tokenizer.meta(), 'tokens': self.tokens})
        self._progress_path.unlink(missing_ok=True)

    def _remove_temporary(self):
        for path in [*self.folder.glob('*.bin.tmp'), *self.folder.glob('*.json.tmp')]:
            path.unlink(missing_ok=True)

    @staticmethod
    def _sync(file):
        file.flush()
        os.fsync(file.fileno())

    def _write_json(self, path, value):
        new = path.with_name(path.name + '.new.json.tmp')
        with open(new, 'w', encoding='utf-8') as file:
            json.dump(value, file, indent=1)
            self._sync(file)
        os.replace(new, path)


def summarize(out, command):
    """Prints what a prepare script ends with: the numbers of a finished Writer and the command to run next."""
    print(f'train has {out.tokens["train"]:,} tokens, val has {out.tokens["val"]:,}')
    print(f'vocab_size {out.tokenizer.vocab_size:,} ({out.tokenizer.name}), '
          f'{out.n_bytes / sum(out.tokens.values()):.2f} bytes a token')
    print(f'written to {out.folder}')
    print(f'next: {command}')


def fraction(key):
    """A number in [0, 1) that looks random and depends on the string alone: what is held out stays so on every run."""
    return int.from_bytes(hashlib.sha256(key.encode('utf-8', 'surrogatepass')).digest()[:8], 'big') / 2 ** 64
