"""Sleeping until a word of the segment changes, and waking those who sleep on it.

Linux has this as `futex(2)`: the kernel compares the word and puts the thread to sleep in one step, so a
wake-up between the look and the sleep cannot be lost, a thousand threads need no descriptor each, and a
dead sleeper leaves nothing behind. That is why the doorbells are words and not named pipes: a pipe's round
trip is some microseconds faster (9 us against 17 us), but needs a file per waiter, or a reader thread per
process that costs more than it saves. Elsewhere the word is looked at every few milliseconds.

The word that is compared is the low half of an 8-byte word (little-endian machines), so only its low 32
bits matter.
"""

from __future__ import annotations

import ctypes
import errno
import math
import platform
import sys
import time
from collections.abc import Callable

__all__ = ["HAVE_FUTEX", "wait_for_change", "wake_all", "wake_one", "yield_processor"]

_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_SYSCALL = {"x86_64": 202, "aarch64": 98, "ppc64le": 221, "riscv64": 98}.get(platform.machine())
HAVE_FUTEX = sys.platform == "linux" and sys.byteorder == "little" and _SYSCALL is not None
_POLL_S = 0.003


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
    """Sleep until the word at `address` is no longer `seen`, a wake-up, a signal, or `timeout_s` has passed.

    read: returns the word's value. The caller looks at the word again, whatever ended the sleep.
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


def yield_processor() -> None:
    """Let others run: other processes and, unlike `os.sched_yield` of older Pythons, other threads of this one."""
    _sched_yield()


def wake_one(address: int) -> None:
    """Wake one of the threads that sleep on the word at `address`."""
    if HAVE_FUTEX:
        _syscall(_SYSCALL, address, _FUTEX_WAKE, 1, None, None, 0)


def wake_all(address: int) -> None:
    """Wake every thread of every process that sleeps on the word at `address`."""
    if HAVE_FUTEX:
        _syscall(_SYSCALL, address, _FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)
