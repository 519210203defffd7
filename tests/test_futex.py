"""Words that processes and threads sleep on."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import time
from collections.abc import Callable

import pytest
from harness import wait_until
from patience import DEADLINE_S

from mpmm.shared_state import futex

SHORT_S = 0.05
# A futex compares 32 bits of a word, whatever stands in the others.
VALUES = [0, 5, 0xFFFFFFFF, 2**40 + 5]
Wait = Callable[[ctypes.c_uint64, int, float], None]


def wait_for_change(word: ctypes.c_uint64, seen: int, timeout_s: float) -> None:
    futex.wait_for_change(lambda: word.value, ctypes.addressof(word), seen, timeout_s)


def wait_for_any(word: ctypes.c_uint64, seen: int, timeout_s: float) -> None:
    other = ctypes.c_uint64(7)
    futex.wait_for_any([(ctypes.addressof(other), 7), (ctypes.addressof(word), seen)], timeout_s)


@functools.cache
def sleeps_in(wait: Wait) -> bool:
    """Tell whether a wait sleeps until it is woken, and does not look now and then."""
    if wait is wait_for_change:
        return futex.HAVE_FUTEX
    # Kernels before 5.16 cannot wait for several words.
    began = time.monotonic()
    wait(ctypes.c_uint64(0), 0, 4 * SHORT_S)
    return time.monotonic() - began >= 4 * SHORT_S


@pytest.fixture(params=[wait_for_change, wait_for_any])
def wait(request: pytest.FixtureRequest) -> Wait:
    if not sys.platform.startswith("linux") or not sleeps_in(request.param):
        pytest.skip("this kernel has no call for that")
    function: Wait = request.param
    return function


@pytest.mark.parametrize("value", VALUES)
def test_a_word_that_does_not_change_is_slept_on_for_all_of_the_time(wait: Wait, value: int) -> None:
    began = time.monotonic()
    wait(ctypes.c_uint64(value), value, SHORT_S)
    assert time.monotonic() - began >= SHORT_S


@pytest.mark.parametrize("value", VALUES)
def test_where_the_system_has_no_such_call_a_word_is_looked_at_until_it_changes(
    monkeypatch: pytest.MonkeyPatch, value: int
) -> None:
    monkeypatch.setattr(futex, "HAVE_FUTEX", False)
    began = time.monotonic()
    wait_for_change(ctypes.c_uint64(value), value, SHORT_S)
    assert time.monotonic() - began >= SHORT_S
    wait_for_change(ctypes.c_uint64(value + 1), value, DEADLINE_S)
    word = ctypes.c_uint64(value)
    thread = threading.Thread(target=wait_for_change, args=(word, value, 2 * DEADLINE_S))
    thread.start()
    word.value = value + 1
    futex.wake_all(ctypes.addressof(word))
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("value", VALUES)
def test_a_word_that_has_changed_is_not_slept_on(wait: Wait, value: int) -> None:
    began = time.monotonic()
    wait(ctypes.c_uint64(value), value ^ 1, DEADLINE_S)
    assert time.monotonic() - began < DEADLINE_S


@pytest.mark.parametrize("wake", [futex.wake_one, futex.wake_all])
def test_a_sleeper_is_woken(wait: Wait, wake: Callable[[int], None]) -> None:
    word = ctypes.c_uint64(5)
    sleeper = threading.Thread(target=wait, args=(word, 5, DEADLINE_S))
    began = time.monotonic()
    sleeper.start()

    def ended() -> bool:
        # It may not have been asleep yet the last time.
        wake(ctypes.addressof(word))
        return not sleeper.is_alive()

    wait_until(ended, "it is woken")
    sleeper.join()
    assert time.monotonic() - began < DEADLINE_S
