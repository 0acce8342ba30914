"""tests/studies.py runs: each study, tiny, on the CPU, with a dataset of few characters. No timing is checked."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import bench
from data.checkpoints import save_checkpoint
from data.tokenizers import CharTokenizer
from data.writer import Writer
from helpers import ForkingSubprocess, PROJECT, mistake
from model import GPT, GPTConfig

TINY = ['--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=16', '--iterations=4']
LINES = [(1.0, 'number of parameters: 0.8M'), (1.5, 'step 0: train loss 4.1, val loss 4.2'), (2.5, 'iter 1: loss 4.1'),
         (4.5, 'iter 4: loss 4.0'), (5.0, 'step 4: train loss 3.9, val loss 3.8'), (6.0, '')]


@pytest.fixture
def studies(tmp_path):
    """studies(arguments) runs the script in this process, but train.py in its own -> its tables."""
    spec = importlib.util.spec_from_file_location('studies_under_test', PROJECT / 'tests' / 'studies.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        script.main([arguments[0], *TINY, *arguments[1:], f'--out={tmp_path / "result.json"}'])
        result = json.loads((tmp_path / 'result.json').read_text(encoding='utf-8'))
        assert result['errors'] == {}
        return list(result['tables'].values())
    run.script = script
    return run


@pytest.fixture
def words(tmp_path):
    tokenizer = CharTokenizer.from_text(['abcd '])
    with Writer(tmp_path / 'words', tokenizer) as out:
        for split in ('train', 'val'):
            out.write(split, tokenizer.encode('abc dcba ' * 500))
    return f"--dataset={tmp_path / 'words'}"


@pytest.fixture
def told(studies, monkeypatch):
    """train.py is replaced by one that prints LINES; the list of what it was asked for."""
    asked = []
    def run_train(folder, *files, **flags):
        asked.append((folder, files, flags))
        return LINES
    monkeypatch.setattr(studies.script, 'run_train', run_train)
    return asked


def test_a_run_is_timed_without_its_evaluations(studies, told):
    result = studies.script.train(PROJECT, ['config/x.py'], dict(seed=3))
    assert result['seconds'] == 4.5 - 0.5 and result['val_loss'] == 3.8
    assert told[0][1] == ('config/x.py',) and told[0][2]['seed'] == 3


def test_recipe(studies, told, words, tmp_path):
    (ours, theirs, ratio), = studies('recipe', words, '--seeds=1,2', f'--peer={tmp_path}')
    assert len(ours['raw']) == len(theirs['raw']) == 2 and ratio['seconds'] == [1.0, 1.0, 1.0]
    assert ours['val loss'] == '3.8000 (3.8000-3.8000)'
    assert [(files[0], flags.get('seed'), flags['n_embd']) for _, files, flags in told] == [
        ('config/speedrun_shakespeare_cpu.py', 1, 16), ('config/train_shakespeare_char.py', None, 16),
        ('config/speedrun_shakespeare_cpu.py', 2, 16), ('config/train_shakespeare_char.py', None, 16)]
    assert told[1][0] == str(tmp_path) and told[1][2]['dropout'] == 0.0


def test_arithmetic(studies, monkeypatch):
    for module in studies.script, bench: # bench.py's run_train
        monkeypatch.setattr(module, 'subprocess', ForkingSubprocess)
    few = {'few examples': (dict(examples=2000, scratch=False), {})}
    monkeypatch.setattr(studies.script, 'ARITHMETIC', few)
    (row,), = studies('arithmetic', '--seeds=1,', '--block_size=64', '--problems=40')
    assert row['what'] == 'few examples' and set(row['raw'][0]) == {*'+-*/', 'all'}
    assert all(0 <= share <= 100 for share in row['raw'][0].values())


def test_loops(studies):
    loops = studies.script.loops
    assert loops([5, 1, 2, 1, 2, 1, 2]) and loops([7, 7, 7]) and loops(list(range(40)) * 3)
    assert not loops([1, 2, 1, 2]) and not loops([1, 2, 3, 1, 2, 3, 1, 2]) and not loops([])


def test_repetition(studies, words, tmp_path):
    torch.manual_seed(0)
    config = dict(n_layer=1, n_head=1, n_embd=8, block_size=40, vocab_size=5)
    checkpoint = dict(model=GPT(GPTConfig(**config)).state_dict(), model_args=config,
                      config=dict(dataset=words.partition('=')[2]))
    save_checkpoint(tmp_path / 'ckpt.pt', checkpoint)
    rows, = studies('repetition', f'--run={tmp_path}', '--prompts=2', '--length=60')
    assert rows[0]['way'] == 'greedy'
    assert rows[0]['end in a loop'] == 1.0 # a network without training says one token for ever
    assert all(0 < row['distinct 8-grams'] <= 1 and row['nats a token'] > 0 for row in rows)


def test_verdict(studies):
    errors, published = studies('verdict', '--repeats=10', '--variants=curvature 0.2,')
    assert len(errors) == 3 and all(row['raw']['of'] == 10 for row in errors)
    assert all(0 <= row['5 to 20'] <= row['5 to 50'] <= 100 for row in errors)
    told = {row['test']: row['told'] for row in published}
    assert told['paired t'] <= told['Welch'] <= told["this model's variances, one look"] and told['any look'] > 5


def test_planted(studies, words, monkeypatch):
    """Each comparison has seeds of its own; an arm's truth is its mean difference."""
    compare, seeds = studies.script.compare, []
    for name in 'FIRST_SEED', 'SEARCH_SEED', 'subprocess':
        monkeypatch.setattr(compare, name, getattr(compare, name)) # and back at the end

    def main(argv):
        seeds.append((compare.FIRST_SEED, compare.SEARCH_SEED))
        out = Path(next(arg for arg in argv if arg.startswith('--out=')).removeprefix('--out='))
        out.mkdir()
        rows = [dict(arm=arm, difference=0.1 + 0.01 * len(seeds), word='worse' if arm != 'A/A' else 'cannot tell')
                for arm in ('as it is', 'pos_emb=rope', 'mlp_ratio=2.667', 'warmup_iters=0', 'A/A')]
        (out / 'compare.json').write_text(json.dumps(dict(tables=[dict(rows=rows)])))
        sys.exit(1)
    monkeypatch.setattr(compare, 'main', main)
    rows, = studies('planted', words, '--comparisons=2')
    assert seeds == [(1, 10_000), (101, 10_100)]
    assert [row['arm'] for row in rows] == ['pos_emb=rope', 'mlp_ratio=2.667', 'warmup_iters=0', 'A/A']
    assert rows[0]['worse'] == 2 and rows[3]['cannot tell'] == 2 and rows[0]['truth'].startswith('+0.1150 ± 0.06')


@pytest.mark.parametrize('arguments, words', [
    (['train'], 'must be a command'), (['arithmetic', '--variants=SM4'], 'not one of'),
    (['recipe', '--recipe_of=shakespear'], 'shakespeare_cpu'), (['repetition', '--run=/nowhere'], '/nowhere')])
def test_mistakes(studies, capsys, arguments, words):
    assert words in mistake(capsys, studies.script.main, arguments)
