"""The helper: the one process of a namespace that calls the CUDA driver's checkpoint functions, started on demand.

Neither workers, which fork, nor model servers, whose own threads a lock stops, may call `cuInit`. The helper holds the
lock `suspend.lock`, by which the kernel elects it, and answers at a socket beside it. It suspends or resumes each
process in a thread of its own, and ends once no worker is left, no request has come for `IDLE_S`, or a call of the
driver hangs: the requester ends the process whose call hangs, and the next helper serves the others. A stopped helper
keeps the lock, so a process that has asked it in vain kills it.

A helper's death costs the operation, not the process that is being moved: the requester asks the next helper, which
goes on from the state in which the driver has left that process. The state does not tell a suspended process from one
whose restore has begun, with part of its memory on the device again. So the helper notes in its lock file which
processes it is resuming, and the next helper resumes those before it suspends them.

The requester may die, too, and another one may ask to suspend a process that is still being resumed. The second request
waits for the first: operations on one process never overlap. A requester's death ends its connection, and then the
helper does not begin a restore: that would only keep the next requester waiting, and take the device's memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mpmm.errors import ModelServerError, SuspendError
from mpmm.interpreter.fork_hooks import close_in_children, closing_guard, fork_guard
from mpmm.interpreter.new_interpreter import command_line
from mpmm.interpreter.thread_locks import new_lock
from mpmm.multi_process_shared.rpc import sockets
from mpmm.shared_state.liveness import pid_namespace
from mpmm.shared_state.lock_file import LockFile, is_locked
from mpmm.sources.process_tree import is_stopped
from mpmm.suspend.driver import OUT_OF_MEMORY, CheckpointDriver, DriverError

__all__ = ["ask_helper", "kill_stopped_helper", "main", "reap_ended_helpers"]

LOCK, SOCKET, ALIVE = "suspend.lock", "suspend.sock", "alive.lock"
IDLE_S = 60.0
LOOK_S = 0.5
# Importing takes 0.1 s, and `cuInit` up to 3 s on a host with many GPUs, but on a busy host everything takes longer.
START_S = 30.0
START_LOOK_S = 0.02
# Connecting to a stopped helper succeeds all the same, until very many connections wait.
CONNECT_S = 1.0
# How many helpers are asked, each after the death of the one before, and how many may fail to start.
TRIES = 3
# A call that has taken this many times its limit is not going to return.
HUNG = 2.0
# Room for more pids than a host resumes at a time.
NOTED_BYTES = 4096
_started: list[subprocess.Popen[bytes]] = []


# ---- the process that asks -------------------------------------------------------------------------------------------


def ask_helper(folder: Path, what: str, pid: int, limit_s: float, tag: str, shown: str | None = None) -> None:
    """Have the helper of a namespace's folder `suspend` or `resume` a process; start a helper if there is none.

    pid: as numbered in this process's pid namespace. shown: the tag as people see it. Raises SuspendError with the
    driver's message, from a MemoryError if the device has no room for a resume; ModelServerError if the helper is in
    another pid namespace, where the pid may be that of another process; TimeoutError if no helper could be asked
    within `limit_s`; another OSError if the folder is gone, or none can be started: these say nothing about the tag.
    """
    deadline = time.monotonic() + limit_s
    subject = f"{what} {shown if shown and shown != tag else repr(tag)} (pid {pid})"
    key = (folder / "token").read_bytes()
    request = json.dumps({"what": what, "pid": pid, "limit_s": limit_s, "pids_of": pid_namespace()}).encode()
    for tried in range(1, TRIES + 1):
        try:
            with closing(_connected(folder, key, deadline)) as connection:
                if time.monotonic() >= deadline:
                    # The caller has given up: by now the process may have ended, and its pid may be another's.
                    raise TimeoutError(f"{subject}: no helper could be asked within {limit_s:g} s")
                connection.send_bytes(request)
                answer = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            if tried == TRIES:
                raise SuspendError(f"{subject}: {TRIES} helpers have died while doing it", tag=tag) from error
            continue
        if answer.get("elsewhere"):
            raise ModelServerError(f"{subject}: {answer['error']}", tag=tag, server_pid=pid)
        if answer["error"] is not None:
            cause = MemoryError() if answer.get("no_room") else None
            raise SuspendError(f"{subject}: {answer['error']}", tag=tag) from cause
        return


def kill_stopped_helper(folder: Path) -> bool:
    """Kill the helper of a namespace's folder if it is stopped, so that another one can start; return whether."""
    with suppress(OSError):
        pid = sockets.pid_at(folder, SOCKET, CONNECT_S)
        if pid is not None and is_stopped(pid):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def _connected(folder: Path, key: bytes, deadline: float) -> Connection:
    """Return a connection to the helper; start one if there is none.

    Raises TimeoutError if none has come up by `deadline` (monotonic), or within `START_S`; ChildProcessError if those
    that are started here fail at once; other OSErrors if none can be started.
    """
    deadline = min(deadline, time.monotonic() + START_S)
    failed = 0
    with ExitStack() as opened:
        started: _Started | None = None
        while True:
            try:
                return sockets.dial(folder, SOCKET, key)
            except (FileNotFoundError, ConnectionError, EOFError, AuthenticationError) as error:
                # A killed helper still accepts connections for a moment, and resets them. It has not received the
                # request.
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no helper answers in {folder}: {error!r}") from error
            # The helper that was started here may have found another one, or may have been killed.
            if started is not None and started.process.poll() is not None:
                failed += started.process.returncode > 0
                if failed == TRIES:
                    raise ChildProcessError(
                        f"the helper that calls the driver does not start (exit status {started.process.returncode}): "
                        f"{started.last_words()}"
                    )
                started = None
            if started is None and not is_locked(folder / LOCK):
                started = _Started(folder)
                opened.callback(started.close)
            time.sleep(START_LOOK_S)


def reap_ended_helpers() -> None:
    """Reap the helpers that this process has started and that have ended."""
    for process in list(_started):
        if process.poll() is not None:
            with suppress(ValueError):  # another thread was faster
                _started.remove(process)


class _Started:
    """A helper that this process has started, with what it has written to its standard error, until this is closed."""

    def __init__(self, folder: Path) -> None:
        with fork_guard:
            self._errors = close_in_children(os.fdopen(os.memfd_create("mpmm-helper"), "r+b"))
        try:
            # It outlives this process, so it keeps none of its pipes open: a program that reads this one's output to
            # the end would wait for it. And it serves processes with other devices, too.
            self.process = subprocess.Popen(
                command_line(__name__, str(folder)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
            )
        except BaseException:
            self.close()
            raise
        _started.append(self.process)

    def last_words(self) -> str:
        """Return the last line of what it has written, which for an exception is its text."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it has not said why")

    def close(self) -> None:
        """Stop keeping what it writes."""
        with closing_guard():
            self._errors.close()


# ---- the process -------------------------------------------------------------------------------------------------


def main(folder_text: str) -> None:
    """Serve the workers of a namespace's folder until that is not needed; return at once if another helper does."""
    folder = Path(folder_text)
    try:
        lock = LockFile(folder / LOCK)
        key = (folder / "token").read_bytes()
    except FileNotFoundError:
        # The last worker has left meanwhile, and removed the folder.
        return
    if not lock.try_exclusive() or not lock.is_current():
        return
    (folder / SOCKET).unlink(missing_ok=True)
    helper = _Helper(key, _Unfinished(lock.fd))
    with sockets.listen(folder, SOCKET) as listener:
        while lock.is_current() and not _is_deserted(folder / ALIVE) and not helper.is_through():
            if wait([listener], LOOK_S):
                connection = sockets.accept(listener)
                if connection is not None:
                    threading.Thread(target=helper.serve_connection, args=(connection,), daemon=True).start()
    with suppress(OSError):
        (folder / SOCKET).unlink(missing_ok=True)


def _is_deserted(alive: Path) -> bool:
    """Tell whether no worker is left; each of them holds this lock shared."""
    try:
        with closing(LockFile(alive, create=False)) as lock:
            return lock.try_exclusive()
    except FileNotFoundError:
        return True


class _Unfinished:
    """The pids, in the lock file, of processes that are being resumed, by this helper or one that has died meanwhile.

    Another process that has such a pid by now is not affected: resuming a running process changes nothing.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        noted = os.pread(fd, NOTED_BYTES, 0).partition(b"\n")[0].split()
        self._pids = {int(pid) for pid in noted if Path(f"/proc/{int(pid)}").exists()}

    def __contains__(self, pid: int) -> bool:
        return pid in self._pids

    def add(self, pid: int) -> None:
        """Note a process."""
        self._pids.add(pid)
        self._write()

    def discard(self, pid: int) -> None:
        """Forget a process."""
        if pid in self._pids:
            self._pids.discard(pid)
            self._write()

    def _write(self) -> None:
        # In one write; the rest of an older, longer line after the end of this one is not read.
        os.pwrite(self._fd, " ".join(map(str, sorted(self._pids))).encode() + b"\n", 0)


class _Helper:
    def __init__(self, key: bytes, unfinished: _Unfinished) -> None:
        self._key = key
        self._unfinished = unfinished
        # By pid: the lock held by the thread whose turn it is with that process.
        self._turns: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._mutex = new_lock()
        self._driver: CheckpointDriver | None = None
        self._last_asked = time.monotonic()
        # By thread: when a request counts as hung.
        self._hung_at: dict[int, float] = {}

    def is_through(self) -> bool:
        """Tell whether to end: no request has come for a while, or a call hangs."""
        now, hung_at = time.monotonic(), list(self._hung_at.values())
        return min(hung_at, default=now) < now or (not hung_at and now - self._last_asked > IDLE_S)

    def serve_connection(self, connection: Connection) -> None:
        """Answer one request."""
        with closing(connection), suppress(EOFError, OSError, AuthenticationError):
            sockets.authenticate_client(connection, self._key)
            request = json.loads(connection.recv_bytes())
            self._last_asked = time.monotonic()
            self._hung_at[threading.get_ident()] = self._last_asked + HUNG * request["limit_s"]
            try:
                # The requester sends nothing after its request, so only the end of the connection can be read.
                answer = self._do(request, lambda: not connection.poll())
            finally:
                del self._hung_at[threading.get_ident()]
                self._last_asked = time.monotonic()
            connection.send_bytes(json.dumps(answer).encode())

    def _do(self, request: dict[str, Any], is_wanted: Callable[[], bool]) -> dict[str, Any]:
        """Do what is asked; return what went wrong, and whether that was too little memory on the device.

        is_wanted: tells whether the requester is still there.
        """
        pid, limit_s = request["pid"], request["limit_s"]
        if request.get("pids_of", 0) not in (0, pid_namespace()):
            return {"error": "the helper is in another pid namespace", "elsewhere": True}
        with self._mutex:
            turn = self._turns.setdefault(pid, new_lock())
        if not turn.acquire(timeout=limit_s):
            return {"error": f"process {pid} is still being suspended or resumed for another request"}
        try:
            # This request's own time limit begins now.
            self._hung_at[threading.get_ident()] = time.monotonic() + HUNG * limit_s
            self._move(request["what"], pid, time.monotonic() + limit_s, is_wanted)
        except DriverError as error:
            return {"error": str(error), "no_room": error.call == "restore" and error.code == OUT_OF_MEMORY}
        finally:
            turn.release()
        return {"error": None}

    def _move(self, what: str, pid: int, deadline: float, is_wanted: Callable[[], bool]) -> None:
        with self._mutex:
            driver = self._driver = self._driver or CheckpointDriver()
            unfinished = pid in self._unfinished
            resumes = what == "resume" or unfinished
            if resumes:
                self._unfinished.add(pid)
        try:
            if unfinished:
                # Even if the requester is gone: part of the process's memory may be on the device.
                driver.resume(pid, deadline)
            elif resumes:
                driver.resume(pid, deadline, is_wanted)
        finally:
            # If the resume failed, the driver has left the process wholly suspended.
            with self._mutex:
                self._unfinished.discard(pid)
        if what == "suspend":
            driver.suspend(pid, deadline)
