"""Pins of one process: its own, which keep the idle instances of a model until the process unpins it, or ends."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mpmm.errors import NotAcquiredError, ReentrantCallError
from mpmm.model_manager.administration import pin_once
from mpmm.model_manager.queued_request import making_room

if TYPE_CHECKING:
    from mpmm.model_manager.session import Session
    from mpmm.shared_state.transaction import Transaction

__all__ = ["pin", "unpin"]


def pin(session: Session, tag: str, for_all: bool, deadline: float) -> None:
    """Pin a model for this process, or for the namespace; does nothing if that one has pinned it already.

    deadline: on `time.monotonic()`, for a row in the table of models to come free. Raises TableFullError,
    AcquireTimeoutError, InvalidArgumentError, LockTimeoutError.
    """
    member = -1 if for_all else session.namespace.slot
    making_room(session, tag, deadline, partial(pin_once, session.namespace, tag, member))


def unpin(session: Session, tag: str) -> None:
    """End this process's pin on a model. Raises NotAcquiredError if there is none, LockTimeoutError."""
    namespace = session.namespace

    def unpin(t: Transaction) -> bool:
        model = namespace.tables.model_row(tag)
        row = None if model is None else namespace.tables.pin_row(model, namespace.reference)
        if row is not None:
            namespace.transitions.pins.unpin(t, row)
        return row is not None

    try:
        with namespace.transaction() as t:
            found = unpin(t)
            if found:
                session.scheduler.advance(t)
    except ReentrantCallError:
        # Called by a finalizer or signal handler in a transaction: assume that there is a pin.
        session.deferred.defer(unpin)
        found = True
    if not found:
        raise NotAcquiredError(f"unpin of {namespace.tables.called(tag)}: this process has no pin on it", tag=tag)
