"""Instance rows: their states with the counters that depend on them, their memory, and the lists of idle ones.

`loads`, `holds`, `unloads`, `suspensions` and `leases` change instances through this module.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpmm.shared_state.layout import MOST_SPANNED, Header, Instance, Model, Ticket
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.isolation import Isolation
from mpmm.shared_state.transitions.ledgers import Ledgers
from mpmm.shared_state.transitions.part import Actor, Part
from mpmm.shared_state.transitions.tickets import Tickets

__all__ = ["Instances"]

# Counters of the model row that include an instance in this state. (M1, M3)
_MODEL_COUNTERS = {
    Instance.LOADING: (Model.LOADING,),
    Instance.ACTIVE: (Model.LOADED, Model.ACTIVE),
    Instance.IDLE: (Model.LOADED, Model.IDLE),
    Instance.UNLOADING: (Model.UNLOADING,),
    Instance.SUSPENDING: (Model.SUSPENDED,),
    Instance.SUSPENDED: (Model.SUSPENDED,),
    Instance.RESUMING: (Model.LOADING,),
}
# The same for the header. (H2)
_HEADER_COUNTERS = {
    Instance.LOADING: Header.LOADING,
    Instance.RESUMING: Header.LOADING,
    Instance.ACTIVE: Header.ACTIVE,
}


class Instances(Part):
    """The transitions that every instance row has in common."""

    def __init__(self, tables: Tables, actor: Actor, tickets: Tickets, ledgers: Ledgers, isolation: Isolation) -> None:
        super().__init__(tables, actor)
        self._tickets = tickets
        self._ledgers = ledgers
        self._isolation = isolation

    def new_row(self, t: Transaction, model: int, member: int, devices: int) -> int:
        """Return a new row that a member (slot) holds; the caller sets its state. Raises TableFullError."""
        row = self._take_row(t, self._layout.instances)
        at = self._tables.instance(row)
        if not 0 < devices.bit_count() <= MOST_SPANNED:
            raise self._tables.surprise(f"of {devices.bit_count()} devices the copy", at)
        # Up to the handle's length, which makes the text empty: the bytes behind it are not read then.
        t.set_all([(at + word, 0) for word in range(Instance.STATE, Instance.HANDLE + 1)])
        t.set(at + Instance.MODEL, model)
        t.set(at + Instance.GENERATION, self._next_generation(t))
        t.set(at + Instance.HOLDER, member + 1)
        t.set(at + Instance.DEVICES, devices)
        return row

    def set_mb(self, t: Transaction, row: int, mb: float, shares_mb: Sequence[float] = ()) -> None:
        """Set what an instance takes: `shares_mb` of each device, or equal shares if that is empty."""
        at = self._tables.instance(row)
        # The sum together with the parts (I5), or plans and ledgers would count different memory.
        self._update_float(t, at + Instance.MB, mb)
        span = self._segment.words[at + Instance.DEVICES].bit_count()
        # On a single device only MB is written; `shares_of` follows the same rule.
        if span > 1:
            for number, share_mb in enumerate(shares_mb or [mb / span] * span):
                self._update_float(t, at + Instance.SHARES + number, share_mb)

    def change_state(self, t: Transaction, row: int, state: int) -> None:
        """Put a row into another state and update all counters; the caller updates the idle list."""
        at = self._tables.instance(row)
        words = self._segment.words
        old = words[at + Instance.STATE]
        model = self._tables.model(words[at + Instance.MODEL])
        # Once it leaves the state in which it started, its devices need not be kept quiet any more. (I9)
        self._isolation.end_steady(t, row)
        gone, come = set(_MODEL_COUNTERS.get(old, ())), set(_MODEL_COUNTERS.get(state, ()))
        # Only counters that change, to keep the undo log short.
        for counter in gone - come:
            t.add(model + counter, -1)
        for counter in come - gone:
            t.add(model + counter, 1)
        if old in _HEADER_COUNTERS:
            t.add(_HEADER_COUNTERS[old], -1)
        if state in _HEADER_COUNTERS:
            t.add(_HEADER_COUNTERS[state], 1)
        # SINCE changes with every state: it tells how long an instance has been idle, held or stuck.
        t.set(at + Instance.STATE, state)
        t.set(at + Instance.SINCE, t.now)

    def free_row(self, t: Transaction, row: int) -> None:
        """Free a row in any state; the instance's memory, if it had any, is expected back.

        Seats in use become rows of their own, see `orphan_seats`.
        """
        at = self._tables.instance(row)
        words = self._segment.words
        state = words[at + Instance.STATE]
        self.orphan_seats(t, row)
        is_seat = bool(words[at + Instance.SEAT_OF])
        if is_seat:
            self._count_seat_out(t, row)
        if state == Instance.IDLE and not words[at + Instance.OWNER]:
            t.set_all(self.unlinked(at))
        # Without a row it cannot run alone any more, and its devices would stay closed to all others.
        self._isolation.end(t, row)
        self.requeue_waiters(t, row)
        # A load or resume has a reservation, but no memory that could come back.
        if state not in (Instance.LOADING, Instance.RESUMING):
            self._ledgers.expect_back(t, row)
        self.change_state(t, row, Instance.FREE)
        if not is_seat:
            self._isolation.note_change(t, row)
        t.set(self._tables.model(words[at + Instance.MODEL]) + Model.USED_AT, t.now)

    def requeue_waiters(self, t: Transaction, row: int) -> None:
        """Put the ticket for which an instance was granted or promised back into the queue.

        The instance was lost before its waiter woke.
        """
        for ticket in self._tables.rows_where(self._layout.tickets, Ticket.INSTANCE, row + 1):
            self._tickets.wait_again(t, ticket)

    def orphan_seats(self, t: Transaction, row: int) -> None:
        """Free the idle seats of a copy whose memory is gone, and have those in use freed when they are given back."""
        for seat in self._tables.seats_of(row):
            at = self._tables.instance(seat)
            if self._segment.words[at] == Instance.IDLE:
                self.free_row(t, seat)
            else:
                # Its row now looks like that of a copy whose server died while it was in use.
                self._count_seat_out(t, seat)
                t.set(at + Instance.UNLOAD_ON_RELEASE, Instance.LOST)

    def _count_seat_out(self, t: Transaction, seat: int) -> None:
        """Make a seat's row one that is no seat."""
        at, words = self._tables.instance(seat), self._segment.words
        copy = self._tables.instance(words[at + Instance.SEAT_OF] - 1)
        t.add(copy + Instance.SEATS, -1)
        t.add(self._tables.model(words[at + Instance.MODEL]) + Model.SEATS, -1)
        t.set(at + Instance.SEAT_OF, 0)
        if words[copy] == Instance.UNLOADING and not words[copy + Instance.SEATS]:
            # Its unload has waited for the last seat, so its time begins only now.
            t.set(copy + Instance.SINCE, t.now)
            self._ring(t, words[copy + Instance.HOLDER] - 1)

    def pushed(self, at: int, row: int) -> list[tuple[int, int]]:
        """Return the changes that put a shared instance (first word, row) at the head of its model's idle list.

        Newest first (M2), so that the same few are used again and again, and surplus ones stay idle long.
        """
        head_word = self._tables.model(self._segment.words[at + Instance.MODEL]) + Model.IDLE_HEAD
        head = self._segment.words[head_word]
        # Both words of the row, because it has kept those from its last place in the list.
        changes = [(at + Instance.NEXT, head), (at + Instance.PREVIOUS, 0), (head_word, row + 1)]
        if head:
            changes.append((self._tables.instance(head - 1) + Instance.PREVIOUS, row + 1))
        return changes

    def unlinked(self, at: int) -> list[tuple[int, int]]:
        """Return the changes that take a shared instance (first word) out of its model's idle list."""
        words = self._segment.words
        following, previous = words[at + Instance.NEXT], words[at + Instance.PREVIOUS]
        # The first one has no PREVIOUS; the model's row refers to it.
        if previous:
            changes = [(self._tables.instance(previous - 1) + Instance.NEXT, following)]
        else:
            changes = [(self._tables.model(words[at + Instance.MODEL]) + Model.IDLE_HEAD, following)]
        if following:
            changes.append((self._tables.instance(following - 1) + Instance.PREVIOUS, previous))
        return changes
