"""Device rows: which devices there are, and the last figures of each. `ledgers` splits the figures up."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from mpmm.errors import TableFullError
from mpmm.policy.ledger import Figure
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Device, device_rows
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.ledgers import Ledgers
from mpmm.shared_state.transitions.part import Actor, Part

__all__ = ["Devices"]


class Devices(Part):
    """The transitions of device rows."""

    def __init__(self, tables: Tables, actor: Actor, ledgers: Ledgers) -> None:
        super().__init__(tables, actor)
        self._ledgers = ledgers

    def describe(
        self,
        t: Transaction,
        devices: Sequence[tuple[bytes, bytes, float]],
        replace: bool = False,
        measured: bool = True,
    ) -> list[int]:
        """Give each of the devices, (uuid, name, total MB), a row; return the rows. Known devices keep their figures.

        replace: free the rows of other devices; else they stay, because other processes may see other devices.
        measured: the caller's source can measure them. Then another device that was only stated so far, but has copies,
            which must really lie on one of these, stays for those copies, and takes no further ones.
        Raises TableFullError if there are more devices than rows.
        """
        table = self._layout.devices
        there = {
            self._tables.text(self._tables.device(row) + Device.UUID): row for row in self._tables.used_rows(table)
        }
        if replace:
            self._free_others(t, there, {uuid for uuid, _, _ in devices}, measured)
        # A device that stays keeps its row, because instances and tickets refer to it by the row's bit.
        free = [row for row in range(table.capacity) if row not in there.values()]
        new = [uuid for uuid, _, _ in devices if uuid not in there]
        if len(new) > len(free):
            raise TableFullError(
                f"the source reports {len(devices)} devices, the devices table has {table.capacity} rows; "
                "create the namespace with a larger Capacities.devices",
                table="devices",
                capacity=table.capacity,
                setting="Capacities.devices",
            )
        there.update(zip(new, free, strict=False))
        for uuid, name, total_mb in devices:
            at = self._tables.device(there[uuid])
            if uuid in new:
                t.set_all([(at + word, 0) for word in range(Device.STATE, Device.UUID)])
                # Figures of the device that had the row before would count for this one's peak.
                times = range(at + Device.RING, at + Device.RING + 2 * Device.RING_LENGTH, 2)
                t.set_all([(entry, 0) for entry in times if self._segment.words[entry]])
                t.set_text(at + Device.UUID, uuid)
                # Both texts: the row may have been another device's, and only the words before them are cleared.
                t.set_text(at + Device.NAME, name)
                # Unknown, not 0: no load may use memory that no figure has shown to be free.
                t.set_float(at + Device.EXTERNAL_MB, math.nan)
                t.set_float(at + Device.EXTERNAL_LEAST_MB, math.nan)
                t.set(at + Device.CONFIGURED_AT, t.now)
                t.set(at + Device.STATE, 1)
            # For known devices, too: a partition may have been enlarged, or be measured from now on.
            t.set_float(at + Device.TOTAL_MB, total_mb)
            t.set(at + Device.MEASURED, int(measured))
        return [there[uuid] for uuid, _, _ in devices]

    def _free_others(self, t: Transaction, there: dict[bytes, int], wanted: set[bytes], measured: bool) -> None:
        """Free the rows of unwanted devices, and remove them from `there`, unless instances lie on them."""
        for uuid, row in list(there.items()):
            if uuid in wanted:
                continue
            if not self._is_in_use(row):
                t.set(self._tables.device(row) + Device.STATE, 0)
                del there[uuid]
            elif measured and self._is_only_stated(row):
                t.set_float(self._tables.device(row) + Device.TOTAL_MB, 0.0)

    def forget_stated(self, t: Transaction, row: int) -> None:
        """Free the row of a device that is only stated, once no instance lies there any more; see `describe`."""
        if self._is_only_stated(row) and not self._is_in_use(row):
            t.set(self._tables.device(row) + Device.STATE, 0)

    def _is_only_stated(self, device: int) -> bool:
        return not self._segment.words[self._tables.device(device) + Device.MEASURED]

    def _is_in_use(self, device: int) -> bool:
        return bool(self._tables.on_device(device))

    def note_try(self, t: Transaction, row: int, taken_ns: int) -> None:
        """Record that a process has tried to take a figure of a device."""
        # Even without a figure, because other processes check this before they try: not all of them should try a source
        # that hangs.
        t.set(self._tables.device(row) + Device.TRIED, taken_ns)

    def note_unrelated(self, t: Transaction, row: int, mb: float) -> None:
        """Record what processes that are not the namespace's take of a device; call it before `sample`."""
        t.set_float(self._tables.device(row) + Device.UNRELATED_MB, mb)

    def is_news(self, row: int, taken_ns: int) -> bool:
        """Tell whether a sample begun at `taken_ns` is not older than the device's last one."""
        return taken_ns >= self._segment.words[self._tables.device(row) + Device.SAMPLED]

    def sample(self, t: Transaction, row: int, used_mb: float, taken_ns: int, done_ns: int = 0) -> bool:
        """Record a device's figure that was asked for at `taken_ns`; return False if a later one is known already.

        Call it after `Measurements.measure` for the processes of the same sample.
        done_ns: when the figure arrived, 0 for now.
        """
        # SAMPLED never decreases (D1): an old figure that arrives late would show memory as free that is in use by now.
        if not self.is_news(row, taken_ns):
            return False
        floats = self._segment.floats
        at = self._tables.device(row)
        # `Ledgers.expect_back` stores this figure with each unload from here on: the next figure's difference to it is
        # what came back.
        t.set_float(at + Device.USED_MB, used_mb)
        t.set(at + Device.SAMPLED, taken_ns)
        slot = self._segment.words[at + Device.RING_NEXT]
        # A ring of (time, figure): the newest replaces the oldest, and an entry with time 0 was never written.
        entry = at + Device.RING + 2 * slot
        t.set(entry, taken_ns)
        t.set_float(entry + 1, used_mb)
        t.set(at + Device.RING_NEXT, (slot + 1) % Device.RING_LENGTH)
        # After the ring has the figure, because `peak_since` reads the ring.
        t.set_float(at + Device.PEAK_MB, self.peak_since(row, self._segment.words[at + Device.PEAK_RESET]))
        # HIGHEST_MB outlives the ring, which is short, and `reset_peaks`.
        if used_mb > floats[at + Device.HIGHEST_MB]:
            t.set_float(at + Device.HIGHEST_MB, used_mb)
        self._ledgers.settle(t, row, Figure(used_mb, taken_ns, done_ns or t.now, floats[at + Device.UNRELATED_MB]))
        return True

    def reset_peaks(self, t: Transaction, devices: int | None = None) -> None:
        """Reset the peaks of these devices (bits), or of all, to the current figures."""
        now = t.now
        for row in self._tables.used_rows(self._layout.devices) if devices is None else device_rows(devices):
            at = self._tables.device(row)
            t.set(at + Device.PEAK_RESET, now)
            # Not 0: what is in use now is part of the new peak, and the next sample may take a while.
            t.set_float(at + Device.PEAK_MB, self._segment.floats[at + Device.USED_MB])

    def peak_since(self, row: int, since_ns: int) -> float:
        """Return a device's highest figure in the peak window, or since `since_ns` if that is later."""
        at = self._tables.device(row)
        oldest = time.monotonic_ns() - to_ns(self._actor.settings.peak_window_seconds)
        ring = at + Device.RING
        end = ring + 2 * Device.RING_LENGTH
        # Copies, because without the lock the rows may change meanwhile.
        times = np.array(self._segment.words[ring:end:2])
        figures = np.array(self._segment.floats[ring + 1 : end : 2])
        recent = figures[(times >= max(oldest, since_ns)) & (times > 0)]
        return float(recent.max()) if len(recent) else self._segment.floats[at + Device.USED_MB]
