"""Files that vanish under living processes: a missing file does not mean that its process is dead."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from containers import as_root
from harness import (
    NewManager,
    NewProcess,
    Seat,
    acquire,
    attach,
    files_in,
    has_ended,
    open_descriptors,
    problems,
    release,
    segments_of,
    shut_down,
    stop_outside_of_transactions,
    stop_process,
    wait_until,
)
from loaders import Loads, LoadsServer
from patience import DEADLINE_S

from mpmm.cli import main
from mpmm.errors import RuntimeDirectoryError, SegmentLostError
from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared import server_pid
from mpmm.multi_process_shared.registry import registry_for
from mpmm.observability.findings import findings
from mpmm.shared_state.liveness import lives_by_pid
from mpmm.shared_state.lock_file import LockFile, identity_of, is_locked
from mpmm.shared_state.member_files import MemberFiles
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.removal import remove_deserted
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE, RuntimeDirectory, default_root
from mpmm.shared_state.segment import Segment, segment_name
from mpmm.shared_state.snapshot import find_lost_namespaces, read_snapshot

# Looked for among all segments of this machine, where other test processes have theirs.
VANISHING = f"vanishing-{os.getpid()}"


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


def test_a_process_that_has_ended_and_waits_to_be_reaped_is_dead() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not lives_by_pid(child, 1 << 62)
    os.waitpid(child, 0)


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


def test_a_namespace_whose_segment_was_removed_under_its_worker_is_not_removed_as_deserted(
    namespace: str, runtime_root: Path, new_manager: NewManager
) -> None:
    new_manager()
    os.unlink(f"/dev/shm/{segment_name(runtime_root, namespace)}")
    assert not remove_deserted(runtime_root, namespace)
    assert is_locked(runtime_root / namespace / "m0.lock")


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
    process = psutil.Process(pid)
    os.unlink(registry_for(None).life_path("served"))
    manager.release_model("b", manager.acquire_model("b", Loads()))
    wait_until(lambda: has_ended(process), "it has ended")
    assert [copy.tag for copy in read_snapshot(namespace).instances] == ["b"]


# ---- putting back ------------------------------------------------------------------------------------------------


def place(seat: Seat) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """Return name and identity of the segment that a process is in, and the identity of the lock that guards it."""
    namespace = seat.manager._connected().namespace
    return namespace.segment.name, namespace.segment.identity, namespace.lock._file.identity


def all_is_back(namespace: str) -> bool:
    """Tell whether everything is where it was, or is there again."""
    try:
        return read_snapshot(namespace).missing_files == ()
    except FileNotFoundError:
        return False


def leads(seat: Seat) -> bool:
    """Tell whether the process takes itself for the leader."""
    return bool(seat.manager._connected().leader.leading)


def transact(seat: Seat, count: int) -> None:
    """Take the segment's lock again and again."""
    namespace = seat.manager._connected().namespace
    for _ in range(count):
        with namespace.transaction():
            pass


def test_nobody_leads_by_a_lock_file_that_another_one_has_replaced(
    namespace: str, runtime_root: Path, new_manager: NewManager
) -> None:
    leader = new_manager()._connected().leader
    new = runtime_root / "new.lock"
    # Another process leads by the new file, and none by the old one. There is no moment without such a file, in which
    # the background thread would put it back.
    other = LockFile(new)
    assert other.try_exclusive()
    new.rename(runtime_root / namespace / "leader.lock")
    leader.leading = False
    leader._lock_file.unlock()
    leader.lead_if_free()
    assert not leader.leading
    other.close()
    wait_until(lambda: leader.leading, "it leads by the new file")


@contextmanager
def joining(namespace: str) -> Iterator[Namespace]:
    """Be a member for the length of a `with` block."""
    joined = Namespace.join(namespace)
    try:
        yield joined
    finally:
        joined.leave()


def test_a_file_is_missed_that_a_living_member_holds_and_none_of_a_dead_one(namespace: str, runtime_root: Path) -> None:
    def die_as_member() -> bool:
        Namespace.join(namespace)
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    with joining(namespace) as joined:
        child = os.fork()
        if child == 0:
            os._exit(1 - in_child(die_as_member))
        os.waitpid(child, 0)
        assert [member.alive for member in read_snapshot(namespace).members] == [True, False]
        (runtime_root / namespace / "m1.lock").unlink()
        assert read_snapshot(namespace).missing_files == ()
        Path(joined.member_lock_path(joined.slot)).unlink()
        assert read_snapshot(namespace).missing_files == ("m0.lock",)


@pytest.mark.parametrize("gone", ["segment", "alive.lock", "folder"])
def test_a_process_begins_to_join_anew_if_what_it_has_joined_is_removed_meanwhile(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    is_in_place = MemberFiles.is_in_place
    looks: list[bool] = []

    def look_after_removal(files: MemberFiles) -> bool:
        if not looks:
            if gone == "segment":
                os.unlink(files._segment.path)
            elif gone == "folder":
                shutil.rmtree(runtime_root / namespace)
            else:
                (runtime_root / namespace / gone).unlink()
        looks.append(is_in_place(files))
        return looks[-1]

    monkeypatch.setattr(MemberFiles, "is_in_place", look_after_removal)
    with joining(namespace) as joined:
        assert looks == [False, True]
        assert [member.pid for member in read_snapshot(namespace).members] == [os.getpid()]
        assert read_snapshot(namespace).missing_files == ()
        assert joined.segment.is_current()


@pytest.mark.parametrize("name", ["alive.lock", "m0.lock", "token", "leader.lock"])
def test_members_put_back_what_was_removed_of_the_folder(
    namespace: str, runtime_root: Path, new_process: NewProcess, name: str
) -> None:
    one, two = new_process(), new_process()
    path = runtime_root / namespace / name
    token = (runtime_root / namespace / "token").read_text()
    # So that none of them puts it back before we look.
    for process in (one, two):
        stop_outside_of_transactions(process, namespace)
    path.unlink()
    if name != "leader.lock":
        assert any(name in finding.text and finding.urgent for finding in findings(read_snapshot(namespace)))
    for process in (one, two):
        process.resume()
    wait_until(path.exists, f"{name} is there again")
    wait_until(lambda: read_snapshot(namespace).files_put_back == 1, "somebody says so")
    snapshot = read_snapshot(namespace)
    assert snapshot.missing_files == ()
    assert (runtime_root / namespace / "token").read_text() == token
    assert is_locked(runtime_root / namespace / "m0.lock")
    assert is_locked(runtime_root / namespace / "leader.lock")
    three = new_process()
    assert [process.call(leads) for process in (one, two, three)].count(True) == 1
    assert one.call(place) == two.call(place) == three.call(place)
    assert problems(namespace) == []


def test_however_often_files_are_removed_a_member_has_no_more_of_them_open(namespace: str, runtime_root: Path) -> None:
    member = Namespace.join(namespace)
    before = len(open_descriptors())
    for _ in range(3):
        for name in ("alive.lock", f"m{member.slot}.lock"):
            (runtime_root / namespace / name).unlink()
        member._files.put_back()
        assert is_locked(member.member_lock_path(member.slot))
        assert member.find_dead_members() == []
    assert len(open_descriptors()) == before
    member.leave()


def test_a_lock_file_that_somebody_else_has_put_there_is_taken_and_not_counted(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    one = new_process()
    path = runtime_root / namespace / "leader.lock"
    other = path.with_name("other")
    other.touch(mode=0o600)
    os.replace(other, path)
    wait_until(lambda: is_locked(path), "the leader has the new one")
    wait_until(lambda: one.call(leads), "it leads")
    assert read_snapshot(namespace).files_put_back == 0


def test_a_leader_whose_lock_was_removed_makes_way_for_the_one_who_has_the_new_one(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    one = new_process()
    path = runtime_root / namespace / "leader.lock"
    path.unlink()
    usurper = LockFile(path)
    assert usurper.try_exclusive()
    wait_until(lambda: not one.call(leads), "the old one notices")
    usurper.close()
    wait_until(lambda: one.call(leads), "the lead is free")


def test_a_lock_that_becomes_another_one_gives_up_what_it_was_and_has_what_that_had(tmp_path: Path) -> None:
    before, after = tmp_path / "before.lock", tmp_path / "after.lock"
    lock, other = LockFile(before), LockFile(after)
    assert lock.try_exclusive() and other.try_exclusive()
    lock.become(other)
    assert not is_locked(before)
    other.close()
    assert is_locked(after), "the other one has nothing to give up any more"
    lock.close()
    assert not is_locked(after)


def test_a_file_that_was_put_into_the_place_of_a_members_lock_says_nothing_about_it(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    holder, other = new_process(), new_process()
    holder.call(acquire, "a")
    stop_process(holder.pid)
    for path in (runtime_root / namespace).glob("m*.lock"):
        shutil.copy(path, f"{path}.copy")
        os.replace(f"{path}.copy", path)
    assert other.call(reap) == 0
    os.kill(holder.pid, signal.SIGCONT)
    wait_until(lambda: read_snapshot(namespace).missing_files == (), "both have their own again")
    assert read_snapshot(namespace).active == 1


def empty(root: Path, namespace: str) -> None:
    """Remove all files of a namespace, but not the folder."""
    for path in (root / namespace).iterdir():
        path.unlink()


def remove_folder(root: Path, namespace: str) -> None:
    """Remove a namespace's folder."""
    shutil.rmtree(root / namespace)


def rename_folder(root: Path, namespace: str) -> None:
    """Take a namespace's folder elsewhere."""
    os.rename(root / namespace, root / "elsewhere")


def remove_root(root: Path, namespace: str) -> None:
    """Remove the folder of all namespaces."""
    shutil.rmtree(root)


def rename_root(root: Path, namespace: str) -> None:
    """Take the folder of all namespaces elsewhere."""
    os.rename(root, f"{root}.old")


@pytest.fixture
def root_in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A root that is made when it is needed, and nothing of which may be left."""
    root = Path(tempfile.mkdtemp(prefix="mpmm-t")) / "run"
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(root))
    before = set(os.listdir("/dev/shm"))
    yield root
    try:
        assert not root.exists()
        assert [name for name in set(os.listdir("/dev/shm")) - before if name.endswith(f"-{VANISHING}")] == []
    finally:
        shutil.rmtree(root.parent)


@pytest.mark.parametrize("change", [empty, remove_folder, rename_folder, remove_root, rename_root])
@pytest.mark.parametrize("who", ["the newcomer heals", "the members heal"])
def test_newcomers_come_to_the_one_segment_whatever_was_removed(
    root_in_folder: Path, new_process: NewProcess, change: Callable[[Path, str], None], who: str
) -> None:
    members = [new_process(namespace=VANISHING) for _ in range(2)]
    members[0].call(acquire, "a")
    _, segment, lock = members[0].call(place)
    stopped = members if who == "the newcomer heals" else []
    for member in stopped:
        stop_process(member.pid)
    change(root_in_folder, VANISHING)
    if not stopped:
        wait_until(lambda: all_is_back(VANISHING), "all is back")
    newcomer = new_process(namespace=VANISHING)
    name, *found = newcomer.call(place)
    assert found == [segment, lock], "there are two segments, or two locks"
    assert name == segment_name(root_in_folder, VANISHING)
    assert read_snapshot(VANISHING).active == 1
    for member in stopped:
        os.kill(member.pid, signal.SIGCONT)
    everybody = [*members, newcomer]
    for process in everybody:
        process.send(transact, 200)
    for process in everybody:
        process.result()
    wait_until(lambda: all_is_back(VANISHING), "all is back")
    shutil.rmtree(root_in_folder / "elsewhere", ignore_errors=True)
    # One that could not look for the segment because another one did, looks again a second later.
    wait_until(lambda: [process.call(place)[0] for process in everybody] == 3 * [name], "all know its name")
    assert problems(VANISHING) == []
    members[0].call(release)
    for process in everybody:
        process.call(shut_down)


def look_for_no_segment(seat: Seat) -> None:
    """Be one that cannot look for the segment, each time because another one does."""
    MemberFiles._look_for_segment = lambda self, found: None  # type: ignore[method-assign]  # in this process alone


def test_the_last_one_removes_the_segment_that_another_one_has_renamed(
    root_in_folder: Path, new_process: NewProcess
) -> None:
    last, healer = new_process(namespace=VANISHING), new_process(namespace=VANISHING)
    last.call(look_for_no_segment)
    old, *_ = healer.call(place)
    remove_root(root_in_folder, VANISHING)
    wait_until(lambda: healer.call(place)[0] != old, "the segment has the name of the new root")
    healer.call(shut_down)
    assert last.call(place)[0] == old
    last.call(shut_down)
    # The fixture looks for what is left.


def test_a_newcomer_puts_back_what_is_removed_while_it_joins(
    namespace: str, runtime_root: Path, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = Namespace.join

    def join_before_a_cleaner_comes(*args: Any, **kwargs: Any) -> Namespace:
        joined = join(*args, **kwargs)
        shutil.rmtree(runtime_root / namespace)
        return joined

    monkeypatch.setattr(Namespace, "join", join_before_a_cleaner_comes)
    manager = new_manager()
    with manager.model("a", Loads()):
        assert (runtime_root / namespace / "leader.lock").exists()
    monkeypatch.undo()
    with new_manager().model("a", Loads()):
        pass
    assert len(read_snapshot(namespace).members) == 1
    assert problems(namespace) == []


def test_the_last_leaver_removes_what_has_moved(root_in_folder: Path, new_process: NewProcess) -> None:
    member = new_process(namespace=VANISHING)
    stop_process(member.pid)
    shutil.rmtree(root_in_folder)
    os.kill(member.pid, signal.SIGCONT)
    member.call(shut_down)


def test_a_lost_segment_is_shown_by_inspect(
    namespace: str, runtime_root: Path, new_process: NewProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    member = new_process()
    os.unlink(f"/dev/shm/{segment_name(runtime_root, namespace)}")
    assert find_lost_namespaces() == [namespace]
    assert main(["inspect"]) != 0
    said = capsys.readouterr()
    assert "RemoveIPC" in said.out + said.err
    member.call(shut_down)
    assert find_lost_namespaces() == []


# ---- joining while a process leaves, with two lifecycle locks ----------------------------------------------------


@pytest.mark.parametrize("point", ["unlink", "remove"])
def test_nobody_joins_what_is_being_removed_though_the_lifecycle_lock_was_removed(
    namespace: str, runtime_root: Path, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    newcomer = new_process(attached=False)
    leaver = Namespace.join(namespace)
    closed = leaver.segment.identity

    def newcomer_comes() -> None:
        for name in ("lifecycle.lock", "alive.lock"):
            (runtime_root / namespace / name).unlink()
        newcomer.call(attach, namespace=namespace, memory_source="booked")

    real_unlink, real_remove = Segment.unlink, RuntimeDirectory.remove

    def unlink(segment: Segment) -> None:
        if point == "unlink":
            newcomer_comes()
        real_unlink(segment)

    def remove(runtime: RuntimeDirectory, identity: tuple[int, int] | None = None) -> None:
        if point == "remove":
            newcomer_comes()
        real_remove(runtime, identity)

    with monkeypatch.context() as patched:
        patched.setattr(Segment, "unlink", unlink)
        patched.setattr(RuntimeDirectory, "remove", remove)
        leaver.leave()
    name, segment, _ = newcomer.call(place)
    assert segment != closed
    assert identity_of(f"/dev/shm/{name}") == segment, "the leaver has removed what the newcomer had made"
    wait_until(lambda: all_is_back(namespace), "the folder is back")
    newcomer.call(acquire, "a")
    assert read_snapshot(namespace).active == 1
    newcomer.call(release)


def test_only_the_folder_that_is_meant_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RuntimeDirectory("n", tmp_path / "run")
    runtime.ensure()
    meant = identity_of(runtime.path)
    assert meant is not None
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source == runtime.path:
            # Another process is faster: it removes the folder, and a newcomer makes one.
            real(runtime.path, tmp_path / "first")
            runtime.ensure()
            runtime.file("of a newcomer").touch()
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    runtime.remove(meant)
    assert runtime.file("of a newcomer").exists()


def test_a_cleaner_that_heeds_locks_of_folders_keeps_away_as_long_as_a_member_lives(
    namespace: str, runtime_root: Path
) -> None:
    """As systemd-tmpfiles does."""
    joined = Namespace.join(namespace)
    for folder in (runtime_root, runtime_root / namespace):
        with closing(LockFile(folder, folder=True)) as cleaner:
            assert not cleaner.try_exclusive()
    joined.leave()
    with closing(LockFile(runtime_root, folder=True)) as cleaner:
        assert cleaner.try_exclusive()


def test_a_token_that_says_nothing_is_made_anew(
    namespace: str, runtime_root: Path, new_process: NewProcess, new_manager: NewManager
) -> None:
    token = runtime_root / namespace / "token"
    token.parent.mkdir(mode=0o700)
    token.write_text("no number")
    new_process().call(acquire, "a")
    assert int(token.read_text(), 16) >= 0
    new_manager()
    assert len(read_snapshot(namespace).members) == 2


def test_a_segment_takes_no_name_that_another_one_has(runtime_root: Path) -> None:
    one, other = (Namespace.join(name) for name in ("one", "other"))
    assert not one.segment.rename(other.segment.name)
    assert {segment.name for segment in (one.segment, other.segment)} == segments_of(runtime_root)
    assert one.segment.rename(one.segment.name)
    for namespace in (one, other):
        namespace.leave()


def test_only_the_segment_that_is_meant_is_removed(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = Namespace.join(namespace)
    path, real = joined.segment.path, os.rename

    def rename(source: str, target: str) -> None:
        if source == path:
            real(path, f"{path}.first")
            Path(path).write_text("of a newcomer")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        joined.segment.unlink()
    assert Path(path).read_text() == "of a newcomer"
    os.unlink(path)
    os.unlink(f"{path}.first")
    joined.leave()


@pytest.mark.parametrize("made_by", ["mpmm", "an administrator"])
def test_a_root_is_removed_by_mpmm_only_if_mpmm_has_made_it(tmp_path: Path, made_by: str) -> None:
    root = tmp_path / "run"
    if made_by != "mpmm":
        root.mkdir(mode=0o700)
    ModelManager(namespace="n", runtime_root=root, memory_source="booked").acquire_model("a", lambda: "a handle")
    assert root.exists()
    from mpmm.model_manager.attachment import _close_at_exit

    _close_at_exit(root, "n")
    assert root.exists() == (made_by != "mpmm")
    assert files_in(root) == []


# ---- keeping cleaners away ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="there is no systemd-tmpfiles")
def test_the_real_cleaner_leaves_alone_what_a_member_holds(
    root_in_folder: Path, new_process: NewProcess, tmp_path: Path
) -> None:
    # Age 0: everything that can be removed is.
    (tmp_path / "clean.conf").write_text(f"e {root_in_folder.parent} - - - 0\n")

    def clean() -> None:
        command = ["systemd-tmpfiles", "--clean", str(tmp_path / "clean.conf")]
        subprocess.run(command, check=True, capture_output=True, timeout=20)

    member = new_process(namespace=VANISHING)
    files = files_in(root_in_folder)
    assert f"{VANISHING}/alive.lock" in files
    clean()
    assert files_in(root_in_folder) == files
    assert read_snapshot(VANISHING).files_put_back == 0
    member.call(shut_down)
    root_in_folder.mkdir(mode=0o700)
    (root_in_folder / "x").mkdir()
    (root_in_folder / "x" / "alive.lock").touch()
    clean()
    assert files_in(root_in_folder) == [], "the cleaner would have come by"


def test_files_are_touched(namespace: str, runtime_root: Path) -> None:
    joined = Namespace.join(namespace)
    for path in (runtime_root / namespace).iterdir():
        os.utime(path, (1, 1))
    joined._files._touch_due = joined._files._look_due = 0.0
    lead = LockFile(joined.runtime.file("leader.lock"))
    assert joined.look_after_files(lead, False) is False
    assert all(os.stat(path).st_mtime > 1 for path in (runtime_root / namespace).iterdir())
    lead.close()
    joined.leave()


# ---- where locks cannot be had -----------------------------------------------------------------------------------


def test_a_umask_that_denies_everything_keeps_nobody_out(tmp_path: Path) -> None:
    root = Path(tempfile.mkdtemp(prefix="mpmm-t"))
    # Root may open everything, so this must be another user.
    somebody = 65534 if os.getuid() == 0 else os.getuid()
    os.chown(root, somebody, -1)

    def be_two_members() -> bool:
        os.setuid(somebody)
        os.umask(0o777)
        joined = Namespace.join("n", root=root / "run")
        child = os.fork()
        if child == 0:
            os._exit(1 - in_child(joins_as_second))
        good = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        joined.leave()
        return good and list(root.iterdir()) == []

    def joins_as_second() -> bool:
        joined = Namespace.join("n", root=root / "run")
        joined.leave()
        return joined.slot == 1

    try:
        child = os.fork()
        if child == 0:
            os._exit(1 - in_child(be_two_members))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        shutil.rmtree(root)


def in_child(action: Callable[[], bool]) -> bool:
    """Return what `action` returns; say why if it fails."""
    try:
        return action()
    except BaseException:
        traceback.print_exc()
        return False


def test_lock_files_are_private_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        LockFile(tmp_path / "a.lock").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "a.lock").st_mode) == 0o600


def test_a_lock_file_that_others_may_use_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    path.touch()
    path.chmod(0o660)
    LockFile(path).close()
    assert not is_locked(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


@as_root
def test_a_look_at_a_lock_changes_nothing_of_its_file(tmp_path: Path) -> None:
    """Only root can look at such a file, as its owner would have to change its mode first."""
    path = tmp_path / "a.lock"
    path.touch()
    path.chmod(0o400)
    assert not is_locked(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    LockFile(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("error", [38, 37, 95], ids=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_an_error_that_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(fd: int, **_: object) -> bool:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("filelock.lock_descriptor", refuse)
    with pytest.raises(RuntimeDirectoryError, match=r"refuses locks.*NFS.*MPMM_RUNTIME_DIR") as caught:
        ModelManager(namespace="n", runtime_root=tmp_path / "run", memory_source="booked").acquire_model("a", str)
    assert str(tmp_path / "run" / "n") in str(caught.value)
    assert segments_of(tmp_path / "run") == set()


def test_a_segment_that_the_last_one_removes_as_it_leaves_is_not_lost(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager()
    looks, outcomes = threading.Event(), []
    remove, sleep = RuntimeDirectory.remove, time.sleep

    def look() -> None:
        with pytest.raises(FileNotFoundError) as error:
            read_snapshot(namespace)
        outcomes.append(error.type)

    def sleep_and_tell(seconds: float) -> None:
        looks.set()
        sleep(seconds)

    def remove_while_somebody_looks(runtime: RuntimeDirectory, identity: tuple[int, int]) -> None:
        monkeypatch.setattr("mpmm.shared_state.snapshot.read.time.sleep", sleep_and_tell)
        reader = threading.Thread(target=look)
        reader.start()
        # It has found no segment, and a member that lives: the one that leaves.
        assert looks.wait(DEADLINE_S)
        remove(runtime, identity)
        reader.join()

    monkeypatch.setattr(RuntimeDirectory, "remove", remove_while_somebody_looks)
    manager.shutdown()
    assert outcomes == [FileNotFoundError]
    assert find_lost_namespaces() == []


@pytest.mark.parametrize("happens", ["it comes back", "its members leave", "nothing"])
def test_a_segment_is_lost_only_if_the_second_look_says_so_too(
    namespace: str, runtime_root: Path, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, happens: str
) -> None:
    manager = new_manager()
    segment = Path("/dev/shm", segment_name(runtime_root, namespace))
    aside = segment.with_name(f"{segment.name}.aside")
    manager._connected()
    segment.rename(aside)

    def look(path: Path) -> bool:
        """Ask whether a process joins or leaves, between the two looks for the segment."""
        if path.name == "lifecycle.lock" and happens != "nothing":
            aside.rename(segment)
            if happens == "its members leave":
                manager.shutdown()
        return is_locked(path)

    monkeypatch.setattr("mpmm.shared_state.snapshot.read.is_locked", look)
    expected = SegmentLostError if happens == "nothing" else FileNotFoundError
    with pytest.raises(expected) as caught:
        read_snapshot(namespace)
    assert caught.type is expected
    if happens == "nothing":
        aside.rename(segment)
