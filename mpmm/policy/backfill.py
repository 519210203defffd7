"""Backfill: loads behind the head of the line that fit beside what is reserved for it, so that they do not delay it.

That is an expectation: a later plan may choose other instances to make room for the head. So once overtaking is over,
see `fairness`, nothing is loaded or resumed where the head may load.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mpmm.policy.admission import free_mb
from mpmm.policy.fairness import overtaking_over
from mpmm.policy.placement import best_place
from mpmm.policy.plan_state import PlanState, resized
from mpmm.policy.sharing import presumed
from mpmm.policy.view import Decision, DeviceView, ModelView, Reason, TicketView

__all__ = ["backfill"]


def backfill(state: PlanState, ticket: TicketView, model: ModelView) -> Decision | None:
    """Let a waiter load, or resume, an instance that fits beside the room for the head of the line; None if none."""
    head, eviction_plan = state.head, state.eviction_plan
    if head is None or ticket.steady:
        return None
    # A request that only resumes does not want an instance to use, of which there may be some.
    if not ticket.resumes and (state.must_run_alone(ticket, model) or model.shared or state.has_most_copies(model)):
        state.no_backfill.add(model.model)
        return None
    usable = model.usable_by(ticket.member) or presumed(model, state.seen).coming_for(ticket.member)
    instance = state.suspended_for(ticket)
    if instance is None if ticket.resumes else usable:
        return None
    if instance is not None:
        mb = math.fsum(instance.mb_on(device) for device in instance.devices)
        ticket = replace(ticket, loadable_on=instance.devices, span=len(instance.devices))
        model = resized(model, mb)
    share_mb = model.need_mb / ticket.span
    left = _left_mb(state)
    place = best_place(_beside_head(state, ticket, model, head, left), share_mb, state.slack, ticket.span)
    if place is None:
        state.no_backfill.add(model.model)
        return None
    if eviction_plan:
        taken = {device.device for device in place.devices}
        left_mb = tuple(mb - share_mb * (device in taken) for device, mb in left.items())
        state.eviction_plan = replace(eviction_plan, left_mb=left_mb)
    # The devices without the room that is kept for the head of the line.
    devices = tuple(state.devices[device.device] for device in place.devices)
    load = state.load_on(ticket, devices, model.need_mb, Reason.BACKFILL, head.model)
    return load if instance is None else state.resume_instead(load, instance)


def _left_mb(state: PlanState) -> dict[int, float]:
    """Return what is left over, by device, of the room that is made for the head of the line."""
    plan = state.eviction_plan
    return dict(zip((device.device for device in plan.devices), plan.left_mb, strict=True)) if plan else {}


def _beside_head(
    state: PlanState, ticket: TicketView, model: ModelView, head: TicketView, left: dict[int, float]
) -> list[DeviceView]:
    """Return where a waiter may load without delaying the head of the line, with the head's room as reserved."""
    free = []
    is_over = overtaking_over(state.view, head)
    for device in state.leasable(state.open_to(ticket), model, model.need_mb / ticket.span):
        if is_over and (not head.loadable_on or device.device in head.loadable_on):
            continue
        if device.device in left:
            kept_mb = max(0.0, free_mb(device, state.slack) - left[device.device])
            free.append(replace(device, reserved_mb=device.reserved_mb + kept_mb))
        elif state.eviction_plan or (head.loadable_on and device.device not in head.loadable_on):
            # As long as it is unknown how to make room for the head, it may need whatever comes free on its devices.
            free.append(device)
    return free
