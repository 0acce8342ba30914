"""The real sample.py as a process of its own, on checkpoints with known answers."""
import copy
import itertools
import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.checkpoints import stored_config
from data.export import save_pretrained
from data.machine import Machine
from data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from helpers import (ENV, JOBS, PROJECT, V, WORDS, Run, flags, job, jobs, likeliest, naive_generate,  # noqa: F401
                     random_model, run, train, tree, well, write_checkpoint, write_data, write_malicious, write_nano,
                     write_nano_data)
from model import (MIXERS, Cache, GPT, GPTConfig, Int8Linear, Mixer, PackedLinear, beam_search, fused_attention, pack,
                   pick, to_int8)

posix = pytest.mark.skipif(os.name != 'posix', reason='needs signals and a pseudo-terminal')

# After each byte comes the next one of this cycle: no byte is in it twice, é and 日 have two and three.
CYCLE = b'ab' + 'é'.encode() + b'c' + '日'.encode() + b'dEND. '
CHARACTERS = ''.join(sorted(set(''.join(WORDS) + 'YouGPT:\n')))
RULE = '\n---------------\n'


def cyclic_model(after_space=CYCLE[0]):
    """A model of bytes that knows which byte follows CYCLE's, and nothing else: one-hot embedding, then permutation."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=257, block_size=32, vocab_size=257, bias=False, tie_weights=False,
                          pos_emb='none', mlp='none'))
    following = dict(zip(CYCLE, CYCLE[1:])) | {ord(' '): after_space, 256: ord('d')}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.wte.weight.copy_(torch.eye(257))
        model.transformer.ln_f.weight.fill_(1)
        for i in range(257):
            model.lm_head.weight[following.get(i, ord('?')), i] = 10
    return model


def follow(text, n, after_space=CYCLE[0]):
    """The n bytes that cyclic_model makes of text's last one."""
    following = dict(zip(CYCLE, CYCLE[1:])) | {ord(' '): after_space, 256: ord('d')}
    out = [text.encode()[-1]]
    for _ in range(n):
        out.append(following.get(out[-1], ord('?')))
    return bytes(out[1:])


def write_cycle(folder, **more):
    write_checkpoint(folder / 'out/ckpt.pt', cyclic_model(**more), meta=ByteTokenizer().meta())


def write_chars(folder, name='ckpt.pt', seed=0, **settings):
    tokenizer = CharTokenizer(CHARACTERS)
    model = random_model(tokenizer.vocab_size, seed, **settings)
    write_checkpoint(folder / 'out' / name, model, meta=tokenizer.meta())
    return model, tokenizer


def sample(folder, text='', **settings):
    """sample.py on the run in folder/out -> (stdout, stderr); it must end well."""
    settings = dict(out_dir=folder / 'out', device='cpu', num_samples=1, temperature=0) | settings
    process = run('sample.py', flags(**settings), cwd=folder, text=text)
    return well(process), process.stderr.decode()


def greedy(model, tokenizer, prompt, n):
    """The n characters after prompt, every one from a forward pass of the whole window."""
    return tokenizer.decode(naive_generate(model, torch.tensor([prompt]), n, likeliest)[0, len(prompt):].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# what is generated

@job
def cycle(folder):
    """Two samples; multi-byte characters, streamed byte by byte; special tokens are not in the cycle yet."""
    write_cycle(folder)
    return folder, sample(folder, start='xa', num_samples=2, max_new_tokens=3 * len(CYCLE))


def test_text_of_bytes(cycle):
    """é and 日 come whole, though their bytes are generated one at a time; both samples are the whole of stdout."""
    expected = follow('xa', 3 * len(CYCLE)).decode()
    assert 'é' in expected and '日' in expected
    assert cycle[1][0] == ('xa' + expected + RULE) * 2


def test_says_where_it_speaks_from(cycle):
    folder, (_, said) = cycle
    assert str(folder / 'out' / 'ckpt.pt') in said and 'step 7' in said and '1.5000' in said and said.count('\n') == 1


@job
def stops(folder):
    """A stop string of three tokens, one of two amid others, and beginnings of stop strings that are none."""
    write_cycle(folder)
    return (sample(folder, start='a', stop='ENDE,END.', max_new_tokens=40),
            sample(folder, start='a', stop='日dX,é!', max_new_tokens=len(CYCLE)))


def test_stop_strings(stops):
    (stopped, _), (whole, _) = stops
    assert stopped == 'abéc日d' + RULE # nothing of the stop string
    assert whole == 'a' + follow('a', len(CYCLE)).decode() + RULE # what only began like one is printed


@job
def special(folder):
    """<|endoftext|> after the space, and d after it."""
    write_cycle(folder, after_space=256)
    settings = dict(start='N', max_new_tokens=8)
    return (sample(folder, **settings), sample(folder, special=True, **settings),
            sample(folder, start='', max_new_tokens=4))


def test_special_tokens(special):
    """They end the text, and are printed if asked for; an empty prompt starts a new text."""
    (hidden, _), (shown, _), (empty, _) = special
    assert hidden == 'ND. ' + RULE
    assert shown == 'ND. <|endoftext|>dEND' + RULE
    assert empty == 'dEND' + RULE


@job
def typed(folder):
    """What stands in the arguments, with a backslash and n for a line end."""
    write_cycle(folder, after_space=ord('\n'))
    settings = dict(max_new_tokens=3)
    return (sample(folder, start=r'x\na', **settings), sample(folder, start=r'x\\na\\', max_new_tokens=1),
            sample(folder, start='D', stop=r'\n', max_new_tokens=9),
            sample(folder, interactive=True, user_prefix=r'\nQ', bot_prefix=r'\na', text='x\n', **settings))


def test_line_ends_that_are_typed(typed):
    line_end, characters, stopped, chatted = (text for text, _ in typed)
    assert line_end == 'x\nabé' + RULE
    assert characters == 'x\\na\\?' + RULE # after any byte that is not in the cycle comes ?
    assert stopped == 'D. ' + RULE
    assert chatted == 'abé\n\n'


@job
def prompts(folder):
    """From a file, longer than the block, and from standard input; tokens and text of a random model."""
    model, tokenizer = write_chars(folder)
    long = 'the cat sat. ' * 3 + '\na dog'
    (folder / 'prompt.txt').write_text(long, encoding='utf-8')
    return (model, tokenizer, long, sample(folder, start='FILE:prompt.txt', max_new_tokens=40),
            sample(folder, start='-', text='où? ', max_new_tokens=40))


def test_prompts_and_greedy(prompts):
    """The same text with a cache as by computing everything anew, beyond the end of the block."""
    model, tokenizer, long, (from_file, _), (from_input, _) = prompts
    assert model.config.block_size == 16
    for prompt, text in (long, from_file), ('où? ', from_input):
        expected = greedy(model, tokenizer, tokenizer.encode(prompt), 40)
        assert len(set(expected)) > 2 # not one character again and again
        assert text == prompt + expected + RULE


@job
def sampled(folder):
    model, tokenizer = write_chars(folder, 'best.pt')
    write_chars(folder, seed=3)
    settings = dict(start='one', max_new_tokens=50, num_samples=2, temperature=1.2)
    kinds = dict(
        one=dict(), same=dict(), seeded=dict(seed=1 - 2 ** 64), top_k=dict(top_k=1), top_p=dict(top_p=1e-6, top_k=None),
        repetition=dict(temperature=0, repetition_penalty=100.0),
        latest=dict(checkpoint='latest', temperature=0, dtype='bfloat16'))
    return model, tokenizer, {name: sample(folder, **settings | kind) for name, kind in kinds.items()}


def test_sampling(sampled):
    model, tokenizer, texts = sampled
    text = {name: said[0] for name, said in texts.items()}
    one, two, rest = text['one'].split(RULE)
    assert one != two and rest == '' and len(one) == len(two) == 53
    assert one.startswith('one') and set(one) <= set(CHARACTERS)
    assert text['same'] == text['one'] != text['seeded']
    expected = ('one' + greedy(model, tokenizer, tokenizer.encode('one'), 50) + RULE) * 2
    assert text['top_k'] == text['top_p'] == expected # one token is left to choose from
    # so large a penalty leaves no token that is in the window, as long as there are others
    start = text['repetition'][:8]
    assert len(set(start)) == 8


def test_best_or_latest(sampled):
    _, _, texts = sampled
    assert 'best.pt' in texts['one'][1] and 'ckpt.pt' in texts['latest'][1]
    assert texts['latest'][0] != texts['top_k'][0]


@job
def sources(folder):
    """A run's folder with and without best.pt, and weights exported with the metadata of their tokenizer."""
    model, tokenizer = write_chars(folder, 'best.pt')
    latest, _ = write_chars(folder, seed=3)
    write_checkpoint(folder / 'short/ckpt.pt', latest, meta=tokenizer.meta())
    save_pretrained(model, folder / 'exported', tokenizer.meta())
    texts = {name: sample(folder, init_from=name, start='one', max_new_tokens=30)
             for name in ('out', 'short', 'exported')}
    return dict(out=model, short=latest, exported=model), tokenizer, texts


def test_sources(sources):
    models, tokenizer, texts = sources
    expected = {name: 'one' + greedy(model, tokenizer, tokenizer.encode('one'), 30) + RULE
                for name, model in models.items()}
    assert {name: text for name, (text, _) in texts.items()} == expected and expected['out'] != expected['short']
    names = dict(out='out/best.pt: step 7', short='short/ckpt.pt: step 7', exported='exported: pretrained')
    assert all(words in texts[name][1] for name, words in names.items())


@job
def nanogpt(folder):
    """nanoGPT's checkpoint, which names its dataset, where meta.pkl has the characters."""
    characters, _ = write_nano_data(folder / 'data')
    model = write_nano(folder / 'out/ckpt.pt', folder / 'data', len(characters))
    said = sample(folder, dataset=folder / 'data', start='one', max_new_tokens=20)
    return model, CharTokenizer(''.join(characters)), said


def test_nanogpt(nanogpt):
    model, tokenizer, (text, said) = nanogpt
    assert text == 'one' + greedy(model.eval(), tokenizer, tokenizer.encode('one'), 20) + RULE
    assert 'step 40' in said and '2.5000' in said


@job
def tiktoken(folder):
    model = random_model(50304, n_layer=1, n_embd=8, n_head=1)
    write_checkpoint(folder / 'out/ckpt.pt', model, meta=dict(tokenizer='tiktoken', encoding='gpt2', vocab_size=50257))
    save_pretrained(model, folder / 'weights')
    save_pretrained(random_model(V), folder / 'exported') # of characters, which nothing says
    settings = dict(start='Tokyo is 東京', max_new_tokens=12)
    return (model, sample(folder, **settings), sample(folder, init_from=folder / 'weights', **settings),
            run('sample.py', flags(init_from='exported', device='cpu'), cwd=folder))


@pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason='needs a vocabulary that is downloaded')
def test_tiktoken(tiktoken):
    model, (text, _), (same, said), refused = tiktoken
    tokenizer = load_tokenizer(dict(tokenizer='tiktoken', encoding='gpt2'))
    prompt = tokenizer.encode('Tokyo is 東京')
    ids = naive_generate(model, torch.tensor([prompt]), 12, lambda out, _: int(out[:50257].argmax()))[0].tolist()
    ids = ids[:ids.index(50256)] if 50256 in ids else ids
    assert text == tokenizer.decode(ids) + RULE
    assert same == text and 'weights' in said
    line = refused.stderr.decode().splitlines()[-1]
    assert refused.returncode == 2 and line.startswith('error: ')
    assert f'exported has {V} ids, and its tokenizer is not known' in line and '--dataset=NAME' in line


def test_a_dataset_of_the_same_name_is_not_asked(tmp_path):
    """What this project's checkpoints do not say was not known, and a folder in data/ may be of other ids."""
    write_checkpoint(tmp_path / 'out/ckpt.pt', random_model(V), config=dict(dataset='/elsewhere/words'))
    refused = run('sample.py', flags(out_dir=tmp_path / 'out', device='cpu'))
    line = refused.stderr.decode().splitlines()[-1]
    assert refused.returncode == 2 and 'its tokenizer is not known' in line and '--dataset=NAME' in line


# ---------------------------------------------------------------------------------------------------------------------
# streaming

@posix
def test_streams(tmp_path):
    """The text comes while it is generated: a few of very many tokens are read. Ctrl-C then ends it quietly."""
    write_cycle(tmp_path)
    args = flags(out_dir=tmp_path / 'out', device='cpu', start='a', temperature=0, max_new_tokens=10 ** 6)
    process = Run('sample.py', args, live=True)
    first = os.read(process.stdout.fileno(), 1 << 16)
    text = first + os.read(process.stdout.fileno(), 200)
    process.kill(signal.SIGINT)
    done = process.wait()
    assert len(first) < 4096 # not a buffer full
    assert text == (b'a' + follow('a', len(text)))[:len(text)]
    assert done.returncode == 130 and b'Traceback' not in done.stderr


@pytest.mark.skipif(os.name != 'posix', reason='needs SIGPIPE')
def test_ends_quietly_with_its_reader(tmp_path):
    """As in sample.py | head -1: by the signal that ends other programs, too."""
    write_cycle(tmp_path)
    args = flags(out_dir=tmp_path / 'out', device='cpu', start='a', temperature=0, max_new_tokens=10 ** 6)
    with subprocess.Popen([sys.executable, str(PROJECT / 'sample.py'), *args], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=ENV) as process:
        assert process.stdout.read(100).startswith(b'ab')
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == -signal.SIGPIPE and said.count('\n') == 1 # where it speaks from


def narrow(script, *args, text=b''):
    """The script on a terminal that knows only cp1252 -> (stdout, stderr)."""
    done = subprocess.run([sys.executable, str(PROJECT / script), *args], env=ENV | dict(PYTHONIOENCODING='cp1252'),
                          input=text, capture_output=True, check=True)
    return done.stdout.decode('cp1252'), done.stderr.decode('cp1252')


def test_a_terminal_that_lacks_characters(tmp_path):
    """They are escaped, of what is sampled and of a path."""
    write_cycle(tmp_path)
    text, _ = narrow('sample.py', *flags(out_dir=tmp_path / 'out', device='cpu', start='xa', num_samples=1,
                                         max_new_tokens=len(CYCLE), temperature=0))
    assert text.splitlines()[0] == 'xabéc\\u65e5dEND. a'
    (tmp_path / 'łódź.txt').write_text('the cat sat. ' * 400, encoding='utf-8')
    text, _ = narrow('data/text/prepare.py', *flags(input=tmp_path / 'łódź.txt', out=tmp_path / 'data'))
    assert '\\u0142ód\\u017a.txt' in text and (tmp_path / 'data/train.bin').exists()


def test_lines_of_a_chat_are_text(tmp_path):
    """One with bytes that are no UTF-8 is refused; a byte order mark and \\r are no part of one; the chat goes on."""
    write_cycle(tmp_path)
    args = flags(out_dir=tmp_path / 'out', device='cpu', temperature=0, max_new_tokens=3, interactive=True,
                 user_prefix='', bot_prefix='')
    done = subprocess.run([sys.executable, str(PROJECT / 'sample.py'), *args], env=ENV, capture_output=True,
                          input='\ufeffa\r\n'.encode() + b'x\xff\n' + b'xD\n', check=True)
    assert done.stdout == b'b' + 'é'.encode() + b'\n. a\n\n'
    said = done.stderr.decode().splitlines()
    assert said[1:] == ['error: the line is not UTF-8 at byte 1: save it as UTF-8, or leave it out']


# ---------------------------------------------------------------------------------------------------------------------
# extremes

def generate(model, n=12, seed=0, **options):
    return model.generate(torch.tensor([[1, 2, 3]]), n, generator=torch.Generator().manual_seed(seed),
                          **options)[0, 3:].tolist()


def test_extremes_mean_what_they_say():
    """Never NaN, whose largest is any token: a division by nearly zero, a product beyond float32, -inf by infinity."""
    model = random_model(V)
    best = generate(model, temperature=0)
    assert len(set(best)) > 2
    for options in [dict(temperature=1e-300), dict(temperature=1e-45), dict(temperature=1e-38), dict(top_p=5e-324),
                    dict(top_p=5e-324, top_k=5)]:
        assert generate(model, **options) == best, options
    assert generate(model, min_p=5e-324) == generate(model)
    for temperature in (1e300, math.inf):
        drawn = generate(model, temperature=temperature, no_repeat_ngram=1) # what is ruled out stays so
        assert len({1, 2, 3, *drawn}) == 3 + 12
    # each token once, as long as there are others
    assert len({1, 2, 3, *generate(model, repetition_penalty=1e300, temperature=0)}) == 3 + 12
    assert generate(model, repetition_penalty=1e-300) == generate(model, repetition_penalty=1e-12)
    model.lm_head.weight.data.zero_() # 0 times infinity
    assert set(generate(model, 50, repetition_penalty=1e300)) <= set(range(V))


@pytest.mark.parametrize('static', [True, False])
def test_memory_as_the_text_grows(static):
    """10 ** 13 tokens are 80 TB, of which a few are read. The context is whole across the places where it grows."""
    model, idx = random_model(V), torch.tensor([[1, 2, 3]] * 2)
    stream = model.stream(idx, 10 ** 13, temperature=0, static=static)
    found = torch.cat([idx, *itertools.islice(stream, 40)], dim=1)
    expected = naive_generate(model, idx, 40, likeliest)
    assert torch.equal(found, expected) and torch.equal(idx, torch.tensor([[1, 2, 3]] * 2))


def diverged():
    model = random_model(V)
    model.transformer.h[1].attn.c_proj.weight.data[0, 0] = math.nan
    return model


def test_a_diverged_model():
    """A token is never drawn from logits that are not finite."""
    logits = torch.tensor([[1.0, math.nan, 0.0], [2.0, math.inf, 0.0], [-math.inf] * 3, [-math.inf, 0.0, -math.inf]])
    for temperature in (0.0, 1.0):
        for options in dict(top_k=None), dict(top_k=2), dict(top_k=2, top_p=0.5):
            drawn = pick(logits, temperature, **dict(top_p=None, min_p=0.1, generator=None) | options)
            assert drawn.flatten().tolist() == [-1, -1, -1, 1]
        for static in (True, False):
            idx = torch.tensor([[1, 2]])
            assert next(diverged().stream(idx, 5, temperature, static=static)).item() == -1
            with pytest.raises(ValueError, match='the model has diverged'):
                diverged().generate(idx, 5, temperature, static=static)
    with pytest.raises(ValueError, match='the model has diverged'):
        beam_search(diverged(), idx, 5)


def test_a_sample_that_cannot_be_drawn_ends_no_run(tmp_path):
    """Training goes on, and ends as it would without one: after max_bad_steps steps that are not finite."""
    write_data(tmp_path / 'data')
    said = train(tmp_path, learning_rate=1e30, min_lr=0.0, warmup_iters=0, sample_tokens=5,
                 sample_prompt='the')
    assert '\ndone     20 steps' in said and 'the logits' not in said


# ---------------------------------------------------------------------------------------------------------------------
# int8

def aligned_nowhere(x):
    """x at addresses that are no multiple of 4 bytes, as a slice of a larger tensor may be."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize('n_in', [16, 48, 8, 21]) # a multiple of what the kernel reads at once, or not
def test_int8_layer(n_in):
    """Weights to half a step of their row; products as in float64, whichever way the number of tokens takes."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(n_in, 13)
    linear.weight.data *= torch.logspace(-3, 3, 13)[:, None]
    linear.weight.data[5] = 0
    layer, exact = Int8Linear(linear), linear.weight.detach().double()
    step = exact.abs().amax(1, keepdim=True) / 127 * 1.004 # bfloat16 has 8 bits
    weight = layer.rows.double() * layer.scale[:, None].double()
    assert ((weight - exact).abs() <= 0.51 * step).all()
    for dtype, n in itertools.product([torch.bfloat16, torch.float32], [1, 3, 8, 9, 40]):
        x = torch.randn(n_in, n).to(dtype).t()[None] # (1, n, n_in), not contiguous
        expected = x.double() @ weight.t() + linear.bias.double()
        for given in x, aligned_nowhere(x):
            y = layer.to(dtype)(given)
            assert y.shape == (1, n, 13) and y.dtype == dtype
            size = x.double().norm() * weight.norm(dim=1) + 1
            assert ((y.detach().double() - expected).abs() / size).max() < 2 ** -7


class Shared(Mixer):
    """Multiplies with torch's Linear, once by its weight alone, and reads its size."""
    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.fc = torch.nn.Linear(config.n_embd, config.n_embd)

    def mix(self, x):
        return self.fc(x) * self.fc.in_features / self.fc.out_features + x @ self.fc.weight.t()


NETWORKS = {
    'tied': dict(), 'untied': dict(tie_weights=False, bias=False, mlp='swiglu'), 'narrow': dict(n_embd=24, n_head=3),
    'unet': dict(unet_layers=(2, 2), n_layer=2, mixer=('attention', 'gmlp')), 'shared': dict(mixer='shared'),
    **{name: dict(mixer=name, pos_emb='none') for name in ('mlp_mixer', 'gmlp', 'container', 'synthesizer')}}


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_int8_network(name, dtype, monkeypatch):
    """Whole texts and token by token: the next token's KL divergence from float64 is below 0.001 nats."""
    monkeypatch.setitem(MIXERS, 'shared', Shared)
    model = random_model(V, std=0.1, **dict(n_embd=64, n_head=4) | NETWORKS[name])
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.fill_(2 if module is model.transformer.ln_f else 1)
    idx, linears = torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(0)), torch.nn.Linear
    layers = sum(isinstance(m, linears) for m in model.modules())
    exact = copy.deepcopy(model).double()(idx)[0].log_softmax(-1)
    assert exact.exp().amax(-1).mean() > 3 / V # it is far from uniform
    to_int8(model)
    model.to(dtype)
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == layers
    assert not any(isinstance(m, linears) for m in model.modules())
    cache = Cache()
    steps = torch.cat([model(token, cache=cache)[0] for token in idx.split(1, dim=1)], dim=1)
    for logits in model(idx)[0], steps:
        log_probs = logits.double().log_softmax(-1)
        assert (exact.exp() * (exact - log_probs)).sum(-1).mean() < 1e-3


@job
def int8(folder):
    """The command line: bytes that only the head tells apart, a random model, beams and a chat."""
    settings = dict(dtype='int8', start='a', max_new_tokens=len(CYCLE))
    write_cycle(folder)
    texts = [sample(folder, **settings)[0], sample(folder, **settings, beams=3, num_samples=4)[0],
             sample(folder, **settings | dict(interactive=True, text='xD\n', bot_prefix='', max_new_tokens=3))[0]]
    model, tokenizer = write_chars(folder)
    return texts, model, tokenizer, sample(folder, **settings | dict(start='one', max_new_tokens=30))[0]


def test_int8(int8):
    (text, beams, chatted), model, tokenizer, drawn = int8
    assert text == beams == 'a' + follow('a', len(CYCLE)).decode() + RULE
    assert chatted == '. a\n\n'
    to_int8(model)
    ids = model.to(Machine('cpu', 'auto').torch_dtype).generate(torch.tensor([tokenizer.encode('one')]), 30, 0)
    assert drawn == tokenizer.decode(ids[0].tolist()) + RULE


# ---------------------------------------------------------------------------------------------------------------------
# packed weights and attention, on a CPU

X86 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')
packs = pytest.mark.skipif(not X86, reason='not packed on this processor')
DTYPES = [torch.float32] + [torch.bfloat16] * (X86 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@packs
@pytest.mark.parametrize('n_in, bias', [(16, True), (21, False)])
@pytest.mark.parametrize('dtype', DTYPES)
@torch.inference_mode()
def test_packed_layer(n_in, bias, dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(n_in, 13, bias=bias).to(dtype)
    layer = PackedLinear(linear)
    assert (layer.weight == linear.weight).all()
    for n in 1, 2, 9, 40:
        x = torch.randn(n_in, n).to(dtype).t()[None] # (1, n, n_in), not contiguous
        expected = x.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0.0)
        for given in x, aligned_nowhere(x), x[0]:
            y = layer(given)
            assert y.shape == (*given.shape[:-1], 13) and y.dtype == dtype
            assert (y.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps


@packs
@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('dtype', DTYPES)
@torch.inference_mode()
def test_packed_network(name, dtype, monkeypatch):
    """Whole texts and token by token, as the network before; only large layers are packed, and none with AMX."""
    monkeypatch.setitem(MIXERS, 'shared', Shared)
    monkeypatch.setattr('model.HAS_AMX', False)
    model = random_model(V, std=0.1, **dict(n_embd=64, n_head=4) | NETWORKS[name]).to(dtype)
    idx = torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(0))
    exact, linears = copy.deepcopy(model).double()(idx)[0].log_softmax(-1), torch.nn.Linear
    sizes = [m.weight.numel() for m in model.modules() if isinstance(m, linears)]
    monkeypatch.setattr(PackedLinear, 'FEWEST', sorted(sizes)[1])
    pack(model)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == sum(n >= sorted(sizes)[1] for n in sizes) > 0
    cache = Cache()
    steps = torch.cat([model(token, cache=cache)[0] for token in idx.split(1, dim=1)], dim=1)
    for logits in model(idx)[0], steps:
        divergence = (exact.exp() * (exact - logits.double().log_softmax(-1))).sum(-1)
        assert divergence.mean() < (1e-3 if dtype == torch.bfloat16 else 1e-9)
    other = random_model(V, n_embd=64, n_head=4)
    monkeypatch.setattr('model.HAS_AMX', True)
    pack(other)
    monkeypatch.setattr('model.HAS_AMX', False)
    pack(other.half())
    assert not any(isinstance(m, PackedLinear) for m in other.modules())


@pytest.mark.parametrize('amx', [False, True])
@torch.inference_mode()
def test_attention_of_one_token(amx, monkeypatch):
    """In bfloat16, by row in float32 where that pays, with masks and rows that broadcast: as in float64."""
    monkeypatch.setattr('model.HAS_AMX', amx)
    torch.manual_seed(0)
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention',
                        lambda q, *args, **options: calls.append((len(q), q.dtype)) or attend(q, *args, **options))
    masks = [None, torch.randn(1, 70).bfloat16(), torch.ones(3, 1, 1, 70).bool()]
    for rows, mask, S, compiling in [*itertools.product([3, 1], masks, [70], [False]), (3, None, 60, False),
                                     (3, None, 70, True)]:
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda compiling=compiling: compiling)
        q, k, v = torch.randn(3, 2, 1, 8).bfloat16(), *torch.randn(2, rows, 2, 80, 8).bfloat16()[:, :, :, :S]
        calls.clear()
        y = fused_attention(q, k, v, mask, 0.0, is_causal=False)
        scores = q.double() @ k.double().mT / math.sqrt(8)
        scores = scores if mask is None or mask.dtype == torch.bool else scores + mask.double()
        assert y.shape == q.shape and y.dtype == torch.bfloat16
        assert (y.double() - scores.softmax(-1) @ v.double()).abs().max() < 0.01
        by_row = rows == 3 and (mask is None or mask.dim() == 2) and S == 70 and not compiling and not amx
        assert calls == ([(1, torch.float32)] * 3 if by_row else [(3, torch.bfloat16)])


@packs
@torch.inference_mode()
def test_layers_that_are_not_replaced(monkeypatch):
    """One whose weights a hook makes anew; a layer that two modules share stays one."""
    monkeypatch.setattr('model.HAS_AMX', False)
    monkeypatch.setattr(PackedLinear, 'FEWEST', 0)
    for replace in pack, to_int8:
        model = random_model(V)
        first, second = (block.mlp for block in list(model.transformer.h)[:2])
        second.c_fc = first.c_fc
        hook = first.c_proj.register_forward_pre_hook(lambda *_: None)
        replace(model)
        assert type(first.c_fc) in (PackedLinear, Int8Linear) and second.c_fc is first.c_fc
        assert isinstance(first.c_proj, torch.nn.Linear) and not isinstance(second.c_proj, torch.nn.Linear)
        hook.remove()


def test_beams_of_any_length():
    """The power that a score is divided by can overflow: refused."""
    model, idx = random_model(V), torch.tensor([[1, 2]])
    for penalty in (1e6, math.inf, -1e6, -math.inf, 31):
        with pytest.raises(ValueError, match=f'length_penalty={penalty} must be from -30 to 30'):
            beam_search(model, idx, 5, length_penalty=penalty)
    assert torch.equal(beam_search(model, idx, 0), idx)
    n = [beam_search(model, idx, 40, beams=8, length_penalty=penalty, eot=0).size(1) for penalty in (-30, 30)]
    assert n[0] < n[1]


# ---------------------------------------------------------------------------------------------------------------------
# chat

@posix
def test_ctrl_c_stops_the_answer_and_keeps_the_chat(tmp_path):
    import pty
    write_cycle(tmp_path)
    args = flags(out_dir=tmp_path / 'out', device='cpu', temperature=0, max_new_tokens=10 ** 6, interactive=True,
                 user_prefix='Q', bot_prefix='a')
    terminal, inside = pty.openpty()
    process = Run('sample.py', args, files=[os.ttyname(inside)] * 3)
    shown, seen = b'', 0

    def read_until(word):
        nonlocal shown, seen
        while word not in shown[seen:]:
            assert select.select([terminal], [], [], 30)[0], (word, shown[-500:])
            shown += os.read(terminal, 4096)
        seen = shown.index(word, seen) + len(word)

    def write(line):
        time.sleep(0.3) # readline shows its prompt before it listens, and what came until then may be lost
        os.write(terminal, line)
    read_until(b'/reset forgets')
    read_until(b'Q')
    for _ in range(2): # the chat goes on after the first one
        write(b'ab\n')
        read_until('日'.encode())
        process.kill(signal.SIGINT)
        read_until(b'(stopped)')
        read_until(b'Q')
    write(b'/help\n')
    read_until(b'Ctrl-D')
    read_until(b'Q')
    time.sleep(0.3)
    process.kill(signal.SIGINT)
    assert process.wait().returncode == 130
    os.close(inside)
    os.close(terminal)
    assert b'Traceback' not in shown


LINES = ['the cat', 'a dog ran', '/reset', 'a dog ran', 'one two §', 'is one two. is one two. is one two?', 'sat']


@job
def chat(folder):
    model, tokenizer = write_chars(folder, block_size=48)
    text = '\n'.join(LINES) + '\n'
    return model, tokenizer, sample(folder, interactive=True, text=text, max_new_tokens=12, user_prefix='\nYou: ',
                                    bot_prefix='\nGPT: ')


def test_chat(chat):
    """Against a history that is kept here: the end of it that leaves room for the answer is the prompt."""
    model, tokenizer, (text, said) = chat
    expected, history, longest = '', '', 0
    for line in LINES:
        if line == '/reset':
            expected, history = expected + '(forgotten)\n', ''
        elif '§' not in line:
            history += '\nYou: ' + line + '\nGPT: '
            longest = max(longest, len(history))
            answer = greedy(model, tokenizer, tokenizer.encode(history)[-(48 - 12):], 12).split('You:')[0].lstrip()
            expected += 'GPT: ' + answer + '\n'
            history += answer.rstrip()
    assert longest > 2 * 48 # the block
    assert text == expected + '\n'
    assert "'§'" in said and said.count('error: ') == 1 # of that line, and the others went on


@job
def prefixes(folder):
    """The cycle: the answer ends where the user's prefix would begin; prefixes and stop strings are settable."""
    write_cycle(folder)
    return sample(folder, interactive=True, user_prefix=' END', bot_prefix='a', max_new_tokens=40, text='x\ny\n'), \
        sample(folder, interactive=True, user_prefix='Q', bot_prefix='a', stop='日', max_new_tokens=40, text='x\n')


def test_chat_prefixes(prefixes):
    (one, _), (two, _) = prefixes
    assert one == 'abéc日d\n' * 2 + '\n'
    assert two == 'abéc\n\n'


# ---------------------------------------------------------------------------------------------------------------------
# mistakes

# name -> (settings, what the message must say)
MISTAKES = {
    'sample: unknown setting': (dict(temprature=1), ['--temprature', 'did you mean --temperature?']),
    'sample: temperature': (dict(temperature=-1), ['temperature=-1', '[0, inf)']),
    'sample: device': (dict(device='cuda:7'), ['cuda:7', '--device=auto']),
    'sample: int8': (dict(dtype='int8', export='new'), ["dtype='int8' is for generation on a CPU, not for export='new'",
                                                        '--dtype=auto']),
    'sample: int8, compiled': (dict(dtype='int8', compile=True), ["not for compile=True", '--dtype=auto']),
    'sample: ngram': (dict(no_repeat_ngram=99), ['no_repeat_ngram=99 must be from 0 to 16']),
    'sample: which checkpoint': (dict(checkpoint='newest'), ["'newest'", 'best', 'latest']),
    'sample: missing': (dict(out_dir='/nowhere/out'), ['nowhere', 'no checkpoint']),
    'sample: missing file': (dict(init_from='nowhere.pt'), ['nowhere.pt', 'no checkpoint']),
    'sample: truncated': (dict(init_from='truncated.pt'), ['truncated.pt', 'damaged']),
    'sample: malicious': (dict(init_from='malicious.pt'), ['malicious.pt', 'not a checkpoint']),
    'sample: damaged best.pt': (dict(out_dir=Path('damaged')), [
        'damaged/best.pt is damaged', 'use another one, here ', 'damaged/ckpt.pt\n']),
    'sample: architecture': (dict(init_from='architecture.pt'), ["architecture has warp, which this model.py lacks\n"]),
    'sample: tokenizer of another vocabulary': (dict(init_from='vocabulary.pt'), [
        f'vocabulary.pt has {V} ids', "'bytes' has 257", '--dataset=NAME']),
    'sample: tokenizer of exported weights': (dict(init_from='exported'), [f'exported has {V} ids', "'bytes' has 257"]),
    'sample: no prompt file': (dict(start='FILE:nowhere.txt'), ['nowhere.txt']),
    'sample: unknown characters': (dict(start='the § cat Ж'), ["'§', 'Ж'", 'bytes']),
    'sample: empty prompt': (dict(start=''), ['empty', 'has no eot, the token that begins a text', '--start']),
    'sample: long name': (dict(init_from='x' * 300), ['name too long', 'x' * 300]),
    'sample: length_penalty': (dict(beams=2, length_penalty=1e6), ['length_penalty=1000000.0', '[-30, 30]']),
    'sample: diverged': (dict(init_from='diverged.pt', start='t'), ['the model has diverged', 'float32']),
    'sample: diverged, beams': (dict(init_from='diverged.pt', start='t', beams=3), ['the model has diverged']),
    'sample: diverged, chat': (dict(init_from='diverged.pt', interactive=True, user_prefix='t', bot_prefix=''),
                               ['the model has diverged']),
}


def mistake(name):
    def work(folder):
        write_chars(folder)
        good = (folder / 'out/ckpt.pt').read_bytes()
        (folder / 'truncated.pt').write_bytes(good[:-700])
        write_malicious(folder / 'malicious.pt')
        (folder / 'damaged').mkdir()
        (folder / 'damaged/ckpt.pt').write_bytes(good)
        (folder / 'damaged/best.pt').write_bytes(good[:-700])
        model = random_model(V)
        write_checkpoint(folder / 'diverged.pt', diverged(), meta=CharTokenizer.from_text(WORDS).meta())
        write_checkpoint(folder / 'vocabulary.pt', model, meta=ByteTokenizer().meta())
        write_checkpoint(folder / 'architecture.pt', model, model_args=stored_config(model.config) | dict(warp=2))
        save_pretrained(model, folder / 'exported', ByteTokenizer().meta())
        before = tree(folder)
        settings = dict(out_dir=Path('out'), device='cpu', start='the cat', num_samples=1) | MISTAKES[name][0]
        settings['out_dir'] = folder / settings['out_dir'] # an absolute path stays what it is
        process = run('sample.py', flags(**settings), cwd=folder, text='the\n')
        return process, before, tree(folder), (folder / 'executed').exists()
    return work


JOBS |= {name: mistake(name) for name in MISTAKES}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistake(name, jobs):  # noqa: F811
    """Status 2, and one line on stderr, after the one that says which checkpoint it is, if it came to that."""
    process, before, after, executed = jobs[name].result()
    said = process.stderr.decode().splitlines()
    assert process.returncode == 2, said
    assert said[-1].startswith('error: '), said
    assert all('best validation loss' in line or 'pretrained' in line for line in said[:-1]), said
    for word in MISTAKES[name][1]:
        assert word in said[-1] + '\n'
    assert process.stdout in (b'', b't') and before == after and not executed
