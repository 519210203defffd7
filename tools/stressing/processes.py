"""The processes of a stress run: workers, which the conductor forks, and the workers' forked children."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial

from stressing.mailbox import Mailbox
from stressing.models import is_dying
from stressing.run import Run
from stressing.worker import CANNOT_JOIN, LEAVE, RUN, be_worker

__all__ = ["Processes", "RunningWorker"]


@dataclass
class RunningWorker:
    """A worker process as the conductor knows it. A `protected` one is killed only as leader."""

    index: int
    pid: int
    incarnation: str
    protected: bool
    quiet: bool = False
    fds: list[tuple[float, float]] = field(default_factory=list)
    rss_mb: list[tuple[float, float]] = field(default_factory=list)


class Processes:
    """Starts workers, and replaces those that have died.

    phases: the first byte tells all workers what to do; a further byte per worker asks it to fork.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.workers: dict[int, RunningWorker] = {}
        self.children: set[int] = set()
        self.mailbox = Mailbox()
        self.phases = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._starts = 0

    def start(self, index: int) -> None:
        """Fork a worker."""
        self._starts += 1
        incarnation = f"{index}.{self._starts}"
        self._run.namespace.close()
        sys.stdout.flush()
        sys.stderr.flush()
        plan = self._run.plan
        pid = os.fork()
        if not pid:
            os.close(self.mailbox.reader)
            be_worker(plan, index, incarnation, self.mailbox.writer, self.phases)
        protected = index < max(1, plan.processes // 4)
        self.workers[index] = RunningWorker(index, pid, incarnation, protected)

    def _restart(self, index: int) -> None:
        if self.phases[0] <= RUN:
            self.start(index)

    def reap(self) -> None:
        """Collect ended processes, and schedule replacements for workers among them."""
        killed, violations = self._run.history.killed, self._run.violations
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
                if self.phases[0] < LEAVE and pid not in killed and code != CANNOT_JOIN:
                    violations.add("died", f"worker {worker.index} (pid {pid}) ended by itself: {code}")
                elif code and self.phases[0] >= LEAVE and pid not in killed:
                    violations.add("died", f"worker {worker.index} (pid {pid}) left with exit code {code}")
                del self.workers[worker.index]
                if self.phases[0] <= RUN:
                    # Not at once: a newcomer reclaims dead processes' rows, which would flatter the recovery times.
                    start = time.monotonic() + self._run.rng.uniform(0.0, 2.0)
                    self._run.schedule.at(start, partial(self._restart, worker.index))

    def note_quiet(self, index: int, pid: int) -> None:
        """Note that a worker has nothing to do, unless it has been replaced since then."""
        worker = self.workers.get(index)
        if worker is not None and worker.pid == pid:
            worker.quiet = True

    def all_quiet(self) -> bool:
        """Tell whether no worker has anything to do, and no forked child lives; children may outlive their workers."""
        return not self.living_children() and all(worker.quiet for worker in self.workers.values())

    def worker_pids(self) -> list[int]:
        """Return the workers' pids."""
        return [worker.pid for worker in self.workers.values()]

    def living_children(self) -> set[int]:
        """Return the living forked children. Their parents collect them, so pids may be reused."""
        self.children = {pid for pid in self.children if not is_dying(pid) and _group_of(pid) == os.getpgrp()}
        return self.children

    def pids(self) -> set[int]:
        """Return the pids of workers and of their children."""
        return {*self.worker_pids(), *self.living_children()}


def _group_of(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return -1
