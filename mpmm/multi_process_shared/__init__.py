"""One object in one process, used by many processes, as in Beam's module of this name: `MultiProcessShared`.

The public names are imported at their first use: a new server process needs only a few modules of this package, and
should start without the others.

Which process starts and calls which; arrows are calls, and every file named here is in the registry's folder:

    MultiProcessShared --(tag lock)--> start_server --(zygote) fork--> server_process --> Host --life lock, socket-->
           |                                                                       ^
           +--> SharedProxy --> ServerLink ----------- one connection a thread----+

    shared          MultiProcessShared, its proxies, and the objects that are attached in place
    registry        folder, key, which processes are clients (alive lock), which servers live (life locks)
    host            the object with its users, and the threads that answer them; `hosted`: the hosts of this process
    server_process  a server's process from its first line to its last; `output` is where it writes to
    start_server    starts a server, forked if possible and else spawned; `stop_server` ends one
    spawned_server  a server in an interpreter of its own
    client          connections to a server, kept per thread
    references      results that stay in the server, and their stand-ins in clients
    sleeping        asks a server to put its object to sleep, or to wake it up
    identity        checks that a tag stands for the object that is meant
    main_import     what must not be done while a server imports the main module
    context         what a manager passes to the servers that it starts

    rpc             messages between two processes that have authenticated each other
      sockets         addresses of any length, keys, the peer's user
      channel         messages on such a socket, large buffers through shared memory
      shared_buffer   the shared memory through which large buffers are sent
      receive_buffers private memory into which they are received
      pickling        large buffers beside the pickle, a short pickle for the rest
      protocol        what is sent: requests, results, exceptions

    forkserver      the warm processes from which servers are forked
      client          orders a server, and represents it as a child process
      orders          what an order is, and how it is passed from process to process
      zygote          the process that takes orders; it forks templates and servers
      template        a fork of the zygote that imports what servers of one kind need
      fork_parent     what these two have in common: forking servers, reporting their exit codes
      leftovers       what an import leaves behind besides code, and how forked servers deal with it
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpmm.multi_process_shared.client import ServerLink as _SingletonRegistrar  # noqa: F401  # Beam's name for it
    from mpmm.multi_process_shared.shared import MultiProcessShared, SharedProxy, server_pid, unload

__all__ = ["MultiProcessShared", "SharedProxy", "server_pid", "unload"]

# Names of Beam that tests use. Its key is the same in every process; ours is random, so nothing depends on this one.
AUTH_KEY = b"mps"

_HOMES = {
    "MultiProcessShared": ("mpmm.multi_process_shared.shared", "MultiProcessShared"),
    "SharedProxy": ("mpmm.multi_process_shared.shared", "SharedProxy"),
    "_SingletonRegistrar": ("mpmm.multi_process_shared.client", "ServerLink"),
    "server_pid": ("mpmm.multi_process_shared.shared", "server_pid"),
    "unload": ("mpmm.multi_process_shared.shared", "unload"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name the API, with what is imported at its first use."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
