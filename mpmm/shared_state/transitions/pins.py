"""Pins: members, or the namespace itself, that want the idle copies of a model kept from eviction."""

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

        member: -1 for a pin that is the namespace's.
        """
        row = self._take_row(t, self._layout.pins)
        at = self._tables.pin(row)
        t.set(at + Pin.MODEL, model)
        t.set(at + Pin.MEMBER, member + 1)
        t.set(at + Pin.SINCE, t.now)
        t.set(at + Pin.STATE, 1)
        # A sum of the rows (M5), so that a plan, and the search for a model to give up, need not look at pins.
        t.add(self._tables.model(model) + Model.PINS, 1)
        t.event(EventKind.PINNED, model + 1, value=member)
        return row

    def unpin(self, t: Transaction, row: int) -> None:
        """End a pin."""
        at = self._tables.pin(row)
        model = self._segment.words[at + Pin.MODEL]
        # The model's row is certainly still this one's: a model with PINS is never given up. (P1)
        t.set(at + Pin.STATE, 0)
        t.add(self._tables.model(model) + Model.PINS, -1)
        # Else the tag would be the first to lose its row, although somebody has just cared about it.
        t.set(self._tables.model(model) + Model.USED_AT, t.now)
        t.event(EventKind.UNPINNED, model + 1, value=self._segment.words[at + Pin.MEMBER] - 1)
