"""ModelManager: loaded models for many processes that share the memory of one host's devices.

The four names are those of `apache_beam.ml.inference.model_manager`, with its signatures and defaults. Where
Beam has one manager in one process that the others call, every process here runs this code on the state in
shared memory:

    acquire_model                                   what the process does           under the lock
    ─────────────────────────────────────────────────────────────────────────────────────────────────────
    an idle copy and nobody waits                   returns it                      grab
    otherwise: queue                                                                enqueue, advance
        granted an idle or released copy            returns it                      take_answer
        told to load                                runs the loader, samples        take_answer … end_load
        told that it can never fit                  raises ModelTooLargeError       take_answer
    reserve: queue, as above                        returns the lease               claim_lease … take_answer
    release_model                                   measures if it ran alone        release: pass_on or advance

`advance` (see `scheduler.py`) is where the policy decides for everybody who waits; whoever changes something
runs it, so that a release hands the copy straight to the ticket that should have it.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import secrets
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from mpmm.errors import (
    AcquireTimeoutError,
    ClosedError,
    DeadlockError,
    InvalidArgumentError,
    LeaseTooLargeError,
    LoadTimeoutError,
    LockTimeoutError,
    ModelTooLargeError,
    MpmmError,
    NamespaceResetError,
    NotAcquiredError,
    QueueFullError,
    ReentrantCallError,
    TableFullError,
)
from mpmm.memory.beam_metrics import choose_autoscaling_metric, report_estimate, report_model_count
from mpmm.memory.estimator import ALONE_SD, GROWTH_SD, Estimate
from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MONITOR_METHODS, MonitorProtocol
from mpmm.model_manager.administration import change_settings, pin_for_all, unload_model, unpin_for_all, wait_for_unload
from mpmm.model_manager.attachment import Attachment, JoinsWith
from mpmm.model_manager.beam_attributes import BeamNames, CopiesByTag
from mpmm.model_manager.deferred import NOW_S
from mpmm.model_manager.fresh_figures import Growth
from mpmm.model_manager.held import server_pid_of
from mpmm.model_manager.lease import Lease
from mpmm.model_manager.operations import Copy, Operation
from mpmm.model_manager.out_of_memory import FreeMemory
from mpmm.model_manager.reconcile import leave_if_there
from mpmm.model_manager.refusals import expect_mapped, giving_up_in_time, largest_limit, taken_away, timed_out
from mpmm.model_manager.request import (
    ANYWHERE,
    AcquireOptions,
    NothingFree,
    PlacementRequest,
    check_names,
    encoded_tag,
    read_options,
)
from mpmm.model_manager.server_duty import server_context
from mpmm.model_manager.session import Worker
from mpmm.model_manager.unload import UNLOAD_LOOK_S, collect_garbage, unload_made
from mpmm.model_manager.waits import decision, held_by, says_more, wanted_by, where
from mpmm.multi_process_shared.context import attach_namespace, serving_for
from mpmm.multi_process_shared.main_import import refuse_while_importing_main
from mpmm.multi_process_shared.registry import is_server_process
from mpmm.placement import placed
from mpmm.policy.out_of_memory import is_out_of_memory
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.futex import wait_for_change
from mpmm.shared_state.layout import (
    Capacities,
    Header,
    Instance,
    Model,
    Ticket,
    device_rows,
)
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.settings import CHANGEABLE, CHECKPOINTS, Settings, checkpoints_by_name
from mpmm.shared_state.tables import encode_text
from mpmm.shared_state.transaction import Transaction
from mpmm.sources import MemorySource
from mpmm.text.arguments import checked_devices, checked_number, checked_path, checked_timeout, checked_whole, in_brief
from mpmm.text.printable import printable_logger

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ModelManager", "QueueTicket"]

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])

_LOG = printable_logger("mpmm")
# Behind those who wait for a model that is unknown (0) or known (1).
PRELOAD_PRIORITY = 2


def _closed_by_shutdown(method: Method) -> Method:
    """Have a method raise ClosedError when another thread shuts the manager down under it.

    It reads the segment without the lock, too, and finds it unmapped then. For what is called rarely: the detour costs
    0.1 µs, see `_expect_mapped`.
    """

    @functools.wraps(method)
    def call(self: ModelManager, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except ValueError as error:
            expect_mapped(self._attachment.worker, error)
            raise

    return cast(Method, call)


class QueueTicket:
    """One place in the queue, as in Beam: ordered by priority, then number.

    `wake_event` is part of Beam's interface. Nobody sets it here: waiters sleep on a word of the segment.
    `expected_wait_seconds`: when it is expected to have its copy, as far as loads and holds so far tell, None if that
    was not looked at.
    """

    def __init__(self, priority: int, ticket_num: int, tag: str, expected_wait_seconds: float | None = None) -> None:
        self.priority = priority
        self.ticket_num = ticket_num
        self.tag = tag
        self.expected_wait_seconds = expected_wait_seconds
        self.wake_event = threading.Event()

    def __lt__(self, other: QueueTicket) -> bool:
        return (self.priority, self.ticket_num) < (other.priority, other.ticket_num)

    def __repr__(self) -> str:
        return f"QueueTicket(priority={self.priority}, ticket_num={self.ticket_num}, tag={self.tag!r})"


class AnswerUndone(Exception):
    """Whoever answered a ticket was killed before the transaction's end, and its waiter had seen it already."""


class _Booking(NamedTuple):
    """A load that the policy has allowed and memory is reserved for."""

    row: int
    generation: int
    alone: bool
    # It is no load: the copy is suspended, and is to be resumed.
    resumes: bool = False


@dataclass
class _Attempt:
    """One run of a loader. places: bits of the devices where it may load. last: no other turn follows.

    free: what its devices had for it when it began. again: it ran out of memory, and may find more in another turn.
    """

    places: int
    last: bool
    free: FreeMemory | None = None
    again: bool = False


# What ends a load without being a failure of its loader.
_NOT_THE_LOADERS = (ClosedError, LockTimeoutError, NamespaceResetError)


class _Block(AbstractContextManager[Any]):
    """What `ModelManager.model` returns: a copy is held from `__enter__` to `__exit__`.

    No generator, because of that the interpreter runs `__enter__` in several steps, between which a copy that was
    acquired would be nobody's.
    """

    def __init__(
        self,
        manager: ModelManager,
        tag: str,
        loader_func: Callable[[], Any],
        options: AcquireOptions,
    ) -> None:
        self._manager = manager
        self._tag = tag
        self._loader_func = loader_func
        self._options = options
        self._worker: Worker | None = None
        self._operation: Operation | None = None

    def __enter__(self) -> Any:
        manager, tag = self._manager, self._tag
        if self._operation is not None:
            raise InvalidArgumentError(f"the block of {tag!r} has begun already: call `model` once for each block")
        began = time.monotonic()
        worker = self._worker = manager._connected_in_time(self._tag)
        manager._check_request(tag, self._loader_func)
        operation = worker.begin(sys._getframe())
        try:
            value = manager._acquire(worker, operation, tag, self._loader_func, self._options, began)
            worker.thread.blocks.append(operation)
        except BaseException:
            worker.abandon(operation)
            raise
        self._operation = operation
        operation.owner = weakref.ref(self)
        # From here on this object answers for the copy.
        operation.frame = None
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        operation, worker = self._operation, self._worker
        if operation is None or worker is None:
            return
        operation.thread = threading.get_ident()
        operation.frame = sys._getframe()
        self._operation = None
        try:
            self._leave(worker, operation, error)
        except BaseException:
            worker.abandon(operation)
            raise
        worker.end(operation)

    def _leave(self, worker: Worker, operation: Operation, error: BaseException | None) -> None:
        manager, tag, held = self._manager, self._tag, operation.held
        # A block may be ended by another thread.
        with suppress(ValueError):
            worker.thread.blocks.remove(operation)
        # A child that was forked inside the block comes by here, too, but the copy is held by its parent.
        if held is None or worker.namespace.is_inherited:
            return
        if not worker.namespace.is_usable:
            # Given back by leaving. What is on its way out, SystemExit say, is not to be hidden.
            if error is None:
                manager._connected()
            return
        if error is not None and is_out_of_memory(error):
            with suppress(MpmmError):
                worker.out_of_memory.make_room_after_use(tag)
        # If that fails, it was given back inside the block; perhaps to be acquired once more.
        here = worker.held
        if not here.take_off_hold(held, operation) and here.take_off(held[0].value, tag, operation) is None:
            raise manager._not_acquired(tag, held[0].value)
        manager._give_back_held(worker, operation, tag)


class ModelManager(BeamNames):
    """Manages the life of models: reuse, admission, eviction, profiling of unknown ones. Thread-safe.

    `with manager.model(tag, loader) as model:` is the form to write; `acquire_model` and `release_model` are
    Beam's. A loader that returns a `str` has made a *handle* (the tag of a `MultiProcessShared`, say), which any
    process can use and unload; any other object belongs to the process that loaded it: only that process reuses
    it, but everybody accounts for its memory and may have it evicted.

    A manager may be pickled and may cross a fork: the copy is a manager on the same state.
    """

    #: `MultiProcessShared` makes such objects in every process instead of proxying them.
    attach_in_place = True

    def __init__(
        self,
        monitor: GPUMonitor | MonitorProtocol | None = None,
        slack_percentage: float = 0.10,
        poll_interval: float = 0.5,
        peak_window_seconds: float = 30.0,
        min_data_points: int = 5,
        smoothing_factor: float = 0.2,
        eviction_cooldown_seconds: float = 10.0,
        min_model_copies: int = 1,
        wait_timeout_seconds: float = 300.0,
        lock_timeout_seconds: float = 60.0,
        verbose_logging: bool = False,
        *,
        namespace: str | None = None,
        memory_source: str | MemorySource = "auto",
        memory_budget_mb: float | None = None,
        fallback_memory_mb: float = 16000.0,
        default_estimate_mb: float = 4000.0,
        max_overtake_seconds: float = 2.0,
        memory_return_seconds: float = 5.0,
        load_timeout_seconds: float = math.inf,
        max_model_copies: int | None = None,
        idle_ttl_seconds: float | None = None,
        max_waiting: int | None = None,
        suspend: str = "auto",
        suspend_budget_mb: float | None = None,
        devices: Sequence[int | str] | None = None,
        estimates_path: str | os.PathLike[str] | None = None,
        autoscaling_metric: str | None = None,
        capacities: Capacities | None = None,
        runtime_root: str | os.PathLike[str] | None = None,
    ) -> None:
        """Attach to a namespace, creating it if need be.

        A model server imports the program, and so makes its managers, too. There, attaching waits for the first use,
        and the manager neither leads nor keeps servers alive.

        monitor: takes the place of the memory source: a `GPUMonitor`, or any object with the methods of Beam's monitor.
        slack_percentage (share, 0 to 0.99): the share of a device that is never filled.
        poll_interval (s, 0.01 to 3600): the time between two samples of the leader.
        peak_window_seconds (s, 0.01 to 86400): how long a peak of memory counts.
        min_data_points (count, 1 to 1000000): readings that the estimator needs before its first solution.
        smoothing_factor (share, 0 to 1): the weight of a new estimate against the old one.
        eviction_cooldown_seconds (s, at least 0): a copy that was used more recently counts as warm, and is evicted
            after cold ones.
        min_model_copies (count, 0 to 1000000): copies of a model beyond this number are surplus, and are evicted first.
        wait_timeout_seconds (s, at least 0): `acquire_model` gives up after this time; 0 takes only what is free at
            once.
        lock_timeout_seconds (s, 0.001 to 86400): a transaction gives up waiting for the lock after this time; it takes
            microseconds.
        verbose_logging: logs the steps of the estimator.
        namespace: the name that processes share: all processes of one user on one host that pass the same name share
            one namespace; None makes a private one, which forked children and pickled copies share; an empty name is an
            error.
        memory_source: where memory figures come from: `auto`, `nvml`, `nvidia-smi`, `amdsmi`, `host`, `booked`, or a
            `MemorySource`; see `mpmm help memory`.
        memory_budget_mb (MB, at least 1): the total memory for the `host` source, of model servers alone; None takes
            that of the whole host, or of its control group.
        fallback_memory_mb (MB, 1 to 1000000000): the total memory where nothing can be measured (`booked`).
        default_estimate_mb (MB, 1 to 1000000000): what an unknown model is assumed to need.
        max_overtake_seconds (s, at least 0): how long requests for idle copies may overtake the first waiter that needs
            memory.
        memory_return_seconds (s, at least 0): how long unloaded memory may take to come back before it is written off.
        load_timeout_seconds (s, at least 0.001): a load that takes longer is abandoned: its reservation is dropped and
            the model server that it started is killed, but a loader that hangs in this process is not interrupted.
        max_model_copies (count, at least 1): how many copies of one model may be loaded at a time; None allows any
            number.
        idle_ttl_seconds (s, at least 0): a copy that is idle for this long, and not pinned, is unloaded; None keeps it
            until others need its memory; `keep_alive_seconds` of a call sets it for one model (-1 for ever, 0 at once).
        max_waiting (count, at least 0): how many requests may wait for one model; further ones get QueueFullError at
            once; None allows any number.
        suspend: which evicted copies may be kept in host memory instead of being unloaded, see `mpmm.suspend`:
            `cooperative`, those of objects with `sleep()` and `wake_up()`; `checkpoint`, also those of any model
            server, by the CUDA driver; `auto`, the latter on drivers that are known to be good.
        suspend_budget_mb (MB, at least 0): host memory for suspended copies, which come back sooner than by a load, see
            `mpmm.suspend`; None takes half of the host memory that is free when the namespace is created, 0 suspends
            nothing.
        devices: indices or uuids of the devices to manage, of those that `CUDA_VISIBLE_DEVICES` shows; None takes all.
        estimates_path: a file that keeps the estimates from run to run; None takes `$MPMM_ESTIMATES_PATH`, and without
            that keeps none; the first manager of a process decides for the process.
        autoscaling_metric: what Beam's metric `num_loaded_models_<tag>` counts in this process: `loaded` copies, or
            `demand`, those in use, being loaded and waited for; None keeps what an earlier manager chose, `loaded` at
            first.
        capacities: how many rows the shared tables have, an `mpmm.Capacities`.
        runtime_root: the folder of the runtime directories; None takes `$MPMM_RUNTIME_DIR`, and without that
            `/tmp/mpmm-<uid>`.

        Settings that hold for all processes of the namespace are those of the process that creates it: if a later
        process passes others, they have no effect, and the log says so.

        Raises InvalidArgumentError, and what `Namespace.join` raises.
        """
        settings = Settings(
            slack_percentage=slack_percentage,
            poll_interval=poll_interval,
            peak_window_seconds=peak_window_seconds,
            min_data_points=min_data_points,
            smoothing_factor=smoothing_factor,
            eviction_cooldown_seconds=eviction_cooldown_seconds,
            min_model_copies=min_model_copies,
            wait_timeout_seconds=wait_timeout_seconds,
            lock_timeout_seconds=lock_timeout_seconds,
            fallback_memory_mb=fallback_memory_mb,
            memory_budget_mb=math.inf if memory_budget_mb is None else memory_budget_mb,
            default_estimate_mb=default_estimate_mb,
            max_overtake_seconds=max_overtake_seconds,
            memory_return_seconds=memory_return_seconds,
            load_timeout_seconds=load_timeout_seconds,
            max_model_copies=math.inf if max_model_copies is None else max_model_copies,
            idle_ttl_seconds=math.inf if idle_ttl_seconds is None else idle_ttl_seconds,
            max_waiting=math.inf if max_waiting is None else max_waiting,
            suspend_budget_mb=math.inf if suspend_budget_mb is None else suspend_budget_mb,
            suspend_checkpoints=checkpoints_by_name(suspend),
        )
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
        joins_with = JoinsWith(
            monitor,
            memory_source,
            checked_devices(devices),
            None if estimates_path is None else str(checked_path("estimates_path", estimates_path, "a file")),
            capacities,
            verbose_logging,
        )
        self._autoscaling_metric = autoscaling_metric
        if autoscaling_metric is not None:
            choose_autoscaling_metric(autoscaling_metric)
        root = None if runtime_root is None else checked_path("runtime_root", runtime_root, "a folder")
        given = attach_namespace.get()
        if namespace is None and given is not None:
            name, root = given
        else:
            name = f"private-{os.getpid()}-{secrets.token_hex(4)}" if namespace is None else namespace
            # It checks the name, which is all that is wanted of it here.
            checked = RuntimeDirectory(name, root)
            name, root = checked.name, checked.root
        self._attachment = Attachment(root, name, settings, joins_with)
        # Bound here, so that a call takes no longer than one of a method of this class.
        self._connected = self._attachment.connected
        self._connected_in_time = self._attachment.connected_in_time
        self._bookings = threading.local()
        self._bookings_made = False
        # A model server imports the program, and so makes its managers, too. Mostly nobody uses them there.
        if not is_server_process():
            self._connected()

    # ---- Beam's methods ------------------------------------------------------------------------------------

    def logging_info(self, message: str, *args: Any) -> None:
        """Log at level INFO if `verbose_logging` is on."""
        self._attachment.log_info(message, *args)

    @_closed_by_shutdown
    def all_models(self, tag: str | None = None) -> Any:
        """Return the loaded copies of a tag as a list: handles, this process's objects, None for others' objects.

        Without a tag, a dict of such lists by tag, which answers `[]` for a tag without copies: Beam looks up a model
        that may have been evicted.
        """
        if tag is not None:
            encoded_tag(tag)
        worker = self._connected()
        tables, layout = worker.namespace.tables, worker.namespace.segment.layout
        words = worker.namespace.segment.words
        found = CopiesByTag()
        with worker.namespace.transaction():
            for row in tables.used_rows(layout.instances):
                at = tables.instance(row)
                if words[at + Instance.STATE] in (Instance.ACTIVE, Instance.IDLE):
                    found.setdefault(tables.tag_of(words[at + Instance.MODEL]), []).append(worker.held.value_of(row))
        return found if tag is None else found.get(tag, [])

    def acquire_model(self, tag: str, loader_func: Callable[[], Any], **options: Unpack[AcquireOptions]) -> Any:
        """Return a copy of the model, to be given back with `release_model`.

        tag: names the model; the same tag means the same model in every process.
        loader_func: makes a copy; called in this process and thread, with no lock held, if there is none to reuse.
            If it runs out of memory, room is made and it is called once more, see `mpmm.policy.out_of_memory`; the
            local variables in the traceback of its first exception are gone then. `mpmm.current_placement()` tells it
            on which devices; a model server that it starts sees only those.

        Options:

        devices: indices or uuids of the devices on which the copy has to be, all that this process sees by default.
        span: how many devices a copy takes an equal share of, if one has to be loaded.
        expect_mb: what a copy takes, as far as the caller knows; all its devices together. It counts until the model is
            measured, instead of `default_estimate_mb`, and spares the model being loaded alone for that. Where nothing
            can be measured it is what counts; the last one who says something is right. Of an object that is loaded its
            own attribute of this name says the same.
        max_waiting: how many requests may wait for the model, this one among them; None for any number, 0 for one that
            is not to wait. The setting of this name holds besides, for all but preloads.
        keep_alive_seconds: for how long idle copies of the model are kept from now on, in all processes: -1 for ever, 0
            to unload them as soon as nobody uses or waits for one; None leaves it at what the last request said, or at
            `idle_ttl_seconds`. Who needs the room has them evicted nevertheless; `pin` keeps them from that, too.
        priority: how urgent the request is, from -10 to 10, 0 by default. In the queue each step counts for as much as
            10 s of waiting, so nothing starves; see `mpmm.policy.fairness`.
        steady: while it loads nothing else is loaded or unloaded on its devices, for engines that size themselves by
            what is free. Copies there are used meanwhile, and what has begun there is waited for; what is to be
            unloaded has to wait.

        Raises AcquireTimeoutError, QueueFullError, LoadTimeoutError, ModelTooLargeError, NamespaceResetError,
        TableFullError, DeadlockError (see `model`), InvalidArgumentError, ClosedError, LockTimeoutError, and what the
        loader raises.
        """
        self._check_request(tag, loader_func)
        began = time.monotonic()
        worker = self._connected_in_time(tag)
        operation = worker.begin(sys._getframe())
        try:
            value = self._acquire(worker, operation, tag, loader_func, options, began)
            # Not behind this statement: an exception after it would find nobody who knows of the copy.
            worker.end(operation)
            return value
        except BaseException:
            worker.abandon(operation)
            raise

    @staticmethod
    def _check_request(tag: str, loader_func: Callable[[], Any]) -> None:
        if not isinstance(tag, str) or not callable(loader_func):
            raise InvalidArgumentError(f"model {tag!r}, loader {loader_func!r}: expected a str and a callable")
        if is_server_process():
            refuse_while_importing_main("acquire the model", tag)

    def _acquire(
        self,
        worker: Worker,
        operation: Operation,
        tag: str,
        loader_func: Callable[[], Any],
        options: AcquireOptions,
        began: float,
    ) -> Any:
        """Return a copy, which `operation` has noted as held. began: `time.monotonic()` at the caller's call."""
        if self._bookings_made:
            booking = self._take_booking(operation, tag)
            if booking is not None:
                return self._load_somehow(worker, operation, tag, booking, loader_func)
        request = read_options(options, worker.samples) if options else ANYWHERE
        try:
            quick = None if request.usable_on or request.keep_alive else worker.held.take_quickly(tag, operation)
            if quick is not None:
                if worker.held.handle_is_alive(quick):
                    return quick.value
                self._discard(worker, operation, quick)
            with giving_up_in_time(worker, tag):
                answer = self._get(worker, operation, tag, request, began)
        except ValueError as error:
            expect_mapped(self._attachment.worker, error)
            raise
        if isinstance(answer, _Booking):
            return self._load_somehow(worker, operation, tag, answer, loader_func, request=request)
        return answer.value

    def release_model(self, tag: str, instance: Any) -> None:
        """Give back what `acquire_model` returned.

        A wrong tag with the right instance is put up with, and logged. Raises NotAcquiredError when this process
        does not hold the instance, NamespaceResetError when a reset took it away meanwhile.
        """
        self._release(tag, instance)

    def _release(self, tag: str, instance: Any, patience_s: float | None = None) -> None:
        """Do what `release_model` does, but give up the lock after `patience_s`: LockTimeoutError, nothing changed."""
        worker = self._connected()
        operation = worker.begin(sys._getframe())
        try:
            if worker.held.take_off(instance, tag, operation) is None:
                raise self._not_acquired(tag, instance)
            self._give_back_held(worker, operation, tag, patience_s)
        except BaseException:
            worker.abandon(operation)
            raise
        worker.end(operation)

    @staticmethod
    def _not_acquired(tag: str, instance: Any) -> NotAcquiredError:
        what = repr(instance) if isinstance(instance, str) else f"this {type(instance).__name__}"
        return NotAcquiredError(
            f"release of {tag!r}: this process does not hold {what}; it was never acquired here, or is released "
            "already",
            tag=tag,
        )

    def _give_back_held(self, worker: Worker, operation: Operation, tag: str, patience_s: float | None = None) -> None:
        """Give back what an operation has struck off the list; leave it to the keeper in a finalizer or signal handler.

        With LockTimeoutError it is held as before.
        """
        held = operation.held
        if held is None:
            return
        if held[0].tag == tag and tag not in worker.unload_on_release and worker.held.give_back_quickly(held[0]):
            operation.held = None
            return
        if worker.scheduler.must_queue() and not worker.held.has_tenure(held[0].tag, held[0].row):
            worker.scheduler.alert(held[0].row)
        try:
            self._give_back(worker, tag, held[0], patience_s=patience_s)
        except ReentrantCallError:
            worker.abandon(operation)
        except LockTimeoutError:
            # Nothing has changed, and the caller may try again.
            worker.held.put_back(held)
            operation.held = None
            raise
        except MpmmError:
            operation.held = None
            raise
        except ValueError as error:
            operation.held = None
            expect_mapped(self._attachment.worker, error)
            raise
        else:
            operation.held = None

    def try_enter_isolation_mode(self, tag: str, ticket_num: int) -> bool:
        """Try to get the devices for an unknown model alone, waiting up to `lock_timeout_seconds`.

        True: everything idle was unloaded, nobody else gets anything, and the next `acquire_model(tag, …)` of this
        thread loads. `ticket_num` is for the log. `acquire_model` does all this by itself.
        """
        return self._book(tag, ticket_num, alone=True)

    def should_spawn_model(self, tag: str, ticket_num: int) -> bool:
        """Try to reserve memory for another copy, waiting up to `lock_timeout_seconds` and evicting if need be.

        True: the next `acquire_model(tag, …)` of this thread loads. False also when an idle copy needs no other one
        beside it. `ticket_num` is for the log. `acquire_model` does all this by itself.
        """
        return self._book(tag, ticket_num, alone=False)

    def shutdown(self) -> None:
        """Let go of what this process has; the last process to do so unloads everything. Twice is fine.

        In a signal handler or finalizer that comes in the middle of a call of the same thread, a thread does that once
        the call has ended; the end of the process waits for it.
        """
        self._attachment.shutdown()

    @_closed_by_shutdown
    def force_reset(self) -> None:
        """Unload everything of every process of the namespace, and send all waiters away. Estimates stay.

        Whoever holds a copy gets NamespaceResetError when it releases it; waiters get it at once.
        """
        worker = self._connected()
        worker.namespace.reset()
        _LOG.warning("mpmm %s: pid %d reset the namespace", worker.namespace.name, worker.namespace.pid)
        worker.unloads.unload_assigned()

    # ---- further methods -----------------------------------------------------------------------------------

    def model(
        self, tag: str, loader_func: Callable[[], Any], **options: Unpack[AcquireOptions]
    ) -> AbstractContextManager[Any]:
        """Acquire a copy for the length of a `with` block; see `acquire_model`, for the options too.

        An exception that leaves the block passes unchanged. If it says that memory has run out, the next load of the
        model waits for more room than this copy had, and what is idle on the copy's device is unloaded, so that another
        attempt finds more.

        Blocks may be nested, and loaders may use other models. A copy that runs alone to be measured does so until its
        thread asks for another one, which is then not measured alone. Raises DeadlockError where a thread would wait
        for nothing but what it holds in blocks or loads itself: another copy of its model while `max_model_copies` are
        its own, its own tag in a loader, or room that its own copies take. Tasks (`model_async`) are not looked at.
        """
        check_names(options)
        return _Block(self, tag, loader_func, options)

    def model_async(
        self, tag: str, loader_func: Callable[[], Any], **options: Unpack[AcquireOptions]
    ) -> AbstractAsyncContextManager[Any]:
        """Acquire a copy for the length of an `async with` block, without a thread for each task that waits.

        Else like `model`: the same queue, the same errors. The loader is no coroutine, and runs in a thread. A task
        that is cancelled while it waits leaves the queue; one that is cancelled while it loads leaves the load to end,
        and the copy idle. See `mpmm.model_manager.async_acquire`.
        """
        if not isinstance(tag, str) or not callable(loader_func) or inspect.iscoroutinefunction(loader_func):
            raise InvalidArgumentError(
                f"model {tag!r}, loader {loader_func!r}: expected a str and a callable that is no coroutine function"
            )
        check_names(options)
        # Imported here, because asyncio takes longer to import than all of this package.
        from mpmm.model_manager.async_acquire import hold_in_loop

        return hold_in_loop(self, tag, loader_func, options)

    def uses(
        self,
        tag: str,
        loader_func: Callable[[], Any],
        *,
        argument: str = "model",
        **options: Unpack[AcquireOptions],
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator: the function is called with a copy of a model that is held for the length of the call.

            @manager.uses("detector", load)
            def detect(image, *, model): ...

            detect(image)

        A coroutine function waits for the copy as `model_async` does. argument: name of the parameter by which the
        copy is given; it is missing from the decorated function's signature, so that web frameworks do not ask for it.
        Options are those of `acquire_model`.

        Raises InvalidArgumentError, at once, when the function has no such parameter.
        """

        encoded_tag(tag)
        if not callable(loader_func):
            raise InvalidArgumentError(f"model {tag!r}, loader {in_brief(loader_func)}: expected a callable")
        check_names(options)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            try:
                signature = inspect.signature(function)
            except (TypeError, ValueError) as error:
                raise InvalidArgumentError(f"{in_brief(function)} cannot get {tag!r}: {error}") from error
            if not isinstance(argument, str) or argument not in signature.parameters:
                raise InvalidArgumentError(f"{function!r} has no parameter {argument!r}, through which to get {tag!r}")

            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                with self.model(tag, loader_func, **options) as copy:
                    return function(*args, **kwargs, **{argument: copy})

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                async with self.model_async(tag, loader_func, **options) as copy:
                    return await function(*args, **kwargs, **{argument: copy})

            made: Any = call_async if inspect.iscoroutinefunction(function) else call
            others = [parameter for name, parameter in signature.parameters.items() if name != argument]
            made.__signature__ = signature.replace(parameters=others)
            return cast("Callable[..., Any]", made)

        return decorate

    @_closed_by_shutdown
    def reserve(
        self,
        mb: float,
        *,
        name: str = "lease",
        timeout_seconds: float | None = None,
        devices: Sequence[int | str] | None = None,
        span: int = 1,
        priority: int = 0,
        steady: bool = False,
    ) -> Lease:
        """Wait for a lease on `mb` MB, for memory that is no model's, and return it.

        It is admitted like a load: it waits its turn, idle copies are evicted for it, and what it is for counts as
        used until it is given back, by `release` or the end of a `with` block, or until this process ends. Keep the
        lease: one that nothing refers to any more ends, with a warning.

        mb: all that is going to be used. name: for people; several leases may have the same one.
        timeout_seconds: None stands for `wait_timeout_seconds`; `math.inf` waits for as long as it takes, and 0 takes
            what is free now.
        devices, span, priority: as for `acquire_model`; of several devices each gives an equal share.
        steady: until its `settled` is called, nothing else is loaded or unloaded on its devices, see `acquire_model`.

        Raises LeaseTooLargeError when no device is large enough, AcquireTimeoutError, NamespaceResetError,
        TableFullError, InvalidArgumentError, ClosedError, LockTimeoutError.
        """
        encoded = encode_text(name, Model.TAG_BYTES, "name of a lease")
        mb = checked_number(f"lease {name!r}: mb", mb, 0.0, math.inf, "a number of MB", above=True, finite=True)
        patience = self._patience(timeout_seconds)
        refuse_while_importing_main("reserve memory for", name)
        worker = self._connected()
        request = read_options(
            {"devices": devices, "span": span, "priority": priority, "steady": steady}, worker.samples
        )
        operation = worker.begin(sys._getframe())
        try:
            lease = self._reserve(worker, operation, name, encoded, float(mb), patience, request)
            lease.answer_for(operation)
            return lease
        except BaseException:
            worker.abandon(operation)
            raise

    def _reserve(
        self,
        worker: Worker,
        operation: Operation,
        name: str,
        encoded: bytes,
        mb: float,
        patience: float,
        request: PlacementRequest,
    ) -> Lease:
        began = time.monotonic()
        deadline = began + patience
        worker.figures.ensure_fresh_to_queue(patience)
        with worker.waiting():
            with giving_up_in_time(worker, name):
                enter = functools.partial(self._enqueue_lease, worker, operation, encoded, mb, deadline, request)
                row = self._making_room(worker, name, deadline, enter)
            while self._await_answer(worker, operation, row, deadline) is not None:
                with giving_up_in_time(worker, name), suppress(AnswerUndone):
                    return self._take_lease(worker, operation, name, mb, row, deadline, request)
            reason, _ = self._leave_queue(worker, operation, row, timed_out=True)
            waited = time.monotonic() - began
            raise AcquireTimeoutError(
                f"lease {name!r} of {mb:g} MB: not available within {waited:.1f} s (last reason: {reason}); "
                "timeout_seconds sets the limit",
                tag=name,
                waited_seconds=waited,
                retry_after_seconds=None,
            )

    @_closed_by_shutdown
    def preload(
        self,
        tag: str,
        loader_func: Callable[[], Any],
        *,
        copies: int = 1,
        timeout_seconds: float | None = None,
        if_free: bool = False,
        **options: Unpack[AcquireOptions],
    ) -> int:
        """See to it that so many copies that this process can use are loaded; return how many it has loaded for that.

        They are loaded one after another in the calling thread, behind everybody who waits for a model to use, with
        what is idle evicted if need be, and are not held: they are idle afterwards, and may go like any other; `pin`
        keeps them. Copies that others load meanwhile count, and `max_model_copies` ends it early.

        timeout_seconds: for each load; None stands for `wait_timeout_seconds`. Options are those of `acquire_model`.
        if_free: load only what fits beside everything that is loaded now: nothing is evicted for it, and it does not
            wait. What does not fit is not loaded, which is no error.

        Raises what `acquire_model` does; ModelTooLargeError also when so many copies never fit at once.
        """
        if not isinstance(tag, str) or not callable(loader_func):
            raise InvalidArgumentError(f"model {tag!r}, loader {loader_func!r}: expected a str and a callable")
        encoded_tag(tag)
        copies = checked_whole(f"preload of {tag!r}: copies", copies, 1, Capacities().instances, "a count")
        patience = self._patience(timeout_seconds)
        refuse_while_importing_main("preload the model", tag)
        worker = self._connected()
        request = read_options(options, worker.samples)
        if if_free:
            request = request._replace(if_free=True)
        operation = worker.begin(sys._getframe())
        try:
            loaded = self._preload(worker, operation, tag, loader_func, copies, patience, request)
        except BaseException:
            worker.abandon(operation)
            raise
        worker.end(operation)
        return loaded

    def _preload(
        self,
        worker: Worker,
        operation: Operation,
        tag: str,
        loader_func: Callable[[], Any],
        copies: int,
        patience: float,
        request: PlacementRequest,
    ) -> int:
        if request.keep_alive:
            self._keep_alive(worker, tag, request.keep_alive)
        for loaded in range(copies):
            answer: Copy | _Booking | None = None
            with suppress(NothingFree), giving_up_in_time(worker, tag):
                answer = self._queue(worker, operation, tag, time.monotonic() + patience, request, preload=copies)
            if not isinstance(answer, _Booking):
                return loaded
            self._load_somehow(worker, operation, tag, answer, loader_func, request, preload=copies)
            if operation.held is not None and worker.held.take_off_hold(operation.held, operation):
                self._give_back(worker, tag, operation.held[0], used=False)
            operation.held = None
        return copies

    @_closed_by_shutdown
    def pin(self, tag: str, *, for_all: bool = False) -> None:
        """Keep the idle copies of a model, those there are and those to come, from eviction and `idle_ttl_seconds`.

        The pin is this process's, whichever of its threads or managers asks, and lasts until `unpin`, or until the
        process leaves or dies: nobody else could tell whether a dead process would still want it. Pinning twice is
        the same as once. Only `unload` and `force_reset` unload what is pinned.

        for_all: the pin is the namespace's instead, and lasts until any process, or `mpmm unpin`, ends it.

        Raises TableFullError, InvalidArgumentError, ClosedError, LockTimeoutError.
        """
        encoded = encoded_tag(tag)
        worker = self._connected()
        namespace = worker.namespace

        def pin() -> None:
            with namespace.transaction() as t:
                # Before any model goes for a pin that there is no room for.
                namespace.tables.free_row(namespace.segment.layout.pins)
                model = namespace.transitions.models.claim(t, tag, encoded)
                namespace.transitions.pins.pin(t, model, namespace.slot)

        def is_pinned() -> bool:
            with namespace.transaction():
                found = namespace.tables.model_row(tag)
                return found is not None and namespace.tables.pin_row(found, namespace.reference) is not None

        def pin_all() -> None:
            pin_for_all(namespace, tag)

        operation = worker.begin(sys._getframe())
        try:
            if for_all or not is_pinned():
                deadline = time.monotonic() + self._attachment.settings.wait_timeout_seconds
                self._making_room(worker, tag, deadline, pin_all if for_all else pin)
        finally:
            worker.end(operation)

    @_closed_by_shutdown
    def unpin(self, tag: str, *, for_all: bool = False) -> None:
        """End this process's pin on a model, or that of the namespace if `for_all`.

        Raises NotAcquiredError when there is none, ClosedError, LockTimeoutError.
        """
        encoded_tag(tag)
        worker = self._connected()
        namespace = worker.namespace
        if for_all:
            unpin_for_all(namespace, worker.scheduler, tag)
            return

        def unpin(t: Transaction) -> bool:
            model = namespace.tables.model_row(tag)
            row = None if model is None else namespace.tables.pin_row(model, namespace.reference)
            if row is not None:
                namespace.transitions.pins.unpin(t, row)
            return row is not None

        operation = worker.begin(sys._getframe())
        try:
            with namespace.transaction() as t:
                found = unpin(t)
                if found:
                    worker.scheduler.advance(t)
        except ReentrantCallError:
            # A finalizer or signal handler gives it back, so it is pinned for all that can be seen.
            worker.deferred.defer(unpin)
            found = True
        finally:
            worker.end(operation)
        if not found:
            raise NotAcquiredError(f"unpin of {tag!r}: this process has no pin on it", tag=tag)

    @_closed_by_shutdown
    def unload(self, tag: str, *, timeout_seconds: float | None = None) -> int:
        """Have all copies of a model unloaded, in whatever process they are; return how many there are.

        Idle copies are unloaded at once, pinned ones too. Those in use, or being loaded, nobody else gets any more, and
        they are unloaded when they are given back. A later request loads a new copy.

        timeout_seconds: how long to wait until they are gone; None stands for `wait_timeout_seconds`, and 0 does not
            wait.

        Raises UnloadTimeoutError when some are still there then; DeadlockError, with nothing changed, when the calling
        thread would wait for a copy that it holds in a block or loads itself; InvalidArgumentError, ClosedError,
        LockTimeoutError.
        """
        encoded_tag(tag)
        patience = self._patience(timeout_seconds)
        worker = self._connected()
        operation = worker.begin(sys._getframe())
        try:
            if patience > 0:
                self._expect_no_own(worker, tag)
            asked = unload_model(worker.namespace, worker.scheduler, tag)
            worker.unloads.unload_in_thread()
            if patience > 0:
                wait_for_unload(worker.namespace, asked, patience, lambda: worker.closing)
        finally:
            worker.end(operation)
        return asked.copies

    @staticmethod
    def _expect_no_own(worker: Worker, tag: str) -> None:
        """Raise DeadlockError if the calling thread holds, or loads, a copy of a model."""
        tables, words = worker.namespace.tables, worker.namespace.segment.words
        firm, _ = worker.thread.rows()
        if any(words[tables.instance(row) + Instance.MODEL] == tables.model_row(tag) for row in firm):
            raise DeadlockError(
                f"unload of {tag!r}: this thread itself holds, or is loading, a copy, which is unloaded when it is "
                "given back; pass timeout_seconds=0 not to wait for that",
                tag=tag,
                held=(tag,),
            )

    @property
    @_closed_by_shutdown
    def settings(self) -> dict[str, float | None]:
        """The parameters of the namespace that `update_settings` changes, as they are now; None is no limit."""
        namespace = self._connected().namespace
        with namespace.transaction():
            values = {name: getattr(namespace.settings, name) for name in CHANGEABLE}
        return {name: None if math.isinf(value) else value for name, value in values.items()}

    @_closed_by_shutdown
    def update_settings(self, **changes: float | None) -> None:
        """Change parameters of the namespace, under their names in `ModelManager(…)`, for all its processes.

        They are checked as at creation, and all of them change, or none; None is no limit. Every process goes by them
        from its next transaction on. What waits is decided about anew at once; nothing that is loaded is unloaded for
        it, but for copies beyond a lower `max_model_copies`: idle ones at once, others when they are given back.

        Raises InvalidArgumentError, also for `wait_timeout_seconds`, which is each manager's own, and for what the
        source of memory figures is made with; ClosedError, LockTimeoutError.
        """
        worker = self._connected()
        operation = worker.begin(sys._getframe())
        try:
            change_settings(worker.namespace, worker.scheduler, changes)
            worker.unloads.unload_in_thread()
        finally:
            worker.end(operation)

    @_closed_by_shutdown
    def suspend(self, tag: str) -> int:
        """Suspend the idle copies of a model, as far as they can be; return how many are. See `mpmm.suspend`.

        Whoever asks for the model has one resumed, and so does `resume`. Copies in use stay as they are; so do those
        for which the host has no room, unless others that were suspended before can be dropped for them.

        Raises InvalidArgumentError, ClosedError, LockTimeoutError.
        """
        encoded_tag(tag)
        return self._connected().suspender.suspend_idle(tag)

    @_closed_by_shutdown
    def resume(self, tag: str, *, timeout_seconds: float | None = None) -> int:
        """Resume the suspended copies of a model that this process can use; return how many are, and idle now.

        They wait their turn like a preload, and room is made for them. timeout_seconds: for each of them; None stands
        for `wait_timeout_seconds`.

        Raises AcquireTimeoutError, NamespaceResetError, TableFullError, InvalidArgumentError, ClosedError,
        LockTimeoutError.
        """
        encoded_tag(tag)
        patience = self._patience(timeout_seconds)
        worker = self._connected()
        operation = worker.begin(sys._getframe())
        try:
            resumed = self._resume_all(worker, operation, tag, patience)
        except BaseException:
            worker.abandon(operation)
            raise
        worker.end(operation)
        return resumed

    def _resume_all(self, worker: Worker, operation: Operation, tag: str, patience: float) -> int:
        resumed = 0
        while worker.suspender.suspended_of(tag):
            wanted = worker.suspender.loaded_of(tag) + 1
            with giving_up_in_time(worker, tag):
                answer = self._queue(worker, operation, tag, time.monotonic() + patience, preload=wanted)
            if not isinstance(answer, _Booking):
                break
            if not answer.resumes:
                # Somebody else was quicker, and a load is not what was asked for.
                self._give_up_load(worker, answer)
                operation.booking = None
                break
            if not worker.suspender.resume(answer.row, answer.generation):
                operation.booking = None
                continue
            with worker.namespace.transaction() as t:
                if worker.suspender.end_resume(t, answer.row, answer.generation):
                    worker.scheduler.release(t, answer.row, used=False)
                    resumed += 1
            operation.booking = None
        return resumed

    @property
    def namespace(self) -> str:
        """Name of the namespace."""
        return self._attachment.name

    @_closed_by_shutdown
    def tickets(self) -> list[QueueTicket]:
        """Return everybody who waits now, first one first."""
        worker = self._connected()
        words, tables = worker.namespace.segment.words, worker.namespace.tables
        with worker.namespace.transaction():
            rows = tables.rows_where(worker.namespace.segment.layout.tickets, Ticket.STATE, Ticket.WAITING)
            order = (Ticket.PRIORITY, Ticket.RANK, Ticket.NUMBER)
            return [
                QueueTicket(
                    words[tables.ticket(row) + Ticket.PRIORITY],
                    words[tables.ticket(row) + Ticket.NUMBER],
                    tables.tag_of(words[tables.ticket(row) + Ticket.MODEL]),
                    worker.scheduler.expected_wait_s(row),
                )
                for row in sorted(rows, key=lambda row: tuple(words[tables.ticket(row) + word] for word in order))
            ]

    def __enter__(self) -> ModelManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __reduce__(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self._attachment.settings, field.name) for field in fields(Settings)}
        for name in ("memory_budget_mb", "max_model_copies", "idle_ttl_seconds", "max_waiting", "suspend_budget_mb"):
            values[name] = None if math.isinf(values[name]) else values[name]
        values["suspend"] = CHECKPOINTS[int(values.pop("suspend_checkpoints"))]
        for name in ("min_data_points", "min_model_copies"):
            values[name] = int(values[name])
        told = self._attachment.joins_with
        values.update(
            monitor=told.monitor,
            verbose_logging=told.verbose_logging,
            namespace=self._attachment.name,
            memory_source=told.memory_source,
            devices=told.devices,
            estimates_path=told.estimates_path,
            autoscaling_metric=self._autoscaling_metric,
            capacities=told.capacities,
            runtime_root=str(self._attachment.root),
        )
        return functools.partial(type(self), **values), ()

    def _patience(self, timeout_seconds: float | None) -> float:
        """Return how many seconds to wait. Raises InvalidArgumentError."""
        if timeout_seconds is None:
            return self._attachment.settings.wait_timeout_seconds
        return checked_timeout("timeout_seconds", timeout_seconds)

    # ---- the way of an acquire -----------------------------------------------------------------------------

    def _get(
        self, worker: Worker, operation: Operation, tag: str, request: PlacementRequest, began: float | None = None
    ) -> Copy | _Booking:
        """Return a copy that lives and that this process holds now, or the permission to load one.

        began: `time.monotonic()` when the wait began, now by default.

        Raises LockTimeoutError also when the lock was not free within `wait_timeout_seconds`.
        """
        now = time.monotonic()
        deadline = (now if began is None else began) + self._attachment.settings.wait_timeout_seconds
        left = max(NOW_S, deadline - now)
        if request.keep_alive:
            self._keep_alive(worker, tag, request.keep_alive, left)
        while True:
            got: Copy | _Booking | None = None
            if not worker.scheduler.may_have_to_wait(tag) or worker.held.comes_back(tag):
                got = None if request.usable_on else worker.held.take_kept(tag, operation)
                got = got or self._take_idle(worker, operation, tag, left, request.usable_on)
            if got is None:
                got = self._queue(worker, operation, tag, deadline, request)
            # None stands for enough copies, which only a preload is told.
            if isinstance(got, _Booking) or (got is not None and worker.held.handle_is_alive(got)):
                return got
            if got is not None:
                self._discard(worker, operation, got)
            left = deadline - time.monotonic()

    @staticmethod
    def _keep_alive(worker: Worker, tag: str, word: int, patience_s: float | None = None) -> None:
        """Record how long idle copies of a model are kept, if it has a row; with its ticket it is recorded else."""
        namespace = worker.namespace
        words, tables = namespace.segment.words, namespace.tables
        (worker.unload_on_release.add if word == Model.AT_ONCE else worker.unload_on_release.discard)(tag)
        row = tables.model_row(tag)
        if row is None or words[tables.model(row) + Model.KEEP_ALIVE] == word:
            return
        with namespace.transaction(patience_s) as t:
            row = tables.model_row(tag)
            if row is not None:
                namespace.transitions.models.keep_alive(t, row, word)

    def _take_idle(self, worker: Worker, operation: Operation, tag: str, patience_s: float, tied: int) -> Copy | None:
        """Take an idle copy if those who wait are not concerned, and nobody runs alone where it lies."""
        namespace = worker.namespace
        with namespace.transaction(patience_s) as t:
            row = worker.held.find_idle(tag, tied)
            return None if row is None else self._take(worker, operation, t, row, tag)

    @staticmethod
    def _take(worker: Worker, operation: Operation, t: Transaction, row: int, tag: str) -> Copy | None:
        """Take an idle copy (row), unless it is for others, or lies where one runs alone."""
        namespace, scheduler = worker.namespace, worker.scheduler
        if namespace.segment.words[Header.ISOLATED] and scheduler.beside_isolation(row):
            return None
        if scheduler.must_queue() and not (worker.held.has_tenure(tag, row) or scheduler.may_take(row)):
            return None
        namespace.transitions.holds.take_idle(t, row, namespace.reference)
        return worker.held.add(row, tag, operation)

    def _take_or_wait(
        self, worker: Worker, operation: Operation, tag: str, encoded: bytes, deadline: float, request: PlacementRequest
    ) -> Copy | int | None:
        """Take an idle copy, or queue where it is known without a plan that others have to be waited for.

        Return the copy, or the ticket's row; None, with nothing changed, if it takes a plan to know.
        """
        namespace = worker.namespace
        with suppress(TableFullError), namespace.transaction(max(NOW_S, deadline - time.monotonic())) as t:
            row = worker.held.find_idle(tag)
            copy = None if row is None else self._take(worker, operation, t, row, tag)
            if copy is not None:
                return copy
            model = namespace.tables.model_row(tag)
            cause = None if model is None else worker.scheduler.known_wait(model)
            if model is not None and cause is not None:
                ticket = self._make_ticket(worker, operation, t, model, deadline, 0, request, cause=cause)
                self._expect_place(worker, operation, tag, ticket, self._most(worker, request))
                t.after.append(lambda: self._log_queued(operation, tag))
                return ticket
        return None

    def _queue(
        self,
        worker: Worker,
        operation: Operation,
        tag: str,
        deadline: float,
        request: PlacementRequest = ANYWHERE,
        preload: int = 0,
    ) -> Copy | _Booking | None:
        """Wait in the queue; return a copy that this process holds now, or the permission to load one.

        preload: above 0, only to load, and None once there are so many copies.
        """
        encoded = encode_text(tag, Model.TAG_BYTES, "model tag")
        began = time.monotonic()
        firm, alone = worker.thread.rows()
        nested = bool(firm or alone)
        self._run_alone_no_more(worker, [*firm, *alone])
        with worker.waiting():
            row: Copy | int | None = None
            if not (preload or nested) and request is ANYWHERE and worker.scheduler.may_know_the_wait(tag):
                row = self._take_or_wait(worker, operation, tag, encoded, deadline, request)
            if row is None:
                worker.figures.ensure_fresh_to_queue(deadline - time.monotonic())
                row = self._enqueue(worker, operation, tag, encoded, deadline, preload, request, nested)
            if isinstance(row, Copy):
                return row
            if firm:
                self._expect_no_deadlock(worker, tag, row, firm)
            while True:
                state = self._await_answer(worker, operation, row, deadline)
                if state is None:
                    left = self._leave_queue(worker, operation, row, timed_out=True)
                    raise timed_out(tag, time.monotonic() - began, *left)
                if state == Ticket.GRANTED and (copy := worker.held.take_granted(row, tag, operation)) is not None:
                    return copy
                with suppress(AnswerUndone):
                    return self._act_on(worker, operation, tag, row, deadline, request)

    def _run_alone_no_more(self, worker: Worker, rows: list[int]) -> None:
        """End the isolation of what the calling thread holds or loads, as it asks for something else; measure it."""
        namespace = worker.namespace
        for row in rows:
            if not (namespace.segment.words[Header.ISOLATED] and namespace.transitions.isolation.runs_alone(row)):
                continue
            at = namespace.tables.instance(row)
            worker.figures.sample()
            added = worker.figures.added_mb(row) if namespace.segment.words[at] == Instance.ACTIVE else None
            with namespace.transaction() as t:
                if namespace.transitions.isolation.runs_alone(row):
                    if added is not None:
                        self._learn_alone(worker, t, row, max(added) * len(added))
                    namespace.transitions.isolation.end(t, row)
                    worker.scheduler.advance(t)

    @staticmethod
    def _learn_alone(worker: Worker, t: Transaction, row: int, cost: float) -> None:
        """Record what the copy that runs alone has added to the memory in use."""
        namespace = worker.namespace
        model = namespace.segment.words[namespace.tables.instance(row) + Instance.MODEL]
        namespace.transitions.estimates.estimate(t, model, cost, measured=False, sd_mb=ALONE_SD * cost)
        namespace.transitions.measurements.set_measured_mb(t, row, cost)

    def _expect_no_deadlock(self, worker: Worker, tag: str, row: int, firm: list[int]) -> None:
        """Take a ticket out of the queue that waits for its own thread. Raises DeadlockError."""
        namespace = worker.namespace
        tables, words = namespace.tables, namespace.segment.words
        with namespace.transaction() as t:
            if not worker.thread.waits_for_itself(row, firm):
                return
            held = tuple(tables.tag_of(words[tables.instance(one) + Instance.MODEL]) for one in firm)
            reason = worker.scheduler.why(row)
            namespace.transitions.hand_over.leave_queue(t, row)
            worker.scheduler.advance(t)
        raise DeadlockError(
            f"model {tag!r} {reason.partition(': ')[2]}; but this thread itself holds, or is loading, "
            f"{', '.join(map(repr, held))}: release that first, hold one copy for both uses, or make sure that both "
            "fit (max_model_copies, memory)",
            tag=tag,
            held=held,
        )

    def _making_room(self, worker: Worker, tag: str, deadline: float, enter: Callable[[], T]) -> T:
        """Return what `enter` returns, a transaction that needs a row; have what is idle make room for it if need be.

        Raises TableFullError when every row is in use, held or waited for, AcquireTimeoutError when none has come free
        in time.
        """
        began = time.monotonic()
        while True:
            try:
                return enter()
            except TableFullError as error:
                if error.table == "tickets" and worker.held.has_taken_tickets:
                    # Grants that this process has acted upon, and whose rows nobody needs any more.
                    with worker.namespace.transaction(max(NOW_S, deadline - time.monotonic())) as t:
                        worker.held.free_taken_tickets(t)
                    continue
                if error.table != "models":
                    raise
                with worker.namespace.transaction(max(NOW_S, deadline - time.monotonic())) as t:
                    if not worker.scheduler.make_room_for_model(t, worker.namespace.slot):
                        raise
            if time.monotonic() >= deadline:
                raise timed_out(tag, time.monotonic() - began, "no row in the table of models")
            worker.unloads.unload_in_thread()
            time.sleep(UNLOAD_LOOK_S)

    def _enqueue(
        self,
        worker: Worker,
        operation: Operation,
        tag: str,
        encoded: bytes,
        deadline: float,
        preload: int,
        request: PlacementRequest,
        nested: bool = False,
    ) -> int:
        enter = functools.partial(
            self._enqueue_now, worker, operation, tag, encoded, deadline, preload, request, nested
        )
        if not request.if_free:
            return self._making_room(worker, tag, deadline, enter)
        try:
            return enter()
        except TableFullError:
            raise NothingFree from None

    def _enqueue_now(
        self,
        worker: Worker,
        operation: Operation,
        tag: str,
        encoded: bytes,
        deadline: float,
        preload: int,
        request: PlacementRequest,
        nested: bool,
    ) -> int:
        namespace = worker.namespace
        with namespace.transaction(max(NOW_S, deadline - time.monotonic())) as t:
            model = namespace.transitions.models.claim(t, tag, encoded)
            if worker.kept_estimates is not None:
                worker.kept_estimates.recall(t, model, tag)
            if request.expect_mb:
                namespace.transitions.estimates.expect(t, model, request.expect_mb)
            row = self._make_ticket(worker, operation, t, model, deadline, preload, request, nested)
            if request.if_free and not worker.scheduler.needs_nothing(row):
                operation.ticket = None
                raise NothingFree
            worker.scheduler.advance(t, newcomer=row)
            self._expect_place(
                worker, operation, tag, row, request.max_waiting if preload else self._most(worker, request)
            )
        self._log_queued(operation, tag)
        return row

    def _log_queued(self, operation: Operation, tag: str) -> None:
        self.logging_info("Queued for %s: ticket %s", tag, operation.ticket)

    def _make_ticket(
        self,
        worker: Worker,
        operation: Operation,
        t: Transaction,
        model: int,
        deadline: float,
        preload: int,
        request: PlacementRequest,
        nested: bool = False,
        cause: Cause | None = None,
    ) -> int:
        """Queue, and return the ticket's row; cause: why it waits, if that is known."""
        namespace = worker.namespace
        words = namespace.segment.words
        devices = request.loadable_on or worker.samples.visible_bits()
        if request.keep_alive:
            namespace.transitions.models.keep_alive(t, model, request.keep_alive)
        known = worker.scheduler.is_known(model) or words[Header.SOURCE_BOOKS_ONLY]
        priority = PRELOAD_PRIORITY if preload else 1 if known else 0
        # Who does not wait gets what is free now; tickets whose time is over get nothing.
        deadline_ns = to_ns(max(deadline, time.monotonic() + NOW_S))
        need_mb = worker.scheduler.need_mb(model)
        row = namespace.transitions.tickets.enqueue(
            *(t, model, namespace.slot, priority, need_mb, deadline_ns, preload),
            *(devices, request.usable_on, request.span, nested, cause, request.urgency, request.steady),
        )
        number = words[namespace.tables.ticket(row) + Ticket.NUMBER]
        operation.ticket = (row, number)
        return row

    @staticmethod
    def _most(worker: Worker, request: PlacementRequest) -> float:
        """Return how many may wait for the model of a request, this one among them."""
        return min(request.max_waiting, worker.namespace.settings.max_waiting)

    @staticmethod
    def _expect_place(worker: Worker, operation: Operation, tag: str, row: int, most: float) -> None:
        """Refuse a newcomer that has to wait though more than `most` do so then, for which its transaction is undone.

        Raises QueueFullError.
        """
        words, tables = worker.namespace.segment.words, worker.namespace.tables
        at = tables.ticket(row)
        waiting = words[tables.model(words[at + Ticket.MODEL]) + Model.WAITING]
        if waiting <= most or words[at] != Ticket.WAITING:
            return
        expected_s = worker.scheduler.expected_wait_s(row)
        operation.ticket = None
        raise QueueFullError(
            f"model {tag!r}: {waiting - 1} requests wait for it already, and max_waiting={most:.0f} allows no other "
            f"one, which would wait for about {expected_s:.1f} s: try again then, or raise max_waiting",
            tag=tag,
            waiting=waiting - 1,
            max_waiting=int(most),
            retry_after_seconds=expected_s,
        )

    def _await_answer(self, worker: Worker, operation: Operation, row: int, deadline: float) -> int | None:
        """Have what has to go for the ticket unloaded, then `_wait`; an exception takes it out of the queue."""
        try:
            worker.unloads.unload_in_thread()
            return self._wait(worker, row, deadline)
        except BaseException:
            self._leave_queue(worker, operation, row)
            raise

    def _wait(self, worker: Worker, row: int, deadline: float) -> int | None:
        """Sleep until the ticket has an answer, and return its state; None when the deadline has passed."""
        namespace = worker.namespace
        words = namespace.segment.words
        at = namespace.tables.ticket(row)
        signal = at + Ticket.SIGNAL
        again = worker.look_again(row)
        while True:
            seen = words[signal]
            # This look needs no lock: what is seen here is acted upon only once it is known to be committed.
            if words[at + Ticket.STATE] != Ticket.WAITING:
                return int(words[at + Ticket.STATE])
            if worker.closing:
                raise ClosedError("the manager was shut down while a thread waited for a model")
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            look_in_s = again.in_s()
            if look_in_s <= 0:
                again.look()
                continue
            left = min(left, look_in_s)
            wait_for_change(lambda: int(words[signal]), namespace.segment.address + 8 * signal, seen, left)
            if words[signal] == seen:
                worker.scheduler.await_alerted(row)

    def _act_on(
        self, worker: Worker, operation: Operation, tag: str, row: int, deadline: float, request: PlacementRequest
    ) -> Copy | _Booking | None:
        namespace = worker.namespace
        words, tables = namespace.segment.words, namespace.tables
        try:
            with namespace.transaction(max(NOW_S, deadline - time.monotonic())) as t:
                at = tables.ticket(row)
                state, instance = words[at + Ticket.STATE], words[at + Ticket.INSTANCE] - 1
                if state == Ticket.WAITING:
                    raise AnswerUndone
                need_mb = namespace.segment.floats[at + Ticket.NEED_MB]
                namespace.transitions.hand_over.consume_answer(t, row)
                if state == Ticket.GRANTED:
                    return worker.held.add(instance, tag, operation)
                if state == Ticket.LOAD:
                    generation = words[tables.instance(instance) + Instance.GENERATION]
                    operation.booking = (instance, generation)
                    resumes = words[tables.instance(instance)] == Instance.RESUMING
                    return _Booking(instance, generation, namespace.transitions.isolation.runs_alone(instance), resumes)
        except LockTimeoutError:
            # Else what was granted would stay ours for ever, unknown to everybody here.
            worker.deferred.defer(functools.partial(leave_if_there, worker.namespace, operation.ticket))
            raise
        if state == Ticket.ENOUGH:
            return None
        if state == Ticket.REFUSED:
            raise self._too_large(worker, tag, need_mb, request)
        raise taken_away(worker, f"ended the wait for {tag!r}", tag)

    def _too_large(self, worker: Worker, tag: str, need_mb: float, request: PlacementRequest) -> ModelTooLargeError:
        limit_mb, device = largest_limit(worker, request)
        return ModelTooLargeError(
            f"model {tag!r} needs {need_mb:.0f} MB, and the limit of {device!r} is {limit_mb:.0f} MB: it can never be "
            "loaded; slack_percentage, and memory_budget_mb (host) or fallback_memory_mb (booked), set the limit",
            tag=tag,
            need_mb=need_mb,
            limit_mb=limit_mb,
            device=device,
        )

    def _leave_queue(
        self, worker: Worker, operation: Operation, row: int, timed_out: bool = False
    ) -> tuple[str, float | None]:
        """Give up waiting, and what the ticket may have been given.

        Return why it waited, and if it has timed out, for how many seconds more it would.
        """
        namespace = worker.namespace
        if not namespace.is_usable:
            return "shut down", None

        ticket = operation.ticket
        wanted = wanted_by(worker.namespace, row) if timed_out else None
        left: tuple[str, float | None] = ("lock", None)
        is_asked = True

        def leave(t: Transaction) -> bool:
            nonlocal left
            if is_asked:
                left = worker.scheduler.why(row), worker.scheduler.expected_wait_s(row) if timed_out else None
            moves_somebody = not worker.scheduler.holds_up_nobody(row)
            if not leave_if_there(worker.namespace, ticket, t):
                return False
            if timed_out:
                t.add(Header.TIMEOUTS, 1)
            return moves_somebody

        worker.deferred.apply_or_defer(leave)
        # Where the change was deferred, nobody waits for the reason, and to expect a wait takes a look at all copies.
        is_asked = False
        operation.ticket = None
        held = "" if wanted is None or left[0] == "lock" else held_by(worker.namespace, wanted)
        return (f"{left[0]}; {held}", left[1]) if held else left

    # ---- the way of a lease --------------------------------------------------------------------------------

    def _enqueue_lease(
        self,
        worker: Worker,
        operation: Operation,
        encoded: bytes,
        mb: float,
        deadline: float,
        request: PlacementRequest,
    ) -> int:
        namespace = worker.namespace
        devices = request.loadable_on or worker.samples.visible_bits()
        with namespace.transaction(max(NOW_S, deadline - time.monotonic())) as t:
            model = namespace.transitions.leases.claim(t, encoded, mb)
            deadline_ns = to_ns(max(deadline, time.monotonic() + NOW_S))
            row = namespace.transitions.tickets.enqueue(
                *(t, model, namespace.slot, 1, mb, deadline_ns, 0, devices, request.usable_on, request.span),
                urgency=request.urgency,
                steady=request.steady,
            )
            operation.ticket = (row, namespace.segment.words[namespace.tables.ticket(row) + Ticket.NUMBER])
            worker.scheduler.advance(t, newcomer=row)
        return row

    def _take_lease(
        self,
        worker: Worker,
        operation: Operation,
        name: str,
        mb: float,
        row: int,
        deadline: float,
        request: PlacementRequest,
    ) -> Lease:
        namespace = worker.namespace
        try:
            with namespace.transaction(max(NOW_S, deadline - time.monotonic())) as t:
                at = namespace.tables.ticket(row)
                state, instance = namespace.segment.words[at], namespace.segment.words[at + Ticket.INSTANCE] - 1
                if state == Ticket.WAITING:
                    raise AnswerUndone
                namespace.transitions.hand_over.consume_answer(t, row)
                if state == Ticket.GRANTED:
                    lease = Lease(worker, instance, name, mb, self._attachment)
                    operation.booking = lease.reference
                    return lease
        except LockTimeoutError:
            worker.deferred.defer(functools.partial(leave_if_there, worker.namespace, operation.ticket))
            raise
        if state == Ticket.RESET:
            raise taken_away(worker, f"ended the wait for {name!r}", name)
        limit_mb, device = largest_limit(worker, request)
        raise LeaseTooLargeError(
            f"lease {name!r} of {mb:g} MB: the limit of {device!r} is {limit_mb:.0f} MB, so it can never be had; "
            "slack_percentage, and memory_budget_mb (host) or fallback_memory_mb (booked), set the limit",
            name=name,
            need_mb=mb,
            limit_mb=limit_mb,
            device=device,
        )

    # ---- the way of a load ---------------------------------------------------------------------------------

    def _load_somehow(
        self,
        worker: Worker,
        operation: Operation,
        tag: str,
        booking: _Booking,
        loader_func: Callable[[], Any],
        request: PlacementRequest = ANYWHERE,
        preload: int = 0,
    ) -> Any:
        """Run the loader; if it runs out of memory, make room and wait for a second turn. Return what is to be used.

        There is none for a load that had its devices to itself, with no larger ones to go to: nothing can be unloaded.
        """
        devices = worker.namespace.segment.words[worker.namespace.tables.instance(booking.row) + Instance.DEVICES]
        places = request.loadable_on or worker.samples.visible_bits()
        if booking.resumes:
            return self._resume_somehow(worker, operation, tag, booking, loader_func, request, preload)
        attempt = _Attempt(places, last=False)
        try:
            return self._load(worker, operation, tag, booking, loader_func, attempt)
        except Exception as error:
            if not attempt.again:
                raise
            failure = error
        # Its frames would keep what was loaded so far, and with it the memory.
        traceback.clear_frames(failure.__traceback__)
        collect_garbage()
        answer: Copy | _Booking | None = None
        with suppress(MpmmError):
            worker.out_of_memory.make_room(devices)
            worker.unloads.wait_for_unloads(devices)
            deadline = time.monotonic() + self._attachment.settings.wait_timeout_seconds
            if preload:
                answer = self._queue(worker, operation, tag, deadline, request, preload)
            else:
                answer = self._get(worker, operation, tag, request)
        if answer is None:
            raise failure
        del failure
        if not isinstance(answer, _Booking):
            return answer.value
        if answer.resumes:
            return self._resume_somehow(worker, operation, tag, answer, loader_func, request, preload)
        return self._load(worker, operation, tag, answer, loader_func, _Attempt(places, last=True))

    @_closed_by_shutdown
    def _resume_somehow(
        self,
        worker: Worker,
        operation: Operation,
        tag: str,
        booking: _Booking,
        loader_func: Callable[[], Any],
        request: PlacementRequest,
        preload: int,
    ) -> Any:
        """Resume a copy and return it; where that fails, queue again for another one, or for a load."""
        while booking.resumes:
            resumed = worker.suspender.resume(booking.row, booking.generation)
            with worker.namespace.transaction() as t:
                if resumed and worker.suspender.end_resume(t, booking.row, booking.generation):
                    copy = worker.held.add(booking.row, tag, operation)
                    operation.booking = None
                    worker.scheduler.advance(t)
                    return copy.value
            operation.booking = None
            if preload:
                deadline = time.monotonic() + self._attachment.settings.wait_timeout_seconds
                answer = self._queue(worker, operation, tag, deadline, request, preload)
            else:
                answer = self._get(worker, operation, tag, request)
            if not isinstance(answer, _Booking):
                return None if answer is None else answer.value
            booking = answer
        return self._load_somehow(worker, operation, tag, booking, loader_func, request, preload)

    @_closed_by_shutdown
    def _load(
        self,
        worker: Worker,
        operation: Operation,
        tag: str,
        booking: _Booking,
        loader_func: Callable[[], Any],
        attempt: _Attempt,
    ) -> Any:
        """Run the loader, with no lock held, and put what it made into the books."""
        began, words = time.monotonic(), worker.namespace.segment.words
        resets = words[Header.RESETS]
        value: Any = None
        try:
            if inspect.iscoroutinefunction(loader_func):
                raise InvalidArgumentError(
                    f"loader {loader_func!r} of {tag!r}: expected a callable that is no coroutine"
                )
            self._log_load(worker, tag, booking)
            if booking.alone:
                # What it adds is measured against this figure, so it must be one from now, whatever that takes.
                self._begin_alone(worker, booking)
            growth = worker.figures.measuring_growth()
            attempt.free = worker.out_of_memory.free_for_load(booking.row)
            if booking.alone:
                worker.thread.alone = booking.row, booking.generation
            worker.thread.loads.append((booking.row, booking.generation))
            try:
                placement = worker.samples.placement_of_instance(booking.row)
                context = server_context(worker.namespace, worker.source, placement, booking.row)
                with serving_for(context), placed(placement):
                    value = loader_func()
            finally:
                worker.thread.loads.remove((booking.row, booking.generation))
            if isinstance(value, str):
                worker.suspender.wake(value, tag)
            copy = self._book_in(worker, operation, tag, booking, value, growth)
        except BaseException as error:
            ran_out = is_out_of_memory(error)
            attempt.again = ran_out and not attempt.last
            failed = isinstance(error, Exception) and not isinstance(error, _NOT_THE_LOADERS)
            in_time = self._give_up_load(worker, booking, attempt if ran_out else None, failed)
            operation.booking = None
            unload_made(value)
            value = None
            collect_garbage()
            text = "mpmm %s: pid %d failed to load %s after %.1f s: %s"
            _LOG.info(
                text, self._attachment.name, worker.namespace.pid, tag, time.monotonic() - began, type(error).__name__
            )
            limit = self._attachment.settings.load_timeout_seconds
            # Nobody else takes the row of a load away. (The limit counts from when it was allowed, not from `began`.)
            if not in_time and limit < math.inf and worker.namespace.is_usable and words[Header.RESETS] == resets:
                raise LoadTimeoutError(
                    f"the load of {tag!r} took longer than {limit:g} s and was given up; load_timeout_seconds sets the "
                    "limit",
                    tag=tag,
                    timeout_seconds=limit,
                ) from error
            raise
        if says_more(_LOG):
            namespace, seconds = worker.namespace, time.monotonic() - began
            mb = namespace.segment.floats[namespace.tables.instance(copy.row) + Instance.MB]
            text = "mpmm %s: pid %d loaded %s in %.1f s: %.0f MB on %s"
            _LOG.info(text, namespace.name, namespace.pid, tag, seconds, mb, where(namespace, copy.row))
        return copy.value

    def _log_load(self, worker: Worker, tag: str, booking: _Booking) -> None:
        """Say that a load begins, for how much, where and why."""
        if says_more(_LOG):
            namespace = worker.namespace
            mb = namespace.segment.floats[namespace.tables.instance(booking.row) + Instance.RESERVED_MB]
            why = decision(worker.namespace, EventKind.LOAD_BEGAN, booking.row)
            text = "mpmm %s: pid %d begins to load %s, %.0f MB reserved on %s%s"
            place = where(worker.namespace, booking.row)
            _LOG.info(text, self._attachment.name, namespace.pid, tag, mb, place, f": it {why}" if why else "")

    @staticmethod
    def _begin_alone(worker: Worker, booking: _Booking) -> None:
        worker.figures.sample()
        worker.figures.reset_peak()
        with worker.namespace.transaction() as t:
            worker.namespace.transitions.isolation.set_baseline(t, booking.row)

    def _book_in(
        self, worker: Worker, operation: Operation, tag: str, booking: _Booking, value: Any, growth: Growth
    ) -> Copy:
        namespace = worker.namespace
        words, tables = namespace.segment.words, namespace.tables
        handle = encode_text(value, Instance.HANDLE_BYTES, f"handle of {tag!r}") if isinstance(value, str) else b""
        server_pid = server_pid_of(value)
        seen = worker.figures.sample_after_load(booking.row)
        grown_mb = growth.mb() if seen and not isinstance(value, str) else 0.0
        learnt: Estimate | None = None
        way = worker.suspender.way_of(value, booking.row)
        with namespace.transaction() as t:
            at = tables.instance(booking.row)
            if not self._still_loading(worker, booking):
                raise taken_away(worker, f"ended the load of {tag!r}", tag)
            server = words[at + Instance.SERVER]
            if not server and server_pid == namespace.pid:
                server = namespace.reference
            model = words[at + Instance.MODEL]
            # No more than the policy has found room for: the default is cut where a device is smaller.
            mb = min(worker.scheduler.expected_mb(model), namespace.segment.floats[at + Instance.RESERVED_MB])
            shares_mb = worker.figures.measured_shares(booking.row, server)
            if math.fsum(shares_mb) > 0:
                mb = math.fsum(shares_mb)
                learnt = Estimate(max(shares_mb) * len(shares_mb), 0.0)
            elif grown_mb > 0:
                mb, shares_mb = grown_mb, ()
                learnt = Estimate(grown_mb, GROWTH_SD * grown_mb)
            else:
                own_mb = _own_word(value)
                if own_mb is not None:
                    namespace.transitions.estimates.expect(t, model, own_mb)
                    mb = worker.scheduler.expected_mb(model)
            books_only = bool(words[Header.SOURCE_BOOKS_ONLY])
            is_twin = namespace.transitions.loads.end(
                t, booking.row, handle, mb, server, server_pid is not None, shares_mb
            )
            if way:
                namespace.transitions.suspensions.note_way(t, booking.row, way)
            if is_twin:
                worker.held.warn_of_twins(t, tag, value)
            if words[tables.model(model) + Model.KNOWN]:
                learnt = None
            elif learnt is not None:
                namespace.transitions.estimates.estimate(t, model, learnt.mb, measured=True, sd_mb=learnt.sd_mb)
            elif books_only:
                # With nothing to measure with, the assumption; whatever leases have left of the device this time.
                on = device_rows(words[at + Instance.DEVICES])
                most_mb = min(map(worker.scheduler.limit_mb, on)) * len(on)
                learnt = Estimate(min(worker.scheduler.expected_mb(model), max(mb, most_mb)), 0.0)
                namespace.transitions.estimates.estimate(t, model, learnt.mb, measured=False)
            if words[Header.SOURCE_MEASURES_PROCESSES] and words[tables.model(model) + Model.KNOWN]:
                # It was loaded alone because nobody knew whether the source knows processes; now it is measured.
                namespace.transitions.isolation.end(t, booking.row)
            loaded = words[tables.model(model) + Model.LOADED]
            copy = worker.held.add_loaded(booking.row, tag, value, operation)
            worker.scheduler.advance(t)
        report_model_count(tag, loaded)
        if learnt is not None:
            report_estimate(tag, learnt.mb)
        return copy

    def _still_loading(self, worker: Worker, booking: _Booking) -> bool:
        words, at = worker.namespace.segment.words, worker.namespace.tables.instance(booking.row)
        return bool(
            words[at + Instance.STATE] == Instance.LOADING
            and words[at + Instance.GENERATION] == booking.generation
            and words[at + Instance.HOLDER] == worker.namespace.reference
        )

    def _give_up_load(
        self, worker: Worker, booking: _Booking, ran_out: _Attempt | None = None, failed: bool = False
    ) -> bool:
        """Free the row of a load that came to nothing; return False if others have done so already.

        ran_out: the attempt, if it ran out of memory, to learn from it and to say whether it may find more `again`.
        failed: it is the loader's fault, which is remembered unless there is another turn; see `policy.backoff`.
        """
        if not worker.namespace.is_usable:
            return False

        def give_up(t: Transaction) -> bool:
            if not self._still_loading(worker, booking):
                return False
            if ran_out is not None:
                more = worker.out_of_memory.could_gain(booking.row, ran_out.free, ran_out.places)
                ran_out.again = ran_out.again and more
                worker.out_of_memory.learn_from_load(t, booking.row, ran_out.free, ran_out.places, not ran_out.last)
            if failed and not (ran_out is not None and ran_out.again):
                words, at = worker.namespace.segment.words, worker.namespace.tables.instance(booking.row)
                worker.namespace.transitions.models.note_failure(t, words[at + Instance.MODEL])
            # Not merely `fail_load`: the loader may have started a model server before it failed.
            worker.namespace.transitions.loads.give_up(t, booking.row)
            return True

        return worker.deferred.apply_or_defer(give_up) is not False

    # ---- the way of a release ------------------------------------------------------------------------------

    def _give_back(
        self, worker: Worker, tag: str, copy: Copy, used: bool = True, patience_s: float | None = None
    ) -> None:
        namespace = worker.namespace
        words = namespace.segment.words
        cost = None
        alone = words[Header.ISOLATED] and namespace.transitions.isolation.runs_alone(copy.row)
        # What a twin adds to the memory in use says nothing about its model.
        if alone and not worker.held.is_twin(copy):
            cost = self._isolated_cost(worker, copy)
        with namespace.transaction(patience_s) as t:
            worker.held.free_taken_tickets(t)
            if not worker.held.is_held(copy):
                raise taken_away(worker, f"took {tag!r} away", tag)
            if cost is not None and namespace.transitions.isolation.runs_alone(copy.row):
                self._learn_alone(worker, t, copy.row, cost)
            else:
                cost = None
            contended = words[Header.WAITING]
            if not (contended and worker.held.keeps(t, copy, used)):
                if contended:
                    worker.tenures.end(copy.tag)
                worker.scheduler.release(t, copy.row, used)
            if worker.unload_on_release:
                worker.unloads.unload_if_not_kept(t, copy)
        if contended:
            # Not before the waiter was let run on this processor.
            worker.tenures.leave(copy.tag)
        if copy.tag != tag:
            _LOG.warning("mpmm %s: a copy of %r was released as %r", self._attachment.name, copy.tag, tag)
        if cost is not None:
            report_estimate(copy.tag, cost)

    def _isolated_cost(self, worker: Worker, copy: Copy) -> float | None:
        """Return what the copy that runs alone has added to the memory in use, at its peak, in MB; None if unknown."""
        worker.figures.sample()
        added = worker.figures.added_mb(copy.row)
        return None if added is None else max(added) * len(added)

    def _discard(self, worker: Worker, operation: Operation, copy: Copy) -> None:
        """Strike off a copy whose server turned out to be dead."""
        if operation.held is not None:
            worker.held.take_off_hold(operation.held, operation)

        def discard(t: Transaction) -> bool:
            worker.held.free_taken_tickets(t)
            if not worker.held.is_held(copy):
                return False
            worker.namespace.transitions.holds.discard(t, copy.row)
            return True

        worker.deferred.apply_or_defer(discard)
        operation.held = None

    # ---- bookings made by hand -----------------------------------------------------------------------------

    @_closed_by_shutdown
    def _book(self, tag: str, ticket_num: int, alone: bool) -> bool:
        encoded_tag(tag)
        worker = self._connected()
        self.logging_info("Booking for %s, ticket %s", tag, ticket_num)
        operation = worker.begin(sys._getframe())
        bookings = self._bookings_of_thread()
        booked = False
        try:
            answer = self._queue(
                worker, operation, tag, time.monotonic() + self._attachment.settings.lock_timeout_seconds
            )
            booked = isinstance(answer, _Booking) and answer.alone == alone
            if booked:
                bookings[tag] = answer
                self._bookings_made = True
            elif isinstance(answer, _Booking):
                self._give_up_load(worker, answer)
            elif operation.held is not None and worker.held.take_off_hold(operation.held, operation):
                self._give_back_held(worker, operation, tag)
            worker.end(operation)
        except AcquireTimeoutError:
            worker.end(operation)
        except BaseException:
            bookings.pop(tag, None)
            worker.abandon(operation)
            raise
        return booked

    def _bookings_of_thread(self) -> dict[str, Any]:
        found: dict[str, Any] = self._bookings.__dict__.setdefault("by_tag", {})
        return found

    def _take_booking(self, operation: Operation, tag: str) -> _Booking | None:
        """Take what the thread has booked for a tag; `operation` answers for it from now on."""
        bookings = self._bookings_of_thread()
        booking: _Booking | None = bookings.get(tag)
        if booking is not None:
            operation.booking = booking.row, booking.generation
            del bookings[tag]
        return booking


# Where users import them from, which pickles, tracebacks and documentation are to name.
for _public in (ModelManager, QueueTicket):
    _public.__module__ = "mpmm.model_manager"


def _own_word(value: Any) -> float | None:
    """Return what an object says that it takes, in its attribute `expect_mb`, None if it says nothing of use."""
    mb = None if isinstance(value, str) else getattr(value, "expect_mb", None)
    try:
        return checked_number("expect_mb", mb, 0.0, math.inf, "MB", above=True, finite=True)
    except InvalidArgumentError:
        return None
