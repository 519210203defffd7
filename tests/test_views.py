"""The view for a plan matches the rows: it equals `reference_view` after each of many random operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any
from unittest import mock

import pytest
from harness import scaled
from random_operations import step
from random_tables import RandomTables
from reference_view import QUEUE_PART, Reference
from row_changes import RowChanges

from mpmm.policy.view import TicketView, View
from mpmm.scheduling import Scheduler
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.snapshot import read_snapshot

STEPS = 80


def assert_equal(found: Any, expected: Any) -> None:
    """Compare two records field by field, floats but for rounding."""
    for one in dataclasses.fields(expected):
        got, wanted = getattr(found, one.name), getattr(expected, one.name)
        if isinstance(wanted, float | tuple):
            wanted = pytest.approx(wanted)
        assert got == wanted, f"{one.name} of {expected}"


def assert_same_rows(found: Iterable[Any], expected: Iterable[Any]) -> None:
    """Compare records by their rows, which may come in any order."""
    by_row = {one.row: one for one in expected}
    rows = [one.row for one in found]
    assert sorted(rows) == sorted(by_row)
    for one in found:
        shares = dataclasses.replace(one, other_shares=()), dataclasses.replace(by_row[one.row], other_shares=())
        assert_equal(*shares)
        assert dict(one.other_shares) == pytest.approx(dict(by_row[one.row].other_shares))


def check_view(view: View, expected: Reference) -> None:
    """Compare a view with the reference."""
    assert_same_rows(view.busy, expected.busy())
    assert_same_rows(view.idle, expected.idle())
    assert_same_rows(view.leases, expected.leases())
    assert_same_rows(view.suspended, expected.suspended())
    for newest_first in ([one.idle_since_s for one in view.idle], [one.since_s for one in view.suspended]):
        assert newest_first == sorted(newest_first, reverse=True)
    for device, wanted in zip(view.devices, expected.devices(), strict=True):
        assert_equal(device, wanted)
    # Behind the first ones, those of a model keep their order.
    chosen = expected.tickets(expected.chosen())
    assert list(view.tickets[:QUEUE_PART]) == chosen[:QUEUE_PART]
    assert sorted(view.tickets[QUEUE_PART:], key=_model_of) == sorted(chosen[QUEUE_PART:], key=_model_of)
    named = {one.model for part in (view.busy, view.idle, view.suspended, view.tickets) for one in part}
    assert named <= set(view.models)
    for row, model in view.models.items():
        wanted_model = expected.model(row)
        assert_equal(dataclasses.replace(model, owned={}, loading={}), _without_members(wanted_model))
        # A member without copies may be named, too.
        assert {member: count for member, count in model.owned.items() if count} == wanted_model.owned
        assert {member: count for member, count in model.loading.items() if count} == wanted_model.loading
    any_suspendable = any(one.suspendable for one in view.idle)
    assert view.host_free_mb == pytest.approx(expected.host_free_mb() if any_suspendable else 0.0)
    rules, settings = view.rules, expected.settings
    assert (view.now_s, rules.isolate_unknown) == (expected.now / 1e9, expected.isolates_unknown())
    for name in ("slack_percentage", "eviction_cooldown_seconds", "min_model_copies", "max_overtake_seconds"):
        assert getattr(rules, name) == getattr(settings, name)


def check_expected_waits(scheduler: Scheduler, expected: Reference) -> None:
    """Compare the figures that predict waits; `test_policy_sharing` tests the predictions."""
    # Each of them takes a pass over the rows, and one after the other comes to stand at an end.
    for row in expected.queue()[:: max(1, len(expected.queue()) - 1)]:
        with mock.patch("mpmm.scheduling.waiters.expected_wait_s") as foretold:
            scheduler.expected_wait_s(row)
        model, member, ahead, reason, seconds, _, waited_s, room_ahead_s = foretold.call_args.args
        assert model.model == expected.tables.tickets[row].model
        wanted = expected.expected_wait(row)
        assert (member, ahead, reason, seconds, waited_s, room_ahead_s) == pytest.approx(wanted)


def _model_of(ticket: TicketView) -> int:
    return ticket.model


def _without_members(model: Any) -> Any:
    return dataclasses.replace(model, owned={}, loading={})


@pytest.mark.parametrize("seed", range(scaled(30)))
def test_a_view_says_what_the_rows_say(seed: int) -> None:
    made = RandomTables(seed)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        scheduler = Scheduler(made.namespace)
        for number in range(STEPS):
            step(made)
            with made.namespace.transaction() as t:
                # As the leader does now and then: from then on the silence of a model counts.
                if number % 3 == 0:
                    scheduler.demand.count_all(t)
                expected = Reference(made.namespace, made.now)
                check_view(scheduler.read_view(), expected)
                check_expected_waits(scheduler, expected)
            assert check_invariants(read_snapshot(made.namespace.name, events=False)) == []


@pytest.fixture
def it() -> Iterator[RowChanges]:
    with closing(RowChanges()) as made:
        yield made


@pytest.mark.parametrize("owner", [None, 1])
def test_a_copy_of_several_users_that_is_to_go_is_nobodys_any_more(it: RowChanges, owner: int | None) -> None:
    it.users(3)
    row = it.active(handle=b"" if owner else b"handle")
    it.take(row + 1)
    for asked in (False, True):
        model = Scheduler(it.namespace).read_view().models[1]
        assert (model.shared, model.owned.get(2, 0)) == (int(not asked and not owner), int(not asked and bool(owner)))
        assert model.leaving == int(asked)
        it.do(lambda t: it.to.unloads.ask(t, row, 2))
