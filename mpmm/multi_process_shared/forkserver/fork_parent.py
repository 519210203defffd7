"""The common part of zygote and template: they fork servers, note what these import, and pass on their exit codes."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe, util
from multiprocessing import process as mp_process
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from mpmm.interpreter.fork_hooks import close_in_children, fork_guard
from mpmm.multi_process_shared.forkserver.orders import BORN, ENDED, Descriptor, ForkOrder, Kind, Order, send
from mpmm.multi_process_shared.server_process import run_server
from mpmm.multi_process_shared.spawned_server import call_this_process

__all__ = ["ForkParent"]


@dataclass(eq=False)
class _Child:
    """A server that this process has forked."""

    pid: int
    kind: Kind
    end: Descriptor
    requester: Connection | None
    imports: Connection | None
    exit_code: int | None = None


class ForkParent:
    """Forks servers and keeps track of them; the base class of zygote and template."""

    def __init__(self) -> None:
        self.children: set[_Child] = set()

    def fork_server(self, order: Order, kind: Kind) -> None:
        """Fork the server, and tell the requester its pid."""
        try:
            child = self._forked(order, kind)
        except OSError:
            # Too many processes or descriptors, say: the requester finds that out by itself.
            order.close()
            return
        self.children.add(child)
        with contextlib.suppress(OSError):
            send(order.requester, BORN, child.pid)

    def _forked(self, order: Order, kind: Kind) -> _Child:
        """Fork the server. Raises OSError, and then leaves nothing behind but the order."""
        renewal = self.renewal()
        with contextlib.ExitStack() as on_failure:
            with contextlib.ExitStack() as for_child:
                with fork_guard:
                    imports, imported = Pipe(duplex=False)
                    close_in_children(imports)
                on_failure.callback(imports.close)
                for_child.callback(imported.close)
                # Copies for the child: the originals are closed in it, as are those of all other orders.
                kept: list[int] = []
                for descriptor in order.descriptors:
                    kept.append(os.dup(descriptor.fd))
                    for_child.callback(os.close, kept[-1])
                pid = os.fork()
                if pid == 0:
                    _become_server(order.order, kept, imported, renewal)
            try:
                end = Descriptor(os.pidfd_open(pid))
            except OSError:
                # This process could not notice the server's end.
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            on_failure.pop_all()
        for descriptor in order.descriptors:
            descriptor.close()
        return _Child(pid, kind, end, order.requester, imports)

    def watched(self) -> list[Any]:
        """Return the objects to wait for."""
        return [
            thing
            for child in self.children
            for thing in (child.requester, child.imports, child.end if child.exit_code is None else None)
            if thing is not None
        ]

    def look_after_children(self, ready: list[Any]) -> None:
        """Note what children have imported, pass on their exit codes, and reap those that no requester waits for."""
        for child in list(self.children):
            if child.imports in ready and child.imports is not None:
                with contextlib.suppress(EOFError, OSError, ValueError):
                    self.note_imports(child.kind, json.loads(child.imports.recv_bytes()))
                child.imports.close()
                child.imports = None
            if child.end in ready:
                # Not reaped yet: the kernel must not reuse its pid while a requester may use it.
                ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
                assert ended is not None
                child.exit_code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                if child.requester is not None:
                    with contextlib.suppress(OSError):
                        send(child.requester, ENDED, child.exit_code)
            elif child.requester in ready and child.requester is not None:
                # A requester sends nothing more, so this is the end of its connection.
                child.requester.close()
                child.requester = None
            if child.exit_code is not None and child.requester is None:
                os.waitpid(child.pid, 0)
                child.end.close()
                if child.imports is not None:
                    child.imports.close()
                self.children.discard(child)

    def renewal(self) -> Callable[[dict[str, str]], None]:
        """Return the function that a server calls first, with its environment."""
        return _set_environment

    def note_imports(self, kind: Kind, modules: list[str]) -> None:
        """Note the modules that a server of the kind had to import."""
        raise NotImplementedError


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()


def _become_server(
    order: ForkOrder, descriptors: list[int], imported: Connection, renew: Callable[[dict[str, str]], None]
) -> NoReturn:
    """Turn a fresh fork into the process that `multiprocessing.spawn` would have made, and be the server."""
    try:
        report, out, err = descriptors
        null = os.open(os.devnull, os.O_RDONLY)
        for number, fd in enumerate((null, out, err)):
            os.dup2(fd, number)
            os.close(fd)
        for stream in (sys.stdout, sys.stderr):
            # Mypy takes both for `TextIO`, which has no such method.
            stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())  # type: ignore[union-attr]  # typeshed's TextIO has no reconfigure
        _reset_signals()
        renew(order.plan.environment_in(order.environment))
        call_this_process("mpmm-server")
        importlib.invalidate_caches()
        util._finalizer_registry.clear()  # type: ignore[attr-defined]  # not in typeshed
        util._run_after_forkers()  # type: ignore[attr-defined]  # not in typeshed
        mp_process._children.clear()  # type: ignore[attr-defined]  # not in typeshed
        mp_process._process_counter = itertools.count(1)  # type: ignore[attr-defined]  # not in typeshed
        before = set(sys.modules)
        run_server(order.plan, Connection(report), order.preparation, on_made=lambda: _report_imports(before, imported))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _report_imports(before: set[str], imported: Connection) -> None:
    """Report the modules imported since `before`, as far as an import by name would import them."""
    new = []
    for name, module in sys.modules.copy().items():
        # Others are aliases, or were put there by hand.
        if name not in before and getattr(getattr(module, "__spec__", None), "name", None) == name:
            new.append(name)
    with contextlib.suppress(OSError), imported:
        imported.send_bytes(json.dumps(new).encode())


def _reset_signals() -> None:
    """Make sure that the signals that end a server do so; imported modules keep their handlers of other signals."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
