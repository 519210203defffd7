"""The policy: the order of the queue, which requests may overtake, and which load is first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from policy_views import (
    ME,
    NOW,
    OTHER,
    A,
    B,
    C,
    at_most,
    device,
    held_for_long,
    idle,
    in_use,
    model,
    ticket,
    usable_on,
    view,
    wanted,
)

from mpmm.policy.admission import free_mb, limit_mb
from mpmm.policy.fairness import overtaking_limited, overtaking_over, queue_order
from mpmm.policy.plan import make_plan
from mpmm.policy.view import (
    BusyInstance,
    Evict,
    Grant,
    IdleInstance,
    Load,
    ModelView,
    Reason,
    Refuse,
    Resume,
    SuspendedInstance,
    TicketView,
    View,
    Wait,
)


def test_waiters_stand_in_order_of_priority_then_number() -> None:
    tickets = [ticket(3, A), ticket(1, A), ticket(9, B, priority=0), ticket(2, C)]
    assert [t.row for t in queue_order(view([], tickets))] == [9, 1, 2, 3]


def test_overtaking_ends_exactly_at_the_bound() -> None:
    state = view([], [])
    assert not overtaking_limited(state, ticket(1, A, waited=9.0))
    assert not overtaking_limited(state, ticket(1, A, waited=9.0, head_for=1.999))
    assert overtaking_limited(state, ticket(1, A, waited=9.0, head_for=2.0))
    assert not overtaking_over(state, ticket(1, A, waited=9.0, head_for=3.999))
    assert overtaking_over(state, ticket(1, A, waited=9.0, head_for=4.0))


def test_a_known_model_that_has_waited_long_enough_stands_among_the_unknown() -> None:
    came = [ticket(1, B, waited=8.0), ticket(2, A, waited=7.9), ticket(3, C, priority=0)]
    tickets = [replace(waiter, rank=number) for number, waiter in enumerate(came)]
    assert [t.row for t in queue_order(view([], tickets))] == [1, 3, 2]
    assert [t.row for t in queue_order(view([], tickets[1:]))] == [3, 2]


def test_free_memory_is_the_limit_less_what_is_used_and_reserved() -> None:
    one = device(used=200, reserved_mb=300)
    assert (limit_mb(one, 0.1), free_mb(one, 0.1)) == (900, 400)


def test_a_model_that_takes_nothing_goes_to_a_device_whose_total_is_known() -> None:
    state = view([model(A, 0.0)], [ticket(1, A)], devices=[device(0, 0.0), device(1, 1000.0, 900.0)])
    (decision,) = make_plan(state).decisions
    assert isinstance(decision, Load)
    assert decision.devices == (1,)


# ---- overtaking one that can use no copy of its model, of which there may be no more ------------------------


def exchanged_for_me(head_for_s: float | None, *others: ModelView, **more: Any) -> View:
    """The only copy there may be of A is another member's, and idle; that member wants it again, behind this one."""
    values: dict[str, Any] = {"copies": [idle(7, A, owner=OTHER)], "devices": [device(used=100)], **more}
    tickets = [ticket(1, A, head_for=head_for_s), ticket(2, A, member=OTHER)]
    return view([model(A, owned={OTHER: 1}), *others], tickets, rules=at_most(1), **values)


@pytest.mark.parametrize(
    ("of", "first"),
    [
        (model(A, owned={OTHER: 1}), True),
        (model(A, owned={ME: 1}), False),
        (replace(model(A, loading={OTHER: 1}), shares=False), True),
        (replace(model(A, loading={ME: 1}), shares=False), False),
    ],
)
def test_the_time_of_one_begins_that_can_use_no_copy_of_as_many_as_there_may_be(of: ModelView, first: bool) -> None:
    used = BusyInstance(7, A, 0, 100, 1.0, owner=OTHER)
    state = view([of, model(B)], [ticket(1, A), ticket(2, B)], busy=(used,), rules=at_most(1))
    decision, other = make_plan(state).decisions
    assert (decision, isinstance(decision, Wait) and decision.first) == (Wait(1, Reason.COPIES), first)
    # It holds up nobody.
    assert isinstance(other, Load)
    pinned = replace(state, busy=(replace(used, pinned=True),))
    assert not any(isinstance(decision, Wait) and decision.first for decision in make_plan(pinned).decisions)


def test_the_copy_is_exchanged_once_its_users_have_overtaken_the_one_that_cannot_use_it_for_long_enough() -> None:
    for head_for_s in (None, 1.9):
        granted, waits = reversed(make_plan(exchanged_for_me(head_for_s)).decisions)
        assert (granted, waits) == (Grant(2, 7), Wait(1, Reason.COPIES))
    assert make_plan(exchanged_for_me(2.0)).decisions[0] == Evict(1, (7,))


def test_a_copy_over_several_devices_is_exchanged_too() -> None:
    copy = replace(idle(7, A, mb=600, owner=OTHER), other_shares=((1, 600.0),))
    state = view(
        [model(A, 1200, owned={OTHER: 1})],
        [replace(ticket(1, A, head_for=2.0), span=2), replace(ticket(2, A, member=OTHER), span=2)],
        copies=[copy],
        devices=[device(0, used=600), device(1, used=600)],
        rules=at_most(1),
    )
    # Each device has room for the half, not for the whole.
    assert make_plan(state).decisions[0] == Evict(1, (7,))


@pytest.mark.parametrize("reason", ["no room", "pinned", "quiet", "failing"])
def test_nothing_is_kept_for_an_exchange_that_would_be_in_vain(reason: str) -> None:
    match reason:
        case "no room":
            state = exchanged_for_me(9.0, devices=[device(used=1000, reserved_mb=900, leased_mb=900)])
        case "pinned":
            state = exchanged_for_me(9.0, copies=[idle(7, A, owner=OTHER, pinned=True)])
        case "quiet":
            state = exchanged_for_me(9.0, devices=[device(used=100, steady=B), device(1)])
        case _:
            state = exchanged_for_me(9.0)
            state = replace(state, models={A: replace(state.models[A], failures=3, failed_ago_s=0.1)})
    assert Grant(2, 7) in make_plan(state).decisions


THEIRS = idle(7, A, owner=OTHER)
IN_USE = BusyInstance(8, A, 1, 100, 1.0, owner=OTHER)


@pytest.mark.parametrize(
    ("copies", "busy", "expected"),
    [
        ([THEIRS], (), (Reason.QUIET, B, False)),
        ([replace(THEIRS, pinned=True)], (), (Reason.PINNED, A, False)),
        # Once the start is over, the other one makes way.
        ([THEIRS, replace(THEIRS, row=9, device=1, pinned=True)], (), (Reason.QUIET, B, False)),
        ([THEIRS], (replace(IN_USE, pinned=True),), (Reason.QUIET, B, False)),
        # The copy in use makes way as soon as it is idle.
        ([THEIRS], (IN_USE,), (Reason.COPIES, None, True)),
        ([replace(THEIRS, pinned=True)], (IN_USE,), (Reason.COPIES, None, True)),
        ([], (replace(IN_USE, device=0),), (Reason.COPIES, None, False)),
    ],
)
def test_one_that_waits_for_an_exchange_is_told_what_prevents_it(
    copies: list[IdleInstance], busy: tuple[BusyInstance, ...], expected: tuple[Reason, int | None, bool]
) -> None:
    first = model(A, owned={OTHER: len(copies) + len(busy)})
    devices = [device(used=100, steady=B), device(1, used=100)]
    there = view([first, model(B)], [ticket(1, A)], copies=copies, busy=busy, devices=devices, rules=at_most(1))
    [waits] = make_plan(there).decisions
    assert isinstance(waits, Wait)
    assert (waits.reason, waits.why.other, waits.first) == expected


def test_a_copy_with_several_users_is_kept_until_it_has_none() -> None:
    # The first of its places is in use.
    place = replace(idle(8, A, mb=0, owner=OTHER), place_in=7)
    used = exchanged_for_me(2.0, copies=[place], busy=(BusyInstance(7, A, 0, 100, 1.0, owner=OTHER),))
    assert make_plan(used).decisions == (Wait(1, Reason.COPIES), Wait(2, Reason.COPIES))
    # All of its users are gone.
    unused = exchanged_for_me(2.0, copies=[idle(7, A, owner=OTHER), place])
    assert make_plan(unused).decisions[0] == Evict(1, (7,))


def test_where_others_leave_no_room_for_another_copy_these_are_kept_first() -> None:
    def beside(*busy: BusyInstance, **more: Any) -> View:
        tickets = [replace(usable_on(ticket(1, A), 1), head_since_s=NOW - 2.0), ticket(2, A), ticket(3, B)]
        return view(
            [model(A, 800, shared=1), model(B, 800, shared=1)],
            tickets,
            rules=at_most(1),
            busy=busy,
            devices=[device(0, used=800), device(1, used=800)],
            **more,
        )

    b_is_used = beside(in_use_on_1(8, B), copies=[idle(7, A, mb=800)])
    assert Grant(2, 7) in make_plan(b_is_used).decisions
    b_is_idle = beside(copies=[idle(7, A, mb=800), idle(8, B, mb=800, on=1)])
    assert make_plan(b_is_idle).decisions[0] == Evict(1, (7,))
    assert not any(isinstance(decision, Grant) for decision in make_plan(b_is_idle).decisions)


def in_use_on_1(row: int, of: int) -> BusyInstance:
    return BusyInstance(row, of, 1, 800, 1.0)


# ---- overtaking one that waits for room ---------------------------------------------------------------------


def blocked_by_c(head_for_s: float, *behind: TicketView) -> View:
    """A needs 800 MB: one copy of C is idle, the other in use, with 400 MB each; an idle copy of B is small."""
    return view(
        [model(A, 800), model(B, shared=1), model(C, shared=2)],
        [ticket(1, A, head_for=head_for_s), *behind],
        copies=[idle(7, B, mb=10, age=1), idle(9, C, mb=400)],
        devices=[device(used=900)],
        busy=(in_use(8, C, 400, 0.5),),
    )


def test_within_the_bound_every_idle_copy_may_be_reused() -> None:
    decisions = make_plan(blocked_by_c(1.9, ticket(2, C), ticket(3, B))).decisions
    assert decisions[1:] == (Grant(2, 9), Grant(3, 7))


@pytest.mark.parametrize(
    ("load", "begins"),
    [
        pytest.param(
            BusyInstance(5, B, 0, 900, 9.0, loading=True), False, id="not while only the end of a load makes room"
        ),
        pytest.param(BusyInstance(5, B, 0, 900, 9.0), True, id="once that is in use"),
    ],
)
def test_the_time_of_a_blocked_one_begins_when_somebody_can_delay_it(load: BusyInstance, begins: bool) -> None:
    state = view([model(A, 800), model(B, 900)], [ticket(1, A)], devices=[device(used=900)], busy=(load,))
    (decision,) = make_plan(state).decisions
    assert (decision, isinstance(decision, Wait) and decision.first) == (Wait(1, Reason.IN_USE), begins)


def test_it_does_not_while_a_load_of_the_same_plan_takes_the_room() -> None:
    decisions = make_plan(view([model(A, 800), model(B, 800)], [ticket(1, A), ticket(2, B)])).decisions
    assert [isinstance(decision, Wait) and decision.first for decision in decisions] == [False, False]


def test_it_begins_during_a_load_if_others_are_idle_that_could_make_room() -> None:
    state = view(
        [model(A, 400), model(B, 100), wanted(C, 400, rate=50.0)],
        [replace(ticket(1, A))],
        copies=[idle(7, C, mb=400)],
        devices=[device(used=800)],
        busy=(BusyInstance(5, B, 0, 400, 0.1, loading=True),),
    )
    costs = {B: wanted(B, 100, rate=0.1, loading={OTHER: 1}), A: replace(model(A, 400, waiting=1), load_s=2.0)}
    (decision,) = make_plan(replace(state, models={**state.models, **costs})).decisions
    assert (decision, isinstance(decision, Wait) and decision.first) == (Wait(1, Reason.IN_USE), True)


def beside_b(*busy: BusyInstance, others: tuple[TicketView, ...] = (), head_for_s: float | None = None) -> View:
    """The first waiter needs 800 of 900 MB, where B has 300; C takes 50 and is being loaded, or others wait for it."""
    return view(
        [model(A, 800), model(B, shared=1), model(C, 50)],
        [ticket(1, A, head_for=head_for_s), *others],
        busy=busy,
        devices=[device(used=300 + 50 * any(one.model == C for one in busy))],
    )


LOADING_B = BusyInstance(5, B, 0, 300, 1.0, loading=True)
LOADING_C = BusyInstance(6, C, 0, 50, 9.0, loading=True)


def test_it_does_not_begin_when_a_small_load_goes_on_beside_it() -> None:
    wait, load = make_plan(beside_b(LOADING_B, others=(ticket(2, C),))).decisions
    assert isinstance(load, Load)
    # As before, only the end of B's load makes room.
    assert isinstance(wait, Wait)
    assert not wait.first


def test_a_small_load_does_not_hold_it_up() -> None:
    both_loading = beside_b(LOADING_B, LOADING_C)
    in_use_again = beside_b(in_use(5, B, 300, 1.0), LOADING_C)
    # Idle, and taken by another waiter in the same plan.
    reused = view(
        [model(A, 800), held_for_long(model(B, shared=1)), model(C, 50)],
        [ticket(1, A), ticket(2, B)],
        copies=[idle(5, B, mb=300)],
        devices=[device(used=350)],
        busy=(LOADING_C,),
    )
    for state, begins in ((both_loading, False), (in_use_again, True), (reused, True)):
        wait, *granted = make_plan(state).decisions
        assert granted == ([Grant(2, 5)] if state is reused else [])
        assert isinstance(wait, Wait)
        assert wait.first is begins


@pytest.mark.parametrize(("head_for_s", "goes_on"), [(None, True), (3.9, True), (4.0, False)])
@pytest.mark.parametrize("suspended", [True, False], ids=["resume", "load"])
def test_once_overtaking_is_over_no_small_load_goes_on(
    head_for_s: float | None, goes_on: bool, suspended: bool
) -> None:
    kept = (SuspendedInstance(9, C, 0, 50.0, since_s=1.0, resume_s=0.1),) if suspended else ()
    state = beside_b(in_use(5, B, 300, 1.0), others=(ticket(2, C),), head_for_s=head_for_s)
    _, *others = make_plan(replace(state, suspended=kept)).decisions
    expected = Resume(2, 9) if suspended else Load(2, (0,), 50, alone=False)
    assert others == ([expected] if goes_on else [])


@pytest.mark.parametrize("restricted", [True, False])
def test_where_the_head_of_the_line_may_not_load_nothing_delays_it(restricted: bool) -> None:
    state = beside_b(in_use(5, B, 300, 1.0))
    head = replace(ticket(1, A, head_for=9.0), loadable_on=(0,) if restricted else ())
    devices = (*state.devices, device(1, used=850))
    _, *others = make_plan(replace(state, tickets=(head, ticket(2, C)), devices=devices)).decisions
    assert others == ([Load(2, (1,), 50, alone=False)] if restricted else [])


def test_after_it_only_what_is_not_to_make_room() -> None:
    # Wanted costs make the choice plain: C goes, and B, which is small and wanted, is none of it.
    state = blocked_by_c(2.0, ticket(2, C), ticket(3, B))
    costs = {B: wanted(B, 10, rate=50.0), C: replace(wanted(C, 400, rate=0.1), shared=2, waiting=1)}
    decisions = make_plan(replace(state, models={**state.models, **costs})).decisions
    assert decisions == (Evict(1, (9,)), Grant(3, 7))


def test_after_twice_the_bound_nothing_at_all() -> None:
    decisions = make_plan(blocked_by_c(4.0, ticket(2, C), ticket(3, B))).decisions
    assert not any(isinstance(decision, Grant) for decision in decisions)


def test_nothing_passes_a_model_that_has_to_run_alone() -> None:
    state = view(
        [model(A, known=False), held_for_long(model(B, shared=1))],
        [ticket(1, A, priority=0), ticket(2, B)],
        copies=[idle(7, B)],
        in_use=1,
    )
    assert make_plan(state).decisions == (Wait(1, Reason.DRAINING),)


@pytest.mark.parametrize(("need_mb", "loads"), [(50.0, True), (150.0, False)])
def test_a_small_load_goes_on_if_it_leaves_the_room_of_the_blocked_one(need_mb: float, loads: bool) -> None:
    # Of 900 MB 600 are free and 300 will be: A takes 800 of them.
    state = view(
        [model(A, 800), model(B, shared=1), model(C, need_mb)],
        [ticket(1, A), ticket(2, C)],
        devices=[device(used=300)],
        busy=(in_use(5, B, 300, 1.0),),
    )
    expected = (Load(2, (0,), need_mb, alone=False),) if loads else ()
    assert make_plan(state).decisions == (Wait(1, Reason.IN_USE), *expected)


@pytest.mark.parametrize("most", [1, 2])
def test_a_small_load_does_not_go_on_where_there_are_as_many_copies_as_there_may_be(most: int) -> None:
    # Another process has loaded the copy of C as an object of its own.
    state = view(
        [model(A, 800), model(B, shared=1), model(C, 50, owned={OTHER: 1})],
        [ticket(1, A), ticket(2, C)],
        devices=[device(used=350)],
        busy=(in_use(5, B, 300, 1.0), replace(in_use(6, C, 50, 1.0), owner=OTHER)),
        rules=at_most(most),
    )
    expected = (Load(2, (0,), 50, alone=False),) if most == 2 else ()
    assert make_plan(state).decisions == (Wait(1, Reason.IN_USE), *expected)


def behind_a_head_on_the_first_device(models: list[ModelView], *behind: TicketView, **state: Any) -> View:
    """The first device is in use by C, the second one is empty; the head waits to load A on the first one."""
    head = usable_on(ticket(1, A), 0)
    users = (in_use(5, C, 900, 1.0), *state.pop("busy", ()))
    devices = [device(0, used=900), device(1)]
    return view([model(A, 800), *models, model(C, shared=1)], [head, *behind], devices=devices, busy=users, **state)


def test_copies_that_a_waiter_cannot_use_do_not_have_it_wait_behind_the_head() -> None:
    there = model(B, 50, shared=1)
    for on, decision in ((1, Load(2, (1,), 50, alone=False)), (0, None)):
        behind = usable_on(ticket(2, B), on)
        state = behind_a_head_on_the_first_device([there], behind, busy=(in_use(6, B, 50, 1.0),))
        assert make_plan(state).decisions[1:] == ((decision,) if decision else ())
    own = behind_a_head_on_the_first_device(
        [replace(there, shared=0, owned={ME: 1})],
        usable_on(ticket(2, B), 1),
        busy=(replace(in_use(6, B, 50, 1.0), owner=ME),),
    )
    assert make_plan(own).decisions[1:] == (Load(2, (1,), 50, alone=False),)


@pytest.mark.parametrize("behind", [ticket(2, B), ticket(2, B, priority=2, preload=1), usable_on(ticket(2, B), 0)])
def test_a_load_that_never_fits_is_refused_behind_the_head_too(behind: TicketView) -> None:
    state = behind_a_head_on_the_first_device([model(B, 5000)], behind)
    assert make_plan(state).decisions[1:] == (Refuse(2),)


@pytest.mark.parametrize(
    "there",
    [{"shared": 1}, {"owned": {ME: 1}}, {"loading": {ME: 1}}, {"suspending": 1}],
)
def test_a_waiter_behind_the_head_is_not_refused_if_there_is_a_copy_to_wait_for(there: dict[str, Any]) -> None:
    state = behind_a_head_on_the_first_device([replace(model(B, 5000), **there)], ticket(2, B))
    assert len(make_plan(state).decisions) == 1
    suspended = (SuspendedInstance(7, B, 0, 500.0, since_s=1.0),)
    resumes = replace(behind_a_head_on_the_first_device([model(B, 5000)], ticket(2, B)), suspended=suspended)
    assert len(make_plan(resumes).decisions) == 1


def test_behind_one_that_waits_for_the_first_device_to_be_known_no_load_is_refused() -> None:
    state = view([model(A), model(B, 5000)], [ticket(1, A), ticket(2, B)], devices=[])
    assert make_plan(state).decisions == (Wait(1, Reason.NO_DEVICE),)


@pytest.mark.parametrize(
    "other",
    [usable_on(ticket(2, B), 0), replace(ticket(2, B), loadable_on=(0,)), replace(ticket(2, B), span=2)],
)
def test_a_waiter_that_fits_nowhere_behind_the_head_says_nothing_of_other_requests(other: TicketView) -> None:
    state = behind_a_head_on_the_first_device([model(B, 200)], other, ticket(3, B))
    assert make_plan(state).decisions[1:] == (Load(3, (1,), 200, alone=False),)


@pytest.mark.parametrize(
    ("loadable_on", "head_for", "goes_on"),
    [
        *(((), 3.9, True), ((), 4.0, False), ((0,), 3.9, True), ((0,), 4.0, False)),
        *(((1,), 4.0, True), ((0, 1), 4.0, False)),
    ],
)
def test_once_overtaking_is_over_a_small_load_goes_on_only_where_the_head_may_not_load(
    loadable_on: tuple[int, ...], head_for: float, goes_on: bool
) -> None:
    head = replace(ticket(1, A, head_for=head_for), loadable_on=loadable_on)
    users = (in_use(5, C, 850, 1.0), replace(in_use(6, C, 900, 1.0), device=1))
    devices = [device(0, used=850), device(1, used=900)]
    state = view([model(A, 800), model(B, 50), model(C, shared=2)], [head, ticket(2, B)], devices=devices, busy=users)
    expected = (Load(2, (0,), 50, alone=False),) if goes_on else ()
    assert make_plan(state).decisions == (Wait(1, Reason.IN_USE), *expected)


@pytest.mark.parametrize(
    ("loadable_on", "used", "goes_on"), [((), 850.0, False), ((0,), 900.0, False), ((0,), 850.0, True)]
)
def test_while_it_is_unknown_how_to_make_room_a_small_load_goes_on_only_where_the_head_may_not_load(
    loadable_on: tuple[int, ...], used: float, goes_on: bool
) -> None:
    head, devices = replace(ticket(1, A), loadable_on=loadable_on), [device(0, used=850), device(1, used=used)]
    state = view([model(A, 800), model(B, 50)], [head, ticket(2, B)], devices=devices, in_use=1)
    expected = (Load(2, (1,), 50, alone=False),) if goes_on else ()
    assert make_plan(state).decisions == (Wait(1, Reason.MEMORY), *expected)


def test_of_two_who_wait_for_one_model_one_loads_and_the_other_shares() -> None:
    handle = replace(model(A, 100), shares=True, load_s=2.0, hold_s=0.1)
    state = view([handle], [ticket(1, A), ticket(2, A, member=OTHER)])
    assert make_plan(state).decisions == (Load(1, (0,), 100.0, alone=False), Wait(2, Reason.SHARING))


# ---- which load is first -----------------------------------------------------------------------------------

Fields = Mapping[str, Any]
NONE: Fields = MappingProxyType({})
TWO = [device(0), device(1, total=500.0)]


def two_for_b(
    head: TicketView,
    b_mb: float = 800.0,
    waiting: int = 2,
    *,
    a: Fields = NONE,
    b: Fields = NONE,
    rivals: Fields = NONE,
    **more: Any,
) -> tuple[object, ...]:
    """One waits for A, which needs 800 of 900 MB, and behind it some wait for B.

    a, b, rivals: fields of these models, and of those that wait for B.
    """
    behind = [replace(ticket(row, B), **rivals) for row in range(2, 2 + waiting)]
    models = [replace(model(A, 800), **a), replace(model(B, b_mb), **b)]
    return make_plan(view(models, [head, *behind], **more)).decisions


def test_a_model_that_more_wait_for_is_loaded_before_that_of_the_first_waiter() -> None:
    wait, load = two_for_b(ticket(1, A))
    assert (wait, load) == (Wait(1, Reason.MEMORY), Load(2, (0,), 800, False))
    assert isinstance(wait, Wait)
    assert wait.passed
    assert not wait.first, "its time begins when that load has ended"


FIRST = ticket(1, A)


@pytest.mark.parametrize(
    ("head", "more"),
    [
        pytest.param(replace(FIRST, passed=True), {}, id="only once"),
        pytest.param(ticket(1, A, head_for=2.0), {}, id="not when its time is up"),
        pytest.param(FIRST, {"waiting": 1}, id="not for as many"),
        pytest.param(FIRST, {"b_mb": 900.5}, id="not where it does not fit"),
        pytest.param(replace(FIRST, loadable_on=(0,)), {}, id="not past one that may not go anywhere"),
        pytest.param(ticket(1, A, priority=0), {}, id="not past one of the highest priority"),
        pytest.param(FIRST, {"a": {"owned": {OTHER: 1}}}, id="not past one that has a copy"),
        pytest.param(FIRST, {"a": {"lease": True}}, id="not past a lease"),
        pytest.param(FIRST, {"b": {"owned": {OTHER: 1}}}, id="not if it has a copy"),
        pytest.param(FIRST, {"b": {"lease": True}}, id="not if it is a lease"),
        pytest.param(FIRST, {"b": {"known": False}}, id="not if it has to run alone"),
        *(
            pytest.param(FIRST, {"rivals": wishes}, id=f"not with wishes like {wishes}")
            for wishes in (
                {"steady": True},
                {"preload": 1},
                {"loadable_on": (0,)},
                {"usable_on": (0,)},
                {"priority": 2},
            )
        ),
        pytest.param(FIRST, {"rivals": {"span": 2}, "devices": TWO}, id="not on two devices"),
    ],
)
def test_but_that_has_limits(head: TicketView, more: dict[str, Any]) -> None:
    assert two_for_b(head, **more)[0] == Load(1, (0,), 800, False)


def test_where_both_fit_neither_is_passed() -> None:
    decisions = two_for_b(ticket(1, A), devices=[device(total=4000)])
    assert decisions == (Load(1, (0,), 800, False), Load(2, (0,), 800, False), Wait(3, Reason.SHARING))


def test_a_waiter_that_was_passed_and_has_others_evicted_is_passed_no_more() -> None:
    models = [model(A, 800), model(B, 100), model(C, shared=1)]
    waiters = [ticket(1, A), ticket(2, B), ticket(3, B)]
    state = view(models, waiters, copies=[idle(7, C, mb=50)], devices=[device(used=50)])
    evict, load = make_plan(state).decisions
    assert (evict, load) == (Evict(1, (7,)), Load(2, (0,), 100, False))
    assert isinstance(evict, Evict)
    assert evict.passed
