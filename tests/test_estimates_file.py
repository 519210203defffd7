"""Estimates in a file: a second run measures nothing, many processes write it, and damage costs only its contents."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from device import SimulatedDevice
from harness import NewDevice, NewManager, NewProcess, Seat, acquire, model_of, release, shut_down, wait_until
from loaders import LoadsObject
from row_changes import RowChanges
from row_changes import it as it  # the fixture

from mpmm.errors import LockTimeoutError
from mpmm.memory.estimates_file import (
    ESTIMATES_PATH_VARIABLE,
    TAGS_KEPT,
    Estimate,
    EstimatesFile,
    NamespaceEstimates,
)
from mpmm.model_manager import ModelManager
from mpmm.policy.view import Reason
from mpmm.shared_state.layout import Model
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


def test_a_file_of_an_older_version_tells_no_times_of_suspensions(path: Path) -> None:
    path.parent.mkdir()
    entry = {"mb": 5, "measured": True, "updated": 1}
    path.write_text(json.dumps({"format": "mpmm estimates", "version": 1, "devices": {"d": {"a": entry}}}))
    assert EstimatesFile(path).read("d") == {"a": Estimate(5.0, True, 1.0, 0.0, 0.0)}


@pytest.mark.parametrize(
    ("changed", "possible"),
    [
        *(({}, True), ({"mb": 0.0}, True), ({"mb": -0.1}, False), ({"mb": math.inf}, False), ({"mb": math.nan}, False)),
        *(({"suspend_s": 0.0}, True), ({"suspend_s": -0.1}, False), ({"resume_s": 0.0}, True)),
        *(({"resume_s": -0.1}, False), ({"resume_s": math.inf}, False), ({"updated": math.inf}, False)),
        ({"updated": -1.0}, True),
    ],
)
def test_figures_that_cannot_be_are_not_read(path: Path, changed: dict[str, float], possible: bool) -> None:
    file, one = EstimatesFile(path), replace(Estimate(100.0, True, 1.0, 1.0, 1.0), **changed)  # type: ignore[arg-type]  # numbers
    file.merge("d", {"a": one})
    assert file.read("d") == ({"a": one} if possible else {})


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        *(({"updated": 99.0}, False), ({"measured": False}, True)),
        *(({"mb": 99.0}, False), ({"mb": 98.9}, True), ({"mb": 101.0}, False), ({"mb": 101.2}, True)),
        *(({"suspend_s": 99.0}, False), ({"suspend_s": 98.9}, True), ({"resume_s": 99.0}, False)),
        *(({"resume_s": 98.9}, True), ({"resume_s": 0.0}, True)),
    ],
)
def test_what_hardly_differs_from_the_file_is_no_reason_to_write_it(changed: dict[str, float], differs: bool) -> None:
    one = Estimate(100.0, True, 1.0, 100.0, 100.0)
    other = replace(one, **changed)  # type: ignore[arg-type]  # numbers and a flag
    assert (one.differs_from(other), other.differs_from(one)) == (differs, differs)


def test_a_namespace_keeps_what_has_changed_every_five_seconds_at_most(
    path: Path, it: RowChanges, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept, file = NamespaceEstimates(it.namespace, path), EstimatesFile(path)
    file.merge("gpu", {"b": Estimate(50.0, True, 1.0)})
    kept.load()
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    monkeypatch.setattr("time.time", lambda: 1e9 + clock)

    def saved_after(passed_s: float, mb: float) -> dict[str, float]:
        nonlocal clock
        clock += passed_s
        it.do(lambda t: it.to.estimates.estimate(t, 1, mb, measured=True))
        kept.save_if_due()
        return {tag: one.mb for tag, one in file.read("gpu").items()}

    assert saved_after(0.0, 100.0) == {"a": 100.0, "b": 50.0}
    assert saved_after(4.9, 200.0) == {"a": 100.0, "b": 50.0}
    assert saved_after(0.1, 300.0) == {"a": 300.0, "b": 50.0}
    assert file.read("gpu")["a"].updated == 1e9 + 5.0
    path.unlink()
    assert saved_after(5.0, 301.0) == {}, "hardly anything has changed"
    # A file that cannot be written is reported once, until it can be.
    path.with_name(f"{path.name}.lock").unlink()
    path.parent.rmdir()
    for _ in range(2):
        path.parent.touch()
        assert saved_after(5.0, 400.0) == saved_after(5.0, 400.0) == {}
        path.parent.unlink()
        assert saved_after(5.0, 400.0) == {"a": 400.0}
        shutil.rmtree(path.parent)
        it.do(lambda t: it.to.estimates.estimate(t, 1, 100.0, measured=True))
        kept.save()
        shutil.rmtree(path.parent)
    assert ["cannot save" in record.getMessage() for record in caplog.records].count(True) == 2


def test_a_namespace_recalls_what_it_has_not_learnt_itself(path: Path, it: RowChanges) -> None:
    kept = NamespaceEstimates(it.namespace, path)
    EstimatesFile(path).merge("gpu", {"a": Estimate(100.0, False, 1.0, 2.0, 3.0), "b": Estimate(50.0, True, 1.0)})
    EstimatesFile(path).merge("another", {"c": Estimate(70.0, True, 1.0)})
    kept.load()

    def recalled(row: int, tag: str) -> tuple[bool, float, float, float, float]:
        it.do(lambda t: kept.recall(t, row, tag))
        model = it.tables.models[row]
        return model.measured, model.estimate_mb, model.sd_mb, model.suspend_s, model.resume_s

    for row in (1, 2):
        at = it.tables.model(row)
        for name in ("SUSPENDS", "RESUMES"):
            it.poke(at + getattr(Model, name), 0)
    measured, mb, sd_mb, *times = recalled(1, "a")
    assert (measured, mb, sd_mb, times) == (False, 100.0, 3.0, [2.0, 3.0])
    assert recalled(2, "b")[:3] == (True, 50.0, 0.0)
    # What is known already, or from experience, stays.
    assert recalled(1, "b")[:3] == (False, 100.0, 3.0)
    it.claim("c")
    it.do(lambda t: it.to.estimates.record_out_of_memory(t, 3, 70.0))
    EstimatesFile(path).merge("gpu", {"c": Estimate(70.0, True, 1.0), "d": Estimate(70.1, True, 1.0)})
    kept.load()
    assert not it.tables.models[3].known
    recalled(3, "c")
    assert not it.tables.models[3].known, "it has run out of memory with as much"
    assert recalled(3, "d")[1] == 70.1


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
    caplog.clear()
    path.write_bytes(DAMAGED[what])
    assert file.read("device") == {}
    assert len(caplog.records) == 1, "this is another damage"


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
