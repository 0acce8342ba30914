"""tests/compare.py: statistics against scipy and by simulation, decisions on invented runs, and real tiny runs."""
import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch

import compare
import helpers
from data.run import Run
from data.tokenizers import ByteTokenizer
from helpers import (ForkingSubprocess, NO_PICTURES, PROJECT, mistake, random_model, well, write_checkpoint,
                     write_data)
from model import MIXERS

RNG = np.random.default_rng


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def test_t_distribution():
    for n in (1, 2, 4, 9, 30, 500):
        for t in (0.01, 0.5, 2.0, 12.0):
            assert compare.t_probability(t, n) == pytest.approx(1 - 2 * scipy.stats.t.sf(t, n), abs=1e-9)
        for p in (0.6, 0.95, 0.999):
            assert compare.t_quantile(p, n) == pytest.approx(scipy.stats.t.ppf((1 + p) / 2, n), rel=1e-6)


def test_paired_differences():
    for n in (2, 3, 5, 20):
        a, b = RNG(n).normal(size=(2, n))
        right = scipy.stats.ttest_rel(b, a)
        low, high = right.confidence_interval(0.95)
        found = compare.paired(a.tolist(), b.tolist())
        assert found['difference'] == pytest.approx((low + high) / 2)
        assert found['half'] == pytest.approx((high - low) / 2)
        assert found['p'] == pytest.approx(right.pvalue, abs=1e-8) and found['pairs'] == n
        mean, half = compare.interval(b.tolist())
        low, high = scipy.stats.t.interval(0.95, n - 1, b.mean(), scipy.stats.sem(b))
        assert (mean - half, mean + half) == pytest.approx((low, high))
    one = compare.paired([1.0], [1.5])
    assert one['difference'] == 0.5 and one['half'] is one['p'] is None
    same = compare.paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert same['difference'] == 0.0 and same['p'] == 1.0
    assert compare.paired([1.0, 2.0], [0.5, 1.5])['p'] == 0.0 # the same difference in every pair


def test_holm():
    """Against the definition: sorted, the i-th of k is multiplied by k - i, and none falls below the one before."""
    for seed in range(20):
        ps = RNG(seed).uniform(size=5).tolist()
        order, expected, highest = np.argsort(ps), [None] * 5, 0.0
        for i, at in enumerate(order):
            highest = max(highest, min(1.0, (5 - i) * ps[at]))
            expected[at] = highest
        assert compare.holm(ps) == expected
    assert compare.holm([0.01, None, 0.04]) == [0.02, None, 0.04]


def test_line():
    x, y = RNG(0).normal(size=(2, 9))
    right = scipy.stats.linregress(x, y)
    slope, half = compare.line_fit(x.tolist(), y.tolist())
    assert slope == pytest.approx(right.slope)
    assert half == pytest.approx(right.stderr * scipy.stats.t.ppf(0.975, 7))


def test_false_alarms():
    """Of 800 comparisons of three arms that are like the first, 5% call one of them better or worse."""
    rng, n, alarms = RNG(0), 800, 0
    for _ in range(n):
        base, *arms = rng.normal(1.5, 0.016, (4, 5))
        ps = compare.holm([compare.paired(base.tolist(), arm.tolist())['p'] for arm in arms])
        alarms += min(ps) < 0.05
    assert 0.02 < alarms / n < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n) # the arms share the first one: Holm is cautious


def test_power():
    """A difference as large as the detectable one is found in four of five comparisons."""
    rng, n = RNG(1), 2000
    for seeds in (5, 12):
        true = compare.detectable(1.0, seeds)
        ps = [compare.paired([0.0] * seeds, (true + rng.normal(size=seeds)).tolist())['p'] for _ in range(n)]
        found = sum(p < 0.05 for p in ps)
        assert 0.74 < found / n < 0.88
        pairs = rng.normal(size=seeds)
        pairs = (pairs - pairs.mean()) / pairs.std(ddof=1) + compare.detectable(1.0, 30) # that 30 seeds would find
        assert compare.paired([0.0] * seeds, pairs.tolist())['needed'] == 30


# ---------------------------------------------------------------------------------------------------------------------
# Decisions, on runs that are invented

@pytest.fixture
def words(tmp_path):
    write_data(tmp_path / 'words')
    config = tmp_path / 'tiny.py'
    config.write_text(f"dataset = {str(tmp_path / 'words')!r}\nn_layer = 1\nn_head = 2\nn_embd = 16\nblock_size = 16\n"
                      "batch_size = 4\ngradient_accumulation_steps = 1\nmax_iters = 8\nwarmup_iters = 2\n"
                      "learning_rate = 1e-2\nmin_lr = 1e-3\nmlp_ratio = 4.0\n")
    return config


@pytest.fixture
def run(words, tmp_path, monkeypatch, capsys):
    """run(*arguments) -> compare.json; run.asked: the (arm, factor, seed, steps) of every run since the last call."""
    monkeypatch.setattr(compare, 'STOPPING', compare.threading.Event())
    defaults = {name: getattr(compare, name) for name in compare.OWN}
    for name, value in defaults.items():
        monkeypatch.setattr(compare, name, value) # and back at the end

    def execute(command, folder, env=None):
        flags = dict(arg[2:].split('=', 1) for arg in command if arg.startswith('--'))
        key = ' '.join(f'{k}={flags[k]}' for k in ('qk_norm', 'mlp', 'n_embd') if k in flags)
        factor, seed = float(flags['learning_rate']) / 1e-2, int(flags['seed'])
        script.asked.append((key, round(factor, 6), seed, int(flags['max_iters'])))
        folder.mkdir(parents=True)
        loss = script.loss(key, factor, seed)
        lines = [dict(step=i, tokens=64 * i, seconds=i / 10, val_loss=x, train_loss=x, bits_per_byte=2 * x)
                 for i, x in ((0, 3.0), (int(flags['max_iters']), loss))]
        lines.insert(1, dict(step=1, tokens=64, seconds=0.1, loss=3.0, tokens_per_s=640 / (1 + (key == 'mlp=swiglu')),
                             peak_memory=10 ** 8))
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        (folder / 'log.txt').write_text('' if math.isfinite(loss) else 'stopping after 20 such steps')
        result = compare.read_run(folder, 0 if math.isfinite(loss) else 1) | dict(status=0, took=1.0)
        (folder / 'result.json').write_text(json.dumps(result))
    monkeypatch.setattr(compare, 'execute', execute)
    draw = compare.draw
    monkeypatch.setattr(compare, 'draw', lambda *args: script.draws and draw(*args)) # takes longer than all the rest

    def script(*arguments, refused=False):
        for name, value in defaults.items():
            setattr(compare, name, value)
        script.asked = []
        argv = [str(words), f'--out={tmp_path}/out', *arguments]
        if refused:
            return mistake(capsys, compare.main, argv)
        compare.main(argv)
        script.text = capsys.readouterr().out
        return json.loads((tmp_path / 'out/compare.json').read_text())['tables'][0]['rows']
    # a seed's luck is shared by all arms
    script.loss = lambda key, factor, seed: (1.5 + 0.01 * math.sin(seed) - 0.02 * (key == 'qk_norm=True')
                                             + 0.001 * math.sin(7 * seed + len(key))
                                             + 0.05 * math.log2(factor / 2) ** 2)
    script.default_loss = script.loss
    script.draws = False
    return script


def test_verdicts(run, tmp_path):
    """A difference well below the seeds' own spread is found, as they are paired; the A/A arm is not one."""
    run.draws = True
    first, better, worse, aa = run('--arms=qk_norm=True,mlp=swiglu', '--seeds=5', '--lrs=1,2,4', '--aa=True')
    assert first['arm'] == 'as it is' and 'difference' not in first
    assert better['difference'] == pytest.approx(-0.02, abs=2e-3)
    assert better['half'] < 0.003 < 0.008 < better['loss_half']
    assert better['verdict'].startswith('better by 0.0') and 'at equal steps, 5 paired seeds' in better['verdict']
    assert 'causal: proven' in better['verdict']
    assert worse['verdict'].startswith('cannot tell') and aa['verdict'].startswith('cannot tell')
    assert re.search(r'(about \d+ more|more than 1,000) seeds? would', aa['verdict'])
    assert better['lr'] == 2.0 and better['learning_rate'] == pytest.approx(0.02) and better['bracketed']
    assert set(better['lr_losses']) == {'1', '2', '4'}
    assert better['bits_per_byte'] == pytest.approx(2 * better['loss'])
    searched = {seed for _, _, seed, _ in run.asked if seed >= compare.SEARCH_SEED}
    assert searched == {compare.SEARCH_SEED} | {compare.AA_SEED + s for s in range(5)}
    verdict = [(key, seed) for key, factor, seed, _ in run.asked if seed < 100]
    assert verdict[:3] == [('', 1), ('qk_norm=True', 1), ('mlp=swiglu', 1)] # in turn
    for name in ('curves.png', 'learning_rates.png', 'differences.png'):
        assert (tmp_path / 'out' / name).stat().st_size > 5000
    assert 'qk_norm=True: better' in run.text and '| difference' in (tmp_path / 'out/table.md').read_text()
    run.draws = False
    # again: nothing is trained; one seed and one arm more: these alone
    run('--arms=qk_norm=True,mlp=swiglu', '--seeds=5', '--lrs=1,2,4', '--aa=True')
    assert run.asked == []
    run('--arms=qk_norm=True,mlp=swiglu,mlp=relu2', '--seeds=6', '--lrs=1,2,4')
    assert sorted({(key, seed) for key, _, seed, _ in run.asked}) == sorted(
        [('', 6), ('qk_norm=True', 6), ('mlp=swiglu', 6)]
        + [('mlp=relu2', s) for s in (1, 2, 3, 4, 5, 6, compare.SEARCH_SEED)])


def test_learning_rates_are_bracketed_or_said_not_to_be(run):
    run('--seeds=1', '--lrs=0.5,1')
    assert [factor for _, factor, seed, _ in run.asked if seed >= compare.SEARCH_SEED] == [0.5, 1.0, 2.0, 4.0]
    (row,) = run('--seeds=1', '--lrs=3,')
    assert row['lr'] == 3.0 and [factor for _, factor, _, _ in run.asked] == [3.0]
    run.loss = lambda key, factor, seed: 1.0 / factor
    (row,) = run('--seeds=1', '--lrs=3,9', '--arms=')
    assert not row['bracketed'] and row['lr'] == 81.0 and '(not bracketed)' in run.text


def test_other_vocabularies_are_compared_in_bits_per_byte(run, tmp_path):
    write_data(tmp_path / 'bytes', ByteTokenizer())
    first, other = run(f"--arms=dataset={tmp_path / 'bytes'}", '--seeds=3')
    assert other['losses'] == other['bits'] and other['loss'] == pytest.approx(3.1, abs=0.1)
    assert other['curves'][0][-1][-1] == pytest.approx(other['losses'][0])
    assert re.search(r'bits per byte at equal steps', other['verdict'])
    (first,) = run('--seeds=3', '--out=' + str(tmp_path / 'out'))
    assert first['loss'] == pytest.approx(1.55, abs=0.05) # one vocabulary: nats


def test_what_is_equal(run):
    first, row = run('--arms=mlp=swiglu', '--seeds=2', '--equal=params')
    assert abs(row['params'] / first['params'] - 1) < 0.02 and row['settings'][-1].startswith('--mlp_ratio=')
    first, row = run('--arms=mlp=swiglu', '--seeds=2', '--equal=flops')
    assert row['flops'] > first['flops'] and row['steps'] == round(8 * first['flops'] / row['flops'])
    first, row = run('--arms=mlp=swiglu', '--seeds=2', '--equal=seconds')
    assert row['steps'] == 4 and {steps for key, _, seed, steps in run.asked if seed < 3 and key} == {4, 60}
    for equal in 'flops', 'seconds': # a step of twice the tokens counts twice
        first, row = run('--arms=batch_size=8', '--seeds=2', f'--equal={equal}')
        assert (first['steps'], row['steps']) == (8, 4)


def test_a_run_that_fails_is_a_result(run):
    run.loss = lambda key, factor, seed: math.nan if key and seed == 2 else run.default_loss(key, factor, seed)
    _, row = run('--arms=qk_norm=True', '--seeds=4')
    assert row['pairs'] == 3 and row['failed'] == ['had no finite step'] and '1 of 4 runs failed' in row['verdict']
    run.loss = lambda key, factor, seed: math.nan if key else 1.0
    _, row = run('--arms=mlp=relu2', '--seeds=2')
    assert row['verdict'].startswith('no pair of runs') and 'loss' not in row


def test_a_run_that_somebody_stops_goes_on_next_time(run, monkeypatch):
    train = compare.execute
    monkeypatch.setattr(compare, 'execute', lambda command, folder, env=None: (
        None if '--seed=2' in command else train(command, folder, env)))
    assert 'seed 2 was stopped or killed before its end' in run('--seeds=3', refused=True)
    monkeypatch.setattr(compare, 'execute', train)
    run('--seeds=3')
    assert [seed for _, _, seed, _ in run.asked] == [2]


def test_a_killed_run_is_no_result(tmp_path):
    code = 'import os, sys; os.kill(os.getpid(), int(sys.argv[1])) if sys.argv[1] != "0" else sys.exit(3)'
    compare.execute([sys.executable, '-c', code, '9'], tmp_path / 'killed') # as where memory is short
    assert not (tmp_path / 'killed/result.json').exists()
    for status in '0', str(int(signal.SIGSEGV)): # a crash is one
        compare.execute([sys.executable, '-c', code, status], tmp_path / status)
        assert json.loads((tmp_path / status / 'result.json').read_text())['status'] in (3, -signal.SIGSEGV)


def test_a_run_that_is_still_at_work_is_left_alone(tmp_path):
    (tmp_path / 'ckpt.pt').touch()
    other = Run(tmp_path)
    other.lock()
    compare.execute([sys.executable, '-c', 'a mistake'], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']
    other.unlock()


def test_a_damaged_result_is_done_again(run, tmp_path):
    run('--seeds=2')
    folder = next(tmp_path.glob('out/runs/*'))
    (folder / 'result.json').write_text('{')
    assert 'File exists' in run('--seeds=2', refused=True) # it is asked for again, and the fixture makes its folder


def test_runs_of_the_first_arm_that_fail_are_said(run):
    run.loss = lambda key, factor, seed: math.nan if not key and seed == 2 else run.default_loss(key, factor, seed)
    _, row = run('--arms=qk_norm=True', '--seeds=4')
    assert row['pairs'] == 3 and '1 of 4 runs of the first arm failed: it had no finite step' in row['verdict']


def test_two_comparisons_in_one_folder(run, tmp_path):
    run('--seeds=2')
    other = Run(tmp_path / 'out')
    other.lock()
    assert f"another run is at work in out={str(tmp_path / 'out')!r}" in run('--seeds=3', refused=True)
    other.unlock()
    run('--seeds=3')
    assert [seed for _, _, seed, _ in run.asked] == [3]


def test_a_mistake_in_a_mixer(run, tmp_path):
    idea = tmp_path / 'idea.py'
    idea.write_text("from model import Mixer\nmixer = 'idea'\nclass Idea(Mixer):\n"
                    "    def mix(self, x):\n        return x.cumsumm(1)\n")
    assert f"{idea}:5: AttributeError: 'Tensor' object has no attribute" in run(f'--arms={idea}', refused=True)
    MIXERS.pop('idea') # other tests take all


def test_a_leaking_arm_is_refused(run, tmp_path):
    idea = tmp_path / 'mean_of_all.py'
    idea.write_text("from model import Mixer\nmixer = 'mean_of_all'\nclass MeanOfAll(Mixer):\n"
                    "    def mix(self, x):\n        return x.mean(1, keepdim=True).expand_as(x)\n")
    _, row = run(f'--arms={idea}', '--seeds=2')
    assert row['verdict'].startswith('refused: it is not causal: position') and 'losses' not in row
    assert len(run.asked) == 2 and 'LEAKS' in run.text
    _, row = run(f'--arms={idea}', '--seeds=2', '--allow_leak=True')
    assert 'NOT CAUSAL' in row['verdict'] and '(LEAKS)' in run.text


def test_scale(run):
    """The gap to the first arm at each width, and its change for ten times the FLOPs."""
    run.loss = lambda key, factor, seed: (
        1.5 + 0.001 * math.sin(3 * seed + len(key)) - (0.1 if 'qk_norm' in key and 'n_embd=16' in key else 0))
    rows = run('--arms=qk_norm=True', '--seeds=3', '--scale=16,32,64')
    assert rows[1]['difference'] == pytest.approx(-0.1, abs=0.01)
    line = run.text.strip().splitlines()[-1]
    assert 'qk_norm=True by n_embd: -0.' in line and 'for ten times the FLOPs' in line


def test_a_module_that_two_arms_import_is_part_of_both(run, tmp_path):
    (tmp_path / 'width_of_mlp.py').write_text('WIDTH = 2.0')
    for i in (1, 2):
        (tmp_path / f'arm{i}.py').write_text(f'import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport width_of_mlp as '
                                             f'_module\nmlp_ratio = _module.WIDTH + {i}\n')
    arms = f'--arms={tmp_path}/arm1.py,{tmp_path}/arm2.py'
    run(arms, '--seeds=1')
    assert len(run.asked) == 3
    with open(tmp_path / 'width_of_mlp.py', 'a') as f:
        f.write(' # a change')
    run(arms, '--seeds=1')
    assert len(run.asked) == 2


def test_runs_begin_with_the_given_weights(run, words, tmp_path, monkeypatch):
    torch.manual_seed(0)
    write_checkpoint(tmp_path / 'w/ckpt.pt', random_model(24, n_embd=16, n_head=2, n_layer=1, block_size=16))
    monkeypatch.chdir(tmp_path)
    cell = compare.Cell(compare.make_arm('', [str(words), '--init_from=w/ckpt.pt']), 1.0, 1, 8)
    command = cell.command()
    assert f"--init_from={tmp_path / 'w/ckpt.pt'}" in command and '--init_from=auto' not in command
    monkeypatch.setattr(Run, 'has_checkpoint', lambda self: True) # it was interrupted
    assert cell.command()[-1] == '--init_from=auto'


@pytest.mark.parametrize('arguments, expected', [
    (['--arms=qk_nrom=True'], 'qk_nrom'), (['--arms=rope'], "'rope'"), (['--arms=nowhere.py'], 'nowhere.py'),
    (['--arms=qk_norm=True,qk_norm=True'], 'the same'), (['--arms=qk_norm=False'], 'the same'),
    (['--lrs=0,1'], 'lie in (0, inf)'), (['--lrs=1,1'], 'different'), (['--seeds=0'], 'seeds=0'),
    (['--arms=mlp=none', '--equal=params'], '--equal=flops'), (['--dataset=shakespeare'], 'prepare.py'),
    (['--equal=watts'], 'watts'), (['--arms=seed=5'], 'the same'), (['--arms=log_interval=3'], 'the same'),
    (['--arms=max_iters=20'], 'max_iters=20 and the first one 8'), (['--out='], "out='' is no folder"),
    (['--arms=mixer=mlp_mixer+pos_emb=none+block_size=256', '--equal=params'], 'cannot have')])
def test_mistakes(run, tmp_path, arguments, expected):
    assert expected in run(*arguments, refused=True)
    assert not (tmp_path / 'out').exists()


def test_a_folder_of_another_comparison(run):
    run('--seeds=2')
    assert 'holds the comparison of' in run('--seeds=2', '--n_embd=32', refused=True)
    (row,) = run('--seeds=1')
    assert row['loss_half'] is None


# ---------------------------------------------------------------------------------------------------------------------
# Real runs

def start(words, out, *more):
    return subprocess.Popen([sys.executable, PROJECT / 'tests/compare.py', words, f'--out={out}', '--arms=qk_norm=True',
                             '--seeds=2', '--eval_tokens=64', '--device=cpu', '--dtype=float32', '--peak_flops=1e12',
                             *more],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS='1'))


def run_directly(words, tmp_path, seed):
    """train.py with the settings that compare.py gives the second arm."""
    return well(helpers.run('train.py', [
        words, '--qk_norm=True', f'--seed={seed}', '--eval_tokens=64', '--device=cpu', '--dtype=float32',
        '--peak_flops=1e12', '--eval_interval=2', f'--out_dir={tmp_path}/direct'], first=NO_PICTURES))


def test_each_run_is_what_train_py_makes_of_the_same_settings(words, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, 'subprocess', ForkingSubprocess)
    monkeypatch.setattr(compare, 'STOPPING', compare.threading.Event())
    for name in compare.OWN:
        monkeypatch.setattr(compare, name, getattr(compare, name)) # and back at the end
    compare.main([str(words), f'--out={tmp_path}/out', '--arms=qk_norm=True', '--seeds=1', '--eval_tokens=64',
                  '--jobs=2', '--device=cpu', '--dtype=float32', '--peak_flops=1e12'])
    rows = json.loads((tmp_path / 'out/compare.json').read_text())['tables'][0]['rows']
    assert all(1 < row['loss'] < 3.2 for row in rows) and not list(tmp_path.glob('out/runs/*/*.pt'))
    text = run_directly(words, tmp_path, 1)
    assert 'step 8: train loss' in text and f"val loss {rows[1]['losses'][0]:.4f}" in text


@pytest.mark.long('eight processes')
def test_real_runs(words, tmp_path):
    """Two at once; interrupted and gone on with; each one is what train.py makes of the same settings."""
    process = start(words, tmp_path / 'out', '--jobs=2')
    for line in process.stdout:
        if '1/4' in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    known = {path: path.read_bytes() for path in tmp_path.glob('out/runs/*/result.json')}
    assert process.returncode == 130 and 'goes on' in out and 1 <= len(known) < 4, out + err
    process = start(words, tmp_path / 'out', '--json')
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    rows = json.loads(out)['tables'][0]['rows']
    assert all(path.read_bytes() == before for path, before in known.items())
    assert all(1 < loss < 3.2 for row in rows for loss in row['losses']) and len(rows[1]['losses']) == 2
    assert not list(tmp_path.glob('out/runs/*/*.pt')) # no weights are left behind
    text = run_directly(words, tmp_path, 2)
    assert 'step 8: train loss' in text and f"val loss {rows[1]['losses'][1]:.4f}" in text


@pytest.mark.long('submitit')
def test_on_a_cluster(words, tmp_path):
    """By submitit, whose local executor stands in for SLURM."""
    pytest.importorskip('submitit')
    process = start(words, tmp_path / 'out', '--cluster=local', '--seeds=1')
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and 'is an anecdote' in out, out + err
