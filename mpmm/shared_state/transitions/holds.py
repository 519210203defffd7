"""Holds: take an idle instance, use it, release it. The most frequent transitions, in as few stores as possible.

The compiled core (`core`) does the same in the common cases; this module is the definition, and `tests/test_core.py`
compares the two word by word.
"""

from __future__ import annotations

from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.layout import Header, Instance, Model
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.isolation import Isolation
from mpmm.shared_state.transitions.part import Actor, Part
from mpmm.shared_state.transitions.unloads import Unloads

__all__ = ["Holds"]


class Holds(Part):
    """The transitions of instances that are in use."""

    def __init__(
        self, tables: Tables, actor: Actor, isolation: Isolation, instances: Instances, unloads: Unloads
    ) -> None:
        super().__init__(tables, actor)
        self._isolation = isolation
        self._instances = instances
        self._unloads = unloads
        # Bound once, because each look-up counts on the warm path.
        self._pushed = instances.pushed
        self._unlinked = instances.unlinked

    def activate(self, t: Transaction, row: int, holder: int, *further: tuple[int, int]) -> None:
        """Make an idle instance active for a member (reference), and count a hit.

        further: changes to store in the same step. This and `release` are the warm path, and store their changes in one
        step.
        """
        at = self._tables.instance(row)
        words = self._segment.words
        if words[at + Instance.STATE] != Instance.IDLE:
            raise self._tables.surprise("the copy", at)
        model = self._tables.model(words[at + Instance.MODEL])
        # What `Instances.change_state` does from IDLE to ACTIVE, word by word: LOADED stays the same, and an idle
        # instance is not STEADY. A counter that is added there for these states must be added here, and in `_core.c`.
        changes = [
            (at + Instance.STATE, Instance.ACTIVE),
            (at + Instance.SINCE, t.now),
            (at + Instance.HOLDER, holder),
            (at + Instance.USES, words[at + Instance.USES] + 1),
            (model + Model.IDLE, words[model + Model.IDLE] - 1),
            (model + Model.ACTIVE, words[model + Model.ACTIVE] + 1),
            (model + Model.HITS, words[model + Model.HITS] + 1),
            (Header.ACTIVE, words[Header.ACTIVE] + 1),
            (Header.HITS, words[Header.HITS] + 1),
            *further,
        ]
        # `set_all` must not get a word twice; none of the idle list's words is among those above.
        if not words[at + Instance.OWNER]:
            changes += self._unlinked(at)
        t.set_all(changes)

    def take_idle(self, t: Transaction, row: int, holder: int) -> None:
        """Give an idle instance to a member (reference) that did not have to wait."""
        self.activate(t, row, holder, t.next_event(EventKind.HIT, self._model_reference(row), row + 1))

    def release(self, t: Transaction, row: int, used: bool = True) -> None:
        """Make an active instance idle, or have it unloaded if that was asked for. Ends its isolation.

        used: False if it was only loaded, so that the time of the hold does not count in the mean.
        """
        at = self._tables.instance(row)
        words = self._segment.words
        if words[at + Instance.STATE] != Instance.ACTIVE:
            raise self._tables.surprise("the copy", at)
        # One word instead of a search, because usually nothing runs alone. An IDLE instance must not (D3), or its
        # devices would stay closed to all others.
        if words[Header.ISOLATED]:
            self._isolation.end(t, row)
        held = (t.now - words[at + Instance.SINCE]) / 1e9
        event = t.next_event(EventKind.RELEASED, words[at + Instance.MODEL] + 1, row + 1, value=held)
        unload_on_release, holder = words[at + Instance.UNLOAD_ON_RELEASE], words[at + Instance.HOLDER]
        if unload_on_release == Instance.LOST:
            # The row does not become IDLE in between, so it is never in the idle list. (M2)
            t.set_all((event,))
            self._end_lost(t, row, holder)
            return
        model = self._tables.model(words[at + Instance.MODEL])
        changes = [
            event,
            (at + Instance.STATE, Instance.IDLE),
            (at + Instance.SINCE, t.now),
            (at + Instance.HOLDER, 0),
            (model + Model.ACTIVE, words[model + Model.ACTIVE] - 1),
            (model + Model.IDLE, words[model + Model.IDLE] + 1),
            (model + Model.HOLD_S, self.hold_mean(model, held, used)),
            (Header.ACTIVE, words[Header.ACTIVE] - 1),
        ]
        if not words[at + Instance.OWNER]:
            changes += self._pushed(at, row)
        t.set_all(changes)
        if unload_on_release and words[at + Instance.SEAT_OF]:
            self._instances.free_row(t, row)
        elif unload_on_release:
            # Through IDLE, where every unload begins: that removes it from the list again, and handles its twins. The
            # lock is held throughout, so no waiter takes it in between.
            self._unloads.begin(t, row, holder - 1, evicted=False, cause=Cause(Reason.ASKED))

    def _end_lost(self, t: Transaction, row: int, holder: int) -> None:
        """Free or unload a released instance whose server is dead, so that no other member gets it."""
        at, words = self._tables.instance(row), self._segment.words
        if words[at + Instance.HAS_SERVER] and not words[at + Instance.SERVER]:
            self._instances.free_row(t, row)
        else:
            # Its holder's process may have something left to unload.
            self._instances.change_state(t, row, Instance.UNLOADING)
            self._ring(t, holder - 1)

    def hold_mean(self, model: int, held: float, used: bool) -> int:
        """Return the new word for the mean time that instances of a model (first word) are held."""
        word = model + Model.HOLD_S
        return self._smoothed(word, held) if used else self._segment.words[word]

    def discard(self, t: Transaction, row: int) -> None:
        """Free the row of an active instance whose server is dead."""
        at = self._tables.instance(row)
        if self._segment.words[at + Instance.STATE] != Instance.ACTIVE:
            raise self._tables.surprise("the copy", at)
        t.event(EventKind.LOST, self._model_reference(row), row + 1, value=self._segment.floats[at + Instance.MB])
        self._instances.free_row(t, row)
