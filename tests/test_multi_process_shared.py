"""Shared objects between real processes: which process serves, lifetimes, and what deaths cost."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import math
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from containers import NOBODY, as_nobody, as_root
from counters import (
    Counter,
    SlowToConstruct,
    die_in_constructor,
    fail_to_construct,
    fork_sleeper,
)
from harness import stop_process
from patience import DEADLINE_S
from shared_workers import (
    LAST_CLIENT_S,
    Client,
    acquire,
    acquire_slow,
    holds_for,
    increment,
    is_running,
    run_forked_starter,
    shared,
    wait_until,
)
from shared_workers import new_worker as new_worker  # the fixture
from shared_workers import path as path  # the fixture
from shared_workers import proxy as proxy  # the fixture

from mpmm.errors import (
    InvalidArgumentError,
    ModelServerError,
    ServerStartError,
    SharedObjectReleasedError,
)
from mpmm.multi_process_shared import MultiProcessShared, server_pid, unload
from mpmm.multi_process_shared.client import ServerLink
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.registry import registry_for
from mpmm.multi_process_shared.rpc import sockets

# Life and death.


def test_a_server_outlives_its_starter_and_ends_soon_after_the_last_client_is_killed(
    path: str, new_worker: Callable[[], Client]
) -> None:
    starter, other = new_worker(), new_worker()
    pid = starter.do(acquire, "it", path)
    assert other.do(acquire, "it", path) == pid
    starter.kill()
    assert other.do(increment, "it") == 1
    assert is_running(pid)
    other.kill()
    wait_until(lambda: not is_running(pid), LAST_CLIENT_S, lambda: "the server still runs")
    wait_until(lambda: not any(Path(path).iterdir()), 1.0, lambda: "the registry is still there")


def test_a_starter_that_leaves_neither_waits_for_its_server_nor_ends_it(
    path: str, new_worker: Callable[[], Client]
) -> None:
    starter, other = new_worker(), new_worker()
    pid = starter.do(acquire, "it", path)
    other.do(acquire, "it", path)
    assert starter.leave() == 0
    assert other.do(increment, "it") == 1
    assert other.leave() == 0
    wait_until(lambda: not is_running(pid), LAST_CLIENT_S, lambda: "the server still runs")


def test_the_last_client_to_leave_removes_a_registry_without_servers(
    path: str, new_worker: Callable[[], Client]
) -> None:
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
    path: str, tmp_path: Path, new_worker: Callable[[], Client]
) -> None:
    constructor = SlowToConstruct(tmp_path)
    starter, other = new_worker(), new_worker()
    starter.begin(acquire_slow, constructor, "it", path)
    pid = int((tmp_path / "began").read_text())
    assert server_pid("it", path=path) == pid
    other.do(acquire, "keeps the registry", path)
    starter.kill()
    other.begin(acquire, "it", path)
    (tmp_path / "go").write_text("")
    assert other.answer() == pid
    assert other.do(increment, "it") == 101


def test_a_server_that_a_server_started_goes_with_the_clients_of_the_first(
    path: str, new_worker: Callable[[], Client]
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


def test_a_forked_child_does_not_keep_a_server_alive(path: str, new_worker: Callable[[], Client]) -> None:
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
    path: str, new_worker: Callable[[], Client]
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


def test_the_registry_is_private(path: str) -> None:
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


def test_tags_may_hold_anything_and_stay_in_the_registry(path: str) -> None:
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


@as_root
def test_a_server_refuses_another_user_though_that_has_the_key() -> None:
    folder = Path(tempfile.mkdtemp(prefix="mpmm-t"))
    listener = sockets.listen(folder, "s")
    for place in (folder, folder / "s"):
        place.chmod(0o777)

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(str(folder / "s"))

    try:
        assert as_nobody(connect) == "None"
        connection = sockets.accept(listener)
        assert connection is not None
        with connection, pytest.raises(AuthenticationError, match=f"a process of uid {NOBODY} tried to connect"):
            sockets.authenticate_client(connection, b"key")
    finally:
        listener.close()
        shutil.rmtree(folder)


def test_a_server_refuses_a_client_of_another_version_before_it_has_proved_anything() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Connection(ours.detach()) as connection:
        # As long as ever: of other lengths neither would come to know the other's version.
        theirs.sendall((sockets.PROTOCOL_VERSION + 1).to_bytes(2, "big") + bytes(30))
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(AuthenticationError, match="the client speaks version"):
            sockets.authenticate_client(connection, b"key")
        answer = theirs.recv(1000)
    assert answer[:2] == sockets.PROTOCOL_VERSION.to_bytes(2, "big")
    assert len(answer) == 64


def test_a_client_whose_time_is_over_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def wait(peers: list[Any], timeout: float) -> list[Any]:
        waited.append(timeout)
        return []

    monkeypatch.setattr(sockets, "HANDSHAKE_TIMEOUT_S", -1.0)
    monkeypatch.setattr(sockets, "wait", wait)
    ours, theirs = socket.socketpair()
    with theirs, Connection(ours.detach()) as connection, pytest.raises(TimeoutError):
        sockets.authenticate_client(connection, b"key")
    assert waited == [0.0]


def threads_of_hosts() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mpmm-host-")]


def test_clients_are_served_that_come_while_others_stay_silent(path: str) -> None:
    """A thread that waits for a silent client has seen to it that another one hears the next."""
    began, go_on = threading.Barrier(2), threading.Event()
    shared(path, always_proxy=True).acquire()
    counts: list[int] = []

    def call() -> None:
        count = MultiProcessShared(Counter, tag="it", path=path, always_proxy=True).acquire()
        counts.append(count.increment())
        began.wait(DEADLINE_S)
        assert go_on.wait(DEADLINE_S)

    clients = [threading.Thread(target=call) for _ in range(6)]
    for client in clients:
        client.start()
        began.wait(DEADLINE_S)
        # Each client has a thread, this one, too, and one hears the next. Once a client says nothing for a moment, its
        # thread makes one that hears the next but one.
        wait_until(lambda: len(threads_of_hosts()) == len(counts) + 3, DEADLINE_S, lambda: "nobody follows")
    go_on.set()
    for client in clients:
        client.join()
    assert counts == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("client", [0, sockets.PROTOCOL_VERSION + 1, 65535])
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


def test_a_registry_that_somebody_removed_is_made_again(path: str) -> None:
    handle = shared(path, always_proxy=True)
    handle.acquire()
    handle.unsafe_hard_delete()
    registry_for(path).directory.remove()
    assert handle.acquire().increment() == 1


def remove_sockets(folder: Path) -> None:
    for file in folder.glob("*.sock"):
        file.unlink()


def remove_life(folder: Path) -> None:
    for file in folder.glob("*.life"):
        file.unlink()


def remove_files(folder: Path) -> None:
    for file in [found for found in folder.rglob("*") if not found.is_dir()]:
        file.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("spawn", "remove"),
    [
        *((False, remove) for remove in (remove_sockets, remove_life, remove_files, shutil.rmtree)),
        *((True, remove) for remove in (remove_sockets, remove_files, shutil.rmtree)),
    ],
)
def test_newcomers_come_to_the_one_server_whatever_was_removed_of_the_registry(
    path: str,
    spawn: bool,
    remove: Callable[[Path], None],
    new_worker: Callable[[], Client],
) -> None:
    """They started another one: two copies of a model, and the one that was there was nobody's."""
    handle = shared(path, always_proxy=True, spawn_process=spawn)
    counter = handle.acquire()
    pid, registry = server_pid("it", path=path), registry_for(path)
    assert pid is not None
    newcomer = new_worker()
    # It has started.
    newcomer.do(len)
    remove(registry.path)
    assert newcomer.do(acquire, "it", path) == pid
    assert (newcomer.do(increment, "it"), counter.increment()) == (1, 2)
    assert newcomer.leave() == 0
    remove(registry.path)
    assert server_pid("it", path=path) == pid
    remove(registry.path)
    assert unload("it", path=path) is True
    assert server_pid("it", path=path) is None


@pytest.mark.parametrize("remove", [remove_sockets, remove_life, shutil.rmtree])
def test_a_thread_reaches_the_server_whatever_was_removed_of_the_registry(
    path: str, remove: Callable[[Path], None]
) -> None:
    counter = shared(path, always_proxy=True).acquire()
    assert counter.increment() == 1
    remove(registry_for(path).path)
    # A thread makes a connection of its own.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(counter.increment).result() == 2


@pytest.mark.parametrize("remove", [remove_files, shutil.rmtree])
def test_an_object_is_made_once_though_all_files_are_removed_meanwhile(
    path: str, tmp_path: Path, new_worker: Callable[[], Client], remove: Callable[[Path], None]
) -> None:
    constructor, first, second = SlowToConstruct(tmp_path), new_worker(), new_worker()
    second.do(len)
    first.begin(acquire_slow, constructor, "it", path)
    (tmp_path / "began").read_text()
    remove(registry_for(path).path)
    # It would make the object at once.
    second.begin(acquire, "it", path)
    assert not second.ours.poll(0.3)
    (tmp_path / "go").write_text("go")
    assert first.answer() == 101
    second.answer()
    assert second.do(increment, "it") == 102


def test_who_waits_for_a_server_without_files_starts_another_once_it_is_dead(
    path: str, new_worker: Callable[[], Client]
) -> None:
    client, newcomer = new_worker(), new_worker()
    newcomer.do(len)
    pid = client.do(acquire, "it", path)
    stop_process(pid)
    remove_files(registry_for(path).path)
    newcomer.begin(acquire, "it", path)
    assert not newcomer.ours.poll(0.3)
    os.kill(pid, signal.SIGKILL)
    assert newcomer.answer() != pid
    assert newcomer.do(increment, "it") == 1


@pytest.mark.parametrize("name", ["the folder", "alive.lock"])
def test_a_server_serves_those_who_came_after_its_files_were_removed_though_the_others_have_left(
    path: str, new_worker: Callable[[], Client], name: str
) -> None:
    """It watched the lock that was removed, and took the newcomers along with the last one that held that."""
    before, after = new_worker(), new_worker()
    pid = before.do(acquire, "it", path, True)
    folder = registry_for(path).path
    shutil.rmtree(folder) if name == "the folder" else (folder / name).unlink()
    wait_until(lambda: registry_for(path).look("it")[0], LAST_CLIENT_S)
    assert after.do(acquire, "it", path, True) == pid
    assert before.leave() == 0
    # It looks for clients once a second.
    assert holds_for(2.2, lambda: is_running(pid))
    assert after.do(increment, "it") == 1
    assert after.leave() == 0
    wait_until(lambda: not is_running(pid), LAST_CLIENT_S)


def test_a_host_whose_tag_another_process_has_taken_goes_on_and_says_so_once(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counter, registry = shared(path, always_proxy=True).acquire(), registry_for(path)
    host = find_host(registry, "it")
    assert host is not None
    monkeypatch.setattr(host, "_look_due", math.inf)
    os.unlink(registry.life_path("it"))
    other = registry.take_life("it")
    assert other is not None
    for _ in range(2):
        host.look_after_files()
    said = "cannot put back what was removed of the files of 'it': another process serves this tag by now"
    assert [said in record.getMessage() for record in caplog.records] == [True]
    assert counter.increment() == 1
    os.unlink(other.path)
    other.close()
    host.look_after_files()
    assert "put back the life lock of the shared object 'it'" in caplog.records[-1].getMessage()
    assert registry.look("it") == (True, host.record)
    os.unlink(registry.life_path("it"))
    host.leave_files()
    host.look_after_files()
    assert not registry.look("it")[0], "it is about to end"


# Starting.


def test_of_many_that_come_at_once_one_starts_the_server(path: str, new_worker: Callable[[], Client]) -> None:
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

    def fail_twice(link: ServerLink) -> sockets.ForkSafeSocket:
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
    # Where Beam was imported, its copy would do.
    monkeypatch.delitem(sys.modules, "apache_beam.internal.cloudpickle", raising=False)
    with pytest.raises(InvalidArgumentError, match="cloudpickle"):
        shared(path, "it", lambda: Counter(start), spawn_process=True).acquire()


@pytest.mark.parametrize("spawn_process", [True, False])
def test_a_constructor_with_a_connection_is_refused_where_it_would_be_sent_to_a_server(
    path: str, spawn_process: bool
) -> None:
    ours, theirs = multiprocessing.Pipe()
    constructors: list[Callable[[], Any]] = [functools.partial(Holding, ours)]
    if importlib.util.find_spec("cloudpickle") is not None:
        constructors.append(lambda: Holding(ours))
    with ours, theirs:
        for number, constructor in enumerate(constructors):
            shared_object = shared(path, f"tag {number}", constructor, spawn_process=spawn_process)
            if spawn_process:
                refused = rf"^the constructor of 'tag {number}' cannot be sent .*: a Connection is a file descriptor"
                with pytest.raises(InvalidArgumentError, match=refused):
                    shared_object.acquire()
            else:
                assert shared_object.acquire().is_readable()
                assert unload(f"tag {number}", path=path)


class Holding:
    """Has a connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def is_readable(self) -> bool:
        return self.connection.readable


def test_only_the_object_that_is_meant_is_unloaded(path: str) -> None:
    """One that this process has itself is told apart from others as a server is."""
    MultiProcessShared(Counter, tag="mine", path=path).acquire()
    assert server_pid("mine", path=path) == os.getpid()
    assert not unload("mine", path=path, pid=os.getppid())
    assert server_pid("mine", path=path) == os.getpid()
    assert unload("mine", path=path, pid=os.getpid())
    assert server_pid("mine", path=path) is None


def test_a_proxy_answers_for_itself_what_protocols_probe_for(proxy: Any) -> None:
    """Its object has no say in that, nor is it asked by a proxy that has no connection yet."""
    for name in ("__array__", "__len__", "__anything__"):
        with pytest.raises(AttributeError, match=name):
            getattr(proxy, name)
    empty = object.__new__(type(proxy))
    with pytest.raises(AttributeError, match="_mpmm_use"):
        _ = empty._mpmm_use
    assert {"_mpmm_use", "__getattr__"} <= {*dir(type(proxy)), *vars(proxy)}


@pytest.mark.parametrize("name", ["mpmm", "mpmm.model_manager", "mpmm.multi_process_shared"])
def test_a_package_lists_what_it_has_to_offer(name: str) -> None:
    package = importlib.import_module(name)
    assert {*package.__all__, "__name__", "__doc__"} <= {*dir(package)}


@pytest.mark.parametrize("always_proxy", [False, True])
def test_a_block_releases_what_it_acquires_and_a_collected_proxy_releases_nothing(
    path: str, always_proxy: bool
) -> None:
    made: list[int] = []

    def make() -> pathlib.PurePath:
        made.append(len(made))
        return pathlib.PurePath("a")

    shared = MultiProcessShared(make, "it", path=path, always_proxy=always_proxy)
    with shared.using() as proxy:
        assert proxy.as_posix() == "a"
    with pytest.raises(SharedObjectReleasedError):
        proxy.as_posix()
    # It was the last user, also where the block fails.
    with pytest.raises(ZeroDivisionError), shared.using():
        assert len(made) == 2
        raise ZeroDivisionError
    # As in Beam, where a loader relies on it.
    shared.acquire()
    gc.collect()
    for _ in range(3):
        with shared.using():
            assert len(made) == 3
    host = find_host(registry_for(path), "it")
    assert host is not None and len(host._users) == 1
    host.hard_delete()
