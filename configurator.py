"""Settings of a script, changed by config files and the command line: typed, checked, explained by --help.

    batch_size = 12 # sequences in a micro-batch
    top_k: int | None = 200 # keep only the k most likely tokens; None: all
    config, given, replaced, files = configure(globals())

    python script.py config/a.py config/b.py --batch_size=32 --flag

Config files are Python and run with the rights of whoever starts the script. Later files win over earlier ones, and the
command line wins over files wherever it stands.
"""
import ast
import builtins
import dataclasses
import difflib
import functools
import inspect
import os
import re
import shutil
import sys
import textwrap
import time
import tokenize
import traceback
import types
import typing
import warnings
from contextlib import contextmanager

PLAIN = bool | int | float | str | tuple | None # all that a setting can hold
BOOLS = {'true': True, 'false': False, '1': True, '0': False}


class Configured(typing.NamedTuple):
    config: dict # every setting's value by name
    given: dict # those of them that a file or the command line set
    replaced: dict # for each flag, the value that holds without it
    files: list # paths of the config files


class Setting(typing.NamedTuple):
    default: object
    hint: object # what it may be: int, float | None, tuple[int, ...], Literal['cosine', 'linear']
    comment: str
    group: str # its title in --help


def fail(*messages):
    """Print each message as one line `error: ...` on stderr and exit with status 2."""
    for message in messages:
        print('error:', ' '.join(str(message).split()), file=sys.stderr)
    sys.exit(2)


@contextmanager
def exit_on_error(files=()):
    """End a user's mistake (ValueError, OSError, ImportError) in one line and status 2, Ctrl-C quietly in status 130.

    What the code of these config files raises, such as a mixer's, is one, too: its line begins with the place.
    Anything else is a bug and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        known = {os.path.abspath(path): path for path in files}
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename in known]
        if frames and not (isinstance(e, MemoryError) or re.search("out of memory|can't allocate memory", str(e))):
            fail(f'{known[frames[-1].filename]}:{frames[-1].lineno}: {type(e).__name__}: {e}')
        if not isinstance(e, (ValueError, OSError, ImportError)):
            raise
        message = str(e) or type(e).__name__
        if isinstance(e, OSError) and e.strerror: # without the "[Errno 2]" that str(e) starts with
            message = ': '.join([e.strerror, *(repr(name) for name in (e.filename, e.filename2) if name is not None)])
        if isinstance(e, ModuleNotFoundError):
            message += ': pip install -r requirements.txt'
        fail(message)


def configure(namespace, dataclass=None, argv=None, adopt=None, foreign=()):
    """Resolve a script's settings from its defaults, config files and the command line.

    namespace: globals() of the script. Its settings are the module-level assignments above the call, except names that
        start with an underscore or are in capitals, and values that are not PLAIN (lists count as tuples).
    dataclass: each of its fields (all need defaults) is a setting too. A default in the script wins over the field's.
    argv: sys.argv[1:] by default.
    adopt: called with each class that a config file has; it may add fields to dataclass. What it returns, a name or
        None, is what the class means as a value. ValueError refuses the class.
    foreign: names of another script's settings. Of a file that sets one of them only out_dir is taken.

    Returns a Configured and writes the script's own settings back to namespace. Mistakes are reported all at once:
    status 2, nothing changed.
    """
    argv = sys.argv[1:] if argv is None else argv
    own, settings = find_settings(namespace, dataclass)
    folder = os.path.dirname(os.path.abspath(namespace['__file__']))
    helps = [arg for arg in argv if arg in ('--help', '-h')]
    argv = [arg for arg in argv if arg not in helps]
    files, flags, _ = read_arguments(argv, folder, settings)
    config, given, mistakes = {name: setting.default for name, setting in settings.items()}, {}, []
    for path in files: # files can read the flags: with --max_iters=9, lr_decay_iters = max_iters means 9
        assigned = run_file(path, {**config, **given, **flags}, mistakes)
        if adopt:
            before = set(dir(dataclass))
            adopt_classes(path, assigned, adopt, mistakes)
            script = os.path.basename(namespace['__file__'])
            mistakes += [f'{path}: a class declares the setting {name}, which {script} has: choose another name'
                         for name in own if name in set(dir(dataclass)) - before]
            settings.update(find_settings(namespace, dataclass)[1])
        given.update(check_file(path, assigned, settings, foreign, mistakes))
    files, flags, wrong = read_arguments(argv, folder, settings) # again: files may have brought settings
    if helps:
        try:
            show_help(namespace, settings)
            sys.stdout.flush()
        except BrokenPipeError: # nobody reads on, as with | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()) # or Python complains at its end
        sys.exit(0)
    if mistakes or wrong:
        fail(*mistakes, *wrong)
    config = {name: setting.default for name, setting in settings.items()} | given
    replaced = {name: config[name] for name in flags}
    given.update(flags)
    config.update(flags)
    namespace.update({name: config[name] for name in own})
    return Configured(config, given, replaced, files)


def say(text):
    """print(), also to a terminal whose encoding lacks some of the characters."""
    encoding = sys.stdout.encoding or 'utf-8'
    print(text.encode(encoding, 'backslashreplace').decode(encoding))


# settings, read from the source --------------------------------------------------------------------------------------

def find_settings(namespace, dataclass):
    """Names of the script's own settings, and {name: Setting} of these and the dataclass' fields, in source order."""
    with tokenize.open(namespace['__file__']) as f:
        script = scan(f.read())
    fields, hints, notes = {}, {}, {}
    if dataclass:
        fields, hints = {f.name: f for f in dataclasses.fields(dataclass)}, typing.get_type_hints(dataclass)
        notes = scan_class(dataclass)
    for cls in set(getattr(dataclass, 'declared_by', {}).values()):
        notes |= {name: (hint, comment, f'mixer {cls.__name__}') for name, (hint, comment, _) in scan_class(cls).items()
                  if name in fields}
    settings, own = {}, []
    for name, (annotation, comment, group) in script.items():
        try:
            default = fit(namespace[name], PLAIN)
        except (KeyError, TypeError): # not assigned yet: below the call; a device, a module: no setting
            continue
        hint = eval(annotation, namespace) if annotation else hints.get(name)
        settings[name] = Setting(default, hint, comment or notes.get(name, ('', '', ''))[1], group)
        own.append(name)
    for name, field in fields.items():
        if name not in settings:
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            _, comment, group = notes.get(name, ('', '', ''))
            settings[name] = Setting(default, hints[name], comment, f'{dataclass.__name__}: {group}'.rstrip(': '))
    for name, setting in settings.items():
        try:
            settings[name] = setting._replace(default=fit(setting.default, setting.hint))
        except TypeError: # no annotation, or one that says more than a type: the default's type it is
            settings[name] = setting._replace(hint=type_of(setting.default))
    return own, settings


def scan_class(cls):
    """scan of the class' body; {} for one that was typed in, which has no source."""
    try:
        with tokenize.open(inspect.getsourcefile(cls)) as f:
            return scan_classes(f.read()).get(cls.__name__, {})
    except (OSError, TypeError):
        return {}


@functools.cache
def scan_classes(source): # parsed once for all classes: inspect.getsource parses the whole file for each
    return {node.name: scan(source, node.body) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def scan(source, body=None):
    """{name: (annotation, comment, group)} of the assignments at the top level of a script or in a class' body.

    The comment is the one behind the value, with deeper indented comment lines under it. The group is the nearest
    block of comment lines right above an assignment.
    """
    lines, found, group = source.split('\n'), {}, ''
    for node in ast.parse(source).body if body is None else body:
        row, above, indent = node.lineno - 2, [], ' ' * node.col_offset # row counts from 0
        while row >= 0 and lines[row].startswith(indent + '#'):
            above.insert(0, lines[row].strip('-=# '))
            row -= 1
        group = ' '.join(filter(None, above)) or group
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip() # the offset is in bytes
        comment, row = [rest[1:].strip()] if rest.startswith('#') else [], node.end_lineno
        while row < len(lines) and lines[row].startswith(indent + ' ') and lines[row].strip().startswith('#'):
            comment.append(lines[row].strip()[1:].strip())
            row += 1
        annotation = ast.unparse(node.annotation).strip('\'"') if isinstance(node, ast.AnnAssign) else ''
        for target in targets:
            if isinstance(target, ast.Name) and not (target.id.startswith('_') or target.id.isupper()):
                found[target.id] = annotation, ' '.join(comment), group
    return found


# types ---------------------------------------------------------------------------------------------------------------

def parts(hint):
    """What a hint allows, as a list: the parts of a union, or the hint itself."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def is_literal(hint):
    return typing.get_origin(hint) is typing.Literal


def choices(hint):
    """The values that the Literals in a hint allow, as a list."""
    return [choice for part in filter(is_literal, parts(hint)) for choice in typing.get_args(part)]


def options(hint):
    """The types that a hint allows, as a list; a choice counts as its type."""
    return [part for part in parts(hint) if not is_literal(part)] + [type(choice) for choice in choices(hint)]


def elements(hint):
    """The type of the elements if hint is a tuple or a list, else None."""
    if (typing.get_origin(hint) or hint) in (tuple, list):
        return (typing.get_args(hint) or (PLAIN,))[0]


def type_of(default):
    """The hint for a setting without annotation."""
    if default is None:
        return PLAIN
    if isinstance(default, (tuple, list)) and default:
        return tuple[typing.Union[tuple(type(element) for element in default)], ...]
    return type(default)


def fit(value, hint):
    """value as hint wants it: int for float and whole float for int converted, list to tuple.

    Raises TypeError where it does not fit: bool for int, a value that is none of the choices, and nan or more than
    64 bits for anything.
    """
    allowed = options(hint)
    if isinstance(value, (tuple, list)):
        for inner in filter(None, map(elements, allowed)):
            return tuple(fit(element, inner) for element in value)
    if isinstance(value, float):
        value = float(value) # numpy's float64 is a float too, but not plain
        if float not in allowed and int in allowed and value.is_integer():
            value = int(value)
    if type(value) is int and value.bit_length() <= 64 and int not in allowed and float in allowed:
        value = float(value)
    if type(value) not in allowed or value != value or type(value) is int and value.bit_length() > 64:
        raise TypeError(f'{type(value).__name__} is not {hint}')
    if value not in choices(hint) and any(type(value) is type(choice) for choice in choices(hint)):
        raise TypeError(f'{value!r} is none of the choices')
    return value


def parse(text, hint):
    """The command line's text as hint wants it; raises TypeError."""
    allowed, word = options(hint), text.strip()
    if type(None) in allowed and text == 'None':
        return None
    if set(allowed) <= {str, type(None)}: # as it is: a run's name may be 2024
        return fit(text, hint)
    if bool in allowed and word in BOOLS and not (word in '01' and {int, float} & set(allowed)):
        return BOOLS[word]
    tuples = [inner for inner in map(elements, allowed) if inner]
    if tuples and str not in allowed and not word:
        return ()
    if str in tuples and str not in allowed and word[0] not in '(["\'': # words without quotes
        return tuple(text.split(','))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # Python warns of texts like '\d' and 1or
            value = ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return fit(float(word) if float in allowed and word.lstrip('+-') == 'inf' else text, hint)
    for candidate in value, (value,), text:
        try:
            return fit(candidate, hint)
        except TypeError:
            pass
    raise TypeError(f'{text!r} is not {hint}')


def settings_of(script):
    """Names of the settings of another script beside this file."""
    with tokenize.open(os.path.join(os.path.dirname(os.path.abspath(__file__)), script)) as f:
        return set(scan(f.read()))


# arguments and files -------------------------------------------------------------------------------------------------

def read_arguments(argv, folder, settings):
    """Sort arguments into config files (paths), flags (values by name) and mistakes. folder: the script's."""
    def find(arg): # as data.tokens.find_path does
        places = (arg,) if arg.startswith(('./', '../')) else (arg, os.path.join(folder, arg))
        return next((path for path in places if os.path.isfile(path)), None)

    files, flags, mistakes, rest = [], {}, [], list(argv)
    while rest:
        arg = rest.pop(0)
        name, equals, text = arg.lstrip('-').partition('=')
        if not arg.startswith('--'):
            if find(arg):
                files.append(find(arg))
            elif name in settings:
                mistakes.append(f'{arg!r}: a setting takes two dashes and =, as in {example(name, settings[name])}')
            else:
                mistakes.append(f'no config file {arg!r} here or in {folder}; a setting is written --key=value')
            continue
        # In `--key value`, value must not count as a config file that is missing.
        spaced = not equals and rest and not (rest[0].startswith('--') or rest[0].endswith('.py') or find(rest[0]))
        text = rest.pop(0) if spaced else text
        if name not in settings:
            mistakes.append(f'unknown setting {"--" + name!r}{nearest(name, settings, "--")}; --help lists all')
        elif spaced:
            mistakes.append(f'--{name} {text!r}: write = instead of the space, --{name}={text}')
        elif not equals and bool not in options(settings[name].hint):
            mistakes.append(f'--{name} needs a value, as in {example(name, settings[name])}')
        else:
            try:
                flags[name] = parse(text, settings[name].hint) if equals else True
            except TypeError:
                mistakes.append(no_choice(name, text, settings[name]) or
                                f'--{name}={text!r}: expected {type_name(settings[name])}, '
                                f'as in {example(name, settings[name])}')
    return files, flags, mistakes


def run_file(path, known, mistakes):
    """Execute a config file, which can read the values in known. Returns what it assigned; {} if it fails."""
    stem = os.path.splitext(os.path.basename(path))[0]
    module = types.ModuleType(stem)
    assigned = vars(module)
    # The known values join its builtins, so its globals are exactly what it assigned, equal to the default or not.
    assigned.update({'__builtins__': {**vars(builtins), **known}, '__file__': os.path.abspath(path)})
    try:
        with open(path, 'rb') as f:
            source = f.read()
        exec(compile(source, os.path.abspath(path), 'exec'), assigned)
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        line = lines[-1] if lines else getattr(e, 'lineno', None) # a SyntaxError has run nothing yet
        mistakes.append(f'{path}{f":{line}" if line else ""}: {type(e).__name__}: {getattr(e, "msg", None) or e}')
        return {}
    # where inspect and torch.compile look for it, under a name that hides no other module
    module.__name__ = f'config:{stem}'
    sys.modules[module.__name__] = module
    for value in assigned.values():
        if isinstance(value, type) and value.__module__ == stem:
            value.__module__ = module.__name__
    return assigned


def adopt_classes(path, assigned, adopt, mistakes):
    """Hand a file's classes to adopt, and put their names in the place of classes that are values of settings."""
    names, refused = {}, set()
    for cls in {value for value in assigned.values() if isinstance(value, type)}:
        try:
            names[cls] = adopt(cls) or cls
        except ValueError as e:
            mistakes.append(f'{path}: {e}')
            refused.add(cls)
    for name, value in list(assigned.items()):
        values = value if isinstance(value, (tuple, list)) else [value]
        classes = [v for v in values if isinstance(v, type)]
        if classes and not (isinstance(value, type) and value.__name__ == name):
            if refused.intersection(classes): # said already
                del assigned[name]
            else:
                assigned[name] = tuple(names.get(v, v) if isinstance(v, type) else v for v in values) \
                    if isinstance(value, (tuple, list)) else names.get(value, value)


def check_file(path, assigned, settings, foreign, mistakes):
    """The settings among what a file assigned, by name. Adds to mistakes."""
    if not assigned:
        return {}
    with tokenize.open(path) as f:
        tree = ast.parse(f.read())
    # what the file imports is no setting: only what it assigns
    lines = {node.id: f':{node.lineno}' for node in ast.walk(tree)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if any(name in foreign and name not in settings for name in assigned):
        assigned = {name: assigned[name] for name in ('out_dir',) if name in assigned}
    values = {}
    for name, value in assigned.items():
        where = path + lines.get(name, '')
        if name in settings:
            try:
                values[name] = fit(value, settings[name].hint)
            except TypeError:
                wrong = no_choice(name, value, settings[name])
                if isinstance(value, type):
                    wrong = f'{name} = {value.__name__} is a class that cannot be one: derive it from Mixer in model.py'
                mistakes.append(f'{where}: {wrong}' if wrong else
                                f'{where}: {name} = {value!r}: expected {type_name(settings[name])}, '
                                f'as in {name} = {settings[name].default!r}')
        elif name in lines and not (name.startswith('_') or callable(value) or isinstance(value, types.ModuleType)):
            mistakes.append(f'{where}: unknown setting {name!r}{nearest(name, settings)}; '
                            'a helper\'s name must start with an underscore')
    return values


# words ---------------------------------------------------------------------------------------------------------------

def nearest(name, settings, dashes=''):
    match = difflib.get_close_matches(name, settings, 1)
    return f', did you mean {dashes}{match[0]}?' if match else ''


def names_of_parts(hint):
    names = [inspect.formatannotation(part) for part in parts(hint) if not is_literal(part)]
    names = [name.replace('typing.', '').replace('NoneType', 'None') for name in names]
    return [str(choice) for choice in choices(hint)] + names


def type_name(setting):
    """The choices and types of a setting: "cosine | linear", "int | None"."""
    return ' | '.join(names_of_parts(setting.hint))


def no_choice(name, value, setting):
    """What to say of a value that is none of the setting's choices; '' if the setting has no choices."""
    words = dict(bool='True, False', float='a float', int='an int')
    names = ', '.join(words.get(part, part) for part in names_of_parts(setting.hint))
    return f'{name}={value!r} is not one of {names}' if choices(setting.hint) else ''


def example(name, setting):
    """--name=default, in a form that shells and parse() take where there is one."""
    value = setting.default
    if isinstance(value, tuple) and value:
        value = ','.join(map(str, value))
    return f'--{name}={value if str(value).isprintable() else repr(value)}'


def show_help(namespace, settings):
    """Print the script's docstring, then the settings by group: default, comment, type."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    left = min(34, max((len(example(*item)) for item in settings.items()), default=0) + 4)
    script, group = os.path.basename(namespace['__file__']), ''
    lines = [inspect.cleandoc(namespace.get('__doc__') or script), '',
             f'usage: python {script} [config.py ...] [--key=value ...]', '', 'settings, with their defaults:']
    for name, setting in settings.items():
        if setting.group != group:
            group = setting.group
            lines += ['', textwrap.fill(group, width)]
        head = f'  {example(name, setting)}'
        if len(head) > left - 2: # too long to stand beside its comment
            lines.append(head)
            head = ''
        for text in textwrap.wrap(f'{setting.comment} ({type_name(setting)})'.strip(), width - left):
            lines.append(head.ljust(left) + text)
            head = ''
    say('\n'.join(lines))


# settings that depend on each other or on a checkpoint --------------------------------------------------------------

def check_ranges(config, ranges):
    """Raise one ValueError for all settings outside of their range; None is in every range.

    ranges: {interval: names separated by spaces}, as {'[1, inf)': 'batch_size eval_iters', '(0, 1]': 'top_p'}.
    """
    mistakes = []
    for interval, names in ranges.items():
        low, high = map(float, interval[1:-1].split(','))
        open_low, open_high = interval[0] == '(', interval[-1] == ')'
        words = [f"{'above' if open_low else 'at least'} {low:g}"] if low > -float('inf') else []
        words += [f"{'below' if open_high else 'at most'} {high:g}"] if high < float('inf') else []
        for name in names.split():
            value = config[name]
            if value is None:
                continue
            too_low = value <= low if open_low else value < low
            too_high = value >= high if open_high else value > high
            if too_low or too_high:
                finite = ['finite'] if value == high == float('inf') else []
                mistakes.append(f"{name}={value!r} must be {' and '.join(words + finite)}")
    if mistakes:
        raise ValueError('; '.join(mistakes))


def take_settings(namespace, config, given, stored, but):
    """Let a resumed run's settings hold where nothing else was asked for: changes config and namespace.

    stored: the run's settings. but: names that are not taken. Returns {name: (the run's value, the value now)} of those
    that were asked for and differ.
    """
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
              if name in config and name not in but}
    kept = {name: value for name, value in stored.items() if name not in given}
    config.update(kept)
    namespace.update({name: value for name, value in kept.items() if name in namespace})
    return {name: (stored[name], value) for name, value in given.items() if name in stored and stored[name] != value}


def shorten_schedule(namespace, config, replaced):
    """One flag, --max_iters, shortens a run: without others its schedule shrinks with it. Changes config and namespace.

    replaced: what flags have replaced. Returns a line for each setting that was shortened.
    """
    share = config['max_iters'] / max(1, replaced.get('max_iters', config['max_iters']))
    lines = []
    for name in ('warmup_iters', 'lr_decay_iters', 'wsd_decay_iters') if 'lr_decay_iters' not in replaced else ():
        old = config[name]
        if share < 1 and old and name not in replaced:
            namespace[name] = config[name] = round(share * old)
            if config[name] != old and (name != 'wsd_decay_iters' or config['schedule'] == 'wsd'):
                lines.append(f"{name}={config[name]}, shortened from {old} with max_iters")
    return lines


# what `auto` means on this machine ----------------------------------------------------------------------------------

def yield_if_busy():
    """Call before torch is imported: has waiting threads sleep instead of spin if other processes want this CPU.

    Measured on 2 cores: beside one busy process training is 1.7 to 2.0 times as fast so, but alone 4 to 24% slower.
    """
    try:
        others = []
        for _ in range(5):
            with open('/proc/loadavg', encoding='ascii') as f: # "0.12 0.20 0.15 3/417 9999": 3 run now, this one too
                others.append(int(f.read().split()[3].split('/')[0]) - 1)
            time.sleep(0.01)
    except (OSError, ValueError, IndexError): # not Linux
        return
    if min(others) >= max(1, (os.cpu_count() or 1) / 4):
        os.environ.setdefault('OMP_WAIT_POLICY', 'passive')


# Dense FLOP/s in bfloat16 (V100, T4: float16) with float32 accumulation, from NVIDIA's and AMD's datasheets (numbers
# "with sparsity" halved; of an MI250X each half is a device). The first name that the card's name contains as whole
# words counts.
PEAK_FLOPS = {
    'B200': 2250e12, 'H200 NVL': 835.5e12, 'H200': 989.4e12, 'GH200': 989.4e12, 'H100 PCIe': 756e12,
    'H100 NVL': 835.5e12, 'H100': 989.4e12, 'A100': 312e12, 'A40': 149.7e12, 'A30': 165e12, 'A10G': 70e12,
    'A10': 125e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'T4': 65e12, 'V100': 125e12, 'RTX A6000': 154.8e12,
    'RTX 3090': 71.2e12, 'RTX 4090': 165.2e12, 'RTX 5090': 209.5e12, 'MI250X': 191.5e12, 'MI300X': 1307.4e12,
}


def resolve(device, dtype):
    """'auto' or a name for each -> (device, dtype's name). ValueError if this machine has no such device."""
    import torch # here: prepare scripts do without it
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        kind = torch.device(device).type
        torch.empty(1, device=device)
        if kind == 'cuda' and torch.device(device).index is not None:
            torch.cuda.set_device(device) # streams, graphs and measurements are the current device's
    except (RuntimeError, AssertionError) as e: # what torch raises for a device that is not there
        there = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
        there += ['mps'] if torch.backends.mps.is_available() else []
        raise ValueError(f"device={device!r} is not there ({str(e).splitlines()[0]}): this machine has "
                         f"{', '.join(there)}; use --device=auto") from None
    if dtype == 'auto' and kind == 'cuda':
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    elif dtype == 'auto':
        # only where the processor multiplies it: elsewhere bfloat16 is emulated and slow
        native = kind == 'cpu' and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
        dtype = 'bfloat16' if native else 'float32'
    return device, dtype


def find_peak_flops(setting, device, dtype):
    """-> (FLOP/s or None, where it came from).

    setting: a number; 'measure': see measure_flops; 'auto': the table for a GPU in a 16-bit dtype, measured on a CPU.
    """
    import torch
    if not isinstance(setting, str):
        if not 0 < setting < float('inf'):
            raise ValueError(f"peak_flops={setting!r} must be above 0, or auto or measure")
        return float(setting), 'as set'
    device = torch.device(device)
    if setting == 'auto' and device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
        words = ' ' + name.replace('-', ' ') + ' '
        for card, flops in PEAK_FLOPS.items():
            if f' {card} ' in words and ' Laptop ' not in words and dtype != torch.float32:
                return flops, f'datasheet of {card}, dense'
        return None, (f'n/a: no 16-bit figure for {name}; set --peak_flops=312e12 (its datasheet\'s) or '
                      '--peak_flops=measure')
    if setting == 'auto' and device.type != 'cpu':
        return None, f'n/a: set --peak_flops=measure or a number for {device.type}'
    n, flops = measure_flops(device, dtype)
    return flops, f'measured: {n}x{n} matrix product in {str(dtype).removeprefix("torch.")}'


def measure_flops(device, dtype):
    """-> (n, FLOP/s): the best of a few n x n products as Linear layers make them, an honest ceiling on any machine.

    On a CPU without bfloat16 a large product takes minutes: sizes grow only while one is quick.
    """
    import torch
    largest = 2048 if device.type == 'cpu' else 8192
    n, found = 256, []
    while True:
        x, w = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        times = []
        for _ in range(5):
            t0 = time.perf_counter()
            torch.nn.functional.linear(x, w)[0, 0].item() # waits for the device
            times.append(time.perf_counter() - t0)
            if sum(times) > 0.5:
                break
        found.append((2 * n ** 3 / min(times), n))
        if n >= largest or 8 * min(times) > 0.25:
            flops, n = max(found)
            return n, flops
        n *= 2
