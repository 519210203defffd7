"""Starting threads where a signal handler may raise, and choosing which signals they take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

__all__ = ["kept_from_new_threads", "start_thread"]

# Signals that new threads block, see `kept_from_new_threads`.
_kept: frozenset[int] = frozenset()


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. An exception that a signal handler raises meanwhile is raised unchanged.

    The thread may have been started all the same, or may never run. CPython takes every exception for a failed start
    and removes the thread from a list; a started thread has removed itself already, and CPython raises a KeyError.
    """
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
