"""A bounded queue refuses at once a request that would wait too long, and every process can see the expected wait."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
from harness import (
    NewManager,
    NewProcess,
    Seat,
    acquire,
    learn,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject
from policy_views import ME, OTHER, A, model

from mpmm.cli import main
from mpmm.errors import AcquireTimeoutError, InvalidArgumentError, QueueFullError
from mpmm.observability.formatting import expected_waits
from mpmm.policy.sharing import FIRST_LOAD_S, Seen, expected_wait_s
from mpmm.policy.view import ModelView, Reason
from mpmm.shared_state.snapshot import read_snapshot


def comparable(namespace: str) -> Any:
    """Return what a refused request must not change; not how often a model was asked for, which the leader counts."""
    snapshot = read_snapshot(namespace)
    rows = (snapshot.models, snapshot.instances, snapshot.tickets)
    keys = ("tag", "state", "waiting", "loading", "idle", "active", "number", "holder")
    return [[{key: getattr(row, key, None) for key in keys} for row in table] for table in rows]


def test_a_request_that_would_wait_behind_too_many_is_refused_and_changes_nothing(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(max_model_copies=1)
    first, second = new_process(), new_process()
    taken = manager.acquire_model("a", Loads())
    first.send(acquire, "a")
    wait_until(lambda: waiting(namespace, "a"), "one waits")
    before = comparable(namespace)
    with pytest.raises(QueueFullError, match="1 requests wait for it already, and max_waiting=1 allows") as caught:
        second.call(acquire_bounded, "a", 1)
    assert (caught.value.tag, caught.value.waiting, caught.value.max_waiting) == ("a", 1, 1)
    assert caught.value.retry_after_seconds >= 0
    assert pickle.loads(pickle.dumps(caught.value)).retry_after_seconds == caught.value.retry_after_seconds
    assert comparable(namespace) == before
    # Another model has a queue of its own, and a request that finds an idle copy does not wait.
    second.call(acquire_bounded, "b", 0)
    manager.release_model("a", taken)
    first.result()
    first.call(release)
    second.call(acquire_bounded, "a", 0)
    assert problems(namespace) == []


def acquire_bounded(seat: Seat, tag: str, most: int) -> None:
    seat.held.append((tag, seat.manager.acquire_model(tag, Loads(), max_waiting=most)))


def test_a_refused_request_evicts_nothing(namespace: str, new_manager: NewManager, new_process: NewProcess) -> None:
    manager, other = new_manager(fallback_memory_mb=200), new_process()
    learn(Seat(manager), big=200)
    other.call(acquire, "idle", LoadsObject())
    other.call(release)
    with pytest.raises(QueueFullError):
        manager.acquire_model("big", Loads(), max_waiting=0)
    assert [(copy.tag, copy.state) for copy in read_snapshot(namespace).instances] == [("idle", "idle")]
    with manager.model("big", Loads(), max_waiting=1):
        pass
    assert problems(namespace) == []


def test_the_setting_bounds_every_way_to_a_copy(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, waiter, other = new_manager(max_model_copies=1, max_waiting=1), new_process(), new_process()
    with manager.model("a", Loads()):
        waiter.send(acquire, "a")
        wait_until(lambda: waiting(namespace, "a"), "one waits")
        for way in (by_acquire, by_block, by_decorator, by_task):
            with pytest.raises(QueueFullError):
                other.call(way)
        other.call(raise_bound)
        other.send(by_acquire)
        wait_until(lambda: len(waiting(namespace, "a")) == 2, "two wait")
    waiter.result()
    waiter.call(release)
    other.result()
    assert problems(namespace) == []


def by_acquire(seat: Seat) -> None:
    seat.manager.release_model("a", seat.manager.acquire_model("a", Loads()))


def by_block(seat: Seat) -> None:
    with seat.manager.model("a", Loads()):
        pass


def by_decorator(seat: Seat) -> None:
    seat.manager.uses("a", Loads())(lambda model: model)()


def by_task(seat: Seat) -> None:
    async def hold() -> None:
        async with seat.manager.model_async("a", Loads()):
            pass

    asyncio.run(hold())


def raise_bound(seat: Seat) -> None:
    seat.manager.update_settings(max_waiting=2)


@pytest.mark.parametrize("most", [-1, 1.5, True, "3", math.inf])
def test_bounds_that_cannot_be_change_nothing(namespace: str, new_manager: NewManager, most: Any) -> None:
    manager = new_manager()
    with pytest.raises(InvalidArgumentError, match="max_waiting="):
        manager.acquire_model("a", Loads(), max_waiting=most)
    assert read_snapshot(namespace).models == ()


# ---- the expected wait ------------------------------------------------------------------------------------------

TIMED = replace(model(A), load_s=4.0, hold_s=0.5)
LONG_S = 1.0
SHARED = replace(TIMED, shared=2)
LOADING = replace(TIMED, loading={OTHER: 1}, shares=True, loading_for_s=1.0)


@pytest.mark.parametrize(
    ("of", "ahead", "reason", "seconds", "expected"),
    [
        (SHARED, 0, Reason.SHARING, 0.0, 0.25),
        (SHARED, 3, Reason.SHARING, 0.0, 1.0),
        (LOADING, 1, Reason.SHARING, 0.0, 3.0 + 1.0),
        (replace(TIMED, loading={OTHER: 1}), 0, Reason.MEMORY, 0.0, 4.0),
        (TIMED, 2, Reason.IN_USE, 2.0, 2.0 + 4.0 + 1.0),
        (TIMED, 0, Reason.IN_USE, math.inf, 4.0),
        (TIMED, 0, Reason.MEMORY, 9.0, 4.0),
        (model(A), 0, Reason.MEMORY, 0.0, FIRST_LOAD_S),
    ],
)
def test_the_expected_wait_follows_from_loads_and_holds(
    of: ModelView, ahead: int, reason: Reason, seconds: float, expected: float
) -> None:
    assert expected_wait_s(of, ME, ahead, reason, seconds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("of", "ahead", "expected"),
    [
        pytest.param(replace(SHARED, shared=1, held_for_s=0.4), 0, 0.5, id="a hold is expected to last for the mean"),
        pytest.param(replace(SHARED, shared=1, held_for_s=60.0), 0, 60.0, id="or, if late, for as long again"),
        pytest.param(replace(SHARED, shared=1, held_for_s=60.0), 2, 61.0, id="but those that follow for the mean"),
        pytest.param(replace(SHARED, held_for_s=60.0), 0, 30.0, id="two that are late serve twice as soon"),
        pytest.param(
            replace(TIMED, owned={OTHER: 1}, held_for_s=60.0), 0, 4.0, id="another's object is not waited for"
        ),
    ],
)
def test_what_has_been_held_for_longer_than_usual_is_expected_to_be_held_for_as_long_again(
    of: ModelView, ahead: int, expected: float
) -> None:
    assert expected_wait_s(of, ME, ahead, Reason.COPIES, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reason", "seconds", "waited_s", "expected"),
    [
        (Reason.IN_USE, 2.0, 1.9, 2.0 + 4.0),
        (Reason.IN_USE, 2.0, 30.0, 30.0 + 4.0),
        (Reason.DRAINING, 2.0, 30.0, 30.0 + 4.0),
        (Reason.BACKING_OFF, 2.0, 30.0, 2.0 + 4.0),
        *((reason, 2.0, 30.0, 30.0 + 4.0) for reason in (Reason.MEMORY, Reason.PINNED, Reason.LEASED, Reason.EXTERNAL)),
        *((reason, 2.0, 30.0, 4.0) for reason in (Reason.UNLOADING, Reason.RETURNING, Reason.SUSPENDING)),
    ],
)
def test_room_that_should_have_come_already_is_expected_to_take_as_long_again(
    reason: Reason, seconds: float, waited_s: float, expected: float
) -> None:
    assert expected_wait_s(TIMED, ME, 0, reason, seconds, waited_s=waited_s) == pytest.approx(expected)


def test_who_stands_behind_others_is_expected_to_have_room_no_sooner_than_they() -> None:
    behind = expected_wait_s(TIMED, ME, 1, Reason.BEHIND, 0.0, room_ahead_s=30.0)
    assert behind == pytest.approx(30.0 + 4.0 + 0.5)
    assert expected_wait_s(TIMED, ME, 1, Reason.IN_USE, 2.0, room_ahead_s=30.0) == pytest.approx(2.0 + 4.0 + 0.5)
    assert expected_wait_s(SHARED, ME, 0, Reason.BEHIND, 0.0, room_ahead_s=30.0) == pytest.approx(0.25)


def test_nobody_is_promised_a_copy_before_those_that_he_waits_behind(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, waiter, later = new_manager(fallback_memory_mb=100.0), new_process(), new_process()
    learn(Seat(manager), a=80.0, b=80.0, c=80.0)
    with manager.model("a", Loads()):
        waiter.send(acquire, "b")
        wait_until(lambda: any(ticket.waited_s > LONG_S for ticket in read_snapshot(namespace).tickets), "one waits")
        later.send(acquire, "c")
        wait_until(lambda: waiting(namespace, "c"), "another one waits behind it")
        snapshot = read_snapshot(namespace)
        first, second = sorted(snapshot.tickets, key=lambda ticket: ticket.number)
        assert [first.reason, second.reason] == [Reason.IN_USE, Reason.BEHIND]
        expected = expected_waits(snapshot)
        assert expected(second) >= expected(first) > LONG_S
        promised = [ticket.expected_wait_seconds for ticket in manager.tickets()]
        assert all(seconds is not None and seconds > LONG_S for seconds in promised)
    waiter.result()
    waiter.call(release)
    later.result()


def test_a_copy_that_is_held_for_far_longer_than_usual_is_not_promised_at_once(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, waiter = new_manager(max_model_copies=1), new_process()
    for _ in range(20):
        with manager.model("a", Loads()):
            pass
    (shown,) = read_snapshot(namespace).models
    assert 0 < shown.hold_s < LONG_S / 10, "holds were short so far"
    with manager.model("a", Loads()):
        wait_until(lambda: held_for_s(namespace) > LONG_S, "it is held for long")
        waiter.send(acquire, "a")
        wait_until(lambda: waiting(namespace, "a"), "one waits")
        (ticket,) = manager.tickets()
        assert ticket.expected_wait_seconds is not None
        assert ticket.expected_wait_seconds > LONG_S
        snapshot = read_snapshot(namespace)
        assert expected_waits(snapshot)(snapshot.tickets[0]) > LONG_S
        with pytest.raises(AcquireTimeoutError) as caught:
            new_process(wait_timeout_seconds=0.05).call(acquire, "a")
        assert caught.value.retry_after_seconds is not None
        assert caught.value.retry_after_seconds > LONG_S
    waiter.result()


def held_for_s(namespace: str) -> float:
    return max(copy.for_s for copy in read_snapshot(namespace).instances if copy.state == "active")


def test_what_was_never_loaded_is_expected_to_load_as_others_do() -> None:
    assert expected_wait_s(model(A), ME, 2, Reason.MEMORY, 0.0, Seen(3.0, 0.5)) == pytest.approx(4.0)


def test_tickets_errors_and_inspect_say_the_expected_wait(
    namespace: str, new_manager: NewManager, new_process: NewProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    manager, waiter = new_manager(max_model_copies=1), new_process()
    with manager.model("a", Loads()):
        waiter.send(acquire, "a")
        wait_until(lambda: waiting(namespace, "a"), "one waits")
        (ticket,) = manager.tickets()
        assert ticket.expected_wait_seconds is not None
        assert 0 <= ticket.expected_wait_seconds < FIRST_LOAD_S
        with pytest.raises(AcquireTimeoutError, match=r"about [\d.]+ s more are expected") as caught:
            new_process(wait_timeout_seconds=0.05).call(acquire, "a")
        assert caught.value.retry_after_seconds is not None
        assert main(["inspect", "--json", namespace]) == 0
        (shown,) = json.loads(capsys.readouterr().out)["tickets"]
        assert 0 <= shown["expected_s"] < FIRST_LOAD_S
        assert main(["inspect", namespace]) == 0
        assert "expected" in capsys.readouterr().out.split("\nwaiting:\n")[1].splitlines()[0]
    waiter.result()
