"""Which memory source mpmm chooses, and how sources describe themselves."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from fake_drivers import BUDGET_MB, FakeDevice, FakeSmi, NVMLError, install, process, two_gpus, used
from fake_drivers import plain_environment as plain_environment  # the fixture
from fake_drivers import smi as smi  # the fixture
from patience import DEADLINE_S

from mpmm.errors import InvalidArgumentError
from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MonitorSource
from mpmm.sources import (
    MemorySource,
    SourceUnavailableError,
    choose_source,
    counts_named_only,
    frees_late,
    is_accounting_only,
)
from mpmm.sources.base import MIB
from mpmm.sources.booked import BookedSource
from mpmm.sources.host_memory import HostMemorySource
from mpmm.sources.nvidia_smi import NvidiaSmiSource
from mpmm.sources.nvml import NvmlSource
from mpmm.sources.selected import SelectedDevices


class TestChoice:
    def test_auto_takes_nvml_first(self, monkeypatch: pytest.MonkeyPatch, smi: FakeSmi) -> None:
        install(monkeypatch, *two_gpus())
        assert choose_source().name == "nvml"
        assert not smi.calls

    def test_auto_takes_nvidia_smi_where_nvml_fails(self, smi: FakeSmi) -> None:
        assert choose_source().name == "nvidia-smi"

    def test_auto_does_without_nvidia_ml_py(self, monkeypatch: pytest.MonkeyPatch, smi: FakeSmi) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert choose_source().name == "nvidia-smi"

    def test_auto_ends_with_the_accounts_and_one_warning(self, smi: FakeSmi, caplog: pytest.LogCaptureFixture) -> None:
        smi.answers.clear()
        with caplog.at_level(logging.WARNING):
            source = choose_source(fallback_memory_mb=12000.0)
        assert is_accounting_only(source)
        assert [d.total_mb for d in source.devices()] == [12000.0]
        assert used(source) == [None]
        (record,) = caplog.records
        assert "12000" in record.getMessage()

    def test_hidden_gpus_stay_hidden_from_every_source(self, monkeypatch: pytest.MonkeyPatch, smi: FakeSmi) -> None:
        install(monkeypatch, *two_gpus())
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert choose_source().name == "booked"

    def test_the_environment_stands_in_for_auto_alone(self, monkeypatch: pytest.MonkeyPatch, smi: FakeSmi) -> None:
        monkeypatch.setenv("MPMM_MEMORY_SOURCE", "host")
        assert choose_source(budget_mb=500.0).devices()[0].total_mb == 500.0
        assert choose_source("booked").name == "booked"
        monkeypatch.setenv("MPMM_MEMORY_SOURCE", "auto")
        assert choose_source().name == "nvidia-smi"

    @pytest.mark.parametrize("name", ["nvml", "nvidia-smi"])
    def test_a_source_asked_for_by_name_must_work(self, smi: FakeSmi, name: str) -> None:
        smi.answers.clear()
        with pytest.raises(SourceUnavailableError, match=name):
            choose_source(name)

    def test_a_driver_that_hangs_at_its_start_is_given_up_in_time(
        self, monkeypatch: pytest.MonkeyPatch, smi: FakeSmi
    ) -> None:
        monkeypatch.setattr("mpmm.sources.START_TIMEOUT_S", 0.1)
        fake = install(monkeypatch, *two_gpus())
        init, inits, answer, answered = fake.nvmlInit, [], threading.Event(), threading.Event()

        def hang() -> None:
            inits.append(threading.current_thread())
            answer.wait(DEADLINE_S)
            init()
            answered.set()

        monkeypatch.setattr(fake, "nvmlInit", hang)
        assert choose_source().name == "nvidia-smi"
        # Nobody hangs beside the first one.
        with pytest.raises(SourceUnavailableError, match="hangs"):
            choose_source("nvml")
        answer.set()
        (thread,) = inits
        thread.join(DEADLINE_S)
        assert answered.is_set()
        assert choose_source("nvml").name == "nvml"

    def test_an_unknown_name_is_refused_with_the_names_that_exist(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(InvalidArgumentError, match="nvidia-smi, amdsmi, host, booked"):
            choose_source("nvmll")
        monkeypatch.setenv("MPMM_MEMORY_SOURCE", "cuda")
        with pytest.raises(InvalidArgumentError, match="MPMM_MEMORY_SOURCE"):
            choose_source()

    def test_a_ready_source_passes_through_and_other_objects_do_not(self) -> None:
        source = BookedSource(100.0)
        assert choose_source(source) is source
        with pytest.raises(InvalidArgumentError, match="MemorySource"):
            choose_source(object())  # type: ignore[arg-type]  # wrong on purpose

    @pytest.mark.parametrize(("old", "asks"), [("settles_late", frees_late), ("books_only", is_accounting_only)])
    def test_an_attribute_of_before_counts_and_is_warned_of(self, old: str, asks: Callable[[Any], bool]) -> None:
        source: Any = type("Mine", (SimpleNamespace,), {"__module__": __name__})(name="mine", **{old: True})
        with pytest.warns(DeprecationWarning, match=f"'mine': its attribute {old} is called") as warned:
            assert asks(source)
        assert [warning.filename for warning in warned] == [__file__], "its author is told"
        # In a notebook, say, there is no file.
        typed: Any = type("Mine", (SimpleNamespace,), {"__module__": "typed_by_hand"})(name="mine", **{old: True})
        with pytest.warns(DeprecationWarning, match=old) as warned:
            assert asks(typed)
        assert [warning.filename for warning in warned] == ["<typed_by_hand>"]
        assert not asks(SimpleNamespace(name="mine"))

    def test_accounts_need_a_size(self) -> None:
        with pytest.raises(InvalidArgumentError):
            BookedSource(0.0)


class TestUnifiedMemory:
    """A GPU that shares the host's memory: 120000 MB, of which 70000 are free and 100000 available."""

    @pytest.fixture(autouse=True)
    def host(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
        memory = SimpleNamespace(total=120000 * MIB, available=100000 * MIB, free=70000 * MIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        limits: list[tuple[int, int | None]] = []
        monkeypatch.setattr("mpmm.sources.host_memory.cgroup_limits", lambda: limits)
        return limits

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
        gpu = FakeDevice("GPU-aaaa", 0, 0)
        gpu.tells_memory = False
        gpu.compute = [process(7, 300)]
        install(monkeypatch, gpu)
        return gpu

    @pytest.mark.parametrize("name", ["nvml", "auto"])
    def test_nvml_goes_by_the_hosts_memory_and_by_its_own_figures_of_processes(
        self, name: str, gpu: FakeDevice, host: list[tuple[int, int | None]]
    ) -> None:
        source = choose_source(name)
        assert [(d.uuid, d.total_mb) for d in source.devices()] == [("GPU-aaaa", 120000)]
        (sample,) = source.sample((7,))
        assert (source.name, sample.used_mb, sample.process_mb) == ("nvml", 20000, {7: 300})
        assert source.measures_processes and sample.unrelated_mb((7,)) == 19700
        host.append((50000 * MIB, 10000 * MIB))
        source = choose_source(name)
        assert [d.total_mb for d in source.devices()] == [50000]
        assert used(source) == [10000]

    def test_a_page_cache_that_a_driver_counts_as_used_is_not(self, gpu: FakeDevice) -> None:
        gpu.tells_memory, gpu.total, gpu.used = True, 120000 * MIB, 50300 * MIB
        assert used(NvmlSource()) == [20000]
        # One that has as much memory of its own, by chance, has not as much free.
        gpu.used = 300 * MIB
        assert used(NvmlSource()) == [300]
        gpu.total, gpu.used = 80000 * MIB, 10000 * MIB
        assert used(NvmlSource()) == [10000]

    @pytest.mark.parametrize("name", ["nvidia-smi", "auto"])
    @pytest.mark.parametrize("total", ["[N/A]", "[Not Supported]", "120000"])
    def test_nvidia_smi_goes_by_the_hosts_memory(self, name: str, total: str, smi: FakeSmi) -> None:
        smi.answers |= {"total": f"{total}\n", "free": "69700\n", "uuid_name": "GPU-aaaa, NVIDIA GB10\n"}
        smi.answers["uuid_free"] = f"GPU-aaaa, {total}\n"
        source = choose_source(name)
        assert [(d.uuid, d.name, d.total_mb) for d in source.devices()] == [("GPU-aaaa", "NVIDIA GB10", 120000)]
        assert used(source) == [20000]

    def test_one_beside_others_that_does_not_tell_its_memory_is_left_out(
        self, gpu: FakeDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install(monkeypatch, gpu, FakeDevice("GPU-bbbb", 24000, 2000))
        assert [d.uuid for d in NvmlSource().devices()] == ["GPU-bbbb"]

    def test_a_lost_gpu_does_not_share_the_hosts_memory(self, gpu: FakeDevice) -> None:
        gpu.broken = True
        with pytest.raises(SourceUnavailableError):
            NvmlSource()


class TestSilence:
    """Whether NVML knows processes, by what it has shown."""

    def test_a_source_knows_processes_once_one_of_ours_was_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu, _ = two_gpus()
        install(monkeypatch, gpu)
        source = NvmlSource()
        states = []
        for compute in ([], [process(1, 300)], [process(1, 300), process(os.getpid(), 50)], []):
            gpu.compute = compute
            (sample,) = source.sample((7,))
            states.append((source.process_knowledge, source.measures_processes, sample.processes_known))
        # Somebody else's figure is no evidence; and after the evidence, who is not listed has nothing.
        assert states == [(None, False, False), (None, False, False), (True, True, True), (True, True, True)]

    @pytest.mark.parametrize(
        ("ours", "others", "known"),
        [
            ([], [], None),
            ([], [50], None),
            ([], [None], False),
            ([], [None, 50], None),
            ([None], [50], False),
            ([100], [None], True),
        ],
    )
    def test_one_sample_tells_what_the_driver_lets_us_know(
        self, monkeypatch: pytest.MonkeyPatch, ours: list[int | None], others: list[int | None], known: bool | None
    ) -> None:
        """Of others it may tell less than of ours; but what it withholds of ours, or of all, is not to be had."""
        gpu, _ = two_gpus()
        gpu.compute = [process(os.getpid(), mb) for mb in ours]
        gpu.compute += [process(pid, mb) for pid, mb in zip((1, os.getppid()), others, strict=False)]
        install(monkeypatch, gpu)
        source = NvmlSource()
        source.sample(())
        assert source.process_knowledge is known

    def test_figures_that_are_withheld_are_no_knowledge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu, _ = two_gpus()
        install(monkeypatch, gpu)
        source = NvmlSource()
        gpu.compute = [process(1, 300), process(7, None)]
        source.sample((7,))
        assert source.process_knowledge is False
        gpu.compute = [process(1, 300)]
        source.sample((7,))
        assert source.process_knowledge is None

    def test_the_clients_of_an_mps_daemon_are_in_a_list_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu, _ = two_gpus()
        fake = install(monkeypatch, gpu)
        clients = [process(7, 300), process(8, 200)]
        monkeypatch.setattr(fake, "nvmlDeviceGetMPSComputeRunningProcesses_v3", lambda _: clients, raising=False)
        gpu.compute = [process(1, 560)]
        gpu.used = 600 * MIB
        source = NvmlSource()
        (sample,) = source.sample((7, 8))
        assert source.measures_processes
        # The memory that the daemon has for its clients is not counted twice.
        assert sample.process_mb == {1: 100, 7: 300, 8: 200} and sample.unrelated_mb((7, 8)) == 100

    def test_a_list_that_the_driver_does_not_have_is_asked_for_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu, _ = two_gpus()
        fake = install(monkeypatch, gpu)
        asked: list[FakeDevice] = []

        def missing(device: FakeDevice) -> None:
            asked.append(device)
            raise NVMLError("Function Not Found")

        monkeypatch.setattr(fake, "nvmlDeviceGetMPSComputeRunningProcesses_v3", missing, raising=False)
        source = NvmlSource()
        assert used(source) == used(source) == [1000.0]
        assert len(asked) == 1

    def test_a_library_that_is_too_old_for_a_list_has_its_other_figures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu, _ = two_gpus()
        fake = install(monkeypatch, gpu)

        class NVMLLibraryMismatchError(Exception):
            """As pynvml's, it is no NVMLError."""

        def mismatch(_: FakeDevice) -> None:
            raise NVMLLibraryMismatchError("use a versioned function")

        monkeypatch.setattr(fake, "NVMLLibraryMismatchError", NVMLLibraryMismatchError, raising=False)
        monkeypatch.setattr(fake, "nvmlDeviceGetComputeRunningProcesses", mismatch)
        source = NvmlSource()
        assert used(source) == [1000.0]
        assert source.process_knowledge is False


class TestWhatSourcesTellOfThemselves:
    @pytest.mark.parametrize("chosen", [[1], ["GPU-bbbb"], [0, "GPU-bbbb"]], ids=str)
    def test_chosen_devices_have_their_own_figures(
        self, monkeypatch: pytest.MonkeyPatch, chosen: list[int | str]
    ) -> None:
        install(monkeypatch, *two_gpus())
        source = SelectedDevices(NvmlSource(), chosen)
        assert [device.uuid for device in source.devices()] == ["GPU-aaaa", "GPU-bbbb"][-len(chosen) :]
        assert used(source) == [1000.0, 2000.0][-len(chosen) :]

    def test_chosen_devices_measure_processes_where_their_source_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu, other = two_gpus()
        install(monkeypatch, gpu, other)
        source = NvmlSource()
        chosen = SelectedDevices(source, [0])
        assert (chosen.measures_processes, chosen.process_knowledge) == (False, None)
        gpu.compute = [process(7, 300)]
        source.sample((7,))
        assert (chosen.measures_processes, chosen.process_knowledge) == (True, True)

    def test_only_host_memory_with_a_budget_counts_nothing_but_named_processes(self) -> None:
        sources: dict[MemorySource, bool] = {
            HostMemorySource(BUDGET_MB): True,
            HostMemorySource(): False,
            BookedSource(1000.0): False,
        }
        for source, expected in sources.items():
            assert counts_named_only(source) is expected
            assert counts_named_only(SelectedDevices(source, [0])) is expected

    @pytest.mark.parametrize("name", ["nvml", "lost", "not started", "nvidia-smi", "host", "booked", "monitor"])
    def test_a_sample_says_between_which_times_it_was_taken(
        self, name: str, smi: FakeSmi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpus = two_gpus()
        driver = install(monkeypatch, *gpus)
        makers: dict[str, Callable[[], MemorySource]] = {
            "nvidia-smi": NvidiaSmiSource,
            "host": HostMemorySource,
            "booked": lambda: BookedSource(1000.0),
            "monitor": lambda: MonitorSource(GPUMonitor(source=BookedSource(1000.0))),
        }
        source = makers.get(name, NvmlSource)()
        gpus[0].broken = name == "lost"
        if name == "not started":
            source.close()
            driver.init_error = "Driver Not Loaded"
        began_ns = time.monotonic_ns()
        samples = source.sample(())
        ended_ns = time.monotonic_ns()
        assert samples
        assert all(began_ns <= sample.taken_ns <= sample.done_ns <= ended_ns for sample in samples)


def test_a_monitor_of_the_callers_own_is_asked_anew_for_each_sample() -> None:
    source = BookedSource(1000.0)
    monitor = GPUMonitor(source=source)
    refreshed: list[float] = []

    class Mine:
        """A monitor whose figures are those of its last refresh."""

        used_mb = 0.0

        def refresh(self) -> None:
            self.used_mb += 100.0
            refreshed.append(self.used_mb)

        def get_stats(self) -> tuple[float, float, float]:
            return self.used_mb, self.used_mb, 1000.0

        def __getattr__(self, name: str) -> Any:
            return getattr(monitor, name)

    mine = MonitorSource(Mine())
    samples = [sample for _ in range(2) for sample in mine.sample([])]
    assert [(sample.index, sample.used_mb) for sample in samples] == [(0, 100.0), (0, 200.0)]
    assert refreshed == [100.0, 200.0]
    assert all(sample.taken_ns <= sample.done_ns for sample in samples)


def test_a_source_that_is_being_started_may_be_started_by_another_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one that hangs is not tried again; here each waits for the other."""
    both = threading.Barrier(2)

    def start() -> BookedSource:
        both.wait(DEADLINE_S)
        return BookedSource(1000.0)

    monkeypatch.setattr("mpmm.sources.nvml.NvmlSource", start)
    found: list[MemorySource] = []
    threads = [threading.Thread(target=lambda: found.append(choose_source("nvml"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
