"""Forked servers: their parent, their surroundings, and what is left if the zygote dies."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked_servers
import psutil
import pytest
import shared_workers
from counters import Importing, Surroundings, die_in_constructor, fail_to_construct
from forked_servers import parent_of, server_from, shared, templates_of, wait_for_template_with, zygote_of
from harness import import_path, in_thread, open_descriptors, stop_process
from patience import DEADLINE_S
from shared_workers import LAST_CLIENT_S, Client, acquire, is_running, wait_until

from mpmm.errors import ServerStartError
from mpmm.multi_process_shared import MultiProcessShared, server_pid, unload
from mpmm.multi_process_shared.context import ServerContext, serving_for
from mpmm.multi_process_shared.forkserver import client as forkserver_client
from mpmm.multi_process_shared.forkserver.client import zygote_pid
from mpmm.multi_process_shared.forkserver.orders import IMPORT, RETIRE, Descriptor, Kind
from mpmm.multi_process_shared.forkserver.template import Template
from mpmm.multi_process_shared.forkserver.zygote import (
    MOST_TEMPLATES,
    PROCESS_NAME,
    TEMPLATE_USED_S,
    _TemplateHandle,
    _Zygote,
)
from mpmm.multi_process_shared.registry import LIVES_BY_VARIABLE, registry_for
from mpmm.multi_process_shared.rpc import sockets
from mpmm.multi_process_shared.server_process import _Server

pytestmark = pytest.mark.skipif(not forkserver_client._has_pidfd(), reason="needs descriptors of processes")
path = shared_workers.path
new_worker = shared_workers.new_worker
modules = forked_servers.modules


def parent_in(memory: dict[str, Any], tag: str, path: str) -> tuple[int, int]:
    """Acquire in a worker; return the pid of the server and its parent."""
    pid = acquire(memory, tag, path)
    return pid, parent_of(pid)


def unload_in(memory: dict[str, Any], tag: str, path: str) -> bool:
    """Unload in a worker."""
    return unload(tag, path=path)


def run_script(script: Path, path: str, switch: str = "1") -> subprocess.CompletedProcess[str]:
    """Run a script with the path of a registry. switch: whether its servers are forked by a zygote."""
    return subprocess.run(
        [sys.executable, str(script), path],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "MPMM_ZYGOTE": switch, "PYTHONPATH": import_path()},
    )


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
    # Out of reach of Ctrl-C at a terminal of its starter's.
    assert os.getsid(zygote_of(path)) != os.getsid(0)


def test_a_zygote_has_the_environment_of_its_starter_but_for_whom_that_lives_by(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPMM_TEST_SEEN", "by the zygote")
    monkeypatch.setenv(LIVES_BY_VARIABLE, "")
    shared(path, "mine")
    seen = psutil.Process(zygote_of(path)).environ()
    assert LIVES_BY_VARIABLE not in seen
    assert {name: seen.get(name) for name in ("MPMM_TEST_SEEN", "PATH")} == {
        "MPMM_TEST_SEEN": "by the zygote",
        "PATH": os.environ["PATH"],
    }


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


@pytest.mark.parametrize("switch", ["0", "1"], ids=["spawn", "zygote"])
def test_a_server_whose_starter_writes_to_a_terminal_shows_each_line_at_once(
    path: str, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv("MPMM_ZYGOTE", switch)
    monkeypatch.setattr(forkserver_client, "_avoid_until", 0.0)
    # It would show everything at once.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    screen, terminal = os.openpty()
    before = os.dup(1)
    os.dup2(terminal, 1)
    try:
        proxy = shared(path, "it", Surroundings)
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(terminal)
    proxy.print("said by the server", flush=False)
    assert wait([screen], DEADLINE_S), "the line waits for more"
    assert os.read(screen, 100) == b"said by the server\r\n"
    unload("it", path=path)
    os.close(screen)


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
    done = run_script(script, path)
    assert (done.stdout, done.stderr) == ("(42, '__mp_main__') mpmm-server\n" * 2, "")


@pytest.mark.parametrize("switch", ["0", "1"], ids=["spawn", "zygote"])
def test_what_a_script_sets_for_itself_does_not_move_its_servers(path: str, tmp_path: Path, switch: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "os.environ.update(CUDA_VISIBLE_DEVICES='7', MPMM_TEST_SET='by the script')\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "from mpmm.multi_process_shared.context import ServerContext, serving_for\n"
        "from mpmm.multi_process_shared.registry import registry_for\n"
        "class Surroundings:\n"
        "    def get(self): return [os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'MPMM_TEST_SET')]\n"
        "if __name__ == '__main__':\n"
        "    alive = str(registry_for(sys.argv[1]).alive_path)\n"
        "    with serving_for(ServerContext(alive_lock=alive, environment=(('CUDA_VISIBLE_DEVICES', '3'),))):\n"
        "        handle = MultiProcessShared(Surroundings, 'it', path=sys.argv[1], spawn_process=True)\n"
        "        print(handle.acquire().get())\n"
        "        handle.unsafe_hard_delete()\n"
    )
    done = run_script(script, path, switch)
    assert (done.stdout, done.stderr) == ("['3', 'by the script']\n", "")


@pytest.mark.parametrize("before", [None, "3"])
def test_what_an_import_has_removed_is_for_the_main_module_to_set(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    name = "MPMM_TEST_SET"
    server = _Server.__new__(_Server)
    plan: Any = SimpleNamespace(environment=((name, "3"),))
    server.plan = plan
    monkeypatch.setenv(name, "")
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before
    monkeypatch.setattr("multiprocessing.spawn.prepare", lambda preparation: os.environ.update({name: "7"}))
    server.prepare({})
    assert os.environ[name] == (before or "7")


@pytest.mark.parametrize("switch", ["0", "1"], ids=["spawn", "zygote"])
def test_a_script_without_a_main_guard_fails_as_with_spawn(path: str, tmp_path: Path, switch: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "MultiProcessShared(dict, str(os.getpid()), path=sys.argv[1], spawn_process=True).acquire()\n"
    )
    done = run_script(script, path, switch)
    assert "bootstrapping phase" in done.stderr
    assert "mpmm.errors.ServerStartError" in done.stderr
    assert done.returncode == 1


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


def test_a_zygote_without_servers_ends_with_its_last_client_too(path: str, new_worker: Callable[[], Client]) -> None:
    worker = new_worker()
    worker.do(acquire, "it", path)
    pid = zygote_of(path)
    worker.do(unload_in, "it", path)
    worker.kill()
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


def test_what_an_earlier_zygote_said_of_itself_does_not_matter_however_long_it_was(path: str) -> None:
    registry = registry_for(path)
    registry.join()
    life = forkserver_client._life_path(registry)
    life.parent.mkdir(mode=0o700)
    life.write_text('{"pid": 1, "socket": "' + 1000 * "x" + '"}')
    pid = shared(path).pid()
    assert psutil.Process(zygote_of(path)).name() == PROCESS_NAME
    assert parent_of(pid) != os.getpid(), "it was forked"


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
    stop_process(pid)
    try:
        assert parent_of(shared(path, "second").pid()) == os.getpid()
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(("stopped", "says"), [(1, "nothing"), (3, "who it is"), (3, "half its order")])
def test_a_requester_that_is_stopped_before_it_has_given_its_order_holds_up_no_other(
    path: str, monkeypatch: pytest.MonkeyPatch, stopped: int, says: str
) -> None:
    monkeypatch.setattr(forkserver_client, "_avoid_until", 0.0)
    shared(path, "first")
    registry = registry_for(path)
    place = Path(json.loads(forkserver_client._life_path(registry).read_text())["socket"])
    with contextlib.ExitStack() as stack:
        for _ in range(stopped):
            if says == "nothing":
                silent = stack.enter_context(socket.socket(socket.AF_UNIX))
                with sockets._short_address(place.parent, place.name) as address:
                    silent.connect(address)
            else:
                requester = stack.enter_context(sockets.dial(place.parent, place.name, registry.key()))
                if says == "half its order":
                    # Less than one read of a message may take.
                    monkeypatch.setattr(forkserver_client, "ANSWER_TIMEOUT_S", 4.0)
                    # The size of the whole, and as much as fits into the socket, say.
                    os.write(requester.fileno(), struct.pack("!i", 1_000_000) + bytes(500))
        # Had that taken too long, it would have been spawned by this process.
        assert parent_of(shared(path, "second").pid()) != os.getpid()


@pytest.fixture
def new_template() -> Iterator[Callable[[Callable[[Connection], object]], tuple[_Zygote, _TemplateHandle]]]:
    """Makes a zygote with a template that does one thing with its connection, and then stands still."""
    made: list[_TemplateHandle] = []

    def make(doing: Callable[[Connection], object]) -> tuple[_Zygote, _TemplateHandle]:
        ours, theirs = multiprocessing.Pipe()
        pid = os.fork()
        if pid == 0:
            try:
                doing(theirs)
                signal.pause()
            finally:
                os._exit(0)
        theirs.close()
        sockets.set_timeouts(ours, 0.5)
        made.append(_TemplateHandle(Kind((), (), (), "/", ()), pid, ours))
        # It takes no orders, so it needs no registry.
        zygote = _Zygote.__new__(_Zygote)
        zygote.templates, zygote.modules, zygote.unforkable, zygote.read = [made[-1]], {}, {}, {}
        zygote.failures = {}
        return zygote, made[-1]

    yield make
    for template in made:
        # Those that were not given up, in a test that fails.
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(template.pid, os.WNOHANG) == (0, 0):
                os.kill(template.pid, signal.SIGKILL)
                os.waitpid(template.pid, 0)
        template.link.close()


def test_a_template_that_is_stopped_in_the_middle_of_a_message_is_given_up(new_template: Callable[..., Any]) -> None:
    zygote, template = new_template(lambda link: os.write(link.fileno(), (1000).to_bytes(4, "big") + b"half"))
    assert template.link.poll(DEADLINE_S)
    listening = threading.Thread(target=zygote.listen_to, args=(template,), daemon=True)
    listening.start()
    listening.join(DEADLINE_S)
    assert not listening.is_alive()
    assert (zygote.templates, zygote.failures, template.retired) == ([], {template.kind: 1}, True)
    with pytest.raises(ChildProcessError):
        os.waitpid(template.pid, os.WNOHANG)


def test_a_template_that_hears_nothing_more_gets_no_more_orders(
    new_template: Callable[..., Any],
) -> None:
    zygote, template = new_template(lambda link: None)
    template.busy = False
    zygote.note_imports(template.kind, [f"module_{number}" for number in range(100_000)])
    assert template.retired
    assert os.waitstatus_to_exitcode(os.waitpid(template.pid, 0)[1]) == -signal.SIGKILL


def test_a_template_that_is_busy_is_told_no_more_than_its_socket_takes(new_template: Callable[..., Any]) -> None:
    zygote, template = new_template(lambda link: None)
    order: Any = SimpleNamespace(message=bytes(16_000))
    template.ready = template.built = True
    told = 0
    while template.accepts(order):
        template.link.send(("fork", order.message))
        template.note_told(len(order.message))
        told += 1
    assert told == 3
    zygote.note_imports(template.kind, ["module" * 10_000])
    assert not template.retired
    # Once it has done all that it was told to, it has read that, too.
    template.busy, template.unread_bytes = False, 0
    assert template.accepts(order)


def test_a_template_that_is_retired_imports_no_more_and_goes_on_for_its_servers() -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        template = Template(Kind((), (), (), "/", ()), {}, theirs, ["a"])
        ours.send((IMPORT, ["b"]))
        assert template.obey() is True
        assert not template.retired
        ours.send((RETIRE, None))
        assert template.obey() is False
        assert (template.retired, template.modules) == (True, [])


def test_a_template_that_is_retired_stands_for_its_kind_no_more() -> None:
    zygote = _Zygote.__new__(_Zygote)
    nothing: Any = None
    kind = Kind((), (), (), "/", ())
    retired, current = zygote.templates = [_TemplateHandle(kind, pid, nothing) for pid in (1, 2)]
    retired.retired = True
    assert zygote.template_of(kind) is current
    assert zygote.template_of(Kind((), (), (), "/", ("other",))) is None
    current.retired = True
    assert zygote.template_of(kind) is None


def test_a_zygote_has_so_many_templates_and_ends_the_one_that_has_been_idle_for_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zygote = _Zygote.__new__(_Zygote)
    zygote.unforkable, zygote.failures = {}, {}
    kinds = [Kind((), (), (), "/", (str(number),)) for number in range(MOST_TEMPLATES)]
    nothing: Any = SimpleNamespace(send=lambda message: None)
    zygote.templates = [_TemplateHandle(kind, 0, nothing) for kind in kinds]
    other = Kind((), (), (), "/", ("other",))

    def refuse() -> int:
        raise OSError("no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    # All have been used just now.
    assert zygote.make_template(other) is None
    idle = zygote.templates[3]
    idle.used -= TEMPLATE_USED_S
    with pytest.raises(OSError, match="no more processes"):
        zygote.make_template(other)
    assert [template for template in zygote.templates if template.retired] == [idle]
    # There is room now.
    with pytest.raises(OSError, match="no more processes"):
        zygote.make_template(other)
    assert [template for template in zygote.templates if template.retired] == [idle]


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(b"no pickle", id="junk"),
        pytest.param(pickle.dumps(None)[:-1], id="half"),
        # As of another version of mpmm.
        pytest.param(pickle.dumps(None), id="something else"),
        pytest.param(b"cmpmm.errors\nNewError\n.", id="unknown class"),
        pytest.param(b"cmpmm.new\nOrder\n.", id="unknown module"),
        pytest.param(b"cmpmm.errors\nModelServerError\n(tR.", id="other arguments"),
    ],
)
def test_a_zygote_that_does_not_understand_an_order_hangs_up_and_keeps_nothing_of_it(
    tmp_path: Path, order: bytes
) -> None:
    key = os.urandom(32)
    zygote = _Zygote.__new__(_Zygote)
    registry: Any = SimpleNamespace(key=lambda: key)
    zygote.registry, zygote.listener = registry, sockets.listen(tmp_path, "zygote.socket")
    zygote.requesters = {}
    before = open_descriptors()

    def order_something() -> bytes:
        with contextlib.closing(sockets.dial(tmp_path, "zygote.socket", key)) as connection:
            connection.send_bytes(order)
            forkserver_client._send_streams(connection, connection)
            return connection.recv_bytes()

    thread, outcome = in_thread(order_something)
    assert wait([zygote.listener], DEADLINE_S)
    zygote.meet_requester()
    while zygote.requesters:
        (requester,) = zygote.requesters
        assert wait([requester], DEADLINE_S)
        zygote.hear(requester)
    thread.join(DEADLINE_S)
    # The others where the streams were not read, or not even sent, before the zygote hung up.
    assert [type(error) in (EOFError, ConnectionResetError, BrokenPipeError) for error in outcome] == [True]
    outcome.clear()
    assert not open_descriptors() - before
    zygote.listener.close()


def test_a_zygote_hangs_up_on_a_requester_that_never_says_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_TIMEOUT_S", -1.0)
    zygote = _Zygote.__new__(_Zygote)
    registry: Any = SimpleNamespace(key=lambda: b"key")
    zygote.registry, zygote.listener = registry, sockets.listen(tmp_path, "zygote.socket")
    zygote.requesters = {}
    before = open_descriptors()
    with socket.socket(socket.AF_UNIX) as silent:
        with sockets._short_address(tmp_path, "zygote.socket") as address:
            silent.connect(address)
        silent.send(b"half")
        zygote.meet_requester()
        zygote.hear(*zygote.requesters)
        zygote.hang_up_on_silent()
        assert zygote.requesters == {}
        silent.settimeout(DEADLINE_S)
        assert silent.recv(1) == b""
    assert not open_descriptors() - before
    zygote.listener.close()


def test_a_zygote_does_not_ignore_its_childrens_ends_as_its_starter_does(path: str) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        shared(path, "first")
        pid = zygote_of(path)
    finally:
        signal.signal(signal.SIGCHLD, before)
    shared(path, "second")
    unload("second", path=path)
    shared(path, "third")
    assert zygote_of(path) == pid


def test_a_descriptor_of_an_order_is_closed_once() -> None:
    descriptor = Descriptor(os.open(os.devnull, os.O_RDONLY))
    descriptor.close()
    # It may have the number that has just become free.
    with open(os.devnull, "rb") as other:
        descriptor.close()
        assert os.fstat(other.fileno())
    assert descriptor.fileno() == -1


def fail_to_start(*arguments: Any) -> None:
    raise OSError("no such interpreter")


def acquire_importing(memory: dict[str, Any], name: str, path: str) -> int:
    memory[name] = MultiProcessShared(Importing(name), name, path=path, always_proxy=True, spawn_process=True).acquire()
    return int(memory[name].pid())
