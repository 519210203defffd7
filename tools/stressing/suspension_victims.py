"""The victims of the suspension run: the process with a role for a copy, and the step that this copy has reached."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from devices.simulated_checkpoints import CHECKPOINTED, LOCKED, RUNNING
from devices.simulated_gpu import SimulatedGpus

from mpmm.shared_state.layout import Instance
from mpmm.shared_state.tables import Tables
from stressing.models import is_dying
from stressing.namespace import WatchedNamespace

__all__ = ["AT_REST", "ROLES", "STEPS", "Move", "Victims"]

ROLES = ("helper", "target", "requester", "leader")
_DRIVER = {RUNNING: "running", LOCKED: "locked", CHECKPOINTED: "checkpointed"}
# The row's state, and how far the driver is, in the order in which a copy passes them.
STEPS = (
    "suspending: running",
    "suspending: locked",
    "suspending: locked, part moved",
    "suspending: checkpointed",
    "resuming: checkpointed",
    "resuming: checkpointed, part moved",
    "resuming: locked",
    "resuming: running",
)
# Steps not listed need no kills: if a resume was aborted, a copy may be in mid-restore while its row says `suspending`.
AT_REST = "nothing moves"
# After more deaths of helpers than it retries for one copy, mpmm would blame the copy: see `helper.TRIES`.
HELPERS_A_MOVE = 2


@dataclass(frozen=True)
class Move:
    """A copy that is being suspended or resumed. requester, target: pids."""

    row: int
    generation: int
    since: int
    step: str
    requester: int
    target: int


class Victims:
    """Finds processes by their roles, and kills them.

    kills: counts by role and step. killed: the pids. story: the kills since the conductor last cleared it.
    """

    def __init__(
        self, namespace: WatchedNamespace, gpus: SimulatedGpus, workers: Collection[int], rng: random.Random
    ) -> None:
        """workers: the pids of the living workers; the conductor keeps it up to date."""
        self._namespace, self._gpus, self._workers, self._rng = namespace, gpus, workers, rng
        self.kills: collections.Counter[tuple[str, str]] = collections.Counter()
        self.killed: set[int] = set()
        self.story: list[str] = []
        self._helper = 0
        self._helpers_of: collections.Counter[tuple[int, int]] = collections.Counter()

    def neglected(self) -> list[tuple[str, Move]]:
        """Return the roles and moving copies whose step has had at most the average of kills, the fewest first."""
        kills = self.kills
        mean = sum(kills[role, step] for role in ROLES for step in STEPS) / (len(ROLES) * len(STEPS))
        cells = [(role, move) for move in self.moves() if move.step in STEPS for role in ROLES]
        cells = [(role, move) for role, move in cells if kills[role, move.step] <= mean]
        return sorted(cells, key=lambda cell: (kills[cell[0], cell[1].step], self._rng.random()))

    def strike(self, role: str, move: Move | None) -> bool:
        """Kill the process in this role now; return False if there is none."""
        pid = self._victim(role, move)
        if pid <= 0 or is_dying(pid):
            return False
        if role == "helper":
            moves = {(one.generation, one.since) for one in self.moves()}
            if any(self._helpers_of[one] >= HELPERS_A_MOVE for one in moves):
                return False
            self._helpers_of.update(moves)
        self.killed.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        step = AT_REST if move is None else move.step
        self.kills[role, step] += 1
        self.story.append(f"{time.monotonic():.3f} killed {role} {pid}, {step}, {move and move.target}")
        return True

    def _victim(self, role: str, move: Move | None) -> int:
        tables = self._tables()
        if role == "helper":
            return self._helper
        if role == "leader":
            slot = None if tables is None else tables.header.leader
            pid = 0 if tables is None or slot is None else tables.members[slot].pid
            return pid if pid in self._workers else 0
        if role == "requester":
            pid = self._rng.choice(list(self._workers)) if move is None else move.requester
            return pid if pid in self._workers else 0
        return self._some_server(tables) if move is None else move.target

    def _some_server(self, tables: Tables | None) -> int:
        """Return the pid of a server whose copy is not being loaded or unloaded: it is idle, in use, or suspended."""
        if tables is None:
            return 0
        found = []
        for state in (Instance.IDLE, Instance.ACTIVE, Instance.SUSPENDED):
            for row in tables.rows_where(tables.segment.layout.instances, Instance.STATE, state):
                server = tables.instances[row].server
                found += [] if server is None else [tables.members[server].pid]
        return self._rng.choice(found) if found else 0

    def moves(self) -> list[Move]:
        """Return the copies that are being suspended or resumed, perhaps a step late: it reads without the lock."""
        tables = self._tables()
        if tables is None:
            return []
        found = []
        for state, name in ((Instance.SUSPENDING, "suspending"), (Instance.RESUMING, "resuming")):
            for row in tables.rows_where(tables.segment.layout.instances, Instance.STATE, state):
                copy = tables.instances[row]
                holder, server = copy.holder, copy.server
                if holder is None or server is None:
                    continue
                target = tables.members[server].pid
                step = f"{name}: {self._driver_step(target)}"
                found.append(Move(row, copy.generation, copy.since, step, tables.members[holder].pid, target))
        return found

    def _driver_step(self, pid: int) -> str:
        state = self._gpus.checkpoints.state_of(pid)
        split = self._gpus.checkpoints.host_mb_of(pid) > 0 and self._gpus.device_mb_of(pid, 0) > 0
        return _DRIVER.get(state, "failed") + (", part moved" if split else "")

    def find_helper(self) -> None:
        """Look for the helper among the children of workers and of this process, which adopts those of dead workers."""
        if self._helper and not is_dying(self._helper):
            return
        found = (pid for parent in (os.getpid(), *self._workers) for pid in _children_of(parent))
        self._helper = next((pid for pid in found if _is_helper(pid)), 0)

    def _tables(self) -> Tables | None:
        """Return the tables, to read rows without the lock."""
        segment = self._namespace.segment()
        return None if segment is None else Tables(segment)


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def _is_helper(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"mpmm.suspend.helper" in Path(f"/proc/{pid}/cmdline").read_bytes() and not is_dying(pid)
    return False
