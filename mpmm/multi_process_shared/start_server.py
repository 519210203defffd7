"""Starts model servers: the only module that knows how a process becomes one."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import process as mp_process
from multiprocessing import spawn
from multiprocessing.connection import Connection, wait
from typing import Any

from mpmm.errors import ServerStartError
from mpmm.interpreter.fork_hooks import call_once_at_exit, in_forked_child
from mpmm.interpreter.process_limits import limit_behind
from mpmm.interpreter.thread_locks import new_rlock
from mpmm.multi_process_shared.context import server_contexts
from mpmm.multi_process_shared.forkserver.client import order_server
from mpmm.multi_process_shared.main_import import is_importing_main, not_while_importing_main
from mpmm.multi_process_shared.registry import LEAVE_PRIORITY, ServerRegistry, server_lives_by, start_time_of
from mpmm.multi_process_shared.rpc.protocol import dump_for_server
from mpmm.multi_process_shared.server_process import CRASHED, READY, ServerPlan
from mpmm.multi_process_shared.spawned_server import SpawnedServer, preparation_for

__all__ = ["reap_ended_servers", "start_server"]

# Before anything else at exit: `multiprocessing` joins the children left in its list right after the hooks.
DISOWN_PRIORITY = LEAVE_PRIORITY + 20
# A pipe signals a death at once, unless a process forked meanwhile has the dead process's end open, too.
LOOK_INTERVAL_S = 1.0

_started: set[mp_process.BaseProcess] = set()
_starting = new_rlock()


def start_server(registry: ServerRegistry, tag: str, constructor: Any) -> str:
    """Start a process that makes the object and serves it; return its report: READY, ATTACH or OCCUPIED.

    Hold the tag's lock. The current `server_contexts` are sent along. Raises ServerStartError with the server's
    traceback or exit code; InvalidArgumentError if the constructor cannot be sent.
    """
    contexts = server_contexts()
    plan = ServerPlan(
        root=str(registry.root),
        tag=tag,
        environment=tuple(pair for context in contexts for pair in context.environment),
        starter=(os.getpid(), start_time_of(os.getpid())),
        alive_locks=(
            str(registry.alive_path),
            *(context.alive_lock for context in contexts),
            # A server that another server starts lives as long as the other's clients, because a server is no client.
            *(server_lives_by() or ()),
        ),
        contexts=dump_for_server(contexts, f"the server contexts for {tag!r}"),
        constructor=dump_for_server(constructor, f"the constructor of {tag!r}"),
    )
    # Not a daemon, so that the object may have children of its own.
    name = f"mpmm-server-{tag}"[:80]
    if is_importing_main():
        raise not_while_importing_main(f"start a model server for {tag!r}", tag)
    try:
        preparation = preparation_for(name, constructor)
    except FileNotFoundError as error:
        raise ServerStartError(
            f"a model server for {tag!r} begins in the working directory of its starter, and that of pid "
            f"{os.getpid()} was removed: change to one that exists (os.chdir)",
            tag=tag,
        ) from error
    try:
        server, reader = _begin(registry, plan, preparation, name)
    except OSError as error:
        limit = limit_behind(error)
        raise ServerStartError(
            f"no process could be started for {tag!r}: {error}{limit and f': {limit}'}", tag=tag
        ) from error
    with reader:
        while not wait([reader, server.sentinel], LOOK_INTERVAL_S) and server.is_alive():
            pass
        try:
            # The server may have reported before it ended.
            outcome, text = reader.recv() if reader.poll() else (None, "")
        except EOFError:
            outcome, text = None, ""
    if outcome != READY:
        # It is ending; the next process that looks for a server must not find this one.
        server.join()
    if outcome is None:
        code = f"with exit code {server.exitcode}"
        if server.exitcode is None:
            # The kernel reports an exit code once, and never if SIGCHLD is ignored.
            code = "(this program ignores SIGCHLD, or something else in it has waited for all children)"
        text = f"Shared Server Process died unexpectedly {code} while it made {tag!r}"
        interpreter = os.fsdecode(spawn.get_executable() or "")
        if not os.access(interpreter, os.X_OK):
            text += f": there is no interpreter at {interpreter!r}; set one with multiprocessing.set_executable"
        raise ServerStartError(text, tag=tag)
    if outcome == CRASHED:
        raise ServerStartError(text, tag=tag)
    return str(outcome)


def _begin(
    registry: ServerRegistry, plan: ServerPlan, preparation: dict[str, Any], name: str
) -> tuple[mp_process.BaseProcess, Connection]:
    """Start the process, forked if possible, and return it with the end of a pipe on which it reports."""
    pipe = functools.partial(multiprocessing.get_context("spawn").Pipe, duplex=False)
    call_once_at_exit(disown_servers, DISOWN_PRIORITY)
    with contextlib.ExitStack() as ends:
        reader, writer = map(ends.enter_context, pipe())
        server: mp_process.BaseProcess | None = order_server(registry, plan, preparation, writer, name)
        if server is None:
            # With a pipe of its own: a server that is forked although its order was given up reports on the first pipe.
            ends.close()
            reader, writer = map(ends.enter_context, pipe())
            server = SpawnedServer(name, plan, preparation, writer)
        with _starting, _allowed_to_have_children():
            server.start()
            _started.add(server)
        ends.pop_all()
        writer.close()
    return server, reader


@contextlib.contextmanager
def _allowed_to_have_children() -> Iterator[None]:
    """Let a daemon, such as a worker of `multiprocessing.Pool`, start a process, which multiprocessing forbids.

    It does so to avoid orphans: a daemon is killed without a chance to end its children. A model server ends by
    itself, whatever happens to the process that started it.
    """
    # Private, and so unknown to the type stubs, like `_children` below.
    config: dict[str, Any] = mp_process.current_process()._config  # type: ignore[attr-defined]  # not in typeshed
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemon is not None:
            config["daemon"] = daemon


def disown_servers() -> None:
    """Take the servers out of the list of children that `multiprocessing` joins at the end of this process.

    They outlive this process for the sake of other clients, and end by themselves soon after the last one; joining
    them would wait for processes that wait for this one.
    """
    # Private, and so unknown to the type stubs; multiprocessing has no public way to take a child off its list.
    children: set[Any] = mp_process._children  # type: ignore[attr-defined]  # not in typeshed
    children.difference_update(_started)
    _started.clear()


def _disown_in_child() -> None:
    global _starting
    _starting = new_rlock()
    disown_servers()


# The servers are no children of a forked child: joining them at its exit would be an error.
in_forked_child(_disown_in_child)


def reap_ended_servers() -> None:
    """Reap the children that have ended, so that no zombies stay."""
    # Not while another thread's server is in only one of the two lists, multiprocessing's and this module's.
    with _starting:
        if _started:
            _started.intersection_update(multiprocessing.active_children())
