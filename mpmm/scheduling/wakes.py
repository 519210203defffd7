"""Having the next user of a copy awake in time: before it is handed over, and right after."""

from __future__ import annotations

import time

from mpmm.shared_state.futex import yield_processor
from mpmm.shared_state.namespace import Namespace

__all__ = ["SPIN_S", "Wakes"]

# Longer than a release takes, even where everything about it has left the processor's caches.
SPIN_S = 0.000_3
# Who makes way for a waiter and comes back later than this has made way for somebody else, too: processors are scarce.
LONG_WAY_S = 0.000_5
# Then it does not for so many times as long, which bounds what it may lose.
REST = 100


class Wakes:
    """Wake-ups around a hand-over. Methods need no lock."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._queue = namespace.reads.queue
        self._makes_way_from = 0.0

    def yield_to_waiter(self) -> None:
        """Let the waiter that was just woken run on this processor; without the lock.

        There the kernel puts it mostly, even if another one is idle, and then it would wait until this process sleeps.
        So the waiter has its copy after 100 instead of 150 us, or, when it has slept for 10 ms, 150 instead of 270.
        """
        began = time.monotonic()
        # Where many wait for a processor, a yield can cost a whole time slice each time.
        if began >= self._makes_way_from:
            yield_processor()
            away_s = time.monotonic() - began
            if away_s > LONG_WAY_S:
                self._makes_way_from = began + REST * away_s

    def prewake(self, instance: int) -> None:
        """Wake the newest waiter ahead of a copy's release, if it waits for that model, for `spin_for_answer`.

        Needs no lock.

        Where it is the only one, it likely waits for just this, and a processor that has gone to sleep with it takes
        as long to wake as the release itself. Where there are more, they are not all asleep.
        """
        if self._queue.anybody_waits() and (newest := self._queue.newest_wants(instance)) is not None:
            self._queue.signal(newest).wake()

    def spin_for_answer(self, ticket: int) -> None:
        """Stay awake for the answer that `prewake` has announced, for a moment; needs no lock."""
        until = time.monotonic() + SPIN_S
        while self._queue.is_waiting(ticket) and time.monotonic() < until:
            yield_processor()
