"""Calls that give a module what belongs to one process: which of them a template notes, and that it leaves no trace."""

from __future__ import annotations

import importlib
import os
import pickle
import random
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from harness import in_child

from mpmm.multi_process_shared.forkserver.leftovers import Watch
from mpmm.multi_process_shared.forkserver.noted_calls import NotedCalls, _Noting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has servers that are forked")
PLACES = [(os, "getpid"), (os, "urandom"), (os, "getrandom"), (random, "_urandom"), (uuid, "_generate_time_safe")]
PLACES += [(tempfile, "mkdtemp"), (tempfile, "_mkstemp_inner"), (tempfile, "mktemp")]
LIBRARY = """
import os, secrets, tempfile
PID, TOKEN = os.getpid(), secrets.token_hex(4)
def draw():
    return os.urandom(4)
def ask():
    return os.getpid()
"""
Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules of the user, and installed ones, whose names begin with `lib` or `matplotlib`."""
    folders = tmp_path / "own", tmp_path / "site-packages"
    for folder in folders:
        folder.mkdir()
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written: list[str] = []

    def one(name: str, code: str) -> str:
        (folders[name.startswith(("lib", "matplotlib"))] / f"{name}.py").write_text(code)
        written.append(name)
        importlib.invalidate_caches()
        return name

    yield one
    for name in written:
        sys.modules.pop(name, None)


def problem_of(name: str, *, known: bool = False) -> str | None:
    """Return what a template finds wrong with the import of a module."""

    def judge() -> str | None:
        # Tests by examples seed the generators, and no template begins with one that was seeded.
        numpy_random: Any = numpy.random
        numpy_random.set_bit_generator(numpy_random.MT19937())
        watch = Watch(dict(os.environ))
        if known:
            watch.known("numpy.random")
        watch.begin()
        try:
            importlib.import_module(name)
        finally:
            watch.end()
        return watch.problem()

    found: str | None = in_child(judge)
    return found


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; PID = os.getpid()", "the pid"),
        ("from os import getpid; NAME = f'/tmp/of-{getpid()}'", "the pid"),
        ("import psutil; OWN = psutil.Process()", "the pid"),
        ("import multiprocessing; PID = multiprocessing.current_process().pid", "the pid"),
        ("import os; SEED = os.urandom(4)", "random bytes"),
        ("import os; SEED = os.getrandom(4)", "random bytes"),
        ("import uuid; ID = uuid.uuid4()", "random bytes"),
        ("import secrets; TOKEN = secrets.token_hex(4)", "random bytes"),
        ("import random; TOKEN = random.SystemRandom().random()", "random bytes"),
        ("import os, functools; SEEDS = list(map(os.urandom, [4, 4]))", "random bytes"),
        ("import uuid\nclass Named:\n    id = (lambda: uuid.uuid4())()", "random bytes"),
        ("exec('import uuid; ID = uuid.uuid4()')", "random bytes"),
        ("import lib_drawing; DRAWN = lib_drawing.draw()", "random bytes"),
        ("import tempfile; NAME = tempfile.mktemp()", "the name of a temporary file"),
        # Libraries compare the pid later, or log it.
        ("import lib_drawing; PID = lib_drawing.ask()", None),
        ("import logging; logging.getLogger('mpmm.test').warning('imported')", None),
        ("import os, tempfile; os.makedirs(tempfile.gettempdir() + '/cache', exist_ok=True)", None),
        ("import tempfile\nwith tempfile.TemporaryDirectory(): pass", None),
        ("import random; OWN = random.Random(); NUMBER = random.random()", None),
        ("import multiprocessing, concurrent.futures, asyncio, threading, ssl; lock = threading.Lock()", None),
        ("import os, uuid, tempfile\ndef later(): return os.getpid(), uuid.uuid4(), tempfile.mkdtemp()", None),
    ],
)
def test_calls_of_a_users_module_are_noted_if_it_may_keep_what_belongs_to_one_process(
    write: Write, code: str, problem: str | None
) -> None:
    write("lib_drawing", LIBRARY)
    assert problem_of(write("mpmm_test_own", code)) == (problem and f"{problem} in mpmm_test_own")


def test_a_call_counts_for_the_module_whose_code_it_serves(write: Write) -> None:
    write("mpmm_test_inner", "import uuid; ID = uuid.uuid4()")
    assert problem_of(write("mpmm_test_outer", "import mpmm_test_inner")) == "random bytes in mpmm_test_inner"
    write("lib_drawing", LIBRARY)
    assert problem_of(write("mpmm_test_user", "import lib_drawing")) is None


@pytest.mark.skipif(uuid._generate_time_safe is None, reason="needs libuuid")  # type: ignore[attr-defined]  # private
def test_a_uuid_of_the_time_is_noted(write: Write) -> None:
    assert problem_of(write("mpmm_test_own", "import uuid; ID = uuid.uuid1()")) == "random bytes in mpmm_test_own"


@pytest.mark.parametrize(
    "code",
    [
        "import tempfile; FOLDER = tempfile.mkdtemp()",
        "import os, tempfile; fd, PATH = tempfile.mkstemp(); os.close(fd)",
        "import tempfile\nwith tempfile.NamedTemporaryFile(delete=False) as file: PATH = file.name",
    ],
)
def test_temporary_files_that_an_import_leaves_are_noted_for_all_modules(write: Write, code: str) -> None:
    assert problem_of(write("mpmm_test_own", code)) == "a temporary file of mpmm_test_own"
    assert problem_of(write("lib_making", code)) == "a temporary file of lib_making"
    # It makes a folder of settings where the home folder is read-only.
    assert problem_of(write("matplotlib", code)) is None
    again = "import os, shutil\nos.remove(PATH) if 'PATH' in globals() else shutil.rmtree(FOLDER)"
    assert problem_of(write("mpmm_test_tidy", f"{code}\n{again}")) is None


@pytest.mark.parametrize("known", [False, True])
def test_generators_of_numpy_are_left_to_the_watch_on_them(write: Write, known: bool) -> None:
    code = "import numpy.random; OWN = [numpy.random.default_rng(), numpy.random.RandomState(), numpy.random.PCG64()]"
    assert problem_of(write("mpmm_test_own", code), known=known) is None


def test_what_mpmm_calls_is_not_noted(write: Write) -> None:
    code = "from mpmm.multi_process_shared.forkserver import noted_calls\nfound = noted_calls.asked()"

    def judge() -> str | None:
        own: dict[str, Any] = {"__name__": "mpmm.anything"}
        exec("import os\ndef asked(): return os.getpid(), os.urandom(4)", own)
        module: Any = sys.modules[NotedCalls.__module__]
        module.asked = own["asked"]
        calls = NotedCalls()
        calls.begin()
        importlib.import_module(name)
        calls.end()
        return calls.problem()

    name = write("mpmm_test_own", code)
    assert in_child(judge) is None


@pytest.mark.parametrize("failure", ["", "raise SystemExit", "raise KeyboardInterrupt"])
def test_after_an_import_the_functions_are_back_and_what_still_holds_an_object_can_use_it(
    write: Write, failure: str
) -> None:
    code = """
import os, pickle, threading
from os import getpid, urandom
from tempfile import mkdtemp
class Asks:
    ask = os.getpid
def default(ask=os.getpid):
    return ask
pickled = pickle.dumps(os.getpid)
drawn = []
threads = [threading.Thread(target=lambda: drawn.append(os.urandom(4))) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
import sys
sys.mpmm_test_kept = Asks, default, pickled, drawn
"""
    name = write("mpmm_test_keeps", code + failure)

    def judge() -> None:
        before = [getattr(module, name, None) for module, name in PLACES]
        calls = NotedCalls()
        for _ in range(2):
            calls.begin()
            assert type(os.getpid) is _Noting
            try:
                module: Any = importlib.import_module(name)
            except BaseException:
                module = None
            finally:
                calls.end()
            # No object is replaced twice, nor at the wrong time.
            calls.end()
            found = [getattr(place, function, None) for place, function in PLACES]
            assert all(one is other for one, other in zip(found, before, strict=True))
        assert (module is None) == bool(failure)
        if module is not None:
            assert (module.getpid, module.urandom, module.mkdtemp) == (os.getpid, os.urandom, tempfile.mkdtemp)
        asks, default, pickled, drawn = sys.mpmm_test_kept  # type: ignore[attr-defined]  # the module's
        assert asks().ask() == default()() == os.getpid()
        assert pickle.loads(pickled) is os.getpid
        assert len(set(drawn)) == 4
        calls._first = None
        default()()
        assert calls.problem() is None

    in_child(judge)


def test_a_function_that_an_import_replaces_stays_replaced(write: Write) -> None:
    name = write("mpmm_test_patches", "import os\nos.getpid = lambda: 42")

    def judge() -> int:
        calls = NotedCalls()
        calls.begin()
        importlib.import_module(name)
        calls.end()
        return os.getpid()

    assert in_child(judge) == 42


def test_a_failing_call_fails_as_before_and_is_not_noted(write: Write) -> None:
    code = "import os\ntry: os.urandom(-1)\nexcept ValueError as error: text = str(error)\nelse: raise AssertionError"
    assert problem_of(write("mpmm_test_own", code)) is None
