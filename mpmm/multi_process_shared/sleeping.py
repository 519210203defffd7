"""Shared objects that can sleep: their `sleep()` frees the memory of a device, their `wake_up()` takes it again."""

from __future__ import annotations

from contextlib import closing
from multiprocessing import AuthenticationError
from typing import Any

from mpmm.errors import ModelServerError
from mpmm.multi_process_shared.host import can_sleep
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.registry import ServerRecord, registry_for
from mpmm.multi_process_shared.rpc import protocol, sockets
from mpmm.multi_process_shared.rpc.channel import Channel

__all__ = ["ask_to", "can_sleep", "record_of"]


def record_of(tag: str) -> ServerRecord | None:
    """Return the record of a tag's server; None if there is none."""
    return registry_for(None).find(tag)[1]


def ask_to(request: str, tag: str, pid: int | None = None) -> Any:
    """Have a tag's object sleep (`protocol.SLEEP`) or wake up (`protocol.WAKE_UP`), and return once it has.

    Does nothing if it already has. pid: if given, only a server with this pid is asked.

    Raises what the object's method raises, and ModelServerError if there is no such server, or it ends meanwhile.
    """
    registry = registry_for(None)
    host = find_host(registry, tag)
    if host is not None:
        return host.sleep() if request == protocol.SLEEP else host.wake_up()
    _, record = registry.find(tag)
    if record is None or pid not in (None, record.pid):
        raise ModelServerError(f"there is no server of {tag!r} to ask to {request}", tag=tag, server_pid=pid)
    registry.join()
    registry.restore_socket(record)
    try:
        with closing(Channel(sockets.dial_socket(registry.path, record.socket_name, registry.key()))) as channel:
            channel.send(protocol.encode_request(protocol.CONTROL, request, (), {}))
            return protocol.decode_answer(channel.receive(), tag, request)
    except (AuthenticationError, EOFError, OSError) as error:
        raise ModelServerError(
            f"the server of {tag!r} (pid {record.pid}) ended before it had answered {request}: {error!r}",
            tag=tag,
            server_pid=record.pid,
        ) from error
