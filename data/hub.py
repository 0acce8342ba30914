"""Streams a dataset of the Hugging Face hub into token shards; for openwebtext and fineweb_edu."""
import shutil
from itertools import islice

from tqdm import tqdm

from data.tokenizers import TiktokenTokenizer
from data.tokens import DataError, prefetch
from data.writer import Writer

SHARD_TOKENS = 100_000_000
BATCH = 1024 # documents that are tokenized at once
SAVE_EVERY = 50 # batches between the points at which an interrupted run goes on


def open_stream(source, subset, revision, data_files):
    """A streaming dataset of the hub, or of local files: source 'json' with data_files."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError('this dataset comes through the library of Hugging Face\'s hub: pip install datasets') from None
    try:
        return load_dataset(source, subset or None, revision=revision or None, data_files=data_files or None,
                            split='train', streaming=True)
    except RuntimeError as error: # what the library raises for datasets that are Python scripts
        raise DataError(f'{source} cannot be opened ({error}): its copy as parquet files may do, with '
                        '--revision=refs/convert/parquet') from None


def write_shards(folder, stream, job, encoding, expected_tokens, max_tokens, val_fraction, n_threads):
    """
    Tokenizes the documents of `stream` and ends each with <|endoftext|>; every 1/val_fraction-th is held out. Takes
    the documents in their order until there are max_tokens (0: all). expected_tokens, where it is known (else 0), tells
    how much disk that takes. Returns the finished Writer.

    An interrupted run with the same `job` (a dict of the settings that decide what is written) goes on where it was.
    """
    tokenizer = TiktokenTokenizer(encoding)
    val_every = round(1 / val_fraction)
    with Writer(folder, tokenizer, SHARD_TOKENS, job) as out:
        n_documents, total = 0, sum(out.tokens.values())
        if out.state:
            n_documents = out.state['documents']
            stream.load_state_dict(out.state['stream'])
            print(f'going on after {n_documents:,} documents and {total:,} tokens')
        wanted = max_tokens or expected_tokens
        if wanted:
            needed = max(0, wanted - total) * out.dtype.itemsize
            free = shutil.disk_usage(folder).free
            print(f'needs about {needed / 1e9:.1f} GB of disk in {folder}, where {free / 1e9:.1f} GB are free')
            if needed > free:
                raise DataError(f'{folder} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed: make '
                                f'room, or take less with --max_tokens={int(free * 0.9) // out.dtype.itemsize}')

        iterator = iter(stream)

        def next_batch(i): # runs ahead in a thread, so each batch comes with the stream's state after it
            return [document['text'] for document in islice(iterator, BATCH)], stream.state_dict()

        batches = prefetch(next_batch, 0)
        try:
            with tqdm(total=wanted or None, initial=total, unit='tok', unit_scale=True, disable=None) as bar:
                for n_batches in range(1, 1 << 62):
                    try:
                        texts, state = next(batches)
                    except KeyError as error:
                        raise DataError(f'the documents have no field {error}, but the text is taken from it') from None
                    except Exception as error: # of many kinds, from the network to a parquet file
                        raise DataError(f'reading stopped after {n_documents} documents ({type(error).__name__}: '
                                        f'{error}): give the same command again to go on') from error
                    if not texts:
                        break
                    ids = {'train': [], 'val': []}
                    before = total
                    for document in tokenizer.encoding.encode_ordinary_batch(texts, num_threads=n_threads):
                        document.append(tokenizer.eot)
                        ids['val' if n_documents % val_every == 0 else 'train'].extend(document)
                        n_documents += 1
                        total += len(document)
                        if max_tokens and total >= max_tokens:
                            break
                    for split in ids:
                        out.write(split, ids[split])
                    bar.update(total - before)
                    if max_tokens and total >= max_tokens:
                        break
                    if n_batches % SAVE_EVERY == 0:
                        out.save({'documents': n_documents, 'stream': state})
        finally:
            batches.close()
    print(f'{n_documents:,} documents')
    return out
