"""Real processes for tests, driven through pipes, and helpers for all tests; models are in `loaders` and `device`.

A `Process` is forked from the test's process. It runs functions that the test sends it, one after another in its
main thread; a function gets the process's `Seat` as its first argument, and then the test's arguments. So the test
determines the order of events, and no test sleeps.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from device import SimulatedDevice
from devices.simulated_gpu import SimulatedGpus
from loaders import Gate, Loads
from patience import DEADLINE_S, Stopwatch

from mpmm.model_manager import ModelManager
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Header
from mpmm.shared_state.segment import segment_name
from mpmm.shared_state.snapshot import InstanceInfo, ModelInfo, Snapshot, TicketInfo, read_snapshot

CHECKOUT = Path(__file__).resolve().parent.parent
# The arguments of most managers in tests: one device by accounting, which has room for ten models of the default size.
SMALL: dict[str, Any] = {
    "memory_source": "booked",
    "fallback_memory_mb": 1000.0,
    "slack_percentage": 0.0,
    "default_estimate_mb": 100.0,
    "wait_timeout_seconds": 60.0,
    "lock_timeout_seconds": 60.0,
}
# With this file in it, mpmm does not remove a test's runtime root, whose identity is part of segment names.
KEEP = ".keep"
# The pid of members that tests make up. The kernel gives no process such a pid, which would count as the member.
NOBODYS_PID = 2**22
# The property in which a test reports at how many stores it has killed or interrupted an operation.
CRASH_POINTS = "crash_points"
# The factor for the numbers of repeats, simulated steps and random draws in tests, such as MPMM_TEST_SCALE=5.
SCALE = float(os.environ.get("MPMM_TEST_SCALE", "1"))
# Likewise: the numbers of forks before and after calls to the kernel, and of calls at which no thread can fork.
FORK_POINTS = "fork points"
# The prefix of what tests leave behind on purpose, and this test process's own name, which others leave alone.
LEFT_OVER = "left-over-"
OWN_LEFT_OVER = f"{LEFT_OVER}{os.getpid()}"
# The loader for tests that do not care which.
LOADS = Loads()
_PAUSE_S = 0.002
_CONTEXT = multiprocessing.get_context("fork")
_conversations: weakref.WeakSet[Connection] = weakref.WeakSet()


def scaled(count: int) -> int:
    """Return a test's count times MPMM_TEST_SCALE, at least 1."""
    return max(1, round(count * SCALE))


def import_path(*first: Path) -> str:
    """Return a PYTHONPATH with which a program can import what this process can, after `first`."""
    return os.pathsep.join([*map(str, first), *(path or os.getcwd() for path in sys.path)])


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> float:
    """Return the seconds until `condition()` was true. Raises AssertionError with `what` after the deadline.

    A `Stopwatch` measures both, on which time counts less while the machine is busy.
    """
    watch = Stopwatch()
    while not condition():
        assert watch.s() < deadline_s or watch.calm_s() < deadline_s, f"after {deadline_s} s still not: {what}"
        time.sleep(_PAUSE_S)
    return watch.calm_s()


def know(manager: ModelManager, **estimates_mb: float) -> None:
    """Tell the estimator the sizes of models."""
    learn(Seat(manager), **estimates_mb)


@contextlib.contextmanager
def held_by_a_thread(*locks: Any) -> Iterator[None]:
    """Have another thread hold locks for the block."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            taken.set()
            over.wait(DEADLINE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert taken.wait(DEADLINE_S), "it cannot take them"
        yield
    finally:
        over.set()
        thread.join()


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run a call in a thread; its outcome, or exception, appears in the list."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def in_child(action: Callable[[], Any]) -> Any:
    """Return what `action` returns in a forked child, where it may change what it likes; fail with its traceback."""
    reader, writer = os.pipe()
    exit_now = os._exit
    pid = os.fork()
    if pid == 0:
        try:
            said = pickle.dumps((True, action()))
        except BaseException:
            said = pickle.dumps((False, traceback.format_exc()))
        os.write(writer, said)
        exit_now(0)
    os.close(writer)
    with open(reader, "rb") as file:
        succeeded, answer = pickle.loads(file.read())
    os.waitpid(pid, 0)
    assert succeeded, answer
    return answer


def open_descriptors() -> set[str]:
    """Return the open descriptors of this process, each with its target."""
    gc.collect()
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return found


# ---- looking at a namespace --------------------------------------------------------------------------------


def problems(namespace: str) -> list[str]:
    """Return the invariants that do not hold."""
    return check_invariants(read_snapshot(namespace))


def segments_of(root: Path) -> set[str]:
    """Return the shared-memory segments that belong to a runtime root."""
    prefix = segment_name(root, "")
    return {name for name in os.listdir("/dev/shm") if name.startswith(prefix)}


def files_in(root: Path) -> list[str]:
    """Return the files and folders in a runtime root."""
    # Not `rglob`, which raises if a folder is removed meanwhile.
    found = (os.path.join(folder, name) for folder, folders, names in os.walk(root) for name in (*folders, *names))
    return sorted(os.path.relpath(path, root) for path in found if os.path.basename(path) != KEEP)


def model_of(namespace: str, tag: str) -> ModelInfo:
    """Return the row of a tag."""
    return next(model for model in read_snapshot(namespace).models if model.tag == tag)


def copies_of(namespace: str, tag: str) -> list[InstanceInfo]:
    """Return the copies of a tag, including loading and unloading ones."""
    return [copy for copy in read_snapshot(namespace).instances if copy.tag == tag]


def waiting(namespace: str, *tags: str) -> list[TicketInfo]:
    """Return the waiters, or those for some tags, in the order of the queue."""
    tickets = read_snapshot(namespace).tickets
    return [ticket for ticket in tickets if ticket.state == "waiting" and (not tags or ticket.tag in tags)]


def leader_pid(snapshot: Snapshot) -> int | None:
    """Return the pid of the process that polls."""
    return next((member.pid for member in snapshot.members if member.slot == snapshot.leader), None)


# ---- processes ---------------------------------------------------------------------------------------------


@dataclass
class Seat:
    """What a process keeps between the functions that it runs."""

    manager: Any = None
    held: list[tuple[str, Any]] = field(default_factory=list)


def attach(seat: Seat, **arguments: Any) -> int:
    """Make the process's manager; return the pid."""
    seat.manager = ModelManager(**arguments)
    return os.getpid()


def acquire(seat: Seat, tag: str, loader: Callable[[], Any] = LOADS) -> str:
    """Acquire and keep a copy; return it if it is a handle, else its class's name."""
    copy = seat.manager.acquire_model(tag, loader)
    seat.held.append((tag, copy))
    return copy if isinstance(copy, str) else type(copy).__name__


def learn(seat: Seat, **estimates_mb: float) -> None:
    """Tell the estimator the sizes of models."""
    for tag, mb in estimates_mb.items():
        seat.manager._estimator.set_initial_estimate(tag, mb)


def release(seat: Seat, tag: str | None = None) -> None:
    """Release the copy that was acquired last, of a tag if one is given."""
    at = next(i for i in reversed(range(len(seat.held))) if tag in (None, seat.held[i][0]))
    name, copy = seat.held.pop(at)
    seat.manager.release_model(name, copy)


def force_reset(seat: Seat) -> None:
    """Unload everything of every process."""
    seat.manager.force_reset()


def shut_down(seat: Seat) -> None:
    """Leave the namespace."""
    seat.manager.shutdown()


@contextlib.contextmanager
def call_in_thread() -> Iterator[tuple[FrameType, int]]:
    """Yield the frame of a call that lasts as long as the block, and the identifier of the thread that runs it."""
    entered, leave = threading.Event(), threading.Event()
    frames: list[FrameType] = []

    def call() -> None:
        frames.append(sys._getframe())
        entered.set()
        leave.wait()

    thread = threading.Thread(target=call)
    thread.start()
    entered.wait()
    try:
        yield frames[0], thread.ident or 0
    finally:
        leave.set()
        thread.join()


def returned_frame() -> FrameType:
    """Return the frame of a function that has returned: nothing leads on from there to its caller."""
    return sys._getframe()


def stop_process(pid: int) -> None:
    """Send SIGSTOP, and wait until the process has stopped: on a busy machine it runs on for some milliseconds."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, f"pid {pid} stopped")


def has_ended(process: psutil.Process) -> bool:
    """Tell whether a process is gone, or has only not been reaped yet: with its last thread its locks are free."""
    try:
        return not process.is_running() or (process.status() == psutil.STATUS_ZOMBIE and process.num_threads() == 1)
    except psutil.NoSuchProcess:
        return True


class Process:
    """A child process with a `Seat`, at the other end of a pipe."""

    def __init__(self) -> None:
        self._ours, theirs = _CONTEXT.Pipe()
        _conversations.add(self._ours)
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.killed = False
        self._busy = False

    def send(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Have `function(seat, *args, **kwargs)` run; `result` returns its outcome."""
        self._busy = True
        self._ours.send((function, args, kwargs))

    def result(self, timeout_seconds: float = DEADLINE_S) -> Any:
        """Return what the function returned, or raise what it raised; see `wait_until` for the time limit."""
        watch = Stopwatch()
        while not self._ours.poll(left_s := watch.left_s(timeout_seconds)):
            assert left_s, f"pid {self.pid} did not answer within {timeout_seconds} s"
        returned, outcome = self._ours.recv()
        self._busy = False
        if not returned:
            raise outcome
        return outcome

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Have a function run, and return or raise its outcome."""
        self.send(function, *args, **kwargs)
        return self.result()

    def has_result(self) -> bool:
        """Tell whether `result` would return at once."""
        return self._ours.poll(0)

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self.killed = True
        self._process.kill()
        self._process.join()

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Send SIGSTOP, and wait until the process has stopped."""
        stop_process(self.pid)

    def wait_until_stopped(self) -> None:
        """Wait until the process is stopped, by us or by itself."""
        wait_until(lambda: psutil.Process(self.pid).status() == psutil.STATUS_STOPPED, f"pid {self.pid} stopped")

    def resume(self) -> None:
        """Send SIGCONT."""
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        """Let the process leave cleanly; kill it if it does not."""
        if self._process.is_alive():
            self.resume()
            if self._busy:
                # The test has failed, or no longer needs the result.
                self.signal(signal.SIGINT)
        self._ours.close()
        self._process.join(DEADLINE_S)
        if self._process.is_alive():
            # The process prints its threads' stacks on stderr.
            self.signal(signal.SIGUSR1)
            self._process.join(1)
            self.kill()
            raise AssertionError(f"pid {self.pid} did not leave by itself")
        self._process.close()


def stop_outside_of_transactions(process: Process, namespace: str) -> None:
    """Stop a process at a moment when it does not hold the lock."""
    while True:
        process.stop()
        if not read_snapshot(namespace).lock.held:
            return
        process.resume()


def stop_in_transaction(seat: Seat) -> None:
    """Be stopped while holding the lock, in the middle of a change."""
    namespace = seat.manager._connected().namespace
    with namespace.transaction() as t:
        t.set(Header.LOADS, 12345)
        os.kill(os.getpid(), signal.SIGSTOP)
        t.set(Header.LOADS, 0)


def _serve(theirs: Connection) -> None:
    for other in list(_conversations):
        other.close()
    faulthandler.register(signal.SIGUSR1, file=2)
    # The test process's objects would make every garbage collection slow, and each unload collects.
    gc.freeze()
    seat = Seat()
    while True:
        try:
            function, args, kwargs = theirs.recv()
        except (EOFError, OSError):
            break
        except KeyboardInterrupt:
            continue
        outcome: tuple[bool, Any]
        try:
            outcome = True, function(seat, *args, **kwargs)
        except BaseException as error:
            # Without the traceback, whose frames would keep their objects alive.
            outcome = False, error.with_traceback(None)
        with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
            theirs.send(outcome)
        del outcome


# The types of the fixtures that make things; see `conftest`.
NewManager = Callable[..., ModelManager]
NewProcess = Callable[..., Process]
NewGate = Callable[[], Gate]
NewDevice = Callable[..., SimulatedDevice]
NewGpus = Callable[..., SimulatedGpus]
OncePerRun = Callable[[str, Callable[[], Any]], Any]
