"""Removing namespaces in which no worker is left: model servers do, and the process that they are forked from."""

from __future__ import annotations

import contextlib
from pathlib import Path

from mpmm.errors import LockTimeoutError
from mpmm.shared_state.layout import Member
from mpmm.shared_state.lifecycle import REMOVAL_TIMEOUT_S, Lifecycle, close_segment
from mpmm.shared_state.liveness import has_living_member
from mpmm.shared_state.lock_file import LockFile, identity_of
from mpmm.shared_state.runtime_dir import REGISTRY_FOLDER, RuntimeDirectory
from mpmm.shared_state.segment import Segment, SegmentProblem, segment_name, unlink_segment
from mpmm.shared_state.tables import Tables

__all__ = ["is_deserted", "namespaces_below", "remove_all_deserted", "remove_deserted"]


def remove_deserted(root: Path, name: str) -> bool:
    """Remove a namespace in which no worker is left; return whether that was so. False if there is a newcomer.

    For those who are left when all workers have crashed: model servers, and the process that they are forked from.
    Hold none of the namespace's locks.
    """
    runtime = RuntimeDirectory(name, root)
    with contextlib.suppress(FileNotFoundError, LockTimeoutError), Lifecycle(runtime, REMOVAL_TIMEOUT_S) as current:
        folder = identity_of(runtime.path)
        if not current:
            return False
        with contextlib.closing(LockFile(runtime.file("alive.lock"))) as alive:
            if alive.try_exclusive() and _remove_segment(runtime):
                runtime.remove(folder)
                return True
    return False


def _remove_segment(runtime: RuntimeDirectory) -> bool:
    """Remove a segment in which no worker is left; return False if there is one, whose lock file may be gone."""
    name = segment_name(runtime.root, runtime.name)
    try:
        segment = Segment.open(name)
    except SegmentProblem:
        unlink_segment(name)
        return True
    if segment is None:
        return True
    with contextlib.closing(segment):
        if not close_segment(segment, runtime, (Member.WORKER,)):
            return False
        segment.unlink()
        return True


def is_deserted(root: Path, name: str) -> bool:
    """Tell whether `remove_deserted` would remove a namespace; change nothing."""
    runtime = RuntimeDirectory(name, root)
    with contextlib.suppress(FileNotFoundError, LockTimeoutError), Lifecycle(runtime, REMOVAL_TIMEOUT_S) as current:
        if not current:
            return False
        with contextlib.closing(LockFile(runtime.file("alive.lock"))) as alive:
            if not alive.try_exclusive():
                return False
        try:
            segment = Segment.open(segment_name(runtime.root, name))
        except SegmentProblem:
            return True
        if segment is None:
            return True
        with contextlib.closing(segment):
            return not has_living_member(Tables(segment), runtime.path, (Member.WORKER,))
    return False


def remove_all_deserted(root: Path) -> None:
    """Remove every namespace below `root` in which no worker is left, see `remove_deserted`."""
    for name in namespaces_below(root):
        remove_deserted(root, name)


def namespaces_below(root: Path) -> list[str]:
    """Name the namespaces below `root` that have a folder, living or not."""
    found = {token.parent.name for token in root.glob("[!.]*/token")}
    found.update(lock.parent.name for lock in root.glob("[!.]*/lifecycle.lock") if _is_hardly_begun(lock.parent))
    return sorted(found)


def _is_hardly_begun(folder: Path) -> bool:
    """Tell whether a process has made the folder of a namespace and come no further, for want of descriptors say."""
    names: set[str] = set()
    with contextlib.suppress(OSError):
        names = {path.name for path in folder.iterdir()}
    return folder.name != REGISTRY_FOLDER and bool(names) and names <= {"lifecycle.lock", "alive.lock"}
