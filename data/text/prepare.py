"""
Your own text: files or folders of plain text, or of jsonl with the text in one field.

    python data/text/prepare.py --input=book.txt
    python data/text/prepare.py --input=notes/,more.jsonl --tokenizer=gpt2 --out=notes
    python data/text/prepare.py --input=book.txt --tokenizer=bpe --vocab_size=4096      a vocabulary of its own
    python train.py config/text.py --dataset=notes --out_dir=out-notes

A document is a file or a line of jsonl, and <|endoftext|> within them begins another one. If there are several
documents, <|endoftext|> ends each of them in the output. Of many documents, whole ones are held out for validation. Of
few, the end of each file is. The text is read twice, in pieces, so it may be larger than memory. Line ends stay as they
are.
"""
import codecs
import json
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, exit_on_error
from data.tokenizers import EOT, CharTokenizer, JsonTokenizer, check_round_trip, choose_tokenizer
from data.tokens import DataError, dataset_folder
from data.writer import Writer, fraction, summarize

input = '' # files and folders, separated by commas
tokenizer = 'bytes' # bytes: UTF-8; char: an id for each character in the text; bpe: byte-level BPE trained on the text;
    # one of tiktoken: gpt2, o200k_base...; or the path of a tokenizer.json
vocab_size = 4096 # ids of bpe
val_fraction = 0.1 # fraction of the text to hold out
field = 'text' # the field of a line of jsonl that holds the text
suffixes = '.txt,.md,.jsonl' # which files to take from folders
out = 'text' # dataset to write: a name in data/, or a folder
configure(globals())

CHUNK = 1 << 22 # bytes to read at once


def find_files(names, suffixes):
    """
    -> (paths of the named files, and of those in named folders in the order of their names; what was skipped there).
    """
    files, skipped = [], []
    for name in filter(None, names):
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            there = sorted(p for p in path.rglob('*') if p.is_file())
            found = [p for p in there if p.suffix.lower() in suffixes]
            skipped += [p for p in there if p.suffix.lower() not in suffixes]
            if not found:
                raise DataError(f"no {' '.join(sorted(suffixes))} files in {path}: name others with --suffixes=.a,.b")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"there is no file or folder {path}: give one with --input=PATH")
    if not files:
        raise DataError("which text? give files or folders with --input=PATH,PATH")
    return files, skipped


def bad_utf8(path, offset):
    return DataError(f"{path} is not UTF-8 at byte {offset}: save it as UTF-8, or leave it out")


def read_plain(path, progress):
    """Yields (piece of text, whether a document ends after it)."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    position, buffer, final = 0, '', False
    with open(path, 'rb') as file:
        while not final:
            data = file.read(CHUNK)
            final = not data
            pending = len(decoder.getstate()[0]) # bytes of a character that the chunk before has cut
            try:
                buffer += decoder.decode(data, final)
            except UnicodeDecodeError as error:
                raise bad_utf8(path, position - pending + error.start) from None
            if position == 0:
                buffer = buffer.removeprefix('\ufeff')
            position += len(data)
            progress(len(data))
            *documents, buffer = buffer.split(EOT)
            yield from ((document, True) for document in documents)
            cut = place_to_cut(buffer)
            yield buffer[:cut], False
            buffer = buffer[cut:]
    yield buffer, True


def place_to_cut(text):
    """
    Where the text can be tokenized in two parts: after a newline between words, which no BPE token crosses. Long text
    without such a place is cut near its end, but not within an <|endoftext|> that may have begun there.
    """
    at = len(text)
    while (at := text.rfind('\n', 0, at)) > 0:
        if re.match(r'\S\n[^\s/]', text[at - 1:at + 2]):
            return at + 1
    return max(0, len(text) - len(EOT)) if len(text) > 4 * CHUNK else 0


def read_jsonl(path, progress):
    """Yields (piece of text, whether a document ends after it)."""
    position = 0
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    text = json.loads(line.decode('utf-8'))[field]
                    yield from ((document, True) for document in text.split(EOT))
            except UnicodeDecodeError as error:
                raise bad_utf8(path, position + error.start) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is not JSON ({error}): correct it, or leave it out") from None
            except (KeyError, TypeError, AttributeError):
                raise DataError(f"{path}, line {number} has no text in a field {field!r}: "
                                "name it with --field=NAME") from None
            position += len(line)
            progress(len(line))


def read(files, label):
    """Yields (path, piece of text, whether a document ends after it), without empty documents and pieces."""
    begun = False # part of the current document has come; its end may come alone, with an empty piece
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit='B', unit_scale=True, desc=label, disable=None) as bar:
        for path in files:
            for text, ends in (read_jsonl if path.suffix.lower() == '.jsonl' else read_plain)(path, bar.update):
                text = text.encode('utf-8', 'replace').decode() # jsonl can have halves of characters
                begun = begun or bool(text)
                if text or begun and ends:
                    yield path, text, ends
                begun = begun and not ends


def read_parts(label):
    """Yields ({split: piece of text}, whether a document ends after it)."""
    position, document = dict.fromkeys(files, 0), 0
    for path, text, ends in read(files, label):
        if by_document:
            yield {'val' if fraction(str(document)) < val_fraction else 'train': text}, ends
        else: # the end of each file is held out
            here = max(0, int(lengths[path] * (1 - val_fraction)) - position[path])
            yield {'train': text[:here], 'val': text[here:]}, ends
        position[path] += len(text)
        document += ends


def first_few(paths):
    names = [str(path) for path in paths[:8]]
    return ', '.join(names) + (f" and {len(paths) - 8:,} more" if len(paths) > 8 else '')


with exit_on_error():
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}, but must be between 0 and 1")
    codec = choose_tokenizer(tokenizer) if tokenizer not in ('char', 'bpe') else None
    files, skipped = find_files(input.split(','), set(suffixes.lower().split(',')))

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
    elif tokenizer == 'bpe': # of what is trained on alone
        codec = JsonTokenizer.train((parts.get('train', '') for parts, _ in read_parts('vocabulary')), vocab_size)
    if several and codec.eot is None:
        raise DataError(f"tokenizer={tokenizer} has no token that ends a document: one of "
                        f"{', '.join(JsonTokenizer.ENDS)} is needed for several")

    written = set() # splits that have a part of the document
    with Writer(dataset_folder(out), codec) as writer:
        for parts, ends in read_parts('writing'):
            for split, part in parts.items():
                ids = codec.encode(part)
                if sum(writer.tokens.values()) < 1e6: # the first million tokens show it
                    check_round_trip(codec, part, ids)
                writer.write(split, ids)
                written |= {split} if part else set()
            if ends and several:
                for split in sorted(written):
                    writer.write(split, [codec.eot])
            written = set() if ends else written
    print(f"read {len(files):,} file{'s' if len(files) > 1 else ''}: {first_few(files)}")
    if skipped:
        print(f"skipped, for their suffixes: {first_few(skipped)}; --suffixes names what is taken")
    print(f"{n_documents:,} document{'s' if several else ''}, {n_characters:,} characters; held out: "
          f"{'whole documents' if by_document else 'the end of each file' if len(files) > 1 else 'the end'}")
    # config/text.py takes 2,048 tokens a step; small texts are seen 20 times, large ones for some minutes
    steps = max(100, min(2000, 100 * round(20 * writer.tokens['train'] / 2048 / 100)))
    summarize(writer, f'python train.py config/text.py --dataset={out} --max_iters={steps} '
                      f'--out_dir=out-{Path(out).name}')
