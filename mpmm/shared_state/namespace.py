"""Attaching to a namespace, being a member of it, and leaving it.

Files in the runtime directory, and the order in which their locks are taken:

1. `lifecycle.lock`  exclusive while somebody creates, joins, leaves or removes the namespace;
2. `alive.lock`      shared by every worker as long as it lives: free for an exclusive lock means that no
                     worker is left. Model servers do not take it, they watch it; nor do managers in them;
3. `m<slot>.lock`    exclusive, held for life by the member in that slot of the members table;
4. `segment.lock`    around every transaction (`transaction.py`).

`leader.lock` is taken with none of them held. `token` holds the random word that ties the directory to its
segment. Locks 1 and 2 may be waited for; 3 is only tried.

The kernel drops all of them when a process dies. What it leaves in the tables is taken back by `reap`.
"""

from __future__ import annotations

import contextlib
import logging
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

import psutil

from mpmm.errors import (
    ClosedError,
    InvalidArgumentError,
    LayoutMismatchError,
    LockTimeoutError,
    MpmmError,
    SegmentAllocationError,
    SegmentCorruptError,
    SegmentLostError,
    TableFullError,
)
from mpmm.fork_hooks import ChildStep, in_forked_child
from mpmm.shared_state import segment as segment_module
from mpmm.shared_state.layout import Capacities, Header, Member, Model
from mpmm.shared_state.liveness import member_lives
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.runtime_dir import ROOM_NAME, RuntimeDirectory
from mpmm.shared_state.segment import Segment, SegmentProblem, segment_name, unlink_segment
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import ModelInfo, decode
from mpmm.shared_state.tables import Tables, encode_text, fit_text
from mpmm.shared_state.transaction import Transaction, TransactionLock, float_bits
from mpmm.shared_state.transitions import Transitions

__all__ = ["Namespace", "read_settings", "remove_all_deserted", "remove_deserted", "run_at_exit"]

_LOG = logging.getLogger("mpmm")
# Joining and leaving take milliseconds, unless the last member is unloading everything on its way out.
LIFECYCLE_TIMEOUT_S = 60.0
# Who cleans up after others does not wait for one who has been stopped in the middle of it.
REMOVAL_TIMEOUT_S = 5.0
_attached: weakref.WeakSet[Namespace] = weakref.WeakSet()


class Namespace:
    """This process's membership of one namespace: the segment, its lock and a row in the members table.

    Use `Namespace.join`. After a fork the child's copy is dead (`is_usable` is False) and the child joins anew.
    """

    def __init__(
        self, runtime: RuntimeDirectory, segment: Segment, settings: Settings, alive: LockFile | None, kind: int
    ) -> None:
        self.runtime = runtime
        self.segment = segment
        self.settings = settings
        self.kind = kind
        self.pid = os.getpid()
        self.slot = -1
        self.lock = TransactionLock(segment, runtime.file("segment.lock"), settings.lock_timeout_seconds)
        self.tables = Tables(segment)
        self.transitions = Transitions(self.tables, self)
        self._folder = str(runtime.path)
        self._alive = alive
        self._member_lock: LockFile | None = None
        self._usable = True
        self._joined_token = _token_text(runtime)

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
    ) -> Namespace:
        """Attach to the namespace, creating it if need be, and take a row in the members table.

        A segment that nobody living uses is replaced, its estimates kept. One whose workers all crashed, but not their
        model servers, is taken over: what the dead had is taken back.

        Raises RuntimeDirectoryError, LayoutMismatchError, SegmentAllocationError, LockTimeoutError,
        TableFullError (members), FileNotFoundError when `must_exist` and there is none, InvalidArgumentError for a
        name that cannot be.
        """
        runtime = RuntimeDirectory(name, root)
        if name == ROOM_NAME or name.startswith(f"{ROOM_NAME}.gone."):
            raise InvalidArgumentError(f"namespace {name!r}: the folder of the model servers has this name")
        while True:
            if must_exist and not runtime.path.is_dir():
                raise FileNotFoundError(f"there is no namespace {name!r} in {runtime.root}")
            runtime.ensure()
            with contextlib.suppress(FileNotFoundError), _lifecycle(runtime) as current:
                if current:
                    return cls._join_locked(
                        runtime, capacities, settings or Settings(), source, kind, label, must_exist
                    )
            # The last member removed the directory under our feet: begin again with a new one.

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
            namespace = cls(runtime, segment, chosen, alive if kind == Member.WORKER else None, kind)
        except BaseException:
            alive.close()
            raise
        try:
            namespace._enter(kind, label or Path(sys.argv[0] or "python").name)
            namespace._take_over(estimates)
        except MpmmError:
            namespace._let_go()
            raise
        except (IndexError, KeyError, ValueError, OverflowError, AssertionError) as error:
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
        return _token_text(self.runtime) != self._joined_token

    @property
    def life_fd(self) -> int:
        """The descriptor of the lock that says that this member lives; whoever has a duplicate open keeps it alive."""
        assert self._member_lock is not None
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
        return slot == self.slot or _member_lives(self.tables, slot, self.member_lock_path(slot))

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
                    done = self.transitions.reap_member(t, slot)
                    if done:
                        t.after.append(partial(_LOG.info, "mpmm %s: reclaimed what pid %d had", self.name, pid))
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
        if not self.is_usable:
            # Nothing is left to do, unless an exception from a signal handler has ended the first call.
            if not self.is_inherited:
                self._let_go()
            return
        with contextlib.ExitStack() as stack:
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
                left = False
                with contextlib.suppress(LockTimeoutError):
                    while not left:
                        with self.lock() as t:
                            left = self.transitions.leave(t, self.slot)
                if last:
                    unlink_segment(self.segment.name)
                    self.runtime.remove()
            finally:
                # Whatever is left undone others do, as for a process that has died.
                self._let_go()

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
        # First of all, so that a crowd of crashed processes does not lock newcomers out.
        self.reap_dead_members()
        with self.lock() as t:
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
            self.transitions.join(t, slot, kind, os.getpid(), started, fit_text(label, Member.NAME_BYTES))

    def _take_over(self, models: tuple[ModelInfo, ...]) -> None:
        """Give the models of a deserted namespace their estimates back, as far as there are rows for them."""
        with contextlib.suppress(TableFullError, InvalidArgumentError):
            for model in models:
                if model.estimate_mb is None:
                    continue
                encoded = encode_text(model.tag, Model.TAG_BYTES, "model tag")
                with self.transaction() as t:
                    row = self.transitions.claim_model(t, model.tag, encoded)
                    self.transitions.estimate(t, row, model.estimate_mb, model.measured, model.sd_mb)

    def _let_go(self) -> None:
        self._usable = False
        for file in (self._member_lock, self._alive):
            if file is not None:
                file.close()
        self.lock.close()
        self.tables.close()
        self.segment.close()

    def forget_after_fork(self) -> None:
        """In a forked child: close the parent's descriptors, claim nothing of what it has."""
        self._usable = False
        for file in (self._member_lock, self._alive):
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


def remove_deserted(root: Path, name: str) -> None:
    """Remove a namespace in which no worker is left; nothing happens if there is one, or a newcomer.

    For those who are left when all workers have crashed: model servers, and the process that they are forked from.
    Hold none of the namespace's locks.
    """
    runtime = RuntimeDirectory(name, root)
    with contextlib.suppress(FileNotFoundError, LockTimeoutError), _lifecycle(runtime, REMOVAL_TIMEOUT_S) as current:
        if not current:
            return
        with contextlib.closing(LockFile(runtime.file("alive.lock"))) as alive:
            if alive.try_exclusive():
                unlink_segment(segment_name(runtime.root, name))
                runtime.remove()


def remove_all_deserted(root: Path) -> None:
    """Remove every namespace below `root` in which no worker is left, see `remove_deserted`."""
    for token in list(root.glob("*/token")):
        remove_deserted(root, token.parent.name)


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
        segment = Segment.open(name, _token(runtime))
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
    if segment is not None and deserted and not _has_living_members(runtime, segment):
        # All of its users crashed, and none of their model servers is left: nothing of it holds any more but what
        # was learnt of the models. The parameters are the newcomer's.
        with contextlib.suppress(SegmentCorruptError):
            models = decode(bytearray(segment.copy()), segment.layout, runtime.name, name, with_events=False).models
            estimates = tuple(model for model in models if model.kind == "model")
        segment.close()
        unlink_segment(name)
        segment = None
    if segment is None and not deserted:
        # A new one beside it would be a second set of books.
        raise SegmentLostError(
            f"namespace {runtime.name!r} is in use, but its segment /dev/shm/{name} is gone: somebody has removed it "
            "under its processes (systemd-logind does when a user logs out, unless logind.conf says RemoveIPC=no, and "
            "so may systemd-tmpfiles or another cleaner); end these processes, the next one makes a new segment",
            name=name,
        )
    if segment is None and must_exist:
        raise FileNotFoundError(f"there is no namespace {runtime.name!r} in {runtime.root}")
    return segment, estimates


def _has_living_members(runtime: RuntimeDirectory, segment: Segment) -> bool:
    tables = Tables(segment)
    return any(_member_lives(tables, slot, str(runtime.file(f"m{slot}.lock"))) for slot in tables.used_members())


def _member_lives(tables: Tables, slot: int, lock_path: str) -> bool:
    words, at = tables.segment.words, tables.member(slot)
    return member_lives(lock_path, int(words[at + Member.PID]), int(words[at + Member.ATTACHED]))


def _create(runtime: RuntimeDirectory, capacities: Capacities, settings: Settings, source: str) -> Segment:
    segment = Segment.create(segment_name(runtime.root, runtime.name), capacities, _token(runtime))
    words = segment.words
    # Nobody takes the segment for one of ours before it is sealed, so these stores need no transaction.
    words[Header.CREATED_WALL] = time.time_ns()
    for offset, value in enumerate(astuple(settings)):
        words[Header.SETTINGS + offset] = float_bits(float(value))
    asked = fit_text(source, Header.SOURCE_NAME_BYTES)
    words[Header.SOURCE_ASKED] = len(asked)
    for offset in range(0, len(asked), 8):
        words[Header.SOURCE_ASKED + 1 + offset // 8] = int.from_bytes(asked[offset : offset + 8], "little")
    segment.seal()
    return segment


def _token_text(runtime: RuntimeDirectory) -> str | None:
    """Return what tells a namespace from a later one of the same name; None if it was removed."""
    try:
        return runtime.file("token").read_text(encoding="ascii")
    except FileNotFoundError:
        return None


def _token(runtime: RuntimeDirectory) -> int:
    """Return the word that ties directory and segment together, made at first use; lifecycle lock held."""
    path = runtime.file("token")
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(path.read_text(encoding="ascii"), 16)
    token = secrets.randbits(64)
    draft = runtime.file("token.new")
    draft.write_text(f"{token:016x}", encoding="ascii")
    os.replace(draft, path)
    return token


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
