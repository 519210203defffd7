"""A process that dies loses its own work, and no other process does: real processes, real signals.

`SOON_S` is the promised second plus one more; the tests print the figures.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from crash_lab import Lab
from crash_lab import lab as lab  # the fixture
from device import SimulatedDevice
from harness import (
    NewDevice,
    NewGate,
    NewManager,
    NewProcess,
    Process,
    Seat,
    acquire,
    copies_of,
    files_in,
    force_reset,
    has_ended,
    in_thread,
    leader_pid,
    learn,
    model_of,
    problems,
    release,
    segments_of,
    wait_until,
    waiting,
)
from loaders import Gate, LoadFails, Loads, LoadsObject, LoadsServer, MakesServed, served
from patience import DEADLINE_S, Stopwatch
from random_tables import RandomTables

from mpmm.errors import AcquireTimeoutError, LoadTimeoutError, ModelServerError
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.runtime_dir import default_root
from mpmm.shared_state.segment import segment_name
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transitions import hand_over

SOON_S = 2.0


leads = pytest.mark.parametrize("leads", [False, True], ids=["not leading", "leading"])


# With polls that far apart none of them makes up for a wake-up that is forgotten.
polls = pytest.mark.parametrize("poll_interval", [0.5, 30.0], ids=["", "polling rarely"])


def two_processes(new_process: NewProcess, leads: bool, **arguments: Any) -> tuple[Process, Process]:
    """Return the one that is to die and another one; the first to come leads."""
    one, two = new_process(**arguments), new_process(**arguments)
    return (one, two) if leads else (two, one)


def soon(process: Process, what: str, since: float) -> Any:
    """Return a process's result, which has to come soon after `since`."""
    outcome = process.result(SOON_S)
    print(f"{what} after {time.monotonic() - since:.2f} s")
    return outcome


def work(seat: Seat, tags: str, stop: Gate) -> int:
    """Acquire, use and release models until the gate opens; return how often."""
    rounds = 0
    while not stop.is_open():
        with seat.manager.model(tags[rounds % len(tags)], Loads(tags[rounds % len(tags)])) as copy:
            assert copy
            rounds += 1
    return rounds


# ---- workers -----------------------------------------------------------------------------------------------


def test_the_creators_death_disturbs_nobody(
    namespace: str, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate
) -> None:
    device = new_device(1000)
    creator = new_process(memory_source=device)
    creator.call(learn, a=100, b=150, c=200)
    handles = {}
    for tag in "abc":
        handles[tag] = creator.call(acquire, tag, Loads(tag))
        creator.call(release)
    others = [new_process(memory_source=device) for _ in range(3)]
    stop = new_gate()
    for other in others:
        other.send(work, "abc", stop)
    hits = read_snapshot(namespace).hits
    wait_until(lambda: read_snapshot(namespace).hits > hits + 50, "all are at work")
    assert leader_pid(read_snapshot(namespace)) == creator.pid
    creator.kill()
    killed = time.monotonic()
    wait_until(lambda: leader_pid(read_snapshot(namespace)) in [p.pid for p in others], "somebody else leads", SOON_S)
    print(f"a new leader after {time.monotonic() - killed:.2f} s")
    wait_until(lambda: (read_snapshot(namespace).devices[0].sample_age_s or SOON_S) < SOON_S, "it samples", SOON_S)
    hits = read_snapshot(namespace).hits
    wait_until(lambda: read_snapshot(namespace).hits > hits + 50, "the others go on")
    stop.open()
    assert all(other.result() > 0 for other in others)
    snapshot = read_snapshot(namespace)
    assert {model.tag: model.estimate_mb for model in snapshot.models} == {"a": 100, "b": 150, "c": 200}
    assert set(handles.values()) <= {copy.handle for copy in snapshot.instances}
    for tag in "abc":
        assert others[0].call(acquire, tag, LoadFails("not to be called")).startswith(tag)
        others[0].call(release)
    assert creator.pid not in [member.pid for member in read_snapshot(namespace).members]
    assert problems(namespace) == []


def leads_another(namespace: str, gone: tuple[int | None, ...]) -> bool:
    """Tell whether the leader is none of these pids."""
    return leader_pid(read_snapshot(namespace)) not in gone


def test_leaders_that_die_one_after_another_are_each_replaced_soon(namespace: str, new_process: NewProcess) -> None:
    processes = {process.pid: process for process in (new_process() for _ in range(8))}
    for _ in range(5):
        leader = leader_pid(read_snapshot(namespace))
        assert leader is not None
        processes.pop(leader).kill()
        gone = (None, leader)
        # The wake-up of the next in line is lost if a leader dies in the microseconds before it: then they sleep on.
        waited = wait_until(partial(leads_another, namespace, gone), "another one leads", 3 * SOON_S)
        print(f"a new leader after {waited:.2f} s")
    assert problems(namespace) == []


def die_before_the_wake_up(seat: Seat) -> None:
    """Hand the copy over, and die once that is committed, before the waiter is woken."""
    seat.manager._connected().scheduler.prewake = lambda instance: None
    vars(hand_over)["wake_all"] = lambda address: os.kill(os.getpid(), signal.SIGKILL)
    release(seat)


@polls
def test_where_the_deputies_have_died_others_look_for_the_leaders_death(
    namespace: str, new_process: NewProcess, poll_interval: float
) -> None:
    leader, first, second, *_, waiter = (new_process(poll_interval=poll_interval) for _ in range(6))
    leader.call(learn, a=800.0)
    leader.call(acquire, "a")
    waiter.send(acquire, "a")
    wait_until(lambda: waiting(namespace, "a"), "it waits")
    for deputy in (first, second):
        deputy.kill()
    wait_until(lambda: len(read_snapshot(namespace).members) == 4, "the leader has taken back what they had")
    # It tells the next ones in the same look.
    time.sleep(0.3)
    killed_at = time.monotonic()
    leader.kill()
    assert soon(waiter, "served", killed_at)


def test_a_waiter_whose_wake_up_died_with_its_sender_is_woken_all_the_same(
    namespace: str, new_process: NewProcess
) -> None:
    victim, other = new_process(max_model_copies=1), new_process(max_model_copies=1)
    copy = victim.call(acquire, "a")
    other.send(acquire, "a", LoadFails("not to be called"))
    wait_until(lambda: waiting(namespace, "a"), "the other one waits")
    began = time.monotonic()
    victim.send(die_before_the_wake_up)
    assert soon(other, "the waiter is woken", began) == copy
    other.call(release)
    assert problems(namespace) == []


@leads
@polls
def test_what_a_dead_client_held_goes_to_the_next_who_waits(
    namespace: str, new_process: NewProcess, leads: bool, poll_interval: float
) -> None:
    victim, other = two_processes(new_process, leads, poll_interval=poll_interval, fallback_memory_mb=100)
    copy = victim.call(acquire, "a")
    other.send(acquire, "a", LoadFails("not to be called"))
    wait_until(lambda: waiting(namespace, "a"), "the other one waits")
    victim.kill()
    assert soon(other, "the handle is handed over", time.monotonic()) == copy
    other.call(release)
    assert (model_of(namespace, "a").loads, read_snapshot(namespace).reaps) == (1, 1)
    assert problems(namespace) == []


@leads
def test_the_memory_of_a_dead_clients_object_goes_to_the_next_who_waits(
    namespace: str, new_process: NewProcess, new_device: NewDevice, leads: bool
) -> None:
    device = new_device(1000)
    victim, other = two_processes(new_process, leads, memory_source=device)
    victim.call(learn, a=600, b=700)
    victim.call(acquire, "a", LoadsObject("a", device=device, mb=600))
    other.send(acquire, "b", LoadsObject("b", device=device, mb=700))
    wait_until(lambda: waiting(namespace, "b"), "the other one waits")
    victim.kill()
    soon(other, "the memory is reused", time.monotonic())
    # The device may say that its memory is free before anybody has noticed the death.
    wait_until(lambda: not copies_of(namespace, "a"), "the copy is struck off")
    assert problems(namespace) == []


@leads
@polls
def test_the_reservation_of_a_dead_loader_goes_to_the_next_who_waits(
    namespace: str, new_process: NewProcess, new_gate: NewGate, leads: bool, poll_interval: float
) -> None:
    victim, other = two_processes(new_process, leads, poll_interval=poll_interval, fallback_memory_mb=100)
    began, never = new_gate(), new_gate()
    victim.send(acquire, "a", Loads("a", began, never))
    began.wait()
    other.send(acquire, "b", Loads("b"))
    wait_until(lambda: waiting(namespace, "b"), "the other one waits")
    victim.kill()
    soon(other, "the reservation is free", time.monotonic())
    assert (copies_of(namespace, "a"), read_snapshot(namespace).failed_loads) == ([], 1)
    assert problems(namespace) == []


@leads
@pytest.mark.parametrize("loaded", [False, True], ids=["while it loads", "while it holds the copy"])
def test_isolation_ends_with_the_death_of_him_who_profiles(
    namespace: str, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate, leads: bool, loaded: bool
) -> None:
    device = new_device(1000)
    victim, other = two_processes(new_process, leads, memory_source=device)
    other.call(learn, known=100)
    began, go = new_gate(), new_gate()
    victim.send(acquire, "unknown", LoadsObject("u", began, go, device, 300))
    began.wait()
    if loaded:
        go.open()
        victim.result()
    assert read_snapshot(namespace).isolated is not None
    other.send(acquire, "known", LoadsObject("k", device=device, mb=100))
    wait_until(lambda: waiting(namespace, "known"), "the other one waits for the end of the isolation")
    victim.kill()
    soon(other, "isolation ended", time.monotonic())
    assert read_snapshot(namespace).isolated is None
    assert problems(namespace) == []


@leads
@polls
def test_the_next_waiter_proceeds_when_the_head_of_the_queue_dies(
    namespace: str, new_process: NewProcess, leads: bool, poll_interval: float
) -> None:
    victim, other = two_processes(new_process, leads, poll_interval=poll_interval, fallback_memory_mb=300)
    holder = new_process()
    holder.call(learn, big=300)
    holder.call(acquire, "held")
    victim.send(acquire, "big")
    wait_until(lambda: waiting(namespace, "big"), "the head waits for all of the memory")
    other.send(acquire, "small")
    wait_until(lambda: waiting(namespace, "small"), "the next one stands behind it")
    assert [ticket.tag for ticket in waiting(namespace)] == ["big", "small"]
    victim.kill()
    soon(other, "the queue moved up", time.monotonic())
    assert waiting(namespace) == []
    assert problems(namespace) == []


def test_an_owner_that_dies_while_it_unloads_holds_up_nobody(
    namespace: str, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate
) -> None:
    device = new_device(1000)
    victim, other = two_processes(new_process, leads=True, memory_source=device)
    victim.call(learn, a=600, b=700)
    unloading = new_gate()
    victim.call(acquire, "a", LoadsObject("a", device=device, mb=600, unloading=unloading))
    victim.call(release)
    other.send(acquire, "b", LoadsObject("b", device=device, mb=700))
    unloading.wait()
    assert [copy.state for copy in copies_of(namespace, "a")] == ["unloading"]
    victim.kill()
    soon(other, "the memory is reused", time.monotonic())
    assert problems(namespace) == []


def test_after_the_death_of_all_the_next_to_come_finds_the_estimates_and_a_clean_state(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    processes = [new_process() for _ in range(3)]
    processes[0].call(learn, a=123)
    processes[0].call(acquire, "a")
    processes[1].send(acquire, "b", Loads("b", began := new_gate(), new_gate()))
    began.wait()
    for process in processes:
        process.kill()
    after = new_process()
    snapshot = read_snapshot(namespace)
    assert [member.pid for member in snapshot.members] == [after.pid]
    assert (snapshot.instances, snapshot.active, snapshot.loading, snapshot.waiting) == ((), 0, 0, 0)
    assert snapshot.leader is not None
    assert model_of(namespace, "a").estimate_mb == 123
    assert after.call(acquire, "a")
    assert problems(namespace) == []


# ---- model servers -----------------------------------------------------------------------------------------


def server_of(namespace: str, tag: str) -> int | None:
    """Return the pid of the server that keeps the copy of a tag, if there is one."""
    snapshot = read_snapshot(namespace)
    slots = [copy.server for copy in snapshot.instances if copy.tag == tag]
    return next((member.pid for member in snapshot.members if member.slot in slots), None)


@polls
def test_the_server_that_a_dead_loader_was_starting_is_ended_too(
    namespace: str, new_process: NewProcess, new_gate: NewGate, poll_interval: float
) -> None:
    victim, other = two_processes(new_process, leads=True, poll_interval=poll_interval, fallback_memory_mb=100)
    began = new_gate()
    victim.send(acquire, "a", LoadsServer("a", MakesServed(began=began, go=new_gate())))
    began.wait()
    server = server_of(namespace, "a")
    assert server is not None
    process = psutil.Process(server)
    other.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "the other one waits")
    victim.kill()
    killed = time.monotonic()
    soon(other, "the reservation is free", killed)
    wait_until(lambda: has_ended(process), "the server ended", SOON_S)
    print(f"the server ended after {time.monotonic() - killed:.2f} s")
    assert copies_of(namespace, "a") == []
    assert problems(namespace) == []


@pytest.mark.parametrize("what", ["has a server", "had a server", "was starting its first server"])
def test_after_the_death_of_the_only_worker_nothing_stays(
    namespace: str, runtime_root: Path, new_process: NewProcess, new_gate: NewGate, what: str
) -> None:
    worker = new_process()
    if what == "was starting its first server":
        began = new_gate()
        worker.send(acquire, "a", LoadsServer("a", MakesServed(began=began, go=new_gate())))
        began.wait()
    else:
        worker.call(acquire, "a", LoadsServer("a"))
        worker.call(release)
    if what == "had a server":
        worker.call(force_reset)
    worker.kill()
    wait_until(lambda: not (runtime_root / namespace).exists(), "the namespace is removed")
    wait_until(lambda: not segments_of(runtime_root), "the segment is removed")
    wait_until(lambda: files_in(runtime_root) == [], "the registry is removed")


def update_settings(seat: Seat, **changes: float) -> None:
    """Change parameters of the namespace."""
    seat.manager.update_settings(**changes)


def test_a_load_past_its_time_limit_is_given_up_and_its_server_killed(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    limits = {"fallback_memory_mb": 100, "poll_interval": 0.1}
    slow, other = new_process(**limits), new_process(**limits)
    began = new_gate()
    slow.send(acquire, "a", LoadsServer("a", MakesServed(began=began, go=new_gate())))
    began.wait()
    server = server_of(namespace, "a")
    assert server is not None
    process = psutil.Process(server)
    # Only now, as the first server of a process takes a while to start.
    other.call(update_settings, load_timeout_seconds=0.5)
    other.send(acquire, "b")
    with pytest.raises(LoadTimeoutError, match="load_timeout_seconds"):
        slow.result()
    assert other.result()
    assert has_ended(process)
    assert copies_of(namespace, "a") == []
    assert problems(namespace) == []


def test_a_loader_that_returns_after_its_load_was_given_up_gets_an_error_and_its_copy_is_unloaded(
    namespace: str, new_process: NewProcess, new_gate: NewGate, new_device: Callable[..., SimulatedDevice]
) -> None:
    device = new_device(100.0)
    slow, other = (new_process(poll_interval=0.1, memory_source=device) for _ in range(2))
    slow.call(learn, a=50.0)
    began, go = new_gate(), new_gate()
    slow.send(acquire, "a", LoadsObject("a", began, go, device, 50.0))
    began.wait()
    # Only now, as otherwise a busy machine might give the load up before its loader runs.
    other.call(update_settings, load_timeout_seconds=0.5)
    wait_until(lambda: not copies_of(namespace, "a"), "the load is given up")
    go.open()
    with pytest.raises(LoadTimeoutError):
        slow.result()
    assert device.used_mb() == 0
    assert problems(namespace) == []


def test_a_load_that_was_given_up_before_its_loader_ran_spoils_no_measurement(
    namespace: str,
    new_manager: NewManager,
    new_process: NewProcess,
    new_device: Callable[..., SimulatedDevice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = new_device(1000.0)
    manager = new_manager(poll_interval=0.1, memory_source=device)
    other = new_process(memory_source=device)
    reached, go_on = threading.Event(), threading.Event()
    figures = manager._connected().figures
    sample = figures.sample
    rows: list[int] = []

    def hang(timeout_s: float | None = None) -> None:
        sample(timeout_s)
        if timeout_s is None and not reached.is_set():
            rows.extend(copy.row for copy in copies_of(namespace, "a"))
            reached.set()
            assert go_on.wait(DEADLINE_S)

    monkeypatch.setattr(figures, "sample", hang)
    loaded: list[str] = []
    late, outcome = in_thread(lambda: manager.acquire_model("a", lambda: loaded.append("a")))
    assert reached.wait(DEADLINE_S)
    # For this load alone.
    manager.update_settings(load_timeout_seconds=0.1)
    wait_until(lambda: not copies_of(namespace, "a"), "the load is given up")
    manager.update_settings(load_timeout_seconds=DEADLINE_S)
    other.call(acquire, "b", LoadsObject("b", device=device, mb=300.0))
    assert [copy.row for copy in copies_of(namespace, "b")] == rows, "it has the row of the load that was given up"
    go_on.set()
    late.join()
    assert [type(error) for error in outcome] == [LoadTimeoutError]
    other.call(release)
    assert model_of(namespace, "b").estimate_mb == 300
    assert loaded == [], "its loader is not run any more"
    assert problems(namespace) == []


def test_a_handle_whose_server_died_while_idle_is_never_handed_out(namespace: str, new_process: NewProcess) -> None:
    one, two = new_process(), new_process()
    one.call(acquire, "a", LoadsServer("a"))
    one.call(release)
    first = server_of(namespace, "a")
    assert first is not None
    assert two.call(acquire, "a", LoadFails("not to be called")) == "a"
    assert two.call(pid_of_served, "a") == first
    two.call(release)
    kill(first)
    # At once, without waiting for anybody to notice the death.
    two.call(acquire, "a", LoadsServer("a"))
    second = server_of(namespace, "a")
    assert second not in (None, first)
    assert two.call(pid_of_served, "a") == second
    two.call(release)
    wait_until(lambda: server_of(namespace, "a") == second, "the copy is the new one's")
    wait_until(lambda: len(read_snapshot(namespace).members) == 3, "the dead one is reaped")
    assert [copy.state for copy in copies_of(namespace, "a")] == ["idle"]
    assert (model_of(namespace, "a").loads, problems(namespace)) == (2, [])


def kill(pid: int) -> None:
    """SIGKILL to a process that is not our child, and wait for the end."""
    process = psutil.Process(pid)
    process.kill()
    wait_until(lambda: has_ended(process), f"pid {pid} is gone")


def pid_of_served(_: Seat, handle: str) -> int:
    """Ask the object behind a handle where it is."""
    pid = served(handle).pid()
    assert isinstance(pid, int)
    return pid


@polls
def test_a_server_that_dies_in_use_costs_the_call_and_its_memory_is_free_again(
    namespace: str, new_process: NewProcess, new_gate: NewGate, poll_interval: float
) -> None:
    user, other = new_process(fallback_memory_mb=100, poll_interval=poll_interval), new_process()
    user.call(acquire, "a", LoadsServer("a"))
    server = server_of(namespace, "a")
    assert server is not None
    began = new_gate()
    user.send(call_served, "a", began, new_gate())
    began.wait()
    other.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "the other one waits for memory")
    kill(server)
    # The row names no process that is gone while its holder has not noticed.
    wait_until(lambda: len(read_snapshot(namespace).members) == 2, "the server is reaped", SOON_S)
    assert problems(namespace) == []
    with pytest.raises(ModelServerError):
        user.result()
    user.call(release)
    soon(other, "the memory is free", time.monotonic())
    assert copies_of(namespace, "a") == []
    assert problems(namespace) == []


def call_served(_: Seat, handle: str, began: Gate, go: Gate) -> None:
    """Make a long call."""
    served(handle).wait_at(began, go)


# ---- giving up ---------------------------------------------------------------------------------------------


def timed_acquire(seat: Seat, tag: str) -> tuple[float, float]:
    """Return after how many seconds an acquire gave up, all of them and those of a machine that is not busy."""
    watch = Stopwatch()
    try:
        seat.manager.acquire_model(tag, LoadFails("not to be called"))
    except AcquireTimeoutError:
        return watch.s(), watch.calm_s()
    raise AssertionError(f"{tag} was to be had")


def test_a_waiter_gives_up_on_time_whatever_the_time_out_of_the_lock_is(
    namespace: str, new_process: NewProcess
) -> None:
    holder = new_process(fallback_memory_mb=100, lock_timeout_seconds=60.0)
    waiter = new_process(wait_timeout_seconds=0.5, lock_timeout_seconds=60.0)
    holder.call(acquire, "a")
    waited = [waiter.call(timed_acquire, tag) for tag in "bab"]
    assert all(seconds >= 0.5 for seconds, _ in waited)
    assert min(calm_s for _, calm_s in waited) < 0.6
    assert max(calm_s for _, calm_s in waited) < 1.0
    assert read_snapshot(namespace).tickets == ()


def test_waiting_for_the_lock_is_part_of_the_wait(namespace: str, new_process: NewProcess) -> None:
    holder = new_process(fallback_memory_mb=100, lock_timeout_seconds=60.0)
    waiter = new_process(wait_timeout_seconds=1.0, lock_timeout_seconds=60.0)
    holder.call(acquire, "a")
    elsewhere = LockFile(Path("/dev/shm", segment_name(default_root(), namespace)))
    elsewhere.exclusive(10.0)
    waiter.send(timed_acquire, "b")
    time.sleep(0.7)
    elsewhere.close()
    seconds, calm_s = waiter.result()
    assert seconds >= 1.0
    assert calm_s < 1.5


def test_a_newcomer_gives_up_on_time_where_the_lock_is_taken_when_it_has_just_joined(
    namespace: str, new_process: NewProcess, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = new_process(lock_timeout_seconds=60.0)
    elsewhere = LockFile(Path("/dev/shm", segment_name(default_root(), namespace)))
    join = Namespace.join

    def join_and_lose_the_lock(*arguments: Any, **options: Any) -> Namespace:
        joined = join(*arguments, **options)
        elsewhere.exclusive(10.0)
        return joined

    manager = new_manager(lock_timeout_seconds=60.0, wait_timeout_seconds=0.5)
    # As in a forked child, the next call joins.
    manager._connected().close()
    monkeypatch.setattr(Namespace, "join", join_and_lose_the_lock)
    watch = Stopwatch()
    with pytest.raises(AcquireTimeoutError):
        manager.acquire_model("a", Loads("a"))
    assert watch.calm_s() < 5.0
    elsewhere.close()
    # Its remains do not get in the way of others.
    first.call(acquire, "a")
    first.call(release)
    monkeypatch.undo()
    manager.release_model("a", manager.acquire_model("a", Loads("a")))
    assert problems(namespace) == []


def test_an_interrupted_waiter_leaves_the_queue_at_once_and_the_next_one_proceeds(
    namespace: str, new_process: NewProcess
) -> None:
    holder, interrupted, other = (new_process(fallback_memory_mb=300) for _ in range(3))
    holder.call(learn, big=300)
    holder.call(acquire, "held")
    interrupted.send(acquire, "big")
    wait_until(lambda: waiting(namespace, "big"), "the head waits")
    other.send(acquire, "small")
    wait_until(lambda: waiting(namespace, "small"), "the next one stands behind it")
    interrupted.signal(signal.SIGINT)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted.result()
    soon(other, "the queue moved up", began)
    assert waiting(namespace) == []
    assert interrupted.call(acquire, "again")
    assert problems(namespace) == []


def test_an_interrupted_loader_gives_up_its_reservation(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    interrupted, other = two_processes(new_process, leads=True, fallback_memory_mb=100)
    began = new_gate()
    interrupted.send(acquire, "a", Loads("a", began, new_gate()))
    began.wait()
    other.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "the other one waits")
    interrupted.signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted.result()
    soon(other, "the reservation is free", time.monotonic())
    assert problems(namespace) == []


def test_who_looks_for_the_dead_together_with_another_counts_none_of_them_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = RandomTables(0)
    namespace = made.namespace
    with closing(made):
        found = namespace.find_dead_members()
        assert namespace.reap_dead_members() == len(found) > 0
        reaps, said = read_snapshot(namespace.name).reaps, len(caplog.messages)
        # It has found them before the first one took them back, and has the lock afterwards.
        monkeypatch.setattr(namespace, "find_dead_members", lambda: found)
        assert namespace.reap_dead_members() == 0
        assert (read_snapshot(namespace.name).reaps, len(caplog.messages)) == (reaps, said)


@pytest.mark.parametrize(("make", "reaps"), [(Lab.idle, 1), (Lab.unloading, 0)], ids=["by itself", "by an unload"])
def test_a_server_that_an_unload_has_ended_is_not_counted_as_one_that_died(
    lab: Lab, make: Callable[..., int], reaps: int
) -> None:
    row = make(lab)
    lab.do(lambda t, tr: tr.loads.link_server(t, row, lab.server))
    assert lab.do(lambda t, tr: tr.members.reap(t, lab.server))
    snapshot = read_snapshot(lab.namespace.name)
    last = [event.kind for event in snapshot.events if event.kind in ("left", "reaped")]
    assert (snapshot.reaps, last) == (reaps, ["reaped" if reaps else "left"])
