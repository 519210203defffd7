"""Takes back what was held by calls that an exception has ended; see `mpmm.model_manager.operations`."""

from __future__ import annotations

import gc
from functools import partial

from mpmm.model_manager.held import HeldInstances
from mpmm.model_manager.operations import Operation, ended_calls, garbage_may_hold
from mpmm.model_manager.unload import unload_object_in_thread
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Instance, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction
from mpmm.text.printable import printable_logger

__all__ = ["Reconciler", "leave_if_there"]

_LOG = printable_logger("mpmm")


class Reconciler:
    """Takes back; for the background thread, which looks a few times a second while calls are in progress.

    has_abandoned: a call was abandoned since the last look.
    """

    def __init__(
        self, namespace: Namespace, scheduler: Scheduler, held: HeldInstances, operations: set[Operation]
    ) -> None:
        """operations: the calls that may hold something."""
        self._namespace = namespace
        self._scheduler = scheduler
        self._held = held
        self._operations = operations
        self.has_abandoned = False

    def reconcile(self) -> None:
        """Take back what was held by calls that an exception has ended, and end a transaction that one has left.

        Raises LockTimeoutError.
        """
        self.has_abandoned = False
        if self._namespace.lock.end_abandoned():
            # This process may have nothing else to do for a long time, and would keep all others out until then.
            with self._namespace.transaction():
                pass
        self._namespace.lock.finish_calls()
        if garbage_may_hold(self._operations):
            # In a process that does little else, the next collection could be a long time off.
            gc.collect()
        for operation in ended_calls(self._operations):
            self._take_back(operation)

    def _take_back(self, operation: Operation) -> None:
        if operation.has_something:
            with self._namespace.transaction() as t:
                self._held.free_taken_tickets(t)
                self._leave_abandoned(t, operation)
                self._release_abandoned(t, operation)
                self._scheduler.advance(t)
            if operation.is_orphaned and operation.warning:
                _LOG.warning("mpmm %s: pid %d: %s", self._namespace.name, self._namespace.pid, operation.warning)
        self._operations.discard(operation)
        operation.frame = None

    def _leave_abandoned(self, t: Transaction, operation: Operation) -> None:
        """Give up the ticket and the load of a call, if the rows still have them."""
        namespace, transitions = self._namespace, self._namespace.transitions
        others = [other.ticket for other in list(self._operations) if other is not operation]
        # If the transaction that queued it was undone, the next ticket got the same number.
        if operation.ticket not in others:
            leave_if_there(namespace, operation.ticket, t)
        if operation.booking is not None:
            row, generation = operation.booking
            instance = namespace.tables.instances[row]
            if (instance.generation, instance.holder) == (generation, namespace.slot):
                if instance.state == Instance.LOADING:
                    transitions.loads.give_up(t, row)
                elif instance.state == Instance.RESUMING:
                    transitions.suspensions.turn_back(t, row, namespace.reference)
                elif instance.state == Instance.LEASED:
                    transitions.leases.end(t, row)
            if not self._held.is_loaded(row, generation):
                # A second exception may have kept the call from unloading what it had loaded.
                copy = self._held.forget_loaded(row, generation)
                if copy is not None:
                    t.after.append(partial(unload_object_in_thread, copy.value))

    def _release_abandoned(self, t: Transaction, operation: Operation) -> None:
        """Give back the copy of a call, unless that has been done, or another call holds it by now."""
        held = operation.held
        if held is None:
            return
        copy, use = held
        if self._is_granted(copy.row):
            # Another waiter has it by now, and may be about to record it, without the lock.
            return
        at = (copy.row, copy.generation)
        if self._held.holds.get(at) is held:
            ours = True
        else:
            # It was struck off: by this call, to give it back, or because its transaction was undone.
            others = [other for other in list(self._operations) if other is not operation and other.gives_back]
            ours = operation.gives_back and self._namespace.tables.instances[copy.row].uses == use
            ours = ours and not any(other.held is held for other in others)
        if ours and self._held.is_held(copy):
            self._scheduler.release(t, copy.row)
        if self._held.holds.get(at) is held:
            self._held.holds.pop(at)

    def _is_granted(self, row: int) -> bool:
        """Tell whether a ticket was granted the copy in a row, and its waiter may not have taken it yet."""
        tables, layout = self._namespace.tables, self._namespace.segment.layout
        tickets = tables.rows_where(layout.tickets, Ticket.INSTANCE, row + 1)
        return any(tables.tickets[ticket].state == Ticket.GRANTED for ticket in tickets)


def leave_if_there(namespace: Namespace, ticket: tuple[int, int] | None, t: Transaction) -> bool:
    """Take a ticket (row and number) out of the queue; return False if that has been done already."""
    if ticket is None:
        return False
    waiter = namespace.tables.tickets[ticket[0]]
    if waiter.state == Ticket.FREE or waiter.number != ticket[1] or waiter.member != namespace.slot:
        return False
    namespace.transitions.hand_over.leave_queue(t, ticket[0])
    return True
