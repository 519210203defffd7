"""All changes of the shared state, one method each, in one module for each table.

A transition is called inside a transaction, changes rows so that the invariants of `layout.py` hold again at the
transaction's end, writes its event, and arranges the wake-ups that follow from it. It decides nothing: callers have
asked the policy. The public API has checked all arguments; a row in an impossible state raises SegmentCorruptError.

    an instance: loads.begin ──> LOADING ──loads.end──> ACTIVE <──holds.take_idle, hand_over.grant── IDLE
                                    │                     └──────────────holds.release─────────────> │
                                loads.fail                                                    unloads.begin
                                    v                                                                v
                                   free <───────────────────unloads.end────────────────────────── UNLOADING

    a lease:     leases.begin ──> LEASED ──leases.end──> free

`suspensions` and `hand_over` have drawings of their own, for suspended instances and for tickets. The modules, from the
ground up; each imports only modules above it in this list:

    part                                     what they have in common; `Actor`, the member that makes transitions
    tickets models pins estimates            rows that refer to no instance
    ledgers devices isolation                what is known about each device, and which instance has it to itself
    instances seats twins measurements       instance rows as such
    suspensions unloads holds loads leases   what happens to instances
    hand_over                                gives instances to tickets
    members                                  processes join and leave, and one leads
"""

from __future__ import annotations

import numpy as np

from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.layout import Header, Instance, Model, Ticket
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.devices import Devices
from mpmm.shared_state.transitions.estimates import ESTIMATE_TOLERANCE, Estimates
from mpmm.shared_state.transitions.hand_over import HandOver
from mpmm.shared_state.transitions.holds import Holds
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.isolation import Isolation
from mpmm.shared_state.transitions.leases import Leases
from mpmm.shared_state.transitions.ledgers import Ledgers
from mpmm.shared_state.transitions.loads import Loads
from mpmm.shared_state.transitions.measurements import Measurements
from mpmm.shared_state.transitions.members import Members
from mpmm.shared_state.transitions.models import Models
from mpmm.shared_state.transitions.part import SMOOTHING, Actor
from mpmm.shared_state.transitions.pins import Pins
from mpmm.shared_state.transitions.seats import Seats
from mpmm.shared_state.transitions.suspensions import Suspensions
from mpmm.shared_state.transitions.tickets import Tickets
from mpmm.shared_state.transitions.twins import Twins
from mpmm.shared_state.transitions.unloads import Unloads

__all__ = ["ESTIMATE_TOLERANCE", "SMOOTHING", "Actor", "Transitions"]


class Transitions:
    """The transitions of one namespace, made by one of its members, by table. All of them need the lock."""

    def __init__(self, tables: Tables, actor: Actor) -> None:
        self._tables = tables
        self._actor = actor
        self.tickets = Tickets(tables, actor)
        self.models = Models(tables, actor)
        self.pins = Pins(tables, actor)
        self.estimates = Estimates(tables, actor)
        self.ledgers = Ledgers(tables, actor)
        self.devices = Devices(tables, actor, self.ledgers)
        self.isolation = Isolation(tables, actor, self.devices)
        self._instances = Instances(tables, actor, self.tickets, self.ledgers, self.isolation)
        self.seats = Seats(tables, actor, self._instances)
        self.twins = Twins(tables, actor, self.isolation, self._instances, self.seats)
        self.measurements = Measurements(tables, actor, self._instances, self.estimates)
        self.suspensions = Suspensions(tables, actor, self.ledgers, self.isolation, self._instances, self.seats)
        self.unloads = Unloads(tables, actor, self._instances, self.twins, self.seats, self.suspensions)
        self.holds = Holds(tables, actor, self.isolation, self._instances, self.unloads)
        self.loads = Loads(
            tables, actor, self.models, self.isolation, self._instances, self.twins, self.seats, self.ledgers
        )
        self.leases = Leases(tables, actor, self.models, self.ledgers, self.isolation, self._instances)
        self.hand_over = HandOver(
            tables, actor, self.tickets, self.isolation, self.holds, self.loads, self.leases, self.suspensions
        )
        self.members = Members(
            tables,
            actor,
            self.pins,
            self.ledgers,
            self._instances,
            self.loads,
            self.holds,
            self.unloads,
            self.leases,
            self.suspensions,
            self.hand_over,
        )

    def reset(self, t: Transaction, before: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Empty queue and memory: tell waiters, unload instances, even those in use, and give up loads and resumes.

        Leases stay, because mpmm cannot unload what another program takes.

        Return None when everything is done. Otherwise the transaction has become long, and another call, in a new one,
        continues. Pass it the result of this call as `before`: the first ticket number and the first generation that
        are newer than the reset; such rows stay.
        """
        tables = self._tables
        words, layout = tables.segment.words, tables.segment.layout
        if before is None:
            before = words[Header.NEXT_TICKET], words[Header.NEXT_GENERATION]
        newer_ticket, newer_generation = before
        for row in tables.used_rows(layout.tickets):
            # Checked between rows, so that the next call finds each row either reset or as it was.
            if t.is_long:
                return before
            if words[tables.ticket(row) + Ticket.NUMBER] < newer_ticket:
                self.hand_over.reset(t, row)
        for row in tables.used_rows(layout.instances):
            if t.is_long:
                return before
            at = tables.instance(row)
            # A seat is freed with its copy, which may have been reset already.
            is_copy = words[at] and not words[at + Instance.SEAT_OF]
            if is_copy and words[at + Instance.GENERATION] < newer_generation:
                self._reset_instance(t, row)
        for row in np.flatnonzero(tables.view(layout.models)[:, Model.FAILURES]).tolist():
            self.models.forget_failures(t, row)
        # Only in the last step: a reset in several transactions still counts once.
        t.add(Header.RESETS, 1)
        t.event(EventKind.RESET)
        return None

    def _reset_instance(self, t: Transaction, row: int) -> None:
        """Have an instance unloaded, whatever its state; a lease stays."""
        at, words = self._tables.instance(row), self._tables.segment.words
        # A waiter newer than the reset may have been granted it between two transactions, and may have taken that
        # without the lock: back in the queue, it would be granted a copy that it never takes.
        for one in (row, *self._tables.seats_of(row)):
            for ticket in self._tables.rows_where(self._tables.segment.layout.tickets, Ticket.INSTANCE, one + 1):
                self.hand_over.reset(t, ticket)
        self.seats.free_all(t, row)
        if words[at + Instance.STATE] == Instance.ACTIVE:
            # Its holder finds out when it releases it, because the row is gone by then. Not by `holds.release`, which
            # would count a hold and write an event though the use continues.
            self.isolation.end(t, row)
            self._instances.change_state(t, row, Instance.IDLE)
            if not words[at + Instance.OWNER]:
                t.set_all(self._instances.pushed(at, row))
        state, slot = words[at + Instance.STATE], self._actor.slot
        if state == Instance.IDLE:
            self.unloads.begin(t, row, slot, evicted=False, cause=Cause(Reason.RESET))
        elif state == Instance.LOADING:
            self.loads.give_up(t, row)
        elif state == Instance.SUSPENDED:
            self.suspensions.drop(t, row, slot, Cause(Reason.RESET))
        # An UNLOADING row stays: the process that unloads it continues, and frees it.
        elif state in (Instance.SUSPENDING, Instance.RESUMING):
            self.suspensions.fail(t, row, None, slot + 1)
