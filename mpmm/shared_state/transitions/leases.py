"""Leases: claims on memory for no model. A lease has a model row while its caller waits, and an instance row, too,
while it is held; after it both are free, the first one with its name left in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpmm.shared_state.events import Cause, EventKind, placed
from mpmm.shared_state.layout import Instance, Model, Ticket
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.isolation import Isolation
from mpmm.shared_state.transitions.ledgers import Ledgers
from mpmm.shared_state.transitions.models import Models
from mpmm.shared_state.transitions.part import Actor, Part

__all__ = ["Leases"]


class Leases(Part):
    """The transitions of leases."""

    def __init__(
        self,
        tables: Tables,
        actor: Actor,
        models: Models,
        ledgers: Ledgers,
        isolation: Isolation,
        instances: Instances,
    ) -> None:
        super().__init__(tables, actor)
        self._models = models
        self._ledgers = ledgers
        self._isolation = isolation
        self._instances = instances

    def claim(self, t: Transaction, encoded: bytes, mb: float) -> int:
        """Return a new model row that stands for a lease; tickets wait for it as for a model. Raises TableFullError."""
        row = self._models.take_row(t, encoded)
        at = self._tables.model(row)
        t.set_float(at + Model.ESTIMATE_MB, mb)
        t.set(at + Model.KNOWN, 1)
        # Not MODEL, so that searches for tags skip it: a lease may have a model's name, or another lease's.
        t.set(at + Model.STATE, Model.LEASE)
        return row

    def begin(
        self,
        t: Transaction,
        model: int,
        member: int,
        devices: int,
        mb: float,
        cause: Cause | None = None,
        ticket: int = 0,
    ) -> int:
        """Give a member (slot) the lease that a model row stands for; return the row. Raises TableFullError.

        ticket: number plus one of the ticket that waited for it, for the event.
        """
        row = self._instances.new_row(t, model, member, devices)
        at = self._tables.instance(row)
        # Not MB, which is what its program is measured to take; admission reads both. (I3)
        t.set_float(at + Instance.RESERVED_MB, mb)
        self._instances.change_state(t, row, Instance.LEASED)
        self._isolation.note_change(t, row)
        t.event(placed(EventKind.LEASED, devices), model + 1, row + 1, ticket, mb, cause)
        return row

    def link_program(self, t: Transaction, row: int, pid: int) -> None:
        """Record which process uses the memory of a lease, so that what it takes is not counted twice."""
        t.set(self._tables.instance(row) + Instance.PROGRAM, pid)

    def measure_program(self, t: Transaction, row: int, shares_mb: Sequence[float]) -> None:
        """Record what the process that uses the memory of a lease takes now of each of its devices, lowest first."""
        # It is part of the devices' figures; recorded here, it does not count as external.
        self._instances.set_mb(t, row, math.fsum(shares_mb), shares_mb)

    def end(self, t: Transaction, row: int) -> None:
        """End a lease: free its memory for others, and its model row unless a ticket still refers to that."""
        at = self._tables.instance(row)
        words = self._segment.words
        if words[at + Instance.STATE] != Instance.LEASED:
            raise self._tables.surprise("the copy", at)
        model = words[at + Instance.MODEL]
        t.event(EventKind.LEASE_ENDED, model + 1, row + 1, value=(t.now - words[at + Instance.SINCE]) / 1e9)
        # What was only reserved is free at once.
        self._ledgers.count_after_lease(t, row)
        self._instances.change_state(t, row, Instance.FREE)
        self._isolation.note_change(t, row)
        self.forget_spent(t, model)

    def forget_spent(self, t: Transaction, model: int) -> None:
        """Free a lease's model row once the lease has neither ticket nor instance; a model's row stays."""
        if self._segment.words[self._tables.model(model)] != Model.LEASE:
            return
        # A ticket with an answer refers to the row, too, until its waiter has read the answer.
        waiting = self._tables.rows_where(self._layout.tickets, Ticket.MODEL, model)
        held = self._tables.rows_where(self._layout.instances, Instance.MODEL, model)
        # Not before: another tag could take the row while a ticket or an instance still refers to it. (T1, I2)
        if not waiting and not held:
            at = self._tables.model(model)
            t.set(at + Model.STATE, Model.FREE)
            # So that the row that has been free for longest is taken first.
            t.set(at + Model.USED_AT, t.now)
