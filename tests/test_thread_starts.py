"""An exception from a signal handler during a thread's start reaches the caller unchanged."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from harness import wait_until
from interrupt_points import Interrupted as InterruptedAtPoint
from interrupt_points import points_of
from patience import DEADLINE_S

from mpmm.interpreter.thread_starts import start_thread

# As the interpreter's own module calls what makes a thread; it has another name from Python 3.13 on.
START = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"


class Interrupted(Exception):
    """Raised by the handler."""


def test_an_exception_of_a_signal_handler_is_raised_where_the_thread_has_been_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, ran = getattr(threading, START), threading.Event()
    thread = threading.Thread(target=ran.set)

    def start_and_be_interrupted(*arguments: Any, **options: Any) -> None:
        start(*arguments, **options)
        wait_until(lambda: thread not in threading._limbo, "it is on its way")  # type: ignore[attr-defined]  # private
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(threading, START, start_and_be_interrupted)
        with pytest.raises(Interrupted):
            start_thread(thread)
    assert ran.wait(DEADLINE_S)


def test_a_thread_that_is_not_to_be_had_is_an_error_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, START, refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        start_thread(threading.Thread(target=int))


def test_a_key_error_of_something_else_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    thread, nothing = threading.Thread(target=int), dict[str, int]()
    monkeypatch.setattr(thread, "start", lambda: nothing["missing"])
    with pytest.raises(KeyError, match="missing"):
        start_thread(thread)


# A thread that CPython has taken for one that failed to start says so when it ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_at_any_bytecode_is_raised_as_it_is_and_leaves_no_thread_that_hangs() -> None:
    threads = len(os.listdir("/proc/self/task"))
    failures: list[str] = []
    points = 0
    for at, interruption in points_of(lambda: start_thread(threading.Thread(target=int)), lambda: None, 1, failures):
        try:
            with interruption:
                start_thread(threading.Thread(target=int))
        except Exception as error:
            if not isinstance(error, InterruptedAtPoint):
                failures.append(f"{at} ({interruption.where}): {error!r}")
        except KeyboardInterrupt:
            pass
        interruption.forget()
        points += 1
    assert points
    assert not failures, "\n".join(failures)
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= threads, "all threads have ended")
