"""Leases: device memory for any use, which all processes count like a model's.

`reserve` queues for one like an acquire: with a ticket, and the policy makes room for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from mpmm.errors import AcquireTimeoutError, ClosedError, LeaseTooLargeError, LockTimeoutError
from mpmm.interpreter.process_end import stand_still_in_daemon
from mpmm.model_manager.acquire import sleep_until_answered
from mpmm.model_manager.nested import end_isolation, expect_no_deadlock
from mpmm.model_manager.queued_request import QueuedRequest, making_room
from mpmm.model_manager.refusals import expect_own_time_left, largest_limit
from mpmm.shared_state.layout import Instance
from mpmm.shared_state.transaction import Transaction
from mpmm.text.arguments import LARGEST_PID, checked_whole

if TYPE_CHECKING:
    from mpmm.model_manager.operations import Operation
    from mpmm.model_manager.request import PlacementRequest
    from mpmm.model_manager.session import Session

__all__ = ["Lease", "reserve"]

# The priority of known models in the queue.
PRIORITY = 1


class Lease:
    """Memory that this process has been given, until `release`, the end of a `with` block, or the end of the process.

    A lease that is garbage-collected ends, too, with a warning, because it could no longer be released.
    `ModelManager.reserve` makes leases. name, mb: as requested. placement: where it is, see `mpmm.memory.placement`.
    """

    def __init__(self, session: Session, row: int, name: str, mb: float, attachment: object = None) -> None:
        """Take possession of a LEASED row. Needs the lock.

        attachment: kept alive as long as the lease, because an attachment that is collected leaves the namespace.
        """
        instance = session.namespace.tables.instances[row]
        self.name = name
        self.mb = mb
        self.placement = session.samples.placement_of(instance.device_bits, mb)
        self._session = session
        self._attachment = attachment
        self._row = row
        self._generation = instance.generation
        self._operation: Operation | None = None

    @property
    def reference(self) -> tuple[int, int]:
        """Row and generation."""
        return self._row, self._generation

    def answer_for(self, operation: Operation) -> None:
        """Take over what the call that made this lease holds.

        Once this object is collected, the background thread ends the lease.
        """
        self._operation = operation
        operation.warning = (
            f"lease {self.name!r} of {self.mb:g} MB was collected before it was released, and has ended; keep it for "
            "as long as its memory is in use"
        )
        operation.owner = weakref.ref(self)
        # From here on this object is responsible for the lease.
        operation.frame = None

    def release(self) -> None:
        """Give the memory back. A second call, one after `shutdown`, or one in a forked child does nothing.

        If the lock is not free, the memory is given back as soon as it is.
        """
        session = self._session
        if not session.namespace.is_usable:
            return
        operation = self._operation or session.begin(sys._getframe())
        operation.booking = self.reference
        operation.thread = threading.get_ident()
        # From here on the background thread ends the lease if this call cannot.
        operation.frame = sys._getframe()
        self._operation = None
        # It is being given back: no warning if this object is collected before the background thread ends the lease.
        operation.warning = ""
        try:
            session.deferred.apply_or_defer(self._end)
            operation.booking = operation.ticket = None
        finally:
            session.abandon(operation)

    def _end(self, t: Transaction) -> bool:
        is_ours = self._is_ours()
        if is_ours:
            self._session.namespace.transitions.leases.end(t, self._row)
        return is_ours

    def used_by(self, pid: int) -> None:
        """Say which process will use the memory, this one or another.

        If a source measures single processes, the memory of that process, and of those that it starts, is then not
        counted beside the lease. None of them may hold objects of this namespace's models: their memory would count as
        the lease's. (Model servers are told apart.) Raises InvalidArgumentError for an impossible pid.
        """
        pid = checked_whole(f"lease {self.name!r}: pid", pid, 1, LARGEST_PID, "the number of a process")
        session = self._session
        if not session.namespace.is_usable:
            return

        def link(t: Transaction) -> bool:
            if self._is_ours():
                session.namespace.transitions.leases.link_program(t, self._row, pid)
            return False

        session.deferred.apply_or_defer(link)

    @property
    def is_held(self) -> bool:
        """False once it has been given back."""
        session = self._session
        if not session.namespace.is_usable:
            return False
        with session.namespace.transaction():
            return self._is_ours()

    def descriptor(self) -> int:
        """Return a new descriptor that keeps the lease from ending with this process, for a child to inherit.

        A lease ends when no process has one open any more, or by `release`. The caller closes it. Raises ClosedError
        after `shutdown`, and in a forked child, which has no part in the lease; LockTimeoutError.
        """
        namespace = self._session.namespace
        # Under the lock, so that this process cannot leave meanwhile: the descriptor might then be another file's.
        with namespace.transaction():
            return os.dup(namespace.life_fd)

    def settled(self) -> None:
        """End the quiet of a lease that was requested with `steady=True`: others may load and unload there again.

        A second call, or one for another lease, does nothing. If the lock is not free, the quiet ends as soon as it is.
        """
        if self._session.namespace.is_usable:
            self._session.deferred.apply_or_defer(self._settle)

    def _settle(self, t: Transaction) -> bool:
        is_ours = self._is_ours()
        if is_ours:
            self._session.namespace.transitions.isolation.end_steady(t, self._row)
        return is_ours

    def environment(self) -> dict[str, str]:
        """Return the environment variables that tell a program about the memory.

        See `Placement.environment`; once the lease is over, they lack the share of each device. Raises ClosedError.
        """
        session = self._session
        with session.namespace.transaction():
            bits = session.namespace.tables.instances[self._row].device_bits if self._is_ours() else 0
            # Read now, because the totals may have been unknown when the lease was granted.
            fraction = session.samples.memory_fraction(bits, self.mb)
        return replace(self.placement, memory_fraction=fraction).environment()

    def _is_ours(self) -> bool:
        """Tell whether the row still stands for this lease. Needs the lock."""
        namespace = self._session.namespace
        instance = namespace.tables.instances[self._row]
        return instance.state == Instance.LEASED and instance.generation == self._generation

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Lease(name={self.name!r}, mb={self.mb:g})"


def reserve(
    attachment: object,
    session: Session,
    name: str,
    encoded: bytes,
    mb: float,
    request: PlacementRequest,
    timeout_s: float,
) -> Lease:
    """Wait for a lease on `mb` MB, and return it; see `ModelManager.reserve`.

    attachment: keeps the session from leaving; the lease keeps it alive. encoded: the name as the tables hold it.
    """
    operation = session.begin(sys._getframe())
    try:
        wanted = _LeaseRequest(attachment, session, operation, name, encoded, mb, request, timeout_s)
        session.figures.ensure_fresh_to_queue(timeout_s)
        with session.waiting():
            lease = wanted.wait()
        lease.answer_for(operation)
        return lease
    except BaseException as error:
        session.abandon(operation)
        if isinstance(error, ClosedError):
            stand_still_in_daemon()
        raise


class _LeaseRequest(QueuedRequest[Lease]):
    """The request of one call of `reserve`."""

    def __init__(
        self,
        attachment: object,
        session: Session,
        operation: Operation,
        name: str,
        encoded: bytes,
        mb: float,
        request: PlacementRequest,
        timeout_s: float,
    ) -> None:
        super().__init__(session, operation, name, request, time.monotonic(), timeout_s)
        self._attachment = attachment
        self._encoded = encoded
        self._mb = mb

    @property
    def called(self) -> str:
        return f"lease {self.name!r} of {self._mb:g} MB"

    def wait(self) -> Lease:
        """Queue, and sleep until the lease is granted."""
        firm, alone = self.session.thread.rows()
        # A copy of this thread that runs alone does so only until the thread asks for more.
        end_isolation(self.session, (*firm, *alone))
        try:
            making_room(self.session, self.name, self.deadline, self._enqueue)
            expect_no_deadlock(self, firm)
            lease = sleep_until_answered(self)
        except LockTimeoutError as error:
            expect_own_time_left(self.session, self.name, error)
            raise
        assert lease is not None, "only a preload is told that there is enough"
        return lease

    def _enqueue(self) -> None:
        session, namespace, request = self.session, self.session.namespace, self.request
        with namespace.transaction(self.left_s()) as t:
            model = namespace.transitions.leases.claim(t, self._encoded, self._mb)
            row = namespace.transitions.tickets.enqueue(
                *(t, model, namespace.slot, PRIORITY, self._mb, self.deadline_ns(), 0),
                *(request.loadable_on or session.samples.visible_bits(), request.usable_on, request.span),
                urgency=request.urgency,
                steady=request.steady,
            )
            self.note_ticket(row)
            self.plan(t)

    def _take(self, state: int, instance: int) -> Lease:
        lease = Lease(self.session, instance, self.name, self._mb, self._attachment)
        self.operation.booking = lease.reference
        return lease

    def _refused(self, need_mb: float) -> LeaseTooLargeError:
        limit_mb, device = largest_limit(self.session, self.request)
        return LeaseTooLargeError(
            f"{self.called}: the limit of {device!r} is {limit_mb:.0f} MB, so it can never be "
            "granted; slack_percentage, and memory_budget_mb (host) or fallback_memory_mb (booked), set the limit",
            name=self.name,
            need_mb=self._mb,
            limit_mb=limit_mb,
            device=device,
        )

    def time_out(self) -> AcquireTimeoutError:
        reason, _ = self.leave(timed_out=True)
        waited = time.monotonic() - self.began
        return AcquireTimeoutError(
            f"{self.called}: not available within {waited:.1f} s (last reason: {reason}); "
            "timeout_seconds sets the limit",
            tag=self.name,
            waited_seconds=waited,
            retry_after_seconds=None,
        )
