"""A thread pool that keeps working when the main thread has ended and others have not.

The interpreter closes all pools of `concurrent.futures` as soon as the main thread ends, although it then waits for
other threads, such as one that runs an event loop. The main thread counts as alive until what runs in those pools has
ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from mpmm.interpreter.thread_starts import start_thread

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["ThreadPool"]

P = ParamSpec("P")
T = TypeVar("T")


class ThreadPool:
    """Runs functions in at most `threads` threads at a time."""

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._name = name
        self._turns = threading.BoundedSemaphore(threads)
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a thread call a function; return the future of its result.

        Raises RuntimeError if no thread can be started.
        """
        if not _has_main_thread_ended():
            try:
                return self._executor().submit(function, *args, **kwargs)
            except RuntimeError:
                if not _has_main_thread_ended():
                    raise
        future: Future[T] = Future()

        def work() -> None:
            with self._turns:
                if future.set_running_or_notify_cancel():
                    _fulfil(future, function, *args, **kwargs)

        # Not a daemon if this thread is none: then the process waits for both at its end.
        start_thread(threading.Thread(target=work, name=self._name))
        return future

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None:
            # Imported now, because it cannot be imported once the main thread has ended.
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(self._threads, self._name)
        return self._pool


def _has_main_thread_ended() -> bool:
    """Tell whether the main thread has run the program to its end, after which the pools are closed."""
    # The interpreter sets the variable before it closes them, and forgets the thread only after that.
    return threading._SHUTTING_DOWN or not threading.main_thread().is_alive()  # type: ignore[attr-defined]  # not in typeshed


def _fulfil(future: Future[T], function: Callable[..., T], *args: Any, **kwargs: Any) -> None:
    try:
        result = function(*args, **kwargs)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
