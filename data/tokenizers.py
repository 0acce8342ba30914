"""
Tokenizers: text to token ids and back.

A tokenizer is described by plain values, stored in a dataset's meta.json and in checkpoints:

    {"tokenizer": "char", "characters": "..."} | {"tokenizer": "bytes"} | {"tokenizer": "tiktoken", "encoding": "gpt2"}
    | {"tokenizer": "tokenizers", "json": "..."}: the tokenizer.json of Hugging Face's library of that name
    | {"tokenizer": "pictures", "height": 8, "width": 8, "palette": [[0], [255]]}: see data/pictures.py
"""
import codecs
import io
import json
import os
import re
from contextlib import nullcontext, suppress
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path

import numpy as np

from data.tokens import DataError, Split, first_few, load_meta, split_files

EOT = '<|endoftext|>'
NOT_TEXT = '\ufffd'.encode() # bytes of an id without a meaning


def text_pieces(source, name=None, n_bytes=1 << 22, progress=None, lines=False):
    """
    Yields the text in a path or binary file, n_bytes or one line at a time. All text is read here. It must be UTF-8; a
    byte order mark is dropped, and line ends are kept. DataError for anything else, with its position; name is for that
    message. progress is called with the number of bytes of each piece.
    """
    opened = nullcontext(source) if hasattr(source, 'read') else open(source, 'rb')
    name, position, begun = name or source, 0, False
    decoder = codecs.getincrementaldecoder('utf-8')()
    with opened as file:
        while True:
            data = file.readline() if lines else file.read(n_bytes)
            if not position and is_utf16(data):
                raise DataError(f"{name} looks like UTF-16 or UTF-32, of which many bytes are 0: save it as UTF-8")
            start = position - len(decoder.getstate()[0]) # minus the bytes of a character that was cut
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise DataError(f"{name} is not UTF-8 at byte {start + error.start}: save it as UTF-8, or leave it "
                                "out") from None
            position += len(data)
            yield text if begun else text.removeprefix('\ufeff')
            begun = begun or bool(text)
            if progress:
                progress(len(data))
            if not data:
                return


def read_text(source, name=None):
    """The whole text in a path or binary file: see text_pieces."""
    return ''.join(text_pieces(source, name))


def read_argument(text, name):
    """The text of a command-line argument, decoded like a file."""
    return read_text(io.BytesIO(os.fsencode(text)), name)


def is_utf16(data):
    """Whether these first bytes look like UTF-16 or UTF-32, by a byte order mark or the zero bytes of Latin letters."""
    zeros = np.bincount(np.flatnonzero(np.frombuffer(data, np.uint8) == 0) % 2, minlength=2) # at even and odd offsets
    on_one_side = zeros.max() > max(1, len(data) / 50, 20 * zeros.min())
    return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or on_one_side or 2 * zeros.sum() > len(data)


def with_line_ends(text):
    r"""Replaces \n in typed text by a newline, and two backslashes by one."""
    return '\\'.join(part.replace('\\n', '\n') for part in text.split('\\\\'))


class Tokenizer:
    """
    Text to token ids and back.

    name        'char', 'bytes', 'tokenizers' or the name of a tiktoken encoding
    vocab_size  number of ids
    eot         id of <|endoftext|>, or None
    special     id -> text of the special tokens

    A subclass defines these, and encode_ordinary(text), token_bytes (a list of the bytes of every id) and meta(), which
    returns what load_tokenizer needs to recreate this tokenizer.
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
        """UTF-8 bytes of the ids. Special tokens are left out unless special is True. Unknown ids become U+FFFD."""
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
        """Number of bytes of every id, plus a final 0 for ids that are not text: ignored targets, padded vocabulary."""
        lengths = np.array([len(token) for token in self.token_bytes] + [0], dtype=np.int64)
        lengths[list(self.special)] = 0
        return lengths

    def n_bytes(self, ids):
        """Number of UTF-8 bytes that the ids stand for, for bits per byte. Special tokens and -1 count as 0."""
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
        """Uses the sorted characters of an iterable of strings. <|endoftext|> in them becomes a token of its own."""
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
            unknown = [*map(repr, sorted(set(text) - self.ids.keys()))]
            raise DataError(f"the vocabulary of {len(self.characters)} characters lacks {first_few(unknown, 10)}: "
                            "leave them out, or prepare the data with another tokenizer (bytes can write anything)"
                            ) from None

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
        if name not in names: # never pass a path or URL on to tiktoken
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
    A tokenizer of Hugging Face's library, from the text of a tokenizer.json: byte-level BPE as in GPT-2, or one with a
    byte fallback as in Llama. DataError if it is damaged or cannot encode every text.
    """
    name = 'tokenizers'
    ENDS = (EOT, '<|end_of_text|>', '</s>', '<eos>') # the first of these that exists ends a document

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
        self.fast.encode_special_tokens = True # as plain text: encode inserts the real ones
        self.vocab_size = 1 + max(self.fast.get_vocab(with_added_tokens=True).values())
        added = self.fast.get_added_tokens_decoder()
        self.special = {i: token.content for i, token in added.items() if token.special}
        self.eot = next((i for end in self.ENDS for i, token in self.special.items() if token == end), None)

    @classmethod
    def open(cls, path):
        text = read_text(path)
        try:
            return cls(text)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @classmethod
    def of_folder(cls, folder):
        """The tokenizer of a folder in Hugging Face's format: tokenizer.json, or the older pair of files; or None."""
        folder = Path(folder)
        if (folder / 'tokenizer.json').is_file():
            return cls.open(folder / 'tokenizer.json')
        pair = [folder / 'vocab.json', folder / 'merges.txt']
        if not all(path.is_file() for path in pair):
            return None
        library = import_tokenizers()
        try:
            fast = library.Tokenizer(library.models.BPE.from_file(*map(str, pair)))
        except Exception as error: # the library raises nothing more special
            raise DataError(f"{pair[0]} or {pair[1].name} is damaged ({error}): get them again") from None
        fast.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = library.decoders.ByteLevel()
        fast.add_special_tokens([end for end in cls.ENDS if fast.token_to_id(end) is not None])
        return cls(fast.to_str())

    @classmethod
    def train(cls, texts, vocab_size):
        """Trains byte-level BPE with vocab_size ids on an iterable of strings."""
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
        """{character: byte}: GPT-2 represents bytes that are not printable by other characters."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def encode_ordinary(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts, n_threads=1): # the library chooses its own threads: see RAYON_NUM_THREADS
        # a lone surrogate, as from a bad argv, becomes '?'
        texts = [text.encode('utf-8', 'replace').decode() for text in texts]
        try: # the fast version leaves out each token's offset in the text, a third of the time
            return [encoded.ids for encoded in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error: # the library raises nothing more specific, e.g. for a character that it lacks
            raise DataError(f"this tokenizer.json cannot write the text ({error}): take another one") from None

    @cached_property
    def token_bytes(self):
        byte_of = self.byte_characters()
        tokens, added = [], self.fast.get_added_tokens_decoder()
        for i in range(self.vocab_size):
            token = self.fast.id_to_token(i)
            if token is None: # a gap
                tokens.append(NOT_TEXT)
            elif i in added or self.byte_level and not byte_of.keys() >= set(token): # literal text
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
    """The tokenizer that a meta dict describes; None if it names none. Never opens a file named in meta."""
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


def gives_back(tokenizer, text, ids):
    """Whether the ids decode to exactly this text, not e.g. to its lower case or with a leading space."""
    return b''.join(map(tokenizer.token_bytes.__getitem__, ids)) == text.encode('utf-8', 'replace')


def check_round_trip(tokenizer, text, ids):
    """DataError with the position if the ids of a text do not decode to it."""
    if not gives_back(tokenizer, text, ids):
        other = tokenizer.decode(ids, special=True)
        at = next((i for i, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other)))
        raise DataError(f"the tokenizer {tokenizer.name!r} does not give back the text that it encodes: "
                        f"{text[at:at + 20]!r} becomes {other[at:at + 20]!r}; take another, or change the text")


TRIES = ('The CAT  sat. ', ' a\tb\r\n', 'e\u0301', '\u00e9\u00a0\u2126', '\ufb01\uff21\u200b', '\u3000\ufeff\x00\x7f')


def warn_of_changes(tokenizer):
    """Warns early that a tokenizer.json changes some texts, which may come late in the data."""
    changed = [text for text in TRIES if not gives_back(tokenizer, text, tokenizer.encode_ordinary(text))]
    if changed:
        print(f"warning: the tokenizer {tokenizer.name!r} changes some texts, such as "
              f"{', '.join(map(ascii, changed))}")


def choose_tokenizer(name):
    """A tokenizer that needs no training: bytes, the path of a tokenizer.json, or the name of a tiktoken encoding."""
    if name == 'bytes':
        return ByteTokenizer()
    return JsonTokenizer.open(name) if name.endswith('.json') else TiktokenTokenizer(name)


# ---------------------------------------------------------------------------------------------------------------------
# Which tokenizer belongs to a folder?

GPT2 = dict(tokenizer='tiktoken', encoding='gpt2')
GPT2_SIZES = (50257, 50304) # the vocabulary of GPT-2, and as padded by nanoGPT
OF_TOKENIZERS = ('tokenizer', 'encoding', 'characters', 'eot', 'json', 'height', 'width', 'palette')


def tokenizer_of(folder, known=None):
    """
    The tokenizer of a folder, as metadata; {} if unknown. The folder holds a dataset, or weights in Hugging Face's
    format. A tokenizer in the folder has priority. Bare token files are assumed to use `known`, the tokenizer of the
    weights to train, or else GPT-2's, as in nanoGPT, provided that their ids look like it. Weights without a tokenizer
    are assumed to use GPT-2's if they have its vocabulary size. DataError if the folder's own one cannot be used here.
    """
    meta = load_meta(folder)
    if 'tokenizer' in meta:
        return {key: meta[key] for key in (*OF_TOKENIZERS, 'vocab_size') if key in meta}
    own = JsonTokenizer.of_folder(folder)
    if own:
        return own.meta()
    if not split_files(Path(folder))['train']: # weights without a tokenizer
        return GPT2 if size_of_weights(folder) in GPT2_SIZES else {}
    try:
        tokenizer = load_tokenizer(known or GPT2)
    except DataError: # not available here: trust the weights, but do not guess
        return known or {}
    looks_right = meta.get('vocab_size', 1 << 32) >= tokenizer.vocab_size and wrote(tokenizer, folder)
    return (known or GPT2) if looks_right else {}


def size_of_weights(folder):
    """The vocabulary size in the config.json of a folder in Hugging Face's format, or None."""
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((Path(folder) / 'config.json').read_text(encoding='utf-8-sig')).get('vocab_size')


def wrote(tokenizer, folder):
    """Whether the ids in a folder look like this tokenizer's: decoding and encoding them again gives the same ids."""
    split = Split(folder, 'train')
    n = min(1024, int(split.sizes[0]) - 1)
    ids = split.read(np.array([0]), np.array([0]), n)[0][0].tolist()
    if max(ids) >= tokenizer.vocab_size or tokenizer.name == 'pictures':
        return max(ids) < tokenizer.vocab_size
    if tokenizer.name == 'gpt2' and max(ids) < 5000: # in any text, a tenth of the ids are larger
        return False
    text = tokenizer.decode(ids, special=True)
    if tokenizer.eot is not None:
        text = text.replace(tokenizer.special[tokenizer.eot], EOT)
    try:
        again = tokenizer.encode(text)
    except DataError: # the ids cut characters apart
        return False
    return SequenceMatcher(None, ids, again, autojunk=False).ratio() > 0.98 # wrong tokenizers reach 0.96


def difference(meta, known):
    """Describes how a dataset's tokenizer differs from that of the weights; '' if it does not, or one is unknown."""
    changed = [key for key in OF_TOKENIZERS if meta.get(key) != known.get(key)]
    if not changed or 'tokenizer' not in meta or 'tokenizer' not in known:
        return ''
    if {meta['tokenizer'], known['tokenizer']} <= {'tiktoken', 'tokenizers'}: # the same vocabulary in two formats?
        one, other = load_tokenizer(meta), load_tokenizer(known)
        if (one.token_bytes, one.eot) == (other.token_bytes, other.eot):
            return ''
    if changed[0] == 'json':
        return "another tokenizer.json than the weights were trained with"
    if changed[0] == 'eot':
        has, lacks = ('the dataset', 'the weights') if meta.get('eot') else ('the weights', 'the dataset')
        return f"another eot, the token that ends a document: in {has}, not in {lacks}"
    return f"the {changed[0]} {meta.get(changed[0])!r}, and the weights were trained with {known.get(changed[0])!r}"
