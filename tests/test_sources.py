"""NVML and nvidia-smi as memory sources: against a fake driver and a fake program."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_drivers import FakeDevice, FakeSmi, NVMLError, install, process, two_gpus, used
from fake_drivers import plain_environment as plain_environment  # the fixture
from fake_drivers import smi as smi  # the fixture

from mpmm.sources import SourceUnavailableError, nvml
from mpmm.sources.base import MIB
from mpmm.sources.nvidia_smi import NvidiaSmiSource
from mpmm.sources.nvml import NvmlSource


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
        # Each device is measured before and after its processes.
        assert all(sample.taken_ns <= at for sample, at in zip(samples, measured_ns[::2], strict=True))
        assert all(at <= sample.done_ns for sample, at in zip(samples, measured_ns[1::2], strict=True))

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
        assert not sample.processes_known and sample.unrelated_mb((7,)) is None
        gpu.compute.pop(1)
        (sample,) = NvmlSource().sample((7,))
        assert sample.unrelated_mb((7, 9)) == 650.0

    def test_mig_slices_are_devices_and_their_board_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slices = [FakeDevice("MIG-1", 5000, 100), FakeDevice("MIG-2", 10000, 200)]
        install(monkeypatch, FakeDevice("GPU-aaaa", 40000, 300, slices), FakeDevice("GPU-bbbb", 16000, 1000))
        source = NvmlSource()
        assert [d.uuid for d in source.devices()] == ["MIG-1", "MIG-2", "GPU-bbbb"]
        assert used(source) == [100.0, 200.0, 1000.0]

    def test_of_two_threads_that_start_the_library_one_has_the_session_and_both_have_figures(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = install(monkeypatch, *two_gpus())
        source, make = NvmlSource(), nvml._open_session
        source.close()
        assert fake.users == 0

        def let_another_be_faster() -> Any:
            monkeypatch.setattr(source._sessions, "_open_session", make)
            # Both have looked whether it is time by now.
            source._sessions.retry_at = 0.0
            assert used(source) == [1000.0, 2000.0]
            return make()

        monkeypatch.setattr(source._sessions, "_open_session", let_another_be_faster)
        source._sessions.retry_at = 0.0
        assert used(source) == [1000.0, 2000.0]
        assert fake.users == 1

    def test_gpus_and_slices_whose_uuids_are_refused_are_told_apart_by_their_numbers(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slices = [FakeDevice("MIG-1", 5000, 100), FakeDevice("MIG-2", 10000, 200)]
        gpus = [*two_gpus(), FakeDevice("GPU-cccc", 40000, 300, slices)]
        for device in (*gpus, *slices):
            device.tells_uuid = False
        install(monkeypatch, *gpus)
        source = NvmlSource()
        assert [d.uuid for d in source.devices()] == ["gpu0", "gpu1", "MIG-gpu2/0", "MIG-gpu2/1"]
        assert used(source) == [1000.0, 2000.0, 100.0, 200.0]

    def test_a_board_that_does_not_say_how_many_slices_it_has_hides_no_other(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut, whole = FakeDevice("GPU-aaaa", 40000, 300, [FakeDevice("MIG-1", 5000, 100)]), two_gpus()[1]
        cut.most_slices = 0
        install(monkeypatch, cut, whole)
        assert [d.uuid for d in NvmlSource().devices()] == ["GPU-bbbb"]

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

    @pytest.mark.parametrize("setting", ["MIG-2,GPU-cccc", "GPU-cccc,MIG-1", "2,2", "MIG-1,MIG-1"])
    def test_a_slice_that_is_named_by_itself_and_with_its_board_hides_all(
        self, monkeypatch: pytest.MonkeyPatch, setting: str
    ) -> None:
        slices = [FakeDevice("MIG-1", 5000, 100), FakeDevice("MIG-2", 10000, 200)]
        install(monkeypatch, *two_gpus(), FakeDevice("GPU-cccc", 40000, 300, slices))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        with pytest.raises(SourceUnavailableError, match="CUDA_VISIBLE_DEVICES"):
            NvmlSource()

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

    def test_a_figure_of_one_mib_is_2_to_the_20_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = FakeDevice("GPU-aaaa", 0, 0)
        gpu.total, gpu.used = 16 * 1024**3, 1024**3
        install(monkeypatch, gpu)
        source = NvmlSource()
        assert [d.total_mb for d in source.devices()] == [16384.0]
        assert used(source) == [1024.0]

    def test_a_driver_that_does_not_count_its_gpus_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, *two_gpus())

        def refuse() -> int:
            raise NVMLError("Unknown Error")

        monkeypatch.setattr(fake, "nvmlDeviceGetCount", refuse)
        with pytest.raises(SourceUnavailableError, match=r"none of 0 GPU\(s\)"):
            NvmlSource()

    @pytest.mark.parametrize(("mode", "uuids"), [([1, 0], ["MIG-1"]), ([0, 1], ["GPU-aaaa"])])
    def test_a_board_is_cut_if_it_is_now_and_not_if_it_will_be_after_a_reset(
        self, monkeypatch: pytest.MonkeyPatch, mode: list[int], uuids: list[str]
    ) -> None:
        fake = install(monkeypatch, FakeDevice("GPU-aaaa", 40000, 300, [FakeDevice("MIG-1", 5000, 100)]))
        monkeypatch.setattr(fake, "nvmlDeviceGetMigMode", lambda _: mode)
        assert [d.uuid for d in NvmlSource().devices()] == uuids

    def test_a_gpu_whose_name_is_refused_is_called_by_its_uuid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, *two_gpus())

        def refuse(device: FakeDevice) -> str:
            raise NVMLError("Not Supported")

        monkeypatch.setattr(fake, "nvmlDeviceGetName", refuse)
        assert [d.name for d in NvmlSource().devices()] == ["GPU-aaaa", "GPU-bbbb"]

    def test_one_failing_device_makes_the_library_start_again_at_most_every_so_often(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = two_gpus()
        fake = install(monkeypatch, first, second)
        source, starts, start = NvmlSource(), list[float](), fake.nvmlInit
        clock = 0.0

        def noted_start() -> None:
            starts.append(clock)
            start()

        monkeypatch.setattr(time, "monotonic", lambda: clock)
        monkeypatch.setattr(fake, "nvmlInit", noted_start)
        first.broken = True
        found = []
        # The first sample notices; the second one has a new session, in which there is no such device.
        for passed_s in (0.0, 0.0, 1.5, 0.5, 1.0):
            clock += passed_s
            samples = source.sample(())
            found.append(([sample.used_mb for sample in samples], samples[0].trouble, len(starts)))
        lost = [None, 2000.0]
        assert found == [
            (lost, "GPU is lost", 0),
            (lost, "not found", 1),
            (lost, "not found", 1),
            (lost, "not found", 2),
            (lost, "not found", 2),
        ]
        assert fake.users == 1
        first.broken = False
        clock += 1.0
        assert used(source) == [1000.0, 2000.0]
        # With all figures there, there is no reason to start it again.
        clock += 2.0
        assert used(source) == [1000.0, 2000.0]
        assert len(starts) == 3

    def test_a_library_that_does_not_start_again_is_tried_again_in_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = install(monkeypatch, *two_gpus())
        source, clock = NvmlSource(retry_s=100.0), 0.0
        monkeypatch.setattr(time, "monotonic", lambda: clock)
        source.close()
        fake.init_error = "Driver Not Loaded"
        assert [sample.trouble for sample in source.sample(())] == ["Driver Not Loaded"] * 2
        fake.init_error = None
        clock += 99.0
        assert used(source) == [None, None]
        clock += 1.0
        assert used(source) == [1000.0, 2000.0]
        # Who closes a source may have reloaded the driver, so that it is tried at once.
        fake.init_error = "Driver Not Loaded"
        source.close()
        assert used(source) == [None, None]
        fake.init_error = None
        source.close()
        assert used(source) == [1000.0, 2000.0]

    def test_a_child_leaves_the_session_of_its_parent_alone_and_starts_its_own_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = two_gpus()
        fake = install(monkeypatch, first, second)
        source = NvmlSource(retry_s=1000.0)
        first.broken = True
        for _ in range(2):  # the second time, the library has just been started again
            assert used(source) == [None, 2000.0]
        first.broken = False
        pid = os.fork()
        if pid == 0:
            inherited = source._sessions._session
            found = used(source)
            users = [fake.users]
            source.close()
            users.append(fake.users)
            source._sessions._session = inherited
            source.close()
            os._exit(0 if (found, [*users, fake.users]) == ([1000.0, 2000.0], [1, 0, 0]) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def test_a_session_is_ended_once_whoever_else_ends_it_meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = two_gpus()
        fake = install(monkeypatch, first, second)
        source, make, starts = NvmlSource(retry_s=0.0), nvml._open_session, list[str]()
        first.broken = True
        assert used(source) == [None, 2000.0]
        first.broken = False

        def let_another_thread_see_the_old_session() -> Any:
            starts.append("again")
            # It has been ended, and there is no new one yet.
            assert used(source) == [None, None]
            return make()

        monkeypatch.setattr(source._sessions, "_open_session", let_another_thread_see_the_old_session)
        assert used(source) == [1000.0, 2000.0]
        assert (starts, fake.users) == (["again"], 1)

    def test_a_source_that_is_closed_while_the_library_starts_has_the_new_session(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = install(monkeypatch, *two_gpus())
        source, make = NvmlSource(retry_s=0.0), nvml._open_session

        def be_closed() -> Any:
            source.close()
            return make()

        monkeypatch.setattr(source._sessions, "_open_session", be_closed)
        source._sessions.doubted = True
        assert used(source) == [1000.0, 2000.0]
        assert fake.users == 1


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

    @pytest.mark.parametrize(
        ("text", "used_mb"),
        [
            *(
                (junk, None)
                for junk in ("[N/A]", "[Not Supported]", "[Unknown Error]", "nan", "-3", "", "junk", "[N/A")
            ),
            *((junk, None) for junk in ("22000x", "22000-", "2.2.2", "1e3", "9" * 400)),
            *((number, 2000.0) for number in ("22000", "+22000", "22000.", "22000.0", "22000 MiB", "22000MiB")),
            *((number, 2000.0) for number in ("22000, 5", "22000\tof 24000", "22000 MiB of 24000")),
            *(("0", 24000.0), ("0.5", 23999.5), ("24000", 0.0), ("25000", 0.0)),
        ],
    )
    def test_a_line_counts_if_it_begins_with_a_number_that_may_be_a_size(
        self, smi: FakeSmi, text: str, used_mb: float | None
    ) -> None:
        source = NvidiaSmiSource()
        smi.answers["uuid_free"] = f"GPU-aaaa, 15000\nGPU-bbbb, {text}\n"
        first, second = source.sample(())
        assert (first.used_mb, first.trouble, second.used_mb) == (1000.0, None, used_mb)
        assert second.trouble == (None if used_mb is not None else text or "not in the list")

    def test_it_waits_five_seconds_for_the_program(self, smi: FakeSmi) -> None:
        NvidiaSmiSource()
        assert {options["timeout"] for _, options in smi.calls} == {5.0}

    def test_a_single_gpu_with_memory_of_its_own_has_its_figures(
        self, smi: FakeSmi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64000 * MIB))
        smi.answers |= {"total": "24000\n", "uuid_free": "GPU-bbbb, 22000\n", "uuid_name": "GPU-bbbb, Big\n"}
        source = NvidiaSmiSource()
        assert [d.total_mb for d in source.devices()] == [24000.0]
        assert used(source) == [2000.0]
        # The program takes its time, and is asked no more than is needed.
        fields = [command[1].removeprefix("--query-gpu=") for command, _ in smi.calls]
        assert fields == ["memory.total", "uuid,mig.mode.current,name", "uuid,name", "uuid,memory.free"]

    def test_a_gpu_without_a_total_is_left_out_and_does_not_shift_the_lines(self, smi: FakeSmi) -> None:
        smi.answers["total"] = "[N/A]\n24000\n"
        source = NvidiaSmiSource()
        assert [(d.index, d.uuid) for d in source.devices()] == [(1, "GPU-bbbb")]
        assert used(source) == [2000.0]

    @pytest.mark.parametrize(
        "labels",
        [
            *(subprocess.CalledProcessError(2, "nvidia-smi", ""), Exception("odd"), "16000", "[N/A], x\n[N/A], y\n"),
            *("GPU-aaaa\nGPU-bbbb\n", "GPU-aaaa, x\nGPU-aaaa, y\n", "GPU-aaaa, x\nGPU-bbbb,\n", "GPU-aaaa, x\n"),
        ],
    )
    def test_names_are_made_up_when_the_program_does_not_tell_them(self, smi: FakeSmi, labels: str | Exception) -> None:
        smi.answers["uuid_name"] = labels
        assert [(d.uuid, d.name) for d in NvidiaSmiSource().devices()] == [("gpu0", "gpu0"), ("gpu1", "gpu1")]

    def test_lines_are_told_apart_by_uuid(self, smi: FakeSmi) -> None:
        source = NvidiaSmiSource()
        smi.answers["uuid_free"] = "GPU-bbbb, 21000\n"
        assert used(source) == [None, 3000.0]
        assert [sample.trouble for sample in source.sample(())] == ["not in the list", None]

    def test_without_uuids_lines_count_in_their_order(self, smi: FakeSmi) -> None:
        smi.answers |= {"uuid_name": Exception("odd"), "free": "15000\n22000\n"}
        source = NvidiaSmiSource()
        assert used(source) == [1000.0, 2000.0]
        # Fewer of them may be there, or none.
        for lines, found in (("15000\n", [1000.0, None]), ("", [None, None])):
            smi.answers["free"] = lines
            assert used(source) == found
        # If the program fails, what it has printed counts.
        smi.answers["free"] = subprocess.CalledProcessError(15, "nvidia-smi", "15000\n[GPU is lost]\n")
        assert used(source) == [1000.0, None]
        smi.answers["free"] = subprocess.CalledProcessError(15, "nvidia-smi", "Unable to determine anything\n")
        with pytest.raises(subprocess.CalledProcessError):
            source.sample(())

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

    @pytest.mark.parametrize("status", [2, 6, 9, 12, 13])
    def test_a_program_that_can_read_no_gpu_at_all_is_not_asked_for_each(self, smi: FakeSmi, status: int) -> None:
        smi.answers["total"] = subprocess.CalledProcessError(status, "nvidia-smi", "")
        with pytest.raises(SourceUnavailableError):
            NvidiaSmiSource()
        assert len(smi.calls) == 1

    def test_one_lost_gpu_does_not_blind_the_others(self, smi: FakeSmi) -> None:
        source = NvidiaSmiSource()
        lost = subprocess.CalledProcessError(15, "nvidia-smi", "Unable to determine the device handle: GPU is lost")
        smi.answers |= {"uuid_free": lost, "uuid_free of GPU-aaaa": "GPU-aaaa, 15400\n"}
        assert used(source) == [600.0, None]
        assert "GPU is lost" in str(source.sample(())[1].trouble)
        smi.answers["uuid_free of GPU-bbbb"] = subprocess.CalledProcessError(15, "nvidia-smi", "")
        assert "status 15" in str(source.sample(())[1].trouble)
        # Nor does one of which the program says nothing until it is killed.
        smi.answers["uuid_free of GPU-bbbb"] = subprocess.TimeoutExpired("nvidia-smi", 5.0)
        assert used(source) == [600.0, None]
        assert "timed out" in str(source.sample(())[1].trouble)
        smi.answers |= {
            "uuid_free of GPU-aaaa": smi.answers["uuid_free of GPU-bbbb"],
            "uuid_free of GPU-bbbb": "GPU-bbbb, 22000\n",
        }
        assert used(source) == [None, 2000.0]
        smi.answers["uuid_free of GPU-bbbb"] = lost
        smi.answers["uuid_free of GPU-aaaa"] = lost
        with pytest.raises(subprocess.CalledProcessError):
            source.sample(())

    @pytest.mark.parametrize("is_named", [False, True])
    def test_a_gpu_that_is_lost_at_the_start_keeps_its_number(
        self, smi: FakeSmi, monkeypatch: pytest.MonkeyPatch, is_named: bool
    ) -> None:
        lost = subprocess.CalledProcessError(15, "nvidia-smi", "Unable to determine the device handle: GPU is lost")
        if is_named:
            smi.answers["uuid_name of 0"] = "GPU-aaaa, Big GPU\n"
        smi.answers |= {
            **{"total": lost, "uuid_name": lost, "uuid_free": lost, "total of 1": "24000\n"},
            **{"uuid_name of 1": "GPU-bbbb, Big, Fast\n", "uuid_free of GPU-bbbb": "GPU-bbbb, 22000\n"},
            "total of 2": subprocess.CalledProcessError(6, "nvidia-smi", "No devices were found"),
        }
        source = NvidiaSmiSource()
        assert [(d.index, d.uuid, d.name, d.total_mb) for d in source.devices()] == [
            (1, "GPU-bbbb", "Big, Fast", 24000.0)
        ]
        assert {command[-1] for command, _ in smi.calls if "-i" in command} == {"0", "1", "2"}
        assert used(source) == [2000.0]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert [d.uuid for d in NvidiaSmiSource().devices()] == ["GPU-bbbb"]

    def test_a_program_that_fails_for_each_gpu_is_asked_for_as_many_as_a_host_may_have(self, smi: FakeSmi) -> None:
        smi.answers["total"] = subprocess.CalledProcessError(15, "nvidia-smi", "GPU is lost")
        with pytest.raises(SourceUnavailableError, match=r"none of 16 GPU\(s\)"):
            NvidiaSmiSource()

    def test_a_shell_that_is_killed_is_a_failure_of_the_program(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\nkill -9 $PPID\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            # It may be one GPU's fault, so the program is run for each.
            with pytest.raises(SourceUnavailableError, match=r"none of 16 GPU\(s\)"):
                NvidiaSmiSource()
        finally:
            signal.signal(signal.SIGCHLD, before)

    def test_a_failure_during_a_sample_is_the_callers_to_handle(self, smi: FakeSmi) -> None:
        source = NvidiaSmiSource()
        smi.answers["uuid_free"] = subprocess.TimeoutExpired("nvidia-smi", 5.0)
        with pytest.raises(subprocess.TimeoutExpired):
            source.sample(())


@pytest.mark.parametrize("change_mb", [-900, 900], ids=["given back", "taken"])
def test_what_a_process_gives_back_or_takes_while_it_is_listed_is_in_the_whole(
    monkeypatch: pytest.MonkeyPatch, change_mb: int
) -> None:
    gpu = FakeDevice("GPU-aaaa", 16000, 1000)
    install(monkeypatch, gpu)
    source = NvmlSource()

    class Listing(list[Any]):
        """Changes what is in use as soon as it was read."""

        def __iter__(self) -> Iterator[Any]:
            found = list(super().__iter__())
            gpu.used += change_mb * MIB
            return iter(found)

    gpu.compute = Listing([process(os.getpid(), 1000)])
    [sample] = source.sample(())
    assert sample.used_mb == max(1000, 1000 + change_mb)
    assert sample.process_mb == {os.getpid(): 1000}


class TestWholeIsReadAgain:
    """The whole of a device is read a second time, after its processes, unless all is as it was in the last sample."""

    def source_and_wholes(self, monkeypatch: pytest.MonkeyPatch) -> tuple[NvmlSource, FakeDevice, list[int]]:
        """Return a source whose last sample had 1 000 of 1 500 MB with this process, and a list that counts wholes."""
        gpu = FakeDevice("GPU-aaaa", 16000, 1500)
        fake = install(monkeypatch, gpu)
        gpu.compute = [process(os.getpid(), 1000)]
        source, wholes = NvmlSource(), []
        measure = fake.nvmlDeviceGetMemoryInfo

        def count(handle: Any) -> Any:
            found = measure(handle)
            wholes.append(found.used // MIB)
            return found

        monkeypatch.setattr(fake, "nvmlDeviceGetMemoryInfo", count, raising=False)
        source.sample(())
        wholes.clear()
        return source, gpu, wholes

    def test_not_where_nothing_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source, _, wholes = self.source_and_wholes(monkeypatch)
        [sample] = source.sample(())
        assert (sample.used_mb, sample.process_mb) == (1500, {os.getpid(): 1000})
        assert wholes == [1500]

    def test_after_a_process_has_taken_memory_while_it_was_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source, gpu, wholes = self.source_and_wholes(monkeypatch)

        class TakesWhileListed(list[Any]):
            def __iter__(self) -> Iterator[Any]:
                gpu.used += 400 * MIB
                return iter([process(os.getpid(), 1400)])

        gpu.compute = TakesWhileListed()
        [sample] = source.sample(())
        assert (sample.used_mb, sample.process_mb) == (1900, {os.getpid(): 1400})
        assert wholes == [1500, 1900]

    def test_after_a_process_has_given_memory_back_and_takes_it_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source, gpu, wholes = self.source_and_wholes(monkeypatch)
        gpu.used -= 400 * MIB

        class TakesAgain(list[Any]):
            def __iter__(self) -> Iterator[Any]:
                gpu.used += 400 * MIB
                return super().__iter__()

        gpu.compute = TakesAgain(gpu.compute)
        [sample] = source.sample(())
        assert sample.used_mb == 1500
        assert wholes == [1100, 1500]
