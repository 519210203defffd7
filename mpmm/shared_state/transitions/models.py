"""Model rows: one for each tag, or each lease, with its counters. `estimates` stores how much memory it takes."""

from __future__ import annotations

import math

import numpy as np

from mpmm.errors import TableFullError
from mpmm.shared_state.layout import Header, Model, Ticket
from mpmm.shared_state.transaction import Transaction, float_bits
from mpmm.shared_state.transitions.part import Part
from mpmm.text.display_names import display_name

__all__ = ["NAMES_KEPT", "Models"]

# How many ended leases keep their names, for events about them, before the first row is reused. No more, because each
# row makes every search of the table longer.
NAMES_KEPT = 16
# Counts of the rows, other than tickets, that refer to a model.
_REFERENCES = [Model.LOADED, Model.LOADING, Model.UNLOADING, Model.SUSPENDED, Model.PINS]


class Models(Part):
    """The transitions of model rows."""

    def claim(self, t: Transaction, tag: str, encoded: bytes) -> int:
        """Return the row of a tag, made if need be; if the table is full, the longest unused tag loses its row.

        Raises TableFullError if every row has instances, waiters or pins; `Scheduler.make_room_for_model` changes that.
        """
        row = self._tables.model_row(tag)
        if row is None:
            row = self.take_row(t, encoded)
            # After the tag: a search only compares the tags of rows in this state.
            t.set(self._tables.model(row) + Model.STATE, Model.MODEL)
        name = display_name(tag).encode()
        # Written only if it has changed: usually a tag is claimed again and again with the same name.
        if name and self._tables.text(self._tables.model(row) + Model.NAME) != name:
            t.set_text(self._tables.model(row) + Model.NAME, name)
        return row

    def take_row(self, t: Transaction, encoded: bytes) -> int:
        """Return a row that is empty except for its tag; the caller sets its state. Raises TableFullError."""
        try:
            row = self._free_row(t, encoded)
        except TableFullError:
            # A tag without copies keeps its row for its estimate, which is lost here.
            row = self._oldest_unused()
            if row < 0:
                raise
        at = self._tables.model(row)
        named_alike = self._tables.text(at + Model.TAG) == encoded
        before = int(self._segment.words[at + Model.EVENTS_BEFORE if named_alike else Header.EVENTS])
        # A reused row still has the counters and means of its last tag.
        for word in range(Model.STATE, Model.TAG):
            t.set(at + word, 0)
        # Processes remember the rows of tags; the generation tells them that this one is another tag's now.
        t.set(at + Model.GENERATION, self._next_generation(t))
        t.set_float(at + Model.ESTIMATE_MB, math.nan)
        t.set(at + Model.USED_AT, t.now)
        # Events refer to models by row: those until now mean the row's previous tag.
        t.set(at + Model.EVENTS_BEFORE, before)
        t.set_text(at + Model.TAG, encoded)
        # Otherwise the last tag's name would be shown for this one.
        t.set_text(at + Model.NAME, b"")
        return row

    def _free_row(self, t: Transaction, encoded: bytes) -> int:
        """Return a free row, chosen so that events keep the names of ended leases. Raises TableFullError."""
        table = self._layout.models
        rows = self._tables.view(table)
        free = np.flatnonzero(rows[:, Model.STATE] == Model.FREE)
        for row in free:
            if self._tables.text(self._tables.model(int(row)) + Model.TAG) == encoded:
                return int(row)
        if len(free) < NAMES_KEPT and len(rows) < table.capacity:
            self._grow(t, table, len(rows))
            return len(rows)
        # Without a free row this raises.
        return int(free[np.argmin(rows[free, Model.USED_AT])]) if len(free) else self._take_row(t, table)

    def _oldest_unused(self) -> int:
        """Return the row of the longest unused model to which nothing refers, -1 if there is none."""
        rows, tickets = self._tables.view(self._layout.models), self._tables.view(self._layout.tickets)
        free = (rows[:, Model.STATE] == Model.MODEL) & ~rows[:, _REFERENCES].any(axis=1)
        # Not by WAITING, which leaves out the tickets whose waiters have yet to read their answers.
        free[tickets[tickets[:, Ticket.STATE] != Ticket.FREE, Ticket.MODEL].astype(np.intp)] = False
        unused = np.flatnonzero(free)
        return int(unused[np.argmin(rows[unused, Model.USED_AT])]) if len(unused) else -1

    def keep_alive(self, t: Transaction, row: int, word: int) -> None:
        """Set how long idle copies of a model are kept, see `Model.KEEP_ALIVE`."""
        t.set(self._tables.model(row) + Model.KEEP_ALIVE, word)

    def set_users(self, t: Transaction, row: int, users: int) -> None:
        """Set how many may use a copy of a model at a time, for copies loaded or resumed from now on."""
        if self._segment.words[self._tables.model(row) + Model.USERS] != users:
            t.set(self._tables.model(row) + Model.USERS, users)

    def note_failure(self, t: Transaction, row: int) -> None:
        """Record that a load of the model has failed through its own fault."""
        at = self._tables.model(row)
        t.add(at + Model.FAILURES, 1)
        t.set(at + Model.FAILED_AT, t.now)

    def forget_failures(self, t: Transaction, row: int) -> None:
        """Reset a model's failures, because a load has succeeded: they no longer delay loads."""
        at = self._tables.model(row)
        if self._segment.words[at + Model.FAILURES]:
            t.set(at + Model.FAILURES, 0)
            # Both or neither (M9), because the back-off depends on both.
            t.set(at + Model.FAILED_AT, 0)

    def supersede(self, t: Transaction, row: int, superseded: bool) -> None:
        """Record whether another model has taken the place of this one."""
        if bool(self._segment.words[self._tables.model(row) + Model.SUPERSEDED]) != superseded:
            t.set(self._tables.model(row) + Model.SUPERSEDED, int(superseded))

    def note_demand(self, t: Transaction, row: int, mean_interarrival_s: float, requests: int, counted_ns: int) -> None:
        """Record how often a model is requested, counted up to `counted_ns`."""
        at = self._tables.model(row)
        t.set_all(
            (
                (at + Model.MEAN_INTERARRIVAL_S, float_bits(mean_interarrival_s)),
                (at + Model.REQUESTS, requests),
                # All three belong to one count: the mean decays from this moment on, and later requests are the
                # difference to REQUESTS.
                (at + Model.REQUESTED_AT, counted_ns),
            )
        )
