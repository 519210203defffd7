"""The address that a server of ours listens on, from what the user has typed."""

from __future__ import annotations

import socket
from typing import Any

from mpmm.text.arguments import in_brief

__all__ = ["Address", "first_address"]

#: One element of what `socket.getaddrinfo` returns.
Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]


def first_address(host: str, port: int) -> Address:
    """Return the first address of a host. Raises OSError, also for a text that cannot be the name of a host."""
    try:
        if "\0" in host:
            # The C library would take what is before it for the name.
            raise ValueError("a null character")
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except ValueError as error:
        # UnicodeError is one: an empty or too long part of the name, or half of a surrogate pair.
        raise OSError(f"{in_brief(host)} is no name of a host: {error}") from None
