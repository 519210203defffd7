"""The plan: walk the queue and say for every waiter what happens now."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace

from mpmm.policy.admission import free_mb, largest_limit_mb, limit_mb, widened
from mpmm.policy.backoff import left_s
from mpmm.policy.eviction import Room, find_room, together, waiting_pays
from mpmm.policy.fairness import is_due, is_overdue, may_be_leased_before, queue_order
from mpmm.policy.placement import best_place, soonest_alone
from mpmm.policy.sharing import presumed, seen_so_far, waiting_is_sooner
from mpmm.policy.view import (
    Busy,
    Decision,
    DeviceView,
    Enough,
    Evict,
    Grant,
    Idle,
    Load,
    ModelView,
    Placed,
    Reason,
    Refuse,
    Resume,
    Suspended,
    TicketView,
    View,
    Wait,
    Why,
)

__all__ = ["Plan", "make_plan"]


# Why a device has no room: there may be some on another one.
_ELSEWHERE = (Reason.LEASED, Reason.FOREIGN, Reason.PINNED, Reason.QUIET)


@dataclass(frozen=True)
class Plan:
    """Decisions in the order of the queue. `blocked`: later tickets could get little but idle copies, however many."""

    decisions: tuple[Decision, ...]
    blocked: bool


def make_plan(view: View) -> Plan:
    """Return what happens to the waiters in the view, in the order in which it is to be carried out.

    On a device on which a copy runs alone nothing happens. Elsewhere idle copies are handed out first, as far as
    `fairness` lets waiters pass. Then each waiter, first one first, may load where its model fits, or has room made for
    it, or waits; behind the first that waits for room only small loads go on, beside what is reserved for it. A device
    that is drained for an unknown model gets nothing new. Tickets without a decision wait behind.
    """
    return _Walk(view).plan()


class _Walk:
    """The queue's walk. What earlier decisions take is no longer there for later ones."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._slack = view.rules.slack_percentage
        # Those on which a copy runs alone, or is to, are nobody else's.
        self._devices = {device.device: device for device in view.devices if not device.isolated}
        self._idle: defaultdict[int, list[Idle]] = defaultdict(list)
        for copy in view.idle:
            if all(device in self._devices for device in copy.devices):
                self._idle[copy.model].append(copy)
        self._suspended = list(view.suspended)
        self._models = dict(view.models)
        # What that tells of models that have never been loaded.
        self._seen = seen_so_far(view.models.values())
        # Copies in use or being loaded by device, those that this walk adds as well.
        self._busy = Counter(device for copy in view.busy for device in copy.devices)
        self._blocked: TicketView | None = None
        # Where room is made for the blocked one, as far as that is known.
        self._room: Room | None = None
        # The time of the blocked one does not begin yet.
        self._clock_stands = False
        # This walk has let somebody load.
        self._loads_begun = False
        # The queue, who of it is answered out of turn, and past whom.
        self._order: list[TicketView] = []
        self._early: dict[int, Decision | None] = {}
        self._passed: TicketView | None = None
        # Models that cannot be loaded beside that. Room only shrinks in a walk, so each is looked at once: most
        # who wait behind a blocked one want the same few.
        self._not_beside: set[int] = set()
        # Where something starts quietly, idle copies are used, and nothing comes or goes: what of which model. And the
        # devices where this walk has let something come or go.
        self._quiet = {device.device: device.steady for device in view.devices if device.steady is not None}
        self._begun: set[int] = set()
        # Who wanted what, and was told to wait without holding up others, since something was last booked.
        self._told: dict[tuple[object, ...], Wait] = {}
        self._sharing: Counter[int] = Counter()
        # Somebody waits for a lease to end, so not every further one is given out behind him: who, and what it needs
        # on each of its devices.
        self._lease_is_awaited = False
        self._awaiting_leases: list[tuple[TicketView, float]] = []
        # The leases that are held, those of this walk as well.
        self._leases = list(view.leases)

    def plan(self) -> Plan:
        if self._view.devices and not self._devices:
            return Plan((), blocked=True)
        order = queue_order(self._view)
        decided: dict[int, Decision | None] = dict(self._hand_out(order))
        self._order = [ticket for ticket in order if ticket.row not in decided]
        for ticket in order:
            hopeless = self._blocked and ticket.model in self._not_beside and not ticket.preload and not ticket.devices
            if ticket.row not in decided and ticket.row not in self._early and not hopeless:
                decided[ticket.row] = self._decide(ticket)
        decided.update(self._early)
        self._name_more_urgent(decided)
        self._stop_clock(decided)
        passed = decided.get(self._passed.row) if self._passed is not None else None
        if isinstance(passed, Wait | Evict):
            decided[passed.ticket] = replace(passed, passed=True)
        decisions = (decided.get(ticket.row) for ticket in order)
        blocked = self._blocked is not None or not self._devices
        return Plan(tuple(decision for decision in decisions if decision is not None), blocked)

    def _name_more_urgent(self, decided: dict[int, Decision | None]) -> None:
        """Let those know who waits behind one that came later than they did, and is more urgent."""
        blocked = self._blocked
        if blocked is None:
            return
        for ticket in self._order:
            if ticket.number < blocked.number and ticket.rank > blocked.rank and decided.get(ticket.row) is None:
                why = Why(Reason.OUTRANKED, other=blocked.model)
                decided[ticket.row] = Wait(ticket.row, why.reason, why)

    def _stop_clock(self, decided: dict[int, Decision | None]) -> None:
        """Let the blocked one's time not begin as long as nobody delays it, see `fairness`."""
        wait = decided.get(self._blocked.row) if self._blocked is not None else None
        if self._clock_stands and isinstance(wait, Wait):
            decided[wait.ticket] = replace(wait, first=False)

    def _where(self, ticket: TicketView) -> list[DeviceView]:
        """Return the devices on which a waiter may load now."""
        return [
            device
            for device in self._devices.values()
            if device.device not in self._quiet and (not ticket.devices or device.device in ticket.devices)
        ]

    def _all_where(self, ticket: TicketView) -> list[DeviceView]:
        """Return the devices on which a waiter may load at all."""
        return [device for device in self._view.devices if not ticket.devices or device.device in ticket.devices]

    def _named(self, devices: Iterable[DeviceView]) -> tuple[int, ...]:
        """Return the devices for a reason; none where there is but one."""
        return tuple(device.device for device in devices) if len(self._view.devices) > 1 else ()

    # ---- idle copies ---------------------------------------------------------------------------------------

    def _hand_out(self, order: list[TicketView]) -> dict[int, Grant]:
        """Give idle copies to those who can use them and may have them."""
        view = self._view
        granted: dict[int, Grant] = {}
        kept: set[int] = set()
        # Devices that drain for one who runs alone.
        closed: set[int] = set()
        passed: TicketView | None = None
        for ticket in order:
            if ticket.preload:
                # It takes no copy, and holds up nobody who reuses one.
                continue
            copies = self._idle.get(ticket.model)
            copy = None
            if copies:
                copy = next((c for c in copies if c.row not in kept and _can_use(ticket, c, closed)), None)
            if copy is not None and copies is not None:
                copies.remove(copy)
                self._busy.update(copy.devices)
                why = Why(Reason.PASSING, other=passed.model) if passed else Why(Reason.IDLE_COPY)
                granted[ticket.row] = Grant(ticket.row, copy.row, why)
                continue
            if left_s(view.models[ticket.model]) > 0:
                # Nothing is kept for it, nor drained.
                continue
            if self._isolates(ticket, view.models[ticket.model]):
                place = self._to_be_alone_on(ticket)
                if self._is_kept_out_by_leases(place, view.models[ticket.model].need_mb / ticket.span):
                    continue
                # Everything there has to drain for it, so whatever passes it there delays it; one at a time.
                closed = closed or {device.device for device in place}
                if len(closed) == len(self._devices):
                    break
                continue
            if ticket.blocked_since_s is None or not self._holds_up(ticket):
                continue
            passed = passed or ticket
            if is_overdue(view, ticket):
                break
            if is_due(view, ticket):
                model = view.models[ticket.model]
                room = self._find_room(ticket, model.need_mb / ticket.span, due=True)
                if room is None:
                    break
                kept.update(copy.row for copy in room.victims)
                kept.update(copy.row for copy in room.awaited)
        return granted

    def _holds_up(self, ticket: TicketView) -> bool:
        """Tell whether a waiter that was blocked still is: others may pass one that no eviction would help."""
        model = self._view.models[ticket.model]
        if self._is_at_most(model):
            return False
        where, share_mb = self._all_where(ticket), self._need_mb(ticket, model) / ticket.span
        if self._fitting(where, share_mb, pinned=True) < ticket.span:
            return False
        if any(self._busy[device.device] or device.unloading or device.returning_mb for device in where):
            return True
        # Nothing comes free by itself, so it takes an eviction, beside external memory as it is now.
        return self._cheapest(ticket, share_mb, ()) is not None or self._all_of_it(ticket, where, share_mb) is not None

    # ---- loads ---------------------------------------------------------------------------------------------

    def _decide(self, ticket: TicketView) -> Decision | None:
        model = self._models[ticket.model]
        if ticket.preload and self._has_enough(ticket, model):
            return Enough(ticket.row)
        if self._blocked is not None:
            return self._beside(ticket, model)
        if not self._view.devices:
            return self._block(ticket, Why(Reason.NO_DEVICE))
        backs_off = self._back_off(ticket, model)
        if self._isolates(ticket, model):
            return backs_off or self._isolate(ticket, model.need_mb)
        copy = self._suspended_for(ticket)
        if ticket.preload:
            return self._resume(ticket, model, copy) or backs_off or self._load(ticket, model)
        if self._is_at_most(model):
            return backs_off or self._exchange(ticket, model)
        usable = self._for(ticket, model)
        if copy is not None:
            # That is what another copy costs.
            usable = replace(usable, load_s=copy.resume_s)
        ahead = self._sharing[ticket.model]
        shared_in_s = waiting_is_sooner(usable, ticket, ahead, self._view.now_s, self._seen)
        if shared_in_s is not None:
            self._sharing[ticket.model] += 1
            return Wait(ticket.row, Reason.SHARING, Why(Reason.SHARING, seconds=shared_in_s))
        if copy is None and model.suspending and not usable.copies:
            # It was chosen for that because to suspend and to resume is quicker than a load.
            return Wait(ticket.row, Reason.SUSPENDING, Why(Reason.SUSPENDING, seconds=model.resume_s))
        return self._resume(ticket, model, copy) or backs_off or self._load_alike(ticket, model)

    def _suspended_for(self, ticket: TicketView) -> Suspended | None:
        """Return the suspended copy of its model that a waiter can use, the newest one; None if there is none."""
        if not self._suspended or ticket.steady:
            return None
        closed = {device.device for device in self._view.devices} - set(self._devices)
        return next((one for one in self._suspended if _can_resume(ticket, one, closed)), None)

    def _resume(self, ticket: TicketView, model: ModelView, copy: Suspended | None) -> Decision | None:
        """Let a waiter resume a copy, or have room made for that where it lies; None if a load is to be tried."""
        if copy is None:
            return None
        mb = math.fsum(copy.mb_on(device) for device in copy.devices)
        decision = self._load(replace(ticket, devices=copy.devices, span=len(copy.devices)), _resized(model, mb))
        if isinstance(decision, Load):
            return self._resumes(decision, copy)
        # Where it lies others leave no room for it. Elsewhere there may be some for another copy.
        hopeless = isinstance(decision, Wait) and decision.reason in _ELSEWHERE
        return None if hopeless or isinstance(decision, Refuse) else decision

    def _resumes(self, load: Load, copy: Suspended) -> Resume:
        """Return a load that is a resume."""
        self._suspended.remove(copy)
        why = replace(load.why, reason=Reason.RESUMES, seconds=copy.resume_s, other=None)
        return Resume(load.ticket, copy.row, why)

    def _back_off(self, ticket: TicketView, model: ModelView) -> Wait | None:
        """Let one wait whose model's last loads have failed, if something would have to go for the next; see `backoff`.

        It does not hold up others. None if it may go on: there is no back-off, or the load needs only what is free.
        """
        seconds = left_s(model)
        if seconds <= 0 or (not self._is_at_most(model) and self._needs_no_room(ticket, model)):
            return None
        here = self._for(ticket, model)
        if self._is_at_most(model) and (here.usable_by(ticket.member) or here.coming_for(ticket.member)):
            # It waits for one of these, and not for a load.
            return None
        return Wait(ticket.row, Reason.BACKING_OFF, Why(Reason.BACKING_OFF, model.need_mb, seconds=seconds))

    def _needs_no_room(self, ticket: TicketView, model: ModelView) -> bool:
        """Tell whether a load takes nothing but free memory, or is refused."""
        if self._isolates(ticket, model):
            place = self._to_be_alone_on(ticket)
            rows = {device.device for device in place}
            empty = not any(self._busy[row] for row in rows) and not self._idle_on(rows)
            return empty and not any(device.unloading or device.returning_mb > 0 for device in place)
        largest = largest_limit_mb(self._all_where(ticket), self._slack, ticket.span) * ticket.span
        need_mb = self._need_mb(ticket, model)
        fits = best_place(self._where(ticket), need_mb / ticket.span, self._slack, ticket.span) is not None
        return fits or need_mb > largest

    def _load_alike(self, ticket: TicketView, model: ModelView) -> Decision | None:
        """Do as with one who wants the same and was told to wait, if nothing has been booked since."""
        # Where any process can use all copies there are, it does not matter whose waiter it is.
        whose = ticket.member if model.owned or model.loading else None
        wish = (ticket.model, whose, ticket.devices, ticket.tied, ticket.span, ticket.steady)
        told = self._told.get(wish)
        if told is not None:
            return replace(told, ticket=ticket.row)
        decision = self._load(ticket, model)
        if isinstance(decision, Wait) and not decision.first:
            self._told[wish] = decision
        return decision

    def _for(self, ticket: TicketView, model: ModelView) -> ModelView:
        """Return a model as it is for one that is tied to devices: without the copies elsewhere."""
        if not ticket.tied:
            return model
        view = self._view
        busy = [copy for copy in view.busy if copy.model == model.model and copy.is_within(ticket.tied)]
        loaded = [copy for copy in busy if not copy.loading]
        loaded_owners = Counter(copy.owner for copy in loaded)
        loaded_owners.update(c.owner for c in view.idle if c.model == model.model and c.is_within(ticket.tied))
        owned = {owner: count for owner, count in loaded_owners.items() if owner is not None}
        loading = Counter(copy.owner for copy in busy if copy.loading and copy.owner is not None)
        return replace(model, shared=loaded_owners[None], owned=owned, loading=loading)

    def _isolates(self, ticket: TicketView, model: ModelView) -> bool:
        return not model.known and self._view.rules.isolate_unknown and not ticket.nested

    def _is_at_most(self, model: ModelView) -> bool:
        """Tell whether there are as many copies of a model as there may be."""
        return model.copies >= self._view.rules.max_model_copies

    def _has_enough(self, ticket: TicketView, model: ModelView) -> bool:
        """Tell whether a preload's member can use as many copies as it wants, or there are as many as there may be."""
        here = self._for(ticket, model)
        usable = here.usable_by(ticket.member) + here.coming_for(ticket.member)
        return usable >= ticket.preload or self._is_at_most(model)

    def _fit_beside(self, ticket: TicketView, copies: int, share_mb: float) -> bool:
        """Tell whether the devices could take one copy more than so many of the same size, if they had nothing else."""
        if share_mb <= 0:
            return True
        places = sum(limit_mb(device, self._slack) // share_mb for device in self._all_where(ticket))
        return copies * ticket.span + ticket.span <= places

    def _exchange(self, ticket: TicketView, model: ModelView) -> Decision:
        """Wait for one of as many copies as there may be; if they all are of no use, for another in place of one."""
        here = self._for(ticket, model)
        if not here.usable_by(ticket.member) and not here.coming_for(ticket.member):
            others = [
                copy
                for copy in self._idle[ticket.model]
                if not (copy.pinned or _can_use(ticket, copy) or self._quiet.keys() & set(copy.devices))
            ]
            if others:
                return self._evict(ticket, others[-1:], Why(Reason.EXCHANGED, model.need_mb))
        return Wait(ticket.row, Reason.COPIES, Why(Reason.COPIES))

    def _to_be_alone_on(self, ticket: TicketView) -> tuple[DeviceView, ...]:
        """Return the devices that are drained for one who has to run alone; too few if there are too few."""
        need_mb = self._view.models[ticket.model].need_mb / ticket.span
        where = self._where(ticket)
        roomy = [device for device in where if limit_mb(device, self._slack) - device.leased_mb >= need_mb]
        costs = []
        for device in roomy if len(roomy) >= ticket.span else where:
            busy = [copy.free_in_s for copy in self._view.busy if device.device in copy.devices]
            idle_mb = math.fsum(copy.mb_on(device.device) for copy in self._idle_on({device.device}))
            to_unload_mb = idle_mb - free_mb(device, self._slack)
            costs.append((device, max(busy, default=0.0), self._busy[device.device], to_unload_mb))
        return soonest_alone(costs, ticket.span)

    def _is_kept_out_by_leases(self, place: Sequence[DeviceView], share_mb: float) -> bool:
        """Tell whether one that is to run alone waits for leases to end: among copies it is alone, but they stay.

        What it takes is only assumed; the books are to be right all the same.
        """
        return any(device.leased_mb for device in place) and self._fitting(place, share_mb, external=False) < len(place)

    def _idle_on(self, devices: set[int]) -> list[Idle]:
        return [copy for copies in self._idle.values() for copy in copies if devices.intersection(copy.devices)]

    def _isolate(self, ticket: TicketView, need_mb: float) -> Decision | None:
        """Let one run alone on a device, or several that it spans, or have that drained for it."""
        place = self._to_be_alone_on(ticket)
        if len(self._all_where(ticket)) < ticket.span:
            return Refuse(ticket.row, Why(Reason.TOO_LARGE, need_mb, 0.0))
        if len(place) < ticket.span:
            return None
        if self._is_kept_out_by_leases(place, need_mb / ticket.span):
            self._lease_is_awaited = True
            why = Why(Reason.LEASED, need_mb, _most_free_mb(place, self._slack), devices=self._named(place))
            return Wait(ticket.row, why.reason, why)
        self._told.clear()
        rows, on = {device.device for device in place}, self._named(place)
        for device in rows:
            del self._devices[device]
        free = min(free_mb(device, self._slack) for device in place)
        if any(self._busy[device] for device in rows):
            used = [copy.free_in_s for copy in self._view.busy if rows.intersection(copy.devices)]
            why = Why(Reason.DRAINING, need_mb, seconds=max(used, default=0.0), devices=on)
            return Wait(ticket.row, why.reason, why, first=True)
        idle = self._idle_on(rows)
        evictable = [copy for copy in idle if not copy.pinned]
        for copy in idle:
            self._idle[copy.model].remove(copy)
        if evictable:
            flushed = tuple(copy.row for copy in evictable)
            return Evict(ticket.row, flushed, Why(Reason.FLUSHED, need_mb, devices=on))
        if any(device.unloading for device in place):
            why = Why(Reason.UNLOADING, need_mb, free, math.fsum(device.unloading_mb for device in place), devices=on)
            return Wait(ticket.row, why.reason, why, first=True)
        returning_mb = math.fsum(device.returning_mb for device in place)
        if returning_mb > 0:
            why = Why(Reason.RETURNING, need_mb, free, returning_mb, devices=on)
            return Wait(ticket.row, why.reason, why, first=True)
        chosen = tuple(device.device for device in place)
        return Load(ticket.row, chosen, need_mb, True, Why(Reason.ALONE, need_mb, free, devices=on))

    def _need_mb(self, ticket: TicketView, model: ModelView) -> float:
        """Return what a load needs. What is only assumed must not make a model impossible.

        So it is no more than the largest part of a device that can be free: beside external memory and the leases that
        are held, with nothing else of ours there.
        """
        if model.known:
            return model.need_mb
        where = self._all_where(ticket)
        best = sorted(
            min(limit_mb(one, self._slack), one.total_mb - max(0.0, one.external_least_mb)) - one.leased_mb
            for one in where
        )
        reach = best[-ticket.span] * ticket.span if len(best) >= ticket.span else 0.0
        return min(model.need_mb, reach) if reach > 0 else model.need_mb

    def _load(self, ticket: TicketView, model: ModelView) -> Decision | None:
        slack, span = self._slack, ticket.span
        largest = largest_limit_mb(self._all_where(ticket), slack, span) * span
        need_mb = self._need_mb(ticket, model)
        share_mb = need_mb / span
        if need_mb > largest:
            if self._for(ticket, model).usable_by(ticket.member) and not ticket.preload:
                # Too large for a second copy, but there is one to wait for.
                return Wait(ticket.row, Reason.MEMORY, Why(Reason.MEMORY, need_mb, largest))
            return Refuse(ticket.row, Why(Reason.TOO_LARGE, need_mb, largest))
        if ticket.preload and not self._fit_beside(ticket, model.copies, share_mb):
            return Refuse(ticket.row, Why(Reason.TOO_LARGE, need_mb, largest))
        where = [widened(device, share_mb, slack) for device in self._where(ticket)]
        if len(where) < span:
            # Where it may go somebody runs alone or starts quietly, or is about to.
            return self._wait_for_quiet(ticket, need_mb)
        leasable = self._leasable(where, model, share_mb)
        place = best_place(leasable, share_mb, slack, span)
        if place is not None and ticket.steady:
            return self._start_quietly(ticket, leasable, place.devices, share_mb)
        rival = self._more_wanted(ticket, model) if place is not None else None
        if rival is not None:
            self._passed = ticket
            self._early[rival.row] = self._decide(rival)
            where = [widened(device, share_mb, slack) for device in self._where(ticket)]
            place = best_place(where, share_mb, slack, span)
        if place is not None:
            another = self._for(ticket, model).usable_by(ticket.member)
            return self._book(ticket, place.devices, need_mb, Reason.ANOTHER_COPY if another else place.reason)
        if model.lease and self._lease_is_awaited:
            return Wait(ticket.row, Reason.BEHIND, Why(Reason.BEHIND, need_mb))
        waits = self._wait_for_others(ticket, where, share_mb)
        if waits is not None:
            if waits.reason == Reason.LEASED:
                self._awaiting_leases.append((ticket, share_mb))
            return waits
        due = is_due(self._view, ticket)
        room = self._find_room(ticket, share_mb, due) or self._all_of_it(ticket, where, share_mb)
        self._room = room
        self._clock_stands = self._is_delayed_by_loads(ticket, share_mb)
        if room is None:
            return self._without_room(ticket, where, need_mb)
        free, on = math.fsum(free_mb(device, slack) for device in room.devices), self._named(room.devices)
        if room.victims and (due or not room.awaited):
            reason = Reason.LOWEST_SCORE if room.harm is None else Reason.SMALLEST_HARM
            coming_mb = math.fsum(copy.mb for copy in room.victims)
            why = Why(reason, need_mb, free, coming_mb, room.harm or 0.0, room.victims[0].model, on)
            return self._evict(ticket, list(room.victims), why)
        if room.awaited:
            coming_mb = math.fsum(copy.mb for copy in room.awaited)
            why = Why(Reason.IN_USE, need_mb, free, coming_mb, room.drain_s, room.awaited[0].model, on)
            return self._block(ticket, why)
        unloading_mb = math.fsum(device.unloading_mb for device in room.devices)
        if unloading_mb > 0:
            return self._block(ticket, Why(Reason.UNLOADING, need_mb, free, unloading_mb, devices=on))
        returning_mb = math.fsum(device.returning_mb for device in room.devices)
        return self._block(ticket, Why(Reason.RETURNING, need_mb, free, returning_mb, devices=on))

    def _start_quietly(
        self, ticket: TicketView, where: Sequence[DeviceView], found: Sequence[DeviceView], share_mb: float
    ) -> Decision:
        """Let one load where nothing else is coming or going, and will until it is there; or have nothing begin there.

        Only those before it in the queue can still load there, so it waits for these, and for what has begun.
        """
        need_mb = share_mb * ticket.span
        calm = best_place([one for one in where if not self._is_restless(one)], share_mb, self._slack, ticket.span)
        devices = calm.devices if calm is not None else tuple(found)
        if calm is None:
            on, free = self._named(devices), math.fsum(free_mb(device, self._slack) for device in devices)
            decision: Decision = Wait(
                ticket.row, Reason.RESTLESS, Why(Reason.RESTLESS, need_mb, free, other=ticket.model, devices=on)
            )
        else:
            decision = self._book(ticket, devices, need_mb, calm.reason)
        self._quiet.update({device.device: ticket.model for device in devices})
        return decision

    def _is_restless(self, device: DeviceView) -> bool:
        """Tell whether something is being loaded on a device, or unloaded from it."""
        loading = any(copy.loading and device.device in copy.devices for copy in self._view.busy)
        return loading or bool(device.unloading) or device.returning_mb > 0 or device.device in self._begun

    def _wait_for_quiet(self, ticket: TicketView, need_mb: float) -> Wait | None:
        """Let one wait for what starts quietly where it may load; None if there is nothing."""
        for device in self._all_where(ticket):
            other = self._quiet.get(device.device)
            if other is not None:
                why = Why(Reason.QUIET, need_mb, other=other, devices=self._named([device]))
                return Wait(ticket.row, why.reason, why)
        return None

    def _more_wanted(self, ticket: TicketView, model: ModelView) -> TicketView | None:
        """Return one behind a waiter that is to load before it, because more wait for its model; see `fairness`."""
        if not _may_be_passed(self._view, ticket) or model.copies or model.lease:
            return None
        slack, best, most = self._slack, None, model.waiting
        for other in self._order:
            wanted = self._models[other.model]
            if wanted.waiting <= most or other.row in self._early or not _is_of_the_many(other):
                continue
            if wanted.copies or wanted.lease or self._isolates(other, wanted):
                continue
            if best_place(self._where(other), wanted.need_mb, slack) is not None:
                best, most = other, wanted.waiting
        return best

    def _leasable(self, devices: list[DeviceView], model: ModelView, share_mb: float) -> list[DeviceView]:
        """Return where `share_mb` may go before those who wait for leases to end; any model may go anywhere."""
        if not model.lease or not self._lease_is_awaited:
            return devices
        held_mb = {
            device.device: [lease.mb_on(device.device) for lease in self._leases if device.device in lease.devices]
            for device in devices
        }
        return [
            device
            for device in devices
            if all(
                may_be_leased_before(self._view, waiting, need_mb, device, share_mb, held_mb[device.device])
                for waiting, need_mb in self._awaiting_leases
            )
        ]

    def _wait_for_others(self, ticket: TicketView, where: list[DeviceView], share_mb: float) -> Wait | None:
        """Let one wait for whom leases, external memory or pinned copies leave too little room, whatever else went.

        Nothing that the manager can unload would help, so nobody has to stand back for it, for hours perhaps.
        """
        need_mb, free = share_mb * ticket.span, _most_free_mb(where, self._slack)
        if self._fitting(where, share_mb, external=False) < ticket.span:
            self._lease_is_awaited = True
            return Wait(ticket.row, Reason.LEASED, Why(Reason.LEASED, need_mb, free))
        if self._fitting(where, share_mb) < ticket.span:
            external_mb = math.fsum(device.external_least_mb for device in where)
            return Wait(ticket.row, Reason.FOREIGN, Why(Reason.FOREIGN, need_mb, free, external_mb))
        if self._fitting(where, share_mb, pinned=True) < ticket.span:
            return Wait(ticket.row, Reason.PINNED, Why(Reason.PINNED, need_mb, free))
        return None

    def _without_room(self, ticket: TicketView, where: list[DeviceView], need_mb: float) -> Wait:
        """Let one wait for whom no room can be made at present. It holds up others only if that can change by itself.

        Where nothing is in use, it takes others to change it: what pinned copies have grown by counts as external, say.
        """
        free = _most_free_mb(where, self._slack)
        rows = {device.device for device in where}
        if any(self._busy[row] for row in rows):
            # In use, being loaded, or let in by this plan.
            return self._block(ticket, Why(Reason.MEMORY, need_mb, free))
        if any(self._pinned_on(row) for row in rows):
            return Wait(ticket.row, Reason.PINNED, Why(Reason.PINNED, need_mb, free))
        external_mb = math.fsum(device.external_mb for device in where)
        return Wait(ticket.row, Reason.FOREIGN, Why(Reason.FOREIGN, need_mb, free, external_mb))

    def _fitting(
        self, where: Iterable[DeviceView], share_mb: float, external: bool = True, pinned: bool = False
    ) -> int:
        """Return on how many devices `share_mb` would fit if all went that the manager can unload.

        external: count what is certainly not ours as well as leases; pinned: what is pinned, too. A device that has
        nothing of these but external memory takes it up to its total, see `admission.widened`.
        """
        count = 0
        for device in where:
            least_mb = max(0.0, device.external_least_mb) if external else 0.0
            kept_mb = device.leased_mb + (self._pinned_on(device.device) if pinned else 0.0)
            limit = limit_mb(device, self._slack) - device.extra_mb
            fits = share_mb + kept_mb + least_mb <= limit
            count += fits or (share_mb <= limit and not kept_mb and share_mb + least_mb <= device.total_mb)
        return count

    def _pinned_on(self, device: int) -> float:
        """Return what pinned copies, idle ones and those in use, take of a device."""
        copies: list[Idle | Busy] = [*self._view.idle, *self._view.busy]
        return math.fsum(copy.mb_on(device) for copy in copies if copy.pinned and device in copy.devices)

    def _all_of_it(self, ticket: TicketView, where: list[DeviceView], share_mb: float) -> Room | None:
        """Return everything that can go from devices on which the books alone find too little room.

        Part of what counts as external there may be what instances have grown by. Only an empty device tells.
        """
        rooms = []
        for device in where:
            grown_mb = device.external_mb - device.external_least_mb
            if grown_mb <= 0 or not self._fitting([device], share_mb, pinned=True):
                continue
            victims = [
                copy
                for copy in self._idle_on({device.device})
                if not copy.pinned and not self._quiet.keys() & set(copy.devices)
            ]
            awaited = [copy for copy in self._view.busy if device.device in copy.devices]
            if not (victims or awaited or device.unloading or device.returning_mb):
                continue
            freed_mb = math.fsum(copy.mb_on(device.device) for copy in (*victims, *awaited))
            drain_s = max((copy.free_in_s for copy in awaited), default=0.0)
            rooms.append(Room((device,), tuple(victims), tuple(awaited), None, drain_s, freed_mb, (0.0,)))
        if len(rooms) < ticket.span:
            return None
        return together(sorted(rooms, key=lambda room: room.cost)[: ticket.span])

    def _find_room(self, ticket: TicketView, share_mb: float, due: bool) -> Room | None:
        """Return where room for `share_mb` on each of its devices can be made with the least harm.

        Copies in use are waited for if that is better than to unload idle ones; who is due takes what can be had now.
        """
        view = self._view
        now = self._cheapest(ticket, share_mb, ())
        if now is not None and (due or not now.victims or not view.busy):
            return now
        later = self._cheapest(ticket, share_mb, view.busy)
        if now is None or (later is not None and waiting_pays(later, now, view.models[ticket.model])):
            return later
        return now

    def _cheapest(self, ticket: TicketView, share_mb: float, busy: Sequence[Busy]) -> Room | None:
        idle = [copy for copies in self._idle.values() for copy in copies if not self._quiet.keys() & set(copy.devices)]
        where = (widened(device, share_mb, self._slack) for device in self._where(ticket))
        rooms = [room for device in where if (room := find_room(self._view, device, idle, busy, share_mb, ticket))]
        if len(rooms) < ticket.span:
            return None
        return together(sorted(rooms, key=lambda room: room.cost)[: ticket.span])

    def _beside(self, ticket: TicketView, model: ModelView) -> Decision | None:
        """Let a waiter load what fits beside the room that is reserved for the blocked one."""
        room, blocked = self._room, self._blocked
        if ticket.steady:
            return None
        if blocked is None or self._isolates(ticket, model) or model.shared or self._is_at_most(model):
            self._not_beside.add(model.model)
            return None
        if model.usable_by(ticket.member) or presumed(model, self._seen).coming_for(ticket.member):
            return None
        copy = self._suspended_for(ticket)
        if copy is not None:
            mb = math.fsum(copy.mb_on(device) for device in copy.devices)
            ticket, model = replace(ticket, devices=copy.devices, span=len(copy.devices)), _resized(model, mb)
        slack, share_mb = self._slack, model.need_mb / ticket.span
        left = dict(zip((device.device for device in room.devices), room.left_mb, strict=True)) if room else {}
        free = []
        for device in self._leasable(self._where(ticket), model, share_mb):
            if device.device in left:
                kept_mb = max(0.0, free_mb(device, slack) - left[device.device])
                free.append(replace(device, reserved_mb=device.reserved_mb + kept_mb))
            elif room or (blocked.devices and device.device not in blocked.devices):
                # Where no room is known for the blocked one, whatever comes free on its devices may be it.
                free.append(device)
        place = best_place(free, share_mb, slack, ticket.span)
        if place is None:
            self._not_beside.add(model.model)
            return None
        if room:
            taken = {device.device for device in place.devices}
            left_mb = tuple(mb - share_mb * (device in taken) for device, mb in left.items())
            self._room = replace(room, left_mb=left_mb)
        devices = tuple(self._devices[device.device] for device in place.devices)
        self._clock_stands = False
        load = self._book(ticket, devices, model.need_mb, Reason.BESIDE, blocked.model)
        return load if copy is None else self._resumes(load, copy)

    def _book(
        self,
        ticket: TicketView,
        devices: Sequence[DeviceView],
        need_mb: float,
        reason: Reason,
        other: int | None = None,
    ) -> Load:
        self._told.clear()
        self._loads_begun = True
        self._begun.update(device.device for device in devices)
        share_mb = need_mb / len(devices)
        for device in devices:
            known = self._devices[device.device]
            self._devices[device.device] = replace(known, reserved_mb=known.reserved_mb + share_mb)
            self._busy[device.device] += 1
        model = self._models[ticket.model]
        if model.lease:
            first, *others = [device.device for device in devices]
            beside = tuple((other, share_mb) for other in others)
            self._leases.append(Placed(-1, model.model, first, share_mb, beside=beside))
        # Those behind may share this load.
        if not ticket.tied:
            loading = {**model.loading, ticket.member: model.loading.get(ticket.member, 0) + 1}
            self._models[ticket.model] = replace(model, loading=loading, loading_for_s=0.0)
        free = math.fsum(free_mb(device, self._slack) for device in devices)
        why = Why(reason, need_mb, free, other=other, devices=self._named(devices))
        return Load(ticket.row, tuple(device.device for device in devices), need_mb, False, why)

    def _evict(self, ticket: TicketView, copies: list[Idle], why: Why) -> Evict:
        for copy in copies:
            self._idle[copy.model].remove(copy)
            self._begun.update(copy.devices)
        self._blocked = ticket
        return Evict(ticket.row, tuple(copy.row for copy in copies), why)

    def _block(self, ticket: TicketView, why: Why) -> Wait:
        self._blocked = ticket
        return Wait(ticket.row, why.reason, why, first=True)

    def _is_delayed_by_loads(self, ticket: TicketView, share_mb: float) -> bool:
        """Tell whether only the end of loads that have begun already can make room, which nobody who reuses delays."""
        loading = self._loads_begun or any(copy.loading for copy in self._view.busy)
        return loading and self._cheapest(ticket, share_mb, ()) is None


def _can_use(ticket: TicketView, copy: Idle, closed: Set[int] = frozenset()) -> bool:
    """Tell whether a waiter's process can use a copy, and the copy lies where the waiter wants it."""
    return copy.owner in (None, ticket.member) and copy.is_within(ticket.tied) and not closed & set(copy.devices)


def _can_resume(ticket: TicketView, copy: Suspended, closed: Set[int]) -> bool:
    """Tell whether a waiter's process can use a suspended copy of its model, and it lies where the waiter may load."""
    usable = copy.model == ticket.model and copy.owner in (None, ticket.member)
    return usable and copy.is_within(ticket.tied or ticket.devices) and not closed & set(copy.devices)


def _resized(model: ModelView, mb: float) -> ModelView:
    """Return a model as if a copy took `mb`, which is known."""
    return replace(model, known=True, need_mb=mb)


def _is_of_the_many(ticket: TicketView) -> bool:
    """Tell whether a waiter is one for a known model that may go anywhere, beside whatever."""
    return (
        ticket.priority == 1
        and not ticket.steady
        and not ticket.preload
        and not ticket.devices
        and not ticket.tied
        and ticket.span == 1
    )


def _may_be_passed(view: View, ticket: TicketView) -> bool:
    return not ticket.passed and _is_of_the_many(ticket) and not is_due(view, ticket)


def _most_free_mb(devices: Iterable[DeviceView], slack_percentage: float) -> float:
    return max((free_mb(device, slack_percentage) for device in devices), default=0.0)
