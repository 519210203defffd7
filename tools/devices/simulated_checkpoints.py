"""The driver's checkpoint calls on simulated GPUs: their behaviour, and what they have moved to host memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

from devices.simulated_files import MAX_GPUS, MIB, read_bytes, start_of, write

__all__ = ["CHECKPOINTED", "FAILED", "LOCKED", "RUNNING", "SimulatedCheckpoints"]

# States of a process for the driver's checkpoint calls.
RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
# How often a process checks whether it is still locked.
LOOK_S = 0.005


class SimulatedCheckpoints:
    """Lets tests and tools steer and watch `simulated_cuda.c`, in a directory of simulated GPUs."""

    def __init__(self, folder: Path) -> None:
        """folder: that of the GPUs."""
        self._folder = folder

    # ---- how calls behave ----------------------------------------------------------------------------------

    def set_rates(self, checkpoint_mb_s: float, restore_mb_s: float) -> None:
        """Set the rates of checkpoints and restores; 0: everything at once."""
        write(self._folder / "cuda_rates", f"checkpoint {checkpoint_mb_s}\nrestore {restore_mb_s}\n")

    def fail_call(self, call: str, error: int) -> None:
        """Let a call of the driver (`cuInit`, `state`, `lock`, `checkpoint`, `restore`, `unlock`) fail; 0 ends it."""
        write(self._folder / "cuda_error", f"{call} {error}\n" if error else "")

    def hang_call(self, call: str, seconds: float) -> None:
        """Let a call of the driver begin `seconds` late."""
        self.delay_calls(**{call: seconds})

    def delay_calls(self, **seconds: float) -> None:
        """Let each of these calls of the driver begin late by its seconds; the others begin at once."""
        write(self._folder / "cuda_hang", "".join(f"{call} {late}\n" for call, late in seconds.items()))

    def keep_busy(self, seconds: float) -> None:
        """Let every process have `seconds` of submitted work, for which a lock waits."""
        write(self._folder / "cuda_busy", f"lock {seconds}\n")

    def kill_caller(self, call: str, after_mb: float, leaves: int) -> None:
        """Let the next caller of `checkpoint` or `restore` be killed before it has moved `after_mb`; below 0 ends it.

        leaves: the state of the process after that.
        """
        write(self._folder / "cuda_die", f"{call} {round(after_mb * MIB)} {leaves}\n" if after_mb >= 0 else "")

    # ---- what they have done -------------------------------------------------------------------------------

    def state_of(self, pid: int) -> int:
        """Return the state of a process: RUNNING, LOCKED, CHECKPOINTED or FAILED."""
        return read_bytes(self._folder / "host" / f"state_{pid}_{start_of(pid)}")

    def await_running(self) -> None:
        """Block like a CUDA call while the process is locked or checkpointed."""
        while self.state_of(os.getpid()) != RUNNING:
            time.sleep(LOOK_S)

    def host_mb(self) -> float:
        """Return the MB that living processes have in host memory instead of on their devices."""
        return sum(self.host_process_mb().values())

    def host_process_mb(self) -> dict[int, float]:
        """Return these MB for each process."""
        found: dict[int, float] = {}
        for path in (self._folder / "host").glob("gpu*_*_*"):
            _, pid, started = path.name.split("_")
            if start_of(int(pid)) == started:
                found[int(pid)] = found.get(int(pid), 0.0) + read_bytes(path) / MIB
        return found

    def host_mb_of(self, pid: int) -> float:
        """Return the MB that a living process has in host memory instead of on its devices."""
        started = start_of(pid)
        places = (self._folder / "host" / f"gpu{number}_{pid}_{started}" for number in range(MAX_GPUS))
        return sum(map(read_bytes, places)) / MIB
