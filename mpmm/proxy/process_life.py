"""What becomes of descriptors and state when this process forks or ends.

A forked child inherits every descriptor: a lock that is held through one would outlive its owner, and a
peer would never see the end of a connection. So each descriptor of this package is registered here in
the same breath in which it is made (under `fork_guard`, which no fork can split) and closed in children.

At the end of a process, hooks go through `multiprocessing.util.Finalize` and not through `atexit`: children
that `multiprocessing` forks leave without running `atexit`, but they do run finalizers, and they run
them before they wait for their own children.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from multiprocessing import util
from typing import Any, TypeVar

__all__ = ["call_once_at_exit", "close_in_children", "fork_guard", "in_forked_child"]

T = TypeVar("T")

# Hold it only for what cannot block: every fork in this process waits for it.
fork_guard = threading.RLock()
_descriptors: weakref.WeakSet[Any] = weakref.WeakSet()
_child_hooks: list[Callable[[], None]] = []
_exit_hooks: set[Callable[[], None]] = set()


def close_in_children(thing: T) -> T:
    """Have `thing.close()` called in every child forked from now on; return it. Hold `fork_guard` since it was made."""
    with fork_guard:
        _descriptors.add(thing)
    return thing


def in_forked_child(hook: Callable[[], None]) -> None:
    """Have `hook` called in every forked child, after the inherited descriptors were closed."""
    _child_hooks.append(hook)


def call_once_at_exit(hook: Callable[[], None], priority: int) -> None:
    """Have `hook` called once when this process (not a child of it) ends; higher `priority` (>= 0) first."""
    with fork_guard:
        if hook not in _exit_hooks:
            _exit_hooks.add(hook)
            util.Finalize(None, hook, exitpriority=priority)


def _start_over_in_child() -> None:
    for thing in list(_descriptors):
        with contextlib.suppress(OSError):
            thing.close()
    _descriptors.clear()
    _exit_hooks.clear()
    for hook in _child_hooks:
        hook()
    fork_guard.release()


os.register_at_fork(before=fork_guard.acquire, after_in_parent=fork_guard.release, after_in_child=_start_over_in_child)
