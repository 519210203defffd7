"""When a waiter looks at its own ticket again, although no process has woken it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence

from mpmm.errors import LockTimeoutError
from mpmm.model_manager.deferred import NOW_S
from mpmm.model_manager.tenure import looks_in_s
from mpmm.model_manager.waits import WaitWarning
from mpmm.scheduling import Scheduler
from mpmm.shared_state.namespace import Namespace

__all__ = ["LookAgain"]

# A waiter whose back-off is over checks after this time whether it is its turn, and then at growing intervals.
FIRST_LOOK_AGAIN_S = 0.1
LONGEST_LOOK_AGAIN_S = 30.0


class LookAgain:
    """Looks at a waiter for which no other process may plan in time, because its model backs off, or it was called up.

    The waiter looks when the back-off ends, when the tenure of the process that called it up ends
    (`mpmm.model_manager.tenure`), and when it is time to log that it has waited for long.
    """

    def __init__(self, namespace: Namespace, scheduler: Scheduler, warn_after_s: Sequence[float], ticket: int) -> None:
        self._namespace = namespace
        self._scheduler = scheduler
        self._ticket = ticket
        # The time of the call-up for which it has last looked.
        self._called_up = 0
        self._not_before = 0.0
        self._pause_s = FIRST_LOOK_AGAIN_S
        self._warning = WaitWarning(namespace, scheduler, warn_after_s, ticket)

    @property
    def called_up(self) -> int:
        """The time of the call-up for which it has last looked; 0 if there was none."""
        return self._called_up

    def in_s(self) -> float:
        """Return in how many seconds to look; `inf` if it neither backs off nor was called up, with nothing to log."""
        left_s = self._scheduler.backs_off_for_s(self._ticket)
        looks_for_call_up_in_s = self._looks_in_s(self._scheduler.called_up_at(self._ticket))
        decides_in_s = min(max(left_s, self._not_before - time.monotonic()), looks_for_call_up_in_s)
        return min(decides_in_s, self._warning.in_s())

    def _looks_in_s(self, called_up: int) -> float:
        """Return in how many seconds to look for a call-up at this time; `inf` if it has looked, or there was none."""
        return math.inf if called_up == self._called_up else looks_in_s(called_up)

    def look(self) -> None:
        """Let the policy decide anew. If that changes nothing, others come before this waiter, and it looks later.

        If it is time to log that it waits, do only that.
        """
        if self._warning.in_s() <= 0:
            self._warning.say()
            return
        # Read once, because from here on another process may keep the copy, and call up the waiter again. That call-up
        # needs a look of its own.
        called_up_at = self._scheduler.called_up_at(self._ticket)
        called_up = self._looks_in_s(called_up_at) <= 0
        # If the copy is in use, its release decides about this waiter.
        decided = called_up and not self._scheduler.is_model_idle(self._ticket)
        if not decided:
            with contextlib.suppress(LockTimeoutError), self._namespace.transaction(NOW_S) as t:
                self._scheduler.advance(t)
                decided = True
        if called_up:
            # If the lock was not free, it looks again for the same call-up.
            if decided:
                self._called_up = called_up_at
            return
        self._not_before = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_LOOK_AGAIN_S)
