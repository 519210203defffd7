"""Greenlets: whether they have replaced threads, and which calls are suspended in one.

gevent and eventlet can replace the interpreter's threads with greenlets, which take turns in a single thread ("monkey
patching"). mpmm waits in the kernel, so a wait would stop all greenlets, including the one that has what the wait is
for; and mpmm's own threads would stop the program whenever they sleep. So mpmm refuses to work like that.

Greenlets beside real threads are fine as long as none waits for what another greenlet of its thread has. But a loader
may switch to another greenlet: then its call goes on later, although it is not on the stack of its thread.
"""

from __future__ import annotations

import gc
import os
import sys
from types import FrameType

from mpmm.errors import GreenThreadsError

__all__ = ["expect_real_threads", "suspended_frames"]

# By library: the module that patches others, its function that tells whether it has, and that function's argument.
_PATCHERS = {
    "gevent": ("gevent.monkey", "is_module_patched", "_thread"),
    "eventlet": ("eventlet.patcher", "is_monkey_patched", "thread"),
}


def expect_real_threads(what: str) -> None:
    """Raise GreenThreadsError if greenlets have replaced the threads. what: cannot be used then; for the error."""
    for library, (module, function, threads) in _PATCHERS.items():
        has_replaced = getattr(sys.modules.get(module), function, None)
        if has_replaced is not None and has_replaced(threads):
            raise GreenThreadsError(
                f"{what} cannot be used in pid {os.getpid()}: {library} has replaced threads with greenlets (monkey "
                "patching), so a wait for a model would stop all greenlets of the process, and with them the one that "
                "has the model; use threads or processes (gunicorn --worker-class gthread, celery --pool threads or "
                "prefork), or an event loop (model_async)"
            )


def suspended_frames() -> list[FrameType]:
    """Return the innermost frame of each greenlet that has begun and is not running now."""
    kind = getattr(sys.modules.get("greenlet"), "greenlet", None)
    if not isinstance(kind, type):
        return []
    # By type and not by `isinstance`, which calls code of proxy objects.
    greenlets = [found for found in gc.get_objects() if issubclass(type(found), kind)]
    return [frame for found in greenlets if (frame := found.gr_frame) is not None]
