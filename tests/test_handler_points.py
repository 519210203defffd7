"""A signal handler or finalizer gives something back, or shuts down, at any bytecode of a manager's call of its thread.

As in `test_interrupt_points`, each operation runs again and again. Here, what interrupts it before its first, second,
... last bytecode does not raise, but calls the manager itself. `MPMM_INTERRUPT_STEP` and `MPMM_INTERRUPT_OFFSET` choose
the points in the same way.
"""

from __future__ import annotations

import gc
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import files_in, segments_of, wait_until
from interrupt_points import (
    ENOUGH_FAILURES,
    HEALS_WITHIN_S,
    OFFSET,
    SMALL_TABLES,
    STEP,
    Handler,
    Recording,
    Sweep,
)
from interrupt_points import sweep as sweep  # the fixture
from patience import Stopwatch

from mpmm.errors import ClosedError
from mpmm.model_manager import ModelManager

# What a finalizer or a thread raises does not reach the program; Python reports it.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


class Plain:
    """A model that is an object."""


def use(manager: ModelManager, tag: str = "a", loader: Callable[[], Any] = Plain) -> None:
    """Have a block."""
    with manager.model(tag, loader):
        pass


def lease(manager: ModelManager) -> None:
    """Have a lease."""
    with manager.reserve(10.0):
        pass


def wait_for_memory(manager: ModelManager) -> None:
    """Wait for the device in vain."""
    with manager.reserve(60.0), suppress(TimeoutError), manager.reserve(60.0, timeout_seconds=0.01):
        pass


class Lives:
    """Has a manager shut down by a handler at one point after another of an operation, from a new manager each time."""

    def __init__(self, root: Path, operation: Callable[[ModelManager], None], *, joins: bool, exits: bool) -> None:
        """joins: the operation joins the namespace first. exits: the handler ends the program after the shutdown."""
        self._root = root
        self._operation = operation
        self._joins = joins
        self._exits = exits
        self._manager: ModelManager | None = None

    def prepare(self) -> None:
        """Make the manager that is to be shut down."""
        made = ModelManager(namespace="whole", capacities=SMALL_TABLES, fallback_memory_mb=100.0, poll_interval=0.1)
        self._manager = pickle.loads(pickle.dumps(made)) if self._joins else made
        if self._joins:
            made.shutdown()
        else:
            use(made)

    def operate(self) -> None:
        """Do what is to be interrupted."""
        assert self._manager is not None
        self._operation(self._manager)

    def shut_down(self) -> None:
        """Do what the handler does."""
        assert self._manager is not None
        self._manager.shutdown()
        if self._exits:
            sys.exit()

    def end(self) -> None:
        """Forget the manager, and wait until nothing of it is left."""
        self._manager = None
        gc.collect()
        wait_until(lambda: not (segments_of(self._root) or files_in(self._root)), "nothing is left", HEALS_WITHIN_S)


@pytest.mark.parametrize("exits", [False, True], ids=["goes on", "exits"])
@pytest.mark.parametrize(
    ("operation", "joins", "step"),
    [
        pytest.param(use, False, 211, id="block"),
        pytest.param(lambda manager: use(manager, "b"), False, 709, id="load"),
        pytest.param(lease, False, 433, id="lease"),
        pytest.param(wait_for_memory, False, 997, id="wait"),
        pytest.param(use, True, 709, id="join"),
    ],
)
def test_a_handler_may_shut_down_at_any_point(
    runtime_root: Path, operation: Callable[[ModelManager], None], joins: bool, step: int, exits: bool
) -> None:
    lives, failures, points = Lives(runtime_root, operation, joins=joins, exits=exits), list[str](), 0
    recording = Recording()
    lives.prepare()
    with recording:
        lives.operate()
    lives.shut_down() if not exits else suppress_exit(lives.shut_down)
    lives.end()
    for at in range(1 + OFFSET % (STEP or step), recording.count + 1, STEP or step):
        lives.prepare()
        handler = Handler(*recording.point(at), lives.shut_down)
        try:
            with suppress(ClosedError, SystemExit), handler:
                lives.operate()
            if not handler.where:
                suppress_exit(lives.shut_down)
            assert handler.failure is None, f"the handler: {handler.failure!r}"
            handler.forget()
            lives.end()
        except Exception as error:
            failures.append(f"{at} ({handler.where}): {type(error).__name__}: {error}")
            print(failures[-1], flush=True)
            suppress_exit(lives.shut_down)
            if len(failures) >= ENOUGH_FAILURES:
                break
        points += 1
    print(points, "points")
    assert points
    assert not failures, "\n".join(failures)


def suppress_exit(act: Callable[[], None]) -> None:
    """Do what a handler does, outside of one."""
    with suppress(SystemExit):
        act()


class GivesBack:
    """Has a handler give something back at one point after another of an operation."""

    def __init__(self, one: Sweep, what: str) -> None:
        self._one = one
        self._what = what
        self._give_back: Callable[[], object] = int

    def prepare(self) -> None:
        """Take what the handler is to give back."""
        manager = self._one.manager
        if self._what == "copy":
            copy = manager.acquire_model("held", Plain)
            self._give_back = lambda: manager.release_model("held", copy)
        elif self._what == "lease":
            lease = manager.reserve(10.0)
            self._give_back = lease.release
        elif self._what == "pin":
            manager.pin("held")
            self._give_back = lambda: manager.unpin("held")
        elif self._what == "block":
            block = manager.model("held", Plain)
            block.__enter__()
            self._give_back = lambda: block.__exit__(None, None, None)
        else:
            garbage = [manager.reserve(10.0)]
            self._give_back = garbage.clear

    def __call__(self) -> None:
        """Give it back, once."""
        give_back, self._give_back = self._give_back, int
        give_back()

    def left_after_a_second(self) -> list[str]:
        """Return what is still held then."""
        watch = Stopwatch()
        while (left := self._left()) and watch.calm_s() < HEALS_WITHIN_S:
            time.sleep(0.001)
        return left

    def _left(self) -> list[str]:
        pins = [f"{model.tag} is pinned" for model in self._one.snapshot().models if model.pins]
        return self._one.left() + pins


@pytest.mark.parametrize("what", ["copy", "lease", "pin", "block", "garbage"])
@pytest.mark.parametrize(
    ("operation", "step"),
    [
        pytest.param(use, 53, id="block"),
        pytest.param(lambda manager: use(manager, "fails", fail), 397, id="failing load"),
        pytest.param(lease, 127, id="lease"),
    ],
)
def test_a_handler_may_give_something_back_at_any_point(
    sweep: Callable[..., Sweep], operation: Callable[[ModelManager], None], step: int, what: str
) -> None:
    one = sweep(1, fallback_memory_mb=1000.0)
    gives_back, failures, points = GivesBack(one, what), list[str](), 0
    recording = Recording()

    def operate() -> None:
        with suppress(LookupError):
            operation(one.manager)

    operate()
    gives_back.prepare()
    with recording:
        operate()
    gives_back()
    for at in range(1 + OFFSET % (STEP or step), recording.count + 1, STEP or step):
        gives_back.prepare()
        handler = Handler(*recording.point(at), gives_back)
        with handler:
            operate()
        # If the run was shorter than the recorded one.
        gives_back()
        points += 1
        handler.forget()
        wrong = [] if handler.failure is None else [f"the handler: {handler.failure!r}"]
        if wrong := wrong + gives_back.left_after_a_second():
            failures.append(f"{at} ({handler.where}): {wrong}")
            print(failures[-1], flush=True)
            if len(failures) >= ENOUGH_FAILURES:
                break
    print(points, "points")
    assert points
    assert not failures, "\n".join(failures)


def fail() -> Any:
    """Load nothing."""
    raise LookupError("no such model")
