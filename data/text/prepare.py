"""
Your own text: files or folders of plain text, or of JSON (one value per line, or an array) with the text in one field.

    python data/text/prepare.py --input=book.txt
    python data/text/prepare.py --input=notes/,more.jsonl --tokenizer=gpt2 --out=notes
    python data/text/prepare.py --input=book.txt --tokenizer=bpe --vocab_size=4096      trains a vocabulary
    python train.py config/text.py --dataset=notes --out_dir=out-notes

Each file or JSON value is a document (null is skipped), and <|endoftext|> in it starts another. If there are several
documents, <|endoftext|> ends each of them in the output. If there are many, whole documents are held out for
validation; if few, the end of each file. Duplicate files are used once. The text is read twice, in pieces, so it may be
larger than memory. Line ends are kept.
"""
import codecs
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, explain_errors
from data.tokenizers import (EOT, CharTokenizer, JsonTokenizer, check_round_trip, choose_tokenizer, text_pieces,
                             warn_of_changes)
from data.tokens import DataError, dataset_folder, first_few, hash_file
from data.writer import Writer, cuts, settings_for_text, split_of, summarize

input = '' # files and folders, separated by commas
tokenizer = 'bytes' # bytes: UTF-8; char: one id per character in the text; bpe: byte-level BPE trained on the text;
    # a tiktoken encoding: gpt2, o200k_base...; or the path of a tokenizer.json
vocab_size = 4096 # vocabulary size for bpe
val_fraction = 0.1 # fraction of the text to hold out (0, 1)
test_fraction = 0.0 # fraction of the training text to seal: tests/compare.py --confirm alone reads it [0, 1)
field = 'text' # the JSON field that holds the text
suffixes = '.txt,.md,.jsonl' # which files to take from folders
out = 'text' # dataset to write: a name in data/, or a folder
configure(globals())

CHUNK = 1 << 22 # bytes to read at once
JSON = ('.jsonl', '.ndjson', '.json')
without_text = set() # places of documents whose text is null


def split_names(text):
    """Splits a comma-separated list of paths. A path that itself contains commas is recognized if it exists."""
    parts, names = text.split(','), []
    while parts:
        n = next((n for n in range(len(parts), 1, -1) if os.path.exists(os.path.expanduser(','.join(parts[:n])))), 1)
        names.append(','.join(parts[:n]))
        parts = parts[n:]
    return names


def find_files(names, suffixes):
    """
    Returns (paths of the named files and of the files in named folders, sorted by name; {reason: skipped paths}).
    """
    files, left_out = [], {}
    for name in filter(None, names):
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            there = walk(path, left_out)
            found = [p for p in there if p.suffix.lower() in suffixes]
            left_out.setdefault('for their suffixes', []).extend(p for p in there if p.suffix.lower() not in suffixes)
            if not found:
                raise DataError(f"no {' '.join(sorted(suffixes))} files in {path}: name others with --suffixes=.a,.b")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"there is no file or folder {path}: give one with --input=PATH")
    if not files:
        raise DataError("which text? give files or folders with --input=PATH,PATH")
    return each_once(files, left_out), left_out


def walk(root, left_out):
    """All files below a folder, sorted, following links. Hidden files, such as editor checkpoints, are skipped."""
    files, hidden, dead, visited = [], [], [], set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in visited: # links may go in circles
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        hidden += [Path(folder, name) for name in folders + names if name.startswith('.')]
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        paths = [Path(folder, name) for name in names if not name.startswith('.')]
        files += filter(Path.is_file, paths)
        dead += [path for path in paths if not path.is_file()]
    left_out.setdefault('hidden', []).extend(sorted(hidden))
    left_out.setdefault('no files', []).extend(sorted(dead))
    return sorted(files)


def refuse(error):
    raise error


def each_once(files, left_out):
    """Drops files with the same content as an earlier one: held-out text could otherwise be trained on in the copy."""
    sizes = Counter(path.stat().st_size for path in dict.fromkeys(files))
    first = {} # content -> the first path with it
    for path in files:
        size = path.stat().st_size
        other = first.setdefault(hash_file(path) if sizes[size] > 1 and size else path.resolve(), path)
        if other is not path:
            left_out.setdefault('the same text as another', []).append(path)
    return list(first.values())


def read_plain(path, progress):
    """Yields (piece of text, whether a document ends after it)."""
    buffer = ''
    for piece in text_pieces(path, None, CHUNK, progress):
        *documents, buffer = (buffer + piece).split(EOT)
        yield from ((document, True) for document in documents)
        cut = place_to_cut(buffer)
        yield buffer[:cut], False
        buffer = buffer[cut:]
    yield buffer, True


def place_to_cut(text):
    """
    Where to cut the text for tokenizing in two parts: after a newline between words, which no BPE token crosses. Long
    text without such a place is cut near its end, but not inside an <|endoftext|> that may have started there.
    """
    at = len(text)
    while (at := text.rfind('\n', 0, at)) > 0:
        if re.match(r'\S\n[^\s/]', text[at - 1:at + 2]):
            return at + 1
    return max(0, len(text) - len(EOT)) if len(text) > 4 * CHUNK else 0


def read_json(path, progress):
    """Yields (piece of text, whether a document ends after it) from the field of each value."""
    for place, value in json_values(path, progress):
        if not isinstance(value, dict) or not isinstance(value.get(field, 0), str | None):
            raise DataError(f"{place} has no text in a field {field!r}: name it with --field=NAME")
        if value[field] is None:
            without_text.add(place)
        else:
            yield from ((document, True) for document in value[field].split(EOT))


def json_values(path, progress):
    """Yields (place, value) from jsonl, one line at a time, or from an array, which must fit into memory."""
    def parse(text, place):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is not JSON ({error}): correct it, or leave it out") from None

    with open(path, 'rb') as file:
        is_array = file.read(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b'[')
    pieces = text_pieces(path, None, CHUNK, progress, lines=not is_array)
    if is_array:
        for i, value in enumerate(parse(''.join(pieces), path), 1):
            yield f'{path}, item {i}', value
    for number, line in enumerate(pieces, 1):
        if line.strip():
            yield f'{path}, line {number}', parse(line, f'{path}, line {number}')


def read(files, label):
    """Yields (path, piece of text, whether a document ends after it), without empty documents and pieces."""
    begun = False # part of the current document was read; its end may follow with an empty piece
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit='B', unit_scale=True, desc=label, disable=None) as bar:
        for path in files:
            for text, ends in (read_json if path.suffix.lower() in JSON else read_plain)(path, bar.update):
                text = text.encode('utf-8', 'replace').decode() # jsonl may contain lone surrogates
                begun = begun or bool(text)
                if text or begun and ends:
                    yield path, text, ends
                begun = begun and not ends


def read_parts(label):
    """Yields ({split: piece of text}, whether a document ends after it)."""
    position, document = dict.fromkeys(files, 0), 0
    for path, text, ends in read(files, label):
        if by_document:
            yield {split_of(str(document), val_fraction, test_fraction): text}, ends
        else: # the end of each file is held out
            places = cuts(lengths[path], val_fraction, test_fraction)
            sealed, held_out = (max(0, place - position[path]) for place in places)
            yield {'train': text[:sealed], 'test': text[sealed:held_out], 'val': text[held_out:]}, ends
        position[path] += len(text)
        document += ends


explain_errors()
codec = choose_tokenizer(tokenizer) if tokenizer not in ('char', 'bpe') else None
if codec:
    warn_of_changes(codec)
files, left_out = find_files(split_names(input), set(suffixes.lower().split(',')))

lengths, n_documents, characters = dict.fromkeys(files, 0), 0, set() # lengths in characters
for path, text, ends in read(files, 'reading'):
    lengths[path] += len(text)
    n_documents += ends
    if tokenizer == 'char':
        characters.update(text)
n_characters = sum(lengths.values())
if n_characters == 0:
    raise DataError(f"input {input} holds no text: give other files with --input=PATH")
several = n_documents > 1
by_document = n_documents * val_fraction >= 20
if tokenizer == 'char':
    codec = CharTokenizer(''.join(sorted(characters)), eot=several)
elif tokenizer == 'bpe': # trained on the training split only
    codec = JsonTokenizer.train((parts.get('train', '') for parts, _ in read_parts('vocabulary')), vocab_size)
if several and codec.eot is None:
    raise DataError(f"tokenizer={tokenizer} has no token that ends a document: one of "
                    f"{', '.join(JsonTokenizer.ENDS)} is needed for several")

written = set() # splits that contain part of the document
with Writer(dataset_folder(out), codec, test_fraction=test_fraction) as writer:
    for parts, ends in read_parts('writing'):
        for split, part in parts.items():
            ids = codec.encode(part)
            check_round_trip(codec, part, ids)
            writer.write(split, ids)
            written |= {split} if part else set()
        if ends and several:
            for split in sorted(written):
                writer.write(split, [codec.eot])
        written = set() if ends else written
print(f"read {len(files):,} file{'s' if len(files) > 1 else ''}: {first_few([*map(str, files)])}")
for why, paths in left_out.items():
    if paths:
        print(f"skipped, {why}: {first_few([*map(str, dict.fromkeys(paths))])}")
if without_text:
    print(f"skipped, {field} is null: {first_few(sorted(without_text))}")
print(f"{n_documents:,} document{'s' if several else ''}, {n_characters:,} characters; held out: "
      f"{'whole documents' if by_document else 'the end of each file' if len(files) > 1 else 'the end'}")
# config/text.py takes 2,048 tokens per step; small texts are seen 20 times, large ones for a few minutes
steps = max(100, min(2000, 100 * round(20 * writer.tokens['train'] / 2048 / 100)))
summarize(writer, 'config/text.py', out, **settings_for_text(writer), max_iters=steps,
          out_dir=f'out-{Path(out).name}')
