"""What all tables' transitions share: the segment, the member that acts, and how rows are taken.

`Part` is the base of the classes in this package. A part knows only the parts that its constructor gets, which lie
below it; `Transitions` makes all of them, from the ground up.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from mpmm.shared_state.futex import wake_all
from mpmm.shared_state.layout import Header, Instance, Member, Table
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction, float_bits

__all__ = ["SMOOTHING", "Actor", "Part"]

# Weight of the newest load or hold in the mean: the last ten count.
SMOOTHING = 0.1


class Actor(Protocol):
    """The member that makes the transitions, as far as they need to know it.

    In a process that has joined, it is the `Namespace`. Its slot is -1 until the member has a row; its settings may
    change, so transitions read them inside the transaction that needs them.
    """

    @property
    def slot(self) -> int:
        """The member's slot."""

    @property
    def name(self) -> str:
        """The namespace's name, for log lines."""

    @property
    def settings(self) -> Settings:
        """The namespace's current parameters."""


class Part:
    """The transitions of one table, made by one member of a namespace. All methods need the lock."""

    def __init__(self, tables: Tables, actor: Actor) -> None:
        self._tables = tables
        self._segment = tables.segment
        self._layout = tables.segment.layout
        self._actor = actor

    def _take_row(self, t: Transaction, table: Table) -> int:
        """Return a free row for the caller to fill. Raises TableFullError."""
        row = self._tables.free_row(table)
        self._grow(t, table, row)
        return row

    def _grow(self, t: Transaction, table: Table, row: int) -> None:
        # Searches end at this word (H5), and would not find a used row above it.
        if row >= self._segment.words[table.end_word]:
            t.set(table.end_word, row + 1)

    def _next_generation(self, t: Transaction) -> int:
        """Return a number that no row has had, by which a process that remembers a row sees whether it is the same."""
        generation = int(self._segment.words[Header.NEXT_GENERATION])
        # Not undone by a rollback: a reader without the lock may have seen the number in a row of a transaction that
        # was rolled back, and would take the next row with this number for the same one.
        t.count_up(Header.NEXT_GENERATION)
        return generation

    def _wake(self, t: Transaction, word: int) -> None:
        # The word first, the wake-up only after the commit: a waiter that is woken before that would find nothing new,
        # and sleep on. The word has changed by then, so a waiter that is about to sleep does not.
        # Not undone by a rollback: a waiter that saw the word of a rolled-back transaction would take the next one's
        # for old news, and sleep through it.
        t.count_up(word)
        t.after.append(partial(wake_all, self._segment.address + 8 * word))

    def _ring(self, t: Transaction, slot: int) -> None:
        """Wake the background thread of a member: it has something to unload, or should check for work."""
        self._wake(t, self._tables.member(slot) + Member.BELL)

    def _ring_all(self, t: Transaction) -> None:
        """Wake the background threads of all members that have one."""
        words = self._segment.words
        for slot in self._tables.used_members():
            if words[self._tables.member(slot) + Member.STATE] in (Member.WORKER, Member.GUEST):
                self._ring(t, slot)

    def _model_reference(self, row: int) -> int:
        """Return the reference to the model of an instance row, for events."""
        return int(self._segment.words[self._tables.instance(row) + Instance.MODEL]) + 1

    def _for_s(self, t: Transaction, row: int) -> float:
        """Return how long an instance has been in its state."""
        return float(t.now - self._segment.words[self._tables.instance(row) + Instance.SINCE]) / 1e9

    def _update_float(self, t: Transaction, word: int, value: float) -> None:
        # Usually nothing has changed, and each sample has a figure for every process.
        if self._segment.floats[word] != value:
            t.set_float(word, value)

    def _smoothed(self, word: int, seconds: float) -> int:
        """Return the new word for a decaying mean of durations after another one of `seconds`."""
        old = self._segment.floats[word]
        # Never 0.0 after a first duration, because 0 stands for "unknown".
        return float_bits(old + SMOOTHING * (seconds - old) if old else max(seconds, 1e-9))
