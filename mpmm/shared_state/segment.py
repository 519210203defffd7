"""The shared-memory segment as an array of words, made and found by name.

`multiprocessing.shared_memory` does the mapping. Two of its habits are turned off: before Python 3.13 the resource
tracker takes every segment that a process merely attaches to for its own, and unlinks it when that process ends; and
pages are allocated at first touch, so that a full `/dev/shm` would be a SIGBUS in the middle of a transaction. The
tracker does not know of segments made here, and all their pages are allocated at creation.

The lock that guards a segment is on the segment's own file, so that no removed path can give one segment two locks. A
name may be removed, and given to a new segment by another process, at any time; an operation on a name applies to the
segment that has it *now*. So each open segment knows its file's device and inode, and a process that removes a name
renames the file first, checks which one it is, and gives the name back if it is another one.
"""

from __future__ import annotations

import _posixshmem
import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mpmm.errors import SegmentAllocationError, SegmentLostError
from mpmm.interpreter.process_limits import limit_behind
from mpmm.interpreter.thread_locks import new_rlock
from mpmm.shared_state.file_errors import file_error
from mpmm.shared_state.layout import LAYOUT_VERSION, MAGIC, Capacities, Header, Layout, Table
from mpmm.shared_state.lock_file import LockFile, identity_of

if TYPE_CHECKING:
    from multiprocessing.shared_memory import SharedMemory

    import numpy as np
    import numpy.typing as npt

__all__ = [
    "GONE",
    "SHARED_MEMORY",
    "Segment",
    "SegmentProblem",
    "UnfinishedSegment",
    "boot_hash",
    "place_of",
    "read_header",
    "segment_lost",
    "segment_name",
    "unlink_segment",
]

SHARED_MEMORY = "/dev/shm"
# Part of a segment's name while it is removed; `prune.py` removes it if the process dies then.
GONE = ".gone."
# Reentrant, because a signal handler may open a segment while its thread opens one.
_tracker_patch = new_rlock()


class SegmentProblem(Exception):
    """A segment of our name that must not be read as ours; the text says what was found and what was expected."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}, expected {expected}")
        self.found = found
        self.expected = expected


class UnfinishedSegment(SegmentProblem):
    """A segment without the magic word, which is stored last: a process is making it, or died while it did."""


def segment_name(root: Path, namespace: str) -> str:
    """Return the name in `/dev/shm` for a namespace below the existing folder `root`.

    The folder's identity is part of the name, so that two containers that share `/dev/shm` but not the folder with the
    locks get two segments rather than one without mutual exclusion.
    """
    place = os.stat(root)
    identity = f"{os.path.realpath(root)}:{place.st_dev}:{place.st_ino}"
    return f"mpmm-{os.getuid()}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:12]}-{namespace}"


def place_of(root: Path) -> tuple[int, int]:
    """Return the words for `Header.ROOT_PLACE` and `ROOT_MOUNTS`; processes with the same root have one in common.

    Two containers that share `/dev/shm` may have different roots at the same path. The roots differ if neither the
    folder above nor the set of mounted file systems is the same.
    """
    path = os.path.realpath(root)
    above = identity_of(os.path.dirname(path))
    mounts = 0
    with contextlib.suppress(OSError):
        mounts = os.stat("/proc/self/ns/mnt").st_ino
    return _hash(f"{path}:{above}"), _hash(f"{path}:{mounts}")


def segment_lost(namespace: str, name: str) -> SegmentLostError:
    """Return the error for a namespace whose members live, but whose segment is gone."""
    return SegmentLostError(
        f"namespace {namespace!r} is in use, but its segment {SHARED_MEMORY}/{name} is gone: something has removed it "
        "under its processes (systemd-logind does when a user logs out, unless logind.conf says RemoveIPC=no, and "
        "so may systemd-tmpfiles or another cleaner); end these processes, the next one makes a new segment",
        name=name,
    )


def boot_hash() -> int:
    """Return a word that stays the same until the machine reboots."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        # Imported here, like NumPy below, so that a process which only looks at a namespace starts faster.
        import psutil

        boot = str(int(psutil.boot_time()))
    return _hash(boot)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:8], "little")


class Segment:
    """A mapped segment. Any module may read `words`; only `transaction.py` writes them."""

    def __init__(self, mapping: mmap.mmap, name: str, layout: Layout, identity: tuple[int, int]) -> None:
        self.name = name
        self.identity = identity
        self.layout = layout
        self._mapping = mapping
        whole = memoryview(mapping)[: layout.size_bytes]
        self.words = whole.cast("Q")
        self.floats = whole.cast("d")
        self._closed = False
        # Made at first use.
        self._numbers: npt.NDArray[np.uint64] | None = None
        self._anchor: ctypes.c_char | None = ctypes.c_char.from_buffer(mapping)
        self.address = ctypes.addressof(self._anchor)

    @classmethod
    def create(cls, name: str, capacities: Capacities, token: int) -> Segment:
        """Make, allocate and initialise a new segment; the caller holds the namespace's lifecycle lock.

        The caller fills in the rest and then calls `seal`; if it dies before that, it leaves a segment that `open`
        refuses.
        Raises SegmentAllocationError if the memory is not available, FileExistsError if the name is taken.
        """
        layout = Layout(capacities)
        try:
            with _unknown_to_tracker(name):
                memory = _shared_memory(name, layout.size_bytes)
        except FileExistsError:
            raise
        except OSError as error:
            raise _refusal(name, layout.size_bytes, error) from error
        try:
            # `_fd`, here and in _map, is not in the type stubs: SharedMemory offers no other way to its descriptor.
            if hasattr(os, "posix_fallocate"):
                # Typeshed has no _fd.
                os.posix_fallocate(memory._fd, 0, layout.size_bytes)  # type: ignore[attr-defined]  # its descriptor is private
            found = os.fstat(memory._fd)  # type: ignore[attr-defined]  # typeshed has no _fd
            if stat.S_IMODE(found.st_mode) != 0o600:
                # A umask that denies even the owner would keep the others out.
                os.fchmod(memory._fd, 0o600)  # type: ignore[attr-defined]  # typeshed has no _fd
            segment = cls(_map(memory), name, layout, (found.st_dev, found.st_ino))
        except OSError as error:
            memory.close()
            unlink_segment(name)
            raise _refusal(name, layout.size_bytes, error) from error
        words = segment.words
        words[Header.VERSION] = LAYOUT_VERSION
        words[Header.SIZE_BYTES] = layout.size_bytes
        words[Header.BOOT] = boot_hash()
        words[Header.TOKEN] = token
        for offset, table in enumerate(layout.tables):
            words[Header.CAPACITIES + offset] = table.capacity
        words[Header.NEXT_GENERATION] = 1
        return segment

    def seal(self) -> None:
        """Store the magic word: from now on other processes may attach."""
        self.words[Header.MAGIC] = MAGIC

    @classmethod
    def open(cls, name: str, token: int | None = None) -> Segment | None:
        """Map an existing segment; None if there is none.

        Raises SegmentProblem if it is not of this layout, this boot, this size or, if `token` is given, this runtime
        directory: such a segment is not read any further.
        """
        try:
            # Not by `SharedMemory`: importing that takes longer than everything else that a snapshot needs.
            fd = _posixshmem.shm_open(f"/{name}", os.O_RDWR)
        except FileNotFoundError:
            return None
        except OSError as error:
            # The error names the segment as `shm_open` does, without the folder.
            raise file_error(OSError(error.errno, error.strerror), f"{SHARED_MEMORY}/{name}") from error
        try:
            found = os.fstat(fd)
            size = found.st_size
            if not size:
                # Its creator has not sized it yet, or died before that.
                raise UnfinishedSegment("an empty segment", "an initialised one")
            # Read through the descriptor, because a page that its creator has not allocated yet, or not before it died,
            # reads as zeros there, but ends this process by SIGBUS in a mapping if there is no memory left for it.
            if os.pread(fd, 8, 8 * Header.MAGIC) == bytes(8):
                raise UnfinishedSegment("magic 0x0", f"{MAGIC:#x}")
            mapping = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        return cls(mapping, name, _checked_layout(mapping, token), (found.st_dev, found.st_ino))

    @property
    def path(self) -> str:
        """The path of the segment's file, unless that was removed."""
        return f"{SHARED_MEMORY}/{self.name}"

    @property
    def is_closed(self) -> bool:
        """Tell whether no process may join any more, because the segment is being removed."""
        return self.words[Header.CLOSED] == Header.IS_CLOSED

    def is_current(self) -> bool:
        """Tell whether the name still leads to this segment."""
        return identity_of(self.path) == self.identity

    def lock_file(self) -> LockFile:
        """Open the file whose lock guards the segment. Raises FileNotFoundError if it was removed."""
        file = LockFile(Path(self.path), create=False)
        if file.identity != self.identity:
            file.close()
            raise FileNotFoundError(f"{self.path} is another segment by now")
        return file

    def unlink(self) -> None:
        """Remove the name if it still belongs to this segment."""
        unlink_segment(self.name, self.identity)

    def rename(self, name: str) -> bool:
        """Give the segment another name; return False if another segment has that, or has taken the old one.

        If several processes do this at once, one of them renames it, and all return True.
        """
        if name == self.name:
            return self.is_current()
        if self.is_current():
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(self.path, f"{SHARED_MEMORY}/{name}")
        if identity_of(f"{SHARED_MEMORY}/{name}") != self.identity:
            return False
        self.unlink()
        self.name = name
        return True

    def view(self, table: Table) -> npt.NDArray[np.uint64]:
        """Return the live rows of a table as an array of shape (capacity, words).

        For scans under the lock; the caller must not keep it, because a kept view keeps the mapping open.
        """
        numbers = self._numbers
        if numbers is None:
            numbers = self._as_numbers()
        return numbers[table.base : table.end].reshape(table.capacity, table.words)

    def _as_numbers(self) -> npt.NDArray[np.uint64]:
        import numpy as np

        if self._closed:
            # Another thread has unmapped it. Python's message for a released view.
            raise ValueError("operation forbidden on released memoryview object")
        self._numbers = np.frombuffer(self._mapping, dtype=np.uint64, count=self.layout.words)
        return self._numbers

    def copy(self) -> bytes:
        """Return all bytes of the segment."""
        return self.words.tobytes()

    def copy_in_use(self, *, events: bool = True, into: bytearray | None = None) -> bytearray:
        """Return the bytes of the segment, without rows that were never in use and the unused part of the undo log.

        For readers: it takes a fraction of the time of `copy`, which matters while others write, or wait for the lock.
        events: False leaves out the event ring, too. into: an earlier copy of that kind, to bring up to date, because
        the first touch of a new one's memory may take longer than everything else.
        """
        copied = bytearray(self.layout.size_bytes) if into is None else into
        with memoryview(copied) as whole, whole.cast("Q") as words:
            words[: Header.WORDS] = self.words[: Header.WORDS]
            in_use = {table.name: words[table.end_word] for table in self.layout.growing}
            in_use["undo"] = words[Header.UNDO_COUNT]
            # One more row, because the row behind the newest event may be being written.
            in_use["events"] = words[Header.EVENTS] + 1 if events else 0
            for table in self.layout.tables:
                end = table.base + min(in_use.get(table.name, table.capacity), table.capacity) * table.words
                words[table.base : end] = self.words[table.base : end]
        return copied

    def close(self) -> None:
        """Unmap the segment. A thread that still reads it gets ValueError from the released views."""
        self._closed = True
        self._numbers = None
        self._anchor = None
        self.words.release()
        self.floats.release()
        # A view that is still referenced somewhere keeps the pages mapped until it is freed; that is harmless.
        with contextlib.suppress(BufferError):
            self._mapping.close()


def read_header(name: str) -> list[int] | None:
    """Return the words of a segment's header, None if there is no segment of this layout and this boot."""
    with contextlib.suppress(OSError), open(f"{SHARED_MEMORY}/{name}", "rb", buffering=0) as file:
        words = memoryview(file.read(Header.WORDS * 8)).cast("B")
        if len(words) == Header.WORDS * 8:
            header = words.cast("Q").tolist()
            known = (MAGIC, LAYOUT_VERSION, boot_hash())
            return header if (header[Header.MAGIC], header[Header.VERSION], header[Header.BOOT]) == known else None
    return None


def unlink_segment(name: str, identity: tuple[int, int] | None = None) -> None:
    """Remove the name; processes that have the segment mapped keep it. A missing name is fine.

    identity: device and inode of the segment to remove; another one that has the name by now stays.
    """
    path = f"{SHARED_MEMORY}/{name}"
    if identity is not None and identity_of(path) != identity:
        return
    gone = f"{path.partition(GONE)[0]}{GONE}{os.urandom(8).hex()}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, gone)
            _end_removal(gone, path, identity)
    except BaseException:
        # An exception from a signal handler: other processes would not look for the segment for a while.
        _end_removal(gone, path, identity)
        raise


def _end_removal(gone: str, path: str, identity: tuple[int, int] | None) -> None:
    """Remove a segment that was renamed from `path`, or give it its name back if it is not the one to remove."""
    with contextlib.suppress(FileNotFoundError):
        if identity is not None and identity_of(gone) != identity:
            # It was made between the two calls. If there is a third one by now, the maker of the second notices that
            # its name is gone and begins again, like every process whose segment was taken away.
            with contextlib.suppress(FileExistsError):
                os.link(gone, path)
        os.unlink(gone)


def _map(memory: SharedMemory) -> mmap.mmap:
    """Return our own mapping of a segment, and close its `SharedMemory`.

    A `SharedMemory` unmaps when it is collected, possibly before our views of it are, and then complains about those. A
    plain mapping is unmapped with its last view.
    """
    mapping = mmap.mmap(memory._fd, memory.size)  # type: ignore[attr-defined]  # typeshed has no _fd
    memory.close()
    return mapping


def _checked_layout(mapping: mmap.mmap, token: int | None) -> Layout:
    size = len(mapping)
    if size < Header.WORDS * 8:
        raise SegmentProblem(f"{size} bytes", f"at least {Header.WORDS * 8}")
    with memoryview(mapping) as whole, whole[: Header.WORDS * 8].cast("Q") as header:
        if header[Header.MAGIC] != MAGIC:
            raise SegmentProblem(f"magic {header[Header.MAGIC]:#x}", f"{MAGIC:#x}")
        if header[Header.VERSION] != LAYOUT_VERSION:
            raise SegmentProblem(f"layout version {header[Header.VERSION]}", f"layout version {LAYOUT_VERSION}")
        if header[Header.BOOT] != boot_hash():
            raise SegmentProblem("a segment from before the last start of the machine", "one from this boot")
        if token is not None and header[Header.TOKEN] != token:
            raise SegmentProblem("a segment of another runtime directory", "one of this directory")
        rows = [header[Header.CAPACITIES + offset] for offset in range(len(Capacities.__dataclass_fields__))]
        if not all(1 <= count <= 1 << 20 for count in rows):
            raise SegmentProblem(f"table capacities {rows}", "numbers from 1 to 1048576")
        layout = Layout(Capacities(*rows))
        if header[Header.SIZE_BYTES] != layout.size_bytes or size < layout.size_bytes:
            raise SegmentProblem(
                f"{size} bytes that claim to be {header[Header.SIZE_BYTES]}", f"{layout.size_bytes} bytes"
            )
        return layout


# What the user has to do about errors other than a lack of memory.
_ENLARGE = f"free or enlarge {SHARED_MEMORY}, or create the namespace with smaller capacities"
_WITHOUT_SHARED_MEMORY: dict[int | None, str] = {
    errno.ENOENT: f"this host has no {SHARED_MEMORY}: mount a tmpfs there, of mode 1777",
    errno.EROFS: f"{SHARED_MEMORY} is mounted read-only: mount it read-write",
    errno.EACCES: f"{SHARED_MEMORY} cannot be written by this user: give it mode 1777",
    errno.EFBIG: "this process's limit on the size of files is lower: raise it (ulimit -f)",
}


def _refusal(name: str, size_bytes: int, error: OSError) -> OSError | SegmentAllocationError:
    """Return the error to raise when a segment could not be made; `error` itself if that is not about memory."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return error
    limit = limit_behind(error)
    what_to_do = f"{limit}: raise it" if limit else _WITHOUT_SHARED_MEMORY.get(error.errno, _ENLARGE)
    return SegmentAllocationError(
        f"no room for the segment {name}: {size_bytes} bytes of shared memory were refused ({error.strerror}); "
        f"{what_to_do}",
        name=name,
        size_bytes=size_bytes,
    )


if sys.version_info >= (3, 13):

    def _shared_memory(name: str, size: int) -> SharedMemory:
        from multiprocessing.shared_memory import SharedMemory

        return SharedMemory(name=name, create=True, size=size, track=False)

    @contextlib.contextmanager
    def _unknown_to_tracker(name: str) -> Iterator[None]:
        yield

else:

    def _shared_memory(name: str, size: int) -> SharedMemory:
        from multiprocessing.shared_memory import SharedMemory

        return SharedMemory(name=name, create=True, size=size)

    @contextlib.contextmanager
    def _unknown_to_tracker(name: str) -> Iterator[None]:
        """Keep calls about the segment `name`, and no others, from the resource tracker.

        Undoing a registration afterwards would be simpler, but starts a tracker process in every worker.
        """
        from multiprocessing import resource_tracker

        with _tracker_patch:
            register, unregister = resource_tracker.register, resource_tracker.unregister

            def filtered_register(resource: str, kind: str) -> None:
                if resource.lstrip("/") != name:
                    register(resource, kind)

            def filtered_unregister(resource: str, kind: str) -> None:
                if resource.lstrip("/") != name:
                    unregister(resource, kind)

            resource_tracker.register = filtered_register  # type: ignore[assignment]  # replaced for a moment
            resource_tracker.unregister = filtered_unregister  # type: ignore[assignment]  # likewise
            try:
                yield
            finally:
                resource_tracker.register = register
                resource_tracker.unregister = unregister


def reset_after_fork() -> None:
    """Give the child a new lock, because a thread of the parent may have held the old one."""
    global _tracker_patch
    _tracker_patch = new_rlock()
