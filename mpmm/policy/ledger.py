"""The ledger of one device: what of its memory is whose, kept right between samples and by them.

A source tells how much of a device is in use, now and then, and late. What the manager has decided since, it knows
by itself. So the ledger keeps the one part that it cannot know, `external_mb`: what is in use and belongs to no
instance and to no lease (the driver, other programs, the contexts of worker processes). Everything else is accounted
for:

    committed = external + instances in memory + loads in progress + leases + memory that is coming back

Rules:

L1  A load or a lease is admitted only where `committed` stays within the limit.
L2  The end of a load changes `committed` only by what measuring the instance has taught, because the load was
    accounted for from its beginning. So nothing has to wait for a sample that has seen the load, and nothing counts
    twice.
L3  A sample moves `external_mb` only as far as it must. An instance that loads or unloads while the sample is taken
    may have had any part of its memory, a lease's program any part of the lease; so each has a least and a most that
    it had in the sample, and `external_mb` stays where it is if the figure can be explained like that.
L4  Memory of an ended unload counts until a sample that began after it shows that the memory is free; where other
    loads could hide that, for `HIDDEN_NS` more; and where a sample contradicts the accounts, until
    `memory_return_seconds`, after which it counts as external.
L5  A source that does not answer holds up no request: without a later sample, the accounts are trusted after
    `TRUST_ACCOUNTS_NS`.
L6  `external_mb` falls below 0 where what instances are taken for is more than the figure: they take less, or one of
    them is gone already, and nobody has said so. So with each that goes it rises, to 0 at most, or the memory that
    comes back would be given away a second time for as long as loads in progress could explain the next figures.
L7  `external_least_mb` never has memory of ours in it. It is known on a device that has nothing of ours, or where each
    instance is measured by itself; otherwise it only ever falls. `external_mb` may contain what instances have grown
    by. So only the former says that a request can never be served by evictions.

Figures are in MB, times in nanoseconds of one monotonic clock. Nothing here looks at a clock or at shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

__all__ = ["HIDDEN_NS", "TRUST_ACCOUNTS_NS", "Entry", "Figure", "Ledger", "Return", "expire", "settle"]

# nvidia-smi answers within half a second on any host in good order. What takes longer than this is a source that hangs.
TRUST_ACCOUNTS_NS = 1_000_000_000
# On an H100 (driver 580.159.04) the memory of a process is back before the process has ended, 0.11 s after it was
# killed. Where something always loads meanwhile, each eviction costs this time: with a second, eight clients took 3.3
# times as long with an nvidia-smi of 0.3 s as with NVML.
HIDDEN_NS = 200_000_000
# Estimates and figures are not exact to the last MB: so much of what is awaited may be missing.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Figure:
    """A sample of one device: what was in use at some moment between `taken_ns` and `done_ns`.

    others_mb: so much of it belongs to processes that the source lists and that are certainly not ours.
    """

    used_mb: float
    taken_ns: int
    done_ns: int
    others_mb: float = 0.0


@dataclass(frozen=True)
class Entry:
    """What one instance or lease had of the device while a sample was taken: from `least_mb` to `most_mb`.

    measured: the sample itself tells, as it lists the process.
    """

    least_mb: float
    most_mb: float
    measured: bool = False


@dataclass(frozen=True)
class Return:
    """Memory of an instance that is gone. before_mb: the figure that stood when it went, nan if there was none."""

    ended_ns: int
    mb: float
    before_mb: float = math.nan


@dataclass(frozen=True)
class Ledger:
    """What is kept of a device. external_mb, external_least_mb: nan before the first sample.

    written_off_mb: returns that were given up by the last change.
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
        """Return the ledger once an instance is gone; beyond `most` returns, the last two are awaited as one."""
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

    entries: one for each instance and lease that the sample may have seen, but for those in `ledger.returns`.
    give_up_ns: after so long what did not come back counts as external.
    late: freed memory may show up in the figures some time after the unload.
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
        # Nothing of ours is there, or all of it is told apart.
        sure = external
    elif math.isnan(ledger.external_least_mb):
        sure = min(max(0.0, low), external)
    else:
        sure = min(ledger.external_least_mb, external)
    return Ledger(external, max(sure, min(figure.others_mb, external)), returns, written_off)


def expire(ledger: Ledger, sampled_ns: int, now_ns: int, give_up_ns: int) -> Ledger:
    """Return the ledger once time has passed: without a later sample, the accounts are trusted after a moment.

    sampled_ns: when the last sample was begun.
    """
    patience_ns = min(TRUST_ACCOUNTS_NS, give_up_ns)
    kept = tuple(one for one in ledger.returns if sampled_ns >= one.ended_ns or now_ns - one.ended_ns < patience_ns)
    return ledger if len(kept) == len(ledger.returns) else replace(ledger, returns=kept, written_off_mb=0.0)


def _still_returning(
    ledger: Ledger, figure: Figure, least: float, most: float, now_ns: int, give_up_ns: int
) -> tuple[tuple[Return, ...], float]:
    """Return what a sample has not shown to be free, and how much was written off."""
    later = [one for one in ledger.returns if one.ended_ns > figure.taken_ns]
    judged = sorted((one for one in ledger.returns if one.ended_ns <= figure.taken_ns), key=lambda one: one.ended_ns)
    if not judged or math.isnan(ledger.external_mb):
        return tuple(later), 0.0
    # What no other program can have for certain; of that the awaited memory can be a part, and so can what loads.
    unexplained = figure.used_mb - ledger.external_mb - least
    awaited = math.fsum(one.mb for one in judged)
    if unexplained <= TOLERANCE * awaited:
        return tuple(later), 0.0
    judged = _without_fallen(judged, figure)
    judged = _at_most(judged, unexplained)
    kept: list[Return] = []
    written_off = 0.0
    # What other loads have taken, or instances that unload still have, could be all there is to see.
    hidden = unexplained <= most - least + TOLERANCE * awaited
    for one in judged:
        age_ns = now_ns - one.ended_ns
        if age_ns >= give_up_ns:
            written_off += 0.0 if hidden else one.mb
        elif not hidden or age_ns < HIDDEN_NS:
            kept.append(one)
    return (*kept, *later), written_off


def _without_fallen(judged: Sequence[Return], figure: Figure) -> list[Return]:
    """Return those whose memory the figure has not fallen by since; the oldest are believed to be free first."""
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
    """Return the awaited memory cut down to what can still be in use, the oldest part first."""
    kept: list[Return] = []
    left = most_mb
    for one in reversed(judged):
        if left <= 0:
            break
        kept.append(one if one.mb <= left else replace(one, mb=left))
        left -= one.mb
    return kept[::-1]
