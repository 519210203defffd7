"""Whether a member lives: by its lock, by its pid if the lock says nothing, and as seen from another container."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
from harness import NOBODYS_PID

from mpmm.shared_state import liveness
from mpmm.shared_state.layout import Header, Member
from mpmm.shared_state.liveness import (
    has_living_member,
    is_member_here,
    lives_by_pid,
    member_lives,
    member_of_row_lives,
    pid_namespace,
)
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.namespace import Namespace

ALWAYS_NS = 1 << 62


@pytest.fixture
def joined(namespace: str) -> Iterator[Namespace]:
    """The membership of this process, in slot 0 of a namespace of its own."""
    found = Namespace.join(namespace)
    yield found
    found.leave()


@pytest.mark.parametrize("there", [True, False], ids=["a pid that is there", "a pid that is not"])
@pytest.mark.parametrize("here", [True, False], ids=["same pids", "other pids"])
@pytest.mark.parametrize("lock", ["held", "free", "gone", "another one"])
def test_the_lock_decides_and_where_it_says_nothing_the_pid_if_that_means_something_here(
    tmp_path: Path, lock: str, here: bool, there: bool
) -> None:
    path = tmp_path / "m0.lock"
    file = LockFile(path)
    inode = file.identity[1]
    if lock == "held":
        assert file.try_exclusive()
    elif lock == "gone":
        path.unlink()
    elif lock == "another one":
        inode += 1
    pids_of = pid_namespace() + (not here)
    pid = os.getpid() if there else NOBODYS_PID
    expected = {"held": True, "free": False}.get(lock, there or not here)
    assert member_lives(str(path), inode, pid, ALWAYS_NS, pids_of) is expected
    file.close()


def test_a_row_says_which_lock_pid_and_time_are_its_members(joined: Namespace) -> None:
    words, at = joined.segment.words, joined.tables.member(0)
    with mock.patch.object(liveness, "member_lives", return_value=True) as asked:
        assert member_of_row_lives(joined.tables, 0, "a path") is True
    inode = os.stat(joined.member_lock_path(0)).st_ino
    asked.assert_called_once_with(
        "a path", inode, os.getpid(), words[at + Member.ATTACHED], words[Header.PID_NAMESPACE]
    )
    assert words[Header.PID_NAMESPACE] == pid_namespace()


@pytest.mark.parametrize("kinds", [(Member.WORKER,), (Member.SERVER,), (Member.WORKER, Member.SERVER, Member.GUEST)])
@pytest.mark.parametrize("living", [(), (0,), (1,), (0, 1)])
def test_a_namespace_has_a_living_member_if_one_of_the_kind_lives(
    joined: Namespace, monkeypatch: pytest.MonkeyPatch, living: tuple[int, ...], kinds: tuple[int, ...]
) -> None:
    server = Namespace.join(joined.name, kind=Member.SERVER)
    asked: list[str] = []

    def lives(tables: object, slot: int, lock_path: str) -> bool:
        asked.append(lock_path)
        return slot in living

    monkeypatch.setattr(liveness, "member_of_row_lives", lives)
    wanted = {slot for slot, kind in enumerate((Member.WORKER, Member.SERVER)) if kind in kinds}
    found = has_living_member(joined.tables, joined.runtime.path, kinds)
    assert found is bool(wanted & set(living))
    assert set(asked) <= {joined.member_lock_path(slot) for slot in wanted}
    if len(kinds) == 3:
        assert has_living_member(joined.tables, joined.runtime.path) is found
    monkeypatch.undo()
    server.leave()


def test_the_pids_of_a_process_are_those_of_its_namespace_and_unknown_without_proc(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert pid_namespace() == os.stat("/proc/self/ns/pid").st_ino

    def refuse(*_: object) -> None:
        raise PermissionError

    # What was found before must be forgotten afterwards.
    uncached: Callable[[], int] = pid_namespace.__wrapped__
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refuse)
        assert uncached() == 0


# ---- as seen from another container ------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [0, None], ids=["unknown here", "the same"])
def test_where_all_have_the_same_pids_a_pid_is_the_members(
    joined: Namespace, monkeypatch: pytest.MonkeyPatch, own: int | None
) -> None:
    joined.segment.words[joined.tables.member(0) + Member.PID] = NOBODYS_PID
    if own is not None:
        monkeypatch.setattr(liveness, "pid_namespace", lambda: own)
    assert is_member_here(joined.tables, 0) is True


@pytest.mark.parametrize(
    ("slot", "file", "there", "expected"),
    [(0, 0, True, True), (0, 1, True, False), (1, 0, True, False), (0, 0, False, False)],
    ids=["its lock", "another file of that name", "its file by another name", "no such process"],
)
@pytest.mark.parametrize("pids_of", [0, 1], ids=["several containers", "another container"])
def test_among_several_containers_a_process_is_the_member_whose_lock_it_has_open(
    joined: Namespace, pids_of: int, slot: int, file: int, there: bool, expected: bool
) -> None:
    words, at = joined.segment.words, joined.tables.member(slot)
    other = Namespace.join(joined.name)
    other.leave()
    before = [words[at + word] for word in range(Member.WORDS)]
    words[Header.PID_NAMESPACE] = pids_of
    words[at + Member.STATE], words[at + Member.PID] = Member.WORKER, os.getpid() if there else NOBODYS_PID
    words[at + Member.LOCK] = os.stat(joined.member_lock_path(0)).st_ino + file
    assert is_member_here(joined.tables, slot) is expected
    for word, value in enumerate(before):
        words[at + word] = value


# ---- by its pid --------------------------------------------------------------------------------------------------


@pytest.fixture
def started_s(monkeypatch: pytest.MonkeyPatch) -> int:
    """When this process started, by a clock whose ticks are seconds."""
    monkeypatch.setattr(os, "sysconf", {"SC_CLK_TCK": 1}.__getitem__)
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])


@pytest.mark.parametrize(
    ("asleep_s", "later_s", "lives"),
    [
        (0.0, 0.0, True),
        (0.0, 10.0, True),
        (0.0, -0.04, True),
        (0.0, -0.06, False),
        (0.0, -0.9, False),
        (100.0, -100.0, True),
        (100.0, -100.04, True),
        (100.0, -100.06, False),
        # The two clocks are not read at the same moment.
        (-100.0, 0.0, True),
        (-100.0, -0.06, False),
    ],
)
def test_a_process_is_the_member_if_it_is_not_younger(
    monkeypatch: pytest.MonkeyPatch, started_s: int, asleep_s: float, later_s: float, lives: bool
) -> None:
    clocks = SimpleNamespace(CLOCK_BOOTTIME=7, clock_gettime={7: 500.0 + asleep_s}.__getitem__, monotonic=lambda: 500.0)
    monkeypatch.setattr(liveness, "time", clocks)
    assert lives_by_pid(os.getpid(), int((started_s + later_s) * 1e9)) is lives


def test_a_process_that_started_within_the_tick_in_which_the_member_attached_may_be_that(
    monkeypatch: pytest.MonkeyPatch, started_s: int
) -> None:
    monkeypatch.setattr(liveness, "TICK_S", 0.0)
    monkeypatch.setattr(
        liveness, "time", SimpleNamespace(CLOCK_BOOTTIME=7, clock_gettime=lambda _: 1.0, monotonic=lambda: 1.0)
    )
    assert lives_by_pid(os.getpid(), started_s * 10**9) is True
    assert lives_by_pid(os.getpid(), started_s * 10**9 - 1000) is False


@pytest.mark.parametrize(
    ("error", "there", "lives"),
    [
        (ProcessLookupError(), True, False),
        (FileNotFoundError(), True, True),
        (FileNotFoundError(), False, False),
        (PermissionError(), False, True),
        (None, False, True),
    ],
    ids=["it ends", "no such file", "it has ended", "denied", "a file that says nothing"],
)
def test_what_proc_does_not_tell_of_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError | None, there: bool, lives: bool
) -> None:
    (tmp_path / "stat").write_text("nothing")
    opened = open

    def refuse(path: str, mode: str) -> object:
        if error is not None:
            raise error
        return opened(tmp_path / "stat", mode)

    monkeypatch.setattr(liveness, "open", refuse, raising=False)
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: there)
    assert lives_by_pid(os.getpid(), 1) is lives


def test_a_process_that_is_not_there_is_dead() -> None:
    assert lives_by_pid(NOBODYS_PID, ALWAYS_NS) is False
    assert lives_by_pid(os.getpid(), time.monotonic_ns()) is True
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert lives_by_pid(child, ALWAYS_NS) is False
    os.waitpid(child, 0)
