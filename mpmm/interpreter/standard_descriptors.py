"""Standard descriptors that are closed, as in some daemons: mpmm's files never get the numbers 0, 1 and 2.

The kernel gives an open file the lowest free number. So in a process without a standard error, the next file that is
opened becomes it, and anything that a C library or a child process writes there ends up in that file: in a lock file,
a connection, or the segment that all processes share.
"""

from __future__ import annotations

import os

__all__ = ["keep_standard_descriptors"]


def keep_standard_descriptors() -> None:
    """Open the null device as each standard descriptor that is closed; call this before opening a file that stays open.

    Does nothing if it cannot be opened: then the file cannot be opened either, and that error says why.
    """
    if all(map(_is_open, range(3))):
        return
    try:
        while (fd := _open_nothing()) <= 2:
            # Child processes inherit it, as they inherit standard descriptors from any other program.
            os.set_inheritable(fd, True)
        os.close(fd)
    except OSError:
        pass


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open_nothing() -> int:
    try:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # In a sandbox without devices. A folder can neither be read nor written as a file.
        return os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
