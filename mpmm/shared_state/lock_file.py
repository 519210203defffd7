"""One kernel file lock on one descriptor: the only way in which mpmm excludes or watches processes.

`flock` locks belong to the open file description, so a descriptor that is opened by this process and
closed in every child (`fork_hooks`, where it is registered in the act of opening it) makes the lock die with
this process, however it dies. That is what the rest of the package builds on: a member is alive exactly as
long as its lock is held. A child that `fork_hooks` knows nothing of, one of native code say, may have inherited
the descriptor nevertheless; so a lock is given up by unlocking, which ends it for all who have it open.

Exclusive attempts go through `filelock.lock_descriptor`; shared ones, which it does not offer, through
`fcntl.flock` on the same file, with which it contends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from mpmm.errors import LockTimeoutError
from mpmm.fork_hooks import close_in_children, fork_guard

__all__ = ["LockFile", "is_locked"]

# Locks that are waited for here are held for milliseconds, by those who join or leave. The first pause is below the
# kernel's timer slack, the last one is such that a crowd of joiners leaves the processors to those who are at work.
FIRST_PAUSE_S = 0.000_02
LONGEST_PAUSE_S = 0.01


class LockFile:
    """A file opened for locking. Not thread-safe: the owner adds a mutex where threads share it."""

    def __init__(self, path: Path) -> None:
        """Open, and create if need be, `path` with mode 0600; symbolic links are refused (OSError ELOOP)."""
        # Imported here because who only asks `is_locked` does without, and starts faster.
        from filelock import lock_descriptor, unlock_descriptor

        self.path = path
        self._lock, self._unlock = lock_descriptor, unlock_descriptor
        self.fd = -1
        self._pid = os.getpid()
        with fork_guard:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            close_in_children(self)

    def __del__(self) -> None:
        # An exception from a signal handler has kept its owner from closing it: the lock would be held for ever.
        if self.fd >= 0 and self._pid == os.getpid():
            self.close()

    def try_exclusive(self) -> bool:
        """Take the exclusive lock if it is free; return whether it is held now."""
        return self._lock(self.fd, blocking=False)

    def try_shared(self) -> bool:
        """Take a shared lock if no exclusive one is held; return whether it is held now."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                return False
            raise
        return True

    def exclusive(self, timeout_seconds: float) -> None:
        """Take the exclusive lock, waiting for it. Raises LockTimeoutError."""
        self._wait(self.try_exclusive, timeout_seconds)

    def shared(self, timeout_seconds: float) -> None:
        """Take a shared lock, waiting for exclusive ones to end. Raises LockTimeoutError."""
        self._wait(self.try_shared, timeout_seconds)

    def unlock(self) -> None:
        """Give up the lock; the descriptor stays open."""
        self._unlock(self.fd)

    def is_current(self) -> bool:
        """Tell whether the path still leads to the open file, and not to nothing or to a newer one."""
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        here = os.fstat(self.fd)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def close(self) -> None:
        """Give up the lock, whoever else has inherited it, and close the descriptor."""
        if self.fd >= 0:
            # Some file systems refuse what they never granted.
            with contextlib.suppress(OSError):
                self._unlock(self.fd)
            self.forget_after_fork()

    def forget_after_fork(self) -> None:
        """Close the descriptor alone: in a child it is a second handle on the parent's lock, which stays."""
        # Under the guard, because a child forked in between would close a number that is somebody else's by then.
        with fork_guard:
            if self.fd >= 0:
                fd, self.fd = self.fd, -1
                os.close(fd)

    def _wait(self, attempt: Callable[[], bool], timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        pause = FIRST_PAUSE_S
        while not attempt():
            if time.monotonic() >= deadline:
                raise LockTimeoutError(
                    f"the lock {self.path} was not free within {timeout_seconds:g} s",
                    path=str(self.path),
                    timeout_seconds=timeout_seconds,
                    holder_pid=None,
                )
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)


def is_locked(path: str | Path) -> bool:
    """Tell whether some process holds the exclusive lock on `path`; a missing file is not locked.

    The question is asked with a shared lock, so that two askers do not take each other for the owner.
    """
    # All of it under the guard, because the lock that a fork in between would hand to the child looks like an owner's.
    with fork_guard:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(fd, fcntl.LOCK_UN)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                return True
            raise
        finally:
            os.close(fd)
    return False
