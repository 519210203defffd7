"""What `workload.py` loads: model servers that declare memory on a simulated device, which counts for itself.

Memory is declared, not taken: an allocation is a file `<pid>_<MB>_<number>` in one folder, and is gone when its
process is. The device knows nothing of any model manager. It adds up, at every allocation, what is loaded or being
loaded at that moment, and that is the only moment at which the sum can rise.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mpmm.sources import DeviceInfo, DeviceSample

__all__ = ["SIZES_MB", "DeclaredDevice", "Loader", "draw_requests"]

# Twelve models of 1.2 to 5 GB, 36.9 GB in all; the most wanted one first, and size has nothing to do with demand.
SIZES_MB = (3100, 1200, 4800, 2500, 3900, 1600, 4400, 2200, 5000, 1900, 3500, 2800)
_numbers = itertools.count()


def draw_requests(count: int, models: int, exponent: float, seed: int) -> list[int]:
    """Return the model of each request, by a Zipf distribution over the models."""
    import numpy as np

    weights = 1.0 / np.arange(1, models + 1) ** exponent
    drawn: list[int] = np.random.default_rng(seed).choice(models, size=count, p=weights / weights.sum()).tolist()
    return drawn


class DeclaredDevice:
    """The device, for those who allocate, and as a memory source for the manager. Can be pickled."""

    name = "declared"
    settles_late = False
    cheap = True

    def __init__(self, folder: Path, total_mb: float, measures_processes: bool = True) -> None:
        self.total_mb = total_mb
        self.measures_processes = measures_processes
        self._allocations = folder / "allocations"
        self._tally = folder / "tally"
        self._allocations.mkdir(parents=True, exist_ok=True)
        self._tally.touch()

    def allocate(self, mb: float) -> None:
        """Declare memory of this process, for as long as it lives; note whether that was more than there is."""
        with self._alone() as tally:
            (self._allocations / f"{os.getpid()}_{mb}_{next(_numbers)}").touch()
            used = sum(self.by_process().values())
            os.write(tally, b"!" if used > self.total_mb else b".")

    def counts(self) -> tuple[int, int]:
        """Return how many allocations there were, and at how many of them the device was too small."""
        tally = self._tally.read_bytes()
        return len(tally), tally.count(b"!")

    def by_process(self) -> dict[int, float]:
        """Return the declared memory of each living process, in MB."""
        found: dict[int, float] = {}
        for entry in os.listdir(self._allocations):
            pid, mb, _ = entry.split("_")
            if _lives(int(pid)):
                found[int(pid)] = found.get(int(pid), 0.0) + float(mb)
        return found

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the one device."""
        return (DeviceInfo(0, "declared-0", "declared memory", self.total_mb),)

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        taken = time.monotonic_ns()
        found = self.by_process()
        return (DeviceSample(0, sum(found.values()), taken, found if self.measures_processes else {}),)

    def close(self) -> None:
        """Nothing is open."""

    @contextmanager
    def _alone(self) -> Iterator[int]:
        tally = os.open(self._tally, os.O_WRONLY | os.O_APPEND)
        try:
            fcntl.flock(tally, fcntl.LOCK_EX)
            yield tally
        finally:
            os.close(tally)


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


class DeclaredModel:
    """The object in a model server: it declares its memory, and loading and inference are sleeps."""

    def __init__(self, device: DeclaredDevice, mb: float, load_s: float, inference_s: float) -> None:
        device.allocate(mb)
        time.sleep(load_s)
        self._inference_s = inference_s

    def infer(self) -> int:
        """Work for a while."""
        time.sleep(self._inference_s)
        return os.getpid()


@dataclass(frozen=True)
class Loader:
    """A loader of one model; the same for both implementations but for the module that starts its servers."""

    shared_module: str
    device: DeclaredDevice
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
