"""The policy: properties of the plans of random states."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from harness import scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import RULES, A, B, device, idle, model, ticket, view

from mpmm.policy.admission import free_mb, limit_mb
from mpmm.policy.eviction import Candidate, cheapest_set
from mpmm.policy.fairness import may_be_leased_before
from mpmm.policy.placement import best_place
from mpmm.policy.plan import Plan, make_plan
from mpmm.policy.view import (
    Decision,
    DeviceView,
    Evict,
    Grant,
    Load,
    ModelView,
    Reason,
    Refuse,
    Rules,
    Satisfied,
    TicketView,
    View,
    Wait,
)

# ---- properties ----------------------------------------------------------------------------------------------

mb = st.integers(0, 1200).map(float)


@st.composite
def views(draw: st.DrawFn) -> View:
    """Any state, also ones that should not come about, such as a device over its limit."""
    devices = [
        device(row, draw(st.sampled_from([0.0, 500.0, 1000.0])), draw(mb), reserved_mb=draw(mb))
        for row in range(draw(st.integers(0, 3)))
    ]
    devices = [replace(d, returning_mb=draw(st.sampled_from([0.0, 0.0, 50.0]))) for d in devices]
    members = st.integers(1, 3)
    copies = [
        idle(
            row,
            draw(st.integers(0, 3)),
            mb=draw(mb),
            age=draw(st.floats(0, 30)),
            owner=draw(st.one_of(st.none(), members)),
            on=draw(st.integers(0, len(devices) - 1)) if devices else 0,
        )
        for row in range(draw(st.integers(0, 6)))
    ]
    shared: Counter[int] = Counter()
    owned: dict[int, Counter[int]] = defaultdict(Counter)
    for copy in copies:
        if copy.owner is None:
            shared[copy.model] += 1
        else:
            owned[copy.model][copy.owner] += 1
    models = [
        model(row, draw(mb), known=draw(st.booleans()), shared=shared[row] + draw(st.integers(0, 1)), owned=owned[row])
        for row in range(4)
    ]
    tickets = [
        ticket(
            row,
            wants := draw(st.integers(0, 3)),
            priority=int(models[wants].known),
            member=draw(members),
            waited=draw(st.floats(0, 4)),
        )
        for row in range(draw(st.integers(0, 8)))
    ]
    return view(
        models,
        tickets,
        copies=copies,
        devices=devices,
        rules=replace(RULES, isolate_unknown=draw(st.booleans())),
        in_use=draw(st.integers(0, 1)) if devices else 0,
        isolated=draw(st.integers(0, 9)) == 0,
    )


def runs_alone(state: View, waiter: TicketView) -> bool:
    """Tell whether a waiter's model has to run alone first."""
    return state.rules.isolate_unknown and not state.models[waiter.model].known


def every_waiter_gets_one_answer(state: View, plan: Plan) -> None:
    answered = [decision.ticket for decision in plan.decisions]
    assert len(answered) == len(set(answered))


def nothing_happens_while_a_model_runs_alone(state: View, plan: Plan) -> None:
    if any(one.isolated for one in state.devices):
        assert all(isinstance(decision, Refuse) for decision in plan.decisions)


def an_instance_is_granted_once_or_evicted_once(state: View, plan: Plan) -> None:
    taken = [decision.instance for decision in plan.decisions if isinstance(decision, Grant)]
    taken += [row for decision in plan.decisions if isinstance(decision, Evict) for row in decision.instances]
    assert len(taken) == len(set(taken))


def a_waiter_is_granted_what_it_can_use(state: View, plan: Plan) -> None:
    instances = {instance.row: instance for instance in state.idle}
    for decision in plan.decisions:
        if isinstance(decision, Grant):
            instance, waiter = instances[decision.instance], waiter_of(state, decision)
            assert instance.model == waiter.model
            assert instance.owner in (None, waiter.member)


def no_device_goes_over_its_limit(state: View, plan: Plan) -> None:
    for one in state.devices:
        planned = [load.need_mb for load in loads_of(plan) if load.devices == (one.device,) and not load.alone]
        assert not planned or math.fsum(planned) <= free_mb(one, state.rules.slack_percentage) + 1e-6


def a_load_takes_what_its_model_needs(state: View, plan: Plan) -> None:
    for load in loads_of(plan):
        wanted, largest = state.models[waiter_of(state, load).model], max(limits_mb(state))
        # An assumed size does not make a model impossible.
        assert load.need_mb in (wanted.need_mb, largest)
        assert load.need_mb == wanted.need_mb or (not wanted.known and wanted.need_mb > largest)


def exactly_the_unknown_models_run_alone(state: View, plan: Plan) -> None:
    for load in loads_of(plan):
        known = state.models[waiter_of(state, load).model].known
        assert load.alone == (not known and state.rules.isolate_unknown)


def only_what_can_never_fit_is_refused(state: View, plan: Plan) -> None:
    for decision in plan.decisions:
        if isinstance(decision, Refuse):
            assert state.models[waiter_of(state, decision).model].need_mb > max(limits_mb(state))


def nothing_is_evicted_for_a_model_that_fits(state: View, plan: Plan) -> None:
    planned_mb = {
        one.device: math.fsum(load.need_mb for load in loads_of(plan) if load.devices == (one.device,))
        for one in state.devices
    }
    left = [replace(one, reserved_mb=one.reserved_mb + planned_mb[one.device]) for one in state.devices]
    # Where a model runs alone, or a device is drained for one, no other is loaded.
    alone = [other for other in plan.decisions if runs_alone(state, waiter_of(state, other))]
    closed = {row for other in alone if not isinstance(other, Satisfied) for row in other.why.devices}
    left = [one for one in left if one.device not in closed]
    for decision in plan.decisions:
        wanted = state.models[waiter_of(state, decision).model]
        if isinstance(decision, Evict) and (wanted.known or not state.rules.isolate_unknown):
            assert decision.instances
            assert best_place(left, wanted.need_mb, state.rules.slack_percentage) is None


def a_model_that_runs_alone_has_its_device_to_itself(state: View, plan: Plan) -> None:
    for load in loads_of(plan):
        if load.alone:
            (alone_on,) = load.devices
            assert not any(alone_on in instance.devices for instance in state.idle if not instance.pinned)
            assert not any(alone_on in instance.devices for instance in state.busy)
            assert [other for other in loads_of(plan) if alone_on in other.devices] == [load]


def waiter_of(state: View, decision: Decision) -> TicketView:
    return next(waiter for waiter in state.tickets if waiter.row == decision.ticket)


def loads_of(plan: Plan) -> list[Load]:
    return [decision for decision in plan.decisions if isinstance(decision, Load)]


def limits_mb(state: View) -> list[float]:
    return [limit_mb(one, state.rules.slack_percentage) for one in state.devices]


# Checked of the same states, because making a random state takes longer than looking at its plan.
PROPERTIES = (
    every_waiter_gets_one_answer,
    nothing_happens_while_a_model_runs_alone,
    an_instance_is_granted_once_or_evicted_once,
    a_waiter_is_granted_what_it_can_use,
    no_device_goes_over_its_limit,
    a_load_takes_what_its_model_needs,
    exactly_the_unknown_models_run_alone,
    only_what_can_never_fit_is_refused,
    nothing_is_evicted_for_a_model_that_fits,
    a_model_that_runs_alone_has_its_device_to_itself,
)


@settings(max_examples=300, deadline=None)
@given(views())
def test_every_plan_has_the_ten_properties(state: View) -> None:
    plan = make_plan(state)
    for holds in PROPERTIES:
        holds(state, plan)


@st.composite
def states_at_rest(draw: st.DrawFn) -> View:
    """A state in which nothing is in use, loads or unloads, and no memory is expected. The accounts are right."""
    count = draw(st.integers(1, 2))
    totals = [draw(st.sampled_from([600.0, 1000.0])) for _ in range(count)]
    copies = []
    left = [total * (1 - RULES.slack_percentage) for total in totals]
    for row in range(draw(st.integers(0, 6))):
        on, mb = draw(st.integers(0, count - 1)), draw(st.sampled_from([50.0, 100.0, 250.0, 400.0]))
        if mb <= left[on]:
            left[on] -= mb
            owner = draw(st.one_of(st.none(), st.integers(1, 3)))
            copies.append(idle(row, draw(st.integers(0, 3)), mb=mb, owner=owner, on=on, pinned=draw(st.booleans())))
    devices = []
    for row, total in enumerate(totals):
        leased = draw(st.sampled_from([0.0, 0.0, 200.0]))
        external = draw(st.sampled_from([0.0, 48.0, 100.0, 300.0, 700.0]))
        ours = sum(copy.mb for copy in copies if copy.device == row)
        # Growth of instances may count as external memory; on a device without instances, all of that is certain.
        least = draw(st.floats(0, external)) if ours else external
        figures = {"reserved_mb": leased, "leased_mb": leased, "external_mb": external, "external_least_mb": least}
        devices.append(device(row, total, ours + external, **figures))
    shared = Counter(copy.model for copy in copies if copy.owner is None)
    models = []
    for row in range(4):
        owned = Counter(copy.owner for copy in copies if copy.model == row and copy.owner is not None)
        need = draw(st.sampled_from([50.0, 300.0, 520.0, 880.0, 950.0]))
        one = model(row, need, known=draw(st.booleans()), shared=shared[row], owned=owned)
        load_s, hold_s = draw(st.sampled_from([(0.0, 0.0), (1.0, 0.0), (1.0, 0.1)]))
        models.append(replace(one, rate=draw(st.sampled_from([0.0, 1.0])), load_s=load_s, hold_s=hold_s))
    tickets = [
        ticket(
            row,
            draw(st.integers(0, 3)),
            member=draw(st.integers(1, 3)),
            preload=draw(st.sampled_from([0, 0, 0, 1, 2])),
            head_for=draw(st.sampled_from([None, 1.0, 3.0, 5.0])),
            waited=6.0,
        )
        for row in range(draw(st.integers(1, 5)))
    ]
    most = draw(st.sampled_from([1, 2, math.inf]))
    rules = replace(RULES, isolate_unknown=draw(st.booleans()), max_model_copies=most)
    return view(models, tickets, copies=copies, devices=devices, rules=rules)


@pytest.mark.parametrize(
    ("first", "where", "others"),
    [
        (model(A, 520, known=False), device(used=50, total=600, reserved_mb=200, leased_mb=200), False),
        (model(A, 300), device(used=350, total=600, external_mb=300.0, external_least_mb=0.0), True),
    ],
    ids=["unknown beside a lease", "beside what copies may have grown by"],
)
def test_an_idle_copy_is_handed_out_past_one_whose_room_nothing_here_can_make(
    first: ModelView, where: DeviceView, others: bool
) -> None:
    rules = Rules(0.1, 10.0, 1, 2.0, isolate_unknown=True, max_model_copies=1)
    waits = ticket(0, A, waited=6.0, head_for=3.0 if others else None)
    state = view(
        [first, model(B, 50, shared=1)],
        [waits, ticket(1, B, waited=6.0)],
        copies=[idle(7, B, mb=50, pinned=others)],
        devices=[where],
        rules=rules,
    )
    granted = [one for one in make_plan(state).decisions if isinstance(one, Grant)]
    assert [(one.ticket, one.instance) for one in granted] == [(1, 7)]


@settings(max_examples=scaled(300), deadline=None)
@given(states_at_rest())
def test_nobody_waits_without_end_while_nothing_is_in_use_and_no_memory_is_expected(state: View) -> None:
    """Somebody gets something, or all wait for what only others can end: external memory, leases, pins."""
    decisions = make_plan(state).decisions
    if any(isinstance(decision, Grant | Load | Evict | Refuse | Satisfied) for decision in decisions):
        return
    decided = {decision.ticket: decision for decision in decisions}
    for waiter in state.tickets:
        decision = decided.get(waiter.row)
        assert isinstance(decision, Wait), f"ticket {waiter.row} waits behind others"
        assert decision.reason in (Reason.EXTERNAL, Reason.LEASED, Reason.PINNED, Reason.COPIES)
        assert not decision.first, "it holds up others"
        if decision.reason == Reason.COPIES:
            assert all(copy.pinned for copy in state.idle if copy.model == waiter.model)


@settings(max_examples=200, deadline=None)
@given(views())
def test_a_plan_is_the_same_whatever_the_order_of_the_view(state: View) -> None:
    shuffled = replace(state, tickets=state.tickets[::-1], devices=state.devices[::-1])
    assert make_plan(shuffled).decisions == make_plan(state).decisions


# ---- leases ------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 600).map(float), max_size=12),
    st.integers(1, 900).map(float),
    st.integers(1, 600).map(float),
)
def test_a_lease_that_goes_before_who_has_waited_for_long_does_not_delay_it(
    held_mb: list[float], need_mb: float, later_mb: float
) -> None:
    waiting = ticket(1, A, waited=2.0)
    if not may_be_leased_before(view([], []), waiting, need_mb, device(), later_mb, held_mb):
        return
    for ended in itertools.product((False, True), repeat=len(held_mb)):
        left_mb = math.fsum(mb for mb, gone in zip(held_mb, ended, strict=True) if not gone)
        assert (left_mb + need_mb <= 900) == (left_mb + later_mb + need_mb <= 900)


@settings(max_examples=scaled(100))
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 400)), max_size=6), st.integers(1, 900))
def test_victims_free_enough_and_none_of_them_goes_for_nothing(sizes: list[tuple[int, int]], missing_mb: int) -> None:
    candidates = [Candidate(cost, mb, idle(row, A, mb=mb)) for row, (cost, mb) in enumerate(sizes)]
    chosen = cheapest_set(candidates, missing_mb)
    freed_mb = sum(one.mb for one in chosen)
    if sum(one.mb for one in candidates) < missing_mb:
        assert chosen == []
    else:
        assert freed_mb >= missing_mb
        assert all(freed_mb - one.mb < missing_mb for one in chosen)
