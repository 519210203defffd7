"""A caller's own monitor in place of `GPUMonitor`, as Beam accepts one: a source of one device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from mpmm.sources import DeviceInfo, DeviceSample
from mpmm.sources.base import START_TIMEOUT_S, unavailable
from mpmm.sources.timeouts import answer_within

__all__ = ["MONITOR_METHODS", "MonitorProtocol", "MonitorSource"]

# Longer than Beam's monitor takes, which waits for its thread, which waits for nvidia-smi.
STOP_TIMEOUT_S = 10.0


class MonitorProtocol(Protocol):
    """The methods that a caller's own monitor needs to take the place of `GPUMonitor`; the same as for Beam."""

    def start(self) -> None:
        """Start measuring."""

    def stop(self) -> None:
        """Stop measuring."""

    def refresh(self) -> object:
        """Measure now; the result is ignored."""

    def reset_peak(self) -> None:
        """Restart the peak at the current figure."""

    def get_stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) in MB."""


#: The methods that a caller's own monitor is checked for.
MONITOR_METHODS = ("start", "stop", "refresh", "reset_peak", "get_stats")


class MonitorSource:
    """A caller's own monitor, used as the source of one device.

    Its methods are the caller's code, which may hang. So each of them is called either by the sampling thread only, or
    with a time limit.
    """

    name = "monitor"
    measures_processes = False
    frees_late = False
    cheap = True
    ignores_names = True

    def __init__(self, monitor: MonitorProtocol) -> None:
        self.monitor = monitor
        # The monitor's last figure; replaced as a whole.
        self._peak_mb = 0.0
        # How many resets of the peak were asked for, and the number of the last one that is done.
        self._resets_asked = self._resets_done = 0

    @property
    def peak_mb(self) -> float:
        """The monitor's peak at the last sample; the monitor may have seen more than the samples have.

        It is 0 from `ask_for_reset` until the monitor has reset its peak, which until then includes earlier figures.
        """
        return self._peak_mb if self._resets_done == self._resets_asked else 0.0

    def ask_for_reset(self) -> Callable[[], None]:
        """Ignore earlier peaks from now on; return a function that resets the monitor's peak, and may hang or fail."""
        self._resets_asked += 1
        return partial(self._reset_peak, self._resets_asked)

    def _reset_peak(self, asked: int) -> None:
        self.monitor.reset_peak()
        self._peak_mb = self.monitor.get_stats()[1]
        self._resets_done = asked

    def start(self) -> None:
        """Start the monitor. Raises SourceUnavailableError if that takes longer than `START_TIMEOUT_S`."""
        try:
            answer_within(self.monitor.start, START_TIMEOUT_S, "mpmm-start-monitor")
        except TimeoutError as error:
            raise unavailable(self.name, f"its start hangs: {error}") from error

    def stop(self) -> None:
        """Stop the monitor, but wait no longer than `STOP_TIMEOUT_S`."""
        with contextlib.suppress(TimeoutError):
            answer_within(self.monitor.stop, STOP_TIMEOUT_S, "mpmm-stop-monitor")

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the one device that a monitor represents."""
        return (DeviceInfo(0, "monitor", type(self.monitor).__name__, self.monitor.get_stats()[2]),)

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Ask the monitor."""
        taken = time.monotonic_ns()
        self.monitor.refresh()
        used_mb, self._peak_mb, _ = self.monitor.get_stats()
        return (DeviceSample(0, used_mb, taken, {}, done_ns=time.monotonic_ns()),)

    def close(self) -> None:
        """Do nothing: the manager that was given the monitor stops it."""
