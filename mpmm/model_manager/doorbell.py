"""A process's doorbell: a word of its member row, on which its background thread sleeps."""

from __future__ import annotations

from mpmm.shared_state.futex import wait_for_change, wake_all
from mpmm.shared_state.layout import Member
from mpmm.shared_state.namespace import Namespace

__all__ = ["Doorbell"]


class Doorbell:
    """What others change, and wake the sleeper, when they have something for this process to do.

    That is in a transaction of theirs (`transitions.members.ring`). `ring` only wakes, without the lock.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._words = namespace.segment.words
        self._word = namespace.tables.member(namespace.slot) + Member.BELL
        self._address = namespace.segment.address + 8 * self._word

    def rung(self) -> int:
        """Return a number that changes when others ring."""
        return int(self._words[self._word])

    def wait(self, seen: int, timeout_s: float) -> None:
        """Sleep until somebody rings, or `ring` is called; not at all if `rung` is no longer what was seen."""
        wait_for_change(self.rung, self._address, seen, timeout_s)

    def ring(self) -> None:
        """End the sleep; without the lock, and so without a ring that would be remembered."""
        wake_all(self._address)
