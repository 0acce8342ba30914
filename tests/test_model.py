"""
GPT around its mixers: transformers' GPT-2 as the oracle in both directions, loading, cropping and growing weights,
refused settings, generation against naive code, cost, and checkpoints that survive what happens to files.
"""

import itertools
import json
import math
import pathlib
import pickle
import platform
import struct
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data.checkpoints import crop_block_size, load_checkpoint, load_model, load_weights, save_checkpoint
from data.export import save_pretrained
from helpers import SMALL, likeliest, naive_generate, network, randomize
from model import (GPT, MIXERS, Cache, Decoder, GPTConfig, LinearCrossEntropy, LiveBytes, Mixer, Window, beam_search,
                   cost, draw, peak_bytes, pick)

PLACES = {mixer: dict(mixer=mixer) for mixer in MIXERS} # one architecture for each mixer, and then some
PLACES |= dict(circulant=dict(time_weighting='circulant', pos_emb='relative'),
               full=dict(time_weighting='full', pos_emb='rope'), shift=dict(time_mixing=0.5),
               conv=dict(short_conv=3), values=dict(value_residual=True, attention_gate=True),
               unet=dict(n_layer=1, unet_layers=(1, 1)),
               gmlp_unet=dict(mixer='gmlp', gmlp_attn=4, n_layer=1, unet_layers=(1,), unet_factor=3))


def tokens(B, T, V=61):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, idx):
    return model(idx)[0]


def assert_same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# forward

def test_logits_and_loss():
    model, idx = network(), tokens(3, 7)
    out, loss = model(idx)
    assert out.shape == (3, 7, 61) and loss is None
    targets = tokens(3, 7).flip(1)
    targets[0, :5] = targets[2] = -1
    none, loss = model(idx, targets)
    assert none is None
    terms = [-out[b, t].log_softmax(0)[targets[b, t]]
             for b, t in itertools.product(range(3), range(7)) if targets[b, t] != -1]
    assert len(terms) == 9
    assert_same(loss, torch.stack(terms).mean())


@pytest.mark.parametrize('place', PLACES)
def test_a_sequence_longer_than_the_block_is_refused(place):
    model = network(**PLACES[place])
    with pytest.raises(ValueError, match='13 tokens is longer than block_size=12'):
        model(tokens(1, 13))
    cache = Cache()
    model(tokens(1, 12), cache=cache)
    with pytest.raises(ValueError, match='13 tokens'):
        model(tokens(1, 1), cache=cache)


def test_dropout_acts_in_training_alone():
    model, idx = network(dropout=0.5), tokens(1, 12)
    assert torch.equal(logits(model, idx), logits(model, idx))
    model.train()
    assert not torch.equal(logits(model, idx), logits(model, idx))


# ---------------------------------------------------------------------------------------------------------------------
# GPTConfig

@pytest.mark.parametrize('args, words', [
    (dict(n_embd=15), ['n_embd=15', 'n_head=2', 'n_embd=16']),
    (dict(n_embd=14, pos_emb='rope'), ['rope', '7 channels']),
    (dict(mixer='gmlp', gmlp_ratio=2.9), ['gmlp_ratio=2.9', 'n_embd=16', '23 channels', 'n_head=2']),
    (dict(mixer='gmlp', gmlp_ratio=0.0), ['gmlp_ratio=0.0']),
    (dict(mixer='gmlp', gmlp_attn=-1), ['gmlp_attn=-1']),
    (dict(mixer='gmlp', pos_emb='rope'), ["pos_emb='rope'", "mixer='gmlp'", 'learned or none']),
    (dict(mixer='mlp_mixer', pos_emb='relative'), ["pos_emb='relative'", "mixer='mlp_mixer'"]),
    (dict(mixer='synthesizer', pos_emb='rope'), ["pos_emb='rope'", 'synthesizer_attn=True']),
    (dict(mixer='gmlp', time_weighting='full'), 
     ["time_weighting='full'", "mixer='gmlp'", "leave time_weighting at 'none'"]),
    (dict(mixer='gmlp', qk_norm=True), ['qk_norm=True', "mixer='gmlp'", 'leave qk_norm at False']),
    (dict(mixer='container', time_weighting='full'), ["time_weighting='full'", "mixer='container'"]),
    (dict(gmlp_ratio=2.0), ['gmlp_ratio=2.0', "mixer='attention'"]),
    (dict(gmlp_tanh=True), ['gmlp_tanh=True']),
    (dict(gmlp_attn=64), ['gmlp_attn=64']),
    (dict(synthesizer='random'), ["synthesizer='random'"]),
    (dict(synthesizer_attn=True), ['synthesizer_attn=True']),
    (dict(mlp='none', mlp_ratio=2.0), ['mlp_ratio=2.0', "mlp='none'"]),
    (dict(time_mixing_alternate=True), ['time_mixing_alternate=True', 'time_mixing=0.0']),
    (dict(time_mixing=1.5), ['time_mixing=1.5']),
    (dict(time_mixing=-0.1), ['time_mixing=-0.1']),
    (dict(time_mixing=0.01), ['time_mixing=0.01', 'n_embd=16', 'less than one channel']),
    (dict(short_conv=-1), ['short_conv=-1', '0 (off)']),
    (dict(short_conv=13), ['short_conv=13', 'block_size=12']),
    (dict(n_layer=1, value_residual=True), ['value_residual=True', 'second layer', 'at False']),
    (dict(mixer=('gmlp', 'attention'), value_residual=True), ['value_residual=True', "('gmlp', 'attention')"]),
    (dict(mixer='container', value_residual=True), ['value_residual=True', "mixer='container'"]),
    (dict(mixer='synthesizer', attention_gate=True), ['attention_gate=True', "mixer='synthesizer'"]),
    (dict(unet_factor=3), ['unet_factor=3', 'unet_layers=()']),
    (dict(unet_up_layers=(1,)), ['unet_up_layers=(1,)', 'unet_layers=()']),
    (dict(unet_layers=(1,), unet_factor=1), ['unet_factor=1', '2 or more']),
    (dict(unet_layers=(1, 1), unet_factor=(2, 0)), ['unet_factor=(2, 0)', '2 or more']),
    (dict(unet_layers=(-1,)), ['unet_layers=(-1,)', 'negative']),
    (dict(unet_layers=3), ['unet_layers=3', 'tuple']), (dict(unet_layers=(1, 'a')), ["unet_layers=(1, 'a')", 'tuple']),
    (dict(unet_layers=(1,), unet_up_layers=3), ['unet_up_layers=3', 'tuple']),
    (dict(unet_layers=(1, 1), unet_up_layers=(1,)), ['unet_layers=(1, 1)', 'unet_up_layers=(1,)', 'as many']),
    (dict(unet_layers=(1, 1), unet_factor=(2,)), ['unet_factor=(2,)', 'as many']),
    (dict(unet_layers=(1, 1, 1, 1)), ['unet_layers=(1, 1, 1, 1)', 'one token of 16', 'block_size=12']),
    (dict(mixer='atention'), ["mixer='atention'", *MIXERS]),
    (dict(pos_emb='alibi'), ["pos_emb='alibi'", 'learned', 'rope', 'relative', 'none']),
    (dict(mlp='relu'), ["mlp='relu'", 'relu2']),
    (dict(time_weighting='half'), ["time_weighting='half'", 'circulant']),
    (dict(mixer='synthesizer', synthesizer='sparse'), ["synthesizer='sparse'", 'dense', 'random']),
    (dict(dropout=1.0), ['dropout=1.0']),
    (dict(dropout=-0.1), ['dropout=-0.1']),
    (dict(block_size=0), ['block_size=0']),
    (dict(vocab_size=0), ['vocab_size=0']),
    (dict(n_layer=0), ['n_layer=0']),
    (dict(n_head=0), ['n_head=0']),
    (dict(n_embd=-16), ['n_embd=-16']),
])
def test_refused_settings(args, words):
    with pytest.raises(ValueError) as e:
        GPTConfig(**SMALL | args)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert '\n' not in str(e.value)


def test_lists_become_tuples():
    config = GPTConfig(unet_layers=[1, 2], unet_up_layers=[2, 1], unet_factor=[2, 3])
    assert config.unet_levels() == ((1, 2), (2, 1), (2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2's weights in and out, with transformers' own class as the oracle

def hf_model(**args):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(2)
    config = dict(n_positions=12, vocab_size=61, n_layer=2, n_head=2, n_embd=16)
    hf = GPT2LMHeadModel(GPT2Config(**config | args)).eval()
    randomize(hf)
    return hf


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('activation, mlp', [('gelu_new', 'gelu_tanh'), ('gelu', 'gelu')])
def test_weights_that_transformers_saved(activation, mlp, tied, tmp_path):
    hf = hf_model(activation_function=activation, tie_word_embeddings=tied, n_inner=None if tied else 40)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    assert (model.config.mlp, model.config.tie_weights) == (mlp, tied)
    assert_same(logits(model, tokens(2, 12)), hf(tokens(2, 12)).logits.detach())


@pytest.mark.parametrize('args', [
    dict(), dict(mlp='gelu_tanh'), dict(mlp='relu2'), dict(bias=False), dict(tie_weights=False), dict(mlp_ratio=2.5),
    dict(pos_emb='none'), dict(bias=False, tie_weights=False, mlp='gelu_tanh', pos_emb='none'),
], ids=str)
def test_weights_that_transformers_loads(args, tmp_path):
    from transformers import GPT2LMHeadModel
    model = network(**args)
    save_pretrained(model, tmp_path / 'new')
    hf, info = GPT2LMHeadModel.from_pretrained(tmp_path / 'new', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    expected = logits(model, tokens(2, 12))
    assert_same(hf.eval()(tokens(2, 12)).logits.detach(), expected)
    assert_same(logits(GPT.from_pretrained(tmp_path / 'new').eval(), tokens(2, 12)), expected)


def test_every_width_of_a_hidden_layer_can_be_loaded(tmp_path):
    assert 15 / 22 * 22 < 15 # n_inner is a whole number, mlp_ratio is not
    hf_model(n_embd=22, n_inner=15).save_pretrained(tmp_path)
    GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize('args', [
    dict(mixer='mlp_mixer'), dict(mixer='gmlp'), dict(pos_emb='rope'), dict(pos_emb='learned+relative'),
    dict(mlp='swiglu'), dict(mlp='none'), dict(rezero=True), dict(time_mixing=0.5),
    dict(time_weighting='full'), dict(unet_layers=(1,)), dict(qk_norm=True), dict(short_conv=4),
    dict(value_residual=True), dict(attention_gate=True),
], ids=str)
def test_what_gpt2_cannot_express_is_refused(args, tmp_path):
    with pytest.raises(ValueError) as e:
        save_pretrained(network(**args), tmp_path / 'new')
    (name, value), = args.items()
    assert f'{name}={value!r}' in str(e.value)
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('args, words', [
    (dict(model_type='llama'), "model_type 'llama'"),
    (dict(activation_function='silu'), "activation_function 'silu'"),
    (dict(scale_attn_by_inverse_layer_idx=True), 'attn'),
    (dict(scale_attn_weights=False), 'attn'),
    (dict(layer_norm_epsilon=1e-3), 'layer_norm_epsilon'),
    (dict(n_layer=3), 'transformer.h.2.attn.c_attn.weight'),
    (dict(n_layer=1), 'transformer.h.1.attn.c_attn.bias'),
    (dict(n_positions=24), 'transformer.wpe.weight (12, 16) for (24, 16)'),
])
def test_folders_that_do_not_fit_are_refused(args, words, tmp_path):
    save_pretrained(network(), tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | args))
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(tmp_path)
    assert words in str(e.value)


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(OSError, match='no checkpoint .*nothing'):
        GPT.from_pretrained(tmp_path / 'nothing')
    with pytest.raises(OSError, match='has no config.json.*gpt2-xl'):
        GPT.from_pretrained(tmp_path)
    save_pretrained(network(), tmp_path)
    weights = (tmp_path / 'model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(weights[:-100])
    with pytest.raises(ValueError, match='not readable'):
        GPT.from_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(OSError, match='has no model.safetensors'):
        GPT.from_pretrained(tmp_path)


def test_the_hubs_names_and_masks(tmp_path):
    """The hub's gpt2 has no 'transformer.' before its names, no head, masks beside the weights, maybe another dtype."""
    model = network(mlp='gelu_tanh')
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / 'model.safetensors')
    state = {k.removeprefix('transformer.'): v.bfloat16() for k, v in state.items()}
    state |= {f'h.{i}.attn.bias': torch.ones(1, 1, 12, 12).tril() for i in range(2)}
    save_file(state, tmp_path / 'model.safetensors')
    loaded = GPT.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16().float())
    assert_same(logits(loaded.eval(), tokens(2, 12)), logits(model, tokens(2, 12)), 0.1)


def test_the_hub_out_of_reach(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError('no route')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', unreachable)
    with pytest.raises(OSError, match='gpt2-medium could not be downloaded.*network.*local folder'):
        GPT.from_pretrained('gpt2-medium')


@pytest.mark.parametrize('args, added', [
    (dict(time_weighting='circulant'), 'attn.alpha'), (dict(short_conv=4), 'conv.weight'),
    (dict(value_residual=True), 'attn.share'), (dict(attention_gate=True), 'attn.gate')], ids=str)
def test_overrides_of_pretrained_weights(args, added, tmp_path, capsys):
    model = network()
    save_pretrained(model, tmp_path)
    plain = GPT.from_pretrained(tmp_path, dict(dropout=0.3))
    assert plain.config.dropout == 0.3 and capsys.readouterr().out == ''
    grown = GPT.from_pretrained(tmp_path, args).eval()
    assert f'added    transformer.h.1.{added}, starting as the identity' in capsys.readouterr().out
    assert_same(logits(grown, tokens(2, 12)), logits(model, tokens(2, 12)), 1e-6)


@pytest.mark.parametrize('trained, change', [(dict(short_conv=4), 0), (dict(short_conv=4), 2),
                                             (dict(attention_gate=True), False)], ids=str)
def test_what_was_trained_with_an_addition_keeps_it(trained, change, tmp_path):
    save_checkpoint(tmp_path / 'ckpt.pt', checkpoint_of(network(**trained)))
    with pytest.raises(ValueError, match=next(iter(trained)) + '|conv.weight|attn.gate'):
        load_model(tmp_path / 'ckpt.pt', **dict.fromkeys(trained, change))


# ---------------------------------------------------------------------------------------------------------------------
# Loading, cropping, growing

def nanogpt_state(hf, bias):
    """hf's weights under nanoGPT's names: Linear instead of Conv1D, the embedding once more as the head."""
    state = {}
    for name, p in hf.transformer.state_dict().items():
        if not bias and name.endswith('.bias'):
            continue
        conv1d = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        state['transformer.' + name] = (p.t() if conv1d else p).clone()
    return state | {'lm_head.weight': state['transformer.wte.weight']}


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module._orig_mod.'])
@pytest.mark.parametrize('bias', [True, False])
def test_a_checkpoint_of_nanogpt(bias, prefix, tmp_path):
    hf = hf_model(activation_function='gelu')
    if not bias:
        for name, p in hf.named_parameters():
            if name.endswith('.bias'):
                p.data.zero_()
    state = nanogpt_state(hf, bias)
    if prefix: # torch without flash attention keeps masks
        state |= {f'transformer.h.{i}.attn.bias': torch.ones(1, 1, 12, 12).tril() for i in range(2)}
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, bias=bias, vocab_size=61, dropout=0.1)
    torch.save(dict(model={prefix + k: v for k, v in state.items()}, optimizer=dict(state={}, param_groups=[]),
                    model_args=args, iter_num=2000, best_val_loss=torch.tensor(1.5), config=dict(dataset='x')),
               tmp_path / 'ckpt.pt')
    model, checkpoint = load_model(tmp_path / 'ckpt.pt')
    assert checkpoint['iter_num'] == 2000 and not model.training
    assert_same(logits(model, tokens(2, 12)), hf(tokens(2, 12)).logits.detach())


def test_weights_that_do_not_fit_are_named():
    state = network().state_dict()
    model = network()
    for change, words in [
        (dict(extra=torch.zeros(1), more=torch.zeros(1)), 'lacks: extra, more'),
        ({'transformer.ln_f.weight': None, 'transformer.h.0.mlp.c_fc.bias': None},
         'has: transformer.h.0.mlp.c_fc.bias, transformer.ln_f.weight'),
        ({'transformer.wpe.weight': torch.zeros(13, 16)}, 'transformer.wpe.weight (13, 16) for (12, 16)'),
        ({'lm_head.weight': torch.zeros(61, 16)}, 'tie_weights=False'),
    ]:
        with pytest.raises(ValueError) as e:
            load_weights(model, {k: v for k, v in (state | change).items() if v is not None})
        assert words in str(e.value)
    for k, p in network().named_parameters(): # and a refused load changes nothing
        assert torch.equal(p, dict(model.named_parameters())[k])
    state['transformer.wte.weight'][0] = math.nan # diverged, but tied all the same
    load_weights(model, state)
    assert model.lm_head.weight[0].isnan().all() and model.lm_head.weight is model.transformer.wte.weight


def test_untying_starts_from_the_tied_matrix():
    tied = network()
    state = {k: v for k, v in tied.state_dict().items() if k != 'lm_head.weight'}
    model = network(tie_weights=False)
    assert load_weights(model, state) == []
    assert torch.equal(logits(model, tokens(2, 12)), logits(tied, tokens(2, 12)))


@pytest.mark.parametrize('args, added', [
    (dict(time_weighting='circulant'), ['alpha', 'beta']),
    (dict(time_weighting='full'), ['weight']),
    (dict(pos_emb='learned+relative'), ['relative']),
    (dict(pos_emb='learned+relative', time_weighting='full'), ['relative', 'weight']),
], ids=str)
def test_growing(args, added):
    plain = network()
    grown = GPT(GPTConfig(**SMALL | args)).eval()
    with pytest.raises(ValueError, match=f'lacks parameters .*: transformer.h.0.attn.{added[0]}'):
        load_weights(grown, plain.state_dict())
    names = [f'transformer.h.{i}.attn.{name}' for i in range(2) for name in added]
    assert load_weights(grown, plain.state_dict(), grow=True) == names
    assert_same(logits(grown, tokens(2, 12)), logits(plain, tokens(2, 12)), 1e-6)


@pytest.mark.parametrize('args, added', [
    (dict(short_conv=4), ['0.conv.weight', '1.conv.weight']),
    (dict(value_residual=True), ['1.attn.share']),
    (dict(attention_gate=True), ['0.attn.gate', '1.attn.gate']),
    (dict(short_conv=1, attention_gate=True, mixer=('attention', 'gmlp')), ['0.conv.weight', '0.attn.gate',
                                                                            '1.conv.weight']),
], ids=str)
def test_additions_leave_trained_weights_their_logits(args, added):
    plain = network(mixer=args.get('mixer', 'attention'))
    grown = GPT(GPTConfig(**SMALL | args)).eval()
    missing, unexpected = grown.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == sorted(f'transformer.h.{name}' for name in added) and not unexpected
    assert torch.equal(logits(grown, tokens(2, 12)), logits(plain, tokens(2, 12)))


@pytest.mark.parametrize('chunk, N', [(2 ** 25, 50), (1, 8), (1, 50), (170, 50), (170, 3), (1, 40000)])
def test_the_head_in_chunks(monkeypatch, chunk, N):
    """Loss and gradients in float64 are torch's with all logits there, however many rows the last chunk has."""
    monkeypatch.setattr('model.LOGITS_AT_ONCE', chunk)
    torch.manual_seed(0)
    y = torch.randint(17, (N,)).masked_fill(torch.rand(N) < 0.3, -1)
    y[0], y[-1] = 16, 0
    results = []
    for loss_of in (lambda x, w: LinearCrossEntropy.apply(x, w, y, True),
                    lambda x, w: F.cross_entropy(x @ w.t(), y, ignore_index=-1)):
        torch.manual_seed(1)
        x, w = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (N, 17))
        loss = loss_of(x, w)
        (3 * loss).backward()
        results.append((loss.detach(), x.grad, w.grad))
    for ours, right in zip(*results):
        assert_same(ours, right, 1e-12)


@pytest.mark.parametrize('value', ['chep', 1, None])
def test_recompute_is_checked(value):
    with pytest.raises(ValueError, match='is not one of True, False, cheap'):
        GPTConfig(recompute=value)


def test_narrow_residual():
    """Under autocast the residual stream has its 16 bits; without it nothing changes; its cost can be counted."""
    model, seen = network(narrow_residual=True), []
    for module in (*model.transformer.h, model.transformer.ln_f):
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    assert torch.equal(logits(model, tokens(2, 12)), logits(network(), tokens(2, 12)))
    with torch.autocast('cpu', torch.bfloat16):
        model(tokens(2, 12), tokens(2, 12))[1].backward()
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert cost(model) == cost(network())


def test_recompute_what_is_cheap():
    """Compiled, the same loss and gradients, and less is kept for the backward pass."""
    idx, found = tokens(4, 12), []
    for cheap in (False, True):
        model, sizes = network(), {}
        torch.compiler.reset()
        with torch._functorch.config.patch(ban_recompute_materialized_backward=not cheap):
            forward = torch.compile(model, backend='aot_eager_decomp_partition')
            with torch.autograd.graph.saved_tensors_hooks(
                    lambda t: sizes.update({t.untyped_storage()._cdata: t.untyped_storage().nbytes()}) or t,
                    lambda t: t):
                loss = forward(idx, idx)[1]
        loss.backward()
        found.append((sum(sizes.values()), loss, model.transformer.wpe.weight.grad))
    assert found[1][0] < 0.9 * found[0][0]
    assert_same(found[0][1], found[1][1], 1e-6)
    assert_same(found[0][2], found[1][2], 1e-5)


def test_a_batch_without_targets():
    """Its loss is 0 and so are its gradients, where a mean over no target would be NaN."""
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8))
    loss = model(torch.zeros(2, 8, dtype=torch.long), torch.full((2, 8), -1))[1]
    loss.backward()
    assert loss.item() == 0.0 and all(p.grad.count_nonzero() == 0 for p in model.parameters())


@pytest.mark.parametrize('scale', [1.0, 65536.0])
def test_gradients_of_the_head_in_float16(scale):
    """Many tokens and a large vocabulary: probabilities / tokens are below float16's smallest number."""
    torch.manual_seed(0)
    N, C, V = 4096, 8, 5000
    x, w, y = torch.randn(N, C) / 2, torch.randn(V, C) / 2, torch.randint(V, (N,))
    grads = []
    for dtype in (torch.float16, torch.float32):
        a, b = x.to(dtype).requires_grad_(), w.clone().requires_grad_()
        loss = LinearCrossEntropy.apply(a, b.to(dtype) if dtype == torch.float16 else b, y, True)
        (loss * scale).backward()
        grads.append(b.grad / scale)
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()


def test_growing_biases():
    plain, grown = network(bias=False), GPT(GPTConfig(**SMALL)).eval()
    names = load_weights(grown, plain.state_dict(), grow=True)
    assert len(names) == 2 * 6 + 1 and all(name.endswith('.bias') for name in names)
    assert_same(logits(grown, tokens(2, 12)), logits(plain, tokens(2, 12)), 1e-6)


@pytest.mark.parametrize('args', [
    dict(mixer='container'), dict(unet_layers=(1,)), dict(mlp='swiglu'), dict(n_layer=3),
], ids=str)
def test_what_has_no_identity_does_not_grow(args):
    with pytest.raises(ValueError, match='parameters that this architecture|other shapes'):
        load_weights(GPT(GPTConfig(**SMALL | args)), network().state_dict(), grow=True)


@pytest.mark.parametrize('place', PLACES)
def test_crop_block_size(place):
    model = network(**PLACES[place])
    expected = logits(model, tokens(2, 7))
    model = crop_block_size(model, 7)
    assert model.config == GPTConfig(**SMALL | PLACES[place] | dict(block_size=7))
    assert torch.equal(logits(model, tokens(2, 7)), expected)
    assert logits(model, tokens(2, 7)).isfinite().all() and model.generate(tokens(1, 3), 9).shape == (1, 12)
    with pytest.raises(ValueError, match='8 tokens'):
        model(tokens(1, 8))
    with pytest.raises(ValueError, match='block_size=8 is longer than the 7'):
        crop_block_size(model, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

@pytest.mark.parametrize('place', PLACES)
def test_greedy_generation(place):
    """At once and token by token, as without a cache; past block_size, and from a prompt that is longer than that."""
    model, drawn = network(**PLACES[place], tie_weights=False), set()
    with torch.no_grad(): # random weights repeat one token for ever, unless the tokens count for more than the biases
        model.transformer.wte.weight.mul_(5.0)
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.ln_f.bias.zero_()
    for B, T, n in [(2, 1, 30), (1, 12, 8), (2, 20, 14)]:
        idx = tokens(B, T)
        expected = naive_generate(model, idx, n, likeliest)
        assert torch.equal(model.generate(idx, n, temperature=0.0), expected)
        assert torch.equal(torch.cat([idx, *model.stream(idx, n, temperature=0.0)], dim=1), expected)
        drawn |= set(expected[:, T:].flatten().tolist())
    assert len(drawn) >= 5 # not right by chance


def test_a_block_of_one_token():
    model = network(block_size=1)
    expected = naive_generate(model, tokens(1, 3), 5, likeliest)
    assert torch.equal(model.generate(tokens(1, 3), 5, temperature=0.0), expected)


def test_the_stream_is_lazy_and_sampling_is_repeatable():
    model, idx = network(), tokens(2, 3)
    seeded = lambda: torch.Generator().manual_seed(7)
    whole = model.generate(idx, 20, generator=seeded())
    stream = model.stream(idx, 20, generator=seeded())
    assert torch.equal(next(stream), whole[:, 3:4]) and torch.equal(next(stream), whole[:, 4:5])
    assert torch.equal(torch.cat([idx, whole[:, 3:5], *stream], dim=1), whole)
    assert not torch.equal(whole, model.generate(idx, 20, generator=torch.Generator().manual_seed(8)))
    assert torch.equal(model.generate(idx, 0), idx)


def naive_distribution(out, window, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, vocab_size=None,
                       repetition_window=None, no_repeat_ngram=0, min_p=0.0, in_order=False):
    """Probabilities of all tokens; in_order: -> (tokens, their probabilities), the likeliest first."""
    out = out[:vocab_size].tolist()
    window = window[-(repetition_window or len(window)):] if window else []
    for token in set(window):
        out[token] = out[token] / repetition_penalty if out[token] > 0 else out[token] * repetition_penalty
    n = no_repeat_ngram
    for i in range(len(window) - n + 1) if n else ():
        if window[i:i + n - 1] == window[len(window) - n + 1:]:
            out[window[i + n - 1]] = -math.inf
    ranked = sorted(range(len(out)), key=lambda token: -out[token])[:top_k]
    weight = {token: math.exp((out[token] - max(out)) / temperature) for token in ranked}
    total, held, kept = sum(weight.values()), 0.0, {}
    for token in ranked:
        if top_p is not None and held >= top_p:
            break
        if weight[token] < min_p * max(weight.values()):
            break
        kept[token] = weight[token]
        held += weight[token] / total
    if in_order:
        return ranked, torch.tensor([kept.get(token, 0.0) / sum(kept.values()) for token in ranked])
    return torch.tensor([kept.get(token, 0.0) / sum(kept.values()) for token in range(len(out))])


def naive_draw(p, generator):
    at, ends = torch.rand(1, generator=generator, dtype=torch.float64).item(), itertools.accumulate(p.tolist())
    return next(i for i, end in enumerate(ends) if end > at)


@pytest.mark.parametrize('options', [
    dict(), dict(temperature=0.7), dict(top_k=5), dict(top_k=1), dict(top_k=1000), dict(top_p=0.6), dict(top_p=0.01),
    dict(top_p=1.0), dict(repetition_penalty=1.7), dict(vocab_size=50),
    dict(temperature=1.3, top_k=20, top_p=0.8, repetition_penalty=1.2, vocab_size=50), dict(min_p=0.3),
    dict(repetition_penalty=1.5, repetition_window=3), dict(no_repeat_ngram=1, repetition_window=7),
    dict(no_repeat_ngram=2), dict(no_repeat_ngram=3, top_k=2),
    dict(top_p=0.9, min_p=0.1, no_repeat_ngram=2, repetition_window=9),
], ids=str)
def test_sampling(options):
    model, idx = network(), tokens(1, 3, 50)
    generator = torch.Generator().manual_seed(3)
    def choose(out, window):
        if options.get('top_k', 61) < 61 or options.get('top_p', 1.0) < 1.0: # these draw from the candidates in order
            ranked, p = naive_distribution(out, window, **options, in_order=True)
            return ranked[naive_draw(p, generator)]
        return naive_draw(naive_distribution(out, window, **options), generator)
    expected = naive_generate(model, idx, 40, choose)
    assert torch.equal(model.generate(idx, 40, generator=torch.Generator().manual_seed(3), **options), expected)


@pytest.mark.parametrize('options', [
    dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(min_p=2.0), dict(repetition_penalty=0.0),
    dict(repetition_window=13), dict(no_repeat_ngram=13), dict(repetition_window=2, no_repeat_ngram=3)], ids=str)
def test_options_out_of_range_are_refused(options):
    *_, (name, value) = options.items()
    with pytest.raises(ValueError, match=f'^{name}={value} must be '):
        network().generate(tokens(1, 3), 2, **options)


@pytest.mark.parametrize('kind', ['cpu', 'cuda'])
def test_draws_by_probability(kind, monkeypatch):
    """Of 200,000 draws, each column's share is as it should be, to five standard deviations; zeros are never drawn."""
    monkeypatch.setattr('model.kind_of', lambda x: kind)
    shares = torch.tensor([0.0, 0.5, 0.0, 0.003, 0.3, 0.0, 0.197, 0.0])
    drawn = draw(3 * shares.expand(200_000, -1), torch.Generator().manual_seed(1)) # rows need not add up to one
    counts = torch.bincount(drawn.flatten(), minlength=len(shares))
    assert ((counts - 200_000 * shares).abs() <= 5 * (200_000 * shares).sqrt()).all()


def test_smallest_probabilities_are_drawn():
    """2^18 columns of 2^-26 beside one of 1 - 2^-8: sums in float32 would leave every fourth of them."""
    shares = torch.full((1, 2 ** 18 + 1), 2.0 ** -26)
    shares[0, 0] = 1 - 2.0 ** -8
    generator = torch.Generator().manual_seed(1)
    small = [column for _ in range(3000) if (column := draw(shares, generator).item())]
    assert abs(len(small) - 3000 / 256) < 3.5 * (3000 / 256) ** 0.5 and len({column % 4 for column in small}) == 4


@pytest.mark.parametrize('at, column', [(0.0, 1), (0.25, 3), (math.nextafter(1.0, 0.0), 3)])
def test_zeros_are_not_drawn_at_the_edges(at, column, monkeypatch):
    monkeypatch.setattr('torch.rand', lambda *size, **options: torch.full(size, at, dtype=torch.float64))
    assert draw(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]), None).item() == column


def test_a_gpu_draws_as_multinomial_does(monkeypatch):
    """The same tokens from the same generator, with probabilities of zero among them."""
    monkeypatch.setattr('model.kind_of', lambda x: 'cuda')
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(1)) * 4
    logits[:, ::3] = -math.inf
    for seed in range(20):
        expected = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(seed))
        drawn = pick(logits, 1.0, None, None, 0.0, torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, expected)


def test_no_token_is_drawn_of_nan():
    assert pick(torch.tensor([[1.0, math.nan]]), 1.0, None, None, 0.0, None).item() == -1


def test_what_may_be_drawn():
    model = network()
    idx = tokens(1, 3).repeat(4000, 1)
    out = logits(model, idx[:1])[0, -1]
    for options in [dict(top_k=4), dict(top_p=0.5), dict(vocab_size=2), dict(min_p=0.6)]:
        drawn = set(model.generate(idx, 1, generator=torch.Generator().manual_seed(0), **options)[:, -1].tolist())
        assert drawn == set(naive_distribution(out, [], **options).nonzero().flatten().tolist())


def test_greedy_with_a_repetition_penalty_does_not_repeat():
    model = network()
    idx = model.generate(tokens(1, 1), 11, temperature=0.0, repetition_penalty=1e6)
    assert idx.unique().numel() == 12
    assert torch.equal(idx, naive_generate(model, tokens(1, 1), 11, lambda out, window: int(
        naive_distribution(out, window, repetition_penalty=1e6).argmax())))


def test_rows_of_a_batch_do_not_mix():
    model, idx = network(mixer='gmlp'), tokens(3, 4)
    together = model.generate(idx, 20, temperature=0.0)
    assert torch.equal(together, torch.cat([model.generate(row[None], 20, temperature=0.0) for row in idx]))


@pytest.mark.parametrize('options', [dict(pos_emb='learned'), dict(pos_emb='rope', attention_gate=True),
                                     dict(pos_emb='none', value_residual=True)], ids=str)
def test_static_caches(options):
    """A Decoder's text is that of growing caches, also past block_size; it is compiled once for every context."""
    model, idx = network(**options), tokens(3, 5)
    n, first = 2 * model.config.block_size, {}
    decoder = Decoder(model, 3)
    for start in idx, idx[:, :2]: # one for several texts
        assert torch.equal(model.generate(start, n, temperature=0.0, static=decoder),
                           model.generate(start, n, temperature=0.0))
    window = Window(model, decoder=Decoder(model, 1))
    for n in range(1, n): # from one token, too, and after each restart, buffers stay: a CUDA graph replays no others
        window.next_logits(idx[:1, :1].expand(1, n))
        keys = window.decoder.cache.child('h').child(0).child('attn').buffers['k']
        assert keys.size(2) == model.config.block_size and keys.data_ptr() == first.setdefault('keys', keys).data_ptr()
    decoder, cache = Decoder(model, 3), Cache()
    with torch.no_grad(): # logits show what greedy text may hide
        model.hidden(idx[:, :3], cache)
        decoder.load(cache, 3)
        for i in (3, 4):
            assert_same(decoder(idx[:, i:i + 1]), logits(model, idx[:, :i + 1])[:, -1])
    from torch._dynamo.testing import CompileCounter
    torch.compiler.reset()
    counted = CompileCounter()
    decoder, cache = Decoder(model, 3), Cache()
    with torch.no_grad():
        model.hidden(idx, cache)
        decoder.load(cache, 5)
        step = torch.compile(decoder.step, backend=counted)
        for i in range(7):
            decoder.token.copy_(idx[:, i % 5:i % 5 + 1])
            step()
    assert counted.frame_count <= 2 # the first call may still see gradients


@pytest.mark.parametrize('options', [dict(mixer='gmlp'), dict(time_mixing=0.5), dict(short_conv=2),
                                     dict(unet_layers=(1,)), dict(pos_emb='relative')], ids=str)
def test_static_caches_are_for_plain_attention(options):
    with pytest.raises(ValueError, match='static=False'):
        network(**options).generate(tokens(1, 2), 2, static=True)


@pytest.mark.parametrize('place', ['attention', 'gmlp', 'unet', 'conv'])
def test_beam_search(place):
    """As many beams as there are sequences find the likeliest of all; one beam is greedy; eot ends a sequence."""
    options = dict(attention={}, gmlp=dict(mixer='gmlp'), unet=dict(unet_layers=(1,)),
                   conv=dict(short_conv=3, value_residual=True))[place]
    model, idx = network(vocab_size=4, **options), tokens(1, 3, 4)
    def total(row): # log-probability of what follows the prompt
        return sum(logits(model, row[None, :i])[0, -1].log_softmax(0)[row[i]].item()
                   for i in range(idx.size(1), len(row)))
    every = [torch.cat([idx[0], torch.tensor(end)]) for end in itertools.product(range(4), repeat=3)]
    found = beam_search(model, idx, 3, beams=64)[0]
    assert total(found) == pytest.approx(max(map(total, every)), abs=1e-9)
    long = model.config.block_size + 5 # the window restarts
    assert torch.equal(beam_search(model, idx, long, beams=1), model.generate(idx, long, temperature=0.0))
    for penalty in (0.0, 1.0, 3.0): # 0 ends some of them, so lengths compete
        ending = [row for n in (1, 2, 3) for end in itertools.product(range(4), repeat=n)
                  for row in [torch.cat([idx[0], torch.tensor(end)])] if 0 not in end[:-1] and (n == 3 or end[-1] == 0)]
        score = lambda row: total(row) / (len(row) - idx.size(1)) ** penalty
        found = beam_search(model, idx, 3, beams=64, length_penalty=penalty, eot=0)[0]
        assert score(found) == pytest.approx(max(map(score, ending)), abs=1e-6)
    # each once, then there is no other
    assert len(set(beam_search(model, idx, 4, beams=3, no_repeat_ngram=1)[0].tolist())) == 4


def test_a_repetition_window_beyond_block_size_is_refused():
    model = network()
    for call in (lambda **options: list(model.stream(tokens(1, 2), 2, **options)),
                 lambda **options: beam_search(model, tokens(1, 2), 2, **options)):
        with pytest.raises(ValueError, match=f'repetition_window=9999 .* block_size={model.config.block_size}'):
            call(repetition_window=9999)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match='at least one token'):
        network().generate(torch.zeros(1, 0, dtype=torch.long), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Size, cost, optimizer

def test_gpt2_in_numbers():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124439808
    assert model.get_num_params() == 124439808 - 1024 * 768
    assert cost(model) == pytest.approx(0.8547e9, rel=1e-3)


def test_flops_by_hand():
    model, C, L, V = network(), 16, 2, 61
    matrices = L * (3 + 1 + 4 + 4) * C * C + C * V
    for T in (12, 5):
        attention = L * 2 * T * C # multiply-adds of a token: its row of scores, and the weighted sum
        assert cost(model, T) == 3 * 2 * (matrices + attention)
    unet = network(n_layer=1, unet_layers=(0,), unet_factor=4, mixer='mlp_mixer', mlp='none', pos_emb='none')
    # a coarse token for four: merge and expand, and the two triangles over three coarse tokens; and the head
    assert cost(unet) == pytest.approx(3 * 2 * (2 * 4 * C * C / 4 + 2 * 3 * C / 4 + C * V))


def test_flops_have_one_rule_for_triangles():
    """Products with a causal mask count in full, as attention's do, however many blocks skip the upper half."""
    table, attention = (network(mixer=mixer, pos_emb='none', mlp='none', n_layer=1, block_size=1024)
                        for mixer in ('gmlp', 'attention'))
    for model, per_token in (table, lambda T: T * 32), (attention, lambda T: 2 * T * 16):
        assert cost(model, 1024) - cost(model, 256) == 3 * 2 * (per_token(1024) - per_token(256))


def test_flops_of_a_triangular_solve():
    class Solves(Mixer):
        def mix(self, x):
            A = torch.eye(x.size(1), device=x.device, dtype=x.dtype)
            return torch.linalg.solve_triangular(A, x, upper=False)
    MIXERS['solves'] = Solves
    try:
        flops = [cost(network(mixer=mixer, pos_emb='none', mlp='none', n_layer=1, block_size=32))
                 for mixer in ('solves', 'attention')]
    finally:
        del MIXERS['solves']
    # attention has its own products and four matrices instead
    assert flops[0] == flops[1] - 3 * 2 * (2 * 32 * 16 + 4 * 16 * 16) + 3 * 32 * 16


# ---------------------------------------------------------------------------------------------------------------------
# Initial weights

def start(**changes):
    torch.manual_seed(3)
    return GPT(GPTConfig(**SMALL | dict(n_layer=3) | changes)).state_dict()


def equal(a, b):
    return {name for name in a.keys() & b.keys() if a[name].shape == b[name].shape and torch.equal(a[name], b[name])}


def test_networks_that_share_a_layer_share_its_start():
    attention, gmlp = start(), start(mixer='gmlp', gmlp_ratio=4.0)
    both = {name for name in attention.keys() & gmlp.keys() if attention[name].shape == gmlp[name].shape}
    assert equal(attention, gmlp) == both and 'transformer.h.2.mlp.c_proj.weight' in both
    # a table does not depend on what is built before it
    narrow = start(mixer='gmlp', gmlp_ratio=4.0, mlp_ratio=2.0, mlp='swiglu')
    tables = {name for name in gmlp if name.endswith('gate.weight')}
    assert len(tables) == 3 and tables <= equal(gmlp, narrow)
    # but on the layer, and on the seed
    assert len({gmlp[name].flatten()[0].item() for name in tables}) == 3
    unet = start(mixer='gmlp', unet_layers=(1,), unet_factor=2, block_size=16)
    levels = [unet[f'transformer.h.{level}.0.attn.gate.weight'] for level in ('down', 'up')]
    assert not torch.equal(*levels)
    torch.manual_seed(3)
    first, second = (GPT(GPTConfig(**SMALL | dict(n_layer=3))).state_dict() for _ in range(2))
    assert equal(first, attention) == set(first)
    assert all(name.endswith('bias') or 'ln_' in name for name in equal(first, second))



def bytes_of(model, B=8, dtype=torch.float32):
    return peak_bytes(model, B, model.config.block_size, dtype, 'cpu')


def test_bytes_of_a_layer():
    """Counted by hand, for each token: what GPT-2's block keeps for the backward pass in bfloat16 on a GPU."""
    B, T, C, H = 4, 64, 32, 4
    def layer(recompute=False, **options):
        models = [network(n_layer=n, n_embd=C, n_head=H, block_size=T, bias=False, recompute=recompute) for n in (2, 6)]
        few, many = (peak_bytes(model, B, T, torch.bfloat16, 'cuda', **options) for model in models)
        return pytest.approx((many - few) / 4 / (B * T), abs=0.1) # attention keeps the state of its random numbers
    copies = 2 * 12 * C * C / (B * T) # of weights
    statistics = 2 * 8 + 4 * H # of two LayerNorms in float32, and of attention
    inputs, outputs = 4 + 4, 2 * (3 + 1 + 4) # of LayerNorm; of the products and of attention, without the residual ones
    elementwise = 2 * (1 + 1 + 4) # LayerNorm's outputs and GELU's
    whole = (inputs + outputs + elementwise) * C + statistics
    assert whole + copies == layer() and whole + copies == layer(compiled=True)
    assert whole == layer(sharded=True)
    assert whole + copies == layer(recompute='cheap') # which needs a compiler
    assert whole - elementwise * C == layer(recompute='cheap', compiled=True)
    assert 4 * C == layer(recompute=True)


def test_bytes_of_the_head():
    """
    Logits in bfloat16 and, where nothing is fused, twice in float32, else their gradient: of one chunk at a time. Beside
    them the weights in bfloat16 and their gradient; compiled, the peak is where a chunk's share of it is computed.
    """
    B, T, C, V = 32, 64, 256, 2 ** 18
    model = network(n_layer=1, n_embd=C, block_size=T, vocab_size=V)
    for compiled, size, beside in (False, 2 + 4 + 4, 2 + 4), (True, 2 + 2, 2 + 4 + 2):
        expected = (size * B * T / 4 + beside * C) * V
        assert peak_bytes(model, B, T, torch.bfloat16, 'cuda', compiled) == pytest.approx(expected, rel=0.03)


def test_bytes_kept_by_attention():
    """A GPU's kernel keeps no weights (H, T, T), of which a CPU keeps one a layer or more in bfloat16."""
    model = network(block_size=512)
    def kept(T, kind):
        return peak_bytes(model, 512 // T, T, torch.bfloat16, kind) # of as many tokens
    assert kept(512, 'cuda') <= kept(64, 'cuda') and kept(512, 'cpu') >= kept(512, 'cuda') + 2 * 2 * 512 * 512
    assert bytes_of(network(dropout=0.1)) > bytes_of(network()) # the masks


class Reads(Mixer):
    """Its backward pass reads a number, which the meta device has not."""
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad * float(grad.isfinite().all())

    def mix(self, x):
        return self.Identity.apply(x)


class Calls(Mixer):
    """Attention with arguments by position, or by name, without heads."""
    def mix(self, x):
        q = x[:, None]
        y = F.scaled_dot_product_attention(q, q, q, None, 0.0, True) + F.scaled_dot_product_attention(
            query=q, key=q, value=q, is_causal=True)
        return y[:, 0] + F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_bytes_that_cannot_be_counted(monkeypatch):
    """A network that trains may do what the meta device cannot: no reason to end the run."""
    monkeypatch.setitem(MIXERS, 'reads', Reads)
    monkeypatch.setitem(MIXERS, 'calls', Calls)
    for dtype in torch.float32, torch.bfloat16:
        assert math.isnan(bytes_of(network(mixer='reads'), dtype=dtype)) and cost(network(mixer='reads')) > 0
        assert bytes_of(network(mixer='calls'), dtype=dtype) > 0


def test_bytes_of_a_batch_of_any_size():
    """A mistyped batch_size takes no longer to count."""
    model, B = network(block_size=64), 2 ** 20 // 64
    assert bytes_of(model, 10 ** 12) == pytest.approx(bytes_of(model, B) / B * 10 ** 12)
    assert bytes_of(model, 2 * B) == pytest.approx(2 * bytes_of(model, B))


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('place', ['attention', 'gmlp', 'full', 'unet'])
def test_bytes_of_real_tensors(place, dtype, recompute):
    """A step on a CPU, with its autocast, attention and dropout, has as many bytes alive as one on the meta device."""
    model = network(**PLACES[place], n_embd=64, block_size=64, dropout=0.1, recompute=recompute).train()
    idx, others = tokens(8, 64), list(model.buffers())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        others += [p, p.grad]
    with LiveBytes([idx, *others], fused=False) as live:
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = model(idx, idx)[1]
        loss.backward()
    assert bytes_of(model, dtype=dtype) == pytest.approx(live.peak, rel=0.03)


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc')
def test_bytes_of_the_process():
    """A process takes what is computed, and malloc's gaps and the libraries' own memory on top."""
    code = textwrap.dedent("""
        import re
        from data.machine import Machine
        from model import GPT, GPTConfig, peak_bytes, torch
        def peak(): # ru_maxrss would begin with the peak of pytest
            with open('/proc/self/status') as f:
                return 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', f.read())[1])
        model = GPT(GPTConfig(block_size=256, vocab_size=8192, n_layer=2, n_head=4, n_embd=256))
        expected = peak_bytes(model, 8, 256, torch.float32, 'cpu')
        Machine('cpu', 'float32', peak_flops=1.0).wrap(model, compile=False)
        idx = torch.zeros(8, 256, dtype=torch.long)
        model(idx[:1, :8], idx[:1, :8])[1].backward() # the gradients, and what libraries need
        before = peak()
        model(idx, idx)[1].backward()
        print(expected / (peak() - before))""")
    run = subprocess.run([sys.executable, '-c', code], cwd=pathlib.Path(__file__).parent.parent, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    assert 0.7 < float(run.stdout) < 1.15


@pytest.mark.parametrize('place', ['attention', 'gmlp', 'unet', 'conv', 'values'])
def test_recompute(place):
    """The same loss and gradients, dropout masks and all; less is kept; decoding goes on with its caches."""
    found = []
    for recompute in (False, True):
        model, idx = network(**PLACES[place], dropout=0.3, recompute=recompute).train(), tokens(3, 12)
        torch.manual_seed(5)
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(idx, idx.roll(-1, 1))[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    big = dict(n_layer=8, n_embd=64, block_size=64)
    kept = [bytes_of(network(**PLACES[place] | big, recompute=recompute)) for recompute in (True, False)]
    assert kept[0] < 0.4 * kept[1]
    model.eval()
    assert torch.equal(model.generate(idx, 9, temperature=0.0), naive_generate(model, idx, 9, likeliest))


def test_configure_optimizers():
    model = network(time_weighting='full')
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.8, 0.9), 'cpu')
    decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert len(decays) == sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))
    attn = model.transformer.h[0].attn
    assert decays[id(attn.c_attn.weight)] == decays[id(model.transformer.wpe.weight)] == 0.1
    assert decays[id(attn.weight)] == decays[id(attn.c_attn.bias)] == decays[id(model.transformer.ln_f.weight)] == 0.0
    assert all(group['lr'] == 1e-3 and group['betas'] == (0.8, 0.9) for group in optimizer.param_groups)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def checkpoint_of(model, **more):
    return dict(model=model.state_dict(), model_args=asdict(model.config), **more)


@pytest.mark.parametrize('broken', ['torch.save', 'os.fsync', 'os.replace'])
def test_an_interrupted_save_leaves_the_old_checkpoint(broken, tmp_path, monkeypatch):
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path, checkpoint_of(network(), step=1))
    old = path.read_bytes()

    def interrupted(*args, **kwargs):
        if broken == 'torch.save':
            args[1].write(b'half a checkpoint')
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(broken, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, checkpoint_of(network(), step=2))
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ['ckpt.pt']
    save_checkpoint(path, checkpoint_of(network(), step=2))
    assert load_checkpoint(path)['step'] == 2 and [p.name for p in tmp_path.iterdir()] == ['ckpt.pt']


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path, checkpoint_of(network()))
    whole = path.read_bytes()
    places = []
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if '/data/' in part.filename:
                name, extra = struct.unpack_from('<HH', whole, part.header_offset + 26)
                first = part.header_offset + 30 + name + extra
                places += [first, first + part.file_size // 2, first + part.file_size - 1]
    assert len(places) > 60
    for i, place in enumerate(places[::3] + places[1::9] + places[2::9]):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << i % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='damaged.*checksum'):
            load_checkpoint(path)
    path.write_bytes(whole)
    load_checkpoint(path)


@pytest.mark.parametrize('kept', [0.0, 0.01, 0.5, 0.9, 0.9999])
def test_a_truncated_checkpoint_is_refused(kept, tmp_path):
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path, checkpoint_of(network()))
    path.write_bytes(path.read_bytes()[:int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match='ckpt.pt is damaged or not a checkpoint'):
        load_checkpoint(path)


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return pathlib.Path.touch, (self.victim,)


@pytest.mark.parametrize('legacy', [False, True])
def test_a_malicious_checkpoint_is_not_executed(legacy, tmp_path):
    checkpoint, path = dict(model={}, extra=Malicious(tmp_path / 'executed')), tmp_path / 'ckpt.pt'
    if legacy:
        path.write_bytes(pickle.dumps(checkpoint))
    else:
        torch.save(checkpoint, path)
    with pytest.raises(ValueError, match='damaged or not a checkpoint'):
        load_checkpoint(path)
    assert not (tmp_path / 'executed').exists()
    if not legacy: # it would have been
        torch.load(path, weights_only=False)
        assert (tmp_path / 'executed').exists()


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match='no checkpoint .*nothing.pt'):
        load_checkpoint(tmp_path / 'nothing.pt')
    for content, reason in [([1, 2], 'TypeError: list'), (dict(weights={}), "KeyError: 'model'"),
                            (dict(model=3), "AttributeError: 'int'"), (dict(model={}), "KeyError: 'model_args'")]:
        torch.save(content, tmp_path / 'other.pt')
        with pytest.raises(ValueError, match=f"other.pt is damaged or not a checkpoint .{reason}"):
            load_checkpoint(tmp_path / 'other.pt')


def test_a_checkpoint_of_another_architecture(tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoint = checkpoint_of(network())
    save_checkpoint(path, dict(checkpoint, model_args=checkpoint['model_args'] | dict(n_expert=8, mamba=True)))
    with pytest.raises(ValueError, match='architecture has mamba, n_expert, which'):
        load_model(path)
    save_checkpoint(path, dict(checkpoint, model_args=checkpoint['model_args'] | dict(n_layer=3)))
    with pytest.raises(ValueError, match='the checkpoint lacks parameters .* transformer.h.2.attn.c_attn.weight'):
        load_model(path)


def test_a_checkpoint_grows_only_when_asked(tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoint = checkpoint_of(network())
    del checkpoint['model']['transformer.h.0.attn.c_attn.bias']
    save_checkpoint(path, checkpoint)
    with pytest.raises(ValueError, match='lacks parameters .* transformer.h.0.attn.c_attn.bias'):
        load_model(path)


@pytest.mark.parametrize('place', PLACES)
def test_loading_with_changes(place, tmp_path):
    model = network(**PLACES[place])
    save_checkpoint(tmp_path / 'ckpt.pt', checkpoint_of(model))
    loaded, _ = load_model(tmp_path / 'ckpt.pt', block_size=7, dropout=0.2)
    assert loaded.config == replace(model.config, block_size=7, dropout=0.2)
    assert_same(logits(loaded, tokens(2, 7)), logits(model, tokens(2, 7)))
    assert not any(m.training for m in loaded.modules())
    with pytest.raises(ValueError, match=r'\(2?(, )?12.* for .*13.*block_size'):
        load_model(tmp_path / 'ckpt.pt', block_size=13)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('place', PLACES)
@torch.no_grad()
def test_decoding_float32_weights_under_autocast(place, dtype):
    """As train.py's sample_tokens does; a single sequence, as some kernels are for one row only."""
    model, idx = network(**PLACES[place]), tokens(1, 8)
    window = Window(model)
    expected = logits(model, idx)[:, 3:]
    with torch.autocast('cpu', dtype):
        found = torch.stack([window.next_logits(idx[:, :n]) for n in range(4, 9)], dim=1)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="glibc's malloc only")
def test_freed_memory_is_kept():
    """A tensor of 64 MiB mostly takes the pages that one before it left; without the call always 16,384 new ones."""
    code = textwrap.dedent("""
        import resource, torch
        from model import keep_freed_memory
        keep_freed_memory()
        new_pages = []
        for _ in range(20):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.zeros(2 ** 24)
            new_pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(*new_pages)""")
    run = subprocess.run([sys.executable, '-c', code], cwd=pathlib.Path(__file__).parent.parent, capture_output=True,
                         text=True, check=True)
    new_pages = sorted(map(int, run.stdout.split()))
    assert new_pages[10] < 1000, run.stdout
