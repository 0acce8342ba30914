"""Streams a dataset of the Hugging Face Hub into token shards, for data/hub/prepare.py."""
import shutil
from contextlib import closing
from itertools import islice

from tqdm import tqdm

from data.tokenizers import check_round_trip, gives_back
from data.tokens import DataError, prefetch
from data.writer import Writer, split_of

SHARD_TOKENS = 100_000_000
BATCH = 1024 # documents tokenized at once
SAVE_EVERY = 50 # batches between the points at which an interrupted run can continue


def open_stream(source, subset, revision, data_files):
    """A streaming dataset from the Hub, or from local files (source 'json' and data_files)."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("this dataset comes through the library of Hugging Face's hub: pip install datasets") from None
    try:
        return load_dataset(source, subset or None, revision=revision or None, data_files=data_files or None,
                            split='train', streaming=True)
    except RuntimeError as error: # the library raises this for datasets that are Python scripts
        raise DataError(f"{source} cannot be opened ({error}): try its copy as parquet files, with "
                        "--revision=refs/convert/parquet") from None
    except Exception as error: # no such dataset, no network, a damaged file...
        raise DataError(f"{source} cannot be opened ({type(error).__name__}: {error}): check its name on "
                        "huggingface.co/datasets, its --subset, and the network") from None


def check_disk(folder, needed, bytes_per_token):
    """Prints how many bytes are needed and free. DataError if there is not enough space."""
    free = shutil.disk_usage(folder).free
    print(f"needs about {needed / 1e9:.1f} GB of disk in {folder}, where {free / 1e9:.1f} GB are free")
    if needed > free:
        raise DataError(f"{folder} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed: make room, or "
                        f"take less with --max_tokens={int(free * 0.9) // bytes_per_token}")


def texts_of(documents, field):
    """Yields the text of each document, or None if it has none."""
    for document in documents:
        if not isinstance(document.get(field, 0), str | None):
            raise KeyError(f"have no text in a field {field!r}, but {', '.join(map(repr, document))}: name it with "
                           "--field=NAME")
        yield document[field]


def read_batches(stream, field, n_documents):
    """
    Yields (texts, state of the stream after them). A thread reads ahead. n_documents is the number of documents read
    earlier, for the error message that says where reading stopped.
    """
    all_texts = texts_of(stream, field)

    def next_batch(i):
        return list(islice(all_texts, BATCH)), stream.state_dict()

    with closing(prefetch(next_batch, 0)) as batches:
        while True:
            try:
                texts, state = next(batches)
            except KeyError as error:
                raise DataError(f"the documents {error.args[0]}") from None
            except Exception as error: # anything from the network to a damaged parquet file
                raise DataError(f"reading stopped after {n_documents} documents ({type(error).__name__}: {error}): "
                                "give the same command again to go on") from error
            if not texts:
                return
            yield texts, state
            n_documents += len(texts)


def split_at(i, val_fraction, test_fraction):
    """The split of document i: every 1/val_fraction-th is held out."""
    return 'val' if i % round(1 / val_fraction) == 0 else split_of(str(i), 0, test_fraction)


def write_shards(folder, stream, job, tokenizer, field, expected_tokens, max_tokens, val_fraction, n_threads,
                 test_fraction=0.0):
    """
    Tokenizes the documents of `stream` in order, ends each with <|endoftext|>, and holds out every 1/val_fraction-th.
    Stops at max_tokens (0: takes all). expected_tokens is their number (0: unknown), to estimate the disk space needed.
    Returns the finished Writer.

    `job` is a dict of the settings that determine the output. An interrupted run with the same job continues where it
    stopped.
    """
    with Writer(folder, tokenizer, SHARD_TOKENS, job, test_fraction=test_fraction) as out:
        n_documents, n_empty, n_changed, total = 0, 0, 0, sum(out.tokens.values())
        if out.state:
            n_documents = out.state['documents']
            n_empty, n_changed = out.state['empty'], out.state['changed']
            stream.load_state_dict(out.state['stream'])
            print(f"going on after {n_documents:,} documents and {total:,} tokens")
        wanted = max_tokens or expected_tokens
        if wanted:
            check_disk(folder, max(0, wanted - total) * out.dtype.itemsize, out.dtype.itemsize)
        bar = tqdm(total=wanted or None, initial=total, unit='tok', unit_scale=True, disable=None)
        with bar, closing(read_batches(stream, field, n_documents + n_empty)) as batches:
            for n_batches, (texts, state) in enumerate(batches, 1):
                ids, before, n_read = {split: [] for split in out.tokens}, total, len(texts)
                # lone surrogates, which JSON can contain, become ? as everywhere
                texts = [text.encode('utf-8', 'replace').decode() for text in texts if text is not None]
                n_empty += n_read - len(texts)
                documents = tokenizer.encode_batch(texts, n_threads)
                for text, document in zip(texts, documents):
                    if n_documents < BATCH: # refuse early changes; later ones only count, to keep hours of work
                        check_round_trip(tokenizer, text, document)
                    n_changed += not gives_back(tokenizer, text, document)
                    document.append(tokenizer.eot)
                    ids[split_at(n_documents, val_fraction, test_fraction)].extend(document)
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
                    out.save(dict(documents=n_documents, empty=n_empty, changed=n_changed, stream=state))
    print(f"{n_documents:,} documents")
    if n_empty:
        print(f"skipped: {n_empty:,} documents without text, whose {field!r} is null")
    if n_changed:
        print(f"warning: the tokenizer has changed the text of {n_changed:,} documents")
    return out
