"""Sharing: whether to wait for a copy that others use or load, rather than to load another one."""

from __future__ import annotations

from mpmm.policy.view import ModelView, TicketView

__all__ = ["waiting_is_sooner"]


def waiting_is_sooner(model: ModelView, ticket: TicketView, ahead: int, now_s: float) -> bool:
    """Tell whether a waiter is served sooner by the copies there are than by a load of its own.

    ahead: waiters of the same model before this one that wait for the same copies.

    With c usable copies, each held for h on average, the (n+1)-th waiter gets one after about (n+1) h / c; one
    that is being loaded adds what is left of its load. That is compared with the time of a load. Where a time is
    not known yet, another copy is loaded, as in Beam; except that an unknown model is loaded once at a time. Who
    has waited as long as a load takes has been promised too much, and loads.
    """
    loaded, coming = model.usable_by(ticket.member), model.coming_for(ticket.member)
    if not loaded and not coming:
        return False
    if not model.load_s:
        return not loaded and not model.known
    if now_s - ticket.enqueued_s >= model.load_s:
        return False
    if loaded and not model.hold_s:
        return False
    expected_s = model.hold_s * (ahead + 1) / (loaded + coming)
    if not loaded:
        expected_s = max(0.0, model.load_s - model.loading_for_s) + model.hold_s * ahead / coming
    return expected_s < model.load_s
