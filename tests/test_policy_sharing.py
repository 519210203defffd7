"""The policy: when a waiter shares a copy, and cases that need several copies, waiters or devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy_views import (
    ME,
    NOW,
    OTHER,
    RULES,
    A,
    B,
    C,
    busy,
    device,
    idle,
    in_use,
    loading_for,
    model,
    ticket,
    usable_on,
    view,
)

from mpmm.policy.demand import Demand
from mpmm.policy.plan import make_plan
from mpmm.policy.sharing import FIRST_LOAD_S, Seen, seen_so_far, waiting_is_sooner
from mpmm.policy.view import (
    BusyInstance,
    Load,
    ModelView,
    Reason,
    View,
    Wait,
)

# ---- demand ------------------------------------------------------------------------------------------------


def test_demand_is_the_rate_of_regular_requests_and_silence_lowers_it() -> None:
    demand = Demand()
    for number in range(1, 21):
        demand = demand.counted(number, 2.0 * number)
    assert demand.per_second(40.0) == pytest.approx(0.5)
    assert demand.per_second(42.0) == pytest.approx(1 / 3)
    assert demand.per_second(1040.0) == pytest.approx(0.002, rel=0.01)


def test_requests_that_are_counted_together_weigh_as_much_as_one_by_one() -> None:
    one_by_one = together = Demand().counted(1, 0.0)
    for number in range(2, 12):
        one_by_one = one_by_one.counted(number, number - 1.0)
    together = together.counted(11, 10.0)
    assert one_by_one.mean_interarrival_s == pytest.approx(together.mean_interarrival_s)


def test_without_requests_there_is_no_demand_and_failed_loads_are_no_requests() -> None:
    assert Demand().per_second(5.0) == 0.0
    demand = Demand().counted(2, 1.0).counted(3, 2.0)
    assert demand.counted(3, 9.0) is demand
    assert demand.counted(2, 9.0) == replace(demand, requests=2)


@pytest.mark.parametrize(
    ("model_view", "ahead", "expected_s"),
    [
        pytest.param(busy(), 0, 0.1, id="a copy that is soon free is waited for"),
        pytest.param(busy(), 18, 1.9, id="also by the nineteenth"),
        pytest.param(busy(), 19, None, id="but not when so many wait that a load is as quick"),
        pytest.param(busy(shared=2), 19, 1.0, id="two copies serve twice as many"),
        pytest.param(busy(hold_s=3.0), 0, None, id="long holds are not waited for"),
        pytest.param(busy(held_for_s=2.0), 0, None, id="nor one that goes on for as long as a load takes"),
        pytest.param(busy(held_for_s=1.9), 0, 0.1, id="but one that goes on for less is"),
        pytest.param(busy(hold_s=0.0), 9, 0.0, id="a first hold that has just begun is waited for"),
        pytest.param(busy(hold_s=0.0, held_for_s=0.3), 0, 0.3, id="it is expected to last for as long again"),
        pytest.param(busy(hold_s=0.0, held_for_s=0.3), 2, 1.5, id="and so is each hold before one's own"),
        pytest.param(busy(hold_s=0.0, held_for_s=0.3), 3, None, id="until a load is sooner"),
        pytest.param(busy(hold_s=0.0, held_for_s=2.0), 0, None, id="which it is when a first hold outlasts a load"),
        pytest.param(
            busy(hold_s=0.0, shared=4, held_for_s=0.1, held_in_all_s=7.9),
            0,
            1.975,
            id="of several first holds all count",
        ),
        pytest.param(
            busy(hold_s=0.0, shared=4, held_for_s=0.1, held_in_all_s=8.0),
            0,
            None,
            id="so that a copy which was handed out just now does not make them look short",
        ),
        pytest.param(busy(shared=0), 0, None, id="without a copy there is nothing to share"),
        pytest.param(busy(shared=0, owned={OTHER: 1}), 0, None, id="another process's object is no use"),
        pytest.param(busy(shared=0, owned={ME: 1}), 0, 0.1, id="an object of one's own is"),
        pytest.param(busy(shared=0, loading={OTHER: 1}, shares=True, loading_for_s=0.5), 0, 1.6, id="a load is shared"),
        pytest.param(busy(shared=0, loading={OTHER: 1}, shares=False), 0, None, id="but not of another's object"),
        pytest.param(loading_for(0.5, load_s=0.0, hold_s=0.0), 0, FIRST_LOAD_S - 0.5, id="so is a first load"),
        pytest.param(
            loading_for(0.5, load_s=0.0, hold_s=0.0, known=False), 0, FIRST_LOAD_S - 0.5, id="of an unknown model, too"
        ),
        pytest.param(loading_for(3.8), 0, 1.9, id="a load that is late is expected to be late by as much again"),
        pytest.param(loading_for(4.0), 0, None, id="and is not shared once another one is sooner"),
        pytest.param(
            loading_for(2 * FIRST_LOAD_S, load_s=0.0, hold_s=0.0), 0, None, id="nor is a first load that never ends"
        ),
    ],
)
def test_another_copy_is_loaded_only_where_that_is_sooner(
    model_view: ModelView, ahead: int, expected_s: float | None
) -> None:
    found = waiting_is_sooner(model_view, ticket(1, A, waited=2.0), ahead, NOW)
    assert found == (None if expected_s is None else pytest.approx(expected_s))


def test_who_has_just_come_waits_for_a_copy_that_is_held_for_long() -> None:
    assert waiting_is_sooner(busy(held_for_s=9.0), ticket(1, A, waited=1.9), 0, NOW) == pytest.approx(0.1)


def test_the_first_load_of_a_model_is_expected_to_be_as_those_of_others() -> None:
    objects = [busy(shared=0, owned={OTHER: 1}, load_s=4.0, hold_s=0.3)] * 2
    handle = busy(shares=True, load_s=1.0, hold_s=0.0)
    first = loading_for(0.5, load_s=0.0, hold_s=0.0)
    assert seen_so_far([first]) == Seen(0.0, 0.0, shares=True)
    seen = seen_so_far([*objects, handle])
    assert (seen.load_s, seen.hold_s) == pytest.approx((3.0, 0.3))
    assert not seen.shares
    waits_s = [
        waiting_is_sooner(first, ticket(1, A), 0, NOW, others)
        for others in (Seen(3.0, 0.3, shares=True), Seen(3.0, 0.3, shares=False), Seen(0.2, 0.1, shares=True))
    ]
    assert waits_s == [pytest.approx(2.8), None, None]


def test_while_nothing_is_known_one_loads_and_the_others_wait_for_that() -> None:
    tickets = [ticket(row, A, member=row) for row in range(1, 5)]
    decisions = make_plan(view([model(A)], tickets)).decisions
    assert decisions == (Load(1, (0,), 100, False), *(Wait(row, Reason.SHARING) for row in (2, 3, 4)))


@pytest.mark.parametrize("known", [True, False])
def test_unknown_models_are_loaded_in_parallel_where_processes_are_measured(known: bool) -> None:
    models = [model(row, known=known) for row in (A, B, C)]
    tickets = [ticket(row, wants) for row, wants in enumerate((A, B, C, A, B, C))]
    decisions = make_plan(view(models, tickets, rules=replace(RULES, isolate_unknown=False))).decisions
    loads = [Load(row, (0,), 100, False) for row in (0, 1, 2)]
    assert decisions == (*loads, *(Wait(row, Reason.SHARING) for row in (3, 4, 5)))


def test_a_hung_load_is_shared_until_another_one_is_sooner() -> None:
    def decided(loading_for_s: float) -> tuple[object, ...]:
        hung = loading_for(loading_for_s)
        return make_plan(view([hung], [ticket(1, A), ticket(2, A)], busy=(in_use(5, A, 100, 9.0),))).decisions

    assert decided(3.8) == (Wait(1, Reason.SHARING), Wait(2, Reason.SHARING))
    assert decided(4.0) == (Load(1, (0,), 100, False), Wait(2, Reason.SHARING))


def test_who_shares_a_copy_does_not_block_those_behind() -> None:
    view = View(
        now_s=NOW,
        rules=RULES,
        models={A: busy(), B: model(B, 100.0, waiting=1)},
        idle=(),
        tickets=(ticket(1, A), ticket(2, B)),
        devices=(device(),),
    )
    assert make_plan(view).decisions == (Wait(1, Reason.SHARING), Load(2, (0,), 100.0, alone=False))


def test_a_preload_for_a_device_is_not_enough_because_another_model_is_in_use_there() -> None:
    state = view(
        [model(A), model(B, shared=1)],
        [usable_on(ticket(1, A, preload=1), 1)],
        busy=(BusyInstance(8, B, 1, 100, 5.0),),
        devices=[device(0), device(1, used=100)],
    )
    (decision,) = make_plan(state).decisions
    assert isinstance(decision, Load)
    assert decision.devices == (1,)


def test_a_load_for_a_device_counts_once_for_a_preload_of_two() -> None:
    state = view(
        [model(A, loading={ME: 1})],
        [usable_on(ticket(1, A, preload=2), 1)],
        busy=(BusyInstance(8, A, 1, 100, 5.0, owner=ME, loading=True),),
        devices=[device(0), device(1, used=100)],
    )
    (decision,) = make_plan(state).decisions
    assert isinstance(decision, Load)


def test_a_third_waiter_shares_as_long_as_that_is_sooner_than_a_load() -> None:
    one = replace(model(A, shared=1), load_s=1.0, hold_s=0.3)
    state = view([one], [ticket(row, A) for row in range(3)], busy=(in_use(8, A, 100, 0.3),))
    assert make_plan(state).decisions == tuple(Wait(row, Reason.SHARING) for row in range(3))


def test_a_device_is_not_emptied_in_vain_where_pinned_copies_leave_no_room() -> None:
    # Part of what counts as external may be what copies have grown by, so emptying a device may help: the second one.
    external = {"external_mb": 500, "external_least_mb": 0}
    state = view(
        [model(A, 700), model(B, shared=1), model(C, shared=2)],
        [ticket(1, A)],
        copies=[idle(7, B, mb=300, pinned=True), idle(8, C, mb=100)],
        busy=(BusyInstance(9, C, 1, 400, 60.0),),
        devices=[device(0, used=900, **external), device(1, used=900, **external)],
    )
    (decision,) = make_plan(state).decisions
    assert decision == Wait(1, Reason.IN_USE)


def test_what_is_emptied_on_several_devices_is_awaited_for_as_long_as_what_is_in_use_there() -> None:
    # As above, both have to be empty; on one of them that takes no time.
    external = {"external_mb": 500, "external_least_mb": 0}
    state = view(
        [model(A, 1400), model(B, shared=1), model(C, shared=1)],
        [replace(ticket(1, A), span=2)],
        copies=[idle(7, B, mb=400)],
        busy=(BusyInstance(9, C, 1, 400, 0.25),),
        devices=[device(0, used=900, **external), device(1, used=900, **external)],
    )
    (decision,) = make_plan(state).decisions
    assert isinstance(decision, Wait)
    assert (decision.reason, decision.why.seconds) == (Reason.IN_USE, 0.25)
