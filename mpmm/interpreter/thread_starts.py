"""Starting threads where a signal handler may raise."""

from __future__ import annotations

import threading

__all__ = ["start_thread"]


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. An exception that a signal handler raises meanwhile is raised unchanged.

    The thread may have been started all the same, or may never run. CPython takes every exception for a failed start
    and removes the thread from a list; a started thread has removed itself already, and CPython raises a KeyError.
    """
    try:
        thread.start()
    except KeyError as error:
        if error.__context__ is None:
            raise
        raise error.__context__ from None
