"""What the calling thread holds, so that a request which its own thread keeps from being served fails at once."""

from __future__ import annotations

import threading
from collections.abc import Set

from mpmm.model_manager.held import HeldInstances
from mpmm.model_manager.operations import Operation
from mpmm.policy.view import Reason
from mpmm.shared_state.layout import Instance, Ticket, device_rows
from mpmm.shared_state.namespace import Namespace

__all__ = ["ThreadHolds"]


class ThreadHolds(threading.local):
    """What the calling thread holds or loads in one namespace; each thread sees its own.

    blocks: the operations of its `with manager.model(...)` blocks, innermost last. loads: what the loaders load that it
    is running, row and generation. alone: what it has loaded to run alone, in a block or not.
    """

    def __init__(self, namespace: Namespace, held: HeldInstances, operations: Set[Operation]) -> None:
        """operations: the calls of the process that have something in hand. Runs once in each thread."""
        self._namespace = namespace
        self._held = held
        self._operations = operations
        self.blocks: list[Operation] = []
        self.loads: list[tuple[int, int]] = []
        self.alone: tuple[int, int] | None = None

    def rows(self) -> tuple[list[int], list[int]]:
        """Return the rows that the calling thread holds in blocks or is loading, and that which it holds alone.

        Only its `with` blocks and its loaders are sure to end in this very thread: what it has acquired otherwise,
        another one may release. Without the lock, as all of these are this process's own.
        """
        if not (self.loads or self.blocks or self.alone):
            return [], []
        instances = self._namespace.tables.instances
        firm = [
            row
            for row, generation in self.loads
            if instances[row].state == Instance.LOADING and instances[row].generation == generation
        ]
        copies = [block.held[0] for block in self.blocks if block.held is not None and block in self._operations]
        firm += [copy.row for copy in copies if self._held.is_held(copy)]
        alone = []
        if self.alone is not None:
            row, generation = self.alone
            runs_alone = self._namespace.transitions.isolation.runs_alone
            if instances[row].generation == generation and runs_alone(row):
                alone.append(row)
        return firm, alone

    def waits_for_itself(self, ticket: int, firm: list[int]) -> bool:
        """Tell whether a waiter can be served only by rows that its own thread will not let go of. Needs the lock.

        It waits for a copy of its model and has all there are; or for one to be loaded, by a loader that asks for it;
        or for what its loader starts quietly, with nothing else loaded meanwhile; or for copies in use to be idle, so
        that there is room, and all that are in use anywhere are its own.
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
            # What starts quietly has started once its loader has returned, and that is what waits, unless another
            # device opens.
            loading = (tables.instances[row] for row in firm if tables.instances[row].state == Instance.LOADING)
            closed = {device for copy in loading if copy.steady for device in copy.devices}
            everywhere = tables.used_rows(layout.devices)
            allowed = device_rows(waiter.loadable_on) or everywhere
            if waiter.preload == Ticket.ONLY_RESUMES:
                # It is for what is suspended where the reason says.
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
