"""Loads that return the same handle: one memory in the accounts, unloaded with the last of the instances."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from crash_lab import Lab
from crash_lab import lab as lab  # the fixture
from harness import NewManager, NewProcess, Seat, acquire, copies_of, learn, problems, release, wait_until
from loaders import LoadsServer, MakesServed, served

from mpmm.model_manager import ModelManager
from mpmm.shared_state.snapshot import read_snapshot


def sizes(namespace: str, tag: str) -> list[float]:
    """Return what the instances of a tag are accounted with, smallest first."""
    return sorted(copy.mb for copy in copies_of(namespace, tag))


def used_mb(manager: ModelManager) -> float:
    """Return the memory in use by accounting."""
    return float(manager._connected().figures.stats()[0])


def two_held(manager: ModelManager, *tags: str) -> Seat:
    """Hold instances of these tags whose loaders return the same handle."""
    seat = Seat(manager)
    for tag in tags:
        acquire(seat, tag, lambda: "same handle")
    return seat


def test_two_loads_of_one_handle_are_counted_once_and_said_once(
    namespace: str, new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = new_manager()
    learn(Seat(manager), a=400)
    with caplog.at_level(logging.WARNING, "mpmm"):
        two_held(manager, "a", "a")
    assert (sizes(namespace, "a"), used_mb(manager)) == ([0, 400], 400)
    # There is room for it, which two of 400 MB would not leave.
    acquire(Seat(manager), "a", lambda: "same handle")
    acquire(Seat(manager), "b", lambda: "another")
    assert len([record for record in caplog.records if "same handle" in record.getMessage()]) == 1
    assert problems(namespace) == []


def test_evicting_idle_twins_frees_what_was_counted(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    seat = two_held(manager, "a", "a")
    learn(seat, a=400, big=950)
    release(seat)
    release(seat)
    acquire(seat, "big", lambda: "big handle")
    assert (copies_of(namespace, "a"), used_mb(manager)) == ([], 950)
    assert problems(namespace) == []


@pytest.mark.parametrize("first", [0, 1], ids=["first loaded", "last loaded"])
def test_evicting_one_whose_twin_is_in_use_frees_nothing(first: int, namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    learn(Seat(manager), a=400, big=700)
    one, two = two_held(manager, "a"), two_held(manager, "a")
    if first:
        one, two = two, one
    release(one)
    # As if a load had run out of memory: all that is idle goes.
    manager._connected().out_of_memory.make_room(1)
    assert len(copies_of(namespace, "a")) == 1
    assert (sizes(namespace, "a"), used_mb(manager)) == ([400], 400)
    release(two)
    acquire(one, "big", lambda: "big handle")
    assert (copies_of(namespace, "a"), used_mb(manager)) == ([], 700)
    assert problems(namespace) == []


def test_an_idle_one_that_expires_leaves_its_memory_to_its_twin(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(idle_ttl_seconds=0.2, poll_interval=0.05)
    learn(Seat(manager), a=400)
    one, two = two_held(manager, "a"), two_held(manager, "a")
    release(one)
    wait_until(lambda: len(copies_of(namespace, "a")) == 1, "the idle one expires")
    assert sizes(namespace, "a") == [400]
    release(two)
    wait_until(lambda: not copies_of(namespace, "a"), "so does the other one")
    assert used_mb(manager) == 0


def test_a_pinned_model_keeps_what_another_tag_shares_with_it(namespace: str, new_manager: NewManager) -> None:
    manager, impatient = new_manager(), new_manager(wait_timeout_seconds=0.5)
    manager.pin("b")
    learn(Seat(manager), a=400, b=300, big=700)
    seat = two_held(manager, "a", "b")
    release(seat)
    release(seat)
    with pytest.raises(TimeoutError):
        impatient.acquire_model("big", lambda: "big handle")
    wait_until(lambda: not copies_of(namespace, "a"), "the one that is not pinned is gone")
    assert sizes(namespace, "b") == [400], "what is in memory is what was loaded first"
    assert problems(namespace) == []


def test_the_server_of_twins_lives_until_the_last_of_them_is_unloaded(
    namespace: str, new_process: NewProcess, new_gpus: Callable[..., Any]
) -> None:
    gpus = new_gpus(1000)
    one, two = new_process(memory_source="nvml"), new_process(memory_source="nvml")
    one.call(learn, a=400, big=900)
    load = LoadsServer("same", MakesServed(gpus, 400))
    one.call(acquire, "a", load)
    two.call(acquire, "a", load)
    assert sizes(namespace, "a") == [0, 400]
    one.call(release)
    assert served("same").pid() > 0
    two.call(release)
    two.call(acquire, "big", LoadsServer("big", MakesServed(gpus, 900)))
    snapshot = read_snapshot(namespace)
    assert (copies_of(namespace, "a"), snapshot.out_of_memory, snapshot.written_off_mb) == ([], 0, 0)
    assert problems(namespace) == []


@pytest.mark.parametrize("users", [1, 3])
def test_who_still_holds_what_was_lost_is_no_twin_of_the_next_copy(
    users: int, namespace: str, new_process: NewProcess
) -> None:
    first, second = new_process(), new_process()
    first.call(learn, a=400)
    loader = LoadsServer(f"{namespace}-same")
    handle = first.call(acquire_for, "a", loader, users)
    (server,) = (member.pid for member in read_snapshot(namespace).members if member.kind == "server")
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: [copy.mb for copy in copies_of(namespace, "a")] == [0], "the death is noticed")
    assert second.call(acquire_for, "a", loader, users) == handle
    assert sum(sizes(namespace, "a")) == 400, "it is in memory, and nothing else is"
    second.call(release)
    second.call(unload, "a")
    wait_until(lambda: len(copies_of(namespace, "a")) == 1, "the new one is unloaded, although the lost one is held")
    wait_until(lambda: all(one.kind != "server" for one in read_snapshot(namespace).members), "so has its server ended")
    first.call(release)
    wait_until(lambda: not copies_of(namespace, "a"), "nothing is left")
    assert problems(namespace) == []


def acquire_for(seat: Seat, tag: str, loader: Callable[[], Any], users: int) -> Any:
    """Acquire and keep a copy that several may use at a time."""
    seat.held.append((tag, seat.manager.acquire_model(tag, loader, users=users)))
    return seat.held[-1][1]


def unload(seat: Seat, tag: str) -> int:
    """Ask for an unload, and do not wait for it."""
    return int(seat.manager.unload(tag, timeout_seconds=0))


def test_what_is_measured_of_a_server_counts_for_the_twin_that_stays(lab: Lab) -> None:
    first, second = lab.idle(server=True), lab.active()
    lab.do(lambda t, tr: tr.unloads.begin(t, first, lab.victim, evicted=True))
    lab.do(lambda t, tr: tr.measurements.measure(t, lab.server, {0: 120.0}))
    assert [lab.tables.instances[row].mb for row in (first, second)] == [0.0, 120.0]
    assert lab.problems() == []


@pytest.mark.parametrize("evicted", [False, True], ids=["asked for", "evicted"])
def test_an_idle_twin_goes_with_another_one_only_where_that_is_evicted(lab: Lab, evicted: bool) -> None:
    rows = [lab.idle("a"), lab.idle("b")]
    lab.do(lambda t, tr: tr.unloads.begin(t, rows[0], lab.victim, evicted))
    snapshot = read_snapshot(lab.namespace.name)
    assert [snapshot.instances[row].state for row in rows] == ["unloading", "unloading" if evicted else "idle"]
    assert [snapshot.instances[row].mb for row in rows] == [0.0, 90.0]
    with lab.namespace.transaction():
        unloads = [lab.namespace.transitions.twins.unloads_handle(row) for row in rows]
    assert unloads == [False, True], "the handle is unloaded once, with the last of them"
