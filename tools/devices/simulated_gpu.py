"""Up to eight simulated NVIDIA GPUs in a directory of small files, for machines without one.

    SimulatedGpus (Python)  ->  directory  <-  libnvidia-ml.so.1   simulated_nvml.c: nvidia-ml-py, and so mpmm
    writes, allocates                      <-  nvidia-smi          simulated_nvidia_smi.c: Beam's GPUMonitor, and mpmm
                                           <-  libcuda.so.1        simulated_cuda.c: the driver's checkpoint calls

`build` compiles all three with gcc; they find the directory by $SIMULATED_GPU_DIR, and `SimulatedGpus.environment`
returns what a child process needs. Memory is declared, not taken: a process has a file on each device, which counts
while the process lives.

    in the directory:  init        error that nvmlInit returns
                       calls       log of the calls with their pids, if it exists
                       pid_offset  added to every reported pid
                       mps_daemon  pid that NVML reports as computing, in place of all processes, which are then in
                                   the list of MPS clients
                       inforom     if it exists, nvidia-smi says that the infoROM is corrupted, and exits with 14
                       nvml_hang   seconds that a figure takes
                       smi_hang    seconds that nvidia-smi takes
                       lock        held by a process that allocates
                       cuda_rates  '<call> <MB/s>' for each of checkpoint and restore; at once without it
                       cuda_error  '<call> <error>' for each call that fails: cuInit, state, lock, checkpoint, …
                       cuda_hang   '<call> <seconds>' for each call that begins late
                       cuda_busy   'lock <seconds>' that submitted work still takes
                       cuda_die    '<call> <bytes> <state>': the caller is killed before it has moved these bytes, and
                                   leaves the process in that state
    in host:           state_<pid>_<start time>      1 locked, 2 checkpointed, 3 failed; running without the file
                       gpu<n>_<pid>_<start time>     bytes of a process that are in the host's memory
                  redo_<pid>_<start time>       the new contents of both files, in case their writer dies
    in gpu0, …, and in about       uuid, name, total and reserved (bytes), linger_ms, mig
    their slices       lost        if it exists, the GPU fell off the bus
    gpu0/mig0, …:      refused     '<what> <error>' for each question that is refused; what is memory, processes,
                                   mps_processes, process_memory, name, uuid or mig; 'unlisted <any>' lets the list of
                                   processes be empty, as in some containers
                       memory/of_<pid>_<start time>  bytes that a process has, as long as it lives
                       highest     the most bytes that were ever in use
                       memory/kept_<pid>             the same, whether it lives or not
                       memory/late_…                 freed bytes that still count for a while

Run by hand, `tools/simulated_gpu.py /tmp/gpus 16384 16384` makes such a directory and prints the environment.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from devices.simulated_checkpoints import SimulatedCheckpoints
from devices.simulated_faults import SimulatedFaults
from devices.simulated_files import MAX_GPUS, MIB, Device, new_number, place_of, read_about, read_bytes, start_of, write

__all__ = ["DIRECTORY_VARIABLE", "Build", "SimulatedGpus", "build"]

DIRECTORY_VARIABLE = "SIMULATED_GPU_DIR"
MAX_SLICES = 7
_SOURCES = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Build:
    """Where the programs are: the libraries' folders belong in LD_LIBRARY_PATH, the program's in PATH."""

    library: Path
    program: Path
    cuda: Path

    def load(self) -> None:
        """Load the library into this process, before nvidia-ml-py looks for one, so that it finds this one.

        It stays loaded; without $SIMULATED_GPU_DIR it reports that there is no driver.
        """
        ctypes.CDLL(str(self.library), mode=ctypes.RTLD_GLOBAL)


def build(folder: Path) -> Build:
    """Build the libraries and the program in `folder`, in half a second. Raises CalledProcessError if gcc fails."""
    # The checkpoint calls have a folder of their own: a library that finds a libcuda.so.1 takes it for a complete one.
    cuda = folder / "cuda" / "libcuda.so.1"
    built = Build(folder / "lib" / "libnvidia-ml.so.1", folder / "bin" / "nvidia-smi", cuda)
    for path in (built.library, built.program, built.cuda):
        path.parent.mkdir(parents=True, exist_ok=True)
    gcc = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror"]
    nvml = str(_SOURCES / "simulated_nvml.c")
    shared = [*gcc, "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(built.library), nvml]
    program = [*gcc, "-o", str(built.program), str(_SOURCES / "simulated_nvidia_smi.c"), nvml]
    checkpoints = [*gcc, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(built.cuda)]
    for command in (shared, program, [*checkpoints, str(_SOURCES / "simulated_cuda.c")]):
        subprocess.run(command, check=True)
    return built


class SimulatedGpus:
    """The GPUs in a directory; every process can make one of these for the same directory. Can be pickled.

    A device is named by its number, by `(number, slice)`, or by its uuid. This class handles the devices, the memory
    of processes on them, and the log of calls; `checkpoints` handles the driver's checkpoint calls, and `faults` the
    faults that NVML and nvidia-smi show.
    """

    def __init__(self, folder: Path) -> None:
        """Use the directory as it is; see `create`."""
        self.folder = folder
        self.checkpoints = SimulatedCheckpoints(folder)
        self.faults = SimulatedFaults(folder)

    @classmethod
    def create(
        cls,
        folder: Path,
        *totals_mb: float,
        slices_mb: Mapping[int, Sequence[float]] | None = None,
        reserved_mb: float = 0.0,
        linger_s: float = 0.0,
    ) -> SimulatedGpus:
        """Make a directory with a GPU of each size.

        slices_mb: the MIG slices by GPU number; these GPUs are in MIG mode, even without slices.
        reserved_mb: what the driver keeps of each GPU for itself.
        linger_s: how long freed memory still counts; for a dead process, from the time when a reader first notices.
        """
        if len(totals_mb) > MAX_GPUS or any(len(sizes) > MAX_SLICES for sizes in (slices_mb or {}).values()):
            raise ValueError(f"more than {MAX_GPUS} GPUs, or {MAX_SLICES} slices of one")
        gpus = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
        for number, total_mb in enumerate(totals_mb):
            sizes = (slices_mb or {}).get(number)
            uuid = f"GPU-{number:08x}-5157-0000-0000-000000000000"
            name = f"Simulated {total_mb / 1024:.0f}GB"
            gpus._describe(folder / f"gpu{number}", uuid, name, total_mb, reserved_mb, linger_s, sizes is not None)
            for place, size in enumerate(sizes or ()):
                uuid = f"MIG-{number:04x}{place:04x}-5157-0000-0000-000000000000"
                name = f"{place + 1}g.{size / 1024:.0f}gb"
                gpus._describe(folder / f"gpu{number}" / f"mig{place}", uuid, name, size, 0.0, linger_s, False)
        return gpus

    def environment(
        self, built: Build, base: Mapping[str, str] | None = None, checkpoints: bool = False
    ) -> dict[str, str]:
        """Return `base` (default: this process's environment) with what a child process needs to find these GPUs.

        checkpoints: include the driver's checkpoint calls.
        """
        found = dict(os.environ if base is None else base)
        found[DIRECTORY_VARIABLE] = str(self.folder)
        places = [("LD_LIBRARY_PATH", built.library), ("PATH", built.program)]
        if checkpoints:
            places.append(("LD_LIBRARY_PATH", built.cuda))
        for variable, path in places:
            found[variable] = os.pathsep.join(filter(None, [str(path.parent), found.get(variable)]))
        return found

    # ---- what is there ------------------------------------------------------------------------------------

    def count(self) -> int:
        """Return the number of GPUs."""
        return sum((self.folder / f"gpu{number}").is_dir() for number in range(MAX_GPUS))

    def units(self) -> list[str]:
        """Return the uuids of everything that models can be placed on: GPUs, or their slices."""
        found = []
        for number in range(self.count()):
            board = self.folder / f"gpu{number}"
            slices = sorted(board.glob("mig*"))
            found += [read_about(unit)["uuid"] for unit in ([board] if read_about(board)["mig"] != "1" else slices)]
        return found

    def uuid(self, device: Device) -> str:
        """Return a device's uuid."""
        return read_about(self._place(device))["uuid"]

    def total_mb(self, device: Device) -> float:
        """Return a device's size."""
        return int(read_about(self._place(device))["total"]) / MIB

    def used_mb(self, device: Device) -> float:
        """Return the MB used on a device, including what the driver keeps and, in MIG mode, the slices."""
        place = self._place(device)
        reserved = int(read_about(place)["reserved"])
        return (reserved + sum(_used(unit) for unit in (place, *place.glob("mig*")))) / MIB

    def highest_mb(self, device: Device) -> float:
        """Return the most that was in use after any `allocate`, 0 before the first."""
        return read_bytes(self._place(device) / "highest") / MIB

    def process_mb(self, device: Device) -> dict[int, float]:
        """Return the memory of each living process on a device."""
        memory = self._place(device) / "memory"
        found: dict[int, float] = {}
        for name in os.listdir(memory):
            kind, pid, *rest = name.split("_")
            if kind == "kept" or (kind == "of" and start_of(int(pid)) == rest[0]):
                found[int(pid)] = found.get(int(pid), 0.0) + read_bytes(memory / name) / MIB
        return found

    def device_mb_of(self, pid: int, device: Device) -> float:
        """Return what a living process has on a device, without a look at other processes."""
        return read_bytes(self._place(device) / "memory" / f"of_{pid}_{start_of(pid)}") / MIB

    def current_device(self) -> str:
        """Return the uuid of this process's `cuda:0`, from the first entry of CUDA_VISIBLE_DEVICES.

        Raises LookupError when there is none.
        """
        entry = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
        if entry.isdecimal():
            board = self.folder / f"gpu{entry}"
            fitting = [read_about(next(iter(sorted(board.glob("mig*"))), board))["uuid"]] if board.is_dir() else []
        else:
            fitting = [uuid for uuid in self.units() if entry and uuid.startswith(entry)]
        if len(fitting) != 1:
            raise LookupError(f"CUDA_VISIBLE_DEVICES begins with {entry!r}: that is not one simulated device")
        return fitting[0]

    # ---- memory -------------------------------------------------------------------------------------------

    def allocate(self, mb: float, device: Device | None = None) -> None:
        """Take memory for this process, for as long as it lives; `device` defaults to `current_device()`.

        Raises MemoryError, and takes nothing, if less is free.
        """
        wanted = self.current_device() if device is None else device
        self.checkpoints.await_running()
        with self._alone():
            free_mb = self.total_mb(wanted) - self.used_mb(wanted)
            if mb > free_mb:
                raise MemoryError(f"{mb:g} MiB asked for on {self.uuid(wanted)}, {free_mb:g} MiB free")
            self._change(self._own_file(wanted), mb)
            if self.used_mb(wanted) > self.highest_mb(wanted):
                write(self._place(wanted) / "highest", str(round(self.used_mb(wanted) * MIB)))

    def free(self, mb: float, device: Device | None = None) -> None:
        """Free memory of this process; it counts until `linger_s` later. Raises ValueError for more than it has."""
        wanted = self.current_device() if device is None else device
        own = self._own_file(wanted)
        self.checkpoints.await_running()
        with self._alone():
            if mb * MIB > read_bytes(own) + 1:
                raise ValueError(f"{mb:g} MiB to free, {read_bytes(own) / MIB:g} MiB taken")
            if _linger_s(own.parent.parent):
                write(own.with_name(f"late_{os.getpid()}_{new_number()}"), str(round(mb * MIB)))
            self._change(own, -mb)

    def pretend(self, pid: int, mb: float, device: Device) -> None:
        """Give a process memory, alive or not, until `pretend(pid, 0, device)`; simulates an unrelated program."""
        path = self._place(device) / "memory" / f"kept_{pid}"
        if mb:
            write(path, str(round(mb * MIB)))
        else:
            path.unlink()

    # ---- who asks -----------------------------------------------------------------------------------------

    def record_calls(self) -> None:
        """From now on, log each process that initialises NVML or reads figures."""
        write(self.folder / "calls", "")

    def calls(self) -> list[tuple[int, str, str]]:
        """Return the log: pid, `init` or `memory`, and the uuid, or `-`."""
        found = []
        for line in (self.folder / "calls").read_text().splitlines():
            pid, what, about = line.split()
            found.append((int(pid), what, about))
        return found

    # ---- files --------------------------------------------------------------------------------------------

    def _describe(
        self, place: Path, uuid: str, name: str, total_mb: float, reserved_mb: float, linger_s: float, mig: bool
    ) -> None:
        (place / "memory").mkdir(parents=True, exist_ok=True)
        about = {
            "uuid": uuid,
            "name": name,
            "total": round(total_mb * MIB),
            "reserved": round(reserved_mb * MIB),
            "linger_ms": round(linger_s * 1000),
            "mig": 1 if mig else -1,
        }
        write(place / "about", "".join(f"{key} {value}\n" for key, value in about.items()))

    def _place(self, device: Device) -> Path:
        return place_of(self.folder, device)

    def _own_file(self, device: Device) -> Path:
        return self._place(device) / "memory" / f"of_{os.getpid()}_{start_of(os.getpid())}"

    @staticmethod
    def _change(path: Path, by_mb: float) -> None:
        there = read_bytes(path) + round(by_mb * MIB)
        if there > 0:
            write(path, str(there))
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with open(self.folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _linger_s(place: Path) -> float:
    return int(read_about(place)["linger_ms"]) / 1000


def _used(place: Path) -> int:
    """Return the bytes in use, counted as the library does, but without changing files."""
    linger_s = _linger_s(place)
    used = 0
    for path in (place / "memory").iterdir():
        kind, *rest = path.name.split("_")
        try:
            if kind == "of" and start_of(int(rest[0])) != rest[1] and not linger_s:
                continue
            if kind == "late" and time.time() - path.stat().st_mtime >= linger_s:
                continue
        except FileNotFoundError:
            continue
        if kind in ("of", "kept", "late"):
            used += read_bytes(path)
    return used


def main() -> None:
    """Make a directory with GPUs of the given sizes, and print the environment for a shell."""
    parser = argparse.ArgumentParser(description="Make simulated GPUs, and print the environment that finds them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("total_mb", type=float, nargs="+")
    parser.add_argument(
        "--linger", type=float, default=0.0, metavar="SECONDS", help="how long freed memory still counts"
    )
    options = parser.parse_args()
    gpus = SimulatedGpus.create(options.folder, *options.total_mb, linger_s=options.linger)
    for variable, value in gpus.environment(build(options.folder / "build")).items():
        if variable in (DIRECTORY_VARIABLE, "LD_LIBRARY_PATH", "PATH"):
            print(f"export {variable}={shlex.quote(value)}")
