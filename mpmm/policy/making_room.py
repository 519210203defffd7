"""Making room for a waiter whose load does not fit: what to evict or to wait for, and whether anything would help.

`eviction` decides what to unload on one device. This module looks at all devices on which a waiter may load, with what
the plan so far has left of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpmm.policy.admission import widened
from mpmm.policy.eviction import EvictionPlan, combine, plan_eviction, waiting_pays
from mpmm.policy.plan_state import PlanState, most_free_mb
from mpmm.policy.view import BusyInstance, DeviceView, ModelView, Reason, TicketView, Wait, Why

__all__ = [
    "cheapest_room",
    "choose_room",
    "closed_devices_needed",
    "holds_up_others",
    "is_delayed_by_loads",
    "room_by_unloading_all",
    "wait_for_others",
    "wait_without_room",
    "with_closed_devices",
]


def choose_room(state: PlanState, ticket: TicketView, share_mb: float, due: bool) -> EvictionPlan | None:
    """Return the cheapest plan that makes room for `share_mb` on each of a waiter's devices.

    The plan may wait for instances in use, if that is better than unloading idle ones. due: the waiter has been
    overtaken for long enough, so it takes what is available now.
    """
    view = state.view
    now = cheapest_room(state, ticket, share_mb, ())
    if now is not None and (due or not now.victims or not view.busy):
        return now
    later = cheapest_room(state, ticket, share_mb, view.busy)
    if now is None or (later is not None and waiting_pays(later, now, view.models[ticket.model])):
        return later
    return now


def cheapest_room(
    state: PlanState, ticket: TicketView, share_mb: float, busy: Sequence[BusyInstance]
) -> EvictionPlan | None:
    """Return the cheapest plan with idle instances and those of `busy`; None if all of them are too little."""
    quiet = state.quiet.keys()
    idle = [one for one in state.unused() if not quiet & set(one.devices)]
    where = (widened(device, share_mb, state.slack) for device in state.open_to(ticket))
    plans = [plan for device in where if (plan := plan_eviction(state.view, device, idle, busy, share_mb, ticket))]
    return _cheapest_of(plans, ticket.span)


def room_by_unloading_all(
    state: PlanState, ticket: TicketView, where: list[DeviceView], share_mb: float
) -> EvictionPlan | None:
    """Return a plan that unloads everything from devices where only the accounts show too little room.

    Part of their external memory may be memory by which instances have grown. Only an empty device tells.
    """
    plans = []
    for device in where:
        grown_mb = device.external_mb - device.external_least_mb
        if grown_mb <= 0 or not state.count_fitting([device], share_mb, pinned=True):
            continue
        victims = [
            one
            for one in state.idle_on({device.device})
            if not one.pinned and not state.quiet.keys() & set(one.devices)
        ]
        awaited = [one for one in state.view.busy if device.device in one.devices]
        if not (victims or awaited or device.unloading or device.returning_mb):
            continue
        freed_mb = math.fsum(one.mb_on(device.device) for one in (*victims, *awaited))
        drain_s = max((one.free_in_s for one in awaited), default=0.0)
        plans.append(EvictionPlan((device,), tuple(victims), tuple(awaited), None, drain_s, freed_mb, (0.0,)))
    return _cheapest_of(plans, ticket.span)


def holds_up_others(state: PlanState, ticket: TicketView, model: ModelView) -> bool:
    """Tell whether a waiter that was the head of the line still is: others may pass it if no eviction would help it."""
    if state.has_most_copies(model):
        return False
    where, share_mb = state.allowed_for(ticket), state.need_mb(ticket, model) / ticket.span
    if state.count_fitting(where, share_mb, pinned=True) < ticket.span:
        return False
    if any(state.busy[device.device] or device.unloading or device.returning_mb for device in where):
        return True
    # Nothing comes free by itself, so only an eviction could help, with external memory as it is now.
    return (
        cheapest_room(state, ticket, share_mb, ()) is not None
        or room_by_unloading_all(state, ticket, where, share_mb) is not None
    )


def is_delayed_by_loads(state: PlanState, ticket: TicketView, share_mb: float) -> bool:
    """Tell whether only the end of loads that have begun can make room: waiters that reuse instances do not delay that.

    Instances in use can make room, too. If these are enough, a load beside them does not matter.
    """
    if not state.begun and not any(one.loading for one in state.view.busy):
        return False
    in_use = [one for one in state.view.busy if not one.loading]
    in_use += [
        BusyInstance(one.row, one.model, one.device, one.mb, math.inf, one.pinned, other_shares=one.other_shares)
        for one in state.taken
    ]
    return cheapest_room(state, ticket, share_mb, in_use) is None


def with_closed_devices(
    state: PlanState, ticket: TicketView, where: Sequence[DeviceView], share_mb: float
) -> list[DeviceView]:
    """Return these devices, and those where a waiter may load once a model there runs no longer alone, or has started.

    What leaves too little room on the open devices alone is not what the waiter waits for.
    """
    rows = {device.device for device in where}
    closed = (device for device in state.allowed_for(ticket) if device.device not in rows)
    return [*where, *(widened(device, share_mb, state.slack) for device in closed)]


def closed_devices_needed(
    state: PlanState, ticket: TicketView, where: Sequence[DeviceView], share_mb: float
) -> list[DeviceView]:
    """Return the closed devices that could take a waiter's load, if no eviction on the open ones is enough for it."""
    allowed = with_closed_devices(state, ticket, where, share_mb)
    if len(allowed) == len(where) or state.count_fitting(where, share_mb, pinned=True) >= ticket.span:
        return []
    if state.count_fitting(allowed, share_mb, pinned=True) < ticket.span:
        return []
    return [device for device in allowed[len(where) :] if state.count_fitting([device], share_mb, pinned=True)]


def wait_for_others(state: PlanState, ticket: TicketView, where: list[DeviceView], share_mb: float) -> Wait | None:
    """Let a waiter wait if leases, external memory or pinned instances leave it too little room; None if they do not.

    Nothing that the manager can unload would help it, so no other waiter is held up for it, perhaps for hours.
    """
    need_mb, free = share_mb * ticket.span, most_free_mb(where, state.slack)
    if state.count_fitting(where, share_mb, external=False) < ticket.span:
        state.lease_is_awaited = True
        return Wait(ticket.row, Reason.LEASED, Why(Reason.LEASED, need_mb, free))
    if state.count_fitting(where, share_mb) < ticket.span:
        external_mb = math.fsum(device.external_least_mb for device in where)
        return Wait(ticket.row, Reason.EXTERNAL, Why(Reason.EXTERNAL, need_mb, free, external_mb))
    if state.count_fitting(where, share_mb, pinned=True) < ticket.span:
        return Wait(ticket.row, Reason.PINNED, Why(Reason.PINNED, need_mb, free))
    return None


def wait_without_room(state: PlanState, ticket: TicketView, where: list[DeviceView], need_mb: float) -> Wait:
    """Let a waiter wait for which no room can be made now. It holds up others only if that can change by itself.

    If nothing is in use, only others can change that: memory by which pinned instances have grown counts as external,
    say.
    """
    free = most_free_mb(where, state.slack)
    rows = {device.device for device in where}
    if any(state.busy[row] for row in rows):
        # Some are in use, being loaded, or admitted by this plan.
        return state.wait_at_head(ticket, Why(Reason.MEMORY, need_mb, free))
    if any(state.pinned_mb_on(row) for row in rows):
        return Wait(ticket.row, Reason.PINNED, Why(Reason.PINNED, need_mb, free))
    external_mb = math.fsum(device.external_mb for device in where)
    return Wait(ticket.row, Reason.EXTERNAL, Why(Reason.EXTERNAL, need_mb, free, external_mb))


def _cheapest_of(plans: list[EvictionPlan], span: int) -> EvictionPlan | None:
    """Combine the cheapest plans for as many devices as a waiter spans; None if there are too few."""
    if len(plans) < span:
        return None
    return combine(sorted(plans, key=lambda plan: plan.cost)[:span])
