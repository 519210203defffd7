"""Instances ahead of use, or without a use: preloads, resumes, and loads that are reserved by hand.

They queue like an acquire, and the instances that they make are idle afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mpmm.errors import AcquireTimeoutError, LockTimeoutError
from mpmm.model_manager.acquire import load_booked, queue
from mpmm.model_manager.acquisition import Acquisition, Booking, NothingFree
from mpmm.model_manager.load import give_up_booking
from mpmm.model_manager.operations import LoadedInstance
from mpmm.model_manager.refusals import expect_own_time_left
from mpmm.model_manager.release import give_back, give_back_held
from mpmm.shared_state.layout import Ticket

if TYPE_CHECKING:
    from mpmm.model_manager.attachment import Attachment

__all__ = ["book", "preload", "resume_all"]


def preload(acquisition: Acquisition, loader: Callable[[], Any]) -> int:
    """Load until there are `acquisition.preload` instances that this process can use; return how many it has loaded."""
    session, operation, tag = acquisition.session, acquisition.operation, acquisition.tag
    acquisition.note_keep_alive()
    for loaded in range(acquisition.preload):
        answer = None
        with suppress(NothingFree):
            answer = _queue_in_time(acquisition)
        if not isinstance(answer, Booking):
            return loaded
        try:
            load_booked(acquisition, answer, loader)
        except NothingFree:
            # The instance could not be resumed, and there is no room to load another one.
            return loaded
        if operation.held is not None and session.held.take_off_hold(operation.held, operation):
            give_back(session, tag, operation.held[0], used=False)
        operation.held = None
    return acquisition.preload


def resume_all(acquisition: Acquisition) -> int:
    """Resume the suspended instances of a model that this process can use; return how many."""
    session, operation, tag = acquisition.session, acquisition.operation, acquisition.tag
    resumed = 0
    acquisition.preload = Ticket.ONLY_RESUMES
    # No more than there are now: other processes may suspend them again as quickly, to resume their own.
    for _ in range(session.suspender.suspended_of(tag)):
        answer = _queue_in_time(acquisition)
        if not isinstance(answer, Booking):
            # Others have resumed or dropped those that were left.
            break
        if not session.suspender.resume(answer.row, answer.generation):
            operation.booking = None
            continue
        with session.namespace.transaction() as t:
            if session.suspender.end_resume(t, answer.row, answer.generation):
                session.owned.add_seats(answer.row)
                session.scheduler.release(t, answer.row, used=False)
                resumed += 1
        operation.booking = None
    return resumed


def book(attachment: Attachment, tag: str, alone: bool) -> bool:
    """Book a load for the calling thread, waiting up to `lock_timeout_seconds`; return whether it has one.

    alone: the load is to have its devices to itself. A booking of the other kind, or an idle instance, is given back.
    """
    session, bookings = attachment.connected(), attachment.bookings
    operation = session.begin(sys._getframe())
    granted = False
    try:
        acquisition = attachment.acquisition(
            session, operation, tag, timeout_s=attachment.settings.lock_timeout_seconds
        )
        answer = queue(acquisition)
        granted = isinstance(answer, Booking) and answer.alone == alone
        if isinstance(answer, Booking) and granted:
            bookings.by_tag[tag] = session, answer
            attachment.bookings_made = True
        elif isinstance(answer, Booking):
            give_up_booking(session, answer)
        elif operation.held is not None and session.held.take_off_hold(operation.held, operation):
            give_back_held(session, operation, tag)
        session.end(operation)
    except AcquireTimeoutError:
        session.end(operation)
    except BaseException:
        bookings.by_tag.pop(tag, None)
        session.abandon(operation)
        raise
    return granted


def _queue_in_time(acquisition: Acquisition) -> LoadedInstance | Booking | None:
    """Queue with the full waiting time, which also limits the wait for the lock."""
    acquisition.begin_anew()
    try:
        return queue(acquisition)
    except LockTimeoutError as error:
        expect_own_time_left(acquisition.session, acquisition.tag, error)
        raise
