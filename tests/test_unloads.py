"""An unload that does not end has a deadline and a successor: another process takes over a handle, not an object."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import pytest
from harness import (
    NewGate,
    NewManager,
    NewProcess,
    Process,
    Seat,
    acquire,
    call_in_thread,
    copies_of,
    has_ended,
    learn,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Gate, Loads, LoadsObject, LoadsServer, Weights, served
from patience import DEADLINE_S, Stopwatch

from mpmm import cli, multi_process_shared
from mpmm.model_manager.background import Jobs
from mpmm.model_manager.session import Session
from mpmm.model_manager.unload import Unloads, _AtIt
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transaction import Transaction

LIMIT_S = 0.6
SOON_S = 2.0


def states(namespace: str, tag: str) -> list[str]:
    return [copy.state for copy in copies_of(namespace, tag)]


def load_idle(process: Process, tag: str, loader: Callable[[], Any]) -> None:
    """Have a process load a copy and release it, so that it is idle for longer than those that come later."""
    process.call(acquire, tag, loader)
    process.call(release)


def hang_in_unloads(seat: Seat, tags: tuple[str, ...], began: Gate, go: Gate, stop: bool = False) -> None:
    """From now on the unload of these handles opens a gate and then hangs, or stops the process, in this process."""
    unload = multi_process_shared.unload
    first = itertools.count()

    def hangs(tag: str, **arguments: Any) -> bool:
        if tag.startswith(tags):
            began.open()
            if stop and next(first) == 0:
                # Not while another thread of this process holds the lock, for which all would then wait. A signal for
                # the whole process goes to the main thread, and this thread would continue until that one has run.
                with seat.manager._connected().namespace.lock._mutex:
                    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            go.wait()
        return unload(tag, **arguments)

    multi_process_shared.unload = hangs


@pytest.mark.parametrize("how", ["stopped", "hung"])
def test_an_idle_copy_goes_instead_of_the_object_whose_owner_is_stuck_and_inspect_names_it(
    namespace: str, new_process: NewProcess, new_gate: NewGate, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    other = new_process(fallback_memory_mb=200, memory_return_seconds=LIMIT_S)
    owner, third = new_process(), new_process()
    unloading = new_gate()
    load_idle(owner, "object", LoadsObject("object", unloading=unloading if how == "hung" else None))
    load_idle(third, "idle", Loads("idle"))
    # So that it is the object's turn first.
    third.call(pin, "idle")
    if how == "stopped":
        owner.stop()
    watch = Stopwatch()
    other.send(acquire, "new", Loads("new"))
    wait_until(lambda: states(namespace, "object") == ["unloading"], "the owner is told to unload it")
    third.call(unpin, "idle")
    other.result()
    print(f"room after {watch.s():.2f} s")
    assert watch.s() > LIMIT_S * 0.9
    assert watch.calm_s() < LIMIT_S + SOON_S
    assert (states(namespace, "object"), states(namespace, "idle")) == (["unloading"], [])
    (copy,) = copies_of(namespace, "object")
    assert copy.unload_late
    cli.main(["inspect", namespace])
    said = [line for line in capsys.readouterr().out.splitlines() if "ATTENTION" in line]
    assert any(f"pid {owner.pid} has been unloading object" in line for line in said), said
    assert problems(namespace) == []
    if how == "stopped":
        owner.resume()
        wait_until(lambda: not copies_of(namespace, "object"), "the owner does it after all")
        assert problems(namespace) == []
    else:
        owner.kill()


def pin(seat: Seat, tag: str) -> None:
    """Keep the idle copies of a model."""
    seat.manager.pin(tag)


def unpin(seat: Seat, tag: str) -> None:
    """Keep them no longer."""
    seat.manager.unpin(tag)


@pytest.mark.parametrize("how", ["stopped", "hung", "killed"])
def test_handles_that_a_stuck_waiter_was_told_to_unload_are_taken_over(
    namespace: str, new_process: NewProcess, new_gate: NewGate, how: str
) -> None:
    other = new_process(fallback_memory_mb=200, memory_return_seconds=LIMIT_S if how != "killed" else 60.0)
    waiter = new_process()
    waiter.call(learn, big=200)
    load_idle(other, "a", Loads("a"))
    load_idle(other, "b", Loads("b"))
    began, go = new_gate(), new_gate()
    waiter.call(hang_in_unloads, ("a", "b"), began, go, stop=how == "stopped")
    waiter.send(acquire, "big", Loads("big"))
    began.wait()
    if how == "stopped":
        waiter.wait_until_stopped()
    elif how == "killed":
        waiter.kill()
    watch = Stopwatch()
    wait_until(lambda: not copies_of(namespace, "a") and not copies_of(namespace, "b"), "both are unloaded", 5)
    print(f"taken over after {watch.s():.2f} s")
    assert watch.calm_s() < LIMIT_S + SOON_S
    assert problems(namespace) == []
    if how == "killed":
        return
    # When the first one comes back, its actions change nothing for the new users of the rows.
    if how == "stopped":
        waiter.resume()
    waiter.result()
    waiter.call(release)
    other.call(acquire, "a", Loads("a"))
    go.open()
    wait_until(lambda: not waiter.call(unloads), "the late unloader is done")
    assert states(namespace, "a") == ["active"]
    assert problems(namespace) == []


def test_one_handle_that_does_not_go_holds_up_no_other(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    waiter = new_process(fallback_memory_mb=300, memory_return_seconds=60.0)
    waiter.call(learn, big=300)
    for tag in ("a", "b", "c"):
        load_idle(waiter, tag, Loads(tag))
    began, go = new_gate(), new_gate()
    waiter.call(hang_in_unloads, ("a",), began, go)
    waiter.send(acquire, "big", Loads("big"))
    began.wait()
    wait_until(lambda: not copies_of(namespace, "b") and not copies_of(namespace, "c"), "the others go", SOON_S)
    assert states(namespace, "a") == ["unloading"]
    go.open()
    waiter.result()
    assert problems(namespace) == []


def test_an_unloader_that_comes_back_late_spares_the_server_that_has_the_tag_by_then(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    other = new_process(fallback_memory_mb=200, memory_return_seconds=LIMIT_S)
    waiter = new_process()
    waiter.call(learn, big=200)
    load_idle(other, "a", LoadsServer("a"))
    began, go = new_gate(), new_gate()
    waiter.call(hang_in_unloads, ("a",), began, go)
    waiter.send(acquire, "big", Loads("big"))
    began.wait()
    waiter.result()
    waiter.call(release)
    other.call(acquire, "a", LoadsServer("a"))
    pid = other.call(pid_of, "a")
    go.open()
    wait_until(lambda: not waiter.call(unloads), "the late unloader is done")
    assert other.call(pid_of, "a") == pid
    assert states(namespace, "a") == ["active"]
    assert problems(namespace) == []


def pid_of(_: Seat, handle: str) -> int:
    """Ask the object behind a handle where it is."""
    return int(served(handle).pid())


def unloads(seat: Seat) -> bool:
    """Tell whether a thread of the process is at an unload."""
    return bool(seat.manager._connected().unloads.is_busy)


def test_a_server_that_is_stopped_is_killed_when_its_copy_is_unloaded(namespace: str, new_process: NewProcess) -> None:
    worker = new_process(fallback_memory_mb=100, memory_return_seconds=LIMIT_S)
    load_idle(worker, "a", LoadsServer("a"))
    (copy,) = copies_of(namespace, "a")
    server = next(member for member in read_snapshot(namespace).members if member.slot == copy.server)
    process = psutil.Process(server.pid)
    process.suspend()
    watch = Stopwatch()
    worker.call(acquire, "b", Loads("b"))
    print(f"room after {watch.s():.2f} s")
    assert watch.calm_s() < LIMIT_S + SOON_S
    wait_until(lambda: has_ended(process), "the server is killed")
    assert problems(namespace) == []


@pytest.mark.parametrize("leads", [False, True], ids=["not leading", "leading"])
def test_the_heir_of_a_dead_unloader_is_woken(
    namespace: str, new_process: NewProcess, new_gate: NewGate, leads: bool
) -> None:
    arguments: dict[str, Any] = {"fallback_memory_mb": 100, "poll_interval": 30.0, "memory_return_seconds": 60.0}
    if leads:
        victim, other = new_process(**arguments), new_process()
    else:
        other, victim = new_process(**arguments), new_process()
    load_idle(other, "a", Loads("a"))
    began, go = new_gate(), new_gate()
    victim.call(hang_in_unloads, ("a",), began, go)
    victim.send(acquire, "b", Loads("b"))
    began.wait()
    other.send(acquire, "c", Loads("c"))
    wait_until(lambda: waiting(namespace, "c"), "the other one waits")
    victim.kill()
    assert other.result(SOON_S)
    assert copies_of(namespace, "a") == []
    assert problems(namespace) == []


@dataclass(frozen=True)
class LosesItsServer:
    """A loader whose server dies while it loads, and which makes an object in this process after all."""

    seat_waits: Gate
    go: Gate

    def __call__(self) -> Weights:
        """Start a server, kill it, and return an object once the test says so."""
        shared = MultiProcessShared(Weights, tag="lost", always_proxy=True, spawn_process=True)
        shared.acquire()
        pid = multi_process_shared.server_pid("lost")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self.seat_waits.open()
        self.go.wait()
        return Weights("after all")


def test_a_copy_to_be_unloaded_on_release_is_unloaded_by_its_holder_as_soon_as_that_releases_it(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    worker = new_process(fallback_memory_mb=100, poll_interval=30.0, memory_return_seconds=60.0)
    began, go = new_gate(), new_gate()
    worker.send(acquire, "a", LosesItsServer(began, go))
    began.wait()
    wait_until(lambda: copies_of(namespace, "a")[0].unload_on_release, "the server's death is noticed")
    go.open()
    worker.result()
    worker.call(release)
    waited = wait_until(lambda: not copies_of(namespace, "a"), "the copy is unloaded", SOON_S)
    print(f"unloaded after {waited:.3f} s")
    assert problems(namespace) == []
    assert DEADLINE_S > SOON_S


def test_what_an_exception_has_kept_from_being_unloaded_is_unloaded_all_the_same(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager(fallback_memory_mb=1000)
    unload_all, interrupted = Unloads._unload_all, list[Any]()

    def interrupt_once(self: Unloads, copies: Any) -> None:
        if threading.current_thread() is threading.main_thread() and not interrupted:
            interrupted.append(copies)
            raise KeyboardInterrupt
        unload_all(self, copies)

    monkeypatch.setattr(Unloads, "_unload_all", interrupt_once)
    with contextlib.suppress(KeyboardInterrupt):
        # Again if the background thread was quicker.
        while not interrupted:
            for tag in ("a", "b", "c"):
                with manager.model(tag, Weights if tag == "c" else Loads(tag)):
                    pass
            manager.force_reset()
    # The background thread does it, and goes on to look for more before it counts as done.
    wait_until(lambda: not read_snapshot(namespace).instances, "all are unloaded")
    wait_until(lambda: not manager._connected().unloads.is_busy, "no thread of this process is at it any more")
    assert problems(namespace) == []


def idle_copy_that_is_seldom_looked_at(new_manager: NewManager, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Load `a`, and have no look that comes every `poll_interval` find an unload that was forgotten."""
    manager = new_manager(fallback_memory_mb=1000, poll_interval=30.0)
    with manager.model("a", Loads("a")):
        pass
    monkeypatch.setattr(Jobs, "look_around", lambda self: None)
    return manager._connected()


def test_an_unload_that_begins_while_the_background_thread_looks_for_unfinished_ones_is_not_forgotten(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = idle_copy_that_is_seldom_looked_at(new_manager, monkeypatch)
    unloads, looks, look = session.unloads, itertools.count(), Unloads.unload_in_thread
    with monkeypatch.context() as patch:
        # Nobody unloads it before the thread below is said to.
        patch.setattr(Unloads, "unload_in_thread", lambda self: None)
        session.namespace.reset()
        rows = [row for row, _ in unloads._assigned()]
        assert len(rows) == 1
        with call_in_thread() as (frame, thread):

            def nobody_yet(self: Unloads) -> bool:
                if next(looks) == 0:
                    # It begins right after the look.
                    self.may_be_left = True
                    self._in_progress = {row: _AtIt(thread, frame) for row in rows}
                return False

            patch.setattr(Unloads, "is_busy", property(nobody_yet))
            patch.setattr(Unloads, "unload_in_thread", look)
            unloads.may_be_left = True
            unloads.take_up_what_is_left()
    # An exception has ended that thread's call.
    wait_until(lambda: not read_snapshot(namespace).instances, "it is unloaded", SOON_S)
    assert problems(namespace) == []


def test_an_unload_whose_thread_could_not_be_seen_at_the_look_after_a_ring_is_not_forgotten(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = idle_copy_that_is_seldom_looked_at(new_manager, monkeypatch)
    rung, is_at = threading.Event(), Unloads.is_at

    def not_seen_at_first(self: Unloads, row: int) -> bool:
        if threading.current_thread().name.startswith("mpmm-background") and not rung.is_set():
            rung.set()
            return True
        return is_at(self, row)

    monkeypatch.setattr(Unloads, "is_at", not_seen_at_first)
    session.namespace.reset()
    # As if an exception had ended `force_reset` here.
    wait_until(rung.is_set, "the background thread has looked", SOON_S)
    wait_until(lambda: not read_snapshot(namespace).instances, "it is unloaded", SOON_S)
    assert problems(namespace) == []


@pytest.mark.parametrize("hangs", [False, True])
def test_objects_are_unloaded_one_after_another_unless_one_hangs(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    manager = new_manager(fallback_memory_mb=1000, poll_interval=30.0)
    # It would begin further unloads if it came just then.
    monkeypatch.setattr(Jobs, "look_around", lambda self: None)
    began, go, at_once, most = threading.Event(), threading.Event(), list[str](), list[int]()

    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def unload_model(self) -> None:
            at_once.append(self.name)
            most.append(len(at_once))
            began.set()
            if len(most) == 1:
                go.wait()
            at_once.remove(self.name)

    for tag in "abc":
        with manager.model(tag, partial(Model, tag)):
            pass
    if hangs:
        monkeypatch.setattr("mpmm.model_manager.unload.ENDS_WITHIN_S", 0.0)
    unloads = manager._connected().unloads
    manager._connected().namespace.reset()
    assert began.wait(DEADLINE_S)
    for _ in range(3):
        # As at each look.
        unloads._unload_here()
    if hangs:
        assert len(copies_of(namespace, "a") + copies_of(namespace, "b") + copies_of(namespace, "c")) == 1
    go.set()
    wait_until(lambda: not read_snapshot(namespace).instances, "all are unloaded", SOON_S)
    assert sorted(most) == ([1, 2, 2] if hangs else [1, 1, 1])
    assert problems(namespace) == []


def test_an_unload_whose_end_an_exception_has_undone_is_not_forgotten(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = idle_copy_that_is_seldom_looked_at(new_manager, monkeypatch)
    state, unloads = session.namespace, session.unloads
    with monkeypatch.context() as patch:
        patch.setattr(Unloads, "unload_in_thread", lambda self: None)
        state.reset()
        ((row, _),) = unloads._assigned()

        def interrupt(self: Transaction, committed: bool) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), state.transaction() as t:
            state.transitions.unloads.end(t, row)
            patch.setattr(Transaction, "_end", interrupt)
    unloads.may_be_left = True
    unloads.take_up_what_is_left()
    wait_until(lambda: not read_snapshot(namespace).instances, "it is unloaded", SOON_S)
    with state.transaction():
        pass
    wait_until(lambda: not read_snapshot(namespace).instances, "it is unloaded", SOON_S)
    assert problems(namespace) == []
