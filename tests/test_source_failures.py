"""Drivers that fail under a manager, on simulated GPUs: what it does then, and that it holds up nobody."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
from processes import (
    Loads,
    LoadsObject,
    LoadsServer,
    MakesServed,
    Process,
    acquire,
    copies_of,
    leader_pid,
    learn,
    problems,
    release,
    wait_until,
)
from simulated_gpu import GPU_IS_LOST, SimulatedGpus

from mpmm import ModelManager
from mpmm.shared_state.snapshot import DeviceInfo, read_snapshot
from mpmm.show.screen import render
from mpmm.sources import SourceUnavailableError
from mpmm.sources.nvidia_smi import NvidiaSmiSource
from mpmm.sources.nvml import NvmlSource

NewGpus = Callable[..., SimulatedGpus]
NewManager = Callable[..., ModelManager]
NewProcess = Callable[..., Process]
# What of an acquire may be noticed; the failures here last for seconds.
AT_ONCE_S = 1.0


def devices(namespace: str) -> tuple[DeviceInfo, ...]:
    return read_snapshot(namespace).devices


def age_s(namespace: str, device: int) -> float:
    age = devices(namespace)[device].sample_age_s
    assert age is not None
    return age


def takes_s(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def acquire_and_release(manager: ModelManager, tag: str, loader: Callable[[], Any] | None = None) -> None:
    manager.release_model(tag, manager.acquire_model(tag, loader or Loads()))


def test_a_driver_that_does_not_start_leaves_the_books_or_an_error(
    new_gpus: NewGpus, new_manager: NewManager, caplog: pytest.LogCaptureFixture, namespace: str
) -> None:
    gpus = new_gpus(1000)
    gpus.fail_init()
    with pytest.raises(SourceUnavailableError, match="Driver Not Loaded"):
        new_manager(memory_source="nvml", namespace="other").acquire_model("a", Loads())
    with caplog.at_level(logging.WARNING):
        manager = new_manager(memory_source="auto", fallback_memory_mb=700.0)
        copy = manager.acquire_model("a", Loads())
    manager.release_model("a", copy)
    (warning,) = [record.getMessage() for record in caplog.records if "No GPU memory" in record.getMessage()]
    assert "nvml: Driver Not Loaded" in warning and "700" in warning
    snapshot = read_snapshot(namespace)
    assert snapshot.source == "booked" and not snapshot.measures_processes
    assert [device.total_mb for device in snapshot.devices] == [700]


def test_a_gpu_that_falls_off_the_bus_keeps_its_last_figure_which_ages_and_comes_back(
    new_gpus: NewGpus, new_manager: NewManager, caplog: pytest.LogCaptureFixture, namespace: str
) -> None:
    gpus = new_gpus(1000, 1000)
    gpus.allocate(300, 0)
    manager = new_manager(memory_source="nvml", poll_interval=0.05)
    copy = manager.acquire_model("a", Loads())
    assert [device.used_mb for device in devices(namespace)] == [300, 0]
    with caplog.at_level(logging.INFO, "mpmm"):
        gpus.lose(0)
        wait_until(lambda: age_s(namespace, 0) > 0.5, "the figure of the lost GPU ages")
        assert age_s(namespace, 1) < 0.5
        gpus.allocate(200, 1)
        wait_until(lambda: devices(namespace)[1].used_mb == 200, "the other GPU is measured")
        assert devices(namespace)[0].used_mb == 300
        # Nobody waits for it: not who reuses, not who loads, not who releases.
        assert takes_s(lambda: manager.release_model("a", copy)) < AT_ONCE_S
        for tag in ("a", "b"):
            assert takes_s(partial(acquire_and_release, manager, tag)) < AT_ONCE_S
        gpus.find(0)
        gpus.free(300, 0)
        # NVML must be initialised anew for that.
        wait_until(lambda: devices(namespace)[0].used_mb == 0, "the GPU is measured again")
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("nvml ")]
    assert len(said) == 2
    assert "cannot read device(s) [0] (GPU is lost): keeping the last figure" in said[0]
    assert "reads device(s) [0] again" in said[1]
    assert problems(namespace) == []


def test_nvml_is_initialised_again_when_all_is_lost_but_not_at_every_poll(new_gpus: NewGpus) -> None:
    gpus = new_gpus(1000)
    source = NvmlSource(retry_s=60)
    gpus.record_calls()
    gpus.lose(0)
    gpus.fail_init()
    for _ in range(5):
        (sample,) = source.sample(())
        assert sample.used_mb is None
    assert sample.trouble == "Driver Not Loaded"
    assert [what for _, what, _ in gpus.calls()].count("init") == 1
    gpus.fail_init(0)
    gpus.find(0)
    source = NvmlSource(retry_s=0)
    gpus.lose(0)
    assert source.sample(())[0].trouble == "GPU is lost"
    gpus.find(0)
    gpus.allocate(200, 0)
    (sample,) = source.sample(())
    assert sample.used_mb == 200 and sample.processes_known
    source.close()


def test_fields_that_are_not_available_are_unknown_and_not_zero(
    new_gpus: NewGpus, new_manager: NewManager, namespace: str
) -> None:
    gpus = new_gpus(1000, 1000, 1000)
    for device in range(3):
        gpus.allocate(400, device)
    gpus.refuse(2, "memory")
    manager = new_manager(memory_source="nvidia-smi", poll_interval=0.05)
    acquire_and_release(manager, "a")
    # One without a total cannot be used at all.
    wait_until(lambda: [device.used_mb for device in devices(namespace)] == [400, 400], "there are figures")
    gpus.refuse(1, "memory", GPU_IS_LOST)
    wait_until(lambda: age_s(namespace, 1) > 0.5, "the figure ages")
    assert age_s(namespace, 0) < 0.5
    assert devices(namespace)[1].used_mb == 400
    # One that is lost makes the program fail as a whole; the others are asked for one by one.
    gpus.refuse(1, "memory", 0)
    gpus.lose(2)
    gpus.free(100, 0)
    wait_until(lambda: [device.used_mb for device in devices(namespace)] == [300, 400], "the others are read")


def test_an_nvidia_smi_that_hangs_holds_up_nobody(new_gpus: NewGpus, new_process: NewProcess, namespace: str) -> None:
    gpus = new_gpus(1000)
    options: dict[str, Any] = {"memory_source": NvidiaSmiSource(timeout_s=2.0), "poll_interval": 0.1}
    first, second = (new_process(**options) for _ in range(2))
    first.call(learn, a=100.0, b=100.0)
    first.call(acquire, "a")
    gpus.hang(nvidia_smi_s=10)
    wait_until(lambda: age_s(namespace, 0) > 0.6, "the program hangs")
    assert takes_s(lambda: second.call(acquire, "b")) < AT_ONCE_S  # a load
    second.call(release)
    assert takes_s(lambda: second.call(acquire, "b")) < AT_ONCE_S  # a reuse
    assert takes_s(lambda: second.call(release)) < AT_ONCE_S
    assert leader_pid(read_snapshot(namespace)) == first.pid
    # The leader's other duties go on, too, and who joins meanwhile is not held up either.
    joined: list[Process] = []
    assert takes_s(lambda: joined.append(new_process(**options))) < AT_ONCE_S
    (third,) = joined
    third.call(acquire, "b")
    third.kill()
    freed_s = wait_until(lambda: copies_of(namespace, "b")[0].state == "idle", "what the dead one held is free")
    assert freed_s < 1.5
    gpus.allocate(250, 0)
    gpus.hang(nvidia_smi_s=0)
    wait_until(lambda: devices(namespace)[0].used_mb == 250, "the program is killed, and the next one answers")
    first.call(release)
    assert problems(namespace) == []


def test_pids_of_another_namespace_are_not_taken_for_processes_without_memory(
    new_gpus: NewGpus, new_manager: NewManager, caplog: pytest.LogCaptureFixture, namespace: str
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(memory_source="nvml", poll_interval=0.05)
    acquire_and_release(manager, "a")
    # Nobody has memory yet, so nobody knows.
    assert "source nvml," in render(read_snapshot(namespace))
    source = NvmlSource()
    (sample,) = source.sample((os.getpid(),))
    assert source.process_knowledge is None and not sample.processes_known
    gpus.allocate(200, 0)
    (sample,) = source.sample((os.getpid(),))
    wait_until(lambda: "source nvml (knows processes)," in render(read_snapshot(namespace)), "it was seen")
    assert sample.process_mb == {os.getpid(): 200}
    assert sample.foreign_mb((os.getpid(),)) == 0
    assert sample.foreign_mb(()) == 200
    gpus.shift_pids(10_000_000)
    for _ in range(2):
        (sample,) = source.sample((os.getpid(),))
    assert not source.measures_processes
    assert sample.used_mb == 200 and sample.process_mb == {} and not sample.processes_known
    assert sample.foreign_mb((os.getpid(),)) is None
    wait_until(lambda: not read_snapshot(namespace).measures_processes, "the leader says so")
    assert "source nvml," in render(read_snapshot(namespace))
    assert any("cannot measure single processes" in record.getMessage() for record in caplog.records)
    gpus.shift_pids(0)
    (sample,) = source.sample((os.getpid(),))
    assert source.measures_processes and sample.process_mb == {os.getpid(): 200}
    # A driver that gives no lists, or keeps the figures to itself, cannot either.
    for what in ("processes", "process_memory"):
        gpus.refuse(0, what)
        (sample,) = source.sample((os.getpid(),))
        assert not source.measures_processes and not sample.processes_known and sample.used_mb == 200
        gpus.refuse(0, what, 0)
    source.close()


def test_nobody_but_the_leader_polls_while_its_samples_are_fresh(
    new_gpus: NewGpus, new_process: NewProcess, namespace: str
) -> None:
    gpus = new_gpus(1000, 1000)
    # Long enough that a leader on a busy machine is hardly ever late.
    processes = [new_process(memory_source="nvml", poll_interval=1.0) for _ in range(4)]
    for process in processes:
        process.call(acquire, f"model {process.pid}")
        process.call(release)

    # Not whoever else looks at GPUs, as a monitor of an earlier test may.
    members = {process.pid for process in processes}

    def polled() -> list[int]:
        return [pid for pid, what, _ in gpus.calls() if what == "memory" and pid in members]

    def two_polls_by_the_leader() -> bool:
        gpus.record_calls()
        wait_until(lambda: len(polled()) >= 4, "two polls")
        return set(polled()) == {leader_pid(read_snapshot(namespace))}

    # More than once, because a leader that gets no processor for most of a second is stood in for.
    wait_until(two_polls_by_the_leader, "nobody else polls")


def test_twenty_leaders_killed_one_after_the_other_leave_no_long_gap_between_samples(
    new_gpus: NewGpus, new_process: NewProcess, namespace: str, record_property: Callable[[str, object], None]
) -> None:
    new_gpus(1000)
    poll_interval = 0.1
    living = {
        process.pid: process
        for process in (new_process(memory_source="nvml", poll_interval=poll_interval) for _ in range(4))
    }
    longest_s = 0.0
    for _ in range(20):
        leader = leader_pid(read_snapshot(namespace))
        assert leader is not None
        living.pop(leader).kill()
        killed = time.monotonic()
        ages = [age_s(namespace, 0)]

        def is_sampled_again(killed: float = killed, ages: list[float] = ages) -> bool:
            ages.append(age_s(namespace, 0))
            return ages[-1] < min(ages[-2], time.monotonic() - killed)

        wait_until(is_sampled_again, "the next leader has polled")
        longest_s = max(longest_s, *ages)
        # Only now, because who attaches leads at once if nobody does.
        newcomer = new_process(memory_source="nvml", poll_interval=poll_interval)
        living[newcomer.pid] = newcomer
    record_property("longest gap in s", round(longest_s, 3))
    print(f"longest gap between two samples: {longest_s:.3f} s")
    assert longest_s <= 1.0 + poll_interval
    assert problems(namespace) == []


def test_memory_that_returns_after_its_process_is_waited_for(
    new_gpus: NewGpus, new_manager: NewManager, namespace: str
) -> None:
    gpus = new_gpus(1000, linger_s=0.4)
    manager = new_manager(memory_source="nvml", poll_interval=0.05, default_estimate_mb=600.0)
    for tag in ("a", "b", "c"):
        makes = MakesServed(cast(Any, gpus), 600.0)
        acquire_and_release(manager, tag, LoadsServer(f"server of {tag}", makes))
    snapshot = read_snapshot(namespace)
    # Each had to go for the next, and its process was gone long before its memory was back.
    assert (snapshot.evictions, snapshot.out_of_memory, snapshot.written_off_mb) == (2, 0, 0)
    assert max(event.age_s for event in snapshot.events if event.kind == "load_began") > 0.8
    assert snapshot.devices[0].peak_since_start_mb == 600
    assert problems(namespace) == []


def test_objects_in_a_process_are_loaded_while_figures_are_missing(new_gpus: NewGpus, new_manager: NewManager) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(memory_source="nvml", poll_interval=0.05)
    acquire_and_release(manager, "a", LoadsObject())
    gpus.lose(0)
    acquire_and_release(manager, "b", LoadsObject())
