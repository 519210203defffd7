"""Texts for the log and for errors about waits, loads and evictions: their reasons, and the processes they wait for.

All of it is read without the lock, and only if it will be reported. It is advice for people: if it is read during
another process's transaction, it may be off by what that changes.
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
# When the log says that a request waits. Most waits end earlier, and 120 s is still far from the usual time-out.
WARN_AFTER_S = (5.0, 30.0, 120.0)
# How many processes, and copies of each, are named; further ones are only counted.
PROCESSES_NAMED = 5
COPIES_NAMED = 3
# When it is said on a terminal, where someone may be watching.
SAY_AFTER_S = (1.0, 5.0, 30.0, 120.0, 600.0, 3600.0)
# A decision is carried out at once, so it is among the last events, unless a great deal happens.
EVENTS_LOOKED_AT = 512
# No request waits for these: they make room as soon as a request needs it.
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
    """What a ticket waits for. model: a row; None for instances of any model on the devices (bits, 0 for all)."""

    model: int | None
    devices: int


class _Held(NamedTuple):
    pid: int
    what: str
    seconds: float


def wanted_by(namespace: Namespace, ticket: int) -> Wanted:
    """Return what a ticket (row) waits for now."""
    found = namespace.tables.tickets[ticket]
    return Wanted(found.model if found.reason in _OF_THE_MODEL else None, found.loadable_on)


def held_by(namespace: Namespace, wanted: Wanted) -> str:
    """Return which processes hold what is wanted, and for how long, longest first; empty if none."""
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
        # Each is read once, because without the lock they may change in between.
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
    """Tell whether a logger reports what happens; if it does not, nothing is looked up for it."""
    return logger.isEnabledFor(logging.INFO)


def decision(namespace: Namespace, kind: EventKind, row: int) -> str:
    """Return why the last event of a kind about an instance (row) was decided; empty if that is not known."""
    tables, capacity = namespace.tables, namespace.segment.layout.events.capacity
    newest = tables.header.events
    for sequence in range(newest, max(0, newest - min(EVENTS_LOOKED_AT, capacity)), -1):
        event = tables.events[(sequence - 1) % capacity]
        if event.instance != row:
            continue
        if event.kind != kind:
            # Earlier events are about another copy, which had the same row.
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
    """Return the devices of an instance (row), as text for the log."""
    devices = namespace.tables.instances[row].devices
    return f"device{'s' if len(devices) > 1 else ''} {' and '.join(map(str, devices))}"


def say_at_terminal(manager: ModelManager, says: logging.Handler | None) -> None:
    """Show a process's own warnings of long waits, sooner than in a log, because someone may be watching.

    says: shows them; None if no one is.
    """
    if says is None:
        return
    manager._connected().warn_after_s = SAY_AFTER_S
    logger = logging.getLogger("mpmm.waits")
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(says)


class WaitWarning:
    """Logs that a ticket has waited for long, a few times at growing intervals.

    Only the request that has waited longest for the model logs the first time, and counts the others. Otherwise each
    of 32 workers would write the same line at the same moment.
    """

    def __init__(self, namespace: Namespace, scheduler: Scheduler, warn_after_s: Sequence[float], ticket: int) -> None:
        self._namespace = namespace
        self._scheduler = scheduler
        self._ticket = ticket
        found = namespace.tables.tickets[ticket]
        self._since_s = found.enqueued / 1e9
        waited_s = time.monotonic() - self._since_s
        # A preload queues behind all requests for use, and its caller expects it to wait. A resume takes only a moment.
        thresholds = () if found.preload not in (0, Ticket.ONLY_RESUMES) else warn_after_s
        if len(thresholds) > 1 and namespace.reads.queue.comes_after_another(ticket):
            thresholds = thresholds[1:]
        self._left = [seconds for seconds in thresholds if seconds > waited_s]

    def in_s(self) -> float:
        """Return in how many seconds there is something to log, `inf` for never again."""
        return self._since_s + self._left[0] - time.monotonic() if self._left else math.inf

    def say(self) -> None:
        """Log the wait."""
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
