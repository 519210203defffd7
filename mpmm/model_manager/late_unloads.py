"""Unloads that take too long: the leader has another process do them, or stops counting on their memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator

from mpmm.model_manager.unload import SHORTEST_UNLOAD_LIMIT_S, Unloads
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Instance, Member
from mpmm.shared_state.namespace import Namespace
from mpmm.text.printable import printable_logger

__all__ = ["LateUnloads"]

_LOG = printable_logger("mpmm")


class LateUnloads:
    """Finds late unloads; for the leader, or the process that stands in for it."""

    def __init__(self, namespace: Namespace, scheduler: Scheduler, unloads: Unloads) -> None:
        """unloads: those of this process."""
        self._namespace = namespace
        self._scheduler = scheduler
        self._unloads = unloads

    def hand_over(self) -> None:
        """Find unloads that take longer than `memory_return_seconds`; have others do them, or stop counting on them.

        Any process can unload a handle, so the leader tells the next one to: itself, if it has not tried yet. Only its
        owner can unload an object. When an unload is so late that another process would have done it meanwhile, its
        memory counts as in use, so that other copies are evicted instead.
        """
        if not any(self._overdue(time.monotonic_ns())):
            return
        namespace = self._namespace
        tables = namespace.tables
        said: dict[tuple[int, int], list[str]] = defaultdict(list)
        with namespace.transaction() as t:
            for row, late in list(self._overdue(t.now)):
                if t.is_long:
                    # The next poll finds the rest.
                    break
                instance = tables.instances[row]
                # An instance in mid-unload has a holder.
                holder, shown = instance.holder or 0, tables.shown(instance.model)
                if late and not instance.unload_late:
                    namespace.transitions.unloads.note_late(t, row)
                    said[holder, -1].append(shown)
                successor = self._successor_of(row, holder) if instance.owner is None else None
                if successor is not None:
                    namespace.transitions.unloads.hand_over(t, row, successor)
                    said[holder, successor].append(shown)
            pids = {slot: tables.members[slot].pid for ends in said for slot in ends if slot >= 0}
            self._scheduler.advance(t)
        for (holder, successor), models in said.items():
            which = f"{models[0]} and {len(models) - 1} more" if len(models) > 1 else models[0]
            then = f"pid {pids[successor]} does it instead" if successor >= 0 else "other copies are evicted instead"
            _LOG.warning("mpmm %s: pid %d has not unloaded %s in time; %s", namespace.name, pids[holder], which, then)

    def _overdue(self, now_ns: int) -> Iterator[tuple[int, bool]]:
        """Find the rows that their HOLDER has not unloaded in time; tell whether their memory counts as in use."""
        namespace = self._namespace
        tables = namespace.tables
        limit_ns = max(namespace.settings.memory_return_seconds, SHORTEST_UNLOAD_LIMIT_S) * 1e9
        for row in tables.rows_where(namespace.segment.layout.instances, Instance.STATE, Instance.UNLOADING):
            instance = tables.instances[row]
            if instance.device_bits & tables.header.steady or instance.seats:
                # This unload has to wait.
                continue
            since, is_object = instance.since, instance.owner is not None
            told = max(since, instance.handed_at)
            late = now_ns - since > limit_ns * (1 if is_object else 2)
            if now_ns - told > limit_ns and not (is_object and instance.unload_late):
                yield row, late

    def _successor_of(self, row: int, holder: int) -> int | None:
        """Return the worker (slot) that takes over an unload from `holder` (slot): this one, unless it is unloading it.

        Then it is the next worker in the table, so that each has its turn; None if there is none. Needs the lock.
        """
        namespace = self._namespace
        at_it = self._unloads.is_at(row)
        if holder != namespace.slot and not at_it:
            return namespace.slot
        workers = namespace.tables.rows_where(namespace.segment.layout.members, Member.STATE, Member.WORKER)
        others = [slot for slot in workers if slot not in (holder, namespace.slot)]
        # While this process does other unloads, this one just waits for them.
        last_resort = None if self._unloads.is_busy else namespace.slot
        return next((slot for slot in others if slot > holder), others[0] if others else last_resort)
