"""A time limit for calls that may hang: of a driver, a program, or a caller's own monitor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from mpmm.interpreter.latch import Latch
from mpmm.interpreter.thread_starts import start_thread

__all__ = ["NoAnswerError", "answer_within"]

T = TypeVar("T")


class NoAnswerError(TimeoutError):
    """There was no answer in time. Nothing else raises it, neither another call nor a signal handler."""


def answer_within(ask: Callable[[], T], timeout_s: float, name: str) -> T:
    """Return what `ask` returns, or raise what it raises; called in a thread that is given up after `timeout_s`.

    name: of the thread.

    Raises NoAnswerError if there is no answer by then. A later answer is dropped.
    """
    answers: list[T] = []
    failures: list[BaseException] = []
    answered = Latch()
    # Counted from here: the process may be stopped for long between the start of the thread and the wait for it.
    deadline = time.monotonic() + timeout_s

    def work() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # is raised again in the thread that waits
            failures.append(error)
        answered.set()

    try:
        start_thread(threading.Thread(target=work, name=name, daemon=True))
    except RuntimeError:  # no thread can be started: a late answer is better than none
        return ask()
    if not answered.wait(deadline - time.monotonic()):
        raise NoAnswerError(f"no answer within {timeout_s:g} s")
    if failures:
        # Taken out of the list, as its traceback has this frame: they would keep each other, and all callers.
        raise failures.pop()
    return answers[0]
