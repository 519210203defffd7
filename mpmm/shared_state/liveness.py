"""Tells whether a member's process lives: by the lock that it holds for life, or by its pid if the lock file is gone.

The lock is the evidence. If the file was removed, or another one is in its place, its lock proves nothing, because the
holder of the first file may live on. Then the process that now has the pid decides; if that is unknown, the member
counts as alive.
"""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mpmm.shared_state.layout import Header, Member
from mpmm.shared_state.lock_file import is_locked_as

if TYPE_CHECKING:
    from mpmm.shared_state.tables import Tables

__all__ = [
    "has_living_member",
    "is_member_here",
    "lives_by_pid",
    "member_lives",
    "member_of_row_lives",
    "pid_namespace",
]

# A process starts at most this long after the tick in /proc/<pid>/stat.
TICK_S = 0.05


def member_lives(lock_path: str, inode: int, pid: int, attached_ns: int, pids_of: int) -> bool:
    """Tell whether the member that attached at `attached_ns` (monotonic) lives.

    lock_path, inode: of the lock file that it holds. pids_of: the pid namespace in which `pid` is valid, see
    `pid_namespace`.
    """
    locked = is_locked_as(lock_path, inode)
    if locked is not None:
        return locked
    return pids_of != pid_namespace() or lives_by_pid(pid, attached_ns)


def member_of_row_lives(tables: Tables, slot: int, lock_path: str) -> bool:
    """Tell whether the member in a used row lives."""
    words, at = tables.segment.words, tables.member(slot)
    return member_lives(
        lock_path,
        int(words[at + Member.LOCK]),
        int(words[at + Member.PID]),
        int(words[at + Member.ATTACHED]),
        int(words[Header.PID_NAMESPACE]),
    )


def has_living_member(
    tables: Tables,
    folder: Path,
    kinds: tuple[int, ...] = (Member.WORKER, Member.SERVER, Member.GUEST),
) -> bool:
    """Tell whether a member of one of these kinds lives; folder: with the lock files."""
    words = tables.segment.words
    return any(
        words[tables.member(slot) + Member.STATE] in kinds
        and member_of_row_lives(tables, slot, f"{folder}/m{slot}.lock")
        for slot in tables.used_members()
    )


@cache
def pid_namespace() -> int:
    """Return the inode of this process's pid namespace, 0 if unknown."""
    # Cached, because a process never changes its own, only that of its children.
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def is_member_here(tables: Tables, slot: int) -> bool:
    """Tell whether the process that has a member's pid here is that member, and not a process of another container.

    If members are in several containers, it is if it has the member's lock file open. False if that is unknown.
    """
    member = tables.members[slot]
    if pid_namespace() in (0, tables.header.pid_namespace):
        return True
    try:
        for entry in os.scandir(f"/proc/{member.pid}/fd"):
            # The name as well, because inode numbers are unique only within a file system.
            if os.readlink(entry.path).endswith(f"/m{slot}.lock") and os.stat(entry.path).st_ino == member.lock:
                return True
    except OSError:
        pass
    return False


def lives_by_pid(pid: int, attached_ns: int) -> bool:
    """Tell whether the process that has the pid is the one that had it at `attached_ns` (monotonic).

    A process that existed at that moment is the same one; only a younger one is another. Compares times since boot,
    which do not change when the clock is set. True if unknown.
    """
    # Imported here, because it is needed only if a file is missing, and a process that looks at a namespace starts
    # faster.
    import psutil

    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    except FileNotFoundError:
        # The process has just ended; or this system has no such file.
        return bool(psutil.pid_exists(pid))
    except (psutil.Error, OSError, ValueError, IndexError):
        return True
    # Ticks count while the machine sleeps, the monotonic clock does not.
    asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return ticks / os.sysconf("SC_CLK_TCK") <= attached_ns / 1e9 + max(0.0, asleep_s) + TICK_S
