"""tests/bench.py runs: each command, tiny, on the CPU, with this project in the peer's role. No timing is checked."""
import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from data.tokenizers import CharTokenizer
from data.writer import Writer
from model import GPT, GPTConfig, save_checkpoint

PROJECT = Path(__file__).resolve().parent.parent
TINY = ['--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=32', '--vocab_size=11',
        '--batch_size=2', '--repeats=1', '--steps=1', '--new_tokens=3', '--contexts=1,8', '--batches=1,2',
        '--variants=gmlp,unet',
        '--lengths=16,32', '--widths=16', '--depths=1', '--sizes=10000,1000000', '--ranks=2', '--iterations=4',
        '--loss_steps=3', '--seconds=0.2']


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(arguments) runs the script and its workers, but not train.py, in this process -> its tables."""
    spec = importlib.util.spec_from_file_location('bench', PROJECT / 'tests' / 'bench.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.run_worker_afresh = script.run_worker
    script.run_worker = lambda job: script.WORK[job['kind']](json.loads(json.dumps(job))) # no second import of torch

    def run(*arguments):
        script.main([arguments[0], *TINY, *arguments[1:], f'--out={tmp_path / "result.json"}'])
        result = json.loads((tmp_path / 'result.json').read_text(encoding='utf-8'))
        assert result['errors'] == {}
        assert result['about']['torch'] and result['about']['python'] and result['about']['cores'] > 0
        return list(result['tables'].values())
    run.script = script
    return run


@pytest.fixture
def peer(tmp_path):
    """A checkout with nanoGPT's interface, which draws other weights than this project from the same seed."""
    for path in ('model.py', 'train.py', 'configurator.py', 'data/tokens.py', 'config/train_shakespeare_char.py'):
        (tmp_path / 'peer' / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / path, tmp_path / 'peer' / path)
    with open(tmp_path / 'peer' / 'model.py', 'a', encoding='utf-8') as f:
        f.write('\nold_init = GPT.__init__\nGPT.__init__ = lambda *args: (torch.rand(1), old_init(*args))[1]\n')
    return f"--peer={tmp_path / 'peer'}"


def positive(x):
    return isinstance(x, float) and x > 0 and math.isfinite(x)


def test_train_with_a_real_worker(bench, peer):
    here, afresh = bench.script.run_worker, bench.script.run_worker_afresh
    bench.script.run_worker = lambda job: (afresh if job['kind'] == 'train' and not job['peer'] else here)(job)
    (ours, theirs, ratio), = bench('train', peer, '--peer_compile=False', '--dropout=0.1')
    for row in ours, theirs:
        parts = [row[f'{part} ms'] for part in ('data', 'forward', 'backward', 'optimizer')]
        assert all(map(positive, [row['tokens/s'], row['MFU'], row['GB'], row['ms/step'], *parts]))
    assert (theirs['who'], theirs['how']) == ('peer', 'float32, eager')
    assert len(ratio['tokens/s']) == 3


def test_sample(bench, peer):
    rows, = bench('sample', peer)
    assert [(row['batch'], row['context'], row['who']) for row in rows] == [
        (b, c, who) for b in (1, 2) for c in (1, 8) for who in ('ours, float32', 'peer')]
    assert all(positive(row['decode tokens/s']) and 0 < row['of bandwidth'] for row in rows)
    assert all(positive(row['prefill tokens/s']) for row in rows if row['context'] > 1)


def test_mixers(bench, tmp_path):
    compared, curve = bench('mixers', '--equal_params')
    assert [row['mixer'] for row in compared] == ['attention', 'gmlp', 'unet']
    assert all(positive(row['train tokens/s']) and positive(row['decode tokens/s']) for row in compared)
    assert [(row['what'], row['value']) for row in curve] == [
        (name, T) for name in ('attention', 'gmlp', 'unet') for T in (16, 32)]
    assert (tmp_path / 'result.png').stat().st_size > 1000


def test_too_large_is_skipped(bench, monkeypatch):
    monkeypatch.setattr(bench.script, 'too_large', lambda config, batch: 'skipped' if config.block_size > 16 else None)
    _, curve = bench('mixers', '--variants=attention')
    assert [(row['note'], row['tokens/s'] is None) for row in curve] == [('', False), ('skipped', True)]


def test_scale(bench, tmp_path):
    training, fetching, ranks = bench('scale')
    assert [(row['what'], row['value']) for row in training] == [('T', 16), ('T', 32), ('width', 16), ('depth', 1)]
    assert [row['tokens'] for row in fetching] == [10 ** 4, 10 ** 6]
    assert [row['ranks'] for row in ranks] == [2]
    assert all(row['tokens/s'] > 0 for row in training + ranks) and all(row['batch ms'] > 0 for row in fetching)
    assert (tmp_path / 'result.png').stat().st_size > 1000


def test_startup(bench, peer):
    (ours, theirs, ratio), = bench('startup', peer)
    assert positive(ours['seconds']) and positive(theirs['seconds']) and len(ratio['seconds']) == 3
    assert 0 < ours['val loss'] != theirs['val loss'] < 4


def test_process(bench):
    (ours,), = bench('process')
    assert ours['raw'][0]['first_step'] < ours['seconds'] == ours['raw'][0]['seconds']


@pytest.fixture
def words(tmp_path):
    """A dataset of few characters, for the commands that want a real one."""
    tokenizer = CharTokenizer.from_text(['abcd '])
    with Writer(tmp_path / 'words', tokenizer) as out:
        for split in ('train', 'val'):
            out.write(split, tokenizer.encode('abc dcba ' * 500))
    return f"--dataset={tmp_path / 'words'}"


def test_recipe(bench, peer, words):
    (ours, theirs, ratio), = bench('recipe', peer, words, '--seeds=1,2')
    assert len(ours['raw']) == len(theirs['raw']) == 2 and positive(ours['seconds']) and len(ratio['seconds']) == 3
    assert ours['raw'][0]['val_loss'] != ours['raw'][1]['val_loss']


def test_ablations(bench, words):
    rows, = bench('ablations', words, '--seeds=1,2', '--variants=as it is,SM3 at 0.1')
    assert [row['what'] for row in rows][0] == 'as it is'
    assert all(len(row['raw']) == 2 for row in rows)


def test_optimizers(bench, words, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.script, 'LEARNING_RATES', dict(adamw=(1e-3,), muon=(1e-2,), sm3=(0.1, 0.3)))
    rows, = bench('optimizers', words)
    memory = {row['optimizer']: row['state, bytes a parameter'] for row in rows}
    assert 8 <= memory['adamw'] < 8.1 and 4 < memory['sm3'] < 5 and all(row['val loss'] > 0 for row in rows)
    assert (tmp_path / 'result.png').stat().st_size > 1000


def test_profile(bench, peer):
    for rows in bench('profile', peer):
        assert rows[0]['ms/step'] >= rows[-1]['ms/step'] > 0 and 0.3 < sum(row['share'] for row in rows) <= 1


def test_head(bench):
    rows, = bench('head')
    assert {row['way'] for row in rows} >= {'chunks', 'logits'} and all(positive(row['ms']) for row in rows)
    assert len({round(row['raw'][0]['loss'], 1) for row in rows}) == 1


def test_arithmetic(bench):
    (row,), = bench('arithmetic', '--variants=no steps', '--seeds=1,', '--block_size=64', '--problems=40')
    assert row['what'] == 'no steps' and set(row['raw'][0]) == {*'+-*/', 'all'}
    assert all(0 <= share <= 1 for share in row['raw'][0].values())


def test_loops(bench):
    assert bench.script.loops([5, 1, 2, 1, 2, 1, 2]) and bench.script.loops([7, 7, 7]) and bench.script.loops(list(range(40)) * 3)
    assert not bench.script.loops([1, 2, 1, 2]) and not bench.script.loops([1, 2, 3, 1, 2, 3, 1, 2]) and not bench.script.loops([])


def test_repetition(bench, words, tmp_path):
    folder = words.partition('=')[2]
    torch.manual_seed(0)
    config = dict(n_layer=1, n_head=1, n_embd=8, block_size=40, vocab_size=5)
    model = GPT(GPTConfig(**config))
    save_checkpoint(tmp_path / 'ckpt.pt', dict(model=model.state_dict(), model_args=config, config=dict(dataset=folder)))
    rows, = bench('repetition', f'--run={tmp_path}', '--prompts=2', '--length=60')
    greedy = rows[0]
    assert greedy['way'] == 'greedy' and greedy['end in a loop'] == 1.0 # a network without training says one token for ever
    assert all(0 < row['distinct 8-grams'] <= 1 and row['nats a token'] > 0 for row in rows)


def test_loss(bench, peer):
    rows, = bench('loss', peer)
    assert [row['who'] for row in rows] == ['peer, float32', 'ours, float32', 'ours, bfloat16']
    assert rows[1]['val difference'] == rows[1]['train, largest'] == 0 # the same model, weights, batches
    assert 0 < abs(rows[2]['val difference']) < 0.01


@pytest.mark.parametrize('arguments, words', [
    ([], 'must be a command'), (['trian'], 'must be a command'), (['train', '--peer=/nowhere'], 'no model.py'),
    (['train', '--repeat=3'], 'did you mean --repeats'), (['mixers', '--device=cpu', '--variants=gpml'], 'not one of')])
def test_mistakes(bench, capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        bench.script.main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith('error: ')
