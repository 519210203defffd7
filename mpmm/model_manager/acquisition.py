"""One request for an instance of a model: from the look for an idle one to the answer of the queue.

`acquire.py` shows the order of these steps. Each takes the lock for one transaction, or less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from mpmm.errors import ModelTooLargeError, QueueFullError, TableFullError
from mpmm.model_manager.operations import LoadedInstance
from mpmm.model_manager.queued_request import QueuedRequest, make_room, making_room
from mpmm.model_manager.refusals import largest_limit
from mpmm.model_manager.request import ANYWHERE, PlacementRequest, encoded_tag
from mpmm.model_manager.session import Session
from mpmm.model_manager.tenure import called_up_for_ns
from mpmm.scheduling import CALLED_UP_FOR_NS, SPIN_S
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Instance, Model, Ticket

if TYPE_CHECKING:
    from mpmm.model_manager.operations import Operation
    from mpmm.shared_state.events import Cause
    from mpmm.shared_state.transaction import Transaction

__all__ = ["SPIN_NS", "Acquisition", "Booking", "NothingFree"]

# Tickets with a higher number queue behind: unknown models (0) come first, to be measured, then known ones (1).
PRELOAD_PRIORITY = 2
# Shorter than the first of the thresholds in `mpmm.model_manager.waits`.
FIRST_SLEEP_S = 1.0
SPIN_NS = int(SPIN_S * 1e9)


class NothingFree(Exception):
    """Ends the transaction of a preload that would have to wait, or to have something evicted; internal."""


class Booking(NamedTuple):
    """An instance (row, generation) that this process may load now; memory is reserved for it.

    alone: it has its devices to itself, to be measured. resumes: it is not to be loaded, but to be resumed.
    """

    row: int
    generation: int
    alone: bool
    resumes: bool = False


class Acquisition(QueuedRequest["LoadedInstance | Booking"]):
    """The request of one call of `acquire_model`, `model`, `model_async`, `preload` or `resume`.

    preload: above 0, it asks for loads only, and is told once there are this many instances. nested: its thread holds
    or loads others. log_info: the manager's, which writes only if `verbose_logging` is on.
    """

    def __init__(
        self,
        session: Session,
        operation: Operation,
        tag: str,
        request: PlacementRequest,
        began: float,
        timeout_s: float,
        log_info: Callable[..., object],
        preload: int = 0,
    ) -> None:
        super().__init__(session, operation, tag, request, began, timeout_s)
        self.tag = tag
        self.log_info = log_info
        self.preload = preload
        self.nested = False

    @property
    def called(self) -> str:
        return f"model {self.session.namespace.tables.called(self.tag)}"

    # ---- without a ticket ----------------------------------------------------------------------------------

    def note_keep_alive(self) -> None:
        """Remember in this process whether instances are unloaded as soon as they are idle.

        The transaction that takes an idle instance, or makes the ticket, records how long they are kept. If an earlier
        one did, the leader could have the instance unloaded in between.
        """
        tags, word = self.session.unload_on_release, self.request.keep_alive
        if word:
            (tags.add if word == Model.AT_ONCE else tags.discard)(self.tag)

    def take_idle(self, timeout_s: float) -> LoadedInstance | None:
        """Take an idle instance, unless waiters come first or an instance runs alone on its devices.

        timeout_s: for the lock; LockTimeoutError after that.
        """
        session = self.session
        with session.namespace.transaction(timeout_s) as t:
            row = session.held.find_idle(self.tag, self.request.usable_on)
            return None if row is None else self._take_row(t, row)

    def _take_row(self, t: Transaction, row: int) -> LoadedInstance | None:
        session, namespace, scheduler = self.session, self.session.namespace, self.session.scheduler
        if scheduler.beside_isolation(row):
            return None
        if scheduler.must_queue() and not (session.held.has_tenure(self.tag, row) or scheduler.may_take(row)):
            return None
        namespace.transitions.holds.take_idle(t, row, namespace.reference)
        if self.request.keep_alive:
            model = namespace.tables.instances[row].model
            namespace.transitions.models.keep_alive(t, model, self.request.keep_alive)
        return session.held.add(row, self.tag, self.operation)

    # ---- to the ticket -------------------------------------------------------------------------------------

    def enqueue(self, wait_for_row: bool = True) -> LoadedInstance | None:
        """Join the queue, or return an instance that has become idle meanwhile.

        The policy may answer the ticket within the same transaction.

        wait_for_row: sleep if no row for the model is free yet; otherwise raise NoRowYet, for the caller to call this
        again. Raises QueueFullError, TableFullError, NothingFree, LockTimeoutError.
        """
        session, self.row, self.planned = self.session, -1, True
        may_know = self.request.is_plain and not (self.preload or self.nested or self.takes_only_free)
        if may_know and self._queue_quickly():
            return None
        if may_know and session.scheduler.may_know_the_wait(self.tag):
            copy = self._take_or_wait()
            if copy is not None or self.row >= 0:
                return copy
        session.figures.ensure_fresh_to_queue(self.left_s())
        if self.request.if_free:
            self._enqueue_if_free()
        elif wait_for_row:
            making_room(session, self.tag, self.deadline, self._enqueue_with_plan)
        else:
            make_room(session, self.tag, self.began, self.deadline, self._enqueue_with_plan)
        self._log_queued()
        return None

    def _queue_quickly(self) -> bool:
        """Do what `_take_or_wait` does if there is nothing to take, in the compiled core. Takes the lock itself.

        Return False, with nothing changed, if the request needs Python.
        """
        session, namespace = self.session, self.session.namespace
        core = namespace.lock.core
        # Only Python takes a copy that is kept for this process.
        if core is None or self.request is not ANYWHERE or session.tenures.kept(self.tag) is not None:
            return False
        deadline_ns, visible = self.deadline_ns(), session.samples.visible_bits()
        asked = (namespace, namespace.reference, namespace.tables.rows_of_tags, self.tag, self.operation)
        row = core.queue(*asked, deadline_ns, visible, CALLED_UP_FOR_NS, self.left_s())
        if row < 0:
            return False
        self.row, self.planned = row, False
        self._log_queued()
        return True

    def _take_or_wait(self) -> LoadedInstance | None:
        """Take an idle instance, or queue if it is known without a plan that the request has to wait.

        If only a plan can tell, nothing changes: there is no ticket, and None is returned.
        """
        session, namespace = self.session, self.session.namespace
        with suppress(TableFullError), namespace.transaction(self.left_s()) as t:
            row = session.held.find_idle(self.tag)
            copy = None if row is None else self._take_row(t, row)
            if copy is not None:
                return copy
            model = namespace.tables.model_row(self.tag)
            cause = None if model is None else session.scheduler.known_wait(model)
            if model is not None and cause is not None:
                self._make_ticket(t, model, cause)
                self._expect_place(model)
                t.after.append(self._log_queued)
        return None

    def _enqueue_if_free(self) -> None:
        try:
            self._enqueue_with_plan()
        except TableFullError:
            raise NothingFree from None

    def _enqueue_with_plan(self) -> None:
        """Queue, and have the policy decide for all requests that wait."""
        session, namespace = self.session, self.session.namespace
        encoded = encoded_tag(self.tag)
        with namespace.transaction(self.left_s()) as t:
            model = namespace.transitions.models.claim(t, self.tag, encoded)
            if session.estimates_file is not None:
                session.estimates_file.recall(t, model, self.tag, self.request.span)
            if self.request.expect_mb:
                namespace.transitions.estimates.expect(t, model, self.request.expect_mb)
            self._make_ticket(t, model)
            if self.request.if_free and session.scheduler.why_not_at_once(self.row, or_ever=True) is not None:
                self.operation.ticket = None
                raise NothingFree
            self.plan(t)
            self._expect_place(model)

    def _make_ticket(self, t: Transaction, model: int, cause: Cause | None = None) -> None:
        """Make the ticket. cause: why it waits, if that is known."""
        session, namespace, request = self.session, self.session.namespace, self.request
        if request.keep_alive:
            namespace.transitions.models.keep_alive(t, model, request.keep_alive)
        if request.users:
            namespace.transitions.models.set_users(t, model, request.users)
        known = session.scheduler.is_known(model) or namespace.tables.header.source_accounting_only
        priority = PRELOAD_PRIORITY if self.preload else 1 if known else 0
        row = namespace.transitions.tickets.enqueue(
            *(t, model, namespace.slot, priority, session.scheduler.need_mb(model), self.deadline_ns(), self.preload),
            *(request.loadable_on or session.samples.visible_bits(), request.usable_on, request.span, self.nested),
            *(cause, request.urgency, request.steady),
        )
        self.note_ticket(row)

    def _expect_place(self, model: int) -> None:
        """Refuse a newcomer that would have to wait behind as many requests as `max_waiting` allows.

        The exception undoes its transaction.

        Raises QueueFullError.
        """
        session, queue = self.session, self.session.namespace.reads.queue
        waiting = queue.waits_for(model)
        most = self.request.max_waiting
        if not self.preload:
            most = min(most, session.namespace.settings.max_waiting)
        if waiting <= most or not queue.is_waiting(self.row):
            return
        expected_s = session.scheduler.expected_wait_s(self.row)
        self.operation.ticket = None
        raise QueueFullError(
            f"model {session.namespace.tables.called(self.tag)}: {waiting - 1} requests wait for it already, and "
            f"max_waiting={most:.0f} allows no more; another would wait for about {expected_s:.1f} s: try again "
            "then, or raise max_waiting",
            tag=self.tag,
            waiting=waiting - 1,
            max_waiting=int(most),
            retry_after_seconds=expected_s,
        )

    def _log_queued(self) -> None:
        self.log_info("Queued for %s: ticket %s", self.tag, self.operation.ticket)

    # ---- from the answer -----------------------------------------------------------------------------------

    def await_grant(self) -> LoadedInstance | None:
        """Sleep in the compiled core for a moment at most, and take the instance that the ticket was granted.

        The grant usually comes soon, which saves preparing what `acquire.py` needs for a longer sleep. Return None if
        that sleep is needed, or if the answer is another one.
        """
        core = self.session.namespace.lock.core
        if core is None:
            return None
        until_ns = to_ns(min(self.deadline, time.monotonic() + FIRST_SLEEP_S))
        if core.await_answer(self.row, until_ns, 0, called_up_for_ns(), SPIN_NS) != Ticket.GRANTED:
            return None
        return self.take_grant()

    def take_grant(self) -> LoadedInstance | None:
        """Take the instance that the ticket was granted, without the lock; None if that needs `act`."""
        return self.session.held.take_granted(self.row, self.tag, self.operation)

    def _take(self, state: int, instance: int) -> LoadedInstance | Booking:
        session, namespace = self.session, self.session.namespace
        if state == Ticket.GRANTED:
            return session.held.add(instance, self.tag, self.operation)
        copy = namespace.tables.instances[instance]
        self.operation.booking = (instance, copy.generation)
        alone, resumes = namespace.transitions.isolation.runs_alone(instance), copy.state == Instance.RESUMING
        return Booking(*self.operation.booking, alone, resumes)

    def _refused(self, need_mb: float) -> ModelTooLargeError:
        limit_mb, device = largest_limit(self.session, self.request)
        return ModelTooLargeError(
            f"model {self.session.namespace.tables.called(self.tag)} needs {need_mb:.0f} MB, and the limit of "
            f"{device!r} is {limit_mb:.0f} MB: it can never be loaded; slack_percentage, and memory_budget_mb (host) "
            "or fallback_memory_mb (booked), set the limit",
            tag=self.tag,
            need_mb=need_mb,
            limit_mb=limit_mb,
            device=device,
        )
