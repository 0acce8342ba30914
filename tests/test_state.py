"""Where a run is, its folder, and its machine: the objects that train.py is made of, each alone."""
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.checkpoints import State, build_model, load_optimizer
from data.machine import Machine
from data.run import Run, replace_file
from helpers import (PROJECT, T, TINY, V, assert_same, flags, metrics, random_model, run, run_together, well,
                     write_checkpoint, write_data)

SETTINGS = dict(block_size=T, batch_size=4, gradient_accumulation_steps=1, sampling='random', decay_lr=True,
                lr_decay_iters=10, max_iters=10)


def begun(optimizer='adamw', **settings):
    """A State after two steps on random tokens."""
    torch.manual_seed(1)
    model = random_model(V, **settings)
    state = State(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', optimizer), Machine('cpu').scaler)
    for _ in range(2):
        one_step(state)
    return state


def one_step(state):
    idx = torch.randint(V, (2, state.model.config.block_size))
    state.model(idx, idx)[1].backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.count(2, idx.size(1))


def moments(state):
    """{parameter's name: its state in the optimizer}"""
    name_of = {p: name for name, p in state.model.named_parameters()}
    return {name_of[p]: values for p, values in state.optimizer.state.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Moments of another shape

CHANGES = {
    'shorter': (dict(pos_emb='learned+relative', time_weighting='full'), dict(block_size=T // 2)),
    'relative positions': ({}, dict(pos_emb='learned+relative')),
    'biases': ({}, dict(bias=True)),
    'time-weighting, shorter': ({}, dict(time_weighting='circulant', block_size=T - 3)),
    'a head of its own': ({}, dict(tie_weights=False)),
}


@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'sm3'])
@pytest.mark.parametrize('change', CHANGES)
def test_moments_follow_their_parameters(change, optimizer):
    before, changes = CHANGES[change]
    old = begun(optimizer, **before)
    stored = old.to_checkpoint(SETTINGS, {})
    model, _ = build_model(vars(old.model.config), stored['model'], **changes)
    new = State(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', optimizer), old.scaler)
    new.restore(stored, SETTINGS)
    kept = moments(old)
    assert moments(new).keys() == kept.keys() # and none for what was added
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name, values in moments(new).items():
        for key, value in values.items():
            right = kept[name][key]
            if right.dim(): # a table along time is cut as its parameter is; SM3's sums are along one dimension
                right = right[tuple(slice(n) for n in shapes[name])]
            assert torch.equal(value, right) and value.is_contiguous(), (name, key)
    one_step(new) # AdamW's fused kernel, too
    assert all(p.isfinite().all() for p in model.parameters()) and moments(new).keys() == shapes.keys()


def test_the_step_after_a_cut_is_the_one_of_moments_by_hand():
    """AdamW's kernel reads moments as they lie in memory: a cut table that lies wrongly gives other weights."""
    old = begun(time_weighting='full', pos_emb='none')
    stored = old.to_checkpoint(SETTINGS, {})
    model, _ = build_model(vars(old.model.config), stored['model'], block_size=T // 2)
    new = State(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu'), old.scaler)
    new.restore(stored, SETTINGS)
    name = next(name for name, _ in model.named_parameters() if name.endswith('attn.weight'))
    w, values = dict(model.named_parameters())[name], moments(new)[name]
    m, v, before = (t.double().clone() for t in (values['exp_avg'], values['exp_avg_sq'], w.detach()))
    idx = torch.randint(V, (2, T // 2))
    model(idx, idx)[1].backward()
    g = w.grad.double().clone()
    new.optimizer.step()
    m, v = m.lerp(g, 0.1), v.lerp(g * g, 0.05)
    right = before - 1e-3 * (m / (1 - 0.9 ** 3)) / ((v / (1 - 0.95 ** 3)).sqrt() + 1e-8) # no decay
    assert torch.allclose(w.double(), right, atol=1e-7)


def test_settings_of_groups_are_those_of_now():
    old = begun()
    stored = old.to_checkpoint(SETTINGS, {})
    for group in stored['optimizer']['param_groups']:
        group |= dict(lr=9.0, betas=(0.1, 0.2), weight_decay=7.0, fused=False, foreach=True)
    new = State(old.model, old.model.configure_optimizers(0.3, 2e-3, (0.8, 0.9), 'cpu'), old.scaler)
    load_optimizer(new.model, new.optimizer, stored['optimizer'], vars(old.model.config))
    for group in new.optimizer.param_groups:
        assert group['lr'] == 2e-3 and group['betas'] == (0.8, 0.9) and group['fused'] and not group['foreach']


# ---------------------------------------------------------------------------------------------------------------------
# The lowest loss

def test_score():
    state = begun()
    assert state.keep_score(3.0) and (state.best_val_loss, state.best_step) == (3.0, 2)
    state.step = 5
    assert not state.keep_score(3.5) and not state.keep_score(math.nan) and state.evals_since_best == 2
    assert not state.keep_score(3.0) # as good is no better
    state.step = 2
    assert state.keep_score(3.0) # but a resumed run repeats the best one
    assert state.evals_since_best == 0 and state.evaluated == 2


def test_losses_of_other_windows_are_no_mark():
    state = begun()
    assert state.judge_by('a') == []
    state.keep_score(1.0)
    assert state.judge_by('a') == [] and state.best_val_loss == 1.0
    assert len(state.judge_by('b')) == 1
    assert state.best_val_loss == math.inf and state.evaluated == -1
    assert state.keep_score(2.0)


@pytest.mark.parametrize('changed, words', [
    (dict(), []), (dict(sampling='epoch'), []), (dict(block_size=T // 2), []),
    (dict(sampling='epoch', block_size=T // 2), ['block_size has changed within an epoch']),
    (dict(max_iters=20), ['--lr_decay_iters=20']), (dict(max_iters=20, decay_lr=False), []),
])
def test_what_a_resumed_run_must_know(changed, words):
    state = begun()
    stored = state.to_checkpoint(SETTINGS, {})
    lines = state.restore(stored, SETTINGS | changed)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines))
    epochs = changed.get('sampling') == 'epoch' and 'block_size' in changed
    assert state.first_samples == (8 if epochs else 4) # an epoch has twice as many windows of half the length


# ---------------------------------------------------------------------------------------------------------------------
# The mean over the targets of a step

def masked(folder):
    """Data in which questions are long and answers, all that is learned, of very different lengths."""
    write_data(folder / 'data')
    rng = np.random.default_rng(1)
    for split in 'train', 'val':
        mask, i = np.zeros(len(np.fromfile(folder / f'data/{split}.bin', '<u2')), np.uint8), 0
        while i < len(mask):
            question, answer = int(rng.integers(10, 40)), int(rng.choice([1, 2, 25]))
            mask[i + question:i + question + answer] = 1
            i += question + answer
        mask.tofile(folder / f'data/{split}.mask')
    write_checkpoint(folder / 'weights/ckpt.pt', random_model(V))


@pytest.mark.parametrize('batch, accumulation, processes', [(6, 1, 1), (1, 6, 1), (2, 3, 3), (1, 6, 3)])
def test_the_loss_of_a_step_is_the_mean_over_its_targets(tmp_path, batch, accumulation, processes):
    """However the same windows are divided into micro-batches and processes: in float64 by hand."""
    masked(tmp_path)
    args = flags(**TINY | dict(dataset=tmp_path / 'data', out_dir=tmp_path / 'out', init_from=tmp_path / 'weights',
                               batch_size=batch, gradient_accumulation_steps=accumulation, max_iters=1,
                               eval_interval=100, grad_clip=0.0))
    done = run_together('train.py', args, processes) if processes > 1 else [run('train.py', args)]
    for process in done:
        well(process)
    from data.tokens import Split
    x, y = map(torch.from_numpy, Split(tmp_path / 'data', 'train').batch(0, 6, T, seed=1337))
    assert len(set((y >= 0).sum(1).tolist())) > 2 # not vacuously
    model = random_model(V).double()
    loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), ignore_index=-1)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    line = next(line for line in metrics(tmp_path / 'out') if 'loss' in line)
    assert line['loss'] == pytest.approx(loss.item(), rel=1e-6)
    assert line['grad_norm'] == pytest.approx(norm.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder and words

def test_a_file_is_replaced_or_stays(tmp_path, monkeypatch):
    path = tmp_path / 'config.json'
    path.write_text('old')

    def full(self, text, **options):
        open(self, 'w').write(text[:2])
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('pathlib.Path.write_text', full)
    with pytest.raises(OSError, match='config.json could not be written: No space left on device; the old one is kept'):
        replace_file(path, 'new')
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['config.json']


def test_damaged_metrics_are_left_out(tmp_path):
    lines = [b'{"step": 1, "tokens": 2, "loss": 3.0}', b'{"step": 2, "tok', b'\xff\xfe\x00', b'[1, 2]', b'null', b'7',
             b'{"loss": 1.0}', b'', b'{"step": "3", "tokens": 3}', b'{"step": null, "tokens": 1}', b'[1]',
             b'[' * 100_000, b'{"step": 1}', b'{"step": 1e999, "tokens": 1}', b'"step tokens"', b'\0', b'{"step": 3, "tokens": 4}']
    (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join(lines))
    assert [line['step'] for line in Run(tmp_path).read_metrics()] == [1, 3]


def test_a_log_that_fails_is_warned_of_and_left_out(tmp_path, capsys):
    state, r = begun(), Run(tmp_path)
    def fails(values):
        raise RuntimeError('no connection')
    r.logs['wandb'] = fails
    r.log(state, loss=math.nan)
    r.log(state, loss=2.0)
    assert capsys.readouterr().out.count('warning: wandb could not be written, training goes on without it') == 1
    assert [json.loads(line)['loss'] for line in r.metrics.read_text().splitlines()] == [None, 2.0]


TALK = """
import sys
sys.path.insert(0, {project!r})
from data.run import Run
run = Run({out!r})
for i in range(1000):
    run.say('é' * 1000)
    run.tick(1)
print('went on', file=open({out!r}, 'w'))
"""


@pytest.mark.skipif(os.name != 'posix', reason="pipes and /dev/full")
@pytest.mark.parametrize('sink', ['closed', '/dev/full'])
def test_words_that_nobody_takes_end_nothing(tmp_path, sink):
    code = TALK.format(project=str(PROJECT), out=str(tmp_path / 'done'))
    if sink == 'closed':
        with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            err = process.stderr.read()
    else:
        with open(sink, 'w') as full:
            process = subprocess.run([sys.executable, '-c', code], stdout=full, stderr=subprocess.PIPE)
            err = process.stderr
    assert process.returncode == 0 and (tmp_path / 'done').exists()
    assert err.decode().splitlines() == ["warning: the output cannot be written, the run goes on"]


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason="Windows has no SIGHUP")
def test_signals_stop_a_run_unless_they_are_ignored(tmp_path):
    names = 'SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP'
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    try:
        for name in names:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN) # as nohup does with SIGHUP
        r = Run(tmp_path)
        r.catch_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert r.asked_to_stop == 0
        os.kill(os.getpid(), signal.SIGHUP)
        assert r.asked_to_stop == 128 + signal.SIGHUP and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL # the next one kills
        r.stop = r.asked_to_stop
        assert r.status(7) == 128 + signal.SIGHUP
    finally:
        for name in names:
            signal.signal(getattr(signal, name), before[name])


# ---------------------------------------------------------------------------------------------------------------------
# The machine

def test_a_step_that_is_not_finite_changes_nothing():
    for optimizer in 'adamw', 'muon', 'sm3':
        state, machine = begun(optimizer), Machine('cpu', 'float32')
        machine.wrap(state.model, compile=False)
        before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
        for n, bad in enumerate((math.nan, math.inf), 1):
            idx = torch.randint(V, (2, T))
            state.model(idx, idx)[1].backward()
            next(state.model.parameters()).grad[0, 0] = bad
            machine.step(state.optimizer, machine.clip_gradients(1.0))
            assert machine.bad_steps == n
            assert_same({name: p.detach() for name, p in state.model.named_parameters()}, before)
        idx = torch.randint(V, (2, T))
        state.model(idx, idx)[1].backward()
        machine.step(state.optimizer, machine.clip_gradients(1.0))
        assert machine.bad_steps == 0 and any(not torch.equal(p, before[name])
                                              for name, p in state.model.named_parameters())


def broken():
    raise AssertionError


@pytest.mark.parametrize('result, why', [(lambda: torch.tensor([2.0]), None), (lambda: torch.tensor([0.0]), '1 + 1'),
                                         (broken, 'AssertionError')])
def test_a_compiler_that_does_not_work_is_left_out_and_said(result, why, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda f: lambda x: result())
    notes = []
    assert Machine('cpu', 'float32').can_compile(notes) == (why is None)
    assert len(notes) == (why is not None) and (why is None or why in notes[0])


def test_processes_agree_once_a_second(monkeypatch):
    machine, now, asked = Machine('cpu', 'float32'), 0.0, []
    machine.world, machine.voted_at = 3, 0.0
    monkeypatch.setattr('time.perf_counter', lambda: now)
    monkeypatch.setattr(machine, 'reduce', lambda numbers, how: asked.append(now) or [143, numbers[1]])
    for _ in range(400):
        now += 0.01
        assert machine.agree(0) == (143 if asked[-1] == now else 0) # of whichever process it is
    assert all(b - a <= 1.02 for a, b in zip(asked, asked[1:])) and len(asked) <= 7
    while asked[-1] != now: # now steps take three seconds
        now += 3.0
        machine.agree(0)
    for _ in range(5): # each is asked after
        now += 3.0
        assert machine.agree(0) == 143


def test_items_are_dealt_equally_often(monkeypatch):
    hands = []
    for rank in range(3):
        machine = Machine('cpu', 'float32')
        machine.rank, machine.world = rank, 3
        hands.append(list(machine.deal(range(7))))
    assert len({len(hand) for hand in hands}) == 1 # as sharded weights need it
    assert sorted(item for hand in hands for item, counts in hand if counts) == list(range(7))


@pytest.mark.parametrize('change', [{}, dict(dataset='b'), dict(eval_iters=3), dict(eval_tokens=9)])
def test_the_best_loss_of_nanogpts_checkpoint_counts_for_its_own_windows_only(change):
    state, config = begun(), SETTINGS | dict(dataset='a', eval_iters=2, eval_tokens=0)
    old = state.to_checkpoint(config, {}) | dict(best_val_loss=1.0)
    del old['state']
    state.restore(old, config | change)
    assert len(state.judge_by('new')) == bool(change)
    assert state.best_val_loss == (math.inf if change else 1.0)


def test_code_that_made_no_step_is_replaced(tmp_path):
    """A run may be resumed at the step at which it began, or was resumed before."""
    this, file = Run(tmp_path), tmp_path / 'idea.py'
    for step, text, changed, folders in [(0, 'a', [], 1), (0, 'b', [], 1), (6, 'b', [], 1), (6, 'c', ['idea.py'], 2),
                                         (6, 'd', ['idea.py'], 2), (6, 'b', [], 2), (8, 'b', [], 2)]:
        file.write_text(text)
        assert this.keep_code([file], step) == changed and len(this.code()) == folders
        assert (this.code()[-1] / 'idea.py').read_text() == text
