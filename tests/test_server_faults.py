"""A short fault outside a model server costs no client the server or a right answer."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe, util
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
from harness import (
    NewGate,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    has_ended,
    in_thread,
    open_descriptors,
    release,
    wait_until,
)
from loaders import Gate, LoadsServer, served
from patience import DEADLINE_S, Stopwatch
from payload_store import Store

from mpmm.errors import ModelServerError, ServerStartError
from mpmm.model_manager.load import LoadAttempt
from mpmm.multi_process_shared import (
    MultiProcessShared,
    client,
    host,
    server_pid,
    shared,
    spawned_server,
    start_server,
    unload,
)
from mpmm.multi_process_shared.context import server_contexts
from mpmm.multi_process_shared.forkserver import client as forkserver_client
from mpmm.multi_process_shared.forkserver import fork_parent
from mpmm.multi_process_shared.forkserver.fork_parent import ForkParent
from mpmm.multi_process_shared.forkserver.orders import BORN, Descriptor, ForkOrder, Kind, Order, send
from mpmm.multi_process_shared.host import Host
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.registry import ServerRecord, registry_for
from mpmm.multi_process_shared.rpc import channel, sockets
from mpmm.multi_process_shared.rpc.shared_buffer import cut_into_slots
from mpmm.multi_process_shared.server_process import CRASHED, ServerPlan, run_server
from mpmm.multi_process_shared.stop_server import _is_gone
from mpmm.shared_state import transaction
from mpmm.shared_state.layout import Header
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.namespace import Namespace


class Sevens:
    """Returns a large array, and is short of descriptors when it is told to."""

    def __init__(self) -> None:
        self._kept: list[int] = []

    def pid(self) -> int:
        return os.getpid()

    def idle_ms(self, milliseconds: int) -> None:
        channel.IDLE_MS = milliseconds

    def sevens(self) -> Any:
        return np.full(4 << 20, 7, np.uint8)

    def take_descriptors(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
        try:
            while True:
                self._kept.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass

    def give_descriptors(self) -> None:
        while self._kept:
            os.close(self._kept.pop())


def refuse_threads(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let threads whose name begins like one of these not be had."""
    start = threading.Thread.start

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(names):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_refuse)


def test_a_client_that_is_stopped_in_the_middle_of_its_copy_gets_all_of_the_answer(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = MultiProcessShared(Sevens, tag="sevens", spawn_process=True).acquire()
    proxy.idle_ms(50)
    proxy.sevens()
    copying = [True]

    def cut_and_stop(buffers: Any) -> Any:
        for number, pieces in enumerate(cut_into_slots(buffers)):
            if copying and number == 1:
                copying.clear()
                subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            yield pieces

    monkeypatch.setattr(channel, "cut_into_slots", cut_and_stop)
    assert np.count_nonzero(proxy.sevens() != 7) == 0
    assert not copying
    os.wait()


def test_a_server_that_was_short_of_descriptors_ends_with_its_last_client(new_process: NewProcess) -> None:
    client = new_process(attached=False)
    pid = client.call(take_descriptors)
    client.kill()
    wait_until(lambda: not psutil.pid_exists(pid), "the server is gone")


def take_descriptors(seat: Seat) -> int:
    """Have a server short of descriptors for long enough that it notices; return its pid."""
    seat.held.append(("short", proxy := MultiProcessShared(Sevens, tag="short", spawn_process=True).acquire()))
    proxy.take_descriptors()
    time.sleep(1.6)
    proxy.give_descriptors()
    return int(proxy.pid())


def no_more(*_: object) -> Any:
    """Be a system call for which there is nothing left."""
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("call", ["pipe", "dup", "fork", "pidfd_open"])
def test_a_server_that_cannot_be_forked_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before, children = open_descriptors(), psutil.Process().children()
    ours, theirs = Pipe()
    given = [Descriptor(os.open(os.devnull, os.O_RDWR)) for _ in range(3)]
    nothing: Any = None
    order = Order(pickle.dumps(ForkOrder(nothing, {}, dict(os.environ), ())), theirs, given)
    parent = ForkParent()
    with monkeypatch.context() as patched:
        if call == "pipe":
            patched.setattr(fork_parent, "Pipe", lambda duplex: no_more())
        else:
            patched.setattr(os, call, no_more)
        parent.fork_server(order, Kind((), (), (), "/", ()))
    with pytest.raises(EOFError):
        ours.recv_bytes()
    ours.close()
    assert parent.children == set()
    assert not open_descriptors() - before
    # Those of other tests end when they like.
    assert not set(psutil.Process().children()) - set(children)


def test_a_server_that_cannot_be_spawned_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    report, reported = Pipe(duplex=False)
    nothing: Any = None
    server = spawned_server.SpawnedServer("server", nothing, {}, reported)
    monkeypatch.setattr(util, "spawnv_passfds", no_more)
    with pytest.raises(OSError, match="Too many open files"):
        server.start()
    report.close()
    reported.close()
    del server
    assert not open_descriptors() - before


@pytest.mark.parametrize("zygote", ["has gone", "names a server that has"])
def test_an_order_that_comes_to_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch, zygote: str) -> None:
    ours, theirs = Pipe()
    if zygote == "names a server that has":
        server = subprocess.Popen(["true"])
        server.wait()
        send(theirs, BORN, server.pid)
    else:
        theirs.close()
    monkeypatch.setattr(forkserver_client, "_avoid_until", 0.0)
    monkeypatch.setattr(forkserver_client, "_reach_zygote", lambda registry: ours)
    plan = ServerPlan("/", "it", (), (os.getpid(), None), (), b"", b"")
    with open(os.devnull, "wb") as report:
        # A descriptor is all that is asked of it.
        assert forkserver_client.order_server(registry_for(None), plan, {}, cast(Connection, report), "server") is None
    assert ours.closed
    theirs.close()


def test_a_client_that_is_not_answered_leaves_no_descriptor_open(tmp_path: Path) -> None:
    listener = sockets.listen(tmp_path, "socket")
    before = open_descriptors()
    # A kept error keeps everything that its frames refer to.
    with pytest.raises(BlockingIOError) as error:
        sockets.dial(tmp_path, "socket", bytes(32), timeout_seconds=0.05)
    assert not open_descriptors() - before
    assert error.tb is not None
    listener.close()


class Raises(logging.Handler):
    """A program's own log handler, whose server is away."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise."""
        raise OSError("the log's server is away")


def test_a_log_handler_that_raises_keeps_no_client_from_its_object(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MultiProcessShared(Sevens, tag="here").acquire()
    accept, failed = sockets.accept, [True]

    def fail_once(listener: Any) -> Any:
        if failed:
            failed.clear()
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(sockets, "accept", fail_once)
    handler = Raises()
    host.logger.addHandler(handler)
    try:
        pids: list[int] = []
        for _ in range(2):
            thread, outcome = in_thread(
                lambda: MultiProcessShared(Sevens, tag="here", always_proxy=True).acquire().pid()
            )
            thread.join(DEADLINE_S)
            pids += outcome
        assert pids == [os.getpid()] * 2
    finally:
        host.logger.removeHandler(handler)
        unload("here")


@pytest.mark.parametrize("method", ["close_descriptors", "close_locks"])
def test_a_server_whose_descriptors_were_closed_ends(runtime_root: Path, method: str) -> None:
    shared = MultiProcessShared(Store, tag="it", spawn_process=True, always_proxy=True)
    store: Any = shared.acquire()
    pid = store.pid()
    server = psutil.Process(pid)
    # The connection may be among them.
    with suppress(ModelServerError):
        getattr(store, method)()
    wait_until(lambda: has_ended(server), "the server has ended")
    with pytest.raises(ModelServerError):
        store.pid()
    again: Any = shared.acquire()
    assert again.pid() != pid
    shared.release(again)


def test_a_server_that_fails_before_its_object_says_why(runtime_root: Path) -> None:
    registry = registry_for(None)
    registry.join()
    plan = ServerPlan(str(registry.root), "it", (), (os.getpid(), None), (), pickle.dumps(()), pickle.dumps(dict))
    reader, writer = Pipe(duplex=False)
    pid = os.fork()
    if not pid:
        try:

            def refuse(thread: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            threading.Thread.start = refuse  # type: ignore[assignment, method-assign]  # in the child alone
            run_server(plan, writer)
        finally:
            os._exit(99)
    writer.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    outcome, text = reader.recv()
    assert outcome == CRASHED
    assert "the server of 'it' failed" in text
    assert "can't start new thread" in text


@pytest.mark.parametrize(("number", "option"), [(errno.EMFILE, "-n"), (errno.EAGAIN, "-u"), (errno.EINVAL, "")])
def test_a_server_that_cannot_be_started_is_an_error_with_the_limit(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch, number: int, option: str
) -> None:
    def refuse(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(start_server, "_begin", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (17, 17))
    with pytest.raises(ServerStartError, match=re.escape(os.strerror(number))) as caught:
        MultiProcessShared(Sevens, tag="it", spawn_process=True).acquire()
    assert str(caught.value).endswith(f" (ulimit {option}) is 17" if option else os.strerror(number))


def test_a_load_that_fails_ends_no_server_that_others_use(
    new_manager: NewManager, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, other = new_manager(), new_process()
    loader = LoadsServer("fixed")
    other.call(acquire, "model", loader)
    pid = server_pid("fixed")
    assert pid is not None

    def interrupted(attempt: Any, value: Any, growth: Any) -> Any:
        raise SystemExit(143)

    with monkeypatch.context() as patched:
        patched.setattr(LoadAttempt, "_book_in", interrupted)
        with pytest.raises(SystemExit):
            manager.acquire_model("model", loader)
    assert server_pid("fixed") == pid
    assert served("fixed") is not None
    other.call(release)


def hold_the_lock(seat: Seat, end: Gate, seconds: float) -> None:
    """Stay inside a transaction until a gate is open, or for some seconds, like a process that is stopped there."""
    with seat.manager._connected().namespace.transaction():
        end.is_open(seconds)


@pytest.mark.parametrize("ends", [False, True])
def test_a_server_that_finds_the_lock_taken_after_it_has_joined_waits_for_it_or_leaves(
    namespace: str,
    new_manager: NewManager,
    new_process: NewProcess,
    new_gate: NewGate,
    monkeypatch: pytest.MonkeyPatch,
    ends: bool,
) -> None:
    manager, other = new_manager(lock_timeout_seconds=0.2), new_process(lock_timeout_seconds=0.2)
    join, members, end = Namespace.join, [], new_gate()
    if not ends:
        monkeypatch.setattr(transaction, "PATIENT_S", 0.3)

    def join_before_the_lock_is_taken(*args: Any, **kwargs: Any) -> Namespace:
        members.append(join(*args, **kwargs))
        other.send(hold_the_lock, end, 1.0 if ends else DEADLINE_S)
        words = members[0].segment.words
        wait_until(lambda: words[Header.LOCK_HOLDER] == other.pid and words[Header.CHANGE] % 2, "the lock is taken")
        return members[0]

    def load() -> str:
        on_start = server_contexts()[-1].on_start
        assert on_start is not None
        with monkeypatch.context() as patched:
            patched.setattr(Namespace, "join", join_before_the_lock_is_taken)
            on_start("a server")
        return "handle"

    if ends:
        with manager.model("a", load):
            [copy] = copies_of(namespace, "a")
            assert copy.server == members[0].slot
        members[0].leave()
    else:
        with pytest.raises(ServerStartError, match="cannot join its namespace: the lock"):
            manager.acquire_model("a", load)
        end.open()
        assert not members[0].is_usable
    other.result()


@pytest.mark.parametrize("why", ["thread", "disk"])
def test_a_host_that_could_not_be_started_is_no_second_object_later(
    runtime_root: Path, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    shared = MultiProcessShared(Sevens, tag="one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if why == "thread":
            refuse_threads(patched, "mpmm-host")
        else:
            patched.setattr(host, "write_record", full)
        with pytest.raises((RuntimeError, OSError)):
            shared.acquire()
    assert shared.acquire().pid() == os.getpid()
    assert new_process(attached=False).call(pid_behind, "one") == os.getpid()
    unload("one")


def pid_behind(seat: Seat, tag: str) -> int:
    """Return the pid of the process that serves a tag to this one."""
    return int(MultiProcessShared(Sevens, tag=tag, always_proxy=True).acquire().pid())


def test_a_host_whose_files_are_removed_just_as_it_ends_leaves_the_tag_to_the_next(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = MultiProcessShared(Sevens, tag="deleted")
    shared.acquire()
    life = Path(registry_for(None).life_path("deleted"))
    is_current = LockFile.is_current

    def removed_since(lock: LockFile) -> bool:
        found = is_current(lock)
        if lock.path == life:
            life.unlink(missing_ok=True)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(LockFile, "is_current", removed_since)
        shared.unsafe_hard_delete()
    assert MultiProcessShared(Sevens, tag="deleted").acquire().pid() == os.getpid()
    unload("deleted")


def test_a_hard_delete_that_is_interrupted_leaves_the_tag_to_the_next(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = MultiProcessShared(Sevens, tag="deleted")
    shared.acquire()
    unpublish = Host._unpublish

    def interrupted(one: Host) -> None:
        unpublish(one)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Host, "_unpublish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shared.unsafe_hard_delete()
    watch = Stopwatch()
    assert MultiProcessShared(Sevens, tag="deleted").acquire().pid() == os.getpid()
    assert watch.calm_s() < 1.5
    unload("deleted")


def test_a_stopped_listener_whose_queue_is_full_is_waited_for_no_longer_than_asked(tmp_path: Path) -> None:
    listener = sockets.listen(tmp_path, "s")
    try:
        for _ in range(sockets.BACKLOG + 5):
            thread, outcome = in_thread(lambda: sockets.dial(tmp_path, "s", b"k" * 32, 0.02))
            thread.join(DEADLINE_S)
            assert isinstance(outcome[0], OSError)
    finally:
        listener.close()


class HasChild:
    """Starts a child process that ends with its own, if that ends as it wants to."""

    def child(self) -> int:
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
        child.start()
        assert child.pid is not None
        return child.pid


def test_a_server_is_told_to_end_where_no_thread_is_to_be_had(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = psutil.Process(MultiProcessShared(HasChild, tag="ended", spawn_process=True).acquire().child())
    with monkeypatch.context() as patched:
        # As it is from Python 3.12 on at the end of the interpreter.
        refuse_threads(patched, "mpmm-end")
        assert unload("ended", timeout_seconds=DEADLINE_S)
    assert server_pid("ended") is None
    # Killed, it would have left its child behind.
    child.wait(DEADLINE_S)


def test_a_server_that_is_forked_after_its_order_was_given_up_reports_to_nobody(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Any] = []

    def give_up(registry: Any, plan: Any, preparation: Any, report: Any, name: str) -> None:
        reports.append(os.dup(report.fileno()))

    monkeypatch.setattr(start_server, "order_server", give_up)
    thread, outcome = in_thread(lambda: MultiProcessShared(Sevens, tag="late", spawn_process=True).acquire().pid())
    wait_until(lambda: reports, "the order is given up")
    # As the one says that is forked later, while the other one is still being made.
    with pytest.raises(BrokenPipeError):
        os.write(reports[0], b"x")
    os.close(reports[0])
    thread.join(DEADLINE_S)
    assert outcome == [server_pid("late")]
    assert find_host(registry_for(None), "late") is None


def test_a_server_whose_log_cannot_be_had_says_the_rest_to_nobody_and_goes_on(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
from mpmm.multi_process_shared.output import Output
print("to the starter", flush=True)
Output(pathlib.Path(sys.argv[1])).turn_to_log("the starter has ended")
for number in (1, 2):
    os.write(number, b"lost")
print("lost", flush=True)
sys.exit(os.readlink("/proc/self/fd/1") != os.devnull)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "gone"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "to the starter\n", "")


def test_a_server_that_may_not_be_looked_at_counts_as_running(monkeypatch: pytest.MonkeyPatch) -> None:
    record = ServerRecord("tag", os.getpid(), 0.0, "1", "socket", spawned=True, ready=True)
    assert not record.is_running()

    def refuse(pid: int) -> psutil.Process:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", refuse)
    assert record.is_running() is True


@pytest.mark.parametrize(
    ("lives", "incarnation", "gone"),
    [(False, None, True), (True, None, False), (True, "this one", False), (True, "another", True)],
)
def test_a_server_is_gone_once_its_lock_is_free_or_another_ones(
    lives: bool, incarnation: str | None, gone: bool
) -> None:
    record = ServerRecord("tag", os.getpid(), 0.0, "this one", "socket", spawned=False, ready=True)
    found = None if incarnation is None else replace(record, incarnation=incarnation)
    registry: Any = SimpleNamespace(look=lambda tag: (lives, found))
    assert _is_gone(registry, record) is gone


def test_a_server_that_cannot_be_reached_is_tried_for_so_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path)
    handle: MultiProcessShared[Any] = MultiProcessShared(dict, "it", path=path)
    registry = registry_for(path)
    record = ServerRecord("it", os.getpid(), 0.0, "1", "socket", spawned=True, ready=True)
    monkeypatch.setattr(registry, "look", lambda tag: (True, record))
    tried = []

    def fail(*arguments: Any) -> Any:
        tried.append(arguments)
        raise ModelServerError("it died", tag="it", server_pid=None)

    monkeypatch.setattr(handle, "_use", fail)
    with pytest.raises(ModelServerError, match="it died"):
        handle.acquire()
    # Once without the tag's lock.
    assert len(tried) == 1 + shared.START_ATTEMPTS


@pytest.mark.parametrize("incarnation", [None, "another"], ids=["free", "another's"])
def test_a_client_whose_server_hangs_up_waits_no_longer_than_it_is_seen_to_live(
    monkeypatch: pytest.MonkeyPatch, incarnation: str | None
) -> None:
    record = ServerRecord("tag", os.getpid(), 0.0, "this one", "socket", spawned=True, ready=True)
    found = (False, None) if incarnation is None else (True, replace(record, incarnation=incarnation))
    looks = iter([(True, record), (True, None), found])
    registry: Any = SimpleNamespace(look=lambda tag: next(looks))
    monkeypatch.setattr(client, "DYING_S", DEADLINE_S)
    client.ServerLink(registry, record)._await_end()
    assert list(looks) == []


class Waits:
    """Has one method that takes until another one is called."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def wait(self) -> bool:
        self.began.set()
        return self.go_on.wait(DEADLINE_S)

    def end(self) -> bool:
        begun = self.began.wait(DEADLINE_S)
        self.go_on.set()
        return begun


def test_a_host_that_had_no_thread_to_spare_starts_one_for_the_next_client(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, refused = threading.Thread.start, threading.Event()

    def refuse_spare(thread: threading.Thread) -> None:
        # Which is to serve the next client, while another one accepts clients.
        if thread.name == "mpmm-host-waits" and thread._args == (False,):  # type: ignore[attr-defined]  # not in typeshed
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    handle = MultiProcessShared(Waits, tag="waits", always_proxy=True)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse_spare)
        proxy: Any = handle.acquire()
        assert refused.wait(DEADLINE_S), "the first client was not quiet"
    # Each thread has a connection of its own.
    with ThreadPoolExecutor(2) as threads:
        waits = threads.submit(proxy.wait)
        assert threads.submit(proxy.end).result()
        assert waits.result(), "nobody accepted the other one's connection meanwhile"
    handle.unsafe_hard_delete()
