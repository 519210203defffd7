"""Callers' monitors in place of ours, as Beam's manager accepts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
from harness import NewManager

from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MONITOR_METHODS
from mpmm.shared_state.snapshot import read_snapshot


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


def test_a_monitor_shows_what_it_was_made_with() -> None:
    monitor = GPUMonitor(12.0, 0.25, 2.0)
    assert (monitor.fallback_memory_mb, monitor.poll_interval, monitor.peak_window_seconds) == (12.0, 0.25, 2.0)
