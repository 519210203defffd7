"""ModelManager: its promises, with several real processes on one state."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from harness import (
    NewDevice,
    NewGate,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    know,
    learn,
    model_of,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Gate, LoadFails, Loads, LoadsObject
from patience import Stopwatch

from mpmm.errors import (
    AcquireTimeoutError,
)
from mpmm.observability.inspect_screen import render
from mpmm.shared_state.layout import Model
from mpmm.shared_state.snapshot import read_snapshot


def longest_round(seat: Seat, tag: str, rounds: int) -> float:
    """Return the seconds of the slowest of several warm rounds of acquire and release."""
    longest = 0.0
    for _ in range(rounds):
        watch = Stopwatch()
        copy = seat.manager.acquire_model(tag, Loads(tag))
        seat.manager.release_model(tag, copy)
        longest = max(longest, watch.calm_s())
    return longest


def use_until(seat: Seat, tag: str, stop: Gate) -> int:
    """Acquire and release a model again and again until the gate is open; return how often."""
    rounds = 0
    while not stop.is_open():
        with seat.manager.model(tag, Loads(tag)):
            rounds += 1
    return rounds


# ---- loads run outside every lock --------------------------------------------------------------------------


def test_a_load_in_one_process_holds_up_nobody_who_reuses_another_model(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    loader, user = new_process(), new_process()
    user.call(longest_round, "warm", 1)
    longest: list[float] = []
    # If a load held anything up, every attempt would show it; a machine that is busy elsewhere does not spoil all.
    for _ in range(3):
        began, go = new_gate(), new_gate()
        loader.send(acquire, f"slow{len(longest)}", Loads("slow", began, go))
        began.wait()
        longest.append(user.call(longest_round, "warm", 200))
        assert not loader.has_result()
        assert read_snapshot(namespace).loading == 1
        go.open()
        loader.result()
        if longest[-1] < 0.05:
            break
    assert min(longest) < 0.05


def test_two_loads_that_fit_run_side_by_side(namespace: str, new_process: NewProcess, new_gate: NewGate) -> None:
    first, second = new_process(), new_process()
    go = new_gate()
    gates = [new_gate(), new_gate()]
    first.send(acquire, "a", Loads("a", gates[0], go))
    second.send(acquire, "b", Loads("b", gates[1], go))
    for gate in gates:
        gate.wait()
    assert read_snapshot(namespace).loading == 2
    go.open()
    assert first.result() != second.result()
    assert problems(namespace) == []


def take_times(seat: Seat, tag: str, load_s: float, hold_s: float) -> None:
    """Enter the durations of a model's loads and holds in the tables."""
    namespace = seat.manager._connected().namespace
    with namespace.transaction() as t:
        at = namespace.tables.model(namespace.transitions.models.claim(t, tag, tag.encode()))
        t.set_float(at + Model.LOAD_S, load_s)
        t.set_float(at + Model.HOLD_S, hold_s)


def test_two_copies_of_one_model_load_side_by_side_when_both_are_wanted_and_fit(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    first, second = new_process(), new_process()
    go, gates = new_gate(), [new_gate(), new_gate()]
    # Held so much longer than it loads that no request waits for another's load.
    first.call(take_times, "a", 0.1, 60.0)
    for process, gate in zip((first, second), gates, strict=True):
        process.send(acquire, "a", Loads("a", gate, go))
    for gate in gates:
        gate.wait()
    assert model_of(namespace, "a").loading == 2
    go.open()
    assert first.result() != second.result()


# ---- memory is counted once --------------------------------------------------------------------------------


def test_a_reservation_stands_until_a_sample_has_seen_the_load(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device, poll_interval=0.05)
    impatient = new_manager(memory_source=device, poll_interval=0.05, wait_timeout_seconds=0.3)
    know(manager, a=400, b=400, c=300, d=200)
    device.go_dark()
    held = [(tag, manager.acquire_model(tag, LoadsObject(tag, device=device, mb=400))) for tag in "ab"]
    [info] = read_snapshot(namespace).devices
    assert (info.used_mb, info.reserved_mb) == (0, 800)
    with pytest.raises(AcquireTimeoutError, match="last reason: in_use: waits: needs 300 MB, 200 free"):
        impatient.acquire_model("c", LoadsObject("c", device=device, mb=300))
    device.come_back()
    wait_until(lambda: read_snapshot(namespace).devices[0].reserved_mb == 0, "the sample settles the reservations")
    assert read_snapshot(namespace).devices[0].used_mb == 800
    with pytest.raises(AcquireTimeoutError):
        impatient.acquire_model("c", LoadsObject("c", device=device, mb=300))
    # Seen by the sample and no longer reserved: counted once, so this one fits.
    held.append(("d", manager.acquire_model("d", LoadsObject("d", device=device, mb=200))))
    assert problems(namespace) == []
    for tag, copy in held:
        manager.release_model(tag, copy)


def test_admission_waits_for_unloaded_memory_instead_of_evicting_more(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000, linger_s=0.5)
    manager = new_manager(memory_source=device, poll_interval=0.05)
    know(manager, old=600, other=300, new=650)
    for tag, mb in (("old", 600), ("other", 300)):
        with manager.model(tag, LoadsObject(tag, device=device, mb=mb)):
            pass
    began = time.monotonic()
    # The device refuses what does not fit, so a load that came too early would raise MemoryError.
    with manager.model("new", LoadsObject("new", device=device, mb=650)):
        assert time.monotonic() - began > 0.4
    snapshot = read_snapshot(namespace)
    assert (snapshot.evictions, model_of(namespace, "other").loaded) == (1, 1)
    assert snapshot.written_off_mb == 0


def test_memory_that_comes_back_a_moment_after_the_unload_is_noticed_before_the_next_poll(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000, linger_s=0.3)
    manager = new_manager(memory_source=device, poll_interval=3600)
    know(manager, a=600, b=600)
    with manager.model("a", LoadsObject("a", device=device, mb=600)):
        pass
    manager.unload("a")
    wait_until(lambda: not read_snapshot(namespace).devices[0].returning_mb, "a sample shows that the memory is back")
    assert device.used_mb() == 0
    with manager.model("b", LoadsObject("b", device=device, mb=600)):
        pass


def test_memory_that_does_not_come_back_is_written_off_after_a_while_and_that_is_logged_and_shown(
    namespace: str, new_manager: NewManager, new_device: NewDevice, caplog: pytest.LogCaptureFixture
) -> None:
    device = new_device(1000, linger_s=3600)
    manager = new_manager(memory_source=device, poll_interval=0.05, memory_return_seconds=0.3)
    know(manager, leaky=400, second=300, new=600)
    for tag, mb in (("leaky", 400), ("second", 300)):
        with manager.model(tag, LoadsObject(tag, device=device, mb=mb)):
            pass
    manager.force_reset()
    wait_until(lambda: read_snapshot(namespace).written_off_mb == 700, "the missing memory is written off")
    assert read_snapshot(namespace).devices[0].returning_mb == 0
    wait_until(lambda: "did not come back in time and are written off" in caplog.text, "it is logged")
    assert "note: 700 MB that were unloaded never came back" in render(read_snapshot(namespace))


def test_the_load_after_an_eviction_is_counted_like_any_other(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=250)
    for tag in "abcd":
        with manager.model(tag, Loads(tag)):
            snapshot = read_snapshot(namespace)
            assert snapshot.devices[0].used_mb == min(200, 100 * snapshot.loads)
    snapshot = read_snapshot(namespace)
    assert (snapshot.loads, snapshot.evictions) == (4, 2)
    assert sorted(copy.tag for copy in snapshot.instances) == ["c", "d"]
    assert problems(namespace) == []


def test_accounts_after_five_hundred_random_rounds_of_eight_processes_equal_a_recount(
    namespace: str, new_process: NewProcess
) -> None:
    workers = [new_process(fallback_memory_mb=400, poll_interval=0.1) for _ in range(8)]
    for seed, worker in enumerate(workers):
        worker.send(random_rounds, seed, 63)
    while not all(worker.has_result() for worker in workers):
        assert problems(namespace) == []
        time.sleep(0.01)
    rounds = sum(worker.result() for worker in workers)
    snapshot = read_snapshot(namespace)
    assert rounds == 504
    assert snapshot.loads + snapshot.hits == rounds
    assert snapshot.evictions > 0
    assert (snapshot.active, snapshot.loading, snapshot.waiting, snapshot.failed_loads) == (0, 0, 0, 0)
    assert sum(model.loads for model in snapshot.models) == snapshot.loads
    assert len(snapshot.instances) <= 4
    assert problems(namespace) == []


def random_rounds(seat: Seat, seed: int, rounds: int) -> int:
    """Acquire and release random models, now and then as an object."""
    chance = random.Random(seed)
    for _ in range(rounds):
        tag = chance.choice("abcdef")
        loader = LoadsObject(tag) if chance.random() < 0.2 else Loads(tag)
        with seat.manager.model(tag, loader):
            pass
    return rounds


# ---- distribution ------------------------------------------------------------------------------------------


def test_a_release_hands_the_copy_straight_to_the_first_who_waits(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(fallback_memory_mb=100)
    copy = manager.acquire_model("a", Loads("a"))
    first, second = new_process(), new_process()
    first.send(acquire, "a", Loads("never"))
    wait_until(lambda: len(waiting(namespace, "a")) == 1, "the first one waits")
    second.send(acquire, "a", Loads("never"))
    wait_until(lambda: len(waiting(namespace, "a")) == 2, "the second one waits")
    manager.release_model("a", copy)
    assert first.result() == copy
    assert not second.has_result()
    first.call(release)
    assert second.result() == copy
    second.call(release)
    assert (model_of(namespace, "a").loads, model_of(namespace, "a").hits) == (1, 2)


def test_an_idle_copy_is_reused_by_every_process(namespace: str, new_process: NewProcess) -> None:
    first, second = new_process(), new_process()
    copy = first.call(acquire, "a")
    first.call(release)
    assert second.call(acquire, "a", LoadFails("not to be called")) == copy
    second.call(release)
    assert model_of(namespace, "a").hits == 1


def test_an_object_is_reused_only_by_the_process_that_loaded_it(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process()
    mine = manager.acquire_model("a", LoadsObject("mine"))
    manager.release_model("a", mine)
    assert other.call(acquire, "a", LoadsObject("theirs")) == "Weights"
    assert model_of(namespace, "a").loads == 2
    assert manager.acquire_model("a", LoadFails("not to be called")) is mine
    # Its own copy is busy and the other's idle one is of no use to it.
    other.call(release)
    second = manager.acquire_model("a", LoadsObject("mine too"))
    assert second is not mine
    assert model_of(namespace, "a").loads == 3
    manager.release_model("a", mine)
    manager.release_model("a", second)


def test_an_object_is_evicted_through_its_idle_owner_when_another_process_needs_room(
    namespace: str, new_process: NewProcess, new_device: NewDevice
) -> None:
    device = new_device(1000)
    owner, needy = new_process(memory_source=device), new_process(memory_source=device)
    owner.call(learn, big=700, other=600)
    owner.call(acquire, "big", LoadsObject("big", device=device, mb=700))
    owner.call(release)
    assert device.used_mb() == 700
    # The owner does nothing but wait for our next word; its background thread unloads.
    needy.call(acquire, "other", LoadsObject("other", device=device, mb=600))
    assert device.used_mb() == 600
    assert copies_of(namespace, "big") == []
    assert problems(namespace) == []


def test_a_big_waiting_model_is_not_overtaken_for_longer_than_the_bound(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_gate: NewGate
) -> None:
    manager = new_manager(max_overtake_seconds=0.5)
    know(manager, big=1000, small=100)
    stop = new_gate()
    busy = [new_process() for _ in range(3)]
    for process in busy:
        process.send(use_until, "small", stop)
    wait_until(lambda: read_snapshot(namespace).hits > 20, "the traffic is hot")
    watch = Stopwatch()
    with manager.model("big", Loads("big")):
        waited = watch.calm_s()
        hits = read_snapshot(namespace).hits
    wait_until(lambda: read_snapshot(namespace).hits > hits, "the traffic goes on after it")
    stop.open()
    assert all(process.result() > 0 for process in busy)
    assert waited < 2.0
    assert problems(namespace) == []


def test_an_unknown_model_goes_first_and_runs_alone_to_be_measured(
    namespace: str, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate
) -> None:
    device = new_device(1000)
    arguments: dict[str, Any] = {"memory_source": device, "poll_interval": 0.05}
    holder, known, unknown = (new_process(**arguments) for _ in range(3))
    holder.call(learn, held=900, known=200)
    holder.call(acquire, "held", LoadsObject("held", device=device, mb=900))
    known.send(acquire, "known", LoadsObject("known", device=device, mb=200))
    wait_until(lambda: waiting(namespace, "known"), "the known model waits for memory")
    began, go = new_gate(), new_gate()
    unknown.send(acquire, "unknown", LoadsObject("unknown", began, go, device, 300))
    wait_until(lambda: waiting(namespace, "unknown"), "the unknown model waits for the others to finish")
    assert [(ticket.tag, ticket.priority) for ticket in waiting(namespace)] == [("unknown", 0), ("known", 1)]
    holder.call(release)
    began.wait()
    # Everything else was unloaded, and no other request is admitted although there is room.
    assert device.used_mb() == 0
    assert read_snapshot(namespace).isolated is not None
    assert [ticket.tag for ticket in waiting(namespace)] == ["known"]
    go.open()
    unknown.result()
    assert [ticket.tag for ticket in waiting(namespace)] == ["known"]
    assert problems(namespace) == []
    unknown.call(release)
    known.result()
    assert read_snapshot(namespace).isolated is None
    assert model_of(namespace, "unknown").estimate_mb == 300
    known.call(release)


def test_a_model_that_ran_alone_does_so_no_more_once_it_is_released_to_another(
    namespace: str, new_process: NewProcess, new_device: NewDevice
) -> None:
    arguments: dict[str, Any] = {"memory_source": new_device(1000), "poll_interval": 0.05, "max_model_copies": 1}
    first, second, other = (new_process(**arguments) for _ in range(3))
    other.call(learn, other=100)
    first.call(acquire, "unknown")
    assert read_snapshot(namespace).isolated is not None
    second.send(acquire, "unknown")
    wait_until(lambda: waiting(namespace, "unknown"), "the next one waits for it")
    first.call(release)
    second.result()
    # It is in use still, but no more to be measured.
    assert read_snapshot(namespace).isolated is None
    other.call(acquire, "other")
    assert problems(namespace) == []


def test_isolation_can_be_entered_by_hand_for_the_next_load(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device, poll_interval=0.05, lock_timeout_seconds=1.0)
    other = new_process(memory_source=device)
    know(manager, known=200)
    other.call(acquire, "known", LoadsObject("known", device=device, mb=200))
    assert not manager.try_enter_isolation_mode("unknown", 1), "while another copy is in use"
    other.call(release)
    assert manager.try_enter_isolation_mode("unknown", 2)
    assert device.used_mb() == 0
    other.send(acquire, "known", LoadsObject("known", device=device, mb=200))
    wait_until(lambda: waiting(namespace, "known"), "others wait")
    copy = manager.acquire_model("unknown", LoadsObject("unknown", device=device, mb=300))
    assert not other.has_result()
    manager.release_model("unknown", copy)
    other.result()
    assert model_of(namespace, "unknown").estimate_mb == 300
    assert not manager.try_enter_isolation_mode("known", 3), "a model that is known need not run alone"
    assert problems(namespace) == []


def test_memory_can_be_reserved_by_hand_for_the_next_load(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=250, lock_timeout_seconds=2.5)
    held = manager.acquire_model("held", Loads("held"))
    assert manager.should_spawn_model("a", 1)
    assert (read_snapshot(namespace).loading, read_snapshot(namespace).devices[0].reserved_mb) == (1, 100)
    assert not manager.should_spawn_model("b", 2), "there is no room for a third one"
    copy = manager.acquire_model("a", Loads("a"))
    snapshot = read_snapshot(namespace)
    assert (snapshot.loading, snapshot.active) == (0, 2)
    manager.release_model("a", copy)
    manager.release_model("held", held)
    assert manager.should_spawn_model("b", 3), "now somebody idle can be evicted"
    manager.release_model("b", manager.acquire_model("b", Loads("b")))
    assert problems(namespace) == []
