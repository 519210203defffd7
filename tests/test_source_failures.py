"""Drivers that fail under a manager, on simulated GPUs: what it does then; no request is delayed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from device import SimulatedDevice
from devices.simulated_faults import GPU_IS_LOST
from devices.simulated_gpu import SimulatedGpus
from harness import (
    NewGpus,
    NewManager,
    NewProcess,
    Process,
    acquire,
    copies_of,
    force_reset,
    leader_pid,
    learn,
    model_of,
    problems,
    release,
    shut_down,
    wait_until,
)
from loaders import Loads, LoadsObject, LoadsServer, MakesServed
from patience import DEADLINE_S, Stopwatch

from mpmm import AcquireTimeoutError, ModelManager
from mpmm.model_manager.leader import POLL_WAIT_S
from mpmm.observability.inspect_screen import render
from mpmm.shared_state.snapshot import DeviceInfo, read_snapshot
from mpmm.sources import DeviceSample, SourceUnavailableError
from mpmm.sources.host_memory import host_memory_left_mb, host_memory_mb
from mpmm.sources.nvidia_smi import NvidiaSmiSource
from mpmm.sources.nvml import NvmlSource

# The longest delay of an acquire that is accepted; the failures here last for seconds.
AT_ONCE_S = 1.0


def devices(namespace: str) -> tuple[DeviceInfo, ...]:
    return read_snapshot(namespace).devices


def age_s(namespace: str, device: int) -> float:
    age = devices(namespace)[device].sample_age_s
    assert age is not None
    return age


def takes_s(action: Callable[[], object]) -> float:
    watch = Stopwatch()
    action()
    return watch.calm_s()


def acquire_and_release(manager: ModelManager, tag: str, loader: Callable[[], Any] | None = None) -> None:
    manager.release_model(tag, manager.acquire_model(tag, loader or Loads()))


def test_a_driver_that_does_not_start_leaves_the_accounts_or_an_error(
    new_gpus: NewGpus, new_manager: NewManager, caplog: pytest.LogCaptureFixture, namespace: str
) -> None:
    gpus = new_gpus(1000)
    gpus.faults.fail_init()
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
        gpus.faults.lose(0)
        wait_until(lambda: age_s(namespace, 0) > 0.5 + age_s(namespace, 1), "the figure of the lost GPU ages alone")
        gpus.allocate(200, 1)
        wait_until(lambda: devices(namespace)[1].used_mb == 200, "the other GPU is measured")
        assert devices(namespace)[0].used_mb == 300
        # No call waits for it: neither reuses, nor loads, nor releases.
        assert takes_s(lambda: manager.release_model("a", copy)) < AT_ONCE_S
        for tag in ("a", "b"):
            assert takes_s(partial(acquire_and_release, manager, tag)) < AT_ONCE_S
        gpus.faults.find(0)
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
    gpus.faults.lose(0)
    gpus.faults.fail_init()
    for _ in range(5):
        (sample,) = source.sample(())
        assert sample.used_mb is None
    assert sample.trouble == "Driver Not Loaded"
    assert [what for _, what, _ in gpus.calls()].count("init") == 1
    gpus.faults.fail_init(0)
    gpus.faults.find(0)
    source = NvmlSource(retry_s=0)
    gpus.faults.lose(0)
    assert source.sample(())[0].trouble == "GPU is lost"
    gpus.faults.find(0)
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
    gpus.faults.refuse(2, "memory")
    manager = new_manager(memory_source="nvidia-smi", poll_interval=0.05)
    acquire_and_release(manager, "a")
    # One without a total cannot be used at all.
    wait_until(lambda: [device.used_mb for device in devices(namespace)] == [400, 400], "there are figures")
    gpus.faults.refuse(1, "memory", GPU_IS_LOST)
    wait_until(lambda: age_s(namespace, 1) > 0.5 + age_s(namespace, 0), "the figure ages, and the other does not")
    assert devices(namespace)[1].used_mb == 400
    # One that is lost makes the program fail as a whole; the others are asked for one by one.
    gpus.faults.refuse(1, "memory", 0)
    gpus.faults.lose(2)
    gpus.free(100, 0)
    wait_until(lambda: [device.used_mb for device in devices(namespace)] == [300, 400], "the others are read")


@pytest.fixture
def ignored_children(new_gpus: NewGpus) -> Iterator[None]:
    """As a starter that ignores SIGCHLD leaves it: the kernel keeps no exit status of this process's children."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("ignored_children")
def test_the_status_of_nvidia_smi_counts_where_children_are_ignored(new_gpus: NewGpus) -> None:
    gpus = new_gpus(1000, 1000)
    source = NvidiaSmiSource()
    assert [device.total_mb for device in source.devices()] == [1000, 1000]
    gpus.allocate(300, 0)
    gpus.faults.lose(1)
    # Asked for alone, as the program has failed.
    assert [(one.used_mb, one.trouble is None) for one in source.sample(())] == [(300, True), (None, False)]
    gpus.faults.lose(0)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        source.sample(())
    assert failed.value.returncode == 15
    with pytest.raises(SourceUnavailableError, match="nvidia-smi"):
        NvidiaSmiSource()


@pytest.mark.usefixtures("ignored_children")
def test_a_corrupted_inforom_hides_no_figure_where_children_are_ignored(
    new_gpus: NewGpus, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = new_gpus(1000)
    gpus.allocate(300, 0)
    gpus.faults.corrupt_inforom()
    assert [one.used_mb for one in NvidiaSmiSource().sample(())] == [300]
    assert "nvidia-smi ends with status 14" in caplog.text


@pytest.mark.usefixtures("ignored_children")
def test_an_nvidia_smi_that_hangs_is_killed_where_children_are_ignored(
    new_gpus: NewGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, started = new_gpus(1000), []

    class Noted(subprocess.Popen[str]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self.pid)

    gpus.faults.hang(nvidia_smi_s=600)
    monkeypatch.setattr("subprocess.Popen", Noted)
    with pytest.raises(SourceUnavailableError, match="timed out"):
        NvidiaSmiSource(timeout_s=0.2)
    wait_until(lambda: not any(map(group_lives, started)), "the program is dead, too, and not only the shell")
    assert len(started) == 1


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("ignored_children")
def test_no_nvidia_smi_is_said_to_be_none_where_children_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SourceUnavailableError, match="No such file"):
        NvidiaSmiSource()


def test_an_nvidia_smi_that_hangs_holds_up_nobody(new_gpus: NewGpus, new_process: NewProcess, namespace: str) -> None:
    gpus = new_gpus(1000)
    options: dict[str, Any] = {"memory_source": NvidiaSmiSource(timeout_s=2.0), "poll_interval": 0.1}
    first, second = (new_process(**options) for _ in range(2))
    first.call(learn, a=100.0, b=100.0)
    first.call(acquire, "a")
    gpus.faults.hang(nvidia_smi_s=10)
    wait_until(lambda: age_s(namespace, 0) > 0.6, "the program hangs")
    assert takes_s(lambda: second.call(acquire, "b")) < AT_ONCE_S  # a load
    second.call(release)
    assert takes_s(lambda: second.call(acquire, "b")) < AT_ONCE_S  # a reuse
    assert takes_s(lambda: second.call(release)) < AT_ONCE_S
    assert leader_pid(read_snapshot(namespace)) == first.pid
    # The leader's other work continues, too, and a process that joins meanwhile is not delayed either.
    joined: list[Process] = []
    assert takes_s(lambda: joined.append(new_process(**options))) < AT_ONCE_S
    (third,) = joined
    third.call(acquire, "b")
    third.kill()
    freed_s = wait_until(lambda: copies_of(namespace, "b")[0].state == "idle", "what the dead one held is free")
    assert freed_s < 1.5
    gpus.allocate(250, 0)
    gpus.faults.hang(nvidia_smi_s=0)
    wait_until(lambda: devices(namespace)[0].used_mb == 250, "the program is killed, and the next one answers")
    first.call(release)
    assert problems(namespace) == []


def test_pids_of_another_namespace_are_not_taken_for_processes_without_memory(
    new_gpus: NewGpus, new_manager: NewManager, caplog: pytest.LogCaptureFixture, namespace: str
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(memory_source="nvml", poll_interval=0.05)
    acquire_and_release(manager, "a")
    # No process has memory yet, so it is unknown.
    assert "source nvml," in render(read_snapshot(namespace))
    source = NvmlSource()
    (sample,) = source.sample((os.getpid(),))
    assert source.process_knowledge is None and not sample.processes_known
    gpus.allocate(200, 0)
    (sample,) = source.sample((os.getpid(),))
    wait_until(lambda: "source nvml (measures processes)," in render(read_snapshot(namespace)), "it was seen")
    assert sample.process_mb == {os.getpid(): 200}
    assert sample.unrelated_mb((os.getpid(),)) == 0
    assert sample.unrelated_mb(()) == 200
    gpus.faults.shift_pids(10_000_000)
    for _ in range(2):
        (sample,) = source.sample((os.getpid(),))
    assert not source.measures_processes
    assert sample.used_mb == 200 and sample.process_mb == {} and not sample.processes_known
    assert sample.unrelated_mb((os.getpid(),)) is None
    wait_until(lambda: not read_snapshot(namespace).measures_processes, "the leader says so")
    assert "source nvml," in render(read_snapshot(namespace))
    assert any("cannot measure single processes" in record.getMessage() for record in caplog.records)
    gpus.faults.shift_pids(0)
    (sample,) = source.sample((os.getpid(),))
    assert source.measures_processes and sample.process_mb == {os.getpid(): 200}
    # A driver that gives no lists, or keeps the figures to itself, cannot either.
    for what in ("processes", "process_memory"):
        gpus.faults.refuse(0, what)
        (sample,) = source.sample((os.getpid(),))
        assert not source.measures_processes and not sample.processes_known and sample.used_mb == 200
        gpus.faults.refuse(0, what, 0)
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

    # Not other processes that read GPUs, such as a monitor of an earlier test.
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
        # The last sample may have come from a process that stood in for a leader that had not said yet that it leads.
        wait_until(lambda: leader_pid(read_snapshot(namespace)) in living, "one leads")
        leader = leader_pid(read_snapshot(namespace))
        assert leader is not None
        living.pop(leader).kill()
        killed, watch = time.monotonic(), Stopwatch()
        ages = [age_s(namespace, 0)]

        def is_sampled_again(killed: float = killed, ages: list[float] = ages) -> bool:
            ages.append(age_s(namespace, 0))
            return ages[-1] < min(ages[-2], time.monotonic() - killed)

        wait_until(is_sampled_again, "the next leader has polled")
        longest_s = max(longest_s, watch.calm_s())
        # Only now, because a process that attaches becomes leader at once if there is none.
        newcomer = new_process(memory_source="nvml", poll_interval=poll_interval)
        living[newcomer.pid] = newcomer
    record_property("longest gap in s", round(longest_s, 3))
    print(f"longest gap without samples: {longest_s:.3f} s")
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
    gpus.faults.lose(0)
    acquire_and_release(manager, "b", LoadsObject())


def test_a_corrupted_inforom_hides_no_figure(
    new_gpus: NewGpus, new_manager: NewManager, caplog: pytest.LogCaptureFixture, namespace: str
) -> None:
    gpus = new_gpus(1000, 1000)
    gpus.allocate(300, 1)
    gpus.faults.corrupt_inforom()
    with caplog.at_level(logging.WARNING):
        manager = new_manager(memory_source="nvidia-smi", poll_interval=0.05)
        acquire_and_release(manager, "a")
        wait_until(lambda: [device.used_mb for device in devices(namespace)] == [0, 300], "there are figures")
        gpus.allocate(100, 0)
        wait_until(lambda: [device.used_mb for device in devices(namespace)] == [100, 300], "there are new ones")
    said = [record.getMessage() for record in caplog.records if "infoROM" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("name", ["nvml", "nvidia-smi", "auto"])
def test_models_are_placed_in_the_memory_that_a_gpu_shares_with_its_host(
    name: str, new_gpus: NewGpus, new_manager: NewManager, namespace: str
) -> None:
    gpus = new_gpus(1000)
    gpus.faults.refuse(0, "memory")
    manager = new_manager(memory_source=name, poll_interval=0.05, slack_percentage=0.0)
    acquire_and_release(manager, "a")
    (device,) = devices(namespace)
    assert device.uuid == gpus.uuid(0)
    assert device.total_mb == pytest.approx(host_memory_mb(), rel=0.001)
    wait_until(lambda: devices(namespace)[0].used_mb, "there is a figure")
    left_mb = device.total_mb - (devices(namespace)[0].used_mb or 0.0)
    assert left_mb == pytest.approx(host_memory_left_mb(), abs=0.2 * device.total_mb)


# ---- a source that hangs -----------------------------------------------------------------------------------

# The dead are taken back within a second, however busy the machine is otherwise.
REAPED_S = 1.5


def is_idle(namespace: str, tag: str) -> bool:
    """Return whether the one copy of a model is idle."""
    return copies_of(namespace, tag)[0].state == "idle"


def try_to_acquire(seat: Any, tag: str) -> tuple[str, float]:
    """Return how an acquire has ended, and after how many seconds."""
    watch = Stopwatch()
    try:
        seat.held.append((tag, seat.manager.acquire_model(tag, Loads())))
        outcome = "loaded"
    except AcquireTimeoutError:
        outcome = "timed out"
    return outcome, watch.calm_s()


def test_a_driver_that_hangs_lengthens_no_wait_and_the_dead_are_reaped(
    new_gpus: NewGpus, new_process: NewProcess, namespace: str
) -> None:
    gpus = new_gpus(1000)
    options: dict[str, Any] = {"memory_source": "nvml", "poll_interval": 0.1, "wait_timeout_seconds": 2.0}
    first, second, third = (new_process(**options) for _ in range(3))
    first.call(learn, a=900.0, b=100.0, c=50.0)
    first.call(acquire, "a")
    third.call(acquire, "b")
    gpus.faults.hang(nvml_s=8)
    wait_until(lambda: age_s(namespace, 0) > 0.7, "NVML hangs")
    # One that has to wait for memory does so for its time-out. One that loads is at most held up to be measured.
    outcome, took_s = second.call(try_to_acquire, "d")
    assert outcome == "timed out" and took_s < 3.0
    outcome, took_s = second.call(try_to_acquire, "c")
    assert outcome == "loaded" and took_s < 2.0
    # The leader first: then the others, whose own calls hang by now, have to.
    for process, tag in ((first, "a"), (third, "b")):
        process.kill()
        freed_s = wait_until(partial(is_idle, namespace, tag), "what the dead held is free")
        assert freed_s < REAPED_S
    snapshot = read_snapshot(namespace)
    assert leader_pid(snapshot) == second.pid
    # It leads, and says so, while the figures age.
    wait_until(lambda: read_snapshot(namespace).polled_ago_s < 1.0 < age_s(namespace, 0), "it polls in vain")
    gpus.faults.hang(nvml_s=0)
    wait_until(lambda: age_s(namespace, 0) < 0.5, "figures come again")
    assert problems(namespace) == []


class HangingMonitor:
    """A monitor of the caller's own, every method of which hangs while `answers` is not set."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.used_mb = 0.0

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """End."""

    def refresh(self) -> None:
        """Measure."""
        assert self.answers.wait(2 * DEADLINE_S)

    def reset_peak(self) -> None:
        """Reset."""
        assert self.answers.wait(2 * DEADLINE_S)

    def get_stats(self) -> tuple[float, float, float]:
        """Return the figures."""
        assert self.answers.wait(2 * DEADLINE_S)
        return self.used_mb, self.used_mb, 1000.0


def test_a_monitor_of_the_callers_own_that_hangs_holds_up_nobody(
    new_manager: NewManager, new_process: NewProcess, namespace: str
) -> None:
    monitor = HangingMonitor()
    manager = new_manager(monitor=monitor, poll_interval=0.1)
    manager._estimator.set_initial_estimate("a", 100.0)
    other = new_process(poll_interval=0.1)
    acquire_and_release(manager, "a")
    other.call(learn, b=100.0)
    other.call(acquire, "b")
    monitor.answers.clear()
    try:
        assert takes_s(partial(acquire_and_release, manager, "a")) < AT_ONCE_S
        other.kill()
        assert wait_until(partial(is_idle, namespace, "b"), "it is free") < REAPED_S
        # An unknown model is still loaded alone, although no source can measure it.
        assert takes_s(partial(acquire_and_release, manager, "unknown")) < 10.0
        assert takes_s(lambda: manager._connected().figures.stats()) < AT_ONCE_S
        monitor.used_mb = 250.0
    finally:
        monitor.answers.set()
    wait_until(lambda: devices(namespace)[0].used_mb == 250, "its figures come again")


class PeakThatStays(HangingMonitor):
    """A monitor of the caller's own whose peak does not begin anew."""

    def reset_peak(self) -> None:
        """Fail."""
        raise OSError("no device")

    def get_stats(self) -> tuple[float, float, float]:
        """Return the figures."""
        return self.used_mb, 900.0, 1000.0


def test_a_peak_that_could_not_begin_anew_is_not_taken_for_what_a_model_needs(
    new_manager: NewManager, namespace: str
) -> None:
    monitor = PeakThatStays()
    manager = new_manager(monitor=monitor, poll_interval=0.1)

    def load() -> str:
        monitor.used_mb = 200.0
        return "handle"

    manager.release_model("unknown", manager.acquire_model("unknown", load))
    assert model_of(namespace, "unknown").estimate_mb == 200.0


def test_a_process_that_ends_does_not_wait_for_a_driver_that_hangs(
    new_gpus: NewGpus, new_process: NewProcess, namespace: str
) -> None:
    gpus = new_gpus(1000)
    process = new_process(memory_source="nvml", poll_interval=0.1)
    process.call(acquire, "a")
    process.call(release)
    gpus.faults.hang(nvml_s=8)
    wait_until(lambda: age_s(namespace, 0) > 0.5, "NVML hangs")
    assert takes_s(lambda: process.call(shut_down)) < 4.0
    gpus.faults.hang(nvml_s=0)


def test_a_sample_that_is_asked_for_is_published_and_nobody_waits(
    new_gpus: NewGpus, new_manager: NewManager, namespace: str
) -> None:
    gpus = new_gpus(1000)
    # Nobody polls for a minute.
    manager = new_manager(memory_source="nvidia-smi", poll_interval=60.0)
    acquire_and_release(manager, "a")
    gpus.allocate(300, 0)
    gpus.faults.hang(nvidia_smi_s=1.0)
    assert takes_s(manager._connected().figures.request_sample) < 0.3
    wait_until(lambda: devices(namespace)[0].used_mb == 300, "the figure is there")


# ---- silence -----------------------------------------------------------------------------------------------


def name_the_daemon_alone(gpus: SimulatedGpus) -> None:
    """Do as a driver under MPS does that has no list of clients."""
    gpus.faults.share_context(1)
    gpus.faults.refuse(0, "mps_processes")


MAKE_SILENT: dict[str, Callable[[SimulatedGpus], None]] = {
    "pids of another namespace": lambda gpus: gpus.faults.shift_pids(10_000_000),
    "an empty list": lambda gpus: gpus.faults.refuse(0, "unlisted", 1),
    "no list": lambda gpus: gpus.faults.refuse(0, "processes"),
    "the daemon of MPS alone": name_the_daemon_alone,
    "no memory of processes": lambda gpus: gpus.faults.refuse(0, "process_memory"),
}


@pytest.mark.parametrize("silence", MAKE_SILENT)
def test_unknown_models_are_measured_alone_where_the_driver_does_not_tell_processes(
    silence: str, new_gpus: NewGpus, new_process: NewProcess, namespace: str
) -> None:
    gpus = new_gpus(16000)
    MAKE_SILENT[silence](gpus)
    processes = [
        new_process(memory_source="nvml", poll_interval=0.1, default_estimate_mb=1000.0, wait_timeout_seconds=60.0)
        for _ in range(4)
    ]
    for number, process in enumerate(processes):
        makes = MakesServed(cast(Any, gpus), 5000.0)
        process.send(use_once, f"m{number}", LoadsServer(f"server {number}", makes))
    for process in processes:
        process.result()
    snapshot = read_snapshot(namespace)
    assert snapshot.out_of_memory == 0
    assert not snapshot.measures_processes
    assert gpus.highest_mb(0) <= 16000
    assert [model.estimate_mb for model in snapshot.models] == pytest.approx([5000] * 4, rel=0.02)
    # Our memory does not count as external, so it is evicted when another model needs it.
    first = processes[0]
    first.call(learn, large=9000.0)
    assert [device.unrelated_mb for device in devices(namespace)] == [0]
    first.call(acquire, "large", LoadsServer("large", MakesServed(cast(Any, gpus), 9000.0)))
    first.call(release)
    assert read_snapshot(namespace).out_of_memory == 0
    assert problems(namespace) == []


def use_once(seat: Any, tag: str, loader: Callable[[], Any]) -> None:
    """Acquire a copy, and release it."""
    with seat.manager.model(tag, loader):
        pass


@pytest.mark.parametrize("shared", [False, True], ids=["each for itself", "under MPS"])
def test_the_first_model_is_alone_until_its_load_has_shown_that_the_driver_tells_processes(
    shared: bool, new_gpus: NewGpus, new_manager: NewManager, namespace: str
) -> None:
    gpus = new_gpus(16000)
    if shared:
        gpus.faults.share_context(1)
    manager = new_manager(memory_source="nvml", poll_interval=60.0)
    with manager.model("a", LoadsServer("a", MakesServed(cast(Any, gpus), 500.0))):
        snapshot = read_snapshot(namespace)
        assert snapshot.measures_processes
        assert [device.isolated for device in snapshot.devices] == [None]
        # So the next unknown one does not have to wait for the release.
        with manager.model("b", LoadsServer("b", MakesServed(cast(Any, gpus), 700.0))):
            pass
    assert [model.estimate_mb for model in read_snapshot(namespace).models] == [500, 700]
    assert [model.measured for model in read_snapshot(namespace).models] == [True, True]
    assert problems(namespace) == []


def test_what_one_process_was_shown_holds_for_a_leader_that_was_shown_nothing(
    new_gpus: NewGpus, new_process: NewProcess, namespace: str
) -> None:
    gpus = new_gpus(16000)
    first, second = (new_process(memory_source="nvml", poll_interval=0.1) for _ in range(2))
    second.call(use_once, "a", LoadsServer("a", MakesServed(cast(Any, gpus), 500.0)))
    assert read_snapshot(namespace).measures_processes
    second.call(force_reset)
    wait_until(lambda: not gpus.process_mb(0), "nobody has memory")
    first.kill()
    wait_until(lambda: leader_pid(read_snapshot(namespace)) == second.pid, "the other one leads")
    third = new_process(memory_source="nvml", poll_interval=0.1)
    second.kill()
    wait_until(lambda: leader_pid(read_snapshot(namespace)) == third.pid, "one leads that has seen nothing")
    wait_until(lambda: age_s(namespace, 0) < 0.1, "it polls")
    assert read_snapshot(namespace).measures_processes
    # Until it is shown that the driver does not tell after all.
    gpus.faults.refuse(0, "processes")
    wait_until(lambda: not read_snapshot(namespace).measures_processes, "it says so")


class SlowDevice(SimulatedDevice):
    """A source that takes longer than a poll waits."""

    cheap = False

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        samples = super().sample(server_pids)
        time.sleep(4 * POLL_WAIT_S)
        return samples


def test_figures_that_come_when_the_poll_is_over_are_learnt_from(
    new_manager: NewManager, tmp_path: Path, namespace: str
) -> None:
    device = SlowDevice(tmp_path / "device", 1000.0)
    # No second poll makes up for the first.
    manager = new_manager(memory_source=device, poll_interval=60.0)
    manager._estimator.set_initial_estimate("a", 300.0)
    with manager.model("a", LoadsObject("a", device=device, mb=250.0)):
        assert not read_snapshot(namespace).observations
        manager._connected().leader._poll_due = 0.0
        wait_until(lambda: read_snapshot(namespace).observations, "it is learnt from", 10)
    (observation,) = read_snapshot(namespace).observations
    assert observation.readings_mb[-1] == 250
