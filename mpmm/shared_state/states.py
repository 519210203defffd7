"""The states of rows as enumerations, for code off the warm path that shows or compares them.

`layout` keeps the same numbers as plain ints for everything that runs with the lock held: `InstanceState.ACTIVE` takes
80 ns longer to look up than `Instance.ACTIVE` (Python 3.11), and a transaction looks up a dozen of them in 11 us.
`tests/test_snapshot.py` compares the two, name by name.
"""

from __future__ import annotations

from enum import IntEnum, unique

from mpmm.shared_state.layout import Instance, Member, Model, Ticket

__all__ = ["InstanceState", "MemberState", "ModelState", "TicketState"]


@unique
class MemberState(IntEnum):
    """What a row of the members table holds."""

    FREE = Member.FREE
    WORKER = Member.WORKER
    SERVER = Member.SERVER
    GUEST = Member.GUEST


@unique
class ModelState(IntEnum):
    """What a row of the models table stands for."""

    FREE = Model.FREE
    MODEL = Model.MODEL
    LEASE = Model.LEASE


@unique
class InstanceState(IntEnum):
    """What is being done with an instance."""

    FREE = Instance.FREE
    LOADING = Instance.LOADING
    ACTIVE = Instance.ACTIVE
    IDLE = Instance.IDLE
    UNLOADING = Instance.UNLOADING
    LEASED = Instance.LEASED
    SUSPENDING = Instance.SUSPENDING
    SUSPENDED = Instance.SUSPENDED
    RESUMING = Instance.RESUMING


@unique
class TicketState(IntEnum):
    """What a waiter has been told."""

    FREE = Ticket.FREE
    WAITING = Ticket.WAITING
    GRANTED = Ticket.GRANTED
    LOAD = Ticket.LOAD
    REFUSED = Ticket.REFUSED
    RESET = Ticket.RESET
    ENOUGH = Ticket.ENOUGH
