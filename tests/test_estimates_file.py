"""Estimates in a file: a second run measures nothing, many processes write it, and damage costs only its contents."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from pathlib import Path

import pytest
from device import SimulatedDevice
from harness import NewDevice, NewManager, NewProcess, Seat, acquire, model_of, release, shut_down, wait_until
from loaders import LoadsObject

from mpmm.errors import LockTimeoutError
from mpmm.memory.estimates_file import ESTIMATES_PATH_VARIABLE, TAGS_KEPT, Estimate, EstimatesFile
from mpmm.model_manager import ModelManager
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import read_snapshot

SIZES_MB = {"a": 100.0, "b": 200.0, "c": 150.0}
WRITES = 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file is to be."""
    return tmp_path / "kept" / "estimates.json"


def use_all(manager: ModelManager, device: SimulatedDevice) -> None:
    """Use every model once."""
    for tag, mb in SIZES_MB.items():
        with manager.model(tag, LoadsObject(tag, device=device, mb=mb)):
            pass


def isolations(namespace: str) -> int:
    """Return how many loads ran alone to be measured."""
    return sum(event.reason == Reason.ALONE for event in read_snapshot(namespace).events)


@pytest.mark.parametrize("by", ["parameter", "environment"])
def test_a_second_run_profiles_nothing(
    by: str,
    path: Path,
    namespace: str,
    new_manager: NewManager,
    new_device: NewDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = new_device(1000.0)
    arguments = {"memory_source": device, "fallback_memory_mb": 1000.0}
    if by == "parameter":
        arguments["estimates_path"] = path
    else:
        monkeypatch.setenv(ESTIMATES_PATH_VARIABLE, str(path))
    first = new_manager(**arguments)
    use_all(first, device)
    assert isolations(namespace) == len(SIZES_MB)
    first.shutdown()
    second = new_manager(**arguments)
    use_all(second, device)
    assert isolations(namespace) == 0
    for tag, mb in SIZES_MB.items():
        assert model_of(namespace, tag).estimate_mb == pytest.approx(mb)
        assert model_of(namespace, tag).sd_mb > 0, "better figures will still count"


def test_what_is_only_assumed_is_not_kept(path: Path, new_manager: NewManager) -> None:
    manager = new_manager(estimates_path=path)
    with manager.model("a", lambda: "handle"):
        pass
    manager.shutdown()
    assert not path.exists()


def test_estimates_of_one_kind_of_device_say_nothing_of_another(path: Path) -> None:
    file = EstimatesFile(path)
    file.merge("small", {"a": Estimate(10.0, True, 1.0)})
    file.merge("large", {"a": Estimate(20.0, False, 2.0)})
    assert file.read("small") == {"a": Estimate(10.0, True, 1.0)}
    assert file.read("large") == {"a": Estimate(20.0, False, 2.0)}
    assert file.read("other") == {}


def test_the_oldest_go_when_there_are_too_many(path: Path) -> None:
    file = EstimatesFile(path)
    file.merge("device", {f"tag-{number}": Estimate(1.0, True, float(number)) for number in range(TAGS_KEPT)})
    file.merge("device", {"new": Estimate(2.0, True, 1e9)})
    kept = file.read("device")
    assert (len(kept), "new" in kept, "tag-0" in kept, "tag-1" in kept) == (TAGS_KEPT, True, False, True)


DAMAGED = {
    "nothing": b"",
    "no JSON": b"\x00\xff{",
    "other JSON": b"[1, 2]",
    "other format": json.dumps({"format": "x", "version": 1, "devices": {}}).encode(),
    "later version": json.dumps({"format": "mpmm estimates", "version": 2, "devices": {}}).encode(),
    "no numbers": json.dumps(
        {"format": "mpmm estimates", "version": 1, "devices": {"d": {"a": {"mb": "much"}}}}
    ).encode(),
    "not finite": b'{"format": "mpmm estimates", "version": 1, "devices": {"d": {"a": '
    b'{"mb": NaN, "measured": true, "updated": 1}}}}',
    "too large": b'{"format": "mpmm estimates", "version": 1, "devices": {"d": {"a": '
    b'{"mb": 1' + b"0" * 400 + b', "measured": true, "updated": 1}}}}',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_reported_once_and_replaced(what: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(DAMAGED[what])
    file = EstimatesFile(path)
    with caplog.at_level(logging.WARNING, "mpmm"):
        assert file.read("device") == file.read("device") == {}
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    file.merge("device", {"a": Estimate(1.0, True, 1.0)})
    assert file.read("device") == {"a": Estimate(1.0, True, 1.0)}


def test_a_folder_that_cannot_be_written_costs_nobody_anything(
    namespace: str, new_manager: NewManager, new_device: NewDevice, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    device = new_device(1000.0)
    manager = new_manager(memory_source=device, estimates_path=tmp_path / "file" / "estimates.json")
    with caplog.at_level(logging.WARNING, "mpmm"):
        use_all(manager, device)
        manager.shutdown()
    assert "cannot save estimates" in caplog.text


def write_many(seat: Seat, path: Path, number: int) -> None:
    """Merge estimates of tags of one's own; again where others have the file for too long, as a leader does later."""
    file = EstimatesFile(path)
    turn = 0
    while turn < WRITES:
        with contextlib.suppress(LockTimeoutError):
            file.merge("device", {f"{number}-{turn}": Estimate(1.0, True, float(turn))})
            turn += 1


def test_many_processes_write_one_file(path: Path, new_process: NewProcess) -> None:
    writers = [new_process(attached=False) for _ in range(3)]
    for number, writer in enumerate(writers):
        writer.send(write_many, path, number)
    for writer in writers:
        writer.result()
    assert len(EstimatesFile(path).read("device")) == len(writers) * WRITES
    assert sorted(os.listdir(path.parent)) == ["estimates.json", "estimates.json.lock"]


def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(path: Path, new_process: NewProcess) -> None:
    file = EstimatesFile(path)
    file.merge("device", {"a": Estimate(1.0, True, 1.0)})
    for number in range(5):
        victim = new_process(attached=False)
        victim.send(write_many, path, number)
        victim.signal(signal.SIGKILL)
        victim.kill()
        assert file.read("device")["a"] == Estimate(1.0, True, 1.0)
    file.merge("device", {"b": Estimate(1.0, True, 1.0)})
    assert {"a", "b"} <= set(file.read("device"))


def test_the_leader_writes_while_the_job_runs(
    path: Path, namespace: str, new_process: NewProcess, new_device: NewDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpmm.memory.estimates_file.SAVE_INTERVAL_S", 0.05)
    device = new_device(1000.0)
    arguments = {"memory_source": device, "estimates_path": path, "poll_interval": 0.05}
    leader, other = new_process(**arguments), new_process(**arguments)
    other.call(acquire, "a", LoadsObject("a", device=device, mb=100.0))
    other.call(release)
    wait_until(lambda: "a" in EstimatesFile(path).read("device 0"), "the estimate is in the file")
    other.call(shut_down)
    leader.kill()
    assert EstimatesFile(path).read("device 0")["a"].mb == pytest.approx(100.0)
