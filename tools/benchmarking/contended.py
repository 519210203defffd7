"""Rows about processes that want the same copy: how often they use it in all, how long each waits, how fast it wakes.

If the copy is held for no time, the rows measure the hand-over; if it is held for 2 or 10 ms, how long it lies idle
between two holders. A waiter that has slept for 150 ms is compared with a bare futex that wakes the same processes,
because the processor itself is slow for a moment after such a sleep.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from benchmarking.crew import Crew, sleep_until
from benchmarking.rows import MPMM, Figure, Measured, Row, Task, percentile
from benchmarking.stage import Stage, attach, make_handle, modules, set_up, warm_pair_seconds

__all__ = ["ROWS"]

MODEL = "model"
CROWD = 16
CROWD_S = 2.0
# How long in advance a common start is announced.
NOTICE_S = 0.2
WAKES = 20
ASLEEP_S = 0.15
# Memory for one copy.
ONE_COPY = Stage(idle=(MODEL,), total_mb=1000.0, need_mb=800.0, used_mb=800.0)


def together(task: Task, stage: Stage, count: int, hold_s: float = 0.0) -> Measured:
    """Let `count` processes acquire and release the model over and over, for a fixed time.

    Return the total pairs per second, and the 99th percentile of the seconds per acquire.
    """
    modules(task.implementation)

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = attach(task, stage)
        warm_pair_seconds(manager, MODEL, 1)
        connection.send("ready")
        start = connection.recv()
        seconds = array.array("d")
        sleep_until(start)
        end = start + CROWD_S
        began = time.monotonic()
        while began < end:
            handle = manager.acquire_model(MODEL, make_handle)
            seconds.append(time.monotonic() - began)
            if hold_s:
                time.sleep(hold_s)
            manager.release_model(MODEL, handle)
            began = time.monotonic()
        connection.send((len(seconds) / (began - start), seconds))
        connection.recv()

    with Crew(count, work) as crew:
        set_up(task, stage)
        crew.tell("attach")
        crew.hear_all()
        crew.tell(time.monotonic() + NOTICE_S)
        answers = crew.hear_all()
    pooled = [second for _, seconds in answers for second in seconds]
    return {"in all": [sum(rate for rate, _ in answers)], "p99": [percentile(pooled, 0.99)]}


def crowd(task: Task) -> Measured:
    """Measure many processes, each with a copy of its own."""
    return together(task, Stage(idle=(MODEL,) * CROWD), CROWD)


def contended(count: int, hold_s: float = 0.0) -> Callable[[Task], Measured]:
    """Return the measurement of `count` processes that share one copy."""
    return lambda task: together(task, ONE_COPY, count, hold_s)


class Word:
    """A futex word that forked processes share."""

    def __init__(self) -> None:
        # Kept alive, because the word lies in it.
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._word = ctypes.c_uint64.from_buffer(self._memory)

    def wait(self, seen: int) -> None:
        """Sleep until the word is no longer `seen`."""
        from mpmm.shared_state.futex import wait_for_change

        while self._word.value == seen:
            wait_for_change(lambda: self._word.value, ctypes.addressof(self._word), seen, 1.0)

    def set(self, value: int) -> None:
        """Change the word and wake all waiters."""
        from mpmm.shared_state.futex import wake_all

        self._word.value = value
        wake_all(ctypes.addressof(self._word))


def wake(task: Task) -> Measured:
    """Measure from a release to the return of the waiting acquire, and a bare futex, each after the waiter slept."""
    modules(task.implementation)
    word = Word()

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = attach(task, ONE_COPY)
        while (order := connection.recv()) is not None:
            if order[0] == "acquire":
                handle = manager.acquire_model(MODEL, make_handle)
                connection.send(time.monotonic())
                manager.release_model(MODEL, handle)
            else:
                word.wait(order[1])
                connection.send(time.monotonic())

    woken: list[float] = []
    bare: list[float] = []
    with Crew(1, work) as crew:
        manager = set_up(task, ONE_COPY)
        crew.tell("attach")
        for turn in range(WAKES):
            handle = manager.acquire_model(MODEL, make_handle)
            crew.tell(("acquire", 0))
            time.sleep(ASLEEP_S)
            began = time.monotonic()
            manager.release_model(MODEL, handle)
            woken.append(crew.hear(0) - began)
            crew.tell(("wait", turn))
            time.sleep(ASLEEP_S)
            began = time.monotonic()
            word.set(turn + 1)
            bare.append(crew.hear(0) - began)
    return {"acquire": woken, "bare futex": bare}


def _contended_row(count: int, hold_s: float, figures: tuple[Figure, ...]) -> Row:
    held = f", held for {1000 * hold_s:.0f} ms" if hold_s else ""
    return Row(
        f"contended-{count}" + (f"-{1000 * hold_s:.0f}ms" if hold_s else ""),
        f"acquire and release in {count} processes on one copy{held}, {CROWD_S:.0f} s",
        figures,
        contended(count, hold_s),
        repeats_at_most=3 if count <= CROWD else 1,
    )


def _figures(must: float | None, reach: float | None, p99_ms: float | None = None) -> tuple[Figure, Figure]:
    return (
        Figure("in all", "pairs/s", must=must, reach=reach, more_is_better=True),
        Figure("p99", "ms", must=p99_ms),
    )


ROWS = (
    Row(
        "crowd",
        f"acquire and release in {CROWD} processes on one model, one copy per process, {CROWD_S:.0f} s",
        (
            Figure("in all", "pairs/s", must=80_000, reach=150_000, more_is_better=True),
            Figure("p99", "ms", must=2, reach=1),
        ),
        crowd,
    ),
    _contended_row(2, 0.0, _figures(None, None)),
    _contended_row(4, 0.0, _figures(10_000, 80_000)),
    _contended_row(16, 0.0, _figures(10_000, 80_000, 15)),
    _contended_row(64, 0.0, _figures(None, None)),
    _contended_row(4, 0.002, _figures(440, 460)),
    _contended_row(16, 0.002, _figures(430, 460)),
    _contended_row(4, 0.01, _figures(None, None)),
    _contended_row(16, 0.01, _figures(None, None)),
    Row(
        "wake",
        f"from release to the return of an acquire that slept for {1000 * ASLEEP_S:.0f} ms, and a bare futex",
        (Figure("acquire", "ms"), Figure("bare futex", "ms")),
        wake,
        implementations=(MPMM,),
        repeats_at_most=1,
    ),
)
