"""Estimates of what a copy of a model takes, in model rows; and the readings from which they are solved."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Header, Model, Observation, Ticket
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.part import Part

__all__ = ["ESTIMATE_TOLERANCE", "Estimates"]

# A measured footprint that differs by less than this from the estimate changes nothing.
ESTIMATE_TOLERANCE = 0.01


class Estimates(Part):
    """The transitions of the estimates in model rows, and of observation rows."""

    def estimate(
        self, t: Transaction, row: int, mb: float, measured: bool, sd_mb: float = 0.0, forget_bound: bool = False
    ) -> None:
        """Set what a copy of the model is expected to take; its waiters lose the priority of unknown models.

        measured: read from processes. sd_mb: standard deviation of the figure, 0 if it counts as exact.
        forget_bound: the estimate counts although the model once ran out of memory with more than that free, see
        `record_out_of_memory`.
        """
        at = self._tables.model(row)
        if forget_bound:
            # Otherwise a copy would still need more than the bound, however small the new estimate is.
            t.set_float(at + Model.AT_LEAST_MB, 0.0)
        # If the model was known before, its tickets have their class and figure already.
        if not self._segment.words[at + Model.KNOWN]:
            self._tell_waiters(t, row, mb)
        t.set_float(at + Model.ESTIMATE_MB, mb)
        t.set(at + Model.KNOWN, 1)
        t.set(at + Model.MEASURED, int(measured))
        t.set_float(at + Model.SD_MB, sd_mb)
        t.event(EventKind.ESTIMATED, row + 1, value=mb)

    def raise_to(self, t: Transaction, row: int, mb: float) -> None:
        """Raise a model's estimate to what one of its servers was measured to take, unless it is that high already.

        At once, before another load is admitted by a smaller figure.
        """
        at = self._tables.model(row)
        known_mb = self._segment.floats[at + Model.ESTIMATE_MB] if self._segment.words[at + Model.KNOWN] else 0.0
        if mb > known_mb * (1.0 + ESTIMATE_TOLERANCE):
            self.estimate(t, row, mb, measured=True)

    def expect(self, t: Transaction, row: int, mb: float) -> None:
        """Use a user's figure for the model until it is measured; if nothing can be measured, from now on."""
        words, floats, at = self._segment.words, self._segment.floats, self._tables.model(row)
        if floats[at + Model.EXPECT_MB] == mb:
            return
        t.set_float(at + Model.EXPECT_MB, mb)
        if not words[at + Model.KNOWN]:
            self._tell_waiters(t, row, mb)
        # If nothing can be measured, the latest figure of a user is best, except one that was measured in an earlier
        # run.
        elif words[Header.SOURCE_ACCOUNTING_ONLY] and not words[at + Model.MEASURED]:
            self.estimate(t, row, mb, measured=False)

    def _tell_waiters(self, t: Transaction, row: int, mb: float) -> None:
        """Store in a model's tickets what it takes; they lose the priority of unknown models."""
        for ticket in map(self._tables.ticket, self._tables.rows_where(self._layout.tickets, Ticket.MODEL, row)):
            # Only class 0. A preload, class 2, stays behind all others, whatever is known about its model.
            if not self._segment.words[ticket + Ticket.PRIORITY]:
                t.set(ticket + Ticket.PRIORITY, 1)
            t.set_float(ticket + Ticket.NEED_MB, mb)

    def record_out_of_memory(self, t: Transaction, row: int, at_least_mb: float = 0.0, loading: bool = False) -> None:
        """Record that a copy of the model needed more memory than there was: more than `at_least_mb`, 0 if unknown.

        loading: during a load. Then an estimate that is not above the bound, and was not read from a process, is wrong:
        the model becomes unknown again, so that the next copy that loads is measured.
        """
        words, floats, at = self._segment.words, self._segment.floats, self._tables.model(row)
        # nan of an unknown model: the comparison below is False then, so that it is not reset again.
        estimate = floats[at + Model.ESTIMATE_MB]
        t.add(Header.OUT_OF_MEMORY, 1)
        t.event(EventKind.OUT_OF_MEMORY, row + 1, value=estimate)
        if at_least_mb > floats[at + Model.AT_LEAST_MB]:
            t.set_float(at + Model.AT_LEAST_MB, at_least_mb)
        if loading and estimate <= at_least_mb and not words[at + Model.MEASURED]:
            t.set(at + Model.KNOWN, 0)
            t.set_float(at + Model.ESTIMATE_MB, math.nan)
            t.set_float(at + Model.SD_MB, 0.0)

    def observe(
        self, t: Transaction, copies: Sequence[tuple[int, int]], reading_mb: float, device: int | None = None
    ) -> None:
        """Add a reading of the memory that these (model generation, copies) took together on a device (row).

        A configuration of more than `Observation.PAIRS_LENGTH` models is not kept. If the table is full, the one that
        was updated longest ago is replaced.
        """
        # Generations, because a row may be another tag's by the time the readings are solved. Sorted, so that each
        # configuration has one form.
        pairs = sorted(generation << 16 | count for generation, count in copies)
        if not 0 < len(pairs) <= Observation.PAIRS_LENGTH:
            return
        reference = 0 if device is None else device + 1
        row = self._observation_row(pairs, reference)
        if row is None:
            row = self._new_observation(t, pairs, reference)
        at, words = self._layout.observations.base + row * Observation.WORDS, self._segment.words
        # A ring: the newest reading replaces the oldest.
        slot = words[at + Observation.NEXT]
        t.set_float(at + Observation.READINGS + slot, reading_mb)
        t.set(at + Observation.NEXT, (slot + 1) % Observation.READINGS_KEPT)
        t.set(at + Observation.COUNT, min(words[at + Observation.COUNT] + 1, Observation.READINGS_KEPT))
        t.set(at + Observation.UPDATED, t.now)
        t.add(Header.OBSERVATIONS_MADE, 1)

    def _observation_row(self, pairs: list[int], reference: int) -> int | None:
        """Return the row of a configuration on a device, or None."""
        rows = self._tables.view(self._layout.observations)
        same = (rows[:, Observation.PAIRS_USED] == len(pairs)) & (rows[:, Observation.DEVICE] == reference)
        wanted, first = np.array(pairs, dtype=np.uint64), Observation.PAIRS
        for row in np.flatnonzero((rows[:, Observation.STATE] == 1) & same).tolist():
            if np.array_equal(rows[row, first : first + len(pairs)], wanted):
                return int(row)
        return None

    def _new_observation(self, t: Transaction, pairs: list[int], reference: int) -> int:
        """Return a row for a configuration: a free one, else the one that was updated longest ago."""
        rows = self._tables.view(self._layout.observations)
        row = int(np.argmin(np.where(rows[:, Observation.STATE] == 0, 0, rows[:, Observation.UPDATED])))
        at = self._layout.observations.base + row * Observation.WORDS
        # The row may have been another configuration's: with COUNT and NEXT at 0 its readings no longer count, and are
        # overwritten one by one.
        t.set(at + Observation.COUNT, 0)
        t.set(at + Observation.NEXT, 0)
        t.set(at + Observation.PAIRS_USED, len(pairs))
        t.set(at + Observation.DEVICE, reference)
        for offset, pair in enumerate(pairs):
            t.set(at + Observation.PAIRS + offset, pair)
        t.set(at + Observation.STATE, 1)
        return row

    def note_solution(self, t: Transaction, observations_made: int) -> None:
        """Record which observations the last solution included."""
        # The number from before the solver read them, not the current one, because it has not seen later ones.
        t.set(Header.SOLVED_AT, observations_made)
