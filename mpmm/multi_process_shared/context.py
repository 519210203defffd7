"""The context in which a shared object is made: for which managers, and where it may attach.

Both are context variables, because the code between the caller that sets them (a manager, a `MultiProcessShared`)
and the code that reads them (a spawn, an object's `__init__`) is not ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ServerContext", "attach_namespace", "attaching_to", "served_namespaces", "server_context", "serving_for"]

_NAMESPACE_LENGTH = 64


@dataclass(frozen=True)
class ServerContext:
    """What a new model server needs to know about the manager that starts it. Must be picklable.

    alive_lock: path of a lock file that each client holds shared; the server lives while any process holds it.
    environment: set in `os.environ`, or removed from it (None), before any code of the constructor is imported or run.
    on_start: called in the server with the tag, before the constructor; the result is kept while the server lives.
    namespace: the namespace that the manager is a member of, "" for none. A server with a namespace is a handle's: see
        `MultiProcessShared.acquire`.
    on_last: called in the server before it ends, for any reason, if no process holds `alive_lock` then. Several
        servers may call it, even at the same time, and new processes may take the lock meanwhile.
    """

    alive_lock: str
    environment: tuple[tuple[str, str | None], ...] = ()
    on_start: Callable[[str], object] | None = None
    on_last: Callable[[], None] | None = None
    namespace: str = ""


server_context: ContextVar[tuple[ServerContext, ...]] = ContextVar("mpmm_server_context", default=())
attach_namespace: ContextVar[tuple[str, Path] | None] = ContextVar("mpmm_attach_namespace", default=None)


@contextmanager
def serving_for(*contexts: ServerContext) -> Iterator[None]:
    """Give `contexts`, after those of outer blocks, to every model server that is started inside the block."""
    reset = server_context.set(server_context.get() + contexts)
    try:
        yield
    finally:
        server_context.reset(reset)


def served_namespaces() -> tuple[str, ...]:
    """Return the namespaces that a server started now would serve: those of the loader that runs here."""
    return tuple(context.namespace for context in server_context.get() if context.namespace)


@contextmanager
def attaching_to(tag: str, root: Path) -> Iterator[None]:
    """Tell objects that are made inside the block which namespace, below `root`, stands for `tag`."""
    reset = attach_namespace.set((namespace_of(tag), root))
    try:
        yield
    finally:
        attach_namespace.reset(reset)


def namespace_of(tag: str) -> str:
    """Return the namespace's name: `mps.<tag>`, with a digest if the tag does not fit into a name unchanged."""
    name = "mps." + re.sub(r"[^A-Za-z0-9_.-]", "_", tag)
    if name == "mps." + tag and len(name) <= _NAMESPACE_LENGTH:
        return name
    digest = hashlib.sha256(tag.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{name[: _NAMESPACE_LENGTH - 13]}.{digest}"
