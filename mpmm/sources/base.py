"""What a source of memory figures is: the devices it knows and how it measures them.

Every `_mb` in mpmm counts MiB (2**20 bytes), the unit that `nvidia-smi` prints. A figure that could not
be read is None, never 0: 0 would say that the device is empty and let everything in.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, unique
from typing import Protocol, runtime_checkable

from mpmm.errors import InvalidArgumentError

__all__ = [
    "MIB",
    "DeviceInfo",
    "DeviceSample",
    "Measures",
    "MemorySource",
    "SourceUnavailableError",
    "counts_named_only",
    "frees_late",
    "is_accounting_only",
    "larger_whole",
    "process_exists",
    "process_knowledge",
    "what_it_measures",
]

MIB = 2**20
# Longer than NVML takes on a host with eight GPUs whose driver is not kept loaded. A driver that needs more hangs.
START_TIMEOUT_S = 20.0


class SourceUnavailableError(InvalidArgumentError):
    """A memory source cannot work on this host. Attributes: `source`, `reason`."""

    source: str
    reason: str


def unavailable(source: str, reason: str) -> SourceUnavailableError:
    """Return the error that says why the source of this name cannot work here."""
    return SourceUnavailableError(
        f"memory source {source!r} cannot work here: {reason} "
        "(setting: the source parameter, or MPMM_MEMORY_SOURCE where that is 'auto')",
        source=source,
        reason=reason,
    )


@dataclass(frozen=True)
class DeviceInfo:
    """One device. `index` counts the devices this process may see, as `cuda:<index>` does; gaps are possible."""

    index: int
    uuid: str
    name: str
    total_mb: float


@dataclass(frozen=True)
class DeviceSample:
    """One reading of one device.

    used_mb: None = could not be read.
    taken_ns: `time.monotonic_ns()` from before the measurement began, so that whatever happened earlier
        than `taken_ns` is in the figure for certain.
    process_mb: memory per pid, for the pids that the source can tell.
    processes_known: `process_mb` has all of those named to `sample` that use the device, so that one which is
        missing uses nothing. Otherwise that is unknown, not 0.
    trouble: why `used_mb` is None, where the source knows.
    done_ns: `time.monotonic_ns()` from after the measurement had ended, so that whatever happened later than `done_ns`
        is not in the figure for certain; 0 where the source does not tell.
    """

    index: int
    used_mb: float | None
    taken_ns: int
    process_mb: Mapping[int, float] = field(default_factory=dict)
    processes_known: bool = False
    trouble: str | None = None
    done_ns: int = 0

    def unrelated_mb(self, ours: Collection[int]) -> float | None:
        """Return what is used by others than the processes `ours`, the driver itself included.

        ours: processes that were named to `sample`. None where the figure, or their parts in it, are not known.
        """
        if self.used_mb is None or not self.processes_known:
            return None
        return max(0.0, self.used_mb - sum(mb for pid, mb in self.process_mb.items() if pid in ours))


@runtime_checkable
class MemorySource(Protocol):
    """Where memory figures come from. `sample` may be called by several threads, and after a fork.

    name: what people select it by.
    measures_processes: `DeviceSample.process_mb` tells what the processes named to `sample` take. That can change, and
        silence is no measurement: a source that depends on what a driver tells is True once it has shown a figure for
        one of those, or for the process it is in, and not before; see `process_knowledge`.
    cheap: a sample costs well under 5 ms, so anybody may take one where they stand.

    A source may have these, too, which count as False where they are missing:

    frees_late: freed memory may show up seconds after an unload; see `frees_late`.
    accounting_only: it knows totals alone; see `is_accounting_only`.
    counts_named_only: its figure holds nothing but the processes named to `sample`; see `counts_named_only`.
    process_knowledge: `measures_processes` with a third value, None, for a source that may yet show; see
        `process_knowledge`. Without it, a source is taken at its word: its `measures_processes` is all there is.
    """

    name: str
    cheap: bool

    @property
    def measures_processes(self) -> bool: ...

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the devices, by index; the same ones for as long as the source lives."""
        ...

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure every device, in the order of `devices()`.

        server_pids: the processes whose memory the caller accounts for; only sources that add up
            processes need them.
        """
        ...

    def close(self) -> None:
        """Let go of what the source holds. A later `sample` opens it again."""
        ...


def frees_late(source: MemorySource) -> bool:
    """Return whether memory that an unload has freed may show up in the figures of `source` only seconds later."""
    return _flag(source, "frees_late", "settles_late")


def is_accounting_only(source: MemorySource) -> bool:
    """Return whether `source` knows totals alone, so that its samples are always None."""
    return _flag(source, "accounting_only", "books_only")


def _flag(source: MemorySource, name: str, old_name: str) -> bool:
    """Return an attribute of `source`, False if it is missing. The old name counts until the next minor version."""
    if hasattr(source, name) or not hasattr(source, old_name):
        return bool(getattr(source, name, False))
    _warn_author(source, f"memory source {source.name!r}: its attribute {old_name} is called {name} now")
    return bool(getattr(source, old_name))


def _warn_author(source: MemorySource, text: str) -> None:
    """Warn where the type of `source` is defined: it is asked by mpmm itself, whose warnings Python does not show."""
    kind = type(source)
    module = sys.modules.get(kind.__module__)
    filename = getattr(module, "__file__", None) or f"<{kind.__module__}>"
    try:
        line = inspect.getsourcelines(kind)[1]
    except (OSError, TypeError):
        line = 1
    seen = {} if module is None else vars(module).setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, DeprecationWarning, filename, line, kind.__module__, seen)


def counts_named_only(source: MemorySource) -> bool:
    """Return whether the used memory that `source` tells is that of the processes named to `sample`, and no more.

    What other processes take, workers that hold objects of their own among them, then is in no figure at all.
    """
    return bool(getattr(source, "counts_named_only", False))


def process_knowledge(source: MemorySource) -> bool | None:
    """Return whether `source` has shown what single processes take, as far as that is known by now.

    None: not yet; as long as no process of ours uses the device, nobody can tell. True: it has shown a figure for one
    of ours. False: it has shown that it does not: its driver refuses the lists, withholds the figures, or names
    processes of another pid namespace. False becomes True, and True False, when the driver's answers change.
    """
    knowledge: bool | None = getattr(source, "process_knowledge", source.measures_processes)
    return knowledge


def process_exists(pid: int) -> bool:
    """Tell whether there is a process of this number here, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        # Another user's; or a number that no system has, which says nothing of how others are counted.
        return True
    return True


def larger_whole(before: float | None, after: float | None) -> float | None:
    """Return what a device had in use, read before and after what each process takes; None if it cannot be read.

    The larger of the two, so that the parts are in the whole whichever way they change in between. Were they not, the
    whole would seem to have room that is not there: with the whole read first for what a process takes then, with the
    whole read last for what one gives back.
    """
    return after if before is None or after is None else max(before, after)


@unique
class Measures(IntEnum):
    """How much a process can measure with its source. The numbers stand in segments, so they stay."""

    UNKNOWN = 0  # it has not said so yet
    NOTHING = 1  # totals alone
    DEVICES = 2  # what each device has in use
    PROCESSES = 3  # what each process takes of it, too


def what_it_measures(source: MemorySource) -> Measures:
    """Return how much a source can measure at present; one that has not shown yet whether it tells processes may."""
    if is_accounting_only(source):
        return Measures.NOTHING
    return Measures.DEVICES if process_knowledge(source) is False else Measures.PROCESSES
