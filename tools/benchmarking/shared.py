"""Rows about MultiProcessShared: access to a shared object, calls, arrays there and back, starts of model servers."""

from __future__ import annotations

import functools
import itertools
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarking.crew import Crew
from benchmarking.rows import Figure, Measured, Row, Task
from benchmarking.stage import modules, timed

__all__ = ["ROWS"]

TAG = "echo"
FORKED_PROCESSES, STARTED_PROCESSES, LATER_ACQUIRES = 6, 3, 3
SMALL_BYTES = 320
BIG_BYTES = 64_000_000
BATCH, BATCH_ITEM_BYTES = 32, 600_000


class Echo:
    """The shared object."""

    def echo(self, value: Any) -> Any:
        """Return the argument."""
        return value


def acquire_echo(task: Task, tag: str = TAG) -> Any:
    """Return a proxy of an `Echo` in a model server, which is started if there is none."""
    _, shared = modules(task.implementation)
    return shared.MultiProcessShared(
        Echo, tag=tag, path=str(task.folder), always_proxy=True, spawn_process=True
    ).acquire()


def acquire_live(task: Task) -> Measured:
    """Measure acquire() of a tag with a server, in processes that have never used it, and then again in these.

    A forked process copies its parent's memory page by page as it touches it; a spawned one, like Beam's workers,
    runs all code for the first time.
    """
    modules(task.implementation)

    def serve(number: int, connection: Connection) -> None:
        # Kept until the end.
        proxy = acquire_echo(task)
        connection.send(proxy.echo("ready"))
        connection.recv()

    measured: dict[str, list[float]] = {"first, forked": [], "first, started": [], "later": []}
    with Crew(1, serve) as server:
        server.hear(0)
        for figure, start_method, processes in (
            ("first, forked", "fork", FORKED_PROCESSES),
            ("first, started", "spawn", STARTED_PROCESSES),
        ):
            for _ in range(processes):
                with Crew(1, functools.partial(_come, task), start_method) as newcomer:
                    seconds = newcomer.hear(0)
                measured[figure].append(seconds[0])
                measured["later"] += seconds[1:]
    return measured


def _come(task: Task, number: int, connection: Connection) -> None:
    """Run as a process that has not used the tag yet."""
    modules(task.implementation)
    connection.send(timed(lambda: acquire_echo(task), 1 + LATER_ACQUIRES, warm_up=0))
    connection.recv()


def small_call(task: Task) -> Measured:
    """Measure a method call with a small array."""
    proxy = acquire_echo(task)
    numbers = np.zeros(SMALL_BYTES // 8)
    return {"": timed(lambda: proxy.echo(numbers), 1500)}


def big_echo(task: Task) -> Measured:
    """Measure a big array there and back."""
    proxy = acquire_echo(task)
    numbers = np.random.default_rng(task.seed).random(BIG_BYTES // 8)
    return {"": _echo_seconds(proxy, numbers, 6)}


def batch_echo(task: Task) -> Measured:
    """Measure a batch of arrays of image size there and back."""
    proxy = acquire_echo(task)
    generator = np.random.default_rng(task.seed)
    batch = [generator.integers(0, 256, BATCH_ITEM_BYTES, dtype=np.uint8) for _ in range(BATCH)]
    return {"": _echo_seconds(proxy, batch, 10)}


def _echo_seconds(proxy: Any, value: Any, count: int) -> list[float]:
    """Time `count` echoes, after two that are compared. Raises ValueError if an echo differs."""
    for _ in range(2):
        if not np.array_equal(proxy.echo(value), value):
            raise ValueError("the echo differs from what was sent")
    return timed(lambda: proxy.echo(value), count, warm_up=0)


def server_start(task: Task) -> Measured:
    """Measure from acquire() of a new tag until its server has answered."""
    numbers = itertools.count()
    proxies = []

    def start() -> None:
        proxies.append(acquire_echo(task, f"server-{next(numbers)}"))

    seconds = timed(start, 3, warm_up=1)
    return {"": seconds}


ROWS = (
    Row(
        "acquire-live",
        "MultiProcessShared.acquire() of a tag that has a server",
        (
            Figure("first, forked", "ms", must=2, reach=0.5),
            Figure("first, started", "ms", must=2, reach=0.5),
            Figure("later", "µs", must=100, reach=30),
        ),
        acquire_live,
        repeats_at_most=2,
    ),
    Row(
        "small-call",
        f"method call with an array of {SMALL_BYTES} bytes, there and back",
        (Figure("", "µs", must=60, reach=35),),
        small_call,
    ),
    Row(
        "big-echo",
        f"an array of {BIG_BYTES // 1_000_000} MB there and back",
        (Figure("", "ms", must=60, reach=25),),
        big_echo,
    ),
    Row(
        "batch-echo",
        f"a batch of {BATCH} arrays of {BATCH_ITEM_BYTES // 1000} kB there and back",
        (Figure("", "ms", must=5, reach=10, against_beam=True),),
        batch_echo,
    ),
    Row(
        "server-start",
        "start of a model server with a trivial model, after the first",
        (Figure("", "s", must=0.4, reach=0.1),),
        server_start,
        repeats_at_most=2,
    ),
)
