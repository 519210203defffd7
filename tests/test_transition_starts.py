"""From which states of a row each transition can start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from row_changes import CAUSE, RowChanges
from row_changes import it as it  # the fixture

from mpmm.errors import SegmentCorruptError
from mpmm.shared_state.layout import Header, Ticket
from mpmm.shared_state.transaction import Transaction

STATES: dict[str, Callable[[RowChanges], int]] = {
    "loading": lambda it: it.loading(),
    "active": lambda it: it.active(),
    "idle": lambda it: it.idle(),
    "unloading": lambda it: it.unloading(),
    "leased": lambda it: it.leased(),
    "suspending": lambda it: it.suspending(),
    "suspended": lambda it: it.suspended(),
    "resuming": lambda it: it.resuming(),
    "an object unloading": lambda it: it.unloading(handle=b""),
    "an object suspending": lambda it: it.suspending(handle=b""),
    "a seat": lambda it: with_seat(it) + 1,
    "a seat in use": lambda it: with_seat_in_use(it) + 1,
    "idle with a seat in use": lambda it: with_way(it, with_seat_in_use(it)),
    "idle with a way": lambda it: with_way(it, it.idle()),
}
STARTS: dict[str, tuple[set[str], Callable[[RowChanges, Transaction, int], object]]] = {
    "take_idle": (
        {"idle", "a seat", "idle with a seat in use", "idle with a way"},
        lambda it, t, row: it.to.holds.take_idle(t, row, 1),
    ),
    "release": ({"active", "a seat in use"}, lambda it, t, row: it.to.holds.release(t, row)),
    "discard": ({"active", "a seat in use"}, lambda it, t, row: it.to.holds.discard(t, row)),
    "hand over a hold": (
        {"active", "a seat in use"},
        lambda it, t, row: it.to.hand_over.from_holder(t, 1, row, CAUSE),
    ),
    "unload": (
        {"idle", "idle with a seat in use", "idle with a way"},
        lambda it, t, row: it.to.unloads.begin(t, row, 1, False),
    ),
    "hand over an unload": ({"unloading"}, lambda it, t, row: it.to.unloads.hand_over(t, row, 1)),
    "note_late": ({"unloading", "an object unloading"}, lambda it, t, row: it.to.unloads.note_late(t, row)),
    "end an unload": ({"unloading", "an object unloading"}, lambda it, t, row: it.to.unloads.end(t, row)),
    "suspend": ({"idle with a way"}, lambda it, t, row: it.to.suspensions.begin(t, row, 1, False)),
    "end a suspension": ({"suspending", "an object suspending"}, lambda it, t, row: it.to.suspensions.end(t, row)),
    "resume": ({"suspended"}, lambda it, t, row: it.to.suspensions.begin_resume(t, row, 1)),
    "end a resume": ({"resuming"}, lambda it, t, row: it.to.suspensions.end_resume(t, row)),
    "cancel a resume": ({"resuming"}, lambda it, t, row: it.to.suspensions.cancel(t, row)),
    "turn back a resume": ({"resuming"}, lambda it, t, row: it.to.suspensions.turn_back(t, row, 2)),
    "hand over a suspension": ({"suspending"}, lambda it, t, row: it.to.suspensions.hand_over(t, row, 1)),
    "fail to suspend": (
        {"suspending", "an object suspending", "resuming"},
        lambda it, t, row: it.to.suspensions.fail(t, row, None),
    ),
    "drop": ({"suspended"}, lambda it, t, row: it.to.suspensions.drop(t, row, 1)),
    "end a lease": ({"leased"}, lambda it, t, row: it.to.leases.end(t, row)),
    "free a seat": ({"a seat"}, lambda it, t, row: it.to.seats.free(t, row)),
}


def with_seat(it: RowChanges) -> int:
    it.users(2)
    return it.idle()


def with_seat_in_use(it: RowChanges) -> int:
    row = with_seat(it)
    it.take(row + 1)
    return row


def with_way(it: RowChanges, row: int) -> int:
    it.do(lambda t: it.to.suspensions.note_way(t, row, 1))
    return row


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("start", STARTS)
def test_a_transition_starts_from_its_states_alone(it: RowChanges, start: str, state: str) -> None:
    """From another one it raises, and changes nothing."""
    states, transition = STARTS[start]
    row, _ = STATES[state](it), it.ticket()
    # Behind that are events that may come to nothing, and the undo log; and the header has words of all transactions.
    end, own = it.layout.observations.end, range(Header.CHANGE, Header.LOCK_TAKEN + 1)
    before = it.words[:end].tolist()
    with contextlib.nullcontext() if state in states else pytest.raises(SegmentCorruptError):
        it.do(lambda t: transition(it, t, row))
    changed = {word for word, (now, was) in enumerate(zip(it.words[:end], before, strict=True)) if now != was}
    assert bool(changed - {*own}) == (state in states)


@pytest.mark.parametrize("state", range(Ticket.FREE, Ticket.ENOUGH + 1))
def test_a_waiter_reads_an_answer_once_and_is_given_none_before_it_waits(it: RowChanges, state: int) -> None:
    row, waiter = it.active(), it.ticket()
    it.poke(it.tables.ticket(waiter) + Ticket.STATE, state)
    calls: list[tuple[bool, Callable[[Transaction], object]]] = [
        (state in (Ticket.FREE, Ticket.WAITING), lambda t: it.to.hand_over.consume_answer(t, waiter)),
        (state != Ticket.WAITING, lambda t: it.to.hand_over.from_holder(t, waiter, row, CAUSE)),
    ]
    for refused, call in calls:
        with pytest.raises(SegmentCorruptError) if refused else contextlib.nullcontext():
            it.do(call)
        it.poke(it.tables.ticket(waiter) + Ticket.STATE, state)
    it.poke(it.tables.ticket(waiter) + Ticket.STATE, Ticket.FREE)
