"""The bridge between policy and shared state: read a view, ask for a plan, record it.

A process that changes something that waiters may wait for calls `Scheduler.advance` in the same transaction: after a
release, the end of a load or of an unload, a new sample, a reaped member. There is no scheduling process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mpmm.errors import TableFullError
from mpmm.policy.plan import make_plan
from mpmm.policy.view import (
    Decision,
    Evict,
    Grant,
    Load,
    Reason,
    Refuse,
    Resume,
    Satisfied,
    TicketView,
    View,
    Wait,
    Why,
)
from mpmm.scheduling.copies import CopiesReader
from mpmm.scheduling.demand import Demands
from mpmm.scheduling.shortcuts import Shortcuts
from mpmm.scheduling.suspension import SuspensionDecisions
from mpmm.scheduling.table_rows import TableRows
from mpmm.scheduling.views import QUEUE_PART, Views
from mpmm.scheduling.waiters import Waiters
from mpmm.scheduling.wakes import Wakes
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import device_bits
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction

__all__ = ["Scheduler"]

# Waits that only other programs, or the users of a pinned model, can end.
OTHERS_END = frozenset({Reason.EXTERNAL, Reason.PINNED})
# Waits for the model that their sentence names: once that is another one, the sentence is wrong.
NAMES_ANOTHER = frozenset({Reason.OUTRANKED, Reason.IN_USE})


class Scheduler:
    """Plans for one namespace. Methods need the lock."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._layout = namespace.segment.layout
        self._queue = namespace.reads.queue
        self._instances = namespace.reads.instances
        self.demand = Demands(namespace)
        self.suspension = SuspensionDecisions(namespace, self.demand.rate)
        self.copies = CopiesReader(namespace, self.suspension)
        self.views = Views(namespace, self.copies, self.demand, self.suspension)
        self.shortcuts = Shortcuts(namespace, self.views)
        self.waiters = Waiters(namespace, self.copies, self.views, self.shortcuts)
        self.table_rows = TableRows(namespace, self.suspension)
        self.wakes = Wakes(namespace)
        # Bound here, so that callers need to know one object only, and the warm path needs no second look-up.
        self.read_view = self.views.read_view
        self.device_views = self.views.device_views
        self.need_mb = self.views.need_mb
        self.expected_mb = self.views.expected_mb
        self.is_known = self.views.is_known
        self.room = self.views.room
        self.shows_more_room = self.views.shows_more_room
        self.used_mb = self.views.used_mb
        self.limit_mb = self.views.limit_mb
        self.read_copies = self.copies.read_copies
        self.rate = self.demand.rate
        self.must_queue = self.shortcuts.must_queue
        self.may_take = self.shortcuts.may_take
        self.may_have_to_wait = self.shortcuts.may_have_to_wait
        self.may_know_the_wait = self.shortcuts.may_know_the_wait
        self.known_wait = self.shortcuts.known_wait
        self.holds_up_nobody = self.shortcuts.holds_up_nobody
        self.beside_isolation = self.shortcuts.beside_isolation
        self.why = self.waiters.why
        self.sentence = self.waiters.sentence
        self.expected_wait_s = self.waiters.expected_wait_s
        self.expected_waits_s = self.waiters.expected_waits_s
        self.backs_off_for_s = self.waiters.backs_off_for_s
        self.called_up_at = self.waiters.called_up_at
        self.is_model_idle = self.waiters.is_model_idle
        self.make_room_for_model = self.table_rows.make_room_for_model
        self.prewake = self.wakes.prewake
        self.spin_for_answer = self.wakes.spin_for_answer
        self.count_requests = self.demand.count_all
        # Called without the lock if `advance` has stopped early, so that it is called again.
        self.go_on: Callable[[], object] = lambda: None

    def advance(self, t: Transaction, newcomer: int | None = None) -> None:
        """Carry out the policy's decisions about all requests that wait.

        newcomer: row of the ticket that the caller has just made. Raises TableFullError if only a full table of
        instances keeps that one from loading; other tickets wait for a row, which does not concern the caller.

        It stops when the transaction gets long; `go_on` has the rest done in another one.
        """
        # Counted before the plan, which weighs the model by its demand, this request included.
        if newcomer is not None:
            self.demand.count(t, self._tables.tickets[newcomer].model)
        while self._queue.anybody_waits() and not self._nothing_to_decide(newcomer):
            # Read anew in each round: the last round's decisions are in the rows now, but not in the last view.
            view = self.views.read_view()
            plan = make_plan(view)
            for decision in plan.decisions:
                self._carry_out(t, decision, newcomer)
                if t.is_long:
                    # The state so far is consistent: each decision keeps the invariants, and the next plan starts from
                    # the rows as they are then.
                    t.after.append(self.go_on)
                    return
            # If all waiters of this part of the queue have been answered, the rest moves up. If it holds up no others,
            # those behind it move up that are of the kind of one that has been answered.
            behind = view.tickets[QUEUE_PART:]
            if plan.queue_held_up or not view.tickets or not (self._answered_all(view) or self._answered_any(behind)):
                return

    def _nothing_to_decide(self, newcomer: int | None) -> bool:
        """Tell whether something runs alone on every device: then nothing can be granted or loaded until that ends.

        Its end calls `advance` again. Until then, a newcomer may still be refused if it is known what its model needs.
        """
        if not self.shortcuts.all_isolated():
            return False
        return newcomer is None or not self.views.is_known(self._tables.tickets[newcomer].model)

    def why_not_at_once(self, ticket: int, or_ever: bool = False) -> Why | None:
        """Return what a waiter would wait for, or have done for it; None if it is served now, at no cost to others.

        None also if it is refused, which is an answer at once, unless `or_ever`.
        """
        decisions = (one for one in make_plan(self.views.read_view()).decisions if one.ticket == ticket)
        match next(decisions, None):
            case None:
                return Why(Reason.BEHIND)
            case Wait(why=why):
                return why
            case Evict(instances=instances):
                return Why(Reason.NOT_FREE, other=self._tables.instances[instances[0]].model)
            case Load(why=why) if not self.table_rows.has_row_for_instance():
                return replace(why, reason=Reason.TABLE_FULL)
            case Refuse(why=why) if or_ever:
                return why
        return None

    def turn_away(self, t: Transaction, ticket: int, why: Why) -> None:
        """Record why a newcomer that does not wait is not served, and let its ticket expire: it is about to leave."""
        self.demand.count(t, self._tables.tickets[ticket].model)
        self._note_wait(t, ticket, why, first=False)
        self._namespace.transitions.tickets.expire(t, ticket)

    def keep(self, t: Transaction, instance: int, used: bool, call_up: bool) -> bool:
        """Take a copy from its holder, but leave it idle for that process, although others wait.

        See `mpmm.model_manager.tenure`.

        call_up: have the first waiter look for itself when the tenure is over. False: only if that waiter has not been
        called up yet, because the one that was may have been served meanwhile. Return False, and change nothing, if
        requests for other models wait, or if the copy is not to be used any more.
        """
        transitions, copy = self._namespace.transitions, self._instances.held(instance)
        if self._queue.waits_for_others_than(copy.model) or self._namespace.reads.devices.anything_runs_alone():
            return False
        # An object has no tenure: no other process could take it afterwards.
        if copy.unload_on_release or copy.owner:
            return False
        # Found before the release, so that nothing has to be undone.
        ticket, overtaken = self.shortcuts.first_user(copy.model, copy.devices) or (None, 0)
        # If no waiter were called up, the copy would stay idle until some process happened to look.
        if call_up and (ticket is None or overtaken):
            return False
        transitions.holds.release(t, instance, used)
        if ticket is not None and not overtaken and (call_up or not self.called_up_at(ticket)):
            transitions.tickets.call_up(t, ticket)
        return True

    def release(self, t: Transaction, instance: int, used: bool = True) -> None:
        """Take a copy from its holder, and carry out the policy for requests that wait; `used` as in the transition.

        If the first waiter waits for just this copy, or if a waiter that may overtake it does, a plan would hand over
        the copy and change nothing for the others. `first_user` finds that out in a tenth of the time of a plan.
        """
        transitions = self._namespace.transitions
        if not self._queue.anybody_waits():
            transitions.holds.release(t, instance, used)
            return
        # Read before the release: after that the row may be free, or belong to a waiter.
        copy = self._instances.held(instance)
        if not copy.unload_on_release and not self.shortcuts.beside_isolation(instance):
            found = self.shortcuts.first_user(copy.model, copy.devices)
            if found is not None:
                ticket, overtaken = found
                # Only its owner can use an object.
                if not copy.owner or copy.owner - 1 == self._queue.asker(ticket)[0]:
                    cause = Cause(Reason.OVERTAKES, other=overtaken) if overtaken else Cause(Reason.IDLE_COPY)
                    transitions.hand_over.from_holder(t, ticket, instance, cause, used)
                    # After the wake-up, which the hand-over has put on the list: before it there is none to yield to.
                    t.after.append(self.wakes.yield_to_waiter)
                    return
        # Also found out before the release, which changes the rows that it depends on.
        moves_somebody = not self.shortcuts.moves_nobody(copy)
        transitions.holds.release(t, instance, used)
        if moves_somebody:
            self.advance(t)

    def _answered_all(self, view: View) -> bool:
        return not any(self._queue.is_waiting(ticket.row) for ticket in view.tickets)

    def _answered_any(self, tickets: Sequence[TicketView]) -> bool:
        return not all(self._queue.is_waiting(ticket.row) for ticket in tickets)

    def _carry_out(self, t: Transaction, decision: Decision, newcomer: int | None) -> None:
        """Carry out one decision.

        The plan was made in this transaction, but earlier decisions have changed rows since.
        """
        transitions = self._namespace.transitions
        match decision:
            case Satisfied(ticket):
                transitions.tickets.answer_enough(t, ticket)
            case Grant(ticket, instance, why):
                # If not, it has just been unloaded to make room in the table of copies, of which a plan knows nothing.
                if self._instances.is_idle(instance):
                    transitions.hand_over.grant(t, ticket, instance, _cause(why))
            case Resume(ticket, instance, why):
                # If not, it has just been dropped to make room in the host for another copy.
                if self._instances.is_suspended(instance):
                    transitions.hand_over.allow_resume(t, ticket, instance, _cause(why))
            case Load():
                self._allow_load(t, decision, newcomer)
            case Evict():
                self._evict(t, decision)
            case Refuse(ticket, why):
                transitions.tickets.refuse(t, ticket, _cause(why))
            case Wait(ticket, _, why, first, passed):
                # This happens to a waiter only once, and its time as the head of the line begins anew.
                if passed:
                    transitions.tickets.let_pass(t, ticket)
                self._note_wait(t, ticket, why, first)

    def _allow_load(self, t: Transaction, load: Load, newcomer: int | None) -> None:
        allow, devices = self._namespace.transitions.hand_over.allow_load, device_bits(load.devices)
        try:
            try:
                allow(t, load.ticket, devices, load.need_mb, load.alone, _cause(load.why))
            except TableFullError as error:
                # Raised before anything was written. (A full undo log is not a matter of one ticket.)
                if error.table != self._layout.instances.name or not self.table_rows.free_seat(t):
                    raise
                allow(t, load.ticket, devices, load.need_mb, load.alone, _cause(load.why))
        except TableFullError as error:
            if error.table != self._layout.instances.name:
                raise
            # Only the newcomer's caller can get the error, which undoes the transaction, and with it the ticket. Other
            # tickets wait for the row.
            if not self.table_rows.make_room_for_instance(t, load.ticket) and load.ticket == newcomer:
                raise
            self._note_wait(t, load.ticket, replace(load.why, reason=Reason.TABLE_FULL), first=False)

    def _evict(self, t: Transaction, evict: Evict) -> None:
        # The process that waits for the memory unloads: it is awake, and it alone gains by that.
        unloader, model = self._queue.asker(evict.ticket)
        # The event is about the evicted copy, so it names the model for which that is evicted.
        cause = _cause(evict.why)._replace(other=model + 1)
        # A copy that is no longer idle was unloaded with its twin, which came before it.
        for instance in filter(self._instances.is_unused, evict.instances):
            if t.is_long:
                # The remaining copies do not count as being unloaded, so the next plan evicts them.
                break
            self.suspension.evict(t, instance, unloader, cause)
        if evict.passed:
            self._namespace.transitions.tickets.let_pass(t, evict.ticket)
        self._note_wait(t, evict.ticket, replace(evict.why, reason=Reason.UNLOADING), evict.first)

    def _note_wait(self, t: Transaction, ticket: int, why: Why, first: bool) -> None:
        told, cause = self._queue.told(ticket), _cause(why)
        # Usually nothing has changed, and there are many waiters.
        if (told.reason, told.on) != (cause.reason, cause.on) or (
            cause.reason in NAMES_ANOTHER and told.other != cause.other
        ):
            if cause.reason == Reason.RETURNING and told.reason == Reason.UNLOADING:
                # It is still the memory of the same copies.
                cause = cause._replace(other=told.other)
            self._namespace.transitions.tickets.set_reason(t, ticket, cause)
            # mpmm cannot end these waits, so it has to tell people.
            if cause.reason in OTHERS_END:
                self._namespace.transitions.tickets.warn(t, ticket, self.waiters.sentence(ticket))
        # Others may delay it for `max_overtake_seconds` from now on. Done once, or each plan would restart that time.
        if first and not told.head_of_line:
            self._namespace.transitions.tickets.block(t, ticket)


def _cause(why: Why) -> Cause:
    # Stored as references, because 0 is a row, and cannot stand for none.
    other = 0 if why.other is None else why.other + 1
    return Cause(why.reason, why.need_mb, why.free_mb, why.coming_mb, why.seconds, other, device_bits(why.devices))
