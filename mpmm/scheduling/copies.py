"""A summary of the instance rows, made in one pass: copies by model, and memory by device. Every plan reads it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpmm.policy.sharing import remaining_s
from mpmm.policy.suspension import resume_s
from mpmm.policy.view import (
    BusyInstance,
    IdleInstance,
    PlacedInstance,
    SuspendedInstance,
)
from mpmm.scheduling.suspension import SuspensionDecisions
from mpmm.shared_state.layout import Instance, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.reads.instances import UsedInstance

__all__ = ["Copies", "CopiesReader"]


def _counts() -> defaultdict[int, defaultdict[int, int]]:
    return defaultdict(lambda: defaultdict(int))


@dataclass
class Copies:
    """A summary of the instance rows: copies by model (loaded ones shared, or owned by member; loading by member) and
    their seats, MB and copies in mid-unload by device. `booked_mb` is what all but the loading ones take, `reserved_mb`
    what loads in progress and leases may take, or already take if that is more."""

    idle: list[IdleInstance] = field(default_factory=list)
    busy: list[BusyInstance] = field(default_factory=list)
    leases: list[PlacedInstance] = field(default_factory=list)
    suspended: list[SuspendedInstance] = field(default_factory=list)
    suspending: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    shared: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    owned: defaultdict[int, defaultdict[int, int]] = field(default_factory=_counts)
    loading: defaultdict[int, defaultdict[int, int]] = field(default_factory=_counts)
    seats: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    leaving: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    newest_load: dict[int, int] = field(default_factory=dict)
    # How long the newest load takes in all if it is a resume, else 0.
    coming_s: dict[int, float] = field(default_factory=dict)
    newest_hold: dict[int, int] = field(default_factory=dict)
    # The sum of the times, in ns, for which current holds have lasted.
    held_ns: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    unloading: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    booked_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    reserved_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    suspending_on: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    unloading_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    leased_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    steady: dict[int, int] = field(default_factory=dict)


class CopiesReader:
    """Reads the instance rows of one namespace. Methods need the lock."""

    def __init__(self, namespace: Namespace, suspension: SuspensionDecisions) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._reads = namespace.reads
        self._suspension = suspension

    def read_copies(self) -> Copies:
        """Return the summary of the instance rows, in one pass over those in use."""
        now = time.monotonic_ns()
        copies = Copies()
        several: dict[int, list[UsedInstance]] = {}
        for one in self._reads.instances.in_use():
            # All rows of one copy are added together: its memory counts once, and it is in use while any of them is.
            if one.seats or one.seat_of is not None:
                several.setdefault(one.row if one.seat_of is None else one.seat_of, []).append(one)
                continue
            # Recorded before the states are distinguished: a load or a lease may start quietly.
            if one.steady:
                copies.steady.update(dict.fromkeys(device_rows(one.device_bits), one.model))
            if one.state == Instance.LEASED:
                # Not a copy of a model, but a reservation.
                self._add_lease(copies, one)
                continue
            if one.state in (Instance.LOADING, Instance.RESUMING):
                self._add_load(copies, one, now)
                continue
            # A load counts by its reservation instead, see `_add_reservation`: both would count its memory twice.
            copies.booked_mb[one.device] += one.mb
            for device, mb in one.other_shares:
                copies.booked_mb[device] += mb
            if one.state == Instance.IDLE:
                self._add_idle(copies, one)
            elif one.state == Instance.ACTIVE:
                self._add_active(copies, one, now)
            elif one.state == Instance.SUSPENDED:
                self._add_suspended(copies, one)
            else:
                self._add_unload(copies, one)
        for row, places in several.items():
            self._add_several(copies, row, places, now)
        return copies

    def _add_several(self, copies: Copies, row: int, places: Sequence[UsedInstance], now_ns: int) -> None:
        """Add a copy that several may use at a time. places: its own row, and those of its seats."""
        # Its own row is freed last, so it is there.
        copy = next(one for one in places if one.row == row)
        for device, mb in ((copy.device, copy.mb), *copy.other_shares):
            copies.booked_mb[device] += mb
        # If its own row was given back it is UNLOADING, but the unload begins only once the last seat is given back.
        leaving = copy.state == Instance.UNLOADING or copy.to_go
        if leaving:
            copies.leaving[copy.model] += 1
        else:
            if copy.owner:
                copies.owned[copy.model][copy.owner] += 1
            else:
                copies.shared[copy.model] += 1
            # Seats do not count as copies, or `max_model_copies` would limit users instead.
            copies.seats[copy.model] += len(places) - 1
        used = [one for one in places if one.state == Instance.ACTIVE]
        if used:
            newest = max(one.since_ns for one in used)
            copies.newest_hold[copy.model] = max(newest, copies.newest_hold.get(copy.model, 0))
            copies.held_ns[copy.model] += sum(now_ns - one.since_ns for one in used)
            # Its memory becomes available when the last of its users has given it back.
            free_in_s = max(self._free_in_s(one, now_ns, loading=False) for one in used)
            copies.busy.append(
                BusyInstance(
                    *(row, copy.model, copy.device, copy.mb, free_in_s, copy.pinned, copy.owner or None),
                    leaving=leaving,
                    other_shares=copy.other_shares,
                )
            )
        for one in places:
            if one.state != Instance.IDLE:
                continue
            # The memory counts once, with the copy's own row, and only while no seat is in use.
            whole = one is copy and not used
            copies.idle.append(
                IdleInstance(
                    *(one.row, one.model, one.device, one.mb if whole else 0.0, one.since_ns / 1e9),
                    *(one.owner or None, one.pinned, None if whole else row),
                    other_shares=one.other_shares if whole else tuple((device, 0.0) for device, _ in one.other_shares),
                )
            )

    @staticmethod
    def _add_idle(copies: Copies, one: UsedInstance) -> None:
        if one.owner:
            copies.owned[one.model][one.owner] += 1
        else:
            copies.shared[one.model] += 1
        copies.idle.append(
            IdleInstance(
                *(one.row, one.model, one.device, one.mb, one.since_ns / 1e9, one.owner or None, one.pinned),
                other_shares=one.other_shares,
            )
        )

    def _add_active(self, copies: Copies, one: UsedInstance, now_ns: int) -> None:
        # A copy that is to be unloaded serves no newcomer, and does not count towards `max_model_copies`.
        copies.leaving[one.model] += one.to_go
        if one.owner:
            copies.owned[one.model][one.owner] += not one.to_go
        else:
            copies.shared[one.model] += not one.to_go
        copies.newest_hold[one.model] = max(one.since_ns, copies.newest_hold.get(one.model, 0))
        copies.held_ns[one.model] += now_ns - one.since_ns
        free_in_s = self._free_in_s(one, now_ns, loading=False)
        copies.busy.append(
            BusyInstance(
                *(one.row, one.model, one.device, one.mb, free_in_s, one.pinned, one.owner or None),
                leaving=one.to_go,
                other_shares=one.other_shares,
            )
        )

    def _add_load(self, copies: Copies, one: UsedInstance, now_ns: int) -> None:
        # As in `_add_active`.
        copies.leaving[one.model] += one.to_go
        copies.loading[one.model][one.holder] += not one.to_go
        resumes = one.state == Instance.RESUMING
        if one.since_ns > copies.newest_load.get(one.model, 0):
            # If there are several, the newest tells when all of them will be there.
            copies.newest_load[one.model] = one.since_ns
            copies.coming_s[one.model] = resume_s(self._suspension.movable(one.row)) if resumes else 0.0
        free_in_s = self._free_in_s(one, now_ns, loading=True)
        copies.busy.append(
            BusyInstance(
                *(one.row, one.model, one.device, one.mb, free_in_s, one.pinned, one.holder, True, one.to_go),
                other_shares=one.other_shares,
            )
        )
        self._add_reservation(copies, one)

    def _add_suspended(self, copies: Copies, one: UsedInstance) -> None:
        """Add a suspended copy, which has given up its memory except what its process keeps, and is not loaded."""
        # It lies on one device, because a copy that spans several cannot be suspended. A resume needs again what the
        # copy had there; `mb` is less, and would admit it where there is no room.
        had_mb, resumes_in_s = self._tables.instances[one.row].device_mb, resume_s(self._suspension.movable(one.row))
        copies.suspended.append(
            SuspendedInstance(
                *(one.row, one.model, one.device, had_mb, one.since_ns / 1e9, one.owner or None, resumes_in_s)
            )
        )

    @staticmethod
    def _add_unload(copies: Copies, one: UsedInstance) -> None:
        """Add a copy that is being unloaded or suspended."""
        if one.state == Instance.SUSPENDING:
            copies.suspending[one.model] += 1
        # The memory of a late unload counts as in use, and no plan relies on it.
        if not one.unload_late:
            for device, mb in ((one.device, one.mb), *one.other_shares):
                # The number counts, too: a copy of unknown size adds no MB, but is still worth waiting for.
                copies.unloading[device] += 1
                copies.suspending_on[device] += one.state == Instance.SUSPENDING
                copies.unloading_mb[device] += mb

    def _add_lease(self, copies: Copies, one: UsedInstance) -> None:
        # Memory that its program takes beyond the lease counts, too; the rest of the lease is reserved for it.
        self._share_out(copies.reserved_mb, one, max(one.reserved_mb, self._tables.instances[one.row].mb))
        # When leases end, a waiter can expect no more than they were for.
        self._share_out(copies.leased_mb, one, one.reserved_mb)
        share_mb = one.reserved_mb / (1 + len(one.other_shares))
        shares = tuple((device, share_mb) for device, _ in one.other_shares)
        copies.leases.append(PlacedInstance(one.row, one.model, one.device, share_mb, other_shares=shares))

    @staticmethod
    def _share_out(figures: dict[int, float], one: UsedInstance, mb: float) -> None:
        """Add an equal share to the figures of all devices of a copy."""
        share_mb = mb / (1 + len(one.other_shares))
        figures[one.device] += share_mb
        for device, _ in one.other_shares:
            figures[device] += share_mb

    def _add_reservation(self, copies: Copies, one: UsedInstance) -> None:
        """Add the reservation of a load in progress, or what its server already takes if that is more."""
        # Without a server there is no process that the source could measure.
        if not one.has_server:
            self._share_out(copies.reserved_mb, one, one.reserved_mb)
            return
        share_mb = one.reserved_mb / (1 + len(one.other_shares))
        for device in (one.device, *(device for device, _ in one.other_shares)):
            copies.reserved_mb[device] += max(
                share_mb, self._namespace.transitions.ledgers.measured_share(one.row, device) or 0.0
            )

    def _free_in_s(self, one: UsedInstance, now_ns: int, loading: bool) -> float:
        """Return in how many seconds an instance that is held, or being loaded, is expected to be idle: from how long
        that takes on average, and how long it has taken already."""
        hold_s, load_s = self._reads.models.durations_s(one.model)
        if one.state == Instance.RESUMING:
            # A resume takes a fraction of a load; with the load's time others would load a copy as well.
            load_s = resume_s(self._suspension.movable(one.row))
        elapsed_s = (now_ns - one.since_ns) / 1e9
        return hold_s + remaining_s(load_s, elapsed_s) if loading else remaining_s(hold_s, elapsed_s)
