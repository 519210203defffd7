"""Sleeping until a word of the segment changes, and waking the threads that sleep on it.

On Linux this is `futex(2)`: the kernel compares the word and puts the thread to sleep in one step, so no wake-up is
lost between the two, threads need no descriptors, and a dead sleeper leaves nothing behind. That is why the doorbells
are words and not named pipes: a pipe's round trip is some microseconds faster (9 us against 17 us), but needs a file
per waiter, or a reader thread per process that costs more than it saves. Other systems read the word every few
milliseconds.

The kernel compares the low half of the 8-byte word (little-endian machines), so only its low 32 bits matter.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import sys
import time
from collections.abc import Callable, Sequence

__all__ = [
    "HAVE_FUTEX",
    "WAITED_FOR_AT_MOST",
    "wait_for_any",
    "wait_for_change",
    "wake_all",
    "wake_one",
    "yield_processor",
]

_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_SYSCALL = {"x86_64": 202, "aarch64": 98, "ppc64le": 221, "riscv64": 98}.get(os.uname().machine)
HAVE_FUTEX = sys.platform == "linux" and sys.byteorder == "little" and _SYSCALL is not None
_POLL_S = 0.003
#: How many words the kernel lets a thread wait for at a time.
WAITED_FOR_AT_MOST = 128
# Since Linux 5.16, with the same number on every machine.
_SYSCALL_WAITV = 449
_SIZE_U32 = 2
_CLOCK_MONOTONIC = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_sched_yield = ctypes.CDLL(None).sched_yield
if HAVE_FUTEX:
    _syscall = ctypes.CDLL(None, use_errno=True).syscall
    _syscall.restype = ctypes.c_long
    _syscall.argtypes = [
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_long,
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_long,
    ]


def wait_for_change(read: Callable[[], int], address: int, seen: int, timeout_s: float) -> None:
    """Sleep until the word at `address` is no longer `seen`, a wake-up or signal comes, or `timeout_s` has passed.

    read: returns the word's value. Whatever ended the sleep, the caller reads the word again.
    """
    if timeout_s <= 0:
        return
    if not HAVE_FUTEX:
        deadline = time.monotonic() + timeout_s
        while read() == seen and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_POLL_S, left))
        return
    fraction, whole = math.modf(min(timeout_s, 1e8))
    timeout = _Timespec(int(whole), int(fraction * 1e9))
    low = ctypes.c_int32(seen & 0xFFFFFFFF).value
    if _syscall(_SYSCALL, address, _FUTEX_WAIT, low, ctypes.addressof(timeout), None, 0) == -1:
        failure = ctypes.get_errno()
        if failure not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EFAULT):
            raise OSError(failure, f"futex wait failed at {address:#x}")


def wait_for_any(seen: Sequence[tuple[int, int]], timeout_s: float) -> None:
    """Sleep until one of several words changes, a wake-up or signal comes, or `timeout_s` has passed.

    seen: (address, value) of each word, at most `WAITED_FOR_AT_MOST`; a word with another value by now ends the sleep.
    Kernels before 5.16, and other systems, cannot do this: there it sleeps for at most three milliseconds.
    """
    if not 0 < len(seen) <= WAITED_FOR_AT_MOST:
        raise ValueError(f"{len(seen)} words to wait for: expected 1 to {WAITED_FOR_AT_MOST}")
    if timeout_s <= 0:
        return
    if HAVE_FUTEX:
        vector = (ctypes.c_uint64 * (3 * len(seen)))()
        for place, (address, value) in enumerate(seen):
            vector[3 * place : 3 * place + 3] = [value & 0xFFFFFFFF, address, _SIZE_U32]
        fraction, whole = math.modf(time.monotonic() + min(timeout_s, 1e8))
        until = _Timespec(int(whole), int(fraction * 1e9))
        vector_at, until_at = ctypes.addressof(vector), ctypes.addressof(until)
        if _syscall(_SYSCALL_WAITV, vector_at, len(seen), 0, until_at, _CLOCK_MONOTONIC, 0) != -1:
            return
        failure = ctypes.get_errno()
        if failure in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EFAULT):
            return
        if failure not in (errno.ENOSYS, errno.EPERM):
            raise OSError(failure, "futex wait for several words failed")
    time.sleep(min(_POLL_S, timeout_s))


def yield_processor() -> None:
    """Let other processes run and, unlike `os.sched_yield` of older Pythons, other threads of this one."""
    _sched_yield()


def wake_one(address: int) -> None:
    """Wake one of the threads that sleep on the word at `address`."""
    if HAVE_FUTEX:
        _syscall(_SYSCALL, address, _FUTEX_WAKE, 1, None, None, 0)


def wake_all(address: int) -> None:
    """Wake every thread of every process that sleeps on the word at `address`."""
    if HAVE_FUTEX:
        _syscall(_SYSCALL, address, _FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)
