"""The runtime directory: where a namespace keeps its lock files, sockets and keys.

A namespace `n` of user 1000 lives in `/tmp/mpmm-1000/n/`, or in `$MPMM_RUNTIME_DIR/n/` if that is set. Both levels have
mode 0700 and belong to the user; anything else there is refused, because a user who can write the directory can take
the locks and impersonate the model servers.

The default is not `$XDG_RUNTIME_DIR`, though that is meant for such files. All processes of a user have to find the
same folder, whatever their environment, or they silently keep two sets of accounts of one device. Cron jobs,
`docker exec`, `sudo` and services have no such variable; and `/run/user/<uid>`, to which it leads, is made at the first
login and removed at the last logout, even if `nohup` has left processes running. Looking into both places does not
help: the folder may come or go between two looks. `/tmp` is always there, and cleaners only remove files there that
have not been touched for days and that no process holds: members hold a lock on the folder, which keeps
systemd-tmpfiles out of it, and touch the files for other cleaners.

The directory can vanish at any moment: the last process that leaves a namespace removes it. So a process that opens a
file in it checks, once it has the lock on that file, that the path still leads to the file (`LockFile.is_current`), and
starts again if not. A process that removes the directory renames it first and checks that it is the right one, so that
it never deletes a newcomer's by name. mpmm marks a root that it has made by the sticky bit: such a root is removed with
the last namespace, any other root is kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
from pathlib import Path

from mpmm.errors import InvalidArgumentError, RuntimeDirectoryError
from mpmm.shared_state.file_errors import reason_of
from mpmm.shared_state.lock_file import identity_of

__all__ = ["REGISTRY_FOLDER", "RuntimeDirectory", "default_root"]

RUNTIME_DIR_VARIABLE = "MPMM_RUNTIME_DIR"
# The model servers' folder, beside those of the namespaces, see `mpmm.multi_process_shared.registry`; it has a suffix
# while it is being removed.
REGISTRY_FOLDER = "shared"
# In it, the output of servers whose starters have ended, see `mpmm.multi_process_shared.output`.
SERVERS_LOG = "servers.log"
# Follows a dot and the namespace's name in the name of a folder that is being removed. No namespace's name begins with
# a dot.
GONE = ".gone."
# Removing a folder takes no longer than this.
REMOVAL_S = 30.0
# The mode of a root that mpmm has made; the sticky bit has no other effect on a folder that only its owner may write.
MADE_HERE = 0o700 | stat.S_ISVTX
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def default_root() -> Path:
    """Return the folder of all namespaces, an absolute path: `$MPMM_RUNTIME_DIR`, else `/tmp/mpmm-<uid>`.

    It depends neither on TMPDIR, which may differ among processes that share a GPU, nor on the working directory: a
    relative setting is made absolute at its first use, for child processes as well.
    """
    return Path(default_root_text())


def default_root_text() -> str:
    """Return `default_root` as text."""
    chosen = os.environ.get(RUNTIME_DIR_VARIABLE)
    if not chosen:
        return root_below("/tmp")
    if not os.path.isabs(chosen):
        chosen = os.environ[RUNTIME_DIR_VARIABLE] = absolute(chosen)
    return chosen


def absolute(folder: str | Path) -> str:
    """Return the absolute path of a folder. Raises RuntimeDirectoryError if the working directory was removed."""
    try:
        return os.path.abspath(folder)
    except FileNotFoundError as error:
        raise RuntimeDirectoryError(
            f"the runtime directory {os.fspath(folder)!r} is relative to the working directory, which was "
            f"removed; set {RUNTIME_DIR_VARIABLE} to an absolute path",
            path=os.fspath(folder),
        ) from error


def root_below(folder: str, uid: int | None = None) -> str:
    """Return the folder of all namespaces of a user (default: this one) below `folder`, which others may write, too."""
    return os.path.join(folder, f"mpmm-{os.getuid() if uid is None else uid}")


def is_namespace_name(name: str) -> bool:
    """Tell whether a namespace may have this name."""
    return _NAME.fullmatch(name) is not None and not name.startswith(".")


class RuntimeDirectory:
    """One namespace's folder, made on demand and checked at every `ensure`."""

    def __init__(self, name: str, root: str | Path | None = None) -> None:
        """Describe the folder of namespace `name`; nothing is created yet.

        Raises InvalidArgumentError for a name that is not 1 to 64 of `A-Z a-z 0-9 _ . -`, or starts with a dot;
        RuntimeDirectoryError for a relative root if the working directory was removed.
        """
        if not isinstance(name, str) or not is_namespace_name(name):
            raise InvalidArgumentError(
                f"namespace {name!r}: expected 1 to 64 characters of A-Z a-z 0-9 _ . - that do not start with a dot"
            )
        self.name = name
        # Text, because in a newly forked process the first Path costs more than a system call.
        self.root_text = absolute(default_root_text() if root is None else root)
        self.text = os.path.join(self.root_text, name)

    def __repr__(self) -> str:
        return f"RuntimeDirectory({self.text!r})"

    @property
    def root(self) -> Path:
        """The folder of all namespaces."""
        return Path(self.root_text)

    @property
    def path(self) -> Path:
        """The folder itself."""
        return Path(self.text)

    def ensure(self) -> None:
        """Create the folder and its parent, or check that they are ours.

        Raises RuntimeDirectoryError if either is a symbolic link, belongs to another user, is open to other users, or
        cannot be made.
        """
        try:
            # Usually both are there.
            check_private_folder(self.root_text)
            check_private_folder(self.text)
            return
        except RuntimeDirectoryError:
            raise
        except OSError:
            # Making them, below, shows what is wrong.
            pass
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._make()
            except FileNotFoundError:
                # The last member of another namespace removed the empty parent between our two calls.
                self._make()
        except RuntimeDirectoryError:
            raise
        except OSError as error:
            why = reason_of(error, self.path)
            raise RuntimeDirectoryError(
                f"cannot create the runtime directory {self.path}: {error.strerror}{f': {why}' if why else ''}; "
                f"set {RUNTIME_DIR_VARIABLE} to a folder that this user can write",
                path=str(self.path),
            ) from error

    def _make(self) -> None:
        for folder, mode in ((self.root, MADE_HERE), (self.path, 0o700)):
            with contextlib.suppress(FileExistsError):
                _make_folder(folder, mode)
            # Before anything is made in it: another user may own it.
            check_private_folder(folder)

    def file(self, *parts: str) -> Path:
        """Return the path of a file in the folder."""
        return self.path.joinpath(*parts)

    def remove(self, identity: tuple[int, int] | None = None) -> None:
        """Remove the folder, and the root if that then is empty and mpmm has made it. Missing ones are fine.

        The caller must have made sure, under the namespace's lifecycle lock, that no process uses it. identity: device
        and inode of the folder to remove; another folder that is there by now stays.
        """
        if identity is None or identity_of(self.path) == identity:
            gone = self.root / f".{self.name}{GONE}{os.urandom(8).hex()}"
            try:
                with contextlib.suppress(OSError):
                    os.rename(self.path, gone)
                self._end_removal(gone, identity)
            except BaseException:
                # An exception from a signal handler: other processes would sweep the folder only after `REMOVAL_S`.
                self._end_removal(gone, identity)
                raise
        self.sweep()
        self.remove_empty_root()

    def remove_empty_root(self) -> None:
        """Remove the root if it is empty and mpmm has made it."""
        with contextlib.suppress(OSError):
            if os.stat(self.root).st_mode & stat.S_ISVTX:
                # Fails if a newcomer has just made a folder in it, which is fine.
                os.rmdir(self.root)

    def _end_removal(self, gone: Path, identity: tuple[int, int] | None) -> None:
        """Delete a folder that was renamed, or give it its name back if it is not the folder to remove."""
        if identity is not None and identity_of(gone) != identity:
            # It was made between the two calls. If there is a third one by now, or none was renamed, this fails; the
            # processes in this one notice that theirs is gone, and join the third.
            with contextlib.suppress(OSError):
                os.rename(gone, self.path)
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Delete the folders that processes were removing when they died."""
        for gone in leftovers_in(self.root):
            shutil.rmtree(gone, ignore_errors=True)


def leftovers_in(root: Path) -> list[Path]:
    """Return the folders below a root whose removal began longer than `REMOVAL_S` ago and never ended."""
    try:
        with os.scandir(root) as entries:
            found = [entry for entry in entries if entry.name.startswith(".") and GONE in entry.name]
            # Their renaming was their last change.
            return [Path(entry.path) for entry in found if time.time() - entry.stat().st_ctime > REMOVAL_S]
    except OSError:
        return []


def _make_folder(folder: Path, mode: int) -> None:
    """Make a folder with this mode, regardless of the umask."""
    folder.mkdir(mode=mode)
    if stat.S_IMODE(os.lstat(folder).st_mode) != mode:
        os.chmod(folder, mode)


def check_private_folder(folder: str | Path) -> None:
    """Raise RuntimeDirectoryError unless `folder` is a real directory of this user with mode 0700."""
    found = os.lstat(folder)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o777:
        # A process whose umask denies even itself is making it right now, or died meanwhile.
        os.chmod(folder, 0o700 | stat.S_IMODE(found.st_mode))
        found = os.lstat(folder)
    problem = None
    if not stat.S_ISDIR(found.st_mode):
        problem = "is not a directory (a symbolic link is not followed)"
    elif found.st_uid != os.getuid():
        problem = f"belongs to uid {found.st_uid}, not to {os.getuid()}"
    elif stat.S_IMODE(found.st_mode) & 0o077:
        problem = f"has mode {stat.S_IMODE(found.st_mode):04o}, expected 0700"
    if problem:
        raise RuntimeDirectoryError(
            f"the runtime directory {folder} {problem}; remove it, or set {RUNTIME_DIR_VARIABLE} to a private folder",
            path=str(folder),
        )
