"""Member rows: processes join, leave and die, and one of them leads. Takes back what dead members had."""

from __future__ import annotations

import math
from dataclasses import astuple

from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Header, Instance, Member, Pin, Ticket
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction, float_bits
from mpmm.shared_state.transitions.hand_over import HandOver
from mpmm.shared_state.transitions.holds import Holds
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.leases import Leases
from mpmm.shared_state.transitions.ledgers import Ledgers
from mpmm.shared_state.transitions.loads import Loads
from mpmm.shared_state.transitions.part import Actor, Part
from mpmm.shared_state.transitions.pins import Pins
from mpmm.shared_state.transitions.suspensions import Suspensions
from mpmm.shared_state.transitions.unloads import Unloads

__all__ = ["Members"]

# An instance in one of these states is freed as soon as its server dies: no member uses it, and its suspension or
# resume has ended.
_GO_WITH_SERVER = (Instance.IDLE, Instance.SUSPENDING, Instance.SUSPENDED, Instance.RESUMING)


class Members(Part):
    """The transitions of member rows, and of the header's words about all members."""

    def __init__(
        self,
        tables: Tables,
        actor: Actor,
        pins: Pins,
        ledgers: Ledgers,
        instances: Instances,
        loads: Loads,
        holds: Holds,
        unloads: Unloads,
        leases: Leases,
        suspensions: Suspensions,
        hand_over: HandOver,
    ) -> None:
        super().__init__(tables, actor)
        self._pins = pins
        self._ledgers = ledgers
        self._instances = instances
        self._loads = loads
        self._holds = holds
        self._unloads = unloads
        self._leases = leases
        self._suspensions = suspensions
        self._hand_over = hand_over

    def join(self, t: Transaction, slot: int, kind: int, pid: int, started_wall_ns: int, name: bytes) -> None:
        """Fill the row of a new member, whose lock file it already holds."""
        at = self._tables.member(slot)
        self._grow(t, self._layout.members, slot)
        t.set(at + Member.PID, pid)
        t.set(at + Member.STARTED_WALL, started_wall_ns)
        t.set(at + Member.GENERATION, self._next_generation(t))
        t.set(at + Member.ATTACHED, t.now)
        # The slot's last member may have left any values in these.
        t.set(at + Member.INSTANCE, 0)
        t.set(at + Member.MEASURES, 0)
        # Unknown, not 0: the process may take any amount until the source has shown it.
        t.set_float(at + Member.MEASURED_MB, math.nan)
        t.set_float(at + Member.PEAK_MB, 0.0)
        t.set_text(at + Member.NAME, name)
        # Last, because from here on a reader without the lock takes the row for used.
        t.set(at + Member.STATE, kind)
        t.event(EventKind.JOINED, value=slot)

    def leave(self, t: Transaction, slot: int) -> bool:
        """Take back what a member that leaves normally still has, and free its row.

        Return False if the transaction has become long before that: another call, in a new transaction, continues.
        """
        # An exception may have prevented the calls after its last transaction.
        self._wake_again(t)
        if not self._take_back(t, slot):
            return False
        t.set(self._tables.member(slot) + Member.STATE, Member.FREE)
        t.event(EventKind.LEFT, value=self._pid(slot))
        return True

    def reap(self, t: Transaction, slot: int) -> bool:
        """Take back what a dead member had, and free its row; return False if there is more to do, see `leave`."""
        if self._was_ended(slot):
            # A server that was ended on purpose counts as one that leaves.
            return self.leave(t, slot)
        self._wake_again(t)
        if not self._take_back(t, slot):
            return False
        t.set(self._tables.member(slot) + Member.STATE, Member.FREE)
        # Counted when the row is freed, and so once, however many transactions it takes.
        t.add(Header.REAPS, 1)
        t.event(EventKind.REAPED, value=self._pid(slot))
        return True

    def _pid(self, slot: int) -> int:
        return int(self._segment.words[self._tables.member(slot) + Member.PID])

    def _wake_again(self, t: Transaction) -> None:
        """Wake the processes that a leaving or dead member may have left asleep.

        It may have committed its last transaction without making the wake-ups that follow.
        """
        t.after.append(self._tables.wake_all_with_news)

    def _was_ended(self, slot: int) -> bool:
        """Tell whether a dead member is a model server whose instance was unloaded, or is being unloaded."""
        words, tables = self._segment.words, self._tables
        # If a server was ended on purpose, its instance is UNLOADING, or its row is free already.
        served = tables.rows_where(self._layout.instances, Instance.SERVER, slot + 1)
        is_server = words[tables.member(slot) + Member.STATE] == Member.SERVER
        return is_server and all(words[tables.instance(row)] == Instance.UNLOADING for row in served)

    def _take_back(self, t: Transaction, slot: int) -> bool:
        """Take back what a member has; return False if the transaction became long before that was complete.

        The next call does not find again what was taken back, so it continues where this one stopped.
        """
        tables, layout, reference = self._tables, self._layout, slot + 1
        if self._segment.words[Header.LEADER] == reference:
            # The header has the slot, so a later member in it would be taken for the leader.
            t.set(Header.LEADER, 0)
        # Tickets first, because freeing an instance puts the ticket to which it was granted back into the queue. The
        # last step is for instances that the member was unloading or suspending, or that an earlier step made so.
        steps = (
            (layout.tickets, Ticket.MEMBER, self._hand_over.leave_queue),
            (layout.pins, Pin.MEMBER, self._pins.unpin),
            (layout.instances, Instance.OWNER, self._instances.free_row),
            (layout.instances, Instance.SERVER, self._lose_server),
            (layout.instances, Instance.HOLDER, self._end_use),
            (layout.instances, Instance.HOLDER, self._leave_to_successor),
        )
        for table, field, take_back in steps:
            for row in tables.rows_where(table, field, reference):
                # It may have been freed with an earlier row, as a seat is with its copy.
                if self._segment.words[table.base + row * table.words]:
                    take_back(t, row)
                if t.is_long:
                    return False
        return True

    def _lose_server(self, t: Transaction, row: int) -> None:
        """Record that an instance's server is dead, and its memory gone."""
        at = self._tables.instance(row)
        state = self._segment.words[at + Instance.STATE]
        # Before MB, which the event shows, is set to 0.
        t.event(EventKind.LOST, self._model_reference(row), row + 1, value=self._segment.floats[at + Instance.MB])
        self._instances.orphan_seats(t, row)
        if state in _GO_WITH_SERVER:
            self._instances.free_row(t, row)
            return
        if state != Instance.LOADING:
            self._ledgers.expect_back(t, row)
            # So that the memory is not expected back again when the row is freed.
            self._instances.set_mb(t, row, 0.0)
        # Its holder finds out by using it. LOST: it is not handed to another member, and its handle is not unloaded.
        t.set(at + Instance.SERVER, 0)
        t.set(at + Instance.UNLOAD_ON_RELEASE, Instance.LOST)

    def _end_use(self, t: Transaction, row: int) -> None:
        """Take an instance or lease from a member that has left or died."""
        at, words = self._tables.instance(row), self._segment.words
        state = words[at + Instance.STATE]
        if state == Instance.ACTIVE:
            self._holds.release(t, row)
        elif state == Instance.LOADING:
            self._loads.abandon(t, row)
        elif state == Instance.LEASED:
            self._leases.end(t, row)
        elif state == Instance.RESUMING:
            self._suspensions.turn_back(t, row, words[at + Instance.HOLDER])

    def _leave_to_successor(self, t: Transaction, row: int) -> None:
        """Have a living member finish the unload or suspension that this instance's HOLDER had begun."""
        at, words = self._tables.instance(row), self._segment.words
        successor = self._successor(words[at + Instance.HOLDER])
        if not successor:
            # No member is left to unload it. Its memory is freed when the last process ends.
            self._instances.free_row(t, row)
        elif words[at + Instance.STATE] == Instance.SUSPENDING:
            self._suspensions.hand_over(t, row, successor - 1)
        else:
            # It is unknown how far the dead member got, so the whole unload is done again.
            self._unloads.hand_over(t, row, successor - 1)

    def _successor(self, reference: int) -> int:
        """Return a reference to the worker that takes over from a member (reference): this process, if it stays.

        0 if there is none.
        """
        # 0 while this process, a newcomer that cleans up after dead members, has no row of its own. Then a worker, if
        # there is one, gets the unloads.
        mine = self._actor.slot + 1
        if mine not in (0, reference):
            return mine
        workers = self._tables.rows_where(self._layout.members, Member.STATE, Member.WORKER)
        return next((slot + 1 for slot in workers if slot + 1 != reference), 0)

    def lead(
        self, t: Transaction, slot: int, source: bytes, flags: tuple[bool, bool, bool], counts_named: bool = False
    ) -> None:
        """Record which member polls, with which source. flags: (measures processes, frees late, accounting only).

        counts_named: the source's figure counts only the processes that it is asked about.
        """
        t.set(Header.LEADER, slot + 1)
        # POLLED, too: otherwise others would see how long the last leader was silent, and poll in the new one's place
        # at once.
        t.set(Header.LEADER_SINCE, t.now)
        t.set(Header.POLLED, t.now)
        t.add(Header.LEADERS, 1)
        t.set_text(Header.SOURCE_NAME, source)
        words = (Header.SOURCE_MEASURES_PROCESSES, Header.SOURCE_FREES_LATE, Header.SOURCE_ACCOUNTING_ONLY)
        for word, flag in zip(words, flags, strict=True):
            t.set(word, int(flag))
        t.set(Header.SOURCE_COUNTS_NAMED, int(counts_named))
        # Without samples, returns would never be settled.
        if flags[2]:
            self._ledgers.await_nothing(t)
        t.event(EventKind.LEADER, value=slot)

    def note_source(self, t: Transaction, slot: int, measures: int) -> None:
        """Record how much a member can measure (`Measures`), so that others know whether to leave it the lead."""
        t.set(self._tables.member(slot) + Member.MEASURES, measures)

    def note_poll(self, t: Transaction, knows_processes: bool | None = None) -> None:
        """Record that a poll is done, so the leader is neither dead nor stuck.

        knows_processes: whether the leader's source has shown that it knows processes; None if it has shown nothing
        yet, and from other members.
        """
        t.set(Header.POLLED, t.now)
        self.note_processes(t, knows_processes)

    def note_processes(self, t: Transaction, known: bool | None) -> None:
        """Record that the source has shown what a process of ours takes (True), or that it cannot (False).

        None, from a process that has seen nothing yet, changes nothing: what another process has seen still holds.
        """
        if known not in (None, bool(self._segment.words[Header.SOURCE_MEASURES_PROCESSES])):
            t.set(Header.SOURCE_MEASURES_PROCESSES, int(bool(known)))

    def ring(self, t: Transaction, slot: int) -> None:
        """Wake the background thread of a member: it has something to unload, or should check for work."""
        self._ring(t, slot)

    def set_settings(self, t: Transaction, settings: Settings) -> None:
        """Change the parameters of the namespace, and wake all members, so that they read them.

        The caller ensures that M6 holds with the new `max_model_copies`, except for pinned models, whose copies stay.
        """
        words = [(Header.SETTINGS + number, float_bits(value)) for number, value in enumerate(astuple(settings))]
        # SETTINGS_CHANGED last, so that no process takes half of them for all.
        t.set_all([*words, (Header.SETTINGS_CHANGED, t.now)])
        t.event(EventKind.SETTINGS)
        self._ring_all(t)
