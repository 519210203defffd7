"""Member rows: processes join, leave and die, and one of them leads. What the dead had is taken back here."""

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

# An instance in one of these goes with its server at once: nobody uses it, and what was being done with it has come to
# its end.
_GO_WITH_SERVER = (Instance.IDLE, Instance.SUSPENDING, Instance.SUSPENDED, Instance.RESUMING)


class Members(Part):
    """The transitions of member rows, and of what the header says for all members."""

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
        # The slot's last member may have left anything in these.
        t.set(at + Member.INSTANCE, 0)
        t.set(at + Member.MEASURES, 0)
        # Unknown, which is not 0: what the process takes may be anything until the source has shown it.
        t.set_float(at + Member.MEASURED_MB, math.nan)
        t.set_float(at + Member.PEAK_MB, 0.0)
        t.set_text(at + Member.NAME, name)
        # Last: a reader without the lock takes the row for used from here on.
        t.set(at + Member.STATE, kind)
        t.event(EventKind.JOINED, value=slot)

    def leave(self, t: Transaction, slot: int) -> bool:
        """Take back what a member that goes in good order still has, and free its row.

        Return False if the transaction has become long first: another call in a new transaction goes on.
        """
        # An exception may have kept it, too, from what was to follow its last transaction.
        self._wake_again(t)
        if not self._take_back(t, slot):
            return False
        t.set(self._tables.member(slot) + Member.STATE, Member.FREE)
        t.event(EventKind.LEFT, value=self._pid(slot))
        return True

    def reap(self, t: Transaction, slot: int) -> bool:
        """Take back all that a dead member had, and free its row; return False if there is more to do, see `leave`."""
        if self._was_ended(slot):
            # No more is to be counted than for one that leaves by itself.
            return self.leave(t, slot)
        self._wake_again(t)
        if not self._take_back(t, slot):
            return False
        t.set(self._tables.member(slot) + Member.STATE, Member.FREE)
        # Counted where the row is freed, so once, however many transactions it takes.
        t.add(Header.REAPS, 1)
        t.event(EventKind.REAPED, value=self._pid(slot))
        return True

    def _pid(self, slot: int) -> int:
        return int(self._segment.words[self._tables.member(slot) + Member.PID])

    def _wake_again(self, t: Transaction) -> None:
        """Wake those whom a member that goes may have left asleep.

        Its last transaction may be committed, and the wake-ups that were to follow not made.
        """
        t.after.append(self._tables.wake_all_with_news)

    def _was_ended(self, slot: int) -> bool:
        """Tell whether a dead member is a model server whose instance was unloaded, or is being unloaded."""
        words, tables = self._segment.words, self._tables
        # Of a server that was ended on purpose the instance is UNLOADING, or its row is free already.
        served = tables.rows_where(self._layout.instances, Instance.SERVER, slot + 1)
        is_server = words[tables.member(slot) + Member.STATE] == Member.SERVER
        return is_server and all(words[tables.instance(row)] == Instance.UNLOADING for row in served)

    def _take_back(self, t: Transaction, slot: int) -> bool:
        """Take back what a member has; return False if the transaction has become long before all of it was.

        What was taken back is not found again, so the next call goes on where this one has stopped.
        """
        tables, layout, reference = self._tables, self._layout, slot + 1
        if self._segment.words[Header.LEADER] == reference:
            # By reference, so a later member in this slot would be taken for the leader.
            t.set(Header.LEADER, 0)
        # The tickets first, because freeing an instance puts the ticket that it was given to back into the queue. The
        # last step is for what the member was unloading or suspending, and for what the steps before have made so.
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
                # It may have gone with another one before it, as a seat goes with its copy.
                if self._segment.words[table.base + row * table.words]:
                    take_back(t, row)
                if t.is_long:
                    return False
        return True

    def _lose_server(self, t: Transaction, row: int) -> None:
        """The process behind a handle is gone, and its memory with it."""
        at = self._tables.instance(row)
        state = self._segment.words[at + Instance.STATE]
        # Before MB is set to 0, which the event is to show.
        t.event(EventKind.LOST, self._model_reference(row), row + 1, value=self._segment.floats[at + Instance.MB])
        self._instances.orphan_seats(t, row)
        if state in _GO_WITH_SERVER:
            self._instances.free_row(t, row)
            return
        if state != Instance.LOADING:
            self._ledgers.expect_back(t, row)
            # So that the memory is not expected back once more when the row is freed.
            self._instances.set_mb(t, row, 0.0)
        # Whoever holds it finds out by using it. It is not to be handed to the next one, nor its handle unloaded.
        t.set(at + Instance.SERVER, 0)
        t.set(at + Instance.UNLOAD_ON_RELEASE, Instance.LOST)

    def _end_use(self, t: Transaction, row: int) -> None:
        """Take an instance or lease from a member that holds it no longer."""
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
        """Have a living member finish what this instance's HOLDER was unloading or suspending."""
        at, words = self._tables.instance(row), self._segment.words
        successor = self._successor(words[at + Instance.HOLDER])
        if not successor:
            # Nobody is left who could unload it. With the last process its memory goes as well.
            self._instances.free_row(t, row)
        elif words[at + Instance.STATE] == Instance.SUSPENDING:
            self._suspensions.hand_over(t, row, successor - 1)
        else:
            # Nobody knows how far the dead one has come, so all of it is done again.
            self._unloads.hand_over(t, row, successor - 1)

    def _successor(self, reference: int) -> int:
        """Return a worker that takes over the duties of the member `reference`: this process, if it stays; 0: none."""
        # 0 before the actor has a row of its own: a newcomer that takes over what a crowd of dead ones has left. What
        # it would have to unload goes to a worker, if one lives.
        mine = self._actor.slot + 1
        if mine not in (0, reference):
            return mine
        workers = self._tables.rows_where(self._layout.members, Member.STATE, Member.WORKER)
        return next((slot + 1 for slot in workers if slot + 1 != reference), 0)

    def lead(
        self, t: Transaction, slot: int, source: bytes, flags: tuple[bool, bool, bool], counts_named: bool = False
    ) -> None:
        """Record who polls, with what: flags are (measures processes, frees late, accounting only).

        counts_named: the source's figure holds nothing but the processes that it is asked about.
        """
        t.set(Header.LEADER, slot + 1)
        # POLLED along with the lead: else the last leader's silence would be held against the new one, and others would
        # poll in its place at once.
        t.set(Header.LEADER_SINCE, t.now)
        t.set(Header.POLLED, t.now)
        t.add(Header.LEADERS, 1)
        t.set_text(Header.SOURCE_NAME, source)
        words = (Header.SOURCE_MEASURES_PROCESSES, Header.SOURCE_FREES_LATE, Header.SOURCE_ACCOUNTING_ONLY)
        for word, flag in zip(words, flags, strict=True):
            t.set(word, int(flag))
        t.set(Header.SOURCE_COUNTS_NAMED, int(counts_named))
        # Nobody is going to take the sample by which they would be settled.
        if flags[2]:
            self._ledgers.await_nothing(t)
        t.event(EventKind.LEADER, value=slot)

    def note_source(self, t: Transaction, slot: int, measures: int) -> None:
        """Record how much a member can measure (`Measures`), for others to know whether to leave it the lead."""
        t.set(self._tables.member(slot) + Member.MEASURES, measures)

    def note_poll(self, t: Transaction, knows_processes: bool | None = None) -> None:
        """Record that a poll is done: the leader is neither dead nor stuck.

        knows_processes: what the leader's source has shown of that; None while it has shown nothing, and from others.
        """
        t.set(Header.POLLED, t.now)
        self.note_processes(t, knows_processes)

    def note_processes(self, t: Transaction, known: bool | None) -> None:
        """Record that the source has shown what a process of ours takes (True), or that it does not tell (False).

        None changes nothing: what one process has seen holds for others that have not seen anything yet.
        """
        if known not in (None, bool(self._segment.words[Header.SOURCE_MEASURES_PROCESSES])):
            t.set(Header.SOURCE_MEASURES_PROCESSES, int(bool(known)))

    def ring(self, t: Transaction, slot: int) -> None:
        """Wake the background thread of a member: it has something to unload, or should look around."""
        self._ring(t, slot)

    def set_settings(self, t: Transaction, settings: Settings) -> None:
        """Change the parameters of the namespace, and wake all members, which follow.

        The caller sees to it that M6 holds with the new `max_model_copies`, but for pinned models, whose copies stay.
        """
        words = [(Header.SETTINGS + number, float_bits(value)) for number, value in enumerate(astuple(settings))]
        # The last store, so that nobody takes half of them for all.
        t.set_all([*words, (Header.SETTINGS_CHANGED, t.now)])
        t.event(EventKind.SETTINGS)
        self._ring_all(t)
