"""What a thread that asks for an instance holds or loads itself: it must not wait for that, nor spoil its measurement.

Only `with` blocks and loaders count as held for certain, because they end in the thread that began them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpmm.errors import DeadlockError
from mpmm.memory.estimator import ALONE_SD
from mpmm.shared_state.layout import Instance

if TYPE_CHECKING:
    from mpmm.model_manager.queued_request import QueuedRequest
    from mpmm.model_manager.session import Session
    from mpmm.shared_state.transaction import Transaction

__all__ = ["end_isolation", "expect_no_deadlock", "expect_not_held", "expect_not_kept_quiet", "learn_alone"]


def end_isolation(session: Session, rows: Sequence[int]) -> None:
    """End the isolation of what the calling thread holds or loads, as it asks for something else; measure it first."""
    namespace = session.namespace
    for row in rows:
        if not (namespace.tables.header.isolated and namespace.transitions.isolation.runs_alone(row)):
            continue
        session.figures.sample()
        in_use = namespace.tables.instances[row].state == Instance.ACTIVE
        added = session.figures.added_mb(row) if in_use else None
        with namespace.transaction() as t:
            if namespace.transitions.isolation.runs_alone(row):
                if added is not None:
                    learn_alone(session, t, row, max(added) * len(added))
                namespace.transitions.isolation.end(t, row)
                session.scheduler.advance(t)


def learn_alone(session: Session, t: Transaction, row: int, cost_mb: float) -> None:
    """Record what the instance that runs alone has added to the memory in use, all its devices together."""
    namespace = session.namespace
    model = namespace.tables.instances[row].model
    namespace.transitions.estimates.estimate(t, model, cost_mb, measured=False, sd_mb=ALONE_SD * cost_mb)
    namespace.transitions.measurements.set_measured_mb(t, row, cost_mb)


def expect_no_deadlock(request: QueuedRequest[Any], held_rows: Sequence[int]) -> None:
    """Take a request out of the queue that waits for its own thread, which holds `held_rows`. Raises DeadlockError."""
    session, namespace = request.session, request.session.namespace
    tables = namespace.tables
    with namespace.transaction() as t:
        if not session.thread.waits_for_itself(request.row, list(held_rows)):
            return
        held = tuple(tables.tag_of(tables.instances[one].model) for one in held_rows)
        holds = map(tables.called, held)
        reason = session.scheduler.why(request.row)
        namespace.transitions.hand_over.leave_queue(t, request.row)
        session.scheduler.advance(t)
    raise DeadlockError(
        f"{request.called} {reason.partition(': ')[2]}; but this thread itself holds, or is loading, "
        f"{', '.join(holds)}: release that first, hold one copy for both uses, or make sure that both "
        "fit (max_model_copies, memory)",
        tag=request.name,
        held=held,
    )


def expect_not_held(session: Session, tag: str) -> None:
    """Raise DeadlockError if the calling thread holds, or loads, an instance of a model that it is to see unloaded."""
    tables = session.namespace.tables
    held_rows, _ = session.thread.rows()
    if any(tables.instances[row].model == tables.model_row(tag) for row in held_rows):
        raise DeadlockError(
            f"unload of {tables.called(tag)}: this thread itself holds, or is loading, a copy, which is unloaded when "
            "it is given back; pass timeout_seconds=0 not to wait for that",
            tag=tag,
            held=(tag,),
        )


def expect_not_kept_quiet(session: Session, tag: str, what: str) -> None:
    """Raise DeadlockError if what the calling thread loads keeps copies of a model from going, which it is to wait for.

    what: the name of the call.
    """
    namespace = session.namespace
    tables = namespace.tables
    held_rows, _ = session.thread.rows()
    steady = [copy for copy in (tables.instances[row] for row in held_rows) if copy.steady]
    model = tables.model_row(tag)
    if not steady or model is None:
        return
    bits = functools.reduce(operator.or_, (copy.device_bits for copy in steady))
    rows = tables.rows_where(namespace.segment.layout.instances, Instance.MODEL, model)
    if any(tables.instances[row].device_bits & bits for row in rows):
        held = tuple(tables.tag_of(copy.model) for copy in steady)
        raise DeadlockError(
            f"{what} of {tables.called(tag)}: this thread itself is loading {', '.join(map(tables.called, held))}, "
            "until which has started nothing is unloaded, or suspended, there; pass timeout_seconds=0 not to wait for "
            "that",
            tag=tag,
            held=held,
        )
