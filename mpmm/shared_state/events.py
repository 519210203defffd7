"""Kinds of events in the ring, with the meaning of `value`; and what caused one."""

from __future__ import annotations

from enum import IntEnum, unique
from typing import NamedTuple

__all__ = ["Cause", "EventKind", "placed"]


@unique
class EventKind(IntEnum):
    """What happened; each comment says what the event's `value` is."""

    JOINED = 1  # slot of the member
    LEFT = 2  # pid of the member; the event's own pid may be that of another process, which has found it ended
    REAPED = 3  # pid of the member that died; the event's own pid is that of the process that found it
    LEADER = 4  # slot of the member
    QUEUED = 5  # MB needed, nan if unknown
    HIT = 6  # 0
    GRANTED = 7  # seconds waited
    RELEASED = 8  # seconds held
    LOAD_BEGAN = 9  # MB reserved
    LOAD_ENDED = 10  # seconds taken
    LOAD_FAILED = 11  # seconds taken
    UNLOAD_BEGAN = 12  # MB expected back
    UNLOAD_ENDED = 13  # MB expected back
    ISOLATION_BEGAN = 14  # 0
    ISOLATION_ENDED = 15  # 0
    ESTIMATED = 16  # MB
    LEFT_QUEUE = 17  # seconds waited
    REFUSED = 18  # MB needed
    LOST = 19  # MB: the copy's server or owner died
    WRITTEN_OFF = 20  # MB that did not come back
    RESET = 21  # 0
    LEASED = 22  # MB
    LEASE_ENDED = 23  # seconds held
    PINNED = 24  # slot of the member
    UNPINNED = 25  # slot of the member
    OUT_OF_MEMORY = 26  # MB: the estimate until now, nan if there was none
    WAITS = 27  # seconds waited so far
    UNLOAD_ON_RELEASE = 28  # MB that become free once the copy is given back
    SETTINGS = 29  # 0
    SUSPEND_BEGAN = 40  # MB expected back
    SUSPEND_ENDED = 41  # seconds taken
    SUSPEND_FAILED = 42  # seconds taken: the copy is unloaded
    RESUME_BEGAN = 43  # MB reserved
    RESUME_ENDED = 44  # seconds taken
    RESUME_FAILED = 45  # seconds taken: the copy is unloaded
    RESUME_GIVEN_UP = 46  # seconds taken: the copy is suspended again


# How many devices have a bit in an event.
_DEVICES_IN_EVENTS = 32


def placed(kind: int, devices: int) -> int:
    """Return `Event.KIND` for an event about something that is placed on `devices` (bits)."""
    return kind | (devices & (1 << _DEVICES_IN_EVENTS) - 1) << 32


class Cause(NamedTuple):
    """A decision's reason (a number of `policy.view.Reason`) and its figures.

    other: reference to a model, 0 none. on: bits of the devices that it is about, 0 where they are obvious.
    """

    reason: int
    need_mb: float = 0.0
    free_mb: float = 0.0
    coming_mb: float = 0.0
    seconds: float = 0.0
    other: int = 0
    on: int = 0
