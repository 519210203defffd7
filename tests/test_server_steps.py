"""What a model server does, from its first line to its last, step by step and in this process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing import Pipe, spawn
from multiprocessing import process as mp_process
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from harness import in_child, open_descriptors

from mpmm.errors import ModelServerError, ServerStartError
from mpmm.multi_process_shared import output, server_process, spawned_server, start_server, stop_server
from mpmm.multi_process_shared.context import ServerContext, attach_namespace, namespace_of, serving_for
from mpmm.multi_process_shared.life import LifeLock, address_for
from mpmm.multi_process_shared.output import LOG_BYTES, Output, Starter
from mpmm.multi_process_shared.registry import ServerRecord, ServerRegistry, server_lives_by, start_time_of
from mpmm.multi_process_shared.rpc import sockets
from mpmm.multi_process_shared.rpc.protocol import CONTROL, HARD_DELETE, decode_request
from mpmm.multi_process_shared.server_process import (
    ATTACH,
    CRASHED,
    OCCUPIED,
    PROBE_INTERVAL_S,
    READY,
    AliveLock,
    ServerPlan,
    _Construction,
    _Server,
    _Signals,
)
from mpmm.shared_state.liveness import pid_namespace
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.runtime_dir import SERVERS_LOG

NOW = 1000.0
RECORD = ServerRecord("it", os.getpid(), 1.0, "1", "it-1.sock", spawned=True, ready=True)
PLAN = ServerPlan("/", "it", (), (1, None), (), pickle.dumps(()), pickle.dumps(dict))


class Ended(BaseException):
    """Stands for the end of a process."""


def end(code: int) -> None:
    """Stand for `os._exit`."""
    raise Ended(code)


class Steps(_Server):
    """A server that notes what it does, in `done`, and ends with `Ended`."""

    def __init__(self, plan: ServerPlan = PLAN) -> None:
        self.done: list[Any] = []
        note = self.done.append
        self.plan, self.tag, self.pid = plan, "it", os.getpid()
        self.on_made: Any = None
        self.starter: Any = None
        self.life: Any = None
        self.record = None
        self.contexts = ()
        self.kept = []
        self.serving = False
        self.exiting: Any = SimpleNamespace(acquire=lambda: note("exiting"))
        self.signals: Any = SimpleNamespace(listen=lambda: note("listen"), heed=lambda: note("heed"), fd=3)
        self.output: Any = SimpleNamespace(bound=lambda: note("bound"), turn_to_log=lambda why: note(("log", why)))
        self.registry: Any = SimpleNamespace(
            root=Path("/root"),
            alive_path="/root/alive",
            take_life=lambda tag: self.lock,
            remember_handle=lambda *arguments: note(("remember", *arguments)),
            remove_sockets=lambda tag: note(("remove sockets", tag)),
            claim_if_abandoned=lambda: note("claim") or self.claim,
            remove_if_unused=lambda but: note(("remove", but)),
        )
        self.lock: Any = "life"
        self.claim: Any = None

    def watch(self) -> None:
        self.done.append("watch")


class Notes(Steps):
    """One that notes what it says, and how it ends."""

    def tell(self, what: str, text: str = "") -> None:
        self.done.append((what, text))

    def exit(self, code: int, **options: bool) -> Any:
        self.done.append(("exit", code, options))
        raise Ended(code)


# From the first line until the object is made.


def test_a_server_serves_until_it_is_interrupted_or_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    here, wait_as_ever = threading.current_thread(), threading.Event.wait

    def wait(event: threading.Event, timeout_s: float | None = None) -> bool:
        if threading.current_thread() is not here:
            return wait_as_ever(event, timeout_s)
        server.done.append(("waits", server.serving))
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Event, "wait", wait)
    for error, expected in (
        (None, [(READY, ""), ("waits", True), ("exit", 0, {})]),
        (ServerStartError("no such model", tag="it"), [(CRASHED, "no such model"), ("exit", 1, {"keep_life": False})]),
        (SystemExit(3), [(CRASHED, "Shared Server "), ("exit", 1, {"keep_life": False})]),
    ):
        server = Notes()

        def host(preparation: Any, server: Any = server, error: BaseException | None = error) -> None:
            server.done.append(preparation)
            if error is not None:
                raise error

        monkeypatch.setattr(server, "host", host)
        with pytest.raises(Ended):
            server.run({"dir": "/"})
        assert server.done[0] == {"dir": "/"}
        said, *more = server.done[1:]
        assert [(said[0], said[1][:14]), *more] == expected

    server = Notes()
    server.pid = 0

    def fail(preparation: Any) -> None:
        raise ValueError

    monkeypatch.setattr(server, "host", fail)
    monkeypatch.setattr(server_process, "end_forked_child", lambda error: end(repr(error)))  # type: ignore[arg-type]  # noted
    with pytest.raises(Ended, match="ValueError"):
        server.run(None)
    assert server.done == [], "a child that the constructor has forked says nothing"


def test_a_process_is_a_server_before_it_does_anything_else_and_has_a_session_of_its_own() -> None:
    def run(refused: bool) -> tuple[Any, ...]:
        done: list[Any] = []

        class Notes:
            def __init__(self, *arguments: Any) -> None:
                done.append(arguments)

            def run(self, preparation: Any) -> None:
                done.append((preparation, server_lives_by(), os.getsid(0) == os.getpid()))

        def refuse() -> None:
            raise PermissionError

        patched: Any = server_process
        patched._Server = Notes
        if refused:
            # As it is for the leader of a group of processes.
            os.setsid = refuse
        nothing: Any = None
        server_process.run_server(replace(PLAN, alive_locks=("/a", "/b")), nothing, {"dir": "/"}, nothing)
        return done[0][0].alive_locks, *done[1]

    assert in_child(lambda: run(False)) == (("/a", "/b"), {"dir": "/"}, ("/a", "/b"), True)
    assert in_child(lambda: run(True)) == (("/a", "/b"), {"dir": "/"}, ("/a", "/b"), False)


class Attaches:
    """An object that each process makes for itself."""

    attach_in_place = True


def note_hosts(monkeypatch: pytest.MonkeyPatch, server: Notes) -> None:
    """Have a server note whom it hosts, and say where its constructor may attach."""
    monkeypatch.setattr(server_process, "host_object", lambda *arguments: server.done.append(("host", *arguments)))
    monkeypatch.setattr(server_process, "write_record", lambda *arguments: server.done.append(("write", *arguments)))
    monkeypatch.setattr(server_process, "_log_as_beam_does", lambda: server.done.append("log"))
    monkeypatch.setattr(server_process, "new_record", lambda registry, tag, **options: replace(RECORD, **options))


def where_to_attach() -> Any:
    """Be a constructor that asks where it may attach."""
    return SimpleNamespace(place=attach_namespace())


def test_a_server_takes_the_tag_before_it_makes_the_object_and_then_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = (
        ServerContext("/a", on_start=str.upper, namespace="ns"),
        ServerContext("/b"),
        ServerContext("/c", namespace="other"),
    )
    server = Notes(replace(PLAN, contexts=pickle.dumps(contexts), constructor=pickle.dumps(where_to_attach)))
    note_hosts(monkeypatch, server)
    monkeypatch.setattr(server, "prepare", lambda preparation: server.done.append(preparation))
    server.on_made = lambda: server.done.append("made")
    server.host({"dir": "/"})
    starting = replace(RECORD, ready=False)
    record = replace(
        RECORD,
        namespaces=("ns", "other"),
        constructor=f"function {__name__}:where_to_attach",
        types=("class types:SimpleNamespace", "class builtins:object"),
    )
    *steps, (what, registry, hosted, constructor, shared, life, at_hard_delete) = server.done
    steps.remove("watch")
    assert steps == [
        *("listen", {"dir": "/"}, "listen", "log", ("write", "life", starting), "made", "listen"),
        ("remember", "it", ("ns", "other")),
    ]
    assert (what, registry, hosted, life) == ("host", server.registry, record, "life")
    assert shared.place == (namespace_of("it"), Path("/root"))
    assert constructor().place is None
    assert (server.kept, server.contexts, server.record) == (["IT"], contexts, record)
    with pytest.raises(Ended):
        at_hard_delete()
    assert server.done[-1] == ("exit", 0, {})


def test_a_server_whose_tag_is_taken_or_whose_object_attaches_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Notes()
    note_hosts(monkeypatch, server)
    server.lock = None
    with pytest.raises(Ended):
        server.host(None)
    assert [step for step in server.done if step != "watch"] == [
        "listen",
        "listen",
        "log",
        (OCCUPIED, ""),
        ("exit", 0, {}),
    ]
    server = Notes(replace(PLAN, constructor=pickle.dumps(Attaches)))
    note_hosts(monkeypatch, server)
    with pytest.raises(Ended):
        server.host(None)
    assert server.done[-2:] == [(ATTACH, ""), ("exit", 0, {"keep_life": False})]
    # Without a namespace the tag is no handle.
    server = Notes()
    note_hosts(monkeypatch, server)
    server.host(None)
    assert not [step for step in server.done if step[0] == "remember"]


def test_a_child_that_a_constructor_forks_ends_when_the_constructor_has_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Notes()
    server.pid = 0
    note_hosts(monkeypatch, server)
    monkeypatch.setattr(server_process, "end_forked_child", end)
    with pytest.raises(Ended) as ended:
        server.host(None)
    assert ended.value.args == (None,)


def test_a_main_module_that_fails_in_a_server_is_reported_and_one_that_does_not_may_start_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Notes()
    inheriting: list[Any] = []

    def prepare(preparation: Any) -> None:
        inheriting.append(getattr(mp_process.current_process(), "_inheriting", None))
        if preparation:
            raise SystemExit(3)

    monkeypatch.setattr(spawn, "prepare", prepare)
    server.prepare({})
    assert inheriting == [True]
    assert not hasattr(mp_process.current_process(), "_inheriting")
    try:
        with pytest.raises(Ended):
            server.prepare({"fail": True})
    finally:
        del mp_process.current_process()._inheriting  # type: ignore[attr-defined]  # not in typeshed
    (what, text), last = server.done
    assert (what, last) == (CRASHED, ("exit", 1, {}))
    assert f"the main module failed in pid {os.getpid()}, which imported it to serve 'it':\nTraceback" in text


def test_a_server_reports_once_and_to_nobody_if_its_starter_has_died() -> None:
    ours, theirs = Pipe(duplex=False)
    server = Steps()
    server.starter = theirs
    server.tell(READY)
    server.tell(CRASHED, "later")
    assert theirs.closed
    assert ours.recv() == (READY, "")
    with pytest.raises(EOFError):
        ours.recv()
    ours.close()
    ours, theirs = Pipe(duplex=False)
    ours.close()
    server.starter = theirs
    server.tell(CRASHED, "text")
    assert theirs.closed


def test_a_constructor_is_loaded_once_and_what_it_raises_says_where() -> None:
    construction: Any = _Construction("it", pickle.dumps(dict))
    assert construction.unpickled is None
    first = construction()
    assert first == {}
    assert construction.unpickled is dict
    assert construction() is not first

    def missing() -> None:
        raise ModuleNotFoundError("no module")

    construction.unpickled = missing
    with pytest.raises(ServerStartError, match="the constructor of 'it' failed in pid") as caught:
        construction()
    assert str(caught.value).endswith(f"no module\nsys.path there: {sys.path}\n")
    construction.unpickled = {}.pop
    with pytest.raises(ServerStartError, match="TypeError") as caught:
        construction()
    assert "sys.path" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_records_of_level_info_are_shown_unless_the_program_has_configured_logging() -> None:
    def configure(level: int, handlers: bool, last_resort: bool) -> tuple[int, int, str]:
        root = logging.getLogger()
        root.setLevel(level)
        root.handlers[:] = [logging.NullHandler()] if handlers else []
        resort: Any = logging._StderrHandler(logging.WARNING)  # type: ignore[attr-defined]  # not in typeshed
        logging.lastResort = resort if last_resort else None
        server_process._log_as_beam_does()
        record = logging.LogRecord("name", logging.INFO, "", 1, "said", None, None)
        return root.level, resort.level, resort.format(record)

    for arguments, expected in (
        ((logging.WARNING, False, True), (logging.INFO, logging.INFO, "INFO:name:said")),
        ((logging.WARNING, True, True), (logging.WARNING, logging.WARNING, "said")),
        ((logging.ERROR, False, True), (logging.ERROR, logging.WARNING, "said")),
        ((logging.WARNING, False, False), (logging.INFO, logging.WARNING, "said")),
    ):
        assert in_child(lambda arguments=arguments: configure(*arguments)) == expected, arguments  # type: ignore[misc]  # the default has no type


# While it serves.


def test_a_server_ends_at_signals_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: tuple[tuple[int, bool, list[Any]], ...] = (
        (signal.SIGTERM, False, [("exit", 143, {})]),
        (signal.SIGTERM, True, [("exit", 143, {})]),
        (signal.SIGINT, True, [("exit", 0, {})]),
        (signal.SIGINT, False, []),
        (signal.SIGUSR1, True, []),
    )
    for number, serving, expected in cases:
        server = Notes()
        server.serving = serving
        with contextlib.suppress(Ended):
            server.on_signal(number)
        assert server.done == expected, (number, serving)


class Lock:
    """A lock that is free, or not, and notes that it was given up."""

    def __init__(self, path: str, free: bool = True, held: bool = True) -> None:
        self.path, self.free, self.held = path, free, held
        self.asked = self.given_up = 0

    def is_free(self) -> bool:
        self.asked += 1
        return self.free

    def give_up(self) -> None:
        self.given_up += 1


def test_a_server_looks_once_a_second_for_its_clients_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Steps(replace(PLAN, alive_locks=("/a", "/b", "/a"), starter=(17, 1.5)))
    now, made = [NOW], list[Any]()
    heeds: list[Any] = [0.4, OSError("no descriptor"), 0.3, 1.0, 0.5, 0.1]

    def heed(starter: Any, until: float) -> Any:
        server.done.append((starter, until))
        if not heeds:
            raise Ended
        passes = heeds.pop(0)
        if isinstance(passes, OSError):
            raise passes
        now[0] += passes
        return "starter" if len(heeds) > 2 else None

    def sleep(seconds: float) -> None:
        server.done.append(("sleep", seconds))
        now[0] += seconds

    def starter(*arguments: Any) -> str:
        if not made:
            made.append("failed")
            raise OSError("no descriptor")
        made.append(arguments)
        return "starter"

    monkeypatch.setattr(server_process, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(server_process, "Starter", starter)
    monkeypatch.setattr(server_process, "AliveLock", Lock)
    monkeypatch.setattr(server, "_heed", heed)
    monkeypatch.setattr(server, "_probe", lambda locks: server.done.append([lock.path for lock in locks]))
    with pytest.raises(Ended):
        _Server.watch(server)
    assert made == ["failed", (17, 1.5)]
    begun = NOW + PROBE_INTERVAL_S
    probe = ["/a", "/b"]
    assert server.done == [
        ("sleep", 1.0),
        ("starter", begun + 1.0),
        *(("starter", begun + 1.0), ("sleep", 1.0)),
        # It is time to look when it goes on, which counts from there.
        *(("starter", begun + 1.0), probe),
        *(("starter", pytest.approx(begun + 2.7)), probe),
        *[(None, pytest.approx(begun + 3.7))] * 3,
    ]


def test_a_server_turns_to_its_log_once_its_starter_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(server_process, "time", SimpleNamespace(monotonic=lambda: NOW))
    for starter_fd, ready, ended, until, signals, turns in (
        (7, [], False, NOW + 0.5, False, False),
        (7, [3], False, NOW - 1.0, True, False),
        (7, [7], False, NOW, False, True),
        (7, [3, 7], False, NOW, True, True),
        # No descriptor is to be had, or it does not tell.
        (None, [], True, NOW, False, True),
        (None, [], False, NOW, False, False),
        (7, [], True, NOW, False, True),
    ):
        server = Steps()
        note = server.done.append
        starter: Any = SimpleNamespace(
            fd=starter_fd, pid=17, has_ended=lambda ended=ended: ended, close=lambda note=note: note("close")
        )

        def wait(fds: list[int], timeout_s: float, ready: list[int] = ready) -> list[int]:
            waits.append((fds, timeout_s))
            return ready

        monkeypatch.setattr(server_process, "wait", wait)
        assert server._heed(starter, until) is (None if turns else starter)
        assert waits.pop() == ([3] if starter_fd is None else [3, 7], max(0.0, until - NOW))
        log = (
            f"pid {os.getpid()}, which serves 'it', writes its output here from now on: its starter, pid 17, has ended"
        )
        assert server.done == [*["heed"] * signals, *["close", ("log", log)] * turns]
    server = Steps()
    assert server._heed(None, NOW) is None
    assert (waits.pop(), server.done) == (([3], 0.0), [])


def test_a_server_ends_when_all_locks_that_keep_it_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", end)
    server = Notes()
    server.life = "life"
    locks: list[Any] = [Lock("/root/alive"), Lock("/other", free=False), Lock("/third")]
    server._probe(locks)
    assert server.done == ["bound"]
    assert [lock.given_up for lock in locks] == [1, 1, 1]
    for held, ours in ((True, True), (False, False)):
        locks = [Lock("/other"), Lock("/root/alive", held=held)]
        server.done.clear()
        with pytest.raises(Ended):
            server._probe(locks)
        assert server.done == [("exit", 0, {"keep_life": False, "registry_is_ours": ours})]
        # The registry's stays held, so that no client comes before it is removed.
        assert [lock.given_up for lock in locks] == [1, 0]
    server.done.clear()
    server.life = None
    with pytest.raises(Ended) as ended:
        server._probe(locks)
    assert (ended.value.args, server.done) == ((1,), [])


# The end.


def test_a_server_cleans_up_as_far_as_it_is_the_last_and_ends_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "_exit", end)
    server = Steps()
    note = server.done.append
    monkeypatch.setattr(
        server_process, "write_record", lambda life, record: note(("write", record.ready, record.leaving))
    )
    monkeypatch.setattr(server_process, "end_all_hosts", lambda but: note(("end hosts", but)))
    children: list[Any] = [
        SimpleNamespace(daemon=True, terminate=lambda: note("terminate")),
        SimpleNamespace(daemon=False, terminate=lambda: note("not this one")),
    ]
    monkeypatch.setattr(multiprocessing, "active_children", lambda: children)
    monkeypatch.setattr(server, "clean_up_after_clients", lambda: note("clean up"))

    def exit_with(code: int = 5, **options: bool) -> list[Any]:
        server.done.clear()
        with pytest.raises(Ended) as ended:
            server.exit(code, **options)
        assert ended.value.args == (code,)
        return server.done[:]

    # Before it has a life lock.
    assert exit_with(1) == ["exiting", "terminate"]
    life = LifeLock(tmp_path / "it.life")
    server.life = life
    assert exit_with(1) == ["exiting", "terminate"]
    server.record = RECORD
    begins = ["exiting", "terminate", ("write", False, True), ("remove sockets", "it"), ("end hosts", life), "clean up"]
    life.listen_at(address_for(str(tmp_path), "it"))
    says_so = ("write", False, True)
    assert exit_with() == [*begins, "claim", says_so, "claim"]
    # Newcomers wait until its memory is free.
    assert (life.path.exists(), len(life.listeners)) == (True, 1)
    server.claim = "claim"
    assert exit_with(registry_is_ours=False) == [*begins, "claim", ("remove", life), says_so]
    # A client was there, but left before it could see that this server had looked already.
    claims = [None, "claim"]
    monkeypatch.setattr(server.registry, "claim_if_abandoned", lambda: note("claim") or claims.pop(0))
    assert exit_with() == [*begins, "claim", says_so, "claim", ("remove", life)]
    monkeypatch.setattr(server.registry, "claim_if_abandoned", lambda: note("claim"))
    assert exit_with(registry_is_ours=True) == [*begins, ("remove", life), says_so]
    # Only where no other process may have made another one meanwhile.
    life.path.unlink()
    life.path.touch()
    exit_with(keep_life=False)
    assert (life.path.exists(), life.listeners) == (True, [])
    life.close()
    server.life = life = LifeLock(tmp_path / "it.life")
    exit_with(keep_life=False)
    assert not life.path.exists()
    life.close()
    assert exit_with() == ["exiting", "terminate"]
    # Streams that are missing or broken do not matter.
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_with() == ["exiting", "terminate"]
    flushed: list[bool] = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(flush=lambda: flushed.append(True)))
    exit_with()
    assert flushed == [True]
    capsys.readouterr()
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [None])
    exit_with()
    assert "AttributeError" in capsys.readouterr().err


def test_a_server_cleans_up_for_those_whose_clients_are_all_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, locks = Steps(), []

    def lock(path: str) -> Lock:
        locks.append(Lock(path, free="busy" not in path, held="gone" not in path))
        return locks[-1]

    def fail() -> None:
        server.done.append("fail")
        raise ValueError("failed")

    monkeypatch.setattr(server_process, "AliveLock", lock)
    server.contexts = tuple(
        ServerContext(path, on_last=on_last)
        for path, on_last in (
            ("/none", None),
            ("/busy", lambda: server.done.append("busy")),
            ("/gone", lambda: server.done.append("gone")),
            ("/fails", fail),
            ("/free", lambda: server.done.append(("free", locks[-1].given_up))),
        )
    )
    server.clean_up_after_clients()
    assert server.done == ["fail", ("free", 1)]
    assert [(one.path, one.given_up) for one in locks] == [("/busy", 1), ("/gone", 1), ("/fails", 1), ("/free", 1)]
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_an_alive_lock_is_held_between_a_look_and_giving_it_up(tmp_path: Path) -> None:
    path = tmp_path / "alive.lock"
    missing = AliveLock(str(path))
    assert (missing.is_free(), missing.held, path.exists()) == (True, False, False)
    missing.close()
    path.touch(0o600)
    ours, client = AliveLock(str(path)), LockFile(path)
    assert client.try_shared()
    assert (ours.is_free(), ours.held) == (False, False)
    ours.give_up()
    client.unlock()
    assert (ours.is_free(), ours.held, client.try_shared()) == (True, True, False)
    ours.give_up()
    assert (ours.held, client.try_shared()) == (False, True)
    client.close()
    ours.close()
    ours.close()
    assert ours.is_free(), "it says nothing any more"


# Signals.


def test_signals_reach_a_server_whatever_its_main_thread_does_and_not_its_children() -> None:
    def signals() -> list[Any]:
        arrived: list[Any] = []
        found: list[Any] = []
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        one = _Signals(arrived.append)
        found.append([os.get_blocking(fd) for fd in (one.fd, one._writer)])
        one.heed()
        one.listen()
        found.append(signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN)
        found.append(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        os.kill(os.getpid(), signal.SIGTERM)
        found.append(arrived[:])
        # The same once more, for the thread that waits for it.
        one.heed()
        found.append(arrived[:])
        # What a main module has chosen stays.
        signal.signal(signal.SIGPIPE, handler := lambda number, frame: None)
        one.listen()
        found.append(signal.getsignal(signal.SIGPIPE) == handler)
        # A full pipe is no message on standard error.
        arrived.clear()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

        def child(way: str) -> list[Any]:
            said = [one.fd, one._writer, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL]
            said.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR1})
            said.append(signal.set_wakeup_fd(-1))
            # A child of the child has nothing to close.
            said.append(in_child(lambda: one.fd))
            return said

        fds = [one.fd, one._writer]
        found.append(in_child(lambda: [*child("its own"), [os.path.exists(f"/proc/self/fd/{fd}") for fd in fds]][:-1]))
        found.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR1})
        signal.signal(signal.SIGTERM, handler)
        found.append(in_child(lambda: signal.getsignal(signal.SIGTERM) == handler))
        found.append([os.get_blocking(fd) for fd in fds])
        return found

    assert in_child(signals) == [
        [False, False],
        True,
        False,
        [signal.SIGTERM],
        [signal.SIGTERM] * 2,
        True,
        [-1, -1, True, True, -1, -1],
        True,
        True,
        [False, False],
    ]


def test_a_signal_that_comes_during_a_fork_ends_the_server_and_not_the_child() -> None:
    def fork() -> list[Any]:
        arrived: list[Any] = []
        one = _Signals(arrived.append)
        one._before_fork()
        withheld = {signal.SIGTERM, signal.SIGINT} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
        one._after_fork_in_parent()
        return [withheld, {signal.SIGTERM, signal.SIGINT} & signal.pthread_sigmask(signal.SIG_BLOCK, ())]

    assert in_child(fork) == [True, set()]


# Output.


def test_a_starter_is_watched_until_it_is_gone_or_its_pid_is_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    pid = os.getpid()
    ours, another = Starter(pid, start_time_of(pid)), Starter(pid, 1.0)
    assert (ours.has_ended(), another.has_ended()) == (False, True)
    assert ours.fd is not None
    for starter in (ours, another, ours):
        starter.close()
        assert starter.fd is None
    assert not open_descriptors() - before

    def refuse(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    unwatched = Starter(pid, start_time_of(pid))
    assert unwatched.fd is None
    monkeypatch.setattr(output, "start_time_of", refuse)
    assert unwatched.has_ended() is False
    monkeypatch.delattr(os, "pidfd_open")
    assert Starter(pid, 1.0).fd is None


def test_a_servers_log_is_bounded_whoever_begins_the_new_one(tmp_path: Path) -> None:
    log, older = tmp_path / SERVERS_LOG, tmp_path / f"{SERVERS_LOG}.1"

    def say(text: str) -> None:
        os.write(1, text.encode())
        os.write(2, text.encode())

    def turn() -> list[Any]:
        ours = Output(tmp_path)
        log.touch()
        before = os.fstat(1).st_ino
        ours.bound()
        found: list[Any] = [os.fstat(1).st_ino == before]
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        ours.turn_to_log("why")
        found.append([sys.stdout.line_buffering, sys.stderr.line_buffering])
        say("a")
        found.append(log.read_text()[len("2020-01-01 00:00:00") :])
        # Another server has begun a new one, or removed it.
        os.replace(log, older)
        log.write_text("another's\n")
        ours.bound()
        say("b")
        found.append(log.read_text())
        log.unlink()
        ours.bound()
        say("c")
        found.append(log.read_text())
        # It is as long as it may be, and then longer.
        os.ftruncate(1, LOG_BYTES)
        ours.bound()
        found.append(log.stat().st_size == LOG_BYTES)
        say("d")
        other = os.open(log, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX)
        ours.bound()
        found.append((log.stat().st_size, older.stat().st_size) == (LOG_BYTES + 2, older.stat().st_size))
        os.close(other)
        ours.bound()
        found.append((log.stat().st_size, older.stat().st_size) == (0, LOG_BYTES + 2))
        say("e")
        found.append(log.read_text())
        # Not locked any more, nor where it cannot be renamed.
        other = os.open(older, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(1, LOG_BYTES + 1)
        older.unlink()
        older.mkdir()
        ours.bound()
        other = os.open(log, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.append(log.stat().st_size == LOG_BYTES + 1)
        return found

    assert in_child(turn) == [True, [True, True], " why\naa", "another's\nbb", "cc", True, True, True, "ee", True]


def test_a_server_that_can_open_no_file_keeps_its_output(tmp_path: Path) -> None:
    def turn(refused: int) -> tuple[str, str, int]:
        opened: list[str] = []

        def refuse(path: Any, *arguments: Any) -> int:
            opened.append(os.path.basename(path))
            if len(opened) <= refused:
                raise OSError(errno.EMFILE, "Too many open files")
            return real(path, *arguments)

        real = os.open
        for number in (1, 2):
            os.dup2(os.open(tmp_path / "before", os.O_WRONLY | os.O_CREAT), number)
        fds = len(os.listdir("/proc/self/fd"))
        os.open = refuse  # type: ignore[assignment]  # in the child alone
        Output(tmp_path)._open("line")
        os.open = real
        os.write(1, b"lost")
        os.write(2, b"lost")
        name = os.path.basename(os.readlink("/proc/self/fd/1"))
        return name, " ".join(opened), len(os.listdir("/proc/self/fd")) - fds

    assert in_child(lambda: turn(0)) == (SERVERS_LOG, SERVERS_LOG, 0)
    assert (tmp_path / SERVERS_LOG).read_text() == "linelostlost"
    assert in_child(lambda: turn(1)) == ("null", f"{SERVERS_LOG} null", 0)
    assert in_child(lambda: turn(2)) == ("before", f"{SERVERS_LOG} null", 0)


# Servers in interpreters of their own.


def test_a_new_process_is_told_how_to_import_what_this_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "authkey": multiprocessing.current_process().authkey,
        "sys_path": ["/a", None, Path("/b"), "/c"],
        "init_main_from_path": "<stdin>",
    }
    monkeypatch.setattr(spawn, "get_preparation_data", lambda name: {**given, "name": name})
    main: Any = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    del main.__spec__
    for importable, method, folder in ((True, "spawn", None), (False, "loky", "/folder"), (True, None, None)):
        given["start_method"] = method
        monkeypatch.setattr(spawned_server, "is_main_importable", lambda importable=importable: importable)
        monkeypatch.setattr(spawned_server, "_folder_off_path", lambda constructor, folder=folder: folder)
        found = spawned_server.preparation_for("name", dict)
        assert main.__spec__ is None
        assert (found["name"], type(found["authkey"])) == ("name", bytes)
        assert found["sys_path"] == ["/a", "/c", *([folder] if folder else [])]
        assert ("init_main_from_path" in found) is importable
        assert found.get("start_method", "none") == ("none" if method == "loky" else method)
    # It is left as it is where it has one, and where there is no main module.
    main.__spec__ = "spec"
    spawned_server.preparation_for("name", dict)
    assert main.__spec__ == "spec"
    monkeypatch.delitem(sys.modules, "__main__")
    spawned_server.preparation_for("name", dict)


class Constructs:
    """A constructor that is an object."""

    def __call__(self) -> dict[str, int]:
        return {}


def test_a_folder_that_is_off_the_path_by_now_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = spawned_server._folder_off_path
    module: Any = ModuleType("mpmm_test_off")
    spec: Any = SimpleNamespace(
        has_location=True, origin=str(tmp_path / "mpmm_test_off.py"), submodule_search_locations=None
    )
    module.__spec__ = spec
    monkeypatch.setitem(sys.modules, "mpmm_test_off", module)

    def constructor() -> None:
        pass

    assert find(constructor) is None, "this one is on the path"
    constructor.__module__ = "mpmm_test_off.inner"
    folder = str(tmp_path)
    assert find(constructor) == folder
    assert find(functools.partial(functools.partial(constructor))) == folder
    kind = type("Kind", (Constructs,), {"__module__": "mpmm_test_off"})
    instance: Any = kind()
    instance.__module__ = None
    assert find(instance) == folder
    spec.submodule_search_locations = [str(tmp_path / "mpmm_test_off")]
    spec.origin = str(tmp_path / "mpmm_test_off" / "__init__.py")
    assert find(constructor) == folder
    for name, value in (("has_location", False), ("origin", None)):
        with monkeypatch.context() as patched:
            patched.setattr(spec, name, value)
            assert find(constructor) is None
    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [*sys.path, folder])
        assert find(constructor) is None
        patched.setattr(sys, "path", [None, "", os.path.relpath(folder)])
        assert find(constructor) is None
    with monkeypatch.context() as patched:

        def fail(name: str, path: Any) -> Any:
            raise ImportError

        def knows(name: str, path: Any) -> Any:
            return spec if (name, path) == ("mpmm_test_off", None) else None

        patched.setattr(sys, "meta_path", [SimpleNamespace(find_spec=fail), SimpleNamespace(find_spec=lambda *_: None)])
        assert find(constructor) == folder
        patched.setattr(sys, "meta_path", [SimpleNamespace(find_spec=fail), SimpleNamespace(find_spec=knows)])
        assert find(constructor) is None
    module.__spec__ = None
    assert find(constructor) is None


def test_a_spawned_server_has_the_plans_environment_and_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, environment=(("MPMM_TEST_SET", "1"), ("MPMM_TEST_REMOVED", None), ("MPMM_TEST_MISSING", None)))

    def begin() -> dict[str, Any]:
        found: dict[str, Any] = {}

        def run_server(plan: Any, starter: Any, preparation: Any) -> None:
            found["plan"], found["preparation"] = plan, preparation
            found["environment"] = {name: value for name, value in os.environ.items() if "MPMM_TEST" in name}
            found["input"] = os.readlink("/proc/self/fd/0")
            found["name"] = Path("/proc/self/comm").read_text()
            found["inheritable"] = os.get_inheritable(starter.fileno())
            starter.send("said")

        patched: Any = spawned_server
        patched.run_server = run_server
        os.environ["MPMM_TEST_REMOVED"] = "2"
        order, writer = os.pipe()
        os.dup2(order, 0)
        _, reported = os.pipe()
        os.set_inheritable(order, True)
        os.set_inheritable(reported, True)
        os.write(writer, pickle.dumps((plan, {"dir": "/"})))
        os.close(writer)
        fds = len(os.listdir("/proc/self/fd"))
        spawned_server.main(str(order), str(reported))
        found["closed"] = fds - len(os.listdir("/proc/self/fd"))
        return found

    assert in_child(begin) == {
        "plan": plan,
        "preparation": {"dir": "/"},
        "environment": {"MPMM_TEST_SET": "1"},
        "input": os.devnull,
        "name": "mpmm-server\n",
        "inheritable": False,
        # The order, and the connection, which is garbage by now.
        "closed": 2,
    }


def test_a_spawned_server_is_no_daemon_and_may_have_children() -> None:
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        server = spawned_server.SpawnedServer("name", PLAN, {"dir": "/"}, writer)
        assert (server.name, server.daemon, server.report_fd) == ("name", False, writer.fileno())
        assert pickle.loads(server.order) == (PLAN, {"dir": "/"})


def test_a_process_that_cannot_be_named_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **options: Any) -> Any:
        raise OSError("read-only")

    monkeypatch.setattr("builtins.open", refuse)
    spawned_server.call_this_process("name")


# Starting.


class Server:
    """A started process, as its starter sees it."""

    def __init__(self, exitcode: int | None, lives: list[bool]) -> None:
        self.exitcode, self.lives = exitcode, lives
        self.sentinel, self.writer = os.pipe()
        self.joined = 0

    def is_alive(self) -> bool:
        return self.lives.pop(0)

    def join(self) -> None:
        self.joined += 1


def start(monkeypatch: pytest.MonkeyPatch, said: Any, exitcode: int | None = 3, lives: list[bool] | None = None) -> Any:
    """Return what a starter says of a server that says this, and the server."""
    reader, writer = Pipe(duplex=False)
    server = Server(exitcode, lives if lives is not None else [])
    waits: list[float] = []

    def wait(things: list[Any], timeout_s: float) -> list[Any]:
        assert things == [reader, server.sentinel]
        waits.append(timeout_s)
        return [] if server.lives else [reader]

    monkeypatch.setattr(start_server, "wait", wait)
    monkeypatch.setattr(start_server, "_begin", lambda *arguments: begun.append(arguments) or (server, reader))  # type: ignore[func-returns-value]  # notes it
    begun: list[Any] = []
    if said is not None:
        writer.send(said)
    if said is None and exitcode is not None:
        writer.close()
    try:
        return start_server.start_server(ServerRegistry("/root"), "it" * 100, dict), server, begun[0], waits
    except ServerStartError as error:
        return error, server, begun[0], waits
    finally:
        assert reader.closed
        writer.close()
        os.close(server.sentinel)
        os.close(server.writer)


def test_a_starter_says_what_has_become_of_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    context = ServerContext("/lock", environment=(("A", "1"), ("B", None)))
    with serving_for(context, ServerContext("/second", environment=(("C", "2"),))):
        monkeypatch.setattr(start_server, "server_lives_by", lambda: ("/server",))
        outcome, server, (registry, plan, _, name), waits = start(monkeypatch, (READY, ""), lives=[True, True])
    # It looks once a second whether the process still lives, as its end may be hidden.
    assert (outcome, server.joined, waits) == (READY, 0, [1.0] * 3)
    assert name == f"mpmm-server-{'it' * 100}"[:80]
    assert plan.environment == (("A", "1"), ("B", None), ("C", "2"))
    assert plan.alive_locks == (registry.alive_path, "/lock", "/second", "/server")
    assert plan.starter == (os.getpid(), start_time_of(os.getpid()))
    assert (plan.root, plan.tag, pickle.loads(plan.constructor)) == ("/root", "it" * 100, dict)
    monkeypatch.setattr(start_server, "server_lives_by", lambda: None)
    for what in (ATTACH, OCCUPIED):
        outcome, server, (registry, plan, *_), _ = start(monkeypatch, (what, ""))
        assert (outcome, server.joined, plan.alive_locks) == (what, 1, (registry.alive_path,))
    for said, exitcode, lives, text in (
        ((CRASHED, "the reason"), 1, [], "the reason"),
        (None, 3, [], "died unexpectedly with exit code 3 while it made 'itit"),
        (None, -9, [], "died unexpectedly with exit code -9 while"),
        (None, None, [False], "died unexpectedly (this program ignores SIGCHLD, or something else in it has waited"),
    ):
        error, server, *_ = start(monkeypatch, said, exitcode, lives)
        assert isinstance(error, ServerStartError), said
        assert text in str(error)
        assert "no interpreter" not in str(error)
        assert (error.tag, server.joined) == ("it" * 100, 1)
    monkeypatch.setattr(spawn, "get_executable", lambda: b"/no/python")
    error, *_ = start(monkeypatch, None)
    assert str(error).endswith("there is no interpreter at '/no/python'; set one with multiprocessing.set_executable")


def test_a_daemon_may_start_a_server_and_is_a_daemon_afterwards() -> None:
    config: dict[str, Any] = mp_process.current_process()._config  # type: ignore[attr-defined]  # not in typeshed
    before = dict(config)
    try:
        for daemon in (True, False, None):
            config.pop("daemon", None)
            if daemon is not None:
                config["daemon"] = daemon
            with pytest.raises(ValueError, match="failed"), start_server._allowed_to_have_children():
                assert "daemon" not in config
                raise ValueError("failed")
            assert config.get("daemon") is daemon
    finally:
        config.clear()
        config.update(before)


def test_servers_are_children_of_this_process_until_it_ends_and_of_no_child_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers: list[Any] = [Server(None, []), Server(None, [])]
    children: set[Any] = {*servers, "another"}
    monkeypatch.setattr(mp_process, "_children", children)
    monkeypatch.setattr(start_server, "_started", set(servers))
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [servers[0], "another"])
    start_server.reap_ended_servers()
    assert start_server._started == {servers[0]}
    start_server.disown_servers()
    assert start_server._started == set()
    assert children == {servers[1], "another"}
    for server in servers:
        os.close(server.sentinel)
        os.close(server.writer)


# Ending.


class Ending:
    """A registry with one server, which does what a test says at each look, and notes what is done."""

    path = Path("/root")

    def __init__(self, *looks: tuple[bool, ServerRecord | None]) -> None:
        self.looks = list(looks)
        self.done: list[Any] = []
        self.now = NOW

    def look(self, tag: str) -> tuple[bool, ServerRecord | None]:
        assert tag == "it"
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def find(self, tag: str, timeout_s: float) -> tuple[bool, ServerRecord | None]:
        self.found_within_s = timeout_s
        return self.look(tag)

    def restore_socket(self, record: ServerRecord) -> None:
        self.done.append(("restore the socket", record.tag))

    def tidy(self, tag: str) -> None:
        self.done.append("tidy")

    def join(self) -> None:
        self.done.append("join")

    def key(self) -> bytes:
        return b"key"


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the outcome of ending a server in a registry, and what was done for it."""

    def end_it(
        registry: Any, timeout_s: float = 1.0, incarnation: str | None = None, pid: int | None = None, host: Any = None
    ) -> tuple[Any, list[Any]]:
        note = registry.done.append

        def sleep(seconds: float) -> None:
            registry.now += seconds

        def start_thread(thread: threading.Thread) -> None:
            note((thread.name, thread.daemon, *thread._args[1:]))  # type: ignore[attr-defined]  # not in typeshed
            if registry.done[0] == "no thread":
                raise RuntimeError("can't start new thread")

        monkeypatch.setattr(stop_server, "time", SimpleNamespace(monotonic=lambda: registry.now, sleep=sleep))
        monkeypatch.setattr(stop_server, "start_thread", start_thread)
        monkeypatch.setattr(stop_server, "find_host", lambda registry, tag: host)
        monkeypatch.setattr(os, "kill", lambda pid, number: note(("kill", pid, number)))
        monkeypatch.setattr(ServerRecord, "has_ended", lambda record: "has not ended" not in registry.done[:1])
        monkeypatch.setattr(ServerRecord, "is_running", lambda record: "is not running" not in registry.done[:1])
        try:
            return stop_server.end_server(registry, "it", timeout_s, incarnation, pid), registry.done
        except ModelServerError as error:
            return error, registry.done

    return end_it


GONE = (False, None)
ASKED = ["join", ("mpmm-end", True, RECORD, b"key")]
PID = RECORD.pid


def test_only_the_server_that_is_meant_is_ended(ending: Any) -> None:
    assert ending(Ending(GONE)) == (False, [])
    for options, ended in (
        ({}, True),
        ({"incarnation": "1"}, True),
        ({"incarnation": "2"}, False),
        ({"pid": PID}, True),
        ({"pid": PID + 1}, False),
        ({"incarnation": "1", "pid": PID + 1}, False),
        ({"incarnation": "2", "pid": PID}, False),
    ):
        expected = (True, [*ASKED, "tidy"]) if ended else (False, [])
        assert ending(Ending((True, RECORD), GONE), **options) == expected, options
        registry = Ending((True, RECORD), GONE)
        note = registry.done.append
        host = SimpleNamespace(record=RECORD, hard_delete=lambda note=note: note("hard delete"))
        expected = (True, ["hard delete", "tidy"]) if ended else (False, [])
        assert ending(registry, host=host, **options) == expected, options


def test_a_server_that_has_not_said_who_it_is_is_waited_for(ending: Any) -> None:
    assert ending(Ending((True, None), (True, None), (True, RECORD), GONE)) == (True, [*ASKED, "tidy"])
    assert ending(Ending((True, None), (True, None), GONE)) == (False, [])
    registry = Ending((True, None))
    error, done = ending(registry, 0.25)
    assert registry.found_within_s == 0.25
    assert str(error).startswith("the server of 'it' has not recorded its pid")
    assert (error.server_pid, done) == (None, [])
    assert registry.now - NOW == pytest.approx(0.25, abs=0.001)
    registry = Ending((True, None))
    ending(registry, 0.0)
    assert registry.now == NOW, "not a moment longer"


def test_a_server_that_does_not_end_in_time_is_killed_unless_it_has_other_work(ending: Any) -> None:
    other = replace(RECORD, incarnation="2")
    kill = ("kill", PID, signal.SIGKILL)
    # It stays until it is killed: 1 s, then the look before the signal, and the first one after it.
    stays = [(True, RECORD)] * 60
    registry = Ending(*stays)
    error, done = ending(registry, 1.0)
    assert str(error).startswith(f"the server of the shared object 'it' (pid {PID}) is still there after SIGKILL")
    assert (done, error.server_pid, error.tag) == ([*ASKED, kill], PID, "it")
    assert registry.now - NOW == pytest.approx(1.0 + stop_server.KILL_TIMEOUT_S, abs=0.05)
    beside = replace(RECORD, spawned=False)
    error, done = ending(Ending((True, beside)), 0.5)
    assert (
        f"pid {PID}, which serves the shared object 'it' among its other work, did not stop serving it within 0.5 s"
        in str(error)
    )
    assert done == ["join", ("mpmm-end", True, beside, b"key")]
    registry = Ending((True, beside))
    assert isinstance(ending(registry, 0.0)[0], ModelServerError)
    assert registry.now == NOW, "not a moment longer"
    # Still making its object: it takes no request.
    starting = replace(RECORD, ready=False)
    assert ending(Ending((True, starting), (True, starting), GONE)) == (True, [kill, "tidy"])
    leaving = replace(RECORD, ready=False, leaving=True)
    assert ending(Ending((True, leaving), (True, leaving), GONE)) == (True, ["tidy"])
    # Another one has the tag by now.
    assert ending(Ending((True, RECORD), (True, other))) == (True, [*ASKED, "tidy"])
    # Killed only if it is still the same.
    for looks, first, killed in (
        ([(True, starting), (True, other), GONE], None, False),
        ([(True, starting), (True, None), GONE], None, False),
        ([(True, starting), GONE], None, False),
        ([(True, starting), (True, starting), GONE], "is not running", False),
    ):
        registry = Ending(*looks)
        if first:
            registry.done.append(first)
        _, done = ending(registry)
        assert (kill in done) is killed, looks


def test_a_server_that_has_given_up_the_tag_is_gone_once_its_process_has_given_back_everything(ending: Any) -> None:
    registry = Ending((True, RECORD), GONE)
    registry.done.append("has not ended")
    error, _ = ending(registry, 0.0)
    assert isinstance(error, ModelServerError)
    beside = replace(RECORD, spawned=False)
    registry = Ending((True, beside), GONE)
    registry.done.append("has not ended")
    assert ending(registry, 0.0)[0] is True


def test_a_spawned_server_is_sent_a_signal_where_no_thread_can_ask_it(ending: Any) -> None:
    registry = Ending((True, RECORD), (True, RECORD), GONE)
    registry.done.append("no thread")
    _, done = ending(registry)
    assert done == ["no thread", *ASKED, ("kill", PID, signal.SIGTERM), "tidy"]
    beside = replace(RECORD, spawned=False)
    registry = Ending((True, beside), GONE)
    registry.done.append("no thread")
    error, done = ending(registry)
    assert isinstance(error, ModelServerError)
    assert not [step for step in done if step[0] == "kill"]


def test_a_server_is_asked_to_end_over_a_connection_of_its_own_and_may_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []
    channel: Any = SimpleNamespace(
        send=lambda message: done.append(decode_request(message)),
        receive=lambda: done.append("receive"),
        close=lambda: done.append("close"),
    )
    monkeypatch.setattr(stop_server, "Channel", lambda line: channel)
    monkeypatch.setattr(sockets, "dial_socket", lambda *arguments: done.append(arguments))
    registry: Any = Ending(GONE)
    stop_server._ask(registry, RECORD, b"key")
    assert done == [
        (Path("/root"), "it-1.sock", b"key"),
        (CONTROL, HARD_DELETE, (), {}),
        *("receive", "close"),
    ]
    assert registry.done == [("restore the socket", "it")], "it does not join"
    for error in (multiprocessing.AuthenticationError(), EOFError(), ConnectionRefusedError()):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(sockets, "dial_socket", fail)
        stop_server._ask(registry, RECORD, b"key")


def test_a_process_is_killed_until_it_is_not_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    slept: list[float] = []
    now = [NOW]

    def kill(pid: int, number: int) -> None:
        sent.append((pid, number))
        raise ProcessLookupError

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(stop_server, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    lives = iter([True] * 8 + [False])
    stop_server.kill_process(17, lambda: next(lives), "it")
    assert sent == [(17, signal.SIGKILL)] * 8
    assert slept == [0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.02, 0.02]
    stop_server.kill_process(17, lambda: False, "it")
    assert len(sent) == 8
    began = now[0]
    with pytest.raises(
        ModelServerError, match=r"the shared object 'it' \(pid 17\) is still there after SIGKILL"
    ) as caught:
        stop_server.kill_process(17, lambda: True, "it")
    assert (caught.value.server_pid, caught.value.tag) == (17, "it")
    assert now[0] - began == pytest.approx(stop_server.KILL_TIMEOUT_S, abs=0.03)
    sent.clear()
    with pytest.raises(ModelServerError, match="still there and runs in another pid namespace"):
        stop_server.kill_process(17, lambda: True, "it", lambda: False)
    assert sent == []
    monkeypatch.setattr(stop_server, "KILL_TIMEOUT_S", 0.0)
    with pytest.raises(ModelServerError):
        stop_server.kill_process(17, lambda: True, "it")
    assert sent == []


def test_a_server_of_another_container_is_sent_no_signal_and_counts_as_running_while_it_has_its_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    # The process that has its number here even started in the same tick of the clock.
    started = start_time_of(os.getpid()) or 0.0
    for pids_of, is_here in ((0, True), (pid_namespace(), True), (pid_namespace() + 1, False)):
        record = replace(RECORD, start_time=started, pids_of=pids_of)
        registry: Any = SimpleNamespace(look=lambda tag, record=record: (True, record))
        assert record.is_running() and record.has_ended() is not is_here
        sent.clear()
        stop_server._signal(registry, record, signal.SIGKILL)
        assert sent == ([(os.getpid(), signal.SIGKILL)] if is_here else [])
