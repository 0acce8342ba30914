"""Writes the dataset folders that data/tokens.py reads. All prepare scripts use it."""
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np

from data.tokens import PROJECT, DataError, Split, load_meta


def lock_folder(folder, message):
    """
    Locks a folder until this process ends, however it ends, or until os.close() of the returned descriptor. DataError
    with the message if another process holds the lock. Returns None if the folder does not exist or cannot be locked.
    """
    try:
        import fcntl
    except ImportError: # Windows
        return None
    if not os.path.isdir(folder):
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise DataError(message) from None
    except OSError: # a file system without locks
        os.close(lock)
        return None
    return lock


class Writer:
    """
    Writes a dataset folder:

        with Writer(folder, tokenizer) as out:
            out.write('train', ids) # list or array of ids, as often as needed
            out.write('val', ids)

    Everything is written to *.tmp files. When the block ends without an exception, they replace the folder's old files.
    After an exception the folder is unchanged. If the process is killed while it replaces files, the folder stays
    marked as unfinished, and load_meta refuses it.

    shard_tokens  None: one file per split; else tokens per shard (train_000000.bin...)
    job           a dict of plain values that describes the output. If given, the *.tmp files survive an interruption,
                  and a Writer with the same job continues from the last out.save(state)
    about         additional entries for meta.json: a dict of plain values
    test_fraction above 0: a third split 'test' is written too, and must not be empty
    state         the saved state to continue from, or None
    tokens        tokens written so far, by split
    n_bytes       bytes of text in all splits
    """
    def __init__(self, folder, tokenizer, shard_tokens=None, job=None, about=None, test_fraction=0.0):
        self.folder, self.tokenizer, self.shard_tokens, self.job = Path(folder), tokenizer, shard_tokens, job
        self.most = shard_tokens or 1 << 62 # tokens in a file
        self.about = about or {}
        self.dtype = np.dtype('<u2' if tokenizer.vocab_size <= 65536 else '<u4')
        self.tokens = {'train': 0, 'val': 0}
        if test_fraction:
            self.tokens['test'] = 0
        self.n_bytes = 0
        self.state = None
        self.progress = self.folder / 'progress.json.tmp'
        self.files = {} # split -> the open file
        self.masks = {} # split -> list of arrays
        self.lock = None

    def __enter__(self):
        self.refuse_if_no_place()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.folder, f"another preparation is at work in {self.folder}: wait for its end, stop "
                                             "it, or give this one a folder of its own with --out")
        try:
            if self.job is not None and self.progress.is_file():
                self.resume()
            else:
                self.remove_temporary()
        except BaseException: # __exit__ will not run
            self.unlock()
            raise
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self.finish()
        finally:
            for file in self.files.values():
                file.close()
            if self.job is None:
                self.remove_temporary()
            self.unlock()

    def unlock(self):
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None

    def refuse_if_no_place(self):
        """DataError if a dataset must not be written here: a file, a run's folder, or the folder of all datasets."""
        runs = next((name for name in ('ckpt.pt', 'best.pt', 'metrics.jsonl') if (self.folder / name).exists()), None)
        what = ('is a file' if self.folder.exists() and not self.folder.is_dir() else f'holds a run ({runs})' if runs
                else 'holds the datasets' if self.folder.resolve() == Path(__file__).resolve().parent else None)
        if what:
            raise DataError(f"{self.folder} {what}: give the dataset a folder of its own, such as --out=my_text")

    def write(self, split, ids, mask=None):
        """Appends ids to 'train', 'val' or 'test'. mask: a boolean per id, whether it is a target; not with shards."""
        ids = np.asarray(ids)
        if len(ids) == 0:
            return
        if mask is not None:
            self.masks.setdefault(split, []).append(np.asarray(mask, np.uint8))
        wrong = ids[(ids < 0) | (ids >= self.tokenizer.vocab_size)]
        if len(wrong):
            raise DataError(f"id {wrong[0]} is outside the vocabulary of {self.tokenizer.vocab_size}")
        self.n_bytes += self.tokenizer.n_bytes(ids)
        ids = ids.astype(self.dtype)
        while len(ids):
            part = ids[:self.most - self.tokens[split] % self.most]
            if split not in self.files:
                name = self.name(split, self.tokens[split] // self.most)
                self.files[split] = open(self.folder / f'{name}.tmp', 'ab') # append: a resumed file has tokens already
            self.files[split].write(part.data)
            self.tokens[split] += len(part)
            ids = ids[len(part):]
            if self.tokens[split] % self.most == 0:
                flush_to_disk(self.files[split])
                self.files.pop(split).close()

    def save(self, state):
        """Makes everything written so far survive an interruption. `state` is any plain value to continue from."""
        for file in self.files.values():
            flush_to_disk(file)
        self.state = state
        write_json(self.progress, {'job': self.job, 'shard_tokens': self.shard_tokens, 'state': state,
                                   'tokens': self.tokens, 'n_bytes': self.n_bytes})

    def name(self, split, shard):
        return f'{split}_{shard:06d}.bin' if self.shard_tokens else f'{split}.bin'

    def sizes(self):
        """{name: number of tokens} of every file written so far."""
        sizes = {}
        for split, count in self.tokens.items():
            for shard, begin in enumerate(range(0, count, self.most)):
                sizes[self.name(split, shard)] = min(self.most, count - begin)
        return sizes

    def resume(self):
        progress = json.loads(self.progress.read_text(encoding='utf-8'))
        if progress['job'] != self.job or progress['shard_tokens'] != self.shard_tokens:
            before = progress['job']
            changed = [f'{key}={before.get(key)!r}' for key in self.job if before.get(key) != self.job[key]]
            raise DataError(f"{self.folder} holds an unfinished preparation with "
                            f"{', '.join(changed) or 'another shard size'}: repeat those settings to finish it, or "
                            f"delete {self.folder / '*.tmp'} to start again")
        self.state, self.tokens, self.n_bytes = progress['state'], progress['tokens'], progress['n_bytes']
        sizes = self.sizes()
        for name, count in sizes.items():
            path, n_bytes = self.folder / f'{name}.tmp', count * self.dtype.itemsize
            if not path.exists() and (self.folder / name).exists():
                os.replace(self.folder / name, path) # finish() was interrupted after renaming this file
            if not path.exists() or path.stat().st_size < n_bytes:
                raise DataError(f"{path} is missing or has lost its end: delete {self.folder / '*.tmp'} to start again")
            os.truncate(path, n_bytes) # tokens after the last save will be written again
        for path in self.folder.glob('*.bin.tmp'):
            if path.stem not in sizes:
                path.unlink()

    def finish(self):
        for split, count in self.tokens.items():
            if count == 0:
                raise DataError(f"{self.folder}: the {split} split is empty: give more text, or another val_fraction "
                                "or test_fraction")
        for file in self.files.values():
            flush_to_disk(file)
            file.close()
        meta, names = self.folder / 'meta.json', self.sizes()
        write_json(meta, {'unfinished': True})
        for name in names:
            os.replace(self.folder / f'{name}.tmp', self.folder / name)
        for path in self.folder.glob('*.bin'):
            if path.name not in names and re.fullmatch(r'(train|val|test)(_\d+)?\.bin', path.name):
                path.unlink() # from an earlier preparation with other shards or splits
        for path in self.folder.glob('*.mask'):
            path.unlink()
        for split, masks in self.masks.items():
            np.concatenate(masks).tofile(self.folder / f'{split}.mask')
        write_json(meta, {'dtype': self.dtype.name, **self.tokenizer.meta(), **self.about, 'tokens': self.tokens})
        self.progress.unlink(missing_ok=True)

    def remove_temporary(self):
        for path in [*self.folder.glob('*.bin.tmp'), *self.folder.glob('*.json.tmp')]:
            path.unlink(missing_ok=True)


def flush_to_disk(file):
    file.flush()
    os.fsync(file.fileno())


def write_json(path, value):
    """Replaces path atomically."""
    new = path.with_name(f'{path.name}.new.json.tmp')
    with open(new, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1)
        flush_to_disk(file)
    os.replace(new, path)


def summarize(out, config, dataset, **settings):
    """Prints the end of a prepare script's output: the numbers of a finished Writer, and the command to train on it."""
    more = f", test (sealed) has {out.tokens['test']:,}" if 'test' in out.tokens else ""
    print(f"train has {out.tokens['train']:,} tokens, val has {out.tokens['val']:,}{more}")
    print(f"vocab_size {out.tokenizer.vocab_size:,} ({out.tokenizer.name}), "
          f"{out.n_bytes / sum(out.tokens.values()):.2f} bytes per token")
    print(f"written to {out.folder}")
    if min(out.tokens.values()) < 2:
        print("next: give more text, or another val_fraction or test_fraction: a split of one token has nothing to "
              "predict")
        return
    flags = ''.join(f' --{name}={shlex.quote(str(value))}' for name, value in dict(dataset=dataset, **settings).items())
    print(f"next: python train.py {config}{flags}")


def settings_for_text(out):
    """Settings that config/text.py needs for this text: a block_size that fits, a prompt that can be encoded."""
    settings, n, tokenizer = {}, min(out.tokens.values()), out.tokenizer
    if n <= runpy.run_path(str(PROJECT / 'config/text.py'))['block_size']:
        settings['block_size'] = n - 1
    if tokenizer.name == 'char' and '\n' not in tokenizer.characters:
        first = next(filter(str.isalnum, tokenizer.characters), tokenizer.characters[0])
        settings['sample_prompt'] = first.replace('\\', r'\\')
    return settings


def fraction(key):
    """A pseudorandom number in [0, 1) that depends only on the string, so that every run holds out the same items."""
    return int.from_bytes(hashlib.sha256(key.encode('utf-8', 'surrogatepass')).digest()[:8], 'big') / 2 ** 64


def split_of(key, val_fraction, test_fraction):
    """The split of the item with this name; the sealed test split takes from the items that are not held out."""
    place = fraction(key)
    if place < val_fraction:
        return 'val'
    return 'test' if place < val_fraction + (1 - val_fraction) * test_fraction else 'train'


def cuts(n, val_fraction, test_fraction):
    """Where to cut n characters into train, test and val, in this order: val does not depend on test_fraction."""
    held_out = int(n * (1 - val_fraction))
    return int(held_out * (1 - test_fraction)), held_out


def sealed_dataset(folder, out):
    """
    Makes `out`, a folder of its own, a dataset that trains on the same tokens as the one in `folder` and validates on
    its sealed split, 'test', so that train.py needs to know nothing of it. Returns the fingerprint of the sealed split.
    DataError if there is none.
    """
    folder, out = Path(folder).absolute(), Path(out)
    train, test, meta = Split(folder, 'train'), Split(folder, 'test'), load_meta(folder)
    vocabularies = [folder / name for name in ('tokenizer.json', 'vocab.json', 'merges.txt')]
    files = {path.name: path for path in vocabularies if path.is_file()}
    files |= {os.path.basename(path): path for shard in train.shards for path in (shard.path, shard.mask) if path}
    files |= {f'val_{i:06d}{os.path.splitext(path)[1]}': path
              for i, shard in enumerate(test.shards) for path in (shard.path, shard.mask) if path}
    if 'tokens' in meta:
        meta['tokens'] = dict(train=train.n_tokens, val=test.n_tokens)
    out.mkdir(parents=True, exist_ok=True)
    for path in [*out.glob('*.bin'), *out.glob('*.mask')]:
        if path.name not in files:
            path.unlink() # from an earlier preparation with other shards
    for name, path in files.items(): # a run may be reading them: replaced, never missing
        new = out / f'{name}.tmp'
        new.unlink(missing_ok=True)
        link_or_copy(path, new)
        os.replace(new, out / name)
    write_json(out / 'meta.json', meta)
    return test.fingerprint()


def link_or_copy(path, new):
    """A symbolic link: a hard one would change the file's times, by which its hash is kept, and needs the same disk."""
    try:
        os.symlink(path, new)
    except OSError: # Windows allows links to administrators and developers only
        shutil.copyfile(path, new)
