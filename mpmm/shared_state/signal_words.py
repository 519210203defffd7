"""Words of the segment on which a process sleeps until another one changes them: a ticket's signal, a member's bell."""

from __future__ import annotations

from mpmm.shared_state.futex import wait_for_change, wake_all
from mpmm.shared_state.segment import Segment

__all__ = ["Signal"]


class Signal:
    """One such word. Who has news changes it in a transaction, and wakes the sleeper once that is committed.

    word: its index in the segment. address: where it is mapped.
    """

    __slots__ = ("_words", "address", "word")

    def __init__(self, segment: Segment, word: int) -> None:
        self._words = segment.words
        self.word = word
        self.address = segment.address + 8 * word

    def seen(self) -> int:
        """Return a number that changes with each news; without the lock. Raises ValueError if it is unmapped."""
        return self._words[self.word]

    def wait(self, seen: int, timeout_s: float) -> None:
        """Sleep until there are news, or `wake` is called; not at all if `seen` is not what stands there any more."""
        wait_for_change(self.seen, self.address, seen, timeout_s)

    def wake(self) -> None:
        """End the sleep without news, so that nothing is remembered of it; without the lock."""
        wake_all(self.address)
