"""Starting threads where a signal handler may raise."""

from __future__ import annotations

import threading

from mpmm.interpreter.latch import Latch

__all__ = ["start_thread"]


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
        thread.start()
    except KeyError as error:
        if error.__context__ is None:
            raise
        raise error.__context__ from None
