"""Writing to a pipe whose reader may be gone, in a program that SIGPIPE would end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_sigpipe"]


@contextmanager
def without_sigpipe() -> Iterator[None]:
    """Have a write in the block, in this thread, fail with nothing but BrokenPipeError.

    Python ignores the signal, but programs for pipelines restore its default action, which ends the process.
    (For sockets `rpc.sockets.NO_SIGNAL` does this.)
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    was_pending = signal.SIGPIPE in signal.sigpending()
    try:
        yield
    finally:
        if not was_pending and signal.SIGPIPE in signal.sigpending():
            # The signal of the block's own write, which was sent to this thread.
            signal.sigwait({signal.SIGPIPE})
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
