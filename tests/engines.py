"""Objects in model servers whose memory is that of processes that they start, as some inference engines do."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from device import SimulatedDevice
from devices.process_state import lives
from loaders import MakesServed, Served

if TYPE_CHECKING:
    from devices.simulated_gpu import SimulatedGpus

    from mpmm.sources import DeviceSample

# It takes memory of a simulated device, and of the host, says so, and lives until its parent closes its standard input,
# if only by its end.
ENGINE = """
import pickle, sys
_, imports, device, mb, host_mb = sys.argv
sys.path[:0] = imports.split(":")
ballast = b"x" * (int(host_mb) << 20)
device = pickle.loads(bytes.fromhex(device))
if device is not None:
    device.allocate(float(mb))
print("full", flush=True)
sys.stdin.read()
"""


def engine_command(device: SimulatedDevice | SimulatedGpus | None, mb: float, host_mb: int = 0) -> list[str]:
    """Return the command of a process that takes memory of a device, if any, and of the host."""
    return [sys.executable, "-c", ENGINE, ":".join(sys.path), pickle.dumps(device).hex(), str(mb), str(host_mb)]


class ListingDevice(SimulatedDevice):
    """A device whose source lists all processes, and what each of them takes, as NVML does."""

    name = "lists"
    measures_processes = True
    ignores_names = True

    def process_mb(self) -> dict[int, float]:
        """Return what each living process takes."""
        taking: dict[int, float] = {}
        for name in os.listdir(self._folder / "0"):
            _, pid, mb, _ = name.split("_")
            if lives(int(pid)):
                taking[int(pid)] = taking.get(int(pid), 0.0) + float(mb)
        return taking

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        from mpmm.sources import DeviceSample

        taken, taking = time.monotonic_ns(), self.process_mb()
        return (DeviceSample(0, sum(taking.values()), taken, taking, True, done_ns=time.monotonic_ns()),)


class Engine(Served):
    """An object that has started a process, which takes memory."""

    def __init__(
        self, device: SimulatedDevice | SimulatedGpus | None, mb: float, engine_mb: float, host_mb: int
    ) -> None:
        super().__init__()
        if device is not None and mb:
            device.allocate(mb)
        command = engine_command(device, engine_mb, host_mb)
        self._engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._engine.stdout is not None
        assert self._engine.stdout.readline() == b"full\n"


@dataclass(frozen=True)
class MakesEngine(MakesServed):
    """The constructor of an `Engine`. mb: what the server takes itself; engine_mb, host_mb: what its process takes."""

    engine_mb: float = 0.0
    host_mb: int = 0

    def __call__(self) -> Engine:
        """Make it."""
        return Engine(self.device, self.mb, self.engine_mb, self.host_mb)
