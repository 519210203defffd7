"""Device rows: which devices there are, and the last figures of each. `ledgers` says what the figures are made of."""

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
        """Give each of the devices, (uuid, name, total MB), a row; return the rows. Figures of one that stays are kept.

        replace: rows of other devices are freed; else they stay, because other processes may see other devices.
        measured: the caller's source can measure them. Then one that has only been stated so far, and has copies that
            must really lie on one of these, stays for those copies and takes no further ones.
        Raises TableFullError when there are more devices than rows.
        """
        table = self._layout.devices
        there = {
            self._tables.text(self._tables.device(row) + Device.UUID): row for row in self._tables.used_rows(table)
        }
        if replace:
            self._free_others(t, there, {uuid for uuid, _, _ in devices}, measured)
        # A device that stays keeps its row, because instances and tickets name it by the bit of that.
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
                # Figures of the device that had the row before: they would count for the peak of this one.
                times = range(at + Device.RING, at + Device.RING + 2 * Device.RING_LENGTH, 2)
                t.set_all([(entry, 0) for entry in times if self._segment.words[entry]])
                t.set_text(at + Device.UUID, uuid)
                # Both texts, since only the words before them are cleared: the row may have been another device's.
                t.set_text(at + Device.NAME, name)
                # Unknown, which is not 0: nobody may load into memory that no figure has shown to be free.
                t.set_float(at + Device.EXTERNAL_MB, math.nan)
                t.set_float(at + Device.EXTERNAL_LEAST_MB, math.nan)
                t.set(at + Device.CONFIGURED_AT, t.now)
                t.set(at + Device.STATE, 1)
            # Each time, not just for new ones: a partition may have been made larger, or be measured from now on.
            t.set_float(at + Device.TOTAL_MB, total_mb)
            t.set(at + Device.MEASURED, int(measured))
        return [there[uuid] for uuid, _, _ in devices]

    def _free_others(self, t: Transaction, there: dict[bytes, int], wanted: set[bytes], measured: bool) -> None:
        """Free the rows of devices that are not wanted, and take them out of `there`, unless something lies on them."""
        for uuid, row in list(there.items()):
            if uuid in wanted:
                continue
            if not self._is_in_use(row):
                t.set(self._tables.device(row) + Device.STATE, 0)
                del there[uuid]
            elif measured and self._is_only_stated(row):
                t.set_float(self._tables.device(row) + Device.TOTAL_MB, 0.0)

    def forget_stated(self, t: Transaction, row: int) -> None:
        """Free the row of a device without a total, once nothing lies there any more; see `describe`."""
        if self._is_only_stated(row) and not self._is_in_use(row):
            t.set(self._tables.device(row) + Device.STATE, 0)

    def _is_only_stated(self, device: int) -> bool:
        return not self._segment.words[self._tables.device(device) + Device.MEASURED]

    def _is_in_use(self, device: int) -> bool:
        return bool(self._tables.on_device(device))

    def note_try(self, t: Transaction, row: int, taken_ns: int) -> None:
        """Record that somebody has tried to take a figure of a device."""
        # Also if no figure came of it: processes that would stand in go by this, and not each of them is to try a
        # source that hangs.
        t.set(self._tables.device(row) + Device.TRIED, taken_ns)

    def note_unrelated(self, t: Transaction, row: int, mb: float) -> None:
        """Record what processes that are not the namespace's take of a device; to be called before `sample`."""
        t.set_float(self._tables.device(row) + Device.UNRELATED_MB, mb)

    def is_news(self, row: int, taken_ns: int) -> bool:
        """Tell whether a sample that was begun at `taken_ns` is later than what is known of a device."""
        return taken_ns >= self._segment.words[self._tables.device(row) + Device.SAMPLED]

    def sample(self, t: Transaction, row: int, used_mb: float, taken_ns: int, done_ns: int = 0) -> bool:
        """Record a device's figure that was asked for at `taken_ns`; return False if it is too old to say anything.

        To be called after `Measurements.measure` for the processes of the same sample.
        done_ns: when the figure was there, 0 for now.
        """
        # SAMPLED never decreases (D1): an older figure that comes late would show memory as free that is taken by now.
        if not self.is_news(row, taken_ns):
            return False
        floats = self._segment.floats
        at = self._tables.device(row)
        # `Ledgers.expect_back` notes this figure with each unload from here on: how far the next one is below it is
        # what came back.
        t.set_float(at + Device.USED_MB, used_mb)
        t.set(at + Device.SAMPLED, taken_ns)
        slot = self._segment.words[at + Device.RING_NEXT]
        # A ring of (time, figure): the newest takes the place of the oldest, and a time of 0 was never written.
        entry = at + Device.RING + 2 * slot
        t.set(entry, taken_ns)
        t.set_float(entry + 1, used_mb)
        t.set(at + Device.RING_NEXT, (slot + 1) % Device.RING_LENGTH)
        # After the ring has the figure, because the peak is looked up there.
        t.set_float(at + Device.PEAK_MB, self.peak_since(row, self._segment.words[at + Device.PEAK_RESET]))
        # It outlives both the ring, which is short, and `reset_peaks`.
        if used_mb > floats[at + Device.HIGHEST_MB]:
            t.set_float(at + Device.HIGHEST_MB, used_mb)
        self._ledgers.settle(t, row, Figure(used_mb, taken_ns, done_ns or t.now, floats[at + Device.UNRELATED_MB]))
        return True

    def reset_peaks(self, t: Transaction, devices: int | None = None) -> None:
        """Let the peaks of these devices (bits), or of all, begin anew at the present figures."""
        now = t.now
        for row in self._tables.used_rows(self._layout.devices) if devices is None else device_rows(devices):
            at = self._tables.device(row)
            t.set(at + Device.PEAK_RESET, now)
            # Not 0, although the peak begins anew: what is in use now is part of it, and the next sample may be a while
            # away.
            t.set_float(at + Device.PEAK_MB, self._segment.floats[at + Device.USED_MB])

    def peak_since(self, row: int, since_ns: int) -> float:
        """Return the highest figure of a device in the window, or since `since_ns` if that is later."""
        at = self._tables.device(row)
        oldest = time.monotonic_ns() - to_ns(self._actor.settings.peak_window_seconds)
        ring = at + Device.RING
        end = ring + 2 * Device.RING_LENGTH
        # Copies, because the rows may change under a caller that has no lock.
        times = np.array(self._segment.words[ring:end:2])
        figures = np.array(self._segment.floats[ring + 1 : end : 2])
        recent = figures[(times >= max(oldest, since_ns)) & (times > 0)]
        return float(recent.max()) if len(recent) else self._segment.floats[at + Device.USED_MB]
