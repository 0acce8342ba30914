"""
Exported folders, opened by transformers: this project's logits, texts and ids, for every architecture. And folders of
transformers', opened here.
"""
import json
import math
import os
import re
import warnings
from pathlib import Path

import pytest
import torch

from data.checkpoints import load_model, load_weights, save_checkpoint, stored_config
from data.export import as_fast, export
from data.tokenizers import EOT, ByteTokenizer, CharTokenizer, JsonTokenizer, TiktokenTokenizer
from helpers import (PROJECT, V, assert_same, corpus, flags, random_model, run, settings_of, well, write_checkpoint,
                     write_malicious)
from model import MIXERS, GPT, GPTConfig

transformers = pytest.importorskip('transformers')
CHARACTERS = CharTokenizer.from_text([corpus()])
ENDING = CharTokenizer.from_text([corpus()], eot=True)
for file in sorted((PROJECT / 'config/mixers').glob('*.py')):
    settings_of(file)
OWN = ['gated_delta', 'linear_attention']
ARCHITECTURES = {mixer: dict(mixer=mixer) for mixer in [*MIXERS][:5] + OWN} | {
    'plain': dict(bias=True), 'rope': dict(pos_emb='rope', qk_norm=True), 'relative': dict(pos_emb='relative'),
    'unet': dict(unet_layers=(1, 1)), 'hybrid': dict(mixer=('gated_delta', 'attention'), attention_window=5),
    'weights': dict(time_weighting='full', time_mixing=0.5), 'untied': dict(tie_weights=False, mlp='swiglu'),
    'no positions': dict(mixer='gated_delta', pos_emb='none'), 'rezero': dict(rezero=True, mixer='gmlp')}


def opened(folder):
    with warnings.catch_warnings():
        warnings.simplefilter('error') # such as weights that are missing
        return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_architecture(tmp_path, name):
    """The same logits, with and without a cache, and the same greedy text; beams find what ours find."""
    model = random_model(V, std=0.2, **ARCHITECTURES[name])
    with_code, deviation = export(model, CHARACTERS, tmp_path / 'folder')
    assert with_code == (name not in ('plain', 'attention')) and deviation < 1e-5
    other = opened(tmp_path / 'folder')
    idx = torch.randint(V, (2, 9))
    with torch.no_grad():
        assert (other(input_ids=idx).logits - model(idx)[0]).abs().max() < 1e-5
        loss = other(input_ids=idx, labels=idx).loss
        assert abs(loss - model(idx[:, :-1], idx[:, 1:])[1]) < 1e-5
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
                   attention_mask=torch.ones_like(idx))
    expected = model.generate(idx, 6, temperature=0)
    assert torch.equal(other.generate(idx, **options), expected)
    assert torch.equal(other.generate(idx, use_cache=False, **options), expected)
    if with_code:
        out = other(input_ids=idx[:, :4], use_cache=True)
        rest = other(input_ids=idx[:, 4:], past_key_values=out.past_key_values, use_cache=True)
        assert (torch.cat([out.logits, rest.logits], 1) - model(idx)[0]).abs().max() < 1e-5
        assert rest.past_key_values.cache.n_bytes() > 0
    with_beams, without = (other.generate(idx, num_beams=3, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(with_beams, without)


@pytest.mark.parametrize('args', [dict(), dict(mixer='gmlp')], ids=str)
def test_bfloat16(tmp_path, args):
    """Weights of 16 bits go out as they are, and the check does not take their rounding for a mistake."""
    model = random_model(V, std=0.2, **args).bfloat16()
    export(model, CHARACTERS, tmp_path / 'folder')
    other = opened(tmp_path / 'folder').float()
    idx = torch.randint(V, (2, 9))
    assert (other(input_ids=idx).logits - model.float()(idx)[0]).abs().max() < 1e-5


def test_generate_stops_at_the_end_and_losses_are_means(tmp_path):
    for name, mixer in ('plain', 'attention'), ('code', 'gmlp'):
        export(random_model(V + 1, mixer=mixer), ENDING, tmp_path / name)
        other = opened(tmp_path / name)
        assert other.generation_config.eos_token_id == ENDING.eot == other.config.eos_token_id
    assert other.accepts_loss_kwargs is False # or transformers' Trainer would not divide by the accumulation steps


def test_a_cache_and_gradients(tmp_path):
    """recompute runs blocks again without a cache: with one it must not."""
    model = random_model(V, mixer='gmlp', recompute=True)
    export(model, CHARACTERS, tmp_path / 'folder')
    other, idx = opened(tmp_path / 'folder'), torch.randint(V, (2, 9))
    out = other(input_ids=idx[:, :4], use_cache=True)
    rest = other(input_ids=idx[:, 4:], past_key_values=out.past_key_values)
    assert (rest.logits - model(idx)[0][:, 4:]).abs().max() < 1e-5


def test_nothing_half_done(tmp_path, monkeypatch):
    monkeypatch.setattr('data.export.check', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(random_model(V, mixer='gmlp'), CHARACTERS, tmp_path / 'folder')
    assert not list(tmp_path.iterdir())


def test_saved_again_by_transformers(tmp_path):
    model = random_model(V, pos_emb='rope', qk_norm=True)
    export(model, CHARACTERS, tmp_path / 'one')
    opened(tmp_path / 'one').save_pretrained(tmp_path / 'two')
    idx = torch.randint(V, (2, 9))
    assert (opened(tmp_path / 'two')(input_ids=idx).logits - model(idx)[0]).abs().max() < 1e-5


def test_padding(tmp_path):
    model = random_model(V, mixer='gmlp')
    export(model, CHARACTERS, tmp_path / 'folder')
    other, idx, mask = opened(tmp_path / 'folder'), torch.randint(V, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    logits = other(input_ids=idx, attention_mask=mask).logits
    assert torch.equal(logits[0, :6], model(idx)[0][0, :6])
    with pytest.raises(ValueError, match='padding on the left'):
        other(input_ids=idx, attention_mask=mask.flip(1))


TOKENIZERS = {'bytes': ByteTokenizer, 'char': lambda: CharTokenizer.from_text([corpus()], eot=True),
              'trained': lambda: JsonTokenizer.train([corpus()], 300)}
if 'TIKTOKEN_CACHE_DIR' in os.environ:
    TOKENIZERS['gpt2'] = lambda: TiktokenTokenizer('gpt2')


@pytest.mark.parametrize('name', TOKENIZERS)
def test_tokenizers(tmp_path, name):
    """AutoTokenizer gives the same ids, and the text again."""
    tokenizer = TOKENIZERS[name]()
    model = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=4, vocab_size=tokenizer.vocab_size, rezero=True))
    export(model.eval(), tokenizer, tmp_path / 'folder')
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / 'folder')
    texts = ['the cat sat. a dog ran', corpus()[:500], ' ', 'été où?', f'one{EOT}two']
    texts += ['naïve 数据 👍🏽\n\n    x\t', "it's 1234 'quoted'"] if name != 'char' else []
    for text in texts:
        ids = fast(text)['input_ids']
        assert ids == tokenizer.encode(text)
        assert fast.decode(ids) == text
    assert fast.eos_token_id == tokenizer.eot and as_fast(tokenizer).get_vocab_size() == tokenizer.vocab_size


def test_a_tokenizer_with_a_gap():
    """As cl100k_base, whose special tokens do not follow at once."""
    tiktoken = pytest.importorskip('tiktoken')
    tokenizer = object.__new__(TiktokenTokenizer)
    tokenizer.encoding = tiktoken.Encoding('gap', pat_str=r'\w+|\W', special_tokens={EOT: 260, '<|other|>': 258},
                                           mergeable_ranks={bytes([i]): i for i in range(256)} | {b'th': 256})
    tokenizer.name, tokenizer.vocab_size, tokenizer.eot = 'gap', 261, 260
    fast = as_fast(tokenizer)
    assert fast.encode(f'the{EOT}é').ids == [256, ord('e'), 260, 0xc3, 0xa9]
    assert fast.encode('<|other|>').ids == tokenizer.encode_ordinary('<|other|>')


def test_a_tokenizer_that_adds_tokens(tmp_path):
    """What its tokenizer.json would put around a text, or cut off, training never saw."""
    parts = json.loads(JsonTokenizer.train([corpus()], 300).json)
    eot = {'id': EOT, 'ids': [0], 'tokens': [EOT]}
    parts['post_processor'] = {'type': 'TemplateProcessing', 'special_tokens': {EOT: eot},
                               'single': [{'SpecialToken': {'id': EOT, 'type_id': 0}},
                                          {'Sequence': {'id': 'A', 'type_id': 0}}],
                               'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}]}
    tokenizer = JsonTokenizer(json.dumps(parts))
    assert tokenizer.parts['post_processor'] and as_fast(tokenizer).encode('the cat').ids == tokenizer.encode('the cat')


@pytest.mark.long('imports transformers three times')
def test_from_the_command_line(tmp_path):
    """An idea's file goes with its code; a folder with something in it stays as it is."""
    idea = (PROJECT / 'config/mixers/gated_delta.py').read_text().replace('class GatedDelta', 'class MyIdea')
    (tmp_path / 'idea.py').write_text(idea.replace("'gated_delta'", 'MyIdea').replace('mixer = MyIdea', '') +
                                      '\nmixer = MyIdea\n')
    settings_of(tmp_path / 'idea.py')
    model = random_model(V + 1, mixer='my_idea', pos_emb='none')
    write_checkpoint(tmp_path / 'out/ckpt.pt', model, meta=ENDING.meta())
    args = [str(tmp_path / 'idea.py'), *flags(out_dir=tmp_path / 'out', export=tmp_path / 'folder')]
    text = well(run('sample.py', args))
    assert 'with its code; transformers\' logits differ by at most' in text and 'trust_remote_code=True' in text
    assert f'lm_eval --model hf --model_args pretrained={tmp_path / "folder"},trust_remote_code=True' in text
    idx = torch.randint(V, (2, 9))
    assert (opened(tmp_path / 'folder')(input_ids=idx).logits - model(idx)[0]).abs().max() < 1e-5
    before = {path: path.read_bytes() for path in Path(tmp_path / 'folder').rglob('*') if path.is_file()}
    assert not [name for name in before if name.name.startswith('mixer_') and name.name != 'mixer_idea.py']
    done = run('sample.py', args)
    assert done.returncode == 2 and 'is not empty: name a new folder' in done.stderr.decode()
    assert before == {path: path.read_bytes() for path in Path(tmp_path / 'folder').rglob('*') if path.is_file()}
    assert json.loads((tmp_path / 'folder/config.json').read_text())['gpt']['mixer'] == 'my_idea'


@pytest.mark.long('a harness')
def test_in_the_harness_that_everybody_quotes(tmp_path):
    """lm-evaluation-harness on tasks of local files: its answers and bits per byte are this project's."""
    lm_eval = pytest.importorskip('lm_eval')
    tokenizer = CharTokenizer.from_text([corpus()], eot=True)
    model = random_model(tokenizer.vocab_size, mixer='gated_delta', pos_emb='none', block_size=64)
    export(model, tokenizer, tmp_path / 'folder')
    texts = [corpus()[i:i + 40] for i in range(0, 400, 50)]
    (tmp_path / 'data.json').write_text('\n'.join(json.dumps(dict(
        text=text, start=text[:30], choices=[text[30:35], text[35:40]], answer=i % 2)) for i, text in enumerate(texts)))
    common = dict(dataset_path='json', dataset_kwargs=dict(data_files=str(tmp_path / 'data.json')), test_split='train')
    rolling = common | dict(task='local_bits', output_type='loglikelihood_rolling', doc_to_text='',
                            doc_to_target='{{text}}', metric_list=[dict(metric='bits_per_byte')])
    choice = common | dict(task='local_choice', output_type='multiple_choice', doc_to_text='{{start}}',
                           doc_to_choice='{{choices}}', doc_to_target='{{answer}}', target_delimiter='',
                           metric_list=[dict(metric='acc')])
    found = lm_eval.simple_evaluate('hf', f'pretrained={tmp_path / "folder"},trust_remote_code=True,dtype=float32',
                                    tasks=[rolling, choice], device='cpu', bootstrap_iters=0)['results']

    def log_probability(text, after):
        ids = [*after, *tokenizer.encode(text)]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(1)
        return log_probs[torch.arange(len(ids) - 1), ids[1:]][len(after) - 1:].sum().item()
    nats, n_bytes = -sum(log_probability(text, [tokenizer.eot]) for text in texts), len(''.join(texts).encode())
    bits = nats / math.log(2) / n_bytes
    assert found['local_bits']['bits_per_byte,none'] == pytest.approx(bits, rel=1e-4)
    right = [log_probability(text[30:35], tokenizer.encode(text[:30])) > log_probability(
        text[35:40], tokenizer.encode(text[:30])) for text in texts]
    accuracy = sum(r == (i % 2 == 0) for i, r in enumerate(right)) / len(texts)
    assert found['local_choice']['acc,none'] == accuracy and 0 < accuracy < 1


# ---------------------------------------------------------------------------------------------------------------------
# In

def hugging_face_model(**more):
    """transformers' GPT-2 with random weights throughout."""
    config = transformers.GPT2Config(**dict(vocab_size=V, n_positions=12, n_embd=16, n_layer=2, n_head=2) | more)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model


def write_single(model, folder):
    model.save_pretrained(folder)


def write_shards(model, folder):
    model.save_pretrained(folder, max_shard_size='5KB')
    assert len(list(folder.glob('model-*-of-*.safetensors'))) > 2 and not (folder / 'model.safetensors').exists()


def write_bin(model, folder, state=None):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict() if state is None else state, folder / 'pytorch_model.bin')


def write_legacy_bin(model, folder):
    """As torch wrote files before 1.6, and OpenAI's weights still are."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / 'pytorch_model.bin', _use_new_zipfile_serialization=False)


def write_bin_shards(model, folder):
    model.config.save_pretrained(folder)
    state = model.state_dict()
    files = {name: f'pytorch_model-0000{1 + i % 2}-of-00002.bin' for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: v for name, v in state.items() if files[name] == file}, folder / file)
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps(dict(metadata={}, weight_map=files)))


def write_base(model, folder):
    """Of GPT2Model, without a head: the names on the hub."""
    model.transformer.save_pretrained(folder)


def write_head_alone(model, folder):
    """Of two tied matrices only the one that comes first in the alphabet."""
    write_bin(model, folder, {k: v for k, v in model.state_dict().items() if k != 'transformer.wte.weight'})


def write_masks_and_parameters(model, folder):
    """As old checkpoints: causal masks among them, and Parameters for tensors."""
    masks = {f'transformer.h.{i}.attn.bias': torch.ones(1, 1, 12, 12).tril() for i in range(2)}
    masks |= {f'transformer.h.{i}.attn.masked_bias': torch.tensor(-1e4) for i in range(2)}
    write_bin(model, folder, {k: torch.nn.Parameter(v) for k, v in model.state_dict().items()} | masks)


LAYOUTS = [write_single, write_shards, write_bin, write_legacy_bin, write_bin_shards, write_base, write_head_alone,
           write_masks_and_parameters]


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('write', LAYOUTS, ids=lambda write: write.__name__)
def test_layouts(write, tied, tmp_path):
    """Whatever lies in the folder: transformers' logits of it, and sample.py takes it."""
    if write in (write_base, write_head_alone) and not tied:
        pytest.skip('which only a tied model can be')
    other = hugging_face_model(tie_word_embeddings=tied)
    write(other, tmp_path / 'folder')
    model, _ = load_model(tmp_path / 'folder')
    idx = torch.randint(V, (3, 12))
    with torch.no_grad():
        assert (model(idx)[0] - other(input_ids=idx).logits).abs().max() < 1e-5
    assert model.config.tie_weights == tied


@pytest.mark.parametrize('prefix', ['', 'transformer.', 'module.', '_orig_mod.', '_orig_mod.module.',
                                    'module._orig_mod.', 'module.transformer.', '_orig_mod.module.transformer.'])
def test_prefixes_in_any_order(prefix, tmp_path):
    """Of a folder's names and of a checkpoint's, whether or not transformer. stands before them already."""
    other, idx = hugging_face_model(), torch.randint(V, (3, 12))
    with torch.no_grad():
        expected = other(input_ids=idx).logits
    bare = {k.removeprefix('transformer.'): v for k, v in other.state_dict().items()}
    write_bin(other, tmp_path / 'folder', {prefix + k: v for k, v in bare.items()})
    model, _ = load_model(tmp_path / 'folder')
    state = {prefix + k.removeprefix('transformer.'): v for k, v in model.state_dict().items()}
    save_checkpoint(tmp_path / 'ckpt.pt', dict(model=state, model_args=stored_config(model.config)))
    again, _ = load_model(tmp_path / 'ckpt.pt')
    with torch.no_grad():
        assert (model(idx)[0] - expected).abs().max() < 1e-5 and torch.equal(again(idx)[0], model(idx)[0])


def test_blocks_that_were_compiled_one_by_one():
    model = random_model(V)
    state = {re.sub(r'(\.h\.\d+)\.', r'\1._orig_mod.', k): v for k, v in model.state_dict().items()}
    other = GPT(model.config)
    load_weights(other, state)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    with pytest.raises(ValueError, match='the same name but for a prefix'):
        load_weights(other, model.state_dict() | {'module.transformer.ln_f.weight': torch.ones(16)})


# what is done to a folder -> what is said
UNREADABLE = {
    'nothing': (lambda folder: (folder / 'pytorch_model.bin').unlink(),
                'has no model.safetensors or .* but config.json: expected gpt2, .* best.pt or ckpt.pt'),
    'no config': (lambda folder: (folder / 'config.json').unlink(), 'has no config.json, but pytorch_model.bin: '),
    'of TensorFlow': (lambda folder: (folder / 'pytorch_model.bin').rename(folder / 'tf_model.h5'),
                      'but config.json, tf_model.h5: '),
    'a shard is missing': (lambda folder: (folder / 'model.safetensors.index.json').write_text(
        '{"weight_map": {"wte.weight": "../pytorch_model.bin", "x": "model-2.safetensors"}}'),
        'has no model-2.safetensors, but config.json, '),
    'an index of nothing': (lambda folder: (folder / 'model.safetensors.index.json').write_text('[]'),
                            'is not readable as GPT-2 .*TypeError'),
    'damaged': (lambda folder: (folder / 'pytorch_model.bin').write_bytes(b'PK\3\4 and no more'),
                'is not readable as GPT-2'),
    'no tensors': (lambda folder: torch.save(dict(epoch=3), folder / 'pytorch_model.bin'), 'is not readable as GPT-2'),
    'code': (lambda folder: write_malicious(folder / 'pytorch_model.bin'), 'is not readable as GPT-2'),
    'no size': (lambda folder: (folder / 'config.json').write_text('{"model_type": "gpt2", "n_layer": 2}'),
                'config.json lacks n_embd, n_head, n_positions, vocab_size'),
    'a list': (lambda folder: (folder / 'config.json').write_text('[2]'), 'is not readable as GPT-2'),
    'of another kind': (lambda folder: (folder / 'config.json').write_text('{"model_type": "llama"}'),
                        "model_type 'llama', and only 'gpt2'"),
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_what_a_folder_has_is_said(name, tmp_path):
    write_bin(hugging_face_model(), tmp_path)
    change, words = UNREADABLE[name]
    change(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises((ValueError, OSError), match=words) as error:
        load_model(tmp_path)
    assert '\n' not in str(error.value) and sorted(tmp_path.rglob('*')) == before
