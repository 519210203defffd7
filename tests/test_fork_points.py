"""Forks at every system call of join, leave, acquire and so on: no child inherits a lock at any moment.

A thread performs an operation. It stops before and after each call of a C function in the modules that talk to the
kernel, and another thread forks. The child checks its open files: one of our locks among them would outlive its owner,
and keep newcomers waiting as long as the child lives. While the thread holds `fork_guard`, no thread can fork; such
calls are counted separately.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import FORK_POINTS, NewProcess, files_in
from interrupt_points import PACKAGE
from loaders import Loads
from patience import DEADLINE_S

from mpmm.errors import SuspendError
from mpmm.interpreter import fork_hooks
from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.multi_process_shared.forkserver.client import SWITCH_VARIABLE
from mpmm.multi_process_shared.rpc import sockets
from mpmm.shared_state.lock_file import is_locked
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.removal import remove_deserted
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.suspend.helper import ask_helper, kill_stopped_helper

# Whose functions may open, lock, map or close something.
KERNEL = ("posix", "fcntl", "mmap", "_posixshmem", "_posixsubprocess", "_socket", "socket", "_io", "select")
# A fork waits for what is in the middle of these, by hooks of their own.
FORK_WAITS_FOR = ("logging", "importlib")
# Functions of these modules that do not call the kernel.
MERE_TEXT = ("fspath", "_path_normpath", "_path_splitroot_ex", "WIFSTOPPED", "waitstatus_to_exitcode")
# Waits repeat themselves; after this many forks at one line, further ones show nothing new.
FORKS_AT_A_LINE = int(os.environ.get("MPMM_FORKS_AT_A_LINE", "2"))


def descriptors() -> dict[int, str]:
    """Return what this process has open that a child must not have: locks and what has them, sockets."""
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{fd}")
            facts = Path(f"/proc/self/fdinfo/{fd}").read_text()
            # A file that is open only for reading is no lock, and cannot become one.
            may_lock = (".lock" in path or ".life" in path) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            if path.startswith("socket:") or ((may_lock or "lock:" in facts) and "mpmm" in path):
                found[fd] = path
    return found


class ForksAtEveryCall:
    """Runs operations in a thread, and forks in another one before and after each call to the kernel."""

    def __init__(self) -> None:
        self.forks = 0
        self.guarded = 0
        self.found: list[str] = []
        self._wanted = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._where = ""
        self._forks_at: dict[tuple[str, int, str, str], int] = {}
        self._before: set[str] = set()

    def run(self, action: Callable[[], object]) -> None:
        """Perform an operation; raise what it raises."""
        self._before = set(descriptors().values())
        ended = False
        failed: list[BaseException] = []

        def perform() -> None:
            nonlocal ended
            sys.setprofile(self._stop_at)
            try:
                action()
            except BaseException as error:
                failed.append(error)
            finally:
                sys.setprofile(None)
                ended = True
                self._wanted.release()

        thread = threading.Thread(target=perform)
        thread.start()
        while True:
            assert self._wanted.acquire(timeout=DEADLINE_S), f"it does not go on after {self._where}"
            if ended:
                break
            self._fork()
            self._done.release()
        thread.join()
        if failed:
            raise failed[0]

    def _stop_at(self, frame: Any, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return"):
            return
        name = getattr(function, "__name__", "")
        module = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
        if module not in KERNEL or name in MERE_TEXT:
            return
        callers = _callers(frame)
        if "mpmm" not in callers or any(other in callers for other in FORK_WAITS_FOR):
            return
        place = (frame.f_code.co_filename, frame.f_lineno, event, name)
        is_guarded = fork_hooks.fork_guard._is_owned()  # type: ignore[attr-defined]  # typeshed leaves it out
        is_registered = any(thing is frame.f_locals.get("self") for thing in list(fork_hooks._descriptors))
        if event == "c_call" and name == "close" and is_registered and not is_guarded:
            # In the middle of the call a socket has forgotten its number already, and the kernel has not; a connection
            # still has it when it may be somebody else's.
            self.found.append(f"{place[0]}:{place[1]} closes without the guard")
        if self._forks_at.setdefault(place, 0) >= FORKS_AT_A_LINE:
            return
        self._forks_at[place] += 1
        if is_guarded:
            self.guarded += 1
            return
        self._where = f"{event} of {module}.{name} in {os.path.basename(place[0])}:{place[1]}"
        self._wanted.release()
        self._done.acquire()

    def _fork(self) -> None:
        self.forks += 1
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, repr(sorted(set(descriptors().values()) - self._before)).encode())
            except BaseException:
                os.write(writer, traceback.format_exc().encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as answer:
            if select.select([answer], [], [], DEADLINE_S)[0]:
                said = answer.read().decode()
            else:
                said = "the child hangs"
                os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if said != "[]":
            self.found.append(f"{self._where}: {said}")


def _callers(frame: Any) -> str:
    """Return the files of the functions that have led here, the nearest ones."""
    names: list[str] = []
    while frame is not None and len(names) < 12:
        name = frame.f_code.co_filename.rpartition("site-packages")[2]
        # Whatever folder of it, and wherever the package is.
        names.append(f"mpmm{os.sep}file{os.sep}" if frame.f_code.co_filename.startswith(PACKAGE) else name)
        frame = frame.f_back
    return " ".join(os.sep.join(name.split(os.sep)[-3:-1]) or name for name in names)


class Object:
    """The object in a model server."""

    def ping(self) -> int:
        """Answer."""
        return 1


def use_model(manager: ModelManager) -> None:
    """Load, release, take it again."""
    for _ in range(2):
        with manager.model("a", Loads()):
            pass


def use_async(loop: asyncio.AbstractEventLoop, manager: ModelManager) -> None:
    """Await a copy, on a loop whose sockets are not ours."""

    async def use() -> None:
        async with manager.model_async("b", Loads()):
            pass

    loop.run_until_complete(use())


def use_server(tag: str, spawns: bool) -> None:
    """Start a server, call it, end it."""
    shared = MultiProcessShared(Object, tag=tag, always_proxy=True, spawn_process=spawns)
    proxy: Any = shared.acquire()
    assert proxy.ping() == 1
    proxy.unsafe_hard_delete()


def answer_client(folder: Path, listener: socket.socket) -> None:
    """Accept a client, as the process does that has an object, exchange a message, and hang up."""
    key = bytes(32)

    def call() -> None:
        with sockets.dial(folder, "it.sock", key, DEADLINE_S) as ours:
            ours.send_bytes(b"request")
            assert ours.recv_bytes() == b"answer"

    client = threading.Thread(target=call)
    client.start()
    assert select.select([listener], [], [], DEADLINE_S)[0]
    accepted = sockets.accept(listener)
    assert accepted is not None
    with accepted:
        sockets.authenticate_client(accepted, key)
        assert accepted.recv_bytes() == b"request"
        accepted.send_bytes(b"answer")
    client.join()


def use_helper(folder: Path) -> None:
    """Ask the process that calls the CUDA driver, which there is none of here, and look whether it is stopped."""
    with pytest.raises(SuspendError):
        ask_helper(folder, "resume", os.getpid(), DEADLINE_S, "a")
    assert not kill_stopped_helper(folder)


def put_files_back(namespace: Namespace) -> None:
    """Have a member make again what was removed."""
    shutil.rmtree(namespace.runtime.path)
    namespace._files.put_back()


@pytest.mark.parametrize(
    "operation",
    [
        "join and leave",
        "look",
        "acquire",
        "async",
        "lease",
        "put back",
        "helper",
        "remove",
        "server",
        "spawned server",
        "host",
        "accept",
    ],
)
def test_a_fork_at_any_call_to_the_kernel_gives_the_child_no_lock(
    namespace: str,
    runtime_root: Path,
    new_process: NewProcess,
    record_property: Callable[[str, object], None],
    operation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forks = ForksAtEveryCall()
    if operation == "remove":
        new_process().kill()
        forks.run(lambda: remove_deserted(runtime_root, namespace))
    elif operation == "accept":
        with closing(sockets.listen(runtime_root, "it.sock")) as listener:
            forks.run(lambda: answer_client(runtime_root, listener))
        (runtime_root / "it.sock").unlink()
    elif operation in ("server", "spawned server", "host"):
        if operation == "spawned server":
            monkeypatch.setenv(SWITCH_VARIABLE, "0")
        forks.run(lambda: use_server(f"{namespace} {operation}", operation != "host"))
    else:
        made: list[ModelManager] = []

        def join() -> None:
            manager = ModelManager(namespace=namespace, memory_source="booked")
            made.append(manager)
            manager._connected()

        if operation == "join and leave":
            forks.run(join)
            forks.run(made[0].shutdown)
            assert files_in(runtime_root) == []
        else:
            join()
            actions: dict[str, Callable[[], object]] = {
                "look": lambda: (read_snapshot(namespace), is_locked(runtime_root / namespace / "m0.lock")),
                "acquire": lambda: use_model(made[0]),
                "async": lambda: use_async(loop, made[0]),
                "lease": lambda: made[0].reserve(10.0).release(),
                "helper": lambda: use_helper(runtime_root / namespace),
                "put back": lambda: put_files_back(made[0]._connected().namespace),
            }
            with closing(asyncio.new_event_loop()) as loop:
                forks.run(actions[operation])
            made[0].shutdown()
    assert forks.found == []
    assert forks.forks > 5, "it calls nothing"
    record_property(FORK_POINTS, f"{forks.forks} {forks.guarded}")
