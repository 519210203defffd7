"""When a waiter looks at its own ticket again, although nobody has woken it."""

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

# A waiter whose back-off is over looks after so long whether it is its turn, and then more and more rarely.
FIRST_LOOK_AGAIN_S = 0.1
LONGEST_LOOK_AGAIN_S = 30.0


class LookAgain:
    """Looks at a waiter that no other process may come to look at: its model backs off, or it was called up.

    It is looked at when the back-off ends, or the tenure of the process that has called it up
    (`mpmm.model_manager.tenure`), and when the log is to say that it has waited for long.
    """

    def __init__(self, namespace: Namespace, scheduler: Scheduler, warn_after_s: Sequence[float], ticket: int) -> None:
        self._namespace = namespace
        self._scheduler = scheduler
        self._ticket = ticket
        # When it was called up, the last time that it has looked for that.
        self._called_up = 0
        self._not_before = 0.0
        self._pause_s = FIRST_LOOK_AGAIN_S
        self._warning = WaitWarning(namespace, scheduler, warn_after_s, ticket)

    @property
    def called_up(self) -> int:
        """When it was called up, the last time that it has looked for that; 0 if it never has."""
        return self._called_up

    def in_s(self) -> float:
        """Return in how many seconds to look; `inf` if it neither backs off nor was called up, and all was said."""
        left_s = self._scheduler.backs_off_for_s(self._ticket)
        decides_in_s = min(max(left_s, self._not_before - time.monotonic()), self._called_up_in_s())
        return min(decides_in_s, self._warning.in_s())

    def _called_up_in_s(self) -> float:
        """Return in how many seconds the tenure for which the waiter was called up is over; `inf` if there is none."""
        called_up = self._scheduler.called_up_at(self._ticket)
        return math.inf if called_up == self._called_up else looks_in_s(called_up)

    def look(self) -> None:
        """Let the policy decide anew. If that changes nothing, the waiter stands behind others, and looks later.

        Or only say that it waits, if it is time for that.
        """
        if self._warning.in_s() <= 0:
            self._warning.say()
            return
        called_up = self._called_up_in_s() <= 0
        # Where the copy is in use, its release will see to this waiter.
        decided = called_up and not self._scheduler.is_model_idle(self._ticket)
        if not decided:
            with contextlib.suppress(LockTimeoutError), self._namespace.transaction(NOW_S) as t:
                self._scheduler.advance(t)
                decided = True
        if called_up:
            # If the lock was not to be had, it looks for that call again.
            if decided:
                self._called_up = self._scheduler.called_up_at(self._ticket)
            return
        self._not_before = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_LOOK_AGAIN_S)
