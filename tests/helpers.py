"""What several test files share: real runs of the scripts, tiny datasets and models, how to compare what comes out."""
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from compare import configured
from data.checkpoints import load_checkpoint, save_checkpoint, stored_config
from data.tokenizers import CharTokenizer
from data.writer import Writer
from model import GPT, GPTConfig

PROJECT = Path(__file__).resolve().parent.parent
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8', CUDA_VISIBLE_DEVICES='', WANDB_MODE='offline',
           COLUMNS='200', PYTHONUNBUFFERED='')
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2, max_iters=20,
            eval_interval=5, eval_iters=4, lr_decay_iters=20, warmup_iters=3, learning_rate=1e-2, min_lr=1e-3,
            device='cpu', dtype='float32', peak_flops=1e12)
T = TINY['block_size']
WORDS = ['the cat sat. ', 'a dog ran. ', 'one is two. ', 'été où? ']
V = len(set(''.join(WORDS)))


def settings_of(*files):
    """What train.py would make of these config files, whose mixers are then known."""
    return configured(*files).config


# ---------------------------------------------------------------------------------------------------------------------
# running

def flags(**settings):
    return [f'--{name}={value}' for name, value in settings.items()]


# Importing torch takes longer than most of the runs. So they are forks of a process that has done it: each runs the
# script as `python script` would, and ends as that would, but does not take apart at its end what it never used.
SERVER = """
import atexit, gc, json, os, runpy, signal, sys, threading
import matplotlib.figure, torch._dynamo, torch.distributed.checkpoint.state_dict, torch.distributed.fsdp, tqdm

def work(script, args, cwd, files, environment, first):
    signal.alarm(240) # ends it if it hangs
    for i, path in enumerate(files):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if i else os.O_RDONLY), i)
    sys.stdin, sys.stdout = open(0, encoding='utf-8'), open(1, 'w', encoding='utf-8') # line by line on a terminal
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv, sys.path[0] = [script, *args], os.path.dirname(script)
    exec(first, {})
    try:
        try:
            runpy.run_path(script, run_name='__main__')
            status = 0
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:
            status = 1
            sys.excepthook(*sys.exc_info()) # may exit
    except SystemExit as e:
        if not isinstance(e.code, int | None):
            raise
        status = e.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

def report(path, child):
    with open(path, 'w') as file:
        print(child, file=file, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=file)

gc.freeze()
for line in sys.stdin:
    path, *job = json.loads(line)
    child = os.fork()
    if child == 0:
        work(*job)
    threading.Thread(target=report, args=(path, child)).start()
"""
SERVERS = [] # one, from the first run on


class Run:
    """
    A script at work. wait() -> CompletedProcess with stdout and stderr as bytes; if live, .stdout is read before that.
    text: its standard input. first: code to execute before it. files: other paths for stdin, stdout and stderr.
    """
    starting = threading.Lock()

    def __init__(self, script, args=(), cwd=None, text='', environment={}, first='', live=False, files=()):
        self.folder = tempfile.TemporaryDirectory()
        self.argv = [sys.executable, str(PROJECT / script), *map(str, args)]
        report, *own = self.paths = [Path(self.folder.name) / name for name in ('report', 'stdin', 'stdout', 'stderr')]
        os.mkfifo(report)
        own[0].write_text(text, encoding='utf-8')
        os.mkfifo(own[1]) if live else own[1].touch()
        own[2].touch()
        job = [report, self.argv[1], self.argv[2:], cwd or os.getcwd(), files or own, environment, first]
        with Run.starting:
            if not SERVERS:
                SERVERS.append(subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, env=ENV))
            SERVERS[0].stdin.write(json.dumps(job, default=str).encode() + b'\n')
            SERVERS[0].stdin.flush()
        self.report = open(report, encoding='ascii')
        self.pid = int(self.report.readline())
        self.stdout = open(own[1], encoding='utf-8') if live else None

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait(self):
        out = self.stdout.read().encode() if self.stdout else b''
        status = int(self.report.readline())
        if not self.stdout:
            out = self.paths[2].read_bytes()
        done = subprocess.CompletedProcess(self.argv, status, out, self.paths[3].read_bytes())
        self.report.close()
        self.folder.cleanup()
        return done


def run(script, args, cwd=None, text='', environment={}, first=''):
    """The script in a process of its own -> CompletedProcess with stdout and stderr as bytes."""
    if hasattr(os, 'fork'):
        return Run(script, args, cwd, text, environment, first).wait()
    code = f'{first}\nimport runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name="__main__")'
    argv = [sys.executable, '-c', code, str(PROJECT / script), *map(str, args)]
    return subprocess.run(argv, cwd=cwd, env=ENV | environment | dict(PYTHONPATH=str(PROJECT)), input=text.encode(),
                          capture_output=True, timeout=240, check=False)


class ForkingSubprocess:
    """What bench.py, compare.py and studies.py use of the module subprocess, for their runs of Python's scripts."""
    PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT

    @staticmethod
    def run(command, cwd=None, **_):
        done = Run(*command[1:2], command[2:], cwd or PROJECT).wait()
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    class Popen(Run):
        def __init__(self, command, cwd=None, stdout=None, stderr=None, env=None, **_):
            script, *args = [arg for arg in command[1:] if arg != '-u']
            self.log = None if stdout == subprocess.PIPE else stdout
            super().__init__(Path(cwd, script), args, cwd, environment=env or {}, live=not self.log)
            self.returncode, self.send_signal = None, self.kill

        def wait(self):
            done = super().wait()
            self.log and self.log.write((done.stdout + done.stderr).decode())
            self.returncode = done.returncode
            return self.returncode

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.wait()


def end_server():
    """Its time then counts as this process's."""
    for server in SERVERS:
        server.stdin.close()
        server.wait()


def run_together(script, args, n=2, **options):
    """The script in n processes that exchange gradients, as torchrun starts them -> [CompletedProcess]."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        shared = dict(WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]))
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda rank: run(script, args, environment=shared | dict(RANK=rank, LOCAL_RANK=rank),
                                              **options), map(str, range(n))))


NO_PICTURES = 'import sys; sys.modules.update({"matplotlib": None, "matplotlib.figure": None})' # a third of the time


def train(folder, out='out', n=1, files=(), cwd=None, first=NO_PICTURES, **settings):
    """
    train.py with these config files and TINY's settings on folder/data into folder/out, in n processes -> what it
    printed; it must end well.
    """
    args = [*files, *flags(**{**TINY, 'dataset': folder / 'data', 'out_dir': folder / out, **settings})]
    if n == 1:
        return well(run('train.py', args, cwd, first=first))
    return ''.join(map(well, run_together('train.py', args, n, cwd=cwd, first=first)))


def mistake(capsys, call, *args):
    """The line in which a script ends that refuses something, with status 2: configure's, or its excepthook's."""
    before = sys.excepthook
    with pytest.raises(SystemExit) as end:
        try:
            call(*args)
        except Exception:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.excepthook = before
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1, error
    return error


def well(process):
    assert process.returncode == 0, process.stderr.decode() + process.stdout.decode()
    return process.stdout.decode()


JOBS = {}


def job(work):
    """
    A fixture with what work(folder) returns. Each job runs once for all the tests that ask for it, and two at a time in
    the background, in the order of the tests.
    """
    JOBS[work.__name__] = work
    return pytest.fixture(scope='module', name=work.__name__)(lambda jobs: jobs[work.__name__].result())


def skipped(item):
    return any(mark.name == 'skip' for mark in item.iter_markers())


@pytest.fixture(scope='module')
def jobs(request, tmp_path_factory):
    asked = [name for item in request.session.items if item.path == request.path and not skipped(item)
             for name in [*item.fixturenames, *getattr(item, 'callspec', item).__dict__.get('params', {}).values()]]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(JOBS[name], tmp_path_factory.mktemp('job'))
               for name in dict.fromkeys(asked) if name in JOBS}
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# inputs

def corpus(n=600):
    rng = np.random.default_rng(1)
    return ''.join(WORDS[i] for i in rng.integers(len(WORDS), size=n))


def write_data(folder, tokenizer=None, text=None):
    """A dataset in folder, of characters unless said otherwise -> its tokenizer."""
    text = text or corpus()
    tokenizer = tokenizer or CharTokenizer.from_text([text])
    with Writer(folder, tokenizer) as out:
        out.write('train', tokenizer.encode(text))
        out.write('val', tokenizer.encode(text[-701:]))
    return tokenizer


def random_model(vocab_size, seed=0, std=0.3, **settings):
    """All weights random, so that nothing is zero. Draws from a generator of its own: jobs run in threads."""
    model = GPT(GPTConfig(**dict(n_layer=2, n_head=2, n_embd=16, block_size=T, bias=False, vocab_size=vocab_size)
                            | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, std, generator=generator)
    return model.eval()


@torch.no_grad()
def naive_generate(model, idx, n, choose):
    """Recomputes everything for every token; choose(logits (V,), list of the last block_size tokens) -> next token."""
    block_size = model.config.block_size
    start = max(0, idx.size(1) - block_size)
    for _ in range(n):
        if idx.size(1) - start > block_size: # full: goes on from its last half
            start = idx.size(1) - max(1, block_size // 2)
        out = model(idx[:, start:])[0][:, -1]
        new = [choose(out[b], idx[b, -block_size:].tolist()) for b in range(idx.size(0))]
        idx = torch.cat([idx, torch.tensor(new)[:, None]], dim=1)
    return idx


def likeliest(out, window):
    return int(out.argmax())


def write_checkpoint(path, model, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, dict(format=1, model=model.state_dict(), model_args=stored_config(model.config), iter_num=7,
                               best_val_loss=1.5, config={}) | more)


def write_run(out):
    """A run's folder at step 7, with an optimizer that has not begun."""
    model = random_model(V)
    write_checkpoint(out / 'ckpt.pt', model,
                     optimizer=model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').state_dict())
    (out / 'best.pt').write_bytes((out / 'ckpt.pt').read_bytes())
    (out / 'metrics.jsonl').write_text('{"step": 7, "tokens": 896, "seconds": 1.0, "loss": 2.0}\n', encoding='utf-8')


NANO_ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=T, bias=False, dropout=0.0)
# of nanoGPT's optimizer, which keeps them in two groups, the matrices first
NANO_MATRICES = ['transformer.wte.weight', 'transformer.wpe.weight'] + [
    f'transformer.h.{i}.{name}.weight' for i in range(2)
    for name in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')]
NANO_GAINS = [f'transformer.h.{i}.ln_{j}.weight' for i in range(2) for j in (1, 2)] + ['transformer.ln_f.weight']


def write_nano(path, dataset, vocab_size):
    """A checkpoint as nanoGPT writes it on a GPU. First moment i of the optimizer is 1000 times i + 1."""
    model = random_model(vocab_size)
    weights = {**model.state_dict(), 'lm_head.weight': model.transformer.wte.weight}
    state = {i: dict(step=torch.tensor(40.0), exp_avg=torch.full_like(weights[name], 1000.0 * (i + 1)),
                     exp_avg_sq=torch.full_like(weights[name], 1e9))
             for i, name in enumerate(NANO_MATRICES + NANO_GAINS)}
    n, shared = len(NANO_MATRICES), dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, amsgrad=False, maximize=False,
                                         foreach=None, capturable=False, differentiable=False, fused=True)
    groups = [dict(shared, weight_decay=0.1, params=list(range(n))),
              dict(shared, weight_decay=0.0, params=list(range(n, len(state))))]
    config = dict(out_dir='out-somewhere', eval_interval=250, log_interval=1, eval_iters=4, eval_only=False,
                  always_save_checkpoint=True, init_from='scratch', wandb_log=False, wandb_project='owt',
                  wandb_run_name='x', dataset=str(dataset), gradient_accumulation_steps=1, batch_size=4, block_size=T,
                  n_layer=2, n_head=2, n_embd=16, dropout=0.0, bias=False, learning_rate=1e-3, max_iters=5000,
                  weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0, decay_lr=True, warmup_iters=3,
                  lr_decay_iters=5000, min_lr=1e-4, backend='nccl', device='cuda', dtype='float16', compile=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model={f'_orig_mod.{k}': v for k, v in weights.items()},
                    optimizer=dict(state=state, param_groups=groups),
                    model_args=dict(NANO_ARGS, vocab_size=vocab_size), iter_num=40, best_val_loss=torch.tensor(2.5),
                    config=config), path)
    return model


def write_nano_data(folder):
    """A dataset as nanoGPT's data/shakespeare_char/prepare.py leaves it -> (characters, validation split's ids)."""
    folder.mkdir()
    text = corpus()
    characters = sorted(set(text))
    stoi = {c: i for i, c in enumerate(characters)}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    ids.tofile(folder / 'train.bin')
    ids[-700:].tofile(folder / 'val.bin')
    with open(folder / 'meta.pkl', 'wb') as f:
        pickle.dump(dict(vocab_size=len(characters), itos=dict(enumerate(characters)), stoi=stoi), f)
    return characters, ids[-700:].astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# outputs

TIMES = ('seconds', 'tokens_per_s', 'mfu', 'peak_memory')


def metrics(out):
    return [json.loads(line) for line in (out / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def history(out, first=0):
    """What metrics.jsonl says but for speed, from step `first` on."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(out) if line['step'] >= first]


def losses(out):
    return {line['step']: line['loss'] for line in metrics(out) if 'loss' in line}


def val_losses(out):
    return {line['step']: line['val_loss'] for line in metrics(out) if 'val_loss' in line}


def assert_same(a, b, where='checkpoint'):
    """Equal to the last bit: nested dicts, lists, tensors and plain values."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f'{where}[{key!r}]')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f'{where}[{i}]')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(one, other):
    """Two checkpoints of the same state, but for the clock and the folder."""
    one, other = ({k: v for k, v in load_checkpoint(path).items() if k != 'config'} for path in (one, other))
    one['state'].pop('seconds'), other['state'].pop('seconds')
    assert one['optimizer']['state'] # not vacuously
    assert_same(one, other)


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def naive_nats(model, ids):
    """Sum of -log p in float64 over all of ids but the first, read in windows of T, one at a time."""
    model = model.double().eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, T):
            window = torch.from_numpy(ids[start:start + T + 1])
            logits = model(window[None, :-1])[0][0]
            total += F.cross_entropy(logits, window[1:], reduction='sum').item()
    return total


def val_ids(data):
    return np.fromfile(data / 'val.bin', dtype='<u2').astype(np.int64)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_malicious(path):
    bad = Malicious()
    bad.path = str(path.parent / 'executed')
    torch.save(dict(model={}, model_args={}, iter_num=bad), path)


SMALL = dict(block_size=12, vocab_size=61, n_layer=2, n_head=2, n_embd=16)


def network(**args):
    """With random weights, large enough that every part of the network is seen in the logits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | args)).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model):
    for p in model.parameters():
        p.normal_(0, 0.2)
