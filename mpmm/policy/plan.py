"""The plan: walk the queue once and say for every waiter what happens now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from mpmm.policy.admission import best_fit, free_mb, largest_limit_mb, limit_mb
from mpmm.policy.eviction import choose_victims
from mpmm.policy.fairness import may_overtake, queue_order
from mpmm.policy.sharing import waiting_is_sooner
from mpmm.policy.view import (
    Decision,
    DeviceView,
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
)

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Decisions in order. `blocked`: the queue's later tickets could get nothing but idle copies, however many."""

    decisions: tuple[Decision, ...]
    blocked: bool


def make_plan(view: View) -> Plan:
    """Return what happens to the waiters in the view, in the order in which it is to be carried out.

    During isolation everybody waits. Otherwise each waiter, first one first, gets an idle copy, or may load
    where its model fits, or has room made for it, or waits; the first that waits for room or for its isolation
    blocks later loads, see `fairness`. Tickets without a decision wait behind it.
    """
    if view.isolated:
        return Plan((), blocked=True)
    return _Walk(view).plan()


class _Walk:
    """The queue's walk. What earlier decisions take is no longer there for later ones."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._idle = list(view.idle)
        self._devices = {device.device: device for device in view.devices}
        self._busy = view.active + view.loading
        self._blocked: TicketView | None = None
        self._sharing: Counter[int] = Counter()
        self._loads: Counter[int] = Counter()
        # Somebody waits for a lease to end, so no further one is given out behind him.
        self._lease_is_awaited = False

    def plan(self) -> Plan:
        decisions = (self._decide(ticket) for ticket in queue_order(self._view))
        return Plan(tuple(decision for decision in decisions if decision is not None), self._blocked is not None)

    def _decide(self, ticket: TicketView) -> Decision | None:
        view = self._view
        model = view.models[ticket.model]
        if ticket.preload and self._has_enough(ticket, model):
            return Enough(ticket.row)
        if not ticket.preload and may_overtake(view, self._blocked):
            copy = next((c for c in self._idle if c.model == ticket.model and c.owner in (None, ticket.member)), None)
            if copy is not None:
                self._idle.remove(copy)
                self._busy += 1
                return Grant(ticket.row, copy.row)
        if self._blocked is not None:
            return None
        if not self._devices:
            return self._block(ticket, Reason.NO_DEVICE)
        if not model.known and view.rules.isolate_unknown:
            return self._isolate(ticket, model.need_mb)
        if ticket.preload:
            return self._load(ticket, model)
        if self._is_at_most(model):
            return self._exchange(ticket, model)
        ahead = self._sharing[ticket.model]
        if waiting_is_sooner(model, ticket, ahead, view.now_s):
            self._sharing[ticket.model] += 1
            return Wait(ticket.row, Reason.SHARING)
        return self._load(ticket, model)

    def _is_at_most(self, model: ModelView) -> bool:
        """Tell whether there are as many copies of a model as there may be."""
        return model.copies + self._loads[model.model] >= self._view.rules.max_model_copies

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
            others = [copy for copy in self._idle if copy.model == ticket.model and copy.owner and not copy.pinned]
            if others:
                return self._evict(ticket, others[-1:])
        return Wait(ticket.row, Reason.COPIES)

    def _isolate(self, ticket: TicketView, need_mb: float) -> Decision:
        if self._busy:
            return self._block(ticket, Reason.DRAINING)
        evictable = [copy for copy in self._idle if not copy.pinned]
        if evictable:
            return self._evict(ticket, evictable)
        if self._view.unloading:
            return self._block(ticket, Reason.UNLOADING)
        if any(device.returning_mb > 0 for device in self._devices.values()):
            return self._block(ticket, Reason.RETURNING)
        roomiest = max(self._devices.values(), key=lambda device: free_mb(device, self._view.rules.slack_percentage))
        self._blocked = ticket
        return Load(ticket.row, roomiest.device, need_mb, alone=True)

    def _load(self, ticket: TicketView, model: ModelView) -> Decision:
        slack = self._view.rules.slack_percentage
        largest = largest_limit_mb(self._devices.values(), slack)
        # What is only assumed must not make a model impossible.
        need_mb = model.need_mb if model.known else min(model.need_mb, largest)
        if need_mb > largest:
            if model.usable_by(ticket.member) and not ticket.preload:
                # Too large for a second copy, but there is one to wait for.
                return Wait(ticket.row, Reason.MEMORY)
            return Refuse(ticket.row)
        if ticket.preload and not self._fit_beside(model.copies, need_mb):
            return Refuse(ticket.row)
        if model.lease and self._lease_is_awaited:
            return Wait(ticket.row, Reason.BEHIND)
        device = best_fit(self._devices.values(), need_mb, slack)
        if device is not None:
            self._devices[device.device] = replace(device, reserved_mb=device.reserved_mb + need_mb)
            self._busy += 1
            self._loads[ticket.model] += 1
            return Load(ticket.row, device.device, need_mb, alone=False)
        if all(need_mb > limit_mb(device, slack) - device.leased_mb for device in self._devices.values()):
            # Nothing that others let go would help, so nobody has to stand back for it, for hours perhaps.
            self._lease_is_awaited = True
            return Wait(ticket.row, Reason.LEASED)
        sets = [
            (device, victims)
            for device in self._devices.values()
            if (victims := choose_victims(self._view, device, self._idle, need_mb, ticket)) is not None
        ]
        if not sets:
            pinned = any(copy.pinned for copy in self._idle)
            return self._block(ticket, Reason.PINNED if pinned else Reason.MEMORY)
        device, victims = min(sets, key=lambda entry: (sum(copy.mb for copy in entry[1]), entry[0].device))
        if victims:
            return self._evict(ticket, list(victims))
        return self._block(ticket, _why_not_yet(device))

    def _evict(self, ticket: TicketView, copies: list[Idle]) -> Evict:
        rows = tuple(copy.row for copy in copies)
        self._idle = [copy for copy in self._idle if copy.row not in rows]
        self._block(ticket, Reason.UNLOADING)
        return Evict(ticket.row, rows)

    def _block(self, ticket: TicketView, reason: Reason) -> Wait:
        self._blocked = ticket
        return Wait(ticket.row, reason)


def _why_not_yet(device: DeviceView) -> Reason:
    return Reason.UNLOADING if device.unloading_mb > 0 else Reason.RETURNING
