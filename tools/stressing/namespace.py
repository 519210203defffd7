"""A namespace as a conductor sees it, which does not attach, but reads snapshots and single words."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from mpmm.errors import LayoutMismatchError
from mpmm.shared_state.layout import Header
from mpmm.shared_state.segment import Segment, SegmentProblem, segment_name
from mpmm.shared_state.snapshot import Snapshot, read_snapshot

__all__ = ["WatchedNamespace"]


class WatchedNamespace:
    """Reads a namespace, and finds what is left of it.

    The segment stays open between reads of single words. Close it before a fork, since the child would keep it open,
    and whenever the namespace may have a new one.
    """

    def __init__(self, name: str, root: Path) -> None:
        """root: the runtime directory."""
        self._name = name
        self.root = root
        self._segment: Segment | None = None
        # The names of all segments seen so far.
        self._seen: set[str] = set()

    def read(self, events: bool) -> Snapshot | None:
        """Take a snapshot; None if the namespace does not exist now."""
        try:
            snapshot = read_snapshot(self._name, self.root, events=events)
        except (FileNotFoundError, LayoutMismatchError):
            return None
        self._seen.add(snapshot.segment)
        return snapshot

    def segment(self) -> Segment | None:
        """Return the segment, to read single words."""
        if self._segment is None:
            with contextlib.suppress(SegmentProblem, FileNotFoundError):
                self._segment = Segment.open(segment_name(self.root, self._name))
        return self._segment

    def close(self) -> None:
        """Close the segment, which the next read of a word opens again."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def find_transaction(self, within_s: float) -> int | None:
        """Return the pid of a process that is in a transaction right now; None if there is none for `within_s`."""
        segment = self.segment()
        if segment is None:
            return None
        words = segment.words
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if words[Header.CHANGE] & 1:
                return int(words[Header.LOCK_HOLDER])
        return None

    def has_lock(self, pid: int) -> bool:
        """Tell whether a process holds the segment's lock, by the kernel's list of locks."""
        try:
            inode = os.stat(Path("/dev/shm", segment_name(self.root, self._name))).st_ino
            locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        except OSError:
            return False
        return any(
            fields[1] == "FLOCK" and int(fields[4]) == pid and int(fields[5].rpartition(":")[2]) == inode
            for fields in locks
        )

    def segments_left(self) -> list[str]:
        """Return a line about each remaining segment."""
        return [f"shared memory {name}" for name in self._seen if os.path.exists(f"/dev/shm/{name}")]

    def files_left(self) -> list[str]:
        """Return a line about each remaining file and folder."""
        # Not Path.rglob, which may fail if a folder is removed while it looks.
        return [f"file {folder}/{name}" for folder, folders, files in os.walk(self.root) for name in folders + files]

    def remove_segments(self) -> None:
        """Remove what a failed run leaves in shared memory."""
        for name in self._seen:
            Path("/dev/shm", name).unlink(missing_ok=True)
        self.close()
