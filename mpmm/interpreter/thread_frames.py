"""The frames of each thread of this process, read in a way that Python 3.11 survives.

Python 3.11 makes an object for a frame when somebody asks for it. Each new object may trigger the garbage collector,
and that may run finalizers, in the middle of one of these two operations:

- The interpreter walks its list of threads under a lock of its own. If the collector frees a `threading.local`, or runs
  a finalizer that starts a thread, it takes the same lock again and waits forever, holding the GIL: no thread of the
  process runs any more, and no time-out or signal handler ends the wait (CPython's issue 106883; 3.11.9 fixed it).
- `f_back` of another thread's frame looks up the calling frame, and makes the object for it. If a finalizer lets that
  thread run meanwhile, the frame may return, and the interpreter then uses memory that was freed.

So the collector is off during each of them. 3.10 makes no such objects. From 3.12 on, an allocation does not collect.

What these functions return is also short-lived: a dictionary with the frames of all threads contains that of the thread
which has asked for it, and once a variable of a frame above that one refers to the dictionary, they are a cycle. Until
the next garbage collection it would keep alive what the variables of all threads refer to, even models and leases.
"""

from __future__ import annotations

import gc
import operator
import sys
import threading
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

__all__ = ["caller_of", "innermost_frame", "innermost_frames", "is_on_stack", "may_be_running", "stays_at"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

if sys.version_info >= (3, 11) and sys.version_info < (3, 12):

    def _all_frames() -> dict[int, FrameType]:
        return cast("dict[int, FrameType]", _without_collecting(sys._current_frames))

    def caller_of(frame: FrameType) -> FrameType | None:
        """Return the frame that has called a frame, of any thread: its `f_back`."""
        return cast("FrameType | None", _without_collecting(partial(getattr, frame, "f_back")))

    def _without_collecting(function: Callable[[], Any]) -> Any:
        """Call a C function while the garbage collector is off."""
        if gc.isenabled():
            try:
                return _without_a_break(gc.disable, function, gc.enable)[1]
            except MemoryError:
                gc.enable()
                raise
        # Another thread may have enabled the collector since the last line.
        collects, _, found = _without_a_break(gc.isenabled, gc.disable, function)
        if collects:
            gc.enable()
        return found

    def _without_a_break(*functions: Callable[[], object]) -> tuple[Any, ...]:
        """Call C functions one after the other, with no other thread and no signal handler between them.

        Threads and handlers run between the bytecodes of Python code, of which there are none in here. So no thread can
        enable the collector meanwhile, and if this enables it again, no handler's exception can leave it disabled.
        """
        return tuple(map(operator.call, functions))
else:
    _all_frames = sys._current_frames

    def caller_of(frame: FrameType) -> FrameType | None:
        """Return the frame that has called a frame, of any thread: its `f_back`."""
        return frame.f_back


def innermost_frames(threads: Iterable[int]) -> dict[int, FrameType]:
    """Return the innermost frame of each of some threads, by the thread's identifier; none for those that have ended.

    The caller clears the dictionary if the calling thread is among them.
    """
    found = _all_frames()
    try:
        return {thread: found[thread] for thread in threads if thread in found}
    finally:
        found.clear()


def innermost_frame(thread: int) -> FrameType | None:
    """Return the innermost frame of a thread; None if it has ended."""
    found = innermost_frames((thread,))
    try:
        return found.get(thread)
    finally:
        found.clear()


def is_on_stack(frame: FrameType, top: FrameType | None) -> bool:
    """Tell whether `frame` is on the stack of a thread that was seen at `top`; None for a thread that has ended."""
    while top is not None:
        if top is frame:
            return True
        top = caller_of(top)
    return False


def may_be_running(frame: FrameType, thread: int) -> bool:
    """Return False if a frame is no longer on the stack of a thread; True, too, if that could not be seen."""
    if thread == threading.get_ident():
        return is_on_stack(frame, sys._getframe())
    top = innermost_frame(thread)
    at = None if top is None else top.f_lasti
    return is_on_stack(frame, top) or not stays_at(thread, top, at)


def stays_at(thread: int, top: FrameType | None, at: int | None) -> bool:
    """Tell whether another thread is still where it was seen: in frame `top`, at the instruction `at`.

    If not, what was found on its stack may be wrong, because a frame that has returned leads nowhere.
    """
    return innermost_frame(thread) is top and (top is None or top.f_lasti == at)
