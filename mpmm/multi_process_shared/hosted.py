"""The hosts of this process: which shared objects it serves itself, by registry and tag.

Apart from `host`, so that `references` can look up an object that arrives from a server without importing `host`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpmm.interpreter.fork_hooks import in_forked_child

if TYPE_CHECKING:
    from mpmm.multi_process_shared.host import Host
    from mpmm.multi_process_shared.registry import ServerRegistry

__all__ = ["add", "every_host", "find_host", "remove"]

# Read and changed by single steps only, which need no lock: a signal handler might wait for it in its own thread.
_hosts: dict[tuple[ServerRegistry, str], Host] = {}
_inherited: list[Host] = []


def find_host(registry: ServerRegistry, tag: str) -> Host | None:
    """Return this process's host of the tag, None if it has none."""
    return _hosts.get((registry, tag))


def add(host: Host) -> None:
    """Note that a host now serves its tag."""
    _hosts[host.registry, host.tag] = host


def remove(host: Host) -> None:
    """Forget a host that no longer serves its tag."""
    _hosts.pop((host.registry, host.tag), None)


def every_host() -> list[Host]:
    """Return the hosts of this process."""
    return list(_hosts.values())


def _start_over_in_child() -> None:
    """Forget the parent's hosts but keep the copies referenced: destroying them would touch what both share."""
    for host in _hosts.values():
        host.forget_after_fork()
        _inherited.append(host)
    _hosts.clear()


in_forked_child(_start_over_in_child)
