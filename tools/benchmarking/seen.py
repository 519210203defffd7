"""Rows about observation: how long `mpmm inspect` takes in a crowded namespace, and what events cost. mpmm only.

One process makes the crowd, below the manager: rows of members whose lock files it holds, copies in every state, and
waiters, each with a reason.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarking.rows import MPMM, Figure, Measured, Row, Task
from benchmarking.stage import Stage, make_handle, set_up

__all__ = ["ROWS"]

MEMBERS, MODELS, INSTANCES, WAITERS = 500, 200, 1000, 2000
NAMESPACE = "crowd"
INSPECTIONS = 15
MODEL = "model"
# In turns, so that other load on the machine affects both alike.
ROUNDS, PAIRS = 60, 100


@contextmanager
def crowded(root: Path) -> Iterator[str]:
    """Make a namespace with MEMBERS, MODELS, INSTANCES and WAITERS; leave it in the end."""
    from mpmm.policy.view import Reason
    from mpmm.shared_state.events import Cause
    from mpmm.shared_state.layout import Member
    from mpmm.shared_state.lock_file import LockFile
    from mpmm.shared_state.namespace import Namespace

    namespace = Namespace.join(NAMESPACE, root=root)
    transitions, locks = namespace.transitions, []
    with namespace.transaction() as t:
        transitions.devices.describe(t, [(b"GPU-0", b"a device", 1e6)])
        transitions.members.lead(t, 0, b"booked", (False, False, True))
    for slot in range(1, MEMBERS):
        locks.append(LockFile(Path(namespace.member_lock_path(slot))))
        assert locks[-1].try_exclusive()
        with namespace.transaction() as t:
            transitions.members.join(t, slot, Member.WORKER, 100_000 + slot, time.time_ns(), b"worker.py")
    models = []
    for number in range(MODELS):
        tag = f"model-{number}"
        with namespace.transaction() as t:
            models.append(transitions.models.claim(t, tag, tag.encode()))
    for number in range(INSTANCES):
        with namespace.transaction() as t:
            row = transitions.loads.begin(t, models[number % MODELS], number % MEMBERS, 1, 100.0, alone=False)
            if number % 20:
                transitions.loads.end(t, row, b"handle", 100.0, 0, False)
            if number % 3 == 0 and number % 20:
                transitions.holds.release(t, row)
    for number in range(WAITERS):
        with namespace.transaction() as t:
            row = transitions.tickets.enqueue(t, models[number % MODELS], number % MEMBERS, 1, 100.0, 2**63)
            transitions.tickets.set_reason(t, row, Cause(Reason.IN_USE, 100.0, 40.0, 60.0, math.inf, models[0] + 1))
    try:
        yield NAMESPACE
    finally:
        for lock in locks:
            lock.close()
        namespace.leave()


def inspect(task: Task) -> Measured:
    """Measure `mpmm inspect` as a program, without the time in which the interpreter starts and ends."""
    root = Path(os.environ["MPMM_RUNTIME_DIR"])
    # Compiled as an installed package is, whatever the environment says.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(task.folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with crowded(root) as namespace:
        _seconds(["-m", "mpmm.cli", "inspect", "--json", namespace], environment)
        times: dict[str, list[float]] = {"text": [], "json": []}
        for _ in range(INSPECTIONS):
            start = _seconds(["-c", "pass"], environment)
            times["text"].append(_seconds(["-m", "mpmm.cli", "inspect", namespace], environment) - start)
            times["json"].append(_seconds(["-m", "mpmm.cli", "inspect", "--json", namespace], environment) - start)
        return {**times, "copy": _copies(namespace, root)}


def _seconds(arguments: Sequence[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - began


def _copies(namespace: str, root: Path) -> list[float]:
    """Return the seconds that copying takes, the only thing ever done under the lock."""
    from mpmm.shared_state.segment import Segment, segment_name

    segment = Segment.open(segment_name(root, namespace))
    assert segment is not None
    copied = segment.copy_in_use()
    seconds = []
    for _ in range(50):
        began = time.perf_counter()
        segment.copy_in_use(into=copied)
        seconds.append(time.perf_counter() - began)
    segment.close()
    return seconds


def events(task: Task) -> Measured:
    """Compare acquires and pairs with those made while no events are written."""
    from mpmm.shared_state.core import CORE_VARIABLE
    from mpmm.shared_state.layout import Header
    from mpmm.shared_state.transaction import Transaction

    # The events that the compiled core writes cannot be left out.
    os.environ[CORE_VARIABLE] = "python"
    manager = set_up(task, Stage(idle=(MODEL,)))
    write, append = Transaction.next_event, Transaction.event

    def write_nothing(self: Transaction, *_: object, **__: object) -> tuple[int, int]:
        return Header.EVENTS, self.words[Header.EVENTS]

    def append_nothing(self: Transaction, *_: object, **__: object) -> None:
        pass

    seconds: dict[bool, list[float]] = {True: [], False: []}
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * ROUNDS):
        writes = turn % 2 == 0
        Transaction.next_event = write if writes else write_nothing  # type: ignore[method-assign]  # for the comparison
        Transaction.event = append if writes else append_nothing  # type: ignore[method-assign]  # likewise
        for _ in range(PAIRS):
            began = time.perf_counter()
            handle = manager.acquire_model(MODEL, make_handle)
            acquired = time.perf_counter()
            manager.release_model(MODEL, handle)
            seconds[writes].append(acquired - began)
            pairs[writes].append(time.perf_counter() - began)
    return {
        name: [statistics.median(taken[True]) - statistics.median(taken[False])]
        for name, taken in (("acquire", seconds), ("pair", pairs))
    }


ROWS = (
    Row(
        "inspect",
        f"`mpmm inspect` with {INSTANCES} copies, {MEMBERS} members, {WAITERS} waiters, beyond the interpreter's start",
        (
            Figure("text", "ms", must=100, reach=50),
            Figure("json", "ms"),
            Figure("copy", "ms", must=2, reach=1, of_worst=True),
        ),
        inspect,
        implementations=(MPMM,),
        repeats_at_most=1,
    ),
    Row(
        "events",
        "what the ring of events costs: an acquire, and a pair of acquire and release",
        (Figure("acquire", "µs", must=2, reach=1), Figure("pair", "µs")),
        events,
        implementations=(MPMM,),
    ),
)
