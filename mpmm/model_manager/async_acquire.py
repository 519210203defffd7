"""Waiting for models in an event loop, without a thread for each task that waits.

    in the loop's thread                     in threads of this module
    ─────────────────────────────────────────────────────────────────────────────────
    an idle copy and nobody waits: take it
    else                                     queue (transactions)
    the task sleeps                          one thread sleeps on the tickets of 127 tasks (`Watcher`)
                                             act on the answer (transactions)
    told to load                             run the loader (loads)
    at the end of the block: give it back

Transactions take microseconds, but the lock may be held up, so the loop's thread never waits for it for longer than
`LOOP_PATIENCE_S`; what needs longer goes to a thread. Transactions have threads of their own, and so have loads: in a
pool that others use, those who wait for a model could take all threads from the one who is going to release it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mpmm.errors import ClosedError, LockTimeoutError, MpmmError
from mpmm.fork_hooks import ChildStep, in_forked_child
from mpmm.model_manager.look_again import LookAgain
from mpmm.model_manager.manager import AnswerUndone, ModelManager
from mpmm.model_manager.operations import Copy
from mpmm.model_manager.refusals import giving_up_in_time, timed_out
from mpmm.model_manager.request import AcquireOptions, PlacementRequest, read_options
from mpmm.model_manager.session import Worker
from mpmm.multi_process_shared.main_import import refuse_while_importing_main
from mpmm.policy.out_of_memory import is_out_of_memory
from mpmm.shared_state.futex import WAITED_FOR_AT_MOST, wait_for_any, wake_all
from mpmm.shared_state.layout import Header, Model, Ticket
from mpmm.shared_state.tables import encode_text

__all__ = ["hold_in_loop"]

T = TypeVar("T")
Outcome = int | BaseException | None
LOOP_PATIENCE_S = 0.002
# Memory bounds the loads that are allowed at a time; this, the threads.
LOADS_AT_A_TIME = 64
TRANSACTIONS_AT_A_TIME = 2
# A watcher's thread that has nothing to watch stays for so long.
LINGER_S = 1.0


@asynccontextmanager
async def hold_in_loop(
    manager: ModelManager, tag: str, loader: Callable[[], Any], options: AcquireOptions
) -> AsyncIterator[Any]:
    """Hold a copy for the length of an `async with` block; see `ModelManager.model_async`."""
    refuse_while_importing_main("acquire the model", tag)
    worker = manager._connected_in_time(tag)
    threads = _threads_of(worker)
    # As long as this object is there, somebody answers for what it has in hand: see `mpmm.model_manager.operations`.
    acquire = _Acquire(manager, worker, threads, tag, read_options(options, worker.samples))
    instance = await acquire.run(loader)
    try:
        yield instance
    except BaseException as error:
        if is_out_of_memory(error) and not worker.namespace.is_inherited:
            with contextlib.suppress(MpmmError):
                made = threads.loads.submit(worker.out_of_memory.make_room_after_use, tag)
                await asyncio.shield(asyncio.wrap_future(made))
        raise
    finally:
        # A child that was forked inside the block comes by here, too, but the copy is held by its parent.
        if not worker.namespace.is_inherited:
            await _release(manager, worker, threads, tag, instance)
        acquire.end()


async def _release(manager: ModelManager, worker: Worker, threads: _Threads, tag: str, instance: Any) -> None:
    # Who runs alone is measured at the release, which may take the source of memory figures a while.
    if worker.namespace.is_usable and not worker.namespace.segment.words[Header.ISOLATED]:
        with contextlib.suppress(LockTimeoutError):
            manager._release(tag, instance, LOOP_PATIENCE_S)
            return
    # Shielded, because a task that is cancelled now must give it back nevertheless.
    released = threads.transactions.submit(manager.release_model, tag, instance)
    await asyncio.shield(asyncio.wrap_future(released))


class _Acquire:
    """One acquire of one task: `ModelManager._get`, with the waiting done by a watcher."""

    def __init__(
        self, manager: ModelManager, worker: Worker, threads: _Threads, tag: str, request: PlacementRequest
    ) -> None:
        self._manager = manager
        self._worker = worker
        self._threads = threads
        self._tag = tag
        self._request = request
        self._encoded = encode_text(tag, Model.TAG_BYTES, "model tag")
        self._operation = worker.begin_for(self)

    def end(self) -> None:
        """Say that nothing is in hand any more."""
        self._worker.end(self._operation)

    async def run(self, loader: Callable[[], Any]) -> Any:
        """Return a copy that this process holds now. Raises what `acquire_model` raises."""
        manager, worker, tag = self._manager, self._worker, self._tag
        deadline = time.monotonic() + manager._attachment.settings.wait_timeout_seconds
        if self._request.keep_alive:
            keep = functools.partial(manager._keep_alive, worker, tag, self._request.keep_alive)
            await self._in_thread(self._threads.transactions, keep)
        while True:
            if worker.scheduler.may_have_to_wait(tag):
                # Also where no copy is kept for this process, so that it learns whether it comes back at once.
                worker.held.comes_back(tag)
            got: Any = None if self._request.usable_on else worker.held.take_quickly(tag, self._operation)
            with contextlib.suppress(LockTimeoutError):
                got = got or manager._take_idle(worker, self._operation, tag, LOOP_PATIENCE_S, self._request.usable_on)
            if got is None:
                got = await self._queue(deadline)
            if not isinstance(got, Copy):
                load = functools.partial(
                    manager._load_somehow, worker, self._operation, tag, got, loader, self._request
                )
                give_up = functools.partial(manager._give_up_load, worker, got)
                return await self._in_thread(self._threads.loads, load, self._undo_load, give_up)
            if worker.held.handle_is_alive(got):
                return got.value
            discard = functools.partial(manager._discard, worker, self._operation, got)
            await self._in_thread(self._threads.transactions, discard)

    async def _queue(self, deadline: float) -> Any:
        """Wait in the queue; return a copy that this process holds now, or the permission to load one."""
        manager, worker, tag = self._manager, self._worker, self._tag
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()
        outcomes: list[Outcome] = []

        def answer(outcome: Outcome) -> None:
            outcomes.append(outcome)
            # A loop that is closed has nobody who waits any more. No function of ours is called back, because a loop
            # goes on after an exception in a callback, and with that the answer would be lost.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(answered.set)

        began = time.monotonic()
        enter = functools.partial(self._enter, deadline, answer)
        row = await self._in_thread(self._threads.transactions, enter, self._leave)
        if isinstance(row, Copy):
            return row
        while True:
            try:
                await answered.wait()
            except asyncio.CancelledError:
                self._threads.transactions.submit(self._leave, row)
                raise
            outcome = outcomes.pop()
            if outcome is None:
                leave = functools.partial(manager._leave_queue, worker, self._operation, row, timed_out=True)
                left = await self._in_thread(self._threads.transactions, leave)
                raise timed_out(tag, time.monotonic() - began, *left)
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome == Ticket.GRANTED and (copy := worker.held.take_granted(row, tag, self._operation)) is not None:
                return copy
            act = functools.partial(self._act, row, deadline)
            leave_again = functools.partial(self._leave, row)
            undo = functools.partial(self._undo_act, row)
            got = await self._in_thread(self._threads.transactions, act, undo, leave_again)
            if got is not None:
                return got
            # Whoever had answered was killed before that was certain.
            answered.clear()
            self._threads.watch(row, deadline, answer)

    # ---- in threads ----------------------------------------------------------------------------------------

    def _enter(self, deadline: float, answer: Callable[[Outcome], None]) -> Any:
        """Take an idle copy after all, and return it, or queue and have the ticket (row) watched."""
        manager, worker, tag = self._manager, self._worker, self._tag
        left = deadline - time.monotonic()
        # Counted as waiting from before it has a ticket until it is watched, which is counted, too.
        with giving_up_in_time(worker, tag), worker.waiting():
            copy = manager._take_idle(worker, self._operation, tag, left, self._request.usable_on)
            if copy is not None:
                return copy
            worker.figures.ensure_fresh_to_queue(left)
            row = manager._enqueue(worker, self._operation, tag, self._encoded, deadline, 0, self._request)
            worker.unloads.unload_in_thread()
            self._threads.watch(row, deadline, answer)
            return row

    def _act(self, row: int, deadline: float) -> Any:
        """Act on a ticket's answer; return None if it has none after all."""
        manager, worker, tag = self._manager, self._worker, self._tag
        with contextlib.suppress(AnswerUndone), giving_up_in_time(worker, tag), worker.waiting():
            return manager._act_on(worker, self._operation, tag, row, deadline, self._request)
        return None

    def _leave(self, row: Any) -> None:
        if isinstance(row, Copy):
            self._undo_answer(row)
            return
        self._threads.forget(row)
        self._manager._leave_queue(self._worker, self._operation, row)

    def _undo_act(self, row: int, got: Any) -> None:
        if got is None:
            self._leave(row)
        else:
            self._undo_answer(got)

    def _undo_answer(self, got: Any) -> None:
        if isinstance(got, Copy):
            self._undo_load(got.value)
        else:
            self._manager._give_up_load(self._worker, got)

    def _undo_load(self, value: Any) -> None:
        with contextlib.suppress(MpmmError):
            self._manager.release_model(self._tag, value)

    async def _in_thread(
        self,
        pool: ThreadPoolExecutor,
        function: Callable[[], T],
        undo: Callable[[T], object] = lambda result: None,
        never: Callable[[], object] = lambda: None,
    ) -> T:
        """Return what a function returns in a thread.

        undo: called with its result if the task is cancelled before it comes. never: called if it was not even begun.
        """
        future = pool.submit(function)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancelled():
                self._threads.transactions.submit(never)
            else:
                future.add_done_callback(functools.partial(_undo_result, undo))
            raise


def _undo_result(undo: Callable[[T], object], future: Future[T]) -> None:
    if future.exception() is None:
        undo(future.result())


class _Threads:
    """The threads of one worker."""

    def __init__(self, worker: Worker) -> None:
        # The worker keeps none of this, and this must not keep the worker.
        self._worker = weakref.ref(worker)
        self._mutex = threading.Lock()
        self._watchers: list[Watcher] = []
        self.transactions = ThreadPoolExecutor(TRANSACTIONS_AT_A_TIME, "mpmm-transaction")
        self.loads = ThreadPoolExecutor(LOADS_AT_A_TIME, "mpmm-load")

    def watch(self, row: int, deadline: float, answer: Callable[[Outcome], None]) -> None:
        """Have a ticket watched by the first watcher that has room."""
        worker = self._worker()
        if worker is None:
            raise ClosedError("the manager was shut down while a task waited for a model")
        with self._mutex:
            if any(watcher.watch(worker, row, deadline, answer) for watcher in self._watchers):
                return
            self._watchers.append(Watcher())
            self._watchers[-1].watch(worker, row, deadline, answer)

    def forget(self, row: int) -> None:
        """Have a ticket watched no more."""
        with self._mutex:
            for watcher in self._watchers:
                watcher.forget(row)


_threads: weakref.WeakKeyDictionary[Worker, _Threads] = weakref.WeakKeyDictionary()
# An RLock, because a signal handler may come by while its own thread has it.
_threads_guard = threading.RLock()


def _renew_guard_after_fork() -> None:
    """Give the child a lock that no vanished thread of the parent holds; the parent's threads are not the child's."""
    global _threads_guard
    _threads_guard = threading.RLock()
    _threads.clear()


in_forked_child(_renew_guard_after_fork, ChildStep.LOOP)


def _threads_of(worker: Worker) -> _Threads:
    with _threads_guard:
        found = _threads.get(worker)
        if found is None:
            found = _threads[worker] = _Threads(worker)
        return found


@dataclass(frozen=True)
class _Watched:
    """A ticket whose state is looked at when its signal changes. counted: tells the worker that somebody waits."""

    worker: Worker
    state: int
    signal: int
    deadline: float
    answer: Callable[[Outcome], None]
    counted: AbstractContextManager[None]
    again: LookAgain


class Watcher:
    """A thread that sleeps until one of many tickets has its answer. The thread exists while there are any."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._watched: dict[int, _Watched] = {}
        self._thread: threading.Thread | None = None
        # A futex word of this process alone: the set of tickets has changed.
        self._bell = ctypes.c_uint64(0)

    def watch(self, worker: Worker, row: int, deadline: float, answer: Callable[[Outcome], None]) -> bool:
        """Call `answer`, in the thread, with the ticket's state once it has one; with None at the deadline, with an
        exception when the worker leaves the namespace. Return False if there is no room."""
        at = worker.namespace.tables.ticket(row)
        with self._mutex:
            if len(self._watched) >= WAITED_FOR_AT_MOST - 1:
                return False
            counted = worker.waiting(in_block=False)
            counted.__enter__()
            signal = at + Ticket.SIGNAL
            self._watched[row] = _Watched(
                worker, at + Ticket.STATE, signal, deadline, answer, counted, worker.look_again(row)
            )
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mpmm-watcher", daemon=True)
                self._thread.start()
            self._ring()
        return True

    def forget(self, row: int) -> None:
        """Call no `answer` for a ticket, unless that has begun already."""
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
            for watched, outcome in answers:
                watched.answer(outcome)
            for again in look_again:
                # Counted as waiting, so the worker is there; if it has no patience, it is unmapped.
                with contextlib.suppress(ClosedError, ValueError):
                    again.look()
            if not answers and not look_again:
                wait_for_any(seen, timeout_s)
            with self._mutex:
                # Rung meanwhile: somebody has come, and found this thread still there.
                if len(seen) == 1 and not answers and self._bell.value == seen[0][1] and not self._watched:
                    self._thread = None
                    return

    def _look(self, seen: list[tuple[int, int]]) -> tuple[float, list[tuple[_Watched, Outcome]], list[LookAgain]]:
        """Take out the tickets that have an answer, and return these; add to `seen` what to wait for, and how long.

        Return as well the tickets whose back-off is over.
        """
        now = time.monotonic()
        timeout_s = LINGER_S if not self._watched else float("inf")
        answers: list[tuple[_Watched, Outcome]] = []
        look_again: list[LookAgain] = []
        for row, watched in list(self._watched.items()):
            outcome, signal = _state(watched, now)
            if signal is None:
                del self._watched[row]
                # The segment is not touched for it any more, so the worker may leave.
                watched.counted.__exit__(None, None, None)
                answers.append((watched, outcome))
            else:
                seen.append(signal)
                look_in_s = _look_in_s(watched)
                if look_in_s <= 0:
                    look_again.append(watched.again)
                timeout_s = min(timeout_s, watched.deadline - now, look_in_s)
        return timeout_s, answers, look_again


def _look_in_s(watched: _Watched) -> float:
    try:
        return watched.again.in_s()
    except ValueError:
        # Unmapped meanwhile, which the next look at its state finds.
        return 0.1


def _state(watched: _Watched, now: float) -> tuple[Outcome, tuple[int, int] | None]:
    """Return the outcome of a ticket, or where to wait for it, and what stands there."""
    worker = watched.worker
    try:
        segment = worker.namespace.segment
        # Read before the state: what changes afterwards ends the sleep at once.
        seen = segment.words[watched.signal]
        state = int(segment.words[watched.state])
    except ValueError:
        # Unmapped, as its process had not the patience to wait for us.
        return ClosedError("the manager was shut down while a task waited for a model"), None
    if state != Ticket.WAITING:
        return state, None
    if worker.closing:
        return ClosedError("the manager was shut down while a task waited for a model"), None
    if now >= watched.deadline:
        return None, None
    return None, (segment.address + 8 * watched.signal, seen)
