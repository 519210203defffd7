"""Gives instances to tickets, and takes them back when a waiter is gone.

    WAITING ──grant, from_holder──────────────────> GRANTED ──┐
       │ └────allow_load, allow_resume────────────> LOAD ─────┤
       │ └────Tickets.refuse, answer_enough─> REFUSED, ENOUGH ┼──consume_answer──> FREE
       │ └────Transitions.reset─────────────────────> RESET ──┘                     ^
       └────────────────────────────leave_queue, from any of them───────────────────┘

The waiter holds an instance (HOLDER) from the transaction that grants it on, before the waiter wakes. So a process that
finds the waiter dead sees in its ticket what it was granted.
"""

from __future__ import annotations

from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.layout import Header, Instance, Model, Ticket
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.holds import Holds
from mpmm.shared_state.transitions.isolation import Isolation
from mpmm.shared_state.transitions.leases import Leases
from mpmm.shared_state.transitions.loads import Loads
from mpmm.shared_state.transitions.part import Actor, Part
from mpmm.shared_state.transitions.suspensions import Suspensions
from mpmm.shared_state.transitions.tickets import Tickets

__all__ = ["HandOver"]


class HandOver(Part):
    """The transitions that give instances to tickets, and take them back."""

    def __init__(
        self,
        tables: Tables,
        actor: Actor,
        tickets: Tickets,
        isolation: Isolation,
        holds: Holds,
        loads: Loads,
        leases: Leases,
        suspensions: Suspensions,
    ) -> None:
        super().__init__(tables, actor)
        self._tickets = tickets
        self._isolation = isolation
        self._holds = holds
        self._loads = loads
        self._leases = leases
        self._suspensions = suspensions

    def grant(self, t: Transaction, row: int, instance: int, cause: Cause | None = None) -> None:
        """Hand an idle instance to a waiter and wake it."""
        at = self._tables.ticket(row)
        model = self._segment.words[at + Ticket.MODEL]
        # Raises, before anything is stored, if the instance is not idle.
        self._holds.activate(t, instance, self._segment.words[at + Ticket.MEMBER])
        t.set(at + Ticket.INSTANCE, instance + 1)
        self._tickets.answer(t, row, Ticket.GRANTED)
        self._call_up_successor(t, row)
        waited = (t.now - self._segment.words[at + Ticket.ENQUEUED]) / 1e9
        t.event(EventKind.GRANTED, model + 1, instance + 1, self._segment.words[at + Ticket.NUMBER] + 1, waited, cause)

    def from_holder(self, t: Transaction, row: int, instance: int, cause: Cause, used: bool = True) -> None:
        """Hand an active instance from its holder straight to a waiter (ticket's row) and wake it.

        For an instance that may change hands: not to be unloaded, not running alone, and without owner or owned by the
        waiter. used: see `Holds.release`. The result is that of `Holds.release` and `grant`, in half the time, for all
        of which the waiter waits.
        """
        words, tables = self._segment.words, self._tables
        at, ticket = tables.instance(instance), tables.ticket(row)
        if words[at + Instance.STATE] != Instance.ACTIVE:
            raise tables.surprise("the copy", at)
        if words[ticket + Ticket.STATE] != Ticket.WAITING:
            raise tables.surprise("the ticket", ticket)
        model_row = words[at + Instance.MODEL]
        model = tables.model(model_row)
        held = (t.now - words[at + Instance.SINCE]) / 1e9
        waited = (t.now - words[ticket + Ticket.ENQUEUED]) / 1e9
        number = words[ticket + Ticket.NUMBER]
        # Two rows of the ring; the change of the second one makes both events.
        t.next_event(EventKind.RELEASED, model_row + 1, instance + 1, value=held)
        granted = t.next_event(EventKind.GRANTED, model_row + 1, instance + 1, number + 1, waited, cause, ahead=1)
        # It stays ACTIVE and out of the idle list, so neither the state's counters nor the list change.
        t.set_all(
            (
                granted,
                (at + Instance.SINCE, t.now),
                (at + Instance.HOLDER, words[ticket + Ticket.MEMBER]),
                (at + Instance.USES, words[at + Instance.USES] + 1),
                (model + Model.HITS, words[model + Model.HITS] + 1),
                # As in `Tickets.stop_waiting`.
                (model + Model.WAITING, words[model + Model.WAITING] - 1),
                (model + Model.HOLD_S, self._holds.hold_mean(model, held, used)),
                (Header.HITS, words[Header.HITS] + 1),
                (Header.WAITING, words[Header.WAITING] - 1),
                (ticket + Ticket.INSTANCE, instance + 1),
                # STATE before SIGNAL. A waiter reads without the lock, SIGNAL first: if it found the new SIGNAL but no
                # answer, it would sleep on that, and miss its answer if this process died before the wake-up.
                (ticket + Ticket.STATE, Ticket.GRANTED),
            )
        )
        self._wake(t, ticket + Ticket.SIGNAL)
        self._call_up_successor(t, row)

    def allow_load(
        self, t: Transaction, row: int, devices: int, need_mb: float, alone: bool, cause: Cause | None = None
    ) -> int:
        """Reserve memory for a waiter and tell it to load; return the instance's row. Raises TableFullError.

        devices: bits; several devices take equal shares.

        For a waiter for a lease, the reservation is the lease, so it has that at once.
        """
        at = self._tables.ticket(row)
        words = self._segment.words
        model, member = words[at + Ticket.MODEL], words[at + Ticket.MEMBER] - 1
        number = words[at + Ticket.NUMBER] + 1
        # The row is taken first: if the table is full, nothing has been written yet, and the caller can continue.
        if words[self._tables.model(model)] == Model.LEASE:
            instance, answer = self._leases.begin(t, model, member, devices, need_mb, cause, number), Ticket.GRANTED
        else:
            instance, answer = self._loads.begin(t, model, member, devices, need_mb, alone, cause, number), Ticket.LOAD
        # After the row has become LOADING or LEASED, because every change of state ends STEADY.
        if words[at + Ticket.STEADY]:
            self._isolation.begin_steady(t, instance)
        t.set(at + Ticket.INSTANCE, instance + 1)
        self._tickets.answer(t, row, answer)
        self._call_up_successor(t, row)
        return instance

    def allow_resume(self, t: Transaction, row: int, instance: int, cause: Cause | None = None) -> None:
        """Tell a waiter to resume a suspended instance, and reserve the memory that this one had."""
        at = self._tables.ticket(row)
        words = self._segment.words
        # The answer is LOAD, as for a load: the state of the instance tells the waiter which of the two it is.
        number, member = words[at + Ticket.NUMBER] + 1, words[at + Ticket.MEMBER] - 1
        self._suspensions.begin_resume(t, instance, member, cause, number)
        t.set(at + Ticket.INSTANCE, instance + 1)
        self._tickets.answer(t, row, Ticket.LOAD)
        self._call_up_successor(t, row)

    def consume_answer(self, t: Transaction, row: int) -> None:
        """Free the row of a ticket whose waiter has read the answer, and now acts on it.

        From here on only the instance row says what the waiter holds, as if it had never waited.
        """
        at = self._tables.ticket(row)
        if self._segment.words[at] in (Ticket.FREE, Ticket.WAITING):
            raise self._tables.surprise("the ticket", at)
        t.set(at + Ticket.STATE, Ticket.FREE)
        # After the ticket is free, because a used ticket keeps the lease's row.
        self._leases.forget_spent(t, self._segment.words[at + Ticket.MODEL])

    def leave_queue(self, t: Transaction, row: int) -> None:
        """Remove the ticket of a waiter that gave up or died, and take back what it was granted."""
        at = self._tables.ticket(row)
        words = self._segment.words
        state, given = words[at + Ticket.STATE], words[at + Ticket.INSTANCE]
        if state == Ticket.WAITING:
            self._tickets.stop_waiting(t, row)
        waited = (t.now - words[at + Ticket.ENQUEUED]) / 1e9
        t.event(EventKind.LEFT_QUEUE, words[at + Ticket.MODEL] + 1, ticket=words[at + Ticket.NUMBER] + 1, value=waited)
        # Free before the instance is taken back: freeing that would otherwise put this ticket back into the queue.
        t.set(at + Ticket.STATE, Ticket.FREE)
        self.take_back(t, state, given)
        if state == Ticket.WAITING and words[at + Ticket.CALLED_UP]:
            self._call_up_next(t, words[at + Ticket.MODEL])
        self._leases.forget_spent(t, words[at + Ticket.MODEL])

    def _call_up_successor(self, t: Transaction, row: int) -> None:
        """If a ticket that was called up has been answered, and a copy is idle, call up the next ticket."""
        words = self._segment.words
        at = self._tables.ticket(row)
        model = words[at + Ticket.MODEL]
        if words[at + Ticket.CALLED_UP] and words[self._tables.model(model) + Model.IDLE]:
            self._call_up_next(t, model)

    def _call_up_next(self, t: Transaction, model: int) -> None:
        """Call up the first remaining waiter for a model, because the one that was called up no longer waits.

        Otherwise no waiter would look at the end of the tenure, see `mpmm.model_manager.tenure`, and an instance would
        stay idle, though others wait for it, until the leader's next poll.
        """
        words, tables = self._segment.words, self._tables
        waiting = tables.rows_where(self._segment.layout.tickets, Ticket.STATE, Ticket.WAITING)
        starts = {row: tables.ticket(row) for row in waiting}
        wanting = [
            row for row, at in starts.items() if words[at + Ticket.MODEL] == model and not words[at + Ticket.PRELOAD]
        ]
        if wanting:
            self._tickets.call_up(t, min(wanting, key=lambda row: words[starts[row] + Ticket.RANK]))

    def reset(self, t: Transaction, row: int) -> None:
        """Tell a waiter that the queue was emptied, and take back a grant that it has not acted on yet."""
        at = self._tables.ticket(row)
        state, given = self._segment.words[at + Ticket.STATE], self._segment.words[at + Ticket.INSTANCE]
        if state == Ticket.WAITING:
            self._tickets.answer(t, row, Ticket.RESET)
        elif state in (Ticket.GRANTED, Ticket.LOAD):
            # Before the instance is taken back, for the same reason as in `leave_queue`.
            t.set(at + Ticket.INSTANCE, 0)
            t.set(at + Ticket.STATE, Ticket.RESET)
            self._wake(t, at + Ticket.SIGNAL)
            self.take_back(t, state, given)

    def take_back(self, t: Transaction, state: int, given: int) -> None:
        """Take back the instance (reference) that an answer (state) granted; nothing for other answers."""
        instance = given - 1
        if state == Ticket.GRANTED:
            # GRANTED is the answer for copies and leases, LOAD for loads and resumes; the instance's row tells which.
            # (T2)
            if self._segment.words[self._tables.instance(instance)] == Instance.LEASED:
                self._leases.end(t, instance)
            else:
                self._holds.release(t, instance)
        elif state == Ticket.LOAD:
            if self._segment.words[self._tables.instance(instance)] == Instance.RESUMING:
                self._suspensions.cancel(t, instance)
            else:
                self._loads.fail(t, instance)
