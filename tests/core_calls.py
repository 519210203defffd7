"""Call the compiled core in a lab as a process does, with notes of its own, and at a pretended time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from crash_lab import Lab

from mpmm.model_manager.operations import LoadedInstance, Operation
from mpmm.scheduling import CALLED_UP_FOR_NS
from mpmm.shared_state.core import TO_NEXT, make_core
from mpmm.shared_state.layout import Instance, Model
from mpmm.shared_state.segment import Segment
from mpmm.shared_state.transaction import CORE_TURN, CROWDED_TURNS, TransactionLock
from mpmm.shared_state.transitions import SMOOTHING

CoreCall = Callable[[Any, Any], object]
DEADLINE_NS = 2**62
# For as long as the core ever sleeps for the lock.
PATIENTLY_S = 60.0


def is_built() -> bool:
    """Tell whether the core could be compiled where the package was installed."""
    try:
        import mpmm.shared_state._core  # noqa: F401  # only to see whether it exists
    except ImportError:
        return False
    return True


# `pip install -e .` builds it where there is a compiler; a checkout that is only on the path has none.
built = pytest.mark.skipif(not is_built(), reason="the core is not built: python setup.py build_ext --inplace")


def pretend(now_ns: int, dies_at: int = 0, killed: bool = False) -> None:
    """Set the core's time, 0 for the true one; from store number `dies_at` on, the core makes none, 0 for all.

    killed: kill the process at that store instead.
    """
    from mpmm.shared_state._core import rehearse

    rehearse(dies_at, killed, now_ns)


class Caller:
    """Calls the core in a lab with a process's notes."""

    def __init__(self, lab: Lab, row: int) -> None:
        words, at = lab.words, lab.tables.instance(row)
        self.lab = lab
        self.row, self.generation = row, words[at + Instance.GENERATION]
        model = words[at + Instance.MODEL]
        self.hints = {lab.tables.tag_of(model): (model, words[lab.tables.model(model) + Model.GENERATION])}
        self.handles = {row: LoadedInstance(row, self.generation, "a", "h")}
        self.held: dict[tuple[int, int], Any] = {}
        self.held_at: dict[Any, tuple[int, int]] = {}
        self.taken_grants: set[tuple[int, int]] = set()
        self.operation = Operation(None)

    def take(self, place: Any, core: Any, reference: int = Lab.victim + 1, timeout_s: float = PATIENTLY_S) -> Any:
        notes: tuple[dict[Any, Any], ...] = (self.hints, self.handles, {}, {}, self.held, self.held_at)
        return core.take_idle(place, reference, *notes, "a", self.operation, 0, timeout_s)

    def release(
        self,
        place: Any,
        core: Any,
        reference: int = Lab.victim + 1,
        way: int = TO_NEXT,
        timeout_s: float = PATIENTLY_S,
    ) -> int:
        what = (self.row, self.generation, way, timeout_s)
        return int(core.release(place, reference, self.taken_grants, *what))

    def queue(self, place: Any, core: Any, reference: int = Lab.victim + 1, timeout_s: float = PATIENTLY_S) -> int:
        what = (DEADLINE_NS, 0, CALLED_UP_FOR_NS, timeout_s)
        return int(core.queue(place, reference, self.hints, "a", self.operation, *what))

    def take_granted(self, core: Any, ticket: int) -> Any:
        return core.take_granted(
            *(ticket, self.handles, {}, self.held, self.held_at, self.taken_grants, self.operation)
        )


def place_of(segment: Segment, pid: int = 0) -> tuple[Any, Any]:
    """Return a stand-in for a namespace with a lock of its own on the segment, and the core for it."""
    lock = TransactionLock(segment, 5.0)
    core = lock.core = make_core(segment, pid or os.getpid(), SMOOTHING, CORE_TURN, CROWDED_TURNS)
    assert core is not None
    return SimpleNamespace(_usable=True, lock=lock), core


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab("lab")
    yield lab
    lab.namespace.leave()
