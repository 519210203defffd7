"""Events as spans for a trace viewer: Chrome's JSON format, which https://ui.perfetto.dev opens.

Each attached process is a process of the trace, with as many lanes as it does things at a time: waits, loads, holds,
unloads and leases are spans there. Each device is one, too: what is loaded on it from when to when, and its memory as
a counter. One more stands for the namespace: who leads, and who runs alone to be measured. Arrows go from a wait to
what it led to, from a release to the grant that follows from it, and from an unload to the load that it made room for.

A span is written when it ends, so that its lane is known; those that have not ended are written by `finish`. Times are
`time.monotonic()` in microseconds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from mpmm.observability.event_reader import Step
from mpmm.observability.formatting import devices_of, named, names_of, why, with_names
from mpmm.shared_state.snapshot import EventInfo, Snapshot

__all__ = ["DEVICE_PID", "NAMESPACE_PID", "TraceFile", "Tracer"]

# Tracks that are no processes get numbers that no process can have.
NAMESPACE_PID = 1 << 23
DEVICE_PID = NAMESPACE_PID + 1
TraceEvent = dict[str, Any]
# Events that end nothing and begin nothing, and what is shown of them.
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
    "doomed": "to be unloaded when given back",
    "settings": "settings changed",
}
# What a copy was when the first event that is known of it is of such a kind; idle before any other.
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
# So many unloads for a model may have arrows to its next load.
_ARROWS_KEPT = 8


@dataclass
class _Open:
    """A span that has begun: ts in µs. arrows: where those begin that end here, as (name, pid, lane, ts)."""

    name: str
    kind: str
    ts: float
    pid: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    devices: tuple[int, ...] = ()
    arrows: list[tuple[str, int, int, float]] = field(default_factory=list)


class Tracer:
    """Turns steps of a `Follower` into events of a trace."""

    def __init__(self) -> None:
        self.lost = 0
        self._out: list[TraceEvent] = []
        self._named: dict[int, str] = {}
        # By process: until when each of its lanes is taken.
        self._lanes: dict[int, list[float]] = defaultdict(list)
        self._waits: dict[int, _Open] = {}
        self._uses: dict[int, _Open] = {}
        self._lying: dict[int, _Open] = {}
        self._leading: _Open | None = None
        # By copy: on devices of their own several may run alone.
        self._alone: dict[int | None, _Open] = {}
        # The end of a hold, by copy, and of unloads, by the model that they make room for.
        self._released: dict[int, tuple[str, int, int, float]] = {}
        self._made_room: dict[str, list[tuple[str, int, int, float]]] = defaultdict(list)
        self._arrows = 0
        self._sampled: dict[int, float] = {}
        self._estimates: dict[str, float] = {}
        self._handlers: dict[str, Callable[[EventInfo, float], None]] = {
            "queued": self._queued,
            "waits": self._waits_on,
            "granted": self._granted,
            "left_queue": self._left_queue,
            "hit": self._hit,
            "load_began": self._load_began,
            "load_ended": self._load_ended,
            "load_failed": self._load_failed,
            "suspend_began": self._suspend_began,
            "suspend_ended": self._unload_ended,
            "suspend_failed": self._moved_in_vain,
            "resume_began": self._resume_began,
            "resume_ended": self._load_ended,
            "resume_failed": self._moved_in_vain,
            "resume_given_up": self._load_failed,
            "released": self._released_copy,
            "unload_began": self._unload_began,
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
            # What was open may have ended unseen.
            self._close_all(begin)
            self.lost += step.lost
        self._name_tracks(snapshot)
        self._estimates = {model.tag: model.estimate_mb or 0.0 for model in snapshot.models}
        if step.lost:
            self._mark(NAMESPACE_PID, begin, f"{step.lost} events were overwritten before they could be read", {})
        if step.fresh or step.lost:
            self._find_what_was_there(snapshot, step.events, begin)
        for event in step.events:
            ts = (snapshot.taken_s - event.age_s) * 1e6
            handler = self._handlers.get(event.kind)
            if handler is not None:
                handler(event, ts)
            elif event.kind in _MARKS:
                self._mark(event.pid, ts, self._marked(event), _figures(event))
        self._count(snapshot)
        out, self._out = self._out, []
        return out

    def finish(self, snapshot: Snapshot) -> list[TraceEvent]:
        """Return the spans that have not ended, up to the moment of the snapshot."""
        self._close_all(snapshot.taken_s * 1e6)
        out, self._out = self._out, []
        return out

    # ---- tracks --------------------------------------------------------------------------------------------

    def _name_tracks(self, snapshot: Snapshot) -> None:
        self._name_track(NAMESPACE_PID, f"namespace {snapshot.namespace}", 0)
        for device in snapshot.devices:
            self._name_track(DEVICE_PID + device.row, f"device {device.row}: {device.name}", 1 + device.row)
        for member in snapshot.members:
            self._name_track(member.pid, f"{member.kind} {member.name}", 100 + member.slot)

    def _name_track(self, pid: int, name: str, order: int) -> None:
        if self._named.get(pid) == name:
            return
        self._named[pid] = name
        for kind, args in (("process_name", {"name": name}), ("process_sort_index", {"sort_index": order})):
            self._out.append({"ph": "M", "name": kind, "pid": pid, "tid": 0, "ts": 0, "args": args})

    def _lane(self, pid: int, begin: float, end: float) -> int:
        """Return the lane of a process for a span: of those that are free then, the one that was busy last."""
        lanes = self._lanes[pid]
        free = [lane for lane, until in enumerate(lanes) if until <= begin]
        lane = max(free, key=lambda lane: lanes[lane], default=len(lanes))
        if lane == len(lanes):
            lanes.append(end)
            args = {"name": f"lane {lane + 1}"}
            self._out.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": lane + 1, "ts": 0, "args": args})
        lanes[lane] = end
        return lane + 1

    def _span(self, span: _Open, end: float, pid: int | None = None) -> tuple[int, int]:
        """Write a span that has ended, and the arrows to it; return its process and lane."""
        pid = next(number for number in (span.pid, pid, 0) if number is not None)
        if pid not in self._named:
            self._name_track(pid, f"process {pid}" if pid else "unknown process", 99)
        begin = min(span.ts, end)
        lane = self._lane(pid, begin, end)
        self._out.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.kind,
                "ts": round(begin, 3),
                "dur": round(max(0.0, end - begin), 3),
                "pid": pid,
                "tid": lane,
                "args": span.args,
            }
        )
        for name, from_pid, from_lane, ts in span.arrows:
            self._arrows += 1
            common = {"cat": "arrow", "name": name, "id": self._arrows}
            # An arrow must not end before it begins.
            head = {"ts": round(max(ts, begin), 3), "pid": pid, "tid": lane}
            self._out.append({"ph": "s", **common, "ts": round(ts, 3), "pid": from_pid, "tid": from_lane})
            self._out.append({"ph": "f", "bp": "e", **common, **head})
        return pid, lane

    def _mark(self, pid: int, ts: float, name: str, args: dict[str, Any]) -> None:
        scope = "g" if pid == NAMESPACE_PID else "p"
        if pid not in self._named:
            self._name_track(pid, f"process {pid}", 99)
        mark = {"ph": "i", "s": scope, "name": name, "cat": "event", "ts": round(ts, 3), "pid": pid, "tid": 0}
        self._out.append({**mark, "args": args})

    @staticmethod
    def _marked(event: EventInfo) -> str:
        return f"{_MARKS[event.kind]} {event.tag}" if event.tag else _MARKS[event.kind]

    def _count(self, snapshot: Snapshot) -> None:
        """Write the counters: new samples of each device, and what the books say now."""
        now = snapshot.taken_s * 1e6
        for device in snapshot.devices:
            pid = DEVICE_PID + device.row
            figures = [((snapshot.taken_s - ago) * 1e6, mb) for ago, mb in device.samples]
            if snapshot.books_only and device.used_mb is not None:
                figures = [(now, device.used_mb)]
            for ts, mb in figures:
                if ts > self._sampled.get(device.row, -1.0):
                    self._sampled[device.row] = ts
                    self._counter(pid, ts, "memory MB", {"used": round(mb, 1)})
                    self._counter(pid, ts, "limit MB", {"limit": round(device.limit_mb, 1)})
            reserved = {"reserved": round(device.reserved_mb, 1), "returning": round(device.returning_mb, 1)}
            self._counter(pid, now, "reserved MB", reserved)
        self._counter(NAMESPACE_PID, now, "waiting", {"waiting": snapshot.waiting})
        self._counter(NAMESPACE_PID, now, "in use", {"active": snapshot.active, "loading": snapshot.loading})

    def _counter(self, pid: int, ts: float, name: str, values: dict[str, float]) -> None:
        self._out.append({"ph": "C", "name": name, "ts": round(ts, 3), "pid": pid, "tid": 0, "args": values})

    def _lies(self, devices: Iterable[int], ts: float) -> None:
        """Write how much the models on some devices take by the books."""
        for device in devices:
            mb = sum(span.args.get("MB") or 0.0 for span in self._lying.values() if device in span.devices)
            self._counter(DEVICE_PID + device, ts, "models MB", {"loaded": round(mb, 1)})

    # ---- before the first event ----------------------------------------------------------------------------

    def _find_what_was_there(self, snapshot: Snapshot, events: Sequence[EventInfo], begin: float) -> None:
        """Open the spans of what had begun before the events at hand."""
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
                self._open_copy(row, copy.tag, copy.state, pid, devices, begin)
            elif earliest.kind not in begun:
                state = _STATE_BEFORE.get(earliest.kind, "idle")
                pid = None if state in ("idle", "suspended") else earliest.pid
                self._open_copy(row, earliest.tag or "?", state, pid, devices, begin)
        for ticket in snapshot.tickets:
            if ticket.state == "waiting" and ticket.number not in queued:
                self._waits[ticket.number] = _Open(f"wait {ticket.tag}", "wait", begin, ticket.pid)

    def _open_copy(
        self, row: int, tag: str, state: str, pid: int | None, devices: tuple[int, ...], begin: float
    ) -> None:
        kinds = {"loading": "load", "active": "hold", "unloading": "unload", "leased": "lease"}
        kinds |= {"suspending": "suspend", "resuming": "resume"}
        if state in kinds:
            self._uses[row] = _Open(f"{kinds[state]} {tag}", kinds[state], begin, pid, devices=devices)
        if state in ("active", "idle"):
            self._lie(row, tag, devices, begin)

    def _lie(self, row: int, tag: str, devices: tuple[int, ...], ts: float) -> None:
        self._lying[row] = _Open(tag, "loaded", ts, args={"MB": self._estimates.get(tag, 0.0)}, devices=devices)
        self._lies(devices, ts)

    def _lies_no_more(self, row: int | None, ts: float) -> None:
        span = self._lying.pop(row, None) if row is not None else None
        if span is not None:
            for device in span.devices:
                self._span(span, ts, DEVICE_PID + device)
            self._lies(span.devices, ts)

    def _close_all(self, ts: float) -> None:
        spans = [*self._waits.values(), *self._uses.values()]
        spans += [*self._alone.values(), *([] if self._leading is None else [self._leading])]
        for span in spans:
            span.args["unfinished"] = True
            self._span(span, ts)
        for row in list(self._lying):
            self._lying[row].args["unfinished"] = True
            self._lies_no_more(row, ts)
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
            self._waits[event.ticket] = _Open(f"wait {event.tag}", "wait", ts, event.pid, args)

    def _waits_on(self, event: EventInfo, ts: float) -> None:
        span = None if event.ticket is None else self._waits.get(event.ticket)
        if span is not None:
            span.args["why"] = why(event)

    def _wait_ended(self, event: EventInfo, ts: float) -> tuple[int | None, list[tuple[str, int, int, float]]]:
        """Write the wait of an event's ticket; return whose it was, and the begin of an arrow from it."""
        span = None if event.ticket is None else self._waits.pop(event.ticket, None)
        if span is None:
            return None, []
        pid, lane = self._span(span, ts)
        return span.pid, [("after waiting", pid, lane, ts)]

    def _granted(self, event: EventInfo, ts: float) -> None:
        pid, arrows = self._wait_ended(event, ts)
        if event.instance is None:
            return
        released = self._released.pop(event.instance, None)
        if released is not None and released[1] != pid:
            arrows.append(released)
        args = {"why": why(event), "waited s": event.value}
        self._uses[event.instance] = _Open(f"hold {event.tag}", "hold", ts, pid, args, arrows=arrows)

    def _left_queue(self, event: EventInfo, ts: float) -> None:
        span = None if event.ticket is None else self._waits.get(event.ticket)
        if span is not None:
            span.args["gave up"] = True
        self._wait_ended(event, ts)

    def _hit(self, event: EventInfo, ts: float) -> None:
        if event.instance is not None:
            self._uses[event.instance] = _Open(f"hold {event.tag}", "hold", ts, event.pid)

    def _load_began(self, event: EventInfo, ts: float) -> None:
        self._comes(event, ts, "load")

    def _resume_began(self, event: EventInfo, ts: float) -> None:
        self._comes(event, ts, "resume")

    def _comes(self, event: EventInfo, ts: float, kind: str) -> None:
        pid, arrows = self._wait_ended(event, ts)
        arrows += self._made_room.pop(event.tag or "", [])
        args = {"why": why(event), "reserved MB": event.value}
        if event.instance is not None:
            pid = event.pid if pid is None and kind == "resume" else pid
            span = _Open(f"{kind} {event.tag}", kind, ts, pid, args, event.devices, arrows)
            self._uses[event.instance] = span

    def _load_ended(self, event: EventInfo, ts: float) -> None:
        span = self._use_ended(event, ts)
        if event.instance is not None:
            self._uses[event.instance] = _Open(f"hold {event.tag}", "hold", ts, event.pid)
            self._lie(event.instance, event.tag or "?", span.devices if span else (), ts)

    def _load_failed(self, event: EventInfo, ts: float) -> None:
        span = None if event.instance is None else self._uses.get(event.instance)
        if span is not None:
            span.args["failed"] = True
        self._use_ended(event, ts)

    def _released_copy(self, event: EventInfo, ts: float) -> None:
        span = None if event.instance is None else self._uses.pop(event.instance, None)
        if span is not None and event.instance is not None:
            pid, lane = self._span(span, ts, event.pid)
            self._released[event.instance] = ("hand-over", pid, lane, ts)

    def _use_ended(self, event: EventInfo, ts: float) -> _Open | None:
        span = None if event.instance is None else self._uses.pop(event.instance, None)
        if span is not None:
            self._span(span, ts, event.pid)
        return span

    def _moved_in_vain(self, event: EventInfo, ts: float) -> None:
        self._load_failed(event, ts)
        if event.instance is not None:
            self._uses[event.instance] = _Open(f"unload {event.tag}", "unload", ts)

    def _unload_began(self, event: EventInfo, ts: float) -> None:
        self._goes(event, ts, "unload")

    def _suspend_began(self, event: EventInfo, ts: float) -> None:
        self._goes(event, ts, "suspend")

    def _goes(self, event: EventInfo, ts: float, kind: str) -> None:
        if event.instance is not None and event.instance in self._lying:
            self._lying[event.instance].args["evicted"] = event.reason is not None
        self._lies_no_more(event.instance, ts)
        if event.instance is not None:
            self._released.pop(event.instance, None)
            args = {"why": why(event), "MB": event.value, "for": event.other, "evicted": event.reason is not None}
            self._uses[event.instance] = _Open(f"{kind} {event.tag}", kind, ts, args=args)

    def _unload_ended(self, event: EventInfo, ts: float) -> None:
        span = None if event.instance is None else self._uses.pop(event.instance, None)
        if span is not None:
            pid, lane = self._span(span, ts, event.pid)
            if span.args.get("for"):
                arrows = self._made_room[span.args["for"]]
                arrows[:] = [*arrows[-_ARROWS_KEPT + 1 :], ("made room", pid, lane, ts)]

    def _leased(self, event: EventInfo, ts: float) -> None:
        pid, arrows = self._wait_ended(event, ts)
        if event.instance is not None:
            args = {"why": why(event), "MB": event.value}
            span = _Open(f"lease {event.tag}", "lease", ts, pid, args, event.devices, arrows)
            self._uses[event.instance] = span

    def _lease_ended(self, event: EventInfo, ts: float) -> None:
        self._use_ended(event, ts)

    def _leader(self, event: EventInfo, ts: float) -> None:
        if self._leading is not None:
            self._span(self._leading, ts)
        self._leading = _Open(f"pid {event.pid} leads", "leader", ts, NAMESPACE_PID)

    def _isolation_began(self, event: EventInfo, ts: float) -> None:
        self._alone[event.instance] = _Open(f"{event.tag} runs alone", "isolation", ts, NAMESPACE_PID)

    def _isolation_ended(self, event: EventInfo, ts: float) -> None:
        alone = self._alone.pop(event.instance, None)
        if alone is not None:
            self._span(alone, ts)


def _figures(event: EventInfo) -> dict[str, Any]:
    said = {"why": why(event), "value": event.value, "ticket": event.ticket}
    return {name: value for name, value in said.items() if value not in ("", None)}


class TraceFile:
    """A trace that can be read at any time while it is written: the format lets the closing bracket be missing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.written = 0
        stream.write("[")

    def write(self, events: Iterable[TraceEvent]) -> None:
        """Append events, and let readers see them."""
        for event in events:
            self._stream.write((",\n" if self.written else "\n") + json.dumps(event))
            self.written += 1
        self._stream.flush()

    def close(self) -> None:
        """Write the end; the stream stays open."""
        self._stream.write("\n]\n")
        self._stream.flush()
