"""Orders for servers, and how they go from a requester to the zygote and on to a template.

An order is a pickled `ForkOrder`, followed by three descriptors. The process that has it keeps the requester's
connection, on which it says the pid of the server and its exit code.
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
    *("RETIRE", "UNFORKABLE", "WAIT", "Descriptor", "ForkOrder", "Kind", "Order", "hand_over", "receive"),
    *("receive_descriptors", "send", "take_over"),
]

# What is said on the connection of an order, each with a number: the server's pid, its exit code, nothing yet.
BORN, ENDED, WAIT = "born", "ended", "wait"
# What a template is told and says.
IMPORT, FORK, RETIRE = "import", "fork", "retire"
READY, IDLE, UNFORKABLE, READ, IMPORTED, BACK = "ready", "idle", "unforkable", "read", "imported", "back"

CONVERSATION_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ForkOrder:
    """What a requester wants: a server, in surroundings like its own.

    preparation: of `multiprocessing.spawn`, for `__main__` and the like. preload_hooks: "module:function" each.
    With it come three descriptors: where the server reports, its standard output and standard error.
    """

    plan: ServerPlan
    preparation: dict[str, Any]
    environment: dict[str, str]
    preload_hooks: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """What orders have in common that one template can serve."""

    sys_path: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    preload_hooks: tuple[str, ...]
    directory: str
    arguments: tuple[str, ...]
    # Of PER_PROCESS_VARIABLES those, with their values, that an import has looked at.
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
    """An order on its way: as it came, with its connection and descriptors."""

    message: bytes
    requester: Connection
    descriptors: list[Descriptor]
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.order: ForkOrder = pickle.loads(self.message)

    @property
    def environment(self) -> dict[str, str]:
        """What the server's imports find."""
        return self.order.plan.environment_in(self.order.environment)

    @property
    def kind(self) -> Kind:
        """The kind of order, as long as no import has looked at what differs from server to server."""
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
    """Give away an order, from zygote to template or back. Raises OSError; then it is still ours."""
    link.send((what, order.message))
    with sockets.duplicate(link.fileno()) as ours:
        fds = [order.requester.fileno(), *(descriptor.fd for descriptor in order.descriptors)]
        socket.send_fds(ours, [b"!"], fds, sockets.NO_SIGNAL)
    order.close()


def take_over(link: Connection, message: bytes) -> Order:
    """Receive the rest of an order that is given away. Raises EOFError, OSError."""
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
