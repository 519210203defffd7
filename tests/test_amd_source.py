"""The source `amdsmi`, on a stand-in of AMD's package: what it measures, which figures it rejects, what it shows."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from amdsmi_stand_in.amdsmi import FOLDER_VARIABLE, MIB, AmdGpus, gpu
from harness import wait_until

from mpmm import ModelManager
from mpmm.memory.placement import Placement, current_placement
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.multi_process_shared.forkserver.leftovers import PER_PROCESS_VARIABLES
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources import MemorySource, SourceUnavailableError, choose_source
from mpmm.sources import amd as amd_source
from mpmm.sources.amd import AmdGpu, AmdSource, visible_gpus
from mpmm.sources.booked import BookedSource
from mpmm.sources.selected import SelectedDevices
from mpmm.sources.visible_devices import server_setting

STAND_IN = Path(__file__).resolve().parent / "amdsmi_stand_in"
TESTS = STAND_IN.parent
VISIBILITY = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "MPMM_MEMORY_SOURCE")
BUSY = psutil.Process().ppid()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="AMD's library is for Linux")


@pytest.fixture
def amd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AmdGpus:
    """Two GPUs of 16 and 8 GB, found by this process and its children; 512 and 256 MB of them are the driver's."""
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), str(TESTS), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    for variable in VISIBILITY:
        monkeypatch.delenv(variable, raising=False)
    gpus = AmdGpus(tmp_path)
    gpus.describe(
        gpu("big", 16384, 512, name="AMD Instinct MI300X", serial="0x00000000DEADBEEF"),
        gpu("small", 8192, 256, serial="0x00000000FEEDBEEF"),
    )
    return gpus


def users() -> int:
    """Return how often this process has initialised the library, less how often it has shut it down."""
    count: int = importlib.import_module("amdsmi").users.get(os.getpid(), 0)
    return count


def change(gpus: AmdGpus, number: int, **changes: Any) -> None:
    about = gpus.read()
    about["gpus"][number] |= changes
    gpus.describe(*about["gpus"], init_error=about["init_error"])


def test_totals_use_and_names_are_the_librarys(amd: AmdGpus) -> None:
    source = AmdSource()
    assert isinstance(source, MemorySource)
    assert [(d.index, d.uuid, d.name, d.total_mb) for d in source.devices()] == [
        (0, "big", "AMD Instinct MI300X", 16384),
        (1, "small", "small", 8192),
    ]
    change(amd, 0, used_mb=2512)
    before = time.monotonic_ns()
    first, second = source.sample(())
    assert (first.index, first.used_mb, second.index, second.used_mb) == (0, 2512, 1, 256)
    assert before <= first.taken_ns <= first.done_ns <= second.taken_ns <= second.done_ns <= time.monotonic_ns()
    source.close()
    assert users() == 0


@pytest.mark.parametrize("change_mb", [-900, 900], ids=["given back", "taken"])
def test_what_a_process_gives_back_or_takes_while_it_is_listed_is_in_the_whole(
    amd: AmdGpus, monkeypatch: pytest.MonkeyPatch, change_mb: int
) -> None:
    source = AmdSource()
    change(amd, 0, processes={os.getpid(): 1000}, used_mb=1000)
    library = importlib.import_module("amdsmi")
    read = library.amdsmi_get_gpu_process_list

    def read_and_change(handle: Any) -> Any:
        found = read(handle)
        change(amd, 0, used_mb=1000 + change_mb)
        return found

    monkeypatch.setattr(library, "amdsmi_get_gpu_process_list", read_and_change)
    (sample, _) = source.sample((os.getpid(),))
    assert sample.used_mb == max(1000, 1000 + change_mb)
    assert sample.process_mb == {os.getpid(): 1000}


def test_of_two_threads_that_start_the_library_one_has_the_session_and_both_have_figures(
    amd: AmdGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, make = AmdSource(), amd_source._open_session
    source.close()
    assert users() == 0

    def let_another_be_faster() -> Any:
        monkeypatch.setattr(source._sessions, "_open_session", make)
        # Both have looked whether it is time by now.
        source._sessions.retry_at = 0.0
        assert [sample.used_mb for sample in source.sample(())] == [512, 256]
        return make()

    monkeypatch.setattr(source._sessions, "_open_session", let_another_be_faster)
    source._sessions.retry_at = 0.0
    assert [sample.used_mb for sample in source.sample(())] == [512, 256]
    assert users() == 1
    source.close()
    assert users() == 0


def test_it_measures_processes_once_it_has_shown_one_of_ours(amd: AmdGpus) -> None:
    source = AmdSource()
    # An existing process of another program.
    change(amd, 0, processes={BUSY: 700}, used_mb=1212)
    (sample, _) = source.sample((os.getpid(),))
    assert (source.measures_processes, source.process_knowledge, sample.processes_known) == (False, None, False)
    # One of ours is listed, but what it has is nothing: that is what a list without figures looks like, too.
    change(amd, 0, processes={BUSY: 700, os.getpid(): 0})
    source.sample((os.getpid(),))
    assert source.process_knowledge is None
    change(amd, 0, processes={BUSY: 700, os.getpid(): 1000}, used_mb=2212)
    first, second = source.sample((os.getpid(),))
    assert source.measures_processes
    assert first.process_mb == {BUSY: 700, os.getpid(): 1000} and first.processes_known
    assert second.process_mb == {} and second.processes_known
    assert first.unrelated_mb((os.getpid(),)) == 1212


def test_pids_of_another_namespace_are_not_taken_for_ours(amd: AmdGpus) -> None:
    source = AmdSource()
    change(amd, 0, processes={os.getpid(): 100})
    source.sample(())
    assert source.measures_processes
    change(amd, 0, processes={2**22 + 5: 100})
    source.sample(())
    assert source.measures_processes, "one that does not exist may have just ended"
    sample = source.sample(())[0]
    assert (source.process_knowledge, sample.process_mb, sample.processes_known) == (False, {}, False)
    assert sample.used_mb == 512
    change(amd, 0, processes={os.getpid(): 100})
    assert source.sample(())[0].processes_known and source.measures_processes


@pytest.mark.parametrize("processes", [None, {BUSY: None}], ids=["no list", "no figures"])
def test_what_the_library_withholds_is_unknown_and_not_zero(amd: AmdGpus, processes: Any) -> None:
    change(amd, 0, processes=processes)
    change(amd, 1, processes=processes)
    source = AmdSource()
    for sample in source.sample((BUSY,)):
        assert sample.process_mb == {} and not sample.processes_known
        assert sample.unrelated_mb((BUSY,)) is None
    assert source.process_knowledge is False and not source.measures_processes


def test_a_device_that_fails_has_no_figure_and_is_found_again(amd: AmdGpus) -> None:
    source = AmdSource(retry_s=0.0)
    change(amd, 0, broken="AMDSMI_STATUS_BUSY -\n Device busy")
    lost, there = source.sample(())
    assert lost.used_mb is None and lost.trouble == "AMDSMI_STATUS_BUSY - Device busy"
    assert there.used_mb == 256
    # The library is initialised anew; while the GPU is not even described, it is not found.
    assert source.sample(())[0].used_mb is None
    change(amd, 0, broken=None)
    wait_until(lambda: source.sample(())[0].used_mb == 512, "the device is read again")
    assert users() == 1
    source.close()


def test_what_a_version_lacks_or_cannot_decode_is_unknown_and_the_rest_is_told(
    amd: AmdGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = importlib.import_module("amdsmi")

    def fail(*_: Any) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setattr(library, "amdsmi_get_gpu_asic_info", fail)
    monkeypatch.delattr(library, "amdsmi_get_gpu_process_list")
    source = AmdSource()
    assert [device.name for device in source.devices()] == ["big", "small"]
    assert [(one.used_mb, one.process_mb, one.processes_known) for one in source.sample((os.getpid(),))] == [
        (512, {}, False),
        (256, {}, False),
    ]
    source.close()


def test_a_failure_is_told_by_its_text_or_its_kind(amd: AmdGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    library = importlib.import_module("amdsmi")
    source = AmdSource()

    def fail(*_: Any) -> None:
        raise library.AmdSmiLibraryException

    with monkeypatch.context() as patched:
        patched.setattr(library, "amdsmi_get_gpu_memory_usage", fail)
        assert {sample.trouble for sample in source.sample(())} == {"AmdSmiLibraryException"}
        patched.delattr(library, "amdsmi_get_gpu_memory_usage")
        (trouble,) = {sample.trouble for sample in source.sample(())}
    assert trouble == "this version of amdsmi has no amdsmi_get_gpu_memory_usage"
    source.close()


def test_what_is_refused_at_the_start_is_made_up_or_left_out(amd: AmdGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    library = importlib.import_module("amdsmi")

    def refuse(*_: Any) -> None:
        raise library.AmdSmiLibraryException("AMDSMI_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(library, "amdsmi_get_gpu_device_uuid", refuse)
    assert [device.uuid for device in AmdSource().devices()] == ["amd0", "amd1"]
    monkeypatch.setattr(library, "amdsmi_get_processor_handles", refuse)
    with pytest.raises(SourceUnavailableError, match=r"none of 0 GPU\(s\)"):
        AmdSource()


def test_a_library_that_gives_all_figures_is_not_started_again(amd: AmdGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    source = AmdSource(retry_s=0.0)
    monkeypatch.setattr(importlib.import_module("amdsmi"), "amdsmi_init", None)
    for _ in range(3):
        assert [sample.used_mb for sample in source.sample(())] == [512, 256]
    source.close()


@pytest.mark.parametrize(
    ("first", "second", "known"),
    [
        # One of ours that is shown is enough, on whichever device; what others have is none.
        ({"ours": 1}, {}, True),
        ({BUSY: 700}, {"ours": 1}, True),
        ({BUSY: 700}, {"ours": 0}, None),
        # One device's list is enough to know that processes may yet be shown.
        (None, {}, None),
        ({BUSY: None}, {BUSY: 5}, None),
        (None, {BUSY: None}, False),
    ],
)
def test_one_sample_tells_what_the_library_lets_us_know(
    amd: AmdGpus, first: Any, second: Any, known: bool | None
) -> None:
    for number, processes in enumerate((first, second)):
        named = processes and {os.getpid() if pid == "ours" else pid: mb for pid, mb in processes.items()}
        change(amd, number, processes=named)
    source = AmdSource()
    source.sample((2**22 + 5,))
    assert source.process_knowledge is known
    source.close()


def test_a_process_without_its_memory_is_withheld(amd: AmdGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[dict[str, Any]] = [
        {"pid": BUSY},
        {"pid": 1, "memory_usage": None},
        # Listed twice, with the same memory.
        *({"pid": os.getpid(), "memory_usage": {"vram_mem": mb * MIB}} for mb in (100, 70)),
    ]
    monkeypatch.setattr(importlib.import_module("amdsmi"), "amdsmi_get_gpu_process_list", lambda _: listed)
    source = AmdSource()
    assert [(one.process_mb, one.processes_known) for one in source.sample(())] == [({os.getpid(): 100}, False)] * 2
    assert source.measures_processes
    source.close()


def test_a_library_that_stops_working_is_tried_again_now_and_then(amd: AmdGpus) -> None:
    source = AmdSource(retry_s=0.05)
    source.close()
    about = amd.read()["gpus"]
    amd.describe(*about, init_error="AMDSMI_STATUS_INIT_ERROR - Initialization error")
    samples = source.sample(())
    assert [sample.used_mb for sample in samples] == [None, None]
    assert samples[0].trouble == "AMDSMI_STATUS_INIT_ERROR - Initialization error"
    amd.describe(*about)
    wait_until(lambda: source.sample(())[0].used_mb == 512, "the library works again")


def test_a_device_without_a_total_is_left_out_and_keeps_its_number(amd: AmdGpus) -> None:
    change(amd, 0, total_mb=None)
    assert [(d.index, d.uuid) for d in AmdSource().devices()] == [(1, "small")]


def test_without_the_package_driver_or_devices_it_is_unavailable(amd: AmdGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(SourceUnavailableError, match="cannot be imported") as error:
        patched.setitem(sys.modules, "amdsmi", None)
        AmdSource()
    assert error.value.source == "amdsmi"
    with monkeypatch.context() as patched, pytest.raises(SourceUnavailableError, match="DRIVER_NOT_LOADED"):
        patched.delenv(FOLDER_VARIABLE)
        AmdSource()
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    with pytest.raises(SourceUnavailableError, match=r"none of 2 GPU\(s\).*HIP_VISIBLE_DEVICES"):
        choose_source("amdsmi")
    amd.describe()
    with pytest.raises(SourceUnavailableError, match=r"none of 0 GPU\(s\)"):
        AmdSource()
    assert users() == 0


def test_an_import_that_fails_in_its_own_way_is_no_package(amd: AmdGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the real one does without ROCm's library.
    class Broken(ModuleType):
        pass

    def find_spec(name: str, *_: Any) -> None:
        if name == "amdsmi":
            raise KeyError("libamd_smi.so")

    finder = Broken("finder")
    finder.find_spec = find_spec  # type: ignore[attr-defined]  # a finder needs no more
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.raises(SourceUnavailableError, match=r"KeyError\('libamd_smi.so'\)"):
        AmdSource()


def test_auto_takes_it_after_nvidia_and_before_the_books(
    amd: AmdGpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert choose_source("auto").name == "amdsmi"
    monkeypatch.setenv("MPMM_MEMORY_SOURCE", "amdsmi")
    assert choose_source("auto").name == "amdsmi"
    monkeypatch.delenv("MPMM_MEMORY_SOURCE")
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_source("auto"), BookedSource)
    assert "amdsmi: the package amdsmi cannot be imported" in caplog.text


def test_a_forked_child_initialises_the_library_for_itself(amd: AmdGpus) -> None:
    source = AmdSource()
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            found = [sample.used_mb for sample in source.sample(())]
            counted = users()
            source.close()
            os.write(writer, json.dumps([found, counted, users()]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answer:
        assert json.loads(answer.read()) == [[512, 256], 1, 0]
    assert os.waitpid(pid, 0)[1] == 0
    assert users() == 1 and source.sample(())[0].used_mb == 512


# ---- visibility --------------------------------------------------------------------------------------------

FOUR = [
    AmdGpu(name, name, 1.0, f"GPU-{number:016x}") for name, number in zip("abcd", (0xA1, 0xA2, 0xB3, 0xC4), strict=True)
]


@pytest.mark.parametrize(
    ("rocr", "hip", "cuda", "seen"),
    [
        (None, None, None, "abcd"),
        ("2,0", None, None, "ca"),
        ("", None, None, ""),
        ("GPU-00000000000000b3, 0x1", None, None, "cb"),
        ("gpu-00000000000000B", None, None, "c"),
        ("GPU-00000000000000a", None, None, ""),
        ("GPU", None, None, ""),
        ("1,9,2", None, None, "b"),
        ("1,x", None, None, "b"),
        ("3,1,3,0", None, None, "db"),
        (None, "3,1", None, "db"),
        (None, "3,3,1", None, "db"),
        (None, "3,01,1", None, "d"),
        (None, "-1", None, ""),
        (None, "1, 2", None, "b"),
        (None, "GPU-00000000000000c4,0", None, "da"),
        (None, "", None, "abcd"),
        (None, None, "2", "c"),
        (None, "", "2", "c"),
        (None, "1", "2", "b"),
        ("3,2", "1", None, "c"),
        ("3,2", "2", None, ""),
        ("3,2", None, "0", "d"),
    ],
)
def test_the_variables_show_what_the_runtimes_would(
    rocr: str | None, hip: str | None, cuda: str | None, seen: str
) -> None:
    assert "".join(gpu.name for gpu in visible_gpus(FOUR, rocr, hip, cuda)) == seen


@pytest.mark.parametrize(
    ("rocr", "seen"),
    [("GPU-2", "b"), ("GPU-3,GPU-1", "ca"), ("GPU-4", ""), ("GPU-", ""), ("GPU-20000000000000000", "")],
)
def test_a_runtime_wants_a_digit_of_a_uuid_at_least_and_one_that_is_not_known_matches_none(
    rocr: str, seen: str
) -> None:
    known = [AmdGpu(name, name, 1.0, f"GPU-{number}{0:015x}") for number, name in enumerate("abc", 1)]
    unknown = AmdGpu("d", "d", 1.0)
    assert "".join(gpu.name for gpu in visible_gpus([unknown, *known], rocr, None, None)) == seen
    assert visible_gpus(known[:1], "GPU-", None, None) == [], "not even where there is but one"
    assert visible_gpus([unknown, *known], None, "GPU-2", None) == known[1:2]


def test_gpus_are_counted_in_the_order_of_the_kernels_nodes(amd: AmdGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    change(amd, 0, node_id=5)
    change(amd, 1, node_id=3)
    assert [device.uuid for device in AmdSource().devices()] == ["small", "big"]
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "GPU-00000000deadbeef")
    assert [(device.index, device.uuid) for device in AmdSource().devices()] == [(0, "big")]


@pytest.mark.parametrize("nodes", [(5, None), (None, 3), (5, "N/A"), (5, 5), (None, None)])
def test_without_the_kernels_nodes_the_librarys_order_counts(amd: AmdGpus, nodes: tuple[Any, Any]) -> None:
    for number, node in enumerate(nodes):
        change(amd, number, node_id=node)
    assert [device.uuid for device in AmdSource().devices()] == ["big", "small"]


def test_a_server_counts_among_the_gpus_that_rocr_shows_it(amd: AmdGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1,0")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    source = AmdSource()
    assert [device.uuid for device in source.devices()] == ["big"]
    assert server_setting(source, ["big"]) == ("HIP_VISIBLE_DEVICES", "1")
    assert server_setting(SelectedDevices(source, ["big"]), ["big", "small"]) == ("HIP_VISIBLE_DEVICES", "1,0")
    assert server_setting(source, ["big", "another"]) is None
    assert server_setting(source, []) is None
    assert server_setting(BookedSource(100.0), ["GPU-1"]) == ("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert PER_PROCESS_VARIABLES.fullmatch("HIP_VISIBLE_DEVICES")


# ---- with a manager ----------------------------------------------------------------------------------------


class ServedOnAmd:
    """The object in a model server: it takes memory where HIP would put it."""

    def __init__(self, gpus: AmdGpus, mb: float) -> None:
        self._placement = current_placement()
        gpus.allocate(mb)

    def where(self) -> tuple[str | None, str | None, Placement | None]:
        """Return what the runtimes would see, and what the constructor was told."""
        return os.environ.get("HIP_VISIBLE_DEVICES"), os.environ.get("CUDA_VISIBLE_DEVICES"), self._placement


class LoadsOnAmd:
    """A loader that starts a model server and returns its handle."""

    def __init__(self, tag: str, gpus: AmdGpus, mb: float) -> None:
        self._tag, self._gpus, self._mb = tag, gpus, mb

    def __call__(self) -> str:
        """Load."""
        self.served()
        return self._tag

    def served(self) -> Any:
        """Return a proxy of the model."""
        make = partial(ServedOnAmd, self._gpus, self._mb)
        return MultiProcessShared(make, tag=self._tag, always_proxy=True, spawn_process=True).acquire()


def test_models_are_placed_by_hip_visible_devices_and_measured_in_their_processes(
    namespace: str, new_manager: Callable[..., ModelManager], amd: AmdGpus
) -> None:
    manager = new_manager(memory_source="amdsmi", default_estimate_mb=3000.0)
    loaders = {number: LoadsOnAmd(f"amd{number}", amd, 2000) for number in (1, 0)}
    held = {
        f"on {number}": manager.acquire_model(f"on {number}", loaders[number], devices=[number]) for number in loaders
    }
    assert [loader.served().where() for loader in loaders.values()] == [
        ("1", None, Placement((0,), ("small",))),
        ("0", None, Placement((0,), ("big",))),
    ]
    assert [sum(amd.taken_mb(number).values()) for number in (0, 1)] == [2000, 2000]
    # The first was loaded alone, since it was unknown whether processes are measured; its release measures it.
    for tag, handle in held.items():
        manager.release_model(tag, handle)
    wait_until(lambda: manager._estimator.estimates == {"on 1": 2000, "on 0": 2000}, "both are known")
    wait_until(lambda: read_snapshot(namespace).measures_processes, "processes are measured")
    devices = read_snapshot(namespace).devices
    assert [(device.uuid, device.total_mb) for device in devices] == [("big", 16384), ("small", 8192)]


def test_a_started_process_finds_the_package_by_its_path(amd: AmdGpus) -> None:
    code = "from mpmm import GPUMonitor; m = GPUMonitor(source='amdsmi'); m.start(); m.stop(); print(m.get_stats())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=TESTS.parent)
    assert done.stdout.strip() == "(768.0, 768.0, 24576.0)", done.stderr
    assert MIB == 2**20
