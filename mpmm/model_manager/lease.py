"""A lease: so much memory of a device for whatever its holder does with it, counted like a model by everybody."""

from __future__ import annotations

import math
import os
import sys
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

from mpmm.shared_state.layout import Device, Instance, device_rows
from mpmm.shared_state.transaction import Transaction
from mpmm.sources.visible_devices import visible_devices
from mpmm.text.arguments import LARGEST_PID, checked_whole

if TYPE_CHECKING:
    from mpmm.model_manager.operations import Operation
    from mpmm.model_manager.session import Worker

__all__ = ["Lease"]


class Lease:
    """Memory that this process has been given, until `release`, the end of a `with` block, or its own end.

    A lease that nothing refers to any more ends, too, with a warning: nobody could release it. `ModelManager.reserve`
    makes them. name, mb: what it was asked for. placement: where it is, see `mpmm.placement`.
    """

    def __init__(self, worker: Worker, row: int, name: str, mb: float, attachment: object = None) -> None:
        """Take possession of a LEASED row. Needs the lock.

        attachment: kept alive for as long as the lease is, because one that is collected leaves the namespace.
        """
        words, at = worker.namespace.segment.words, worker.namespace.tables.instance(row)
        self.name = name
        self.mb = mb
        self.placement = worker.samples.placement_of(words[at + Instance.DEVICES])
        self._worker = worker
        self._attachment = attachment
        self._row = row
        self._generation = words[at + Instance.GENERATION]
        self._operation: Operation | None = None

    @property
    def reference(self) -> tuple[int, int]:
        """Row and generation."""
        return self._row, self._generation

    def answer_for(self, operation: Operation) -> None:
        """Own what the call that has made this lease has in hand: the keeper ends the lease once it is collected."""
        self._operation = operation
        operation.warning = (
            f"lease {self.name!r} of {self.mb:g} MB was collected before it was released, and has ended; keep it for "
            "as long as its memory is in use"
        )
        operation.owner = weakref.ref(self)
        # From here on this object answers for the lease.
        operation.frame = None

    def release(self) -> None:
        """Give the memory back. Again, after `shutdown`, or in a forked child, which has no part in it: nothing.

        When the lock is not to be had at once, it is given back as soon as it is.
        """
        worker = self._worker
        if not worker.namespace.is_usable:
            return
        operation = self._operation or worker.begin(sys._getframe())
        operation.booking = self.reference
        operation.thread = threading.get_ident()
        # From here on the keeper ends it if this cannot.
        operation.frame = sys._getframe()
        self._operation = None
        # It is given back, so nothing is to be said when this object is collected before the keeper has seen to it.
        operation.warning = ""
        try:
            worker.deferred.apply_or_defer(self._end)
            operation.booking = operation.ticket = None
        finally:
            worker.abandon(operation)

    def _end(self, t: Transaction) -> bool:
        is_ours = self._is_ours()
        if is_ours:
            self._worker.namespace.transitions.leases.end(t, self._row)
        return is_ours

    def used_by(self, pid: int) -> None:
        """Say which process is going to use the memory, this one or another.

        Where a source measures single processes, what that one takes, and what it starts, is then not counted beside
        the lease. Neither may hold objects of this namespace's models: their memory would pass for the lease's. (Model
        servers are told apart.) Raises InvalidArgumentError for an impossible pid.
        """
        pid = checked_whole(f"lease {self.name!r}: pid", pid, 1, LARGEST_PID, "the number of a process")
        worker = self._worker
        if not worker.namespace.is_usable:
            return

        def link(t: Transaction) -> bool:
            if self._is_ours():
                worker.namespace.transitions.leases.link_program(t, self._row, pid)
            return False

        worker.deferred.apply_or_defer(link)

    @property
    def is_held(self) -> bool:
        """False once it has been given back."""
        worker = self._worker
        if not worker.namespace.is_usable:
            return False
        with worker.namespace.transaction():
            return self._is_ours()

    def descriptor(self) -> int:
        """Return a new descriptor that keeps the lease from ending with this process, for a child to inherit.

        A lease ends when no process has one open any more, or by `release`. The caller closes it.
        """
        return os.dup(self._worker.namespace.life_fd)

    def settled(self) -> None:
        """End the quiet of a lease that was asked for with `steady=True`: others load and unload there again.

        Again, or without that: nothing. When the lock is not to be had at once, it ends as soon as it is.
        """
        if self._worker.namespace.is_usable:
            self._worker.deferred.apply_or_defer(self._settle)

    def _settle(self, t: Transaction) -> bool:
        is_ours = self._is_ours()
        if is_ours:
            self._worker.namespace.transitions.isolation.end_steady(t, self._row)
        return is_ours

    def environment(self) -> dict[str, str]:
        """Return what a program should know that uses the memory, as variables for its environment.

        MPMM_LEASE_MB: how much it is, in MB. MPMM_DEVICES: its devices, as `CUDA_VISIBLE_DEVICES` takes them.
        MPMM_MEMORY_FRACTION: its share of the memory of each, rounded down, as engines want it that size themselves
        (`gpu_memory_utilization` of vLLM); missing where the total of a device is not known. Raises ClosedError.
        """
        namespace = self._worker.namespace
        words, floats, tables = namespace.segment.words, namespace.segment.floats, namespace.tables
        uuids = self.placement.uuids
        known = {"MPMM_LEASE_MB": str(int(self.mb)), "MPMM_DEVICES": visible_devices(uuids) or ",".join(uuids)}
        with namespace.transaction():
            devices = device_rows(words[tables.instance(self._row) + Instance.DEVICES]) if self._is_ours() else []
            total_mb = min((floats[tables.device(device) + Device.TOTAL_MB] for device in devices), default=0.0)
        if total_mb > 0:
            fraction = min(self.mb / len(devices) / total_mb, 1.0)
            known["MPMM_MEMORY_FRACTION"] = f"{math.floor(fraction * 1000) / 1000:.3f}"
        return known

    def _is_ours(self) -> bool:
        """Tell whether the row still is this lease; the lock must be held."""
        namespace = self._worker.namespace
        words, at = namespace.segment.words, namespace.tables.instance(self._row)
        return bool(words[at] == Instance.LEASED and words[at + Instance.GENERATION] == self._generation)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Lease(name={self.name!r}, mb={self.mb:g})"
