"""Rows about the processor time of processes that do nothing but wait or stay attached."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import psutil

from benchmarking.crew import Crew
from benchmarking.rows import MPMM, Figure, Measured, Row, Task
from benchmarking.shared import acquire_echo
from benchmarking.stage import Stage, attach, make_handle, modules, set_up, simulate_gpus

__all__ = ["ROWS"]

WAITERS, ATTACHED = 32, 16
# How long processes settle down before their time is measured.
SETTLE_S = 1.5
WATCH_S = 10.0
MODEL = "model"
# The clock of a process's processor time, see clock_getcpuclockid(3). /proc and psutil count in steps of 10 ms.
_CPUCLOCK_SCHED = 2


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process: all its threads, and the programs that it has run."""
    times = psutil.Process(pid).cpu_times()
    programs = float(times.children_user + times.children_system)
    if sys.platform == "linux":
        return programs + time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    return programs + float(times.user + times.system)


def share_of_a_core() -> float:
    """Watch this process and its descendants for WATCH_S; return what part of one processor they used together.

    Descendants count, because a waiting process may have others wait for it, such as a manager's server or a leader.
    """
    time.sleep(SETTLE_S)
    pids = [os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))]
    before, began = sum(map(cpu_seconds, pids)), time.monotonic()
    time.sleep(WATCH_S)
    return (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - began)


def waiting(task: Task) -> Measured:
    """Measure processes that wait in the queue for a copy that this process holds, without memory for another.

    Once with a manager that has nothing to poll, and once with one that polls a GPU.
    """
    stage = Stage(idle=(MODEL,), total_mb=1000.0, need_mb=800.0, used_mb=800.0)
    nothing_to_poll = _share_of_waiting(task, stage)
    simulate_gpus(task.folder, stage.total_mb).allocate(stage.used_mb)
    polling = _share_of_waiting(task, replace(stage, name="polling", polls_gpu=True))
    return {"nothing to poll": [nothing_to_poll], "polling a GPU": [polling]}


def _share_of_waiting(task: Task, stage: Stage) -> float:
    modules(task.implementation)

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = attach(task, stage)
        connection.send("about to wait")
        manager.release_model(MODEL, manager.acquire_model(MODEL, make_handle))
        connection.recv()

    with Crew(WAITERS, work) as crew:
        manager = set_up(task, stage)
        handle = manager.acquire_model(MODEL, make_handle)
        crew.tell("attach")
        crew.hear_all()
        share = share_of_a_core()
        manager.release_model(MODEL, handle)
    if task.is_mpmm:
        # Its background thread would count in the next stage. Beam's manager server polls nothing here.
        manager.shutdown()
    return share


def attached(task: Task) -> Measured:
    """Measure attached processes, one of which is the leader and polls the memory of a model server."""

    def work(number: int, connection: Connection) -> None:
        connection.recv()
        manager = attach(task, Stage(), memory_source="host", poll_interval=0.5)
        if number == 0:
            manager.release_model(MODEL, manager.acquire_model(MODEL, load))
        connection.send("attached")
        connection.recv()
        manager.shutdown()

    def load() -> str:
        acquire_echo(task, "served")
        return "served"

    with Crew(ATTACHED, work) as crew:
        for number in range(ATTACHED):
            crew.tell("attach", number)
            crew.hear(number)
        return {"": [share_of_a_core()]}


ROWS = (
    Row(
        "waiting-cpu",
        f"processor time of {WAITERS} processes waiting in the queue, and of the manager, {WATCH_S:.0f} s",
        (
            Figure("nothing to poll", "%", must=1, reach=0.25),
            Figure("polling a GPU", "%", must=1, reach=0.25),
        ),
        waiting,
        repeats_at_most=1,
    ),
    Row(
        "attached-cpu",
        f"processor time of {ATTACHED} idle processes, polling host memory every 0.5 s, and a server, {WATCH_S:.0f} s",
        (Figure("", "%", must=1, reach=0.3),),
        attached,
        implementations=(MPMM,),
        repeats_at_most=1,
    ),
)
