"""Room ahead: room for waiters behind the head of the line, while instances are being suspended for the head.

An unload gives its memory back at once; then the head of the line loads, and the next waiter becomes the head.
Suspending an instance takes seconds. If the next waiter were considered only after that, one suspension would wait for
the other, although they do not disturb each other. So room is made at the same time for waiters behind the head, in the
order of the queue, as if the waiters before them were already loading.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mpmm.policy.admission import free_mb, widened
from mpmm.policy.backoff import left_s
from mpmm.policy.eviction import EvictionPlan, plan_eviction
from mpmm.policy.fairness import overtaking_over
from mpmm.policy.plan_state import PlanState, as_resume
from mpmm.policy.sharing import presumed
from mpmm.policy.view import Decision, ModelView, Reason, TicketView, Wait, Why

__all__ = ["make_room_ahead"]


def make_room_ahead(state: PlanState, ticket: TicketView, model: ModelView) -> Decision | None:
    """Evict for a waiter behind the head of the line, or tell it that its room is coming; None if neither.

    The first waiter for which idle instances are not enough, or would be unloaded, ends this: it becomes the head of
    the line next, and room is made for it then. Nothing is done if the host could not take all that is loaded: while
    instances are being suspended they take memory on both sides, so with several at a time others would be dropped. In
    the simulator, with 64 clients and host memory for a third or two thirds of the models, that takes up to a tenth
    more time. Nor is anything done once a waiter may no longer be overtaken, see `fairness`.
    """
    if not state.room_is_coming or not _loads_next(state, ticket, model):
        return None
    if any(overtaking_over(state.view, other) for other in state.view.tickets):
        state.room_is_coming = False
        return None
    instance = state.suspended_for(ticket)
    if instance is not None:
        ticket, model = as_resume(ticket, model, instance)
    plan = _cheapest_room(state, ticket, model.need_mb) if ticket.span == 1 else None
    if plan is None or (plan.victims and not _all_are_suspended(state, plan)):
        state.room_is_coming = False
        return None
    [device], [left_mb] = plan.devices, plan.left_mb
    state.keep_room_ahead(ticket, device.device, left_mb)
    free, on = free_mb(device, state.slack), state.named(plan.devices)
    if not plan.victims:
        why = Why(Reason.UNLOADING, model.need_mb, free, device.unloading_mb, devices=on)
        return Wait(ticket.row, why.reason, why)
    reason = Reason.LOWEST_SCORE if plan.reload_cost is None else Reason.CHEAPEST_RELOAD
    why = Why(reason, model.need_mb, free, plan.freed_mb, plan.reload_cost or 0.0, plan.victims[0].model, on)
    return state.evict_for(ticket, plan.victims, why, first=False)


def _loads_next(state: PlanState, ticket: TicketView, model: ModelView) -> bool:
    """Tell whether a waiter would load if it were the head of the line, instead of waiting for an existing instance."""
    if ticket.steady or ticket.preload or model.lease or left_s(model) > 0 or state.must_run_alone(ticket, model):
        return False
    if model.usable_by(ticket.member) or presumed(model, state.seen).coming_for(ticket.member):
        return False
    return not (model.suspending or state.has_most_copies(model))


def _all_are_suspended(state: PlanState, plan: EvictionPlan) -> bool:
    """Tell whether all that a plan evicts would be suspended, and the host could take everything that is loaded."""
    view = state.view
    loaded_mb = math.fsum(mb for one in (*view.idle, *view.busy) for mb in (one.mb, *dict(one.other_shares).values()))
    return loaded_mb <= view.host_free_mb and all(one.suspendable for one in plan.victims)


def _cheapest_room(state: PlanState, ticket: TicketView, need_mb: float) -> EvictionPlan | None:
    """Return the cheapest plan with idle instances, beside the room that is kept for waiters before this one."""
    head_plan = state.eviction_plan
    left = {one.device: mb for one, mb in zip(head_plan.devices, head_plan.left_mb, strict=True)} if head_plan else {}
    idle = [one for one in state.unused() if not state.quiet.keys() & set(one.devices)]
    plans = []
    for open_device in state.open_to(ticket):
        device = widened(open_device, need_mb, state.slack)
        if device.device in left:
            coming_mb = free_mb(device, state.slack) + device.returning_mb + device.unloading_mb
            kept_mb = coming_mb - left[device.device]
            device = replace(device, reserved_mb=device.reserved_mb + kept_mb)
        plan = plan_eviction(state.view, device, idle, (), need_mb, ticket)
        if plan is not None:
            plans.append(plan)
    return min(plans, key=lambda plan: plan.cost, default=None)
