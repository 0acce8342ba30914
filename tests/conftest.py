import os
import signal
import sys
from pathlib import Path

# before torch is imported: the tests' matrices are so small that a second thread only gets in the way
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['HF_HUB_OFFLINE'] = '1' # no test asks the network

import pytest
import torch

with torch.device('meta'): # lists torch's constructors, once a process; transformers later replaces one for a while
    torch.empty(1)

# where the tests run in a shell's background Ctrl-C is ignored, and every process that they start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_addoption(parser):
    parser.addoption('--mixer', help="a config file: test the mixer that it defines, by tests/test_mixers.py")
    parser.addoption('--all', action='store_true', help="the long tests, too: kills, torchrun, exports, compilers")


def pytest_configure(config):
    config.addinivalue_line('markers', 'long(why): takes many seconds, so only --all runs it')
    if getattr(config.option, 'dist', None) == 'load':
        config.option.dist = 'loadgroup'
    if config.getoption('--mixer'): # in the workers, too
        os.environ['MIXER'] = str(Path(config.getoption('--mixer')).resolve())


@pytest.hookimpl(tryfirst=True) # pytest-xdist's looks for the groups
def pytest_collection_modifyitems(config, items):
    for item in items:
        mark = item.get_closest_marker('long')
        if mark and not (config.getoption('--all') or config.getoption('--mixer')):
            item.add_marker(pytest.mark.skip(reason=f'--all runs it: {mark.args[0]}'))
    for item in items: # what shares real runs stays in one process, or each would make them all again
        if 'jobs' in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if config.getoption('--mixer'): # the contract of that mixer, and none of the tests of others
        tested = getattr(sys.modules.get('test_mixers'), 'TESTED', ())
        items[:] = [item for item in items
                    if hasattr(item, 'callspec') and any(name in item.callspec.id for name in tested)]


def pytest_sessionfinish():
    if 'helpers' in sys.modules:
        sys.modules['helpers'].end_server()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0) # the same numbers whichever tests ran before


def pytest_terminal_summary(terminalreporter):
    """What --all adds, and the largest deviation of each architecture that the mixers' contract was checked on."""
    left = [report for report in terminalreporter.getreports('skipped') if '--all runs it: ' in str(report.longrepr)]
    for report in left:
        terminalreporter.write_line(f"left out: {report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
    found = [value for report in terminalreporter.getreports('passed') for name, value in report.user_properties
             if name == 'deviation']
    if found:
        terminalreporter.write_line(f"mixer contract: {len(found)} architectures, largest deviation {max(found):.1e}")
