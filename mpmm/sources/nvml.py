"""Memory figures from the NVIDIA driver's management library, through nvidia-ml-py.

A sample takes well under a millisecond, knows single processes and sees MIG slices as devices.

- A device that cannot be read has no figure; the others have theirs. After a failure NVML is shut down and initialised
  again, see `mpmm.sources.driver_library`.
- Silence is not a measurement. In a container the driver may list nothing, or the pids of the host, which mean
  nothing in here; if clients share a context (MPS) it may list the daemon in their place; under WSL it withholds
  what each process takes. So the source measures processes once the driver has shown what one of ours takes, one of
  those that the caller names or the one it is in, and until then nothing follows from its lists. If it withholds
  that, refuses the lists, or lists processes that do not exist here and none of ours, the source reports that it
  cannot measure processes, until one of ours is shown.
- A GPU that shares the host's memory (GB10, Jetson) reports no memory of its own, or counts the page cache as used:
  then its total and use are the host's, those of processes still the driver's; see `mpmm.sources.unified_memory`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from mpmm.sources.base import MIB, DeviceInfo, DeviceSample, larger_whole, unavailable
from mpmm.sources.driver_library import RETRY_S, LibrarySession, ProcessTrust, Sessions, without_figures
from mpmm.sources.unified_memory import counts_page_cache, is_not_told, unified_total_mb, unified_used_mb
from mpmm.sources.visible_devices import VISIBLE_VARIABLE, Gpu, Unit, devices_of, visible_units

__all__ = ["NvmlSource"]

MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE
_COMPUTING = "nvmlDeviceGetComputeRunningProcesses"
_DRAWING = "nvmlDeviceGetGraphicsRunningProcesses"
# The processes that share the context of an MPS daemon; old libraries and drivers do not have this list.
_SHARING = "nvmlDeviceGetMPSComputeRunningProcesses_v3"


class _Door:
    """The only place that calls pynvml: an NVMLError becomes None, and its text is kept in `error`.

    So does the error, of another type, that pynvml raises for a function that is newer than the driver's library.
    """

    def __init__(self, pynvml: ModuleType) -> None:
        self._pynvml = pynvml
        errors = (getattr(pynvml, name, None) for name in ("NVMLError", "NVMLLibraryMismatchError"))
        self._errors = tuple(error for error in errors if error is not None)
        self._missing: set[str] = set()
        self.error: str | None = None

    def ask_if_there(self, function: str, *arguments: Any) -> Any:
        """Do what `ask` does, but not again once library or driver have turned out not to have the function."""
        if function in self._missing or not hasattr(self._pynvml, function):
            return None
        answer = self.ask(function, *arguments)
        refusal = str(self.error)
        if "not found" in refusal.lower() or is_not_told(refusal):
            self._missing.add(function)
        return answer

    def ask(self, function: str, *arguments: Any) -> Any:
        """Return `pynvml.<function>(*arguments)`, or None (and `error` set) when the driver refuses."""
        try:
            answer = getattr(self._pynvml, function)(*arguments)
        except self._errors as error:
            self.error = str(error)
            return None
        self.error = None
        return answer


@dataclass(frozen=True, kw_only=True)
class _Session(LibrarySession):
    """An initialised NVML.

    unified: uuid of the GPU, if there is only one and it shares the host's memory.
    last: by uuid, the MB that each device had in use at the last sample, and the processes listed then.
    """

    door: _Door
    gpus: tuple[Gpu, ...]
    shut_down: str = "nvmlShutdown"
    unified: str | None = None
    last: dict[str, tuple[float, _Listing]] = field(default_factory=dict)


class NvmlSource:
    """All GPUs and MIG slices that `CUDA_VISIBLE_DEVICES` lets this process see."""

    name = "nvml"
    frees_late = True
    cheap = True
    ignores_names = True

    def __init__(self, retry_s: float = RETRY_S) -> None:
        """Initialise NVML. Raises SourceUnavailableError: no library, no driver, no visible device."""
        session = _open_session()
        self._devices = devices_of(visible_units(session.gpus, os.environ.get(VISIBLE_VARIABLE)))
        self._sessions = Sessions(session, _open_session, retry_s)
        self._trust = ProcessTrust()
        self._unified = session.unified
        if not self._devices:
            self.close()
            raise unavailable(
                self.name, f"none of {len(session.gpus)} GPU(s) has readable memory and is in {VISIBLE_VARIABLE}"
            )

    @property
    def measures_processes(self) -> bool:
        """Whether the driver has shown what a process of ours takes, and has not contradicted that since."""
        return self.process_knowledge is True

    @property
    def process_knowledge(self) -> bool | None:
        """Whether it has: None until one of ours was listed, or should have been; see the module.

        False while the driver refuses the lists or withholds figures, and once it has listed processes that do not
        exist here, until it shows one of ours.
        """
        return self._trust.knowledge

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the visible devices as they were at the start."""
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Read every device; one that fails has `used_mb` None. `server_pids` and this process are ours."""
        session = self._sessions.usable()
        if session is None:
            return without_figures(self._devices, self._sessions.trouble)
        ours = {os.getpid(), *server_pids}
        samples, listings = zip(*(_read(session, device, self._unified, ours) for device in self._devices), strict=True)
        self._sessions.doubted = any(sample.used_mb is None for sample in samples)
        self._judge([listing for listing in listings if listing is not None], ours)
        return self._trust.as_far_as_trusted(samples)

    def close(self) -> None:
        """Shut NVML down in this process (NVML counts users, so others in the process keep theirs)."""
        self._sessions.close()

    def _judge(self, listings: Sequence[_Listing], ours: Collection[int]) -> None:
        """Conclude from the lists of the devices that could be read whether, and how, the driver shows processes."""
        if not listings:
            return
        figures = {pid for listing in listings for pid in listing.figures}
        withheld = {pid for listing in listings for pid in listing.withheld}
        if not figures.isdisjoint(ours):
            self._trust.note_ours()
            return
        untold = all(not listing.is_told for listing in listings)
        all_withheld = untold or not withheld.isdisjoint(ours) or (bool(withheld) and not figures)
        self._trust.note_others(figures | withheld, withheld=all_withheld)


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
    unified = None
    if len(gpus) == 1 and list(handles) == [gpus[0].uuid] and _shares_host_memory(door, handles[gpus[0].uuid]):
        (unit,) = gpus[0].units
        unified = unit.uuid
        gpus = [replace(gpus[0], units=(replace(unit, total_mb=unified_total_mb()),))]
    return _Session(door=door, gpus=tuple(gpus), handles=handles, unified=unified)


def _shares_host_memory(door: _Door, board: Any) -> bool:
    memory = door.ask("nvmlDeviceGetMemoryInfo", board)
    if memory is None:
        return is_not_told(str(door.error))
    return counts_page_cache(memory.total / MIB, memory.free / MIB)


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
    instances = None
    if uuid.startswith("MIG-"):
        instances = (door.ask("nvmlDeviceGetGpuInstanceId", handle), door.ask("nvmlDeviceGetComputeInstanceId", handle))
    return Unit(uuid, str(name or uuid), None if memory is None else memory.total / MIB, instances)


@dataclass(frozen=True)
class _Listing:
    """The processes that the driver lists on a device. withheld: those without a figure.

    is_told: the driver returns the list of those that compute, even an empty one. Only this list counts here: MIG
        slices, for one, have no list of processes that draw.
    sharing: those that share the context of an MPS daemon.
    """

    figures: Mapping[int, float]
    withheld: Set[int]
    is_told: bool
    sharing: Set[int]


def _read(
    session: _Session, device: DeviceInfo, unified: str | None, ours: Collection[int]
) -> tuple[DeviceSample, _Listing | None]:
    """Return a device's sample and its list of processes, None if it cannot be read; unified: see `_Session`."""
    taken_ns = time.monotonic_ns()
    door, handle = session.door, session.handles.get(device.uuid)
    if handle is None:
        trouble = "not found"
        return DeviceSample(device.index, None, taken_ns, trouble=trouble, done_ns=time.monotonic_ns()), None

    def whole_mb() -> float | None:
        if device.uuid == unified:
            return unified_used_mb()
        memory = door.ask("nvmlDeviceGetMemoryInfo", handle)
        return None if memory is None else memory.used / MIB

    used_mb = whole_mb()
    listing = _processes(door, handle)
    # If all is as at the last sample, nothing has changed between the readings of the whole and its parts either.
    if (used_mb, listing) != session.last.get(device.uuid):
        used_mb = larger_whole(used_mb, whole_mb())
    done_ns = time.monotonic_ns()
    if used_mb is None:
        return DeviceSample(device.index, None, taken_ns, trouble=door.error, done_ns=done_ns), None
    session.last[device.uuid] = used_mb, listing
    figures = dict(listing.figures)
    if listing.sharing:
        _take_off_shared(figures, used_mb, {*listing.sharing, *ours})
    known = listing.is_told and not listing.withheld
    return DeviceSample(device.index, used_mb, taken_ns, figures, known, done_ns=done_ns), listing


def _processes(door: _Door, handle: Any) -> _Listing:
    figures: dict[int, float] = {}
    withheld: set[int] = set()
    is_told = True
    sharing: set[int] = set()
    for function in (_COMPUTING, _DRAWING, _SHARING):
        processes = door.ask_if_there(function, handle) if function == _SHARING else door.ask(function, handle)
        if processes is None:
            is_told = is_told and function != _COMPUTING
            continue
        for process in processes:
            if function == _SHARING:
                sharing.add(process.pid)
            if process.usedGpuMemory is None:
                withheld.add(process.pid)
            else:
                # A process that computes and draws is in both lists with the same memory: the largest, not the sum.
                figures[process.pid] = max(figures.get(process.pid, 0.0), process.usedGpuMemory / MIB)
    return _Listing(figures, withheld - figures.keys(), is_told, sharing)


def _take_off_shared(figures: dict[int, float], used_mb: float, clients: Collection[int]) -> None:
    """Subtract its clients' memory from an MPS daemon's: the driver may count it for both.

    figures: changed. clients: processes that are certainly not the daemon. The daemon is not marked as such; but memory
        beyond what the whole device has in use is counted twice, and the largest of the other processes has it all.
    """
    twice_mb = max(0.0, sum(figures.values()) - used_mb)
    for pid in sorted(figures.keys() - set(clients), key=lambda pid: -figures[pid]):
        off_mb = min(twice_mb, figures[pid])
        figures[pid] -= off_mb
        twice_mb -= off_mb
