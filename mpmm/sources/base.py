"""The interface of a source of memory figures: the devices it knows and how it measures them.

Every `_mb` in mpmm counts MiB (2**20 bytes), the unit that `nvidia-smi` prints. A figure that could not
be read is None, never 0: 0 would mean that the device is empty, and admit every load.
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

from mpmm.errors import SourceUnavailableError

__all__ = [
    "MIB",
    "DeviceInfo",
    "DeviceSample",
    "Measures",
    "MemorySource",
    "counts_named_only",
    "frees_late",
    "ignores_names",
    "is_accounting_only",
    "larger_whole",
    "process_exists",
    "process_knowledge",
    "what_it_measures",
]

MIB = 2**20
# Longer than NVML takes on a host with eight GPUs whose driver is not kept loaded. A driver that takes longer hangs.
START_TIMEOUT_S = 20.0


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
    process_mb: memory per pid, for the pids that the source knows.
    processes_known: `process_mb` has all of those named to `sample` that use the device, so that a missing one uses
        nothing. Otherwise its memory is unknown, not 0.
    trouble: why `used_mb` is None, if the source knows.
    done_ns: `time.monotonic_ns()` from after the measurement had ended, so that whatever happened later than `done_ns`
        is certainly not in the figure; 0 if the source does not say.
    """

    index: int
    used_mb: float | None
    taken_ns: int
    process_mb: Mapping[int, float] = field(default_factory=dict)
    processes_known: bool = False
    trouble: str | None = None
    done_ns: int = 0

    def unrelated_mb(self, ours: Collection[int]) -> float | None:
        """Return the memory that is not used by the processes `ours`, that of the driver itself included.

        ours: processes that were named to `sample`. None if the figure, or their parts in it, are not known.
        """
        if self.used_mb is None or not self.processes_known:
            return None
        return max(0.0, self.used_mb - sum(mb for pid, mb in self.process_mb.items() if pid in ours))


@runtime_checkable
class MemorySource(Protocol):
    """Where memory figures come from. `sample` may be called by several threads, and after a fork.

    name: what people select it by.
    measures_processes: `DeviceSample.process_mb` has what the processes named to `sample` take. That can change, and
        silence is no measurement: a source that depends on a driver's answers says True once it has shown a figure for
        one of those, or for the process it is in, and not before; see `process_knowledge`.
    cheap: a sample costs well under 5 ms, so any caller may take one itself.

    A source may have these, too, which count as False if they are missing:

    frees_late: freed memory may show up seconds after an unload; see `frees_late`.
    accounting_only: it knows only totals; see `is_accounting_only`.
    counts_named_only: its figure counts only the processes named to `sample`; see `counts_named_only`.
    ignores_names: its figures are the same whichever processes are named to `sample`; see `ignores_names`.
    process_knowledge: `measures_processes` with a third value, None, for a source that may still show processes; see
        `process_knowledge`. Without it, `measures_processes` alone decides.
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
        """Release what the source holds. A later `sample` opens it again."""
        ...


def frees_late(source: MemorySource) -> bool:
    """Return whether memory that an unload has freed may show up in the figures of `source` only seconds later."""
    return _flag(source, "frees_late", "settles_late")


def is_accounting_only(source: MemorySource) -> bool:
    """Return whether `source` knows only totals, so that its samples are always None."""
    return _flag(source, "accounting_only", "books_only")


def _flag(source: MemorySource, name: str, old_name: str) -> bool:
    """Return an attribute of `source`, False if it is missing. The old name counts until the next minor version."""
    if hasattr(source, name) or not hasattr(source, old_name):
        return bool(getattr(source, name, False))
    _warn_author(source, f"memory source {source.name!r}: its attribute {old_name} is called {name} now")
    return bool(getattr(source, old_name))


def _warn_author(source: MemorySource, text: str) -> None:
    """Warn at the line that defines the type of `source`: Python does not show warnings at lines of mpmm."""
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
    """Return whether the used memory of `source` is only that of the processes named to `sample`.

    Then the memory of other processes, such as workers that hold objects of their own, is in no figure at all.
    """
    return bool(getattr(source, "counts_named_only", False))


def ignores_names(source: MemorySource) -> bool:
    """Return whether the figures of `source` are the same whichever processes are named to `sample`.

    It may list all processes, or none. Then mpmm need not look up, before each sample, what servers have started.
    """
    return bool(getattr(source, "ignores_names", False))


def process_knowledge(source: MemorySource) -> bool | None:
    """Return whether `source` has shown what single processes take, as far as that is known by now.

    None: not yet, and as long as no process of ours uses the device, that cannot be known. True: it has shown a figure
    for one of ours. False: it has turned out not to: its driver refuses the lists, withholds the figures, or lists
    processes of another pid namespace. False becomes True, and True False, when the driver's answers change.
    """
    knowledge: bool | None = getattr(source, "process_knowledge", source.measures_processes)
    return knowledge


def process_exists(pid: int) -> bool:
    """Tell whether there is a process of this number here, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        # Another user's process; or a number that no system has, which says nothing about pid namespaces.
        return True
    return True


def larger_whole(before: float | None, after: float | None) -> float | None:
    """Return what a device had in use, read before and after what each process takes; None if it cannot be read.

    The larger of the two, so that the whole includes its parts whichever way they change in between. Otherwise the
    device would seem to have room that is not there: if the whole were only read first, after a process takes more; if
    it were only read last, after one gives memory back.
    """
    return after if before is None or after is None else max(before, after)


@unique
class Measures(IntEnum):
    """How much a process can measure with its source. The numbers are stored in segments, so they do not change."""

    UNKNOWN = 0  # not recorded yet
    NOTHING = 1  # only totals
    DEVICES = 2  # what each device has in use
    PROCESSES = 3  # what each process takes of it, too


def what_it_measures(source: MemorySource) -> Measures:
    """Return how much a source can measure now; one that may yet turn out to measure processes counts as if it did."""
    if is_accounting_only(source):
        return Measures.NOTHING
    return Measures.DEVICES if process_knowledge(source) is False else Measures.PROCESSES
