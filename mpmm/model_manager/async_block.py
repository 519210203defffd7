"""`async with manager.model_async(tag, loader) as model:` holds an instance from `__aenter__` to `__aexit__`."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mpmm.errors import ClosedError, InvalidArgumentError, LockTimeoutError, NoEventLoopError
from mpmm.interpreter.process_end import stand_still_in_daemon
from mpmm.model_manager.async_acquire import LOOP_TIMEOUT_S, AsyncAcquire
from mpmm.model_manager.refusals import expect_mapped
from mpmm.model_manager.release import give_back_hold
from mpmm.model_manager.request import ANYWHERE, AcquireOptions, read_options
from mpmm.multi_process_shared.main_import import refuse_while_importing_main
from mpmm.policy.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from mpmm.model_manager.attachment import Attachment
    from mpmm.model_manager.operations import Held, LoadedInstance, Operation
    from mpmm.model_manager.session import Session

__all__ = ["AsyncBlock"]


class AsyncBlock(AbstractAsyncContextManager[Any]):
    """What `ModelManager.model_async` returns.

    Usually there is an idle instance, and no request waits: then the loop's own thread takes it, and gives it back, in
    a few microseconds. An `AsyncAcquire` does what takes longer.
    """

    def __init__(self, attachment: Attachment, tag: str, loader: Callable[[], Any], options: AcquireOptions) -> None:
        self._attachment = attachment
        self._tag = tag
        self._loader = loader
        self._options = options
        self._session: Session | None = None
        self._operation: Operation | None = None
        self._acquire: AsyncAcquire | None = None

    async def __aenter__(self) -> Any:
        tag = self._tag
        if self._operation is not None:
            raise InvalidArgumentError(
                f"the block of {tag!r} has begun already: call `model_async` once for each block"
            )
        refuse_while_importing_main("acquire the model", tag)
        loop = asyncio._get_running_loop()
        if loop is None:
            raise NoEventLoopError(
                f"model_async({tag!r}) was entered where no event loop of asyncio runs; in a loop of another library, "
                "such as trio, use `model` in one of its threads"
            )
        session = self._session = self._attachment.connected_in_time(tag)
        # While this object exists, it is responsible for what the operation holds.
        operation = self._operation = session.begin_for(self)
        operation.loop = weakref.ref(loop)
        try:
            taken = self._take_at_once(session, operation)
            if taken is not None and session.held.handle_is_alive(taken):
                return taken.value
            return await self._long_way(session, operation).run(self._loader, taken)
        except asyncio.CancelledError:
            # A cancelled task gives back by itself what it holds.
            raise
        except BaseException as error:
            # Now, because the traceback keeps this object alive as long as the exception is kept; the task itself keeps
            # a KeyboardInterrupt.
            self._abandon(session, operation)
            if isinstance(error, ValueError):
                expect_mapped(session, error)
            if isinstance(error, ClosedError):
                stand_still_in_daemon()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        operation, session = self._operation, self._session
        if operation is None or session is None:
            return
        try:
            await self._leave(session, operation, error)
        except asyncio.CancelledError:
            # A thread gives it back nevertheless.
            raise
        except BaseException as failure:
            self._abandon(session, operation)
            if isinstance(failure, ClosedError):
                stand_still_in_daemon()
            raise
        session.end(operation)

    def _take_at_once(self, session: Session, operation: Operation) -> LoadedInstance | None:
        request = read_options(self._options, session.samples) if self._options else ANYWHERE
        if request.usable_on or request.keep_alive:
            return None
        return session.held.take_at_once(self._tag, operation, LOOP_TIMEOUT_S)

    async def _leave(self, session: Session, operation: Operation, error: BaseException | None) -> None:
        held = operation.held
        # A child that was forked inside the block leaves it here, too, but its parent holds the instance.
        if held is None or session.namespace.is_inherited:
            return
        if not session.namespace.is_usable:
            # The session gave it back when it left. An exception that leaves the block must not be hidden.
            if error is None:
                self._attachment.connected()
            return
        try:
            if error is not None and is_out_of_memory(error):
                await self._long_way(session, operation).make_room()
        finally:
            await self._give_back(session, operation, held)

    async def _give_back(self, session: Session, operation: Operation, held: Held) -> None:
        # An instance that runs alone is measured at its release, and the memory source may take a while for that.
        if not session.namespace.reads.devices.anything_runs_alone():
            with suppress(LockTimeoutError):
                give_back_hold(session, operation, held, self._tag, LOOP_TIMEOUT_S)
                return
        await self._long_way(session, operation).give_back(held)

    def _long_way(self, session: Session, operation: Operation) -> AsyncAcquire:
        if self._acquire is None:
            request = read_options(self._options, session.samples)
            self._acquire = AsyncAcquire(self._attachment, session, operation, self._tag, request)
        return self._acquire

    def _abandon(self, session: Session, operation: Operation) -> None:
        if self._acquire is None:
            session.abandon(operation)
        else:
            self._acquire.abandon()
