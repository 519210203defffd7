"""Unloads: from an idle instance to a free row."""

from __future__ import annotations

from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.layout import Header, Instance, Model
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.part import Actor, Part
from mpmm.shared_state.transitions.seats import Seats
from mpmm.shared_state.transitions.suspensions import Suspensions
from mpmm.shared_state.transitions.twins import Twins

__all__ = ["Unloads"]


class Unloads(Part):
    """The transitions of instances that are unloaded."""

    def __init__(
        self, tables: Tables, actor: Actor, instances: Instances, twins: Twins, seats: Seats, suspensions: Suspensions
    ) -> None:
        super().__init__(tables, actor)
        self._instances = instances
        self._twins = twins
        self._seats = seats
        self._suspensions = suspensions

    def begin(self, t: Transaction, row: int, unloader: int, evicted: bool, cause: Cause | None = None) -> None:
        """Take an idle instance out of use; its owner, or else a member (slot), unloads it.

        If seats of it are in use, the unload begins once they are given back: see `layout.Instance`.

        The memory of twins comes back only with the last of them. So when one is evicted, twins that are idle and not
        pinned are unloaded, too; if others stay, the memory stays with them.
        """
        at = self._tables.instance(row)
        handle = b"" if self._segment.words[at + Instance.OWNER] else self._tables.text(at + Instance.HANDLE)
        twins = self._twins.of(handle, row) if handle else []
        # Nearly always there are no twins.
        if twins:
            for twin in self._twins.part(t, row, twins, evicted):
                self._begin_one(t, twin, unloader, evicted, cause)
        self._begin_one(t, row, unloader, evicted, cause)

    def _begin_one(self, t: Transaction, row: int, unloader: int, evicted: bool, cause: Cause | None) -> None:
        at = self._tables.instance(row)
        words = self._segment.words
        if words[at + Instance.STATE] != Instance.IDLE or words[at + Instance.SEAT_OF]:
            raise self._tables.surprise("the copy", at)
        self._seats.close(t, row)
        owner = words[at + Instance.OWNER]
        # An object is in no idle list (M2), because only its owner can use it.
        if not owner:
            t.set_all(self._instances.unlinked(at))
        self._instances.change_state(t, row, Instance.UNLOADING)
        # An object is in its owner's memory, so only the owner can unload it.
        t.set(at + Instance.HOLDER, owner or unloader + 1)
        if evicted:
            t.add(Header.EVICTIONS, 1)
            t.add(self._tables.model(words[at + Instance.MODEL]) + Model.EVICTIONS, 1)
        mb = self._segment.floats[at + Instance.MB]
        t.event(EventKind.UNLOAD_BEGAN, self._model_reference(row), row + 1, value=mb, cause=cause)
        self._ring(t, words[at + Instance.HOLDER] - 1)

    def ask(self, t: Transaction, row: int, unloader: int) -> None:
        """Have an instance unloaded because a caller asks for it: at once if it is idle, else when it is released.

        unloader: the member (slot) that unloads a handle; an object's owner unloads it. A pin does not prevent it.
        """
        at = self._tables.instance(row)
        if self._segment.words[at + Instance.STATE] == Instance.IDLE:
            self.begin(t, row, unloader, evicted=False, cause=Cause(Reason.ASKED))
        elif self._segment.words[at + Instance.STATE] == Instance.SUSPENDED:
            self._suspensions.drop(t, row, unloader, Cause(Reason.ASKED))
        # LOST must not become ASKED: the server is dead, so the handle must be neither unloaded nor handed over.
        elif not self._segment.words[at + Instance.UNLOAD_ON_RELEASE]:
            t.set(at + Instance.UNLOAD_ON_RELEASE, Instance.ASKED)
            self._seats.close(t, row)
            mb = self._segment.floats[at + Instance.MB]
            t.event(
                EventKind.UNLOAD_ON_RELEASE, self._model_reference(row), row + 1, value=mb, cause=Cause(Reason.ASKED)
            )

    def hand_over(self, t: Transaction, row: int, unloader: int) -> None:
        """Have another member (slot) unload a handle, because its HOLDER is dead or has not done so in time.

        The former HOLDER may still be unloading it: the member that ends the unload first frees the row, and the other
        one finds that it is gone.
        """
        at = self._tables.instance(row)
        words = self._segment.words
        # An object is in its owner's memory, so no other member can unload it.
        if words[at + Instance.STATE] != Instance.UNLOADING or words[at + Instance.OWNER]:
            raise self._tables.surprise("the copy", at)
        t.set(at + Instance.HOLDER, unloader + 1)
        # From now on the new HOLDER's time counts.
        t.set(at + Instance.HANDED_AT, t.now)
        self._ring(t, unloader)

    def note_late(self, t: Transaction, row: int) -> None:
        """Record that plans no longer count on the memory of an instance in mid-unload."""
        at = self._tables.instance(row)
        if self._segment.words[at + Instance.STATE] != Instance.UNLOADING:
            raise self._tables.surprise("the copy", at)
        # The row stays until the unload ends: until then the memory is in use, but no plan waits for it.
        t.set(at + Instance.UNLOAD_LATE, 1)

    def end(self, t: Transaction, row: int) -> None:
        """End an unload: free the row, and expect its memory back, unless a twin still keeps it."""
        at = self._tables.instance(row)
        if self._segment.words[at + Instance.STATE] != Instance.UNLOADING:
            raise self._tables.surprise("the copy", at)
        self._twins.leave_to_last(t, row)
        t.event(
            EventKind.UNLOAD_ENDED, self._model_reference(row), row + 1, value=self._segment.floats[at + Instance.MB]
        )
        # The ledger awaits MB until a figure shows that it is free, because the driver may take a while.
        self._instances.free_row(t, row)
