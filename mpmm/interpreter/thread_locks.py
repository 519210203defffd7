"""Locks between threads that a `with` block always releases, even if a signal handler raises.

Up to Python 3.13, `with lock:` takes a lock and guards it in one step. Python 3.14 calls `__enter__` like any other
function, and checks for signals after the call but before the block is guarded: if a handler raises at that moment, the
lock is never released. If handlers raise all the time, this happens to a third of them.

The locks made here are taken by the step of a `for` loop instead, after which the interpreter does not check for
signals. Nor does it between the `return` of `__enter__` and the block. `__exit__` is the lock's own, in C, because a
Python function could be interrupted before it begins.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["InTime", "new_lock", "new_rlock"]

if TYPE_CHECKING or sys.version_info < (3, 14):
    new_lock = threading.Lock
    new_rlock = threading.RLock
else:
    import _thread

    class new_rlock(_thread.RLock):  # named like the function of older versions
        """Make a lock that the thread that has it may take again."""

        def __init__(self) -> None:
            self._takes = iter(self.acquire, None)

        def __enter__(self) -> bool:
            for _ in self._takes:
                return True
            raise AssertionError("a lock that was taken is never None")

    class new_lock:  # named like the function of older versions
        """Make a lock that cannot be taken twice; not a subclass of `_thread.lock`, which can have none."""

        __slots__ = ("__weakref__", "_give_back", "_takes", "acquire", "locked", "release")

        def __init__(self) -> None:
            lock = _thread.allocate_lock()
            self.acquire, self.release, self.locked = lock.acquire, lock.release, lock.locked
            self._give_back = lock.__exit__
            self._takes: Any = iter(lock.acquire, None)

        def __enter__(self) -> bool:
            for _ in self._takes:
                return True
            raise AssertionError("a lock that was taken is never None")

        # `with` looks it up on the class, before it takes the lock, and gets the C function.
        __exit__ = property(operator.attrgetter("_give_back"))


class InTime:
    """`with InTime(lock, seconds, error):` a lock that is made here; raises `error()` if others have it for so long."""

    __slots__ = ("_error", "_give_back", "_takes")

    def __init__(self, lock: Any, timeout_s: float, error: Callable[[], Exception]) -> None:
        self._error = error
        self._give_back = lock.__exit__
        self._takes: Any = iter(functools.partial(lock.acquire, timeout=timeout_s), None)

    def __enter__(self) -> bool:
        for taken in self._takes:
            if taken:
                return True
            break
        raise self._error()

    # Looked up on the class, before the lock is taken: what it returns is the function in C.
    __exit__ = property(operator.attrgetter("_give_back"))
