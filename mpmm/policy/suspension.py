"""Suspension: whether to keep an evicted copy in host memory instead of unloading it, and which copies to drop there.

A suspended copy comes back in `resume_s` instead of `load_s`, but suspending it takes `suspend_s`, and for that time it
keeps the room that a request waits for; an unload gives it back at once. Each model's times are measured. Before that
they follow from its size, and from the rates at which the way moves memory, measured on an H100.

All waiters wait for the device's memory, so the cost for them is how long that memory serves no request: `mb * load_s`
each time that a copy is loaded again, `mb * (suspend_s + resume_s)` each time that it is suspended and resumed. So a
suspension pays if both together are quicker than a load, by more than the risk that the copy is not requested before it
is dropped (`GAIN`).

But a suspension also changes which load comes next, and the order of loads alone makes the same requests take up to 8 %
more or less time, and more if all models are requested in turn: in the simulator, loads that take 0.01 % longer are
enough for that. If only few models gain, and all of them little, that is more than suspension saves. So there has to be
enough to save in all (`LEAST_SAVED_SHARE`), except for a copy that is clearly quicker to bring back (`CLEAR_GAIN`),
because its own users notice that.

When room is made on a device, a copy that would be suspended costs less than one that would be unloaded, whatever its
size (`KEPT_COST`). In the simulator, with 64 clients, Zipf's law, loads of 10 s and room for a third of the models in
host memory, that saves 5 % of the time. Counting the seconds of a resume, which grow with the size, would lead to more
and smaller victims, and take 5 to 8 % longer if the host has room for all.

Host memory has a budget. Copies there are dropped for one that is requested more often: the *worth* of a copy, per
second, is the time that its users are expected to save by it, that is, the rate at which its model is requested times
the time by which a resume is quicker than a load. For a copy that is still to be suspended the time which that takes is
subtracted; suspended copies have spent it already. Without this, models that are requested in turn would drop one
another for nothing: with 64 clients, loads of 5 s and room for a third of the models, that takes 4 % more time, and
10 % if they cycle. If the worth is not known, the copy that was suspended longest ago is dropped first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
    "saved_share",
    "suspend_s",
    "why_unsuspendable",
]


@unique
class Way(IntEnum):
    """How a copy can be suspended. The numbers are stored in segments, so they must not change."""

    NONE = 0
    COOPERATIVE = 1  # its object has `sleep()` and `wake_up()`
    CHECKPOINT = 2  # by the driver, without help from the object


@unique
class Unsuspendable(IntEnum):
    """Why a model's copies are no longer suspended. The numbers are stored in segments, so they must not change."""

    SUSPEND_FAILED = 1  # the object or the driver refused
    RESUME_FAILED = 2
    TIMED_OUT = 3  # neither ended nor failed within `limit_s`


_WHY_UNSUSPENDABLE: dict[int, str] = {
    Unsuspendable.SUSPEND_FAILED: "an attempt to suspend it failed",
    Unsuspendable.RESUME_FAILED: "an attempt to resume it failed",
    Unsuspendable.TIMED_OUT: "suspending or resuming it did not end in time",
}


def why_unsuspendable(number: int) -> str:
    """Return why a model's copies are no longer suspended, as a clause; empty for 0.

    number: from the model's row: an `Unsuspendable`, or a number of a later version.
    """
    return _WHY_UNSUSPENDABLE.get(number, f"reason {number}") if number else ""


@dataclass(frozen=True)
class Rates:
    """The rates of a way, in MB/s, and the fixed time that it takes in addition."""

    suspend_mb_s: float
    resume_mb_s: float
    fixed_s: float


# Cooperative: pageable host memory, which is what objects use unless they pin theirs. 8 GB went out in 0.57 s and came
# back in 0.96 s. Checkpoint: 32 GB in 15.8 s and 5.6 s, 1 GB in 1.02 s and 0.4 s.
RATES = {Way.COOPERATIVE: Rates(8000.0, 8000.0, 0.05), Way.CHECKPOINT: Rates(2100.0, 6000.0, 0.4)}
# How many times quicker than a load a suspension and a resume together have to be. In the simulator, with 64 clients,
# loads of 3 and 5 s, and room for all in the host, the same requests take 0.88 and 0.58 times as long as without
# suspension; with 2.0, which leaves out the larger models, it is 0.97 and 0.65.
GAIN = 1.5
# If suspension saves a smaller share than this of the memory, times the time, that loads take, only copies with the
# clear gain are suspended. With loads of 2 s the share would be 0.06, and the same requests took 0.87 to 1.22 times as
# long, 1.01 on average. With loads of 3 s it is 0.2, and they take 0.74 to 0.98 times as long; if the host has room for
# a third of the models, 0.82 to 1.11 and 0.94 on average.
LEAST_SAVED_SHARE = 0.15
CLEAR_GAIN = 4.0
# How many times the estimated saving a model may really save. Estimates may be wrong, so some copies have to be tried;
# otherwise a host that is faster than the one of `RATES` would never be found to be.
DOUBT = 2.0
# The cost of evicting a copy that is then suspended, as a share of the cost of unloading it.
KEPT_COST = 0.5
# A suspension or resume at less than a tenth of the slowest rate will not end: a driver call hangs, or an object waits
# for something that does not come.
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
    def is_measured(self) -> bool:
        """Whether its model has been suspended and resumed before."""
        return bool(self.suspend_s and self.resume_s)

    @property
    def worth(self) -> float | None:
        """The seconds that its users save by it per second, while it is suspended; None if that is not known."""
        return self.rate * max(0.0, self.load_s - resume_s(self)) if self.rate and self.load_s else None

    @property
    def worth_suspending(self) -> float | None:
        """The same for a copy that is still to be suspended, which also takes time; None if that is not known."""
        worth = self.worth
        return None if worth is None else max(0.0, worth - self.rate * suspend_s(self))


@dataclass(frozen=True)
class Kept:
    """A suspended copy: how much host memory it takes, since when, and its worth."""

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


def pays(copy: Movable, share: float) -> bool:
    """Tell whether suspending a copy is quicker than loading it again by so much that its room may come free later.

    share: the `saved_share` of all models. If that is large enough, and a model's times are not measured, it only has
    to be quicker at all; see `DOUBT`.
    """
    if not copy.way:
        return False
    gain = CLEAR_GAIN
    if share >= LEAST_SAVED_SHARE:
        gain = GAIN if copy.is_measured else 1.0
    return gain * _both_ways_s(copy) < copy.load_s


def saved_share(models: Iterable[Movable]) -> float:
    """Return which share of the memory, times the time, that loads take on devices would be saved by suspension.

    models: all that could be suspended, one copy of each. A model that has not been loaded yet is expected to load as
    the others do.
    """
    copies = list(models)
    known = [copy.load_s for copy in copies if copy.load_s]
    if not known:
        return 0.0
    mean_s = math.fsum(known) / len(known)
    copies = [copy if copy.load_s else replace(copy, load_s=mean_s) for copy in copies]
    loads = math.fsum(copy.mb * copy.load_s for copy in copies)
    return math.fsum(copy.mb * _saved_s(copy) for copy in copies) / loads if loads else 0.0


def _saved_s(copy: Movable) -> float:
    """Return by how much suspending and resuming a copy is quicker than loading it, if that pays."""
    both_s = _both_ways_s(copy)
    if not copy.is_measured:
        return min(copy.load_s, DOUBT * max(0.0, copy.load_s - both_s))
    return copy.load_s - both_s if GAIN * both_s < copy.load_s else 0.0


def _both_ways_s(copy: Movable) -> float:
    return suspend_s(copy) + resume_s(copy)


class HostRoom:
    """The host memory that another copy could get: what is free, and suspended copies that may be dropped."""

    def __init__(self, kept: Sequence[Kept], free_mb: float, budget_mb: float) -> None:
        """kept: the suspended copies. free_mb: what is left of `budget_mb`."""
        self.free_mb = free_mb
        self._budget_mb = budget_mb
        self._all_known = all(one.worth is not None for one in kept)
        order = [one for one in kept if not one.pinned]
        self._by_age = sorted(order, key=lambda one: one.since_s)
        self._by_worth = sorted(order, key=lambda one: ((one.worth or 0.0) / max(one.host_mb, 1.0), one.since_s))

    def dropped_for(self, need_mb: float, worth: float | None) -> list[int] | None:
        """Return the suspended copies (rows) to drop so that one of `need_mb` MB and this worth fits into the host.

        None if it does not fit, or if the copies that would have to be dropped are worth as much.
        """
        if need_mb <= self.free_mb:
            return []
        if need_mb > self._budget_mb:
            return None
        # Without a limit to what may be lost, the oldest ones go.
        most = worth if self._all_known else None
        free_mb, lost, dropped = self.free_mb, 0.0, []
        for one in self._by_age if most is None else self._by_worth:
            dropped.append(one.row)
            free_mb += one.host_mb
            lost += one.worth or 0.0
            if most is not None and lost >= most:
                return None
            if free_mb >= need_mb:
                return dropped
        return None
