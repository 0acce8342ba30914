"""
What only a GPU can show; skipped without one. The numbers of a CPU in float64 are the oracle. With several cores:
python -m pytest tests/test_gpu.py -n 8 --all
"""
import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from data.causality import find_leak
from helpers import ENV, PROJECT, assert_same_run, flags, losses, write_data
from model import GPT, GPTConfig
from test_mixers import SOME

if not torch.cuda.is_available():
    pytest.skip('needs a GPU', allow_module_level=True)

FILES = sorted(path.stem for path in (PROJECT / 'config/mixers').glob('*.py'))
SMALL = dict(n_layer=2, n_head=4, n_embd=128, block_size=128, batch_size=8, gradient_accumulation_steps=2,
             eval_interval=10, eval_iters=4, warmup_iters=3, learning_rate=3e-3, min_lr=3e-4, device='cuda')


@pytest.fixture
def exact():
    """Products in float32 as on a CPU, without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision(before)


def batch(B, T):
    torch.manual_seed(1)
    return torch.randint(11, (2, B, T)).unbind()


def randomized(config):
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
    return model


def step(model, x, y, forward=None):
    """-> the loss and every gradient, in float64 on the CPU."""
    device = next(model.parameters()).device
    loss = (model if forward is None else forward)(x.to(device), y.to(device))[1]
    loss.backward()
    found = dict(model.named_parameters(), loss=loss)
    return {name: (loss if name == 'loss' else p.grad).detach().double().cpu() for name, p in found.items()}


def far(found, expected, limit):
    """{name: ||found - expected|| / ||expected||}, where that is not below the limit."""
    deviations = {name: ((found[name] - e).norm() / (e.norm() + 1e-5 * e.numel() ** 0.5)).item()
                  for name, e in expected.items()}
    return {name: deviation for name, deviation in deviations.items() if not deviation < limit} # nan too


@pytest.mark.parametrize('name', SOME)
def test_a_step_in_float32(name, exact):
    model, (x, y) = randomized(replace(SOME[name], block_size=64)), batch(4, 64)
    expected = step(copy.deepcopy(model).double(), x, y)
    assert not far(step(model.cuda(), x, y), expected, 2e-4)


@pytest.mark.parametrize('name', SOME)
def test_a_step_in_bfloat16(name):
    model, (x, y) = randomized(replace(SOME[name], block_size=64)), batch(32, 64)
    expected = step(copy.deepcopy(model).double(), x, y)
    with torch.autocast('cuda', torch.bfloat16):
        found = step(model.cuda(), x, y)
    # together, as some gradients are sums of what rounding leaves
    assert not far(*({'all': torch.cat([t.flatten() for t in s.values()])} for s in (found, expected)), 0.02)


@pytest.mark.long('compiling')
@pytest.mark.parametrize('name', [name for name in SOME if '-flat-' in name or name.startswith('attention')])
def test_a_compiled_step(name, exact):
    torch._dynamo.reset()
    model, (x, y) = randomized(replace(SOME[name], block_size=64)), batch(4, 64)
    expected = step(copy.deepcopy(model).double(), x, y)
    assert not far(step(model.cuda(), x, y, torch.compile(model, dynamic=False)), expected, 1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', SOME)
def test_no_false_alarm(name, dtype, record_property):
    """At a length of 263, with as many rows as fill the GPU's kernels."""
    model = randomized(replace(SOME[name], block_size=263)).cuda()
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        proof = find_leak(model, batch(32, 263)[0].cuda(), 16)
    record_property('noise', proof.noise)
    assert proof.leak is None and proof.cuts == 262, proof.words


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('pos_emb', ['learned', 'rope', 'none'])
def test_static_decoding(pos_emb, dtype, exact):
    """The graph that is captured once draws the tokens of a cache that grows."""
    model = randomized(GPTConfig(block_size=96, vocab_size=61, n_layer=3, n_head=4, n_embd=128, pos_emb=pos_emb))
    model = model.cuda().to(dtype).eval()
    idx = torch.randint(61, (3, 5), device='cuda')
    found = []
    for static in True, False:
        generator = torch.Generator('cuda').manual_seed(1)
        found.append(model.generate(idx, 80, temperature=0.8, static=static, generator=generator))
    n = 85 if dtype == torch.float32 else 20 # rounding in bfloat16 may change a draw, and then all after it
    assert torch.equal(found[0][:, :n], found[1][:, :n])


def run(script, *args):
    # ENV hides all GPUs
    env = ENV | dict(OMP_NUM_THREADS='2', CUDA_VISIBLE_DEVICES=os.environ.get('CUDA_VISIBLE_DEVICES', '0'))
    done = subprocess.run([sys.executable, PROJECT / script, *map(str, args)], env=env, capture_output=True, text=True,
                          timeout=400, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def train(folder, out, *files, **settings):
    return run('train.py', *files, *flags(**SMALL | dict(dataset=folder / 'data', out_dir=folder / out) | settings))


@pytest.mark.long('compiling')
@pytest.mark.parametrize('file', FILES)
def test_training(file, tmp_path):
    """Compiled in bfloat16 on the GPU, 20 steps teach what they teach on the CPU in float32."""
    write_data(tmp_path / 'data')
    path = PROJECT / f'config/mixers/{file}.py'
    said = train(tmp_path, 'gpu', path, max_iters=20, compile=True)
    assert 'causal   proven at T=128' in said and 'with compiling, after training' in said
    train(tmp_path, 'cpu', path, max_iters=20, device='cpu', dtype='float32')
    on_gpu, on_cpu = losses(tmp_path / 'gpu'), losses(tmp_path / 'cpu')
    assert on_gpu[1] == pytest.approx(on_cpu[1], rel=2e-3) and on_gpu[20] == pytest.approx(on_cpu[20], abs=0.1)
    run('sample.py', *flags(out_dir=tmp_path / 'gpu', device='cuda', num_samples=2, start='the'), path)


@pytest.mark.long('compiling')
@pytest.mark.parametrize('settings', [
    dict(compile=True), dict(compile=False), dict(compile=True, optimizer='muon'), dict(compile=False, optimizer='sm3'),
    dict(compile=False, dtype='float16')], ids=str)
def test_resuming_is_bit_identical(settings, tmp_path):
    write_data(tmp_path / 'data')
    settings |= dict(deterministic=True, dropout=0.1, eval_interval=7)
    train(tmp_path, 'whole', max_iters=12, **settings)
    train(tmp_path, 'parts', max_iters=7, lr_decay_iters=12, **settings)
    run('train.py', *flags(out_dir=tmp_path / 'parts', init_from='resume', max_iters=12))
    assert_same_run(tmp_path / 'whole/ckpt.pt', tmp_path / 'parts/ckpt.pt')


@pytest.mark.parametrize('settings', [dict(optimizer='muon'), dict(optimizer='sm3', dtype='float16'),
                                      dict(recompute=True), dict(min_block_size=64), dict(adaptive_clip=0.01),
                                      dict(unet_layers='1,1'), dict(narrow_residual=True)], ids=str)
def test_other_settings(settings, tmp_path):
    write_data(tmp_path / 'data')
    said = train(tmp_path, 'out', max_iters=20, compile=False, **settings)
    assert 'proven' in said and losses(tmp_path / 'out')[20] < losses(tmp_path / 'out')[1]
