"""The whole state of a namespace as plain values, read from outside: `inspect`, `check` and the dashboard build on it.

`records` declares the fields, `kinds` says what their words mean, `decode` turns a copy of the segment into records,
and `read` makes the copy. None of them needs NumPy, and psutil only in rare cases, because importing those takes longer
than a snapshot.
"""

from mpmm.shared_state.snapshot.decode import ALL_EVENTS, EventChoice, decode
from mpmm.shared_state.snapshot.read import DeadMakerError, find_lost_namespaces, find_namespaces, read_snapshot
from mpmm.shared_state.snapshot.records import (
    FORGOTTEN,
    DeviceInfo,
    EventInfo,
    InstanceInfo,
    LockInfo,
    MemberInfo,
    ModelInfo,
    ObservationInfo,
    PinInfo,
    Snapshot,
    TicketInfo,
    as_json,
)

__all__ = [
    "ALL_EVENTS",
    "FORGOTTEN",
    "DeadMakerError",
    "DeviceInfo",
    "EventChoice",
    "EventInfo",
    "InstanceInfo",
    "LockInfo",
    "MemberInfo",
    "ModelInfo",
    "ObservationInfo",
    "PinInfo",
    "Snapshot",
    "TicketInfo",
    "as_json",
    "decode",
    "find_lost_namespaces",
    "find_namespaces",
    "read_snapshot",
]
