"""A record of what each public call holds while it runs: an exception from a signal handler must leave nothing behind.

Such an exception may come between any two bytecodes: after a copy was taken in shared state, say, and before the caller
has it. So each call that takes or gives back something has an `Operation` in its session's `operations` for as long as
it runs, and records there what it is about to take before it takes it. The background thread checks them a few times a
second: a call whose frame is no longer on its thread's stack cannot continue, so the background thread gives back what
its operation holds (`Reconciler.reconcile`). If something was recorded but never taken, because the transaction was
undone, the rows do not show it, and nothing is done.

When a call ends, it removes its operation. The operation of a `with` block or a lease stays, without a frame: its
object is the owner, and if that is collected before it has ended, the background thread gives back what it holds. (No
finalizer does that: an exception that a signal handler raises in one is lost to the program.)
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from mpmm.interpreter.green_threads import current_greenlet
from mpmm.interpreter.thread_frames import innermost_frames, is_on_stack, stays_at

if TYPE_CHECKING:
    import asyncio

__all__ = ["Held", "LoadedInstance", "Operation", "ended_calls", "garbage_may_hold", "key_of"]


@dataclass(frozen=True)
class LoadedInstance:
    """A copy of a model as this process knows it: its row, and the row's generation to tell it from later ones.

    key: distinguishes its value from others, see `key_of`.
    """

    row: int
    generation: int
    tag: str
    value: Any
    key: Hashable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", key_of(self.value))


def key_of(value: Any) -> Hashable:
    """Return what distinguishes a copy's value from others: the text of a handle, or the identity of an object."""
    # Plain text even for a subclass of `str`, so that no code of such a class runs when keys are compared: the compiled
    # core does that with the lock held.
    return str.__str__(value) if isinstance(value, str) else id(value)


# One hold of a copy, and which use of the copy it is. Its identity distinguishes it from other holds of the same copy.
Held = tuple[LoadedInstance, int]


class Operation:
    """One call. held: what it has taken, or if `gives_back`, has struck off the list of what this process holds.

    ticket: row and number of its place in the queue. booking: row and generation of what it loads, or has leased.
    frame: where it runs; None if an object, its `owner`, is responsible instead. warning: logged if the owner is
    collected meanwhile. abandoned: it will not continue. unheard_by: the event loop that has yet to resume the task for
    which a thread has taken something; a closed loop never does. loop: the event loop of the call's task. looks: how
    often it was seen to be closed.
    """

    held: Held | None = None
    gives_back = False
    ticket: tuple[int, int] | None = None
    booking: tuple[int, int] | None = None
    owner: weakref.ref[object] | None = None
    unheard_by: weakref.ref[asyncio.AbstractEventLoop] | None = None
    loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
    looks = 0
    warning = ""
    abandoned = False

    def __init__(self, frame: FrameType | None) -> None:
        self.frame = frame
        self.thread = threading.get_ident()
        self.greenlet = current_greenlet()

    @property
    def has_something(self) -> bool:
        """Tell whether it may hold something that has to be given back."""
        return self.held is not None or self.ticket is not None or self.booking is not None

    @property
    def is_orphaned(self) -> bool:
        """Tell whether its owner has been collected, or will never hear of it."""
        if self.frame is not None or self.owner is None:
            return False
        if self.owner() is None:
            return True
        unheard_by = self.unheard_by
        loop = None if unheard_by is None else unheard_by()
        return loop is not None and loop.is_closed()


def garbage_may_hold(operations: set[Operation]) -> bool:
    """Return whether to look for garbage, because it may include the task of a call in progress whose loop is closed.

    The task never continues. But until the call's owner is collected, something else may still give back what it holds;
    and a task that waited is in a reference cycle with what it waited for. If it is not garbage at the first look,
    because the caller of the loop has not dropped it yet, it is worth another one, but the longer it lasts, the more
    seldom: at the second, fourth, eighth, ... look.
    """
    found = False
    for operation in list(operations):
        if operation.loop is not None and not operation.is_orphaned and _is_closed(operation.loop):
            operation.looks += 1
            found |= operation.looks & (operation.looks - 1) == 0
    return found


def _is_closed(reference: weakref.ref[asyncio.AbstractEventLoop]) -> bool:
    loop = reference()
    return loop is None or loop.is_closed()


def ended_calls(operations: set[Operation]) -> list[Operation]:
    """Return the calls that cannot continue, by looking at the stacks of all threads."""
    running = [(operation, operation.frame) for operation in list(operations)]
    tops = innermost_frames({operation.thread for operation, _ in running}) if running else {}
    try:
        return [
            operation
            for operation, frame in running
            if operation.abandoned
            # Checked again, because the call may have ended before the stacks were read.
            or (_has_ended(operation, frame, tops) and operation.frame is frame and operation in operations)
        ]
    finally:
        # This thread's frame may be among them.
        tops.clear()


def _has_ended(operation: Operation, frame: FrameType | None, tops: dict[int, FrameType]) -> bool:
    if frame is None:
        return operation.is_orphaned
    top = tops.get(operation.thread)
    at = None if top is None else top.f_lasti
    if is_on_stack(frame, top):
        return False
    greenlet = None if operation.greenlet is None else operation.greenlet()
    if greenlet is not None and not greenlet.dead:
        # It may be suspended. Its frames are not looked at, nor is the collector asked for greenlets: both touch what
        # other threads are about to free.
        return False
    if operation.thread == threading.get_ident():
        return True
    return stays_at(operation.thread, top, at)
