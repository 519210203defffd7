"""Admission control: what is free on a device, and which device takes a load."""

from __future__ import annotations

from collections.abc import Iterable

from mpmm.policy.view import DeviceView

__all__ = ["best_fit", "free_mb", "largest_limit_mb", "limit_mb"]


def limit_mb(device: DeviceView, slack_percentage: float) -> float:
    """Return how much of a device may be in use: `total * (1 - slack)`, as in Beam."""
    return device.total_mb * (1.0 - slack_percentage)


def free_mb(device: DeviceView, slack_percentage: float) -> float:
    """Return what can be reserved on a device right now; negative when it is over its limit."""
    return limit_mb(device, slack_percentage) - device.used_mb - device.reserved_mb


def best_fit(devices: Iterable[DeviceView], need_mb: float, slack_percentage: float) -> DeviceView | None:
    """Return the device with the least free memory that takes `need_mb` now, None when none does."""
    fitting = [device for device in devices if free_mb(device, slack_percentage) >= need_mb]
    return min(fitting, key=lambda device: (free_mb(device, slack_percentage), device.device), default=None)


def largest_limit_mb(devices: Iterable[DeviceView], slack_percentage: float) -> float:
    """Return the largest limit of all devices: what needs more can never be loaded."""
    return max((limit_mb(device, slack_percentage) for device in devices), default=0.0)
