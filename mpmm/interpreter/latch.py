"""An event that happens once, and that an exception from a signal handler cannot leave locked.

`threading.Event` and `threading.Condition` take their lock in Python. If a handler raises right after they have taken
it, the lock is never released, and every other thread that sets the event, or waits for it, hangs for ever.
"""

from __future__ import annotations

import contextlib

from mpmm.interpreter.thread_locks import new_lock

__all__ = ["Latch"]


class Latch:
    """An event that any thread or signal handler may set, and that one thread waits for.

    is_set: whether it has happened.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._shut = new_lock()
        self._shut.acquire()

    def set(self) -> None:
        """Let the thread continue that waits, or will wait. A second call does nothing.

        A waiter whose latch was set by a call that an exception has ended may continue only after its time limit.
        """
        self.is_set = True
        # It is open if it was set before.
        with contextlib.suppress(RuntimeError):
            self._shut.release()

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds; return whether the event has happened."""
        if not self.is_set:
            self._shut.acquire(timeout=max(0.0, timeout_s))
        return self.is_set
