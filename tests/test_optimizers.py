"""Muon, SM3, adaptive clipping, rates of groups: each against the plain way to say it."""
import copy
import itertools
import math

import pytest
import torch

from data.checkpoints import load_checkpoint
from helpers import (NO_PICTURES, assert_same, flags, job, jobs, losses, metrics, network, run,  # noqa: F401
                     train, well, write_data)
from model import SM3, clip_adaptively, optimizer_groups

# matrices in one, two and three parts, a table, vectors
MIX = dict(mixer='gmlp', gmlp_attn=4, mlp='swiglu', pos_emb='learned')


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def walk(model, optimizer, steps=4, lr=0.02):
    for step in range(steps):
        gradients(model, step)
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_scale']
        optimizer.step()


def test_muon_is_torchs_on_every_matrix_alone():
    """torch.optim.Muon on each part as a parameter of its own; torch.optim.AdamW on all the others."""
    model = network(**MIX)
    twin = copy.deepcopy(model)
    optimizer = model.configure_optimizers(0.1, 0.02, (0.9, 0.95), 'cpu', 'muon', 0.9)
    walk(model, optimizer)
    groups = optimizer_groups(twin)
    parts = dict(c_attn=3, attn_qkv=3, c_fc=2)
    matrices = {name: [torch.nn.Parameter(w.detach()) for w in p.chunk(parts.get(name.split('.')[-2], 1))]
                for name, p in groups['hidden']}
    muon = torch.optim.Muon([w for ws in matrices.values() for w in ws], lr=0.02, weight_decay=0.1, momentum=0.9,
                            adjust_lr_fn='match_rms_adamw')
    decayed, rest = [p for name in ('embeddings', 'head') for _, p in groups[name]], [p for _, p in groups['rest']]
    adam = torch.optim.AdamW([dict(params=decayed, weight_decay=0.1), dict(params=rest, weight_decay=0.0)], lr=0.02,
                             betas=(0.9, 0.95))
    for step in range(4):
        gradients(twin, step)
        for name, p in groups['hidden']:
            for w, g in zip(matrices[name], p.grad.chunk(len(matrices[name]))):
                w.grad = g
        muon.step()
        adam.step()
    start = dict(network(**MIX).named_parameters())
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters()):
        if name in matrices: # Newton-Schulz in bfloat16 rounds by the order of its sums
            moved = torch.cat(list(matrices[name])) - start[name]
            assert ((p - start[name]) - moved).norm() < 0.03 * moved.norm(), name
        else:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_muon_takes_fused_matrices_apart():
    """The three parts of c_attn are orthogonal each, which the whole then is not."""
    model = network()
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    walk(model, model.configure_optimizers(0.0, 0.02, (0.9, 0.95), 'cpu', 'muon'), 1)
    moved = model.transformer.h[0].attn.c_attn.weight.detach() - before
    for part in moved.chunk(3):
        s = torch.linalg.svdvals(part)
        assert 0.6 < s[len(s) // 8] / s[0] <= 1 # all but the smallest lie between 0.7 and 1.2 of the scale
        assert part.square().mean().sqrt() == pytest.approx(0.02 * 0.2, rel=0.25) # as large as AdamW's would be


@pytest.mark.parametrize('name', ['muon', 'sm3'])
def test_a_bad_step_changes_nothing(name):
    model = network(**MIX)
    optimizer = model.configure_optimizers(0.1, 0.02, (0.9, 0.95), 'cpu', name)
    walk(model, optimizer, 2)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()['state'])
    gradients(model, 7)
    for p in model.parameters():
        p.grad[..., 0] = math.nan
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert_same(optimizer.state_dict()['state'], state, 'state')
    optimizer.found_inf = torch.tensor(0.0)
    gradients(model, 7)
    optimizer.step()
    assert not any(torch.equal(v, before[k]) for k, v in model.named_parameters())


@pytest.mark.parametrize('shape', [(), (5,), (4, 3), (2, 3, 4)])
def test_sm3_is_the_papers(shape):
    """Number by number in float64: nu = min of the sums of the slices that hold it, plus g^2; each sum = max of nus."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = SM3([dict(params=[p], weight_decay=0.1)], 0.3, 0.8)
    w, m = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    sums = [[0.0] * n for n in shape or (1,)] # a lone number is a slice of itself
    for step in range(5):
        p.grad = torch.randn(shape, dtype=torch.float64)
        p.grad.view(-1)[0] = 0.0 # never a gradient here
        optimizer.step()
        new = [[0.0] * n for n in shape or (1,)]
        for at in itertools.product(*map(range, shape)):
            g = p.grad[at].item()
            nu = min(sums[d][i] for d, i in enumerate(at or (0,))) + g * g
            for d, i in enumerate(at or (0,)):
                new[d][i] = max(new[d][i], nu)
            u = g / math.sqrt(nu) if nu > 0 else 0.0
            m[at] = 0.8 * m[at] + 0.2 * u
            w[at] = w[at] * (1 - 0.3 * 0.1) - 0.3 * (0.8 * m[at] + 0.2 * u)
        sums = new
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_float16_does_not_wait_for_sm3(monkeypatch):
    """torch's scaler would read from the device whether the gradients are finite, in every step."""
    monkeypatch.delattr(torch.amp.GradScaler, '_maybe_opt_step')
    ends = []
    for scaler in torch.amp.GradScaler('cpu', init_scale=1024.0), torch.amp.GradScaler('cpu', enabled=False):
        p = torch.nn.Parameter(torch.ones(3, 4))
        optimizer = SM3([dict(params=[p], weight_decay=0.1)], 0.3)
        for bad in False, True, False:
            if scaler.is_enabled() or not bad:
                scaler.scale((p * torch.arange(4.0)).square().sum() * (math.inf if bad else 1.0)).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)


def test_sm3_has_half_of_adams_memory():
    def size(name):
        model = network(n_embd=64, block_size=64)
        optimizer = model.configure_optimizers(0.1, 0.02, (0.9, 0.95), 'cpu', name)
        walk(model, optimizer, 1)
        return sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert 0.5 < size('sm3') / size('adamw') < 0.53


def test_adaptive_clipping():
    """Row by row: at most a share of the row's own length; the head is left alone."""
    model = network(tie_weights=False, time_weighting='full')
    gradients(model, 1)
    with torch.no_grad():
        model.transformer.ln_f.bias.zero_() # a row of zeros counts for 0.001
        for p in model.parameters():
            p.grad[0] *= 1e-4 # short ones stay as they are
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    clip_adaptively(model, 0.01)
    for name, p in model.named_parameters():
        for w, g, clipped in zip(p.detach().view(-1, p.size(-1)), grads[name].view(-1, p.size(-1)),
                                 p.grad.view(-1, p.size(-1))):
            limit = math.inf if name == 'lm_head.weight' else 0.01 * max(1e-3, w.norm().item())
            expected = g * min(1.0, limit / g.norm().item())
            torch.testing.assert_close(clipped, expected, rtol=1e-5, atol=1e-9, msg=name)


def test_hidden_matrices_have_a_rate_of_their_own():
    model = network(tie_weights=False, time_weighting='full')
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.8, 0.9), 'cpu', hidden_lr=2e-3)
    found = {id(p): (group['lr'], group['lr_scale'], group['weight_decay'])
             for group in optimizer.param_groups for p in group['params']}
    attn = model.transformer.h[0].attn
    assert found[id(attn.c_attn.weight)] == (2e-3, 2.0, 0.1) and found[id(attn.weight)] == (1e-3, 1.0, 0.0)
    assert found[id(model.transformer.wte.weight)] == found[id(model.lm_head.weight)] == (1e-3, 1.0, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# in train.py

MUON = dict(optimizer='muon', momentum=0.8, hidden_lr=2e-2, schedule='linear', min_lr=0.0, min_block_size=4,
            adaptive_clip=0.05, dropout=0.2, eval_interval=10)


@job
def muon(folder):
    write_data(folder / 'data')
    train(folder, 'whole', **MUON)
    train(folder, 'cut', **MUON, max_iters=13) # after 20's own evaluation only
    well(run('train.py', flags(out_dir=folder / 'cut', init_from='resume', max_iters=20), first=NO_PICTURES))
    return folder


@job
def sm3(folder):
    write_data(folder / 'data')
    settings = dict(optimizer='sm3', learning_rate=0.1, dtype='bfloat16', sampling='epoch')
    train(folder, 'whole', **settings)
    train(folder, 'cut', **settings, max_iters=6)
    well(run('train.py', flags(out_dir=folder / 'cut', init_from='resume', max_iters=20), first=NO_PICTURES))
    return folder


def resumed_exactly(folder):
    one, other = (load_checkpoint(folder / name / 'ckpt.pt') for name in ('whole', 'cut'))
    for name in ('seconds', 'best_val_loss', 'best_step', 'evals_since_best'): # one more evaluation, where it was cut
        one['state'].pop(name), other['state'].pop(name)
    for key in ('model', 'optimizer', 'state'):
        assert_same(one[key], other[key], key)
    assert (losses(folder / 'cut') == losses(folder / 'whole')
            and losses(folder / 'whole')[20] < losses(folder / 'whole')[1] - 0.1)


def test_muon_resumes_exactly(muon):
    resumed_exactly(muon)


def test_sm3_resumes_exactly(sm3):
    resumed_exactly(sm3)


def test_linear_schedule(muon):
    for line in metrics(muon / 'whole'):
        if 'lr' in line:
            i = line['step'] - 1
            assert line['lr'] == pytest.approx(1e-2 * (i + 1) / 4 if i < 3 else 1e-2 * (20 - i) / 17, rel=1e-9)
