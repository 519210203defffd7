"""`with manager.model(tag, loader) as model:` holds an instance from `__enter__` to `__exit__`."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mpmm.errors import ClosedError, InvalidArgumentError, MpmmError
from mpmm.interpreter.process_end import stand_still_in_daemon
from mpmm.model_manager.acquire import acquire
from mpmm.model_manager.release import give_back_hold
from mpmm.model_manager.request import AcquireOptions, check_request
from mpmm.policy.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from mpmm.model_manager.attachment import Attachment
    from mpmm.model_manager.operations import Operation
    from mpmm.model_manager.session import Session

__all__ = ["Block"]


class Block(AbstractContextManager[Any]):
    """What `ModelManager.model` returns.

    It is a class, not a generator: the interpreter runs a generator's `__enter__` in several steps, and if an exception
    from a signal handler came between them, an acquired instance would be lost.
    """

    def __init__(self, attachment: Attachment, tag: str, loader: Callable[[], Any], options: AcquireOptions) -> None:
        self._attachment = attachment
        self._tag = tag
        self._loader = loader
        self._options = options
        self._session: Session | None = None
        self._operation: Operation | None = None

    def __enter__(self) -> Any:
        attachment, tag, loader = self._attachment, self._tag, self._loader
        if self._operation is not None:
            raise InvalidArgumentError(f"the block of {tag!r} has begun already: call `model` once for each block")
        began = time.monotonic()
        session = self._session = attachment.connected_in_time(tag)
        check_request(tag, loader)
        operation = session.begin(sys._getframe())
        try:
            value = acquire(attachment, session, operation, tag, loader, self._options, began)
            session.thread.enter(operation)
        except BaseException:
            session.abandon(operation)
            raise
        self._operation = operation
        operation.owner = weakref.ref(self)
        # From here on this object is responsible for the instance.
        operation.frame = None
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        operation, session = self._operation, self._session
        if operation is None or session is None:
            return
        operation.thread = threading.get_ident()
        operation.frame = sys._getframe()
        self._operation = None
        try:
            self._leave(session, operation, error)
        except BaseException as failure:
            session.abandon(operation)
            if isinstance(failure, ClosedError):
                stand_still_in_daemon()
            raise
        session.end(operation)

    def _leave(self, session: Session, operation: Operation, error: BaseException | None) -> None:
        tag, held = self._tag, operation.held
        session.thread.leave(operation)
        # A child that was forked inside the block leaves it here, too, but its parent holds the instance.
        if held is None or session.namespace.is_inherited:
            return
        if not session.namespace.is_usable:
            # The session gave it back when it left. An exception that leaves the block, SystemExit say, must not be
            # hidden.
            if error is None:
                self._attachment.connected()
            return
        if error is not None and is_out_of_memory(error):
            with suppress(MpmmError):
                session.out_of_memory.make_room_after_use(tag)
        give_back_hold(session, operation, held, tag)
