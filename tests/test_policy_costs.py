"""The policy: which copies are evicted, by the cost of a wrong choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy_views import A, B, C, D, device, idle, in_use, model, ticket, view, wanted

from mpmm.policy.eviction import eviction_order, score
from mpmm.policy.plan import make_plan
from mpmm.policy.view import (
    BusyInstance,
    Evict,
    Reason,
    Wait,
)


def test_tiers_are_beams_surplus_before_needed_and_cold_before_warm() -> None:
    state = view([model(A, shared=1), model(B, shared=2)], [])
    cold, warm = idle(1, A, age=10), idle(2, A, age=9.9)
    assert [score(state, cold, 2), score(state, warm, 2), score(state, cold, 1), score(state, warm, 1)] == [0, 1, 2, 3]


def test_waiters_weigh_more_than_any_tier() -> None:
    state = view([model(A, shared=2), model(B, shared=1), model(C)], [ticket(1, A), ticket(2, C)])
    wanted_surplus, unwanted_needed = idle(1, A, age=100), idle(2, B, age=0)
    assert score(state, wanted_surplus, 2) == 10
    assert eviction_order(state, [wanted_surplus, unwanted_needed], ticket(2, C)) == [unwanted_needed, wanted_surplus]


def test_of_equals_the_one_that_is_idle_longest_goes_first_and_the_last_copy_is_not_surplus() -> None:
    state = view([model(A, shared=3), model(B, shared=1), model(C)], [ticket(1, C)])
    copies = [idle(1, A, age=20), idle(2, A, age=40), idle(3, A, age=30), idle(4, B, age=90)]
    assert [copy.row for copy in eviction_order(state, copies, ticket(1, C))] == [2, 3, 4, 1]


def test_a_waiter_with_a_copy_only_displaces_models_with_fewer_waiters() -> None:
    state = view(
        [model(A, shared=1, waiting=2), model(B, shared=1, waiting=1), model(C, shared=1, waiting=2)], [ticket(1, A)]
    )
    assert [copy.row for copy in eviction_order(state, [idle(1, B), idle(2, C)], ticket(1, A))] == [1]


def test_of_known_costs_the_least_wanted_copy_goes_however_lately_it_was_used() -> None:
    state = view(
        [model(A, 100), wanted(B, 100, rate=5.0), wanted(C, 100, rate=0.1)],
        [ticket(1, A)],
        copies=[idle(7, B, age=60), idle(8, C, age=1)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (8,)),)


def test_what_another_model_has_taken_the_place_of_goes_first_however_much_it_was_wanted() -> None:
    for old, other in (
        # Known costs; costs that are not known of one, and of both: then the order would be Beam's.
        (wanted(B, 100, rate=9.0, superseded=True), wanted(C, 100, rate=0.1)),
        (model(B, shared=1, superseded=True), wanted(C, 100, rate=0.1)),
        (model(B, shared=1, superseded=True), model(C, shared=2)),
    ):
        state = view(
            [model(A, 100), old, other],
            [ticket(1, A)],
            copies=[idle(7, B, age=1), idle(8, C, age=60)],
            devices=[device(used=900)],
        )
        assert make_plan(state).decisions == (Evict(1, (7,)),)


def test_a_slow_load_outweighs_a_higher_rate() -> None:
    state = view(
        [model(A, 100), wanted(B, 100, rate=1.0, load_s=60.0), wanted(C, 100, rate=5.0)],
        [ticket(1, A)],
        copies=[idle(7, B), idle(8, C)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (8,)),)


def test_a_whole_set_is_chosen_and_not_more_than_that() -> None:
    # Two small ones cost less than one large, or than a small and a large.
    state = view(
        [model(A, 400), wanted(B, 200, rate=0.2), wanted(C, 200, rate=0.3), wanted(D, 500, rate=0.9)],
        [ticket(1, A)],
        copies=[idle(7, B, mb=200), idle(8, C, mb=200), idle(9, D, mb=500)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (7, 8)),)


def test_a_surplus_copy_goes_before_the_last_one_of_a_model_that_is_wanted_less() -> None:
    state = view(
        [model(A, 100), replace(wanted(B, 100, rate=1.0), shared=2), wanted(C, 100, rate=0.5)],
        [ticket(1, A)],
        copies=[idle(7, B, age=30), idle(8, B, age=20), idle(9, C, age=60)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (7,)),)


def test_where_all_loads_are_quick_the_order_is_beams() -> None:
    state = view(
        [model(A, 100), wanted(B, 100, rate=0.1, load_s=0.01), wanted(C, 100, rate=9.0, load_s=0.01)],
        [ticket(1, A)],
        copies=[idle(7, B, age=1), idle(8, C, age=60)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (8,)),)


@pytest.mark.parametrize(("free_in_s", "decision"), [(0.1, Wait(1, Reason.IN_USE)), (60.0, Evict(1, (7,)))])
def test_a_rarely_wanted_copy_in_use_is_waited_for_rather_than_a_hot_one_unloaded_if_that_is_soon(
    free_in_s: float, decision: object
) -> None:
    state = view(
        [replace(model(A, 100), load_s=2.0), wanted(B, 100, rate=5.0), wanted(C, 100, rate=0.1)],
        [ticket(1, A)],
        copies=[idle(7, B)],
        devices=[device(used=900)],
        busy=(in_use(8, C, 100, free_in_s),),
    )
    assert make_plan(state).decisions == (decision,)


def test_the_more_wait_the_less_a_drain_pays() -> None:
    def decided(waiters: int) -> object:
        state = view(
            [replace(model(A, 100), load_s=2.0), wanted(B, 100, rate=5.0), wanted(C, 100, rate=0.1)],
            [ticket(row, A) for row in range(waiters)],
            copies=[idle(7, B)],
            devices=[device(used=900)],
            busy=(in_use(8, C, 100, 20.0),),
        )
        return make_plan(state).decisions[0]

    assert decided(1) == Wait(0, Reason.IN_USE)
    assert decided(3) == Evict(0, (7,))


def test_each_surplus_copy_that_goes_leaves_one_less() -> None:
    state = view(
        [model(A, 200), replace(wanted(B, 100, rate=1.0), shared=3), wanted(C, 100, rate=0.5)],
        [ticket(1, A)],
        copies=[idle(7, B, age=30), idle(8, B, age=20), idle(9, B, age=10), idle(6, C, age=60)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (7, 8)),)


def test_what_comes_free_by_itself_is_waited_for_rather_than_something_unloaded_elsewhere() -> None:
    state = view(
        [model(A, 500), wanted(B, 100, rate=0.1)],
        [ticket(1, A)],
        copies=[idle(7, B, on=1)],
        devices=[device(0, used=500, unloading_mb=100), device(1, used=500)],
    )
    assert make_plan(state).decisions == (Wait(1, Reason.UNLOADING),)


def test_one_that_spans_devices_waits_until_the_last_of_them_has_room() -> None:
    state = view(
        [model(A, need=800), model(B, shared=2, load=1000.0, rate=1.0)],
        [replace(ticket(1, A), span=2)],
        busy=(BusyInstance(5, B, 0, 900, 9.0), BusyInstance(6, B, 1, 900, 3.0)),
        devices=[device(0, used=900), device(1, used=900)],
    )
    (decision,) = make_plan(state).decisions
    assert decision == Wait(1, Reason.IN_USE)
    assert isinstance(decision, Wait)
    assert (decision.why.seconds, decision.why.devices) == (9.0, (0, 1))


def test_a_device_is_drained_for_one_that_runs_alone_where_the_last_copy_is_free_soonest() -> None:
    state = view(
        [model(A, known=False), model(B, shared=3)],
        [ticket(1, A, priority=0)],
        busy=(BusyInstance(5, B, 0, 100, 0.1), BusyInstance(6, B, 0, 100, 9.0), BusyInstance(7, B, 1, 100, 3.0)),
        devices=[device(0, used=200), device(1, used=100)],
    )
    (decision,) = make_plan(state).decisions
    assert decision == Wait(1, Reason.DRAINING)
    assert isinstance(decision, Wait)
    assert decision.why.devices == (1,)
