"""Orders for servers, and how they are passed from a requester to the zygote and on to a template.

An order is a pickled `ForkOrder`, followed by three descriptors. The process that has it keeps the requester's
connection, on which it reports the pid of the server and its exit code.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from mpmm.interpreter.fork_hooks import close_in_children, fork_guard
from mpmm.multi_process_shared.forkserver.leftovers import PER_PROCESS_VARIABLES
from mpmm.multi_process_shared.rpc import sockets
from mpmm.multi_process_shared.server_process import ServerPlan

__all__ = [
    *("BACK", "BORN", "CONVERSATION_TIMEOUT_S", "ENDED", "FORK", "IDLE", "IMPORT", "IMPORTED", "READ", "READY"),
    *("REFUSED", "RETIRE", "UNFORKABLE", "WAIT", "Descriptor", "ForkOrder", "Kind", "Order", "hand_over", "receive"),
    *("receive_descriptors", "send", "take_over"),
]

# Reports on the connection of an order, each with a number: the server's pid, its exit code, nothing yet.
BORN, ENDED, WAIT = "born", "ended", "wait"
# Messages to a template, and messages from it.
IMPORT, FORK, RETIRE = "import", "fork", "retire"
READY, IDLE, UNFORKABLE, REFUSED = "ready", "idle", "unforkable", "refused"
READ, IMPORTED, BACK = "read", "imported", "back"

CONVERSATION_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ForkOrder:
    """An order for a server in an environment like the requester's.

    preparation: of `multiprocessing.spawn`, for `__main__` and the like. preload_hooks: "module:function" each.
    Three descriptors follow it: for the server's report, its standard output and its standard error.
    """

    plan: ServerPlan
    preparation: dict[str, Any]
    environment: dict[str, str]
    preload_hooks: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """The common properties of the orders that one template can serve."""

    sys_path: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    preload_hooks: tuple[str, ...]
    directory: str
    arguments: tuple[str, ...]
    # Those of PER_PROCESS_VARIABLES that an import has read, with their values.
    pinned: tuple[tuple[str, str | None], ...] = ()


class Descriptor:
    """A descriptor that is closed in forked children."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        close_in_children(self)

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        with fork_guard:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


@dataclass
class Order:
    """An order being passed on: its message as received, its connection and its descriptors."""

    message: bytes
    requester: Connection
    descriptors: list[Descriptor]
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.order: ForkOrder = pickle.loads(self.message)

    @property
    def environment(self) -> dict[str, str]:
        """The environment that the server's imports find."""
        return self.order.plan.environment_in(self.order.environment)

    @property
    def kind(self) -> Kind:
        """The kind of order, as long as no import has read a variable that differs from server to server."""
        relevant = sorted(item for item in self.environment.items() if not PER_PROCESS_VARIABLES.fullmatch(item[0]))
        preparation = self.order.preparation
        directory = preparation["dir"] or "/"
        sys_path = tuple(os.path.join(directory, entry) for entry in preparation["sys_path"])
        return Kind(
            sys_path, tuple(relevant), self.order.preload_hooks, directory, tuple(map(str, preparation["sys_argv"]))
        )

    def close(self) -> None:
        self.requester.close()
        for descriptor in self.descriptors:
            descriptor.close()


def send(connection: Connection, what: str, number: int) -> None:
    """Send a word and a number. Raises OSError."""
    connection.send_bytes(json.dumps([what, number]).encode())


def receive(connection: Connection) -> tuple[str, int]:
    """Receive a word and a number. Raises EOFError, OSError."""
    what, number = json.loads(connection.recv_bytes())
    return what, number


def hand_over(link: Connection, what: str, order: Order) -> None:
    """Pass on an order, from zygote to template or back. Raises OSError; then this process still has it."""
    link.send((what, order.message))
    with sockets.duplicate(link.fileno()) as ours:
        fds = [order.requester.fileno(), *(descriptor.fd for descriptor in order.descriptors)]
        socket.send_fds(ours, [b"!"], fds, sockets.NO_SIGNAL)
    order.close()


def take_over(link: Connection, message: bytes) -> Order:
    """Receive the rest of an order that is passed on. Raises EOFError, OSError."""
    with fork_guard:
        first, *descriptors = receive_descriptors(link, 4)
        requester = close_in_children(sockets.ForkSafeConnection(os.dup(first.fd)))
        first.close()
    return Order(message, requester, descriptors)


def receive_descriptors(connection: Connection, count: int) -> list[Descriptor]:
    with sockets.duplicate(connection.fileno()) as ours, fork_guard:
        _, fds, _, _ = socket.recv_fds(ours, 1, count)
        descriptors = [Descriptor(fd) for fd in fds]
    if len(descriptors) != count:
        for descriptor in descriptors:
            descriptor.close()
        raise EOFError
    return descriptors
