"""Limits that the system sets for a process: which one caused an error, and its current value."""

from __future__ import annotations

import errno
import resource

__all__ = ["limit_behind"]

_LIMITS = {
    errno.EMFILE: ("open files", resource.RLIMIT_NOFILE, "-n"),
    errno.EAGAIN: ("processes and threads", resource.RLIMIT_NPROC, "-u"),
    errno.ENOMEM: ("memory", resource.RLIMIT_AS, "-v"),
}
# Python's text for EAGAIN when it starts a thread: the only hint at the cause.
_NO_THREAD = "can't start new thread"


def limit_behind(error: BaseException) -> str:
    """Say which limit caused an error, and its current value; "" if none did."""
    number = error.errno if isinstance(error, OSError) else None
    if type(error) is RuntimeError and str(error) == _NO_THREAD:
        number = errno.EAGAIN
    if number == errno.ENFILE:
        return "the whole system has as many open files as it may have (sysctl fs.file-max)"
    if number not in _LIMITS:
        return ""
    what, kind, option = _LIMITS[number]
    limit = resource.getrlimit(kind)[0]
    if limit != resource.RLIM_INFINITY:
        return f"its limit on {what} (ulimit {option}) is {limit}"
    return "its user, or container, has as many processes and threads as it may have" if number == errno.EAGAIN else ""
