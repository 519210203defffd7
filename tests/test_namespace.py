"""Joining and leaving a namespace: bad conditions, other versions, full memory, forks."""

from __future__ import annotations

import errno
import gc
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
from crash_lab import run_in_child
from harness import (
    NewManager,
    NewProcess,
    Seat,
    acquire,
    attach,
    import_path,
    in_thread,
    open_descriptors,
    problems,
    release,
    scaled,
    segments_of,
    wait_until,
)
from loaders import Loads
from patience import DEADLINE_S, Stopwatch

from mpmm.errors import (
    InvalidArgumentError,
    LayoutMismatchError,
    LockTimeoutError,
    RuntimeDirectoryError,
    SegmentAllocationError,
)
from mpmm.interpreter.thread_frames import innermost_frame
from mpmm.model_manager import ModelManager
from mpmm.shared_state import runtime_dir, transaction
from mpmm.shared_state.futex import wait_for_change
from mpmm.shared_state.layout import LAYOUT_VERSION, MAGIC, Capacities, Header, Member
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.removal import remove_all_deserted, remove_deserted
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import Segment, segment_name
from mpmm.shared_state.snapshot import find_namespaces, read_snapshot
from mpmm.shared_state.transaction import CLAIM_NS, TransactionLock

BOOKED: dict[str, Any] = {"memory_source": "booked"}


def segment_file(root: Path, name: str = "test") -> Path:
    """Return the file that is the namespace's segment."""
    return Path("/dev/shm") / segment_name(root, name)


@contextmanager
def other_word(file: Path, word: int, value: int) -> Iterator[None]:
    """Set another value in a word of a segment for a while, without telling any process."""
    fd = os.open(file, os.O_RDWR)
    try:
        old = os.pread(fd, 8, 8 * word)
        os.pwrite(fd, value.to_bytes(8, "little"), 8 * word)
        yield
        os.pwrite(fd, old, 8 * word)
    finally:
        os.close(fd)


def leave_deserted(new_process: NewProcess) -> None:
    """Let the namespace be what a process leaves that crashes with a loaded model."""
    process = new_process()
    process.call(acquire, "old")
    process.kill()


# ---- segments that are not ours to read ----------------------------------------------------------------------


def test_a_live_segment_of_another_version_is_refused_with_both_versions_named(
    namespace: str, runtime_root: Path, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process(attached=False)
    with other_word(segment_file(runtime_root), Header.VERSION, 999):
        expected = f"found layout version 999, expected layout version {LAYOUT_VERSION}"
        with pytest.raises(LayoutMismatchError, match=expected) as caught:
            other.call(attach, namespace=namespace, **BOOKED)
        assert (caught.value.found, caught.value.expected) == ("layout version 999", f"layout version {LAYOUT_VERSION}")
        with pytest.raises(LayoutMismatchError, match="999"):
            read_snapshot(namespace)
    with manager.model("a", Loads()):
        pass
    assert len(read_snapshot(namespace).members) == 1


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (Header.VERSION, 999),
        (Header.BOOT, 4711),
        (Header.TOKEN, 4711),
        (Header.MAGIC, 0),
        (Header.CAPACITIES, 0),
        (Header.SIZE_BYTES, 8),
        (Header.UNDO_COUNT, 2**40),
    ],
    ids=["version", "boot", "token", "magic", "capacities", "size", "undo log"],
)
def test_a_deserted_segment_that_is_not_ours_is_replaced(
    namespace: str, runtime_root: Path, new_process: NewProcess, new_manager: NewManager, word: int, value: int
) -> None:
    leave_deserted(new_process)
    fd = os.open(segment_file(runtime_root), os.O_RDWR)
    os.pwrite(fd, value.to_bytes(8, "little"), 8 * word)
    os.close(fd)
    manager = new_manager()
    assert read_snapshot(namespace).models == ()
    with manager.model("a", Loads()):
        pass
    assert problems(namespace) == []


@pytest.mark.parametrize(
    ("word", "value", "found", "expected"),
    [
        (Header.MAGIC, 4711, "magic 0x1267", f"{MAGIC:#x}"),
        (Header.VERSION, 999, "layout version 999", f"layout version {LAYOUT_VERSION}"),
        (Header.BOOT, 4711, "a segment from before the last start of the machine", "one from this boot"),
        (Header.CAPACITIES, 0, r"table capacities \[0, .*\]", "numbers from 1 to 1048576"),
        (Header.SIZE_BYTES, 8, r"\d+ bytes that claim to be 8", r"\d+ bytes"),
    ],
    ids=["magic", "version", "boot", "capacities", "size"],
)
def test_a_look_at_a_deserted_segment_that_is_not_ours_says_why_it_cannot_be_read(
    namespace: str,
    runtime_root: Path,
    new_process: NewProcess,
    word: int,
    value: int,
    found: str,
    expected: str,
) -> None:
    leave_deserted(new_process)
    with (
        other_word(segment_file(runtime_root), word, value),
        pytest.raises(LayoutMismatchError, match=f"found {found}, expected {expected}$"),
    ):
        read_snapshot(namespace)


def test_a_deserted_segment_whose_lock_nobody_can_take_is_removed(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    leave_deserted(new_process)
    with segment_file(runtime_root).open("r+b") as file:
        file.seek(8 * Header.UNDO_COUNT)
        file.write((2**40).to_bytes(8, "little"))
    remove_deserted(runtime_root, namespace)
    assert segments_of(runtime_root) == set()
    assert not (runtime_root / namespace).exists()


def test_removing_a_deserted_namespace_waits_for_those_who_come_and_go(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    leave_deserted(new_process)
    passing_by = LockFile(runtime_root / namespace / "lifecycle.lock")
    assert passing_by.try_exclusive()
    remover = threading.Thread(target=remove_deserted, args=(runtime_root, namespace))
    remover.start()
    remover.join(0.1)
    assert remover.is_alive(), "it has not given up"
    assert segment_file(runtime_root).exists()
    passing_by.close()
    remover.join(DEADLINE_S)
    assert not (runtime_root / namespace).exists()
    assert segments_of(runtime_root) == set()


def test_a_namespace_with_a_worker_is_never_removed_as_deserted(
    namespace: str, runtime_root: Path, new_manager: NewManager
) -> None:
    manager = new_manager()
    remove_deserted(runtime_root, namespace)
    remove_all_deserted(runtime_root)
    with manager.model("a", Loads()):
        pass
    assert segment_file(runtime_root).exists()


def test_who_replaces_what_the_crashed_have_left_keeps_none_of_its_memory(
    namespace: str, runtime_root: Path, new_process: NewProcess
) -> None:
    leave_deserted(new_process)
    gc.disable()
    try:
        joined = Namespace.join(namespace)
        mapped = Path("/proc/self/maps").read_text().count(str(segment_file(runtime_root)))
    finally:
        gc.enable()
    joined.leave()
    assert mapped == 1


@pytest.mark.parametrize("size", [0, 8, 4096, -8], ids=["empty", "one word", "one page", "one word short"])
def test_a_deserted_segment_that_was_truncated_is_replaced(
    namespace: str, runtime_root: Path, new_process: NewProcess, new_manager: NewManager, size: int
) -> None:
    leave_deserted(new_process)
    file = segment_file(runtime_root)
    os.truncate(file, size % file.stat().st_size if size < 0 else size)
    with pytest.raises((LayoutMismatchError, FileNotFoundError)):
        read_snapshot(namespace)
    manager = new_manager()
    with manager.model("a", Loads()):
        assert read_snapshot(namespace).active == 1
    assert problems(namespace) == []


def test_a_segment_that_somebody_has_unlinked_does_not_trouble_those_who_have_it(
    runtime_root: Path, new_process: NewProcess
) -> None:
    one, two = new_process(), new_process()
    os.unlink(segment_file(runtime_root))
    copy = one.call(acquire, "a")
    one.call(release)
    assert two.call(acquire, "a") == copy
    two.call(release)


# ---- runtime directories that cannot be trusted ----------------------------------------------------------------


def attach_and_leave(root: Path) -> None:
    """Be a member for a moment."""
    ModelManager(namespace="test", runtime_root=root, **BOOKED).shutdown()


@pytest.mark.parametrize("level", ["root", "namespace"])
def test_a_runtime_directory_that_is_a_symbolic_link_is_refused(tmp_path: Path, level: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    root = tmp_path / "root"
    if level == "root":
        root.symlink_to(elsewhere)
    else:
        root.mkdir(mode=0o700)
        (root / "test").symlink_to(elsewhere)
    with pytest.raises(RuntimeDirectoryError, match="a symbolic link is not followed"):
        attach_and_leave(root)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("level", ["root", "namespace"])
@pytest.mark.parametrize("mode", [0o755, 0o710, 0o702])
def test_a_runtime_directory_that_others_can_enter_is_refused(tmp_path: Path, level: str, mode: int) -> None:
    folder = tmp_path / "root" if level == "root" else tmp_path / "root" / "test"
    folder.mkdir(mode=0o700, parents=True)
    (tmp_path / "root").chmod(0o700)
    folder.chmod(mode)
    with pytest.raises(RuntimeDirectoryError, match=f"has mode {mode:04o}, expected 0700") as caught:
        attach_and_leave(tmp_path / "root")
    assert caught.value.path == str(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_runtime_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    with pytest.raises(RuntimeDirectoryError, match="belongs to uid 12345, not to 0"):
        attach_and_leave(root)


@pytest.mark.parametrize("level", ["root", "namespace"])
def test_what_comes_in_the_place_of_a_runtime_directory_that_has_just_vanished_is_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    make = runtime_dir._make_folder

    def vanish_first(folder: Path, mode: int) -> None:
        if folder == root / "test":
            # The last member of another namespace removes the root, and another process creates it.
            monkeypatch.setattr(runtime_dir, "_make_folder", make)
            root.rmdir()
            try:
                make(folder, mode)
            finally:
                if level == "root":
                    root.symlink_to(elsewhere)
                else:
                    root.mkdir(mode=0o700)
                    folder.symlink_to(elsewhere)
        else:
            make(folder, mode)

    monkeypatch.setattr(runtime_dir, "_make_folder", vanish_first)
    with pytest.raises(RuntimeDirectoryError, match="a symbolic link is not followed"):
        runtime_dir.RuntimeDirectory("test", root).ensure()
    assert list(elsewhere.iterdir()) == []


def test_a_runtime_directory_that_is_a_file_or_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o700)
    with pytest.raises(RuntimeDirectoryError, match="is not a directory"):
        attach_and_leave(tmp_path / "file")
    with pytest.raises(RuntimeDirectoryError, match="cannot create the runtime directory"):
        attach_and_leave(tmp_path / "file" / "below")


@pytest.mark.parametrize("name", [".hidden", "a/b", "..", "n" * 65, "späße", "a b"])
def test_an_impossible_name_is_refused(name: str, runtime_root: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="expected 1 to 64 characters"):
        ModelManager(namespace=name, **BOOKED)


def test_namespaces_of_one_root_have_segments_of_their_own(runtime_root: Path) -> None:
    joined = [Namespace.join(name) for name in ("one", "two")]
    assert segments_of(runtime_root) == {segment_name(runtime_root, name) for name in ("one", "two")}
    for namespace in joined:
        assert len(read_snapshot(namespace.name).members) == 1
        namespace.leave()


def test_a_segment_that_is_closed_is_mapped_no_more(namespace: str, runtime_root: Path) -> None:
    joined = Namespace.join(namespace)
    name = segment_name(runtime_root, namespace)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(name)

    before = mapped()
    looked_at = Segment.open(name)
    assert looked_at is not None
    assert mapped() > before
    looked_at.close()
    assert mapped() == before
    joined.leave()
    assert (joined.is_usable, mapped()) == (False, 0)


def test_who_cannot_remove_the_segment_leaves_all_the_same_and_says_why(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = Namespace.join(namespace)

    def refuse(segment: Segment) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patched:
        patched.setattr(Segment, "unlink", refuse)
        with pytest.raises(PermissionError, match="not yours"):
            joined.leave()
    assert not joined.is_usable
    # The next one replaces what is left.
    Namespace.join(namespace).leave()


def test_a_newcomer_in_the_row_of_one_that_was_dead_a_moment_ago_is_not_reaped(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined, newcomer = Namespace.join(namespace), Namespace.join(namespace)
    monkeypatch.setattr(joined, "find_dead_members", lambda: [newcomer.slot])
    assert joined.reap_dead_members() == 0
    with joined.transaction() as t:
        assert joined.reap_if_dead(t, newcomer.slot), "there is nothing to do"
    assert joined.tables.used_members() == [joined.slot, newcomer.slot]
    newcomer.leave()
    joined.leave()


def test_a_guest_that_is_left_alone_removes_nothing(
    namespace: str, runtime_root: Path, new_process: NewProcess, new_manager: NewManager
) -> None:
    process = new_process()
    process.call(acquire, "old")
    guest = Namespace.join(namespace, kind=Member.GUEST, must_exist=True)
    process.kill()
    guest.leave()
    # The next process inherits the figures of its models.
    assert segment_file(runtime_root).exists()
    new_manager()
    assert not segments_of(runtime_root) - {segment_name(runtime_root, namespace)}


def test_who_comes_looks_and_leaves_leaves_no_descriptor_behind(namespace: str) -> None:
    before = open_descriptors()
    for _ in range(2):
        joined = Namespace.join(namespace)
        read_snapshot(namespace)
        joined.leave()
    assert not open_descriptors() - before


def test_a_lock_where_there_is_no_standard_input_does_not_stand_there_and_is_given_up(namespace: str) -> None:
    joined = Namespace.join(namespace)

    def take_twice() -> None:
        os.close(0)
        lock = TransactionLock(joined.segment, 1.0)
        assert lock._file.fd > 2
        for another in (lock, TransactionLock(joined.segment, 1.0)):
            with another():
                pass

    assert run_in_child(take_twice) == 0
    joined.leave()


# ---- shared memory ---------------------------------------------------------------------------------------------


def test_a_full_shared_memory_is_a_clear_error_and_leaves_nothing(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(SegmentAllocationError, match="free or enlarge /dev/shm") as caught:
            ModelManager(namespace=namespace, **BOOKED)
    assert caught.value.name == segment_name(runtime_root, namespace)
    assert caught.value.size_bytes > 1_000_000
    assert isinstance(caught.value, MemoryError)
    assert not segment_file(runtime_root).exists()
    # The part that could be written does not hinder later processes.
    ModelManager(namespace=namespace, **BOOKED).shutdown()


@pytest.mark.parametrize(
    ("arguments", "name"), [(["/opt/train.py", "--fast"], "train.py"), ([""], "python"), ([], "python")]
)
def test_a_member_is_called_like_its_program(
    namespace: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    joined = Namespace.join(namespace)
    names = [member.name for member in read_snapshot(namespace).members]
    joined.leave()
    assert names == [name]


def test_the_pages_are_allocated_at_creation(namespace: str, runtime_root: Path, new_manager: NewManager) -> None:
    new_manager(capacities=Capacities(models=2000))
    stat = segment_file(runtime_root).stat()
    assert stat.st_blocks * 512 >= stat.st_size > 1_000_000


def test_the_creators_capacities_hold(namespace: str, new_manager: NewManager) -> None:
    new_manager(capacities=Capacities(members=3, tickets=5))
    namespace_of_later = Namespace.join(namespace, capacities=Capacities(members=7))
    try:
        assert namespace_of_later.segment.layout.capacities.members == 3
        assert namespace_of_later.segment.layout.capacities.tickets == 5
    finally:
        namespace_of_later.leave()


# ---- processes that come and go ----------------------------------------------------------------------------------

VISITOR = """
import sys
from mpmm import ModelManager
manager = ModelManager(namespace="test", memory_source="booked")
with manager.model("a", lambda: "handle") as copy:
    print(copy)
if sys.argv[1] == "shutdown":
    manager.shutdown()
elif sys.argv[1] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["shutdown", "exit", "raise"])
def test_a_visitor_leaves_no_trace_and_starts_no_tracker(
    namespace: str, runtime_root: Path, new_manager: NewManager, how: str
) -> None:
    manager = new_manager(fallback_memory_mb=10000, slack_percentage=0.1, default_estimate_mb=4000)
    handle = manager.acquire_model("a", Loads("handle"))
    manager.release_model("a", handle)
    visitor = subprocess.run(
        [sys.executable, "-W", "error", "-c", VISITOR, how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    assert visitor.returncode == (3 if how == "raise" else 0), visitor.stderr
    # Its messages about unknown parameters are logged, and so reach stderr; nothing else may.
    complaints = [line for line in visitor.stderr.splitlines() if " stays " not in line]
    assert (visitor.stdout.strip(), complaints) == (handle, [])
    assert segment_file(runtime_root).exists()
    assert len(read_snapshot(namespace).members) == 1
    with manager.model("a", Loads("handle")) as copy:
        assert copy == handle


def test_being_a_member_starts_no_process(namespace: str, new_process: NewProcess) -> None:
    process = new_process()
    process.call(acquire, "a")
    assert psutil.Process(process.pid).children() == []
    assert process.call(tracker_pid) is None


def tracker_pid(_: Seat) -> int | None:
    """Return the pid of this process's resource tracker, as far as it has started one itself."""
    from multiprocessing import resource_tracker

    pid: int | None = getattr(resource_tracker._resource_tracker, "_pid", None)
    return pid if pid is not None and pid in [child.pid for child in psutil.Process().children()] else None


def test_processes_that_come_and_go_at_once_agree_on_one_segment(namespace: str, new_process: NewProcess) -> None:
    processes = [new_process(attached=False) for _ in range(6)]
    for process in processes:
        process.send(come_and_go, namespace, 15)
    assert sum(process.result() for process in processes) == 6 * 15
    assert find_namespaces() == []


def come_and_go(_: Seat, namespace: str, rounds: int) -> int:
    """Join, use and leave again and again."""
    for _round in range(rounds):
        with ModelManager(namespace=namespace, **BOOKED) as manager, manager.model("a", Loads()) as copy:
            assert copy in manager.all_models("a")
    return rounds


# ---- forks -------------------------------------------------------------------------------------------------------


def test_a_process_with_eight_busy_threads_can_be_forked_and_its_children_use_the_manager(
    namespace: str, new_process: NewProcess
) -> None:
    process = new_process(fallback_memory_mb=2000)
    # A fork takes a third of a second where the eight threads share two processors with other tests.
    process.send(fork_while_busy, scaled(20))
    assert process.result(4 * DEADLINE_S) == scaled(20)
    assert process.call(acquire, "a")
    process.call(release)
    wait_until(lambda: len(read_snapshot(namespace).members) == 1, "the children have left")
    assert problems(namespace) == []


def fork_while_busy(seat: Seat, forks: int) -> int:
    """Fork repeatedly while eight threads work; return how many children could use the manager."""
    manager = seat.manager
    stop = threading.Event()
    errors: list[BaseException] = []

    def be_busy(tag: str) -> None:
        try:
            while not stop.is_set():
                with manager.model(tag, Loads(tag)):
                    pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=be_busy, args=(f"t{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    good = 0
    for _ in range(forks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with manager.model("child", Loads("c")):
                    status = 0
                manager.shutdown()
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 1
            finally:
                os._exit(status)
        deadline = time.monotonic() + DEADLINE_S
        done = 0
        while not done and time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        if not done:
            os.kill(child, 9)
            os.waitpid(child, 0)
        good += bool(done and status == 0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return good


def test_newcomers_leave_the_lock_to_who_starves_while_the_claim_holds(namespace: str) -> None:
    joined = Namespace.join(namespace)
    words = joined.segment.words

    def claim(nanoseconds: int) -> int:
        words[Header.STARVING_SINCE] = 1
        words[Header.STARVING] = until = time.monotonic_ns() + nanoseconds
        return until

    def takes_it_at_once() -> bool:
        until = claim(CLAIM_NS)
        with joined.transaction(0.0):
            return time.monotonic_ns() < until and words[Header.STARVING] == until

    until = claim(CLAIM_NS)
    with joined.transaction():
        assert time.monotonic_ns() >= until
    assert words[Header.STARVING] == 0, "a claim that nobody repeats is forgotten"
    # More than once, as a busy machine may need longer for it than a claim holds.
    wait_until(takes_it_at_once, "who has no time to wait takes what is free, and leaves the claim alone")
    until = claim(10**12)
    with joined.transaction():
        assert time.monotonic_ns() < until, "nobody can have meant that"
    joined.leave()


@pytest.mark.parametrize("starves", [True, False])
def test_one_that_waits_sleeps_until_it_is_woken_and_one_that_starves_claims_the_lock_until_it_has_it(
    namespace: str, monkeypatch: pytest.MonkeyPatch, starves: bool
) -> None:
    slept: set[tuple[int, float]] = set()

    def note(read: Callable[[], int], address: int, seen: int, seconds: float) -> None:
        slept.add(((address - joined.segment.address) // 8, seconds))
        wait_for_change(read, address, seen, seconds)

    monkeypatch.setattr(transaction, "STARVES_AFTER_S", 0.0 if starves else math.inf)
    monkeypatch.setattr(transaction, "CLAIM_NS", 10**12)
    joined = Namespace.join(namespace)
    monkeypatch.setattr(transaction, "wait_for_change", note)
    words, elsewhere = joined.segment.words, joined.segment.lock_file()
    assert elsewhere.try_exclusive()

    def wait() -> int:
        with joined.transaction():
            return int(words[Header.STARVING])

    waiter, claims = in_thread(wait)
    wait_until(lambda: slept, "it waits")
    assert bool(words[Header.STARVING]) == starves
    elsewhere.close()
    waiter.join(DEADLINE_S)
    joined.leave()
    assert claims == [0]
    short, long = (Header.STARVING, transaction.STARVING_SLEEP_S), (Header.CONTENDED, transaction.LONGEST_SLEEP_S)
    assert slept == {short if starves else long}


def test_one_that_has_met_others_at_the_lock_gives_up_its_processor_for_so_many_turns(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = Namespace.join(namespace)

    def given_up(transactions: int) -> int:
        with monkeypatch.context() as patched:
            yielded: list[None] = []
            patched.setattr(os, "sched_yield", lambda: yielded.append(None))
            for _ in range(transactions):
                with joined.transaction():
                    pass
        return len(yielded)

    assert given_up(3 * transaction.TURN) == 0
    elsewhere = joined.segment.lock_file()
    assert elsewhere.try_exclusive()
    waiter, _ = in_thread(lambda: given_up(1))
    wait_until(lambda: joined.segment.words[Header.CONTENDED], "it waits")
    elsewhere.close()
    waiter.join(DEADLINE_S)
    assert given_up(2 * transaction.TURN) == 2
    assert given_up(transaction.CROWDED_TURNS * transaction.TURN) == transaction.CROWDED_TURNS - 2
    joined.leave()


def test_a_segment_that_was_closed_and_not_removed_makes_way_although_a_server_is_left(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, server = Namespace.join(namespace), Namespace.join(namespace, kind=Member.SERVER)
    with monkeypatch.context() as patched:
        # As if it died there.
        patched.setattr(Segment, "unlink", lambda segment: None)
        patched.setattr(RuntimeDirectory, "remove", lambda *_: None)
        last.leave()
    assert server.is_removed
    newcomer = Namespace.join(namespace)
    assert newcomer.segment.identity != server.segment.identity
    assert [member.pid for member in read_snapshot(namespace).members] == [os.getpid()]
    newcomer.leave()
    server.leave()


def test_a_member_that_has_left_is_none_that_others_clear_away(namespace: str) -> None:
    stays, leaves = Namespace.join(namespace), Namespace.join(namespace)
    assert [member.slot for member in read_snapshot(namespace).members] == [0, 1]
    leaves.leave()
    assert [member.slot for member in read_snapshot(namespace).members] == [0]
    assert stays.reap_dead_members() == 0
    stays.leave()


def test_who_waits_for_the_lock_has_it_soon_after_it_is_free_without_a_claim(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No process ever waits long enough to claim the lock.
    monkeypatch.setattr(transaction, "STARVES_AFTER_S", math.inf)
    joined = Namespace.join(namespace)
    elsewhere = joined.segment.lock_file()
    assert elsewhere.try_exclusive()

    def wait() -> float:
        with joined.transaction(4.0):
            return watch.calm_s()

    waiter, waited = in_thread(wait)
    wait_until(lambda: joined.segment.words[Header.CONTENDED], "it waits")
    watch = Stopwatch()
    elsewhere.close()
    waiter.join(DEADLINE_S)
    joined.leave()
    assert waited[0] < 2.0


def test_waiting_for_threads_of_the_same_process_counts_against_the_time_out(namespace: str) -> None:
    joined = Namespace.join(namespace)
    elsewhere = joined.segment.lock_file()
    assert elsewhere.try_exclusive()
    took: list[tuple[float, float]] = []

    def wait(timeout_s: float) -> None:
        watch = Stopwatch()
        with pytest.raises(LockTimeoutError), joined.transaction(timeout_s):
            pass
        took.append((watch.s(), watch.calm_s()))

    # The second gets to wait for the file, 0.4 s late, when the first gives up.
    threads = [threading.Thread(target=wait, args=(timeout_s,)) for timeout_s in (0.4, 0.6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seconds for seconds, _ in took) >= 0.6
    assert max(calm_s for _, calm_s in took) < 0.9
    elsewhere.close()
    joined.leave()


def test_a_thread_gives_up_while_another_one_of_its_process_has_the_lock(namespace: str) -> None:
    joined = Namespace.join(namespace)
    taken, give_back = threading.Event(), threading.Event()

    def hold() -> None:
        with joined.transaction():
            taken.set()
            give_back.wait(DEADLINE_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(DEADLINE_S)
    with pytest.raises(LockTimeoutError, match=r"within 0\.05 s"), joined.transaction(0.05):
        raise AssertionError("two threads are in a transaction")
    assert holder.is_alive()
    give_back.set()
    holder.join()
    with joined.transaction(0.05):
        pass
    joined.leave()


def test_one_of_many_waiting_threads_at_a_time_looks_whether_the_lock_was_abandoned(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = Namespace.join(namespace)
    taken, give_back, looks = threading.Event(), threading.Event(), []

    def look(thread: int) -> FrameType | None:
        looks.append(time.monotonic())
        return innermost_frame(thread)

    monkeypatch.setattr(transaction, "innermost_frame", look)

    def hold() -> None:
        with joined.transaction():
            taken.set()
            assert give_back.wait(DEADLINE_S)

    def wait() -> None:
        with joined.transaction():
            pass

    threads = [threading.Thread(target=target) for target in (hold, *[wait] * 40)]
    threads[0].start()
    assert taken.wait(DEADLINE_S)
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: len(looks) > 10, "they look", DEADLINE_S)
    give_back.set()
    for thread in threads:
        thread.join()
    # If each of them looked, there would be forty in that time; two may come to look at the same time.
    assert looks[10] - looks[0] > 5 * transaction.ABANDONED_LOOK_S
    joined.leave()


def test_a_newcomer_that_reaps_the_dead_waits_for_the_lock_no_longer_than_it_may_in_all(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Namespace.join(namespace)
    elsewhere = first.segment.lock_file()
    reap, reaped = Namespace.reap_dead_members, threading.Event()

    def reap_until_there_is_no_time_left(self: Namespace) -> int:
        found = reap(self)
        time.sleep(0.5)
        assert elsewhere.try_exclusive()
        reaped.set()
        return found

    monkeypatch.setattr(Namespace, "find_dead_members", lambda _: [first.slot])
    monkeypatch.setattr(Namespace, "reap_dead_members", reap_until_there_is_no_time_left)
    with pytest.raises(LockTimeoutError) as caught:
        Namespace.join(namespace, timeout_s=0.5)
    elsewhere.close()
    assert reaped.is_set()
    assert caught.value.timeout_seconds == 0, "no time was left"
    monkeypatch.undo()
    Namespace.join(namespace, timeout_s=0.5).leave()
    first.leave()


def contend(seat: Seat, count: int) -> float:
    """Take the lock again and again, for 2 ms each; return the longest time that took."""
    namespace = seat.manager._connected().namespace
    longest = 0.0
    for _ in range(count):
        watch = Stopwatch()
        with namespace.transaction():
            longest = max(longest, watch.calm_s())
            until = time.monotonic() + 0.002
            while time.monotonic() < until:
                pass
    return longest


def test_nobody_waits_for_the_lock_for_long_among_many_who_want_it(new_process: NewProcess) -> None:
    crowd = [new_process() for _ in range(8)]
    for process in crowd:
        process.send(contend, 60)
    # All of it takes one second; without a turn, the unlucky wait for half of that.
    assert max(process.result() for process in crowd) < 1.0


def test_a_fork_in_the_middle_of_a_transaction_does_not_share_the_lock(namespace: str, new_process: NewProcess) -> None:
    process = new_process(lock_timeout_seconds=5.0)
    assert process.call(fork_in_transaction) == 0
    assert process.call(acquire, "a")
    assert problems(namespace) == []


def fork_in_transaction(seat: Seat) -> int:
    """Fork while another thread holds the lock; return the status of the child, which uses the manager then."""
    manager = seat.manager
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with manager._connected().namespace.transaction() as t:
            t.set(Header.HITS, 999)
            inside.set()
            done.wait(DEADLINE_S)
            t.set(Header.HITS, 0)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(DEADLINE_S)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # Long enough for the parent's thread to let go.
            os.read(go_reader, 1)
            with manager.model("child", Loads()):
                status = 0
            manager.shutdown()
        finally:
            os._exit(status)
    done.set()
    thread.join()
    os.write(go_writer, b"1")
    _, status = os.waitpid(child, 0)
    return status


go_reader, go_writer = os.pipe()


def test_a_thread_with_patience_waits_for_the_lock_for_longer_where_no_time_is_named(
    namespace: str, runtime_root: Path, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = new_manager()._connected().namespace
    monkeypatch.setattr(transaction, "PATIENT_S", 0.2)
    other = TransactionLock(joined.segment, 1.0)
    joined.lock.set_timeout(0.1)

    def given_up_after(*named: float) -> float:
        with pytest.raises(LockTimeoutError) as caught, joined.transaction(*named):
            raise AssertionError("the lock was free")
        return float(caught.value.timeout_seconds)

    with other(1.0):
        assert given_up_after() == 0.1
        with joined.lock.patient_here():
            assert given_up_after() == 0.2
            assert given_up_after(0.05) == 0.05, "who names a time means it"
        assert given_up_after() == 0.1
