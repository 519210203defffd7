"""Explains the system's errors about mpmm's own files: who owns them, what is wrong there, what to change.

`[Errno 13] Permission denied` names a file that the reader has never heard of. `told_by_file` turns it into an error
that says who owns the file, or the folder above it that denies access, and which setting chooses another place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from mpmm.errors import MpmmError, RuntimeDirectoryError

__all__ = ["file_error", "reason_of", "told_by_file"]

_REFUSED = (errno.EACCES, errno.EPERM)
# Lasting problems of the file system or the path. Errors that pass, or are the process's own, such as too few
# descriptors, keep the system's text; so does a missing file, which callers handle.
_LASTING: dict[int | None, str] = {
    errno.EROFS: "nothing can be written there",
    errno.ENOSPC: "free space (or inodes) there",
    errno.EDQUOT: "free space there",
    errno.EFBIG: "the process's limit on the size of files (ulimit -f) is too low",
    errno.EIO: "its disk does not answer",
    errno.ELOOP: "a symbolic link is not followed",
    errno.ENAMETOOLONG: "choose a shorter path",
}


@contextlib.contextmanager
def told_by_file(path: str | Path) -> Iterator[None]:
    """Raise `file_error` instead of the system's error, if that says more; path: in case the error names no file."""
    try:
        yield
    except OSError as error:
        told = file_error(error, path)
        try:
            if told is error:
                raise
            raise told from error
        finally:
            # Otherwise this frame, which is in its traceback, and the error would keep each other.
            del told


def file_error(error: OSError, path: str | Path) -> OSError:
    """Return a RuntimeDirectoryError that explains an error, or the error itself if there is nothing to explain."""
    if isinstance(error, MpmmError) or not (why := reason_of(error, path)):
        return error
    at = _place_of(error, path)
    return RuntimeDirectoryError(
        f"{at} cannot be used: {error.strerror}: {why}; or set MPMM_RUNTIME_DIR (--runtime-root) to a private folder "
        "of this user",
        path=at,
    )


def reason_of(error: OSError, path: str | Path) -> str:
    """Return the cause of an error about a file and what to do about it, "" if unknown."""
    if error.errno in _REFUSED:
        return _who_refuses(_place_of(error, path))
    return _LASTING.get(error.errno, "")


def _place_of(error: OSError, path: str | Path) -> str:
    return os.fsdecode(error.filename if isinstance(error.filename, (str, bytes, os.PathLike)) else path)


def _who_refuses(path: str) -> str:
    """Say who owns the first folder on the way to a path, or the path itself, that this user may not use."""
    path = os.path.abspath(path)
    way = [path, *map(str, Path(path).parents)][::-1]
    for place, then in zip(way, (*way[1:], None), strict=True):
        try:
            found = os.lstat(place)
        except OSError:
            break
        if then is None:
            wanted = os.R_OK | os.W_OK
        else:
            # If the next part is missing, the process wanted to make it.
            wanted = os.X_OK if not os.access(place, os.X_OK) or os.path.lexists(then) else os.W_OK
        if not os.access(place, wanted):
            what_to_do = f"change its mode ({stat.S_IMODE(found.st_mode):04o})"
            if found.st_uid != os.geteuid():
                what_to_do = "run it as the user who owns that"
            return (
                f"{place} belongs to {_name_of(found.st_uid)}, and this process runs as {_name_of(os.geteuid())}: "
                f"{what_to_do}"
            )
    return f"this process runs as {_name_of(os.geteuid())}"


def _name_of(uid: int) -> str:
    # A user without an entry, as in containers, has no name.
    with contextlib.suppress(KeyError):
        return f"uid {uid} ({pwd.getpwuid(uid).pw_name})"
    return f"uid {uid}"
