"""What a public call has in hand while it runs, so that an exception from a signal handler leaves nothing behind.

Such an exception may come between any two bytecodes: after a copy was taken in shared state, say, and before the caller
has it. So each call that takes or gives back something has an `Operation` in its session's `operations` for as long as
it runs, and notes there what it is about to have before it has it. The background thread looks at them a few times a
second: a frame that is no longer on its thread's stack cannot go on, and the background thread gives back what its
operation has in hand (`Reconciler.reconcile`). What is noted but was never had, because the transaction was undone,
does not stand in the rows, and nothing is done.

At its end a call takes its operation off. What a `with` block or a lease holds stays noted without a frame: its object
is the owner, and it goes back when that is collected without having come to its end. (No finalizer does that: an
exception that a signal handler raises in one is lost to the program.)
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from mpmm.interpreter.green_threads import suspended_frames
from mpmm.interpreter.thread_frames import current_frames, is_on_stack

if TYPE_CHECKING:
    import asyncio

__all__ = ["Held", "LoadedInstance", "Operation", "ended_calls", "forget_closed_loops", "key_of"]


@dataclass(frozen=True)
class LoadedInstance:
    """A copy of a model as this process knows it: its row, and the row's generation to tell it from later ones.

    key: by what its value is told from others, see `key_of`.
    """

    row: int
    generation: int
    tag: str
    value: Any
    key: Hashable = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", key_of(self.value))


def key_of(value: Any) -> Hashable:
    """Return by what a copy is told from others: by the text of its handle, and an object by its identity."""
    # The text of a handle of a class of its own, so that no code of such a class runs where keys are compared: the
    # compiled core does that with the lock held.
    return str.__str__(value) if isinstance(value, str) else id(value)


# One hold of a copy, and which use of the copy it is; told by identity from earlier and later holds of the same copy.
Held = tuple[LoadedInstance, int]


class Operation:
    """One call. held: what it has taken, or if `gives_back`, has struck off the list of what this process holds.

    ticket: row and number of its place in the queue. booking: row and generation of what it loads, or has leased.
    frame: where it runs; None if it does not, because an object, its `owner`, answers for it. warning: logged if that
    is collected meanwhile. abandoned: it will not go on. unheard_by: the event loop that has not resumed the task yet
    for which a thread has something in hand; a loop that was closed never does. loop: the event loop of the call's
    task, until it is seen to be closed.
    """

    held: Held | None = None
    gives_back = False
    ticket: tuple[int, int] | None = None
    booking: tuple[int, int] | None = None
    owner: weakref.ref[object] | None = None
    unheard_by: weakref.ref[asyncio.AbstractEventLoop] | None = None
    loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
    warning = ""
    abandoned = False

    def __init__(self, frame: FrameType | None) -> None:
        self.frame = frame
        self.thread = threading.get_ident()

    @property
    def has_something(self) -> bool:
        """Tell whether something may have to be given back for it."""
        return self.held is not None or self.ticket is not None or self.booking is not None

    @property
    def is_orphaned(self) -> bool:
        """Tell whether the object that answers for it has been collected, or never hears of it."""
        if self.frame is not None or self.owner is None:
            return False
        if self.owner() is None:
            return True
        unheard_by = self.unheard_by
        loop = None if unheard_by is None else unheard_by()
        return loop is not None and loop.is_closed()


def forget_closed_loops(operations: set[Operation]) -> bool:
    """Return whether a loop was closed, since the last look, in which a call has something in hand.

    Its task never goes on. But somebody else may give back what it holds, as long as the object is not collected that
    answers for that; and a task that waited is in a cycle with what it has waited for.
    """
    closed = [operation for operation in list(operations) if operation.loop is not None and _is_closed(operation.loop)]
    for operation in closed:
        operation.loop = None
    return bool(closed)


def _is_closed(reference: weakref.ref[asyncio.AbstractEventLoop]) -> bool:
    loop = reference()
    return loop is None or loop.is_closed()


def ended_calls(operations: set[Operation]) -> list[Operation]:
    """Return the calls that cannot go on, by what all threads are at."""
    running = [(operation, operation.frame) for operation in list(operations)]
    tops = current_frames() if running else {}
    try:
        return [
            operation
            for operation, frame in running
            if operation.abandoned
            # Looked at again, because the call may have come to its end before the stacks were seen.
            or (_has_ended(operation, frame, tops) and operation.frame is frame and operation in operations)
        ]
    finally:
        # This function's own frame is among them: a cycle, which would keep what the variables of all threads refer to,
        # models and managers too, until the collector comes by.
        tops.clear()


def _has_ended(operation: Operation, frame: FrameType | None, tops: dict[int, FrameType]) -> bool:
    if frame is None:
        return operation.is_orphaned
    top = tops.get(operation.thread)
    at = None if top is None else top.f_lasti
    if is_on_stack(frame, top) or any(is_on_stack(frame, innermost) for innermost in suspended_frames()):
        return False
    if operation.thread == threading.get_ident():
        return True
    # A frame that has returned leads nowhere, so the look counts only if the other thread has not gone on during it.
    return current_frames().get(operation.thread) is top and (top is None or top.f_lasti == at)
