"""Suspended instances as the policy sees them: when it pays, what it makes room for, what is dropped."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from mpmm.policy.plan import make_plan
from mpmm.policy.suspension import (
    LEAST_SAVED_SHARE,
    HostRoom,
    Kept,
    Movable,
    Way,
    limit_s,
    pays,
    resume_s,
    saved_share,
    suspend_s,
)
from mpmm.policy.view import (
    BusyInstance,
    DeviceView,
    Evict,
    IdleInstance,
    Load,
    ModelView,
    Reason,
    Resume,
    Rules,
    Satisfied,
    SuspendedInstance,
    TicketView,
    View,
    Wait,
)

COPY = Movable(mb=8000.0, way=Way.COOPERATIVE, load_s=10.0, suspend_s=0.0, resume_s=0.0, rate=1.0)


ENOUGH = LEAST_SAVED_SHARE


@pytest.mark.parametrize(
    ("copy", "expected"),
    [
        (COPY, True),
        (replace(COPY, way=Way.NONE), False),
        # By the estimate it takes 2.1 s, and need only be quicker than a load.
        (replace(COPY, load_s=2.2), True),
        (replace(COPY, load_s=2.0), False),
        (replace(COPY, load_s=2.2, suspend_s=0.5), True),
        (replace(COPY, load_s=1.6, suspend_s=0.5, resume_s=0.5), True),
        (replace(COPY, load_s=1.4, suspend_s=0.5, resume_s=0.5), False),
        (replace(COPY, suspend_s=5.0, resume_s=2.0), False),
        (replace(COPY, way=Way.CHECKPOINT), True),
        (replace(COPY, way=Way.CHECKPOINT, load_s=5.0), False),
        (replace(COPY, load_s=0.0), False),
    ],
)
def test_a_suspension_pays_where_both_directions_take_less_than_two_thirds_of_a_load(
    copy: Movable, expected: bool
) -> None:
    assert pays(copy, ENOUGH) is expected


@pytest.mark.parametrize(
    ("copy", "expected"),
    [
        (replace(COPY, load_s=4.2, suspend_s=0.5, resume_s=0.5), True),
        (replace(COPY, load_s=3.8, suspend_s=0.5, resume_s=0.5), False),
        (replace(COPY, load_s=8.8), True),
        (replace(COPY, load_s=8.2), False),
        (replace(COPY, way=Way.NONE), False),
    ],
)
def test_where_little_is_to_be_saved_in_all_it_pays_only_where_it_is_clear(copy: Movable, expected: bool) -> None:
    assert pays(copy, ENOUGH - 0.01) is expected


def test_what_is_saved_of_all_loads_counts_memory_and_time() -> None:
    half = replace(COPY, mb=1000.0, suspend_s=3.0, resume_s=2.0)
    none = replace(COPY, mb=3000.0, suspend_s=6.0, resume_s=2.0)
    assert saved_share([half]) == pytest.approx(0.5)
    assert saved_share([none]) == 0.0, "it takes less time, but not by enough"
    assert saved_share([half, none]) == pytest.approx(0.5 * 1000 / 4000)
    # 10 MB s of loads against 30: of the second model nothing is saved.
    assert saved_share([half, replace(none, mb=1000.0, load_s=30.0, suspend_s=30.0)]) == pytest.approx(0.5 / 4)


def test_a_model_that_was_never_suspended_may_save_twice_what_is_estimated() -> None:
    quick, slow = replace(COPY, load_s=2.8), replace(COPY, load_s=20.0)
    assert saved_share([quick]) == pytest.approx(2 * (2.8 - 2.1) / 2.8)
    assert saved_share([replace(quick, suspend_s=1.05)]) == saved_share([quick]), "it has not been resumed yet"
    assert saved_share([slow]) == 1.0, "but not more than all"
    assert saved_share([replace(COPY, load_s=2.0)]) == 0.0


def test_a_model_that_was_never_loaded_is_expected_to_load_as_the_others_do() -> None:
    known = [replace(COPY, load_s=load_s, suspend_s=3.0, resume_s=2.0) for load_s in (8.0, 12.0)]
    new = replace(known[0], load_s=0.0)
    assert saved_share([*known, new]) == pytest.approx(15 / 30)
    assert saved_share([new]) == 0.0
    assert saved_share([]) == 0.0
    assert saved_share([replace(COPY, mb=0.0)]) == 0.0


def test_what_has_been_measured_of_a_model_counts_for_more_than_its_size() -> None:
    assert suspend_s(COPY) > 1.0 and resume_s(COPY) > 1.0
    measured = replace(COPY, suspend_s=0.2, resume_s=0.1)
    assert (suspend_s(measured), resume_s(measured)) == (0.2, 0.1)


def test_a_limit_grows_with_the_size_and_is_never_short() -> None:
    assert limit_s(1.0) == 10.0
    assert limit_s(32000.0) > 5 * 15.8


def test_copies_that_are_worth_less_make_way_in_the_host_and_others_do_not() -> None:
    low, high = Kept(1, 500.0, 2.0, worth=1.0), Kept(2, 500.0, 1.0, worth=9.0)
    assert HostRoom([low, high], 400.0, 1000.0).dropped_for(300.0, 5.0) == []
    assert HostRoom([low, high], 0.0, 1000.0).dropped_for(500.0, 5.0) == [1]
    assert HostRoom([low, high], 0.0, 1000.0).dropped_for(1000.0, 5.0) is None
    assert HostRoom([low, high], 0.0, 1000.0).dropped_for(1000.0, math.inf) == [1, 2]
    assert HostRoom([low, high], 0.0, 1000.0).dropped_for(1001.0, math.inf) is None
    assert HostRoom([replace(low, pinned=True), high], 0.0, 1000.0).dropped_for(500.0, 5.0) is None


def test_where_worth_is_not_known_the_copy_that_was_suspended_first_makes_way() -> None:
    early, late = Kept(1, 500.0, 1.0, worth=9.0), Kept(2, 500.0, 2.0, worth=None)
    assert HostRoom([late, early], 0.0, 1000.0).dropped_for(500.0, 1.0) == [1]
    assert HostRoom([replace(early, worth=None), late], 0.0, 1000.0).dropped_for(500.0, None) == [1]


def test_a_copy_that_is_in_the_host_already_counts_for_more_than_one_that_is_still_to_be_suspended() -> None:
    copy = replace(COPY, suspend_s=4.0, resume_s=1.0, rate=0.5)
    assert copy.worth == pytest.approx(0.5 * 9.0)
    assert copy.worth_suspending == pytest.approx(0.5 * 5.0)
    assert replace(copy, suspend_s=12.0).worth_suspending == 0.0
    assert replace(copy, rate=0.0).worth_suspending is None
    # Models that are asked for as often do not drop one another in turn.
    there = HostRoom([Kept(1, 500.0, 1.0, copy.worth)], 0.0, 500.0)
    assert there.dropped_for(500.0, copy.worth_suspending) is None
    assert there.dropped_for(500.0, replace(copy, rate=1.0).worth_suspending) == [1]


def test_a_copy_is_worth_the_time_of_the_loads_that_it_saves_its_users() -> None:
    known = replace(COPY, resume_s=1.0, rate=0.5)
    assert known.worth == pytest.approx(0.5 * 9.0)
    assert replace(known, load_s=0.8).worth == 0.0, "a load is quicker"
    # Its worth is unknown, not 0. So neither it nor another one next to it is dropped for being worth nothing.
    for unknown in (replace(known, rate=0.0), replace(known, load_s=0.0)):
        early, late = Kept(1, 500.0, 1.0, worth=9.0), Kept(2, 500.0, 2.0, worth=unknown.worth)
        assert HostRoom([early, late], 0.0, 1000.0).dropped_for(500.0, 5.0) == [1]
        assert HostRoom([early], 0.0, 1000.0).dropped_for(500.0, unknown.worth) == [1]


RULES = Rules(0.0, 10.0, 1, 2.0, isolate_unknown=False)


def view(free_mb: float, *, suspending: int = 0, idle: tuple[IdleInstance, ...] = (), **tickets: Any) -> View:
    """Return a view of a device of 1000 MB and of model 0, which needs 400 MB and of which a copy is suspended."""
    model = ModelView(0, True, 400.0, 0, {}, 1, load_s=10.0, suspending=suspending, resume_s=0.5)
    other = ModelView(1, True, 600.0, len(idle), {}, 0, load_s=10.0, hold_s=1.0, rate=0.1)
    suspended = () if suspending else (SuspendedInstance(7, 0, 0, 400.0, since_s=1.0, resume_s=0.5),)
    device = DeviceView(0, 1000.0, 1000.0 - free_mb, 0.0, 0.0, 0.0)
    ticket = TicketView(3, 1, 1, 0, 1, 99.0, **tickets)
    return View(100.0, RULES, {0: model, 1: other}, idle, (ticket,), (device,), suspended=suspended)


def test_a_suspended_copy_comes_before_a_load() -> None:
    (decision,) = make_plan(view(1000.0)).decisions
    assert decision == Resume(3, 7)
    assert isinstance(decision, Resume) and decision.why.reason == Reason.RESUMES and decision.why.seconds == 0.5


def resuming(*suspended: SuspendedInstance, free_mb: tuple[float, ...], **state: Any) -> View:
    """Return a view of devices of 1000 MB and of a waiter that wants a copy of model 0 resumed; it has one already."""
    model = ModelView(0, True, 400.0, 1, {}, 1, load_s=10.0, resume_s=0.5)
    devices = tuple(DeviceView(row, 1000.0, 1000.0 - mb, 0.0, 0.0, 0.0) for row, mb in enumerate(free_mb))
    ticket = TicketView(3, 1, 2, 0, 1, 99.0, preload=1, resumes=True)
    state = {"devices": devices, "suspended": suspended, **state}
    return View(100.0, RULES, {0: model}, (), (ticket,), **state)


FIRST, SECOND = SuspendedInstance(7, 0, 0, 400.0, since_s=2.0), SuspendedInstance(8, 0, 1, 400.0, since_s=1.0)


def test_what_is_to_be_resumed_is_the_copy_that_has_room() -> None:
    assert make_plan(resuming(FIRST, SECOND, free_mb=(1000.0, 1000.0))).decisions == (Resume(3, 7),)
    assert make_plan(resuming(FIRST, SECOND, free_mb=(0.0, 1000.0))).decisions == (Resume(3, 8),)
    leased = DeviceView(0, 1000.0, 900.0, 0.0, 0.0, 0.0, leased_mb=900.0)
    (decision,) = make_plan(resuming(FIRST, free_mb=(), devices=(leased, replace(leased, device=1)))).decisions
    assert isinstance(decision, Wait) and decision.reason == Reason.LEASED
    open_device = DeviceView(1, 1000.0, 0.0, 0.0, 0.0, 0.0)
    (decision,) = make_plan(resuming(FIRST, free_mb=(), devices=(leased, open_device))).decisions
    assert isinstance(decision, Wait), "no other copy is loaded where there is room"


def test_where_nothing_is_left_to_be_resumed_the_waiter_has_enough() -> None:
    assert make_plan(resuming(free_mb=(1000.0,))).decisions == (Satisfied(3),)
    assert make_plan(resuming(replace(FIRST, owner=2), free_mb=(1000.0,))).decisions == (Satisfied(3),)
    at_most_one = replace(RULES, max_model_copies=1)
    assert make_plan(replace(resuming(FIRST, free_mb=(1000.0,)), rules=at_most_one)).decisions == (Satisfied(3),)
    beside = replace(resuming(replace(FIRST, mb=700.0), free_mb=(300.0,)), idle=(IdleInstance(9, 0, 0, 700.0, 50.0),))
    assert make_plan(beside).decisions == (Satisfied(3),), "it would not fit beside the one that the waiter has"


def test_what_is_to_be_resumed_waits_for_a_device_that_something_has_to_itself() -> None:
    alone = DeviceView(0, 1000.0, 0.0, 0.0, 0.0, 0.0, isolated=True)
    plan = make_plan(resuming(FIRST, free_mb=(), devices=(alone, replace(alone, device=1, isolated=False))))
    assert plan.decisions == ()


def test_behind_the_head_of_the_line_a_copy_is_resumed_and_none_loaded() -> None:
    """The head waits for 900 MB of the first device, so the second one is open to others."""
    state = resuming(SECOND, free_mb=(0.0, 1000.0))
    needs = ModelView(1, True, 900.0, 0, {}, 1)
    head = TicketView(4, 0, 1, 1, 1, 98.0, loadable_on=(0,), usable_on=(0,))
    used = BusyInstance(9, 2, 0, 1000.0, 5.0)
    held = ModelView(2, True, 1000.0, 1, {}, 0, load_s=10.0, hold_s=10.0)
    models = {**state.models, 1: needs, 2: held}
    beside = replace(state, tickets=(head, *state.tickets), models=models, busy=(used,))
    assert [one for one in make_plan(beside).decisions if one.ticket == 3] == [Resume(3, 8)]
    nothing_left = replace(beside, suspended=())
    assert [one for one in make_plan(nothing_left).decisions if one.ticket == 3] == [Satisfied(3)]


def test_room_is_made_for_a_suspended_copy_as_for_a_load() -> None:
    idle = (IdleInstance(4, 1, 0, 600.0, 50.0),)
    (decision,) = make_plan(view(100.0, idle=idle)).decisions
    assert isinstance(decision, Evict) and decision.instances == (4,)


def beside_a_holder(in_use: bool = True, other_mb: float = 1000.0, **ticket: Any) -> View:
    """Return a view of two devices, and of a model with a suspended copy on the first, which another model fills."""
    first, second = DeviceView(0, 1000.0, 900.0, 0.0, 0.0, 0.0), DeviceView(1, 1000.0, 1000.0 - other_mb, 0.0, 0.0, 0.0)
    there = view(1000.0, **ticket)
    held = BusyInstance(9, 1, 0, 900.0, 5.0)
    idle = IdleInstance(9, 1, 0, 900.0, 50.0)
    models = {0: there.models[0], 1: replace(there.models[1], shared=1)}
    rules = replace(RULES, max_model_copies=1)
    state = replace(there, devices=(first, second), models=models, rules=rules)
    return replace(state, busy=(held,)) if in_use else replace(state, idle=(idle,))


@pytest.mark.parametrize("ticket", [{}, {"preload": 1}])
def test_where_the_room_of_a_suspended_copy_is_in_use_another_one_is_loaded_on_another_device(
    ticket: dict[str, Any],
) -> None:
    assert make_plan(beside_a_holder(**ticket)).decisions == (Load(3, (1,), 400.0, alone=False),)
    for state in (beside_a_holder(other_mb=300.0, **ticket), beside_a_holder(loadable_on=(0,), **ticket)):
        (decision,) = make_plan(state).decisions
        assert isinstance(decision, Wait) and decision.reason == Reason.IN_USE
    (decision,) = make_plan(beside_a_holder(in_use=False, **ticket)).decisions
    assert isinstance(decision, Evict), "a resume is quicker than a load"


def test_so_it_is_behind_the_head_of_the_line() -> None:
    state = beside_a_holder()
    head = TicketView(4, 0, 1, 2, 1, 98.0, loadable_on=(0,), usable_on=(0,))
    models = {**state.models, 2: ModelView(2, True, 900.0, 0, {}, 1)}
    waits, loads = make_plan(replace(state, tickets=(head, *state.tickets), models=models)).decisions
    assert isinstance(waits, Wait) and waits.first
    assert loads == Load(3, (1,), 400.0, alone=False)


@pytest.mark.parametrize("kept", [1, 2])
def test_of_two_models_the_one_whose_copy_would_be_suspended_makes_room(kept: int) -> None:
    idle = tuple(IdleInstance(3 + model, model, 0, 450.0, 50.0, suspendable=model == kept) for model in (1, 2))
    there = view(100.0, idle=idle)
    models = {0: there.models[0], **{model: replace(there.models[1], model=model, shared=1) for model in (1, 2)}}
    (decision,) = make_plan(replace(there, models=models)).decisions
    assert isinstance(decision, Evict) and decision.instances == (3 + kept,)


def test_a_copy_that_is_being_suspended_is_waited_for() -> None:
    (decision,) = make_plan(view(1000.0, suspending=1)).decisions
    assert isinstance(decision, Wait) and decision.reason == Reason.SUSPENDING


def test_whoever_shares_a_resume_is_told_how_long_that_takes() -> None:
    there = view(1000.0, suspending=1)
    model = replace(there.models[0], suspending=0, loading={1: 1}, shares=True, hold_s=0.1, loading_for_s=0.2)
    for coming_s, expected_s in ((0.5, 0.1 + 0.3), (0.0, 0.1 + 9.8)):
        coming = replace(there, models={0: replace(model, coming_s=coming_s)})
        (decision,) = make_plan(coming).decisions
        assert isinstance(decision, Wait) and decision.reason == Reason.SHARING
        assert decision.why.seconds == pytest.approx(expected_s)


def full_view(suspendable: bool = True, host_free_mb: float = 1000.0, *, leaving: tuple[int, ...] = ()) -> View:
    """Return a view of a full device: models 2 and 3 are idle, or `leaving`, for 0 and 1, for which requests wait."""
    models = {
        row: ModelView(row, True, 500.0, int(row > 1), {}, int(row < 2), load_s=10.0, rate=0.1) for row in range(4)
    }
    idle = tuple(
        IdleInstance(10 + model, model, 0, 500.0, 50.0 + model, suspendable=suspendable)
        for model in (2, 3)
        if model not in leaving
    )
    for model in leaving:
        models[model] = replace(models[model], shared=0, suspending=1)
    device = DeviceView(
        0, 1000.0, 1000.0, 0.0, 500.0 * len(leaving), 0.0, unloading=len(leaving), suspending=len(leaving)
    )
    tickets = tuple(TicketView(20 + model, 1 + model, 1, model, 1, 99.0) for model in (0, 1))
    return View(100.0, RULES, models, idle, tickets, (device,), host_free_mb=host_free_mb)


def test_copies_are_suspended_for_several_waiters_at_a_time() -> None:
    assert make_plan(full_view()).decisions == (Evict(20, (12,)), Evict(21, (13,)))
    evictions = [one for one in make_plan(full_view()).decisions if isinstance(one, Evict)]
    assert [one.first for one in evictions] == [True, False]
    assert [one.why.reason for one in evictions] == [Reason.CHEAPEST_RELOAD] * 2
    # Of the idle models it is not known how long a load takes.
    unknown = {row: replace(one, load_s=0.0 if row > 1 else one.load_s) for row, one in full_view().models.items()}
    evictions = [one for one in make_plan(replace(full_view(), models=unknown)).decisions if isinstance(one, Evict)]
    assert [one.why.reason for one in evictions] == [Reason.LOWEST_SCORE] * 2


def test_a_waiter_whose_room_is_on_its_way_evicts_nothing_more() -> None:
    first, second = make_plan(full_view(leaving=(2,))).decisions
    assert isinstance(first, Wait) and first.first and second == Evict(21, (13,))
    first, second = make_plan(full_view(leaving=(2, 3))).decisions
    assert isinstance(first, Wait) and isinstance(second, Wait)
    assert second.reason == Reason.UNLOADING and first.first and not second.first


def test_room_that_is_made_for_the_first_two_is_left_to_them_by_a_third() -> None:
    there = full_view(leaving=(2, 3))
    models = {**there.models, 4: ModelView(4, True, 100.0, 0, {}, 1, load_s=10.0, rate=0.1)}
    third = TicketView(24, 5, 1, 4, 1, 99.0)
    # 100 MB are free already, all of which the first two need.
    device = replace(there.devices[0], used_mb=900.0, unloading_mb=900.0)
    there = replace(there, models=models, tickets=(*there.tickets, third), devices=(device,))
    assert not any(isinstance(one, Load) for one in make_plan(there).decisions)


def test_nothing_is_evicted_past_a_waiter_that_may_not_be_overtaken_any_more() -> None:
    there = full_view()
    first, second = there.tickets
    late = replace(there, tickets=(replace(first, head_since_s=90.0), second))
    assert make_plan(late).decisions == (Evict(20, (12,)),)


def test_no_room_is_promised_behind_one_that_also_waits_for_copies_in_use() -> None:
    there = full_view(host_free_mb=1e5)
    models = {**there.models, 4: ModelView(4, True, 500.0, 1, {}, 0, load_s=10.0, rate=0.1)}
    models[0], models[1] = replace(models[0], need_mb=1200.0), replace(models[1], need_mb=200.0)
    first, second = there.tickets
    late = replace(first, head_since_s=there.now_s - RULES.max_overtake_seconds)
    device = replace(there.devices[0], total_mb=1500.0, used_mb=1500.0)
    busy = BusyInstance(14, 4, 0, 500.0, 1.0)
    there = replace(there, models=models, tickets=(late, second), devices=(device,), busy=(busy,))
    decisions = make_plan(there).decisions
    assert decisions == (Evict(20, (12, 13)),)


@pytest.mark.parametrize("suspending", [(1, 0), (0, 1), (1, 1), (0, 0)])
def test_room_is_made_ahead_while_anything_is_suspended_for_the_first(suspending: tuple[int, int]) -> None:
    there = full_view()
    devices = tuple(
        replace(there.devices[0], device=row, unloading_mb=500.0, unloading=1, suspending=count)
        for row, count in enumerate(suspending)
    )
    first, second = there.tickets
    models = {**there.models, 0: replace(there.models[0], need_mb=1000.0)}
    wide = replace(there, models=models, idle=there.idle[1:], tickets=(replace(first, span=2), second), devices=devices)
    head, *others = make_plan(wide).decisions
    assert isinstance(head, Wait) and head.reason == Reason.UNLOADING
    assert others == ([Evict(21, (13,))] if any(suspending) else [])


def test_copies_that_would_be_unloaded_wait_for_their_turn() -> None:
    (decision,) = make_plan(full_view(suspendable=False)).decisions
    assert isinstance(decision, Evict) and decision.ticket == 20


def test_where_the_host_could_not_take_all_copies_one_waiter_is_served_after_the_other() -> None:
    (decision,) = make_plan(full_view(host_free_mb=999.0)).decisions
    assert isinstance(decision, Evict) and decision.ticket == 20


@pytest.mark.parametrize(
    ("model", "ticket"),
    [
        ({}, {"steady": True}),
        ({}, {"preload": 1}),
        ({"lease": True}, {}),
        ({"failures": 1, "failed_ago_s": 0.9}, {}),
        ({"known": False}, {}),
        ({"shared": 1}, {}),
        ({"owned": {1: 1}}, {}),
        ({"owned": {9: 1}}, {}),
        ({"loading": {1: 1}}, {}),
        ({"suspending": 1}, {}),
        ({"leaving": 3}, {}),
    ],
    ids=str,
)
def test_room_ahead_is_made_only_for_one_that_loads_next(model: dict[str, Any], ticket: dict[str, Any]) -> None:
    there = replace(full_view(), rules=replace(RULES, isolate_unknown=True, max_model_copies=3))
    assert make_plan(there).decisions == (Evict(20, (12,)), Evict(21, (13,)))
    models = {**there.models, 1: replace(there.models[1], **model)}
    first, second = there.tickets
    changed = make_plan(replace(there, models=models, tickets=(first, replace(second, **ticket)))).decisions
    evicts = Evict(21, (13,)) in changed
    # A copy that only another process can use prevents no load.
    assert evicts == ("owned" in model and 9 in model["owned"])


@pytest.mark.parametrize("is_suspended", [True, False])
def test_where_one_of_the_copies_would_be_unloaded_one_waiter_is_served_after_the_other(is_suspended: bool) -> None:
    there = full_view()
    first, second = there.idle
    parts = (replace(second, mb=250.0), replace(second, row=14, mb=250.0, suspendable=is_suspended))
    models = {**there.models, 3: replace(there.models[3], shared=2)}
    (_, *others) = make_plan(replace(there, idle=(first, *parts), models=models)).decisions
    assert others == ([Evict(21, (13, 14))] if is_suspended else [])


def test_a_suspended_copy_of_another_owner_or_device_is_of_no_use() -> None:
    there = view(1000.0)
    owned = replace(there, suspended=(replace(there.suspended[0], owner=2),))
    assert isinstance(make_plan(owned).decisions[0], Load)
    elsewhere = view(1000.0, usable_on=(1,), loadable_on=(1,))
    elsewhere = replace(elsewhere, devices=(*there.devices, replace(there.devices[0], device=1)))
    assert isinstance(make_plan(elsewhere).decisions[0], Load)


def test_a_preload_takes_a_suspended_copy_too() -> None:
    assert make_plan(view(1000.0, preload=1)).decisions == (Resume(3, 7),)
