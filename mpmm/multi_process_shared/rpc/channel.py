"""A channel: messages, small or large, over one authenticated connection.

The two sides take turns, like a request and its answer, so at any moment one of them sends and the other
receives. A message is a pickle, its head, and the large buffers that were left out of it (`rpc.pickling`):

    frame   length of the head (4 bytes), number of buffers (4), their sizes (8 each), the head
    bulk    the bytes of the buffers, if there are any

A head of LARGE_BYTES or more travels as the first buffer, and its length in the frame is 0. A small message is
one system call on each side.

The bulk begins with single bytes that agree on how it is sent:

    receiver  HAVE or LACK      whether it has the shared buffer of this connection (`rpc.shared_buffer`)
    sender    FILLED            both have it: this was the first slot, see below
              OFFER             with the descriptor of a new one; the receiver sends HAVE or LACK once more
              PLAIN             no shared buffer: the bytes follow as they are

With a shared buffer, the bulk is cut into pieces that fit into a slot; the slots are used in turn. The sender writes
to a slot and then sends FILLED; the receiver copies the slot's bytes and then sends EMPTIED, unless the sender will
not need that slot again in this message, and READ once it has copied all of them. The sender owns a slot from the
beginning of the message to FILLED and from EMPTIED on, the receiver in between and until READ. Both copy at the same
time, each on a processor of its own.

A side that dies or fails half-way closes the socket, which the other side notices at its next byte; the contents of the
slots are dropped with the shared buffer. A channel that failed, or was interrupted, must not be used again.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

from mpmm.interpreter.fork_hooks import close_in_children, closing_guard, fork_guard
from mpmm.multi_process_shared.rpc.receive_buffers import drop_spare_slabs, receive_memory
from mpmm.multi_process_shared.rpc.shared_buffer import (
    SLOT_BYTES,
    SLOTS,
    SharedBuffer,
    create_shared_buffer,
    cut_into_slots,
)
from mpmm.multi_process_shared.rpc.sockets import NO_SIGNAL, ForkSafeSocket

__all__ = ["LARGE_BYTES", "Channel", "Message"]

# A single buffer of 64 KiB takes 0.10 ms there and back as a bulk and 0.06 in the pickle, one of 256 KiB 0.13 and 0.16,
# but 32 of 100 KiB take 4.0 ms and 8.7.
LARGE_BYTES = 1 << 16
# How long memory for the next large payload is kept after the last message.
IDLE_MS = 10_000

_FRAME = struct.Struct("<II")
_SIZE_BYTES = 8
# Memory for frames: at first enough for small messages, later for the largest one without a bulk so far.
_FIRST_KEPT_BYTES = 4096
_MOST_KEPT_BYTES = LARGE_BYTES + _FRAME.size
HAVE, LACK, OFFER, PLAIN, FILLED, EMPTIED, READ = b"h", b"l", b"o", b"p", b"f", b"e", b"r"
_RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Message(NamedTuple):
    """A pickle and the buffers that are not in it, each a flat view of bytes."""

    head: bytes | memoryview
    buffers: Sequence[memoryview] = ()


class Channel:
    """One side of a connection. Used by one thread at a time; closed in forked children."""

    def __init__(self, line: ForkSafeSocket | Connection) -> None:
        """Take over an authenticated socket, which children close already, or a connection, which is closed."""
        if isinstance(line, ForkSafeSocket):
            self._socket = line
        else:
            with fork_guard, line:
                self._socket = ForkSafeSocket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(line.fileno()))
                close_in_children(self)
        self._shared_buffer: SharedBuffer | None = None
        self._refused = False
        # READ is still to come: the other side may be copying what was sent to it through the shared buffer.
        self._being_read = False
        #: Whether a message has begun to arrive since this side last sent one.
        self.has_heard = False
        #: What `hang_up` says if nothing was sent since this was set: that the last message was received.
        self.farewell: Message | None = None
        # Kept from message to message, so that small ones cost no allocation.
        self._kept = memoryview(bytearray(_FIRST_KEPT_BYTES))

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket and drop the shared buffer."""
        self._shared_buffer = None
        # A child forked in the middle would keep the socket open, under a number that no code in it knows.
        with closing_guard():
            self._socket.close()

    def hang_up(self) -> None:
        """Close the socket, after the farewell if there is one."""
        if self.farewell is not None:
            # It fits into the socket's memory, since the other side has read everything before it. In a forked child
            # the socket is closed already.
            with suppress(OSError):
                self._socket.sendall(_FRAME.pack(len(self.farewell.head), 0) + self.farewell.head, NO_SIGNAL)
        self.close()

    def __del__(self) -> None:
        # A thread's channel ends with the thread, and no code closes it; a socket would warn about that.
        with suppress(AttributeError):
            self.hang_up()

    def send(self, message: Message) -> None:
        """Send one message. Raises OSError or EOFError if the other side has hung up."""
        head, buffers = message
        self.has_heard = False
        if not buffers and len(head) < LARGE_BYTES:
            self._socket.sendall(_FRAME.pack(len(head), 0) + head, NO_SIGNAL)
            self.farewell = None
            return
        if len(head) >= LARGE_BYTES:
            head, buffers = b"", [memoryview(head), *buffers]
        sizes = struct.pack(f"<{len(buffers)}Q", *(buffer.nbytes for buffer in buffers))
        self._socket.sendall(b"".join((_FRAME.pack(len(head), len(buffers)), sizes, head)), NO_SIGNAL)
        self.farewell = None
        self._send_bulk(buffers)

    def receive(self) -> Message:
        """Return the next message, whose head is valid until the one after it. Raises EOFError, OSError."""
        frame = self._kept
        self._take_read()
        received = self._fill(frame, 0, _FRAME.size)
        self.has_heard = True
        head_bytes, count = _FRAME.unpack_from(frame)
        head_start = _FRAME.size + _SIZE_BYTES * count
        end = head_start + head_bytes
        if received < end:
            if end > len(frame):
                frame = memoryview(bytearray(end))
                frame[:received] = self._kept[:received]
                if end <= _MOST_KEPT_BYTES:
                    self._kept = frame
            self._fill(frame, received, end)
        if not count:
            return Message(frame[head_start:end])
        buffers = receive_memory(struct.unpack_from(f"<{count}Q", frame, _FRAME.size))
        self._receive_bulk(buffers)
        return Message(frame[head_start:end] if head_bytes else buffers.pop(0), buffers)

    def give_back_when_idle(self) -> None:
        """Wait up to IDLE_MS for something to receive; if nothing arrives, free the memory kept for large payloads.

        For the side that waits for requests; the shared buffer is freed on both sides. Without one, this returns at
        once. It is kept if the other side was stopped in the middle of its copy, the rest of which would be zeros.
        """
        if self._shared_buffer is not None and not self.is_readable(IDLE_MS) and not self._being_read:
            self._shared_buffer.give_back()
            drop_spare_slabs()
            # The other side gets LACK at its next bulk, and makes a new one.
            self._shared_buffer = None

    def _send_bulk(self, buffers: Sequence[memoryview]) -> None:
        their_state = self._byte()
        if self._shared_buffer is None or their_state == LACK:
            self._shared_buffer = None
            if self._refused or not self._offer_shared_buffer():
                self._socket.sendall(PLAIN, NO_SIGNAL)
                for buffer in buffers:
                    self._socket.sendall(buffer, NO_SIGNAL)
                return
        assert self._shared_buffer is not None
        slots = self._shared_buffer.slots
        self._being_read = True
        free = SLOTS
        for number, pieces in enumerate(cut_into_slots(buffers)):
            if not free:
                free = self._marks()
            slot, start = slots[number % SLOTS], 0
            for piece in pieces:
                slot[start : start + piece.nbytes] = piece
                start += piece.nbytes
            self._socket.sendall(FILLED, NO_SIGNAL)
            free -= 1

    def _receive_bulk(self, buffers: Sequence[memoryview]) -> None:
        while True:
            self._socket.sendall(LACK if self._shared_buffer is None else HAVE, NO_SIGNAL)
            # Peeked at first, because a byte that comes with a descriptor has to be received in another way.
            way = self._socket.recv(1, socket.MSG_PEEK)
            if way != OFFER:
                break
            self._shared_buffer = None
            self._take_shared_buffer()
        if way == PLAIN:
            self._byte()
            for buffer in buffers:
                self._fill(buffer, 0, buffer.nbytes)
            return
        if self._shared_buffer is None:
            raise EOFError
        slots = self._shared_buffer.slots
        last = -(-sum(buffer.nbytes for buffer in buffers) // SLOT_BYTES) - 1
        filled = 0
        for number, pieces in enumerate(cut_into_slots(buffers)):
            if not filled:
                filled = self._marks()
            slot, start = slots[number % SLOTS], 0
            for piece in pieces:
                piece[:] = slot[start : start + piece.nbytes]
                start += piece.nbytes
            filled -= 1
            if number + SLOTS <= last:
                self._socket.sendall(EMPTIED, NO_SIGNAL)
        # Everything has arrived, even if the other side is gone by now; the next message finds that out.
        with suppress(OSError):
            self._socket.sendall(READ, NO_SIGNAL)

    def _offer_shared_buffer(self) -> bool:
        """Make a shared buffer and hand it over; return whether both sides have it. A refusal is final."""
        # No fork in between: a child would hold the memory as long as it lives. Sending the byte does not block,
        # because the other side has read everything before it.
        with fork_guard:
            try:
                buffer, fd = create_shared_buffer()
            except OSError:
                return False
            try:
                socket.send_fds(self._socket, [OFFER], [fd], NO_SIGNAL)
            finally:
                os.close(fd)
        self._refused = self._byte() != HAVE
        if not self._refused:
            self._shared_buffer = buffer
        return not self._refused

    def _take_shared_buffer(self) -> None:
        """Take a shared buffer that is offered, if this process may have one; the byte has arrived already."""
        with fork_guard:
            # Empty if this process has no descriptor left.
            _, fds, _, _ = socket.recv_fds(self._socket, 1, 1, _RECEIVE_FLAGS)
            for fd in fds:
                try:
                    with suppress(OSError):
                        self._shared_buffer = SharedBuffer(fd)
                finally:
                    os.close(fd)

    def _fill(self, buffer: memoryview, received: int, wanted: int) -> int:
        """Receive into `buffer` until at least `wanted` bytes of it are there, and return how many are."""
        while received < wanted:
            arrived = self._socket.recv_into(buffer[received:])
            if not arrived:
                raise EOFError
            received += arrived
        return received

    def _byte(self) -> bytes:
        byte = self._socket.recv(1)
        if not byte:
            raise EOFError
        return byte

    def _marks(self) -> int:
        """Wait for FILLED or EMPTIED, and return how many of them have arrived."""
        marks = self._socket.recv(SLOTS)
        if not marks:
            raise EOFError
        return len(marks)

    def is_readable(self, timeout_ms: int) -> bool:
        """Wait for a message, or the end of the connection; return False if neither comes in time. Raises EOFError."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if self._being_read:
            if not poll.poll(timeout_ms):
                return False
            self._take_read()
        return bool(poll.poll(timeout_ms))

    def _take_read(self) -> None:
        """Wait until the other side has copied what was sent through the shared buffer."""
        if self._being_read:
            self._byte()
            self._being_read = False
