"""
FineWeb-Edu (huggingface.co/datasets/HuggingFaceFW/fineweb-edu), its sample of 10 billion tokens, in GPT-2's tokens:
9,672,101 documents, about 9.95 billion tokens. Every 2000th document is held out, about 5 million tokens. Takes 20 GB
of disk, and keeps nothing else.

The text is streamed, which takes hours. After an interruption, the same command goes on where it stopped.

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --max_tokens=100_000_000     the first 100 million tokens
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
source = 'HuggingFaceFW/fineweb-edu' # name on the hub; json or parquet: local files, see data_files
subset = 'sample-10BT' # or sample-100BT, sample-350BT, a crawl such as CC-MAIN-2024-10
revision = '' # git revision on the hub; refs/convert/parquet: the automatic copy as parquet files
data_files = '' # local files, if source is json or parquet; may be a pattern with *
out = 'fineweb_edu' # dataset to write: a name in data/, or a folder
configure(globals())

EXPECTED = {'sample-10BT': 9_950_000_000, 'sample-100BT': 99_500_000_000, 'sample-350BT': 350_000_000_000}

with exit_on_error():
    if not 0 < val_fraction <= 0.5:
        raise DataError(f"val_fraction is {val_fraction}, but must be above 0 and at most 0.5")
    job = dict(source=source, subset=subset, revision=revision, data_files=data_files, encoding=encoding,
               val_fraction=val_fraction, max_tokens=max_tokens)
    writer = write_shards(dataset_folder(out), open_stream(source, subset, revision, data_files), job, encoding,
                          EXPECTED.get(subset, 0), max_tokens, val_fraction, n_threads)
    summarize(writer, f'torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --dataset={out}')
