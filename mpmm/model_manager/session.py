"""This process attached to one namespace: a `Session` has what its managers share, and the calls in progress.

All managers of one process on one namespace share one session, and the process is one row of the members table. The
work is divided among the session's objects, each of which has one job:

    held           which instances the process holds, and which objects it owns     held.py
    thread         what the calling thread holds                                    thread_holds.py
    unloads        what the process has to unload                                   unload.py
    deferred       changes to make as soon as the lock is free                      deferred.py
    figures        fresh memory figures                                             fresh_figures.py
    out_of_memory  what it learns from a load that has run out of memory            out_of_memory.py
    reconciler     takes back what was held by calls that an exception has ended    reconcile.py
    tenures        which instances were handed to it a moment ago                   tenure.py
    suspender      suspends and resumes instances                                   mpmm/suspend/
    leader         what the elected leader does for all processes                   leader.py
    background     the one thread, for work that no caller waits for                background.py
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType

from mpmm.interpreter.fork_hooks import ChildStep, in_forked_child
from mpmm.interpreter.thread_locks import new_rlock
from mpmm.memory.estimates_file import NamespaceEstimates
from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.samples import SharedSamples
from mpmm.memory.shared_estimator import SharedResourceEstimator
from mpmm.model_manager.background import BackgroundThread, Jobs
from mpmm.model_manager.deferred import DeferredChanges
from mpmm.model_manager.doorbell import Doorbell
from mpmm.model_manager.fresh_figures import FreshFigures
from mpmm.model_manager.held import HeldInstances
from mpmm.model_manager.late_unloads import LateUnloads
from mpmm.model_manager.leader import Leader
from mpmm.model_manager.look_again import LookAgain
from mpmm.model_manager.operations import Operation, ended_calls
from mpmm.model_manager.out_of_memory import OutOfMemory
from mpmm.model_manager.owned import OwnedObjects
from mpmm.model_manager.reconcile import Reconciler
from mpmm.model_manager.request import PlacementRequest
from mpmm.model_manager.tenure import Tenures
from mpmm.model_manager.thread_holds import ThreadHolds
from mpmm.model_manager.unload import UNLOAD_LOOK_S, Unloads, collect_garbage, unload_object
from mpmm.model_manager.waits import WARN_AFTER_S
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Member, Ticket
from mpmm.shared_state.namespace import LIFECYCLE_TIMEOUT_S, Namespace
from mpmm.sources import MemorySource

__all__ = ["Session"]

# How long to wait for waiters that are sent away; each needs the lock once, to leave the queue.
WAITERS_LEAVE_TIMEOUT_S = 5.0
WAITERS_LOOK_S = 0.002
# How long to wait for calls of other threads, which take microseconds unless they load.
CALLS_END_TIMEOUT_S = 0.5
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_inherited: list[Session] = []


class _Waiting(contextlib.AbstractContextManager[None]):
    """Counts a call among those that wait."""

    def __init__(self, waiting: set[Operation], call: Operation) -> None:
        self._waiting = waiting
        self._call = call

    def __enter__(self) -> None:
        self._waiting.add(self._call)

    def __exit__(self, *_: object) -> None:
        self._waiting.discard(self._call)
        self._call.frame = None


class Session:
    """One process in one namespace. Threads share it.

    unload_on_release: tags whose instances this process was last told to unload as soon as they are idle.
    request_defaults: by tag, the values of options that a request does not give, see `PlacementRequest.with_defaults`.
    tags_with_twins: those whose loaders have returned handles of other instances.
    tags_without_handles: those whose loaders have returned texts that can be no handles.
    warn_after_s: after how many seconds the log says that a request waits.
    """

    def __init__(
        self,
        namespace: Namespace,
        monitor: GPUMonitor,
        verbose_logging: bool,
        estimates_file: NamespaceEstimates | None = None,
    ) -> None:
        self.namespace = namespace
        # A manager inside a model server.
        self.is_guest = namespace.kind == Member.GUEST
        self.estimates_file = estimates_file
        self.monitor = monitor
        self.warn_after_s: tuple[float, ...] = WARN_AFTER_S
        # By identity, so that a manager is counted, and taken off, once, even if an exception makes a call run twice.
        # Weakly, because an exception may end the finalizer that would take off a manager that is dropped.
        self._managers: dict[int, weakref.ref[object]] = {}
        # What makes this process leave once all managers were dropped; called by the background thread.
        self.leave_when_forgotten: Callable[[], object] = lambda: None
        # An RLock, because a finalizer or signal handler may need it while its own thread has it.
        self._mutex = new_rlock()
        # Threads in the queue; `close` sends them away before the segment is unmapped under them.
        self._waiting: set[Operation] = set()
        self.closing = False
        # The call that closes, and whether it has been completed.
        self._closer = Operation(None)
        self.is_closed = False
        # The calls that may hold something, see `mpmm.model_manager.operations`.
        self.operations: set[Operation] = set()
        self.unload_on_release: set[str] = set()
        self.request_defaults: dict[str, PlacementRequest] = {}
        self.tags_with_twins: set[str] = set()
        self.tags_without_handles: set[str] = set()
        self.scheduler = scheduler = Scheduler(namespace)
        self.samples = samples = SharedSamples(namespace, scheduler)
        self.estimator = SharedResourceEstimator(namespace, verbose_logging)
        self.figures = FreshFigures(namespace, monitor, samples)
        self.tenures = Tenures()
        self.owned = OwnedObjects(namespace)
        self.held = HeldInstances(namespace, scheduler, self.tenures, self.owned)
        self.thread = ThreadHolds(namespace, self.held, self.operations)
        self.unloads = Unloads(namespace, scheduler, self.figures, self.owned, self.waiting)
        self.suspender = self.unloads.suspender
        self.out_of_memory = OutOfMemory(namespace, scheduler, samples, self.unloads)
        self.reconciler = Reconciler(namespace, scheduler, self.held, self.operations)
        doorbell = Doorbell(namespace)
        self.deferred = DeferredChanges(namespace, scheduler, doorbell.ring)
        scheduler.go_on = self.deferred.defer_plan
        self.leader = Leader(
            *(namespace, scheduler, samples, self.estimator, self.figures),
            *(LateUnloads(namespace, scheduler, self.unloads), self.suspender, self.keep_estimates, doorbell),
        )
        jobs = Jobs(namespace, self.deferred, self.reconciler, self.held, self.unloads, self.leader, self.operations)
        jobs.leave_if_forgotten = self._leave_if_forgotten
        self.background = BackgroundThread(namespace, doorbell, jobs)
        monitor.bind(samples, self.leader.note_sample)
        _sessions.add(self)

    @property
    def managers(self) -> int:
        """How many managers share this session."""
        return sum(manager() is not None for manager in list(self._managers.values()))

    def add_manager(self, manager: object) -> None:
        """Count a manager among those that share this session, until it is taken off or collected."""
        self._managers[id(manager)] = weakref.ref(manager)

    def take_off_manager(self, manager: object) -> None:
        """Undo `add_manager`; a second call does nothing."""
        self._managers.pop(id(manager), None)

    @property
    def is_forgotten(self) -> bool:
        """Tell whether no manager shares this session any more, and this process holds nothing that is still in use."""
        return not self.managers and not self.held.has_any

    def _leave_if_forgotten(self) -> None:
        if self.is_forgotten and not self.closing:
            self.leave_when_forgotten()

    @property
    def is_left_behind(self) -> bool:
        """Tell whether this process is a server, and the last worker has left and removed the namespace."""
        return self.is_guest and self.namespace.is_removed

    @property
    def source(self) -> MemorySource:
        """Where this process would read memory figures, as the leader or for a decision of its own."""
        return self.monitor.source

    def start(self) -> None:
        """Begin to work: lead if need be, unload on demand."""
        self.samples.describe(self.source, self.monitor.devices())
        if self.estimates_file is not None:
            self.estimates_file.load()
        self.background.start()

    def close(self, timeout_s: float = LIFECYCLE_TIMEOUT_S) -> None:
        """Leave the namespace: unload what only this process can use, and everything if it is the last.

        A second call does nothing, even while the first is still running, unless an exception has ended that one. If an
        object's own unload, or a signal handler during it, raises, everything else is still done, and the exception is
        raised at the end.

        timeout_s: see `Namespace.leave`.
        """
        call = Operation(sys._getframe())
        with self._mutex:
            if self.is_closed or (self.closing and self._closer not in ended_calls({self._closer})):
                return
            self._closer = call
            self.closing = True
            self.unloads.leave()
        began = time.monotonic()
        self._send_waiters_away()
        leading = self.leader.leading
        self.background.stop()
        # The thread may just have waited for a stopped process that has the lock; the callers of this wait only once.
        waited_s = time.monotonic() - began
        if leading:
            self.keep_estimates(at_last=True)
        objects = self.owned.all()
        trouble: BaseException | None = None
        for copy in objects:
            if self.owned.forget(copy.row, copy.generation) is None:
                # A thread that is late unloads it.
                continue
            try:
                unload_object(copy.value)
            except BaseException as error:
                trouble = trouble or error
        if objects:
            del copy
            objects.clear()
            collect_garbage()
        # From here on no sample, not even one in progress, is published to memory that is about to be unmapped.
        self.monitor.bind(None)
        self.namespace.leave(self._unload_everything, timeout_s, waited_s)
        self.monitor.close_source()
        _sessions.discard(self)
        self.is_closed = True
        call.frame = None
        try:
            if trouble is not None:
                raise trouble
        finally:
            # Its traceback has this frame, so they would keep each other, and all callers.
            del trouble

    def keep_estimates(self, at_last: bool = False) -> None:
        """Write the estimates to their file, if there is one and a source measures.

        at_last: write even if it is not yet time.
        """
        if self.estimates_file is None or self.namespace.tables.header.source_accounting_only:
            return
        if at_last:
            self.estimates_file.save()
        else:
            self.estimates_file.save_if_due()

    def begin(self, frame: FrameType | None) -> Operation:
        """Record that a call begins, which runs in `frame`, and return its operation.

        See `mpmm.model_manager.operations`.
        """
        operation = Operation(frame)
        self.operations.add(operation)
        if self.background.dozing:
            self.background.wake()
        return operation

    def begin_for(self, owner: object) -> Operation:
        """Record that a call begins, which lasts as long as `owner` is not collected; return its operation."""
        operation = Operation(None)
        operation.owner = weakref.ref(owner)
        self.operations.add(operation)
        if self.background.dozing:
            self.background.wake()
        return operation

    def end(self, operation: Operation) -> None:
        """Record that a call has ended, and that its caller has what it holds, or that has been given back."""
        operation.frame = None
        if not operation.abandoned:
            self.operations.discard(operation)

    def abandon(self, operation: Operation) -> None:
        """Leave to the background thread what is held by a call that does not continue.

        Finalizers and signal handlers may call this, too.
        """
        operation.frame = None
        if operation.has_something:
            # It may have been removed just before.
            self.operations.add(operation)
            operation.abandoned = self.reconciler.has_abandoned = True
            if self.namespace.is_usable:
                self.background.wake()
        else:
            self.operations.discard(operation)

    def waiting(self, in_block: bool = True) -> contextlib.AbstractContextManager[None]:
        """Count the calling thread among those that wait in the queue, for the length of a `with` block.

        in_block: an exception that leaves the block's function also ends it. Else `__exit__` is sure to be called.
        """
        call = Operation(sys._getframe(1) if in_block else None)
        return _Waiting(self._waiting, call)

    def _waits(self, calls: set[Operation]) -> bool:
        """Tell whether another thread still runs one of these calls."""
        others = [call for call in list(calls) if call.thread != threading.get_ident()]
        return bool(others) and not set(others).issubset(ended_calls(set(others)))

    def is_busy_here(self) -> bool:
        """Tell whether the calling thread is in the middle of another call: this is a finalizer or signal handler."""
        here = {
            call
            for call in (*list(self.operations), *list(self._waiting))
            if call.thread == threading.get_ident() and call.frame is not None
        }
        return self.namespace.lock.is_busy_here() or not here.issubset(ended_calls(here))

    def _send_waiters_away(self) -> None:
        """Wake waiting threads so that they leave; takes no lock of the segment, whose holder may be stopped."""
        namespace = self.namespace
        tables = namespace.tables
        deadline = time.monotonic() + WAITERS_LEAVE_TIMEOUT_S
        while self._waits(self._waiting) and time.monotonic() < deadline:
            for row in tables.rows_where(namespace.segment.layout.tickets, Ticket.MEMBER, namespace.reference):
                namespace.reads.queue.signal(row).wake()
            # Repeated, because a thread that does not sleep yet misses the wake-up.
            time.sleep(WAITERS_LOOK_S)
        # Calls that do not wait are about to end, unless a loader runs.
        deadline = time.monotonic() + CALLS_END_TIMEOUT_S
        while self._waits({call for call in list(self.operations) if call.frame}) and time.monotonic() < deadline:
            time.sleep(UNLOAD_LOOK_S)

    def forget_after_fork(self) -> None:
        """In a forked child: neither use nor destroy anything of the parent's.

        The parent's objects stay referenced, because their finalizers would free what belongs to the parent, device
        memory say.
        """
        self.leader.forget_after_fork()
        _inherited.append(self)

    def _unload_everything(self) -> None:
        self.namespace.reset()
        self.unloads.unload_assigned()

    def look_again(self, ticket: int) -> LookAgain:
        """Return what decides when a waiter of this process looks at its ticket (row) without being woken."""
        return LookAgain(self.namespace, self.scheduler, self.warn_after_s, ticket)


def _forget_all_after_fork() -> None:
    for session in list(_sessions):
        session.forget_after_fork()
    _sessions.clear()


in_forked_child(_forget_all_after_fork, ChildStep.WORKER)
