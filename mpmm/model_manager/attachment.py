"""How a manager is attached to its namespace: joining at the first use, sharing, leaving, starting over after a fork.

All managers of one process on one namespace share one `Session`. The first of them makes it; it leaves the namespace
when the last of them shuts down, or at the end of the process.
"""

from __future__ import annotations

import functools
import math
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

from mpmm.errors import ClosedError, InvalidArgumentError, LockTimeoutError, MpmmError, ProcessLimitError
from mpmm.interpreter.fork_hooks import ChildStep, call_once_at_exit, in_forked_child
from mpmm.interpreter.green_threads import expect_real_threads
from mpmm.interpreter.process_end import is_last_to_run, stand_still_in_daemon, watch_for_end
from mpmm.interpreter.process_limits import limit_behind
from mpmm.interpreter.thread_locks import InTime, new_rlock
from mpmm.interpreter.thread_starts import start_thread
from mpmm.memory.estimates_file import ESTIMATES_PATH_VARIABLE, NamespaceEstimates
from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MONITOR_METHODS, MonitorProtocol, MonitorSource
from mpmm.model_manager.acquisition import Acquisition
from mpmm.model_manager.bookings import ThreadBookings
from mpmm.model_manager.deferred import NOW_S
from mpmm.model_manager.operations import Operation
from mpmm.model_manager.refusals import expect_mapped, timed_out
from mpmm.model_manager.request import ANYWHERE, PlacementRequest
from mpmm.model_manager.session import Session
from mpmm.multi_process_shared.context import attach_namespace
from mpmm.multi_process_shared.registry import is_server_process
from mpmm.shared_state.layout import Capacities, Header, Member
from mpmm.shared_state.namespace import LIFECYCLE_TIMEOUT_S, Namespace
from mpmm.shared_state.removal import remove_deserted
from mpmm.shared_state.runtime_dir import RuntimeDirectory, root_below
from mpmm.shared_state.settings import CHECKPOINTS, Settings
from mpmm.sources import MemorySource, choose_source
from mpmm.sources.selected import SelectedDevices
from mpmm.text.arguments import checked_devices, checked_path, in_brief
from mpmm.text.printable import printable_logger

__all__ = ["Attachment", "JoinsWith", "closed_by_shutdown", "root_and_name"]

_LOG = printable_logger("mpmm")
# The name of threads that leave a namespace all of whose managers were dropped.
FORGOTTEN = "mpmm-forgotten"
_Key = tuple[Path, str]
Method = TypeVar("Method", bound=Callable[..., Any])
_sessions: dict[_Key, Session] = {}
# An RLock, because a finalizer or signal handler may need it while its own thread has it.
_guard = new_rlock()
# What a join has made so far: if an exception from a signal handler ends it, nothing else refers to that.
_joining: dict[_Key, list[Namespace | Session]] = {}
# Sessions that are being shut down. An exception may interrupt a shutdown; it is then completed later.
_leaving: dict[Session, _Key] = {}
_leaves_at_exit: set[_Key] = set()
# Before the hooks that end hosts and leave registries, which unloading still needs.
LEAVES_PRIORITY = 100
# The last threads that shut forgotten managers down; the end of the process has to wait for them.
_shutting_down: deque[threading.Thread] = deque(maxlen=64)


@dataclass(frozen=True)
class JoinsWith:
    """A manager's arguments about its namespace; most of them count only if this process creates the namespace."""

    monitor: GPUMonitor | MonitorProtocol | None
    memory_source: str | MemorySource
    devices: tuple[int | str, ...] | None
    estimates_path: str | None
    capacities: Capacities | None
    verbose_logging: bool

    @classmethod
    def checked(
        cls,
        monitor: object,
        memory_source: object,
        devices: object,
        estimates_path: object,
        capacities: object,
        *,
        verbose_logging: bool,
    ) -> JoinsWith:
        """Check what a manager was told. Raises InvalidArgumentError."""
        if monitor is not None and (
            isinstance(monitor, type) or not all(callable(getattr(monitor, name, None)) for name in MONITOR_METHODS)
        ):
            raise InvalidArgumentError(
                f"monitor={in_brief(monitor)}: expected an object with methods {', '.join(MONITOR_METHODS)}"
            )
        if not isinstance(memory_source, str | MemorySource):
            raise InvalidArgumentError(f"memory_source={in_brief(memory_source)}: expected a name or a MemorySource")
        if not isinstance(capacities, Capacities | None):
            raise InvalidArgumentError(f"capacities={in_brief(capacities)}: expected mpmm.Capacities, or None")
        return cls(
            cast("GPUMonitor | MonitorProtocol | None", monitor),
            memory_source,
            checked_devices(devices),
            None if estimates_path is None else str(checked_path("estimates_path", estimates_path, "a file")),
            capacities,
            verbose_logging,
        )


def root_and_name(namespace: str | None, runtime_root: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """Return the runtime root of a manager, and the name of its namespace; a private one if `namespace` is None.

    Raises InvalidArgumentError.
    """
    given = attach_namespace()
    root = None if runtime_root is None else checked_path("runtime_root", runtime_root, "a folder")
    if namespace is None and given is not None:
        name, given_root = given
        return given_root, name
    name = f"private-{os.getpid()}-{secrets.token_hex(4)}" if namespace is None else namespace
    # Made only because it checks the name.
    checked = RuntimeDirectory(name, root)
    return checked.root, checked.name


class Attachment:
    """One manager's tie to its namespace. Objects that still need the manager's session keep this alive.

    settings: what the manager was made with; only `wait_timeout_seconds` is its own. session: None before the first use
    and after the last; `connected` makes sure that there is one.
    """

    # For a finalizer that runs before the end of the constructor.
    session: Session | None = None
    closed = False

    def __init__(self, root: Path, name: str, settings: Settings, joins_with: JoinsWith) -> None:
        self.root = root
        self.name = name
        self._made_by_uid = os.getuid()
        self.settings = settings
        self.joins_with = joins_with
        self.bookings = ThreadBookings()
        # Every acquire reads this; most programs book nothing by hand.
        self.bookings_made = False

    def connected(self, timeout_s: float | None = None) -> Session:
        """Return this process's session, joining the namespace first if need be: at the first use, or after a fork.

        timeout_s: joining raises LockTimeoutError after this time if others have the locks, or another thread is still
            joining; None, for callers that name no limit, stands for `LIFECYCLE_TIMEOUT_S`.

        Raises ClosedError, and what `Namespace.join` raises.
        """
        session = self.session
        is_open = session is not None and not self.closed and session.namespace.is_usable
        # First `is_guest`: `is_left_behind` is a call, which every acquire and release would pay for.
        if session is not None and is_open and (not session.is_guest or not session.is_left_behind):
            return session
        try:
            session = self._joined(timeout_s)
        except ClosedError:
            stand_still_in_daemon()
            raise
        # Settings that were changed at run time are no longer those that the creator chose.
        if not session.namespace.tables.header.settings_changed:
            self._report_differences(session.namespace.settings)
        return session

    def _joined(self, timeout_s: float | None) -> Session:
        """See `connected`; for a manager that has no session, or none that it can use."""
        self._expect_open()
        timeout_s = LIFECYCLE_TIMEOUT_S if timeout_s is None else min(max(NOW_S, timeout_s), LIFECYCLE_TIMEOUT_S)
        deadline = time.monotonic() + timeout_s
        with InTime(_guard, timeout_s, functools.partial(self._too_late, timeout_s)):
            session = self._joined_locked(deadline)
        if self.closed:
            # By another thread, or a signal handler, that may have found no session to close.
            self.shutdown()
            self._expect_open()
        return session

    def _expect_open(self) -> None:
        if self.closed:
            raise ClosedError("the model manager was shut down")

    def _too_late(self, timeout_s: float) -> LockTimeoutError:
        return LockTimeoutError(
            f"another thread of pid {os.getpid()} has been joining or leaving a namespace for {timeout_s:g} s",
            path=str(self.root / self.name),
            timeout_seconds=timeout_s,
            holder_pid=os.getpid(),
        )

    def _joined_locked(self, deadline: float) -> Session:
        self._follow_user()
        key = (self.root, self.name)
        _end_interrupted_join(key, deadline)
        _end_interrupted_shutdowns(key, deadline)
        session = _sessions.get(key)
        if session is not None and session.namespace.is_usable and session.is_left_behind:
            session.close(_left_s(deadline))
        if session is None or not session.namespace.is_usable:
            made = _joining[key] = []
            try:
                session = self._join(made, deadline)
            except (OSError, RuntimeError) as error:
                if not (limit := limit_behind(error)):
                    raise
                self._clear_away(key)
                raise ProcessLimitError(
                    f"pid {os.getpid()} cannot join namespace {self.name!r}: {error}: {limit}; raise it, or close "
                    "what this process has left open",
                    limit=limit,
                ) from error
            _sessions[key] = session
            del _joining[key]
        self.session = session
        session.add_manager(self)
        return session

    def connected_in_time(self, tag: str) -> Session:
        """Call `connected` for a request; raise AcquireTimeoutError if that takes all the time that it may wait."""
        try:
            return self.connected(self.settings.wait_timeout_seconds)
        except LockTimeoutError as error:
            if error.timeout_seconds >= self.settings.lock_timeout_seconds:
                raise
            # The error itself would name only the time that was left for the last of several waits.
            raise timed_out(tag, self.settings.wait_timeout_seconds, "lock") from error

    def acquisition(
        self,
        session: Session,
        operation: Operation,
        tag: str,
        request: PlacementRequest = ANYWHERE,
        began: float | None = None,
        timeout_s: float | None = None,
        preload: int = 0,
    ) -> Acquisition:
        """Return a request of this manager. began: `time.monotonic()` when the wait began, now by default."""
        began = time.monotonic() if began is None else began
        timeout_s = self.settings.wait_timeout_seconds if timeout_s is None else timeout_s
        if (defaults := session.request_defaults.get(tag)) is not None:
            request = request.with_defaults(defaults)
        return Acquisition(session, operation, tag, request, began, timeout_s, self.log_info, preload)

    def log_info(self, message: str, *args: Any) -> None:
        """Log at level INFO if `verbose_logging` is on."""
        if self.joins_with.verbose_logging:
            _LOG.info(message, *args)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `ModelManager` that make another manager of this namespace."""
        values = {field.name: getattr(self.settings, field.name) for field in fields(Settings)}
        for name in ("memory_budget_mb", "max_model_copies", "idle_ttl_seconds", "max_waiting", "suspend_budget_mb"):
            values[name] = None if math.isinf(values[name]) else values[name]
        values["suspend"] = CHECKPOINTS[int(values.pop("suspend_checkpoints"))]
        for name in ("min_data_points", "min_model_copies"):
            values[name] = int(values[name])
        values.update({field.name: getattr(self.joins_with, field.name) for field in fields(JoinsWith)})
        return {**values, "namespace": self.name, "runtime_root": str(self.root)}

    def _follow_user(self) -> None:
        """Use the new user's default root if this process has changed its user, and the old root was a default.

        Web servers change it in the workers that they fork: gunicorn's `--user` with `--preload`, say.
        """
        uid = os.getuid()
        if uid != self._made_by_uid:
            if str(self.root) == root_below("/tmp", self._made_by_uid):
                self.root = Path(root_below("/tmp"))
            self._made_by_uid = uid

    # ---- joining -------------------------------------------------------------------------------------------

    def _join(self, made: list[Namespace | Session], deadline: float) -> Session:
        """Return a new session. made: receives what has to be closed if this is interrupted.

        deadline: when to give up if others have the locks. What was made is left by then, too.

        Raises ClosedError in finalizers that run as the interpreter ends, because nothing would leave the namespace
        again; ProcessLimitError; what `Namespace.join` raises.
        """
        if sys.is_finalizing() or is_last_to_run():
            raise ClosedError(f"the interpreter is ending, and this process has left namespace {self.name!r}")
        expect_real_threads(f"ModelManager(namespace={self.name!r})")
        watch_for_end()
        if (self.root, self.name) not in _leaves_at_exit:
            call_once_at_exit(functools.partial(_close_at_exit, self.root, self.name), LEAVES_PRIORITY)
            _leaves_at_exit.add((self.root, self.name))
        told = self.joins_with
        source = "custom" if told.monitor is not None or not isinstance(told.memory_source, str) else told.memory_source
        namespace = Namespace.join(
            self.name,
            root=self.root,
            capacities=told.capacities,
            settings=self.settings,
            source=source,
            kind=Member.GUEST if is_server_process() else Member.WORKER,
            made=made,
            timeout_s=_left_s(deadline),
        )
        try:
            path = told.estimates_path or os.environ.get(ESTIMATES_PATH_VARIABLE)
            kept = NamespaceEstimates(namespace, path) if path else None
            session = Session(namespace, _make_monitor(namespace, told), told.verbose_logging, kept)
        except BaseException:
            namespace.leave(timeout_s=_left_s(deadline))
            raise
        # Before the background thread starts, which would otherwise take the session for forgotten.
        session.add_manager(self)
        key = (self.root, self.name)
        session.leave_when_forgotten = functools.partial(_leave_in_thread, session, key, told.monitor)
        made.append(session)
        with namespace.lock.give_up_at(deadline):
            try:
                session.start()
            except BaseException:
                session.close(_left_s(deadline))
                raise
        return session

    def _clear_away(self, key: _Key) -> None:
        """Remove what a failed join has made, unless another process is in the namespace."""
        # If there is no file descriptor or thread for it, the next process that joins, or `mpmm prune`, does it.
        with suppress(OSError, MpmmError, RuntimeError):
            _end_interrupted_join(key)
            remove_deserted(self.root, self.name)

    def _report_differences(self, chosen: Settings) -> None:
        own: Mapping[str, Any] = {field.name: getattr(self.settings, field.name) for field in fields(Settings)}
        for name, value in own.items():
            theirs = getattr(chosen, name)
            if value != theirs and name != "wait_timeout_seconds":
                text = "mpmm %s: %s stays %g, chosen by the creator of the namespace; ignoring %g"
                _LOG.warning(text, self.name, name, theirs, value)

    # ---- leaving -------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """See `ModelManager.shutdown`."""
        self.closed = True
        session = self.session
        if session is None or session.namespace.is_inherited or session.is_closed:
            self.session = None
            return
        if session.is_busy_here():
            # The session cannot leave while this thread is in the middle of another call.
            _shut_down_in_thread(self.shutdown)
            return
        with _guard:
            session.take_off_manager(self)
            if session.managers:
                self.session = None
                return
            _begin_to_leave(session, (self.root, self.name))
        session.close()
        _forget_if_left(session)
        self.session = None
        _stop_monitor(self.joins_with.monitor)

    def __del__(self) -> None:
        # Beam promises this. In a thread, because the collector can run while this one holds a lock that is needed,
        # or is in the middle of a shutdown. At exit `_close_at_exit` has left by now, and threads no longer start.
        # An exception that a signal handler raises here is lost to the program, and with it this shutdown. The
        # background thread makes up for it.
        session = self.session
        if session is None or session.closing or not session.namespace.is_usable or sys.is_finalizing():
            return
        session.take_off_manager(self)
        # Without a reference to this object: `threading` keeps a thread whose start an exception has ended.
        leave = functools.partial(_leave_if_forgotten, session, (self.root, self.name), self.joins_with.monitor)
        _shut_down_in_thread(leave)


def closed_by_shutdown(method: Method) -> Method:
    """Make a method raise ClosedError if another thread shuts the manager down meanwhile.

    For methods of classes that have an `_attachment`. Methods also read the segment without the lock, and may find it
    unmapped; see `expect_mapped`. The wrapper costs 0.1 µs, so methods that are called often do without.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except ClosedError:
            stand_still_in_daemon()
            raise
        except ValueError as error:
            expect_mapped(self._attachment.session, error)
            raise

    return cast(Method, call)


def _is_ours(monitor: object) -> TypeGuard[GPUMonitor]:
    """Tell whether a monitor is an unchanged `GPUMonitor`, whose source offers more than Beam's methods.

    A subclass or an instance that replaces one of these methods is a monitor of the caller's own.
    """
    kind = type(monitor)
    return issubclass(kind, GPUMonitor) and all(
        getattr(kind, name) is getattr(GPUMonitor, name) and name not in vars(monitor) for name in MONITOR_METHODS
    )


def _make_monitor(namespace: Namespace, told: JoinsWith) -> GPUMonitor:
    """Return the monitor that reads memory figures for a namespace, or would if this process were its leader."""
    settings = namespace.settings
    source: MemorySource
    if _is_ours(told.monitor):
        return told.monitor
    if told.monitor is not None:
        source = MonitorSource(told.monitor)
        source.start()
    else:
        asked = namespace.tables.string(Header.SOURCE_ASKED)
        source = choose_source(
            told.memory_source if asked == "custom" else asked,
            fallback_memory_mb=settings.fallback_memory_mb,
            budget_mb=None if math.isinf(settings.memory_budget_mb) else settings.memory_budget_mb,
            logger=_LOG,
            # Once per namespace: its creator has the first slot, and the first leader sets the name.
            warn=namespace.slot == 0 and not namespace.tables.string(Header.SOURCE_NAME),
        )
        if told.devices is not None:
            source = SelectedDevices(source, told.devices)
    return GPUMonitor(settings.fallback_memory_mb, settings.poll_interval, settings.peak_window_seconds, source=source)


def _shut_down_in_thread(target: Callable[[], None], name: str = "mpmm-shutdown") -> None:
    thread = threading.Thread(target=target, name=name)
    with suppress(RuntimeError):
        start_thread(thread)
        _shutting_down.append(thread)


def _leave_in_thread(session: Session, key: _Key, monitor: object) -> None:
    """Have a thread leave the namespace, all of whose managers in this process were dropped; for the background thread.

    monitor: the argument of the manager that has joined.
    """
    if sys.is_finalizing() or any(thread.name == FORGOTTEN and thread.is_alive() for thread in list(_shutting_down)):
        # The background thread comes back to it.
        return
    _shut_down_in_thread(functools.partial(_leave_if_forgotten, session, key, monitor), FORGOTTEN)


def _leave_if_forgotten(session: Session, key: _Key, monitor: object) -> None:
    """Leave, unless this process holds instances: those are still in use, and are kept until the process ends.

    Another manager of the namespace can give them back; then this process leaves once that one is dropped or shut down.
    """
    with _guard:
        # Another thread may have made a manager meanwhile.
        if not session.is_forgotten or session.closing or not session.namespace.is_usable:
            return
        _begin_to_leave(session, key)
        # If an exception has ended the join, this is what it has made, and nothing else will need it.
        if session in _joining.get(key, ()):
            del _joining[key]
    session.close()
    _forget_if_left(session)
    _stop_monitor(monitor)


def _begin_to_leave(session: Session, key: _Key) -> None:
    """Have the next manager join anew. Needs `_guard`."""
    _leaving[session] = key
    if _sessions.get(key) is session:
        del _sessions[key]


def _stop_monitor(monitor: object) -> None:
    if _is_ours(monitor):
        monitor.stop()
    elif monitor is not None:
        MonitorSource(cast(MonitorProtocol, monitor)).stop()


def _left_s(deadline: float) -> float:
    return max(NOW_S, deadline - time.monotonic())


def _end_interrupted_join(key: _Key, deadline: float = math.inf) -> None:
    """Leave or close what an interrupted join of this process has made. Needs `_guard`.

    deadline: until when to wait for a process that has the lifecycle lock.
    """
    timeout_s = min(_left_s(deadline), LIFECYCLE_TIMEOUT_S)
    session = _sessions.get(key)
    for one in reversed(_joining.get(key, ())):
        if isinstance(one, Namespace):
            if session is None or one is not session.namespace:
                one.leave(timeout_s=timeout_s)
        elif one is not session:
            one.close(timeout_s)
    _joining.pop(key, None)


def _end_interrupted_shutdowns(key: _Key, deadline: float = math.inf) -> None:
    """Complete shutdowns that an exception has interrupted. Those that are still running are not disturbed.

    deadline: see `_end_interrupted_join`.
    """
    for session in [one for one, left in _leaving.copy().items() if left == key]:
        if session.namespace.is_usable:
            session.close(min(_left_s(deadline), LIFECYCLE_TIMEOUT_S))
        _forget_if_left(session)


def _forget_if_left(session: Session) -> None:
    if session.is_closed or not session.namespace.is_usable:
        _leaving.pop(session, None)


def _close_at_exit(root: Path, name: str) -> None:
    for thread in list(_shutting_down):
        thread.join()
    key = (root, name)
    with _guard:
        _end_interrupted_join(key)
        session = _sessions.pop(key, None)
        if session is not None:
            _leaving[session] = key
    try:
        _end_interrupted_shutdowns(key)
    # Not only Exception, because any other would also keep the hooks of other namespaces and of servers from running.
    except BaseException:
        _LOG.exception("mpmm %s: pid %d raised an exception as it left at exit, in an unload, say", name, os.getpid())


def _forget_sessions_after_fork() -> None:
    global _guard
    _guard = new_rlock()
    _sessions.clear()
    _leaving.clear()
    _joining.clear()
    _leaves_at_exit.clear()
    _shutting_down.clear()


in_forked_child(_forget_sessions_after_fork, ChildStep.MANAGER)
