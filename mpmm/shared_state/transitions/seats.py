"""Seats: the rows by which several may use one copy at a time, see `layout.Instance`.

A copy's own row is its first user's; each seat is one more. Holds, waiters and the death of a holder know no
difference. Here is what does: seats come with a copy that is ready for use, and go before its memory does.
"""

from __future__ import annotations

from mpmm.errors import TableFullError
from mpmm.shared_state.layout import Instance, Model
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.part import Actor, Part

__all__ = ["Seats"]


class Seats(Part):
    """The transitions of seats."""

    def __init__(self, tables: Tables, actor: Actor, instances: Instances) -> None:
        super().__init__(tables, actor)
        self._instances = instances

    def add(self, t: Transaction, row: int) -> None:
        """Make the seats of a copy that has just become ACTIVE: as many as its model's users say, or there are rows.

        None for one that is to be unloaded when it is given back.
        """
        at, words = self._tables.instance(row), self._segment.words
        users = words[self._tables.model(words[at + Instance.MODEL]) + Model.USERS]
        if users <= 1 or words[at + Instance.UNLOAD_ON_RELEASE]:
            return
        handle = self._tables.text(at + Instance.HANDLE)
        for _ in range(users - 1):
            try:
                self._add_one(t, row, handle)
            except TableFullError as error:
                if error.table != self._layout.instances.name:
                    # Found out in the middle of a row, which must not stay.
                    raise
                # It serves fewer at a time then, which is better than no copy.
                return

    def _add_one(self, t: Transaction, row: int, handle: bytes) -> None:
        at, words = self._tables.instance(row), self._segment.words
        model = words[at + Instance.MODEL]
        seat = self._instances.new_row(t, model, -1, words[at + Instance.DEVICES])
        place = self._tables.instance(seat)
        t.set(place + Instance.SEAT_OF, row + 1)
        for word in (Instance.OWNER, Instance.LOADED_AT, Instance.HAS_SERVER):
            if words[at + word]:
                t.set(place + word, words[at + word])
        if handle:
            # So that its user finds in its row what it is to use, as in any other one.
            t.set_text(place + Instance.HANDLE, handle)
        self._instances.change_state(t, seat, Instance.IDLE)
        if not words[place + Instance.OWNER]:
            t.set_all(self._instances.pushed(place, seat))
        t.add(at + Instance.SEATS, 1)
        t.add(self._tables.model(model) + Model.SEATS, 1)

    def close(self, t: Transaction, row: int) -> None:
        """Let nobody else use a copy: free its idle seats, and those in use when they are given back."""
        words = self._segment.words
        for seat in self._tables.seats_of(row):
            at = self._tables.instance(seat)
            if words[at] == Instance.IDLE:
                self._instances.free_row(t, seat)
            elif not words[at + Instance.UNLOAD_ON_RELEASE]:
                t.set(at + Instance.UNLOAD_ON_RELEASE, Instance.ASKED)

    def free(self, t: Transaction, seat: int) -> None:
        """Free a seat that nobody uses: from now on fewer can use its copy at a time."""
        at = self._tables.instance(seat)
        if self._segment.words[at] != Instance.IDLE or not self._segment.words[at + Instance.SEAT_OF]:
            raise self._tables.surprise("the seat", at)
        self._instances.free_row(t, seat)

    def free_all(self, t: Transaction, row: int) -> None:
        """Free the seats of a copy, whoever uses them."""
        for seat in self._tables.seats_of(row):
            self._instances.free_row(t, seat)

    def move(self, t: Transaction, row: int) -> None:
        """Note that a copy lies on other devices now."""
        devices = self._segment.words[self._tables.instance(row) + Instance.DEVICES]
        for seat in self._tables.seats_of(row):
            t.set(self._tables.instance(seat) + Instance.DEVICES, devices)
