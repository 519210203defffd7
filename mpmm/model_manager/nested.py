"""A thread that asks for an instance must not wait for one that it holds or loads itself, nor spoil its measurement.

Only `with` blocks and loaders count as held for certain, because they end in the thread that began them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
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
    """End the isolation of what the calling thread holds or loads, because it asks for more; measure it first."""
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
    """Record what the instance that runs alone has added to the memory in use, on all its devices together."""
    namespace = session.namespace
    model = namespace.tables.instances[row].model
    namespace.transitions.estimates.estimate(t, model, cost_mb, measured=False, sd_mb=ALONE_SD * cost_mb)
    namespace.transitions.measurements.set_measured_mb(t, row, cost_mb)


def expect_no_deadlock(request: QueuedRequest[Any], firm: Sequence[int]) -> None:
    """Raise DeadlockError if a request waits for its own thread, after taking it out of the queue.

    firm: the rows that the thread holds or loads, see `ThreadHolds.rows`.
    """
    session, namespace = request.session, request.session.namespace
    session.thread.let_others_pass()
    quiet = session.thread.quiet(firm)
    if not (firm or quiet):
        return
    with namespace.transaction() as t:
        if not session.thread.waits_for_itself(request.row, list(firm)):
            return
        held, holds = _named(session, dict.fromkeys((*firm, *quiet)))
        reason = session.scheduler.why(request.row)
        namespace.transitions.hand_over.leave_queue(t, request.row)
        session.scheduler.advance(t)
    raise DeadlockError(
        f"{request.called} {reason.partition(': ')[2]}; but this thread itself holds, or is loading, {holds}: release "
        "that, or settle a lease, first, hold one copy for both uses, or make sure that both fit "
        "(max_model_copies, memory)",
        tag=request.name,
        held=held,
    )


def _named(session: Session, rows: Iterable[int]) -> tuple[tuple[str, ...], str]:
    """Return the tags (or lease names) of rows, and a text that names them all for an error."""
    tables, held, called = session.namespace.tables, [], []
    for row in rows:
        instance = tables.instances[row]
        held.append(tables.tag_of(instance.model))
        called.append(f"{'lease ' * (instance.state == Instance.LEASED)}{tables.called(held[-1])}")
    return tuple(held), ", ".join(called)


def expect_not_held(session: Session, tag: str) -> None:
    """Raise DeadlockError if the calling thread waits for an unload of a model that it holds, or loads, itself."""
    tables = session.namespace.tables
    held_rows, _ = session.thread.rows()
    if any(tables.instances[row].model == tables.model_row(tag) for row in held_rows):
        raise DeadlockError(
            f"unload of {tables.called(tag)}: this thread itself holds, or is loading, a copy, which is unloaded when "
            "it is given back; pass timeout_seconds=0 not to wait for that",
            tag=tag,
            held=(tag,),
        )


def expect_not_kept_quiet(session: Session, tag: str, what: str, rows: Iterable[int] | None = None) -> None:
    """Raise DeadlockError if the calling thread is to wait for unloads or suspensions that it delays itself.

    It does so while it loads something that starts undisturbed, or has a lease that is not settled, see
    `ThreadHolds.quiet`. what: the name of the call. rows: of the copies, None for all of the model.
    """
    tables, layout = session.namespace.tables, session.namespace.segment.layout
    firm, _ = session.thread.rows()
    session.thread.let_others_pass()
    quiet = session.thread.quiet(firm)
    if rows is None:
        model = tables.model_row(tag)
        rows = () if model is None else tables.rows_where(layout.instances, Instance.MODEL, model)
    bits = functools.reduce(operator.or_, (tables.instances[row].device_bits for row in quiet), 0)
    if not any(tables.instances[row].device_bits & bits for row in rows):
        return
    held, holds = _named(session, quiet)
    raise DeadlockError(
        f"{what} of {tables.called(tag)}: this thread itself is loading, or has not settled, {holds}, and until that "
        "has started nothing is unloaded, or suspended, there; pass timeout_seconds=0 not to wait for that",
        tag=tag,
        held=held,
    )
