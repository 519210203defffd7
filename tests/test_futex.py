"""Words that processes and threads sleep on."""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

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


# ---- what the kernel is asked ------------------------------------------------------------------------------------

ADDRESS = 0x7F0012345678
# The numbers of the kernel's interface.
WAIT, WAKE, WAITV, MONOTONIC, U32 = 0, 1, 449, 1, 2
ENDS_A_WAIT = (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EFAULT)


class Kernel:
    """A kernel that notes what it is asked, and a clock that only sleeps move."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.sleeps: list[float] = []
        self.failure = 0
        self.now = 100.25

    def call(self, *arguments: Any) -> int:
        number, address, *rest = arguments
        if number == WAITV:
            words = (ctypes.c_uint64 * (3 * rest[0])).from_address(address)
            rest[2] = self.time_at(rest[2])
            self.calls.append((number, list(words), *rest))
        else:
            if rest[2] is not None:
                rest[2] = self.time_at(rest[2])
            self.calls.append((number, address, *rest))
        ctypes.set_errno(self.failure)
        return -1 if self.failure else 0

    def time_at(self, address: int) -> tuple[int, int]:
        found = futex._Timespec.from_address(address)
        return found.seconds, found.nanoseconds

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel that waits for nothing."""
    if not futex.HAVE_FUTEX:
        pytest.skip("this system has no such call")
    made = Kernel()
    monkeypatch.setattr(futex, "_syscall", made.call)
    monkeypatch.setattr(futex, "time", made)
    return made


@pytest.mark.parametrize(
    ("timeout_s", "expected"),
    [(1.5, (1, 500_000_000)), (0.25, (0, 250_000_000)), (3e8, (10**8, 0)), (math.inf, (10**8, 0))],
)
@pytest.mark.parametrize(
    ("seen", "low"),
    [(0, 0), (5, 5), (2**31, -(2**31)), (2**32 - 1, -1), (2**32 + 7, 7), (2**33 + 2**32 - 2, -2), (2**64 - 1, -1)],
)
def test_a_wait_names_the_low_half_of_the_word_and_the_time(
    kernel: Kernel, seen: int, low: int, timeout_s: float, expected: tuple[int, int]
) -> None:
    futex.wait_for_change(lambda: seen, ADDRESS, seen, timeout_s)
    assert kernel.calls == [(futex._SYSCALL, ADDRESS, WAIT, low, expected, None, 0)]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_one_that_may_not_wait_does_not_ask(kernel: Kernel, timeout_s: float) -> None:
    futex.wait_for_change(lambda: 5, ADDRESS, 5, timeout_s)
    futex.wait_for_any([(ADDRESS, 5)], timeout_s)
    assert kernel.calls == []
    assert kernel.sleeps == []


@pytest.mark.parametrize("number", [*ENDS_A_WAIT, errno.ENOSYS, errno.EPERM, errno.EINVAL])
def test_errors_that_end_a_wait_are_none(kernel: Kernel, number: int) -> None:
    kernel.failure = number
    if number in ENDS_A_WAIT:
        futex.wait_for_change(lambda: 5, ADDRESS, 5, 1.0)
    else:
        with pytest.raises(OSError, match=f"futex wait failed at {ADDRESS:#x}") as caught:
            futex.wait_for_change(lambda: 5, ADDRESS, 5, 1.0)
        assert caught.value.errno == number
    # A kernel or sandbox without this call makes the caller look now and then.
    if number == errno.EINVAL:
        with pytest.raises(OSError, match="futex wait for several words failed") as caught:
            futex.wait_for_any([(ADDRESS, 5)], 1.0)
        assert caught.value.errno == number
    else:
        futex.wait_for_any([(ADDRESS, 5)], 1.0)
    assert kernel.sleeps == ([0.003] if number in (errno.ENOSYS, errno.EPERM) else [])


@pytest.mark.parametrize(
    ("timeout_s", "until"),
    [(1.5, (101, 750_000_000)), (0.25, (100, 500_000_000)), (math.inf, (10**8 + 100, 250_000_000))],
)
@pytest.mark.parametrize("count", [1, 3, 128])
def test_a_wait_for_several_words_names_each_and_the_moment_of_its_end(
    kernel: Kernel, count: int, timeout_s: float, until: tuple[int, int]
) -> None:
    seen = [(ADDRESS + 8 * number, 2**40 + 2**32 - 1 - number) for number in range(count)]
    futex.wait_for_any(seen, timeout_s)
    words = [word for address, value in seen for word in (value % 2**32, address, U32)]
    assert kernel.calls == [(WAITV, words, count, 0, until, MONOTONIC, 0)]
    assert kernel.sleeps == []


@pytest.mark.parametrize("count", [0, 129])
def test_as_many_words_are_waited_for_as_the_kernel_takes(kernel: Kernel, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} words to wait for: expected 1 to 128"):
        futex.wait_for_any(count * [(ADDRESS, 5)], 1.0)
    assert kernel.calls == []


@pytest.mark.parametrize("have", [True, False])
def test_wake_ups_name_how_many_to_wake_and_are_left_out_where_nobody_can_sleep(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, have: bool
) -> None:
    monkeypatch.setattr(futex, "HAVE_FUTEX", have)
    futex.wake_one(ADDRESS)
    futex.wake_all(ADDRESS)
    counts = [1, 2**31 - 1] if have else []
    assert kernel.calls == [(futex._SYSCALL, ADDRESS, WAKE, count, None, None, 0) for count in counts]


@pytest.mark.parametrize(
    ("timeout_s", "changes_at", "sleeps"),
    [
        (0.003, None, [0.003]),
        (0.0078125, None, [0.003, 0.003, None]),
        (0.5, 2, [0.003, 0.003]),
        (0.5, 0, []),
        (0.001, None, [0.001]),
    ],
)
def test_without_such_a_call_a_word_is_read_every_three_milliseconds(
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    timeout_s: float,
    changes_at: int | None,
    sleeps: list[float | None],
) -> None:
    monkeypatch.setattr(futex, "HAVE_FUTEX", False)
    kernel.now = 0.0
    futex.wait_for_change(lambda: 6 if len(kernel.sleeps) == changes_at else 5, ADDRESS, 5, timeout_s)
    assert kernel.calls == []
    # The last one is what is left.
    expected = [timeout_s - sum(kernel.sleeps[:-1]) if seconds is None else seconds for seconds in sleeps]
    assert kernel.sleeps == pytest.approx(expected)
    assert len(kernel.sleeps) == len(sleeps)


@pytest.mark.parametrize(("timeout_s", "sleeps"), [(0.001, [0.001]), (0.5, [0.003]), (0.0, [])])
def test_without_such_a_call_a_wait_for_several_words_is_short(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, timeout_s: float, sleeps: list[float]
) -> None:
    monkeypatch.setattr(futex, "HAVE_FUTEX", False)
    futex.wait_for_any([(ADDRESS, 5)], timeout_s)
    assert (kernel.calls, kernel.sleeps) == ([], sleeps)


def test_the_number_of_the_call_is_that_of_this_machine() -> None:
    known = {"x86_64": 202, "aarch64": 98, "ppc64le": 221, "riscv64": 98}
    assert known.get(os.uname().machine) == futex._SYSCALL
    assert futex.HAVE_FUTEX is (sys.platform == "linux" and sys.byteorder == "little" and futex._SYSCALL is not None)


def test_a_processor_is_yielded_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(futex, "_sched_yield", lambda: calls.append(None))
    futex.yield_processor()
    assert calls == [None]
