"""What is known of one waiter, for people and for the waiter itself: why it waits, and for how long it will."""

from __future__ import annotations

import math
import time

from mpmm.policy.backoff import back_off_s
from mpmm.policy.reasons import explain
from mpmm.policy.sharing import expected_wait_s, room_in_s, seen_so_far
from mpmm.policy.view import Reason
from mpmm.scheduling.copies import CopiesReader
from mpmm.scheduling.shortcuts import Shortcuts
from mpmm.scheduling.views import Views
from mpmm.shared_state.namespace import Namespace

__all__ = ["Waiters"]


class Waiters:
    """Reads about tickets (rows). Methods need the lock, unless they say otherwise."""

    def __init__(self, namespace: Namespace, copies: CopiesReader, views: Views, shortcuts: Shortcuts) -> None:
        self._tables = namespace.tables
        self._copies = copies
        self._views = views
        self._shortcuts = shortcuts

    def why(self, ticket: int) -> str:
        """Return why a ticket waits, for people."""
        return f"{Reason(self._tables.tickets[ticket].reason).name.lower()}: {self.sentence(ticket)}"

    def sentence(self, ticket: int) -> str:
        """Return why a ticket waits, as a sentence whose subject is its model."""
        found = self._tables.tickets[ticket]
        other = None if found.other is None else self._tables.tag_of(found.other)
        return explain(found.reason, found.need_mb, found.free_mb, found.coming_mb, found.seconds, other, found.on)

    def expected_wait_s(self, ticket: int) -> float:
        """Return in how many seconds a waiter is expected to have its copy, see `policy.sharing`."""
        found, copies, now = self._tables.tickets[ticket], self._copies.read_copies(), time.monotonic_ns()
        model, rank, member = found.model, found.rank, (found.member or 0) + 1
        # All that are loaded: where this model was never held, the mean of the others stands in.
        models = {row: self._views.model_view(row, copies, now) for row in {model, *copies.shared, *copies.owned}}
        before = [one for one in self._shortcuts.waiting() if one.rank < rank]
        ahead = sum(one.model == model and not one.preload for one in before)
        rooms_s = [self._room_in_s(one.row, now) for one in before] if found.reason == Reason.BEHIND else []
        seen = seen_so_far(models.values())
        # The row says how long it was when the plan was made; the back-off has gone on since.
        seconds = self.backs_off_for_s(ticket) if found.reason == Reason.BACKING_OFF else found.seconds
        waited_s = (now - found.enqueued) / 1e9
        room_ahead_s = max(rooms_s, default=0.0)
        return expected_wait_s(models[model], member, ahead, found.reason, seconds, seen, waited_s, room_ahead_s)

    def _room_in_s(self, ticket: int, now: int) -> float:
        found = self._tables.tickets[ticket]
        return room_in_s(found.reason, found.seconds, (now - found.enqueued) / 1e9)

    def backs_off_for_s(self, ticket: int) -> float:
        """Return in how many seconds a waiter's back-off ends, `inf` if it waits for something else; without the lock.

        Nothing else may happen then, so it has to see to it that it is looked at.
        """
        found = self._tables.tickets[ticket]
        if found.reason != Reason.BACKING_OFF:
            return math.inf
        model = self._tables.models[found.model]
        ago_s = (time.monotonic_ns() - model.failed_at) / 1e9
        return max(0.0, back_off_s(model.failures) - ago_s)

    def called_up_at(self, ticket: int) -> int:
        """Return when a waiter was called up last (monotonic, ns), 0 if it was not; without the lock."""
        return self._tables.tickets[ticket].called_up

    def is_model_idle(self, ticket: int) -> bool:
        """Tell whether a copy of the model that a ticket is for is idle; without the lock."""
        return self._tables.models[self._tables.tickets[ticket].model].idle > 0
