"""Acquiring an instance of a model: the steps of an `Acquisition`, with a sleep where it has to wait.

    the call                                        the step                              under the lock
    ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    an idle instance, and no request waits          `take_at_once`, or `take_idle`         holds.take_idle
    otherwise it queues                             `enqueue`                              enqueue, advance
    … and sleeps until another process answers
        granted an instance: it returns that        `take_grant`, or `act`                 consume_answer
        told to load, or to resume: it does so      `act`, then `load.py`                  consume_answer … loads.end
        told that it can never fit: it raises       `act`                                  consume_answer
    at the deadline it leaves, and raises           `leave`                                leave_queue

In `advance` (`mpmm.scheduling`) the policy decides for all requests that wait. Each process that changes something runs
it, so that a release hands the instance straight to the ticket that the policy chooses.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from mpmm.errors import ClosedError, LockTimeoutError, MpmmError
from mpmm.interpreter.process_end import stand_still_in_daemon
from mpmm.model_manager.acquisition import SPIN_NS, Acquisition, Booking
from mpmm.model_manager.load import LoadAttempt, resume
from mpmm.model_manager.nested import end_isolation, expect_no_deadlock
from mpmm.model_manager.operations import LoadedInstance
from mpmm.model_manager.queued_request import GrantRolledBack, QueuedRequest
from mpmm.model_manager.refusals import expect_mapped, expect_own_time_left
from mpmm.model_manager.release import discard
from mpmm.model_manager.request import ANYWHERE, AcquireOptions, read_options
from mpmm.model_manager.session import Session
from mpmm.model_manager.tenure import called_up_for_ns
from mpmm.model_manager.unload import collect_garbage
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Ticket

if TYPE_CHECKING:
    from mpmm.model_manager.attachment import Attachment
    from mpmm.model_manager.operations import Operation

__all__ = ["acquire", "load_booked", "queue", "sleep_until_answered"]

T = TypeVar("T")


def acquire(
    attachment: Attachment,
    session: Session,
    operation: Operation,
    tag: str,
    loader: Callable[[], Any],
    options: AcquireOptions,
    began: float,
) -> Any:
    """Return an instance, which `operation` has noted as held. began: `time.monotonic()` at the caller's call."""
    if attachment.bookings_made:
        booking = attachment.bookings.take(session, operation, tag)
        if booking is not None:
            acquisition = attachment.acquisition(session, operation, tag, ANYWHERE)
            return load_booked(acquisition, booking, loader)
    request = read_options(options, session.samples) if options else ANYWHERE
    try:
        timeout_s = attachment.settings.wait_timeout_seconds
        may_be_quick = not (request.usable_on or request.keep_alive)
        quick = session.held.take_at_once(tag, operation, timeout_s) if may_be_quick else None
        if quick is not None:
            if session.held.handle_is_alive(quick):
                return quick.value
            discard(session, operation, quick)
        acquisition = attachment.acquisition(session, operation, tag, request, began)
        found = find(acquisition)
    except ValueError as error:
        expect_mapped(session, error)
        raise
    return load_booked(acquisition, found, loader) if isinstance(found, Booking) else found.value


def find(acquisition: Acquisition) -> LoadedInstance | Booking:
    """Return a live instance, which this process holds now, or the permission to load one."""
    session = acquisition.session
    try:
        acquisition.note_keep_alive()
        while True:
            found = take_before_queueing(acquisition, acquisition.left_s()) or queue(acquisition)
            if isinstance(found, Booking):
                return found
            # None stands for enough instances, which only a preload is told.
            if found is not None:
                if session.held.handle_is_alive(found):
                    return found
                discard(session, acquisition.operation, found)
    except LockTimeoutError as error:
        expect_own_time_left(session, acquisition.tag, error)
        raise


def take_before_queueing(acquisition: Acquisition, timeout_s: float) -> LoadedInstance | None:
    """Take an idle instance if no request waits for one, or if it is kept for this process a moment longer.

    timeout_s: for the lock; LockTimeoutError after that.
    """
    session, tag = acquisition.session, acquisition.tag
    if session.scheduler.may_have_to_wait(tag) and not session.held.comes_back(tag):
        return None
    if acquisition.request.is_plain and not session.held.may_find_idle(tag):
        return None
    request = acquisition.request
    may_be_kept = not (request.usable_on or request.keep_alive)
    kept = session.held.take_kept(tag, acquisition.operation, timeout_s) if may_be_kept else None
    return kept or acquisition.take_idle(timeout_s)


def queue(acquisition: Acquisition) -> LoadedInstance | Booking | None:
    """Wait in the queue; return an instance that this process holds now, or the permission to load one.

    None stands for enough instances, which only a preload is told.
    """
    session = acquisition.session
    firm, alone = session.thread.rows()
    acquisition.nested = bool(firm or alone)
    end_isolation(session, (*firm, *alone))
    try:
        with session.waiting():
            copy = acquisition.enqueue()
            if copy is not None:
                return copy
            expect_no_deadlock(acquisition, firm)
            return sleep_until_answered(acquisition)
    except ClosedError:
        # First, because a process that leaves waits for calls in progress, and this one may never return.
        session.abandon(acquisition.operation)
        stand_still_in_daemon()
        raise


def sleep_until_answered(request: QueuedRequest[T]) -> T | None:
    """Wait for the answer to a ticket, and act on it. Raises AcquireTimeoutError at the deadline."""
    if not request.planned and (granted := _await_grant(request)) is not None:
        return granted
    while (state := _answer(request)) is not None:
        if state == Ticket.GRANTED and (granted := request.take_grant()) is not None:
            return granted
        with suppress(GrantRolledBack):
            return request.act()
    raise request.time_out()


def _await_grant(request: QueuedRequest[T]) -> T | None:
    """Call `await_grant`; on an exception, take the ticket out of the queue."""
    try:
        return request.await_grant()
    except BaseException:
        request.leave()
        raise


def _answer(request: QueuedRequest[Any]) -> int | None:
    """Have evicted instances unloaded, then sleep; on an exception, take the ticket out of the queue."""
    try:
        if request.planned:
            request.session.unloads.unload_in_thread()
        return _sleep(request.session, request.row, request.deadline)
    except BaseException:
        request.leave()
        raise


def _sleep(session: Session, row: int, deadline: float) -> int | None:
    """Sleep until the ticket (row) has an answer, and return its state; None once the deadline has passed."""
    queue = session.namespace.reads.queue
    signal = queue.signal(row)
    again = session.look_again(row)
    while True:
        seen = signal.seen()
        # This read needs no lock: `take_grant` and `act` make sure that what it sees was committed.
        if (state := queue.state(row)) != Ticket.WAITING:
            return state
        if session.closing:
            raise ClosedError("the manager was shut down while a thread waited for a model")
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        look_in_s = again.in_s()
        if look_in_s <= 0:
            again.look()
            continue
        left = min(left, look_in_s)
        if (core := session.namespace.lock.core) is not None:
            until_ns = to_ns(time.monotonic() + left)
            core.await_answer(row, until_ns, again.called_up, called_up_for_ns(), SPIN_NS)
            continue
        signal.wait(seen, left)
        if signal.seen() == seen:
            session.scheduler.spin_for_answer(row)


# ---- told to load ----------------------------------------------------------------------------------------------


def load_booked(acquisition: Acquisition, booking: Booking, loader: Callable[[], Any]) -> Any:
    """Load, or resume, what `booking` stands for, and return it.

    If the loader runs out of memory, room is made, and the request queues for a second turn. A load that had its
    devices to itself, and has no larger ones to try, gets none, because nothing can be unloaded for it; neither does a
    request that takes only what is free.
    """
    try:
        return _load_booked(acquisition, booking, loader)
    except ValueError as error:
        expect_mapped(acquisition.session, error)
        raise


def _load_booked(acquisition: Acquisition, booking: Booking, loader: Callable[[], Any]) -> Any:
    found: LoadedInstance | Booking | None = booking
    # A second turn needs room to be made, and none is made for a request that takes only what is free.
    is_last = acquisition.takes_only_free
    while isinstance(found, Booking):
        if found.resumes:
            found = resume(acquisition, found) or _queue_again(acquisition)
            continue
        attempt = LoadAttempt(acquisition, found, loader, last=is_last)
        try:
            return attempt.run().value
        except Exception as error:
            if not attempt.again:
                raise
            failure = error
        # Its frames would keep alive what was loaded so far, and with it the memory.
        traceback.clear_frames(failure.__traceback__)
        collect_garbage()
        is_last, found = True, None
        with suppress(MpmmError):
            acquisition.session.out_of_memory.make_room(attempt.devices)
            acquisition.session.unloads.wait_for_unloads(attempt.devices)
            found = _queue_again(acquisition)
        try:
            if found is None:
                raise failure
        finally:
            # Its traceback has this frame, so they would keep each other, and all callers, with the manager and loader.
            del failure
    return None if found is None else found.value


def _queue_again(acquisition: Acquisition) -> LoadedInstance | Booking | None:
    acquisition.begin_anew()
    return queue(acquisition) if acquisition.preload else find(acquisition)
