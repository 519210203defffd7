"""The bridge between policy and shared state: read a view, ask for a plan, write it down.

Whoever changes something that waiters may be waiting for calls `Scheduler.advance` in the same transaction: a
release, the end of a load or of an unload, a new sample, a reaped member. There is no scheduling process.
"""

from __future__ import annotations

from collections.abc import Callable
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
    View,
    Wait,
    Why,
)
from mpmm.scheduling.copies import CopiesReader
from mpmm.scheduling.demand import Demands
from mpmm.scheduling.shortcuts import Shortcuts
from mpmm.scheduling.suspension import SuspensionDecisions
from mpmm.scheduling.table_rows import TableRows
from mpmm.scheduling.views import Views
from mpmm.scheduling.waiters import Waiters
from mpmm.scheduling.wakes import Wakes
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import device_bits
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction

__all__ = ["Scheduler"]

# Waits that only other programs, or the users of a pinned model, can end.
OTHERS_END = frozenset({Reason.EXTERNAL, Reason.PINNED})


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
        # Bound here, so that callers know one object, and the warm path pays for no further look-up.
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
        # Called without the lock when `advance` has stopped before its end, to have it called again.
        self.go_on: Callable[[], object] = lambda: None

    def advance(self, t: Transaction, newcomer: int | None = None) -> None:
        """Carry out what the policy says about everybody who waits.

        newcomer: row of the ticket that the caller has just made. Raises TableFullError when that one could load
        but for the table of instances; others wait for a row, which is none of the caller's business.

        It stops when the transaction has become long; `go_on` has the rest done in another one.
        """
        # Before the plan, which weighs the model by its demand, this request included.
        if newcomer is not None:
            self.demand.count(t, self._tables.tickets[newcomer].model)
        # Where something runs alone on every device nothing can be granted or loaded, and what ends that comes by here.
        while self._queue.anybody_waits() and not self.shortcuts.all_isolated():
            # Anew in each round: the last round's decisions are in the rows now, and the view before knows nothing of
            # them.
            view = self.views.read_view()
            plan = make_plan(view)
            for decision in plan.decisions:
                self._carry_out(t, decision, newcomer)
                if t.is_long:
                    # What is written so far is whole: each decision keeps the invariants, and the next plan starts from
                    # the rows as they are then.
                    t.after.append(self.go_on)
                    return
            if plan.queue_held_up or not view.tickets or not self._answered_all(view):
                return
            # Nobody in this part of the queue is left, so the rest moves up.

    def why_not_at_once(self, ticket: int, or_ever: bool = False) -> Why | None:
        """Return what a waiter would wait for, or have done for it; None if it is served now and disturbs nobody.

        What is refused has its answer at once, too, unless `or_ever`.
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
        """Let a newcomer that does not wait be served no more: it has been told why, and is about to leave."""
        self.demand.count(t, self._tables.tickets[ticket].model)
        self._note_wait(t, ticket, why, first=False)
        self._namespace.transitions.tickets.expire(t, ticket)

    def keep(self, t: Transaction, instance: int, used: bool, call_up: bool) -> bool:
        """Take a copy from its holder, but leave it idle for that process, although others wait.

        See `mpmm.model_manager.tenure`.

        call_up: have the first waiter look for itself when the tenure is over; False: only if it was not called up yet,
        as the one that was may have been served meanwhile. Return False, and change nothing, if others than those who
        want this copy wait, or it is not to be used any more.
        """
        transitions, copy = self._namespace.transitions, self._instances.held(instance)
        if self._queue.waits_for_others_than(copy.model) or self._namespace.reads.devices.anything_runs_alone():
            return False
        # An object is in no tenure: no other process could take it afterwards.
        if copy.unload_on_release or copy.owner:
            return False
        # Asked before the release: then the copy is not idle yet, and nothing has to be taken back.
        ticket, overtaken = self.shortcuts.first_user(copy.model, copy.devices) or (None, 0)
        # With nobody called up, the copy would lie idle until somebody happened to look.
        if call_up and (ticket is None or overtaken):
            return False
        transitions.holds.release(t, instance, used)
        if ticket is not None and not overtaken and (call_up or not self.called_up_at(ticket)):
            transitions.tickets.call_up(t, ticket)
        return True

    def release(self, t: Transaction, instance: int, used: bool = True) -> None:
        """Take a copy from its holder, and carry out the policy for those who wait; `used` as in the transition.

        If the first waiter waits for just this copy, or a waiter that may overtake it does, a plan would hand the copy
        over and change nothing for the others. `first_user` finds that out in a tenth of the time of a plan.
        """
        transitions = self._namespace.transitions
        if not self._queue.anybody_waits():
            transitions.holds.release(t, instance, used)
            return
        # Read before the release: afterwards the row may have gone, or be a waiter's.
        copy = self._instances.held(instance)
        if not copy.unload_on_release and not self.shortcuts.beside_isolation(instance):
            found = self.shortcuts.first_user(copy.model, copy.devices)
            if found is not None:
                ticket, overtaken = found
                # An object is of no use to another process than its owner.
                if not copy.owner or copy.owner - 1 == self._queue.asker(ticket)[0]:
                    cause = Cause(Reason.OVERTAKES, other=overtaken) if overtaken else Cause(Reason.IDLE_COPY)
                    transitions.hand_over.from_holder(t, ticket, instance, cause, used)
                    # After the wake-up, which the hand-over has put on the list: before it there is nobody to yield to.
                    t.after.append(self.wakes.yield_to_waiter)
                    return
        # Before the release, too, which changes what this is told by.
        moves_somebody = not self.shortcuts.moves_nobody(copy)
        transitions.holds.release(t, instance, used)
        if moves_somebody:
            self.advance(t)

    def _answered_all(self, view: View) -> bool:
        return not any(self._queue.is_waiting(ticket.row) for ticket in view.tickets)

    def _carry_out(self, t: Transaction, decision: Decision, newcomer: int | None) -> None:
        """Write one decision down.

        The plan was made in this transaction, but the decisions before this one have changed rows it did not know of.
        """
        transitions = self._namespace.transitions
        match decision:
            case Satisfied(ticket):
                transitions.tickets.answer_enough(t, ticket)
            case Grant(ticket, instance, why):
                # If not, it has just gone to make room in the table of copies, which the plan does not know of.
                if self._instances.is_idle(instance):
                    transitions.hand_over.grant(t, ticket, instance, _cause(why))
            case Resume(ticket, instance, why):
                # If not, it has just been dropped to make room in the host for another one.
                if self._instances.is_suspended(instance):
                    transitions.hand_over.allow_resume(t, ticket, instance, _cause(why))
            case Load():
                self._allow_load(t, decision, newcomer)
            case Evict():
                self._evict(t, decision)
            case Refuse(ticket, why):
                transitions.tickets.refuse(t, ticket, _cause(why))
            case Wait(ticket, _, why, first, passed):
                # That happens to a waiter once, and its time as the head of the line begins anew.
                if passed:
                    transitions.tickets.let_pass(t, ticket)
                self._note_wait(t, ticket, why, first)

    def _allow_load(self, t: Transaction, load: Load, newcomer: int | None) -> None:
        allow, devices = self._namespace.transitions.hand_over.allow_load, device_bits(load.devices)
        try:
            try:
                allow(t, load.ticket, devices, load.need_mb, load.alone, _cause(load.why))
            except TableFullError as error:
                # Found out before anything was written. (A full undo log is no matter of one ticket.)
                if error.table != self._layout.instances.name or not self.table_rows.free_seat(t):
                    raise
                allow(t, load.ticket, devices, load.need_mb, load.alone, _cause(load.why))
        except TableFullError as error:
            if error.table != self._layout.instances.name:
                raise
            # Only the newcomer's caller is there to be told, and its ticket goes with the transaction that the error
            # undoes. Others wait for the row.
            if not self.table_rows.make_room_for_instance(t, load.ticket) and load.ticket == newcomer:
                raise
            self._note_wait(t, load.ticket, replace(load.why, reason=Reason.TABLE_FULL), first=False)

    def _evict(self, t: Transaction, evict: Evict) -> None:
        # The process that waits for the memory unloads for it: it is there, and no other one gains by it.
        unloader, model = self._queue.asker(evict.ticket)
        # The event is about the copy that goes, so it names the model for which it does.
        cause = _cause(evict.why)._replace(other=model + 1)
        # One that is not idle any more has gone with its twin, which stood before it.
        for instance in filter(self._instances.is_unused, evict.instances):
            if t.is_long:
                # Its memory is not on its way, so the next plan evicts the rest.
                break
            self.suspension.evict(t, instance, unloader, cause)
        if evict.passed:
            self._namespace.transitions.tickets.let_pass(t, evict.ticket)
        self._note_wait(t, evict.ticket, replace(evict.why, reason=Reason.UNLOADING), evict.first)

    def _note_wait(self, t: Transaction, ticket: int, why: Why, first: bool) -> None:
        told = self._queue.told(ticket)
        # Mostly nothing has changed, and there are many.
        if told.reason != why.reason or told.on != device_bits(why.devices):
            cause = _cause(why)
            if cause.reason == Reason.RETURNING and told.reason == Reason.UNLOADING:
                # It is the memory of the same copies.
                cause = cause._replace(other=told.other)
            self._namespace.transitions.tickets.set_reason(t, ticket, cause)
            # mpmm can do nothing about these waits, so people have to be told.
            if cause.reason in OTHERS_END:
                self._namespace.transitions.tickets.warn(t, ticket, self.waiters.sentence(ticket))
        # Others may delay it for `max_overtake_seconds` from now on. Only once, or each plan would let that begin anew.
        if first and not told.head_of_line:
            self._namespace.transitions.tickets.block(t, ticket)


def _cause(why: Why) -> Cause:
    # References, as they are stored: 0 is a row, so it cannot mean none.
    other = 0 if why.other is None else why.other + 1
    return Cause(why.reason, why.need_mb, why.free_mb, why.coming_mb, why.seconds, other, device_bits(why.devices))
