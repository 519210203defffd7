"""Seats: the rows by which several may use one copy at a time, see `layout.Instance`.

A copy's own row serves its first user; each seat serves one more. For holds, waiters and the death of a holder, a seat
is like a copy. Only this module differs: seats are made when a copy is ready for use, and freed before its memory is.
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
        """Make the seats of a copy that has just become ACTIVE: for its model's USERS, as far as there are free rows.

        None if the copy is to be unloaded on release.
        """
        at, words = self._tables.instance(row), self._segment.words
        if words[at + Instance.UNLOAD_ON_RELEASE]:
            return
        users = words[self._tables.model(words[at + Instance.MODEL]) + Model.USERS]
        handle = self._tables.text(at + Instance.HANDLE)
        for _ in range(users - 1):
            try:
                self._add_one(t, row, handle)
            except TableFullError as error:
                if error.table != self._layout.instances.name:
                    # Raised in the middle of a row, which must be rolled back.
                    raise
                # The copy then serves fewer users at a time, which is better than no copy.
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
            # So that its user finds the handle in its row, as with a copy.
            t.set_text(place + Instance.HANDLE, handle)
        self._instances.change_state(t, seat, Instance.IDLE)
        if not words[place + Instance.OWNER]:
            t.set_all(self._instances.pushed(place, seat))
        t.add(at + Instance.SEATS, 1)
        t.add(self._tables.model(model) + Model.SEATS, 1)

    def close(self, t: Transaction, row: int) -> None:
        """Stop further use of a copy: free its idle seats, and have those in use freed when they are given back."""
        words = self._segment.words
        for seat in self._tables.seats_of(row):
            at = self._tables.instance(seat)
            if words[at] == Instance.IDLE:
                self._instances.free_row(t, seat)
            elif not words[at + Instance.UNLOAD_ON_RELEASE]:
                t.set(at + Instance.UNLOAD_ON_RELEASE, Instance.ASKED)

    def free(self, t: Transaction, seat: int) -> None:
        """Free an idle seat: from now on fewer users at a time can use its copy."""
        at = self._tables.instance(seat)
        if self._segment.words[at] != Instance.IDLE or not self._segment.words[at + Instance.SEAT_OF]:
            raise self._tables.surprise("the seat", at)
        self._instances.free_row(t, seat)

    def free_all(self, t: Transaction, row: int) -> None:
        """Free the seats of a copy, even those in use."""
        for seat in self._tables.seats_of(row):
            self._instances.free_row(t, seat)

    def move(self, t: Transaction, row: int) -> None:
        """Record in its seats on which devices a copy now lies."""
        devices = self._segment.words[self._tables.instance(row) + Instance.DEVICES]
        for seat in self._tables.seats_of(row):
            t.set(self._tables.instance(seat) + Instance.DEVICES, devices)
