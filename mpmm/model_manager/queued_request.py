"""A request that waits in the queue of the namespace: its ticket, the answer to it, and leaving.

Subclasses know what is requested, and what the answer gives: an instance of a model (`acquisition.py`) or a lease on
memory (`lease.py`). No method here sleeps: `acquire.py` sleeps between the calls, and `async_acquire.py` awaits.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from mpmm.errors import LockTimeoutError, MpmmError, TableFullError
from mpmm.model_manager.deferred import NOW_S
from mpmm.model_manager.reconcile import leave_if_there
from mpmm.model_manager.refusals import taken_away, timed_out
from mpmm.model_manager.session import Session
from mpmm.model_manager.unload import UNLOAD_LOOK_S
from mpmm.model_manager.waits import held_by, wanted_by
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Header, Ticket

if TYPE_CHECKING:
    from mpmm.model_manager.operations import Operation
    from mpmm.model_manager.request import PlacementRequest
    from mpmm.shared_state.transaction import Transaction

__all__ = ["GrantRolledBack", "NoRowYet", "QueuedRequest", "make_room", "making_room"]

T = TypeVar("T")


class GrantRolledBack(Exception):
    """A ticket still waits: the process that answered it was killed before its transaction was committed.

    The waiter saw the answer nevertheless, because it reads without the lock.
    """


class NoRowYet(Exception):
    """All rows of the table of models are in use, but one is about to come free; internal."""


class QueuedRequest(Generic[T]):
    """One request of one call. T is what `act` returns for an answer that gives something.

    operation: records what the request holds, in case an exception ends the call between two bytecodes. name: of the
    model or lease. deadline: on `time.monotonic()`. row: of its ticket, once it has one.
    """

    def __init__(
        self,
        session: Session,
        operation: Operation,
        name: str,
        request: PlacementRequest,
        began: float,
        timeout_s: float,
    ) -> None:
        self.session = session
        self.operation = operation
        self.name = name
        self.request = request
        self.timeout_s = timeout_s
        self.began = began
        self.deadline = began + timeout_s
        self.row = -1
        #: Whether a plan was made for its ticket: it may have evicted something, or the model may back off.
        self.planned = True

    def begin_anew(self) -> None:
        """Restart the time for the wait, because the request queues once more."""
        self.began = time.monotonic()
        self.deadline = self.began + self.timeout_s

    def left_s(self) -> float:
        """Return how long a transaction of this request may wait for the lock; never less than `NOW_S`."""
        return max(NOW_S, self.deadline - time.monotonic())

    def deadline_ns(self) -> int:
        """Return the deadline for the ticket.

        A request that does not wait is given what is free now; the policy gives nothing to tickets past their deadline.
        """
        return to_ns(max(self.deadline, time.monotonic() + NOW_S))

    @property
    def called(self) -> str:
        """The name of the requested model or lease in errors."""
        raise NotImplementedError

    @property
    def takes_only_free(self) -> bool:
        """Tell whether it is served at once or not at all, so that nothing is evicted or otherwise disturbed for it.

        Its ticket never waits: an eviction would come too late for it, and be in vain.
        """
        return self.timeout_s <= 0 or self.request.if_free

    def plan(self, t: Transaction) -> None:
        """Have the policy decide for all requests that wait, now that this one has its ticket."""
        scheduler = self.session.scheduler
        why = scheduler.why_not_at_once(self.row) if self.takes_only_free else None
        if why is None:
            scheduler.advance(t, newcomer=self.row)
        else:
            scheduler.turn_away(t, self.row, why)

    def note_ticket(self, row: int) -> None:
        """Record the ticket that was made in the transaction in progress."""
        self.operation.ticket = (row, self.session.namespace.reads.queue.number(row))
        self.row = row

    def await_grant(self) -> T | None:
        """Sleep for a moment at most, and take what the ticket was granted, without the lock; else None."""
        return None

    def take_grant(self) -> T | None:
        """Take what the ticket was granted, without the lock; None if that needs `act`."""
        return None

    def act(self) -> T | None:
        """Act on the ticket's answer, in a transaction that frees the ticket.

        Return what was granted, which the operation has recorded; None if nothing more is needed, which only a preload
        is told. Raises GrantRolledBack if the ticket still waits, and the error that the answer stands for.
        """
        namespace = self.session.namespace
        try:
            with namespace.transaction(self.left_s()) as t:
                _, state, instance, need_mb = namespace.reads.queue.answer(self.row)
                if state == Ticket.WAITING:
                    raise GrantRolledBack
                namespace.transitions.hand_over.consume_answer(t, self.row)
                if state in (Ticket.GRANTED, Ticket.LOAD):
                    return self._take(state, instance)
        except LockTimeoutError:
            # Otherwise this process would unknowingly hold what was granted until it ends.
            self.session.deferred.defer(functools.partial(leave_if_there, namespace, self.operation.ticket))
            raise
        if state == Ticket.ENOUGH:
            return None
        if state == Ticket.REFUSED:
            raise self._refused(need_mb)
        raise taken_away(
            self.session, f"ended the wait for {self.session.namespace.tables.called(self.name)}", self.name
        )

    def _take(self, state: int, instance: int) -> T:
        """Record what the answer grants, an instance row, and return it. Needs the lock."""
        raise NotImplementedError

    def _refused(self, need_mb: float) -> MpmmError:
        """Return the error for a request that can never be granted."""
        raise NotImplementedError

    def leave(self, timed_out: bool = False) -> tuple[str, float | None]:
        """Leave the queue, and give up what the ticket may have been granted.

        Return why it waited, and, if it has timed out, how many seconds more it was expected to wait.
        """
        session, row, ticket = self.session, self.row, self.operation.ticket
        if not session.namespace.is_usable:
            return "shut down", None
        wanted = wanted_by(session.namespace, row) if timed_out else None
        left: tuple[str, float | None] = ("lock", None)
        is_asked = True

        def leave(t: Transaction) -> bool:
            nonlocal left
            if is_asked:
                left = session.scheduler.why(row), session.scheduler.expected_wait_s(row) if timed_out else None
            moves_somebody = not session.scheduler.holds_up_nobody(row)
            model = session.namespace.tables.tickets[row].model
            if not leave_if_there(session.namespace, ticket, t):
                return False
            if timed_out:
                t.add(Header.TIMEOUTS, 1)
            session.unloads.unload_if_last_has_left(t, model)
            return moves_somebody

        session.deferred.apply_or_defer(leave)
        # A deferred change need not find the reason any more: an expected wait takes a look at all instances.
        is_asked = False
        self.operation.ticket = None
        held = "" if wanted is None or left[0] == "lock" else held_by(session.namespace, wanted)
        return (f"{left[0]}; {held}", left[1]) if held else left

    def time_out(self) -> MpmmError:
        """Leave the queue at the deadline, and return the error to raise."""
        shown = self.session.namespace.tables.shown_for(self.name)
        return timed_out(self.name, time.monotonic() - self.began, *self.leave(timed_out=True), shown=shown)


def making_room(session: Session, name: str, deadline: float, enter: Callable[[], T]) -> T:
    """Return what `enter`, a transaction that needs a row, returns; free one, or wait for one, if all are in use.

    Raises TableFullError if every row is in use, held or waited for, AcquireTimeoutError if none comes free in time.
    """
    began = time.monotonic()
    while True:
        with contextlib.suppress(NoRowYet):
            return make_room(session, name, began, deadline, enter)
        time.sleep(UNLOAD_LOOK_S)


def make_room(session: Session, name: str, began: float, deadline: float, enter: Callable[[], T]) -> T:
    """Do what `making_room` does, but raise NoRowYet instead of waiting; try again after `UNLOAD_LOOK_S`.

    began: `time.monotonic()` when the caller began to wait.
    """
    while True:
        try:
            return enter()
        except TableFullError as error:
            left_s = max(NOW_S, deadline - time.monotonic())
            if error.table == "tickets" and session.held.has_taken_tickets:
                # The rows of grants that this process has acted on are no longer needed.
                with session.namespace.transaction(left_s) as t:
                    session.held.free_taken_tickets(t)
                continue
            if error.table != "models":
                raise
            # Checked first: otherwise a model would be unloaded for a request that gives up.
            if time.monotonic() >= deadline:
                shown = session.namespace.tables.shown_for(name)
                reason = "no row in the table of models"
                raise timed_out(name, time.monotonic() - began, reason, shown=shown) from None
            # Models whose instances are all idle make room for a new one.
            with session.namespace.transaction(left_s) as t:
                if not session.scheduler.make_room_for_model(t, session.namespace.slot):
                    raise
        session.unloads.unload_in_thread()
        raise NoRowYet
