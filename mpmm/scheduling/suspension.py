"""Accounting for suspended copies: the host's ledger, and whether an evicted copy is suspended or unloaded.

The host's ledger is the sum of what suspended copies take, by row, see `Instance.HOST_MB`. Copies that are being
unloaded do not count, because ending a process takes milliseconds, and filling the room that it leaves takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import numpy as np

from mpmm.policy.suspension import HostRoom, Kept, Movable, Way, pays, saved_share
from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Instance, Model
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction

__all__ = ["SuspensionDecisions"]

_IN_HOST = (Instance.SUSPENDING, Instance.SUSPENDED, Instance.RESUMING)


class SuspensionDecisions:
    """The decisions of one namespace about suspension. Methods need the lock."""

    def __init__(self, namespace: Namespace, rate: Callable[[int], float]) -> None:
        """rate: returns how often a model (row) is requested, per second."""
        self._namespace = namespace
        self._segment = namespace.segment
        self._tables = namespace.tables
        self._rate = rate
        # The input of `saved_share`, and its result, by way.
        self._saved_shares: dict[Way, tuple[bytes, float]] = {}

    @property
    def budget_mb(self) -> float:
        """Host memory that suspended copies may take together."""
        chosen = self._namespace.settings.suspend_budget_mb
        return chosen if math.isfinite(chosen) else self._tables.header.host_share_mb

    @property
    def free_mb(self) -> float:
        """How much of the budget is left."""
        return self.budget_mb - self.used_mb()

    def used_mb(self) -> float:
        """Return the host memory that suspended copies take, or are about to."""
        return math.fsum(self._tables.instances[row].host_mb for row in self._in_host())

    def evict(self, t: Transaction, row: int, unloader: int, cause: Cause) -> None:
        """Have an idle copy suspended by a member (slot) if that pays and the host has room; else have it unloaded."""
        if not self.suspend(t, row, unloader, cause, evicted=True):
            self._namespace.transitions.unloads.begin(t, row, unloader, True, cause)

    def suspend(self, t: Transaction, row: int, suspender: int, cause: Cause, evicted: bool) -> bool:
        """Have an idle copy suspended by a member (slot); return False, with nothing changed, if it should not be.

        evicted: it is being evicted, so suspending has to pay; else a caller has asked for it.
        """
        if not self.can_be_suspended(row):
            return False
        copy = self.movable(row)
        model = self._tables.instances[row].model
        # The old version of an updated model will not be requested again.
        if evicted and (self._tables.models[model].superseded or not pays(copy, self.saved_share(copy.way))):
            return False
        room = self._room()
        dropped = room.dropped_for(copy.mb, copy.worth_suspending if evicted else math.inf)
        if dropped is None:
            return False
        # Others are dropped first, so that the host's ledger never exceeds its budget.
        suspensions = self._namespace.transitions.suspensions
        for other in dropped:
            why = Cause(Reason.HOST_FULL, copy.mb, max(0.0, room.free_mb), other=model + 1)
            suspensions.drop(t, other, suspender, why)
        suspensions.begin(t, row, suspender, evicted, cause)
        return True

    def kept_of(self, rows: Iterable[int]) -> set[int]:
        """Return those of these copies that would be suspended if they were evicted now, each taken by itself.

        rows: of idle copies without a seat in use. Every plan asks this about all idle copies, so figures that do not
        depend on the single copy are computed once.
        """
        copies, tables = self._tables.instance_columns(), self._tables
        chosen = np.fromiter(rows, np.intp)
        chosen = chosen[copies.way[chosen] != 0]
        # Usually no copy has a way, and one that spans devices cannot be suspended.
        devices = copies.devices[chosen]
        chosen = chosen[devices & (devices - np.uint64(1)) == 0]
        if not len(chosen) or not self.budget_mb:
            return set()
        twins = self._namespace.transitions.twins.any_of_all()
        room: HostRoom | None = None
        # Copies of a model with the same size and the same way have the same answer.
        alike: dict[tuple[int, int, float], bool] = {}
        of_model: dict[int, Movable | None] = {}
        shares: dict[Way, float] = {}
        found = set()
        columns = (chosen, copies.model[chosen], copies.way[chosen], copies.mb[chosen])
        for row, model, way, mb in zip(*(column.tolist() for column in columns), strict=True):
            if row in twins:
                continue
            kind = (model, way, mb)
            if kind not in alike:
                if model not in of_model:
                    figures = tables.models[model]
                    barred = figures.unsuspendable or figures.superseded
                    of_model[model] = None if barred else self.movable(row)
                known = of_model[model]
                copy = None if known is None else replace(known, mb=mb, way=Way(way))
                if copy is not None and copy.way not in shares:
                    shares[copy.way] = self.saved_share(copy.way)
                if copy is not None and pays(copy, shares[copy.way]):
                    room = room or self._room()
                    alike[kind] = room.dropped_for(mb, copy.worth_suspending) is not None
                else:
                    alike[kind] = False
            if alike[kind]:
                found.add(row)
        return found

    def can_be_suspended(self, row: int) -> bool:
        """Tell whether there is a way to suspend an idle copy: none for one that spans devices, or has twins."""
        instance = self._tables.instances[row]
        if not instance.way or len(instance.devices) > 1 or self._tables.is_in_use(row):
            return False
        if self._tables.models[instance.model].unsuspendable or not self.budget_mb:
            return False
        # The twins' rows would still be granted, although the server is asleep.
        return not self._namespace.transitions.twins.any_of(row)

    def movable(self, row: int) -> Movable:
        """Return the figures for suspending a copy, from its model."""
        instance = self._tables.instances[row]
        model = self._tables.models[instance.model]
        return Movable(
            instance.device_mb or instance.mb,
            Way(instance.way),
            model.load_s,
            model.suspend_s,
            model.resume_s,
            self._rate(instance.model),
        )

    def saved_share(self, way: Way) -> float:
        """Return the share of load time that would be saved if the copies of all models were suspended that way.

        All models count, because it is unknown which ways a model without a copy has.
        """
        models = self._tables.model_columns()
        counted = (models.state == Model.MODEL) & (models.unsuspendable == 0) & (models.superseded == 0)
        # The size for which a load would be reserved, see `Views.expected_mb`.
        said = np.where(models.expect_mb > 0, models.expect_mb, self._namespace.settings.default_estimate_mb)
        estimates = np.where(models.known != 0, models.estimate_mb, said)
        figures = np.column_stack((estimates, models.load_s, models.suspend_s, models.resume_s))[counted]
        # Every plan asks this, and it changes at most as often as loads and suspensions end.
        key = figures.tobytes()
        before = self._saved_shares.get(way)
        if before is None or before[0] != key:
            rows = figures.tolist()
            share = saved_share(Movable(mb, way, load_s, away_s, back_s, 0.0) for mb, load_s, away_s, back_s in rows)
            before = self._saved_shares[way] = (key, share)
        return before[1]

    def drop_oldest(self, t: Transaction, unloader: int, cause: Cause, among: Collection[int] | None = None) -> bool:
        """Have the copy that was suspended longest ago unloaded by a member (slot); return False if there is none.

        among: the models (rows) whose copies may be dropped, None for all.
        """
        # A pin promises that the model stays, on the device or in the host.
        kept = [one for one in self._kept() if not one.pinned]
        if among is not None:
            kept = [one for one in kept if self._tables.instances[one.row].model in among]
        if not kept:
            return False
        oldest = min(kept, key=lambda one: one.since_s)
        self._namespace.transitions.suspensions.drop(t, oldest.row, unloader, cause)
        return True

    def _room(self) -> HostRoom:
        return HostRoom(self._kept(), self.free_mb, self.budget_mb)

    def _kept(self) -> list[Kept]:
        """Return the copies that are suspended, and may be dropped."""
        tables, found = self._tables, []
        for row in tables.rows_where(self._segment.layout.instances, Instance.STATE, Instance.SUSPENDED):
            instance = tables.instances[row]
            pinned = bool(tables.models[instance.model].pins)
            found.append(Kept(row, instance.host_mb, instance.since / 1e9, self.movable(row).worth, pinned))
        return found

    def _in_host(self) -> list[int]:
        rows = self._tables.used_rows(self._segment.layout.instances)
        return [row for row in rows if self._tables.instances[row].state in _IN_HOST]
