"""Making the instance that the queue has granted: one run of a loader, or one resume of a suspended instance.

No lock is held while the loader runs. Only its outcome is recorded: how large the instance is, or that the load failed.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from mpmm.errors import (
    ClosedError,
    InvalidArgumentError,
    LoadTimeoutError,
    LockTimeoutError,
    NamespaceResetError,
    ReentrantCallError,
)
from mpmm.memory.beam_metrics import report_estimate, report_model_count
from mpmm.memory.estimator import GROWTH_SD, Estimate
from mpmm.memory.placement import SHARE_VARIABLES, placed
from mpmm.model_manager.acquisition import Acquisition, Booking
from mpmm.model_manager.deferred import NOW_S
from mpmm.model_manager.fresh_figures import Growth
from mpmm.model_manager.operations import LoadedInstance
from mpmm.model_manager.out_of_memory import FreeMemory
from mpmm.model_manager.refusals import taken_away
from mpmm.model_manager.server_duty import server_context
from mpmm.model_manager.session import Session
from mpmm.model_manager.unload import collect_garbage, unload_made
from mpmm.model_manager.waits import decision, says_more, where
from mpmm.multi_process_shared.context import served_namespaces, serving_for
from mpmm.multi_process_shared.host import declared_mb
from mpmm.multi_process_shared.sleeping import record_of
from mpmm.policy.out_of_memory import is_out_of_memory
from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Instance
from mpmm.shared_state.tables import encoded_handle
from mpmm.shared_state.transaction import Transaction
from mpmm.text.arguments import in_brief
from mpmm.text.printable import printable_logger

__all__ = ["LoadAttempt", "give_up_booking", "resume"]

_LOG = printable_logger("mpmm")
# Errors that end a load without being a failure of its loader.
_NOT_THE_LOADERS = (ClosedError, LockTimeoutError, NamespaceResetError)


class _Size(NamedTuple):
    """How much memory an instance is assumed to take, in MB.

    shares_mb: on each device, if measured. learnt: what that says about the model.
    """

    mb: float
    shares_mb: tuple[float, ...] = ()
    learnt: Estimate | None = None


class LoadAttempt:
    """One run of a loader. last: there is no further turn after it.

    devices: bits of those on which it loads; places: of those on which it might. again: it has run out of memory, and
    may find more in another turn.
    """

    def __init__(self, acquisition: Acquisition, booking: Booking, loader: Callable[[], Any], last: bool) -> None:
        session = acquisition.session
        self.devices = session.namespace.tables.instances[booking.row].device_bits
        self.places = acquisition.request.loadable_on or session.samples.visible_bits()
        self.again = False
        self._could_gain = False
        # How many resets there had been when it began.
        self._resets = 0
        self._session = session
        self._operation = acquisition.operation
        self._tag = acquisition.tag
        self._booking = booking
        self._loader = loader
        self._last = last
        self._steady = acquisition.request.steady
        # The memory that the devices had for it when it began.
        self._free: FreeMemory | None = None

    def run(self) -> LoadedInstance:
        """Run the loader, and return the instance that it made, which this process holds.

        Raises what the loader raises, LoadTimeoutError, NamespaceResetError, ClosedError, LockTimeoutError.
        """
        session, booking = self._session, self._booking
        began, self._resets = time.monotonic(), session.namespace.tables.header.resets
        value: Any = None
        try:
            growth = self._begin()
            session.thread.loads.append((booking.row, booking.generation))
            try:
                placement = session.samples.placement_of_instance(booking.row)
                # Otherwise servers might inherit the share of this process's lease, or of an enclosing load.
                tells_share = self._steady or bool(served_namespaces() or os.environ.keys() & {*SHARE_VARIABLES})
                context = server_context(
                    session.namespace, session.source, placement, booking.row, tells_share=tells_share
                )
                with serving_for(context), placed(placement):
                    value = self._loader()
            finally:
                session.thread.loads.remove((booking.row, booking.generation))
            copy = None
            while copy is None:
                if encoded_handle(value):
                    self._wake(value)
                elif isinstance(value, str):
                    self._warn_of_no_handle(value)
                # The load has taken seconds; giving up on a crowded lock after one second would waste them.
                with session.namespace.lock.patient_here():
                    copy = self._book_in(value, growth)
        except BaseException as error:
            if self._is_booked_in():
                raise
            in_time = self._give_up(error)
            if not self._others_have(value):
                unload_made(value)
            value = None
            collect_garbage()
            text, seconds = "mpmm %s: pid %d failed to load %s after %.1f s: %s", time.monotonic() - began
            name, pid = session.namespace.name, session.namespace.pid
            shown = session.namespace.tables.shown_for(self._tag) if says_more(_LOG) else self._tag
            _LOG.info(text, name, pid, shown, seconds, type(error).__name__)
            if not in_time and not isinstance(error, LoadTimeoutError):
                self._expect_not_given_up(error)
            # Set only now: an exception from a signal handler until here ends the call, without another turn.
            self.again = self._could_gain
            raise
        self._log_loaded(copy, time.monotonic() - began)
        return copy

    def _wake(self, handle: str) -> None:
        """Resume the suspended copy whose handle the loader has returned, if there is one."""
        session = self._session
        waking = session.begin(sys._getframe())
        try:
            session.suspender.wake(handle, self._tag, lambda copy: setattr(waking, "booking", copy))
        except BaseException:
            session.abandon(waking)
            raise
        session.end(waking)

    # ---- before the loader runs ----------------------------------------------------------------------------

    def _begin(self) -> Growth:
        """Take the figures against which the load will be measured."""
        session, booking = self._session, self._booking
        if inspect.iscoroutinefunction(self._loader):
            raise InvalidArgumentError(
                f"loader {self._loader!r} of {self._tag!r}: expected a callable that is no coroutine function"
            )
        self._log_begin()
        if booking.alone:
            # What the load adds is measured against this figure, so it must be a new one, however long that takes.
            session.figures.sample()
            session.figures.reset_peak()
            with session.namespace.transaction() as t:
                # The sample may have taken long enough for the load to be given up, and the row may be another load's.
                self._expect_ours()
                session.namespace.transitions.isolation.set_baseline(t, booking.row)
        growth = session.figures.measuring_growth()
        self._free = session.out_of_memory.free_for_load(booking.row)
        if booking.alone:
            session.thread.alone = booking.row, booking.generation
        return growth

    def _log_begin(self) -> None:
        """Log that a load begins, with how much memory, where and why."""
        if says_more(_LOG):
            namespace, row = self._session.namespace, self._booking.row
            mb = namespace.tables.instances[row].reserved_mb
            why = decision(namespace, EventKind.LOAD_BEGAN, row)
            text = "mpmm %s: pid %d begins to load %s, %.0f MB reserved on %s%s"
            shown, place = namespace.tables.shown_for(self._tag), where(namespace, row)
            _LOG.info(text, namespace.name, namespace.pid, shown, mb, place, f": it {why}" if why else "")

    # ---- after it has returned -----------------------------------------------------------------------------

    def _book_in(self, value: Any, growth: Growth) -> LoadedInstance | None:
        """Record the instance that the loader has made, and its size; this process holds it from then on.

        Return None, and record nothing, if another copy with its handle has been suspended since `_wake` looked.
        """
        session, namespace, row, tag = self._session, self._session.namespace, self._booking.row, self._tag
        tables = namespace.tables
        handle = encoded_handle(value)
        # None also for an object, or for a handle without a server.
        record = record_of(value) if handle else None
        server_pid = record.pid if record is not None and record.is_running() else None
        # Read here, because an object's attribute may be code, which must not run under the lock.
        own_mb = declared_mb(record if handle else value)
        seen = session.figures.sample_after_load(row)
        grown_mb = growth.mb() if seen and not handle else 0.0
        way = session.suspender.way_of(value, row)
        with namespace.transaction() as t:
            self._expect_ours()
            if handle and session.suspender.is_in_host(value):
                return None
            instance = tables.instances[row]
            model, server = instance.model, 0 if instance.server is None else instance.server + 1
            if not server and server_pid == namespace.pid:
                server = namespace.reference
            size = self._size_of(t, own_mb, server, grown_mb)
            has_server = server_pid is not None
            is_twin = namespace.transitions.loads.end(t, row, handle, size.mb, server, has_server, size.shares_mb)
            if way:
                namespace.transitions.suspensions.note_way(t, row, way)
            if is_twin:
                self._warn_of_twins(t, value)
            learnt_mb = self._learn(t, size)
            if tables.header.source_measures_processes and tables.models[model].known:
                # It was loaded alone only to find out whether the source measures processes; now it is measured.
                namespace.transitions.isolation.end(t, row)
            loaded = tables.models[model].copies
            copy = session.held.add_loaded(row, tag, value, self._operation)
            session.scheduler.advance(t)
        report_model_count(tag, loaded)
        if learnt_mb is not None:
            report_estimate(tag, learnt_mb)
        return copy

    def _size_of(self, t: Transaction, own_mb: float | None, server: int, grown_mb: float) -> _Size:
        """Return the instance's size: its server's if measured, else this process's growth, else what is expected.

        own_mb: what its object declares. server: a reference, 0 if it has none. Needs the lock.
        """
        session, namespace = self._session, self._session.namespace
        instance = namespace.tables.instances[self._booking.row]
        shares_mb = session.figures.measured_shares(self._booking.row, server)
        if math.fsum(shares_mb) > 0:
            return _Size(math.fsum(shares_mb), shares_mb, Estimate(max(shares_mb) * len(shares_mb), 0.0))
        if grown_mb > 0:
            return _Size(grown_mb, (), Estimate(grown_mb, GROWTH_SD * grown_mb))
        model = instance.model
        if own_mb is not None:
            namespace.transitions.estimates.expect(t, model, own_mb)
            return _Size(session.scheduler.expected_mb(model), shares_mb)
        # At most what the policy has found room for: on a smaller device the default is reduced.
        return _Size(min(session.scheduler.expected_mb(model), instance.reserved_mb), shares_mb)

    def _warn_of_no_handle(self, text: str) -> None:
        """Log, once per tag, that a loader has returned a text that is kept as an object of this process."""
        session, tag = self._session, self._tag
        if tag not in session.tags_without_handles:
            session.tags_without_handles.add(tag)
            shown = session.namespace.tables.shown_for(tag)
            _LOG.warning(
                "mpmm %s: pid %d: the loader of %s has returned %s, which can be no handle (a str of 1 to %d bytes "
                "that can be encoded): it is kept as an object of this process, and no other process uses it",
                *(session.namespace.name, session.namespace.pid, shown, in_brief(text), Instance.HANDLE_BYTES),
            )

    def _warn_of_twins(self, t: Transaction, handle: str) -> None:
        """Log, once per tag, that a loader has returned a handle that was returned before."""
        session, tag = self._session, self._tag
        if tag not in session.tags_with_twins:
            session.tags_with_twins.add(tag)
            text = (
                "mpmm %s: pid %d: the loader of %s has returned the handle %r, whose object is "
                "loaded already: it is counted once, and unloaded with the last copy; let the loader return a new "
                "handle each time, or set max_model_copies=1"
            )
            shown = session.namespace.tables.shown_for(tag)
            t.after.append(partial(_LOG.warning, text, session.namespace.name, session.namespace.pid, shown, handle))

    def _learn(self, t: Transaction, size: _Size) -> float | None:
        """Record what the model takes, if it is not known yet; return it in MB if it was recorded."""
        session, namespace = self._session, self._session.namespace
        instance = namespace.tables.instances[self._booking.row]
        model = instance.model
        if namespace.tables.models[model].known:
            return None
        if size.learnt is not None:
            namespace.transitions.estimates.estimate(t, model, size.learnt.mb, measured=True, sd_mb=size.learnt.sd_mb)
            return size.learnt.mb
        if not namespace.tables.header.source_accounting_only:
            return None
        # Without a measurement the assumed size counts, even if leases have left less of the device this time.
        devices = instance.devices
        most_mb = min(map(session.scheduler.limit_mb, devices)) * len(devices)
        mb = min(session.scheduler.expected_mb(model), max(size.mb, most_mb))
        namespace.transitions.estimates.estimate(t, model, mb, measured=False)
        return mb

    def _log_loaded(self, copy: LoadedInstance, seconds: float) -> None:
        if says_more(_LOG):
            namespace = self._session.namespace
            mb = namespace.tables.instances[copy.row].mb
            text = "mpmm %s: pid %d loaded %s in %.1f s: %.0f MB on %s"
            shown, place = namespace.tables.shown_for(self._tag), where(namespace, copy.row)
            _LOG.info(text, namespace.name, namespace.pid, shown, seconds, mb, place)

    def _expect_ours(self) -> None:
        """Raise LoadTimeoutError, NamespaceResetError or ClosedError if the load was given up. Needs the lock."""
        session, tag = self._session, self._tag
        if not _is_ours(session, self._booking):
            self._expect_not_given_up()
            raise taken_away(session, f"ended the load of {session.namespace.tables.called(tag)}", tag)

    # ---- after it has failed -------------------------------------------------------------------------------

    def _is_booked_in(self) -> bool:
        """Tell whether to leave everything to the background thread, which takes back what the call holds.

        So it is if the row stands for the instance, because an exception came after the commit: it is about to become
        idle, like any other. And so it is if only the lock could tell, and is not free.
        """
        session, operation = self._session, self._operation
        at = self._booking.row, self._booking.generation
        if operation.held is None or (operation.held[0].row, operation.held[0].generation) != at:
            # Not committed; but an exception may have come in the middle of recording an object.
            if session.namespace.is_usable:
                session.held.forget_loaded(*at)
            return False
        with suppress(LockTimeoutError, ReentrantCallError, ClosedError), session.namespace.transaction(NOW_S):
            if session.held.is_loaded(*at):
                return True
            # If another thread has struck the object off, that one unloads it.
            is_object = not encoded_handle(operation.held[0].value)
            return session.held.forget_loaded(*at) is None and is_object
        return True

    def _give_up(self, error: BaseException) -> bool:
        """Free the row, and learn from the failure; return False if others have freed it already.

        A failure of the loader itself is recorded, unless there is another turn; see `policy.backoff`.
        """
        session, row = self._session, self._booking.row
        ran_out = is_out_of_memory(error)
        failed = isinstance(error, Exception) and not isinstance(error, _NOT_THE_LOADERS)
        self._could_gain = ran_out and not self._last

        def learn(t: Transaction) -> None:
            if ran_out:
                more = session.out_of_memory.could_gain(row, self._free, self.places)
                self._could_gain = self._could_gain and more
                session.out_of_memory.learn_from_load(t, row, self._free, self.places, not self._last)
            if failed and not self._could_gain:
                namespace = session.namespace
                model = namespace.tables.instances[row].model
                namespace.transitions.models.note_failure(t, model)

        in_time = give_up_booking(session, self._booking, learn)
        self._operation.booking = None
        return in_time

    def _others_have(self, value: Any) -> bool:
        """Tell whether another instance has the handle that the loader has returned; takes no lock.

        A loader may return the handle of an existing server, which others use.
        """
        namespace = self._session.namespace
        handle = encoded_handle(value)
        if not handle or not namespace.is_usable:
            return False
        # Another thread may leave the namespace meanwhile.
        with suppress(ValueError):
            return bool(namespace.transitions.twins.of(handle, self._booking.row))
        return False

    def _expect_not_given_up(self, error: BaseException | None = None) -> None:
        """Raise LoadTimeoutError for a row that was taken away, unless by a reset or shutdown: nothing else takes it.

        error: what the load has raised.
        """
        session, namespace = self._session, self._session.namespace
        # The limit counts from when the load was granted, not from when the loader was called.
        limit_s = namespace.settings.load_timeout_seconds
        if session.closing or not namespace.is_usable or namespace.tables.header.resets != self._resets:
            return
        if limit_s < math.inf:
            raise LoadTimeoutError(
                f"the load of {namespace.tables.called(self._tag)} took longer than {limit_s:g} s and was given up; "
                "load_timeout_seconds sets the limit",
                tag=self._tag,
                timeout_seconds=limit_s,
            ) from error


def resume(acquisition: Acquisition, booking: Booking) -> LoadedInstance | None:
    """Resume a suspended instance, and return it; if that fails, it is unloaded, and None is returned."""
    session, operation = acquisition.session, acquisition.operation
    resumed = session.suspender.resume(booking.row, booking.generation)
    copy: LoadedInstance | None = None
    with session.namespace.transaction() as t:
        if resumed and session.suspender.end_resume(t, booking.row, booking.generation):
            copy = session.held.add(booking.row, acquisition.tag, operation)
            session.owned.add_seats(booking.row)
            session.scheduler.advance(t)
    # Not in the transaction: if that is undone, only the booking still tells of the resume.
    operation.booking = None
    return copy


def give_up_booking(
    session: Session, booking: Booking, learn: Callable[[Transaction], object] = lambda t: None
) -> bool:
    """Free the row of a load that came to nothing, or suspend again an instance that was to be resumed.

    Return False if others have done so already. learn: called in the same transaction, before the row is freed: at
    once, or as soon as the lock is free.
    """
    namespace = session.namespace
    if not namespace.is_usable:
        return False

    def give_up(t: Transaction) -> bool:
        if not _is_ours(session, booking):
            return False
        learn(t)
        if booking.resumes:
            namespace.transitions.suspensions.turn_back(t, booking.row, namespace.reference)
        else:
            # Not merely `loads.fail`: the loader may have started a model server before it failed.
            namespace.transitions.loads.give_up(t, booking.row)
        return True

    return session.deferred.apply_or_defer(give_up) is not False


def _is_ours(session: Session, booking: Booking) -> bool:
    """Tell whether a booking's row is still for this process to load, or to resume. Needs the lock."""
    instance = session.namespace.tables.instances[booking.row]
    return (
        instance.state == (Instance.RESUMING if booking.resumes else Instance.LOADING)
        and instance.generation == booking.generation
        and instance.holder == session.namespace.slot
    )
