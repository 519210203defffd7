"""Tenure: a process that was handed a copy, and comes back for it at once, comes before others for a moment.

If every release handed the copy to the first waiter, each of many processes would use it once and then sleep while the
others run; with the caches full of their code, a use costs a millisecond of processor time instead of 40 µs. So a
release leaves the copy idle for the process that was handed it, if that was less than `TENURE_S` ago, and most of the
process's last pauses between a release and the next acquire were short. Until `CALLED_UP_FOR_S` after the hand-over,
only this process takes the copy, and all others queue.

The fairness rule: a waiter waits at most (waiters before it) * (one hold + `CALLED_UP_FOR_S`). For that, the first
release of a tenure calls up the first waiter, which looks at the copy when the tenure is over: if the process has not
come back by then, or has died, the waiter takes the idle copy.

Only the process itself knows of its tenure. Shared state shows an idle copy, which any plan may give to the first
waiter sooner.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from mpmm.scheduling import CALLED_UP_FOR_NS
from mpmm.shared_state.core import is_compiled

__all__ = ["CALLED_UP_FOR_S", "TENURE_S", "Tenure", "Tenures", "called_up_for_ns", "looks_in_s"]

# Measured on 2 processors that others used, too, with the compiled core and copies that are held for no time: pairs per
# second of 4 and 16 processes, and the 99th percentile of an acquire. 4 ms: 20 000 to 30 000 and 11 000 to 17 000, 0.3
# and 85 ms. 2 ms: 28 000 and 15 000 to 25 000, 5 and 32 to 45 ms. 1 ms: 25 000 to 42 000 and 17 000 to 23 000, 4 and 18
# to 25 ms. 0.5 ms: 24 000 to 27 000 and 11 000 to 13 000, 2 and 12 to 17 ms. A turn also costs half a millisecond, for
# the wake-up and for code that has left the caches. In Python a turn costs ten times as much. On 2 processors that
# others hardly used, 4 and 16 processes make 2 000 and 375 pairs with 0.5 ms, and 5 100 and 2 200 with 4 ms.
TENURE_S = 0.000_5 if is_compiled() else 0.004
# When a waiter that was called up looks, because the tenure is over; usually a hand-over has ended it earlier.
CALLED_UP_FOR_S = CALLED_UP_FOR_NS / 1e9
# If most of a process's last pauses were longer than this, it leaves the copy to the next one at once, because the copy
# would be idle for a noticeable part of the tenure. Not their mean, because a process that now and then loses its
# processor pauses for milliseconds.
COMES_BACK_WITHIN_S = 0.000_1
PAUSES_KEPT = 8
# For how many models pauses are kept; a model that is dropped counts as new.
MODELS_KEPT = 1024
_ALL_SHORT = (1 << PAUSES_KEPT) - 1


def looks_in_s(called_up_ns: int) -> float:
    """Return in how many seconds a waiter that was called up at this time (monotonic, ns) looks."""
    return called_up_ns / 1e9 + CALLED_UP_FOR_S - time.monotonic()


def called_up_for_ns() -> int:
    """Return how many ns after its call-up a waiter looks."""
    return int(CALLED_UP_FOR_S * 1e9)


@dataclass
class Tenure:
    """The tenure of one copy (row, generation). called_up: the first waiter has been told to look when it is over."""

    row: int
    generation: int
    until: float
    called_up: bool = False


class Tenures:
    """The copies that this process was handed a moment ago, at most one per model. One object per `Session`.

    Threads may interfere, which can make a tenure shorter, or call up the first waiter twice.
    """

    def __init__(self) -> None:
        self._by_tag: dict[str, Tenure] = {}
        self._left_at: dict[str, float] = {}
        # One bit for each of the last pauses, set if it was short.
        self._short: dict[str, int] = {}

    def begin(self, tag: str, row: int, generation: int) -> None:
        """Record that this process has just been handed a copy."""
        self._by_tag[tag] = Tenure(row, generation, time.monotonic() + TENURE_S)

    def current(self, tag: str) -> Tenure | None:
        """Return the tenure of a model's copy if it is not over: a release may keep the copy for this process."""
        tenure = self._by_tag.get(tag)
        return tenure if tenure is not None and time.monotonic() < tenure.until else None

    def kept(self, tag: str) -> Tenure | None:
        """Return the tenure in which this process may have kept a model's copy, which it may take before others.

        It may take the copy for a moment longer than it may keep it. If both ended at once, a copy that was kept just
        before would stay idle until the waiter that was called up looks.
        """
        tenure = self._by_tag.get(tag)
        if tenure is not None and time.monotonic() >= tenure.until + max(0.0, CALLED_UP_FOR_S - TENURE_S):
            self._by_tag.pop(tag, None)
            return None
        return tenure

    def end(self, tag: str) -> None:
        """Record that this process no longer comes first: it leaves the copy of a model to the waiters."""
        self._by_tag.pop(tag, None)

    def leave(self, tag: str) -> None:
        """Record that this process gives back a copy of a model while others wait."""
        if len(self._left_at) > MODELS_KEPT:
            # Tags that are new in each run, like Beam's, would fill the memory of a process that lives long.
            self._left_at.clear()
            self._short.clear()
        if tag in self._left_at:
            # It has come back since, but not while others waited: they were served first.
            self._learn(tag, False)
        self._left_at[tag] = time.monotonic()

    def come_back(self, tag: str) -> None:
        """Record that it asks for the model again while others wait, and learn from how long that took."""
        left_at = self._left_at.pop(tag, None)
        if left_at is not None:
            self._learn(tag, time.monotonic() - left_at <= COMES_BACK_WITHIN_S)

    def _learn(self, tag: str, short: bool) -> None:
        self._short[tag] = (self._short.get(tag, _ALL_SHORT) << 1 | short) & _ALL_SHORT

    def comes_back_at_once(self, tag: str) -> bool:
        """Tell whether this process usually comes back for a model at once; assumed for a new model."""
        return 2 * self._short.get(tag, _ALL_SHORT).bit_count() >= PAUSES_KEPT
