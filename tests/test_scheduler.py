"""How the scheduler carries out a plan, where the resulting rows do not show it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import pytest
from random_tables import SECOND_NS, RandomTables

from mpmm.errors import TableFullError
from mpmm.policy.plan import Plan
from mpmm.policy.sharing import FIRST_LOAD_S
from mpmm.policy.view import Decision, Evict, Grant, Load, Reason, Refuse, Satisfied, Wait, Why
from mpmm.scheduling import Scheduler, wakes
from mpmm.scheduling.views import IN_TURN, QUEUE_PART
from mpmm.shared_state.durations import LONGEST_NS
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Instance, Ticket
from mpmm.shared_state.signal_words import Signal
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transaction import Transaction


@pytest.fixture
def made() -> Iterator[RandomTables]:
    made = RandomTables(0, devices=1)
    yield made
    made.close()


def enqueue(made: RandomTables, tag: str, deadline_ns: int = LONGEST_NS, member: int = 1) -> int:
    """Let a worker wait for a model; return the ticket's row."""
    with made.namespace.transaction() as t:
        model = made.transitions.models.claim(t, tag, tag.encode())
        return made.transitions.tickets.enqueue(t, model, member, 1, 100.0, deadline_ns)


def load(made: RandomTables, tag: str, handle: bytes | None = None, users: int = 1, alone: bool = False) -> int:
    """Let a worker load a copy of a model, and hold it; return the copy's row."""
    with made.namespace.transaction() as t:
        model = made.transitions.models.claim(t, tag, tag.encode())
        made.transitions.models.set_users(t, model, users)
        row = made.transitions.loads.begin(t, model, 1, 1, 100.0, alone=alone)
        if not alone:
            made.transitions.loads.end(t, row, tag.encode() if handle is None else handle, 100.0, 0, False)
    return row


def load_idle(made: RandomTables, tag: str) -> int:
    """Let a worker load a copy of a model, and give it back; return the copy's row."""
    row = load(made, tag)
    with made.namespace.transaction() as t:
        made.transitions.holds.release(t, row)
    return row


def carry_out(made: RandomTables, *decisions: Decision) -> None:
    """Write decisions down."""
    with planned(*decisions), made.namespace.transaction() as t:
        Scheduler(made.namespace).advance(t)


def planned(*decisions: Decision, held_up: bool = True) -> AbstractContextManager[mock.Mock]:
    """Have these decisions for a plan."""
    return mock.patch("mpmm.scheduling.scheduler.make_plan", return_value=Plan(decisions, queue_held_up=held_up))


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


# ---- when there is a plan, and how far it is carried out -----------------------------------------------------


def test_a_long_transaction_leaves_the_rest_of_a_plan_to_another_one(made: RandomTables) -> None:
    scheduler, tickets = Scheduler(made.namespace), [enqueue(made, tag) for tag in "ab"]
    scheduler.go_on = mock.Mock()
    waits = planned(*(Wait(ticket, Reason.IN_USE, Why(Reason.IN_USE)) for ticket in tickets))
    with waits, mock.patch.object(Transaction, "is_long", True), made.namespace.transaction() as t:
        scheduler.advance(t)
        assert not scheduler.go_on.called, "it needs the lock"
    assert [made.tables.tickets[ticket].reason for ticket in tickets] == [Reason.IN_USE, Reason.BEHIND]
    assert scheduler.go_on.call_count == 1
    scheduler.go_on.reset_mock()
    with waits, made.namespace.transaction() as t:
        scheduler.advance(t)
    assert [made.tables.tickets[ticket].reason for ticket in tickets] == [Reason.IN_USE, Reason.IN_USE]
    assert not scheduler.go_on.called


def plans_of(made: RandomTables) -> int:
    """Let the scheduler go through the queue; return how many plans it asks for, which decide nothing."""
    with planned(held_up=False) as plan, made.namespace.transaction() as t:
        # Not more than two, or it would go on for ever if it did not stop.
        plan.side_effect = [plan.return_value] * 2
        Scheduler(made.namespace).advance(t)
    return plan.call_count


def test_no_plan_is_made_for_a_queue_that_gets_nothing(made: RandomTables) -> None:
    assert plans_of(made) == 0
    expired = enqueue(made, "a", deadline_ns=1)
    assert plans_of(made) == 1, "a waiter that is about to leave"
    assert made.tables.tickets[expired].state == Ticket.WAITING
    load(made, "b", alone=True)
    assert plans_of(made) == 0, "until the only device is free again"


@pytest.mark.parametrize(
    ("held_up", "answered", "plans"),
    [(False, QUEUE_PART, 2), (True, QUEUE_PART, 1), (False, QUEUE_PART - 1, 1), (False, 0, 1)],
)
def test_the_queue_moves_up_once_its_first_part_is_answered(
    made: RandomTables, held_up: bool, answered: int, plans: int
) -> None:
    tickets = [enqueue(made, "a") for _ in range(QUEUE_PART + 2)]
    refused = tuple(Refuse(ticket, Why(Reason.TOO_LARGE)) for ticket in tickets)
    first = Plan(refused[:answered], queue_held_up=held_up)
    last = Plan(refused[QUEUE_PART:], queue_held_up=False)
    with planned() as plan, made.namespace.transaction() as t:
        plan.side_effect = [first, last]
        Scheduler(made.namespace).advance(t)
    assert plan.call_count == plans
    waiting = [ticket for ticket in tickets if made.tables.tickets[ticket].state == Ticket.WAITING]
    assert waiting == ([] if plans == 2 else tickets[answered:])


def test_waiters_of_another_kind_are_answered_behind_a_part_of_the_queue_that_waits(made: RandomTables) -> None:
    tickets = [enqueue(made, "a") for _ in range(QUEUE_PART + 1)] + [enqueue(made, "b") for _ in range(2)]
    first, second = tickets[-2:]
    with made.namespace.transaction():
        assert [one.row for one in Scheduler(made.namespace).read_view().tickets] == [*tickets[:QUEUE_PART], first]
    plans = [Plan((Refuse(one, Why(Reason.TOO_LARGE)),), queue_held_up=False) for one in (first, second)]
    with planned() as plan, made.namespace.transaction() as t:
        plan.side_effect = [*plans, Plan((), queue_held_up=False)]
        Scheduler(made.namespace).advance(t)
    assert plan.call_count == 3
    assert [made.tables.tickets[one].state for one in (first, second)] == [Ticket.REFUSED] * 2


def enqueue_kinds(made: RandomTables, tag: str, reason: Reason, kinds: int, head: int = -1) -> list[int]:
    """Let a worker wait for a model once for each of several kinds; return the tickets' rows. head: place of the one
    that is the head of the line."""
    tickets = []
    with made.namespace.transaction() as t:
        model = made.transitions.models.claim(t, tag, tag.encode())
        for bits in range(1, kinds + 1):
            asked = (t, model, 1, 1, 100.0, LONGEST_NS, 0, bits)
            tickets.append(made.transitions.tickets.enqueue(*asked, cause=Cause(reason)))
        if head >= 0:
            made.transitions.tickets.block(t, tickets[head])
    return tickets


def looked_at(made: RandomTables) -> list[int]:
    """Return the waiters that the next plan looks at."""
    with made.namespace.transaction():
        return [one.row for one in Scheduler(made.namespace).read_view().tickets]


@pytest.mark.parametrize("reason", [Reason.SHARING, Reason.COPIES])
@pytest.mark.parametrize("loads", [True, False])
def test_waiters_for_copies_of_their_model_hide_no_other_however_many_kinds_of_them_there_are(
    made: RandomTables, reason: Reason, loads: bool
) -> None:
    if loads:
        with made.namespace.transaction() as t:
            made.transitions.loads.begin(t, made.transitions.models.claim(t, "a", b"a"), 1, 1, 100.0, alone=False)
    else:
        load(made, "a")
    first = enqueue_kinds(made, "a", reason, 2 * QUEUE_PART + 3)
    others = [enqueue(made, f"other {number}") for number in range(3)]
    found = looked_at(made)
    assert found[:QUEUE_PART] == first[:QUEUE_PART]
    assert set(others) <= set(found)


def test_of_more_kinds_than_a_plan_looks_at_some_are_looked_at_in_turn(made: RandomTables) -> None:
    alike = [enqueue(made, "a") for _ in range(QUEUE_PART)]
    # Its last one is the head of the line.
    kinds = enqueue_kinds(made, "b", Reason.EXTERNAL, 45, head=44)
    seen: set[int] = set()
    looks = 0
    with mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        while not seen.issuperset(kinds) and looks < len(kinds):
            made.now += 1000 * looks
            looks += 1
            found = looked_at(made)
            assert len(found) == 2 * QUEUE_PART
            assert set(found) >= {*alike, *kinds[: QUEUE_PART - IN_TURN - 1], kinds[-1]}
            seen |= set(found)
    assert seen.issuperset(kinds)
    assert 1 < looks < len(kinds)


def test_leases_are_looked_at_only_in_the_order_of_the_queue(made: RandomTables) -> None:
    for _ in range(QUEUE_PART):
        enqueue(made, "a")
    kinds = enqueue_kinds(made, "b", Reason.EXTERNAL, QUEUE_PART - 2)
    with made.namespace.transaction() as t:
        lease = made.transitions.leases.claim(t, b"lease", 90.0)
        leases = [
            made.transitions.tickets.enqueue(t, lease, 0, 1, 90.0, LONGEST_NS, 0, bits, cause=Cause(Reason.LEASED))
            for bits in (1, 2, 3)
        ]
    last = enqueue(made, "c")
    found = looked_at(made)
    assert set(found) >= {*kinds, leases[0], last}
    assert not set(leases[1:]) & set(found)


def test_a_newcomer_counts_as_a_request_before_the_plan(made: RandomTables) -> None:
    scheduler, ticket = Scheduler(made.namespace), enqueue(made, "a")
    model = made.tables.tickets[ticket].model
    with planned(), made.namespace.transaction() as t:
        scheduler.advance(t)
    assert scheduler.demand.of(model).requests == 0
    with planned(), made.namespace.transaction() as t:
        scheduler.advance(t, newcomer=ticket)
    assert scheduler.demand.of(model).requests == 1


# ---- requests that do not wait -------------------------------------------------------------------------------


def test_a_request_that_does_not_wait_is_told_what_it_would_wait_for(made: RandomTables) -> None:
    scheduler, ticket, other = Scheduler(made.namespace), enqueue(made, "a"), enqueue(made, "b")
    copy = load(made, "c")
    held = made.tables.instances[copy].model
    in_use, too_large, fits = (
        Why(Reason.IN_USE, 100.0, 50.0),
        Why(Reason.TOO_LARGE, 9e9),
        Why(Reason.FITS, 100.0, 300.0),
    )
    cases: list[tuple[Decision | None, bool, Why | None]] = [
        (None, False, Why(Reason.BEHIND)),
        (Wait(ticket, Reason.IN_USE, in_use), False, in_use),
        (Evict(ticket, (copy,)), False, Why(Reason.NOT_FREE, other=held)),
        (Load(ticket, (0,), 100.0, False, fits), False, None),
        (Refuse(ticket, too_large), False, None),
        (Refuse(ticket, too_large), True, too_large),
        (Grant(ticket, copy), True, None),
        (Satisfied(ticket), True, None),
    ]
    for decision, or_ever, expected in cases:
        elsewhere = Wait(other, Reason.MEMORY, Why(Reason.MEMORY))
        with planned(elsewhere, *([decision] if decision else [])), made.namespace.transaction():
            assert scheduler.why_not_at_once(ticket, or_ever) == expected, decision
    with planned(Refuse(ticket, too_large)), made.namespace.transaction():
        assert scheduler.why_not_at_once(ticket) is None
    full = mock.patch.object(scheduler.table_rows, "has_row_for_instance", return_value=False)
    with full, planned(Load(ticket, (0,), 100.0, False, fits)), made.namespace.transaction():
        assert scheduler.why_not_at_once(ticket) == Why(Reason.TABLE_FULL, 100.0, 300.0)


def test_a_request_that_is_turned_away_counts_and_gets_nothing_any_more(made: RandomTables) -> None:
    scheduler, ticket = Scheduler(made.namespace), enqueue(made, "a")
    with made.namespace.transaction() as t:
        scheduler.turn_away(t, ticket, Why(Reason.IN_USE, 100.0, 50.0))
    row = made.tables.tickets[ticket]
    assert (row.reason, row.free_mb, row.head_of_line_at) == (Reason.IN_USE, 50.0, 0)
    assert scheduler.demand.of(row.model).requests == 1
    assert row.deadline < LONGEST_NS
    assert scheduler.views.queue_order().tolist() == []


# ---- waits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passed", [True, False])
def test_a_waiter_is_let_past_once_and_then_its_time_begins_anew(made: RandomTables, passed: bool) -> None:
    ticket, copies = enqueue(made, "a"), [load_idle(made, tag) for tag in "bc"]
    for decision in (
        Wait(ticket, Reason.MEMORY, Why(Reason.MEMORY), passed=passed),
        Evict(ticket, tuple(copies), first=False, passed=passed),
    ):
        with made.namespace.transaction() as t:
            made.transitions.tickets.block(t, ticket)
        carry_out(made, decision)
        assert (
            made.tables.tickets[ticket].head_of_line_at == 0 if passed else made.tables.tickets[ticket].head_of_line_at
        )
        [view] = made.namespace.reads.queue.views([ticket])
        assert view.passed is passed
    assert made.tables.tickets[ticket].reason == Reason.UNLOADING


def test_the_time_of_a_head_of_the_line_begins_once(made: RandomTables) -> None:
    ticket, since = enqueue(made, "a"), []
    with mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        for first in (False, True, True):
            made.now += SECOND_NS
            carry_out(made, Wait(ticket, Reason.MEMORY, Why(Reason.MEMORY), first=first))
            since.append(made.tables.tickets[ticket].head_of_line_at)
    assert since == [0, made.now - SECOND_NS, made.now - SECOND_NS]


@pytest.mark.parametrize("is_long", [True, False])
def test_a_long_transaction_leaves_further_evictions_to_the_next_plan(made: RandomTables, is_long: bool) -> None:
    ticket, copies = enqueue(made, "a"), [load_idle(made, tag) for tag in "bc"]
    first = made.tables.instances[copies[0]]
    now_long = mock.PropertyMock(side_effect=lambda: is_long and first.state == Instance.UNLOADING)
    with mock.patch.object(Transaction, "is_long", now_long):
        carry_out(made, Evict(ticket, tuple(copies)))
    states = [made.tables.instances[copy].state for copy in copies]
    assert states == [Instance.UNLOADING, Instance.IDLE if is_long else Instance.UNLOADING]


# ---- the release of a copy for which others wait -------------------------------------------------------------


def shared(made: RandomTables) -> int:
    """A copy that every process can use."""
    return load(made, "a")


def another_ones_object(made: RandomTables) -> int:
    """A copy that only its loader can use."""
    return load(made, "a", b"")


def asked_to_go(made: RandomTables) -> int:
    """A copy that is to be unloaded once it is released."""
    row = load(made, "a")
    with made.namespace.transaction() as t:
        made.transitions.unloads.ask(t, row, 1)
    return row


def running_alone(made: RandomTables) -> int:
    """A copy that has the device to itself."""
    row = load(made, "a", alone=True)
    with made.namespace.transaction() as t:
        made.transitions.loads.end(t, row, b"a handle", 100.0, 0, False)
    return row


@pytest.mark.parametrize(
    ("arrange", "member", "handed_over"),
    [
        *((shared, 2, True), (another_ones_object, 1, True), (another_ones_object, 2, False)),
        *((another_ones_object, 0, False), (asked_to_go, 2, False), (running_alone, 2, False)),
    ],
)
def test_a_copy_goes_from_its_holder_to_the_first_waiter_that_can_use_it(
    made: RandomTables, arrange: Callable[[RandomTables], int], member: int, handed_over: bool
) -> None:
    row = arrange(made)
    ticket, scheduler = enqueue(made, "a", member=member), Scheduler(made.namespace)
    with planned() as plan, made.namespace.transaction() as t:
        scheduler.release(t, row)
        yields = scheduler.wakes.yield_to_waiter in t.after
    assert (plan.called, yields) == (not handed_over, handed_over)
    assert (made.tables.tickets[ticket].state == Ticket.GRANTED) == handed_over
    assert (made.tables.instances[row].state == Instance.ACTIVE) == handed_over


@pytest.mark.parametrize("overtaken", [True, False])
def test_the_user_of_a_released_copy_is_told_whom_it_overtakes(made: RandomTables, overtaken: bool) -> None:
    with mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        row, head = load(made, "a"), enqueue(made, "b")
        made.now += 1
        ticket = enqueue(made, "a")
        with made.namespace.transaction() as t:
            if overtaken:
                made.transitions.tickets.block(t, head)
        with planned() as plan, made.namespace.transaction() as t:
            Scheduler(made.namespace).release(t, row)
    assert not plan.called
    *_, granted = read_snapshot(made.namespace.name).events
    assert made.tables.tickets[ticket].state == Ticket.GRANTED
    assert (granted.reason, granted.other) == ((Reason.OVERTAKES, "b") if overtaken else (Reason.IDLE_COPY, None))


@pytest.mark.parametrize(
    ("reason", "plans"), [(None, 0), (Reason.SHARING, 0), (Reason.MEMORY, 1)], ids=["nobody waits", "sharing", "memory"]
)
def test_a_plan_follows_a_release_that_may_serve_somebody(
    made: RandomTables, reason: Reason | None, plans: int
) -> None:
    row = load(made, "a")
    if reason is not None:
        ticket = enqueue(made, "b")
        with made.namespace.transaction() as t:
            made.transitions.estimates.estimate(t, made.tables.tickets[ticket].model, 100.0, measured=True)
        carry_out(made, Wait(ticket, reason, Why(reason)))
    with planned() as plan, made.namespace.transaction() as t:
        Scheduler(made.namespace).release(t, row)
    assert plan.call_count == plans
    assert made.tables.instances[row].state == Instance.IDLE


def test_a_copy_that_runs_alone_is_left_idle_for_no_process_while_others_wait(made: RandomTables) -> None:
    row = running_alone(made)
    enqueue(made, "a", member=2)
    with made.namespace.transaction() as t:
        assert not Scheduler(made.namespace).keep(t, row, used=True, call_up=True)
    assert made.tables.instances[row].state == Instance.ACTIVE


# ---- a full table of copies ----------------------------------------------------------------------------------


def fill(made: RandomTables) -> int:
    """Load copies that stay in use until there is no row for another one; return the row of one of them."""
    free = made.layout.instances.capacity - len(made.tables.used_rows(made.layout.instances))
    return [load(made, "b") for _ in range(free)][-1]


@pytest.mark.parametrize(
    ("one_is_idle", "is_newcomer", "raises"),
    [(False, False, False), (False, True, True), (True, False, False), (True, True, False)],
)
def test_a_load_waits_for_a_row_unless_its_caller_can_be_told_that_there_is_none(
    made: RandomTables, one_is_idle: bool, is_newcomer: bool, raises: bool
) -> None:
    ticket, idle = enqueue(made, "a"), load_idle(made, "c") if one_is_idle else None
    fill(made)
    loads = planned(Load(ticket, (0,), 100.0, False, Why(Reason.FITS, 100.0, 300.0)))
    expected = pytest.raises(TableFullError, match="instances") if raises else contextlib.nullcontext()
    with expected, loads, made.namespace.transaction() as t:
        Scheduler(made.namespace).advance(t, newcomer=ticket if is_newcomer else None)
    row = made.tables.tickets[ticket]
    assert (row.state, row.head_of_line_at) == (Ticket.WAITING, 0)
    assert (row.reason, row.free_mb) == ((Reason.BEHIND, 0.0) if raises else (Reason.TABLE_FULL, 300.0))
    if idle is not None:
        assert made.tables.instances[idle].state == Instance.UNLOADING


def test_another_table_that_is_full_undoes_the_transaction(made: RandomTables) -> None:
    ticket = enqueue(made, "a")
    error = TableFullError("no room", table="undo", capacity=1, setting="undo")
    full = mock.patch.object(type(made.transitions.loads), "begin", side_effect=error)
    loads = planned(Load(ticket, (0,), 100.0, False))
    with pytest.raises(TableFullError, match="no room"), full, loads, made.namespace.transaction() as t:
        Scheduler(made.namespace).advance(t)
    assert made.tables.tickets[ticket].reason == Reason.BEHIND


@pytest.mark.parametrize("users", [1, 2])
def test_there_is_a_row_for_a_copy_while_a_row_or_a_seat_is_not_in_use(made: RandomTables, users: int) -> None:
    rows, copy = Scheduler(made.namespace).table_rows, load(made, "a", users=users)
    assert rows.has_row_for_instance() is True
    last = fill(made)
    assert rows.has_row_for_instance() is (users == 2)
    for seat in made.tables.seats_of(copy):
        with made.namespace.transaction() as t:
            made.transitions.holds.take_idle(t, seat, 1)
    assert rows.has_row_for_instance() is False
    with made.namespace.transaction() as t:
        made.transitions.unloads.ask(t, last, 1)
        made.transitions.holds.release(t, last)
        assert rows.has_row_for_instance() is False, "not before it has gone"
        made.transitions.unloads.end(t, last)
        assert rows.has_row_for_instance() is True


# ---- what waiters are told -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (Reason.SHARING, "waits for a copy that is in use or being loaded: about 2.00 s, sooner than another load"),
        (
            Reason.BACKING_OFF,
            "waits: its loads have failed, so nothing is evicted for another attempt for about 1.00 s",
        ),
        (Reason.IN_USE, "waits: needs 100 MB, 50 free, 30 kept for it where b is in use, for about 2.00 s"),
        (Reason.MEMORY, "waits: needs 100 MB, 50 free, and unloading every idle copy would not free enough"),
    ],
)
def test_a_waiter_is_told_what_is_left_of_its_time(made: RandomTables, reason: Reason, said: str) -> None:
    waiters = Scheduler(made.namespace).waiters
    with mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        ticket = enqueue(made, "a")
        other = made.tables.instances[load(made, "b")].model
        with made.namespace.transaction() as t:
            for _ in range(2):
                made.transitions.models.note_failure(t, made.tables.tickets[ticket].model)
        carry_out(made, Wait(ticket, reason, Why(reason, 100.0, 50.0, 30.0, 3.0, other)))
        made.now += SECOND_NS
        with made.namespace.transaction():
            assert waiters.why(ticket) == f"{reason.name.lower()}: {said}"
            assert waiters.backs_off_for_s(ticket) == (1.0 if reason is Reason.BACKING_OFF else math.inf)
        made.now += 2 * SECOND_NS
        with made.namespace.transaction():
            is_timed = reason in (Reason.SHARING, Reason.IN_USE)
            assert ("unknown time" in waiters.sentence(ticket)) == is_timed
            assert (waiters.backs_off_for_s(ticket) == 0.0) == (reason is Reason.BACKING_OFF)


def test_a_waiter_is_told_behind_whom_it_waits(made: RandomTables) -> None:
    waiters, tickets = Scheduler(made.namespace).waiters, []
    with mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        for tag in "abcd":
            made.now += 1
            tickets.append(enqueue(made, tag))
    said = []
    for reasons in (
        (Reason.SHARING, Reason.SHARING),
        (Reason.SHARING, Reason.MEMORY),
        (Reason.DRAINING, Reason.MEMORY),
    ):
        carry_out(made, *(Wait(ticket, reason, Why(reason)) for ticket, reason in zip(tickets, reasons, strict=False)))
        with made.namespace.transaction():
            said.append([waiters.sentence(ticket) for ticket in tickets[2:]])
    assert said == [
        ["waits behind a, which is first in the queue"] * 2,
        ["waits behind b, which waits for memory and must not be delayed"] * 2,
        ["waits behind a, which is to run alone and be measured"] * 2,
    ]
    load(made, "e", alone=True)
    with made.namespace.transaction():
        assert waiters.sentence(tickets[3]) == "waits: e runs alone until it has been measured"


@pytest.mark.parametrize(("reason", "room_s"), [(Reason.IN_USE, 50.0), (Reason.BACKING_OFF, 2.0), (Reason.BEHIND, 0.0)])
def test_a_waiter_is_expected_to_wait_for_the_room_of_those_before_it(
    made: RandomTables, reason: Reason, room_s: float
) -> None:
    scheduler = Scheduler(made.namespace)
    with mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        first = enqueue(made, "a")
        made.now += 1
        second = enqueue(made, "b")
        with made.namespace.transaction() as t:
            for _ in range(2):
                made.transitions.models.note_failure(t, made.tables.tickets[first].model)
        carry_out(made, Wait(first, reason, Why(reason, seconds=50.0)))
        with made.namespace.transaction():
            assert scheduler.expected_wait_s(second) == pytest.approx(room_s + FIRST_LOAD_S)


def test_a_wait_is_foretold_even_to_one_that_has_just_been_answered(made: RandomTables) -> None:
    """It stood behind all others, so none of those that still wait stands in its place."""
    scheduler, tickets = Scheduler(made.namespace), [enqueue(made, "a") for _ in range(2)]
    with made.namespace.transaction() as t:
        made.transitions.tickets.refuse(t, tickets[-1])
        assert math.isfinite(scheduler.expected_wait_s(tickets[-1]))


def test_a_load_that_has_failed_is_no_longer_counted_as_a_request(made: RandomTables) -> None:
    demand, (first, _) = Scheduler(made.namespace).demand, (enqueue(made, "a"), enqueue(made, "a"))
    model = made.tables.tickets[first].model
    with mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        with made.namespace.transaction() as t:
            demand.count_all(t)
        before, made.now = demand.of(model), made.now + SECOND_NS
        with made.namespace.transaction() as t:
            made.transitions.hand_over.leave_queue(t, first)
            demand.count_all(t)
    assert (before.requests, demand.of(model)) == (2, replace(before, requests=1))


# ---- yielding the processor ----------------------------------------------------------------------------------


class Clock:
    """A clock that a yield of the processor moves."""

    def __init__(self) -> None:
        self.now_s, self.away_s, self.yields = 0.0, 0.0, 0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now_s

    def yield_processor(self) -> None:
        """Let others run, for as long as they like."""
        self.now_s += self.away_s
        self.yields += 1


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with (
        mock.patch.object(wakes, "time", clock),
        mock.patch.object(wakes, "yield_processor", clock.yield_processor),
    ):
        yield clock


def test_processors_that_are_scarce_are_not_yielded_for_a_hundred_times_as_long(
    made: RandomTables, clock: Clock
) -> None:
    yields = Scheduler(made.namespace).wakes
    clock.away_s = 0.000_5
    for count in (1, 2):
        yields.yield_to_waiter()
        assert clock.yields == count, "a short way costs nothing"
    clock.away_s, began_s = 0.001, clock.now_s
    yields.yield_to_waiter()
    assert clock.yields == 3
    for later_s, count in ((0.001, 3), (0.099_9, 3), (0.100_1, 4)):
        clock.now_s = began_s + later_s
        yields.yield_to_waiter()
        assert clock.yields == count


def test_a_waiter_stays_awake_for_its_answer_for_a_moment_only(made: RandomTables, clock: Clock) -> None:
    spins, ticket = Scheduler(made.namespace).wakes, enqueue(made, "a")
    clock.away_s = 0.000_1
    spins.spin_for_answer(ticket)
    assert 1 < clock.yields < 10
    yields = clock.yields
    with made.namespace.transaction() as t:
        made.transitions.tickets.refuse(t, ticket)
    spins.spin_for_answer(ticket)
    assert clock.yields == yields, "it has its answer"
