"""Beam's view of the queue: one object for each request that waits."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from mpmm.shared_state.layout import Ticket

if TYPE_CHECKING:
    from mpmm.model_manager.session import Session

__all__ = ["QueueTicket", "waiting_tickets"]


class QueueTicket:
    """One place in the queue, as in Beam: ordered by priority, then number.

    `wake_event` is part of Beam's interface. mpmm never sets it: waiters sleep on a word of the segment.
    `expected_wait_seconds`: the expected time until the request gets its copy, judging by the loads and holds so far;
    None if it was not estimated.
    """

    def __init__(self, priority: int, ticket_num: int, tag: str, expected_wait_seconds: float | None = None) -> None:
        self.priority = priority
        self.ticket_num = ticket_num
        self.tag = tag
        self.expected_wait_seconds = expected_wait_seconds
        self.wake_event = threading.Event()

    def __lt__(self, other: QueueTicket) -> bool:
        return (self.priority, self.ticket_num) < (other.priority, other.ticket_num)

    def __repr__(self) -> str:
        return f"QueueTicket(priority={self.priority}, ticket_num={self.ticket_num}, tag={self.tag!r})"


# Pickles, tracebacks and documentation name the module that users import it from.
QueueTicket.__module__ = "mpmm.model_manager"


def waiting_tickets(session: Session) -> list[QueueTicket]:
    """Return all requests that wait now, in the order of the queue."""
    tables = session.namespace.tables
    with session.namespace.transaction():
        rows = tables.rows_where(session.namespace.segment.layout.tickets, Ticket.STATE, Ticket.WAITING)
        expected_s = session.scheduler.expected_waits_s(rows)
        found = [(tables.tickets[row], expected_s[row]) for row in rows]
        found.sort(key=lambda one: (one[0].priority, one[0].rank, one[0].number))
        return [
            QueueTicket(ticket.priority, ticket.number, tables.tag_of(ticket.model), seconds)
            for ticket, seconds in found
        ]
