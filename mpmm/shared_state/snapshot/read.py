"""Reading a namespace from outside: no membership, no change, hardly ever a lock.

`read_snapshot` copies the segment and decodes the copy. It works whatever happens to the lock's holder: if the copy
catches an open transaction, the undo log in the copy undoes that (see `transaction.py`). Only if writers leave no gap
for a copy does it take the lock while it copies.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from mpmm.errors import LayoutMismatchError, LockTimeoutError
from mpmm.shared_state.file_errors import told_by_file
from mpmm.shared_state.layout import Header
from mpmm.shared_state.liveness import member_lives
from mpmm.shared_state.lock_file import identity_of, is_locked, is_locked_as
from mpmm.shared_state.runtime_dir import RuntimeDirectory, is_namespace_name
from mpmm.shared_state.segment import (
    SHARED_MEMORY,
    Segment,
    SegmentProblem,
    UnfinishedSegment,
    segment_lost,
    segment_name,
)
from mpmm.shared_state.snapshot.decode import ALL_EVENTS, EventChoice, decode, used_members
from mpmm.shared_state.snapshot.records import Snapshot

__all__ = ["DeadMakerError", "find_lost_namespaces", "find_namespaces", "read_snapshot"]

_COPIES_TRIED = 12
_LOCK_TIMEOUT_S = 0.5
# How long to wait for a process that joins or leaves, which takes milliseconds, before a segment counts as lost; and
# the pauses between the checks.
LOST_AFTER_S = 0.5
LIFECYCLE_LOOK_S = 0.005


class DeadMakerError(FileNotFoundError):
    """There is no namespace, because a process died while it made it; the next process to join makes it anew."""


def find_namespaces(root: Path | None = None) -> list[str]:
    """Return the namespaces of this user that have a segment, by name."""
    return sorted(name for name, segment in _folders_below(root) if os.path.exists(f"{SHARED_MEMORY}/{segment}"))


def find_lost_namespaces(root: Path | None = None) -> list[str]:
    """Return the namespaces of this user whose members live, but whose segment was removed, by name."""
    return sorted(
        name
        for name, segment in _folders_below(root)
        if not os.path.exists(f"{SHARED_MEMORY}/{segment}") and _is_lost(RuntimeDirectory(name, root), segment)
    )


def _folders_below(root: Path | None) -> list[tuple[str, str]]:
    """Return the names of the folders that may be namespaces, each with its segment's name."""
    folder = RuntimeDirectory("any", root).root
    with told_by_file(folder):
        return _folders_in(folder)


def _folders_in(folder: Path) -> list[tuple[str, str]]:
    try:
        prefix = segment_name(folder, "")
        with os.scandir(folder) as entries:
            # Other folders may be there: `lost+found`, if the root is a file system of its own.
            names = [entry.name for entry in entries if is_namespace_name(entry.name) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [(name, f"{prefix}{name}") for name in names]


def _is_lost(runtime: RuntimeDirectory, name: str) -> bool:
    """Tell whether the segment `name` is gone though members live.

    The last process to leave is still a member while it removes first the segment and then the folder. So if a process
    holds the lifecycle lock, wait until it has finished, or takes too long.
    """
    deadline = time.monotonic() + LOST_AFTER_S
    while _has_members(runtime.path):
        if not is_locked(runtime.file("lifecycle.lock")) or time.monotonic() >= deadline:
            # Check again, because that process may have finished between the two checks.
            return not os.path.exists(f"{SHARED_MEMORY}/{name}") and _has_members(runtime.path)
        time.sleep(LIFECYCLE_LOOK_S)
    return False


def _has_members(folder: Path) -> bool:
    """Tell whether a member of a namespace lives, in any segment."""
    with contextlib.suppress(FileNotFoundError):
        return any(is_locked(lock) for lock in folder.glob("m*.lock"))
    return False


def read_snapshot(
    namespace: str, root: Path | None = None, *, events: bool = True, choice: EventChoice = ALL_EVENTS
) -> Snapshot:
    """Read the state of a namespace.

    events: False leaves the event ring out; choice: otherwise, which events to return.
    Raises FileNotFoundError if there is no such namespace, DeadMakerError if its maker died, LayoutMismatchError if it
    is another version's, SegmentCorruptError if it holds junk, SegmentLostError if it is gone though members live,
    InvalidArgumentError for an impossible name, RuntimeDirectoryError if this user may not read it.
    """
    runtime = RuntimeDirectory(namespace, root)
    with told_by_file(runtime.path):
        return _read(runtime, namespace, events, choice)


def _read(runtime: RuntimeDirectory, namespace: str, events: bool, choice: EventChoice) -> Snapshot:
    # The folder first: without one, there never was such a namespace, and none is lost.
    if not runtime.path.is_dir():
        raise FileNotFoundError(f"there is no namespace {namespace!r} in {runtime.root}")
    name = segment_name(runtime.root, namespace)
    try:
        segment = _open_finished(runtime, name)
    except SegmentProblem as problem:
        raise LayoutMismatchError(
            f"cannot read namespace {namespace!r}: found {problem.found}, expected {problem.expected}",
            name=name,
            found=problem.found,
            expected=problem.expected,
        ) from None
    if segment is None:
        if _is_lost(runtime, name):
            raise segment_lost(namespace, name)
        raise FileNotFoundError(f"namespace {namespace!r} has no segment {name}")
    try:
        copied = _consistent_copy(segment, events)
        layout = segment.layout
    finally:
        # Only the copy is needed now, and the mapping would keep the memory of a removed segment.
        segment.close()
    # Checked after the copy, so the holder may be another one by now; it only shows whether a holder is stuck.
    held = is_locked(segment.path)
    folder, missing = str(runtime.path), []
    alive = {}
    for slot, pid, attached, inode, pids_of in used_members(copied, layout):
        path = f"{folder}/m{slot}.lock"
        alive[slot] = member_lives(path, inode, pid, attached, pids_of)
        # Another file under its name counts as missing: the member does not hold the lock on that.
        if alive[slot] and (identity_of(path) or (0, 0))[1] != inode:
            missing.append(f"m{slot}.lock")
    # Without members the folder is about to be removed, so files may be missing.
    if alive:
        missing += [name for name in ("alive.lock", "token") if not os.path.lexists(f"{folder}/{name}")]
    decoded = decode(copied, layout, namespace, name, held=held, alive=alive, with_events=events, choice=choice)
    return replace(decoded, missing_files=tuple(missing)) if missing else decoded


def _open_finished(runtime: RuntimeDirectory, name: str) -> Segment | None:
    """Open a segment, None if there is none. Raises FileNotFoundError if it is unfinished; SegmentProblem."""
    place, path = None, f"{SHARED_MEMORY}/{name}"
    while True:
        try:
            return Segment.open(name)
        except UnfinishedSegment as problem:
            # Without the traceback, which has this frame: they would keep each other, and all callers.
            unfinished = problem.with_traceback(None)
            # If the segment is the same before and after a moment at which the lock was free, its maker is dead.
            before, place = place, identity_of(path)
        if place is not None and place == before:
            if _has_members(runtime.path):
                # They have joined a finished segment, which another program has emptied since.
                try:
                    raise unfinished
                finally:
                    del unfinished
            raise DeadMakerError(
                f"namespace {runtime.name!r} is unfinished: the process that made it has died; the next process to "
                "attach makes it anew, and `mpmm prune` removes it"
            )
        locked = is_locked_as(runtime.file("lifecycle.lock"), None)
        if locked is None:
            # The lock file was removed, so it is unknown whether a process holds the lock.
            raise FileNotFoundError(f"namespace {runtime.name!r} is being made, or its maker was killed")
        if locked:
            raise FileNotFoundError(f"namespace {runtime.name!r} is being made")


def _consistent_copy(segment: Segment, events: bool) -> bytearray:
    """Return a copy that is consistent once its undo log is rolled back; see `transaction.py`."""
    words = segment.words
    last = bytearray()
    for attempt in range(_COPIES_TRIED):
        # The same even number before and after the copy: no transaction was open in between.
        before = words[Header.CHANGE]
        copied = segment.copy_in_use(events=events)
        # The same odd number: one transaction was open all the time. If two copies are equal, its writer is stopped, or
        # dead, and no store fell into them.
        if words[Header.CHANGE] == before and (before % 2 == 0 or copied == last):
            return copied
        last = copied
        # Even busy writers pause between transactions; sleeps of different lengths make a copy hit such a pause.
        time.sleep(0.0001 * (attempt % 7))
    # The writers are too busy for that, but then the lock becomes free every few microseconds. If it does not, its
    # holder was just stopped: nothing changes any more, and the next copy is as good.
    try:
        lock = segment.lock_file()
    except FileNotFoundError:
        return last
    try:
        with contextlib.suppress(LockTimeoutError):
            lock.exclusive(_LOCK_TIMEOUT_S)
        # Either we hold the lock, or its holder is stopped: nothing changes.
        return segment.copy_in_use(events=events, into=last)
    finally:
        lock.close()
