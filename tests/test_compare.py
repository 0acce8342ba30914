"""tests/compare.py: decisions on invented runs, and real tiny runs. Its statistics: test_evidence.py."""
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import compare
import helpers
from data.run import Run
from data.tokenizers import ByteTokenizer
from helpers import (ForkingSubprocess, NO_PICTURES, PROJECT, mistake, random_model, well, write_checkpoint,
                     write_data)
from model import MIXERS

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
    monkeypatch.setattr(compare, 'PROOFS', {})
    defaults = {name: getattr(compare, name) for name in compare.OWN}
    for name, value in defaults.items():
        monkeypatch.setattr(compare, name, value) # and back at the end

    def execute(stages, folder, env=None):
        command = stages[-1][1]
        flags = dict(arg[2:].split('=', 1) for arg in command if arg.startswith('--'))
        key = ' '.join(f'{k}={flags[k]}' for k in ('qk_norm', 'mlp', 'n_embd') if k in flags)
        key += 'A/A' * ('init_offset' in flags)
        factor, seed = float(flags['learning_rate']) / 1e-2, int(flags['seed'])
        script.asked.append((key, factor, seed, int(flags['max_iters'])))
        script.datasets.add(flags.get('dataset'))
        folder.mkdir(parents=True)
        loss = script.loss(key, factor, seed)
        lines = [dict(step=i, tokens=64 * i, seconds=i / 10, val_loss=x, train_loss=x, bits_per_byte=2 * x)
                 for i, x in ((0, 3.0), (int(flags['max_iters']), loss))]
        lines.insert(1, dict(step=1, tokens=64, seconds=0.1, loss=3.0, tokens_per_s=640 / (1 + (key == 'mlp=swiglu')),
                             peak_memory=10 ** 8))
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        (folder / 'log.txt').write_text('' if math.isfinite(loss) else 'stopping after 20 such steps')
        result = compare.read_run(folder, 0 if math.isfinite(loss) else 1) | dict(status=0, took=1.0)
        result['at'] = {os.path.basename(place): (script.loss(key, factor, seed, int(os.path.basename(place))), None)
                        for place, _, trunk in stages if trunk}
        (folder / 'result.json').write_text(json.dumps(result))
    monkeypatch.setattr(compare, 'execute', execute)
    draw = compare.verdicts.draw
    # takes longer than all the rest
    monkeypatch.setattr(compare.verdicts, 'draw', lambda *args: script.draws and draw(*args))

    def script(*arguments, refused=False):
        for name, value in defaults.items():
            setattr(compare, name, value)
        script.asked, script.datasets = [], set()
        argv = [str(words), f'--out={tmp_path}/out', *arguments]
        if refused:
            return mistake(capsys, compare.main, argv)
        try:
            compare.main(argv)
            script.status = 0
        except SystemExit as end:
            script.status = end.code
        script.text = capsys.readouterr().out
        return json.loads((tmp_path / 'out/compare.json').read_text())['tables'][0]['rows']
    # a seed's luck is shared by all arms
    # noise of 0.01, and the best factor is 2
    script.loss = lambda key, factor, seed, steps=0: (
        1.5 + 0.014 * math.sin(hash((seed, len(key))) % 1000) - 0.1 * (key == 'qk_norm=True')
        + 0.05 * math.log2(factor / 2) ** 2)
    script.default_loss = script.loss
    script.draws = False
    return script


def test_verdicts(run, tmp_path):
    run.draws = True
    first, better, other, aa = run('--arms=qk_norm=True,mlp=swiglu', '--seeds=6', '--aa=True')
    assert first['arm'] == 'as it is' and 'difference' not in first
    assert better['word'] == 'better' and better['difference'] == pytest.approx(-0.1, abs=0.02)
    assert better['verdict'].startswith('better by 0.') and '6 seeds; causal: proven' in better['verdict']
    for row in other, aa:
        assert row['word'] == 'cannot tell' and re.search(r'(about \d+ more|50) seeds? would', row['verdict'])
    for row in better, other, aa: # what is printed is what decides
        low, high = row['interval']
        assert (row['word'] == 'cannot tell') == (low < 0 < high) == (row['p'] >= 0.05)
        assert high - low == pytest.approx(2 * row['half']) and row['e_value'] == pytest.approx(0.5 * row['p'] ** -0.5)
    assert better['lr'] == pytest.approx(2.0, rel=0.2) and better['bracketed'] and run.status == 1
    assert set(better['lr_losses']) >= {'0.5', '1', '2', '4', '1.414', '2.828'}
    assert sum(len(losses) for losses in better['lr_losses'].values()) + 6 == better['runs']
    assert better['bits_per_byte'] == pytest.approx(2 * better['loss'])
    assert aa['family'] == 1 and other['family'] < 3 # outside of the family
    assert {key for key, _, _, _ in run.asked} == {'', 'qk_norm=True', 'mlp=swiglu', 'A/A'}
    assert {seed for _, _, seed, _ in run.asked} == {1, 2, 3, 4, 5, 6, *(compare.SEARCH_SEED + s for s in range(3))}
    verdict = [(key, seed) for key, factor, seed, _ in run.asked if seed < 100]
    assert verdict[:3] == [('', 1), ('qk_norm=True', 1), ('mlp=swiglu', 1)] # in turn
    for name in ('curves.png', 'learning_rates.png', 'differences.png'):
        assert (tmp_path / 'out' / name).stat().st_size > 5000
    assert 'qk_norm=True: better' in run.text and max(map(len, run.text.split('\n\n')[0].splitlines())) <= 100
    assert '| parameters |' in (tmp_path / 'out/table.md').read_text()
    run.draws = False
    # again: nothing is trained; one seed and one arm more: these alone
    run('--arms=qk_norm=True,mlp=swiglu', '--seeds=6', '--aa=True')
    assert run.asked == []
    run('--arms=qk_norm=True,mlp=swiglu,mlp=relu2', '--seeds=7')
    assert {(key, seed) for key, _, seed, _ in run.asked if key != 'mlp=relu2'} == {
        ('', 7), ('qk_norm=True', 7), ('mlp=swiglu', 7)}
    assert {seed for key, _, seed, _ in run.asked if key == 'mlp=relu2'} >= {1, 7, compare.SEARCH_SEED}


def test_until_decided(run):
    """Clear arms stop; the others go on to the limit, and the first arm with more seeds, which all of them share."""
    rows = run('--arms=qk_norm=True,mlp=swiglu,mlp=relu2', '--seeds=3', '--until=decided', '--max_seeds=7')
    first, clear, *others = rows
    assert clear['word'] == 'better' and clear['seeds'] == 3 and first['seeds'] == 7
    assert [row['seeds'] for row in others] == [7, 7] and run.status == 1
    run.loss = lambda key, factor, seed, steps=0: run.default_loss(key, factor, seed) - 0.2 * (key == 'mlp=relu2')
    rows = run('--arms=qk_norm=True', '--seeds=3', '--until=decided', '--hours=1')
    assert rows[1]['seeds'] == 3 and run.status == 0


def test_the_same_to_within_a_margin(run):
    rows = run('--arms=mlp=swiglu,qk_norm=True', '--seeds=12', '--lrs=2,', '--margin=0.05', '--ledger=')
    assert rows[1]['word'] == 'the same to within 0.05' and rows[1]['verdict'].startswith('the same to within 0.05: ')
    assert rows[2]['word'] == 'better' and run.status == 0


def test_learning_rates_are_bracketed_or_said_not_to_be(run):
    run.loss = lambda key, factor, seed, steps=0: math.nan if factor > 3 else run.default_loss(key, factor, seed)
    (row,) = run('--seeds=1')
    assert 1.4 < row['lr'] < 3 and row['bracketed'] and row['lr_losses']['4'] == [None]
    (row,) = run('--seeds=1', '--lrs=3,')
    assert row['lr'] == pytest.approx(3, rel=1e-3) and [seed for _, _, seed, _ in run.asked] == [1]
    run.loss = lambda key, factor, seed, steps=0: 1.0 / factor
    _, row = run('--seeds=1', '--lrs=3,9', '--arms=qk_norm=True')
    assert not row['bracketed'] and row['lr'] > 81.0
    run.loss = lambda key, factor, seed, steps=0: math.nan
    _, row = run('--seeds=1', '--arms=mlp=relu2') # every rate fails
    assert not row['bracketed'] and row['lr'] < 1.0


def test_a_broken_promise_and_an_outlier_are_said(run):
    bad = lambda key, seed: bool(key) and seed < 100
    run.loss = lambda key, factor, seed, steps=0: run.default_loss(key, factor, seed) + 0.2 * bad(key, seed)
    _, row = run('--arms=mlp=relu2', '--seeds=4')
    assert 'its search promised 1.' in row['verdict'] and row['word'] == 'cannot tell' and row['difference'] > 0.1
    run.loss = lambda key, factor, seed, steps=0: run.default_loss(key, factor, seed) + bad(key, seed) * (seed == 3)
    _, row = run('--arms=mlp=swiglu', '--seeds=6')
    assert 'outliers: seed 3 (2.' in row['verdict'] and row['outliers'].keys() == {'3'}


def test_horizons(run, tmp_path, words):
    """One trunk, a decay for each horizon; the difference at each, and its change."""
    run.loss = lambda key, factor, seed, steps=8: (
        run.default_loss(key, factor, seed) - (0.4 + 0.01 * seed) * (key != '') / (steps or 8) + 0.3 * (steps == 4))
    _, row = run('--arms=mlp=relu2', '--seeds=4', '--horizons=4,8', '--lrs=2,')
    assert row['at']['4']['difference'] == pytest.approx(row['difference'] - 0.05, abs=0.03)
    _, searched = run('--arms=mlp=relu2', '--seeds=4', '--horizons=4,8') # which promises nothing for other lengths
    run('--arms=mlp=relu2', '--seeds=4', '--horizons=4,8', '--lrs=2,')
    assert searched['broken_promise'] is None and searched['at']['4']['half'] < 0.1
    line = run.text.split('mlp=relu2 by steps: ')[1].splitlines()[0]
    gaps, change = line.split('; ')
    assert re.fullmatch(r'-0.1\S+ ± \S+ at 4, -0.0\S+ ± \S+ at 8', gaps)
    assert re.fullmatch(r'it changes by .0.0[45]\S+ ± .* for twice the steps', change)
    cell = compare.Cell(compare.make_arm('', [str(words)]), 1.0, 1, 8, horizons=(4, 8))
    places = [(place.name, [arg for arg in command if arg.startswith(('--max', '--wsd', '--lr_'))], trunk and trunk.name)
              for place, command, trunk in cell.stages()]
    assert places == [('trunk', ['--max_iters=3', '--lr_decay_iters=8', '--wsd_decay_iters=0'], None),
                      ('4', ['--max_iters=4', '--lr_decay_iters=4', '--wsd_decay_iters=1'], 'trunk'),
                      ('trunk', ['--max_iters=6', '--lr_decay_iters=8', '--wsd_decay_iters=0'], None),
                      ('8', ['--max_iters=8', '--lr_decay_iters=8', '--wsd_decay_iters=2'], 'trunk')]


@pytest.mark.parametrize('values, failed', [
    ([5.0, 2.0], None), ([5.0, None], 'ended with a loss that is not finite'),
    ([], 'ended with a loss that is not finite')])
def test_a_run_that_diverges_after_an_evaluation_has_failed(values, failed, tmp_path):
    """Its last finite loss is that of an earlier step."""
    lines = [dict(step=i, tokens=i, seconds=i, val_loss=loss, train_loss=loss) for i, loss in enumerate(values)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (tmp_path / 'log.txt').write_text('done')
    result = compare.read_run(tmp_path, 0)
    assert result['failed'] == failed and result['loss'] == (None if failed else 2.0)
    assert len(result['curve']) == sum(value is not None for value in values)


def test_flops_that_cannot_be_counted(run, monkeypatch):
    monkeypatch.setattr(compare, 'cost', lambda network: math.nan)
    assert 'the FLOPs of as it is cannot be counted' in run('--arms=mlp=relu2', '--equal=flops', refused=True)


def test_ledger(run, tmp_path):
    """Each idea that was compared on a text is counted, in whichever comparison it was."""
    run('--arms=qk_norm=True', '--seeds=3', '--lrs=2,')
    assert '1 idea was compared on this text' in run.text
    run('--arms=qk_norm=True,mlp=relu2', '--seeds=3', '--lrs=2,')
    run('--arms=qk_norm=True,mlp=relu2', '--seeds=3', '--lrs=2,') # and once
    assert '2 ideas were compared on this text' in run.text
    lines = [json.loads(line) for line in (tmp_path / 'words/ledger.jsonl').read_text().splitlines()]
    assert {line['arm'] for line in lines} == {'qk_norm=True', 'mlp=relu2'} and lines[0]['word'] == 'better'
    run('--arms=mlp=swiglu', '--seeds=3', '--lrs=2,', f'--ledger={tmp_path}/other.jsonl')
    assert '1 idea was' in run.text and (tmp_path / 'other.jsonl').exists()
    (tmp_path / 'other.jsonl').write_text('{')
    assert 'other.jsonl is damaged' in run('--arms=mlp=gelu_tanh', f'--ledger={tmp_path}/other.jsonl', refused=True)
    assert run.asked == []


def test_confirm(run, tmp_path, words):
    """Fresh seeds, on the sealed text alone, at the searched rates, for one arm, once."""
    arms = '--arms=qk_norm=True,mlp=relu2'
    run(arms, '--seeds=3')
    assert 'there is no test.bin' in run(arms, '--confirm=qk_norm=True', refused=True)
    (tmp_path / 'words/test.bin').write_bytes((tmp_path / 'words/val.bin').read_bytes()[:400])
    run.loss = lambda key, factor, seed, steps=0: ( # the search promises nothing for text that is harder
        run.default_loss(key, factor, seed) + 0.3 * (seed >= compare.CONFIRM_SEED))
    rows = run(arms, '--confirm=qk_norm=True', '--seeds=4')
    assert [row['arm'] for row in rows] == ['as it is', 'qk_norm=True'] and rows[1]['word'] == 'better'
    assert {seed for _, _, seed, _ in run.asked} == {compare.CONFIRM_SEED + s for s in range(4)}
    assert run.datasets == {str(tmp_path / 'out/sealed/words')}
    run(arms, '--confirm=qk_norm=True', '--seeds=4')
    assert run.asked == [] # the same again
    assert 'a second look is no confirmation' in run(arms, '--confirm=mlp=relu2', refused=True)
    assert "confirm='mlp=gelu' is not one of" in run(arms, '--confirm=mlp=gelu', refused=True)


def test_other_vocabularies_are_compared_in_bits_per_byte(run, tmp_path):
    write_data(tmp_path / 'bytes', ByteTokenizer())
    first, other = run(f"--arms=dataset={tmp_path / 'bytes'}", '--seeds=3', '--lrs=2,')
    assert other['losses'] == other['bits'] and other['loss'] == pytest.approx(3.0, abs=0.1)
    assert other['curves'][0][-1][-1] == pytest.approx(other['losses'][0])
    assert 'bits per byte, p=' in other['verdict']
    (first,) = run('--seeds=3', '--lrs=2,', '--out=' + str(tmp_path / 'out'))
    assert first['loss'] == pytest.approx(1.5, abs=0.05) # one vocabulary: nats


def test_what_is_equal(run):
    first, row = run('--arms=mlp=swiglu', '--seeds=2', '--lrs=2,', '--equal=params')
    assert abs(row['params'] / first['params'] - 1) < 0.02 and row['settings'][-1].startswith('--mlp_ratio=')
    first, row = run('--arms=mlp=swiglu', '--seeds=2', '--lrs=2,', '--equal=flops')
    assert row['flops'] > first['flops'] and row['steps'] == round(8 * first['flops'] / row['flops'])
    first, row = run('--arms=mlp=swiglu', '--seeds=2', '--lrs=2,', '--equal=seconds')
    assert row['steps'] == 4 and {steps for key, _, seed, steps in run.asked if seed < 3 and key} == {4, 60}
    for equal in 'flops', 'seconds': # a step of twice the tokens counts twice
        first, row = run('--arms=batch_size=8', '--seeds=2', '--lrs=2,', f'--equal={equal}')
        assert (first['steps'], row['steps']) == (8, 4)


def test_a_run_that_fails_is_a_result(run):
    run.loss = lambda key, factor, seed, steps=0: math.nan if key and seed == 2 else run.default_loss(key, factor, seed)
    _, row = run('--arms=qk_norm=True', '--seeds=4', '--lrs=2,')
    assert (row['won'], row['lost']) == (3, 1) and row['word'] == 'cannot tell' # the best losses do not win
    assert row['failed'] == ['had no finite step'] and '1 of 4 runs failed' in row['verdict']
    run.loss = lambda key, factor, seed, steps=0: math.nan if key and seed < 20 else run.default_loss(key, factor, seed)
    _, row = run('--arms=mlp=swiglu', '--seeds=9', '--lrs=2,')
    assert row['word'] == 'worse' and 'a lower loss in 0 of 9 seeds' in row['verdict']
    run.loss = lambda key, factor, seed, steps=0: math.nan if key else 1.0
    _, row = run('--arms=mlp=relu2', '--seeds=2', '--lrs=2,')
    assert row['word'] == 'cannot tell' and 'loss' not in row


def test_a_run_that_somebody_stops_goes_on_next_time(run, monkeypatch):
    train = compare.execute
    monkeypatch.setattr(compare, 'execute', lambda stages, folder, env=None: (
        None if '--seed=2' in stages[0][1] else train(stages, folder, env)))
    assert 'seed 2 was stopped or killed before its end' in run('--seeds=3', '--lrs=2,', refused=True)
    monkeypatch.setattr(compare, 'execute', train)
    run('--seeds=3', '--lrs=2,')
    assert [seed for _, _, seed, _ in run.asked] == [2]


def test_a_killed_run_is_no_result(tmp_path):
    code = 'import os, sys; os.kill(os.getpid(), int(sys.argv[1])) if sys.argv[1] != "0" else sys.exit(3)'
    killed = tmp_path / 'killed' # as where memory is short
    compare.execute([(killed, [sys.executable, '-c', code, '9'], None)], killed)
    assert not (tmp_path / 'killed/result.json').exists()
    for status in '0', str(int(signal.SIGSEGV)): # a crash is one
        compare.execute([(tmp_path / status, [sys.executable, '-c', code, status], None)], tmp_path / status)
        assert json.loads((tmp_path / status / 'result.json').read_text())['status'] in (3, -signal.SIGSEGV)


def test_a_run_that_is_still_at_work_is_left_alone(tmp_path):
    (tmp_path / 'ckpt.pt').touch()
    other = Run(tmp_path)
    other.lock()
    compare.execute([(tmp_path, [sys.executable, '-c', 'a mistake'], None)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']
    other.unlock()


def test_a_proof_is_kept_if_it_is_whole(run, tmp_path, monkeypatch):
    prove, proven = compare.prove_causal, []
    monkeypatch.setattr(compare, 'prove_causal', lambda arm: proven.append(arm.name) or script(prove(arm)))
    script = lambda proof: proof._replace(cuts=3, decoding='it is off')
    run('--seeds=1', '--lrs=2,', '--arms=qk_norm=True')
    assert 'no leak at 3 of 15 cuts; but samples will be wrong or fail\n' in run.text
    script = lambda proof: proof
    for n, damage in (4, False), (4, True), (5, False): # again, as they were in part; then kept; then one is damaged
        run('--seeds=1', '--lrs=2,', '--arms=qk_norm=True')
        assert len(proven) == n and 'qk_norm=True: causal, proven at T=16' in run.text
        compare.PROOFS.clear()
        if damage:
            next((tmp_path / 'out/proofs').iterdir()).write_text('[')


def test_a_damaged_result_is_done_again(run, tmp_path):
    run('--seeds=2', '--lrs=2,')
    folder = next(tmp_path.glob('out/runs/*'))
    (folder / 'result.json').write_text('{')
    # it is asked for again, and the fixture makes its folder
    assert 'File exists' in run('--seeds=2', '--lrs=2,', refused=True)


def test_runs_of_the_first_arm_that_fail_are_said(run):
    run.loss = lambda key, factor, seed, steps=0: (
        math.nan if not key and seed == 2 else run.default_loss(key, factor, seed))
    _, row = run('--arms=qk_norm=True', '--seeds=4', '--lrs=2,')
    assert row['won'] + row['lost'] == 4
    assert '1 of 4 runs of the first arm failed: it had no finite step' in row['verdict']


def test_two_comparisons_in_one_folder(run, tmp_path):
    run('--seeds=2', '--lrs=2,')
    other = Run(tmp_path / 'out')
    other.lock()
    assert f"another run is at work in out={str(tmp_path / 'out')!r}" in run('--seeds=3', '--lrs=2,', refused=True)
    other.unlock()
    run('--seeds=3', '--lrs=2,')
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
    _, row = run(f'--arms={idea}', '--seeds=2', '--lrs=1,')
    assert row['verdict'].startswith('refused: it is not causal: position') and 'losses' not in row
    assert len(run.asked) == 2 and 'LEAKS' in run.text
    _, row = run(f'--arms={idea}', '--seeds=2', '--lrs=1,', '--allow_leak=True')
    assert 'NOT CAUSAL' in row['verdict'] and '(LEAKS)' in run.text


def test_scale(run):
    """The gap to the first arm at each width, and its change for ten times the FLOPs."""
    run.loss = lambda key, factor, seed, steps=0: (
        1.5 + 0.001 * math.sin(3 * seed + len(key)) - (0.1 if 'qk_norm' in key and 'n_embd=16' in key else 0))
    rows = run('--arms=qk_norm=True', '--seeds=3', '--lrs=2,', '--scale=16,32,64')
    assert rows[1]['difference'] == pytest.approx(-0.1, abs=0.01)
    line = run.text.strip().splitlines()[-2]
    assert 'qk_norm=True by n_embd: -0.' in line and 'for ten times the FLOPs' in line


def test_a_module_that_two_arms_import_is_part_of_both(run, tmp_path):
    (tmp_path / 'width_of_mlp.py').write_text('WIDTH = 2.0')
    for i in (1, 2):
        (tmp_path / f'arm{i}.py').write_text(f'import sys\nsys.path.insert(0, {str(tmp_path)!r})\n'
                                             f'import width_of_mlp as _module\nmlp_ratio = _module.WIDTH + {i}\n')
    arms = f'--arms={tmp_path}/arm1.py,{tmp_path}/arm2.py'
    run(arms, '--seeds=1', '--lrs=1,')
    assert len(run.asked) == 3
    with open(tmp_path / 'width_of_mlp.py', 'a') as f:
        f.write(' # a change')
    run(arms, '--seeds=1', '--lrs=1,')
    assert len(run.asked) == 2
    assert '4 ideas were compared' in run.text # the change made two more


def test_runs_begin_with_the_given_weights(run, words, tmp_path, monkeypatch):
    torch.manual_seed(0)
    write_checkpoint(tmp_path / 'w/ckpt.pt', random_model(24, n_embd=16, n_head=2, n_layer=1, block_size=16))
    monkeypatch.chdir(tmp_path)
    cell = compare.Cell(compare.make_arm('', [str(words), '--init_from=w/ckpt.pt']), 1.0, 1, 8)
    command = cell.command(cell.folder)
    assert f"--init_from={tmp_path / 'w/ckpt.pt'}" in command and '--init_from=auto' not in command
    assert 'init_from' in run('--init_from=w/ckpt.pt', '--aa', refused=True)
    monkeypatch.setattr(Run, 'has_checkpoint', lambda self: True) # it was interrupted
    assert cell.command(cell.folder)[-1] == '--init_from=auto'


@pytest.mark.parametrize('arguments, expected', [
    (['--arms=qk_nrom=True'], 'qk_nrom'), (['--arms=rope'], "'rope'"), (['--arms=nowhere.py'], 'nowhere.py'),
    (['--arms=qk_norm=True,qk_norm=True'], 'the same'), (['--arms=qk_norm=False'], 'the same'),
    (['--lrs=0,1'], 'lie in (0, inf)'), (['--lrs=1,1'], 'different'), (['--seeds=0'], 'seeds=0'),
    (['--arms=mlp=none', '--equal=params'], '--equal=flops'), (['--dataset=shakespeare'], 'prepare.py'),
    (['--until=decided'], 'needs a limit'), (['--until=decided', '--max_seeds=3'], 'max_seeds=3 is below seeds=5'),
    (['--max_seeds=9'], 'limits of --until=decided'), (['--ledger=/nowhere/x'], '/nowhere/x'),
    (['--seeds=51'], 'seeds=51'), (['--margin=0'], 'margin=0'), (['--lrs=1,auto'], 'lrs'),
    (['--horizons=4,16'], 'must end with max_iters=8'), (['--horizons=8,4'], 'growing'),
    (['--horizons=1,8', '--warmup_iters=2'], 'leave out 1'),
    (['--equal=watts'], 'watts'), (['--arms=seed=5'], 'the same'), (['--arms=log_interval=3'], 'the same'),
    (['--arms=max_iters=20'], 'max_iters=20 and the first one 8'), (['--out='], "out='' is no folder"),
    (['--lrs=1,1.1'], 'must be clearly different factors'),
    (['--arms=mixer=mlp_mixer+pos_emb=none+block_size=256', '--equal=params'], 'cannot have')])
def test_mistakes(run, tmp_path, arguments, expected):
    assert expected in run(*arguments, refused=True)
    assert not (tmp_path / 'out').exists()


def test_without_scipy(words):
    done = helpers.run('tests/compare.py', [words], first="import sys; sys.modules['scipy'] = None")
    said = done.stderr.decode()
    assert done.returncode == 2 and 'pip install -r tests/requirements.txt' in said and said.count('\n') == 1


def test_a_folder_of_another_comparison(run):
    run('--seeds=2', '--lrs=2,')
    assert 'holds the comparison of' in run('--seeds=2', '--lrs=2,', '--n_embd=32', refused=True)


# ---------------------------------------------------------------------------------------------------------------------
# Real runs

def start(words, out, *more):
    return subprocess.Popen([sys.executable, PROJECT / 'tests/compare.py', words, f'--out={out}', '--arms=qk_norm=True',
                             '--seeds=2', '--lrs=1,', '--eval_tokens=64', '--device=cpu', '--dtype=float32',
                             '--peak_flops=1e12',
                             *more],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS='1'))


def run_directly(words, tmp_path, seed, *more):
    """train.py with the settings that compare.py gives the second arm."""
    return well(helpers.run('train.py', [
        words, '--qk_norm=True', *more, f'--seed={seed}', '--eval_tokens=64', '--device=cpu', '--dtype=float32',
        '--peak_flops=1e12', '--eval_interval=2', f'--out_dir={tmp_path}/direct'], first=NO_PICTURES))


@pytest.mark.parametrize('more, same', [
    ([], {8: []}),
    (['--max_iters=16', '--horizons=8,16'], { # each as if its trunk had no other branch
        n: ['--schedule=wsd', f'--max_iters={n}', f'--lr_decay_iters={n}', f'--wsd_decay_iters={decay}']
        for n, decay in ((8, 2), (16, 3))})])
def test_each_run_is_what_train_py_makes_of_the_same_settings(words, tmp_path, monkeypatch, more, same):
    monkeypatch.setattr(compare, 'subprocess', ForkingSubprocess)
    monkeypatch.setattr(compare, 'STOPPING', compare.threading.Event())
    for name in compare.OWN:
        monkeypatch.setattr(compare, name, getattr(compare, name)) # and back at the end
    with pytest.raises(SystemExit): # one pair tells nothing
        compare.main([str(words), f'--out={tmp_path}/out', '--arms=qk_norm=True', '--seeds=1', '--eval_tokens=64',
                      '--lrs=1,', '--jobs=2', '--device=cpu', '--dtype=float32', '--peak_flops=1e12', *more])
    rows = json.loads((tmp_path / 'out/compare.json').read_text())['tables'][0]['rows']
    assert all(1 < row['loss'] < 3.2 for row in rows) and not list(tmp_path.glob('out/runs/*/*.pt'))
    for n, settings in same.items():
        text = run_directly(words, tmp_path / str(n), 1, *settings)
        loss = rows[1]['at'][str(n)]['losses'][0] if more else rows[1]['losses'][0]
        assert f'step {n}: train loss' in text and f"val loss {loss:.4f}" in text


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
    assert process.returncode in (0, 1), err
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
    assert process.returncode == 1 and 'is an anecdote' in out, out + err
