"""ModelManager: what it promises, with several real processes on one state."""

from __future__ import annotations

import gc
import logging
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from harness import (
    NewDevice,
    NewGate,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    attach,
    copies_of,
    learn,
    model_of,
    problems,
    release,
    shut_down,
    wait_until,
    waiting,
)
from loaders import Gate, LoadFails, Loads, LoadsObject, Weights

from mpmm.errors import (
    AcquireTimeoutError,
    ClosedError,
    InvalidArgumentError,
    ModelTooLargeError,
    NamespaceResetError,
    NotAcquiredError,
    TableFullError,
)
from mpmm.model_manager import ModelManager
from mpmm.observability.inspect_screen import render
from mpmm.shared_state.layout import Capacities, Model
from mpmm.shared_state.snapshot import find_namespaces, read_snapshot


def know(manager: ModelManager, **estimates_mb: float) -> None:
    """Tell the estimator what models take."""
    learn(Seat(manager), **estimates_mb)


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run a call in a thread; its outcome, or exception, appears in the list."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def longest_round(seat: Seat, tag: str, rounds: int) -> float:
    """Return the seconds that the slowest of so many warm rounds of acquire and release took."""
    longest = 0.0
    for _ in range(rounds):
        began = time.monotonic()
        copy = seat.manager.acquire_model(tag, Loads(tag))
        seat.manager.release_model(tag, copy)
        longest = max(longest, time.monotonic() - began)
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
    """Let a model be taken for one that loads and is held for so long."""
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
    # Held for so much longer than it loads, that nobody waits for the load of another.
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
    manager = new_manager(memory_source=device, poll_interval=0.05, wait_timeout_seconds=0.3)
    know(manager, a=400, b=400, c=300, d=200)
    device.go_dark()
    held = [(tag, manager.acquire_model(tag, LoadsObject(tag, device=device, mb=400))) for tag in "ab"]
    [info] = read_snapshot(namespace).devices
    assert (info.used_mb, info.reserved_mb) == (0, 800)
    with pytest.raises(AcquireTimeoutError, match="last reason: in_use: waits: needs 300 MB, 200 free"):
        manager.acquire_model("c", LoadsObject("c", device=device, mb=300))
    device.come_back()
    wait_until(lambda: read_snapshot(namespace).devices[0].reserved_mb == 0, "the sample settles the reservations")
    assert read_snapshot(namespace).devices[0].used_mb == 800
    with pytest.raises(AcquireTimeoutError):
        manager.acquire_model("c", LoadsObject("c", device=device, mb=300))
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


def test_books_after_five_hundred_random_rounds_of_eight_processes_equal_a_recount(
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


# ---- who gets what -----------------------------------------------------------------------------------------


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
    began = time.monotonic()
    with manager.model("big", Loads("big")):
        waited = time.monotonic() - began
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
    # Everything else was unloaded, and nobody else gets in although there would be room.
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


# ---- models that cannot be had -----------------------------------------------------------------------------


def test_a_model_larger_than_the_limit_is_refused_at_once(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(slack_percentage=0.1)
    know(manager, huge=901)
    held = manager.acquire_model("small", Loads())
    with pytest.raises(ModelTooLargeError, match="'huge' needs 901 MB, and the limit of 'booked' is 900 MB") as caught:
        manager.acquire_model("huge", LoadFails("not to be called"))
    error = caught.value
    assert (error.tag, error.need_mb, error.limit_mb, error.device) == ("huge", 901, 900, "booked")
    assert isinstance(error, MemoryError)
    assert waiting(namespace) == []
    manager.release_model("small", held)
    assert problems(namespace) == []


def test_the_limit_is_that_of_the_roomiest_device(new_manager: NewManager, new_device: NewDevice) -> None:
    device = new_device(500, 1000)
    manager = new_manager(memory_source=device)
    know(manager, fits=1000, huge=1001)
    with pytest.raises(ModelTooLargeError, match="device 1"):
        manager.acquire_model("huge", LoadFails("not to be called"))
    with manager.model("fits", LoadsObject("fits", device=device, mb=1000, index=1)):
        assert device.used_mb(1) == 1000


def test_two_gpus_in_the_answer_of_nvidia_smi_are_two_devices(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "memory.total": "1000\n2000\n",
        "uuid,memory.free": "GPU-a, 900\nGPU-b, 1500\n",
        "uuid,name": "GPU-a, Small\nGPU-b, Big\n",
    }

    def nvidia_smi(command: list[str], **_: Any) -> str:
        return answers[command[1].removeprefix("--query-gpu=")]

    monkeypatch.setattr("subprocess.check_output", nvidia_smi)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    manager = new_manager(memory_source="nvidia-smi")
    devices = read_snapshot(namespace).devices
    assert [(d.uuid, d.total_mb, d.used_mb) for d in devices] == [("GPU-a", 1000, 100), ("GPU-b", 2000, 500)]
    assert manager._monitor.get_stats() == (600, 600, 3000)
    know(manager, small=800, big=1500)
    with manager.model("big", Loads("big")), manager.model("small", Loads("small")):
        assert {copy.tag: copy.device for copy in read_snapshot(namespace).instances} == {"big": 1, "small": 0}


def test_without_a_gpu_the_books_are_the_figures(new_manager: NewManager) -> None:
    manager = new_manager()
    assert manager._monitor.get_stats() == (0, 0, 1000)
    with manager.model("a", Loads()), manager.model("b", Loads()):
        assert manager._monitor.get_stats() == (200, 200, 1000)
    know(manager, c=900)
    with manager.model("c", Loads()):
        assert manager._monitor.get_stats()[0] == 1000
        assert sum(map(len, manager.all_models().values())) == 2, "one of the two made room"


def test_a_wait_ends_at_the_time_out_and_says_what_it_waited_for(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=100, wait_timeout_seconds=0.2)
    held = manager.acquire_model("a", Loads())
    with pytest.raises(
        AcquireTimeoutError, match=r"waiting to acquire model: b .*last reason: in_use: waits: needs 100 MB, 0 free"
    ) as caught:
        manager.acquire_model("b", Loads())
    assert caught.value.tag == "b"
    assert isinstance(caught.value, RuntimeError)
    assert waiting(namespace) == []
    manager.release_model("a", held)
    assert problems(namespace) == []


# ---- releases that are wrong -------------------------------------------------------------------------------


def test_releasing_twice_is_an_error_and_changes_nothing(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    handle = manager.acquire_model("a", Loads())
    manager.release_model("a", handle)
    before = read_snapshot(namespace).instances[0].generation, model_of(namespace, "a").idle
    with pytest.raises(NotAcquiredError, match=f"this process does not hold '{handle}'") as caught:
        manager.release_model("a", handle)
    assert caught.value.tag == "a"
    assert (read_snapshot(namespace).instances[0].generation, model_of(namespace, "a").idle) == before == (before[0], 1)
    thing = manager.acquire_model("b", LoadsObject())
    manager.release_model("b", thing)
    with pytest.raises(NotAcquiredError, match="this Weights"):
        manager.release_model("b", thing)


def test_releasing_what_was_never_acquired_is_an_error(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process()
    theirs = other.call(acquire, "a")
    for instance in (theirs, "unheard of", object()):
        with pytest.raises(NotAcquiredError):
            manager.release_model("a", instance)
    assert model_of(namespace, "a").active == 1
    other.call(release)


def test_a_wrong_tag_with_the_right_handle_is_put_up_with_and_logged(
    namespace: str, new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = new_manager()
    handle = manager.acquire_model("right", Loads())
    with caplog.at_level(logging.WARNING, "mpmm"):
        manager.release_model("wrong", handle)
    assert "a copy of 'right' was released as 'wrong'" in caplog.text
    assert model_of(namespace, "right").idle == 1
    assert [model.tag for model in read_snapshot(namespace).models] == ["right"]


def test_the_tag_tells_equal_copies_of_two_models_apart(
    namespace: str, new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = new_manager()
    for same in ("same", Weights()):
        for tag in "abc":
            manager.acquire_model(tag, lambda same=same: same)  # type: ignore[misc]  # mypy: a lambda with a default
        for tag in "bac":
            manager.release_model(tag, same)
            assert (model_of(namespace, tag).active, model_of(namespace, tag).idle) == (0, 1)
        manager.force_reset()
    assert "released as" not in caplog.text


# ---- loaders -----------------------------------------------------------------------------------------------


def test_what_a_loader_raises_arrives_unchanged(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    error = KeyError("weights")

    def load() -> str:
        raise error

    with pytest.raises(KeyError) as caught:
        manager.acquire_model("a", load)
    assert caught.value is error
    snapshot = read_snapshot(namespace)
    assert (snapshot.loading, snapshot.failed_loads, snapshot.devices[0].reserved_mb) == (0, 1, 0)
    assert problems(namespace) == []
    with manager.model("a", Loads()):
        pass


def test_after_a_failed_load_the_next_waiter_proceeds(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    failing, next_one = new_process(fallback_memory_mb=100), new_process()
    began, go = new_gate(), new_gate()
    failing.send(acquire, "a", LoadFails("no such file", began, go))
    began.wait()
    next_one.send(acquire, "b", Loads("b"))
    wait_until(lambda: waiting(namespace, "b"), "the next one waits")
    go.open()
    with pytest.raises(OSError, match="no such file"):
        failing.result()
    assert next_one.result().startswith("b-")
    assert problems(namespace) == []


def test_a_model_whose_memory_could_not_be_read_while_it_ran_alone_stays_unknown(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device, memory_return_seconds=0.1)

    def load_in_the_dark() -> Any:
        device.go_dark()
        return LoadsObject("a", device=device, mb=300)()

    with manager.model("a", load_in_the_dark):
        assert read_snapshot(namespace).isolated is not None
    assert model_of(namespace, "a").estimate_mb is None
    device.come_back()
    with manager.model("a", LoadFails("there is an idle copy")):
        pass
    manager.force_reset()
    wait_until(lambda: device.used_mb() == 0, "the copy is unloaded")
    with manager.model("a", LoadsObject("a", device=device, mb=300)):
        assert read_snapshot(namespace).isolated is not None
    assert model_of(namespace, "a").estimate_mb == 300


def test_a_failed_profiling_load_ends_isolation(namespace: str, new_manager: NewManager, new_device: NewDevice) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    with pytest.raises(OSError, match="no such file"):
        manager.acquire_model("unknown", LoadFails())
    assert read_snapshot(namespace).isolated is None
    with manager.model("unknown", LoadsObject("u", device=device, mb=100)):
        assert read_snapshot(namespace).isolated is not None
    assert model_of(namespace, "unknown").estimate_mb == 100


@pytest.mark.parametrize("loaded", ["", "h" * 10000], ids=["empty", "too long"])
def test_an_impossible_handle_is_an_error_and_leaves_no_copy(
    namespace: str, new_manager: NewManager, loaded: str
) -> None:
    manager = new_manager()
    with pytest.raises(InvalidArgumentError, match="handle of 'a'"):
        manager.acquire_model("a", lambda: loaded)
    assert read_snapshot(namespace).instances == ()
    assert problems(namespace) == []


def test_none_is_an_object_like_any_other(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    for _ in range(2):
        assert manager.acquire_model("a", lambda: None) is None
        assert model_of(namespace, "a").active == 1
        manager.release_model("a", None)
    assert (model_of(namespace, "a").loads, model_of(namespace, "a").hits) == (1, 1)


def test_an_impossible_tag_or_loader_is_refused_before_anything_happens(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    for tag in ("", "t" * 600, 7, None):
        with pytest.raises(InvalidArgumentError, match="model"):
            manager.acquire_model(tag, Loads())  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InvalidArgumentError, match="'loader'"):
        manager.acquire_model("a", "loader")  # type: ignore[arg-type]  # wrong on purpose
    assert read_snapshot(namespace).models == ()


def test_the_with_block_releases_whatever_happens_in_it(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with manager.model("a", Loads("a")) as copy:
        assert copy.startswith("a-")
        assert model_of(namespace, "a").active == 1
    with pytest.raises(ZeroDivisionError), manager.model("a", Loads()):
        raise ZeroDivisionError
    assert (model_of(namespace, "a").active, model_of(namespace, "a").idle) == (0, 1)


# ---- full tables -------------------------------------------------------------------------------------------


@contextmanager
def raises_full(table: str, capacity: int) -> Iterator[None]:
    """Expect a TableFullError about one table."""
    with pytest.raises(TableFullError, match=rf"the {table} table.*Capacities\.{table}") as caught:
        yield
    assert (caught.value.table, caught.value.capacity) == (table, capacity)
    assert caught.value.setting == f"Capacities.{table}"


@pytest.mark.parametrize("table", ["models", "instances"])
def test_a_full_table_of_models_or_copies_is_an_error_that_changes_nothing(
    namespace: str, new_manager: NewManager, table: str
) -> None:
    manager = new_manager(capacities=Capacities(**{table: 2}))
    held = {tag: manager.acquire_model(tag, Loads()) for tag in "ab"}
    before = read_snapshot(namespace)
    with raises_full(table, 2):
        manager.acquire_model("c", Loads())
    after = read_snapshot(namespace)
    assert (after.models, after.waiting, after.next_ticket) == (
        tuple(before_model for before_model in after.models if before_model.tag in held),
        0,
        before.next_ticket,
    )
    assert problems(namespace) == []
    for tag, copy in held.items():
        manager.release_model(tag, copy)
    with manager.model("a", Loads()) as copy:
        assert copy == held["a"]
    assert problems(namespace) == []


def test_a_full_table_of_models_recycles_the_tag_that_was_unused_longest(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(capacities=Capacities(models=2), fallback_memory_mb=200)
    for tag in "ab":
        manager._estimator.set_initial_estimate(tag, 50)
    with manager.model("a", Loads()), manager.model("c", Loads()):
        assert {model.tag for model in read_snapshot(namespace).models} == {"a", "c"}
    assert problems(namespace) == []


def test_a_full_table_of_waiters_is_an_error_that_changes_nothing(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(capacities=Capacities(tickets=1), fallback_memory_mb=100)
    waiter = new_process()
    held = manager.acquire_model("a", Loads())
    waiter.send(acquire, "b", Loads("b"))
    wait_until(lambda: waiting(namespace, "b"), "the table is full")
    with raises_full("tickets", 1):
        manager.acquire_model("c", Loads())
    assert problems(namespace) == []
    manager.release_model("a", held)
    assert waiter.result().startswith("b-")


def test_a_full_table_of_members_is_an_error_that_changes_nothing(namespace: str, new_process: NewProcess) -> None:
    first, second = new_process(capacities=Capacities(members=1)), new_process(attached=False)
    with raises_full("members", 1):
        second.call(attach, namespace=namespace, memory_source="booked")
    first.call(acquire, "a")
    assert problems(namespace) == []
    first.call(release)
    first.call(shut_down)
    second.call(attach, namespace=namespace, memory_source="booked", fallback_memory_mb=10000)
    assert len(read_snapshot(namespace).members) == 1


def test_too_many_devices_are_an_error_that_leaves_nothing(namespace: str, new_device: NewDevice) -> None:
    with pytest.raises(TableFullError, match="2 devices, the devices table has 1 rows"):
        ModelManager(namespace=namespace, memory_source=new_device(100, 200), capacities=Capacities(devices=1))
    with pytest.raises(FileNotFoundError):
        read_snapshot(namespace)


def test_a_full_table_of_copies_troubles_nobody_but_him_who_wants_one_more(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_device: NewDevice
) -> None:
    device = new_device(1000)
    arguments: dict[str, Any] = {"memory_source": device, "poll_interval": 0.05}
    manager = new_manager(capacities=Capacities(instances=2), **arguments)
    know(manager, a=100, b=100, c=100)
    ballast = device.allocate(800)
    held = {tag: manager.acquire_model(tag, LoadsObject(tag, device=device, mb=100)) for tag in "ab"}
    waiter = new_process(**arguments)
    waiter.send(acquire, "c", LoadsObject("c", device=device, mb=100))
    wait_until(lambda: waiting(namespace, "c"), "there is no memory for a third copy")
    device.free(ballast)
    # Now there is memory but no row. Samples must go on, and so must releases.
    wait_until(lambda: read_snapshot(namespace).devices[0].used_mb == 200, "the freed memory is seen", 5)
    assert waiting(namespace, "c")
    manager.release_model("a", held.pop("a"))
    assert waiter.result(), "the idle copy has made room in the table"
    assert copies_of(namespace, "a") == []
    manager.release_model("b", held.pop("b"))
    assert problems(namespace) == []


# ---- copies of the manager: pickled, forked, several ---------------------------------------------------------


def test_a_pickled_manager_is_a_manager_on_the_same_state(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process(attached=False)
    copy = manager.acquire_model("a", Loads())
    with pickle.loads(pickle.dumps(manager)) as twin:
        assert twin.namespace == namespace
        twin.release_model("a", copy)
    assert other.call(take_over, manager, "a") == copy
    assert model_of(namespace, "a").active == 1
    other.call(release)
    # The twin has left, and this one has not.
    with manager.model("a", LoadFails("not to be called")):
        pass


def take_over(seat: Seat, manager: ModelManager, tag: str) -> Any:
    """Go on with a manager that came by pickle."""
    seat.manager = manager
    return acquire(seat, tag, LoadFails("not to be called"))


def test_a_private_namespace_goes_along_with_the_pickled_manager(new_process: NewProcess, runtime_root: Any) -> None:
    with ModelManager(memory_source="booked") as manager:
        manager.release_model("a", manager.acquire_model("a", Loads()))
        other = new_process(attached=False)
        assert other.call(take_over, manager, "a") in manager.all_models("a")
        other.call(release)
        other.call(shut_down)


def test_private_namespaces_are_separate() -> None:
    with ModelManager(memory_source="booked") as one, ModelManager(memory_source="booked") as two:
        assert one.namespace != two.namespace
        one.acquire_model("a", Loads())
        assert (len(one.all_models("a")), two.all_models("a")) == (1, [])


def test_a_forked_child_uses_the_manager_but_has_no_claim_on_what_its_parent_holds(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager()
    handle = manager.acquire_model("handle", Loads("h"))
    thing = manager.acquire_model("object", LoadsObject("o"))
    manager.release_model("object", thing)
    _inherited.update(manager=manager, handle=handle, thing=thing)
    try:
        child = new_process(attached=False)
    finally:
        _inherited.clear()
    with pytest.raises(NotAcquiredError):
        child.call(release_inherited, "handle", "handle")
    with pytest.raises(NotAcquiredError):
        child.call(release_inherited, "object", "thing")
    # The parent's object is idle, but it is the parent's.
    assert child.call(acquire_inherited, "object") is False
    assert model_of(namespace, "object").loaded == 2
    assert len(read_snapshot(namespace).members) == 2
    manager.release_model("handle", handle)
    assert child.call(acquire, "handle", LoadFails("not to be called")) == handle
    assert manager.acquire_model("object", LoadFails("not to be called")) is thing
    child.call(shut_down)
    assert (model_of(namespace, "handle").idle, model_of(namespace, "object").active) == (1, 1)
    manager.release_model("object", thing)
    assert problems(namespace) == []


_inherited: dict[str, Any] = {}


def release_inherited(seat: Seat, tag: str, what: str) -> None:
    """Try to release what the parent holds."""
    seat.manager = _inherited["manager"]
    seat.manager.release_model(tag, _inherited[what])


def acquire_inherited(seat: Seat, tag: str) -> bool:
    """Acquire an object, and return whether it is the parent's."""
    with seat.manager.model(tag, LoadsObject("child's")) as thing:
        return thing is _inherited["thing"]


def test_other_values_than_the_creators_are_reported_and_have_no_effect(
    new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    new_manager(slack_percentage=0.25)
    with caplog.at_level(logging.WARNING, "mpmm"):
        new_manager(slack_percentage=0.25, wait_timeout_seconds=1.0)
        assert caplog.text == ""
        later = new_manager(slack_percentage=0.5)
    assert "slack_percentage stays 0.25, chosen by the creator of the namespace; ignoring 0.5" in caplog.text
    know(later, a=750)
    with later.model("a", Loads()):
        pass


def test_all_models_shows_handles_own_objects_and_none_for_those_of_others(
    new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process()
    handle = other.call(acquire, "handle")
    other.call(acquire, "object", LoadsObject())
    thing = manager.acquire_model("object", LoadsObject())
    assert manager.all_models("handle") == [handle]
    assert {type(copy) for copy in manager.all_models("object")} == {type(None), Weights}
    assert thing in manager.all_models()["object"]
    assert manager.all_models("nothing") == []
    assert manager.all_models()["nothing"] == [], "Beam asks for a model that was evicted"
    manager.release_model("object", thing)


def test_an_old_version_makes_room_first_and_the_current_one_again_does_not(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(fallback_memory_mb=300.0)
    for tag in ("other", "v1", "v2"):
        manager.release_model(tag, manager.acquire_model(tag, LoadsObject()))
    manager.supersede("v1", "v2")
    manager.release_model("new", manager.acquire_model("new", LoadsObject()))
    assert set(manager.all_models()) == {"other", "v2", "new"}, "`other` has been idle for longer"
    manager.supersede("v2", "v1")
    manager.supersede("v1", "v2")
    manager.release_model("more", manager.acquire_model("more", LoadsObject()))
    assert set(manager.all_models()) == {"v2", "new", "more"}, "back at its place"
    with pytest.raises(InvalidArgumentError):
        manager.supersede("v1", "x" * 600)


# ---- reset and shutdown ------------------------------------------------------------------------------------


def test_a_reset_from_another_process_tells_everybody(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    holder, waiter, loading, other = (new_process(fallback_memory_mb=300) for _ in range(4))
    other.call(learn, big=300, known=150)
    holder.call(acquire, "held")
    began, go = new_gate(), new_gate()
    loading.send(acquire, "loading", Loads("l", began, go))
    began.wait()
    waiter.send(acquire, "big")
    wait_until(lambda: waiting(namespace, "big"), "somebody waits")
    other.call(reset)
    with pytest.raises(NamespaceResetError, match="ended the wait for 'big'"):
        waiter.result()
    with pytest.raises(NamespaceResetError, match="took 'held' away"):
        holder.call(release)
    go.open()
    with pytest.raises(NamespaceResetError, match="ended the load of 'loading'"):
        loading.result()
    snapshot = read_snapshot(namespace)
    assert (snapshot.instances, snapshot.tickets, snapshot.resets) == ((), (), 1)
    assert model_of(namespace, "known").estimate_mb == 150, "estimates stay"
    for process in (holder, waiter, loading):
        assert process.call(acquire, "again")
        process.call(release)
    assert problems(namespace) == []


def reset(seat: Seat) -> None:
    """Reset the namespace."""
    seat.manager.force_reset()


def test_shutdown_unloads_what_is_ours_and_the_last_one_everything(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process()
    thing = manager.acquire_model("object", LoadsObject())
    manager.release_model("object", thing)
    handle = manager.acquire_model("handle", Loads())
    manager.shutdown()
    manager.shutdown()
    assert thing.unloaded
    with pytest.raises(ClosedError):
        manager.acquire_model("handle", Loads())
    assert {copy.tag: copy.state for copy in read_snapshot(namespace).instances} == {"handle": "idle"}
    assert other.call(acquire, "handle", LoadFails("not to be called")) == handle
    assert problems(namespace) == []
    other.call(shut_down)
    with pytest.raises(FileNotFoundError):
        read_snapshot(namespace)


def test_two_managers_of_one_process_are_one_member_that_leaves_with_the_second(
    namespace: str, new_manager: NewManager
) -> None:
    one, two = new_manager(), new_manager()
    copy = one.acquire_model("a", Loads())
    one.shutdown()
    assert len(read_snapshot(namespace).members) == 1
    two.release_model("a", copy)
    two.shutdown()
    with pytest.raises(FileNotFoundError):
        read_snapshot(namespace)


def test_a_thread_that_waits_is_sent_away_by_its_own_processs_shutdown(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    holder, manager = new_process(fallback_memory_mb=100), new_manager()
    holder.call(acquire, "a")
    thread, outcome = in_thread(lambda: manager.acquire_model("b", Loads()))
    wait_until(lambda: waiting(namespace, "b"), "the thread waits")
    manager.shutdown()
    thread.join(5)
    assert [type(error) for error in outcome] == [ClosedError]
    assert waiting(namespace) == []


def test_a_forgotten_manager_leaves_by_itself_also_when_an_unload_collects_it(
    namespace: str, new_manager: NewManager
) -> None:
    forgotten = ModelManager(memory_source="booked")
    private = forgotten.namespace
    # In a cycle, so that only the collector finds it: that of the unload of an object, in the middle of leaving.
    cycle: list[Any] = [forgotten]
    cycle.append(cycle)
    manager = new_manager()
    manager.release_model("a", manager.acquire_model("a", LoadsObject()))
    del forgotten, cycle
    manager.shutdown()
    gc.collect()
    wait_until(lambda: private not in find_namespaces(), "it has left")
