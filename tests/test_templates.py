"""Templates, which import what servers need before they fork them: what they import, and what they leave to servers."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import forked_servers
import psutil
import pytest
import shared_workers
from counters import Importing, Imports, Surroundings
from crash_lab import run_in_child
from forked_servers import (
    LEARN_TIMEOUT_S,
    pids_that_imported,
    server_from,
    shared,
    templates_of,
    wait_for_template_with,
    zygote_of,
)
from harness import SCALE
from patience import DEADLINE_S, Stopwatch
from shared_workers import is_running, wait_until

from mpmm.multi_process_shared import unload
from mpmm.multi_process_shared.context import ServerContext, serving_for
from mpmm.multi_process_shared.forkserver import client as forkserver_client
from mpmm.multi_process_shared.forkserver import fork_parent, template
from mpmm.multi_process_shared.registry import registry_for

pytestmark = pytest.mark.skipif(not forkserver_client._has_pidfd(), reason="needs descriptors of processes")
path = shared_workers.path
modules = forked_servers.modules


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


def test_a_forked_server_can_be_ended_whatever_an_import_has_made_of_the_signals_for_that() -> None:
    def reset() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        fork_parent._reset_signals()
        found = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        assert found == [signal.SIG_DFL, signal.default_int_handler]
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())

    assert run_in_child(reset) == 0


def test_a_process_with_one_thread_may_be_forked_unless_it_uses_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged in a child, which has no other thread."""
    found = os.readlink

    def judge(uses: bool) -> None:
        if uses:
            monkeypatch.setattr(os, "readlink", lambda path: "/dev/nvidia0" if path.endswith("/0") else found(path))
        assert template._may_fork() is not uses

    assert [run_in_child(partial(judge, uses)) for uses in (False, True)] == [0, 0]


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
    server = server_from(path, template, Importing(name))
    assert server.increment() == 42
    assert server.pid() not in pids_that_imported(modules, name)


def test_a_preload_hook_is_done_before_the_first_server_is_forked(
    path: str, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = modules("mpmm_test_preload_hook", "def prepare():\n    global answer\n    answer += 100")
    monkeypatch.setattr(forkserver_client, "_preload_hooks", [f"{name}:prepare"])
    assert shared(path, "first", Importing(name)).increment() == 142
    assert pids_that_imported(modules, name) == templates_of(path)


def test_preload_hooks_of_one_module_are_all_done(path: str, modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def add():\n    global answer\n    answer += 100\ndef double():\n    global answer\n    answer *= 2"
    name = modules("mpmm_test_preload_hooks", code)
    monkeypatch.setattr(forkserver_client, "_preload_hooks", [f"{name}:add", f"{name}:double"])
    assert shared(path, "first", Imports(name)).value("answer") == 282
    assert pids_that_imported(modules, name) == templates_of(path)


def test_a_preload_hook_after_which_no_server_can_be_forked_is_done_before_no_other(
    path: str, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import threading, time
def prepare():
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""
    name = modules("mpmm_test_threads", code)
    monkeypatch.setattr(forkserver_client, "_preload_hooks", [f"{name}:prepare"])
    for number in range(3):
        assert shared(path, f"tag {number}").increment() == 1
    assert len(pids_that_imported(modules, name)) == 1


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


# Remains of imports.


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


def test_generators_of_numpy_that_a_preload_hook_brings_along_differ_between_servers(
    path: str, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
def prepare():
    global generator
    import numpy.random
    generator = numpy.random.default_rng()
def draw():
    return float(generator.random())
"""
    name = modules("mpmm_test_rng_of_hook", code)
    monkeypatch.setattr(forkserver_client, "_preload_hooks", [f"{name}:prepare"])
    servers = [shared(path, f"tag {number}", Imports(name)) for number in range(3)]
    assert len(pids_that_imported(modules, name)) == 1, "a template has made it for all"
    assert len({proxy.value("draw") for proxy in servers}) == 3


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


@pytest.mark.parametrize(
    "code",
    [
        "import uuid\nkept = str(uuid.uuid4())",
        "import tempfile\nkept = tempfile.mkdtemp()",
        "kept = os.getpid()",
        "import secrets\nkept = secrets.token_hex(4)",
    ],
    ids=["ID", "SCRATCH", "PID", "TOKEN"],
)
def test_what_a_module_draws_or_makes_as_it_is_imported_differs_between_servers(
    path: str, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    name = modules("mpmm_test_keeps", code)
    first = shared(path, "first", Imports(name))
    # The next servers are ordered from this template, or because of it from none.
    wait_until(lambda: len(pids_that_imported(modules, name)) >= 2, LEARN_TIMEOUT_S, lambda: "no template tries")
    servers = [first, *(shared(path, f"tag {number}", Imports(name)) for number in range(4))]
    kept = [proxy.value("kept") for proxy in servers]
    assert len(set(kept)) == 5, kept
    if "getpid" in code:
        assert kept == [proxy.pid() for proxy in servers]


def test_a_program_has_templates_however_many_of_its_modules_are_kept_out_of_them(path: str, modules: Any) -> None:
    keeping = [modules(f"mpmm_test_keeps_{number}", "import uuid\nkept = str(uuid.uuid4())") for number in range(7)]
    good = modules("mpmm_test_harmless")
    code = "".join(f"import {name}\n" for name in (*keeping, good))
    program = modules("mpmm_test_program", f"import sys\n{code}kept = [sys.modules[name].kept for name in {keeping}]")
    found = [shared(path, "first", Imports(program))]
    watch = Stopwatch()
    for number in itertools.count():
        proxy = shared(path, f"tag {number}", Imports(program))
        if proxy.parent() != zygote_of(path):
            found.append(proxy)
            if len(found) == 4:
                break
        else:
            unload(f"tag {number}", path=path)
        assert watch.calm_s() < LEARN_TIMEOUT_S, "no template forks a server"
        time.sleep(0.02)
    pids = {proxy.pid() for proxy in found}
    assert len(pids & set(pids_that_imported(modules, good))) == 1, "each template imports what it can"
    assert pids <= set(pids_that_imported(modules, keeping[0]))
    kept = [proxy.value("kept") for proxy in found]
    assert len({one for each in kept for one in each}) == len(keeping) * len(found), kept


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
    """All in one module, as a program imports them; tests above find out what cannot be imported before a fork."""
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
