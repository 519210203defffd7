"""A quiet start: a load that sizes itself by the free memory, so nothing else may load or unload on its devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpmm.policy.admission import free_mb
from mpmm.policy.placement import best_place
from mpmm.policy.plan_state import PlanState
from mpmm.policy.view import Decision, DeviceView, Reason, TicketView, Wait, Why

__all__ = ["start_quietly", "wait_for_quiet_start"]


def start_quietly(
    state: PlanState, ticket: TicketView, where: Sequence[DeviceView], found: Sequence[DeviceView], share_mb: float
) -> Decision:
    """Let a waiter load where nothing else is being loaded or unloaded; failing that, let nothing begin on `found`.

    Only requests before it in the queue can still load there, so it waits for these, and for what has begun.
    """
    need_mb = share_mb * ticket.span
    calm = best_place([one for one in where if not _is_restless(state, one)], share_mb, state.slack, ticket.span)
    devices = calm.devices if calm is not None else tuple(found)
    if calm is None:
        on, free = state.named(devices), math.fsum(free_mb(device, state.slack) for device in devices)
        why = Why(Reason.RESTLESS, need_mb, free, other=ticket.model, devices=on)
        decision: Decision = Wait(ticket.row, why.reason, why)
    else:
        decision = state.load_on(ticket, devices, need_mb, calm.reason)
    state.quiet.update({device.device: ticket.model for device in devices})
    return decision


def wait_for_quiet_start(
    state: PlanState, ticket: TicketView, need_mb: float, where: Sequence[DeviceView]
) -> Wait | None:
    """Let a waiter wait for another one's quiet start on one of these devices; None if there is none."""
    for device in where:
        other = state.quiet.get(device.device)
        if other is not None:
            why = Why(Reason.QUIET, need_mb, other=other, devices=state.named([device]))
            return Wait(ticket.row, why.reason, why)
    return None


def _is_restless(state: PlanState, device: DeviceView) -> bool:
    """Tell whether something is being loaded on a device, or unloaded from it."""
    loading = any(one.loading and device.device in one.devices for one in state.view.busy)
    return loading or bool(device.unloading) or device.returning_mb > 0 or device.device in state.begun
