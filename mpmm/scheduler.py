"""The bridge between policy and shared state: read a view, ask for a plan, write it down.

Whoever changes something that waiters may be waiting for calls `Scheduler.advance` in the same transaction: a
release, the end of a load or of an unload, a new sample, a reaped member. There is no scheduling process.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mpmm.errors import TableFullError
from mpmm.policy.plan import make_plan
from mpmm.policy.view import (
    Decision,
    DeviceView,
    Enough,
    Evict,
    Grant,
    Idle,
    Load,
    ModelView,
    Refuse,
    Rules,
    TicketView,
    View,
    Wait,
)
from mpmm.shared_state.layout import Device, Header, Instance, Member, Model, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction

__all__ = ["Copies", "Scheduler"]

# So many waiters are looked at in one step.
QUEUE_PART = 32
FEW_WAITERS = 16


def _counts() -> defaultdict[int, defaultdict[int, int]]:
    return defaultdict(lambda: defaultdict(int))


@dataclass
class Copies:
    """What the instance rows say: copies by model (loaded ones shared, or owned by member; loading by member), MB by
    device. `booked_mb` is what all but the loading ones take."""

    idle: list[Idle] = field(default_factory=list)
    shared: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    owned: defaultdict[int, defaultdict[int, int]] = field(default_factory=_counts)
    loading: defaultdict[int, defaultdict[int, int]] = field(default_factory=_counts)
    oldest_load: dict[int, int] = field(default_factory=dict)
    unloading: int = 0
    booked_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    reserved_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    unloading_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    leased_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))


class Scheduler:
    """Plans for one namespace. Methods need the lock."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._segment = namespace.segment
        self._layout = namespace.segment.layout

    def advance(self, t: Transaction, newcomer: int | None = None) -> None:
        """Carry out what the policy says about everybody who waits.

        newcomer: row of the ticket that the caller has just made. Raises TableFullError when that one could load
        but for the table of instances; others wait for a row, which is none of the caller's business.
        """
        words = self._segment.words
        while words[Header.WAITING] and not words[Header.ISOLATED]:
            view = self.read_view()
            plan = make_plan(view)
            for decision in plan.decisions:
                self._carry_out(t, decision, newcomer)
            if plan.blocked or not view.tickets or not self._answered_all(view):
                return
            # Nobody in this part of the queue is left, so the rest moves up.

    def release(self, t: Transaction, instance: int, used: bool = True) -> None:
        """Take a copy from its holder, and carry out the policy for those who wait; `used` as in the transition.

        If the first waiter waits for just this copy, the plan is to give it to him, and nothing else has changed for
        those behind. That is found out in a tenth of the time of a plan (40 us instead of 350 with 16 waiters).
        """
        words, transitions = self._segment.words, self._namespace.transitions
        at = self._tables.instance(instance)
        if words[Header.WAITING] and not words[Header.ISOLATED] and not words[at + Instance.DOOMED]:
            first = self._first_waiter()
            if (
                first is not None
                and words[self._tables.ticket(first) + Ticket.MODEL] == words[at + Instance.MODEL]
                and not words[self._tables.ticket(first) + Ticket.PRELOAD]
            ):
                owner = words[at + Instance.OWNER]
                if not owner or owner == words[self._tables.ticket(first) + Ticket.MEMBER]:
                    transitions.pass_on(t, first, instance, used)
                    return
        transitions.release(t, instance, used)
        self.advance(t)

    def _first_waiter(self) -> int | None:
        """Return the first row of `_queue_order`; for few waiters without the sorting, half the time of a hand-over."""
        waiting = self._tables.rows_where(self._layout.tickets, Ticket.STATE, Ticket.WAITING)
        if len(waiting) > FEW_WAITERS:
            order = self._queue_order()
            return int(order[0]) if len(order) else None
        words, now = self._segment.words, time.monotonic_ns()
        places = [
            (words[at + Ticket.PRIORITY], words[at + Ticket.NUMBER], row)
            for row in waiting
            if words[(at := self._tables.ticket(row)) + Ticket.DEADLINE] > now
        ]
        return min(places)[-1] if places else None

    def _queue_order(self) -> npt.NDArray[np.intp]:
        """Return the rows of waiters in the queue's order. Those whose deadline has passed are about to leave."""
        rows = self._tables.view(self._layout.tickets)
        waiting = np.flatnonzero(rows[:, Ticket.STATE] == Ticket.WAITING)
        waiting = waiting[rows[waiting, Ticket.DEADLINE] > time.monotonic_ns()]
        ordered: npt.NDArray[np.intp] = waiting[
            np.lexsort((rows[waiting, Ticket.NUMBER], rows[waiting, Ticket.PRIORITY]))
        ]
        return ordered

    def _answered_all(self, view: View) -> bool:
        words = self._segment.words
        return all(words[self._tables.ticket(ticket.row)] != Ticket.WAITING for ticket in view.tickets)

    def must_queue(self) -> bool:
        """Tell whether a newcomer may not simply take an idle copy: somebody waits, or runs alone."""
        words = self._segment.words
        return bool(words[Header.WAITING] or words[Header.ISOLATED])

    def read_view(self) -> View:
        """Return what the policy may look at."""
        words, settings = self._segment.words, self._namespace.settings
        copies = self.read_copies()
        now = time.monotonic_ns()
        tickets = self._tickets(Counter(copy.model for copy in copies.idle))
        wanted = {ticket.model for ticket in tickets} | set(copies.shared) | set(copies.owned)
        return View(
            now_s=now / 1e9,
            rules=Rules(
                slack_percentage=settings.slack_percentage,
                eviction_cooldown_seconds=settings.eviction_cooldown_seconds,
                min_model_copies=int(settings.min_model_copies),
                max_overtake_seconds=settings.max_overtake_seconds,
                # Alone on the device is the way to measure where only the whole device is measured.
                isolate_unknown=not words[Header.SOURCE_BOOKS_ONLY] and not words[Header.SOURCE_MEASURES_PROCESSES],
                max_model_copies=settings.max_model_copies,
            ),
            models={model: self._model(model, copies, now) for model in wanted},
            idle=tuple(sorted(copies.idle, key=lambda copy: -copy.idle_since_s)),
            tickets=tickets,
            devices=self.device_views(copies),
            active=words[Header.ACTIVE],
            loading=words[Header.LOADING],
            unloading=copies.unloading,
            isolated=bool(words[Header.ISOLATED]),
        )

    def read_copies(self) -> Copies:
        """Return what the instance rows say, in one pass over those in use."""
        words, floats, tables = self._segment.words, self._segment.floats, self._tables
        measures = bool(words[Header.SOURCE_MEASURES_PROCESSES])
        copies = Copies()
        for row in tables.used_rows(self._layout.instances):
            at = tables.instance(row)
            state, model, _, holder, owner, server, device = words[at : at + Instance.MB]
            mb, reserved = floats[at + Instance.MB], floats[at + Instance.RESERVED_MB]
            since = words[at + Instance.SINCE]
            if state == Instance.LEASED:
                # Not a copy of a model, but a reservation, of which what its program takes is in the figure already.
                copies.reserved_mb[device] += max(0.0, reserved - mb)
                copies.leased_mb[device] += reserved
                continue
            if state == Instance.LOADING:
                copies.loading[model][holder] += 1
                copies.oldest_load[model] = min(since, copies.oldest_load.get(model, since))
            else:
                copies.booked_mb[device] += mb
            if state == Instance.UNLOADING:
                copies.unloading += 1
                copies.unloading_mb[device] += mb
            elif state != Instance.LOADING and owner:
                copies.owned[model][owner] += 1
            elif state != Instance.LOADING:
                copies.shared[model] += 1
            if state == Instance.IDLE:
                pinned = bool(words[tables.model(model) + Model.PINS])
                copies.idle.append(Idle(row, model, owner or None, device, mb, since / 1e9, pinned))
            if reserved:
                if server and measures:
                    # What a loading server takes already is part of the device's figure.
                    measured = floats[tables.member(server - 1) + Member.MEASURED_MB]
                    reserved = max(0.0, reserved - (0.0 if math.isnan(measured) else measured))
                copies.reserved_mb[device] += reserved
        return copies

    def device_views(self, copies: Copies) -> tuple[DeviceView, ...]:
        """Return the figures of all devices."""
        floats, tables = self._segment.floats, self._tables
        return tuple(
            DeviceView(
                device=row,
                total_mb=floats[tables.device(row) + Device.TOTAL_MB],
                used_mb=self.used_mb(row, copies),
                reserved_mb=copies.reserved_mb[row],
                unloading_mb=copies.unloading_mb[row],
                returning_mb=floats[tables.device(row) + Device.RETURNING_MB],
                leased_mb=copies.leased_mb[row],
            )
            for row in tables.used_rows(self._layout.devices)
        )

    def need_mb(self, model: int) -> float:
        """Return what a copy of a model is expected to take: its estimate, else the default."""
        at = self._tables.model(model)
        if self._segment.words[at + Model.KNOWN]:
            return self._segment.floats[at + Model.ESTIMATE_MB]
        return self._namespace.settings.default_estimate_mb

    def used_mb(self, device: int, copies: Copies) -> float:
        """Return the memory in use: the last figure, or the books where nothing can be measured."""
        if self._segment.words[Header.SOURCE_BOOKS_ONLY]:
            return copies.booked_mb[device]
        return self._segment.floats[self._tables.device(device) + Device.USED_MB]

    def limit_mb(self, device: int) -> float:
        """Return how much of a device may be in use."""
        total = self._segment.floats[self._tables.device(device) + Device.TOTAL_MB]
        return total * (1.0 - self._namespace.settings.slack_percentage)

    def _model(self, model: int, copies: Copies, now_ns: int) -> ModelView:
        at = self._tables.model(model)
        words, floats = self._segment.words, self._segment.floats
        return ModelView(
            model=model,
            known=bool(words[at + Model.KNOWN]),
            need_mb=self.need_mb(model),
            shared=copies.shared[model],
            owned=copies.owned[model],
            waiting=words[at + Model.WAITING],
            loading=copies.loading[model],
            shares=bool(words[at + Model.SHARES]),
            load_s=floats[at + Model.LOAD_S],
            hold_s=floats[at + Model.HOLD_S],
            loading_for_s=(now_ns - copies.oldest_load.get(model, now_ns)) / 1e9,
            lease=words[at] == Model.LEASE,
        )

    def _tickets(self, idle_of_model: Mapping[int, int]) -> tuple[TicketView, ...]:
        """Return the first waiters of the queue, and the first ones of every model that has idle copies.

        Others can get nothing before these have got something, so a thousand waiters cost no more than thirty.
        """
        rows = self._tables.view(self._layout.tickets)
        order = self._queue_order()
        chosen = order[:QUEUE_PART].tolist()
        if len(order) > QUEUE_PART:
            rest = order[QUEUE_PART:]
            models = rows[rest, Ticket.MODEL]
            for model, idle in idle_of_model.items():
                # Twice as many as there are copies: a copy may be of no use to its first waiter's process.
                chosen += rest[models == model][: 2 * idle].tolist()
        fields = [Ticket.NUMBER, Ticket.PRIORITY, Ticket.MODEL, Ticket.MEMBER, Ticket.ENQUEUED, Ticket.PRELOAD]
        return tuple(
            TicketView(row, number, priority, model, member, enqueued / 1e9, preload)
            for row, (number, priority, model, member, enqueued, preload) in zip(
                chosen, rows[chosen][:, fields].tolist(), strict=True
            )
        )

    def _make_room_in_table(self, t: Transaction, ticket: int) -> bool:
        """Have the copy that has been idle longest unloaded for want of a row; return False if none may be."""
        rows = self._tables.view(self._layout.instances)
        if np.any(rows[:, Instance.STATE] == Instance.UNLOADING):
            return True
        pinned = self._tables.view(self._layout.models)[:, Model.PINS] > 0
        idle = np.flatnonzero(rows[:, Instance.STATE] == Instance.IDLE)
        idle = idle[~pinned[rows[idle, Instance.MODEL]]]
        if not len(idle):
            return False
        unloader = self._segment.words[self._tables.ticket(ticket) + Ticket.MEMBER] - 1
        oldest = int(idle[np.argmin(rows[idle, Instance.SINCE])])
        self._namespace.transitions.begin_unload(t, oldest, unloader, evicted=True)
        return True

    def _carry_out(self, t: Transaction, decision: Decision, newcomer: int | None) -> None:
        transitions = self._namespace.transitions
        match decision:
            case Grant(ticket, instance):
                transitions.grant(t, ticket, instance)
            case Load(ticket, device, need_mb, alone):
                try:
                    transitions.allow_load(t, ticket, device, need_mb, alone)
                except TableFullError as error:
                    # Found out before anything was written. (A full undo log is no matter of one ticket.)
                    if error.table != self._layout.instances.name:
                        raise
                    if not self._make_room_in_table(t, ticket) and ticket == newcomer:
                        raise
            case Evict(ticket, instances):
                unloader = self._segment.words[self._tables.ticket(ticket) + Ticket.MEMBER] - 1
                for instance in instances:
                    transitions.begin_unload(t, instance, unloader, evicted=True)
            case Refuse(ticket):
                transitions.refuse(t, ticket)
            case Enough(ticket):
                transitions.dismiss(t, ticket)
            case Wait(ticket, reason):
                if self._segment.words[self._tables.ticket(ticket) + Ticket.REASON] != reason:
                    transitions.set_reason(t, ticket, reason)
