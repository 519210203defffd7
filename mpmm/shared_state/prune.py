"""Orphaned segments: finds them, so that they can be removed, or given back to the processes that still use them.

A segment lies in `/dev/shm`, its locks in a folder below a root elsewhere. The segment's name contains the root's
identity, so if that root is removed, no process finds the segment by its name any more:

- if its members live, a newcomer finds the segment by the *place* of the root, and gives it the name that belongs to
  the root as it is now (`find_moved`);
- if they are all dead, it would stay for ever, some megabytes of memory. A process that makes a namespace removes such
  segments, and so does `mpmm prune`.

A segment that any process, of any container, has open or mapped is no orphan: `is_open_anywhere` asks the kernel. A
segment that another version of mpmm has made does not tell its root; only `mpmm prune` removes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpmm.shared_state.layout import Header
from mpmm.shared_state.liveness import has_living_member
from mpmm.shared_state.lock_file import is_open_anywhere
from mpmm.shared_state.runtime_dir import REMOVAL_S, RuntimeDirectory
from mpmm.shared_state.segment import (
    GONE,
    SHARED_MEMORY,
    Segment,
    SegmentProblem,
    place_of,
    read_header,
    segment_name,
    unlink_segment,
)
from mpmm.shared_state.tables import Tables

__all__ = ["Orphan", "find_moved", "find_orphans", "sweep_orphans"]

_LOG = logging.getLogger("mpmm")
_NAME = re.compile(r"mpmm-(?P<uid>\d+)-(?P<root>[0-9a-f]{12})-(?P<namespace>.+)")


@dataclass(frozen=True)
class Orphan:
    """A segment that no process can use any more. why: how that is known. identity: device and inode."""

    name: str
    identity: tuple[int, int]
    size_mb: float
    why: str


def sweep_orphans() -> list[Orphan]:
    """Remove this user's segments whose root is gone and that no process has open; return them."""
    found = find_orphans()
    for orphan in found:
        unlink_segment(orphan.name, orphan.identity)
        _LOG.info("mpmm: removed the segment %s (%.1f MB): %s", orphan.name, orphan.size_mb, orphan.why)
    return found


def find_orphans(*, of_other_versions: bool = False, roots: tuple[Path, ...] = ()) -> list[Orphan]:
    """Return this user's orphaned segments.

    of_other_versions: include those that this version cannot read, unless their names belong to one of `roots`.
    """
    orphans = []
    for name in _names():
        path = f"{SHARED_MEMORY}/{name}"
        with contextlib.suppress(FileNotFoundError):
            # Before all questions: if another process replaces the segment meanwhile, the answers may be about the new
            # one, and what is removed is none but this one.
            found = os.lstat(path)
            why = _why_abandoned(name) or (of_other_versions and _why_foreign(name, roots))
            if not why or is_open_anywhere(path):
                continue
            # A process may be about to remove it, or to give it its name back. The renaming was its last change.
            if GONE not in name or time.time() - found.st_ctime >= REMOVAL_S:
                orphans.append(Orphan(name, (found.st_dev, found.st_ino), found.st_blocks * 512 / 2**20, why))
    return orphans


def find_moved(runtime: RuntimeDirectory, name: str) -> Segment | None:
    """Return the segment that living members of this namespace use, if its root was made anew, and rename it to `name`.

    Hold the lifecycle lock.
    """
    places = place_of(runtime.root)
    for other in _names():
        if other == name or _NAME.fullmatch(other)["namespace"] != runtime.name:  # type: ignore[index]  # it does match
            continue
        header = read_header(other)
        if header is None or header[Header.CLOSED] == Header.IS_CLOSED:
            continue
        if places[0] != header[Header.ROOT_PLACE] and places[1] != header[Header.ROOT_MOUNTS]:
            continue
        with contextlib.suppress(SegmentProblem):
            segment = Segment.open(other)
            if segment is None:
                continue
            if has_living_member(Tables(segment), runtime.path) and segment.rename(name):
                _LOG.warning(
                    "mpmm %s: the folder %s was removed while processes were using it; this process joins them",
                    runtime.name,
                    runtime.root,
                )
                return segment
            segment.close()
    return None


def _names() -> Iterator[str]:
    """Yield the names of this user's segments."""
    try:
        names = os.listdir(SHARED_MEMORY)
    except FileNotFoundError:
        # A system without /dev/shm; making a namespace there raises an error that says so.
        return
    for name in names:
        match = _NAME.fullmatch(name)
        if match and int(match["uid"]) == os.getuid():
            with contextlib.suppress(FileNotFoundError):
                # In a user namespace, another user's segment may have our uid in its name, though its file does not.
                if os.lstat(f"{SHARED_MEMORY}/{name}").st_uid == os.getuid():
                    yield name


def _why_abandoned(name: str) -> str | None:
    """Say why no process can find a segment by its name any more, None if one may, or if that is unknown."""
    header = read_header(name)
    if header is None:
        return None
    if GONE in name:
        return "a process died while it removed it"
    length = header[Header.ROOT]
    if not 0 < length <= Header.ROOT_BYTES:
        return None
    words = header[Header.ROOT + 1 : Header.ROOT + 1 + -(-length // 8)]
    root = Path(os.fsdecode(b"".join(word.to_bytes(8, "little") for word in words)[:length]))
    namespace = _NAME.fullmatch(name)["namespace"]  # type: ignore[index]  # it does match
    try:
        if segment_name(root, namespace) != name:
            return f"the folder {root} was removed and made again"
        return None if (root / namespace).exists() else f"its folder {root / namespace} is gone"
    except (FileNotFoundError, NotADirectoryError):
        return f"its folder {root} is gone"
    except (OSError, ValueError):
        # This process must not look there, or the segment is damaged, and these letters are no path.
        return None


def _why_foreign(name: str, roots: tuple[Path, ...]) -> str | None:
    """Say why a segment that this version cannot read is left over, None if a process may find it by its name."""
    if read_header(name) is not None:
        return None
    for root in roots:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if name.startswith(segment_name(root, "")):
                return None
    return "another version of mpmm has made it, and no process uses it"
