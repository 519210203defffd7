"""The plan: walk the queue and say for every waiter what happens now."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from mpmm.policy.admission import best_fit, free_mb, largest_limit_mb, limit_mb
from mpmm.policy.eviction import Room, find_room, waiting_pays
from mpmm.policy.fairness import is_due, is_overdue, queue_order
from mpmm.policy.sharing import waiting_is_sooner
from mpmm.policy.view import (
    Decision,
    Enough,
    Evict,
    Grant,
    Idle,
    Load,
    ModelView,
    Reason,
    Refuse,
    TicketView,
    View,
    Wait,
    Why,
)

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Decisions in the order of the queue. `blocked`: later tickets could get little but idle copies, however many."""

    decisions: tuple[Decision, ...]
    blocked: bool


def make_plan(view: View) -> Plan:
    """Return what happens to the waiters in the view, in the order in which it is to be carried out.

    During isolation everybody waits. Otherwise idle copies are handed out first, as far as `fairness` lets waiters
    pass. Then each waiter, first one first, may load where its model fits, or has room made for it, or waits; behind
    the first that waits for room or for its isolation only small loads go on, beside what is reserved for it. Tickets
    without a decision wait behind it.
    """
    if view.isolated:
        return Plan((), blocked=True)
    return _Walk(view).plan()


class _Walk:
    """The queue's walk. What earlier decisions take is no longer there for later ones."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._idle: defaultdict[int, list[Idle]] = defaultdict(list)
        for copy in view.idle:
            self._idle[copy.model].append(copy)
        self._models = dict(view.models)
        self._devices = {device.device: device for device in view.devices}
        self._busy = view.active + view.loading
        self._blocked: TicketView | None = None
        # Where room is made for the blocked one, as far as that is known.
        self._room: Room | None = None
        # Models that cannot be loaded beside that. Room only shrinks in a walk, so each is looked at once: most
        # who wait behind a blocked one want the same few.
        self._not_beside: set[int] = set()
        self._sharing: Counter[int] = Counter()
        # Somebody waits for a lease to end, so no further one is given out behind him.
        self._lease_is_awaited = False

    def plan(self) -> Plan:
        order = queue_order(self._view)
        decided: dict[int, Decision | None] = dict(self._hand_out(order))
        for ticket in order:
            hopeless = self._blocked and ticket.model in self._not_beside and not ticket.preload
            if ticket.row not in decided and not hopeless:
                decided[ticket.row] = self._decide(ticket)
        decisions = (decided.get(ticket.row) for ticket in order)
        return Plan(tuple(decision for decision in decisions if decision is not None), self._blocked is not None)

    # ---- idle copies ---------------------------------------------------------------------------------------

    def _hand_out(self, order: list[TicketView]) -> dict[int, Grant]:
        """Give idle copies to those who can use them and may have them."""
        view = self._view
        granted: dict[int, Grant] = {}
        kept: set[int] = set()
        passed: TicketView | None = None
        for ticket in order:
            if ticket.preload:
                # It takes no copy, and holds up nobody who reuses one.
                continue
            copies = self._idle.get(ticket.model)
            copy = None
            if copies:
                copy = next((c for c in copies if c.owner in (None, ticket.member) and c.row not in kept), None)
            if copy is not None and copies is not None:
                copies.remove(copy)
                self._busy += 1
                why = Why(Reason.PASSING, other=passed.model) if passed else Why(Reason.IDLE_COPY)
                granted[ticket.row] = Grant(ticket.row, copy.row, why)
                continue
            if self._isolates(view.models[ticket.model]):
                # Everything has to drain for it, so whatever passes it delays it.
                break
            if ticket.blocked_since_s is None:
                continue
            passed = passed or ticket
            if is_overdue(view, ticket):
                break
            if is_due(view, ticket):
                room = self._find_room(ticket, view.models[ticket.model].need_mb, due=True)
                if room is None:
                    break
                kept.update(copy.row for copy in room.victims)
                kept.update(copy.row for copy in room.awaited)
        return granted

    # ---- loads ---------------------------------------------------------------------------------------------

    def _decide(self, ticket: TicketView) -> Decision | None:
        model = self._models[ticket.model]
        if ticket.preload and self._has_enough(ticket, model):
            return Enough(ticket.row)
        if self._blocked is not None:
            return self._beside(ticket, model)
        if not self._devices:
            return self._block(ticket, Why(Reason.NO_DEVICE))
        if self._isolates(model):
            return self._isolate(ticket, model.need_mb)
        if ticket.preload:
            return self._load(ticket, model)
        if self._is_at_most(model):
            return self._exchange(ticket, model)
        ahead = self._sharing[ticket.model]
        shared_in_s = waiting_is_sooner(model, ticket, ahead, self._view.now_s)
        if shared_in_s is not None:
            self._sharing[ticket.model] += 1
            return Wait(ticket.row, Reason.SHARING, Why(Reason.SHARING, seconds=shared_in_s))
        return self._load(ticket, model)

    def _isolates(self, model: ModelView) -> bool:
        return not model.known and self._view.rules.isolate_unknown

    def _is_at_most(self, model: ModelView) -> bool:
        """Tell whether there are as many copies of a model as there may be."""
        return model.copies >= self._view.rules.max_model_copies

    def _has_enough(self, ticket: TicketView, model: ModelView) -> bool:
        """Tell whether a preload's member can use as many copies as it wants, or there are as many as there may be."""
        usable = model.usable_by(ticket.member) + model.coming_for(ticket.member)
        return usable >= ticket.preload or self._is_at_most(model)

    def _fit_beside(self, copies: int, need_mb: float) -> bool:
        """Tell whether the devices could take one copy more than so many of the same size, if they had nothing else."""
        slack = self._view.rules.slack_percentage
        return need_mb <= 0 or copies < sum(limit_mb(device, slack) // need_mb for device in self._devices.values())

    def _exchange(self, ticket: TicketView, model: ModelView) -> Decision:
        """Wait for one of as many copies as there may be; if they all are of no use, for another in place of one."""
        if not model.usable_by(ticket.member) and not model.coming_for(ticket.member):
            others = [copy for copy in self._idle[ticket.model] if copy.owner and not copy.pinned]
            if others:
                return self._evict(ticket, others[-1:], Why(Reason.EXCHANGED, model.need_mb))
        return Wait(ticket.row, Reason.COPIES, Why(Reason.COPIES))

    def _isolate(self, ticket: TicketView, need_mb: float) -> Decision:
        if self._busy:
            longest_s = max((copy.free_in_s for copy in self._view.busy), default=0.0)
            return self._block(ticket, Why(Reason.DRAINING, need_mb, seconds=longest_s))
        evictable = [copy for copies in self._idle.values() for copy in copies if not copy.pinned]
        if evictable:
            return self._evict(ticket, evictable, Why(Reason.FLUSHED, need_mb))
        if self._view.unloading:
            return self._block(ticket, Why(Reason.UNLOADING, need_mb))
        returning_mb = math.fsum(device.returning_mb for device in self._devices.values())
        if returning_mb > 0:
            return self._block(ticket, Why(Reason.RETURNING, need_mb, coming_mb=returning_mb))
        slack = self._view.rules.slack_percentage
        roomiest = max(self._devices.values(), key=lambda device: (free_mb(device, slack), -device.device))
        self._blocked = ticket
        return Load(ticket.row, roomiest.device, need_mb, True, Why(Reason.ALONE, need_mb, free_mb(roomiest, slack)))

    def _load(self, ticket: TicketView, model: ModelView) -> Decision:
        slack = self._view.rules.slack_percentage
        largest = largest_limit_mb(self._devices.values(), slack)
        # What is only assumed must not make a model impossible.
        need_mb = model.need_mb if model.known else min(model.need_mb, largest)
        if need_mb > largest:
            if model.usable_by(ticket.member) and not ticket.preload:
                # Too large for a second copy, but there is one to wait for.
                return Wait(ticket.row, Reason.MEMORY, Why(Reason.MEMORY, need_mb, largest))
            return Refuse(ticket.row, Why(Reason.TOO_LARGE, need_mb, largest))
        if ticket.preload and not self._fit_beside(model.copies, need_mb):
            return Refuse(ticket.row, Why(Reason.TOO_LARGE, need_mb, largest))
        if model.lease and self._lease_is_awaited:
            return Wait(ticket.row, Reason.BEHIND, Why(Reason.BEHIND, need_mb))
        device = best_fit(self._devices.values(), need_mb, slack)
        if device is not None:
            reason = Reason.ANOTHER_COPY if model.usable_by(ticket.member) else Reason.FITS
            return self._book(ticket, device.device, need_mb, reason)
        if all(need_mb > limit_mb(device, slack) - device.leased_mb for device in self._devices.values()):
            # Nothing that others let go would help, so nobody has to stand back for it, for hours perhaps.
            self._lease_is_awaited = True
            return Wait(ticket.row, Reason.LEASED, Why(Reason.LEASED, need_mb, self._most_free_mb()))
        due = is_due(self._view, ticket)
        room = self._find_room(ticket, need_mb, due)
        self._room = room
        if room is None:
            pinned = any(copy.pinned for copies in self._idle.values() for copy in copies)
            return self._block(ticket, Why(Reason.PINNED if pinned else Reason.MEMORY, need_mb, self._most_free_mb()))
        free = free_mb(room.device, slack)
        if room.victims and (due or not room.awaited):
            reason = Reason.LOWEST_SCORE if room.harm is None else Reason.SMALLEST_HARM
            coming_mb = math.fsum(copy.mb for copy in room.victims)
            why = Why(reason, need_mb, free, coming_mb, room.harm or 0.0, room.victims[0].model)
            return self._evict(ticket, list(room.victims), why)
        if room.awaited:
            coming_mb = math.fsum(copy.mb for copy in room.awaited)
            why = Why(Reason.IN_USE, need_mb, free, coming_mb, room.drain_s, room.awaited[0].model)
            return self._block(ticket, why)
        unloading_mb, returning_mb = room.device.unloading_mb, room.device.returning_mb
        if unloading_mb > 0:
            return self._block(ticket, Why(Reason.UNLOADING, need_mb, free, unloading_mb))
        return self._block(ticket, Why(Reason.RETURNING, need_mb, free, returning_mb))

    def _find_room(self, ticket: TicketView, need_mb: float, due: bool) -> Room | None:
        """Return where room can be made with the least harm.

        Copies in use are waited for if that is better than to unload idle ones; who is due takes what can be had now.
        """
        idle = [copy for copies in self._idle.values() for copy in copies]
        view, devices = self._view, self._devices.values()
        now = min(
            (room for device in devices if (room := find_room(view, device, idle, (), need_mb, ticket))),
            key=lambda room: room.cost,
            default=None,
        )
        if now is not None and (due or not now.victims or not view.busy):
            return now
        later = min(
            (room for device in devices if (room := find_room(view, device, idle, view.busy, need_mb, ticket))),
            key=lambda room: room.cost,
            default=None,
        )
        if now is None or (later is not None and waiting_pays(later, now, view.models[ticket.model])):
            return later
        return now

    def _beside(self, ticket: TicketView, model: ModelView) -> Decision | None:
        """Let a waiter load what fits beside the room that is reserved for the blocked one."""
        room, blocked = self._room, self._blocked
        if room is None or blocked is None or self._isolates(model) or model.shared or self._is_at_most(model):
            self._not_beside.add(model.model)
            return None
        if model.lease and self._lease_is_awaited:
            return None
        if model.usable_by(ticket.member) or model.coming_for(ticket.member):
            return None
        slack = self._view.rules.slack_percentage
        free = [
            replace(device, reserved_mb=device.reserved_mb + max(0.0, free_mb(device, slack) - room.left_mb))
            if device.device == room.device.device
            else device
            for device in self._devices.values()
        ]
        device = best_fit(free, model.need_mb, slack)
        if device is None:
            self._not_beside.add(model.model)
            return None
        if device.device == room.device.device:
            self._room = replace(room, left_mb=room.left_mb - model.need_mb)
        return self._book(ticket, device.device, model.need_mb, Reason.BESIDE, blocked.model)

    def _book(self, ticket: TicketView, device: int, need_mb: float, reason: Reason, other: int | None = None) -> Load:
        before = self._devices[device]
        self._devices[device] = replace(before, reserved_mb=before.reserved_mb + need_mb)
        self._busy += 1
        # Those behind may share this load.
        model = self._models[ticket.model]
        loading = {**model.loading, ticket.member: model.loading.get(ticket.member, 0) + 1}
        self._models[ticket.model] = replace(model, loading=loading)
        free = free_mb(before, self._view.rules.slack_percentage)
        return Load(ticket.row, device, need_mb, False, Why(reason, need_mb, free, other=other))

    def _evict(self, ticket: TicketView, copies: list[Idle], why: Why) -> Evict:
        for copy in copies:
            self._idle[copy.model].remove(copy)
        self._blocked = ticket
        return Evict(ticket.row, tuple(copy.row for copy in copies), why)

    def _block(self, ticket: TicketView, why: Why) -> Wait:
        self._blocked = ticket
        return Wait(ticket.row, why.reason, why, first=True)

    def _most_free_mb(self) -> float:
        slack = self._view.rules.slack_percentage
        return max(free_mb(device, slack) for device in self._devices.values())
