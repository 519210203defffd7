"""Shared objects that can sleep: those with `sleep()` and `wake_up()`, which let go of a device and take it again."""

from __future__ import annotations

from contextlib import closing
from multiprocessing import AuthenticationError
from typing import Any

from mpmm.errors import ModelServerError
from mpmm.proxy import transport, wire
from mpmm.proxy.channel import Channel
from mpmm.proxy.hosting import can_sleep, find_host
from mpmm.proxy.room import ServerRecord, room_for

__all__ = ["ask_to", "can_sleep", "record_of"]


def record_of(tag: str) -> ServerRecord | None:
    """Return what a tag's server says of itself; None if there is none."""
    lives, record = room_for(None).look(tag)
    return record if lives else None


def ask_to(request: str, tag: str, pid: int | None = None) -> Any:
    """Have the object of a tag sleep (`wire.SLEEP`) or wake up (`wire.WAKE_UP`), and return once it does.

    Nothing happens to one that does so already. pid: if given, only a server of this pid is meant.

    Raises what the object's method raises, and ModelServerError when there is no such server, or it ends meanwhile.
    """
    room = room_for(None)
    host = find_host(room, tag)
    if host is not None:
        return host.sleep() if request == wire.SLEEP else host.wake_up()
    lives, record = room.look(tag)
    if not lives or record is None or pid not in (None, record.pid):
        raise ModelServerError(f"there is no server of {tag!r} to ask to {request}", tag=tag, server_pid=pid)
    room.join()
    try:
        with closing(Channel(transport.dial(room.path, record.socket_name, room.key()))) as channel:
            channel.send(wire.encode_request(wire.CONTROL, request, (), {}))
            return wire.decode_answer(channel.receive(), tag, request)
    except (AuthenticationError, EOFError, OSError) as error:
        raise ModelServerError(
            f"the server of {tag!r} (pid {record.pid}) ended before it had answered {request}: {error!r}",
            tag=tag,
            server_pid=record.pid,
        ) from error
