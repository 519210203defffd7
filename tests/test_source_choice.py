"""Which memory source mpmm chooses, and how sources describe themselves."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from fake_drivers import BUDGET_MB, FakeDevice, FakeSmi, NVMLError, install, process, two_gpus, used
from fake_drivers import plain_environment as plain_environment  # the fixture
from fake_drivers import smi as smi  # the fixture
from patience import DEADLINE_S

from mpmm.errors import InvalidArgumentError
from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MonitorSource
from mpmm.shared_state.settings import Settings
from mpmm.sources import (
    DeviceInfo,
    DeviceSample,
    Measures,
    MemorySource,
    SourceUnavailableError,
    choose_source,
    counts_named_only,
    frees_late,
    is_accounting_only,
    what_it_measures,
)
from mpmm.sources.amd import AmdSource
from mpmm.sources.base import MIB, larger_whole
from mpmm.sources.booked import BookedSource
from mpmm.sources.host_memory import HostMemorySource
from mpmm.sources.nvidia_smi import NvidiaSmiSource
from mpmm.sources.nvml import NvmlSource
from mpmm.sources.selected import SelectedDevices
from mpmm.sources.visible_devices import server_setting


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
        for reason in ("nvml: NVML Shared Library Not Found", "nvidia-smi: nvidia-smi not found", "; amdsmi: "):
            assert reason in record.getMessage()

    def test_who_has_a_logger_is_warned_there_and_who_wants_no_warning_nowhere(
        self, smi: FakeSmi, caplog: pytest.LogCaptureFixture
    ) -> None:
        smi.answers.clear()
        own = logging.getLogger("the caller's own")
        choose_source(logger=own)
        choose_source(logger=own, warn=False)
        choose_source(warn=False)
        assert [record.name for record in caplog.records] == [own.name]

    def test_the_accounts_have_the_total_of_a_manager(self) -> None:
        (device,) = choose_source("booked").devices()
        assert device.total_mb == Settings().fallback_memory_mb

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
        assert thread.daemon, "a program ends although its driver hangs"
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
        assert [(warning.filename, warning.lineno) for warning in warned] == [("<typed_by_hand>", 1)]
        assert not asks(SimpleNamespace(name="mine"))

    @pytest.mark.parametrize(("old", "asks"), [("settles_late", frees_late), ("books_only", is_accounting_only)])
    def test_an_author_is_warned_of_an_old_attribute_once_and_not_where_there_is_the_new_one(
        self, old: str, asks: Callable[[Any], bool]
    ) -> None:
        class Mine(SimpleNamespace):
            name = "mine"

        source: Any = Mine(**{old: True})
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            assert asks(source) and asks(source)
            new = {"settles_late": "frees_late", "books_only": "accounting_only"}[old]
            for value in (False, True):
                assert asks(Mine(**{old: not value, new: value})) is value
        (warning,) = warned
        assert (warning.filename, warning.lineno) == (__file__, inspect.getsourcelines(Mine)[1])

    @pytest.mark.parametrize("total_mb", [0.0, -1.0, float("nan"), float("inf")])
    def test_accounts_need_a_size(self, total_mb: float) -> None:
        with pytest.raises(InvalidArgumentError):
            BookedSource(total_mb)

    def test_accounts_may_be_as_small_as_one_likes(self) -> None:
        source = BookedSource(0.5)
        assert [(d.index, d.total_mb) for d in source.devices()] == [(0, 0.5)]
        assert [sample.index for sample in source.sample(())] == [0]


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

    def test_more_memory_than_is_there_is_not_in_use(
        self, gpu: FakeDevice, host: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = NvmlSource()
        host.append((200000 * MIB, 0))
        memory = SimpleNamespace(total=120000 * MIB, available=120000 * MIB, free=70000 * MIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        assert used(source) == [0]

    @pytest.mark.parametrize(
        ("total", "free", "devices", "used_mb"),
        [
            ("120000", "70000", [120000], [20000]),
            # The totals may differ by half a percent, the figures of free memory by two percent of the total.
            *(("119400", "67600", [120000], [20000]), ("120600", "72400", [120000], [20000])),
            *(("119399", "70000", [119399], [49399]), ("120601", "70000", [120601], [50601])),
            *(("120000", "67599", [120000], [52401]), ("120000", "72401", [120000], [47599])),
            # Its total may be the host's by chance: then its figures are its own, those that it does not tell included.
            *(("120000", "[N/A]", [120000], [None]), ("120000", "", [120000], [None])),
        ],
    )
    def test_a_single_gpu_with_the_hosts_figures_shares_its_memory_and_another_does_not(
        self, total: str, free: str, devices: list[float], used_mb: list[float | None], smi: FakeSmi
    ) -> None:
        smi.answers |= {"total": total, "free": free, "uuid_free": f"GPU-aaaa, {free}", "uuid_name": "GPU-aaaa, Big"}
        source = NvidiaSmiSource()
        assert [d.total_mb for d in source.devices()] == devices
        assert used(source) == used_mb

    def test_a_program_that_hangs_when_it_is_asked_for_free_memory_makes_its_source_unavailable(
        self, smi: FakeSmi
    ) -> None:
        smi.answers |= {"total": "120000", "uuid_name": "GPU-aaaa, Big"}
        smi.answers["free"] = subprocess.TimeoutExpired("nvidia-smi", 5.0)
        assert choose_source("auto").name == "booked"

    def test_a_single_gpu_that_is_lost_has_no_memory_of_the_host(self, smi: FakeSmi) -> None:
        smi.answers |= {"total": "[GPU is lost]", "uuid_name": "GPU-aaaa, Big"}
        with pytest.raises(SourceUnavailableError, match=r"none of 1 GPU\(s\)"):
            NvidiaSmiSource()

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
        other = FakeDevice("GPU-bbbb", 24000, 2000)
        install(monkeypatch, gpu, other)
        assert [d.uuid for d in NvmlSource().devices()] == ["GPU-bbbb"]
        other.broken = True
        with pytest.raises(SourceUnavailableError, match=r"none of 2 GPU\(s\)"):
            NvmlSource()

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

    def test_lists_that_one_device_refuses_are_unknown_there_and_no_reason_to_give_up(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = two_gpus()
        fake = install(monkeypatch, first, second)
        lists, refusing = fake.nvmlDeviceGetComputeRunningProcesses, [second]

        def refuse(device: FakeDevice) -> list[SimpleNamespace]:
            if device in refusing:
                raise NVMLError("Not Supported")
            return lists(device)

        monkeypatch.setattr(fake, "nvmlDeviceGetComputeRunningProcesses", refuse)
        source = NvmlSource()

        def known() -> tuple[bool | None, list[bool]]:
            samples = source.sample((7,))
            return source.process_knowledge, [sample.processes_known for sample in samples]

        assert known() == (None, [False, False])
        first.compute = [process(7, 300)]
        assert known() == (True, [True, False])
        first.compute = []
        refusing.append(first)
        assert known() == (False, [False, False])
        refusing.clear()
        first.compute = [process(7, 300)]
        assert known() == (True, [True, True])

    @pytest.mark.parametrize(
        "there", [{2**22 + 5: 300}, {2**22 + 5: None, 1: 100}, {2**22 + 5: 0}], ids=["figure", "withheld", "0"]
    )
    def test_pids_that_do_not_exist_twice_in_a_row_are_those_of_another_namespace(
        self, monkeypatch: pytest.MonkeyPatch, there: dict[int, int | None]
    ) -> None:
        gpu, _ = two_gpus()
        install(monkeypatch, gpu)
        source = NvmlSource()

        def knows(compute: dict[int, int | None]) -> tuple[bool | None, dict[int, float]]:
            gpu.compute = [process(pid, mb) for pid, mb in compute.items()]
            (sample,) = source.sample((7,))
            return source.process_knowledge, dict(sample.process_mb)

        assert knows({7: 200}) == (True, {7: 200.0})
        listed = {pid: mb for pid, mb in there.items() if mb is not None}
        # It may have just ended; and another one may have by the next time.
        assert knows(there) == (True, listed)
        assert knows({2**22 + 6: 300}) == (True, {2**22 + 6: 300.0})
        assert knows(there) == (True, listed)
        assert knows(there) == (False, {})
        assert knows({}) == (False, {})
        assert knows({7: 200, **there}) == (True, {7: 200.0, **listed})
        # Ours being shown, the others count anew.
        assert knows(there) == (True, listed)
        assert knows(there) == (False, {})
        assert not any(sample.processes_known for sample in source.sample((7,)))

    def test_a_process_that_has_nothing_is_listed_with_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu, _ = two_gpus()
        gpu.compute = [process(os.getpid(), 0)]
        install(monkeypatch, gpu)
        (sample,) = NvmlSource().sample(())
        assert sample.process_mb == {os.getpid(): 0.0}

    @pytest.mark.parametrize(
        ("used_mb", "daemons", "left"),
        [
            (1160, {1: 560, 9: 100}, {1: 560, 9: 100}),
            (2000, {1: 560, 9: 100}, {1: 560, 9: 100}),
            (1159, {1: 560, 9: 100}, {1: 559, 9: 100}),
            # The largest of those that are no clients has it all, before the next one.
            (700, {1: 560, 9: 100}, {1: 100, 9: 100}),
            (700, {9: 100, 1: 560}, {1: 100, 9: 100}),
            (560, {1: 560, 9: 100}, {1: 0, 9: 60}),
            (400, {1: 560, 9: 100}, {1: 0, 9: 0}),
        ],
    )
    def test_what_a_daemon_has_for_its_clients_is_what_is_too_much_for_the_device(
        self, monkeypatch: pytest.MonkeyPatch, used_mb: int, daemons: dict[int, int], left: dict[int, float]
    ) -> None:
        gpu, _ = two_gpus()
        fake = install(monkeypatch, gpu)
        clients = [process(7, 300), process(8, 200)]
        monkeypatch.setattr(fake, "nvmlDeviceGetMPSComputeRunningProcesses_v3", lambda _: clients, raising=False)
        gpu.compute = [process(pid, mb) for pid, mb in daemons.items()]
        gpu.used = used_mb * MIB
        (sample,) = NvmlSource().sample(())
        assert sample.process_mb == {7: 300, 8: 200, **left}

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

    @pytest.mark.parametrize(
        ("refusal", "times"), [("Function Not Found", 1), ("Not Supported", 1), ("Unknown Error", 2)]
    )
    def test_a_list_that_the_driver_does_not_have_is_asked_for_once(
        self, monkeypatch: pytest.MonkeyPatch, refusal: str, times: int
    ) -> None:
        gpu, _ = two_gpus()
        fake = install(monkeypatch, gpu)
        asked: list[FakeDevice] = []

        def missing(device: FakeDevice) -> None:
            asked.append(device)
            raise NVMLError(refusal)

        monkeypatch.setattr(fake, "nvmlDeviceGetMPSComputeRunningProcesses_v3", missing, raising=False)
        source = NvmlSource()
        assert used(source) == used(source) == [1000.0]
        assert len(asked) == times

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
    def test_each_says_how_its_figures_come(self, monkeypatch: pytest.MonkeyPatch, smi: FakeSmi) -> None:
        gpu, _ = two_gpus()
        gpu.compute = [process(7, 300)]
        install(monkeypatch, gpu)
        told = NvmlSource()
        told.sample((7,))
        sources: list[MemorySource] = [
            *(NvmlSource(), told, NvidiaSmiSource(), HostMemorySource(), HostMemorySource(BUDGET_MB)),
            *(BookedSource(1000.0), MonitorSource(GPUMonitor(source=BookedSource(1000.0)))),
        ]

        def says(source: MemorySource) -> tuple[bool, ...]:
            return (source.cheap, source.measures_processes, frees_late(source), is_accounting_only(source))

        expected = {
            # Cheap, measures processes, frees late, accounts only.
            "nvml": [(True, False, True, False), (True, True, True, False)],
            "nvidia-smi": [(False, False, True, False)],
            "host": [(False, True, False, False)] * 2,
            "booked": [(True, False, False, True)],
            "monitor": [(True, False, False, False)],
        }
        found: dict[str, list[tuple[bool, ...]]] = {}
        for source in sources:
            found.setdefault(source.name, []).append(says(source))
            chosen = SelectedDevices(source, [0])
            assert (chosen.name, says(chosen)) == (source.name, says(source))
        assert found == expected
        assert (AmdSource.cheap, AmdSource.frees_late) == (False, True)

    def test_what_a_source_measures_counts_what_it_may_yet_show(self) -> None:
        def measures(**more: Any) -> Measures:
            return what_it_measures(cast(MemorySource, SimpleNamespace(**more)))

        assert measures(accounting_only=True, measures_processes=False) == Measures.NOTHING
        assert measures(measures_processes=False) == Measures.DEVICES
        assert measures(measures_processes=True) == Measures.PROCESSES
        for knowledge, expected in ((False, Measures.DEVICES), (None, Measures.PROCESSES), (True, Measures.PROCESSES)):
            assert measures(measures_processes=False, process_knowledge=knowledge) == expected

    def test_how_much_is_measured_has_the_numbers_that_segments_have(self) -> None:
        assert [(one.name, one.value) for one in Measures] == [
            *(("UNKNOWN", 0), ("NOTHING", 1), ("DEVICES", 2), ("PROCESSES", 3))
        ]

    def test_a_sample_claims_nothing_that_its_source_does_not_say(self) -> None:
        sample = DeviceSample(0, 900.0, 5)
        assert sample == DeviceSample(0, 900.0, 5, {}, False, None, 0)
        assert sample.unrelated_mb(()) is None
        assert DeviceSample(0, None, 5, {1: 100.0}, True).unrelated_mb(()) is None

    @pytest.mark.parametrize(("ours", "unrelated_mb"), [((), 900), ((1,), 800), ((1, 2), 0), ((2, 3), 0.5)])
    def test_what_is_not_ours_is_the_rest_and_never_less_than_nothing(
        self, ours: tuple[int, ...], unrelated_mb: float
    ) -> None:
        assert DeviceSample(0, 900.0, 5, {1: 100.0, 2: 899.5}, True).unrelated_mb(ours) == unrelated_mb

    @pytest.mark.parametrize(
        ("before", "after", "whole"),
        [(1.0, 2.0, 2.0), (2.0, 1.0, 2.0), (None, 2.0, 2.0), (0.0, 0.0, 0.0), (1.0, None, None), (None, None, None)],
    )
    def test_a_whole_is_the_larger_reading_and_unknown_if_the_second_one_is(
        self, before: float | None, after: float | None, whole: float | None
    ) -> None:
        assert larger_whole(before, after) == whole

    def test_chosen_devices_pass_on_what_is_asked_of_their_source(self) -> None:
        source: Any = SimpleNamespace(
            name="mine",
            cheap=True,
            measures_processes=False,
            sample=None,
            devices=lambda: (DeviceInfo(0, "GPU-a", "a", 1.0), DeviceInfo(2, "GPU-c", "c", 1.0)),
            server_setting=lambda uuids: ("MINE", " ".join(uuids)),
            close=lambda: closed.append(True),
        )
        closed: list[bool] = []
        chosen = SelectedDevices(source, [2])
        assert chosen.server_setting(["GPU-c"]) == ("MINE", "GPU-c")
        chosen.close()
        assert closed == [True]
        with pytest.raises(
            InvalidArgumentError, match=r"devices: 1 is not among the devices of mine: 0 \(GPU-a\), 2 \("
        ):
            SelectedDevices(source, [2, 1])
        source.devices = lambda: ()
        with pytest.raises(InvalidArgumentError, match=r"of mine: none"):
            SelectedDevices(source, [0])

    @pytest.mark.parametrize(
        ("uuids", "visible"),
        [
            (["GPU-a", "MIG-b"], "GPU-a,MIG-b"),
            (["gpu1", "GPU-a"], "1,GPU-a"),
            (["gpu0"], "0"),
            (["gpu10", "gpu2"], "10,2"),
            (["GPU-a", "host-memory"], None),
            (["booked"], None),
            (["gpu"], None),
            ([], None),
        ],
    )
    def test_a_server_is_shown_gpus_by_their_names_and_nothing_else(
        self, uuids: list[str], visible: str | None
    ) -> None:
        setting = server_setting(BookedSource(1.0), uuids)
        assert setting == (None if visible is None else ("CUDA_VISIBLE_DEVICES", visible))

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
