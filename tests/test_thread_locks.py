"""A lock of `mpmm.interpreter.thread_locks` is free after its `with` block, whenever a signal handler raises."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from patience import DEADLINE_S

from mpmm.interpreter.thread_locks import InTime, new_lock, new_rlock

INTERRUPTIONS = 300


class Interrupted(Exception):
    """Raised by the handler."""


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


@pytest.mark.parametrize("in_time", [False, True], ids=["", "in time"])
@pytest.mark.parametrize("make", [new_lock, new_rlock], ids=["lock", "rlock"])
def test_an_exception_of_a_signal_handler_leaves_no_lock_taken(
    make: Callable[[], Any], in_time: bool, raising_handler: None
) -> None:
    lock, chance = make(), random.Random(1)

    def take_often() -> None:
        while True:
            with InTime(lock, DEADLINE_S, TimeoutError) if in_time else lock:
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


@pytest.mark.parametrize("make", [new_lock, new_rlock], ids=["lock", "rlock"])
def test_a_lock_that_another_thread_has_for_too_long_is_not_waited_for(make: Callable[[], Any]) -> None:
    lock, taken, give_back = make(), threading.Event(), threading.Event()

    def hold() -> None:
        with InTime(lock, DEADLINE_S, TimeoutError):
            taken.set()
            give_back.wait(DEADLINE_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(DEADLINE_S)
    with pytest.raises(LookupError, match="too late"), InTime(lock, 0.01, lambda: LookupError("too late")):
        raise AssertionError("two threads have the lock")
    assert holder.is_alive()
    give_back.set()
    holder.join()
    # An exception raised inside is not mistaken for that.
    with pytest.raises(KeyError), InTime(lock, DEADLINE_S, TimeoutError):
        raise KeyError
    assert is_free(lock)
