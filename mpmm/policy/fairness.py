"""Fairness: the order of the queue, and how long its head may be overtaken.

Waiters stand in order of (priority, ticket number); unknown models have priority 0 and come first. A waiter
that cannot proceed is overtaken only by those who just reuse an idle copy, and only until it has waited for
`max_overtake_seconds`; from then on everybody else stands behind it, so that active copies drain and its turn
comes.
"""

from __future__ import annotations

from mpmm.policy.view import TicketView, View

__all__ = ["may_overtake", "queue_order"]


def queue_order(view: View) -> list[TicketView]:
    """Return the waiters, first one first."""
    return sorted(view.tickets, key=lambda ticket: (ticket.priority, ticket.number))


def may_overtake(view: View, blocked: TicketView | None) -> bool:
    """Tell whether idle copies may still be handed out past the first waiter that cannot proceed."""
    return blocked is None or view.now_s - blocked.enqueued_s < view.rules.max_overtake_seconds
