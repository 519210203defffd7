"""Durations as long, or as short, as the settings allow: nothing overflows, and no process loses a hold."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any

import pytest
from harness import (
    NewDevice,
    NewManager,
    NewProcess,
    Process,
    Seat,
    acquire,
    copies_of,
    learn,
    problems,
    release,
    wait_until,
)
from harness import waiting as waiting_for
from loaders import Loads

from mpmm.errors import AcquireTimeoutError
from mpmm.model_manager import ModelManager
from mpmm.shared_state.durations import LONGEST_NS, to_ns
from mpmm.shared_state.layout import Header
from mpmm.shared_state.settings import SETTINGS
from mpmm.shared_state.snapshot import read_snapshot

SECONDS = sorted(name for name, setting in SETTINGS.items() if setting.unit == "seconds")


def extremes(name: str) -> list[float]:
    """Return values of a setting at the ends of what is allowed."""
    low, high = SETTINGS[name].low, SETTINGS[name].high
    return sorted({low, *(value for value in (1e-9, 1e308) if low <= value <= high), high})


CASES = [(name, value) for name in SECONDS for value in extremes(name)]


def test_seconds_become_nanoseconds_that_fit_into_a_word() -> None:
    assert to_ns(1.5) == 1_500_000_000
    assert to_ns(1e-9) == 1
    assert (to_ns(0.0), to_ns(-1.0), to_ns(-math.inf)) == (0, 0, 0)
    assert to_ns(1e308) == to_ns(math.inf) == LONGEST_NS == 2**62
    longest_s = LONGEST_NS / 1e9
    assert [to_ns(seconds) for seconds in (longest_s * 0.999, longest_s, longest_s * 1.001, longest_s * 100)] == [
        *(int(longest_s * 0.999 * 1e9), LONGEST_NS, LONGEST_NS, LONGEST_NS)
    ]
    assert time.monotonic_ns() + to_ns(math.inf) < 2**63


def hold_and_hand_over(namespace: str, manager: ModelManager, other: Process) -> None:
    """Load, release to a waiter, hold in a task, evict for another model, and for a lease; all are idle at the end."""
    learn(Seat(manager), a=400, b=700)
    seat = Seat(manager)
    acquire(seat, "a", Loads("a"))
    other.send(acquire, "a", Loads("a"))
    wait_until(lambda: other.has_result() or waiting_for(namespace, "a") or len(copies_of(namespace, "a")) > 1, "asked")
    release(seat, "a")
    other.result()
    other.call(release, "a")

    async def use() -> None:
        async with manager.model_async("a", Loads("a")):
            pass

    asyncio.run(use())
    acquire(seat, "b", Loads("b"))
    release(seat, "b")
    with manager.reserve(900):
        pass
    assert not [
        copy for copy in read_snapshot(namespace).instances if copy.holder is not None and copy.state == "active"
    ]
    assert problems(namespace) == []


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={value:g}" for name, value in CASES])
def test_every_time_that_a_setting_allows_can_be_lived_with(
    name: str, value: float, namespace: str, new_manager: NewManager, new_process: NewProcess, new_device: NewDevice
) -> None:
    arguments: dict[str, Any] = {"memory_source": new_device(1000, linger_s=0.02), name: value}
    if name == "lock_timeout_seconds":
        arguments["lock_timeout_seconds"] = max(value, 1.0)
    if name == "wait_timeout_seconds" and value < 1:
        manager = new_manager(**arguments)
        with pytest.raises(AcquireTimeoutError), manager.reserve(950, timeout_seconds=math.inf):
            manager.acquire_model("b", Loads("b"))
        # An acquire gets free memory without waiting.
        manager.release_model("b", manager.acquire_model("b", Loads("b")))
        assert problems(namespace) == []
        return
    if name == "load_timeout_seconds" and value < 1:
        arguments["poll_interval"] = 30.0
    manager = new_manager(**arguments)
    if "poll_interval" in arguments:
        # A load in progress at a poll has taken too long.
        words = manager._connected().namespace.segment.words
        wait_until(lambda: words[Header.POLLED] > words[Header.LEADER_SINCE], "the first poll is over")
    hold_and_hand_over(namespace, manager, new_process(**arguments))


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e308, math.inf])
def test_every_time_out_of_a_call_can_be_lived_with(seconds: float, namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    learn(Seat(manager), a=400)
    # Without patience it may be had at once or not; both leave nothing behind.
    with contextlib.suppress(AcquireTimeoutError), manager.reserve(300, timeout_seconds=seconds):
        assert len(copies_of(namespace, "lease")) == 1
    with contextlib.suppress(AcquireTimeoutError):
        assert manager.preload("a", Loads("a"), timeout_seconds=seconds) == 1
    assert (seconds < 1) or len(copies_of(namespace, "a")) == 1
    assert not waiting_for(namespace)
    assert problems(namespace) == []


@pytest.mark.parametrize("seconds", [1e308, math.inf])
def test_a_release_past_one_who_may_be_overtaken_for_ever_keeps_the_accounts_right(
    seconds: float, namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(max_overtake_seconds=seconds)
    seat, large, again = Seat(manager), new_process(), new_process()
    learn(seat, a=600, b=700)
    acquire(seat, "a", Loads("a"))
    large.send(acquire, "b", Loads("b"))
    wait_until(lambda: waiting_for(namespace, "b"), "one waits for room")
    again.send(acquire, "a", Loads("a"))
    wait_until(lambda: waiting_for(namespace, "a"), "another one waits for the copy")
    release(seat)
    again.result()
    again.call(release)
    large.result()
    assert (copies_of(namespace, "a"), problems(namespace)) == ([], [])
