"""A run's folder: its checkpoints' names, metrics.jsonl, loss.png, config.json, and the lock against a second run."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent


class RunFolder:
    """
    A run's folder, which need not exist yet.

    latest, best    paths of the checkpoints: the latest, and the one of the lowest validation loss
    metrics         path of metrics.jsonl, one JSON object a line
    """
    def __init__(self, path):
        self.path = Path(path)
        self.latest, self.best, self.metrics = (self.path / name for name in ('ckpt.pt', 'best.pt', 'metrics.jsonl'))
        self.locked = None

    def snapshots(self):
        """Paths of the checkpoints that snapshot_interval keeps."""
        return sorted(self.path.glob('step-*.pt'))

    def has_checkpoint(self):
        return self.latest.exists() or self.best.exists()

    def refuse_if_no_place(self):
        """ValueError if this cannot be a run's folder: a file, or one that holds code or data."""
        own = "give the run a folder of its own, such as --out_dir=out-x"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out_dir={str(self.path)!r} is a file: {own}")
        if any(next(self.path.glob(pattern), None) for pattern in ('*.py', '*.bin', 'meta.json')):
            raise ValueError(f"out_dir={str(self.path)!r} holds code or data: {own}")

    def refuse_if_taken(self, restart):
        """ValueError if the folder holds a run. restart: unless the run died before its first checkpoint."""
        taken = f"out_dir={str(self.path)!r} already holds a run"
        if self.has_checkpoint():
            raise ValueError(f"{taken}: go on with it by --init_from=resume, choose another --out_dir, or replace it "
                             "by --overwrite=True")
        begun = self.metrics.exists() and self.metrics.stat().st_size
        if self.snapshots() or begun and not restart:
            raise ValueError(f"{taken}, which left no ckpt.pt to go on with: choose another --out_dir, or replace it "
                             "by --overwrite=True")

    def lock(self, setting='out_dir'):
        """
        Keeps other runs out of the folder until this process ends, however it ends. ValueError, with the setting that
        named the folder, if one is in it.
        """
        try:
            import fcntl
        except ImportError: # Windows
            return
        if self.locked is not None or not self.path.is_dir():
            return
        self.locked = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {setting}={str(self.path)!r}: wait for its end, stop it, or "
                             f"choose another --{setting}") from None
        except OSError: # a file system without locks
            pass

    def unlock(self):
        if self.locked is not None:
            os.close(self.locked)
        self.locked = None

    def remove_run(self):
        """Deletes a run's files, and nothing else that lies there."""
        of_tensorboard = self.path.glob('events.out.tfevents.*')
        for path in (self.latest, self.best, self.metrics, self.path / 'loss.png', *self.snapshots(), *of_tensorboard):
            path.unlink(missing_ok=True)
        for path in self.code():
            shutil.rmtree(path)

    def code(self):
        """The folders with the code that made the run, the latest last: code, and code-STEP after a change."""
        later = [p for p in self.path.glob('code-*') if p.name[5:].isdigit()]
        first = [self.path / 'code'] if (self.path / 'code').is_dir() else []
        return first + sorted(later, key=lambda p: int(p.name[5:]))

    def keep_code(self, files, step):
        """Keeps the scripts, the config files and git's diff as text -> names of what has changed since then."""
        now = {Path(path).name: Path(path).read_bytes() for path in
               (*(PROJECT / name for name in ('model.py', 'train.py', 'configurator.py')), *files)}
        kept = self.code()
        before = {path.name: path.read_bytes() for path in kept[-1].iterdir()} if kept else {}
        changed = [name for name, text in now.items() if kept and before.get(name) != text]
        if not kept or changed:
            folder = self.path / (f'code-{step}' if kept else 'code')
            folder.mkdir(exist_ok=True)
            for name, text in (now | {'changes.diff': (git('diff', 'HEAD') or '').encode()}).items():
                (folder / name).write_bytes(text)
        return changed

    def read_metrics(self):
        """The lines of metrics.jsonl as dicts."""
        lines = []
        for line in open(self.metrics, encoding='utf-8') if self.metrics.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError: # a line that a crash cut short
                pass
        return lines

    def forget_after(self, step, evaluates):
        """Drops the metrics that a run resumed at step writes again: later steps; if it evaluates, that, too."""
        kept = [line for line in self.read_metrics() if line['step'] < step or line['step'] == step
                and not (evaluates and 'val_loss' in line)]
        self.metrics.write_text(''.join(json.dumps(line) + '\n' for line in kept), encoding='utf-8')

    def log(self, **values):
        """Appends a line to metrics.jsonl."""
        for name, value in values.items(): # JSON has no NaN
            values[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        with open(self.metrics, 'a', encoding='utf-8') as f:
            f.write(json.dumps(values) + '\n')

    def write_config(self, config):
        """config.json: every setting, and what else decides a run's numbers."""
        about = dict(python=sys.version.split()[0], torch=torch.__version__, git=git_commit())
        (self.path / 'config.json').write_text(json.dumps(config | about, indent=1), encoding='utf-8')

    def plot(self):
        """loss.png: training and validation loss against tokens."""
        from matplotlib.figure import Figure # takes a while, so not at start-up
        lines = self.read_metrics()
        figure = Figure(figsize=(8, 5))
        axes = figure.subplots()
        curves = dict(loss=('training', dict(alpha=0.5, linewidth=0.8)), val_loss=('validation', dict(marker='.')))
        for key, (label, style) in curves.items():
            points = [line for line in lines if key in line]
            axes.plot([line['tokens'] for line in points], [line[key] for line in points], label=label, **style)
        best = min((line['val_loss'] for line in lines if line.get('val_loss') is not None), default=math.nan)
        # the first points would rule the axis
        seen = [(line['tokens'], line[key]) for line in lines for key in curves if line.get(key) is not None]
        later = [loss for tokens, loss in seen if tokens > 0.05 * seen[-1][0]]
        if later:
            low, high = min(later), max(later)
            axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        ratios = [(line[f'bits_per_{unit}'] / line['val_loss'], unit) for line in lines if 'val_loss' in line
                  for unit in ('byte', 'dimension') if line.get(f'bits_per_{unit}')]
        if ratios: # the same windows at each evaluation: one ratio
            bits, unit = ratios[0]
            other = axes.secondary_yaxis('right', functions=(lambda y: y * bits, lambda y: y / bits))
            other.set_ylabel(f'bits per {unit} of the validation split')
        axes.set(xlabel='tokens', ylabel='nats a token', title=f'{self.path.name}: best validation loss {best:.4f}')
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(self.path / 'loss.png.tmp', format='png', dpi=120)
        os.replace(self.path / 'loss.png.tmp', self.path / 'loss.png')


def git(*args):
    """What git prints about the project; None where there is no repository or no git."""
    try:
        return subprocess.run(['git', '-C', PROJECT, *args], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def git_commit():
    """The project's commit, with a + if files differ from it; None outside of git."""
    commit = git('rev-parse', 'HEAD')
    return commit and commit + ('+' if git('status', '--porcelain') else '')


def memory_of(device):
    """Bytes that the GPU has, or this machine; None where the system does not say."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError): # Windows
        return None


def peak_memory(device):
    """Bytes: of the GPU, or of the process; None where the system does not say."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    except ImportError: # Windows
        return None
