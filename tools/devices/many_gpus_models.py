"""The models of `many_gpus`, in servers of their own that take memory of a simulated GPU. Quick to import."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from devices.simulated_gpu import SimulatedGpus
from mpmm import MultiProcessShared

__all__ = ["LARGEST_MB", "Loads", "size_mb"]

SMALLEST_MB, LARGEST_MB = 150.0, 750.0


def size_mb(model: int) -> float:
    """Return a model's size."""
    return SMALLEST_MB + (LARGEST_MB - SMALLEST_MB) * (model * 7 % 24) / 23


class Taken:
    """A model in its server."""

    def __init__(self, gpus: SimulatedGpus, mb: float) -> None:
        gpus.allocate(mb)


@dataclass(frozen=True)
class Makes:
    """The model's constructor, called in the server."""

    gpus: SimulatedGpus
    mb: float

    def __call__(self) -> Taken:
        """Make the model."""
        return Taken(self.gpus, self.mb)


@dataclass(frozen=True)
class Loads:
    """The model's loader."""

    gpus: SimulatedGpus
    model: int

    def __call__(self) -> str:
        """Start a server, and return the handle."""
        tag = f"many-{self.model}-{uuid.uuid4().hex[:8]}"
        makes = Makes(self.gpus, size_mb(self.model))
        MultiProcessShared(makes, tag=tag, always_proxy=True, spawn_process=True).acquire()
        return tag
