"""
Any text dataset on the Hugging Face Hub, streamed: only the tokens are stored on disk.

    python data/hub/prepare.py --source=roneneldan/TinyStories
    python data/hub/prepare.py --source=roneneldan/TinyStories --tokenizer=bpe --vocab_size=4096 --out=stories
    python data/hub/prepare.py --source=json --data_files="mine/*.jsonl" --out=mine

After an interruption, the same command continues where it stopped.
"""
import hashlib
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, explain_errors
from data.stream import open_stream, split_at, texts_of, write_shards
from data.tokenizers import JsonTokenizer, choose_tokenizer, warn_of_changes
from data.tokens import DataError, dataset_folder
from data.writer import settings_for_text, summarize

source = '' # name on the Hub, as USER/NAME; json or parquet: local files, see data_files
subset = '' # which subset, if the dataset has several
field = 'text' # the field of a document that holds its text
tokenizer = 'gpt2' # a tiktoken encoding; bytes; a path of a tokenizer.json; bpe: byte-level BPE, trained on part of it
vocab_size = 4096 # vocabulary size for bpe
bpe_documents = 20_000 # documents to train bpe on, without the held-out ones
max_tokens = 0 # stop after this many; 0: take all
val_fraction = 0.0005 # fraction of the documents to hold out: every 2000th (0, 0.5]
test_fraction = 0.0 # fraction of the training documents to seal: tests/compare.py --confirm alone reads it [0, 1)
n_threads = 8 # threads for tokenizing
revision = '' # git revision on the Hub; refs/convert/parquet: the automatic copy as parquet files
data_files = '' # local files, if source is json or parquet; may be a pattern with *
out = '' # dataset to write: a name in data/, or a folder; '': the name on the Hub
configure(globals())

# number of GPT-2 tokens, to predict the disk space
EXPECTED = {('Skylion007/openwebtext', ''): 9_040_000_000, ('HuggingFaceFW/fineweb-edu', 'sample-10BT'): 9_950_000_000,
            ('HuggingFaceFW/fineweb-edu', 'sample-100BT'): 99_500_000_000,
            ('HuggingFaceFW/fineweb-edu', 'sample-350BT'): 350_000_000_000}


def train_tokenizer():
    texts = islice(texts_of(open_stream(source, subset, revision, data_files), field), bpe_documents)
    try:
        texts = (text for text in texts if text is not None)
        return JsonTokenizer.train((text for i, text in enumerate(texts)
                                    if split_at(i, val_fraction, test_fraction) == 'train'), vocab_size)
    except KeyError as error:
        raise DataError(f"the documents {error.args[0]}") from None


explain_errors()
if not source:
    raise DataError("which dataset? give its name on the hub, as in --source=roneneldan/TinyStories")
codec = train_tokenizer() if tokenizer == 'bpe' else choose_tokenizer(tokenizer)
warn_of_changes(codec)
if codec.eot is None:
    raise DataError(f"tokenizer={tokenizer} has no token that ends a document: take another")
# everything that determines the output: a run with another vocabulary must not continue these files
of_bpe = dict(vocab_size=vocab_size, bpe_documents=bpe_documents) if tokenizer == 'bpe' else {}
job = dict(source=source, subset=subset, revision=revision, data_files=data_files, field=field, tokenizer=tokenizer,
           **of_bpe, vocabulary=hashlib.sha256(codec.json.encode()).hexdigest() if hasattr(codec, 'json') else '',
           val_fraction=val_fraction, test_fraction=test_fraction, max_tokens=max_tokens)
out = out or Path(source).name
expected = EXPECTED.get((source, subset), 0) if tokenizer == 'gpt2' else 0
writer = write_shards(dataset_folder(out), open_stream(source, subset, revision, data_files), job, codec, field,
                      expected, max_tokens, val_fraction, n_threads, test_fraction)
summarize(writer, 'config/text.py', out, **settings_for_text(writer), out_dir=f'out-{Path(out).name}')
