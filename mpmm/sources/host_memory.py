"""Host memory as the 'device': what models on the CPU take, through psutil.

- With a budget, used memory is the sum of the USS (the memory that would come free if the process ended) of the
  processes the caller names. Pages that they share with others, after a fork say, are in no process's USS.
- Without one it is what the whole host uses, for whatever purpose, and cannot free at once. If a control group
  limits this process to less, the limit is the total, and used memory is the total minus what is left to this
  process: the least that its groups and the host have left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mpmm.sources.base import MIB, DeviceInfo, DeviceSample
from mpmm.text.arguments import checked_number

__all__ = ["HostMemorySource", "host_memory_mb"]

# USS makes the kernel walk every page table of the process (tens of ms for tens of GB); RSS is one counter.
# USS is read again when RSS has moved by more than a model could matter, or after a while regardless,
# because sharing can change while RSS does not.
RSS_CHANGE_BYTES = 1 * MIB
USS_LIFETIME_NS = 5_000_000_000


@dataclass(frozen=True)
class _Reading:
    process: psutil.Process
    rss: int
    uss: int
    taken_ns: int


class HostMemorySource:
    """One device, 'host memory'."""

    name = "host"
    measures_processes = True
    frees_late = False
    cheap = False

    def __init__(self, budget_mb: float | None = None) -> None:
        """Take `budget_mb` as the total, for the named processes alone; without it, all that this process may use.

        Raises InvalidArgumentError unless `budget_mb` is None or a positive number.
        """
        if budget_mb is not None:
            budget_mb = checked_number("budget_mb", budget_mb, 0.0, math.inf, "MB", above=True, finite=True)
        self._whole = budget_mb is None
        self.counts_named_only = budget_mb is not None
        total_mb = host_memory_mb() if budget_mb is None else budget_mb
        self._devices = (DeviceInfo(0, "host-memory", "host memory", total_mb),)
        # Replaced as a whole by each sample, so that threads and forked children need no lock.
        self._readings: dict[int, _Reading] = {}

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the one device."""
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Read the USS of `server_pids`, and add them up if there is a budget; processes that are gone count as 0.

        With a budget, `used_mb` is None if this process may not look at a living one at all.
        """
        taken_ns = time.monotonic_ns()
        known = self._readings
        readings: dict[int, _Reading] = {}
        complete = True
        for pid in dict.fromkeys(server_pids):
            try:
                readings[pid] = _read(pid, known.get(pid), taken_ns)
            except psutil.NoSuchProcess:  # gone, a zombie included: its memory is free
                pass
            except psutil.AccessDenied:
                complete = False
        self._readings = readings
        process_mb = {pid: reading.uss / MIB for pid, reading in readings.items()}
        if self._whole:
            used_mb: float | None = max(0.0, self._devices[0].total_mb - host_memory_left_mb())
        else:
            used_mb = sum(process_mb.values()) if complete else None
        trouble = None if used_mb is not None else "this process may not look at another one"
        return (DeviceSample(0, used_mb, taken_ns, process_mb, complete, trouble, time.monotonic_ns()),)

    def close(self) -> None:
        """Forget the readings kept between samples."""
        self._readings = {}


def _read(pid: int, known: _Reading | None, now_ns: int) -> _Reading:
    """Return a reading of `pid`: `known` while it still holds for the same process, else a fresh one."""
    if known is not None and known.process.is_running():  # False for a successor with the same pid
        rss = known.process.memory_info().rss
        if abs(rss - known.rss) <= RSS_CHANGE_BYTES and now_ns - known.taken_ns <= USS_LIFETIME_NS:
            return known
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.ZombieProcess(pid)
    rss = process.memory_info().rss
    try:
        uss = process.memory_full_info().uss
    except psutil.AccessDenied:  # another user's: RSS is public, and at least as large
        uss = rss
    return _Reading(process, rss, uss, now_ns)


def host_memory_mb() -> float:
    """Return the memory this process may use: the host's, or less if its control group limits it."""
    limits = [limit for limit, _ in cgroup_limits()]
    return float(min([psutil.virtual_memory().total, *limits])) / MIB


def host_memory_left_mb() -> float:
    """Return how much more memory this process could use, by the host and by its control groups."""
    left = [limit - used for limit, used in cgroup_limits() if used is not None]
    return max(0.0, float(min([psutil.virtual_memory().available, *left])) / MIB)


def cgroup_limits(
    mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int | None]]:
    """Return (limit, used) of this process's control group and its parents, v2 and v1, in bytes; [] for no limits.

    Used excludes memory that the kernel only caches and can drop; None if it cannot be read.
    mount, membership: where the kernel shows the groups, and which ones this process is in.
    """
    try:
        lines = membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # no control groups, as on macOS
        return []
    limits = []
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0":
            root, version = mount, _V2
        elif "memory" in controllers.split(","):
            root, version = mount / "memory", _V1
        else:
            continue
        # Inside a container the path may be the host's and not exist here; the root then is the container's.
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            # None: not there, or 'max'
            told = [limit for name in version.limits if (limit := _read_int(place / name)) is not None]
            if told:
                limits.append((min(told), _used_of(place, version)))
    return limits


@dataclass(frozen=True)
class _Version:
    """Names of files, and of the line in `memory.stat` that counts files in the cache that no process uses.

    limits: the lowest counts. Above `memory.high` the kernel does not refuse memory, but holds up the group, longer and
        longer, until its memory is reclaimed, which a model's cannot be. The soft limit of v1 only decides whose memory
        is reclaimed first.
    """

    limits: tuple[str, ...]
    used: str
    cached: str


_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file")


def _used_of(group: Path, version: _Version) -> int | None:
    used = _read_int(group / version.used)
    if used is None:
        return None
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    cached = [int(line.split()[1]) for line in lines if line.startswith(f"{version.cached} ")]
    return max(0, used - sum(cached))


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
