"""A fake driver library and a fake nvidia-smi."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from mpmm.sources import MemorySource
from mpmm.sources.base import MIB


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
        self.tells_uuid = True
        self.most_slices = 7
        self.compute: list[SimpleNamespace] = []
        self.graphics: list[SimpleNamespace] = []


def process(pid: int, used_mb: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=None if used_mb is None else used_mb * MIB)


class FakeNvml(ModuleType):
    """pynvml with given devices; like the real one, it answers only between init and shutdown."""

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
        if not device.tells_uuid:
            raise NVMLError("Unknown Error")
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
        if not device.most_slices:
            raise NVMLError("Unknown Error")
        return device.most_slices

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
    """Give tests no driver, and no settings of the host that they run on."""
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


class FakeSmi:
    """Stands in for subprocess.check_output: an answer, or an exception, for each queried field."""

    def __init__(self, **answers: str | Exception) -> None:
        self.answers = answers
        self.calls: list[tuple[list[str], dict[str, Any]]] = []

    def __call__(self, command: list[str], **options: Any) -> str:
        self.calls.append((command, options))
        field = command[1].removeprefix("--query-gpu=").replace("memory.", "").replace(",", "_")
        answer = self.answers.get(field, subprocess.CalledProcessError(2, command, ""))
        if "-i" in command:  # one GPU, which may have an answer of its own
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


# More than any process here takes.
BUDGET_MB = 1e6
