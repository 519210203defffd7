"""Parts of the policy by themselves, in what whole plans seldom tell apart."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from policy_views import ME, OTHER, RULES, A, B, device, idle, model, ticket, view

from mpmm.policy.admission import largest_limit_mb, limit_mb, widened
from mpmm.policy.fairness import HEAD_START_S, HIGHEST_URGENCY, rank_ns
from mpmm.policy.isolation import isolate
from mpmm.policy.ledger import TRUST_ACCOUNTS_NS, Entry, Figure, Ledger, Return, settle
from mpmm.policy.making_room import holds_up_others, wait_for_others, wait_without_room
from mpmm.policy.placement import best_place
from mpmm.policy.plan import make_plan
from mpmm.policy.plan_state import PlanState
from mpmm.policy.sharing import Seen, expected_wait_s
from mpmm.policy.view import BusyInstance, Evict, Grant, PlacedInstance, Reason, Refuse, Wait

# ---- devices -----------------------------------------------------------------------------------------------


def test_fewer_devices_than_it_spans_can_take_nothing() -> None:
    assert largest_limit_mb([device(0), device(1, 500.0)], 0.1) == 900.0
    assert largest_limit_mb([device(0), device(1, 500.0)], 0.1, span=2) == 450.0
    assert largest_limit_mb([device(0)], 0.1, span=2) == 0.0


def test_a_device_that_has_nothing_else_takes_a_model_into_its_slack() -> None:
    one = device(external_mb=150.0)
    assert limit_mb(widened(one, 850.0, 0.1), 0.1) == pytest.approx(1000.0)
    assert widened(one, 851.0, 0.1) is one, "it has not got so much"
    assert widened(one, 750.0, 0.1) is one, "that fits without"


@pytest.mark.parametrize(
    ("used", "reason"),
    [((0.0, 500.0), Reason.LEAST_FULL), ((500.0, 504.0), Reason.TIGHTEST), ((0.0, 890.0), Reason.ONLY_ONE)],
)
def test_it_is_told_why_a_device_was_chosen(used: tuple[float, float], reason: Reason) -> None:
    place = best_place([device(row, used=mb) for row, mb in enumerate(used)], 100.0, 0.1)
    assert place is not None
    assert place.reason == reason


def test_devices_are_named_where_there_are_several() -> None:
    for count, named in ((1, ()), (2, (0, 1))):
        devices = [device(row) for row in range(count)]
        assert PlanState(view([], [], devices=devices)).named(devices) == named


# ---- what is asked for -------------------------------------------------------------------------------------


def test_an_unknown_model_is_taken_to_need_what_can_become_free() -> None:
    state = PlanState(view([], [], devices=[device()], rules=replace(RULES, slack_percentage=0.0)))
    assert state.need_mb(ticket(1, A), model(A, 5000.0, known=False)) == 1000.0
    state = PlanState(view([], [], devices=[device(external_least_mb=300.0, leased_mb=100.0)]))
    assert state.need_mb(ticket(1, A), model(A, 5000.0, known=False)) == 600.0
    assert state.need_mb(ticket(1, A), model(A, 5000.0)) == 5000.0


def test_a_waiter_for_some_devices_does_not_see_the_copies_elsewhere() -> None:
    there = [
        *(BusyInstance(10 + on, A, on, 100.0, math.inf) for on in (0, 1)),
        BusyInstance(20, A, 0, 100.0, math.inf, owner=ME),
        BusyInstance(21, A, 1, 100.0, math.inf, owner=ME, loading=True),
        BusyInstance(30, B, 0, 100.0, math.inf),
    ]
    copies = [idle(1, A, on=0), idle(2, A, on=1), idle(3, A, on=0, owner=OTHER)]
    state = PlanState(view([], [], copies=copies, devices=[device(0), device(1)], busy=tuple(there)))
    whole = model(A, shared=4, owned={ME: 1, OTHER: 1}, loading={ME: 1})
    assert state.usable_part(ticket(1, A), whole) is whole
    for on, shared, owned, loading in ((0, 2, {ME: 1, OTHER: 1}, {}), (1, 2, {}, {ME: 1})):
        part = state.usable_part(replace(ticket(1, A), usable_on=(on,)), whole)
        assert (part.shared, part.owned, part.loading) == (shared, owned, loading)


def test_whoever_takes_a_place_in_a_copy_leaves_its_own_row_as_another_place() -> None:
    copies = [idle(7, A), replace(idle(8, A, mb=0.0), place_in=7), idle(9, A)]
    state = PlanState(view([model(A, shared=3)], [], copies=copies))
    assert [one.row for one in state.unused()] == [7, 9]
    state.take_idle(copies[1])
    assert [one.row for one in state.unused()] == [9], "the copy is in use"
    [left] = [one for one in state.idle[A] if one.row == 7]
    assert (left.mb, left.place_in) == (0.0, 7)


def test_a_preload_for_more_copies_than_fit_together_is_refused() -> None:
    small = view([model(A, 1.0, shared=1)], [ticket(1, A, priority=2, preload=2)], devices=[device(total=2.0)])
    [decision] = make_plan(small).decisions
    assert isinstance(decision, Refuse)


def test_each_step_of_urgency_is_worth_the_head_start() -> None:
    at_ns = 10**15
    ranks = [rank_ns(at_ns, urgency) for urgency in range(-HIGHEST_URGENCY, HIGHEST_URGENCY + 1)]
    assert {before - after for before, after in itertools.pairwise(ranks)} == {int(HEAD_START_S * 1e9)}
    assert ranks[-1] == at_ns, "a rank is a word, and so never below 0"


# ---- waits -------------------------------------------------------------------------------------------------


def test_one_that_pinned_copies_leave_too_little_room_holds_up_nobody() -> None:
    copies = [idle(7, B, mb=500.0, pinned=True), idle(8, B, mb=300.0)]
    for need, holds_up in ((300.0, True), (600.0, False)):
        wanted = model(A, need)
        state = PlanState(view([wanted, model(B, shared=2)], [ticket(1, A)], copies=copies, unloading=1))
        assert holds_up_others(state, ticket(1, A), wanted) is holds_up


@pytest.mark.parametrize(
    ("mb", "there"),
    [(900.0, {}), (600.0, {"external_mb": 300.0, "external_least_mb": 300.0}), (100.0, {"external_mb": 800.0})],
    ids=["all of it", "beside other programs", "if what it has grown by is its own"],
)
def test_nobody_passes_for_ever_one_that_only_an_unload_gives_room(mb: float, there: dict[str, Any]) -> None:
    """Nothing is in use, so nothing comes free by itself; and all the time others want the copy that has to go."""
    copy, there = idle(7, B, mb=mb), {"used": 900.0, **there}
    for head_for, passes in ((1.0, True), (60.0, False)):
        tickets = [ticket(1, A, waited=head_for, head_for=head_for), ticket(2, B)]
        state = view([model(A, 600.0), model(B, shared=1)], tickets, copies=[copy], devices=[device(**there)])
        decisions = make_plan(state).decisions
        assert any(isinstance(one, Grant) for one in decisions) is passes
        assert any(isinstance(one, Evict) and one.instances == (7,) for one in decisions) is not passes


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ({"leased_mb": 500.0}, Reason.LEASED),
        ({"external_least_mb": 500.0}, Reason.EXTERNAL),
        ({}, Reason.PINNED),
    ],
)
def test_it_is_told_what_leaves_too_little_room(there: dict[str, Any], reason: Reason) -> None:
    copies = [idle(7, B, mb=500.0, pinned=True)] if reason == Reason.PINNED else []
    state = PlanState(view([model(A, 600.0), model(B, shared=1)], [ticket(1, A)], copies=copies, in_use=1))
    wait = wait_for_others(state, ticket(1, A), [device(**there)], 600.0)
    assert isinstance(wait, Wait)
    assert (wait.reason, wait.why.reason, wait.first) == (reason, reason, False)
    assert state.head is None
    assert wait_for_others(state, ticket(1, A), [device(**there)], 400.0) is None


@pytest.mark.parametrize(
    ("pinned", "in_use", "reason"),
    [(True, 0, Reason.PINNED), (False, 0, Reason.EXTERNAL), (True, 1, Reason.MEMORY), (False, 1, Reason.MEMORY)],
)
def test_one_without_room_waits_for_what_may_make_some(pinned: bool, in_use: int, reason: Reason) -> None:
    devices = [device(0), device(1, external_mb=700.0)]
    copies = [idle(7, B, mb=500.0, on=1, pinned=pinned)]
    state = PlanState(view([model(A), model(B, shared=1)], [], copies=copies, devices=devices, in_use=in_use))
    wait = wait_without_room(state, ticket(1, A), devices, 600.0)
    assert (wait.reason, wait.first) == (reason, bool(in_use))
    assert (state.head is not None) == bool(in_use)
    if reason == Reason.EXTERNAL:
        assert wait.why.coming_mb == 700.0


def test_one_that_runs_alone_on_two_devices_waits_for_leases_that_leave_no_room_for_its_share() -> None:
    devices = [device(row, leased_mb=300.0) for row in range(2)]
    leases = tuple(PlacedInstance(50 + row, B, row, 300.0) for row in range(2))
    for need, waits in ((1000.0, False), (1500.0, True)):
        alone = view([model(A, need, known=False), model(B)], [ticket(1, A)], devices=devices, leases=leases)
        state = PlanState(alone)
        decision = isolate(state, replace(ticket(1, A), span=2), need)
        assert isinstance(decision, Wait) is waits
        assert state.lease_is_awaited is waits


def test_nothing_is_known_of_how_long_a_load_of_the_same_plan_takes() -> None:
    state = PlanState(view([model(A, known=False)], [ticket(1, A)]))
    state.busy[0] += 1
    wait = isolate(state, ticket(1, A), 100.0)
    assert isinstance(wait, Wait)
    assert (wait.reason, wait.why.seconds, wait.first) == (Reason.DRAINING, 0.0, True)


# ---- how long it will take ---------------------------------------------------------------------------------


def test_room_that_should_have_come_is_expected_to_take_as_long_again() -> None:
    wanted = replace(model(A), load_s=2.0, hold_s=0.5)
    for reason, seconds, waited, expected in (
        (Reason.IN_USE, 1.0, 0.0, 1.0),
        (Reason.IN_USE, 1.0, 9.0, 9.0),
        (Reason.DRAINING, 1.0, 9.0, 9.0),
        (Reason.UNLOADING, 1.0, 9.0, 0.0),
        (Reason.BACKING_OFF, 1.0, 9.0, 1.0),
        (Reason.BEHIND, 1.0, 9.0, 0.0),
    ):
        got = expected_wait_s(wanted, ME, 3, reason, seconds, waited_s=waited)
        assert got == pytest.approx(expected + 2.0 + 3 * 0.5), reason


def test_a_hold_of_which_nothing_is_known_is_taken_to_be_as_long_as_others() -> None:
    unused = replace(model(A), load_s=2.0)
    assert expected_wait_s(unused, ME, 3, Reason.BEHIND, 0.0) == pytest.approx(2.0)
    assert expected_wait_s(unused, ME, 3, Reason.BEHIND, 0.0, Seen(load_s=9.0, hold_s=0.25)) == pytest.approx(2.75)


# ---- the ledger --------------------------------------------------------------------------------------------


def test_what_may_be_hidden_by_a_load_is_not_written_off() -> None:
    gone = Return(ended_ns=10, mb=300.0)
    before = Ledger(0.0, 0.0, (gone,))
    late_ns = TRUST_ACCOUNTS_NS * 100
    for most, written_off in ((0.0, 300.0), (300.0, 0.0)):
        figure = Figure(300.0, late_ns, late_ns)
        entries = [Entry(0.0, most)] if most else []
        after = settle(before, figure, entries, late_ns, TRUST_ACCOUNTS_NS)
        assert (after.returns, after.written_off_mb) == ((), written_off)
