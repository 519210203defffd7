"""A process's part in suspension: it does what the rows tell it to do, without the lock, within a time limit."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mpmm.errors import ModelServerError, SuspendError
from mpmm.interpreter.thread_locks import new_lock
from mpmm.memory.samples import SharedSamples
from mpmm.multi_process_shared.rpc import protocol
from mpmm.multi_process_shared.sleeping import ask_to, can_sleep, record_of
from mpmm.policy.out_of_memory import is_out_of_memory
from mpmm.policy.reasons import explain
from mpmm.policy.suspension import Unsuspendable, Way, limit_s
from mpmm.policy.view import Reason
from mpmm.scheduling import Scheduler
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Instance, device_rows
from mpmm.shared_state.liveness import is_member_here
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.rows import InstanceRow
from mpmm.shared_state.settings import ALWAYS, NEVER
from mpmm.shared_state.tables import encoded_handle
from mpmm.shared_state.transaction import Transaction
from mpmm.sources.host_memory import host_memory_left_mb, host_memory_mb
from mpmm.sources.process_tree import is_ending, is_stopped
from mpmm.sources.timeouts import NoAnswerError, answer_within
from mpmm.suspend.driver import GOOD_BRANCHES, HAZARDOUS_BRANCHES, driver_branch
from mpmm.suspend.helper import ask_helper, kill_stopped_helper
from mpmm.text.printable import printable_logger

__all__ = ["Suspender"]

_LOG = printable_logger("mpmm")
_IN_HOST = (Instance.SUSPENDING, Instance.SUSPENDED, Instance.RESUMING)
_MOVING = (Instance.SUSPENDING, Instance.RESUMING)
# How often a thread that waits for another process's suspension or resume checks whether it has ended.
LOOK_S = 0.01
# A process may take this many times its limit to report that the limit has passed; then the leader does.
GRACE = 1.5
# How long the leader must have seen that a process has not reported it.
OVERDUE_S = 1.0
# With less than this share of its memory free, the host may swap or kill: copies are dropped, and none is suspended.
HOST_RESERVE = 0.05
# A thread that wakes up later than this after its limit was stopped with its process, or had no processor.
LATE_S = 0.5
# How long it may take until a killed process is seen to end.
DYING_S = 0.5


@dataclass(frozen=True)
class _Task:
    """A copy to suspend or resume; `copy`: its row and generation.

    shown: the tag as people see it. server: slot of the model server. value: the object, None for a handle.
    """

    copy: tuple[int, int]
    tag: str
    shown: str
    way: Way
    mb: float
    handle: str
    server: int | None
    server_pid: int | None
    value: Any


class Suspender:
    """One process's part in the suspension of a namespace's instances."""

    def __init__(
        self,
        namespace: Namespace,
        scheduler: Scheduler,
        samples: SharedSamples,
        value_of: Callable[[int], Any],
        unload_in_thread: Callable[[], object],
    ) -> None:
        """value_of: returns what this process has loaded for a row. unload_in_thread: starts its pending unloads."""
        self._namespace = namespace
        self._scheduler = scheduler
        self._samples = samples
        self._value_of = value_of
        self._unload_in_thread = unload_in_thread
        # By copy: the lock held by the thread whose turn it is with that object of this process.
        self._turns: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()
        self._mutex = new_lock()
        # For the leader: when it first saw that copies (row, generation) are overdue.
        self._overdue_since: dict[tuple[int, int], float] = {}

    def way_of(self, value: Any, row: int) -> Way:
        """Return how the value that a loader has made for a row can be suspended."""
        if not encoded_handle(value):
            return Way.COOPERATIVE if can_sleep(value) else Way.NONE
        record = record_of(value)
        if record is None:
            return Way.NONE
        if record.sleeps:
            return Way.COOPERATIVE
        if self._samples.is_spread(record.pid):
            # The driver's checkpoint would move only what the server's own process has.
            return Way.NONE
        # A process that serves the object beside other work must not be stopped.
        return Way.CHECKPOINT if record.spawned and self._may_checkpoint(row) else Way.NONE

    def _may_checkpoint(self, row: int) -> bool:
        """Tell whether the driver may suspend the server of a copy: not on MIG slices, nor across pid namespaces."""
        choice = self._namespace.settings.suspend_checkpoints
        if choice == NEVER or not self._namespace.tables.header.pid_namespace:
            return False
        if any(uuid.startswith("MIG-") for uuid in self._samples.placement_of_instance(row).uuids):
            return False
        return choice == ALWAYS or self._driver_is_good

    @functools.cached_property
    def _driver_is_good(self) -> bool:
        branch = driver_branch()
        good = branch in GOOD_BRANCHES
        if branch is not None and not good:
            text = (
                "mpmm %s: the driver's checkpoints are not used to suspend models, because they are untested on driver "
                "%d (tested: %s); suspend='checkpoint' turns them on, suspend='cooperative' silences this message"
            )
            known = ", ".join(map(str, sorted(GOOD_BRANCHES)))
            _LOG.info(text, self._namespace.name, branch, known)
        return good

    # ---- suspend -------------------------------------------------------------------------------------------

    def suspend(self, row: int, generation: int) -> None:
        """Suspend a copy whose row says that this process has to; unload it if that fails."""
        task = self._task(row, generation, Instance.SUSPENDING)
        if task is None:
            return
        done, why = False, None
        room_mb = self._host_room_mb(_spare_mb())
        if task.mb > room_mb:
            error = SuspendError(f"the host has only {max(0.0, room_mb):.0f} MB left for it", tag=task.tag)
            self._say(logging.WARNING, task, protocol.SLEEP, error)
        else:
            done, why = self._attempt(task, protocol.SLEEP)
        with self._namespace.transaction() as t:
            if self._is_ours(row, generation, Instance.SUSPENDING):
                if done:
                    self._namespace.transitions.suspensions.end(t, row)
                else:
                    self._namespace.transitions.suspensions.fail(t, row, why)
                self._scheduler.advance(t)
        if done:
            _LOG.info("mpmm %s: pid %d suspended %s", self._namespace.name, self._namespace.pid, task.shown)

    def begin_with_idle(self, tag: str, expect: Callable[[Sequence[int]], None]) -> list[tuple[int, int]]:
        """Start suspending the idle copies of a model, by hand; return row and generation of each.

        expect: called with their rows, with the lock held; if it raises, nothing has changed.
        """
        namespace = self._namespace
        suspend, cause = self._scheduler.suspension.suspend, Cause(Reason.BY_HAND)
        chosen, spare_mb = [], _spare_mb()
        with namespace.transaction() as t:
            room_mb = self._host_room_mb(spare_mb)
            for row, instance in self._instances_of(tag):
                fits = instance.state == Instance.IDLE and instance.mb <= room_mb
                if fits and suspend(t, row, namespace.slot, cause, evicted=False):
                    chosen.append((row, instance.generation))
                    room_mb -= instance.device_mb
            expect([row for row, _ in chosen])
        self._unload_in_thread()
        return chosen

    def _host_room_mb(self, spare_mb: float) -> float:
        """Return how much of the host's memory a suspension may take now, by the settings of the last transaction.

        spare_mb: what the host has left. By default the budget is a share of what it had when the namespace began, and
        other programs may have taken that since. A budget that a user has set is not checked against it.
        """
        if math.isfinite(self._namespace.settings.suspend_budget_mb):
            return math.inf
        return spare_mb

    def moving_among(self, copies: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return which of these copies (row, generation) are still being suspended; without the lock.

        None stays so forever: the leader ends suspensions that take too long.
        """
        return [one for one in copies if self._is(*one, Instance.SUSPENDING)]

    def suspended_among(self, copies: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return which of these copies (row, generation) are suspended; without the lock."""
        return [one for one in copies if self._is(*one, Instance.SUSPENDED)]

    def why_moving(self, copy: tuple[int, int]) -> str:
        """Return why a copy is not suspended yet, in words that follow "copies, which". Without the lock."""
        tables, layout = self._namespace.tables, self._namespace.segment.layout
        instance = tables.instances[copy[0]]
        quiet, holder = instance.device_bits & tables.header.steady, instance.holder
        if quiet:
            steady = (tables.instances[row] for row in tables.used_rows(layout.instances))
            starts = next((one for one in steady if one.steady and one.device_bits & quiet), None)
            other = None if starts is None else tables.shown(starts.model)
            devices = device_rows(quiet) if len(tables.used_rows(layout.devices)) > 1 else ()
            return explain(Reason.QUIET, other=other, devices=devices)
        return "has just been suspended" if holder is None else f"pid {tables.members[holder].pid} is suspending"

    def suspended_of(self, tag: str) -> int:
        """Return how many suspended copies of a model this process can use."""
        return self._count(tag, (Instance.SUSPENDED,))

    def loaded_of(self, tag: str) -> int:
        """Return how many copies of a model that this process can use are loaded, or about to be."""
        return self._count(tag, (Instance.ACTIVE, Instance.IDLE, Instance.LOADING, Instance.RESUMING))

    def _count(self, tag: str, states: tuple[int, ...]) -> int:
        ours = (None, self._namespace.slot)
        with self._namespace.transaction():
            copies = (found for _, found in self._instances_of(tag) if found.seat_of is None)
            return sum(found.state in states and found.owner in ours for found in copies)

    def _instances_of(self, tag: str) -> list[tuple[int, InstanceRow]]:
        """Return the rows of a model's copies; needs the lock."""
        tables = self._namespace.tables
        model = tables.model_row(tag)
        if model is None:
            return []
        rows = tables.rows_where(self._namespace.segment.layout.instances, Instance.MODEL, model)
        return [(row, tables.instances[row]) for row in rows]

    # ---- resume --------------------------------------------------------------------------------------------

    def resume(self, row: int, generation: int) -> bool:
        """Resume a copy whose row says that this process has to; return False if that failed and it is unloaded.

        On success the row is still RESUMING, so that the caller can end that together with its own change of the row.
        """
        task = self._task(row, generation, Instance.RESUMING)
        if task is None:
            return False
        done, why = self._attempt(task, protocol.WAKE_UP)
        if done:
            return True
        with self._namespace.transaction() as t:
            if self._is_ours(row, generation, Instance.RESUMING):
                self._namespace.transitions.suspensions.fail(t, row, why)
                self._scheduler.advance(t)
        self._unload_in_thread()
        return False

    def end_resume(self, t: Transaction, row: int, generation: int) -> bool:
        """Note that a copy is resumed and held; return False if it is gone. Needs the lock."""
        if not self._is_ours(row, generation, Instance.RESUMING):
            return False
        self._namespace.transitions.suspensions.end_resume(t, row)
        return True

    def wake(self, handle: str, tag: str, note: Callable[[tuple[int, int]], None]) -> None:
        """Resume the copy of a handle that a loader of `tag` has returned, if that copy is suspended.

        A loader may return a handle again whose copy is suspended by then. note: called with a copy (row, generation)
        before this process begins to resume it, in case an exception ends this call. Raises SuspendError if it cannot
        be resumed.
        """
        began = time.monotonic()
        while (found := self._suspended_twin(handle)) is not None:
            row, generation, mb = found
            note((row, generation))
            with self._namespace.transaction() as t:
                begins = self._is(row, generation, Instance.SUSPENDED)
                if begins:
                    self._namespace.transitions.suspensions.begin_resume(t, row, self._namespace.slot)
            if begins:
                self._wake_twin(row, generation, handle, tag)
            elif time.monotonic() > began + GRACE * limit_s(mb):
                raise SuspendError(
                    f"the loader of {self._namespace.tables.called(tag)} returned the handle {handle!r}, whose copy is "
                    "being suspended or resumed and takes too long; let the loader return a new handle each time",
                    tag=tag,
                )
            else:
                time.sleep(LOOK_S)

    def is_in_host(self, handle: str) -> bool:
        """Tell whether the copy that has a handle is suspended, or on its way there or back. Needs the lock."""
        return self._suspended_twin(handle) is not None

    def _wake_twin(self, row: int, generation: int, handle: str, tag: str) -> None:
        resumed = self.resume(row, generation)
        with self._namespace.transaction() as t:
            resumed = resumed and self.end_resume(t, row, generation)
            if resumed:
                self._scheduler.release(t, row, used=False)
        if not resumed:
            raise SuspendError(
                f"the loader of {self._namespace.tables.called(tag)} returned the handle {handle!r}, whose suspended "
                "copy cannot be resumed; let the loader return a new handle each time",
                tag=tag,
            )

    def _suspended_twin(self, handle: str) -> tuple[int, int, float] | None:
        """Return row, generation and MB of the suspended copy that has a handle; looks without the lock."""
        tables, layout = self._namespace.tables, self._namespace.segment.layout
        for state in _IN_HOST:
            for row in tables.rows_where(layout.instances, Instance.STATE, state):
                if tables.handle_of(row) == handle:
                    return row, tables.instances[row].generation, tables.instances[row].device_mb
        return None

    def prepare_end(self, row: int) -> None:
        """Suspend a server that is about to end, if the driver may hang at the end of a resumed process.

        Nothing is lost if this fails.
        """
        tables = self._namespace.tables
        instance = tables.instances[row]
        server = instance.server
        if instance.way != Way.CHECKPOINT or not tables.models[instance.model].resumes or server is None:
            return
        if driver_branch() not in HAZARDOUS_BRANCHES:
            return
        if not is_member_here(tables, server):
            return
        pid, limit = tables.members[server].pid, limit_s(instance.mb)
        folder, tag = self._namespace.runtime.path, tables.tag_of(instance.model)
        try:
            with contextlib.suppress(SuspendError, EOFError):
                answer_within(lambda: ask_helper(folder, "suspend", pid, limit, tag), limit, "mpmm-suspend")
        except NoAnswerError:
            kill_stopped_helper(folder)
        except OSError:
            # The helper cannot be started, say.
            pass

    # ---- for the leader ------------------------------------------------------------------------------------

    def end_overdue(self) -> None:
        """Have copies unloaded whose suspension or resume takes far too long, because its HOLDER is stuck or stopped.

        Not at the first look: if all processes were stopped together, each HOLDER has to find that out by itself.
        """
        now = time.monotonic()
        self._overdue_since = {one: self._overdue_since.get(one, now) for one in self._overdue()}
        ended = {one for one, since in self._overdue_since.items() if now >= since + OVERDUE_S}
        if not ended:
            return
        namespace = self._namespace
        with namespace.transaction() as t:
            for row, _ in self._overdue() & ended:
                if t.is_long:
                    # The next look finds the rest.
                    break
                why = None if self._is_held_up(row) else Unsuspendable.TIMED_OUT
                namespace.transitions.suspensions.fail(t, row, why, namespace.reference)
            self._scheduler.advance(t)

    def _overdue(self) -> set[tuple[int, int]]:
        """Return row and generation of the copies that should have been suspended or resumed long ago."""
        tables, now_ns, found = self._namespace.tables, time.monotonic_ns(), set()
        for state in _MOVING:
            for row in tables.rows_where(self._namespace.segment.layout.instances, Instance.STATE, state):
                instance = tables.instances[row]
                if state == Instance.SUSPENDING and instance.device_bits & tables.header.steady:
                    # The suspension has to wait until a load has started quietly; its time begins only then.
                    continue
                if now_ns - instance.since > GRACE * limit_s(instance.device_mb) * 1e9:
                    found.add((row, instance.generation))
        return found

    def _is_held_up(self, row: int) -> bool:
        """Tell whether a copy waits for a stopped process, which says nothing about its model."""
        members, instance = self._namespace.tables.members, self._namespace.tables.instances[row]
        slots = [slot for slot in (instance.holder, instance.server) if slot is not None]
        return any(is_stopped(members[slot].pid) and is_member_here(self._namespace.tables, slot) for slot in slots)

    def heed_host_memory(self) -> None:
        """Drop the copy that was suspended longest ago if the host has hardly any memory left, whatever took it.

        One at a time: by the next poll, its memory is free.
        """
        namespace = self._namespace
        suspended = namespace.tables.rows_where(namespace.segment.layout.instances, Instance.STATE, Instance.SUSPENDED)
        if not suspended:
            return
        left_mb = host_memory_left_mb()
        if left_mb >= HOST_RESERVE * host_memory_mb():
            return
        with namespace.transaction() as t:
            cause = Cause(Reason.HOST_SHORT, free_mb=left_mb)
            dropped = self._scheduler.suspension.drop_oldest(t, namespace.slot, cause)
        if dropped:
            _LOG.warning("mpmm %s: the host has only %.0f MB left: dropping a suspended copy", namespace.name, left_mb)
            self._unload_in_thread()

    # ---- one step ------------------------------------------------------------------------------------------

    def _attempt(self, task: _Task, request: str) -> tuple[bool, Unsuspendable | None]:
        """Do one step; return whether it succeeded, and why it failed if that is the model's fault."""
        caller, failures = threading.current_thread(), list[BaseException]()

        def ask() -> None:
            try:
                self._ask(task, request)
            except BaseException as error:
                # If this runs in the caller's thread, a signal handler may have raised it.
                if threading.current_thread() is caller and not isinstance(error, Exception):
                    raise
                # Kept, not raised: an exception of a handler while the caller waits is no failure of the model.
                failures.append(error)

        limit, began = limit_s(task.mb), time.monotonic()
        try:
            answer_within(ask, limit, "mpmm-suspend")
        except NoAnswerError as error:
            late = time.monotonic() > began + limit + LATE_S
            self._say(logging.WARNING, task, request, error)
            return False, None if late or self._was_held_up(task) else Unsuspendable.TIMED_OUT
        if not failures:
            return True, None
        # It is the model's own code, which may raise anything.
        failure = failures.pop()
        self._say(logging.WARNING, task, request, failure)
        # The server may have been killed meanwhile, whatever the driver reports.
        if isinstance(failure, ModelServerError) or self._is_dying(task):
            return False, None
        if task.way == Way.CHECKPOINT and isinstance(failure, OSError):
            # The helper could not be asked.
            return False, None
        cause = failure.__cause__
        no_room = is_out_of_memory(failure) or (cause is not None and is_out_of_memory(cause))
        if request == protocol.WAKE_UP and no_room:
            # Another program had taken the memory that was reserved for it.
            return False, None
        failed = Unsuspendable.SUSPEND_FAILED if request == protocol.SLEEP else Unsuspendable.RESUME_FAILED
        return False, failed

    def _was_held_up(self, task: _Task) -> bool:
        """Tell whether a process that had to do the step was stopped, which says nothing about the model.

        A stopped helper is killed, and another one takes its place.
        """
        by_helper = task.way == Way.CHECKPOINT and kill_stopped_helper(self._namespace.runtime.path)
        return by_helper or (task.server_pid is not None and is_stopped(task.server_pid) and self._is_here(task))

    def _is_dying(self, task: _Task) -> bool:
        """Tell whether the model server is dead, or dies within a moment.

        Its lock is released last: before that, the kernel takes back the memory, which takes seconds for tens of GB.
        """
        server, pid = task.server, task.server_pid
        if server is None or pid is None:
            return False

        def goes() -> bool:
            return (is_ending(pid) and self._is_here(task)) or not self._namespace.member_is_alive(server)

        self._await(goes, DYING_S)
        return goes()

    def _is_here(self, task: _Task) -> bool:
        """Tell whether the pid of a copy's server is its number here, and not another process's."""
        return task.server is None or is_member_here(self._namespace.tables, task.server)

    def _say(self, level: int, task: _Task, request: str, error: BaseException) -> None:
        text = "mpmm %s: pid %d could not have %s %s, so it is unloaded instead: %s: %s"
        kind = type(error).__name__
        _LOG.log(level, text, self._namespace.name, self._namespace.pid, task.shown, request, kind, error)

    def _ask(self, task: _Task, request: str) -> None:
        """Do a step, and return once it is done."""
        if task.way == Way.CHECKPOINT:
            if task.server_pid is None:
                raise ModelServerError(f"the server of {task.handle!r} is gone", tag=task.handle, server_pid=None)
            if not self._is_here(task):
                text = f"the server of {task.handle!r} runs in another pid namespace"
                raise ModelServerError(text, tag=task.handle, server_pid=task.server_pid)
            what, folder = "suspend" if request == protocol.SLEEP else "resume", self._namespace.runtime.path
            ask_helper(folder, what, task.server_pid, limit_s(task.mb), task.tag, task.shown)
        elif task.value is None:
            ask_to(request, task.handle, task.server_pid)
        else:
            # A resume whose requester no longer waits may still be running. An object that checks whether it is already
            # asleep would ignore this sleep, and then be awake.
            with self._mutex:
                turn = self._turns.setdefault(task.copy, new_lock())
            with turn:
                task.value.sleep() if request == protocol.SLEEP else task.value.wake_up()

    def _task(self, row: int, generation: int, state: int) -> _Task | None:
        """Return the task in a row; None if it is not this process's, or not any longer."""
        namespace = self._namespace
        tables, instance = namespace.tables, namespace.tables.instances[row]
        with namespace.transaction():
            if not self._is_ours(row, generation, state):
                return None
            server = instance.server
            return _Task(
                (row, generation),
                tables.tag_of(instance.model),
                tables.shown(instance.model),
                Way(instance.way),
                instance.device_mb,
                tables.handle_of(row),
                server,
                None if server is None else tables.members[server].pid,
                None if instance.owner is None else self._value_of(row),
            )

    def _is(self, row: int, generation: int, state: int) -> bool:
        instance = self._namespace.tables.instances[row]
        return instance.state == state and instance.generation == generation

    def _is_ours(self, row: int, generation: int, state: int) -> bool:
        holder = self._namespace.tables.instances[row].holder
        return self._is(row, generation, state) and holder == self._namespace.slot

    @staticmethod
    def _await(ended: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not ended() and time.monotonic() < deadline:
            time.sleep(LOOK_S)


def _spare_mb() -> float:
    """Return how much memory the host has left above its reserve; takes 2 ms."""
    return host_memory_left_mb() - HOST_RESERVE * host_memory_mb()
