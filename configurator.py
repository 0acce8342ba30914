"""Settings of a script, changed by config files and the command line: typed, checked, explained by --help.

    batch_size = 12 # sequences in a micro-batch [1, inf)
    top_k: int | None = 200 # keep only the k most likely tokens; None: all [1, inf)
    settings = configure(globals())

    python script.py config/a.py config/b.py --batch_size=32 --flag

An interval at the end of a comment is where a number must lie; a round bracket leaves its end out. Config files are
Python and run with the rights of whoever starts the script. Later files win over earlier ones, and the command line
wins over files wherever it stands.
"""
import ast
import builtins
import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import operator
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import tokenize
import traceback
import types
import typing
import warnings

PROJECT = os.path.dirname(os.path.abspath(__file__))
PLAIN = bool | int | float | str | tuple | None # all that a setting can hold
WORDS = {'true': True, 'false': False, '1': True, '0': False, 'inf': float('inf'), '-inf': -float('inf')}
BOUNDS = {'[': operator.le, '(': operator.lt, ']': operator.ge, ')': operator.gt} # bound OK number


class Setting(typing.NamedTuple):
    default: object
    hint: object # what it may be: int, float | None, tuple[int, ...], Literal['cosine', 'linear']
    comment: str
    group: str # its title in --help


class Settings:
    """What configure() made of a script's settings.

    config    every setting's value by name
    given     those of them that a file or the command line set
    replaced  for each flag, the value that holds without it
    files     paths of the config files
    """
    def __init__(self, namespace, own, known, given, flags, files):
        self.namespace, self.own, self.known, self.files = namespace, own, known, files
        self.config = {name: setting.default for name, setting in known.items()} | given
        self.given, self.replaced = given | flags, {name: self.config[name] for name in flags}
        self.update(**flags)

    def update(self, **values):
        """Sets values, in the script too."""
        self.config.update(values)
        self.namespace.update({name: self.config[name] for name in self.own})

    def refuse(self, rules):
        """One ValueError for all rules (condition, message) that hold; a message is formatted with the settings."""
        broken = [message.format(**self.config) for condition, message in rules if condition]
        if broken:
            raise ValueError('; '.join(broken))

    def take(self, stored, but):
        """A checkpoint's settings hold where nothing else was asked for, except the names in but.

        Returns a line for each that was asked for and differs, and for each that is not valid any more.
        """
        lines, taken = [], {}
        for name in self.known.keys() & stored.keys() - set(but):
            try:
                taken[name] = fit(stored[name], self.known[name].hint)
            except TypeError:
                was = f"the checkpoint's {stored[name]!r} is no choice any more"
                lines.append(f'{name}={self.config[name]!r}, as {was}')
        self.update(**taken | self.given)
        return lines + [f'{name}={value!r}, was {taken[name]!r}' for name, value in self.given.items()
                        if taken.get(name, value) != value]

    def shorten(self, total, *parts):
        """A flag that lowers total lowers the parts by the same share, except those that flags set -> lines to show.

        If a flag sets the first part, it lowers none.
        """
        share = min(1.0, self.config[total] / max(1, self.replaced.get(total, self.config[total])))
        free = [] if parts[0] in self.replaced else [name for name in parts if name not in self.replaced]
        old = {name: self.config[name] for name in free if self.config[name]}
        self.update(**{name: round(share * value) for name, value in old.items()})
        return [f'{name}={self.config[name]}, shortened from {value} with {total}' for name, value in old.items()
                if value != self.config[name]]


# mistakes ------------------------------------------------------------------------------------------------------------

def fail(*messages):
    """Print each message as one line `error: ...` on stderr and exit with status 2."""
    for message in messages:
        print('error:', ' '.join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def explain_errors(files=(), hint=lambda error: '', trace=False):
    """From here on a user's mistake that nobody catches ends in one line and status 2, and Ctrl-C quietly in 130.

    Mistakes are an OSError, an ImportError, a ValueError that the project itself raises, and whatever the code of these
    config files raises, such as a mixer's: its line begins with the place, and trace=True shows its traceback, too.
    Anything else is a bug and keeps its traceback, with what hint(error) says below it.
    """
    known = {os.path.abspath(path): path for path in files}
    with contextlib.suppress(AttributeError): # a notebook's, or none at all
        sys.stdout.reconfigure(errors='backslashreplace') # a terminal may lack some of the characters

    def hook(kind, error, tb):
        if kind is KeyboardInterrupt:
            sys.exit(130)
        frames, help_ = traceback.extract_tb(tb), hint(error)
        places = [f'{known[f.filename]}:{f.lineno}' for f in frames if f.filename in known]
        ours = frames[-1].filename.startswith(PROJECT) and '-packages' not in frames[-1].filename
        raised = isinstance(error, ValueError) and ours and frames[-1].line.startswith('raise')
        if trace and places or help_ or not (places or raised or isinstance(error, (OSError, ImportError))):
            sys.__excepthook__(kind, error, tb)
            print(help_, file=sys.stderr)
        if places and not help_:
            fail(f'{places[-1]}: {kind.__name__}: {error}')
        if raised or isinstance(error, (OSError, ImportError)):
            fail(in_words(error))
    sys.excepthook = hook


def end_with_reader():
    """From here on the process ends quietly when nobody reads its output any more, as with | head."""
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def in_words(error):
    """What an exception says, without the "[Errno 2]" that an OSError begins with."""
    if isinstance(error, OSError) and error.strerror:
        names = [repr(name) for name in (error.filename, error.filename2) if name is not None]
        return ': '.join([error.strerror, *names])
    return f'{error}: pip install -r requirements.txt' if isinstance(error, ModuleNotFoundError) else str(error)


def configure(namespace, dataclass=None, argv=None, adopt=lambda cls: None, foreign=()):
    """A script's settings from its defaults, config files and the command line -> Settings.

    namespace: globals() of the script. Its settings are the module-level assignments above the call, except names that
        start with an underscore or are in capitals, and values that are not PLAIN (lists count as tuples).
    dataclass: each of its fields (all need defaults) is a setting too. A default in the script wins over the field's.
    argv: sys.argv[1:] by default.
    adopt: called with each class that a config file has; it may add fields to dataclass. What it returns, a name or
        None, is what the class means as a value. ValueError refuses the class.
    foreign: names of another script's settings. Of a file that sets one of them only out_dir is taken.
    Mistakes are reported all at once: status 2, nothing changed.
    """
    argv = sys.argv[1:] if argv is None else argv
    own, known = find_settings(namespace, dataclass)
    folder = os.path.dirname(os.path.abspath(namespace['__file__']))
    helps = {'--help', '-h'}.intersection(argv)
    argv = [arg for arg in argv if arg not in helps]
    files, flags, _ = read_arguments(argv, folder, known)
    given, mistakes = {}, []
    for path in files: # files can read the flags: with --max_iters=9, lr_decay_iters = max_iters means 9
        defaults = {name: setting.default for name, setting in known.items()}
        assigned = run_file(path, {**defaults, **given, **flags}, mistakes)
        before = set(dir(dataclass))
        adopt_classes(path, assigned, adopt, mistakes)
        mistakes += [f'{path}: a class declares the setting {name}, which the script has: choose another name'
                     for name in sorted((set(dir(dataclass)) - before).intersection(own))]
        known.update(find_settings(namespace, dataclass)[1])
        given.update(check_file(path, assigned, known, foreign, mistakes))
    files, flags, wrong = read_arguments(argv, folder, known) # again: files may have brought settings
    if helps:
        show_help(namespace, known)
    wrong += [line for name, value in (given | flags).items() if (line := outside(name, value, known[name]))]
    if mistakes or wrong:
        fail(*mistakes, *wrong)
    return Settings(namespace, own, known, given, flags, files)


def settings_of(script):
    """The settings of a script beside this file as a namespace for configure(), without running the script."""
    path = os.path.join(PROJECT, script)
    with tokenize.open(path) as f:
        body = ast.parse(f.read()).body
    above = itertools.takewhile(lambda node: 'configure(globals()' not in ast.unparse(node), body)
    namespace = dict(__file__=path, __name__=script.removesuffix('.py'), Literal=typing.Literal)
    for node in above:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and not any(isinstance(n, ast.Call) for n in ast.walk(node)):
            exec(compile(ast.Module([node], []), path, 'exec'), namespace) # a plain value
    return namespace


def yield_if_busy():
    """Call before torch is imported: waiting threads sleep instead of spin if other processes want this CPU.

    Measured on 2 cores: beside one busy process training is 1.7 to 2.0 times as fast so, but alone 4 to 24% slower.
    """
    try:
        others = []
        for _ in range(5):
            with open('/proc/loadavg', encoding='ascii') as f: # "0.12 0.20 0.15 3/417 9999": 3 run now, this one too
                others.append(int(f.read().split()[3].split('/')[0]) - 1)
            time.sleep(0.01)
    except OSError: # not Linux
        return
    if min(others) >= max(1, (os.cpu_count() or 1) / 4):
        os.environ.setdefault('OMP_WAIT_POLICY', 'passive')


# settings, read from the source --------------------------------------------------------------------------------------

def find_settings(namespace, dataclass):
    """Names of the script's own settings, and {name: Setting} of these and the dataclass' fields, in source order."""
    with tokenize.open(namespace['__file__']) as f:
        script = scan(f.read())
    fields = {f.name: f for f in dataclasses.fields(dataclass)} if dataclass else {}
    hints, notes = (typing.get_type_hints(dataclass), scan_class(dataclass)) if dataclass else ({}, {})
    for cls in set(getattr(dataclass, 'declared_by', {}).values()): # mixers
        notes |= {name: (hint, comment, f'mixer {cls.__name__}') for name, (hint, comment, _) in scan_class(cls).items()
                  if name in fields}
    known = {}
    for name, (annotation, comment, group) in script.items():
        try:
            default = fit(namespace[name], PLAIN)
        except (KeyError, TypeError): # not assigned yet: below the call; a device, a module: no setting
            continue
        hint = eval(annotation, namespace) if annotation else hints.get(name)
        known[name] = Setting(default, hint, comment or notes.get(name, ('', '', ''))[1], group)
    own = list(known)
    for name in fields:
        default = fields[name].default
        if default is dataclasses.MISSING:
            default = fields[name].default_factory()
        _, comment, group = notes.get(name, ('', '', ''))
        known.setdefault(name, Setting(default, hints[name], comment, f'{dataclass.__name__}: {group}'.rstrip(': ')))
    for name, setting in known.items():
        try:
            known[name] = setting._replace(default=fit(setting.default, setting.hint))
        except TypeError: # no annotation, or one that says more than a type: the default's type it is
            kind = PLAIN if setting.default is None else type(setting.default)
            if kind is tuple and setting.default:
                kind = tuple[typing.Union[tuple(map(type, setting.default))], ...]
            known[name] = setting._replace(hint=kind)
    return own, known


@functools.cache
def scan_classes(source): # parsed once for all classes: inspect.getsource parses the whole file for each
    """{class: scan of its body} of a script's source."""
    return {node.name: scan(source, node.body) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def scan_class(cls):
    """scan of the class' body; {} for one that was typed in, which has no source."""
    try:
        with tokenize.open(inspect.getsourcefile(cls)) as f:
            return scan_classes(f.read()).get(cls.__name__, {})
    except (OSError, TypeError):
        return {}


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


def choices(hint):
    """The values that the Literals in a hint allow, as a list."""
    return [choice for part in parts(hint) if typing.get_origin(part) is typing.Literal
            for choice in typing.get_args(part)]


def options(hint):
    """The types that a hint allows, as a list; a choice counts as its type."""
    types = [part for part in parts(hint) if typing.get_origin(part) is not typing.Literal]
    return types + [type(choice) for choice in choices(hint)]


def fit(value, hint):
    """value as hint wants it: int for float and whole float for int converted, list to tuple.

    Raises TypeError where it does not fit: bool for int, a value that is none of the choices, and nan or more than
    64 bits for anything.
    """
    allowed = options(hint)
    inner = [(typing.get_args(part) or (PLAIN,))[0] for part in allowed
             if (typing.get_origin(part) or part) in (tuple, list)]
    if isinstance(value, (tuple, list)) and inner:
        return tuple(fit(element, inner[0]) for element in value)
    if isinstance(value, float): # numpy's float64 is one too, but not plain
        value = int(value) if float not in allowed and int in allowed and value.is_integer() else float(value)
    if value != value or type(value) is int and value.bit_length() > 64:
        raise TypeError('no number that fits')
    if type(value) is int and int not in allowed and float in allowed:
        value = float(value)
    same_kind = [choice for choice in choices(hint) if type(choice) is type(value)]
    if type(value) not in allowed or same_kind and value not in same_kind:
        raise TypeError(f'{type(value).__name__} is not {hint}, or none of the choices')
    return value


def parse(text, hint):
    """The command line's text as hint wants it; raises TypeError."""
    word = text.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # Python warns of texts like '\d' and 1or
            value = ast.literal_eval(word)
        several = (value,)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = several = WORDS.get(word, text)
    if isinstance(value, str) or set(options(hint)) <= {str}: # as it is: a run's name may be 2024
        value = text
    if not word or (str, ...) in map(typing.get_args, parts(hint)): # words without quotes
        several = tuple(filter(None, word.split(',')))
    for candidate in value, several, WORDS.get(word, text), text:
        try:
            return fit(candidate, hint)
        except TypeError:
            pass
    raise TypeError(f'{text!r} is not {hint}')


def outside(name, value, setting):
    """What is wrong with a number, or one of several, outside of the interval at the end of a comment; ''."""
    found = re.search(r'([\[(])(\S+), (\S+)([\])])$', setting.comment)
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if type(v) in (int, float)]
    bounds = [(BOUNDS[found[1]], float(found[2])), (BOUNDS[found[4]], float(found[3]))] if found else []
    wrong = any(not inside(bound, v) for inside, bound in bounds for v in numbers)
    return f'{name}={value!r} must lie in {found[0]}' if wrong else ''


# arguments and files -------------------------------------------------------------------------------------------------

def read_arguments(argv, folder, known):
    """Sort arguments into config files (paths), flags (values by name) and mistakes. folder: the script's."""
    def find(arg): # as data.tokens.find_path does
        places = (arg,) if arg.startswith(('./', '../')) else (arg, os.path.join(folder, arg))
        return next((path for path in places if os.path.isfile(path)), None)

    files, flags, mistakes, rest = [], {}, [], list(argv)
    while rest:
        arg = rest.pop(0)
        name, equals, text = arg.lstrip('-').partition('=')
        unknown = f'unknown setting {"--" + name!r}{nearest(name, known, "--")}; --help lists all'
        if not arg.startswith('--'):
            if find(arg):
                files.append(find(arg))
            elif name in known:
                mistakes.append(f'{arg!r}: a setting takes two dashes and =, as in {example(name, known[name])}')
            else:
                mistakes.append(f'no config file {arg!r} here or in {folder}; a setting is written --key=value')
        elif not equals and rest and not (rest[0].startswith('--') or rest[0].endswith('.py') or find(rest[0])):
            value = rest.pop(0) # which must not count as a config file that is missing
            spaced = f'--{name} {value!r}: write = instead of the space, --{name}={value}'
            mistakes.append(spaced if name in known else unknown)
        elif name not in known:
            mistakes.append(unknown)
        elif not equals and bool not in options(known[name].hint):
            mistakes.append(f'--{name} needs a value, as in {example(name, known[name])}')
        else:
            try:
                flags[name] = parse(text, known[name].hint) if equals else True
            except TypeError:
                mistakes.append(misfit(name, text, known[name], '--'))
    return files, flags, mistakes


def run_file(path, known, mistakes):
    """Execute a config file, which can read the values in known. Returns what it assigned; {} if it fails."""
    place = os.path.abspath(path)
    # a module where inspect and torch.compile look for it, under a name that hides no other
    module = types.ModuleType(f'config:{os.path.splitext(os.path.basename(path))[0]}')
    sys.modules[module.__name__], assigned = module, vars(module)
    # The known values join its builtins, so its globals are exactly what it assigned, equal to the default or not.
    assigned.update({'__builtins__': {**vars(builtins), **known}, '__file__': place})
    try:
        with open(path, 'rb') as f:
            exec(compile(f.read(), place, 'exec'), assigned)
        return assigned
    except Exception as e:
        # a SyntaxError has run nothing yet
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f.lineno for f in frames if f.filename == place] or [getattr(e, 'lineno', None)]
        where = f'{path}:{lines[-1]}' if lines[-1] else path
        mistakes.append(f'{where}: {type(e).__name__}: {getattr(e, "msg", None) or e}')
        return {}


def adopt_classes(path, assigned, adopt, mistakes):
    """Hand a file's classes to adopt, and put their names in the place of classes that are values of settings."""
    names = {}
    for cls in {value for value in assigned.values() if isinstance(value, type)}:
        try:
            names[cls] = adopt(cls) or cls
        except ValueError as e:
            mistakes.append(f'{path}: {e}')
            names[cls] = cls.__name__ # so that nothing more is said of it

    def name_of(value):
        if isinstance(value, (tuple, list)):
            return tuple(map(name_of, value))
        return names[value] if isinstance(value, type) else value
    assigned.update({name: name_of(value) for name, value in assigned.items()
                     if not (isinstance(value, type) and value.__name__ == name)})


def check_file(path, assigned, known, foreign, mistakes):
    """The settings among what a file assigned, by name. Adds to mistakes."""
    if not assigned:
        return {}
    with tokenize.open(path) as f:
        tree = ast.parse(f.read())
    # what the file imports is no setting: only what it assigns
    lines = {node.id: f':{node.lineno}' for node in ast.walk(tree)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if any(name in foreign and name not in known for name in assigned):
        assigned = {name: assigned[name] for name in ('out_dir',) if name in assigned}
    values = {}
    for name, value in assigned.items():
        where = path + lines.get(name, '')
        if name in known:
            try:
                values[name] = fit(value, known[name].hint)
            except TypeError:
                wrong = misfit(name, value, known[name])
                if isinstance(value, type):
                    wrong = f'{name} = {value.__name__} is a class that cannot be one: derive it from Mixer in model.py'
                mistakes.append(f'{where}: {wrong}')
        elif name in lines and not (name.startswith('_') or callable(value) or isinstance(value, types.ModuleType)):
            mistakes.append(f'{where}: unknown setting {name!r}{nearest(name, known)}; '
                            'a helper\'s name must start with an underscore')
    return values


# words ---------------------------------------------------------------------------------------------------------------

def nearest(name, known, dashes=''):
    match = difflib.get_close_matches(name, known, 1)
    return f', did you mean {dashes}{match[0]}?' if match else ''


def type_name(hint):
    """The choices and types of a hint: "cosine | linear", "int | None"."""
    names = [inspect.formatannotation(part).replace('typing.', '').replace('NoneType', 'None')
             for part in parts(hint) if typing.get_origin(part) is not typing.Literal]
    return ' | '.join([str(choice) for choice in choices(hint)] + names)


def misfit(name, value, setting, dashes=''):
    """What to say of a value that does not fit its setting."""
    if choices(setting.hint):
        return f"{name}={value!r} is not one of {type_name(setting.hint).replace(' | ', ', ')}"
    way = example(name, setting) if dashes else f'{name} = {setting.default!r}'
    return f'{dashes}{name}={value!r}: expected {type_name(setting.hint)}, as in {way}'


def example(name, setting):
    """--name=default, in a form that shells and parse() take where there is one."""
    value = str(setting.default)
    if isinstance(setting.default, tuple) and setting.default:
        value = ','.join(map(str, setting.default))
    return f'--{name}={value if value.isprintable() else repr(value)}'


def show_help(namespace, known):
    """Print the script's docstring, then the settings by group: default, comment, type. Status 0."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    left = min(34, max((len(example(*item)) for item in known.items()), default=0) + 4)
    script, group = os.path.basename(namespace['__file__']), ''
    lines = [inspect.cleandoc(namespace.get('__doc__') or script), '',
             f'usage: python {script} [config.py ...] [--key=value ...]', '', 'settings, with their defaults:']
    for name, setting in known.items():
        if setting.group != group:
            group = setting.group
            lines += ['', textwrap.fill(group, width)]
        head = f'  {example(name, setting)}'
        if len(head) > left - 2: # too long to stand beside its comment
            lines.append(head)
            head = ''
        for text in textwrap.wrap(f'{setting.comment} ({type_name(setting.hint)})'.strip(), width - left):
            lines.append(head.ljust(left) + text)
            head = ''
    sys.stdout.reconfigure(errors='backslashreplace') # a terminal may lack some of the characters
    end_with_reader()
    print('\n'.join(lines), flush=True)
    sys.exit(0)
