"""GPUMonitor on a source that the test controls."""

from __future__ import annotations

import inspect
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
from harness import import_path, wait_until
from patience import DEADLINE_S, Stopwatch

from mpmm.errors import InvalidArgumentError
from mpmm.memory.monitor import GPUMonitor, LocalSamples
from mpmm.memory.sampler import Sampler
from mpmm.shared_state.settings import Settings
from mpmm.sources import DeviceInfo, DeviceSample, SourceUnavailableError
from mpmm.sources.booked import BookedSource


class FakeSource:
    """Devices of 10000 MB whose use is what the test says; an exception is raised instead."""

    name = "fake"
    measures_processes = False
    frees_late = False
    cheap = True

    def __init__(self, *used_mb: float | None) -> None:
        self.used_mb: Sequence[float | None] | Exception = used_mb
        self.samples = 0
        self.closed = 0
        self.asked_for: Sequence[int] = ()
        self.threads: set[threading.Thread] = set()
        self.sampled = threading.Condition()
        self._devices = tuple(DeviceInfo(i, f"fake-{i}", f"fake {i}", 10000.0) for i in range(len(used_mb)))

    def devices(self) -> tuple[DeviceInfo, ...]:
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        taken_ns = time.monotonic_ns()
        with self.sampled:
            self.samples += 1
            self.asked_for = server_pids
            self.threads.add(threading.current_thread())
            self.sampled.notify_all()
        if isinstance(self.used_mb, Exception):
            raise self.used_mb
        return tuple(DeviceSample(i, used_mb, taken_ns) for i, used_mb in enumerate(self.used_mb))

    def close(self) -> None:
        self.closed += 1

    def wait_for_more(self, count: int) -> None:
        with self.sampled:
            goal = self.samples + count
            assert self.sampled.wait_for(lambda: self.samples >= goal, DEADLINE_S)


class FakeStore:
    def __init__(self) -> None:
        self.published: list[Sequence[DeviceSample]] = []
        self.resets = 0

    def publish(self, samples: Sequence[DeviceSample], timeout_s: float | None = None) -> None:
        self.published.append(samples)

    def stats(self) -> tuple[float, float, float]:
        return 1.0, 2.0, 3.0

    def reset_peak(self) -> None:
        self.resets += 1

    def server_pids(self) -> Sequence[int]:
        return (41, 42)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(1000.0, 200.0)


@pytest.fixture
def monitor(source: FakeSource) -> Iterator[GPUMonitor]:
    monitor = GPUMonitor(poll_interval=0.001, source=source)
    yield monitor
    monitor.stop()


def test_stats_are_summed_over_devices_right_after_start(monitor: GPUMonitor) -> None:
    assert not monitor._gpu_available
    monitor.start()
    assert monitor.get_stats() == (1200.0, 1200.0, 20000.0)
    assert monitor._gpu_available


def test_before_start_there_is_the_fallback_and_no_figure() -> None:
    monitor = GPUMonitor(fallback_memory_mb=12000.0)
    assert monitor.get_stats() == (0.0, 0.0, 12000.0)
    assert monitor.last_sample_age_seconds() == math.inf


def test_polling_follows_the_source_even_when_sleep_is_mocked(source: FakeSource, monitor: GPUMonitor) -> None:
    with patch("time.sleep"):
        monitor.start()
        source.used_mb = (3000.0, 200.0)
        source.wait_for_more(2)  # the first of them is published by the time of the second
        assert monitor.get_stats()[0] == 3200.0


def test_starting_twice_polls_in_one_thread(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.start()
    first = monitor._thread
    monitor.start()
    assert monitor._thread is first is not None and first.daemon, "a program ends although it polls"
    source.wait_for_more(3)
    assert len(source.threads - {threading.current_thread()}) == 1


def test_stop_joins_and_start_begins_again(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.start()
    thread = monitor._thread
    monitor.stop()
    assert thread is not None and not thread.is_alive()
    assert not monitor._running
    monitor.stop()
    monitor.start()
    source.wait_for_more(2)


def test_stop_leaves_a_source_alone_that_somebody_else_made(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.start()
    monitor.stop()
    assert source.closed == 0


def test_stop_closes_a_source_of_its_own_and_start_resolves_it_again(source: FakeSource) -> None:
    with patch("mpmm.memory.monitor.choose_source", return_value=source) as choose:
        monitor = GPUMonitor(poll_interval=0.001)
        assert not choose.called
        monitor.start()
        monitor.stop()
        assert source.closed == 1
        assert monitor.get_stats()[0] == 1200.0
        assert 0 <= monitor.last_sample_age_seconds() < DEADLINE_S
        assert choose.call_count == 1, "its figures can be had without a source"
        monitor.start()
        monitor.stop()
        assert choose.call_count == 2


def test_nothing_to_measure_starts_no_thread() -> None:
    monitor = GPUMonitor(source=BookedSource(5000.0))
    monitor.start()
    assert not monitor._running and not monitor._gpu_available
    assert monitor.get_stats() == (0.0, 0.0, 5000.0)


def test_a_failing_sample_keeps_the_last_figure_and_lets_it_age(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.refresh()
    source.used_mb = OSError("driver gone")
    before = monitor.last_sample_age_seconds()
    monitor.refresh()
    assert monitor.get_stats() == (1200.0, 1200.0, 20000.0)
    assert monitor.last_sample_age_seconds() >= before
    source.used_mb = (500.0, 200.0)
    monitor.refresh()
    assert monitor.get_stats()[0] == 700.0


def test_one_unreadable_device_keeps_its_own_last_figure(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.refresh()
    source.used_mb = (None, 300.0)
    monitor.refresh()
    assert monitor.get_stats()[0] == 1300.0


def test_the_age_is_infinite_until_every_device_was_read(source: FakeSource, monitor: GPUMonitor) -> None:
    source.used_mb = (None, 300.0)
    monitor.refresh()
    assert monitor.last_sample_age_seconds() == math.inf
    source.used_mb = (100.0, 300.0)
    monitor.refresh()
    assert 0 <= monitor.last_sample_age_seconds() < DEADLINE_S


def test_failures_are_logged_once_a_change(
    source: FakeSource, monitor: GPUMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    good = source.used_mb
    with caplog.at_level(logging.INFO):
        for used_mb in (good, OSError("driver gone"), OSError("driver gone"), good, good):
            source.used_mb = used_mb
            monitor.refresh()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "driver gone" in caplog.records[0].getMessage()


def test_polling_survives_a_failing_source(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.start()
    source.used_mb = RuntimeError("junk")
    source.wait_for_more(3)
    source.used_mb = (1.0, 1.0)
    source.wait_for_more(2)
    assert monitor.get_stats()[0] == 2.0


def publish(store: LocalSamples, second: float, used_mb: float | None, index: int = 0) -> None:
    store.publish([DeviceSample(index, used_mb, int(second * 1e9))])


def test_the_peak_is_the_largest_in_the_window() -> None:
    store = LocalSamples(10000.0, peak_window_seconds=30.0)
    publish(store, 100, 500.0)
    publish(store, 110, 900.0)
    publish(store, 120, 400.0)
    assert store.stats() == (400.0, 900.0, 10000.0)
    publish(store, 140, 300.0)
    assert store.stats()[1] == 900.0
    publish(store, 141, 300.0)
    assert store.stats()[1] == 400.0


def test_reset_peak_starts_from_the_current_figure() -> None:
    store = LocalSamples(10000.0, peak_window_seconds=30.0)
    publish(store, 100, 900.0)
    publish(store, 101, 400.0)
    store.reset_peak()
    assert store.stats() == (400.0, 400.0, 10000.0)


def test_a_peak_that_was_reset_counts_for_as_long_as_others() -> None:
    store = LocalSamples(10000.0, peak_window_seconds=30.0)
    now_s = time.monotonic()
    publish(store, now_s - 1, 900.0)
    publish(store, now_s, 400.0)
    store.reset_peak()
    publish(store, now_s + 1, 300.0)
    assert store.stats() == (300.0, 400.0, 10000.0)
    publish(store, now_s + 3600, 200.0)
    assert store.stats() == (200.0, 200.0, 10000.0)


def test_the_window_ends_with_the_newest_figure_of_a_sample() -> None:
    store = LocalSamples(10000.0, peak_window_seconds=30.0)
    store.publish([DeviceSample(0, 500.0, 100 * 10**9), DeviceSample(1, 400.0, 140 * 10**9)])
    publish(store, 160, 100.0)
    assert store.stats() == (500.0, 900.0, 10000.0)


def test_of_two_figures_of_one_moment_the_one_that_is_published_last_counts_from_the_first_moment_on() -> None:
    store = LocalSamples(10000.0, peak_window_seconds=30.0)
    for used_mb in (400.0, 500.0, None):
        publish(store, 0, used_mb)
    assert store.stats()[0] == 500.0


def test_the_attributes_of_beams_monitor_are_those_of_the_own_samples() -> None:
    monitor = GPUMonitor(12000.0)
    publish(monitor._local, 100, 500.0)
    publish(monitor._local, 101, 300.0)
    assert (monitor._current_usage, monitor._peak_usage, monitor._total_memory) == (300.0, 500.0, 12000.0)
    assert list(monitor._memory_history) == [(100.0, 500.0), (101.0, 300.0)]
    monitor._current_usage, monitor._peak_usage, monitor._total_memory = 1.0, 2.0, 3.0
    assert monitor.get_stats() == (1.0, 2.0, 3.0)
    assert not monitor._running
    with monitor._lock:
        assert monitor._local.lock.locked()


def test_a_sample_that_was_overtaken_does_not_replace_the_newer_one() -> None:
    store = LocalSamples(10000.0, peak_window_seconds=30.0)
    publish(store, 101, 400.0)
    publish(store, 100, 900.0)
    assert store.stats()[0] == 400.0


def test_a_bound_monitor_reads_and_writes_the_store_and_polls_nothing(source: FakeSource, monitor: GPUMonitor) -> None:
    store = FakeStore()
    monitor.start()
    monitor.bind(store)
    monitor.start()
    assert not monitor._running
    assert not store.published
    monitor.refresh()
    assert [[sample.used_mb for sample in samples] for samples in store.published] == [[1000.0, 200.0]]
    assert source.asked_for == (41, 42)
    monitor.reset_peak()
    assert store.resets == 1
    assert monitor.get_stats() == (1.0, 2.0, 3.0)
    monitor.bind(None)
    assert monitor.get_stats() == (1200.0, 1200.0, 20000.0)


def test_a_bound_monitor_publishes_failures_as_unknown(source: FakeSource, monitor: GPUMonitor) -> None:
    store = FakeStore()
    monitor.bind(store)
    source.used_mb = OSError("driver gone")
    monitor.refresh()
    assert [[sample.used_mb for sample in samples] for samples in store.published] == [[None, None]]


def test_alone_the_process_accounts_for_itself(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.refresh()
    assert list(source.asked_for) == [os.getpid()]


def test_a_forked_child_can_start_a_thread_of_its_own(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.start()
    with monitor._lock:  # in the child, no thread will ever release this lock
        pid = os.fork()
        if pid == 0:
            monitor._local.reset_peak()
            monitor.start()
            source.sampled = threading.Condition()
            source.wait_for_more(2)
            os._exit(0 if monitor.get_stats()[0] == 1200.0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert monitor._running


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("fallback_memory_mb", 0.0), ("fallback_memory_mb", math.inf), ("fallback_memory_mb", math.nan)),
        *(("poll_interval", 0.0), ("poll_interval", math.inf), ("poll_interval", 2 * threading.TIMEOUT_MAX)),
        *(("peak_window_seconds", -1.0), ("peak_window_seconds", math.inf), ("budget_mb", 0.0), ("budget_mb", -1.0)),
        *(("source", None), ("source", 5)),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        GPUMonitor(**{name: value})


def test_the_smallest_numbers_that_make_sense_are_taken() -> None:
    monitor = GPUMonitor(0.5, 1e-6, 0.0, budget_mb=0.5)
    assert (monitor.fallback_memory_mb, monitor.poll_interval, monitor.peak_window_seconds) == (0.5, 1e-6, 0.0)
    assert GPUMonitor(poll_interval=threading.TIMEOUT_MAX).poll_interval == threading.TIMEOUT_MAX


def test_who_asks_for_a_sample_of_a_source_that_cannot_work_is_told_so() -> None:
    monitor = GPUMonitor(source="nvml")
    with patch.dict(sys.modules, {"pynvml": None}):
        for ask in (monitor.refresh, monitor.request_refresh, monitor.start, monitor.devices):
            with pytest.raises(SourceUnavailableError, match="nvml"):
                ask()


def test_a_source_is_asked_for_its_devices_once(source: FakeSource, monitor: GPUMonitor) -> None:
    with patch.object(source, "devices", wraps=source.devices) as devices:
        assert monitor.refresh() and monitor.refresh()
        monitor.last_sample_age_seconds()
        assert [device.index for device in monitor.devices()] == [0, 1]
    assert devices.call_count == 1


def test_a_source_that_does_not_say_its_devices_in_time_is_unavailable(source: FakeSource) -> None:
    answer = threading.Event()

    def hang() -> tuple[DeviceInfo, ...]:
        answer.wait(DEADLINE_S)
        return ()

    with patch.object(source, "devices", hang), patch("mpmm.memory.monitor.START_TIMEOUT_S", 0.01):
        monitor = GPUMonitor(source=source)
        with pytest.raises(SourceUnavailableError, match="its devices: no answer"):
            monitor.devices()
        answer.set()
    # It may have recovered.
    assert len(monitor.devices()) == 2


@pytest.mark.parametrize("end", [GPUMonitor.stop, GPUMonitor.close_source])
def test_the_sampling_thread_ends_with_its_monitor(source: FakeSource, end: Callable[[GPUMonitor], None]) -> None:
    with patch("mpmm.memory.sampler.IDLE_S", DEADLINE_S):
        monitor = GPUMonitor(source=source)
        assert monitor.refresh()
        [thread] = source.threads
        end(monitor)
        thread.join(DEADLINE_S / 2)
        assert not thread.is_alive()


class DatedSource(FakeSource):
    """Was read so many seconds ago, by device."""

    def __init__(self, *ago_s: float) -> None:
        super().__init__(*ago_s)
        self.ago_s = ago_s

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Return figures of the past."""
        now_ns = time.monotonic_ns()
        return tuple(DeviceSample(i, 100.0, now_ns - int(ago_s * 1e9)) for i, ago_s in enumerate(self.ago_s))


def test_the_age_is_that_of_the_oldest_figure() -> None:
    monitor = GPUMonitor(source=DatedSource(5.0, 1000.0, 100.0))
    assert monitor.refresh()
    assert 1000.0 <= monitor.last_sample_age_seconds() < 1000.0 + DEADLINE_S
    monitor.stop()


def test_a_device_without_a_figure_or_a_reason_is_reported_as_that(
    source: FakeSource, monitor: GPUMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    source.used_mb = (None, 200.0)
    assert monitor.refresh()
    [record] = caplog.records
    assert record.getMessage() == "fake cannot read device(s) [0] (no figure): keeping the last figure"


def test_a_monitor_by_itself_has_the_numbers_of_a_manager() -> None:
    defaults = {name: one.default for name, one in inspect.signature(GPUMonitor).parameters.items()}
    shared = defaults.keys() & Settings.__dataclass_fields__.keys()
    assert shared == {"fallback_memory_mb", "poll_interval", "peak_window_seconds"}
    assert all(defaults[name] == getattr(Settings(), name) for name in shared)


def test_a_budget_may_be_as_small_as_one_likes() -> None:
    assert GPUMonitor(source="host", budget_mb=0.5).devices()[0].total_mb == 0.5


# ---- a source that hangs -----------------------------------------------------------------------------------


class HangingSource(FakeSource):
    """Answers only while `answer` is set."""

    def __init__(self, *used_mb: float | None) -> None:
        super().__init__(*used_mb)
        self.answer = threading.Event()
        self.answer.set()
        self.inside = 0
        self.most_inside = 0
        self.closed_inside = 0

    def hang(self) -> None:
        self.answer.clear()

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        taken_ns = time.monotonic_ns()
        with self.sampled:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        try:
            super().sample(server_pids)
            assert self.answer.wait(DEADLINE_S)
        finally:
            with self.sampled:
                self.inside -= 1
        assert not isinstance(self.used_mb, Exception)
        return tuple(DeviceSample(i, used_mb, taken_ns) for i, used_mb in enumerate(self.used_mb))

    def close(self) -> None:
        super().close()
        self.closed_inside += self.inside


@pytest.fixture
def hanging() -> Iterator[HangingSource]:
    source = HangingSource(1000.0)
    yield source
    source.answer.set()


@pytest.fixture
def bound(hanging: HangingSource) -> Iterator[tuple[GPUMonitor, FakeStore]]:
    """A monitor of a source that can hang, and its store."""
    monitor, store = GPUMonitor(source=hanging), FakeStore()
    monitor.bind(store)
    yield monitor, store
    hanging.answer.set()
    monitor.stop()


def begin_a_sample_that_hangs(monitor: GPUMonitor, source: HangingSource) -> None:
    source.hang()
    samples = source.samples
    monitor.request_refresh()
    with source.sampled:
        assert source.sampled.wait_for(lambda: source.samples > samples, DEADLINE_S)


def test_a_source_that_hangs_is_waited_for_no_longer_than_asked_and_its_figure_ages(
    hanging: HangingSource,
) -> None:
    monitor = GPUMonitor(source=hanging)
    assert monitor.refresh()
    hanging.used_mb = (700.0,)
    since = time.monotonic()
    hanging.hang()
    watch = Stopwatch()
    assert not monitor.refresh(timeout_s=0.1)
    assert watch.s() >= 0.1
    assert watch.calm_s() < 1.0
    assert monitor.get_stats()[0] == 1000.0
    assert monitor.last_sample_age_seconds() >= 0.1
    # Its thread may have begun somewhat later than we.
    assert 0 < monitor.sampling_for_s <= time.monotonic() - since
    watch = Stopwatch()
    assert not monitor.refresh(timeout_s=-1.0)
    monitor.request_refresh()
    assert watch.calm_s() < 1.0
    # Its late answer counts, although no caller waits for it any more.
    hanging.answer.set()
    assert monitor.refresh()
    assert monitor.get_stats()[0] == 700.0
    assert monitor.sampling_for_s == 0
    monitor.stop()


def test_callers_share_samples_none_of_which_began_before_they_asked(
    hanging: HangingSource, bound: tuple[GPUMonitor, FakeStore]
) -> None:
    monitor, store = bound
    begin_a_sample_that_hangs(monitor, hanging)
    asked_ns = time.monotonic_ns()
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(monitor.refresh, timeout_s=DEADLINE_S) for _ in range(8)]
        # All of them are in the queue, and some that do not wait.
        wait_until(lambda: len(monitor._sampler._waiting) == 8, "all of them wait")
        assert monitor._sampler._asked == monitor._sampler._begun + 1, "a second one is asked for"
        for _ in range(3):
            monitor.request_refresh()
        hanging.answer.set()
        assert all(answer.result() for answer in answers)
    assert hanging.samples == 2 and hanging.most_inside == 1
    assert len(store.published) == 2
    assert store.published[1][0].taken_ns >= asked_ns


def test_a_call_between_samples_takes_none_of_its_own(
    hanging: HangingSource, bound: tuple[GPUMonitor, FakeStore]
) -> None:
    monitor, _ = bound
    called: list[int] = []
    for samples in (1, 2):
        assert monitor.refresh()
        monitor.call(lambda: called.append(hanging.samples), DEADLINE_S)
        assert (called[-1], hanging.samples) == (samples, samples)


def test_nothing_is_published_to_a_store_that_was_taken_away(
    hanging: HangingSource, bound: tuple[GPUMonitor, FakeStore]
) -> None:
    monitor, store = bound
    begin_a_sample_that_hangs(monitor, hanging)
    monitor.bind(None)
    hanging.answer.set()
    assert monitor.refresh()
    assert not store.published
    assert monitor.get_stats()[0] == 1000.0


def test_the_store_is_told_of_each_sample(hanging: HangingSource) -> None:
    told: list[int] = []
    monitor, store = GPUMonitor(source=hanging), FakeStore()
    monitor.bind(store, lambda: told.append(len(store.published)))
    assert monitor.refresh() and monitor.refresh()
    assert told == [1, 2]
    monitor.bind(None)
    assert monitor.refresh()
    assert told == [1, 2]
    monitor.stop()


def test_stop_does_not_wait_for_a_source_that_hangs_which_is_closed_when_it_comes_back(hanging: HangingSource) -> None:
    with (
        patch("mpmm.memory.monitor.choose_source", return_value=hanging),
        patch("mpmm.memory.monitor.CLOSE_TIMEOUT_S", 0.05),
    ):
        monitor = GPUMonitor(poll_interval=0.001)
        monitor.start()
        begin_a_sample_that_hangs(monitor, hanging)
        watch = Stopwatch()
        monitor.stop()
        assert watch.calm_s() < 1.0
        assert not hanging.closed
        hanging.answer.set()
        wait_until(lambda: hanging.closed, "the source is closed")
        assert not hanging.closed_inside
        # And it can begin again.
        monitor.start()
        monitor.stop()


def test_a_source_is_not_opened_again_by_a_sample_that_was_asked_for_before_it_was_closed(
    hanging: HangingSource, bound: tuple[GPUMonitor, FakeStore]
) -> None:
    monitor, _ = bound
    begin_a_sample_that_hangs(monitor, hanging)
    monitor.request_refresh()
    samples_at_close: list[int] = []
    with patch.object(hanging, "close", lambda: samples_at_close.append(hanging.samples)):
        closing = threading.Thread(target=monitor.close_source)
        closing.start()
        wait_until(lambda: monitor._sampler._jobs, "it is to be closed")
        hanging.answer.set()
        closing.join(DEADLINE_S)
    assert samples_at_close == [hanging.samples] == [2]


def test_a_child_that_was_forked_while_the_source_hangs_samples_for_itself(
    hanging: HangingSource, bound: tuple[GPUMonitor, FakeStore]
) -> None:
    monitor, _ = bound
    begin_a_sample_that_hangs(monitor, hanging)
    # The lock of the sampler is held by a thread that the child does not have.
    with monitor._sampler._mutex:
        pid = os.fork()
        if pid == 0:
            hanging.sampled, hanging.answer, hanging.inside = threading.Condition(), threading.Event(), 0
            hanging.answer.set()
            os._exit(0 if monitor.sampling_for_s == 0 and monitor.refresh() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_who_gives_the_sampling_thread_a_job_waits_for_it_but_not_for_a_source_that_hangs(
    hanging: HangingSource, bound: tuple[GPUMonitor, FakeStore]
) -> None:
    monitor, _ = bound
    done: list[str] = []
    monitor.call(lambda: done.append("at once"), DEADLINE_S)
    assert done == ["at once"]
    begin_a_sample_that_hangs(monitor, hanging)
    monitor.call(lambda: done.append("late"), 0.01)
    assert done == ["at once"]
    monitor.call(lambda: done.append("later"), -1.0)
    assert not monitor.refresh(timeout_s=-1.0)
    assert done == ["at once"]


def test_a_program_ends_although_its_source_hangs() -> None:
    program = """
import test_gpu_monitor as these
these.DEADLINE_S = None  # it hangs for ever
source = these.HangingSource(1.0)
these.begin_a_sample_that_hangs(these.GPUMonitor(source=source), source)
"""
    environment = {**os.environ, "PYTHONPATH": import_path()}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=DEADLINE_S)


def test_the_sampling_thread_ends_by_itself_and_starts_again(source: FakeSource) -> None:
    def samplers() -> set[threading.Thread]:
        return {thread for thread in source.threads if thread.is_alive()}

    with patch("mpmm.memory.sampler.IDLE_S", 0.01):
        monitor = GPUMonitor(source=source)
        assert monitor.refresh()
        wait_until(lambda: not samplers(), "the thread has ended")
        assert monitor.refresh()
    assert source.samples == 2


def test_a_source_that_raises_what_ends_threads_is_asked_again(
    source: FakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = GPUMonitor(source=source)
    with patch.object(source, "sample", side_effect=SystemExit):
        for _ in range(2):
            assert monitor.refresh()
            assert len([record for record in caplog.records if record.exc_info]) == 1
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert monitor.refresh() and monitor.get_stats()[0] == 1200.0
    # The next failure is another one.
    with patch.object(source, "sample", side_effect=SystemExit):
        assert monitor.refresh()
    assert len([record for record in caplog.records if record.exc_info]) == 2
    monitor.stop()


def test_without_a_thread_to_be_had_the_last_figures_stand(source: FakeSource) -> None:
    monitor = GPUMonitor(source=source)
    with patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
        assert monitor.refresh(timeout_s=DEADLINE_S) is False
        monitor.close_source()
    assert source.closed == 1
    assert monitor.refresh()
    monitor.stop()
    assert source.closed == 1, "it was closed by who could not start a thread for that"


def test_a_thread_whose_start_was_interrupted_takes_the_sample_all_the_same(source: FakeSource) -> None:
    monitor = GPUMonitor(source=source)

    def start_and_be_interrupted(thread: threading.Thread) -> None:
        thread.start()
        raise KeyboardInterrupt

    with patch("mpmm.memory.sampler.start_thread", start_and_be_interrupted), pytest.raises(KeyboardInterrupt):
        monitor.refresh()
    wait_until(lambda: source.samples, "the sample is taken")
    assert monitor.refresh()
    assert len(source.threads) == 1
    monitor.stop()


def test_a_sampler_has_nothing_to_do_at_first_and_then_what_it_is_asked_for() -> None:
    taken: list[threading.Thread] = []
    sampler = Sampler(lambda: taken.append(threading.current_thread()), "of the test")
    assert sampler.busy_s == 0
    assert sampler.sample(DEADLINE_S)
    sampler.end()
    [thread] = taken
    assert (thread.name, thread.daemon) == ("of the test", True)


class KnowingSource(FakeSource):
    """Has shown of processes what the test says."""

    process_knowledge: bool | None = None


def test_what_a_source_knows_of_processes_is_said_once_a_change(caplog: pytest.LogCaptureFixture) -> None:
    source = KnowingSource(100.0)
    monitor = GPUMonitor(source=source)
    said = []
    with caplog.at_level(logging.INFO):
        for source.process_knowledge in (None, None, False, False, None, False, True, True, False, False, None, True):
            assert monitor.refresh()
            said.append("".join(f"{one.levelname} {'cannot' in one.getMessage()}" for one in caplog.records))
            caplog.clear()
    warning, info = "WARNING True", "INFO False"
    assert said == ["", "", warning, "", "", "", info, "", warning, "", "", info]
    monitor.stop()


def test_a_source_that_never_knows_processes_is_not_remarked_upon(
    source: FakeSource, monitor: GPUMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert monitor.refresh() and monitor.refresh()
    assert not caplog.records
