"""Runs survive what happens to long runs. KILLS=100 python -m pytest tests/test_robust.py -k kill is the long mode."""
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import helpers
from data.tokenizers import ByteTokenizer, CharTokenizer
from data.tokens import DataError, Split
from data.writer import Writer
from data.checkpoints import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4',
         '--gradient_accumulation_steps=2', '--dropout=0.1', '--eval_interval=20', '--eval_iters=2',
         '--warmup_iters=5', f'--max_iters={STEPS}', f'--lr_decay_iters={STEPS}', '--learning_rate=1e-2',
         '--device=cpu', '--peak_flops=1e12']
posix = pytest.mark.skipif(os.name != 'posix', reason='signals and limits of POSIX')


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'words'
    rng = random.Random(0)
    with Writer(folder, ByteTokenizer()) as out:
        for split, n in ('train', 4000), ('val', 400):
            out.write(split, list(''.join(rng.choice(['to be ', 'or not ', 'that is ']) for _ in range(n)).encode()))
    return folder


def arguments(dataset, out, *more):
    return [f'--dataset={dataset}', f'--out_dir={out}', *SMALL, *more]


def run(dataset, out, *more, code=0, first=helpers.NO_PICTURES, **options):
    done = helpers.run('train.py', arguments(dataset, out, *more), first=first, **options)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def start(dataset, out, *more, first=helpers.NO_PICTURES, environment={}):
    return helpers.Run('train.py', arguments(dataset, out, *more), first=first, environment=environment, live=True)


def same(a, b):
    """Two checkpoints hold the same weights and moments, to the last bit."""
    a, b = load_checkpoint(a), load_checkpoint(b)
    a['state'].pop('seconds'), b['state'].pop('seconds')
    assert a['state'] == b['state']
    assert a['model'].keys() == b['model'].keys() and all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())
    for i, state in a['optimizer']['state'].items():
        assert all(torch.equal(v, b['optimizer']['state'][i][k]) for k, v in state.items())


def losses(out):
    lines = [json.loads(line) for line in open(out / 'metrics.jsonl')]
    return [(line['step'], line.get('loss'), line.get('val_loss'), line.get('grad_norm')) for line in lines]


@pytest.fixture(scope='module')
def whole(dataset, tmp_path_factory):
    """The run that nothing interrupted."""
    out = tmp_path_factory.mktemp('whole') / 'out'
    run(dataset, out)
    return out


@posix
def test_kill_at_random_moments_loses_at_most_an_interval(dataset, whole, tmp_path):
    out, interval, rng = tmp_path / 'out', 3, random.Random(1)
    kills = int(os.environ.get('KILLS', 3))
    steps = max(STEPS, 12 * kills)
    long = [f'--max_iters={steps}', f'--checkpoint_interval={interval}', '--init_from=auto']
    done = 0
    while done < kills:
        process = start(dataset, out, *long)
        step, wanted = 0, rng.randint(1, 9) # kill somewhere after so many more lines
        for line in process.stdout:
            if ': loss ' in line:
                step, wanted = int(line.split()[1].rstrip(':')), wanted - 1
                if wanted == 0:
                    time.sleep(rng.random() * 0.05)
                    process.kill()
        status = process.wait().returncode
        if status == 0:
            break # finished before its time: the rest of the kills has no run to hit
        assert status == -signal.SIGKILL
        done += 1
        saved = (step - 1) // interval * interval # for certain: a step is told before its checkpoint is written
        if saved:
            assert load_checkpoint(out / 'ckpt.pt')['iter_num'] >= saved
    run(dataset, out, *long)
    print(f'{done} kills survived')
    assert done == kills
    if steps == STEPS:
        same(out / 'ckpt.pt', whole / 'ckpt.pt')
        same(out / 'best.pt', whole / 'best.pt')
        assert losses(out) == losses(whole)


def test_auto_begins_again_what_was_killed_before_its_first_checkpoint(dataset, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'metrics.jsonl').write_text('{"step": 1, "tokens": 128, "seconds": 0.1, "loss": 9.0}\n', encoding='utf-8')
    (out / 'ckpt.pt.tmp').write_bytes(b'half')
    assert 'resume it with --init_from=auto' in run(dataset, out, '--max_iters=2', code=2).stderr
    said = run(dataset, out, '--max_iters=2', '--init_from=resume', code=2).stderr # which is for checkpoints
    assert f"there is no checkpoint {out / 'ckpt.pt'}" in said and said.count('\n') == 1
    run(dataset, out, '--max_iters=2', '--init_from=auto')
    assert load_checkpoint(out / 'ckpt.pt')['iter_num'] == 2 and 9.0 not in [loss for _, loss, _, _ in losses(out)]


@posix
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGUSR1'])
def test_signals_save_and_exit_with_the_customary_code(name, dataset, whole, tmp_path):
    out = tmp_path / 'out'
    process = start(dataset, out, '--max_iters=100000', '--eval_interval=100000')
    for line in process.stdout:
        if line.startswith('step 7:'):
            process.kill(getattr(signal, name))
            break
    done = process.wait()
    rest = done.stdout.decode()
    assert done.returncode == 128 + getattr(signal, name)
    step = load_checkpoint(out / 'ckpt.pt')['iter_num']
    assert step >= 7 and f"{name}: step {step} is saved in {out / 'ckpt.pt'}; resume with --init_from=resume" in rest
    if name == 'SIGTERM': # and the run goes on as if nothing had been
        run(dataset, out, '--init_from=resume')
        same(out / 'ckpt.pt', whole / 'ckpt.pt')


EVALUATING = helpers.NO_PICTURES + """
import time
import data.machine
n, deal = 0, data.machine.Machine.deal # called once for each split
def other(self, batches):
    global n
    n += 1
    for batch in deal(self, batches):
        if n > FIRST:
            print('evaluating', flush=True)
            WHAT
        yield batch
data.machine.Machine.deal = other
"""


@posix
@pytest.mark.parametrize('step', [0, 20])
def test_a_signal_in_a_long_evaluation_is_acted_on_at_once(step, dataset, whole, tmp_path):
    """The evaluation, of many minutes, is broken off, and the resumed run makes it again."""
    out = tmp_path / 'out'
    slow = EVALUATING.replace('FIRST', '0' if step == 0 else '2').replace('WHAT', 'time.sleep(2)')
    process = start(dataset, out, '--eval_iters=99', first=slow)
    for line in process.stdout:
        if line.startswith('evaluating'):
            process.kill(signal.SIGTERM)
            break
    done = process.wait() # a batch takes 2 seconds, and all of them more than helpers.Run allows
    assert done.returncode == 128 + signal.SIGTERM
    assert f"SIGTERM: step {step} is saved in {out / 'ckpt.pt'}" in done.stdout.decode()
    assert load_checkpoint(out / 'ckpt.pt')['iter_num'] == step
    run(dataset, out, '--init_from=resume', '--eval_iters=2')
    same(out / 'ckpt.pt', whole / 'ckpt.pt')
    same(out / 'best.pt', whole / 'best.pt')
    assert losses(out)[1:] == losses(whole)[1:]


SLOW_STEPS = helpers.NO_PICTURES + """
import time
from data.checkpoints import State
count = State.count
def slow(self, *args):
    time.sleep(0.5)
    count(self, *args)
State.count = slow
"""


@posix
def test_a_signal_does_not_wait_for_a_log_line(dataset, tmp_path):
    process = start(dataset, tmp_path / 'out', '--max_iters=1000', '--eval_interval=1000', '--log_interval=100',
                    first=SLOW_STEPS)
    for line in process.stdout:
        if line.startswith('step 0'):
            process.kill(signal.SIGTERM)
            break
    assert process.wait().returncode == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num'] < 50 # a log line would have taken 50 seconds


@posix
def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(dataset, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        shared = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]))
    one, other = (start(dataset, tmp_path / 'out', '--max_iters=100000', '--eval_interval=100000',
                        environment=shared | dict(RANK=rank, LOCAL_RANK=rank)) for rank in '01')
    for line in one.stdout:
        if line.startswith('step 7:'):
            other.kill(signal.SIGUSR1)
            break
    done, _ = ends = one.wait(), other.wait()
    assert [end.returncode for end in ends] == [128 + signal.SIGUSR1] * 2
    step = load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num']
    assert step >= 7 and f'SIGUSR1: step {step} is saved in' in done.stdout.decode()


def test_an_evaluation_that_fails_loses_no_step(dataset, tmp_path):
    """The last one, too, of a run that saves no checkpoint before."""
    run(dataset, tmp_path / 'out', '--max_iters=5', '--always_save_checkpoint=False', code=1,
        first=EVALUATING.replace('FIRST', '2').replace('WHAT', '1 / 0'))
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num'] == 5


@posix
def test_a_second_ctrl_c_leaves_at_once(dataset, tmp_path):
    process = start(dataset, tmp_path / 'out', '--max_iters=100000', '--gradient_accumulation_steps=40000')
    for line in process.stdout:
        if line.startswith('step 0'):
            break
    time.sleep(0.3) # into the first step, which takes many minutes
    process.kill(signal.SIGINT)
    time.sleep(0.3)
    process.kill(signal.SIGINT) # which it lives to see
    assert process.wait().returncode == -signal.SIGINT
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


@posix
def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(dataset, whole, tmp_path):
    out = tmp_path / 'out'
    run(dataset, out, '--max_iters=20')
    half = (out / 'ckpt.pt').stat().st_size // 2
    limit = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({half}, {half}))' # a disk without room for it
    done = run(dataset, out, '--init_from=resume', '--checkpoint_interval=5', code=1, first=limit)
    assert done.stdout.count('ckpt.pt could not be written: ') > 3 and '; the old one is kept' in done.stdout
    assert (f'step {STEPS}: loss' in done.stdout
            and f'error: the state of step {STEPS} is not on disk' in done.stdout)
    assert load_checkpoint(out / 'ckpt.pt')['iter_num'] == 20 and not list(out.glob('*.tmp'))
    run(dataset, out, '--init_from=resume') # there is room again
    same(out / 'ckpt.pt', whole / 'ckpt.pt')


def test_a_full_disk_is_called_so(monkeypatch, tmp_path):
    def full(file):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='ckpt.pt could not be written: the disk is full'):
        save_checkpoint(tmp_path / 'ckpt.pt', dict(model={}))
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_refused_and_the_good_one_named(dataset, whole, tmp_path):
    data = bytearray((whole / 'ckpt.pt').read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / 'ckpt.pt').write_bytes(data)
    (tmp_path / 'best.pt').write_bytes((whole / 'best.pt').read_bytes())
    done = run(dataset, tmp_path, '--init_from=resume', code=2)
    assert (done.stderr.startswith('error: ') and 'damaged' in done.stderr
            and f"use another one, here {tmp_path / 'best.pt'}\n" in done.stderr)
    assert done.stderr.count('\n') == 1
    (tmp_path / 'ckpt.pt').write_bytes(data[:len(data) // 3])
    (tmp_path / 'best.pt').unlink()
    assert 'here there is none' in run(dataset, tmp_path, '--init_from=resume', code=2).stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.pt']


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_of_a_checkpoint_never_pass_unseen(data, whole, tmp_path):
    """Either what was changed is padding, and everything is as it was, or the file is refused in one line."""
    content = bytearray((whole / 'ckpt.pt').read_bytes())
    kind = data.draw(st.sampled_from(['flip', 'cut', 'zero', 'insert']))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == 'flip':
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == 'cut':
        del content[at:]
    elif kind == 'zero':
        content[at:at + 512] = bytes(len(content[at:at + 512]))
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    path = tmp_path / 'ckpt.pt'
    path.write_bytes(content)
    try:
        checkpoint = load_checkpoint(path)
    except ValueError as e:
        assert str(path) in str(e) and '\n' not in str(e)
    else:
        good = load_checkpoint(whole / 'ckpt.pt')
        assert all(torch.equal(v, checkpoint['model'][k]) for k, v in good['model'].items())
        assert checkpoint['config'] == good['config']
    assert path.read_bytes() == bytes(content)


def test_steps_that_blow_up_are_skipped_and_explained(dataset, tmp_path):
    out = tmp_path / 'out'
    done = run(dataset, out, '--learning_rate=1e30', '--warmup_iters=0', '--max_bad_steps=5', '--dtype=float32', code=1)
    assert 'first output that is not finite: transformer.' in done.stdout
    assert 'stopping after 5 such steps' in done.stdout and 'lower learning_rate (now 1e+30)' in done.stdout
    checkpoint = load_checkpoint(out / 'ckpt.pt')
    assert all(torch.isfinite(v).all() for v in checkpoint['model'].values())
    # Adam's own count of steps: those that blew up are not in it
    assert {int(s['step']) for s in checkpoint['optimizer']['state'].values()} == {checkpoint['iter_num'] - 5}
    for line in open(out / 'metrics.jsonl'):
        json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))


def test_dry_run_writes_nothing_and_says_what_a_run_costs(dataset, tmp_path):
    without_wandb = helpers.NO_PICTURES + "; sys.modules['wandb'] = None"
    done = run(dataset, tmp_path / 'out', '--dry_run', '--wandb_log', first=without_wandb) # whose run it would be
    assert f'dry run passed: {STEPS} steps take about' in done.stdout and not list(tmp_path.iterdir())
    bad = tmp_path / 'bad'
    bad.mkdir()
    np.full(1000, 3, '<u2').tofile(bad / 'train.bin')
    tokens = np.full(1000, 3, '<u2')
    tokens[777] = 60000
    tokens.tofile(bad / 'val.bin')
    done = run(bad, tmp_path / 'out', '--dry_run', '--vocab_size=64', code=2)
    assert ('val.bin' in done.stderr and '777' in done.stderr and '60000' in done.stderr
            and not (tmp_path / 'out').exists())
    done = run(dataset, tmp_path / 'out', '--dry_run', '--learning_rate=1e30', '--warmup_iters=0', '--max_bad_steps=1',
               '--dtype=float32', code=1)
    assert 'stopping after 1 such steps' in done.stdout and 'passed' not in done.stdout
    assert not (tmp_path / 'out').exists()


def test_dry_run_of_a_resumed_run_times_its_own_steps(dataset, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / 'out')
    checkpoint = load_checkpoint(out / 'ckpt.pt')
    checkpoint['state']['seconds'] = 1e9
    torch.save(checkpoint, out / 'ckpt.pt')
    done = run(dataset, out, '--dry_run', '--init_from=resume', f'--max_iters={STEPS + 10}')
    assert re.search(r'dry run passed: 10 steps take about [\d.]+ (s|min) without', done.stdout), done.stdout
    assert 'scanning' not in done.stderr # there is no terminal


def test_an_evaluation_keeps_to_the_stop_that_processes_agreed_on(dataset, tmp_path):
    """They vote once a second, and agree() returns 0 in between."""
    first = helpers.NO_PICTURES + ("; from data.machine import Machine; votes = iter([143]); "
                                   "Machine.agree = lambda self, number: next(votes, 0)")
    done = run(dataset, tmp_path / 'out', first=first, code=143)
    assert 'SIGTERM: step 0 is saved' in done.stdout and 'val loss' not in done.stdout


def test_out_of_memory_says_what_to_change(dataset, tmp_path):
    done = run(dataset, tmp_path / 'out', '--batch_size=2000000000000', '--eval_interval=1000', '--init_from=scratch',
               code=1)
    assert done.stderr.splitlines()[-1].startswith('out of memory: halve batch_size=2000000000000')


def test_resuming_lists_changes_and_refuses_those_that_make_no_sense(dataset, whole, tmp_path):
    import shutil
    out = tmp_path / 'out'
    shutil.copytree(whole, out)
    done = run(dataset, out, '--init_from=resume', '--learning_rate=5e-3', f'--max_iters={STEPS + 1}')
    assert 'changed  learning_rate=0.005, was 0.01' in done.stdout
    for change, words in [('--n_head=4', 'n_head=4 instead of 2'), ('--mlp=relu2', "mlp='relu2' instead of 'gelu'"),
                          ('--n_layer=3', 'n_layer=3 instead of 2')]:
        assert words in run(dataset, out, '--init_from=resume', change, code=2).stderr
    other = tmp_path / 'other'
    with Writer(other, CharTokenizer('ab')) as writer:
        writer.write('train', [0, 1] * 200)
        writer.write('val', [0, 1] * 50)
    assert 'weights were trained with' in run(other, out, '--init_from=resume', code=2).stderr
    run(other, out, '--init_from=resume', '--allow_changes', f'--max_iters={STEPS + 3}')
    config = json.loads((out / 'config.json').read_text())
    assert config['torch'] == torch.__version__ and len(config['data']) == 2 and config['resolved']['device'] == 'cpu'


def torchrun(dataset, out, *more, restarts=0):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
              f'--max_restarts={restarts}', str(ROOT / 'train.py'), *arguments(dataset, out, *more)]
    return subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=helpers.ENV)


def run_two(dataset, out, *more, code=0):
    """Two processes -> what the first said."""
    one, other = helpers.run_together('train.py', arguments(dataset, out, *more), first=helpers.NO_PICTURES)
    said = one.stdout.decode() + one.stderr.decode()
    assert one.returncode == other.returncode == code, said[-3000:] + other.stderr.decode()[-3000:]
    return said


@posix
def test_sharded_and_plain_runs_continue_each_other(dataset, tmp_path):
    """fsdp and ddp and one process give the same losses to rounding, and read each other's checkpoints."""
    # the mixer is a file's, with a state: few steps, since its norm of small numbers makes much of rounding
    idea = tmp_path / 'idea.py'
    idea.write_text('from __future__ import annotations\n' + re.sub(
        "out_dir = .*\n", '', (ROOT / 'config/mixers/linear_attention.py').read_text()).replace('chunk: int = 64',
                                                                                            'chunk: int = 5'))
    steps = [str(idea), '--dropout=0.0', '--dtype=float32', '--learning_rate=1e-3', '--gradient_accumulation_steps=4']
    run(dataset, tmp_path / 'one', *steps, '--max_iters=4')
    for first, second in ('fsdp', 'ddp'), ('ddp', 'fsdp'):
        out = tmp_path / first
        for parallel, more in (first, ['--max_iters=2']), (second, ['--max_iters=4', '--init_from=resume']):
            run_two(dataset, out, *steps, *more, f'--parallel={parallel}')
        expected = {step: loss for step, loss, _, _ in losses(tmp_path / 'one') if loss}
        found = {step: loss for step, loss, _, _ in losses(out) if loss}
        assert found.keys() == expected.keys() and max(abs(found[s] - expected[s]) for s in expected) < 2e-5
    run(dataset, tmp_path / 'ddp', '--init_from=resume', '--parallel=ddp', '--max_iters=5', *steps) # written by fsdp
    for i, more in enumerate(([], [str(idea)])): # matrices travel in 16 bits; a mixer that has others does not
        narrow = [*more, '--n_layer=1', '--dropout=0.0', '--dtype=bfloat16', '--max_iters=4',
                  '--gradient_accumulation_steps=4']
        run(dataset, tmp_path / f'narrow{i}', *narrow)
        run_two(dataset, tmp_path / f'sharded{i}', *narrow, '--parallel=fsdp')
        expected, found = (losses(tmp_path / f'{name}{i}')[-5:] for name in ('narrow', 'sharded'))
        assert len(expected) == len(found) == 5
        for (step, loss, _, norm), (_, other, _, other_norm) in zip(expected[1:4], found[1:4]):
            assert abs(loss - other) < 2e-3 and abs(norm - other_norm) < 0.02 * norm, step


@posix
def test_what_is_gathered_together(tmp_path):
    """Matrices by layer, and norms with the model: each gather waits for the other processes."""
    script = tmp_path / 'groups.py'
    script.write_text("""
import torch, torch.distributed as dist
from data.machine import shard
from model import GPT, GPTConfig
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
for change in {}, dict(mlp='none'), dict(rezero=True, short_conv=2), dict(qk_norm=True):
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=2, n_head=2, n_embd=8, **change))
    shard(model, 'cpu', torch.bfloat16, 1)
    print(*[name for name, module in model.named_modules() if isinstance(module, dist.fsdp.FSDPModule)])
""")
    done = helpers.run(script, [], first=f"import sys; sys.path.insert(0, {str(ROOT)!r})")
    assert done.returncode == 0, done.stderr
    assert [line.replace('transformer.h.', '').split() for line in done.stdout.decode().splitlines()] == [
        ['0.attn', '0.mlp', '1.attn', '1.mlp'], ['0.attn', '1.attn'], ['0.attn', '0.mlp', '1.attn', '1.mlp'],
        ['0', '0.mlp', '1', '1.mlp']]


def test_accumulation_that_does_not_divide(dataset, tmp_path):
    process = run(dataset, tmp_path / 'out', '--gradient_accumulation_steps=5', code=2,
                  environment=dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='4'))
    assert process.stderr == ("error: gradient_accumulation_steps=5 is not divisible by the number of processes, 4: "
                              "take a multiple of that\n")
    assert not (tmp_path / 'out').exists()


@posix
def test_muon_over_processes(dataset, tmp_path):
    """Two processes take the steps of one, with clipping by rows; sharded weights are refused."""
    steps = ['--dropout=0.0', '--dtype=float32', '--learning_rate=1e-3', '--optimizer=muon', '--adaptive_clip=0.1',
             '--max_iters=8']
    run(dataset, tmp_path / 'one', *steps)
    run_two(dataset, tmp_path / 'two', *steps)
    expected, found = ({step: loss for step, loss, _, _ in losses(tmp_path / name) if loss} for name in ('one', 'two'))
    # bfloat16 inside of Muon
    assert found.keys() == expected.keys() and max(abs(found[s] - expected[s]) for s in expected) < 1e-3
    text = run_two(dataset, tmp_path / 'no', *steps, '--parallel=fsdp', code=2)
    assert ("optimizer='muon' works on whole matrices" in text and '--parallel=ddp' in text
            and not (tmp_path / 'no').exists())


@posix
def test_several_processes_end_as_one_does(dataset, tmp_path):
    """With its words, its exit status and its temporary files removed, though they skip Python's teardown."""
    bad = ['--learning_rate=1e30', '--warmup_iters=0', '--max_bad_steps=5', '--dtype=float32']
    text = run_two(dataset, tmp_path / 'bad', *bad, code=1)
    assert 'stopping after 5 such steps' in text and text.count('stopping') == 1 # at once
    assert 'dry run passed' in run_two(dataset, tmp_path / 'dry', '--dry_run')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad']


@posix
@pytest.mark.long('torchrun, twice')
def test_torchrun_sees_how_its_processes_end(dataset, tmp_path):
    process = torchrun(dataset, tmp_path / 'bad', '--learning_rate=1e30', '--warmup_iters=0', '--max_bad_steps=5',
                       '--dtype=float32')
    text = process.communicate()[0]
    assert process.returncode == 1 and 'stopping after 5 such steps' in text and 'exitcode  : 1 ' in text, text[-3000:]
    process = torchrun(dataset, tmp_path / 'dry', '--dry_run')
    text = process.communicate()[0]
    assert process.returncode == 0 and 'dry run passed' in text, text[-3000:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad']


@posix
@pytest.mark.long('torchrun, whose processes start twice')
def test_a_lost_rank_is_replaced_and_the_run_goes_on(dataset, tmp_path):
    out = tmp_path / 'out'
    process = torchrun(dataset, out, '--init_from=auto', '--checkpoint_interval=5', '--max_iters=60',
                       '--eval_interval=60', restarts=2)
    watchdog = threading.Timer(150, process.kill)
    watchdog.start()
    killed, seen = False, []
    for line in process.stdout:
        seen.append(line)
        if line.startswith('step 12:') and not killed:
            workers = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(workers[-1]), signal.SIGKILL)
            killed = True
    watchdog.cancel()
    assert process.wait() == 0 and killed, ''.join(seen)[-3000:]
    assert sum(line.startswith('machine') for line in seen) == 2 # started twice
    steps = [step for step, loss, _, _ in losses(out) if loss]
    assert steps == list(range(1, 61))


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.one_of(st.sampled_from([20240520, 20240801, 1, 7, 0, -1, 40, 2 ** 31 - 1]),
                                st.integers(-2 ** 31, 2 ** 31 - 1)),
                      max_size=5), tail=st.binary(max_size=300), whole_header=st.booleans(),
       meta=st.one_of(st.none(), st.dictionaries(
           st.sampled_from(['dtype', 'vocab_size', 'tokens', 'tokenizer', 'characters']),
           st.one_of(st.none(), st.integers(-5, 10 ** 9),
                     st.sampled_from(['uint16', 'uint32', 'float64', 'char', '../x']),
                     st.dictionaries(st.sampled_from(['train', 'val']), st.integers(-3, 400))))))
def test_any_shard_and_metadata_open_or_are_refused_in_one_line(words, tail, whole_header, meta, tmp_path_factory):
    folder = tmp_path_factory.mktemp('shard')
    header = np.array(words + [0] * (256 - len(words)) * whole_header, '<i4').tobytes()
    (folder / 'train.bin').write_bytes(header + tail)
    if meta is not None:
        (folder / 'meta.json').write_text(json.dumps(meta))
    before = [p.read_bytes() for p in sorted(folder.iterdir())]
    try:
        split = Split(folder, 'train')
        assert 0 < split.n_tokens <= len(header + tail) // 2
        split.scan(2 ** 32)
        split.batch(0, 2, 3)
    except DataError as e:
        assert str(e) and '\n' not in str(e)
    assert [p.read_bytes() for p in sorted(folder.iterdir())] == before


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40))
def test_any_prompt_survives_the_round_trip(text):
    tokenizer = ByteTokenizer()
    text = text.encode('utf-8', 'replace').decode('utf-8')
    assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text


@pytest.mark.parametrize('mixer', ['attention', 'unet'])
def test_random_window_lengths(mixer, dataset, tmp_path):
    """Each step draws a length, a function of seed and step: a resumed run draws the same."""
    model = ['--n_layer=1', '--unet_layers=1', '--mixer=mlp_mixer'] if mixer == 'unet' else ['--n_layer=1']
    args = [*model, '--min_block_size=3', '--max_iters=16', '--eval_interval=8']
    run(dataset, tmp_path / 'a', *args)
    tokens = [json.loads(line)['tokens'] for line in open(tmp_path / 'a' / 'metrics.jsonl') if '"loss"' in line]
    lengths = [(b - a) // 8 for a, b in zip([0, *tokens], tokens)] # 2 micro-batches of 4 sequences
    assert set(lengths) <= {3, 5, 7, 9, 10, 12, 14, 16} and len(set(lengths)) > 4
    run(dataset, tmp_path / 'b', *args, '--max_iters=8')
    run(dataset, tmp_path / 'b', *args, '--init_from=resume')
    same(tmp_path / 'a' / 'ckpt.pt', tmp_path / 'b' / 'ckpt.pt')


@pytest.mark.long("it compiles eight lengths")
def test_window_lengths_are_compiled_at_most_once_each():
    from model import GPT, GPTConfig, MIXERS
    for mixer in MIXERS:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 24 # as train.py
        compiled = []
        backend = lambda graph, inputs: compiled.append(1) or graph.forward
        model = GPT(GPTConfig(block_size=32, vocab_size=11, n_layer=1, n_head=2, n_embd=8, mixer=mixer))
        fast = torch.compile(model, backend=backend, dynamic=False)
        lengths = [12, 32]
        graphs = []
        for _ in range(3):
            for T in lengths:
                idx = torch.zeros(2, T, dtype=torch.long)
                fast(idx, idx)
            graphs.append(len(compiled))
        assert graphs == [2, 2, 2], mixer


OWN_MIXER = """
class OwnMixer(Mixer):
    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd) # torch's own
        self.register_buffer('bias', torch.ones(block_size, block_size).tril().view(1, 1, block_size, block_size))

    def mix(self, x):
        return self.c_proj(self.bias[0, 0, :x.size(1), :x.size(1)] @ x / x.size(1))


MIXERS['own'] = OwnMixer
"""


def test_model_py_alone_builds_trains_and_generates(tmp_path):
    """Copied into an empty folder; with a mixer of plain torch layers and a persistent buffer, by Muon."""
    source = (ROOT / 'model.py').read_text(encoding='utf-8')
    assert not re.search(r'^(from|import) (data\.|configurator|train\b)', source, re.M)
    (tmp_path / 'model.py').write_text(source + OWN_MIXER, encoding='utf-8')
    code = """
import torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8, mixer='own'))
optimizer = model.configure_optimizers(0.1, 0.02, (0.9, 0.95), 'cpu', 'muon')
idx = torch.arange(8)[None] % 5
first = model(idx, idx.roll(-1, 1))[1].item()
for _ in range(20):
    loss = model(idx, idx.roll(-1, 1))[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert loss.item() < first - 0.1
print(model.generate(idx[:, :2], 12, temperature=0.0).shape)
"""
    (tmp_path / 'alone.py').write_text(code)
    done = helpers.run(tmp_path / 'alone.py', [])
    assert done.returncode == 0 and b'torch.Size([1, 14])' in done.stdout, done.stderr


def test_a_mixer_with_a_buffer_can_be_opened_again(tmp_path, monkeypatch):
    import model
    from data.checkpoints import load_model, save_checkpoint, stored_config
    namespace = dict(vars(model))
    monkeypatch.setitem(model.MIXERS, 'own', None) # taken away again at the end
    namespace['MIXERS'] = model.MIXERS
    exec(OWN_MIXER, namespace)
    network = model.GPT(model.GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8, mixer='own'))
    content = dict(model=network.state_dict(), model_args=stored_config(network.config))
    save_checkpoint(tmp_path / 'ckpt.pt', content)
    again, _ = load_model(tmp_path / 'ckpt.pt')
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())
    cropped, _ = load_model(tmp_path / 'ckpt.pt', block_size=5)
    assert cropped.transformer.h[0].attn.bias.shape == (1, 1, 5, 5)


def test_a_changed_default_leaves_a_checkpoint_its_meaning(tmp_path, monkeypatch):
    """Of a setting that the mixer reads; one that another mixer reads says nothing."""
    from data.checkpoints import load_model, save_checkpoint, stored_config
    from model import GPT, GPTConfig, GatedMLP, declare_settings
    for mixer in 'gmlp', 'attention':
        network = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=8, mixer=mixer))
        save_checkpoint(tmp_path / f'{mixer}.pt', dict(model=network.state_dict(), config=dict(vars(network.config)),
                                                       model_args=stored_config(network.config)))
    try:
        with monkeypatch.context() as m:
            m.setattr(GatedMLP, 'gmlp_tanh', True)
            declare_settings(GatedMLP)
            assert GPTConfig(mixer='gmlp').gmlp_tanh
            assert not load_model(tmp_path / 'gmlp.pt')[0].config.gmlp_tanh
            load_model(tmp_path / 'attention.pt')
    finally:
        declare_settings(GatedMLP)
    assert not GPTConfig(mixer='gmlp').gmlp_tanh


def test_a_deleted_setting_at_its_default_locks_nothing_out(tmp_path):
    from data.checkpoints import load_model, save_checkpoint, stored_config
    from model import GPT, GPTConfig
    network = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    args = stored_config(network.config)
    assert 'gmlp_ratio' not in args and args['n_layer'] == 1
    save_checkpoint(tmp_path / 'ckpt.pt',
                    dict(model=network.state_dict(), model_args=args | dict(gone=0.0, off='none')))
    load_model(tmp_path / 'ckpt.pt')
    save_checkpoint(tmp_path / 'ckpt.pt', dict(model=network.state_dict(), model_args=args | dict(gone=0.5)))
    with pytest.raises(ValueError, match='architecture has gone'):
        load_model(tmp_path / 'ckpt.pt')


@posix
def test_two_runs_in_one_folder_are_refused(dataset, tmp_path):
    out = tmp_path / 'out'
    first = start(dataset, out, '--max_iters=100000', '--eval_interval=100000')
    for line in first.stdout:
        if line.startswith('step 2:'):
            break
    done = run(dataset, out, '--max_iters=2', '--overwrite=True', code=2)
    assert 'another run is at work' in done.stderr and done.stderr.count('\n') == 1
    first.kill()
    lines = (out / 'metrics.jsonl').read_text()
    assert first.wait().returncode == -signal.SIGKILL and '"step": 2,' in lines
    run(dataset, out, '--max_iters=2', '--overwrite=True') # its lock went with it


def test_a_run_without_matplotlib_wandb_and_datasets(dataset, tmp_path):
    without = 'import sys; sys.modules.update(dict.fromkeys({}))'.format
    done = run(dataset, tmp_path / 'out', '--max_iters=2', 
               first=without(['matplotlib', 'matplotlib.figure', 'wandb', 'datasets']))
    assert 'loss.png could not be drawn, training goes on: ' in done.stdout
    assert (tmp_path / 'out' / 'ckpt.pt').exists() and not (tmp_path / 'out' / 'loss.png').exists()
    done = run(dataset, tmp_path / 'out', '--max_iters=2', first=without(['tqdm']), code=2) # which every run needs
    assert done.stderr.count('\n') == 1 and 'pip install -r requirements.txt' in done.stderr


@posix
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(dataset, tmp_path):
    (tmp_path / 'file').write_text('x')
    done = run(dataset, tmp_path / 'file' / 'out', '--max_iters=2', code=2)
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
