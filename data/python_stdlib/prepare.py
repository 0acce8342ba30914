"""
The source code of Python's standard library, as bytes. No download is needed: the running interpreter has it.

A tenth of the files is held out, selected by name, so that every machine and version holds out the same ones. Python
3.11 gives 10.35 million training tokens and 1.01 million validation tokens, in a second. Other versions differ.

    python data/python_stdlib/prepare.py
"""
import os
import sys
import sysconfig
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, explain_errors
from data.tokenizers import ByteTokenizer, read_text
from data.tokens import DataError, dataset_folder
from data.writer import Writer, split_of, summarize

val_fraction = 0.1 # fraction of the files to hold out
test_fraction = 0.0 # fraction of the training files to seal: tests/compare.py --confirm alone reads it [0, 1)
max_bytes = 0 # stop after this many bytes of source; 0: take all
out = 'python_stdlib' # dataset to write: a name in data/, or a folder
configure(globals())

# pydoc_data is one file of prose, and would be nearly half of the held-out bytes
SKIPPED = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__', 'pydoc_data'}


def sources(root):
    """Paths of the library's .py files below root, in the same order everywhere."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith('.py'))


explain_errors()
root = Path(sysconfig.get_path('stdlib'))
files = list(sources(root))
if not files:
    raise DataError(f"no .py files in {root}: this interpreter has its library elsewhere, run another one")
tokenizer = ByteTokenizer()
with Writer(dataset_folder(out), tokenizer, test_fraction=test_fraction) as writer:
    for path in tqdm(files, unit='file', disable=None):
        name = path.relative_to(root).as_posix()
        split = split_of(name, val_fraction, test_fraction)
        text = read_text(path).replace('\r\n', '\n') # the same bytes on every machine
        writer.write(split, tokenizer.encode(text, allow_special=False) + [tokenizer.eot])
        if max_bytes and writer.n_bytes >= max_bytes:
            break
summarize(writer, 'config/quick.py', out)
