"""
Tokenizers: text to token ids and back.

Plain values describe a tokenizer. They lie in a dataset's meta.json and in checkpoints:

    {"tokenizer": "char", "characters": "..."} | {"tokenizer": "bytes"} | {"tokenizer": "tiktoken", "encoding": "gpt2"}
"""
from functools import cached_property

import numpy as np

from data.tokens import DataError

EOT = '<|endoftext|>'
NOT_TEXT = '\ufffd'.encode() # bytes of an id that stands for nothing


def with_line_ends(text):
    r"""The text as it was typed, in which \n is a line end and two backslashes are one."""
    return '\\'.join(part.replace('\\n', '\n') for part in text.split('\\\\'))


class Tokenizer:
    """
    Text to token ids and back.

    name        'char', 'bytes' or the name of a tiktoken encoding
    vocab_size  number of ids
    eot         id of <|endoftext|>, or None
    special     id -> text of the special tokens

    A subclass has these, and encode_ordinary(text), token_bytes (a list of the bytes of every id) and meta(), which
    returns what load_tokenizer needs to make this tokenizer again.
    """
    eot = None
    special = {}

    def encode(self, text, allow_special=True):
        """
        List of ids. '<|endoftext|>' in the text becomes the special token, unless allow_special is False. Other special
        tokens are plain text. Raises DataError for characters that the vocabulary lacks.
        """
        if not allow_special or self.eot is None:
            return self.encode_ordinary(text)
        first, *rest = text.split(EOT)
        ids = self.encode_ordinary(first)
        for part in rest:
            ids.append(self.eot)
            ids.extend(self.encode_ordinary(part))
        return ids

    def decode_bytes(self, ids, special=False):
        """UTF-8 bytes of the ids. Special tokens are left out unless asked for. Unknown ids are U+FFFD."""
        out = []
        for i in map(int, ids):
            if i in self.special:
                out.append(self.special[i].encode() if special else b'')
            else:
                out.append(self.token_bytes[i] if 0 <= i < len(self.token_bytes) else NOT_TEXT)
        return b''.join(out)

    def decode(self, ids, special=False):
        """Text of the ids. Invalid UTF-8 is replaced by U+FFFD."""
        return self.decode_bytes(ids, special).decode('utf-8', errors='replace')

    @cached_property
    def lengths(self):
        """Bytes of every id, and one more entry of 0 for what is not text: ignored targets, a padded vocabulary."""
        lengths = np.array([len(token) for token in self.token_bytes] + [0], dtype=np.int64)
        lengths[list(self.special)] = 0
        return lengths

    def n_bytes(self, ids):
        """How many UTF-8 bytes of text the ids stand for, for bits per byte. Special tokens and -1 count as 0."""
        ids = np.asarray(ids, dtype=np.int64)
        last = len(self.lengths) - 1
        return int(self.lengths[np.where((ids >= 0) & (ids < last), ids, last)].sum())


class CharTokenizer(Tokenizer):
    """One id per character, in the order of `characters`; then <|endoftext|>, if eot is True."""
    name = 'char'

    def __init__(self, characters, eot=False):
        if not isinstance(characters, str) or not characters or len(set(characters)) != len(characters):
            raise DataError("the char tokenizer needs a string of characters, each once: prepare the dataset again")
        self.characters = characters
        self.ids = {c: i for i, c in enumerate(characters)}
        self.eot = len(characters) if eot else None
        self.special = {self.eot: EOT} if eot else {}
        self.vocab_size = len(characters) + bool(eot)

    @classmethod
    def from_text(cls, texts, eot=False):
        """Of the sorted characters in an iterable of strings. <|endoftext|> in one of them is a token of its own."""
        characters = set()
        for text in texts:
            if EOT in text:
                eot, text = True, text.replace(EOT, '')
            characters.update(text)
        return cls(''.join(sorted(characters)), eot)

    def encode_ordinary(self, text):
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            unknown = sorted(set(text) - self.ids.keys())
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise DataError(f"the vocabulary of {len(self.characters)} characters lacks "
                            f"{', '.join(repr(c) for c in unknown[:10])}{more}: leave them out, or prepare the data "
                            "with another tokenizer (bytes can write anything)") from None

    @cached_property
    def token_bytes(self):
        tokens = [c.encode('utf-8', 'replace') for c in self.characters]
        return tokens if self.eot is None else [*tokens, EOT.encode()]

    def meta(self):
        meta = {'tokenizer': 'char', 'vocab_size': self.vocab_size, 'characters': self.characters}
        return meta if self.eot is None else {**meta, 'eot': True}


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and 256 for <|endoftext|>."""
    name = 'bytes'
    vocab_size = 257
    eot = 256
    special = {256: EOT}
    token_bytes = [*(bytes([i]) for i in range(256)), EOT.encode()]

    def encode_ordinary(self, text):
        return list(text.encode('utf-8', errors='replace')) # a lone surrogate, as from a bad argv, becomes '?'

    def meta(self):
        return {'tokenizer': 'bytes', 'vocab_size': 257}


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's encodings, by name: gpt2, cl100k_base, o200k_base..."""
    def __init__(self, name):
        try:
            import tiktoken
        except ImportError:
            raise DataError(f"the tokenizer {name!r} needs tiktoken: pip install tiktoken") from None
        names = tiktoken.list_encoding_names()
        if name not in names: # tiktoken gets no name that is a path or an address
            raise DataError(f"unknown tokenizer {name!r}: it must be char, bytes or one of {', '.join(names)}")
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as error:
            raise DataError(f"cannot get the vocabulary of {name!r}, which tiktoken downloads once ({error}): connect "
                            "to the network, or set TIKTOKEN_CACHE_DIR to a folder that has it") from None
        self.name = name
        self.vocab_size = self.encoding.n_vocab
        self.special = {self.encoding.encode_single_token(s): s for s in self.encoding.special_tokens_set}
        self.eot = next((i for i, s in self.special.items() if s == EOT), None)

    def encode_ordinary(self, text):
        return self.encoding.encode_ordinary(text)

    @cached_property
    def token_bytes(self):
        tokens = []
        for i in range(self.vocab_size):
            try:
                tokens.append(self.encoding.decode_single_token_bytes(i))
            except KeyError: # some encodings have gaps before their special tokens
                tokens.append(NOT_TEXT)
        return tokens

    def meta(self):
        return {'tokenizer': 'tiktoken', 'encoding': self.name, 'vocab_size': self.vocab_size}


def load_tokenizer(meta):
    """The tokenizer that a meta dict describes; None if it names none. Opens no file that meta could name."""
    name = meta.get('tokenizer')
    if name is None:
        return None
    if name == 'char':
        return CharTokenizer(meta.get('characters'), bool(meta.get('eot')))
    if name == 'bytes':
        return ByteTokenizer()
    if name == 'tiktoken':
        return TiktokenTokenizer(meta.get('encoding'))
    raise DataError(f"unknown tokenizer {name!r} in the metadata: it must be char, bytes or tiktoken")
