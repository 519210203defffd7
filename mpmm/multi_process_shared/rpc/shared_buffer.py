"""Shared buffers: small pieces of shared memory through which large payloads travel instead of through the socket.

A connection has at most one: SLOTS slots of SLOT_BYTES, which both directions use in turn, as a conveyor belt and not
as a store. The sender fills a slot while the receiver empties an earlier one into memory of its own (`rpc.channel` says
which side may touch which slot when). So a shared buffer is as small for a payload of a gigabyte as for one of a
megabyte, and a receiver gets ordinary memory of its own.

The alternative, a shared buffer as large as the payload, of which the receiver gets a view, is no faster. For 64 MB
one way, in ms: 2.9 into slots, which stay in the processors' caches, and 3.5 out of them into reused memory
(`rpc.receive_buffers`), both at the same time; 6.6 into a large shared buffer, and 5.3 for a private view of it, 73 if
it is written to. Only a view that changes when a forked child writes to it costs nothing. And a view keeps its part of
the buffer busy as long as it lives.

A shared buffer is an unnamed file (`memfd_create`), made by the side that first has something large to send. Its
descriptor is sent through the socket, and both sides close theirs as soon as they have mapped the file: then only the
mappings hold the memory, and however the two processes die, the kernel frees it with the last mapping. The pages are
allocated before either side writes, and the file is sealed against shrinking, so that a lack of memory is an OSError
here and never a SIGBUS later. A side that gets no shared buffer sends through the socket.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress

import psutil

__all__ = [
    "LIMIT_VARIABLE",
    "SHARED_BUFFER_BYTES",
    "SLOTS",
    "SLOT_BYTES",
    "SharedBuffer",
    "create_shared_buffer",
    "cut_into_slots",
]

SLOT_BYTES = 1 << 20
SLOTS = 4
SHARED_BUFFER_BYTES = SLOTS * SLOT_BYTES
# The most that one process may hold in shared buffers, in MB; further connections do without. 0: no shared buffers.
LIMIT_VARIABLE = "MPMM_ARENA_MB"
DEFAULT_LIMIT_MB = 256.0
MIB = 1 << 20
# A host with less free memory than this gets no new shared buffers.
LEAST_AVAILABLE_BYTES = 64 * SHARED_BUFFER_BYTES

_shared_buffers: weakref.WeakSet[SharedBuffer] = weakref.WeakSet()


class SharedBuffer:
    """One mapped shared buffer. Belongs to one connection, whose protocol says when a slot may be written or read."""

    def __init__(self, fd: int) -> None:
        """Map the file `fd`, which stays the caller's. Raises OSError for any other file and beyond the limit."""
        _check_limit()
        _check_file(fd)
        self._mapping = mmap.mmap(fd, SHARED_BUFFER_BYTES)
        whole = memoryview(self._mapping)
        self.slots = [whole[start : start + SLOT_BYTES] for start in range(0, SHARED_BUFFER_BYTES, SLOT_BYTES)]
        _shared_buffers.add(self)

    def give_back(self) -> None:
        """Free the memory on both sides, while no slot is in use; neither side may write to this buffer any more."""
        with suppress(OSError):
            self._mapping.madvise(mmap.MADV_REMOVE)


def create_shared_buffer() -> tuple[SharedBuffer, int]:
    """Return a new shared buffer and the descriptor of its file, for the other side. Raises OSError if none can be had.

    The caller closes the descriptor, and prevents forks until then.
    """
    _check_limit()
    if sys.platform != "linux":
        raise OSError("shared buffers need files that can be sealed, which only Linux has")
    available = psutil.virtual_memory().available
    if available < LEAST_AVAILABLE_BYTES:
        raise OSError(f"{available / MIB:.0f} MB of memory are available, less than {LEAST_AVAILABLE_BYTES / MIB:.0f}")
    fd = os.memfd_create("mpmm-buffer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, SHARED_BUFFER_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
        return SharedBuffer(fd), fd
    except BaseException:
        os.close(fd)
        raise


def cut_into_slots(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Cut buffers of bytes, as if they were one, into the pieces for the first slot, the second, and so on."""
    pieces: list[memoryview] = []
    room = SLOT_BYTES
    for buffer in buffers:
        start = 0
        while start < buffer.nbytes:
            piece = buffer[start : start + room]
            pieces.append(piece)
            start += piece.nbytes
            room -= piece.nbytes
            if not room:
                yield pieces
                pieces, room = [], SLOT_BYTES
    if pieces:
        yield pieces


def _check_limit() -> None:
    """Raise OSError if this process holds all the shared buffers that it may. Two threads may exceed that by one."""
    try:
        limit_mb = float(os.environ.get(LIMIT_VARIABLE, DEFAULT_LIMIT_MB))
    except ValueError:
        limit_mb = DEFAULT_LIMIT_MB
    if (len(_shared_buffers) + 1) * SHARED_BUFFER_BYTES > limit_mb * MIB:
        raise OSError(f"{len(_shared_buffers)} shared buffers are in use, and {LIMIT_VARIABLE} allows {limit_mb:g} MB")


def _check_file(fd: int) -> None:
    """Raise OSError unless the file has the size of a shared buffer and is sealed to keep it."""
    if sys.platform != "linux" or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _seals() != _seals():
        raise OSError("the file is not sealed")
    if os.fstat(fd).st_size != SHARED_BUFFER_BYTES:
        raise OSError(f"the file has {os.fstat(fd).st_size} bytes instead of {SHARED_BUFFER_BYTES}")


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if sys.platform == "linux" else 0
