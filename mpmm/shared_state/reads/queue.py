"""Reads about the queue: which tickets wait, for what, and their answers."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from mpmm.policy.view import TicketView
from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Event, Header, Instance, Model, Ticket, device_rows
from mpmm.shared_state.signal_words import Signal
from mpmm.shared_state.tables import Tables

__all__ = ["Answer", "QueueReads", "Told", "Waiter"]

Value = TypeVar("Value")

# For more waiters than this, NumPy reads their rows faster than word by word.
FEW_WAITERS = 16
# Other processors may reorder the reads of `QueueReads.unlocked`, and Python cannot prevent that.
CAN_READ_UNLOCKED = platform.machine() in ("x86_64", "AMD64")
# Many busy processes leave hardly any time to read between two transactions; then the caller takes the lock.
UNLOCKED_TRIES = 16
_WAITS = int(EventKind.WAITS)
_WAITER_FIELDS = [
    *(Ticket.RANK, Ticket.PRIORITY, Ticket.MODEL, Ticket.DEADLINE, Ticket.HEAD_OF_LINE_AT, Ticket.PRELOAD),
    *(Ticket.USABLE_ON, Ticket.REASON, Ticket.CALLED_UP),
]
_VIEW_FIELDS = [
    *(Ticket.NUMBER, Ticket.PRIORITY, Ticket.MODEL, Ticket.MEMBER, Ticket.ENQUEUED, Ticket.PRELOAD),
    *(Ticket.HEAD_OF_LINE_AT, Ticket.LOADABLE_ON, Ticket.USABLE_ON, Ticket.SPAN, Ticket.NESTED, Ticket.OVERTAKEN),
    *(Ticket.RANK, Ticket.STEADY),
]


@dataclass(slots=True)
class Waiter:
    """A waiting ticket, as the shortcuts see it. Times are in ns; head_of_line_at and called_up are 0 for never.

    usable_on: bits of the devices on which a copy must lie, 0 for all. reason: why it waits, see `policy.view.Reason`.
    """

    row: int
    rank: int
    priority: int
    model: int
    deadline: int
    head_of_line_at: int
    preload: int
    usable_on: int
    reason: int
    called_up: int

    def can_use(self, model: int, devices: int) -> bool:
        """Tell whether it waits for a copy of this model to use, and can use one on these devices (bits)."""
        return self.model == model and not self.preload and not (self.usable_on and devices & ~self.usable_on)


class Told(NamedTuple):
    """What a waiter was told last.

    on: bits of devices. other: reference to a model. head_of_line: it is, or was, the head of the line.
    """

    reason: int
    on: int
    other: int
    head_of_line: bool


class Answer(NamedTuple):
    """A ticket's answer: its state, and the row of the instance that it grants, -1 for none.

    number: tells the ticket from others in its row.
    """

    number: int
    state: int
    instance: int
    need_mb: float


class QueueReads:
    """Reads about tickets (rows). Methods need the lock, unless they say otherwise."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._words = tables.segment.words
        self._floats = tables.segment.floats
        self._tickets = tables.segment.layout.tickets
        self._events = tables.segment.layout.events

    def anybody_waits(self) -> bool:
        """Tell whether there are waiters; without the lock."""
        return self._words[Header.WAITING] != 0

    def waits_for(self, model: int) -> int:
        """Return how many tickets, preloads included, wait for a model (row)."""
        return self._words[self._tables.model(model) + Model.WAITING]

    def comes_after_another(self, ticket: int) -> bool:
        """Tell whether an earlier request for use waits for the same model as a ticket (row); without the lock."""
        at = self._tables.ticket(ticket)
        model, number = self._words[at + Ticket.MODEL], self._words[at + Ticket.NUMBER]
        if self.waits_for(model) < 2:
            return False
        rows = self._tables.rows_where(self._tickets, Ticket.STATE, Ticket.WAITING)
        found = self._tables.view(self._tickets)[rows]
        earlier = (
            (found[:, Ticket.MODEL] == model) & (found[:, Ticket.PRELOAD] == 0) & (found[:, Ticket.NUMBER] < number)
        )
        return bool(earlier.any())

    def waits_for_tag(self, tag: str) -> bool:
        """Tell whether there are waiters for a tag; without the lock."""
        if not self._words[Header.WAITING]:
            return False
        row = self._tables.model_row(tag)
        return row is not None and self._words[self._tables.model(row) + Model.WAITING] != 0

    def waits_for_others_than(self, model: int) -> bool:
        """Tell whether a ticket waits for anything but this model (row)."""
        return self._words[Header.WAITING] != self._words[self._tables.model(model) + Model.WAITING]

    def waiting(self) -> list[Waiter]:
        """Return the waiters in any order; a few of them without NumPy, which would take most of a hand-over's time."""
        rows = self._tables.rows_where(self._tickets, Ticket.STATE, Ticket.WAITING)
        if len(rows) > FEW_WAITERS:
            fields = self._tables.view(self._tickets)[rows][:, _WAITER_FIELDS].tolist()
            return [Waiter(row, *values) for row, values in zip(rows, fields, strict=True)]
        return list(map(self._waiter, rows))

    def newest(self) -> Waiter | None:
        """Return the ticket that was queued last; None if it no longer waits, or its row is free."""
        row = self._words[Header.NEWEST_TICKET]
        return self._waiter(row) if self._words[self._tables.ticket(row)] == Ticket.WAITING else None

    def only_one(self) -> int | None:
        """Return the only waiter; None if there are several, or finding it takes a search.

        Usually it is the newest ticket. But NEWEST_TICKET may be free by now, or answered, while an older one waits.
        """
        words = self._words
        if words[Header.WAITING] != 1:
            return None
        row = words[Header.NEWEST_TICKET]
        return row if words[self._tables.ticket(row)] == Ticket.WAITING else None

    def can_use(self, ticket: int, model: int, devices: int) -> bool:
        """Tell whether a ticket is for a copy of this model to use, can use one on these devices (bits), and its
        deadline has not passed."""
        words, at = self._words, self._tables.ticket(ticket)
        usable_on = words[at + Ticket.USABLE_ON]
        return (
            words[at + Ticket.MODEL] == model
            and not words[at + Ticket.PRELOAD]
            and not (usable_on and devices & ~usable_on)
            and words[at + Ticket.DEADLINE] > time.monotonic_ns()
        )

    def wants(self, instance: int) -> bool:
        """Tell whether a ticket waits that can use just this instance, or, as a preload, counts it.

        Not a ticket for another device or of a process that cannot use this object, nor one past its deadline.
        """
        words, at = self._words, self._tables.instance(instance)
        model, owner, devices = words[at + Instance.MODEL], words[at + Instance.OWNER], words[at + Instance.DEVICES]
        if not self.waits_for(model):
            return False
        waiting = self._tables.rows_where(self._tickets, Ticket.STATE, Ticket.WAITING)
        found = self._tables.view(self._tickets)[waiting]
        usable_on = found[:, Ticket.USABLE_ON]
        can_use = (
            (found[:, Ticket.MODEL] == model)
            & ((usable_on == 0) | (~usable_on & devices == 0))
            & (found[:, Ticket.DEADLINE] > time.monotonic_ns())
        )
        return bool((can_use & (found[:, Ticket.MEMBER] == owner)).any() if owner else can_use.any())

    def _waiter(self, row: int) -> Waiter:
        words, at = self._words, self._tables.ticket(row)
        return Waiter(
            row,
            words[at + Ticket.RANK],
            words[at + Ticket.PRIORITY],
            words[at + Ticket.MODEL],
            words[at + Ticket.DEADLINE],
            words[at + Ticket.HEAD_OF_LINE_AT],
            words[at + Ticket.PRELOAD],
            words[at + Ticket.USABLE_ON],
            words[at + Ticket.REASON],
            words[at + Ticket.CALLED_UP],
        )

    def views(self, rows: Sequence[int]) -> tuple[TicketView, ...]:
        """Return tickets as the policy sees them."""
        # One copy by NumPy: a plan reads 32 tickets and more, of 14 words each.
        found = self._tables.view(self._tickets)[rows][:, _VIEW_FIELDS].tolist()
        return tuple(_view(row, *values) for row, values in zip(rows, found, strict=True))

    def is_waiting(self, ticket: int) -> bool:
        """Tell whether a ticket has no answer yet; without the lock, its waiter may see an answer not yet committed."""
        return self._words[self._tables.ticket(ticket)] == Ticket.WAITING

    def asker(self, ticket: int) -> tuple[int, int]:
        """Return the slot of the member that a ticket belongs to, and the model."""
        words, at = self._words, self._tables.ticket(ticket)
        return words[at + Ticket.MEMBER] - 1, words[at + Ticket.MODEL]

    def told(self, ticket: int) -> Told:
        """Return what a waiter was told last."""
        words, at = self._words, self._tables.ticket(ticket)
        return Told(
            words[at + Ticket.REASON],
            words[at + Ticket.ON],
            words[at + Ticket.OTHER],
            words[at + Ticket.HEAD_OF_LINE_AT] != 0,
        )

    def told_at(self, ticket: int) -> int:
        """Return when a waiter was told why it waits (monotonic, ns).

        Its event says so, its row does not. If the event was overwritten, return when the ticket was queued, so that
        no one promises the waiter a time that has passed.
        """
        words, at, events = self._words, self._tables.ticket(ticket), self._tables.view(self._events)
        told = (events[:, Event.TICKET] == words[at + Ticket.NUMBER] + 1) & (events[:, Event.KIND] & 0xFF == _WAITS)
        return int(events[told, Event.TIME].max(initial=words[at + Ticket.ENQUEUED]))

    def answer(self, ticket: int) -> Answer:
        """Return a ticket's answer; without the lock through `unlocked`."""
        words, at = self._words, self._tables.ticket(ticket)
        return Answer(
            words[at + Ticket.NUMBER],
            words[at],
            words[at + Ticket.INSTANCE] - 1,
            self._floats[at + Ticket.NEED_MB],
        )

    def number(self, ticket: int) -> int:
        """Return the number of a ticket, which is unique."""
        return self._words[self._tables.ticket(ticket) + Ticket.NUMBER]

    def is_still(self, ticket: int, number: int) -> bool:
        """Tell whether a row still is that of the ticket with this number, which the caller has queued."""
        words, at = self._words, self._tables.ticket(ticket)
        return words[at] != Ticket.FREE and words[at + Ticket.NUMBER] == number

    def newest_wants(self, instance: int) -> int | None:
        """Return the ticket that was queued last if it is for a copy's model, waiting or not; without the lock."""
        words, row = self._words, self._words[Header.NEWEST_TICKET]
        # A guess, because the row may be another ticket's already; the worst case is a needless wake-up.
        wanted = words[self._tables.ticket(row) + Ticket.MODEL]
        return row if wanted == words[self._tables.instance(instance) + Instance.MODEL] else None

    def state(self, ticket: int) -> int:
        """Return the state of a ticket; without the lock, its waiter may see one not yet committed."""
        return self._words[self._tables.ticket(ticket)]

    def signal(self, ticket: int) -> Signal:
        """Return the word that changes, and is woken, when a ticket gets its answer."""
        return Signal(self._tables.segment, self._tables.ticket(ticket) + Ticket.SIGNAL)

    def unlocked(self, read: Callable[[], Value | None]) -> Value | None:
        """Return what `read` reads without the lock, if it was committed and nothing changed meanwhile; else None.

        None also if `read` returns it, if transactions follow too fast, or if this machine may reorder reads.
        """
        if not CAN_READ_UNLOCKED:
            return None
        words = self._words
        for _ in range(UNLOCKED_TRIES):
            change = words[Header.CHANGE]
            # Odd: a transaction is open, and what is read may be rolled back.
            if not change & 1 and (found := read()) is not None and words[Header.CHANGE] == change:
                return found
        return None


def _view(
    row: int,
    number: int,
    priority: int,
    model: int,
    member: int,
    enqueued_ns: int,
    preload: int,
    head_since_ns: int,
    loadable_on: int,
    usable_on: int,
    span: int,
    nested: int,
    overtaken: int,
    rank: int,
    steady: int,
) -> TicketView:
    return TicketView(
        row,
        number,
        priority,
        model,
        member,
        enqueued_ns / 1e9,
        1 if preload == Ticket.ONLY_RESUMES else preload,
        head_since_ns / 1e9 if head_since_ns else None,
        tuple(device_rows(loadable_on)) if loadable_on else (),
        tuple(device_rows(usable_on)) if usable_on else (),
        span,
        bool(nested),
        bool(overtaken),
        rank,
        bool(steady),
        preload == Ticket.ONLY_RESUMES,
    )
