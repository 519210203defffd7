"""Writing to a pipe whose reader may have gone, in a program that SIGPIPE would end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_sigpipe"]


@contextmanager
def without_sigpipe() -> Iterator[None]:
    """Have a write in the block, in this thread, fail with BrokenPipeError alone.

    Python ignores the signal, but programs for pipelines give it its default action back, which is to end the process.
    (On sockets `rpc.sockets.NO_SIGNAL` does it.)
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    was_pending = signal.SIGPIPE in signal.sigpending()
    try:
        yield
    finally:
        if not was_pending and signal.SIGPIPE in signal.sigpending():
            # That of our own write, which came to this thread.
            signal.sigwait({signal.SIGPIPE})
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
