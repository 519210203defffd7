"""Sharing: whether to wait for a copy that others use or load, rather than to load another one."""

from __future__ import annotations

from mpmm.policy.view import ModelView, TicketView

__all__ = ["waiting_is_sooner"]


def waiting_is_sooner(model: ModelView, ticket: TicketView, ahead: int, now_s: float) -> float | None:
    """Return in how many seconds the copies there are serve a waiter, if a load of its own does not; else None.

    ahead: waiters of the same model before this one that wait for the same copies.

    With c usable copies, each held for h on average, the (n+1)-th waiter gets one after about (n+1) h / c. That is
    compared with the time of a load. What is left of a load that has begun adds to the wait but not to the comparison:
    else whoever comes just after it began would begin another one, to have it a hold sooner. Where a time is
    not known yet, another copy is loaded, as in Beam; except that an unknown model is loaded once at a time. Where all
    copies are held for longer than a load takes, and the waiter has waited that long, the mean has promised too much,
    and another one is loaded.
    """
    loaded, coming = model.usable_by(ticket.member), model.coming_for(ticket.member)
    if not loaded and not coming:
        return None
    if not model.load_s:
        return 0.0 if not loaded and not model.known else None
    if loaded and not model.hold_s:
        return None
    if loaded and min(model.held_for_s, now_s - ticket.enqueued_s) >= model.load_s:
        return None
    served_s = model.hold_s * (ahead + 1) / (loaded + coming)
    if served_s >= model.load_s:
        return None
    return served_s if loaded else served_s + max(0.0, model.load_s - model.loading_for_s)
