"""Late or missing figures, and those of unrelated programs: nothing is evicted needlessly, and no request stalls."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, cast

import pytest
from devices.simulated_gpu import SimulatedGpus
from harness import (
    NewGate,
    NewGpus,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    learn,
    model_of,
    problems,
    wait_until,
    waiting,
)
from loaders import LoadsServer, MakesServed, Served, Weights
from patience import Stopwatch

import mpmm
from mpmm import ModelManager
from mpmm.observability.findings import findings
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import read_snapshot


@dataclass(frozen=True)
class MakesSlowly(MakesServed):
    """A constructor that takes its memory at once, and then runs long enough for figures to show it before the end."""

    def __call__(self) -> Served:
        """Make it."""
        made = super().__call__()
        time.sleep(0.6)
        return made


@dataclass(frozen=True)
class MakesWhenLet(MakesServed):
    """A constructor that takes its memory at once, and ends only when its gate is opened."""

    def __call__(self) -> Served:
        """Make it."""
        made = Served(self.device, self.mb)
        assert self.go is not None
        self.go.wait()
        return made


def server(gpus: SimulatedGpus, tag: str, mb: float) -> LoadsServer:
    return LoadsServer(tag, MakesServed(cast(Any, gpus), mb))


def use(manager: ModelManager, gpus: SimulatedGpus, tag: str, mb: float) -> None:
    with manager.model(tag, server(gpus, tag, mb)):
        pass


def evicted(namespace: str) -> int:
    return read_snapshot(namespace).evictions


@pytest.mark.parametrize("source", ["nvml", "nvidia-smi"])
def test_what_fits_is_not_evicted_however_late_the_figures_are(
    source: str, namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(memory_source=source, poll_interval=0.2)
    sizes = {"a": 250.0, "b": 350.0, "c": 300.0}
    learn(Seat(manager), **sizes)
    for tag, mb in sizes.items():
        with manager.model(tag, LoadsServer(tag, MakesSlowly(cast(Any, gpus), mb))):
            pass
    assert evicted(namespace) == 0
    assert sum(copy.mb for copy in read_snapshot(namespace).instances) == 900
    assert problems(namespace) == []


def test_memory_of_an_unload_is_seen_to_be_back_although_another_load_fills_it(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(memory_source="nvidia-smi", poll_interval=0.2, memory_return_seconds=10.0)
    learn(Seat(manager), a=600, b=700, c=800)
    with caplog.at_level(logging.WARNING, "mpmm"):
        for tag, mb in {"a": 600.0, "b": 700.0, "c": 800.0}.items():
            watch = Stopwatch()
            use(manager, gpus, tag, mb)
            assert watch.calm_s() < 30
    assert read_snapshot(namespace).written_off_mb == 0
    assert "did not come back" not in caplog.text
    assert evicted(namespace) == 2


def test_a_source_that_hangs_does_not_hold_back_what_an_unload_has_freed(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(memory_source="nvidia-smi", poll_interval=0.2, wait_timeout_seconds=60.0)
    learn(Seat(manager), a=700, b=800)
    use(manager, gpus, "a", 700)
    gpus.faults.hang(nvidia_smi_s=60.0)
    watch = Stopwatch()
    use(manager, gpus, "b", 800)
    assert watch.calm_s() < 15, "nobody waits for the program"
    assert [len(copies_of(namespace, tag)) for tag in "ab"] == [0, 1]


def test_a_model_that_fits_beside_the_drivers_memory_only_without_slack_is_loaded_alone(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000, reserved_mb=50)
    manager = new_manager(memory_source="nvml", slack_percentage=0.1, wait_timeout_seconds=60.0)
    use(manager, gpus, "small", 100)
    for _ in range(2):
        for tag in ("a", "b"):
            # 880 and 50 are more than the 900 that may be filled, and less than the 1000 that there are.
            use(manager, gpus, tag, 880)
            assert model_of(namespace, tag).estimate_mb == 880
    assert copies_of(namespace, "small") == []
    with pytest.raises(mpmm.ModelTooLargeError):
        learn(Seat(manager), large=901)
        use(manager, gpus, "large", 901)
    assert problems(namespace) == []


def test_a_request_that_only_others_could_serve_holds_up_nobody_and_is_served_when_they_go(
    namespace: str, new_process: NewProcess, new_gpus: NewGpus, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = new_gpus(1000)
    gpus.pretend(1, 400, 0)
    large, small = (new_process(memory_source="nvml", poll_interval=0.1) for _ in range(2))
    large.call(learn, large=700, small=200)
    large.send(acquire, "large", server(gpus, "large", 700))
    wait_until(lambda: waiting(namespace, "large"), "the large one waits")
    [ticket] = [ticket for ticket in read_snapshot(namespace).tickets if ticket.tag == "large"]
    assert ticket.reason == Reason.EXTERNAL
    small.call(acquire, "small", server(gpus, "small", 200))
    said = [finding.text for finding in findings(read_snapshot(namespace)) if finding.urgent]
    assert any("mpmm can unload nothing that would help" in text and "400 MB" in text for text in said), said
    gpus.pretend(1, 0, 0)
    large.result()
    assert problems(namespace) == []


def test_objects_that_the_figures_of_a_budget_do_not_hold_stay_booked(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(memory_source="host", memory_budget_mb=300.0, poll_interval=0.1, default_estimate_mb=100.0)
    learn(Seat(manager), **{f"m{number}": 100 for number in range(6)})
    for number in range(6):
        with manager.model(f"m{number}", Weights):
            committed = read_snapshot(namespace).devices[0].committed_mb
            assert committed <= 300
    assert evicted(namespace) == 3
    assert read_snapshot(namespace).devices[0].committed_mb == 300


def test_an_unknown_model_runs_alone_only_until_the_source_has_shown_a_process(
    namespace: str, new_process: NewProcess, new_gpus: NewGpus, new_gate: NewGate
) -> None:
    gpus, gate = new_gpus(1000), new_gate()
    first, second = (new_process(memory_source="nvml", poll_interval=0.05) for _ in range(2))
    second.call(learn, known=200)
    first.send(acquire, "unknown", LoadsServer("unknown", MakesWhenLet(cast(Any, gpus), 300, go=gate)))
    wait_until(lambda: copies_of(namespace, "unknown") != [], "it has begun to load")
    second.send(acquire, "known", server(gpus, "known", 200))
    wait_until(lambda: len(copies_of(namespace, "known")) == 1, "the other one loads beside it")
    second.result()
    assert model_of(namespace, "unknown").loads == 0
    gate.open()
    first.result()
    assert model_of(namespace, "unknown").estimate_mb == 300
    assert problems(namespace) == []
