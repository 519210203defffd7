"""The registry of shared objects in one process: its key, its locks, and its lifetime."""

from __future__ import annotations

import errno
import json
import math
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest
from harness import held_by_a_thread, in_child

from mpmm.errors import LockTimeoutError
from mpmm.multi_process_shared import registry as registry_module
from mpmm.multi_process_shared.forkserver.zygote import _Zygote
from mpmm.multi_process_shared.host import new_record
from mpmm.multi_process_shared.life import address_for
from mpmm.multi_process_shared.registry import (
    ALIVE_LOCK_TIMEOUT_S,
    ANSWERS_WITHIN_S,
    DYING_TIMEOUT_S,
    HANDLES,
    KEY_BYTES,
    LIVES_BY_VARIABLE,
    PF_EXITING,
    SHORT_LOCK_TIMEOUT_S,
    ServerRecord,
    ServerRegistry,
    digest_of,
    start_time_of,
    write_record,
)
from mpmm.multi_process_shared.server_process import AliveLock
from mpmm.shared_state.lock_file import LockFile, is_locked
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE, RuntimeDirectory, default_root, root_below


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[ServerRegistry]:
    """A registry whose only client is this process."""
    registry = ServerRegistry(tmp_path)
    registry.join()
    yield registry
    registry.leave()
    assert not registry.path.exists()


def test_a_registry_says_where_it_lies(registry: ServerRegistry) -> None:
    assert str(registry.path) in repr(registry)
    assert (registry.folder, registry.root) == (str(registry.path), registry.path.parent)
    digest = registry_module.digest_of("it")
    assert registry.life_path("it") == str(registry.path / f"{digest}.life")
    assert registry.attach_marker("it") == registry.path / f"{digest}.attach"
    assert registry.alive_path == str(registry.path / "alive.lock")


@pytest.mark.parametrize("junk", [b"", b"too short", bytes(KEY_BYTES + 1), bytes(100)], ids=len)
def test_a_key_of_another_length_is_made_anew_and_stays_then(registry: ServerRegistry, junk: bytes) -> None:
    registry.key()
    file = registry.path / "key"
    file.write_bytes(junk)
    key = registry.key()
    assert (len(key), file.read_bytes(), registry.key()) == (KEY_BYTES, key, key)


def test_a_registry_stays_without_clients_while_a_server_lives(registry: ServerRegistry) -> None:
    life = registry.take_life("it")
    assert life is not None
    write_record(life, new_record(registry, "it", spawned=True, ready=True))
    registry.leave()
    assert registry.path.exists()
    registry.join()
    life.close()


def test_a_registry_that_is_removed_just_as_it_is_joined_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, ensure = ServerRegistry(tmp_path), RuntimeDirectory.ensure

    def ensure_for_a_moment(directory: RuntimeDirectory) -> None:
        monkeypatch.undo()
        ensure(directory)
        directory.path.rmdir()

    monkeypatch.setattr(RuntimeDirectory, "ensure", ensure_for_a_moment)
    registry.join()
    assert os.path.exists(registry.alive_path)
    registry.leave()
    assert not registry.path.exists()


def test_one_that_leaves_a_registry_that_is_gone_lets_the_one_be_that_others_have_made_since(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    others, unlock = ServerRegistry(registry.root), LockFile.unlock

    def unlock_slowly(lock: LockFile) -> None:
        unlock(lock)
        monkeypatch.undo()
        os.rename(registry.path, registry.root / "gone")
        others.join()

    monkeypatch.setattr(LockFile, "unlock", unlock_slowly)
    registry.leave()
    assert registry.path.exists()
    assert not (registry.path / "lifecycle.lock").exists(), "nobody has begun to remove it"
    others.leave()
    assert not registry.path.exists()


def test_of_two_that_leave_at_the_same_time_one_removes_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ServerRegistry(tmp_path), ServerRegistry(tmp_path)
    first.join()
    second.join()
    try_exclusive = LockFile.try_exclusive

    def try_and_let_the_other_leave(lock: LockFile) -> bool:
        taken = try_exclusive(lock)
        second.leave()
        return taken

    monkeypatch.setattr(LockFile, "try_exclusive", try_and_let_the_other_leave)
    first.leave()
    assert not first.path.exists()


@pytest.mark.parametrize("server", ["was killed", "has not said who it is"])
def test_who_leaves_a_registry_last_waits_for_a_server_that_is_about_to_be_gone(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    life = registry.take_life("it")
    assert life is not None
    record = new_record(registry, "it", spawned=True, ready=True)
    if server == "was killed":
        write_record(life, replace(record, start_time=1.0))
    # While the client waits, the kernel closes the server's descriptors.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: life.close())
    monkeypatch.setattr(registry_module, "time", clock)
    registry.leave()
    assert life.fd < 0
    assert not registry.path.exists()


def test_a_lock_whose_file_is_gone_is_held_by_no_client(tmp_path: Path) -> None:
    path = tmp_path / "alive.lock"
    before = AliveLock(str(path))
    path.touch(0o600)
    after = AliveLock(str(path))
    path.unlink()
    # The server asks again, for as long as it has clients through another lock.
    assert [lock.is_free() for lock in (before, before, after, after)] == [True] * 4
    assert not before.held and not after.held


@pytest.mark.parametrize("token", [None, "the same", "another", "gone"])
def test_a_server_lives_by_the_lock_that_was_put_in_the_place_of_a_removed_one(
    tmp_path: Path, token: str | None
) -> None:
    path, beside = tmp_path / "alive.lock", tmp_path / "token"
    if token is not None:
        beside.write_text("the same")
    before = LockFile(path)
    assert before.try_shared()
    lock = AliveLock(str(path))
    assert not lock.is_free()
    path.unlink()
    after = LockFile(path)
    assert after.try_shared()
    if token == "gone":
        beside.unlink()
    elif token is not None:
        beside.write_text(token)
    assert not lock.is_free(), "those who were there hold the removed one"
    before.close()
    of_another_namespace = token in ("another", "gone")
    assert lock.is_free() == of_another_namespace
    after.close()
    assert lock.is_free()
    assert lock.held != of_another_namespace
    lock.close()
    assert not lock.held


def test_a_server_that_cannot_open_the_new_lock_takes_nobody_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "alive.lock"
    path.touch(0o600)
    (tmp_path / "token").touch()
    lock = AliveLock(str(path))
    path.unlink()
    client = LockFile(path)
    assert client.try_shared()

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    for what in ("mpmm.multi_process_shared.server_process.open_lock", "pathlib.Path.read_bytes"):
        with monkeypatch.context() as patched:
            patched.setattr(what, refuse)
            with pytest.raises(OSError, match="too many open files"):
                lock.is_free()
    assert not lock.is_free()
    client.close()
    assert lock.is_free()
    lock.close()


def test_a_client_holds_the_new_lock_before_it_gives_the_removed_one_up(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, before = AliveLock(registry.alive_path), registry._alive
    os.unlink(registry.alive_path)
    close, seen = LockFile.close, list[bool]()

    def look_and_close(file: LockFile) -> None:
        close(file)
        if file is before:
            seen.append(lock.is_free())

    monkeypatch.setattr(LockFile, "close", look_and_close)
    registry.join()
    assert seen == [False]
    lock.close()


def test_a_zygote_that_nobody_finds_ends_once_it_has_no_work_left(tmp_path: Path) -> None:
    life = LockFile(tmp_path / "life")
    zygote = SimpleNamespace(life=life, children=set(), templates=[], requesters={})
    is_forgotten: Any = _Zygote.is_forgotten
    assert not is_forgotten(zygote)
    life.path.unlink()
    assert is_forgotten(zygote)
    for work in ({"children": {1}}, {"templates": [1]}, {"requesters": {1: 1}}):
        assert not is_forgotten(SimpleNamespace(**{**vars(zygote), **work}))
    life.close()


def test_a_server_has_ended_once_its_process_has_or_another_has_its_pid() -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        started = start_time_of(process.pid)
        assert started is not None
        record = ServerRecord("it", process.pid, started, "1", "socket", spawned=True, ready=True)
        assert not record.has_ended()
        assert replace(record, start_time=started - 1).has_ended()
    finally:
        process.kill()
        # Its starter has not asked for it yet.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert record.has_ended()
    process.wait()
    assert record.has_ended()
    assert start_time_of(process.pid) is None


def test_a_lock_that_was_taken_and_replaced_is_not_there_to_be_given_up(tmp_path: Path) -> None:
    path = tmp_path / "alive.lock"
    path.touch(0o600)
    lock = AliveLock(str(path))
    assert lock.is_free()
    assert lock.held
    path.unlink()
    assert lock.is_free()
    lock.give_up()


@pytest.mark.parametrize("way", ["descriptor", "none to be had", "not of this Python", "too high for select"])
def test_the_end_of_a_server_is_told_in_any_way_there_is(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def fail(*_: object) -> NoReturn:
        raise ValueError("too high") if way == "too high for select" else OSError(errno.EMFILE, "too many open files")

    if way == "none to be had":
        monkeypatch.setattr(os, "pidfd_open", fail)
    elif way == "not of this Python":
        monkeypatch.delattr(os, "pidfd_open")
    elif way == "too high for select":
        monkeypatch.setattr(select, "select", fail)
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    started = start_time_of(process.pid)
    assert started is not None
    lives = ServerRecord("it", process.pid, started, "1", "socket", spawned=True, ready=True)
    another = replace(lives, start_time=started - 1.0)
    assert (lives.has_ended(), another.has_ended()) == (False, True)
    process.kill()
    process.communicate()
    assert lives.has_ended()
    assert another.has_ended()


# Processes.


class Clock:
    """Passes by itself, so many times as fast as it is waited for, and notes the pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: float = 1.0) -> None:
        self.now, self.times = 1000.0, times
        self.pauses: list[float] = []
        monkeypatch.setattr(registry_module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds * self.times


def files_of_processes(monkeypatch: pytest.MonkeyPatch, **files: Any) -> None:
    """Have the files of `/proc/<pid>` contain these texts, or raise these exceptions."""

    class Place:
        def __init__(self, path: str) -> None:
            self.name = path.rpartition("/")[2]

        def read_text(self, **options: str) -> str:
            found = files[self.name]
            if isinstance(found, Exception):
                raise found
            return str(found)

    monkeypatch.setattr(registry_module, "Path", Place)


def stat_of(name: str = "a) name", flags: int = 0, started: int = 4711) -> str:
    """Return the text of `/proc/<pid>/stat`."""
    return f"17 ({name}) S 1 2 3 4 5 {flags} {' '.join(str(number) for number in range(100, 112))} {started} 200 300"


def test_the_start_of_a_process_is_what_the_kernel_says_or_else_what_psutil_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files_of_processes(monkeypatch, stat=stat_of())
    assert start_time_of(17) == 4711.0
    files_of_processes(monkeypatch, stat=ProcessLookupError())
    assert start_time_of(17) is None
    files_of_processes(monkeypatch, stat=FileNotFoundError())
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(create_time=lambda: 12))
    assert start_time_of(17) == 12.0

    def fail(pid: int) -> NoReturn:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", fail)
    assert start_time_of(17) is None


def test_a_process_is_dying_once_it_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    kill, other = 1 << (signal.SIGKILL - 1), 1 << (signal.SIGTERM - 1) | 1 << signal.SIGKILL | 1 << (signal.SIGKILL - 2)
    for flags, own, shared, dying in (
        (0, 0, 0, False),
        (PF_EXITING, 0, 0, True),
        (PF_EXITING - 1 | PF_EXITING << 1, other, other, False),
        (0, kill, 0, True),
        (0, 0, kill | other, True),
    ):
        status = f"Name:\ta\nSigQ:\t1/2\nSigPnd:\t{own:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{kill:016x}\n"
        files_of_processes(monkeypatch, stat=stat_of(flags=flags), status=status)
        assert registry_module._is_dying(17) is dying, (flags, own, shared)
    unknown: Any
    for stat, unknown in ((OSError(), ""), (stat_of(), OSError()), ("17 (a) S 1", ""), ("17 (a) S 1 2 3 4 5 x", "")):
        files_of_processes(monkeypatch, stat=stat, status=unknown)
        assert registry_module._is_dying(17) is False


def test_a_server_runs_if_its_very_process_does_and_is_not_dying(monkeypatch: pytest.MonkeyPatch) -> None:
    record = ServerRecord("it", 17, 5.0, "1", "socket", spawned=True, ready=True)
    for status, started, dying, runs in (
        (psutil.STATUS_SLEEPING, 5.0, False, True),
        (psutil.STATUS_ZOMBIE, 5.0, False, False),
        (psutil.STATUS_SLEEPING, 6.0, False, False),
        (psutil.STATUS_SLEEPING, 5.0, True, False),
        (psutil.STATUS_SLEEPING, None, False, False),
        (psutil.NoSuchProcess(17), 5.0, False, False),
        (psutil.AccessDenied(17), 6.0, True, True),
    ):

        def status_of(status: Any = status) -> str:
            if isinstance(status, Exception):
                raise status
            return str(status)

        monkeypatch.setattr(psutil, "Process", lambda pid, status_of=status_of: SimpleNamespace(status=status_of))
        monkeypatch.setattr(registry_module, "start_time_of", lambda pid, started=started: started)
        monkeypatch.setattr(registry_module, "_is_dying", lambda pid, dying=dying: dying)
        assert record.is_running() is runs, (status, started, dying)


def test_a_process_that_a_server_has_started_lives_by_what_the_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIVES_BY_VARIABLE, raising=False)
    assert registry_module._inherited_locks() is None
    for text, locks in (
        ('["/a", "/b"]', ("/a", "/b")),
        ("[]", ()),
        ("[1]", ("1",)),
        ("", None),
        ("5", None),
        ("[", None),
    ):
        monkeypatch.setenv(LIVES_BY_VARIABLE, text)
        assert registry_module._inherited_locks() == locks, text

    def become() -> tuple[Any, ...]:
        before = registry_module.is_server_process(), registry_module.server_lives_by()
        registry_module.become_server_process(("/a",))
        return (
            before,
            registry_module.is_server_process(),
            registry_module.server_lives_by(),
            os.environ[LIVES_BY_VARIABLE],
        )

    assert in_child(become) == ((False, None), True, ("/a",), '["/a"]')


# Handles.


def test_a_tag_is_a_handle_from_the_start_of_its_server_until_it_is_deleted(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry.namespaces_of_handle("it") == ()
    registry.forget_handle("it")
    registry.remember_handle("it", ("one", "two"))
    assert registry.namespaces_of_handle("it") == ("one", "two")
    assert (registry.path / HANDLES).stat().st_mode & 0o777 == 0o700
    assert registry.namespaces_of_handle("other") == ()
    registry.forget_handle("it")
    assert registry.namespaces_of_handle("it") == ()
    # The oldest are removed, down to three quarters, once there are too many.
    monkeypatch.setattr(registry_module, "MOST_HANDLES", 8)
    for number in range(9):
        if number == 8:
            assert len(list((registry.path / HANDLES).iterdir())) == 8
        registry.remember_handle(f"tag {number}", ("one",))
        file = registry.path / HANDLES / registry_module.digest_of(f"tag {number}")
        if file.exists():
            os.utime(file, (1000 + number,) * 2)
    left = [number for number in range(9) if registry.namespaces_of_handle(f"tag {number}")]
    assert left == [3, 4, 5, 6, 7, 8]


def test_a_handle_that_cannot_be_noted_keeps_no_server_from_starting(tmp_path: Path) -> None:
    ServerRegistry(tmp_path / "nowhere").remember_handle("it", ("one",))


# Clients.


def test_a_client_joins_once_and_again_if_the_registry_was_replaced(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []
    shared = LockFile.shared

    def note(lock: LockFile, timeout_seconds: float) -> None:
        taken.append(timeout_seconds)
        shared(lock, timeout_seconds)

    monkeypatch.setattr(LockFile, "shared", note)
    alive = registry._alive
    registry.join()
    assert (registry._alive is alive, taken) == (True, [])
    os.unlink(registry.alive_path)
    registry.join()
    assert (registry._alive is alive, taken) == (False, [ALIVE_LOCK_TIMEOUT_S])
    assert alive is not None
    assert alive.fd < 0
    registry.leave()
    registry.leave()
    assert registry._alive is None


def test_a_server_makes_the_registry_and_is_no_client_of_it(tmp_path: Path) -> None:
    def join() -> tuple[Any, ...]:
        registry_module.become_server_process(())
        registry = ServerRegistry(tmp_path / "of a server")
        registry.join()
        found: list[Any] = [registry.path.exists(), registry._alive]
        with registry.tag_lock("it"):
            # It keeps the registry in this way while it starts another server.
            lifecycle = LockFile(registry.path / "lifecycle.lock")
            found += [lifecycle.try_exclusive(), lifecycle.try_shared()]
            lifecycle.close()
        lifecycle = LockFile(registry.path / "lifecycle.lock")
        return *found, lifecycle.try_exclusive()

    assert in_child(join) == (True, None, False, True, True)


def test_a_forked_child_is_no_client_until_it_joins(registry: ServerRegistry) -> None:
    def look() -> tuple[Any, ...]:
        found = registry._alive
        assert registry._mutex.acquire(timeout=1.0)
        registry._mutex.release()
        registry.join()
        return found, registry._alive is not None

    registered = {"here": registry}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry_module, "_registries", registered)
        with held_by_a_thread(registry._mutex):
            assert in_child(look) == (None, True)
    assert registry._alive is not None


class Asked:
    """A lock that is free, or shared, or held, as a test says at each try."""

    def __init__(self, exclusive: list[bool], shared: list[bool], current: bool = True) -> None:
        self.says = {"exclusive": exclusive, "shared": shared}
        self.current = current
        self.done: list[str] = []

    def try_exclusive(self) -> bool:
        return self.says["exclusive"].pop(0) if len(self.says["exclusive"]) > 1 else self.says["exclusive"][0]

    def try_shared(self) -> bool:
        return self.says["shared"].pop(0) if len(self.says["shared"]) > 1 else self.says["shared"][0]

    def is_current(self) -> bool:
        return self.current

    def unlock(self) -> None:
        self.done.append("unlock")

    def close(self) -> None:
        self.done.append("close")


def test_a_registry_is_abandoned_if_no_client_has_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ServerRegistry(tmp_path)
    assert registry.claim_if_abandoned() is None
    clock = Clock(monkeypatch)
    for lock, claimed, done, pauses in (
        (Asked([True], []), True, [], 0),
        (Asked([True], [], current=False), False, ["close"], 0),
        # A client, or another process that probes and has left by now.
        (Asked([False, False], [True]), False, ["unlock", "close"], 0),
        (Asked([False, True], [True]), True, ["unlock"], 0),
        (Asked([False, True], [True], current=False), False, ["unlock", "close"], 0),
        # A process that probes, or leaves.
        (Asked([False, False, True], [False]), True, [], 2),
        (Asked([False], [False]), False, ["close"], SHORT_LOCK_TIMEOUT_S / 0.000_5),
    ):
        clock.pauses.clear()
        monkeypatch.setattr(registry_module, "open_lock", lambda path, lock=lock: lock)
        assert (registry.claim_if_abandoned() is lock) is claimed  # type: ignore[comparison-overlap]  # it is `Asked`
        assert lock.done == done
        assert set(clock.pauses) <= {0.000_5}
        assert len(clock.pauses) == pytest.approx(pauses, abs=2 if pauses > 2 else 0)


def test_a_registry_is_removed_unless_a_server_lives_or_is_being_started(registry: ServerRegistry) -> None:
    life, another = registry.take_life("it"), registry.take_life("another")
    assert life is not None
    assert another is not None
    for lock, tag in ((life, "it"), (another, "another")):
        write_record(lock, new_record(registry, tag, spawned=True, ready=True))
    registry.remove_if_unused()
    registry.remove_if_unused(but=life)
    assert registry.path.exists()
    another.close()
    registry.remove_if_unused()
    assert registry.path.exists()
    starting = LockFile(registry.path / "lifecycle.lock")
    assert starting.try_shared()
    registry.remove_if_unused(but=life)
    assert registry.path.exists()
    starting.close()
    # What a process has left that was killed in the middle of this goes, too, and nothing else.
    killed = registry.root / "shared.gone.0123456789abcdef"
    other = registry.root / "other.gone.0123456789abcdef"
    for folder in (killed, other):
        folder.mkdir()
    registry.remove_if_unused(but=life)
    assert [path.name for path in registry.root.iterdir()] == [other.name]
    registry.remove_if_unused()
    other.rmdir()
    life.close()


def test_a_life_lock_stays_locked_if_a_process_that_runs_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it.life"
    assert not registry_module._will_stay_locked(path)
    life = LockFile(path)
    assert life.try_exclusive()
    runs, record = [True], ServerRecord("it", 17, 5.0, "1", "socket", spawned=True, ready=True)
    monkeypatch.setattr(ServerRecord, "is_running", lambda record: runs[0])
    for text, running, stays, waited_s in (
        (record, True, True, 0.0),
        (record, False, True, DYING_TIMEOUT_S),
        (replace(record, leaving=True), True, True, 0.0),
        (replace(record, leaving=True, has_looked=True), True, False, 0.0),
        (None, True, True, DYING_TIMEOUT_S),
    ):
        with monkeypatch.context() as patched:
            clock = Clock(patched, times=100)
            os.ftruncate(life.fd, 0)
            if text is not None:
                write_record(life, text)
            runs[0] = running
            assert registry_module._will_stay_locked(path) is stays
            assert clock.now - 1000.0 == pytest.approx(waited_s, abs=0.11), (text, running)
    life.close()
    assert not registry_module._will_stay_locked(path)


# Servers.


def test_the_record_of_a_server_can_be_read_whatever_else_is_in_it(registry: ServerRegistry) -> None:
    assert registry.look("it") == (False, None)
    life = registry.take_life("it")
    assert life is not None
    assert registry.look("it") == (True, None), "it has not said who it is"
    record = replace(
        new_record(registry, "it", spawned=True, ready=True), namespaces=("a",) * 50, types=("b", "c"), expect_mb=2.5
    )
    write_record(life, record)
    assert registry.look("it") == (True, record)
    # A shorter one does not leave the end of the longer one behind.
    size = os.fstat(life.fd).st_size
    shorter = replace(record, namespaces=())
    write_record(life, shorter)
    assert (registry.look("it"), os.fstat(life.fd).st_size) == ((True, shorter), size)
    for content, expected in (
        # A later version says more, and an earlier one less.
        ({**asdict(shorter), "more": 5}, shorter),
        (
            {
                name: value
                for name, value in asdict(shorter).items()
                if name not in ("namespaces", "types", "expect_mb")
            },
            replace(shorter, types=(), expect_mb=None),
        ),
        ({"tag": "it"}, None),
        ([], None),
        (5, None),
    ):
        os.ftruncate(life.fd, 0)
        os.pwrite(life.fd, json.dumps(content).encode(), 0)
        assert registry.look("it") == (True, expected), content
    for junk in (b"", b"{", b"\xff"):
        os.ftruncate(life.fd, 0)
        os.pwrite(life.fd, junk, 0)
        assert registry.look("it") == (True, None), junk
    life.close()
    assert registry.look("it") == (False, None)


def test_a_life_is_taken_by_one_process_and_only_where_the_registry_is(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = registry.take_life("it")
    assert life is not None
    limits: list[float] = []

    def exclusive(lock: LockFile, timeout_seconds: float) -> None:
        limits.append(timeout_seconds)
        if not lock.try_exclusive():
            raise LockTimeoutError("held", path="/", timeout_seconds=timeout_seconds)

    monkeypatch.setattr(LockFile, "exclusive", exclusive)
    assert registry.take_life("it") is None
    assert limits == [1.0]
    life.close()
    again = registry.take_life("it")
    assert again is not None
    again.close()
    monkeypatch.setattr(LockFile, "is_current", lambda lock: False)
    assert registry.take_life("it") is None
    assert not is_locked(registry.life_path("it"))
    monkeypatch.undo()
    assert ServerRegistry(registry.root / "nowhere").take_life("it") is None


def test_what_a_dead_server_has_left_is_removed_unless_a_process_is_busy_with_the_tag(registry: ServerRegistry) -> None:
    def files() -> list[str]:
        return sorted(path.suffix for path in registry.path.iterdir() if path.stem.partition("-")[0] == digest)

    digest = registry_module.digest_of("it")
    names = [registry.socket_name("it", one) for one in ("1234567890", "abcdefghij")]
    assert names == [f"{digest}-12345678.sock", f"{digest}-abcdefgh.sock"]
    for name in (*names, registry.socket_name("another", "12345678")):
        (registry.path / name).touch()
    with registry.tag_lock("it"):
        registry.tidy("it")
        assert files() == [".lock", ".sock", ".sock"]
    life = registry.take_life("it")
    assert life is not None
    registry.tidy("it")
    assert files() == [".life", ".lock", ".sock", ".sock"]
    life.close()
    registry.tidy("it")
    assert files() == []
    assert (registry.path / registry.socket_name("another", "12345678")).exists()
    registry.tidy("it")
    ServerRegistry(registry.root / "nowhere").tidy("it")


def test_one_process_at_a_time_looks_for_a_tags_server(registry: ServerRegistry) -> None:
    with registry.tag_lock("it"):
        with pytest.raises(LockTimeoutError), registry.tag_lock("it", 0.0):
            pass
        with registry.tag_lock("another", 0.0):
            pass
    with pytest.raises(ValueError, match="failed"), registry.tag_lock("it", 0.0):
        raise ValueError("failed")
    with registry.tag_lock("it", 0.0):
        # A client of the registry needs no other lock.
        assert not is_locked(registry.path / "lifecycle.lock")
    another = ServerRegistry(registry.root)
    with another.tag_lock("it"):
        assert another._alive is not None, "the registry stays while it looks"
    another.leave()


def test_a_lock_that_was_replaced_while_it_was_waited_for_is_taken_again(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, locks = iter([False, True]), []
    monkeypatch.setattr(LockFile, "is_current", lambda lock: next(current))

    def take(lock: LockFile) -> None:
        locks.append(lock)

    lock = registry._lock(str(registry.path / "a.lock"), take)
    assert [one.fd >= 0 for one in locks] == [False, True]
    assert lock is locks[1]
    lock.close()

    def fail(lock: LockFile) -> None:
        locks.append(lock)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry._lock(str(registry.path / "a.lock"), fail)
    assert locks[-1].fd < 0
    monkeypatch.undo()


def test_a_key_is_read_under_a_lock_only_until_it_is_there(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[str, float]] = []
    for name in ("shared", "exclusive"):
        take = getattr(LockFile, name)

        def note(lock: LockFile, timeout_seconds: float, name: str = name, take: Any = take) -> None:
            waits.append((name, timeout_seconds))
            take(lock, timeout_seconds)

        monkeypatch.setattr(LockFile, name, note)
    key = registry.key()
    assert waits == [("shared", SHORT_LOCK_TIMEOUT_S), ("exclusive", SHORT_LOCK_TIMEOUT_S)]
    waits.clear()
    assert registry.key() == key
    assert waits == []
    # One that another process makes just now.
    contents = registry_module._contents
    monkeypatch.setattr(registry_module, "_contents", lambda path: b"")
    assert registry.key() == key
    assert waits == [("shared", SHORT_LOCK_TIMEOUT_S)]
    assert contents(registry.path / "key") == key
    waits.clear()
    # Or while this one waits for its turn.
    pread, early = os.pread, [b"too short"]
    monkeypatch.setattr(os, "pread", lambda *arguments: early.pop() if early else pread(*arguments))
    assert registry.key() == key
    assert [name for name, _ in waits] == ["shared", "exclusive"]


# Which registry.


def test_where_no_temporary_file_can_be_written_a_path_is_a_folder_like_any_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def finds_none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(registry_module, "_registries", {})
    monkeypatch.setattr(registry_module, "_registries_by_argument", {})
    monkeypatch.setattr(tempfile, "gettempdir", finds_none)
    assert registry_module.registry_for(str(tmp_path)).root == Path(root_below(str(tmp_path)))
    assert registry_module.registry_for(None).root == default_root()


def test_a_process_has_one_object_for_each_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry_module, "_registries", {})
    monkeypatch.setattr(registry_module, "_registries_by_argument", {})
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(tmp_path / "runtime"))
    default = registry_module.registry_for(None)
    assert default.root == tmp_path / "runtime"
    assert registry_module.registry_for(tempfile.gettempdir()) is default
    below = registry_module.registry_for(str(tmp_path))
    assert below is not default
    assert registry_module.registry_for(str(tmp_path)) is below
    as_path: Any = tmp_path
    assert registry_module.registry_for(as_path) is below
    assert registry_module.registry_at(default.root) is default
    # Another setting, or another user.
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(tmp_path / "other"))
    assert registry_module.registry_for(None).root == tmp_path / "other"
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(tmp_path / "runtime"))
    assert registry_module.registry_for(None) is default
    keys = set(registry_module._registries_by_argument)
    assert len(keys) == 4
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    registry_module.registry_for(None)
    assert len(registry_module._registries_by_argument) == 5
    monkeypatch.undo()


def test_a_relative_folder_is_looked_up_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry_module, "_registries", {})
    monkeypatch.setattr(registry_module, "_registries_by_argument", {})
    roots = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        roots.append(registry_module.registry_for("relative").root)
    assert roots == [tmp_path / name / "relative" / f"mpmm-{os.getuid()}" for name in ("one", "two")]


def test_a_registry_that_cannot_be_left_keeps_no_other_from_being_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []

    def leave(name: str) -> None:
        left.append(name)
        raise OSError("gone")

    registries = {name: SimpleNamespace(leave=lambda name=name: leave(name)) for name in ("one", "two")}
    monkeypatch.setattr(registry_module, "_registries", registries)
    registry_module.leave_all_registries()
    assert left == ["one", "two"]


def test_tags_of_any_characters_have_short_names_of_their_own() -> None:
    tags = ["it", "It", "a/b", "ä", "\ud800", "x" * 1000, ""]
    names = [registry_module.digest_of(tag) for tag in tags]
    assert len(set(names)) == len(tags)
    assert {len(name) for name in names} == {20}
    assert all(name.isalnum() for name in names)


def test_a_server_is_looked_for_again_once_it_has_answered(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []
    looks: list[tuple[bool, None]] = []
    answers: list[bool] = []

    def ask(tag: str, deadline: float) -> bool:
        asked.append((tag, deadline))
        return answers.pop(0)

    monkeypatch.setattr(registry_module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(registry, "look", lambda tag: looks.pop(0))
    monkeypatch.setattr(registry, "ask_for_files", ask)

    def find(*seen: bool, says: list[bool], **options: float) -> None:
        looks[:] = [(lives, None) for lives in seen]
        answers[:] = says
        asked.clear()
        assert registry.find("it", **options) == (seen[-1], None)
        assert not looks
        assert not answers

    find(True, says=[])
    assert asked == []
    find(False, says=[False])
    assert asked == [("it", 100.0 + ANSWERS_WITHIN_S)]
    find(False, True, says=[True], timeout_s=math.inf)
    assert asked == [("it", math.inf)]
    # It cannot restore them.
    find(False, False, says=[True])


def test_a_server_is_asked_for_its_files_until_there_is_something_to_find_or_it_is_time(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, lives = [100.0], [False]
    monkeypatch.setattr(registry_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(registry, "look", lambda tag: (lives[0], None))

    def wait(address: bytes | None, give_up: Callable[[], bool]) -> bool:
        assert address == address_for(str(registry.root), digest_of("it"))
        said = [give_up()]
        now[0] = 101.0
        said.append(give_up())
        now[0], lives[0] = 100.0, True
        said.append(give_up())
        return said == [False, True, True]

    monkeypatch.setattr(registry_module, "wait_for_answer", wait)
    assert registry.ask_for_files("it", 101.0) is True


def test_a_server_whose_socket_is_missing_is_asked_to_put_it_back(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []
    monkeypatch.setattr(registry, "ask_for_files", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(registry_module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    record = new_record(registry, "it", spawned=True, ready=True)
    registry.restore_socket(record)
    assert asked == [("it", 100.0 + ANSWERS_WITHIN_S)]
    (registry.path / record.socket_name).touch()
    registry.restore_socket(record)
    assert len(asked) == 1
