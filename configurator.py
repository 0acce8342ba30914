"""Settings of a script, changed by config files and the command line. They are typed, checked and listed by --help.

    batch_size = 12 # sequences in a micro-batch [1, inf)
    top_k: int | None = 200 # keep only the k most likely tokens; None: all [1, inf)
    settings = configure(globals())

    python script.py config/a.py config/b.py --batch_size=32 --flag

An interval at the end of a comment gives the allowed range of a number; a round bracket excludes its end. Config files
are Python and run with the rights of the user. Later files override earlier ones, and the command line overrides files,
whatever the order.
"""
import ast
import builtins
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
from contextlib import suppress

PROJECT = os.path.dirname(os.path.abspath(__file__))
PLAIN = bool | int | float | str | tuple | None # what a setting can hold
WORDS = {'true': True, 'false': False, '1': True, '0': False, 'inf': float('inf'), '-inf': -float('inf')}
END_WITH_READER = getattr(signal, 'SIGPIPE', signal.SIGTERM), signal.SIG_DFL # as in | head; Windows has no SIGPIPE
BOUNDS = {'[': operator.le, '(': operator.lt, ']': operator.ge, ')': operator.gt} # called as (bound, number)


class Setting(typing.NamedTuple):
    default: object
    hint: object # allowed type: int, float | None, tuple[int, ...], Literal['cosine', 'linear']
    comment: str
    group: str # its heading in --help


class Settings:
    """A script's settings: config has all values by name, given those that a file or the command line set, replaced the
    value that each flag replaced, and files the paths of the config files.
    """
    def __init__(self, namespace, own, known, given, flags, files):
        self.namespace, self.own, self.known, self.files = namespace, own, known, files
        self.config = {name: setting.default for name, setting in known.items()} | given
        self.given, self.replaced = given | flags, {name: self.config[name] for name in flags}
        self.update(**flags)

    def update(self, **values):
        """Sets values, also in the script's namespace."""
        self.config.update(values)
        self.namespace.update({name: self.config[name] for name in self.own})

    def refuse(self, rules):
        """Raises one ValueError for all (condition, message) whose condition holds; settings fill the messages."""
        broken = [message.format(**self.config) for condition, message in rules if condition]
        if broken:
            raise ValueError('; '.join(broken))

    def take(self, stored, but):
        """Takes over a checkpoint's settings, except given ones and the names in but. Returns lines on what differs."""
        lines, taken = [], {}
        for name in self.known.keys() & stored.keys() - set(but):
            try:
                taken[name] = fit(stored[name], self.known[name].hint)
            except TypeError:
                lines.append(f"{name}={self.config[name]!r}: the checkpoint's {stored[name]!r} is no longer a choice")
        self.update(**taken | self.given)
        return lines + [f'{name}={value!r}, was {taken[name]!r}' for name, value in self.given.items()
                        if taken.get(name, value) != value]

    def shorten(self, total, *parts):
        """If a flag lowered total, lowers the parts in proportion, but for those that flags set -> lines to show."""
        share = min(1.0, self.config[total] / max(1, self.replaced.get(total, self.config[total])))
        free = [] if parts[0] in self.replaced else [name for name in parts if name not in self.replaced]
        old = {name: self.config[name] for name in free if self.config[name]}
        self.update(**{name: round(share * value) for name, value in old.items()})
        return [f'{name}={self.config[name]}, shortened from {value} with {total}' for name, value in old.items()
                if value != self.config[name]]


# mistakes ------------------------------------------------------------------------------------------------------------

def fail(*messages):
    """Prints each message as one line `error: ...` on stderr and exits with status 2."""
    for message in messages:
        print('error:', ' '.join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def explain_errors(files=(), hint=lambda error: '', trace=False):
    """From now on, an uncaught user mistake prints one line and exits with 2; Ctrl-C exits silently with 130.

    Mistakes are OSError, ImportError, a ValueError raised by this project, and any exception from code in the config
    files, such as a mixer's. The line for the latter starts with its location; trace=True also prints the traceback.
    Any other exception is a bug: it keeps its traceback, followed by hint(error).
    """
    known = {os.path.abspath(path): path for path in files}
    with suppress(AttributeError): # a notebook's, or none at all
        sys.stdout.reconfigure(errors='backslashreplace') # a terminal may lack some of the characters

    def hook(kind, error, tb):
        if kind is KeyboardInterrupt:
            sys.exit(130)
        frames, help_ = traceback.extract_tb(tb), hint(error)
        places, last = [f'{known[f.filename]}:{f.lineno}' for f in frames if f.filename in known], frames[-1]
        ours = last.filename.startswith(PROJECT) and '-packages' not in last.filename and last.line.startswith('raise')
        is_mistake = places or isinstance(error, (OSError, ImportError)) or isinstance(error, ValueError) and ours
        if trace and places or help_ or not is_mistake:
            sys.__excepthook__(kind, error, tb)
        if help_:
            print(help_, file=sys.stderr)
        elif is_mistake:
            fail(f'{places[-1]}: {kind.__name__}: {error}' if places else in_words(error))
    sys.excepthook = hook


def in_words(error):
    """The message of an exception, without the "[Errno 2]" at the start of an OSError."""
    if isinstance(error, OSError) and error.strerror:
        names = [repr(name) for name in (error.filename, error.filename2) if name is not None]
        return ': '.join([error.strerror, *names])
    return f'{error}: pip install -r requirements.txt' if isinstance(error, ModuleNotFoundError) else str(error)


def configure(namespace, dataclass=None, argv=None, adopt=lambda cls: None, foreign=()):
    """Returns the Settings of a script, from its defaults, the config files and the command line.

    namespace: globals() of the script. Its settings are the module-level assignments above the call, except names that
        start with an underscore or are in capitals, and values that are not PLAIN (lists count as tuples).
    dataclass: each of its fields (all need defaults) is also a setting. The script's default overrides the field's.
    adopt: called with each class defined in a config file; it may add fields to dataclass. It returns the name that
        stands for the class as a setting's value, or None, and raises ValueError to reject the class.
    foreign: names of another script's settings. From a file that sets one of them, only out_dir is used.
    All mistakes are reported together; the script then exits with status 2 and has changed nothing.
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
        given.update(check_file(path, assigned, known, foreign, mistakes) if assigned else {})
    files, flags, wrong = read_arguments(argv, folder, known) # again: files may have brought settings
    if helps:
        show_help(namespace, known)
    wrong += [line for name, value in (given | flags).items() if (line := outside(name, value, known[name]))]
    if mistakes or wrong:
        fail(*mistakes, *wrong)
    return Settings(namespace, own, known, given, flags, files)


def settings_of(script):
    """The settings of a script in this folder, as a namespace for configure(); the script is not run."""
    path = os.path.join(PROJECT, script)
    with tokenize.open(path) as f:
        tree = ast.parse(f.read())
    above = itertools.takewhile(lambda node: 'configure(globals()' not in ast.unparse(node), tree.body)
    namespace = dict(__file__=path, __name__=script.removesuffix('.py'), __doc__=ast.get_docstring(tree, clean=False),
                     Literal=typing.Literal)
    for node in above:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and not any(isinstance(n, ast.Call) for n in ast.walk(node)):
            exec(compile(ast.Module([node], []), path, 'exec'), namespace) # a plain value
    return namespace


def fields_of(script):
    """The fields of all classes in a script of this folder, as a dataclass for configure(); the script is not run."""
    path = os.path.join(PROJECT, script)
    with tokenize.open(path) as f:
        classes = [node for node in ast.parse(f.read()).body if isinstance(node, ast.ClassDef)]
    for node in classes:
        node.body, node.bases, node.decorator_list = [n for n in node.body if isinstance(n, ast.AnnAssign)], [], []
    module = sys.modules[f'fields:{script}'] = types.ModuleType(f'fields:{script}') # inspect looks for a module
    module.__file__, module.Literal = path, typing.Literal
    exec(compile(ast.Module([node for node in classes if node.body], []), path, 'exec'), vars(module))
    first, *others = [value for value in vars(module).values() if isinstance(value, type)]
    first.declared_by = {name: cls for cls in others for name in cls.__annotations__}
    for name, cls in first.declared_by.items():
        first.__annotations__[name] = cls.__annotations__[name]
        setattr(first, name, vars(cls)[name])
    return dataclasses.dataclass(first)


def answer_early(script, model=None):
    """Answers --help and reports mistakes in the flags before the script imports torch, which takes seconds. model: the
    file of its dataclass. If there are config files, configure() has to do it: they are programs, which import torch.
    """
    if not read_arguments(sys.argv[1:], PROJECT, {})[0]:
        configure(settings_of(script), model and fields_of(model))


def yield_if_busy():
    """Makes waiting threads sleep instead of spin if other processes use this CPU. Call before importing torch.

    Measured on 2 cores: training is 1.7 to 2.0 times as fast beside one busy process, but 4 to 24% slower if alone.
    """
    running = []
    with suppress(OSError): # not Linux
        for _ in range(5):
            with open('/proc/loadavg', encoding='ascii') as f: # "0.12 0.20 0.15 3/417 9999": 3 run now, this one too
                running.append(int(f.read().split()[3].split('/')[0]))
            time.sleep(0.01)
    if min(running, default=1) - 1 >= max(1, os.cpu_count() / 4):
        os.environ.setdefault('OMP_WAIT_POLICY', 'passive')


# settings, read from the source --------------------------------------------------------------------------------------

def find_settings(namespace, dataclass):
    """Names of the script's own settings, and {name: Setting} for them and the dataclass fields, in source order."""
    with tokenize.open(namespace['__file__']) as f:
        script = scan(f.read())
    fields = {f.name: f for f in dataclasses.fields(dataclass)} if dataclass else {}
    hints, notes = (typing.get_type_hints(dataclass), scan_class(dataclass)) if dataclass else ({}, {})
    for cls in dict.fromkeys(getattr(dataclass, 'declared_by', {}).values()): # mixers; several may share a setting
        notes = {name: (hint, comment, f'mixer {cls.__name__}') for name, (hint, comment, _) in scan_class(cls).items()
                 if name in fields} | notes
    known = {}
    for name, (annotation, comment, group) in script.items():
        try:
            default = fit(namespace[name], PLAIN)
        except (KeyError, TypeError): # assigned below the call, or no plain value such as a module
            continue
        hint = eval(annotation, namespace) if annotation else hints.get(name)
        known[name] = Setting(default, hint, comment or notes.get(name, ('', '', ''))[1], group)
    own = list(known)
    for name in fields:
        _, comment, group = notes.get(name, ('', '', ''))
        group = f'{dataclass.__name__}: {group}'.rstrip(': ')
        known.setdefault(name, Setting(fields[name].default, hints[name], comment, group))
    for name, setting in known.items():
        try:
            known[name] = setting._replace(default=fit(setting.default, setting.hint))
        except TypeError: # no annotation, or one that is no type: use the default's type
            kind = PLAIN if setting.default is None else type(setting.default)
            if kind is tuple and setting.default:
                kind = tuple[typing.Union[tuple(map(type, setting.default))], ...]
            known[name] = setting._replace(hint=kind)
    return own, known


@functools.cache
def scan_classes(source): # parsed once for all classes: inspect.getsource parses the whole file for each
    """{class name: scan of its body} for a script's source."""
    return {node.name: scan(source, node.body) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def scan_class(cls):
    """scan of the class body; {} if the class has no source, as in an interactive session."""
    try:
        with tokenize.open(inspect.getsourcefile(cls)) as f:
            return scan_classes(f.read()).get(cls.__name__, {})
    except (OSError, TypeError):
        return {}


def scan(source, body=None):
    """{name: (annotation, comment, group)} of the assignments at the top level of a script or in a class body.
    The comment stands behind the value, and in deeper indented lines under it; the group in the nearest lines above.
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
    """List of the members of a union, or of the hint itself."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def choices(hint):
    """List of the values that the Literals in a hint allow."""
    return [choice for part in parts(hint) if typing.get_origin(part) is typing.Literal
            for choice in typing.get_args(part)]


def options(hint):
    """List of the types that a hint allows, including the types of its choices."""
    types = [part for part in parts(hint) if typing.get_origin(part) is not typing.Literal]
    return types + [type(choice) for choice in choices(hint)]


def fit(value, hint):
    """Returns value converted to hint: an int to float, a whole float to int, a list to tuple.

    Raises TypeError if it does not fit: a bool for an int, a value that is not among the choices, nan, or an int of
    more than 64 bits.
    """
    allowed = options(hint)
    inner = [(typing.get_args(part) or (PLAIN,))[0] for part in allowed
             if (typing.get_origin(part) or part) in (tuple, list)]
    if isinstance(value, (tuple, list)) and inner:
        return tuple(fit(element, inner[0]) for element in value)
    if isinstance(value, float): # numpy's float64 is a float too, but not a plain one
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
    """Converts text from the command line to hint. Raises TypeError."""
    word = text.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # Python warns about texts such as '\d' and 1or
            value = ast.literal_eval(word)
        several = (value,)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = several = WORDS.get(word, text)
    if isinstance(value, str) or set(options(hint)) <= {str}: # unchanged: the name of a run may be 2024
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
    """Error message for a number (or one of a tuple) outside the interval at the end of the comment, or ''."""
    found = re.search(r'([\[(])(\S+), (\S+)([\])])$', setting.comment)
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if type(v) in (int, float)]
    bounds = [(BOUNDS[found[1]], float(found[2])), (BOUNDS[found[4]], float(found[3]))] if found else []
    inside = all(is_right(bound, v) for is_right, bound in bounds for v in numbers)
    return '' if inside else f'{name}={value!r} must lie in {found[0]}'


# arguments and files -------------------------------------------------------------------------------------------------

def read_arguments(argv, folder, known):
    """Sorts arguments into config files (paths), flags (values by name) and mistakes. folder: that of the script."""
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
            value = rest.pop(0) # so that it is not reported as a missing config file
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
    """Executes a config file, which can read the values in known. Returns what it assigned; {} if it fails."""
    place = os.path.abspath(path)
    # inspect and torch.compile look for a module in sys.modules; this name cannot shadow another module
    module = types.ModuleType(f'config:{os.path.splitext(os.path.basename(path))[0]}')
    sys.modules[module.__name__], assigned = module, vars(module)
    # The known values go into its builtins, so its globals are exactly what it assigned, even if equal to the default.
    assigned.update({'__builtins__': {**vars(builtins), **known}, '__file__': place})
    try:
        with open(path, 'rb') as f:
            exec(compile(f.read(), place, 'exec'), assigned)
        return assigned
    except (Exception, SystemExit) as e: # a file that ends the program would end it without a word
        # after a SyntaxError there are no frames, since nothing ran
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f.lineno for f in frames if f.filename == place] or [getattr(e, 'lineno', None)]
        where = f'{path}:{lines[-1]}' if lines[-1] else path
        mistakes.append(f'{where}: {type(e).__name__}: {getattr(e, "msg", None) or e}')
        return {}


def adopt_classes(path, assigned, adopt, mistakes):
    """Passes a file's classes to adopt, and replaces classes that are values of settings by their names."""
    names = {}
    for cls in {value for value in assigned.values() if isinstance(value, type)}:
        try:
            names[cls] = adopt(cls) or cls
        except ValueError as e:
            mistakes.append(f'{path}: {e}')
            names[cls] = cls.__name__ # so that it is reported only once

    def name_of(value):
        if isinstance(value, (tuple, list)):
            return tuple(map(name_of, value))
        return names[value] if isinstance(value, type) else value
    assigned.update({name: name_of(value) for name, value in assigned.items()
                     if not (isinstance(value, type) and value.__name__ == name)})


def check_file(path, assigned, known, foreign, mistakes):
    """The settings among what a file assigned, by name. Adds to mistakes."""
    with tokenize.open(path) as f:
        tree = ast.parse(f.read())
    # only names that the file assigns are settings, not those it imports
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
    """The choices and types of a hint as text: "cosine | linear", "int | None"."""
    names = [inspect.formatannotation(part).replace('typing.', '').replace('NoneType', 'None')
             for part in parts(hint) if typing.get_origin(part) is not typing.Literal]
    return ' | '.join([str(choice) for choice in choices(hint)] + names)


def misfit(name, value, setting, dashes=''):
    """Error message for a value that does not fit its setting."""
    if choices(setting.hint):
        return f"{name}={value!r} is not one of {type_name(setting.hint).replace(' | ', ', ')}"
    way = example(name, setting) if dashes else f'{name} = {setting.default!r}'
    return f'{dashes}{name}={value!r}: expected {type_name(setting.hint)}, as in {way}'


def example(name, setting):
    """--name=default, where possible in a form that shells and parse() accept."""
    value = str(setting.default)
    if isinstance(setting.default, tuple) and setting.default:
        value = ','.join(map(str, setting.default))
    return f'--{name}={value if value.isprintable() else repr(value)}'


def show_help(namespace, known):
    """Prints the script's docstring and the settings by group (default, comment, type); exits with status 0."""
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
        if len(head) > left - 2: # too long for one line with its comment
            lines.append(head)
            head = ''
        text = f'{setting.comment} ({type_name(setting.hint)})'.strip()
        lines.append(textwrap.fill(text, width, initial_indent=head.ljust(left), subsequent_indent=' ' * left))
    sys.stdout.reconfigure(errors='backslashreplace') # a terminal may lack some of the characters
    signal.signal(*END_WITH_READER)
    print('\n'.join(lines), flush=True)
    sys.exit(0)
