"""The simulated GPUs: real nvidia-ml-py, Beam's own GPUMonitor and mpmm read the same figures from them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pynvml
import pytest
from devices.simulated_faults import GPU_IS_LOST, NO_PERMISSION
from devices.simulated_gpu import Build, SimulatedGpus
from harness import CHECKOUT, NewGpus, wait_until

from mpmm import GPUMonitor

MIB = 2**20


@pytest.fixture
def nvml() -> Iterator[Any]:
    """nvidia-ml-py; a test initialises it when its GPUs are there."""
    yield pynvml
    while True:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            return


@pytest.fixture
def beam_monitor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Beam's own GPUMonitor. Its module imports torch, which a monitor does not need: an empty one will do."""
    if importlib.util.find_spec("torch") is None:
        monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    return importlib.import_module("apache_beam.ml.inference.model_manager").GPUMonitor()


def smi(*arguments: str) -> str:
    return subprocess.run(["nvidia-smi", *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def query(fields: str) -> list[str]:
    return smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits").splitlines()


HOLDER = """
import sys
from pathlib import Path
from devices.simulated_gpu import SimulatedGpus
SimulatedGpus(Path(sys.argv[1])).allocate(float(sys.argv[2]), int(sys.argv[3]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def new_holder() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that hold memory of a GPU until they are killed."""
    made: list[subprocess.Popen[str]] = []

    def make(gpus: SimulatedGpus, mb: float, device: int = 0) -> subprocess.Popen[str]:
        tools = str(CHECKOUT / "tools")
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(gpus.folder), str(mb), str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": tools},
        )
        made.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        return holder

    yield make
    for holder in made:
        holder.kill()
        holder.communicate()


def test_nvidia_ml_py_beam_and_mpmm_read_the_same_figures(
    new_gpus: NewGpus, new_holder: Any, nvml: Any, beam_monitor: Any
) -> None:
    gpus = new_gpus(16384, reserved_mb=384)
    holder = new_holder(gpus, 2000)
    gpus.allocate(500, 0)
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    old, new = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    assert [part // MIB for part in (old.total, old.used, old.free)] == [16384, 2884, 13500]
    assert [part // MIB for part in (new.total, new.used, new.free, new.reserved)] == [16384, 2500, 13500, 384]
    processes = {
        process.pid: process.usedGpuMemory // MIB for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    }
    assert processes == {holder.pid: 2000, os.getpid(): 500}

    assert beam_monitor._detect_hardware()
    beam_monitor.refresh()
    for source in ("nvml", "nvidia-smi"):
        ours = GPUMonitor(source=source)
        ours.start()
        ours.stop()
        assert ours.get_stats() == beam_monitor.get_stats() == (2884, 2884, 16384)

    # A process's memory is free when it is dead, even before its parent has waited for it.
    holder.kill()
    wait_until(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used == 884 * MIB, "the memory of the dead is free")
    gpus.free(500, 0)
    assert nvml.nvmlDeviceGetComputeRunningProcesses(handle) == []


def test_the_program_answers_like_the_real_one(new_gpus: NewGpus) -> None:
    gpus = new_gpus(8192, 16384)
    gpus.pretend(4711, 300, 1)
    assert query("index,name,memory.total,memory.free") == [
        "0, Simulated 8GB, 8192, 8192",
        "1, Simulated 16GB, 16384, 16084",
    ]
    assert smi("--query-gpu=memory.used,driver_version", "--format=csv", "-i", gpus.uuid(1)) == (
        "memory.used [MiB], driver_version\n300 MiB, 550.54.14\n"
    )
    apps = smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits")
    assert apps == f"{gpus.uuid(1)}, 4711, [Unknown Error], 300\n"
    assert smi("-L").splitlines()[0] == f"GPU 0: Simulated 8GB (UUID: {gpus.uuid(0)})"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        query("memory.colour")
    assert caught.value.returncode == 2


def test_slices_have_memory_and_processes_of_their_own(new_gpus: NewGpus, nvml: Any) -> None:
    gpus = new_gpus(40960, 8192, slices_mb={0: (20096, 9856)})
    gpus.allocate(100, (0, 1))
    nvml.nvmlInit()
    board = nvml.nvmlDeviceGetHandleByIndex(0)
    assert nvml.nvmlDeviceGetMigMode(board) == [1, 1]
    slices = [nvml.nvmlDeviceGetMigDeviceHandleByIndex(board, place) for place in range(2)]
    assert [nvml.nvmlDeviceGetMemoryInfo(part).used // MIB for part in (board, *slices)] == [100, 0, 100]
    assert [nvml.nvmlDeviceGetUUID(part) for part in slices] == gpus.units()[:2]
    assert nvml.nvmlDeviceGetAttributes(slices[1]).memorySizeMB == 9856
    assert [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(slices[1])] == [os.getpid()]
    assert nvml.nvmlDeviceGetGpuInstanceId(nvml.nvmlDeviceGetHandleByUUID(gpus.units()[1])) == 2
    parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slices[0])
    assert nvml.nvmlDeviceGetUUID(parent) == gpus.uuid(0)
    with pytest.raises(nvml.NVMLError, match="Not Found"):
        nvml.nvmlDeviceGetMigDeviceHandleByIndex(board, 2)
    with pytest.raises(nvml.NVMLError, match="Not Supported"):
        nvml.nvmlDeviceGetMigMode(nvml.nvmlDeviceGetHandleByIndex(1))
    assert query("mig.mode.current") == ["Enabled", "[N/A]"]


def test_nobody_gets_more_than_there_is(new_gpus: NewGpus) -> None:
    gpus = new_gpus(1000, reserved_mb=100)
    gpus.allocate(700, 0)
    with pytest.raises(MemoryError, match=r"300 MiB asked for .*, 200 MiB free"):
        gpus.allocate(300, 0)
    gpus.allocate(200, 0)
    assert gpus.process_mb(0) == {os.getpid(): 900}
    gpus.free(900, 0)
    assert gpus.used_mb(0) == 100


def test_freed_memory_comes_back_late(new_gpus: NewGpus, new_holder: Any, nvml: Any) -> None:
    gpus = new_gpus(1000, linger_s=2.0)
    holder = new_holder(gpus, 400)
    gpus.allocate(50, 0)
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)

    def used() -> int:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used // MIB)

    def pids() -> list[int]:
        return [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]

    assert used() == 450
    gpus.free(50, 0)
    holder.kill()
    wait_until(lambda: pids() == [], "no process is left")
    assert used() == gpus.used_mb(0) >= 400
    wait_until(lambda: used() == gpus.used_mb(0) == 0, "all memory has come back")


def test_a_lost_gpu_stays_lost_until_nvml_is_initialised_again(new_gpus: NewGpus, nvml: Any) -> None:
    gpus = new_gpus(1000, 1000)
    nvml.nvmlInit()
    first, second = (nvml.nvmlDeviceGetHandleByIndex(number) for number in range(2))
    gpus.faults.lose(0)
    with pytest.raises(nvml.NVMLError, match="GPU is lost"):
        nvml.nvmlDeviceGetMemoryInfo(first)
    assert nvml.nvmlDeviceGetMemoryInfo(second).total == 1000 * MIB
    with pytest.raises(subprocess.CalledProcessError) as caught:
        query("memory.free")
    assert caught.value.returncode == GPU_IS_LOST
    gpus.faults.find(0)
    with pytest.raises(nvml.NVMLError, match="GPU is lost"):
        nvml.nvmlDeviceGetMemoryInfo(first)
    nvml.nvmlShutdown()
    nvml.nvmlInit()
    with pytest.raises(nvml.NVMLError, match="Invalid Argument"):
        nvml.nvmlDeviceGetMemoryInfo(first)  # a handle from before
    assert nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).used == 0


def test_failures_on_demand(new_gpus: NewGpus, nvml: Any) -> None:
    gpus = new_gpus(1000, 1000)
    gpus.faults.fail_init()
    with pytest.raises(nvml.NVMLError, match="Driver Not Loaded"):
        nvml.nvmlInit()
    with pytest.raises(subprocess.CalledProcessError, match="status 9"):
        query("memory.free")
    gpus.faults.fail_init(0)
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    gpus.faults.refuse(0, "memory")
    gpus.faults.refuse(0, "name", NO_PERMISSION)
    with pytest.raises(nvml.NVMLError, match="Not Supported"):
        nvml.nvmlDeviceGetMemoryInfo(handle)
    assert query("name,memory.free") == ["[Insufficient Permissions], [N/A]", "Simulated 1GB, 1000"]
    gpus.allocate(10, 0)
    gpus.faults.refuse(0, "process_memory")
    gpus.faults.shift_pids(100000)
    (process,) = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    assert (process.pid, process.usedGpuMemory) == (os.getpid() + 100000, None)
    assert "[N/A]" in smi("--query-compute-apps=used_memory", "--format=csv,noheader")
    gpus.faults.refuse(0, "process_memory", 0)
    (process,) = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    assert process.usedGpuMemory == 10 * MIB
    gpus.faults.hang(nvidia_smi_s=30)
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(["nvidia-smi", "-L"], check=True, timeout=0.1)


def test_processes_of_a_shared_context_are_told_in_a_list_of_their_own(new_gpus: NewGpus, nvml: Any) -> None:
    gpus = new_gpus(1000)
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    gpus.allocate(300, 0)
    gpus.pretend(4711, 200, 0)

    def told(question: str) -> dict[int, int]:
        processes = getattr(nvml, f"nvmlDeviceGet{question}ComputeRunningProcesses")(handle)
        return {process.pid: process.usedGpuMemory // MIB for process in processes}

    ours = {os.getpid(): 300, 4711: 200}
    assert (told(""), told("MPS")) == (ours, {})
    gpus.faults.share_context(77)
    assert (told(""), told("MPS")) == ({77: 500}, ours)
    gpus.faults.refuse(0, "mps_processes")
    with pytest.raises(nvml.NVMLError, match="Not Supported"):
        told("MPS")
    gpus.faults.share_context(0)
    gpus.faults.refuse(0, "unlisted", 1)
    assert told("") == {}


def test_the_program_warns_of_a_corrupted_inforom_and_answers(new_gpus: NewGpus) -> None:
    gpus = new_gpus(1000)
    gpus.faults.corrupt_inforom()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        query("memory.free")
    assert caught.value.returncode == 14
    assert caught.value.stdout == "1000\nWARNING: infoROM is corrupted at gpu 0000:01:00.0\n"
    gpus.faults.corrupt_inforom(False)
    assert query("memory.free") == ["1000"]


def test_calls_are_logged_where_that_is_asked_for(new_gpus: NewGpus, nvml: Any) -> None:
    gpus = new_gpus(1000)
    gpus.record_calls()
    nvml.nvmlInit()
    nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0))
    assert gpus.calls() == [(os.getpid(), "init", "-"), (os.getpid(), "memory", gpus.uuid(0))]


def test_a_child_process_finds_the_gpus_by_its_environment(
    new_gpus: NewGpus, built_gpu: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = new_gpus(1000, 2000, slices_mb={1: (900, 800)})
    program = (
        "import json; from mpmm.sources import choose_source; from pathlib import Path;"
        "print(json.dumps([(d.uuid, d.total_mb) for d in choose_source('nvml').devices()]))"
    )
    environment = gpus.environment(built_gpu)
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    assert [tuple(row) for row in json.loads(answer.stdout)] == [
        (gpus.uuid(0), 1000),
        (gpus.uuid((1, 0)), 900),
        (gpus.uuid((1, 1)), 800),
    ]
    for setting, expected in (("0", 0), ("1", (1, 0)), (gpus.uuid((1, 1))[:12], (1, 1))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        assert gpus.current_device() == gpus.uuid(expected)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(LookupError, match="'-1'"):
        gpus.allocate(10)
