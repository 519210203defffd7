"""Servers that are forked: from whom, in which surroundings, and what is left when the zygote dies."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import shared_workers
from counters import Counter, Importing, Imports, Surroundings, die_in_constructor, fail_to_construct
from harness import SCALE, import_path
from patience import DEADLINE_S, Stopwatch
from shared_workers import LAST_CLIENT_S, Client, acquire, is_running, wait_until

from mpmm.errors import ServerStartError
from mpmm.multi_process_shared import MultiProcessShared, server_pid, unload
from mpmm.multi_process_shared.context import ServerContext, serving_for
from mpmm.multi_process_shared.forkserver import client as forkserver_client
from mpmm.multi_process_shared.forkserver.client import zygote_pid
from mpmm.multi_process_shared.forkserver.zygote import PROCESS_NAME
from mpmm.multi_process_shared.registry import registry_for

pytestmark = pytest.mark.skipif(not forkserver_client._has_pidfd(), reason="needs descriptors of processes")
path = shared_workers.path
new_worker = shared_workers.new_worker

# How long a template may take for modules that import nothing themselves.
LEARN_TIMEOUT_S = 20.0


def shared(path: str, tag: str = "it", constructor: Callable[[], Any] = Counter) -> Any:
    return MultiProcessShared(constructor, tag, path=path, spawn_process=True).acquire()


def parent_of(pid: int) -> int:
    return int(psutil.Process(pid).ppid())


def zygote_of(path: str) -> int:
    pid = zygote_pid(registry_for(path))
    assert pid is not None
    return pid


def templates_of(path: str) -> list[int]:
    found = [child for child in psutil.Process(zygote_of(path)).children() if child.name() == PROCESS_NAME]
    return [child.pid for child in found if is_running(child.pid)]


def parent_in(memory: dict[str, Any], tag: str, path: str) -> tuple[int, int]:
    """Acquire in a worker; return the pid of the server and its parent."""
    pid = acquire(memory, tag, path)
    return pid, parent_of(pid)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes modules that note in a file, named as they are, the pids that import them."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def make(name: str, code: str = "") -> str:
        note = folder / f"{name}.pids"
        lines = ["import os", f"open({str(note)!r}, 'a').write(f'{{os.getpid()}}\\n')", "answer = 41", code]
        (folder / f"{name}.py").write_text("\n".join(lines))
        return name

    make.folder = folder  # type: ignore[attr-defined]  # for whoever needs it
    return make


def pids_that_imported(modules: Any, name: str) -> list[int]:
    note: Path = modules.folder / f"{name}.pids"
    return [int(line) for line in note.read_text().split()] if note.exists() else []


def wait_for_template_with(path: str, modules: Any, name: str, timeout_s: float = LEARN_TIMEOUT_S) -> int:
    """Wait until a template has imported the module; return its pid."""

    def found() -> list[int]:
        return [pid for pid in pids_that_imported(modules, name) if pid in templates_of(path)]

    wait_until(lambda: bool(found()), timeout_s, lambda: "no template imports the module")
    return found()[0]


# Forking.


def test_servers_are_forks_of_one_zygote_which_two_clients_share(path: str, new_worker: Callable[[], Client]) -> None:
    mine = shared(path, "mine").pid()
    zygotes = {zygote_of(path), *templates_of(path)}
    assert parent_of(mine) in zygotes
    for number in range(2):
        pid, parent = new_worker().do(parent_in, f"tag {number}", path)
        assert parent in {zygote_of(path), *templates_of(path)}
        assert pid != mine
    assert zygote_of(path) in zygotes
    assert psutil.Process(mine).name() == "mpmm-server"
    assert psutil.Process(zygote_of(path)).name() == PROCESS_NAME


def test_a_forked_server_is_a_child_in_the_eyes_of_multiprocessing(path: str) -> None:
    pid = shared(path).pid()
    (child,) = (child for child in multiprocessing.active_children() if child.pid == pid)
    assert child.is_alive()
    assert child.exitcode is None
    child.join(0.01)
    assert child.is_alive()
    child.terminate()
    child.join(DEADLINE_S)
    assert not child.is_alive()
    assert int(child.exitcode or 0) == 128 + signal.SIGTERM
    assert child not in multiprocessing.active_children()


def test_a_dead_server_is_reaped_when_its_starter_asks_or_is_gone(path: str, new_worker: Callable[[], Client]) -> None:
    worker = new_worker()
    theirs = worker.do(acquire, "theirs", path)
    mine = shared(path, "mine").pid()
    for pid in (mine, theirs):
        os.kill(pid, signal.SIGKILL)
        # Mypy has no type for the lambda's default.
        wait_until(lambda pid=pid: not is_running(pid), DEADLINE_S)  # type: ignore[misc]  # the default has no type
    # Another server comes and goes in between.
    shared(path, "other")
    wait_until(lambda: not psutil.pid_exists(mine), DEADLINE_S, lambda: "acquire() has not reaped the server")
    assert psutil.pid_exists(theirs)
    worker.kill()
    wait_until(lambda: not psutil.pid_exists(theirs), DEADLINE_S, lambda: "nobody has reaped the server")


def test_a_server_that_dies_or_fails_in_its_constructor_says_so_as_before(path: str) -> None:
    shared(path, "first")
    with pytest.raises(ServerStartError, match="ZeroDivisionError: no such model"):
        shared(path, "it", fail_to_construct)
    with pytest.raises(ServerStartError, match="exit code -9"):
        shared(path, "it", die_in_constructor)


def test_a_forked_server_has_the_surroundings_of_its_starter(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shared(path, "first")
    monkeypatch.setenv("MPMM_TEST_MINE", "mine")
    monkeypatch.chdir(tmp_path)
    context = ServerContext(alive_lock=str(registry_for(path).alive_path), environment=(("MPMM_TEST_SEEN", "yes"),))
    with serving_for(context):
        proxy = shared(path, "it", Surroundings)
    assert (proxy.seen_by_constructor(), proxy.environment("MPMM_TEST_SEEN")) == ("yes", "yes")
    assert proxy.environment("MPMM_TEST_MINE") == "mine"
    assert proxy.folder() == str(tmp_path)
    proxy.print("said by the server")
    assert capfd.readouterr() == ("said by the server\n", "said by the server\n")
    assert os.getsid(server_pid("it", path=path) or 0) == server_pid("it", path=path)
    later = shared(path, "later", Surroundings)
    assert later.seen_by_constructor() is None
    assert later.draw() != proxy.draw()
    # Nothing of the zygote's: neither its socket nor its lock, nor what other servers talk through.
    assert not [name for name in later.descriptors() if "/zygote/" in name]


def test_a_constructor_of_a_script_works_without_cloudpickle(path: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import importlib.util\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'cloudpickle' else find_spec(name, *more)\n"
        "import psutil\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "class Typed:\n"
        "    def answer(self): return 42, __name__\n"
        "    def forked(self): return psutil.Process().name()\n"
        "if __name__ == '__main__':\n"
        "    for tag in ('first', 'second'):\n"
        "        handle = MultiProcessShared(Typed, tag, path=sys.argv[1], spawn_process=True)\n"
        "        print(handle.acquire().answer(), handle.acquire().forked())\n"
        "        handle.unsafe_hard_delete()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), path],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    assert (done.stdout, done.stderr) == ("(42, '__mp_main__') mpmm-server\n" * 2, "")


@pytest.mark.parametrize("switch", ["0", "1"], ids=["spawn", "zygote"])
def test_a_script_without_a_main_guard_fails_as_with_spawn(path: str, tmp_path: Path, switch: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "MultiProcessShared(dict, str(os.getpid()), path=sys.argv[1], spawn_process=True).acquire()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), path],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "MPMM_ZYGOTE": switch, "PYTHONPATH": import_path()},
    )
    assert "bootstrapping phase" in done.stderr
    assert "mpmm.errors.ServerStartError" in done.stderr
    assert done.returncode == 1


# Learning.


def test_the_second_server_does_not_import_again_what_the_first_one_had_to(path: str, modules: Any) -> None:
    name = modules("mpmm_test_slow")
    first = shared(path, "first", Importing(name))
    # The template may have done so by now, too.
    assert pids_that_imported(modules, name)[0] == first.pid()
    template = wait_for_template_with(path, modules, name)
    later = server_from(path, template, Importing(name))
    assert later.increment() == 42
    assert later.pid() not in pids_that_imported(modules, name)


def test_a_module_that_leaves_a_thread_behind_is_not_imported_before_a_fork(path: str, modules: Any) -> None:
    threads = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    bad, good = modules("mpmm_test_threads", threads), modules("mpmm_test_harmless")
    shared(path, "first", Importing(bad))
    wait_until(lambda: len(pids_that_imported(modules, bad)) == 2, LEARN_TIMEOUT_S, lambda: "no template tries")
    tried = pids_that_imported(modules, bad)[1]
    wait_until(lambda: not is_running(tried), LEARN_TIMEOUT_S, lambda: "the template goes on")
    shared(path, "second", Importing(good))
    template = wait_for_template_with(path, modules, good)
    later = server_from(path, template, Surroundings)
    assert template not in pids_that_imported(modules, bad)
    assert later.environment("MPMM_TEST_SEEN") is None
    assert shared(path, "last", Importing(bad)).increment() == 42


def test_imports_see_the_environment_of_a_server_context(path: str, modules: Any) -> None:
    name = modules("mpmm_test_reads", "answer = int(os.environ['MPMM_TEST_SEEN'])")
    for answer in ("1", "2", "3"):
        context = ServerContext(
            alive_lock=str(registry_for(path).alive_path), environment=(("MPMM_TEST_SEEN", answer),)
        )
        with serving_for(context):
            assert shared(path, f"tag {answer}", Importing(name)).increment() == int(answer) + 1
        wait_for_template_with(path, modules, name)


def test_modules_named_in_the_environment_are_imported_beforehand(
    path: str, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = modules("mpmm_test_named")
    monkeypatch.setenv("MPMM_PRELOAD", f"no_such_module, {name}")
    shared(path, "first")
    template = wait_for_template_with(path, modules, name)
    assert server_from(path, template, Importing(name)).increment() == 42
    assert set(pids_that_imported(modules, name)) <= {template, *templates_of(path)}


def test_a_preload_hook_is_done_before_the_first_server_is_forked(
    path: str, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = modules("mpmm_test_preload_hook", "def prepare():\n    global answer\n    answer += 100")
    monkeypatch.setattr(forkserver_client, "_preload_hooks", [f"{name}:prepare"])
    assert shared(path, "first", Importing(name)).increment() == 142
    assert pids_that_imported(modules, name) == templates_of(path)


def test_what_a_preload_hooks_own_module_looks_at_costs_no_template(
    path: str, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "asked = os.environ.get('PIPELINE_OPTIONS')\ndef prepare():\n    global answer\n    answer += 100"
    name = modules("mpmm_test_asks_first", code)
    monkeypatch.setattr(forkserver_client, "_preload_hooks", [f"{name}:prepare"])
    assert shared(path, "first", Imports(name)).value("answer") == 141
    assert len(pids_that_imported(modules, name)) == 1, "another template, or the server, had to import it again"


@pytest.mark.parametrize("code", ["raise SystemExit", "os.kill(os.getpid(), 9)"])
def test_a_preload_hook_that_fails_leaves_servers_to_themselves(
    path: str, modules: Any, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    name = modules("mpmm_test_failing", code)
    monkeypatch.setattr(forkserver_client, "_preload_hooks", [f"{name}:prepare"])
    for number in range(3):
        assert shared(path, f"tag {number}").increment() == 1


def test_orders_larger_than_a_socket_takes_arrive(path: str, modules: Any) -> None:
    name = modules("mpmm_test_slow")
    shared(path, "first", Importing(name))
    template = wait_for_template_with(path, modules, name)
    large = Importing(name)
    large.ballast = os.urandom(5_000_000)  # type: ignore[attr-defined]  # makes its pickle large
    assert server_from(path, template, large).increment() == 42


# What imports leave behind.


def servers_of_template(path: str, modules: Any, name: str, timeout_s: float = LEARN_TIMEOUT_S) -> list[Any]:
    """Return a server that imported the module itself, and some that were forked from a template which had done so."""
    first = shared(path, "first", Imports(name))
    template = wait_for_template_with(path, modules, name, timeout_s)
    found = [first]
    watch = Stopwatch()
    for number in itertools.count():
        proxy = shared(path, f"from template {number}", Imports(name))
        if proxy.parent() == template:
            found.append(proxy)
            if len(found) == 3:
                return found
        assert watch.calm_s() < timeout_s, "the template forks nothing"
        time.sleep(0.02)
    raise AssertionError("unreachable")


def servers_without_template(path: str, modules: Any, name: str, count: int = 3) -> list[Any]:
    """Return servers, and make sure that all have imported the module, of which the zygote knows, themselves."""
    first = shared(path, "first", Imports(name))
    # A template tries, and ends.
    wait_until(lambda: len(pids_that_imported(modules, name)) >= 2, LEARN_TIMEOUT_S, lambda: "no template tries")
    tried = pids_that_imported(modules, name)[1]
    wait_until(lambda: not is_running(tried), LEARN_TIMEOUT_S, lambda: "the template goes on")
    found = [first, *(shared(path, f"tag {number}", Imports(name)) for number in range(count))]
    assert {proxy.pid() for proxy in found} <= set(pids_that_imported(modules, name))
    return found


def test_random_numbers_of_servers_of_one_template_differ(path: str, modules: Any) -> None:
    code = """
import random, numpy.random
own = random.Random()
def draw():
    return own.random(), random.random(), float(numpy.random.random()), random.SystemRandom().random()
"""
    draws = [proxy.value("draw") for proxy in servers_of_template(path, modules, modules("mpmm_test_random", code))]
    for kind in zip(*draws, strict=True):
        assert len(set(kind)) == len(kind), draws


def test_generators_that_an_import_seeds_are_the_same_in_every_server_as_with_spawn(path: str, modules: Any) -> None:
    code = """
import random, numpy.random
random.seed(1)
numpy.random.seed(seed=2)
own = random.Random(3)
modern = numpy.random.default_rng(4)
def draw():
    return random.random(), float(numpy.random.random()), own.random(), float(modern.random())
"""
    draws = [proxy.value("draw") for proxy in servers_of_template(path, modules, modules("mpmm_test_seeded", code))]
    assert draws[0] == draws[1] == draws[2]


def test_generators_of_numpy_without_a_seed_differ_between_servers_of_one_template(path: str, modules: Any) -> None:
    code = """
import numpy.random
generator = numpy.random.default_rng()
of_old = numpy.random.RandomState()
kinds = [numpy.random.Generator(kind()) for kind in (numpy.random.MT19937, numpy.random.Philox, numpy.random.SFC64)]
def draw():
    numbers = [generator.random(), generator.spawn(1)[0].random(), of_old.random()]
    return [float(number) for number in (*numbers, *(kind.random() for kind in kinds))]
"""
    draws = [proxy.value("draw") for proxy in servers_of_template(path, modules, modules("mpmm_test_rng", code))]
    for kind in zip(*draws, strict=True):
        assert len(set(kind)) == len(kind), draws


def test_a_module_with_a_generator_that_cannot_be_seeded_anew_is_not_imported_before_a_fork(
    path: str, modules: Any
) -> None:
    code = """
import numpy.random
class Fixed(numpy.random.SeedSequence):
    def __setstate__(self, state):
        raise TypeError("read-only")
generator = numpy.random.default_rng(Fixed())
def draw():
    return float(generator.random()), float(generator.spawn(1)[0].random())
"""
    draws = [proxy.value("draw") for proxy in servers_without_template(path, modules, modules("mpmm_test_rng", code))]
    for kind in zip(*draws, strict=True):
        assert len(set(kind)) == len(kind), draws


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nleft = socket.socketpair()",
        "left = open(__file__)",
        "import mmap\nleft = mmap.mmap(-1, 4096)",
        "import subprocess\nleft = subprocess.Popen(['sleep', '20'])\nimport atexit",
        "os.chdir('/')",
        "import multiprocessing\nleft = multiprocessing.Lock()",
    ],
    ids=["socket", "file", "shared memory", "child", "folder", "semaphore"],
)
def test_a_module_that_leaves_what_servers_cannot_share_is_not_imported_before_a_fork(
    path: str, modules: Any, code: str
) -> None:
    servers = servers_without_template(path, modules, modules("mpmm_test_leaves", code), 1)
    children = [child.pid for proxy in servers for child in psutil.Process(proxy.pid()).children()]
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def test_a_template_imports_with_the_folder_and_the_arguments_of_the_server(
    path: str, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", "--shard", "3"])
    name = modules("mpmm_test_asks", "import sys\nseen = os.getcwd(), list(sys.argv)")
    for proxy in servers_of_template(path, modules, name):
        assert proxy.value("seen") == (str(tmp_path), ["program", "--shard", "3"])
    monkeypatch.setattr(sys, "argv", ["program", "--shard", "4"])
    assert shared(path, "another", Imports(name)).value("seen") == (str(tmp_path), ["program", "--shard", "4"])


def test_an_import_that_looks_at_the_visible_devices_sees_those_of_its_server(path: str, modules: Any) -> None:
    name = modules("mpmm_test_devices", "seen = os.environ.get('CUDA_VISIBLE_DEVICES')")

    def placed(tag: str, device: str) -> Any:
        context = ServerContext(str(registry_for(path).alive_path), environment=(("CUDA_VISIBLE_DEVICES", device),))
        with serving_for(context):
            return shared(path, tag, Imports(name))

    assert placed("first", "GPU-0").value("seen") == "GPU-0"
    wait_until(lambda: len(pids_that_imported(modules, name)) >= 2, LEARN_TIMEOUT_S, lambda: "no template tries")
    from_templates = set()
    for number in range(200):
        device = f"GPU-{number % 2}"
        proxy = placed(f"tag {number}", device)
        assert proxy.value("seen") == device
        if proxy.parent() in templates_of(path) and proxy.pid() not in pids_that_imported(modules, name):
            # Each value has a template.
            from_templates.add(device)
        unload(f"tag {number}", path=path)
        if len(from_templates) == 2:
            return
        time.sleep(0.02)
    raise AssertionError(f"no template for each value, but for {from_templates}")


def test_what_an_import_sets_in_the_environment_is_set_in_every_server(path: str, modules: Any) -> None:
    code = """
os.environ["MPMM_TEST_SET"] = "by the module"
os.environ.pop("MPMM_TEST_REMOVED", None)
def seen():
    return os.environ.get("MPMM_TEST_SET"), os.environ.get("MPMM_TEST_REMOVED"), type(os.environ).__name__
"""
    context = ServerContext(str(registry_for(path).alive_path), environment=(("MPMM_TEST_REMOVED", "x"),))
    with serving_for(context):
        servers = servers_of_template(path, modules, modules("mpmm_test_sets", code))
    assert {proxy.value("seen") for proxy in servers} == {("by the module", None, "_Environ")}


def test_handlers_of_signals_that_an_import_installs_are_there_in_every_server(path: str, modules: Any) -> None:
    code = """
import signal
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: None)
def handled():
    return callable(signal.getsignal(signal.SIGUSR1)), os.getpid()
"""
    for proxy in servers_of_template(path, modules, modules("mpmm_test_signals", code)):
        handled, pid = proxy.value("handled")
        assert handled
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda pid=pid: not is_running(pid), DEADLINE_S)  # type: ignore[misc]  # the default has no type


POPULAR = (
    "PIL.Image",
    "anyio",
    "click",
    "cloudpickle",
    "cryptography",
    "fastavro",
    "google.protobuf.message",
    "grpc",
    "httplib2",
    "hypothesis",
    "joblib",
    "matplotlib.pyplot",
    "numpy",
    "numpy.random",
    "pandas",
    "prometheus_client",
    "psutil",
    "pyarrow",
    "pymongo",
    "requests",
    "rich.console",
    "starlette.applications",
    "torch",
    "transformers",
    "urllib3",
    "uvicorn",
    "yaml",
    "zstandard",
)
# Each takes seconds of every server.
LARGE = ("scipy.stats", "sklearn.linear_model")


def test_a_forked_server_is_like_a_spawned_one_for_popular_modules(
    path: str, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one module, as a program imports them; what cannot be imported before a fork is found out above."""
    names = (*POPULAR, *(LARGE if SCALE > 1 else ()))
    installed = [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is not None]
    name = modules("mpmm_test_popular", "\n".join(f"import {module}" for module in installed))
    assert len(installed) >= 4
    for variable in ("COLUMNS", "LINES"):
        # GNU readline, which pytest may load, sets them where `os.environ` does not see it.
        if variable not in os.environ:
            os.unsetenv(variable)
    monkeypatch.setenv("MPMM_ZYGOTE", "0")
    spawned = shared(path, "spawned", Imports(name))
    monkeypatch.setenv("MPMM_ZYGOTE", "1")
    itself, *forked = servers_of_template(path, modules, name, 4 * LEARN_TIMEOUT_S)
    expected = spawned.state()
    for proxy in (itself, *forked):
        found = proxy.state()
        for what in expected:
            assert found[what] == expected[what], what
    draws = [proxy.draws() for proxy in (spawned, itself, *forked)]
    for kind in draws[0]:
        assert len({drawn[kind] for drawn in draws}) == len(draws), kind


# Ends.


def test_the_zygote_ends_soon_after_its_last_client_was_killed_and_leaves_nothing(
    path: str, modules: Any, new_worker: Callable[[], Client]
) -> None:
    workers = [new_worker(), new_worker()]
    for worker in workers:
        worker.do(acquire_importing, modules("mpmm_test_slow"), path)
    wait_for_template_with(path, modules, "mpmm_test_slow")
    pids = [zygote_of(path), *templates_of(path)]
    registry_for(path).leave()
    for worker in workers:
        worker.kill()
    wait_until(lambda: not any(map(is_running, pids)), LAST_CLIENT_S, lambda: "the zygote still runs")
    wait_until(lambda: not any(Path(path).iterdir()), LAST_CLIENT_S, lambda: "the registry is still there")


def test_a_server_whose_main_module_never_ends_does_not_outlive_its_starter(path: str, tmp_path: Path) -> None:
    script, arrived = tmp_path / "script.py", tmp_path / "arrived"
    script.write_text(
        "import os, pathlib, signal, sys\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "if __name__ != '__main__':\n"
        "    pathlib.Path(os.environ['ARRIVED']).write_text(str(os.getpid()))\n"
        "    signal.pause()\n"
        "MultiProcessShared(dict, 'it', path=sys.argv[1], spawn_process=True).acquire()\n"
    )
    environment = {**os.environ, "PYTHONPATH": import_path(), "ARRIVED": str(arrived)}
    with subprocess.Popen([sys.executable, str(script), path], env=environment) as starter:
        wait_until(lambda: arrived.exists() and bool(arrived.read_text()), DEADLINE_S, lambda: "no server began")
        starter.kill()
    pid = int(arrived.read_text())
    wait_until(lambda: not is_running(pid), LAST_CLIENT_S, lambda: "the server still runs")
    wait_until(lambda: not any(Path(path).iterdir()), LAST_CLIENT_S, lambda: "the registry is still there")


def test_the_zygote_ends_when_its_last_client_leaves(path: str, new_worker: Callable[[], Client]) -> None:
    worker = new_worker()
    worker.do(acquire, "it", path)
    pid = zygote_of(path)
    assert worker.leave() == 0
    wait_until(lambda: not is_running(pid), LAST_CLIENT_S, lambda: "the zygote still runs")


def test_servers_survive_the_zygotes_death_and_the_next_start_has_a_new_one(path: str, modules: Any) -> None:
    name = modules("mpmm_test_slow")
    first = shared(path, "first", Importing(name))
    template = wait_for_template_with(path, modules, name)
    second = server_from(path, template, Importing(name))
    old = zygote_of(path)
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: not is_running(old) and not is_running(template), DEADLINE_S)
    assert (first.increment(), second.increment()) == (42, 42)
    third = shared(path, "third")
    assert parent_of(third.pid()) == zygote_of(path) != old
    # Nobody can know any more how the orphan ended, but that it did.
    (child,) = (child for child in multiprocessing.active_children() if child.pid == first.pid())
    assert unload("first", path=path)
    assert (child.is_alive(), child.exitcode) == (False, forkserver_client.UNKNOWN_EXIT_CODE)
    child = next(child for child in multiprocessing.active_children() if child.pid == third.pid())
    assert unload("third", path=path)
    assert child.exitcode == 0


def test_killing_the_zygote_at_any_time_costs_no_start(path: str) -> None:
    stop = threading.Event()
    kills = 0

    def kill_again_and_again() -> None:
        nonlocal kills
        chance = random.Random(7)
        while not stop.wait(chance.random() * 0.2):
            with contextlib.suppress(ProcessLookupError):
                if (pid := zygote_pid(registry_for(path))) is not None:
                    os.kill(pid, signal.SIGKILL)
                    kills += 1

    killer = threading.Thread(target=kill_again_and_again)
    killer.start()
    try:
        end = time.monotonic() + DEADLINE_S
        started = 0
        while (started < 3 or kills <= 3) and time.monotonic() < end:
            assert shared(path, f"tag {started}").increment() == 1
            started += 1
    finally:
        stop.set()
        killer.join(DEADLINE_S)
    assert (started >= 3, kills > 3) == (True, True)


def test_without_a_zygote_servers_are_spawned(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MPMM_ZYGOTE", "0")
    assert parent_of(shared(path, "spawned").pid()) == os.getpid()
    assert zygote_pid(registry_for(path)) is None
    monkeypatch.setenv("MPMM_ZYGOTE", "1")
    monkeypatch.setattr(forkserver_client, "_avoid_until", 0.0)
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patched:
        patched.setattr(forkserver_client, "_start_zygote", fail_to_start)
        assert parent_of(shared(path, "fallback").pid()) == os.getpid()
    assert [record.message for record in caplog.records if "instead of forking it" in record.message]
    # It is not tried again at every start.
    assert forkserver_client._avoid_until > time.monotonic()


def test_a_stopped_zygote_delays_a_start_but_does_not_prevent_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver_client, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(forkserver_client, "_avoid_until", 0.0)
    shared(path, "first")
    pid = zygote_of(path)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert parent_of(shared(path, "second").pid()) == os.getpid()
    finally:
        os.kill(pid, signal.SIGCONT)


def fail_to_start(*arguments: Any) -> None:
    raise OSError("no such interpreter")


def acquire_importing(memory: dict[str, Any], name: str, path: str) -> int:
    memory[name] = MultiProcessShared(Importing(name), name, path=path, always_proxy=True, spawn_process=True).acquire()
    return int(memory[name].pid())


def server_from(path: str, template: int, constructor: Callable[[], Any]) -> Any:
    """Return a server that the template has forked, once it has done what it was told."""
    for number in range(200):
        proxy = shared(path, f"from template {number}", constructor)
        pid = server_pid(f"from template {number}", path=path)
        assert pid is not None
        if parent_of(pid) == template:
            return proxy
        unload(f"from template {number}", path=path)
        time.sleep(0.02)
    raise AssertionError("the template forks nothing")
