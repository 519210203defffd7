"""The suspension run: copies are suspended and resumed on a simulated GPU, and the processes that do it are killed.

Each namespace has a GPU, a crew of workers and a conductor of its own. The conductor kills

    helper      the process that calls the driver
    target      the model server that is suspended or resumed
    requester   the worker that has asked for it
    leader      the worker that takes back what the dead had

half of the time at random moments, mostly while a copy moves, and half of the time as soon as a copy comes to a step,
which is what the row says and how far the driver has come, at which one of them was killed less often than at others.
After every `BATCH` kills the workers finish their calls. Within a second then, every row is at rest, the invariants
hold, and the accounts of host and device are what the simulated driver's files say.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
from devices.simulated_checkpoints import CHECKPOINTED, LOCKED, RUNNING
from devices.simulated_gpu import Build, SimulatedGpus, build

from mpmm.errors import LayoutMismatchError
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Instance
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.segment import Segment, SegmentProblem, segment_name
from mpmm.shared_state.snapshot import InstanceInfo, Snapshot, read_snapshot
from mpmm.shared_state.tables import Tables
from stressing.checks import Violations
from stressing.mailbox import Mailbox
from stressing.models import is_dying
from stressing.suspended import mb_of
from stressing.suspension_worker import BUDGET_MB, NAMESPACE, Crew, be_worker
from stressing.worker import LEAVE, QUIET, RUN

__all__ = ["ROLES", "STEPS", "SuspensionResult", "run"]

ROLES = ("helper", "target", "requester", "leader")
_DRIVER = {RUNNING: "running", LOCKED: "locked", CHECKPOINTED: "checkpointed"}
# What the row says, how far the driver has come: in the order in which a copy passes them.
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
# A copy whose resume was given up may be found in mid-restore while its row says `suspending`: not asked for.
AT_REST = "nothing moves"
DEVICE_MB = 450.0
WORKERS = 5
BATCH = 12
# MB/s, and seconds by which each call of the driver is late, so that there is a step before and after each.
RATES = (1500.0, 2000.0)
DELAYS = {"state": 0.03, "checkpoint": 0.02, "restore": 0.02, "unlock": 0.04}
# About as long as all of that takes for one copy.
MOVE_S = 0.25
PAUSE_S = 0.05
STEER_S = 1.0
LOOK_S = 0.002
# How long calls may take to end once no new ones begin, and the accounts to become exact after that.
CALLS_S = 40.0
EXACT_S = 1.0
# Where they do not, whether they ever are.
PATIENCE_S = 10.0
LEAVE_S = 30.0
# More deaths of helpers than mpmm tries for one copy would be the copy's fault by its rules: see `helper.TRIES`.
HELPERS_A_MOVE = 2
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class SuspensionResult:
    """What a run has come to. kills: by role and step. exact_s: after each batch, how long the accounts took."""

    seed: int
    seconds: float = 0.0
    kills: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    excused: collections.Counter[str] = field(default_factory=collections.Counter)
    exact_s: list[float] = field(default_factory=list)
    violations: Violations = field(default_factory=Violations)
    left_behind: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "kills": sum(self.kills.values()),
            "kills_by_step": [[*where, count] for where, count in sorted(self.kills.items())],
            "counts": dict(self.counts),
            "excused": dict(self.excused),
            "exact_s": [round(seconds, 3) for seconds in self.exact_s],
            "violations": self.violations.total,
            "violations_by_kind": dict(self.violations.counts),
            "violation_texts": self.violations.texts,
            "left_behind": self.left_behind,
        }

    def add(self, part: dict[str, Any]) -> None:
        """Add what one namespace has come to, as JSON values."""
        self.kills.update({(role, step): count for role, step, count in part["kills_by_step"]})
        self.counts.update(part["counts"])
        self.excused.update(part["excused"])
        self.exact_s += part["exact_s"]
        self.violations.counts.update(part["violations_by_kind"])
        self.violations.texts += part["violation_texts"]
        self.left_behind += part["left_behind"]


@dataclass(frozen=True)
class _Move:
    """A copy that is being suspended or resumed. requester, target: pids."""

    row: int
    generation: int
    since: int
    step: str
    requester: int
    target: int


class _Watch:
    """A clock that goes slower while more processes want to run than there are processors: what each has had of them.

    Looked at again and again; what was so at a look counts since the one before. In a test suite, or beside other
    work, a limit of a second would else tell how busy the machine is.
    """

    def __init__(self) -> None:
        self._looked_at, self._s = time.monotonic(), 0.0

    def s(self) -> float:
        """Return the seconds on this clock."""
        now = time.monotonic()
        self._s += (now - self._looked_at) / max(1.0, _running() / (os.cpu_count() or 1))
        self._looked_at = now
        return self._s


def _running() -> int:
    """Return how many threads of the machine run or want to; 0 if it does not tell."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 0


class _Conductor:
    """One namespace's."""

    def __init__(self, root: Path, gpus: SimulatedGpus, kills: int, seed: int, say: Callable[[str], None]) -> None:
        self._root, self._gpus, self._wanted, self._say = root, gpus, kills, say
        self._rng = random.Random(seed)
        self.result = SuspensionResult(seed)
        self._mailbox = Mailbox()
        self._phases = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._crew = Crew(seed, str(gpus.folder), self._mailbox.writer, self._phases)
        self._workers: dict[int, int] = {}
        self._starts = 0
        self._killed: set[int] = set()
        # By handle: the server that its loader has started.
        self._servers: dict[str, int] = {}
        self._helper = 0
        self._helpers_of: collections.Counter[tuple[int, int]] = collections.Counter()
        self._segment: Segment | None = None
        self._segments: set[str] = set()
        # Since the last rest: what it takes to understand a violation.
        self._warnings: collections.deque[str] = collections.deque(maxlen=12)
        self._strikes: collections.deque[str] = collections.deque(maxlen=BATCH)
        self._stopping = False

    # ---- the run -------------------------------------------------------------------------------------------

    def stop(self, *_: object) -> None:
        """Come to an end after this batch; a signal handler."""
        self._stopping = True

    def run(self) -> SuspensionResult:
        """Do it all."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        began = time.monotonic()
        try:
            for index in range(WORKERS):
                self._start(index)
            while self._count() < self._wanted and not (self._stopping or self.result.violations.counts["hung"]):
                self._phases[0] = RUN
                for _ in range(min(BATCH, self._wanted - self._count())):
                    self._turn_for(self._rng.expovariate(1.0 / PAUSE_S))
                    self._kill_somebody()
                self._come_to_rest()
            self._leave()
        finally:
            self._kill_all()
        self.result.seconds = time.monotonic() - began
        return self.result

    def _count(self) -> int:
        return sum(self.result.kills.values())

    def _turn_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._turn(min(left, 0.01))

    def _turn(self, seconds: float) -> None:
        for message in self._mailbox.messages(seconds):
            self._take_message(message)
        self._reap()

    def _start(self, index: int) -> None:
        self._starts += 1
        self._close_segment()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.close(self._mailbox.reader)
            be_worker(self._crew, index, self._starts)
        self._workers[pid] = index

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                index = self._workers.pop(pid, None)
                if index is None:
                    continue
                if pid not in self._killed and (status or self._phases[0] != LEAVE):
                    code = os.waitstatus_to_exitcode(status)
                    self.result.violations.add("died", f"worker {pid} ended by itself: {code}")
                self._phases[1 + index] = 0
                if self._phases[0] != LEAVE:
                    self._start(index)

    # ---- what workers say ----------------------------------------------------------------------------------

    def _take_message(self, message: dict[str, Any]) -> None:
        what = message["what"]
        if what == "counts":
            self.result.counts.update(message["counts"])
        elif what == "loaded":
            if message["server"] is not None:
                self._servers[message["handle"]] = message["server"]
        elif what == "used":
            loaded = self._servers.get(message["handle"])
            if loaded not in (None, message["server"]):
                text = f"{message['handle']} was loaded in pid {loaded}, and is pid {message['server']}"
                self.result.violations.add("another_process", text)
        elif what == "warned":
            self._warnings.append(f"{message['pid']}: {message['text']}")
        elif what == "claim":
            self._judge(message)

    def _judge(self, claim: dict[str, Any]) -> None:
        kind, server = claim["kind"], self._servers.get(claim.get("handle", ""))
        # A server may be killed before its loader has told of it.
        if kind == "server_error" and (server is None or server in self._killed):
            self.result.excused[kind] += 1
        else:
            self.result.violations.add(kind, f"pid {claim['pid']}: {claim['text']}{self._story()}")

    # ---- kills ---------------------------------------------------------------------------------------------

    def _kill_somebody(self) -> None:
        """Kill somebody at this moment, or once a copy comes to a step at which one of them was killed less often."""
        self._find_helper()
        if self._rng.random() < 0.5:
            until = time.monotonic() + STEER_S
            while time.monotonic() < until:
                if any(self._strike(role, move) for role, move in self._neglected()):
                    return
                self._turn(LOOK_S)
        elif self._rng.random() < 0.8:
            # A moment at which nothing moves says little: the moment is random within a move.
            until = time.monotonic() + STEER_S
            while not self._moves() and time.monotonic() < until:
                self._turn(LOOK_S)
            self._turn_for(self._rng.uniform(0.0, MOVE_S))
        # The killed one may not exist now, or not be one of those that may be killed.
        while not self._strike(self._rng.choice(ROLES), next(iter(self._shuffled(self._moves())), None)):
            self._find_helper()
            self._turn(0.01)

    def _neglected(self) -> list[tuple[str, _Move]]:
        """Return roles, and copies at steps, that were met less often than the average, the rarest first."""
        kills = self.result.kills
        mean = sum(kills[role, step] for role in ROLES for step in STEPS) / (len(ROLES) * len(STEPS))
        cells = [(role, move) for move in self._moves() if move.step in STEPS for role in ROLES]
        cells = [(role, move) for role, move in cells if kills[role, move.step] <= mean]
        return sorted(cells, key=lambda cell: (kills[cell[0], cell[1].step], self._rng.random()))

    def _shuffled(self, moves: list[_Move]) -> list[_Move]:
        return self._rng.sample(moves, len(moves))

    def _strike(self, role: str, move: _Move | None) -> bool:
        """Kill the one in this role now; return False if there is none."""
        pid = self._victim(role, move)
        if pid <= 0 or is_dying(pid):
            return False
        if role == "helper":
            moves = {(one.generation, one.since) for one in self._moves()}
            if any(self._helpers_of[one] >= HELPERS_A_MOVE for one in moves):
                return False
            self._helpers_of.update(moves)
        self._killed.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        step = AT_REST if move is None else move.step
        self.result.kills[role, step] += 1
        self._strikes.append(f"{time.monotonic():.3f} killed {role} {pid}, {step}, {move and move.target}")
        return True

    def _victim(self, role: str, move: _Move | None) -> int:
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

    def _moves(self) -> list[_Move]:
        """Return the copies that are being suspended or resumed, perhaps a step late: it looks without the lock."""
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
                found.append(_Move(row, copy.generation, copy.since, step, tables.members[holder].pid, target))
        return found

    def _driver_step(self, pid: int) -> str:
        state = self._gpus.checkpoints.state_of(pid)
        split = self._gpus.checkpoints.host_mb_of(pid) > 0 and self._gpus.device_mb_of(pid, 0) > 0
        return _DRIVER.get(state, "failed") + (", part moved" if split else "")

    def _find_helper(self) -> None:
        """Look for the helper among the children of workers, and of those that have died: it is a child of this one."""
        if self._helper and not is_dying(self._helper):
            return
        found = (pid for parent in (os.getpid(), *self._workers) for pid in _children_of(parent))
        self._helper = next((pid for pid in found if _is_helper(pid)), 0)

    @staticmethod
    def _children() -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process().children(recursive=True)
        return found

    # ---- at rest -------------------------------------------------------------------------------------------

    def _come_to_rest(self) -> None:
        """Let calls end, and see whether the accounts are exact within a second."""
        self._phases[0] = QUIET
        watch = _Watch()
        while any(self._phases[1 : 1 + WORKERS]) or len(self._workers) < WORKERS:
            self._turn(0.005)
            if watch.s() > CALLS_S:
                for pid, index in self._workers.items():
                    if self._phases[1 + index]:
                        # It says on stderr where its threads are.
                        os.kill(pid, signal.SIGUSR2)
                        self.result.violations.add("hung", f"a call of worker {pid} does not end")
                return
        watch, began = _Watch(), time.monotonic()
        while wrong := self._wrong():
            if watch.s() > EXACT_S:
                break
            self._turn(0.01)
        self.result.exact_s.append(time.monotonic() - began)
        while wrong and (still := self._wrong()) and watch.s() < PATIENCE_S:
            self._turn(0.05)
        for line in wrong:
            ends = f"not after {PATIENCE_S:g} s either" if still else f"right after {watch.s():.1f} s"
            text = f"{EXACT_S:g} s after the last call: {line} ({ends}){self._story()}"
            self.result.violations.add("not_exact", text)
        self._warnings.clear()
        self._strikes.clear()
        self._tidy()
        self._progress()

    def _wrong(self) -> list[str]:
        """Return what is not as it is to be while nobody asks for anything."""
        snapshot = self._snapshot()
        if snapshot is None:
            return ["there is no namespace"]
        wrong = check_invariants(snapshot)
        wrong += [f"ticket {ticket.number} of {ticket.tag} waits" for ticket in snapshot.tickets]
        barred = [model for model in snapshot.models if model.unsuspendable]
        wrong += [f"{model.tag} is not suspended any more: {model.unsuspendable}" for model in barred]
        members = {member.slot: member for member in snapshot.members}
        wrong += [f"member {member.pid} ({member.kind}) is dead" for member in snapshot.members if not member.alive]
        serving = {copy.server for copy in snapshot.instances}
        wrong += [
            f"server {member.pid} of {member.name} has no copy"
            for member in snapshot.members
            if member.kind == "server" and member.slot not in serving
        ]
        for copy in snapshot.instances:
            server = members.get(-1 if copy.server is None else copy.server)
            pid = None if server is None else server.pid
            wrong += [f"{copy.handle or copy.tag}: {text}" for text in self._wrong_of(copy, pid)]
        host_mb = sum(copy.host_mb for copy in snapshot.instances)
        if host_mb != self._gpus.checkpoints.host_mb() or host_mb > snapshot.suspend_budget_mb or host_mb > BUDGET_MB:
            wrong.append(f"{host_mb:g} MB of the host accounted for, {self._gpus.checkpoints.host_mb():g} MB taken")
        (device,) = snapshot.devices or (None,)
        mb = sum(copy.mb for copy in snapshot.instances)
        if device is None or mb != self._gpus.used_mb(0) or device.returning_mb or device.used_mb != mb:
            shown = None if device is None else (device.used_mb, device.returning_mb)
            wrong.append(f"{mb:g} MB of the device accounted for, {self._gpus.used_mb(0):g} MB taken; shown {shown}")
        return wrong

    def _wrong_of(self, copy: InstanceInfo, pid: int | None) -> list[str]:
        if copy.state not in ("idle", "suspended"):
            return [f"it is {copy.state}, holder {copy.holder}"]
        if pid is None:
            return ["it has no server"]
        size = float(mb_of(copy.tag))
        moved = self._gpus.checkpoints
        truth = (self._gpus.device_mb_of(pid, 0), moved.host_mb_of(pid), moved.state_of(pid))
        expected = (size, 0.0, RUNNING) if copy.state == "idle" else (0.0, size, CHECKPOINTED)
        if truth != expected or (copy.mb, copy.host_mb) != expected[:2]:
            return [f"it is {copy.state} with {copy.mb:g} and {copy.host_mb:g} MB; device, host, driver say {truth}"]
        return []

    def _story(self) -> str:
        return "".join(f"\n  {line}" for line in (*self._strikes, *self._warnings))

    def _tidy(self) -> None:
        """Remove what the simulated driver keeps of the dead."""
        for folder in (self._gpus.folder / "host", self._gpus.folder / "gpu0" / "memory"):
            for path in folder.glob("*_*_*"):
                if is_dying(int(path.name.split("_")[1])):
                    path.unlink(missing_ok=True)

    def _progress(self) -> None:
        result = self.result
        self._say(
            f"{self._count()} kills, accounts exact after {result.exact_s[-1]:.2f} s, {result.violations.total} wrong; "
            f"{result.counts['served']} served, {result.counts['loads']} loads"
        )

    # ---- the end -------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        self._close_segment()
        self._phases[0] = LEAVE
        until = time.monotonic() + LEAVE_S
        while self._left() and time.monotonic() < until:
            self._turn(0.05)
        self.result.left_behind = self._left()

    def _left(self) -> list[str]:
        self._reap()
        left = [f"process {child.pid}: {_command_of(child)}" for child in self._children()]
        left += [f"shared memory {name}" for name in self._segments if os.path.exists(f"/dev/shm/{name}")]
        return left + [
            f"file {folder}/{name}" for folder, folders, files in os.walk(self._root) for name in folders + files
        ]

    def _kill_all(self) -> None:
        """End every process that is still there, and remove what a failed run leaves."""
        while children := self._children():
            for child in children:
                with contextlib.suppress(psutil.Error):
                    child.kill()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    continue
            time.sleep(0.01)
        for name in self._segments:
            Path("/dev/shm", name).unlink(missing_ok=True)
        self._close_segment()

    # ---- looking -------------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot | None:
        try:
            snapshot = read_snapshot(NAMESPACE, self._root, events=False)
        except (FileNotFoundError, LayoutMismatchError):
            return None
        self._segments.add(snapshot.segment)
        return snapshot

    def _tables(self) -> Tables | None:
        """Return the rows, for reading them as they are."""
        if self._segment is None:
            with contextlib.suppress(SegmentProblem, FileNotFoundError):
                self._segment = Segment.open(segment_name(self._root, NAMESPACE))
        return None if self._segment is None else Tables(self._segment)

    def _close_segment(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None


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


def _command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:200] or str(process.status())
    return "gone"


# ---- all namespaces ----------------------------------------------------------------------------------------------


def run(kills: int, namespaces: int, seed: int, say: Callable[[str], None]) -> SuspensionResult:
    """Kill so many processes, in several namespaces side by side; return what that has come to.

    Socket paths must be short, so everything is in a folder of its own, which goes in the end. An interrupt ends it
    early, with what it has come to.
    """
    before = signal.signal(signal.SIGINT, lambda *_: None)
    folder = Path(tempfile.mkdtemp(prefix="mpmm-s"))
    result = SuspensionResult(seed)
    began = time.monotonic()
    try:
        built = build(folder / "driver")
        shares = [kills // namespaces + (number < kills % namespaces) for number in range(namespaces)]
        readers = [
            _start_namespace(folder / str(number), built, share, seed + number, say)
            for number, share in enumerate(shares)
        ]
        for pid, reader in readers:
            with open(reader) as answer:
                text = answer.read()
            os.waitpid(pid, 0)
            if text:
                result.add(json.loads(text))
            else:
                result.violations.add("conductor", "a namespace's conductor has failed")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGINT, before)
    result.seconds = time.monotonic() - began
    return result


def _start_namespace(folder: Path, built: Build, kills: int, seed: int, say: Callable[[str], None]) -> tuple[int, int]:
    """Fork the conductor of one namespace; return its pid, and where its result can be read."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _be_conductor(folder, built, kills, seed, say, writer)
    os.close(writer)
    return pid, reader


def _be_conductor(
    folder: Path, built: Build, kills: int, seed: int, say: Callable[[str], None], writer: int
) -> NoReturn:
    code = 1
    try:
        root = folder / "r"
        root.mkdir(parents=True, mode=0o700)
        gpus = SimulatedGpus.create(folder / "gpus", DEVICE_MB)
        gpus.checkpoints.set_rates(*RATES)
        gpus.checkpoints.delay_calls(**DELAYS)
        os.environ.update(gpus.environment(built, checkpoints=True), **{RUNTIME_DIR_VARIABLE: str(root)})
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        built.load()
        conductor = _Conductor(root, gpus, kills, seed, lambda text: say(f"{folder.name}: {text}"))
        signal.signal(signal.SIGINT, conductor.stop)
        with open(writer, "w") as answer:
            answer.write(json.dumps(conductor.run().as_json()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
