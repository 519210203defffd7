"""Unloads: a process ends the servers, and gives up the objects, of the instances that it was told to unload.

The process that decides on an unload writes into the instance's row which process has to do it: the owner of an object,
and for a server the waiter that needs the room, or any other worker. That process finds the row here, unloads without
the lock, and frees the row. If it does not do so in time, the leader hands the unload to another one
(`mpmm.model_manager.late_unloads`).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from mpmm import multi_process_shared
from mpmm.interpreter.thread_frames import may_be_running
from mpmm.interpreter.thread_starts import start_thread
from mpmm.memory.beam_metrics import report_model_count
from mpmm.model_manager.fresh_figures import FreshFigures
from mpmm.model_manager.operations import LoadedInstance
from mpmm.model_manager.owned import OwnedObjects
from mpmm.model_manager.returns import ReturnWatch
from mpmm.model_manager.waits import decision, says_more
from mpmm.multi_process_shared.stop_server import kill_process
from mpmm.policy.view import Reason
from mpmm.scheduling import Scheduler
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.layout import Instance, Member, Model, device_rows
from mpmm.shared_state.liveness import is_member_here
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.tables import encoded_handle
from mpmm.shared_state.transaction import Transaction
from mpmm.suspend.suspender import Suspender
from mpmm.text.printable import printable_logger

__all__ = [
    *("ENDS_WITHIN_S", "SHORTEST_UNLOAD_LIMIT_S", "UNLOAD_LOOK_S", "Unloads"),
    *("collect_garbage", "unload_made", "unload_object", "unload_object_in_thread"),
]

_LOG = printable_logger("mpmm")
# The methods by which an object frees what garbage collection does not see; the second is Beam's name.
_UNLOAD_METHODS = ("unload_model", "mock_model_unsafe_hard_delete")
# How many servers are ended at a time; each takes a thread that mostly waits.
UNLOADS_AT_A_TIME = 8
# An unload gets this much time even if `memory_return_seconds` is shorter, before another process is told to do it.
SHORTEST_UNLOAD_LIMIT_S = 0.5
# A server that has not left by itself within this time is killed.
ENDS_WITHIN_S = 10.0
# How often a thread that waits for memory checks whether there is more.
UNLOAD_LOOK_S = 0.01


@dataclass(frozen=True)
class _Task:
    """One unload. model: a row. ends_server: it ends the handle's server. server: its slot, if it is a member."""

    model: int
    tag: str
    is_object: bool
    handle: str
    ends_server: bool
    server: int | None
    server_pid: int | None


@dataclass(frozen=True, eq=False)
class _AtIt:
    """Where a thread unloads a copy, and since when. An exception may end that while the thread lives on."""

    thread: int
    frame: FrameType
    since: float = field(default_factory=time.monotonic)

    @property
    def is_there(self) -> bool:
        """Tell whether the thread is still unloading, or may be."""
        return may_be_running(self.frame, self.thread)


class Unloads:
    """The unloads of one process. Its threads share this object.

    leaving: the process leaves the namespace, and unloads even where something starts that should not be disturbed.
    may_be_left: a thread has begun an unload, which an exception may end, since the last check for unfinished ones.
    """

    def __init__(
        self,
        namespace: Namespace,
        scheduler: Scheduler,
        figures: FreshFigures,
        owned: OwnedObjects,
        waiting: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """waiting: counts the calling thread among those that wait, for the length of a `with` block."""
        self._namespace = namespace
        self._scheduler = scheduler
        self._figures = figures
        self._owned = owned
        self._waiting = waiting
        self._suspender = Suspender(namespace, scheduler, figures.samples, owned.value_of, self.unload_in_thread)
        self._returns = ReturnWatch(namespace, figures, waiting)
        self._in_progress: dict[int, _AtIt] = {}
        self.leaving = False
        self.may_be_left = False

    @property
    def suspender(self) -> Suspender:
        """Suspends the copies that are suspended instead of being unloaded."""
        return self._suspender

    @property
    def is_busy(self) -> bool:
        """Tell whether a thread of this process unloads something now."""
        return any(self.is_at(row) for row in list(self._in_progress))

    def is_at(self, row: int) -> bool:
        """Tell whether a thread of this process unloads the copy of a row now."""
        at_it = self._in_progress.get(row)
        return at_it is not None and at_it.is_there

    def begin(self, rows: Iterable[int], frame: FrameType) -> None:
        """Record that the calling thread unloads the copies of rows, while it runs `frame`, or until it calls `end`."""
        at_it = _AtIt(threading.get_ident(), frame)
        self.may_be_left = True
        self._in_progress.update((row, at_it) for row in rows)

    def end(self, row: int) -> None:
        """Record that the calling thread no longer unloads the copy of a row."""
        at_it = self._in_progress.get(row)
        # Another thread may be unloading the next copy in that row by now.
        if at_it is not None and at_it.thread == threading.get_ident():
            self._in_progress.pop(row, None)

    def unload_if_not_kept(self, t: Transaction, copy: LoadedInstance) -> None:
        """Have a copy that was just given back unloaded, if its model is not kept at all and has no waiter.

        Other processes may not know that it is not kept; the next poll finds copies that they give back.
        """
        if self._namespace.reads.instances.is_idle(copy.row, copy.generation):
            tables = self._namespace.tables
            self._unload_if_unwanted(t, tables.copy_of(copy.row), tables.instances[copy.row].model)

    def unload_if_last_has_left(self, t: Transaction, model: int) -> None:
        """Have the idle copies of a model (row) unloaded that is not kept at all, once no request waits for it.

        A release has left them for those that waited, or for a process that was handed one a moment ago.
        """
        tables = self._namespace.tables
        if tables.models[model].keep_alive == Model.AT_ONCE and not tables.models[model].waiting:
            for row in tables.idle_copies():
                if tables.instances[row].model == model and not t.is_long:
                    self._unload_if_unwanted(t, row, model)

    def _unload_if_unwanted(self, t: Transaction, row: int, model: int) -> None:
        tables, found = self._namespace.tables, self._namespace.tables.models[model]
        unwanted = found.keep_alive == Model.AT_ONCE and not found.waiting and not found.pins
        if unwanted and not tables.is_in_use(row):
            cause = Cause(Reason.EXPIRED)
            self._namespace.transitions.unloads.begin(t, row, self._namespace.slot, evicted=False, cause=cause)

    def unload_in_thread(self) -> None:
        """Unload what this process has to, in a thread of its own, if there is anything to do.

        A waiter has to give up in time, and the background thread has other jobs, however long an unload takes: a
        model's own code may hang. Both look for the same unloads, because either may be stuck elsewhere.
        """
        assigned = self._assigned()
        if assigned:
            # Also if a thread seems to be unloading them: it may not have been seen well, or an exception may end that.
            self.may_be_left = True
        if any(not self.is_at(row) for row, _ in assigned):
            # If no thread can be started, the background thread's next look at the rows finds what is left.
            with contextlib.suppress(RuntimeError):
                start_thread(threading.Thread(target=self._unload_here, name="mpmm-unload", daemon=True))

    def take_up_what_is_left(self) -> None:
        """Do in a thread the unloads that an exception from a signal handler has interrupted, if there are any.

        Raises LockTimeoutError, ClosedError.
        """
        if self.may_be_left and not self.is_busy:
            # With the lock, because the exception may have come in the transaction that frees the row: until the next
            # one undoes that, the row seems to be free.
            with self._namespace.transaction():
                # Cleared before the look: an unload that begins after it sets it again.
                self.may_be_left = False
                if self._assigned():
                    self.may_be_left = True
            if self.may_be_left:
                self.unload_in_thread()

    def _unload_here(self) -> None:
        with self._reporting_trouble(), self._waiting():
            self._unload_what_is_left()

    @contextlib.contextmanager
    def _reporting_trouble(self) -> Iterator[None]:
        """Log what fails in a thread that unloads; the background thread looks again for what is left."""
        try:
            with self._namespace.lock.patient_here():
                yield
        # Not only Exception, because a model's own code may raise SystemExit, say, which would end the thread silently.
        except BaseException:
            # Otherwise the process has left meanwhile, and another one has to do the rest.
            if self._namespace.is_usable:
                _LOG.exception("mpmm %s: pid %d failed to unload a copy", self._namespace.name, self._namespace.pid)

    def _has_to_unload(self) -> bool:
        """Look, without the lock, for copies that this process has to unload and that none of its threads unloads."""
        return any(not self.is_at(row) for row, _ in self._assigned())

    def _assigned(self) -> list[tuple[int, int]]:
        """Return row and generation of the copies that this process has to unload, or to suspend, now.

        Where something starts quietly, see `Instance.STEADY`, they have to wait, unless the process leaves. A copy that
        is still used in its seats has to wait in any case.
        """
        tables = self._namespace.tables
        steady = 0 if self.leaving else tables.header.steady
        ours = tables.rows_where(self._namespace.segment.layout.instances, Instance.HOLDER, self._namespace.reference)
        found = [(row, tables.instances[row]) for row in ours]
        return [
            (row, instance.generation)
            for row, instance in found
            if instance.state in (Instance.UNLOADING, Instance.SUSPENDING)
            and not (instance.device_bits & steady or instance.seats)
        ]

    def unload_assigned(self) -> None:
        """Unload every copy whose row says that this process has to, and return when that is done.

        Waits for unloads of other threads, too, but no longer than it takes to kill a server.
        """
        self._unload_what_is_left()
        deadline = time.monotonic() + ENDS_WITHIN_S
        while self._assigned() and time.monotonic() < deadline:
            time.sleep(UNLOAD_LOOK_S)
            self._unload_what_is_left()

    def _unload_what_is_left(self) -> None:
        """Unload the copies that this process has to and that none of its threads unloads.

        Handles are unloaded several at a time, so that a server that does not end holds up no other. Objects are
        unloaded one after another, because their unload methods may not be thread-safe; but one that takes longer than
        `ENDS_WITHIN_S` may hang, and holds up the others no longer.
        """
        tables = self._namespace.tables
        while self._has_to_unload():
            with self._namespace.transaction():
                found = [one for one in self._assigned() if not self.is_at(one[0])]
                handles = [one for one in found if tables.instances[one[0]].owner is None]
                objects = [] if self._is_at_an_object() else [one for one in found if one not in handles]
                mine = [*handles[: UNLOADS_AT_A_TIME - 1], *objects[:1]] or handles[:1]
                # The lock guards `_in_progress`, too, because several threads unload at the same time.
                self.begin((row for row, _ in mine), sys._getframe())
            if not mine:
                return
            self._unload_all(mine)

    def _is_at_an_object(self) -> bool:
        """Tell whether a thread of this process unloads an object now, and is not late. Needs the lock."""
        instances, late = self._namespace.tables.instances, time.monotonic() - ENDS_WITHIN_S
        at_it = [one for row, one in self._in_progress.copy().items() if instances[row].owner is not None]
        return any(one.since > late and one.is_there for one in at_it)

    def _unload_all(self, copies: Sequence[tuple[int, int]]) -> None:
        """Unload these copies (row, generation), each in a thread of its own, except the last.

        This thread, which is recorded as unloading all of them, unloads the last one.
        """
        *others, last = copies
        threads = []
        try:
            for other in others:
                thread = threading.Thread(target=self._unload_claimed, args=other, name="mpmm-unload", daemon=True)
                try:
                    start_thread(thread)
                except RuntimeError:
                    # No thread can be started.
                    self._unload_claimed(*other)
                else:
                    threads.append(thread)
            self._unload(*last)
        finally:
            self.end(last[0])
        if threads:
            # Objects are not held up by the servers that this thread waits for.
            self.unload_in_thread()
        for thread in threads:
            thread.join()

    def _unload_claimed(self, row: int, generation: int) -> None:
        self.begin((row,), sys._getframe())
        try:
            with self._reporting_trouble(), self._waiting():
                self._unload(row, generation)
        finally:
            self.end(row)

    def wait_for_unloads(self, devices: int) -> None:
        """Wait until nothing is being unloaded from devices (bits), others' objects included, and memory is back.

        Waits no longer than `memory_return_seconds` plus one `poll_interval`, because a process may be stuck.
        """
        namespace = self._namespace
        tables = namespace.tables
        deadline = time.monotonic() + namespace.settings.memory_return_seconds + namespace.settings.poll_interval
        while time.monotonic() < deadline:
            with namespace.transaction():
                unloading = any(
                    tables.instances[row].device_bits & devices and not tables.instances[row].seats
                    for row in tables.rows_where(namespace.segment.layout.instances, Instance.STATE, Instance.UNLOADING)
                )
                rows = device_rows(devices)
                returning = any(tables.devices[device].returning_mb > 0 for device in rows)
            if not unloading and not returning:
                return
            time.sleep(UNLOAD_LOOK_S)

    def _unload(self, row: int, generation: int) -> None:
        """Unload a copy and free its row, unless another process has done so, or has been told to, meanwhile.

        A copy that is to be suspended is suspended instead.
        """
        namespace = self._namespace
        instance = namespace.tables.instances[row]
        if instance.state == Instance.SUSPENDING:
            self._suspender.suspend(row, generation)
            self._settle()
            return
        task = self._task(row, generation)
        if task is None:
            return
        shown = task.tag
        if says_more(_LOG):
            shown = namespace.tables.shown_for(task.tag)
            why = decision(namespace, EventKind.UNLOAD_BEGAN, row)
            text = "mpmm %s: pid %d unloads %s, %.0f MB%s"
            _LOG.info(text, namespace.name, namespace.pid, shown, instance.mb, f": it {why}" if why else "")
        if task.is_object:
            self._unload_own(row, generation)
        elif task.ends_server:
            self._suspender.prepare_end(row)
            self._unload_handle(task.handle, task.server, task.server_pid)
        with namespace.transaction() as t:
            if self._is_unloading(row, generation):
                namespace.transitions.unloads.end(t, row)
            loaded = namespace.tables.models[task.model].copies
        _LOG.info("mpmm %s: pid %d unloaded %s", namespace.name, namespace.pid, shown)
        report_model_count(task.tag, loaded)
        self._settle()

    def _task(self, row: int, generation: int) -> _Task | None:
        """Return what is to be unloaded, or None if that is not, or no longer, for this process to do.

        If the unload of a twin ends the server, or the server has ended by itself, this frees the row at once.
        """
        namespace, tables = self._namespace, self._namespace.tables
        with namespace.transaction() as t:
            instance = tables.instances[row]
            if not self._is_unloading(row, generation) or instance.holder != namespace.slot or instance.seats:
                return None
            model, server, handle = instance.model, instance.server, tables.handle_of(row)
            # A server that has died may have a successor of the same name, which belongs to another copy.
            lost = instance.has_server and instance.unload_on_release == Instance.LOST and server is None
            ends_server = bool(handle) and namespace.transitions.twins.unloads_handle(row) and not lost
            server_pid = None if server is None else tables.members[server].pid
            is_object = instance.owner is not None
            if not (is_object or ends_server):
                # In this transaction, so that the twin's unload will find that it is the last one.
                namespace.transitions.unloads.end(t, row)
            return _Task(model, tables.tag_of(model), is_object, handle, ends_server, server, server_pid)

    def _unload_own(self, row: int, generation: int) -> None:
        """Unload an object of this process."""
        copy = self._owned.forget(row, generation)
        if copy is not None:
            unload_object(copy.value)
            # Deleted first, because garbage collection frees nothing that is still referred to.
            del copy
            collect_garbage()

    def _is_unloading(self, row: int, generation: int) -> bool:
        """Tell whether a row still stands for a copy in mid-unload."""
        instance = self._namespace.tables.instances[row]
        return instance.state == Instance.UNLOADING and instance.generation == generation

    def _unload_handle(self, handle: str, slot: int | None, server_pid: int | None) -> None:
        """Make sure that the server of a handle ends; a server with another pid than `server_pid` is another copy's.

        A server that does not leave by itself is killed before another process takes over the unload.

        slot: of the server, if it is a member. Raises ModelServerError if it survives.
        """
        limit_s = min(max(self._namespace.settings.memory_return_seconds, SHORTEST_UNLOAD_LIMIT_S), ENDS_WITHIN_S)
        with contextlib.suppress(OSError, EOFError):
            multi_process_shared.unload(handle, timeout_seconds=limit_s, pid=server_pid)
        if slot is not None and server_pid is not None:
            # Its files may be gone or unreadable, but the namespace knows whether it lives.
            tables = self._namespace.tables
            kill_process(
                server_pid, lambda: self._serves(slot, server_pid), handle, lambda: is_member_here(tables, slot)
            )

    def _serves(self, slot: int, pid: int) -> bool:
        """Tell whether a model server is a living member in this slot; takes no lock."""
        member = self._namespace.tables.members[slot]
        return member.state == Member.SERVER and member.pid == pid and self._namespace.member_is_alive(slot)

    def _settle(self) -> None:
        """Have a sample show the freed memory, and let the policy decide for waiters."""
        if self._figures.source.cheap:
            self._figures.ensure_fresh()
        else:
            self._figures.request_sample()
        if self._figures.given_source is not None:
            self._figures.reset_peak()
            self._figures.samples.reset_peak()
        with self._namespace.transaction() as t:
            self._scheduler.advance(t)
        if not self.leaving:
            self._returns.begin()

    def leave(self) -> None:
        """Record that the process leaves the namespace."""
        self.leaving = True
        self._returns.ended.set()


def unload_made(value: Any) -> None:
    """Unload what a loader has made, a handle or an object; None stands for nothing."""
    if encoded_handle(value):
        with contextlib.suppress(OSError, EOFError):
            multi_process_shared.unload(value)
    elif value is not None:
        unload_object(value)


def unload_object(value: Any) -> None:
    """Have an object free what garbage collection does not see."""
    for name in _UNLOAD_METHODS:
        try:
            method = getattr(value, name, None)
            if not callable(method):
                continue
            method()
        except Exception:
            # It is the model's own code, and so is an attribute. Its memory counts as free either way.
            _LOG.exception("mpmm: %s of a %s failed", name, type(value).__name__)
        return


def unload_object_in_thread(value: Any) -> None:
    """Have a thread call `unload_object`: it is the model's own code, which may hang."""
    # If no thread can be started, garbage collection frees what it can.
    with contextlib.suppress(RuntimeError):
        start_thread(threading.Thread(target=unload_object, args=(value,), name="mpmm-unload", daemon=True))


def collect_garbage() -> None:
    """Free objects to which nothing refers any more, including cycles."""
    gc.collect()
    _empty_torch_cache()


def _empty_torch_cache() -> None:
    """Free what torch caches, if the program has imported torch."""
    torch = sys.modules.get("torch")
    if torch is not None:
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
