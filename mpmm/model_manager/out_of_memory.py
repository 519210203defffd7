"""How a process reacts when a load, or the use of a model, has run out of device memory.

It records that the model needs more than there was, tells whether another try may find more, and makes room. The record
counts for all processes; see `mpmm.policy.out_of_memory`.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import partial

from mpmm.errors import LockTimeoutError
from mpmm.memory.beam_metrics import report_estimate
from mpmm.memory.samples import SharedSamples
from mpmm.model_manager.deferred import NOW_S
from mpmm.model_manager.unload import Unloads
from mpmm.policy.out_of_memory import bound_mb, raised_estimate_mb
from mpmm.policy.view import Reason
from mpmm.scheduling import Copies, Scheduler
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Instance, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction
from mpmm.text.printable import printable_logger

__all__ = ["FreeMemory", "OutOfMemory"]

_LOG = printable_logger("mpmm")


@dataclass(frozen=True)
class FreeMemory:
    """The memory that the devices of a copy had for it when its load began.

    mb: the free memory of the device that had least, times the number of devices; physically free, regardless of slack.
    room_mb: what they could have had for it at best, within their limits, with nothing else of the namespace there.
    alone: nothing else of the namespace was there, except idle copies of pinned models, and no memory was coming back.
    """

    mb: float
    room_mb: float
    alone: bool


class OutOfMemory:
    """How one process handles running out of memory."""

    def __init__(self, namespace: Namespace, scheduler: Scheduler, samples: SharedSamples, unloads: Unloads) -> None:
        self._namespace = namespace
        self._scheduler = scheduler
        self._samples = samples
        self._unloads = unloads

    def devices_in_use(self, tag: str) -> int:
        """Return the bits of the devices on which this process holds copies of a model."""
        namespace = self._namespace
        tables = namespace.tables
        with namespace.transaction():
            model = tables.model_row(tag)
            rows = tables.rows_where(namespace.segment.layout.instances, Instance.HOLDER, namespace.reference)
            bits = 0
            for instance in (tables.instances[row] for row in rows):
                if instance.state == Instance.ACTIVE and instance.model == model:
                    bits |= instance.device_bits
            return bits

    def free_for_load(self, row: int) -> FreeMemory | None:
        """Return what the devices have for a copy that is about to load; None if nothing measures memory.

        None as well if the lock is not free at once: a load does not wait for it.
        """
        namespace = self._namespace
        tables = namespace.tables
        if tables.header.source_accounting_only:
            return None
        with contextlib.suppress(LockTimeoutError), namespace.transaction(NOW_S):
            devices = tables.instances[row].devices
            own_mb = tables.instances[row].reserved_mb / len(devices)
            copies = self._scheduler.read_copies()
            views = [view for view in self._scheduler.device_views(copies) if view.device in devices]
            free_mb = min(view.total_mb - view.used_mb - max(0.0, view.reserved_mb - own_mb) for view in views)
            coming = any(view.unloading or view.returning_mb > 0 for view in views)
            room_mb = min(self._room_mb(device, copies) for device in devices)
            return FreeMemory(free_mb * len(devices), room_mb * len(devices), not coming and not self._neighbours(row))
        return None

    def could_gain(self, row: int, free: FreeMemory | None, places: int) -> bool:
        """Tell whether a load that has run out of memory could find more once others are unloaded. Needs the lock.

        row: the copy that was to be loaded. places: bits of the devices where it may load, 0 for all.
        """
        if free is None or not free.alone or self._neighbours(row):
            return True
        here = self._namespace.tables.instances[row].device_bits
        return self._roomiest_mb(places, here.bit_count(), here, free.mb) > free.mb

    def _neighbours(self, row: int) -> list[int]:
        """Return the instances beside a copy that could make room for it: all but the idle ones of pinned models."""
        tables = self._namespace.tables
        others = []
        for device in tables.instances[row].devices:
            for other in tables.on_device(device):
                state = tables.instances[other].state
                pinned = tables.models[tables.instances[other].model].pins
                if other != row and state != Instance.SUSPENDED and not (pinned and state == Instance.IDLE):
                    others.append(other)
        return others

    def _roomiest_mb(self, places: int, span: int, here: int = 0, here_mb: float = 0.0) -> float:
        """Return what a copy could get at best on `span` of these devices (bits, 0 for all), beside external memory.

        here: bits of the devices that are known to have no more than `here_mb` for it together.
        """
        copies = self._scheduler.read_copies()
        rooms = [
            here_mb / span if here >> row & 1 else self._room_mb(row, copies)
            for row in device_rows(places) or self._samples.rows()
        ]
        return min(sorted(rooms)[-span:], default=0.0) * span

    def _room_mb(self, device: int, copies: Copies) -> float:
        """Return how much of a device one copy could have, with the device to itself: see `admission.widened`."""
        view = next(view for view in self._scheduler.device_views(copies) if view.device == device)
        return min(self._scheduler.limit_mb(device), view.total_mb - max(0.0, view.external_least_mb))

    def learn_from_load(self, t: Transaction, row: int, free: FreeMemory | None, places: int, first: bool) -> None:
        """Record that a load has run out of memory, before its row is freed.

        row, free, places: see `could_gain`. first: it may get a second turn. If nothing can be measured, the model's
        estimate is raised by a quarter for that turn; else the model is taken to need more than was free, less what
        others have begun to take since.
        """
        namespace = self._namespace
        tables = namespace.tables
        instance = tables.instances[row]
        model, here = instance.model, instance.device_bits
        span = here.bit_count()
        at_least_mb = 0.0
        if free is not None:
            others = [tables.instances[other] for other in self._neighbours(row)]
            came_mb = math.fsum(other.mb for other in others if other.generation > instance.generation)
            room_mb = self._roomiest_mb(places, span, here, free.room_mb)
            at_least_mb = bound_mb(free.mb - came_mb * span, room_mb)
        namespace.transitions.estimates.record_out_of_memory(t, model, at_least_mb, loading=True)
        if free is None and first and tables.header.source_accounting_only:
            self._raise_by_a_quarter(t, model, here)
        self._say_ran_out(t, model)

    def _raise_by_a_quarter(self, t: Transaction, model: int, devices: int) -> None:
        """Raise a model's estimate by a quarter, because no source measures it."""
        need_mb = self._scheduler.need_mb(model)
        limit_mb = max(map(self._scheduler.limit_mb, device_rows(devices)), default=need_mb)
        raised_mb = raised_estimate_mb(need_mb, limit_mb)
        measured = self._namespace.tables.models[model].measured
        self._namespace.transitions.estimates.estimate(t, model, raised_mb, measured)
        t.after.append(partial(report_estimate, self._namespace.tables.tag_of(model), raised_mb))

    def _say_ran_out(self, t: Transaction, model: int) -> None:
        namespace = self._namespace
        shown, mb = namespace.tables.shown(model), namespace.tables.models[model].at_least_mb
        text = "mpmm %s: pid %d ran out of memory with %s, which needs more than %.0f MB"
        if not mb:
            text = "mpmm %s: pid %d ran out of memory with %s, assumed to need %.0f MB"
            mb = self._scheduler.need_mb(model)
        t.after.append(partial(_LOG.warning, text, namespace.name, namespace.pid, shown, mb))

    def make_room_after_use(self, tag: str) -> None:
        """Learn from a use of a model that has run out of memory, and unload idle copies on its devices.

        A copy of this process had what it takes and all that was free besides: it needs more than that, and at least a
        quarter more than its estimate, because its work space may not be in the figures. The estimate itself stays: it
        is what a copy takes, whatever it was asked to do.
        """
        namespace = self._namespace
        tables = namespace.tables
        devices = self.devices_in_use(tag)
        with namespace.transaction() as t:
            model = tables.model_row(tag)
            if model is None:
                return
            if tables.header.source_accounting_only or not devices:
                namespace.transitions.estimates.record_out_of_memory(t, model)
                self._raise_by_a_quarter(t, model, devices)
            else:
                rows = tables.rows_where(namespace.segment.layout.instances, Instance.HOLDER, namespace.reference)
                ours = [tables.instances[tables.copy_of(row)] for row in rows if tables.instances[row].model == model]
                span = max((len(instance.devices) for instance in ours), default=1)
                own_mb = max((instance.mb for instance in ours), default=0.0)
                views = self._scheduler.device_views(self._scheduler.read_copies())
                free = [v.total_mb - v.used_mb - v.reserved_mb for v in views if devices >> v.device & 1]
                limit_mb = self._roomiest_mb(devices, span)
                had_mb = own_mb + max(0.0, min(free)) * span
                at_least_mb = max(had_mb, raised_estimate_mb(self._scheduler.need_mb(model), limit_mb))
                namespace.transitions.estimates.record_out_of_memory(t, model, bound_mb(at_least_mb, limit_mb))
            self._say_ran_out(t, model)
        self.make_room(devices)

    def make_room(self, devices: int) -> None:
        """Admission was wrong, so unload idle copies on these devices (bits), except those of pinned models."""
        namespace = self._namespace
        tables = namespace.tables
        with namespace.transaction() as t:
            for row in tables.idle_copies():
                instance = tables.instances[row]
                pinned = tables.models[instance.model].pins
                # A twin is unloaded together with an earlier row.
                if instance.state == Instance.IDLE and instance.device_bits & devices and not pinned:
                    cause = Cause(Reason.OUT_OF_MEMORY)
                    namespace.transitions.unloads.begin(t, row, namespace.slot, evicted=True, cause=cause)
        self._unloads.unload_assigned()
