"""Callers' monitors in place of ours, as Beam's manager accepts them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
from harness import NewManager
from patience import DEADLINE_S

from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MONITOR_METHODS, MonitorSource
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources import SourceUnavailableError


class DerivedMonitor(GPUMonitor):
    """A monitor of the caller's own that is derived from ours, as it would be from Beam's."""

    used_mb = 100.0

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def refresh(self) -> None:  # type: ignore[override]  # Beam has no time limit there
        """Nothing to measure."""

    def reset_peak(self) -> None:
        """Nothing to reset."""

    def get_stats(self) -> tuple[float, float, float]:
        """Return the figures."""
        return self.used_mb, self.used_mb, 1000.0

    def __len__(self) -> int:
        return 0


def derived() -> Any:
    return DerivedMonitor()


def patched() -> Any:
    own, monitor = DerivedMonitor(), GPUMonitor(source="booked")
    for name in MONITOR_METHODS:
        setattr(monitor, name, getattr(own, name))
    return monitor


def mocked() -> Any:
    mock = MagicMock(spec=GPUMonitor)
    mock.get_stats.return_value = (100.0, 100.0, 1000.0)
    return mock


@pytest.mark.parametrize("make", [derived, patched, mocked])
def test_a_monitor_with_methods_of_its_own_is_the_callers_whatever_it_is_derived_from(
    new_manager: NewManager, namespace: str, make: Callable[[], Any]
) -> None:
    monitor = make()
    manager = new_manager(monitor=monitor, poll_interval=0.05)
    with manager.model("a", lambda: "handle"):
        (found,) = read_snapshot(namespace).devices
    assert (found.used_mb, found.total_mb) == (100.0, 1000.0)
    assert manager._monitor is monitor


class Peaks:
    """A monitor whose peak begins anew only if it is reset; its start and stop hang while `answers` is not set."""

    def __init__(self) -> None:
        self.used_mb, self.peak_mb = 100.0, 700.0
        self.answers = threading.Event()
        self.called: list[str] = []

    def start(self) -> None:
        """Begin."""
        self.called.append("start")
        assert self.answers.wait(DEADLINE_S)

    def stop(self) -> None:
        """End."""
        self.called.append("stop")
        assert self.answers.wait(DEADLINE_S)

    def refresh(self) -> None:
        """Measure."""
        self.peak_mb = max(self.peak_mb, self.used_mb)

    def reset_peak(self) -> None:
        """Begin anew."""
        self.peak_mb = self.used_mb

    def get_stats(self) -> tuple[float, float, float]:
        """Return the figures."""
        return self.used_mb, self.peak_mb, 1000.0


def test_a_peak_counts_from_when_the_monitor_has_reset_it() -> None:
    monitor = Peaks()
    source = MonitorSource(monitor)
    assert source.peak_mb == 0
    source.sample(())
    assert source.peak_mb == 700
    first, second = source.ask_for_reset(), source.ask_for_reset()
    assert source.peak_mb == 0
    first()
    assert (source.peak_mb, monitor.peak_mb) == (0, 100)
    source.sample(())
    assert source.peak_mb == 0
    monitor.used_mb = 150.0
    second()
    assert source.peak_mb == 150
    monitor.used_mb = 400.0
    source.sample(())
    assert source.peak_mb == 400


def test_a_monitor_that_hangs_as_it_starts_or_stops_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("START_TIMEOUT_S", "STOP_TIMEOUT_S"):
        monkeypatch.setattr(f"mpmm.memory.monitor_source.{name}", 0.01)
    monitor = Peaks()
    source = MonitorSource(monitor)
    with pytest.raises(SourceUnavailableError, match="its start hangs: no answer"):
        source.start()
    source.stop()
    monitor.answers.set()
    for name in ("START_TIMEOUT_S", "STOP_TIMEOUT_S"):
        monkeypatch.setattr(f"mpmm.memory.monitor_source.{name}", DEADLINE_S)
    source.start()
    source.stop()
    assert monitor.called == ["start", "stop"] * 2


def test_a_monitor_shows_what_it_was_made_with() -> None:
    monitor = GPUMonitor(12.0, 0.25, 2.0)
    assert (monitor.fallback_memory_mb, monitor.poll_interval, monitor.peak_window_seconds) == (12.0, 0.25, 2.0)
