"""The eyes of a stress run's conductor: it checks snapshots, and times how long dead processes stay in the tables."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from mpmm.shared_state.layout import Member
from mpmm.shared_state.snapshot import Snapshot
from stressing.checks import SnapshotChecks
from stressing.models import is_locked
from stressing.run import Run

__all__ = ["Observer", "Recoveries"]

EVENTS_EVERY = 4
RECOVERY_TIMEOUT_S = 15


class Observer:
    """Takes snapshots and has them checked. snapshot: the newest one.

    rollbacks, leaders: by the segment's creation time, since a new segment counts from zero.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._device = run.plan.device()
        self.checks = SnapshotChecks(run.history, run.violations)
        self.snapshot: Snapshot | None = None
        self.rollbacks: dict[float, int] = {}
        self.leaders: dict[float, int] = {}

    def look(self) -> Snapshot | None:
        """Take a snapshot and check it; free `file` memory that no row names any more."""
        plan = self._run.plan
        folder = os.path.join(plan.folder, "device")
        loose = [name for name in os.listdir(folder) if name.startswith("file-")]
        loose = [name for name in loose if not is_locked(os.path.join(folder, name))]
        snapshot = self._run.namespace.read(events=self.checks.taken % EVENTS_EVERY == 0)
        named = {copy.handle for copy in snapshot.instances} if snapshot else set()
        # After a removal of its folder, the namespace cannot be found for a second, but still exists.
        unseen = snapshot is None and plan.remove_rate > 0
        for name in loose:
            if name not in named and not unseen:
                Path(folder, name).unlink(missing_ok=True)
        self._device.tidy()
        if snapshot is None:
            return None
        self.snapshot = snapshot
        self.rollbacks[snapshot.created_wall_s] = snapshot.rollbacks
        self.leaders[snapshot.created_wall_s] = snapshot.leaders
        self.checks.check(snapshot, time.monotonic())
        return snapshot

    def leader_pid(self) -> int | None:
        """Return the leader's pid in the newest snapshot."""
        if self.snapshot is None:
            return None
        slot = self.snapshot.leader
        return next((member.pid for member in self.snapshot.members if member.slot == slot), None)

    def still_busy(self) -> list[str]:
        """Return the copies and tickets that must not exist when all workers are quiet."""
        snapshot = self.snapshot
        if snapshot is None:
            return []
        pids = {member.slot: member.pid for member in snapshot.members}
        return [
            f"copy {copy.row} of {copy.tag} is {copy.state}, holder pid {pids.get(copy.holder)}, but not in use"
            for copy in snapshot.instances
            if copy.state in ("active", "loading") and copy.holder is not None
        ] + [f"ticket {ticket.number} of {ticket.tag}, pid {ticket.pid}, has no waiter" for ticket in snapshot.tickets]


@dataclass
class _Recovery:
    """A killed process whose row has not been freed yet."""

    pid: int
    slot: int
    generation: int
    killed_at: float


class Recoveries:
    """Times how long the rows of killed processes stay. stalled_s: while a stopped process held the segment's lock."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._expected: list[_Recovery] = []
        self.seconds: list[float] = []
        self.stalled_s: list[float] = []

    def expect(self, pid: int, killed_at: float) -> None:
        """Time how long the row of a killed process stays, if it had a copy, a ticket, the lead or a transaction."""
        self._run.history.killed[pid] = killed_at
        snapshot = self._run.namespace.read(events=False)
        member = next((member for member in snapshot.members if member.pid == pid), None) if snapshot else None
        if snapshot is None or member is None:
            return
        slot = member.slot
        if (
            any(slot in (copy.holder, copy.owner) for copy in snapshot.instances)
            or any(ticket.member == slot for ticket in snapshot.tickets)
            or snapshot.leader == slot
            or snapshot.torn_words
        ):
            self._expected.append(_Recovery(pid, slot, member.generation, killed_at))

    def watch(self) -> None:
        """Note which rows have been freed since the last time."""
        segment = self._run.namespace.segment() if self._expected else None
        if segment is None:
            return
        now = time.monotonic()
        for recovery in list(self._expected):
            at = segment.layout.members.base + recovery.slot * Member.WORDS
            gone = not segment.words[at] or segment.words[at + Member.GENERATION] != recovery.generation
            if gone:
                stalled = self._run.history.lock_was_stopped(recovery.killed_at, now)
                (self.stalled_s if stalled else self.seconds).append(now - recovery.killed_at)
                self._expected.remove(recovery)
            elif now - recovery.killed_at > RECOVERY_TIMEOUT_S:
                text = f"the rows of pid {recovery.pid} were not reclaimed within {RECOVERY_TIMEOUT_S} s"
                self._run.violations.add("recovery", text)
                self._expected.remove(recovery)
