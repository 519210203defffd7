"""The start and the end of a model server: it joins the namespace of the process that started it, and cleans up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mpmm.errors import LockTimeoutError, MpmmError, ServerStartError
from mpmm.memory.placement import SHARE_VARIABLES, Placement, place_for_good, with_share
from mpmm.multi_process_shared.context import ServerContext
from mpmm.shared_state.layout import Instance, Member
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.removal import remove_deserted
from mpmm.sources import MemorySource
from mpmm.sources.visible_devices import server_setting
from mpmm.text.printable import printable_logger

__all__ = ["ServerDuty", "server_context"]

_LOG = printable_logger("mpmm")


@dataclass(frozen=True)
class ServerDuty:
    """The first task of a new model server: to join the namespace, and tie itself to the copy it is about to hold."""

    root: str
    name: str
    row: int
    generation: int
    placement: Placement

    def __call__(self, tag: str) -> Namespace | None:
        """Return the server's membership, or None if the namespace is already gone.

        Raises ServerStartError if the load is over: then no process would use the server.
        """
        try:
            namespace = self._join(tag)
            if namespace is not None:
                self._link(namespace, tag)
                place_for_good(self.placement)
        except LockTimeoutError as error:
            # The namespace would not know the server, which would live on if its loader died now.
            raise ServerStartError(f"the server of {tag!r} cannot join its namespace: {error}", tag=tag) from error
        return namespace

    def _join(self, tag: str) -> Namespace | None:
        try:
            return Namespace.join(self.name, root=Path(self.root), kind=Member.SERVER, label=tag, must_exist=True)
        except LockTimeoutError:
            raise
        except (FileNotFoundError, MpmmError) as error:
            _LOG.warning("mpmm: the server of %s cannot join its namespace: %s", tag, error)
            return None

    def _link(self, namespace: Namespace, tag: str) -> None:
        """Tie this process to the copy, or leave. Raises ServerStartError if the load is over."""
        instance = namespace.tables.instances[self.row]
        try:
            # The load has been granted, and its process started: a lock that is taken for seconds is no reason to stop.
            with namespace.lock.patient_here(), namespace.transaction() as t:
                if instance.state != Instance.LOADING or instance.generation != self.generation:
                    # Its loader died or was reset meanwhile. No row would ever name this server, so it would live for
                    # ever.
                    raise ServerStartError(f"the load for which the server of {tag!r} was started is over", tag=tag)
                namespace.transitions.loads.link_server(t, self.row, namespace.slot)
        except BaseException:
            namespace.leave()
            raise


@dataclass(frozen=True)
class _Farewell:
    """The last task of the last model server, if no worker is left."""

    root: str
    name: str

    def __call__(self) -> None:
        remove_deserted(Path(self.root), self.name)


def server_context(
    namespace: Namespace, source: MemorySource, placement: Placement, row: int, *, tells_share: bool
) -> ServerContext:
    """Return what a model server that the loader of `row` starts has to know.

    tells_share: its environment also says which share of the memory it has.
    """
    place = (str(namespace.runtime.root), namespace.name)
    generation = namespace.tables.instances[row].generation
    uuids = placement.uuids
    setting = server_setting(source, uuids)
    # The server sees only these devices, so CUDA and HIP count them from 0.
    if setting:
        placement = replace(placement, indices=tuple(range(len(uuids))))
    # Unknown figures are removed, so that those of an enclosing share are not taken for this server's.
    share = {**dict.fromkeys(SHARE_VARIABLES), **with_share({}, placement.environment())} if tells_share else {}
    return ServerContext(
        alive_lock=str(namespace.runtime.file("alive.lock")),
        namespace=namespace.name,
        environment=(*((setting,) if setting else ()), *share.items()),
        on_start=ServerDuty(*place, row, generation, placement),
        # A manager in a server may still be there when no worker is left.
        on_last=None if namespace.kind == Member.GUEST else _Farewell(*place),
    )
