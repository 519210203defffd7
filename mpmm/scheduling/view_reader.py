"""What the policy may look at, read from the shared rows."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mpmm.policy.demand import Demand
from mpmm.policy.fairness import UNKNOWN_FIRST
from mpmm.policy.out_of_memory import MORE_MB
from mpmm.policy.sharing import remaining_s
from mpmm.policy.suspension import resume_s
from mpmm.policy.view import (
    BusyInstance,
    DeviceView,
    IdleInstance,
    ModelView,
    PlacedInstance,
    Rules,
    SuspendedInstance,
    TicketView,
    View,
)
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Device, Header, Instance, Model, Ticket, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.suspend.books import SuspensionBooks

__all__ = ["QUEUE_PART", "Copies", "ViewReader"]

# Less than this is no news for those who wait; the next poll of the leader has them planned for anyway.
LEAST_ROOM_MB = 1.0
# So many waiters are looked at in one step.
QUEUE_PART = 32

_ROOM_FIELDS = [Device.EXTERNAL_MB, Device.EXTERNAL_LEAST_MB, Device.RETURNING_MB]


def _counts() -> defaultdict[int, defaultdict[int, int]]:
    return defaultdict(lambda: defaultdict(int))


@dataclass
class Copies:
    """What the instance rows say: copies by model (loaded ones shared, or owned by member; loading by member), MB and
    copies in mid-unload by device. `booked_mb` is what all but the loading ones take, `reserved_mb` what loads in
    progress and leases may take, or take already where that is more."""

    idle: list[IdleInstance] = field(default_factory=list)
    busy: list[BusyInstance] = field(default_factory=list)
    leases: list[PlacedInstance] = field(default_factory=list)
    suspended: list[SuspendedInstance] = field(default_factory=list)
    suspending: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    shared: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    owned: defaultdict[int, defaultdict[int, int]] = field(default_factory=_counts)
    loading: defaultdict[int, defaultdict[int, int]] = field(default_factory=_counts)
    leaving: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    newest_load: dict[int, int] = field(default_factory=dict)
    newest_hold: dict[int, int] = field(default_factory=dict)
    unloading: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    booked_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    reserved_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    unloading_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    leased_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    steady: dict[int, int] = field(default_factory=dict)


class ViewReader:
    """Reads one namespace's rows for the policy. Methods need the lock, where they do not say otherwise."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._segment = namespace.segment
        self._layout = namespace.segment.layout
        self.suspension = SuspensionBooks(namespace, lambda model: self.rate(model))

    def _requests(self, model: int) -> int:
        words, at = self._segment.words, self._tables.model(model)
        counts = (Model.HITS, Model.LOADS, Model.RESUMES, Model.LOADING, Model.WAITING)
        return sum(words[at + count] for count in counts)

    def _demand(self, model: int) -> Demand:
        words, at = self._segment.words, self._tables.model(model)
        gap_s = self._segment.floats[at + Model.GAP_S]
        return Demand(gap_s, words[at + Model.REQUESTS], words[at + Model.REQUESTED_AT] / 1e9)

    def rate(self, model: int) -> float:
        """Return how often a model (row) is asked for, per second."""
        now_s = time.monotonic_ns() / 1e9
        return self._demand(model).counted(self._requests(model), now_s).per_second(now_s)

    def _queue_order(self) -> npt.NDArray[np.intp]:
        """Return the rows of waiters in the queue's order. Those whose deadline has passed are about to leave."""
        rows = self._tables.view(self._layout.tickets)
        now = time.monotonic_ns()
        waiting = np.flatnonzero(rows[:, Ticket.STATE] == Ticket.WAITING)
        waiting = waiting[rows[waiting, Ticket.DEADLINE] > now]
        priorities = rows[waiting, Ticket.PRIORITY]
        # The rule of `policy.fairness.effective_priority`, for all at once.
        bound_ns = to_ns(UNKNOWN_FIRST * self._namespace.settings.max_overtake_seconds)
        promoted = (priorities == 1) & (rows[waiting, Ticket.ENQUEUED] + np.uint64(bound_ns) <= now)
        priorities = np.where(promoted, 0, priorities)
        ordered: npt.NDArray[np.intp] = waiting[
            np.lexsort((rows[waiting, Ticket.NUMBER], rows[waiting, Ticket.RANK], priorities))
        ]
        return ordered

    def read_view(self) -> View:
        """Return what the policy may look at."""
        words, settings = self._segment.words, self._namespace.settings
        copies = self.read_copies()
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
                isolate_unknown=not words[Header.SOURCE_BOOKS_ONLY] and not words[Header.SOURCE_MEASURES_PROCESSES],
                max_model_copies=settings.max_model_copies,
            ),
            models={model: self._model(model, copies, now) for model in wanted},
            idle=tuple(sorted(copies.idle, key=lambda copy: -copy.idle_since_s)),
            tickets=tickets,
            devices=self.device_views(copies),
            busy=tuple(copies.busy),
            leases=tuple(copies.leases),
            suspended=tuple(sorted(copies.suspended, key=lambda copy: -copy.since_s)),
        )

    def read_copies(self) -> Copies:
        """Return what the instance rows say, in one pass over those in use."""
        words, floats, tables = self._segment.words, self._segment.floats, self._tables
        now = time.monotonic_ns()
        copies = Copies()
        for row in tables.used_rows(self._layout.instances):
            at = tables.instance(row)
            state, model, _, holder, owner, server, devices = words[at : at + Instance.MB]
            mb, reserved = floats[at + Instance.MB], floats[at + Instance.RESERVED_MB]
            since = words[at + Instance.SINCE]
            pinned = bool(words[tables.model(model) + Model.PINS])
            device = devices.bit_length() - 1
            other_shares: tuple[tuple[int, float], ...] = ()
            if devices & (devices - 1):
                (device, mb), *others = tables.shares_of(row)
                other_shares = tuple(others)
            if words[at + Instance.STEADY]:
                copies.steady.update(dict.fromkeys(device_rows(devices), model))
            if state == Instance.LEASED:
                # Not a copy of a model, but a reservation.
                self._share_out(copies.reserved_mb, device, other_shares, max(reserved, floats[at + Instance.MB]))
                self._share_out(copies.leased_mb, device, other_shares, reserved)
                share_mb = reserved / (1 + len(other_shares))
                shares = tuple((other, share_mb) for other, _ in other_shares)
                copies.leases.append(PlacedInstance(row, model, device, share_mb, other_shares=shares))
                continue
            leaves = state in (Instance.ACTIVE, Instance.LOADING, Instance.RESUMING) and words[at + Instance.DOOMED]
            copies.leaving[model] += bool(leaves)
            if state in (Instance.LOADING, Instance.RESUMING):
                copies.loading[model][holder] += not leaves
                copies.newest_load[model] = max(since, copies.newest_load.get(model, 0))
                free_in_s = self._free_in_s(model, since, now, loading=True)
                copies.busy.append(
                    BusyInstance(row, model, device, mb, free_in_s, pinned, holder, True, other_shares=other_shares)
                )
            else:
                copies.booked_mb[device] += mb
                for other, share_mb in other_shares:
                    copies.booked_mb[other] += share_mb
            if state == Instance.SUSPENDED:
                copies.suspended.append(self._suspended(row, model, device, other_shares, since, owner))
                continue
            if state == Instance.SUSPENDING:
                copies.suspending[model] += 1
            if state in (Instance.UNLOADING, Instance.SUSPENDING):
                # The memory of an unload that is late is in use, and nobody counts on it.
                late = words[at + Instance.UNLOAD_LATE]
                for other, share_mb in () if late else ((device, mb), *other_shares):
                    copies.unloading[other] += 1
                    copies.unloading_mb[other] += share_mb
            elif state in (Instance.ACTIVE, Instance.IDLE) and owner:
                copies.owned[model][owner] += not leaves
            elif state in (Instance.ACTIVE, Instance.IDLE):
                copies.shared[model] += not leaves
            if state == Instance.IDLE:
                copies.idle.append(
                    IdleInstance(row, model, device, mb, since / 1e9, owner or None, pinned, other_shares=other_shares)
                )
            elif state == Instance.ACTIVE:
                copies.newest_hold[model] = max(since, copies.newest_hold.get(model, 0))
                free_in_s = self._free_in_s(model, since, now, loading=False)
                copies.busy.append(
                    BusyInstance(row, model, device, mb, free_in_s, pinned, owner or None, other_shares=other_shares)
                )
            if reserved and server:
                self._add_load(copies, row, device, other_shares, reserved)
            elif reserved:
                self._share_out(copies.reserved_mb, device, other_shares, reserved)
        return copies

    def _suspended(
        self, row: int, model: int, device: int, other_shares: Sequence[tuple[int, float]], since_ns: int, owner: int
    ) -> SuspendedInstance:
        share_mb = self._segment.floats[self._tables.instance(row) + Instance.DEVICE_MB] / (1 + len(other_shares))
        others = tuple((other, share_mb) for other, _ in other_shares)
        resumes_in_s = resume_s(self.suspension.movable(row))
        return SuspendedInstance(
            row, model, device, share_mb, since_ns / 1e9, owner or None, resumes_in_s, other_shares=others
        )

    @staticmethod
    def _share_out(
        figures: dict[int, float], device: int, other_shares: Sequence[tuple[int, float]], mb: float
    ) -> None:
        """Add an equal share to the figures of all devices of a copy."""
        share_mb = mb / (1 + len(other_shares))
        figures[device] += share_mb
        for other, _ in other_shares:
            figures[other] += share_mb

    def _add_load(
        self, copies: Copies, row: int, device: int, other_shares: Sequence[tuple[int, float]], reserved: float
    ) -> None:
        """Add what a load in progress was allowed, or what its server has taken already, where that is more."""
        share_mb = reserved / (1 + len(other_shares))
        for other in (device, *(other for other, _ in other_shares)):
            copies.reserved_mb[other] += max(
                share_mb, self._namespace.transitions.ledgers.measured_share(row, other) or 0.0
            )

    def _free_in_s(self, model: int, since_ns: int, now_ns: int, loading: bool) -> float:
        """Return when an instance that is held, or being loaded, is expected to be idle, judged by how long that takes
        on average and how long it has taken already."""
        floats, at = self._segment.floats, self._tables.model(model)
        hold_s, load_s, elapsed_s = floats[at + Model.HOLD_S], floats[at + Model.LOAD_S], (now_ns - since_ns) / 1e9
        return hold_s + remaining_s(load_s, elapsed_s) if loading else remaining_s(hold_s, elapsed_s)

    def device_views(self, copies: Copies) -> tuple[DeviceView, ...]:
        """Return what the ledgers of all devices say."""
        words, floats, tables = self._segment.words, self._segment.floats, self._tables
        late = words[Header.SOURCE_SETTLES_LATE]
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
            rate=self._demand(model).counted(self._requests(model), now_ns / 1e9).per_second(now_ns / 1e9),
            lease=words[at] == Model.LEASE,
            failures=words[at + Model.FAILURES],
            failed_ago_s=(now_ns - words[at + Model.FAILED_AT]) / 1e9,
            leaving=copies.leaving[model],
            superseded=bool(words[at + Model.SUPERSEDED]),
            suspending=copies.suspending[model],
            resume_s=floats[at + Model.RESUME_S],
        )

    def _tickets(self, idle_of_model: Mapping[int, int]) -> tuple[TicketView, ...]:
        """Return the first waiters of the queue, and the first ones of every model that has idle copies.

        Others can get nothing before these have got something, so a thousand waiters cost no more than thirty.
        """
        rows = self._tables.view(self._layout.tickets)
        order = self._queue_order()
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
                Ticket.BLOCKED_AT,
                Ticket.DEVICES,
                Ticket.TIED,
                Ticket.SPAN,
                Ticket.NESTED,
                Ticket.PASSED,
                Ticket.RANK,
                Ticket.STEADY,
            ),
        ]
        found = zip(chosen, rows[chosen][:, fields].tolist(), strict=True)
        return tuple(_ticket_view(row, *values) for row, values in found)


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
