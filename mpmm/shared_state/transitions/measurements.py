"""Records what processes are measured to take, and with it what the instances in them take."""

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

        taken_ns: when the figure was asked for, None for now. A figure from before an instance was loaded, suspended or
        resumed says nothing about it.
        """
        words, floats = self._segment.words, self._segment.floats
        at = self._tables.member(slot)
        row = words[at + Member.INSTANCE]
        instance = self._tables.instance(row - 1) if row else 0
        # Checked both ways: the server's row may still refer to a row that was freed and is another copy's now.
        serves = instance and words[instance + Instance.SERVER] == slot + 1
        # Only its own devices: no reservation covers what a model server takes elsewhere.
        devices = device_rows(words[instance + Instance.DEVICES]) if serves else list(on_devices)
        shares_mb = [on_devices.get(device, 0.0) for device in devices]
        mb = math.fsum(shares_mb)
        self._update_float(t, at + Member.MEASURED_MB, mb)
        # The process's peak, even while it loads: `inspect` shows it, and the leader derives estimates from it.
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
        """Record what a model server was measured to take as its instance's memory, if the figure shows that."""
        words, at = self._segment.words, self._tables.instance(row)
        state = words[at + Instance.STATE]
        if state == Instance.SUSPENDED and not _is_from_before(taken_ns, words[at + Instance.SINCE]):
            # What it keeps on the device, for example its context.
            self._instances.set_mb(t, row, mb, shares_mb)
        # A load or resume sets LOADED_AT. An earlier figure shows only part of the copy, from the middle of its load or
        # while it was suspended, and admission would take the rest for free.
        if _is_from_before(taken_ns, words[at + Instance.LOADED_AT]):
            return
        # While it loads or unloads, the figure shows half a model, and an estimate from it would admit too much.
        if state in (Instance.ACTIVE, Instance.IDLE):
            self._instances.set_mb(t, row, mb, shares_mb)
            # If it spans several devices, each must have room for the largest share.
            self._estimates.raise_to(t, words[at + Instance.MODEL], max(shares_mb) * len(shares_mb))

    def forget(self, t: Transaction, slot: int) -> None:
        """Record that a process's memory is unknown, because a sample that may be incomplete does not list it.

        Its last figure may be from a model server that has ended since.
        """
        at = self._tables.member(slot) + Member.MEASURED_MB
        # Usually it is unknown already, and nan never equals itself.
        if not math.isnan(self._segment.floats[at]):
            t.set_float(at, math.nan)

    def set_measured_mb(self, t: Transaction, row: int, mb: float) -> None:
        """Record what an instance takes according to a measurement of the whole device."""
        self._instances.set_mb(t, row, mb)


def _is_from_before(taken_ns: int | None, event_ns: int) -> bool:
    return taken_ns is not None and taken_ns <= event_ns
