"""What the instance rows say, in one pass over them: copies by model, and memory by device. Every plan reads it."""

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
from mpmm.shared_state.layout import Instance, Model, device_rows
from mpmm.shared_state.namespace import Namespace

__all__ = ["Copies", "CopiesReader"]


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


class CopiesReader:
    """Reads the instance rows of one namespace. Methods need the lock."""

    def __init__(self, namespace: Namespace, suspension: SuspensionDecisions) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._segment = namespace.segment
        self._layout = namespace.segment.layout
        self._suspension = suspension

    def read_copies(self) -> Copies:
        """Return what the instance rows say, in one pass over those in use."""
        words, floats, tables = self._segment.words, self._segment.floats, self._tables
        now = time.monotonic_ns()
        copies = Copies()
        # By words, not by `tables.instances`: each plan comes by here with the lock held, and a typed row costs 2 us.
        for row in tables.used_rows(self._layout.instances):
            at = tables.instance(row)
            # One slice for seven words: a plan reads every row, and this takes half the time of single reads.
            state, model, _, holder, owner, server, devices = words[at : at + Instance.MB]
            mb, reserved = floats[at + Instance.MB], floats[at + Instance.RESERVED_MB]
            since = words[at + Instance.SINCE]
            pinned = bool(words[tables.model(model) + Model.PINS])
            device = devices.bit_length() - 1
            other_shares: tuple[tuple[int, float], ...] = ()
            # More than one bit: what it has on each is in its SHARES, and MB is their sum.
            if devices & (devices - 1):
                (device, mb), *others = tables.shares_of(row)
                other_shares = tuple(others)
            if words[at + Instance.STEADY]:
                copies.steady.update(dict.fromkeys(device_rows(devices), model))
            if state == Instance.LEASED:
                # Not a copy of a model, but a reservation.
                self._add_lease(copies, row, device, other_shares)
                continue
            is_to_go = bool(words[at + Instance.UNLOAD_ON_RELEASE])
            # It is no copy that a newcomer could count on, nor one of those that `max_model_copies` limits.
            leaves = is_to_go and state in (Instance.ACTIVE, Instance.LOADING, Instance.RESUMING)
            copies.leaving[model] += leaves
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
            # It has given its memory up but for what its process keeps, and stands for no loaded copy.
            if state == Instance.SUSPENDED:
                copies.suspended.append(self._suspended(row, model, device, other_shares, since, owner))
                continue
            if state == Instance.SUSPENDING:
                copies.suspending[model] += 1
            if state in (Instance.UNLOADING, Instance.SUSPENDING):
                # The memory of an unload that is late is in use, and nobody counts on it.
                if not words[at + Instance.UNLOAD_LATE]:
                    self._add_unload(copies, ((device, mb), *other_shares))
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
            if reserved:
                self._add_load(copies, row, device, other_shares, reserved, bool(server))
        return copies

    @staticmethod
    def _add_unload(copies: Copies, shares: Sequence[tuple[int, float]]) -> None:
        for device, share_mb in shares:
            copies.unloading[device] += 1
            copies.unloading_mb[device] += share_mb

    def _add_lease(self, copies: Copies, row: int, device: int, other_shares: Sequence[tuple[int, float]]) -> None:
        at, floats = self._tables.instance(row), self._segment.floats
        reserved, model = floats[at + Instance.RESERVED_MB], self._segment.words[at + Instance.MODEL]
        # What its program takes beyond the lease is taken, too; what it leaves of it nobody else may take.
        self._share_out(copies.reserved_mb, device, other_shares, max(reserved, floats[at + Instance.MB]))
        self._share_out(copies.leased_mb, device, other_shares, reserved)
        share_mb = reserved / (1 + len(other_shares))
        shares = tuple((other, share_mb) for other, _ in other_shares)
        copies.leases.append(PlacedInstance(row, model, device, share_mb, other_shares=shares))

    def _suspended(
        self, row: int, model: int, device: int, other_shares: Sequence[tuple[int, float]], since_ns: int, owner: int
    ) -> SuspendedInstance:
        share_mb = self._segment.floats[self._tables.instance(row) + Instance.DEVICE_MB] / (1 + len(other_shares))
        others = tuple((other, share_mb) for other, _ in other_shares)
        resumes_in_s = resume_s(self._suspension.movable(row))
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
        self,
        copies: Copies,
        row: int,
        device: int,
        other_shares: Sequence[tuple[int, float]],
        reserved: float,
        measured: bool,
    ) -> None:
        """Add what a load in progress was allowed, or what its server has taken already, where that is more.

        measured: it has a server, whose process the source may measure.
        """
        if not measured:
            self._share_out(copies.reserved_mb, device, other_shares, reserved)
            return
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
