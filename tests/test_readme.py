"""What the README and the configs say is what happens."""
import ast
import functools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev

import pytest

import helpers
from data.tokenizers import ByteTokenizer
from helpers import settings_of
from model import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
RESULTS = ROOT / 'tests' / 'results'
TABLES = (RESULTS / 'README.md').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A copy of the project with the README's mixer in a file, as it says."""
    folder = tmp_path_factory.mktemp('copy') / 'project'
    ignored = shutil.ignore_patterns('.git', '__pycache__', 'out*', '*.bin', 'meta.json', 'results')
    shutil.copytree(ROOT, folder, ignore=ignored)
    code = re.search(r'```python\n(from model import.*?)```', README, re.DOTALL)[1]
    (folder / 'config/mixers/moving_average.py').write_text(code, encoding='utf-8')
    return folder


def run(folder, command, *more):
    """A command of the README in the copy -> CompletedProcess with texts."""
    _, script, *args = command.split()
    first = ''
    if script == '-m':
        script, first = Path(pytest.__file__).with_name('__main__.py'), 'import sys; sys.path.insert(0, "")'
        args = args[1:]
    done = helpers.run(folder / script, [*args, *more], cwd=folder, first=first)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def test_the_mixer_of_the_readme_trains_samples_and_is_tested(project):
    section = README[README.index('## Your own mixer'):README.index('## Is it better?')]
    train, sample, test = re.findall(r'^python .*$', section, re.MULTILINE)
    helpers.write_data(project / 'data/python_stdlib', ByteTokenizer()) # in place of its prepare.py
    done = run(project, train, '--max_iters=20', '--eval_interval=20', '--eval_iters=1', '--batch_size=4')
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r'val loss ([\d.]+)', done.stdout)]
    assert losses[-1] < losses[0] - 0.5
    assert len(run(project, sample, '--num_samples=1', '--max_new_tokens=40').stdout) > 40
    done = run(project, test, '-q', '-p', 'no:cacheprovider', '-k', 'not compile')
    assert done.returncode == 0 and re.search(r'(\d+) passed', done.stdout)[1] != '0', done.stdout[-2000:]


def test_a_leaking_mixer_of_ones_own_fails(project):
    model = project / 'config/mixers/moving_average.py'
    source = model.read_text(encoding='utf-8')
    assert 'x.cumsum(dim=1) / count' in source
    model.write_text(source.replace('x.cumsum(dim=1) / count', 'x.mean(dim=1, keepdim=True) + 0 * count + 0 * x'),
                     encoding='utf-8')
    try:
        done = run(project, 'python -m pytest tests/test_mixers.py --mixer=config/mixers/moving_average.py', '-q', '-x',
                   '-p', 'no:cacheprovider')
        assert done.returncode == 1
        assert re.search(r'^E .*changes the logits of position \d', done.stdout, re.MULTILINE), done.stdout[-2000:]
    finally:
        model.write_text(source, encoding='utf-8')


@pytest.mark.parametrize('file', sorted((ROOT / 'config').glob('*.py')), ids=lambda f: f.stem)
def test_every_config_is_one(file):
    config = settings_of(file)
    GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig)})
    assert (ROOT / 'data' / config['dataset'] / 'prepare.py').is_file()


@pytest.mark.parametrize('file', sorted((ROOT / 'config' / 'mixers').glob('*.py')), ids=lambda f: f.stem)
def test_mixers_are_compared_at_equal_parameters(file):
    from model import GPT
    import torch
    config = settings_of(ROOT / 'config' / 'shakespeare_small.py', file)
    with torch.device('meta'):
        model = GPT(GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig)} | dict(vocab_size=65)))
    assert abs(model.get_num_params(False) / 804096 - 1) < 0.015


@functools.cache
def names_assigned(script):
    """The names that a script sets at its top level: its settings are among them."""
    names = set()
    for node in ast.parse((ROOT / script).read_text(encoding='utf-8')).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def commands_of(script):
    """The first words that bench.py or studies.py takes: COMMANDS = dict(name=function, ...) or a dict literal."""
    for node in ast.parse((ROOT / script).read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'COMMANDS':
            value = node.value
            return {k.arg for k in value.keywords} if isinstance(value, ast.Call) else {k.value for k in value.keys}


def commands(text):
    """Each `python SCRIPT ...` of a page, in a block of code or in a line, without the comment behind it."""
    inline = re.findall(r'`(python [^`\n]+)`', text)
    blocks = re.findall(r'^(?:python|torchrun|sbatch) .*', text.replace('\\\n', ' '), re.MULTILINE)
    return [line.split(' #')[0] for line in inline + blocks]


PAGES = {'README.md': README, 'tests/results/README.md': TABLES,
         'data/README.md': (ROOT / 'data' / 'README.md').read_text(encoding='utf-8')}


@pytest.mark.parametrize('page', PAGES)
def test_the_paths_that_a_page_names_exist(page):
    named = set(re.findall(r'(?:config|data|tests)/[\w/]+\.\w+', PAGES[page]))
    assert named
    for path in named:
        assert (ROOT / path.replace('NAME', 'gmlp').replace('moving_average', 'gmlp')).exists(), path
    for target in re.findall(r'\]\((?!https:)([^)]+)\)', PAGES[page]): # links and pictures, from the page's own folder
        path, _, heading = target.partition('#')
        assert ((ROOT / page).parent / path).exists(), target
        if heading:
            text = ((ROOT / page).parent / path).read_text(encoding='utf-8')
            titles = [re.sub(r'[^\w -]', '', title).lower() for title in re.findall(r'^#+ (.*)', text, re.MULTILINE)]
            assert heading in [title.replace(' ', '-') for title in titles], target


@pytest.mark.parametrize('page', PAGES)
def test_each_command_of_a_page_takes_the_settings_it_is_given(page):
    for command in commands(PAGES[page]):
        known = {f.name for f in fields(GPTConfig)} | {'help', 'key', 'mixer'}
        known |= {'standalone', 'nnodes', 'node_rank', 'master_addr', 'master_port', 'nproc_per_node'} # torchrun's
        for script in re.findall(r'[\w/]+\.py', command):
            known |= names_assigned(script.replace('NAME', 'gmlp').replace('moving_average', 'gmlp'))
        if 'compare.py' in command: # it hands train.py's on to every arm
            known |= names_assigned('train.py')
        for name in re.findall(r'--(\w+)', command):
            assert name in known, (command, name)
        measured = re.match(r'python (tests/(?:bench|studies)\.py) (\w+)', command)
        if measured and measured[2] != 'COMMAND':
            assert measured[2] in commands_of(measured[1]), command


@pytest.mark.parametrize('page', PAGES)
def test_settings_named_in_the_text_exist(page):
    words = set(re.findall(r'`--(\w+)', PAGES[page])) - {'help', 'key', 'share', 'all'}
    scripts = 'sample.py', 'tests/bench.py', 'tests/compare.py', 'data/text/prepare.py', 'data/hub/prepare.py'
    known = settings_of().keys() | set().union(*map(names_assigned, scripts))
    assert words and words <= known, words - known


def test_settings_that_are_off_by_default_are():
    off, = re.findall(r'^- Off by default: (.*)', README, re.MULTILINE)
    named = {name: settings_of()[name] for name in re.findall(r'`(\w+)`', off)}
    assert named.pop('optimizer') == 'adamw' and named and not any(named.values())


def test_the_tables_of_the_results_name_every_file():
    for file in RESULTS.iterdir():
        if file.suffix in ('.json', '.png', '.svg'):
            assert file.name in TABLES, file.name


def test_every_mixer_has_its_loss_in_the_table():
    rows, newer = (json.loads((RESULTS / f'mixers-{name}-cpu.json').read_text(encoding='utf-8'))['tables'][0]['rows']
                   for name in ('compared', 'newer'))
    files = {path.stem for path in (ROOT / 'config/mixers').glob('*.py')}
    rows += [row for row in newer if row['arm'] in files - {row['arm'] for row in rows}]
    assert {row['arm'] for row in rows} == files
    losses = dict(re.findall(r'^\| `(\w+)` \|.* \| ([\d.]+) \| [^|]*\|$', README, re.MULTILINE))
    verdicts = dict(re.findall(r'^\| `(\w+)` \|.* \| ([^|]*) \|$', README, re.MULTILINE))
    assert losses == {row['arm']: f"{row['loss']:.3f}" for row in rows}
    for row in rows[1:]:
        told = 'cannot tell: ' * (row['word'] == 'cannot tell')
        assert verdicts[row['arm']] == f"{told}{row['difference']:+.3f} ± {row['half']:.3f}"
    for row in rows:
        config = (ROOT / 'config/mixers' / f"{row['arm']}.py").read_text(encoding='utf-8')
        said = f"after 500 steps at learning rate {row['learning_rate']:.2g} ({row['seeds']} seeds)."
        assert f"Loss {losses[row['arm']]} {said}" in config


@pytest.mark.parametrize('file', [
    'mixers-compared-cpu', 'mixers-python-cpu', 'mixers-seconds-cpu', 'mixers-seconds-python-cpu', 'mixers-newer-cpu',
    'mixers-newer-python-cpu'])
def test_the_tables_of_mixers_are_what_their_runs_say(file):
    rows = json.loads((RESULTS / f'{file}.json').read_text(encoding='utf-8'))['tables'][0]['rows']
    for row in rows:
        told = ' '
        if 'p' in row:
            what = f"{row['difference']:+.3f} ± {row['half']:.3f}"
            told = f" {'cannot tell: ' * (row['word'] == 'cannot tell')}{what} | {row['p']:.2g} "
        said = f"| `{row['arm']}` | {row['learning_rate']:.2g} | {row['loss']:.3f} |{told}| "
        assert said.replace('| | ', '|  |  | ') in TABLES


def test_the_tables_of_the_h200_are_what_its_runs_say():
    section = TABLES[TABLES.index('## On an H200'):TABLES.index('## Computed for an H100')]
    tables = {file: json.loads((RESULTS / f'{file}-h200.json').read_text(encoding='utf-8'))['tables']
              for file in ('train-gpt2', 'train-gpt2-32', 'mixers', 'mixers-weighted', 'profile-gpt2')}
    for B, file in (12, 'train-gpt2'), (32, 'train-gpt2-32'):
        (ours, theirs), = tables[file].values()
        for name, row in ('this project', ours), ('nanoGPT', theirs):
            assert f"| B={B}, {name} | {row['tokens/s']:,.0f} | {row['MFU']:.1%} | {row['ms/step']:,.0f} | " \
                   f"{row['GB']:.2f} |" in section
        middle, low, high = ours['tokens/s to peer']
        assert f"| B={B}, ratio | {middle:.2f} ({low:.2f}-{high:.2f}) | | | {ours['GB to peer'][0]:.2f} | |" in section
    rows = {row['']: row for file in ('mixers-weighted', 'mixers') for rows in tables[file].values() for row in rows}
    assert len(rows) == 14
    for name, row in rows.items():
        ratio = '{:.2f} ({:.2f}-{:.2f})'.format(*row['tokens/s to attention']) if name != 'attention' else ''
        assert f"| {row['M parameters']:.0f} | {row['tokens/s']:,.0f} | {row['MFU']:.1%} | {ratio} |" in section
    ours, theirs = (tables['profile-gpt2'][who]['groups_ms'] for who in ('ours', 'peer'))
    assert all(f'| {ours[name]} | {theirs[name]} |' in section for name in ours)


def test_the_picture_is_what_its_script_draws(tmp_path):
    shutil.copy(RESULTS / 'draw.py', tmp_path)
    subprocess.run([sys.executable, 'draw.py'], cwd=tmp_path, check=True)
    assert (tmp_path / 'architecture.svg').read_bytes() == (RESULTS / 'architecture.svg').read_bytes()


def test_ci_runs_the_commands_of_the_readme():
    block = re.search(r'```sh\n(pip install.*?)```', README, re.DOTALL)[1].splitlines()
    install, test = re.search(r'`(pip install[^`]*pytest[^`]*)`', README)[1].split(' && ')
    lines = (ROOT / '.ci' / 'run').read_text(encoding='utf-8').replace('pip install -q', 'pip install')
    for command in [*block, install, f'{test} --all']:
        assert re.sub(r' --out_dir=\S+', '', command) in lines, command


def packages(file):
    lines = (ROOT / file).read_text(encoding='utf-8').splitlines()
    return {re.match(r'[\w-]+', line)[0] for line in lines if not line.startswith('-r')}


def imported(files):
    """The packages that these Python files import, without Python's own modules and the project's."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split('.')[0])
    own = {'data'} | {file.stem for file in [*ROOT.glob('*.py'), *(ROOT / 'tests').glob('*.py')]}
    return found - set(sys.stdlib_module_names) - own


def test_requirements_hold_what_is_imported():
    user, tests = packages('requirements.txt'), packages('tests/requirements.txt')
    user |= {'huggingface_hub', 'PIL'} # come with datasets and matplotlib
    user |= {'transformers', 'sklearn'} # what an export and pictures ask for, in a line of their own
    scripts = [*ROOT.glob('*.py'), *(ROOT / 'data').rglob('*.py'), *(ROOT / 'config').rglob('*.py')]
    assert not imported(scripts) - user
    assert not imported((ROOT / 'tests').glob('*.py')) - user - tests
    assert (ROOT / 'tests' / 'requirements.txt').read_text(encoding='utf-8').startswith('-r ../requirements.txt')


def losses_of(file):
    """A file of results -> {title of a table: {name of a row: validation losses of its runs}}"""
    tables = json.loads((RESULTS / file).read_text(encoding='utf-8'))['tables']
    return {title: {row['what']: [run['val_curve'][-1][1] if 'val_curve' in run else run['val_loss']
                                  for run in row['raw']] for row in rows} for title, rows in tables.items()}


def section_of(heading):
    return re.search(rf'^##+ {heading}\n(.*?)^##', TABLES, re.MULTILINE | re.DOTALL)[1]


def test_the_table_of_ablations_is_what_its_runs_say():
    rows, = losses_of('ablations-cpu.json').values()
    said = re.findall(r'\| (\d\.\d{3} \(.*\)) \|', section_of('Ablations'))
    assert sorted(said) == sorted(f'{mean(x):.3f} ({min(x):.3f}-{max(x):.3f})' for x in rows.values())


def test_the_table_of_architecture_options_is_what_its_runs_say():
    tables = losses_of('ablations-architecture-cpu.json').values()
    said = re.findall(r'\d\.\d{3}(?= \|)', section_of('Architecture options'))
    assert sorted(said) == sorted(f'{mean(x):.3f}' for rows in tables for x in rows.values())


def test_losses_beside_nanogpt_are_those_of_the_whole_split():
    measured = json.loads((RESULTS / 'nanogpt-whole-split-cpu.json').read_text(encoding='utf-8'))
    for who in 'nanogpt', 'this_project':
        losses = [run['whole_split_val_loss'] for run in measured[who]['runs']]
        half = 4.3027 * stdev(losses) / len(losses)**0.5 # the 97.5% quantile of Student's t with 2 degrees of freedom
        words = f'{mean(losses):.3f} ± {half:.3f}'
        assert words in README and words in TABLES
        assert words in (ROOT / 'config/shakespeare_small.py').read_text(encoding='utf-8')


def test_the_table_of_false_verdicts_is_what_the_simulations_counted():
    (_, rows), *_ = json.loads((RESULTS / 'verdict-cpu.json').read_text(encoding='utf-8'))['tables'].items()
    columns = '5 seeds', '20 seeds', '5 to 20', '5 to 50', '3 to 50', 'as told'
    said = dict(re.findall(r'^\| ([^|]+) \| ((?:[^|]+ \| ){6})', section_of('What a verdict means'), re.MULTILINE))
    for name in {row['arms'] for row in rows}:
        for column, cell in zip(columns, said[name].split(' | ')):
            counts = [100 * row['raw']['wrong'][column] / row['raw']['of'] for row in rows if row['arms'] == name]
            assert [float(x) for x in cell.split(', ')] == pytest.approx(counts, abs=0.051), (name, column)


def test_the_table_of_planted_truths_is_what_the_comparisons_said():
    rows, = json.loads((RESULTS / 'planted-cpu.json').read_text(encoding='utf-8'))['tables'].values()
    said = re.findall(r'^\| [^|]+ \| ([+-]\S+ ± \S+) \| (\d+) \| (\d+) \| (\d+) \|$', section_of('What a verdict means'),
                      re.MULTILINE)
    assert said == [(row['truth'], *(str(row[word]) for word in ('better', 'worse', 'cannot tell'))) for row in rows]
