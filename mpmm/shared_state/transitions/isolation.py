"""Where an instance has its devices to itself: alone, to be measured; or quiet, while it starts.

Both are written twice, in rows and as bits in the header (H3), because the warm path looks at the header alone.
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
    """The transitions of what instances claim of their devices beside memory."""

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
        """Let an instance that is about to load run alone on its devices."""
        at, words = self._tables.instance(row), self._segment.words
        devices = words[at + Instance.DEVICES]
        # Two that ran alone on one device would each be measured with the other in it.
        if words[Header.ISOLATED] & devices:
            raise self._tables.surprise("the copy to be loaded alone", at)
        t.set(Header.ISOLATED, words[Header.ISOLATED] | devices)
        for device in map(self._tables.device, device_rows(devices)):
            t.set(device + Device.ISOLATED, row + 1)
            # Unknown until a figure is taken just before the load; what stood there before was another load's.
            t.set_float(device + Device.BASELINE_MB, math.nan)
        t.event(EventKind.ISOLATION_BEGAN, self._model_reference(row), row + 1)

    def set_baseline(self, t: Transaction, row: int) -> None:
        """Record the memory in use on its devices just before an isolated load, and forget older peaks."""
        devices = self._segment.words[self._tables.instance(row) + Instance.DEVICES]
        for device in map(self._tables.device, device_rows(devices)):
            t.set_float(device + Device.BASELINE_MB, self._segment.floats[device + Device.USED_MB])
        self._devices.reset_peaks(t, devices)

    def end(self, t: Transaction, row: int) -> None:
        """An instance does not run alone any more; nothing if it did not."""
        # The bits alone do not tell: an idle instance may lie where another one runs alone.
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
        """Let loads and unloads go on where an instance or lease had it quiet; nothing if it had not.

        Instances that are to be unloaded there have had to wait for that: their time begins now, and all members look.
        """
        words, tables, at = self._segment.words, self._tables, self._tables.instance(row)
        # By the row, not by the header's bits, which another instance on the device may have set.
        if not words[at + Instance.STEADY]:
            return
        devices = words[at + Instance.DEVICES]
        t.set(at + Instance.STEADY, 0)
        # No other bit is this one's: of those on a device one is STEADY at the most. (I9)
        t.set(Header.STEADY, words[Header.STEADY] & ~devices)
        held_back = (Instance.UNLOADING, Instance.SUSPENDING)
        for held in tables.used_rows(self._layout.instances):
            if words[tables.instance(held)] in held_back and words[tables.instance(held) + Instance.DEVICES] & devices:
                t.set(tables.instance(held) + Instance.SINCE, t.now)
        self._ring_all(t)

    def note_change(self, t: Transaction, row: int) -> None:
        """Record on an instance's devices that from now on other instances are loaded there.

        A reading from before that is no reading of what lies there now.
        """
        for device in device_rows(self._segment.words[self._tables.instance(row) + Instance.DEVICES]):
            t.set(self._tables.device(device) + Device.CONFIGURED_AT, t.now)
