"""Rows about the memory source and the leader that polls it, on simulated GPUs (see `simulated_gpu`)."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarking.crew import Crew
from benchmarking.rows import MPMM, Figure, Measured, Row, Task
from benchmarking.stage import simulate_gpus
from mpmm import ModelManager
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources.nvml import NvmlSource

__all__ = ["ROWS"]

NAMESPACE = "devices"
GPUS, PROCESSES = 8, 4
POLLS = 200
KILLS, MEMBERS = 20, 6
POLL_INTERVAL_S = 0.5
# How often the row looks at the age of the last sample, and when it gives up.
LOOK_S, DEADLINE_S = 0.002, 20.0


def poll(task: Task) -> Measured:
    """Measure the processor time of a poll per device, including that of the simulated driver."""
    gpus = simulate_gpus(task.folder, *[16384.0] * GPUS)

    def work(number: int, connection: Connection) -> None:
        for device in range(GPUS):
            gpus.allocate(1000.0, device)
        connection.send("allocated")
        connection.recv()

    with Crew(PROCESSES, work) as crew:
        crew.hear_all()
        source = NvmlSource()
        sampled = cpu_seconds_per_device(lambda: source.sample(()))
        # So rarely that the background thread does not poll meanwhile.
        manager = ModelManager(namespace=NAMESPACE, memory_source="nvml", poll_interval=3600.0)
        worker: Any = manager._connected()
        published = cpu_seconds_per_device(worker.figures.sample_source)
        manager.shutdown()
        source.close()
    return {"sample": sampled, "and published": published}


def cpu_seconds_per_device(action: Any) -> list[float]:
    """Return this thread's processor time in each of POLLS calls, per device."""
    seconds = []
    for _ in range(POLLS):
        began = time.thread_time()
        action()
        seconds.append((time.thread_time() - began) / GPUS)
    return seconds


def leaders_killed(task: Task) -> Measured:
    """Kill one leader after another; measure the longest time without a sample after each."""
    simulate_gpus(task.folder, 16384.0)
    moments = task.random()

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = ModelManager(namespace=NAMESPACE, memory_source="nvml", poll_interval=POLL_INTERVAL_S)
        manager.all_models()
        connection.send("attached")
        connection.recv()
        manager.shutdown()

    gaps = []
    with Crew(MEMBERS + KILLS, work) as crew:
        for number in range(MEMBERS + KILLS):
            if number >= MEMBERS:
                time.sleep(moments.uniform(0.0, POLL_INTERVAL_S))
                gaps.append(gap_after_kill())
            # Only now, because a process that attaches becomes leader at once if there is none.
            crew.tell("attach", number)
            crew.hear(number)
    return {"": gaps}


def gap_after_kill() -> float:
    """Kill the leader, and return the age of its last sample when the next leader's first one arrives."""
    snapshot = read_snapshot(NAMESPACE, events=False)
    leader = next(member.pid for member in snapshot.members if member.slot == snapshot.leader)
    os.kill(leader, signal.SIGKILL)
    killed = time.monotonic()
    oldest = 0.0
    while time.monotonic() - killed < DEADLINE_S:
        age = read_snapshot(NAMESPACE, events=False).devices[0].sample_age_s
        if age is not None:
            if age < oldest and age < time.monotonic() - killed:
                return oldest
            oldest = max(oldest, age)
        time.sleep(LOOK_S)
    raise TimeoutError(f"no sample within {DEADLINE_S:.0f} s of the leader's end")


ROWS = (
    Row(
        "poll-nvml",
        f"processor time per device of a poll by NVML; {GPUS} simulated devices with {PROCESSES} processes on each",
        (Figure("sample", "ms", must=0.3, reach=0.1), Figure("and published", "ms", must=0.3, reach=0.1)),
        poll,
        implementations=(MPMM,),
    ),
    Row(
        "leader-killed",
        f"longest time without a sample, {KILLS} leaders killed one after another, {MEMBERS} members, a poll every "
        f"{POLL_INTERVAL_S} s",
        (Figure("", "s", must=1.0 + POLL_INTERVAL_S, reach=2 * POLL_INTERVAL_S, of_worst=True),),
        leaders_killed,
        implementations=(MPMM,),
        repeats_at_most=1,
    ),
)
