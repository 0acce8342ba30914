"""
Tokenizers: text to token ids and back.

A tokenizer is described by plain values, which lie in a dataset's meta.json and in checkpoints:

    {"tokenizer": "char", "characters": "..."} | {"tokenizer": "bytes"} | {"tokenizer": "tiktoken", "encoding": "gpt2"}
"""
from functools import cached_property

import numpy as np

from data.tokens import DataError

EOT = '<|endoftext|>'


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
    special = {} # id -> text, of the special tokens

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
        return list(text.encode('utf-8', errors='replace')) # a lone surrogate, as from a bad argv, becomes '?'

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
        if name not in tiktoken.list_encoding_names(): # also keeps names that are paths or addresses away from it
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
            except KeyError: # some encodings have gaps in front of their special tokens
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
