"""Each model determines how long its idle copies are kept: forever, for some seconds, or not at all."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from harness import (
    NewDevice,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    learn,
    model_of,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject, Weights

from mpmm.cli import main
from mpmm.model_manager import acquire as acquire_module
from mpmm.model_manager import async_acquire
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import read_snapshot


def expired(namespace: str) -> list[tuple[str | None, float | None]]:
    """Return tag and time of the copies that were unloaded because they were unused."""
    events = read_snapshot(namespace).events
    return [(e.tag, e.seconds) for e in events if e.kind == "unload_began" and e.reason == Reason.EXPIRED]


def test_a_model_outlives_the_setting_or_goes_before_it(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(idle_ttl_seconds=0.15, poll_interval=0.03)
    with (
        manager.model("kept", Loads(), keep_alive_seconds=-1),
        manager.model("short", Loads(), keep_alive_seconds=0.01),
        manager.model("usual", Loads()),
    ):
        pass
    kept = {model.tag: model.keep_alive_s for model in read_snapshot(namespace).models}
    assert kept == {"kept": math.inf, "short": 0.01, "usual": None}
    wait_until(lambda: not copies_of(namespace, "usual"), "the setting holds for it")
    wait_until(lambda: not copies_of(namespace, "short"), "its own time is over")
    assert [copy.state for copy in copies_of(namespace, "kept")] == ["idle"]
    assert sorted(expired(namespace)) == [("short", 0.01), ("usual", 0.15)]
    assert problems(namespace) == []


@pytest.mark.parametrize("in_loop", [False, True])
def test_who_says_that_a_copy_is_not_kept_has_it_first(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, in_loop: bool
) -> None:
    manager = new_manager(poll_interval=3600)
    with manager.model("a", Loads()) as first:
        pass
    session, take = manager._connected(), acquire_module.take_before_queueing

    def poll_and_take(*arguments: Any) -> Any:
        # As the leader does at each poll, in whatever process.
        with session.namespace.transaction() as t:
            session.leader._unload_expired(t)
        return take(*arguments)

    for module in (acquire_module, async_acquire):
        monkeypatch.setattr(module, "take_before_queueing", poll_and_take)

    async def use() -> Any:
        async with manager.model_async("a", Loads(), keep_alive_seconds=0) as copy:
            return copy

    if in_loop:
        assert asyncio.run(use()) == first
    else:
        with manager.model("a", Loads(), keep_alive_seconds=0) as copy:
            assert copy == first
    wait_until(lambda: not copies_of(namespace, "a"), "it goes once it is given back")
    assert read_snapshot(namespace).loads == 1
    assert problems(namespace) == []


def test_a_copy_that_is_not_kept_goes_when_it_is_given_back(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(poll_interval=3600)
    unloaded = manager.acquire_model("a", Weights, keep_alive_seconds=0)
    manager.release_model("a", unloaded)
    wait_until(lambda: not copies_of(namespace, "a"), "it is unloaded without a poll")
    assert unloaded.unloaded

    async def use() -> None:
        async with manager.model_async("b", Weights, keep_alive_seconds=0):
            pass

    asyncio.run(use())
    wait_until(lambda: not copies_of(namespace, "b"), "a task's copy, too")
    assert expired(namespace) == [("a", 0.0), ("b", 0.0)]
    # The last word counts, that of an idle copy's user too.
    with manager.model("a", Weights, keep_alive_seconds=60):
        pass
    with manager.model("a", Weights):
        pass
    assert [copy.state for copy in copies_of(namespace, "a")] == ["idle"]
    with manager.model("a", Weights, keep_alive_seconds=0):
        assert len(copies_of(namespace, "a")) == 1
    wait_until(lambda: not copies_of(namespace, "a"), "it is not kept any more")
    assert problems(namespace) == []


def test_a_waiter_gets_what_is_kept_for_no_time(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, waiter = new_manager(max_model_copies=1), new_process()
    handle = manager.acquire_model("a", Loads(), keep_alive_seconds=0)
    waiter.send(acquire, "a")
    wait_until(lambda: waiting(namespace, "a"), "another process waits for it")
    manager.release_model("a", handle)
    assert waiter.result() == handle
    # That process has not said so, but the next poll finds what it gives back.
    waiter.call(release)
    wait_until(lambda: not copies_of(namespace, "a"), "it is unloaded")
    assert problems(namespace) == []


def test_a_copy_that_idles_between_two_users_is_not_unloaded_by_a_poll(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, waiter = new_manager(max_model_copies=1, poll_interval=3600), new_process()
    handle = manager.acquire_model("a", Loads(), keep_alive_seconds=0)
    waiter.send(acquire, "a")
    wait_until(lambda: waiting(namespace, "a"), "another process waits for it")
    session = manager._connected()
    [(copy, _)] = session.held.holds.values()
    with session.namespace.transaction() as t:
        session.namespace.transitions.holds.release(t, copy.row)
    session.held.holds.clear()
    with session.namespace.transaction() as t:
        # As in a poll, which plans only after that.
        session.leader._unload_expired(t)
        session.scheduler.advance(t)
    assert waiter.result() == handle
    assert read_snapshot(namespace).loads == 1
    waiter.call(release)
    assert problems(namespace) == []


def test_a_copy_expires_though_a_request_waits_that_is_tied_to_another_device(
    namespace: str, new_manager: NewManager, new_device: NewDevice, new_process: NewProcess
) -> None:
    device = new_device(1000.0, 1000.0)
    manager = new_manager(memory_source=device, poll_interval=0.03)
    other = new_process(memory_source=device)
    learn(Seat(manager), a=600)
    assert manager.preload("a", Loads(), devices=[0]) == 1
    with manager.reserve(950.0, devices=[1]):
        other.send(acquire_on, "a", 1)
        wait_until(lambda: waiting(namespace, "a"), "it waits for memory of the other one")
        manager.update_settings(idle_ttl_seconds=0.01)
        wait_until(lambda: not copies_of(namespace, "a"), "it cannot use this copy")
    other.result()
    assert problems(namespace) == []


def acquire_on(seat: Seat, tag: str, device: int) -> None:
    seat.held.append((tag, seat.manager.acquire_model(tag, Loads(), devices=[device])))


def test_what_is_pinned_is_kept_and_what_is_kept_is_evicted_for_others(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(poll_interval=0.03, fallback_memory_mb=200), new_process()
    manager.pin("pinned")
    for tag, seconds in (("pinned", 0), ("kept", -1)):
        with manager.model(tag, Loads(), keep_alive_seconds=seconds):
            pass
    other.call(acquire, "new", LoadsObject())
    assert [copy.tag for copy in read_snapshot(namespace).instances] == ["pinned", "new"]
    manager.unpin("pinned")
    wait_until(lambda: not copies_of(namespace, "pinned"), "it is not kept without the pin")
    assert problems(namespace) == []


def test_a_preload_says_how_long_to_keep(
    namespace: str, new_manager: NewManager, new_process: NewProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    manager, other = new_manager(idle_ttl_seconds=0.05, poll_interval=0.03), new_process()
    other.call(preload_for_ever, "a")
    assert model_of(namespace, "a").keep_alive_s == math.inf
    with manager.model("b", Loads()):
        pass
    wait_until(lambda: not copies_of(namespace, "b"), "what nobody keeps is unloaded")
    assert len(copies_of(namespace, "a")) == 1
    assert main(["inspect", namespace]) == 0
    models = capsys.readouterr().out.split("\nmodels:\n")[1].split("\n\n")[0].splitlines()
    assert models[0].split()[-1] == "kept"
    assert any(line.endswith("for ever") for line in models)


def preload_for_ever(seat: Seat, tag: str) -> None:
    seat.manager.preload(tag, Loads(), keep_alive_seconds=-1)
