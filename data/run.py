"""A run: its folder, the lock that keeps other runs out, logs, messages to the user, and signals."""
import atexit
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from data.checkpoints import load_checkpoint, save_checkpoint
from data.tokens import find_path
from data.writer import lock_folder

PROJECT = Path(__file__).resolve().parent.parent


class Run:
    """A run and its folder, which need not exist yet. With several processes, only one prints and writes; in the others
    those methods do nothing.

    latest, best   paths of the latest checkpoint and of the one with the lowest validation loss
    metrics        path of metrics.jsonl, one JSON object per line
    asked_to_stop  exit status that this process asks for, after a signal; 0: it goes on
    stop           exit status on which all processes have agreed
    """
    def __init__(self, out_dir, speaks=True):
        self.out_dir, self.speaks, self.locked = out_dir, speaks, None
        self.move(find_path(out_dir))
        self.asked_to_stop, self.stop = 0, 0
        self.unwritten, self.silent, self.last_plot = set(), False, time.perf_counter()
        self.bar, self.logs = tqdm(disable=True), {'metrics.jsonl': self.append}

    def move(self, path):
        self.path = Path(path)
        self.latest, self.best, self.metrics = (self.path / name for name in ('ckpt.pt', 'best.pt', 'metrics.jsonl'))

    # the folder

    def has_checkpoint(self):
        return self.latest.exists() or self.best.exists()

    def claim(self, allowed, restart=False, lock=True):
        """ValueError if the folder is unsuitable or already holds a run. allowed: it may hold a run. restart: it may
        hold a run that died before its first checkpoint. lock: keep other runs out.
        """
        own = "give the run a folder of its own, such as --out_dir=out-x"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out_dir={str(self.path)!r} is a file: {own}")
        if any(next(self.path.glob(pattern), None) for pattern in ('*.py', '*.bin', 'meta.json')):
            raise ValueError(f"out_dir={str(self.path)!r} holds code or data: {own}")
        if lock and self.speaks:
            self.lock()
        begun = self.metrics.exists() and self.metrics.stat().st_size and not restart
        if not allowed and (begun or self.has_checkpoint()):
            raise ValueError(f"out_dir={str(self.path)!r} already holds a run: resume it with --init_from=auto, "
                             "choose another --out_dir, or replace it with --overwrite=True")

    def lock(self, setting='out_dir'):
        """Keeps other runs out of the folder until this process ends, however it ends. setting: for the message."""
        if self.locked is None:
            taken = f"another run is at work in {setting}={str(self.path)!r}"
            self.locked = lock_folder(self.path, f"{taken}: wait for its end, stop it, or choose another --{setting}")

    def unlock(self):
        if self.locked is not None:
            os.close(self.locked)
        self.locked = None

    def load(self):
        """The checkpoint that the run goes on from."""
        checkpoint = load_checkpoint(next((p for p in (self.latest, self.best) if p.exists()), self.latest))
        # nanoGPT's names the device of another machine, perhaps
        strange = () if 'format' in checkpoint else ('device', 'dtype', 'compile', 'backend')
        config = {k: v for k, v in checkpoint.get('config', {}).items() if k not in strange}
        return checkpoint | dict(config=config)

    def begin(self, state, settings, data, resuming, **about):
        """Creates the folder, or removes what a new run replaces and what a resumed run will write again. Stores the
        code, the settings, and whatever else the results depend on (about).
        """
        if not self.speaks:
            return
        config = settings.config
        if config['dry_run']:
            parent = next(path for path in self.path.parents if path.exists())
            self.move(tempfile.mkdtemp(prefix='.dry_run-', dir=parent))
            atexit.register(shutil.rmtree, self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        # another run may have started since the first check
        self.claim(resuming or config['overwrite'], config['init_from'] == 'auto')
        if config['wandb_log'] and not config['dry_run']: # before anything is deleted: it may refuse
            self.logs['wandb'] = begin_wandb(config, self.path)
        if resuming: # drop the lines after the checkpoint: this run writes them again
            kept = [line for line in self.read_metrics() if line['step'] < state.step or line['step'] == state.step
                    and ('val_loss' not in line or state.evaluated == state.step)]
            replace_file(self.metrics, ''.join(json.dumps(line) + '\n' for line in kept))
        else:
            for path in (self.path / 'loss.png', self.latest, self.best, self.metrics):
                path.unlink(missing_ok=True)
            for path in self.code():
                shutil.rmtree(path)
        if changed := self.keep_code(settings.files, state.step):
            self.say(f"note     the code has changed: {', '.join(changed)}; {self.code()[-2]} has what made the run so "
                     "far")
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, git=git_commit())
        about |= versions | dict(data=data.fingerprints())
        replace_file(self.path / 'config.json', json.dumps(config | about, indent=1))

    def code(self):
        """Folders with the code of this run: code-STEP for each change, latest last."""
        return sorted(self.path.glob('code-[0-9]*'), key=lambda path: (len(path.name), path.name))

    def keep_code(self, files, step):
        """Stores the scripts, the config files and git's diff. Returns the names of files changed since last time."""
        paths = [*(PROJECT / name for name in ('model.py', 'train.py', 'configurator.py')), *map(Path, files)]
        now = {path.name: path.read_bytes() for path in paths}
        folder = self.path / f'code-{step}'
        made = [path for path in self.code() if path != folder][-1:] # what folder has made no step
        before = {path.name: path.read_bytes() for last in made for path in last.iterdir()}
        changed = [name for name, text in now.items() if before.get(name) != text]
        if changed or folder.exists():
            folder.mkdir(exist_ok=True)
            for name, text in (now | {'changes.diff': git('diff', 'HEAD')}).items():
                (folder / name).write_bytes(text)
        return changed if before else []

    def save(self, path, checkpoint):
        """Writes a checkpoint. If that fails, as on a full disk, the old file is kept and the next save tries again."""
        if not self.speaks:
            return
        try:
            save_checkpoint(path, checkpoint)
            self.unwritten.discard(path)
        except OSError as e:
            self.unwritten.add(path)
            self.say(f"warning: {e}; the old one is kept")

    # logs

    def read_metrics(self):
        """The lines of metrics.jsonl as dicts, except those that a crash cut short or that are otherwise damaged."""
        lines = []
        for line in self.metrics.read_bytes().splitlines() if self.metrics.exists() else ():
            try:
                values = json.loads(line)
                lines += [values] if type(values['step']) is type(values['tokens']) is int else []
            except (ValueError, LookupError, TypeError, RecursionError):
                pass # not JSON, or not such an object
        return lines

    def log(self, state, **values):
        """Writes values of this step to all logs. If a log cannot be written, warns, and training goes on."""
        values = dict(step=state.step, tokens=state.tokens, seconds=round(state.seconds, 3), **values)
        for name, write in list(self.logs.items()) if self.speaks else ():
            try:
                write(values)
            except Exception as e: # a log may raise anything
                more = ''
                if name != 'metrics.jsonl': # that one can recover
                    more = ' without it'
                    del self.logs[name]
                self.say(f"warning: {name} could not be written, training goes on{more}: {e}")

    def append(self, values):
        """Appends a line to metrics.jsonl."""
        finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)} # JSON has no NaN
        with open(self.metrics, 'a', encoding='utf-8') as f:
            f.write(json.dumps(dict.fromkeys(values) | finite) + '\n')

    def plot(self, pause=0):
        """Draws loss.png (losses against tokens), unless the last time was less than `pause` seconds ago."""
        if not self.speaks or time.perf_counter() - self.last_plot < pause:
            return
        self.last_plot = time.perf_counter()
        try: # takes 0.2 seconds, the first time 1 second
            draw_losses(self.read_metrics(), self.path / 'loss.png')
        except Exception as e: # matplotlib may raise anything, or be missing
            self.say(f"warning: {self.path / 'loss.png'} could not be drawn, training goes on: {e}")

    # messages

    def say(self, text):
        """Prints a line above the progress bar."""
        if not self.speaks:
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush() # pipes and files also get each line at once
        except (OSError, ValueError): # a closed pipe, a lost terminal, a full disk
            self.warn_of_silence()

    def warn_of_silence(self):
        """Warns once on stderr, if it still works. The run goes on, and metrics.jsonl has its numbers."""
        if not self.silent:
            self.silent, self.bar.disable = True, True
            with suppress(OSError, ValueError):
                print("warning: the output cannot be written, the run goes on", file=sys.stderr, flush=True)
            sys.stdout = sys.stderr = open(os.devnull, 'w', encoding='utf-8')

    def progress(self, total, done):
        """Starts the progress bar, if there is a terminal."""
        disabled = not self.speaks or not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit='step', disable=disabled, dynamic_ncols=True)

    def tick(self, steps=0, text=None):
        """Advances the progress bar and changes the text after it."""
        try:
            if text is not None:
                self.bar.set_postfix_str(text)
            self.bar.update(steps)
        except OSError:
            self.warn_of_silence()

    # the end

    def catch_signals(self):
        """From now on, Ctrl-C, kill, a lost terminal or a scheduler's warning make the run save and stop."""
        def on_signal(number, frame):
            self.asked_to_stop = 128 + number
            signal.signal(number, signal.SIG_DFL) # a second one kills the run at once
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP'):
            number = getattr(signal, name, signal.SIGTERM) # Windows lacks some
            if signal.getsignal(number) is not signal.SIG_IGN: # as under nohup
                signal.signal(number, on_signal)

    def sum_up(self, state, files):
        """Prints the result of the run and the next command."""
        self.say(f"done     {state.step:,} steps, {state.tokens:,} tokens in {duration(state.seconds)}; lowest "
                 f"validation loss {state.best_val_loss:.4f} at step {state.best_step:,}")
        if state.step == state.first_step:
            self.say(f"note     the run was at step {state.step} already: to go on, raise --max_iters or "
                     "--patience")
        self.say(f"next     python sample.py {shlex.join([*files, f'--out_dir={self.out_dir}'])}")

    def status(self, step):
        """Prints why the run ends before its last step. Returns its exit status."""
        with suppress(OSError): # the terminal may be gone
            self.bar.close()
        if self.stop > 128:
            self.say(f"{signal.Signals(self.stop - 128).name}: step {step} is saved in {self.latest}; resume with "
                     "--init_from=resume")
        if self.latest in self.unwritten:
            self.say(f"error: the state of step {step} is not on disk: free some space and resume from the last "
                     "checkpoint")
            return 1
        return self.stop


def begin_wandb(config, folder):
    """Returns a function that logs the values of a step."""
    import wandb
    try:
        wandb.init(project=config['wandb_project'], name=config['wandb_run_name'], config=config, dir=folder)
    except Exception as e: # its own, or those of what it uses
        raise ValueError(f"wandb_log=True: {str(e).rstrip('.')}; or WANDB_MODE=offline, or leave it out") from None
    return lambda values: wandb.log(values, step=values['step'])


def replace_file(path, text):
    """Replaces a file atomically: whatever happens, path is either the complete old file or the complete new one."""
    temporary = Path(f'{path}.tmp')
    try:
        temporary.write_text(text, encoding='utf-8')
        os.replace(temporary, path)
    except OSError as e: # one of a write does not name the file
        raise OSError(f"{path} could not be written: {e.strerror}; the old one is kept") from e
    finally:
        temporary.unlink(missing_ok=True)


def draw_losses(lines, path):
    """Plots the losses in lines of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg # whatever MPLBACKEND says
    from matplotlib.figure import Figure # slow to import, so not at start-up
    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves = dict(loss=('training', dict(alpha=0.5, linewidth=0.8)), val_loss=('validation', dict(marker='.')))
    for key, (label, style) in curves.items():
        points = [line for line in lines if key in line]
        axes.plot([line['tokens'] for line in points], [line[key] for line in points], label=label, **style)
    best = min((line['val_loss'] for line in lines if line.get('val_loss') is not None), default=math.nan)
    seen = [(line['tokens'], line[key]) for line in lines for key in curves if line.get(key) is not None]
    later = [loss for tokens, loss in seen if tokens > 0.05 * seen[-1][0]] # the first losses would dominate the axis
    low, high = min(later, default=0.0), max(later, default=1.0)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set(xlabel='tokens', ylabel='nats per token', title=f'{path.parent.name}: best validation loss {best:.4f}')
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(f'{path}.tmp', format='png', dpi=120)
    os.replace(f'{path}.tmp', path)


def git(*args):
    """The output of a git command on the project, as bytes; b'' without a repository or without git."""
    try:
        return subprocess.run(['git', '-C', PROJECT, *args], capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return b''


def git_commit():
    """The project's commit, with a + if there are uncommitted changes; None outside of git."""
    commit = git('rev-parse', 'HEAD').decode()
    return commit + ('+' if git('status', '--porcelain') else '') if commit else None


def duration(seconds):
    """Human-readable time: 38.0 s, 2.9 min, 5.1 hours, 12.0 days."""
    units = dict(days=86400, hours=3600, min=60)
    unit = next((unit for unit, size in units.items() if seconds >= 1.5 * size), 's')
    return f'{seconds / units.get(unit, 1):,.1f} {unit}'
