"""A stand-in for AMD's Python package `amdsmi`; tests put its folder on `sys.path` or PYTHONPATH.

It has the functions that mpmm calls, with their types and failures: it answers only between `amdsmi_init` and
`amdsmi_shut_down`, returns bytes, and raises `AmdSmiLibraryException`. `AmdGpus.describe` describes the GPUs in the
folder $AMDSMI_STAND_IN; `AmdGpus.allocate` declares memory on them, a file that counts while its process lives.
"""

from __future__ import annotations

import itertools
import json
import os
from enum import IntEnum
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "AMDSMI_STAND_IN"
MIB = 2**20
_numbers = itertools.count(1)
# By pid, because a forked child has not initialised the library.
users: dict[int, int] = {}


class AmdSmiException(Exception):
    """The base of the package's errors."""


class AmdSmiLibraryException(AmdSmiException):
    """An error of the library."""


class AmdSmiMemoryType(IntEnum):
    """Kinds of memory."""

    VRAM = 0
    VIS_VRAM = 1
    GTT = 2


class AmdGpus:
    """The GPUs in a folder; every process can make one of these for the same folder. Can be pickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self, *gpus: dict[str, Any], init_error: str | None = None) -> None:
        """Set the GPUs, in the library's order; see `gpu`."""
        (self.folder / "taken").mkdir(exist_ok=True)
        draft = self.folder / f"draft{next(_numbers)}"
        draft.write_text(json.dumps({"gpus": gpus, "init_error": init_error}))
        draft.replace(self.folder / "gpus")

    def read(self) -> dict[str, Any]:
        """Return what `describe` has written."""
        found: dict[str, Any] = json.loads((self.folder / "gpus").read_text())
        return found

    def allocate(self, mb: float) -> None:
        """Take memory for this process on the first GPU that HIP would show it."""
        nodes = sorted(range(len(gpus := self.read()["gpus"])), key=lambda number: gpus[number]["node_id"] or number)
        first = int(os.environ.get("HIP_VISIBLE_DEVICES", "0").partition(",")[0])
        (self.folder / "taken" / f"{nodes[first]}_{os.getpid()}_{mb}_{next(_numbers)}").touch()

    def taken_mb(self, number: int) -> dict[int, float]:
        """Return the memory of living processes on a GPU, by pid."""
        found: dict[int, float] = {}
        for name in os.listdir(self.folder / "taken"):
            gpu, pid, mb, _ = name.split("_")
            if int(gpu) == number and _lives(int(pid)):
                found[int(pid)] = found.get(int(pid), 0.0) + float(mb)
        return found


def gpu(uuid: str, total_mb: float | None, used_mb: float = 0.0, **more: Any) -> dict[str, Any]:
    """Return the description of a GPU.

    more: name and serial (texts), node_id (of the kernel), processes ({pid: MB, or None if withheld}, or None if the
    list is refused), broken (the error that every question gets).
    """
    rest: dict[str, Any] = {"name": "N/A", "serial": "N/A", "node_id": None, "processes": {}, "broken": None}
    return {"uuid": uuid, "total_mb": total_mb, "used_mb": used_mb, **rest, **more}


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _gpus() -> AmdGpus:
    if FOLDER_VARIABLE not in os.environ:
        raise AmdSmiLibraryException("AMDSMI_STATUS_DRIVER_NOT_LOADED - Driver not loaded")
    return AmdGpus(Path(os.environ[FOLDER_VARIABLE]))


def _about(handle: int, what: str) -> Any:
    if not users.get(os.getpid()):
        raise AmdSmiLibraryException("AMDSMI_STATUS_NOT_INIT - Device not initialized")
    about = _gpus().read()["gpus"][handle]
    if about["broken"]:
        raise AmdSmiLibraryException(about["broken"])
    if about[what] is None:
        raise AmdSmiLibraryException("AMDSMI_STATUS_NOT_SUPPORTED - Feature not supported")
    return about[what]


# ---- the package's functions -------------------------------------------------------------------------------


def amdsmi_init() -> None:
    """Initialise the library."""
    error = _gpus().read()["init_error"]
    if error:
        raise AmdSmiLibraryException(error)
    users[os.getpid()] = users.get(os.getpid(), 0) + 1


def amdsmi_shut_down() -> None:
    """End one initialisation."""
    users[os.getpid()] -= 1


def amdsmi_get_processor_handles() -> list[int]:
    """Return handles of all GPUs."""
    return list(range(len(_gpus().read()["gpus"])))


def amdsmi_get_gpu_device_uuid(handle: int) -> str:
    """Return a uuid."""
    return str(_about(handle, "uuid"))


def amdsmi_get_gpu_asic_info(handle: int) -> dict[str, Any]:
    """Return names."""
    return {"market_name": _about(handle, "name"), "asic_serial": _about(handle, "serial")}


def amdsmi_get_gpu_kfd_info(handle: int) -> dict[str, Any]:
    """Return the kernel's numbers."""
    return {"node_id": _about(handle, "node_id")}


def amdsmi_get_gpu_memory_total(handle: int, kind: AmdSmiMemoryType) -> int:
    """Return bytes."""
    return round(_about(handle, "total_mb") * MIB) if kind is AmdSmiMemoryType.VRAM else 0


def amdsmi_get_gpu_memory_usage(handle: int, kind: AmdSmiMemoryType) -> int:
    """Return bytes."""
    used_mb = _about(handle, "used_mb") + sum(_gpus().taken_mb(handle).values())
    return round(used_mb * MIB) if kind is AmdSmiMemoryType.VRAM else 0


def amdsmi_get_gpu_process_list(handle: int) -> list[dict[str, Any]]:
    """Return the processes that use a GPU."""
    told = {int(pid): mb for pid, mb in _about(handle, "processes").items()}
    told.update(_gpus().taken_mb(handle))
    return [
        {
            "name": "N/A",
            "pid": pid,
            "mem": 0,
            "memory_usage": {"gtt_mem": 5 * MIB, "cpu_mem": 0, "vram_mem": "N/A" if mb is None else round(mb * MIB)},
        }
        for pid, mb in told.items()
    ]
