"""The models of the suspension run, in a module that imports little, since each model server imports it."""

from __future__ import annotations

import os
from pathlib import Path

from devices.simulated_gpu import SimulatedGpus

__all__ = ["SuspendedModel", "mb_of", "tags"]

# The simulated driver moves each size in two or three parts, so that a kill can hit the middle.
SIZES_MB = (100, 130, 160, 190)


def tags(count: int) -> list[str]:
    """Return the tags of a run's models."""
    return [f"model-{number}" for number in range(count)]


def mb_of(tag: str) -> int:
    """Return the size of a model's copy."""
    return SIZES_MB[int(tag.rpartition("-")[2]) % len(SIZES_MB)]


class SuspendedModel:
    """A model that takes memory of the simulated GPU, and reports how much it has."""

    def __init__(self, folder: str, mb: int) -> None:
        self._gpus = SimulatedGpus(Path(folder))
        self._gpus.allocate(mb, 0)

    def look(self) -> tuple[int, float, int]:
        """Return the pid, the MB on the device, and the driver's state of this process.

        A copy that is in use has all its memory on the device and is running; otherwise, real CUDA calls would block.
        """
        pid = os.getpid()
        return pid, self._gpus.process_mb(0).get(pid, 0.0), self._gpus.checkpoints.state_of(pid)
