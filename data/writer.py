"""Writes dataset folders, which data/tokens.py reads: what the prepare scripts share."""
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from data.tokens import DataError


class Writer:
    """
    Writes a dataset folder:

        with Writer(folder, tokenizer) as out:
            out.write('train', ids) # list or array of ids, as often as needed
            out.write('val', ids)

    Everything goes to *.tmp files, and takes the place of what the folder held before when the block ends without an
    exception; after an exception the folder is as it was. If the process is killed in the moment of replacing, the
    folder is marked as unfinished, which load_meta refuses.

    shard_tokens  None: one file a split; else shards of that many tokens, train_000000.bin...
    job           a dict of plain values that describes what is written: then an interruption keeps the *.tmp files, and
                  a Writer for the same job goes on from the last out.save(state) (out.state is that state, or None).
    """

    def __init__(self, folder, tokenizer, shard_tokens=None, job=None):
        self.folder, self.tokenizer, self.shard_tokens, self.job = Path(folder), tokenizer, shard_tokens, job
        self.dtype = np.dtype('<u2' if tokenizer.vocab_size <= 65536 else '<u4')
        self.tokens = {'train': 0, 'val': 0}
        self.n_bytes = 0 # of text, in both splits
        self.state = None
        self._files = {} # split -> the file that is being written

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.job is not None and self._progress_path.is_file():
            self._resume()
        else:
            self._remove_temporary()
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files.values():
                file.close()
            if self.job is None:
                self._remove_temporary()

    def write(self, split, ids):
        """Appends ids to a split, 'train' or 'val'."""
        ids = np.asarray(ids)
        if len(ids) == 0:
            return
        if ids.min() < 0 or ids.max() >= self.tokenizer.vocab_size:
            raise DataError(f'id {ids.max()} is outside the vocabulary of {self.tokenizer.vocab_size}')
        self.n_bytes += self.tokenizer.n_bytes(ids)
        ids = ids.astype(self.dtype)
        while len(ids):
            room = len(ids)
            if self.shard_tokens:
                room = self.shard_tokens - self.tokens[split] % self.shard_tokens
            self._file(split).write(ids[:room].data)
            self.tokens[split] += min(room, len(ids))
            ids = ids[room:]
            if self.shard_tokens and self.tokens[split] % self.shard_tokens == 0:
                self._sync(self._files[split])
                self._files.pop(split).close()

    def save(self, state):
        """Makes what is written so far outlast an interruption; `state` is any plain value to go on from."""
        for file in self._files.values():
            self._sync(file)
        self.state = state
        progress = {'job': self.job, 'shard_tokens': self.shard_tokens, 'state': state, 'tokens': self.tokens,
                    'n_bytes': self.n_bytes}
        self._write_json(self._progress_path, progress)

    @property
    def _progress_path(self):
        return self.folder / 'progress.json.tmp'

    def _names(self, split):
        if not self.shard_tokens:
            return [f'{split}.bin']
        return [f'{split}_{i:06d}.bin' for i in range(-(-self.tokens[split] // self.shard_tokens))]

    def _file(self, split):
        if split not in self._files:
            name = f'{split}.bin'
            if self.shard_tokens:
                name = f'{split}_{self.tokens[split] // self.shard_tokens:06d}.bin'
            self._files[split] = open(self.folder / f'{name}.tmp', 'ab') # appends: see _resume
        return self._files[split]

    def _resume(self):
        progress = json.loads(self._progress_path.read_text(encoding='utf-8'))
        if progress['job'] != self.job or progress['shard_tokens'] != self.shard_tokens:
            changed = [f'{key}={progress["job"].get(key)!r}' for key in self.job
                       if progress['job'].get(key) != self.job[key]] or ['another shard size']
            raise DataError(f'{self.folder} holds an unfinished preparation with {", ".join(changed)}: repeat those '
                            f'settings to finish it, or delete {self.folder / "*.tmp"} to start again')
        self.state, self.tokens, self.n_bytes = progress['state'], progress['tokens'], progress['n_bytes']
        kept = []
        for split, count in self.tokens.items():
            for i, name in enumerate(self._names(split)):
                path = self.folder / f'{name}.tmp'
                if not path.exists() and (self.folder / name).exists():
                    os.replace(self.folder / name, path) # interrupted within _finish, after this one was renamed
                tokens = min(self.shard_tokens, count - i * self.shard_tokens) if self.shard_tokens else count
                if not path.exists() or path.stat().st_size < tokens * self.dtype.itemsize:
                    raise DataError(f'{path} is missing or has lost its end: delete '
                                    f'{self.folder / "*.tmp"} to start again')
                os.truncate(path, tokens * self.dtype.itemsize) # what came after the last save is done again
                kept.append(path)
        for path in self.folder.glob('*.bin.tmp'):
            if path not in kept:
                path.unlink()

    def _finish(self):
        for split, count in self.tokens.items():
            if count == 0:
                raise DataError(f'{self.folder}: the {split} split is empty: give more text, or another val_fraction')
        for file in self._files.values():
            self._sync(file)
            file.close()
        meta = self.folder / 'meta.json'
        names = [name for split in self.tokens for name in self._names(split)]
        self._write_json(meta, {'unfinished': True})
        for name in names:
            os.replace(self.folder / f'{name}.tmp', self.folder / name)
        for path in self.folder.glob('*.bin'):
            if path.name not in names and re.fullmatch(r'(train|val)(_\d+)?\.bin', path.name):
                path.unlink() # left over from an earlier preparation with other shards
        self._write_json(meta, {'dtype': self.dtype.name, **self.tokenizer.meta(), 'tokens': self.tokens})
        self._progress_path.unlink(missing_ok=True)

    def _remove_temporary(self):
        for path in [*self.folder.glob('*.bin.tmp'), *self.folder.glob('*.json.tmp')]:
            path.unlink(missing_ok=True)

    @staticmethod
    def _sync(file):
        file.flush()
        os.fsync(file.fileno())

    def _write_json(self, path, value):
        new = path.with_name(path.name + '.new.json.tmp')
        with open(new, 'w', encoding='utf-8') as file:
            json.dump(value, file, indent=1)
            self._sync(file)
        os.replace(new, path)


def summarize(out, command):
    """Prints what a prepare script ends with: the numbers of a finished Writer and the command to run next."""
    print(f'train has {out.tokens["train"]:,} tokens, val has {out.tokens["val"]:,}')
    print(f'vocab_size {out.tokenizer.vocab_size:,} ({out.tokenizer.name}), '
          f'{out.n_bytes / sum(out.tokens.values()):.2f} bytes a token')
    print(f'written to {out.folder}')
    print(f'next: {command}')


def fraction(key):
    """A number in [0, 1) that looks random and depends on the string alone: what is held out stays so on every run."""
    return int.from_bytes(hashlib.sha256(key.encode('utf-8', 'surrogatepass')).digest()[:8], 'big') / 2 ** 64
