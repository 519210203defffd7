"""What the policy may look at: models, devices and waiters of one namespace, read from its rows."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mpmm.policy.fairness import UNKNOWN_FIRST
from mpmm.policy.out_of_memory import MORE_MB
from mpmm.policy.view import (
    DeviceView,
    ModelView,
    Rules,
    TicketView,
    View,
)
from mpmm.scheduling.copies import Copies, CopiesReader
from mpmm.scheduling.demand import Demands
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Device, Header, Instance, Model, Ticket, device_rows
from mpmm.shared_state.namespace import Namespace

__all__ = ["Views"]

# So many waiters are looked at in one step.
QUEUE_PART = 32
# Less than this is no news for those who wait; the next poll of the leader has them planned for anyway.
LEAST_ROOM_MB = 1.0
_ROOM_FIELDS = [Device.EXTERNAL_MB, Device.EXTERNAL_LEAST_MB, Device.RETURNING_MB]


class Views:
    """Reads what a plan is made of. Methods need the lock."""

    def __init__(self, namespace: Namespace, copies: CopiesReader, demand: Demands) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._segment = namespace.segment
        self._layout = namespace.segment.layout
        self._copies = copies
        self._demand = demand

    def read_view(self) -> View:
        """Return what the policy may look at."""
        words, settings = self._segment.words, self._namespace.settings
        copies = self._copies.read_copies()
        now = time.monotonic_ns()
        tickets = self._tickets(Counter(copy.model for copy in copies.idle))
        wanted = {ticket.model for ticket in tickets} | {copy.model for copy in copies.busy}
        wanted |= set(copies.shared) | set(copies.owned) | {copy.model for copy in copies.suspended}
        return View(
            now_s=now / 1e9,
            rules=Rules(
                slack_percentage=settings.slack_percentage,
                eviction_cooldown_seconds=settings.eviction_cooldown_seconds,
                min_model_copies=int(settings.min_model_copies),
                max_overtake_seconds=settings.max_overtake_seconds,
                # Alone on the device is the way to measure where only the whole device is measured.
                isolate_unknown=not (words[Header.SOURCE_ACCOUNTING_ONLY] or words[Header.SOURCE_MEASURES_PROCESSES]),
                max_model_copies=settings.max_model_copies,
            ),
            models={model: self.model_view(model, copies, now) for model in wanted},
            idle=tuple(sorted(copies.idle, key=lambda copy: -copy.idle_since_s)),
            tickets=tickets,
            devices=self.device_views(copies),
            busy=tuple(copies.busy),
            leases=tuple(copies.leases),
            suspended=tuple(sorted(copies.suspended, key=lambda copy: -copy.since_s)),
        )

    def device_views(self, copies: Copies) -> tuple[DeviceView, ...]:
        """Return what the ledgers of all devices say."""
        words, floats, tables = self._segment.words, self._segment.floats, self._tables
        late = words[Header.SOURCE_FREES_LATE]
        views = []
        for row in tables.used_rows(self._layout.devices):
            at = tables.device(row)
            external, least = floats[at + Device.EXTERNAL_MB], floats[at + Device.EXTERNAL_LEAST_MB]
            if math.isnan(external):
                # It has never been measured. (Where nobody measures it any more, the last figure still counts.)
                external = least = 0.0
            returning = floats[at + Device.RETURNING_MB] if late else 0.0
            views.append(
                DeviceView(
                    device=row,
                    total_mb=floats[at + Device.TOTAL_MB],
                    used_mb=external + copies.booked_mb[row] + returning,
                    reserved_mb=copies.reserved_mb[row],
                    unloading_mb=copies.unloading_mb[row],
                    returning_mb=returning,
                    leased_mb=copies.leased_mb[row],
                    external_mb=external,
                    external_least_mb=least,
                    isolated=bool(words[Header.ISOLATED] >> row & 1),
                    unloading=copies.unloading[row],
                    steady=copies.steady.get(row),
                )
            )
        return tuple(views)

    def model_view(self, model: int, copies: Copies, now_ns: int) -> ModelView:
        at = self._tables.model(model)
        words, floats = self._segment.words, self._segment.floats
        return ModelView(
            model=model,
            known=self.is_known(model),
            need_mb=self.need_mb(model),
            shared=copies.shared[model],
            owned=copies.owned[model],
            waiting=words[at + Model.WAITING],
            loading=copies.loading[model],
            shares=bool(words[at + Model.SHARES]),
            load_s=floats[at + Model.LOAD_S],
            hold_s=floats[at + Model.HOLD_S],
            loading_for_s=(now_ns - copies.newest_load.get(model, now_ns)) / 1e9,
            held_for_s=(now_ns - copies.newest_hold.get(model, now_ns)) / 1e9,
            rate=self._demand.of(model).counted(self._demand.requests(model), now_ns / 1e9).per_second(now_ns / 1e9),
            lease=words[at] == Model.LEASE,
            failures=words[at + Model.FAILURES],
            failed_ago_s=(now_ns - words[at + Model.FAILED_AT]) / 1e9,
            leaving=copies.leaving[model],
            superseded=bool(words[at + Model.SUPERSEDED]),
            suspending=copies.suspending[model],
            resume_s=floats[at + Model.RESUME_S],
            bound_mb=floats[at + Model.AT_LEAST_MB],
        )

    def _tickets(self, idle_of_model: Mapping[int, int]) -> tuple[TicketView, ...]:
        """Return the first waiters of the queue, and the first ones of every model that has idle copies.

        Others can get nothing before these have got something, so a thousand waiters cost no more than thirty.
        """
        rows = self._tables.view(self._layout.tickets)
        order = self.queue_order()
        chosen = order[:QUEUE_PART].tolist()
        if len(order) > QUEUE_PART:
            # Those whose loads fail hold up nobody, however many they are.
            failing = self._tables.view(self._layout.models)[:, Model.FAILURES] > 0
            if failing.any():
                order = order[np.argsort(failing[rows[order, Ticket.MODEL]], kind="stable")]
                chosen = order[:QUEUE_PART].tolist()
            rest = order[QUEUE_PART:]
            models = rows[rest, Ticket.MODEL]
            for model, idle in idle_of_model.items():
                # Twice as many as there are copies: a copy may be of no use to its first waiter's process.
                chosen += rest[models == model][: 2 * idle].tolist()
        fields = [
            *(Ticket.NUMBER, Ticket.PRIORITY, Ticket.MODEL, Ticket.MEMBER, Ticket.ENQUEUED, Ticket.PRELOAD),
            *(
                Ticket.HEAD_OF_LINE_AT,
                Ticket.LOADABLE_ON,
                Ticket.USABLE_ON,
                Ticket.SPAN,
                Ticket.NESTED,
                Ticket.OVERTAKEN,
                Ticket.RANK,
                Ticket.STEADY,
            ),
        ]
        found = zip(chosen, rows[chosen][:, fields].tolist(), strict=True)
        return tuple(_ticket_view(row, *values) for row, values in found)

    def queue_order(self) -> npt.NDArray[np.intp]:
        """Return the rows of waiters in the queue's order. Those whose deadline has passed are about to leave."""
        rows = self._tables.view(self._layout.tickets)
        now = time.monotonic_ns()
        waiting = np.flatnonzero(rows[:, Ticket.STATE] == Ticket.WAITING)
        waiting = waiting[rows[waiting, Ticket.DEADLINE] > now]
        priorities = rows[waiting, Ticket.PRIORITY]
        # The rule of `policy.fairness.effective_priority`, for all at once.
        bound_ns = to_ns(UNKNOWN_FIRST * self._namespace.settings.max_overtake_seconds)
        # So that known models are not overtaken by ever new unknown ones.
        promoted = (priorities == 1) & (rows[waiting, Ticket.ENQUEUED] + np.uint64(bound_ns) <= now)
        priorities = np.where(promoted, 0, priorities)
        ordered: npt.NDArray[np.intp] = waiting[
            np.lexsort((rows[waiting, Ticket.NUMBER], rows[waiting, Ticket.RANK], priorities))
        ]
        return ordered

    def need_mb(self, model: int) -> float:
        """Return what has to be free for a copy of a model: what it is expected to take, but above its bound."""
        bound_mb = self._segment.floats[self._tables.model(model) + Model.AT_LEAST_MB]
        expected_mb = self.expected_mb(model)
        return max(expected_mb, bound_mb + MORE_MB) if bound_mb else expected_mb

    def expected_mb(self, model: int) -> float:
        """Return what a copy of a model takes once it is loaded, as far as known.

        That is its estimate, else what its users say, else the default.
        """
        floats, at = self._segment.floats, self._tables.model(model)
        if self._segment.words[at + Model.KNOWN]:
            return floats[at + Model.ESTIMATE_MB]
        return floats[at + Model.EXPECT_MB] or self._namespace.settings.default_estimate_mb

    def is_known(self, model: int) -> bool:
        """Tell whether there is an estimate of a model, or a user's word, so that it need not be measured alone."""
        at = self._tables.model(model)
        return bool(self._segment.words[at + Model.KNOWN] or self._segment.floats[at + Model.EXPECT_MB])

    def room(self) -> list[float]:
        """Return the figures, in MB, of which a smaller one means more room: for each device, and of all copies."""
        devices = self._tables.view(self._layout.devices).view(np.float64)[:, _ROOM_FIELDS]
        copies = self._tables.view(self._layout.instances).view(np.float64)[:, Instance.MB]
        return [*devices.ravel().tolist(), float(copies.sum())]

    def shows_more_room(self, before: list[float]) -> bool:
        """Tell whether there is more room than when `room` said `before`, or its figures cannot be compared."""
        return not all(now > was - LEAST_ROOM_MB for now, was in zip(self.room(), before, strict=True))

    def used_mb(self, device: int, copies: Copies) -> float:
        """Return the memory in use: the last figure, or the books where nothing can be measured."""
        if self._segment.words[Header.SOURCE_ACCOUNTING_ONLY]:
            return copies.booked_mb[device]
        return self._segment.floats[self._tables.device(device) + Device.USED_MB]

    def limit_mb(self, device: int) -> float:
        """Return how much of a device may be in use."""
        total = self._segment.floats[self._tables.device(device) + Device.TOTAL_MB]
        return total * (1.0 - self._namespace.settings.slack_percentage)


def _ticket_view(
    row: int,
    number: int,
    priority: int,
    model: int,
    member: int,
    enqueued_ns: int,
    preload: int,
    blocked_ns: int,
    devices: int,
    usable_on: int,
    span: int,
    nested: int,
    passed: int,
    rank: int,
    steady: int,
) -> TicketView:
    return TicketView(
        row,
        number,
        priority,
        model,
        member,
        enqueued_ns / 1e9,
        preload,
        blocked_ns / 1e9 if blocked_ns else None,
        tuple(device_rows(devices)) if devices else (),
        tuple(device_rows(usable_on)) if usable_on else (),
        span,
        bool(nested),
        bool(passed),
        rank,
        bool(steady),
    )
