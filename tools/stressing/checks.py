"""The checks of the stress run's conductor: on snapshots, on events, and on the workers' claims.

Nothing here kills, starts or changes anything.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mpmm.policy.view import Reason
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.snapshot import InstanceInfo, Snapshot
from stressing.models import size_mb

# How long a ticket may outlive its deadline, and an orphan the process that served it.
OVERDUE_S = 3.0
ORPHAN_S = 5.0
# A handle is checked right before it is handed out; this check may miss a server that died within this time.
BLINK_S = 0.5
# Reservations use estimates, which may change; the device's slack covers that.
ADMISSION_TOLERANCE = 1.05
_TAKEN = ("hit", "granted", "load_ended", "leased")
_FREED = ("released", "load_began", "unload_began", "unload_ended", "load_failed", "lease_ended")


@dataclass
class Violations:
    """Violations by kind, with the first texts of each."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    texts: list[str] = field(default_factory=list)
    kept_of_a_kind: int = 6

    def add(self, kind: str, text: str) -> None:
        """Record a violation."""
        self.counts[kind] += 1
        if self.counts[kind] <= self.kept_of_a_kind:
            self.texts.append(f"{kind}: {text}")

    @property
    def total(self) -> int:
        """The number of violations."""
        return sum(self.counts.values())


@dataclass
class Stop:
    """One SIGSTOP: from when to when (inf while it lasts), and whether the process held the segment's lock."""

    pid: int
    began: float
    ended: float
    held_lock: bool


class History:
    """The processes that the conductor has stopped and killed, and when."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.stops: list[Stop] = []
        self.killed: dict[int, float] = {}
        # By handle: when its server was sent a kill, and when it had ended.
        self.server_kills: dict[str, float] = {}
        self.server_deaths: dict[str, float] = {}

    def lock_was_stopped(self, began: float, ended: float) -> bool:
        """Tell whether a stopped process held the segment's lock at some time in between."""
        return any(stop.held_lock and stop.began < ended and stop.ended > began for stop in self.stops)

    def lock_stopped_s(self, began: float, ended: float) -> float:
        """Return how long stopped processes held the segment's lock in between; only one at a time can."""
        spans = ((max(stop.began, began), min(stop.ended, ended)) for stop in self.stops if stop.held_lock)
        return sum(max(0.0, last - first) for first, last in spans)


class ClaimJudge:
    """Decides which claims of workers are violations."""

    def __init__(self, history: History, violations: Violations) -> None:
        self._history = history
        self._violations = violations
        self.excused: collections.Counter[str] = collections.Counter()

    def judge(self, claim: dict[str, Any]) -> None:
        """Count a claim as a violation, or as excused by what the conductor did."""
        judge: Callable[[dict[str, Any]], bool] = getattr(self, f"_excuse_{claim['kind']}", lambda claim: False)
        if judge(claim):
            self.excused[claim["kind"]] += 1
        else:
            began, ended = claim["began"], claim["ended"]
            when = f"{began - self._history.began:.2f} to {ended - self._history.began:.2f} s"
            stopped = [stop for stop in self._history.stops if stop.began < ended and stop.ended > began]
            moments = [f"pid {stop.pid} stopped at {stop.began - self._history.began:.2f} s" for stop in stopped]
            for pid, moment in self._history.killed.items():
                if began - BLINK_S < moment < ended:
                    moments.append(f"pid {pid} killed at {moment - self._history.began:.2f} s")
            text = f"pid {claim['pid']} (worker {claim['index']}), {when}, meanwhile: {', '.join(moments) or 'nothing'}"
            self._violations.add(claim["kind"], f"{text}\n  {claim['text']}")

    def _excuse_late(self, claim: dict[str, Any]) -> bool:
        return self._history.lock_was_stopped(claim["began"], claim["ended"])

    def _excuse_lock_timeout(self, claim: dict[str, Any]) -> bool:
        history = self._history
        began, ended = claim["began"], claim["ended"]
        involved = {claim["pid"], claim.get("holder")}
        return history.lock_was_stopped(began, ended) or any(
            stop.pid in involved and stop.began < ended and stop.ended > began for stop in history.stops
        )

    def _excuse_server_error(self, claim: dict[str, Any]) -> bool:
        return claim["handle"] in self._history.server_kills

    def _excuse_dead_handle(self, claim: dict[str, Any]) -> bool:
        death = self._history.server_deaths.get(claim["handle"])
        if death is None:
            # Either the conductor killed it an instant ago, or it was wrongly unloaded while in use.
            return claim["handle"] in self._history.server_kills
        return bool(death > max(claim["began"], claim["acquired"] - BLINK_S - claim["lost_s"]))


class SnapshotChecks:
    """Checks one snapshot after another."""

    def __init__(self, history: History, violations: Violations) -> None:
        self._history = history
        self._violations = violations
        self._suspects: set[str] = set()
        self._suspected_at: dict[str, float] = {}
        self._known: dict[int, InstanceInfo] = {}
        # The memory that copies reserved while they loaded, by generation.
        self._let_in_for: dict[int, float] = {}
        self._events = EventChecks(violations)
        self.taken = 0
        self.unconfirmed: list[str] = []
        self.most_booked_mb = 0.0
        self.reasons: collections.Counter[str] = collections.Counter()
        self.written_off_mb = 0.0

    def check(self, snapshot: Snapshot, now: float) -> None:
        """Check a snapshot by itself, and against the one before."""
        self.taken += 1
        lines = set(check_invariants(snapshot)) | set(self._booked(snapshot))
        # A snapshot torn by busy writers breaks invariants, too, but not the same ones twice.
        for line in lines & self._suspects:
            self._violations.add("invariant", line)
        self.unconfirmed.extend(self._suspects - lines)
        self._suspects = lines
        for line in self._rows(snapshot):
            self._violations.add("instance", line)
        self._linger(snapshot, now)
        self.reasons.update(Reason(ticket.reason).name.lower() for ticket in snapshot.tickets)
        self.written_off_mb = max(self.written_off_mb, snapshot.written_off_mb)
        if snapshot.events:
            self._events.check(snapshot)

    def _booked(self, snapshot: Snapshot) -> Iterator[str]:
        """Yield devices that are fuller than the policy allows, counting for each copy the least of its figures.

        A model that runs alone may take any amount. A copy that was admitted for less than it takes, because its model
        was not known yet, counts with that: others were admitted next to it before it was measured.
        """
        self._let_in_for = {
            copy.generation: copy.reserved_mb
            if copy.state == "loading"
            else self._let_in_for.get(copy.generation, math.inf)
            for copy in snapshot.instances
        }
        dead = {member.slot for member in snapshot.members if not member.alive}
        for device in snapshot.devices:
            if device.isolated is not None:
                continue
            here = [
                copy
                for copy in snapshot.instances
                # The memory of an unload, or of a dead process, may be free before the row is.
                if device.row in copy.shares_mb and copy.state != "unloading" and not {copy.owner, copy.server} & dead
            ]
            promised = ("loading", "leased")
            booked_mb = sum(
                copy.reserved_mb / len(copy.shares_mb)
                if copy.state in promised
                else min(
                    copy.shares_mb[device.row],
                    size_mb(copy.tag) / len(copy.shares_mb),
                    self._let_in_for[copy.generation] / len(copy.shares_mb),
                )
                for copy in here
            )
            self.most_booked_mb = max(self.most_booked_mb, booked_mb)
            if booked_mb > device.limit_mb * ADMISSION_TOLERANCE:
                rows = [(copy.tag, copy.state, round(copy.mb), round(copy.reserved_mb)) for copy in here]
                yield f"A1 {booked_mb:.0f} MB are accounted for, the limit is {device.limit_mb:.0f} MB: {rows}"

    def _rows(self, snapshot: Snapshot) -> Iterator[str]:
        """Yield changes that no sequence of transitions can make to an instance row between two snapshots."""
        handles: dict[str, int] = {}
        now: dict[int, InstanceInfo] = {}
        for copy in snapshot.instances:
            now[copy.generation] = copy
            if copy.handle is not None and copy.handle in handles:
                yield f"rows {handles[copy.handle]} and {copy.row} have the same handle {copy.handle}"
            if copy.handle is not None:
                handles[copy.handle] = copy.row
            before = self._known.get(copy.generation)
            if before is None:
                continue
            if (before.row, before.model) != (copy.row, copy.model) or (
                before.handle is not None and before.handle != copy.handle
            ):
                yield f"generation {copy.generation} was {before} and is {copy}"
            moved = before.state == copy.state == "active" and before.holder != copy.holder
            if moved and before.uses == copy.uses:
                yield f"copy {copy.row} went from member {before.holder} to {copy.holder} without a new use"
        self._known = now

    def _linger(self, snapshot: Snapshot, now: float) -> None:
        """Find rows that wait although no process serves them."""
        stopped = {stop.pid for stop in self._history.stops if stop.ended > now - OVERDUE_S}
        pids = {member.slot: member.pid for member in snapshot.members}
        present = set()
        for ticket in snapshot.tickets:
            if ticket.pid not in stopped and ticket.time_left_s < -OVERDUE_S:
                present.add(f"ticket {ticket.number} of {ticket.tag} in state {ticket.state}, pid {ticket.pid}")
        for copy in snapshot.instances:
            holder = pids.get(copy.holder if copy.holder is not None else -1)
            if copy.state in ("unloading", "loading") and copy.for_s > 3 * ORPHAN_S and holder not in stopped:
                present.add(f"copy {copy.generation} of {copy.tag} in state {copy.state}, pid {holder}")
        serving = {copy.server for copy in snapshot.instances}
        for member in snapshot.members:
            if member.kind == "server" and member.slot not in serving:
                present.add(f"server {member.pid} of {member.name} has no copy")
        self._suspected_at = {what: self._suspected_at.get(what, now) for what in present}
        for what, since in self._suspected_at.items():
            # A new server first becomes a member, and then waits for the lock to enter itself in its copy's row.
            stopped_s = self._history.lock_stopped_s(since, now)
            if now - since - stopped_s > ORPHAN_S:
                for_s = f"for {now - since:.1f} s, in {stopped_s:.1f} s of which the lock's holder was stopped"
                self._violations.add("orphan", f"{what} {for_s}; first seen {since - self._history.began:.1f} s in")
                self._suspected_at[what] = float("inf")


class EventChecks:
    """Follows every instance row through the events: no process may take a copy that another has not given back."""

    def __init__(self, violations: Violations) -> None:
        self._violations = violations
        self._created: float | None = None
        self._seen = 0
        self._taken_by: dict[int, str] = {}

    def check(self, snapshot: Snapshot) -> None:
        """Go through the events since the last snapshot; start over if the ring has lost some."""
        first = snapshot.events[0].sequence
        if snapshot.created_wall_s != self._created or first > self._seen + 1:
            self._taken_by.clear()
            self._seen = 0
            self._created = snapshot.created_wall_s
        for event in snapshot.events:
            if event.sequence <= self._seen:
                continue
            self._seen = event.sequence
            if event.kind in ("reaped", "left", "reset"):
                # A dead owner's copies end without events of their own; the next load of a row begins a new copy.
                self._taken_by.clear()
            if event.instance is None:
                continue
            if event.kind == "leased":
                # Like a load, a lease has a new row, which may have held a copy that was lost with its server.
                self._taken_by.pop(event.instance, None)
            if event.kind in _TAKEN:
                holder = self._taken_by.get(event.instance)
                text = f"{event.kind} by pid {event.pid}, event {event.sequence}"
                if holder is not None:
                    self._violations.add("double_use", f"copy {event.instance} of {event.tag}: {holder}, then {text}")
                self._taken_by[event.instance] = text
            elif event.kind in _FREED:
                self._taken_by.pop(event.instance, None)
