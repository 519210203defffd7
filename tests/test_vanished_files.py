"""Files that vanish under living processes: what is missing says nothing about who lives."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from processes import Loads, LoadsServer, Process, Seat, acquire, attach, release, shut_down

from mpmm.errors import SegmentLostError
from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared import server_pid
from mpmm.proxy.room import room_for
from mpmm.shared_state.liveness import lives_by_pid
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE, RuntimeDirectory, default_root
from mpmm.shared_state.segment import segment_name
from mpmm.shared_state.snapshot import read_snapshot

NewManager = Callable[..., ModelManager]
NewProcess = Callable[..., Process]


def reap(seat: Seat) -> int:
    """Take back what the dead had."""
    return int(seat.manager._connected().namespace.reap_dead_members())


def test_a_living_holder_whose_lock_file_was_removed_keeps_what_it_holds(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    holder, other = new_process(), new_process()
    holder.call(acquire, "a")
    for file in (runtime_root / namespace).glob("m*.lock"):
        file.unlink()
    assert all(member.alive for member in read_snapshot(namespace).members)
    assert other.call(reap) == 0
    assert read_snapshot(namespace).active == 1
    holder.call(release)


def test_a_killed_holder_whose_lock_file_was_removed_is_reaped(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    holder, other = new_process(), new_process()
    holder.call(acquire, "a")
    for file in (runtime_root / namespace).glob("m*.lock"):
        file.unlink()
    holder.kill()
    other.call(reap)
    snapshot = read_snapshot(namespace)
    assert (snapshot.active, len(snapshot.members)) == (0, 1)


def test_a_pid_that_went_to_a_younger_process_is_not_the_member() -> None:
    assert not lives_by_pid(os.getpid(), 1)
    assert lives_by_pid(os.getpid(), 1 << 62)
    assert not lives_by_pid(max(psutil.pids()) + 4711, 1 << 62)


def test_a_leaver_whose_alive_file_was_removed_does_not_remove_the_namespace_of_others(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    one, two = new_process(), new_process()
    (runtime_root / namespace / "alive.lock").unlink()
    two.kill()
    three = new_process()
    three.call(shut_down)
    one.call(acquire, "a")
    assert read_snapshot(namespace).active == 1, "the newcomer has the only lock on the new file, but is not the last"
    one.call(release)


def test_a_missing_segment_under_living_members_is_an_error_that_says_what_removes_such(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    member, newcomer = new_process(), new_process(attached=False)
    os.unlink(f"/dev/shm/{segment_name(runtime_root, namespace)}")
    with pytest.raises(SegmentLostError, match=r"RemoveIPC.*systemd-tmpfiles"):
        newcomer.call(attach, namespace=namespace, memory_source="booked")
    member.call(acquire, "a")
    member.call(release)
    member.call(shut_down)
    # With the last member the trouble has an end.
    newcomer.call(attach, namespace=namespace, memory_source="booked")


def test_a_relative_runtime_directory_is_the_same_after_a_change_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, "run")
    given = RuntimeDirectory("n", Path("given"))
    assert default_root() == tmp_path / "run"
    monkeypatch.chdir("/")
    assert default_root() == tmp_path / "run"
    assert given.path == tmp_path / "given" / "n"


def test_the_default_root_does_not_depend_on_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUNTIME_DIR_VARIABLE, raising=False)
    before = default_root()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert default_root() == before
    assert before.is_absolute()


def test_a_server_whose_lock_file_was_removed_ends_with_its_copy(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=100)
    with manager.model("a", LoadsServer("served")) as handle:
        pid = server_pid(handle)
    assert pid is not None
    os.unlink(room_for(None).life_path("served"))
    manager.release_model("b", manager.acquire_model("b", Loads()))
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert [copy.tag for copy in read_snapshot(namespace).instances] == ["b"]
