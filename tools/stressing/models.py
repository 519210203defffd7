"""What the stress run's processes share: the plan, a simulated device, models on it, and file locks as witnesses.

Memory on the simulated device is a file, `<kind>-<MB>-<pid>-<number>`, in one folder:

- `object` and `server` memory belongs to the process that holds the file's lock, and is free when that ends;
- `file` memory has no process: the conductor frees it when it sees that no row names it any more, which is late.

This folder is the truth, whatever the memory source: an allocation fails if the files take more than the device has.
With the sources `nvml` and `nvidia-smi`, a simulated GPU (simulated_gpu.py) shows the same figures to the driver's
programs, with `file` memory as the conductor's. With `host`, processes touch as much memory of their own.

Files are locked before they get their name, so that no process sees one without its lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.simulated_gpu import SimulatedGpus, build

from mpmm.sources import DeviceInfo, DeviceSample

# A dying process releases its locks one after another, within much less than this.
DYING_S = 1.0
# How long an allocation retries: memory may come back late without an announcement.
PATIENCE_S = 0.5
# The same without a measuring source: mpmm cannot wait until memory is back, and the conductor may free it late.
BOOKED_PATIENCE_S = 5.0
PF_EXITING = 0x4
MIB = 2**20
PAGE_BYTES = mmap.PAGESIZE
# The sources of a run: the simulated device itself, or a name that mpmm knows.
SOURCES = ("simulated", "booked", "nvml", "nvidia-smi", "host")
ON_GPU = ("nvml", "nvidia-smi")


@dataclass(frozen=True)
class Plan:
    """The parameters of a run, the same for all its processes.

    Rates, and pace for attempts to acquire, are events per second over all processes.
    source: one of `SOURCES`. per_process: the device measures single processes; only for the source `simulated`.
    full_tables: the namespace has so few rows that its tables are full again and again.
    conductor_pid: the process to which simulated GPUs attribute `file` memory.
    """

    folder: str
    namespace: str
    seed: int
    processes: int
    threads: int
    seconds: float
    servers: int
    kill_rate: float
    stop_rate: float
    fork_rate: float
    interrupt_rate: float
    remove_rate: float
    pace: float
    total_mb: int
    per_process: bool
    lock_timeout_s: float
    poll_interval_s: float
    source: str
    full_tables: bool
    conductor_pid: int

    def device(self) -> SimulatedDevice:
        """Return a new view of the device."""
        folder = os.path.join(self.folder, "device")
        if self.source in ON_GPU:
            return MirroredDevice(folder, self.total_mb, SimulatedGpus(self._gpus_folder), self.conductor_pid)
        if self.source == "host":
            return TouchedDevice(folder, self.total_mb)
        if self.source == "booked":
            return BookedDevice(folder, self.total_mb)
        return SimulatedDevice(folder, self.total_mb, self.per_process)

    @property
    def _gpus_folder(self) -> Path:
        return Path(self.folder) / "gpus"

    def manager_options(self) -> dict[str, Any]:
        """Return a manager's arguments for the memory source."""
        if self.source == "simulated":
            return {"memory_source": self.device(), "default_estimate_mb": 100.0}
        options: dict[str, Any] = {"memory_source": self.source, "default_estimate_mb": 100.0}
        if self.source == "booked":
            # Models are never measured, so the estimate must be above the size of each.
            largest = max(LARGEST_NEW_MB, *(size_mb(f"server-{number}") for number in range(max(1, self.servers))))
            options |= {"fallback_memory_mb": self.total_mb, "default_estimate_mb": float(largest)}
        elif self.source == "host":
            options["memory_budget_mb"] = self.total_mb
        return options

    def make_gpu(self) -> dict[str, str]:
        """Make the simulated GPU of this run; return the environment variables that lead to it, {} without one."""
        if self.source not in ON_GPU:
            return {}
        built = build(Path(self.folder) / "driver")
        built.load()
        gpus = SimulatedGpus.create(self._gpus_folder, float(self.total_mb))
        found = gpus.environment(built)
        return {name: value for name, value in found.items() if os.environ.get(name) != value}

    def witness(self, copy: str) -> str:
        """Return the path of the file that a copy's user locks."""
        return os.path.join(self.folder, "held", copy)


# The largest `new` model; usual models of the kinds `file` and `object` are smaller.
LARGEST_NEW_MB = 160


def size_mb(tag: str) -> int:
    """Return the size of a model's copy: `<kind>-<number>` is a usual model, `new-<kind>-<MB>-…` another one."""
    fields = tag.split("-")
    if fields[0] == "new":
        return int(fields[2])
    return {"server": 150, "file": 60, "object": 40}[fields[0]] + 20 * int(fields[1])


class DoubleUseError(Exception):
    """Another living process uses the copy."""


class OutOfMemoryError(Exception):
    """The device does not have enough memory for the loads that the manager has admitted."""


# ---- locks that die with this process and that forked children do not share ----------------------------------

_guard = threading.RLock()
_held: set[int] = set()
_numbers = itertools.count(1)


def _close_in_child() -> None:
    for fd in _held:
        os.close(fd)
    _held.clear()
    _guard.release()


os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_close_in_child)


def _open_locked(path: str) -> int | None:
    """Open a file and lock it; None if another process holds the lock."""
    with _guard:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        _held.add(fd)
        return fd


def _close_locked(fd: int) -> None:
    with _guard:
        if fd in _held:
            _held.discard(fd)
            # A child that is being forked has the descriptor, and so the lock, until its hook has run.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def is_dying(pid: int) -> bool:
    """Tell whether a process has ended or is ending, so that its locks may be released at any moment."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return fields[0] in "ZX" or bool(int(fields[6]) & PF_EXITING)


def is_stopped(pid: int) -> bool:
    """Tell whether SIGSTOP has taken effect on a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return True


@contextlib.contextmanager
def using(path: str) -> Iterator[None]:
    """Use a copy alone, holding the lock of its file. Raises DoubleUseError."""
    deadline = time.monotonic() + DYING_S
    while (fd := _open_locked(path)) is None:
        with contextlib.suppress(OSError, ValueError):
            pid = int(Path(path).read_text() or 0)
            if not is_dying(pid):
                raise DoubleUseError(f"{os.path.basename(path)} is in use by pid {pid}, and by pid {os.getpid()}")
        if time.monotonic() > deadline:
            raise DoubleUseError(f"{os.path.basename(path)} is in use by an unknown process, and by pid {os.getpid()}")
        time.sleep(0.001)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        _close_locked(fd)


# ---- the device ----------------------------------------------------------------------------------------------


def is_locked(path: str) -> bool:
    """Tell whether a file is locked; a missing one is not."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class Allocation:
    """Memory of this process on the device, until `free`, the object's end, or the process's end."""

    def __init__(self, path: str, fd: int, device: SimulatedDevice) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self._fd = fd
        self._pid = os.getpid()
        self._device = device

    def disown(self) -> None:
        """Keep the file beyond the process's end."""
        if self._pid == os.getpid():
            _close_locked(self._fd)

    def free(self) -> None:
        """Give the memory back."""
        if self._pid == os.getpid():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            _close_locked(self._fd)
            self._pid = 0
            self._device.freed(self.name)

    def __del__(self) -> None:
        if not self.name.startswith("file-"):
            self.free()


class SimulatedDevice:
    """A `MemorySource` over the folder of allocations."""

    name = "simulated"
    cheap = True
    # How long an allocation retries while memory may still come back.
    timeout_s = PATIENCE_S

    def __init__(self, folder: str, total_mb: int, per_process: bool) -> None:
        self.folder = folder
        self.measures_processes = per_process
        self.frees_late = not per_process
        self.total_mb = total_mb
        if self.frees_late:
            self.timeout_s = 0.0

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the one device."""
        return (DeviceInfo(0, "simulated-0", "simulated", float(self.total_mb)),)

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Add up the files."""
        taken_ns = time.monotonic_ns()
        allocations = list(self.allocations())
        of_processes = {pid: float(mb) for kind, mb, pid in allocations if kind == "server"}
        used_mb = float(sum(mb for _, mb, _ in allocations))
        return (DeviceSample(0, used_mb, taken_ns, of_processes if self.measures_processes else {}),)

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def allocations(self) -> Iterator[tuple[str, int, int]]:
        """Yield (kind, MB, pid) of each allocation that takes memory now."""
        for name in os.listdir(self.folder):
            if not name.startswith("."):
                kind, mb, pid, _ = name.split("-")
                if kind == "file" or is_locked(os.path.join(self.folder, name)):
                    yield kind, int(mb), int(pid)

    def allocate(self, kind: str, mb: int) -> Allocation:
        """Take memory. Raises OutOfMemoryError."""
        name = f"{kind}-{mb}-{os.getpid()}-{next(_numbers)}"
        path = os.path.join(self.folder, name)
        draft = os.path.join(self.folder, f".{name}")
        deadline = time.monotonic() + self.timeout_s
        while True:
            # One allocation at a time, so that two of them cannot overlook each other.
            with self._turn():
                used_mb = sum(mb for _, mb, _ in self.allocations())
                if used_mb + mb <= self.total_mb:
                    fd = _open_locked(draft)
                    assert fd is not None
                    os.rename(draft, path)
                    self.taken(name)
                    return Allocation(path, fd, self)
            if time.monotonic() >= deadline:
                raise OutOfMemoryError(f"{used_mb} of {self.total_mb} MB are taken, {mb} MB more were admitted")
            time.sleep(0.005)

    def taken(self, name: str) -> None:
        """Called in the process that has taken memory, while it holds the turn's lock."""

    def freed(self, name: str) -> None:
        """Called in the process that has given memory back."""

    def tidy(self) -> None:
        """Called by the conductor regularly."""

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        lock = os.path.join(self.folder, ".turn")
        while (fd := _open_locked(lock)) is None:
            time.sleep(0.001)
        try:
            yield
        finally:
            _close_locked(fd)


class BookedDevice(SimulatedDevice):
    """The device of a manager that uses only its own accounts."""

    timeout_s = BOOKED_PATIENCE_S

    def __init__(self, folder: str, total_mb: int) -> None:
        super().__init__(folder, total_mb, per_process=True)


class MirroredDevice(SimulatedDevice):
    """The device as a simulated GPU shows it: each process writes its memory, the conductor removes that of dead ones.

    No process takes the GPU's lock for that, because a process that holds it could be stopped.
    """

    def __init__(self, folder: str, total_mb: int, gpus: SimulatedGpus, conductor_pid: int) -> None:
        super().__init__(folder, total_mb, per_process=True)
        self._gpus = gpus
        self._conductor_pid = conductor_pid

    def taken(self, name: str) -> None:
        """Show it."""
        if name.startswith("file-"):
            self._show_files()
        else:
            self._show_own(name, +1)

    def freed(self, name: str) -> None:
        """Show the change; the conductor shows that of `file` memory."""
        if not name.startswith("file-"):
            self._show_own(name, -1)

    def tidy(self) -> None:
        """Remove the memory of dead processes, and show `file` memory, unless a process is allocating."""
        for pid in self._gpus.process_mb(0):
            if pid != self._conductor_pid and is_dying(pid):
                self._show(pid, 0)
        fd = _open_locked(os.path.join(self.folder, ".turn"))
        if fd is not None:
            try:
                self._show_files()
            finally:
                _close_locked(fd)

    def _show_own(self, name: str, sign: int) -> None:
        with _guard:
            pid = os.getpid()
            _own_mb[pid] = _own_mb.get(pid, 0) + sign * int(name.split("-")[1])
            self._show(pid, _own_mb[pid])

    def _show_files(self) -> None:
        self._show(self._conductor_pid, sum(mb for kind, mb, _ in self.allocations() if kind == "file"))

    def _show(self, pid: int, mb: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._gpus.pretend(pid, mb, 0)


# This process's memory, by pid, because a forked child has none.
_own_mb: dict[int, int] = {}


class TouchedDevice(SimulatedDevice):
    """The device as host memory: each process touches the memory that it has, except `file` memory."""

    timeout_s = BOOKED_PATIENCE_S

    def __init__(self, folder: str, total_mb: int) -> None:
        super().__init__(folder, total_mb, per_process=True)

    def taken(self, name: str) -> None:
        """Touch as much memory."""
        kind, mb, *_ = name.split("-")
        if kind != "file":
            pages = int(mb) * MIB // PAGE_BYTES
            memory = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory[::PAGE_BYTES] = b"1" * pages
            _touched[name] = memory

    def freed(self, name: str) -> None:
        """Free the touched memory."""
        memory = _touched.pop(name, None)
        if memory is not None:
            memory.close()


_touched: dict[str, mmap.mmap] = {}


# ---- the models ----------------------------------------------------------------------------------------------


class OwnedModel:
    """A model that only the process that loaded it can use."""

    def __init__(self, memory: Allocation) -> None:
        self.memory = memory
        self.unloaded = False

    def unload_model(self) -> None:
        """Give the memory back; called by the manager."""
        self.unloaded = True
        self.memory.free()


class ServedModel:
    """A model in a model server."""

    def __init__(self, device: SimulatedDevice, mb: int, seconds: float, fails: bool) -> None:
        time.sleep(seconds)
        if fails:
            raise RuntimeError("this constructor fails on purpose")
        self._memory = device.allocate("server", mb)

    def work(self, seconds: float) -> str:
        """Take some time, and return the name of the model's allocation."""
        time.sleep(seconds)
        return self._memory.name
