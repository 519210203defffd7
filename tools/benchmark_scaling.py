"""Rows about what a warm pair costs among more and more models, copies, members and waiters. mpmm only.

models: each other tag has one idle copy.
copies: all are idle copies of the tag that is acquired.
members: processes that are attached and idle. Each is a real one, forked, so that what its own background thread
    costs the machine counts as well; therefore not more than 200.
waiters: threads of one other process, each in the queue for a copy that a further thread of that process keeps. Their
    model is said to be larger than the device after it was loaded, so that nobody is evicted for them, and
    `max_overtake_seconds` is set so high that they never hold up others.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from benchmark_crew import Crew
from benchmark_rows import MPMM, Figure, Measured, Row, Task
from benchmark_stage import Stage, attach, make_handle, modules, set_up, warm_pair_seconds

__all__ = ["ROWS"]

SIZES = (10, 100, 1000)
MEMBERS = (10, 50, 200)
MODEL, BUSY = "model", "busy"
PAIRS = 500
TOTAL_MB = 1e6
JOINING_TIMEOUT_S = 60.0


def models(task: Task, size: int) -> float:
    """Return the median seconds of a pair among `size` models."""
    others = tuple(f"idle-{number}" for number in range(size - 1))
    manager = set_up(task, Stage(idle=(*others, MODEL), name=f"models-{size}"))
    return statistics.median(warm_pair_seconds(manager, MODEL, PAIRS))


def copies(task: Task, size: int) -> float:
    """Return the median seconds of a pair with `size` idle copies."""
    manager = set_up(task, Stage(idle=(MODEL,) * size, name=f"copies-{size}"))
    return statistics.median(warm_pair_seconds(manager, MODEL, PAIRS))


def members(task: Task, size: int) -> float:
    """Return the median seconds of a pair in a process beside others, `size` in all."""
    modules(task.implementation)
    stage = Stage(idle=(MODEL,), name=f"members-{size}")

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = attach(task, stage)
        connection.send("attached")
        connection.recv()
        manager.shutdown()

    with Crew(size - 1, work) as crew:
        manager = set_up(task, stage)
        crew.tell("attach")
        crew.hear_all()
        median = statistics.median(warm_pair_seconds(manager, MODEL, PAIRS))
    manager.shutdown()
    return median


def waiters(task: Task, size: int) -> float:
    """Return the median seconds of a pair while `size` threads of another process wait for another model."""
    modules(task.implementation)
    stage = Stage(idle=(MODEL,), total_mb=TOTAL_MB, name=f"waiters-{size}")

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = attach(task, stage, max_overtake_seconds=1e6)
        held = manager.acquire_model(BUSY, make_handle)
        manager._estimator.set_initial_estimate(BUSY, 2 * TOTAL_MB)

        def wait() -> None:
            manager.release_model(BUSY, manager.acquire_model(BUSY, make_handle))

        threads = [threading.Thread(target=wait) for _ in range(size)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + JOINING_TIMEOUT_S
        while len(manager.tickets()) < size and time.monotonic() < deadline:
            time.sleep(0.05)
        connection.send(len(manager.tickets()))
        connection.recv()
        manager.release_model(BUSY, held)
        for thread in threads:
            thread.join()
        manager.shutdown()

    with Crew(1, work) as crew:
        manager = set_up(task, stage, max_overtake_seconds=1e6)
        crew.tell("wait")
        if (waiting := crew.hear(0)) < size:
            raise RuntimeError(f"only {waiting} of {size} threads were in the queue after {JOINING_TIMEOUT_S:.0f} s")
        return statistics.median(warm_pair_seconds(manager, MODEL, PAIRS))


def _row(what: str, sizes: Sequence[int], cost: Callable[[Task, int], float]) -> Row:
    """Make the row that measures `cost` at each size, the smallest first."""

    def measure(task: Task) -> Measured:
        seconds = {size: cost(task, size) for size in sizes}
        measured = {f"{size}": [value] for size, value in seconds.items()}
        return {**measured, growth: [seconds[sizes[-1]] / seconds[sizes[0]]]}

    growth = f"{sizes[-1]} : {sizes[0]}"
    figures = (*(Figure(f"{size}", "µs") for size in sizes), Figure(growth, "×"))
    return Row(
        f"scaling-{what}",
        f"warm pair among so many {what}",
        figures,
        measure,
        implementations=(MPMM,),
        repeats_at_most=1,
    )


ROWS = (
    _row("models", SIZES, models),
    _row("copies", SIZES, copies),
    _row("members", MEMBERS, members),
    _row("waiters", SIZES, waiters),
)
