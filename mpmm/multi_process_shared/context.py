"""The context in which a shared object is made: for which managers, and where it may attach.

Both are context variables, because the code between the caller that sets them (a manager, a `MultiProcessShared`)
and the code that reads them (a spawn, an object's `__init__`) is not ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mpmm.interpreter.block_variable import BlockVariable

__all__ = ["ServerContext", "attach_namespace", "attaching_to", "served_namespaces", "server_contexts", "serving_for"]

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


_contexts: BlockVariable[tuple[ServerContext, ...]] = BlockVariable("mpmm_server_contexts")
_attach_namespace: BlockVariable[tuple[str, Path]] = BlockVariable("mpmm_attach_namespace")


def serving_for(*contexts: ServerContext) -> AbstractContextManager[None]:
    """Give `contexts`, after those of outer blocks, to every model server that is started inside the block."""
    return _contexts.set_inside(contexts)


def server_contexts() -> tuple[ServerContext, ...]:
    """Return what to give to a model server that is started now."""
    return tuple(context for contexts in _contexts.all() for context in contexts)


def served_namespaces() -> tuple[str, ...]:
    """Return the namespaces that a server started now would serve: those of the loader that runs here."""
    return tuple(context.namespace for context in server_contexts() if context.namespace)


def attaching_to(tag: str, root: Path) -> AbstractContextManager[None]:
    """Tell objects that are made inside the block which namespace, below `root`, stands for `tag`."""
    return _attach_namespace.set_inside((namespace_of(tag), root))


def attach_namespace() -> tuple[str, Path] | None:
    """Return the namespace to which an object that is made now may attach, and its root; None if there is none."""
    return _attach_namespace.innermost()


def namespace_of(tag: str) -> str:
    """Return the namespace's name: `mps.<tag>`, with a digest if the tag does not fit into a name unchanged."""
    name = "mps." + re.sub(r"[^A-Za-z0-9_.-]", "_", tag)
    if name == "mps." + tag and len(name) <= _NAMESPACE_LENGTH:
        return name
    digest = hashlib.sha256(tag.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{name[: _NAMESPACE_LENGTH - 13]}.{digest}"
