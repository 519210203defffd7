"""What the parts of a conductor share: the plan of the run, its schedule, and what has happened so far."""

from __future__ import annotations

import collections
import random
import time
from collections.abc import Callable
from pathlib import Path

from stressing.checks import History, Violations
from stressing.models import Plan
from stressing.namespace import WatchedNamespace

__all__ = ["Run", "Schedule"]


class Schedule:
    """Actions and their times, for a process without threads."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._due: list[tuple[float, Callable[[], object]]] = []

    def at(self, moment: float, action: Callable[[], object]) -> None:
        """Do something once `time.monotonic()` has reached `moment`."""
        self._due.append((moment, action))

    def repeat(self, rate: float, action: Callable[[], object]) -> None:
        """Do something at random moments, on average `rate` times a second."""
        if rate <= 0:
            return

        def act() -> None:
            action()
            self.repeat(rate, action)

        self.at(time.monotonic() + self._rng.expovariate(rate), act)

    def do_due(self, now: float) -> None:
        """Do what is due; actions that this schedules wait for the next call."""
        due = [action for moment, action in self._due if moment <= now]
        self._due = [entry for entry in self._due if entry[0] > now]
        for action in due:
            action()

    def clear(self) -> None:
        """Drop all scheduled actions."""
        self._due.clear()


class Run:
    """One run of the stress test.

    All random choices use `rng`. counts: what workers have done, and removals.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rng = random.Random(plan.seed)
        self.schedule = Schedule(self.rng)
        self.namespace = WatchedNamespace(plan.namespace, Path(plan.folder, "r"))
        self.history = History()
        self.violations = Violations()
        self.counts: collections.Counter[str] = collections.Counter()
