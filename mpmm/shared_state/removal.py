"""Removes namespaces without workers; called by model servers, and by the process from which they are forked."""

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
    """Remove a namespace if no worker is left in it, nor a newcomer; return whether it was removed.

    For the processes that are left when all workers have crashed: model servers, and the process from which they are
    forked. Hold none of the namespace's locks.
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
    """Remove the segment; return False if a worker, whose lock file may be gone, still lives in it."""
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
    """Tell whether `remove_deserted` would remove a namespace, without changing anything."""
    runtime = RuntimeDirectory(name, root)
    with contextlib.suppress(FileNotFoundError, LockTimeoutError), contextlib.ExitStack() as held:
        # Something may have removed these two files; only who removes the namespace makes them again.
        with contextlib.suppress(FileNotFoundError):
            if not held.enter_context(Lifecycle(runtime, REMOVAL_TIMEOUT_S, create=False)):
                return False
        with contextlib.suppress(FileNotFoundError):
            alive = held.enter_context(contextlib.closing(LockFile(runtime.file("alive.lock"), create=False)))
            if not alive.try_exclusive():
                return False
            alive.unlock()
        try:
            segment = Segment.open(segment_name(runtime.root, name))
        except SegmentProblem:
            return True
        if segment is None:
            return runtime.path.exists()
        with contextlib.closing(segment):
            return not has_living_member(Tables(segment), runtime.path, (Member.WORKER,))
    return False


def remove_all_deserted(root: Path) -> None:
    """Remove every namespace below `root` in which no worker is left, see `remove_deserted`."""
    for name in namespaces_below(root):
        remove_deserted(root, name)


def namespaces_below(root: Path) -> list[str]:
    """Return the names of the namespaces below `root` that have a folder, living or not."""
    found = {token.parent.name for token in root.glob("[!.]*/token")}
    found.update(lock.parent.name for lock in root.glob("[!.]*/lifecycle.lock") if _is_hardly_begun(lock.parent))
    return sorted(found)


def _is_hardly_begun(folder: Path) -> bool:
    """Tell whether a process only made a namespace's folder and locks, and then failed, say for lack of descriptors."""
    names: set[str] = set()
    with contextlib.suppress(OSError):
        names = {path.name for path in folder.iterdir()}
    return folder.name != REGISTRY_FOLDER and bool(names) and names <= {"lifecycle.lock", "alive.lock"}
