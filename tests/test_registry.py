"""The registry of shared objects in one process: its key, its locks, and its lifetime."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from mpmm.multi_process_shared import registry as registry_module
from mpmm.multi_process_shared.forkserver.zygote import _Zygote
from mpmm.multi_process_shared.host import new_record
from mpmm.multi_process_shared.registry import KEY_BYTES, ServerRecord, ServerRegistry, start_time_of, write_record
from mpmm.multi_process_shared.server_process import AliveLock
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.runtime_dir import RuntimeDirectory


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


@pytest.mark.parametrize("server", ["is leaving", "was killed", "has not said who it is"])
def test_who_leaves_a_registry_last_waits_for_a_server_that_is_about_to_be_gone(
    registry: ServerRegistry, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    life = registry.take_life("it")
    assert life is not None
    record = new_record(registry, "it", spawned=True, ready=True)
    if server == "is leaving":
        write_record(life, replace(record, leaving=True))
    elif server == "was killed":
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
