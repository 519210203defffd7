"""A process that was handed a copy, and asks for it again at once, comes first for a moment.

See `mpmm.model_manager.tenure`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
from harness import NewProcess, Process, Seat, acquire, copies_of, problems, release, wait_until, waiting
from loaders import Loads

from mpmm.errors import AcquireTimeoutError
from mpmm.model_manager import tenure
from mpmm.shared_state.core import is_compiled
from mpmm.shared_state.snapshot import read_snapshot

# The leader, which plans at each poll, would end a tenure.
ONE_COPY: dict[str, Any] = {"fallback_memory_mb": 1000, "max_model_copies": 1, "poll_interval": 30.0}
# Long enough for a test to look at what happens in it.
LONG_S = 1.0
# Likewise, where much is done in it, perhaps on a busy machine.
LONGER_S = 3.0


def lengthen(seat: Seat, tenure_s: float, called_up_for_s: float) -> None:
    """Make this process's tenures longer, and the time after which it looks where it is called up."""
    tenure.TENURE_S = tenure_s
    tenure.CALLED_UP_FOR_S = called_up_for_s


def be_quick_with(seat: Seat, tag: str, rounds: int) -> int:
    """Use a model several times; return how many tickets that took."""
    before = read_snapshot(seat.manager.namespace).next_ticket
    for _ in range(rounds):
        with seat.manager.model(tag, _never):
            pass
    return read_snapshot(seat.manager.namespace).next_ticket - before


def _never() -> str:
    raise AssertionError("there is a copy")


@pytest.fixture(name="crowd")
def _crowd(namespace: str, new_process: NewProcess, request: pytest.FixtureRequest) -> tuple[Process, Process, Process]:
    """Three processes: one holds the only copy there may be, two wait for it in this order.

    The tenure of the first waiter is long. By a parameter, which says how long, the second one knows.
    """
    holder, second, third = (new_process(**ONE_COPY) for _ in range(3))
    known_s = getattr(request, "param", 0.0)
    second.call(lengthen, known_s or LONG_S, known_s or LONG_S)
    if known_s:
        third.call(lengthen, known_s, 1.5 * known_s)
    wait_until(partial(_has_polled, namespace), "the first poll is over")
    holder.call(acquire, "a")
    for waiter in (second, third):
        queued = len(waiting(namespace)) + 1
        waiter.send(acquire, "a")
        wait_until(partial(_are_waiting, namespace, queued), "it waits")
    return holder, second, third


def _has_polled(namespace: str) -> bool:
    snapshot = read_snapshot(namespace)
    # A quarter of a second after it began to lead, and then not again for long.
    return (snapshot.leader_for_s or 0.0) - snapshot.polled_ago_s > 0.1


def _are_waiting(namespace: str, count: int) -> bool:
    return len(waiting(namespace)) == count


@pytest.mark.parametrize("crowd", [LONGER_S], indirect=True)
def test_who_comes_back_at_once_is_served_before_those_who_wait(
    namespace: str, crowd: tuple[Process, Process, Process]
) -> None:
    holder, second, third = crowd
    holder.call(release)
    second.result()
    second.call(release)
    assert second.call(be_quick_with, "a", 20) == 0
    assert len(waiting(namespace)) == 1
    # Not for longer than its time.
    time.sleep(LONGER_S)
    second.send(be_quick_with, "a", 1)
    third.result()
    third.call(release)
    assert second.result() == 1
    assert problems(namespace) == []


@pytest.mark.parametrize("how", ["goes away", "is killed", "is stopped"])
def test_who_does_not_come_back_leaves_the_copy_to_the_first_waiter(
    namespace: str, crowd: tuple[Process, Process, Process], how: str
) -> None:
    holder, second, third = crowd
    holder.call(release)
    second.result()
    second.call(release)
    if how == "is killed":
        second.kill()
    elif how == "is stopped":
        second.stop()
    # The waiter looks for itself: it has no length of a tenure but its own.
    third.result()
    third.call(release)
    if how == "is stopped":
        second.resume()
    wait_until(lambda: problems(namespace) == [], "the dead are taken back")


def test_a_newcomer_queues_behind_those_who_wait(
    namespace: str, crowd: tuple[Process, Process, Process], new_process: NewProcess
) -> None:
    holder, second, third = crowd
    newcomer = new_process(**ONE_COPY)
    holder.call(release)
    second.result()
    second.call(release)
    newcomer.send(acquire, "a")
    third.result()
    wait_until(lambda: len(waiting(namespace)) == 1, "the newcomer waits")
    assert not newcomer.has_result()
    third.call(release)
    newcomer.result()
    newcomer.call(release)
    assert problems(namespace) == []


def test_whoever_waits_for_something_else_ends_it(
    namespace: str, crowd: tuple[Process, Process, Process], new_process: NewProcess
) -> None:
    holder, second, third = crowd
    other = new_process(**ONE_COPY)
    holder.call(release)
    second.result()
    other.send(reserve, 1000.0)
    wait_until(lambda: len(waiting(namespace)) == 2, "a lease waits as well")
    second.call(release)
    third.result()
    third.call(release)
    other.result()
    assert problems(namespace) == []


def test_a_copy_that_is_not_to_be_kept_goes_with_the_last_waiter(namespace: str, new_process: NewProcess) -> None:
    holder, second = (new_process(**ONE_COPY) for _ in range(2))
    third = new_process(**ONE_COPY, wait_timeout_seconds=1.5)
    second.call(lengthen, 30.0, 30.0)
    # The tenure of the second one is not over when this one gives up.
    third.call(lengthen, 30.0, 30.0)
    wait_until(partial(_has_polled, namespace), "the first poll is over")
    holder.call(acquire_for_now, "a")
    second.send(acquire_for_now, "a")
    wait_until(partial(_are_waiting, namespace, 1), "it waits")
    third.send(acquire_for_now, "a")
    wait_until(partial(_are_waiting, namespace, 2), "it waits, too")
    holder.call(release)
    second.result()
    second.call(release)
    assert [copy.state for copy in copies_of(namespace, "a")] == ["idle"]
    with pytest.raises(AcquireTimeoutError):
        third.result()
    wait_until(lambda: not copies_of(namespace, "a"), "it is unloaded", 5.0)
    assert problems(namespace) == []


def acquire_for_now(seat: Seat, tag: str) -> None:
    """Acquire a model whose copies are unloaded as soon as they are idle."""
    seat.held.append((tag, seat.manager.acquire_model(tag, Loads(tag), keep_alive_seconds=0)))


def reserve(seat: Seat, mb: float) -> None:
    """Have a lease for a moment."""
    seat.manager.reserve(mb).release()


def test_a_task_that_is_called_up_looks_for_itself(namespace: str, new_process: NewProcess) -> None:
    holder, second, third = (new_process(**ONE_COPY) for _ in range(3))
    second.call(lengthen, LONG_S, LONG_S)
    holder.call(acquire, "a")
    second.send(acquire, "a")
    wait_until(lambda: len(waiting(namespace)) == 1, "it waits")
    third.send(use_in_loop, "a")
    wait_until(lambda: len(waiting(namespace)) == 2, "a task waits, too")
    holder.call(release)
    second.result()
    second.call(release)
    third.result()
    assert problems(namespace) == []


def use_in_loop(seat: Seat, tag: str) -> None:
    """Use a model in a task."""

    async def use() -> None:
        async with seat.manager.model_async(tag, _never):
            pass

    asyncio.run(use())


def test_who_hands_the_copy_over_does_not_come_first_any_more(
    namespace: str, crowd: tuple[Process, Process, Process]
) -> None:
    holder, second, third = crowd
    holder.call(release)
    second.result()
    second.call(forget_to_come_back, "a")
    second.call(release)
    third.result()
    assert second.call(has_tenure, "a") is False
    third.call(release)
    assert problems(namespace) == []


def forget_to_come_back(seat: Seat, tag: str) -> None:
    """Have the process taken for one that does not come back at once."""
    seat.manager._connected().tenures._short[tag] = 0


def has_tenure(seat: Seat, tag: str) -> bool:
    """Tell whether the process may take the model's copy before others."""
    return seat.manager._connected().tenures.current(tag) is not None


def test_most_of_the_last_pauses_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("mpmm.model_manager.tenure.time.monotonic", lambda: now_s)
    tenures = tenure.Tenures()

    def pause(seconds: float, times: int) -> bool:
        nonlocal now_s
        for _ in range(times):
            tenures.leave("a")
            now_s += seconds
            tenures.come_back("a")
        return tenures.comes_back_at_once("a")

    assert tenures.comes_back_at_once("a")
    assert pause(0.5, 2)
    assert not pause(0.001, 3)
    assert not pause(0.000_02, 2)
    assert pause(0.000_02, 2)
    assert tenures.comes_back_at_once("b")
    assert not pause(0.001, 8)
    for number in range(tenure.MODELS_KEPT + 2):
        tenures.leave(f"m{number}")
    assert tenures.comes_back_at_once("a"), "it is forgotten"


def test_who_comes_back_only_when_nobody_waits_any_more_is_not_taken_to_come_back_at_once() -> None:
    tenures = tenure.Tenures()
    for _ in range(tenure.PAUSES_KEPT):
        assert tenures.comes_back_at_once("a")
        # Others wait, and the next acquire, which is not told of here, finds that they have been served.
        tenures.leave("a")
        if not tenures.comes_back_at_once("a"):
            break
    assert not tenures.comes_back_at_once("a")


def test_what_was_kept_at_the_end_of_a_tenure_may_still_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("mpmm.model_manager.tenure.time.monotonic", lambda: now_s)
    tenures = tenure.Tenures()
    tenures.begin("a", 0, 1)
    now_s = 100.0 + 0.99 * tenure.TENURE_S
    assert tenures.current("a") is not None
    # Not kept any more, but what was kept just before would lie idle else, until the waiter that was called up looks.
    now_s = 100.0 + 1.01 * tenure.TENURE_S
    assert tenures.current("a") is None
    assert tenures.kept("a") is not None
    now_s = 100.0 + 1.01 * tenure.CALLED_UP_FOR_S
    assert tenures.kept("a") is None


@pytest.mark.parametrize(("core", "promised"), [("", (0.000_5, 0.001_5)), ("python", (0.004, 0.006))])
def test_a_waiter_waits_no_longer_for_those_before_it_than_is_promised(
    core: str, promised: tuple[float, float]
) -> None:
    if not core and not is_compiled():
        pytest.skip("the compiled core is missing")
    program = "from mpmm.model_manager import tenure; print((tenure.TENURE_S, tenure.CALLED_UP_FOR_S))"
    said = subprocess.check_output([sys.executable, "-c", program], text=True, env={**os.environ, "MPMM_CORE": core})
    assert said.strip() == str(promised)
