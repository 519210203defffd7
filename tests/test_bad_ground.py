"""Bad conditions: junk in the segment, other users, missing files and descriptors, many forks and threads."""

from __future__ import annotations

import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from containers import as_nobody, as_root, can_unshare, run_unshared
from harness import (
    NewManager,
    NewProcess,
    acquire,
    files_in,
    open_descriptors,
    problems,
    release,
    scaled,
    segments_of,
    wait_until,
)
from patience import DEADLINE_S, Stopwatch

from mpmm import ModelManager, MultiProcessShared, SegmentCorruptError
from mpmm.cli import main
from mpmm.errors import AcquireTimeoutError, LayoutMismatchError, MpmmError, ProcessLimitError
from mpmm.multi_process_shared import server_pid
from mpmm.multi_process_shared.host import new_record
from mpmm.multi_process_shared.registry import ServerRegistry, registry_for, start_time_of, write_record
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Capacities, Header
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.runtime_dir import default_root
from mpmm.shared_state.segment import segment_name
from mpmm.shared_state.snapshot import Snapshot, decode, read_snapshot

SMALL = Capacities(members=8, models=8, instances=8, tickets=8, devices=2, observations=4, events=64, undo=512)
DECODED_CASES = scaled(2000)
ATTACHED_CASES = scaled(150)


def damaged(whole: bytes, choices: random.Random, rows_only: bool) -> bytearray:
    """Return a copy with some words or bytes replaced by junk of the kinds that programs write."""
    copied = bytearray(whole)
    words = memoryview(copied).cast("Q")
    for _ in range(choices.randint(1, 40)):
        word = choices.randrange(Header.NEXT_TICKET if rows_only else 0, len(words))
        words[word] = choices.choice(
            [0, 1, 2**64 - 1, 2**63, choices.getrandbits(64), choices.getrandbits(8), words[word] ^ 1]
        )
    return copied


@pytest.fixture
def busy_segment(namespace: str, new_manager: NewManager) -> ModelManager:
    """A namespace with something in every table."""
    manager = new_manager(capacities=SMALL)
    for tag in "abc":
        manager._estimator.set_initial_estimate(tag, 100.0)
        # Mypy has no type for the lambda's default.
        manager.acquire_model(tag, lambda tag=tag: f"handle of {tag}")  # type: ignore[misc]  # mypy has no type for a lambda's default
    manager.release_model("a", "handle of a")
    manager._estimator.add_observation({"a": 1, "b": 2}, 123.0)
    return manager


def test_junk_in_the_segment_is_a_documented_error_or_is_shown_never_a_crash(
    namespace: str, busy_segment: ModelManager
) -> None:
    segment = busy_segment._connected().namespace.segment
    whole = segment.copy()
    choices = random.Random(1)
    outcomes = {"shown": 0, "refused": 0, "found out": 0}
    for _ in range(DECODED_CASES):
        try:
            snapshot = decode(damaged(whole, choices, rows_only=False), segment.layout, namespace, segment.name)
        except SegmentCorruptError:
            outcomes["refused"] += 1
            continue
        assert isinstance(snapshot, Snapshot)
        outcomes["found out" if check_invariants(snapshot) else "shown"] += 1
    assert sum(outcomes.values()) == DECODED_CASES
    assert min(outcomes.values()) > 0


def test_who_joins_a_live_segment_full_of_junk_gets_a_documented_error_or_joins(
    namespace: str, busy_segment: ModelManager, new_process: NewProcess
) -> None:
    segment = busy_segment._connected().namespace.segment
    whole = segment.copy()
    visitor = new_process(attached=False)
    joined = visitor.call(join_damaged, namespace, whole)
    segment.words[:] = memoryview(whole).cast("Q")
    assert 0 < joined < ATTACHED_CASES
    assert problems(namespace) == []


def join_damaged(seat: object, name: str, whole: bytes) -> int:
    """Write junk into the segment and join, many times; return how often that was possible."""
    choices = random.Random(2)
    path = f"/dev/shm/{segment_name(default_root(), name)}"
    joined = 0
    for _ in range(ATTACHED_CASES):
        with open(path, "r+b") as file:
            file.write(damaged(whole, choices, rows_only=False))
        try:
            namespace = Namespace.join(name)
        except MpmmError:
            continue
        joined += 1
        namespace.forget_after_fork()
    return joined


@pytest.mark.parametrize("size", [0, 8, 700, 5000])
def test_a_live_segment_that_was_cut_short_is_refused(namespace: str, new_manager: NewManager, size: int) -> None:
    manager = new_manager(capacities=SMALL)
    segment = manager._connected().namespace.segment
    stand_in = f"/dev/shm/{segment.name}"
    whole = segment.copy()
    os.rename(stand_in, stand_in + ".kept")
    Path(stand_in).write_bytes(whole[:size])
    os.chmod(stand_in, 0o600)
    try:
        with pytest.raises(LayoutMismatchError):
            Namespace.join(namespace)
        with pytest.raises(LayoutMismatchError):
            read_snapshot(namespace)
        assert main(["inspect", namespace]) == 2
    finally:
        os.rename(stand_in + ".kept", stand_in)


def test_a_removed_runtime_directory_does_not_trouble_those_inside(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    worker = manager._connected()
    for path in worker.namespace.runtime.path.iterdir():
        path.unlink()
    worker.namespace.runtime.path.rmdir()
    with manager.model("a", lambda: "a handle") as handle:
        assert handle == "a handle"
    manager.shutdown()
    assert not os.path.exists(worker.namespace.segment.path)


def test_without_descriptors_joining_fails_with_the_systems_error_and_succeeds_later(namespace: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Namespace.join(namespace)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    joined = Namespace.join(namespace)
    assert problems(namespace) == []
    joined.leave()


def test_a_manager_that_may_open_too_few_files_says_how_few_and_leaves_nothing_that_is_in_the_way(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The next process that creates a namespace deletes what this one could not.
    monkeypatch.setattr("mpmm.shared_state.runtime_dir.REMOVAL_S", 0.0)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused: list[str] = []
    joined = False
    while not joined:
        before = open_descriptors()
        lowest = os.dup(0)
        os.close(lowest)
        limit = lowest + len(refused)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            ModelManager(namespace=namespace, memory_source="booked").shutdown()
            joined = True
        except ProcessLimitError as error:
            refused.append(f"{limit}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert open_descriptors() == before
    assert len(refused) > 3
    for text in refused:
        limit_then, said = text.split(": ", 1)
        assert f"its limit on open files (ulimit -n) is {limit_then};" in said
    assert not segments_of(runtime_root)
    ModelManager(namespace=namespace, memory_source="booked").shutdown()
    assert not files_in(runtime_root)


def test_a_manager_that_may_start_no_thread_says_so_and_leaves_nothing(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ProcessLimitError, match="processes and threads"):
            ModelManager(namespace=namespace, memory_source="booked")
    assert not segments_of(runtime_root)
    assert not files_in(runtime_root)
    ModelManager(namespace=namespace, memory_source="booked").shutdown()


def test_a_thousand_waiting_threads_of_one_process_are_all_served(namespace: str, new_manager: NewManager) -> None:
    # On a loaded machine, a thread may be one of a thousand that want the lock for a minute.
    manager = new_manager(wait_timeout_seconds=300.0, lock_timeout_seconds=300.0)
    manager._estimator.set_initial_estimate("a", 900.0)
    served = []

    def use() -> None:
        with manager.model("a", lambda: "a handle"):
            served.append(threading.get_ident())

    with manager.model("a", lambda: "a handle"):
        threads = [threading.Thread(target=use) for _ in range(1000)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(4 * DEADLINE_S)
    assert len(served) == 1000
    assert read_snapshot(namespace).loads == 1


def test_many_forks_of_a_busy_process_neither_block_nor_claim_anything(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    stop = threading.Event()

    def be_busy(tag: str) -> None:
        while not stop.is_set():
            with manager.model(tag, lambda: f"handle of {tag}"):
                pass

    threads = [threading.Thread(target=be_busy, args=(f"model {number % 3}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(int(os.environ.get("MPMM_TEST_FORKS", "40"))):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    with manager.model("model 0", lambda: "handle of the child"):
                        status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    manager._connected().namespace.reap_dead_members()
    assert problems(namespace) == []


# ---- surroundings that differ or change --------------------------------------------------------------------------

TMPFS_BYTES = 8 << 20


@can_unshare
def test_a_shared_memory_that_fills_up_later_troubles_nobody_who_is_in(runtime_root: Path) -> None:
    answer = run_unshared(
        ["--mount"],
        f"""
        import contextlib, subprocess
        from mpmm import Capacities, ModelManager, SegmentAllocationError

        subprocess.run(["mount", "-t", "tmpfs", "-o", "size={TMPFS_BYTES}", "none", "/dev/shm"], check=True)
        small = Capacities(models=256, instances=512, events=2048)
        with ModelManager(namespace="one", memory_source="booked", capacities=small) as manager:
            with open("/dev/shm/filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(4096))
            # Every page that can be touched: rows of all tables, and the event ring all the way round.
            for number in range(300):
                with manager.model(f"model {{number}}", lambda: "a handle"):
                    pass
            for _ in range(1500):
                with manager.model("model 299", lambda: "a handle"):
                    pass
            try:
                ModelManager(namespace="other", memory_source="booked")
            except SegmentAllocationError as error:
                print(error.size_bytes > 0, "/dev/shm" in str(error))
        """,
    )
    assert answer == "True True"
    assert not (runtime_root / "one").exists()


@can_unshare
def test_a_maker_that_dies_before_its_segment_has_memory_ends_no_process_that_looks(runtime_root: Path) -> None:
    answer = run_unshared(
        ["--mount"],
        f"""
        import contextlib, os, signal, subprocess
        from mpmm import ModelManager, SegmentAllocationError
        from mpmm.shared_state.snapshot import read_snapshot

        subprocess.run(["mount", "-t", "tmpfs", "-o", "size={TMPFS_BYTES}", "none", "/dev/shm"], check=True)
        with open("/dev/shm/filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        pid = os.fork()
        if pid == 0:
            os.posix_fallocate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            ModelManager(namespace="one", memory_source="booked")
        os.waitpid(pid, 0)
        left = [name for name in os.listdir("/dev/shm") if name.startswith("mpmm-")]
        try:
            read_snapshot("one")
        except Exception as error:
            print(len(left), type(error).__name__)
        try:
            ModelManager(namespace="one", memory_source="booked")
        except SegmentAllocationError:
            print("no memory")
        """,
    )
    assert answer.split("\n")[1:] == ["no memory"]
    assert answer.startswith("1 ")
    assert not (runtime_root / "one").exists()


@can_unshare
def test_processes_of_two_pid_namespaces_share_one_state_and_take_back_what_the_dead_had(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    with manager.model("a", lambda: "handle of a"):
        pass
    # In there it is process 1, whose number and start time mean something else out here.
    answer = run_unshared(
        ["--pid", "--fork", "--mount-proc"],
        f"""
        import os
        from mpmm import ModelManager

        manager = ModelManager(namespace={namespace!r}, memory_source="booked")
        print(os.getpid(), manager.acquire_model("a", lambda: "never"), flush=True)
        os._exit(0)
        """,
    )
    assert answer == "1 handle of a"
    wait_until(lambda: len(read_snapshot(namespace).members) == 1, "the dead one is taken back")
    with manager.model("a", lambda: "another copy") as handle:
        assert handle == "handle of a", "the dead one's hold is gone"
    assert problems(namespace) == []


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0], ids=["back", "forward"])
def test_a_clock_that_jumps_changes_no_wait(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    manager, impatient = new_manager(), new_manager(wait_timeout_seconds=0.3)
    manager._estimator.set_initial_estimate("a", 900.0)
    handle = manager.acquire_model("a", lambda: "a handle")
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + jump_s)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(jump_s * 1e9))
    watch = Stopwatch()
    with pytest.raises(AcquireTimeoutError):
        impatient.acquire_model("a", lambda: "never")
    assert watch.s() >= 0.3
    assert watch.calm_s() < 3
    manager.release_model("a", handle)
    with manager.model("a", lambda: "never") as again:
        assert again == handle
    snapshot = read_snapshot(namespace)
    assert 0 <= snapshot.members[0].attached_for_s < 60
    assert problems(namespace) == []


def test_a_killed_server_that_is_still_being_torn_down_keeps_no_registry(runtime_root: Path) -> None:
    registry = registry_for(None)
    registry.join()
    large = "import sys; kept = bytearray(400 << 20); print(flush=True); sys.stdin.read()"
    server = subprocess.Popen([sys.executable, "-c", large], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    record = new_record(registry, "killed", spawned=True, ready=True)
    record = replace(record, pid=server.pid, start_time=start_time_of(server.pid) or 0.0)
    assert record.is_running()
    server.kill()
    assert not record.is_running()
    server.communicate()
    assert not record.is_running() and record.has_ended()


def test_a_client_that_leaves_while_another_process_probes_leaves_no_registry_behind(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, prober = ServerRegistry(runtime_root), ServerRegistry(runtime_root)
    client.join()
    try_shared = LockFile.try_shared

    def probe_while_the_client_leaves(lock: LockFile) -> bool:
        shared = try_shared(lock)
        client.leave()
        return shared

    monkeypatch.setattr(LockFile, "try_shared", probe_while_the_client_leaves)
    claim = prober.claim_if_abandoned()
    assert claim is not None
    prober.remove_if_unused()
    claim.close()
    assert not prober.path.exists()


def test_a_pid_that_was_given_to_another_process_is_not_taken_for_the_server(runtime_root: Path) -> None:
    registry = registry_for(None)
    registry.join()
    record = replace(new_record(registry, "reused", spawned=True, ready=True), start_time=1.0)
    assert not record.is_running()
    life = registry.take_life("reused")
    assert life is not None
    write_record(life, record)
    assert server_pid("reused") is None
    life.path.unlink()
    life.close()


# ---- other users ------------------------------------------------------------------------------------------------


def first_bytes_from(path: str) -> bytes:
    """Return what a socket sends to a client that only listens."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(path)
        return connection.recv(100)


@as_root
def test_another_user_cannot_read_the_segment(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    path = Path(f"/dev/shm/{manager._connected().namespace.segment.name}")
    assert "PermissionError" in as_nobody(path.read_bytes)


@as_root
def test_another_user_can_neither_see_nor_connect_to_a_model_server(runtime_root: Path) -> None:
    MultiProcessShared(dict, tag="secret", always_proxy=True).acquire()
    sockets = [str(path) for path in runtime_root.rglob("*") if path.is_socket()]
    assert sockets
    assert "PermissionError" in as_nobody(lambda: os.listdir(runtime_root / "shared"))
    assert "PermissionError" in as_nobody(lambda: first_bytes_from(sockets[0]))
    MultiProcessShared(dict, tag="secret", always_proxy=True).unsafe_hard_delete()


@as_root
def test_another_user_who_gets_at_the_socket_is_not_served(runtime_root: Path) -> None:
    MultiProcessShared(dict, tag="secret", always_proxy=True).acquire()
    for path in (runtime_root, *(p for p in runtime_root.rglob("*") if p.is_dir() or p.is_socket())):
        path.chmod(0o777)
    socket_path = next(str(path) for path in runtime_root.rglob("*") if path.is_socket())
    # Nothing comes but the end: not even a challenge, let alone a word that would be unpickled.
    answer = as_nobody(lambda: first_bytes_from(socket_path))
    assert answer == "b''" or "ConnectionResetError" in answer
    for path in (runtime_root, *(p for p in runtime_root.rglob("*") if p.is_dir() or p.is_socket())):
        path.chmod(0o700)
    MultiProcessShared(dict, tag="secret", always_proxy=True).unsafe_hard_delete()


def test_processes_of_two_namespaces_do_not_see_each_other(new_process: NewProcess) -> None:
    one, other = new_process(namespace="one"), new_process(namespace="other")
    handle = one.call(acquire, "a")
    assert other.call(acquire, "a") != handle
    one.call(release)
    assert len(read_snapshot("one").members) == len(read_snapshot("other").members) == 1
