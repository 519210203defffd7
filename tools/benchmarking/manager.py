"""Rows about acquire_model and release_model.

Where a row uses several processes, the one that forks them sets the stage. With Beam it then hosts the manager, which
the others call; with mpmm it is just one more attached process.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from multiprocessing.connection import Connection

from benchmarking.crew import Crew, sleep_until
from benchmarking.rows import MPMM, Figure, Measured, Row, Task, percentile
from benchmarking.stage import Stage, attach, make_handle, modules, set_up, warm_pair_seconds

__all__ = ["ROWS"]

MODEL, OTHER, SLOW = "model", "other", "slow"
# How long in advance a common start is announced.
NOTICE_S = 0.2
IDLE_MODELS = 500
KNOWN_MODELS = 100
HAND_OVERS = 60
# The next holder says that it is about to acquire; after this long it does wait.
QUEUEING_S = {"after 2 ms": 0.002, "after 10 ms": 0.01}
LONG_LOAD_S = 3.0
LOADS, LOAD_S = 4, 2.0


def warm_pair(task: Task) -> Measured:
    """Measure pairs of acquire and release in one process."""
    manager = set_up(task, Stage(idle=(MODEL,)))
    seconds = warm_pair_seconds(manager, MODEL, 2000)
    return {"p50": seconds, "p99": [percentile(seconds, 0.99)]}


def async_pair(task: Task) -> Measured:
    """Measure the same in an event loop."""
    manager = set_up(task, Stage(idle=(MODEL,)))

    async def measure() -> list[float]:
        seconds = []
        for _ in range(2000):
            began = time.perf_counter()
            async with manager.model_async(MODEL, make_handle):
                pass
            seconds.append(time.perf_counter() - began)
        return seconds

    return {"": asyncio.run(measure())}


def among_idle(task: Task) -> Measured:
    """Compare pairs among many idle models with pairs of the only model."""
    alone = set_up(task, Stage(idle=(MODEL,), name="alone"))
    others = tuple(f"idle-{number}" for number in range(IDLE_MODELS))
    among = set_up(task, Stage(idle=(*others, MODEL), name="among"))
    count = 1000 if task.is_mpmm else 40
    base = statistics.median(warm_pair_seconds(alone, MODEL, 1000))
    return {"": [statistics.median(warm_pair_seconds(among, MODEL, count, warm_up=5)) / base]}


def release_among_known(task: Task) -> Measured:
    """Measure releases while many models are known to the estimator."""
    tag = "observed-0"
    manager = set_up(task, Stage(idle=(tag,), observed=KNOWN_MODELS))
    seconds = []
    for _ in range(300):
        handle = manager.acquire_model(tag, make_handle)
        began = time.perf_counter()
        manager.release_model(tag, handle)
        seconds.append(time.perf_counter() - began)
    return {"": seconds}


def hand_over(task: Task) -> Measured:
    """Measure from a release in one process to the return of the waiting acquire in another.

    There is memory for one copy, and the two processes take turns in holding it. The longer they sleep before that, the
    more of their data has left the processors' caches, and the deeper the processors sleep.
    """
    modules(task.implementation)
    stage = Stage(idle=(MODEL,), total_mb=1000.0, need_mb=800.0, used_mb=800.0)

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = attach(task, stage)
        while (order := connection.recv()) is not None:
            if order == "acquire":
                connection.send("about to")
                handle = manager.acquire_model(MODEL, make_handle)
                connection.send(time.monotonic())
            else:
                released = time.monotonic()
                manager.release_model(MODEL, handle)
                connection.send(released)

    measured: dict[str, list[float]] = {figure: [] for figure in QUEUEING_S}
    with Crew(2, work) as crew:
        set_up(task, stage)
        crew.tell("attach")
        crew.tell("acquire", 0)
        # It is about to acquire, and then it has.
        crew.hear(0)
        crew.hear(0)
        turn = 0
        for figure, queueing_s in QUEUEING_S.items():
            for _ in range(HAND_OVERS):
                holder, waiter = turn % 2, (turn + 1) % 2
                turn += 1
                crew.tell("acquire", waiter)
                crew.hear(waiter)
                time.sleep(queueing_s)
                crew.tell("release", holder)
                released = crew.hear(holder)
                measured[figure].append(crew.hear(waiter) - released)
    return measured


def beside_load(task: Task) -> Measured:
    """Find the worst pair of one model while another process loads another model."""
    modules(task.implementation)
    stage = Stage(idle=(OTHER,), known=(SLOW,))

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = attach(task, stage)
        connection.send("ready")
        connection.recv()
        manager.acquire_model(SLOW, _SlowLoader(LONG_LOAD_S))
        connection.send("loaded")
        connection.recv()

    with Crew(1, work) as crew:
        manager = set_up(task, stage)
        crew.tell("attach")
        crew.hear(0)
        crew.tell("load")
        worst = 0.0
        while not crew.has_spoken(0):
            worst = max(worst, *warm_pair_seconds(manager, OTHER, 2, warm_up=0))
        crew.hear(0)
    return {"": [worst]}


class _SlowLoader:
    """A loader that takes `seconds`; a class, because Beam pickles it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self) -> str:
        time.sleep(self._seconds)
        return make_handle()


def parallel_loads(task: Task) -> Measured:
    """Measure how long it takes until several processes have each loaded a model of their own."""
    modules(task.implementation)
    stage = Stage(known=tuple(f"model-{number}" for number in range(LOADS)))

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = attach(task, stage)
        connection.send("ready")
        sleep_until(connection.recv())
        manager.acquire_model(stage.known[number], _SlowLoader(LOAD_S))
        connection.send(time.monotonic())
        connection.recv()

    with Crew(LOADS, work) as crew:
        set_up(task, stage)
        crew.tell("attach")
        crew.hear_all()
        start = time.monotonic() + NOTICE_S
        crew.tell(start)
        ends = crew.hear_all()
    return {"": [max(ends) - start]}


ROWS = (
    Row(
        "warm-pair",
        "acquire and release of a model with an idle copy, one process",
        (Figure("p50", "µs", must=8, reach=4), Figure("p99", "µs")),
        warm_pair,
    ),
    Row(
        "async-pair",
        "`async with` of a model with an idle copy, one task",
        (Figure("", "µs", must=15, reach=8),),
        async_pair,
        implementations=(MPMM,),
    ),
    Row(
        "among-idle",
        f"warm pair with {IDLE_MODELS} other idle models, against none",
        (Figure("", "×", must=1.2, reach=1.05),),
        among_idle,
        repeats_at_most=2,
    ),
    Row(
        "release-known",
        f"release with {KNOWN_MODELS} models known, whose sizes NNLS estimates",
        (Figure("", "µs", must=30, reach=15),),
        release_among_known,
    ),
    Row(
        "hand-over",
        "from a release in one process to the return of the waiting acquire in another",
        tuple(Figure(name, "µs", must=150, reach=60) for name in QUEUEING_S),
        hand_over,
    ),
    Row(
        "beside-load",
        f"warm pair while another process loads another model for {LONG_LOAD_S:.0f} s, worst",
        (Figure("", "ms", must=5, reach=1, of_worst=True),),
        beside_load,
        repeats_at_most=2,
    ),
    Row(
        "parallel-loads",
        f"{LOADS} loads of {LOAD_S:.0f} s that fit together, {LOADS} processes, until the last one has its model",
        (Figure("", "s", must=2.6, reach=2.1),),
        parallel_loads,
        repeats_at_most=2,
    ),
)
