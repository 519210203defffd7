"""Unix sockets between processes of one user.

Three things keep others out: the folder is 0700, the kernel names the peer's user, and both sides prove
that they know the registry's key. A process of the same user that connects to the wrong registry fails at the third.

The proof is a mutual challenge after ISO/IEC 9798-4 (three passes). N are NONCE_BYTES bytes, the protocol's version and
then random ones, so that two processes of different versions both notice and say so; MAC is keyed BLAKE2b (RFC 7693),
which a new process can use at once, while the first HMAC of OpenSSL costs it half a millisecond:

    client   Nc
    server   Ns, MAC(key, "server" Nc Ns)
    client   MAC(key, "client" Nc Ns)      and then, without waiting, its first request

Fresh nonces prevent recorded answers from being replayed, the roles' names prevent a side's own answers from being
sent back to it. The server reads nothing else before the client's MAC is right. (`multiprocessing.connection` has a
challenge, too, once in each direction: the client would wait for the server to be scheduled three times, not once.)
"""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mpmm.interpreter.fork_hooks import close_in_children, closing_guard, fork_guard
from mpmm.interpreter.standard_descriptors import keep_standard_descriptors

__all__ = [
    *("NO_SIGNAL", "ForkSafeSocket", "accept", "authenticate_client", "dial", "dial_socket", "handshake", "listen"),
    *("listen_at", "message_in_steps", "peer_pid", "peer_uid", "pid_at", "set_timeouts"),
]

# sun_path holds 108 bytes on Linux and 104 on macOS, with a final zero.
LONGEST_ADDRESS_BYTES = 100
BACKLOG = 128
NONCE_BYTES = 32
#: The version of the messages after the handshake. It rises with every change that an older peer would misread.
PROTOCOL_VERSION = 3
_VERSION = struct.Struct(">H")
PROOF_BYTES = 32
# How `multiprocessing` begins a message: with its size, or, from 2 GiB on, with -1 and then the size.
_SIZE, _LARGE_SIZE = struct.Struct("!i"), struct.Struct("!Q")
# A peer that says that a message is large has not sent it yet.
MOST_AT_ONCE_BYTES = 1 << 20
# A client proves that it knows the key in a millisecond, unless it is stopped, or the machine has no processor for it.
HANDSHAKE_TIMEOUT_S = 30.0
# With it, sending to a peer that is gone is an error and no SIGPIPE, which ends programs that have its default action.
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_HAS_PROC = sys.platform == "linux"


class ForkSafeSocket(socket.socket):
    """A socket that is never half closed at a fork: a child would keep a descriptor that the object has forgotten.

    It has no time limit, because a program's `socket.setdefaulttimeout` is meant for the program's own sockets.
    """

    def __init__(self, family: int = -1, kind: int = -1, *, fileno: int | None = None) -> None:
        if fileno is None:
            keep_standard_descriptors()
        super().__init__(family, kind, fileno=fileno)
        if self.gettimeout() is not None:
            self.settimeout(None)

    def close(self) -> None:
        """Close the socket under the guard."""
        with closing_guard():
            super().close()


class ForkSafeConnection(Connection):
    """A connection that is never half closed at a fork: a child would close a number that belongs to another file."""

    def _send(self, buf: Any, write: object = None) -> None:
        """Send all of `buf` with NO_SIGNAL; `multiprocessing` would write to the socket as to a file."""
        with duplicate(self.fileno()) as ours:
            ours.sendall(buf, NO_SIGNAL)

    def close(self) -> None:
        """Close the connection under the guard."""
        with closing_guard():
            super().close()


def listen(folder: str | Path, name: str) -> socket.socket:
    """Return a non-blocking listening socket at `folder/name`, closed in forked children."""
    with _short_address(folder, name) as address:
        return listen_at(address)


def listen_at(address: str | bytes) -> ForkSafeSocket:
    """Return a non-blocking listening socket at a path or an abstract address, closed in forked children.

    Raises OSError.
    """
    with fork_guard:
        listener = close_in_children(ForkSafeSocket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets, closed in forked children."""
    with fork_guard:
        keep_standard_descriptors()
        one, other = socket.socketpair()
        return (
            close_in_children(ForkSafeSocket(fileno=one.detach())),
            close_in_children(ForkSafeSocket(fileno=other.detach())),
        )


def accept(listener: socket.socket) -> Connection | None:
    """Return the next connection, not authenticated yet, or None if the peer is gone already."""
    # Non-blocking, so that the guard, and with it every fork of this process, is held for microseconds.
    with fork_guard:
        keep_standard_descriptors()
        try:
            peer, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return None
        peer.setblocking(True)
        return close_in_children(ForkSafeConnection(peer.detach()))


def authenticate_client(connection: Connection, key: bytes) -> None:
    """Make sure, on the server's side, that the peer belongs to this user and knows `key`.

    Raises AuthenticationError; EOFError or OSError if the peer hangs up, or has proved nothing after
    HANDSHAKE_TIMEOUT_S: a process that merely connects must not hold a thread for as long as it likes.
    """
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
    for _ in handshake(connection, key):
        if not wait([connection], max(0.0, deadline - time.monotonic())):
            raise TimeoutError("the client does not answer")


def handshake(connection: Connection, key: bytes) -> Iterator[None]:
    """Do what `authenticate_client` does, in steps: the caller resumes it each time that there is more to read.

    Raises AuthenticationError, EOFError, OSError.
    """
    uid = peer_uid(connection.fileno())
    if uid is not None and uid != os.getuid():
        raise AuthenticationError(f"a process of uid {uid} tried to connect")
    with duplicate(connection.fileno()) as peer:
        client_nonce = yield from _receive_in_steps(peer, NONCE_BYTES)
        server_nonce = _nonce()
        peer.sendall(server_nonce + _proof(key, b"server", client_nonce, server_nonce), NO_SIGNAL)
        # Checked after this side's nonce is sent, so that the client notices as well.
        _expect_version("client", client_nonce)
        proof = yield from _receive_in_steps(peer, PROOF_BYTES)
        if not hmac.compare_digest(proof, _proof(key, b"client", client_nonce, server_nonce)):
            raise AuthenticationError("the client does not know the key")


def dial(folder: str | Path, name: str, key: bytes, timeout_seconds: float | None = None) -> Connection:
    """Return an authenticated connection to the socket `folder/name`, closed in forked children.

    timeout_seconds: how long to wait for each message of a server that may be stopped; None: forever.
    Raises AuthenticationError if the server has another key, OSError or EOFError if there is no server.
    """
    ours = dial_socket(folder, name, key, timeout_seconds)
    with fork_guard:
        return close_in_children(ForkSafeConnection(ours.detach()))


def dial_socket(folder: str | Path, name: str, key: bytes, timeout_seconds: float | None = None) -> ForkSafeSocket:
    """Do what `dial` does, and return the socket."""
    with fork_guard:
        ours = close_in_children(ForkSafeSocket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        if timeout_seconds is not None:
            # Before connecting, because the queue of a stopped server is full sooner or later.
            set_timeouts(ours, timeout_seconds)
        with _short_address(folder, name) as address:
            ours.connect(address)
        _prove_to_server(ours, key)
    except BaseException:
        ours.close()
        raise
    return ours


def pid_at(folder: str | Path, name: str, timeout_seconds: float) -> int | None:
    """Return the pid of the process that listens at the socket `folder/name`, stopped or not; None if not known.

    Raises OSError if there is no such process.
    """
    with fork_guard:
        ours = close_in_children(ForkSafeSocket(socket.AF_UNIX, socket.SOCK_STREAM))
    with ours:
        set_timeouts(ours, timeout_seconds)
        with _short_address(folder, name) as address:
            ours.connect(address)
        return peer_pid(ours.fileno())


def _prove_to_server(server: socket.socket, key: bytes) -> None:
    client_nonce = _nonce()
    server.sendall(client_nonce, NO_SIGNAL)
    answer = _receive(server, NONCE_BYTES + PROOF_BYTES)
    server_nonce, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    _expect_version("server", server_nonce)
    if not hmac.compare_digest(proof, _proof(key, b"server", client_nonce, server_nonce)):
        raise AuthenticationError("the server does not know the key")
    server.sendall(_proof(key, b"client", client_nonce, server_nonce), NO_SIGNAL)


def _nonce() -> bytes:
    """Return bytes that no handshake has used before, starting with the version of the protocol."""
    return _VERSION.pack(PROTOCOL_VERSION) + os.urandom(NONCE_BYTES - _VERSION.size)


def _expect_version(whose: str, nonce: bytes) -> None:
    """Raise AuthenticationError if the peer, the server or the client, speaks another version of the protocol."""
    (found,) = _VERSION.unpack_from(nonce)
    if found != PROTOCOL_VERSION:
        raise AuthenticationError(
            f"the {whose} speaks version {found} of the protocol, this process version {PROTOCOL_VERSION}: they run "
            "different versions of mpmm; end the processes of one of them, or choose another runtime directory"
        )


def _proof(key: bytes, role: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    return hashlib.blake2b(role + client_nonce + server_nonce, key=key, digest_size=PROOF_BYTES).digest()


def duplicate(fd: int) -> socket.socket:
    """Return another socket object for an open socket, to be closed by the caller; closed in forked children."""
    with fork_guard:
        return close_in_children(ForkSafeSocket(fileno=os.dup(fd)))


def _receive(peer: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes. Raises EOFError, OSError."""
    received = b""
    while len(received) < count:
        part = peer.recv(count - len(received))
        if not part:
            raise EOFError
        received += part
    return received


def message_in_steps(connection: Connection) -> Generator[None, None, bytes]:
    """Do what `Connection.recv_bytes` does, in steps: the caller resumes it each time that there is more to read.

    Raises EOFError, OSError.
    """
    with duplicate(connection.fileno()) as peer:
        (size,) = _SIZE.unpack((yield from _receive_in_steps(peer, _SIZE.size)))
        if size == -1:
            (size,) = _LARGE_SIZE.unpack((yield from _receive_in_steps(peer, _LARGE_SIZE.size)))
        return (yield from _receive_in_steps(peer, size))


def _receive_in_steps(peer: socket.socket, count: int) -> Generator[None, None, bytes]:
    """Do what `_receive` does; yields before each part is read."""
    received = bytearray()
    while len(received) < count:
        yield
        part = peer.recv(min(count - len(received), MOST_AT_ONCE_BYTES))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


def set_timeouts(connection: Connection | socket.socket, timeout_seconds: float) -> None:
    """Have reads and writes fail with OSError after this time if the other side is stopped or stuck."""
    timeval = struct.pack("@ll", int(timeout_seconds), int(timeout_seconds % 1 * 1_000_000))
    with duplicate(connection.fileno()) as ours:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, timeval)


def peer_uid(fd: int) -> int | None:
    """Return the user at the other end of a Unix socket, or None if the platform does not tell."""
    credentials = _peer_credentials(fd)
    return None if credentials is None else credentials[1]


def peer_pid(fd: int) -> int | None:
    """Return the pid at the other end of a Unix socket, or None if the kernel does not tell."""
    credentials = _peer_credentials(fd)
    return credentials[0] or None if credentials is not None else None


def _peer_credentials(fd: int) -> tuple[int, int, int] | None:
    """Return pid, uid and gid of the other end of a Unix socket; pid 0: it is in a pid namespace not visible here."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    credentials = struct.Struct("3i")
    with duplicate(fd) as peer:
        pid, uid, gid = credentials.unpack(peer.getsockopt(socket.SOL_SOCKET, option, credentials.size))
    return pid, uid, gid


@contextmanager
def _short_address(folder: str | Path, name: str) -> Iterator[str]:
    """Yield an address that leads to `folder/name` and fits into a `sockaddr_un`; valid inside the block."""
    plain = os.path.join(folder, name)
    if len(os.fsencode(plain)) <= LONGEST_ADDRESS_BYTES:
        yield plain
    elif _HAS_PROC:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{fd}/{name}"
        finally:
            os.close(fd)
    else:
        # /tmp and not gettempdir(): on macOS the latter has some 50 bytes by itself.
        detour = tempfile.mkdtemp(prefix="mpmm-", dir="/tmp")
        try:
            link = os.path.join(detour, "d")
            os.symlink(folder, link)
            yield os.path.join(link, name)
        finally:
            shutil.rmtree(detour, ignore_errors=True)
