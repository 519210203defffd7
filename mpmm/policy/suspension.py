"""Suspension: whether an evicted copy is better kept in host memory than unloaded, and which ones make way there.

A copy that is suspended comes back in `resume_s` instead of `load_s`, but it takes `suspend_s` to leave, and for that
time it keeps the room that a request waits for; an unload gives it back at once, and loads go on beside each other. So
it pays where both together take a fraction of the time of a load (`GAIN`). Each model's times are learnt. Before that
they follow from its size and from what the way moves in a second, measured on an H100.

Where room is made on a device, a copy that would be suspended counts for less than one that would be unloaded,
whatever its size (`KEPT_COST`). In the simulator, 64 clients, Zipf's law, loads of 10 s and room for a third of the
models in host memory, that saves 5 % of the time. To count the seconds of a resume, which grow with the size, would
lead to more and smaller victims, and takes 5 to 8 % longer where the host has room for all.

Host memory has a budget. Copies make way there for one that is asked for more: what a copy is *worth*, per second, is
the time that its users are expected to save by it, the rate at which its model is asked for times what a resume is
quicker than a load. Where that is not known, the copy that was suspended longest ago is dropped first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, unique

__all__ = [
    "KEPT_COST",
    "HostRoom",
    "Kept",
    "Movable",
    "Unsuspendable",
    "Way",
    "limit_s",
    "pays",
    "resume_s",
    "suspend_s",
    "why_unsuspendable",
]


@unique
class Way(IntEnum):
    """How a copy can be suspended. The numbers stand in segments, so they stay."""

    NONE = 0
    COOPERATIVE = 1  # its object has `sleep()` and `wake_up()`
    CHECKPOINT = 2  # by the driver, without the object's doing


@unique
class Unsuspendable(IntEnum):
    """Why a model's copies are not suspended any more. The numbers stand in segments, so they stay."""

    SUSPEND_FAILED = 1  # the object or the driver refused
    RESUME_FAILED = 2
    TIMED_OUT = 3  # neither ended nor failed within `limit_s`


_WHY_UNSUSPENDABLE: dict[int, str] = {
    Unsuspendable.SUSPEND_FAILED: "an attempt to suspend it failed",
    Unsuspendable.RESUME_FAILED: "an attempt to resume it failed",
    Unsuspendable.TIMED_OUT: "suspending or resuming it did not end in time",
}


def why_unsuspendable(number: int) -> str:
    """Return why a model's copies are not suspended any more, as a clause; empty for 0.

    number: in the model's row, an `Unsuspendable`, or one of a later version.
    """
    return _WHY_UNSUSPENDABLE.get(number, f"reason {number}") if number else ""


@dataclass(frozen=True)
class Rates:
    """What a way moves, in MB/s, and the seconds that it takes besides."""

    suspend_mb_s: float
    resume_mb_s: float
    fixed_s: float


# Cooperative: pageable host memory, which objects use that do not pin theirs. 8 GB went out in 0.57 s and came back in
# 0.96 s. Checkpoint: 32 GB in 15.8 s and 5.6 s, 1 GB in 1.02 s and 0.4 s.
RATES = {Way.COOPERATIVE: Rates(8000.0, 8000.0, 0.05), Way.CHECKPOINT: Rates(2100.0, 6000.0, 0.4)}
# How much quicker than a load a suspension and a resume are to be. Where they take as long together, the same requests
# take up to 1.17 times as long in the simulator as without suspension; where they take half as long, 0.7 to 1.07 times.
GAIN = 2.0
# What it costs to evict a copy that is suspended then, as a share of what it costs to unload it.
KEPT_COST = 0.5
# What takes longer than a tenth of the slowest rate is not going to end: a driver call hangs, or an object waits for
# something that does not come.
SLOWNESS = 10.0
SHORTEST_LIMIT_S = 10.0


@dataclass(frozen=True)
class Movable:
    """A copy that could be suspended. load_s, suspend_s, resume_s: means of its model, 0 unknown."""

    mb: float
    way: Way
    load_s: float
    suspend_s: float
    resume_s: float
    rate: float

    @property
    def worth(self) -> float | None:
        """Seconds that its users save by it each second, while it is suspended; None if that is not known."""
        return self.rate * max(0.0, self.load_s - resume_s(self)) if self.rate and self.load_s else None


@dataclass(frozen=True)
class Kept:
    """A suspended copy: what it takes of the host, since when, and what it is worth."""

    row: int
    host_mb: float
    since_s: float
    worth: float | None
    pinned: bool = False


def suspend_s(copy: Movable) -> float:
    """Return how long it is expected to take to suspend a copy."""
    rates = RATES[copy.way]
    return copy.suspend_s or rates.fixed_s + copy.mb / rates.suspend_mb_s


def resume_s(copy: Movable) -> float:
    """Return how long it is expected to take to resume a copy."""
    rates = RATES[copy.way]
    return copy.resume_s or rates.fixed_s + copy.mb / rates.resume_mb_s


def limit_s(mb: float) -> float:
    """Return after how many seconds a suspension or a resume of `mb` MB counts as hung."""
    slowest_mb_s = min(min(rates.suspend_mb_s, rates.resume_mb_s) for rates in RATES.values())
    return max(SHORTEST_LIMIT_S, SLOWNESS * mb / slowest_mb_s)


def pays(copy: Movable) -> bool:
    """Tell whether to suspend a copy is so much quicker than to load it again that its room may come free later.

    As long as a model's times are not measured, it need only be quicker: else a host that is faster than the one of
    `RATES` would never find that out.
    """
    gain = GAIN if copy.suspend_s and copy.resume_s else 1.0
    return bool(copy.way) and gain * (suspend_s(copy) + resume_s(copy)) < copy.load_s


class HostRoom:
    """What can be had of the host's memory for another copy: what is free, and suspended copies that may be dropped."""

    def __init__(self, kept: Sequence[Kept], free_mb: float, budget_mb: float) -> None:
        """kept: the copies that are suspended. free_mb: what is left of `budget_mb`."""
        self.free_mb = free_mb
        self._budget_mb = budget_mb
        self._all_known = all(one.worth is not None for one in kept)
        order = [one for one in kept if not one.pinned]
        self._by_age = sorted(order, key=lambda one: one.since_s)
        self._by_worth = sorted(order, key=lambda one: ((one.worth or 0.0) / max(one.host_mb, 1.0), one.since_s))

    def dropped_for(self, need_mb: float, worth: float | None) -> list[int] | None:
        """Return the suspended copies (rows) to drop so that one of `need_mb` MB and this worth fits into the host.

        None if it does not fit, or what would have to go is worth as much.
        """
        if need_mb <= self.free_mb:
            return []
        if need_mb > self._budget_mb:
            return None
        known = worth is not None and self._all_known
        free_mb, lost, dropped = self.free_mb, 0.0, []
        for one in self._by_worth if known else self._by_age:
            dropped.append(one.row)
            free_mb += one.host_mb
            lost += one.worth or 0.0
            if known and lost >= (worth or 0.0):
                return None
            if free_mb >= need_mb:
                return dropped
        return None
