"""A process's part in suspension: it does what the books tell it to, with no lock held, within a time limit."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpmm.errors import ModelServerError, SuspendError
from mpmm.memory.samples import SharedSamples
from mpmm.multi_process_shared.rpc import protocol
from mpmm.multi_process_shared.sleeping import ask_to, can_sleep, record_of
from mpmm.policy.suspension import Unsuspendable, Way, limit_s
from mpmm.policy.view import Reason
from mpmm.scheduler import Scheduler
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Header, Instance, Member, Model
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import ALWAYS, NEVER
from mpmm.shared_state.transaction import Transaction
from mpmm.sources.host_memory import host_memory_left_mb, host_memory_mb
from mpmm.sources.timeouts import answer_within
from mpmm.suspend.driver import GOOD_BRANCHES, HAZARDOUS_BRANCHES, driver_branch
from mpmm.suspend.helper import ask_helper
from mpmm.text.printable import printable_logger

__all__ = ["Suspender"]

_LOG = printable_logger("mpmm")
_IN_HOST = (Instance.SUSPENDING, Instance.SUSPENDED, Instance.RESUMING)
_MOVING = (Instance.SUSPENDING, Instance.RESUMING)
# How often one who waits for another process's suspension or resume looks whether it has ended.
LOOK_S = 0.01
# Whose own limit has passed has so much longer to say so, before the leader does.
GRACE = 1.5
# Below this share of its memory the host begins to swap, or to kill.
HOST_RESERVE = 0.05
# A killed process is gone within so long.
DYING_S = 0.5


@dataclass(frozen=True)
class _Task:
    """What is to be suspended or resumed. server: slot of the model server. value: the object, None for a handle."""

    tag: str
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
        """value_of: returns what this process has loaded for a row. unload_in_thread: begins what it has to unload."""
        self._namespace = namespace
        self._scheduler = scheduler
        self._samples = samples
        self._value_of = value_of
        self._unload_in_thread = unload_in_thread

    def way_of(self, value: Any, row: int) -> Way:
        """Return how what a loader has made for a row can be suspended."""
        if not isinstance(value, str):
            return Way.COOPERATIVE if can_sleep(value) else Way.NONE
        record = record_of(value)
        if record is None:
            return Way.NONE
        if record.sleeps:
            return Way.COOPERATIVE
        # What is served beside other work is not to stand still.
        return Way.CHECKPOINT if record.spawned and self._may_checkpoint(row) else Way.NONE

    def _may_checkpoint(self, row: int) -> bool:
        """Tell whether the driver may suspend the server of a copy: not on MIG slices, nor where pids say nothing."""
        choice = self._namespace.settings.suspend_checkpoints
        if choice == NEVER or not self._namespace.segment.words[Header.PID_NAMESPACE]:
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
        """Suspend a copy whose row says that this process has to; what cannot be suspended is unloaded."""
        task = self._task(row, generation, Instance.SUSPENDING)
        if task is None:
            return
        done, why = self._attempt(task, protocol.SLEEP)
        with self._namespace.transaction() as t:
            if self._is_ours(row, generation, Instance.SUSPENDING):
                if done:
                    self._namespace.transitions.suspensions.end(t, row)
                else:
                    self._namespace.transitions.suspensions.fail(t, row, why)
                self._scheduler.advance(t)
        if done:
            _LOG.info("mpmm %s: pid %d suspended %s", self._namespace.name, self._namespace.pid, task.tag)

    def suspend_idle(self, tag: str) -> int:
        """Have the idle copies of a model suspended, by hand, and return how many; waits until they are."""
        namespace = self._namespace
        words, tables = namespace.segment.words, namespace.tables
        chosen = []
        with namespace.transaction() as t:
            model = tables.model_row(tag)
            for row in (
                [] if model is None else tables.rows_where(namespace.segment.layout.instances, Instance.MODEL, model)
            ):
                at = tables.instance(row)
                if words[at] == Instance.IDLE and self._scheduler.suspension.suspend(
                    t, row, namespace.slot, Cause(Reason.BY_HAND), evicted=False
                ):
                    chosen.append((row, words[at + Instance.GENERATION]))
        self._unload_in_thread()
        self._await(lambda: not any(self._is(*one, Instance.SUSPENDING) for one in chosen), self._limit_of(chosen))
        return sum(self._is(*one, Instance.SUSPENDED) for one in chosen)

    def suspended_of(self, tag: str) -> int:
        """Return how many copies of a model are suspended that this process can use."""
        return self._count(tag, (Instance.SUSPENDED,))

    def loaded_of(self, tag: str) -> int:
        """Return how many copies of a model are loaded, or about to be, that this process can use."""
        return self._count(tag, (Instance.ACTIVE, Instance.IDLE, Instance.LOADING, Instance.RESUMING))

    def _count(self, tag: str, states: tuple[int, ...]) -> int:
        namespace = self._namespace
        words, tables = namespace.segment.words, namespace.tables
        with namespace.transaction():
            model = tables.model_row(tag)
            rows = [] if model is None else tables.rows_where(namespace.segment.layout.instances, Instance.MODEL, model)
            starts = map(tables.instance, rows)
            ours = (0, namespace.reference)
            return sum(words[at] in states and words[at + Instance.OWNER] in ours for at in starts)

    # ---- resume --------------------------------------------------------------------------------------------

    def resume(self, row: int, generation: int) -> bool:
        """Resume a copy whose row says that this process has to; return False if it could not be, and is unloaded.

        If it could, the row is RESUMING still, for the caller to end that together with what it wants of the copy.
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

    def wake(self, handle: str, tag: str) -> None:
        """See to it that what a handle stands for is not suspended, which a loader of `tag` has returned.

        A loader may return a handle that it has returned before, and a suspended copy may stand for it. Raises
        SuspendError when it cannot be resumed.
        """
        began = time.monotonic()
        while (found := self._suspended_twin(handle)) is not None:
            row, generation, mb = found
            with self._namespace.transaction() as t:
                begins = self._is(row, generation, Instance.SUSPENDED)
                if begins:
                    self._namespace.transitions.suspensions.begin_resume(t, row, self._namespace.slot)
            if begins:
                self._wake_twin(row, generation, handle, tag)
            elif time.monotonic() > began + GRACE * limit_s(mb):
                raise SuspendError(
                    f"the loader of {tag!r} returned the handle {handle!r}, whose copy is being suspended or resumed "
                    "and does not come to an end; let the loader return a new handle each time",
                    tag=tag,
                )
            else:
                time.sleep(LOOK_S)

    def _wake_twin(self, row: int, generation: int, handle: str, tag: str) -> None:
        resumed = self.resume(row, generation)
        with self._namespace.transaction() as t:
            resumed = resumed and self.end_resume(t, row, generation)
            if resumed:
                self._scheduler.release(t, row, used=False)
        if not resumed:
            raise SuspendError(
                f"the loader of {tag!r} returned the handle {handle!r}, whose suspended copy cannot be resumed; let "
                "the loader return a new handle each time",
                tag=tag,
            )

    def _suspended_twin(self, handle: str) -> tuple[int, int, float] | None:
        """Return row, generation and MB of a suspended copy that a handle stands for; looks without the lock."""
        words, tables, layout = self._namespace.segment.words, self._namespace.tables, self._namespace.segment.layout
        for state in _IN_HOST:
            for row in tables.rows_where(layout.instances, Instance.STATE, state):
                at = tables.instance(row)
                if tables.handle_of(row) == handle:
                    return row, words[at + Instance.GENERATION], self._namespace.segment.floats[at + Instance.DEVICE_MB]
        return None

    def prepare_end(self, row: int) -> None:
        """Suspend a server that is about to be ended, where the driver may hang at the end of one that was resumed.

        It may not succeed, but then nothing is lost by it.
        """
        words, tables, at = self._namespace.segment.words, self._namespace.tables, self._namespace.tables.instance(row)
        server, model = words[at + Instance.SERVER], words[at + Instance.MODEL]
        if words[at + Instance.WAY] != Way.CHECKPOINT or not words[tables.model(model) + Model.RESUMES] or not server:
            return
        if driver_branch() not in HAZARDOUS_BRANCHES:
            return
        pid, limit = (
            words[tables.member(server - 1) + Member.PID],
            limit_s(self._namespace.segment.floats[at + Instance.MB]),
        )
        folder, tag = self._namespace.runtime.path, tables.tag_of(model)
        with contextlib.suppress(SuspendError, OSError, EOFError, TimeoutError):
            answer_within(lambda: ask_helper(folder, "suspend", pid, limit, tag), limit, "mpmm-suspend")

    # ---- for the leader ------------------------------------------------------------------------------------

    def end_overdue(self) -> None:
        """Have copies unloaded whose suspension or resume takes far too long, as its HOLDER is stuck, or stopped."""
        if not self._overdue():
            return
        namespace = self._namespace
        with namespace.transaction() as t:
            for row in self._overdue():
                namespace.transitions.suspensions.fail(t, row, Unsuspendable.TIMED_OUT, namespace.reference)
            self._scheduler.advance(t)

    def _overdue(self) -> list[int]:
        words, floats, tables = self._namespace.segment.words, self._namespace.segment.floats, self._namespace.tables
        now_ns, found = time.monotonic_ns(), []
        for state in _MOVING:
            for row in tables.rows_where(self._namespace.segment.layout.instances, Instance.STATE, state):
                at = tables.instance(row)
                limit_ns = GRACE * limit_s(floats[at + Instance.DEVICE_MB]) * 1e9
                if now_ns - words[at + Instance.SINCE] > limit_ns:
                    found.append(row)
        return found

    def heed_host_memory(self) -> None:
        """Drop the copy that was suspended longest ago if the host has hardly any memory left, whoever took it.

        One at a time: at the next poll what it had is free.
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
        """Do one step; return whether it is done, and why it failed if that is the model's fault."""
        try:
            answer_within(lambda: _ask(task, request, self._namespace.runtime.path), limit_s(task.mb), "mpmm-suspend")
        except ModelServerError as error:
            self._say(logging.WARNING, task, request, error)
            return False, None
        except TimeoutError as error:
            self._say(logging.WARNING, task, request, error)
            return False, Unsuspendable.TIMED_OUT
        except Exception as error:
            # It is the model's own code, which may raise anything.
            self._say(logging.WARNING, task, request, error)
            if self._is_dying(task.server):
                # It has been killed meanwhile, whatever the driver says of that.
                return False, None
            failed = Unsuspendable.SUSPEND_FAILED if request == protocol.SLEEP else Unsuspendable.RESUME_FAILED
            return False, failed
        return True, None

    def _is_dying(self, server: int | None) -> bool:
        """Tell whether a model server (slot) is dead, or is so within a moment: its lock goes last."""
        if server is None:
            return False
        self._await(lambda: not self._namespace.member_is_alive(server), DYING_S)
        return not self._namespace.member_is_alive(server)

    def _say(self, level: int, task: _Task, request: str, error: Exception) -> None:
        text = "mpmm %s: pid %d could not have %s %s, so it is unloaded instead: %s: %s"
        kind = type(error).__name__
        _LOG.log(level, text, self._namespace.name, self._namespace.pid, task.tag, request, kind, error)

    def _task(self, row: int, generation: int, state: int) -> _Task | None:
        """Return what a row says is to be done; None if this process has not to do it, or no longer."""
        namespace = self._namespace
        words, tables, at = namespace.segment.words, namespace.tables, namespace.tables.instance(row)
        with namespace.transaction():
            if not self._is_ours(row, generation, state):
                return None
            server = words[at + Instance.SERVER]
            return _Task(
                tables.tag_of(words[at + Instance.MODEL]),
                Way(words[at + Instance.WAY]),
                namespace.segment.floats[at + Instance.DEVICE_MB],
                tables.handle_of(row),
                server - 1 if server else None,
                words[tables.member(server - 1) + Member.PID] if server else None,
                self._value_of(row) if words[at + Instance.OWNER] else None,
            )

    def _is(self, row: int, generation: int, state: int) -> bool:
        words, at = self._namespace.segment.words, self._namespace.tables.instance(row)
        return bool(words[at] == state and words[at + Instance.GENERATION] == generation)

    def _is_ours(self, row: int, generation: int, state: int) -> bool:
        at = self._namespace.tables.instance(row)
        holder = self._namespace.segment.words[at + Instance.HOLDER]
        return self._is(row, generation, state) and holder == self._namespace.reference

    def _limit_of(self, copies: list[tuple[int, int]]) -> float:
        floats, tables = self._namespace.segment.floats, self._namespace.tables
        return sum(GRACE * limit_s(floats[tables.instance(row) + Instance.DEVICE_MB]) for row, _ in copies)

    @staticmethod
    def _await(ended: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not ended() and time.monotonic() < deadline:
            time.sleep(LOOK_S)


def _ask(task: _Task, request: str, folder: Path) -> None:
    if task.way == Way.CHECKPOINT:
        if task.server_pid is None:
            raise ModelServerError(f"the server of {task.handle!r} is gone", tag=task.handle, server_pid=None)
        what = "suspend" if request == protocol.SLEEP else "resume"
        ask_helper(folder, what, task.server_pid, limit_s(task.mb), task.tag)
    elif task.value is None:
        ask_to(request, task.handle, task.server_pid)
    elif request == protocol.SLEEP:
        task.value.sleep()
    else:
        task.value.wake_up()
