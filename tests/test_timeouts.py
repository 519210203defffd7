"""The time limit for calls that may hang."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mpmm.interpreter.thread_starts import start_thread
from mpmm.sources.timeouts import NoAnswerError, answer_within


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """What a call hangs at, until the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def test_the_time_during_which_the_process_is_stopped_counts(
    monkeypatch: pytest.MonkeyPatch, hang: threading.Event
) -> None:
    clock, waits = Clock(), list[float | None]()
    wait = threading.Event.wait

    def start(thread: threading.Thread) -> None:
        start_thread(thread)
        # It is stopped here, before it waits.
        clock.now += 60.0

    def note(self: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread():
            waits.append(timeout)
        return wait(self, timeout)

    monkeypatch.setattr("mpmm.sources.timeouts.time", clock)
    monkeypatch.setattr("mpmm.sources.timeouts.start_thread", start)
    monkeypatch.setattr(threading.Event, "wait", note)
    with pytest.raises(NoAnswerError, match=r"no answer within 0\.5 s"):
        answer_within(hang.wait, 0.5, "test")
    assert waits[-1] == 0.0
