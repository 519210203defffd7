"""Pins of one process: its own, which keep the idle instances of a model until the process unpins it, or ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpmm.errors import NotAcquiredError, ReentrantCallError
from mpmm.model_manager.administration import pin_for_all
from mpmm.model_manager.queued_request import making_room
from mpmm.model_manager.request import encoded_tag

if TYPE_CHECKING:
    from mpmm.model_manager.session import Session
    from mpmm.shared_state.transaction import Transaction

__all__ = ["pin", "unpin"]


def pin(session: Session, tag: str, for_all: bool, deadline: float) -> None:
    """Pin a model for this process, or for the namespace; nothing if it is pinned so already.

    deadline: on `time.monotonic()`, for a row in the table of models to come free. Raises TableFullError,
    AcquireTimeoutError, InvalidArgumentError, LockTimeoutError.
    """
    namespace = session.namespace
    encoded = encoded_tag(tag)

    def pin_for_process() -> None:
        with namespace.transaction() as t:
            # Looked for before any model is removed to make room for one whose pin finds none.
            namespace.tables.free_row(namespace.segment.layout.pins)
            model = namespace.transitions.models.claim(t, tag, encoded)
            namespace.transitions.pins.pin(t, model, namespace.slot)

    def pin_for_namespace() -> None:
        pin_for_all(namespace, tag)

    if for_all:
        making_room(session, tag, deadline, pin_for_namespace)
    elif not _is_pinned(session, tag):
        making_room(session, tag, deadline, pin_for_process)


def _is_pinned(session: Session, tag: str) -> bool:
    namespace = session.namespace
    with namespace.transaction():
        model = namespace.tables.model_row(tag)
        return model is not None and namespace.tables.pin_row(model, namespace.reference) is not None


def unpin(session: Session, tag: str) -> None:
    """End this process's pin on a model. Raises NotAcquiredError when there is none, LockTimeoutError."""
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
        # A finalizer or signal handler gives it back, so it is pinned for all that can be seen.
        session.deferred.defer(unpin)
        found = True
    if not found:
        raise NotAcquiredError(f"unpin of {tag!r}: this process has no pin on it", tag=tag)
