"""Placement: which of several devices a load gets.

Two aims conflict. Best fit, on the device with the least memory left, keeps large holes for large models; but it fills
one device before it uses the next, so half of the devices are unused while all models would fit together. Spreading, to
the least full device, balances; but it splits free memory into holes of the same size everywhere.

So devices are compared by how full they are with half of the load on them, used and reserved memory as a share of the
limit, in steps of `STEP`; among those on the same step the tightest fit wins. Half of the load, because it is a smaller
share of a large device than of a small one: without it small devices end up fuller, with all of it emptier. Shares, not
MB, because a slice of a GPU should be as full as a whole one. With loads of 1 to 4 % of a GPU, on seven GPUs and one
that is cut in two, the fullest device is then 4 % fuller than the least full one, and with loads of 3 to 10 % it is
9 %; with best fit alone it is 99 %, before memory runs short. Once everything is full, placement no longer matters:
then room is made where that costs least (`eviction.plan_eviction`).

A copy that spans several devices takes an equal share of each: of the first devices in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mpmm.policy.admission import free_mb, limit_mb
from mpmm.policy.view import DeviceView, Reason

__all__ = ["STEP", "Place", "best_place", "soonest_alone"]

STEP = 0.02


class Place(NamedTuple):
    """Devices, and why these: FITS if there was no choice."""

    devices: tuple[DeviceView, ...]
    reason: Reason


def best_place(devices: Sequence[DeviceView], share_mb: float, slack_percentage: float, span: int = 1) -> Place | None:
    """Return the `span` devices that should take `share_mb` each now, None if fewer can."""
    fitting = [device for device in devices if free_mb(device, slack_percentage) >= share_mb]
    if len(fitting) < span:
        return None
    ranked = sorted(fitting, key=lambda device: _rank(device, share_mb, slack_percentage))
    chosen = tuple(ranked[:span])
    if len(devices) == span:
        return Place(chosen, Reason.FITS)
    if len(fitting) == span:
        return Place(chosen, Reason.ONLY_ONE)
    full = [_step(device, share_mb, slack_percentage) for device in ranked[span - 1 : span + 1]]
    return Place(chosen, Reason.TIGHTEST if full[0] == full[1] else Reason.LEAST_FULL)


def _rank(device: DeviceView, share_mb: float, slack_percentage: float) -> tuple[int, float, int]:
    return _step(device, share_mb, slack_percentage), free_mb(device, slack_percentage), device.device


def _step(device: DeviceView, share_mb: float, slack_percentage: float) -> int:
    """Return how full the device is with half of the load, in steps; one of unknown size counts as fuller than any."""
    limit = limit_mb(device, slack_percentage)
    return int((device.used_mb + device.reserved_mb + share_mb / 2) / limit / STEP) if limit else int(1 / STEP) + 1


def soonest_alone(costs: Sequence[tuple[DeviceView, float, int, float]], span: int) -> tuple[DeviceView, ...]:
    """Return the devices on which a model can run alone soonest.

    costs: (device, seconds until the copies in use on it are expected to be idle, copies in use, MB to unload). A
    device that is being drained gets no newcomers, so none of these grows, and the choice changes only for the better.
    """
    return tuple(entry[0] for entry in sorted(costs, key=lambda entry: (*entry[1:], entry[0].device))[:span])
