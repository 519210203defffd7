"""Where a model server's standard output and error go: to its starter while that lives, then to a log file.

A server outlives the process that started it. If it kept that one's pipes open, a program that reads the starter's
output to its end (`subprocess.run(capture_output=True)`, a shell's pipeline) would wait for the server, too. So when
the starter has ended, the server's descriptors 1 and 2 become those of the file `servers.log` in the registry's folder,
`<runtime directory>/shared/`, which all servers of the registry append to. A server that finds it longer than LOG_BYTES
renames it to `servers.log.1`, in place of an older one. What the server itself has started keeps what it inherited.
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

# A server looks at the file's length once a second, so it may be longer by what is said in that time.
LOG_BYTES = 1 << 20


class Starter:
    """The process that had this server started, as long as it lives."""

    def __init__(self, pid: int, start_time: float | None) -> None:
        """Begin to watch the process; start_time: of `start_time_of`, because the pid may be another one's by now."""
        self.pid = pid
        self._start_time = start_time
        #: A descriptor that becomes readable at the process's end, None where there are none.
        self.fd: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            self.fd = os.pidfd_open(pid)

    def has_ended(self) -> bool:
        """Tell whether the process is gone. A zombie's descriptor is readable, but its pid and start time stay."""
        try:
            return start_time_of(self.pid) != self._start_time
        except OSError:
            # No descriptor is to be had for the look, say: that cannot be told now.
            return False

    def close(self) -> None:
        """Watch it no more."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Output:
    """Descriptors 1 and 2 of this process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SERVERS_LOG
        self._is_log = False

    def turn_to_log(self, why: str) -> None:
        """Let everything that is written from now on go to the log file, with `why` as its first line."""
        self._is_log = True
        self._open(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
        for stream in (sys.stdout, sys.stderr):
            # No program reads the file by waiting for the end of this process.
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # typeshed's TextIO has none

    def bound(self) -> None:
        """Begin a new file if the present one is too long, or another server has begun one."""
        if not self._is_log:
            return
        with contextlib.suppress(OSError):
            ours = os.fstat(1)
            if os.path.exists(self._path) and not _is_same(self._path, ours):
                self._open("")
            elif ours.st_size > LOG_BYTES:
                # Two may have seen the same. The second one finds the lock held, or the file renamed.
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
            # The registry is gone, or the disk is full: what is said then is lost, but holds up no request.
            try:
                fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            except OSError:
                # Out of descriptors. Closed ones would be taken for something else, so it stays as it is.
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
