"""What the page is told about one namespace: rows that have changed since its last look, and bounded histories.

Each look at the namespace has a number. Everything that is kept (a sample, a span, an event, a row of a table) has the
number of the look at which it last changed, so a page that names the last look it has seen is told only what is newer.
A thousand idle copies cost nothing after the first answer. Everything is identified by tags; what people see instead of
them is sent once each (`names`), and sentences contain it already. If the page has missed too much, or knows another
incarnation of the namespace, the answer is complete, and says so (`complete`).
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpmm.observability.dashboard.decisions import CATEGORIES, decision
from mpmm.observability.dashboard.timeline import Timeline
from mpmm.observability.event_reader import EventReader, Step
from mpmm.observability.findings import findings, longest_wait_s
from mpmm.observability.formatting import (
    copies_counter,
    decided_at,
    expected_waits,
    names_of,
    shared_by,
    waiters,
    whys,
    with_names,
)
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import DeviceInfo, InstanceInfo, Snapshot, TicketInfo
from mpmm.text.printable import printable

__all__ = ["LONGEST_WINDOW_S", "Recorder"]

#: An hour of samples, at one a second.
LONGEST_WINDOW_S = 3600.0
SAMPLES_KEPT = 3600
# More points than this are thinned: no chart is wider.
POINTS_SENT = 720
DECISIONS_KEPT = 300
WAITERS_SENT = 300
GONE_KEPT = 20_000
# Spans and decisions outlive their models, whose names they need.
NAMES_KEPT = 4096
# Bounded because each waiter may cause a finding of its own.
FINDINGS_SENT = 20
# Waits that only other programs, or processes that have pinned something, can end: loads and holds do not say when.
_OTHERS_END = (Reason.EXTERNAL, Reason.PINNED)
Row = dict[str, Any]
Point = tuple[float, ...]


class Table:
    """Rows by key, each with the look at which it changed last."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[int, Row]] = {}
        self._gone: deque[tuple[int, str]] = deque(maxlen=GONE_KEPT)
        #: A page that has seen no later look than this can no longer be told which rows were removed.
        self.forgotten = 0

    def put(self, look: int, rows: Mapping[str, Row]) -> None:
        """Make these the only rows of the table."""
        for key in self._rows.keys() - rows.keys():
            del self._rows[key]
            if len(self._gone) == GONE_KEPT:
                self.forgotten = self._gone[0][0]
            self._gone.append((look, key))
        for key, row in rows.items():
            known = self._rows.get(key)
            if known is None or known[1] != row:
                self._rows[key] = (look, row)

    def since(self, look: int) -> dict[str, Any]:
        """Return the rows that have changed after a look, and the keys of those that were removed."""
        changed = {key: row for key, (at, row) in self._rows.items() if at > look}
        gone = [key for at, key in self._gone if at > look and key not in self._rows] if look else []
        return {"set": changed, "gone": gone}


class Samples:
    """Points in time, oldest first: (seconds, figure, …), each with its look."""

    def __init__(self) -> None:
        self._points: deque[tuple[int, Point]] = deque(maxlen=SAMPLES_KEPT)

    def add(self, look: int, point: Point) -> None:
        """Append a point unless it is older than the last one."""
        if not self._points or point[0] > self._points[-1][1][0]:
            self._points.append((look, tuple(round(figure, 2) for figure in point)))

    def since(self, look: int, from_s: float) -> list[Point]:
        """Return the points that were added after a look and are not older than a moment, thinned if too many."""
        return _thinned([point for at, point in self._points if at > look and point[0] >= from_s])


def _thinned(points: list[Point]) -> list[Point]:
    """Return at most POINTS_SENT points; merged neighbours have the last one's time and the highest of each figure."""
    size = -(-len(points) // POINTS_SENT)
    if size <= 1:
        return points
    groups = (points[first : first + size] for first in range(0, len(points), size))
    return [(group[-1][0], *map(max, zip(*(point[1:] for point in group), strict=True))) for group in groups]


class Recorder:
    """Follows one namespace through all its incarnations. Not thread-safe.

    problem: why it cannot be read at present, None if it can. seen: whether it ever could. busy: whether so much
    happens that the next look should come soon.
    """

    def __init__(self, namespace: str, root: Path | None) -> None:
        self.namespace = namespace
        self.problem: str | None = None
        self.seen = False
        self.busy = False
        self._reader = EventReader(namespace, root)
        self._look = 0
        self._begin()

    def _begin(self) -> None:
        self._epoch = secrets.token_hex(6)
        self._head: Row = {}
        self._devices: list[Row] = []
        self._waiters: list[Row] = []
        self._findings: list[Row] = []
        self._urgent = 0
        self._copies, self._models, self._members = Table(), Table(), Table()
        self._memory: dict[int, Samples] = {}
        self._load = Samples()
        self._timeline = Timeline()
        self._names: dict[str, tuple[int, str]] = {}
        self._decisions: deque[tuple[int, Row]] = deque(maxlen=DECISIONS_KEPT)
        self._decided: dict[int, float] = {}
        self._lost = 0

    def look(self) -> None:
        """Look once. Raises what `read_snapshot` raises; then what is known stays, and `problem` says why."""
        try:
            step = self._reader.step()
            if step.fresh:
                self._begin()
            self._look += 1
            self._take(step)
        except Exception as error:
            self.problem = printable(str(error) or repr(error))
            raise
        self.problem, self.seen = None, True

    def _take(self, step: Step) -> None:
        snapshot, look = step.snapshot, self._look
        self._lost += 0 if step.fresh else step.lost
        self.busy = bool(step.lost and not step.fresh) or len(step.events) > 2000
        self._timeline.add(step, look)
        names, shown = names_of(snapshot), with_names(snapshot)
        self._name(names)
        for event in step.events:
            if event.kind in CATEGORIES:
                self._decisions.append((look, decision(event, snapshot.taken_s, names)))
        for device in snapshot.devices:
            self._sample(device, snapshot, step.fresh)
        loaded = sum(copy.state in ("active", "idle") for copy in snapshot.copies)
        self._load.add(look, (snapshot.taken_s, snapshot.waiting, snapshot.active, snapshot.loading, loaded))
        self._head = _head(snapshot)
        self._devices = [_device(device, shown) for device in snapshot.devices]
        told = self._decided | decided_at(step.events, snapshot.taken_s)
        self._decided = {one.number: told[one.number] for one in snapshot.tickets if one.number in told}
        found = findings(shown, self._decided)
        self._urgent = sum(one.urgent for one in found)
        self._findings = [{"urgent": one.urgent, "text": printable(one.text)} for one in found[:FINDINGS_SENT]]
        self._waiters = _waiters(snapshot, shown, self._decided)
        self._copies.put(look, _copies(snapshot))
        self._models.put(look, _models(snapshot))
        self._members.put(look, _members(snapshot))

    def _name(self, names: Mapping[str, str]) -> None:
        """Note what people see instead of tags, so that a page is told those that it does not know yet."""
        for tag, shown in names.items():
            known = self._names.get(printable(tag))
            if known is None or known[1] != printable(shown):
                self._names.pop(printable(tag), None)
                self._names[printable(tag)] = (self._look, printable(shown))
        for tag in list(self._names)[: max(0, len(self._names) - NAMES_KEPT)]:
            del self._names[tag]

    def _sample(self, device: DeviceInfo, snapshot: Snapshot, fresh: bool) -> None:
        samples = self._memory.setdefault(device.row, Samples())
        taken_s = snapshot.taken_s
        if fresh and not snapshot.accounting_only:
            for ago_s, used_mb in device.samples[:-1]:
                samples.add(self._look, (taken_s - ago_s, used_mb, 0.0))
        # A chart must not lose peaks between two looks.
        recent = [] if snapshot.accounting_only else [mb for ago_s, mb in device.samples if ago_s <= 1.0]
        used_mb = max([device.used_mb or 0.0, *recent])
        samples.add(self._look, (taken_s, used_mb, device.committed_mb))

    def weight(self) -> tuple[bool, int]:
        """Return the weight by which the page chooses among several namespaces: it shows the highest first."""
        return self.seen and self.problem is None, sum(self._head.get("states", {}).values())

    def summary(self) -> Row:
        """Return a summary of the namespace, for the list of all."""
        return {
            "name": self.namespace,
            "shown": printable(self.namespace),
            "problem": self.problem,
            "waiting": self._head.get("waiting", 0),
            "urgent": self._urgent,
        }

    def state(self, epoch: str, look: int, window_s: float) -> Row:
        """Return what has changed since a look at an incarnation; everything of the last `window_s` seconds if that is
        not the present one."""
        tables = {"copies": self._copies, "models": self._models, "members": self._members}
        complete = epoch != self._epoch or any(look < table.forgotten for table in tables.values())
        since = 0 if complete else look
        from_s = self._head.get("now", 0.0) - min(window_s, LONGEST_WINDOW_S)
        return {
            "epoch": self._epoch,
            "look": self._look,
            "complete": complete,
            "problem": self.problem,
            "head": self._head,
            "devices": self._devices,
            "findings": self._findings,
            "urgent": self._urgent,
            "waiters": self._waiters,
            "memory": {row: samples.since(since, from_s) for row, samples in self._memory.items()},
            "load": self._load.since(since, from_s),
            "spans": self._timeline.since(since, from_s),
            "decisions": [row for at, row in self._decisions if at > since],
            "lost": self._lost,
            "names": {tag: shown for tag, (at, shown) in self._names.items() if at > since},
            **{name: table.since(since) for name, table in tables.items()},
        }


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _head(snapshot: Snapshot) -> Row:
    leader = next((member.pid for member in snapshot.members if member.slot == snapshot.leader), None)
    return {
        "namespace": printable(snapshot.namespace),
        "now": round(snapshot.taken_s, 3),
        "wall": round(snapshot.taken_wall_s, 3),
        "up": round(snapshot.taken_wall_s - snapshot.created_wall_s, 1),
        "source": printable(snapshot.source),
        "accounting_only": snapshot.accounting_only,
        "leader": leader,
        "polled_ago": round(snapshot.polled_ago_s, 1),
        "waiting": snapshot.waiting,
        "host_mb": round(sum(copy.host_mb for copy in snapshot.copies), 1),
        "host_budget_mb": _rounded(snapshot.suspend_budget_mb),
        "longest_wait": round(longest_wait_s(snapshot), 1),
        "states": Counter(copy.state for copy in snapshot.copies),
        "members": Counter(member.kind for member in snapshot.members),
        **{
            name: getattr(snapshot, name)
            for name in ("loads", "hits", "evictions", "failed_loads", "timeouts", "out_of_memory", "reaps", "suspends")
        },
    }


def _device(device: DeviceInfo, snapshot: Snapshot) -> Row:
    figures = ("total_mb", "limit_mb", "used_mb", "committed_mb", "reserved_mb", "returning_mb", "external_mb")
    here = [copy for copy in snapshot.copies if device.row in copy.shares_mb]
    tags = {copy.row: copy.tag for copy in snapshot.copies}
    return {
        "row": device.row,
        "name": printable(device.name),
        "uuid": printable(device.uuid),
        **{name[:-3]: _rounded(getattr(device, name)) for name in figures},
        "highest": _rounded(device.peak_since_start_mb),
        "sample_age": _rounded(device.sample_age_s),
        "copies": sum(copy.state in ("active", "idle") for copy in here),
        "active_mb": _rounded(sum(copy.shares_mb[device.row] for copy in here if copy.state == "active")),
        "idle_mb": _rounded(sum(copy.shares_mb[device.row] for copy in here if copy.state == "idle")),
        "alone": None if device.isolated is None else printable(tags.get(device.isolated, "?")),
    }


def _waiters(snapshot: Snapshot, shown: Snapshot, decided: Mapping[int, float]) -> list[Row]:
    """Return rows of waiters, by tags; shown: the same snapshot with names, for the sentences."""
    expected_of, why_of = expected_waits(snapshot), whys(shown, decided)
    named = {ticket.number: ticket for ticket in shown.tickets}
    first = waiters(snapshot)[:WAITERS_SENT]
    return [_waiter(one, snapshot.taken_s, expected_of(one), why_of(named[one.number])) for one in first]


def _waiter(ticket: TicketInfo, taken_s: float, expected_s: float, why: str) -> Row:
    return {
        "number": ticket.number,
        "tag": printable(ticket.tag),
        "pid": ticket.pid,
        "urgency": ticket.urgency,
        "since": round(taken_s - ticket.waited_s, 2),
        "expected": None if ticket.reason in _OTHERS_END else _rounded(expected_s, 2),
        "gives_up_in": _rounded(ticket.time_left_s),
        "why": printable(why),
    }


def _copies(snapshot: Snapshot) -> dict[str, Row]:
    pids = {member.slot: member.pid for member in snapshot.members}
    pinned = {pin.model for pin in snapshot.pins}
    return {str(copy.row): _copy(copy, snapshot.taken_s, pids, copy.model in pinned) for copy in snapshot.copies}


def _copy(copy: InstanceInfo, taken_s: float, pids: Mapping[int, int], pinned: bool) -> Row:
    holder = copy.program if copy.state == "leased" and copy.program else None
    if holder is None and copy.holder is not None:
        holder = pids.get(copy.holder)
    marks = (("pinned", pinned), ("unloads on release", copy.unload_on_release), ("unload late", copy.unload_late))
    return {
        "tag": printable(copy.tag),
        "state": copy.state,
        "pid": holder,
        "since": round(taken_s - copy.for_s, 2),
        "uses": copy.uses,
        "mb": _rounded(_mb(copy)),
        "devices": list(copy.shares_mb),
        "home": next((pids.get(slot) for slot in (copy.server, copy.owner) if slot is not None), None),
        "served": copy.server is not None,
        "marks": [*shared_by(copy), *(name for name, holds in marks if holds)],
    }


def _mb(copy: InstanceInfo) -> float:
    """Return the memory of a copy: on its devices, on the host if it is suspended, or reserved while it loads."""
    if copy.state == "suspended":
        return copy.host_mb
    return copy.reserved_mb if copy.state in ("loading", "resuming", "leased") else copy.mb


def _models(snapshot: Snapshot) -> dict[str, Row]:
    counts = (
        "loaded",
        "active",
        "idle",
        "loading",
        "suspended",
        "waiting",
        "loads",
        "hits",
        "evictions",
        "failures",
        "pins",
    )
    count = copies_counter(snapshot)
    return {
        str(model.row): {
            "tag": printable(model.tag),
            "kind": model.kind,
            **{name: count(model, name) for name in counts},
            "estimate": _rounded(model.estimate_mb),
            "measured": model.measured,
            "load_s": _rounded(model.load_s, 2),
            "hold_s": _rounded(model.hold_s, 3),
            "used": None if model.active else _rounded(snapshot.taken_s - model.unused_for_s, 1),
        }
        for model in snapshot.models
    }


def _members(snapshot: Snapshot) -> dict[str, Row]:
    holds: Counter[int | None] = Counter(
        copy.holder for copy in snapshot.instances if copy.state in ("active", "leased")
    )
    waits = Counter(ticket.member for ticket in waiters(snapshot))
    serves = {copy.server: copy.tag for copy in snapshot.copies if copy.server is not None}
    return {
        f"{member.slot}.{member.generation}": {
            "pid": member.pid,
            "name": printable(member.name),
            "kind": member.kind,
            "alive": member.alive is not False,
            "leads": member.slot == snapshot.leader,
            "since": round(snapshot.taken_s - member.attached_for_s, 1),
            "holds": holds[member.slot],
            "waits": waits[member.slot],
            "serves": printable(serves.get(member.slot, "")),
            "mb": _rounded(member.measured_mb),
        }
        for member in snapshot.members
    }
