"""Starting threads where a signal handler may raise."""

from __future__ import annotations

import threading

__all__ = ["start_thread"]


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. What a signal handler raises meanwhile is raised as it is.

    The thread may have been started all the same, or never run. CPython takes every exception for a failed start and
    strikes the thread off a list; if that has been started, it has done so itself, and a KeyError is raised instead.
    """
    try:
        thread.start()
    except KeyError as error:
        if error.__context__ is None:
            raise
        raise error.__context__ from None
