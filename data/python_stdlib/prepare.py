"""
The source text of the running interpreter's own standard library, as bytes: nothing to download, real input everywhere.

A tenth of the files is held out whole, chosen by their names, so that it is the same on every machine and version.
Python 3.11 gives 10.35 million training tokens and 1.01 million for validation (other versions differ), in a second.

    python data/python_stdlib/prepare.py
"""
import os
import sys
import sysconfig
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, exit_on_error
from data.tokenizers import ByteTokenizer
from data.tokens import DataError, dataset_folder
from data.writer import Writer, fraction, summarize

val_fraction = 0.1 # share of the files that are held out
max_bytes = 0 # stop after that many bytes of source; 0: take all of it
out = 'python_stdlib' # dataset to write: a name in data/, or a folder
configure(globals())

# pydoc_data is prose in one file that would be nearly half of the held-out bytes
SKIPPED = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__', 'pydoc_data'}


def sources(root):
    """Paths of the library's .py files below root, in the same order everywhere."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith('.py'))


with exit_on_error():
    root = Path(sysconfig.get_path('stdlib'))
    files = list(sources(root))
    if not files:
        raise DataError(f'no .py files in {root}: this interpreter has its library elsewhere, run another one')
    tokenizer = ByteTokenizer()
    with Writer(dataset_folder(out), tokenizer) as writer:
        for path in tqdm(files, unit='file', disable=None):
            name = path.relative_to(root).as_posix()
            split = 'val' if fraction(name) < val_fraction else 'train'
            text = path.read_text(encoding='utf-8', errors='replace')
            writer.write(split, tokenizer.encode(text, allow_special=False) + [tokenizer.eot])
            if max_bytes and writer.n_bytes >= max_bytes:
                break
    summarize(writer, 'python train.py config/quick.py')
