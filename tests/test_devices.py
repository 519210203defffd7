"""Several devices: where copies are placed, how they find out, and the figures of each device."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from functools import partial
from typing import Any

import pytest
from device import BookedDevices
from devices.many_gpus_crew import Setting, measure
from harness import (
    NewDevice,
    NewGate,
    NewGpus,
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
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject, LoadsServer, MakesServed, served
from many_gpus import LAYOUTS
from patience import DEADLINE_S

import mpmm
from mpmm import InvalidArgumentError, ModelManager, ModelTooLargeError, Placement
from mpmm.memory.estimator import ALONE_SD, Estimate, Observation, reconcile, solve_footprints
from mpmm.observability.inspect_screen import render
from mpmm.shared_state.snapshot import DeviceInfo, read_snapshot

# In use on a device whatever is loaded.
ALWAYS_MB = 400.0


def know(manager: ModelManager, **estimates_mb: float) -> None:
    learn(Seat(manager), **estimates_mb)


def on(namespace: str, tag: str) -> list[tuple[int, ...]]:
    """Return the devices of each copy."""
    return [tuple(copy.shares_mb) for copy in copies_of(namespace, tag)]


def device(namespace: str, row: int = 0) -> DeviceInfo:
    return read_snapshot(namespace).devices[row]


class Remembers:
    """A loader of objects that keeps what `current_placement` said."""

    def __init__(self) -> None:
        self.placements: list[Placement | None] = []

    def __call__(self) -> object:
        self.placements.append(mpmm.current_placement())
        return Remembers()


# ---- the loader learns where it goes -----------------------------------------------------------------------


def test_a_model_server_sees_the_device_that_it_was_given_and_no_other(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000, 1000)
    manager = new_manager(memory_source="nvml")
    handles = [manager.acquire_model(tag, LoadsServer(f"{tag}-1", MakesServed(gpus, 300))) for tag in ("a", "b")]
    assert [served(handle).where() for handle in handles] == [
        (gpus.uuid(number), Placement((0,), (gpus.uuid(number),))) for number in (0, 1)
    ]
    assert [gpus.used_mb(number) for number in (0, 1)] == [300, 300]
    # Read from the processes, so exact after one load.
    assert manager._estimator.estimates == {"a": 300, "b": 300}
    assert "where alone there is room" not in render(read_snapshot(namespace))
    assert "loads on device 1, the least full with enough room: needs 100 MB" in render(read_snapshot(namespace))


def test_a_process_that_sees_one_device_loads_there_and_others_everywhere(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_gpus: NewGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = new_gpus(1000, 1000, 1000)
    seeing = new_manager(memory_source="nvml")
    for visible in ("2", gpus.uuid(2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        narrow = new_process(memory_source="nvml")
        handle = narrow.call(acquire, f"by {visible}", LoadsServer(f"by-{visible}", MakesServed(gpus, 100)))
        assert served(handle).where() == (gpus.uuid(2), Placement((0,), (gpus.uuid(2),)))
        with pytest.raises(InvalidArgumentError, match="1 is not among the devices of this process: 0 "):
            narrow.call(tied_to, "other", 1)
    assert gpus.used_mb(2) == 200
    with seeing.model("wide", LoadsServer("wide", MakesServed(gpus, 100))):
        assert gpus.used_mb(0) == 100
    assert len(read_snapshot(namespace).devices) == 3
    assert problems(namespace) == []


def tied_to(seat: Seat, tag: str, *devices: int | str) -> None:
    seat.held.append((tag, seat.manager.acquire_model(tag, Loads(), devices=devices)))


def test_slices_of_a_gpu_are_devices_of_their_own(namespace: str, new_manager: NewManager, new_gpus: NewGpus) -> None:
    gpus = new_gpus(1000, 1000, slices_mb={1: (400, 400)})
    manager = new_manager(memory_source="nvml")
    slices = gpus.units()[1:]
    for tag, uuid in zip("ab", reversed(slices), strict=True):
        handle = manager.acquire_model(tag, LoadsServer(f"slice-{tag}", MakesServed(gpus, 300)), devices=[uuid])
        assert served(handle).where() == (uuid, Placement((0,), (uuid,)))
    assert [gpus.used_mb(unit) for unit in gpus.units()] == [0, 300, 300]
    with pytest.raises(ModelTooLargeError, match="limit"):
        know(manager, c=500)
        manager.acquire_model("c", Loads(), devices=slices)
    assert manager.acquire_model("c", Loads())
    assert on(namespace, "c") == [(0,)]


def test_a_loader_in_its_own_process_is_told_where_it_loads(new_manager: NewManager, new_device: NewDevice) -> None:
    manager = new_manager(memory_source=new_device(1000, 1000, 1000))
    know(manager, a=100, b=100, c=600)
    loader = Remembers()
    assert mpmm.current_placement() is None
    manager.acquire_model("a", loader, devices=[2])
    manager.preload("b", loader, devices=["sim-1"])
    manager.acquire_model("c", loader, devices=[2, 0], span=2)
    assert loader.placements == [
        Placement((2,), ("sim-2",)),
        Placement((1,), ("sim-1",)),
        Placement((0, 2), ("sim-0", "sim-2")),
    ]
    assert mpmm.current_placement() is None


# ---- bound to devices, and on several ----------------------------------------------------------------------


def test_who_is_tied_to_devices_gets_no_copy_elsewhere(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    manager = new_manager(memory_source=new_device(1000, 1000))
    know(manager, a=200)
    here = manager.acquire_model("a", Loads(), devices=[0])
    manager.release_model("a", here)
    with manager.model("a", Loads(), devices=[1]) as there:
        assert there != here
        assert on(namespace, "a") == [(0,), (1,)]
        with manager.model("a", Loads(), devices=["sim-0"]) as again:
            assert again == here

        @manager.uses("a", Loads(), devices=[0])
        def used(model: Any) -> Any:
            return model

        assert used() == here

        async def in_loop() -> Any:
            async with manager.model_async("a", Loads(), devices=[0]) as copy:
                return copy

        assert asyncio.run(in_loop()) == here
    with manager.reserve(500, devices=[1]), manager.reserve(300, devices=[0, 1], span=2):
        assert [one.reserved_mb for one in read_snapshot(namespace).devices] == [150, 650]
    assert problems(namespace) == []


def test_a_waiter_that_is_tied_is_not_handed_a_copy_elsewhere(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_device: NewDevice
) -> None:
    source = new_device(300, 300)
    manager = new_manager(memory_source=source, max_model_copies=2)
    other = new_process(memory_source=source, max_model_copies=2)
    know(manager, a=200)
    first = manager.acquire_model("a", Loads(), devices=[0])
    second = manager.acquire_model("a", Loads(), devices=[1])
    other.send(tied_to, "a", 1)
    wait_until(lambda: waiting(namespace, "a"), "it waits")
    manager.release_model("a", first)
    assert [ticket.usable_on for ticket in waiting(namespace, "a")] == [(1,)]
    manager.release_model("a", second)
    other.result()
    assert [(copy.state, copy.device) for copy in copies_of(namespace, "a")] == [("idle", 0), ("active", 1)]


def test_two_waiters_that_are_tied_to_the_device_of_the_other_ones_copy_are_served(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(memory_source=BookedDevices(1000, 1000), slack_percentage=0, wait_timeout_seconds=DEADLINE_S)
    held = [(tag, manager.acquire_model(tag, Loads(), devices=[on], expect_mb=800)) for on, tag in enumerate("ab")]

    def use_on(tag: str, on: int) -> None:
        with manager.model(tag, Loads(), devices=[on]):
            pass

    calls = [in_thread(partial(use_on, tag, 1 - on)) for on, tag in enumerate("ab")]
    wait_until(lambda: len(waiting(namespace)) == 2, "both wait")
    for tag, handle in held:
        manager.release_model(tag, handle)
    for thread, _ in calls:
        thread.join(DEADLINE_S)
    assert [outcome for _, outcome in calls] == [[None], [None]]
    assert problems(namespace) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"devices": [7]}, "7 is not among the devices of this process: 0 .sim-0., 1 .sim-1."),
        ({"devices": ["sim-9"]}, "'sim-9' is not among"),
        ({"devices": [True]}, "True is no index"),
        ({"devices": []}, "expected a sequence of indices or uuids"),
        ({"devices": "sim-0"}, "expected a sequence of indices or uuids"),
        ({"span": 3}, "span=3: expected a number of devices from 1 to 2"),
        ({"span": 0}, "span=0"),
        ({"devices": [1], "span": 2}, "from 1 to 1"),
    ],
)
def test_devices_that_are_not_there_are_named(
    arguments: dict[str, Any], text: str, namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    manager = new_manager(memory_source=new_device(1000, 1000))
    for call in (manager.acquire_model, manager.preload):
        with pytest.raises(InvalidArgumentError, match=text):
            call("a", Loads(), **arguments)
    with pytest.raises(InvalidArgumentError, match=text):
        manager.reserve(10, **arguments)
    snapshot = read_snapshot(namespace)
    assert (snapshot.models, snapshot.tickets) == ((), ())


def test_a_copy_that_spans_devices_reserves_and_takes_its_share_on_each(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000, 1000, 1000)
    manager = new_manager(memory_source="nvml", default_estimate_mb=600.0)
    handle = manager.acquire_model("large", LoadsServer("large", MakesServed(gpus, 250)), span=2)
    [copy] = copies_of(namespace, "large")
    assert len(copy.shares_mb) == 2
    visible, placement = served(handle).where()
    assert placement == Placement((0, 1), tuple(gpus.uuid(row) for row in copy.shares_mb))
    assert visible == ",".join(placement.uuids)
    served(handle).grow(350, placement.uuids[1])
    wait_until(lambda: copies_of(namespace, "large")[0].mb == 600, "it is measured")
    assert sorted(copies_of(namespace, "large")[0].shares_mb.values()) == [250, 350]
    # Each device has to have room for the largest share.
    wait_until(lambda: manager._estimator.estimates["large"] == 700, "so is the model")
    assert problems(namespace) == []


# ---- one device at a time ----------------------------------------------------------------------------------


def test_an_unknown_model_has_one_device_for_itself_and_the_others_go_on(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate
) -> None:
    source, began, go = new_device(1000, 1000), new_gate(), new_gate()
    manager, loader = new_manager(memory_source=source), new_process(memory_source=source)
    know(manager, old=300, new=300, more=800)
    with manager.model("old", LoadsObject("old", device=source, mb=300, index=0), devices=[0]):
        loader.send(acquire, "unknown", LoadsObject("unknown", began, go, source, 444, 1))
        began.wait()
        assert [one.isolated is not None for one in read_snapshot(namespace).devices] == [False, True]
        assert "unknown runs alone on device 1, to be measured" in render(read_snapshot(namespace))
        # Loads, reuse and hand-overs elsewhere.
        with manager.model("new", Loads("new")):
            assert on(namespace, "new") == [(0,)]
        with manager.model("old", LoadsObject("old", device=source, mb=300)):
            pass
        assert manager.preload("new", Loads("new"), timeout_seconds=5) == 0
    go.open()
    loader.result()
    with pytest.raises(mpmm.AcquireTimeoutError):
        manager.reserve(500, devices=[1], timeout_seconds=0.1)
    loader.call(release, "unknown")
    assert manager._estimator.estimates["unknown"] == 444
    assert [one.isolated for one in read_snapshot(namespace).devices] == [None, None]
    manager.reserve(500, devices=[1]).release()
    assert problems(namespace) == []


def test_observations_are_of_one_device(namespace: str, new_manager: NewManager, new_device: NewDevice) -> None:
    source = new_device(1000, 1000)
    manager = new_manager(memory_source=source, poll_interval=0.05)
    know(manager, a=100, b=200)
    manager.acquire_model("a", LoadsObject("a", device=source, mb=111, index=0), devices=[0])
    manager.acquire_model("b", LoadsObject("b", device=source, mb=222, index=1), devices=[1])

    def observed() -> set[tuple[int | None, str, float]]:
        found = read_snapshot(namespace).observations
        return {(one.device, "+".join(one.instances), max(one.readings_mb)) for one in found}

    wait_until(lambda: observed() == {(0, "a", 111), (1, "b", 222)}, "each device tells of its own")


# ---- what belongs to whom ----------------------------------------------------------------------------------


def test_memory_of_others_is_told_apart_and_is_not_to_be_had(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000, 1000)
    gpus.pretend(1, 700, 0)
    manager = new_manager(memory_source="nvml", poll_interval=0.05)
    know(manager, a=400)
    with manager.model("a", LoadsServer("beside", MakesServed(gpus, 400))):
        assert [(one.used_mb, one.unrelated_mb) for one in read_snapshot(namespace).devices] == [(700, 700), (400, 0)]
        with pytest.raises(mpmm.AcquireTimeoutError, match="the driver and other programs take 700 MB, which leaves"):
            manager.reserve(400, devices=[0], timeout_seconds=0.2)
    assert "external" in render(read_snapshot(namespace))
    gpus.pretend(1, 0, 0)
    manager.reserve(400, devices=[0]).release()
    assert device(namespace).unrelated_mb == 0


def test_what_a_server_has_that_the_driver_still_tears_down_is_no_other_programs(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(
        memory_source="nvml", poll_interval=0.05, memory_return_seconds=60.0, default_estimate_mb=600.0
    )
    with manager.model("a", LoadsServer("torn down")) as handle:
        pid = served(handle).pid()
        # The driver goes on to list it when it is gone.
        gpus.pretend(pid, 600, 0)
        wait_until(lambda: device(namespace).used_mb == 600, "it is measured")
    # If that memory were external, an unknown model would be loaded into the rest.
    loaded, outcome = in_thread(lambda: manager.preload("b", LoadsServer("after it", MakesServed(gpus, 600))))
    wait_until(lambda: not copies_of(namespace, "a"), "its server is gone")
    polled = device(namespace).samples[-1]
    wait_until(lambda: polled not in device(namespace).samples[-2:] and device(namespace).used_mb == 600, "it is seen")
    assert (device(namespace).unrelated_mb, [one.tag for one in waiting(namespace)]) == (0, ["b"])
    gpus.pretend(pid, 0, 0)
    loaded.join(DEADLINE_S)
    assert outcome == [1]
    assert read_snapshot(namespace).out_of_memory == 0
    assert problems(namespace) == []


def test_a_server_is_measured_while_it_is_used(namespace: str, new_manager: NewManager, new_gpus: NewGpus) -> None:
    gpus = new_gpus(2000)
    manager = new_manager(memory_source="nvml", poll_interval=0.05)
    handle = manager.acquire_model("a", LoadsServer("grows", MakesServed(gpus, 300)))
    assert model_of(namespace, "a").estimate_mb == 300
    served(handle).grow(200)
    wait_until(lambda: copies_of(namespace, "a")[0].mb == 500, "growth is seen")
    # The next copy will grow, too.
    wait_until(lambda: model_of(namespace, "a").estimate_mb == 500, "the estimate follows")
    served(handle).grow(-500)
    wait_until(lambda: copies_of(namespace, "a")[0].mb == 0, "nor is it taken for there when it is gone")
    assert copies_of(namespace, "a")[0].peak_mb == 500


@pytest.mark.parametrize("seed", range(10))
def test_without_processes_forty_noisy_readings_leave_estimates_within_ten_percent(seed: int) -> None:
    """Eight models that ran alone once, as the unknown do, and 40 readings of mixtures of them; errors of 3 %."""
    chance = random.Random(seed)

    def read(exact_mb: float) -> float:
        return exact_mb * (1 + chance.gauss(0, 0.03))

    truth = {f"m{number}": chance.uniform(1000, 5000) for number in range(8)}
    alone = {tag: read(ALWAYS_MB + mb) - ALWAYS_MB for tag, mb in truth.items()}
    known = {tag: Estimate(mb, ALONE_SD * mb) for tag, mb in alone.items()}
    observations: list[Observation] = []
    while len(observations) < 40:
        copies = Counter(chance.choices(sorted(truth), k=chance.randint(1, 4)))
        whole_mb = read(ALWAYS_MB + sum(truth[tag] * count for tag, count in copies.items()))
        observations.append(Observation(copies, whole_mb, 1, device=len(observations) % 2))
        found = solve_footprints(observations, sorted(truth), 5, relative=True)
        for tag, mb in found.model_mb.items() if found else ():
            known[tag] = reconcile(known[tag], Estimate(mb, found.sd_mb[tag] if found else 0.0), 0.2)
    assert {tag: estimate.mb for tag, estimate in known.items()} == pytest.approx(truth, rel=0.1)
    slack_mb = 0.1 * 16384
    assert all(truth[tag] - estimate.mb <= slack_mb for tag, estimate in known.items())


# ---- all of them are used ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_no_device_is_ever_above_its_limit_and_all_are_used_alike(
    layout: str, namespace: str, new_gpus: NewGpus, runtime_root: Any
) -> None:
    """The short form of `tools/many_gpus.py`; in so short a time only few devices are filled to the brim."""
    count, slices = LAYOUTS[layout]
    gpus = new_gpus(*[2500.0] * count, slices_mb={0: [2500.0] * len(slices)} if slices else None)
    report = measure(gpus, Setting(12, 4, 6.0, 0.02, acquires=500), namespace, runtime_root)
    assert max(report.highest) <= 1
    assert min(report.loads) > 0
    # Eight devices are not filled in so short a time.
    assert slices or report.spread <= 0.1
    assert report.problems == ()
    assert {"least_full", "tightest", "only_one"} & set(report.reasons)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None


def test_copies_on_other_devices_take_no_room_from_a_preload(new_manager: NewManager, new_device: NewDevice) -> None:
    manager = new_manager(memory_source=new_device(1000, 1000))
    assert manager.preload("a", Loads(), devices=[0], expect_mb=600) == 1
    with pytest.raises(ModelTooLargeError):
        manager.preload("a", Loads(), devices=[0], copies=2)
    assert manager.preload("a", Loads(), devices=[1]) == 1
    assert manager.preload("a", Loads(), copies=2) == 0


@pytest.mark.parametrize("devices", [None, [0]])
def test_a_copy_that_is_to_be_unloaded_takes_no_room_from_a_preload(
    devices: list[int] | None, namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    held = manager.acquire_model("a", Loads(), expect_mb=800)
    unloads, _ = in_thread(lambda: manager.unload("a"))
    wait_until(lambda: copies_of(namespace, "a")[0].unload_on_release, "it is to be unloaded")
    loads, outcome = in_thread(lambda: manager.preload("a", Loads(), devices=devices))
    wait_until(lambda: waiting(namespace, "a") or outcome, "the preload waits")
    assert outcome == []
    manager.release_model("a", held)
    unloads.join()
    loads.join()
    assert outcome == [1]


def test_an_object_of_another_process_makes_room_for_a_preload(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    owner, manager = new_process(), new_manager()
    know(manager, a=800)
    owner.call(learn, a=800)
    owner.call(acquire, "a", LoadsObject())
    owner.call(release, "a")
    assert manager.preload("a", LoadsObject()) == 1
    assert len(copies_of(namespace, "a")) == 1


def test_a_load_in_a_loop_does_not_end_the_isolation_of_what_its_thread_has_loaded_before(
    namespace: str, new_manager: NewManager, new_device: NewDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second load runs in the thread of the first one.
    monkeypatch.setattr("mpmm.model_manager.async_acquire.LOADS_AT_A_TIME", 1)
    simulated = new_device(1000, 1000)
    manager = new_manager(memory_source=simulated)
    know(manager, b=100, c=100)

    def load_with_another() -> object:
        with manager.model("c", Loads(), devices=[1]):
            return Remembers()

    async def run() -> None:
        async with manager.model_async("a", LoadsObject("a", device=simulated, mb=100), devices=[0]) as copy:
            assert device(namespace).isolated is not None
            async with manager.model_async("b", load_with_another, devices=[1]):
                assert device(namespace).isolated is not None, "another task's copy still runs alone"
            allocation = simulated.allocate(200)
        assert model_of(namespace, "a").estimate_mb == 300, "its use was measured, too"
        simulated.free(allocation)
        assert not copy.unloaded

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))
    assert problems(namespace) == []
