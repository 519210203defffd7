"""One lock on one file: who gets it, what errors mean, and what is left on the disk and of descriptors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import io
import os
import select
import signal
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
from containers import NOBODY, as_root, being_nobody
from crash_lab import run_in_child
from harness import open_descriptors
from patience import DEADLINE_S

from mpmm.errors import LockTimeoutError, RuntimeDirectoryError
from mpmm.shared_state import lock_file
from mpmm.shared_state.lock_file import (
    LockFile,
    identity_of,
    is_locked,
    is_locked_as,
    is_open_anywhere,
    write_once,
)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """The path of a lock file; the folder of the test has nothing else in it, and no descriptor may be left open."""
    before = open_descriptors()
    yield tmp_path / "a.lock"
    assert open_descriptors() == before


def test_a_missing_file_is_no_reason_to_keep_the_callers(path: Path, refused: Callable[[int], None]) -> None:
    class Kept:
        pass

    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def call(ask: Callable[[], object]) -> None:
        own = Kept()
        kept.add(own)
        with contextlib.suppress(OSError):
            ask()

    gc.disable()
    try:
        call(lambda: is_locked(path))
        call(lambda: LockFile(path, create=False))
        assert not kept
        path.touch()
        refused(errno.EIO)
        call(lambda: is_locked(path))
        assert not kept
    finally:
        gc.enable()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets every call for a lock fail with an error of the system."""

    def refuse(number: int) -> None:
        def fail(*_: object, **__: object) -> bool:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", fail)
        monkeypatch.setattr("filelock.lock_descriptor", fail)
        monkeypatch.setattr("filelock.unlock_descriptor", fail)

    return refuse


TAKE: dict[str, Callable[[LockFile], bool]] = {
    "exclusive": LockFile.try_exclusive,
    "quickly": LockFile.take_quickly,
    "shared": LockFile.try_shared,
}


@pytest.mark.parametrize("take", TAKE)
@pytest.mark.parametrize("held", [None, *TAKE])
def test_only_shared_locks_go_together(path: Path, held: str | None, take: str) -> None:
    other, lock = LockFile(path), LockFile(path)
    assert held is None or TAKE[held](other) is True
    expected = held is None or held == take == "shared"
    assert TAKE[take](lock) is expected
    assert is_locked(path) is ((take if held is None else held) != "shared")
    assert TAKE[take](lock) is expected, "a second attempt changes nothing"
    other.close()
    assert TAKE[take](lock) is True
    lock.close()
    assert is_locked(path) is False


@pytest.mark.parametrize("give_up", [LockFile.unlock, LockFile.give_up_quickly])
def test_a_lock_that_is_given_up_can_be_taken_again_without_opening_the_file(
    path: Path, give_up: Callable[[LockFile], None]
) -> None:
    lock = LockFile(path)
    assert lock.try_exclusive()
    fd = lock.fd
    give_up(lock)
    assert is_locked(path) is False
    assert lock.take_quickly() is True
    assert lock.fd == fd
    lock.close()


def test_closing_gives_the_lock_up_although_a_child_has_inherited_the_descriptor(path: Path) -> None:
    lock = LockFile(path)
    assert lock.try_exclusive()
    inherited = os.dup(lock.fd)
    lock.close()
    assert is_locked(path) is False
    os.close(inherited)


def test_a_child_has_none_of_its_parents_locks(path: Path) -> None:
    lock = LockFile(path)
    assert lock.try_exclusive()

    def look() -> None:
        assert lock.fd < 0
        assert is_locked(path)

    assert run_in_child(look) == 0
    assert is_locked(path)
    lock.close()


def test_a_lock_that_nobody_refers_to_is_given_up(path: Path) -> None:
    lock = LockFile(path)
    assert lock.try_exclusive()
    del lock
    assert is_locked(path) is False


def test_a_child_that_drops_what_it_inherited_leaves_the_lock_to_its_parent(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a child that native code forks, in which no hook runs.
    monkeypatch.setattr(lock_file, "close_in_children", lambda lock: None)
    held = [LockFile(path)]
    assert held[0].try_exclusive()
    assert run_in_child(held.clear) == 0
    assert is_locked(path)
    held.clear()


def test_closing_twice_or_after_a_failure_closes_nothing_of_others(path: Path) -> None:
    lock = LockFile(path)
    lock.close()
    reader, writer = os.pipe()
    before = open_descriptors()
    lock.close()
    lock.forget_after_fork()
    del lock
    with pytest.raises(FileNotFoundError):
        LockFile(path.with_name("missing.lock"), create=False)
    with pytest.raises(FileNotFoundError):
        LockFile(path.with_name("missing"), folder=True)
    assert open_descriptors() == before
    os.close(reader)
    os.close(writer)
    assert os.listdir(path.parent) == ["a.lock"], "none was made"


def test_a_lock_that_has_become_another_one_is_closed_as_that(path: Path) -> None:
    lock, other = LockFile(path), LockFile(path)
    fd = other.fd
    lock.become(other)
    assert lock.fd == fd
    other.close()
    for still_open in (1, fd):
        os.fstat(still_open)
    lock.close()


def test_a_folder_is_locked_as_one_and_nothing_else_is(path: Path) -> None:
    folder, link = path.with_name("folder"), path.with_name("link")
    folder.mkdir()
    link.symlink_to(folder)
    path.touch()
    lock = LockFile(folder, folder=True)
    assert lock.try_shared()
    assert lock.identity == identity_of(folder)
    lock.close()
    for wrong in (path, link):
        with pytest.raises(NotADirectoryError):
            LockFile(wrong, folder=True)
    with pytest.raises(IsADirectoryError):
        LockFile(folder)
    with pytest.raises(RuntimeDirectoryError, match="a symbolic link is not followed"):
        LockFile(link)


# ---- what errors mean --------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[LockFile], object]] = {
    "exclusive": LockFile.try_exclusive,
    "shared": LockFile.try_shared,
    "unlock": LockFile.unlock,
    "give up": LockFile.give_up_quickly,
}
ALL_CALLS: dict[str, Callable[[LockFile], object]] = {**CALLS, "look": lambda lock: is_locked(lock.path)}


@pytest.mark.parametrize("call", ALL_CALLS)
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_each_call_says_so(
    path: Path, refused: Callable[[int], None], call: str, number: int
) -> None:
    lock = LockFile(path)
    refused(number)
    opened = LockFile(path)
    for one in (lock, opened) if call in ("shared", "give up") else (opened,):
        with pytest.raises(RuntimeDirectoryError, match=f"the file system of {path.parent} refuses locks") as caught:
            ALL_CALLS[call](one)
        assert caught.value.path == str(path)
    assert lock.take_quickly() is False
    # Closing them raises nothing.
    lock.close()
    opened.close()


@pytest.mark.parametrize("call", ALL_CALLS)
def test_an_error_that_says_nothing_about_locks_is_raised_as_it_is(
    path: Path, refused: Callable[[int], None], call: str
) -> None:
    refused(errno.EIO)
    lock = LockFile(path)
    with pytest.raises(OSError, match="Input/output error") as caught:
        ALL_CALLS[call](lock)
    assert type(caught.value) is OSError
    lock.close()


NEED_DESCRIPTOR: dict[str, Callable[[LockFile], object]] = {**CALLS, "identity": lambda lock: lock.identity}


@pytest.mark.parametrize("call", NEED_DESCRIPTOR)
def test_a_lock_whose_descriptor_was_closed_by_others_says_so(path: Path, call: str) -> None:
    lock = LockFile(path)
    os.close(lock.fd)
    with pytest.raises(RuntimeDirectoryError, match=f"this process has lost the lock on {path}: some code") as caught:
        NEED_DESCRIPTOR[call](lock)
    assert caught.value.path == str(path)
    lock.close()


# ---- waiting -----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still but for sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lock_file, "time", made)
    return made


WAIT: dict[str, Callable[[LockFile, float], None]] = {"exclusive": LockFile.exclusive, "shared": LockFile.shared}


@pytest.mark.parametrize("wait", WAIT)
def test_one_that_waits_for_a_lock_looks_less_and_less_often_until_its_time_is_over(
    path: Path, clock: Clock, wait: str
) -> None:
    other, lock = LockFile(path), LockFile(path)
    other.exclusive(0.0)
    with pytest.raises(LockTimeoutError, match=f"the lock {path} was not free within 1 s") as caught:
        WAIT[wait](lock, 1.0)
    found = (caught.value.path, caught.value.timeout_seconds, caught.value.holder_pid)
    assert found == (str(path), 1.0, os.getpid() if other.holders() else None)
    assert 0 <= clock.now - 1001.0 <= 0.01
    first, *later = clock.pauses
    assert first < 50e-6, "the kernel's timers are no more exact"
    assert later == [min(0.01, 2**number * first) for number in range(1, len(clock.pauses))]
    other.close()
    lock.close()


@pytest.mark.parametrize("wait", WAIT)
def test_one_that_may_not_wait_looks_once(path: Path, clock: Clock, wait: str) -> None:
    other, lock = LockFile(path), LockFile(path)
    other.exclusive(0.0)
    with pytest.raises(LockTimeoutError):
        WAIT[wait](lock, 0.0)
    assert clock.pauses == []
    other.close()
    WAIT[wait](lock, 0.0)
    assert is_locked(path) is (wait == "exclusive")
    lock.close()


@pytest.fixture
def new_holder(path: Path) -> Iterator[Callable[[str], int]]:
    """Starts processes that take a lock on the file and keep it until the test ends; returns the pid of each."""
    pids: list[int] = []

    def start(how: str) -> int:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                lock = LockFile(path)
                os.write(writer, b"y" if TAKE[how](lock) else b"n")
                signal.pause()
            finally:
                os._exit(1)
        pids.append(pid)
        os.close(writer)
        assert os.read(reader, 1) == b"y"
        os.close(reader)
        return pid

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


LISTED = pytest.mark.skipif(not Path("/proc/locks").exists(), reason="this kernel lists no locks")


@LISTED
@pytest.mark.parametrize(("wait", "how"), [("exclusive", "exclusive"), ("shared", "quickly"), ("exclusive", "shared")])
def test_one_that_waits_in_vain_names_the_process_that_holds_the_lock(
    path: Path, new_holder: Callable[[str], int], wait: str, how: str
) -> None:
    holder = new_holder(how)
    lock = LockFile(path)
    # It has locked another file, and has this one open.
    Path(f"{path}.other").touch()
    own = LockFile(f"{path}.other")
    assert own.try_exclusive()
    with pytest.raises(
        LockTimeoutError, match=rf"{path} was not free within 0 s; process {holder} holds it \("
    ) as caught:
        WAIT[wait](lock, 0.0)
    assert caught.value.holder_pid == holder
    own.close()
    lock.close()


@LISTED
def test_one_that_waits_for_several_names_them(path: Path, new_holder: Callable[[str], int]) -> None:
    pids = sorted(new_holder("shared") for _ in range(lock_file.PROCESSES_NAMED + 1))
    lock = LockFile(path)
    assert lock.holders() == pids
    with pytest.raises(LockTimeoutError) as caught:
        lock.exclusive(0.0)
    named = ", ".join(map(str, pids[:-1]))
    assert str(caught.value).endswith(f"; processes {named}, ... hold it (are they stopped?)")
    assert caught.value.holder_pid == pids[0]
    lock.close()


@pytest.mark.parametrize("text", ["", "1: POSIX  ADVISORY  WRITE 7 00:01:1 0 EOF\n", "1: FLOCK\n", "junk"])
def test_one_that_waits_names_nobody_where_the_kernel_does_not_tell(
    path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    other, lock = LockFile(path), LockFile(path)
    assert other.try_exclusive()

    def listed(*_: object, **__: object) -> io.StringIO:
        if not text:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return io.StringIO(text)

    monkeypatch.setattr(lock_file, "open", listed, raising=False)
    with pytest.raises(LockTimeoutError, match=r"was not free within 0 s$") as caught:
        lock.exclusive(0.0)
    assert caught.value.holder_pid is None
    other.close()
    lock.close()


# ---- looking at locks of others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [None, *TAKE])
def test_a_look_at_a_lock_tells_whether_the_file_that_is_meant_is_locked(path: Path, held: str | None) -> None:
    assert is_locked_as(path, None) is None
    assert is_locked_as(path, 1) is None
    assert is_locked(path) is False
    assert is_locked_as(path / "below", None) is None
    lock = LockFile(path)
    assert held is None or TAKE[held](lock)
    expected = held in ("exclusive", "quickly")
    assert is_locked(path) is expected
    assert is_locked_as(path, None) is expected
    assert is_locked_as(path, lock.identity[1]) is expected
    assert is_locked_as(path, lock.identity[1] + 1) is None
    assert is_locked_as(path, 0) is None
    lock.close()


def test_a_file_that_cannot_be_asked_about_counts_as_open(path: Path) -> None:
    assert is_open_anywhere(path) is False
    path.touch()
    link = path.with_name("link")
    link.symlink_to(path)
    assert is_open_anywhere(link) is True
    assert is_open_anywhere(path.parent) is True
    assert is_open_anywhere(path) is False
    with path.open():
        assert is_open_anywhere(path) is True


def test_a_process_that_opens_what_another_one_asks_about_does_not_kill_that(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.touch()
    came, says_came = os.pipe()
    opener = threading.Thread(target=lambda: os.close(os.open(path, os.O_RDONLY)))
    call = fcntl.fcntl

    def open_meanwhile(fd: int, command: int, argument: int) -> int:
        if command == fcntl.F_SETLEASE and argument == fcntl.F_UNLCK:
            opener.start()
            assert select.select([came], [], [], DEADLINE_S)[0], "the kernel says that somebody waits"
        return call(fd, command, argument)

    def do_nothing(number: int, _: FrameType | None) -> None:
        pass

    before = {number: signal.signal(number, do_nothing) for number in (signal.SIGIO, signal.SIGURG)}
    # The signal may come in the other thread, where a handler would run only once this one has ended its call.
    os.set_blocking(says_came, False)
    woken_before = signal.set_wakeup_fd(says_came)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(fcntl, "fcntl", open_meanwhile)
            assert is_open_anywhere(path) is False
        opener.join(DEADLINE_S)
        assert os.read(came, 9) == bytes([signal.SIGURG]), "a signal that a process ignores unless it cares"
    finally:
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(came)
        os.close(says_came)


def test_device_and_inode_tell_files_apart_and_a_link_from_where_it_leads(path: Path) -> None:
    assert identity_of(path) is None
    assert identity_of(path / "below") is None
    path.touch()
    found = path.stat()
    assert identity_of(path) == (found.st_dev, found.st_ino)
    link = path.with_name("link")
    link.symlink_to(path)
    assert identity_of(link) not in (None, identity_of(path))


def test_a_lock_knows_whether_its_file_is_where_it_was(path: Path) -> None:
    lock = LockFile(path)
    assert (lock.path, lock.identity) == (path, identity_of(path))
    assert (lock.is_current(), lock.is_replaced()) == (True, False)
    path.rename(path.with_name("elsewhere"))
    assert (lock.is_current(), lock.is_replaced()) == (False, False)
    path.touch()
    assert (lock.is_current(), lock.is_replaced()) == (False, True)
    lock.close()


# ---- putting back ------------------------------------------------------------------------------------------------

LINKS = pytest.mark.parametrize("links", [True, False], ids=["links", "no links"], indirect=True)


@pytest.fixture
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has links; if not, it says so as FAT does."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if not request.param:
        monkeypatch.setattr(os, "link", refuse)
    return bool(request.param)


@LINKS
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("there", ["nothing", "free", "shared", "exclusive"])
def test_a_file_that_was_removed_is_put_back_unless_there_is_another_one(
    path: Path, links: bool, shared: bool, there: str
) -> None:
    lock = LockFile(path)
    assert lock.try_exclusive()
    path.unlink()
    other = LockFile(path) if there != "nothing" else None
    if other is not None and there != "free":
        assert TAKE[there](other)
    before = identity_of(path)
    made = lock.put_back(shared=True) if shared else lock.put_back()
    if there == "exclusive" or (there == "shared" and not shared):
        assert made is None
    else:
        assert made is not None
        assert made.put_here is (there == "nothing")
        assert (made.path, made.is_current()) == (path, True)
        assert there == "nothing" or made.identity == before
        assert is_locked(path) is not shared
        assert made.try_exclusive() is (there != "shared")
        made.close()
    assert lock.put_here is False
    assert os.listdir(path.parent) == [path.name]
    lock.close()
    if other is not None:
        other.close()


def test_a_new_file_says_from_the_start_what_it_is_to_say(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = LockFile(path)
    path.unlink()
    linked: list[bytes] = []
    link = os.link

    def read_and_link(draft: Path, target: Path) -> None:
        linked.append(draft.read_bytes())
        link(draft, target)

    monkeypatch.setattr(os, "link", read_and_link)
    made = lock.put_back(text=b"who I am")
    assert made is not None
    assert (linked, path.read_bytes()) == ([b"who I am"], b"who I am")
    made.close()
    # That of another process stays as it is.
    other = lock.put_back(text=b"somebody else")
    assert other is not None
    assert path.read_bytes() == b"who I am"
    other.close()
    lock.close()


def test_the_sole_owner_of_a_path_replaces_what_is_there(path: Path) -> None:
    lock = LockFile(path)
    path.unlink()
    path.touch()
    before = identity_of(path)
    made = lock.put_back(replace=True)
    assert made is not None
    assert (made.put_here, made.is_current(), is_locked(path)) == (True, True, True)
    assert made.identity != before
    assert os.listdir(path.parent) == [path.name]
    made.close()
    lock.close()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("fails", ["somebody else has the new file", "the system refuses"])
def test_a_file_that_cannot_be_locked_is_not_put_anywhere(
    path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool, fails: str
) -> None:
    lock = LockFile(path)
    path.unlink()
    path.write_text("of another one")

    def refuse(*_: object) -> bool:
        if fails == "the system refuses":
            raise OSError(errno.EIO, "no")
        return False

    with monkeypatch.context() as patched:
        patched.setattr(LockFile, "try_exclusive", refuse)
        before = open_descriptors()
        if fails == "the system refuses":
            with pytest.raises(OSError, match="no") as caught:
                lock.put_back(replace=replace)
            # The error keeps all variables of the function.
            assert caught.tb is not None
        else:
            assert lock.put_back(replace=replace) is None
        assert open_descriptors() == before
    assert path.read_text() == "of another one"
    assert os.listdir(path.parent) == [path.name]
    lock.close()


# ---- files -------------------------------------------------------------------------------------------------------


@LINKS
def test_a_file_is_written_once(path: Path, links: bool) -> None:
    assert write_once(path, "first") is True
    assert write_once(path, "second") is False
    assert path.read_text() == "first"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    dangling = path.with_name("dangling")
    dangling.symlink_to("nowhere")
    assert write_once(dangling, "third") is False
    assert sorted(os.listdir(path.parent)) == [path.name, "dangling"]


@LINKS
def test_a_file_that_another_process_has_written_meanwhile_stays(
    path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def write_both(fd: int, text: bytes) -> int:
        path.write_text("of another process")
        return write(fd, text)

    monkeypatch.setattr(lock_file, "os", SimpleNamespace(**{**vars(os), "write": write_both}))
    assert write_once(path, "ours") is False
    assert path.read_text() == "of another process"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777], ids=oct)
def test_a_new_file_is_private_whatever_the_umask_is(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        LockFile(path).close()
        assert write_once(path.with_name("token"), "text")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path, path.with_name("token"))]
    assert modes == [0o600, 0o600]


@pytest.mark.parametrize("mode", [0o600, 0o601, 0o660, 0o777], ids=oct)
def test_a_file_that_others_may_use_too_stays_as_it_is(path: Path, mode: int) -> None:
    path.touch()
    path.chmod(mode)
    LockFile(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == mode


@as_root
@pytest.mark.parametrize("mode", [0o000, 0o200, 0o400], ids=oct)
@pytest.mark.parametrize("action", [lambda path: LockFile(path).close(), is_locked], ids=["open", "look"])
def test_a_file_of_ones_own_that_denies_its_owner_is_made_right(
    nobodys_folder: Path, mode: int, action: Callable[[Path], object]
) -> None:
    path = nobodys_folder / "a.lock"
    path.touch()
    path.chmod(mode)
    os.chown(path, NOBODY, -1)
    with being_nobody():
        action(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@as_root
@pytest.mark.parametrize("what", ["of root", "a pipe"])
def test_what_is_no_file_of_ones_own_is_not_made_right(nobodys_folder: Path, what: str) -> None:
    path = nobodys_folder / "a.lock"
    if what == "a pipe":
        os.mkfifo(path)
        os.chown(path, NOBODY, -1)
    else:
        path.touch()
    path.chmod(0o000)
    with being_nobody(), pytest.raises(RuntimeDirectoryError, match="cannot be used: Permission denied") as caught:
        LockFile(path)
    assert caught.value.path == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o000


@as_root
def test_a_look_changes_nothing_of_a_file_that_it_can_open(path: Path) -> None:
    path.touch()
    path.chmod(0o400)
    assert is_locked(path) is False
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
