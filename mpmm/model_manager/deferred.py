"""Changes that must be made, but have to wait until the lock is free.

A waiter that gives up leaves the queue, a load that failed frees its row, a lease ends. If the lock is taken for longer
than a caller can wait, or the caller is a finalizer or signal handler in the middle of a transaction of its own thread,
the background thread of the process makes the change later.

On a crowded host such changes come in bursts, and one look at the whole queue takes milliseconds under the lock. So
the thread makes as many as fit in one transaction, and the policy decides once at its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mpmm.errors import LockTimeoutError, ReentrantCallError
from mpmm.scheduling import Scheduler
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction
from mpmm.text.printable import printable_logger

__all__ = ["NOW_S", "Change", "DeferredChanges"]

# Returns whether a waiting request may benefit from it.
Change = Callable[[Transaction], bool]

_LOG = printable_logger("mpmm")
# A caller that gives up waiting must not be late: if the lock is not free within this, the background thread waits.
NOW_S = 0.05
# The background thread pauses for a quarter of a second after each error. A change that fails for two seconds will fail
# later, too, and each attempt holds up the others.
ATTEMPTS = 8


class _Deferred:
    """One change, and how often it has failed."""

    __slots__ = ("attempts", "make")

    def __init__(self, make: Change) -> None:
        self.make = make
        self.attempts = 0


class DeferredChanges:
    """The changes of one process that wait for the lock, oldest first.

    A change may be made twice, if an exception from a signal handler or finalizer comes right after the commit. So it
    first checks whether anything is left to do. It returns whether a waiting request may benefit, and does not call
    `Scheduler.advance` itself: this class does, once for all changes of a transaction.

    changes: those that are still to be made; the background thread does not sleep for long while there are any.
    """

    def __init__(self, namespace: Namespace, scheduler: Scheduler, wake: Callable[[], object]) -> None:
        """wake: wakes the thread that calls `run`; from any thread, without the lock."""
        self._namespace = namespace
        self._scheduler = scheduler
        self._wake = wake
        self.changes: deque[_Deferred] = deque()
        # How many to make together at most next time, because the one after them has failed; 0 for all.
        self._at_most = 0

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self.changes)

    def apply_or_defer(self, change: Change) -> bool | None:
        """Make a change that must be made, and return what it returns.

        If the lock is not free within `NOW_S`, or this is a finalizer or signal handler, the result is None, and the
        background thread makes the change as soon as the lock is free. Otherwise a ticket or a load that this process
        no longer knows of would stay until the process ends.
        """
        try:
            with self._namespace.transaction(NOW_S) as t:
                may_serve = change(t)
                if may_serve:
                    self._scheduler.advance(t)
                return may_serve
        except (LockTimeoutError, ReentrantCallError):
            self.defer(change)
            return None

    def defer(self, change: Change) -> None:
        """Leave a change to the background thread."""
        self.changes.append(_Deferred(change))
        self._wake()

    def defer_plan(self) -> None:
        """Leave the rest of a plan to the background thread; see `Scheduler.go_on`."""
        self.defer(lambda t: True)

    def run(self) -> None:
        """Make all changes. For the background thread alone.

        Raises LockTimeoutError, and what a change raises; then all changes that were not made are still here. A change
        that has failed comes last next time, and is dropped, with a line in the log, after `ATTEMPTS`.
        """
        while self.changes:
            self._run_some()

    def _run_some(self) -> None:
        """Make as many changes as fit into one transaction, and let the policy decide."""
        changes = self.changes
        together = self._at_most or len(changes)
        made, in_change, may_serve = 0, False, False
        try:
            with self._namespace.transaction() as t:
                while made < together and not t.is_long:
                    in_change = True
                    may_serve = changes[made].make(t) or may_serve
                    in_change = False
                    made += 1
                if may_serve:
                    self._scheduler.advance(t)
        except Exception:
            # All changes of this transaction were undone with the one that failed.
            if not in_change or not self._namespace.is_usable:
                raise
            if made:
                self._at_most = made
                return
            self._at_most = 0
            if self._put_last():
                raise
            return
        self._at_most = 0
        for _ in range(made):
            changes.popleft()

    def _put_last(self) -> bool:
        """Put the first change, which has failed when made alone, behind all others; return False if it is dropped.

        Called while its error is handled.
        """
        change = self.changes[0]
        change.attempts += 1
        if change.attempts < ATTEMPTS:
            self.changes.rotate(-1)
            return True
        self.changes.popleft()
        _LOG.exception(
            "mpmm %s: pid %d gives up a deferred change after %d attempts",
            *(self._namespace.name, self._namespace.pid, ATTEMPTS),
        )
        return False
