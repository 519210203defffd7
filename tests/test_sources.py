"""Memory sources: against a pretended driver, a pretended nvidia-smi and real processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from mpmm.errors import InvalidArgumentError
from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MonitorSource
from mpmm.sources import MemorySource, SourceUnavailableError, choose_source, counts_named_only, is_books_only
from mpmm.sources.base import MIB
from mpmm.sources.booked import BookedSource
from mpmm.sources.host_memory import HostMemorySource, cgroup_limits, host_memory_mb
from mpmm.sources.nvidia_smi import NvidiaSmiSource
from mpmm.sources.nvml import NvmlSource
from mpmm.sources.process_tree import process_tree, unrelated_to
from mpmm.sources.selected import SelectedDevices


class NVMLError(Exception):
    pass


class FakeDevice:
    def __init__(self, uuid: str, total_mb: int, used_mb: int, slices: list[FakeDevice] | None = None) -> None:
        self.uuid = uuid
        self.total = total_mb * MIB
        self.used = used_mb * MIB
        self.slices = slices
        self.broken = False
        self.tells_memory = True
        self.compute: list[SimpleNamespace] = []
        self.graphics: list[SimpleNamespace] = []


def process(pid: int, used_mb: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=None if used_mb is None else used_mb * MIB)


class FakeNvml(ModuleType):
    """pynvml with the devices it is given; like the real one, it answers only between init and shutdown."""

    NVMLError = NVMLError

    def __init__(self, *gpus: FakeDevice, init_error: str | None = None) -> None:
        super().__init__("pynvml")
        self.gpus = gpus
        self.init_error = init_error
        self.users_by_pid: dict[int, int] = {}

    def nvmlInit(self) -> None:
        if self.init_error:
            raise NVMLError(self.init_error)
        self.users_by_pid[os.getpid()] = self.users + 1

    def nvmlShutdown(self) -> None:
        self.users_by_pid[os.getpid()] = self.users - 1

    @property
    def users(self) -> int:
        return self.users_by_pid.get(os.getpid(), 0)

    def _check(self, device: FakeDevice | None = None) -> None:
        if not self.users:
            raise NVMLError("Uninitialized")
        if device is not None and device.broken:
            raise NVMLError("GPU is lost")

    def nvmlDeviceGetCount(self) -> int:
        self._check()
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeDevice:
        self._check(self.gpus[index])
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, device: FakeDevice) -> str:
        self._check(device)
        return device.uuid

    def nvmlDeviceGetName(self, device: FakeDevice) -> str:
        self._check(device)
        return f"name of {device.uuid}"

    def nvmlDeviceGetMemoryInfo(self, device: FakeDevice) -> SimpleNamespace:
        self._check(device)
        if not device.tells_memory:
            raise NVMLError("Not Supported")
        return SimpleNamespace(total=device.total, used=device.used, free=device.total - device.used)

    def nvmlDeviceGetMigMode(self, device: FakeDevice) -> list[int]:
        self._check(device)
        if device.slices is None:
            raise NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: FakeDevice) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: FakeDevice, index: int) -> FakeDevice:
        if device.slices is None or index >= len(device.slices):
            raise NVMLError("Not Found")
        return device.slices[index]

    def nvmlDeviceGetGpuInstanceId(self, device: FakeDevice) -> int:
        return int(device.uuid.removeprefix("MIG-"))

    def nvmlDeviceGetComputeInstanceId(self, device: FakeDevice) -> int:
        return 0

    def nvmlDeviceGetComputeRunningProcesses(self, device: FakeDevice) -> list[SimpleNamespace]:
        self._check(device)
        return device.compute

    def nvmlDeviceGetGraphicsRunningProcesses(self, device: FakeDevice) -> list[SimpleNamespace]:
        self._check(device)
        return device.graphics


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, and no setting that leaks in from the host the tests run on."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("MPMM_MEMORY_SOURCE", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(init_error="NVML Shared Library Not Found"))


def install(monkeypatch: pytest.MonkeyPatch, *gpus: FakeDevice) -> FakeNvml:
    fake = FakeNvml(*gpus)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def two_gpus() -> tuple[FakeDevice, FakeDevice]:
    return FakeDevice("GPU-aaaa", 16000, 1000), FakeDevice("GPU-bbbb", 24000, 2000)


def used(source: MemorySource, server_pids: tuple[int, ...] = ()) -> list[float | None]:
    return [sample.used_mb for sample in source.sample(server_pids)]


class TestNvml:
    def test_two_gpus_are_two_devices_in_mib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, *two_gpus())
        source = NvmlSource()
        assert [(d.index, d.uuid, d.name, d.total_mb) for d in source.devices()] == [
            (0, "GPU-aaaa", "name of GPU-aaaa", 16000.0),
            (1, "GPU-bbbb", "name of GPU-bbbb", 24000.0),
        ]
        assert used(source) == [1000.0, 2000.0]

    def test_a_sample_is_dated_before_the_measurement(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, *two_gpus())
        source = NvmlSource()
        measured_ns = []

        def measure(device: FakeDevice) -> SimpleNamespace:
            measured_ns.append(time.monotonic_ns())
            return SimpleNamespace(total=device.total, used=device.used)

        monkeypatch.setattr(fake, "nvmlDeviceGetMemoryInfo", measure, raising=False)
        samples = source.sample(())
        assert all(sample.taken_ns <= at for sample, at in zip(samples, measured_ns, strict=True))

    def test_a_failing_device_has_no_figure_and_the_others_have_theirs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = two_gpus()
        install(monkeypatch, first, second)
        source = NvmlSource()
        first.broken = True
        assert used(source) == [None, 2000.0]
        first.broken = False
        assert used(source) == [1000.0, 2000.0]

    def test_a_device_that_is_lost_at_the_start_keeps_its_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = two_gpus()
        first.broken = True
        install(monkeypatch, first, second)
        assert [(d.index, d.uuid) for d in NvmlSource().devices()] == [(0, "GPU-bbbb")]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert [d.uuid for d in NvmlSource().devices()] == ["GPU-bbbb"]

    def test_processes_that_compute_and_draw_count_once_and_withheld_figures_are_left_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu, _ = two_gpus()
        gpu.compute = [process(7, 300), process(8, None), process(9, 50)]
        gpu.graphics = [process(7, 300), process(10, 20)]
        install(monkeypatch, gpu)
        (sample,) = NvmlSource().sample((7,))
        assert sample.process_mb == {7: 300.0, 9: 50.0, 10: 20.0}
        assert not sample.processes_known and sample.foreign_mb((7,)) is None
        gpu.compute.pop(1)
        (sample,) = NvmlSource().sample((7,))
        assert sample.foreign_mb((7, 9)) == 650.0

    def test_mig_slices_are_devices_and_their_board_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slices = [FakeDevice("MIG-1", 5000, 100), FakeDevice("MIG-2", 10000, 200)]
        install(monkeypatch, FakeDevice("GPU-aaaa", 40000, 300, slices), FakeDevice("GPU-bbbb", 16000, 1000))
        source = NvmlSource()
        assert [d.uuid for d in source.devices()] == ["MIG-1", "MIG-2", "GPU-bbbb"]
        assert used(source) == [100.0, 200.0, 1000.0]

    @pytest.mark.parametrize(
        ("setting", "uuids"),
        [
            ("1", ["GPU-bbbb"]),
            ("1,0", ["GPU-bbbb", "GPU-aaaa"]),
            (" GPU-bb , GPU-aaaa", ["GPU-bbbb", "GPU-aaaa"]),
            ("MIG-2,GPU-a", ["MIG-2", "GPU-aaaa"]),
            ("2", ["MIG-1", "MIG-2"]),
            ("GPU-cccc", ["MIG-1", "MIG-2"]),
            ("MIG-GPU-cc/2/0", ["MIG-2"]),  # as slices were named before they had uuids
            ("+1st", ["GPU-bbbb"]),  # CUDA reads a number, and no further
            ("1,9,0", ["GPU-bbbb"]),  # it stops at the first entry it does not know
            ("1,-1,0", ["GPU-bbbb"]),
            ("GPU-bbbb,,GPU-aaaa", ["GPU-bbbb"]),
            ("GPU-bbbb,GPU-,GPU-aaaa", ["GPU-bbbb"]),  # and at one that fits several
            ("1,GPU-aaaa", ["GPU-bbbb"]),  # and where numbers turn into uuids, or the reverse
            ("MIG-2,0", ["MIG-2"]),
        ],
    )
    def test_cuda_visible_devices_selects_and_orders(
        self, monkeypatch: pytest.MonkeyPatch, setting: str, uuids: list[str]
    ) -> None:
        slices = [FakeDevice("MIG-1", 5000, 100), FakeDevice("MIG-2", 10000, 200)]
        install(monkeypatch, *two_gpus(), FakeDevice("GPU-cccc", 40000, 300, slices))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        devices = NvmlSource().devices()
        assert [d.uuid for d in devices] == uuids
        assert [d.index for d in devices] == list(range(len(uuids)))

    @pytest.mark.parametrize("setting", ["", "-1", "none", "0,0", "GPU-aa,GPU-aaaa"])
    def test_hidden_gpus_make_the_source_unavailable(self, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
        fake = install(monkeypatch, *two_gpus())
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        with pytest.raises(SourceUnavailableError, match="CUDA_VISIBLE_DEVICES"):
            NvmlSource()
        assert fake.users == 0

    def test_a_driver_that_does_not_start_is_named_in_the_error(self) -> None:
        with pytest.raises(SourceUnavailableError, match="Shared Library Not Found") as caught:
            NvmlSource()
        assert caught.value.source == "nvml"

    def test_a_forked_child_initialises_for_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, *two_gpus())
        source = NvmlSource()
        pid = os.fork()
        if pid == 0:  # the fake counts users per pid, so NVML is not initialised in here yet
            os._exit(0 if used(source) == [1000.0, 2000.0] and fake.users == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def test_a_driver_that_does_not_start_in_a_child_gives_no_figures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, *two_gpus())
        source = NvmlSource()
        fake.init_error = "Driver Not Loaded"
        monkeypatch.setattr(os, "getpid", lambda: -1)
        assert used(source) == [None, None]

    def test_close_shuts_down_and_a_later_sample_opens_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, *two_gpus())
        source = NvmlSource()
        source.close()
        source.close()
        assert fake.users == 0
        assert used(source) == [1000.0, 2000.0]
        assert fake.users == 1


class FakeSmi:
    """Stands in for subprocess.check_output: an answer, or an exception, for each queried field."""

    def __init__(self, **answers: str | Exception) -> None:
        self.answers = answers
        self.calls: list[tuple[list[str], dict[str, Any]]] = []

    def __call__(self, command: list[str], **options: Any) -> str:
        self.calls.append((command, options))
        field = command[1].removeprefix("--query-gpu=").replace("memory.", "").replace(",", "_")
        answer = self.answers.get(field, subprocess.CalledProcessError(2, command))
        if "-i" in command:  # of one GPU alone, where that has an answer of its own
            answer = self.answers.get(f"{field} of {command[-1]}", answer)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def smi() -> Iterator[FakeSmi]:
    fake = FakeSmi(
        total="16000\n24000\n",
        uuid_free="GPU-aaaa, 15000\nGPU-bbbb, 22000\n",
        uuid_name="GPU-aaaa, Big GPU\nGPU-bbbb, Big, Fast\n",
    )
    with patch("subprocess.check_output", fake):
        yield fake


class TestNvidiaSmi:
    def test_two_gpus_are_two_devices(self, smi: FakeSmi) -> None:
        source = NvidiaSmiSource()
        assert [(d.uuid, d.name, d.total_mb) for d in source.devices()] == [
            ("GPU-aaaa", "Big GPU", 16000.0),
            ("GPU-bbbb", "Big, Fast", 24000.0),
        ]
        assert used(source) == [1000.0, 2000.0]

    def test_commands_are_those_of_beam_with_a_timeout(self, smi: FakeSmi) -> None:
        used(NvidiaSmiSource(timeout_s=3.0))
        smi.answers |= {"uuid_name": Exception("odd"), "free": "15000\n22000\n"}
        used(NvidiaSmiSource(timeout_s=3.0))
        commands = [command for command, _ in smi.calls]
        assert ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"] in commands
        assert ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"] in commands
        assert all(options == {"text": True, "timeout": 3.0} for _, options in smi.calls)

    @pytest.mark.parametrize("junk", ["[N/A]", "[Not Supported]", "[Unknown Error]", "nan", "-3", ""])
    def test_a_line_that_is_no_number_is_no_figure(self, smi: FakeSmi, junk: str) -> None:
        source = NvidiaSmiSource()
        smi.answers["uuid_free"] = f"GPU-aaaa, 15000\nGPU-bbbb, {junk}\n"
        assert used(source) == [1000.0, None]

    def test_a_gpu_without_a_total_is_left_out_and_does_not_shift_the_lines(self, smi: FakeSmi) -> None:
        smi.answers["total"] = "[N/A]\n24000\n"
        source = NvidiaSmiSource()
        assert [(d.index, d.uuid) for d in source.devices()] == [(1, "GPU-bbbb")]
        assert used(source) == [2000.0]

    @pytest.mark.parametrize(
        "labels", [subprocess.CalledProcessError(2, "nvidia-smi"), Exception("odd"), "16000", "[N/A], x\n[N/A], y\n"]
    )
    def test_names_are_made_up_when_the_program_does_not_tell_them(self, smi: FakeSmi, labels: str | Exception) -> None:
        smi.answers["uuid_name"] = labels
        assert [(d.uuid, d.name) for d in NvidiaSmiSource().devices()] == [("gpu0", "gpu0"), ("gpu1", "gpu1")]

    def test_lines_are_told_apart_by_uuid(self, smi: FakeSmi) -> None:
        source = NvidiaSmiSource()
        smi.answers["uuid_free"] = "GPU-bbbb, 21000\n"
        assert used(source) == [None, 3000.0]

    def test_without_uuids_lines_count_in_their_order(self, smi: FakeSmi) -> None:
        smi.answers |= {"uuid_name": Exception("odd"), "free": "15000\n22000\n"}
        assert used(NvidiaSmiSource()) == [1000.0, 2000.0]

    def test_a_gpu_that_is_cut_into_slices_is_left_out(self, smi: FakeSmi) -> None:
        smi.answers["uuid_mig.mode.current_name"] = "GPU-aaaa, Enabled, Big GPU\nGPU-bbbb, [N/A], Big, Fast\n"
        source = NvidiaSmiSource()
        assert [(d.index, d.name) for d in source.devices()] == [(0, "Big, Fast")]
        assert used(source) == [2000.0]

    def test_cuda_visible_devices_selects_lines(self, smi: FakeSmi, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        source = NvidiaSmiSource()
        assert [d.uuid for d in source.devices()] == ["GPU-bbbb", "GPU-aaaa"]
        assert used(source) == [2000.0, 1000.0]

    @pytest.mark.parametrize(
        "failure",
        [FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 5.0), "No devices were found"],
    )
    def test_a_program_that_is_missing_or_hangs_or_finds_nothing_makes_the_source_unavailable(
        self, smi: FakeSmi, failure: str | Exception
    ) -> None:
        smi.answers["total"] = failure
        with pytest.raises(SourceUnavailableError):
            NvidiaSmiSource()

    @pytest.mark.parametrize("status", [0, 14])
    def test_messages_among_the_lines_and_a_corrupted_inforom_change_no_figure(
        self, smi: FakeSmi, status: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        corrupted = "WARNING: infoROM is corrupted at gpu 0000:01:00.0"
        smi.answers["uuid_mig.mode.current_name"] = "GPU-aaaa, [N/A], Big GPU\nGPU-bbbb, [N/A], Big, Fast\n"
        smi.answers["uuid_free"] = "GPU-aaaa, 15000 MiB\nGPU-bbbb, 22000 and more words\n"
        for field, answer in smi.answers.items():
            lines = str(answer).splitlines()
            text = "\n".join([corrupted, lines[0], "Attention, please, 1 of 2: read the manual", *lines[1:], corrupted])
            smi.answers[field] = subprocess.CalledProcessError(14, "nvidia-smi", text) if status else text
        with caplog.at_level(logging.WARNING):
            source = NvidiaSmiSource()
            assert [(d.uuid, d.name, d.total_mb) for d in source.devices()] == [
                ("GPU-aaaa", "Big GPU", 16000.0),
                ("GPU-bbbb", "Big, Fast", 24000.0),
            ]
            assert used(source) == [1000.0, 2000.0]
            assert used(source) == [1000.0, 2000.0]
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == bool(status)
        assert all(corrupted in message for message in said)
        # Without uuids, too.
        smi.answers["uuid_mig.mode.current_name"] = smi.answers["uuid_name"] = Exception("odd")
        text = f"{corrupted}\n15000\n22000\n{corrupted}\n"
        smi.answers["free"] = subprocess.CalledProcessError(14, "nvidia-smi", text) if status else text
        assert used(NvidiaSmiSource()) == [1000.0, 2000.0]

    def test_one_lost_gpu_does_not_blind_the_others(self, smi: FakeSmi) -> None:
        source = NvidiaSmiSource()
        lost = subprocess.CalledProcessError(15, "nvidia-smi", "Unable to determine the device handle: GPU is lost")
        smi.answers |= {"uuid_free": lost, "uuid_free of GPU-aaaa": "GPU-aaaa, 15400\n"}
        assert used(source) == [600.0, None]
        assert "GPU is lost" in str(source.sample(())[1].trouble)
        # Nor does one of which the program says nothing until it is killed.
        smi.answers["uuid_free of GPU-bbbb"] = subprocess.TimeoutExpired("nvidia-smi", 5.0)
        assert used(source) == [600.0, None]
        smi.answers["uuid_free of GPU-aaaa"] = lost
        with pytest.raises(subprocess.CalledProcessError):
            source.sample(())

    def test_a_gpu_that_is_lost_at_the_start_keeps_its_number(
        self, smi: FakeSmi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lost = subprocess.CalledProcessError(15, "nvidia-smi", "Unable to determine the device handle: GPU is lost")
        smi.answers |= {
            **{"total": lost, "uuid_name": lost, "uuid_free": lost, "total of 1": "24000\n"},
            **{"uuid_name of 1": "GPU-bbbb, Big, Fast\n", "uuid_free of GPU-bbbb": "GPU-bbbb, 22000\n"},
            "total of 2": subprocess.CalledProcessError(6, "nvidia-smi", "No devices were found"),
        }
        source = NvidiaSmiSource()
        assert [(d.uuid, d.name, d.total_mb) for d in source.devices()] == [("GPU-bbbb", "Big, Fast", 24000.0)]
        assert used(source) == [2000.0]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert [d.uuid for d in NvidiaSmiSource().devices()] == ["GPU-bbbb"]

    def test_a_failure_during_a_sample_is_the_callers_to_handle(self, smi: FakeSmi) -> None:
        source = NvidiaSmiSource()
        smi.answers["uuid_free"] = subprocess.TimeoutExpired("nvidia-smi", 5.0)
        with pytest.raises(subprocess.TimeoutExpired):
            source.sample(())


BALLAST_MB = 64
CHILD = f"""
import sys
ballast = b"x" * ({BALLAST_MB} << 20)
print("full", flush=True)
sys.stdin.readline()
del ballast
print("empty", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that holds BALLAST_MB, lets go of it at a line on stdin, and ends at the next."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert next(running.stdout or iter(())) == "full\n"
        yield running
        running.kill()


def say(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


# More than any process here takes.
BUDGET_MB = 1e6


class TestHostMemory:
    def test_memory_of_a_process_is_seen_to_come_and_go(self, child: subprocess.Popen[str]) -> None:
        source = HostMemorySource(BUDGET_MB)
        (full,) = source.sample((child.pid,))
        assert full.used_mb == full.process_mb[child.pid] > BALLAST_MB
        say(child)
        assert next(child.stdout or iter(())) == "empty\n"
        (empty,) = source.sample((child.pid,))
        assert empty.used_mb is not None and empty.used_mb <= full.used_mb - BALLAST_MB + 1

    def test_a_process_that_is_gone_or_a_zombie_counts_nothing(self, child: subprocess.Popen[str]) -> None:
        source = HostMemorySource(BUDGET_MB)
        source.sample((child.pid,))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped: a zombie
        assert used(source, (child.pid,)) == [0]
        child.wait()
        assert used(source, (child.pid,)) == [0]

    def test_no_servers_use_nothing(self) -> None:
        assert used(HostMemorySource(BUDGET_MB)) == [0]

    def test_a_process_named_twice_counts_once(self, child: subprocess.Popen[str]) -> None:
        source = HostMemorySource(BUDGET_MB)
        assert used(source, (child.pid, child.pid)) == used(source, (child.pid,))

    def test_an_unchanged_process_is_walked_once(
        self, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        walks: list[int] = []
        walk = psutil.Process.memory_full_info

        def counted(process: psutil.Process) -> Any:
            walks.append(process.pid)
            return walk(process)

        monkeypatch.setattr(psutil.Process, "memory_full_info", counted)
        source = HostMemorySource(BUDGET_MB)
        assert used(source, (child.pid,)) == used(source, (child.pid,))
        assert len(walks) == 1
        monkeypatch.setattr("mpmm.sources.host_memory.USS_LIFETIME_NS", 0)
        source.sample((child.pid,))
        assert len(walks) == 2

    def test_a_process_whose_pages_may_not_be_walked_counts_with_its_rss(
        self, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(process: psutil.Process) -> None:
            raise psutil.AccessDenied(process.pid)

        monkeypatch.setattr(psutil.Process, "memory_full_info", refuse)
        (sample,) = HostMemorySource(BUDGET_MB).sample((child.pid,))
        assert sample.used_mb == pytest.approx(psutil.Process(child.pid).memory_info().rss / MIB, abs=2)
        monkeypatch.setattr(psutil.Process, "memory_info", refuse)
        assert used(HostMemorySource(BUDGET_MB), (child.pid,)) == [None]

    def test_without_a_budget_everybody_counts(
        self, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=9000 * MIB, available=6000 * MIB))
        limits: list[tuple[int, int | None]] = []
        monkeypatch.setattr("mpmm.sources.host_memory.cgroup_limits", lambda: limits)
        (sample,) = HostMemorySource().sample((child.pid,))
        assert sample.used_mb == 3000
        assert sample.foreign_mb((child.pid,)) == 3000 - sample.process_mb[child.pid] < 3000 - BALLAST_MB
        # A group with a limit, 500 MB of which are left; and its parent, whose use cannot be seen.
        limits += [(2000 * MIB, 1500 * MIB), (4000 * MIB, None)]
        source = HostMemorySource()
        assert source.devices()[0].total_mb == 2000
        assert used(source) == [1500]
        # The host itself may be shorter of memory than the group.
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=9000 * MIB, available=100 * MIB))
        assert used(source) == [1900]

    def test_the_total_is_the_budget_or_what_the_host_has(self) -> None:
        assert HostMemorySource(budget_mb=1234).devices()[0].total_mb == 1234.0
        total_mb = HostMemorySource().devices()[0].total_mb
        assert total_mb == host_memory_mb() <= psutil.virtual_memory().total / MIB

    @pytest.mark.parametrize("budget_mb", [0, -1, float("nan")])
    def test_a_budget_that_is_no_size_is_refused(self, budget_mb: float) -> None:
        with pytest.raises(InvalidArgumentError, match="budget_mb"):
            HostMemorySource(budget_mb)

    def test_limits_of_the_control_group_and_its_parents_count(self, tmp_path: Path) -> None:
        membership = tmp_path / "cgroup"
        mount = tmp_path / "mount"
        (mount / "pod" / "box").mkdir(parents=True)
        (mount / "memory" / "pod").mkdir(parents=True)
        (mount / "pod" / "box" / "memory.max").write_text("max\n")
        (mount / "pod" / "memory.max").write_text("5000\n")
        (mount / "memory" / "pod" / "memory.limit_in_bytes").write_text("7000\n")
        membership.write_text("0::/pod/box\n")
        (mount / "pod" / "memory.current").write_text("4000\n")
        (mount / "pod" / "memory.stat").write_text("anon 1\ninactive_file 1500\nactive_file 9\n")
        assert cgroup_limits(mount, membership) == [(5000, 2500)]
        # What holds a group up counts as what it may not pass, wherever it is less.
        (mount / "pod" / "memory.high").write_text("4500\n")
        (mount / "pod" / "box" / "memory.high").write_text("max\n")
        assert cgroup_limits(mount, membership) == [(4500, 2500)]
        (mount / "pod" / "memory.high").write_text("6000\n")
        (mount / "pod" / "box" / "memory.high").write_text("3000\n")
        assert cgroup_limits(mount, membership) == [(3000, None), (5000, 2500)]
        (mount / "memory" / "pod" / "memory.soft_limit_in_bytes").write_text("10\n")
        membership.write_text("5:cpu,memory:/pod\n4:pids:/\n")
        assert cgroup_limits(mount, membership) == [(7000, None)]
        (mount / "memory" / "pod" / "memory.usage_in_bytes").write_text("6500\n")
        (mount / "memory" / "pod" / "memory.stat").write_text("inactive_file 4\ntotal_inactive_file 500\n")
        assert cgroup_limits(mount, membership) == [(7000, 6000)]
        assert cgroup_limits(mount, tmp_path / "missing") == []


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

    def test_auto_ends_with_the_books_and_one_warning(self, smi: FakeSmi, caplog: pytest.LogCaptureFixture) -> None:
        smi.answers.clear()
        with caplog.at_level(logging.WARNING):
            source = choose_source(fallback_memory_mb=12000.0)
        assert is_books_only(source)
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
            answer.wait(20)
            init()
            answered.set()

        monkeypatch.setattr(fake, "nvmlInit", hang)
        assert choose_source().name == "nvidia-smi"
        # Nobody hangs beside the first one.
        with pytest.raises(SourceUnavailableError, match="hangs"):
            choose_source("nvml")
        answer.set()
        (thread,) = inits
        thread.join(20)
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

    def test_books_need_a_size(self) -> None:
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
        assert source.measures_processes and sample.foreign_mb((7,)) == 19700
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
        # What the daemon has for its clients is not counted twice.
        assert sample.process_mb == {1: 100, 7: 300, 8: 200} and sample.foreign_mb((7, 8)) == 100

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


@pytest.mark.parametrize("proc", ["as it is", "not there"])
def test_the_tree_of_a_process_is_itself_and_what_it_has_started(
    proc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if proc == "not there":
        monkeypatch.setattr("mpmm.sources.process_tree.Path", lambda _: tmp_path / "proc")
    program = "import subprocess, sys; child = subprocess.Popen(['cat']); print(child.pid, flush=True); child.wait()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        child = int(parent.stdout.readline())
        assert process_tree(parent.pid) == [parent.pid, child]
        assert process_tree(parent.pid, without={child}) == [parent.pid]
        assert set(process_tree(os.getpid())) >= {os.getpid(), parent.pid, child}
        assert unrelated_to([parent.pid, child, os.getpid()], [parent.pid]) == {os.getpid()}
        assert unrelated_to([child, parent.pid], [os.getpid()]) == set()
        assert unrelated_to([parent.pid], [child]) == {parent.pid}
        parent.stdin.close()
    assert process_tree(parent.pid) == [parent.pid]
