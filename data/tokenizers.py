"""
Tokenizers: text to token ids and back.

Plain values describe a tokenizer. They lie in a dataset's meta.json and in checkpoints:

    {"tokenizer": "char", "characters": "..."} | {"tokenizer": "bytes"} | {"tokenizer": "tiktoken", "encoding": "gpt2"}
    | {"tokenizer": "tokenizers", "json": "..."}, what Hugging Face's library of that name has in its tokenizer.json
    | {"tokenizer": "pictures", "height": 8, "width": 8, "palette": [[0], [255]]}: see data/pictures.py
"""
import json
import re
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

    name        'char', 'bytes', 'tokenizers' or the name of a tiktoken encoding
    vocab_size  number of ids
    eot         id of <|endoftext|>, or None
    special     id -> text of the special tokens

    A subclass has these, and encode_ordinary(text), token_bytes (a list of the bytes of every id) and meta(), which
    returns what load_tokenizer needs to make this tokenizer again.
    """
    eot = None
    special = {}
    unit = 'byte' # of bits per byte

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

    def encode_batch(self, texts, n_threads=1):
        """A list of ids for each text; special tokens are plain text."""
        return [self.encode_ordinary(text) for text in texts]

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

    def encode_batch(self, texts, n_threads=1):
        return self.encoding.encode_ordinary_batch(texts, num_threads=n_threads)

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


def import_tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise DataError("this tokenizer needs Hugging Face's library: pip install tokenizers") from None
    return tokenizers


class JsonTokenizer(Tokenizer):
    """
    Hugging Face's tokenizers, of the text of a tokenizer.json: byte-level BPE as GPT-2's, or one that falls back to
    bytes as Llama's. DataError for a damaged one, and for one that cannot write every text.
    """
    name = 'tokenizers'
    ENDS = (EOT, '<|end_of_text|>', '</s>', '<eos>') # what ends a document, the first that there is

    def __init__(self, text):
        library = import_tokenizers()
        try:
            self.fast, self.parts = library.Tokenizer.from_str(text), json.loads(text)
        except Exception as error: # the library raises nothing more special
            raise DataError(f"the tokenizer's JSON is damaged ({error}): take another tokenizer.json") from None
        self.json = text
        self.byte_level = '"ByteLevel"' in json.dumps(self.parts.get('decoder'))
        if not (self.byte_level or self.parts['model'].get('byte_fallback')):
            raise DataError("this tokenizer.json has neither byte-level tokens nor a fallback to bytes, so that it "
                            "cannot write every text: take another one")
        self.fast.no_truncation()
        self.fast.no_padding()
        self.fast.encode_special_tokens = True # as text: encode puts the real ones in
        self.vocab_size = 1 + max(self.fast.get_vocab(with_added_tokens=True).values())
        added = self.fast.get_added_tokens_decoder()
        self.special = {i: token.content for i, token in added.items() if token.special}
        self.eot = next((i for end in self.ENDS for i, token in self.special.items() if token == end), None)

    @classmethod
    def open(cls, path):
        try:
            with open(path, encoding='utf-8') as file:
                return cls(file.read())
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8: take another tokenizer.json") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-level BPE of vocab_size ids, of an iterable of strings."""
        library = import_tokenizers()
        if vocab_size < 257:
            raise DataError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and {EOT}")
        fast = library.Tokenizer(library.models.BPE())
        fast.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT], show_progress=False,
                                              initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
        fast.train_from_iterator((text.encode('utf-8', 'replace').decode() for text in texts), trainer)
        return cls(fast.to_str())

    @staticmethod
    def byte_characters():
        """{character: byte}: GPT-2 writes bytes that are no printable characters as others."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def encode_ordinary(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts, n_threads=1): # its threads are the library's own business: RAYON_NUM_THREADS
        # a lone surrogate, as from a bad argv, becomes '?'
        texts = [text.encode('utf-8', 'replace').decode() for text in texts]
        # fast: without each token's place in the text, which takes a third of the time
        return [encoded.ids for encoded in self.fast.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def token_bytes(self):
        byte_of = self.byte_characters()
        tokens, added = [], self.fast.get_added_tokens_decoder()
        for i in range(self.vocab_size):
            token = self.special.get(i) or self.fast.id_to_token(i)
            if token is None: # a gap
                tokens.append(NOT_TEXT)
            elif i in added:
                tokens.append(token.encode())
            elif self.byte_level:
                tokens.append(bytes(byte_of[c] for c in token))
            elif byte := re.fullmatch('<0x([0-9A-F]{2})>', token):
                tokens.append(bytes.fromhex(byte[1]))
            else:
                tokens.append(token.replace('\u2581', ' ').encode())
        return tokens

    def meta(self):
        return {'tokenizer': 'tokenizers', 'vocab_size': self.vocab_size, 'json': self.json}


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
    if name == 'tokenizers' and isinstance(meta.get('json'), str):
        return JsonTokenizer(meta['json'])
    if name == 'pictures':
        from data.pictures import PictureTokenizer
        return PictureTokenizer(meta.get('height'), meta.get('width'), meta.get('palette'))
    raise DataError(f"unknown tokenizer {name!r} in the metadata: it must be char, bytes, tiktoken, tokenizers or "
                    "pictures")


def check_round_trip(tokenizer, text, ids):
    """DataError if the ids of a text do not give it back, such as without its capitals or with a space before it."""
    if tokenizer.decode_bytes(ids, special=True).decode('utf-8', 'replace') != text:
        raise DataError(f"the tokenizer {tokenizer.name!r} does not give back the text that it encodes: take another")


def choose_tokenizer(name):
    """The tokenizer that needs no text: bytes, the path of a tokenizer.json, or the name of a tiktoken encoding."""
    if name == 'bytes':
        return ByteTokenizer()
    return JsonTokenizer.open(name) if name.endswith('.json') else TiktokenTokenizer(name)
