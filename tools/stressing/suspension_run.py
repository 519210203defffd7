"""The suspension run: workers suspend and resume copies on a simulated GPU, and a conductor kills processes.

Each namespace has a GPU, a crew of workers and a conductor of its own. The conductor kills

    helper      the process that calls the driver
    target      the model server that is suspended or resumed
    requester   the worker that has asked for it
    leader      the worker that reclaims what dead processes had

Half of the kills come at random moments, mostly while a copy moves. The others come as soon as a copy reaches a step
(the row's state, and how far the driver is) at which one of these was killed less often than at others.
After every `BATCH` kills, the workers finish their calls. Within a second, every row must be at rest, the invariants
must hold, and the accounts of host and device must match the simulated driver's files.
"""

from __future__ import annotations

import collections
import contextlib
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
from devices.simulated_gpu import Build, SimulatedGpus, build

from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from stressing.checks import Violations
from stressing.descendants import become_subreaper, descendants, descendants_left
from stressing.mailbox import Mailbox
from stressing.namespace import WatchedNamespace
from stressing.suspension_accounts import find_wrong, remove_dead
from stressing.suspension_victims import ROLES, Move, Victims
from stressing.suspension_worker import NAMESPACE, Crew, be_worker
from stressing.worker import LEAVE, QUIET, RUN

__all__ = ["SuspensionResult", "run"]

DEVICE_MB = 450.0
WORKERS = 5
BATCH = 12
# MB/s, and the delay of each driver call in seconds, so that there is a step before and after each call.
RATES = (1500.0, 2000.0)
DELAYS = {"state": 0.03, "checkpoint": 0.02, "restore": 0.02, "unlock": 0.04}
# About as long as one suspension or resume takes.
MOVE_S = 0.25
PAUSE_S = 0.05
STEER_S = 1.0
LOOK_S = 0.002
# How long calls may take to end once no new ones begin, and the accounts to become exact after that.
CALLS_S = 40.0
EXACT_S = 1.0
# If the accounts take longer than this, the result says what was wrong until when, and which processes were killed.
SLOW_S = 0.5
# How much longer a failed run waits for the accounts, to report whether they ever become exact.
PATIENCE_S = 10.0
LEAVE_S = 30.0


@dataclass
class SuspensionResult:
    """The result of a run. kills: by role and step. exact_s: after each batch, how long the accounts took.

    slow: what happened if that was longer than `SLOW_S`.
    """

    seed: int
    seconds: float = 0.0
    kills: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    excused: collections.Counter[str] = field(default_factory=collections.Counter)
    exact_s: list[float] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    violations: Violations = field(default_factory=Violations)
    left_behind: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "kills": sum(self.kills.values()),
            "kills_by_step": [[*where, count] for where, count in sorted(self.kills.items())],
            "counts": dict(self.counts),
            "excused": dict(self.excused),
            "exact_s": [round(seconds, 3) for seconds in self.exact_s],
            "slow": self.slow,
            "violations": self.violations.total,
            "violations_by_kind": dict(self.violations.counts),
            "violation_texts": self.violations.texts,
            "left_behind": self.left_behind,
        }

    def add(self, part: dict[str, Any]) -> None:
        """Add the result of one namespace, given as JSON values."""
        self.kills.update({(role, step): count for role, step, count in part["kills_by_step"]})
        self.counts.update(part["counts"])
        self.excused.update(part["excused"])
        self.exact_s += part["exact_s"]
        self.slow += part["slow"]
        self.violations.counts.update(part["violations_by_kind"])
        self.violations.texts += part["violation_texts"]
        self.left_behind += part["left_behind"]


class _Watch:
    """A clock that slows down while more threads want to run than there are processors, by the share each gets.

    Call `s` often: each call applies the current load to the time since the call before. Without such a clock, a limit
    of one second would measure how busy the machine is.
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
    """Return how many threads of the machine run or want to; 0 if /proc does not say."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 0


class _Conductor:
    """Conducts the run of one namespace: it kills processes, and lets the others come to rest."""

    def __init__(self, root: Path, gpus: SimulatedGpus, kills: int, seed: int, say: Callable[[str], None]) -> None:
        self._gpus, self._wanted, self._say = gpus, kills, say
        self._rng = random.Random(seed)
        self._namespace = WatchedNamespace(NAMESPACE, root)
        self._mailbox = Mailbox()
        self._phases = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._crew = Crew(seed, str(gpus.folder), self._mailbox.writer, self._phases)
        # The workers' numbers, by pid.
        self._workers: dict[int, int] = {}
        self._victims = Victims(self._namespace, gpus, self._workers.keys(), self._rng)
        self.result = SuspensionResult(seed, kills=self._victims.kills)
        self._starts = 0
        # By handle: the pid of the server that its loader has started.
        self._servers: dict[str, int] = {}
        # The warnings since the last rest, to explain a violation.
        self._warnings: collections.deque[str] = collections.deque(maxlen=12)
        self._stopping = False

    # ---- the run -------------------------------------------------------------------------------------------

    def stop(self, *_: object) -> None:
        """End the run after this batch; a signal handler."""
        self._stopping = True

    def run(self) -> SuspensionResult:
        """Do the whole run; return its result."""
        become_subreaper()
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
        self._namespace.close()
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
                if pid not in self._victims.killed and (status or self._phases[0] != LEAVE):
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
        # A server may be killed before its loader has reported it.
        if kind == "server_error" and (server is None or server in self._victims.killed):
            self.result.excused[kind] += 1
        else:
            self.result.violations.add(kind, f"pid {claim['pid']}: {claim['text']}{self._story()}")

    # ---- kills ---------------------------------------------------------------------------------------------

    def _kill_somebody(self) -> None:
        """Kill a process at a random moment, or once a copy reaches a step at which a role was killed less often."""
        self._victims.find_helper()
        if self._rng.random() < 0.5:
            until = time.monotonic() + STEER_S
            while time.monotonic() < until:
                if any(self._victims.strike(role, move) for role, move in self._victims.neglected()):
                    return
                self._turn(LOOK_S)
        elif self._rng.random() < 0.8:
            # A kill while no copy moves shows little: choose a random moment within a move.
            until = time.monotonic() + STEER_S
            while not self._victims.moves() and time.monotonic() < until:
                self._turn(LOOK_S)
            self._turn_for(self._rng.uniform(0.0, MOVE_S))
        # The chosen role may have no process now, or one that must not be killed.
        while not self._victims.strike(self._rng.choice(ROLES), self._some_move()):
            self._victims.find_helper()
            self._turn(0.01)

    def _some_move(self) -> Move | None:
        moves = self._victims.moves()
        return self._rng.choice(moves) if moves else None

    # ---- at rest -------------------------------------------------------------------------------------------

    def _come_to_rest(self) -> None:
        """Let calls end, and check that the accounts are exact within a second."""
        self._phases[0] = QUIET
        watch = _Watch()
        while any(self._phases[1 : 1 + WORKERS]) or len(self._workers) < WORKERS:
            self._turn(0.005)
            if watch.s() > CALLS_S:
                for pid, index in self._workers.items():
                    if self._phases[1 + index]:
                        # The worker prints its threads' stacks on stderr.
                        os.kill(pid, signal.SIGUSR2)
                        self.result.violations.add("hung", f"a call of worker {pid} does not end")
                return
        watch, began = _Watch(), time.monotonic()
        # When each line was seen last.
        until: dict[str, float] = {}
        while wrong := self._wrong():
            until.update(dict.fromkeys(wrong, time.monotonic() - began))
            if watch.s() > EXACT_S:
                break
            self._turn(0.01)
        self.result.exact_s.append(time.monotonic() - began)
        if self.result.exact_s[-1] > SLOW_S:
            lines = "".join(f"\n  until {seconds:.2f} s: {line}" for line, seconds in until.items())
            text = f"accounts exact {self.result.exact_s[-1]:.2f} s after the last call, at {began:.3f}:{lines}"
            self.result.slow.append(text + self._story())
        while wrong and (still := self._wrong()) and watch.s() < PATIENCE_S:
            self._turn(0.05)
        for line in wrong:
            ends = f"not after {PATIENCE_S:g} s either" if still else f"right after {watch.s():.1f} s"
            text = f"{EXACT_S:g} s after the last call: {line} ({ends}){self._story()}"
            self.result.violations.add("not_exact", text)
        self._warnings.clear()
        self._victims.story.clear()
        remove_dead(self._gpus)
        self._progress()

    def _wrong(self) -> list[str]:
        return find_wrong(self._namespace.read(events=False), self._gpus)

    def _story(self) -> str:
        return "".join(f"\n  {line}" for line in (*self._victims.story, *self._warnings))

    def _progress(self) -> None:
        result = self.result
        self._say(
            f"{self._count()} kills, accounts exact after {result.exact_s[-1]:.2f} s, {result.violations.total} wrong; "
            f"{result.counts['served']} served, {result.counts['loads']} loads"
        )

    # ---- the end -------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        self._namespace.close()
        self._phases[0] = LEAVE
        until = time.monotonic() + LEAVE_S
        while self._left() and time.monotonic() < until:
            self._turn(0.05)
        self.result.left_behind = self._left()

    def _left(self) -> list[str]:
        self._reap()
        return descendants_left() + self._namespace.segments_left() + self._namespace.files_left()

    def _kill_all(self) -> None:
        """Kill every remaining process, and remove what a failed run leaves."""
        while children := descendants():
            for child in children:
                with contextlib.suppress(psutil.Error):
                    child.kill()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    continue
            time.sleep(0.01)
        self._namespace.remove_segments()


# ---- all namespaces ----------------------------------------------------------------------------------------------


def run(kills: int, namespaces: int, seed: int, say: Callable[[str], None]) -> SuspensionResult:
    """Kill `kills` processes, in several namespaces at the same time; return the result.

    Socket paths must be short, so everything is in a folder of its own, which is removed at the end. An interrupt ends
    the run early, with its results so far.
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
    """Fork the conductor of one namespace; return its pid, and the descriptor from which to read its result."""
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
