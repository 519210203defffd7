"""Attaching to a namespace, being a member of it, and leaving it.

Files in the runtime directory, and the order in which their locks are taken:

1. `lifecycle.lock`  exclusive while somebody creates, joins, leaves or removes the namespace;
2. `alive.lock`      shared by every worker as long as it lives: free for an exclusive lock means that no
                     worker is left. Model servers do not take it, they watch it; nor do managers in them;
3. `m<slot>.lock`    exclusive, held for life by the member in that slot of the members table;
4. the segment's own file in `/dev/shm`, around every transaction (`transaction.py`).

`leader.lock` is taken with none of them held. `token` holds the random word that ties the directory to its
segment. Locks 1 and 2 may be waited for; 3 is only tried. Root and folder are held shared, for life, by every member:
systemd-tmpfiles leaves alone what it cannot lock.

The kernel drops all of them when a process dies. What it leaves in the tables is taken back by `reap`.

**What may be removed under us.** Cleaners go by age and by name, a logout removes shared memory, people delete folders.
So no path is taken for what was opened there once:

- the segment is guarded by a lock on its own file: one segment cannot come under two locks;
- who removes a namespace marks it `CLOSED` in a transaction in which no other living worker is in the books, and who
  joins looks at the mark in the transaction that gives it a row. So nobody joins what is being removed, even if the
  two of them hold different `lifecycle.lock`s;
- a newcomer that finds no segment looks for one of the same place under another name, which it has if somebody has made
  the root anew, and comes to that one; and when it has joined, it looks whether everything is still where it was;
- every member looks about once a second (`look_after_files`), puts back what is missing, and says so. What cannot be
  put back is the name of the segment: the kernel gives none to a file that has lost its last one. Newcomers are refused
  then (`SegmentLostError`), and the members work on.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import secrets
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import astuple, fields
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from mpmm.errors import (
    ClosedError,
    InvalidArgumentError,
    LayoutMismatchError,
    LockTimeoutError,
    MpmmError,
    RuntimeDirectoryError,
    SegmentAllocationError,
    SegmentCorruptError,
    TableFullError,
)
from mpmm.fork_hooks import ChildStep, in_forked_child
from mpmm.shared_state import segment as segment_module
from mpmm.shared_state.core import make_core, which
from mpmm.shared_state.layout import Capacities, Header, Member, Model
from mpmm.shared_state.liveness import has_living_member, member_of_row_lives, pid_namespace
from mpmm.shared_state.lock_file import LockFile, identity_of, write_once
from mpmm.shared_state.prune import find_moved, sweep_orphans
from mpmm.shared_state.runtime_dir import REGISTRY_FOLDER, RuntimeDirectory
from mpmm.shared_state.segment import (
    Segment,
    SegmentProblem,
    place_of,
    segment_lost,
    segment_name,
    unlink_segment,
)
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import ModelInfo, decode
from mpmm.shared_state.tables import Tables, encode_text, fit_text
from mpmm.shared_state.transaction import TURN, Transaction, TransactionLock, float_bits
from mpmm.shared_state.transitions import SMOOTHING, Transitions
from mpmm.text.printable import printable_logger

__all__ = [
    "LIFECYCLE_TIMEOUT_S",
    "Namespace",
    "is_deserted",
    "namespaces_below",
    "read_settings",
    "remove_all_deserted",
    "remove_deserted",
    "run_at_exit",
]

_LOG = printable_logger("mpmm")
# Joining and leaving take milliseconds, unless the last member is unloading everything on its way out.
LIFECYCLE_TIMEOUT_S = 60.0
# Who cleans up after others does not wait for one who has been stopped in the middle of it.
REMOVAL_TIMEOUT_S = 5.0
# How often a member looks whether its files are where they were; twelve system calls.
LOOK_S = 1.0
# Cleaners remove what nobody has touched for days.
TOUCH_S = 3600.0
# Before another attempt to join what was removed meanwhile.
AGAIN_S = 0.005
_attached: weakref.WeakSet[Namespace] = weakref.WeakSet()


class _StartAgain(Exception):
    """What was to be joined is being removed."""


class Namespace:
    """This process's membership of one namespace: the segment, its lock and a row in the members table.

    Use `Namespace.join`. After a fork the child's copy is dead (`is_usable` is False) and the child joins anew.
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
        # When those were changed that were read last; 0 if they are to be read again should they ever have been.
        self._settings_of = 0
        self.kind = kind
        self.pid = os.getpid()
        self.slot = -1
        self.lock = TransactionLock(segment, settings.lock_timeout_seconds)
        self.lock.core = make_core(segment, self.pid, SMOOTHING, TURN)
        self.tables = Tables(segment)
        self._folder = str(runtime.path)
        self._alive = alive
        self._member_lock: LockFile | None = None
        self._holds = _hold(runtime)
        # Locks on files that somebody has removed. Model servers that watch those, or a program with a duplicate, still
        # go by them.
        self._removed: list[LockFile] = []
        self._look_due = time.monotonic() + LOOK_S
        self._touch_due = time.monotonic() + TOUCH_S
        # The segment's name has the root's identity in it, and the root is another one by now.
        self._root_changed = False
        self._lost = False
        self._complained = False
        self._usable = True
        if made is not None:
            made.append(self)
        # Last, because from here on this object refers to itself: what only the collector finds may stay for long.
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
        patience_s: float = LIFECYCLE_TIMEOUT_S,
    ) -> Namespace:
        """Attach to the namespace, creating it if need be, and take a row in the members table.

        A segment that nobody living uses is replaced, its estimates kept. One whose workers all crashed, but not their
        model servers, is taken over: what the dead had is taken back.

        made: the membership is added to it before it has anything, for a caller that is interrupted before it has it,
            and who then has to `leave` it.
        patience_s: gives up after so long if others have the locks, for a caller who has to answer in time.

        Raises RuntimeDirectoryError, LayoutMismatchError, SegmentAllocationError, LockTimeoutError,
        TableFullError (members), FileNotFoundError when `must_exist` and there is none, InvalidArgumentError for a
        name that cannot be.
        """
        runtime = RuntimeDirectory(name, root)
        if name == REGISTRY_FOLDER or name.startswith(f"{REGISTRY_FOLDER}.gone."):
            raise InvalidArgumentError(f"namespace {name!r}: the folder of the model servers has this name")
        # Before anything is made, because it raises where the environment says what cannot be.
        which()
        began = time.monotonic()
        deadline = began + patience_s
        while True:
            if must_exist and not runtime.path.is_dir():
                raise FileNotFoundError(f"there is no namespace {name!r} in {runtime.root}")
            runtime.ensure()
            try:
                with _lifecycle(runtime, max(0.0, deadline - time.monotonic())) as current:
                    if current:
                        return cls._join_locked(
                            runtime, capacities, settings or Settings(), source, kind, label, must_exist, made, deadline
                        )
            except _NoNamespaceError as error:
                raise FileNotFoundError(str(error)) from None
            except FileNotFoundError:
                # The last member removed the directory under our feet: begin again with a new one.
                pass
            except _StartAgain:
                time.sleep(AGAIN_S)
            if time.monotonic() > began + LIFECYCLE_TIMEOUT_S:
                raise RuntimeDirectoryError(
                    f"the files of namespace {name!r} in {runtime.path} are removed again and again while this process "
                    "tries to join; find out what removes them, or set MPMM_RUNTIME_DIR to another folder",
                    path=str(runtime.path),
                )

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
        try:
            deserted = alive.try_exclusive()
            segment, estimates = _open_or_replace(runtime, deserted, must_exist)
            if segment is None:
                try:
                    segment = _create(runtime, capacities or Capacities(), settings, source)
                except SegmentAllocationError:
                    if deserted:
                        runtime.remove()
                    raise
            chosen = read_settings(segment)
            if kind == Member.WORKER:
                # From exclusive to shared is no atomic step, but the lifecycle lock keeps others away meanwhile.
                alive.shared(LIFECYCLE_TIMEOUT_S)
            else:
                alive.close()
            namespace = cls(runtime, segment, chosen, alive if kind == Member.WORKER else None, kind, made)
        except BaseException:
            alive.close()
            raise
        try:
            namespace.lock.set_timeout(min(chosen.lock_timeout_seconds, max(0.0, deadline - time.monotonic())))
            namespace._enter(kind, label or Path(sys.argv[0] or "python").name)
            if not namespace._is_in_place():
                namespace._leave_row()
                raise _StartAgain
            namespace._take_over(estimates)
            namespace.lock.set_timeout(chosen.lock_timeout_seconds)
        except (MpmmError, OSError, _StartAgain):
            namespace._let_go()
            raise
        except (IndexError, KeyError, ValueError, OverflowError) as error:
            namespace._let_go()
            raise SegmentCorruptError(
                f"segment {segment.name} of namespace {runtime.name!r} holds what mpmm never writes ({error!r}); "
                "end its processes, the next one makes a new segment",
                name=segment.name,
            ) from error
        except BaseException:
            namespace._let_go()
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
        """The parameters of the namespace: as of now in a transaction, else as of the last one that has looked."""
        if self.segment.words[Header.SETTINGS_CHANGED] != self._settings_of and self.lock.held_by_this_thread():
            self._settings = read_settings(self.segment)
            self._settings_of = self.segment.words[Header.SETTINGS_CHANGED]
            self.lock.set_timeout(self._settings.lock_timeout_seconds)
        return self._settings

    def follow_settings(self) -> None:
        """Read the parameters again if somebody has changed them. Raises LockTimeoutError."""
        if self.segment.words[Header.SETTINGS_CHANGED] != self._settings_of:
            with self.transaction():
                _ = self.settings

    @property
    def is_usable(self) -> bool:
        """False after `leave`, and in a child that was forked after `join`."""
        return self._usable

    @property
    def is_inherited(self) -> bool:
        """Tell whether this is a forked child's copy of what its parent is a member of."""
        return self.pid != os.getpid()

    @property
    def is_removed(self) -> bool:
        """Tell whether the last worker has removed the namespace, which a member that is no worker does not prevent."""
        return not self._usable or self.segment.is_closed

    @property
    def life_fd(self) -> int:
        """The descriptor of the lock that says that this member lives; whoever has a duplicate open keeps it alive."""
        if self._member_lock is None:
            raise ClosedError(f"this process has left the namespace {self.name!r}")
        return self._member_lock.fd

    def transaction(self, patience_s: float | None = None) -> Transaction:
        """Return a transaction for `with`, which waits for the lock for `patience_s` at most.

        Raises ClosedError after leaving, LockTimeoutError.
        """
        if not self._usable:
            raise ClosedError(f"this process has left the namespace {self.name!r}")
        return self.lock(patience_s)

    def member_is_alive(self, slot: int) -> bool:
        """Tell whether the process in a used row still lives; needs no lock and is advice without it."""
        return slot == self.slot or member_of_row_lives(self.tables, slot, self.member_lock_path(slot))

    def member_lock_path(self, slot: int) -> str:
        """Return the path of the lock file that the member in `slot` holds for life.

        A plain string: the leader asks for all of them four times a second.
        """
        return f"{self._folder}/m{slot}.lock"

    def find_dead_members(self) -> list[int]:
        """Return slots whose processes are gone but whose rows are not; looks without the lock, as advice."""
        return [slot for slot in self.tables.used_members() if not self.member_is_alive(slot)]

    def reap_dead_members(self) -> int:
        """Take back what dead members had; return how many there were. Takes the lock only if there are any."""
        if self.segment.words[Header.CHANGE] % 2:
            # Rows may show half of what a member did that died meanwhile: taking the lock undoes that.
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
                    # Looked at again under the lock: the row may have been reaped, and its slot taken by a newcomer.
                    if not self.tables.member_in_use(slot) or self.member_is_alive(slot):
                        break
                    pid = int(self.segment.words[self.tables.member(slot) + Member.PID])
                    done = self.transitions.members.reap(t, slot)
                    if done:
                        t.after.append(
                            partial(
                                _LOG.info,
                                "mpmm %s: pid %d has died; its holds, loads and places in the queue are free again",
                                self.name,
                                pid,
                            )
                        )
                        reaped += 1
        return reaped

    def reset(self) -> None:
        """Do `Transitions.reset`, in as many transactions as it takes. Raises ClosedError, LockTimeoutError."""
        with self.transaction() as t:
            before = self.transitions.reset(t)
        while before is not None:
            with self.transaction() as t:
                before = self.transitions.reset(t, before)

    def leave(self, unload_everything: Callable[[], None] | None = None) -> None:
        """Give up membership; the last worker to leave removes segment and directory.

        unload_everything: called by the last one, with the lifecycle lock held, while it still is a member.
        Calling `leave` again does nothing.
        """
        if not self.is_usable or self.slot < 0:
            # Nothing is left to do, unless an exception from a signal handler has ended the first call, or the join.
            if not self.is_inherited:
                self._let_go()
            return
        # So that the last one finds what it is to remove.
        self._put_files_back()
        with contextlib.ExitStack() as stack:
            try:
                self._leave_locked(stack, unload_everything)
            except BaseException:
                # Newcomers wait for the shared lock, and would do so until this process came by again.
                if self._usable and self._alive is not None:
                    self._alive.try_shared()
                raise

    def _leave_locked(self, stack: contextlib.ExitStack, unload_everything: Callable[[], None] | None) -> None:
        try:
            stack.enter_context(_lifecycle(self.runtime))
            last = self._is_last()
        except (FileNotFoundError, LockTimeoutError) as error:
            # Somebody removed the directory by hand, or a stopped process sits on the lifecycle lock.
            _LOG.warning("mpmm %s: leaving without the lifecycle lock: %s", self.name, error)
            last = False
        if last and unload_everything is not None:
            unload_everything()
        self._usable = False
        try:
            try:
                last = self._leave_row(close=last)
            except LockTimeoutError:
                # A stopped process has the lock. That is no worker, or we would not be the last.
                if last:
                    self.segment.words[Header.CLOSED] = Header.IS_CLOSED
            if last:
                self.segment.unlink()
                self.runtime.remove(self._holds[-1].identity)
        finally:
            # Whatever is left undone others do, as for a process that has died.
            self._let_go()

    def _leave_row(self, close: bool = False) -> bool:
        """Give up the row in the members table; if asked to, and no other worker lives, let nobody join any more.

        Return whether that was done.
        """
        left = False
        while not left:
            with self.lock() as t:
                left = self.transitions.members.leave(t, self.slot)
                if left and close:
                    close = not self._others_work()
                    t.set(Header.CLOSED, Header.IS_CLOSED if close else 0)
        return close

    def _is_last(self) -> bool:
        if self._alive is None:
            return False
        if self._alive.try_exclusive() and self._alive.is_current() and not self._others_work():
            return True
        # The failed conversion has cost us the shared lock. Others hold it, so nobody can have taken us for gone.
        self._alive.shared(LIFECYCLE_TIMEOUT_S)
        return False

    def _others_work(self) -> bool:
        """Tell whether the books know of another living worker, whose lock on a removed file says nothing."""
        workers = self.tables.rows_where(self.segment.layout.members, Member.STATE, Member.WORKER)
        return any(slot != self.slot and self.member_is_alive(slot) for slot in workers)

    def _enter(self, kind: int, label: str) -> None:
        # First of all, so that a crowd of crashed processes does not lock newcomers out. What a member had that died in
        # the middle of a transaction shows once that is undone, as the transaction below does: the leader reaps it.
        if self.find_dead_members():
            self.reap_dead_members()
        with self.lock() as t:
            if self.segment.is_closed:
                raise _StartAgain
            for slot in self.tables.free_members():
                lock = LockFile(Path(self.member_lock_path(slot)))
                if lock.try_exclusive():
                    break
                # Held by a process that has not yet been reaped, or for microseconds by one that asks `is_locked`.
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
            self._member_lock = lock
            self.slot = slot
            started = int(psutil.Process().create_time() * 1e9)
            self.transitions.members.join(t, slot, kind, os.getpid(), started, fit_text(label, Member.NAME_BYTES))
            t.set(self.tables.member(slot) + Member.LOCK, lock.identity[1])
            if self.segment.words[Header.PID_NAMESPACE] not in (0, pid_namespace()):
                t.set(Header.PID_NAMESPACE, 0)

    def look_after_files(self, lead: LockFile, leading: bool) -> bool:
        """Look, once a second at most, whether our files are where they were; put back what is not, and say so.

        lead: the leader's lock, of which the same holds. Return whether this process still leads: no longer if another
        one has taken the lead by a new file. Takes the lock only if something was put back.
        """
        now = time.monotonic()
        if now < self._look_due:
            return leading
        self._look_due = now + LOOK_S
        if now >= self._touch_due:
            self._touch_due = now + TOUCH_S
            _touch(self.runtime.root)
        self._put_files_back()
        if not self._may_put_back or lead.is_current():
            return leading
        try:
            made = lead.put_back() if leading else LockFile(lead.path)
            lead.become(made or LockFile(lead.path))
        except OSError as error:
            _LOG.warning("mpmm %s: cannot put %s back: %s", self.name, lead.path, error)
            return leading
        if leading:
            self._note_put_back(["leader.lock"])
        return leading and made is not None

    @property
    def _may_put_back(self) -> bool:
        # Where the last worker has left, all is removed on purpose.
        return self._usable and not self.segment.is_closed

    def _put_files_back(self) -> None:
        if not self._may_put_back:
            return
        found: list[str] = []
        try:
            self._put_folder_back(found)
            if self._root_changed or not self.segment.is_current():
                self._look_for_segment(found)
            if write_once(self.runtime.file("token"), f"{self.segment.words[Header.TOKEN]:016x}"):
                found.append("token")
            if self._alive is not None and not self._alive.is_current():
                alive = self._alive.put_back(shared=True)
                if alive is not None:
                    self._removed.append(self._alive)
                    self._alive = alive
                    found.append("alive.lock")
            self._put_life_back(found)
            self._complained = False
        except (OSError, LockTimeoutError) as error:
            if not self._complained:
                self._complained = True
                _LOG.warning("mpmm %s: cannot put back what was removed of %s: %s", self.name, self._folder, error)
        if found:
            self._note_put_back(found)

    def _put_folder_back(self, found: list[str]) -> None:
        if all(hold.is_current() for hold in self._holds):
            for hold in self._holds:
                # One who keeps the folder from us this moment would otherwise do so for ever.
                hold.try_shared()
            return
        if not self.runtime.path.is_dir():
            found.append("the folder")
        self.runtime.ensure()
        old, self._holds = self._holds, _hold(self.runtime)
        self._root_changed = self._root_changed or old[0].identity != self._holds[0].identity
        for hold in old:
            hold.close()

    def _look_for_segment(self, found: list[str]) -> None:
        """Find the segment under the name that belongs to a root that was made anew, or give it that name."""
        # Kept from newcomers, who make a segment if they find none.
        with contextlib.closing(LockFile(self.runtime.file("lifecycle.lock"))) as lifecycle:
            if not lifecycle.try_exclusive():
                return
            old, name = self.segment.name, segment_name(self.runtime.root, self.name)
            if self.segment.rename(name):
                if name != old:
                    found.append("the root of the runtime directories")
                self._root_changed = self._lost = False
                return
        if not self._lost:
            self._lost = True
            _LOG.error("mpmm: pid %d goes on, but no process can join it: %s", self.pid, segment_lost(self.name, old))

    def _put_life_back(self, found: list[str]) -> None:
        if self._member_lock is None:
            return
        if not self._member_lock.is_current():
            made = self._member_lock.put_back(replace=True)
            if made is None:
                return
            self._removed.append(self._member_lock)
            self._member_lock = made
            found.append(made.path.name)
        # Until the row says so, nobody goes by the new file.
        word, inode = self.tables.member(self.slot) + Member.LOCK, self._member_lock.identity[1]
        if self.segment.words[word] != inode:
            with self.transaction(REMOVAL_TIMEOUT_S) as t:
                t.set(word, inode)

    def _note_put_back(self, found: list[str]) -> None:
        _LOG.warning(
            "mpmm %s: something has removed %s of %s under pid %d, which has put it back; keep cleaners away from this "
            "folder, or set MPMM_RUNTIME_DIR to one that no cleaner touches",
            self.name,
            ", ".join(found),
            self._folder,
            self.pid,
        )
        with contextlib.suppress(LockTimeoutError), self.transaction(REMOVAL_TIMEOUT_S) as t:
            t.add(Header.PUT_BACK, len(found))

    def _is_in_place(self) -> bool:
        """Tell whether what was joined is still what the next one will find."""
        held = [*self._holds] if self._alive is None else [*self._holds, self._alive]
        return self.segment.is_current() and all(lock.is_current() for lock in held)

    def _take_over(self, models: tuple[ModelInfo, ...]) -> None:
        """Give the models of a deserted namespace their estimates back, as far as there are rows for them."""
        with contextlib.suppress(TableFullError, InvalidArgumentError):
            for model in models:
                if model.estimate_mb is None:
                    continue
                encoded = encode_text(model.tag, Model.TAG_BYTES, "model tag")
                with self.transaction() as t:
                    row = self.transitions.models.claim(t, model.tag, encoded)
                    self.transitions.estimates.estimate(t, row, model.estimate_mb, model.measured, model.sd_mb)

    def _let_go(self) -> None:
        self._usable = False
        for file in (self._member_lock, self._alive, *self._holds, *self._removed):
            if file is not None:
                file.close()
        self.lock.close()
        self.tables.close()
        self.segment.close()

    def forget_after_fork(self) -> None:
        """In a forked child: close the parent's descriptors, claim nothing of what it has."""
        self._usable = False
        for file in (self._member_lock, self._alive, *self._holds, *self._removed):
            if file is not None:
                file.forget_after_fork()
        self.lock.forget_after_fork()


class _lifecycle:
    """`with _lifecycle(runtime) as current:` the lifecycle lock; `current` is False if the directory was replaced.

    Raises FileNotFoundError when the directory vanished, LockTimeoutError.
    """

    def __init__(self, runtime: RuntimeDirectory, timeout_seconds: float = LIFECYCLE_TIMEOUT_S) -> None:
        self._runtime = runtime
        self._timeout_seconds = timeout_seconds

    def __enter__(self) -> bool:
        self._file = LockFile(self._runtime.file("lifecycle.lock"))
        try:
            self._file.exclusive(self._timeout_seconds)
        except BaseException:
            self._file.close()
            raise
        return self._file.is_current()

    def __exit__(self, *_: object) -> None:
        self._file.close()


def remove_deserted(root: Path, name: str) -> bool:
    """Remove a namespace in which no worker is left; return whether that was so. False if there is a newcomer.

    For those who are left when all workers have crashed: model servers, and the process that they are forked from.
    Hold none of the namespace's locks.
    """
    runtime = RuntimeDirectory(name, root)
    with contextlib.suppress(FileNotFoundError, LockTimeoutError), _lifecycle(runtime, REMOVAL_TIMEOUT_S) as current:
        folder = identity_of(runtime.path)
        if not current:
            return False
        with contextlib.closing(LockFile(runtime.file("alive.lock"))) as alive:
            if alive.try_exclusive() and _remove_segment(runtime):
                runtime.remove(folder)
                return True
    return False


def _remove_segment(runtime: RuntimeDirectory) -> bool:
    """Remove a segment in which no worker is left; return False if there is one, whose lock file may be gone."""
    name = segment_name(runtime.root, runtime.name)
    try:
        segment = Segment.open(name)
    except SegmentProblem:
        unlink_segment(name)
        return True
    if segment is None:
        return True
    with contextlib.closing(segment):
        if not _close(segment, runtime, (Member.WORKER,)):
            return False
        segment.unlink()
        return True


def is_deserted(root: Path, name: str) -> bool:
    """Tell whether `remove_deserted` would remove a namespace; change nothing."""
    runtime = RuntimeDirectory(name, root)
    with contextlib.suppress(FileNotFoundError, LockTimeoutError), _lifecycle(runtime, REMOVAL_TIMEOUT_S) as current:
        if not current:
            return False
        with contextlib.closing(LockFile(runtime.file("alive.lock"))) as alive:
            if not alive.try_exclusive():
                return False
        try:
            segment = Segment.open(segment_name(runtime.root, name))
        except SegmentProblem:
            return True
        if segment is None:
            return True
        with contextlib.closing(segment):
            return not has_living_member(Tables(segment), runtime.path, (Member.WORKER,))
    return False


def _close(segment: Segment, runtime: RuntimeDirectory, kinds: tuple[int, ...]) -> bool:
    """Let nobody join a segment any more; return False, and let them, if a member of one of these kinds lives in it.

    Raises LockTimeoutError.
    """
    tables = Tables(segment)
    try:
        with contextlib.closing(TransactionLock(segment, REMOVAL_TIMEOUT_S)) as lock, lock() as t:
            if has_living_member(tables, runtime.path, kinds):
                return False
            t.set(Header.CLOSED, Header.IS_CLOSED)
    except SegmentCorruptError:
        # Nobody can take the lock any more, so nobody can join.
        return True
    finally:
        tables.close()
    return True


def remove_all_deserted(root: Path) -> None:
    """Remove every namespace below `root` in which no worker is left, see `remove_deserted`."""
    for name in namespaces_below(root):
        remove_deserted(root, name)


def namespaces_below(root: Path) -> list[str]:
    """Name the namespaces below `root` that have a folder, living or not."""
    return sorted(token.parent.name for token in root.glob("[!.]*/token"))


def read_settings(segment: Segment) -> Settings:
    """Return the parameters that the creator of the namespace chose. Raises SegmentProblem for impossible ones."""
    values = [segment.floats[Header.SETTINGS + offset] for offset in range(len(fields(Settings)))]
    try:
        return Settings(*values)
    except InvalidArgumentError as error:
        raise SegmentProblem(f"parameters that cannot be ({error})", "those of a manager") from error


def _open_or_replace(
    runtime: RuntimeDirectory, deserted: bool, must_exist: bool
) -> tuple[Segment | None, tuple[ModelInfo, ...]]:
    """Return the namespace's segment, None if one is to be made, and models whose estimates are worth keeping."""
    estimates: tuple[ModelInfo, ...] = ()
    name = segment_name(runtime.root, runtime.name)
    try:
        segment = Segment.open(name, _token_if_any(runtime)) or find_moved(runtime, name)
        if segment is not None:
            read_settings(segment)
    except SegmentProblem as problem:
        if not deserted:
            raise LayoutMismatchError(
                f"namespace {runtime.name!r} is in use with an incompatible segment {name}: found {problem.found}, "
                f"expected {problem.expected}; end its processes, or choose another namespace",
                name=name,
                found=problem.found,
                expected=problem.expected,
            ) from None
        _LOG.info("mpmm %s: replacing a stale segment: %s", runtime.name, problem)
        unlink_segment(name)
        segment = None
    if segment is not None and segment.is_closed and not deserted:
        # Who has closed it is about to remove it.
        segment.close()
        raise _StartAgain
    if (
        segment is not None
        and deserted
        and (segment.is_closed or _close(segment, runtime, (Member.WORKER, Member.SERVER, Member.GUEST)))
    ):
        # All of its users crashed, and none of their model servers is left: nothing of it holds any more but what
        # was learnt of the models. The parameters are the newcomer's.
        with contextlib.suppress(SegmentCorruptError):
            models = decode(bytearray(segment.copy()), segment.layout, runtime.name, name, with_events=False).models
            estimates = tuple(model for model in models if model.kind == "model")
        segment.unlink()
        segment.close()
        segment = None
    if segment is None and not deserted:
        # A new one beside it would be a second set of books.
        raise segment_lost(runtime.name, name)
    if segment is None and must_exist:
        raise _NoNamespaceError(f"there is no namespace {runtime.name!r} in {runtime.root}")
    if segment is not None:
        # Whoever has removed it, it is the same namespace.
        write_once(runtime.file("token"), f"{segment.words[Header.TOKEN]:016x}")
    return segment, estimates


class _NoNamespaceError(FileNotFoundError):
    """There is none, and none was to be made."""


def _hold(runtime: RuntimeDirectory) -> list[LockFile]:
    """Hold root and folder, as far as no cleaner does this moment. Raises FileNotFoundError if one is gone."""
    holds = [LockFile(folder, folder=True) for folder in (runtime.root, runtime.path)]
    for hold in holds:
        hold.try_shared()
    return holds


def _touch(root: Path) -> None:
    """Let the files of all namespaces, and of the model servers, look as if they were new."""
    for folder, _, names in os.walk(root):
        for name in ("", *names):
            with contextlib.suppress(OSError):
                os.utime(os.path.join(folder, name), follow_symlinks=False)


def _create(runtime: RuntimeDirectory, capacities: Capacities, settings: Settings, source: str) -> Segment:
    sweep_orphans()
    runtime.sweep()
    try:
        segment = Segment.create(segment_name(runtime.root, runtime.name), capacities, _token(runtime))
    except FileExistsError:
        # By one who holds another `lifecycle.lock`.
        raise _StartAgain from None
    words = segment.words
    # Nobody takes the segment for one of ours before it is sealed, so these stores need no transaction.
    words[Header.CREATED_WALL] = time.time_ns()
    words[Header.PID_NAMESPACE] = pid_namespace()
    words[Header.ROOT_PLACE], words[Header.ROOT_MOUNTS] = place_of(runtime.root)
    place = os.fsencode(os.path.realpath(runtime.root))
    _store_text(words, Header.ROOT, place if len(place) <= Header.ROOT_BYTES else b"")
    for offset, value in enumerate(astuple(settings)):
        words[Header.SETTINGS + offset] = float_bits(float(value))
    words[Header.HOST_SHARE_MB] = float_bits(_host_share_mb())
    _store_text(words, Header.SOURCE_ASKED, fit_text(source, Header.SOURCE_NAME_BYTES))
    segment.seal()
    return segment


def _host_share_mb() -> float:
    """Return the host memory that suspended copies may take unless somebody has chosen it: half of what is left."""
    # Imported here, because model servers join, too, and never create.
    from mpmm.sources.host_memory import host_memory_left_mb

    try:
        return host_memory_left_mb() / 2
    except (OSError, ValueError, psutil.Error) as error:
        _LOG.warning(
            "mpmm: nothing is suspended, because the memory of the host is unknown: %s; suspend_budget_mb sets it",
            error,
        )
        return 0.0


def _store_text(words: Any, at: int, text: bytes) -> None:
    words[at] = len(text)
    for offset in range(0, len(text), 8):
        words[at + 1 + offset // 8] = int.from_bytes(text[offset : offset + 8], "little")


def _token_if_any(runtime: RuntimeDirectory) -> int | None:
    """Return the word that ties directory and segment together, None if there is none or it cannot be read."""
    try:
        return int(runtime.file("token").read_text(encoding="ascii"), 16)
    except (FileNotFoundError, ValueError):
        return None


def _token(runtime: RuntimeDirectory) -> int:
    """Return the word that ties directory and segment together, made at first use; lifecycle lock held."""
    path = runtime.file("token")
    while True:
        token = _token_if_any(runtime)
        if token is not None:
            return token
        if not write_once(path, f"{secrets.randbits(64):016x}"):
            # There is one by now, or what is there is none.
            with contextlib.suppress(FileNotFoundError):
                if _token_if_any(runtime) is None:
                    os.unlink(path)


def _forget_all_after_fork() -> None:
    segment_module.reset_after_fork()
    for namespace in list(_attached):
        namespace.forget_after_fork()
    _attached.clear()


in_forked_child(_forget_all_after_fork, ChildStep.SEGMENT)


def run_at_exit(leave: Callable[[], None]) -> object:
    """Have `leave` called when this process ends in an orderly way, as a main program or a multiprocessing child.

    `atexit` alone misses the latter. Returns an object; calling it does it now, its `cancel()` never.
    """
    return multiprocessing.util.Finalize(None, leave, exitpriority=100)
