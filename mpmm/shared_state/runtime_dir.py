"""The runtime directory: where a namespace keeps its lock files, sockets and keys.

A namespace `n` of user 1000 lives in `/tmp/mpmm-1000/n/`, or in `$MPMM_RUNTIME_DIR/n/` where that is
set. Both levels have mode 0700 and belong to the user; anything else there is refused, because whoever
can write the directory can take the locks and impersonate the model servers.

The directory can vanish at any moment: the last process that leaves a namespace removes it. Whoever
opens a file in it therefore checks, once the lock on that file is held, that the path still leads to
the file (`LockFile.is_current`), and starts again if not.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from mpmm.errors import InvalidArgumentError, RuntimeDirectoryError

__all__ = ["ROOM_NAME", "RuntimeDirectory", "default_root"]

RUNTIME_DIR_VARIABLE = "MPMM_RUNTIME_DIR"
# The folder of model servers beside those of the namespaces, see `mpmm.proxy.room`; with a suffix while it is removed.
ROOM_NAME = "shared"
# In it, what servers say whose starters have ended, see `mpmm.proxy.output`.
SERVERS_LOG = "servers.log"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def default_root() -> Path:
    """Return the folder of all namespaces, an absolute path: `$MPMM_RUNTIME_DIR`, else `/tmp/mpmm-<uid>`.

    It depends neither on TMPDIR, which may differ among processes that share a GPU, nor on the working directory: a
    relative setting is made absolute at its first use, for child processes as well.
    """
    chosen = os.environ.get(RUNTIME_DIR_VARIABLE)
    if not chosen:
        return root_below(Path("/tmp"))
    if not os.path.isabs(chosen):
        chosen = os.environ[RUNTIME_DIR_VARIABLE] = os.path.abspath(chosen)
    return Path(chosen)


def root_below(folder: Path) -> Path:
    """Return the folder of all namespaces of this user below `folder`, which others may write too."""
    return folder / f"mpmm-{os.getuid()}"


class RuntimeDirectory:
    """One namespace's folder, made on demand and checked at every `ensure`."""

    def __init__(self, name: str, root: Path | None = None) -> None:
        """Describe the folder of namespace `name`; nothing is created yet.

        Raises InvalidArgumentError for a name that is not 1 to 64 of `A-Z a-z 0-9 _ . -`, or starts
        with a dot.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("."):
            raise InvalidArgumentError(
                f"namespace {name!r}: expected 1 to 64 characters of A-Z a-z 0-9 _ . - that do not start with a dot"
            )
        self.name = name
        self.root = default_root() if root is None else Path(os.path.abspath(root))
        self.path = self.root / name

    def __repr__(self) -> str:
        return f"RuntimeDirectory({str(self.path)!r})"

    def ensure(self) -> None:
        """Create the folder and its parent, or check that they are ours.

        Raises RuntimeDirectoryError when either is a symbolic link, belongs to another user, may be
        entered by others, or cannot be made.
        """
        try:
            # Mostly it is all there.
            check_private_folder(self.root)
            check_private_folder(self.path)
            return
        except RuntimeDirectoryError:
            raise
        except OSError:
            # What is wrong shows when it is to be made.
            pass
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            try:
                for folder in (self.root, self.path):
                    with contextlib.suppress(FileExistsError):
                        folder.mkdir(mode=0o700)
                    check_private_folder(folder)
            except FileNotFoundError:
                # The last member of another namespace removed the empty parent between our two calls.
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.path.mkdir(mode=0o700, exist_ok=True)
                check_private_folder(self.path)
        except RuntimeDirectoryError:
            raise
        except OSError as error:
            raise RuntimeDirectoryError(
                f"cannot create the runtime directory {self.path}: {error.strerror}; "
                f"set {RUNTIME_DIR_VARIABLE} to a folder that this user can write",
                path=str(self.path),
            ) from error

    def file(self, *parts: str) -> Path:
        """Return the path of a file in the folder."""
        return self.path.joinpath(*parts)

    def remove(self) -> None:
        """Remove the folder and, if no other namespace is in it, the parent. Missing ones are fine.

        Only for whoever has made sure, under the namespace's lifecycle lock, that nobody uses it.
        """
        if not self.path.is_dir():
            return
        for parent, folders, files in os.walk(self.path, topdown=False):
            for name in files:
                _ignore_missing(os.unlink, os.path.join(parent, name))
            for name in folders:
                _ignore_missing(os.rmdir, os.path.join(parent, name))
        _ignore_missing(os.rmdir, self.path)
        _ignore_missing(os.rmdir, self.root)


def check_private_folder(folder: Path) -> None:
    """Raise RuntimeDirectoryError unless `folder` is a real directory of this user with mode 0700."""
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


def _ignore_missing(action: Callable[[str | Path], None], path: str | Path) -> None:
    # Gone already, or not empty because a newcomer has just put a file there: both are fine.
    with contextlib.suppress(OSError):
        action(path)
