"""No measurement at all, only a stated total: the manager then relies on its own accounting."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from mpmm.errors import InvalidArgumentError
from mpmm.sources.base import DeviceInfo, DeviceSample

__all__ = ["BookedSource"]


class BookedSource:
    """One device of a given size whose use is never measured: every sample has None."""

    name = "booked"
    measures_processes = False
    frees_late = False
    cheap = True
    ignores_names = True
    accounting_only = True

    def __init__(self, total_mb: float) -> None:
        """Describe a device of `total_mb`. Raises InvalidArgumentError unless it is a positive number."""
        if not (math.isfinite(total_mb) and total_mb > 0):
            raise InvalidArgumentError(f"total memory is {total_mb!r}: expected a positive number of MB")
        self._devices = (DeviceInfo(0, "booked", "booked", float(total_mb)),)

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the one device."""
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Return a sample without a figure."""
        now_ns = time.monotonic_ns()
        return (DeviceSample(0, None, now_ns, done_ns=now_ns),)

    def close(self) -> None:
        """Do nothing."""
