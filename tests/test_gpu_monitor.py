"""GPUMonitor on a source that the test controls."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import pytest

from mpmm.errors import InvalidArgumentError
from mpmm.gpu_monitor import GPUMonitor, LocalBoard
from mpmm.sources import DeviceInfo, DeviceSample
from mpmm.sources.booked import BookedSource

DEADLINE_S = 20.0


class FakeSource:
    """Devices of 10000 MB whose use is what the test says; an exception is raised instead."""

    name = "fake"
    measures_processes = False
    settles_late = False
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


class FakeBoard:
    def __init__(self) -> None:
        self.published: list[Sequence[DeviceSample]] = []
        self.resets = 0

    def publish(self, samples: Sequence[DeviceSample], patience_s: float | None = None) -> None:
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
    assert monitor._thread is first
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
    with patch("mpmm.gpu_monitor.choose_source", return_value=source) as choose:
        monitor = GPUMonitor(poll_interval=0.001)
        assert not choose.called
        monitor.start()
        monitor.stop()
        assert source.closed == 1
        assert monitor.get_stats()[0] == 1200.0
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


def publish(board: LocalBoard, second: float, used_mb: float | None, index: int = 0) -> None:
    board.publish([DeviceSample(index, used_mb, int(second * 1e9))])


def test_the_peak_is_the_largest_in_the_window() -> None:
    board = LocalBoard(10000.0, peak_window_seconds=30.0)
    publish(board, 100, 500.0)
    publish(board, 110, 900.0)
    publish(board, 120, 400.0)
    assert board.stats() == (400.0, 900.0, 10000.0)
    publish(board, 140, 300.0)
    assert board.stats()[1] == 900.0
    publish(board, 141, 300.0)
    assert board.stats()[1] == 400.0


def test_reset_peak_starts_from_the_current_figure() -> None:
    board = LocalBoard(10000.0, peak_window_seconds=30.0)
    publish(board, 100, 900.0)
    publish(board, 101, 400.0)
    board.reset_peak()
    assert board.stats() == (400.0, 400.0, 10000.0)


def test_a_sample_that_was_overtaken_does_not_replace_the_newer_one() -> None:
    board = LocalBoard(10000.0, peak_window_seconds=30.0)
    publish(board, 101, 400.0)
    publish(board, 100, 900.0)
    assert board.stats()[0] == 400.0


def test_a_bound_monitor_reads_and_writes_the_board_and_polls_nothing(source: FakeSource, monitor: GPUMonitor) -> None:
    board = FakeBoard()
    monitor.start()
    monitor.bind(board)
    monitor.start()
    assert not monitor._running
    assert not board.published
    monitor.refresh()
    assert [[sample.used_mb for sample in samples] for samples in board.published] == [[1000.0, 200.0]]
    assert source.asked_for == (41, 42)
    monitor.reset_peak()
    assert board.resets == 1
    assert monitor.get_stats() == (1.0, 2.0, 3.0)
    monitor.bind(None)
    assert monitor.get_stats() == (1200.0, 1200.0, 20000.0)


def test_a_bound_monitor_publishes_failures_as_unknown(source: FakeSource, monitor: GPUMonitor) -> None:
    board = FakeBoard()
    monitor.bind(board)
    source.used_mb = OSError("driver gone")
    monitor.refresh()
    assert [[sample.used_mb for sample in samples] for samples in board.published] == [[None, None]]


def test_alone_the_process_accounts_for_itself(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.refresh()
    assert list(source.asked_for) == [os.getpid()]


def test_a_forked_child_can_start_a_thread_of_its_own(source: FakeSource, monitor: GPUMonitor) -> None:
    monitor.start()
    with monitor._lock:  # in the child nobody will ever let go of this one
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
    [("fallback_memory_mb", 0.0), ("poll_interval", 0.0), ("poll_interval", math.inf), ("peak_window_seconds", -1.0)],
)
def test_numbers_that_make_no_sense_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        GPUMonitor(**{name: value})  # type: ignore[arg-type]  # any of its parameters
