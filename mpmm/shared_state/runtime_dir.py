"""The runtime directory: where a namespace keeps its lock files, sockets and keys.

A namespace `n` of user 1000 lives in `/tmp/mpmm-1000/n/`, or in `$MPMM_RUNTIME_DIR/n/` where that is
set. Both levels have mode 0700 and belong to the user; anything else there is refused, because whoever
can write the directory can take the locks and impersonate the model servers.

The default is not `$XDG_RUNTIME_DIR`, though that is what it is for. All processes of a user have to come to the same
folder, whatever their environment is, or they keep two sets of accounts of one device and tell nobody. Cron jobs,
`docker exec`, `sudo` and services have no such variable; and `/run/user/<uid>`, to which it leads, comes with the first
login and is removed with the last, under whatever `nohup` has left running. To look into both places does not help: the
folder may come or go between two looks. `/tmp` is there for everybody, and what is removed there are files that nobody
has touched for days and that nobody holds: members hold a lock on the folder, which keeps systemd-tmpfiles out of it,
and touch the files for other cleaners.

The directory can vanish at any moment: the last process that leaves a namespace removes it. Whoever
opens a file in it therefore checks, once the lock on that file is held, that the path still leads to
the file (`LockFile.is_current`), and starts again if not. Who removes it renames it first and looks whether it was the
one that he meant, so that nothing of a newcomer's is deleted by its name. A root that mpmm has made has the sticky bit,
as a mark: it is removed with the last namespace, and one that somebody else has made is not.
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
# The folder of model servers beside those of the namespaces, see `mpmm.multi_process_shared.registry`; with a suffix
# while it is removed.
REGISTRY_FOLDER = "shared"
# In it, what servers say whose starters have ended, see `mpmm.multi_process_shared.output`.
SERVERS_LOG = "servers.log"
# Behind a dot and the namespace's name: a folder that is being removed. No namespace has a name with a dot in front.
GONE = ".gone."
# To remove one takes no longer.
REMOVAL_S = 30.0
# The mode of a root that mpmm has made; the mark means nothing else for a folder that only its owner may write.
MADE_HERE = 0o700 | stat.S_ISVTX
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def default_root() -> Path:
    """Return the folder of all namespaces, an absolute path: `$MPMM_RUNTIME_DIR`, else `/tmp/mpmm-<uid>`.

    It depends neither on TMPDIR, which may differ among processes that share a GPU, nor on the working directory: a
    relative setting is made absolute at its first use, for child processes as well.
    """
    return Path(default_root_text())


def default_root_text() -> str:
    """Return the same as text."""
    chosen = os.environ.get(RUNTIME_DIR_VARIABLE)
    if not chosen:
        return root_below("/tmp")
    if not os.path.isabs(chosen):
        chosen = os.environ[RUNTIME_DIR_VARIABLE] = absolute(chosen)
    return chosen


def absolute(folder: str | Path) -> str:
    """Return the absolute path of a folder that was named. Raises RuntimeDirectoryError where that leads nowhere."""
    try:
        return os.path.abspath(folder)
    except FileNotFoundError as error:
        raise RuntimeDirectoryError(
            f"the runtime directory {os.fspath(folder)!r} is relative to the working directory, which was "
            f"removed; set {RUNTIME_DIR_VARIABLE} to an absolute path",
            path=os.fspath(folder),
        ) from error


def root_below(folder: str, uid: int | None = None) -> str:
    """Return the folder of all namespaces of a user, of this one by default, below `folder`, which others may write."""
    return os.path.join(folder, f"mpmm-{os.getuid() if uid is None else uid}")


def is_namespace_name(name: str) -> bool:
    """Tell whether a namespace may be called so."""
    return _NAME.fullmatch(name) is not None and not name.startswith(".")


class RuntimeDirectory:
    """One namespace's folder, made on demand and checked at every `ensure`."""

    def __init__(self, name: str, root: str | Path | None = None) -> None:
        """Describe the folder of namespace `name`; nothing is created yet.

        Raises InvalidArgumentError for a name that is not 1 to 64 of `A-Z a-z 0-9 _ . -`, or starts
        with a dot; RuntimeDirectoryError for a relative root where the working directory was removed.
        """
        if not isinstance(name, str) or not is_namespace_name(name):
            raise InvalidArgumentError(
                f"namespace {name!r}: expected 1 to 64 characters of A-Z a-z 0-9 _ . - that do not start with a dot"
            )
        self.name = name
        # Text, because a process that has just been forked pays more for the first Path than for a system call.
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

        Raises RuntimeDirectoryError when either is a symbolic link, belongs to another user, may be
        entered by others, or cannot be made.
        """
        try:
            # Mostly it is all there.
            check_private_folder(self.root_text)
            check_private_folder(self.text)
            return
        except RuntimeDirectoryError:
            raise
        except OSError:
            # What is wrong shows when it is to be made.
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
            # Before anything is made in it: it may be somebody else's.
            check_private_folder(folder)

    def file(self, *parts: str) -> Path:
        """Return the path of a file in the folder."""
        return self.path.joinpath(*parts)

    def remove(self, identity: tuple[int, int] | None = None) -> None:
        """Remove the folder and, if it was the last one in it and mpmm has made it, the root. Missing ones are fine.

        Only for whoever has made sure, under the namespace's lifecycle lock, that nobody uses it. identity: device and
        inode of the folder that is meant; another one that is there by now stays.
        """
        if identity is None or identity_of(self.path) == identity:
            gone = self.root / f".{self.name}{GONE}{os.urandom(8).hex()}"
            try:
                with contextlib.suppress(OSError):
                    os.rename(self.path, gone)
                self._end_removal(gone, identity)
            except BaseException:
                # One from a signal handler: nobody else looks for it before `REMOVAL_S`.
                self._end_removal(gone, identity)
                raise
        self.sweep()
        with contextlib.suppress(OSError):
            if os.stat(self.root).st_mode & stat.S_ISVTX:
                # Fails if it is not empty, because a newcomer has just put a folder there: that is fine.
                os.rmdir(self.root)

    def _end_removal(self, gone: Path, identity: tuple[int, int] | None) -> None:
        """Delete a folder that has been renamed, or give it its name back if it is not the one meant."""
        if identity is not None and gone.exists() and identity_of(gone) != identity:
            # Made between the two calls. If there is a third one by now, those in this one notice that theirs is gone
            # and come to that.
            with contextlib.suppress(OSError):
                os.rename(gone, self.path)
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Delete the folders of processes that died while they removed them."""
        for gone in leftovers_in(self.root):
            shutil.rmtree(gone, ignore_errors=True)


def leftovers_in(root: Path) -> list[Path]:
    """Return the folders below a root that somebody has begun to remove, and not ended, some time ago."""
    try:
        with os.scandir(root) as entries:
            found = [entry for entry in entries if entry.name.startswith(".") and GONE in entry.name]
            # Their renaming is the last change of them.
            return [Path(entry.path) for entry in found if time.time() - entry.stat().st_ctime > REMOVAL_S]
    except OSError:
        return []


def _make_folder(folder: Path, mode: int) -> None:
    """Make a folder with this mode, whatever the umask is."""
    folder.mkdir(mode=mode)
    if stat.S_IMODE(os.lstat(folder).st_mode) != mode:
        os.chmod(folder, mode)


def check_private_folder(folder: str | Path) -> None:
    """Raise RuntimeDirectoryError unless `folder` is a real directory of this user with mode 0700."""
    found = os.lstat(folder)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o777:
        # Made this instant by a process with a umask that denies even itself, or by one that died then.
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
