"""The files that a member holds: how often it looks after them, what it puts back, what it says, and when it stops."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_lab import run_in_child
from harness import open_descriptors, segments_of

from mpmm.errors import ClosedError, LockTimeoutError
from mpmm.shared_state import member_files
from mpmm.shared_state.layout import Header, Member
from mpmm.shared_state.lock_file import LockFile, identity_of, is_locked, is_locked_as
from mpmm.shared_state.member_files import MemberFiles
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.segment import segment_name

PUT_BACK = "something has removed {files} of {folder} under pid {pid}, which has put it back"


class Clock:
    """A clock that stands still."""

    now = 5000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the looks."""
    made = Clock()
    monkeypatch.setattr(member_files, "time", made)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root that may be removed."""
    return tmp_path / "run"


@pytest.fixture
def member(root: Path, clock: Clock) -> Iterator[Namespace]:
    """A worker, in slot 0."""
    joined = Namespace.join("n", root=root)
    segment = joined.segment
    yield joined
    joined.leave()
    assert not os.path.exists(segment.path)
    assert not root.exists()


@pytest.fixture
def lead(member: Namespace) -> Iterator[LockFile]:
    """The leader's lock, not taken yet."""
    lock = member.open_lock_file("leader.lock")
    yield lock
    lock.close()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Returns what was said since the last time."""

    def take() -> list[str]:
        texts = [record.getMessage().partition(": ")[2] for record in caplog.records if record.levelno > logging.INFO]
        caplog.clear()
        return texts

    return take


def folder_of(member: Namespace) -> Path:
    """Return the folder of its namespace."""
    return member.runtime.path


def put_back(member: Namespace, *files: str) -> list[str]:
    """Return what a member says that has put files back."""
    text = PUT_BACK.format(files=", ".join(files), folder=folder_of(member), pid=os.getpid())
    return [f"{text}; keep cleaners away from this folder, or set MPMM_RUNTIME_DIR to one that no cleaner touches"]


Said = Callable[[], list[str]]


# ---- how often ---------------------------------------------------------------------------------------------------


def test_a_member_looks_once_a_second(member: Namespace, lead: LockFile, clock: Clock) -> None:
    token = folder_of(member) / "token"
    began = clock.now
    looked = {1.0, 2.5, 3.5}
    for later_s in (0.0, 0.9, 1.0, 1.9, 2.5, 3.4, 3.5):
        token.unlink(missing_ok=True)
        clock.now = began + later_s
        assert member.look_after_files(lead, False) is False
        assert token.exists() is (later_s in looked), later_s
    token.unlink(missing_ok=True)
    member._files.put_back()


def test_a_member_touches_all_files_below_the_root_once_an_hour(
    member: Namespace, lead: LockFile, clock: Clock, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.touch()
    other = member.runtime.root / "other"
    other.mkdir()
    (other / "file").touch()
    (other / "link").symlink_to(outside)
    touched = [member.runtime.root, folder_of(member), *folder_of(member).iterdir(), other, *other.iterdir()]
    began = clock.now
    for later_s, touches in ((3599.0, False), (3600.0, True), (7199.0, False), (7200.0, True)):
        for path in (*touched, outside):
            os.utime(path, (1, 1), follow_symlinks=False)
        clock.now = began + later_s
        member.look_after_files(lead, False)
        assert [path for path in touched if (path.lstat().st_mtime > 1) is not touches] == [], later_s
        assert outside.stat().st_mtime == 1
    shutil.rmtree(other)


def are_held(member: Namespace) -> bool:
    """Tell whether a cleaner that heeds locks keeps away from root and folder."""
    cleaners = [LockFile(folder, folder=True) for folder in (member.runtime.root, folder_of(member))]
    taken = [cleaner.try_exclusive() for cleaner in cleaners]
    for cleaner in cleaners:
        cleaner.close()
    return not any(taken)


# ---- what is put back --------------------------------------------------------------------------------------------


def test_a_newcomer_would_find_the_same_while_everything_is_in_place(member: Namespace, tmp_path: Path) -> None:
    files = member._files
    assert files.is_in_place() is True
    assert are_held(member)
    assert files.folder_identity == identity_of(folder_of(member))
    aside = tmp_path / "aside"
    for path in (Path(member.segment.path), folder_of(member) / "alive.lock", folder_of(member), member.runtime.root):
        there = aside if path.parent != Path("/dev/shm") else path.with_name(f"{path.name}.aside")
        path.rename(there)
        assert files.is_in_place() is False, path
        there.rename(path)
        assert files.is_in_place() is True


@pytest.mark.parametrize("kind", [Member.SERVER, Member.GUEST])
def test_a_member_that_is_no_worker_needs_no_lock_on_alive(member: Namespace, kind: int) -> None:
    guest = Namespace.join("n", root=member.runtime.root, kind=kind)
    (folder_of(member) / "alive.lock").unlink()
    assert guest._files.is_in_place() is True
    guest._files.put_back()
    assert not (folder_of(member) / "alive.lock").exists()
    (folder_of(member) / "token").unlink()
    guest._files.put_back()
    assert (folder_of(member) / "token").exists()
    guest.leave()
    member._files.put_back()


@pytest.mark.parametrize("gone", [(), ("token",), ("alive.lock",), ("m0.lock",), ("token", "alive.lock", "m0.lock")])
def test_what_was_removed_is_put_back_counted_and_told_once(
    member: Namespace, said: Said, gone: tuple[str, ...]
) -> None:
    folder = folder_of(member)
    token = (folder / "token").read_text()
    for name in gone:
        (folder / name).unlink()
    for _ in range(2):
        member._files.put_back()
    assert said() == (put_back(member, *gone) if gone else [])
    assert member.segment.words[Header.PUT_BACK] == len(gone)
    assert (folder / "token").read_text() == token
    assert member._files.is_in_place() is True
    inode = os.stat(folder / "m0.lock").st_ino
    assert member.segment.words[member.tables.member(0) + Member.LOCK] == inode
    assert is_locked_as(folder / "m0.lock", inode) is True
    alive = LockFile(folder / "alive.lock")
    assert (alive.try_exclusive(), alive.try_shared()) == (False, True)
    alive.close()


@pytest.mark.parametrize("name", ["alive.lock", "m0.lock"])
def test_the_lock_on_a_removed_file_is_given_up_once_there_is_the_one_on_the_new_file(
    member: Namespace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_of(member) / name
    old = os.open(path, os.O_RDWR)
    path.unlink()
    before, close = open_descriptors(), LockFile.close
    is_free: list[bool] = []

    def look_and_close(file: LockFile) -> None:
        if file.path == path and not is_free:
            is_free.append(False)
            other = LockFile(path)
            is_free[0] = other.try_exclusive()
            other.close()
        close(file)

    monkeypatch.setattr(LockFile, "close", look_and_close)
    member._files.put_back()
    assert is_free == [False]
    assert len(open_descriptors()) == len(before)
    fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if name == "m0.lock":
        assert os.fstat(member.life_fd).st_ino == path.stat().st_ino
    os.close(old)


@pytest.mark.parametrize("held", [False, True])
def test_a_new_file_for_alive_that_another_worker_has_made_is_shared_and_not_counted(
    member: Namespace, said: Said, held: bool
) -> None:
    path = folder_of(member) / "alive.lock"
    path.unlink()
    other = LockFile(path)
    if held:
        # By one that looks whether it is the last.
        assert other.try_exclusive()
        member._files.put_back()
        assert member._files.is_in_place() is False
        other.unlock()
    member._files.put_back()
    assert member._files.is_in_place() is True
    assert (other.try_exclusive(), other.try_shared()) == (False, True)
    other.close()
    assert said() == []
    assert member.segment.words[Header.PUT_BACK] == 0


def test_a_row_that_names_another_file_is_set_right(member: Namespace, said: Said) -> None:
    words, at = member.segment.words, member.tables.member(0) + Member.LOCK
    inode = words[at]
    words[at] = 7
    member._files.put_back()
    assert (words[at], said(), words[Header.PUT_BACK]) == (inode, [], 0)


def test_a_file_that_cannot_be_locked_is_put_back_the_next_time(
    member: Namespace, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_of(member) / "m0.lock"
    path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(LockFile, "try_exclusive", lambda lock: False)
        member._files.put_back()
    assert not path.exists()
    member._files.put_back()
    assert is_locked(path)
    assert said() == put_back(member, "m0.lock")


def test_what_is_in_the_place_of_a_members_own_lock_is_replaced(member: Namespace, said: Said) -> None:
    path = folder_of(member) / "m0.lock"
    path.unlink()
    other = LockFile(path)
    assert other.try_exclusive()
    member._files.put_back()
    assert other.is_replaced()
    other.close()
    assert is_locked(path)
    assert said() == put_back(member, "m0.lock")


def test_a_folder_that_was_removed_is_made_again_and_held(member: Namespace, said: Said) -> None:
    folder = folder_of(member)
    old = os.open(folder, os.O_RDONLY)
    shutil.rmtree(folder)
    member._files.put_back()
    member._files.put_back()
    assert said() == put_back(member, "the folder", "token", "alive.lock", "m0.lock")
    assert member.segment.words[Header.PUT_BACK] == 4
    assert member._files.is_in_place() is True
    assert member._files.folder_identity == identity_of(folder)
    fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(old)
    assert are_held(member)
    assert not (folder / "lifecycle.lock").exists(), "the segment was where it belongs"


def test_a_folder_that_another_member_has_made_again_is_held_and_not_counted(member: Namespace, said: Said) -> None:
    folder = folder_of(member)
    folder.rename(folder.with_name("aside"))
    shutil.copytree(folder.with_name("aside"), folder)
    member._files.put_back()
    assert said() == put_back(member, "m0.lock"), "which is its own"
    assert member._files.folder_identity == identity_of(folder)
    shutil.rmtree(folder.with_name("aside"))


def test_a_folder_that_a_cleaner_had_locked_is_held_as_soon_as_it_can_be(root: Path, clock: Clock) -> None:
    root.mkdir(mode=0o1700)
    root.chmod(0o1700)
    cleaner = LockFile(root, folder=True)
    assert cleaner.try_exclusive()
    member = Namespace.join("n", root=root)
    cleaner.unlock()
    assert cleaner.try_exclusive()
    cleaner.unlock()
    member._files.put_back()
    assert are_held(member)
    cleaner.close()
    member.leave()


# ---- the segment and the root ------------------------------------------------------------------------------------


def test_a_root_that_was_removed_is_made_again_and_the_segment_gets_its_name(member: Namespace, said: Said) -> None:
    old = member.segment.name
    shutil.rmtree(member.runtime.root)
    member._files.put_back()
    member._files.put_back()
    files = ("the folder", "the root of the runtime directories", "token", "alive.lock", "m0.lock")
    assert said() == put_back(member, *files)
    assert member.segment.name == segment_name(member.runtime.root, "n") != old
    assert segments_of(member.runtime.root) == {member.segment.name}
    assert not os.path.exists(f"/dev/shm/{old}")
    assert member._files.is_in_place() is True


def test_the_segment_gets_its_name_when_the_lifecycle_lock_is_free(member: Namespace, said: Said) -> None:
    old = member.segment.name
    shutil.rmtree(member.runtime.root)
    member.runtime.ensure()
    newcomer = LockFile(member.runtime.file("lifecycle.lock"))
    assert newcomer.try_exclusive()
    member._files.put_back()
    assert member.segment.name == old
    assert said() == put_back(member, "token", "alive.lock", "m0.lock")
    newcomer.close()
    member._files.put_back()
    assert member.segment.name == segment_name(member.runtime.root, "n") != old
    assert said() == put_back(member, "the root of the runtime directories")
    member._files.put_back()
    assert said() == []


def test_the_segment_gets_its_name_although_the_folder_is_removed_again_meanwhile(member: Namespace) -> None:
    old = member.segment.name
    shutil.rmtree(member.runtime.root)
    member.runtime.ensure()
    newcomer = LockFile(member.runtime.file("lifecycle.lock"))
    assert newcomer.try_exclusive()
    member._files.put_back()
    newcomer.close()
    shutil.rmtree(folder_of(member))
    member._files.put_back()
    assert member.segment.name == segment_name(member.runtime.root, "n") != old


def test_one_of_several_members_renames_the_segment(member: Namespace, said: Said) -> None:
    other = Namespace.join("n", root=member.runtime.root)
    shutil.rmtree(member.runtime.root)
    member._files.put_back()
    assert len(said()) == 1
    other._files.put_back()
    [text] = said()
    assert "the root of the runtime directories, m1.lock of" in text
    assert other.segment.name == member.segment.name
    assert other._files.is_in_place() is True
    other.leave()


def test_a_lost_segment_is_told_once_each_time_it_is_lost(member: Namespace, said: Said) -> None:
    name = member.segment.name
    aside = Path(f"/dev/shm/{name}.aside")
    for _ in range(2):
        os.rename(member.segment.path, aside)
        member._files.put_back()
        member._files.put_back()
        [text] = said()
        assert text.startswith(
            f"pid {os.getpid()} continues, but no process can join it: namespace 'n' is in use, but "
        )
        assert f"its segment {member.segment.path} is gone" in text
        assert member.segment.words[Header.PUT_BACK] == 0
        os.rename(aside, member.segment.path)
        # Only a look finds out, and nothing makes it look for a segment that is there.
        member._files._root_changed = True
        member._files.put_back()
        assert said() == []


# ---- when it cannot, and when it does not ------------------------------------------------------------------------


def test_a_failure_is_told_once_each_time_it_begins(member: Namespace, said: Said) -> None:
    folder, aside = folder_of(member), member.runtime.root / "aside"
    for _ in range(2):
        folder.rename(aside)
        folder.symlink_to(aside)
        for _again in range(2):
            member._files.put_back()
        [text] = said()
        assert text.startswith(f"cannot put back what was removed of {folder}: the runtime directory {folder} is not a")
        folder.unlink()
        aside.rename(folder)
        member._files.put_back()
        assert said() == []


def test_what_was_put_back_before_a_failure_is_told(
    member: Namespace, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(files: MemberFiles, found: list[str]) -> None:
        raise LockTimeoutError("no", path="p", timeout_seconds=1.0, holder_pid=None)

    (folder_of(member) / "token").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(MemberFiles, "_put_life_back", refuse)
        member._files.put_back()
    failed = [f"cannot put back what was removed of {folder_of(member)}: no"]
    assert said() == failed + put_back(member, "token")


@pytest.mark.parametrize("why", ["the namespace is closed", "it gives up"])
def test_nothing_is_put_back_by_one_that_leaves(member: Namespace, lead: LockFile, clock: Clock, why: str) -> None:
    token = folder_of(member) / "token"
    token.unlink()
    lead.path.unlink()
    if why == "the namespace is closed":
        member.segment.words[Header.CLOSED] = Header.IS_CLOSED
    else:
        member._files.give_up()
    for leading in (True, False):
        clock.now += 10.0
        assert member.look_after_files(lead, leading) is leading
    assert not token.exists()
    assert not lead.path.exists()
    member.segment.words[Header.CLOSED] = 0


def test_nothing_is_put_back_by_one_that_has_closed_its_files_or_is_a_child(member: Namespace) -> None:
    token = folder_of(member) / "token"
    token.unlink()
    assert run_in_child(member._files.put_back) == 0
    assert not token.exists()
    other = Namespace.join("n", root=member.runtime.root)
    assert token.exists()
    token.unlink()
    files = other._files
    files.close()
    files.put_back()
    assert not token.exists()
    other._detach()


def test_a_child_closes_what_its_parent_holds_without_giving_it_up(member: Namespace) -> None:
    (folder_of(member) / "m0.lock").unlink()
    member._files.put_back()

    def look() -> None:
        assert not [one for one in open_descriptors() if f"{folder_of(member)}" in one or "m0.lock" in one]

    assert run_in_child(look) == 0
    assert is_locked(folder_of(member) / "m0.lock")
    assert member._files.is_in_place() is True
    assert are_held(member)


def test_files_can_be_forgotten_without_giving_up_the_locks(member: Namespace) -> None:
    """As in a child that inherited them, and closes its own descriptors alone."""
    before = open_descriptors()
    other = Namespace.join("n", root=member.runtime.root)
    path = folder_of(other) / "m1.lock"
    old = os.open(path, os.O_RDWR)
    inherited = os.dup(other.life_fd)
    other.forget_after_fork()
    other.segment.close()
    with pytest.raises(BlockingIOError):
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(old)
    os.close(inherited)
    assert open_descriptors() == before


def test_one_that_has_no_row_yet_has_no_lock_to_put_back(member: Namespace, said: Said) -> None:
    files = MemberFiles(member.runtime, member.segment, member.tables, member.lock, None)
    with pytest.raises(ClosedError, match="has left the namespace 'n'"):
        _ = files.life_fd
    files.put_back()
    assert said() == []
    files.close()
    assert member.life_fd == member._files.life_fd


# ---- the leader's lock -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize("there", ["its own", "nothing", "free", "held"])
def test_the_lead_goes_with_the_file_that_is_there(
    member: Namespace, lead: LockFile, clock: Clock, said: Said, there: str, leading: bool
) -> None:
    assert not leading or lead.try_exclusive()
    other = None
    if there != "its own":
        lead.path.unlink()
        if there != "nothing":
            other = LockFile(lead.path)
            assert there == "free" or other.try_exclusive()
    clock.now += 1.0
    leads = member.look_after_files(lead, leading)
    assert leads is (leading and there != "held")
    assert lead.is_current() is True
    assert is_locked(lead.path) is (leads or there == "held")
    told = there == "nothing" and leading
    assert said() == (put_back(member, "leader.lock") if told else [])
    assert member.segment.words[Header.PUT_BACK] == told
    if other is not None:
        other.close()


@pytest.mark.parametrize("leading", [True, False])
def test_a_lead_that_cannot_be_put_back_stays_what_it_is(
    member: Namespace, lead: LockFile, clock: Clock, said: Said, monkeypatch: pytest.MonkeyPatch, leading: bool
) -> None:
    lead.path.unlink()
    clock.now += 1.0

    def refuse(*_: object, **__: object) -> LockFile:
        raise OSError("no")

    with monkeypatch.context() as patched:
        patched.setattr(member_files, "LockFile", refuse)
        patched.setattr(LockFile, "put_back", refuse)
        assert member.look_after_files(lead, leading) is leading
    assert said() == [f"cannot put {lead.path} back: no"]


def test_the_count_of_files_waits_for_no_one(member: Namespace, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    real = member.lock

    def refuse(timeout_s: float) -> object:
        asked.append(timeout_s)
        raise LockTimeoutError("no", path="p", timeout_seconds=1.0, holder_pid=None)

    (folder_of(member) / "token").unlink()
    monkeypatch.setattr(member._files, "_lock", refuse)
    member._files.put_back()
    monkeypatch.setattr(member._files, "_lock", real)
    assert said() == put_back(member, "token")
    assert asked == [5.0]
    assert (folder_of(member) / "token").exists()
