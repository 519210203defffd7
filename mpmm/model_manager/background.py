"""The background thread: one in every process that is attached to a namespace.

It sleeps on the process's doorbell, and does the work for which no caller waits:

- changes that could not be made at once because the lock was taken (`DeferredChanges`);
- giving back what calls held that an exception has ended (`Reconciler`);
- unloads that this process has been told to do, as the owner or for a waiter; in threads of their own, because an
  unload may hang (`Unloads`);
- the elected leader's work for all processes, if this is the leader (`Leader`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sized
from functools import partial

from mpmm.errors import ClosedError, LockTimeoutError
from mpmm.interpreter.latch import Latch
from mpmm.interpreter.thread_starts import start_thread
from mpmm.model_manager.deferred import DeferredChanges
from mpmm.model_manager.doorbell import Doorbell
from mpmm.model_manager.held import HeldInstances
from mpmm.model_manager.leader import FIRST_SAMPLE_WAIT_S, LONGEST_TICK_S, Leader
from mpmm.model_manager.operations import Operation
from mpmm.model_manager.reconcile import Reconciler
from mpmm.model_manager.unload import Unloads
from mpmm.shared_state.namespace import Namespace
from mpmm.suspend.helper import reap_ended_helpers
from mpmm.text.printable import printable_logger

__all__ = ["BackgroundThread", "Jobs"]

_LOG = printable_logger("mpmm")
# While calls are in progress and awake, how often the thread looks for calls that an exception has ended; it takes two
# looks to find an abandoned transaction.
RECONCILE_S = 0.3
# Between two attempts to wake a thread that may just be about to sleep.
REPEAT_S = 0.01


class Jobs:
    """The jobs of one process. A job returns at once if it has nothing to do.

    reconcile_due: when to look for calls that an exception has ended, while there are calls to watch.
    leave_if_forgotten: has a thread leave the namespace if all managers of this process were dropped.
    """

    def __init__(
        self,
        namespace: Namespace,
        deferred: DeferredChanges,
        reconciler: Reconciler,
        held: HeldInstances,
        unloads: Unloads,
        leader: Leader,
        operations: set[Operation],
    ) -> None:
        """operations: the calls in progress that may hold something."""
        self._namespace = namespace
        self._deferred = deferred
        self._reconciler = reconciler
        self._held = held
        self._unloads = unloads
        self._operations = operations
        self.reconcile_due = 0.0
        # How often threads had gone to sleep in the compiled core at the last look for ended calls.
        self._sleeps_seen = 0
        self._answered: int | None = None
        self.leader = leader
        self.leave_if_forgotten: Callable[[], None] = lambda: None

    def do_what_came_up(self, rung: int) -> None:
        """Do what others have left to this thread, or rung for; called whenever it wakes up.

        rung: see `Doorbell.rung`.
        """
        self._namespace.follow_settings()
        self._deferred.run()
        self._reconcile()
        self._unload(rung)

    def look_around(self) -> None:
        """Do what is done at intervals."""
        self.leader.look_after_files()
        self._free_taken_tickets()
        # The process that was to ring may be stopped, an unload may have failed, or a thread may have failed to start.
        self._unloads.unload_in_thread()
        self.leader.say_what_it_measures()
        self.leader.elect()
        self.leader.do_for_everybody()
        reap_ended_helpers()
        self.leave_if_forgotten()

    @property
    def has_deferred(self) -> bool:
        """Tell whether changes have been left to this thread."""
        return bool(self._deferred)

    @property
    def unrest(self) -> tuple[set[Operation], Sized]:
        """Return what ends a long sleep: the calls in progress, and the changes that are left to this thread."""
        return self._operations, self._deferred.changes

    @property
    def has_calls_to_watch(self) -> bool:
        """Tell whether calls or unloads are in progress that an exception may end."""
        return bool(self._operations) or self._unloads.may_be_left or self._namespace.lock.may_be_abandoned

    def is_woken_by_calls(self, bell: int) -> bool:
        """Have the calls in progress ring the bell (word), if all have slept in the compiled core since the last look.

        Return False if they have not. If they have, the first call that leaves its sleep wakes this thread before it
        runs Python again, and no exception can end it before that. So there is no need to look for ended calls, which
        took 3 % of a processor for 32 processes that only wait.
        """
        core = self._namespace.lock.core
        if core is None or self._unloads.may_be_left or self._namespace.lock.may_be_abandoned:
            return False
        return core.wake_after_sleep(bell, len(self._operations), self._sleeps_seen)

    def _reconcile(self) -> None:
        if self._reconciler.has_abandoned or time.monotonic() >= self.reconcile_due:
            core = self._namespace.lock.core
            self._sleeps_seen = 0 if core is None else core.sleeps
            self._reconciler.reconcile()
            self._unloads.take_up_what_is_left()
            self.reconcile_due = time.monotonic() + RECONCILE_S

    def _unload(self, rung: int) -> None:
        """Unload what this process has been told to; only after a ring, because reading the rows takes 0.1 ms."""
        if rung != self._answered:
            self._unloads.unload_in_thread()
            self._answered = rung

    def _free_taken_tickets(self) -> None:
        if self._held.has_taken_tickets:
            with self._namespace.transaction() as t:
                self._held.free_taken_tickets(t)


class BackgroundThread:
    """The thread, one for each session.

    dozing: it sleeps for longer than `RECONCILE_S`, because no call was in progress, or all slept: a call or a
    transaction that begins wakes it.
    """

    def __init__(self, namespace: Namespace, doorbell: Doorbell, jobs: Jobs) -> None:
        self._namespace = namespace
        self._doorbell = doorbell
        self._jobs = jobs
        self._leader = jobs.leader
        self._stopping = Latch()
        self._thread: threading.Thread | None = None
        self._failing = False
        self.dozing = False

    def start(self) -> None:
        """Lead if no process does, so that devices are known before the first request; then start the thread."""
        # If the lock is not free in time, the thread tries again.
        with contextlib.suppress(LockTimeoutError):
            self._leader.lead_if_free(FIRST_SAMPLE_WAIT_S)
        name = f"mpmm-background-{self._namespace.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        start_thread(self._thread)

    def stop(self) -> None:
        """End the thread and give up the leadership, without the lock, whose holder may be stopped.

        Not for the thread itself to call.
        """
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            while self._thread.is_alive():
                # Repeated, because a thread that has read `_stopping` but does not sleep yet misses one wake-up.
                self.wake()
                self._thread.join(REPEAT_S)
        self._leader.close()

    def wake(self) -> None:
        """End the thread's sleep; from any thread, without the lock."""
        self._doorbell.ring()

    def _run(self) -> None:
        # `stop` takes a thread whose start was interrupted for ended, but it may begin later.
        if self._stopping.is_set:
            return
        due = time.monotonic() + self._leader.interval()
        while not self._stopping.is_set:
            try:
                due = self._round(due)
                self._failing = False
            except (ClosedError, ValueError):
                # ValueError: the segment was unmapped under us by `leave`.
                if not self._namespace.is_usable:
                    return
                self._report_trouble()
            except LockTimeoutError as error:
                self._report_crowd(error)
            except Exception:
                self._report_trouble()

    def _round(self, due: float) -> float:
        """Do what there is to do, then sleep until the bell rings, or for some time.

        due: when to look around. Return when to do so next.
        """
        rung = self._doorbell.rung()
        self._jobs.do_what_came_up(rung)
        if time.monotonic() >= due:
            self._jobs.look_around()
            due = time.monotonic() + self._leader.interval()
        self._leader.learn_from_late_sample()
        # A change that was left to this thread during these jobs would not wake it.
        if not self._jobs.has_deferred:
            if self._sleep(rung, due):
                return 0.0
            # If the thread was woken, this process may have become a deputy, or may have been offered the lead.
            due = min(due, time.monotonic() + self._leader.interval())
        return due

    def _sleep(self, rung: int, due: float) -> bool:
        """Sleep; return whether to look around at once."""
        # Set first, so that a call or a transaction that begins after the look at those in progress wakes this thread.
        self._set_dozing(True)
        until = due
        if self._jobs.has_calls_to_watch and not self._jobs.is_woken_by_calls(self._doorbell.word):
            self._set_dozing(False)
            until = min(due, self._jobs.reconcile_due)
        look_around = self._leader.doze(rung, until, self._jobs.unrest if self.dozing else None)
        self._set_dozing(False)
        return look_around

    def _set_dozing(self, dozing: bool) -> None:
        self.dozing = dozing
        self._namespace.lock.wake_watcher = self.wake if dozing else None

    def _report_crowd(self, error: LockTimeoutError) -> None:
        """Log that the lock was not free in time, which is no error of this thread: it tries again at once."""
        text = "mpmm %s: the background thread of pid %d tries again: %s"
        self._report(partial(_LOG.warning, text, self._namespace.name, self._namespace.pid, error))

    def _report_trouble(self) -> None:
        text = "mpmm %s: the background thread of pid %d continues after an error"
        self._report(partial(_LOG.exception, text, self._namespace.name, self._namespace.pid))
        self._stopping.wait(LONGEST_TICK_S)

    def _report(self, log: Callable[[], object]) -> None:
        """Log an error, unless the last round failed, too."""
        # No error may end the thread, not even one that a program's own log handler raises.
        with contextlib.suppress(Exception):
            if not self._failing:
                log()
        self._failing = True
