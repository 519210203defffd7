"""Events as spans for a trace viewer: Chrome's JSON format, which https://ui.perfetto.dev opens.

Each attached process is a process of the trace, with as many lanes as it does things at the same time: its waits,
loads, holds, unloads and leases are spans. Each device is a process, too: its spans show what is loaded on it when, and
a counter shows its memory. One more process stands for the namespace: its spans show which process leads, and which
model runs alone to be measured. Arrows lead from a wait to what followed, from a release to the grant that it allowed,
and from an unload to the load that it made room for.

A span is written when it ends, because only then is its lane known; `finish` writes those that have not ended. Times
are `time.monotonic()` in microseconds. `trace_tracks` writes what is decided here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mpmm.observability.event_reader import Step
from mpmm.observability.formatting import devices_of, named, names_of, why, with_names
from mpmm.observability.trace_tracks import DEVICE_PID, NAMESPACE_PID, Arrow, Span, TraceEvent, Tracks
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import FORGOTTEN, EventInfo, Snapshot

__all__ = ["Tracer"]

# Events that neither begin nor end a span, and their labels.
_MARKS = {
    "reaped": "reclaimed from the dead",
    "estimated": "estimate",
    "refused": "refused",
    "lost": "copy lost",
    "written_off": "written off",
    "reset": "reset",
    "pinned": "pinned",
    "unpinned": "unpinned",
    "out_of_memory": "out of memory",
    "unload_on_release": "to be unloaded when released",
    "settings": "settings changed",
}
# The state of a copy before the first event that is known of it, by that event's kind; idle before any other.
_STATE_BEFORE = {
    "load_ended": "loading",
    "load_failed": "loading",
    "released": "active",
    "unload_ended": "unloading",
    "suspend_ended": "suspending",
    "suspend_failed": "suspending",
    "resume_began": "suspended",
    "resume_ended": "resuming",
    "resume_failed": "resuming",
    "resume_given_up": "resuming",
    "lease_ended": "leased",
}
# Reasons of unloads that make room for no request.
_NOT_EVICTED = (Reason.ASKED, Reason.EXPIRED, Reason.RESET)
# At most this many unloads for a model have arrows to its next load.
_ARROWS_KEPT = 8


class Tracer:
    """Turns steps of an `EventReader` into events of a trace."""

    def __init__(self) -> None:
        self.lost = 0
        self._tracks = Tracks()
        self._waits: dict[int, Span] = {}
        self._uses: dict[int, Span] = {}
        self._lying: dict[int, Span] = {}
        # Like `_lying`, but for leases: what they reserve on the devices, by row.
        self._leases: dict[int, Span] = {}
        self._leading: Span | None = None
        # By copy: several may run alone, each on another device.
        self._alone: dict[int | None, Span] = {}
        # Where arrows begin: at the end of a hold, by copy, and of unloads, by the model that they make room for.
        self._released: dict[int, Arrow] = {}
        self._made_room: dict[str, list[Arrow]] = defaultdict(list)
        self._estimates: dict[str, float] = {}
        self._handlers: dict[str, Callable[[EventInfo, float], object]] = {
            "queued": self._queued,
            "waits": self._waits_on,
            "granted": self._granted,
            "left_queue": self._left_queue,
            "hit": self._hit,
            "load_began": partial(self._begin_load, kind="load"),
            "load_ended": self._load_ended,
            "load_failed": self._load_failed,
            "suspend_began": partial(self._begin_unload, kind="suspend"),
            "suspend_ended": self._unload_ended,
            "suspend_failed": self._moved_in_vain,
            "resume_began": partial(self._begin_load, kind="resume"),
            "resume_ended": self._load_ended,
            "resume_failed": self._moved_in_vain,
            "resume_given_up": self._load_failed,
            "released": self._released_copy,
            "unload_began": partial(self._begin_unload, kind="unload"),
            "unload_ended": self._unload_ended,
            "leased": self._leased,
            "lease_ended": self._lease_ended,
            "leader": self._leader,
            "isolation_began": self._isolation_began,
            "isolation_ended": self._isolation_ended,
        }

    def add(self, step: Step) -> list[TraceEvent]:
        """Return what a step adds to the trace."""
        names = names_of(step.snapshot)
        step = replace(
            step,
            snapshot=with_names(step.snapshot),
            events=tuple(named(event, names) for event in step.events) if names else step.events,
        )
        snapshot = step.snapshot
        begin = min([snapshot.taken_s, *(snapshot.taken_s - event.age_s for event in step.events[:1])]) * 1e6
        if step.fresh or step.lost:
            # Open spans may have ended unseen.
            self._close_all(begin)
            self.lost += step.lost
        self._tracks.name_all(snapshot)
        self._estimates = {model.tag: model.estimate_mb or 0.0 for model in snapshot.models}
        if step.lost:
            self._tracks.mark(
                NAMESPACE_PID, begin, f"{step.lost} events were overwritten before they could be read", {}
            )
        if step.fresh or step.lost:
            self._find_what_was_there(snapshot, step.events, begin)
            self._count_lying((device.row for device in snapshot.devices), begin)
        for event in step.events:
            ts = (snapshot.taken_s - event.age_s) * 1e6
            handler = self._handlers.get(event.kind)
            if handler is not None:
                handler(event, ts)
            elif event.kind in _MARKS:
                self._tracks.mark(event.pid, ts, _marked(event), _figures(event))
        self._tracks.count(snapshot)
        return self._tracks.take()

    def finish(self, snapshot: Snapshot) -> list[TraceEvent]:
        """Return the spans that have not ended, up to the moment of the snapshot."""
        self._close_all(snapshot.taken_s * 1e6)
        return self._tracks.take()

    def _count_lying(self, devices: Iterable[int], ts: float) -> None:
        """Write how much memory the models on some devices take, by the accounts."""
        for device in devices:
            mb = sum(span.args.get("MB") or 0.0 for span in self._lying.values() if device in span.devices)
            self._tracks.counter(DEVICE_PID + device, ts, "models MB", {"loaded": round(mb, 1)})

    # ---- before the first event ----------------------------------------------------------------------------

    def _find_what_was_there(self, snapshot: Snapshot, events: Sequence[EventInfo], begin: float) -> None:
        """Open the spans of what had begun before the given events."""
        first: dict[int, EventInfo] = {}
        queued: set[int] = set()
        for event in events:
            if event.instance is not None:
                first.setdefault(event.instance, event)
            if event.ticket is not None and event.kind == "queued":
                queued.add(event.ticket)
        pids = {member.slot: member.pid for member in snapshot.members}
        begun = ("load_began", "leased", "isolation_began")
        now = {copy.row: copy for copy in snapshot.instances}
        only = tuple(device.row for device in snapshot.devices) if len(snapshot.devices) == 1 else ()
        for row in {*now, *first}:
            earliest, copy = first.get(row), now.get(row)
            devices = devices_of(copy) if copy is not None else only
            if earliest is None:
                assert copy is not None, "it is in one of the two"
                pid = None if copy.holder is None else pids.get(copy.holder)
                self._open_copy(row, copy.tag, copy.state, pid, devices, begin, copy.seat_of is None)
                if copy.state == "leased":
                    self._lease(row, copy.tag, copy.reserved_mb, devices, begin)
            elif earliest.kind not in begun:
                state = _STATE_BEFORE.get(earliest.kind, "idle")
                pid = None if state in ("idle", "suspended") else earliest.pid
                lies = copy is None or copy.seat_of is None
                self._open_copy(row, earliest.tag or "?", state, pid, devices, begin, lies)
                if state == "leased":
                    # Its size is no longer known: the event of its end says only how long it was held.
                    self._lease(row, earliest.tag or "?", 0.0, devices, begin)
        for ticket in snapshot.tickets:
            if ticket.state == "waiting" and ticket.number not in queued:
                self._waits[ticket.number] = Span(f"wait {ticket.tag}", "wait", begin, ticket.pid)

    def _open_copy(
        self, row: int, tag: str, state: str, pid: int | None, devices: tuple[int, ...], begin: float, lies: bool
    ) -> None:
        """Open the spans of a copy; lies: it has memory, and is not merely a seat of another one."""
        kinds = {"loading": "load", "active": "hold", "unloading": "unload", "leased": "lease"}
        kinds |= {"suspending": "suspend", "resuming": "resume"}
        if state in kinds:
            self._uses[row] = Span(f"{kinds[state]} {tag}", kinds[state], begin, pid, devices=devices)
        if lies and state in ("active", "idle"):
            self._lie(row, tag, devices, begin)

    def _lie(self, row: int, tag: str, devices: tuple[int, ...], ts: float) -> None:
        self._lying[row] = Span(tag, "loaded", ts, args={"MB": self._estimates.get(tag, 0.0)}, devices=devices)
        self._count_lying(devices, ts)

    def _lies_no_more(self, row: int | None, ts: float) -> None:
        span = self._lying.pop(row, None) if row is not None else None
        if span is not None:
            self._write_lying(span, ts)
            self._count_lying(span.devices, ts)

    def _write_lying(self, span: Span, ts: float) -> None:
        for device in span.devices:
            self._tracks.span(span, ts, DEVICE_PID + device)

    def _close_all(self, ts: float) -> None:
        spans = [*self._waits.values(), *self._uses.values()]
        spans += [*self._alone.values(), *([] if self._leading is None else [self._leading])]
        for span in spans:
            span.args["unfinished"] = True
            self._tracks.span(span, ts)
        # No counter falls: what is loaded at the end of the trace stays loaded after it.
        for span in (*self._lying.values(), *self._leases.values()):
            span.args["unfinished"] = True
            self._write_lying(span, ts)
        self._lying.clear()
        self._leases.clear()
        self._waits.clear()
        self._uses.clear()
        self._released.clear()
        self._made_room.clear()
        self._leading = None
        self._alone.clear()

    # ---- one kind of event each ----------------------------------------------------------------------------

    def _queued(self, event: EventInfo, ts: float) -> None:
        if event.ticket is not None:
            args = {"ticket": event.ticket, "needs MB": event.value}
            self._waits[event.ticket] = Span(f"wait {event.tag}", "wait", ts, event.pid, args)

    def _waits_on(self, event: EventInfo, ts: float) -> None:
        span = None if event.ticket is None else self._waits.get(event.ticket)
        if span is not None:
            span.args["why"] = why(event)

    def _wait_ended(self, event: EventInfo, ts: float) -> tuple[int | None, list[Arrow]]:
        """Write the wait of an event's ticket; return the pid that waited, and the beginning of an arrow from it."""
        span = None if event.ticket is None else self._waits.pop(event.ticket, None)
        if span is None:
            return None, []
        pid, lane = self._tracks.span(span, ts)
        return span.pid, [("after waiting", pid, lane, ts)]

    def _granted(self, event: EventInfo, ts: float) -> None:
        pid, arrows = self._wait_ended(event, ts)
        if event.instance is None:
            return
        released = self._released.pop(event.instance, None)
        if released is not None and released[1] != pid:
            arrows.append(released)
        args = {"why": why(event), "waited s": event.value}
        self._uses[event.instance] = Span(f"hold {event.tag}", "hold", ts, pid, args, arrows=arrows)

    def _left_queue(self, event: EventInfo, ts: float) -> None:
        span = None if event.ticket is None else self._waits.get(event.ticket)
        if span is not None:
            span.args["gave up"] = True
        self._wait_ended(event, ts)

    def _hit(self, event: EventInfo, ts: float) -> None:
        if event.instance is not None:
            self._uses[event.instance] = Span(f"hold {event.tag}", "hold", ts, event.pid)

    def _begin_load(self, event: EventInfo, ts: float, kind: str) -> None:
        pid, arrows = self._wait_ended(event, ts)
        arrows += self._made_room.pop(event.tag or "", [])
        args = {"why": why(event), "reserved MB": event.value}
        if event.instance is not None:
            pid = event.pid if pid is None and kind == "resume" else pid
            span = Span(f"{kind} {event.tag}", kind, ts, pid, args, event.devices, arrows)
            self._uses[event.instance] = span

    def _load_ended(self, event: EventInfo, ts: float) -> None:
        span = self._use_ended(event, ts)
        if event.instance is not None:
            self._uses[event.instance] = Span(f"hold {event.tag}", "hold", ts, event.pid)
            self._lie(event.instance, event.tag or "?", span.devices if span else (), ts)

    def _load_failed(self, event: EventInfo, ts: float) -> None:
        span = None if event.instance is None else self._uses.get(event.instance)
        if span is not None:
            span.args["failed"] = True
        self._use_ended(event, ts)

    def _released_copy(self, event: EventInfo, ts: float) -> None:
        span = None if event.instance is None else self._uses.pop(event.instance, None)
        if span is not None and event.instance is not None:
            pid, lane = self._tracks.span(span, ts, event.pid)
            self._released[event.instance] = ("hand-over", pid, lane, ts)

    def _use_ended(self, event: EventInfo, ts: float) -> Span | None:
        span = None if event.instance is None else self._uses.pop(event.instance, None)
        if span is not None:
            self._tracks.span(span, ts, event.pid)
        return span

    def _moved_in_vain(self, event: EventInfo, ts: float) -> None:
        self._load_failed(event, ts)
        if event.instance is not None:
            self._uses[event.instance] = Span(f"unload {event.tag}", "unload", ts)

    def _begin_unload(self, event: EventInfo, ts: float, kind: str) -> None:
        evicted = event.reason is not None and event.reason not in _NOT_EVICTED
        if event.instance is not None and event.instance in self._lying:
            self._lying[event.instance].args["evicted"] = evicted
        self._lies_no_more(event.instance, ts)
        if event.instance is not None:
            self._released.pop(event.instance, None)
            args = {"why": why(event), "MB": event.value, "for": event.other, "evicted": evicted}
            self._uses[event.instance] = Span(f"{kind} {event.tag}", kind, ts, args=args)

    def _unload_ended(self, event: EventInfo, ts: float) -> None:
        span = None if event.instance is None else self._uses.pop(event.instance, None)
        if span is not None:
            pid, lane = self._tracks.span(span, ts, event.pid)
            # All forgotten models have one tag, so an arrow might lead to the load of another one.
            if span.args.get("for") not in (None, FORGOTTEN):
                arrows = self._made_room[span.args["for"]]
                arrows[:] = [*arrows[-_ARROWS_KEPT + 1 :], ("made room", pid, lane, ts)]

    def _leased(self, event: EventInfo, ts: float) -> None:
        pid, arrows = self._wait_ended(event, ts)
        if event.instance is not None:
            args = {"why": why(event), "MB": event.value}
            span = Span(f"lease {event.tag}", "lease", ts, pid, args, event.devices, arrows)
            self._uses[event.instance] = span
            self._lease(event.instance, event.tag or "?", event.value or 0.0, event.devices, ts)

    def _lease(self, row: int, name: str, mb: float, devices: tuple[int, ...], ts: float) -> None:
        # A lease has the same share of each of its devices.
        share_mb = mb / max(1, len(devices))
        self._leases[row] = Span(name, "leased", ts, args={"MB": round(share_mb, 1)}, devices=devices)

    def _lease_ended(self, event: EventInfo, ts: float) -> None:
        self._use_ended(event, ts)
        span = None if event.instance is None else self._leases.pop(event.instance, None)
        if span is not None:
            self._write_lying(span, ts)

    def _leader(self, event: EventInfo, ts: float) -> None:
        if self._leading is not None:
            self._tracks.span(self._leading, ts)
        self._leading = Span(f"pid {event.pid} leads", "leader", ts, NAMESPACE_PID)

    def _isolation_began(self, event: EventInfo, ts: float) -> None:
        self._alone[event.instance] = Span(f"{event.tag} runs alone", "isolation", ts, NAMESPACE_PID)

    def _isolation_ended(self, event: EventInfo, ts: float) -> None:
        alone = self._alone.pop(event.instance, None)
        if alone is not None:
            self._tracks.span(alone, ts)


def _marked(event: EventInfo) -> str:
    return f"{_MARKS[event.kind]} {event.tag}" if event.tag else _MARKS[event.kind]


def _figures(event: EventInfo) -> dict[str, Any]:
    said = {"why": why(event), "value": event.value, "ticket": event.ticket}
    return {name: value for name, value in said.items() if value not in ("", None)}
