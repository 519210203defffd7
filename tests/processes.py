"""Real processes for tests, driven by pipes, and what they load: handles, objects, a simulated device.

A `Process` is forked from the test's process. It runs functions that the test sends it, one after another in its
main thread; a function gets the process's `Seat` as first argument and whatever else the test adds. So the order
of events is the test's, and no test sleeps.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import select
import signal
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from simulated_gpu import SimulatedGpus

from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.placement import Placement, current_placement
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.segment import segment_name
from mpmm.shared_state.snapshot import InstanceInfo, ModelInfo, Snapshot, TicketInfo, read_snapshot
from mpmm.sources import DeviceInfo, DeviceSample

# Guards against a hang; measures nothing.
DEADLINE_S = 20.0
# With this file in it, mpmm does not remove a test's runtime root, whose identity is part of the names of segments.
KEEP = ".keep"
# The property in which a test reports at how many stores it has killed or interrupted an operation.
CRASH_POINTS = "crash_points"
# Likewise: forks that were made before and after calls to the kernel, and calls at which none can happen.
FORK_POINTS = "fork points"
_PAUSE_S = 0.002
_CONTEXT = multiprocessing.get_context("fork")
_conversations: weakref.WeakSet[Connection] = weakref.WeakSet()
_numbers = itertools.count(1)


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> float:
    """Return the seconds until `condition()` was true; an AssertionError that names `what` after the deadline."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < deadline_s, f"after {deadline_s} s still not: {what}"
        time.sleep(_PAUSE_S)
    return time.monotonic() - began


# ---- looking at a namespace --------------------------------------------------------------------------------


def problems(namespace: str) -> list[str]:
    """Return the invariants that do not hold."""
    return check_invariants(read_snapshot(namespace))


def segments_of(root: Path) -> set[str]:
    """Return the shared-memory segments that belong to a runtime root."""
    prefix = segment_name(root, "")
    return {name for name in os.listdir("/dev/shm") if name.startswith(prefix)}


def files_in(root: Path) -> list[str]:
    """Return what is in a runtime root."""
    # Not `rglob`, which raises when a folder is removed while it looks.
    found = (os.path.join(folder, name) for folder, folders, names in os.walk(root) for name in (*folders, *names))
    return sorted(os.path.relpath(path, root) for path in found if os.path.basename(path) != KEEP)


def model_of(namespace: str, tag: str) -> ModelInfo:
    """Return the row of a tag."""
    return next(model for model in read_snapshot(namespace).models if model.tag == tag)


def copies_of(namespace: str, tag: str) -> list[InstanceInfo]:
    """Return the copies of a tag, loading and unloading ones too."""
    return [copy for copy in read_snapshot(namespace).instances if copy.tag == tag]


def waiting(namespace: str, *tags: str) -> list[TicketInfo]:
    """Return the waiters, or those for some tags, first one first."""
    tickets = read_snapshot(namespace).tickets
    return [ticket for ticket in tickets if ticket.state == "waiting" and (not tags or ticket.tag in tags)]


def leader_pid(snapshot: Snapshot) -> int | None:
    """Return the pid of the process that polls."""
    return next((member.pid for member in snapshot.members if member.slot == snapshot.leader), None)


# ---- what processes wait for and load ----------------------------------------------------------------------


class Gate:
    """A door that any process can open and that stays open; who waits for it wakes by the kernel. Can be pickled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        os.mkfifo(path, 0o600)
        self._descriptor()

    def open(self) -> None:
        """Let everybody through, now and later."""
        os.write(self._descriptor(), b"1")

    def wait(self, timeout_seconds: float = DEADLINE_S) -> None:
        """Return once the gate is open; AssertionError at the deadline."""
        assert self.is_open(timeout_seconds), f"{self._path.name} was not opened within {timeout_seconds} s"

    def is_open(self, timeout_seconds: float = 0.0) -> bool:
        """Tell whether somebody has opened the gate, waiting for it if asked to."""
        return bool(select.select([self._descriptor()], [], [], timeout_seconds)[0])

    def close(self) -> None:
        """Close this process's descriptor; the gate of the others stays as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _descriptor(self) -> int:
        if self._fd < 0:
            # For reading and writing: then neither opening nor a missing peer blocks or ends anything.
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        return self._fd

    def __getstate__(self) -> tuple[Path]:
        return (self._path,)

    def __setstate__(self, state: tuple[Path]) -> None:
        (self._path,), self._fd = state, -1


class SimulatedDevice:
    """A memory source: folders, one a device, in which every living process's allocations are files. Can be pickled.

    What a process has allocated is free once it is dead, as on a real device. `linger_s`: memory that a living
    process frees shows up only so much later.
    """

    name = "simulated"
    measures_processes = False
    cheap = True

    def __init__(self, folder: Path, *totals_mb: float, linger_s: float = 0.0) -> None:
        self.totals_mb = totals_mb
        self._folder = folder
        self._linger_s = linger_s
        self.settles_late = linger_s > 0
        for index in range(len(totals_mb)):
            (folder / str(index)).mkdir(parents=True, exist_ok=True)

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the devices."""
        return tuple(DeviceInfo(i, f"sim-{i}", f"device {i}", mb) for i, mb in enumerate(self.totals_mb))

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        taken = time.monotonic_ns()
        dark = (self._folder / "dark").exists()
        return tuple(DeviceSample(i, None if dark else self.used_mb(i), taken) for i in range(len(self.totals_mb)))

    def go_dark(self) -> None:
        """Let nobody read a figure until `come_back`."""
        (self._folder / "dark").touch()

    def come_back(self) -> None:
        """Let figures be read again."""
        (self._folder / "dark").unlink()

    def close(self) -> None:
        """Nothing is open."""

    def used_mb(self, index: int = 0) -> float:
        """Return the memory in use, in MB."""
        used = 0.0
        for name in os.listdir(self._folder / str(index)):
            kind, mark, mb, _ = name.split("_")
            if _lives(int(mark)) if kind == "of" else time.monotonic() < float(mark) + self._linger_s:
                used += float(mb)
        return used

    def allocate(self, mb: float, index: int = 0) -> Path:
        """Take memory for this process. Raises MemoryError when there is not enough, as a real device does."""
        free = self.totals_mb[index] - self.used_mb(index)
        if mb > free:
            raise MemoryError(f"{mb:g} MB asked for on device {index}, {free:g} MB free")
        path = self._folder / str(index) / f"of_{os.getpid()}_{mb}_{next(_numbers)}"
        path.touch()
        return path

    def free(self, allocation: Path) -> None:
        """Give memory back."""
        _, _, mb, number = allocation.name.split("_")
        if self._linger_s:
            allocation.rename(allocation.with_name(f"freed_{time.monotonic()}_{mb}_{os.getpid()}-{number}"))
        else:
            allocation.unlink()


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


class Weights:
    """A model that is an object, so only the process that loaded it can use it. Takes memory on a device, if given."""

    def __init__(
        self,
        name: str = "",
        device: SimulatedDevice | None = None,
        mb: float = 0.0,
        index: int = 0,
        unloading: Gate | None = None,
    ) -> None:
        self.name = name
        self.unloaded = False
        self._unloading = unloading
        self._device = device
        self._allocation = device.allocate(mb, index) if device is not None else None

    def unload_model(self) -> None:
        """Give the memory back; with a gate, open it and hang."""
        self.unloaded = True
        if self._unloading is not None:
            self._unloading.open()
            signal.pause()
        if self._device is not None and self._allocation is not None:
            self._device.free(self._allocation)


@dataclass(frozen=True)
class Loads:
    """A loader of handles without a server, every one different: any process can use and unload them, at no cost.

    began, go: opened when the loader runs, and waited for before it returns.
    """

    name: str = "handle"
    began: Gate | None = None
    go: Gate | None = None

    def __call__(self) -> Any:
        """Run the loader."""
        if self.began is not None:
            self.began.open()
        if self.go is not None:
            self.go.wait()
        return self.load()

    def load(self) -> Any:
        """Return what is loaded."""
        return f"{self.name}-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class LoadsObject(Loads):
    """A loader of objects."""

    device: SimulatedDevice | None = None
    mb: float = 0.0
    index: int = 0
    unloading: Gate | None = None

    def load(self) -> Any:
        """Return a new object."""
        return Weights(self.name, self.device, self.mb, self.index, self.unloading)


class Served:
    """The object in a model server of its own."""

    def __init__(self, device: SimulatedDevice | SimulatedGpus | None = None, mb: float = 0.0) -> None:
        self._gpus = device if isinstance(device, SimulatedGpus) else None
        self._placement = current_placement()
        if device is not None:
            device.allocate(mb)

    def where(self) -> tuple[str | None, Placement | None]:
        """Return what CUDA would see, and what the constructor was told."""
        return os.environ.get("CUDA_VISIBLE_DEVICES"), self._placement

    def grow(self, mb: float, device: str | None = None) -> None:
        """Take more memory of a simulated GPU, or give some back."""
        assert self._gpus is not None
        if mb >= 0:
            self._gpus.allocate(mb, device)
        else:
            self._gpus.free(-mb, device)

    def pid(self) -> int:
        """Return the server's pid."""
        return os.getpid()

    def wait_at(self, began: Gate, go: Gate) -> None:
        """A long call."""
        began.open()
        go.wait()


@dataclass(frozen=True)
class MakesServed:
    """The constructor of a `Served`, in the server's process; see `Loads` for the gates."""

    device: SimulatedDevice | SimulatedGpus | None = None
    mb: float = 0.0
    began: Gate | None = None
    go: Gate | None = None

    def __call__(self) -> Served:
        """Make it."""
        if self.began is not None:
            self.began.open()
        if self.go is not None:
            self.go.wait()
        return Served(self.device, self.mb)


@dataclass(frozen=True)
class LoadsServer:
    """A loader that starts a model server and returns the handle, a tag of `MultiProcessShared`."""

    tag: str
    makes: MakesServed = field(default_factory=MakesServed)

    def __call__(self) -> str:
        """Start the server; it lives on after this process has let go of its proxy."""
        MultiProcessShared(self.makes, tag=self.tag, always_proxy=True, spawn_process=True).acquire()
        return self.tag


def served(handle: str) -> Any:
    """Return a proxy of the object behind a handle."""
    return MultiProcessShared(MakesServed(), tag=handle, always_proxy=True, spawn_process=True).acquire()


@dataclass(frozen=True)
class LoadFails:
    """A loader that raises."""

    text: str = "no such file"
    began: Gate | None = None
    go: Gate | None = None

    def __call__(self) -> Any:
        """Raise."""
        if self.began is not None:
            self.began.open()
        if self.go is not None:
            self.go.wait()
        raise OSError(self.text)


# ---- processes ---------------------------------------------------------------------------------------------


@dataclass
class Seat:
    """What a process keeps between two functions that it is sent."""

    manager: Any = None
    held: list[tuple[str, Any]] = field(default_factory=list)


def attach(seat: Seat, **arguments: Any) -> int:
    """Make the process's manager; return the pid."""
    seat.manager = ModelManager(**arguments)
    return os.getpid()


def acquire(seat: Seat, tag: str, loader: Callable[[], Any] = Loads()) -> str:
    """Acquire and keep a copy; return it, if it is a handle, else its class's name."""
    copy = seat.manager.acquire_model(tag, loader)
    seat.held.append((tag, copy))
    return copy if isinstance(copy, str) else type(copy).__name__


def learn(seat: Seat, **estimates_mb: float) -> None:
    """Tell the estimator what models take."""
    for tag, mb in estimates_mb.items():
        seat.manager._estimator.set_initial_estimate(tag, mb)


def release(seat: Seat, tag: str | None = None) -> None:
    """Release the copy that was acquired last, of a tag or at all."""
    at = next(i for i in reversed(range(len(seat.held))) if tag in (None, seat.held[i][0]))
    name, copy = seat.held.pop(at)
    seat.manager.release_model(name, copy)


def force_reset(seat: Seat) -> None:
    """Unload everything of every process."""
    seat.manager.force_reset()


def shut_down(seat: Seat) -> None:
    """Leave the namespace."""
    seat.manager.shutdown()


class Process:
    """A child process with a `Seat`, at the other end of a pipe."""

    def __init__(self) -> None:
        self._ours, theirs = _CONTEXT.Pipe()
        _conversations.add(self._ours)
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.killed = False
        self._busy = False

    def send(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Have `function(seat, *args, **kwargs)` run; its `result` is to be fetched."""
        self._busy = True
        self._ours.send((function, args, kwargs))

    def result(self, timeout_seconds: float = DEADLINE_S) -> Any:
        """Return what the function returned, or raise what it raised."""
        assert self._ours.poll(timeout_seconds), f"pid {self.pid} did not answer within {timeout_seconds} s"
        returned, outcome = self._ours.recv()
        self._busy = False
        if not returned:
            raise outcome
        return outcome

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Have a function run, and return or raise its outcome."""
        self.send(function, *args, **kwargs)
        return self.result()

    def has_result(self) -> bool:
        """Tell whether `result` would return at once."""
        return self._ours.poll(0)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.killed = True
        self._process.kill()
        self._process.join()

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.signal(signal.SIGSTOP)
        self.wait_until_stopped()

    def wait_until_stopped(self) -> None:
        """Wait until the process is stopped, by us or by itself."""
        wait_until(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED, f"pid {self.pid} stopped")

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        """Let it leave in good order, or kill it if it cannot."""
        if self._process.is_alive():
            self.resume()
            if self._busy:
                # The test has failed, or does not care any more.
                self.signal(signal.SIGINT)
        self._ours.close()
        self._process.join(DEADLINE_S / 2)
        if self._process.is_alive():
            # It says on stderr where its threads are.
            self.signal(signal.SIGUSR1)
            self._process.join(1)
            self.kill()
            raise AssertionError(f"pid {self.pid} did not leave by itself")
        self._process.close()


def _serve(theirs: Connection) -> None:
    for other in list(_conversations):
        other.close()
    faulthandler.register(signal.SIGUSR1, file=2)
    # What the test process has allocated would make every collection slow, and an unload collects.
    gc.freeze()
    seat = Seat()
    while True:
        try:
            function, args, kwargs = theirs.recv()
        except (EOFError, OSError):
            break
        except KeyboardInterrupt:
            continue
        outcome: tuple[bool, Any]
        try:
            outcome = True, function(seat, *args, **kwargs)
        except BaseException as error:
            # Without the traceback, whose frames would keep what they have seen.
            outcome = False, error.with_traceback(None)
        with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
            theirs.send(outcome)
        del outcome
