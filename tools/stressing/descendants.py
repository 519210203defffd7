"""The descendants of a conductor, whichever process started them."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import psutil

__all__ = ["become_subreaper", "descendants", "descendants_left"]

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, so that it sees every process of the run end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> list[psutil.Process]:
    """Return all descendants of this process."""
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def descendants_left() -> list[str]:
    """Return a line about each descendant, for a report of what a run has left."""
    return [f"process {process.pid}: {_command_of(process)}" for process in descendants()]


def _command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:200] or str(process.status())
    return "gone"
