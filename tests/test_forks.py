"""Forks at the wrong moment: a child must not keep open what another thread is opening."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import LOADS, NewManager, NewProcess, in_child, in_thread
from loaders import Loads, LoadsObject
from patience import DEADLINE_S

from mpmm.errors import AcquireTimeoutError, NotAcquiredError
from mpmm.model_manager import ModelManager, async_acquire
from mpmm.shared_state.lock_file import LockFile, is_locked
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.snapshot import read_snapshot

# How long a thread stays where it is to be forked, if the fork waits for it to go on.
MOMENT_S = 0.3


class Moment:
    """A point that a thread named `there` reaches, and stays at until a fork has happened elsewhere."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.forked = threading.Event()

    def stay(self) -> None:
        """Stay here if this is the thread in question, the first time."""
        if threading.current_thread().name == "there" and not self.reached.is_set():
            self.reached.set()
            self.forked.wait(MOMENT_S)


@contextmanager
def forked_at(moment: Moment, action: Callable[[], object]) -> Iterator[int]:
    """Run `action` in a thread, fork at the moment, let the thread end; the child lives for the block."""
    thread = threading.Thread(target=action, name="there")
    thread.start()
    assert moment.reached.wait(DEADLINE_S), "the moment never came"
    # The fork returns in the parent before the child has run its own side of the fork's hooks.
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"!")
        signal.pause()
        os._exit(0)
    try:
        os.close(tell)
        with open(ready, "rb") as answer:
            assert answer.read(1) == b"!", "the child ended in the fork's hooks"
        moment.forked.set()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def locks_open_in(pid: int | str, root: Path) -> list[str]:
    """Return the paths of the lock files below a folder that a process has open, whether or not it holds the locks.

    Below this test's own, because a descriptor that an exception kept from being closed, in a test before, stays open.
    """
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            path = os.readlink(f"/proc/{pid}/fd/{fd}")
            locked = "lock:" in Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
            if path.startswith(f"{root}/") and (locked or ".lock" in path):
                found.append(path)
    return sorted(found)


def test_a_fork_while_another_thread_joins_gives_the_child_no_lock(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, new_process: NewProcess
) -> None:
    moment, made, real = Moment(), [], psutil.Process.create_time

    def create_time(process: psutil.Process) -> float:
        moment.stay()
        return float(real(process))

    monkeypatch.setattr(psutil.Process, "create_time", create_time)
    with forked_at(moment, lambda: made.append(ModelManager(namespace=namespace, memory_source="booked"))) as child:
        assert locks_open_in(child, runtime_root) == []
        # The next process does not have to wait for the lifecycle lock.
        new_process()
        assert len(read_snapshot(namespace).members) == 2
        made[0].shutdown()


def test_a_fork_while_another_thread_leaves_gives_the_child_no_lock(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, new_process: NewProcess
) -> None:
    moment, manager, real = Moment(), ModelManager(namespace=namespace, memory_source="booked"), os.unlink

    def unlink(*arguments: object, **named: object) -> None:
        moment.stay()
        real(*arguments, **named)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(os, "unlink", unlink)
    with forked_at(moment, manager.shutdown) as child:
        assert locks_open_in(child, runtime_root) == []
        new_process()


def test_a_request_of_a_child_waits_no_longer_than_it_may_for_another_thread_that_joins(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, new_manager: NewManager
) -> None:
    patient, hasty = (new_manager(wait_timeout_seconds=seconds) for seconds in (DEADLINE_S, 0.01))
    joins, real = threading.Event(), Namespace.join

    def join(*arguments: Any, **named: Any) -> Namespace:
        joins.set()
        return real(*arguments, **named)

    monkeypatch.setattr(Namespace, "join", join)
    with closing(LockFile(runtime_root / namespace / "lifecycle.lock")) as lifecycle:
        assert lifecycle.try_exclusive()
        child = os.fork()
        if child == 0:
            try:
                joining, _ = in_thread(lambda: patient.acquire_model("m", LOADS))
                assert joins.wait(DEADLINE_S)
                with pytest.raises(AcquireTimeoutError, match="last reason: lock"):
                    hasty.acquire_model("m", LOADS)
                os._exit(0 if joining.is_alive() else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_while_another_thread_asks_whether_a_file_is_locked_does_not_lock_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, path, real = Moment(), tmp_path / "life.lock", fcntl.flock
    path.touch(mode=0o600)

    def flock(fd: int, operation: int) -> None:
        real(fd, operation)
        if operation & fcntl.LOCK_SH:
            moment.stay()

    monkeypatch.setattr(fcntl, "flock", flock)
    with forked_at(moment, lambda: is_locked(path)):
        owner = LockFile(path)
        assert owner.try_exclusive(), "the child keeps the lock of one who merely asked"
        owner.close()


def test_a_lock_that_is_given_up_is_free_though_a_stranger_has_inherited_it(tmp_path: Path) -> None:
    path = tmp_path / "held.lock"
    held = LockFile(path)
    assert held.try_exclusive()
    # As a child that native code has forked, which runs none of our hooks.
    stranger = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1, pass_fds=[held.fd])
    assert stranger.stdin is not None
    try:
        held.close()
        assert not is_locked(path)
    finally:
        stranger.stdin.close()
        stranger.wait(DEADLINE_S)


def test_a_child_that_forgets_a_lock_leaves_it_to_its_parent(tmp_path: Path) -> None:
    held = LockFile(tmp_path / "held.lock")
    assert held.try_exclusive()
    child = os.fork()
    if child == 0:
        os._exit(0 if held.fd == -1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_locked(held.path)
    held.close()


def outcome_of_fork_inside(enter: Callable[[], None]) -> int:
    """Return the exit status of the child that `enter` forks and that leaves the block in it."""
    pid = os.getpid()
    # Other tests may have left some, which end when they like.
    before = {child.pid for child in psutil.Process().children()}
    try:
        enter()
        status = 0
    except NotAcquiredError:
        status = 3
    except ValueError:
        status = 4
    if os.getpid() != pid:
        os._exit(status)
    (forked,) = (child.pid for child in psutil.Process().children() if child.pid not in before)
    return os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1])


def test_a_child_has_no_part_in_a_load_that_its_parent_has_reserved(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(memory_source="booked")
    # Once it is known for objects, which others cannot use, no request waits for another process's load of it.
    with manager.model("a", LoadsObject("first")):
        pass
    assert manager.unload("a") == 1
    assert manager.should_spawn_model("a", 1)

    def load() -> tuple[str, int]:
        with manager.model("a", LoadsObject("the child's")) as copy:
            result = copy.name, read_snapshot(namespace).loading
        manager.shutdown()
        return result

    assert in_child(load) == ("the child's", 1), "the parent's load is still reserved"
    with manager.model("a", LoadsObject("the parent's")) as copy:
        assert (copy.name, read_snapshot(namespace).loading) == ("the parent's", 0)


@pytest.mark.parametrize("error", [False, True], ids=["in good order", "by an exception"])
def test_a_child_that_was_forked_inside_a_block_leaves_it_silently(
    namespace: str, new_manager: NewManager, error: bool
) -> None:
    manager = new_manager(memory_source="booked")

    def enter() -> None:
        with manager.model("a", Loads()):
            child = os.fork()
            if child == 0:
                if error:
                    raise ZeroDivisionError
                return
            # The child has left the block, and has ended, before the parent looks.
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            if read_snapshot(namespace).active != 1:
                raise ValueError("the parent's hold is gone")

    def tolerant() -> None:
        with suppress(ZeroDivisionError):
            enter()

    assert outcome_of_fork_inside(tolerant) == 0
    snapshot = read_snapshot(namespace)
    assert (snapshot.active, len(snapshot.members)) == (0, 1)


def test_a_child_that_was_forked_inside_an_async_block_leaves_it_silently(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(memory_source="booked")

    async def enter() -> None:
        async with manager.model_async("a", Loads()):
            child = os.fork()
        if child == 0:
            # Not on into asyncio's loop, which has its selector in common with the parent's.
            os._exit(0)

    assert outcome_of_fork_inside(lambda: asyncio.run(enter())) == 0
    assert read_snapshot(namespace).active == 0


def test_the_guard_of_the_threads_beside_event_loops_is_renewed_in_a_child() -> None:
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with async_acquire._threads_guard:
            held.set()
            go_on.wait(DEADLINE_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(DEADLINE_S)
    child = os.fork()
    if child == 0:
        os._exit(0 if async_acquire._threads_guard.acquire(timeout=DEADLINE_S) else 1)
    go_on.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_thread_that_the_end_of_the_process_finds_with_the_guard_does_not_hold_up_the_end(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, threading\n"
        "from mpmm.interpreter.fork_hooks import fork_guard\n"
        "from mpmm.multi_process_shared.rpc import sockets\n"
        "from mpmm.multi_process_shared.rpc.channel import Channel\n"
        "from mpmm.shared_state.lock_file import LockFile\n"
        "class Late:\n"
        "    def __init__(self, *things): self.things = things\n"
        "    def __del__(self): [thing.close() for thing in self.things]\n"
        "one, other = sockets.pair()\n"
        "connection = sockets.ForkSafeConnection(other.detach())\n"
        "sys.kept = [Channel(connection), LockFile(pathlib.Path(sys.argv[1])), Late(one, *sockets.pair())]\n"
        "taken = threading.Event()\n"
        "def keep():\n"
        "    with fork_guard:\n"
        "        taken.set(); threading.Event().wait()\n"
        "threading.Thread(target=keep, daemon=True).start()\n"
        "taken.wait()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, "")


def test_hooks_run_in_their_order_and_none_keeps_another_from_running() -> None:
    code = """
import os
from mpmm.interpreter.fork_hooks import ChildStep, in_forked_child
ran = []
def fails():
    ran.append("fails")
    raise ValueError
in_forked_child(lambda: ran.append("servers"), ChildStep.SERVERS)
in_forked_child(fails, ChildStep.SEGMENT)
in_forked_child(lambda: ran.append("worker"), ChildStep.WORKER)
child = os.fork()
if child == 0:
    os._exit(0 if ran == ["fails", "worker", "servers"] and os.fork() >= 0 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "ValueError"])
def test_a_signal_handler_that_raises_in_a_child_keeps_no_hook_from_running_to_its_end(raised: str) -> None:
    code = f"""
import os, signal
from mpmm.interpreter.fork_hooks import ChildStep, close_in_children, in_forked_child
ran = []
class Thing:
    def close(self):
        signal.raise_signal(signal.SIGUSR1)
        ran.append("closed")
def on_signal(number, frame):
    ran.append("handled")
    raise {raised}
def is_interrupted():
    signal.raise_signal(signal.SIGUSR1)
    ran.append("worker")
thing = close_in_children(Thing())
in_forked_child(is_interrupted, ChildStep.WORKER)
in_forked_child(lambda: ran.append("servers"), ChildStep.SERVERS)
signal.signal(signal.SIGUSR1, on_signal)
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR2}})
child = os.fork()
is_as_before = signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {{signal.SIGUSR2}}
if child == 0:
    print(ran, is_as_before, flush=True)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not is_as_before)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "['closed', 'worker', 'servers', 'handled'] True\n"), done.stderr
    # It does not get lost without a word.
    assert raised in done.stderr


def test_a_fork_whose_wait_for_the_guard_is_interrupted_goes_on_waiting() -> None:
    code = f"""
import os, signal, threading
from functools import partial
from mpmm.interpreter.fork_hooks import fork_guard
main = threading.main_thread().ident
taken, raised, forked = threading.Event(), threading.Event(), threading.Event()
is_held = False
reader, writer = os.pipe()

def on_signal(number, frame):
    # No function is to be interrupted before its first step.
    if not raised.is_set() and frame.f_lineno != frame.f_code.co_firstlineno:
        raised.set()
        raise KeyboardInterrupt

def hold():
    global is_held
    with fork_guard:
        is_held = True
        taken.set()
        os.read(reader, 1)
        while not raised.wait(0.01):
            signal.pthread_kill(main, signal.SIGUSR1)
        # The fork happens now, unless it waits.
        forked.wait({MOMENT_S})
        is_held = False

signal.signal(signal.SIGUSR1, on_signal)
# A function in C, which runs just before this process takes the guard.
os.register_at_fork(before=partial(os.write, writer, b"!"))
threading.Thread(target=hold).start()
taken.wait()
child = os.fork()
if child == 0:
    os._exit(1 if is_held or not fork_guard.acquire(timeout={DEADLINE_S / 4}) else 0)
forked.set()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("KeyboardInterrupt") == 1, done.stderr
    assert "RuntimeError" not in done.stderr


def test_a_child_can_take_the_guard_though_its_parent_could_not_before_the_fork() -> None:
    code = f"""
import _thread, os, signal, sys, threading
from functools import partial
from mpmm.interpreter.fork_hooks import ChildStep, fork_guard, in_forked_child
main = threading.main_thread().ident
ran = []
taken, raised, forked = threading.Event(), threading.Event(), threading.Event()
reader, writer = os.pipe()

def on_signal(number, frame):
    if number == signal.SIGUSR1:
        raised.set()
    raise KeyboardInterrupt

def hold():
    with fork_guard:
        taken.set()
        os.read(reader, 1)
        while not raised.wait(0.01):
            signal.pthread_kill(main, signal.SIGUSR1)
        forked.wait({MOMENT_S})

def take():
    with fork_guard:
        ran.append("hook")

# A child that waits for ever is to end.
in_forked_child(partial(signal.alarm, {int(DEADLINE_S / 4)}), ChildStep.SEGMENT)
in_forked_child(take)
os.register_at_fork(before=partial(os.write, writer, b"!"))
signal.signal(signal.SIGUSR1, on_signal)
# The first handler ends the wait for the guard, and the second one what comes next, before its first step. In between
# Python reports the first, by a function in C, too.
signal.signal(signal.SIGUSR2, on_signal)
os.register_at_fork(before=partial(_thread.interrupt_main, signal.SIGUSR2))
unraisable = []
sys.unraisablehook = unraisable.append
threading.Thread(target=hold).start()
taken.wait()
child = os.fork()
if child == 0:
    print([type(one.exc_value).__name__ for one in unraisable], ran, flush=True)
    os._exit(0 if fork_guard.acquire(blocking=False) else 1)
forked.set()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "['KeyboardInterrupt', 'KeyboardInterrupt'] ['hook']\n"), done.stderr
