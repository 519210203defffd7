"""This process's part in a namespace: the objects it has loaded, what it holds, what it must unload.

All managers of one process on one namespace share one `Worker`. The members table knows the process as one
member; which thread holds what is known here alone.
"""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from mpmm import multi_process_shared
from mpmm.errors import LockTimeoutError, MpmmError, ServerStartError
from mpmm.fork_hooks import ChildStep, in_forked_child
from mpmm.memory.beam_metrics import report_estimate, report_model_count
from mpmm.memory.estimates_file import KeptEstimates
from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MonitorSource
from mpmm.memory.samples import SharedSamples
from mpmm.memory.shared_estimator import SharedResourceEstimator
from mpmm.model_manager.background import REPEAT_S, Keeper
from mpmm.model_manager.deferred import NOW_S, DeferredChanges
from mpmm.model_manager.operations import Held, Operation, ended_calls
from mpmm.model_manager.tenure import Tenures, looks_in_s
from mpmm.model_manager.waits import WARN_AFTER_S, WaitWarning, decision, says_more
from mpmm.multi_process_shared.context import ServerContext
from mpmm.multi_process_shared.stop_server import kill_process
from mpmm.placement import Placement, place_for_good, server_setting
from mpmm.policy.out_of_memory import bound_mb, raised_estimate_mb
from mpmm.policy.view import Reason
from mpmm.scheduler import Copies, Scheduler
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.futex import wake_all
from mpmm.shared_state.layout import Device, Header, Instance, Member, Model, Ticket, device_rows
from mpmm.shared_state.namespace import Namespace, remove_deserted
from mpmm.shared_state.transaction import Transaction
from mpmm.sources import MemorySource, process_knowledge
from mpmm.suspend.suspender import Suspender
from mpmm.text.printable import printable_logger

__all__ = [
    *("UNLOAD_LOOK_S", "Copy", "Free", "Growth", "LookAgain", "ServerDuty", "Worker"),
    *("collect_garbage", "unload_made"),
]

T = TypeVar("T")

_LOG = printable_logger("mpmm")
# How an object that is not a handle lets go of what garbage collection does not see; the second is Beam's name.
_UNLOAD_METHODS = ("unload_model", "mock_model_unsafe_hard_delete")
# A waiter that is sent away needs the lock once, to leave the queue.
WAITERS_LEAVE_TIMEOUT_S = 5.0
# Calls in progress in other threads, which take microseconds where they do not load.
CALLS_END_TIMEOUT_S = 0.5
# Servers to end at a time; each takes a thread that mostly waits.
UNLOADS_AT_A_TIME = 8
# However short `memory_return_seconds` is: another process is not told to do what may be done in a moment.
SHORTEST_UNLOAD_LIMIT_S = 0.5
# A server that has not left by itself within so long is killed.
ENDS_WITHIN_S = 10.0
# Who has run out of memory looks so often whether there is more.
UNLOAD_LOOK_S = 0.01
# No decision waits longer for figures that would only make it a better one. NVML takes a millisecond.
FRESHEN_TIMEOUT_S = 0.25
# Nor does a load or a release wait longer to be measured. nvidia-smi takes 0.3 s, and may have to be run twice: what is
# in progress has begun too early.
SAMPLE_TIMEOUT_S = 1.0
# A waiter whose back-off is over looks after so long whether it is its turn, and then more and more rarely.
FIRST_LOOK_AGAIN_S = 0.1
LONGEST_LOOK_AGAIN_S = 30.0
# A sample of this age is as good as a new one for the next who asks; the second for one who stands behind others, as
# every load and unload of theirs brings a new one.
FRESH_NS = 20_000_000
FRESH_BEHIND_OTHERS_NS = 200_000_000
# Elsewhere a processor may reorder the reads of `Worker.hold_granted`, and Python has no means to forbid it.
CAN_READ_UNLOCKED = platform.machine() in ("x86_64", "AMD64")
# Between two transactions of many busy processes there is hardly ever time to read; then the lock has to do.
UNLOCKED_TRIES = 16
_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_inherited: list[Worker] = []


@dataclass(frozen=True)
class Copy:
    """A copy of a model as this process knows it: its row, and the row's generation to tell it from later ones."""

    row: int
    generation: int
    tag: str
    value: Any


@dataclass(frozen=True)
class ServerDuty:
    """What a new model server does first: join the namespace, and tie itself to the copy it is about to hold."""

    root: str
    name: str
    row: int
    generation: int
    placement: Placement

    def __call__(self, tag: str) -> Namespace | None:
        """Return the server's membership, or None when the namespace is gone already.

        Raises ServerStartError when the load is: the server ends then, as there is nobody to serve.
        """
        try:
            namespace = Namespace.join(self.name, root=Path(self.root), kind=Member.SERVER, label=tag, must_exist=True)
        except LockTimeoutError as error:
            # Unknown to the namespace, it would live on if its loader died now.
            raise ServerStartError(f"the server of {tag!r} cannot join its namespace: {error}", tag=tag) from error
        except (FileNotFoundError, MpmmError) as error:
            _LOG.warning("mpmm: the server of %s cannot join its namespace: %s", tag, error)
            return None
        words, at = namespace.segment.words, namespace.tables.instance(self.row)
        with namespace.transaction() as t:
            wanted = (
                words[at + Instance.STATE] == Instance.LOADING and words[at + Instance.GENERATION] == self.generation
            )
            if wanted:
                namespace.transitions.loads.link_server(t, self.row, namespace.slot)
        if not wanted:
            # Its loader died or was reset before we came up. No row would ever name us, so nobody would unload us.
            namespace.leave()
            raise ServerStartError(f"the load for which the server of {tag!r} was started is over", tag=tag)
        place_for_good(self.placement)
        return namespace


@dataclass(frozen=True)
class _Farewell:
    """What the last model server does when no worker is left."""

    root: str
    name: str

    def __call__(self) -> None:
        remove_deserted(Path(self.root), self.name)


@dataclass(frozen=True)
class Free:
    """What the devices of a copy had for it when its load began.

    mb: as much as the one that had least, times the devices; physically, whatever slack says. room_mb: what they could
    have had for it at best, within their limits, if everything else of the namespace were gone. alone: there was
    nothing of it, idle copies of pinned models aside, nor was anything on its way back.
    """

    mb: float
    room_mb: float
    alone: bool


class ThreadHolds(threading.local):
    """What the calling thread holds or loads here.

    blocks: the operations of its `with manager.model(...)` blocks, innermost last. loads: what the loaders load that it
    is running, row and generation. alone: what it has loaded to run alone, in a block or not.
    """

    def __init__(self) -> None:
        self.blocks: list[Operation] = []
        self.loads: list[tuple[int, int]] = []
        self.alone: tuple[int, int] | None = None


class LookAgain:
    """Has a waiter looked at for which nobody else needs to come by: its model backs off, or it was called up.

    That is, when the back-off ends, or the tenure of who has called it up; see `mpmm.model_manager.tenure`. And
    when the log is to say that it has waited for long.
    """

    def __init__(self, worker: Worker, ticket: int) -> None:
        self._worker = worker
        self._ticket = ticket
        # When it was called up, the last time that it has looked for that.
        self._called_up = 0
        self._not_before = 0.0
        self._pause_s = FIRST_LOOK_AGAIN_S
        self._warning = WaitWarning(worker, ticket)

    def in_s(self) -> float:
        """Return in how many seconds to look; `inf` if it neither backs off nor was called up, and all was said."""
        left_s = self._worker.scheduler.backs_off_for_s(self._ticket)
        decides_in_s = min(max(left_s, self._not_before - time.monotonic()), self._called_up_in_s())
        return min(decides_in_s, self._warning.in_s())

    def _called_up_in_s(self) -> float:
        """Return in how many seconds the tenure for which the waiter was called up is over; `inf` if there is none."""
        called_up = self._worker.scheduler.called_up_at(self._ticket)
        return math.inf if called_up == self._called_up else looks_in_s(called_up)

    def look(self) -> None:
        """Let the policy decide anew. If that changes nothing, the waiter stands behind others, and looks later.

        Or only say that it waits, if it is time for that.
        """
        if self._warning.in_s() <= 0:
            self._warning.say()
            return
        called_up = self._called_up_in_s() <= 0
        # Where the copy is in use, its release will see to this waiter.
        if not called_up or self._worker.scheduler.is_model_idle(self._ticket):
            with contextlib.suppress(LockTimeoutError), self._worker.namespace.transaction(NOW_S) as t:
                self._worker.scheduler.advance(t)
        if called_up:
            self._called_up = self._worker.scheduler.called_up_at(self._ticket)
            return
        self._not_before = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_LOOK_AGAIN_S)


class _Waiting(contextlib.AbstractContextManager[None]):
    """Counts a call among those that wait."""

    def __init__(
        self,
        waiting: set[Operation],
        mutex: contextlib.AbstractContextManager[object],
        left: threading.Condition,
        call: Operation,
    ) -> None:
        self._waiting = waiting
        self._mutex = mutex
        self._left = left
        self._call = call

    def __enter__(self) -> None:
        self._waiting.add(self._call)

    def __exit__(self, *_: object) -> None:
        self._waiting.discard(self._call)
        self._call.frame = None
        # Not `with self._left`, which is a Python function: an exception in it, from a signal handler, would leave the
        # mutex taken for ever, and the end of the process waits for a thread that wants it.
        with self._mutex:
            self._left.notify_all()


class Growth:
    """What a load adds to the device memory of this process, if nothing else of it can have changed that meanwhile."""

    def __init__(self, worker: Worker, measures: bool) -> None:
        """Begin; measures: the last sample is fresh, and its source knows processes, or may yet show that it does."""
        self._worker = worker
        self._measures = measures
        self._before_mb = worker.own_mb() if self._measures else 0.0
        self._before = self._state() if self._measures else None

    def mb(self) -> float:
        """Return how much more it is in the last sample, 0 if that is not known.

        A source that shows this process now, and did not before, has shown that it had nothing then.
        """
        knows = self._worker.namespace.segment.words[Header.SOURCE_MEASURES_PROCESSES]
        if not self._measures or not knows or self._state() != self._before:
            return 0.0
        return max(0.0, self._worker.own_mb() - self._before_mb)

    def _state(self) -> list[tuple[int, int]]:
        """Return the copies that this process loads, owns or unloads, by row and generation.

        Without the lock, for which a load shall not wait: that these rows come and go is this process's own doing.
        """
        namespace = self._worker.namespace
        words, tables, layout = namespace.segment.words, namespace.tables, namespace.segment.layout
        rows = tables.rows_where(layout.instances, Instance.OWNER, namespace.reference)
        rows += tables.rows_where(layout.instances, Instance.HOLDER, namespace.reference)
        loading = [row for row in rows if words[tables.instance(row)] != Instance.ACTIVE]
        owned = [row for row in rows if words[tables.instance(row) + Instance.OWNER]]
        return sorted({(row, words[tables.instance(row) + Instance.GENERATION]) for row in (*loading, *owned)})


class Worker:
    """One process in one namespace. Threads share it."""

    def __init__(
        self,
        namespace: Namespace,
        monitor: GPUMonitor,
        verbose_logging: bool,
        kept_estimates: KeptEstimates | None = None,
    ) -> None:
        self.namespace = namespace
        self.kept_estimates = kept_estimates
        self.scheduler = Scheduler(namespace)
        self.samples = SharedSamples(namespace, self.scheduler)
        self.suspender = Suspender(self)
        self.estimator = SharedResourceEstimator(namespace, verbose_logging)
        self.tenures = Tenures()
        self.warn_after_s: tuple[float, ...] = WARN_AFTER_S
        # By identity: a manager that an exception kept from being taken off is taken off once all the same.
        self.manager_ids: set[int] = set()
        self.monitor = monitor
        # An RLock, because a finalizer or signal handler may come by while its own thread has it.
        self._mutex = threading.RLock()
        # Threads in the queue; `close` sends them away before the segment is unmapped under them.
        self._waiting: set[Operation] = set()
        self._thread_left = threading.Condition(self._mutex)
        self.closing = False
        # The call that closes, and whether it came to its end.
        self._closer = Operation(None)
        self.is_closed = False
        # Objects loaded here, by row: nobody else can use them.
        self._objects: dict[int, Copy] = {}
        self._rows_of_model: dict[int, list[int]] = defaultdict(list)
        # Handles that this process has held, by row; the generation tells whether one still stands there.
        self._handles: dict[int, Copy] = {}
        # What this process holds, by row and generation; and where a value was last seen to be held. Without a mutex:
        # each change is one step of the interpreter, which neither threads nor finalizers can split.
        self._held: dict[tuple[int, int], Held] = {}
        self._held_at: dict[Hashable, tuple[int, int]] = {}
        # The calls that have something in hand, see `mpmm.model_manager.operations`.
        self.operations: set[Operation] = set()
        self.has_abandoned = False
        self._unloading: set[int] = set()
        self.thread = ThreadHolds()
        # Tags whose loaders were seen to return handles of others.
        self._twins_of_tags: set[str] = set()
        # An unload ended in an exception, so its row may still be there: the keeper looks.
        self.unload_failed = False
        # Tags whose copies this process was last told to unload as soon as they are idle.
        self.at_once: set[str] = set()
        # Row and number of tickets whose grants this process has acted upon, see `hold_granted`.
        self._receipts: set[tuple[int, int]] = set()
        self.keeper = Keeper(self)
        self.deferred = DeferredChanges(namespace, self.scheduler, self.keeper.wake)
        self.scheduler.go_on = self.deferred.defer_plan
        monitor.bind(self.samples, self.keeper.note_sample)
        _workers.add(self)

    @property
    def managers(self) -> int:
        """How many managers share this."""
        return len(self.manager_ids)

    @property
    def source(self) -> MemorySource:
        """Where this process would read memory figures, as leader or on the way."""
        return self.monitor.source

    @property
    def _given_source(self) -> MonitorSource | None:
        """The monitor of the caller's own that stands for the source, if one was given."""
        source = self.monitor.source
        return source if isinstance(source, MonitorSource) else None

    def start(self) -> None:
        """Begin to work: take part in the leadership, unload on demand."""
        self.samples.describe(self.source, self.monitor.devices())
        if self.kept_estimates is not None:
            self.kept_estimates.load()
        self.keeper.start()

    def close(self) -> None:
        """Leave the namespace: unload what only this process can use, and everything if it is the last.

        Calling it again does nothing, also while the first call is at work, unless an exception has ended that.
        """
        call = Operation(sys._getframe())
        with self._mutex:
            if self.is_closed or (self.closing and self._closer not in ended_calls({self._closer})):
                return
            self._closer = call
            self.closing = True
        self._send_waiters_away()
        leading = self.keeper.leading
        self.keeper.stop()
        if leading:
            self.keep_estimates(at_last=True)
        objects = list(self._objects.values())
        for copy in objects:
            self._forget_object(copy.row, copy.generation)
            unload_object(copy.value)
        if objects:
            del copy
            objects.clear()
            collect_garbage()
        # From here on nobody publishes samples to memory that is about to go, not even a sample in progress.
        self.monitor.bind(None)
        self.namespace.leave(self._unload_everything)
        self.monitor.close_source()
        _workers.discard(self)
        self.is_closed = True
        call.frame = None

    def keep_estimates(self, at_last: bool = False) -> None:
        """Write the estimates to their file, if there is one and they were not just taken for granted.

        at_last: not only when it is time again.
        """
        if self.kept_estimates is None or self.namespace.segment.words[Header.SOURCE_BOOKS_ONLY]:
            return
        if at_last:
            self.kept_estimates.save()
        else:
            self.kept_estimates.save_if_due()

    def waiting(self, in_block: bool = True) -> contextlib.AbstractContextManager[None]:
        """Count the calling thread among those that wait in the queue, for the length of a `with` block.

        in_block: an exception that has left the block's function ends it, too. Else `__exit__` is sure to be called.
        """
        call = Operation(sys._getframe(1) if in_block else None)
        return _Waiting(self._waiting, self._mutex, self._thread_left, call)

    def _waits(self, calls: set[Operation]) -> bool:
        """Tell whether another thread is at one of these calls."""
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
        """Have the threads that wait find out that they are to go; without the lock, whose holder may be stopped."""
        namespace = self.namespace
        tables, address = namespace.tables, namespace.segment.address
        deadline = time.monotonic() + WAITERS_LEAVE_TIMEOUT_S
        while self._waits(self._waiting) and time.monotonic() < deadline:
            for row in tables.rows_where(namespace.segment.layout.tickets, Ticket.MEMBER, namespace.reference):
                wake_all(address + 8 * (tables.ticket(row) + Ticket.SIGNAL))
            with self._mutex:
                # Again and again, because one that does not sleep yet misses it.
                self._thread_left.wait(REPEAT_S)
        # Those that do not wait are about to end, unless a loader runs.
        deadline = time.monotonic() + CALLS_END_TIMEOUT_S
        while self._waits({call for call in list(self.operations) if call.frame}) and time.monotonic() < deadline:
            time.sleep(UNLOAD_LOOK_S)

    def forget_after_fork(self) -> None:
        """In a forked child: claim nothing of the parent's, and do not destroy it either.

        The parent's objects stay referenced: what their finalizers let go of, a device's memory say, is the parent's.
        """
        self.keeper.forget_after_fork()
        _inherited.append(self)

    # ---- memory figures ------------------------------------------------------------------------------------

    def refresh(self, timeout_s: float | None = None) -> bool:
        """Wait for a sample that begins after this call, and for its publication; return whether that has happened.

        timeout_s: the longest wait; None stands for `SAMPLE_TIMEOUT_S`, which no wait exceeds. What the sample in
            progress has taken already comes off, so that nobody waits for a source that hangs once that is known.
        """
        limit_s = SAMPLE_TIMEOUT_S if timeout_s is None else min(timeout_s, SAMPLE_TIMEOUT_S)
        return self.monitor.refresh(timeout_s=limit_s - self.monitor.sampling_for_s)

    def request_sample(self) -> None:
        """Have a sample taken and published as soon as possible, and do not wait for it.

        One that is asked for and has not begun serves for this call, too.
        """
        if not self.namespace.segment.words[Header.SOURCE_BOOKS_ONLY]:
            self.monitor.request_refresh()

    def freshen_to_queue(self, timeout_s: float) -> None:
        """Like `freshen`, for one who is about to queue."""
        waiting = self.namespace.segment.words[Header.WAITING]
        self.freshen(timeout_s, FRESH_BEHIND_OTHERS_NS if waiting else FRESH_NS)

    def freshen(self, timeout_s: float | None = None, age_ns: int = FRESH_NS) -> None:
        """Make sure that decisions rest on fresh figures, as far as that takes no noticeable time.

        Many who ask at the same moment share one sample; but a monitor of the caller's own is always asked. If it does
        not come within `timeout_s`, or `FRESHEN_TIMEOUT_S`, the old figures have to do.

        age_ns: figures of this age are fresh.
        """
        if self.source.cheap and (self._given_source is not None or not self._figures_are_fresh(age_ns)):
            self.sample_now(FRESHEN_TIMEOUT_S if timeout_s is None else min(timeout_s, FRESHEN_TIMEOUT_S))

    def _figures_are_fresh(self, age_ns: int = FRESH_NS) -> bool:
        words, tables = self.namespace.segment.words, self.namespace.tables
        oldest = time.monotonic_ns() - age_ns
        devices = (tables.device(row) for row in self.samples.rows())
        return all(words[at + Device.SAMPLED] >= max(oldest, words[at + Device.CONFIGURED_AT]) for at in devices)

    def sample_after_load(self, row: int) -> bool:
        """Take a sample after a load if that is quick or knows processes.

        Return whether the figures of the copy's devices are from after the load now; a source may fail.
        """
        if not (self.source.cheap or self.source.measures_processes):
            return False
        loaded = time.monotonic_ns()
        self.sample_now()
        words, tables = self.namespace.segment.words, self.namespace.tables
        rows = device_rows(words[tables.instance(row) + Instance.DEVICES])
        return all(words[tables.device(device) + Device.SAMPLED] >= loaded for device in rows)

    def sample_now(self, timeout_s: float | None = None) -> None:
        """Wait for a new sample, unless there is nothing to measure; see `refresh`."""
        if not self.namespace.segment.words[Header.SOURCE_BOOKS_ONLY]:
            self.refresh(timeout_s)

    def reset_peak(self) -> None:
        """Let the peak begin anew in a monitor of the caller's own; one that hangs is waited for only for a moment."""
        foreign = self._given_source
        if foreign is not None:
            self.monitor.call(foreign.reset_peak, FRESHEN_TIMEOUT_S - self.monitor.sampling_for_s)

    def added_mb(self, row: int) -> tuple[float, ...] | None:
        """Return what the copy that runs alone has added to the memory in use, at its peak, on each of its devices.

        None if that is not known, as one of them could not be read before or since the load.
        """
        words, floats, tables = self.namespace.segment.words, self.namespace.segment.floats, self.namespace.tables
        foreign = self._given_source
        seen_mb = 0.0 if foreign is None else foreign.peak_mb
        at = tables.instance(row)
        added = []
        with self.namespace.transaction():
            for device in map(tables.device, device_rows(words[at + Instance.DEVICES])):
                peak_mb = max(floats[device + Device.USED_MB], floats[device + Device.PEAK_MB], seen_mb)
                baseline_mb = floats[device + Device.BASELINE_MB]
                if math.isnan(baseline_mb) or words[device + Device.SAMPLED] < words[at + Instance.LOADED_AT]:
                    return None
                added.append(max(0.0, peak_mb - baseline_mb))
        return tuple(added)

    def measuring_growth(self) -> Growth:
        """Begin to measure what a load adds to the memory of this process, unless that would hold the load up."""
        may_measure = process_knowledge(self.source) is not False
        if may_measure:
            self.freshen(NOW_S)
        return Growth(self, may_measure and self._figures_are_fresh())

    def measured_shares(self, row: int, server: int) -> tuple[float, ...]:
        """Return what a server (reference) was measured to take of each of a copy's devices, nothing if it was not.

        Needs the lock.
        """
        words, floats, tables = self.namespace.segment.words, self.namespace.segment.floats, self.namespace.tables
        if not server or server == self.namespace.reference:
            return ()
        at, span = tables.member(server - 1), words[tables.instance(row) + Instance.DEVICES].bit_count()
        measured = floats[at + Member.MEASURED_MB]
        if math.isnan(measured):
            return ()
        return tuple(floats[at + Member.SHARES : at + Member.SHARES + span]) if span > 1 else (measured,)

    def own_mb(self) -> float:
        """Return the device memory of this process in the last sample, 0 where it was not seen to have any."""
        at = self.namespace.tables.member(self.namespace.slot)
        mb = self.namespace.segment.floats[at + Member.MEASURED_MB]
        return 0.0 if math.isnan(mb) else mb

    def stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) in MB; a monitor of the caller's own may have seen a higher peak."""
        current, peak, total = self.samples.stats()
        foreign = self._given_source
        if foreign is not None:
            peak = max(peak, foreign.peak_mb)
        return current, peak, total

    # ---- copies that this process holds or owns ------------------------------------------------------------

    def find_idle(self, tag: str, tied: int = 0) -> int | None:
        """Return the row of an idle copy that this process can use, or None. Needs the lock.

        tied: bits of the devices on which it must lie, 0 for all.
        """
        tables, words = self.namespace.tables, self.namespace.segment.words
        model = tables.model_row(tag)
        if model is None:
            return None
        head = words[tables.model(model) + Model.IDLE_HEAD]
        while head:
            at = tables.instance(head - 1)
            if not tied or not words[at + Instance.DEVICES] & ~tied:
                return int(head) - 1
            head = words[at + Instance.NEXT]
        for row in reversed(self._rows_of_model.get(model, ())):
            at = tables.instance(row)
            owned = self._objects[row]
            there = words[at + Instance.GENERATION] == owned.generation and not (
                tied and words[at + Instance.DEVICES] & ~tied
            )
            if there and words[at + Instance.STATE] == Instance.IDLE:
                return row
        return None

    def hold(self, row: int, tag: str, operation: Operation) -> Copy:
        """Note that this process holds the copy of `tag` in an ACTIVE row, and return it. Needs the lock."""
        copy = self._copy_in(row, tag)
        self._note_held(copy, operation)
        return copy

    def take_quickly(self, tag: str, operation: Operation, kept: int = 0) -> Copy | None:
        """Take an idle copy that this process can use, note that it holds it, and return it, by the compiled core.

        None, with nothing changed, where there is no core, or if it takes Python: somebody waits, a copy runs alone,
        the lock is not free, there is no such copy, or this is its first use here. Takes the lock itself.

        kept: generation of a copy, the only one to be taken, that is in this process's tenure: those who wait for it
        may wait. 0: none.
        """
        namespace = self.namespace
        core = namespace.lock.core
        if core is None:
            return None
        copy: Copy | None = core.take_idle(
            namespace,
            namespace.reference,
            namespace.tables.rows_of_tags,
            self._handles,
            self._objects,
            self._rows_of_model,
            self._held,
            self._held_at,
            tag,
            operation,
            kept,
        )
        return copy

    def take_kept(self, tag: str, operation: Operation) -> Copy | None:
        """Take the copy that is in this process's tenure like `take_quickly`; None also if there is none."""
        tenure = self.tenures.current(tag)
        return None if tenure is None else self.take_quickly(tag, operation, tenure.generation)

    def give_back_quickly(self, copy: Copy) -> bool:
        """Give a copy back, that `let_go` has struck off, by the compiled core; False where it takes Python.

        Then nothing has changed. Takes the lock itself.
        """
        namespace = self.namespace
        core = namespace.lock.core
        if core is None:
            return False
        kept = self.scheduler.must_queue() and self._stays_kept(copy)
        if not core.release(namespace, namespace.reference, self._receipts, copy.row, copy.generation, kept):
            return False
        if kept:
            self.tenures.leave(copy.tag)
        return True

    def _stays_kept(self, copy: Copy) -> bool:
        """Tell whether `keeps` leaves a copy idle for this process, and has called the first waiter up already."""
        tenure = self.tenures.current(copy.tag)
        if tenure is None or not tenure.called_up or tenure.generation != copy.generation:
            return False
        return self.tenures.comes_back_at_once(copy.tag)

    def comes_back(self, tag: str) -> bool:
        """Note that this process asks for a model that others wait for; tell whether a copy is kept for it."""
        self.tenures.come_back(tag)
        tenure = self.tenures.current(tag)
        return tenure is not None and self.namespace.segment.words[self.namespace.tables.instance(tenure.row)] == (
            Instance.IDLE
        )

    def has_tenure(self, tag: str, row: int) -> bool:
        """Tell whether a copy was handed to this process a moment ago, so that it comes before others."""
        tenure = self.tenures.current(tag)
        if tenure is None or tenure.row != row:
            return False
        generation = self.namespace.segment.words[self.namespace.tables.instance(row) + Instance.GENERATION]
        return bool(tenure.generation == generation)

    def keeps(self, t: Transaction, copy: Copy, used: bool) -> bool:
        """Give a copy back, but leave it idle for this process if it may keep it; else return False."""
        tenure = self.tenures.current(copy.tag)
        if tenure is None or (tenure.row, tenure.generation) != (copy.row, copy.generation):
            return False
        if not self.tenures.comes_back_at_once(copy.tag):
            return False
        if not self.scheduler.keep(t, copy.row, used, call_up=not tenure.called_up):
            return False
        tenure.called_up = True
        return True

    def _note_held(self, copy: Copy, operation: Operation) -> None:
        at = (copy.row, copy.generation)
        uses = self.namespace.segment.words[self.namespace.tables.instance(copy.row) + Instance.USES]
        operation.gives_back = False
        operation.held = held = (copy, uses)
        self._held[at] = held
        self._held_at[_key(copy.value)] = at

    def hold_granted(self, row: int, tag: str, operation: Operation) -> Copy | None:
        """Note that this process holds what its ticket `row` was granted, and return it; without the lock.

        None if that cannot be told, because transactions come too fast or this machine's processors may reorder reads.
        The ticket is freed later, by `settle_receipts`: a transaction of its own would double the waiter's part of a
        hand-over.
        """
        if not CAN_READ_UNLOCKED:
            return None
        words, at = self.namespace.segment.words, self.namespace.tables.ticket(row)
        for _ in range(UNLOCKED_TRIES):
            change = words[Header.CHANGE]
            if not change & 1 and words[at + Ticket.STATE] == Ticket.GRANTED:
                copy = self._copy_in(words[at + Ticket.INSTANCE] - 1, tag)
                receipt = (row, words[at + Ticket.NUMBER])
                # No transaction was open, so the grant is not one that may yet be rolled back.
                if words[Header.CHANGE] == change:
                    # First the hold, so that no transaction finds a copy in use that nobody in this process has.
                    self._note_held(copy, operation)
                    self._receipts.add(receipt)
                    self.tenures.begin(tag, copy.row, copy.generation)
                    return copy
        return None

    def settle_receipts(self, t: Transaction) -> None:
        """Free the tickets whose grants were acted upon without the lock.

        To be called before anything else in a transaction in which this process gives up a copy.
        """
        if not self._receipts:
            return
        words, tables = self.namespace.segment.words, self.namespace.tables
        receipts = tuple(self._receipts)
        for row, number in receipts:
            at = tables.ticket(row)
            # If not, another thread has just done so, and is about to take it off the list.
            if words[at] != Ticket.FREE and words[at + Ticket.NUMBER] == number:
                self.namespace.transitions.hand_over.consume_answer(t, row)
        t.after.append(partial(self._forget_settled, receipts))

    def _forget_settled(self, receipts: Sequence[tuple[int, int]]) -> None:
        """Strike tickets off that are free. Looks, as calls after a transaction that was undone may be made, too."""
        words, tables = self.namespace.segment.words, self.namespace.tables
        for receipt in receipts:
            at = tables.ticket(receipt[0])
            if words[at] == Ticket.FREE or words[at + Ticket.NUMBER] != receipt[1]:
                self._receipts.discard(receipt)

    @property
    def has_receipts(self) -> bool:
        """Tell whether there is something to settle."""
        return bool(self._receipts)

    def _copy_in(self, row: int, tag: str) -> Copy:
        """Return what this process knows, or can read, of the copy in a row."""
        generation = self.namespace.segment.words[self.namespace.tables.instance(row) + Instance.GENERATION]
        copy = self._objects.get(row) or self._handles.get(row)
        if copy is None or copy.generation != generation:
            copy = self._handles[row] = Copy(row, generation, tag, self.namespace.tables.handle_of(row))
        return copy

    def adopt(self, row: int, tag: str, value: Any, operation: Operation) -> Copy:
        """Note a copy that this process has just loaded and holds; an object is its own from now on."""
        words, tables = self.namespace.segment.words, self.namespace.tables
        copy = Copy(row, words[tables.instance(row) + Instance.GENERATION], tag, value)
        with self._mutex:
            if not isinstance(value, str):
                self._objects[row] = copy
                self._rows_of_model[words[tables.instance(row) + Instance.MODEL]].append(row)
        self._note_held(copy, operation)
        return copy

    def let_go(self, value: Any, tag: str, operation: Operation) -> Copy | None:
        """Strike a held copy off the list and return it; None when this process holds no such thing.

        Several copies can have equal handles, or be the same object: one of `tag` is preferred.
        """
        while True:
            held = self._find_held(value, tag)
            if held is None:
                return None
            if self.let_go_of(held, operation):
                return held[0]

    def let_go_of(self, held: Held, operation: Operation) -> bool:
        """Strike a hold off the list; return False if it was struck off before."""
        copy = held[0]
        at = (copy.row, copy.generation)
        operation.held, operation.gives_back = held, True
        found = self._held.pop(at, None)
        if found is held:
            self._held_at.pop(_key(copy.value), None)
            return True
        operation.held, operation.gives_back = None, False
        if found is not None:
            # Another hold of the same copy, which has begun since.
            self._held[at] = found
        return False

    def _find_held(self, value: Any, tag: str) -> Held | None:
        key = _key(value)
        at = self._held_at.get(key)
        held = None if at is None else self._held.get(at)
        if held is not None and held[0].tag == tag and _key(held[0].value) == key:
            return held
        found = [held for held in list(self._held.values()) if _key(held[0].value) == key]
        return next((held for held in reversed(found) if held[0].tag == tag), found[-1] if found else None)

    def hold_again(self, held: Held) -> None:
        """Put back on the list what `let_go` has struck off."""
        copy = held[0]
        self._held[copy.row, copy.generation] = held

    # ---- calls that an exception has ended -------------------------------------------------------------------

    def begin(self, frame: FrameType | None) -> Operation:
        """Note that a call begins, which runs in `frame`, and return what it has in hand.

        See `mpmm.model_manager.operations`.
        """
        operation = Operation(frame)
        self.operations.add(operation)
        if self.keeper.dozing:
            self.keeper.wake()
        return operation

    def begin_for(self, owner: object) -> Operation:
        """Note that a call begins, which goes on for as long as `owner` is not collected."""
        operation = Operation(None)
        operation.owner = weakref.ref(owner)
        self.operations.add(operation)
        if self.keeper.dozing:
            self.keeper.wake()
        return operation

    def end(self, operation: Operation) -> None:
        """Note that a call has ended, and that what it has in hand is its caller's, or has been given back."""
        operation.frame = None
        if not operation.abandoned:
            self.operations.discard(operation)

    def abandon(self, operation: Operation) -> None:
        """Leave to the keeper what a call has in hand that does not go on; from finalizers and signal handlers, too."""
        operation.frame = None
        if operation.has_something:
            # It may have been taken off just before.
            self.operations.add(operation)
            operation.abandoned = self.has_abandoned = True
            if self.namespace.is_usable:
                self.keeper.wake()
        else:
            self.operations.discard(operation)

    def reconcile(self) -> None:
        """Take back what calls had in hand that an exception has ended, and end a transaction that it has left.

        Raises LockTimeoutError.
        """
        self.has_abandoned = False
        self.namespace.lock.end_abandoned()
        self.namespace.lock.finish_calls()
        for operation in ended_calls(self.operations):
            self._take_back(operation)

    def _take_back(self, operation: Operation) -> None:
        if operation.has_something:
            with self.namespace.transaction() as t:
                self.settle_receipts(t)
                self._leave_abandoned(t, operation)
                self._release_abandoned(t, operation)
                self.scheduler.advance(t)
            if operation.is_orphaned and operation.warning:
                _LOG.warning("mpmm %s: pid %d: %s", self.namespace.name, self.namespace.pid, operation.warning)
        self.operations.discard(operation)
        operation.frame = None

    def leave_if_there(self, ticket: tuple[int, int] | None, t: Transaction) -> bool:
        """Take a ticket (row and number) out of the queue; return False if that has been done already."""
        if ticket is None:
            return False
        words, at = self.namespace.segment.words, self.namespace.tables.ticket(ticket[0])
        if words[at] == Ticket.FREE or words[at + Ticket.NUMBER] != ticket[1]:
            return False
        if words[at + Ticket.MEMBER] != self.namespace.reference:
            return False
        self.namespace.transitions.hand_over.leave_queue(t, ticket[0])
        return True

    def _leave_abandoned(self, t: Transaction, operation: Operation) -> None:
        """Give up ticket and load of a call, if the books still know of them."""
        words, tables, transitions = self.namespace.segment.words, self.namespace.tables, self.namespace.transitions
        others = [other.ticket for other in list(self.operations) if other is not operation]
        # Where the transaction that queued it was undone, the next one was given the same number.
        if operation.ticket not in others:
            self.leave_if_there(operation.ticket, t)
        if operation.booking is not None:
            row, generation = operation.booking
            at = tables.instance(row)
            if (words[at + Instance.GENERATION], words[at + Instance.HOLDER]) == (generation, self.namespace.reference):
                if words[at] == Instance.LOADING:
                    transitions.loads.give_up(t, row)
                elif words[at] == Instance.RESUMING:
                    transitions.suspensions.turn_back(t, row, self.namespace.reference)
                elif words[at] == Instance.LEASED:
                    transitions.leases.end(t, row)

    def _release_abandoned(self, t: Transaction, operation: Operation) -> None:
        """Give back the copy of a call, unless that has been done, or another call has it by now."""
        held = operation.held
        if held is None:
            return
        copy, use = held
        if self._is_granted(copy.row):
            # Another waiter's by now, who may be about to put it on the list, without the lock.
            return
        at = (copy.row, copy.generation)
        words, row = self.namespace.segment.words, self.namespace.tables.instance(copy.row)
        if self._held.get(at) is held:
            ours = True
        else:
            # It was struck off: by this call, to give it back, or because its transaction was undone.
            others = [other for other in list(self.operations) if other is not operation and other.gives_back]
            ours = operation.gives_back and words[row + Instance.USES] == use
            ours = ours and not any(other.held is held for other in others)
        if ours and self.is_held(copy):
            self.scheduler.release(t, copy.row)
        if self._held.get(at) is held:
            self._held.pop(at)

    def _is_granted(self, row: int) -> bool:
        """Tell whether a ticket was granted the copy in a row, and its waiter has not taken it for certain."""
        words, tables, layout = self.namespace.segment.words, self.namespace.tables, self.namespace.segment.layout
        tickets = map(tables.ticket, tables.rows_where(layout.tickets, Ticket.INSTANCE, row + 1))
        return any(words[at] == Ticket.GRANTED for at in tickets)

    @property
    def holds_copies(self) -> bool:
        """Tell whether this process holds copies of models; without the lock."""
        return bool(self._held)

    def is_held(self, copy: Copy) -> bool:
        """Tell whether the row still says that this process holds the copy. Needs the lock."""
        words, at = self.namespace.segment.words, self.namespace.tables.instance(copy.row)
        return bool(
            words[at + Instance.STATE] == Instance.ACTIVE
            and words[at + Instance.GENERATION] == copy.generation
            and words[at + Instance.HOLDER] == self.namespace.reference
        )

    def value_of(self, row: int) -> Any:
        """Return the object or handle of a row as far as this process can know it, else None."""
        owned = self._objects.get(row)
        return owned.value if owned else (self.namespace.tables.handle_of(row) or None)

    def is_twin(self, copy: Copy) -> bool:
        """Tell whether others stand for the same handle as a copy. Looks without the lock, which a holder may do."""
        handle = copy.value.encode("utf-8", "surrogateescape") if isinstance(copy.value, str) else b""
        return bool(handle) and bool(self.namespace.transitions.twins.of(handle, copy.row))

    def warn_of_twins(self, t: Transaction, tag: str, handle: str) -> None:
        """Say, once a tag, that a loader has returned a handle that another one has returned before."""
        if tag not in self._twins_of_tags:
            self._twins_of_tags.add(tag)
            text = (
                "mpmm %s: pid %d: the loader of %s has returned the handle %r, whose object is "
                "loaded already: it is counted once, and unloaded with the last copy; let the loader return a new "
                "handle each time, or set max_model_copies=1"
            )
            t.after.append(partial(_LOG.warning, text, self.namespace.name, self.namespace.pid, tag, handle))

    def handle_is_alive(self, copy: Copy) -> bool:
        """Tell whether what a handle stands for still lives; a handle that never named a server is taken on trust."""
        words, at = self.namespace.segment.words, self.namespace.tables.instance(copy.row)
        if not words[at + Instance.HAS_SERVER]:
            return True
        server = words[at + Instance.SERVER]
        if server:
            return self.namespace.member_is_alive(server - 1)
        return multi_process_shared.server_pid(copy.value) is not None

    def server_pid_of(self, value: Any) -> int | None:
        """Return the pid of the process behind a handle; None for an object, or a handle without a server."""
        return multi_process_shared.server_pid(value) if isinstance(value, str) else None

    def server_context(self, row: int) -> ServerContext:
        """Return what a model server should know that the loader of `row` starts."""
        namespace = self.namespace
        place = (str(namespace.runtime.root), namespace.name)
        generation = namespace.segment.words[namespace.tables.instance(row) + Instance.GENERATION]
        uuids = self.placement_of(row).uuids
        setting = server_setting(self.source, uuids)
        # In the server they are all that there is, so CUDA and HIP count them from 0.
        placement = Placement(tuple(range(len(uuids))), uuids) if setting else self.placement_of(row)
        return ServerContext(
            alive_lock=str(namespace.runtime.file("alive.lock")),
            namespace=namespace.name,
            environment=(setting,) if setting else (),
            on_start=ServerDuty(*place, row, generation, placement),
            # A manager inside a server is still there when no worker is left.
            on_last=None if namespace.kind == Member.GUEST else _Farewell(*place),
        )

    def placement_of(self, row: int) -> Placement:
        """Return where a copy lies."""
        words = self.namespace.segment.words
        return self.samples.placement_of(words[self.namespace.tables.instance(row) + Instance.DEVICES])

    # ---- unloading -----------------------------------------------------------------------------------------

    def unload_at_once(self, t: Transaction, copy: Copy) -> None:
        """Have a copy that was just given back unloaded, if it is kept for no time at all, and nobody waits for it.

        What others give back whom nobody has told so, the next poll finds.
        """
        words, tables = self.namespace.segment.words, self.namespace.tables
        at = tables.instance(copy.row)
        model = tables.model(words[at + Instance.MODEL])
        unwanted = words[at] == Instance.IDLE and words[at + Instance.GENERATION] == copy.generation
        if not unwanted or words[model + Model.WAITING] or words[model + Model.PINS]:
            return
        if words[model + Model.KEEP_ALIVE] == Model.AT_ONCE:
            cause = Cause(Reason.EXPIRED)
            self.namespace.transitions.unloads.begin(t, copy.row, self.namespace.slot, evicted=False, cause=cause)

    def unload_beside(self) -> None:
        """Do `unload_assigned` in a thread of its own, if there is anything to do.

        A waiter has to give up in time, and the keeper has other duties, however long an unload takes: a model's own
        code may hang. Both are told of the same unloads, because either may be stuck elsewhere.
        """
        if self._has_to_unload():
            # Without a thread to be had, the next look at the rows finds what is left, or another process is given it.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._unload_beside, name="mpmm-unload", daemon=True).start()

    def _unload_beside(self) -> None:
        with self._reporting_trouble(), self.waiting():
            self._unload_what_is_left()

    @contextlib.contextmanager
    def _reporting_trouble(self) -> Iterator[None]:
        """Log what goes wrong in a thread that unloads."""
        try:
            with self.namespace.lock.patient_here():
                yield
        except Exception:
            # Otherwise the process has left meanwhile, and another one has been given the rest to do.
            if self.namespace.is_usable:
                self.unload_failed = True
                _LOG.exception("mpmm %s: pid %d failed to unload a copy", self.namespace.name, self.namespace.pid)

    def _has_to_unload(self) -> bool:
        """Look, without the lock, for copies that this process has to unload and that none of its threads is at."""
        return any(row not in self._unloading for row, _ in self._assigned())

    def _assigned(self) -> list[tuple[int, int]]:
        """Return row and generation of the copies that this process has to unload, or to suspend, now.

        Where something starts quietly, see `Instance.STEADY`, that has to wait; but not for a process that leaves.
        """
        words, tables = self.namespace.segment.words, self.namespace.tables
        steady = 0 if self.closing else words[Header.STEADY]
        ours = tables.rows_where(self.namespace.segment.layout.instances, Instance.HOLDER, self.namespace.reference)
        starts = [(row, tables.instance(row)) for row in ours]
        return [
            (row, words[at + Instance.GENERATION])
            for row, at in starts
            if words[at + Instance.STATE] in (Instance.UNLOADING, Instance.SUSPENDING)
            and not words[at + Instance.DEVICES] & steady
        ]

    def unload_assigned(self) -> None:
        """Unload every copy whose row says that this process has to, and return when that is done.

        What other threads are at is waited for, too, but no longer than it takes to kill a server.
        """
        self._unload_what_is_left()
        deadline = time.monotonic() + ENDS_WITHIN_S
        while self._assigned() and time.monotonic() < deadline:
            time.sleep(UNLOAD_LOOK_S)
            self._unload_what_is_left()

    def _unload_what_is_left(self) -> None:
        """Unload the copies that this process has to and that none of its threads is at.

        Handles are unloaded several at a time, so that one server that does not end holds up no other; objects one
        after another, because their unload methods may not be made for threads.
        """
        words, tables = self.namespace.segment.words, self.namespace.tables
        while self._has_to_unload():
            with self.namespace.transaction():
                found = [one for one in self._assigned() if one[0] not in self._unloading]
                handles = [one for one in found if not words[tables.instance(one[0]) + Instance.OWNER]]
                objects = [one for one in found if one not in handles]
                mine = [*handles[: UNLOADS_AT_A_TIME - 1], *objects[:1]] or handles[:1]
                # The mutex of the lock guards the set, too: several threads unload at the same time.
                self._unloading.update(row for row, _ in mine)
            if not mine:
                return
            self._unload_all(mine)

    def _unload_all(self, copies: Sequence[tuple[int, int]]) -> None:
        """Unload these copies (row, generation), which are in `_unloading`, each in a thread of its own but the last.

        The last one is this thread's.
        """
        *others, last = copies
        threads = []
        try:
            for other in others:
                thread = threading.Thread(target=self._unload_claimed, args=other, name="mpmm-unload", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    # There is no thread to be had.
                    self._unload_claimed(*other)
                else:
                    threads.append(thread)
            self._unload(*last)
        finally:
            self._unloading.discard(last[0])
        for thread in threads:
            thread.join()

    def _unload_claimed(self, row: int, generation: int) -> None:
        try:
            with self._reporting_trouble(), self.waiting():
                self._unload(row, generation)
        finally:
            self._unloading.discard(row)

    def hand_late_unloads_over(self) -> None:
        """Find unloads that take longer than `memory_return_seconds`, and give them an heir, or count on them no more.

        Any process can unload a handle: the next one is told to, this one if it has not tried yet. An object only its
        owner can unload. What has been late for so long that a whole further turn would have been enough counts as
        memory in use, so that other copies are evicted instead.
        """
        if not any(self._unloads_overdue(time.monotonic_ns())):
            return
        namespace = self.namespace
        words, tables = namespace.segment.words, namespace.tables
        said: dict[tuple[int, int], list[str]] = defaultdict(list)
        with namespace.transaction() as t:
            for row, late in list(self._unloads_overdue(t.now)):
                at = tables.instance(row)
                holder, tag = words[at + Instance.HOLDER] - 1, tables.tag_of(words[at + Instance.MODEL])
                if late and not words[at + Instance.UNLOAD_LATE]:
                    namespace.transitions.unloads.note_late(t, row)
                    said[holder, -1].append(tag)
                heir = None if words[at + Instance.OWNER] else self._heir_of(row, holder)
                if heir is not None:
                    namespace.transitions.unloads.hand_over(t, row, heir)
                    said[holder, heir].append(tag)
            pids = {slot: words[tables.member(slot) + Member.PID] for ends in said for slot in ends if slot >= 0}
            self.scheduler.advance(t)
        for (holder, heir), tags in said.items():
            which = f"{tags[0]} and {len(tags) - 1} more" if len(tags) > 1 else tags[0]
            then = f"pid {pids[heir]} does it instead" if heir >= 0 else "other copies are evicted instead"
            _LOG.warning("mpmm %s: pid %d has not unloaded %s in time; %s", namespace.name, pids[holder], which, then)

    def _unloads_overdue(self, now_ns: int) -> Iterator[tuple[int, bool]]:
        """Find the rows whose HOLDER has not unloaded them in time, and tell whether nobody should count on them."""
        namespace = self.namespace
        words, tables = namespace.segment.words, namespace.tables
        limit_ns = max(namespace.settings.memory_return_seconds, SHORTEST_UNLOAD_LIMIT_S) * 1e9
        for row in tables.rows_where(namespace.segment.layout.instances, Instance.STATE, Instance.UNLOADING):
            at = tables.instance(row)
            if words[at + Instance.DEVICES] & words[Header.STEADY]:
                # It has to wait.
                continue
            since, owned = words[at + Instance.SINCE], words[at + Instance.OWNER]
            told = max(since, words[at + Instance.HANDED_AT])
            late = now_ns - since > limit_ns * (1 if owned else 2)
            if now_ns - told > limit_ns and not (owned and words[at + Instance.UNLOAD_LATE]):
                yield row, late

    def _heir_of(self, row: int, holder: int) -> int | None:
        """Return the worker (slot) that takes an unload over from `holder` (slot): this one, unless it is at it itself.

        Then the next in the table, so that each has its turn; None if there is none. Needs the lock.
        """
        namespace = self.namespace
        at_it = row in self._unloading
        if holder != namespace.slot and not at_it:
            return namespace.slot
        workers = namespace.tables.rows_where(namespace.segment.layout.members, Member.STATE, Member.WORKER)
        others = [slot for slot in workers if slot not in (holder, namespace.slot)]
        # While this process is at other unloads, this one is merely in line.
        last_resort = None if self._unloading else namespace.slot
        return next((slot for slot in others if slot > holder), others[0] if others else last_resort)

    def devices_in_use(self, tag: str) -> int:
        """Return the bits of the devices on which this process holds copies of a model."""
        tables, words = self.namespace.tables, self.namespace.segment.words
        with self.namespace.transaction():
            model = tables.model_row(tag)
            rows = tables.rows_where(self.namespace.segment.layout.instances, Instance.HOLDER, self.namespace.reference)
            bits = 0
            for at in map(tables.instance, rows):
                if words[at] == Instance.ACTIVE and words[at + Instance.MODEL] == model:
                    bits |= words[at + Instance.DEVICES]
            return bits

    def free_for_load(self, row: int) -> Free | None:
        """Return what the devices have for a copy that is about to load; None if there is nothing to measure it with.

        None as well if the lock is not free at once: a load does not wait for it.
        """
        namespace = self.namespace
        words, floats, tables = namespace.segment.words, namespace.segment.floats, namespace.tables
        if words[Header.SOURCE_BOOKS_ONLY]:
            return None
        at = tables.instance(row)
        with contextlib.suppress(LockTimeoutError), namespace.transaction(NOW_S):
            devices = device_rows(words[at + Instance.DEVICES])
            own_mb = floats[at + Instance.RESERVED_MB] / len(devices)
            copies = self.scheduler.read_copies()
            views = [view for view in self.scheduler.device_views(copies) if view.device in devices]
            free_mb = min(view.total_mb - view.used_mb - max(0.0, view.reserved_mb - own_mb) for view in views)
            coming = any(view.unloading or view.returning_mb > 0 for view in views)
            room_mb = min(self._room_mb(device, copies) for device in devices)
            return Free(free_mb * len(devices), room_mb * len(devices), not coming and not self._beside(row))
        return None

    def could_gain(self, row: int, free: Free | None, places: int) -> bool:
        """Tell whether a load that has run out of memory could find more, once others have gone. Needs the lock.

        row: the copy that was to be loaded. places: bits of the devices where it may load, 0 for all.
        """
        if free is None or not free.alone or self._beside(row):
            return True
        here = self.namespace.segment.words[self.namespace.tables.instance(row) + Instance.DEVICES]
        return self._roomiest_mb(places, here.bit_count(), here, free.mb) > free.mb

    def _beside(self, row: int) -> list[int]:
        """Return the instances beside a copy that could make room for it: all but the idle ones of pinned models."""
        words, tables = self.namespace.segment.words, self.namespace.tables
        others = []
        for device in device_rows(words[tables.instance(row) + Instance.DEVICES]):
            for other in tables.on_device(device):
                at = tables.instance(other)
                pinned = words[tables.model(words[at + Instance.MODEL]) + Model.PINS]
                if other != row and words[at] != Instance.SUSPENDED and not (pinned and words[at] == Instance.IDLE):
                    others.append(other)
        return others

    def _roomiest_mb(self, places: int, span: int, here: int = 0, here_mb: float = 0.0) -> float:
        """Return what a copy can be given at best on `span` of these devices (bits, 0 for all) beside what is not ours.

        here: bits of the devices that are known to have no more than `here_mb` for it together.
        """
        copies = self.scheduler.read_copies()
        rooms = [
            here_mb / span if here >> row & 1 else self._room_mb(row, copies)
            for row in device_rows(places) or self.samples.rows()
        ]
        return min(sorted(rooms)[-span:], default=0.0) * span

    def _room_mb(self, device: int, copies: Copies) -> float:
        """Return how much of a device one copy could have, if it had the device to itself: see `admission.widened`."""
        view = next(view for view in self.scheduler.device_views(copies) if view.device == device)
        return min(self.scheduler.limit_mb(device), view.total_mb - max(0.0, view.external_least_mb))

    def learn_from_load(self, t: Transaction, row: int, free: Free | None, places: int, first: bool) -> None:
        """Record that a load has run out of memory, before its row is freed.

        row, free, places: see `could_gain`. first: it may get a second turn. Where nothing can be measured, it is taken
        for a quarter more in that; else for more than was free, less what others have begun to take since.
        """
        namespace = self.namespace
        words, floats, tables = namespace.segment.words, namespace.segment.floats, namespace.tables
        at = tables.instance(row)
        model, here = words[at + Instance.MODEL], words[at + Instance.DEVICES]
        span = here.bit_count()
        at_least_mb = 0.0
        if free is not None:
            generation = words[at + Instance.GENERATION]
            later = [tables.instance(other) for other in self._beside(row)]
            came_mb = math.fsum(floats[o + Instance.MB] for o in later if words[o + Instance.GENERATION] > generation)
            room_mb = self._roomiest_mb(places, span, here, free.room_mb)
            at_least_mb = bound_mb(free.mb - came_mb * span, room_mb)
        namespace.transitions.estimates.record_out_of_memory(t, model, at_least_mb, loading=True)
        if free is None and first and words[Header.SOURCE_BOOKS_ONLY]:
            self._raise_by_a_quarter(t, model, here)
        self._say_ran_out(t, model)

    def _raise_by_a_quarter(self, t: Transaction, model: int, devices: int) -> None:
        """Take a model for more, with nothing to go by but the books."""
        need_mb = self.scheduler.need_mb(model)
        limit_mb = max(map(self.scheduler.limit_mb, device_rows(devices)), default=need_mb)
        raised_mb = raised_estimate_mb(need_mb, limit_mb)
        measured = bool(self.namespace.segment.words[self.namespace.tables.model(model) + Model.MEASURED])
        self.namespace.transitions.estimates.estimate(t, model, raised_mb, measured)
        t.after.append(partial(report_estimate, self.namespace.tables.tag_of(model), raised_mb))

    def _say_ran_out(self, t: Transaction, model: int) -> None:
        namespace = self.namespace
        tag, mb = (
            namespace.tables.tag_of(model),
            namespace.segment.floats[namespace.tables.model(model) + Model.AT_LEAST_MB],
        )
        text = "mpmm %s: pid %d ran out of memory with %s, which needs more than %.0f MB"
        if not mb:
            text, mb = (
                "mpmm %s: pid %d ran out of memory with %s, assumed to need %.0f MB",
                self.scheduler.need_mb(model),
            )
        t.after.append(partial(_LOG.warning, text, namespace.name, namespace.pid, tag, mb))

    def held_by_thread(self) -> tuple[list[int], list[int]]:
        """Return the rows that the calling thread holds in blocks or is loading, and that which it holds alone.

        Only its `with` blocks and its loaders are sure to end in this very thread: what it has acquired otherwise,
        another one may release. Without the lock, as all of these are this process's own.
        """
        words, tables, here = self.namespace.segment.words, self.namespace.tables, self.thread
        firm = [
            row
            for row, generation in here.loads
            if words[tables.instance(row)] == Instance.LOADING
            and words[tables.instance(row) + Instance.GENERATION] == generation
        ]
        copies = [block.held[0] for block in here.blocks if block.held is not None and block in self.operations]
        firm += [copy.row for copy in copies if self.is_held(copy)]
        alone = []
        if here.alone is not None:
            row, generation = here.alone
            if words[
                tables.instance(row) + Instance.GENERATION
            ] == generation and self.namespace.transitions.isolation.runs_alone(row):
                alone.append(row)
        return firm, alone

    def waits_for_itself(self, ticket: int, firm: list[int]) -> bool:
        """Tell whether a waiter can be served only by rows that its own thread will not let go of. Needs the lock.

        It waits for a copy of its model and has all there are; or for one to be loaded, by a loader that asks for it;
        or for copies in use to be idle, so that there is room, and all that are in use anywhere are its own.
        """
        words, tables, layout = self.namespace.segment.words, self.namespace.tables, self.namespace.segment.layout
        at = tables.ticket(ticket)
        if words[at] != Ticket.WAITING:
            return False
        ours = set(firm)
        rows = [
            row
            for row in tables.rows_where(layout.instances, Instance.MODEL, words[at + Ticket.MODEL])
            if words[tables.instance(row)] not in (Instance.SUSPENDING, Instance.SUSPENDED)
        ]
        reason = words[at + Ticket.REASON]
        if reason == Reason.COPIES:
            return ours.issuperset(rows)
        if reason == Reason.SHARING:
            return ours.issuperset(rows) and all(words[tables.instance(row)] == Instance.LOADING for row in rows)
        states = (
            *(Instance.ACTIVE, Instance.LOADING, Instance.LEASED, Instance.UNLOADING),
            *(Instance.SUSPENDING, Instance.RESUMING),
        )
        in_use = [row for row in tables.used_rows(layout.instances) if words[tables.instance(row)] in states]
        return reason == Reason.IN_USE and ours.issuperset(in_use)

    def make_room_after_use(self, tag: str) -> None:
        """Learn from a use of a model that has run out of memory, and unload what is idle on its devices.

        A copy of this process had what it took and all that was free besides: it needs more than that, and a quarter
        more than it is taken for, as its work space may not be in the figures. Its estimate stays: that is what a copy
        takes, whatever it was asked to do.
        """
        namespace = self.namespace
        words, floats, tables = namespace.segment.words, namespace.segment.floats, namespace.tables
        devices = self.devices_in_use(tag)
        with namespace.transaction() as t:
            model = tables.model_row(tag)
            if model is None:
                return
            if words[Header.SOURCE_BOOKS_ONLY] or not devices:
                namespace.transitions.estimates.record_out_of_memory(t, model)
                self._raise_by_a_quarter(t, model, devices)
            else:
                rows = tables.rows_where(namespace.segment.layout.instances, Instance.HOLDER, namespace.reference)
                ours = [at for at in map(tables.instance, rows) if words[at + Instance.MODEL] == model]
                span = max((words[at + Instance.DEVICES].bit_count() for at in ours), default=1)
                own_mb = max((floats[at + Instance.MB] for at in ours), default=0.0)
                views = self.scheduler.device_views(self.scheduler.read_copies())
                free = [v.total_mb - v.used_mb - v.reserved_mb for v in views if devices >> v.device & 1]
                limit_mb = self._roomiest_mb(devices, span)
                had_mb = own_mb + max(0.0, min(free)) * span
                at_least_mb = max(had_mb, raised_estimate_mb(self.scheduler.need_mb(model), limit_mb))
                namespace.transitions.estimates.record_out_of_memory(t, model, bound_mb(at_least_mb, limit_mb))
            self._say_ran_out(t, model)
        self.make_room(devices)

    def make_room(self, devices: int) -> None:
        """Take back what admission believed: unload what is idle on these devices (bits), pinned models aside."""
        namespace = self.namespace
        words, tables = namespace.segment.words, namespace.tables
        with namespace.transaction() as t:
            for row in tables.rows_where(namespace.segment.layout.instances, Instance.STATE, Instance.IDLE):
                at = tables.instance(row)
                pinned = words[tables.model(words[at + Instance.MODEL]) + Model.PINS]
                # A twin has gone with the one before it.
                if words[at] == Instance.IDLE and words[at + Instance.DEVICES] & devices and not pinned:
                    namespace.transitions.unloads.begin(t, row, namespace.slot, evicted=True)
        self.unload_assigned()

    def wait_for_unloads(self, devices: int) -> None:
        """Wait until nothing is being unloaded from devices (bits), others' objects included, and memory is back.

        No longer than `memory_return_seconds` and the time for which such figures count: somebody may be stuck.
        """
        namespace = self.namespace
        words, floats, tables = namespace.segment.words, namespace.segment.floats, namespace.tables
        deadline = time.monotonic() + namespace.settings.memory_return_seconds + namespace.settings.poll_interval
        while time.monotonic() < deadline:
            with namespace.transaction():
                unloading = any(
                    words[tables.instance(row) + Instance.DEVICES] & devices
                    for row in tables.rows_where(namespace.segment.layout.instances, Instance.STATE, Instance.UNLOADING)
                )
                rows = device_rows(devices)
                returning = any(floats[tables.device(device) + Device.RETURNING_MB] > 0 for device in rows)
            if not unloading and not returning:
                return
            time.sleep(UNLOAD_LOOK_S)

    def _unload(self, row: int, generation: int) -> None:
        """Unload a copy and free its row, unless another process has done so, or has been told to, meanwhile.

        One that is to be suspended is.
        """
        namespace = self.namespace
        words, tables = namespace.segment.words, namespace.tables
        at = tables.instance(row)
        if words[at] == Instance.SUSPENDING:
            self.suspender.suspend(row, generation)
            self._settle()
            return
        with namespace.transaction():
            if not self._is_unloading(at, generation) or words[at + Instance.HOLDER] != namespace.reference:
                return
            model, owned, server = (words[at + word] for word in (Instance.MODEL, Instance.OWNER, Instance.SERVER))
            tag, handle = tables.tag_of(model), tables.handle_of(row)
            is_last = namespace.transitions.twins.unloads_handle(row)
            # A server that has died may have a successor of the same name, which is another copy's.
            lost = words[at + Instance.HAS_SERVER] and words[at + Instance.DOOMED] == Instance.LOST and not server
            server_pid = words[tables.member(server - 1) + Member.PID] if server else None
        if says_more(_LOG):
            why, mb = decision(self, EventKind.UNLOAD_BEGAN, row), namespace.segment.floats[at + Instance.MB]
            text = "mpmm %s: pid %d unloads %s, %.0f MB%s"
            _LOG.info(text, namespace.name, namespace.pid, tag, mb, f": it {why}" if why else "")
        if owned:
            copy = self._forget_object(row, generation)
            if copy is not None:
                unload_object(copy.value)
                # Before the garbage is collected, which is not what something still refers to.
                del copy
                collect_garbage()
        elif handle and is_last and not lost:
            self.suspender.prepare_end(row)
            self._unload_handle(handle, server - 1 if server else None, server_pid)
        with namespace.transaction() as t:
            if self._is_unloading(at, generation):
                namespace.transitions.unloads.end(t, row)
            loaded = words[tables.model(model) + Model.LOADED]
        _LOG.info("mpmm %s: pid %d unloaded %s", namespace.name, namespace.pid, tag)
        report_model_count(tag, loaded)
        self._settle()

    def _is_unloading(self, at: int, generation: int) -> bool:
        """Tell whether a row (first word) still stands for a copy in mid-unload."""
        words = self.namespace.segment.words
        return bool(words[at + Instance.STATE] == Instance.UNLOADING and words[at + Instance.GENERATION] == generation)

    def _unload_handle(self, handle: str, slot: int | None, server_pid: int | None) -> None:
        """End the server of a handle, for certain; one of another pid than `server_pid` is another copy's by now.

        A server that does not leave by itself is killed before another process takes the unload over.

        slot: of the server, if it is a member. Raises ModelServerError when it survives.
        """
        limit_s = min(max(self.namespace.settings.memory_return_seconds, SHORTEST_UNLOAD_LIMIT_S), ENDS_WITHIN_S)
        with contextlib.suppress(OSError, EOFError):
            multi_process_shared.unload(handle, timeout_seconds=limit_s, pid=server_pid)
        if slot is not None and server_pid is not None:
            # Its files may be gone, or not be read. Whether it lives, the namespace knows.
            kill_process(server_pid, lambda: self._serves(slot, server_pid), handle)

    def _serves(self, slot: int, pid: int) -> bool:
        """Tell whether a model server is a living member in this slot; without the lock."""
        words, at = self.namespace.segment.words, self.namespace.tables.member(slot)
        is_it = words[at] == Member.SERVER and words[at + Member.PID] == pid
        return is_it and self.namespace.member_is_alive(slot)

    def _settle(self) -> None:
        """Let waiters profit from freed memory: a new sample has to show it."""
        if self.source.cheap:
            self.freshen()
        else:
            self.request_sample()
        if self._given_source is not None:
            self.reset_peak()
            self.samples.reset_peak()
        with self.namespace.transaction() as t:
            self.scheduler.advance(t)

    def _unload_everything(self) -> None:
        self.namespace.reset()
        self.unload_assigned()

    def _forget_object(self, row: int, generation: int) -> Copy | None:
        """Strike an object off the list and return it; None if the row is no longer that copy's."""
        with self._mutex:
            copy = self._objects.get(row)
            if copy is None or copy.generation != generation:
                return None
            del self._objects[row]
            for rows in self._rows_of_model.values():
                if row in rows:
                    rows.remove(row)
            return copy


def _key(value: Any) -> Hashable:
    # The text of a handle of a class of its own, so that no code of such a class runs where keys are compared: the
    # compiled core does that with the lock held.
    return str.__str__(value) if isinstance(value, str) else id(value)


def unload_made(value: Any) -> None:
    """Unload what a loader has made, a handle or an object; None is nothing."""
    if isinstance(value, str):
        with contextlib.suppress(OSError, EOFError):
            multi_process_shared.unload(value)
    elif value is not None:
        unload_object(value)


def unload_object(value: Any) -> None:
    """Have an object let go of what garbage collection does not see."""
    for name in _UNLOAD_METHODS:
        method = getattr(value, name, None)
        if callable(method):
            try:
                method()
            except Exception:
                # It is the model's own code. The memory is gone from the books either way.
                _LOG.exception("mpmm: %s of a %s failed", name, type(value).__name__)
            return


def collect_garbage() -> None:
    """Give back the memory of what nothing refers to any more, cycles among it."""
    gc.collect()
    _empty_torch_cache()


def _empty_torch_cache() -> None:
    """Give back what torch keeps for itself, where somebody has imported torch."""
    torch = sys.modules.get("torch")
    if torch is not None:
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


def _forget_all_after_fork() -> None:
    for worker in list(_workers):
        worker.forget_after_fork()
    _workers.clear()


in_forked_child(_forget_all_after_fork, ChildStep.WORKER)
