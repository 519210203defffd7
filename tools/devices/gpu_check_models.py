"""The models of `gpu_check.py`: servers that hold GPU memory, and report how much.

With torch, a model is a module with blocks of CUDA memory as its parameters. On a simulated GPU it declares its memory
and that of a CUDA context, which a real process would have.

In a model with a seed, every strip of the weights differs from the others, and each use compares all of them with
what was written there.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from devices.simulated_gpu import SimulatedGpus
from mpmm import MultiProcessShared

__all__ = ["CONTEXT_MB", "CheckedModel", "Figures", "Loader", "WrongWeightsError"]

MIB = 2**20
# Parameters are cut into blocks, as those of real models are.
BLOCK_MB = 256
# On a simulated GPU: what a process takes besides its tensors.
CONTEXT_MB = 300.0
# How many weights of a model with a seed are written, and compared, at a time: 16 MB.
STRIP = 2**23
GRAPH_SIDE = 64
LOAD_S, INFERENCE_S = 0.05, 0.003


@dataclass(frozen=True)
class Figures:
    """A process's own report: its tensors, what torch has reserved for them, and the device's use according to CUDA."""

    pid: int
    tensors_mb: float
    taken_mb: float
    device_used_mb: float


class CheckedModel(Protocol):
    """A model in its server."""

    def infer(self) -> int:
        """Work on all of the weights for a moment; return the pid. Raises WrongWeightsError for wrong ones."""

    def figures(self) -> Figures:
        """Return the process's own figures."""

    def capture(self) -> None:
        """Capture a CUDA graph that reads some weights; only for a model with a seed."""

    def replay(self) -> bool:
        """Tell whether the graph still yields its first result."""


class WrongWeightsError(Exception):
    """Weights are not what was written there."""


class TorchModel:
    """Weights of a given size on `cuda:0`: all of them 1, or by a seed."""

    def __init__(self, mb: float, seed: int | None = None) -> None:
        import torch

        self._torch = torch
        self._module = torch.nn.Module()
        left = round(mb)
        while left > 0:
            block = torch.ones(min(left, BLOCK_MB) * MIB // 2, dtype=torch.float16, device="cuda")
            self._module.register_parameter(f"block{left}", torch.nn.Parameter(block, requires_grad=False))
            left -= BLOCK_MB
        self._pattern: Any = None
        if seed is not None:
            random = torch.Generator("cuda").manual_seed(seed)
            self._pattern = torch.randint(-30000, 30000, (STRIP,), generator=random, dtype=torch.int16, device="cuda")
            for number, strip in enumerate(self._strips()):
                strip.copy_(self._pattern[: len(strip)]).add_(number)
            # Now, so that later uses take no more memory.
            self.infer()
        torch.cuda.synchronize()

    def _strips(self) -> Iterator[Any]:
        """Yield the weights in parts, as integers: as floats, some would be NaN and not equal themselves."""
        for block in self._module.parameters():
            yield from block.data.view(self._torch.int16).split(STRIP)

    def infer(self) -> int:
        """Compare a part of every block, with a seed all of it, with what was written there."""
        if self._pattern is not None:
            wrong = self._torch.zeros((), dtype=self._torch.int64, device="cuda")
            for number, strip in enumerate(self._strips()):
                wrong += (strip != self._pattern[: len(strip)] + number).any()
            if int(wrong):
                raise WrongWeightsError(f"{int(wrong)} parts of the weights are not what was written there")
            return os.getpid()
        for block in self._module.parameters():
            found = float(block[:: max(1, len(block) // 1000)].float().mean())
            if found != 1.0:
                raise WrongWeightsError(f"weights are {found}, not 1")
        return os.getpid()

    def capture(self) -> None:
        """See `CheckedModel`. All numbers are whole and below 2**24, so every order of sums yields the same."""
        torch = self._torch
        strip = next(self._strips())
        self._input = torch.full((GRAPH_SIDE, GRAPH_SIDE), 3.0, device="cuda")

        def work() -> Any:
            return strip[: GRAPH_SIDE**2].view(GRAPH_SIDE, GRAPH_SIDE).float() @ self._input

        self._expected = work().cpu()
        # A library must not do its setup of the first call while a graph is captured.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            work()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = work()

    def replay(self) -> bool:
        """See `CheckedModel`."""
        self._output.zero_()
        self._graph.replay()
        self._torch.cuda.synchronize()
        return bool(self._torch.equal(self._output.cpu(), self._expected))

    def figures(self) -> Figures:
        """See `CheckedModel`."""
        cuda = self._torch.cuda
        free, total = cuda.mem_get_info()
        return Figures(
            os.getpid(), cuda.memory_allocated() / MIB, cuda.memory_reserved() / MIB, float(total - free) / MIB
        )


class SimulatedModel:
    """The same, declared on a simulated GPU."""

    def __init__(self, gpus: SimulatedGpus, mb: float, seed: int | None = None) -> None:
        self._gpus = gpus
        self._mb = mb
        self._seed = seed
        gpus.allocate(mb + CONTEXT_MB)
        time.sleep(LOAD_S)

    def infer(self) -> int:
        """Take a moment; with a seed, check that all memory is on the device."""
        time.sleep(INFERENCE_S)
        if self._seed is not None:
            self._gpus.checkpoints.await_running()
            there_mb = self._gpus.device_mb_of(os.getpid(), self._gpus.current_device())
            if abs(there_mb - self._mb - CONTEXT_MB) > 0.01:
                raise WrongWeightsError(f"{there_mb:g} of {self._mb + CONTEXT_MB:g} MB are on the device")
        return os.getpid()

    def capture(self) -> None:
        """Nothing to capture."""

    def replay(self) -> bool:
        """See `CheckedModel`; a locked process cannot make the call that launches a graph."""
        self._gpus.checkpoints.await_running()
        return True

    def figures(self) -> Figures:
        """See `CheckedModel`."""
        used_mb = self._gpus.used_mb(self._gpus.current_device())
        return Figures(os.getpid(), self._mb, self._mb, used_mb)


@dataclass(frozen=True)
class Loader:
    """A loader of a model of `mb`, with torch or on simulated GPUs; a call starts a server and returns its handle.

    load_s: the least time that a load takes, as if the weights were read from a disk.
    """

    mb: float
    gpus: SimulatedGpus | None
    seed: int | None = None
    load_s: float = 0.0

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
        ends = time.monotonic() + self.load_s
        model: CheckedModel
        model = TorchModel(self.mb, self.seed) if self.gpus is None else SimulatedModel(self.gpus, self.mb, self.seed)
        time.sleep(max(0.0, ends - time.monotonic()))
        return model
