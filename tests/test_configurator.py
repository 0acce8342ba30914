"""configurator.py on small scripts that are written to a temporary folder."""
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
import typing
import warnings

import pytest
import torch
from hypothesis import HealthCheck, example, given as given_, settings as hypothesis_settings, strategies as st

import configurator
from configurator import configure, fail, settings_of
from data.machine import find_peak_flops, resolve

ROOT = os.path.dirname(os.path.abspath(configurator.__file__))

SCRIPT = '''
"""Trains something.

Second paragraph: 50% off {braces}.
"""
import os
from dataclasses import dataclass
from typing import Literal
# ---------------------------------
# input and output
# (files)
out_dir = 'oüüt' # where it all göes, # included
eval_only = False # evaluate and stop
# optimizer
learning_rate = 6e-4 # peak
schedule: Literal['cosine', 'linear'] = 'cosine' # its decay
max_iters = 1000 # steps,
                 # in all
betas = (0.9, 0.95); _after = 1

# chat
top_k: int | None = 200 # None: all
start: str | None = None # prompt
peak_flops: float | str = 'auto' # a number, auto or measure
compile: 'bool | str' = True # or auto
kernels: Literal['auto', 'fast'] | bool = 'auto' # which
limit: float | Literal['auto', 'measure'] = 'auto' # how much
parts: tuple[Literal['a', 'b'], ...] | Literal['none', 'all'] | None = None
shape: int | tuple[int, ...] = 3
stop: tuple[str, ...] = ()
either: bool | int = 2
anything = None
n_layer = 4
_hidden = 1
def helper(): pass
class Helper: pass
module = os
here = os.getcwd
'''
NAMES = ['out_dir', 'eval_only', 'learning_rate', 'schedule', 'max_iters', 'betas', 'top_k', 'start', 'peak_flops',
         'compile', 'kernels', 'limit', 'parts', 'shape', 'stop', 'either', 'anything']


@dataclasses.dataclass
class NetConfig:
    n_layer: float = 12 # blocks
    # shape
    width: int = 64 # channels, é
    levels: tuple[int, ...] = () # blocks at each
                                 # resolution
    mixer: 'str | None' = 'attention'
    mlp: typing.Literal['gelu', 'none'] = 'gelu'
    scales: tuple = (1, 2.5)

    def method(self):
        local = 1
        return local


class Script:
    """A script in a folder of its own, and the ways to run it."""

    def __init__(self, folder, source=SCRIPT):
        self.folder = folder
        self.path = folder / 'script.py'
        self.path.write_text(source.lstrip(), encoding='utf-8')

    def namespace(self):
        namespace = {'__file__': str(self.path), '__name__': 'script'}
        exec(compile(self.path.read_text(encoding='utf-8'), str(self.path), 'exec'), namespace)
        return namespace

    def run(self, *argv, dataclass=None):
        settings = configure(self.namespace(), dataclass, list(argv))
        return settings.config, settings.given

    def file(self, name, text):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding='utf-8')
        return str(path)


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


@pytest.fixture
def mistakes(script, capsys):
    """Runs the script, which must refuse its arguments and change nothing; returns the lines after `error: `."""
    def run(*argv, dataclass=None):
        namespace = script.namespace()
        before = dict(namespace)
        with pytest.raises(SystemExit) as e:
            configure(namespace, dataclass, list(argv))
        out, err = capsys.readouterr()
        assert e.value.code == 2 and out == '' and namespace == before
        lines = err.splitlines()
        assert lines and all(line.startswith('error: ') for line in lines)
        return [line[len('error: '):] for line in lines]
    return run


# what is a setting ---------------------------------------------------------------------------------------------------

def test_settings_are_the_scripts_plain_assignments(script, capsys):
    config, given = script.run()
    assert list(config) == [*NAMES, 'n_layer']
    assert config['betas'] == (0.9, 0.95) and config['top_k'] == 200 and given == {}
    assert capsys.readouterr().out == ''


def test_assignments_below_the_call_are_not_settings(tmp_path):
    source = ('class First:\n    c = 1\nimport configurator\na = 1\n'
              'result = configurator.configure(globals(), argv=[])\nb = 2')
    assert Script(tmp_path, source).namespace()['result'].config == {'a': 1}


def test_what_a_flag_replaces(script):
    path = script.file('conf.py', 'max_iters = 50')
    replaced = configure(script.namespace(), None, [path, '--max_iters=7', '--out_dir=x']).replaced
    assert replaced == {'max_iters': 50, 'out_dir': script.namespace()['out_dir']}


def test_dataclass_fields_are_settings(script):
    config, given = script.run('--width=128', '--levels=5,2', dataclass=NetConfig)
    assert given == {'width': 128, 'levels': (5, 2)}
    assert {'mixer': 'attention', 'scales': (1, 2.5), 'width': 128}.items() <= config.items()
    assert list(config)[-5:] == ['width', 'levels', 'mixer', 'mlp', 'scales']


def test_script_default_wins_and_dataclass_annotation_fills_in(script):
    config, _ = script.run(dataclass=NetConfig)
    assert config['n_layer'] == 4 and type(config['n_layer']) is float # the field is a float
    assert script.run('--n_layer=2.5', dataclass=NetConfig)[0]['n_layer'] == 2.5


def test_dataclass_defined_without_source(script):
    namespace = {}
    exec('from dataclasses import dataclass\n@dataclass\nclass C:\n    extra: int = 1', namespace)
    assert script.run('--extra=2', dataclass=namespace['C'])[0]['extra'] == 2


def test_namespace_gets_the_scripts_own_settings_only(script):
    namespace = script.namespace()
    settings = configure(namespace, NetConfig, ['--max_iters=7', '--width=8'])
    config, given = settings.config, settings.given
    assert namespace['max_iters'] == 7 and 'width' not in namespace and config['width'] == 8


def test_config_is_json(script):
    config, _ = script.run('--levels=1,2', '--peak_flops=312e12', dataclass=NetConfig)
    assert json.loads(json.dumps(config))['levels'] == [1, 2]


# the command line ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arg, value', [
    ('--max_iters=5', 5), ('--max_iters=1e3', 1000), ('--max_iters=-1', -1), ('--max_iters= 1_000 ', 1000),
    ('--learning_rate=1', 1.0), ('--learning_rate=1e-5', 1e-5), ('--learning_rate=inf', float('inf')),
    ('--eval_only', True), ('--eval_only=True', True), ('--eval_only=true', True), ('--eval_only=1', True),
    ('--eval_only=False', False), ('--eval_only=false', False), ('--eval_only=0', False),
    ('--out_dir=2024', '2024'), ('--out_dir=None', 'None'), ('--out_dir=', ''), ('--out_dir=a=b', 'a=b'),
    ('--out_dir="x"', '"x"'), ('--out_dir=C:\\new\\x', 'C:\\new\\x'), ('--out_dir=--x', '--x'),
    ('--start=None', None), ('--start=5', '5'), ('--start="x"', '"x"'), ('--start=a b\n', 'a b\n'),
    ('--top_k=None', None), ('--top_k=3', 3),
    ('--peak_flops=measure', 'measure'), ('--peak_flops=312e12', 312e12), ('--peak_flops=312', 312.0),
    ('--peak_flops=1if', '1if'), ('--peak_flops=None', 'None'), ('--either=1', 1), ('--either=true', True),
    ('--compile=auto', 'auto'), ('--compile=false', False), ('--compile', True),
    ('--shape=4', 4), ('--shape=4,5', (4, 5)), ('--shape=(4,5)', (4, 5)), ('--shape=[4, 5]', (4, 5)),
    ('--shape=4,', (4,)),
    ('--betas=0.9,1', (0.9, 1.0)), ('--betas=5', (5.0,)), ('--betas=()', ()), ('--betas=', ()),
    ('--stop=a,b', ('a', 'b')), ('--stop=5', ('5',)), ('--stop=("a,b", "c")', ('a,b', 'c')), ('--stop=', ()),
    ('--schedule=linear', 'linear'), ('--kernels=fast', 'fast'), ('--kernels=True', True), ('--kernels', True),
    ('--limit=measure', 'measure'), ('--limit=2', 2.0), ('--parts=all', 'all'), ('--parts=None', None),
    ('--parts=("a", "b")', ('a', 'b')),
    ('--anything=5', 5), ('--anything=word', 'word'), ('--anything=', ''), ('--anything=None', None),
])
def test_value(script, arg, value):
    name = arg[2:].partition('=')[0]
    config, given = script.run(arg)
    assert given == {name: value} and type(given[name]) is type(value) and config[name] == value
    if isinstance(value, tuple):
        assert list(map(type, given[name])) == list(map(type, value))


@pytest.mark.parametrize('arg, words', [
    ('--max_iters=True', 'expected int'), ('--max_iters=2.5', 'expected int'), ('--max_iters=many', 'expected int'),
    ('--max_iters=', 'expected int'), ('--max_iters=None', 'expected int'), ('--max_iters=inf', 'expected int'),
    ('--max_iters=1e300', 'expected int'), ('--max_iters=' + '9' * 5000, 'expected int'),
    ('--max_iters=0x' + 'f' * 5000, 'expected int'), ('--max_iters=' + '(' * 5000, 'expected int'),
    ('--max_iters=' + '-' * 50000 + '1', 'expected int'),
    ('--learning_rate=True', 'expected float'), ('--learning_rate=nan', 'expected float'),
    ('--learning_rate=1' + '0' * 400, 'expected float'), ('--learning_rate=1+2j', 'expected float'),
    ('--eval_only=2', 'expected bool'), ('--eval_only=', 'expected bool'), ('--top_k=all', 'expected int | None'),
    ('--betas=a', 'expected tuple[float, ...]'), ('--betas=0.9,True', 'as in --betas=0.9,0.95'),
    ('--shape=4,5.5', 'expected int | tuple[int, ...]'),
    ('--max_iters', 'needs a value, as in --max_iters=1000'), ('--start', 'needs a value'),
    ('max_iters=5', 'two dashes'), ('-max_iters=5', 'two dashes'), ('--max_itres=5', 'did you mean --max_iters?'),
    ('--max-iters=5', 'did you mean --max_iters?'), ('--_hidden=2', 'unknown setting'),
    ('--helper=1', 'unknown setting'), ('--qqq', 'unknown setting'), ('--', 'unknown setting'),
    ('', 'no config file'), ('nowhere.py', 'no config file'),
    ('a\nb\u2028c\x00', 'no config file'), ('--a\rb=1', 'unknown setting'),
])
def test_mistaken_argument(mistakes, arg, words):
    lines = mistakes(arg)
    assert len(lines) == 1 and words in lines[0]


CHOICES = [
    ('schedule', 'straight', "'straight' is not one of cosine, linear"),
    ('schedule', 5, '{} is not one of cosine, linear'),
    ('kernels', 'slow', "'slow' is not one of auto, fast, bool"),
    ('kernels', 2, '{} is not one of auto, fast, bool'),
    ('limit', 'much', "'much' is not one of auto, measure, float"),
    ('mlp', 'relu', "'relu' is not one of gelu, none"),
    ('parts', 'some', "'some' is not one of none, all, tuple[Literal['a', 'b'], ...], None"),
    ('parts', ('a', 'c'), "{} is not one of none, all, tuple[Literal['a', 'b'], ...], None"),
]


@pytest.mark.parametrize('name, value, words', CHOICES)
def test_value_that_is_no_choice(script, mistakes, name, value, words):
    file = script.file('bad.py', f'\n{name} = {value!r}')
    assert mistakes(f'--{name}={value}', dataclass=NetConfig) == [f'{name}=' + words.format(repr(str(value)))]
    assert mistakes(file, dataclass=NetConfig) == [f'{file}:2: {name}=' + words.format(repr(value))]


def test_file_sets_choices(script):
    path = script.file('a.py', "schedule = 'linear'\nkernels = False\nlimit = 3\nmlp = 'none'\nparts = ['b']")
    given = script.run(path, dataclass=NetConfig)[1]
    assert given == dict(schedule='linear', kernels=False, limit=3.0, mlp='none', parts=('b',))


def test_word_for_a_tuple_of_anything(mistakes):
    assert mistakes('--scales=word', dataclass=NetConfig) == ["--scales='word': expected tuple, as in --scales=1,2.5"]


@pytest.mark.parametrize('argv, words', [
    (['--max_iters', '5'], '--max_iters=5'), (['--learning_rate', '-5'], '--learning_rate=-5'),
    (['--eval_only', 'True'], '--eval_only=True'), (['--max_itres', '5'], 'did you mean --max_iters?'),
    (['--eval_only', 'nowhere.py'], 'no config file'),
])
def test_space_instead_of_equals(mistakes, argv, words):
    lines = mistakes(*argv)
    assert len(lines) == 1 and words in lines[0]


def test_flag_before_a_flag_takes_no_value(mistakes):
    assert ['needs a value' in line for line in mistakes('--max_iters', '--nope')] == [True, False]


def test_flag_before_a_file_takes_no_value(script):
    path = script.file('extensionless', 'max_iters = 3')
    assert script.run('--eval_only', path)[1] == {'max_iters': 3, 'eval_only': True}


def test_python_does_not_warn_of_values(script):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        script.run('--anything=1or 2', '--peak_flops="\\d"')
    assert not caught


def test_last_of_equal_flags_wins(script):
    assert script.run('--max_iters=1', '--max_iters=2')[1] == {'max_iters': 2}


# config files --------------------------------------------------------------------------------------------------------

def test_file_in_nanogpts_manner(script):
    path = script.file('config/finetune.py', '''
        # what follows has arithmetic, an import and a call
        import time
        from pathlib import Path

        out_dir = 'ft-' + str(time.time())
        eval_only=True # no spaces

        # 5 * 8 = 40 steps
        max_iters = 5 * 8
        learning_rate = 1 # an int for a float
        top_k = None
        betas = [0.5, 1] # a list
        # compile = False
    ''')
    config, given = script.run(path)
    assert list(given) == ['out_dir', 'eval_only', 'max_iters', 'learning_rate', 'top_k', 'betas']
    assert given['out_dir'].startswith('ft-') and given['max_iters'] == 40 and given['betas'] == (0.5, 1.0)
    assert type(config['learning_rate']) is float and config['compile'] is True


def test_later_file_wins_and_the_command_line_wins_over_both(script):
    a = script.file('a.py', 'max_iters = 1\nn_layer = 1\nshape = 1')
    b = script.file('b.py', 'max_iters = 2\nn_layer = 2')
    for argv in (['--n_layer=9', a, b], [a, '--n_layer=9', b], [a, b, '--n_layer=9']):
        assert script.run(*argv)[1] == {'max_iters': 2, 'n_layer': 9, 'shape': 1}


def test_file_reads_defaults_earlier_files_and_flags(script):
    a, b = script.file('a.py', 'n_layer = 7'), script.file('b.py', '''
        max_iters = max_iters * 2 + n_layer
        def _double(x): return x * 2
        shape = tuple(_double(i) for i in (n_layer,))
        learning_rate /= width
        out_dir = __name__ + str(__file__.endswith('b.py'))
    ''')
    given = script.run(a, b, '--width=2', dataclass=NetConfig)[1]
    assert given == {'n_layer': 7, 'max_iters': 2007, 'shape': (14,), 'learning_rate': 3e-4, 'out_dir': 'config:bTrue',
                     'width': 2}


def test_value_equal_to_the_default_is_given(script):
    assert script.run(script.file('a.py', 'max_iters = 1000\neval_only = False'))[1] == {
        'max_iters': 1000, 'eval_only': False}


def test_file_is_found_from_here_then_from_the_scripts_folder(script, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp('here')
    monkeypatch.chdir(here)
    script.file('config/x.py', 'max_iters = 1')
    assert script.run('config/x.py')[1] == {'max_iters': 1}
    (here / 'config').mkdir()
    (here / 'config' / 'x.py').write_text('max_iters = 2')
    assert script.run('config/x.py')[1] == {'max_iters': 2}


def test_only_what_a_file_assigns_can_be_a_setting(script, mistakes):
    path = script.file('good.py', '''
        import importlib
        import math as mathematics
        from dataclasses import MISSING, dataclass
        from math import pi, tau as turn
        from string import digits
        module = importlib.import_module('json')
        max_iters = int(turn + pi) + len(digits)
    ''')
    assert script.run(path)[1] == {'max_iters': 19}
    path = script.file('bad.py', 'from math import pi\npi = pi + 1\nfor i in (1, 2): pass')
    assert [line.partition(';')[0] for line in mistakes(path)] == [
        f"{path}:2: unknown setting 'pi'", f"{path}:3: unknown setting 'i'"]


def test_mistakes_in_a_file(script, mistakes):
    path = script.file('bad.py', '''\
        import os
        from math import pi
        max_itres = 5
        _fine, helper = 1, len
        class AlsoFine: pass
        learning_rate = 'fast'
        eval_only = 1
        n_layer = 10**400
        start = os
        peak_flops = float('nan')
    ''')
    assert mistakes(path) == [
        f"{path}:3: unknown setting 'max_itres', did you mean max_iters?; a helper's name must start "
        'with an underscore',
        f"{path}:6: learning_rate='fast': expected float, as in learning_rate = 0.0006",
        f'{path}:7: eval_only=1: expected bool, as in eval_only = False',
        f'{path}:8: n_layer={10**400}: expected int, as in n_layer = 4',
        f'{path}:9: start={os!r}: expected str | None, as in start = None',
        f"{path}:10: peak_flops=nan: expected float | str, as in peak_flops = 'auto'",
    ]


@pytest.mark.parametrize('text, words', [
    ('max_iters = 1\nx = (', ":2: SyntaxError: '(' was never closed"),
    ('max_iters = 1\n1 / 0', ':2: ZeroDivisionError: division by zero'),
    ('import sys\nsys.exit(0)', ':2: SystemExit: 0'),
    ('import nowhere_at_all', ":1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ('\n\n_x = [][1]', ':3: IndexError: list index out of range'),
    ('max_iters = undefined', ":1: NameError: name 'undefined' is not defined"),
    ('raise ValueError("two\\nlines")', ':1: ValueError: two lines'),
    ('a\0b', 'source code string cannot contain null bytes'),
])
def test_file_that_raises(script, mistakes, text, words):
    path = script.file('bad.py', text)
    lines = mistakes(path)
    assert len(lines) == 1 and lines[0].startswith(path) and lines[0].endswith(words)


def test_file_that_is_not_text(script, mistakes):
    (script.folder / 'bad.py').write_bytes(b'max_iters = "\xff\xfe"')
    assert 'SyntaxError' in mistakes(str(script.folder / 'bad.py'))[0]


def test_all_mistakes_are_reported_at_once(script, mistakes):
    a, b = script.file('a.py', 'typo_a = 1\nmax_iters = "x"'), script.file('b.py', '1/0')
    lines = mistakes('--nope=1', a, '--max_iters=x', b, 'missing.py', '--out_dir=fine', '--top_k')
    assert len(lines) == 7
    for words in ('nope', 'typo_a', 'a.py:2', 'b.py:1', 'missing.py', "--max_iters='x'", '--top_k needs'):
        assert sum(words in line for line in lines) == 1, words


# help ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('argv', [['--help'], ['-h'], ['--nope', 'missing.py', '-h']])
def test_help_exits_with_0(script, argv):
    with pytest.raises(SystemExit) as e:
        script.run(*argv)
    assert e.value.code == 0


def help_of(script, capsys, columns, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(columns))
    with pytest.raises(SystemExit):
        script.run('--help', dataclass=NetConfig)
    return capsys.readouterr().out


def test_help_shows_everything_in_order(script, capsys, monkeypatch):
    text = help_of(script, capsys, 120, monkeypatch)
    assert text.startswith('Trains something.\n\nSecond paragraph: 50% off {braces}.\n')
    lines = [' '.join(line.split()) for line in text.splitlines() if line]
    start = lines.index('input and output (files)')
    assert lines[start:] == [
        'input and output (files)',
        '--out_dir=oüüt where it all göes, # included (str)',
        '--eval_only=False evaluate and stop (bool)',
        'optimizer',
        '--learning_rate=0.0006 peak (float)',
        '--schedule=cosine its decay (cosine | linear)',
        '--max_iters=1000 steps, in all (int)',
        '--betas=0.9,0.95 (tuple[float, ...])',
        'chat',
        '--top_k=200 None: all (int | None)',
        '--start=None prompt (str | None)',
        '--peak_flops=auto a number, auto or measure (float | str)',
        '--compile=True or auto (bool | str)',
        '--kernels=auto which (auto | fast | bool)',
        '--limit=auto how much (auto | measure | float)',
        "--parts=None (none | all | tuple[Literal['a', 'b'], ...] | None)",
        '--shape=3 (int | tuple[int, ...])',
        '--stop=() (tuple[str, ...])',
        '--either=2 (bool | int)',
        '--anything=None (bool | int | float | str | tuple | None)',
        '--n_layer=4.0 blocks (float)',
        'NetConfig: shape',
        '--width=64 channels, é (int)',
        '--levels=() blocks at each resolution (tuple[int, ...])',
        '--mixer=attention (str | None)',
        '--mlp=gelu (gelu | none)',
        '--scales=1,2.5 (tuple)',
    ]


@pytest.mark.parametrize('columns', [80, 120])
def test_help_fits_the_terminal(tmp_path, capsys, monkeypatch, columns):
    source = SCRIPT + f'\nlong = 1 # {"word " * 60}\na_setting_whose_name_is_much_too_long = 1 # {"word " * 60}\n'
    text = help_of(Script(tmp_path, source), capsys, columns, monkeypatch)
    assert columns - 10 < max(map(len, text.splitlines())) <= columns
    assert '\n  --a_setting_whose_name_is_much_too_long=1\n' in text
    assert text.count('--a_setting') == text.count('--long') == 1
    assert '\n\noptimizer\n  --learning_rate=0.0006 ' in text


@pytest.mark.parametrize('arguments', [('train.py', 'model.py'), ('sample.py',)])
def test_help_and_mistakes_do_not_need_torch(tmp_path, arguments):
    """Nor numpy. A class of the model that has fields but no settings would show up here."""
    script, shown = arguments[0], []
    for name in 'torch', 'numpy':
        (tmp_path / f'{name}.py').write_text('raise AssertionError', encoding='utf-8')
    whole = "import configurator, runpy; configurator.answer_early = lambda *_: None; runpy.run_path('{}')"
    for command, path in ([script], tmp_path), (['-c', whole.format(script)], ''):
        done = subprocess.run([sys.executable, *command, '--help'], cwd=ROOT, capture_output=True, text=True,
                              env=dict(os.environ, PYTHONPATH=str(path), COLUMNS='120'))
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    assert shown[0] == shown[1] and '\n  --seed=1337 ' in shown[0]
    wrong = [sys.executable, script, '--sed=1', 'config/nope.py']
    done = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2 and 'did you mean --seed?' in done.stderr


# mistakes ------------------------------------------------------------------------------------------------------------

def test_fail(capsys):
    with pytest.raises(SystemExit) as e:
        fail('one\n  two', 3)
    assert e.value.code == 2 and capsys.readouterr().err == 'error: one two\nerror: 3\n'


def end_of(tmp_path, code, **options):
    """What a process prints that calls explain_errors and runs this code in a file of the project."""
    path = tmp_path / 'ours.py'
    path.write_text(textwrap.dedent(code), encoding='utf-8')
    before = (f"import configurator, runpy; configurator.PROJECT = {str(tmp_path)!r}; "
              f"configurator.explain_errors({options.pop('files', [])!r}, **{options!r}); ")
    return subprocess.run([sys.executable, '-c', before + f'runpy.run_path({str(path)!r})'], cwd=ROOT,
                          capture_output=True, text=True)


@pytest.mark.parametrize('error, line', [
    ('ValueError("n_embd 3\\nis odd")', 'n_embd 3 is odd'),
    ('ImportError("install tiktoken")', 'install tiktoken'),
    ('ModuleNotFoundError("No module")', 'No module: pip install -r requirements.txt'),
    ('OSError("plain")', 'plain'),
    ('FileNotFoundError(2, "No such file or directory", "x")', "No such file or directory: 'x'"),
    ('OSError(18, "Invalid cross-device link", "a", None, "b")', "Invalid cross-device link: 'a': 'b'"),
    ('OSError(28, "No space left on device")', 'No space left on device'),
])
def test_a_mistake_is_one_line(tmp_path, error, line):
    done = end_of(tmp_path, f'raise {error}')
    assert done.returncode == 2 and done.stderr == f'error: {line}\n'


@pytest.mark.parametrize('code', ['raise KeyError("x")', 'assert False', 'int("x")', '[1].index(2)',
                                  'import json; json.loads("{")', 'import torch; torch.zeros(2) + torch.zeros(3)'])
def test_a_bug_keeps_its_traceback(tmp_path, code):
    """So does a ValueError that a library raises: nobody has put it into words for a user."""
    done = end_of(tmp_path, code)
    assert done.returncode == 1 and 'Traceback' in done.stderr and 'error: ' not in done.stderr


def test_ctrl_c_ends_quietly(tmp_path):
    done = end_of(tmp_path, 'raise KeyboardInterrupt')
    assert done.returncode == 130 and done.stderr == ''


@pytest.mark.parametrize('trace', [False, True])
def test_what_a_config_files_code_raises_is_a_line_with_its_place(tmp_path, trace):
    path = str(tmp_path / 'ours.py')
    done = end_of(tmp_path, 'x = 1\nx.y', files=[path], trace=trace)
    assert done.returncode == 2 and ('Traceback' in done.stderr) is trace
    assert done.stderr.endswith(f"error: {path}:2: AttributeError: 'int' object has no attribute 'y'\n")


# intervals -----------------------------------------------------------------------------------------------------------

INF = float('inf')


@pytest.mark.parametrize('interval, inside, outside', [
    ('[1, inf)', (1, 10 ** 12), (0, -3)), ('(0, inf)', (1e-9, 7), (0, -0.5)), ('[0, 1)', (0, 0.999), (1, 1.5, -0.1)),
    ('(0, 1]', (1e-9, 1.0), (0, 1.1)), ('(-1, 0.5]', (0, -0.9, 0.5), (-1, 0.6)), ('(-inf, 3)', (-5, 2.9), (3, INF)),
    ('[0, inf)', (0, 1e300), (INF,)), ('[0, inf]', (0, INF), (-1,)),
])
def test_interval(tmp_path, capsys, interval, inside, outside):
    script = Script(tmp_path, f'x: float | None = None # a number {interval}\nxs = () # numbers {interval}\n')
    for value in (*inside, None):
        assert script.run(f'--x={value}')[0]['x'] == value
    for value in outside:
        with pytest.raises(SystemExit):
            script.run(f'--x={value}', f'--xs={inside[0]},{min(value, 1e300)}')
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == f'error: x={float(value)!r} must lie in {interval}'
        assert value == INF or lines[1].startswith('error: xs=(')
    with pytest.raises(SystemExit):
        script.run('--help')
    assert interval in capsys.readouterr().out


def test_all_numbers_outside_are_reported_at_once(script, mistakes):
    script.path.write_text('a = 1 # one [1, inf)\nb = 0.9 # two [0, 1)\nc = 1.0 # three (0, 1]\n', encoding='utf-8')
    path = script.file('x.py', 'a = 0\nc = 1.0')
    assert mistakes(path, '--b=1.5') == ['a=0 must lie in [1, inf)', 'b=1.5 must lie in [0, 1)']


# settings of a run that goes on --------------------------------------------------------------------------------------

def test_settings_are_taken_from_the_run(script):
    namespace = script.namespace()
    settings = configure(namespace, NetConfig, ['--max_iters=7', '--betas=0.9,0.95', '--out_dir=new'])
    stored = dict(max_iters=5, betas=[0.9, 0.95], learning_rate=1.0, shape=[1, 2], width=8, out_dir='old', start='old',
                  gone=1, schedule='cyclic')
    # betas are the run's, asked for anew; a name that is not taken is no change
    assert settings.take(stored, ('out_dir', 'start')) == [
        "schedule='cosine': the checkpoint's 'cyclic' is no longer a choice", 'max_iters=7, was 5']
    expected = dict(max_iters=7, betas=(0.9, 0.95), learning_rate=1.0, shape=(1, 2), out_dir='new', start=None)
    for name, value in expected.items():
        assert settings.config[name] == namespace[name] == value, name
    assert settings.config['width'] == 8 and 'width' not in namespace and 'gone' not in settings.config


@pytest.mark.parametrize('flags, expected', [
    ([], (100, 90, 10)), (['--total=50'], (50, 45, 5)), (['--total=50', '--part=7'], (50, 7, 10)),
    (['--total=50', '--other=7'], (50, 45, 7)), (['--total=200'], (200, 90, 10)), (['--total=0'], (0, 0, 0)),
])
def test_a_flag_that_shortens_the_whole_shortens_its_parts(tmp_path, flags, expected):
    script = Script(tmp_path, 'total = 100\npart: int | None = 90\nother = 10\n')
    settings = configure(script.namespace(), argv=flags)
    lines = settings.shorten('total', 'part', 'other')
    assert tuple(settings.config.values()) == expected
    assert len(lines) == sum(a != b for a, b in zip(expected[1:], (90, 10))) - len(set(flags) - {flags[0]} if flags else ())


def test_contradictions_are_said_together(script):
    settings = configure(script.namespace(), argv=['--max_iters=7'])
    settings.refuse([(False, '{no_such_setting}')]) # a message is made only when it is needed
    with pytest.raises(ValueError, match="^max_iters=7 is odd; out_dir='oüüt' is, too$"):
        settings.refuse([(True, 'max_iters={max_iters} is odd'), (True, 'out_dir={out_dir!r} is, too')])


def test_settings_of_a_script_are_read_without_running_it():
    namespace = settings_of('train.py')
    assert namespace['gradient_accumulation_steps'] == 40 and namespace['hidden_lr'] is None
    assert 'torch' not in namespace and 'machine' not in namespace
    assert configure(namespace, argv=['--seed=3']).config['seed'] == 3


# this machine --------------------------------------------------------------------------------------------------------

def test_device_and_dtype():
    assert resolve('cpu', 'auto') in [('cpu', 'float32'), ('cpu', 'bfloat16')]
    assert resolve('cpu', 'float16') == ('cpu', 'float16')
    for device in ('cuda:99', 'toaster', 'meta', 'hpu'):
        with pytest.raises(ValueError, match=f"device='{device}' is not there .*--device=auto"):
            resolve(device, 'auto')


@pytest.mark.parametrize('name, flops', [
    ('NVIDIA H100 80GB HBM3', 989.4e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H100 NVL', 835.5e12),
    ('NVIDIA H200', 989.4e12), ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA A10G', 70e12),
    ('NVIDIA A10', 125e12), ('NVIDIA L4', 121e12),
    ('NVIDIA L40S', 362e12), ('Tesla T4', 65e12), ('Tesla V100-SXM2-16GB', 125e12),
    ('NVIDIA GeForce RTX 4090', 165.2e12), ('AMD Instinct MI300X', 1307.4e12), ('NVIDIA B200', 2250e12),
    ('NVIDIA GeForce GTX 1080', None), ('NVIDIA L400', None),
])
def test_peak_flops_of_a_card(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    found, source = find_peak_flops('auto', 'cuda', torch.bfloat16)
    assert found == flops
    assert 'datasheet' in source if flops else name in source and '--peak_flops=' in source
    assert find_peak_flops('auto', 'cuda', torch.float32)[0] is None


def test_peak_flops_settings():
    assert find_peak_flops(3e12, 'cpu', torch.float32) == (3e12, 'as set')
    assert find_peak_flops(3, 'cuda', torch.float32) == (3.0, 'as set')
    assert find_peak_flops('auto', 'mps', torch.float32)[0] is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_peak_flops_measured(dtype):
    """It takes a moment, also where the processor lacks the dtype, and is what training's products reach."""
    started = time.perf_counter()
    flops, source = find_peak_flops('auto', 'cpu', dtype)
    seconds = time.perf_counter() - started
    assert 'measured' in source and str(dtype).removeprefix('torch.') in source and seconds < 10, (source, seconds)
    x, w = (torch.randn(256, 256).to(dtype) for _ in range(2))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - started)
    assert flops > 0.2 * 2 * 256 ** 3 / min(times) # a @ w is 5 times slower in an emulated bfloat16


# whole processes -----------------------------------------------------------------------------------------------------

PROCESS = SCRIPT + '''
import json, sys
from configurator import configure
settings = configure(globals())
print(json.dumps([max_iters, out_dir, settings.given, sorted({'torch', 'numpy'} & set(sys.modules))]))
below = 1
'''


def process(script, *argv, module=False):
    env = {**os.environ, 'PYTHONPATH': ROOT + os.pathsep + str(script.folder), 'PYTHONIOENCODING': 'ascii'}
    return subprocess.run([sys.executable, *(['-m', 'script'] if module else [str(script.path)]), *argv], env=env,
                          cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize('module', [False, True])
def test_process(tmp_path, module):
    script = Script(tmp_path, PROCESS)
    script.file('config/x.py', 'max_iters = 3')
    done = process(script, 'config/x.py', '--out_dir=é', module=module)
    assert done.returncode == 0 and done.stderr == ''
    assert json.loads(done.stdout) == [3, 'é', {'max_iters': 3, 'out_dir': 'é'}, []]


def test_process_with_a_mistake(tmp_path):
    done = process(Script(tmp_path, PROCESS), '--below=1')
    assert done.returncode == 2 and done.stdout == '' and done.stderr.startswith("error: unknown setting '--below'")


# any arguments at all ------------------------------------------------------------------------------------------------

TEXTS = st.one_of(st.text(), st.text('0123456789eE+-.,()[]{}\'"\\_xnNoTrue #\n', max_size=12),
                  st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                               lambda inner: st.lists(inner) | st.tuples(inner, inner), max_leaves=5).map(repr))
ARGUMENTS = st.one_of(TEXTS, st.builds('--{}={}'.format, st.sampled_from(NAMES + ['levels', 'scales']), TEXTS),
                      st.builds('--{}'.format, st.sampled_from(NAMES) | TEXTS),
                      st.sampled_from(['-h', 'good.py', 'bad.py']))


@hypothesis_settings(max_examples=300, deadline=None, derandomize=True, database=None,
                     suppress_health_check=[HealthCheck.function_scoped_fixture])
@given_(st.lists(ARGUMENTS, max_size=5))
@example(['--betas={1: 2}'])
@example(['--levels=' + '[' * 90 + ']' * 90])
def test_no_arguments_make_a_traceback(script, capsys, argv):
    script.file('good.py', 'max_iters = 3')
    script.file('bad.py', 'max_iters = typo = "x"')
    capsys.readouterr()
    try:
        config, given = script.run(*argv, dataclass=NetConfig)
    except SystemExit as e:
        lines = capsys.readouterr().err.splitlines()
        helped = '-h' in argv or '--help' in argv
        assert e.code == (0 if helped else 2)
        assert not lines if helped else lines and all(line.startswith('error: ') for line in lines)
    else:
        assert json.loads(json.dumps(config)).keys() == config.keys() >= given.keys()
        assert capsys.readouterr().err == ''
