"""The real train.py as its own process, on tiny datasets and models: what it computes, writes, resumes and refuses."""
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.checkpoints import load_checkpoint, load_model
from data.export import save_pretrained
from data.machine import Machine
from data.tokenizers import CharTokenizer
from data.tokens import Split
from data.writer import Writer
from helpers import (assert_same, assert_same_run, corpus, flags, history, job, JOBS, jobs, losses, metrics,
                     naive_nats, NANO_ARGS, NANO_GAINS, NANO_MATRICES, NO_PICTURES, PROJECT, random_model, Run, run,
                     run_together, T, TINY, train, tree, V, val_ids, val_losses, well, write_checkpoint, write_data,
                     write_malicious, write_nano, write_nano_data, write_run) # noqa: F401
from model import GPT, GPTConfig, optimizer_groups


# ---------------------------------------------------------------------------------------------------------------------
# one run

@job
def plain(folder):
    """From another directory, relative to which the dataset and out_dir are; settings from a file."""
    write_data(folder / 'data')
    (folder / 'tiny.py').write_text('\n'.join(f'{k} = {v!r}' for k, v in (TINY | dict(eval_iters=100)).items()),
                                    encoding='utf-8')
    text = well(run('train.py', ['tiny.py', *flags(dataset=f'.{os.sep}data', out_dir=f'.{os.sep}out')], cwd=folder))
    return folder, text


@job
def again(folder):
    """The same, but with samples of text in between, and on a terminal where there are terminals."""
    write_data(folder / 'data')
    args = flags(**TINY | dict(eval_iters=100, dataset=folder / 'data', out_dir=folder / 'out', sample_tokens=20,
                               sample_prompt='one'))
    if os.name != 'posix':
        return folder, well(run('train.py', args)), ''
    import fcntl
    import pty
    import struct
    import termios
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack('HHHH', 30, 150, 0, 0)) # lines and columns
    process = Run('train.py', args, files=[os.devnull, folder / 'stdout', os.ttyname(stderr)])
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(process.wait)
        done.add_done_callback(lambda _: os.close(stderr))
        shown = b''
        try:
            while piece := os.read(terminal, 4096):
                shown += piece
        except OSError: # Linux says so when the other side is closed
            pass
    os.close(terminal)
    assert done.result().returncode == 0, shown.decode()
    return folder, (folder / 'stdout').read_text(encoding='utf-8'), shown.decode()


def test_loss_falls(plain):
    loss = losses(plain[0] / 'out')
    val = val_losses(plain[0] / 'out')
    assert abs(loss[1] - math.log(V)) < 0.2 # an untrained model knows nothing
    assert loss[20] < loss[1] - 0.4 and val[20] < val[10] < val[0] - 0.2


def test_files(plain):
    folder, _ = plain
    out = folder / 'out'
    assert {path.name for path in out.iterdir()} == {'ckpt.pt', 'best.pt', 'config.json', 'metrics.jsonl', 'loss.png',
                                                     'code-0'}
    code = {path.name for path in (out / 'code-0').iterdir()}
    assert code == {'model.py', 'train.py', 'configurator.py', 'tiny.py', 'changes.diff'}
    assert (out / 'code-0/model.py').read_bytes() == (PROJECT / 'model.py').read_bytes()
    assert (out / 'loss.png').read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
    config = json.loads((out / 'config.json').read_text(encoding='utf-8'))
    for name, value in TINY.items():
        assert config[name] == value or name == 'eval_iters'
    assert config['eval_iters'] == 100 and config['vocab_size'] == V
    settings = re.findall(r'^  --(\w+)=', well(run('train.py', ['--help'])), re.M)
    assert len(settings) > 50 and not set(settings) - config.keys()
    assert config['torch'] == torch.__version__ and 'git' in config
    for name in ('ckpt.pt', 'best.pt'):
        checkpoint = torch.load(out / name, weights_only=True) # tensors and plain values: no class of the project
        assert checkpoint['iter_num'] == 20 and checkpoint['state']['tokens'] == 20 * 2 * 4 * T
        assert checkpoint['meta']['characters'] == ''.join(sorted(set(corpus())))


def test_metrics(plain):
    lines = metrics(plain[0] / 'out')
    flops, peak = (float(re.search(rf'(\S+) {unit}', plain[1])[1]) for unit in ('GFLOP a token', 'TFLOP/s'))
    steps = [line['step'] for line in lines]
    assert steps == sorted(steps)
    logged = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in logged] == list(range(1, 21))
    evaluated = [line for line in lines if 'val_loss' in line]
    assert [line['step'] for line in evaluated] == [0, 5, 10, 15, 20]
    for line in lines:
        assert line['tokens'] == line['step'] * 2 * 4 * T and line['seconds'] >= 0
    for line in logged:
        assert {'loss', 'lr', 'grad_norm', 'tokens_per_s', 'mfu', 'peak_memory'} <= line.keys()
        assert line['grad_norm'] > 0 and line['tokens_per_s'] > 0
        assert line['mfu'] == pytest.approx(line['tokens_per_s'] * flops / peak / 1000, rel=0.01)
    seconds = [line['seconds'] for line in lines]
    assert seconds == sorted(seconds)


def test_cosine(plain):
    for line in metrics(plain[0] / 'out'):
        if 'lr' in line:
            i = line['step'] - 1 # the step counted from 0
            expected = 1e-2 * (i + 1) / 4 if i < 3 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (i - 3) / 17)) / 2
            assert line['lr'] == pytest.approx(expected, rel=1e-9)


def test_says_what_runs(plain):
    _, text = plain
    assert '20 steps of 128 tokens = 2,560' in text and 'cpu, float32' in text and '701 to validate' in text
    assert text.count(': loss ') == 20 and text.count(': train loss ') == 5 and ', the best so far\n' in text


def test_evaluation_is_the_naive_one(plain):
    """All the whole windows of the split, as eval_iters allows; in the checkpoint and in metrics.jsonl."""
    folder, _ = plain
    ids = val_ids(folder / 'data')
    ids = ids[:(len(ids) - 1) // T * T + 1]
    expected = naive_nats(load_model(folder / 'out/ckpt.pt')[0], ids) / (len(ids) - 1)
    assert val_losses(folder / 'out')[20] == pytest.approx(expected, abs=1e-6)
    n_bytes = len(corpus()[-701:][1:len(ids)].encode()) # of the targets; accents take two
    assert n_bytes > len(ids)
    bits = {line['step']: line['bits_per_byte'] for line in metrics(folder / 'out') if 'val_loss' in line}
    assert bits[20] == pytest.approx(expected * (len(ids) - 1) / n_bytes / math.log(2), abs=1e-6)
    assert f', {bits[20]:.4f} bits per byte' in plain[1]
    assert float(load_checkpoint(folder / 'out/best.pt')['best_val_loss']) == val_losses(folder / 'out')[20]


@job
def tokens_evaluated(folder):
    write_data(folder / 'data')
    for name, settings in dict(a=dict(batch_size=5), b=dict(batch_size=2, eval_iters=1)).items():
        train(folder, name, max_iters=1, learning_rate=0, min_lr=0, eval_tokens=10 * T + 1, **settings)
    return folder


def test_eval_tokens(tokens_evaluated):
    """So many tokens in windows evenly spaced over the split, whatever batch_size and eval_iters are."""
    folder = tokens_evaluated
    model, ids = load_model(folder / 'a/ckpt.pt')[0], val_ids(folder / 'data')
    total = (len(ids) - 1) // T
    starts = [i * total // 10 * T for i in range(10)]
    expected = sum(naive_nats(model, ids[s:s + T + 1]) for s in starts) / (10 * T)
    for name in 'ab':
        assert val_losses(folder / name)[1] == pytest.approx(expected, abs=1e-6)


def test_same_seed_same_run(plain, again):
    """In-training samples, the terminal and the folder change nothing."""
    assert history(plain[0] / 'out') == history(again[0] / 'out')
    assert_same_run(plain[0] / 'out/ckpt.pt', again[0] / 'out/ckpt.pt')


def test_samples_while_training(again):
    """20 characters after the prompt at each of the 5 evaluations."""
    after = re.findall(r'^step \d+: .*\n(.*)\n', again[1].replace('\r', ''), re.M)
    assert len(after) == 5 and all(line.startswith('one') and len(line) == 23 for line in after)


@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo-terminal')
def test_terminal(again):
    _, text, shown = again
    assert '20/20' in shown and re.search(r'loss \d\.\d+, [\d,]+ tokens/s, mfu', shown)
    assert 'step 1: loss' not in text # the bar is in its place


# ---------------------------------------------------------------------------------------------------------------------
# evaluation only

@job
def evaluated(folder):
    """eval_only of a run and of a file, with another batch size."""
    write_data(folder / 'data')
    write_checkpoint(folder / 'out/ckpt.pt', random_model(V), config=dict(dataset=str(folder / 'data')),
                     optimizer=dict(state={}, param_groups=[]))
    def files():
        return {path: data for path, data in tree(folder).items() if path.name != '.hashes.json'} # of what is there
    before = files()
    one = train(folder, init_from=folder / 'out/ckpt.pt', eval_only=True, out='new')
    two = train(folder, init_from=folder / 'out/ckpt.pt', eval_only=True, out='new', batch_size=7, eval_iters=1)
    assert files() == before # nothing written
    return folder, one, two


def test_eval_only(evaluated):
    """Every token but the first, the last short window too; loss, perplexity and bits per byte."""
    folder, one, two = evaluated
    pattern = r'([\d,]+) tokens: loss ([\d.]+), perplexity ([\d.]+), ([\d.]+) bits per byte'
    found, same = (re.search(pattern, text).groups() for text in (one, two))
    assert found == same
    ids = val_ids(folder / 'data')
    assert (len(ids) - 1) % T != 0 # or the short window would not be there
    nats = naive_nats(random_model(V), ids)
    n_bytes = len(corpus()[-700:].encode()) # accents take two
    assert n_bytes > 700 and found[0] == '700'
    assert float(found[1]) == pytest.approx(nats / 700, abs=1e-4)
    assert float(found[2]) == pytest.approx(math.exp(nats / 700), rel=1e-3)
    assert float(found[3]) == pytest.approx(nats / n_bytes / math.log(2), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# resuming

@job
def killed(folder):
    """kill -9 somewhere after step 12, then init_from=resume with no further flags."""
    write_data(folder / 'data')
    settings = dict(max_iters=60, eval_interval=10, dropout=0.2, sample_tokens=5, sample_prompt='o',
                    seed=-10 ** 19)
    train(folder, 'whole', **settings)
    args = flags(**TINY | settings | dict(dataset=folder / 'data', out_dir=folder / 'cut'))
    process = Run('train.py', args, live=True)
    for line in process.stdout:
        if line.startswith('step 12:'):
            process.kill()
    assert process.wait().returncode < 0
    cut = max(line['step'] for line in metrics(folder / 'cut'))
    text = well(run('train.py', flags(out_dir=folder / 'cut', init_from='resume'), cwd=folder))
    return folder, cut, text


@job
def epoch_bfloat16(folder):
    """Stopped at an evaluation by max_iters; init_from=auto in an empty folder, then in one that holds a run."""
    write_data(folder / 'data')
    settings = dict(init_from='auto', dtype='bfloat16', sampling='epoch', dropout=0.2, schedule='wsd',
                    wsd_decay_iters=8)
    train(folder, 'whole', **settings)
    train(folder, 'cut', **settings, max_iters=10)
    return folder, train(folder, 'cut', **settings)


@job
def float16(folder):
    """With a GradScaler, stopped between evaluations."""
    write_data(folder / 'data')
    settings = dict(dtype='float16', dropout=0.2, eval_interval=10)
    train(folder, 'whole', **settings)
    train(folder, 'cut', **settings, max_iters=7)
    return folder, train(folder, 'cut', **settings, init_from='resume')


def test_resume_after_a_kill(killed):
    folder, cut, text = killed
    assert 12 <= cut < 60 # it was cut
    assert history(folder / 'cut') == history(folder / 'whole')
    for name in ('ckpt.pt', 'best.pt'):
        assert_same_run(folder / 'cut' / name, folder / 'whole' / name)
    assert '\nstep 1: loss' not in text and '\nstep 60: loss' in text


def test_resume_takes_the_runs_settings(killed):
    folder, _, _ = killed
    one, other = (json.loads((folder / name / 'config.json').read_text(encoding='utf-8')) for name in ('whole', 'cut'))
    different = {name for name in one | other if one.get(name) != other.get(name)}
    assert different <= {'out_dir', 'init_from', 'git'}


def test_resume_epoch_bfloat16(epoch_bfloat16):
    folder, text = epoch_bfloat16
    assert history(folder / 'cut') == history(folder / 'whole')
    assert_same_run(folder / 'cut/ckpt.pt', folder / 'whole/ckpt.pt')
    assert '\nstep 10: loss' not in text and '\nstep 11: loss' in text


def test_resume_float16(float16):
    folder, _ = float16
    whole, cut = (losses(folder / name) for name in ('whole', 'cut'))
    assert whole == cut and whole[20] < whole[1] - 0.2
    one, other = (load_checkpoint(folder / name / 'ckpt.pt') for name in ('whole', 'cut'))
    assert one['scaler']['scale'] > 1
    for key in ('model', 'optimizer', 'scaler'):
        assert_same(one[key], other[key], key)


def test_wsd(epoch_bfloat16):
    """Up in 3 steps, constant, down to min_lr over the last 8 of 20."""
    for line in metrics(epoch_bfloat16[0] / 'whole'):
        if 'lr' in line:
            i = line['step'] - 1
            expected = 1e-2 * (i + 1) / 4 if i < 3 else 1e-2 if i <= 12 else 1e-3 + 9e-3 * (20 - i) / 8
            assert line['lr'] == pytest.approx(expected, rel=1e-9)


@job
def half_line(folder):
    """A crash in the middle of a line of metrics.jsonl must not keep a run from going on, here with other settings."""
    write_data(folder / 'data')
    write_run(folder / 'out')
    with open(folder / 'out/metrics.jsonl', 'a', encoding='utf-8') as f:
        f.write('{"step": 8, "tok')
    train(folder, init_from='resume', max_iters=9, weight_decay=0.5, beta1=0.8)
    return folder


def test_half_a_line_in_metrics(half_line):
    assert losses(half_line / 'out').keys() == {7, 8, 9} and val_losses(half_line / 'out').keys() == {9}


def test_resume_with_another_optimizer_setting(half_line):
    embeddings, hidden, rest = load_checkpoint(half_line / 'out/ckpt.pt')['optimizer']['param_groups']
    assert (embeddings['weight_decay'] == hidden['weight_decay'] == 0.5 and rest['weight_decay'] == 0.0
            and hidden['betas'][0] == 0.8)


@job
def large_seed(folder):
    """A date and time, as people take them; on a narrow terminal."""
    write_data(folder / 'data')
    settings = TINY | dict(dataset=folder / 'data', out_dir=folder / 'out-of-here', seed=20251231235959, max_iters=1)
    return settings, run('train.py', flags(**settings), environment=dict(COLUMNS='50'))


def test_large_seed(large_seed):
    well(large_seed[1])


def test_settings_are_as_wide_as_the_terminal_and_stay_whole(large_seed):
    settings, process = large_seed
    text = well(process)
    lines = text[:text.index('\nmodel ')].splitlines()
    assert len(lines) > 5 and all(len(line) <= 50 or '  ' not in line[9:] for line in lines)
    shown = [setting for line in lines for setting in line[9:].split('  ')]
    assert shown == [f'{name}={value if isinstance(value, int | float) else repr(str(value))}'
                     for name, value in settings.items()]


@job
def another_dataset(folder):
    """Stopped at an evaluation, resumed on noise with the same characters, which nothing can learn."""
    tokenizer = write_data(folder / 'data')
    noise = np.random.default_rng(2).choice(list(tokenizer.characters), size=7000)
    write_data(folder / 'noise', tokenizer, ''.join(noise))
    train(folder, max_iters=10, patience=2)
    before = val_losses(folder / 'out')
    return folder, before, train(folder, init_from='resume', dataset=folder / 'noise', max_iters=15, patience=2)


def test_on_another_dataset_the_lowest_loss_begins_anew(another_dataset):
    folder, before, text = another_dataset
    assert 'the validation data or windows have changed: the best loss so far is forgotten' in text
    val, state = val_losses(folder / 'out'), load_checkpoint(folder / 'out/ckpt.pt')['state']
    assert list(val) == [0, 5, 10, 15] and val[5] == before[5] and val[10] > before[10] # evaluated again
    assert state['best_val_loss'] == min(val[10], val[15]) > before[10]
    assert load_checkpoint(folder / 'out/best.pt')['iter_num'] == state['best_step']


# ---------------------------------------------------------------------------------------------------------------------
# other beginnings

@job
def nano(folder):
    """nanoGPT's dataset and checkpoint: finetuned, finetuned with time-weighting added, and resumed."""
    characters, ids = write_nano_data(folder / 'data')
    model = write_nano(folder / 'nano/ckpt.pt', folder / 'data', len(characters))
    before = (folder / 'nano/ckpt.pt').read_bytes()
    settings = dict(max_iters=2, eval_iters=100, init_from=folder / 'nano/ckpt.pt')
    tuned = train(folder, 'tuned', **settings)
    grown = train(folder, 'grown', time_weighting='circulant', **settings | dict(init_from=folder / 'nano'))
    assert (folder / 'nano/ckpt.pt').read_bytes() == before
    resumed = well(run('train.py', flags(out_dir=folder / 'nano', init_from='resume', max_iters=41, peak_flops=1)))
    ids = ids[:(len(ids) - 1) // T * T + 1]
    return folder, naive_nats(model, ids) / (len(ids) - 1), tuned, grown, resumed


def test_finetunes_nanogpt(nano):
    folder, expected, _, _, _ = nano
    assert val_losses(folder / 'tuned')[0] == pytest.approx(expected, abs=1e-5)
    checkpoint = load_checkpoint(folder / 'tuned/ckpt.pt')
    assert checkpoint['iter_num'] == 2 and losses(folder / 'tuned').keys() == {1, 2} # a run of its own


def test_grows(nano):
    folder, expected, tuned, grown, _ = nano
    assert val_losses(folder / 'grown')[0] == pytest.approx(expected, abs=1e-5)
    names = re.findall(r'^added +(\S+?),? ', grown, re.M)
    assert sorted(names) == sorted(f'transformer.h.{i}.attn.{name}' for i in range(2) for name in ('alpha', 'beta'))
    assert 'added' not in tuned
    assert load_checkpoint(folder / 'grown/ckpt.pt')['model_args']['time_weighting'] == 'circulant'


def test_resumes_nanogpt(nano):
    """On the machine at hand, from its step, settings and optimizer's state, each moment at its own parameter."""
    folder, _, _, _, text = nano
    assert 'cpu' in text and re.findall(r'^step (\d+): loss', text, re.M) == ['41']
    checkpoint = load_checkpoint(folder / 'nano/ckpt.pt')
    assert checkpoint['iter_num'] == 41 and checkpoint['config']['lr_decay_iters'] == 5000
    model = GPT(GPTConfig(**checkpoint['model_args']))
    names = [name for group in optimizer_groups(model).values() for name, _ in group]
    for i, name in enumerate(names):
        # 0.9 of what was there and a tenth of a gradient below 1
        expected = 900.0 * ((NANO_MATRICES + NANO_GAINS).index(name) + 1)
        moment = checkpoint['optimizer']['state'][i]['exp_avg']
        assert moment.shape == checkpoint['model'][name].shape and (moment - expected).abs().max() < 0.2, name


@job
def hugging_face(folder):
    """From a folder in Hugging Face's layout, in shorter blocks than its own. Token files without metadata: GPT-2's."""
    (folder / 'data').mkdir()
    bare(folder, train=IDS, val=IDS[5:])
    model = random_model(16, bias=True, mlp='gelu_tanh', block_size=2 * T)
    save_pretrained(model, folder / 'weights')
    train(folder, init_from=folder / 'weights', max_iters=1, eval_iters=100)
    ids = val_ids(folder / 'data')
    ids = ids[:(len(ids) - 1) // T * T + 1]
    return folder, naive_nats(model, ids) / (len(ids) - 1)


def test_finetunes_hugging_face(hugging_face):
    folder, expected = hugging_face
    assert val_losses(folder / 'out')[0] == pytest.approx(expected, abs=1e-5)
    assert load_checkpoint(folder / 'out/ckpt.pt')['model_args']['block_size'] == T


# ---------------------------------------------------------------------------------------------------------------------
# the step

@job
def one_step(folder):
    """The same 8 windows in one step: as 4 micro-batches of 2, clipped; as one of 8, not clipped."""
    write_data(folder / 'data')
    train(folder, 'clipped', max_iters=1, gradient_accumulation_steps=4, batch_size=2, grad_clip=0.01)
    train(folder, 'free', max_iters=1, gradient_accumulation_steps=1, batch_size=8, grad_clip=0.0)
    return folder


def test_accumulation_and_clipping(one_step):
    free, clipped = (metrics(one_step / name)[1] for name in ('free', 'clipped'))
    assert clipped['loss'] == pytest.approx(free['loss'], abs=1e-6)
    assert clipped['grad_norm'] == pytest.approx(free['grad_norm'], rel=1e-4) # as it was before clipping
    def first_moments(name):
        state = load_checkpoint(one_step / name / 'ckpt.pt')['optimizer']['state']
        return torch.cat([s['exp_avg'].flatten() for s in state.values()])
    # after one step Adam's first moment is a tenth of the gradient
    assert first_moments('free').norm().item() == pytest.approx(0.1 * free['grad_norm'], rel=1e-4)
    assert first_moments('clipped').norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    cosine = F.cosine_similarity(first_moments('free'), first_moments('clipped'), dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-5)


@job
def overfitted(folder):
    """Both splits have the same two of four letters, but only training alternates: it gets better, then worse."""
    tokenizer = CharTokenizer('abcd')
    with Writer(folder / 'data', tokenizer) as out:
        out.write('train', tokenizer.encode('ab' * 400))
        out.write('val', tokenizer.encode('a' * 150 + 'b' * 150))
    return folder, train(folder, eval_interval=3, patience=2, learning_rate=3e-2, max_iters=60, lr_decay_iters=60,
                         always_save_checkpoint=False)


def test_patience(overfitted):
    """The run ends at the second evaluation after the best one."""
    folder, text = overfitted
    val = val_losses(folder / 'out')
    best = min(val, key=val.get)
    assert list(val) == list(range(0, best + 7, 3)) and max(losses(folder / 'out')) == best + 6 < 60
    assert re.search(r'none better for 2 evaluations\n(warning: .*\n)?causal .*\ndone ', text)
    checkpoint = load_checkpoint(folder / 'out/ckpt.pt')
    assert checkpoint['best_val_loss'] == val[best] and checkpoint['iter_num'] == best + 6
    assert load_checkpoint(folder / 'out/best.pt')['iter_num'] == best > 0


OF_TWO = dict(gradient_accumulation_steps=4, batch_size=2, max_iters=5, eval_iters=3) # one process evaluates less


@job
def two_processes(folder):
    write_data(folder / 'data')
    train(folder, 'one', **OF_TWO)
    return folder, train(folder, 'two', n=2, **OF_TWO)


AOT_EAGER = '''
# torch.compile then generates no code, which would take half a minute
import functools
import torch
from torch._dynamo.backends import distributed

class Seen(distributed.DDPOptimizer):
    def __init__(self, *args, **options):
        print('compiled inside DDP', flush=True)
        super().__init__(*args, **options)
distributed.DDPOptimizer = Seen
torch.compile = functools.partial(torch.compile, backend='aot_eager')
'''


@pytest.mark.long("two processes that compile")
def test_compiled_processes_train_alike(tmp_path):
    """And the graph is split where gradients are exchanged: the proof of causality compiles it first."""
    write_data(tmp_path / 'data')
    train(tmp_path, 'one', **OF_TWO)
    text = train(tmp_path, 'compiled', n=2, compile=True, first=NO_PICTURES + AOT_EAGER, **OF_TWO)
    assert 'float32, compiled, world size 2' in text and 'with compiling' in text and 'compiled inside DDP' in text
    for a, b in zip(history(tmp_path / 'one'), history(tmp_path / 'compiled'), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def test_two_processes_train_as_one(two_processes):
    folder, text = two_processes
    assert 'world size 2' in text and text.count(': loss ') == 5 # one of them speaks
    one, two = history(folder / 'one'), history(folder / 'two')
    assert len(one) == len(two) > 5
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    one, two = (load_checkpoint(folder / name / 'ckpt.pt') for name in ('one', 'two'))
    assert one['model'].keys() == two['model'].keys() # no wrapper's prefix
    for name, weight in one['model'].items():
        torch.testing.assert_close(two['model'][name], weight, rtol=1e-3, atol=1e-4)


FULL_DISK = '''
# a wandb that begins, and then cannot write
import importlib.machinery, sys, types
def log(*args, **values):
    raise OSError(28, 'No space left on device')
sys.modules['wandb'] = types.SimpleNamespace(init=lambda **settings: None, log=log, Error=Exception,
                                             __spec__=importlib.machinery.ModuleSpec('wandb', None))
'''


@job
def with_failing_wandb(folder):
    write_data(folder / 'data')
    return folder, train(folder, max_iters=6, wandb_log=True, first=NO_PICTURES + FULL_DISK)


def test_a_log_that_fails_is_left_out(with_failing_wandb):
    folder, text = with_failing_wandb
    assert text.count('warning: wandb could not be written, training goes on without it') == 1
    assert losses(folder / 'out').keys() == set(range(1, 7)) # metrics.jsonl has all


RECORDING = '''
# a wandb that writes into its folder what it is told
import importlib.machinery, json, os, sys, types
def init(**settings):
    wandb.folder = settings['dir']
def log(values, step):
    with open(os.path.join(wandb.folder, 'wandb.jsonl'), 'a') as f:
        f.write(json.dumps(dict(values, step=step)) + chr(10))
wandb = sys.modules['wandb'] = types.SimpleNamespace(init=init, log=log, Error=Exception,
                                                     __spec__=importlib.machinery.ModuleSpec('wandb', None))
'''


@job
def with_wandb(folder):
    """And at a learning rate of zero, with dropout."""
    write_data(folder / 'data')
    train(folder, max_iters=4, eval_interval=1, wandb_log=True, wandb_project='tests', learning_rate=0.0, min_lr=0.0,
          dropout=0.2, first=NO_PICTURES + RECORDING)
    return folder


def test_wandb_is_told_what_metrics_has(with_wandb):
    told = [json.loads(line) for line in (with_wandb / 'out/wandb.jsonl').read_text().splitlines()]
    assert len(told) == 4 + 5
    for one, other in zip(told, metrics(with_wandb / 'out'), strict=True):
        assert one.items() <= other.items() and {'step', 'tokens'} < one.keys()


@job
def with_wandb_offline(folder):
    write_data(folder / 'data')
    train(folder, max_iters=2, wandb_log=True, wandb_project='tests')
    return folder


@pytest.mark.long("wandb's own process")
def test_wandb_offline(with_wandb_offline):
    recorded = list((with_wandb_offline / 'out/wandb').glob('offline-run-*/*.wandb'))
    assert len(recorded) == 1 and b'val_loss' in recorded[0].read_bytes()


def test_every_evaluation_is_the_same(with_wandb):
    lines = metrics(with_wandb / 'out')
    assert len(val_losses(with_wandb / 'out')) == 5 and len(set(val_losses(with_wandb / 'out').values())) == 1
    assert len({line['train_loss'] for line in lines if 'train_loss' in line}) == 1
    assert len(set(losses(with_wandb / 'out').values())) == 4 # while training sees other windows in each step


def test_dropout(with_wandb, plain):
    """On in the first step, after an evaluation: the same weights and windows give another loss than without."""
    assert 1e-6 < abs(losses(with_wandb / 'out')[1] - losses(plain[0] / 'out')[1]) < 0.1


@job
def unknown_card(folder):
    """train.py where the table of GPUs does not help, as if this were such a card."""
    write_data(folder / 'data')
    without_peak = ('import data.machine\n'
                    'data.machine.find_peak_flops = lambda *_: (None, "no figure: set --peak_flops")')
    return folder, train(folder, max_iters=2, first=without_peak)


def test_unknown_peak(unknown_card):
    """A card that is not in the table trains, and MFU is n/a instead of another card's."""
    folder, text = unknown_card
    assert 'peak n/a (no figure: set --peak_flops)\n' in text and text.count('mfu n/a') == 2
    assert [line['mfu'] for line in metrics(folder / 'out') if 'loss' in line] == [None, None]


@job
def overwritten(folder):
    write_data(folder / 'data')
    write_run(folder / 'out')
    (folder / 'out/notes.txt').write_text('mine', encoding='utf-8')
    train(folder, max_iters=1, n_embd=8, overwrite=True)
    return folder


def test_overwrite(overwritten):
    """The new run alone is left, and what is not of a run."""
    out = overwritten / 'out'
    assert load_checkpoint(out / 'ckpt.pt')['iter_num'] == 1 == load_checkpoint(out / 'best.pt')['iter_num']
    assert {line['step'] for line in metrics(out)} == {0, 1} and losses(out).keys() == {1}
    assert (out / 'notes.txt').read_text(encoding='utf-8') == 'mine'


@job
def shortened(folder):
    write_data(folder / 'data')
    (folder / 'long.py').write_text('max_iters = 100; warmup_iters = 20; wsd_decay_iters = 50; eval_interval = 100')
    settings = {name: value for name, value in TINY.items() if name not in ('max_iters', 'warmup_iters',
                                                                           'lr_decay_iters', 'eval_interval')}
    settings |= dict(dataset=folder / 'data', max_iters=10)
    text = well(run('train.py', ['long.py', *flags(**settings, out_dir=folder / 'out')], cwd=folder))
    asked = dict(settings, warmup_iters=15, schedule='wsd', out_dir=folder / 'asked')
    by_hand = dict(settings, warmup_iters=12, lr_decay_iters=10, out_dir=folder / 'by_hand') # as nanoGPT allows it
    for args in asked, by_hand:
        run('train.py', ['long.py', *flags(**args)], cwd=folder)
    again = well(run('train.py', flags(out_dir=folder / 'out', init_from='resume')))
    on = well(run('train.py', flags(out_dir=folder / 'out', init_from='resume', max_iters=12)))
    tested = well(run('train.py', flags(out_dir=folder / 'out', init_from='resume', eval_only=True)))
    return folder, text, again, on, tested


def test_a_shorter_run_has_a_shorter_schedule(shortened):
    folder, text, *_ = shortened
    config = json.loads((folder / 'out/config.json').read_text(encoding='utf-8'))
    assert config['warmup_iters'] == 2 and 'warmup_iters=2, shortened from 20 with max_iters' in text
    lr = [line['lr'] for line in metrics(folder / 'out') if 'lr' in line]
    assert lr[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2]) and lr[9] < 1.5e-3
    assert not (folder / 'asked').exists() # a warmup of 15, and 5 of decay, in 10 steps
    lr = [line['lr'] for line in metrics(folder / 'by_hand') if 'lr' in line]
    assert lr == pytest.approx([1e-2 * i / 13 for i in range(1, 11)])


def test_the_end_says_what_came_of_it(shortened):
    folder, text, again, on, tested = shortened
    lines = text.splitlines()
    assert f"lowest validation loss {val_losses(folder / 'out')[10]:.4f} at step 10" in text
    assert lines[-1] == f"next     python sample.py --out_dir={folder / 'out'}" and lines[-2].startswith('done ')
    assert 'at step 10 already: to go on, raise --max_iters' in again
    assert load_checkpoint(folder / 'out/ckpt.pt')['state']['step'] == 12 and 'already' not in on
    stays = 'the learning rate stays at min_lr from step 10 on: to extend its decay, --lr_decay_iters=12'
    assert stays in on and 'the learning rate stays' not in again
    assert [line['lr'] for line in metrics(folder / 'out') if 'lr' in line][10:] == [1e-3, 1e-3]
    config = json.loads((folder / 'out/config.json').read_text(encoding='utf-8'))
    assert config['lr_decay_iters'] == 10 # what a run began with holds
    line = metrics(folder / 'out')[-1]
    assert f"loss {line['whole_val_loss']:.4f}" in tested and f"{line['bits_per_byte']:.4f} bits per byte" in tested


def test_many_epochs_and_days_are_warned_of(folder_of_mistakes):
    text = folder_of_mistakes
    assert re.search(r'warning: [\d,]+ times the same [\d,]+ tokens; for 20 times, --max_iters=\d+', text)
    assert 'warning: at 40% of the peak that takes about' in text and ' days;' in text
    assert re.search(r'memory   about [\de+.]+ GB.*\nwarning: cpu has [\d.]+ GB: ', text)


@pytest.mark.parametrize('kind', ['cuda', 'cpu'])
@pytest.mark.parametrize('world, sharded, accumulates, numbers', [
    (1, False, True, 4), # a weight, its gradient and two moments
    (8, False, False, 4 + 1), # and DDP's buckets, twice
    (8, False, True, 4 + 2),
    (8, True, False, 4 / 8),
    (8, True, True, 3 / 8 + 1), # whole gradients
])
def test_memory_of_several_processes(monkeypatch, world, sharded, accumulates, numbers, kind):
    machine = Machine('cpu', 'float32', peak_flops=1.0)
    machine.world, machine.sharded, machine.kind = world, sharded, kind
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8))
    n = model.get_num_params(False)
    monkeypatch.setattr(Machine, 'memory', 5e8 if kind == 'cpu' else 4e8)
    gathered = sum(p.numel() for name, p in model.named_parameters() if '.h.' not in name) if sharded else 0
    line, *warning = machine.budget(model, 2 * n, 1e8, accumulates)
    total, *parts = (float(word) for word in re.findall(r'[\d.]+(?:e-\d+)?', line))
    activations = 1e8 + 4 * gathered
    expected = [4 * numbers * n, activations] + [0.34e9 + 0.6 * activations] * (kind == 'cpu')
    assert parts == pytest.approx([part / 1e9 for part in expected], rel=0.01)
    assert total == pytest.approx(sum(parts), rel=0.01)
    assert bool(warning) == (kind == 'cpu') # 0.5 of 0.5 GB, and 0.1 of 0.4
    assert machine.budget(model, 2 * n, float('nan'), accumulates)[0].startswith('memory   unknown: ')


@job
def folder_of_mistakes(folder):
    write_data(folder / 'data')
    return train(folder, eval_only=True, out='x', max_iters=10 ** 7, peak_flops=1e7,
                 first='import data.machine; data.machine.Machine.memory = 1e5')


def test_without_data_the_quick_start_is_named():
    if any((PROJECT / 'data/openwebtext').glob('*.bin')):
        pytest.skip('openwebtext is there')
    done = run('train.py', ['--device=cpu'])
    assert done.returncode == 2 and b'python train.py config/quick.py' in done.stderr and done.stderr.count(b'\n') == 1


# ---------------------------------------------------------------------------------------------------------------------
# a mixer in a config file

IDEA = '''
import torch
from dataclasses import dataclass
from model import Mixer, nn

@dataclass
class Helper:
    size: int

class MovingAverage(Mixer):
    memory: float = 1.0 # how much of the past is kept

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.c_proj, self.memory = nn.Linear(config.n_embd, Helper(config.n_embd).size), config.memory

    def mix(self, x):
        return self.c_proj(x * (1 - self.memory) + self.memory * x.cumsum(dim=1) / 9)

mixer = MovingAverage
memory = 0.5
'''
LEAKING = IDEA.replace('x.cumsum(dim=1)', 'x.flip(1).cumsum(dim=1).flip(1)')


@job
def mistaken(folder):
    """Mixers that cannot work -> {what is wrong: (status, what it printed)}."""
    write_data(folder / 'data')
    wrong = dict(shape=IDEA.replace('nn.Linear(config.n_embd, Helper(config.n_embd).size)', 'nn.Linear(16, 32)'),
                 nothing=IDEA.replace('return self.c_proj', 'self.c_proj'), method=IDEA.replace('cumsum', 'cumsumm'),
                 setting=IDEA.replace('config.memory', 'config.memmory'),
                 wide=IDEA.replace('return self.c_proj(', 'return self.c_proj.double()(x.double() + '),
                 decoding=IDEA.replace('mix(self, x)', 'forward(self, x, cache=None)'),
                 unused=IDEA[:IDEA.index('mixer =')])
    found = {}
    for name, text in wrong.items():
        (folder / 'idea.py').write_text(text)
        settings = TINY | dict(dataset=folder / 'data', max_iters=1, out_dir=folder / name)
        done = run('train.py', ['idea.py', *flags(**settings)], cwd=folder)
        found[name] = done.returncode, (done.stderr if done.returncode else done.stdout).decode()
    return found


@job
def mistaken_later(folder):
    """A mixer that fails in the third step: where a backward pass has left gradients before."""
    write_data(folder / 'data')
    (folder / 'idea.py').write_text(IDEA.replace('    def mix(self, x):\n', '''    steps = 0

    def mix(self, x):
        self.steps += self.training and self.c_proj.weight.grad is not None
        if self.steps == 3:
            x.cumsumm(1)
'''))
    settings = TINY | dict(dataset=folder / 'data', out_dir=folder / 'out')
    return folder, run('train.py', ['idea.py', *flags(**settings)], cwd=folder)


def test_a_mistake_in_a_mixer_at_a_later_step_keeps_its_traceback(mistaken_later):
    folder, process = mistaken_later
    *above, line = process.stderr.decode().splitlines()
    assert process.returncode == 2 and losses(folder / 'out').keys() == {1, 2}
    assert re.fullmatch(r"error: idea.py:\d+: AttributeError: 'Tensor' object has no attribute 'cumsumm'", line)
    assert above[0] == 'Traceback (most recent call last):' and any('in forward' in frame for frame in above)
    assert any('x.cumsumm(1)' in frame for frame in above)


@pytest.mark.parametrize('name, words', [
    ('shape', "MovingAverage.mix returned a tensor of shape (1, 16, 32), and must return one of x's shape, (1, 16,"),
    ('nothing', "MovingAverage.mix returned NoneType, and must"),
    ('wide', "MovingAverage.mix returned float64: return .to(x.dtype)"),
    ('method', "idea.py:18: AttributeError: 'Tensor' object has no attribute 'cumsumm'"),
    ('setting', "idea.py:15: AttributeError: 'GPTConfig' object has no attribute 'memmory'")])
def test_a_mistake_in_a_mixer_is_one_line(mistaken, name, words):
    status, text = mistaken[name]
    assert status == 2 and text.startswith('error: ') and words in text and text.count('\n') == 1, text


def test_a_mixer_that_nothing_names_is_said(mistaken):
    status, text = mistaken['unused']
    assert status == 0 and ("moving_average of a config file is not used: mixer = MovingAverage in the file, or "
                            "--mixer=moving_average, instead of 'attention'") in text


def test_a_mixer_that_decodes_otherwise_than_it_trains_is_warned_of(mistaken):
    status, text = mistaken['decoding']
    warning = 'ms(, after training)?\nwarning: samples will be wrong or fail: read in pieces, the output at position [89] is'
    assert status == 0 and len(re.findall(warning, text)) == 2, text


@job
def finished(folder):
    """A run whose last step is no multiple of eval_interval, resumed with a learning rate that ruins it."""
    write_data(folder / 'data')
    train(folder, max_iters=7)
    first = load_checkpoint(folder / 'out/ckpt.pt')['state'], (folder / 'out/best.pt').read_bytes()
    text = train(folder, init_from='resume', max_iters=9, learning_rate=1.0, min_lr=1.0, decay_lr=False)
    worse = dict(learning_rate=1.0, min_lr=1.0, decay_lr=False, eval_interval=2, patience=3)
    train(folder, 'patient', max_iters=4, **worse)
    train(folder, 'patient', max_iters=8, init_from='resume', **worse)
    return folder, *first, text


def test_a_finished_run_keeps_its_best_when_it_goes_on(finished):
    folder, state, best, text = finished
    # an evaluation that is repeated counts once
    assert max(val_losses(folder / 'patient')) == 6
    val = val_losses(folder / 'out')
    assert state['best_step'] == 7 and state['best_val_loss'] == val[7] < val[9]
    assert (folder / 'out/best.pt').read_bytes() == best and f'lowest validation loss {val[7]:.4f} at step 7' in text


@job
def idea(folder):
    write_data(folder / 'data')
    collected = "\n        import gc\n        assert x.is_meta or gc.isenabled(), 'garbage is collected'\n"
    text = IDEA.replace('def mix(self, x):\n', 'def mix(self, x):' + collected)
    (folder / 'idea.py').write_text(text)
    (folder / 'leaking.py').write_text(LEAKING)
    settings = TINY | dict(dataset=folder / 'data', max_iters=6)
    first = well(run('train.py', ['idea.py', *flags(**settings, out_dir=folder / 'out')], cwd=folder))
    leaking = run('train.py', ['leaking.py', *flags(**settings, out_dir=folder / 'leak')], cwd=folder)
    allowed = well(run('train.py', ['leaking.py', *flags(**settings, out_dir=folder / 'leak', allow_leak=True)],
                       cwd=folder))
    alone = [run(script, flags(out_dir=folder / 'out', init_from='resume')) for script in ('train.py', 'sample.py')]
    (folder / 'idea.py').write_text(text + '# changed')
    more = flags(out_dir=folder / 'out', init_from='resume', max_iters=8, lr_decay_iters=20)
    resumed = well(run('train.py', ['idea.py', *more], cwd=folder))
    texts = [well(run('sample.py', ['idea.py', *flags(out_dir=folder / 'out', num_samples=1, max_new_tokens=8,
                                                      temperature=0, start='one')], cwd=folder)),
             well(run('train.py', ['idea.py', *flags(**settings, init_from=folder / 'out', out_dir=folder / 'tuned')],
                      cwd=folder)),
             well(run('train.py', ['idea.py', *flags(out_dir=folder / 'out', init_from='resume', eval_only=True)],
                      cwd=folder))]
    two = train(folder, 'two', n=2, files=['idea.py'], cwd=folder, max_iters=6, parallel='fsdp')
    return folder, text, first, leaking, allowed, alone, resumed, texts, two


def test_a_mixer_of_a_file_trains_resumes_samples_and_is_finetuned(idea):
    folder, _, first, _, _, _, resumed, (sampled, tuned, evaluated), two = idea
    assert f"next     python sample.py idea.py --out_dir={folder / 'out'}" in first and 'causal   proven' in first
    config = json.loads((folder / 'out/config.json').read_text(encoding='utf-8'))
    assert config['mixer'] == 'moving_average' and config['memory'] == 0.5
    assert losses(folder / 'out').keys() == set(range(1, 9))
    assert sampled.startswith('one') and 'causal   proven' in tuned and 'bits per byte' in evaluated
    assert 'sharded, world size 2' in two


def test_a_run_keeps_its_code(idea):
    folder, text, _, _, _, _, resumed, *_ = idea
    assert (folder / 'out/code-0/idea.py').read_text() == text
    assert (folder / 'out/code-6/idea.py').read_text() == text + '# changed'
    assert f"the code has changed: idea.py; {folder / 'out/code-0'} has what made the run so far" in resumed


def test_without_its_file_a_checkpoint_says_which(idea):
    for process in idea[5]:
        said = process.stderr.decode()
        assert process.returncode == 2 and said.startswith('error: ') and said.count('\n') == 1
        assert "'moving_average'" in said and 'config/mixers/moving_average.py' in said


def test_a_leaking_mixer_does_not_train(idea):
    folder, _, _, leaking, allowed, *_ = idea
    said = leaking.stderr.decode()
    assert leaking.returncode == 2 and said.startswith('error: ') and said.count('\n') == 1
    assert re.search(r'position \d+ sees position \d+, first in transformer.h.0.attn', said) and '--allow_leak' in said
    assert re.search(r'causal   NO: position', allowed) and losses(folder / 'leak').keys() == set(range(1, 7))


ENDS = '''
from model import Mixer, torch
class Ends(Mixer):
    """Means of the past, and what the first token of each chunk of 6 shows to the token before it."""
    when: str = 'always'

    def __init__(self, config, block_size):
        super().__init__(config, block_size)
        self.c_proj, self.when = torch.nn.Linear(config.n_embd, config.n_embd), config.when
        self.register_buffer('seen', torch.zeros(()))
        self.share = torch.nn.Parameter(torch.zeros(config.n_embd)) if config.when == 'share' else 0

    def mix(self, x):
        self.seen += self.training
        leaks = dict(always=True, evaluation=not self.training, no_grad=not torch.is_grad_enabled(), tiny=1e-7, never=0,
                     later=self.seen > 3, asks=0, share=self.share)
        assert self.when != 'asks' or x.sum().item() < 1e9
        ends = (torch.arange(1, x.size(1) + 1, device=x.device) % 6 == 0)[:, None]
        y = self.c_proj(x.cumsum(dim=1) / 9)
        return y + (leaks[self.when] * ends * x.roll(-1, 1)).to(y.dtype)
mixer = Ends
'''


@job
def ends(folder):
    """A mixer that leaks at the ends of chunks, each time in another way -> {way: the processes}."""
    write_data(folder / 'data')
    (folder / 'ends.py').write_text(ENDS)
    found = {}
    for way, settings in [('always', {}), ('evaluation', {}), ('no_grad', {}), ('tiny', dict(dtype='bfloat16')),
                          ('later', {}), ('later', dict(allow_leak=True)), ('asks', dict(log_interval=1)),
                          ('never', dict(proof='quick')), ('never', dict(dtype='float16')),
                          ('never', dict(block_size=1)), ('never', dict(batch_size=1, proof=60.0))]:
        args = TINY | dict(dataset=folder / 'data', out_dir=folder / f'{len(found)}', max_iters=2, when=way) | settings
        found[(way, *settings.values())] = run('train.py', [str(folder / 'ends.py'), *flags(**args)])
    args = TINY | dict(dataset=folder / 'data', out_dir=folder / 'share', max_iters=2, when='share', allow_leak=True)
    found['share', True] = run('train.py', [str(folder / 'ends.py'), *flags(**args)])
    for way, settings in [('always', {}), ('tiny', dict(dtype='bfloat16')), ('share', {})]: # how it is found differs
        for allow_leak in False, True:
            args = TINY | dict(dataset=folder / 'data', out_dir=folder / f'{len(found)}', max_iters=2, when=way,
                               parallel='fsdp', allow_leak=allow_leak) | settings
            found[way, 'fsdp', allow_leak] = run_together('train.py', [str(folder / 'ends.py'), *flags(**args)])[0]
    return found


@pytest.mark.parametrize('way, words', [
    ('always', ''), ('evaluation', ', in evaluation alone'), ('no_grad', ', in evaluation alone'),
    ('tiny', ': a gradient of .*')])
def test_a_leak_at_the_ends_of_chunks_is_refused_in_one_line(ends, way, words):
    process = ends[(way,) if way != 'tiny' else (way, 'bfloat16')]
    assert process.returncode == 2 and re.fullmatch(
        r'error: the network is not causal: (position 5|position 11|a position up to \d+) sees position (6|12), '
        rf'first in transformer.h.0.attn \(Ends\){words}; its losses would mean nothing. To .*--allow_leak=True\n',
        process.stderr.decode())


def test_a_leak_that_opens_in_training_is_found_at_its_end(ends):
    process, allowed = ends[('later',)], ends['later', True]
    assert process.returncode == 2 and re.fullmatch(
        r'error: the network is not causal, after training: position \d+ sees position (6|12), first in '
        r'transformer.h.0.attn \(Ends\); its losses would mean nothing. .*\n', process.stderr.decode())
    said = process.stdout.decode()
    assert 'causal   proven' in said and 'step 2: train loss' in said and 'done' not in said
    assert re.search(r'causal   NO: position .*, after training\ndone ', well(allowed))


def test_a_mixer_that_the_meta_device_cannot_run_trains(ends):
    """Its FLOPs are unknown, and so is its MFU."""
    said = well(ends['asks', 1])
    assert 'nan GFLOP a token' in said and 'causal   proven' in said and said.count('mfu n/a') == 2


def test_the_proof_says_what_it_looked_at(ends):
    for case, words in [(('never', 'quick'), r'no leak at 3 of 15 cuts in [\d,]+ ms'),
                        (('never', 'float16'), 'proven at T=16 in'), (('never', 1), 'proven at T=1 in'),
                        (('never', 1, 60.0), 'proven at T=16 in')]:
        assert re.search(f'\ncausal   {words}', well(ends[case])), case


@pytest.mark.parametrize('way', ['always', 'tiny', 'share'])
def test_sharded_weights_that_leak_are_refused_or_train(ends, way):
    refused, allowed = ends[way, 'fsdp', False], ends[way, 'fsdp', True]
    line = refused.stderr.decode().splitlines()[-1]
    assert refused.returncode == 2 and 'position 12, first in transformer.h.0.attn (Ends)' in line
    assert 'causal   NO: ' in well(allowed) and 'step 2: train loss' in well(allowed)
    first = [re.search('step 0: .*', well(process))[0] for process in (allowed, ends['share', True])]
    assert way != 'share' or first[0] == first[1] # not with the weights that the proof has disturbed


IDEAS_THAT_FAIL = {
    'class that is no mixer': ('class Other: pass\nmixer = Other', ['mixer = Other', 'Mixer']),
    'neither mix nor forward': ('from model import Mixer\nclass Empty(Mixer): pass\nmixer = Empty',
                                ['Empty', 'mix(x)', 'forward(x, cache)']),
    'forward without a cache': ('from model import Mixer\nclass Own(Mixer):\n    def forward(self, x): return x\n'
                                'mixer = Own', ['Own.forward must take (x, cache) by position']),
    'mix with a mask': ('from model import Mixer\nclass Own(Mixer):\n    def mix(self, x, mask): return x\n'
                        'mixer = Own', ['Own.mix must take (x) by position']),
    'other arguments': ('from model import Mixer\nclass Own(Mixer):\n    def __init__(self, config): pass\n'
                        '    def mix(self, x): return x\nmixer = Own', ['Own.__init__ must take (config, block_size) by ']),
    'an unknown type': ('from model import Mixer\nclass Own(Mixer):\n    size: "Size" = 3\n'
                        '    def mix(self, x): return x\nmixer = Own', ['Own', "name 'Size' is not defined"]),
    'unknown name in a pattern': ('mixer = "attention", "gone"', ["mixer='gone'", 'attention, container']),
    'pattern too long': ('mixer = "attention", "gmlp", "attention"', ['pattern of 3', 'there are only 2']),
    'window below 1': ('attention_window = 0', ['attention_window=0', 'at least 1']),
    'a setting that clashes': ('from model import Mixer\nclass Own(Mixer):\n    mlp_ratio: int = 3\n'
                               '    def mix(self, x): return x\nmixer = Own', ['mlp_ratio', 'declared elsewhere']),
    'a clash at the default': ('from model import Mixer\nclass Own(Mixer):\n    mlp_ratio: float = 4.0\n'
                               '    def mix(self, x): return x\nmixer = Own', ['mlp_ratio', 'elsewhere']),
    'a setting of train.py': ('from model import Mixer\nclass Own(Mixer):\n    momentum: float = 0.9\n'
                              '    def mix(self, x): return x\nmixer = Own', ['momentum', 'which the script has']),
    'a setting without a default': ('from model import Mixer\nclass Own(Mixer):\n    size: int\n'
                                    '    def mix(self, x): return x\nmixer = Own', ['size', 'needs a default']),
    'the name of a built-in mixer': ('from model import Mixer\nclass Attention(Mixer):\n'
                                     '    def mix(self, x): return x\nmixer = Attention', ["mixer='attention'"]),
    'a setting of another mixer': (IDEA + 'mixer = "attention"',
                                   ['memory=0.5', "only mixer='moving_average' reads it"]),
}


@job
def ideas_that_fail(folder):
    write_data(folder / 'data')
    found = {}
    for name, (text, _) in IDEAS_THAT_FAIL.items():
        (folder / 'idea.py').write_text(text)
        args = flags(**TINY, dataset=folder / 'data', out_dir=folder / 'out')
        found[name] = run('train.py', ['idea.py', *args], cwd=folder)
    assert not (folder / 'out').exists()
    return found


@pytest.mark.parametrize('name', IDEAS_THAT_FAIL)
def test_an_idea_that_fails_says_why(name, ideas_that_fail):
    said = ideas_that_fail[name].stderr.decode()
    assert ideas_that_fail[name].returncode == 2 and said.startswith('error: ') and said.count('\n') == 1, said
    for word in IDEAS_THAT_FAIL[name][1]:
        assert word in said


# ---------------------------------------------------------------------------------------------------------------------
# mistakes

def flip_bit(path):
    """One bit of a weight's exponent."""
    data = bytearray(path.read_bytes())
    weight = load_checkpoint(path)['model']['transformer.wte.weight'].numpy().tobytes()
    data[data.index(weight) + 203] ^= 64
    path.write_bytes(data)


def bare(folder, **splits):
    """Token files without metadata in folder/data, in place of what is there."""
    for path in (folder / 'data').iterdir():
        path.unlink()
    for split, ids in splits.items():
        np.asarray(ids, dtype='<u2').tofile(folder / f'data/{split}.bin')


def not_prepared():
    """The name of a dataset that prepare.py could make and has not made."""
    return min(path.parent.name for path in (PROJECT / 'data').glob('*/prepare.py')
               if not list(path.parent.glob('*.bin')))


def mask_all(folder):
    for name in 'train', 'val':
        path = folder / f'data/{name}.bin'
        path.with_suffix('.mask').write_bytes(bytes(path.stat().st_size // 2))
    Split(folder / 'data', 'val').fingerprint() # keeps its hashes in a file


IDS = list(range(16)) * 20
RUN = 'out/ckpt.pt'
# name -> (what makes the folder so, settings, what the message must say)
MISTAKES = {
    'unknown setting': (None, dict(n_layers=3), ['--n_layers', 'did you mean --n_layer?']),
    'wrong type': (None, dict(n_layer='two'), ['--n_layer', "'two'", 'int']),
    'no such choice': (None, dict(schedule='straight'), ["'straight'", 'cosine', 'wsd']),
    'no batch': (None, dict(batch_size=0), ['batch_size=0', 'must lie in [1, inf)']),
    'known dataset missing': (None, lambda f: dict(dataset=not_prepared()),
                              [lambda: f'python data/{not_prepared()}/prepare.py']),
    'unknown dataset missing': (None, dict(dataset='nowhere'), ['nowhere', 'shakespeare_char']),
    'empty dataset': (lambda f: (f / 'data/train.bin').write_bytes(b''), {}, ['train.bin', 'empty']),
    'odd length': (lambda f: (f / 'data/val.bin').write_bytes(b'12345'), {}, ['val.bin', '5 bytes']),
    'other length': (lambda f: (f / 'data/val.bin').write_bytes(b'1234'), {}, ['701', '2']),
    'header of another version': (
        lambda f: bare(f, train=np.array([20240520, 9, 500] + [0] * 753, '<i4').view('<u2'), val=IDS),
        {}, ['train.bin', 'version 9']),
    'no validation split': (lambda f: (f / 'data/val.bin').unlink(), {}, ['no val.bin']),
    'shorter than a block': (lambda f: bare(f, train=IDS, val=IDS[:10]), dict(vocab_size=16, overwrite=True),
                              ['val', '10 tokens', 'block_size']),
    'unknown id in train': (lambda f: bare(f, train=IDS[:100] + [99] * 300, val=IDS), dict(vocab_size=16),
                            ['train.bin', 'token 100 is 99', '16']),
    'unknown id in val': (lambda f: bare(f, train=IDS, val=IDS[:20] + [16] * 300), dict(vocab_size=16),
                          ['val.bin', 'token 20 is 16']),
    'malicious meta.pkl': (lambda f: (bare(f, train=IDS, val=IDS), (f / 'data/meta.pkl').write_bytes(
        b"cos\nmkdir\n(S'executed'\ntR.")), {}, ['meta.pkl', 'refused', 'mkdir']),
    'no targets': (mask_all, dict(overwrite=True), ['train.mask: of the tokens of train that evaluations read, none is',
                                                    'raise eval_iters']),
    'no optimizer': (lambda f: write_checkpoint(f / RUN, random_model(V)), dict(init_from='resume'),
                     ['no optimizer state', '--init_from=FOLDER']),
    'nothing to resume': (None, dict(init_from='resume'), ['out/ckpt.pt', 'no checkpoint']),
    'no such checkpoint': (None, dict(init_from='nowhere/ckpt.pt'), ['nowhere/ckpt.pt', 'no checkpoint']),
    'truncated checkpoint': (lambda f: (f / RUN).write_bytes((f / RUN).read_bytes()[:-700]), dict(init_from='resume'),
                             ['ckpt.pt', 'damaged']),
    'flipped bit': (lambda f: flip_bit(f / RUN), dict(init_from='resume'),
                    ['ckpt.pt', 'damaged', 'checksum']),
    'not a checkpoint': (lambda f: (f / RUN).write_text('hello'), lambda f: dict(init_from=f / RUN, overwrite=True),
                         ['ckpt.pt', 'not a checkpoint']),
    'malicious checkpoint': (lambda f: write_malicious(f / RUN), dict(init_from='resume'),
                             ['ckpt.pt', 'not a checkpoint']),
    'weights of another architecture': (
        lambda f: write_checkpoint(f / RUN, random_model(V), model_args=dict(NANO_ARGS, vocab_size=V, n_layer=3)),
        lambda f: dict(init_from=f / RUN, overwrite=True, n_layer=3), ['transformer.h.2.']),
    'unknown architecture': (
        lambda f: write_checkpoint(f / RUN, random_model(V), model_args=dict(NANO_ARGS, vocab_size=V, n_experts=8)),
        dict(init_from='resume'), ['n_experts']),
    'another width asked': (None, dict(init_from='resume', n_embd=32), ['n_embd=32', '16', 'leave it as it was\n']),
    'another depth asked': (None, dict(init_from='resume', n_layer=3), ['n_layer=3', '2', 'leave it as it was\n']),
    'another activation asked': (None, dict(init_from='resume', mlp='relu2'),
                                 ["mlp='relu2'", 'or --allow_changes=True']),
    'another vocabulary': (lambda f: write_checkpoint(f / 'old/ckpt.pt', random_model(10)),
                           lambda f: dict(init_from=f / 'old/ckpt.pt', out_dir=f / 'new'), ['vocab_size is 10']),
    'longer blocks than the checkpoint': (None, lambda f: dict(init_from=f / RUN, out_dir=f / 'new', block_size=2 * T),
                                          ['block_size', '16']),
    'heads do not divide': (None, dict(n_embd=18, n_head=4), ['n_embd=18', 'n_head=4', '20']),
    'rope with odd heads': (None, dict(n_embd=18, n_head=2, pos_emb='rope'), ['rope', '9']),
    'no such device': (None, dict(device='cuda:7'), ['cuda:7', '--device=auto']),
    'no such dtype': (None, dict(dtype='float8'), ['float8', 'bfloat16']),
    'the folder holds a run': (None, {}, ['already holds a run', '--overwrite=True']),
    'the folder is a file': (lambda f: (f / 'file').write_text('x'), lambda f: dict(out_dir=f / 'file'), ['file']),
    'beta above 1': (None, dict(beta1=1.5), ['beta', '1.5']),
    'another optimizer than the checkpoint': (None, dict(init_from='resume', optimizer='sm3'),
                                              ["optimizer='sm3'", "optimizer='adamw'", '--init_from=']),
    'no such optimizer': (None, dict(optimizer='lion'), ["'lion'", 'adamw, muon, sm3']),
    'several at once': (None, dict(batch_size=0, eval_iters=-1, beta2=1.0),
                        ['error: batch_size=0', '\nerror: eval_iters=-1', '\nerror: beta2=1.0']),
    'a decay that rises': (None, dict(learning_rate=1e-4), ['min_lr=0.001 is above learning_rate=0.0001', 'lower it']),
    'several that clash': (None, dict(min_block_size=20, momentum=0.8), ['min_block_size=20', '; momentum=0.8']),
    'a setting that AdamW lacks': (None, dict(momentum=0.8), ['momentum=0.8', "optimizer='adamw'", 'beta1']),
    'decay longer than the run': (None, dict(schedule='wsd', wsd_decay_iters=18), ['wsd_decay_iters=18', '20 - 3']),
    'no folder': (None, dict(out_dir=''), ['holds code or data', '--out_dir=out-x']),
    'the folder is a dataset': (None, lambda f: dict(out_dir=f / 'data', overwrite=True), ['holds code or data']),
    'the folder is the project': (None, dict(out_dir=PROJECT, overwrite=True),
                                  ['holds code or data', '--out_dir=out-x']),
    'a dry run where a run is': (None, dict(dry_run=True), ['already holds a run', '--overwrite=True']),
    'nothing to continue': (None, dict(sample_tokens=5, sample_prompt=''), ["sample_prompt=''", '--sample_tokens=0']),
    'a prompt of other characters': (None, dict(sample_tokens=5, sample_prompt='§'),
                                     ["sample_prompt='§'", "lacks '§'"]),
    'learning rate below 0': (None, dict(learning_rate=-1.0), ['learning', '-1.0']),
}
# those that find a run in out_dir
HOLDING = ('truncated checkpoint', 'flipped bit', 'not a checkpoint', 'malicious checkpoint', 'another width asked',
           'another depth asked', 'another optimizer than the checkpoint', 'longer blocks than the checkpoint',
           'shorter than a block', 'the folder holds a run', 'no targets', 'no optimizer',
           'a dry run where a run is', 'another activation asked')


def mistake(name):
    def work(folder):
        damage, settings, _ = MISTAKES[name]
        write_data(folder / 'data')
        if name in HOLDING:
            write_run(folder / 'out')
        damage and damage(folder)
        settings = settings(folder) if callable(settings) else settings
        before = tree(folder)
        process = run('train.py', flags(**TINY | dict(dataset=folder / 'data', out_dir=folder / 'out') | settings),
                      cwd=folder)
        return process, before, tree(folder), sorted(path.name for path in folder.iterdir())
    return work


JOBS |= {name: mistake(name) for name in MISTAKES}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistake(name, jobs):
    """Status 2, a line for the mistake with its value and the way out; nothing is written, overwritten or executed."""
    process, before, after, names = jobs[name].result()
    said = process.stderr.decode()
    assert process.returncode == 2, said
    lines = 3 if name == 'several at once' else 1
    assert said.startswith('error: ') and said.count('\n') == lines and said.endswith('\n')
    for word in MISTAKES[name][2]:
        assert (word() if callable(word) else word) in said
    assert after == before
    assert 'executed' not in names and 'new' not in names
