"""Admission control: how much of a device is free, and how much could be at best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mpmm.policy.view import DeviceView

__all__ = ["free_mb", "largest_limit_mb", "limit_mb", "widened"]


def limit_mb(device: DeviceView, slack_percentage: float) -> float:
    """Return how much of a device may be in use: `total * (1 - slack)`, as in Beam."""
    return device.total_mb * (1.0 - slack_percentage) + device.extra_mb


def widened(device: DeviceView, share_mb: float, slack_percentage: float) -> DeviceView:
    """Return a device with the limit that holds for a load of `share_mb`.

    The slack is meant for what models need beyond their estimates. If external memory takes part of the limit, a model
    that the limit allows could never be loaded, although it fits. So a model for which the device has room, with
    nothing else of ours there, may use the slack, and then has the device to itself.
    """
    limit = limit_mb(device, slack_percentage)
    needs_mb = share_mb + max(0.0, device.external_mb)
    if not limit < needs_mb <= device.total_mb or share_mb > limit:
        return device
    return replace(device, extra_mb=needs_mb - limit)


def free_mb(device: DeviceView, slack_percentage: float) -> float:
    """Return how much can be reserved on a device right now; negative if it is over its limit."""
    return limit_mb(device, slack_percentage) - device.used_mb - device.reserved_mb


def largest_limit_mb(devices: Iterable[DeviceView], slack_percentage: float, span: int = 1) -> float:
    """Return how much each of the `span` largest devices can take: a model that needs more on each never fits."""
    limits = sorted((limit_mb(device, slack_percentage) for device in devices), reverse=True)
    return limits[span - 1] if len(limits) >= span else 0.0
