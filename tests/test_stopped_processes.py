"""Processes that are stopped or stuck, but not dead: the others name them, and do their work."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from device import SimulatedDevice
from harness import (
    NewDevice,
    NewGate,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    leader_pid,
    model_of,
    problems,
    shut_down,
    stop_in_transaction,
    stop_outside_of_transactions,
    wait_until,
    waiting,
)
from loaders import Gate, LoadFails, Loads
from patience import DEADLINE_S, Stopwatch

from mpmm import cli
from mpmm.errors import ClosedError, LockTimeoutError, NotAcquiredError
from mpmm.model_manager import leader as leader_module
from mpmm.model_manager.leader import DEPUTIES
from mpmm.shared_state.layout import Header
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.namespace import LEAST_LEAVE_S, Namespace
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources import DeviceSample

# ---- stopped, not dead -------------------------------------------------------------------------------------


def test_a_stopped_holder_of_the_lock_is_named_and_everything_goes_on_after_it(
    namespace: str, new_process: NewProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    sleeper, other = new_process(lock_timeout_seconds=1.0), new_process()
    sleeper.send(stop_in_transaction)
    sleeper.wait_until_stopped()
    watch = Stopwatch()
    with pytest.raises(LockTimeoutError, match=f"process {sleeper.pid} holds it") as caught:
        other.call(acquire, "a")
    assert watch.calm_s() < 3
    assert (caught.value.holder_pid, caught.value.timeout_seconds) == (sleeper.pid, 1.0)
    snapshot = read_snapshot(namespace)
    lock = snapshot.lock
    assert (lock.held, lock.holder_stopped, lock.last_holder_pid) == (True, True, sleeper.pid)
    # Shown is the state before the open transaction.
    assert (snapshot.loads, snapshot.torn_words) == (0, 1)
    assert cli.main(["inspect", namespace]) == 0
    assert f"process {sleeper.pid} is stopped and has held the lock" in capsys.readouterr().out
    sleeper.resume()
    sleeper.result()
    assert other.call(acquire, "a")


def stop_with_lifecycle_lock(seat: Seat, folder: Path) -> None:
    """Be stopped as a process that joins or leaves."""
    lock = LockFile(folder / "lifecycle.lock")
    lock.exclusive(DEADLINE_S)
    os.kill(os.getpid(), signal.SIGSTOP)
    lock.close()


def stop_before_first_store(seat: Seat) -> None:
    """Be stopped with the lock of the segment, before this process can write into it that it has it."""
    segment = seat.manager._connected().namespace.segment
    lock = segment.lock_file()
    lock.exclusive(DEADLINE_S)
    segment.words[Header.LOCK_HOLDER] = os.getppid()  # the process that had it before
    os.kill(os.getpid(), signal.SIGSTOP)
    lock.close()


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="this kernel lists no locks")
@pytest.mark.parametrize("stop", [stop_with_lifecycle_lock, stop_before_first_store])
def test_one_that_joins_names_a_stopped_holder_of_either_lock(
    namespace: str, runtime_root: Path, new_process: NewProcess, stop: Callable[..., None]
) -> None:
    sleeper = new_process()
    sleeper.send(stop, *([runtime_root / namespace] if stop is stop_with_lifecycle_lock else []))
    sleeper.wait_until_stopped()
    with pytest.raises(LockTimeoutError, match=f"process {sleeper.pid} holds it") as caught:
        Namespace.join(namespace, timeout_s=0.3)
    assert caught.value.holder_pid == sleeper.pid
    sleeper.resume()
    sleeper.result()
    assert not read_snapshot(namespace).lock.holder_stopped
    assert problems(namespace) == []


def test_a_killed_holder_of_the_lock_leaves_the_state_as_it_was_before(namespace: str, new_process: NewProcess) -> None:
    victim, other = new_process(), new_process()
    victim.send(stop_in_transaction)
    victim.wait_until_stopped()
    victim.kill()
    assert other.call(acquire, "a")
    snapshot = read_snapshot(namespace)
    assert (snapshot.loads, snapshot.rollbacks) == (1, 1)
    assert problems(namespace) == []


@pytest.mark.parametrize("hold", ["acquired", "in a block"])
def test_a_release_that_cannot_get_the_lock_is_made_as_soon_as_it_is_free(
    hold: str, namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    sleeper, other = new_process(lock_timeout_seconds=1.0), new_process()
    began, go = new_gate(), new_gate()
    other.send(acquire_and_release_at if hold == "acquired" else use_in_block, "a", began, go)
    began.wait()
    sleeper.send(stop_in_transaction)
    sleeper.wait_until_stopped()
    go.open()
    # It raises nothing, since the caller could do no more about it.
    other.result()
    sleeper.resume()
    sleeper.result()
    wait_until(lambda: model_of(namespace, "a").idle == 1, "it is given back")
    assert other.call(acquire, "a")
    assert problems(namespace) == []


def acquire_and_release_at(seat: Seat, tag: str, began: Gate, go: Gate) -> None:
    """Hold a copy until the gate opens."""
    copy = seat.manager.acquire_model(tag, Loads())
    began.open()
    go.wait()
    seat.manager.release_model(tag, copy)
    with pytest.raises(NotAcquiredError):
        seat.manager.release_model(tag, copy)


def use_in_block(seat: Seat, tag: str, began: Gate, go: Gate) -> None:
    """Hold a copy in a block until the gate opens."""
    with seat.manager.model(tag, Loads()):
        began.open()
        go.wait()


def test_a_load_that_ends_while_the_locks_holder_is_stopped_is_not_lost(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    sleeper, other = new_process(lock_timeout_seconds=1.0), new_process()
    began, go = new_gate(), new_gate()
    other.send(acquire, "a", Loads("a", began, go))
    began.wait()
    sleeper.send(stop_in_transaction)
    sleeper.wait_until_stopped()
    go.open()
    time.sleep(1.3)
    assert not other.has_result(), "it waits for the lock for longer than others do"
    sleeper.resume()
    sleeper.result()
    assert other.result()
    assert (read_snapshot(namespace).loads, model_of(namespace, "a").active) == (1, 1)


def test_a_process_can_leave_while_the_locks_holder_is_stopped(namespace: str, new_process: NewProcess) -> None:
    sleeper, other = new_process(lock_timeout_seconds=1.0, fallback_memory_mb=100), new_process()
    other.call(acquire, "a")
    other.call(wait_in_a_thread, "b")
    wait_until(lambda: waiting(namespace, "b"), "a thread waits")
    sleeper.send(stop_in_transaction)
    sleeper.wait_until_stopped()
    other.call(shut_down)
    sleeper.resume()
    sleeper.result()
    wait_until(lambda: [m.pid for m in read_snapshot(namespace).members] == [sleeper.pid], "the other one is gone")
    assert waiting(namespace) == []
    assert problems(namespace) == []


def test_a_process_leaves_within_one_time_out_of_the_lock_though_its_background_thread_waits_for_it(
    namespace: str, new_process: NewProcess
) -> None:
    sleeper, other = new_process(lock_timeout_seconds=3.0), new_process()
    other.call(acquire, "a")
    sleeper.send(stop_in_transaction)
    sleeper.wait_until_stopped()
    other.call(have_background_wait)
    waited_s, allowed_s, took_s = other.call(shut_down_and_say_how_long_it_may_wait)
    print(f"left after {took_s:.2f} s")
    # A second more, for what else a busy machine does before the second wait.
    assert allowed_s < max(LEAST_LEAVE_S, 3.0 - waited_s) + 1.0
    sleeper.resume()
    sleeper.result()
    wait_until(lambda: [m.pid for m in read_snapshot(namespace).members] == [sleeper.pid], "the other one is gone")
    assert model_of(namespace, "a").active == 0
    assert problems(namespace) == []


def have_background_wait(seat: Seat) -> None:
    """Leave a change to the background thread, and wait until it waits for the lock."""
    session = seat.manager._connected()
    session.deferred.defer(lambda t: False)
    wait_until(lambda: session.namespace.lock.may_be_abandoned, "it waits for the lock")


def shut_down_and_say_how_long_it_may_wait(seat: Seat) -> tuple[float, float, float]:
    """Leave; return when this began to wait for the lock, for how long it may do so, and how long all took."""
    watch, waits = Stopwatch(), []
    leave_row = Namespace._leave_row

    def note(member: Namespace, close: bool = False, timeout_s: float = math.inf) -> bool:
        waits.append((watch.s(), timeout_s))
        return leave_row(member, close, timeout_s)

    with patch.object(Namespace, "_leave_row", note):
        seat.manager.shutdown()
    return *waits[0], watch.s()


def wait_in_a_thread(seat: Seat, tag: str) -> None:
    """Begin to wait for a model; the shutdown ends it."""

    def wait() -> None:
        with contextlib.suppress(ClosedError):
            seat.manager.acquire_model(tag, LoadFails("not to be called"))

    threading.Thread(target=wait).start()


def test_the_dead_are_buried_while_the_leader_is_stopped(namespace: str, new_process: NewProcess) -> None:
    leader = new_process(fallback_memory_mb=100)
    victim, other = new_process(), new_process()
    victim.call(acquire, "a")
    other.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "the other one waits")
    stop_outside_of_transactions(leader, namespace)
    victim.kill()
    watch = Stopwatch()
    assert other.result()
    print(f"the memory of the dead was free after {watch.s():.2f} s")
    assert watch.calm_s() < 3
    leader.resume()
    assert problems(namespace) == []


def test_who_stands_in_where_those_next_in_line_are_stopped_too_looks_as_often_as_they(
    namespace: str, new_process: NewProcess, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = [new_process() for _ in range(1 + DEPUTIES)]
    words = new_manager()._connected().namespace.segment.words
    for process in front:
        stop_outside_of_transactions(process, namespace)
    polled = words[Header.POLLED]
    wait_until(lambda: words[Header.POLLED] != polled, "the last one polls in their place")
    # Its next look may have been planned by now, but not those behind that.
    for name in ("RESERVE_TICK_S", "RESERVE_REST_S"):
        monkeypatch.setattr(leader_module, name, 1000.0)
    for _ in range(3):
        polled = words[Header.POLLED]
        wait_until(lambda polled=polled: words[Header.POLLED] != polled, "it goes on")  # type: ignore[misc]  # mypy has no type for a lambda's defaults
    for process in front:
        process.resume()


def be_stuck(seat: Seat, seconds: float) -> None:
    """Hold the interpreter lock in a native call, so that no other thread of this process runs."""
    # With the mutex, so that no other thread is in the middle of a transaction: then others could not do anything.
    with seat.manager._connected().namespace.lock._mutex:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))


@pytest.mark.parametrize("how", ["stopped", "in a native call"])
def test_a_stuck_leader_is_stood_in_for(
    namespace: str, new_process: NewProcess, new_device: NewDevice, how: str
) -> None:
    device = new_device(1000)
    device.cheap = False
    leader, _ = new_process(memory_source=device, poll_interval=0.1), new_process(memory_source=device)
    if how == "stopped":
        stop_outside_of_transactions(leader, namespace)
    else:
        leader.send(be_stuck, 6.0)
    stopped = time.monotonic()

    def sampled_since() -> float:
        age = read_snapshot(namespace).devices[0].sample_age_s
        assert age is not None
        return time.monotonic() - age - stopped

    wait_until(lambda: sampled_since() > 0.2, "somebody else takes samples", 3)
    print(f"first sample without the leader after {sampled_since():.2f} s")
    allocation = device.allocate(300)
    wait_until(lambda: read_snapshot(namespace).devices[0].used_mb == 300, "its samples are fresh", 5)
    assert leader_pid(read_snapshot(namespace)) == leader.pid
    device.free(allocation)
    leader.resume()
    if how != "stopped":
        leader.result()
    wait_until(lambda: read_snapshot(namespace).devices[0].used_mb == 0, "all go on", 5)
    assert problems(namespace) == []


class LoggingDevice(SimulatedDevice):
    """Takes a while for each sample, and writes down when that began and ended."""

    cheap = False

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        began = time.monotonic()
        samples = super().sample(server_pids)
        time.sleep(SAMPLE_S)
        with (self._folder / "log").open("a", encoding="ascii") as log:
            log.write(f"{began} {time.monotonic()} {os.getpid()}\n")
        return samples

    def log(self) -> list[tuple[float, float, int]]:
        """Return begin, end and pid of each sample, in the order of their begins."""
        lines = (self._folder / "log").read_text(encoding="ascii").splitlines()
        return sorted((float(began), float(ended), int(pid)) for began, ended, pid in map(str.split, lines))


SAMPLE_S = 0.5


def test_one_at_a_time_stands_in_for_a_stuck_leader(
    namespace: str, new_process: NewProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of one that is late for longer than that, because the machine is busy, the others would think that it has died.
    monkeypatch.setattr(leader_module, "STANDING_IN_NS", 2 * 10**9)
    device = LoggingDevice(tmp_path / "device", 1000)
    leader, *others = (new_process(memory_source=device, poll_interval=0.1) for _ in range(4))
    stop_outside_of_transactions(leader, namespace)
    stopped = time.monotonic()

    def in_its_place() -> list[tuple[float, float, int]]:
        return [entry for entry in device.log() if entry[0] > stopped]

    wait_until(lambda: len(in_its_place()) >= 3, "others take samples")
    for (_, ended, pid), (began, _, next_pid) in itertools.pairwise(in_its_place()):
        assert ended <= began, f"{pid} and {next_pid} polled at once"
    leader.resume()
    assert {pid for *_, pid in in_its_place()} <= {other.pid for other in others}
    assert problems(namespace) == []
