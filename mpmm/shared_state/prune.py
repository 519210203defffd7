"""Segments that belong to nobody: found, so that they can be removed, or given back to those who still use them.

A segment lies in `/dev/shm`, its locks in a folder below a root elsewhere. If somebody removes that root, nobody comes
to the segment by its name any more, which has the root's identity in it:

- if its members live, a newcomer finds the segment here by the *place* of the root, and gives it the name that belongs
  to the root as it is now (`find_moved`);
- if they are all dead, it stays for ever, some megabytes of memory. Whoever makes a namespace sweeps such ones away,
  and so does `mpmm prune`.

No process may have such a segment open or mapped, of whatever container: the kernel is asked for that, see
`is_open_anywhere`. What another version of mpmm has made says nothing about its root; that is left to `mpmm prune`.
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
    """A segment that belongs to nobody; why says how one knows. identity: device and inode."""

    name: str
    identity: tuple[int, int]
    size_mb: float
    why: str


def sweep_orphans() -> list[Orphan]:
    """Remove the segments of this user whose root is gone and that no process has open; return them."""
    found = find_orphans()
    for orphan in found:
        unlink_segment(orphan.name, orphan.identity)
        _LOG.info("mpmm: removed the segment %s (%.1f MB): %s", orphan.name, orphan.size_mb, orphan.why)
    return found


def find_orphans(*, of_other_versions: bool = False, roots: tuple[Path, ...] = ()) -> list[Orphan]:
    """Return the segments of this user that belong to nobody.

    of_other_versions: those as well that this version cannot read, unless their names are those of one of `roots`.
    """
    orphans = []
    for name in _names():
        why = _why_abandoned(name) or (of_other_versions and _why_foreign(name, roots))
        path = f"{SHARED_MEMORY}/{name}"
        if not why or is_open_anywhere(path):
            continue
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(path, follow_symlinks=False)
            # A process may be just about to remove it, or to give it its name back; its renaming is the last change.
            if GONE not in name or time.time() - found.st_ctime >= REMOVAL_S:
                orphans.append(Orphan(name, (found.st_dev, found.st_ino), found.st_blocks * 512 / 2**20, why))
    return orphans


def find_moved(runtime: RuntimeDirectory, name: str) -> Segment | None:
    """Return the segment that living members of this namespace use, if its root was made anew; give it its new `name`.

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
                    "mpmm %s: something has removed the folder %s under living processes; this one joins them there",
                    runtime.name,
                    runtime.root,
                )
                return segment
            segment.close()
    return None


def _names() -> Iterator[str]:
    """Name the segments of this user."""
    try:
        names = os.listdir(SHARED_MEMORY)
    except FileNotFoundError:
        # Of a system without one, which who makes a namespace is told.
        return
    for name in names:
        match = _NAME.fullmatch(name)
        if match and int(match["uid"]) == os.getuid():
            with contextlib.suppress(FileNotFoundError):
                # In a user namespace somebody else's may have our number in its name, and its processes do not.
                if os.stat(f"{SHARED_MEMORY}/{name}", follow_symlinks=False).st_uid == os.getuid():
                    yield name


def _why_abandoned(name: str) -> str | None:
    """Say why nobody comes to a segment by its name any more, None if somebody may, or if that cannot be told."""
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
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if segment_name(root, namespace) != name:
            return f"the folder {root} was removed and made again"
        return None if (root / namespace).exists() else f"its folder {root / namespace} is gone"
    return f"its folder {root} is gone"


def _why_foreign(name: str, roots: tuple[Path, ...]) -> str | None:
    """Say why a segment is left over that this version cannot read, None if a process may come to it by its name."""
    if read_header(name) is not None:
        return None
    for root in roots:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if name.startswith(segment_name(root, "")):
                return None
    return "another version of mpmm has made it, and no process uses it"
