"""Words of the segment on which a process sleeps until another one changes them: a ticket's signal, a member's bell."""

from __future__ import annotations

from mpmm.shared_state.futex import wait_for_change, wake_all
from mpmm.shared_state.segment import Segment

__all__ = ["Signal"]


class Signal:
    """One such word. A process with news changes it in a transaction, and wakes the sleeper after the commit.

    word: its index in the segment. address: where it is mapped.
    """

    __slots__ = ("_words", "address", "word")

    def __init__(self, segment: Segment, word: int) -> None:
        self._words = segment.words
        self.word = word
        self.address = segment.address + 8 * word

    def seen(self) -> int:
        """Return a number that changes with every piece of news; without the lock. Raises ValueError if unmapped."""
        return self._words[self.word]

    def wait(self, seen: int, timeout_s: float) -> None:
        """Sleep until there is news, or `wake` is called; return at once if the word no longer is `seen`."""
        wait_for_change(self.seen, self.address, seen, timeout_s)

    def wake(self) -> None:
        """End the sleep without news, which leaves the word as it is; without the lock."""
        wake_all(self.address)
