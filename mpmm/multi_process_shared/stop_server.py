"""Ends servers: asks one to end, and kills it if it does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing import AuthenticationError

from mpmm.errors import ModelServerError
from mpmm.interpreter.thread_starts import start_thread
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.registry import ServerRecord, ServerRegistry
from mpmm.multi_process_shared.rpc import protocol, sockets
from mpmm.multi_process_shared.rpc.channel import Channel

__all__ = ["end_server", "kill_process"]

# A killed process ends within milliseconds, unless a driver call holds it up.
KILL_TIMEOUT_S = 10.0
FIRST_PAUSE_S = 0.000_5
LONGEST_PAUSE_S = 0.02


def end_server(
    registry: ServerRegistry, tag: str, timeout_seconds: float, incarnation: str | None = None, pid: int | None = None
) -> bool:
    """End the tag's server and return True once it is gone; False if there was none (or not that `incarnation`, `pid`).

    A spawned server that does not end within `timeout_seconds`, or has not come up yet, is killed. Raises
    ModelServerError if it survives even that, or is part of a process with other work, which must not be killed.
    """
    host = find_host(registry, tag)
    if host is not None and incarnation in (None, host.record.incarnation) and pid in (None, host.record.pid):
        host.hard_delete()
        registry.tidy(tag)
        return True
    deadline = time.monotonic() + timeout_seconds
    lives, record = registry.find(tag, timeout_seconds)
    while lives and record is None and time.monotonic() < deadline:
        time.sleep(FIRST_PAUSE_S)
        lives, record = registry.look(tag)
    if not lives:
        return False
    if record is None:
        raise ModelServerError(f"the server of {tag!r} has not recorded its pid", tag=tag, server_pid=None)
    if incarnation not in (None, record.incarnation) or pid not in (None, record.pid):
        return False
    asked = False
    if record.ready:
        registry.join()
        # In a thread, because a stopped server accepts the connection and never answers.
        try:
            asked_with = registry, record, registry.key()
            start_thread(threading.Thread(target=_ask, args=asked_with, name="mpmm-end", daemon=True))
            asked = True
        except RuntimeError:
            # Too many threads; or, from Python 3.12 on, the interpreter is about to end.
            if record.spawned:
                _signal(registry, record, signal.SIGTERM)
                asked = True
    # A server that is neither ready nor leaving is still making its object, and takes no requests.
    if not ((asked or record.leaving) and _wait_until_gone(registry, record, deadline)):
        if not record.spawned:
            raise ModelServerError(
                f"pid {record.pid}, which serves the shared object {tag!r} among its other work, "
                f"did not stop serving it within {timeout_seconds:g} s",
                tag=tag,
                server_pid=record.pid,
            )
        _signal(registry, record, signal.SIGKILL)
        if not _wait_until_gone(registry, record, time.monotonic() + KILL_TIMEOUT_S):
            why = "after SIGKILL" if record.is_here else "and runs in another pid namespace, out of reach"
            raise ModelServerError(
                f"the server of the shared object {tag!r} (pid {record.pid}) is still there {why}",
                tag=tag,
                server_pid=record.pid,
            )
    registry.tidy(tag)
    return True


def kill_process(pid: int, is_it: Callable[[], bool], tag: str, is_here: Callable[[], bool] = lambda: True) -> None:
    """Kill the server of a tag until `is_it` no longer says that it lives and has this pid.

    is_here: tells whether the pid is its number here. If not, it runs in another container, and this only waits for its
    end, because the number may be another process's.

    Raises ModelServerError if it survives.
    """
    deadline, pause = time.monotonic() + KILL_TIMEOUT_S, FIRST_PAUSE_S
    while is_it():
        here = is_here()
        if time.monotonic() >= deadline:
            why = "after SIGKILL" if here else "and runs in another pid namespace, out of reach"
            raise ModelServerError(
                f"the server of the shared object {tag!r} (pid {pid}) is still there {why}", tag=tag, server_pid=pid
            )
        if here:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_S)


def _ask(registry: ServerRegistry, record: ServerRecord, key: bytes) -> None:
    """Ask the server to end. Does not join the registry, which this process may have left by the time this runs."""
    registry.restore_socket(record)
    with (
        suppress(AuthenticationError, EOFError, OSError),
        closing(Channel(sockets.dial_socket(registry.path, record.socket_name, key))) as channel,
    ):
        channel.send(protocol.encode_request(protocol.CONTROL, protocol.HARD_DELETE, (), {}))
        channel.receive()


def _signal(registry: ServerRegistry, record: ServerRecord, number: int) -> None:
    """Send a signal to the process of a record if the same server still runs in it, in this pid namespace."""
    _, now = registry.look(record.tag)
    if record.is_here and now is not None and now.incarnation == record.incarnation and record.is_running():
        with suppress(ProcessLookupError):
            os.kill(record.pid, number)


def _wait_until_gone(registry: ServerRegistry, record: ServerRecord, deadline: float) -> bool:
    pause = FIRST_PAUSE_S
    while not _is_gone(registry, record):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_S)
    return True


def _is_gone(registry: ServerRegistry, record: ServerRecord) -> bool:
    lives, now = registry.look(record.tag)
    if lives and (now is None or now.incarnation == record.incarnation):
        return False
    # The kernel drops the lock as it closes descriptors; an accelerator's memory is freed with a later one.
    return not record.spawned or record.has_ended()
