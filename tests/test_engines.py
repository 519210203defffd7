"""Models in processes that their servers start: what these take counts as the server's, with every kind of source."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from engines import ListingDevice, MakesEngine, engine_command
from harness import (
    NewGpus,
    NewManager,
    NewProcess,
    acquire,
    copies_of,
    learn,
    model_of,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import LoadsServer, MakesServed

from mpmm import ModelManager
from mpmm.shared_state.snapshot import read_snapshot

TOTAL_MB = 10_000


@pytest.fixture
def device(tmp_path: Path) -> ListingDevice:
    """A device of 10 000 MB that shows at some later time that memory is free."""
    made = ListingDevice(tmp_path / "device", TOTAL_MB)
    made.frees_late = True
    return made


def engine(device: ListingDevice, own_mb: float = 500, engine_mb: float = 7500) -> LoadsServer:
    """Return the loader of a model that is in a process of its server, all but `own_mb`."""
    return LoadsServer("engine", MakesEngine(device, own_mb, engine_mb=engine_mb))


def load_idle(manager: ModelManager, tag: str, loader: LoadsServer, expect_mb: float | None = None) -> None:
    """Load a model, and give it back."""
    manager.release_model(tag, manager.acquire_model(tag, loader, expect_mb=expect_mb))


@pytest.mark.parametrize("own_mb", [500.0, 0.0])
def test_a_model_takes_what_its_server_and_the_processes_of_that_take(
    own_mb: float, namespace: str, new_manager: NewManager, device: ListingDevice
) -> None:
    manager = new_manager(memory_source=device, poll_interval=0.05, slack_percentage=0.0)
    load_idle(manager, "engine", engine(device, own_mb), expect_mb=8000)
    found = model_of(namespace, "engine")
    assert (found.estimate_mb, found.measured) == (own_mb + 7500, True)
    assert [copy.mb for copy in copies_of(namespace, "engine")] == [own_mb + 7500]
    [there] = read_snapshot(namespace).devices
    assert (there.external_mb, there.unrelated_mb) == (0, 0)
    assert problems(namespace) == []


@pytest.mark.parametrize("own_mb", [50.0, 0.0])
def test_nvml_measures_an_engine_even_if_its_server_takes_nothing(
    own_mb: float, namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(2000, reserved_mb=50)
    manager = new_manager(memory_source="nvml", poll_interval=3600, default_estimate_mb=800)
    load_idle(manager, "engine", LoadsServer("engine", MakesEngine(gpus, own_mb, engine_mb=700)))
    found = model_of(namespace, "engine")
    assert (found.estimate_mb, found.measured) == (own_mb + 700, True)
    [there] = read_snapshot(namespace).devices
    assert (there.external_mb, there.unrelated_mb) == (50, 0)
    assert read_snapshot(namespace).measures_processes
    assert problems(namespace) == []


def test_an_idle_engine_is_unloaded_for_another_model_and_loads_again_only_into_room_for_all_of_it(
    namespace: str, new_process: NewProcess, device: ListingDevice
) -> None:
    first, second = (
        new_process(memory_source=device, poll_interval=0.05, slack_percentage=0.0, wait_timeout_seconds=60.0)
        for _ in range(2)
    )
    first.call(acquire, "engine", engine(device))
    first.call(release)
    second.call(learn, other=6000)
    second.call(acquire, "other", LoadsServer("other", MakesServed(device, 6000)))
    assert copies_of(namespace, "engine") == []
    first.send(acquire, "engine", engine(device))
    wait_until(lambda: waiting(namespace, "engine"), "there is no room beside the other one")
    second.call(release)
    first.result()
    assert device.used_mb() == 8000
    assert copies_of(namespace, "other") == []
    assert problems(namespace) == []


def test_what_an_engine_takes_of_a_budget_of_host_memory_is_measured(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(memory_source="host", memory_budget_mb=1000.0, poll_interval=0.05)
    load_idle(manager, "engine", LoadsServer("engine", MakesEngine(host_mb=400)))
    [there] = read_snapshot(namespace).devices
    for mb in (model_of(namespace, "engine").estimate_mb, there.used_mb):
        assert mb is not None and 400 < mb < 600
    assert problems(namespace) == []


def test_what_a_worker_starts_without_a_lease_is_another_program(
    namespace: str, new_manager: NewManager, device: ListingDevice
) -> None:
    manager = new_manager(memory_source=device, poll_interval=3600, slack_percentage=0.0)
    load_idle(manager, "engine", engine(device, 500, 1500))
    with subprocess.Popen(engine_command(device, 3000), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stdin is not None
        assert program.stdout.readline() == b"full\n"
        assert manager._monitor.refresh()
        [there] = read_snapshot(namespace).devices
        assert (there.used_mb, there.external_mb, there.unrelated_mb) == (5000, 3000, 3000)
        program.stdin.close()
    assert model_of(namespace, "engine").estimate_mb == 2000


def test_an_engine_whose_process_has_its_memory_is_not_suspended_by_the_driver(
    namespace: str, new_manager: NewManager, device: ListingDevice
) -> None:
    manager = new_manager(memory_source=device, poll_interval=3600, suspend="checkpoint")
    load_idle(manager, "server", LoadsServer("server", MakesServed(device, 500)))
    load_idle(manager, "engine", engine(device, 500, 1500))
    ways = {copy.tag: copy.way for copy in read_snapshot(namespace).instances}
    assert ways["server"] and not ways["engine"]
