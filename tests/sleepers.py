"""Objects that can sleep, for tests: they take memory of a simulated device, and free it while they are asleep."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from device import SimulatedDevice
from loaders import Gate

from mpmm.multi_process_shared import MultiProcessShared

if TYPE_CHECKING:
    from mpmm import ModelManager


class Sleeper:
    """A model that can sleep; a file counts its naps. Files in a folder make it fail or hang."""

    def __init__(self, folder: Path, device: SimulatedDevice | None = None, mb: float = 0.0, hang: Gate | None = None):
        self._folder = folder
        self._device = device
        self._mb = mb
        self._hang = hang
        self._allocation = device.allocate(mb) if device is not None else None

    def sleep(self, level: int = 1) -> None:
        """Free the memory."""
        self._step("sleep")
        if self._device is not None and self._allocation is not None:
            self._device.free(self._allocation)
            self._allocation = None

    def wake_up(self) -> None:
        """Take the memory again."""
        self._step("wake")
        if self._device is not None:
            self._allocation = self._device.allocate(self._mb)

    def is_awake(self) -> bool:
        """Tell whether it has its memory."""
        return self._device is None or self._allocation is not None

    def pid(self) -> int:
        """Return the pid of its process."""
        return os.getpid()

    def _step(self, what: str) -> None:
        if (self._folder / f"hang_{what}").exists() and self._hang is not None:
            (self._folder / f"hangs_{what}").touch()
            self._hang.wait()
        if (self._folder / f"fail_{what}").exists():
            raise RuntimeError(f"cannot {what}")
        if (self._folder / f"crowd_{what}").exists():
            raise MemoryError(f"no room to {what}")
        if (self._folder / f"exit_{what}").exists():
            sys.exit(f"leaves instead of {what}")
        with open(self._folder / what, "a") as steps:
            steps.write(f"{os.getpid()}\n")


class CarefulSleeper(Sleeper):
    """A model that ignores a repeated request to sleep or wake up, like `mpmm.suspend.TorchModule`."""

    _asleep = False

    def sleep(self, level: int = 1) -> None:
        """Free the memory, unless it is free already."""
        if not self._asleep:
            super().sleep(level)
            self._asleep = True

    def wake_up(self) -> None:
        """Take the memory again, unless it has it."""
        if self._asleep:
            super().wake_up()
            self._asleep = False


@dataclass(frozen=True)
class MakesSleeper:
    """The constructor of a `Sleeper`."""

    folder: Path
    device: SimulatedDevice | None = None
    mb: float = 0.0
    hang: Gate | None = None
    kind: type[Sleeper] = Sleeper

    def __call__(self) -> Sleeper:
        """Make the sleeper."""
        return self.kind(self.folder, self.device, self.mb, self.hang)


@dataclass(frozen=True)
class LoadsSleeper:
    """A loader that serves a `Sleeper` and returns the handle; in this process, unless `spawn`."""

    tag: str
    makes: MakesSleeper
    spawn: bool = False

    def __call__(self) -> str:
        """Start serving it."""
        MultiProcessShared(self.makes, tag=self.tag, always_proxy=True, spawn_process=self.spawn).acquire()
        return self.tag


def steps(folder: Path, what: str) -> int:
    """Return how often `sleep` or `wake` has been done."""
    path = folder / what
    return len(path.read_text().splitlines()) if path.exists() else 0


def pretend_load_s(manager: ModelManager, tag: str, seconds: float) -> None:
    """Enter a load time for a model in the tables, so that no test has to load for that long."""
    from mpmm.shared_state.layout import Model

    namespace = manager._connected().namespace
    with namespace.transaction() as t:
        row = namespace.tables.model_row(tag)
        assert row is not None
        t.set_float(namespace.tables.model(row) + Model.LOAD_S, seconds)
