"""The frame of each thread of this process, read in a way in which Python 3.11 cannot deadlock.

The interpreter walks its list of threads under a lock of its own. Python 3.11 makes objects meanwhile, and each may
trigger the garbage collector. If the collector frees a `threading.local`, or runs a finalizer that starts a thread, it
takes the same lock again and waits forever, holding the GIL: no thread of the process runs any more, and no time-out or
signal handler ends the wait (CPython's issue 106883). 3.11.9 fixed it, 3.10 makes no such objects, and from 3.12 on an
allocation does not collect.
"""

from __future__ import annotations

import gc
import operator
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

__all__ = ["current_frames", "is_on_stack"]

if TYPE_CHECKING:
    from collections.abc import Callable

if sys.version_info >= (3, 11) and sys.version_info < (3, 11, 9):

    def current_frames() -> dict[int, FrameType]:
        """Return the innermost frame of each thread, by the thread's identifier, as `sys._current_frames` does."""
        if gc.isenabled():
            try:
                return _without_a_break(gc.disable, sys._current_frames, gc.enable)[1]
            except MemoryError:
                gc.enable()
                raise
        # Another thread may have enabled the collector since the last line.
        collects, _, frames = _without_a_break(gc.isenabled, gc.disable, sys._current_frames)
        if collects:
            gc.enable()
        return frames

    def _without_a_break(*functions: Callable[[], object]) -> tuple[Any, ...]:
        """Call C functions one after the other, with no other thread and no signal handler between them.

        Threads and handlers run between the bytecodes of Python code, of which there are none in here. So no thread can
        enable the collector meanwhile, and if this enables it again, no handler's exception can leave it disabled.
        """
        return tuple(map(operator.call, functions))
else:
    current_frames = sys._current_frames


def is_on_stack(frame: FrameType, top: FrameType | None) -> bool:
    """Tell whether `frame` is on the stack of a thread that was seen at `top`; None for a thread that has ended."""
    while top is not None:
        if top is frame:
            return True
        top = top.f_back
    return False
