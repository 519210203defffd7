"""Whether a waiter may load, and what happens to it if not: the rules for one waiter that no other is ahead of.

`load` asks each rule of `RULES` in order; the first that has an answer gives it. The order matters: impossible loads
are refused first, then free memory is used, and room is made only for the waiters that are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mpmm.policy.admission import free_mb, largest_limit_mb, limit_mb, widened
from mpmm.policy.eviction import EvictionPlan
from mpmm.policy.fairness import overtaking_limited
from mpmm.policy.making_room import (
    choose_room,
    closed_devices_needed,
    is_delayed_by_loads,
    room_by_unloading_all,
    wait_for_others,
    wait_without_room,
    with_closed_devices,
)
from mpmm.policy.placement import Place, best_place
from mpmm.policy.plan_state import PlanState
from mpmm.policy.quiet_start import start_quietly, wait_for_quiet_start
from mpmm.policy.sharing import presumed
from mpmm.policy.view import Decision, DeviceView, ModelView, Reason, Refuse, TicketView, Wait, Why

__all__ = ["RULES", "load", "needs_only_free_memory", "refuse"]

# Called for a waiter that could load now: lets another one, whose load should come first, load; tells if there is one.
LoadOtherFirst = Callable[[TicketView, ModelView], bool]


@dataclass(slots=True)
class _Attempt:
    """A waiter's attempt to load. where: the devices that are open to it; place: those that it would get now."""

    state: PlanState
    ticket: TicketView
    model: ModelView
    need_mb: float
    share_mb: float
    load_other_first: LoadOtherFirst
    where: list[DeviceView]
    place: Place | None = None

    def look_for_place(self) -> None:
        """Find the devices that are open, with the limits for this load, and those of them that it would take."""
        state, share_mb = self.state, self.share_mb
        self.where = [widened(device, share_mb, state.slack) for device in state.open_to(self.ticket)]
        leasable = state.leasable(self.where, self.model, share_mb)
        self.place = best_place(leasable, share_mb, state.slack, self.ticket.span)


def load(state: PlanState, ticket: TicketView, model: ModelView, load_other_first: LoadOtherFirst) -> Decision | None:
    """Return what happens to a waiter whose model is to be loaded; None if it waits for devices closed by others."""
    attempt = _attempt(state, ticket, model, load_other_first)
    refused = _refuse(attempt)
    if refused is not None:
        return refused
    attempt.look_for_place()
    if len(attempt.where) < ticket.span:
        # On the devices where it may load, an instance runs alone or starts quietly, or is about to.
        return wait_for_quiet_start(state, ticket, attempt.need_mb, state.allowed_for(ticket))
    closed = [] if attempt.place is not None else closed_devices_needed(state, ticket, attempt.where, attempt.share_mb)
    if closed:
        if state.count_fitting(attempt.where, attempt.share_mb, external=False) < ticket.span:
            # The end of leases would serve it, too, so later leases must not starve it.
            _await_leases(attempt)
        return wait_for_quiet_start(state, ticket, attempt.need_mb, closed)
    for rule in RULES:
        decision = rule(attempt)
        if decision is not None:
            return decision
    raise AssertionError("the last rule has an answer for every waiter")


def needs_only_free_memory(state: PlanState, ticket: TicketView, model: ModelView) -> bool:
    """Tell whether a load takes nothing but free memory, or is refused."""
    largest = largest_limit_mb(state.allowed_for(ticket), state.slack, ticket.span) * ticket.span
    need_mb = state.need_mb(ticket, model)
    fits = best_place(state.open_to(ticket), need_mb / ticket.span, state.slack, ticket.span) is not None
    return fits or need_mb > largest


def refuse(state: PlanState, ticket: TicketView, model: ModelView) -> Decision | None:
    """Refuse a waiter that cannot load now, if its load can never fit; None if it may, or need not load.

    Otherwise it would wait for its turn, perhaps for long, only to be refused then.
    """
    if not state.view.devices or state.must_run_alone(ticket, model):
        return None
    if model.suspending or state.has_suspended_for(ticket):
        return None
    part = presumed(state.usable_part(ticket, model), state.seen)
    if not ticket.preload and (part.usable_by(ticket.member) or part.coming_for(ticket.member)):
        return None
    return _refuse(_attempt(state, ticket, model, _no_other_first))


def _no_other_first(ticket: TicketView, model: ModelView) -> bool:
    return False


def _attempt(state: PlanState, ticket: TicketView, model: ModelView, load_other_first: LoadOtherFirst) -> _Attempt:
    need_mb = state.need_mb(ticket, model)
    return _Attempt(state, ticket, model, need_mb, need_mb / ticket.span, load_other_first, [])


def _refuse(attempt: _Attempt) -> Decision | None:
    """Refuse a load that can never fit, unless there is a copy to wait for."""
    state, ticket, model, need_mb = attempt.state, attempt.ticket, attempt.model, attempt.need_mb
    largest = largest_limit_mb(state.allowed_for(ticket), state.slack, ticket.span) * ticket.span
    if need_mb > largest:
        if state.usable_part(ticket, model).usable_by(ticket.member) and not ticket.preload:
            # A second copy would be too large, but there is one to wait for.
            return Wait(ticket.row, Reason.ONLY_COPY, Why(Reason.ONLY_COPY, need_mb, largest))
        return Refuse(ticket.row, Why(Reason.TOO_LARGE, need_mb, largest))
    if ticket.preload and not _fit_together(state, ticket, _lasting_copies(attempt), attempt.share_mb):
        return Refuse(ticket.row, Why(Reason.TOO_LARGE, need_mb, largest))
    return None


def _lasting_copies(attempt: _Attempt) -> int:
    """Return how many copies a preload's load needs room beside: those that its member can use where it may load.

    Others lie elsewhere, are to be unloaded when they are given back, or can be evicted for the preload.
    """
    ticket = attempt.ticket
    there = replace(ticket, usable_on=ticket.loadable_on or ticket.usable_on)
    part = attempt.state.usable_part(there, attempt.model)
    return part.usable_by(ticket.member) + part.coming_for(ticket.member)


def _fit_together(state: PlanState, ticket: TicketView, copies: int, share_mb: float) -> bool:
    """Tell whether the devices could hold one copy more than `copies` of the same size, with nothing else there."""
    if share_mb <= 0:
        return True
    places = sum(limit_mb(device, state.slack) // share_mb for device in state.allowed_for(ticket))
    return copies * ticket.span + ticket.span <= places


# ---- the rules, in the order in which they are asked -----------------------------------------------------------


def _starts_quietly(attempt: _Attempt) -> Decision | None:
    if attempt.place is None or not attempt.ticket.steady:
        return None
    state, ticket, share_mb = attempt.state, attempt.ticket, attempt.share_mb
    leasable = state.leasable(attempt.where, attempt.model, share_mb)
    return start_quietly(state, ticket, leasable, attempt.place.devices, share_mb)


def _fits(attempt: _Attempt) -> Decision | None:
    """Load in free memory, unless a model for which more requests wait takes it first."""
    if attempt.place is None:
        return None
    if attempt.load_other_first(attempt.ticket, attempt.model):
        attempt.look_for_place()
    if attempt.place is None:
        return None
    another = attempt.state.usable_part(attempt.ticket, attempt.model).usable_by(attempt.ticket.member)
    reason = Reason.ANOTHER_COPY if another else attempt.place.reason
    return attempt.state.load_on(attempt.ticket, attempt.place.devices, attempt.need_mb, reason)


def _leases_stay_in_order(attempt: _Attempt) -> Decision | None:
    """Keep a lease behind earlier waiters that wait for leases to end."""
    if not attempt.model.lease or not attempt.state.lease_is_awaited:
        return None
    return Wait(attempt.ticket.row, Reason.BEHIND, Why(Reason.BEHIND, attempt.need_mb))


def _waits_for_others(attempt: _Attempt) -> Decision | None:
    """Let a waiter that no eviction would help wait without holding up others."""
    where = with_closed_devices(attempt.state, attempt.ticket, attempt.where, attempt.share_mb)
    waits = wait_for_others(attempt.state, attempt.ticket, where, attempt.share_mb)
    if waits is not None and waits.reason == Reason.LEASED:
        _await_leases(attempt)
    return waits


def _await_leases(attempt: _Attempt) -> None:
    """Have later leases take their turn behind a waiter that the end of leases would serve."""
    attempt.state.lease_is_awaited = True
    attempt.state.awaiting_leases.append((attempt.ticket, attempt.share_mb))


def _makes_room(attempt: _Attempt) -> Decision | None:
    """Evict for a waiter, or let it wait at the head of the line for memory that comes free; always has an answer."""
    state, ticket, share_mb, where = attempt.state, attempt.ticket, attempt.share_mb, attempt.where
    due = overtaking_limited(state.view, ticket)
    plan = choose_room(state, ticket, share_mb, due) or room_by_unloading_all(state, ticket, where, share_mb)
    state.eviction_plan = plan
    state.overtaking_is_free = is_delayed_by_loads(state, ticket, share_mb)
    if plan is None:
        return wait_without_room(state, ticket, where, attempt.need_mb)
    return _carry_out(attempt, plan, due)


RULES: tuple[Callable[[_Attempt], Decision | None], ...] = (
    _starts_quietly,
    _fits,
    _leases_stay_in_order,
    _waits_for_others,
    _makes_room,
)


def _carry_out(attempt: _Attempt, plan: EvictionPlan, due: bool) -> Decision:
    """Evict the plan's victims, or wait for the first of: instances in use, unloads, memory that is coming back."""
    state, ticket, need_mb = attempt.state, attempt.ticket, attempt.need_mb
    free = math.fsum(free_mb(device, state.slack) for device in plan.devices)
    on = state.named(plan.devices)
    if plan.victims and (due or not plan.awaited):
        reason = Reason.LOWEST_SCORE if plan.reload_cost is None else Reason.CHEAPEST_RELOAD
        coming_mb = math.fsum(one.mb for one in plan.victims)
        why = Why(reason, need_mb, free, coming_mb, plan.reload_cost or 0.0, plan.victims[0].model, on)
        state.room_is_coming = not plan.awaited and any(one.suspendable for one in plan.victims)
        return state.evict_for(ticket, plan.victims, why)
    if plan.awaited:
        coming_mb = math.fsum(one.mb for one in plan.awaited)
        why = Why(Reason.IN_USE, need_mb, free, coming_mb, plan.drain_s, plan.awaited[0].model, on)
        return state.wait_at_head(ticket, why)
    unloading_mb = math.fsum(device.unloading_mb for device in plan.devices)
    if unloading_mb > 0:
        state.room_is_coming = any(device.suspending for device in plan.devices)
        return state.wait_at_head(ticket, Why(Reason.UNLOADING, need_mb, free, unloading_mb, devices=on))
    returning_mb = math.fsum(device.returning_mb for device in plan.devices)
    return state.wait_at_head(ticket, Why(Reason.RETURNING, need_mb, free, returning_mb, devices=on))
