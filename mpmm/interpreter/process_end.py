"""The end of the process: tells its threads that it has begun.

At the end of a process mpmm's exit hooks leave all namespaces. The interpreter stops daemon threads only after that. If
a daemon thread asked for a model in between, it would join a namespace that the process no longer leaves, or it would
print a traceback, because the manager is closed. So it stands still instead, like a daemon thread that waits for a lock
or a queue, but only for a while: an exit handler of the program may wait for a lock that the thread holds.

In a child of `multiprocessing` the exit hooks run before its other threads are joined: these go on as before.
"""

from __future__ import annotations

import threading
import time

from mpmm.interpreter.fork_hooks import ChildStep, call_once_at_exit, in_forked_child

__all__ = ["is_last_to_run", "stand_still_in_daemon", "watch_for_end"]

# Before the hooks that leave namespaces, see `attachment.LEAVES_PRIORITY`.
_PRIORITY = 1000
# Longer than most processes take to end once mpmm has left.
_STAND_STILL_S = 5.0
_has_begun = False


def watch_for_end() -> None:
    """Have the beginning of this process's end noted; cheap when repeated."""
    call_once_at_exit(_note, _PRIORITY)


def stand_still_in_daemon() -> None:
    """Sleep for a while if the process is ending and this is a daemon thread; then mostly the process has ended.

    Hold no lock that an exit hook may need.
    """
    if _has_begun and threading.current_thread().daemon:
        time.sleep(_STAND_STILL_S)


def is_last_to_run() -> bool:
    """Tell whether the process is ending without waiting for this thread, so that no later code could leave again."""
    thread = threading.current_thread()
    return _has_begun and (thread.daemon or thread is threading.main_thread())


def _note() -> None:
    global _has_begun
    _has_begun = True


def _forget() -> None:
    global _has_begun
    _has_begun = False


in_forked_child(_forget, ChildStep.SEGMENT)
