"""Eviction: which idle copies to unload so that a load fits.

The order is Beam's: the score is ten times the model's waiters plus a tier from 0 to 3 (surplus and cold first,
needed and warm last), and among equals the copy that has been idle longest goes first. Unlike there the whole
set is chosen at once, from what the copies are known to take, and counts memory that is on its way back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mpmm.policy.admission import free_mb
from mpmm.policy.view import DeviceView, Idle, TicketView, View

__all__ = ["choose_victims", "eviction_order", "score"]


def score(view: View, copy: Idle, left: int) -> int:
    """Return the eviction score of an idle copy when `left` copies of its model are loaded; lowest goes first."""
    rules = view.rules
    cold = view.now_s - copy.idle_since_s >= rules.eviction_cooldown_seconds
    surplus = left > rules.min_model_copies
    tier = (0 if cold else 1) if surplus else (2 if cold else 3)
    model = view.models.get(copy.model)
    return 10 * (model.waiting if model else 0) + tier


def eviction_order(view: View, copies: Sequence[Idle], ticket: TicketView) -> list[Idle]:
    """Return the copies that may go for a waiter, first victim first; pinned ones may not.

    A waiter whose model has a copy that it could use only displaces models with fewer waiters; one without any
    displaces whatever is idle, so that it does not starve.
    """
    requesting = view.models[ticket.model]
    starving = requesting.usable_by(ticket.member) == 0
    left = Counter({row: model.loaded for row, model in view.models.items()})
    ranked = []
    # Oldest first, so that of several copies of one model the oldest are the surplus ones.
    for copy in sorted(copies, key=lambda copy: copy.idle_since_s):
        model = view.models.get(copy.model)
        demand = model.waiting if model else 0
        if copy.pinned or (not starving and demand >= requesting.waiting):
            continue
        ranked.append((score(view, copy, left[copy.model]), copy.idle_since_s, copy.row, copy))
        left[copy.model] -= 1
    return [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:3])]


def choose_victims(
    view: View, device: DeviceView, copies: Sequence[Idle], need_mb: float, ticket: TicketView
) -> tuple[Idle, ...] | None:
    """Return the copies on `device` to unload so that `need_mb` fits.

    Empty when what is on its way back already is enough; None when unloading everything allowed is not.
    """
    missing = need_mb - free_mb(device, view.rules.slack_percentage) - device.returning_mb - device.unloading_mb
    victims: list[Idle] = []
    candidates = [copy for copy in copies if copy.device == device.device]
    for copy in eviction_order(view, candidates, ticket):
        if missing <= 0:
            break
        victims.append(copy)
        missing -= copy.mb
    return tuple(victims) if missing <= 0 else None
