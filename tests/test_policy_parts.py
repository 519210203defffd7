"""Parts of the policy by themselves, where whole plans seldom show a difference."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from policy_views import ME, NOW, OTHER, RULES, A, B, C, D, device, idle, model, ticket, usable_on, view

from mpmm.policy.admission import largest_limit_mb, limit_mb, widened
from mpmm.policy.demand import Demand
from mpmm.policy.eviction import RESIDENCE_IN_LOADS, Candidate, EvictionPlan, cheapest_set, waiting_pays
from mpmm.policy.fairness import HEAD_START_S, HIGHEST_URGENCY, may_be_leased_before, rank_ns, urgency_of
from mpmm.policy.isolation import devices_to_drain, isolate
from mpmm.policy.ledger import TRUST_ACCOUNTS_NS, Entry, Figure, Ledger, Return, settle
from mpmm.policy.making_room import holds_up_others, wait_for_others, wait_without_room
from mpmm.policy.placement import best_place
from mpmm.policy.plan import make_plan
from mpmm.policy.plan_state import PlanState
from mpmm.policy.sharing import Seen, expected_wait_s
from mpmm.policy.suspension import HostRoom, Kept, Movable, Way, pays
from mpmm.policy.view import BusyInstance, Evict, Grant, Load, PlacedInstance, Reason, Refuse, Wait

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
    there += [replace(one, row=40 + one.row, leaving=True) for one in there]
    state = PlanState(view([], [], copies=copies, devices=[device(0), device(1)], busy=tuple(there)))
    whole = replace(model(A, shared=4, owned={ME: 1, OTHER: 1}, loading={ME: 1}), leaving=4)
    assert state.usable_part(ticket(1, A), whole) is whole
    for on, shared, owned, loading in ((0, 2, {ME: 1, OTHER: 1}, {}), (1, 2, {}, {ME: 1})):
        part = state.usable_part(replace(ticket(1, A), usable_on=(on,)), whole)
        assert (part.shared, part.owned, part.loading, part.leaving) == (shared, owned, loading, 2)


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


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize(
    ("counts", "there"),
    [
        ({"leaving": 1}, {"leaving": True}),
        ({"owned": {OTHER: 1}}, {"owner": OTHER}),
        ({"loading": {OTHER: 1}}, {"owner": OTHER, "loading": True}),
    ],
)
def test_a_preload_waits_for_the_room_of_copies_that_do_not_stay_or_are_of_no_use_to_it(
    restricted: bool, counts: dict[str, Any], there: dict[str, Any]
) -> None:
    preload = ticket(1, A, priority=2, preload=1)
    state = view(
        [replace(model(A, 800.0), load_s=1.0, **counts)],
        [usable_on(preload, 0) if restricted else preload],
        busy=(BusyInstance(7, A, 0, 800.0, 5.0, **there),),
        devices=[device(used=800.0)],
    )
    [decision] = make_plan(state).decisions
    assert isinstance(decision, Wait)
    assert decision.reason == Reason.MEMORY


@pytest.mark.parametrize(
    ("closed", "decision"),
    [
        ({"steady": B}, Wait(1, Reason.QUIET)),
        ({"isolated": True}, None),
        ({"steady": B, "leased_mb": 500.0}, Wait(1, Reason.LEASED)),
        ({"steady": B, "external_mb": 500.0, "external_least_mb": 500.0}, Wait(1, Reason.EXTERNAL)),
    ],
)
@pytest.mark.parametrize("open_device", [{"leased_mb": 500.0}, {"external_mb": 500.0, "external_least_mb": 500.0}])
def test_one_that_only_a_closed_device_could_take_waits_for_that(
    closed: dict[str, Any], decision: Wait | None, open_device: dict[str, Any]
) -> None:
    where = [device(0, used=500.0, **closed), device(1, used=500.0, **open_device)]
    state = view([model(A, 600.0), model(B)], [ticket(1, A)], devices=where)
    if decision is not None and decision.reason == Reason.LEASED and "leased_mb" not in open_device:
        decision = Wait(1, Reason.EXTERNAL)
    if decision is not None and decision.reason == Reason.QUIET:
        [wait] = make_plan(state).decisions
        assert isinstance(wait, Wait)
        assert (wait.why.other, wait.why.devices) == (B, (0,))
    assert make_plan(state).decisions == (() if decision is None else (decision,))


def test_a_later_lease_does_not_starve_one_that_waits_for_a_device_where_something_starts() -> None:
    where = [device(0, used=500.0, steady=B), device(1, used=500.0, reserved_mb=200.0, leased_mb=400.0)]
    lease = replace(model(C, 150.0), lease=True)
    leases = (PlacedInstance(7, D, 1, 200.0), PlacedInstance(8, D, 1, 200.0))
    for waited, granted in ((1.0, 1), (9.0, 0)):
        tickets = [ticket(1, A, waited=waited), ticket(2, C)]
        models = [model(A, 600.0), model(B), lease, replace(model(D), lease=True)]
        waits, later = make_plan(view(models, tickets, devices=where, leases=leases)).decisions
        assert isinstance(waits, Wait) and waits.reason == Reason.QUIET
        assert isinstance(later, Load) is bool(granted)


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


@pytest.mark.parametrize("leased", [(0, 1), (0,), (1,)])
def test_one_that_runs_alone_on_two_devices_waits_for_leases_that_leave_no_room_for_its_share(
    leased: tuple[int, ...],
) -> None:
    devices = [device(row, leased_mb=300.0 if row in leased else 0.0) for row in range(2)]
    leases = tuple(PlacedInstance(50 + row, B, row, 300.0) for row in leased)
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
    # A tenth of what is awaited may be missing, as where it has come free.
    for most, written_off in ((0.0, 300.0), (269.0, 300.0), (270.0, 0.0), (300.0, 0.0)):
        figure = Figure(300.0, late_ns, late_ns)
        entries = [Entry(0.0, most)] if most else []
        after = settle(before, figure, entries, late_ns, TRUST_ACCOUNTS_NS)
        assert (after.returns, after.written_off_mb) == ((), written_off)


# ---- functions of one decision, on both sides of where they turn ---------------------------------------------


@pytest.mark.parametrize("urgency", [-HIGHEST_URGENCY, -1, 0, 1, HIGHEST_URGENCY])
def test_urgency_is_told_from_the_rank(urgency: int) -> None:
    for enqueued_ns in (0, 3 * 10**15 + 7):
        assert urgency_of(enqueued_ns, rank_ns(enqueued_ns, urgency)) == urgency


@pytest.mark.parametrize(
    ("before", "requests", "now_s", "after"),
    [
        # The first ones say nothing of the time between two.
        (Demand(), 3, 50.0, Demand(0.0, 3, 50.0)),
        (Demand(0.0, 1, 50.0), 3, 56.0, Demand(3.0, 3, 56.0)),
        # Each request counts a quarter, and what was before it three.
        (Demand(4.0, 3, 50.0), 4, 58.0, Demand(5.0, 4, 58.0)),
        (Demand(4.0, 3, 50.0), 5, 66.0, Demand(4.0 * 0.5625 + 8.0 * 0.4375, 5, 66.0)),
        # None, and a load that has failed.
        (Demand(4.0, 3, 50.0), 3, 58.0, Demand(4.0, 3, 50.0)),
        (Demand(4.0, 3, 50.0), 2, 58.0, Demand(4.0, 2, 50.0)),
    ],
)
def test_demand_is_a_mean_that_forgets(before: Demand, requests: int, now_s: float, after: Demand) -> None:
    assert before.counted(requests, now_s) == after


@pytest.mark.parametrize(
    ("demand", "now_s", "rate"),
    [
        (Demand(), 50.0, 0.0),
        (Demand(0.0, 1, 50.0), 50.0, 1000.0),
        (Demand(0.0, 1, 50.0), 54.0, 0.25),
        (Demand(3.0, 2, 50.0), 50.0, 1 / 3),
        (Demand(3.0, 9, 50.0), 54.0, 0.2),
    ],
)
def test_demand_falls_with_silence(demand: Demand, now_s: float, rate: float) -> None:
    assert demand.per_second(now_s) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("suspends_s", "resumes_s", "load_s", "share", "pays_off"),
    [
        # Nothing measured: as the rates say, 0.05 + 0.1 s each way, and any gain will do.
        *((0.0, 0.0, 0.301, 0.15, True), (0.0, 0.0, 0.299, 0.15, False)),
        # One of them alone is not enough to ask for more.
        *((1.0, 0.0, 1.16, 0.15, True), (0.0, 1.0, 1.16, 0.15, True), (1.0, 0.0, 1.14, 0.15, False)),
        *((1.0, 1.0, 3.01, 0.15, True), (1.0, 1.0, 3.0, 0.15, False)),
        # Where little is saved in all, the gain has to be clear.
        *((1.0, 1.0, 8.01, 0.149, True), (1.0, 1.0, 8.0, 0.149, False)),
        *((0.0, 0.0, 1.201, 0.149, True), (0.0, 0.0, 1.199, 0.149, False)),
    ],
)
def test_a_suspension_pays_off_that_is_so_much_quicker_than_a_load(
    suspends_s: float, resumes_s: float, load_s: float, share: float, pays_off: bool
) -> None:
    assert pays(Movable(800.0, Way.COOPERATIVE, load_s, suspends_s, resumes_s, 1.0), share) is pays_off
    assert not pays(Movable(0.0, Way.NONE, load_s, 1e-9, 1e-9, 1.0), 1.0)


@pytest.mark.parametrize(
    ("need_mb", "worth", "dropped"),
    [
        *((100.0, 1.0, []), (101.0, 1.0, None), (101.0, 3.1, [2]), (400.0, 3.0, None), (400.0, 3.1, [2])),
        *((401.0, 8.0, None), (401.0, 8.1, [2, 1]), (1000.0, 100.0, None), (1001.0, 100.0, None)),
        # Without its worth the oldest ones go.
        *((101.0, None, [1]), (401.0, None, [1, 2])),
    ],
)
def test_what_is_dropped_from_the_host_for_another(
    need_mb: float, worth: float | None, dropped: list[int] | None
) -> None:
    old, cheap = Kept(1, 300.0, 5.0, worth=5.0), Kept(2, 300.0, 6.0, worth=3.0)
    room = HostRoom([old, cheap, Kept(3, 300.0, 4.0, worth=0.1, pinned=True)], 100.0, 1000.0)
    assert room.dropped_for(need_mb, worth) == dropped


@pytest.mark.parametrize(
    ("share_mb", "external_mb", "total_mb", "extra_mb"),
    [
        # The limit is 900 MB.
        *((900.0, 0.0, 1000.0, 0.0), (900.0, 1.0, 1000.0, 1.0), (901.0, 50.0, 1000.0, 0.0)),
        *((800.0, 100.0, 1000.0, 0.0), (800.0, 101.0, 1000.0, 1.0), (800.0, 200.0, 1000.0, 100.0)),
        *((800.0, 201.0, 1000.0, 0.0), (899.5, 0.0, 1000.0, 0.0), (900.0, -50.0, 1000.0, 0.0)),
    ],
)
def test_the_slack_is_for_what_fits_beside_external_memory_alone(
    share_mb: float, external_mb: float, total_mb: float, extra_mb: float
) -> None:
    assert widened(device(total=total_mb, external_mb=external_mb), share_mb, 0.1).extra_mb == pytest.approx(extra_mb)


def test_a_lease_goes_before_one_that_waits_if_no_end_of_leases_would_serve_that_sooner() -> None:
    """Of many leases only their sum is formed."""
    late = ticket(1, A, waited=RULES.max_overtake_seconds)
    for held, mb, goes in (
        # 300 MB wait; 600 MB are the most that leases may take when it is their turn.
        *(([], 600.0, True), ([], 601.0, False), ([400.0], 200.0, True), ([400.0], 201.0, False)),
        *(([700.0], 600.0, True), ([700.0, 100.0], 501.0, False), ([700.0, 100.0], 500.0, True)),
        *(
            ([50.0] * 11, 50.0, True),
            ([50.0] * 11, 51.0, False),
            ([50.0] * 10, 100.0, True),
            ([50.0] * 10, 101.0, False),
        ),
        # Whether or not the large one ends, it fits beside the others: which is not found out of more than ten.
        *(([700.0, *[1.0] * 9], 500.0, True), ([700.0, *[1.0] * 10], 500.0, False)),
    ):
        asked = view([model(A, 300.0)], [late], devices=[device()])
        assert may_be_leased_before(asked, late, 300.0, device(), mb, held) is goes, (held, mb)
    asked = view([model(A, 300.0)], [late], devices=[device()])
    assert may_be_leased_before(asked, replace(late, loadable_on=(1,)), 300.0, device(), 900.0, [])
    assert may_be_leased_before(asked, replace(late, enqueued_s=NOW - 1.0), 300.0, device(), 900.0, [])


@pytest.mark.parametrize(
    ("need_mb", "bound_mb", "span", "places"),
    [
        # Limits of 900, 720 and 540 MB; all are empty, so the first one that will do is as good as the others.
        *((100.0, 0.0, 1, (0,)), (100.0, 719.0, 1, (0,)), (100.0, 720.0, 1, (0,)), (100.0, 900.0, 1, (0,))),
        *((200.0, 0.0, 2, (0, 1)), (200.0, 1439.0, 2, (0, 1)), (1440.0, 0.0, 2, (0, 1)), (1441.0, 0.0, 2, (0, 1))),
    ],
)
def test_a_device_that_is_too_small_is_drained_for_nobody_if_there_is_another(
    need_mb: float, bound_mb: float, span: int, places: tuple[int, ...]
) -> None:
    devices = [device(0), device(1, 800.0), device(2, 600.0)]
    state = PlanState(
        view([replace(model(A, need_mb, known=False), bound_mb=bound_mb)], [ticket(1, A)], devices=devices)
    )
    assert tuple(one.device for one in devices_to_drain(state, replace(ticket(1, A), span=span))) == places


@pytest.mark.parametrize(("bound_mb", "places"), [(1439.0, (2, 1)), (1440.0, (2, 0)), (1079.0, (2, 0))])
def test_each_of_several_devices_has_to_be_larger_than_a_share_of_what_was_not_enough(
    bound_mb: float, places: tuple[int, ...]
) -> None:
    # Limits of 540, 720 and 900 MB, and of these 540, 420 and 600 MB are free.
    devices = [device(0, 600.0), device(1, 800.0, used=300.0), device(2, used=300.0)]
    wanted, asks = replace(model(A, 200.0, known=False), bound_mb=bound_mb), replace(ticket(1, A), span=2)
    state = PlanState(view([wanted], [asks], devices=devices))
    assert tuple(one.device for one in devices_to_drain(state, asks)) == places


@pytest.mark.parametrize(
    ("leased", "drained"),
    [
        *(((0.0, 0.0), (0,)), ((801.0, 0.0), (1,)), ((800.0, 0.0), (0,)), ((801.0, 801.0), (0,))),
        *(((801.0, 0.0, 0.0), (1, 2)), ((800.0, 0.0, 0.0), (0, 1)), ((801.0, 801.0, 0.0), (0, 1))),
    ],
)
def test_a_device_without_room_beside_leases_is_drained_only_where_all_are(
    leased: tuple[float, ...], drained: tuple[int, ...]
) -> None:
    """The model spans as many devices as are drained, and takes 100 MB of each."""
    devices = [device(row, leased_mb=mb) for row, mb in enumerate(leased)]
    asks = replace(ticket(1, A), span=len(drained))
    state = PlanState(view([model(A, 100.0 * asks.span, known=False)], [asks], devices=devices))
    assert tuple(place.device for place in devices_to_drain(state, asks)) == drained


@pytest.mark.parametrize(
    ("there", "unloading", "holds_up"),
    [({}, 0, False), ({}, 1, True), ({"returning_mb": 1.0}, 0, True), ({"external_mb": 300.0}, 0, False)],
)
def test_one_that_memory_is_on_its_way_for_holds_up_others(
    there: dict[str, Any], unloading: int, holds_up: bool
) -> None:
    """Nothing can be evicted for it: its own model uses the missing memory elsewhere."""
    wanted = model(A, 600.0)
    seen = view([wanted], [ticket(1, A)], devices=[device(used=500.0, **there)], unloading=unloading)
    assert holds_up_others(PlanState(seen), ticket(1, A), wanted) is holds_up


@pytest.mark.parametrize(("copies", "refused"), [(2, False), (1000, False)])
def test_any_number_of_copies_fit_together_that_take_nothing(copies: int, refused: bool) -> None:
    asked = view([model(A, 0.0)], [ticket(1, A, priority=2, preload=copies)])
    [decision] = make_plan(asked).decisions
    assert isinstance(decision, Refuse) is refused


@pytest.mark.parametrize(
    ("costs", "missing_mb", "chosen"),
    [
        # Cost and MB of each; the cheapest together go, the dearest first to stay.
        ([], 1.0, []),
        ([(1.0, 100.0), (1.0, 100.0)], 200.0, [0, 1]),
        ([(1.0, 100.0), (1.0, 100.0)], 201.0, []),
        ([(1.0, 100.0), (2.0, 100.0)], 100.0, [0]),
        ([(1.0, 50.0), (1.5, 100.0)], 100.0, [1]),
        ([(1.0, 50.0), (9.0, 100.0), (1.0, 50.0)], 100.0, [0, 2]),
        ([(1.0, 0.5), (1.0, 1.5), (1.0, 1.0)], 1.0, [1]),
        ([(3.1, 300.0), (1.0, 50.0), (2.0, 150.0)], 200.0, [1, 2]),
    ],
)
def test_the_cheapest_ones_are_evicted_that_free_enough(
    costs: list[tuple[float, float]], missing_mb: float, chosen: list[int]
) -> None:
    candidates = [Candidate(cost, mb, idle(row, A, mb=mb)) for row, (cost, mb) in enumerate(costs)]
    assert sorted(one.copy.row for one in cheapest_set(candidates, missing_mb)) == chosen


@pytest.mark.parametrize(
    ("drain_s", "cost", "sooner_cost", "waiting", "pays_off"),
    [
        (0.9, 1.0, 1.5, 1, True),
        (RESIDENCE_IN_LOADS, 1.0, 1.5, 1, False),
        (RESIDENCE_IN_LOADS - 0.01, 1.0, 1.5, 1, True),
        (RESIDENCE_IN_LOADS / 2, 1.0, 1.5, 2, False),
        (RESIDENCE_IN_LOADS / 2 - 0.01, 1.0, 1.5, 2, True),
        (0.9, 1.5, 1.0, 1, False),
        (0.0, 1.0, 1.0, 0, False),
        (0.0, None, 1.5, 1, False),
        (0.0, 1.0, None, 1, False),
    ],
)
def test_to_wait_for_a_cheaper_plan_pays_off_while_that_is_shorter_than_what_it_saves(
    drain_s: float, cost: float | None, sooner_cost: float | None, waiting: int, pays_off: bool
) -> None:
    plan, sooner = (
        EvictionPlan((device(),), (), (), reload_cost, wait_s, 100.0, (0.0,))
        for wait_s, reload_cost in ((drain_s, cost), (0.0, sooner_cost))
    )
    assert waiting_pays(plan, sooner, replace(model(A, waiting=waiting), load_s=2.0)) is pays_off
