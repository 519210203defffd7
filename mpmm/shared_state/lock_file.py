"""One kernel file lock on one descriptor: the only way in which mpmm excludes or watches processes.

`flock` locks belong to the open file description, so a descriptor that is opened by this process and
closed in every child (`fork_hooks`, where it is registered in the act of opening it) makes the lock die with
this process, however it dies. That is what the rest of the package builds on: a member is alive exactly as
long as its lock is held. A child that `fork_hooks` knows nothing of, one of native code say, may have inherited
the descriptor nevertheless; so a lock is given up by unlocking, which ends it for all who have it open.

Exclusive attempts go through `filelock.lock_descriptor`; shared ones, which it does not offer, through
`fcntl.flock` on the same file, with which it contends.

The lock is that of the file, not that of its path. Whoever removes the file leaves the lock where it is, but the next
one who opens the path gets another lock. So whoever relies on a lock checks `is_current`, and whoever holds one puts a
removed file back (`put_back`): the kernel gives no second name to a file that has lost its last one, so the new file is
made under a name that nobody knows, locked, and only then linked to its path. No one ever finds it unlocked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mpmm.errors import LockTimeoutError, RuntimeDirectoryError
from mpmm.interpreter.fork_hooks import close_in_children, closing_guard, fork_guard
from mpmm.interpreter.standard_descriptors import keep_standard_descriptors
from mpmm.shared_state.file_errors import told_by_file

__all__ = ["LockFile", "identity_of", "is_locked", "is_locked_as", "is_open_anywhere", "write_once"]

# Locks that are waited for here are held for milliseconds, by those who join or leave. The first pause is below the
# kernel's timer slack, the last one is such that a crowd of joiners leaves the processors to those who are at work.
FIRST_PAUSE_S = 0.000_02
LONGEST_PAUSE_S = 0.01


# What a file system without flock says: NFS and Lustre as they are mounted in some places, some FUSE file systems.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class LockFile:
    """A file opened for locking. Not thread-safe: the owner adds a mutex where threads share it.

    Where the file system has no such locks, taking one raises RuntimeDirectoryError.
    """

    # As long as nothing has been opened.
    fd = -1
    _pid = 0

    # `put_back` has put it at its path, in this process.
    put_here = False

    def __init__(self, path: str | Path, *, create: bool = True, folder: bool = False) -> None:
        """Open, and create if need be, `path` with mode 0600; symbolic links are refused (RuntimeDirectoryError).

        create: False raises FileNotFoundError instead. folder: `path` is a folder, which is not created.
        """
        # Imported here because who only asks `is_locked` does without, and starts faster.
        from filelock import lock_descriptor, unlock_descriptor

        self._at = path
        self._lock, self._unlock = lock_descriptor, unlock_descriptor
        self._pid = os.getpid()
        with fork_guard:
            keep_standard_descriptors()
            if folder:
                self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            else:
                self.fd = _open_private(path, _OPEN | os.O_CREAT if create else _OPEN)
            close_in_children(self)

    def __del__(self) -> None:
        # An exception from a signal handler has kept its owner from closing it: the lock would be held for ever.
        if self.fd >= 0 and self._pid == os.getpid():
            self.close()

    def try_exclusive(self) -> bool:
        """Take the exclusive lock if it is free; return whether it is held now."""
        try:
            return self._lock(self.fd, blocking=False)
        except OSError as error:
            _raise_what_it_means(error, self._at)

    def take_quickly(self) -> bool:
        """Do what `try_exclusive` does, but return False also where there is something to say against the lock.

        The kernel call alone: with what filelock does around it a transaction takes a microsecond more.
        """
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def give_up_quickly(self) -> None:
        """Give up the lock that `take_quickly` or `try_exclusive` has taken."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        except OSError as error:
            _raise_what_it_means(error, self._at)

    def try_shared(self) -> bool:
        """Take a shared lock if no exclusive one is held; return whether it is held now."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                return False
            _raise_what_it_means(error, self._at)
        return True

    def exclusive(self, timeout_seconds: float) -> None:
        """Take the exclusive lock, waiting for it. Raises LockTimeoutError."""
        self._wait(self.try_exclusive, timeout_seconds)

    def shared(self, timeout_seconds: float) -> None:
        """Take a shared lock, waiting for exclusive ones to end. Raises LockTimeoutError."""
        self._wait(self.try_shared, timeout_seconds)

    def unlock(self) -> None:
        """Give up the lock; the descriptor stays open."""
        try:
            self._unlock(self.fd)
        except OSError as error:
            _raise_what_it_means(error, self._at)

    @property
    def path(self) -> Path:
        """Where the file was opened, or made."""
        return Path(self._at)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the open file."""
        try:
            found = os.fstat(self.fd)
        except OSError as error:
            _raise_what_it_means(error, self._at)
        return found.st_dev, found.st_ino

    def is_current(self) -> bool:
        """Tell whether the path still leads to the open file, and not to nothing or to a newer one."""
        return identity_of(self._at) == self.identity

    def is_replaced(self) -> bool:
        """Tell whether the path leads to another file; False also where nothing is there."""
        return identity_of(self._at) not in (None, self.identity)

    def put_back(self, *, shared: bool = False, replace: bool = False) -> LockFile | None:
        """Return a new file at the path, locked like this one, whose file was removed; this one stays as it is.

        The file is never to be seen unlocked. If there is a file at the path by now, which then is not `put_here`, that
        one is locked and returned, or None if another process keeps us from it. shared: lock it so. replace: put the
        new file into its place, which only the sole owner of the path may.
        Raises OSError, RuntimeDirectoryError.
        """
        draft = self.path.with_name(f".{self.path.name}.{os.urandom(8).hex()}")
        made = LockFile(draft)
        try:
            taken = made.try_shared() if shared else made.try_exclusive()
            if taken and replace:
                os.replace(draft, self.path)
                made.put_here = True
            elif taken:
                try:
                    _link(draft, self.path)
                    made.put_here = True
                except FileExistsError:
                    made.close()
                    made = LockFile(self.path)
                    taken = made.try_shared() if shared else made.try_exclusive()
        except BaseException:
            made.close()
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
        if not taken:
            made.close()
            return None
        made._at = self._at
        return made

    def become(self, other: LockFile) -> None:
        """Be what `other` is from now on, which is closed, and give up what this one was."""
        with fork_guard:
            old, self.fd, other.fd = self.fd, other.fd, -1
            os.close(old)

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
        with closing_guard():
            if self.fd >= 0:
                fd, self.fd = self.fd, -1
                # A program that closes what is not its own has done so already.
                with contextlib.suppress(OSError):
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
    return bool(is_locked_as(path, None))


def is_locked_as(path: str | Path, inode: int | None) -> bool | None:
    """Tell whether the exclusive lock on `path` is held; None if no file of that inode (None: of any) is there."""
    # All of it under the guard, because the lock that a fork in between would hand to the child looks like an owner's.
    with fork_guard:
        try:
            fd = _open_private(path, _OPEN)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            if inode is not None and os.fstat(fd).st_ino != inode:
                return None
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(fd, fcntl.LOCK_UN)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                return True
            _raise_what_it_means(error, path)
        finally:
            os.close(fd)
    return False


def is_open_anywhere(path: str | Path) -> bool:
    """Tell whether any process has a file open or mapped, of whatever user and container; True if it cannot be told.

    A missing file is not. This is to be asked of files of this user, as a process does that removes what is left over.

    The kernel grants a lease for writing on a file that nobody else has open, see `fcntl(2)`, F_SETLEASE. Who opens it
    in the microseconds until the lease is given back waits for so long.
    """
    with fork_guard:
        try:
            fd = os.open(path, _OPEN)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            # Of who waits this process is told by a signal: by SIGIO, which ends it, unless another one is chosen.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            # EAGAIN: somebody has. Another one: this kernel, or a sandbox that stands for one, knows no leases.
            return True
        finally:
            os.close(fd)
    return False


def identity_of(path: str | Path) -> tuple[int, int] | None:
    """Return device and inode of what is at a path, None if nothing is; a symbolic link is not followed."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def write_once(path: Path, text: str) -> bool:
    """Make a file with this text, which is all there at once; return False if there is a file already."""
    if os.path.lexists(path):
        return False
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    fd = _open_private(draft, _OPEN | os.O_CREAT | os.O_EXCL)
    try:
        with told_by_file(draft):
            os.write(fd, text.encode("ascii"))
            _link(draft, path)
    except FileExistsError:
        return False
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
    return True


def _link(draft: Path, path: Path) -> None:
    """Give a file its name. Raises FileExistsError if there is another one."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links. That another process does the same this moment has to be borne there.
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.rename(draft, path)


def _open_private(path: str | Path, flags: int) -> int:
    """Open a file of mode 0600, whatever the umask leaves of that when it is made.

    Raises OSError; RuntimeDirectoryError where that says more, see `file_errors`.
    """
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        fd = _open_nevertheless(path, flags, error)
    if flags & os.O_CREAT and stat.S_IMODE(os.fstat(fd).st_mode) & 0o600 != 0o600:
        os.fchmod(fd, 0o600)
    return fd


def _open_nevertheless(path: str | Path, flags: int, error: OSError) -> int:
    """Open what the first attempt could not because of its mode; raise what the error means otherwise."""
    with told_by_file(path):
        if isinstance(error, PermissionError):
            # Made this instant by a process with a umask that denies even itself, or by one that died then.
            found = os.stat(path, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid():
                os.chmod(path, 0o600)
                return os.open(path, flags, 0o600)
        raise error


def _raise_what_it_means(error: OSError, path: str | Path) -> NoReturn:
    """Raise RuntimeDirectoryError if the file system cannot lock or the file was closed, the error itself otherwise."""
    if error.errno == errno.EBADF:
        raise RuntimeDirectoryError(
            f"this process has lost the lock on {path}: something in it has closed descriptors that are not its own, "
            "as os.closerange and python-daemon do; make managers and shared objects after that, or in a child that is "
            "forked then",
            path=str(path),
        ) from error
    if error.errno not in _UNSUPPORTED:
        raise error
    raise RuntimeDirectoryError(
        f"the file system of {os.path.dirname(path)} refuses locks on files (flock: {error.strerror}), as network file "
        "systems like NFS and Lustre may; set MPMM_RUNTIME_DIR to a folder on a local file system",
        path=str(path),
    ) from error
