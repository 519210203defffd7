"""Memory figures from the `nvidia-smi` program, for hosts where NVML itself cannot be loaded.

A sample starts a process, so it costs tens of milliseconds and, with a sick driver, can hang: every
call has a time-out.
"""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Sequence

from mpmm.sources.base import DeviceInfo, DeviceSample, unavailable
from mpmm.sources.visible_devices import VISIBLE_VARIABLE, Gpu, Unit, devices_of, visible_units

__all__ = ["NvidiaSmiSource"]

TIMEOUT_S = 5.0


class NvidiaSmiSource:
    """The GPUs that `nvidia-smi` lists, one line each, and `CUDA_VISIBLE_DEVICES` lets through.

    Used memory is total minus free, which counts what the driver reserves for itself; `memory.used` of
    newer drivers does not.
    """

    name = "nvidia-smi"
    measures_processes = False
    settles_late = True
    cheap = False

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        """List the GPUs. Raises SourceUnavailableError: no program, no driver, no visible device."""
        self._timeout_s = timeout_s
        try:
            totals = self._figures("memory.total")
        except Exception as error:
            raise unavailable(self.name, f"nvidia-smi not found or failed: {error}") from error
        gpus = []
        for number, (total_mb, (uuid, name)) in enumerate(zip(totals, self._labels(len(totals)), strict=True)):
            gpus.append(Gpu(uuid or f"gpu{number}", (Unit(uuid or f"gpu{number}", name, total_mb),)))
        lines = {gpu.uuid: line for line, gpu in enumerate(gpus)}
        self._devices = devices_of(visible_units(gpus, os.environ.get(VISIBLE_VARIABLE)))
        self._line_of = {device.index: lines[device.uuid] for device in self._devices}
        if not self._devices:
            raise unavailable(
                self.name, f"none of {len(gpus)} GPU(s) has a readable total and is in {VISIBLE_VARIABLE}"
            )

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the visible devices as they were at the start."""
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Run the program once; a line that is no number gives None. `server_pids` is not needed.

        Raises what the program's failure raises (subprocess.TimeoutExpired, OSError, …).
        """
        taken_ns = time.monotonic_ns()
        free = dict(enumerate(self._figures("memory.free")))
        return tuple(self._reading(device, free, taken_ns) for device in self._devices)

    def close(self) -> None:
        """Do nothing: no process runs between samples."""

    def _reading(self, device: DeviceInfo, free: dict[int, float | None], taken_ns: int) -> DeviceSample:
        free_mb = free.get(self._line_of[device.index])
        used_mb = None if free_mb is None else max(0.0, device.total_mb - free_mb)
        return DeviceSample(device.index, used_mb, taken_ns)

    def _figures(self, field: str) -> list[float | None]:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        output = subprocess.check_output(command, text=True, timeout=self._timeout_s)
        return [_number(line) for line in output.strip().splitlines()]

    def _labels(self, count: int) -> list[tuple[str, str]]:
        """Return (uuid, name) of each GPU; uuid is empty and name `gpu<n>` where the program does not say."""
        plain = [("", f"gpu{number}") for number in range(count)]
        command = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
        try:
            lines = subprocess.check_output(command, text=True, timeout=self._timeout_s).strip().splitlines()
        except Exception:  # names are a nicety: whatever keeps the program from telling them, go on without
            return plain
        labels = [(uuid.strip(), name.strip()) for uuid, _, name in (line.partition(",") for line in lines)]
        told = all(uuid and name and not uuid.startswith("[") for uuid, name in labels)
        return labels if told and len({uuid for uuid, _ in labels}) == count == len(labels) else plain


def _number(line: str) -> float | None:
    """Return the MiB that `line` says; None for `[N/A]`, `[Not Supported]` or junk."""
    try:
        value = float(line)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
