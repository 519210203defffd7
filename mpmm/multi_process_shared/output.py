"""A model server's standard output and error: its starter's as long as the starter lives, then a log file.

A server outlives the process that started it. If it kept its starter's pipes open, a program that reads the starter's
output to the end (`subprocess.run(capture_output=True)`, a shell's pipeline) would wait for the server, too. So when
the starter has ended, the server redirects its descriptors 1 and 2 to the file `servers.log` in the registry's folder,
`<runtime directory>/shared/`, to which all servers of the registry append. A server that finds the file longer than
LOG_BYTES renames it to `servers.log.1`, replacing an older one. Processes that the server itself has started keep the
descriptors that they inherited.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

from mpmm.multi_process_shared.registry import start_time_of
from mpmm.shared_state.runtime_dir import SERVERS_LOG

__all__ = ["LOG_BYTES", "Output", "Starter"]

# Servers check the file's length once a second, so it may be longer by what they write in that time.
LOG_BYTES = 1 << 20


class Starter:
    """The process that started this server, watched as long as it lives."""

    def __init__(self, pid: int, start_time: float | None) -> None:
        """Start watching the process; start_time: from `start_time_of`, because the pid may have been reused by now."""
        self.pid = pid
        self._start_time = start_time
        #: A descriptor that becomes readable when the process ends, None if it cannot be had.
        self.fd: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            self.fd = os.pidfd_open(pid)

    def has_ended(self) -> bool:
        """Tell whether the process is gone. A zombie's descriptor is readable, but its pid and start time stay."""
        try:
            return start_time_of(self.pid) != self._start_time
        except OSError:
            # Unknown for now: this process is out of descriptors, say.
            return False

    def close(self) -> None:
        """Stop watching."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Output:
    """Descriptors 1 and 2 of this process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SERVERS_LOG
        self._is_log = False

    def turn_to_log(self, why: str) -> None:
        """Write all further output to the log file, starting with the line `why`."""
        self._is_log = True
        self._open(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
        for stream in (sys.stdout, sys.stderr):
            # Line by line: readers of the file do not wait for the end of this process.
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # typeshed's TextIO has none

    def bound(self) -> None:
        """Switch to a new file if this one is too long, or no longer at its path: removed, or renamed by a server."""
        if not self._is_log:
            return
        with contextlib.suppress(OSError):
            ours = os.fstat(1)
            if not os.path.exists(self._path) or not _is_same(self._path, ours):
                self._open("")
            elif ours.st_size > LOG_BYTES:
                # Two servers may find it too long. The second one finds the lock held, or the file renamed.
                fcntl.flock(1, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    if _is_same(self._path, ours):
                        os.replace(self._path, self._path.with_name(f"{SERVERS_LOG}.1"))
                finally:
                    fcntl.flock(1, fcntl.LOCK_UN)
                self._open("")

    def _open(self, line: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self._path, flags, 0o600)
        except OSError:
            # The registry is gone, or the disk is full: the output is lost, but holds up no request.
            try:
                fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            except OSError:
                # Out of descriptors. If 1 and 2 were closed, other files would get these numbers, so they stay.
                return
        for number in (1, 2):
            os.dup2(fd, number)
        os.close(fd)
        if line:
            with contextlib.suppress(OSError):
                os.write(1, line.encode())


def _is_same(path: Path, found: os.stat_result) -> bool:
    there = os.stat(path, follow_symlinks=False)
    return (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino)
