"""A missing wake-up or an undone job leaves no process asleep, and no answer unconsumed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from crash_lab import Lab, _Actor
from crash_lab import lab as lab  # the fixture
from harness import (
    NewManager,
    NewProcess,
    Seat,
    acquire,
    attach,
    copies_of,
    in_thread,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject, Weights
from patience import DEADLINE_S, Stopwatch

from mpmm.errors import AcquireTimeoutError, NamespaceResetError
from mpmm.model_manager import attachment
from mpmm.model_manager import leader as leader_module
from mpmm.model_manager.leader import Leader
from mpmm.policy.view import Reason
from mpmm.scheduling import Scheduler
from mpmm.shared_state import transaction
from mpmm.shared_state.core import CORE_VARIABLE
from mpmm.shared_state.events import Cause
from mpmm.shared_state.futex import wake_all
from mpmm.shared_state.layout import Header, Instance, Member, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.signal_words import Signal
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transitions import Transitions, part

# A repair by the next poll does not count: it comes later than this.
SOON_S = 8.0
RARE_POLLS: dict[str, Any] = {"poll_interval": 30.0}


def wake_no_more(seat: Seat, instead: Callable[[], object]) -> None:
    """Do something else, once, where the main thread is about to wake a waiter after a transaction."""
    seat.manager._connected().namespace.lock._give_core_up()
    left = [instead]

    def wake(address: int) -> None:
        if left and threading.current_thread() is threading.main_thread():
            left.pop()()
        wake_all(address)

    vars(part)["wake_all"] = wake


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def exit_here() -> None:
    raise SystemExit


def release_and_leave(seat: Seat) -> None:
    """Release, and leave as a process does that a signal handler has ended by SystemExit."""
    try:
        release(seat)
    except SystemExit:
        seat.manager.shutdown()


@pytest.mark.parametrize("instead", [stop_here, exit_here])
def test_a_waiter_whose_releaser_did_not_come_to_wake_it_is_woken(
    namespace: str, new_manager: NewManager, new_process: NewProcess, instead: Callable[[], object]
) -> None:
    new_manager(max_model_copies=1)
    holder, first, second = new_process(), new_process(), new_process()
    holder.call(acquire, "a")
    # The one who has come last is woken ahead of its turn.
    for waiter in (first, second):
        others = len(waiting(namespace, "a"))
        waiter.call(warn_never)
        waiter.send(acquire, "a")
        wait_until(lambda: len(waiting(namespace, "a")) > others, "it waits")  # noqa: B023  # which runs at once
    # Past the first sleep, which is short.
    time.sleep(1.2)
    holder.call(wake_no_more, instead)
    holder.send(release_and_leave)
    watch = Stopwatch()
    first.result()
    assert watch.calm_s() < SOON_S
    if instead is stop_here:
        holder.resume()
    holder.result()
    first.call(release)
    second.result()
    second.call(release)
    assert problems(namespace) == []


def warn_never(seat: Seat) -> None:
    """Take from this process's waiters the looks that they have for the sake of the log."""
    seat.manager._connected().warn_after_s = ()


def test_an_object_inside_a_model_server_is_unloaded_once_nothing_starts_quietly_any_more(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(**RARE_POLLS)
    server = new_process(attached=False)
    server.call(attach_as_in_server, namespace=namespace, memory_source="booked")
    server.call(acquire, "a", LoadsObject())
    server.call(release)
    with manager.reserve(100, name="quiet", steady=True) as lease:
        manager.unload("a", timeout_seconds=0)
        assert [copy.state for copy in copies_of(namespace, "a")] == ["unloading"]
        bell = manager._connected().namespace.tables.bell(1)
        rung = bell.seen()
        lease.settled()
        assert bell.seen() != rung
        wait_until(lambda: not copies_of(namespace, "a"), "it is unloaded")


def attach_as_in_server(seat: Seat, **arguments: Any) -> None:
    """Make a manager as a model server's code does, which is a guest in the namespace."""
    vars(attachment)["is_server_process"] = lambda: True
    attach(seat, **arguments)


def test_the_time_of_an_unload_that_a_quiet_start_has_held_back_begins_when_that_ends(lab: Lab) -> None:
    engine = lab.loading("engine")
    lab.do(lambda t, tr: tr.isolation.begin_steady(t, engine))
    beside, elsewhere = (unloading_on(lab, devices) for devices in (1, 2))
    before = {row: lab.tables.instances[row].since for row in (beside, elsewhere)}
    lab.do(lambda t, tr: tr.isolation.end_steady(t, engine))
    assert lab.tables.instances[beside].since > before[beside]
    assert lab.tables.instances[elsewhere].since == before[elsewhere]


def unloading_on(lab: Lab, devices: int) -> int:
    """Make a copy on these devices (bits) that is being unloaded."""
    model = lab.model("a")
    row: int = lab.do(lambda t, tr: tr.loads.begin(t, model, lab.victim, devices, 100.0, alone=False))
    lab.do(lambda t, tr: tr.loads.end(t, row, b"h%d" % devices, 90.0, 0, False))
    lab.do(lambda t, tr: tr.holds.release(t, row))
    lab.do(lambda t, tr: tr.unloads.begin(t, row, lab.victim, evicted=True))
    return row


def test_a_waiter_that_is_given_something_between_two_steps_of_a_reset_is_told_of_it(
    namespace: str, new_manager: NewManager, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, holder, newcomer = new_manager(max_model_copies=1), new_process(), new_process()
    holder.call(acquire, "b")
    holder.call(release)
    holder.call(acquire, "a")
    shared = manager._connected().namespace
    with monkeypatch.context() as patched:
        # As for a reset of hundreds of copies.
        patched.setattr(transaction, "STEP_WORDS", 1)
        with shared.transaction() as t:
            before = shared.transitions.reset(t)
    assert before is not None
    newcomer.send(acquire, "a")
    wait_until(lambda: waiting(namespace, "a"), "it waits")
    holder.call(release)
    newcomer.result()
    while before is not None:
        with shared.transaction() as t:
            before = shared.transitions.reset(t, before)
    manager._connected().unloads.unload_assigned()
    with pytest.raises(NamespaceResetError):
        newcomer.call(release)
    # Nothing is reserved without a process that loads.
    wait_until(lambda: not read_snapshot(namespace).tickets, "its ticket is gone")
    # Background threads unload, too.
    wait_until(lambda: not read_snapshot(namespace).instances, "all copies are gone")
    holder.call(acquire, "a")
    holder.call(release)
    newcomer.call(acquire, "a")
    newcomer.call(release)
    assert problems(namespace) == []


class EndsItsThread(Weights):
    """A model whose unload method raises what no handler of exceptions catches, when two have looked at it."""

    def unload_model(self) -> None:
        """Raise it."""
        time.sleep(0.3)
        raise asyncio.CancelledError


# That the exception ends the thread that unloads is what is tried here.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unload_method_that_raises_anything_leaves_nothing_booked(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(default_estimate_mb=1000.0, **RARE_POLLS)
    manager.release_model("a", manager.acquire_model("a", EndsItsThread))
    with manager.model("b", Loads()):
        assert [copy.tag for copy in read_snapshot(namespace).instances] == ["b"]
    assert problems(namespace) == []


class Raises(logging.Handler):
    """A program's own log handler, whose server is away."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise."""
        raise OSError("the log's server is away")


def log_nowhere(seat: Seat) -> None:
    """Let every log line of this process raise."""
    logging.getLogger("mpmm").addHandler(Raises())


def test_a_log_handler_that_raises_ends_no_background_thread(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(lock_timeout_seconds=0.2, default_estimate_mb=600.0, memory_return_seconds=1.0)
    owner = new_process(lock_timeout_seconds=0.2, default_estimate_mb=600.0, memory_return_seconds=1.0)
    owner.call(acquire, "a", LoadsObject())
    owner.call(release)
    owner.call(log_nowhere)
    with manager._connected().namespace.transaction():
        # Its background thread gives up waiting for the lock meanwhile, and says so.
        owner.call(wait_for_the_lock)
    with manager.model("b", Loads()):
        pass


def wait_for_the_lock(seat: Seat) -> None:
    """Have the background thread ask for the lock, and return once it has given up."""
    session = seat.manager._connected()
    session.deferred.defer(lambda t: False)
    wait_until(lambda: session.background._failing, "it has given up")


def test_wake_ups_behind_a_log_line_that_raises_are_made(lab: Lab) -> None:
    made: list[str] = []

    def complain() -> None:
        raise OSError("the log's server is away")

    with pytest.raises(OSError, match="away"), lab.namespace.transaction() as t:
        t.after += [complain, lambda: made.append("wake-up")]
    assert made == ["wake-up"]


def test_what_follows_a_transaction_is_done_once_though_somebody_looks_for_what_was_left(lab: Lab) -> None:
    lock = lab.namespace.lock
    made: list[int] = []
    for number in range(100):
        with lab.namespace.transaction() as t:
            # It cannot tell these calls from ones that nobody makes any more, unless it has seen them before. Their
            # list may lie where that of the last transaction was.
            t.after += [partial(made.append, number), lock.finish_calls]
        for _ in range(number % 3):
            with lab.namespace.transaction():
                pass
    assert made == list(range(100))


def test_what_an_exception_keeps_from_being_done_after_a_transaction_is_done_at_the_second_look(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, made = lab.namespace.lock, list[str]()

    def interrupt(calls: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transaction, "_call_all", interrupt)
        with pytest.raises(KeyboardInterrupt), lab.namespace.transaction() as t:
            t.after.append(lambda: made.append("wake-up"))
    assert lock.may_be_abandoned
    lock.finish_calls()
    assert made == [], "as far as one look can tell, a thread is about to make it"
    lock.finish_calls()
    assert made == ["wake-up"]
    lock.finish_calls()
    assert (made, lock.may_be_abandoned) == (["wake-up"], False)


def test_calls_after_a_transaction_are_not_made_before_it_is_committed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, end, made = lab.namespace.lock, transaction.Transaction._end, list[str]()

    def look_end_and_interrupt(t: transaction.Transaction, committed: bool) -> None:
        # The thread is stopped here, for longer than the background thread waits between two looks.
        for _ in range(3):
            lock.finish_calls()
        assert not made
        end(t, committed)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transaction.Transaction, "_end", look_end_and_interrupt)
        with pytest.raises(KeyboardInterrupt), lab.namespace.transaction() as t:
            t.after.append(lambda: made.append("wake-up"))
    for _ in range(2):
        lock.finish_calls()
    assert made == ["wake-up"]


def test_calls_after_a_transaction_are_forgotten_once_they_are_made_or_it_is_undone(lab: Lab) -> None:
    lock, made = lab.namespace.lock, list[str]()
    with pytest.raises(KeyError), lab.namespace.transaction() as t:
        t.after.append(lambda: made.append("of the undone one"))
        raise KeyError
    with lab.namespace.transaction():
        pass
    with lab.namespace.transaction() as t:
        t.after.append(lambda: made.append("of the last one"))
    assert not lock.may_be_abandoned
    for _ in range(2):
        lock.finish_calls()
    assert made == ["of the last one"]


def test_who_has_news_is_woken_and_nobody_else(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    held, ends = lab.active("a"), lab.active("b")
    _, called_up, granted = (lab.ticket("a") for _ in range(3))
    lab.do(lambda t, tr: tr.tickets.call_up(t, called_up))
    lab.do(lambda t, tr: tr.hand_over.from_holder(t, granted, held, Cause(Reason.IDLE_COPY)))
    lab.do(lambda t, tr: tr.holds.release(t, ends))
    woken: list[int] = []

    def wake(signal: Signal) -> None:
        woken.append(signal.word)

    monkeypatch.setattr(Signal, "wake", wake)
    signals = {lab.tables.ticket(row) + Ticket.SIGNAL for row in (called_up, granted)}
    lab.tables.wake_all_with_news()
    assert set(woken) == signals, "there is nothing to unload"
    for row, state in ((lab.unloading("c"), Instance.UNLOADING), (lab.suspending("d"), Instance.SUSPENDING)):
        woken.clear()
        assert lab.tables.instances[row].state == state
        lab.tables.wake_all_with_news()
        holder = lab.words[lab.tables.instance(row) + Instance.HOLDER] - 1
        signals |= {lab.tables.member(holder) + Member.BELL}
        assert set(woken) == signals


def test_what_a_newcomer_takes_back_of_the_dead_is_given_to_a_waiter(
    namespace: str, new_manager: NewManager, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = new_manager(max_model_copies=1, **RARE_POLLS)._connected().leader
    holder, waiter = new_process(), new_process()
    holder.call(acquire, "a")
    waiter.call(warn_never)
    waiter.send(acquire, "a")
    wait_until(lambda: waiting(namespace, "a"), "it waits")
    with monkeypatch.context() as patched:
        # The leader looks a moment later.
        patched.setattr(leader, "_reap", lambda: None)
        holder.kill()
        visitor = Namespace.join(namespace, kind=Member.GUEST, must_exist=True)
        visitor.leave()
    watch = Stopwatch()
    waiter.result()
    assert watch.calm_s() < SOON_S
    waiter.call(release)


def test_the_copies_that_were_suspended_are_dropped_one_by_one_and_that_is_said(lab: Lab) -> None:
    first, second = lab.suspended("a"), lab.suspended("b")
    scheduler = Scheduler(lab.namespace)
    for left in ([second], []):
        with lab.namespace.transaction() as t:
            assert scheduler.suspension.drop_oldest(t, 0, Cause(Reason.BY_HAND))
        states = {row: lab.tables.instances[row].state for row in (first, second)}
        assert [row for row, state in states.items() if state == Instance.SUSPENDED] == left
    with lab.namespace.transaction() as t:
        assert not scheduler.suspension.drop_oldest(t, 0, Cause(Reason.BY_HAND))


def test_a_newcomer_that_reaps_gives_what_is_to_be_unloaded_to_a_worker(lab: Lab) -> None:
    copy, ticket = lab.suspended("a"), lab.ticket("a")
    lab.do(lambda t, tr: tr.hand_over.allow_resume(t, ticket, copy))
    lab.do(lambda t, tr: tr.unloads.ask(t, copy, 0))
    newcomer = Transitions(lab.tables, _Actor(-1, lab.namespace.settings))
    with lab.namespace.transaction() as t:
        assert newcomer.members.reap(t, lab.victim)
    assert lab.problems() == []
    assert lab.tables.instances[copy].state == Instance.UNLOADING


@pytest.mark.parametrize("answered_by", ["from_holder", "grant"])
def test_a_copy_that_is_kept_has_somebody_to_look_at_it_when_the_one_that_was_called_up_has_another(
    lab: Lab, answered_by: str
) -> None:
    lab.idle("a", b"kept")
    other = lab.active("a", b"other")
    if answered_by == "grant":
        lab.do(lambda t, tr: tr.holds.release(t, other))
    first, second = lab.ticket("a"), lab.ticket("a")
    lab.do(lambda t, tr: tr.tickets.call_up(t, first))
    if answered_by == "grant":
        lab.do(lambda t, tr: tr.hand_over.grant(t, first, other))
    else:
        lab.do(lambda t, tr: tr.hand_over.from_holder(t, first, other, Cause(Reason.IDLE_COPY)))
    assert lab.words[lab.tables.ticket(second) + Ticket.CALLED_UP]
    assert lab.problems() == []


def test_a_copy_that_is_kept_has_somebody_to_look_at_it_when_the_one_that_was_called_up_leaves(lab: Lab) -> None:
    lab.idle("another", b"another")
    lab.idle("a", b"kept")
    first, of_another, second = lab.ticket("a"), lab.ticket("another"), lab.ticket("a")
    lab.do(lambda t, tr: tr.tickets.call_up(t, first))
    lab.do(lambda t, tr: tr.hand_over.leave_queue(t, first))
    called_up = [bool(lab.words[lab.tables.ticket(row) + Ticket.CALLED_UP]) for row in (of_another, second)]
    assert called_up == [False, True]


def test_where_the_one_that_was_called_up_leaves_the_next_one_is_called_up_and_no_newcomer(lab: Lab) -> None:
    first, second, third = (lab.ticket() for _ in range(3))
    lab.do(lambda t, tr: tr.hand_over.leave_queue(t, first))
    # It has the row of the first one, before the others'.
    assert lab.ticket() == first
    lab.do(lambda t, tr: tr.tickets.call_up(t, second))
    lab.do(lambda t, tr: tr.hand_over.leave_queue(t, second))
    called = {ticket.row for ticket in waiting(lab.namespace.name) if ticket.called_up_ago_s is not None}
    assert called == {third}


@pytest.mark.parametrize("served", [False, True])
def test_a_copy_that_is_kept_again_calls_up_who_has_become_first(lab: Lab, served: bool) -> None:
    kept, other = lab.active("a", b"kept"), lab.active("a", b"other")
    first, second = lab.ticket("a"), lab.ticket("a")
    scheduler = Scheduler(lab.namespace)
    lab.do(lambda t, tr: scheduler.keep(t, kept, True, call_up=True))
    lab.do(lambda t, tr: tr.holds.take_idle(t, kept, lab.victim + 1))
    called_up = [lab.words[lab.tables.ticket(row) + Ticket.CALLED_UP] for row in (first, second)]
    assert called_up[0]
    assert not called_up[1]
    if served:
        lab.do(lambda t, tr: tr.hand_over.from_holder(t, first, other, Cause(Reason.IDLE_COPY)))
    lab.do(lambda t, tr: scheduler.keep(t, kept, True, call_up=False))
    assert lab.words[lab.tables.ticket(first) + Ticket.CALLED_UP] == called_up[0]
    assert bool(lab.words[lab.tables.ticket(second) + Ticket.CALLED_UP]) == served


def test_a_waiter_that_could_not_look_looks_again(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(max_model_copies=1, wait_timeout_seconds=2.0, **RARE_POLLS)
    session = manager._connected()
    held = manager.acquire_model("a", Loads())
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            manager.acquire_model("a", Loads())
        except AcquireTimeoutError as error:
            failed.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: waiting(namespace, "a"), "it waits")
    [ticket] = session.namespace.tables.used_rows(session.namespace.segment.layout.tickets)
    with session.namespace.transaction() as t:
        session.namespace.transitions.tickets.call_up(t, ticket)
    again = session.look_again(ticket)
    # The copy is idle for the look, which it is not in truth: nothing is decided.
    session.scheduler.is_model_idle = lambda ticket: True
    wait_until(lambda: again.in_s() <= 0, "it is to look")
    with OtherThreadInTransaction(session.namespace):
        again.look()
        assert again.in_s() <= 0
    again.look()
    assert again.in_s() > 0
    waiter.join()
    assert failed
    manager.release_model("a", held)


def _has_polled(namespace: str) -> bool:
    snapshot = read_snapshot(namespace)
    # A quarter of a second after it began to lead, and then not again for long.
    return (snapshot.leader_for_s or 0.0) - snapshot.polled_ago_s > 0.1


@pytest.mark.parametrize("core", ["", "python"])
def test_a_waiter_that_is_called_up_while_it_looks_looks_for_that_too(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, core: str
) -> None:
    monkeypatch.setenv(CORE_VARIABLE, core)
    # Neither a poll nor the look for the log's sake serves it.
    manager = new_manager(max_model_copies=1, poll_interval=3600)
    wait_until(lambda: _has_polled(namespace), "the first poll is over")
    session = manager._connected()
    session.warn_after_s = ()
    held = manager.acquire_model("a", Loads())
    [hold] = session.held.holds.values()
    operation = session.begin(sys._getframe())
    assert session.held.take_off_hold(hold, operation)
    is_model_idle, called_up = session.scheduler.is_model_idle, threading.Event()

    def keep() -> None:
        with session.namespace.transaction() as t:
            assert session.scheduler.keep(t, hold[0].row, True, call_up=True)

    def see_it_in_use(ticket: int) -> bool:
        found = is_model_idle(ticket)
        if not called_up.is_set():
            # The copy is kept, and the waiter called up again, just after it has looked.
            in_thread(keep)[0].join()
            called_up.set()
        return found

    monkeypatch.setattr(session.scheduler, "is_model_idle", see_it_in_use)
    waiter, outcome = in_thread(lambda: manager.acquire_model("a", Loads()))
    wait_until(lambda: waiting(namespace, "a"), "it waits")
    [ticket] = session.namespace.tables.used_rows(session.namespace.segment.layout.tickets)
    with session.namespace.transaction() as t:
        session.namespace.transitions.tickets.call_up(t, ticket)
    assert called_up.wait(DEADLINE_S), "it does not look"
    session.end(operation)
    try:
        wait_until(lambda: outcome, "it is served", SOON_S)
    finally:
        # Otherwise the waiter would outlive a failure.
        with session.namespace.transaction() as t:
            session.scheduler.advance(t)
        waiter.join()
    assert outcome == [held]
    manager.release_model("a", held)
    assert problems(namespace) == []


class OtherThreadInTransaction:
    """`with`: another thread is inside a transaction."""

    def __init__(self, shared: Namespace) -> None:
        self._shared = shared
        self._inside, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._stay)

    def _stay(self) -> None:
        with self._shared.transaction():
            self._inside.set()
            self._done.wait(DEADLINE_S)

    def __enter__(self) -> None:
        self._thread.start()
        self._inside.wait(DEADLINE_S)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def test_tasks_wait_no_longer_than_their_time_out_after_a_thread_was_not_to_be_had(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager(max_model_copies=1, wait_timeout_seconds=1.0)
    held = manager.acquire_model("a", Loads())
    start, refused = threading.Thread.start, [True]

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name == "mpmm-watcher" and refused:
            refused.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_refuse)
    kept: list[BaseException] = []

    async def wait() -> None:
        async with manager.model_async("a", Loads()):
            pass

    async def wait_twice() -> None:
        with pytest.raises(RuntimeError, match="can't start new thread") as caught:
            await wait()
        # Its traceback refers to all that the call had.
        kept.append(caught.value)
        with pytest.raises(AcquireTimeoutError):
            await asyncio.wait_for(wait(), DEADLINE_S)

    asyncio.run(wait_twice())
    wait_until(lambda: not waiting(namespace, "a"), "the task that failed waits no more")
    manager.release_model("a", held)
    kept.clear()
    assert problems(namespace) == []


@pytest.mark.parametrize("core", ["python", ""])
def test_a_transaction_that_is_left_while_nobody_watches_keeps_the_others_out_for_no_longer_than_any_other(
    core: str,
    namespace: str,
    new_manager: NewManager,
    new_process: NewProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leader = new_process()
    monkeypatch.setenv(CORE_VARIABLE, core)
    monkeypatch.setattr(Leader, "lead_if_free", lambda self, wait_s=0.0: None)
    for name in ("RESERVE_TICK_S", "RESERVE_REST_S", "DEPUTY_TICK_S", "DEPUTY_REST_S"):
        monkeypatch.setattr(leader_module, name, 1000.0)
    session = new_manager()._connected()
    wait_until(lambda: session.background.dozing, "its background thread has nothing to watch")
    leave_a_transaction(session.namespace)
    watch = Stopwatch()
    leader.call(acquire, "a")
    assert watch.calm_s() < 2.0
    leader.call(release)
    assert problems(namespace) == []


@pytest.mark.parametrize("core", ["python", ""])
def test_the_leader_finds_the_dead_while_it_has_nothing_else_to_do(
    core: str, namespace: str, new_manager: NewManager, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CORE_VARIABLE, core)
    for name in ("LEADER_REST_S", "RESERVE_TICK_S", "RESERVE_REST_S", "DEPUTY_TICK_S", "DEPUTY_REST_S"):
        monkeypatch.setattr(leader_module, name, 1000.0)
    manager = new_manager(poll_interval=1000.0)
    session = manager._connected()
    assert session.leader.leading
    process = new_process()
    process.call(acquire, "a")
    wait_until(lambda: session.background.dozing, "its background thread has nothing to watch")
    process.kill()
    wait_until(lambda: len(read_snapshot(namespace).members) == 1, "what the dead one had is free")
    assert problems(namespace) == []


def leave_a_transaction(namespace: Namespace) -> None:
    """Leave one open, as an exception does that a signal handler raises in a call that has nothing in hand."""
    thread = threading.Thread(target=lambda: namespace.lock().__enter__())
    thread.start()
    thread.join()


@pytest.mark.parametrize("by_its_own_thread", [True, False])
def test_who_takes_over_a_left_transaction_does_not_wait_for_those_that_wait_for_it(
    by_its_own_thread: bool, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, words = lab.namespace.lock, lab.namespace.segment.words
    lock.set_timeout(1000.0)
    monkeypatch.setattr(transaction, "CLAIM_NS", 10**15)
    taken = threading.Event()

    def take_over() -> None:
        if by_its_own_thread:
            (lambda: lock().__enter__())()
        # Another process has waited for longer than anybody in this one.
        words[Header.STARVING_SINCE] = 1
        words[Header.STARVING] = time.monotonic_ns() + transaction.CLAIM_NS // 2
        with lock():
            pass
        taken.set()

    if not by_its_own_thread:
        leave_a_transaction(lab.namespace)
    thread = threading.Thread(target=take_over, daemon=True)
    thread.start()
    try:
        assert taken.wait(DEADLINE_S)
    finally:
        words[Header.STARVING] = 0
        thread.join()


def test_a_thread_left_without_the_file_locked_is_found_out_while_other_processes_go_on(
    namespace: str, new_manager: NewManager, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = new_process()
    lock = new_manager()._connected().namespace.lock
    end_abandoned, one_at_a_time = transaction.TransactionLock.end_abandoned, threading.Lock()

    def others_first(lock: transaction.TransactionLock) -> bool:
        with one_at_a_time:
            other.call(use_once)
        return end_abandoned(lock)

    monkeypatch.setattr(transaction.TransactionLock, "end_abandoned", others_first)
    # An exception has come before the file was locked, or after it was unlocked.
    thread = threading.Thread(target=lambda: lock._mutex.acquire())
    thread.start()
    thread.join()
    with lock():
        pass
    assert problems(namespace) == []


def test_a_lock_is_closed_though_a_transaction_was_left(lab: Lab) -> None:
    lock = transaction.TransactionLock(lab.namespace.segment, 60.0)
    left, over = threading.Event(), threading.Event()

    def leave_it() -> None:
        (lambda: lock().__enter__())()
        left.set()
        # As long as this thread lives, no other one is taken for it.
        over.wait()

    thread = threading.Thread(target=leave_it)
    thread.start()
    assert left.wait(DEADLINE_S)
    closing = threading.Thread(target=lock.close, daemon=True)
    closing.start()
    closing.join(DEADLINE_S)
    over.set()
    assert not closing.is_alive()
    with lab.namespace.lock(0.0):
        pass


def use_once(seat: Seat) -> None:
    """Make a transaction, and another one."""
    with seat.manager.model("b", Loads("b")):
        pass
