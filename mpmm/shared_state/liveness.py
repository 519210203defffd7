"""Whether a member's process lives: by the lock that it holds for life, and by its pid where the lock file is gone.

The evidence is the lock. A file that somebody has removed is none: its holder may live on. Then the process that has
the pid now decides, and if that cannot be told, the member counts as alive.
"""

from __future__ import annotations

import os
import time

from mpmm.shared_state.lock_file import is_locked

__all__ = ["lives_by_pid", "member_lives"]

# A process is younger than its first tick says by so much at most.
TICK_S = 0.05


def member_lives(lock_path: str, pid: int, attached_ns: int) -> bool:
    """Tell whether the member lives that attached at `attached_ns` (monotonic) and holds the lock on a file."""
    if is_locked(lock_path):
        return True
    return not os.path.lexists(lock_path) and lives_by_pid(pid, attached_ns)


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
