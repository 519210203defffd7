"""The time limit for calls that may hang."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mpmm.interpreter.latch import Latch
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
    clock, waits = Clock(), list[float]()
    wait = Latch.wait

    def start(thread: threading.Thread) -> None:
        start_thread(thread)
        # It is stopped here, before it waits.
        clock.now += 60.0

    def note(latch: Latch, timeout_s: float) -> bool:
        waits.append(timeout_s)
        return wait(latch, timeout_s)

    monkeypatch.setattr("mpmm.sources.timeouts.time", clock)
    monkeypatch.setattr("mpmm.sources.timeouts.start_thread", start)
    monkeypatch.setattr(Latch, "wait", note)
    with pytest.raises(NoAnswerError, match=r"no answer within 0\.5 s"):
        answer_within(hang.wait, 0.5, "test")
    assert waits[-1] <= 0.0
