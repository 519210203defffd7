"""The tracks of a trace: processes with lanes, spans on them, arrows between spans, moments and counters.

`trace` decides what the spans are; this module writes them, in Chrome's JSON format.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from mpmm.shared_state.snapshot import Snapshot

__all__ = ["DEVICE_PID", "NAMESPACE_PID", "Arrow", "Span", "TraceEvent", "Tracks"]

# Tracks that are not processes get numbers that no process can have.
NAMESPACE_PID = 1 << 23
DEVICE_PID = NAMESPACE_PID + 1
TraceEvent = dict[str, Any]
# Where an arrow begins: its name, process, lane and time in µs.
Arrow = tuple[str, int, int, float]


@dataclass
class Span:
    """A span that has begun: ts in µs. arrows: the beginnings of those that end here, as (name, pid, lane, ts)."""

    name: str
    kind: str
    ts: float
    pid: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    devices: tuple[int, ...] = ()
    arrows: list[Arrow] = field(default_factory=list)


class Tracks:
    """Collects the events of a trace. Times are in microseconds."""

    def __init__(self) -> None:
        self._out: list[TraceEvent] = []
        self._named: dict[int, str] = {}
        # By process: until when each of its lanes is occupied.
        self._lanes: dict[int, list[float]] = defaultdict(list)
        self._arrows = 0
        # By device: the time of the last sample that was written.
        self._sampled: dict[int, float] = {}

    def take(self) -> list[TraceEvent]:
        """Return what has been written since the last call."""
        out, self._out = self._out, []
        return out

    def name_all(self, snapshot: Snapshot) -> None:
        """Name the tracks of a namespace, its devices and its processes."""
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
        """Return the lane of a process for a span: of those that are free, the one that was busy last."""
        lanes = self._lanes[pid]
        free = [lane for lane, until in enumerate(lanes) if until <= begin]
        lane = max(free, key=lambda lane: lanes[lane], default=len(lanes))
        if lane == len(lanes):
            lanes.append(end)
            args = {"name": f"lane {lane + 1}"}
            self._out.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": lane + 1, "ts": 0, "args": args})
        lanes[lane] = end
        return lane + 1

    def span(self, span: Span, end: float, pid: int | None = None) -> tuple[int, int]:
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

    def mark(self, pid: int, ts: float, name: str, args: dict[str, Any]) -> None:
        """Write an event without duration: on a process's track, or for the namespace across all tracks."""
        scope = "g" if pid == NAMESPACE_PID else "p"
        if pid not in self._named:
            self._name_track(pid, f"process {pid}", 99)
        mark = {"ph": "i", "s": scope, "name": name, "cat": "event", "ts": round(ts, 3), "pid": pid, "tid": 0}
        self._out.append({**mark, "args": args})

    def count(self, snapshot: Snapshot) -> None:
        """Write the counters: new samples of each device, and what the accounts say now."""
        now = snapshot.taken_s * 1e6
        for device in snapshot.devices:
            pid = DEVICE_PID + device.row
            figures = [((snapshot.taken_s - ago) * 1e6, mb) for ago, mb in device.samples]
            if snapshot.accounting_only and device.used_mb is not None:
                figures = [(now, device.used_mb)]
            for ts, mb in figures:
                if ts > self._sampled.get(device.row, -1.0):
                    self._sampled[device.row] = ts
                    self.counter(pid, ts, "memory MB", {"used": round(mb, 1)})
                    self.counter(pid, ts, "limit MB", {"limit": round(device.limit_mb, 1)})
            reserved = {"reserved": round(device.reserved_mb, 1), "returning": round(device.returning_mb, 1)}
            self.counter(pid, now, "reserved MB", reserved)
        self.counter(NAMESPACE_PID, now, "waiting", {"waiting": snapshot.waiting})
        self.counter(NAMESPACE_PID, now, "in use", {"active": snapshot.active, "loading": snapshot.loading})

    def counter(self, pid: int, ts: float, name: str, values: dict[str, float]) -> None:
        """Write the values of a counter at a moment."""
        self._out.append({"ph": "C", "name": name, "ts": round(ts, 3), "pid": pid, "tid": 0, "args": values})
