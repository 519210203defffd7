"""What tests have model servers make and serve: in a module of its own that imports little, as each server does."""

from __future__ import annotations

import itertools
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from devices.process_state import lives

from mpmm.memory.placement import Placement, current_placement

if TYPE_CHECKING:
    from devices.simulated_gpu import SimulatedGpus

    from mpmm.sources import DeviceInfo, DeviceSample

# Guards against a hang; measures nothing.
DEADLINE_S = 20.0
_numbers = itertools.count(1)


class Gate:
    """A door that any process can open and that stays open; who waits for it wakes by the kernel. Can be pickled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        os.mkfifo(path, 0o600)
        self._descriptor()

    def open(self) -> None:
        """Let everybody through, now and later."""
        os.write(self._descriptor(), b"1")

    def wait(self, timeout_seconds: float = DEADLINE_S) -> None:
        """Return once the gate is open; AssertionError at the deadline."""
        assert self.is_open(timeout_seconds), f"{self._path.name} was not opened within {timeout_seconds} s"

    def is_open(self, timeout_seconds: float = 0.0) -> bool:
        """Tell whether somebody has opened the gate, waiting for it if asked to."""
        return bool(select.select([self._descriptor()], [], [], timeout_seconds)[0])

    def close(self) -> None:
        """Close this process's descriptor; the gate of the others stays as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _descriptor(self) -> int:
        if self._fd < 0:
            # For reading and writing: then neither opening nor a missing peer blocks or ends anything.
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        return self._fd

    def __getstate__(self) -> tuple[Path]:
        return (self._path,)

    def __setstate__(self, state: tuple[Path]) -> None:
        (self._path,), self._fd = state, -1


class SimulatedDevice:
    """A memory source: folders, one a device, in which every living process's allocations are files. Can be pickled.

    What a process has allocated is free once it is dead, as on a real device. `linger_s`: memory that a living
    process frees shows up only so much later.
    """

    name = "simulated"
    measures_processes = False
    cheap = True

    def __init__(self, folder: Path, *totals_mb: float, linger_s: float = 0.0) -> None:
        self.totals_mb = totals_mb
        self._folder = folder
        self._linger_s = linger_s
        self.settles_late = linger_s > 0
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
        """Let nobody read a figure until `come_back`."""
        (self._folder / "dark").touch()

    def come_back(self) -> None:
        """Let figures be read again."""
        (self._folder / "dark").unlink()

    def close(self) -> None:
        """Nothing is open."""

    def used_mb(self, index: int = 0) -> float:
        """Return the memory in use, in MB."""
        used = 0.0
        for name in os.listdir(self._folder / str(index)):
            kind, mark, mb, _ = name.split("_")
            if lives(int(mark)) if kind == "of" else time.monotonic() < float(mark) + self._linger_s:
                used += float(mb)
        return used

    def allocate(self, mb: float, index: int = 0) -> Path:
        """Take memory for this process. Raises MemoryError when there is not enough, as a real device does."""
        free = self.totals_mb[index] - self.used_mb(index)
        if mb > free:
            raise MemoryError(f"{mb:g} MB asked for on device {index}, {free:g} MB free")
        path = self._folder / str(index) / f"of_{os.getpid()}_{mb}_{next(_numbers)}"
        path.touch()
        return path

    def free(self, allocation: Path) -> None:
        """Give memory back."""
        _, _, mb, number = allocation.name.split("_")
        if self._linger_s:
            allocation.rename(allocation.with_name(f"freed_{time.monotonic()}_{mb}_{os.getpid()}-{number}"))
        else:
            allocation.unlink()


class Served:
    """The object in a model server of its own."""

    def __init__(self, device: SimulatedDevice | SimulatedGpus | None = None, mb: float = 0.0) -> None:
        self._gpus = None if isinstance(device, SimulatedDevice) else device
        self._placement = current_placement()
        if device is not None:
            device.allocate(mb)

    def where(self) -> tuple[str | None, Placement | None]:
        """Return what CUDA would see, and what the constructor was told."""
        return os.environ.get("CUDA_VISIBLE_DEVICES"), self._placement

    def grow(self, mb: float, device: str | None = None) -> None:
        """Take more memory of a simulated GPU, or give some back."""
        assert self._gpus is not None
        if mb >= 0:
            self._gpus.allocate(mb, device)
        else:
            self._gpus.free(-mb, device)

    def pid(self) -> int:
        """Return the server's pid."""
        return os.getpid()

    def wait_at(self, began: Gate, go: Gate) -> None:
        """A long call."""
        began.open()
        go.wait()


@dataclass(frozen=True)
class MakesServed:
    """The constructor of a `Served`, in the server's process; see `Loads` for the gates."""

    device: SimulatedDevice | SimulatedGpus | None = None
    mb: float = 0.0
    began: Gate | None = None
    go: Gate | None = None

    def __call__(self) -> Served:
        """Make it."""
        if self.began is not None:
            self.began.open()
        if self.go is not None:
            self.go.wait()
        return Served(self.device, self.mb)
