"""The queue: tickets of those who wait, without what they wait for. `hand_over` gives instances to them."""

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
        """Let a member (slot) wait for a model; return the ticket's row. Raises TableFullError.

        preload: above 0, it waits for a load that brings the copies it can use to that number, not for one to use; as
        `Ticket.ONLY_RESUMES`, for the resume of one.
        loadable_on, usable_on: bits of the devices where it may load, and on which a copy is of use; 0 for all.
        span: how many devices what it loads lies on. nested: it is not to run alone, as its thread holds another.
        cause: why it waits, where that is known without a plan. urgency: see `policy.fairness`.
        steady: nothing else is to be loaded or unloaded where it loads.
        """
        words, tables = self._segment.words, self._tables
        row = self._take_row(t, self._layout.tickets)
        at, model_at, number = tables.ticket(row), tables.model(model), words[Header.NEXT_TICKET]
        why = cause or Cause(0)
        # Every field but SIGNAL, whose last value someone may still compare with: a row keeps what its last ticket has
        # left in it, so a field that is missing here would be a stranger's. One step of the log takes half the time of
        # many.
        t.set_all(
            (
                (Header.NEXT_TICKET, number + 1),
                # A hint for releases where one waits, and for a wake-up ahead of them. It may outlive its ticket, so
                # who reads it looks at the row's STATE or is content with a guess.
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
        """Wake a waiter, which has no answer yet, to look for itself in a moment; see `mpmm.model_manager.tenure`."""
        # The waiter compares this with what it saw last, and so tells a call from an answer or a chance wake-up.
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
        """Say in the log, once for each ticket, that nothing which the manager can unload would serve it."""
        at = self._tables.ticket(row)
        if not self._segment.words[at + Ticket.WARNED]:
            # In the transaction of the wait: a plan that is undone takes it back, and with `t.after` the log line.
            t.set(at + Ticket.WARNED, 1)
            pid = self._segment.words[self._tables.member(self._segment.words[at + Ticket.MEMBER] - 1) + Member.PID]
            shown = self._tables.shown(self._segment.words[at + Ticket.MODEL])
            t.after.append(partial(_LOG.warning, "mpmm %s: %s of pid %d %s", self._actor.name, shown, pid, why))

    def block(self, t: Transaction, row: int) -> None:
        """Record that from now on a ticket is the head of the line: the first one for which there is no memory."""
        # From here on `max_overtake_seconds` counts: who stands behind may overtake it until that is over.
        t.set(self._tables.ticket(row) + Ticket.HEAD_OF_LINE_AT, t.now)

    def let_pass(self, t: Transaction, row: int) -> None:
        """Record that a load has overtaken a ticket, which happens once.

        Its time as head of the line begins anew when that load has ended.
        """
        at = self._tables.ticket(row)
        # With HEAD_OF_LINE_AT gone its time begins anew, and OVERTAKEN says that nothing may be let past it again.
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
        """Tell a preload that no further copy is wanted."""
        self.answer(t, row, Ticket.ENOUGH)

    def answer(self, t: Transaction, row: int, state: int) -> None:
        """Give a waiting ticket its answer, a state, and wake the waiter."""
        self.stop_waiting(t, row)
        at = self._tables.ticket(row)
        # STATE before SIGNAL, see `HandOver.from_holder`.
        t.set(at + Ticket.STATE, state)
        self._wake(t, at + Ticket.SIGNAL)

    def expire(self, t: Transaction, row: int) -> None:
        """End the time for which a ticket waits: from now on it is given nothing, and nothing is done for it."""
        t.set(self._tables.ticket(row) + Ticket.DEADLINE, t.now)

    def stop_waiting(self, t: Transaction, row: int) -> None:
        """Count a ticket among the waiters no longer; the caller sets its state."""
        model = self._segment.words[self._tables.ticket(row) + Ticket.MODEL]
        # Two sums of the same rows (H2, M3): one tells without a search whether a release may skip the queue, the other
        # whether a model's idle instance has somebody waiting for it.
        t.add(self._tables.model(model) + Model.WAITING, -1)
        t.add(Header.WAITING, -1)

    def wait_again(self, t: Transaction, row: int) -> None:
        """Put a ticket back into the queue whose answer has come to nothing before its waiter woke.

        It keeps its number and rank. The waiter is not woken for it: when it wakes it finds that it waits.
        """
        at = self._tables.ticket(row)
        t.set(at + Ticket.INSTANCE, 0)
        # The counters with it (H2, M3), as `stop_waiting` has taken it off both when it got its answer.
        t.set(at + Ticket.STATE, Ticket.WAITING)
        t.add(self._tables.model(self._segment.words[at + Ticket.MODEL]) + Model.WAITING, 1)
        t.add(Header.WAITING, 1)
