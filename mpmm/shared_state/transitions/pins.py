"""Pins: with one, a member, or the namespace itself, keeps the idle copies of a model from eviction."""

from __future__ import annotations

from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Model, Pin
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.part import Part

__all__ = ["Pins"]


class Pins(Part):
    """The transitions of pin rows."""

    def pin(self, t: Transaction, model: int, member: int) -> int:
        """Keep the idle copies of a model from eviction for a member (slot); return the row. Raises TableFullError.

        member: -1 for a pin of the namespace.
        """
        row = self._take_row(t, self._layout.pins)
        at = self._tables.pin(row)
        t.set(at + Pin.MODEL, model)
        t.set(at + Pin.MEMBER, member + 1)
        t.set(at + Pin.SINCE, t.now)
        t.set(at + Pin.STATE, 1)
        # A count of the rows (M5), so that plans, and the search for a model row to reuse, need not read pins.
        t.add(self._tables.model(model) + Model.PINS, 1)
        t.event(EventKind.PINNED, model + 1, value=member)
        return row

    def unpin(self, t: Transaction, row: int) -> None:
        """End a pin."""
        at = self._tables.pin(row)
        model = self._segment.words[at + Pin.MODEL]
        # The row certainly still belongs to this model: a model with PINS never loses its row. (P1)
        t.set(at + Pin.STATE, 0)
        t.add(self._tables.model(model) + Model.PINS, -1)
        # Otherwise the tag might be the first to lose its row, although a member cared about it until now.
        t.set(self._tables.model(model) + Model.USED_AT, t.now)
        t.event(EventKind.UNPINNED, model + 1, value=self._segment.words[at + Pin.MEMBER] - 1)
