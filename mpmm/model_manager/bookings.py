"""Loads that a thread has reserved by hand, with Beam's `should_spawn_model` and `try_enter_isolation_mode`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpmm.model_manager.acquisition import Booking
    from mpmm.model_manager.operations import Operation

__all__ = ["ThreadBookings"]


class ThreadBookings(threading.local):
    """The loads that the calling thread has reserved with one manager, for its next `acquire_model` of the same tag."""

    def __init__(self) -> None:
        self.by_tag: dict[str, Booking] = {}

    def take(self, operation: Operation, tag: str) -> Booking | None:
        """Take the booking for a tag; `operation` is responsible for it from now on."""
        booking = self.by_tag.get(tag)
        if booking is not None:
            operation.booking = booking.row, booking.generation
            del self.by_tag[tag]
        return booking
