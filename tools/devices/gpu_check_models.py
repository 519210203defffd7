"""What `gpu_check.py` loads: model servers that hold memory of a GPU, and say themselves how much.

With torch a model is a module with blocks of CUDA memory as its parameters. On a simulated GPU it declares its memory,
and some more for what a CUDA context takes, as a real process would have it.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from devices.simulated_gpu import SimulatedGpus
from mpmm import MultiProcessShared

__all__ = ["CheckedModel", "Figures", "Loader"]

MIB = 2**20
# Parameters are cut into blocks, as those of real models are.
BLOCK_MB = 256
# On a simulated GPU: what a process takes beside its tensors, and how long work takes.
CONTEXT_MB = 300.0
LOAD_S, INFERENCE_S = 0.05, 0.003


@dataclass(frozen=True)
class Figures:
    """What a process says of itself: tensors, all that torch has taken for them, and what CUDA says of the device."""

    pid: int
    tensors_mb: float
    taken_mb: float
    device_used_mb: float


class CheckedModel(Protocol):
    """A model in its server."""

    def infer(self) -> int:
        """Work on all of the weights for a moment; return the pid."""

    def figures(self) -> Figures:
        """Return the process's own figures."""


class TorchModel:
    """Weights of a given size on `cuda:0`."""

    def __init__(self, mb: float) -> None:
        import torch

        self._torch = torch
        self._module = torch.nn.Module()
        left = round(mb)
        while left > 0:
            block = torch.ones(min(left, BLOCK_MB) * MIB // 2, dtype=torch.float16, device="cuda")
            self._module.register_parameter(f"block{left}", torch.nn.Parameter(block, requires_grad=False))
            left -= BLOCK_MB
        torch.cuda.synchronize()

    def infer(self) -> int:
        """Read a part of every block, and see that it is what was written there."""
        for block in self._module.parameters():
            found = float(block[:: max(1, len(block) // 1000)].float().mean())
            if found != 1.0:
                raise ValueError(f"weights are {found}, not 1")
        return os.getpid()

    def figures(self) -> Figures:
        """See `CheckedModel`."""
        cuda = self._torch.cuda
        free, total = cuda.mem_get_info()
        return Figures(
            os.getpid(), cuda.memory_allocated() / MIB, cuda.memory_reserved() / MIB, float(total - free) / MIB
        )


class SimulatedModel:
    """The same, declared on a simulated GPU."""

    def __init__(self, gpus: SimulatedGpus, mb: float) -> None:
        self._gpus = gpus
        self._mb = mb
        gpus.allocate(mb + CONTEXT_MB)
        time.sleep(LOAD_S)

    def infer(self) -> int:
        """Take a moment."""
        time.sleep(INFERENCE_S)
        return os.getpid()

    def figures(self) -> Figures:
        """See `CheckedModel`."""
        used_mb = self._gpus.used_mb(self._gpus.current_device())
        return Figures(os.getpid(), self._mb, self._mb, used_mb)


@dataclass(frozen=True)
class Loader:
    """A loader of a model of `mb`, with torch or on simulated GPUs; a call starts a server and returns its handle."""

    mb: float
    gpus: SimulatedGpus | None

    def __call__(self) -> str:
        """Load."""
        handle = f"checked-{uuid.uuid4().hex}"
        self.served(handle)
        return handle

    def served(self, handle: str) -> CheckedModel:
        """Return a proxy of the model behind a handle."""
        model: Any = MultiProcessShared(self.make, tag=handle, spawn_process=True, always_proxy=True).acquire()
        served: CheckedModel = model
        return served

    def make(self) -> CheckedModel:
        """Load the model into this process."""
        return TorchModel(self.mb) if self.gpus is None else SimulatedModel(self.gpus, self.mb)
