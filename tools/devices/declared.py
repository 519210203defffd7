"""The models of `workload.py`: servers that declare memory on a simulated device, which counts on its own.

Memory is declared, not taken: an allocation is a file `<pid>_<MB>_<number>` in one folder, and ends with its process.
The device knows nothing of any model manager. At every allocation, the only moment at which the sum can rise, it adds
up what is loaded or being loaded.

`DeclaredDevice` is a memory source itself. `DeclaredGpu` keeps the same count over a simulated GPU
(`simulated_gpu.py`), which the manager measures through NVML or nvidia-smi as it would a real one.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from devices.process_state import lives
from devices.simulated_gpu import SimulatedGpus
from mpmm.sources import DeviceInfo, DeviceSample

__all__ = ["CountingDevice", "DeclaredDevice", "DeclaredGpu", "Loader"]

_numbers = itertools.count()


class CountingDevice(Protocol):
    """A device as the models and the run see it, independently of the manager. Can be pickled."""

    total_mb: float

    def allocate(self, mb: float) -> None:
        """Declare memory of this process, for as long as it lives; count it, and whether there was enough."""

    def counts(self) -> tuple[int, int]:
        """Return how many allocations there were, and at how many of them the device was too small."""

    def by_process(self) -> dict[int, float]:
        """Return the declared memory of each living process, in MB."""


class _AllocationCount:
    """One character for each allocation, in a file whose lock makes one wait for another. Can be pickled."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "allocations.count"
        self._path.touch()

    @contextmanager
    def alone(self) -> Iterator[Callable[[bool], None]]:
        """Hold the lock; the block gets a function that notes an allocation, and whether there was enough memory."""
        counts_fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            fcntl.flock(counts_fd, fcntl.LOCK_EX)
            yield partial(_note, counts_fd)
        finally:
            os.close(counts_fd)

    def counts(self) -> tuple[int, int]:
        """Return how many allocations were noted, and for how many of them there was not enough."""
        noted = self._path.read_bytes()
        return len(noted), noted.count(b"!")


def _note(counts_fd: int, enough: bool) -> None:
    os.write(counts_fd, b"." if enough else b"!")


class DeclaredDevice:
    """The device, for the models that allocate and as a memory source for the manager. Can be pickled.

    answer_s: how long a sample takes; its figure is from the beginning of that time.
    """

    name = "declared"

    def __init__(self, folder: Path, total_mb: float, measures_processes: bool = True, answer_s: float = 0.0) -> None:
        self.total_mb = total_mb
        self.measures_processes = measures_processes
        self.frees_late = answer_s > 0
        self.cheap = answer_s < 0.005
        self._answer_s = answer_s
        self._allocations = folder / "allocations"
        self._allocations.mkdir(parents=True, exist_ok=True)
        self._count = _AllocationCount(folder)

    def allocate(self, mb: float) -> None:
        """Declare memory of this process, for as long as it lives; note whether there was enough."""
        with self._count.alone() as note:
            (self._allocations / f"{os.getpid()}_{mb}_{next(_numbers)}").touch()
            note(sum(self.by_process().values()) <= self.total_mb)

    def counts(self) -> tuple[int, int]:
        """Return how many allocations there were, and at how many of them the device was too small."""
        return self._count.counts()

    def by_process(self) -> dict[int, float]:
        """Return the declared memory of each living process, in MB."""
        found: dict[int, float] = {}
        for entry in os.listdir(self._allocations):
            pid, mb, _ = entry.split("_")
            if lives(int(pid)):
                found[int(pid)] = found.get(int(pid), 0.0) + float(mb)
        return found

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the one device."""
        return (DeviceInfo(0, "declared-0", "declared memory", self.total_mb),)

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        taken = time.monotonic_ns()
        found = self.by_process()
        time.sleep(self._answer_s)
        return (DeviceSample(0, sum(found.values()), taken, found if self.measures_processes else {}),)

    def close(self) -> None:
        """Do nothing: nothing is open."""


class DeclaredGpu:
    """The one simulated GPU of a run. As on a real one, an allocation fails where there is too little memory."""

    def __init__(self, folder: Path, gpus: SimulatedGpus) -> None:
        self.total_mb = gpus.total_mb(0)
        self._gpus = gpus
        self._count = _AllocationCount(folder)

    def allocate(self, mb: float) -> None:
        """See `CountingDevice`. Raises MemoryError if less is free."""
        with self._count.alone() as note:
            try:
                self._gpus.allocate(mb)
            except MemoryError:
                note(False)
                raise
            note(True)

    def counts(self) -> tuple[int, int]:
        """See `CountingDevice`; allocations that failed are counted, too."""
        return self._count.counts()

    def by_process(self) -> dict[int, float]:
        """See `CountingDevice`."""
        return self._gpus.process_mb(0)


class DeclaredModel:
    """The object in a model server: it declares its memory, and loading and inference are sleeps."""

    def __init__(self, device: CountingDevice, mb: float, load_s: float, inference_s: float) -> None:
        device.allocate(mb)
        time.sleep(load_s)
        self._inference_s = inference_s

    def infer(self) -> int:
        """Sleep for the time of an inference; return the pid."""
        time.sleep(self._inference_s)
        return os.getpid()


@dataclass(frozen=True)
class Loader:
    """A loader of one model; only the module that starts its servers differs between the implementations."""

    shared_module: str
    device: CountingDevice
    mb: float
    load_s: float
    inference_s: float

    def __call__(self) -> str:
        """Start a model server and return its handle."""
        handle = f"served-{uuid.uuid4().hex}"
        self.served(handle)
        return handle

    def served(self, handle: str) -> Any:
        """Return a proxy of the model behind a handle."""
        shared = import_module(self.shared_module).MultiProcessShared
        return shared(self._make, tag=handle, always_proxy=True, spawn_process=True).acquire()

    def _make(self) -> DeclaredModel:
        return DeclaredModel(self.device, self.mb, self.load_s, self.inference_s)
