"""What tests load: handles, objects, and what servers serve. Servers import this module, so it imports little."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device import SimulatedDevice
from patience import DEADLINE_S, Stopwatch

from mpmm.memory.placement import Placement, current_placement

if TYPE_CHECKING:
    from devices.simulated_gpu import SimulatedGpus


class Gate:
    """A door that any process can open and that stays open; the kernel wakes waiters. Can be pickled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        os.mkfifo(path, 0o600)
        self._descriptor()

    def open(self) -> None:
        """Let all processes through, now and later."""
        os.write(self._descriptor(), b"1")

    def wait(self, timeout_seconds: float = DEADLINE_S) -> None:
        """Return once the gate is open. Raises AssertionError at the deadline."""
        assert self.is_open(timeout_seconds), f"{self._path.name} was not opened within {timeout_seconds} s"

    def is_open(self, timeout_seconds: float = 0.0) -> bool:
        """Tell whether the gate is open, after waiting for it at most `timeout_seconds`."""
        watch, left_s = Stopwatch(), timeout_seconds
        while not select.select([self._descriptor()], [], [], left_s)[0]:
            left_s = watch.left_s(timeout_seconds) if timeout_seconds else 0.0
            if not left_s:
                return False
        return True

    def close(self) -> None:
        """Close this process's descriptor; for other processes, the gate stays as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _descriptor(self) -> int:
        if self._fd < 0:
            # For reading and writing, so that opening does not block, and a missing peer ends nothing.
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        return self._fd

    def __getstate__(self) -> tuple[Path]:
        return (self._path,)

    def __setstate__(self, state: tuple[Path]) -> None:
        (self._path,), self._fd = state, -1


class Served:
    """The object in a model server of its own."""

    def __init__(self, device: SimulatedDevice | SimulatedGpus | None = None, mb: float = 0.0) -> None:
        self._gpus = None if isinstance(device, SimulatedDevice) else device
        self._placement = current_placement()
        if device is not None:
            device.allocate(mb)

    def where(self) -> tuple[str | None, Placement | None]:
        """Return what CUDA would see, and the placement that the constructor saw."""
        return os.environ.get("CUDA_VISIBLE_DEVICES"), self._placement

    def grow(self, mb: float, device: str | None = None) -> None:
        """Take more memory of a simulated GPU, or free some."""
        assert self._gpus is not None
        if mb >= 0:
            self._gpus.allocate(mb, device)
        else:
            self._gpus.free(-mb, device)

    def pid(self) -> int:
        """Return the server's pid."""
        return os.getpid()

    def outlive_by(self, seconds: float) -> None:
        """Keep this process's locks held after its death, as while the kernel frees much memory."""
        parent = os.getpid()
        # Fork as native code does, so that no hook closes the descriptors of the locks. CDLL would give the GIL up, and
        # if another thread had it at that moment, it would be lost in the child, which would hang.
        if ctypes.PyDLL(None).fork() == 0:
            while os.getppid() == parent:
                time.sleep(0.01)
            time.sleep(seconds)
            os._exit(0)

    def wait_at(self, began: Gate, go: Gate) -> None:
        """Make a long call, between two gates."""
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
        """Make the object."""
        if self.began is not None:
            self.began.open()
        if self.go is not None:
            self.go.wait()
        return Served(self.device, self.mb)


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
        """Free the memory; with a gate, open it and hang."""
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
        """Return a new handle."""
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


@dataclass(frozen=True)
class LoadsServer:
    """A loader that starts a model server and returns the handle, a tag of `MultiProcessShared`."""

    tag: str
    makes: MakesServed = field(default_factory=MakesServed)

    def __call__(self) -> str:
        """Start the server; it lives on after this process has dropped its proxy."""
        from mpmm.multi_process_shared import MultiProcessShared

        MultiProcessShared(self.makes, tag=self.tag, always_proxy=True, spawn_process=True).acquire()
        return self.tag


def served(handle: str) -> Any:
    """Return a proxy of the object behind a handle."""
    from mpmm.multi_process_shared import MultiProcessShared

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
