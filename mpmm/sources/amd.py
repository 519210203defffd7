"""Memory figures of AMD GPUs from AMD's management library, through its Python package `amdsmi` (extra `amd`).

The package comes with ROCm, or from PyPI for a ROCm that is installed already. Only memory on the device (VRAM)
counts, not the host's memory that a process has mapped (GTT).

- A device that cannot be read has no figure; the others have theirs. After a failure the library is shut down and
  initialised again, see `mpmm.sources.driver_library`.
- Silence is not a measurement. In a container the driver may list no process, or the pids of the host. So the source
  measures processes once it has shown what one of ours takes: one of those named to `sample`, or the process it is in.
  If it lists processes that do not exist here and none of ours, twice in a row, it reports that it cannot measure
  processes, until it shows one of ours.
- A list of processes makes the library look through `/proc`, which takes milliseconds. So a sample is not cheap.
- `ROCR_VISIBLE_DEVICES` and `HIP_VISIBLE_DEVICES` are read as the runtimes read them, see `visible_gpus`. A model
  server gets its devices in the latter, as numbers among those that the former shows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mpmm.sources.base import MIB, DeviceInfo, DeviceSample, larger_whole, unavailable
from mpmm.sources.driver_library import RETRY_S, LibrarySession, ProcessTrust, Sessions, without_figures
from mpmm.sources.visible_devices import VISIBLE_VARIABLE

__all__ = ["HIP_VARIABLE", "ROCR_VARIABLE", "AmdGpu", "AmdSource", "rocr_visible", "visible_gpus"]

ROCR_VARIABLE = "ROCR_VISIBLE_DEVICES"
HIP_VARIABLE = "HIP_VISIBLE_DEVICES"
# How the runtimes write a GPU's unique id, and the fewest and the most of its characters that a list may have.
_RUNTIME_UUID = "GPU-{:016x}"
_LEAST_UUID, _MOST_UUID = 5, 20


@dataclass(frozen=True)
class AmdGpu:
    """One GPU, or one partition of it.

    total_mb: None = could not be read. runtime_uuid: its name in `ROCR_VISIBLE_DEVICES`; None if it is not known.
    """

    uuid: str
    name: str
    total_mb: float | None
    runtime_uuid: str | None = None


def rocr_visible(gpus: Sequence[AmdGpu], setting: str | None) -> list[AmdGpu]:
    """Return the GPUs that `ROCR_VISIBLE_DEVICES` lets through, in its order.

    gpus: all of them, in the driver's order. setting: None lets everything through, an empty text nothing. Otherwise
    numbers, or beginnings of uuids (`GPU-…`, in capitals or not), in any mixture. The list ends before the first entry
    that matches nothing, more than one GPU, or one that was named before.
    """
    if setting is None:
        return list(gpus)
    chosen: list[AmdGpu] = []
    for entry in (part.strip().upper() for part in setting.split(",")):
        gpu = _by_uuid(gpus, entry) if entry.startswith("G") else _by_number(gpus, entry, base=0)
        if gpu is None or gpu in chosen:
            break
        chosen.append(gpu)
    return chosen


def visible_gpus(gpus: Sequence[AmdGpu], rocr: str | None, hip: str | None, cuda: str | None) -> list[AmdGpu]:
    """Return the GPUs that a process sees, in the order in which it counts them.

    rocr, hip, cuda: the settings of these names, None if they are not set. HIP reads `HIP_VISIBLE_DEVICES`, or
    `CUDA_VISIBLE_DEVICES` if that is empty; if both are empty, nothing is restricted. It numbers the GPUs that `rocr`
    has let through. Its list ends before the first entry that matches nothing; a repeated entry changes nothing.
    """
    there = rocr_visible(gpus, rocr)
    setting = hip or cuda
    if not setting:
        return there
    chosen: list[AmdGpu] = []
    for entry in setting.split(","):
        if "GPU-" in entry:
            gpu = next((gpu for gpu in there if gpu.runtime_uuid and entry.lower() in gpu.runtime_uuid.lower()), None)
        else:
            gpu = _by_number(there, entry, base=10)
        if gpu is None:
            break
        if gpu not in chosen:
            chosen.append(gpu)
    return chosen


def _by_number(gpus: Sequence[AmdGpu], entry: str, base: int) -> AmdGpu | None:
    """Return the GPU of a number; base 0: in any notation, 10: only in plain decimal notation."""
    try:
        number = int(entry, base)
    except ValueError:
        return None
    if base == 10 and entry != str(number):
        return None
    return gpus[number] if 0 <= number < len(gpus) else None


def _by_uuid(gpus: Sequence[AmdGpu], entry: str) -> AmdGpu | None:
    if not _LEAST_UUID <= len(entry) <= _MOST_UUID:
        return None
    found = [gpu for gpu in gpus if gpu.runtime_uuid and gpu.runtime_uuid.upper().startswith(entry)]
    return found[0] if len(found) == 1 else None


class _Door:
    """The only place that calls amdsmi: a failure becomes None, and its text is kept in `error`."""

    def __init__(self, amdsmi: ModuleType) -> None:
        self._amdsmi = amdsmi
        self.error: str | None = None

    @property
    def device_memory(self) -> Any:
        """The kind of memory that counts."""
        return self._amdsmi.AmdSmiMemoryType.VRAM

    def ask(self, function: str, *arguments: Any) -> Any:
        """Return `amdsmi.<function>(*arguments)`, or None (and `error` set) when the library refuses."""
        call = getattr(self._amdsmi, function, None)
        if call is None:
            self.error = f"this version of amdsmi has no {function}"
            return None
        try:
            answer = call(*arguments)
        except (self._amdsmi.AmdSmiException, ValueError) as error:  # texts that it cannot decode are ValueErrors
            self.error = " ".join(str(error).split()) or type(error).__name__
            return None
        self.error = None
        return answer


@dataclass(frozen=True, kw_only=True)
class _Session(LibrarySession):
    """An initialised library."""

    door: _Door
    gpus: tuple[AmdGpu, ...]
    shut_down: str = "amdsmi_shut_down"


class AmdSource:
    """All AMD GPUs that `ROCR_VISIBLE_DEVICES` and `HIP_VISIBLE_DEVICES` let this process see."""

    name = "amdsmi"
    frees_late = True
    cheap = False
    ignores_names = True

    def __init__(self, retry_s: float = RETRY_S) -> None:
        """Initialise the library. Raises SourceUnavailableError: no package, no driver, no visible device."""
        session = _open_session()
        rocr = os.environ.get(ROCR_VARIABLE)
        hip, cuda = os.environ.get(HIP_VARIABLE), os.environ.get(VISIBLE_VARIABLE)
        # HIP's numbers for them in a model server, which has this process's environment except for its own setting.
        self._numbers = {gpu.uuid: number for number, gpu in enumerate(rocr_visible(session.gpus, rocr))}
        self._devices = tuple(
            DeviceInfo(index, gpu.uuid, gpu.name, gpu.total_mb)
            for index, gpu in enumerate(visible_gpus(session.gpus, rocr, hip, cuda))
            if gpu.total_mb is not None
        )
        self._sessions = Sessions(session, _open_session, retry_s)
        self._trust = ProcessTrust()
        if not self._devices:
            self.close()
            raise unavailable(
                self.name,
                f"none of {len(session.gpus)} GPU(s) has readable memory and is in {ROCR_VARIABLE} and {HIP_VARIABLE}",
            )

    @property
    def measures_processes(self) -> bool:
        """Whether the library has shown what a process of ours takes, and has not contradicted that since."""
        return self.process_knowledge is True

    @property
    def process_knowledge(self) -> bool | None:
        """Whether it has: None until one of ours is listed, False if it lists only others, or refuses the lists."""
        return self._trust.knowledge

    def server_setting(self, uuids: Sequence[str]) -> tuple[str, str] | None:
        """Return the variable, and its value, that show a model server these devices alone."""
        numbers = [self._numbers.get(uuid) for uuid in uuids]
        if not numbers or None in numbers:
            return None
        return HIP_VARIABLE, ",".join(map(str, numbers))

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the visible devices as they were at the start."""
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Read every device; one that fails has `used_mb` None. `server_pids` and this process are ours."""
        session = self._sessions.usable()
        if session is None:
            return without_figures(self._devices, self._sessions.trouble)
        samples = tuple(_read(session, device) for device in self._devices)
        read = [sample for sample in samples if sample.used_mb is not None]
        self._sessions.doubted = len(read) < len(samples)
        self._judge(read, {os.getpid(), *server_pids})
        return self._trust.as_far_as_trusted(samples)

    def close(self) -> None:
        """Shut the library down in this process. It counts its users, so others in the process keep theirs."""
        self._sessions.close()

    def _judge(self, read: Sequence[DeviceSample], ours: Collection[int]) -> None:
        """Conclude from the devices that could be read whether, and how, the library shows processes."""
        if not read:
            return
        figures: dict[int, float] = {}
        for sample in read:
            for pid, mb in sample.process_mb.items():
                figures[pid] = figures.get(pid, 0.0) + mb
        # 0 is the figure of a process that has only opened the device, and of every process if figures are withheld.
        if any(figures.get(pid, 0.0) > 0 for pid in ours):
            self._trust.note_ours()
            return
        self._trust.note_others(figures.keys(), withheld=not any(sample.processes_known for sample in read))


def _open_session() -> _Session:
    try:
        import amdsmi
    except Exception as error:  # without ROCm's library the import fails with whatever it stumbles over
        raise unavailable(AmdSource.name, f"the package amdsmi cannot be imported ({error!r})") from error
    door = _Door(amdsmi)
    door.ask("amdsmi_init")
    if door.error is not None:
        raise unavailable(AmdSource.name, door.error)
    boards = door.ask("amdsmi_get_processor_handles") or []
    gpus: list[AmdGpu] = []
    handles: dict[str, Any] = {}
    for number, handle in enumerate(_in_runtime_order(door, boards)):
        gpu = _describe(door, number, handle)
        gpus.append(gpu)
        handles[gpu.uuid] = handle
    return _Session(door=door, gpus=tuple(gpus), handles=handles)


def _in_runtime_order(door: _Door, handles: Sequence[Any]) -> list[Any]:
    """Return the GPUs in the order in which the runtimes count them, that of the kernel's nodes, if it is known."""
    nodes: dict[int, Any] = {}
    for handle in handles:
        node = (door.ask("amdsmi_get_gpu_kfd_info", handle) or {}).get("node_id")
        if not isinstance(node, int) or node in nodes:
            return list(handles)
        nodes[node] = handle
    return [nodes[node] for node in sorted(nodes)]


def _describe(door: _Door, number: int, handle: Any) -> AmdGpu:
    uuid = str(door.ask("amdsmi_get_gpu_device_uuid", handle) or f"amd{number}")
    about = door.ask("amdsmi_get_gpu_asic_info", handle) or {}
    name = about.get("market_name")
    total = door.ask("amdsmi_get_gpu_memory_total", handle, door.device_memory)
    try:
        runtime_uuid = _RUNTIME_UUID.format(int(str(about.get("asic_serial")), 16))
    except ValueError:  # "N/A", or nothing
        runtime_uuid = None
    return AmdGpu(uuid, uuid if name in (None, "", "N/A") else str(name), total / MIB if total else None, runtime_uuid)


def _read(session: _Session, device: DeviceInfo) -> DeviceSample:
    """Return a device's sample; here `processes_known` only means that the list had a figure for each."""
    taken_ns = time.monotonic_ns()
    door, handle = session.door, session.handles.get(device.uuid)
    if handle is None:
        return DeviceSample(device.index, None, taken_ns, trouble="not found", done_ns=time.monotonic_ns())
    before = door.ask("amdsmi_get_gpu_memory_usage", handle, door.device_memory)
    process_mb, known = _processes(door, handle)
    used = larger_whole(before, door.ask("amdsmi_get_gpu_memory_usage", handle, door.device_memory))
    done_ns = time.monotonic_ns()
    if used is None:
        return DeviceSample(device.index, None, taken_ns, trouble=door.error, done_ns=done_ns)
    return DeviceSample(device.index, used / MIB, taken_ns, process_mb, known, done_ns=done_ns)


def _processes(door: _Door, handle: Any) -> tuple[dict[int, float], bool]:
    """Return MiB per pid, and whether that is all: the library may withhold a figure, or the list."""
    processes = door.ask("amdsmi_get_gpu_process_list", handle)
    if processes is None:
        return {}, False
    figures: dict[int, float] = {}
    known = True
    for process in processes:
        used = (process.get("memory_usage") or {}).get("vram_mem")
        if not isinstance(used, int):  # "N/A"
            known = False
            continue
        # A process that is listed twice has the same memory in both entries: the largest, not the sum.
        figures[process["pid"]] = max(figures.get(process["pid"], 0.0), used / MIB)
    return figures, known
