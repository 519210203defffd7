"""A lock of `mpmm.interpreter.thread_locks` is free after its `with` block, whenever a signal handler raises."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from mpmm.interpreter.thread_locks import new_lock, new_rlock

INTERRUPTIONS = 300


class Interrupted(Exception):
    """What the handler raises."""


@pytest.fixture
def raising_handler() -> Iterator[None]:
    """Have SIGALRM raise."""

    def handle(number: int, frame: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def is_free(lock: Any) -> bool:
    """Tell whether another thread can have a lock."""
    taken: list[bool] = []

    def take() -> None:
        taken.append(lock.acquire(blocking=False))
        if taken[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return taken[0]


@pytest.mark.parametrize("make", [new_lock, new_rlock], ids=["lock", "rlock"])
def test_an_exception_of_a_signal_handler_leaves_no_lock_taken(make: Callable[[], Any], raising_handler: None) -> None:
    lock, chance = make(), random.Random(1)

    def take_often() -> None:
        while True:
            with lock:
                pass

    for interrupted in range(INTERRUPTIONS):
        with suppress(Interrupted):
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00001, 0.0001))
            take_often()
        assert is_free(lock), f"after {interrupted} exceptions"


def test_a_lock_excludes_other_threads_and_an_rlock_lets_its_own_in() -> None:
    lock, rlock = new_lock(), new_rlock()
    with lock, rlock, rlock:
        assert lock.locked() and not lock.acquire(blocking=False)
        assert not is_free(lock) and not is_free(rlock)
    assert is_free(lock) and is_free(rlock)
