"""The view for a plan, read simply and slowly from the rows of a namespace, one by one: see `test_views`.

Written from the description of each field in `mpmm.policy.view`, and not from `mpmm.scheduling`. Times stand still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpmm.policy.backoff import back_off_s
from mpmm.policy.demand import Demand
from mpmm.policy.sharing import room_in_s
from mpmm.policy.suspension import HostRoom, Kept, Movable, Way, pays, resume_s, saved_share
from mpmm.policy.view import (
    BusyInstance,
    DeviceView,
    IdleInstance,
    ModelView,
    PlacedInstance,
    Reason,
    SuspendedInstance,
    TicketView,
)
from mpmm.shared_state.layout import Device, Header, Instance, Member, Model, Table, Ticket, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.rows import InstanceRow, ModelRow

COMING = (Instance.LOADING, Instance.RESUMING)
GOING = (Instance.UNLOADING, Instance.SUSPENDING)
IN_HOST = (Instance.SUSPENDING, Instance.SUSPENDED, Instance.RESUMING)
QUEUE_PART = 32
IN_TURN = 8
MORE_MB = 1.0


class Reference:
    """The rows of one namespace at one moment (monotonic, ns)."""

    def __init__(self, namespace: Namespace, now_ns: int) -> None:
        self.now = now_ns
        self.namespace, self.settings, self.tables = namespace, namespace.settings, namespace.tables
        self.words, self.layout = namespace.segment.words, namespace.segment.layout
        self.floats = namespace.segment.floats
        self.rows = {row: self.tables.instances[row] for row in self._used(self.layout.instances)}
        leased = Instance.LEASED
        self.copies = {row: one for row, one in self.rows.items() if one.state != leased and one.seat_of is None}
        self.places = {
            row: [other for other, one in self.rows.items() if row in (other, one.seat_of)] for row in self.copies
        }

    def _used(self, table: Table) -> list[int]:
        return [row for row in range(table.capacity) if self.words[table.base + row * table.words]]

    # ---- parts -----------------------------------------------------------------------------------------------

    def shares(self, row: int) -> dict[int, float]:
        """Return the memory of a copy, by device."""
        one = self.rows[row]
        if len(one.devices) == 1:
            return {one.devices[0]: one.mb}
        first = one.at + Instance.SHARES
        return {device: self.floats[first + n] for n, device in enumerate(one.devices)}

    def equal(self, row: int, mb: float) -> dict[int, float]:
        """Return equal shares of `mb` on the devices of a row."""
        devices = self.rows[row].devices
        return {device: mb / len(devices) for device in devices}

    def reserved(self, row: int) -> dict[int, float]:
        """Return the reservation of a load, a resume or a lease, by device."""
        one = self.rows[row]
        if one.state == Instance.LEASED:
            return self.equal(row, max(one.reserved_mb, one.mb))
        shares = self.equal(row, one.reserved_mb)
        if one.server is None or not self.tables.header.source_measures_processes:
            return shares
        server = self.tables.members[one.server]
        if server.instance != row or math.isnan(server.measured_mb):
            return shares
        measured = [server.measured_mb]
        if len(shares) > 1:
            measured = [self.floats[server.at + Member.SHARES + n] for n in range(len(shares))]
        return {device: max(mb, has) for (device, mb), has in zip(shares.items(), measured, strict=True)}

    def placed(self, row: int, shares: dict[int, float]) -> PlacedInstance:
        """Return the placement of a row."""
        (device, mb), *others = shares.items()
        return PlacedInstance(row, self.rows[row].model, device, mb, other_shares=tuple(others))

    def pinned(self, row: int) -> bool:
        """Tell whether the model is pinned."""
        return self.tables.models[self.rows[row].model].pins > 0

    def owner(self, row: int) -> int | None:
        """Return a reference to the only member that can use a copy; None if all can."""
        owner = self.rows[row].owner
        return None if owner is None else owner + 1

    def goes(self, row: int) -> bool:
        """Tell whether a copy that is in use, or about to be, is unloaded when it is released."""
        one = self.rows[row]
        return bool(one.unload_on_release) or bool(one.seats and one.state == Instance.UNLOADING)

    def users(self, row: int) -> list[InstanceRow]:
        """Return the places of a copy that are in use."""
        return [self.rows[place] for place in self.places[row] if self.rows[place].state == Instance.ACTIVE]

    def movable(self, row: int) -> Movable:
        """Return the known figures of a copy's suspension."""
        one, model = self.rows[row], self.tables.models[self.rows[row].model]
        mb = one.device_mb or one.mb
        return Movable(mb, Way(one.way), model.load_s, model.suspend_s, model.resume_s, self.rate(one.model))

    def demand(self, row: int) -> Demand:
        """Return the demand for a model, counted up to now."""
        model = self.tables.models[row]
        requests = model.hits + model.loads + model.resumes + model.loading + model.waiting
        before = Demand(model.mean_interarrival_s, model.requests, model.requested_at / 1e9)
        return before.counted(requests, self.now / 1e9)

    def rate(self, row: int) -> float:
        """Return the requests per second for a model."""
        return self.demand(row).per_second(self.now / 1e9)

    # ---- what the view has -----------------------------------------------------------------------------------

    def devices(self) -> tuple[DeviceView, ...]:
        """Return the devices, as admission counts them."""
        return tuple(self._device(row) for row in self._used(self.layout.devices))

    def _device(self, row: int) -> DeviceView:
        one, header = self.tables.devices[row], self.tables.header
        measured = not math.isnan(one.external_mb)
        loaded = [copy for copy, found in self.copies.items() if found.state not in COMING]
        taken = [self.shares(copy).get(row, 0.0) for copy in loaded]
        going = [
            copy
            for copy, found in self.copies.items()
            if found.state in GOING and not found.unload_late and not found.seats and row in found.devices
        ]
        leases = [lease for lease, found in self.rows.items() if found.state == Instance.LEASED]
        reserving = [*leases, *(copy for copy, found in self.copies.items() if found.state in COMING)]
        quiet = [found.model for found in self.rows.values() if found.steady and row in found.devices]
        returning = one.returning_mb if header.source_frees_late else 0.0
        return DeviceView(
            device=row,
            total_mb=one.total_mb,
            used_mb=(one.external_mb if measured else 0.0) + sum(taken) + returning,
            reserved_mb=sum(self.reserved(copy).get(row, 0.0) for copy in reserving),
            unloading_mb=sum(self.shares(copy)[row] for copy in going),
            returning_mb=returning,
            leased_mb=sum(self.equal(lease, self.rows[lease].reserved_mb).get(row, 0.0) for lease in leases),
            external_mb=one.external_mb if measured else 0.0,
            external_least_mb=one.external_least_mb if measured else 0.0,
            isolated=bool(self.words[one.at + Device.ISOLATED]),
            unloading=len(going),
            suspending=sum(self.rows[copy].state == Instance.SUSPENDING for copy in going),
            steady=quiet[0] if quiet else None,
        )

    def model(self, row: int) -> ModelView:
        """Return a model."""
        model = self.tables.models[row]
        of_model = {copy: one for copy, one in self.copies.items() if one.model == row}
        stays = [copy for copy, one in of_model.items() if one.state in (Instance.ACTIVE, Instance.IDLE)]
        loaded = [copy for copy in stays if not self.goes(copy)]
        coming = {copy: one for copy, one in of_model.items() if one.state in COMING}
        newest = max(coming.values(), key=lambda one: one.since, default=None)
        in_use = [one for copy in of_model for one in self.users(copy)]
        seats = sum(self.rows[copy].seats for copy in loaded)
        held_ns = [self.now - one.since for one in in_use]
        going = sum(self.goes(copy) for copy, one in of_model.items() if one.state != Instance.UNLOADING or one.seats)
        known_mb = model.estimate_mb if model.known else model.expect_mb
        need_mb = known_mb or self.settings.default_estimate_mb
        owners = [self.owner(copy) for copy in loaded]
        loaders = [(one.holder or 0) + 1 for copy, one in coming.items() if not self.goes(copy)]
        resumes = newest is not None and newest.state == Instance.RESUMING
        newest_row = next((copy for copy, one in coming.items() if one is newest), 0)
        return ModelView(
            model=row,
            known=model.known or model.expect_mb > 0,
            need_mb=max(need_mb, model.at_least_mb + MORE_MB) if model.at_least_mb else need_mb,
            shared=owners.count(None),
            owned={owner: owners.count(owner) for owner in owners if owner is not None},
            waiting=model.waiting,
            loading={loader: loaders.count(loader) for loader in loaders},
            shares=model.shares,
            load_s=model.load_s,
            hold_s=model.hold_s,
            loading_for_s=(self.now - newest.since) / 1e9 if newest is not None else 0.0,
            held_for_s=min(held_ns, default=0) / 1e9,
            held_in_all_s=sum(held_ns) / 1e9,
            rate=self.rate(row),
            lease=model.state == Model.LEASE,
            failures=model.failures,
            failed_ago_s=(self.now - model.failed_at) / 1e9,
            leaving=going,
            superseded=model.superseded,
            suspending=sum(one.state == Instance.SUSPENDING for one in of_model.values()),
            resume_s=model.resume_s,
            coming_s=resume_s(self.movable(newest_row)) if resumes else 0.0,
            bound_mb=model.at_least_mb,
            fitted=bool(model.known and self.has_fitted(model)),
            users=1 + seats / len(loaded) if loaded else float(model.users or 1),
        )

    def has_fitted(self, model: ModelRow) -> bool:
        """Tell whether copies have taken what the estimate says: what processes, or their devices, showed."""
        inferred = model.sd_mb > 0 and model.loads > 0 and not self.words[Header.SOURCE_ACCOUNTING_ONLY]
        return model.measured or inferred

    def busy(self) -> list[BusyInstance]:
        """Return the copies in use, and those that load or resume."""
        found = []
        for row, one in self.copies.items():
            model, used = self.tables.models[one.model], self.users(row)
            if one.state in COMING:
                lasts_s = resume_s(self.movable(row)) if one.state == Instance.RESUMING else model.load_s
                free_in_s = model.hold_s + abs(lasts_s - (self.now - one.since) / 1e9)
                owner: int | None = (one.holder or 0) + 1
            elif used:
                free_in_s = max(abs(model.hold_s - (self.now - place.since) / 1e9) for place in used)
                owner = self.owner(row)
            else:
                continue
            at, coming = self.placed(row, self.shares(row)), one.state in COMING
            found.append(
                BusyInstance(
                    *(row, at.model, at.device, at.mb, free_in_s, self.pinned(row), owner, coming, self.goes(row)),
                    other_shares=at.other_shares,
                )
            )
        return found

    def idle(self) -> list[IdleInstance]:
        """Return the places that are not in use."""
        found = []
        for row, copy in self.copies.items():
            whole = copy.state == Instance.IDLE and not self.users(row)
            for place in self.places[row]:
                if self.rows[place].state != Instance.IDLE:
                    continue
                is_whole = whole and place == row
                shares = self.shares(row) if is_whole else dict.fromkeys(copy.devices, 0.0)
                at, since_s = self.placed(place, shares), self.rows[place].since / 1e9
                suspendable = is_whole and self.would_be_suspended(row)
                found.append(
                    IdleInstance(
                        *(place, at.model, at.device, at.mb, since_s, self.owner(row), self.pinned(row)),
                        *(None if is_whole else row, suspendable),
                        other_shares=at.other_shares,
                    )
                )
        return found

    def would_be_suspended(self, row: int) -> bool:
        """Tell whether an idle copy would be suspended if it were evicted."""
        one, model = self.rows[row], self.tables.models[self.rows[row].model]
        handle = self.tables.handle_of(row)
        twins = [other for other in self.copies if other != row and handle and self.tables.handle_of(other) == handle]
        if any(self.rows[other].state in (Instance.ACTIVE, Instance.IDLE) for other in twins):
            return False
        if not one.way or len(one.devices) > 1 or model.unsuspendable or model.superseded or not model.load_s:
            return False
        movable = self.movable(row)
        kept = [
            Kept(other, found.host_mb, found.since / 1e9, self.movable(other).worth, self.pinned(other))
            for other, found in self.copies.items()
            if found.state == Instance.SUSPENDED
        ]
        room = HostRoom(kept, self.host_free_mb(), self.budget_mb())
        if self.budget_mb() <= 0 or not pays(movable, self.saved_share(movable.way)):
            return False
        return room.dropped_for(movable.mb, movable.worth_suspending) is not None

    def saved_share(self, way: Way) -> float:
        """Return the share of all models' loads that suspension would save."""
        models = []
        for row in self._used(self.layout.models):
            one = self.tables.models[row]
            if one.state == Model.MODEL and not one.unsuspendable and not one.superseded:
                mb = one.estimate_mb if one.known else one.expect_mb or self.settings.default_estimate_mb
                models.append(Movable(mb, way, one.load_s, one.suspend_s, one.resume_s, rate=0.0))
        return saved_share(models)

    def budget_mb(self) -> float:
        """Return the host memory for suspended copies."""
        chosen = self.settings.suspend_budget_mb
        return self.tables.header.host_share_mb if math.isnan(chosen) else chosen

    def host_free_mb(self) -> float:
        """Return the rest of the host memory for suspended copies."""
        return self.budget_mb() - sum(one.host_mb for one in self.copies.values() if one.state in IN_HOST)

    def suspended(self) -> list[SuspendedInstance]:
        """Return the suspended copies."""
        found = []
        for row, one in self.copies.items():
            if one.state == Instance.SUSPENDED:
                at, back_s = self.placed(row, self.equal(row, one.device_mb)), resume_s(self.movable(row))
                found.append(
                    SuspendedInstance(
                        *(row, at.model, at.device, at.mb, one.since / 1e9, self.owner(row), back_s),
                        other_shares=at.other_shares,
                    )
                )
        return found

    def leases(self) -> list[PlacedInstance]:
        """Return the leases."""
        leased = [row for row, one in self.rows.items() if one.state == Instance.LEASED]
        return [self.placed(row, self.equal(row, self.rows[row].reserved_mb)) for row in leased]

    # ---- the queue -------------------------------------------------------------------------------------------

    def queue(self) -> list[int]:
        """Return the rows of the waiters, in the order of the queue."""
        rows = [row for row in self._used(self.layout.tickets) if self.tables.tickets[row].state == Ticket.WAITING]
        tickets = {row: self.tables.tickets[row] for row in rows if self.tables.tickets[row].deadline > self.now}
        patient = [tickets[row].rank for row in self.patient(list(tickets))]

        def place(row: int) -> tuple[int, int, int]:
            one = tickets[row]
            # After four times the bound, a waiter for a known model, and those before it, rank among unknown ones.
            promoted = one.priority == 1 and any(one.rank <= rank for rank in patient)
            return (0 if promoted else one.priority), one.rank, one.number

        return sorted(tickets, key=place)

    def patient(self, rows: list[int]) -> list[int]:
        """Return those of the waiters that want a known model and have waited for long."""
        bound_ns = 4e9 * self.settings.max_overtake_seconds
        tickets = self.tables.tickets
        return [row for row in rows if tickets[row].priority == 1 and self.now - tickets[row].enqueued >= bound_ns]

    def chosen(self) -> list[int]:
        """Return the rows of the waiters that a plan considers."""
        order = self.queue()
        if len(order) <= QUEUE_PART:
            return order
        models = self.tables.models
        fails = {row: bool(models[self.tables.tickets[row].model].failures) for row in order}
        order = [row for row in order if not fails[row]] + [row for row in order if fails[row]]
        part, rest = order[:QUEUE_PART], order[QUEUE_PART:]
        for model in {one.model for one in self.idle()}:
            idle = sum(one.model == model for one in self.idle())
            part += [row for row in rest if self.tables.tickets[row].model == model][: 2 * idle]
        firsts: dict[tuple[object, ...], int] = {}
        for row in order:
            firsts.setdefault(self._kind(row), row)
        others = self._some_of([row for row in firsts.values() if row in rest])
        patient = self.patient(order)
        last = [max(patient, key=lambda row: self.tables.tickets[row].rank)] if patient else []
        return list(dict.fromkeys([*part, *others, *last]))

    def _some_of(self, rows: list[int]) -> list[int]:
        """Return those of the first waiters of each kind that a plan looks at."""
        if len(rows) <= QUEUE_PART:
            return rows
        tickets, models = self.tables.tickets, self.tables.models

        def shares(row: int) -> bool:
            model = models[tickets[row].model]
            return tickets[row].reason in (Reason.SHARING, Reason.COPIES) and bool(model.active or model.loading)

        rows = sorted(rows, key=lambda row: 0 if tickets[row].head_of_line_at else 1 + shares(row))
        first, left = rows[: QUEUE_PART - IN_TURN], rows[QUEUE_PART - IN_TURN :]
        others = [row for row in left if models[tickets[row].model].state != Model.LEASE]
        start = self.now // 1000 % max(1, len(others))
        in_turn = (others[start:] + others[:start])[:IN_TURN]
        return [*first, *in_turn, *(row for row in left if row not in others)][:QUEUE_PART]

    def _kind(self, row: int) -> tuple[object, ...]:
        # Waiters of a kind ask for the same.
        one = self.tables.tickets[row]
        nested = bool(self.words[one.at + Ticket.NESTED])
        return (one.model, one.preload, one.loadable_on, one.usable_on, one.span, one.steady, nested)

    def tickets(self, rows: Sequence[int]) -> list[TicketView]:
        """Return waiters."""
        return [self._ticket(row) for row in rows]

    def _ticket(self, row: int) -> TicketView:
        one = self.tables.tickets[row]
        return TicketView(
            row,
            one.number,
            one.priority,
            one.model,
            (one.member or 0) + 1,
            one.enqueued / 1e9,
            one.preload,
            one.head_of_line_at / 1e9 if one.head_of_line_at else None,
            tuple(device_rows(one.loadable_on)),
            tuple(device_rows(one.usable_on)),
            one.span,
            bool(self.words[one.at + Ticket.NESTED]),
            bool(self.words[one.at + Ticket.OVERTAKEN]),
            one.rank,
            one.steady,
        )

    def expected_wait(self, row: int) -> tuple[int, int, int, float, float, float]:
        """Return the figures that predict a ticket's wait.

        These are its member, the number of waiters for its model before it, its reason and that reason's seconds, its
        wait so far, and the seconds until the waiters before it have room. Preloads do not count as waiters for its
        model, because they use no copy. A back-off has advanced since the reason was written.
        """
        one, model = self.tables.tickets[row], self.tables.models[self.tables.tickets[row].model]
        others = [self.tables.tickets[other] for other in self._used(self.layout.tickets)]
        wanting = [other for other in others if (other.state, other.model) == (Ticket.WAITING, one.model)]
        place = (one.priority, one.rank)
        before = [other for other in wanting if (other.priority, other.rank) < place and not other.preload]
        seconds = one.seconds
        if one.reason == Reason.BACKING_OFF:
            seconds = max(0.0, back_off_s(model.failures) - (self.now - model.failed_at) / 1e9)
        waited_s = (self.now - one.enqueued) / 1e9
        waiting = [other for other in others if other.state == Ticket.WAITING]
        in_front = [other for other in waiting if (other.priority, other.rank) < place]
        room_ahead_s = 0.0 if in_front else waited_s
        for other in in_front:
            failed = self.tables.models[other.model]
            left_s = max(0.0, back_off_s(failed.failures) - (self.now - failed.failed_at) / 1e9)
            seconds_s = left_s if other.reason == Reason.BACKING_OFF else other.seconds
            other_s = room_in_s(other.reason, seconds_s, (self.now - other.enqueued) / 1e9)
            room_ahead_s = max(room_ahead_s, other_s)
        return (one.member or 0) + 1, len(before), one.reason, seconds, waited_s, room_ahead_s

    def isolates_unknown(self) -> bool:
        """Tell whether unknown models are measured by running alone."""
        words = self.words
        return not words[Header.SOURCE_MEASURES_PROCESSES] and not words[Header.SOURCE_ACCOUNTING_ONLY]
