"""Rows about the cost of a warm pair among more and more models, copies, members and waiters. mpmm only.

models: each other tag has one idle copy.
copies: all are idle copies of the tag that is acquired.
members: rows of the members table whose lock is held. A thousand processes would take long to start and end, and need
    5 GB; so a few processes join a hundred times each, below the manager and without its background thread. The row
    `attached-cpu` measures what that thread costs.
waiters: threads of one other process, each in the queue for a copy that another thread of that process keeps. After
    the load, their model's estimate is set above the device's size, so that no model is evicted for them, and
    `max_overtake_seconds` is set so high that they never hold up others.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from benchmarking.crew import Crew
from benchmarking.rows import MPMM, Figure, Measured, Row, Task
from benchmarking.stage import Stage, attach, make_handle, modules, set_up, warm_pair_seconds

__all__ = ["ROWS"]

SIZES = (10, 100, 1000)
JOINS_OF_A_PROCESS = 100
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
    """Return the median seconds of a pair in a namespace with `size` members."""
    modules(task.implementation)
    stage = Stage(idle=(MODEL,), name=f"members-{size}")

    def work(number: int, connection: Connection) -> None:
        from mpmm.shared_state.namespace import Namespace

        name, root = connection.recv()
        joins = min(JOINS_OF_A_PROCESS, size - 1 - number * JOINS_OF_A_PROCESS)
        joined = [Namespace.join(name, root=root, must_exist=True) for _ in range(joins)]
        connection.send(len(joined))
        connection.recv()
        for namespace in joined:
            namespace.leave()

    with Crew(-(-(size - 1) // JOINS_OF_A_PROCESS), work) as crew:
        manager = set_up(task, stage)
        namespace = manager._connected().namespace
        for number in range(len(crew.pids)):
            crew.tell((namespace.name, namespace.runtime.root), number)
            crew.hear(number)
        return statistics.median(warm_pair_seconds(manager, MODEL, PAIRS))


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
        return {**measured, growth: [seconds[most] / seconds[few]]}

    few, most = SIZES[0], SIZES[-1]
    growth = f"{most} : {few}"
    figures = (*(Figure(f"{size}", "µs", size=size) for size in sizes), Figure(growth, "×"))
    return Row(
        f"scaling-{what}",
        f"warm pair among that number of {what}",
        figures,
        measure,
        implementations=(MPMM,),
        repeats_at_most=1,
    )


ROWS = (
    _row("models", SIZES, models),
    _row("copies", SIZES, copies),
    _row("members", SIZES, members),
    _row("waiters", (0, *SIZES), waiters),
)
