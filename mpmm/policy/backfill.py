"""Backfill: loads behind the head of the line that fit beside what is reserved for it, so that they do not delay it.

That is an expectation: a later plan may choose other instances to make room for the head. So once overtaking is over,
see `fairness`, nothing is loaded or resumed where the head may load.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from mpmm.policy.admission import free_mb
from mpmm.policy.fairness import overtaking_over
from mpmm.policy.placement import best_place
from mpmm.policy.plan_state import PlanState, as_resume
from mpmm.policy.sharing import presumed
from mpmm.policy.view import Decision, DeviceView, Load, ModelView, Reason, TicketView

__all__ = ["backfill"]


def backfill(state: PlanState, ticket: TicketView, model: ModelView) -> Decision | None:
    """Let a waiter load, or resume, an instance that fits beside the room for the head of the line; None if none."""
    if state.head is None or ticket.steady:
        return None
    part = state.usable_part(ticket, model)
    # A request that only resumes does not want an instance to use, of which there may be some.
    if not ticket.resumes and (state.must_run_alone(ticket, model) or part.shared or state.has_most_copies(model)):
        state.note_hopeless(ticket)
        return None
    usable = part.usable_by(ticket.member) or presumed(part, state.seen).coming_for(ticket.member)
    instance = state.suspended_for(ticket)
    if instance is None if ticket.resumes else usable:
        return None
    if instance is not None:
        load = _load_beside_head(state, *as_resume(ticket, model, instance))
        if load is not None:
            return state.resume_instead(load, instance)
        # Another one may be loaded on another device; where this one lies, there is no room for it either.
        return None if ticket.resumes else _load_beside_head(state, ticket, model, instance.devices)
    load = _load_beside_head(state, ticket, model)
    if load is None:
        state.note_hopeless(ticket)
    return load


def _load_beside_head(
    state: PlanState, ticket: TicketView, model: ModelView, but_not_on: Collection[int] = ()
) -> Load | None:
    """Let a waiter load on devices where that does not delay the head of the line; None if there is no room."""
    head, eviction_plan = state.head, state.eviction_plan
    if head is None:
        return None
    share_mb = model.need_mb / ticket.span
    left = _left_mb(state)
    beside = [one for one in _beside_head(state, ticket, model, head, left) if one.device not in but_not_on]
    place = best_place(beside, share_mb, state.slack, ticket.span)
    if place is None:
        return None
    if eviction_plan:
        taken = {device.device for device in place.devices}
        left_mb = tuple(mb - share_mb * (device in taken) for device, mb in left.items())
        state.eviction_plan = replace(eviction_plan, left_mb=left_mb)
    # The devices without the room that is kept for the head of the line.
    devices = tuple(state.devices[device.device] for device in place.devices)
    return state.load_on(ticket, devices, model.need_mb, Reason.BACKFILL, head.model)


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
