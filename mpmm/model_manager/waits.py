"""What the log and errors say of waits, loads and evictions: why, and which processes have what somebody waits for.

All of it is read without the lock, and only where it is going to be said. It is advice for people: it may fall into
somebody's transaction, and then is off by what that changes.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mpmm.policy.reasons import explain
from mpmm.policy.view import Reason
from mpmm.scheduling import Scheduler
from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Instance, Ticket, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.text.printable import printable_logger

if TYPE_CHECKING:
    from mpmm.model_manager.manager import ModelManager

__all__ = [
    "WARN_AFTER_S",
    "WaitWarning",
    "Wanted",
    "decision",
    "held_by",
    "say_at_terminal",
    "says_more",
    "wanted_by",
    "where",
]

# A child of the logger of all others, so that `mpmm run` can have these messages alone.
_LOG = printable_logger("mpmm.waits")
# The log says that somebody waits after so long. Most waits end earlier, and 120 s is far from the usual time-out yet.
WARN_AFTER_S = (5.0, 30.0, 120.0)
# More processes, and more copies of one, are only counted.
PROCESSES_NAMED = 5
COPIES_NAMED = 3
# Where somebody sits at a terminal.
SAY_AFTER_S = (1.0, 5.0, 30.0, 120.0, 600.0, 3600.0)
# A decision is carried out at once, so it is among the last events, unless very much happens.
EVENTS_LOOKED_AT = 512
# These are not waited for: they make room as soon as a request wants it.
_NOT_HELD = frozenset({Instance.FREE, Instance.IDLE, Instance.SUSPENDED})
_VERBS = {
    Instance.LOADING: "loads {tag}",
    Instance.ACTIVE: "holds {tag}",
    Instance.UNLOADING: "unloads {tag}",
    Instance.LEASED: "leases {mb:.0f} MB as {tag}",
    Instance.SUSPENDING: "suspends {tag}",
    Instance.RESUMING: "resumes {tag}",
}
_OF_THE_MODEL = frozenset({Reason.SHARING, Reason.COPIES, Reason.ONLY_COPY})


class Wanted(NamedTuple):
    """What a ticket waits for. model: a row, None for what is on the devices (bits, 0 for all), whichever model's."""

    model: int | None
    devices: int


class _Held(NamedTuple):
    pid: int
    what: str
    seconds: float


def wanted_by(namespace: Namespace, ticket: int) -> Wanted:
    """Return what a ticket (row) waits for at present."""
    found = namespace.tables.tickets[ticket]
    return Wanted(found.model if found.reason in _OF_THE_MODEL else None, found.loadable_on)


def held_by(namespace: Namespace, wanted: Wanted) -> str:
    """Return which processes have what is wanted, and for how long, those that have it longest first; empty if none."""
    holds = sorted(_holds(namespace, wanted), key=lambda held: -held.seconds)
    by_pid: dict[int, list[_Held]] = defaultdict(list)
    for held in holds:
        by_pid[held.pid].append(held)
    if not by_pid:
        return ""
    texts = []
    for pid, helds in list(by_pid.items())[:PROCESSES_NAMED]:
        named = [f"{held.what} for {held.seconds:.0f} s" for held in helds[:COPIES_NAMED]]
        more = len(helds) - COPIES_NAMED
        texts.append(f"pid {pid} {', '.join(named)}{f' and {more} more' if more > 0 else ''}")
    if len(by_pid) > PROCESSES_NAMED:
        texts.append(f"{len(by_pid) - PROCESSES_NAMED} more processes")
    if set(by_pid) == {namespace.pid}:
        return f"this process itself has all of it: {texts[0]}"
    return "; ".join(texts)


def _holds(namespace: Namespace, wanted: Wanted) -> list[_Held]:
    tables, now_ns, found = namespace.tables, time.monotonic_ns(), []
    for row in tables.used_rows(namespace.segment.layout.instances):
        instance = tables.instances[row]
        # Read once each: without the lock they may change in between.
        state, holder, model = instance.state, instance.holder, instance.model
        if state in _NOT_HELD or holder is None:
            continue
        if wanted.model is not None and model != wanted.model:
            continue
        if wanted.devices and not instance.device_bits & wanted.devices:
            continue
        what = _VERBS.get(state, "has {tag}").format(tag=tables.shown(model), mb=instance.reserved_mb)
        seconds = max(0.0, (now_ns - instance.since) / 1e9)
        found.append(_Held(tables.members[holder].pid, what, seconds))
    return found


def says_more(logger: logging.Logger) -> bool:
    """Tell whether a logger wants to know what happens; where it does not, nothing is looked up for it."""
    return logger.isEnabledFor(logging.INFO)


def decision(namespace: Namespace, kind: EventKind, row: int) -> str:
    """Return why the last event of a kind that is about an instance (row) was decided; empty if that is not known."""
    tables, capacity = namespace.tables, namespace.segment.layout.events.capacity
    newest = tables.header.events
    for sequence in range(newest, max(0, newest - min(EVENTS_LOOKED_AT, capacity)), -1):
        event = tables.events[(sequence - 1) % capacity]
        if event.instance != row:
            continue
        if event.kind != kind:
            # Events before that are about another copy, which had the same row.
            if event.kind == EventKind.LOAD_BEGAN:
                return ""
            continue
        cause = event.cause
        if cause is None:
            return ""
        other = tables.shown(cause.other - 1) if cause.other else None
        figures = (cause.need_mb, cause.free_mb, cause.coming_mb, cause.seconds)
        return explain(cause.reason, *figures, other, device_rows(cause.on))
    return ""


def where(namespace: Namespace, row: int) -> str:
    """Return on which devices an instance (row) lies, as the log says it."""
    devices = namespace.tables.instances[row].devices
    return f"device{'s' if len(devices) > 1 else ''} {' and '.join(map(str, devices))}"


def say_at_terminal(manager: ModelManager, says: logging.Handler | None) -> None:
    """Show a process's own warnings of long waits; they come sooner than in a log, as somebody sits there.

    says: shows them; None where nobody sits there.
    """
    if says is None:
        return
    manager._connected().warn_after_s = SAY_AFTER_S
    logger = logging.getLogger("mpmm.waits")
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(says)


class WaitWarning:
    """Has the log say that a ticket has waited for long, a few times at growing intervals.

    The first time is left to the request that has waited longest for the model, which counts the others. Else each of
    32 workers would write the same line in the same moment.
    """

    def __init__(self, namespace: Namespace, scheduler: Scheduler, warn_after_s: Sequence[float], ticket: int) -> None:
        self._namespace = namespace
        self._scheduler = scheduler
        self._ticket = ticket
        found = namespace.tables.tickets[ticket]
        self._since_s = found.enqueued / 1e9
        waited_s = time.monotonic() - self._since_s
        # A preload stands behind all requests for use, and its caller expects it to wait. To resume takes a moment.
        thresholds = () if found.preload not in (0, Ticket.ONLY_RESUMES) else warn_after_s
        if len(thresholds) > 1 and namespace.reads.queue.comes_after_another(ticket):
            thresholds = thresholds[1:]
        self._left = [seconds for seconds in thresholds if seconds > waited_s]

    def in_s(self) -> float:
        """Return in how many seconds there is something to say, `inf` for never again."""
        return self._since_s + self._left[0] - time.monotonic() if self._left else math.inf

    def say(self) -> None:
        """Write it into the log."""
        waited_s = time.monotonic() - self._since_s
        self._left = [seconds for seconds in self._left if seconds > waited_s]
        namespace = self._namespace
        model = namespace.tables.tickets[self._ticket].model
        held = held_by(namespace, wanted_by(namespace, self._ticket))
        others = namespace.reads.queue.waits_for(model) - 1
        _LOG.warning(
            "mpmm %s: pid %d has waited %.0f s for %s, which %s%s%s",
            namespace.name,
            namespace.pid,
            waited_s,
            namespace.tables.shown(model),
            self._scheduler.sentence(self._ticket),
            f" ({held})" if held else "",
            f"; {others} more request{'s wait' if others > 1 else ' waits'} for it" if others > 0 else "",
        )
