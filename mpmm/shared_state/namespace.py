"""Attaching to a namespace, being a member of it, and leaving it.

Files in the runtime directory, in the order in which their locks are taken:

1. `lifecycle.lock`  exclusive while a process creates, joins, leaves or removes the namespace;
2. `alive.lock`      shared by every worker for life: if an exclusive lock can be had, no worker is left. Model servers
                     watch it, but neither they nor the managers in them take it;
3. `m<slot>.lock`    exclusive, held for life by the member in that slot of the members table;
4. the segment's own file in `/dev/shm`, around every transaction (`transaction.py`).

A process takes `leader.lock` while it holds none of them. `token` holds the random word that ties the directory to its
segment. Processes may wait for locks 1 and 2; 3 is only tried. Every member holds shared locks on root and folder for
life, because systemd-tmpfiles leaves alone what it cannot lock.

When a process dies, the kernel drops all its locks, and `reap_dead_members` takes back what it had in the tables.

**Files may be removed under us.** Cleaners go by age and by name, a logout removes shared memory, people delete
folders. So a path need not lead to the file that was opened there:

- the lock that guards a segment is on the segment's own file, so one segment cannot have two locks;
- a process that removes a namespace marks it `CLOSED` in a transaction in which no other living worker has a row, and a
  process that joins checks the mark in the transaction that gives it a row. So no process joins a namespace that is
  being removed, even if the two hold different `lifecycle.lock`s;
- a newcomer that finds no segment looks for one of the same place under another name, which it has if the root was made
  anew, and joins that one; after joining, it checks that everything is still in place;
- every member checks about once a second (`member_files`), puts back what is missing, and says so. Only the segment's
  name cannot be put back: the kernel gives no new name to a file that has lost its last one. From then on newcomers are
  refused (`SegmentLostError`), and the members continue.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from mpmm.errors import (
    ClosedError,
    InvalidArgumentError,
    LockTimeoutError,
    MpmmError,
    RuntimeDirectoryError,
    SegmentAllocationError,
    SegmentCorruptError,
    TableFullError,
)
from mpmm.interpreter.fork_hooks import ChildStep, in_forked_child
from mpmm.shared_state import segment as segment_module
from mpmm.shared_state.core import make_core, which
from mpmm.shared_state.creation import NoNamespaceError, StartAgain, create, open_or_replace, read_settings
from mpmm.shared_state.file_errors import told_by_file
from mpmm.shared_state.layout import Capacities, Header, Member, Model
from mpmm.shared_state.lifecycle import LIFECYCLE_TIMEOUT_S, Lifecycle
from mpmm.shared_state.liveness import member_of_row_lives, pid_namespace
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.member_files import MemberFiles
from mpmm.shared_state.reads import Reads
from mpmm.shared_state.runtime_dir import REGISTRY_FOLDER, RuntimeDirectory
from mpmm.shared_state.segment import Segment, segment_name
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import ModelInfo
from mpmm.shared_state.tables import Tables, encode_text, fit_text
from mpmm.shared_state.transaction import CORE_TURN, CROWDED_TURNS, Transaction, TransactionLock
from mpmm.shared_state.transitions import SMOOTHING, Transitions
from mpmm.text.printable import printable_logger

__all__ = [
    "LIFECYCLE_TIMEOUT_S",
    "Namespace",
]

_LOG = printable_logger("mpmm")
# The pause before another attempt to join, when the namespace was removed meanwhile.
AGAIN_S = 0.005
# A cleaner may remove a folder while a file is opened in it, but hardly each time.
PUT_BACK_TRIES = 5
# Among 64 processes that want it all the time, the longest wait for the lock is 0.4 s (see `transaction`).
LEAST_LEAVE_S = 0.5
_attached: weakref.WeakSet[Namespace] = weakref.WeakSet()


class Namespace:
    """This process's membership of one namespace: the segment, its lock and a row in the members table.

    Use `Namespace.join`. After a fork the child's copy is unusable (`is_usable` is False), and the child joins anew.
    """

    def __init__(
        self,
        runtime: RuntimeDirectory,
        segment: Segment,
        settings: Settings,
        alive: LockFile | None,
        kind: int,
        made: list[Any] | None = None,
    ) -> None:
        self.runtime = runtime
        self.segment = segment
        self._settings = settings
        # SETTINGS_CHANGED at the last read; 0 before the first re-read, so that any change so far causes one.
        self._settings_of = 0
        self.kind = kind
        self.pid = os.getpid()
        self.slot = -1
        self.lock = TransactionLock(segment, settings.lock_timeout_seconds)
        try:
            self.lock.core = make_core(segment, self.pid, SMOOTHING, CORE_TURN, CROWDED_TURNS)
            self.tables = Tables(segment)
            self.reads = Reads(self.tables)
            self._folder = str(runtime.path)
            self._files = MemberFiles(runtime, segment, self.tables, self.lock, alive)
        except BaseException:
            # Closed here, because the exception may keep this object alive.
            self.lock.close()
            raise
        self._usable = True
        if made is not None:
            made.append(self)
        # Last, because from here on this object is in a reference cycle, which the collector may find much later.
        self.transitions = Transitions(self.tables, self)

    @classmethod
    def join(
        cls,
        name: str,
        *,
        root: Path | None = None,
        capacities: Capacities | None = None,
        settings: Settings | None = None,
        source: str = "auto",
        kind: int = Member.WORKER,
        label: str = "",
        must_exist: bool = False,
        made: list[Any] | None = None,
        timeout_s: float = LIFECYCLE_TIMEOUT_S,
    ) -> Namespace:
        """Attach to the namespace, creating it if need be, and take a row in the members table.

        A segment that no living process uses is replaced, its estimates kept. If all workers crashed but model servers
        live, the segment is taken over, and what the dead members had is taken back.

        made: the membership is appended to it before it holds anything, so that a caller that is interrupted before
            `join` returns can `leave` it.
        timeout_s: how long to wait for locks that others hold, for a caller that has to answer in time.

        Raises RuntimeDirectoryError, LayoutMismatchError, SegmentAllocationError, LockTimeoutError, TableFullError
        (members), FileNotFoundError if `must_exist` and there is none, InvalidArgumentError for an impossible name.
        """
        runtime = RuntimeDirectory(name, root)
        if name == REGISTRY_FOLDER or name.startswith(f"{REGISTRY_FOLDER}.gone."):
            raise InvalidArgumentError(f"namespace {name!r}: the folder of the model servers has this name")
        # Before anything is made, because it raises if the environment asks for the impossible.
        which()
        _expect_processes_to_be_shown()
        began = time.monotonic()
        deadline = began + timeout_s
        missing: FileNotFoundError | None = None
        while True:
            if must_exist and not runtime.path.is_dir():
                raise FileNotFoundError(f"there is no namespace {name!r} in {runtime.root}")
            runtime.ensure()
            try:
                with (
                    told_by_file(runtime.path),
                    Lifecycle(runtime, max(0.0, deadline - time.monotonic())) as current,
                ):
                    if current:
                        return cls._join_locked(
                            runtime, capacities, settings or Settings(), source, kind, label, must_exist, made, deadline
                        )
            except NoNamespaceError as error:
                raise FileNotFoundError(str(error)) from None
            except FileNotFoundError as error:
                # The last member has removed the directory meanwhile: begin again with a new one. Without the
                # traceback, which has this frame: they would keep each other, and all callers.
                missing = error.with_traceback(None)
            except StartAgain:
                time.sleep(AGAIN_S)
            if time.monotonic() > began + LIFECYCLE_TIMEOUT_S:
                raise RuntimeDirectoryError(
                    f"the files of namespace {name!r} in {runtime.path} are removed again and again while this process "
                    "tries to join; find out what removes them, or set MPMM_RUNTIME_DIR to another folder",
                    path=str(runtime.path),
                ) from missing

    @classmethod
    def _join_locked(
        cls,
        runtime: RuntimeDirectory,
        capacities: Capacities | None,
        settings: Settings,
        source: str,
        kind: int,
        label: str,
        must_exist: bool,
        made: list[Any] | None,
        deadline: float,
    ) -> Namespace:
        alive = LockFile(runtime.file("alive.lock"))
        segment: Segment | None = None
        try:
            deserted = alive.try_exclusive()
            segment, estimates = open_or_replace(runtime, deserted, must_exist)
            if segment is None:
                try:
                    segment = create(runtime, capacities or Capacities(), settings, source)
                except SegmentAllocationError:
                    # Nobody else is in it.
                    runtime.remove()
                    raise
            chosen = read_settings(segment)
            if kind == Member.WORKER:
                # The step from exclusive to shared is not atomic, but the lifecycle lock keeps others away meanwhile.
                alive.shared(max(0.0, deadline - time.monotonic()))
            else:
                alive.close()
            namespace = cls(runtime, segment, chosen, alive if kind == Member.WORKER else None, kind, made)
        except BaseException:
            alive.close()
            if segment is not None:
                segment.close()
            raise
        try:
            # One deadline for all waits: each dead member that is reaped first takes a transaction.
            with namespace.lock.give_up_at(deadline):
                namespace._enter(kind, label or _program_name())
                if not namespace._files.is_in_place():
                    namespace._leave_row()
                    raise StartAgain
                _take_estimates_over(namespace, estimates)
        except (MpmmError, OSError, StartAgain):
            namespace._detach()
            raise
        except (IndexError, KeyError, ValueError, OverflowError) as error:
            namespace._detach()
            raise SegmentCorruptError(
                f"segment {segment.name} of namespace {runtime.name!r} holds what mpmm never writes ({error!r}); "
                "end its processes, the next one makes a new segment",
                name=segment.name,
            ) from error
        except BaseException:
            namespace._detach()
            raise
        _attached.add(namespace)
        return namespace

    @property
    def name(self) -> str:
        """The namespace's name."""
        return self.runtime.name

    @property
    def reference(self) -> int:
        """How rows refer to this member."""
        return self.slot + 1

    @property
    def settings(self) -> Settings:
        """The parameters of the namespace: in a transaction the current ones, else those of the last read."""
        if self.segment.words[Header.SETTINGS_CHANGED] != self._settings_of and self.lock.held_by_this_thread():
            self._settings = read_settings(self.segment)
            self._settings_of = self.segment.words[Header.SETTINGS_CHANGED]
            self.lock.set_timeout(self._settings.lock_timeout_seconds)
        return self._settings

    def follow_settings(self) -> None:
        """Read the parameters again if they were changed. Raises LockTimeoutError."""
        if self.segment.words[Header.SETTINGS_CHANGED] != self._settings_of:
            with self.transaction():
                _ = self.settings

    @property
    def is_usable(self) -> bool:
        """False after `leave`, and in a child that was forked after `join`."""
        return self._usable

    @property
    def is_inherited(self) -> bool:
        """Tell whether this is a forked child's copy of its parent's membership."""
        return self.pid != os.getpid()

    @property
    def is_removed(self) -> bool:
        """Tell whether the last worker has removed the namespace; members that are no workers do not prevent that."""
        return not self._usable or self.segment.is_closed

    @property
    def life_fd(self) -> int:
        """The descriptor of this member's lock; any process that has a duplicate open keeps the member alive."""
        return self._files.life_fd

    def transaction(self, timeout_s: float | None = None) -> Transaction:
        """Return a transaction for `with`, which waits for the lock for at most `timeout_s`.

        Raises ClosedError after leaving, LockTimeoutError.
        """
        if not self._usable:
            raise ClosedError(f"this process has left the namespace {self.name!r}")
        return self.lock(timeout_s)

    def member_is_alive(self, slot: int) -> bool:
        """Tell whether the process in a used row still lives; without the lock, as advice."""
        return slot == self.slot or member_of_row_lives(self.tables, slot, self.member_lock_path(slot))

    def member_lock_path(self, slot: int) -> str:
        """Return the path of the lock file that the member in `slot` holds for life.

        A plain string, because the leader may ask for all of them four times a second.
        """
        return f"{self._folder}/m{slot}.lock"

    @property
    def folder_fd(self) -> int:
        """The descriptor of the folder with the lock files, which may have been removed by now."""
        return self._files.folder_fd

    def find_dead_members(self) -> list[int]:
        """Return slots whose processes are gone but whose rows are not; without the lock, as advice."""
        core = self.lock.core
        if core is not None and not core.may_be_dead(self.folder_fd, self.slot):
            return []
        return [slot for slot in self.tables.used_members() if not self.member_is_alive(slot)]

    def reap_dead_members(self) -> int:
        """Take back what dead members had; return how many there were. Takes the lock only if there may be any."""
        if self.segment.words[Header.CHANGE] % 2:
            # A member may have died in the middle of a transaction: taking the lock undoes that.
            with self.transaction():
                pass
        suspects = self.find_dead_members()
        if not suspects:
            return 0
        reaped = 0
        for slot in suspects:
            done = False
            while not done:
                with self.transaction() as t:
                    # Check again under the lock: the row may have been reaped, and its slot taken by a newcomer.
                    if not self._is_dead(slot):
                        break
                    done = self._reap(t, slot)
            reaped += done
        return reaped

    def reap_if_dead(self, t: Transaction, slot: int) -> bool:
        """Take back what a member had if it is dead; return False if that needs another transaction."""
        return not self._is_dead(slot) or self._reap(t, slot)

    def _is_dead(self, slot: int) -> bool:
        return self.tables.member_in_use(slot) and not self.member_is_alive(slot)

    def _reap(self, t: Transaction, slot: int) -> bool:
        at = self.tables.member(slot)
        state, pid = (int(self.segment.words[at + word]) for word in (Member.STATE, Member.PID))
        done = self.transitions.members.reap(t, slot)
        if done:
            t.after.append(partial(_log_death, self.name, state, pid))
        return done

    def reset(self) -> None:
        """Run `Transitions.reset` in as many transactions as it takes. Raises ClosedError, LockTimeoutError."""
        with self.transaction() as t:
            before = self.transitions.reset(t)
        while before is not None:
            with self.transaction() as t:
                before = self.transitions.reset(t, before)

    def leave(
        self,
        unload_everything: Callable[[], None] | None = None,
        timeout_s: float = LIFECYCLE_TIMEOUT_S,
        waited_s: float = 0.0,
    ) -> None:
        """Give up membership; the last worker to leave removes segment and directory.

        unload_everything: the last worker calls it, with the lifecycle lock held, while it still is a member.
        timeout_s: how long to wait for that lock; after that the process leaves without it, and removes nothing.
        waited_s: how long this process has waited for the segment's lock as it began to leave. It waits for the rest of
        the lock's time-out, or `LEAST_LEAVE_S`; after that others free its row, as for a process that has died.
        Calling `leave` again does nothing.
        """
        if not self.is_usable or self.slot < 0:
            # Nothing is left to do, unless an exception from a signal handler ended the first call, or the join.
            if not self.is_inherited:
                self._detach()
            return
        # So that the last worker finds what it has to remove.
        self._files.put_back()
        with contextlib.ExitStack() as stack:
            try:
                self._leave_locked(stack, unload_everything, timeout_s, waited_s)
            except BaseException:
                # This process may hold `alive.lock` exclusively, and newcomers wait for a shared lock.
                if not self._usable:
                    self._detach()
                elif self._files.alive is not None:
                    self._files.alive.try_shared()
                raise

    def _leave_locked(
        self,
        stack: contextlib.ExitStack,
        unload_everything: Callable[[], None] | None,
        timeout_s: float,
        waited_s: float,
    ) -> None:
        try:
            stack.enter_context(Lifecycle(self.runtime, timeout_s))
            last = self._is_last()
        except (FileNotFoundError, LockTimeoutError) as error:
            # The directory was removed by hand, or a stopped process holds the lifecycle lock.
            _LOG.warning("mpmm %s: leaving without the lifecycle lock: %s", self.name, error)
            last = False
        if last and unload_everything is not None:
            unload_everything()
        try:
            self._usable = False
            self._files.give_up()
            try:
                last = self._leave_row(last, max(LEAST_LEAVE_S, self.lock.timeout_seconds - waited_s))
            except LockTimeoutError:
                # A stopped process has the lock. It is no worker, or this process would not be the last one.
                if last:
                    self.segment.words[Header.CLOSED] = Header.IS_CLOSED
            if last:
                # Another member may have renamed it while others held the lifecycle lock, so that we did not notice.
                with contextlib.suppress(FileNotFoundError):
                    self.segment.rename(segment_name(self.runtime.root, self.name))
                self.segment.unlink()
                self.runtime.remove(self._files.folder_identity)
        finally:
            # Other processes do what is left undone, as for a process that has died.
            self._detach()

    def _leave_row(self, close: bool = False, timeout_s: float | None = None) -> bool:
        """Give up the row in the members table; close the namespace to newcomers if `close` and no other worker lives.

        Return whether it was closed. timeout_s: as for `transaction`.
        """
        left = False
        while not left:
            with self.lock(timeout_s) as t:
                left = self.transitions.members.leave(t, self.slot)
                if left and close:
                    close = not self._others_work()
                    t.set(Header.CLOSED, Header.IS_CLOSED if close else 0)
        return close

    def _is_last(self) -> bool:
        alive = self._files.alive
        if alive is None:
            return False
        if alive.try_exclusive() and alive.is_current() and not self._others_work():
            return True
        # The failed conversion has cost us the shared lock. Others hold it, so the namespace never looked deserted.
        alive.shared(LIFECYCLE_TIMEOUT_S)
        return False

    def _others_work(self) -> bool:
        """Tell whether another living worker has a row; its lock may be on a removed file, where it proves nothing."""
        workers = self.tables.rows_where(self.segment.layout.members, Member.STATE, Member.WORKER)
        return any(slot != self.slot and self.member_is_alive(slot) for slot in workers)

    def _enter(self, kind: int, label: str) -> None:
        # First, so that rows of many crashed processes do not keep newcomers out. A member that died in the middle of
        # its first transaction may show only once the transaction below has undone that: the leader reaps it.
        if self.find_dead_members():
            self.reap_dead_members()
        with self.lock() as t:
            if self.segment.is_closed:
                raise StartAgain
            for slot in self.tables.free_members():
                lock = LockFile(self.member_lock_path(slot))
                if lock.try_exclusive():
                    break
                # Held by a process whose row is free already, or for microseconds by one that calls `is_locked`.
                lock.close()
            else:
                capacity = self.segment.layout.members.capacity
                raise TableFullError(
                    f"the members table of namespace {self.name!r} is full: {capacity} processes are attached; "
                    "create the namespace with a larger Capacities.members",
                    table="members",
                    capacity=capacity,
                    setting="Capacities.members",
                )
            self._files.take_life(slot, lock)
            self.slot = slot
            started = int(psutil.Process().create_time() * 1e9)
            self.transitions.members.join(t, slot, kind, os.getpid(), started, fit_text(label, Member.NAME_BYTES))
            t.set(self.tables.member(slot) + Member.LOCK, lock.identity[1])
            if self.segment.words[Header.PID_NAMESPACE] not in (0, pid_namespace()):
                t.set(Header.PID_NAMESPACE, 0)

    def open_lock_file(self, name: str) -> LockFile:
        """Open a file for locking, or make it; put the folder back if it has just been removed.

        Raises FileNotFoundError if the folder is removed again and again.
        """
        path = self.runtime.file(name)
        for _ in range(PUT_BACK_TRIES):
            with contextlib.suppress(FileNotFoundError):
                return LockFile(path)
            self._files.put_back()
        return LockFile(path)

    def look_after_files(self, lead: LockFile, leading: bool) -> bool:
        """Check, at most once a second, that our files are in place; put back what is missing, and say so.

        lead: the leader's lock, which is put back, too. Return whether this process still leads, which it does not if
        another one has taken the lead by a new file. Takes the lock only if something was put back.
        """
        return self._files.look_after(lead, leading)

    def _detach(self) -> None:
        self._usable = False
        self._files.close()
        self.lock.close()
        self.tables.close()
        self.segment.close()

    def forget_after_fork(self) -> None:
        """In a forked child: close the parent's descriptors, and claim nothing that the parent has."""
        self._usable = False
        self._files.forget_after_fork()
        self.lock.forget_after_fork()


def _expect_processes_to_be_shown() -> None:
    """Raise RuntimeDirectoryError on Linux without /proc, where not even this process can be identified."""
    if sys.platform == "linux" and not os.path.exists("/proc/self/stat"):
        raise RuntimeDirectoryError(
            "mpmm tells processes apart by /proc, and none is mounted here: mount it (`mount -t proc proc /proc`), or "
            "leave the sandbox that hides it",
            path="/proc",
        )


def _program_name() -> str:
    """Return this process's name; `python` for a program that embeds Python or empties its arguments."""
    arguments = getattr(sys, "argv", None)
    return os.path.basename(arguments[0]) if arguments and arguments[0] else "python"


def _take_estimates_over(namespace: Namespace, models: tuple[ModelInfo, ...]) -> None:
    """Give the models of a deserted namespace their estimates back, as far as the table has rows for them."""
    transitions = namespace.transitions
    with contextlib.suppress(TableFullError, InvalidArgumentError):
        for model in models:
            if model.estimate_mb is None:
                continue
            encoded = encode_text(model.tag, Model.TAG_BYTES, "model tag")
            with namespace.transaction() as t:
                row = transitions.models.claim(t, model.tag, encoded)
                transitions.estimates.estimate(t, row, model.estimate_mb, model.measured, model.sd_mb)


def _log_death(name: str, state: int, pid: int) -> None:
    if state == Member.SERVER:
        # Usually it was told to end, because its model was unloaded.
        _LOG.debug("mpmm %s: model server pid %d has ended", name, pid)
        return
    text = "mpmm %s: pid %d has died; its holds, loads and places in the queue are free again"
    _LOG.info(text, name, pid)


def _forget_all_after_fork() -> None:
    segment_module.reset_after_fork()
    for namespace in list(_attached):
        namespace.forget_after_fork()
    _attached.clear()


in_forked_child(_forget_all_after_fork, ChildStep.SEGMENT)
