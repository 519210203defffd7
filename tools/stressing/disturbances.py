"""Disturbances of a stress run: the conductor kills, stops and interrupts processes, makes them fork, removes files."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import select
import shutil
import signal
import time
from functools import partial

from stressing.checks import Stop
from stressing.models import is_stopped
from stressing.observer import Observer, Recoveries
from stressing.processes import Processes
from stressing.run import Run

__all__ = ["Disturbances"]

AIM_S = 0.03
STOP_TIMEOUT_S = 0.5


class Disturbances:
    """Disturbs a run at random moments. kills, stops: counts by the process's role and action."""

    def __init__(self, run: Run, processes: Processes, observer: Observer, recoveries: Recoveries) -> None:
        self._run, self._rng, self._history = run, run.rng, run.history
        self._processes, self._observer, self._recoveries = processes, observer, recoveries
        self.kills: collections.Counter[str] = collections.Counter()
        self.stops: collections.Counter[str] = collections.Counter()
        # By handle: the server's pidfd, -1 if there is none.
        self._dying_servers: dict[str, int] = {}

    def begin(self) -> None:
        """Disturb the run from now on."""
        plan, repeat = self._run.plan, self._run.schedule.repeat
        repeat(plan.kill_rate, self._kill_somebody)
        repeat(plan.stop_rate, self._stop_somebody)
        repeat(plan.fork_rate, self._fork_somebody)
        repeat(plan.interrupt_rate, self._interrupt_somebody)
        repeat(plan.remove_rate, self._remove_something)

    # ---- kills ---------------------------------------------------------------------------------------------

    def _kill_somebody(self) -> None:
        """Kill a worker, one in mid-transaction, the leader, a forked child, or a model server."""
        snapshot = self._observer.look() or self._observer.snapshot
        if snapshot is None:
            return
        processes, draw = self._processes, self._rng.random()
        servers = [member for member in snapshot.members if member.kind == "server" and member.alive]
        fair = [worker.pid for worker in processes.workers.values() if not worker.protected]
        if draw < 0.15:
            leader = self._observer.leader_pid()
            if leader is not None and leader in processes.pids():
                self._kill(leader, "leader")
        elif draw < 0.35 and servers:
            server = self._rng.choice(servers)
            states = {copy.server: copy.state for copy in snapshot.instances}
            state = states.get(server.slot, "without copy")
            self._history.server_kills[server.name] = time.monotonic()
            self._dying_servers[server.name] = _pidfd(server.pid)
            self._kill(server.pid, f"server {state}")
        elif draw < 0.6:
            pid = self._run.namespace.find_transaction(AIM_S)
            if pid is not None and (pid in fair or pid in processes.living_children()):
                self._kill(pid, "in transaction")
        elif draw < 0.65 and processes.living_children():
            self._kill(self._rng.choice(sorted(processes.children)), "forked child")
        elif fair:
            self._kill(self._rng.choice(fair), "worker")

    def _kill(self, pid: int, kind: str) -> None:
        self._history.killed[pid] = killed_at = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills[kind] += 1
            if not kind.startswith("server"):
                self._recoveries.expect(pid, killed_at)

    def note_suicide(self, pid: int) -> None:
        """Count a forked child that has killed itself on request."""
        self.kills["forked child"] += 1
        self._recoveries.expect(pid, time.monotonic())

    def watch_servers(self) -> None:
        """Note which of the killed servers have ended."""
        for handle, fd in list(self._dying_servers.items()):
            if fd < 0 or select.select([fd], [], [], 0)[0]:
                self._history.server_deaths[handle] = time.monotonic()
                del self._dying_servers[handle]
                if fd >= 0:
                    os.close(fd)

    # ---- stops ---------------------------------------------------------------------------------------------

    def _stop_somebody(self) -> None:
        """Stop a worker or the leader for a moment, or for longer than any process waits for the lock."""
        draw = self._rng.random()
        kind = "worker"
        pids = self._processes.worker_pids()
        pid: int | None = self._rng.choice(pids) if pids else None
        if draw < 0.3:
            pid, kind = self._run.namespace.find_transaction(AIM_S), "in transaction"
        elif draw < 0.45 and self._observer.snapshot is not None:
            pid, kind = self._observer.leader_pid(), "leader"
        if pid is None or pid not in self._processes.pids() or self._is_stopped(pid):
            return
        long = self._rng.random() < 0.2
        lock_timeout_s = self._run.plan.lock_timeout_s
        seconds = lock_timeout_s * self._rng.uniform(1.2, 1.8) if long else self._rng.uniform(0.01, 0.3)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            now = time.monotonic()
            stop = Stop(pid, now, math.inf, self._stopped_with_lock(pid))
            self._history.stops.append(stop)
            self.stops[f"{kind}{', long' if long else ''}{', with the lock' if stop.held_lock else ''}"] += 1
            self._run.schedule.at(now + seconds, partial(self._continue, stop))

    def _is_stopped(self, pid: int) -> bool:
        return any(stop.pid == pid and stop.ended == math.inf for stop in self._history.stops)

    def _stopped_with_lock(self, pid: int) -> bool:
        """Wait until a process that was just sent SIGSTOP has stopped; tell whether it holds the segment's lock."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline and not is_stopped(pid):
            time.sleep(0.001)
        return self._run.namespace.has_lock(pid)

    def _continue(self, stop: Stop) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stop.pid, signal.SIGCONT)
        stop.ended = time.monotonic()

    def continue_all(self) -> None:
        """Let all stopped processes run again."""
        for stop in self._history.stops:
            if stop.ended == math.inf:
                self._continue(stop)

    # ---- others --------------------------------------------------------------------------------------------

    def _fork_somebody(self) -> None:
        if self._processes.workers:
            self._processes.phases[1 + self._rng.choice(sorted(self._processes.workers))] = 1

    def _interrupt_somebody(self) -> None:
        """Make a worker's main thread raise an exception, if it is in the middle of a call."""
        if self._processes.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rng.choice(self._processes.worker_pids()), signal.SIGUSR1)

    def _remove_something(self) -> None:
        """Remove a file of the namespace, or its folder, like programs that clean up by age or by name."""
        folder = self._run.namespace.root / self._run.plan.namespace
        with contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(folder))
            self._run.counts["removals"] += 1
            if self._rng.random() < 0.1 or not names:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                os.unlink(folder / self._rng.choice(names))


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1
