"""Urgent requests come first, by a bounded head start, so that no request starves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import NewManager, NewProcess, Seat, acquire, in_thread, learn, problems, release, wait_until, waiting
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import Loads
from policy_views import NOW, A, model, ticket, view

from mpmm import ModelManager
from mpmm.beam.run_inference import replacements
from mpmm.cli import main
from mpmm.model_manager.request import AcquireOptions
from mpmm.policy.fairness import HEAD_START_S, HIGHEST_URGENCY, queue_order, rank_ns, urgency_of
from mpmm.policy.view import Reason, TicketView
from mpmm.shared_state.snapshot import read_snapshot

steps = st.integers(-HIGHEST_URGENCY, HIGHEST_URGENCY)


def one(number: int, enqueued_s: float, urgency: int, of_class: int = 1) -> TicketView:
    waiter = ticket(number, A, priority=of_class, waited=NOW - enqueued_s)
    return replace(waiter, rank=rank_ns(int(enqueued_s * 1e9), urgency))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 400.0), steps, st.sampled_from([1, 1, 2])), max_size=12))
def test_nobody_is_overtaken_by_one_who_comes_later_than_the_head_start_between_them(
    drawn: list[tuple[float, int, int]],
) -> None:
    came = sorted(drawn, key=lambda drawn: drawn[0])
    waiters = [one(number, NOW - 400.0 + at, urgency, kind) for number, (at, urgency, kind) in enumerate(came)]
    order = queue_order(view([model(A)], waiters))
    for place, later in enumerate(order):
        for earlier in order[place + 1 :]:
            if earlier.enqueued_s < later.enqueued_s and earlier.priority == later.priority == 1:
                steps_between = urgency_of(int(later.enqueued_s * 1e9), later.rank) - urgency_of(
                    int(earlier.enqueued_s * 1e9), earlier.rank
                )
                assert later.enqueued_s - earlier.enqueued_s <= HEAD_START_S * steps_between + 1e-6


def test_a_long_wait_for_unknown_models_changes_nothing_among_known_ones() -> None:
    long, urgent, usual = one(0, NOW - 9.0, 0), one(1, NOW - 1.0, 5), one(2, NOW - 1.0, 0)
    unknown = one(3, NOW - 2.0, 0, of_class=0)
    order = queue_order(view([model(A)], [usual, unknown, long, urgent]))
    assert [waiter.number for waiter in order] == [1, 0, 3, 2]


@settings(deadline=None)
@given(st.floats(0.0, 1e6), steps)
def test_a_rank_tells_how_urgent_its_request_is(enqueued_s: float, urgency: int) -> None:
    enqueued_ns = int(enqueued_s * 1e9)
    assert rank_ns(enqueued_ns, urgency) >= 0
    assert urgency_of(enqueued_ns, rank_ns(enqueued_ns, urgency)) == urgency


def test_the_usual_requests_are_served_as_they_come() -> None:
    waiters = [one(number, NOW - 5.0 + number, 0) for number in range(3)]
    assert [waiter.number for waiter in queue_order(view([model(A)], waiters[::-1]))] == [0, 1, 2]


def test_a_copy_goes_to_the_most_urgent_and_the_queue_shows_it(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(max_model_copies=1)
    usual, idle, urgent = new_process(), new_process(), new_process()
    handle = manager.acquire_model("a", Loads())
    for process, priority in ((idle, -5), (usual, 0), (urgent, 3)):
        process.send(acquire_at, "a", priority)
        wait_until(lambda pid=process.pid: any(t.pid == pid for t in waiting(namespace)), "it waits")  # type: ignore[misc]  # mypy has no type for a lambda's default
    assert [one.pid for one in waiting(namespace)] == [urgent.pid, usual.pid, idle.pid]
    assert [one.urgency for one in waiting(namespace)] == [3, 0, -5]
    worker = manager._connected()
    with worker.namespace.transaction():
        seen = worker.scheduler.read_view()
        by_policy = [ticket.row for ticket in queue_order(seen)]
        assert by_policy == worker.scheduler.views.queue_order().tolist()
    assert [ticket.ticket_num for ticket in manager.tickets()] == [one.number for one in waiting(namespace)]
    expected = [ticket.expected_wait_seconds or 0.0 for ticket in manager.tickets()]
    assert expected == sorted(expected)
    manager.release_model("a", handle)
    for process, others in ((urgent, (usual, idle)), (usual, (idle,)), (idle, ())):
        process.result()
        assert not any(other.has_result() for other in others)
        process.call(release)
    assert problems(namespace) == []


def acquire_at(seat: Seat, tag: str, priority: int) -> None:
    seat.held.append((tag, seat.manager.acquire_model(tag, Loads(), priority=priority)))


def reserve_at(seat: Seat, mb: float, priority: int) -> None:
    seat.manager.reserve(mb, priority=priority).release()


def test_room_goes_to_the_more_urgent_first_and_the_other_learns_behind_whom_it_waits(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager()
    learn(Seat(manager), big=900, large=800)
    usual, urgent = new_process(), new_process()
    with manager.model("held", Loads()), manager.model("other", Loads(), expect_mb=200):
        usual.send(acquire, "big")
        wait_until(lambda: waiting(namespace, "big"), "there is no room")
        urgent.send(acquire_at, "large", 1)
        wait_until(lambda: waiting(namespace, "large"), "nor for this one")
        assert [one.tag for one in waiting(namespace)] == ["large", "big"]
        wait_until(lambda: waiting(namespace, "big")[0].reason == Reason.OUTRANKED, "it is told behind whom it is")
        assert waiting(namespace, "big")[0].other == "large"
    urgent.result()
    assert not usual.has_result()
    urgent.call(release)
    usual.result()
    assert problems(namespace) == []


def test_leases_and_programs_have_priorities_too(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, usual, urgent = new_manager(), new_process(), new_process()
    lease = manager.reserve(1000)
    usual.send(reserve_at, 900, 0)
    wait_until(lambda: len(waiting(namespace)) == 1, "one waits")
    urgent.send(reserve_at, 900, 2)
    wait_until(lambda: len(waiting(namespace)) == 2, "two wait")
    assert [one.pid for one in waiting(namespace)] == [urgent.pid, usual.pid]
    lease.release()
    urgent.result()
    usual.result()
    assert main(["run", "--mb", "10", "--priority", "11", "--", "true"]) == 125
    assert main(["run", "--mb", "10", "--priority", "-3", "--", "true"]) == 0
    assert read_snapshot(namespace).tickets == ()
    assert problems(namespace) == []


# ---- on every way to a copy ----------------------------------------------------------------------------------------


def by_model(seat: Seat, tag: str, priority: int) -> None:
    with seat.manager.model(tag, Loads(), priority=priority):
        pass


def by_model_async(seat: Seat, tag: str, priority: int) -> None:
    async def use() -> None:
        async with seat.manager.model_async(tag, Loads(), priority=priority):
            pass

    asyncio.run(use())


def by_decorator(seat: Seat, tag: str, priority: int) -> None:
    seat.manager.uses(tag, Loads(), priority=priority)(lambda model: None)()


def by_decorated_coroutine(seat: Seat, tag: str, priority: int) -> None:
    async def use(model: str) -> None:
        pass

    asyncio.run(seat.manager.uses(tag, Loads(), priority=priority)(use)())


def by_acquire(seat: Seat, tag: str, priority: int) -> None:
    seat.manager.release_model(tag, seat.manager.acquire_model(tag, Loads(), priority=priority))


def by_defaults(seat: Seat, tag: str, priority: int) -> None:
    """As a worker of Beam does, whose handler says how urgent its model is."""
    transform = SimpleNamespace(
        _model=None,
        _model_handler=SimpleNamespace(mpmm_priority=priority),
        _load_model_at_runtime=True,
        use_model_manager=True,
    )

    class WithRunInference:
        class _RunInferenceDoFn:
            def _load_model(self, side_input_model_path: object = None) -> object:
                return SimpleNamespace(models=seat.manager, model_tag=tag)

    replaced = {name: new for _, name, new in replacements(WithRunInference)}  # type: ignore[arg-type]  # as a module is
    replaced["_load_model"](transform)
    seat.manager.release_model(tag, seat.manager.acquire_model(tag, Loads()))


def by_defaults_in_loop(seat: Seat, tag: str, priority: int) -> None:
    seat.manager.set_request_defaults(tag, priority=priority)
    by_model_async(seat, tag, 0)


WAYS = (
    *(by_acquire, by_model, by_model_async, by_decorator, by_decorated_coroutine),
    *(by_defaults, by_defaults_in_loop),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_a_copy_takes_a_priority(
    namespace: str, new_manager: NewManager, new_process: NewProcess, way: Callable[[Seat, str, int], None]
) -> None:
    manager, usual, urgent = new_manager(max_model_copies=1), new_process(), new_process()
    with manager.model("a", Loads()):
        usual.send(acquire, "a")
        wait_until(lambda: len(waiting(namespace)) == 1, "the usual one waits")
        urgent.send(way, "a", 2)
        wait_until(lambda: len(waiting(namespace)) == 2, "the urgent one waits, too")
        assert [(one.pid, one.urgency) for one in waiting(namespace)] == [(urgent.pid, 2), (usual.pid, 0)]
    # The usual one keeps what it gets, so the urgent one would not come to its end behind it.
    urgent.result()
    usual.result()
    assert problems(namespace) == []


def preload_at(seat: Seat, tag: str, priority: int) -> None:
    assert seat.manager.preload(tag, Loads(), priority=priority, expect_mb=600) == 1


def preload_at_a_prompt(seat: Seat, tag: str, priority: int) -> None:
    # From where it finds the loader.
    os.chdir(Path(__file__).parent)
    options = ("--expect-mb", "600", "--priority", str(priority), "--namespace", seat.manager.namespace)
    assert main(["preload", tag, "test_priority:load_anywhere", *options]) == 0


def load_anywhere() -> str:
    return str(Loads().load())


@pytest.mark.parametrize("way", [preload_at, preload_at_a_prompt], ids=lambda way: way.__name__)
def test_the_more_urgent_preload_is_loaded_first_and_after_requests(
    namespace: str, new_manager: NewManager, new_process: NewProcess, way: Callable[[Seat, str, int], None]
) -> None:
    manager = new_manager()
    later, usual, urgent, user = new_process(), new_process(), new_process(), new_process()
    with manager.reserve(1000):
        for process, tag, priority in ((later, "later", -1), (usual, "usual", 0), (urgent, "urgent", 5)):
            process.send(way, tag, priority)
            wait_until(lambda tag=tag: waiting(namespace, tag), "there is no room")  # type: ignore[misc]  # mypy has no type for a lambda's default
        user.send(by_model, "used", -10)
        wait_until(lambda: waiting(namespace, "used"), "there is no room")
        assert [one.tag for one in waiting(namespace)] == ["used", "urgent", "usual", "later"]
    for process in (user, urgent, usual, later):
        process.result()
    loads = [event.tag for event in read_snapshot(namespace).events if event.kind == "load_began"]
    # No two of 600 MB are loaded at a time.
    assert [tag for tag in loads if tag != "used"] == ["urgent", "usual", "later"]
    assert problems(namespace) == []


def test_a_preload_at_a_prompt_refuses_what_is_no_priority(
    namespace: str, new_manager: NewManager, capsys: pytest.CaptureFixture[str]
) -> None:
    new_manager()
    assert main(["preload", "a", "test_priority:load_anywhere", "--priority", "11"]) == 2
    assert "priority=11: expected a whole number from -10 to 10" in capsys.readouterr().err
    assert read_snapshot(namespace).models == ()


def test_a_requests_own_priority_takes_the_place_of_the_models(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(max_model_copies=1)
    manager.set_request_defaults("a", priority=-4)
    seen: list[int] = []
    for options in (AcquireOptions(), AcquireOptions(priority=3)):
        with manager.model("a", Loads()):
            thread, outcome = in_thread(partial(use_by_another, manager, options))
            wait_until(lambda: waiting(namespace, "a"), "it waits")
            seen += [one.urgency for one in waiting(namespace, "a")]
        thread.join()
        assert outcome == [None]
    assert seen == [-4, 3]


def use_by_another(manager: ModelManager, options: AcquireOptions) -> None:
    """Use the model by another manager of the namespace."""
    with ModelManager(namespace=manager.namespace) as other, other.model("a", Loads(), **options):
        pass
