"""Memory figures from the NVIDIA driver's management library, through nvidia-ml-py.

A sample takes well under a millisecond, knows single processes and sees MIG slices as devices.

- A device that cannot be read has no figure; the others have theirs. After a failure NVML is shut down and
  initialised again, at most every `RETRY_S`, because a GPU that was reset, or a driver that was reloaded, is
  only found that way.
- In a container the driver may tell the pids of the host, which mean nothing in here, or something else. When
  it names processes that do not exist here and none of those the caller knows, the source says that it cannot
  measure processes, until it sees one of those.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from mpmm.sources.base import MIB, DeviceInfo, DeviceSample, SourceUnavailableError, unavailable
from mpmm.sources.visible_devices import VISIBLE_VARIABLE, Gpu, Unit, devices_of, visible_units

__all__ = ["NvmlSource"]

MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE
RETRY_S = 2.0
_COMPUTING = "nvmlDeviceGetComputeRunningProcesses"
_DRAWING = "nvmlDeviceGetGraphicsRunningProcesses"


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
    """An initialised NVML: good in one process only. `handles` is keyed by uuid; `ended` is held from the end on."""

    pid: int
    door: _Door
    gpus: tuple[Gpu, ...]
    handles: Mapping[str, Any]
    ended: Any = field(default_factory=threading.Lock)


class NvmlSource:
    """All GPUs and MIG slices that `CUDA_VISIBLE_DEVICES` lets this process see.

    The session is one object that is replaced as a whole, so that threads need no lock and a forked child,
    which must initialise NVML for itself, finds none held.
    """

    name = "nvml"
    settles_late = True
    cheap = True

    def __init__(self, retry_s: float = RETRY_S) -> None:
        """Initialise NVML. Raises SourceUnavailableError: no library, no driver, no visible device."""
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._doubted = False  # the last sample lacked figures
        self._trouble: str | None = None  # why NVML could not be initialised again
        self._lists_refused = False
        self._foreign_pids = False
        self._strangers: frozenset[int] = frozenset()  # pids in the last sample that do not exist here
        session = _open_session()
        self._devices = devices_of(visible_units(session.gpus, os.environ.get(VISIBLE_VARIABLE)))
        self._session: _Session | None = session
        if not self._devices:
            self.close()
            raise unavailable(
                self.name, f"none of {len(session.gpus)} GPU(s) has readable memory and is in {VISIBLE_VARIABLE}"
            )
        self.sample(())  # tells whether there are lists of processes

    @property
    def measures_processes(self) -> bool:
        """Whether the driver lists processes, with their memory and, as far as one can see, pids of in here."""
        return not (self._lists_refused or self._foreign_pids)

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the visible devices as they were at the start."""
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Read every device; one that fails has `used_mb` None. `server_pids` show whether pids are ours."""
        session = self._usable_session()
        if session is None:
            taken_ns = time.monotonic_ns()
            return tuple(
                DeviceSample(device.index, None, taken_ns, trouble=self._trouble, done_ns=time.monotonic_ns())
                for device in self._devices
            )
        samples = tuple(_read(session, device) for device in self._devices)
        self._doubted = any(sample.used_mb is None for sample in samples)
        read = [sample for sample in samples if sample.used_mb is not None]
        if read:
            self._lists_refused = not all(sample.processes_known for sample in read)
        self._judge_pids({pid for sample in read for pid in sample.process_mb}, server_pids)
        if not self._foreign_pids:
            return samples
        return tuple(replace(sample, process_mb={}, processes_known=False) for sample in samples)

    def close(self) -> None:
        """Shut NVML down in this process (NVML counts users, so others in the process keep theirs)."""
        session, self._session = self._session, None
        self._retry_at = 0.0
        if session is not None:
            _shut_down(session)

    def _usable_session(self) -> _Session | None:
        """Return a session of this process, a new one where that is due; None when NVML does not start."""
        old, now = self._session, time.monotonic()
        if old is not None and old.pid == os.getpid():
            if not self._doubted or now < self._retry_at or not _shut_down(old):
                return old
        elif old is None and now < self._retry_at:
            return None
        self._retry_at = now + self._retry_s
        try:
            new = _open_session()
        except SourceUnavailableError as error:
            self._session, self._trouble = None, error.reason
            return None
        other = self._session
        if other is not None and other is not old and other.pid == os.getpid():
            _shut_down(new)  # another thread was faster
            return other
        self._session = new
        return new

    def _judge_pids(self, told: Collection[int], ours: Collection[int]) -> None:
        """Conclude from the pids that the driver tells whether they are those of this pid namespace."""
        if not self._strangers and not self._foreign_pids and not told:
            return
        if any(pid in told for pid in ours):
            self._strangers, self._foreign_pids = frozenset(), False
            return
        strangers = frozenset(pid for pid in told if not _exists(pid))
        # One that does not exist may have just ended, but not twice in a row.
        if strangers & self._strangers:
            self._foreign_pids = True
        self._strangers = strangers


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _shut_down(session: _Session) -> bool:
    """End a session of this process. Returns False when that is done already, or it is another process's."""
    if session.pid != os.getpid() or not session.ended.acquire(blocking=False):
        return False
    session.door.ask("nvmlShutdown")
    return True


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
    instances = None
    if uuid.startswith("MIG-"):
        parts = [door.ask(f"nvmlDeviceGet{kind}InstanceId", handle) for kind in ("Gpu", "Compute")]
        instances = (parts[0], parts[1]) if None not in parts else None
    return Unit(uuid, str(name or uuid), None if memory is None else memory.total / MIB, instances)


def _read(session: _Session, device: DeviceInfo) -> DeviceSample:
    taken_ns = time.monotonic_ns()
    door, handle = session.door, session.handles.get(device.uuid)
    # The parts before the whole: what a process takes in between is then in the whole for certain, and what is booked
    # for it still stands; the other way round, it would be in neither.
    process_mb, known = ({}, False) if handle is None else _processes(door, handle)
    memory = None if handle is None else door.ask("nvmlDeviceGetMemoryInfo", handle)
    done_ns = time.monotonic_ns()
    if memory is None:
        trouble = "not found" if handle is None else door.error
        return DeviceSample(device.index, None, taken_ns, trouble=trouble, done_ns=done_ns)
    return DeviceSample(device.index, memory.used / MIB, taken_ns, process_mb, known, done_ns=done_ns)


def _processes(door: _Door, handle: Any) -> tuple[dict[int, float], bool]:
    """Return MiB per pid, and whether that is all: the driver may withhold a figure, or a list.

    Only computing counts for that: slices, for one, have no list of processes that draw.
    """
    figures: dict[int, float] = {}
    known = True
    for function in (_COMPUTING, _DRAWING):
        processes = door.ask(function, handle)
        if processes is None:
            known = known and function != _COMPUTING
            continue
        for process in processes:
            if process.usedGpuMemory is None:
                known = False
            else:
                # One that computes and draws is in both lists with the same memory: largest, not sum.
                figures[process.pid] = max(figures.get(process.pid, 0.0), process.usedGpuMemory / MIB)
    return figures, known
