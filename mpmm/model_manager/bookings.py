"""Loads that a thread has reserved by hand, with Beam's `should_spawn_model` and `try_enter_isolation_mode`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpmm.model_manager.acquisition import Booking
    from mpmm.model_manager.operations import Operation
    from mpmm.model_manager.session import Session

__all__ = ["ThreadBookings"]


class ThreadBookings(threading.local):
    """The loads that the calling thread has reserved with one manager, for its next `acquire_model` of the same tag.

    by_tag: each with the session for which it was reserved: a forked child, or a manager that has joined again, has
    another one, and no part in it.
    """

    def __init__(self) -> None:
        self.by_tag: dict[str, tuple[Session, Booking]] = {}

    def take(self, session: Session, operation: Operation, tag: str) -> Booking | None:
        """Take the booking of a session for a tag, if there is one; `operation` is responsible for it from now on."""
        found = self.by_tag.get(tag)
        if found is None:
            return None
        reserved_for, booking = found
        is_ours = reserved_for is session
        if is_ours:
            operation.booking = booking.row, booking.generation
        del self.by_tag[tag]
        return booking if is_ours else None
