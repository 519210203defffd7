"""Fairness with real processes: no request waits forever, and no model is loaded twice for nothing."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from harness import (
    NewDevice,
    NewGate,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    force_reset,
    learn,
    model_of,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Gate, Loads, LoadsServer
from patience import Stopwatch

from mpmm.policy.view import Reason
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Instance
from mpmm.shared_state.snapshot import read_snapshot

HOLD_S = 0.2
LOAD_S = 0.3


def hold_until(seat: Seat, tag: str, stop: Gate) -> tuple[float, int]:
    """Use a model for a while, again and again until the gate is open; return the longest hold, and how many."""
    longest, rounds = 0.0, 0
    while not stop.is_open():
        with seat.manager.model(tag, Loads(tag)):
            began = time.monotonic()
            time.sleep(HOLD_S)
            longest = max(longest, time.monotonic() - began)
        rounds += 1
    return longest, rounds


def load_slowly() -> str:
    """A loader that takes a while."""
    time.sleep(LOAD_S)
    return "slow"


def timed_acquire(seat: Seat, tag: str) -> tuple[float, float]:
    """Acquire and release a slowly loading model; return how long that took, here and without other load."""
    watch = Stopwatch()
    with seat.manager.model(tag, load_slowly):
        return watch.s(), watch.calm_s()


def use(seat: Seat, tag: str, loader: Loads) -> None:
    """Acquire and release a model."""
    with seat.manager.model(tag, loader):
        pass


def acquire_in_threads(seat: Seat, tag: str, count: int) -> None:
    """Use a model in several threads at once."""
    threads = [threading.Thread(target=use, args=(seat, tag, Loads())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_an_unknown_model_under_hot_callers_that_never_pause_is_served_within_two_holds_and_its_load(
    namespace: str, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate
) -> None:
    device = new_device(1000)
    arguments = {"memory_source": device, "poll_interval": 0.05}
    cold, *hot = (new_process(**arguments) for _ in range(5))
    cold.call(learn, **{f"hot{number}": 100 for number in range(4)})
    stop = new_gate()
    for number, process in enumerate(hot):
        process.send(hold_until, f"hot{number}", stop)
    wait_until(lambda: read_snapshot(namespace).hits >= 8, "the callers are hot")
    _, waited = cold.call(timed_acquire, "cold")
    stop.open()
    held = [process.result() for process in hot]
    longest = max(seconds for seconds, _ in held)
    assert waited <= 2 * longest + LOAD_S, (
        f"{waited:.2f} s for a load of {LOAD_S} s, the longest hold was {longest:.2f} s"
    )
    assert problems(namespace) == []


def test_an_unknown_model_is_served_although_callers_of_a_hot_model_wait_for_each_other(
    namespace: str, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate
) -> None:
    # With one copy, each release hands it to a caller that waits already.
    arguments = {"memory_source": new_device(1000), "poll_interval": 0.05, "max_model_copies": 1}
    cold, *hot = (new_process(**arguments) for _ in range(4))
    cold.call(learn, hot=100)
    stop = new_gate()
    for process in hot:
        process.send(hold_until, "hot", stop)
    wait_until(lambda: read_snapshot(namespace).hits >= 3 and waiting(namespace, "hot"), "the callers are hot")
    _, waited = cold.call(timed_acquire, "cold")
    stop.open()
    longest = max(process.result()[0] for process in hot)
    assert waited <= 2 * longest + LOAD_S + 0.5, f"{waited:.2f} s, the longest hold was {longest:.2f} s"
    assert problems(namespace) == []


@pytest.mark.parametrize("wait_for", ["a copy", "a lease"])
def test_requests_that_hold_up_nobody_do_not_when_there_are_many_of_them(
    wait_for: str, namespace: str, new_process: NewProcess
) -> None:
    holder, crowd, user = (new_process(max_model_copies=1) for _ in range(3))
    holder.call(learn, crowded=500, small=100, other=100)
    if wait_for == "a copy":
        holder.call(acquire, "crowded")
    else:
        holder.call(reserve, 800)
    crowd.send(acquire_in_threads, "crowded", 40)
    wait_until(lambda: model_of(namespace, "crowded").waiting == 40, "forty wait")
    user.call(acquire, "small")
    user.call(acquire, "other")
    assert model_of(namespace, "crowded").waiting == 40
    holder.call(release if wait_for == "a copy" else end_leases)
    crowd.result()
    assert problems(namespace) == []


def reserve(seat: Seat, mb: float) -> None:
    """Take a lease."""
    seat.held.append(("", seat.manager.reserve(mb)))


def end_leases(seat: Seat) -> None:
    """End all leases."""
    for _, lease in seat.held:
        lease.release()
    seat.held.clear()


def test_an_idle_copy_is_reused_however_many_wait_for_room(namespace: str, new_process: NewProcess) -> None:
    holder, crowd, user = (new_process(max_overtake_seconds=60.0) for _ in range(3))
    holder.call(learn, held=500, big=900, small=100)
    user.call(acquire, "small")
    user.call(release)
    holder.call(acquire, "held")
    crowd.send(acquire_in_threads, "big", 40)
    wait_until(lambda: model_of(namespace, "big").waiting == 40, "forty wait for room")
    user.call(acquire, "small")
    assert model_of(namespace, "big").waiting == 40
    user.call(release)
    holder.call(release)
    crowd.result()
    assert problems(namespace) == []


def test_unknown_models_that_fit_are_measured_with_nothing_flushed(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(memory_source="host", memory_budget_mb=16000, default_estimate_mb=1000)
    tags = [f"model{number}" for number in range(6)]
    for at, _ in enumerate(tags):
        for tag in (tags[at], *tags[:at]):
            manager.release_model(tag, manager.acquire_model(tag, LoadsServer(f"served-{tag}")))
    snapshot = read_snapshot(namespace)
    assert (snapshot.loads, snapshot.evictions) == (6, 0)
    assert all(model.estimate_mb and model.measured for model in snapshot.models)


def test_a_stream_of_unknown_models_does_not_starve_a_known_one(
    namespace: str, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate
) -> None:
    stop = new_gate()
    arguments = {"memory_source": new_device(1000), "poll_interval": 0.05, "max_overtake_seconds": 0.3}
    newcomers = [new_process(**arguments) for _ in range(2)]
    known = new_process(**arguments)
    known.call(learn, known=900)
    for number, process in enumerate(newcomers):
        process.send(acquire_strangers, number, stop)
    wait_until(lambda: read_snapshot(namespace).loads >= 2, "newcomers come in")
    _, waited = known.call(timed_acquire, "known")
    stop.open()
    for process in newcomers:
        process.result()
    # Twelve uses by each process take this long, and the known model would have come after all of them.
    assert waited < 2.4
    assert problems(namespace) == []


def acquire_strangers(seat: Seat, process: int, stop: Gate) -> None:
    """Load unknown models, one after the other, until the gate is open."""
    for number in itertools.count():
        if stop.is_open():
            return
        with seat.manager.model(f"stranger-{process}-{number}", Loads()):
            time.sleep(0.1)


def test_the_waiters_of_a_model_are_served_together_before_it_goes(namespace: str, new_process: NewProcess) -> None:
    users = [new_process(fallback_memory_mb=100) for _ in range(3)]
    other = new_process(fallback_memory_mb=100)
    users[0].call(acquire, "a")
    other.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "somebody waits for room")
    for process in users[1:]:
        process.send(timed_acquire, "a")
    wait_until(lambda: model_of(namespace, "a").waiting == 2, "two wait for the copy in use")
    users[0].call(release)
    for process in (*users[1:], other):
        process.result()
    snapshot = read_snapshot(namespace)
    assert (snapshot.loads, snapshot.evictions) == (2, 1)
    overtaking = [event for event in snapshot.events if event.reason == Reason.OVERTAKES]
    assert [(event.tag, event.other) for event in overtaking] == [("a", "b")] * 2


def test_at_a_cold_start_nobody_loads_what_another_process_loads_or_holds(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    first, *others = (new_process(poll_interval=0.05) for _ in range(3))
    began, go = new_gate(), new_gate()
    first.send(use, "a", Loads(began=began, go=go))
    began.wait()
    # A load that is over at once would be repeated if the first one were held for longer than that on a busy machine.
    others[0].call(pretend_to_load_for, 10.0)
    for process in others:
        process.send(use, "a", Loads())
    wait_until(lambda: model_of(namespace, "a").waiting == 2, "two wait for the load")
    go.open()
    for process in (first, *others):
        process.result()
    assert read_snapshot(namespace).loads == 1


def pretend_to_load_for(seat: Seat, seconds: float) -> None:
    """Have the loads in progress seem to have begun earlier."""
    namespace = seat.manager._connected().namespace
    tables = namespace.tables
    with namespace.transaction() as t:
        for row in tables.rows_where(namespace.segment.layout.instances, Instance.STATE, Instance.LOADING):
            t.set(tables.instance(row) + Instance.SINCE, tables.instances[row].since - to_ns(seconds))


def test_a_hung_load_is_waited_for_only_until_another_one_is_sooner(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    hung, other = (new_process(poll_interval=0.05) for _ in range(2))
    hung.call(timed_acquire, "slow")
    hung.call(force_reset)
    began, go = new_gate(), new_gate()
    hung.send(acquire, "slow", Loads(began=began, go=go))
    began.wait()
    waited, _ = other.call(timed_acquire, "slow")
    assert waited >= LOAD_S, "it waits at first"
    assert read_snapshot(namespace).loads == 2
    go.open()
    hung.result()


def test_a_hold_that_outlasts_a_load_is_waited_for_no_longer(namespace: str, new_process: NewProcess) -> None:
    holder, other = (new_process(poll_interval=0.05) for _ in range(2))
    holder.call(acquire, "slow", load_slowly)
    waited, _ = other.call(timed_acquire, "slow")
    assert waited >= LOAD_S
    assert read_snapshot(namespace).loads == 2


def test_a_small_load_goes_on_beside_the_room_of_a_big_one(namespace: str, new_process: NewProcess) -> None:
    holder, big, small = (new_process() for _ in range(3))
    holder.call(learn, held=300, big=800, small=100)
    holder.call(acquire, "held")
    big.send(acquire, "big")
    wait_until(lambda: model_of(namespace, "big").waiting, "the big one waits for room")
    small.call(acquire, "small")
    assert [event.tag for event in read_snapshot(namespace).events if event.reason == Reason.BACKFILL] == ["small"]
    holder.call(release)
    big.result()
    assert problems(namespace) == []
