"""The instances that the calling thread holds, so that a request that its own thread blocks fails at once."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence, Set
from contextlib import suppress

from mpmm.model_manager.held import HeldInstances
from mpmm.model_manager.operations import Operation
from mpmm.policy.view import Reason
from mpmm.shared_state.layout import Instance, Ticket, device_rows
from mpmm.shared_state.namespace import Namespace

__all__ = ["ThreadHolds"]

# The threads of mpmm that never run the program's code, by the beginnings of their names. Threads that load, unload or
# serve do run it: a loader may settle a lease.
_OWN_THREADS = (
    *("mpmm-background", "mpmm-sampler", "mpmm-gpu-monitor"),
    *("mpmm-returns", "mpmm-watcher", "mpmm-transaction"),
)
# Those that do run it, but end by themselves as soon as their work is done.
_PASSING_THREADS = ("mpmm-unload", "mpmm-suspend")
PASSING_S = 1.0
PASSING_LOOK_S = 0.005


class ThreadHolds(threading.local):
    """The instances that the calling thread holds or loads in one namespace; each thread sees its own.

    blocks: the operations of its `with manager.model(...)` blocks, innermost last; weakly, because a block that another
    thread ends, or an exception, is not taken off. loads: row and generation of what
    the loaders that it runs are loading. alone: what it has loaded to run alone, in a block or not.
    """

    def __init__(self, namespace: Namespace, held: HeldInstances, operations: Set[Operation]) -> None:
        """operations: the calls of the process that may hold something. Runs once in each thread."""
        self._namespace = namespace
        self._held = held
        self._operations = operations
        self.blocks: list[weakref.ref[Operation]] = []
        self.loads: list[tuple[int, int]] = []
        self.alone: tuple[int, int] | None = None

    def enter(self, block: Operation) -> None:
        """Note that the calling thread enters a block."""
        if self.blocks:
            self.blocks = [reference for reference in self.blocks if reference() is not None]
        self.blocks.append(weakref.ref(block))

    def leave(self, block: Operation) -> None:
        """Note that the calling thread leaves a block, which another thread may have entered."""
        with suppress(ValueError):
            self.blocks.remove(weakref.ref(block))

    def rows(self) -> tuple[list[int], list[int]]:
        """Return the rows that the calling thread holds in blocks or is loading, and the row that it has run alone.

        Only its `with` blocks and its loaders are sure to end in this very thread: another one may release what it has
        acquired otherwise. Takes no lock, because all of these rows are this process's own.
        """
        if not (self.loads or self.blocks or self.alone):
            return [], []
        instances = self._namespace.tables.instances
        firm = [
            row
            for row, generation in self.loads
            if instances[row].state == Instance.LOADING and instances[row].generation == generation
        ]
        blocks = [block for reference in self.blocks if (block := reference()) is not None]
        copies = [block.held[0] for block in blocks if block.held is not None and block in self._operations]
        firm += [copy.row for copy in copies if self._held.is_held(copy)]
        alone = []
        if self.alone is not None:
            row, generation = self.alone
            runs_alone = self._namespace.transitions.isolation.runs_alone
            if instances[row].generation == generation and runs_alone(row):
                alone.append(row)
        return firm, alone

    def quiet(self, firm: Sequence[int]) -> list[int]:
        """Return the rows that keep devices quiet until the calling thread continues: what it loads, and its leases.

        firm: its rows, see `rows`. Any thread, a timer's say, may settle or release a lease, so leases count only while
        the program has no other thread. Takes no lock, like `rows`.
        """
        tables = self._namespace.tables
        if not tables.header.steady:
            return []
        found = [row for row in firm if tables.instances[row].steady]
        if all(thread.name.startswith(_OWN_THREADS) for thread in _other_threads()):
            found += self._steady_leases()
        return found

    def let_others_pass(self) -> None:
        """Wait a moment for threads of mpmm that are about to end, if no others may settle this process's lease.

        For `quiet`: a thread that has just unloaded or suspended something, which its caller has seen, may still be
        there, and would count as one that may settle it. Do not hold the lock.
        """
        if not (self._namespace.tables.header.steady and self._steady_leases()):
            return
        until = time.monotonic() + PASSING_S
        while time.monotonic() < until:
            others = [thread.name for thread in _other_threads() if not thread.name.startswith(_OWN_THREADS)]
            if not others or not all(name.startswith(_PASSING_THREADS) for name in others):
                return
            time.sleep(PASSING_LOOK_S)

    def _steady_leases(self) -> list[int]:
        """Return the rows of the leases that this process has yet to settle, or to release."""
        instances, found = self._namespace.tables.instances, []
        for operation in list(self._operations):
            # If a lease's object has been collected, the background thread is about to end the lease.
            owner = None if operation.owner is None else operation.owner()
            if owner is None or operation.booking is None:
                continue
            row, generation = operation.booking
            instance = instances[row]
            if instance.state == Instance.LEASED and instance.generation == generation and instance.steady:
                found.append(row)
        return found

    def waits_for_itself(self, ticket: int, firm: list[int]) -> bool:
        """Tell whether a waiter can be served only by rows that its own thread does not release. Needs the lock.

        It waits for a copy of its model, and has all there are; or for a copy to be loaded, and is the loader that
        loads it; or for devices that its loader, or a lease of its own, keeps quiet, with no other device open; or for
        copies in use to become idle and make room, and all that are in use anywhere are its own.
        """
        tables, layout = self._namespace.tables, self._namespace.segment.layout
        waiter = tables.tickets[ticket]
        if waiter.state != Ticket.WAITING:
            return False
        ours = set(firm)
        rows = [
            row
            for row in tables.rows_where(layout.instances, Instance.MODEL, waiter.model)
            if tables.instances[row].state not in (Instance.SUSPENDING, Instance.SUSPENDED)
        ]
        reason = waiter.reason
        if reason in (Reason.COPIES, Reason.ONLY_COPY):
            return ours.issuperset(rows)
        if reason == Reason.QUIET:
            # The quiet ends once the loader returns, or the lease is settled; but the thread that has to do so waits
            # here, unless another device opens.
            closed = {device for row in self.quiet(firm) for device in tables.instances[row].devices}
            everywhere = tables.used_rows(layout.devices)
            allowed = device_rows(waiter.loadable_on) or everywhere
            if waiter.preload == Ticket.ONLY_RESUMES:
                # It waits for suspended copies, on the devices that the reason names.
                allowed = waiter.on or everywhere
            return len(set(allowed) - closed) < max(1, waiter.span)
        if reason == Reason.SHARING:
            return ours.issuperset(rows) and all(tables.instances[row].state == Instance.LOADING for row in rows)
        states = (
            *(Instance.ACTIVE, Instance.LOADING, Instance.LEASED, Instance.UNLOADING),
            *(Instance.SUSPENDING, Instance.RESUMING),
        )
        in_use = [row for row in tables.used_rows(layout.instances) if tables.instances[row].state in states]
        return reason == Reason.IN_USE and ours.issuperset(in_use)


def _other_threads() -> list[threading.Thread]:
    """Return the threads of this process except the calling one, as far as Python knows them."""
    ours = threading.get_ident()
    return [thread for thread in threading.enumerate() if thread.ident != ours]
