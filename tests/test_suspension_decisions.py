"""Whether an evicted copy is suspended or unloaded, and what is dropped for it: from the rows, without processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
from random_operations import step
from random_tables import RandomTables
from row_changes import RowChanges

from mpmm.policy.suspension import Movable, Unsuspendable, Way, saved_share
from mpmm.policy.view import Reason
from mpmm.scheduling import Scheduler
from mpmm.scheduling.suspension import SuspensionDecisions
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Header, Instance, Model
from mpmm.shared_state.snapshot import read_snapshot

EVICTED, BY_HAND = Cause(Reason.CHEAPEST_RELOAD), Cause(Reason.BY_HAND)
BUDGET_MB = 1000.0
STEPS = 25


@pytest.fixture
def it() -> Iterator[RowChanges]:
    with closing(RowChanges()) as made:
        made.poke(Header.HOST_SHARE_MB, BUDGET_MB)
        for model in (1, 2):
            of_a_load(made, model, 20.0)
            for word in (Model.SUSPEND_S, Model.RESUME_S):
                made.poke(made.tables.model(model) + word, 1.0)
        yield made


def of_a_load(it: RowChanges, model: int, seconds: float) -> None:
    """Let a model's loads take that long."""
    it.poke(it.tables.model(model) + Model.LOAD_S, seconds)


def decisions(it: RowChanges, *rates: float) -> SuspensionDecisions:
    """Return the decisions if models 1 and 2 are requested so often."""
    of_model = dict(enumerate(rates, 1))
    return SuspensionDecisions(it.namespace, lambda model: of_model.get(model, 0.0))


def idle(it: RowChanges, model: int = 1, devices: tuple[int, ...] = (1,)) -> int:
    """Return an idle copy of 500 MB that its object can suspend."""
    row = it.idle(model=model, handle=f"{model} {devices}".encode(), devices=devices)
    it.do(lambda t: it.to.suspensions.note_way(t, row, Way.COOPERATIVE))
    return row


def suspended(it: RowChanges, model: int = 2) -> int:
    """Return a suspended copy, which takes 500 MB of the host."""
    row = it.suspended(model=model, handle=f"suspended {model}".encode())
    for word in (Model.SUSPEND_S, Model.RESUME_S):
        it.poke(it.tables.model(model) + word, 1.0)
    return row


def one_that_pays(it: RowChanges) -> int:
    """Both directions take 2 s, and a load 20."""
    return idle(it)


def one_that_loads_quickly(it: RowChanges) -> int:
    """A load takes 2 s, too."""
    of_a_load(it, 1, 2.0)
    return idle(it)


def one_that_another_has_replaced(it: RowChanges) -> int:
    """Nobody is expected to want it again."""
    it.do(lambda t: it.to.models.supersede(t, 1, True))
    return idle(it)


def one_that_has_failed(it: RowChanges) -> int:
    """Its model is not suspended any more."""
    it.poke(it.tables.model(1) + Model.UNSUSPENDABLE, int(Unsuspendable.TIMED_OUT))
    return idle(it)


def one_without_a_way(it: RowChanges) -> int:
    """Its object cannot be suspended."""
    return it.idle()


def one_that_spans_devices(it: RowChanges) -> int:
    """It lies on two devices."""
    return idle(it, devices=(0, 1))


def one_with_a_twin(it: RowChanges) -> int:
    """Another copy has the same handle, and thus the same server."""
    row = idle(it)
    it.idle(handle=it.tables.handle_of(row).encode())
    return row


def one_with_a_seat_in_use(it: RowChanges) -> int:
    """Another user has a seat of it, but not its own row."""
    it.users(2)
    row = idle(it)
    it.take(row + 1)
    return row


def one_that_no_host_takes(it: RowChanges) -> int:
    """There is no host memory for suspended copies."""
    it.poke(Header.HOST_SHARE_MB, 0.0)
    return idle(it)


def one_that_is_too_large_for_the_host(it: RowChanges) -> int:
    """It takes 500 MB."""
    it.poke(Header.HOST_SHARE_MB, 499.0)
    return idle(it)


@pytest.mark.parametrize(
    ("arrange", "evicted_is_suspended", "by_hand_is_suspended"),
    [
        *((one_that_pays, True, True), (one_that_loads_quickly, False, True)),
        *((one_that_another_has_replaced, False, True), (one_that_has_failed, False, False)),
        *((one_without_a_way, False, False), (one_that_spans_devices, False, False)),
        *((one_with_a_twin, False, False), (one_that_no_host_takes, False, False)),
        (one_that_is_too_large_for_the_host, False, False),
    ],
)
def test_a_copy_is_suspended_if_that_pays_and_it_can_be(
    it: RowChanges, arrange: Callable[[RowChanges], int], evicted_is_suspended: bool, by_hand_is_suspended: bool
) -> None:
    row, decide = arrange(it), decisions(it, 1.0)
    assert decide.kept_of([row]) == ({row} if evicted_is_suspended else set())
    assert decide.can_be_suspended(row) is (by_hand_is_suspended or arrange is one_that_is_too_large_for_the_host)
    before, evictions = read_snapshot(it.namespace.name), it.words[Header.EVICTIONS]
    for evicted, expected in ((True, evicted_is_suspended), (False, by_hand_is_suspended)):
        if expected:
            continue
        assert it.do(partial(decide.suspend, row=row, suspender=1, cause=BY_HAND, evicted=evicted)) is False
        assert it.tables.instances[row].state == Instance.IDLE
        assert read_snapshot(it.namespace.name).events[-1].sequence == before.events[-1].sequence
    if by_hand_is_suspended and not evicted_is_suspended:
        assert it.do(lambda t: decide.suspend(t, row, 1, BY_HAND, evicted=False)) is True
        assert (it.tables.instances[row].state, it.words[Header.EVICTIONS]) == (Instance.SUSPENDING, evictions)
        return
    it.do(lambda t: decide.evict(t, row, 1, EVICTED))
    copy, [*_, event] = it.tables.instances[row], read_snapshot(it.namespace.name).events
    assert copy.state == (Instance.SUSPENDING if evicted_is_suspended else Instance.UNLOADING)
    assert (copy.holder, it.words[Header.EVICTIONS]) == (1, evictions + 1 + (arrange is one_with_a_twin))
    assert event.reason == Reason.CHEAPEST_RELOAD


def test_a_copy_of_which_a_seat_is_in_use_cannot_be_suspended(it: RowChanges) -> None:
    row = one_with_a_seat_in_use(it)
    assert decisions(it).can_be_suspended(row) is False
    it.do(lambda t: it.to.holds.release(t, row + 1))
    assert decisions(it).can_be_suspended(row) is True


def test_a_copy_counts_with_what_it_takes_of_its_device_wherever_it_is(it: RowChanges) -> None:
    for row, rate in ((idle(it), 1.0), (suspended(it), 2.0)):
        copy = decisions(it, 1.0, 2.0).movable(row)
        assert (copy.mb, copy.way, copy.rate) == (500.0, Way.COOPERATIVE, rate)


@pytest.mark.parametrize(
    ("rates", "evicted", "makes_way"),
    [
        *(((1.0, 0.5), True, True), ((0.5, 1.0), True, False), ((1.0, 1.0), True, False)),
        # What somebody asks for counts for more than anything that was evicted.
        ((0.5, 1.0), False, True),
    ],
)
def test_a_suspended_copy_makes_way_in_the_host_for_one_that_is_worth_more(
    it: RowChanges, rates: tuple[float, float], evicted: bool, makes_way: bool
) -> None:
    it.poke(Header.HOST_SHARE_MB, 900.0)
    old, row = suspended(it), idle(it)
    decide = decisions(it, *rates)
    assert (decide.budget_mb, decide.used_mb(), decide.free_mb) == (900.0, 500.0, 400.0)
    assert it.do(lambda t: decide.suspend(t, row, 1, EVICTED, evicted)) is makes_way
    states = [it.tables.instances[one].state for one in (old, row)]
    assert states == ([Instance.UNLOADING, Instance.SUSPENDING] if makes_way else [Instance.SUSPENDED, Instance.IDLE])
    if makes_way:
        *_, dropped, _ = read_snapshot(it.namespace.name).events
        assert (dropped.tag, dropped.reason, dropped.need_mb, dropped.free_mb) == ("b", Reason.HOST_FULL, 500.0, 400.0)
        assert (dropped.other, it.tables.instances[old].holder) == ("a", 1)
        assert decide.used_mb() == 500.0, "what is being unloaded is given back in a moment"


def test_what_is_over_its_budget_has_nothing_free(it: RowChanges) -> None:
    old, row = suspended(it), idle(it)
    it.poke(it.tables.instance(old) + Instance.HOST_MB, BUDGET_MB + 100.0)
    assert decisions(it).free_mb == -100.0
    assert it.do(lambda t: decisions(it, 1.0, 0.1).suspend(t, row, 1, EVICTED, evicted=True))
    *_, dropped, _ = read_snapshot(it.namespace.name).events
    assert dropped.free_mb == 0.0


@pytest.mark.parametrize("among", [None, {1}, {2}, {1, 2}, set()])
@pytest.mark.parametrize("pinned", [None, 1, 2])
def test_the_copy_that_was_suspended_first_is_dropped_first(
    it: RowChanges, among: set[int] | None, pinned: int | None
) -> None:
    rows = {model: suspended(it, model) for model in (2, 1)}
    if pinned is not None:
        it.pin(pinned)
    may_go = [model for model in (2, 1) if model != pinned and (among is None or model in among)]
    found = it.do(lambda t: decisions(it).drop_oldest(t, 1, Cause(Reason.HOST_SHORT), among))
    assert found is bool(may_go)
    going = [model for model, row in rows.items() if it.tables.instances[row].state == Instance.UNLOADING]
    assert going == may_go[:1]


def test_the_share_that_suspensions_save_follows_the_rows(it: RowChanges) -> None:
    decide, before = decisions(it), 1.0
    for load_s in (20.0, 5.0, 1.0):
        for model in (1, 2):
            of_a_load(it, model, load_s)
        share = decide.saved_share(Way.COOPERATIVE)
        assert share == decide.saved_share(Way.COOPERATIVE) == decisions(it).saved_share(Way.COOPERATIVE)
        assert share < before
        before = share


def test_the_share_is_that_of_all_models_that_may_be_suspended(it: RowChanges) -> None:
    default_mb, way = it.namespace.settings.default_estimate_mb, Way.CHECKPOINT
    others = Movable(default_mb, way, it.tables.models[0].load_s, 0.0, 0.0, 0.0)
    quick, slow = (Movable(default_mb, way, load_s, 1.0, 1.0, 0.0) for load_s in (2.0, 20.0))
    of_a_load(it, 1, 2.0)
    decide = decisions(it)
    assert decide.saved_share(way) == pytest.approx(saved_share([others, quick, slow]))
    it.do(lambda t: it.to.leases.claim(t, b"lease", 90.0))
    it.poke(it.tables.model(1) + Model.EXPECT_MB, 70000.0)
    assert decide.saved_share(way) == pytest.approx(saved_share([others, replace(quick, mb=70000.0), slow]))
    it.do(lambda t: it.to.estimates.estimate(t, 1, 300.0, measured=True))
    assert decide.saved_share(way) == pytest.approx(saved_share([others, replace(quick, mb=300.0), slow]))
    it.do(lambda t: it.to.models.supersede(t, 1, True))
    assert decide.saved_share(way) == pytest.approx(saved_share([others, slow]))
    it.poke(it.tables.model(0) + Model.UNSUSPENDABLE, int(Unsuspendable.TIMED_OUT))
    assert decide.saved_share(way) == pytest.approx(saved_share([slow]))


@pytest.mark.parametrize("seed", range(10))
def test_those_count_as_suspendable_that_an_eviction_would_suspend(seed: int) -> None:
    made = RandomTables(seed)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        decide = Scheduler(made.namespace).suspension
        for _ in range(STEPS):
            step(made)
            unused = [row for row in made.tables.idle_copies() if not made.tables.is_in_use(row)]
            suspends = set()
            for row in unused:
                with made.attempt() as t:
                    decide.evict(t, row, 1, EVICTED)
                    if made.tables.instances[row].state == Instance.SUSPENDING:
                        suspends.add(row)
            with made.namespace.transaction():
                assert decide.kept_of(unused) == suspends
