"""The requester's side of the fork server: orders a server, and represents it as a process object.

`multiprocessing.active_children()` lists the object like a child that this process started itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import AuthenticationError, util
from multiprocessing import process as mp_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import mpmm
from mpmm.errors import LockTimeoutError
from mpmm.interpreter.new_interpreter import command_line, interpreter_flags
from mpmm.interpreter.thread_locks import new_rlock
from mpmm.multi_process_shared.registry import LIVES_BY_VARIABLE, ServerRegistry, open_lock
from mpmm.multi_process_shared.rpc import sockets
from mpmm.multi_process_shared.server_process import ServerPlan
from mpmm.shared_state.lock_file import is_locked
from mpmm.text.printable import printable_logger

__all__ = ["ForkedServer", "add_preload_hook", "order_server", "remove_preload_hook"]

logger = printable_logger(__name__)

SWITCH_VARIABLE = "MPMM_ZYGOTE"
# Enough for a slow machine under load; the zygote itself needs a few tenths of a second.
START_TIMEOUT_S = 20.0
# The zygote reports every second that an order waits; a template may be busy with one import.
ANSWER_TIMEOUT_S = 10.0
EXIT_CODE_TIMEOUT_S = 5.0
# As in multiprocessing: after the death of its fork server, no process knows the exit code either.
UNKNOWN_EXIT_CODE = 255

# Environment variables that take effect when an interpreter starts, and never later.
START_VARIABLES = re.compile(r"(LD_|MALLOC_|GLIBC_|PYTHON)\w*")
AVOID_S = 30.0

_preload_hooks: list[str] = []
_avoid_until = 0.0


def add_preload_hook(name: str) -> None:
    """Run `"module:function"`, which every server of this process calls first, before servers are forked, too.

    It must not matter to the function whether it has already run before the fork.
    """
    if name not in _preload_hooks:
        _preload_hooks.append(name)


def remove_preload_hook(name: str) -> None:
    """Undo `add_preload_hook`."""
    if name in _preload_hooks:
        _preload_hooks.remove(name)


def order_server(
    registry: ServerRegistry, plan: ServerPlan, preparation: dict[str, Any], report: Connection, name: str
) -> ForkedServer | None:
    """Have the registry's zygote fork a server, which reports to `report`; return None if only a spawn can help.

    To `multiprocessing` the returned process is not started yet: call its `start()`.
    """
    global _avoid_until
    if not _is_possible():
        return None
    from mpmm.multi_process_shared.forkserver import orders

    order = orders.ForkOrder(plan, preparation, dict(os.environ), tuple(_preload_hooks))
    try:
        connection = _reach_zygote(registry)
        try:
            connection.send_bytes(pickle.dumps(order))
            _send_streams(connection, report)
            while True:
                what, pid = orders.receive(connection)
                if what == orders.BORN:
                    return ForkedServer(name, _ForkedPopen(pid, connection))
        except BaseException:
            connection.close()
            raise
    except (OSError, EOFError, AuthenticationError, LockTimeoutError, subprocess.SubprocessError) as error:
        if not isinstance(error, (ConnectionError, EOFError)):
            # The zygote is stopped, say: do not let every start wait for it.
            _avoid_until = time.monotonic() + AVOID_S
        logger.warning("mpmm: pid %d spawns the server of %r instead of forking it: %r", os.getpid(), plan.tag, error)
        return None


class ForkedServer(mp_process.BaseProcess):
    """A model server that the zygote has forked, as a child of this process."""

    def __init__(self, name: str, server: _ForkedPopen) -> None:
        super().__init__(name=name, daemon=False)
        self._server = server

    @staticmethod
    def _Popen(process: Any) -> _ForkedPopen:
        server: _ForkedPopen = process._server
        return server


class _ForkedPopen:
    """What `BaseProcess` needs to know about a process, here about one that is the zygote's child."""

    method = "mpmm-zygote"

    def __init__(self, pid: int, connection: Connection) -> None:
        """Represent the process. Raises ProcessLookupError if the zygote has died, and so has the server."""
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection
        self._lock = new_rlock()
        self.sentinel = os.pidfd_open(pid)
        # Polled at each acquire of any tag, of whose time `wait` would take a tenth.
        self._ended = select.poll()
        self._ended.register(self.sentinel, select.POLLIN)
        self.finalizer = util.Finalize(self, os.close, (self.sentinel,))

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code, or None while the server runs."""
        if self._lock._is_owned():  # type: ignore[attr-defined]  # typeshed leaves it out
            # A signal handler asks, in the middle of a poll of its thread.
            return self.returncode
        with self._lock:
            if self.returncode is None and self._ended.poll(0 if flag == os.WNOHANG else None):
                self.returncode = self._exit_code()
            return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end; return the exit code, or None if it takes longer."""
        if self.returncode is None and not wait([self.sentinel], timeout):
            return None
        return self.poll()

    def _exit_code(self) -> int:
        from mpmm.multi_process_shared.forkserver import orders

        with contextlib.suppress(OSError, EOFError), self._connection:
            # Closing the connection lets the zygote reap the server.
            if self._connection.poll(EXIT_CODE_TIMEOUT_S):
                return orders.receive(self._connection)[1]
        return UNKNOWN_EXIT_CODE

    def terminate(self) -> None:
        """Ask the server to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the server."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.sentinel, number)

    def close(self) -> None:
        """Close the descriptors; the server's state is not needed any more."""
        self._connection.close()
        self.finalizer()


def _is_possible() -> bool:
    """Tell whether this platform can fork servers, the user has not switched that off, and it has not failed lately."""
    return (
        os.environ.get(SWITCH_VARIABLE, "1") != "0"
        and sys.platform == "linux"
        and time.monotonic() >= _avoid_until
        and _has_pidfd()
    )


@functools.cache
def _has_pidfd() -> bool:
    """Tell whether Python and the kernel support descriptors of processes."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return hasattr(signal, "pidfd_send_signal")


def _send_streams(connection: Connection, report: Connection) -> None:
    """Send the descriptors of the server's report and of its standard output and error."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        fds = [report.fileno(), 1 if _is_stream(1) else null, 2 if _is_stream(2) else null]
        with sockets.duplicate(connection.fileno()) as ours:
            socket.send_fds(ours, [b"!"], fds, sockets.NO_SIGNAL)
    finally:
        os.close(null)


def _is_stream(number: int) -> bool:
    """Tell whether a descriptor is a standard stream, which a program that this process starts would inherit.

    If a daemon has closed its own streams, the number is that of the next file that its program has opened.
    """
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


def _reach_zygote(registry: ServerRegistry) -> Connection:
    """Return a connection to the registry's zygote; start the zygote if there is none.

    Raises OSError, EOFError, AuthenticationError, LockTimeoutError, SubprocessError.
    """
    life = _life_path(registry)
    with contextlib.suppress(ConnectionError, FileNotFoundError, EOFError, ValueError):
        if is_locked(life):
            return _dial(registry, life)
    life.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.closing(open_lock(life.with_suffix(".lock"))) as lock:
        lock.exclusive(START_TIMEOUT_S)
        if not is_locked(life):
            _start_zygote(registry, life)
        try:
            return _dial(registry, life)
        except ValueError as error:
            raise OSError(f"the life file of the zygote cannot be read: {error}") from error


def _dial(registry: ServerRegistry, life: Path) -> Connection:
    place = Path(json.loads(life.read_text(encoding="utf-8"))["socket"])
    return sockets.dial(place.parent, place.name, registry.key(), ANSWER_TIMEOUT_S)


def zygote_pid(registry: ServerRegistry) -> int | None:
    """Return the pid of the registry's zygote for this interpreter, or None if there is none."""
    life = _life_path(registry)
    with contextlib.suppress(OSError, ValueError):
        if is_locked(life):
            return int(json.loads(life.read_text(encoding="utf-8"))["pid"])
    return None


def _life_path(registry: ServerRegistry) -> Path:
    """Return the path of the zygote's life lock; interpreters that start in different ways have different zygotes."""
    variables = sorted(
        item for item in os.environ.items() if START_VARIABLES.fullmatch(item[0]) and item[0] != "PYTHONPATH"
    )
    identity = json.dumps(
        [sys.executable, sys.version, mpmm.__file__, *interpreter_flags(), variables, _kernel_namespaces()]
    )
    return registry.path / "zygote" / f"{hashlib.sha256(identity.encode()).hexdigest()[:12]}.life"


def _kernel_namespaces() -> list[str]:
    """Return what tells containers apart: in another one, pids and paths may mean something else."""
    found = []
    for name in ("pid", "mnt", "net", "user"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/ns/{name}"))
    return found


def _start_zygote(registry: ServerRegistry, life: Path) -> None:
    """Start the zygote; return when it takes orders. Raises OSError, SubprocessError. Hold its lock."""
    began = time.monotonic()
    # The process started here forks the zygote and ends, so that the zygote is no caller's child.
    done = subprocess.run(
        command_line("mpmm.multi_process_shared.forkserver.zygote", str(registry.root), str(life)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # The zygote outlives this process, which may be a server.
        env={name: value for name, value in os.environ.items() if name != LIVES_BY_VARIABLE},
        timeout=START_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise OSError(f"the zygote did not start (exit code {done.returncode})")
    logger.info("mpmm: pid %d started a zygote in %.2f s", os.getpid(), time.monotonic() - began)
