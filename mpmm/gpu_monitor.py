"""GPUMonitor: takes memory samples and puts them on a board, from which everybody reads.

            source (measures)          GPUMonitor                    board (keeps)
    NVML, nvidia-smi, host memory  ->  refresh(): sample, publish ->  last figures, peak, totals
                                       get_stats()                <-

Alone in a process the board is a `LocalBoard` and a thread of the monitor's own polls. A ModelManager
binds the monitor to a board in shared memory: there one process of the host polls, through `refresh`,
and the monitor starts no thread. All figures are in MB (see `mpmm.sources.base`).
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from mpmm.errors import InvalidArgumentError
from mpmm.sources import DeviceSample, MemorySource, choose_source, is_books_only

__all__ = ["GPUMonitor", "LocalBoard", "SampleBoard"]

logger = logging.getLogger(__name__)


class SampleBoard(Protocol):
    """Where samples are kept. Its methods are called by several threads."""

    def publish(self, samples: Sequence[DeviceSample], patience_s: float | None = None) -> None:
        """Take in one sample of each device. One that could not be read leaves the last figure in place.

        Raises LockTimeoutError where figures are shared and their lock was not free for `patience_s`.
        """
        ...

    def stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) MB, summed over devices."""
        ...

    def reset_peak(self) -> None:
        """Let the peak start anew from the current figure."""
        ...

    def server_pids(self) -> Sequence[int]:
        """Return the processes whose memory counts, for sources that add up processes."""
        ...


class LocalBoard:
    """The board of a monitor that is alone: its fields are what Beam's monitor calls `_current_usage` and so on."""

    def __init__(self, total_mb: float, peak_window_seconds: float) -> None:
        """Start with nothing known: `current_mb` is 0 until the first figure arrives."""
        self.lock = threading.Lock()
        self.current_mb = 0.0
        self.peak_mb = 0.0
        self.total_mb = total_mb
        self.history: deque[tuple[float, float]] = deque()  # (time.monotonic(), sum over devices in MB)
        self._peak_window_s = peak_window_seconds
        self._last: dict[int, tuple[int, float]] = {}  # device index: (taken_ns, used_mb)

    def publish(self, samples: Sequence[DeviceSample], patience_s: float | None = None) -> None:
        """Add the figures that are newer than what the board has; the sum goes into the history."""
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
            while now_s - self.history[0][0] > self._peak_window_s:
                self.history.popleft()
            self.peak_mb = max(used_mb for _, used_mb in self.history)

    def stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) MB."""
        with self.lock:
            return self.current_mb, self.peak_mb, self.total_mb

    def reset_peak(self) -> None:
        """Forget the history but for the current figure."""
        with self.lock:
            self.history.clear()
            self.history.append((time.monotonic(), self.current_mb))
            self.peak_mb = self.current_mb

    def server_pids(self) -> Sequence[int]:
        """Return this process alone: without a manager it is the one that holds the models."""
        return (os.getpid(),)


class GPUMonitor:
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

        fallback_memory_mb: total memory where there is nothing to measure.
        poll_interval, peak_window_seconds: seconds between samples, and how long a peak counts.
        source, budget_mb: see `mpmm.sources.choose_source`; resolved at `start`, or at first use.
        Raises InvalidArgumentError for a number that is not finite or too small.
        """
        for name, value, least in (
            ("fallback_memory_mb", fallback_memory_mb, "above 0"),
            ("poll_interval", poll_interval, "above 0"),
            ("peak_window_seconds", peak_window_seconds, "0 or more"),
        ):
            if not math.isfinite(value) or value < 0 or (value == 0 and least == "above 0"):
                raise InvalidArgumentError(f"{name} is {value!r}: expected a finite number, {least}")
        self._fallback_memory_mb = float(fallback_memory_mb)
        self._poll_interval = poll_interval
        self._peak_window_seconds = peak_window_seconds
        self._wanted_source = source
        self._budget_mb = budget_mb
        self._source: MemorySource | None = source if isinstance(source, MemorySource) else None
        self._local = LocalBoard(self._fallback_memory_mb, peak_window_seconds)
        self._board: SampleBoard = self._local
        self._gpu_available = False
        self._read_ns: dict[int, int] = {}  # device index: taken_ns of the last figure; replaced, never changed
        self._failing: frozenset[int] = frozenset()
        self._measured_processes: bool | None = None  # by the source, at the last sample
        self._renew_threading()
        _monitors.add(self)

    def _renew_threading(self) -> None:
        """Set up locks and thread as new: at the start, and in a forked child, which has no thread and may
        have inherited locks that nobody will ever let go."""
        self._local.lock = threading.Lock()
        self._source_lock = threading.Lock()  # guards resolving the source
        self._control_lock = threading.Lock()  # guards start, stop and bind; taken before the others
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    # What Beam's monitor keeps in attributes of its own lives on the local board.

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

    @property
    def source(self) -> MemorySource:
        """The source in use. Raises SourceUnavailableError, InvalidArgumentError as `choose_source` does."""
        with self._source_lock:
            source = self._source
            if source is None:
                source = self._source = choose_source(
                    self._wanted_source,
                    fallback_memory_mb=self._fallback_memory_mb,
                    budget_mb=self._budget_mb,
                    logger=logger,
                )
            self._gpu_available = not is_books_only(source)
            total_mb = sum(device.total_mb for device in source.devices())
        with self._local.lock:
            self._local.total_mb = total_mb
        return source

    def bind(self, board: SampleBoard | None) -> None:
        """Read from and publish to `board` from now on; None goes back to the monitor's own board.

        A polling thread is ended: a board that is shared has one process for the whole host that polls.
        """
        with self._control_lock:
            self._end_thread()
            self._board = self._local if board is None else board

    def start(self) -> None:
        """Take a first sample and start to poll, unless that is done, or a bound board's leader does it.

        Raises SourceUnavailableError when a source that was asked for by name cannot work here.
        """
        with self._control_lock:
            source = self.source
            if self._board is not self._local or self._thread is not None or is_books_only(source):
                return
            self.refresh()
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._poll_loop, args=(self._stop,), name="mpmm-gpu-monitor", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End the polling thread, wait for it, and let go of the source; the last figures stay readable."""
        with self._control_lock:
            self._end_thread()
            with self._source_lock:
                if self._source is not None and self._source is not self._wanted_source:
                    self._source.close()
                    self._source = None

    def reset_peak(self) -> None:
        """Let the peak start anew from the current figure."""
        self._board.reset_peak()

    def get_stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) MB, summed over devices.

        A device that was never read yet has no part in current and peak: see `last_sample_age_seconds`.
        """
        return self._board.stats()

    def refresh(self, *, patience_s: float | None = None) -> None:
        """Take a sample now and publish it. A source that fails leaves the last figures in place.

        patience_s: for all of it; what the sample takes is not there any more for the lock.
        Raises LockTimeoutError where a manager shares the figures and the lock was not free by then.
        """
        began = time.monotonic()
        board = self._board
        samples = self._take_sample(board.server_pids())
        board.publish(samples, None if patience_s is None else max(0.0, patience_s - (time.monotonic() - began)))

    def last_sample_age_seconds(self) -> float:
        """Return the age of the oldest device figure that this process took; infinite while one is missing."""
        source = self._source
        read_ns = self._read_ns
        if source is None and not read_ns:
            return math.inf
        indexes = read_ns.keys() if source is None else [device.index for device in source.devices()]
        if any(index not in read_ns for index in indexes):
            return math.inf
        return (time.monotonic_ns() - min(read_ns[index] for index in indexes)) / 1e9

    def _take_sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Return one sample of each device, without a figure for those that cannot be read."""
        source = self.source
        taken_ns = time.monotonic_ns()
        try:
            samples = tuple(source.sample(server_pids))
            reason = "; ".join(dict.fromkeys(sample.trouble for sample in samples if sample.trouble))
        except Exception as error:  # a source is a driver or a program: any failure is 'not read', none ends polling
            reason = repr(error)
            done_ns = time.monotonic_ns()
            samples = tuple(DeviceSample(device.index, None, taken_ns, done_ns=done_ns) for device in source.devices())
        self._read_ns = self._read_ns | {
            sample.index: sample.taken_ns for sample in samples if sample.used_mb is not None
        }
        if not is_books_only(source):
            failing = frozenset(sample.index for sample in samples if sample.used_mb is None)
            self._log_change(failing, source, reason or "no figure")
        return samples

    def _log_change(self, failing: frozenset[int], source: MemorySource, reason: str) -> None:
        """Say what can no longer be measured, or can be again: once a change, not once a poll."""
        before, self._failing = self._failing, failing
        if failing - before:
            logger.warning(
                "%s cannot read device(s) %s (%s): keeping the last figure", source.name, sorted(failing), reason
            )
        elif before - failing:
            logger.info("%s reads device(s) %s again", source.name, sorted(before - failing))
        could, self._measured_processes = self._measured_processes, source.measures_processes
        if could and not source.measures_processes:
            logger.warning(
                "%s cannot measure single processes: the driver withholds their memory, or tells the pids of another "
                "pid namespace",
                source.name,
            )
        elif source.measures_processes and could is False:
            logger.info("%s measures single processes", source.name)

    def _poll_loop(self, stop: threading.Event) -> None:
        while not stop.wait(self._poll_interval):
            self.refresh()

    def _end_thread(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


_monitors: weakref.WeakSet[GPUMonitor] = weakref.WeakSet()


def _renew_after_fork() -> None:
    for monitor in list(_monitors):
        monitor._renew_threading()


os.register_at_fork(after_in_child=_renew_after_fork)
