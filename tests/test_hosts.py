"""A host in this process: what it answers, what it serves, and how it ends, without connections or with its own."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import pytest
from harness import held_by_a_thread, in_child, open_descriptors, wait_until
from patience import DEADLINE_S

from mpmm.errors import ModelServerError, RemoteCallError, SharedObjectReleasedError
from mpmm.multi_process_shared import host as module
from mpmm.multi_process_shared import hosted, references
from mpmm.multi_process_shared.host import (
    END_HOSTS_PRIORITY,
    LOOK_S,
    QUIET_MS,
    Host,
    can_sleep,
    declared_mb,
    end_all_hosts,
    host_object,
    new_record,
    public_methods,
)
from mpmm.multi_process_shared.life import LifeLock
from mpmm.multi_process_shared.registry import (
    LEAVE_PRIORITY,
    ServerRecord,
    ServerRegistry,
    registry_at,
    start_time_of,
    write_record,
)
from mpmm.multi_process_shared.rpc import protocol, sockets
from mpmm.multi_process_shared.rpc.channel import Channel, Message
from mpmm.multi_process_shared.rpc.protocol import decode_answer, encode_request
from mpmm.multi_process_shared.start_server import DISOWN_PRIORITY


class Model:
    """A shared object that can sleep, and keeps what it is asked."""

    kind = "a class attribute"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.number = 5

    @property
    def costly(self) -> Any:
        raise AssertionError("properties are not read")

    @property
    def method_of_a_property(self) -> Callable[[], int]:
        raise AssertionError("properties are not read")

    def predict(self, number: int, *, plus: int = 0) -> int:
        return 2 * number + plus

    def generator(self) -> Iterator[int]:
        yield from range(3)

    def generators(self) -> list[Iterator[int]]:
        return [self.generator(), self.generator()]

    def sleep(self) -> None:
        self.asked.append("sleep")

    def wake_up(self) -> None:
        self.asked.append("wake up")

    def get_asked(self) -> list[str]:
        return self.asked

    def fail(self) -> None:
        raise ValueError("failed")

    def fork(self) -> int:
        return os.fork()

    def _private(self) -> None:
        raise AssertionError("never called")


# Threads of hosts that earlier tests have left.
_earlier: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerRegistry]:
    """A registry whose only client is this process, which has no other host."""
    monkeypatch.setattr(hosted, "_hosts", {})
    _earlier.update(threading.enumerate())
    registry = registry_at(tmp_path)
    registry.join()
    yield registry
    registry.leave()
    assert not registry.path.exists()


@pytest.fixture
def host(registry: ServerRegistry) -> Iterator[Host]:
    """A host of a model, made by itself, which answers connections, too."""
    life = registry.take_life("it")
    assert life is not None
    host_object(registry, new_record(registry, "it", spawned=False, ready=True), Model, Model(), life)
    host = hosted.find_host(registry, "it")
    assert host is not None
    yield host
    host.end()
    wait_until(lambda: not threads(), "its threads have ended")


def threads() -> list[threading.Thread]:
    """Return the threads of hosts."""
    found = [thread for thread in threading.enumerate() if thread.name.startswith("mpmm-host-")]
    return [thread for thread in found if thread not in _earlier]


def ask(host: Host, token: int, name: str, *args: Any, **kwargs: Any) -> Any:
    """Return what a host answers to a request of this process."""
    answer = host._answer(encode_request(token, name, args, kwargs), os.getpid(), [])
    assert answer is not None
    return decode_answer(answer, "it", name)


# Answers.


def test_a_host_answers_requests_for_its_object(host: Host) -> None:
    control = protocol.CONTROL
    token, methods = ask(host, control, protocol.ACQUIRE, False)
    assert methods == host.methods
    another, known = ask(host, control, protocol.ACQUIRE, True)
    assert (known, another != token) == (None, True)
    assert ask(host, token, "predict", 4, plus=1) == 9
    with pytest.raises(ValueError, match="failed"):
        ask(host, token, "fail")
    with pytest.raises(AttributeError, match="'it' has no public method '_private'"):
        ask(host, token, "_private")
    assert ask(host, control, protocol.RELEASE, another) is None
    with pytest.raises(SharedObjectReleasedError, match="'it' was released through this proxy"):
        ask(host, another, "predict", 4)
    with pytest.raises(SharedObjectReleasedError):
        ask(host, control, protocol.RELEASE, another)
    for move in (protocol.SLEEP, protocol.SLEEP, protocol.WAKE_UP, protocol.SLEEP):
        assert ask(host, control, move) is None
    assert ask(host, token, "get_asked") == ["sleep", "wake up", "sleep"]
    with pytest.raises(RemoteCallError, match="unknown request 'nonsense'") as caught:
        ask(host, control, "nonsense")
    assert (caught.value.tag, caught.value.method) == ("it", "nonsense")
    junk = host._answer(Message(b"junk"), None, [])
    assert junk is not None
    with pytest.raises(UnpicklingError):
        decode_answer(junk, "it", "?")


def test_a_host_knows_the_methods_that_its_object_has_gained(host: Host) -> None:
    token = host.acquire()
    with pytest.raises(AttributeError, match="'it' has no public method 'later'"):
        ask(host, token, "later", 4)
    host._shared.later = abs
    assert ask(host, token, "later", -4) == 4
    host._shared.last = abs
    assert "last" not in host.methods
    methods = ask(host, protocol.CONTROL, protocol.METHODS, token)
    assert methods == host.methods == public_methods(host._shared)
    assert "last" in methods
    host.release(token)
    with pytest.raises(SharedObjectReleasedError):
        ask(host, protocol.CONTROL, protocol.METHODS, token)


def test_a_host_answers_requests_for_what_it_has_lent(host: Host) -> None:
    control = protocol.CONTROL
    token = host.acquire()
    # It arrives as the object itself, because this process has it; so what is lent is looked up in the host.
    assert list(ask(host, token, "generator")) == [0, 1, 2]
    lent = host.references.portable(Lends(), os.getpid(), [])
    number = lent._parts[2]
    assert ask(host, control, protocol.GET, number, "name") == (False, "lent")
    assert ask(host, control, protocol.GET, number, "double") == (True, None)
    assert ask(host, control, protocol.CALL, number, "double", (4,), {"plus": 1}) == 9
    assert len(host.references) == 1
    assert ask(host, control, protocol.DROP, [number]) is None
    assert len(host.references) == 0
    with pytest.raises(SharedObjectReleasedError, match="a result of 'it' that stayed in its server is no longer kept"):
        ask(host, control, protocol.GET, number, "name")


def test_a_result_that_cannot_be_lent_is_an_error_and_nothing_stays(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = host.acquire()
    lend, calls = host.references._lend, itertools.count(1)

    def fails_second(*args: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError("no room for the second")
        return lend(*args)

    monkeypatch.setattr(host.references, "_lend", fails_second)
    with pytest.raises(MemoryError, match="no room for the second"):
        ask(host, token, "generators")
    assert len(host.references) == 0


def test_without_a_free_descriptor_a_result_is_lent_all_the_same(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    host.references.portable(Lends(), os.getpid(), [])
    monkeypatch.setattr(references, "start_time_of", fails)
    lent: list[int] = []
    host.references.portable(Lends(), os.getpid(), lent)
    assert (len(host.references), lent) == (2, [2])


class Lends:
    """Stays in the server."""

    name = "lent"

    def double(self, number: int, plus: int) -> int:
        return 2 * number + plus

    def __reduce__(self) -> Any:
        raise TypeError("not this one")


def test_a_hard_delete_is_answered_by_the_end_of_the_connection(registry: ServerRegistry, host: Host) -> None:
    token = host.acquire()
    called: list[bool] = []
    host._at_hard_delete = lambda: called.append(os.path.exists(registry.path / host.record.socket_name))
    assert host._answer(encode_request(protocol.CONTROL, protocol.HARD_DELETE, (), {}), None, []) is None
    assert called == [False], "it is called once its socket is removed"
    with pytest.raises(ModelServerError, match="the shared object 'it' was deleted; acquire it again") as caught:
        ask(host, token, "predict", 4)
    assert (caught.value.tag, caught.value.server_pid) == ("it", os.getpid())
    with pytest.raises(ModelServerError):
        host.acquire()
    host.hard_delete()
    assert len(called) == 1
    assert host._shared is None


def test_a_child_that_a_call_forks_ends_with_the_call_and_answers_nothing(host: Host) -> None:
    token = host.acquire()
    reader, writer = os.pipe()
    pids: list[int] = []
    fork = os.fork

    def fork_and_note() -> int:
        pid = fork()
        if pid:
            pids.append(pid)
        else:
            os.close(reader)
        return pid

    os.fork = fork_and_note
    try:
        assert ask(host, token, "fork") == pids[0]
    finally:
        os.fork = fork
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
    assert os.read(reader, 1) == b""
    os.close(reader)


# Objects.


def test_the_object_is_made_again_for_a_user_that_comes_after_the_last_one(host: Host) -> None:
    shared = host._shared
    first, second = host.acquire(), host.acquire()
    assert host.object_for(first) is host.object_for(second) is shared
    host.sleep()
    host.release(first)
    host.release(second)
    assert host._shared is None
    host.sleep()
    host.methods = frozenset()
    third = host.acquire()
    assert host.object_for(third) is not shared
    assert host.object_for(host.acquire()) is host.object_for(third)
    assert "predict" in host.methods
    # The new one is awake.
    host.wake_up()
    assert host.object_for(third).asked == []
    assert len({first, second, third}) == 3


class Odd:
    """An object whose attributes raise, with a callable one."""

    def __init__(self) -> None:
        self.callable_attribute = str

    @property
    def costly(self) -> Any:
        raise AssertionError("properties are not read")

    def __getattr__(self, name: str) -> Any:
        raise ValueError(name)

    def __dir__(self) -> list[str]:
        return ["a_method", "broken", "callable_attribute", "costly", "last", "_private"]

    def a_method(self) -> None:
        """Do nothing."""

    def last(self) -> None:
        """Do nothing."""

    def __call__(self) -> None:
        """Do nothing."""


def test_public_methods_are_those_that_can_be_read_and_called() -> None:
    assert public_methods(Odd()) == {"a_method", "callable_attribute", "last", "__call__"}
    methods = {"predict", "generator", "generators", "sleep", "wake_up", "get_asked", "fail", "fork"}
    assert public_methods(Model()) == methods


def test_only_an_object_with_both_plain_methods_can_sleep(caplog: pytest.LogCaptureFixture) -> None:
    def method(self: Any) -> None:
        """Do nothing."""

    async def coroutine(self: Any) -> None:
        """Do nothing."""

    kinds: tuple[tuple[dict[str, Any], bool], ...] = (
        ({"sleep": method, "wake_up": method}, True),
        ({"sleep": method}, False),
        ({"wake_up": method}, False),
        ({"sleep": method, "wake_up": 5}, False),
        ({}, False),
    )
    members: dict[str, Any]
    for members, sleeps in kinds:
        assert can_sleep(type("Kind", (), members)()) is sleeps, members
    assert not caplog.records
    for members in ({"sleep": method, "wake_up": coroutine}, {"sleep": coroutine, "wake_up": method}):
        assert can_sleep(type("Kind", (), members)()) is False
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    instance: Any = type("Kind", (), {})()
    instance.sleep = instance.wake_up = lambda: None
    assert can_sleep(instance) is False, "its type must have them"


def test_a_size_that_an_object_declares_counts_if_it_is_one() -> None:
    def declared(value: Any) -> float | None:
        return declared_mb(SimpleNamespace(expect_mb=value))

    assert [declared(value) for value in (1, 2.5, 1e-9)] == [1.0, 2.5, 1e-9]
    for value in (None, 0, -1.0, float("inf"), float("nan"), "5", True):
        assert declared(value) is None, value

    class Fails:
        @property
        def expect_mb(self) -> float:
            raise ValueError("not yet")

    assert declared_mb(Fails()) is None
    assert declared_mb(object()) is None


def test_a_record_says_which_process_serves_and_where(registry: ServerRegistry) -> None:
    records = [new_record(registry, "it", spawned=spawned, ready=not spawned) for spawned in (True, False)]
    assert [(record.spawned, record.ready, record.leaving) for record in records] == [
        (True, False, False),
        (False, True, False),
    ]
    first, second = records
    assert (first.tag, first.pid, first.start_time) == ("it", os.getpid(), start_time_of(os.getpid()))
    assert len(first.incarnation) == 32
    assert first.incarnation != second.incarnation
    assert first.socket_name == registry.socket_name("it", first.incarnation)


def test_the_start_of_a_process_may_be_unknown(registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "start_time_of", lambda pid: None)
    assert new_record(registry, "it", spawned=True, ready=True).start_time == 0.0


# Lives.


def test_a_host_is_published_and_leaves_nothing_when_it_ends(registry: ServerRegistry) -> None:
    before = open_descriptors()
    life = registry.take_life("it")
    assert life is not None
    record = new_record(registry, "it", spawned=False, ready=True)
    left = registry.path / registry.socket_name("it", "earlier!")
    left.touch()
    host_object(registry, record, Model, Model(), life)
    assert not left.exists()
    assert registry.look("it") == (True, replace(record, sleeps=True, expect_mb=None))
    host = hosted.find_host(registry, "it")
    assert host is not None
    assert host.record.sleeps
    assert (host.lives_by(life), host.lives_by(None)) == (True, False)
    socket_path = registry.path / record.socket_name
    assert socket_path.exists()
    line = Channel(sockets.dial(registry.path, record.socket_name, registry.key()))
    line.send(encode_request(protocol.CONTROL, protocol.ACQUIRE, (True,), {}))
    assert decode_answer(line.receive(), "it", "acquire")[1] is None
    end_all_hosts(but=life)
    assert socket_path.exists()
    end_all_hosts()
    assert (socket_path.exists(), life.path.exists(), life.fd) == (False, False, -1)
    assert hosted.find_host(registry, "it") is None
    with pytest.raises((EOFError, OSError)):
        line.receive()
    line.close()
    host.end()
    wait_until(lambda: not threads(), "its threads have ended")
    del host
    wait_until(lambda: not {one for one in open_descriptors() - before if "socket" in one}, "its sockets are closed")


def test_a_host_whose_record_cannot_be_written_ends(registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    life = registry.take_life("it")
    assert life is not None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_record", full)
    with pytest.raises(OSError, match="No space left"):
        host_object(registry, new_record(registry, "it", spawned=False, ready=True), Model, Model(), life)
    assert (registry.look("it"), hosted.find_host(registry, "it"), life.fd) == ((False, None), None, -1)
    wait_until(lambda: not threads(), "its threads have ended")


def test_a_life_file_is_not_put_back_while_the_record_is_written_into_it(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    life, looks = registry.take_life("it"), list[threading.Thread]()
    assert life is not None

    def write_late(to: LifeLock, record: ServerRecord) -> None:
        fd = to.fd
        if not looks:
            to.path.unlink()
            host = hosted.find_host(registry, "it")
            assert host is not None
            looks.append(threading.Thread(target=host.look_after_files))
            looks[0].start()
            looks[0].join(0.2)
        # A number that is closed may be another file's by then.
        os.fstat(fd)
        write_record(to, record)

    monkeypatch.setattr(module, "write_record", write_late)
    host_object(registry, new_record(registry, "it", spawned=False, ready=True), Model, Model(), life)
    looks[0].join(DEADLINE_S)
    assert life.is_current()
    is_served, record = registry.look("it")
    assert is_served
    assert record is not None
    assert record.pid == os.getpid()
    host = hosted.find_host(registry, "it")
    assert host is not None
    host.end()
    wait_until(lambda: not threads(), "its threads have ended")


def test_an_end_that_fails_keeps_no_other_host_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def end(number: int) -> None:
        ended.append(number)
        raise OSError("the registry is gone")

    hosts = [SimpleNamespace(lives_by=lambda life: False, end=lambda number=number: end(number)) for number in range(2)]
    monkeypatch.setattr(hosted, "every_host", lambda: hosts)
    end_all_hosts()
    assert ended == [0, 1]


def test_a_host_that_has_lost_its_life_file_removes_no_other(registry: ServerRegistry) -> None:
    life = registry.take_life("it")
    assert life is not None
    host_object(registry, new_record(registry, "it", spawned=False, ready=True), Model, Model(), life)
    host = hosted.find_host(registry, "it")
    assert host is not None
    life.path.unlink()
    life.path.touch()
    (registry.path / host.record.socket_name).unlink()
    host.end()
    assert life.path.exists()
    life.path.unlink()
    wait_until(lambda: not threads(), "its threads have ended")


def test_a_forked_child_has_no_part_in_its_parents_host(host: Host) -> None:
    host.acquire()

    def look() -> tuple[Any, ...]:
        found = (host.inherited, hosted.find_host(host.registry, "it"), len(hosted._inherited), host._connections)
        for lock in (host._lock, host._sleep_lock, host._connections_lock):
            assert lock.acquire(timeout=DEADLINE_S)
        return found

    with held_by_a_thread(host._lock, host._sleep_lock, host._connections_lock):
        assert in_child(look) == (True, None, 1, set())
    assert (host.inherited, hosted.every_host()) == (False, [host])


# Threads.


NOW = 1000.0


class Threads(Host):
    """A host that notes what its thread does, in `done`, and takes its answers from `says`."""

    def __init__(self, **says: list[Any]) -> None:
        self.tag = "it"
        self.says = says
        self.done: list[str] = []
        self._leads_next: Any = SimpleNamespace(
            acquire=lambda: self.done.append("follow"), release=lambda: self.done.append("let the follower go")
        )
        self._follower_lock: Any = contextlib.nullcontext()
        self._has_follower = False
        self._look_due = NOW + LOOK_S
        self.missed_by: list[Any] = []
        self._life: Any = SimpleNamespace(listeners=self.missed_by, answering=self.answering)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        yield
        self.done.append("answer")

    def look_after_files(self) -> None:
        self.done.append("look after the files")

    def _accept(self) -> Any:
        return self.says["accept"].pop(0)

    def _serve_connection(self, connection: Any) -> None:
        self.done.append(f"serve {connection}")

    def _start_thread(self, leads: bool) -> None:
        self.done.append(f"start a thread, leads={leads}")
        if self.says.get("threads"):
            raise self.says["threads"].pop(0)


def test_a_thread_follows_leads_serves_and_follows_again_unless_another_does() -> None:
    host = Threads(accept=["one", "two", None])
    host._has_follower = True
    host._serve(leads=True)
    assert host.done == [
        # There is one that leads from now on, and so a place for this one afterwards.
        *("let the follower go", "serve one", "follow"),
        *("let the follower go", "serve two", "follow"),
        "let the follower go",
    ]
    host = Threads(accept=["one"])
    host._serve_connection = lambda connection: setattr(host, "_has_follower", True)  # type: ignore[method-assign]  # meanwhile
    host._serve(leads=False)
    assert host.done == ["follow", "start a thread, leads=True"]


def test_a_thread_without_another_one_to_lead_does_so_itself(caplog: pytest.LogCaptureFixture) -> None:
    closed: list[str] = []
    client: Any = SimpleNamespace(close=lambda: closed.append("hung up"))
    host = Threads(accept=[client, None], threads=[RuntimeError("can't start new thread")])
    host._serve(leads=True)
    assert (closed, host.done) == (["hung up"], ["start a thread, leads=True", "let the follower go"])
    assert "has no thread to serve 'it': can't start new thread" in caplog.text


def test_there_is_one_follower() -> None:
    host = Threads(threads=[RuntimeError("can't start new thread")])
    host._start_follower()
    assert (host.done, host._has_follower) == (["start a thread, leads=False"], False)
    host._start_follower()
    assert (len(host.done), host._has_follower) == (2, True)
    host._start_follower()
    assert (len(host.done), host._follow_from_now()) == (2, False)
    host._has_follower = False
    assert (host._follow_from_now(), host._has_follower) == (True, True)


def test_a_log_handler_that_raises_keeps_no_thread_from_leading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the log's server is away")

    monkeypatch.setattr(module.logger, "warning", fail)
    Threads()._complain("mpmm: pid %d cannot %r: %s", OSError())


def test_a_host_that_can_accept_no_connection_waits_a_moment_and_closes_what_it_listens_with(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host: Any = Threads()
    waits: list[Any] = []
    closed: list[str] = []
    waker: Any = SimpleNamespace(close=lambda: closed.append("waker"))
    listener: Any = SimpleNamespace(close=lambda: closed.append("listener"), fileno=lambda: 5)
    host._listener, host._waker = listener, waker
    accepted: list[Any] = [OSError(errno.EMFILE, "Too many open files"), None, "connection"]
    # What is heard: a client that cannot be accepted, nothing for a while, one that is gone, and one that is there.
    heard: list[list[Any]] = [[listener], [], [], [listener], [listener], [waker]]
    now, passes = [NOW], [0.25, 0.0, LOOK_S - 0.25, 0.5, 0.0, 0.0]

    def accept(found: Any) -> Any:
        assert found is listener
        one = accepted.pop(0)
        if isinstance(one, OSError):
            raise one
        return one

    def wait(things: list[Any], timeout: float | None = None) -> list[Any]:
        waits.append((len(things), timeout))
        now[0] += passes.pop(0)
        return heard.pop(0)

    monkeypatch.setattr(sockets, "accept", accept)
    monkeypatch.setattr(module, "wait", wait)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert str(Host._accept(host)) == "connection"
    assert waits == [(2, LOOK_S), (1, 0.1), (2, LOOK_S - 0.25), (2, LOOK_S), (2, LOOK_S - 0.5)]
    assert host.done == ["look after the files", "answer"]
    assert "cannot accept a connection for 'it': [Errno 24] Too many open files" in caplog.text
    assert closed == []
    assert Host._accept(host) is None
    assert closed == ["listener", "waker"]
    host._listener = SimpleNamespace(fileno=lambda: -1)  # closed by the thread before
    assert Host._accept(host) is None
    assert len(waits) == 6


def test_a_host_looks_after_its_files_at_once_if_a_process_does_not_find_them(monkeypatch: pytest.MonkeyPatch) -> None:
    host: Any = Threads()
    waits: list[Any] = []
    listener, host._waker = SimpleNamespace(fileno=lambda: 5, close=lambda: None), SimpleNamespace(close=lambda: None)
    host._listener = listener
    host.missed_by.append("a process")

    def look_after_files() -> None:
        host.done.append("look after the files")
        # The end of the host closes the life lock.
        host.missed_by[:] = ["closed"] if len(waits) == 1 else []

    def wait(things: list[Any], timeout: float | None = None) -> list[Any]:
        waits.append((things[2:], timeout))
        if things[2:] == ["closed"]:
            host.missed_by.clear()
            raise ValueError("Invalid file descriptor: -1")
        return ["a process"] if len(waits) == 1 else [host._waker]

    host.look_after_files = look_after_files
    monkeypatch.setattr(module, "wait", wait)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: NOW + LOOK_S / 2))
    assert Host._accept(host) is None
    assert host.done == ["look after the files", "answer"]
    # The next look is due as long after that one as after any other.
    assert waits == [(["a process"], LOOK_S / 2), (["closed"], LOOK_S), ([], LOOK_S)]


def test_a_host_that_cannot_answer_waits_a_moment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host: Any = Threads()
    waits: list[Any] = []
    host._listener, host._waker = SimpleNamespace(fileno=lambda: 5, close=list), SimpleNamespace(close=list)
    host.missed_by.append("a process")

    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    def wait(things: list[Any], timeout: float | None = None) -> list[Any]:
        waits.append((len(things), timeout))
        return [["a process"], [], [host._waker]][len(waits) - 1]

    host._life.answering = fail
    monkeypatch.setattr(module, "wait", wait)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: NOW))
    assert Host._accept(host) is None
    assert waits == [(3, LOOK_S), (1, 0.1), (3, LOOK_S)]
    assert "cannot accept a connection for 'it': [Errno 24] Too many open files" in caplog.text


class Answer(str):
    """An answer that a weak reference may refer to."""


def test_a_connection_is_served_until_it_ends_and_its_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def serve(*requests: Any, authentic: Any = None, follower: bool = False, readable: bool = True) -> list[Any]:
        done: list[Any] = []
        sent: list[weakref.ref[Answer]] = []
        incoming = list(requests)
        host: Any = Threads()
        host._connections, host._connections_lock = set(), contextlib.nullcontext()
        host._ended, host._has_follower = False, follower
        host.registry = SimpleNamespace(key=lambda: b"key")
        host.references = SimpleNamespace(
            client_hung_up=lambda pid: done.append(("hung up", pid)),
            drop=lambda numbers: done.append(("drop", *numbers)),
        )

        class Line:
            has_heard = False

            def __init__(self, connection: Any) -> None:
                assert host._connections == set(), "the channel takes over"

            def fileno(self) -> int:
                return 5

            def give_back_when_idle(self) -> None:
                done.append("idle")
                assert not [answer for answer in sent if answer() is not None], "it is kept until the next request"

            def is_readable(self, timeout_ms: int) -> bool:
                done.append(("readable", timeout_ms))
                return readable

            def receive(self) -> Any:
                assert host._connections == {self}
                if not incoming:
                    raise EOFError
                self.has_heard = True
                return incoming.pop(0)

            def send(self, answer: Any) -> None:
                self.has_heard = False
                done.append(("send", str(answer)))

            def close(self) -> None:
                done.append("close")

        def answer(message: Any, client: int | None, lent: list[int]) -> Any:
            assert (client, lent) == (17, []), "what was lent earlier has arrived"
            if message == "end":
                host._ended = True
            if message == "delete":
                return None
            answer = Answer(f"answer to {message}")
            sent.append(weakref.ref(answer))
            lent.append(len(sent))
            return answer

        def authenticate(connection: Any, key: bytes) -> None:
            assert host._connections == {connection}
            if authentic is not None:
                raise authentic

        monkeypatch.setattr(module, "Channel", Line)
        monkeypatch.setattr(sockets, "authenticate_client", authenticate)
        monkeypatch.setattr(sockets, "peer_pid", lambda fd: 17 if fd == 5 else None)
        host._answer = answer
        host._start_follower = lambda: done.append("follower")
        ours, theirs = socket.socketpair()
        with theirs:
            connection = Connection(ours.detach())
            Host._serve_connection(host, connection)
            if authentic is not None:
                assert connection.closed
            else:
                connection.close()
        assert host._connections == set()
        return done

    quick = ["idle", ("readable", QUIET_MS)]
    ends = ["close", ("hung up", 17)]
    assert serve("one", "two") == [
        *(*quick, ("send", "answer to one"), *quick, ("send", "answer to two"), *quick),
        # The client has not received what the second answer has lent.
        *("close", ("drop", 2), ("hung up", 17)),
    ]
    assert serve("one", readable=False)[:3] == [*quick, "follower"]
    assert serve("one", follower=True) == [
        *("idle", ("send", "answer to one"), "idle", "close", ("drop", 1), ("hung up", 17))
    ]
    assert serve("delete", "never") == [*quick, *ends]
    assert serve("end", "never") == [*(*quick, ("send", "answer to end"), "close", ("drop", 1), ("hung up", 17))]
    assert not caplog.records
    assert serve("never", authentic=EOFError()) == [("hung up", None)]
    assert not caplog.records
    assert serve("never", authentic=ValueError("another key")) == [("hung up", None)]
    assert "refused a connection for 'it': another key" in caplog.text


def test_threads_of_a_host_keep_no_program_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(module, "start_thread", started.append)
    for leads in (True, False):
        Host._start_thread(Threads(), leads)
    assert [(thread.name, thread.daemon, thread._args) for thread in started] == [
        ("mpmm-host-it", True, (True,)),
        ("mpmm-host-it", True, (False,)),
    ]


def test_at_the_end_of_a_process_its_servers_are_disowned_then_its_hosts_end_and_then_registries_are_left() -> None:
    assert DISOWN_PRIORITY > END_HOSTS_PRIORITY > LEAVE_PRIORITY
