"""The plan: walk the queue and decide for every waiter what happens now.

`Planner` decides in which order waiters are answered, and with which kind of answer. The details of an answer are
decided in `isolation` (unknown models), `loading` (known ones), `backfill` and `room_ahead` (waiters behind the head of
the line); they share `plan_state`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mpmm.policy.backfill import backfill
from mpmm.policy.backoff import left_s
from mpmm.policy.fairness import overtaking_limited, overtaking_over, queue_order
from mpmm.policy.isolation import devices_to_drain, is_kept_out_by_leases, isolate
from mpmm.policy.loading import load, needs_only_free_memory, refuse
from mpmm.policy.making_room import choose_room, holds_up_others
from mpmm.policy.placement import best_place
from mpmm.policy.plan_state import PlanState, as_resume, can_use
from mpmm.policy.quiet_start import wait_for_quiet_start
from mpmm.policy.room_ahead import make_room_ahead
from mpmm.policy.sharing import waiting_is_sooner
from mpmm.policy.view import (
    BusyInstance,
    Decision,
    Evict,
    Grant,
    IdleInstance,
    Load,
    ModelView,
    Reason,
    Refuse,
    Satisfied,
    SuspendedInstance,
    TicketView,
    View,
    Wait,
    Why,
)

__all__ = ["Plan", "Planner", "make_plan"]


# Reasons why one device has no room, although another one may.
_ELSEWHERE = (Reason.LEASED, Reason.EXTERNAL, Reason.PINNED, Reason.QUIET)


@dataclass(frozen=True)
class Plan:
    """Decisions in the order of the queue.

    queue_held_up: a waiter holds up others, so tickets that are not in the view could get little but idle instances.
    """

    decisions: tuple[Decision, ...]
    queue_held_up: bool


def make_plan(view: View) -> Plan:
    """Return what happens to the waiters in the view, in the order in which it is to be carried out.

    Nothing begins on a device on which an instance runs alone. On other devices idle instances are handed out first,
    as far as `fairness` lets waiters overtake. Then each waiter, in the order of the queue, may load where its model
    fits, or has room made for it, or waits. Behind the first one that waits for room, the head of the line, only loads
    that fit beside its reservation begin. A device that is drained for an unknown model gets nothing new. Tickets
    without a decision wait behind others.
    """
    return Planner(view).plan()


class Planner:
    """Walks the queue once. Later decisions cannot use what earlier ones have taken, see `PlanState`."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._state = PlanState(view)
        # The waiters that get no idle instance, in order, and the answers of those that are answered out of turn.
        self._order: list[TicketView] = []
        self._early: dict[int, Decision | None] = {}
        # The waiter that a later one's load was let past.
        self._passed: TicketView | None = None
        # How many waiters of each model were told to wait for existing instances.
        self._sharing: Counter[int] = Counter()
        # The waiters for which devices are drained, by model.
        self._draining: dict[int, TicketView] = {}

    def plan(self) -> Plan:
        """Return the plan; call it once."""
        state = self._state
        if self._view.devices and not state.devices:
            return Plan(tuple(self._refused_at_once()), queue_held_up=True)
        order = queue_order(self._view)
        decided: dict[int, Decision | None] = dict(self._grant_idle(order))
        self._order = [ticket for ticket in order if ticket.row not in decided]
        for ticket in self._order:
            if ticket.row not in self._early and not self._is_hopeless(ticket):
                decided[ticket.row] = self._decide(ticket)
        decided.update(self._early)
        self._name_more_urgent(decided)
        self._stop_clock(decided)
        passed = decided.get(self._passed.row) if self._passed is not None else None
        if isinstance(passed, Wait | Evict):
            decided[passed.ticket] = replace(passed, passed=True)
        decisions = (decided.get(ticket.row) for ticket in order)
        queue_held_up = state.head is not None or not state.devices
        return Plan(tuple(decision for decision in decisions if decision is not None), queue_held_up)

    def _refused_at_once(self) -> Iterator[Refuse]:
        """Refuse the waiters that can never load: the only answer while something runs alone on every device."""
        for ticket in queue_order(self._view):
            model = self._state.model_for(ticket)
            if not (ticket.resumes or (ticket.preload and self._has_enough(ticket, model))):
                refused = refuse(self._state, ticket, model)
                if isinstance(refused, Refuse):
                    yield refused

    def _is_hopeless(self, ticket: TicketView) -> bool:
        """Tell whether a waiter with the same request was found to fit nowhere behind the head of the line."""
        return self._state.is_hopeless(ticket) and not ticket.preload

    def _name_more_urgent(self, decided: dict[int, Decision | None]) -> None:
        """Tell waiters behind a head of the line that came later than they did that it is more urgent."""
        head = self._state.head
        if head is None:
            return
        for ticket in self._order:
            if ticket.number < head.number and ticket.rank > head.rank and decided.get(ticket.row) is None:
                why = Why(Reason.OUTRANKED, other=head.model)
                decided[ticket.row] = Wait(ticket.row, why.reason, why)

    def _stop_clock(self, decided: dict[int, Decision | None]) -> None:
        """Do not start the time for overtaking while no waiter that overtakes delays the head of the line."""
        state = self._state
        wait = decided.get(state.head.row) if state.head is not None else None
        if state.overtaking_is_free and isinstance(wait, Wait):
            decided[wait.ticket] = replace(wait, first=False)

    # ---- idle instances ------------------------------------------------------------------------------------

    def _grant_idle(self, order: list[TicketView]) -> dict[int, Grant]:
        """Grant idle instances to waiters that can use them, as far as these may overtake others."""
        state = self._state
        granted: dict[int, Grant] = {}
        kept: set[int] = set()
        # Devices that are drained for a waiter that runs alone.
        closed: set[int] = set()
        overtaken: TicketView | None = None
        # How many waiters of each unknown model share the instance that runs alone.
        sharing: Counter[int] = Counter()
        for ticket in order:
            if ticket.preload:
                # A preload takes no instance, and holds up no waiter that reuses one.
                continue
            idle = state.idle.get(ticket.model)
            instance = self._take_idle(ticket, idle, kept, closed) if idle else None
            if instance is not None:
                why = Why(Reason.OVERTAKES, other=overtaken.model) if overtaken else Why(Reason.IDLE_COPY)
                granted[ticket.row] = Grant(ticket.row, instance.row, why)
                continue
            model = state.model_for(ticket)
            if left_s(model) > 0:
                # During the back-off nothing is kept for it, or drained.
                continue
            if state.has_most_copies(model):
                kept |= self._kept_to_exchange(ticket, model)
            elif state.must_run_alone(ticket, model):
                usable = state.usable_part(ticket, model)
                if self._shared_in_s(ticket, usable, sharing[ticket.model]) is not None:
                    # Nothing is drained for it.
                    sharing[ticket.model] += 1
                    continue
                closed = closed or self._drained_for(ticket, model)
                if len(closed) == len(state.devices):
                    break
            elif ticket.head_since_s is not None and holds_up_others(state, ticket, model):
                overtaken = overtaken or ticket
                reserved = self._reserved_for(ticket, model)
                if reserved is None:
                    break
                kept |= reserved
        return granted

    def _take_idle(
        self, ticket: TicketView, idle: list[IdleInstance], kept: set[int], closed: set[int]
    ) -> IdleInstance | None:
        """Take the first idle instance that a waiter can use, but none that is kept or lies on a closed device."""
        # For a place in an instance, it matters whether that instance is kept.
        free = (one for one in idle if (one.row if one.place_in is None else one.place_in) not in kept)
        instance = next((one for one in free if can_use(ticket, one, closed)), None)
        if instance is not None:
            self._state.take_idle(instance)
        return instance

    def _drained_for(self, ticket: TicketView, model: ModelView) -> set[int]:
        """Return the devices that are drained for a waiter that runs alone: any reuse there delays it."""
        place = devices_to_drain(self._state, ticket)
        if is_kept_out_by_leases(self._state, place, model.need_mb / ticket.span):
            return set()
        return {device.device for device in place}

    def _reserved_for(self, ticket: TicketView, model: ModelView) -> set[int] | None:
        """Return the instances that are kept for the head of the line; None if nothing may overtake it any longer."""
        if overtaking_over(self._view, ticket):
            return None
        if not overtaking_limited(self._view, ticket):
            return set()
        plan = choose_room(self._state, ticket, model.need_mb / ticket.span, due=True)
        return None if plan is None else {one.row for one in (*plan.victims, *plan.awaited)}

    def _kept_to_exchange(self, ticket: TicketView, model: ModelView) -> set[int]:
        """Return the instances kept for a waiter that needs one of its model's exchanged; see `_swap_instance`.

        Otherwise those that can use them might hand them on to each other for ever. Nothing is kept as long as the
        waiter may be overtaken, nor if an exchange would be in vain, because no room can be made for another instance.
        """
        state = self._state
        if not overtaking_limited(self._view, ticket) or not self._can_use_none(ticket, model):
            return set()
        own = self._exchangeable(ticket)
        plan = choose_room(state, ticket, state.need_mb(ticket, model) / ticket.span, due=True) if own else None
        if plan is None:
            return set()
        room = {one.row for one in (*plan.victims, *plan.awaited)}
        # Its own model's instances stay in use until the others are no longer.
        return room if plan.awaited else room | own

    def _exchangeable(self, ticket: TicketView) -> set[int]:
        """Return the instances of a waiter's model that could make way for another one once they are not in use."""
        instances: list[IdleInstance | BusyInstance] = [*self._view.idle, *self._view.busy]
        mine = (one for one in instances if one.model == ticket.model and not one.pinned)
        return {one.row for one in mine if not self._state.quiet.keys() & set(one.devices)}

    def _can_use_none(self, ticket: TicketView, model: ModelView) -> bool:
        """Tell whether a waiter can use none of its model's instances, nor any that is being loaded."""
        here = self._state.usable_part(ticket, model)
        return not here.usable_by(ticket.member) and not here.coming_for(ticket.member)

    # ---- loads ---------------------------------------------------------------------------------------------

    def _decide(self, ticket: TicketView) -> Decision | None:
        """Return what happens to a waiter that gets no idle instance; None if it waits behind others."""
        state = self._state
        model = state.model_for(ticket)
        if ticket.resumes:
            return self._only_resume(ticket, model)
        if ticket.preload and self._has_enough(ticket, model):
            return Satisfied(ticket.row)
        if state.head is not None:
            refused = refuse(state, ticket, model)
            return refused or backfill(state, ticket, model) or make_room_ahead(state, ticket, model)
        if not self._view.devices:
            return state.wait_at_head(ticket, Why(Reason.NO_DEVICE))
        backs_off = self._back_off(ticket, model)
        # A preload is satisfied then.
        if state.has_most_copies(model):
            return backs_off or self._swap_instance(ticket, model)
        if state.must_run_alone(ticket, model):
            return self._share_alone(ticket, model) or backs_off or self._isolate(ticket, model)
        suspended = state.suspended_for(ticket)
        if ticket.preload:
            return self._resume(ticket, model, suspended) or backs_off or self._load(ticket, model)
        shares = self._share(ticket, model, suspended)
        if shares is not None:
            return shares
        return self._resume(ticket, model, suspended) or backs_off or self._load_alike(ticket, model)

    def _has_enough(self, ticket: TicketView, model: ModelView) -> bool:
        """Tell whether a preload's member can use as many copies as it wants, or there may be no more of them."""
        here = self._state.usable_part(ticket, model)
        usable = here.usable_by(ticket.member) + here.coming_for(ticket.member)
        return usable >= ticket.preload or self._state.has_most_copies(model)

    def _share(self, ticket: TicketView, model: ModelView, suspended: SuspendedInstance | None) -> Wait | None:
        """Let a waiter wait for an instance that is in use, being loaded or being suspended, if a load takes longer."""
        usable = self._state.usable_part(ticket, model)
        if suspended is not None:
            # The time of a resume is what another copy costs.
            usable = replace(usable, load_s=suspended.resume_s)
        shared_in_s = self._shared_in_s(ticket, usable, self._sharing[ticket.model])
        if shared_in_s is not None:
            self._sharing[ticket.model] += 1
            return Wait(ticket.row, Reason.SHARING, Why(Reason.SHARING, seconds=shared_in_s))
        if suspended is None and model.suspending and not usable.copies:
            # It was chosen to be suspended because suspending and resuming it is quicker than a load.
            return Wait(ticket.row, Reason.SUSPENDING, Why(Reason.SUSPENDING, seconds=model.resume_s))
        return None

    def _share_alone(self, ticket: TicketView, model: ModelView) -> Wait | None:
        """Let a waiter for an unknown model wait for an instance that runs alone, or is to, like `_share`.

        Otherwise a second device would be drained for it, and its idle instances unloaded.
        """
        if ticket.preload:
            return None
        usable, ahead = self._state.usable_part(ticket, model), self._sharing[ticket.model]
        shared_in_s, wait = self._shared_in_s(ticket, usable, ahead), None
        first = self._draining.get(ticket.model)
        if shared_in_s is not None:
            wait = Wait(ticket.row, Reason.SHARING, Why(Reason.SHARING, seconds=shared_in_s))
        # If it may load elsewhere than the first one, it may be served sooner there.
        elif first is not None and _where(first) == _where(ticket):
            # As if that one were loading already: its devices are those on which a model can run alone soonest.
            loading = {**usable.loading, first.member: usable.loading.get(first.member, 0) + 1}
            usable = replace(usable, loading=loading, loading_for_s=0.0)
            if self._shared_in_s(ticket, usable, ahead) is not None:
                wait = Wait(ticket.row, Reason.BEHIND)
        self._sharing[ticket.model] += wait is not None
        return wait

    def _shared_in_s(self, ticket: TicketView, usable: ModelView, ahead: int) -> float | None:
        """Return in how many seconds a waiter can share an instance if that is sooner than its own load, else None."""
        return waiting_is_sooner(usable, ticket, ahead, self._view.now_s, self._state.seen)

    def _isolate(self, ticket: TicketView, model: ModelView) -> Decision | None:
        """Let a waiter load alone, or have devices drained for that."""
        decision = isolate(self._state, ticket, model.need_mb)
        if isinstance(decision, Evict) or (isinstance(decision, Wait) and decision.first):
            self._draining.setdefault(ticket.model, ticket)
        return decision

    def _resume(self, ticket: TicketView, model: ModelView, suspended: SuspendedInstance | None) -> Decision | None:
        """Let a waiter resume an instance, or have room made for that on its device; None if a load should be tried."""
        if suspended is None or self._fits_only_elsewhere(ticket, model, suspended):
            return None
        decision = self._resume_there(ticket, model, suspended)
        # If others leave no room for it on its device, there may be room for another copy on a different one.
        return None if _is_hopeless_there(decision) else decision

    def _fits_only_elsewhere(self, ticket: TicketView, model: ModelView, suspended: SuspendedInstance) -> bool:
        """Tell whether a resume would have to wait for instances in use, while another device has room for a load."""
        state = self._state
        if not state.lacks_room(suspended):
            return False
        elsewhere = [device for device in state.open_to(ticket) if device.device not in suspended.devices]
        share_mb = model.need_mb / ticket.span
        if best_place(elsewhere, share_mb, state.slack, ticket.span) is None:
            return False
        there, resumed = as_resume(ticket, model, suspended)
        due = overtaking_limited(self._view, ticket)
        room = choose_room(state, there, resumed.need_mb / there.span, due)
        return room is None or bool(room.awaited)

    def _resume_there(self, ticket: TicketView, model: ModelView, suspended: SuspendedInstance) -> Decision | None:
        """Let a waiter resume an instance, have room made for that, or wait."""
        decision = self._load(*as_resume(ticket, model, suspended))
        return self._state.resume_instead(decision, suspended) if isinstance(decision, Load) else decision

    def _only_resume(self, ticket: TicketView, model: ModelView) -> Decision | None:
        """Let a waiter resume the instance that it can have first; it is satisfied once there is none for it.

        Instances that would not fit beside those that its member already has do not count.
        """
        state = self._state
        if state.has_most_copies(model) or not state.has_suspended_for(ticket):
            return Satisfied(ticket.row)
        if state.head is not None:
            return backfill(state, ticket, model)
        waits: Decision | None = None
        tried = state.all_suspended_for(ticket)
        for suspended in tried:
            decision = self._resume_there(ticket, model, suspended)
            if not _is_hopeless_there(decision):
                return decision
            waits = waits or (None if isinstance(decision, Refuse) else decision)
        return waits or (Satisfied(ticket.row) if tried else None)

    def _back_off(self, ticket: TicketView, model: ModelView) -> Wait | None:
        """Let a waiter wait whose model's last loads have failed, if the next one would evict others; see `backoff`.

        It does not hold up others. None if it need not wait: there is no back-off, or the load needs only free memory.
        """
        seconds = left_s(model)
        if seconds <= 0:
            return None
        if self._state.has_most_copies(model):
            if not self._can_use_none(ticket, model):
                # It waits for one of these copies, and not for a load.
                return None
        elif self._needs_no_room(ticket, model):
            return None
        return Wait(ticket.row, Reason.BACKING_OFF, Why(Reason.BACKING_OFF, model.need_mb, seconds=seconds))

    def _needs_no_room(self, ticket: TicketView, model: ModelView) -> bool:
        """Tell whether a load takes nothing but free memory, or is refused."""
        state = self._state
        if not state.must_run_alone(ticket, model):
            return needs_only_free_memory(state, ticket, model)
        place = devices_to_drain(state, ticket)
        rows = {device.device for device in place}
        empty = not any(state.busy[row] for row in rows) and not state.idle_on(rows)
        return empty and not any(device.unloading or device.returning_mb > 0 for device in place)

    def _load_alike(self, ticket: TicketView, model: ModelView) -> Decision | None:
        """Repeat the answer to a waiter with the same request that was told to wait, if nothing was planned since."""
        # If any process can use all instances there are, it does not matter which process waits.
        whose = ticket.member if model.owned else None
        alike = (ticket.model, whose, ticket.loadable_on, ticket.usable_on, ticket.span, ticket.steady)
        repeated = self._state.repeated_waits.get(alike)
        if repeated is not None:
            return replace(repeated, ticket=ticket.row)
        decision = self._load(ticket, model)
        # Once there is a head of the line, no waiter gets here, so the head's own wait is never repeated.
        if isinstance(decision, Wait):
            self._state.repeated_waits[alike] = decision
        return decision

    def _load(self, ticket: TicketView, model: ModelView) -> Decision | None:
        return load(self._state, ticket, model, self._load_more_wanted_first)

    def _load_more_wanted_first(self, ticket: TicketView, model: ModelView) -> bool:
        """Let a waiter behind this one load first, if more requests wait for its model; tell whether there was one."""
        rival = self._more_wanted(ticket, model)
        if rival is None:
            return False
        self._passed = ticket
        self._early[rival.row] = self._decide(rival)
        return True

    def _more_wanted(self, ticket: TicketView, model: ModelView) -> TicketView | None:
        """Return the waiter behind this one that loads first, because more wait for its model; see `fairness`."""
        if not self._may_be_passed(ticket) or model.copies or model.lease:
            return None
        state, best, most = self._state, None, model.waiting
        for other in self._order:
            wanted = state.model_for(other)
            if wanted.waiting <= most or other.row in self._early or not _is_of_the_many(other):
                continue
            if wanted.copies or wanted.lease or state.must_run_alone(other, wanted):
                continue
            if best_place(state.open_to(other), wanted.need_mb, state.slack) is not None:
                best, most = other, wanted.waiting
        return best

    def _may_be_passed(self, ticket: TicketView) -> bool:
        return not ticket.passed and _is_of_the_many(ticket) and not overtaking_limited(self._view, ticket)

    def _swap_instance(self, ticket: TicketView, model: ModelView) -> Decision:
        """Let a waiter wait for a copy, because there may be no more of them; or evict one that it cannot use.

        Only if it can use none of them, nor any that is being loaded, the oldest idle one makes way for another. Those
        that can use them may overtake it for a while, as if it were the head of the line; but it holds up no others.
        """
        state = self._state
        needs_another = self._can_use_none(ticket, model)
        if needs_another:
            refused = refuse(state, ticket, model)
            if refused is not None:
                return refused
            idle = [one for one in state.idle[ticket.model] if one.place_in is None and not can_use(ticket, one)]
            others = [one for one in idle if not (one.pinned or state.quiet.keys() & set(one.devices))]
            if others:
                return state.evict_for(ticket, others[-1:], Why(Reason.EXCHANGED, model.need_mb))
            if not self._exchangeable(ticket):
                waits = self._wait_for_exchange(ticket, model, idle)
                if waits is not None:
                    return waits
        first = needs_another and bool(self._exchangeable(ticket))
        return Wait(ticket.row, Reason.COPIES, Why(Reason.COPIES), first=first)

    def _wait_for_exchange(self, ticket: TicketView, model: ModelView, idle: list[IdleInstance]) -> Wait | None:
        """Let a waiter wait because the idle copies that it cannot use must stay, and no copy in use can make way."""
        state = self._state
        # A quiet start ends by itself, and a pin may never end.
        on = {device for one in idle if not one.pinned for device in one.devices}
        where = [device for device in self._view.devices if device.device in on]
        waits = wait_for_quiet_start(state, ticket, model.need_mb, where)
        if waits is None and any(one.pinned for one in idle):
            # The other model is its own one: its copies are in the way, and not the memory that they take.
            return Wait(ticket.row, Reason.PINNED, Why(Reason.PINNED, model.need_mb, other=ticket.model))
        return waits


def _is_hopeless_there(decision: Decision | None) -> bool:
    """Tell whether a decision about some devices means that others leave a waiter no room there."""
    return isinstance(decision, Refuse) or (isinstance(decision, Wait) and decision.reason in _ELSEWHERE)


def _where(ticket: TicketView) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return where a waiter may load, and use an instance."""
    return ticket.loadable_on, ticket.usable_on, ticket.span


def _is_of_the_many(ticket: TicketView) -> bool:
    """Tell whether a waiter is for a known model that may be loaded on any device, without special wishes."""
    return (
        ticket.priority == 1
        and not ticket.steady
        and not ticket.preload
        and not ticket.loadable_on
        and not ticket.usable_on
        and ticket.span == 1
    )
