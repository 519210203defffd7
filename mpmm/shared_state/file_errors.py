"""What the system's errors about mpmm's own files mean: whose the files are, what is wrong there, what to change.

`[Errno 13] Permission denied` names a file that its reader has never heard of. `told_by_file` turns it into an error
that says to whom the file belongs, or the folder above it that bars the way, and which setting leads elsewhere.
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
# What is wrong with the file system or the path, and stays so. What passes, or is the process's own, such as too few
# descriptors, keeps the system's words; and callers go by what is missing.
_LASTING = {
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
    """Raise `file_error` instead of the system's error, where it says more; path: if the error names no file."""
    try:
        yield
    except OSError as error:
        told = file_error(error, path)
        if told is error:
            raise
        raise told from error


def file_error(error: OSError, path: str | Path) -> OSError:
    """Return a RuntimeDirectoryError that says what an error means, or the error where that says all there is."""
    if isinstance(error, MpmmError) or not (why := reason_of(error, path)):
        return error
    at = _place_of(error, path)
    return RuntimeDirectoryError(
        f"{at} cannot be used: {error.strerror}: {why}; or set MPMM_RUNTIME_DIR (--runtime-root) to a folder of this "
        "user alone",
        path=at,
    )


def reason_of(error: OSError, path: str | Path) -> str:
    """Say what is behind an error about a file and what to do about it, "" where that is not known."""
    if error.errno in _REFUSED:
        return _who_refuses(_place_of(error, path))
    return _LASTING.get(error.errno or 0, "")


def _place_of(error: OSError, path: str | Path) -> str:
    return os.fsdecode(error.filename if isinstance(error.filename, (str, bytes, os.PathLike)) else path)


def _who_refuses(path: str) -> str:
    """Say to whom the first folder on the way to a path, or the path, belongs that this user may not use."""
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
            # What is not there was to be made.
            wanted = os.X_OK if not os.access(place, os.X_OK) or os.path.lexists(then) else os.W_OK
        if not os.access(place, wanted):
            what_to_do = f"change its mode ({stat.S_IMODE(found.st_mode):04o})"
            if found.st_uid != os.geteuid():
                what_to_do = "run it as the user to whom that belongs"
            return (
                f"{place} belongs to {_name_of(found.st_uid)}, and this process runs as {_name_of(os.geteuid())}: "
                f"{what_to_do}"
            )
    return f"this process runs as {_name_of(os.geteuid())}"


def _name_of(uid: int) -> str:
    # Without an entry, as in containers, the number alone.
    with contextlib.suppress(KeyError):
        return f"uid {uid} ({pwd.getpwuid(uid).pw_name})"
    return f"uid {uid}"
