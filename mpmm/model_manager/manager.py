"""ModelManager: loaded models for many processes that share the memory of one host's devices.

Beam has one manager in one process that the others call. Here every process runs this code on the state in shared
memory, with Beam's names, signatures and defaults. The class checks what callers pass in, and documents it; the modules
beside this one do the work, see `mpmm.model_manager`.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from mpmm.errors import InvalidArgumentError
from mpmm.memory.beam_metrics import choose_autoscaling_metric
from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.monitor_source import MonitorProtocol
from mpmm.model_manager.acquire import acquire
from mpmm.model_manager.administration import change_settings, unload_model, unpin_for_all, wait_for_unload
from mpmm.model_manager.attachment import Attachment, JoinsWith, closed_by_shutdown, root_and_name
from mpmm.model_manager.beam_attributes import BeamNames, CopiesByTag
from mpmm.model_manager.block import Block
from mpmm.model_manager.lease import Lease, reserve
from mpmm.model_manager.nested import expect_not_held, expect_not_kept_quiet
from mpmm.model_manager.pins import pin, unpin
from mpmm.model_manager.preload import book, preload, resume_all
from mpmm.model_manager.queue_ticket import QueueTicket, waiting_tickets
from mpmm.model_manager.release import release
from mpmm.model_manager.request import AcquireOptions, check_names, check_request, encoded_tag, read_options
from mpmm.model_manager.suspend_by_hand import suspend_all
from mpmm.model_manager.uses import given_instance
from mpmm.multi_process_shared.main_import import refuse_while_importing_main
from mpmm.multi_process_shared.registry import is_server_process
from mpmm.shared_state.layout import Capacities, Instance, Model
from mpmm.shared_state.settings import CHANGEABLE, Settings, checkpoints_by_name
from mpmm.shared_state.tables import encode_text
from mpmm.sources import MemorySource
from mpmm.text.arguments import checked_number, checked_timeout, checked_whole, in_brief
from mpmm.text.printable import printable_logger

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ModelManager"]

T = TypeVar("T")

PRELOAD_STATES = ("idle", "suspended")
_LOG = printable_logger("mpmm")


class ModelManager(BeamNames):
    """Manages the life of models: reuse, admission, eviction, profiling of unknown models. Thread-safe.

    Prefer `with manager.model(tag, loader) as model:`; `acquire_model` and `release_model` are Beam's names. If a
    loader returns a `str`, that is a *handle* (the tag of a `MultiProcessShared`, say), which any process can use and
    unload. Any other object belongs to the process that loaded it: only that process reuses it, but all processes
    account for its memory and may have it evicted. So does a `str` that can be no handle: an empty one, or one of more
    than 631 bytes.

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

        A model server imports the program, and so makes its managers, too. There, a manager attaches at its first use,
        and neither leads nor keeps servers alive.

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
            once, and evicts nothing.
        lock_timeout_seconds (s, 0.001 to 86400): a transaction gives up waiting for the lock after this time; it takes
            microseconds.
        verbose_logging: logs the steps of the estimator, and which requests queue.
        namespace: the name that processes share: all processes of one user on one host that pass the same name share
            one namespace; None makes a private one, which forked children and pickled copies share. A name is 1 to 64
            characters of `A-Z a-z 0-9 _ . -`, does not start with a dot, and is not `shared`.
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
            `mpmm.suspend`; None takes half of the host memory that is free when the namespace is created, as far as it
            is free still, 0 suspends nothing.
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

        Raises InvalidArgumentError and SourceUnavailableError; RuntimeDirectoryError, SegmentAllocationError,
        SegmentCorruptError, SegmentLostError, LayoutMismatchError, TableFullError, ProcessLimitError and
        LockTimeoutError if this process cannot join the namespace; GreenThreadsError; ClosedError in finalizers that
        run as the interpreter ends.
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
        joins_with = JoinsWith.checked(
            monitor, memory_source, devices, estimates_path, capacities, verbose_logging=verbose_logging
        )
        self._autoscaling_metric = autoscaling_metric
        if autoscaling_metric is not None:
            choose_autoscaling_metric(autoscaling_metric)
        self._attachment = Attachment(*root_and_name(namespace, runtime_root), settings, joins_with)
        # Bound here, so that a call takes no longer than that of a method of this class.
        self._connected = self._attachment.connected
        self._connected_in_time = self._attachment.connected_in_time
        # A model server imports the program, and so makes its managers, too. Most are never used there.
        if not is_server_process():
            self._connected()

    # ---- Beam's methods ------------------------------------------------------------------------------------

    def logging_info(self, message: str, *args: Any) -> None:
        """Log at level INFO if `verbose_logging` is on."""
        self._attachment.log_info(message, *args)

    @closed_by_shutdown
    def all_models(self, tag: str | None = None) -> Any:
        """Return the loaded copies of a tag as a list: handles, this process's objects, None for those of others.

        Without a tag, return a dict of such lists by tag, which answers `[]` for a tag without copies: Beam looks up a
        model that may have been evicted.
        """
        if tag is not None:
            encoded_tag(tag)
        session = self._connected()
        tables, layout = session.namespace.tables, session.namespace.segment.layout
        found = CopiesByTag()
        with session.namespace.transaction():
            for row in tables.used_rows(layout.instances):
                instance = tables.instances[row]
                if instance.state in (Instance.ACTIVE, Instance.IDLE) and instance.seat_of is None:
                    found.setdefault(tables.tag_of(instance.model), []).append(session.owned.value_of(row))
        return found if tag is None else found.get(tag, [])

    def acquire_model(self, tag: str, loader_func: Callable[[], Any], **options: Unpack[AcquireOptions]) -> Any:
        """Return a copy of the model, to be given back with `release_model`.

        tag: names the model; the same tag means the same model in every process.
        loader_func: makes a copy; the calling thread runs it, with no lock held, if there is no copy to reuse. If it
            runs out of memory, mpmm makes room and calls it once more, see `mpmm.policy.out_of_memory`; the local
            variables in the traceback of its first exception are gone then. `mpmm.current_placement()` tells it
            where to load and how much is reserved; a model server that it starts sees only those.

        Options:

        devices: indices or uuids of the devices on which the copy has to be; by default all that this process sees.
        span: the number of devices (1 to 8) of which a copy takes an equal share, if one has to be loaded.
        expect_mb: the memory that a copy takes, on all its devices together, as far as the caller knows. It replaces
            `default_estimate_mb` until the model is measured, and the model need not be loaded alone for that. Where
            nothing can be measured it is used for good, and the latest value counts. An attribute of this name on a
            loaded object, here or in a model server, means the same.
        max_waiting: how many requests may wait for the model, this one included; None allows any number, and with 0
            this request does not wait. The setting of this name applies as well, except to preloads.
        keep_alive_seconds: how long copies of the model are kept after their last use, in all processes: -1 for ever, 0
            to unload them as soon as no process uses or waits for one; None keeps what the last request said, else
            `idle_ttl_seconds`. A request that needs their memory still has them evicted; `pin` prevents that, too.
        priority: how urgent the request is, from -10 to 10, 0 by default. In the queue each step counts like 10 s of
            waiting, so no request starves; preloads are ranked among themselves. See `mpmm.policy.fairness`.
        steady: while it loads, nothing else is loaded or unloaded on its devices, for engines that size themselves by
            the free memory. Copies there may be used meanwhile. The load waits for loads and unloads that have begun
            there, and further unloads wait for it. A model server that it starts finds its share of the memory in its
            environment, and a loader finds it in `current_placement()`.
        users: how many may use a copy at a time, from 1 to 128: for objects that take calls from several threads at a
            time, thread-safe servers and engines that batch. Their memory counts once, and a copy is evicted, or
            unloaded, only once none of its users is left. It applies to copies that are loaded, or resumed, from now
            on. The last request that had to load or to wait decides; None keeps the number, which is 1 at first.

        Raises AcquireTimeoutError, QueueFullError, LoadTimeoutError, ModelTooLargeError, NamespaceResetError,
        TableFullError, DeadlockError (see `model`), InvalidArgumentError, ClosedError, LockTimeoutError, and what the
        loader raises.
        """
        check_request(tag, loader_func)
        began = time.monotonic()
        session = self._connected_in_time(tag)
        operation = session.begin(sys._getframe())
        try:
            value = acquire(self._attachment, session, operation, tag, loader_func, options, began)
            # Inside the `try`, because nothing would know of the instance after an exception that came later.
            session.end(operation)
            return value
        except BaseException:
            session.abandon(operation)
            raise

    def release_model(self, tag: str, instance: Any) -> None:
        """Give back what `acquire_model` returned.

        A wrong tag with the right instance is accepted, and logged. A second release of one hold ends another hold of
        this process on the same object or an equal handle, if there is one. Raises NotAcquiredError if this process
        does not hold the instance, NamespaceResetError if a reset took it away meanwhile.
        """
        release(self._connected(), tag, instance)

    def try_enter_isolation_mode(self, tag: str, ticket_num: int) -> bool:
        """Try to get the devices for an unknown model alone, waiting up to `lock_timeout_seconds`.

        True: all idle copies were unloaded, no other request is served, and the next `acquire_model(tag, …)` of this
        thread loads. `ticket_num` is for the log. `acquire_model` does all this by itself.
        """
        return self._book(tag, ticket_num, alone=True)

    def should_spawn_model(self, tag: str, ticket_num: int) -> bool:
        """Try to reserve memory for another copy, waiting up to `lock_timeout_seconds` and evicting if need be.

        True: the next `acquire_model(tag, …)` of this thread loads. False also if an idle copy makes another one
        unnecessary. `ticket_num` is for the log. `acquire_model` does all this by itself.
        """
        return self._book(tag, ticket_num, alone=False)

    @closed_by_shutdown
    def _book(self, tag: str, ticket_num: int, alone: bool) -> bool:
        encoded_tag(tag)
        self.logging_info("Booking for %s, ticket %s", tag, ticket_num)
        return book(self._attachment, tag, alone)

    def shutdown(self) -> None:
        """Release all that this process has; the last process to leave unloads everything. A second call is harmless.

        If a signal handler or finalizer calls it in the middle of another call of its thread, a new thread shuts down
        once that call has ended; the process does not exit before it has.
        """
        self._attachment.shutdown()

    @closed_by_shutdown
    def force_reset(self) -> None:
        """Unload everything of every process of the namespace, and cancel all waiting requests. Estimates stay.

        A process that holds a copy gets NamespaceResetError when it releases the copy; waiters get it at once.
        """
        session = self._connected()
        session.namespace.reset()
        _LOG.warning("mpmm %s: pid %d reset the namespace", session.namespace.name, session.namespace.pid)
        session.unloads.unload_assigned()

    # ---- further methods -----------------------------------------------------------------------------------

    def model(
        self, tag: str, loader_func: Callable[[], Any], **options: Unpack[AcquireOptions]
    ) -> AbstractContextManager[Any]:
        """Acquire a copy for the length of a `with` block; see `acquire_model`, for the options too.

        An exception that leaves the block passes unchanged. If it says that memory has run out, the next load of the
        model waits for more room than this copy had, and idle copies on its device are unloaded, so that another
        attempt finds more.

        Blocks may be nested, and loaders may use other models. A copy that runs alone to be measured stops running
        alone when its thread asks for another copy. Raises DeadlockError if the thread would wait for something that
        only it can release, because it holds it in blocks or is loading it: another copy of its model when all
        `max_model_copies` are its own; its own tag, in a loader; memory that its own copies take; or a load or unload
        on devices that it keeps quiet itself (`steady=True`, in a loader, or by a lease if the program has no other
        thread that could settle it). Tasks (`model_async`) are not checked for that.
        """
        check_names(options)
        return Block(self._attachment, tag, loader_func, options)

    def model_async(
        self, tag: str, loader_func: Callable[[], Any], **options: Unpack[AcquireOptions]
    ) -> AbstractAsyncContextManager[Any]:
        """Acquire a copy for the length of an `async with` block, without a thread for each task that waits.

        Otherwise it is like `model`: the same queue, the same errors. The loader is not a coroutine function, and runs
        in a thread. A task that is cancelled while it waits leaves the queue. If it is cancelled while it loads, the
        load continues, and the copy is idle afterwards. See `mpmm.model_manager.async_acquire`.
        """
        if not isinstance(tag, str) or not callable(loader_func) or inspect.iscoroutinefunction(loader_func):
            raise InvalidArgumentError(
                f"model {tag!r}, loader {loader_func!r}: expected a str and a callable that is no coroutine function"
            )
        check_names(options)
        # Imported here, because importing asyncio takes longer than importing all of this package.
        from mpmm.model_manager.async_block import AsyncBlock

        return AsyncBlock(self._attachment, tag, loader_func, options)

    def uses(
        self,
        tag: str,
        loader_func: Callable[[], Any],
        *,
        argument: str = "model",
        **options: Unpack[AcquireOptions],
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator: the function is called with a copy of a model, held for the length of the call.

            @manager.uses("detector", load)
            def detect(image, *, model): ...

            detect(image)

        A coroutine function waits for the copy as `model_async` does. argument: the parameter that receives the copy;
        the decorated function's signature lacks it, so that web frameworks do not ask for it. Options are those of
        `acquire_model`.

        Raises InvalidArgumentError, at once, if the function has no such parameter.
        """
        encoded_tag(tag)
        if not callable(loader_func):
            raise InvalidArgumentError(f"model {tag!r}, loader {in_brief(loader_func)}: expected a callable")
        check_names(options)
        hold = functools.partial(self.model, tag, loader_func, **options)
        hold_async = functools.partial(self.model_async, tag, loader_func, **options)
        return lambda function: given_instance(function, tag, argument, hold, hold_async)

    @closed_by_shutdown
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
        """Wait for a lease on `mb` MB, for something other than a model, and return it.

        It is admitted like a load: it waits its turn, idle copies are evicted for it, and its memory counts as used
        until it is given back, by `release` or the end of a `with` block, or until this process ends. Keep the lease:
        if nothing refers to it any more, it ends, with a warning.

        mb: the most memory that will be used. name: for people; several leases may have the same one.
        timeout_seconds: None stands for `wait_timeout_seconds`; `math.inf` waits for as long as it takes, and 0 takes
            only memory that is free now, and evicts nothing.
        devices, span, priority: as for `acquire_model`; of several devices each gives an equal share.
        steady: until its `settled` is called, nothing else is loaded or unloaded on its devices, see `acquire_model`.

        Raises LeaseTooLargeError if no device is large enough, AcquireTimeoutError, NamespaceResetError,
        DeadlockError (see `model`), TableFullError, InvalidArgumentError, ClosedError, LockTimeoutError.
        """
        encoded = encode_text(name, Model.TAG_BYTES, "name of a lease")
        mb = checked_number(f"lease {name!r}: mb", mb, 0.0, math.inf, "a number of MB", above=True, finite=True)
        timeout_s = self._timeout_s(timeout_seconds)
        refuse_while_importing_main("reserve memory for", name)
        session = self._connected()
        options = AcquireOptions(devices=devices, span=span, priority=priority, steady=steady)
        request = read_options(options, session.samples)
        return reserve(self._attachment, session, name, encoded, float(mb), request, timeout_s)

    @closed_by_shutdown
    def preload(
        self,
        tag: str,
        loader_func: Callable[[], Any],
        *,
        copies: int = 1,
        timeout_seconds: float | None = None,
        if_free: bool = False,
        state: str = "idle",
        **options: Unpack[AcquireOptions],
    ) -> int:
        """Load copies until this process can use `copies` of them; return how many this call has loaded.

        They are loaded one after another in the calling thread, behind all requests that wait for a model to use; idle
        copies are evicted for them if need be. The loaded copies are not held: they are idle afterwards, and may be
        evicted like any other; `pin` keeps them. Copies that other processes load meanwhile count, and
        `max_model_copies` ends it early.

        timeout_seconds: for each load, and for the suspension; None stands for `wait_timeout_seconds`, and 0 evicts
            nothing. Options are those of `acquire_model`.
        if_free: load only what fits beside everything that is loaded now: nothing is evicted for it, and it does not
            wait. Copies that do not fit are not loaded, and that is no error.
        state: `idle`, or `suspended` to have the idle copies of the model suspended once all are loaded, as `suspend`
            does: they take memory of the host, and are resumed when a request asks for the model. Suspended copies
            count then. Copies that cannot be suspended stay idle.

        Raises what `acquire_model` and `suspend` do; ModelTooLargeError also if this many copies can never be loaded at
        once.
        """
        if not isinstance(tag, str) or not callable(loader_func):
            raise InvalidArgumentError(f"model {tag!r}, loader {loader_func!r}: expected a str and a callable")
        encoded_tag(tag)
        copies = checked_whole(f"preload of {tag!r}: copies", copies, 1, Capacities().instances, "a count")
        if state not in PRELOAD_STATES:
            raise InvalidArgumentError(f"preload of {tag!r}: state={in_brief(state)}: expected idle or suspended")
        timeout_s = self._timeout_s(timeout_seconds)
        refuse_while_importing_main("preload the model", tag)
        session = self._connected()
        suspender = session.suspender
        if state == "suspended" and suspender.suspended_of(tag) + suspender.loaded_of(tag) >= copies:
            suspend_all(session, tag, timeout_s)
            return 0
        request = read_options(options, session.samples)
        if if_free:
            request = request._replace(if_free=True)
        operation = session.begin(sys._getframe())
        try:
            acquisition = self._attachment.acquisition(
                session, operation, tag, request, timeout_s=timeout_s, preload=copies
            )
            loaded = preload(acquisition, loader_func)
        except BaseException:
            session.abandon(operation)
            raise
        session.end(operation)
        if state == "suspended":
            suspend_all(session, tag, timeout_s)
        return loaded

    @closed_by_shutdown
    def pin(self, tag: str, *, for_all: bool = False) -> None:
        """Protect all idle copies of a model, present and future, from eviction and `idle_ttl_seconds`.

        The pin belongs to this process, whichever of its threads or managers asks. It lasts until `unpin`, or until the
        process leaves or dies: no other process could tell whether a dead one would still want it. A second pin changes
        nothing. Only `unload` and `force_reset` unload pinned copies.

        for_all: the pin belongs to the namespace instead, and lasts until any process, or `mpmm unpin`, ends it.

        Raises TableFullError, InvalidArgumentError, ClosedError, LockTimeoutError.
        """
        encoded_tag(tag)
        session = self._connected()
        operation = session.begin(sys._getframe())
        try:
            pin(session, tag, for_all, time.monotonic() + self._attachment.settings.wait_timeout_seconds)
        finally:
            session.end(operation)

    @closed_by_shutdown
    def unpin(self, tag: str, *, for_all: bool = False) -> None:
        """End this process's pin on a model, or that of the namespace if `for_all`.

        Raises NotAcquiredError if there is none, ClosedError, LockTimeoutError.
        """
        encoded_tag(tag)
        session = self._connected()
        if for_all:
            unpin_for_all(session.namespace, session.scheduler, tag)
            return
        operation = session.begin(sys._getframe())
        try:
            unpin(session, tag)
        finally:
            session.end(operation)

    @closed_by_shutdown
    def unload(self, tag: str, *, timeout_seconds: float | None = None) -> int:
        """Unload all copies of a model, in all processes; return how many there are.

        Idle copies are unloaded at once, even pinned ones. Copies in use, or being loaded, are given to no other
        request, and are unloaded when they are released. A later request loads a new copy.

        timeout_seconds: how long to wait until they are gone; None stands for `wait_timeout_seconds`, and 0 does not
            wait.

        Raises UnloadTimeoutError if some are still there then; DeadlockError (see `model`), with nothing changed, if
        the calling thread would wait for a copy that it holds in a block or loads itself, or keeps the device of one
        quiet; InvalidArgumentError, ClosedError, LockTimeoutError.
        """
        encoded_tag(tag)
        timeout_s = self._timeout_s(timeout_seconds)
        session = self._connected()
        operation = session.begin(sys._getframe())
        try:
            if timeout_s > 0:
                expect_not_held(session, tag)
                expect_not_kept_quiet(session, tag, "unload")
            asked = unload_model(session.namespace, session.scheduler, tag)
            session.unloads.unload_in_thread()
            if timeout_s > 0:
                wait_for_unload(session.namespace, asked, timeout_s, lambda: session.closing)
        finally:
            session.end(operation)
        return asked.copies

    @property
    @closed_by_shutdown
    def settings(self) -> dict[str, float | None]:
        """The parameters of the namespace that `update_settings` changes, as they are now; None is no limit."""
        namespace = self._connected().namespace
        with namespace.transaction():
            values = {name: getattr(namespace.settings, name) for name in CHANGEABLE}
        return {name: None if math.isinf(value) else value for name, value in values.items()}

    @closed_by_shutdown
    def update_settings(self, **changes: float | None) -> None:
        """Change settings of the namespace, under their names in `ModelManager(…)`, for all its processes.

        They are checked as at creation, and either all of them change or none; None means no limit. Every process
        follows them from its next transaction on, and the policy decides anew at once for all waiting requests. No copy
        is unloaded for a change, except those beyond a lower `max_model_copies`: idle ones at once, others when they
        are released. Pinned models keep their copies, but get no more.

        Raises InvalidArgumentError, also for `suspend`, for `wait_timeout_seconds`, which is each manager's own, and
        for settings that the memory source was made with; ClosedError, LockTimeoutError.
        """
        session = self._connected()
        operation = session.begin(sys._getframe())
        try:
            change_settings(session.namespace, session.scheduler, changes)
            session.unloads.unload_in_thread()
        finally:
            session.end(operation)

    @closed_by_shutdown
    def suspend(self, tag: str, *, timeout_seconds: float | None = None) -> int:
        """Suspend the idle copies of a model, if they can be suspended; return how many are. See `mpmm.suspend`.

        The next request for the model resumes one, and so does `resume`. Copies in use stay as they are; so do those
        for which the host has no room, unless other suspended copies can be dropped for them. A copy on a device where
        something starts undisturbed (`steady=True`) is suspended after that.

        timeout_seconds: how long to wait until they are suspended; None stands for `wait_timeout_seconds`, and 0 does
            not wait, and returns how many will be suspended.

        Raises SuspendTimeoutError if some are still to be suspended then; DeadlockError (see `model`), with nothing
        changed, if the calling thread keeps the device of one quiet itself; InvalidArgumentError, ClosedError,
        LockTimeoutError.
        """
        encoded_tag(tag)
        timeout_s = self._timeout_s(timeout_seconds)
        return suspend_all(self._connected(), tag, timeout_s)

    @closed_by_shutdown
    def resume(self, tag: str, *, timeout_seconds: float | None = None) -> int:
        """Resume the suspended copies of a model that this process can use; return how many are, and idle now.

        They wait their turn like a preload, and idle copies are evicted for them. timeout_seconds: for each of them;
        None stands for `wait_timeout_seconds`, and 0 evicts nothing.

        Raises AcquireTimeoutError, NamespaceResetError, DeadlockError (see `model`), TableFullError,
        InvalidArgumentError, ClosedError, LockTimeoutError.
        """
        encoded_tag(tag)
        timeout_s = self._timeout_s(timeout_seconds)
        session = self._connected()
        operation = session.begin(sys._getframe())
        try:
            resumed = resume_all(self._attachment.acquisition(session, operation, tag, timeout_s=timeout_s))
        except BaseException:
            session.abandon(operation)
            raise
        session.end(operation)
        return resumed

    @property
    def namespace(self) -> str:
        """Name of the namespace."""
        return self._attachment.name

    @closed_by_shutdown
    def tickets(self) -> list[QueueTicket]:
        """Return the tickets of all requests that wait now, in the order of the queue."""
        return waiting_tickets(self._connected())

    def __enter__(self) -> ModelManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __reduce__(self) -> tuple[Any, ...]:
        values = {**self._attachment.arguments(), "autoscaling_metric": self._autoscaling_metric}
        return functools.partial(type(self), **values), ()

    def _timeout_s(self, timeout_seconds: float | None) -> float:
        """Return how many seconds to wait. Raises InvalidArgumentError."""
        if timeout_seconds is None:
            return self._attachment.settings.wait_timeout_seconds
        return checked_timeout("timeout_seconds", timeout_seconds)


# Pickles, tracebacks and documentation name the module that users import it from.
ModelManager.__module__ = "mpmm.model_manager"
