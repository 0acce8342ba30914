"""tests/bench.py runs: each command, tiny, on the CPU, with this project in the peer's role. No timing is checked."""
import importlib.util
import json
import shutil
from functools import partial

import pytest

from helpers import ForkingSubprocess, PROJECT, mistake

TINY = ['--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=32', '--vocab_size=11',
        '--batch_size=2', '--repeats=1', '--steps=1', '--iterations=4', '--new_tokens=3', '--contexts=1,8',
        '--batches=1,2', '--variants=gmlp,unet', '--lengths=16,32']


def measure(work, job):
    rows = work(job)
    assert next(rows) == {}
    return json.loads(json.dumps(next(rows)))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(arguments) runs the script and its workers, but not train.py, in this process -> its tables by title."""
    spec = importlib.util.spec_from_file_location('bench_under_test', PROJECT / 'tests' / 'bench.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.WIDTHS, script.DEPTHS, script.READ = (16,), (1, 2), 2 ** 20
    script.UNET = dict(unet_layers=(1, 1), n_layer=2)
    monkeypatch.setattr('data.machine.find_peak_flops', lambda *setting: (1e12, 'a test'))
    script.Process = script.Worker
    script.Worker = lambda job: partial(measure, script.work, json.loads(json.dumps(job))) # no new torch

    def run(*arguments):
        script.main([arguments[0], *TINY, *arguments[1:], f'--out={tmp_path / "result.json"}'])
        result = json.loads((tmp_path / 'result.json').read_text(encoding='utf-8'))
        assert result['errors'] == {}
        assert result['about']['torch'] and result['about']['python'] and result['about']['cores'] > 0
        return result['tables']
    run.script = script
    return run


@pytest.fixture
def peer(tmp_path):
    """A checkout with nanoGPT's interface, which draws other weights than this project from the same seed."""
    ignored = shutil.ignore_patterns('.*', '__pycache__', 'tests', '*.bin', 'out*')
    shutil.copytree(PROJECT, tmp_path / 'peer', ignore=ignored)
    with open(tmp_path / 'peer' / 'model.py', 'a', encoding='utf-8') as f:
        f.write('\nold_init = GPT.__init__\nGPT.__init__ = lambda *args: (torch.rand(1), old_init(*args))[1]\n')
    return f"--peer={tmp_path / 'peer'}"


def positive(row, *columns):
    return all(row[column] > 0 for column in columns)


def test_train(bench, peer):
    (ours, theirs), = bench('train', peer, '--peer_compile=False', '--dropout=0.1').values()
    for row in ours, theirs:
        assert positive(row, 'tokens/s', 'MFU', 'GB', 'ms/step', 'loss', 'M parameters')
    assert (theirs[''], theirs['how']) == ('peer', 'float32')
    assert len(ours['tokens/s to peer']) == len(ours['GB to peer']) == 3


@pytest.mark.long('workers of their own')
@pytest.mark.parametrize('stays', [False, True])
def test_workers(bench, stays):
    """As on a CPU, a fresh process for each round, which ends; and as on a GPU, one that goes on where it was."""
    started = []

    class Process(bench.script.Process):
        def __init__(self, job):
            super().__init__(job)
            self.stays = stays

        def start(self):
            super().start()
            started.append(self.process)
    bench.script.Worker = Process
    rows, = bench('train', '--repeats=2', '--dtype=float32').values()
    first, second = rows[0]['raw']
    assert len(started) == 2 - stays and all(process.returncode == 0 for process in started)
    assert positive(rows[0], 'tokens/s', 'GB') and len(first['times']) == 1
    assert (first['losses'] == second['losses']) != stays and len(first['losses']) == len(second['losses'])


@pytest.mark.long('workers of their own')
def test_a_worker_that_is_killed_ends_alone(bench, tmp_path):
    jobs = bench.script.both
    bench.script.Worker, bench.script.device = bench.script.Process, 'cpu'
    bench.script.begin('train', 'cpu', str(tmp_path / 'result.json'))
    config, batch = bench.script.model_of('readme', n_layer=1, n_embd=16, n_head=2)
    worker, = jobs('train', config, batch, stays=True, steps=1).values()

    def kill():
        if worker.process:
            worker.process.kill()
            worker.process.wait()
        return dict(x=1.0)
    results = bench.script.in_turn('title', dict(ours=worker, other=kill), 2)
    assert results == dict(ours=[], other=[dict(x=1.0)] * 2) and worker.process is None
    assert bench.script.report['errors']['title: ours'] == 'ended with status -9, without a word'


def test_each_round_of_the_loss_begins_anew(bench, monkeypatch):
    """On a GPU, where the programs of other commands stay."""
    jobs = []
    monkeypatch.setattr(bench.script, 'Worker', lambda job: jobs.append(job) or (lambda: dict(loss=1.0)))
    monkeypatch.setattr(bench.script, 'compare', lambda *table, **ratios: None)
    monkeypatch.setattr(bench.script, 'device', 'cuda')
    monkeypatch.setattr(bench.script, 'write_data', lambda *setting: '')
    bench.script.loss()
    bench.script.head()
    assert [job['stays'] for job in jobs] == [False] + [True] * (len(jobs) - 1)


@pytest.mark.long('a worker of its own')
@pytest.mark.parametrize('stays', [False, True])
def test_a_worker_that_fails_has_no_more_rounds(bench, stays):
    worker = bench.script.Process(dict(kind='nonsense', device='cpu', dtype='float32', peer=None, stays=stays))
    bench.script.report['errors'] = {}
    results = bench.script.in_turn('title', dict(good=lambda: dict(x=1.0), bad=worker), 2)
    assert results == dict(good=[dict(x=1.0)] * 2, bad=[]) and worker.process is None
    assert bench.script.report['errors'] == {'title: bad': "KeyError: 'nonsense'"}


def test_a_step_takes_micro_batches(bench):
    """Two of two sequences teach what one of four does."""
    flags = '--dtype=float32', '--steps=3'
    (one,), = bench('train', *flags, '--batch_size=4').values()
    (two,), = bench('train', *flags, '--batch_size=2', '--gradient_accumulation_steps=2').values()
    assert one['raw'][0]['losses'] == pytest.approx(two['raw'][0]['losses'], rel=1e-5)


def test_sample(bench, peer):
    tables = bench('sample', peer)
    assert list(tables) == [f'sample, batch {batch}, context {context}' for batch in (1, 2) for context in (1, 8)]
    for ours, theirs in tables.values():
        for row in ours, theirs:
            assert positive(row, 'decode tokens/s', 'prompt tokens/s', 'of bandwidth', 'of matmul peak')


def test_sample_in_several_dtypes(bench):
    for rows in bench('sample', '--dtypes=float32,int8').values():
        assert [row[''] for row in rows] == ['float32', 'int8']
        assert all(positive(row, 'decode tokens/s', 'prompt tokens/s', 'of bandwidth') for row in rows)
        assert len(rows[1]['decode tokens/s to float32']) == 3


def test_mixers(bench, tmp_path):
    tables = bench('mixers', '--equal_params')
    assert list(tables) == ['mixers, T=16', 'mixers, T=32']
    for rows in tables.values():
        assert [row[''] for row in rows] == ['attention', 'gmlp', 'unet']
        assert all(positive(row, 'tokens/s') for row in rows)
        assert len(rows[1]['tokens/s to attention']) == 3
    assert (tmp_path / 'result.png').stat().st_size > 1000


def test_equal_parameters(bench):
    from model import GPT, GPTConfig
    config = GPTConfig(n_layer=4, n_head=2, n_embd=16, block_size=32, vocab_size=11)
    for n_layer in 2, 7:
        target = GPT(GPTConfig(**vars(config) | dict(n_layer=n_layer))).get_num_params(False)
        assert bench.script.equalized(config, target).n_layer == n_layer


def test_unet(bench):
    (flat, unet), = bench('unet').values()
    assert unet['M parameters'] > flat['M parameters'] and len(unet['tokens/s to flat']) == 3


def test_scale(bench, tmp_path):
    tables = bench('scale')
    assert [[row[''] for row in rows] for rows in tables.values()] == [[16, 32], [16], [1, 2]]
    assert (tmp_path / 'result.png').stat().st_size > 1000


def test_startup(bench, monkeypatch):
    monkeypatch.setattr(bench.script, 'subprocess', ForkingSubprocess)
    (ours,), = bench('startup').values()
    assert 0 < ours['s to the first step'] < ours['s to the end'] and 1 < ours['val loss'] < 4


def test_process(bench, peer, monkeypatch):
    lines = [(1.0, 'step 0: train loss 4.1, val loss 4.2'), (2.5, 'iter 1: loss 4.1'), (3.0, 'iter 2: loss 4.0'),
             (4.0, 'step 4: train loss 3.9, val loss 3.8'), (4.5, '')]
    taken = []
    def run_train(folder, file, **flags):
        taken.append((str(folder), flags))
        return lines
    monkeypatch.setattr(bench.script, 'run_train', run_train)
    (ours, theirs), = bench('process', peer).values()
    assert (ours['s to the first step'], ours['s to the end'], ours['val loss']) == (2.5, 4.5, 3.8)
    assert ours['s to the end to peer'] == [1.0, 1.0, 1.0]
    assert [folder for folder, _ in taken] == [str(PROJECT), peer.partition('=')[2]]
    assert all(flags['max_iters'] == 4 and flags['n_embd'] == 16 for _, flags in taken)
    bench.script.device = 'cuda:1' # asked for, and it is there
    bench.script.small_run()
    assert taken[-1][1]['device'] == 'cuda:1'


def test_state(bench):
    """What two layers keep: keys and values of every token, of a window at most, or one state (D, D) in each head."""
    first, later = bench('state', '--contexts=5,300', '--new_tokens=3', '--dtype=float32').values()
    kept = [{row['']: row['bytes of state'] for row in rows} for rows in (first, later)]
    assert kept[0] == dict(attention=5 * 256, window=5 * 256, gmlp=kept[0]['gmlp'], linear_attention=1024,
                           gated_delta=1024)
    assert kept[1]['attention'] == 300 * 256 and kept[1]['gated_delta'] == kept[1]['linear_attention'] == 1024
    assert all(positive(row, 'decode tokens/s') for rows in (first, later) for row in rows)


def test_head(bench):
    rows, = bench('head').values()
    assert {row[''] for row in rows} >= {'chunks', 'logits'}
    assert all(positive(row, 'ms') for row in rows)
    assert len({round(row['loss'], 1) for row in rows}) == 1


def test_loss(bench, peer):
    (ours, theirs), = bench('loss', peer, '--peer_compile=False', '--dtype=float32').values()
    assert ours['raw'][0]['losses'] == theirs['raw'][0]['losses'] # the same model, weights and batches
    (ours, theirs), = bench('loss', peer, '--peer_compile=False', '--dtype=bfloat16').values()
    assert 0 < abs(ours['loss'] - theirs['loss']) < 0.01


def test_a_failure_is_told_and_not_tried_again(bench, capsys):
    calls = []
    def fail():
        calls.append(1)
        raise RuntimeError('no such luck')
    bench.script.show = lambda title, rows: None
    rows = bench.script.compare('title', dict(good=lambda: dict(x=2.0), bad=fail), base='good', ratios=['x'])
    assert rows['good']['x'] == 2.0 and 'x' not in rows['bad'] and len(calls) == 1
    assert bench.script.report['errors'] == {'title: bad': 'no such luck'}
    assert 'failed: no such luck' in capsys.readouterr().out


def test_ratios_are_of_a_round(bench):
    bench.script.show = lambda title, rows: None
    mine, others = iter([2.0, 9.0, 4.0]), iter([1.0, 3.0, 1.0])
    bench.script.repeats = 3
    jobs = dict(ours=lambda: dict(x=next(mine)), peer=lambda: dict(x=next(others)))
    rows = bench.script.compare('title', jobs, ratios=['x'])
    assert rows['ours']['x'] == 4.0 and rows['ours']['x to peer'] == (3.0, 2.0, 4.0)


@pytest.mark.parametrize('arguments, words', [
    ([], 'must be a command'), (['trian'], 'must be a command'), (['train', '--peer=/nowhere'], 'no model.py'),
    (['train', '--repeat=3'], 'did you mean --repeats'), (['train', '--preset=gpt3'], 'gpt2-medium'),
    (['mixers', '--device=cpu', '--variants=gpml'], 'not one of')])
def test_mistakes(bench, capsys, arguments, words):
    assert words in mistake(capsys, bench.script.main, arguments)
