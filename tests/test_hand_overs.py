"""Many processes and threads hand one copy over to each other: no wake-up is lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from harness import NewProcess, Seat, acquire, copies_of, force_reset, problems, release, wait_until, waiting
from patience import DEADLINE_S, Stopwatch

from mpmm.errors import NamespaceResetError
from mpmm.model_manager import ModelManager
from mpmm.shared_state.futex import wake_all
from mpmm.shared_state.layout import Ticket
from mpmm.shared_state.snapshot import read_snapshot

PROCESSES, THREADS = 4, 4
# 100 000 take a minute or two; the default suite has less time.
HAND_OVERS = int(os.environ.get("MPMM_TEST_HAND_OVERS", "4000"))


def hand_round(seat: Seat, rounds: int) -> float:
    """Acquire and release in several threads; return the longest wait in seconds."""
    waits: list[float] = []

    def run() -> None:
        longest = 0.0
        for _ in range(rounds):
            watch = Stopwatch()
            handle = seat.manager.acquire_model("ball", lambda: "the ball")
            longest = max(longest, watch.calm_s())
            seat.manager.release_model("ball", handle)
        waits.append(longest)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waits) == THREADS, "a thread failed"
    return max(waits)


def test_no_hand_over_takes_a_second_for_want_of_a_wake_up(namespace: str, new_process: NewProcess) -> None:
    players = [new_process(fallback_memory_mb=100, wait_timeout_seconds=120.0) for _ in range(PROCESSES)]
    rounds = HAND_OVERS // (PROCESSES * THREADS)
    for player in players:
        player.send(hand_round, rounds)
    longest = [player.result(timeout_seconds=600.0) for player in players]
    snapshot = read_snapshot(namespace, events=False)
    assert snapshot.hits + snapshot.loads == rounds * PROCESSES * THREADS
    assert snapshot.loads == 1
    assert max(longest) < 1.0, f"the longest waits were {longest}"
    assert problems(namespace) == []


class StopsWithTheAnswer:
    """Words that stop the process in the middle of a transaction, when a waiter's answer is written and it is woken."""

    def __init__(self, words: Any, index: int, address: int) -> None:
        self._words = words
        self._index = index
        self._address = address

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value
        if index == self._index and value == Ticket.GRANTED:
            wake_all(self._address)
            os.kill(os.getpid(), signal.SIGSTOP)


def stop_in_the_release(seat: Seat, tag: str) -> None:
    """Release, but stop before the transaction is committed."""
    namespace = seat.manager._connected().namespace
    ticket = namespace.tables.ticket(waiting(namespace.name, tag)[0].row)
    address = namespace.segment.address + 8 * (ticket + Ticket.SIGNAL)
    namespace.lock.intercept_stores(lambda words: StopsWithTheAnswer(words, ticket + Ticket.STATE, address))
    release(seat, tag)


def test_an_answer_that_is_rolled_back_is_not_acted_upon(namespace: str, new_process: NewProcess) -> None:
    victim, waiter = new_process(fallback_memory_mb=100), new_process()
    handle = victim.call(acquire, "ball")
    waiter.send(acquire, "ball")
    wait_until(lambda: waiting(namespace, "ball"), "the other one waits")
    victim.send(stop_in_the_release, "ball")
    victim.wait_until_stopped()
    assert not waiter.has_result()
    victim.kill()
    assert waiter.result() == handle
    snapshot = read_snapshot(namespace)
    assert (snapshot.rollbacks, snapshot.hits, snapshot.loads) == (1, 1, 1)
    assert [copy.holder for copy in copies_of(namespace, "ball")] == [
        next(member.slot for member in snapshot.members if member.pid == waiter.pid)
    ]
    assert problems(namespace) == []
    waiter.call(release, "ball")
    assert read_snapshot(namespace).tickets == ()


def test_a_reset_takes_back_what_was_acted_upon_without_the_lock(namespace: str, new_process: NewProcess) -> None:
    holder, waiter = new_process(fallback_memory_mb=100), new_process()
    holder.call(acquire, "ball")
    waiter.send(acquire, "ball")
    wait_until(lambda: waiting(namespace, "ball"), "the other one waits")
    holder.call(release, "ball")
    waiter.result()
    holder.call(force_reset)
    with pytest.raises(NamespaceResetError):
        waiter.call(release, "ball")
    assert problems(namespace) == []
    waiter.call(acquire, "ball")
    waiter.call(release, "ball")
    assert read_snapshot(namespace).tickets == ()


def test_a_released_copy_is_not_handed_to_a_preload_that_waits_to_load_another(
    namespace: str, new_manager: Callable[..., ModelManager]
) -> None:
    manager = new_manager(fallback_memory_mb=200.0)
    first = manager.acquire_model("a", lambda: "first of a")
    other = manager.acquire_model("b", lambda: "b")
    loaded: list[int] = []
    preload = threading.Thread(target=lambda: loaded.append(manager.preload("a", lambda: "second of a", copies=2)))
    preload.start()
    try:
        wait_until(lambda: read_snapshot(namespace).tickets, "the preload waits for room")
        manager.release_model("a", first)
        snapshot = read_snapshot(namespace)
        assert [(one.tag, one.state) for one in snapshot.instances if one.tag == "a"] == [("a", "idle")]
        assert [one.tag for one in snapshot.tickets] == ["a"]
    finally:
        manager.release_model("b", other)
        preload.join(DEADLINE_S)
    assert loaded == [1]
    snapshot = read_snapshot(namespace)
    assert [(one.tag, one.state) for one in snapshot.instances] == [("a", "idle")] * 2
    assert problems(namespace) == []
