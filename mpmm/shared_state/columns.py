"""Typed reads of whole tables: `tables.ticket_columns().deadline` instead of a column by its number.

For NumPy choices among many rows. A column has an entry for each row that was ever in use, including free ones, and is
a view of the live segment: it needs the lock, and must not be kept, because that would keep the mapping open.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from mpmm.shared_state.layout import Device, Instance, Model, Ticket

__all__ = ["Columns", "DeviceColumns", "InstanceColumns", "ModelColumns", "TicketColumns"]

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.float64]
Array = TypeVar("Array", Words, Numbers)


class Columns:
    """The rows of a table that were ever in use."""

    __slots__ = ("_rows",)

    def __init__(self, rows: Words) -> None:
        self._rows = rows


class _Column(Generic[Array]):
    """One word of every row."""

    def __init__(self, place: int, kind: type[Any]) -> None:
        self._place = place
        self._kind = kind

    @overload
    def __get__(self, columns: None, owner: type[Columns]) -> _Column[Array]: ...
    @overload
    def __get__(self, columns: Columns, owner: type[Columns]) -> Array: ...
    def __get__(self, columns: Columns | None, owner: type[Columns]) -> _Column[Array] | Array:
        if columns is None:
            return self
        found: Array = columns._rows[:, self._place].view(self._kind)
        return found


def _words(place: int) -> _Column[Words]:
    return _Column(place, np.uint64)


def _numbers(place: int) -> _Column[Numbers]:
    return _Column(place, np.float64)


class ModelColumns(Columns):
    """Tags and leases."""

    __slots__ = ()

    state = _words(Model.STATE)
    active = _words(Model.ACTIVE)
    idle = _words(Model.IDLE)
    loading = _words(Model.LOADING)
    waiting = _words(Model.WAITING)
    pins = _words(Model.PINS)
    failures = _words(Model.FAILURES)
    suspended = _words(Model.SUSPENDED)
    keep_alive = _words(Model.KEEP_ALIVE)
    known = _words(Model.KNOWN)
    estimate_mb = _numbers(Model.ESTIMATE_MB)
    expect_mb = _numbers(Model.EXPECT_MB)
    load_s = _numbers(Model.LOAD_S)
    suspend_s = _numbers(Model.SUSPEND_S)
    resume_s = _numbers(Model.RESUME_S)
    superseded = _words(Model.SUPERSEDED)
    unsuspendable = _words(Model.UNSUSPENDABLE)


class InstanceColumns(Columns):
    """Copies and leases that are held."""

    __slots__ = ()

    state = _words(Instance.STATE)
    model = _words(Instance.MODEL)
    mb = _numbers(Instance.MB)
    since = _words(Instance.SINCE)
    unload_late = _words(Instance.UNLOAD_LATE)
    seat_of = _words(Instance.SEAT_OF)
    seats = _words(Instance.SEATS)
    devices = _words(Instance.DEVICES)
    way = _words(Instance.WAY)


class TicketColumns(Columns):
    """Waiters."""

    __slots__ = ()

    state = _words(Ticket.STATE)
    number = _words(Ticket.NUMBER)
    priority = _words(Ticket.PRIORITY)
    model = _words(Ticket.MODEL)
    enqueued = _words(Ticket.ENQUEUED)
    deadline = _words(Ticket.DEADLINE)
    reason = _words(Ticket.REASON)
    head_of_line_at = _words(Ticket.HEAD_OF_LINE_AT)
    rank = _words(Ticket.RANK)


class DeviceColumns(Columns):
    """Accelerators, or the host's memory."""

    __slots__ = ()

    external_mb = _numbers(Device.EXTERNAL_MB)
    external_least_mb = _numbers(Device.EXTERNAL_LEAST_MB)
    returning_mb = _numbers(Device.RETURNING_MB)
