"""Facts about one waiter, for people and for the waiter itself: why it waits, and for how long it will."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable

from mpmm.policy.backoff import back_off_s
from mpmm.policy.behind import Before, Obstacle, in_the_way, obstacle
from mpmm.policy.reasons import explain, explain_behind, time_left_s
from mpmm.policy.sharing import expected_wait_s, room_in_s, seen_so_far
from mpmm.policy.view import Reason
from mpmm.scheduling.copies import CopiesReader
from mpmm.scheduling.shortcuts import Shortcuts
from mpmm.scheduling.views import Views
from mpmm.shared_state.layout import device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.reads.queue import Waiter
from mpmm.shared_state.rows import TicketRow

__all__ = ["Waiters"]


class Waiters:
    """Reads about tickets (rows). Methods need the lock, unless they say otherwise."""

    def __init__(self, namespace: Namespace, copies: CopiesReader, views: Views, shortcuts: Shortcuts) -> None:
        self._tables = namespace.tables
        self._devices = namespace.segment.layout.devices
        self._queue = namespace.reads.queue
        self._models = namespace.reads.models
        self._copies = copies
        self._views = views
        self._shortcuts = shortcuts

    def why(self, ticket: int) -> str:
        """Return why a ticket waits, for people."""
        return f"{Reason(self._tables.tickets[ticket].reason).name.lower()}: {self.sentence(ticket)}"

    def sentence(self, ticket: int) -> str:
        """Return why a ticket waits now, as a sentence whose subject is its model."""
        found = self._tables.tickets[ticket]
        if found.reason == Reason.BEHIND:
            return explain_behind(self._obstacle(ticket))
        other = None if found.other is None else self._tables.shown(found.other)
        seconds = self._time_left_s(ticket)
        return explain(found.reason, found.need_mb, found.free_mb, found.coming_mb, seconds, other, found.on)

    def _time_left_s(self, ticket: int) -> float:
        """Return what is left of the time in a ticket's reason, `inf` once that has passed."""
        found = self._tables.tickets[ticket]
        if found.reason == Reason.BACKING_OFF:
            return self.backs_off_for_s(ticket)
        told_s = (time.monotonic_ns() - self._queue.told_at(ticket)) / 1e9
        return time_left_s(found.reason, found.seconds, told_s)

    def _obstacle(self, ticket: int) -> Obstacle | None:
        """Return what holds up a ticket that was told to wait behind others."""
        tables, found = self._tables, self._tables.tickets[ticket]
        before = sorted((one for one in self._shortcuts.waiting() if _place(one) < _place(found)), key=_place)
        devices = tables.used_rows(self._devices)
        alone = {row: copy for row in devices if (copy := tables.devices[row].isolated) is not None}
        return obstacle(
            devices,
            device_rows(found.loadable_on),
            found.span,
            self._models.is_lease(found.model),
            {row: tables.shown(tables.instances[copy].model) for row, copy in alone.items()},
            (
                Before(tables.shown(one.model), one.reason, tuple(tables.tickets[one.row].on))
                for _, one in in_the_way(before, lambda one: one.reason)
            ),
        )

    def expected_wait_s(self, ticket: int) -> float:
        """Return in how many seconds a waiter is expected to have its copy, see `policy.sharing`."""
        return self.expected_waits_s([ticket])[ticket]

    def expected_waits_s(self, tickets: Iterable[int]) -> dict[int, float]:
        """Return `expected_wait_s` of several tickets, in one pass over the queue."""
        found = {row: self._tables.tickets[row] for row in tickets}
        copies, now = self._copies.read_copies(), time.monotonic_ns()
        # All models that are loaded: for a model that was never held, the mean of the others is used.
        rows = {*(ticket.model for ticket in found.values()), *copies.shared, *copies.owned}
        models = {row: self._views.model_view(row, copies, now) for row in rows}
        seen = seen_so_far(models.values())
        queue = sorted(self._shortcuts.waiting(), key=_place)
        expected: dict[int, float] = {}
        before, ahead, room_ahead_s = 0, Counter[int](), 0.0
        for row, ticket in sorted(found.items(), key=lambda one: _place(one[1])):
            while before < len(queue) and _place(queue[before]) < _place(ticket):
                waiter = queue[before]
                before += 1
                ahead[waiter.model] += not waiter.preload
                # Usually all but the first wait behind it, which tells nothing about time.
                if waiter.reason != Reason.BEHIND:
                    room_ahead_s = max(room_ahead_s, self._room_in_s(waiter.row, now))
            # The row has the time that was left when the plan was made; part of the back-off has passed since.
            seconds = self.backs_off_for_s(row) if ticket.reason == Reason.BACKING_OFF else ticket.seconds
            waited_s = (now - ticket.enqueued) / 1e9
            others = (ahead[ticket.model], ticket.reason, seconds, seen, waited_s, room_ahead_s if before else waited_s)
            expected[row] = expected_wait_s(models[ticket.model], (ticket.member or 0) + 1, *others)
        return expected

    def _room_in_s(self, ticket: int, now: int) -> float:
        found = self._tables.tickets[ticket]
        seconds = self.backs_off_for_s(ticket) if found.reason == Reason.BACKING_OFF else found.seconds
        return room_in_s(found.reason, seconds, (now - found.enqueued) / 1e9)

    def backs_off_for_s(self, ticket: int) -> float:
        """Return in how many seconds a waiter's back-off ends, `inf` if it waits for something else; takes no lock.

        No other process may make a plan then, so the waiter itself has to.
        """
        found = self._tables.tickets[ticket]
        if found.reason != Reason.BACKING_OFF:
            return math.inf
        model = self._tables.models[found.model]
        ago_s = (time.monotonic_ns() - model.failed_at) / 1e9
        return max(0.0, back_off_s(model.failures) - ago_s)

    def called_up_at(self, ticket: int) -> int:
        """Return when a waiter was last called up (monotonic, ns), 0 if it was not; takes no lock."""
        return self._tables.tickets[ticket].called_up

    def is_model_idle(self, ticket: int) -> bool:
        """Tell whether a copy of the model that a ticket is for is idle; takes no lock."""
        return self._tables.models[self._tables.tickets[ticket].model].idle > 0


def _place(waiter: Waiter | TicketRow) -> tuple[int, int]:
    """Return a key that sorts waiters in the order of the queue."""
    return waiter.priority, waiter.rank
