"""The board in shared memory: the leader puts samples on it, everybody reads it (see `mpmm.gpu_monitor`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from mpmm.scheduler import Scheduler
from mpmm.shared_state.layout import Device, Header, Member
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.tables import fit_text
from mpmm.sources import DeviceInfo, DeviceSample, MemorySource, is_books_only

__all__ = ["ForeignMonitor", "MonitorLike", "SharedBoard"]


class MonitorLike(Protocol):
    """What a monitor of the caller's own must offer to take the place of `GPUMonitor`; the same as for Beam."""

    def start(self) -> None:
        """Begin to measure."""

    def stop(self) -> None:
        """End it."""

    def refresh(self) -> None:
        """Measure now."""

    def reset_peak(self) -> None:
        """Let the peak begin anew at the present figure."""

    def get_stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) in MB."""


class SharedBoard:
    """A `SampleBoard` on a namespace's device rows. Each method is one transaction."""

    def __init__(self, namespace: Namespace, scheduler: Scheduler) -> None:
        self._namespace = namespace
        self._scheduler = scheduler
        self._rows: dict[int, int] = {}

    def describe(self, source: MemorySource, devices: Sequence[DeviceInfo], lead: bool) -> None:
        """Set the device rows from what a source reports; with `lead`, also say that this member polls now."""
        namespace = self._namespace
        with namespace.transaction() as t:
            namespace.transitions.describe_devices(
                t,
                [
                    (fit_text(info.uuid, Device.UUID_BYTES), fit_text(info.name, Device.NAME_BYTES), info.total_mb)
                    for info in devices
                ],
            )
            if lead:
                flags = (source.measures_processes, source.settles_late, is_books_only(source))
                name = fit_text(source.name, Header.SOURCE_NAME_BYTES)
                namespace.transitions.lead(t, namespace.slot, name, flags)
        self._rows = {info.index: row for row, info in enumerate(devices)}

    def publish(self, samples: Sequence[DeviceSample]) -> None:
        """Record figures that could be read, and let waiters profit from them."""
        namespace = self._namespace
        words = namespace.segment.words
        measured: dict[int, float] = {}
        with namespace.transaction() as t:
            for sample in samples:
                row = self._rows.get(sample.index)
                fresh = row is None or sample.used_mb is None
                if row is not None and sample.used_mb is not None:
                    fresh = namespace.transitions.sample(t, row, sample.used_mb, sample.taken_ns)
                if fresh:
                    # A process's part must come from the same sample as the whole: what a loading server takes is
                    # subtracted from its reservation because the device's figure has it.
                    measured.update(sample.process_mb)
            if measured:
                for slot in self._servers():
                    pid = words[namespace.tables.member(slot) + Member.PID]
                    if pid in measured:
                        namespace.transitions.measure(t, slot, measured[pid])
            self._scheduler.advance(t)

    def stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) in MB, summed over the devices."""
        namespace = self._namespace
        floats = namespace.segment.floats
        with namespace.transaction():
            rows = namespace.tables.used_rows(namespace.segment.layout.devices)
            copies = self._scheduler.read_copies()
            used = [self._scheduler.used_mb(row, copies) for row in rows]
            peaks = [floats[namespace.tables.device(row) + Device.PEAK_MB] for row in rows]
            total = sum(floats[namespace.tables.device(row) + Device.TOTAL_MB] for row in rows)
        return sum(used), sum(map(max, used, peaks)), total

    def reset_peak(self) -> None:
        """Let the peaks begin anew at the present figures."""
        with self._namespace.transaction() as t:
            self._namespace.transitions.reset_peaks(t)

    def server_pids(self) -> Sequence[int]:
        """Return the pids of the namespace's model servers; read without the lock, as a server may end any time."""
        namespace = self._namespace
        return [namespace.segment.words[namespace.tables.member(slot) + Member.PID] for slot in self._servers()]

    def _servers(self) -> list[int]:
        namespace = self._namespace
        return namespace.tables.rows_where(namespace.segment.layout.members, Member.STATE, Member.SERVER)


class ForeignMonitor:
    """A monitor of the caller's own, used as the source of one device."""

    name = "monitor"
    measures_processes = False
    settles_late = False
    cheap = True

    def __init__(self, monitor: MonitorLike) -> None:
        self.monitor = monitor

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the one device that a monitor stands for."""
        return (DeviceInfo(0, "monitor", type(self.monitor).__name__, self.monitor.get_stats()[2]),)

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Ask the monitor."""
        taken = time.monotonic_ns()
        self.monitor.refresh()
        return (DeviceSample(0, self.monitor.get_stats()[0], taken, {}),)

    def close(self) -> None:
        """Nothing: the caller's monitor is stopped by the manager it was given to."""
