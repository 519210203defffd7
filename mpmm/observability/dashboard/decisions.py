"""What the page says about an event of the ring: one sentence whose subject is the model or the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpmm.observability.event_lines import said
from mpmm.observability.formatting import named, why
from mpmm.shared_state.snapshot import EventInfo
from mpmm.text.printable import printable

__all__ = ["CATEGORIES", "decision"]

#: The kinds of events that the page lists, and their categories. Uses are too many, and the timeline has them.
CATEGORIES = {
    "load_began": "load",
    "load_ended": "load",
    "load_failed": "problem",
    "unload_began": "unload",
    "unload_ended": "unload",
    "unload_on_release": "unload",
    "suspend_began": "suspend",
    "suspend_ended": "suspend",
    "suspend_failed": "problem",
    "resume_began": "suspend",
    "resume_ended": "suspend",
    "resume_failed": "problem",
    "resume_given_up": "suspend",
    "waits": "wait",
    "left_queue": "wait",
    "refused": "problem",
    "lost": "problem",
    "out_of_memory": "problem",
    "written_off": "problem",
    "reaped": "problem",
    "reset": "problem",
    "leased": "lease",
    "lease_ended": "lease",
    "isolation_began": "measure",
    "isolation_ended": "measure",
    "estimated": "measure",
    "pinned": "pin",
    "unpinned": "pin",
    "joined": "process",
    "left": "process",
    "leader": "process",
    "settings": "process",
}


def decision(event: EventInfo, taken_s: float, names: Mapping[str, str]) -> dict[str, Any]:
    """Return an event as the page shows it.

    taken_s: when its snapshot was taken, by `time.monotonic()`. names: what people see instead of tags.
    """
    for_people = named(event, names)
    return {
        "number": event.sequence,
        "at": round(taken_s - event.age_s, 2),
        "kind": event.kind,
        "category": CATEGORIES[event.kind],
        "pid": event.pid,
        "tag": None if event.tag is None else printable(event.tag),
        "text": printable(why(for_people) or said(event)),
    }
