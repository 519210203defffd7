"""Eviction: which instances to unload so that a load fits, by the cost of loading them again.

The *reload cost* of an instance is the time that its users are expected to lose per second once it is unloaded: the
time of a load, times the rate at which the model is requested. A surplus instance is missed only while all others are
in use. The whole set is chosen at once, the cheapest one that frees enough, and memory that is coming back counts.

Costs are known once loads have been timed. As long as they are not, or all are too small to matter, the order is
Beam's: the score is ten times the model's waiters plus a tier from 0 to 3 (surplus and cold first, needed and warm
last), and among equals the instance that has been idle longest is evicted first.

A model that another one has replaced (an update of it, say) is not expected to be requested again: its reload cost is
0, and in Beam's order it comes before all others.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mpmm.policy.admission import free_mb
from mpmm.policy.suspension import KEPT_COST
from mpmm.policy.view import BusyInstance, DeviceView, IdleInstance, ModelView, TicketView, View

__all__ = [
    "Candidate",
    "EvictionPlan",
    "cheapest_set",
    "combine",
    "eviction_order",
    "plan_eviction",
    "score",
    "waiting_pays",
]

# If all loads are quicker than this, the time that it takes to tell a process to load, costs are not compared.
RESOLUTION_S = 0.05
# A model for which room was made keeps it for its load, and for about as long in use.
RESIDENCE_IN_LOADS = 2.0


@dataclass(frozen=True)
class EvictionPlan:
    """How to make a load fit on one device, or, as `combine` returns it, on several.

    victims: idle instances to unload. awaited: instances in use to be unloaded after that. reload_cost: in seconds lost
    per second, None if costs are not known. drain_s: when the last awaited instance is expected to be idle. freed_mb:
    what all of these take there. left_mb: what remains free after the load, for each device.
    """

    devices: tuple[DeviceView, ...]
    victims: tuple[IdleInstance, ...]
    awaited: tuple[BusyInstance, ...]
    reload_cost: float | None
    drain_s: float
    freed_mb: float
    left_mb: tuple[float, ...]

    @property
    def cost(self) -> tuple[float, float, tuple[int, ...]]:
        """A key to compare plans: the lowest reload cost first, or the least memory if that is not known."""
        return (self.reload_cost or 0.0, self.freed_mb, tuple(device.device for device in self.devices))


def combine(plans: Sequence[EvictionPlan]) -> EvictionPlan:
    """Return plans for different devices as one, for a copy that spans these devices."""
    if len(plans) == 1:
        return plans[0]
    costs = [plan.reload_cost for plan in plans if plan.reload_cost is not None]
    return EvictionPlan(
        tuple(device for plan in plans for device in plan.devices),
        tuple(dict.fromkeys(instance for plan in plans for instance in plan.victims)),
        tuple(dict.fromkeys(instance for plan in plans for instance in plan.awaited)),
        math.fsum(costs) if len(costs) == len(plans) else None,
        max(plan.drain_s for plan in plans),
        math.fsum(plan.freed_mb for plan in plans),
        tuple(left for plan in plans for left in plan.left_mb),
    )


def score(view: View, copy: IdleInstance, left: int) -> int:
    """Return Beam's score of an idle copy when `left` copies of its model are loaded; the lowest is evicted first."""
    rules = view.rules
    cold = view.now_s - copy.idle_since_s >= rules.eviction_cooldown_seconds
    surplus = left > rules.min_model_copies
    tier = (0 if cold else 1) if surplus else (2 if cold else 3)
    model = view.models.get(copy.model)
    return 10 * (model.waiting if model else 0) + tier


def eviction_order(view: View, copies: Sequence[IdleInstance], ticket: TicketView) -> list[IdleInstance]:
    """Return the copies that may be evicted for a waiter, in Beam's order, first victim first; pinned ones may not.

    A waiter whose model has a copy that it could use displaces only models with fewer waiters; a waiter without one
    displaces any idle copy, so that it does not starve.
    """
    left, below = Counter({row: model.loaded for row, model in view.models.items()}), _displaces_below(view, ticket)
    ranked: list[tuple[bool, int, float, int, IdleInstance]] = []
    # Oldest first, so that of several copies of one model the oldest are the surplus ones.
    for copy in sorted(copies, key=lambda copy: copy.idle_since_s):
        if not copy.pinned and _waiters_of(view, copy.model) < below:
            wanted = not _is_superseded(view, copy.model)
            ranked.append((wanted, score(view, copy, left[copy.model]), copy.idle_since_s, copy.row, copy))
            left[copy.model] -= 1
    return [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:4])]


def plan_eviction(
    view: View,
    device: DeviceView,
    idle: Sequence[IdleInstance],
    busy: Sequence[BusyInstance],
    need_mb: float,
    ticket: TicketView,
) -> EvictionPlan | None:
    """Return what to unload on `device` so that `need_mb` fits, or None if all that may be unloaded is not enough.

    The plan has no victims if memory that is coming back is enough. busy: instances in use that may be waited for.
    """
    coming = free_mb(device, view.rules.slack_percentage) + device.returning_mb + device.unloading_mb
    if coming >= need_mb:
        return EvictionPlan((device,), (), (), 0.0, 0.0, 0.0, (coming - need_mb,))
    below = _displaces_below(view, ticket)
    here = [one for one in idle if _may_be_evicted(view, device, below, one)]
    used = [one for one in busy if one.model != ticket.model and _may_be_evicted(view, device, below, one)]
    missing_mb = need_mb - coming
    if math.fsum(one.mb_on(device.device) for one in (*here, *used)) < missing_mb:
        return None
    reload_cost: float | None = None
    if _costs_are_known(view, {one.model for one in here} | {one.model for one in used}):
        best = cheapest_set(_candidates(view, device, here, used), missing_mb)
        chosen, reload_cost = [one.copy for one in best], math.fsum(one.reload_cost for one in best)
    else:
        chosen = _in_beams_order(view, device, here, used, missing_mb, ticket)
    awaited = tuple(one for one in chosen if isinstance(one, BusyInstance))
    freed = math.fsum(one.mb_on(device.device) for one in chosen)
    return EvictionPlan(
        (device,),
        tuple(one for one in chosen if isinstance(one, IdleInstance)),
        awaited,
        reload_cost,
        max((_served_in_s(view, one) for one in awaited), default=0.0),
        freed,
        (freed - missing_mb,),
    )


def _in_beams_order(
    view: View,
    device: DeviceView,
    idle: Sequence[IdleInstance],
    busy: Sequence[BusyInstance],
    missing_mb: float,
    ticket: TicketView,
) -> list[IdleInstance | BusyInstance]:
    """Return the first instances in Beam's order that free enough; those in use come last, the soonest idle first."""
    soonest = sorted(busy, key=lambda one: (one.free_in_s, one.row))
    order: list[IdleInstance | BusyInstance] = [*eviction_order(view, idle, ticket), *soonest]
    before = itertools.accumulate((one.mb_on(device.device) for one in order), initial=0.0)
    return [one for one, before_mb in zip(order, before, strict=False) if before_mb < missing_mb]


def waiting_pays(plan: EvictionPlan, sooner: EvictionPlan, model: ModelView) -> bool:
    """Tell whether to wait for `plan`, whose instances are still in use, although `sooner` could be carried out now.

    Waiting costs the model's waiters the time until then. Not waiting costs the difference by which `sooner` is dearer,
    for as long as the model keeps the memory. In the simulator waiting saves 2 to 17 of 100 loads, if instances are
    held for less time than a load takes.
    """
    if plan.reload_cost is None or sooner.reload_cost is None:
        return False
    dearer_by = (sooner.reload_cost - plan.reload_cost) * RESIDENCE_IN_LOADS * model.load_s
    return plan.drain_s * max(1, model.waiting) < dearer_by


class Candidate(NamedTuple):
    """An instance that may be evicted, and what that costs and frees."""

    reload_cost: float
    mb: float
    copy: IdleInstance | BusyInstance


def cheapest_set(candidates: Sequence[Candidate], missing_mb: float) -> list[Candidate]:
    """Return the cheapest candidates that free enough together, first victim first; empty if all are too little.

    It is the best of three greedy sets (by cost per MB, by cost, one alone), without instances that turn out not to be
    needed. For eight random instances it is the best of all sets in 99 cases of 100, and takes 10 µs instead of a
    millisecond.
    """
    orders = (
        sorted(candidates, key=lambda one: (one.reload_cost / max(one.mb, 1.0), one.copy.row)),
        sorted(candidates, key=lambda one: (one.reload_cost, one.copy.row)),
        sorted((one for one in candidates if one.mb >= missing_mb), key=lambda one: (one.reload_cost, one.copy.row))[
            :1
        ],
    )
    sets = [chosen for order in orders if (chosen := _enough(order, missing_mb))]
    return min(sets, key=lambda chosen: math.fsum(one.reload_cost for one in chosen), default=[])


def _enough(order: Sequence[Candidate], missing_mb: float) -> list[Candidate]:
    """Return the first candidates that free enough, without those that are not needed for that."""
    chosen: list[Candidate] = []
    freed_mb = 0.0
    for one in order:
        if freed_mb >= missing_mb:
            break
        chosen.append(one)
        freed_mb += one.mb
    if freed_mb < missing_mb:
        return []
    for one in sorted(chosen, key=lambda one: -one.reload_cost):
        if freed_mb - one.mb >= missing_mb:
            chosen.remove(one)
            freed_mb -= one.mb
    return chosen


def _candidates(
    view: View, device: DeviceView, idle: Sequence[IdleInstance], busy: Sequence[BusyInstance]
) -> list[Candidate]:
    left = Counter({row: model.loaded for row, model in view.models.items()})
    copies: list[IdleInstance | BusyInstance] = [*sorted(idle, key=lambda copy: (copy.idle_since_s, copy.row)), *busy]
    candidates = []
    for copy in copies:
        model = view.models[copy.model]
        if model.superseded:
            candidates.append(Candidate(0.0, copy.mb_on(device.device), copy))
            continue
        # Requests that already wait count as coming within the time of one load.
        rate = model.rate + model.waiting / model.load_s
        cost = rate * model.load_s
        if left[copy.model] > max(1, view.rules.min_model_copies):
            # The share of the time in which all others are in use.
            cost *= min(1.0, rate * model.hold_s / ((left[copy.model] - 1) * model.users))
        if isinstance(copy, IdleInstance) and copy.suspendable:
            cost *= KEPT_COST
        left[copy.model] -= 1
        candidates.append(Candidate(cost, copy.mb_on(device.device), copy))
    return candidates


def _costs_are_known(view: View, rows: set[int]) -> bool:
    models = [view.models.get(row) for row in rows if not _is_superseded(view, row)]
    if not all(model is not None and model.load_s and model.rate for model in models):
        return False
    return any(model is not None and model.load_s >= RESOLUTION_S for model in models)


def _served_in_s(view: View, copy: BusyInstance) -> float:
    """Return in how many seconds a copy in use is expected to be idle, after all requests that wait for it."""
    model = view.models[copy.model]
    return copy.free_in_s + model.hold_s * model.waiting / (max(1, model.loaded) * model.users)


def _is_superseded(view: View, row: int) -> bool:
    model = view.models.get(row)
    return model is not None and model.superseded


def _may_be_evicted(view: View, device: DeviceView, below: float, copy: IdleInstance | BusyInstance) -> bool:
    return device.device in copy.devices and not copy.pinned and _waiters_of(view, copy.model) < below


def _displaces_below(view: View, ticket: TicketView) -> float:
    """Return how many waiters protect another model from being displaced for a waiter; see `eviction_order`."""
    requesting = view.models[ticket.model]
    usable = requesting.usable_by(ticket.member)
    if usable and ticket.usable_on:
        # Two waiters, each bound to the device where only the other one's copy lies, would otherwise wait for ever.
        loaded: list[IdleInstance | BusyInstance] = [*view.idle, *(one for one in view.busy if not one.loading)]
        mine = (one for one in loaded if one.model == ticket.model and one.owner in (None, ticket.member))
        usable = any(one.is_within(ticket.usable_on) for one in mine)
    return requesting.waiting if usable else math.inf


def _waiters_of(view: View, row: int) -> int:
    model = view.models.get(row)
    return model.waiting if model else 0
