"""Takes care of descriptors and state when this process forks or ends: the only module for both.

A forked child inherits every descriptor: a lock that is held through one would outlive its owner, and a
peer would never see the end of a connection. So each descriptor of this package is registered here as
soon as it is made (under `fork_guard`, so that no fork of this interpreter can come in between) and
closed in children. `LockFile` does so by itself. Descriptors are closed under the guard as well, because
a child would otherwise close a number that by then belongs to another file.

In a forked child, in this order whatever the order of imports:

1. every registered descriptor is closed (by its `forget_after_fork` if it has one, else by `close`);
2. the hooks of `in_forked_child` run, by their `ChildStep`, and within a step in the order of registration.

An exception in a hook is logged, and the other hooks still run. The child's signals wait until the last hook has run: a
handler of the program that raises an exception (KeyboardInterrupt, say) would end a hook in the middle, and the child
would keep descriptors of its parent. Python reports what a handler raises then, or while a fork waits for the guard,
but cannot pass it to the program that forks.

Hooks for the end of a process are registered with `multiprocessing.util.Finalize` and not with `atexit`: children
that `multiprocessing` forks end without running `atexit`, but they do run finalizers, and they run
them before they wait for their own children.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum, unique
from functools import partial
from typing import Any, NoReturn, TypeVar

from mpmm.interpreter.thread_locks import new_rlock
from mpmm.text.printable import printable_logger

__all__ = [
    *("ChildStep", "call_once_at_exit", "close_in_children", "closing_guard", "end_forked_child", "fork_guard"),
    "in_forked_child",
]

T = TypeVar("T")
_LOG = printable_logger("mpmm")

# Hold it only for calls that cannot block: every fork in this process waits for it.
fork_guard = new_rlock()
_descriptors: weakref.WeakSet[Any] = weakref.WeakSet()
_child_hooks: list[tuple[int, Callable[[], None]]] = []
_exit_hooks: set[Callable[[], None]] = set()
# While hooks run in a child. The signal of a fault cannot: it would end the child without a word of `faulthandler`.
_CAN_WAIT = signal.valid_signals() - {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
# The signals that the thread that forks lets wait itself. Guarded by `fork_guard`.
_mask: Iterable[int] = ()


@unique
class ChildStep(IntEnum):
    """When a hook runs in a forked child: lower layers first, so that a hook finds what it builds on renewed."""

    SEGMENT = 1  # memberships of namespaces, and locks of threads around the segment
    WORKER = 2  # what this process holds in a namespace
    MANAGER = 3  # which workers there are, and which thread may make one
    MONITOR = 4  # threads that sample
    LOOP = 5  # threads beside event loops
    SERVERS = 6  # registries, connections, hosts, and the servers that this process has started


def close_in_children(thing: T) -> T:
    """Have `thing` closed in every child forked from now on; return it. Hold `fork_guard` since it was made."""
    with fork_guard:
        _descriptors.add(thing)
    return thing


def closing_guard() -> AbstractContextManager[object]:
    """Return the guard for code that closes a descriptor; while the interpreter finalizes, one that guards nothing.

    From then on daemon threads stop where they are: one that had the guard never releases it, and none can fork.
    """
    return nullcontext() if sys.is_finalizing() else fork_guard


def in_forked_child(hook: Callable[[], None], step: ChildStep = ChildStep.SERVERS) -> None:
    """Have `hook` called in every forked child at its step, after the inherited descriptors were closed."""
    with fork_guard:
        _child_hooks.append((step, hook))
        # Stable, so hooks of a step keep their order.
        _child_hooks.sort(key=lambda entry: entry[0])


def call_once_at_exit(hook: Callable[[], None], priority: int) -> None:
    """Have `hook` called once when this process (not a child of it) ends; higher `priority` (>= 0) first."""
    # Imported here because a process that only reads a namespace does not need it, and starts faster without.
    from multiprocessing import util

    with fork_guard:
        if hook not in _exit_hooks:
            _exit_hooks.add(hook)
            util.Finalize(None, hook, exitpriority=priority)


def end_forked_child(error: BaseException | None) -> NoReturn:
    """End this process, a child that the user's code has forked in a thread of mpmm before it returned or raised.

    Otherwise the thread would go on in the child with its parent's work.

    error: the exception of that code (a SystemExit has the exit status); None if it returned.
    """
    from multiprocessing import util

    status = 0 if error is None else 1
    try:
        if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
            status = error.code or 0
        elif isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        elif error is not None:
            traceback.print_exception(error)
        # Only the finalizers of this process, and not all that `util` does at an exit: it ends the parent's children.
        util._run_finalizers()  # type: ignore[attr-defined]  # the stubs lack it
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        # Only the parent is to run exit handlers.
        os._exit(status & 0xFF)


def _make_sure_of_guard() -> None:
    """Take the guard if a signal handler's exception has ended the wait for it: Python forks all the same."""
    global _mask
    try:
        if not fork_guard._is_owned():  # type: ignore[attr-defined]  # typeshed leaves it out
            # The step of the loop takes it. The interpreter does not check for signals between that and `break`.
            for _ in iter(fork_guard.acquire, None):
                break
        _mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    except BaseException:
        _make_sure_of_guard()
        raise


def _start_over_in_child() -> None:
    if not fork_guard._is_owned():  # type: ignore[attr-defined]  # typeshed leaves it out
        # `_make_sure_of_guard` was interrupted before its first step, and the thread that has the guard is not here.
        fork_guard._at_fork_reinit()  # type: ignore[attr-defined]  # typeshed leaves it out
        fork_guard.acquire()
    try:
        for thing in list(_descriptors):
            # A lock is closed, not unlocked: unlocking would end the parent's lock, which is the same one.
            _guarded(getattr(thing, "forget_after_fork", thing.close))
        _descriptors.clear()
        _exit_hooks.clear()
        for _, hook in _child_hooks:
            _guarded(hook)
    finally:
        mask = _mask
        fork_guard.release()
        # Handlers of signals that have waited run now.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _guarded(hook: Callable[[], None]) -> None:
    try:
        hook()
    # Not only Exception, because any other would keep the next hooks from running, too.
    except BaseException:
        _LOG.exception("mpmm: a hook for forked children failed")


# Python calls hooks for before a fork in the reverse order. Two hooks are in C, where a handler that raises before the
# first step of a function would leave the guard taken for good, or keep descriptors of the parent open in the child.
os.register_at_fork(
    before=_make_sure_of_guard, after_in_child=partial(signal.pthread_sigmask, signal.SIG_BLOCK, _CAN_WAIT)
)
os.register_at_fork(before=fork_guard.acquire, after_in_parent=fork_guard.release, after_in_child=_start_over_in_child)
