"""The queue: tickets of waiters, without the instances that they wait for. `hand_over` gives instances to them."""

from __future__ import annotations

from functools import partial

from mpmm.policy.fairness import rank_ns
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.layout import Header, Member, Model, Ticket
from mpmm.shared_state.transaction import Transaction, float_bits
from mpmm.shared_state.transitions.part import Part
from mpmm.text.printable import printable_logger

__all__ = ["Tickets"]

_LOG = printable_logger("mpmm")


class Tickets(Part):
    """The transitions of ticket rows."""

    def enqueue(
        self,
        t: Transaction,
        model: int,
        member: int,
        priority: int,
        need_mb: float,
        deadline_ns: int,
        preload: int = 0,
        loadable_on: int = 0,
        usable_on: int = 0,
        span: int = 1,
        nested: bool = False,
        cause: Cause | None = None,
        urgency: int = 0,
        steady: bool = False,
    ) -> int:
        """Queue a member (slot) for a model; return the ticket's row. Raises TableFullError.

        preload: above 0, it does not wait for a copy to use, but for a load that brings the copies it can use to that
        number; `Ticket.ONLY_RESUMES`: for the resume of one.
        loadable_on, usable_on: bits of the devices where it may load, and where it can use a copy; 0 for all.
        span: over how many devices its load spreads. nested: it must not run alone, because its thread holds another.
        cause: why it waits, if that is known without a plan. urgency: see `policy.fairness`.
        steady: nothing else may be loaded or unloaded on the devices where it loads.
        """
        words, tables = self._segment.words, self._tables
        row = self._take_row(t, self._layout.tickets)
        at, model_at, number = tables.ticket(row), tables.model(model), words[Header.NEXT_TICKET]
        why = cause or Cause(0)
        # Every field but SIGNAL, whose last value a process may still compare: a row keeps the values of its last
        # ticket, so a field that is missing here would have that one's. One log step takes half the time of many.
        t.set_all(
            (
                (Header.NEXT_TICKET, number + 1),
                # A hint for releases when one ticket waits, and for a wake-up ahead of them. It may outlive its ticket,
                # so readers check the row's STATE or accept a guess.
                (Header.NEWEST_TICKET, row),
                (at + Ticket.NUMBER, number),
                (at + Ticket.PRIORITY, priority),
                (at + Ticket.MODEL, model),
                (at + Ticket.MEMBER, member + 1),
                (at + Ticket.INSTANCE, 0),
                (at + Ticket.ENQUEUED, t.now),
                (at + Ticket.DEADLINE, deadline_ns),
                (at + Ticket.REASON, why.reason),
                (at + Ticket.NEED_MB, float_bits(need_mb)),
                (at + Ticket.PRELOAD, preload),
                (at + Ticket.HEAD_OF_LINE_AT, 0),
                (at + Ticket.FREE_MB, float_bits(why.free_mb)),
                (at + Ticket.COMING_MB, float_bits(why.coming_mb)),
                (at + Ticket.SECONDS, float_bits(why.seconds)),
                (at + Ticket.OTHER, why.other),
                (at + Ticket.ON, why.on),
                (at + Ticket.LOADABLE_ON, loadable_on),
                (at + Ticket.USABLE_ON, usable_on),
                (at + Ticket.SPAN, span),
                (at + Ticket.NESTED, int(nested)),
                (at + Ticket.OVERTAKEN, 0),
                (at + Ticket.WARNED, 0),
                (at + Ticket.CALLED_UP, 0),
                (at + Ticket.RANK, rank_ns(t.now, urgency)),
                (at + Ticket.STEADY, int(steady)),
                (at + Ticket.STATE, Ticket.WAITING),
                (model_at + Model.WAITING, words[model_at + Model.WAITING] + 1),
                (Header.WAITING, words[Header.WAITING] + 1),
            )
        )
        t.event(EventKind.QUEUED, model + 1, ticket=number + 1, value=need_mb)
        if cause is not None:
            t.event(EventKind.WAITS, model + 1, ticket=number + 1, cause=cause)
        return row

    def call_up(self, t: Transaction, row: int) -> None:
        """Wake a waiter without an answer, so that it looks for itself in a moment; see `mpmm.model_manager.tenure`."""
        # The waiter compares this with the value that it saw last, to tell a call from an answer or a stray wake-up.
        t.set(self._tables.ticket(row) + Ticket.CALLED_UP, t.now)
        self._wake(t, self._tables.ticket(row) + Ticket.SIGNAL)

    def set_reason(self, t: Transaction, row: int, cause: Cause) -> None:
        """Record why a ticket waits."""
        at = self._tables.ticket(row)
        words = self._segment.words
        t.set_all(
            (
                (at + Ticket.REASON, cause.reason),
                (at + Ticket.FREE_MB, float_bits(cause.free_mb)),
                (at + Ticket.COMING_MB, float_bits(cause.coming_mb)),
                (at + Ticket.SECONDS, float_bits(cause.seconds)),
                (at + Ticket.OTHER, cause.other),
                (at + Ticket.ON, cause.on),
            )
        )
        waited = (t.now - words[at + Ticket.ENQUEUED]) / 1e9
        ticket = words[at + Ticket.NUMBER] + 1
        t.event(EventKind.WAITS, words[at + Ticket.MODEL] + 1, ticket=ticket, value=waited, cause=cause)

    def warn(self, t: Transaction, row: int, why: str) -> None:
        """Log, once for each ticket, that unloading everything that can be unloaded would not serve it."""
        at = self._tables.ticket(row)
        if not self._segment.words[at + Ticket.WARNED]:
            # In the plan's transaction: if the plan is rolled back, so are this and, by `t.after`, the log line.
            t.set(at + Ticket.WARNED, 1)
            pid = self._segment.words[self._tables.member(self._segment.words[at + Ticket.MEMBER] - 1) + Member.PID]
            shown = self._tables.shown(self._segment.words[at + Ticket.MODEL])
            t.after.append(partial(_LOG.warning, "mpmm %s: %s of pid %d %s", self._actor.name, shown, pid, why))

    def block(self, t: Transaction, row: int) -> None:
        """Record that a ticket now is the head of the line: the first one for which there is no memory."""
        # From here on `max_overtake_seconds` counts: tickets behind it may overtake it until that is over.
        t.set(self._tables.ticket(row) + Ticket.HEAD_OF_LINE_AT, t.now)

    def let_pass(self, t: Transaction, row: int) -> None:
        """Record that a load has overtaken a ticket, which happens once.

        Its time as head of the line starts again when that load has ended.
        """
        at = self._tables.ticket(row)
        # Without HEAD_OF_LINE_AT its time starts again; OVERTAKEN says that no load may be let past it again.
        t.set_all(((at + Ticket.OVERTAKEN, 1), (at + Ticket.HEAD_OF_LINE_AT, 0)))

    def refuse(self, t: Transaction, row: int, cause: Cause | None = None) -> None:
        """Tell a waiter that its model can never fit."""
        at = self._tables.ticket(row)
        words = self._segment.words
        t.event(
            EventKind.REFUSED,
            words[at + Ticket.MODEL] + 1,
            ticket=words[at + Ticket.NUMBER] + 1,
            value=self._segment.floats[at + Ticket.NEED_MB],
            cause=cause,
        )
        self.answer(t, row, Ticket.REFUSED)

    def answer_enough(self, t: Transaction, row: int) -> None:
        """Tell a preload that there are enough copies."""
        self.answer(t, row, Ticket.ENOUGH)

    def answer(self, t: Transaction, row: int, state: int) -> None:
        """Give a waiting ticket its answer, a state, and wake the waiter."""
        self.stop_waiting(t, row)
        at = self._tables.ticket(row)
        # STATE before SIGNAL, see `HandOver.from_holder`.
        t.set(at + Ticket.STATE, state)
        self._wake(t, at + Ticket.SIGNAL)

    def expire(self, t: Transaction, row: int) -> None:
        """Let a ticket's deadline pass: from now on it is granted nothing, and nothing is done for it."""
        t.set(self._tables.ticket(row) + Ticket.DEADLINE, t.now)

    def stop_waiting(self, t: Transaction, row: int) -> None:
        """Subtract a ticket from the counts of waiters; the caller sets its state."""
        model = self._segment.words[self._tables.ticket(row) + Ticket.MODEL]
        # Two counts of the same rows (H2, M3): one tells without a search whether a release may skip the queue, the
        # other whether a model's idle instance has a waiter.
        t.add(self._tables.model(model) + Model.WAITING, -1)
        t.add(Header.WAITING, -1)

    def wait_again(self, t: Transaction, row: int) -> None:
        """Put a ticket back into the queue, because its answer became void before its waiter woke.

        It keeps its number and rank. The waiter is not woken for this: when it wakes up, it finds that it still waits.
        """
        at = self._tables.ticket(row)
        t.set(at + Ticket.INSTANCE, 0)
        # And the counters (H2, M3), from which `stop_waiting` subtracted it when it got its answer.
        t.set(at + Ticket.STATE, Ticket.WAITING)
        t.add(self._tables.model(self._segment.words[at + Ticket.MODEL]) + Model.WAITING, 1)
        t.add(Header.WAITING, 1)
