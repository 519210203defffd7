"""Whether a member's process lives: by the lock that it holds for life, and by its pid where the lock file is gone.

The evidence is the lock. A file that somebody has removed is none, and neither is one that somebody has put in its
place: the holder of the first may live on. Then the process that has the pid now decides, and if that cannot be told,
the member counts as alive.
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

# A process is younger than its first tick says by so much at most.
TICK_S = 0.05


def member_lives(lock_path: str, inode: int, pid: int, attached_ns: int, pids_of: int) -> bool:
    """Tell whether the member lives that attached at `attached_ns` (monotonic) and holds the lock on a file.

    inode: that of the lock file. pids_of: the pid namespace in which `pid` means something, see `pid_namespace`.
    """
    locked = is_locked_as(lock_path, inode)
    if locked is not None:
        return locked
    return pids_of != pid_namespace() or lives_by_pid(pid, attached_ns)


def member_of_row_lives(tables: Tables, slot: int, lock_path: str) -> bool:
    """Tell whether the member in a used row lives, by the row and its lock file."""
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
    folder: Path | None,
    kinds: tuple[int, ...] = (Member.WORKER, Member.SERVER, Member.GUEST),
) -> bool:
    """Tell whether a member of one of these kinds lives; folder: where the lock files are, None if they are gone."""
    words = tables.segment.words
    return any(
        words[tables.member(slot) + Member.STATE] in kinds
        # What is not there is what a file in no folder is.
        and member_of_row_lives(tables, slot, f"{folder}/m{slot}.lock" if folder else "/dev/null/m.lock")
        for slot in tables.used_members()
    )


@cache
def pid_namespace() -> int:
    """Return a number for the set of processes that this one can tell by pid, 0 if there is no such number."""
    # A forked child may be moved to a new one, but its children only.
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def is_member_here(tables: Tables, slot: int) -> bool:
    """Tell whether the process that has a member's pid here is that member, and not one of another container.

    Where there are members in several containers, it is if it has the member's lock file open. False if that cannot be
    told.
    """
    member = tables.members[slot]
    if pid_namespace() in (0, tables.header.pid_namespace):
        return True
    try:
        for entry in os.scandir(f"/proc/{member.pid}/fd"):
            # Numbers of files are used once on each file system only.
            if os.readlink(entry.path).endswith(f"/m{slot}.lock") and os.stat(entry.path).st_ino == member.lock:
                return True
    except OSError:
        pass
    return False


def lives_by_pid(pid: int, attached_ns: int) -> bool:
    """Tell whether the process that has the pid is the one that had it at `attached_ns` (monotonic).

    A process that was there at that moment is that one, so only a younger one is another. Times since the machine's
    start are compared, which no setting of the clock moves. True if it cannot be told.
    """
    # Imported here because it is needed only where a file is missing, and who looks at a namespace starts faster.
    import psutil

    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    except FileNotFoundError:
        # It has ended just now; or there is no such file on this system.
        return bool(psutil.pid_exists(pid))
    except (psutil.Error, OSError, ValueError, IndexError):
        return True
    # The one clock goes on while the machine sleeps, the other does not.
    asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return ticks / os.sysconf("SC_CLK_TCK") <= attached_ns / 1e9 + max(0.0, asleep_s) + TICK_S
