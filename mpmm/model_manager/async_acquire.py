"""Waiting for models in an event loop, without a thread for each task that waits.

    in the loop's thread                     in threads of this module
    ─────────────────────────────────────────────────────────────────────────────────
    an idle instance and no request waits: take it (`AsyncBlock`)
    otherwise                                queue (transactions)
    the task sleeps                          one thread sleeps on the tickets of up to 127 tasks (`Watcher`)
                                             act on the answer (transactions)
    told to load                             run the loader (loads)
    at the end of the block: give it back

Transactions take microseconds, but another process may be stopped while it has the lock. So the loop's thread never
waits for the lock for longer than `LOOP_TIMEOUT_S`, and leaves what takes longer to a thread. If all threads wait for
the lock, other tasks wait for a thread; each task's time-outs begin when it asks for one. Transactions and loads
have their own threads: in a shared pool, tasks that wait for a model could occupy all threads, and the task that is
about to release it would find none.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mpmm.errors import ClosedError, LockTimeoutError, MpmmError
from mpmm.interpreter.fork_hooks import ChildStep, in_forked_child
from mpmm.interpreter.thread_locks import new_lock, new_rlock
from mpmm.interpreter.thread_pools import ThreadPool
from mpmm.interpreter.thread_starts import start_thread
from mpmm.model_manager.acquire import load_booked, take_before_queueing
from mpmm.model_manager.acquisition import Booking
from mpmm.model_manager.load import give_up_booking
from mpmm.model_manager.look_again import LookAgain
from mpmm.model_manager.operations import Held, LoadedInstance, Operation
from mpmm.model_manager.queued_request import GrantRolledBack, NoRowYet
from mpmm.model_manager.refusals import expect_own_time_left, timed_out
from mpmm.model_manager.release import discard, give_back_held, give_back_hold
from mpmm.model_manager.request import PlacementRequest, encoded_tag
from mpmm.model_manager.session import Session
from mpmm.model_manager.unload import UNLOAD_LOOK_S
from mpmm.shared_state.futex import WAITED_FOR_AT_MOST, wait_for_any, wake_all
from mpmm.shared_state.layout import Ticket
from mpmm.shared_state.signal_words import Signal
from mpmm.shared_state.transaction import LEAST_S, TransactionLock
from mpmm.text.printable import printable_logger

if TYPE_CHECKING:
    from mpmm.model_manager.attachment import Attachment

__all__ = ["LOOP_TIMEOUT_S", "AsyncAcquire"]

_LOG = printable_logger("mpmm")
T = TypeVar("T")
Outcome = int | BaseException | None
LOOP_TIMEOUT_S = 0.002
# Memory limits how many loads the policy allows at a time; this limits the threads.
LOADS_AT_A_TIME = 64
TRANSACTIONS_AT_A_TIME = 2
# How long a watcher's thread stays if it has nothing to watch.
LINGER_S = 1.0


class AsyncAcquire:
    """One acquire of one task: the steps of `acquire.py`, with a watcher that waits.

    While this object exists, it is responsible for what its operation holds: see `mpmm.model_manager.operations`.
    """

    def __init__(
        self, attachment: Attachment, session: Session, operation: Operation, tag: str, request: PlacementRequest
    ) -> None:
        encoded_tag(tag)
        self._attachment = attachment
        self._session = session
        self._threads = _threads_of(session)
        self._is_abandoned = self._is_cancelled = self._works_in_thread = False
        self._operation = operation
        self._acquisition = attachment.acquisition(session, operation, tag, request)
        operation.owner = weakref.ref(self)

    def abandon(self) -> None:
        """Leave what the operation holds to the background thread, because nothing continues it."""
        # In this order: a thread that works for this acquire writes the second flag before it reads the first.
        self._is_abandoned = True
        if not self._works_in_thread:
            self._session.abandon(self._operation)

    async def run(self, loader: Callable[[], Any], taken: LoadedInstance | None) -> Any:
        """Return an instance that this process holds now. Raises what `acquire_model` raises.

        taken: the instance that its operation holds already, if any; its server may be gone.
        """
        acquisition, session = self._acquisition, self._session
        acquisition.note_keep_alive()
        found: LoadedInstance | Booking | None = taken
        while True:
            found = found or self._take_before_queueing() or await self._queue()
            if not isinstance(found, LoadedInstance):
                load = functools.partial(self._load, found, loader)
                give_up = functools.partial(give_up_booking, session, found)
                return await self._in_thread(self._threads.loads, load, self._undo_load, give_up)
            if session.held.handle_is_alive(found):
                return found.value
            throw_away = functools.partial(discard, session, self._operation, found)
            await self._in_transaction(throw_away, never=throw_away)
            found = None

    async def give_back(self, held: Held) -> None:
        """Give back what an operation holds, in a thread.

        If no thread has done so when the lock's time-out is over, the task goes on, and a thread does it later.
        """
        lock = self._session.namespace.lock
        patiently = functools.partial(give_back_hold, self._session, self._operation, held, self._acquisition.tag)
        work = functools.partial(_counted_from, time.monotonic(), lock, patiently)
        # Shielded, because a task that is cancelled now must give it back nevertheless.
        given_back = asyncio.shield(
            asyncio.wrap_future(self._threads.transactions.submit(self._unless_abandoned, work))
        )
        try:
            await asyncio.wait((given_back,), timeout=lock.timeout_seconds + LEAST_S)
            if given_back.done():
                given_back.result()
        finally:
            given_back.cancel()
            # See `_in_thread`.
            del given_back

    async def make_room(self) -> None:
        """Make room after a use of the model has run out of memory."""
        make_room = functools.partial(self._session.out_of_memory.make_room_after_use, self._acquisition.tag)
        with contextlib.suppress(MpmmError):
            await asyncio.shield(asyncio.wrap_future(self._threads.loads.submit(make_room)))

    def _take_before_queueing(self) -> LoadedInstance | None:
        """Take an idle instance, in the loop's thread."""
        with contextlib.suppress(LockTimeoutError):
            return take_before_queueing(self._acquisition, LOOP_TIMEOUT_S)
        return None

    async def _queue(self) -> LoadedInstance | Booking:
        """Wait in the queue; return an instance that this process holds now, or the permission to load one."""
        acquisition, threads = self._acquisition, self._threads
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()
        outcomes: list[Outcome] = []

        def answer(outcome: Outcome) -> None:
            outcomes.append(outcome)
            self._operation.unheard_by = weakref.ref(loop)
            # No function of this module is called back, because a loop continues after an exception in a callback, and
            # the answer would be lost.
            try:
                loop.call_soon_threadsafe(answered.set)
            except RuntimeError:
                # The loop is closed, so no task waits any more.
                self.abandon()

        while True:
            try:
                copy = await self._in_transaction(functools.partial(self._enter, answer), self._leave)
                break
            except NoRowYet:
                # Here, because a thread that slept would be missing to all other tasks.
                await asyncio.sleep(UNLOAD_LOOK_S)
        if copy is not None:
            return copy
        if outcomes:
            # The answer came before this task heard that it had queued.
            self._operation.unheard_by = weakref.ref(loop)
        while True:
            try:
                await answered.wait()
            except asyncio.CancelledError:
                threads.transactions.submit(self._leave)
                raise
            finally:
                self._operation.unheard_by = None
            outcome = outcomes.pop()
            if outcome is None:
                raise await self._in_transaction(acquisition.time_out, never=self._leave)
            if isinstance(outcome, BaseException):
                try:
                    raise outcome
                finally:
                    # Its traceback has this frame, so they would keep each other, and the task with its loader.
                    del outcome
            if outcome == Ticket.GRANTED and (copy := acquisition.take_grant()) is not None:
                return copy
            found = await self._in_transaction(self._act, self._undo_act, self._leave)
            if found is not None:
                return found
            # The process that answered was killed before its transaction was committed.
            answered.clear()
            threads.watch(acquisition.row, acquisition.deadline, answer)

    # ---- in threads ----------------------------------------------------------------------------------------

    def _enter(self, answer: Callable[[Outcome], None]) -> LoadedInstance | None:
        """Take an idle instance after all, and return it, or queue and have the ticket watched.

        Raises NoRowYet if there is no row for the model yet.
        """
        acquisition, session = self._acquisition, self._session
        try:
            # It counts as waiting before it has a ticket, until it is watched; the watcher counts it, too.
            with session.waiting():
                copy = acquisition.take_idle(acquisition.left_s()) or acquisition.enqueue(wait_for_row=False)
                if copy is None:
                    session.unloads.unload_in_thread()
                    self._threads.watch(acquisition.row, acquisition.deadline, answer)
                return copy
        except LockTimeoutError as error:
            expect_own_time_left(session, acquisition.tag, error)
            raise

    def _act(self) -> LoadedInstance | Booking | None:
        """Act on the ticket's answer; return None if it has none after all."""
        try:
            with contextlib.suppress(GrantRolledBack), self._session.waiting():
                return self._acquisition.act()
        except LockTimeoutError as error:
            expect_own_time_left(self._session, self._acquisition.tag, error)
            raise
        return None

    def _load(self, booking: Booking, loader: Callable[[], Any]) -> Any:
        """Load, or resume, what `booking` stands for, and return it."""
        try:
            return load_booked(self._acquisition, booking, loader)
        finally:
            # The task has it, not this thread, whose next load may be another task's: if that one's loader asks for
            # more, what this one has loaded to run alone still does.
            self._session.thread.alone = None

    def _leave(self, copy: LoadedInstance | None = None) -> None:
        """Leave the queue, or give back what was taken instead of queueing."""
        if copy is not None:
            self._undo_load()
            return
        self._threads.forget(self._acquisition.row)
        self._acquisition.leave()

    def _undo_act(self, found: LoadedInstance | Booking | None) -> None:
        if isinstance(found, Booking):
            give_up_booking(self._session, found)
        else:
            self._leave(found)

    def _undo_load(self, _: Any = None) -> None:
        """Give back what this acquire holds, and no equal value, which another task may hold."""
        held = self._operation.held
        with contextlib.suppress(MpmmError):
            if held is not None and self._session.held.take_off_hold(held, self._operation):
                give_back_held(self._session, self._operation, self._acquisition.tag)

    async def _in_transaction(
        self,
        function: Callable[[], T],
        undo: Callable[[T], object] = lambda result: None,
        never: Callable[[], object] = lambda: None,
    ) -> T:
        """Run a function that makes transactions in a thread, and return its result; see `_in_thread`.

        Its waits for the lock count from now on. While the lock's holder is stopped, the few threads wait for the lock,
        and this function for a thread; it must not add their time-outs to its own. If the time is over before a thread
        has begun with it, it is never called.

        Raises LockTimeoutError after `lock_timeout_seconds`, AcquireTimeoutError if the request's own time is over.
        """
        began, lock = time.monotonic(), self._session.namespace.lock
        timeout_s = max(LEAST_S, min(self._acquisition.deadline - began, lock.timeout_seconds))
        counted = functools.partial(_counted_from, began, lock, function)
        return await self._in_thread(self._threads.transactions, counted, undo, never, timeout_s)

    async def _in_thread(
        self,
        pool: ThreadPool,
        function: Callable[[], T],
        undo: Callable[[T], object] = lambda result: None,
        never: Callable[[], object] = lambda: None,
        timeout_s: float | None = None,
    ) -> T:
        """Run a function in a thread, and return its result.

        undo: called with the result if the task is cancelled before it arrives. never: called if the task is cancelled
        before the function has begun. timeout_s: how long to wait until the function begins; None for ever. After that
        it is not called any more, and the error says that the lock was not free; the background thread takes back what
        the operation holds.
        """
        future = pool.submit(self._unless_abandoned, function)
        future.add_done_callback(functools.partial(self._abandon_if_unheard, asyncio.get_running_loop()))
        wrapped = asyncio.wrap_future(future)
        try:
            if timeout_s is not None:
                await asyncio.wait((wrapped,), timeout=timeout_s)
                # One that has begun gives up by itself.
                if not wrapped.done() and future.cancel():
                    raise self._not_begun(timeout_s)
            return await wrapped
        except asyncio.CancelledError:
            self._is_cancelled = True
            wrapped.cancel()
            if future.cancel():
                self._threads.transactions.submit(never)
            else:
                # Not as the callback itself: if the future is done, that would run here, in the loop's thread, and
                # wait for the lock.
                future.add_done_callback(functools.partial(self._undo_in_thread, undo))
            raise
        finally:
            self._operation.unheard_by = None
            # They refer to what is raised, whose traceback has this frame: it would keep the task, with its loader.
            del future, wrapped

    def _not_begun(self, timeout_s: float) -> MpmmError:
        """Return the error for a function with which no thread has begun, because the threads wait for the lock."""
        namespace, acquisition = self._session.namespace, self._acquisition
        if timeout_s >= namespace.lock.timeout_seconds:
            return namespace.lock.time_out(timeout_s)
        shown = namespace.tables.shown_for(acquisition.tag)
        return timed_out(acquisition.tag, time.monotonic() - acquisition.began, "lock", shown=shown)

    def _undo_in_thread(self, undo: Callable[[T], object], future: Future[T]) -> None:
        self._threads.transactions.submit(_undo_result, undo, future)

    def _abandon_if_unheard(self, loop: asyncio.AbstractEventLoop, future: Future[Any]) -> None:
        """Abandon what a thread got for a task whose loop is closed, or closes before the task hears of it.

        The result of a cancelled task is undone instead.
        """
        if self._is_cancelled:
            return
        # First, because the loop may be closed at any time before it resumes the task.
        self._operation.unheard_by = weakref.ref(loop)
        if loop.is_closed():
            self.abandon()

    def _unless_abandoned(self, function: Callable[[], T]) -> T:
        """Return what a function returns; if this acquire is abandoned meanwhile, so is what the function got."""
        self._works_in_thread = True
        try:
            if self._is_abandoned:
                raise asyncio.CancelledError
            return function()
        except StopIteration as error:
            # From a loader's `next()`. asyncio's futures cannot carry it, so the task would wait for ever; and in a
            # coroutine it becomes a RuntimeError anyway.
            raise RuntimeError(f"the loader of {self._acquisition.called} raised StopIteration") from error
        finally:
            self._works_in_thread = False
            if self._is_abandoned:
                self._session.abandon(self._operation)


def _counted_from(since: float, lock: TransactionLock, function: Callable[[], T]) -> T:
    with lock.counted_from(since):
        return function()


def _undo_result(undo: Callable[[T], object], future: Future[T]) -> None:
    if future.exception() is None:
        undo(future.result())


class _Threads:
    """The threads of one session."""

    def __init__(self, session: Session) -> None:
        # The session does not keep this alive, and this must not keep the session alive.
        self._session = weakref.ref(session)
        self._mutex = new_lock()
        self._watchers: list[Watcher] = []
        self.transactions = ThreadPool(TRANSACTIONS_AT_A_TIME, "mpmm-transaction")
        self.loads = ThreadPool(LOADS_AT_A_TIME, "mpmm-load")

    def watch(self, row: int, deadline: float, answer: Callable[[Outcome], None]) -> None:
        """Have a ticket watched by the first watcher that has room."""
        session = self._session()
        if session is None:
            raise ClosedError("the manager was shut down while a task waited for a model")
        with self._mutex:
            if any(watcher.watch(session, row, deadline, answer) for watcher in self._watchers):
                return
            self._watchers.append(Watcher())
            self._watchers[-1].watch(session, row, deadline, answer)

    def forget(self, row: int) -> None:
        """Stop watching a ticket."""
        with self._mutex:
            for watcher in self._watchers:
                watcher.forget(row)


_threads: weakref.WeakKeyDictionary[Session, _Threads] = weakref.WeakKeyDictionary()
# An RLock, because a signal handler may need it while its own thread has it.
_threads_guard = new_rlock()


def _renew_guard_after_fork() -> None:
    """Give the child a lock that no vanished thread of the parent holds, and forget the parent's threads."""
    global _threads_guard
    _threads_guard = new_rlock()
    _threads.clear()


in_forked_child(_renew_guard_after_fork, ChildStep.LOOP)


def _threads_of(session: Session) -> _Threads:
    with _threads_guard:
        found = _threads.get(session)
        if found is None:
            found = _threads[session] = _Threads(session)
        return found


@dataclass(frozen=True)
class _Watched:
    """A ticket whose state is checked when its signal changes. counted: tells the session that a task waits."""

    session: Session
    row: int
    signal: Signal
    deadline: float
    answer: Callable[[Outcome], None]
    counted: AbstractContextManager[None]
    again: LookAgain


class Watcher:
    """A thread that sleeps until one of many tickets has its answer. The thread exists while there are any."""

    def __init__(self) -> None:
        self._mutex = new_lock()
        self._watched: dict[int, _Watched] = {}
        self._thread: threading.Thread | None = None
        # A futex word of this process alone, which changes with the set of tickets.
        self._bell = ctypes.c_uint64(0)

    def watch(self, session: Session, row: int, deadline: float, answer: Callable[[Outcome], None]) -> bool:
        """Call `answer`, in the thread, with the ticket's state once it is answered, with None at the deadline, or
        with an exception when the session leaves the namespace. Return False if there is no room."""
        with self._mutex:
            if len(self._watched) >= WAITED_FOR_AT_MOST - 1:
                return False
            if self._thread is None or not self._thread.is_alive():
                # It waits for the mutex. If it cannot be started, nothing has been recorded yet.
                thread = threading.Thread(target=self._run, name="mpmm-watcher", daemon=True)
                start_thread(thread)
                self._thread = thread
            stale = self._watched.pop(row, None)
            if stale is not None:
                # It belongs to an abandoned acquire, whose ticket's row is used again.
                stale.counted.__exit__(None, None, None)
            counted = session.waiting(in_block=False)
            counted.__enter__()
            signal = session.namespace.reads.queue.signal(row)
            self._watched[row] = _Watched(session, row, signal, deadline, answer, counted, session.look_again(row))
            self._ring()
        return True

    def forget(self, row: int) -> None:
        """Stop watching a ticket: its `answer` is not called, unless that has begun already."""
        with self._mutex:
            watched = self._watched.pop(row, None)
            self._ring()
        if watched is not None:
            watched.counted.__exit__(None, None, None)

    def _ring(self) -> None:
        self._bell.value += 1
        wake_all(ctypes.addressof(self._bell))

    def _run(self) -> None:
        bell = ctypes.addressof(self._bell)
        while True:
            seen = [(bell, self._bell.value)]
            with self._mutex:
                timeout_s, answers, look_again = self._look(seen)
            _answer(answers)
            _look_again(look_again)
            if not answers and not look_again:
                wait_for_any(seen, timeout_s)
            with self._mutex:
                # If it was rung meanwhile, a ticket has been added that relies on this thread.
                if len(seen) == 1 and not answers and self._bell.value == seen[0][1] and not self._watched:
                    self._thread = None
                    return

    def _look(self, seen: list[tuple[int, int]]) -> tuple[float, list[tuple[_Watched, Outcome]], list[LookAgain]]:
        """Take out the tickets that have an answer, and add to `seen` what to wait for.

        Return how long to wait, the answers, and the tickets whose back-off is over.
        """
        now = time.monotonic()
        timeout_s = LINGER_S if not self._watched else float("inf")
        answers: list[tuple[_Watched, Outcome]] = []
        look_again: list[LookAgain] = []
        for row, watched in self._watched.copy().items():
            outcome, signal = _state(watched, now)
            if signal is None:
                del self._watched[row]
                # The segment is not touched for it any more, so the session may leave.
                watched.counted.__exit__(None, None, None)
                answers.append((watched, outcome))
            else:
                seen.append(signal)
                look_in_s = _look_in_s(watched)
                if look_in_s <= 0:
                    look_again.append(watched.again)
                timeout_s = min(timeout_s, watched.deadline - now, look_in_s)
        return timeout_s, answers, look_again


def _answer(answers: list[tuple[_Watched, Outcome]]) -> None:
    """Answer; a function of its own, so that no variable of the thread keeps a task's block while the thread sleeps."""
    for watched, outcome in answers:
        watched.answer(outcome)


def _look_again(tickets: list[LookAgain]) -> None:
    for ticket in tickets:
        try:
            ticket.look()
        except (ClosedError, ValueError):
            # It counts as waiting, so the segment is still mapped, unless the session gave up waiting for it.
            pass
        except Exception:
            # Trouble with one ticket must not end the thread for all others.
            with contextlib.suppress(Exception):
                _LOG.exception("mpmm: a look at a waiting task's ticket failed")


def _look_in_s(watched: _Watched) -> float:
    try:
        return watched.again.in_s()
    except ValueError:
        # Unmapped meanwhile: the next look at the ticket's state notices.
        return 0.1


def _state(watched: _Watched, now: float) -> tuple[Outcome, tuple[int, int] | None]:
    """Return the outcome of a ticket, or the address to wait on for it, and the value seen there."""
    session = watched.session
    try:
        # Read before the state, so that any change after that ends the sleep at once.
        seen = watched.signal.seen()
        state = session.namespace.reads.queue.state(watched.row)
    except ValueError:
        # Unmapped: the session gave up waiting for this thread.
        return ClosedError("the manager was shut down while a task waited for a model"), None
    if state != Ticket.WAITING:
        return state, None
    if session.closing:
        return ClosedError("the manager was shut down while a task waited for a model"), None
    if now >= watched.deadline:
        return None, None
    return None, (watched.signal.address, seen)
