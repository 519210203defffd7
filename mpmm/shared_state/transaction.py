"""The lock that guards the segment, and transactions that are undone when their process dies.

**Lock.** An in-process mutex, then a kernel file lock on a descriptor that stays open; when the process dies, at any
instruction, the kernel drops the file lock. A blocking `flock` could not be given up after `lock_timeout_seconds`, and
a hundred threads that retry every millisecond leave no processor to the holder. So a process that finds the lock taken
tries a few more times, because the lock is held for microseconds; then it sets `Header.CONTENDED` and sleeps on it. A
process that releases the lock and then sees that word set clears it and wakes one sleeper, which sets it again, because
more may be asleep. The file lock alone decides which process has the lock: if a wake-up is lost because its sender was
killed, the sleeper loses `LONGEST_SLEEP_S`, no more. Of the processes with a compiled core one at a time tries; the
others spin (see `core.py`).

So the lock goes to the process that tries while it is free, which is fast, and mostly fair enough. But when a crowd of
processes wants it at once, on few processors, one of them may try at the wrong moments for seconds. So a process that
has waited for `STARVES_AFTER_S` claims the lock in `Header.STARVING`: until it has the lock, all others stand back,
asleep, and the holder that releases the lock wakes the claimant. One process claims at a time; one that has waited
longer takes the claim over. A claim lapses unless its writer, which may die, repeats it.

If busy processes outnumber processors, a process would often use up its time slice in the middle of a transaction, and
all the others would run into its lock. So a process that meets others at the lock yields its processor after every few
transactions, when it holds nothing.

**Transaction.** Before it overwrites a word, a transaction writes the word's index and old value behind the end of the
undo log, and stores the log's new length. Commit stores length 0. The next process that takes the lock and finds a
length above 0 writes the old values back, last entry first. If it dies meanwhile, the next one repeats that: writing an
old value twice is harmless. So a process that is killed at any store leaves the state before its transaction or the
state after it. (Other processes see the stores of one process in order once the kernel has stopped it; the log follows
SQLite's journal rules: save, overwrite, commit with one small store.)

**An exception is a small death.** A signal handler may raise between any two bytecodes of a thread that lives on, and
garbage collection may run a finalizer there that wants the lock, too. So the mutex is an RLock, whose owner the
interpreter records in the act of taking it, and a transaction records the frame that runs its `with`. A thread that
finds the mutex taken can thus tell a running transaction, whose frame is on its thread's stack, from one that an
exception has left. If the abandoned transaction is the thread's own, the thread takes it over and undoes it like a dead
process's; another thread does so once two looks have found the same (`end_abandoned`), with a new mutex. A finalizer or
signal handler that asks for the lock inside a running transaction of its own thread gets ReentrantCallError. For this
to work, a function that catches an exception from its transaction must not begin another one in the same frame.

**Readers without the lock.** `Header.CHANGE` is odd while a transaction is open. A copy of the segment is consistent if
the counter was the same before and after the copy, and even; or, if it was odd and two successive copies are equal (the
writer is stopped or slow), once the undo log has been rolled back in the copy.

Every store is `segment.words[index] = value`; a crash test replaces `words` by an object that counts the stores and
kills the process at the n-th (`TransactionLock.intercept_stores`).
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
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from mpmm.errors import ClosedError, LockTimeoutError, ReentrantCallError, SegmentCorruptError, TableFullError
from mpmm.interpreter.thread_frames import caller_of, innermost_frame
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
# In transactions. Shorter turns cost throughput, longer ones lengthen the tail.
TURN = 8
# For the compiled core, whose transactions are far shorter. With 16 processes that have a copy each, on 2 processors
# that others use, too, turns of 8 make 21 000 to 28 000 pairs a second, turns of 128 make 31 000 to 43 000, and the
# 99th percentile of an acquire is 5 to 9 ms instead of 10.
CORE_TURN = 128
# For how many turns a process that has met others at the lock expects them; one that is alone never yields.
CROWDED_TURNS = 20
LONGEST_SLEEP_S = 0.01
ASKS_KERNEL_AFTER_S = 0.2
# If 64 processes want the lock for 2 ms each, ten times a second, and eight more keep 2 processors busy, the longest
# wait is 0.4 s, without claims 1.5 s. If all starving processes tried again every 2 ms, it would be 1.6 s: that many
# attempts leave the holder no processor, and the crowd never thins out.
STARVES_AFTER_S = 0.1
STARVING_SLEEP_S = 0.002
# How long a claim holds: longer than its writer sleeps.
CLAIM_NS = 5_000_000
# With 64 processes on 2 processors, each with several busy threads, one thread may have to wait for longer than the
# second or two that a caller allows; it waits for longer than this only behind a stopped process.
PATIENT_S = 30.0
# How long a thread waits at least for the lock, if it was handed its work so long ago that the time-out is over.
LEAST_S = 0.05
# While threads wait for a transaction of their process, one of them checks this often whether an exception has left it.
# A check walks the stacks of all threads: if a thousand threads checked, they would do nothing else.
ABANDONED_LOOK_S = 0.05
# What `repr` shows for a mutex that is taken; nothing else tells its owner.
_OWNER = re.compile(r"^<locked .* owner=(\d+) ")
_DOUBLE = struct.Struct("<d")
_WORD = struct.Struct("<Q")


def float_bits(value: float) -> int:
    """Return the word that holds `value` as an IEEE double."""
    return int(_WORD.unpack(_DOUBLE.pack(value))[0])


def roll_back(words: Any, undo: Table) -> int:
    """Undo the changes in the undo log of `words` and empty it; return the number of words restored.

    words: a live segment, with the lock held, or a private copy. Raises SegmentCorruptError, before anything is
    changed, if this is no log of ours.
    """
    count = int(words[Header.UNDO_COUNT])
    if count > undo.capacity or any(words[undo.base + 2 * entry] >= undo.base for entry in range(count)):
        raise SegmentCorruptError(
            f"the undo log claims {count} entries (limit {undo.capacity}), or one that is outside the tables: another "
            "program has written into the segment",
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


class _WaitBlock(contextlib.AbstractContextManager[None]):
    """A block in which its thread is patient, or whose waits for the lock count from an earlier moment, `since`.

    The lock refers to it weakly, because an exception from a signal handler may leave it without `__exit__`. A
    `BlockVariable` would do, but takes five times as long to read, and each transaction reads this.
    """

    def __init__(self, blocks: dict[int, weakref.ref[_WaitBlock]], since: float = 0.0) -> None:
        self._blocks = blocks
        self.since = since

    def __enter__(self) -> None:
        self._blocks[threading.get_ident()] = weakref.ref(self)

    def __exit__(self, *_: object) -> None:
        self._blocks.pop(threading.get_ident(), None)


def _block_here(blocks: dict[int, weakref.ref[_WaitBlock]]) -> _WaitBlock | None:
    """Return the calling thread's block, if it is in one."""
    found = blocks.get(threading.get_ident())
    return None if found is None else found()


class TransactionLock:
    """The segment's lock, one object per process; it runs one `Transaction` at a time."""

    def __init__(self, segment: Segment, timeout_seconds: float) -> None:
        self.segment = segment
        self.timeout_seconds = timeout_seconds
        self._pid = os.getpid()
        self._file = segment.lock_file()
        # An RLock, because it knows its owner; it is never taken twice by its thread, though.
        self._mutex: Any = new_rlock()
        # How often it has been taken, which tells one transaction of a thread from the next.
        self._takes = 0
        # The frame that runs the `with` of the open transaction.
        self._frame: FrameType | None = None
        # Held while a thread decides whether a mutex was abandoned; and what the last look saw. An RLock, because a
        # signal handler may interrupt the thread that decides.
        self._healing = new_rlock()
        self._suspected: tuple[int, ...] | None = None
        self._next_look = 0.0
        # The transaction that an exception has left may have locked the file, which then is still locked.
        self._may_be_locked = False
        # Calls to make after transactions, by the id of their lists, until they are made; and those of the last look.
        self._calls: dict[int, list[Callable[[], object]]] = {}
        # The lists themselves, because a new list may get the id of one that was freed, and be taken for it.
        self._calls_seen: dict[int, list[Callable[[], object]]] = {}
        # By thread, the blocks that finish work which would otherwise have to be repeated, see `patient_here`.
        self._patient: dict[int, weakref.ref[_WaitBlock]] = {}
        # By thread, the blocks of work that was handed to it earlier, see `counted_from`.
        self._counted: dict[int, weakref.ref[_WaitBlock]] = {}
        self._deadline = math.inf
        # For how many more turns others are expected at the lock, and the transactions done in the current turn.
        self._crowded_turns = 0
        self._turn = 0
        self._transaction = Transaction(self)
        self.words: Any = segment.words
        #: Makes the warm path's transactions under this lock, if it is there; see `core.py`.
        self.core: Core | None = None
        #: Called when a Python transaction begins: wakes the thread that looks for abandoned transactions.
        self.wake_watcher: Callable[[], object] | None = None

    def __call__(self, timeout_s: float | None = None) -> Transaction:
        """Return the transaction to enter by `with`.

        timeout_s: how long to wait for the lock, if that is less than `timeout_seconds`.
        """
        if timeout_s is None or timeout_s >= self.timeout_seconds:
            return self._transaction
        return Transaction(self, max(0.0, timeout_s))

    @property
    def changes(self) -> int:
        """A number that differs after each transaction of any process; without the lock."""
        return int(self.words[Header.CHANGE])

    def set_timeout(self, timeout_seconds: float) -> None:
        """Set how long transactions without a time-out of their own wait for the lock."""
        self.timeout_seconds = self._transaction._timeout_s = timeout_seconds

    def patient_here(self) -> contextlib.AbstractContextManager[None]:
        """Let the calling thread wait for the lock for longer than `timeout_seconds`, unless it gives a time-out.

        For what has been decided or done already, such as an unload, or a load that has succeeded: if this process gave
        up on a crowded host, another one would only have to begin the work again.
        """
        return _WaitBlock(self._patient)

    def counted_from(self, since: float) -> contextlib.AbstractContextManager[None]:
        """Let the calling thread's waits for the lock count from `since` (`time.monotonic()`).

        For work that was handed to the thread then. Its caller waits for it as if it waited for the lock itself, and is
        to have its answer `timeout_seconds` after that, although the thread did other work first.
        """
        return _WaitBlock(self._counted, since)

    def time_out(self, timeout_s: float) -> LockTimeoutError:
        """Return the error for a caller that has waited for so long while other processes had the lock."""
        return self._timed_out(self._holder(timeout_s), timeout_s)

    @contextlib.contextmanager
    def give_up_at(self, deadline: float) -> Iterator[None]:
        """Let no transaction in this block wait for the lock beyond `deadline` (`time.monotonic()`).

        For a caller that has to answer in time, while no other thread knows this lock.
        """
        self._deadline = deadline
        try:
            yield
        finally:
            self._deadline = math.inf

    def _wait_here(self, began: float, timeout_s: float) -> tuple[float, float]:
        """Return until when the calling thread really waits, if it asked for `timeout_s` from `began` on, and the
        time-out that ends the wait."""
        if timeout_s == self.timeout_seconds and _block_here(self._patient) is not None:
            timeout_s = max(timeout_s, PATIENT_S)
        until = began + timeout_s
        counted = _block_here(self._counted)
        if counted is not None:
            ends = max(counted.since + self.timeout_seconds, began + LEAST_S)
            if ends < until:
                until, timeout_s = ends, self.timeout_seconds
        left_s = max(0.0, self._deadline - began)
        return (until, timeout_s) if until <= began + left_s else (began + left_s, left_s)

    def held_by_this_thread(self) -> bool:
        """Tell whether the calling thread is inside a transaction."""
        return bool(self._mutex._is_owned())

    def is_busy_here(self) -> bool:
        """Tell whether the calling thread is inside a transaction that no exception has left."""
        return self.held_by_this_thread() and self._is_at_work(sys._getframe())

    def acquire(self, timeout_s: float, frame: FrameType) -> None:
        """Take mutex and file lock; undo the transaction that a dead process, or an exception, left.

        frame: the one that runs the transaction's `with`. Raises LockTimeoutError, ClosedError, ReentrantCallError if
        this thread is inside a transaction.
        """
        began: float | None = None
        mutex = self._mutex
        # acquire() without a time-out is fast, and almost always succeeds.
        if mutex._is_owned() or not mutex.acquire(blocking=False):
            began = time.monotonic()
            self._wait_for_mutex(began, timeout_s, frame)
        try:
            self._frame = frame
            self._takes += 1
            if self._file.fd < 0:
                raise ClosedError(f"this process has left the namespace of {self.segment.path}")
            # The thread that it wakes resets it to None.
            wake_watcher = self.wake_watcher
            if wake_watcher is not None:
                wake_watcher()
            # If this process still has the file locked, the starving one waits for it: it must not stand back.
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
        """Release file lock and mutex."""
        turn_is_over, file_is_locked = False, True
        try:
            if self._file.fd >= 0:
                words = self.segment.words
                self._file.give_up_quickly()
                file_is_locked = False
                # Read after the unlock: a process that goes to sleep sets the word, then tries once more.
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
                # An exception came first. Once the mutex is free, no thread would look for a locked file.
                self._file.give_up_quickly()
            self._frame = None
            self._mutex.release()
        if turn_is_over:
            os.sched_yield()

    def end_abandoned(self) -> bool:
        """End a transaction that an exception has left in another thread; return whether there was one.

        The next transaction of this process undoes it, and releases the file lock, which this process holds until then.

        It takes two calls, because only two equal findings prove that both saw the same transaction.
        """
        with self._healing:
            found = self._abandoned()
            suspected, self._suspected = self._suspected, found
            if found is None or found != suspected:
                return False
            self._suspected = None
            self._frame = None
            self._may_be_locked = True
            # Only its owner can release the old one, and that thread no longer knows of it.
            self._mutex = new_rlock()
            return True

    def finish_calls(self) -> None:
        """Make the calls after transactions that an exception prevented, and that were missing at the last look, too.

        The exception may have come before the commit, so that the transaction was undone. That is harmless: such calls
        are wake-ups, log lines, and calls that look for themselves.
        """
        if self._calls or self._calls_seen:
            left = dict(self._calls)
            # Not those of a transaction that has yet to be committed: what they look for is not there yet, and if an
            # exception came after the commit, nobody would make them again. Read before the frame.
            after = self._transaction.after
            if self._frame is not None:
                left.pop(id(after), None)
            for key in left.keys() & self._calls_seen.keys():
                _call_all(self._calls.pop(key, ()))
            self._calls_seen = left

    @property
    def may_be_abandoned(self) -> bool:
        """Tell whether a transaction is open, or calls after one are due, so that the next look has something to do."""
        return self._frame is not None or bool(self._calls) or _OWNER.match(repr(self._mutex)) is not None

    def _abandoned(self) -> tuple[int, ...] | None:
        """Return the identity of another thread's transaction (see `_seen`) if no frame of that thread runs it."""
        seen = self._seen()
        if seen is None or seen[0] == threading.get_ident():
            return None
        frame = innermost_frame(seen[0])
        if self._is_at_work(frame) or self._seen() != seen:
            return None
        return seen

    def _seen(self) -> tuple[int, ...] | None:
        """Return the mutex's owner and how often it has been taken; None if it is free, or the lock is closed.

        The segment cannot tell that: an exception may have left only the mutex taken, and not the file locked, so that
        other processes continue there.
        """
        owner = _OWNER.match(repr(self._mutex))
        if owner is None or self._file.fd < 0:
            return None
        return int(owner[1]), self._takes

    def _is_at_work(self, frame: FrameType | None) -> bool:
        """Tell whether a thread, now in `frame`, is inside the open transaction, or enters or leaves one."""
        open_in = self._frame
        while frame is not None:
            if frame is open_in or frame.f_code in _AT_WORK:
                return True
            frame = caller_of(frame)
        return False

    def _take_over(self, frame: FrameType) -> bool:
        """Take over the transaction that this thread has left; return False if another thread has ended it.

        Raises ReentrantCallError.
        """
        with self._healing:
            if not self._mutex._is_owned():
                return False
            if self._is_at_work(frame):
                raise ReentrantCallError(
                    f"a finalizer or signal handler asked for the lock {self.segment.path} in the middle of a "
                    "transaction of its own thread; it may only call what gives something back (release_model, unpin, "
                    "Lease.release, shutdown): let it set a flag, or leave the rest to a thread"
                )
            self._suspected = None
            self._may_be_locked = True
            return True

    def _wait_for_mutex(self, began: float, timeout_s: float, frame: FrameType) -> None:
        """Take the mutex. Raises LockTimeoutError, ReentrantCallError."""
        until, timeout_s = self._wait_here(began, timeout_s)
        while True:
            if self._mutex._is_owned() and self._take_over(frame):
                return
            left = until - time.monotonic()
            # Read again each time, because it may have been replaced.
            if self._mutex.acquire(timeout=min(max(0.0, left), ABANDONED_LOOK_S)):
                return
            if left <= 0:
                # The thread that has the mutex may wait for another process.
                raise self._timed_out(self._holder(timeout_s, otherwise=self._pid), timeout_s)
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + ABANDONED_LOOK_S
                self.end_abandoned()

    def close(self) -> None:
        """Close the descriptor; later transactions raise ClosedError. Not inside a transaction."""
        if not self._mutex._is_owned():
            # An exception may have left a transaction of another thread.
            while not self._mutex.acquire(timeout=ABANDONED_LOOK_S):
                self.end_abandoned()
            self._mutex.release()
        with self._mutex:
            self._give_core_up()
            self._file.close()

    def forget_after_fork(self) -> None:
        """In a forked child: close the parent's descriptor, whichever thread held the mutex at the fork."""
        self._give_core_up()
        self._file.forget_after_fork()
        self._pid = os.getpid()
        self._mutex = new_rlock()
        self._healing = new_rlock()
        self._frame = None
        self._may_be_locked = False
        self.wake_watcher = None

    def intercept_stores(self, wrap: Callable[[Any], Any]) -> None:
        """Send every store through `wrap(words)`; for crash tests, which kill the process at the n-th store."""
        self._give_core_up()
        self.words = wrap(self.segment.words)
        self._transaction = Transaction(self)

    def _give_core_up(self) -> None:
        core, self.core = self.core, None
        if core is not None:
            core.close()

    def _wait_for_file_lock(self, began: float, timeout_s: float) -> None:
        """Take the file lock, at most `timeout_s` after `began`. Raises LockTimeoutError."""
        words = self.segment.words
        until, timeout_s = self._wait_here(began, timeout_s)
        began_ns = int(began * 1e9)
        for _ in range(QUICK_TRIES if not words[Header.STARVING] else 0):
            if self._file.try_exclusive():
                return
        while True:
            now = time.monotonic()
            now_ns, left = int(now * 1e9), until - now
            lapses = words[Header.STARVING]
            # No claimant writes a claim that lasts longer than CLAIM_NS.
            claimed = now_ns < lapses <= now_ns + CLAIM_NS
            starves = now - began >= STARVES_AFTER_S and not (claimed and words[Header.STARVING_SINCE] < began_ns)
            if starves:
                words[Header.STARVING_SINCE] = began_ns
                words[Header.STARVING] = lapses = now_ns + CLAIM_NS
            else:
                # Before the attempt: a release between attempt and sleep changes the word, so this process stays awake.
                words[Header.CONTENDED] = 1
                if lapses and not claimed:
                    words[Header.STARVING] = 0
            if (starves or not claimed or left <= 0) and self._file.try_exclusive():
                break
            if left <= 0:
                raise self.time_out(timeout_s)
            if starves:
                self._sleep(Header.STARVING, lapses, min(left, STARVING_SLEEP_S))
            else:
                self._sleep(Header.CONTENDED, 1, min(left, LONGEST_SLEEP_S))
        if starves:
            # The next process that starves writes its own claim.
            words[Header.STARVING] = 0

    def _sleep(self, word: int, seen: int, seconds: float) -> None:
        wait_for_change(lambda: int(self.segment.words[word]), self.segment.address + 8 * word, seen, seconds)

    def _holder(self, waited_s: float, otherwise: int | None = None) -> int:
        """Return the pid of the process that holds the file lock, after a wait of this length.

        otherwise: what to return if the kernel is not asked, or does not tell; None for the last holder's pid.
        """
        # The word names an earlier holder if the present one was stopped before it could write its own pid. Not after
        # the short waits of calls that try again, because to ask the kernel takes up to a millisecond.
        holders = self._file.holders() if waited_s >= ASKS_KERNEL_AFTER_S else []
        if holders:
            return holders[0]
        return int(self.segment.words[Header.LOCK_HOLDER]) if otherwise is None else otherwise

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
            # A single store, so it needs no undo log entry.
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
        # `time.monotonic_ns()` when the lock was taken: one time for all changes of the transaction.
        self.now = 0
        # Calls to make once the lock is free again: wake-ups, log lines. A rollback drops them.
        self.after: list[Callable[[], object]] = []

    def __enter__(self) -> Transaction:
        self._lock.acquire(self._timeout_s, sys._getframe(1))
        try:
            self._begin()
        except BaseException:
            # `with` calls __exit__ only after __enter__ has returned. The next holder undoes what began here.
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
            # An exception from a signal handler between the two stores: commit or undo, as the log says.
            roll_back(words, self._undo)
            raise

    @property
    def is_long(self) -> bool:
        """Tell whether it has overwritten so much that the remaining work belongs in another transaction."""
        return self._count >= min(STEP_WORDS, self._undo_capacity // 4)

    def set(self, index: int, value: int) -> None:
        """Store a word after logging its old value. Raises ValueError outside 0 … 2**64-1, TableFullError (undo)."""
        self.set_all(((index, value),))

    def set_all(self, changes: Sequence[tuple[int, int]]) -> None:
        """Store several (word, value) pairs, no word twice; see `set`.

        One step of the log covers all of them: 0.25 us a word, where single calls of `set` take 0.6 us.
        """
        words = self.words
        count = self._count
        after = count + len(changes)
        if after > self._undo_capacity:
            raise TableFullError(
                f"the undo log has room for {self._undo_capacity} words, and the transaction needs more; "
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
        """Add to a word. Raises ValueError if that would make it negative."""
        self.set(index, self.words[index] + amount)

    def count_up(self, index: int) -> None:
        """Add 1 to a word for good: a rollback leaves it, so that the word never has the same value twice.

        For words that other processes, without the lock, compare with the value that they saw last.
        """
        self.words[index] = self.words[index] + 1

    def set_float(self, index: int, value: float) -> None:
        """Store a float in a word."""
        self.set(index, float_bits(value))

    def add_float(self, index: int, amount: float) -> None:
        """Add to a word that holds a float."""
        self.set_float(index, self._lock.segment.floats[index] + amount)

    def set_text(self, index: int, text: bytes) -> None:
        """Store a text field; the caller has checked that it fits."""
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
        """Append to the event ring; `model` and `instance` are references, `ticket` is the ticket's number plus one."""
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

        ahead: how many rows were already written this way; the change of the last row makes all of them events.
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
    """Make the calls that follow a transaction. Raises the first exception after all calls were made."""
    failed: Exception | None = None
    for call in calls:
        try:
            call()
        except Exception as error:
            # For example a program's own log handler. The wake-ups after it must still be made.
            failed = failed or error
    try:
        if failed is not None:
            raise failed
    finally:
        # Its traceback has this frame, so they would keep each other, and all callers.
        del failed


_AT_WORK = frozenset(
    function.__code__
    for function in (TransactionLock.acquire, TransactionLock.release, Transaction.__enter__, Transaction.__exit__)
)
