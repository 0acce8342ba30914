"""A dataset as a run uses it: both splits, the tokenizer, and whether the tokens fit the weights."""
import math
from contextlib import suppress
from functools import cached_property

from tqdm import tqdm

from data.tokenizers import difference, load_tokenizer, read_argument, tokenizer_of, with_line_ends
from data.tokens import DataError, Split, dataset_folder, load_meta, odd_masks


class Dataset:
    """
    train, val  the Splits
    meta        the folder's metadata; if it names no tokenizer, that of the checkpoint

    checkpoint: that of the weights to train, {} for new weights. DataError if there is no such dataset, or if the
    weights were trained with another tokenizer (unless allow_changes).
    """
    def __init__(self, name, checkpoint, allow_changes=False):
        self.name, folder = name, dataset_folder(name)
        self.meta = load_meta(folder)
        self.train, self.val = Split(folder, 'train'), Split(folder, 'val')
        known = checkpoint.get('meta') or {}
        if (what := difference(self.meta, known)) and not allow_changes:
            fits = self.meta.get('vocab_size', 0) <= checkpoint['model_args']['vocab_size']
            raise DataError(f"dataset={name!r} has {what}: take another dataset"
                            f"{', or --allow_changes=True' if fits else ''}")
        if 'tokenizer' not in self.meta: # bare token files
            self.meta |= tokenizer_of(folder, known if 'tokenizer' in known else None)

    def __str__(self):
        what = self.meta.get('encoding') or self.meta.get('tokenizer', 'unknown tokens')
        return f'{self.name}: {self.train.n_tokens:,} tokens to train on, {self.val.n_tokens:,} to validate; {what}'

    @property
    def vocab_size(self):
        """For a new model. Large vocabularies are padded to a multiple of 64, for faster matrix products."""
        size = self.meta.get('vocab_size', 50257)
        return size if size < 1024 else math.ceil(size / 64) * 64

    def check(self, vocab_size, block_size, sampling):
        """DataError unless the tokens fit a model. Small splits are scanned now, others as they are read. Returns
        warnings about masks.
        """
        for split in (self.train, self.val):
            split.vocab_size = vocab_size # checked in every batch
            if split.n_tokens <= 1e8:
                split.scan(vocab_size)
        self.train.batch(0, 1, block_size, sampling) # long enough for a window?
        next(self.val.fixed_batches(1, 1, block_size))
        return [f'warning: {line}' for line in odd_masks((self.train, self.val))]

    def check_targets(self, batches):
        """DataError if masks leave no target in what evaluations read of a split, batches(split)."""
        for split in (self.train, self.val):
            if not any((y >= 0).any() for _, y in batches(split)):
                raise DataError(f"{split.shards[0].mask}: of the tokens of {split.split} that evaluations read, none "
                                "is a target: raise eval_iters, or prepare masks with 1 for each target")

    def scan(self, vocab_size, shown):
        """Reads all tokens. DataError at the first one that is not below vocab_size."""
        for split in (self.train, self.val):
            with tqdm(total=split.n_tokens, desc=f'scanning {split.split}', unit='token', unit_scale=True,
                      disable=not shown or None) as progress: # None: only on a terminal
                split.scan(vocab_size, progress.update)

    def fingerprints(self):
        return [split.fingerprint() for split in (self.train, self.val)]

    @cached_property
    def tokenizer(self):
        """None if the metadata names none; DataError if it is not available here."""
        return load_tokenizer(self.meta)

    def prompt(self, text):
        r"""Token ids of a text in which \n stands for a newline. DataError if it cannot be encoded."""
        if self.tokenizer is None:
            raise DataError(f"sample_tokens needs a tokenizer, and dataset={self.name!r} names "
                            "none: --sample_tokens=0")
        try:
            ids = self.tokenizer.encode(with_line_ends(read_argument(text, 'it')))
        except ValueError as e:
            raise DataError(f"sample_prompt={text!r}: {e}; or --sample_tokens=0") from None
        if not ids:
            raise DataError("sample_prompt='' is empty: give a text to continue, or --sample_tokens=0")
        return ids

    def bits(self, loss, targets):
        """Converts a mean loss over arrays of targets to bits per byte of text, or per dimension of pictures. Returns
        {name: bits}, or {} if the tokenizer is unknown or not available.
        """
        tokenizer, n_targets, n_bytes = None, 0, 0
        with suppress(DataError):
            tokenizer = self.tokenizer
        for y in targets if tokenizer else ():
            n_targets, n_bytes = n_targets + (y >= 0).sum(), n_bytes + tokenizer.n_bytes(y)
        return {f'bits_per_{tokenizer.unit}': float(loss * n_targets / n_bytes / math.log(2))} if n_bytes else {}
