"""The lock that guards the segment, and transactions that are undone when their process dies.

**Lock.** An in-process mutex, then a kernel file lock on a descriptor that stays open; the kernel drops the
latter when its process dies, at whatever instruction. A blocking `flock` could not be given up after
`lock_timeout_seconds`, and a hundred threads that try again every millisecond leave no processor to the holder. So
who finds the lock taken tries a few times more, as it is held for microseconds; then sets `Header.CONTENDED` and sleeps
on it. Who lets go of the lock and then sees it set clears it and wakes one sleeper; who was woken sets it again, as
more may sleep. The file lock alone decides who is in: a wake-up that is lost because its sender was killed costs its
receiver `LONGEST_SLEEP_S`, no more. Of processes with a compiled core one at a time tries; the others spin (see
`core.py`).

So the lock goes to whoever comes by when it is free, which is quick, and mostly fair enough. But when all processes of
a crowd want it at once, and there are few processors, one of them may come by at the wrong moment for seconds. So who
has waited for `STARVES_AFTER_S` claims the lock in `Header.STARVING`: until it is in, everybody else stands back,
asleep, and who lets go of the lock wakes the claimant. One claims at a time, and who has waited longer takes over.
A claim lapses by itself unless it is repeated, for its writer may die.

Where there are more busy processes than processors, one would use up its time slice in the middle of a transaction as
often as not, and all the others would run into its lock. So a process that meets others at the lock offers its
processor after every few transactions, when it holds nothing.

**Transaction.** Before a word is overwritten, its index and old value are written behind the undo log's end,
and the log's length is stored; only then is the word changed. Commit stores length 0. Whoever takes the lock
next and finds a length above 0 writes the old values back, last entry first. That may itself be cut short and
repeated: writing an old value twice is harmless. So a process that is killed at any store leaves the state
before its transaction or the state after it. (Stores of one process are seen by others in order once the
kernel has stopped it; the log is in the order of SQLite's journal rules: save, overwrite, commit with one
small store.)

**An exception is a small death.** A signal handler may raise between any two bytecodes of a thread that lives on, and
garbage collection may run a finalizer there that wants the lock, too. So the mutex is one that knows its owner, noted
by the interpreter in the very act of taking it, and a transaction notes the frame that runs its `with`. Whoever finds
the mutex taken can thus tell a transaction that runs, whose frame is on its thread's stack, from one that an exception
has left. If it is the thread's own, it takes over what was left, and undoes it like a dead process's; another thread
does so once two looks have found the same (`end_abandoned`), with a new mutex. What asks from within a running
transaction of its own thread, a finalizer or signal handler, gets ReentrantCallError. For this to be right a function
that catches what leaves its transaction does not begin another one in the same frame.

**Readers without the lock.** `Header.CHANGE` is odd while a transaction is open. A copy of the segment is
consistent if the counter was the same before and after the copy, and even; or odd, and two copies in turn are
equal (the writer is stopped or slow), once the undo log in the copy has been rolled back in the copy.

Every store goes through `segment.words[index] = value`; a crash test replaces `words` by an object that counts
the stores and kills the process at the n-th (`TransactionLock.intercept_stores`).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from mpmm.errors import ClosedError, LockTimeoutError, ReentrantCallError, SegmentCorruptError, TableFullError
from mpmm.interpreter.thread_frames import current_frames
from mpmm.interpreter.thread_locks import new_rlock
from mpmm.shared_state.events import Cause
from mpmm.shared_state.futex import wait_for_change, wake_one
from mpmm.shared_state.layout import STEP_WORDS, Event, Header, Table
from mpmm.shared_state.segment import Segment

if TYPE_CHECKING:
    from mpmm.shared_state._core import Core

__all__ = ["CORE_TURN", "CROWDED_TURNS", "Transaction", "TransactionLock", "float_bits", "roll_back"]

# Measured with 16 processes on 2 processors that do nothing else: without the quick tries a third of the throughput is
# lost to sleeping and waking; without the turns the 99th percentile of an acquire and release is 12 ms instead of 3.
QUICK_TRIES = 8
# In transactions. Shorter ones cost throughput, longer ones the tail.
TURN = 8
# Of the compiled core, whose transactions are shorter by far. With 16 processes that have a copy each, on 2 processors
# that others use, too: turns of 8 make 21 000 to 28 000 pairs a second, turns of 128 make 31 000 to 43 000, and the
# 99th percentile of an acquire is 5 to 9 ms instead of 10.
CORE_TURN = 128
# Who has met others at the lock expects them for so many turns; a process that is alone never gives up its processor.
CROWDED_TURNS = 20
LONGEST_SLEEP_S = 0.01
# 64 processes that want the lock for 2 ms each ten times a second, with eight more that keep 2 processors busy: the
# longest wait is 0.4 s, without claims 1.5 s. Had everybody who starves tried again every 2 ms, it would be 1.6 s:
# so many attempts leave the holder no processor, and once there it stays like that.
STARVES_AFTER_S = 0.1
STARVING_SLEEP_S = 0.002
# How long a claim holds: longer than its writer sleeps.
CLAIM_NS = 5_000_000
# With 64 processes on 2 processors, each with several threads at work, one thread may have to wait for longer than the
# second or two that a caller grants; for longer than this only behind a process that is stopped.
PATIENT_S = 30.0
# While threads wait for another one of their process, one of them looks so often whether that has been left by an
# exception. Each look goes through all threads: if a thousand took a look each, nothing else would be done.
ABANDONED_LOOK_S = 0.05
# What `repr` says of a mutex that is taken; there is no other way to learn whose it is.
_OWNER = re.compile(r"^<locked .* owner=(\d+) ")
_DOUBLE = struct.Struct("<d")
_WORD = struct.Struct("<Q")


def float_bits(value: float) -> int:
    """Return the word that holds `value` as an IEEE double."""
    return int(_WORD.unpack(_DOUBLE.pack(value))[0])


def roll_back(words: Any, undo: Table) -> int:
    """Undo what the log of `words` describes and empty it; return the number of words restored.

    `words` may be a live segment (then the lock is held) or a private copy. Raises SegmentCorruptError, before
    anything is changed, when this is no log of ours.
    """
    count = int(words[Header.UNDO_COUNT])
    if count > undo.capacity or any(words[undo.base + 2 * entry] >= undo.base for entry in range(count)):
        raise SegmentCorruptError(
            f"the undo log claims {count} entries of at most {undo.capacity}, or leads outside of the tables: "
            "something else has written into the segment",
            name="undo log",
        )
    for entry in range(count - 1, -1, -1):
        at = undo.base + 2 * entry
        words[words[at]] = words[at + 1]
    if count:
        words[Header.UNDO_COUNT] = 0
    if words[Header.CHANGE] & 1:
        words[Header.CHANGE] = (words[Header.CHANGE] + 1) % 2**64
    return count


class TransactionLock:
    """The segment's lock, one object a process; hands out its one `Transaction` at a time."""

    def __init__(self, segment: Segment, timeout_seconds: float) -> None:
        self.segment = segment
        self.timeout_seconds = timeout_seconds
        self._pid = os.getpid()
        self._file = segment.lock_file()
        # An RLock, because it knows its owner; it is taken once at a time nevertheless.
        self._mutex: Any = new_rlock()
        # How often it has been taken, which tells one transaction of a thread from the next.
        self._takes = 0
        # The frame that runs the `with` of the transaction that is open.
        self._frame: FrameType | None = None
        # Who decides that a mutex was abandoned, and what was seen at the last look. An RLock, because a signal handler
        # may come by while its own thread decides.
        self._healing = new_rlock()
        self._suspected: tuple[int, ...] | None = None
        self._next_look = 0.0
        # The transaction that an exception has left may have locked the file, and nobody has let go of it since.
        self._may_be_locked = False
        # Calls to make after transactions, by the identity of their lists, until they were made; and those seen before.
        self._calls: dict[int, list[Callable[[], object]]] = {}
        # The lists themselves, or a new one might come to lie where one was that is gone, and be taken for it.
        self._calls_seen: dict[int, list[Callable[[], object]]] = {}
        # Threads that finish what would have to be done again: see `patient_here`.
        self._patient: set[int] = set()
        self._deadline = math.inf
        # For so many turns others are expected at the lock, and so many transactions of this one are over.
        self._crowded_turns = 0
        self._turn = 0
        self._transaction = Transaction(self)
        self.words: Any = segment.words
        #: Makes transactions of the warm path under this lock, where it can; see `core.py`.
        self.core: Core | None = None
        #: Called when a transaction of Python begins: wakes who watches for those that an exception has left.
        self.wake_watcher: Callable[[], object] | None = None

    def __call__(self, timeout_s: float | None = None) -> Transaction:
        """Return the transaction to be entered by `with`.

        timeout_s: gives up the lock after so long, if that is less than `timeout_seconds`.
        """
        if timeout_s is None or timeout_s >= self.timeout_seconds:
            return self._transaction
        return Transaction(self, max(0.0, timeout_s))

    @property
    def changes(self) -> int:
        """A number that is another one after each transaction, of whatever process; without the lock."""
        return int(self.words[Header.CHANGE])

    def set_timeout(self, timeout_seconds: float) -> None:
        """Let transactions that name no time-out of their own give up the lock after so long."""
        self.timeout_seconds = self._transaction._timeout_s = timeout_seconds

    @contextlib.contextmanager
    def patient_here(self) -> Iterator[None]:
        """Let the calling thread wait for the lock for longer than `timeout_seconds`, where it names no time-out.

        For what has been decided or done already, as an unload, or a load that has succeeded: giving up on a crowded
        host would only leave the work to a process that begins it again.
        """
        ident = threading.get_ident()
        self._patient.add(ident)
        try:
            yield
        finally:
            self._patient.discard(ident)

    @contextlib.contextmanager
    def give_up_at(self, deadline: float) -> Iterator[None]:
        """Let no transaction wait for the lock beyond `deadline` (`time.monotonic()`), however many there are.

        For who has to answer in time, as long as no other thread has this lock.
        """
        self._deadline = deadline
        try:
            yield
        finally:
            self._deadline = math.inf

    def _timeout_here(self, began: float, timeout_s: float) -> float:
        """Return for how long the calling thread waits that was to wait for `timeout_s` from `began` on."""
        if timeout_s == self.timeout_seconds and threading.get_ident() in self._patient:
            timeout_s = max(timeout_s, PATIENT_S)
        return min(timeout_s, max(0.0, self._deadline - began))

    def held_by_this_thread(self) -> bool:
        """Tell whether the calling thread is inside a transaction."""
        return bool(self._mutex._is_owned())

    def is_busy_here(self) -> bool:
        """Tell whether the calling thread is in the middle of a transaction, and not one that an exception has left."""
        return self.held_by_this_thread() and self._is_at_work(sys._getframe())

    def acquire(self, timeout_s: float, frame: FrameType) -> None:
        """Take mutex and file lock; undo what a dead process, or an exception, left.

        frame: it runs the `with` of the transaction. Raises LockTimeoutError, ClosedError, ReentrantCallError when this
        thread is inside a transaction.
        """
        began: float | None = None
        mutex = self._mutex
        # acquire() without a time-out is the fast case, and by far the most common.
        if mutex._is_owned() or not mutex.acquire(blocking=False):
            began = time.monotonic()
            self._wait_for_mutex(began, timeout_s, frame)
        try:
            self._frame = frame
            self._takes += 1
            if self._file.fd < 0:
                raise ClosedError(f"this process has left the namespace of {self.segment.path}")
            # The thread that is woken takes it back.
            wake_watcher = self.wake_watcher
            if wake_watcher is not None:
                wake_watcher()
            # Who starves waits for this very process if that has the file locked: it must not stand back.
            stands_back = self.segment.words[Header.STARVING] and not self._may_be_locked
            if stands_back or not self._file.take_quickly():
                self._crowded_turns = CROWDED_TURNS
                self._wait_for_file_lock(time.monotonic() if began is None else began, timeout_s)
            self._may_be_locked = False
            words = self.words
            words[Header.LOCK_HOLDER] = self._pid
            words[Header.LOCK_TAKEN] = time.monotonic_ns()
            if words[Header.CHANGE] & 1 or words[Header.UNDO_COUNT]:
                self._recover()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of file lock and mutex."""
        turn_is_over, file_is_locked = False, True
        try:
            if self._file.fd >= 0:
                words = self.segment.words
                self._file.give_up_quickly()
                file_is_locked = False
                # Read after that: who goes to sleep sets it, and then tries once more.
                if words[Header.STARVING]:
                    wake_one(self.segment.address + 8 * Header.STARVING)
                elif words[Header.CONTENDED]:
                    words[Header.CONTENDED] = 0
                    wake_one(self.segment.address + 8 * Header.CONTENDED)
                if self._crowded_turns:
                    self._turn += 1
                    if self._turn >= TURN:
                        self._turn = 0
                        self._crowded_turns -= 1
                        turn_is_over = True
        finally:
            if file_is_locked and self._file.fd >= 0:
                # An exception has come first. Nobody would look for the lock of a file whose mutex is free.
                self._file.give_up_quickly()
            self._frame = None
            self._mutex.release()
        if turn_is_over:
            os.sched_yield()

    def end_abandoned(self) -> bool:
        """End a transaction that an exception has left in another thread; return whether there was one.

        The next one of this process undoes it, and gives up the file lock, which this process has until then.

        That takes two calls: only if both find the same is it certain that it was no other transaction of the thread.
        """
        with self._healing:
            found = self._abandoned()
            suspected, self._suspected = self._suspected, found
            if found is None or found != suspected:
                return False
            self._suspected = None
            self._frame = None
            self._may_be_locked = True
            # The old one can be given up by its owner alone, which does not know of it any more.
            self._mutex = new_rlock()
            return True

    def finish_calls(self) -> None:
        """Make the calls after transactions that an exception has kept from being made, if any since the last call.

        The exception may have come before the commit, so that the transaction was undone: such calls are wake-ups, log
        lines, and what looks for itself.
        """
        if self._calls or self._calls_seen:
            left = dict(self._calls)
            for key in left.keys() & self._calls_seen.keys():
                _call_all(self._calls.pop(key, ()))
            self._calls_seen = left

    @property
    def may_be_abandoned(self) -> bool:
        """Tell whether a transaction is open, or calls after one are to be made: the next look has something to do."""
        return self._frame is not None or bool(self._calls) or _OWNER.match(repr(self._mutex)) is not None

    def _abandoned(self) -> tuple[int, ...] | None:
        """Return what tells the transaction of another thread from others if no frame of that thread is at it."""
        seen = self._seen()
        if seen is None or seen[0] == threading.get_ident():
            return None
        frame = current_frames().get(seen[0])
        if self._is_at_work(frame) or self._seen() != seen:
            return None
        return seen

    def _seen(self) -> tuple[int, ...] | None:
        """Return whose the mutex is, and which time it has been taken; None if it is free, or given up.

        Nothing of that is in the segment: an exception may have left the mutex alone, without the file locked, and
        then other processes go on there.
        """
        owner = _OWNER.match(repr(self._mutex))
        if owner is None or self._file.fd < 0:
            return None
        return int(owner[1]), self._takes

    def _is_at_work(self, frame: FrameType | None) -> bool:
        """Tell whether a thread, at `frame`, is inside the transaction that is open, or at its beginning or end."""
        open_in = self._frame
        while frame is not None:
            if frame is open_in or frame.f_code in _AT_WORK:
                return True
            frame = frame.f_back
        return False

    def _take_over(self, frame: FrameType) -> bool:
        """Take over what this thread has left; return False if others have ended it. Raises ReentrantCallError."""
        with self._healing:
            if not self._mutex._is_owned():
                return False
            if self._is_at_work(frame):
                raise ReentrantCallError(
                    f"a finalizer or signal handler asked for the lock {self.segment.path} in the middle of a "
                    "transaction of its own thread; only what gives something back may be called there "
                    "(release_model, unpin, Lease.release, shutdown): let it set a flag, or leave the rest to a thread"
                )
            self._suspected = None
            self._may_be_locked = True
            return True

    def _wait_for_mutex(self, began: float, timeout_s: float, frame: FrameType) -> None:
        """Take the mutex. Raises LockTimeoutError, ReentrantCallError."""
        timeout_s = self._timeout_here(began, timeout_s)
        while True:
            if self._mutex._is_owned() and self._take_over(frame):
                return
            left = began + timeout_s - time.monotonic()
            # Read anew each time, as it may have been replaced.
            if self._mutex.acquire(timeout=min(max(0.0, left), ABANDONED_LOOK_S)):
                return
            if left <= 0:
                raise self._timed_out(self._pid, timeout_s)
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + ABANDONED_LOOK_S
                self.end_abandoned()

    def close(self) -> None:
        """Close the descriptor; later transactions raise ClosedError. Not inside a transaction."""
        if not self._mutex._is_owned():
            # Another thread's may have been left by an exception.
            while not self._mutex.acquire(timeout=ABANDONED_LOOK_S):
                self.end_abandoned()
            self._mutex.release()
        with self._mutex:
            self._give_core_up()
            self._file.close()

    def forget_after_fork(self) -> None:
        """In a forked child: give up the parent's descriptor, whoever held the mutex at the fork."""
        self._give_core_up()
        self._file.forget_after_fork()
        self._pid = os.getpid()
        self._mutex = new_rlock()
        self._healing = new_rlock()
        self._frame = None
        self._may_be_locked = False
        self.wake_watcher = None

    def intercept_stores(self, wrap: Callable[[Any], Any]) -> None:
        """Send every store through `wrap(words)`; for crash tests, which kill the process at the n-th."""
        self._give_core_up()
        self.words = wrap(self.segment.words)
        self._transaction = Transaction(self)

    def _give_core_up(self) -> None:
        core, self.core = self.core, None
        if core is not None:
            core.close()

    def _wait_for_file_lock(self, began: float, timeout_s: float) -> None:
        """Take the file lock, `timeout_s` after `began` at the latest. Raises LockTimeoutError."""
        words = self.segment.words
        timeout_s = self._timeout_here(began, timeout_s)
        began_ns = int(began * 1e9)
        for _ in range(QUICK_TRIES if not words[Header.STARVING] else 0):
            if self._file.try_exclusive():
                return
        while True:
            now = time.monotonic()
            now_ns, left = int(now * 1e9), began + timeout_s - now
            lapses = words[Header.STARVING]
            # A claim that reaches further than any was never written by a claimant.
            claimed = now_ns < lapses <= now_ns + CLAIM_NS
            starves = now - began >= STARVES_AFTER_S and not (claimed and words[Header.STARVING_SINCE] < began_ns)
            if starves:
                words[Header.STARVING_SINCE] = began_ns
                words[Header.STARVING] = lapses = now_ns + CLAIM_NS
            else:
                # Before the attempt: who lets go of the lock between that and the sleep changes it, so nobody sleeps.
                words[Header.CONTENDED] = 1
                if lapses and not claimed:
                    words[Header.STARVING] = 0
            if (starves or not claimed or left <= 0) and self._file.try_exclusive():
                break
            if left <= 0:
                raise self._timed_out(int(words[Header.LOCK_HOLDER]), timeout_s)
            if starves:
                self._sleep(Header.STARVING, lapses, min(left, STARVING_SLEEP_S))
            else:
                self._sleep(Header.CONTENDED, 1, min(left, LONGEST_SLEEP_S))
        if starves:
            # Whose turn is next says so again.
            words[Header.STARVING] = 0

    def _sleep(self, word: int, seen: int, seconds: float) -> None:
        wait_for_change(lambda: int(self.segment.words[word]), self.segment.address + 8 * word, seen, seconds)

    def _timed_out(self, pid: int, timeout_s: float) -> LockTimeoutError:
        return LockTimeoutError(
            f"the lock {self.segment.path} was not free within {timeout_s:g} s; process {pid} holds it "
            "(is it stopped?); lock_timeout_seconds sets the limit",
            path=str(self.segment.path),
            timeout_seconds=timeout_s,
            holder_pid=pid,
        )

    def _recover(self) -> None:
        words = self.words
        if roll_back(words, self.segment.layout.undo):
            # One whole store, so it needs no undo of its own.
            words[Header.ROLLBACKS] = words[Header.ROLLBACKS] + 1


class Transaction:
    """All changes between `with lock() as t:` and its end, or none of them."""

    __slots__ = ("_count", "_lock", "_timeout_s", "_undo", "_undo_base", "_undo_capacity", "after", "now", "words")

    def __init__(self, lock: TransactionLock, timeout_s: float | None = None) -> None:
        self._lock = lock
        self._timeout_s = lock.timeout_seconds if timeout_s is None else timeout_s
        self._undo = lock.segment.layout.undo
        self._undo_base = self._undo.base
        self._undo_capacity = self._undo.capacity
        self._count = 0
        # `time.monotonic_ns()` when the lock was taken: one moment for all that the transaction changes.
        self.now = 0
        # Calls to make once the lock is free again: wake-ups, log lines. Dropped by a rollback.
        self.after: list[Callable[[], object]] = []

    def __enter__(self) -> Transaction:
        self._lock.acquire(self._timeout_s, sys._getframe(1))
        try:
            self._begin()
        except BaseException:
            # `with` calls __exit__ only after __enter__ has returned. What was begun here the next holder ends.
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lock, after = self._lock, self.after
        try:
            if after and kind is None:
                lock._calls[id(after)] = after
            self._end(kind is None)
        finally:
            lock.release()
        if after and kind is None:
            _call_all(after)
            lock._calls.pop(id(after), None)

    def _begin(self) -> None:
        self.words = words = self._lock.words
        self.now = words[Header.LOCK_TAKEN]
        self._count = 0
        self.after = []
        words[Header.CHANGE] = words[Header.CHANGE] + 1

    def _end(self, committed: bool) -> None:
        words = self.words
        if not committed:
            roll_back(words, self._undo)
            return
        try:
            if self._count:
                words[Header.UNDO_COUNT] = 0
            words[Header.CHANGE] = words[Header.CHANGE] + 1
        except BaseException:
            # An exception from a signal handler between the two stores: finish whichever way the log says.
            roll_back(words, self._undo)
            raise

    @property
    def is_long(self) -> bool:
        """Tell whether it has overwritten so much that what is left to do belongs into another transaction."""
        return self._count >= min(STEP_WORDS, self._undo_capacity // 4)

    def set(self, index: int, value: int) -> None:
        """Store a word, its old value logged. Raises ValueError outside 0 … 2**64-1, TableFullError (undo)."""
        self.set_all(((index, value),))

    def set_all(self, changes: Sequence[tuple[int, int]]) -> None:
        """Store several (word, value) pairs, no word twice; see `set`.

        One step of the log for all of them: 0.25 us a word where single calls of `set` take 0.6 us.
        """
        words = self.words
        count = self._count
        after = count + len(changes)
        if after > self._undo_capacity:
            raise TableFullError(
                f"the undo log has room for {self._undo_capacity} words and the transaction needs more; "
                "create the namespace with a larger Capacities.undo",
                table="undo",
                capacity=self._undo_capacity,
                setting="Capacities.undo",
            )
        at = self._undo_base + count + count
        for index, _ in changes:
            words[at] = index
            words[at + 1] = words[index]
            at += 2
        self._count = after
        words[Header.UNDO_COUNT] = after
        for index, value in changes:
            words[index] = value

    def add(self, index: int, amount: int) -> None:
        """Add to a word. Raises ValueError when that would make it negative."""
        self.set(index, self.words[index] + amount)

    def count_up(self, index: int) -> None:
        """Add 1 to a word for good: a rollback leaves it, so that the word never has one value twice.

        For words that others compare without the lock with what they saw last.
        """
        self.words[index] = self.words[index] + 1

    def set_float(self, index: int, value: float) -> None:
        """Store a float in a word."""
        self.set(index, float_bits(value))

    def add_float(self, index: int, amount: float) -> None:
        """Add to a word that holds a float."""
        self.set_float(index, self._lock.segment.floats[index] + amount)

    def set_text(self, index: int, text: bytes) -> None:
        """Store a text field; the caller has checked its length against the field's."""
        self.set(index, len(text))
        for offset in range(0, len(text), 8):
            index += 1
            self.set(index, int.from_bytes(text[offset : offset + 8], "little"))

    def event(
        self,
        kind: int,
        model: int = 0,
        instance: int = 0,
        ticket: int = 0,
        value: float = 0.0,
        cause: Cause | None = None,
    ) -> None:
        """Append to the event ring; `model` and `instance` are references, `ticket` is a number plus one."""
        self.set_all((self.next_event(kind, model, instance, ticket, value, cause),))

    def next_event(
        self,
        kind: int,
        model: int = 0,
        instance: int = 0,
        ticket: int = 0,
        value: float = 0.0,
        cause: Cause | None = None,
        ahead: int = 0,
    ) -> tuple[int, int]:
        """Write the next row of the event ring; return the change for `set_all` that makes it an event.

        ahead: so many rows were written before in the same way; the last one's change makes events of them all.
        """
        words = self.words
        sequence: int = words[Header.EVENTS] + 1 + ahead
        table = self._lock.segment.layout.events
        at = table.base + (sequence - 1) % table.capacity * Event.WORDS
        words[at + Event.SEQUENCE] = sequence
        words[at + Event.TIME] = self.now
        words[at + Event.KIND] = kind
        words[at + Event.PID] = words[Header.LOCK_HOLDER]
        words[at + Event.MODEL] = model
        words[at + Event.INSTANCE] = instance
        words[at + Event.TICKET] = ticket
        words[at + Event.VALUE] = float_bits(value) if value else 0
        if cause is not None:
            words[at + Event.KIND] = kind | cause.reason + 1 << 8
            words[at + Event.NEED_MB] = float_bits(cause.need_mb)
            words[at + Event.FREE_MB] = float_bits(cause.free_mb)
            words[at + Event.COMING_MB] = float_bits(cause.coming_mb)
            words[at + Event.SECONDS] = float_bits(cause.seconds)
            words[at + Event.OTHER] = cause.other
            words[at + Event.ON] = cause.on
        return Header.EVENTS, sequence


def _call_all(calls: Iterable[Callable[[], object]]) -> None:
    """Make the calls that follow a transaction. Raises the first exception, but not before all of them were made."""
    failed: Exception | None = None
    for call in calls:
        try:
            call()
        except Exception as error:
            # A program's own log handler, say. The wake-ups behind it are to be made nevertheless.
            failed = failed or error
    if failed is not None:
        raise failed


_AT_WORK = frozenset(
    function.__code__
    for function in (TransactionLock.acquire, TransactionLock.release, Transaction.__enter__, Transaction.__exit__)
)
