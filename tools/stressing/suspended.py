"""What model servers of the suspension run serve, in a module that imports little, as each of them imports it."""

from __future__ import annotations

import os
from pathlib import Path

from devices.simulated_gpu import SimulatedGpus

__all__ = ["SuspendedModel", "mb_of", "tags"]

# Two and three parts of what the simulated driver moves at a time, so that there is a middle.
SIZES_MB = (100, 130, 160, 190)


def tags(count: int) -> list[str]:
    """Return the tags of a run's models."""
    return [f"model-{number}" for number in range(count)]


def mb_of(tag: str) -> int:
    """Return what a copy of a model takes."""
    return SIZES_MB[int(tag.rpartition("-")[2]) % len(SIZES_MB)]


class SuspendedModel:
    """A model that takes memory of the simulated GPU, and tells what it has of it."""

    def __init__(self, folder: str, mb: int) -> None:
        self._gpus = SimulatedGpus(Path(folder))
        self._gpus.allocate(mb, 0)

    def look(self) -> tuple[int, float, int]:
        """Return pid, the MB on the device, and the driver's state of this process, whose calls would block in others.

        A copy that is in use has all of its memory, and is running.
        """
        pid = os.getpid()
        return pid, self._gpus.process_mb(0).get(pid, 0.0), self._gpus.checkpoints.state_of(pid)
