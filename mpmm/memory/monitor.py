"""GPUMonitor: takes memory samples and publishes them to a store, from which all callers read.

            source (measures)          GPUMonitor                      store (keeps)
    NVML, nvidia-smi, host memory  ->  a `Sampler`: sample, publish ->  last figures, peak, totals
                                       get_stats()                  <-

A thread of its own takes the samples. `refresh` waits for it, `request_refresh` does not. A source that hangs in its
driver holds up only that thread; meanwhile the last figures stay, and grow old.

A monitor without a manager keeps its samples in `LocalSamples`, and another thread requests one every `poll_interval`.
A ModelManager binds the monitor to `SharedSamples`, in shared memory: then one process of the host polls, and the
monitor does not poll by itself. All figures are in MB (see `mpmm.sources.base`).
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from mpmm.errors import ClosedError, InvalidArgumentError, LockTimeoutError
from mpmm.interpreter.fork_hooks import ChildStep, in_forked_child
from mpmm.interpreter.latch import Latch
from mpmm.interpreter.thread_locks import new_lock
from mpmm.interpreter.thread_starts import start_thread
from mpmm.memory.sampler import Sampler
from mpmm.sources import DeviceInfo, DeviceSample, MemorySource, choose_source, is_accounting_only, process_knowledge
from mpmm.sources.base import START_TIMEOUT_S, unavailable
from mpmm.sources.timeouts import answer_within
from mpmm.text.arguments import checked_number, in_brief
from mpmm.text.printable import printable_logger

__all__ = ["GPUMonitor", "LocalSamples", "SampleStore"]

logger = printable_logger(__name__)
# More than nvidia-smi takes on a host whose driver is not kept loaded.
REFRESH_TIMEOUT_S = 5.0
# Shared samples have a lock. Figures that cannot be published in this time are dropped: there will be newer ones.
PUBLISH_TIMEOUT_S = 1.0
# Closing a source is a courtesy to the driver; the end of the process does as much.
CLOSE_TIMEOUT_S = 1.0


class SampleStore(Protocol):
    """Where samples are kept. Its methods are called by several threads."""

    def publish(self, samples: Sequence[DeviceSample], timeout_s: float | None = None) -> None:
        """Take in one sample of each device. One that could not be read leaves the last figure in place.

        Raises LockTimeoutError if figures are shared and their lock was not free for `timeout_s`.
        """
        ...

    def stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) MB, summed over devices."""
        ...

    def reset_peak(self) -> None:
        """Restart the peak at the current figure."""
        ...

    def server_pids(self) -> Sequence[int]:
        """Return the processes whose memory counts, for sources that add up processes."""
        ...


class LocalSamples:
    """The samples of a monitor without a manager; Beam's monitor calls the fields `_current_usage` and so on."""

    def __init__(self, total_mb: float, peak_window_seconds: float) -> None:
        """Start with nothing known: `current_mb` is 0 until the first figure arrives."""
        self.lock = new_lock()
        self.current_mb = 0.0
        self.peak_mb = 0.0
        self.total_mb = total_mb
        self.history: deque[tuple[float, float]] = deque()  # (time.monotonic(), sum over devices in MB)
        self._peak_window_s = peak_window_seconds
        self._last: dict[int, tuple[int, float]] = {}  # device index: (taken_ns, used_mb)

    def publish(self, samples: Sequence[DeviceSample], timeout_s: float | None = None) -> None:
        """Add the figures that are newer than the kept ones, and their sum to the history."""
        with self.lock:
            fresh = {
                sample.index: (sample.taken_ns, sample.used_mb)
                for sample in samples
                if sample.used_mb is not None and sample.taken_ns >= self._last.get(sample.index, (0, 0.0))[0]
            }
            if not fresh:
                return
            self._last.update(fresh)
            self.current_mb = sum(used_mb for _, used_mb in self._last.values())
            now_s = max(taken_ns for taken_ns, _ in fresh.values()) / 1e9
            self.history.append((now_s, self.current_mb))
            self._drop_before(now_s - self._peak_window_s)
            self.peak_mb = max(used_mb for _, used_mb in self.history)

    def _drop_before(self, since_s: float) -> None:
        # A function of its own: Python 3.13 compiles the jump back of such a loop as if it stood outside the block that
        # has the lock, so an exception from a signal handler would leave the lock taken.
        while self.history[0][0] < since_s:
            self.history.popleft()

    def stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) MB."""
        with self.lock:
            return self.current_mb, self.peak_mb, self.total_mb

    def reset_peak(self) -> None:
        """Forget the history except for the current figure."""
        with self.lock:
            self.history.clear()
            self.history.append((time.monotonic(), self.current_mb))
            self.peak_mb = self.current_mb

    def server_pids(self) -> Sequence[int]:
        """Return this process alone: without a manager it holds the models itself."""
        return (os.getpid(),)


class _BeamAttributes:
    """The attributes of Beam's monitor; here the local samples have their values."""

    _local: LocalSamples
    _thread: threading.Thread | None

    @property
    def _lock(self) -> threading.Lock:
        return self._local.lock

    @property
    def _current_usage(self) -> float:
        return self._local.current_mb

    @_current_usage.setter
    def _current_usage(self, used_mb: float) -> None:
        self._local.current_mb = used_mb

    @property
    def _peak_usage(self) -> float:
        return self._local.peak_mb

    @_peak_usage.setter
    def _peak_usage(self, used_mb: float) -> None:
        self._local.peak_mb = used_mb

    @property
    def _total_memory(self) -> float:
        return self._local.total_mb

    @_total_memory.setter
    def _total_memory(self, total_mb: float) -> None:
        self._local.total_mb = total_mb

    @property
    def _memory_history(self) -> deque[tuple[float, float]]:
        return self._local.history

    @property
    def _running(self) -> bool:
        return self._thread is not None


class GPUMonitor(_BeamAttributes):
    """Current and peak memory use over a sliding window, as in Beam, on any `MemorySource`."""

    def __init__(
        self,
        fallback_memory_mb: float = 16000.0,
        poll_interval: float = 0.5,
        peak_window_seconds: float = 30.0,
        *,
        source: str | MemorySource = "auto",
        budget_mb: float | None = None,
    ) -> None:
        """Describe a monitor; nothing is measured or started yet.

        fallback_memory_mb: total memory if there is nothing to measure.
        poll_interval, peak_window_seconds: seconds between samples, and how long a peak counts.
        source, budget_mb: see `mpmm.sources.choose_source`; resolved at `start`, or at first use.
        Raises InvalidArgumentError for a number that is not finite or too small.
        """
        self._fallback_memory_mb = checked_number(
            "fallback_memory_mb", fallback_memory_mb, 0.0, math.inf, "MB", above=True, finite=True
        )
        # At most as long as a thread can wait.
        self._poll_interval = checked_number(
            "poll_interval", poll_interval, 0.0, threading.TIMEOUT_MAX, "seconds", above=True
        )
        self._peak_window_seconds = checked_number(
            "peak_window_seconds", peak_window_seconds, 0.0, math.inf, "seconds", finite=True
        )
        if budget_mb is not None:
            budget_mb = checked_number("budget_mb", budget_mb, 0.0, math.inf, "MB", above=True)
        if not isinstance(source, str | MemorySource):
            raise InvalidArgumentError(f"source={in_brief(source)}: expected a name or a MemorySource")
        self._wanted_source = source
        self._budget_mb = budget_mb
        self._source: MemorySource | None = source if isinstance(source, MemorySource) else None
        self._devices: tuple[DeviceInfo, ...] | None = None  # of the source, once they were asked for
        self._local = LocalSamples(self._fallback_memory_mb, self._peak_window_seconds)
        self._store: SampleStore = self._local
        self._gpu_available = False
        self._read_ns: dict[int, int] = {}  # device index: taken_ns of the last figure; replaced, never changed
        self._failing: frozenset[int] = frozenset()
        self._knew_processes: bool | None = False  # see `process_knowledge`; False: no warning if it never does
        self._missed_processes = False  # the warning was given
        self._after_sample: Callable[[], object] | None = None
        self._sampler = Sampler(self._sample, "mpmm-sampler")
        self._renew_threading()
        _monitors.add(self)

    def _renew_threading(self) -> None:
        """Set up new locks and no thread: at the start, and in a forked child, which has no thread and may
        have inherited locks that no thread will ever release."""
        self._local.lock = new_lock()
        self._sampler.renew()
        self._source_lock = new_lock()  # guards resolving the source
        self._store_lock = new_lock()  # held while the sampling thread calls a store
        self._control_lock = new_lock()  # guards start, stop and bind; taken before the others
        self._thread = None
        self._stop = Latch()

    @property
    def source(self) -> MemorySource:
        """The source in use. Raises SourceUnavailableError, InvalidArgumentError as `choose_source` does."""
        return self._resolve()[0]

    @property
    def fallback_memory_mb(self) -> float:
        """The total if there is nothing to measure, in MB."""
        return self._fallback_memory_mb

    @property
    def poll_interval(self) -> float:
        """The time between two samples, in seconds."""
        return self._poll_interval

    @property
    def peak_window_seconds(self) -> float:
        """How long a peak counts, in seconds."""
        return self._peak_window_seconds

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the devices of the source, which is asked for them once. Raises as `source` does.

        Raises SourceUnavailableError, too, if the source does not answer.
        """
        return self._resolve()[1]

    def _resolve(self) -> tuple[MemorySource, tuple[DeviceInfo, ...]]:
        source, devices = self._source, self._devices
        if source is not None and devices is not None:
            return source, devices
        with self._source_lock:
            source = self._source
            if source is None:
                source = self._source = choose_source(
                    self._wanted_source,
                    fallback_memory_mb=self._fallback_memory_mb,
                    budget_mb=self._budget_mb,
                    logger=logger,
                )
            try:
                devices = answer_within(source.devices, START_TIMEOUT_S, "mpmm-devices")
            except TimeoutError as error:
                raise unavailable(source.name, f"its devices: {error}") from error
            self._devices = devices
            self._gpu_available = not is_accounting_only(source)
        with self._local.lock:
            self._local.total_mb = sum(device.total_mb for device in devices)
        return source, devices

    def bind(self, store: SampleStore | None, after_sample: Callable[[], object] | None = None) -> None:
        """Read from and publish to `store` from now on; None goes back to the monitor's own samples.

        Ends the polling thread: if samples are shared, one process polls for the whole host. After the return, nothing
        is published to the earlier store any more, not even by a sample in progress.

        after_sample: called by the sampling thread after each sample.
        """
        with self._control_lock:
            self._end_thread()
            with self._store_lock:
                self._store = self._local if store is None else store
                self._after_sample = after_sample

    def start(self) -> None:
        """Take a first sample and start polling, unless it polls already, or the leader polls for a shared store.

        Raises SourceUnavailableError if a source that was asked for by name cannot work here.
        """
        with self._control_lock:
            source = self.source
            if self._store is not self._local or self._thread is not None or is_accounting_only(source):
                return
            self.refresh(timeout_s=REFRESH_TIMEOUT_S)
            self._stop = Latch()
            self._thread = threading.Thread(
                target=self._poll_loop, args=(self._stop,), name="mpmm-gpu-monitor", daemon=True
            )
            start_thread(self._thread)

    def stop(self) -> None:
        """End the polling thread, wait for it, and close the source; the last figures stay readable.

        Does not wait for a source that hangs: that is closed when it returns.
        """
        with self._control_lock:
            self._end_thread()
            with self._source_lock:
                # Not a source that somebody else has made.
                if self._source is not self._wanted_source:
                    self.close_source()
                    self._source = self._devices = None
            self._sampler.end()

    def close_source(self) -> None:
        """Close the source, if it was ever used, after the sample in progress; wait for that for a moment only."""
        if self._source is not None:
            self._sampler.call(self._source.close, CLOSE_TIMEOUT_S)
            self._sampler.end()

    def reset_peak(self) -> None:
        """Restart the peak at the current figure."""
        self._store.reset_peak()

    def get_stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) MB, summed over devices.

        A device that was not read yet does not count in current and peak: see `last_sample_age_seconds`.
        """
        return self._store.stats()

    def refresh(self, *, timeout_s: float = REFRESH_TIMEOUT_S) -> bool:
        """Wait up to `timeout_s` for a sample that begins after this call, and for its publication.

        Return whether it has ended by then. A source that fails leaves the last figures in place; so does one that has
        not answered, but its figures are published when it does. Raises as `source` does.
        """
        self._resolve()
        return self._sampler.sample(timeout_s)

    def request_refresh(self) -> None:
        """Request a sample as soon as possible, and do not wait for it.

        A sample that is already requested and has not begun serves this call, too. Raises as `source` does.
        """
        self._resolve()
        self._sampler.request()

    def call(self, job: Callable[[], object], timeout_s: float) -> None:
        """Have the sampling thread call `job`, never during a sample, and wait up to `timeout_s` for that."""
        self._sampler.call(job, timeout_s)

    @property
    def sampling_for_s(self) -> float:
        """How long ago the sample in progress began, in seconds; 0 if there is none."""
        return self._sampler.busy_s

    def last_sample_age_seconds(self) -> float:
        """Return the age of the oldest device figure that this process took; infinite while one is missing."""
        source = self._source
        read_ns = self._read_ns
        if not read_ns:
            return math.inf
        indexes = read_ns.keys() if source is None else [device.index for device in self.devices()]
        if any(index not in read_ns for index in indexes):
            return math.inf
        return (time.monotonic_ns() - min(read_ns[index] for index in indexes)) / 1e9

    def _sample(self) -> None:
        """Take a sample and publish it; called by the sampling thread."""
        store = self._store
        # Not to a store that `bind` has replaced meanwhile: its memory may be gone.
        with self._store_lock:
            if store is not self._store:
                return
            pids = store.server_pids()
        samples = self._take_sample(pids)
        with self._store_lock:
            if store is not self._store:
                return
            with contextlib.suppress(LockTimeoutError, ClosedError):
                store.publish(samples, PUBLISH_TIMEOUT_S)
            if self._after_sample is not None:
                self._after_sample()

    def _take_sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Return one sample of each device, without a figure for those that cannot be read."""
        source, devices = self._resolve()
        taken_ns = time.monotonic_ns()
        try:
            samples = tuple(source.sample(server_pids))
            reason = "; ".join(dict.fromkeys(sample.trouble for sample in samples if sample.trouble))
        except Exception as error:  # a source is a driver or a program: any failure is 'not read', none ends polling
            reason = repr(error)
            done_ns = time.monotonic_ns()
            samples = tuple(DeviceSample(device.index, None, taken_ns, done_ns=done_ns) for device in devices)
        self._read_ns = self._read_ns | {
            sample.index: sample.taken_ns for sample in samples if sample.used_mb is not None
        }
        if not is_accounting_only(source):
            failing = frozenset(sample.index for sample in samples if sample.used_mb is None)
            self._log_change(failing, source, reason or "no figure")
        return samples

    def _log_change(self, failing: frozenset[int], source: MemorySource, reason: str) -> None:
        """Log what can no longer be measured, or can be again: once per change, not once per poll."""
        before, self._failing = self._failing, failing
        if failing - before:
            logger.warning(
                "%s cannot read device(s) %s (%s): keeping the last figure", source.name, sorted(failing), reason
            )
        elif before - failing:
            logger.info("%s reads device(s) %s again", source.name, sorted(before - failing))
        knows, knew = process_knowledge(source), self._knew_processes
        self._knew_processes = knows
        if knows is False and knew is not False and not self._missed_processes:
            self._missed_processes = True
            logger.warning(
                "%s cannot measure single processes: the driver withholds their memory, or reports the pids of another "
                "pid namespace",
                source.name,
            )
        elif knows and self._missed_processes:
            self._missed_processes = False
            logger.info("%s measures single processes", source.name)

    def _poll_loop(self, stop: Latch) -> None:
        while not stop.wait(self._poll_interval):
            # Without waiting for the sample: `_end_thread` would have to wait, too.
            self._sampler.request()

    def _end_thread(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


_monitors: weakref.WeakSet[GPUMonitor] = weakref.WeakSet()


def _renew_after_fork() -> None:
    for monitor in list(_monitors):
        monitor._renew_threading()


in_forked_child(_renew_after_fork, ChildStep.MONITOR)
