"""The simulated device of most tests, in a module that imports little, since each model server imports it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from devices.process_state import lives

if TYPE_CHECKING:
    from mpmm.sources import DeviceInfo, DeviceSample

_numbers = itertools.count(1)


class SimulatedDevice:
    """A memory source with a folder per device, in which living processes' allocations are files. Can be pickled.

    A process's allocations are free once it is dead, as on a real device. `linger_s`: how much later memory that a
    living process frees shows up as free.
    """

    name = "simulated"
    measures_processes = False
    cheap = True

    def __init__(self, folder: Path, *totals_mb: float, linger_s: float = 0.0) -> None:
        self.totals_mb = totals_mb
        self._folder = folder
        self._linger_s = linger_s
        self.frees_late = linger_s > 0
        for index in range(len(totals_mb)):
            (folder / str(index)).mkdir(parents=True, exist_ok=True)

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the devices."""
        from mpmm.sources import DeviceInfo

        return tuple(DeviceInfo(i, f"sim-{i}", f"device {i}", mb) for i, mb in enumerate(self.totals_mb))

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        from mpmm.sources import DeviceSample

        taken = time.monotonic_ns()
        dark = (self._folder / "dark").exists()
        return tuple(DeviceSample(i, None if dark else self.used_mb(i), taken) for i in range(len(self.totals_mb)))

    def go_dark(self) -> None:
        """Let every sample have no figure until `come_back`."""
        (self._folder / "dark").touch()

    def come_back(self) -> None:
        """Let samples have figures again."""
        (self._folder / "dark").unlink()

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def used_mb(self, index: int = 0) -> float:
        """Return the memory in use, in MB."""
        used = 0.0
        for name in os.listdir(self._folder / str(index)):
            kind, mark, mb, _ = name.split("_")
            if lives(int(mark)) if kind == "of" else time.monotonic() < float(mark) + self._linger_s:
                used += float(mb)
        return used

    def allocate(self, mb: float, index: int = 0) -> Path:
        """Take memory for this process. Raises MemoryError if there is not enough, as on a real device."""
        free = self.totals_mb[index] - self.used_mb(index)
        if mb > free:
            raise MemoryError(f"{mb:g} MB asked for on device {index}, {free:g} MB free")
        path = self._folder / str(index) / f"of_{os.getpid()}_{mb}_{next(_numbers)}"
        path.touch()
        return path

    def free(self, allocation: Path) -> None:
        """Free memory."""
        _, _, mb, number = allocation.name.split("_")
        if self._linger_s:
            allocation.rename(allocation.with_name(f"freed_{time.monotonic()}_{mb}_{os.getpid()}-{number}"))
        else:
            allocation.unlink()


class BookedDevices:
    """A memory source of several devices that measures nothing, so that a model is known from the start."""

    name = "booked"
    measures_processes = False
    frees_late = False
    cheap = True
    accounting_only = True

    def __init__(self, *totals_mb: float) -> None:
        self.totals_mb = totals_mb

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the devices."""
        from mpmm.sources import DeviceInfo

        return tuple(DeviceInfo(i, f"booked-{i}", "booked", mb) for i, mb in enumerate(self.totals_mb))

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Return samples without figures."""
        from mpmm.sources import DeviceSample

        now_ns = time.monotonic_ns()
        return tuple(DeviceSample(i, None, now_ns, done_ns=now_ns) for i in range(len(self.totals_mb)))

    def close(self) -> None:
        """Do nothing."""
