"""The number of copies, and which ones stay loaded: limits, pins, lifetimes and preloads."""

from __future__ import annotations

import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from device import BookedDevices
from harness import (
    NewDevice,
    NewGate,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    in_thread,
    learn,
    model_of,
    problems,
    release,
    shut_down,
    wait_until,
    waiting,
)
from loaders import Gate, LoadFails, Loads, LoadsObject
from patience import DEADLINE_S, Stopwatch

from mpmm.errors import AcquireTimeoutError, InvalidArgumentError, ModelTooLargeError, NotAcquiredError, TableFullError
from mpmm.model_manager import ModelManager
from mpmm.shared_state.layout import Capacities
from mpmm.shared_state.snapshot import read_snapshot

SOON_S = 1.5
HANDLES = Loads()


def pin(seat: Seat, tag: str) -> None:
    """Pin a model."""
    seat.manager.pin(tag)


def unpin(seat: Seat, tag: str) -> None:
    """End the pin."""
    seat.manager.unpin(tag)


def preload(seat: Seat, tag: str, loader: Callable[[], Any] = HANDLES, copies: int = 1) -> int:
    """Preload a model."""
    return int(seat.manager.preload(tag, loader, copies=copies))


def use(manager: ModelManager, tag: str, loader: Callable[[], Any] = HANDLES) -> None:
    """Acquire and release a model."""
    with manager.model(tag, loader):
        pass


# ---- max_model_copies --------------------------------------------------------------------------------------


def test_no_more_copies_are_loaded_than_there_may_be(namespace: str, new_process: NewProcess) -> None:
    first, second, third = (new_process(max_model_copies=2) for _ in range(3))
    first.call(acquire, "a")
    second.call(acquire, "a")
    third.send(acquire, "a", LoadFails("not to be called"))
    wait_until(lambda: waiting(namespace, "a"), "the third one waits")
    # Not in the way of others.
    second.call(acquire, "b")
    assert problems(namespace) == []
    first.call(release)
    third.result()
    assert model_of(namespace, "a").loads == 2


def test_one_that_wants_many_copies_for_itself_does_not_wait_for_each(namespace: str, new_manager: NewManager) -> None:
    # No hold ends, and how long one takes is not known before.
    manager = new_manager(poll_interval=0.1, fallback_memory_mb=10_000, wait_timeout_seconds=10)
    held = [manager.acquire_model("a", HANDLES) for _ in range(25)]
    snapshot = read_snapshot(namespace)
    assert [model.loaded for model in snapshot.models] == [25]
    # Before the first poll it may wait for the only copy, and not much longer than a load takes later.
    assert sum(event.kind == "waits" for event in snapshot.events) <= 5
    for handle in held:
        manager.release_model("a", handle)


def test_no_more_are_loaded_at_a_time_than_there_may_be_where_some_requests_name_devices(
    namespace: str, new_manager: NewManager, new_gate: NewGate
) -> None:
    manager = new_manager(memory_source=BookedDevices(1000, 1000), max_model_copies=1)
    lease, go = manager.reserve(1800, span=2), new_gate()

    def use_on(*devices: int) -> None:
        with manager.model("a", Loads(go=go), devices=devices or None, expect_mb=500):
            pass

    threads = []
    for devices in ((0,), ()):
        threads.append(in_thread(partial(use_on, *devices)))
        wait_until(lambda: len(waiting(namespace, "a")) == len(threads), "it waits for the lease to end")
    lease.release()
    wait_until(lambda: copies_of(namespace, "a"), "one loads")
    assert (len(copies_of(namespace, "a")), problems(namespace)) == (1, [])
    go.open()
    for thread, _ in threads:
        thread.join(DEADLINE_S)
    assert [outcome for _, outcome in threads] == [[None], [None]]


@pytest.mark.parametrize("at_most", [1, None])
def test_an_unknown_model_is_loaded_once_where_one_copy_of_it_is_enough(
    namespace: str, new_manager: NewManager, new_device: NewDevice, new_gate: NewGate, at_most: int | None
) -> None:
    manager = new_manager(memory_source=new_device(1000, 1000), max_model_copies=at_most)
    began, go = new_gate(), new_gate()

    def use_it() -> None:
        with manager.model("a", LoadsObject("a", began, go)):
            pass

    threads = [in_thread(use_it)]
    began.wait()
    threads.append(in_thread(use_it))
    wait_until(lambda: waiting(namespace, "a") or len(copies_of(namespace, "a")) > 1, "the other one has been answered")
    assert len(copies_of(namespace, "a")) == 1
    go.open()
    for thread, _ in threads:
        thread.join(DEADLINE_S)
    assert [outcome for _, outcome in threads] == [[None], [None]]
    assert problems(namespace) == []


def test_who_waits_for_a_model_that_is_being_loaded_takes_what_is_loaded(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    first, second = (new_process(max_model_copies=1) for _ in range(2))
    began, go = new_gate(), new_gate()
    first.send(acquire, "a", Loads("a", began, go))
    began.wait()
    second.send(acquire, "a", LoadFails("not to be called"))
    wait_until(lambda: waiting(namespace, "a"), "the second one waits")
    go.open()
    handle = first.result()
    first.call(release)
    assert second.result() == handle


def test_an_object_of_another_process_makes_way_where_there_may_be_no_more(
    namespace: str, new_process: NewProcess
) -> None:
    owner, other = (new_process(max_model_copies=1) for _ in range(2))
    owner.call(acquire, "a", LoadsObject())
    other.send(acquire, "a", LoadsObject())
    wait_until(lambda: waiting(namespace, "a"), "the other one waits")
    owner.call(release)
    other.result()
    assert len(copies_of(namespace, "a")) == 1
    assert problems(namespace) == []


def use_over_and_over(manager: ModelManager, loader: Callable[[], Any], stop: threading.Event) -> None:
    """Acquire and release a model until the event is set; other threads that do the same get each copy in between."""
    while not stop.is_set():
        with manager.model("a", loader, expect_mb=300):
            time.sleep(0.01)


def use_with_three_threads(seat: Seat, loader: Callable[[], Any], stop: Gate) -> None:
    """Use a model in three threads at a time until the gate is open."""
    done = threading.Event()
    threads = [in_thread(partial(use_over_and_over, seat.manager, loader, done)) for _ in range(3)]
    stop.wait()
    done.set()
    for thread, _ in threads:
        thread.join()
    assert [outcome for _, outcome in threads] == [[None]] * 3


def test_an_object_that_its_process_uses_over_and_over_makes_way_for_another_process(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_gate: NewGate
) -> None:
    arguments: dict[str, Any] = {"memory_source": BookedDevices(1000), "max_model_copies": 1}
    manager = new_manager(**arguments, max_overtake_seconds=1.0, wait_timeout_seconds=DEADLINE_S)
    busy, stop = new_process(**arguments), new_gate()
    busy.send(use_with_three_threads, LoadsObject(), stop)
    wait_until(lambda: waiting(namespace, "a"), "its threads wait for each other")
    watch = Stopwatch()
    with manager.model("a", LoadsObject(), expect_mb=300):
        assert watch.calm_s() < 1.0 + SOON_S
    stop.open()
    busy.result()
    assert problems(namespace) == []


def test_a_copy_that_is_used_over_and_over_makes_way_for_one_on_the_device_that_a_request_names(
    namespace: str, new_manager: NewManager
) -> None:
    arguments: dict[str, Any] = {"memory_source": BookedDevices(1000, 1000), "max_model_copies": 1}
    manager = new_manager(**arguments, max_overtake_seconds=1.0, wait_timeout_seconds=DEADLINE_S)
    with manager.model("a", HANDLES, devices=[0], expect_mb=300):
        pass
    stop = threading.Event()
    threads = [in_thread(partial(use_over_and_over, manager, HANDLES, stop)) for _ in range(3)]
    try:
        wait_until(lambda: waiting(namespace, "a"), "they wait for each other")
        watch = Stopwatch()
        with manager.model("a", HANDLES, devices=[1]):
            assert watch.calm_s() < 1.0 + SOON_S
            assert [copy.device for copy in copies_of(namespace, "a") if copy.state != "unloading"] == [1]
    finally:
        stop.set()
        for thread, _ in threads:
            thread.join()
    assert [outcome for _, outcome in threads] == [[None]] * 3
    assert problems(namespace) == []


def acquire_in_a_thread(manager: ModelManager, tag: str) -> object:
    """Acquire as another thread does, which would not wait for what it holds itself."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(manager.acquire_model, tag, Loads()).result()


def test_the_reason_of_who_waits_for_one_of_as_many_copies_as_there_may_be_is_said(new_manager: NewManager) -> None:
    manager, impatient = new_manager(max_model_copies=1), new_manager(wait_timeout_seconds=0.1)
    with manager.model("a", Loads()), pytest.raises(AcquireTimeoutError, match="last reason: copies"):
        acquire_in_a_thread(impatient, "a")


@pytest.mark.parametrize("value", [0, -1, "two"])
def test_an_impossible_limit_is_refused(new_manager: NewManager, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="max_model_copies"):
        new_manager(max_model_copies=value)


def test_a_pickled_manager_has_the_same_limits(new_manager: NewManager) -> None:
    for arguments in ({}, {"max_model_copies": 3, "idle_ttl_seconds": 60.0}):
        manager = new_manager(**arguments)
        with pickle.loads(pickle.dumps(manager)) as copy:
            assert copy._attachment.settings == manager._attachment.settings
        manager.shutdown()


# ---- pins --------------------------------------------------------------------------------------------------


def test_idle_copies_of_a_pinned_model_are_not_evicted(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=300)
    manager.pin("a")
    for tag in ("a", "b", "c", "d", "e"):
        use(manager, tag)
    assert [copy.tag for copy in read_snapshot(namespace).instances if copy.tag == "a"] == ["a"]
    assert model_of(namespace, "a").loads == 1
    assert [(pinned.tag, pinned.member) for pinned in read_snapshot(namespace).pins] == [("a", 0)]
    assert problems(namespace) == []


def test_who_needs_the_room_of_a_pinned_model_waits_until_it_is_unpinned(
    namespace: str, new_process: NewProcess
) -> None:
    owner, other = new_process(fallback_memory_mb=100), new_process()
    owner.call(pin, "a")
    owner.call(acquire, "a")
    owner.call(release)
    other.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "the other one waits")
    owner.call(unpin, "a")
    other.result()
    assert copies_of(namespace, "a") == []


def test_with_everything_pinned_or_in_use_the_wait_ends_with_an_error_that_says_so(new_manager: NewManager) -> None:
    manager, impatient = new_manager(fallback_memory_mb=200), new_manager(wait_timeout_seconds=0.1)
    manager.pin("a")
    use(manager, "a")
    with manager.model("b", Loads()), pytest.raises(AcquireTimeoutError, match="kept for it where b is in use"):
        acquire_in_a_thread(impatient, "c")


def test_a_pin_goes_with_its_process_and_not_with_another_that_has_one_too(
    namespace: str, new_process: NewProcess
) -> None:
    victim, leaver, other = new_process(fallback_memory_mb=100), new_process(), new_process()
    for process in (victim, leaver):
        process.call(pin, "a")
        process.call(pin, "a")
    assert model_of(namespace, "a").pins == 2
    victim.call(acquire, "a")
    victim.call(release)
    victim.kill()
    wait_until(lambda: model_of(namespace, "a").pins == 1, "the pin of the dead is gone", SOON_S)
    other.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "the other one waits")
    leaver.call(shut_down)
    other.result()
    assert read_snapshot(namespace).pins == ()
    assert problems(namespace) == []


def test_threads_that_pin_a_model_at_the_same_time_have_one_pin(namespace: str, new_manager: NewManager) -> None:
    manager, begin = new_manager(), threading.Barrier(4)

    def pin_all() -> None:
        for number in range(100):
            begin.wait()
            manager.pin(f"m{number}")

    threads = [threading.Thread(target=pin_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems(namespace) == []
    assert len(read_snapshot(namespace).pins) == 100
    manager.unpin("m0")
    with pytest.raises(NotAcquiredError):
        manager.unpin("m0")


def test_unpinning_what_is_not_pinned_here_is_an_error(namespace: str, new_process: NewProcess) -> None:
    owner, other = new_process(), new_process()
    owner.call(pin, "a")
    for tag in ("a", "never"):
        with pytest.raises(NotAcquiredError, match="has no pin on it"):
            other.call(unpin, tag)
    assert model_of(namespace, "a").pins == 1


def test_a_pinned_model_keeps_its_row_and_a_full_table_of_pins_is_an_error(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(capacities=Capacities(models=2, pins=1))
    manager.pin("a")
    use(manager, "b", LoadsObject())
    with pytest.raises(TableFullError, match=r"Capacities\.pins"):
        manager.pin("b")
    with pytest.raises(TableFullError, match=r"Capacities\.pins"):
        manager.pin("c")
    assert [copy.tag for copy in read_snapshot(namespace).instances] == ["b"]
    manager.unpin("a")
    manager.pin("b")
    assert [pinned.tag for pinned in read_snapshot(namespace).pins] == ["b"]


def test_an_unknown_model_is_profiled_with_pinned_copies_left_in_place(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    learn(Seat(manager), pinned=300, idle=100)
    manager.pin("pinned")
    for tag, mb in (("pinned", 300), ("idle", 100)):
        use(manager, tag, LoadsObject(tag, device=device, mb=mb))
    use(manager, "unknown", LoadsObject("u", device=device, mb=250))
    assert model_of(namespace, "unknown").estimate_mb == 250
    assert (model_of(namespace, "pinned").loaded, model_of(namespace, "idle").loaded) == (1, 0)


def test_a_full_table_of_copies_makes_room_with_one_that_is_not_pinned(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=Capacities(instances=2))
    manager.pin("a")
    for tag in ("a", "b", "c"):
        use(manager, tag)
    assert sorted(copy.tag for copy in read_snapshot(namespace).instances) == ["a", "c"]


# ---- idle_ttl_seconds --------------------------------------------------------------------------------------


def test_copies_that_nobody_uses_for_long_are_unloaded_handles_and_objects(
    namespace: str, new_process: NewProcess
) -> None:
    arguments = {"idle_ttl_seconds": 0.3, "poll_interval": 0.05}
    leader, owner = new_process(**arguments), new_process(**arguments)
    leader.call(acquire, "held")
    owner.call(pin, "pinned")
    for tag, loader in (("pinned", Loads()), ("handle", Loads()), ("object", LoadsObject())):
        owner.call(acquire, tag, loader)
        # None is idle before that.
        released = time.monotonic()
        owner.call(release)
    wait_until(lambda: len(read_snapshot(namespace).instances) == 2, "what is idle goes")
    assert time.monotonic() - released >= 0.3
    snapshot = read_snapshot(namespace)
    assert sorted((copy.tag, copy.state) for copy in snapshot.instances) == [("held", "active"), ("pinned", "idle")]
    assert snapshot.evictions == 0
    assert problems(namespace) == []


# ---- preload -----------------------------------------------------------------------------------------------


def test_preloaded_copies_are_idle_and_used_by_whoever_comes(namespace: str, new_process: NewProcess) -> None:
    first, second = new_process(), new_process()
    assert first.call(preload, "a", Loads(), 2) == 2
    assert (model_of(namespace, "a").idle, model_of(namespace, "a").loads) == (2, 2)
    second.call(acquire, "a", LoadFails("not to be called"))
    first.call(acquire, "a", LoadFails("not to be called"))
    assert problems(namespace) == []


def test_a_preload_loads_only_what_is_missing(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with manager.model("a", Loads()):
        assert manager.preload("a", Loads(), copies=3) == 2
    assert manager.preload("a", LoadFails("not to be called"), copies=3) == 0
    assert model_of(namespace, "a").loaded == 3


def test_objects_are_preloaded_for_this_process(namespace: str, new_process: NewProcess) -> None:
    first, second = new_process(), new_process()
    assert first.call(preload, "a", LoadsObject()) == 1
    assert second.call(preload, "a", LoadsObject()) == 1
    assert first.call(preload, "a", LoadFails("not to be called")) == 0


def test_a_preload_stops_where_there_may_be_no_more_copies(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(max_model_copies=2)
    assert manager.preload("a", Loads(), copies=5) == 2
    assert problems(namespace) == []


def test_a_preload_stands_behind_everybody_who_wants_a_model_to_use(namespace: str, new_process: NewProcess) -> None:
    holder, background, newcomer = (new_process(fallback_memory_mb=100) for _ in range(3))
    holder.call(acquire, "held", LoadsObject())
    background.send(preload, "background")
    wait_until(lambda: waiting(namespace, "background"), "the preload waits")
    newcomer.send(acquire, "wanted", LoadsObject())
    wait_until(lambda: waiting(namespace, "wanted"), "the newcomer waits")
    assert [ticket.tag for ticket in waiting(namespace)] == ["wanted", "background"]
    holder.call(release)
    newcomer.result()
    assert not background.has_result()
    newcomer.call(release)
    assert background.result() == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_preload_is_given_no_copy_that_comes_free(count: int, namespace: str, new_process: NewProcess) -> None:
    holder = new_process(fallback_memory_mb=300)
    backgrounds = [new_process(fallback_memory_mb=300) for _ in range(count)]
    for tag in ("a", "other", "third"):
        holder.call(acquire, tag)
    for number, background in enumerate(backgrounds, 1):
        background.send(preload, "a", HANDLES, 2)
        wait_until(lambda: len(waiting(namespace)) == number, "the preload waits")  # noqa: B023  # called at once
    # All waiters want this model, but none of them to use it.
    holder.call(release, "a")
    assert (model_of(namespace, "a").idle, len(waiting(namespace))) == (1, count)
    holder.call(release, "other")
    # One loads what is missing, which is enough for the others.
    assert sorted(background.result() for background in backgrounds) == [0] * (count - 1) + [1]
    assert (model_of(namespace, "a").idle, model_of(namespace, "a").loads) == (2, 2)
    assert problems(namespace) == []


def test_a_preload_teaches_nothing_about_how_long_copies_are_held(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    manager.preload("a", Loads())
    # Were a hold taken for short, the second caller would wait for the first one's copy.
    with manager.model("a", Loads()), manager.model("a", Loads()):
        assert model_of(namespace, "a").active == 2


def test_a_preload_profiles_an_unknown_model(namespace: str, new_manager: NewManager, new_device: NewDevice) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    assert manager.preload("unknown", LoadsObject("u", device=device, mb=250)) == 1
    assert model_of(namespace, "unknown").estimate_mb == 250
    assert model_of(namespace, "unknown").idle == 1


def test_a_preload_that_cannot_be_is_an_error_that_leaves_nothing(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    learn(Seat(manager), huge=2000)
    with pytest.raises(ModelTooLargeError):
        manager.preload("huge", Loads())
    with pytest.raises(OSError, match="no such file"):
        manager.preload("a", LoadFails())
    for copies in (0, -1, 1.5, True):
        with pytest.raises(InvalidArgumentError, match="expected a count"):
            manager.preload("a", Loads(), copies=copies)  # type: ignore[arg-type]  # wrong on purpose
    assert (read_snapshot(namespace).instances, read_snapshot(namespace).tickets) == ((), ())
    assert problems(namespace) == []


class InACycle:
    """A model with a reference to itself, which only the garbage collector ends."""

    def __init__(self) -> None:
        self.itself = self


def test_the_memory_of_an_object_is_free_when_its_unload_ends_though_it_is_in_a_cycle(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(fallback_memory_mb=100)
    gc.collect()
    gc.disable()
    try:
        value = manager.acquire_model("a", InACycle)
        left = weakref.ref(value)
        manager.release_model("a", value)
        del value
        use(manager, "b")
        assert left() is None
    finally:
        gc.enable()
