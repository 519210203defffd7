"""A process's doorbell: a word of its member row, on which its background thread sleeps."""

from __future__ import annotations

from mpmm.shared_state.namespace import Namespace

__all__ = ["Doorbell"]


class Doorbell:
    """A word that others change, waking the sleeper, when they have something for this process to do.

    They change it in a transaction (`transitions.members.ring`). `ring` here only wakes, without the lock.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._bell = namespace.tables.bell(namespace.slot)

    def rung(self) -> int:
        """Return a number that changes when others ring."""
        return self._bell.seen()

    @property
    def word(self) -> int:
        """Return the index of the word in the segment."""
        return self._bell.word

    def wait(self, seen: int, timeout_s: float) -> None:
        """Sleep until another process rings, or `ring` is called; not at all if `rung` no longer returns `seen`."""
        self._bell.wait(seen, timeout_s)

    def ring(self) -> None:
        """End the sleep; it takes no lock, so the word does not change, and a thread not yet asleep misses this."""
        self._bell.wake()
