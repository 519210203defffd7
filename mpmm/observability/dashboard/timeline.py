"""What each copy did and when, as spans on lanes: loads, holds, idle times, unloads and leases.

A seat, by which several use one copy at a time, is shown like a copy while it is used, but not while it is idle.

Each copy has a lane, named by its tag and a number: the lowest that no other copy of the tag has at the time. So a
model that is evicted and loaded again returns to its lane, and the page shows one line for it.

Uses that follow each other within `MERGED_GAP_S` become one span that says how many there were and how long they took
together: a busy host makes thousands a second, and a pixel of the page is longer than that gap.

Events say when something happened, and the snapshot has the last word: if an event of a copy was overwritten unread, or
a reset took the copy away, it begins or ends at the look that notices that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain

from mpmm.observability.event_reader import Step
from mpmm.observability.formatting import named, names_of, why
from mpmm.shared_state.snapshot import FORGOTTEN, EventInfo, InstanceInfo
from mpmm.text.printable import printable

__all__ = ["Span", "Timeline"]

MERGED_GAP_S = 0.25
# A span of merged uses is no longer than this, so that its share of busy time is that of a short time.
LONGEST_MERGED_S = 10.0
# 10 000 spans take about 5 MB; they are the last 40 minutes of 16 copies that are used all the time.
SPANS_KEPT = 10_000
_KINDS = {
    "loading": "load",
    "active": "hold",
    "unloading": "unload",
    "leased": "lease",
    "suspending": "suspend",
    "suspended": "sleep",
    "resuming": "resume",
}


@dataclass
class Span:
    """Something a copy did. Times are `time.monotonic()` in seconds; end_s is None while it lasts.

    kind: `stay` as long as the copy is loaded, and within that `hold`; `load`, `unload`, `lease`; `suspend`, `sleep`
    while it is suspended, `resume`. uses: how many uses a hold stands for, busy_s: how long those that have ended took,
    resumed_s: when the last one began. changed: number of the look at which the span changed last.
    """

    number: int
    tag: str
    lane: int
    kind: str
    begin_s: float
    pid: int | None
    devices: tuple[int, ...]
    note: str
    changed: int
    end_s: float | None = None
    busy_s: float = 0.0
    uses: int = 1
    resumed_s: float = 0.0

    def row(self) -> list[object]:
        """Return the span as the page reads it."""
        times = (self.begin_s, self.end_s, self.resumed_s)
        begin, end, resumed = (None if time_s is None else round(time_s, 3) for time_s in times)
        # To the microsecond, because a use may take a few.
        what = [self.number, printable(self.tag), self.lane, self.kind, begin, end, round(self.busy_s, 6), resumed]
        return [*what, self.uses, self.pid, self.devices, self.note]


@dataclass
class _Instance:
    """A copy that exists. doing: its open load, hold, unload or lease. last: its last hold, which may be continued."""

    tag: str
    lane: int
    devices: tuple[int, ...]
    doing: Span | None = None
    stay: Span | None = None
    last: Span | None = field(default=None, repr=False)


class Timeline:
    """Turns steps of an `EventReader` into spans; keeps the newest. Not thread-safe."""

    def __init__(self) -> None:
        # Spans that are open or may be continued, by number, and those that have ended.
        self._lasting: dict[int, Span] = {}
        self._ended: deque[Span] = deque(maxlen=SPANS_KEPT)
        self._copies: dict[int, _Instance] = {}
        self._numbers = 0
        self._look = 0
        # The pid that queued, by ticket: the event that ends a wait has the pid of the process that served it.
        self._queued: dict[int, int] = {}
        # What notes show instead of tags; spans have tags.
        self._names: dict[str, str] = {}
        self._handlers: dict[str, Callable[[EventInfo, float], None]] = {
            "load_began": self._load_began,
            "load_ended": self._load_ended,
            "load_failed": self._load_failed,
            "hit": self._used,
            "granted": self._used,
            "released": self._released,
            "unload_began": self._unload_began,
            "suspend_began": self._suspend_began,
            "suspend_ended": self._asleep,
            "suspend_failed": self._moved_in_vain,
            "resume_began": self._resume_began,
            "resume_ended": self._load_ended,
            "resume_failed": self._moved_in_vain,
            "resume_given_up": self._asleep,
            "unload_ended": self._gone,
            "leased": self._leased,
            "lease_ended": self._gone,
            "lost": self._lost,
        }

    def add(self, step: Step, look: int) -> None:
        """Add what a step contains; look: its number, which rises from step to step."""
        self._look = look
        self._names = names_of(step.snapshot)
        taken_s = step.snapshot.taken_s
        for event in step.events:
            handler = self._handlers.get(event.kind)
            if event.kind == "queued" and event.ticket is not None:
                self._queued[event.ticket] = event.pid
            elif event.kind == "left_queue" and event.ticket is not None:
                self._queued.pop(event.ticket, None)
            elif handler is not None and event.instance is not None:
                handler(event, taken_s - event.age_s)
        # Otherwise a wait whose end was overwritten unread would be kept for ever.
        self._queued = {ticket.number: ticket.pid for ticket in step.snapshot.tickets}
        self._reconcile(step.snapshot.instances, {member.slot: member.pid for member in step.snapshot.members}, taken_s)
        for span in list(self._lasting.values()):
            if span.end_s is not None and span.end_s < taken_s - MERGED_GAP_S:
                self._ended.append(self._lasting.pop(span.number))

    def since(self, look: int, from_s: float) -> list[list[object]]:
        """Return the spans that have changed after a look, and that have not ended before a moment."""
        return [
            span.row()
            for span in chain(self._ended, self._lasting.values())
            if span.changed > look and (span.end_s is None or span.end_s >= from_s)
        ]

    # ---- spans ---------------------------------------------------------------------------------------------

    def _open(self, copy: _Instance, kind: str, begin_s: float, pid: int | None, note: str = "") -> Span:
        self._numbers += 1
        devices = copy.devices
        span = Span(self._numbers, copy.tag, copy.lane, kind, begin_s, pid, devices, note, self._look)
        span.resumed_s = begin_s
        self._lasting[span.number] = span
        return span

    def _close(self, span: Span | None, end_s: float, note: str = "") -> None:
        if span is not None and span.end_s is None:
            span.end_s = max(end_s, span.begin_s)
            span.busy_s += max(0.0, end_s - span.resumed_s)
            span.note = note or span.note
            span.changed = self._look

    def _finish(self, row: int, end_s: float, note: str = "") -> None:
        copy = self._copies.pop(row, None)
        if copy is not None:
            self._close(copy.doing, end_s, note)
            self._close(copy.stay, end_s, note)

    def _new(self, row: int, tag: str | None, devices: tuple[int, ...], begin_s: float) -> _Instance:
        self._finish(row, begin_s)
        tag = tag or FORGOTTEN
        taken = {copy.lane for copy in self._copies.values() if copy.tag == tag}
        lane = next(number for number in range(1, len(taken) + 2) if number not in taken)
        self._copies[row] = copy = _Instance(tag, lane, devices)
        return copy

    def _known(self, event: EventInfo, at_s: float) -> _Instance:
        """Return the copy that an event is about; one that was not known yet is taken to have been idle."""
        assert event.instance is not None, "`add` has looked"
        copy = self._copies.get(event.instance)
        if copy is None or event.tag not in (None, FORGOTTEN, copy.tag):
            copy = self._new(event.instance, event.tag, (), at_s)
        return copy

    def _why(self, event: EventInfo) -> str:
        return printable(why(named(event, self._names)))

    def _pid(self, event: EventInfo) -> int:
        return event.pid if event.ticket is None else self._queued.pop(event.ticket, event.pid)

    def _hold(self, copy: _Instance, begin_s: float, pid: int | None) -> None:
        self._close(copy.doing, begin_s)
        if copy.stay is None:
            copy.stay = self._open(copy, "stay", begin_s, None)
        last = copy.last
        if (
            last is not None
            and last.end_s is not None
            and begin_s - last.end_s < MERGED_GAP_S
            and begin_s - last.begin_s < LONGEST_MERGED_S
        ):
            last.end_s, last.resumed_s, last.pid, last.changed = None, begin_s, pid, self._look
            last.uses += 1
        else:
            last = self._open(copy, "hold", begin_s, pid)
        copy.doing = copy.last = last

    # ---- one kind of event each ----------------------------------------------------------------------------

    def _load_began(self, event: EventInfo, at_s: float) -> None:
        if event.instance is not None:
            copy = self._new(event.instance, event.tag, event.devices, at_s)
            copy.doing = self._open(copy, "load", at_s, self._pid(event), self._why(event))

    def _load_ended(self, event: EventInfo, at_s: float) -> None:
        self._hold(self._known(event, at_s), at_s, event.pid)

    def _load_failed(self, event: EventInfo, at_s: float) -> None:
        if event.instance is not None:
            self._finish(event.instance, at_s, "failed")

    def _used(self, event: EventInfo, at_s: float) -> None:
        self._hold(self._known(event, at_s), at_s, self._pid(event))

    def _released(self, event: EventInfo, at_s: float) -> None:
        copy = self._known(event, at_s)
        self._close(copy.doing, at_s)
        copy.doing = None

    def _unload_began(self, event: EventInfo, at_s: float) -> None:
        self._moves(event, at_s, "unload", event.pid)

    def _suspend_began(self, event: EventInfo, at_s: float) -> None:
        self._moves(event, at_s, "suspend", event.pid)

    def _asleep(self, event: EventInfo, at_s: float) -> None:
        self._moves(event, at_s, "sleep", None)

    def _resume_began(self, event: EventInfo, at_s: float) -> None:
        self._moves(event, at_s, "resume", self._pid(event))

    def _moved_in_vain(self, event: EventInfo, at_s: float) -> None:
        self._close(self._known(event, at_s).doing, at_s, "failed")
        self._moves(event, at_s, "unload", event.pid)

    def _moves(self, event: EventInfo, at_s: float, kind: str, pid: int | None) -> None:
        copy = self._known(event, at_s)
        self._close(copy.doing, at_s)
        self._close(copy.stay, at_s)
        copy.stay = copy.last = None
        copy.doing = self._open(copy, kind, at_s, pid, self._why(event))

    def _gone(self, event: EventInfo, at_s: float) -> None:
        if event.instance is not None:
            self._finish(event.instance, at_s)

    def _leased(self, event: EventInfo, at_s: float) -> None:
        if event.instance is not None:
            copy = self._new(event.instance, event.tag, event.devices, at_s)
            copy.doing = self._open(copy, "lease", at_s, self._pid(event), self._why(event))

    def _lost(self, event: EventInfo, at_s: float) -> None:
        if event.instance is not None:
            copy = self._copies.get(event.instance)
            # A copy that is being unloaded is not lost if its process ends.
            leaves = copy is not None and copy.doing is not None and copy.doing.kind == "unload"
            self._finish(event.instance, at_s, "" if leaves else "lost with its process")

    # ---- what the snapshot says ----------------------------------------------------------------------------

    def _reconcile(self, instances: Iterable[InstanceInfo], pids: dict[int, int], taken_s: float) -> None:
        there = {copy.row: copy for copy in instances}
        for row in self._copies.keys() - there.keys():
            self._finish(row, taken_s)
        for row, found in there.items():
            copy = self._copies.get(row)
            if copy is None and found.seat_of is not None and found.state == "idle":
                continue
            since_s = max(0.0, taken_s - found.for_s)
            if copy is None or copy.tag != found.tag:
                copy = self._new(row, found.tag, tuple(found.shares_mb), since_s)
            copy.devices = tuple(found.shares_mb)
            self._agree(copy, found, None if found.holder is None else pids.get(found.holder), since_s)

    def _agree(self, copy: _Instance, found: InstanceInfo, pid: int | None, since_s: float) -> None:
        """Make the open spans of a copy match its state."""
        kind = _KINDS.get(found.state)
        if copy.doing is not None and copy.doing.kind != kind:
            self._close(copy.doing, since_s)
            copy.doing = None
        stays = kind == "hold" or (kind is None and found.seat_of is None)
        if stays and copy.stay is None:
            copy.stay = self._open(copy, "stay", since_s, None)
        elif not stays:
            self._close(copy.stay, since_s)
            copy.stay = None
        if kind == "hold" and copy.doing is None:
            self._hold(copy, since_s, pid)
        elif kind is not None and copy.doing is None:
            copy.doing = self._open(copy, kind, since_s, pid)
        for span in (copy.doing, copy.stay):
            if span is not None and not span.devices:
                span.devices, span.changed = copy.devices, self._look
        if copy.doing is not None and pid is not None and copy.doing.pid != pid:
            copy.doing.pid, copy.doing.changed = pid, self._look
