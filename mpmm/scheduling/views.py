"""The policy's view of one namespace, read from its rows: models, devices and waiters."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mpmm.policy.fairness import UNKNOWN_FIRST
from mpmm.policy.out_of_memory import MORE_MB
from mpmm.policy.view import DeviceView, IdleInstance, ModelView, Reason, Rules, TicketView, View
from mpmm.scheduling.copies import Copies, CopiesReader
from mpmm.scheduling.demand import Demands
from mpmm.scheduling.suspension import SuspensionDecisions
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Model, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.reads.models import ModelSize

__all__ = ["FOR_A_COPY", "Views"]

# How many waiters one plan looks at, and how many of other kinds behind these.
QUEUE_PART = 32
# If there are more other kinds, how many of those are looked at in turn.
IN_TURN = 8
# Waits for a copy of the waiter's own model.
FOR_A_COPY = frozenset({Reason.SHARING, Reason.COPIES})
# What makes a kind of waiters: of those that ask for the same, the later ones can get nothing that the first cannot,
# except an idle copy.
_KIND = [Ticket.MODEL, Ticket.PRELOAD, Ticket.LOADABLE_ON, Ticket.USABLE_ON, Ticket.SPAN, Ticket.STEADY, Ticket.NESTED]
# Odd random factors, so that no two kinds have the same sum.
_MIX = np.random.default_rng(1).integers(1 << 62, 1 << 63, len(_KIND), np.uint64) * np.uint64(2) + np.uint64(1)
# Less than this does not matter to waiters; the leader's next poll plans for them anyway.
LEAST_ROOM_MB = 1.0


class Views:
    """Reads the input of a plan. Methods need the lock."""

    def __init__(
        self, namespace: Namespace, copies: CopiesReader, demand: Demands, suspension: SuspensionDecisions
    ) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._reads = namespace.reads
        self._layout = namespace.segment.layout
        self._copies = copies
        self._demand = demand
        self._suspension = suspension

    def read_view(self) -> View:
        """Return the input of a plan."""
        settings = self._namespace.settings
        copies = self._copies.read_copies()
        now = time.monotonic_ns()
        tickets = self._tickets(Counter(copy.model for copy in copies.idle))
        idle = self._with_suspendable(copies.idle)
        wanted = {ticket.model for ticket in tickets} | {copy.model for copy in copies.busy}
        # The model of each copy in the view, because the rules look it up. (Leases have none that matters.)
        wanted |= set(copies.shared) | set(copies.owned) | {copy.model for copy in copies.suspended}
        return View(
            now_s=now / 1e9,
            rules=Rules(
                slack_percentage=settings.slack_percentage,
                eviction_cooldown_seconds=settings.eviction_cooldown_seconds,
                min_model_copies=int(settings.min_model_copies),
                max_overtake_seconds=settings.max_overtake_seconds,
                # If only whole devices are measured, a model can only be measured alone on its device.
                isolate_unknown=self._reads.devices.only_whole_devices_are_measured(),
                max_model_copies=settings.max_model_copies,
            ),
            models={model: self.model_view(model, copies, now) for model in wanted},
            # The copy that was used last comes first: of equal copies it is granted, and the others grow old.
            idle=tuple(sorted(idle, key=lambda copy: -copy.idle_since_s)),
            tickets=tickets,
            devices=self.device_views(copies),
            busy=tuple(copies.busy),
            leases=tuple(copies.leases),
            suspended=tuple(sorted(copies.suspended, key=lambda copy: -copy.since_s)),
            # Adding up the host's ledger takes a pass over the rows, which is in vain if no copy can be suspended.
            host_free_mb=self._suspension.free_mb if any(copy.suspendable for copy in idle) else 0.0,
        )

    def _with_suspendable(self, idle: Sequence[IdleInstance]) -> Sequence[IdleInstance]:
        """Mark the idle copies that would be suspended if they were evicted."""
        kept = self._suspension.kept_of(copy.row for copy in idle if copy.place_in is None)
        return [replace(copy, suspendable=True) if copy.row in kept else copy for copy in idle] if kept else idle

    def device_views(self, copies: Copies) -> tuple[DeviceView, ...]:
        """Return views of the ledgers of all devices."""
        tables = self._tables
        frees_late, isolated = tables.header.source_frees_late, tables.header.isolated
        views = []
        for row in tables.used_rows(self._layout.devices):
            device = tables.devices[row]
            external, least = device.external_mb, device.external_least_mb
            if math.isnan(external):
                # It has never been measured. (If no process measures it any more, the last figure still counts.)
                external = least = 0.0
            # With other sources, a figure without the unloaded copy shows by itself that its memory is back.
            returning = device.returning_mb if frees_late else 0.0
            views.append(
                DeviceView(
                    device=row,
                    total_mb=device.total_mb,
                    used_mb=external + copies.booked_mb[row] + returning,
                    # Kept apart from memory in use: a load that fails gives it back, and no sample has to show that.
                    reserved_mb=copies.reserved_mb[row],
                    unloading_mb=copies.unloading_mb[row],
                    returning_mb=returning,
                    leased_mb=copies.leased_mb[row],
                    external_mb=external,
                    external_least_mb=least,
                    isolated=row in isolated,
                    unloading=copies.unloading[row],
                    suspending=copies.suspending_on[row],
                    steady=copies.steady.get(row),
                )
            )
        return tuple(views)

    def model_view(self, model: int, copies: Copies, now_ns: int) -> ModelView:
        figures = self._reads.models.figures(model)
        size = self._reads.models.size(model)
        return ModelView(
            model=model,
            known=size.known or size.expect_mb != 0,
            need_mb=self._need_mb(size),
            shared=copies.shared[model],
            owned=copies.owned[model],
            waiting=figures.waiting,
            loading=copies.loading[model],
            shares=figures.shares,
            load_s=figures.load_s,
            hold_s=figures.hold_s,
            # 0 if nothing is being loaded, or held.
            loading_for_s=(now_ns - copies.newest_load.get(model, now_ns)) / 1e9,
            held_for_s=(now_ns - copies.newest_hold.get(model, now_ns)) / 1e9,
            held_in_all_s=copies.held_ns[model] / 1e9,
            rate=self._demand.of(model).counted(self._demand.requests(model), now_ns / 1e9).per_second(now_ns / 1e9),
            lease=figures.lease,
            failures=figures.failures,
            failed_ago_s=(now_ns - figures.failed_at) / 1e9,
            leaving=copies.leaving[model],
            superseded=figures.superseded,
            suspending=copies.suspending[model],
            resume_s=figures.resume_s,
            coming_s=copies.coming_s.get(model, 0.0),
            bound_mb=size.at_least_mb,
            fitted=size.known and size.fitted,
            users=self._users(model, copies, figures.users),
        )

    @staticmethod
    def _users(model: int, copies: Copies, next_users: int) -> float:
        """Return how many may use a copy of a model at a time: a loaded one, or the next one if none is loaded."""
        loaded = copies.shared[model] + sum(copies.owned[model].values())
        return 1.0 + copies.seats[model] / loaded if loaded else float(next_users or 1)

    def _tickets(self, idle_of_model: Mapping[int, int]) -> tuple[TicketView, ...]:
        """Return the first waiters of the queue, and the first ones for every model that has idle copies.

        And the first of each kind that has none among them: thirty waiters may all wait for what holds up nobody else.
        Others can get nothing before these do, so a thousand waiters cost no more than sixty, of as many kinds. If
        there are more kinds than that, see `_some_of`.
        """
        order = self.queue_order()
        # The waiters whose turn comes first; the plan sorts them itself.
        chosen = order[:QUEUE_PART].tolist()
        if len(order) > QUEUE_PART:
            # Waiters for models whose loads fail must not hold up others, however many they are.
            failing = self._tables.model_columns().failures > 0
            models = self._tables.ticket_columns().model
            if failing.any():
                order = order[np.argsort(failing[models[order]], kind="stable")]
                chosen = order[:QUEUE_PART].tolist()
            rest = order[QUEUE_PART:]
            for model, idle in idle_of_model.items():
                # Twice as many as there are copies: a copy may be of no use to its first waiter's process.
                chosen += rest[models[rest] == model][: 2 * idle].tolist()
            chosen += self._of_other_kinds(order, set(chosen))
            # The plan sorts the known models' waiters up to this one among the unknown ones', wherever it stands.
            chosen += [row for row in self._last_patient(order) if row not in chosen]
        return self._reads.queue.views(chosen)

    def _of_other_kinds(self, order: npt.NDArray[np.intp], chosen: Collection[int]) -> list[int]:
        """Return the first waiter of each kind that has none in the first part of the queue, unless it is chosen."""
        # One number for each kind (integers wrap around), because NumPy compares a thousand of them in 0.2 ms.
        kinds = self._tables.view(self._layout.tickets)[order[:, np.newaxis], _KIND] @ _MIX
        _, firsts = np.unique(kinds, return_index=True)
        others = order[np.sort(firsts[firsts >= QUEUE_PART])]
        rows: list[int] = (self._some_of(others) if len(others) > QUEUE_PART else others).tolist()
        return [row for row in rows if row not in chosen]

    def _some_of(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Return as many waiters of different kinds as a plan looks at; there are more of them.

        Heads of the line come first, because room is kept for them, and those that wait for copies of their own model
        come last: they hold up nobody, and only what happens to these copies serves them. Some of those that are left
        are looked at in turn, so that no number of waiters that hold up nobody hides another one for ever. But no
        lease, which would come before leases that have waited for longer.
        """
        tickets, models = self._tables.ticket_columns(), self._tables.model_columns()
        model = tickets.model[rows]
        shares = np.isin(tickets.reason[rows], list(FOR_A_COPY)) & (models.active[model] + models.loading[model] > 0)
        rank = np.where(tickets.head_of_line_at[rows] > 0, 0, np.where(shares, 2, 1))
        rows = rows[np.argsort(rank, kind="stable")]
        first, left = rows[: QUEUE_PART - IN_TURN], rows[QUEUE_PART - IN_TURN :]
        leases = models.state[tickets.model[left]] == Model.LEASE
        others = left[~leases]
        # Any number will do that is another one for each plan.
        turn = time.monotonic_ns() // 1000 % max(1, len(others))
        return np.concatenate([first, np.roll(others, -turn)[:IN_TURN], left[leases]])[:QUEUE_PART]

    def queue_order(self) -> npt.NDArray[np.intp]:
        """Return the rows of waiters in the queue's order. Those whose deadline has passed are about to leave."""
        tickets = self._tables.ticket_columns()
        now = time.monotonic_ns()
        waiting = np.flatnonzero(tickets.state == Ticket.WAITING)
        # Left out, because a copy granted to a waiter that gives up would stay idle until the waiter notices.
        waiting = waiting[tickets.deadline[waiting] > now]
        priorities = tickets.priority[waiting]
        ranks = tickets.rank[waiting]
        # The rule of `policy.fairness.queue_order`, for all waiters at once.
        for row in self._last_patient(waiting):
            priorities = np.where((priorities == 1) & (ranks <= tickets.rank[row]), 0, priorities)
        ordered: npt.NDArray[np.intp] = waiting[
            # The last key counts most. Ranks may be equal, numbers are not.
            np.lexsort((tickets.number[waiting], ranks, priorities))
        ]
        return ordered

    def _last_patient(self, rows: npt.NDArray[np.intp]) -> list[int]:
        """Return the waiter of the highest rank of those that have waited for so long that no unknown model's request
        comes before them any more, if there is one."""
        tickets = self._tables.ticket_columns()
        bound_ns = to_ns(UNKNOWN_FIRST * self._namespace.settings.max_overtake_seconds)
        long = tickets.enqueued[rows] + np.uint64(bound_ns) <= time.monotonic_ns()
        patient = rows[(tickets.priority[rows] == 1) & long]
        return [int(patient[np.argmax(tickets.rank[patient])])] if patient.size else []

    def need_mb(self, model: int) -> float:
        """Return how much has to be free for a copy of a model: what it is expected to take, but above its bound."""
        return self._need_mb(self._reads.models.size(model))

    def _need_mb(self, size: ModelSize) -> float:
        expected_mb = self._expected_mb(size)
        # With an amount that was not enough before, the load would only run out of memory again.
        return max(expected_mb, size.at_least_mb + MORE_MB) if size.at_least_mb else expected_mb

    def expected_mb(self, model: int) -> float:
        """Return how much a copy of a model takes once it is loaded, as far as known.

        That is its estimate, else the `expect_mb` of its users, else the default.
        """
        return self._expected_mb(self._reads.models.size(model))

    def _expected_mb(self, size: ModelSize) -> float:
        return size.estimate_mb if size.known else size.expect_mb or self._namespace.settings.default_estimate_mb

    def is_known(self, model: int) -> bool:
        """Tell whether a model has an estimate, or a user's `expect_mb`, so that it need not be measured alone."""
        return self._reads.models.is_sized(model)

    def room(self) -> list[float]:
        """Return figures in MB, for each device and for all copies together; a smaller figure means more room."""
        devices, copies = self._tables.device_columns(), self._tables.instance_columns()
        columns = (devices.external_mb, devices.external_least_mb, devices.returning_mb)
        return [*(mb for column in columns for mb in column.tolist()), float(copies.mb.sum())]

    def shows_more_room(self, before: list[float]) -> bool:
        """Tell whether there is more room than when `room` returned `before`, or a figure has become (un)known."""
        return any(_is_more_room(was, now) for was, now in zip(before, self.room(), strict=True))

    def used_mb(self, device: int, copies: Copies) -> float:
        """Return the memory in use: the last figure, or what is accounted for if nothing can be measured."""
        if self._tables.header.source_accounting_only:
            return copies.booked_mb[device]
        return self._tables.devices[device].used_mb

    def limit_mb(self, device: int) -> float:
        """Return how much of a device may be in use."""
        return self._tables.devices[device].total_mb * (1.0 - self._namespace.settings.slack_percentage)


def _is_more_room(was: float, now: float) -> bool:
    """Tell whether a figure of `room` shows more room than before, or has become (un)known; nan: not measured."""
    is_known, was_known = not math.isnan(now), not math.isnan(was)
    return is_known != was_known or (is_known and now <= was - LEAST_ROOM_MB)
