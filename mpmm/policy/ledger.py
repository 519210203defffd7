"""The ledger of one device: which part of its memory belongs to whom, kept right between samples, and by them.

A source tells how much of a device is in use, only now and then, and late. The manager knows its own decisions since.
So the ledger keeps the one part that the manager cannot know, `external_mb`: memory in use that belongs to no instance
and to no lease (the driver, other programs, the contexts of worker processes). Everything else is accounted for:

    committed = external + instances in memory + loads in progress + leases + memory that is coming back

Rules:

L1  A load or a lease is admitted only where `committed` stays within the limit.
L2  The load was accounted for from its beginning, so its end changes `committed` only by the difference that measuring
    the instance shows. Nothing has to wait for a sample that has seen the load, and nothing counts twice.
L3  A sample moves `external_mb` only as far as it must. An instance that loads or unloads while the sample is taken
    may have had any part of its memory, a lease's program any part of the lease; so each had between a least and a most
    in the sample, and `external_mb` stays as it is if that can explain the figure.
L4  Memory of an ended unload counts until a sample that began after it shows that the memory is free; if other loads
    could hide that, for `HIDDEN_NS` more; and if a sample contradicts the accounts, until `memory_return_seconds`,
    after which it counts as external. So does what the program of a lease took when the lease ended: the program may
    end later. If memory never comes back late, the program's counts as external at once.
L5  A source that does not answer holds up no request: without a later sample, the accounts are trusted after
    `TRUST_ACCOUNTS_NS`.
L6  `external_mb` is below 0 if instances are assumed to take more than the figure: they take less, or one of them is
    gone already, and its process has not said so. So it rises with each that is unloaded, to 0 at most. Otherwise the
    memory that comes back would be given away twice, as long as loads in progress could explain the next figures.
L7  `external_least_mb` never includes memory of ours. It is known on a device that has nothing of ours, or if each
    instance is measured by itself; otherwise it only ever falls. `external_mb` may include memory by which instances
    have grown. So only the former can tell that evictions can never serve a request.

Figures are in MB, times in nanoseconds of one monotonic clock. Nothing here looks at a clock or at shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

__all__ = ["HIDDEN_NS", "TRUST_ACCOUNTS_NS", "Entry", "Figure", "Ledger", "Return", "expire", "settle"]

# nvidia-smi answers within half a second on any healthy host. A source that takes longer than this hangs.
TRUST_ACCOUNTS_NS = 1_000_000_000
# On an H100 (driver 580.159.04) the memory of a process is back before the process has ended, 0.11 s after it was
# killed. If something always loads meanwhile, each eviction costs this time: with a second, eight clients took 3.3
# times as long with an nvidia-smi of 0.3 s as with NVML.
HIDDEN_NS = 200_000_000
# Estimates and figures are not exact to the last MB: this share of the awaited memory may be missing.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Figure:
    """A sample of one device: the memory in use at some moment between `taken_ns` and `done_ns`.

    others_mb: the part of it that belongs to processes that the source lists and that are certainly not ours.
    """

    used_mb: float
    taken_ns: int
    done_ns: int
    others_mb: float = 0.0


@dataclass(frozen=True)
class Entry:
    """The memory of the device that one instance or lease had during a sample: from `least_mb` to `most_mb`.

    measured: the sample itself tells, because it lists the process.
    """

    least_mb: float
    most_mb: float
    measured: bool = False


@dataclass(frozen=True)
class Return:
    """Memory of an instance that was unloaded. before_mb: the last figure at that time, nan if there was none."""

    ended_ns: int
    mb: float
    before_mb: float = math.nan


@dataclass(frozen=True)
class Ledger:
    """The ledger of one device. external_mb, external_least_mb: nan before the first sample.

    written_off_mb: returns that the last change gave up.
    """

    external_mb: float = math.nan
    external_least_mb: float = math.nan
    returns: tuple[Return, ...] = ()
    written_off_mb: float = 0.0

    @property
    def returning_mb(self) -> float:
        """Memory that is still awaited."""
        return math.fsum(one.mb for one in self.returns)

    def awaiting(self, one: Return, most: int) -> Ledger:
        """Return the ledger after an instance was unloaded; beyond `most` returns, the last two are awaited as one."""
        external_mb = min(0.0, self.external_mb + one.mb) if self.external_mb < 0 else self.external_mb
        returns = (*self.returns, one)
        if len(returns) > most:
            last = returns[-2]
            before_mb = one.before_mb if math.isnan(last.before_mb) else last.before_mb
            returns = (*returns[:-2], Return(one.ended_ns, last.mb + one.mb, before_mb))
        return replace(self, external_mb=external_mb, returns=returns, written_off_mb=0.0)


def settle(
    ledger: Ledger, figure: Figure, entries: Iterable[Entry], now_ns: int, give_up_ns: int, late: bool = True
) -> Ledger:
    """Return the ledger after a sample.

    entries: one for each instance and lease that the sample may have seen, except those in `ledger.returns`.
    give_up_ns: how long after an unload memory that has not come back counts as external.
    late: the figures may show only some time after the unload that memory is free.
    """
    entries = tuple(entries)
    least = math.fsum(entry.least_mb for entry in entries)
    most = math.fsum(entry.most_mb for entry in entries)
    if late:
        returns, written_off = _still_returning(ledger, figure, least, most, now_ns, give_up_ns)
    else:
        returns, written_off = tuple(one for one in ledger.returns if one.ended_ns > figure.taken_ns), 0.0
    awaited = math.fsum(one.mb for one in returns)
    low, high = figure.used_mb - most - awaited, figure.used_mb - least
    known = ledger.external_mb
    external = high if math.isnan(known) else min(max(known, low, figure.others_mb), high)
    if not returns and all(entry.measured for entry in entries):
        # Nothing of ours is there, or all of it is measured by itself.
        sure = external
    elif math.isnan(ledger.external_least_mb):
        sure = min(max(0.0, low), external)
    else:
        sure = min(ledger.external_least_mb, external)
    return Ledger(external, max(sure, min(figure.others_mb, external)), returns, written_off)


def expire(ledger: Ledger, sampled_ns: int, now_ns: int, give_up_ns: int) -> Ledger:
    """Return the ledger after some time: without a later sample, the accounts are trusted after a moment.

    If a later sample has shown that the memory was still in use, but none has followed, it is awaited for `give_up_ns`,
    as it is while samples come.
    sampled_ns: when the last sample began.
    """
    patience_ns = min(TRUST_ACCOUNTS_NS, give_up_ns)
    is_silent = now_ns - sampled_ns >= patience_ns

    def is_awaited(one: Return) -> bool:
        age_ns = now_ns - one.ended_ns
        return age_ns < patience_ns if sampled_ns < one.ended_ns else not is_silent or age_ns < give_up_ns

    kept = tuple(one for one in ledger.returns if is_awaited(one))
    return ledger if len(kept) == len(ledger.returns) else replace(ledger, returns=kept, written_off_mb=0.0)


def _still_returning(
    ledger: Ledger, figure: Figure, least: float, most: float, now_ns: int, give_up_ns: int
) -> tuple[tuple[Return, ...], float]:
    """Return the returns that a sample has not shown to be free, and how much was written off."""
    later = [one for one in ledger.returns if one.ended_ns > figure.taken_ns]
    judged = sorted((one for one in ledger.returns if one.ended_ns <= figure.taken_ns), key=lambda one: one.ended_ns)
    if math.isnan(ledger.external_mb):
        return tuple(later), 0.0
    # Memory beyond external memory and the least of ours: awaited memory may be part of it, and so may loads.
    unexplained = figure.used_mb - ledger.external_mb - least
    awaited = math.fsum(one.mb for one in judged)
    if unexplained <= TOLERANCE * awaited:
        return tuple(later), 0.0
    judged = _without_fallen(judged, figure)
    judged = _at_most(judged, unexplained)
    kept: list[Return] = []
    written_off = 0.0
    # True if loads in progress, and instances that unload, could account for all of it.
    hidden = unexplained <= most - least + TOLERANCE * awaited
    for one in judged:
        age_ns = now_ns - one.ended_ns
        if age_ns >= give_up_ns:
            written_off += 0.0 if hidden else one.mb
        elif not hidden or age_ns < HIDDEN_NS:
            kept.append(one)
    return (*kept, *later), written_off


def _without_fallen(judged: Sequence[Return], figure: Figure) -> list[Return]:
    """Return the returns by whose memory the figure has not fallen since; the oldest count as free first."""
    before = [one.before_mb for one in judged if not math.isnan(one.before_mb)]
    fallen = max(before, default=-math.inf) - figure.used_mb
    kept: list[Return] = []
    for one in judged:
        if not kept and fallen >= (1.0 - TOLERANCE) * one.mb:
            fallen -= one.mb
        else:
            kept.append(one)
    return kept


def _at_most(judged: Sequence[Return], most_mb: float) -> list[Return]:
    """Return the awaited memory reduced to what can still be in use; the oldest part is cut first."""
    kept: list[Return] = []
    left = most_mb
    for one in reversed(judged):
        if left <= 0:
            break
        kept.append(one if one.mb <= left else replace(one, mb=left))
        left -= one.mb
    return kept[::-1]
