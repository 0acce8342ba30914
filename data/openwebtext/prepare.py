"""
OpenWebText (huggingface.co/datasets/Skylion007/openwebtext) in GPT-2's tokens: 8,013,769 documents, about 9.04 billion
tokens. Every 2000th document is held out, about 4.5 million tokens. Takes 18 GB of disk, and keeps nothing else.

The text is streamed, which takes hours. After an interruption, the same command goes on where it stopped.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --max_tokens=100_000_000     the first 100 million tokens
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, exit_on_error
from data.hub import open_stream, write_shards
from data.tokens import DataError, dataset_folder
from data.writer import summarize

max_tokens = 0 # stop after this many; 0: take all
val_fraction = 0.0005 # fraction of the documents to hold out
encoding = 'gpt2' # a tiktoken encoding
n_threads = 8 # threads for tokenizing
source = 'Skylion007/openwebtext' # name on the hub; json or parquet: local files, see data_files
subset = '' # which part, for a dataset that has several
revision = '' # git revision on the hub; refs/convert/parquet: the automatic copy as parquet files
data_files = '' # local files, if source is json or parquet; may be a pattern with *
out = 'openwebtext' # dataset to write: a name in data/, or a folder
configure(globals())

with exit_on_error():
    expected_tokens = 9_040_000_000 if source == 'Skylion007/openwebtext' else 0
    if not 0 < val_fraction <= 0.5:
        raise DataError(f"val_fraction is {val_fraction}, but must be above 0 and at most 0.5")
    job = dict(source=source, subset=subset, revision=revision, data_files=data_files, encoding=encoding,
               val_fraction=val_fraction, max_tokens=max_tokens)
    writer = write_shards(dataset_folder(out), open_stream(source, subset, revision, data_files), job, encoding,
                          expected_tokens, max_tokens, val_fraction, n_threads)
    summarize(writer, 'torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py')
