"""Memory figures from the NVIDIA driver's management library, through nvidia-ml-py.

A sample takes well under a millisecond, knows single processes and sees MIG slices as devices. In a
container the driver reports the host's pids, which then match no pid in here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mpmm.sources.base import MIB, DeviceInfo, DeviceSample, SourceUnavailableError, unavailable
from mpmm.sources.visible_devices import VISIBLE_VARIABLE, Gpu, Unit, devices_of, visible_units

__all__ = ["NvmlSource"]

MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE


class _Door:
    """The one place that calls pynvml: an NVMLError becomes None, and its text is kept in `error`."""

    def __init__(self, pynvml: ModuleType) -> None:
        self._pynvml = pynvml
        self.error: str | None = None

    def ask(self, function: str, *arguments: Any) -> Any:
        """Return `pynvml.<function>(*arguments)`, or None (and `error` set) when the driver refuses."""
        try:
            answer = getattr(self._pynvml, function)(*arguments)
        except self._pynvml.NVMLError as error:
            self.error = str(error)
            return None
        self.error = None
        return answer


@dataclass(frozen=True)
class _Session:
    """An initialised NVML: good in one process only. `handles` is keyed by uuid."""

    pid: int
    door: _Door
    gpus: tuple[Gpu, ...]
    handles: dict[str, Any]


class NvmlSource:
    """All GPUs and MIG slices that `CUDA_VISIBLE_DEVICES` lets this process see.

    The session is one immutable object that is replaced as a whole, so that threads need no lock and a
    forked child, which must initialise NVML for itself, finds none held.
    """

    name = "nvml"
    measures_processes = True
    settles_late = True
    cheap = True

    def __init__(self) -> None:
        """Initialise NVML. Raises SourceUnavailableError: no library, no driver, no visible device."""
        session = _open_session()
        self._devices = devices_of(visible_units(session.gpus, os.environ.get(VISIBLE_VARIABLE)))
        self._session: _Session | None = session
        if not self._devices:
            self.close()
            raise unavailable(
                self.name, f"none of {len(session.gpus)} GPU(s) has readable memory and is in {VISIBLE_VARIABLE}"
            )

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the visible devices as they were at the start."""
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Read every device; one that fails has `used_mb` None. `server_pids` is not needed."""
        session = self._session
        if session is None or session.pid != os.getpid():
            try:
                session = self._session = _open_session()
            except SourceUnavailableError:
                taken_ns = time.monotonic_ns()
                return tuple(DeviceSample(device.index, None, taken_ns) for device in self._devices)
        return tuple(_read(session, device) for device in self._devices)

    def close(self) -> None:
        """Shut NVML down in this process (NVML counts users, so others in the process keep theirs)."""
        session, self._session = self._session, None
        if session is not None and session.pid == os.getpid():
            session.door.ask("nvmlShutdown")


def _open_session() -> _Session:
    try:
        import pynvml
    except ImportError as error:
        raise unavailable(NvmlSource.name, f"nvidia-ml-py is not installed ({error})") from error
    door = _Door(pynvml)
    door.ask("nvmlInit")
    if door.error is not None:
        raise unavailable(NvmlSource.name, door.error)
    gpus: list[Gpu] = []
    handles: dict[str, Any] = {}
    for number in range(door.ask("nvmlDeviceGetCount") or 0):
        board = door.ask("nvmlDeviceGetHandleByIndex", number)
        uuid = f"gpu{number}" if board is None else str(door.ask("nvmlDeviceGetUUID", board) or f"gpu{number}")
        # A board without a handle keeps its place, or the numbers in CUDA_VISIBLE_DEVICES would shift.
        parts = [] if board is None else [(uuid, board)]
        if board is not None and _mig_is_on(door, board):
            parts = _slices(door, board, uuid)
        handles.update(parts)
        gpus.append(Gpu(uuid, tuple(_unit(door, part_uuid, handle) for part_uuid, handle in parts)))
    return _Session(os.getpid(), door, tuple(gpus), handles)


def _mig_is_on(door: _Door, board: Any) -> bool:
    mode = door.ask("nvmlDeviceGetMigMode", board)  # [now, after the next reset]; None on boards without MIG
    return bool(mode) and mode[0] == MIG_ENABLED


def _slices(door: _Door, board: Any, board_uuid: str) -> list[tuple[str, Any]]:
    places = range(door.ask("nvmlDeviceGetMaxMigDeviceCount", board) or 0)
    handles = [(place, door.ask("nvmlDeviceGetMigDeviceHandleByIndex", board, place)) for place in places]
    return [
        (str(door.ask("nvmlDeviceGetUUID", handle) or f"MIG-{board_uuid}/{place}"), handle)
        for place, handle in handles
        if handle is not None
    ]


def _unit(door: _Door, uuid: str, handle: Any) -> Unit:
    memory = door.ask("nvmlDeviceGetMemoryInfo", handle)
    name = door.ask("nvmlDeviceGetName", handle)
    return Unit(uuid, str(name or uuid), None if memory is None else memory.total / MIB)


def _read(session: _Session, device: DeviceInfo) -> DeviceSample:
    taken_ns = time.monotonic_ns()
    handle = session.handles.get(device.uuid)
    memory = None if handle is None else session.door.ask("nvmlDeviceGetMemoryInfo", handle)
    if memory is None:
        return DeviceSample(device.index, None, taken_ns)
    return DeviceSample(device.index, memory.used / MIB, taken_ns, _processes(session.door, handle))


def _processes(door: _Door, handle: Any) -> dict[int, float]:
    """Return MiB per pid; a process whose figure the driver withholds is left out."""
    figures: dict[int, float] = {}
    for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        for process in door.ask(function, handle) or ():
            if process.usedGpuMemory is not None:
                # One that computes and draws is in both lists with the same memory: largest, not sum.
                figures[process.pid] = max(figures.get(process.pid, 0.0), process.usedGpuMemory / MIB)
    return figures
