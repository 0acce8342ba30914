"""What the README and the configs say is what happens."""
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from configurator import configure
from model import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A copy of the project with the README's mixer pasted in as it says."""
    folder = tmp_path_factory.mktemp('copy') / 'project'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.git', '__pycache__', 'out*', '*.bin', 'meta.json', 'results'))
    code = re.search(r'```python\n(class MovingAverage.*?)```', README, re.DOTALL)[1]
    entry = re.search(r"add `('moving_average': MovingAverage,)` to `MIXERS`", README)[1]
    model = (folder / 'model.py').read_text(encoding='utf-8')
    model = model.replace('MIXERS = {\n', code + '\n\nMIXERS = {\n    ' + entry + '\n', 1)
    (folder / 'model.py').write_text(model, encoding='utf-8')
    return folder


def run(folder, command, *more):
    done = subprocess.run([sys.executable, *command.split()[1:], *more], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_mixer_of_the_readme_trains_samples_and_is_tested(project):
    section = README[README.index('## Your own mixer'):README.index('## The mixers')]
    train, sample, test = re.findall(r'^python .*$', section, re.MULTILINE)
    run(project, 'python data/python_stdlib/prepare.py')
    out = run(project, train, '--max_iters=20', '--eval_interval=20', '--eval_iters=1', '--batch_size=4')
    losses = [float(loss) for loss in re.findall(r'val loss ([\d.]+)', out)]
    assert losses[-1] < losses[0] - 0.5
    assert len(run(project, sample, '--num_samples=1', '--max_new_tokens=40')) > 40
    assert re.search(r'(\d+) passed', run(project, test, '-q', '-p', 'no:cacheprovider'))[1] != '0'


def test_a_leaking_mixer_of_ones_own_fails(project):
    model = project / 'model.py'
    source = model.read_text(encoding='utf-8')
    assert 'x.cumsum(dim=1) / count' in source
    model.write_text(source.replace('x.cumsum(dim=1) / count', 'x.mean(dim=1, keepdim=True) + 0 * count + 0 * x'),
                     encoding='utf-8')
    try:
        done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', 'tests/test_mixers.py', '-k',
                               'moving_average'], cwd=project, capture_output=True, text=True)
        assert done.returncode == 1 and 'AssertionError' in done.stdout
    finally:
        model.write_text(source, encoding='utf-8')


def settings(*files):
    """What train.py would make of these config files."""
    namespace = {'__file__': str(ROOT / 'train.py'), '__name__': 'train'}
    source = (ROOT / 'train.py').read_text(encoding='utf-8')
    exec(source[source.index('# files and evaluation'):source.index('config, given = configure(')], namespace)
    return configure(namespace, GPTConfig, [str(f) for f in files])[0]


@pytest.mark.parametrize('file', sorted((ROOT / 'config').glob('*.py')), ids=lambda f: f.stem)
def test_every_config_is_one(file):
    config = settings(file)
    GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig)})
    assert (ROOT / 'data' / config['dataset'] / 'prepare.py').is_file()


@pytest.mark.parametrize('file', sorted((ROOT / 'config' / 'mixers').glob('*.py')), ids=lambda f: f.stem)
def test_mixers_are_compared_at_equal_parameters(file):
    from model import GPT
    import torch
    config = settings(ROOT / 'config' / 'shakespeare_small.py', file)
    with torch.device('meta'):
        model = GPT(GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig)} | dict(vocab_size=65)))
    assert abs(model.get_num_params(False) / 804096 - 1) < 0.015


def test_paths_and_settings_that_the_readme_names_exist():
    for path in re.findall(r'(?:config|data|tests)/[\w/]+\.(?:py|json)', README):
        assert (ROOT / path.replace('NAME', 'gmlp')).exists(), path
    known = settings() | dict.fromkeys(['input', 'tokenizer', 'out', 'nproc_per_node', 'standalone', 'start', 'num_samples',
                                        'interactive', 'checkpoint', 'help', 'key', 'NAME', 'upgrade', 'peer', 'iterations', 'seeds'])
    for name in re.findall(r'--(\w+)', README):
        assert name in known, name
