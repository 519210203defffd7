"""One kernel file lock on one descriptor: the only way in which mpmm excludes or watches processes.

`flock` locks belong to the open file description. This process opens the descriptor, and every child closes it
(`fork_hooks`, which registers it in the act of opening it), so the lock dies with this process, however it dies. The
rest of the package builds on that: a member is alive exactly as long as its lock is held. A child that `fork_hooks`
does not see, such as one that native code forks, may still inherit the descriptor; so a lock is released by unlocking,
which ends it for every process that has it open.

Exclusive attempts use `filelock.lock_descriptor`; shared ones, which it does not offer, use `fcntl.flock` on the same
file, so that the two exclude each other.

The lock belongs to the file, not to its path. If the file is removed, its lock stays, but the next process that opens
the path gets another lock. So a process that relies on a lock checks `is_current`, and one that holds a lock puts a
removed file back (`put_back`): the kernel gives no new name to a file that has lost its last one, so a new file is made
under a random name, locked, and only then linked to its path. No process ever finds it unlocked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from mpmm.errors import LockTimeoutError, RuntimeDirectoryError
from mpmm.interpreter.fork_hooks import close_in_children, closing_guard, fork_guard
from mpmm.interpreter.standard_descriptors import keep_standard_descriptors
from mpmm.shared_state.file_errors import told_by_file

__all__ = [
    *("LockFile", "identity_of", "is_locked", "is_locked_as", "is_open_anywhere", "say_who_holds", "write_once"),
]

# Locks that are waited for here are held for milliseconds, by processes that join or leave. The first pause is below
# the kernel's timer slack; the last one keeps a crowd of joiners from taking the processors from busy processes.
FIRST_PAUSE_S = 0.000_02
LONGEST_PAUSE_S = 0.01
# The error of a lock that many share does not name all of them.
PROCESSES_NAMED = 5

# Errors of file systems without flock: NFS and Lustre with some mount options, some FUSE file systems.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Python opens every file close-on-exec.
_OPEN = os.O_RDWR | os.O_NOFOLLOW


class LockFile:
    """A file opened for locking. Not thread-safe: the owner adds a mutex where threads share it.

    If the file system has no such locks, taking one raises RuntimeDirectoryError.
    """

    # Until a file was opened.
    fd = -1
    _pid = 0

    # Whether this process has put the file at its path, by `put_back`.
    put_here = False

    def __init__(self, path: str | Path, *, create: bool = True, folder: bool = False) -> None:
        """Open `path`, or create it with mode 0600; a symbolic link is refused (RuntimeDirectoryError).

        create: False raises FileNotFoundError instead. folder: `path` is a folder, which is not created.
        """
        # Imported here, so that a process which only calls `is_locked` starts faster.
        from filelock import lock_descriptor, unlock_descriptor

        self._at = path
        self._lock, self._unlock = lock_descriptor, unlock_descriptor
        self._pid = os.getpid()
        with fork_guard:
            keep_standard_descriptors()
            if folder:
                self.fd = os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW)
            else:
                self.fd = _open_private(path, _OPEN | os.O_CREAT if create else _OPEN)
            close_in_children(self)

    def __del__(self) -> None:
        # If an exception from a signal handler kept the owner from closing it, the lock would be held for ever.
        if self.fd >= 0 and self._pid == os.getpid():
            self.close()

    def try_exclusive(self) -> bool:
        """Take the exclusive lock if it is free; return whether it is held now."""
        try:
            return self._lock(self.fd, blocking=False)
        except OSError as error:
            _raise_what_it_means(error, self._at)

    def take_quickly(self) -> bool:
        """Do what `try_exclusive` does, but return False for errors, too.

        Only the kernel call: filelock's work around it would cost a transaction another microsecond.
        """
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def give_up_quickly(self) -> None:
        """Release the lock that `take_quickly` or `try_exclusive` has taken."""
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
        """Release the lock; the descriptor stays open."""
        try:
            self._unlock(self.fd)
        except OSError as error:
            _raise_what_it_means(error, self._at)

    @property
    def path(self) -> Path:
        """Where the file was opened or made."""
        return Path(self._at)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the open file."""
        try:
            found = os.fstat(self.fd)
        except OSError as error:
            _raise_what_it_means(error, self._at)
        return found.st_dev, found.st_ino

    def holders(self) -> list[int]:
        """Return the pids of the processes that have taken a lock on the file; empty if that is unknown.

        The kernel lists for each lock the process that took it: this one may have ended, if another one has inherited
        the descriptor. It leaves out processes of containers that it does not show here. Some sandboxes have no such
        list; and for a file on overlayfs it may have other numbers than `fstat`.
        """
        device, inode = self.identity
        file = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
        try:
            # 3: FLOCK  ADVISORY  WRITE 4711 fe:00:2318703 0 EOF; an attempt that waits has an arrow before FLOCK.
            with open("/proc/locks", encoding="ascii") as locks:
                entries = [line.split() for line in locks]
            return sorted({int(entry[4]) for entry in entries if entry[1] == "FLOCK" and entry[5] == file})
        except (OSError, ValueError, IndexError):
            return []

    def is_current(self) -> bool:
        """Tell whether the path still leads to the open file, and not to another one or none."""
        return identity_of(self._at) == self.identity

    def is_replaced(self) -> bool:
        """Tell whether the path leads to another file; False if it leads to none."""
        return identity_of(self._at) not in (None, self.identity)

    def put_back(self, *, shared: bool = False, replace: bool = False, text: bytes = b"") -> LockFile | None:
        """Put a new, locked file at the path, from which this one's file was removed, and return it; keep this one.

        No process ever sees the new file unlocked. If there already is a file at the path, that file, which is not
        `put_here`, is locked and returned; or None if another process has locked it. shared: take a shared lock.
        replace: replace a file that is there, which only the sole owner of the path may do. text: what a new file says
        from the start. Raises OSError, RuntimeDirectoryError.
        """
        draft = self.path.with_name(f".{self.path.name}.{os.urandom(8).hex()}")
        made = LockFile(draft)
        try:
            taken = made.try_shared() if shared else made.try_exclusive()
            if text:
                with told_by_file(draft):
                    os.write(made.fd, text)
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
        """Take over the descriptor of `other`, which counts as closed from now on, and close our own."""
        with fork_guard:
            old, self.fd, other.fd = self.fd, other.fd, -1
            os.close(old)

    def close(self) -> None:
        """Release the lock, even if a child has inherited it, and close the descriptor."""
        if self.fd >= 0:
            # A file system that grants no locks may refuse to release them.
            with contextlib.suppress(OSError):
                self._unlock(self.fd)
            self.forget_after_fork()

    def forget_after_fork(self) -> None:
        """Only close the descriptor: in a child it is a second handle on the parent's lock, which stays."""
        # Under the guard, because a child forked in between would close a number that another file has by then.
        with closing_guard():
            if self.fd >= 0:
                fd, self.fd = self.fd, -1
                # A program that closes descriptors which it does not own may have closed it already.
                with contextlib.suppress(OSError):
                    os.close(fd)

    def _wait(self, attempt: Callable[[], bool], timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        pause = FIRST_PAUSE_S
        while not attempt():
            if time.monotonic() >= deadline:
                holders = self.holders()
                raise LockTimeoutError(
                    f"the lock {self.path} was not free within {timeout_seconds:g} s{say_who_holds(holders)}",
                    path=str(self.path),
                    timeout_seconds=timeout_seconds,
                    holder_pid=holders[0] if holders else None,
                )
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)


def say_who_holds(pids: Sequence[int]) -> str:
    """Return the end of an error's text, about the processes that hold a lock; empty if there are none."""
    if len(pids) < 2:
        return "".join(f"; process {pid} holds it (is it stopped?)" for pid in pids)
    named = ", ".join(map(str, pids[:PROCESSES_NAMED])) + (", ..." if len(pids) > PROCESSES_NAMED else "")
    return f"; processes {named} hold it (are they stopped?)"


def is_locked(path: str | Path) -> bool:
    """Tell whether some process holds the exclusive lock on `path`; a missing file is not locked.

    It tries a shared lock, so that two processes that ask do not take each other for the owner.
    """
    return bool(is_locked_as(path, None))


def is_locked_as(path: str | Path, inode: int | None) -> bool | None:
    """Tell whether the exclusive lock on `path` is held; None if there is no file (of `inode`, if given)."""
    # All of it under the guard: a child forked in between would inherit the lock, and look like its owner.
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
    """Tell whether any process, of any user and container, has a file open or mapped; True if that is unknown.

    False for a missing file. Meant for files of this user, when a process removes what is left over.

    The kernel grants a lease for writing on a file that no other process has open, see `fcntl(2)`, F_SETLEASE. A
    process that opens it in the microseconds until the lease is given back waits for that.
    """
    with fork_guard:
        try:
            fd = os.open(path, _OPEN)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            # The kernel signals this process when another one waits: by default with SIGIO, which would end it.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            # EAGAIN: another process has it open. Any other error: this kernel, or sandbox, has no leases.
            return True
        finally:
            os.close(fd)
    return False


def identity_of(path: str | Path) -> tuple[int, int] | None:
    """Return device and inode of the file at a path, None if there is none; a symbolic link is not followed."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def write_once(path: Path, text: str) -> bool:
    """Make a file that has this text from the start; return False if there already is one."""
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
    """Give a file its name. Raises FileExistsError if another file has that."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links. There a process that does the same at this moment may overwrite the file.
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.rename(draft, path)


def _open_private(path: str | Path, flags: int) -> int:
    """Open a file of mode 0600, regardless of the umask if it is made.

    Raises OSError; RuntimeDirectoryError if that says more, see `file_errors`.
    """
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        with told_by_file(path):
            # Not raised by a function that has it as an argument: error, traceback and frame would keep each other, and
            # all callers' frames with what these refer to, until garbage is collected. Most errors say that no server
            # has the lock.
            if not (isinstance(error, PermissionError) and _has_made_accessible(path)):
                raise
            fd = os.open(path, flags, 0o600)
    if flags & os.O_CREAT and stat.S_IMODE(os.fstat(fd).st_mode) & 0o600 != 0o600:
        os.fchmod(fd, 0o600)
    return fd


def _has_made_accessible(path: str | Path) -> bool:
    """Let this user use a file of its own.

    A process whose umask denies even itself is making it right now, or died meanwhile.
    """
    found = os.lstat(path)
    if not (stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()):
        return False
    os.chmod(path, 0o600)
    return True


def _raise_what_it_means(error: OSError, path: str | Path) -> NoReturn:
    """Raise RuntimeDirectoryError if the file system cannot lock or the file was closed, the error itself otherwise."""
    if error.errno == errno.EBADF:
        raise RuntimeDirectoryError(
            f"this process has lost the lock on {path}: some code in it has closed descriptors that it does not own, "
            "as os.closerange and python-daemon do; make managers and shared objects after that, or in a child forked "
            "after that",
            path=str(path),
        ) from error
    if error.errno not in _UNSUPPORTED:
        try:
            raise error
        finally:
            # See `_open_private`.
            del error
    raise RuntimeDirectoryError(
        f"the file system of {os.path.dirname(path)} refuses locks on files (flock: {error.strerror}), as network file "
        "systems like NFS and Lustre may; set MPMM_RUNTIME_DIR to a folder on a local file system",
        path=str(path),
    ) from error
