"""Shared objects between real processes: who serves, who lives how long, what deaths cost."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import psutil
import pytest
from counters import (
    ChangesItsText,
    Counter,
    NeedsTwo,
    NoSuchWeights,
    SlowToConstruct,
    die_in_constructor,
    fail_to_construct,
    fork_sleeper,
    remember_tag,
)
from harness import import_path

from mpmm.errors import (
    InvalidArgumentError,
    ModelServerError,
    NotAcquiredError,
    RemoteCallError,
    ServerStartError,
    SharedObjectReleasedError,
)
from mpmm.multi_process_shared import MultiProcessShared, SharedProxy, server_pid, unload
from mpmm.multi_process_shared.client import ServerLink
from mpmm.multi_process_shared.context import ServerContext, attach_namespace, namespace_of, serving_for
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.registry import registry_for
from mpmm.multi_process_shared.rpc import sockets
from mpmm.shared_state.lock_file import LockFile

DEADLINE_S = 30.0
# The time after its last client in which a server has to be gone: a probe a second, and a loaded machine.
LAST_CLIENT_S = 10.0


class Attachable:
    """Shared state by itself, as a model manager is."""

    attach_in_place = True
    made: ClassVar[int] = 0
    resets: ClassVar[int] = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.namespace = attach_namespace.get()

    def force_reset(self) -> None:
        type(self).resets += 1


class NotesThatNobodyIsLeft:
    """Note in a file that it was called, and whether the lock is free for whoever cleans up."""

    def __init__(self, lock: Path, note: Path) -> None:
        self.lock = lock
        self.note = note

    def __call__(self) -> None:
        self.note.write_text(f"free={LockFile(self.lock).try_exclusive()}")


# What workers do; the first argument is the worker's memory.


def acquire(memory: dict[str, Any], tag: str, path: str, spawn: bool = True) -> int:
    memory[tag] = MultiProcessShared(Counter, tag, path=path, always_proxy=True, spawn_process=spawn).acquire()
    return int(memory[tag].pid())


def increment(memory: dict[str, Any], tag: str) -> int:
    return int(memory[tag].increment())


def acquire_slow(memory: dict[str, Any], constructor: SlowToConstruct, tag: str, path: str) -> int:
    return int(MultiProcessShared(constructor, tag, path=path, spawn_process=True).acquire().increment())


def attach(memory: dict[str, Any], tag: str, path: str) -> tuple[int, bool]:
    handle = MultiProcessShared(Attachable, tag, path=path, always_proxy=True)
    first, second = handle.acquire(), handle.acquire()
    return Attachable.made, first is second


def call_pickled(memory: dict[str, Any], pickled: bytes) -> int:
    return int(pickle.loads(pickled).increment())


def descriptors_left_by_a_host(memory: dict[str, Any], path: str) -> int:
    """Host an object for several threads, delete it, see its threads end, and count the descriptors that stay."""

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("mpmm-host-")]

    def use(proxy: Any) -> None:
        proxy.increment()
        gate.wait(DEADLINE_S)
        # Long enough for another thread to be made ready for the next client.
        time.sleep(0.05)

    # What a process needs once.
    shared(path, tag="another", always_proxy=True).acquire().unsafe_hard_delete()
    wait_until(lambda: not threads(), DEADLINE_S, lambda: str(threads()))
    before = len(os.listdir("/proc/self/fd"))
    proxy = shared(path, always_proxy=True).acquire()
    gate = threading.Barrier(6)
    clients = [threading.Thread(target=use, args=(proxy,)) for _ in range(gate.parties)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(DEADLINE_S)
    assert proxy.increment() == 7
    proxy.unsafe_hard_delete()
    wait_until(lambda: not threads(), DEADLINE_S, lambda: str(threads()))
    del proxy
    gc.collect()
    return len(os.listdir("/proc/self/fd")) - before


def run_forked_starter(memory: dict[str, Any], tag: str, path: str) -> int | None:
    """Have a child that multiprocessing forked start a server and leave; return its exit code."""
    child = multiprocessing.get_context("fork").Process(target=acquire, args=({}, tag, path))
    child.start()
    child.join(DEADLINE_S)
    return child.exitcode


class Worker:
    """A process that does what it is told, until it is told to leave or is killed."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.ours, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_obey, args=(theirs,))
        self.process.start()
        theirs.close()

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        self.ours.send((function, args))

    def answer(self) -> Any:
        assert self.ours.poll(DEADLINE_S), "the worker does not answer"
        failed, value = self.ours.recv()
        assert not failed, value
        return value

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        self.begin(function, *args)
        return self.answer()

    def leave(self) -> int | None:
        self.ours.send(None)
        self.process.join(DEADLINE_S)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        # Not `join`: a child that the worker forked keeps open the pipe whose end `join` waits for.
        wait_until(lambda: not self.process.is_alive(), DEADLINE_S, lambda: "the worker survives SIGKILL")


def _obey(theirs: Connection) -> None:
    memory: dict[str, Any] = {}
    while (order := theirs.recv()) is not None:
        function, args = order
        try:
            theirs.send((False, function(memory, *args)))
        except Exception:
            theirs.send((True, traceback.format_exc()))


@pytest.fixture
def new_worker() -> Iterator[Callable[[], Worker]]:
    workers: list[Worker] = []

    def make() -> Worker:
        workers.append(Worker())
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()
        worker.ours.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """A folder for one room, which has to be gone in the end once this process has left it too."""
    folder = tmp_path / "p"
    folder.mkdir()
    yield str(folder)
    registry = registry_for(str(folder))
    # What this process itself would serve to its end; spawned servers have to go by themselves.
    if (host := find_host(registry, "it")) is not None:
        host.hard_delete()
    registry.leave()
    wait_until(lambda: not any(folder.iterdir()), LAST_CLIENT_S, lambda: f"left behind: {sorted(folder.rglob('*'))}")


def wait_until(condition: Callable[[], bool], deadline_s: float, what: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


def holds_for(duration_s: float, condition: Callable[[], bool]) -> bool:
    """Tell whether the condition stays true; the clock is what is tested here."""
    end = time.monotonic() + duration_s
    while condition():
        if time.monotonic() >= end:
            return True
        time.sleep(0.05)
    return False


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        # An orphan's zombie stays where no init reaps it.
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def shared(path: str, tag: str = "it", constructor: Callable[[], Any] = Counter, **options: Any) -> Any:
    return MultiProcessShared(constructor, tag, path=path, **options)


# Life and death.


def test_a_server_outlives_its_starter_and_ends_soon_after_the_last_client_is_killed(
    path: str, new_worker: Callable[[], Worker]
) -> None:
    starter, other = new_worker(), new_worker()
    pid = starter.do(acquire, "it", path)
    assert other.do(acquire, "it", path) == pid
    starter.kill()
    assert other.do(increment, "it") == 1
    assert is_running(pid)
    other.kill()
    wait_until(lambda: not is_running(pid), LAST_CLIENT_S, lambda: "the server still runs")
    wait_until(lambda: not any(Path(path).iterdir()), 1.0, lambda: "the room is still there")


def test_a_starter_that_leaves_neither_waits_for_its_server_nor_ends_it(
    path: str, new_worker: Callable[[], Worker]
) -> None:
    starter, other = new_worker(), new_worker()
    pid = starter.do(acquire, "it", path)
    other.do(acquire, "it", path)
    assert starter.leave() == 0
    assert other.do(increment, "it") == 1
    assert other.leave() == 0
    wait_until(lambda: not is_running(pid), LAST_CLIENT_S, lambda: "the server still runs")


def test_the_last_client_to_leave_removes_a_room_without_servers(path: str, new_worker: Callable[[], Worker]) -> None:
    serving, other = new_worker(), new_worker()
    serving.do(acquire, "it", path, False)
    other.do(acquire, "it", path, False)
    assert other.leave() == 0
    assert any(Path(path).iterdir())
    assert serving.leave() == 0
    assert not any(Path(path).iterdir())


def test_a_killed_server_is_an_error_in_the_call_and_the_next_acquire_starts_another(path: str) -> None:
    handle = shared(path, spawn_process=True)
    proxy = handle.acquire()
    pid = proxy.pid()
    with pytest.raises(ModelServerError, match=str(pid)) as caught:
        proxy.end_abruptly()
    assert (caught.value.tag, caught.value.server_pid) == ("it", pid)
    with pytest.raises(ModelServerError):
        proxy.increment()
    handle.release(proxy)
    afresh = handle.acquire()
    assert afresh.increment() == 1
    assert afresh.pid() != pid


def test_a_server_killed_between_calls_is_replaced_silently(path: str) -> None:
    handle = shared(path, spawn_process=True)
    pid = handle.acquire().pid()
    os.kill(pid, signal.SIGKILL)
    assert shared(path, spawn_process=True).acquire().pid() != pid
    assert len(list(registry_for(path).path.glob("*.sock"))) == 1


def test_a_server_whose_starter_died_meanwhile_is_used_by_the_next(
    path: str, tmp_path: Path, new_worker: Callable[[], Worker]
) -> None:
    constructor = SlowToConstruct(tmp_path)
    starter, other = new_worker(), new_worker()
    starter.begin(acquire_slow, constructor, "it", path)
    pid = int((tmp_path / "began").read_text())
    assert server_pid("it", path=path) == pid
    other.do(acquire, "keeps the room", path)
    starter.kill()
    other.begin(acquire, "it", path)
    (tmp_path / "go").write_text("")
    assert other.answer() == pid
    assert other.do(increment, "it") == 101


def test_a_server_that_a_server_started_goes_with_the_clients_of_the_first(
    path: str, new_worker: Callable[[], Worker]
) -> None:
    client = new_worker()
    outer = client.do(acquire, "it", path)
    inner = shared(path).acquire().start_another(path)
    registry_for(path).leave()
    assert is_running(inner)
    client.kill()
    wait_until(lambda: not is_running(outer) and not is_running(inner), 2 * LAST_CLIENT_S, lambda: "servers run")


def test_ctrl_c_at_the_starter_leaves_the_server_alone(path: str) -> None:
    proxy = shared(path, spawn_process=True).acquire()
    assert os.getsid(proxy.pid()) != os.getsid(0)


def test_sigterm_ends_a_server_and_its_socket(path: str) -> None:
    pid = shared(path, spawn_process=True).acquire().pid()
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_running(pid), DEADLINE_S)
    assert not list(registry_for(path).path.glob("*.sock"))


# Fork.


def test_a_forked_child_does_not_keep_a_server_alive(path: str, new_worker: Callable[[], Worker]) -> None:
    client = new_worker()
    pid = client.do(acquire, "it", path)
    sleeper = client.do(fork_sleeper)
    try:
        client.kill()
        wait_until(lambda: not is_running(pid), LAST_CLIENT_S, lambda: "the server still runs")
        assert is_running(sleeper)
    finally:
        os.kill(sleeper, signal.SIGKILL)


def test_a_child_of_the_server_does_not_hide_the_servers_death(path: str) -> None:
    proxy = shared(path, spawn_process=True).acquire()
    sleeper = proxy.fork_sleeper()
    try:
        with pytest.raises(ModelServerError):
            proxy.end_abruptly()
        assert server_pid("it", path=path) is None
    finally:
        os.kill(sleeper, signal.SIGKILL)


def test_a_child_that_multiprocessing_forked_leaves_without_waiting_for_the_server_it_started(
    path: str, new_worker: Callable[[], Worker]
) -> None:
    assert new_worker().do(run_forked_starter, "it", path) == 0


@pytest.mark.parametrize("always_proxy", [False, True])
def test_a_forked_child_uses_its_parents_object_through_proxies_of_before(path: str, always_proxy: bool) -> None:
    handle = shared(path, always_proxy=always_proxy)
    proxy = handle.acquire()
    assert proxy.increment() == 1

    def in_child() -> None:
        assert proxy.increment() == 2
        assert proxy.pid() == os.getppid()
        mine = handle.acquire()
        assert mine.increment() == 3
        handle.release(mine)

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(DEADLINE_S)
    assert child.exitcode == 0
    assert proxy.increment() == 4


# Rooms, names, keys.


def test_the_room_is_private(path: str) -> None:
    proxy = shared(path, always_proxy=True).acquire()
    registry = registry_for(path)
    assert proxy.increment() == 1
    assert registry.path.stat().st_mode & 0o777 == 0o700
    assert (registry.path / "key").stat().st_mode & 0o777 == 0o600
    assert not any(entry.stat().st_mode & 0o077 for entry in registry.path.glob("*.l*"))


@pytest.mark.parametrize("has_proc", [True, False] if sys.platform == "linux" else [False])
def test_a_path_too_long_for_a_socket_address_works(path: str, monkeypatch: pytest.MonkeyPatch, has_proc: bool) -> None:
    monkeypatch.setattr(sockets, "_HAS_PROC", has_proc)
    long_path = str(Path(path, "long" * 30, "longer" * 20))
    handle = shared(long_path, always_proxy=True)
    proxy = handle.acquire()
    assert proxy.increment() == 1
    handle.unsafe_hard_delete()
    registry_for(long_path).leave()
    for folder in (Path(long_path), Path(long_path).parent):
        folder.rmdir()


def test_tags_may_hold_anything_and_stay_in_the_room(path: str) -> None:
    tags = ["a/../../b", "a_.._.._b", "", "\N{SNOWMAN}", "nul\0", "x" * 1000, "\udce9"]
    handles = [shared(path, tag, functools.partial(Counter, len(tag)), always_proxy=True) for tag in tags]
    proxies = [handle.acquire() for handle in handles]
    assert [proxy.increment() for proxy in proxies] == [len(tag) + 1 for tag in tags]
    assert [entry.name for entry in Path(path).rglob("*") if entry.is_dir()] == [f"mpmm-{os.getuid()}", "shared"]
    for handle in handles:
        handle.unsafe_hard_delete()


def test_a_tag_that_is_not_a_string_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="42"):
        MultiProcessShared(Counter, 42)


def test_a_client_with_another_key_is_refused(path: str) -> None:
    proxy = shared(path, always_proxy=True).acquire()
    registry = registry_for(path)
    _, record = registry.look("it")
    assert record is not None
    with pytest.raises(AuthenticationError):
        sockets.dial(registry.path, record.socket_name, os.urandom(32))
    assert proxy.increment() == 1


@pytest.mark.parametrize("client", [0, 2, 65535])
def test_a_client_of_another_version_is_told_both_versions(
    path: str, monkeypatch: pytest.MonkeyPatch, client: int
) -> None:
    ours = sockets.PROTOCOL_VERSION
    started: Any = shared(path, always_proxy=True, spawn_process=True).acquire()
    assert started.increment() == 1
    registry = registry_for(path)
    _, record = registry.look("it")
    assert record is not None
    monkeypatch.setattr(sockets, "PROTOCOL_VERSION", client)
    with pytest.raises(AuthenticationError, match=f"server speaks version {ours} .* this process version {client}"):
        sockets.dial(registry.path, record.socket_name, registry.key())
    monkeypatch.undo()
    assert started.increment() == 2


def test_the_default_path_is_the_users_runtime_directory(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPMM_RUNTIME_DIR", f"{path}/chosen")
    handle: Any = MultiProcessShared(Counter, "it")
    handle.acquire()
    assert server_pid("it") == os.getpid()
    assert Path(path, "chosen", "shared").is_dir()
    assert unload("it")
    registry_for(None).leave()


def test_a_room_that_somebody_removed_is_made_again(path: str) -> None:
    handle = shared(path, always_proxy=True)
    handle.acquire()
    handle.unsafe_hard_delete()
    registry_for(path).directory.remove()
    assert handle.acquire().increment() == 1


# Starting.


def test_of_many_that_come_at_once_one_starts_the_server(path: str, new_worker: Callable[[], Worker]) -> None:
    workers = [new_worker() for _ in range(4)]
    for worker in workers:
        worker.begin(acquire, "it", path)
    assert len({worker.answer() for worker in workers}) == 1
    assert [worker.do(increment, "it") for worker in workers] == [1, 2, 3, 4]


def test_a_constructor_that_raises_in_a_server_brings_its_traceback(path: str) -> None:
    with pytest.raises(ServerStartError, match="Shared Server Process crashed") as caught:
        shared(path, constructor=fail_to_construct, spawn_process=True).acquire()
    assert "in fail_to_construct" in str(caught.value)
    assert "ZeroDivisionError: no such model" in str(caught.value)
    assert server_pid("it", path=path) is None
    assert shared(path, spawn_process=True).acquire().increment() == 1


def test_a_constructor_that_raises_in_this_process_raises_as_it_is(path: str) -> None:
    with pytest.raises(ZeroDivisionError):
        shared(path, constructor=fail_to_construct).acquire()
    assert shared(path).acquire().increment() == 1


def test_a_server_that_is_killed_while_it_starts_brings_its_exit_code(path: str) -> None:
    with pytest.raises(ServerStartError, match="exit code -9"):
        shared(path, constructor=die_in_constructor, spawn_process=True).acquire()


def test_a_transient_connection_error_is_tried_again(path: str) -> None:
    assert shared(path, always_proxy=True).acquire().increment() == 1
    proxy = pickle.loads(pickle.dumps(shared(path).acquire()))
    connect = ServerLink.connect
    failures = iter([ConnectionRefusedError("not yet"), EOFError()])

    def fail_twice(link: ServerLink) -> Connection:
        for failure in failures:
            raise failure
        return connect(link)

    results: list[int] = []
    with patch.object(ServerLink, "connect", fail_twice):
        # In a thread of its own, which has no connection yet.
        thread = threading.Thread(target=lambda: results.append(proxy.increment()))
        thread.start()
        thread.join(DEADLINE_S)
    assert results == [2]


def test_a_constructor_that_cannot_be_pickled_goes_through_cloudpickle_or_is_refused(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = 41
    find_spec = importlib.util.find_spec
    if find_spec("cloudpickle") is not None:
        assert shared(path, "tag", lambda: Counter(start), spawn_process=True).acquire().increment() == 42
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cloudpickle" else find_spec(name))
    with pytest.raises(InvalidArgumentError, match="cloudpickle"):
        shared(path, "it", lambda: Counter(start), spawn_process=True).acquire()


def test_classes_of_a_main_that_cannot_be_imported_go_through_cloudpickle(path: str) -> None:
    pytest.importorskip("cloudpickle", reason="needs cloudpickle, which comes with Beam")
    script = (
        "import sys\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "class Typed:\n"
        "    def answer(self): return 42\n"
        "handle = MultiProcessShared(Typed, 'it', path=sys.argv[1], spawn_process=True)\n"
        "print(handle.acquire().answer())\n"
        "handle.unsafe_hard_delete()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    assert (done.stdout, done.stderr) == ("42\n", "")


def test_a_server_context_reaches_the_server_and_its_lock_keeps_it_alive(
    path: str, tmp_path: Path, new_worker: Callable[[], Worker]
) -> None:
    lock_path, note = tmp_path / "members.lock", tmp_path / "note"
    member = LockFile(lock_path)
    assert member.try_shared()
    context = ServerContext(
        alive_lock=str(lock_path),
        environment=(("MPMM_TEST_CONTEXT", "yes"),),
        on_start=remember_tag,
        on_last=NotesThatNobodyIsLeft(lock_path, note),
    )
    with serving_for(context):
        proxy = shared(path, spawn_process=True).acquire()
    pid = proxy.pid()
    assert proxy.environment("MPMM_TEST_CONTEXT") == "yes"
    assert proxy.environment("STARTED_FOR") == "it"
    registry_for(path).leave()
    # The room is free, but the further lock is not: the server goes on through more than one of its looks.
    assert holds_for(2.2, lambda: is_running(pid))
    assert not note.exists()
    member.close()
    wait_until(lambda: not is_running(pid), LAST_CLIENT_S, lambda: "the server still runs")
    assert note.read_text() == "free=True"


# Calls.


@pytest.fixture(params=[False, True], ids=["hosted", "spawned"])
def proxy(request: pytest.FixtureRequest, path: str) -> Any:
    return shared(path, always_proxy=True, spawn_process=request.param).acquire()


def test_exceptions_arrive_as_themselves_with_the_remote_traceback(proxy: Any) -> None:
    with pytest.raises(KeyError, match="missing key") as caught:
        proxy.raises_key_error()
    assert "in raises_key_error" in str(caught.value.__cause__)


def test_what_cannot_be_sent_back_is_a_clear_error(proxy: Any) -> None:
    with pytest.raises(RemoteCallError, match=r"CannotBeMadeAgain: leftright") as caught:
        proxy.raises_what_does_not_unpickle()
    assert "in raises_what_does_not_unpickle" in str(caught.value)
    with pytest.raises(RemoteCallError, match="SystemExit: 3"):
        proxy.leaves()
    assert proxy.increment() == 1


def test_exceptions_with_an_init_of_their_own_arrive_as_themselves(proxy: Any) -> None:
    with pytest.raises(NeedsTwo) as two:
        proxy.raises_needs_two()
    assert (two.value.args, two.value.left, str(two.value)) == (("leftright",), "left", "leftright")
    assert "in raises_needs_two" in str(two.value.__cause__)
    with pytest.raises(ChangesItsText) as changed:
        proxy.raises_changed_text()
    assert str(changed.value) == "code 5"
    with pytest.raises(NoSuchWeights) as missing:
        proxy.raises_os_error()
    assert (missing.value.errno, missing.value.filename) == (2, "/models/resnet")
    assert str(missing.value) == "[Errno 2] no weights: '/models/resnet'"


def test_whoever_connects_and_proves_nothing_holds_no_thread(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_TIMEOUT_S", 0.2)
    proxy = shared(path, always_proxy=True).acquire()
    host = find_host(registry_for(path), "it")
    assert host is not None
    before = len(host._connections)
    strangers = []
    for said in (b"", b"half a nonce"):
        stranger = socket.socket(socket.AF_UNIX)
        with sockets._short_address(registry_for(path).path, host.record.socket_name) as address:
            stranger.connect(address)
        stranger.sendall(said)
        strangers.append(stranger)
    for stranger in strangers:
        stranger.settimeout(DEADLINE_S)
        assert stranger.recv(1) == b""
        stranger.close()
    wait_until(lambda: len(host._connections) == before, DEADLINE_S, lambda: "a connection was left open")
    assert proxy.increment() == 1


def test_a_worker_of_loky_starts_a_server(path: str, tmp_path: Path) -> None:
    pytest.importorskip("joblib", reason="needs loky, which comes with joblib")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from joblib import Parallel, delayed\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "def start(path, zygote):\n"
        "    os.environ['MPMM_ZYGOTE'] = zygote\n"
        "    handle = MultiProcessShared(dict, f'it {zygote}', path=path, spawn_process=True)\n"
        "    found = handle.acquire().get(1, 42)\n"
        "    handle.unsafe_hard_delete()\n"
        "    return found\n"
        "if __name__ == '__main__':\n"
        "    print(Parallel(2)(delayed(start)(f'{sys.argv[1]}', zygote) for zygote in '01'))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), path],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    assert done.stdout == "[42, 42]\n", done.stderr


def test_a_server_finds_a_module_that_its_starter_found_in_a_folder_which_is_off_the_path_by_now(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "app folder"
    (folder / "mpmm_test_app").mkdir(parents=True)
    (folder / "mpmm_test_app" / "__init__.py").write_text("")
    (folder / "mpmm_test_app" / "models.py").write_text("class Model:\n    def answer(self): return 42\n")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(folder))
        models = importlib.import_module("mpmm_test_app.models")
    assert str(folder) not in sys.path
    for number, zygote in enumerate("01"):
        monkeypatch.setenv("MPMM_ZYGOTE", zygote)
        for constructor in (models.Model, functools.partial(models.Model)):
            proxy = shared(path, f"{number} {type(constructor)}", constructor, spawn_process=True).acquire()
            assert proxy.answer() == 42


class ImportsNothing:
    """A constructor that looks for a module that is not there."""

    def __call__(self) -> Any:
        return importlib.import_module("mpmm_no_such_module")


def test_a_module_that_a_server_does_not_find_is_an_error_that_says_where_it_looked(path: str) -> None:
    with pytest.raises(ServerStartError, match=r"(?s)No module named 'mpmm_no_such_module'.*sys.path there: \["):
        shared(path, "it", ImportsNothing(), spawn_process=True).acquire()


def test_arguments_that_cannot_be_pickled_leave_the_proxy_usable(proxy: Any) -> None:
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        proxy.increment(lambda: 1)
    assert proxy.increment(5) == 5


def test_only_public_methods_can_be_called(proxy: Any) -> None:
    for name in ("count", "_private", "no_such_method", "__len__"):
        with pytest.raises(AttributeError, match=name):
            getattr(proxy, name)
    use = proxy._mpmm_use
    with pytest.raises(AttributeError, match="_private"):
        use.link.ask(use.token, "_private", (), {})
    with pytest.raises(AttributeError, match="__call__"):
        proxy()


def test_a_long_call_in_one_thread_does_not_block_another(proxy: Any) -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(proxy.wait_until_open()))
    thread.start()
    proxy.open()
    thread.join(DEADLINE_S)
    assert results == [True]


def test_a_threads_connection_ends_with_the_thread(path: str) -> None:
    proxy = shared(path, always_proxy=True).acquire()
    host = find_host(registry_for(path), "it")
    assert host is not None
    before = len(host._connections)
    thread = threading.Thread(target=proxy.increment)
    thread.start()
    thread.join(DEADLINE_S)
    wait_until(lambda: len(host._connections) == before, DEADLINE_S, lambda: "a connection was left open")


def test_a_host_leaves_no_thread_and_no_descriptor(path: str, new_worker: Callable[[], Worker]) -> None:
    worker = new_worker()
    assert worker.do(descriptors_left_by_a_host, path) == 0
    assert worker.leave() == 0


def test_a_pickled_proxy_connects_from_another_process(proxy: Any, new_worker: Callable[[], Worker]) -> None:
    assert new_worker().do(call_pickled, pickle.dumps(proxy)) == 1
    assert proxy.increment() == 2


def test_the_process_that_has_the_object_uses_it_directly(path: str) -> None:
    handle = shared(path)
    proxy = handle.acquire()
    assert isinstance(proxy, SharedProxy)
    assert proxy.count == 0
    assert proxy.returns_generator() is not None
    handle.release(proxy)
    with pytest.raises(SharedObjectReleasedError):
        _ = proxy.count


def test_a_later_acquire_needs_no_new_connection(proxy: Any, path: str) -> None:
    with patch.object(ServerLink, "connect", side_effect=AssertionError("connected again")):
        assert shared(path, always_proxy=True).acquire().increment() == 1


# Releases and deletes.


def test_the_last_release_drops_the_object_but_not_the_server(path: str) -> None:
    handle = shared(path, spawn_process=True)
    first, second = handle.acquire(), handle.acquire()
    pid = first.pid()
    first.increment()
    handle.release(first)
    with pytest.raises(SharedObjectReleasedError, match="released"):
        first.increment()
    with pytest.raises(SharedObjectReleasedError):
        handle.release(first)
    assert second.increment() == 2
    handle.release(second)
    third = handle.acquire()
    assert (third.increment(), third.pid()) == (1, pid)


@pytest.mark.parametrize("always_proxy", [False, True])
def test_releasing_after_a_hard_delete_is_no_error(path: str, always_proxy: bool) -> None:
    handle = shared(path, always_proxy=always_proxy)
    proxy = handle.acquire()
    handle.unsafe_hard_delete()
    with pytest.raises(ModelServerError, match=r"deleted|gone|ended"):
        proxy.increment()
    handle.release(proxy)
    with pytest.raises(SharedObjectReleasedError):
        proxy.increment()


def test_releasing_something_else_is_refused(path: str) -> None:
    with pytest.raises(NotAcquiredError, match="it"):
        shared(path).release(object())


def test_a_hard_delete_of_nothing_does_nothing(path: str) -> None:
    shared(path).unsafe_hard_delete()
    assert server_pid("it", path=path) is None
    assert not unload("it", path=path)


def test_a_hard_delete_through_an_old_proxy_leaves_the_next_object_alone(path: str) -> None:
    old = shared(path, always_proxy=True).acquire()
    shared(path).unsafe_hard_delete()
    new = shared(path, always_proxy=True).acquire()
    assert new.increment() == 1
    old.unsafe_hard_delete()
    assert new.increment() == 2
    with pytest.raises(ModelServerError):
        old.increment()


def test_unload_returns_when_the_server_is_gone(proxy: Any, path: str) -> None:
    pid = proxy.pid()
    assert server_pid("it", path=path) == pid
    assert unload("it", path=path)
    assert pid == os.getpid() or not is_running(pid)
    assert server_pid("it", path=path) is None
    assert {entry.name for entry in registry_for(path).path.iterdir()} - {"zygote"} == {"alive.lock", "key"}
    assert not unload("it", path=path)
    with pytest.raises(ModelServerError):
        proxy.increment()


def test_unload_reaches_an_object_that_another_process_serves(path: str, new_worker: Callable[[], Worker]) -> None:
    worker = new_worker()
    assert worker.do(acquire, "it", path, False) == server_pid("it", path=path)
    assert unload("it", path=path)
    assert server_pid("it", path=path) is None
    assert worker.do(acquire, "it", path, False) == worker.process.pid


def test_unload_kills_a_server_that_does_not_answer(path: str) -> None:
    pid = shared(path, spawn_process=True).acquire().pid()
    os.kill(pid, signal.SIGSTOP)
    assert unload("it", path=path, timeout_seconds=0.2)
    assert not is_running(pid)


def test_unload_does_not_kill_a_worker_that_serves_beside_other_work(
    path: str, new_worker: Callable[[], Worker]
) -> None:
    worker = new_worker()
    pid = worker.do(acquire, "it", path, False)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ModelServerError, match=str(pid)):
            unload("it", path=path, timeout_seconds=0.2)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_unload_kills_a_server_that_is_still_starting(
    path: str, tmp_path: Path, new_worker: Callable[[], Worker]
) -> None:
    starter = new_worker()
    starter.begin(acquire_slow, SlowToConstruct(tmp_path), "it", path)
    pid = int((tmp_path / "began").read_text())
    assert unload("it", path=path)
    assert not is_running(pid)
    with pytest.raises(AssertionError, match="exit code -9"):
        starter.answer()
    assert starter.leave() == 0


# Attach in place.


def test_an_object_that_attaches_is_made_once_in_each_process_and_served_by_none(
    path: str, new_worker: Callable[[], Worker]
) -> None:
    made = Attachable.made
    handle = shared(path, "model/manager", Attachable, always_proxy=True)
    mine = handle.acquire()
    assert type(mine) is Attachable
    assert mine.namespace == (namespace_of("model/manager"), registry_for(path).root)
    for worker in (new_worker(), new_worker()):
        assert worker.do(attach, "model/manager", path) == (1, True)
    assert handle.acquire() is mine
    assert Attachable.made == made + 1
    assert server_pid("model/manager", path=path) is None
    handle.release(mine)
    handle.release(mine)
    with pytest.raises(NotAcquiredError):
        handle.release(mine)
    assert handle.acquire() is not mine


def test_an_object_that_attaches_is_not_spawned_either(path: str) -> None:
    mine = shared(path, "it", Attachable, spawn_process=True).acquire()
    assert type(mine) is Attachable
    assert server_pid("it", path=path) is None


def test_a_hard_delete_of_an_attached_object_resets_it(path: str) -> None:
    handle = shared(path, "it", Attachable)
    mine, resets = handle.acquire(), Attachable.resets
    handle.unsafe_hard_delete()
    assert Attachable.resets == resets + 1
    assert handle.acquire() is not mine


def test_a_forked_child_attaches_anew(path: str) -> None:
    handle = shared(path, "it", Attachable)
    mine = handle.acquire()

    def in_child() -> None:
        assert handle.acquire() is not mine

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(DEADLINE_S)
    assert child.exitcode == 0


def test_a_tag_may_turn_from_an_attached_object_into_a_served_one(path: str) -> None:
    attached = shared(path, "it", Attachable)
    attached.release(attached.acquire())
    assert shared(path, always_proxy=True).acquire().increment() == 1
    assert not registry_for(path).attach_marker("it").exists()


def test_namespaces_of_different_tags_differ() -> None:
    assert namespace_of("model_manager") == "mps.model_manager"
    names = [namespace_of(tag) for tag in ("a/b", "a_b", "a.b", "x" * 100, "x" * 101, "x" * 59 + "/")]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 64 for name in names)
