"""The conductor of the stress run: it starts workers, has them disturbed and watched, and returns the result.

It does not attach to the namespace: it reads snapshots, and forks workers from itself, which is why it has no threads
and has imported everything beforehand. Orphans become its children, so that it sees every process of the run end.

    processes       the workers, and the children that they fork
    disturbances    kills, stops, forks, exceptions, files that vanish
    observer        snapshots, checked one after another; how long the dead stay in the tables
    drift           whether a process's memory or descriptors keep growing
"""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.sources.visible_devices import VISIBLE_VARIABLE
from stressing.checks import ClaimJudge, Violations
from stressing.descendants import become_subreaper, descendants, descendants_left
from stressing.disturbances import Disturbances
from stressing.drift import find_drifts, take_samples
from stressing.models import ON_GPU, Plan
from stressing.observer import Observer, Recoveries
from stressing.processes import Processes, RunningWorker
from stressing.run import Run
from stressing.worker import LEAVE, QUIET, RUN

__all__ = ["Conductor", "Result", "conduct"]

TICK_S = 0.005
SNAPSHOT_INTERVAL_S = 0.1
SAMPLE_INTERVAL_S = 1.0
PROGRESS_INTERVAL_S = 5.0
QUIET_TIMEOUT_S = 30.0
LEAVE_TIMEOUT_S = 30.0
BUSY_TIMEOUT_S = 5.0
LEFT_TIMEOUT_S = 6.0
KILL_TIMEOUT_S = 10.0


@dataclass
class Result:
    """The result of a run."""

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
    """Conducts one run."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self._plan, self._say = plan, say
        self._run = run = Run(plan)
        self._judge = ClaimJudge(run.history, run.violations)
        self._processes = Processes(run)
        self._observer = Observer(run)
        self._recoveries = Recoveries(run)
        self._disturbances = Disturbances(run, self._processes, self._observer, self._recoveries)
        self._survivors: list[RunningWorker] = []
        self._stopping = False
        self._next_look = 0.0
        self._began = time.monotonic()

    # ---- the run -------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Do the whole run; return its result."""
        become_subreaper()
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        # Workers inherit this until they set a handler of their own.
        before_user = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            for index in range(self._plan.processes):
                self._processes.start(index)
            ready = time.monotonic() + QUIET_TIMEOUT_S
            while not self._all_attached() and time.monotonic() < ready and not self._stopping:
                self._turn()
            self._began = self._run.history.began = time.monotonic()
            self._processes.phases[0] = RUN
            self._disturbances.begin()
            self._run.schedule.at(self._began + PROGRESS_INTERVAL_S, self._progress)
            self._run.schedule.at(self._began, self._sample)
            while time.monotonic() < self._began + self._plan.seconds and not self._stopping:
                self._turn()
            seconds = time.monotonic() - self._began
            left_behind = self._end()
        finally:
            signal.signal(signal.SIGINT, before)
            signal.signal(signal.SIGUSR1, before_user)
            self._kill_all()
        return self._result(seconds, left_behind)

    def _result(self, seconds: float, left_behind: list[str]) -> Result:
        run, observer, disturbances, recoveries = self._run, self._observer, self._disturbances, self._recoveries
        checks = observer.checks
        return Result(
            seed=self._plan.seed,
            seconds=seconds,
            counts=run.counts,
            kills=disturbances.kills,
            stops=disturbances.stops,
            recoveries_s=recoveries.seconds,
            stalled_recoveries_s=recoveries.stalled_s,
            rollbacks=sum(observer.rollbacks.values()),
            leaders=sum(observer.leaders.values()),
            snapshots=checks.taken,
            unconfirmed=checks.unconfirmed,
            excused=self._judge.excused,
            violations=run.violations,
            left_behind=left_behind,
            drifts=find_drifts(self._survivors, self._plan.seconds),
            survivors=len(self._survivors),
            most_booked_mb=checks.most_booked_mb,
            reasons=checks.reasons,
            written_off_mb=checks.written_off_mb,
        )

    def _on_interrupt(self, number: int, frame: object) -> None:
        self._stopping = True

    def _all_attached(self) -> bool:
        snapshot = self._observer.snapshot
        pids = {member.pid for member in snapshot.members} if snapshot else set()
        return pids.issuperset(self._processes.worker_pids())

    def _turn(self) -> None:
        """Do one round of the loop."""
        for message in self._processes.mailbox.messages(TICK_S):
            self._take_message(message)
        self._processes.reap()
        now = time.monotonic()
        self._run.schedule.do_due(now)
        self._recoveries.watch()
        self._disturbances.watch_servers()
        if now >= self._next_look:
            self._observer.look()
            self._next_look = time.monotonic() + SNAPSHOT_INTERVAL_S

    def _turn_until(self, done: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not done() and time.monotonic() < deadline:
            self._turn()

    def _take_message(self, message: dict[str, Any]) -> None:
        what = message["what"]
        if what == "counts":
            self._run.counts.update(message["counts"])
        elif what == "claim":
            self._judge.judge(message)
        elif what == "child":
            self._processes.children.add(message["pid"])
        elif what == "suicide":
            self._disturbances.note_suicide(message["pid"])
        elif what == "quiet":
            self._processes.note_quiet(message["index"], message["pid"])

    def _sample(self) -> None:
        take_samples(self._processes.workers.values(), time.monotonic() - self._began)
        self._run.schedule.at(time.monotonic() + SAMPLE_INTERVAL_S, self._sample)

    def _progress(self) -> None:
        run, snapshot = self._run, self._observer.snapshot
        run.schedule.at(time.monotonic() + PROGRESS_INTERVAL_S, self._progress)
        state = "no namespace"
        if snapshot is not None:
            state = (
                f"{len(snapshot.members)} members, {snapshot.active} active, {snapshot.loading} loading, "
                f"{snapshot.waiting} waiting, {snapshot.evictions} evicted"
            )
        kills, stops = self._disturbances.kills.total(), self._disturbances.stops.total()
        self._say(
            f"{time.monotonic() - self._began:5.0f} s  {run.counts['operations']} operations, "
            f"{kills} kills, {stops} stops, {run.counts['forks']} forks, "
            f"{run.violations.total} violations; {state}"
        )

    # ---- the end -------------------------------------------------------------------------------------------

    def _end(self) -> list[str]:
        """Let all processes finish and leave; return what is left afterwards."""
        processes, namespace, violations = self._processes, self._run.namespace, self._run.violations
        self._survivors = [worker for worker in processes.workers.values() if worker.protected]
        self._disturbances.continue_all()
        self._run.schedule.clear()
        processes.phases[0] = QUIET
        self._turn_until(processes.all_quiet, QUIET_TIMEOUT_S)
        for pid in processes.children:
            violations.add("hung", f"forked child {pid} does not end")
        for worker in processes.workers.values():
            if not worker.quiet:
                violations.add("hung", f"worker {worker.index} (pid {worker.pid}) does not finish")
        self._turn_until(lambda: not self._observer.still_busy(), BUSY_TIMEOUT_S)
        for what in self._observer.still_busy():
            violations.add("leak", what)
        namespace.close()
        processes.phases[0] = LEAVE
        self._turn_until(lambda: not processes.workers, LEAVE_TIMEOUT_S)
        for worker in processes.workers.values():
            violations.add("hung", f"worker {worker.index} (pid {worker.pid}) does not leave")
        namespace.close()
        deadline = time.monotonic() + LEFT_TIMEOUT_S
        while (left := self._left_behind()) and time.monotonic() < deadline:
            self._turn()
            namespace.close()
        return left

    def _left_behind(self) -> list[str]:
        namespace = self._run.namespace
        self._processes.reap()
        left = descendants_left() + namespace.segments_left()
        if left and (snapshot := namespace.read(events=True)) is not None:
            left += [f"member {member}" for member in snapshot.members]
            left += [f"event {event}" for event in snapshot.events[-12:]]
        return left + namespace.files_left()

    def _kill_all(self) -> None:
        """Kill every remaining process, and remove what a failed run leaves."""
        for process in descendants():
            with contextlib.suppress(psutil.Error):
                process.kill()
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while psutil.Process().children() and time.monotonic() < deadline:
            self._processes.reap()
            time.sleep(0.01)
        self._run.namespace.remove_segments()


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
