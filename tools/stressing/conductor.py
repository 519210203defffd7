"""The conductor of the stress run: starts workers, kills, stops and forks them, watches the state, counts.

It is attached to nothing: it reads snapshots, and forks workers from itself, which is why it has no threads and has
imported everything already. Orphans become its children, so that it sees the end of every process of the run.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import math
import mmap
import os
import random
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from mpmm.errors import LayoutMismatchError
from mpmm.shared_state.layout import Header, Member
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.segment import Segment, SegmentProblem, segment_name
from mpmm.shared_state.snapshot import Snapshot, read_snapshot
from mpmm.sources.visible_devices import VISIBLE_VARIABLE
from stressing.checks import ClaimJudge, History, SnapshotChecks, Stop, Violations, fit_slope
from stressing.mailbox import Mailbox
from stressing.models import ON_GPU, Plan, is_dying, is_locked, is_stopped
from stressing.worker import LEAVE, QUIET, RUN, be_worker

NAMESPACE = "stress"
TICK_S = 0.005
SNAPSHOT_INTERVAL_S = 0.1
EVENTS_EVERY = 4
SAMPLE_INTERVAL_S = 1.0
PROGRESS_INTERVAL_S = 5.0
QUIET_TIMEOUT_S = 30.0
LEAVE_TIMEOUT_S = 30.0
AIM_S = 0.03
STOP_TIMEOUT_S = 0.5
MIB = 2**20
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class RunningWorker:
    """A worker process as the conductor knows it. `protected` ones are killed only as leaders."""

    index: int
    pid: int
    incarnation: str
    protected: bool
    quiet: bool = False
    fds: list[tuple[float, float]] = field(default_factory=list)
    rss_mb: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Recovery:
    """Waiting for a dead member's row to go. excused: a stopped process had the lock meanwhile."""

    pid: int
    slot: int
    generation: int
    killed_at: float


@dataclass
class Result:
    """What a run has come to."""

    seed: int
    seconds: float
    counts: collections.Counter[str]
    kills: collections.Counter[str]
    stops: collections.Counter[str]
    recoveries_s: list[float]
    stalled_recoveries_s: list[float]
    rollbacks: int
    leaders: int
    snapshots: int
    unconfirmed: list[str]
    excused: collections.Counter[str]
    violations: Violations
    left_behind: list[str]
    drifts: dict[str, tuple[float, float, float, float]]
    survivors: int
    most_booked_mb: float
    reasons: collections.Counter[str]
    written_off_mb: float


class Conductor:
    """One run."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.say = say
        self.rng = random.Random(plan.seed)
        self.root = Path(plan.folder, "r")
        self.history = History()
        self.violations = Violations()
        self.judge = ClaimJudge(self.history, self.violations)
        self.checks = SnapshotChecks(self.history, self.violations)
        self.workers: dict[int, RunningWorker] = {}
        self.children: set[int] = set()
        self.due: list[tuple[float, Callable[[], None]]] = []
        self.recoveries: list[Recovery] = []
        self.recoveries_s: list[float] = []
        self.stalled_recoveries_s: list[float] = []
        self.kills: collections.Counter[str] = collections.Counter()
        self.stops: collections.Counter[str] = collections.Counter()
        self.counts: collections.Counter[str] = collections.Counter()
        self.dying_servers: dict[str, int] = {}
        self.rollbacks: dict[float, int] = {}
        self.leaders: dict[float, int] = {}
        self.segments: set[str] = set()
        self.segment: Segment | None = None
        self.snapshot: Snapshot | None = None
        self.starts = 0
        self.stopping = False
        self.mailbox = Mailbox()
        self.phases = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self.device = plan.device()
        self.began = time.monotonic()

    # ---- the run -------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Do it all."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        # Workers inherit that, for as long as they have no handler of their own yet.
        before_user = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            for index in range(self.plan.processes):
                self._start(index)
            ready = time.monotonic() + QUIET_TIMEOUT_S
            while not self._all_attached() and time.monotonic() < ready and not self.stopping:
                self._turn()
            self.began = self.history.began = time.monotonic()
            self.phases[0] = RUN
            self._plan_events()
            while time.monotonic() < self.began + self.plan.seconds and not self.stopping:
                self._turn()
            seconds = time.monotonic() - self.began
            left_behind = self._end()
        finally:
            signal.signal(signal.SIGINT, before)
            signal.signal(signal.SIGUSR1, before_user)
            self._kill_all()
        return Result(
            self.plan.seed,
            seconds,
            self.counts,
            self.kills,
            self.stops,
            self.recoveries_s,
            self.stalled_recoveries_s,
            sum(self.rollbacks.values()),
            sum(self.leaders.values()),
            self.checks.taken,
            self.checks.unconfirmed,
            self.judge.excused,
            self.violations,
            left_behind,
            self._drifts(),
            len(self._survivors()),
            self.checks.most_booked_mb,
            self.checks.reasons,
            self.checks.written_off_mb,
        )

    def _on_interrupt(self, number: int, frame: object) -> None:
        self.stopping = True

    def _all_attached(self) -> bool:
        pids = {member.pid for member in self.snapshot.members} if self.snapshot else set()
        return all(worker.pid in pids for worker in self.workers.values())

    def _plan_events(self) -> None:
        now = self.began
        for rate, action in (
            (self.plan.kill_rate, self._kill_somebody),
            (self.plan.stop_rate, self._stop_somebody),
            (self.plan.fork_rate, self._fork_somebody),
            (self.plan.interrupt_rate, self._interrupt_somebody),
            (self.plan.remove_rate, self._remove_something),
        ):
            self._repeat(rate, action)
        self.due.append((now + PROGRESS_INTERVAL_S, self._progress))
        self.due.append((now, self._sample))

    def _repeat(self, rate: float, action: Callable[[], None]) -> None:
        """Do something at random moments, `rate` times a second."""
        if rate <= 0:
            return

        def act() -> None:
            action()
            self._repeat(rate, action)

        self.due.append((time.monotonic() + self.rng.expovariate(rate), act))

    _next_snapshot = 0.0

    def _turn(self) -> None:
        """One round of the loop."""
        self._read_messages(TICK_S)
        self._reap()
        now = time.monotonic()
        due = [action for moment, action in self.due if moment <= now]
        self.due = [entry for entry in self.due if entry[0] > now]
        for action in due:
            action()
        self._watch_recoveries()
        self._watch_servers()
        if now >= self._next_snapshot:
            self._look()
            self._next_snapshot = time.monotonic() + SNAPSHOT_INTERVAL_S

    # ---- processes -----------------------------------------------------------------------------------------

    def _start(self, index: int) -> None:
        self.starts += 1
        incarnation = f"{index}.{self.starts}"
        self._close_segment()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            os.close(self.mailbox.reader)
            be_worker(self.plan, index, incarnation, self.mailbox.writer, self.phases)
        protected = index < max(1, self.plan.processes // 4)
        self.workers[index] = RunningWorker(index, pid, incarnation, protected)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                self.children.discard(pid)
                worker = next((worker for worker in self.workers.values() if worker.pid == pid), None)
                if worker is None:
                    continue
                code = os.waitstatus_to_exitcode(status)
                if self.phases[0] < LEAVE and pid not in self.history.killed and code != 4:
                    self.violations.add("died", f"worker {worker.index} (pid {pid}) ended by itself: {code}")
                elif code and self.phases[0] >= LEAVE and pid not in self.history.killed:
                    self.violations.add("died", f"worker {worker.index} (pid {pid}) left with exit code {code}")
                del self.workers[worker.index]
                if self.phases[0] <= RUN:
                    # Not at once: a newcomer takes back what the dead had, and would flatter the recovery times.
                    start = time.monotonic() + self.rng.uniform(0.0, 2.0)
                    self.due.append((start, partial(self._restart, worker.index)))

    def _restart(self, index: int) -> None:
        if self.phases[0] <= RUN:
            self._start(index)

    def _read_messages(self, timeout_s: float) -> None:
        for message in self.mailbox.messages(timeout_s):
            self._take_message(message)

    def _take_message(self, message: dict[str, Any]) -> None:
        what = message["what"]
        if what == "counts":
            self.counts.update(message["counts"])
        elif what == "claim":
            self.judge.judge(message)
        elif what == "child":
            self.children.add(message["pid"])
        elif what == "suicide":
            self.kills["forked child"] += 1
            self._expect_recovery(message["pid"], time.monotonic())
        elif what == "quiet":
            worker = self.workers.get(message["index"])
            if worker is not None and worker.pid == message["pid"]:
                worker.quiet = True

    # ---- disturbances --------------------------------------------------------------------------------------

    def _kill_somebody(self) -> None:
        """Kill a worker, one in mid-transaction, the leader, a forked child, or a model server."""
        snapshot = self._look() or self.snapshot
        if snapshot is None:
            return
        draw = self.rng.random()
        servers = [member for member in snapshot.members if member.kind == "server" and member.alive]
        fair = [worker.pid for worker in self.workers.values() if not worker.protected]
        if draw < 0.15:
            leader = next((member.pid for member in snapshot.members if member.slot == snapshot.leader), None)
            if leader is not None and leader in self._own_pids():
                self._kill(leader, "leader")
        elif draw < 0.35 and servers:
            server = self.rng.choice(servers)
            states = {copy.server: copy.state for copy in snapshot.instances}
            state = states.get(server.slot, "without copy")
            self.history.server_kills[server.name] = time.monotonic()
            self.dying_servers[server.name] = self._pidfd(server.pid)
            self._kill(server.pid, f"server {state}")
        elif draw < 0.6:
            pid = self._aim()
            if pid is not None and (pid in fair or pid in self._living_children()):
                self._kill(pid, "in transaction")
        elif draw < 0.65 and self._living_children():
            self._kill(self.rng.choice(sorted(self.children)), "forked child")
        elif fair:
            self._kill(self.rng.choice(fair), "worker")

    def _kill(self, pid: int, kind: str) -> None:
        self.history.killed[pid] = killed_at = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills[kind] += 1
            if not kind.startswith("server"):
                self._expect_recovery(pid, killed_at)

    @staticmethod
    def _pidfd(pid: int) -> int:
        try:
            return os.pidfd_open(pid)
        except (AttributeError, OSError):
            return -1

    def _watch_servers(self) -> None:
        for handle, fd in list(self.dying_servers.items()):
            if fd < 0 or select.select([fd], [], [], 0)[0]:
                self.history.server_deaths[handle] = time.monotonic()
                del self.dying_servers[handle]
                if fd >= 0:
                    os.close(fd)

    def _living_children(self) -> set[int]:
        """Return the forked children that are still there; their parents wait for them, so pids can come again."""
        self.children = {pid for pid in self.children if not is_dying(pid) and _group_of(pid) == os.getpgrp()}
        return self.children

    def _own_pids(self) -> set[int]:
        return {worker.pid for worker in self.workers.values()} | self._living_children()

    def _aim(self) -> int | None:
        """Return the pid of a process that is in a transaction at this instant; None if there is none for a while."""
        segment = self._open_segment()
        if segment is None:
            return None
        words = segment.words
        deadline = time.monotonic() + AIM_S
        while time.monotonic() < deadline:
            if words[Header.CHANGE] & 1:
                return int(words[Header.LOCK_HOLDER])
        return None

    def _stop_somebody(self) -> None:
        """Stop a worker or the leader for a moment, or for longer than anybody waits for the lock."""
        draw = self.rng.random()
        kind = "worker"
        pid: int | None = self.rng.choice([worker.pid for worker in self.workers.values()]) if self.workers else None
        if draw < 0.3:
            pid, kind = self._aim(), "in transaction"
        elif draw < 0.45 and self.snapshot is not None:
            leader = self.snapshot.leader
            pid = next((member.pid for member in self.snapshot.members if member.slot == leader), None)
            kind = "leader"
        if pid is None or pid not in self._own_pids() or self._is_stopped(pid):
            return
        long = self.rng.random() < 0.2
        seconds = self.plan.lock_timeout_s * self.rng.uniform(1.2, 1.8) if long else self.rng.uniform(0.01, 0.3)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            now = time.monotonic()
            stop = Stop(pid, now, math.inf, self._holds_lock(pid))
            self.history.stops.append(stop)
            self.stops[f"{kind}{', long' if long else ''}{', with the lock' if stop.held_lock else ''}"] += 1
            self.due.append((now + seconds, lambda: self._continue(stop)))

    def _is_stopped(self, pid: int) -> bool:
        return any(stop.pid == pid and stop.ended == math.inf for stop in self.history.stops)

    def _holds_lock(self, pid: int) -> bool:
        """Tell whether a process that was just sent SIGSTOP has the segment's lock; the kernel's list knows."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline and not is_stopped(pid):
            time.sleep(0.001)
        try:
            inode = os.stat(Path("/dev/shm", segment_name(self.root, NAMESPACE))).st_ino
            locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        except OSError:
            return False
        return any(
            fields[1] == "FLOCK" and int(fields[4]) == pid and int(fields[5].rpartition(":")[2]) == inode
            for fields in locks
        )

    def _continue(self, stop: Stop) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stop.pid, signal.SIGCONT)
        stop.ended = time.monotonic()

    def _fork_somebody(self) -> None:
        if self.workers:
            self.phases[1 + self.rng.choice(sorted(self.workers))] = 1

    def _interrupt_somebody(self) -> None:
        """Have a worker's main thread raise an exception, if it is in the middle of a call."""
        if self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rng.choice([worker.pid for worker in self.workers.values()]), signal.SIGUSR1)

    def _remove_something(self) -> None:
        """Remove a file of the namespace, or its folder, as those do who clean up by age or by name."""
        folder = self.root / NAMESPACE
        with contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(folder))
            self.counts["removals"] += 1
            if self.rng.random() < 0.1 or not names:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                os.unlink(folder / self.rng.choice(names))

    # ---- watching ------------------------------------------------------------------------------------------

    def _look(self) -> Snapshot | None:
        """Take a snapshot and check it; clear away memory that nobody's row names any more."""
        folder = os.path.join(self.plan.folder, "device")
        loose = [name for name in os.listdir(folder) if name.startswith("file-")]
        loose = [name for name in loose if not is_locked(os.path.join(folder, name))]
        snapshot = self._read(events=self.checks.taken % EVENTS_EVERY == 0)
        named = {copy.handle for copy in snapshot.instances} if snapshot else set()
        # Without a folder nobody finds the namespace for a second, which is there all the same.
        unseen = snapshot is None and self.plan.remove_rate > 0
        for name in loose:
            if name not in named and not unseen:
                Path(folder, name).unlink(missing_ok=True)
        self.device.tidy()
        if snapshot is None:
            return None
        self.snapshot = snapshot
        self.segments.add(snapshot.segment)
        self.rollbacks[snapshot.created_wall_s] = snapshot.rollbacks
        self.leaders[snapshot.created_wall_s] = snapshot.leaders
        self.checks.check(snapshot, time.monotonic())
        return snapshot

    def _read(self, events: bool) -> Snapshot | None:
        try:
            return read_snapshot(NAMESPACE, self.root, events=events)
        except (FileNotFoundError, LayoutMismatchError):
            # Not yet, or not any more, or just now.
            return None

    def _open_segment(self) -> Segment | None:
        """Return the segment for reading single words of it."""
        if self.segment is None:
            with contextlib.suppress(SegmentProblem, FileNotFoundError):
                self.segment = Segment.open(segment_name(self.root, NAMESPACE))
        return self.segment

    def _close_segment(self) -> None:
        if self.segment is not None:
            self.segment.close()
            self.segment = None

    def _expect_recovery(self, pid: int, killed_at: float) -> None:
        """Time how long the row of a killed process stays, if it had anything worth taking back."""
        self.history.killed[pid] = killed_at
        snapshot = self._read(events=False)
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
            self.recoveries.append(Recovery(pid, slot, member.generation, killed_at))

    def _watch_recoveries(self) -> None:
        segment = self._open_segment() if self.recoveries else None
        if segment is None:
            return
        now = time.monotonic()
        for recovery in list(self.recoveries):
            at = segment.layout.members.base + recovery.slot * Member.WORDS
            gone = not segment.words[at] or segment.words[at + Member.GENERATION] != recovery.generation
            if gone:
                stalled = self.history.lock_was_stopped(recovery.killed_at, now)
                (self.stalled_recoveries_s if stalled else self.recoveries_s).append(now - recovery.killed_at)
                self.recoveries.remove(recovery)
            elif now - recovery.killed_at > 15:
                self.violations.add("recovery", f"what pid {recovery.pid} had was not taken back within 15 s")
                self.recoveries.remove(recovery)

    def _sample(self) -> None:
        """Take memory and descriptors of the workers that are meant to survive."""
        now = time.monotonic() - self.began
        for worker in self.workers.values():
            if worker.protected:
                with contextlib.suppress(psutil.Error, OSError):
                    worker.fds.append((now, float(len(os.listdir(f"/proc/{worker.pid}/fd")))))
                    worker.rss_mb.append((now, psutil.Process(worker.pid).memory_info().rss / MIB))
        self.due.append((time.monotonic() + SAMPLE_INTERVAL_S, self._sample))

    def _survivors(self) -> list[RunningWorker]:
        return self._last_workers

    _last_workers: list[RunningWorker] = []

    def _drifts(self) -> dict[str, tuple[float, float, float, float]]:
        """Return for fds and rss_mb: means over the survivors' first, middle and last part, and slope a minute.

        The slope is that of the second half: at first a process only meets all models.
        """
        drifts = {}
        for name in ("fds", "rss_mb"):
            parts: list[list[float]] = [[], [], []]
            slopes = []
            for worker in self._survivors():
                points: list[tuple[float, float]] = getattr(worker, name)
                if len(points) < 9 or points[0][0] > self.plan.seconds / 4:
                    continue
                third = len(points) // 3
                for part, chosen in zip(parts, (points[:third], points[third:-third], points[-third:]), strict=True):
                    part.append(statistics.fmean(value for _, value in chosen))
                slopes.append(60 * fit_slope(points[len(points) // 2 :]))
            if slopes:
                means = [statistics.fmean(part) for part in parts]
                drifts[name] = (means[0], means[1], means[2], statistics.fmean(slopes))
        return drifts

    def _progress(self) -> None:
        self.due.append((time.monotonic() + PROGRESS_INTERVAL_S, self._progress))
        snapshot = self.snapshot
        state = "no namespace"
        if snapshot is not None:
            state = (
                f"{len(snapshot.members)} members, {snapshot.active} active, {snapshot.loading} loading, "
                f"{snapshot.waiting} waiting, {snapshot.evictions} evicted"
            )
        self.say(
            f"{time.monotonic() - self.began:5.0f} s  {self.counts['operations']} operations, "
            f"{sum(self.kills.values())} kills, {sum(self.stops.values())} stops, {self.counts['forks']} forks, "
            f"{self.violations.total} violations; {state}"
        )

    # ---- the end -------------------------------------------------------------------------------------------

    def _end(self) -> list[str]:
        """Let everybody finish and leave; return what is still there afterwards."""
        self._last_workers = [worker for worker in self.workers.values() if worker.protected]
        for stop in self.history.stops:
            if stop.ended == math.inf:
                self._continue(stop)
        self.due.clear()
        self.phases[0] = QUIET
        self._turn_until(self._all_quiet, QUIET_TIMEOUT_S)
        for pid in self.children:
            self.violations.add("hung", f"forked child {pid} does not come to an end")
        for worker in self.workers.values():
            if not worker.quiet:
                self.violations.add("hung", f"worker {worker.index} (pid {worker.pid}) does not come to an end")
        self._turn_until(lambda: not self._busy(), 5.0)
        for what in self._busy():
            self.violations.add("leak", what)
        self._close_segment()
        self.phases[0] = LEAVE
        self._turn_until(lambda: not self.workers, LEAVE_TIMEOUT_S)
        for worker in self.workers.values():
            self.violations.add("hung", f"worker {worker.index} (pid {worker.pid}) does not leave")
        self._close_segment()
        deadline = time.monotonic() + 6.0
        while (left := self._left_behind()) and time.monotonic() < deadline:
            self._turn()
            self._close_segment()
        return left

    def _all_quiet(self) -> bool:
        """Tell whether all workers have nothing to do; forked children may have outlived theirs."""
        return not self._living_children() and all(worker.quiet for worker in self.workers.values())

    def _turn_until(self, done: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not done() and time.monotonic() < deadline:
            self._turn()

    def _busy(self) -> list[str]:
        """Return what must not be there when nobody does anything."""
        snapshot = self.snapshot
        if snapshot is None:
            return []
        pids = {member.slot: member.pid for member in snapshot.members}
        return [
            f"copy {copy.row} of {copy.tag} is {copy.state}, holder pid {pids.get(copy.holder)}, nobody uses it"
            for copy in snapshot.instances
            if copy.state in ("active", "loading") and copy.holder is not None
        ] + [f"ticket {ticket.number} of {ticket.tag}, pid {ticket.pid}, nobody waits" for ticket in snapshot.tickets]

    def _left_behind(self) -> list[str]:
        self._reap()
        left = [f"process {child.pid}: {_command_of(child)}" for child in psutil.Process().children(recursive=True)]
        left += [f"shared memory {name}" for name in self.segments if os.path.exists(f"/dev/shm/{name}")]
        if left and (snapshot := self._read(events=True)) is not None:
            left += [f"member {member}" for member in snapshot.members]
            left += [f"event {event}" for event in snapshot.events[-12:]]
        # Not Path.rglob, which does not take it well when a folder goes while it looks.
        return left + [
            f"file {folder}/{name}" for folder, folders, files in os.walk(self.root) for name in folders + files
        ]

    def _kill_all(self) -> None:
        """End every process that is still there, and remove what a failed run leaves."""
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        deadline = time.monotonic() + 10.0
        while psutil.Process().children() and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.01)
        for name in self.segments:
            Path("/dev/shm", name).unlink(missing_ok=True)
        self._close_segment()


def _group_of(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return -1


def _command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:200] or str(process.status())
    return "gone"


def conduct(plan_of: Callable[[str], Plan], say: Callable[[str], None]) -> Result:
    """Make a folder for a run, do the run there, and remove the folder. Socket paths must be short."""
    folder = tempfile.mkdtemp(prefix="mpmm-s")
    before = dict(os.environ)
    try:
        for name in ("r", "device", "held"):
            os.mkdir(os.path.join(folder, name), 0o700)
        os.environ[RUNTIME_DIR_VARIABLE] = os.path.join(folder, "r")
        plan = plan_of(folder)
        os.environ.update(plan.make_gpu())
        if plan.source in ON_GPU:
            os.environ.pop(VISIBLE_VARIABLE, None)
        return Conductor(plan, say).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(before)
