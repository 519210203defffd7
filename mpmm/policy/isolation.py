"""Isolation: a model whose size is unknown is loaded alone on a device, which is drained for that, and is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpmm.policy.admission import free_mb, limit_mb
from mpmm.policy.placement import soonest_alone
from mpmm.policy.plan_state import PlanState, most_free_mb
from mpmm.policy.view import Decision, DeviceView, Evict, Load, Reason, Refuse, TicketView, Wait, Why

__all__ = ["devices_to_drain", "is_kept_out_by_leases", "isolate"]


def devices_to_drain(state: PlanState, ticket: TicketView) -> tuple[DeviceView, ...]:
    """Return the devices that are drained for a waiter that has to run alone; maybe fewer than it spans."""
    model = state.view.models[ticket.model]
    need_mb, bound_mb = model.need_mb / ticket.span, model.bound_mb / ticket.span
    where = state.open_to(ticket)
    # On devices where it ran out of memory although it had all of it, it would do so again.
    large = [device for device in where if limit_mb(device, state.slack) > bound_mb]
    where = large if len(large) >= ticket.span else where
    roomy = [device for device in where if limit_mb(device, state.slack) - device.leased_mb >= need_mb]
    costs = []
    for device in roomy if len(roomy) >= ticket.span else where:
        busy = [one.free_in_s for one in state.view.busy if device.device in one.devices]
        idle_mb = math.fsum(one.mb_on(device.device) for one in state.idle_on({device.device}))
        to_unload_mb = idle_mb - free_mb(device, state.slack)
        costs.append((device, max(busy, default=0.0), state.busy[device.device], to_unload_mb))
    return soonest_alone(costs, ticket.span)


def is_kept_out_by_leases(state: PlanState, place: Sequence[DeviceView], share_mb: float) -> bool:
    """Tell whether a model that is to run alone waits for leases to end: no instance runs beside it, but leases stay.

    Its size is only assumed, but the accounts have to be right all the same.
    """
    return any(device.leased_mb for device in place) and state.count_fitting(place, share_mb, external=False) < len(
        place
    )


def isolate(state: PlanState, ticket: TicketView, need_mb: float) -> Decision | None:
    """Let a waiter load alone on as many devices as it spans, or have these drained for it.

    None if it waits for devices that are already being drained, or in isolation.
    """
    place = devices_to_drain(state, ticket)
    if len(state.allowed_for(ticket)) < ticket.span:
        return Refuse(ticket.row, Why(Reason.TOO_LARGE, need_mb, 0.0))
    if len(place) < ticket.span:
        return None
    if is_kept_out_by_leases(state, place, need_mb / ticket.span):
        state.lease_is_awaited = True
        why = Why(Reason.LEASED, need_mb, most_free_mb(place, state.slack), devices=state.named(place))
        return Wait(ticket.row, why.reason, why)
    state.repeated_waits.clear()
    for device in place:
        del state.devices[device.device]
    return _drain(state, ticket, place, need_mb) or _run_alone(state, ticket, place, need_mb)


def _drain(state: PlanState, ticket: TicketView, place: Sequence[DeviceView], need_mb: float) -> Decision | None:
    """Let a waiter wait until nothing is in use on its devices, then unload idle instances; None if they are empty."""
    rows, on = {device.device for device in place}, state.named(place)
    if any(state.busy[device] for device in rows):
        used = [one.free_in_s for one in state.view.busy if rows.intersection(one.devices)]
        why = Why(Reason.DRAINING, need_mb, seconds=max(used, default=0.0), devices=on)
        return Wait(ticket.row, why.reason, why, first=True)
    idle = state.idle_on(rows)
    for instance in idle:
        state.idle[instance.model].remove(instance)
    evictable = tuple(instance.row for instance in idle if not instance.pinned)
    return Evict(ticket.row, evictable, Why(Reason.FLUSHED, need_mb, devices=on)) if evictable else None


def _run_alone(state: PlanState, ticket: TicketView, place: Sequence[DeviceView], need_mb: float) -> Decision:
    """Let a waiter load alone as soon as unloaded memory has come back, so that only its own is measured."""
    on, free = state.named(place), min(free_mb(device, state.slack) for device in place)
    if any(device.unloading for device in place):
        unloading_mb = math.fsum(device.unloading_mb for device in place)
        why = Why(Reason.UNLOADING, need_mb, free, unloading_mb, devices=on)
        return Wait(ticket.row, why.reason, why, first=True)
    returning_mb = math.fsum(device.returning_mb for device in place)
    if returning_mb > 0:
        why = Why(Reason.RETURNING, need_mb, free, returning_mb, devices=on)
        return Wait(ticket.row, why.reason, why, first=True)
    chosen = tuple(device.device for device in place)
    state.count_load(ticket, chosen)
    return Load(ticket.row, chosen, need_mb, True, Why(Reason.ALONE, need_mb, free, devices=on))
