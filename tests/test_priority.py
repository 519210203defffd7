"""Urgent requests go first, by a head start that is bounded, so that nobody starves."""

from __future__ import annotations

from dataclasses import replace

from harness import NewManager, NewProcess, Seat, acquire, learn, problems, release, wait_until, waiting
from hypothesis import given
from hypothesis import strategies as st
from loaders import Loads
from policy_views import NOW, A, model, ticket, view

from mpmm.cli import main
from mpmm.policy.fairness import HEAD_START_S, HIGHEST_URGENCY, queue_order, rank_ns, urgency_of
from mpmm.policy.view import Reason, TicketView
from mpmm.shared_state.snapshot import read_snapshot

steps = st.integers(-HIGHEST_URGENCY, HIGHEST_URGENCY)


def one(number: int, enqueued_s: float, urgency: int, of_class: int = 1) -> TicketView:
    waiter = ticket(number, A, priority=of_class, waited=NOW - enqueued_s)
    return replace(waiter, rank=rank_ns(int(enqueued_s * 1e9), urgency))


@given(st.lists(st.tuples(st.floats(0.0, 400.0), steps, st.sampled_from([1, 1, 2])), max_size=12))
def test_nobody_is_overtaken_by_one_who_comes_later_than_the_head_start_between_them(
    drawn: list[tuple[float, int, int]],
) -> None:
    came = sorted(drawn, key=lambda drawn: drawn[0])
    waiters = [one(number, NOW - 400.0 + at, urgency, kind) for number, (at, urgency, kind) in enumerate(came)]
    order = queue_order(view([model(A)], waiters))
    # Those who have waited long are of the first class, whatever they want; among these, too, the rank decides.
    for place, later in enumerate(order):
        for earlier in order[place + 1 :]:
            if earlier.enqueued_s < later.enqueued_s and earlier.priority == later.priority == 1:
                steps_between = urgency_of(int(later.enqueued_s * 1e9), later.rank) - urgency_of(
                    int(earlier.enqueued_s * 1e9), earlier.rank
                )
                promoted = later.enqueued_s <= NOW - 8.0 < earlier.enqueued_s
                assert promoted or later.enqueued_s - earlier.enqueued_s <= HEAD_START_S * steps_between + 1e-6


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
