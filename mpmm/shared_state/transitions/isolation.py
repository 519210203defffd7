"""Instances that have their devices to themselves: alone, to be measured; or quiet, while they start.

Both are stored twice, in rows and as bits in the header (H3), because the warm path reads only the header.
"""

from __future__ import annotations

import math

from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Device, Header, Instance, device_rows
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.devices import Devices
from mpmm.shared_state.transitions.part import Actor, Part

__all__ = ["Isolation"]


class Isolation(Part):
    """The transitions of instances' claims on devices, apart from memory."""

    def __init__(self, tables: Tables, actor: Actor, devices: Devices) -> None:
        super().__init__(tables, actor)
        self._devices = devices

    def runs_alone(self, row: int) -> bool:
        """Tell whether an instance has its devices to itself, to be measured."""
        devices = self._segment.words[self._tables.instance(row) + Instance.DEVICES]
        return any(
            self._segment.words[self._tables.device(device) + Device.ISOLATED] == row + 1
            for device in device_rows(devices & self._segment.words[Header.ISOLATED])
        )

    def begin(self, t: Transaction, row: int) -> None:
        """Give an instance that is about to load its devices to itself."""
        at, words = self._tables.instance(row), self._segment.words
        devices = words[at + Instance.DEVICES]
        # Two instances in isolation on one device would be measured together.
        if words[Header.ISOLATED] & devices:
            raise self._tables.surprise("the copy to be loaded alone", at)
        t.set(Header.ISOLATED, words[Header.ISOLATED] | devices)
        for device in map(self._tables.device, device_rows(devices)):
            t.set(device + Device.ISOLATED, row + 1)
            # Unknown until a figure is taken just before the load; the old value is from another load.
            t.set_float(device + Device.BASELINE_MB, math.nan)
        t.event(EventKind.ISOLATION_BEGAN, self._model_reference(row), row + 1)

    def set_baseline(self, t: Transaction, row: int) -> None:
        """Record the memory in use on its devices just before an isolated load, and forget older peaks."""
        devices = self._segment.words[self._tables.instance(row) + Instance.DEVICES]
        for device in map(self._tables.device, device_rows(devices)):
            t.set_float(device + Device.BASELINE_MB, self._segment.floats[device + Device.USED_MB])
        self._devices.reset_peaks(t, devices)

    def end(self, t: Transaction, row: int) -> None:
        """End the isolation of an instance, if it runs alone."""
        # The bits do not tell, because an idle instance may lie where another one runs alone.
        if not self.runs_alone(row):
            return
        devices = self._segment.words[self._tables.instance(row) + Instance.DEVICES]
        for device in device_rows(devices):
            t.set(self._tables.device(device) + Device.ISOLATED, 0)
        t.set(Header.ISOLATED, self._segment.words[Header.ISOLATED] & ~devices)
        t.event(EventKind.ISOLATION_ENDED, self._model_reference(row), row + 1)

    def begin_steady(self, t: Transaction, row: int) -> None:
        """Hold back loads and unloads on an instance's devices, or a lease's, until it has started."""
        at, words = self._tables.instance(row), self._segment.words
        t.set(at + Instance.STEADY, 1)
        t.set(Header.STEADY, words[Header.STEADY] | words[at + Instance.DEVICES])

    def end_steady(self, t: Transaction, row: int) -> None:
        """Allow loads and unloads again on the devices of an instance or lease, if it is STEADY.

        Unloads and suspensions there have had to wait: their time begins now, and all members are woken to check.
        """
        words, tables, at = self._segment.words, self._tables, self._tables.instance(row)
        # By the row, not by the header's bits, which another instance on the device may have set.
        if not words[at + Instance.STEADY]:
            return
        devices = words[at + Instance.DEVICES]
        t.set(at + Instance.STEADY, 0)
        # The bits belong to this one alone: at most one instance on each device is STEADY. (I9)
        t.set(Header.STEADY, words[Header.STEADY] & ~devices)
        held_back = (Instance.UNLOADING, Instance.SUSPENDING)
        for held in tables.used_rows(self._layout.instances):
            if words[tables.instance(held)] in held_back and words[tables.instance(held) + Instance.DEVICES] & devices:
                t.set(tables.instance(held) + Instance.SINCE, t.now)
        self._ring_all(t)

    def note_change(self, t: Transaction, row: int) -> None:
        """Record on an instance's devices that the set of loaded instances has changed.

        Earlier readings do not describe the new set.
        """
        for device in device_rows(self._segment.words[self._tables.instance(row) + Instance.DEVICES]):
            t.set(self._tables.device(device) + Device.CONFIGURED_AT, t.now)
