"""How the scheduler carries out a plan, where the resulting rows do not show it."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
from random_tables import SECOND_NS, RandomTables

from mpmm.policy.plan import Plan
from mpmm.policy.view import Decision, Load, Reason, Wait, Why
from mpmm.scheduling import Scheduler
from mpmm.shared_state.durations import LONGEST_NS
from mpmm.shared_state.layout import Ticket
from mpmm.shared_state.signal_words import Signal


@pytest.fixture
def made() -> Iterator[RandomTables]:
    made = RandomTables(0, devices=1)
    yield made
    made.close()


def enqueue(made: RandomTables, tag: str) -> int:
    """Let a worker wait for a model; return the ticket's row."""
    with made.namespace.transaction() as t:
        model = made.transitions.models.claim(t, tag, tag.encode())
        return made.transitions.tickets.enqueue(t, model, 1, 1, 100.0, LONGEST_NS)


def carry_out(made: RandomTables, *decisions: Decision) -> None:
    """Write decisions down."""
    plan = mock.patch("mpmm.scheduling.scheduler.make_plan", return_value=Plan(decisions, queue_held_up=True))
    with plan, made.namespace.transaction() as t:
        Scheduler(made.namespace).advance(t)


@pytest.mark.parametrize(
    ("before", "expected"), [(Reason.UNLOADING, 4), (Reason.IN_USE, None)], ids=["the same memory", "other memory"]
)
def test_memory_that_comes_back_is_still_that_of_the_model_that_was_unloaded(
    made: RandomTables, before: Reason, expected: int | None
) -> None:
    ticket = enqueue(made, "a")
    carry_out(made, Wait(ticket, before, Why(before, other=4)))
    assert made.tables.tickets[ticket].other == 4
    carry_out(made, Wait(ticket, Reason.RETURNING, Why(Reason.RETURNING)))
    assert (made.tables.tickets[ticket].reason, made.tables.tickets[ticket].other) == (Reason.RETURNING, expected)


def test_a_waiter_is_told_again_if_it_waits_for_something_else_or_elsewhere(made: RandomTables) -> None:
    ticket = enqueue(made, "a")
    told = []
    for reason, free_mb, devices in (
        (Reason.IN_USE, 10.0, (0,)),
        (Reason.IN_USE, 20.0, (0,)),
        (Reason.IN_USE, 30.0, (0, 1)),
        (Reason.UNLOADING, 40.0, (0, 1)),
    ):
        carry_out(made, Wait(ticket, reason, Why(reason, 100.0, free_mb, devices=devices)))
        row = made.tables.tickets[ticket]
        told.append((row.reason, row.free_mb, row.on))
    assert told == [
        (Reason.IN_USE, 10.0, [0]),
        # Only the figures are others: most plans find nothing else that is new.
        (Reason.IN_USE, 10.0, [0]),
        (Reason.IN_USE, 30.0, [0, 1]),
        (Reason.UNLOADING, 40.0, [0, 1]),
    ]


@pytest.mark.parametrize("reason", [Reason.EXTERNAL, Reason.PINNED, Reason.IN_USE])
def test_people_are_told_of_a_wait_that_only_others_can_end(
    made: RandomTables, caplog: pytest.LogCaptureFixture, reason: Reason
) -> None:
    ticket = enqueue(made, "a")
    carry_out(made, Wait(ticket, reason, Why(reason, 100.0, 50.0)))
    assert [made.namespace.name in text for text in caplog.messages] == [True] * (reason is not Reason.IN_USE)


def test_a_load_for_want_of_whose_row_a_seat_goes_begins_at_once(made: RandomTables) -> None:
    loads, instances = made.transitions.loads, made.layout.instances
    ticket = enqueue(made, "a")
    with made.namespace.transaction() as t:
        model = made.transitions.models.claim(t, "b", b"b")
        made.transitions.models.set_users(t, model, instances.capacity + 1)
        copy = loads.begin(t, model, 1, 1, 100.0, alone=False)
        loads.end(t, copy, b"of many users", 100.0, 0, False)
    assert len(made.tables.used_rows(instances)) == instances.capacity
    carry_out(made, Load(ticket, (0,), 100.0, False, Why(Reason.FITS)))
    assert made.tables.tickets[ticket].state == Ticket.LOAD
    assert len(made.tables.seats_of(copy)) == instances.capacity - 2


def test_the_time_between_two_requests_is_exact_on_a_host_that_has_been_up_for_long(made: RandomTables) -> None:
    scheduler = Scheduler(made.namespace)
    with mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        model = made.tables.tickets[enqueue(made, "a")].model
        with made.namespace.transaction() as t:
            scheduler.count_requests(t)
        made.now += SECOND_NS // 100
        enqueue(made, "a")
        with made.namespace.transaction() as t:
            scheduler.count_requests(t)
    assert scheduler.demand.of(model).mean_interarrival_s == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(("tag", "wakes"), [("a", 1), ("b", 0)])
def test_the_newest_waiter_is_woken_ahead_of_a_release_if_it_wants_that_model(
    made: RandomTables, tag: str, wakes: int
) -> None:
    with made.namespace.transaction() as t:
        model = made.transitions.models.claim(t, "a", b"a")
        copy = made.transitions.loads.begin(t, model, 2, 1, 100.0, alone=False)
        made.transitions.loads.end(t, copy, b"a handle", 100.0, 0, False)
    wakes_up = Scheduler(made.namespace).wakes
    with mock.patch.object(Signal, "wake") as wake:
        wakes_up.prewake(copy)
        assert not wake.called, "nobody waits"
        enqueue(made, tag)
        wake.reset_mock()
        wakes_up.prewake(copy)
        assert wake.call_count == wakes
