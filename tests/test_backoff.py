"""Failed loads are remembered: the policy does not evict models that are in demand for them again and again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from harness import (
    NewDevice,
    NewGate,
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
)
from harness import waiting as waiting_for
from loaders import LoadFails, Loads, LoadsObject
from patience import Stopwatch
from policy_views import A, B, C, device, idle, model, ticket, view

from mpmm.errors import LoadTimeoutError
from mpmm.observability.inspect_screen import render
from mpmm.policy.backoff import back_off_s, left_s
from mpmm.policy.plan import make_plan
from mpmm.policy.view import BusyInstance, Decision, Evict, Grant, Load, ModelView, Reason, TicketView, Wait
from mpmm.shared_state.snapshot import read_snapshot


def failing(row: int, need: float, failures: int = 1, ago_s: float = 0.1, known: bool = True) -> ModelView:
    """A model whose loads fail."""
    return replace(model(row, need, known=known), failures=failures, failed_ago_s=ago_s)


def decisions(models: list[ModelView], tickets: list[TicketView], **more: Any) -> list[Decision]:
    """Return what happens to the tickets."""
    return list(make_plan(view(models, tickets, **more)).decisions)


# ---- the rule ----------------------------------------------------------------------------------------------


def test_the_back_off_doubles_up_to_a_minute() -> None:
    assert [back_off_s(failures) for failures in range(9)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert back_off_s(10**6) == 60
    assert left_s(failing(A, 100, failures=3, ago_s=1.5)) == 2.5
    assert left_s(failing(A, 100, failures=3, ago_s=9)) == 0
    assert left_s(model(A)) == 0


def test_in_its_back_off_a_model_evicts_nothing_and_holds_up_nobody() -> None:
    waits, behind = decisions(
        [failing(A, 800), model(B, 300, shared=1), model(C, 300)],
        [ticket(1, A), ticket(2, C)],
        copies=[idle(5, B, mb=300)],
        devices=[device(used=300)],
    )
    assert isinstance(waits, Wait)
    assert (waits.reason, waits.first) == (Reason.BACKING_OFF, False)
    assert isinstance(behind, Load)


def test_when_its_back_off_is_over_it_evicts_again() -> None:
    [decision] = decisions(
        [failing(A, 800, ago_s=1.0), model(B, 300, shared=1)],
        [ticket(1, A)],
        copies=[idle(5, B, mb=300)],
        devices=[device(used=300)],
    )
    assert isinstance(decision, Evict)


def test_in_its_back_off_it_may_use_free_memory() -> None:
    [decision] = decisions(
        [failing(A, 500), model(B, 300, shared=1)],
        [ticket(1, A)],
        copies=[idle(5, B, mb=300)],
        devices=[device(used=300)],
    )
    assert isinstance(decision, Load)


def test_an_unknown_one_neither_flushes_nor_drains_in_its_back_off() -> None:
    unknown = failing(A, 100, known=False)
    flushes = decisions([unknown, model(B, shared=1)], [ticket(1, A, priority=0)], copies=[idle(5, B)])
    drains = decisions(
        [unknown, model(B, shared=1)], [ticket(1, A, priority=0)], busy=(BusyInstance(5, B, 0, 100, 9.0),)
    )
    for [decision] in (flushes, drains):
        assert isinstance(decision, Wait)
        assert (decision.reason, decision.first) == (Reason.BACKING_OFF, False)
    [alone] = decisions([unknown], [ticket(1, A, priority=0)])
    assert isinstance(alone, Load)
    assert alone.alone


def test_while_an_unknown_one_backs_off_idle_copies_are_handed_out_behind_it() -> None:
    unknown = failing(A, 100, known=False)
    waits, granted = decisions(
        [unknown, model(B, shared=1)],
        [ticket(1, A, priority=0, waited=9.0, head_for=9.0), ticket(2, B)],
        copies=[idle(5, B)],
    )
    assert isinstance(waits, Wait)
    assert isinstance(granted, Grant)


def test_what_can_never_fit_is_refused_at_once_all_the_same() -> None:
    [decision] = decisions([failing(A, 5000)], [ticket(1, A)])
    assert not isinstance(decision, Wait)


def test_a_preload_backs_off_too() -> None:
    [decision] = decisions(
        [failing(A, 800), model(B, 300, shared=1)],
        [ticket(1, A, priority=2, preload=1)],
        copies=[idle(5, B, mb=300)],
        devices=[device(used=300)],
    )
    assert isinstance(decision, Wait)


# ---- in processes ------------------------------------------------------------------------------------------


def try_in_vain(seat: Seat, tag: str, seconds: float) -> int:
    """Acquire again and again with a loader that fails, as a worker does that retries; return how often it ran."""
    calls: list[float] = []

    def load() -> Any:
        calls.append(time.monotonic())
        raise OSError("no such file")

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            seat.manager.acquire_model(tag, load)
    return len(calls)


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_a_loader_that_always_fails_does_not_flush_a_model_in_demand_at_each_try(
    known: bool, namespace: str, new_manager: NewManager, new_process: NewProcess, new_device: NewDevice
) -> None:
    simulated = new_device(1000)
    manager, broken = new_manager(memory_source=simulated), new_process(memory_source=simulated)
    learn(Seat(manager), good=400, **({"broken": 700} if known else {}))
    broken.send(try_in_vain, "broken", 2.5)
    while not broken.has_result():
        with manager.model("good", LoadsObject("good", device=simulated, mb=400)):
            time.sleep(0.01)
    tries = broken.result()
    loads = model_of(namespace, "good").loads
    # Failures at 0, 1 and 3 s, as the last try may begin just before the end, each with one flush.
    assert tries >= 2
    assert loads <= 4, f"{loads} loads of the good one beside {tries} tries"
    assert problems(namespace) == []


def test_the_exception_of_a_loader_that_fails_arrives_unchanged(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with pytest.raises(OSError, match="gone"):
        manager.acquire_model("a", LoadFails("gone"))
    found = model_of(namespace, "a")
    assert (found.failures, read_snapshot(namespace).failed_loads) == (1, 1)
    assert found.failed_ago_s is not None


def test_a_load_that_ends_well_makes_the_failures_forgotten(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    for _ in range(3):
        with pytest.raises(OSError):
            manager.acquire_model("a", LoadFails())
    assert model_of(namespace, "a").failures == 3
    manager.release_model("a", manager.acquire_model("a", Loads("a")))
    assert (model_of(namespace, "a").failures, model_of(namespace, "a").failed_ago_s) == (0, None)


def test_a_reset_makes_the_failures_forgotten(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with pytest.raises(OSError):
        manager.acquire_model("a", LoadFails())
    manager.force_reset()
    assert model_of(namespace, "a").failures == 0


def test_a_load_that_takes_too_long_is_a_failure(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_gate: NewGate
) -> None:
    manager, process = new_manager(poll_interval=0.05), new_process()
    began, go = new_gate(), new_gate()
    process.send(acquire, "slow", Loads("slow", began, go))
    began.wait()
    # Only now, as otherwise a busy machine might give the load up before its loader runs.
    manager.update_settings(load_timeout_seconds=0.2)
    wait_until(lambda: model_of(namespace, "slow").failures == 1, "it is given up")
    go.open()
    with pytest.raises(LoadTimeoutError):
        process.result()
    assert model_of(namespace, "slow").failures == 1, "the same load is no second failure"


def test_the_death_of_a_loader_is_no_failure_of_its_model(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    new_process()
    loader, began = new_process(), new_gate()
    loader.send(acquire, "a", Loads("a", began, new_gate()))
    began.wait()
    loader.kill()
    wait_until(lambda: read_snapshot(namespace).failed_loads == 1, "its load is given up")
    assert model_of(namespace, "a").failures == 0


@dataclass
class Runs:
    """A loader that fails as long as it is told to, and notes when it ran."""

    failures: int
    at: list[float] = field(default_factory=list)

    def __call__(self) -> Any:
        """Fail, or load."""
        self.at.append(time.monotonic())
        if len(self.at) <= self.failures:
            raise OSError("not yet")
        return "handle"


@pytest.mark.parametrize("form", ["threads", "tasks"])
def test_a_waiter_is_looked_at_when_its_back_off_ends_whatever_the_poll_interval(
    form: str, namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(poll_interval=30.0)
    learn(Seat(manager), good=600, broken=700)
    loader, watch = Runs(failures=1), Stopwatch()
    with pytest.raises(OSError):
        manager.acquire_model("broken", loader)
    with manager.model("good", Loads("good")):
        pass
    if form == "threads":
        manager.release_model("broken", manager.acquire_model("broken", loader))
    else:

        async def use() -> None:
            async with manager.model_async("broken", loader):
                pass

        asyncio.run(use())
    assert loader.at[1] - loader.at[0] >= 1.0
    assert watch.calm_s() < 5.0
    assert copies_of(namespace, "good") == []


def test_inspect_says_that_a_model_backs_off_and_for_how_long(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, waits = new_manager(poll_interval=30.0), new_process(poll_interval=30.0)
    seat = Seat(manager)
    learn(seat, good=600, broken=700)
    for _ in range(5):
        with pytest.raises(OSError):
            manager.acquire_model("broken", LoadFails())
    acquire(seat, "good", Loads("good"))
    release(seat)
    waits.send(acquire, "broken", Loads("broken"))
    wait_until(lambda: waiting_for(namespace, "broken"), "it waits")
    [found] = waiting_for(namespace, "broken")
    assert found.reason == Reason.BACKING_OFF
    assert 10 < found.seconds <= 16
    screen = render(read_snapshot(namespace))
    assert "backing_off" in screen
    assert "nothing is evicted for another attempt for about 1" in screen
    # It holds up no other: one request gets the idle copy, and another one loads next to it.
    acquire(seat, "good", Loads("good"))
    acquire(seat, "small", Loads("small"))
    manager.force_reset()
    with pytest.raises(Exception, match="reset"):
        waits.result()


def test_an_out_of_memory_with_a_second_turn_is_no_failure(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    calls = []

    def load() -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("too much")
        return "handle"

    manager.release_model("a", manager.acquire_model("a", load))
    assert (len(calls), model_of(namespace, "a").failures) == (2, 0)

    def never() -> Any:
        raise MemoryError("too much")

    with pytest.raises(MemoryError):
        manager.acquire_model("b", never)
    assert model_of(namespace, "b").failures == 1, "both turns together"
    assert math.isfinite(model_of(namespace, "b").failed_ago_s or 0.0)
