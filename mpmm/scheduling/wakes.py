"""Waking the next user of a copy in time: before the copy is handed over, and right after."""

from __future__ import annotations

import time

from mpmm.shared_state.futex import yield_processor
from mpmm.shared_state.namespace import Namespace

__all__ = ["SPIN_S", "Wakes"]

# Longer than a release takes, even if its code and data have left the processor's caches.
SPIN_S = 0.000_3
# If a yield to a waiter takes longer than this, other processes have run, too: processors are scarce.
LONG_WAY_S = 0.000_5
# Then the process does not yield for this many times as long, which limits how much time it may lose.
REST = 100


class Wakes:
    """Wake-ups around a hand-over. Methods need no lock."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._queue = namespace.reads.queue
        self._makes_way_from = 0.0

    def yield_to_waiter(self) -> None:
        """Let the waiter that was just woken run on this processor; call it without the lock.

        The kernel usually puts it there, even if another processor is idle, and it would wait until this process
        sleeps. With the yield, the waiter has its copy after 100 instead of 150 µs, or, if it has slept for 10 ms,
        after 150 instead of 270.
        """
        began = time.monotonic()
        # If many processes wait for a processor, each yield can cost a whole time slice.
        if began >= self._makes_way_from:
            yield_processor()
            away_s = time.monotonic() - began
            if away_s > LONG_WAY_S:
                self._makes_way_from = began + REST * away_s

    def prewake(self, instance: int) -> None:
        """Wake the newest waiter before a copy is released, if it waits for that model, for `spin_for_answer`.

        Needs no lock.

        If it is the only waiter, it probably waits for just this copy, and waking the processor that sleeps with it
        takes as long as the release itself. If there are more, they are not all asleep.
        """
        if self._queue.anybody_waits() and (newest := self._queue.newest_wants(instance)) is not None:
            self._queue.signal(newest).wake()

    def spin_for_answer(self, ticket: int) -> None:
        """Stay awake for a moment for the answer that `prewake` has announced; needs no lock."""
        until = time.monotonic() + SPIN_S
        while self._queue.is_waiting(ticket) and time.monotonic() < until:
            yield_processor()
