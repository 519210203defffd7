"""An exception at any bytecode of a join or a leave leaves nothing of the namespace; see `test_interrupt_points`."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import SMALL, files_in, segments_of, wait_until
from interrupt_points import HEALS_WITHIN_S, SMALL_TABLES, STEP, Interrupted, points_of, print_stacks

from mpmm.model_manager import ModelManager
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.lock_file import is_locked
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.snapshot import read_snapshot

# An exception in a finalizer, such as that of a lock file, does not reach the program; Python reports it as such.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def sweep_whole_life(
    step: int,
    operate: Callable[[ModelManager | None], ModelManager | None],
    begin: Callable[[], ModelManager | None] = lambda: None,
    stays: Callable[[], bool] = lambda: False,
    again: bool = True,
    has_left: Callable[[], bool] = lambda: True,
) -> int:
    """Try the points of an operation after which the namespace is left each time; return how many there were.

    begin: makes what `operate` is given. operate: returns what is to be shut down after it. again: shut down after it
    what `begin` has made, too. After each point another manager can come and go, and nothing is left behind but what
    `stays` says is another process's. has_left: becomes true before that.
    """
    root = Path(os.environ[RUNTIME_DIR_VARIABLE])
    failures: list[str] = []
    managers: list[ModelManager | None] = []
    points = 0

    def prepare() -> None:
        end()
        managers.append(begin())

    def run() -> None:
        managers.append(operate(managers[0]))

    def end() -> None:
        for manager in managers if again else managers[1:]:
            if manager is not None:
                manager.shutdown()
        managers.clear()

    for at, interruption in points_of(run, prepare, STEP or step, failures):
        with suppress(KeyboardInterrupt, Interrupted), interruption:
            run()
        interruption.forget()
        points += bool(interruption.where)
        end()
        # A manager that is dropped, or whose `__init__` was interrupted, is part of a cycle. It leaves once collected.
        gc.collect()
        try:
            wait_until(has_left, "the process has left by itself", HEALS_WITHIN_S)
            after = ModelManager(namespace="whole", capacities=SMALL_TABLES, **{**SMALL, "lock_timeout_seconds": 10.0})
            with after.model("a", lambda: "handle"):
                pass
            after.shutdown()
            wait_until(lambda: stays() or not (segments_of(root) or files_in(root)), "nothing is left", HEALS_WITHIN_S)
        except (Exception, AssertionError) as wrong:
            failures.append(f"{at} ({interruption.where}): {type(wrong).__name__}: {wrong}")
            print(failures[-1], segments_of(root), files_in(root), flush=True)
            print_stacks()
    assert not failures, "\n".join(failures)
    return points


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a lock that was left behind found out in two seconds, not in a minute."""
    monkeypatch.setattr("mpmm.shared_state.namespace.LIFECYCLE_TIMEOUT_S", 2.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("again", [True, False])
def test_shutdown(runtime_root: Path, again: bool) -> None:
    def begin() -> ModelManager:
        manager = ModelManager(namespace="whole", capacities=SMALL_TABLES, **SMALL)
        with manager.model("a", lambda: "handle"):
            pass
        return manager

    def operate(manager: ModelManager | None) -> None:
        assert manager is not None
        manager.shutdown()

    print(sweep_whole_life(89, operate, begin, again=again), "points")


def join(_: ModelManager | None = None) -> ModelManager:
    return ModelManager(namespace="whole", capacities=SMALL_TABLES, **SMALL)


@pytest.mark.usefixtures("impatient")
def test_manager_that_is_dropped(runtime_root: Path) -> None:
    dropped: list[ModelManager] = []

    def begin() -> None:
        # The background thread looks around at each poll.
        manager = ModelManager(namespace="whole", capacities=SMALL_TABLES, **SMALL, poll_interval=0.02)
        with manager.model("a", lambda: "handle"):
            pass
        # So that the collection below finds little but the manager.
        gc.collect()
        dropped.append(manager)

    def operate(_: ModelManager | None) -> None:
        dropped.clear()
        gc.collect()

    def is_removed() -> bool:
        return not segments_of(runtime_root) and not files_in(runtime_root)

    print(sweep_whole_life(17, operate, begin, has_left=is_removed), "points")


@pytest.mark.usefixtures("impatient")
def test_join_of_new_namespace(runtime_root: Path) -> None:
    def is_deserted() -> bool:
        # The next process that joins removes the files of an interrupted join.
        return not is_locked(runtime_root / "whole" / "alive.lock")

    print(sweep_whole_life(113, join, has_left=is_deserted), "points")


@pytest.mark.usefixtures("impatient")
def test_join_of_others(runtime_root: Path, new_process: Any) -> None:
    new_process(namespace="whole", capacities=SMALL_TABLES)

    def is_alone() -> bool:
        snapshot = read_snapshot("whole")
        return len(snapshot.members) == 1 and not check_invariants(snapshot)

    print(sweep_whole_life(97, join, stays=is_alone), "points")
