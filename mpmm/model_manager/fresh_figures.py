"""Fresh memory figures for the decisions of one process, and what its loads add to the memory in use.

The elected leader samples for all processes every `poll_interval`. Where that is not often enough, a process takes a
sample of its own: before it queues, after a load or an unload, and around a model that runs alone to be measured.
"""

from __future__ import annotations

import math
import time

from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MonitorSource
from mpmm.memory.samples import SharedSamples
from mpmm.model_manager.deferred import NOW_S
from mpmm.shared_state.layout import Instance
from mpmm.shared_state.namespace import Namespace
from mpmm.sources import DeviceInfo, MemorySource, process_knowledge

__all__ = ["FreshFigures", "Growth"]

# How long a decision waits for figures that would only improve it. NVML takes a millisecond.
ENSURE_FRESH_TIMEOUT_S = 0.25
# How long a load or a release waits to be measured. nvidia-smi takes 0.3 s, and may have to run twice, because a sample
# in progress has begun too early.
SAMPLE_TIMEOUT_S = 1.0
# A sample of this age is as good as a new one for the next process that asks. The second holds for a request that
# queues behind others, because each of their loads and unloads brings a new sample.
FRESH_NS = 20_000_000
FRESH_BEHIND_OTHERS_NS = 200_000_000


class FreshFigures:
    """One process's way to fresh figures. Its methods take no lock unless they say so."""

    def __init__(self, namespace: Namespace, monitor: GPUMonitor, samples: SharedSamples) -> None:
        self._namespace = namespace
        self._monitor = monitor
        self.samples = samples

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the devices of the source; raises as `GPUMonitor.devices` does."""
        return self._monitor.devices()

    @property
    def source(self) -> MemorySource:
        """Where this process would read memory figures, as the leader or for a decision of its own."""
        return self._monitor.source

    @property
    def given_source(self) -> MonitorSource | None:
        """The caller's own monitor that takes the place of the source, if one was given."""
        source = self.source
        return source if isinstance(source, MonitorSource) else None

    def sample_source(self, timeout_s: float | None = None) -> bool:
        """Wait for a sample that begins after this call, and for its publication; return whether that has happened.

        timeout_s: the longest wait; None stands for `SAMPLE_TIMEOUT_S`, which no wait exceeds. The time that the sample
            in progress has already taken is subtracted, so that no caller waits for a source that is known to hang.
        """
        limit_s = SAMPLE_TIMEOUT_S if timeout_s is None else min(timeout_s, SAMPLE_TIMEOUT_S)
        return self._monitor.refresh(timeout_s=limit_s - self._monitor.sampling_for_s)

    def request_sample(self) -> None:
        """Have a sample taken and published as soon as possible, without waiting for it.

        A sample that has been requested and has not begun serves this call, too.
        """
        if not self._namespace.tables.header.source_accounting_only:
            self._monitor.request_refresh()

    def ensure_fresh_to_queue(self, timeout_s: float) -> None:
        """Like `ensure_fresh`, for a request that is about to queue."""
        waiting = self._namespace.tables.header.waiting
        self.ensure_fresh(timeout_s, FRESH_BEHIND_OTHERS_NS if waiting else FRESH_NS)

    def ensure_fresh(self, timeout_s: float | None = None, age_ns: int = FRESH_NS) -> None:
        """Make sure that decisions rest on fresh figures, as far as that takes no noticeable time.

        Processes that ask at the same moment share one sample; but a monitor of the caller's own is always asked. If
        the sample does not come within `timeout_s`, or `ENSURE_FRESH_TIMEOUT_S`, the old figures are used.

        age_ns: figures up to this age are fresh.
        """
        if self.source.cheap and (self.given_source is not None or not self._are_fresh(age_ns)):
            self.sample(ENSURE_FRESH_TIMEOUT_S if timeout_s is None else min(timeout_s, ENSURE_FRESH_TIMEOUT_S))

    def _are_fresh(self, age_ns: int = FRESH_NS) -> bool:
        oldest, tables = time.monotonic_ns() - age_ns, self._namespace.tables
        devices = (tables.devices[row] for row in self.samples.rows())
        return all(device.sampled >= max(oldest, device.configured_at) for device in devices)

    def sample_after_load(self, row: int) -> bool:
        """Take a sample after a load if the source is quick, or measures single processes.

        Return whether the copy's devices now have figures from after the load; a source may fail.
        """
        if not (self.source.cheap or self.source.measures_processes):
            return False
        loaded = time.monotonic_ns()
        self.sample()
        tables = self._namespace.tables
        return all(tables.devices[device].sampled >= loaded for device in tables.instances[row].devices)

    def sample(self, timeout_s: float | None = None) -> None:
        """Wait for a new sample, unless there is nothing to measure; see `sample_source`."""
        if not self._namespace.tables.header.source_accounting_only:
            self.sample_source(timeout_s)

    def reset_peak(self) -> None:
        """Reset the peak of a monitor of the caller's own; do not wait long for one that hangs."""
        given = self.given_source
        if given is not None:
            self._monitor.call(given.ask_for_reset(), ENSURE_FRESH_TIMEOUT_S - self._monitor.sampling_for_s)

    def added_mb(self, row: int) -> tuple[float, ...] | None:
        """Return what the copy that runs alone has added to the memory in use, at its peak, on each of its devices.

        None if that is unknown, because one of them could not be read before or since the load.
        """
        tables, given = self._namespace.tables, self.given_source
        seen_mb = 0.0 if given is None else given.peak_mb
        added = []
        with self._namespace.transaction():
            copy = tables.instances[row]
            for device in (tables.devices[device] for device in copy.devices):
                if math.isnan(device.baseline_mb) or device.sampled < copy.loaded_at:
                    return None
                added.append(max(0.0, max(device.used_mb, device.peak_mb, seen_mb) - device.baseline_mb))
        return tuple(added)

    def measuring_growth(self) -> Growth:
        """Begin to measure what a load adds to the memory of this process, unless that would hold the load up."""
        may_measure = process_knowledge(self.source) is not False
        if may_measure:
            self.ensure_fresh(NOW_S)
        return Growth(self, self._namespace, may_measure and self._are_fresh())

    def measured_shares(self, row: int, server: int) -> tuple[float, ...]:
        """Return the measured memory of a server (reference) on each of a copy's devices; empty if there is none.

        Needs the lock.
        """
        tables = self._namespace.tables
        if not server or server == self._namespace.reference:
            return ()
        if math.isnan(tables.members[server - 1].measured_mb):
            return ()
        return tables.server_shares_mb(server - 1, len(tables.instances[row].devices))

    def own_mb(self) -> float:
        """Return the device memory of this process in the last sample, nan if that is unknown.

        0 if no sample has ever shown any.
        """
        member = self._namespace.tables.members[self._namespace.slot]
        return member.measured_mb if member.peak_mb > 0 else 0.0

    def stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) in MB; a monitor of the caller's own may have seen a higher peak."""
        current, peak, total = self.samples.stats()
        given = self.given_source
        if given is not None:
            peak = max(peak, given.peak_mb)
        return current, peak, total


class Growth:
    """What a load adds to this process's device memory, if nothing else in the process can change it meanwhile."""

    def __init__(self, figures: FreshFigures, namespace: Namespace, measures: bool) -> None:
        """Begin. measures: the last sample is fresh, and its source measures processes, or may turn out to."""
        self._figures = figures
        self._namespace = namespace
        self._measures = measures
        self._before_mb = figures.own_mb() if self._measures else 0.0
        self._before = self._state() if self._measures else None

    def mb(self) -> float:
        """Return how much more it is in the last sample, 0 if that is not known.

        If the source shows this process only now, the process had no device memory before.
        """
        knows = self._namespace.tables.header.source_measures_processes
        if not self._measures or not knows or self._state() != self._before:
            return 0.0
        grown_mb = self._figures.own_mb() - self._before_mb
        # A sample before or after the load may not have told; the difference to another one would be anything.
        return 0.0 if math.isnan(grown_mb) else max(0.0, grown_mb)

    def _state(self) -> list[tuple[int, int]]:
        """Return the copies that this process loads, owns or unloads, by row and generation.

        Takes no lock, because a load should not wait for it, and only this process makes and frees these rows.
        """
        namespace = self._namespace
        tables, layout = namespace.tables, namespace.segment.layout
        rows = tables.rows_where(layout.instances, Instance.OWNER, namespace.reference)
        rows += tables.rows_where(layout.instances, Instance.HOLDER, namespace.reference)
        loading = [row for row in rows if tables.instances[row].state != Instance.ACTIVE]
        owned = [row for row in rows if tables.instances[row].owner is not None]
        return sorted({(row, tables.instances[row].generation) for row in (*loading, *owned)})
