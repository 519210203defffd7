"""Whose memory is whose: read from processes where that is possible, inferred from what remains, never both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from devices.simulated_gpu import SimulatedGpus
from harness import (
    NewDevice,
    NewGpus,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    learn,
    model_of,
    problems,
    release,
    wait_until,
)
from loaders import Loads, LoadsObject, LoadsServer, MakesServed, Weights

from mpmm import InvalidArgumentError
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import read_snapshot


@dataclass(frozen=True)
class LoadsHere:
    """A loader of an object that takes memory in its loader's own process."""

    gpus: SimulatedGpus
    mb: float

    def __call__(self) -> Any:
        """Load on the first device."""
        self.gpus.allocate(self.mb, 0)
        return Weights()


@pytest.mark.parametrize("mb", [150.0, 777.0])
def test_one_load_tells_what_a_server_takes_whatever_else_is_on_the_device(
    mb: float, namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(2000, reserved_mb=50)
    gpus.pretend(1, 130, 0)
    manager = new_manager(memory_source="nvml", default_estimate_mb=800)
    with manager.model("other", LoadsServer("other", MakesServed(gpus, 90))):
        manager.release_model("a", manager.acquire_model("a", LoadsServer("a", MakesServed(gpus, mb))))
    found = model_of(namespace, "a")
    assert found.estimate_mb == pytest.approx(mb, rel=0.02)
    assert (found.measured, found.sd_mb) == (True, 0)
    # Only the first one was alone, and only until the driver had shown what it takes.
    alone = {event.tag for event in read_snapshot(namespace).events if event.reason == Reason.ALONE}
    assert alone == {"other"}


def test_what_a_process_has_grown_by_is_what_its_own_model_takes(
    namespace: str, new_process: NewProcess, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(2000)
    process = new_process(memory_source="nvml")
    for tag, mb in {"a": 210.0, "b": 330.0}.items():
        process.call(acquire, tag, LoadsHere(gpus, mb))
        found = model_of(namespace, tag)
        assert (found.estimate_mb, found.measured) == (mb, True)
        assert found.sd_mb > 0, "less sure than what a process of its own tells"


def test_what_is_measured_by_itself_is_no_part_of_readings_of_the_rest(
    namespace: str, new_process: NewProcess, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(2000, reserved_mb=50)
    gpus.pretend(1, 130, 0)
    process = new_process(memory_source="nvml", poll_interval=0.05)
    process.call(acquire, "server", LoadsServer("server", MakesServed(gpus, 270)))
    process.call(acquire, "object", LoadsHere(gpus, 310))

    def observed() -> list[tuple[dict[str, int], set[float]]]:
        return [(one.instances, set(one.readings_mb)) for one in read_snapshot(namespace).observations]

    wait_until(lambda: observed() == [({"object": 1}, {360.0})], "what the driver keeps and the object are left")


def test_two_unknown_models_are_measured_at_the_same_time(
    namespace: str, new_process: NewProcess, new_device: NewDevice
) -> None:
    device = new_device(1000, 1000)
    first, second = new_process(memory_source=device), new_process(memory_source=device)
    first.call(acquire, "a", LoadsObject("a", device=device, mb=111, index=0))
    second.call(acquire, "b", LoadsObject("b", device=device, mb=222, index=1))
    assert None not in [one.isolated for one in read_snapshot(namespace).devices]
    first.call(release)
    second.call(release)
    assert [model_of(namespace, tag).estimate_mb for tag in "ab"] == [111, 222]
    assert problems(namespace) == []


def test_room_for_one_is_made_on_all_devices_of_a_copy_that_spans_several(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000, 1000)
    manager = new_manager(memory_source="nvml", default_estimate_mb=600)
    wide = LoadsServer("wide", MakesServed(gpus, 300))
    manager.release_model("wide", manager.acquire_model("wide", wide, span=2))
    learn(Seat(manager), tall=900)
    with manager.model("tall", LoadsServer("tall", MakesServed(gpus, 900)), devices=[0]):
        assert copies_of(namespace, "wide") == []
        assert [gpus.used_mb(number) for number in (0, 1)] == [900, 0]
    assert problems(namespace) == []


def test_a_manager_that_selects_devices_uses_no_others(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000, 500, 700)
    manager = new_manager(memory_source=device, devices=[2, "sim-1"])
    assert manager._monitor.get_stats() == (0, 0, 1200)
    assert [one.uuid for one in read_snapshot(namespace).devices] == ["sim-1", "sim-2"]
    with pytest.raises(InvalidArgumentError, match="0 is not among the devices"):
        manager.acquire_model("a", Loads(), devices=[0])
