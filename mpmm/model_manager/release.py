"""Giving an instance back: its row becomes idle, is handed over to a waiter, or is unloaded, as the policy decides.

An instance that has run alone is measured first. The compiled core makes most releases, without any of that.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpmm.errors import ClosedError, LockTimeoutError, MpmmError, NotAcquiredError, ReentrantCallError
from mpmm.interpreter.process_end import stand_still_in_daemon
from mpmm.memory.beam_metrics import report_estimate
from mpmm.model_manager.nested import learn_alone
from mpmm.model_manager.refusals import expect_mapped, taken_away
from mpmm.text.printable import printable_logger

if TYPE_CHECKING:
    from mpmm.model_manager.operations import Held, LoadedInstance, Operation
    from mpmm.model_manager.session import Session
    from mpmm.shared_state.transaction import Transaction

__all__ = ["discard", "give_back", "give_back_held", "give_back_hold", "not_acquired", "release"]

_LOG = printable_logger("mpmm")


def release(session: Session, tag: str, instance: Any) -> None:
    """Give back what `acquire_model` returned; see `ModelManager.release_model`."""
    operation = session.begin(sys._getframe())
    try:
        if session.held.take_off(instance, tag, operation) is None:
            raise not_acquired(session, tag, instance)
        give_back_held(session, operation, tag)
    except BaseException as error:
        session.abandon(operation)
        if isinstance(error, ClosedError):
            stand_still_in_daemon()
        raise
    session.end(operation)


def not_acquired(session: Session, tag: str, instance: Any) -> NotAcquiredError:
    """Return the error for a release of something that this process does not hold."""
    what = repr(instance) if isinstance(instance, str) else f"this {type(instance).__name__}"
    return NotAcquiredError(
        f"release of {session.namespace.tables.called(tag)}: this process does not hold {what}; it was never acquired "
        "here, or is released already",
        tag=tag,
    )


def give_back_held(session: Session, operation: Operation, tag: str, timeout_s: float | None = None) -> None:
    """Give back what an operation has struck off the list of what this process holds.

    If the lock is not free in time, or this is a finalizer or signal handler in a transaction of its own thread, the
    background thread gives it back as soon as it can. A block ends only once, and most callers would not try again:
    the instance would be lost to all processes until this one ends.

    timeout_s: how long to wait for the lock; then LockTimeoutError is raised, and the instance is held as before.
    """
    held = operation.held
    if held is None:
        return
    may_be_quick = held[0].tag == tag and tag not in session.unload_on_release
    if may_be_quick and session.held.give_back_quickly(held[0], timeout_s):
        operation.held = None
        return
    if session.scheduler.must_queue() and not session.held.has_tenure(held[0].tag, held[0].row):
        session.scheduler.prewake(held[0].row)
    try:
        give_back(session, tag, held[0], timeout_s=timeout_s)
    except ReentrantCallError:
        session.abandon(operation)
    except LockTimeoutError as error:
        if timeout_s is not None:
            session.held.put_back(held)
            # The operation is still responsible for it.
            operation.gives_back = False
            raise
        session.abandon(operation)
        text = "mpmm %s: pid %d gives %s back as soon as the lock is free: %s"
        called = session.namespace.tables.called(tag)
        _LOG.warning(text, session.namespace.name, session.namespace.pid, called, error)
    except MpmmError:
        operation.held = None
        raise
    except ValueError as error:
        operation.held = None
        expect_mapped(session, error)
        raise
    else:
        operation.held = None


def give_back_hold(
    session: Session, operation: Operation, held: Held, tag: str, timeout_s: float | None = None
) -> None:
    """Give back what a block holds, at its end. timeout_s: as in `give_back_held`.

    Raises NotAcquiredError if the code in the block has given it back.
    """
    here = session.held
    # That code may also have acquired it once more.
    if not here.take_off_hold(held, operation) and here.take_off(held[0].value, tag, operation) is None:
        raise not_acquired(session, tag, held[0].value)
    give_back_held(session, operation, tag, timeout_s)


def give_back(
    session: Session, tag: str, copy: LoadedInstance, used: bool = True, timeout_s: float | None = None
) -> None:
    """Give back an instance in a transaction, and measure it if it has run alone.

    used: it has been used since it was loaded. Raises NamespaceResetError if a reset has taken it away meanwhile,
    ClosedError, LockTimeoutError.
    """
    namespace, here = session.namespace, session.held
    cost_mb = None
    alone = namespace.reads.devices.anything_runs_alone() and namespace.transitions.isolation.runs_alone(copy.row)
    # What a twin adds to the memory in use says nothing about its model. A holder may look for twins without the lock.
    if alone and not namespace.transitions.twins.any_of(copy.row):
        cost_mb = _added_alone_mb(session, copy)
    with namespace.transaction(timeout_s) as t:
        here.free_taken_tickets(t)
        if not here.is_held(copy):
            raise taken_away(session, f"took {namespace.tables.called(tag)} away", tag)
        if cost_mb is not None and namespace.transitions.isolation.runs_alone(copy.row):
            learn_alone(session, t, copy.row, cost_mb)
        else:
            cost_mb = None
        contended = session.scheduler.must_queue()
        if not (contended and here.keeps(t, copy, used)):
            if contended:
                session.tenures.end(copy.tag)
            session.scheduler.release(t, copy.row, used)
        if session.unload_on_release:
            session.unloads.unload_if_not_kept(t, copy)
    if contended:
        # Not before the waiter has had a chance to run on this processor.
        session.tenures.leave(copy.tag)
    if copy.tag != tag:
        copy_of, released_as = map(namespace.tables.called, (copy.tag, tag))
        _LOG.warning("mpmm %s: a copy of %s was released as %s", namespace.name, copy_of, released_as)
    if cost_mb is not None:
        report_estimate(copy.tag, cost_mb)


def _added_alone_mb(session: Session, copy: LoadedInstance) -> float | None:
    """Return what an instance that runs alone has added to the memory in use, at its peak; None if unknown."""
    session.figures.sample()
    added = session.figures.added_mb(copy.row)
    return None if added is None else max(added) * len(added)


def discard(session: Session, operation: Operation, copy: LoadedInstance) -> None:
    """Free the row of an instance that an operation holds, because its server turned out to be dead."""
    if operation.held is not None:
        session.held.take_off_hold(operation.held, operation)

    def discard(t: Transaction) -> bool:
        session.held.free_taken_tickets(t)
        if not session.held.is_held(copy):
            return False
        session.namespace.transitions.holds.discard(t, copy.row)
        return True

    session.deferred.apply_or_defer(discard)
    operation.held = None
