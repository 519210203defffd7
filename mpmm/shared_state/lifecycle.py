"""The lifecycle lock: a process holds it exclusively while it creates, joins, leaves or removes a namespace.

Used by `namespace`, `creation` and `removal`. It is lock 1 in `namespace`'s docstring: take none of the others before
it.
"""

from __future__ import annotations

import contextlib

from mpmm.errors import SegmentCorruptError
from mpmm.shared_state.layout import Header
from mpmm.shared_state.liveness import has_living_member
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import Segment
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import TransactionLock

__all__ = ["LIFECYCLE_TIMEOUT_S", "REMOVAL_TIMEOUT_S", "Lifecycle", "close_segment"]

# Joining and leaving take milliseconds, unless the last member is unloading everything on its way out.
LIFECYCLE_TIMEOUT_S = 60.0
# A process that cleans up after others does not wait longer for one that was stopped in the middle of it.
REMOVAL_TIMEOUT_S = 5.0


class Lifecycle:
    """`with Lifecycle(runtime) as current:` holds the lifecycle lock; `current` is False if the directory was replaced.

    create: make the lock's file if it is missing. Raises FileNotFoundError if the directory is gone, or the file is
    and must not be made; LockTimeoutError.
    """

    def __init__(
        self, runtime: RuntimeDirectory, timeout_s: float = LIFECYCLE_TIMEOUT_S, *, create: bool = True
    ) -> None:
        self._runtime = runtime
        self._timeout_s = timeout_s
        self._create = create

    def __enter__(self) -> bool:
        self._file = LockFile(self._runtime.file("lifecycle.lock"), create=self._create)
        try:
            self._file.exclusive(self._timeout_s)
        except BaseException:
            self._file.close()
            raise
        return self._file.is_current()

    def __exit__(self, *_: object) -> None:
        self._file.close()


def close_segment(segment: Segment, runtime: RuntimeDirectory, kinds: tuple[int, ...]) -> bool:
    """Close a segment to newcomers; return False, and leave it open, if a member of one of these kinds lives in it.

    Raises LockTimeoutError.
    """
    try:
        with contextlib.closing(TransactionLock(segment, REMOVAL_TIMEOUT_S)) as lock, lock() as t:
            # Under the lock: a newcomer takes its row in a transaction that checks the mark, so it either has a row by
            # now and is found alive, or will find the mark.
            if has_living_member(Tables(segment), runtime.path, kinds):
                return False
            t.set(Header.CLOSED, Header.IS_CLOSED)
    except SegmentCorruptError:
        # No process can take the lock any more, so none can join.
        pass
    return True
