"""Starting threads where a signal handler may raise, and choosing which signals they take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from mpmm.interpreter.latch import Latch

__all__ = ["kept_from_new_threads", "start_thread"]

# Signals that new threads block, see `kept_from_new_threads`.
_kept: frozenset[int] = frozenset()


class _Started(threading.Event):
    """What `Thread.start` waits for, and the thread sets before it runs.

    The Event that it replaces has a lock that an exception may leave taken. The thread would then never run, and if it
    is not a daemon, the program could not end. Or `Thread.start` would raise a RuntimeError, as if there were no more
    threads to be had.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latch = Latch()

    def is_set(self) -> bool:
        return self._latch.is_set

    def set(self) -> None:
        self._latch.set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._latch.wait(threading.TIMEOUT_MAX if timeout is None else timeout)


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. An exception that a signal handler raises meanwhile is raised unchanged.

    The thread may have been started all the same, or may never run. CPython takes every exception for a failed start
    and removes the thread from a list; a started thread has removed itself already, and CPython raises a KeyError.

    Raises RuntimeError if no thread can be started.
    """
    # Private, but the same in all versions; without it, the interpreter's own Event is waited for.
    if hasattr(thread, "_started"):
        thread._started = _Started()
    try:
        if not _kept:
            thread.start()
            return
        # Read first, because a handler may raise as the call that changes it returns.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, _kept)
            thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    except KeyError as error:
        if error.__context__ is None:
            raise
        raise error.__context__ from None


@contextmanager
def kept_from_new_threads(signals: Collection[int]) -> Iterator[None]:
    """Have threads that `start_thread` starts during the block leave these signals to the thread that waits for them.

    The kernel gives a signal that was sent to the process to any thread that does not block it. For a process with one
    such block at a time.
    """
    global _kept
    before, _kept = _kept, frozenset(signals)
    try:
        yield
    finally:
        _kept = before
