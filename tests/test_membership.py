"""Joining a namespace, being a member and leaving it, condition by condition, in one process."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from crash_lab import run_in_child
from harness import NOBODYS_PID, files_in, open_descriptors, segments_of
from test_lock_file import Clock
from test_removal import desert

from mpmm.errors import (
    ClosedError,
    InvalidArgumentError,
    LayoutMismatchError,
    LockTimeoutError,
    RuntimeDirectoryError,
    SegmentAllocationError,
    SegmentCorruptError,
    SegmentLostError,
    TableFullError,
)
from mpmm.shared_state import creation, lock_file
from mpmm.shared_state import namespace as namespace_module
from mpmm.shared_state.creation import NoNamespaceError, StartAgain, open_or_replace
from mpmm.shared_state.layout import Capacities, Header, Member
from mpmm.shared_state.lifecycle import Lifecycle
from mpmm.shared_state.liveness import pid_namespace
from mpmm.shared_state.lock_file import LockFile, is_locked, write_once
from mpmm.shared_state.member_files import MemberFiles
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import Segment, SegmentProblem, segment_name
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot

KINDS = [Member.WORKER, Member.SERVER, Member.GUEST]


@pytest.fixture
def joined(namespace: str) -> Iterator[Namespace]:
    """The membership of a worker, in slot 0."""
    made = Namespace.join(namespace)
    yield made
    made.leave()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all that wait for locks on files."""
    made = Clock()
    for module in (lock_file, namespace_module):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def nothing_open() -> Iterator[None]:
    """Check that no descriptor is left open."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def row_of(member: Namespace, word: int, slot: int | None = None) -> int:
    """Return a word of a member's row."""
    at = member.tables.member(member.slot if slot is None else slot)
    return int(member.segment.words[at + word])


def is_exclusive(member: Namespace) -> bool:
    """Tell whether another worker could take the lock that says that no worker is left."""
    lock = LockFile(member.runtime.file("alive.lock"))
    taken = lock.try_exclusive()
    lock.close()
    return taken


# ---- joining -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared", "shared.gone.1"])
def test_the_folder_of_the_servers_is_no_namespace_nor_are_its_remains(runtime_root: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="the folder of the model servers has this name"):
        Namespace.join(name)
    assert files_in(runtime_root) == []


@pytest.mark.parametrize("name", ["shared.gon", "sharedx", "shared.gone"])
def test_a_name_that_only_looks_like_that_of_the_servers_is_possible(name: str) -> None:
    Namespace.join(name).leave()


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_says_who_it_is(namespace: str, kind: int) -> None:
    joined = Namespace.join(namespace, kind=kind, label="a label")
    process = psutil.Process()
    row = [row_of(joined, word) for word in (Member.STATE, Member.PID, Member.LOCK)]
    assert row == [kind, os.getpid(), os.fstat(joined.life_fd).st_ino]
    assert row_of(joined, Member.STARTED_WALL) == int(process.create_time() * 1e9)
    assert joined.tables.text(joined.tables.member(0) + Member.NAME) == b"a label"
    assert joined.segment.words[Header.PID_NAMESPACE] == pid_namespace()
    assert (joined.name, joined.kind, joined.slot, joined.reference) == (namespace, kind, 0, 1)
    assert (joined.is_usable, joined.is_inherited, joined.is_removed) == (True, False, False)
    assert is_exclusive(joined) is (kind != Member.WORKER)
    alive = str(joined.runtime.file("alive.lock"))
    assert any(one.endswith(alive) for one in open_descriptors()) is (kind == Member.WORKER)
    other = Namespace.join(namespace)
    assert (other.slot, other.reference) == (1, 2)
    joined.leave()
    other.leave()
    with pytest.raises(ClosedError, match=f"has left the namespace '{namespace}'"):
        joined.transaction()
    assert (joined.is_usable, joined.is_removed) == (False, True)


def test_nothing_is_made_if_the_environment_asks_for_the_impossible(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPMM_CORE", "fast")
    with pytest.raises(InvalidArgumentError, match="MPMM_CORE"):
        Namespace.join("n")
    monkeypatch.delenv("MPMM_CORE")
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/proc/self/stat" and exists(path))
    with pytest.raises(RuntimeDirectoryError, match="none is mounted here") as caught:
        Namespace.join("n")
    assert caught.value.path == "/proc"
    assert files_in(runtime_root) == []
    # Other systems never have it.
    monkeypatch.setattr(sys, "platform", "darwin")
    Namespace.join("n").leave()


def test_one_that_must_find_a_namespace_makes_none(namespace: str, runtime_root: Path) -> None:
    text = f"there is no namespace '{namespace}' in {runtime_root}"
    with pytest.raises(FileNotFoundError, match=text):
        Namespace.join(namespace, must_exist=True)
    assert files_in(runtime_root) == []
    RuntimeDirectory(namespace).ensure()
    with pytest.raises(FileNotFoundError, match=text) as caught:
        Namespace.join(namespace, must_exist=True)
    assert type(caught.value) is FileNotFoundError
    assert segments_of(runtime_root) == set()
    first = Namespace.join(namespace)
    Namespace.join(namespace, must_exist=True).leave()
    first.leave()


@pytest.mark.usefixtures("nothing_open")
@pytest.mark.parametrize(("timeout_s", "waits_s"), [(2.0, 2.0), (0.0, 0.0), (-1.0, 0.0)])
@pytest.mark.parametrize("lock", ["lifecycle.lock", "alive.lock"])
def test_one_that_joins_waits_for_the_locks_of_others_as_long_as_it_may(
    namespace: str, clock: Clock, lock: str, timeout_s: float, waits_s: float
) -> None:
    server = Namespace.join(namespace, kind=Member.SERVER)
    other = LockFile(server.runtime.file(lock))
    assert other.try_exclusive()
    with pytest.raises(LockTimeoutError) as caught:
        Namespace.join(namespace, timeout_s=timeout_s)
    assert caught.value.timeout_seconds == waits_s
    # None where the kernel lists no locks.
    assert caught.value.holder_pid == next(iter(other.holders()), None)
    assert waits_s <= sum(clock.pauses) <= waits_s + 0.01
    # The error keeps all variables of the functions.
    mine = [one for one in open_descriptors() if namespace in one]
    del caught
    assert [one for one in open_descriptors() if namespace in one] == mine
    other.close()
    server.leave()
    # Which a server does not remove.
    Namespace.join(namespace).leave()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (TableFullError("full", table="members", capacity=1, setting="s"), TableFullError),
        (OSError("no"), OSError),
        *((kind("junk"), SegmentCorruptError) for kind in (IndexError, KeyError, ValueError, OverflowError)),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("where", ["_enter", "__init__", "Transitions"])
def test_a_failure_to_join_leaves_nothing_open(
    joined: Namespace, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, raised: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error

    if where == "_enter":
        monkeypatch.setattr(Namespace, "_enter", fail)
    elif where == "__init__":
        monkeypatch.setattr(namespace_module, "make_core", fail)
    else:
        monkeypatch.setattr(namespace_module, "MemberFiles", fail)
    before, kept = open_descriptors(), []
    try:
        Namespace.join(joined.name)
    except BaseException as caught:
        kept.append(caught)
        assert open_descriptors() == before
    expected = raised if where == "_enter" else type(error)
    assert type(kept[0]) is expected
    if expected is SegmentCorruptError:
        assert f"holds what mpmm never writes ({error!r})" in str(kept[0])
    kept.clear()
    assert joined.tables.used_members() == [0]


def test_a_membership_whose_making_is_interrupted_can_be_left(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    made: list[Namespace] = []
    before = open_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(namespace_module, "Transitions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Namespace.join(namespace, made=made)
    [half] = made
    assert half.slot < 0
    half.leave()
    assert half.is_usable is False
    assert open_descriptors() == before
    whole = Namespace.join(namespace, made=made)
    assert made == [half, whole]
    whole.leave()
    assert segments_of(runtime_root) == set()


def test_one_that_finds_the_namespace_being_removed_begins_again_a_little_later(
    namespace: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    open_real, calls = creation.open_or_replace, list[bool]()

    def be_late(runtime: RuntimeDirectory, deserted: bool, must_exist: bool) -> object:
        calls.append(deserted)
        if len(calls) < 3:
            raise StartAgain
        return open_real(runtime, deserted, must_exist)

    monkeypatch.setattr(namespace_module, "open_or_replace", be_late)
    joined = Namespace.join(namespace)
    assert calls == [True, True, True]
    assert clock.pauses == [0.005, 0.005]
    joined.leave()


def test_one_whose_lifecycle_lock_is_replaced_meanwhile_takes_the_new_one(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exclusive, opened = LockFile.exclusive, list[LockFile]()

    def take_what_is_replaced(lock: LockFile, timeout_s: float) -> None:
        exclusive(lock, timeout_s)
        opened.append(lock)
        if len(opened) == 1:
            lock.path.unlink()

    monkeypatch.setattr(LockFile, "exclusive", take_what_is_replaced)
    joined = Namespace.join(namespace)
    assert len(opened) == 2
    joined.leave()


def test_one_whose_files_are_removed_again_and_again_says_so_after_a_minute(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    # The last one is a little later than the limit.
    times = [30.0, 60.0, 60.5]

    def find_nothing(*_: object) -> Namespace:
        clock.now = 1000.0 + times.pop(0)
        raise missing

    missing = FileNotFoundError("alive.lock")
    monkeypatch.setattr(Namespace, "_join_locked", find_nothing)
    with pytest.raises(RuntimeDirectoryError, match="are removed again and again while this process") as caught:
        Namespace.join("n")
    assert times == []
    assert caught.value.__cause__ is missing
    assert caught.value.path == str(runtime_root / "n")
    shutil.rmtree(runtime_root / "n")


def test_a_segment_for_which_there_is_no_memory_leaves_no_folder(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Segment:
        raise SegmentAllocationError("no room", name="n", size_bytes=1)

    monkeypatch.setattr(namespace_module, "create", refuse)
    with pytest.raises(SegmentAllocationError):
        Namespace.join(namespace)
    assert files_in(runtime_root) == []


def test_a_slot_whose_lock_is_held_is_passed_over_and_a_full_table_is_an_error(
    namespace: str, runtime_root: Path
) -> None:
    first = Namespace.join(namespace, capacities=Capacities(members=4))
    held = LockFile(first.member_lock_path(1))
    assert held.try_exclusive()
    second = Namespace.join(namespace)
    assert (second.slot, second.tables.used_members()) == (2, [0, 2])
    third = Namespace.join(namespace)
    before = open_descriptors()
    with pytest.raises(TableFullError, match="the members table of namespace 'test' is full: 4 processes") as caught:
        Namespace.join(namespace)
    assert (caught.value.table, caught.value.capacity, caught.value.setting) == ("members", 4, "Capacities.members")
    assert open_descriptors() == before
    held.close()
    for member in (third, second, first):
        member.leave()


def test_rows_of_the_dead_keep_no_newcomer_out(namespace: str) -> None:
    first = Namespace.join(namespace, capacities=Capacities(members=2))
    assert desert_from(first) == 1
    newcomer = Namespace.join(namespace)
    assert newcomer.slot == 1
    newcomer.leave()
    first.leave()


def desert_from(member: Namespace, kind: int = Member.WORKER) -> int:
    """Let a child join and die; return its slot."""
    desert(member.name, kind)
    [slot] = member.find_dead_members()
    return slot


def test_members_of_several_containers_are_told_from_those_of_one(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Namespace.join(namespace)
    words = first.segment.words
    for own, expected in ((pid_namespace(), pid_namespace()), (1, 0), (pid_namespace(), 0)):
        with monkeypatch.context() as patched:
            patched.setattr(namespace_module, "pid_namespace", lambda own=own: own)
            Namespace.join(namespace).leave()
        assert words[Header.PID_NAMESPACE] == expected
    first.leave()


# ---- the segment that it joins or makes --------------------------------------------------------------------------


def deserted_with(name: str, action: Callable[[Namespace], object], **arguments: Any) -> None:
    """Let a child join, do something, and die."""

    def work() -> None:
        action(Namespace.join(name, **arguments))
        os._exit(0)

    assert run_in_child(work) == 0


def estimate(member: Namespace, tag: str, mb: float | None) -> None:
    """Make a model, with an estimate unless it is None."""
    with member.transaction() as t:
        row = member.transitions.models.claim(t, tag, tag.encode())
        if mb is not None:
            member.transitions.estimates.estimate(t, row, mb, True, 2.5)


def test_estimates_outlive_the_dead_and_nothing_else_does(namespace: str) -> None:
    def work(member: Namespace) -> None:
        for tag, mb in (("a", 100.0), ("unknown", None), ("b", 200.0)):
            estimate(member, tag, mb)
        with member.transaction() as t:
            t.set(Header.LOADS, 7)

    deserted_with(namespace, work, capacities=Capacities(models=5), settings=Settings(max_waiting=3.0))
    joined = Namespace.join(namespace, capacities=Capacities(models=6), settings=Settings(max_waiting=4.0))
    snapshot = read_snapshot(namespace)
    found = {model.tag: (model.estimate_mb, model.measured, model.sd_mb) for model in snapshot.models}
    assert found == {"a": (100.0, True, 2.5), "b": (200.0, True, 2.5)}
    assert snapshot.loads == 0
    assert (joined.segment.layout.capacities.models, joined.settings.max_waiting) == (6, 4.0)
    joined.leave()


def test_as_many_estimates_are_kept_as_there_is_room_for(namespace: str) -> None:
    def work(member: Namespace) -> None:
        for number in range(4):
            estimate(member, f"model {number}", 100.0)

    deserted_with(namespace, work)
    joined = Namespace.join(namespace, capacities=Capacities(models=2))
    assert len(read_snapshot(namespace).models) == 2
    joined.leave()


@pytest.mark.parametrize("left", ["worker", "server"])
def test_a_segment_in_which_a_member_lives_is_taken_over_as_it_is(namespace: str, left: str) -> None:
    kind = Member.WORKER if left == "worker" else Member.SERVER
    first = Namespace.join(namespace, kind=kind, capacities=Capacities(models=5), settings=Settings(max_waiting=3.0))
    second = Namespace.join(namespace, capacities=Capacities(models=6), settings=Settings(max_waiting=4.0))
    assert second.segment.identity == first.segment.identity
    assert (second.segment.layout.capacities.models, second.settings.max_waiting) == (5, 3.0)
    second.leave()
    first.leave()


@pytest.mark.parametrize("deserted", [True, False])
@pytest.mark.parametrize("closed", [True, False])
def test_a_segment_that_is_closed_is_replaced_or_waited_for(
    joined: Namespace, monkeypatch: pytest.MonkeyPatch, closed: bool, deserted: bool
) -> None:
    monkeypatch.setattr(creation, "close_segment", lambda *_: False)
    words, before = joined.segment.words, open_descriptors()
    words[Header.CLOSED] = Header.IS_CLOSED if closed else 0
    if closed and not deserted:
        with pytest.raises(StartAgain) as caught:
            open_or_replace(joined.runtime, deserted, False)
        assert caught.value.__traceback__ is not None
        assert open_descriptors() == before
    else:
        segment, estimates = open_or_replace(joined.runtime, deserted, False)
        assert estimates == ()
        assert (segment is None) is closed
        assert joined.segment.is_current() is not closed
        if segment is not None:
            segment.close()
    words[Header.CLOSED] = 0


def test_what_is_not_there_is_lost_or_to_be_made_or_an_error(namespace: str) -> None:
    runtime = RuntimeDirectory(namespace)
    runtime.ensure()
    with pytest.raises(SegmentLostError):
        open_or_replace(runtime, False, False)
    with pytest.raises(SegmentLostError):
        open_or_replace(runtime, False, True)
    with pytest.raises(NoNamespaceError, match="there is no namespace 'test'"):
        open_or_replace(runtime, True, True)
    assert open_or_replace(runtime, True, False) == (None, ())
    runtime.remove()


def test_a_segment_that_is_not_ours_is_refused_in_use_and_replaced_where_deserted(
    joined: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    words, name = joined.segment.words, joined.segment.name
    for word, value, found in (
        (Header.VERSION, 999, "layout version 999"),
        (Header.SETTINGS, 2**64 - 1, "parameters that cannot be"),
        (Header.TOKEN, words[Header.TOKEN] ^ 1, "a segment of another runtime directory"),
    ):
        before = words[word]
        words[word] = value
        with pytest.raises(LayoutMismatchError, match=f"incompatible segment {name}: found {found}") as caught:
            open_or_replace(joined.runtime, False, False)
        assert caught.value.name == name
        assert caught.value.found.startswith(found)
        words[word] = before
    words[Header.VERSION] = 999
    with caplog.at_level(logging.INFO, "mpmm"):
        assert open_or_replace(joined.runtime, True, False) == (None, ())
    assert "replacing a stale segment: found layout version 999" in caplog.text
    assert not joined.segment.is_current()
    with pytest.raises(SegmentProblem, match="parameters that cannot be"):
        words[Header.SETTINGS] = 2**64 - 1
        creation.read_settings(joined.segment)


def test_a_token_that_was_removed_comes_back_with_the_next_member(joined: Namespace) -> None:
    token = joined.runtime.file("token")
    text = token.read_text()
    token.unlink()
    second = Namespace.join(joined.name)
    assert token.read_text() == text == f"{joined.segment.words[Header.TOKEN]:016x}"
    second.leave()


@pytest.mark.parametrize("junk", ["", "no number", "zz"])
def test_a_token_that_says_nothing_is_replaced(namespace: str, junk: str) -> None:
    runtime = RuntimeDirectory(namespace)
    runtime.ensure()
    runtime.file("token").write_text(junk)
    joined = Namespace.join(namespace)
    assert runtime.file("token").read_text() == f"{joined.segment.words[Header.TOKEN]:016x}"
    joined.leave()


def test_a_token_that_another_process_makes_meanwhile_is_taken(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_late(path: Path, text: str) -> bool:
        if not path.exists():
            path.write_text("00000000000000ff")
        return write_once(path, text)

    monkeypatch.setattr(creation, "write_once", write_late)
    joined = Namespace.join(namespace)
    assert joined.segment.words[Header.TOKEN] == 0xFF
    joined.leave()


@pytest.mark.parametrize("longer", [0, 1])
def test_a_root_is_noted_if_there_is_room_for_its_path(tmp_path: Path, longer: int) -> None:
    root = tmp_path / "r"
    length = Header.ROOT_BYTES + longer
    while length - len(str(root)) > 200:
        root /= 150 * "x"
    root /= (length - len(str(root)) - 1) * "y"
    root.mkdir(parents=True)
    root.chmod(0o700)
    joined = Namespace.join("n", root=root)
    assert len(str(root)) == length
    assert joined.tables.text(Header.ROOT) == (b"" if longer else os.fsencode(root))
    joined.leave()


def test_one_that_makes_a_namespace_sweeps_what_the_dead_have_left(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[bool] = []
    monkeypatch.setattr(creation, "sweep_orphans", lambda: swept.append(True))
    monkeypatch.setattr("mpmm.shared_state.runtime_dir.REMOVAL_S", -1.0)
    left = runtime_root / ".n.gone.1"
    left.mkdir()
    joined = Namespace.join(namespace)
    assert not left.exists()
    second = Namespace.join(namespace)
    assert swept == [True]
    second.leave()
    joined.leave()


def test_one_that_makes_a_namespace_begins_again_if_another_one_has_made_it(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, name = Segment.create, segment_name(runtime_root, namespace)

    def be_late(*arguments: Any) -> Segment:
        monkeypatch.undo()
        Path("/dev/shm", name).touch()
        return make(*arguments)

    monkeypatch.setattr(Segment, "create", be_late)
    Namespace.join(namespace, root=runtime_root).leave()


# ---- being one ---------------------------------------------------------------------------------------------------


def test_settings_that_were_changed_are_read_in_the_next_transaction_and_once(joined: Namespace) -> None:
    words, floats = joined.segment.words, joined.segment.floats
    place = Header.SETTINGS + list(vars(Settings())).index("lock_timeout_seconds")
    changes = joined.lock.changes
    joined.follow_settings()
    assert joined.lock.changes == changes, "nothing was changed"
    words[Header.SETTINGS_CHANGED], floats[place] = 7, 5.0
    assert joined.settings.lock_timeout_seconds == 60.0
    with joined.transaction():
        assert joined.settings.lock_timeout_seconds == 5.0
        floats[place] = 6.0
        assert joined.settings.lock_timeout_seconds == 5.0
    assert joined.lock.timeout_seconds == 5.0
    assert joined.settings.lock_timeout_seconds == 5.0
    words[Header.SETTINGS_CHANGED] = 8
    joined.follow_settings()
    assert (joined.settings.lock_timeout_seconds, joined.lock.timeout_seconds) == (6.0, 6.0)
    changes = joined.lock.changes
    joined.follow_settings()
    assert joined.lock.changes == changes


@pytest.mark.parametrize("step", ["give_up", "close"])
def test_a_last_member_whose_leave_an_exception_ends_keeps_nobody_out(
    namespace: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    Namespace.join(namespace).leave()
    before = open_descriptors()
    joined = Namespace.join(namespace)
    alive = joined.runtime.file("alive.lock")

    def interrupted(files: MemberFiles) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    # It holds `alive.lock` exclusively by then.
    monkeypatch.setattr(MemberFiles, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        joined.leave()
    assert joined.is_usable is False
    assert not (alive.exists() and is_locked(alive))
    assert open_descriptors() == before
    Namespace.join(namespace).leave()


def test_a_namespace_counts_as_removed_once_it_is_closed_or_left(joined: Namespace) -> None:
    words = joined.segment.words
    for closed, removed in ((Header.IS_CLOSED, True), (1, False), (0, False)):
        words[Header.CLOSED] = closed
        assert joined.is_removed is removed


def test_a_member_knows_that_it_lives_itself_and_asks_about_others(joined: Namespace) -> None:
    other = Namespace.join(joined.name)
    dead = desert_from(joined)
    for member in (joined, other):
        member.segment.words[joined.tables.member(member.slot) + Member.PID] = NOBODYS_PID
    assert [joined.member_is_alive(slot) for slot in (0, 1, dead)] == [True, True, False]
    os.unlink(joined.member_lock_path(0))
    os.unlink(joined.member_lock_path(1))
    assert [joined.member_is_alive(slot) for slot in (0, 1)] == [True, False]
    assert joined.find_dead_members() == [1, dead]
    assert joined.member_lock_path(1) == str(joined.runtime.file("m1.lock"))
    joined.segment.words[joined.tables.member(1) + Member.PID] = os.getpid()
    other.leave()


@pytest.fixture
def dead(joined: Namespace) -> int:
    """The slot of a worker that has died, of a pid that no process has."""
    slot = desert_from(joined)
    joined.segment.words[joined.tables.member(slot) + Member.PID] = NOBODYS_PID
    return slot


@pytest.mark.parametrize("kind", [Member.WORKER, Member.SERVER])
def test_a_death_is_told_when_the_row_is_free(
    joined: Namespace, dead: int, caplog: pytest.LogCaptureFixture, kind: int
) -> None:
    joined.segment.words[joined.tables.member(dead) + Member.STATE] = kind
    with caplog.at_level(logging.DEBUG, "mpmm"):
        assert joined.reap_dead_members() == 1
    texts = [(record.levelno, record.getMessage()) for record in caplog.records]
    if kind == Member.SERVER:
        expected = (logging.DEBUG, f"mpmm {joined.name}: model server pid {NOBODYS_PID} has ended")
    else:
        freed = "has died; its holds, loads and places in the queue are free again"
        expected = (logging.INFO, f"mpmm {joined.name}: pid {NOBODYS_PID} {freed}")
    assert texts.count(expected) == 1
    assert joined.tables.used_members() == [0]
    result = joined.reap_dead_members()
    assert (result, type(result)) == (0, int)


def test_reaping_takes_as_many_transactions_as_it_takes(
    joined: Namespace, dead: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    members = type(joined.transitions.members)
    reap, steps = members.reap, list[int]()

    def reap_in_steps(self: Any, t: Any, slot: int) -> bool:
        steps.append(joined.lock.changes)
        return len(steps) % 3 == 0 and reap(self, t, slot)

    monkeypatch.setattr(members, "reap", reap_in_steps)
    with caplog.at_level(logging.INFO, "mpmm"):
        assert joined.reap_dead_members() == 1
    assert [later - steps[0] for later in steps] == [0, 2, 4]
    assert caplog.text.count("has died") == 1
    slot = desert_from(joined)
    joined.segment.words[joined.tables.member(slot) + Member.PID] = NOBODYS_PID
    for expected in (False, False, True, True):
        with joined.transaction() as t:
            assert joined.reap_if_dead(t, slot) is expected
    assert len(steps) == 6


def test_only_the_dead_are_reaped(joined: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Namespace.join(joined.name)
    free = other.slot + 1
    reaped: list[int] = []

    def reap(self: Any, t: Any, slot: int) -> bool:
        reaped.append(slot)
        return True

    monkeypatch.setattr(type(joined.transitions.members), "reap", reap)
    monkeypatch.setattr(joined, "find_dead_members", lambda: [other.slot, free])
    assert joined.reap_dead_members() == 0
    with joined.transaction() as t:
        assert [joined.reap_if_dead(t, slot) for slot in (joined.slot, other.slot, free)] == [True, True, True]
    assert reaped == []
    monkeypatch.undo()
    other.leave()


@pytest.mark.parametrize("change", [2, 4, 6, 9, 11])
def test_a_look_for_the_dead_undoes_what_a_member_has_left_and_else_takes_no_lock(
    joined: Namespace, change: int
) -> None:
    words = joined.segment.words
    words[Header.CHANGE] = change
    assert joined.reap_dead_members() == 0
    assert words[Header.CHANGE] == (change if change % 2 == 0 else change + 3)


def test_a_reset_takes_as_many_transactions_as_it_takes(joined: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, tuple[int, ...]]] = []
    results = iter([7, 5, None])

    def reset(t: Any, *before: int) -> int | None:
        calls.append((joined.lock.changes, before))
        return next(results)

    monkeypatch.setattr(joined.transitions, "reset", reset)
    joined.reset()
    assert [before for _, before in calls] == [(), (7,), (5,)]
    assert [change - calls[0][0] for change, _ in calls] == [0, 2, 4]


# ---- files for others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tries", [0, 1, 5, 6])
def test_a_file_is_opened_although_the_folder_is_removed_but_not_for_ever(
    joined: Namespace, monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    opened, put_back = list[Path](), list[bool]()

    def open_late(path: Path) -> LockFile:
        opened.append(path)
        if len(opened) <= tries:
            raise FileNotFoundError(path)
        return LockFile(path)

    with monkeypatch.context() as patched:
        patched.setattr(namespace_module, "LockFile", open_late)
        patched.setattr(MemberFiles, "put_back", lambda files: put_back.append(True))
        if tries == 6:
            with pytest.raises(FileNotFoundError):
                joined.open_lock_file("leader.lock")
        else:
            lock = joined.open_lock_file("leader.lock")
            assert lock.path == joined.runtime.file("leader.lock")
            lock.close()
    assert len(opened) == min(tries + 1, 6)
    assert len(put_back) == min(tries, 5)


# ---- leaving -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_open")
def test_the_last_worker_unloads_everything_and_removes_the_namespace(namespace: str, runtime_root: Path) -> None:
    members = [Namespace.join(namespace, kind=kind) for kind in (Member.SERVER, Member.WORKER, Member.WORKER)]
    unloaded: list[int] = []

    def unload(member: Namespace) -> Callable[[], None]:
        def note() -> None:
            assert member.is_usable
            assert is_locked(member.runtime.file("lifecycle.lock"))
            unloaded.append(member.slot)

        return note

    server, one, two = members
    one.leave(unload(one))
    assert unloaded == []
    assert server.is_removed is False
    assert segments_of(runtime_root) == {server.segment.name}
    assert read_snapshot(namespace).members[-1].slot == two.slot
    two.leave(unload(two))
    assert unloaded == [two.slot]
    assert server.is_removed is True
    assert (files_in(runtime_root), segments_of(runtime_root)) == ([], set())
    server.leave(unload(server))
    for member in members:
        # Leaving again does nothing.
        member.leave(unload(member))
    assert unloaded == [two.slot]


def test_a_member_that_is_no_worker_is_never_the_last(namespace: str, runtime_root: Path) -> None:
    guest = Namespace.join(namespace, kind=Member.GUEST)
    guest.leave(lambda: pytest.fail("it is no worker"))
    assert segments_of(runtime_root) == {guest.segment.name}
    Namespace.join(namespace).leave()


def test_an_error_while_the_last_worker_unloads_leaves_it_a_member(joined: Namespace) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        joined.leave(fail)
    assert joined.is_usable is True
    lock = LockFile(joined.runtime.file("alive.lock"))
    assert (lock.try_exclusive(), lock.try_shared()) == (False, True)
    lock.close()


def test_an_error_as_a_guest_leaves_is_raised(joined: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Namespace.join(joined.name, kind=Member.GUEST)

    def refuse(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(namespace_module, "Lifecycle", refuse)
        with pytest.raises(ZeroDivisionError):
            guest.leave()
    assert guest.is_usable is True
    guest.leave()
    assert guest.is_usable is False


def test_what_an_interrupt_has_left_of_a_leave_is_done_by_the_next_call(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    joined = Namespace.join(namespace)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Namespace, "_detach", interrupt)
        with pytest.raises(KeyboardInterrupt):
            joined.leave()
    assert joined.is_usable is False
    assert open_descriptors() != before
    joined.leave()
    assert open_descriptors() == before


@pytest.mark.parametrize("why", ["the lifecycle lock is held", "the folder is gone"])
def test_one_that_cannot_have_the_lifecycle_lock_leaves_without_and_removes_nothing(
    namespace: str,
    runtime_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
    why: str,
) -> None:
    joined = Namespace.join(namespace)
    name = joined.segment.name

    def no_folder(*_: object) -> Lifecycle:
        raise FileNotFoundError("gone")

    def leave() -> None:
        joined.leave(lambda: pytest.fail("it may not be the last"), timeout_s=3.0)

    if why == "the folder is gone":
        with monkeypatch.context() as patched:
            patched.setattr(namespace_module, "Lifecycle", no_folder)
            leave()
    else:
        with Lifecycle(joined.runtime):
            leave()
        assert 3.0 <= sum(clock.pauses) < 3.1
    assert f"mpmm {namespace}: leaving without the lifecycle lock: " in caplog.text
    assert joined.is_usable is False
    assert segments_of(runtime_root) == {name}
    newcomer = Namespace.join(namespace)
    assert newcomer.tables.used_members() == [0]
    newcomer.leave()


def last_of(member: Namespace) -> bool:
    """Tell whether a member takes itself for the last worker."""
    last = member._is_last()
    assert type(last) is bool
    return last


def test_the_last_worker_is_the_one_without_others_by_lock_and_by_row(joined: Namespace) -> None:
    guest = Namespace.join(joined.name, kind=Member.GUEST)
    assert last_of(guest) is False
    assert last_of(joined) is True
    alive = joined._files.alive
    assert alive is not None
    assert alive.try_shared()
    other = Namespace.join(joined.name)
    assert [last_of(member) for member in (joined, other)] == [False, False]
    assert not is_exclusive(joined)
    # The other one holds a lock on a file that is gone; its row tells of it.
    path = joined.runtime.file("alive.lock")
    path.unlink()
    assert last_of(joined) is False
    joined._files.put_back()
    assert last_of(joined) is False
    assert not is_exclusive(joined), "it has its shared lock again"
    other.leave()
    path.rename(path.with_name("aside"))
    path.touch()
    assert last_of(joined) is False, "a newcomer would lock another file"
    joined._files.put_back()
    assert last_of(joined) is True
    assert joined._files.alive is not None
    assert joined._files.alive.try_shared()
    path.with_name("aside").unlink()
    guest.leave()


@pytest.mark.parametrize("lock", ["free", "held"])
@pytest.mark.parametrize("others", [True, False])
def test_the_last_worker_closes_the_namespace_unless_another_one_has_come(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, others: bool, lock: str
) -> None:
    joined = Namespace.join(namespace, settings=Settings(lock_timeout_seconds=0.001))
    server = Namespace.join(namespace, kind=Member.SERVER)
    other = Namespace.join(namespace) if others else None
    words = server.segment.words
    monkeypatch.setattr(joined, "_is_last", lambda: True)
    stopped = joined.segment.lock_file()
    if lock == "held":
        assert stopped.try_exclusive()
    joined.leave()
    stopped.close()
    # Without the lock it cannot know of a newcomer; then none can have come.
    removed = not others or lock == "held"
    assert words[Header.CLOSED] == (Header.IS_CLOSED if removed else 0)
    assert server.segment.is_current() is not removed
    assert server.tables.member_in_use(0) is (lock == "held")
    for member in (server, other):
        if member is not None:
            member.leave()
    Namespace.join(namespace).leave()
    assert segments_of(runtime_root) == set()


def test_one_that_cannot_have_the_lock_and_is_not_the_last_closes_nothing(namespace: str) -> None:
    joined = Namespace.join(namespace, settings=Settings(lock_timeout_seconds=0.001))
    other = Namespace.join(namespace)
    stopped = joined.segment.lock_file()
    assert stopped.try_exclusive()
    joined.leave()
    stopped.close()
    assert other.segment.words[Header.CLOSED] == 0
    assert other.reap_dead_members() <= 1
    other.segment.words[other.tables.member(0) + Member.PID] = NOBODYS_PID
    other.leave()


def test_a_row_is_given_up_in_as_many_transactions_as_it_takes(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = Namespace.join(namespace)
    members = type(joined.transitions.members)
    leave, steps = members.leave, list[int]()

    def leave_in_steps(self: Any, t: Any, slot: int) -> bool:
        steps.append(joined.segment.words[Header.CLOSED])
        return len(steps) == 3 and leave(self, t, slot)

    monkeypatch.setattr(members, "leave", leave_in_steps)
    joined.leave()
    assert steps == [0, 0, 0], "it is closed when the row is free"
    assert segments_of(runtime_root) == set()


def test_a_join_that_had_to_begin_again_keeps_no_callers(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept:
        pass

    kept: weakref.WeakSet[Kept] = weakref.WeakSet()
    join_locked, tries = Namespace._join_locked, []

    def find_it_removed_once(*arguments: Any) -> Namespace:
        tries.append(1)
        if len(tries) == 1:
            raise FileNotFoundError
        return join_locked(*arguments)

    def join() -> None:
        own = Kept()
        kept.add(own)
        Namespace.join(namespace).leave()

    monkeypatch.setattr(Namespace, "_join_locked", find_it_removed_once)
    gc.disable()
    try:
        join()
        assert (len(tries), len(kept)) == (2, 0)
    finally:
        gc.enable()


def test_one_that_leaves_puts_nothing_back_from_then_on(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = Namespace.join(namespace)
    other = Namespace.join(namespace)
    leave_row = Namespace._leave_row

    def look_meanwhile(member: Namespace, *arguments: Any) -> bool:
        """Leave while the background thread looks after the files."""
        token = member.runtime.file("token")
        token.unlink()
        member._files.put_back()
        assert not token.exists()
        other._files.put_back()
        return leave_row(member, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Namespace, "_leave_row", look_meanwhile)
        joined.leave()
    other.leave()
    assert files_in(runtime_root) == []


def test_a_child_is_no_member_and_leaves_its_parent_one(joined: Namespace) -> None:
    folder = str(joined.runtime.path)

    def look() -> None:
        assert (joined.is_usable, joined.is_inherited, joined.is_removed) == (False, True, True)
        assert not [one for one in open_descriptors() if folder in one]
        joined.leave()
        assert joined.segment.words[Header.MAGIC]
        with pytest.raises(ClosedError):
            joined.transaction()

    assert run_in_child(look) == 0
    assert joined.is_usable is True
    assert is_locked(joined.member_lock_path(0))
    with joined.transaction():
        pass
