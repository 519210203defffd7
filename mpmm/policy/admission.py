"""Admission control: what is free on a device, and what could be at best."""

from __future__ import annotations

from collections.abc import Iterable

from mpmm.policy.view import DeviceView

__all__ = ["free_mb", "largest_limit_mb", "limit_mb"]


def limit_mb(device: DeviceView, slack_percentage: float) -> float:
    """Return how much of a device may be in use: `total * (1 - slack)`, as in Beam."""
    return device.total_mb * (1.0 - slack_percentage)


def free_mb(device: DeviceView, slack_percentage: float) -> float:
    """Return what can be reserved on a device right now; negative when it is over its limit."""
    return limit_mb(device, slack_percentage) - device.used_mb - device.reserved_mb


def largest_limit_mb(devices: Iterable[DeviceView], slack_percentage: float, span: int = 1) -> float:
    """Return what the `span` largest devices can all take: of what needs more on each, none can ever be loaded."""
    limits = sorted((limit_mb(device, slack_percentage) for device in devices), reverse=True)
    return limits[span - 1] if len(limits) >= span else 0.0
