"""Greenlets: whether they have replaced threads, and in which one a call runs.

gevent and eventlet can replace the interpreter's threads with greenlets, which take turns in a single thread ("monkey
patching"). mpmm waits in the kernel, so a wait would stop all greenlets, including the one that has what the wait is
for; and mpmm's own threads would stop the program whenever they sleep. So mpmm refuses to work like that.

Greenlets beside real threads are fine as long as none waits for what another greenlet of its thread has. But a loader
may switch to another greenlet: then its call goes on later, although it is not on the stack of its thread.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any

from mpmm.errors import GreenThreadsError

__all__ = ["current_greenlet", "expect_real_threads"]

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


def current_greenlet() -> weakref.ref[Any] | None:
    """Return the greenlet that runs in this thread, None if that is the thread's own. Weak, so that it can be freed."""
    module = sys.modules.get("greenlet")
    getcurrent = None if module is None else getattr(module, "getcurrent", None)
    if getcurrent is None:
        return None
    current = getcurrent()
    return None if current.parent is None else weakref.ref(current)
