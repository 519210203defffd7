"""What processes are measured to take, and so what the instances take that lie in them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mpmm.shared_state.layout import Instance, Member, device_rows
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.estimates import Estimates
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.part import Actor, Part

__all__ = ["Measurements"]


class Measurements(Part):
    """The transitions that write measured figures into member and instance rows."""

    def __init__(self, tables: Tables, actor: Actor, instances: Instances, estimates: Estimates) -> None:
        super().__init__(tables, actor)
        self._instances = instances
        self._estimates = estimates

    def measure(self, t: Transaction, slot: int, on_devices: Mapping[int, float], taken_ns: int | None = None) -> None:
        """Record the memory of one process, by device, and with it what the instance of a model server takes.

        taken_ns: when the figure was asked for, None for now. One from before an instance was loaded, suspended or
        resumed says nothing of it.
        """
        words, floats = self._segment.words, self._segment.floats
        at = self._tables.member(slot)
        row = words[at + Member.INSTANCE]
        instance = self._tables.instance(row - 1) if row else 0
        # Both ways: a row that was freed and taken again is another copy's, and the server's row names it still.
        serves = instance and words[instance + Instance.SERVER] == slot + 1
        # What a model server has elsewhere than where it was sent is in no reservation.
        devices = device_rows(words[instance + Instance.DEVICES]) if serves else list(on_devices)
        shares_mb = [on_devices.get(device, 0.0) for device in devices]
        mb = math.fsum(shares_mb)
        self._update_float(t, at + Member.MEASURED_MB, mb)
        # Of the process as such, so also while it loads: `inspect` shows it, and the leader learns by it.
        if mb > floats[at + Member.PEAK_MB]:
            t.set_float(at + Member.PEAK_MB, mb)
        if serves:
            if len(shares_mb) > 1:
                for number, share_mb in enumerate(shares_mb):
                    self._update_float(t, at + Member.SHARES + number, share_mb)
            self._measure_instance(t, row - 1, mb, shares_mb, taken_ns)

    def _measure_instance(
        self, t: Transaction, row: int, mb: float, shares_mb: list[float], taken_ns: int | None
    ) -> None:
        """Record what a model server was measured to take as its instance's memory, where the figure shows that."""
        words, at = self._segment.words, self._tables.instance(row)
        state = words[at + Instance.STATE]
        if state == Instance.SUSPENDED and not _is_from_before(taken_ns, words[at + Instance.SINCE]):
            # What it keeps there, its context say.
            self._instances.set_mb(t, row, mb, shares_mb)
        # A resume sets LOADED_AT anew. A figure from before that shows a part of the copy, what it had in the middle of
        # its load or kept while it was suspended, and admission would take the rest for free.
        if _is_from_before(taken_ns, words[at + Instance.LOADED_AT]):
            return
        # While it loads or unloads the figure shows half a model, and an estimate by that would let too much in.
        if state in (Instance.ACTIVE, Instance.IDLE):
            self._instances.set_mb(t, row, mb, shares_mb)
            # Of what spans several devices each has to have room for the largest share.
            self._estimates.raise_to(t, words[at + Instance.MODEL], max(shares_mb) * len(shares_mb))

    def forget(self, t: Transaction, slot: int) -> None:
        """Record that it is unknown what a process takes, where a sample that may not list all does not list it.

        Its last figure may be that of a model server which has ended since.
        """
        self._update_float(t, self._tables.member(slot) + Member.MEASURED_MB, math.nan)

    def set_measured_mb(self, t: Transaction, row: int, mb: float) -> None:
        """Record what an instance takes by a measurement of the whole device."""
        self._instances.set_mb(t, row, mb)


def _is_from_before(taken_ns: int | None, event_ns: int) -> bool:
    return taken_ns is not None and taken_ns <= event_ns
