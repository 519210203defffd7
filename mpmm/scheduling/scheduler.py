"""The bridge between policy and shared state: read a view, ask for a plan, write it down.

Whoever changes something that waiters may be waiting for calls `Scheduler.advance` in the same transaction: a
release, the end of a load or of an unload, a new sample, a reaped member. There is no scheduling process. Where the
plan is known beforehand, the warm path does without one: see `shortcuts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mpmm.errors import TableFullError
from mpmm.policy.plan import make_plan
from mpmm.policy.reasons import explain
from mpmm.policy.sharing import expected_wait_s, seen_so_far
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
from mpmm.scheduling.shortcuts import Shortcuts
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.events import Cause
from mpmm.shared_state.futex import wake_one, yield_processor
from mpmm.shared_state.layout import Header, Instance, Model, Ticket, device_bits, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction

__all__ = ["Scheduler"]

# Waits that only other programs, or who has pinned something, can end.
OTHERS_END = frozenset({Reason.FOREIGN, Reason.PINNED})
# Begun in one transaction, whose undo log has an end.
UNLOADS_AT_ONCE = 64
# Longer than a release takes, even where everything about it has left the processor's caches.
ALERT_S = 0.000_3
# Who makes way for a waiter and comes back later than this has made way for somebody else, too: processors are scarce.
LONG_WAY_S = 0.000_5
# Then it does not for so many times as long, which bounds what it may lose.
REST = 100


class Scheduler(Shortcuts):
    """Plans for one namespace. Methods need the lock, where they do not say otherwise."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace)
        self._makes_way_from = 0.0
        # Called without the lock when `advance` has stopped before its end, to have it called again.
        self.go_on: Callable[[], object] = lambda: None

    def advance(self, t: Transaction, newcomer: int | None = None) -> None:
        """Carry out what the policy says about everybody who waits.

        newcomer: row of the ticket that the caller has just made. Raises TableFullError when that one could load
        but for the table of instances; others wait for a row, which is none of the caller's business.

        It stops when the transaction has become long; `go_on` has the rest done in another one.
        """
        words = self._segment.words
        if newcomer is not None:
            self._count_requests(t, words[self._tables.ticket(newcomer) + Ticket.MODEL])
        while words[Header.WAITING] and not self._all_isolated():
            view = self.read_view()
            plan = make_plan(view)
            for decision in plan.decisions:
                self._carry_out(t, decision, newcomer)
                if t.is_long:
                    t.after.append(self.go_on)
                    return
            if plan.blocked or not view.tickets or not self._answered_all(view):
                return

    def needs_nothing(self, ticket: int) -> bool:
        """Tell whether a waiter would be served now, with nothing evicted for it, and with nobody to wait for."""
        decisions = make_plan(self.read_view()).decisions
        return any(one.ticket == ticket and not isinstance(one, Wait | Evict | Refuse) for one in decisions)

    def keep(self, t: Transaction, instance: int, used: bool, call_up: bool) -> bool:
        """Take a copy from its holder, but leave it idle for that process, although others wait.

        See `mpmm.model_manager.tenure`.

        call_up: have the first waiter look for itself when the tenure is over. Return False, and change nothing, if
        others than those who want this copy wait, or it is not to be used any more.
        """
        words, transitions = self._segment.words, self._namespace.transitions
        at = self._tables.instance(instance)
        waiting = words[self._tables.model(words[at + Instance.MODEL]) + Model.WAITING]
        if words[Header.WAITING] != waiting or words[Header.ISOLATED]:
            return False
        if words[at + Instance.DOOMED] or words[at + Instance.OWNER]:
            return False
        found = self._first_user(words[at + Instance.MODEL], words[at + Instance.DEVICES]) if call_up else None
        if call_up and (found is None or found[1]):
            return False
        transitions.holds.release(t, instance, used)
        if found is not None:
            transitions.tickets.call_up(t, found[0])
        return True

    def release(self, t: Transaction, instance: int, used: bool = True) -> None:
        """Take a copy from its holder, and carry out the policy for those who wait; `used` as in the transition.

        If the first waiter waits for just this copy, or may be passed by one who does, the plan is to give it to him,
        and nothing else has changed for the others. That is found out in a tenth of the time of a plan.
        """
        words, transitions = self._segment.words, self._namespace.transitions
        at = self._tables.instance(instance)
        if words[Header.WAITING] and not self.beside_isolation(instance) and not words[at + Instance.DOOMED]:
            found = self._first_user(words[at + Instance.MODEL], words[at + Instance.DEVICES])
            if found is not None:
                ticket, passed = found
                owner = words[at + Instance.OWNER]
                if not owner or owner == words[self._tables.ticket(ticket) + Ticket.MEMBER]:
                    cause = Cause(Reason.PASSING, other=passed) if passed else Cause(Reason.IDLE_COPY)
                    transitions.hand_over.from_holder(t, ticket, instance, cause, used)
                    t.after.append(self._make_way)
                    return
        moves_somebody = words[Header.WAITING] and not self._moves_nobody(instance)
        transitions.holds.release(t, instance, used)
        if moves_somebody:
            self.advance(t)

    def _make_way(self) -> None:
        """Let the waiter that was just woken run on this processor; without the lock.

        There the kernel puts it mostly, even if another one is idle, and then it would wait until this process sleeps.
        So the waiter has its copy after 100 instead of 150 us, or, when it has slept for 10 ms, 150 instead of 270.
        """
        began = time.monotonic()
        if began >= self._makes_way_from:
            yield_processor()
            away_s = time.monotonic() - began
            if away_s > LONG_WAY_S:
                self._makes_way_from = began + REST * away_s

    def alert(self, instance: int) -> None:
        """Wake the newest waiter ahead of a copy's release, if it waits for that model, for `await_alerted`.

        Needs no lock.

        Where it is the only one, it likely waits for just this, and a processor that has gone to sleep with it takes
        as long to wake as the release itself. Where there are more, they are not all asleep.
        """
        words = self._segment.words
        if words[Header.WAITING]:
            newest = self._tables.ticket(words[Header.NEWEST_TICKET])
            if words[newest + Ticket.MODEL] == words[self._tables.instance(instance) + Instance.MODEL]:
                wake_one(self._segment.address + 8 * (newest + Ticket.SIGNAL))

    def await_alerted(self, ticket: int) -> None:
        """Stay awake for the answer that `alert` has announced, for a moment; needs no lock."""
        words, state = self._segment.words, self._tables.ticket(ticket) + Ticket.STATE
        until = time.monotonic() + ALERT_S
        while words[state] == Ticket.WAITING and time.monotonic() < until:
            yield_processor()

    def count_requests(self, t: Transaction) -> None:
        """Bring the demand of all models up to date; a reuse only counts itself."""
        for model in self._tables.used_rows(self._layout.models):
            self._count_requests(t, model)

    def _count_requests(self, t: Transaction, model: int) -> None:
        before = self._demand(model)
        after = before.counted(self._requests(model), t.now / 1e9)
        if after is not before:
            self._namespace.transitions.models.note_demand(
                t,
                model,
                after.mean_interarrival_s,
                after.requests,
                t.now if after.requests > before.requests else to_ns(after.counted_s),
            )

    def _answered_all(self, view: View) -> bool:
        words = self._segment.words
        return all(words[self._tables.ticket(ticket.row)] != Ticket.WAITING for ticket in view.tickets)

    def _make_room_in_table(self, t: Transaction, ticket: int) -> bool:
        """Have the copy that has been idle longest unloaded for want of a row; return False if none may be."""
        rows = self._tables.view(self._layout.instances)
        if np.any((rows[:, Instance.STATE] == Instance.UNLOADING) & (rows[:, Instance.UNLOAD_LATE] == 0)):
            return True
        at = self._tables.ticket(ticket)
        unloader, model = self._segment.words[at + Ticket.MEMBER] - 1, self._segment.words[at + Ticket.MODEL]
        if self.suspension.drop_oldest(t, unloader, Cause(Reason.NO_ROW, other=model + 1)):
            return True
        pinned = self._tables.view(self._layout.models)[:, Model.PINS] > 0
        idle = np.flatnonzero(rows[:, Instance.STATE] == Instance.IDLE)
        idle = idle[~pinned[rows[idle, Instance.MODEL]]]
        if not len(idle):
            return False
        oldest = int(idle[np.argmin(rows[idle, Instance.SINCE])])
        self._namespace.transitions.unloads.begin(t, oldest, unloader, True, Cause(Reason.NO_ROW, other=model + 1))
        return True

    def make_room_for_model(self, t: Transaction, unloader: int) -> bool:
        """Have the model whose copies have all been idle for longest unloaded by a member (slot), for want of a row.

        Nothing if the row of another one is about to come free, so that of many newcomers each costs one model.
        Return False if every row is in use, held, pinned or waited for: then nothing has changed.
        """
        models, copies = self._tables.view(self._layout.models), self._tables.view(self._layout.instances)
        kept = models[:, Model.ACTIVE] + models[:, Model.LOADING] + models[:, Model.WAITING] + models[:, Model.PINS]
        unwanted = (models[:, Model.STATE] == Model.MODEL) & (kept == 0)
        # What a stuck process should unload may hold its row for ever.
        stuck = copies[(copies[:, Instance.STATE] == Instance.UNLOADING) & (copies[:, Instance.UNLOAD_LATE] != 0)]
        unwanted[stuck[:, Instance.MODEL]] = False
        suspended = unwanted & (models[:, Model.SUSPENDED] > 0)
        if np.any(unwanted & (models[:, Model.IDLE] == 0) & ~suspended):
            return True
        if np.any(suspended):
            # What is being suspended can go once that has ended.
            self.suspension.drop_oldest(t, unloader, Cause(Reason.NO_ROW))
            return True
        idle = np.flatnonzero(copies[:, Instance.STATE] == Instance.IDLE)
        last_used = np.zeros(len(models), dtype=np.uint64)
        np.maximum.at(last_used, copies[idle, Instance.MODEL].astype(np.intp), copies[idle, Instance.SINCE])
        candidates = np.flatnonzero(unwanted)
        if not len(candidates):
            return False
        model = int(candidates[np.argmin(last_used[candidates])])
        for row in idle[copies[idle, Instance.MODEL] == model][:UNLOADS_AT_ONCE].tolist():
            self._namespace.transitions.unloads.begin(t, row, unloader, True, Cause(Reason.NO_ROW))
        return True

    def _carry_out(self, t: Transaction, decision: Decision, newcomer: int | None) -> None:
        transitions = self._namespace.transitions
        match decision:
            case Satisfied(ticket):
                transitions.tickets.answer_enough(t, ticket)
            case Grant(ticket, instance, why):
                # If not, it has just gone to make room in the table of copies, which the plan does not know of.
                if self._is_idle(instance):
                    transitions.hand_over.grant(t, ticket, instance, _cause(why))
            case Resume(ticket, instance, why):
                # If not, it has just been dropped to make room in the host for another one.
                if self._segment.words[self._tables.instance(instance)] == Instance.SUSPENDED:
                    transitions.hand_over.allow_resume(t, ticket, instance, _cause(why))
            case Load(ticket, devices, need_mb, alone, why):
                try:
                    transitions.hand_over.allow_load(t, ticket, device_bits(devices), need_mb, alone, _cause(why))
                except TableFullError as error:
                    # Found out before anything was written. (A full undo log is no matter of one ticket.)
                    if error.table != self._layout.instances.name:
                        raise
                    if not self._make_room_in_table(t, ticket) and ticket == newcomer:
                        raise
                    self._note_wait(t, ticket, replace(why, reason=Reason.TABLE_FULL), first=False)
            case Evict(ticket, instances, why, passed):
                at = self._tables.ticket(ticket)
                unloader, model = self._segment.words[at + Ticket.MEMBER] - 1, self._segment.words[at + Ticket.MODEL]
                cause = _cause(why)._replace(other=model + 1)
                for instance in filter(self._is_idle, instances):
                    if t.is_long:
                        # Its memory is not on its way, so the next plan evicts the rest.
                        break
                    # (A twin has gone with the one before it.)
                    self.suspension.evict(t, instance, unloader, cause)
                if passed:
                    transitions.tickets.let_pass(t, ticket)
                self._note_wait(t, ticket, replace(why, reason=Reason.UNLOADING), first=True)
            case Refuse(ticket, why):
                transitions.tickets.refuse(t, ticket, _cause(why))
            case Wait(ticket, _, why, first, passed):
                if passed:
                    transitions.tickets.let_pass(t, ticket)
                self._note_wait(t, ticket, why, first)

    def why(self, ticket: int) -> str:
        """Return why a ticket waits, for people."""
        reason = Reason(self._segment.words[self._tables.ticket(ticket) + Ticket.REASON])
        return f"{reason.name.lower()}: {self.sentence(ticket)}"

    def sentence(self, ticket: int) -> str:
        """Return why a ticket waits, as a sentence whose subject is its model."""
        words, floats, at = self._segment.words, self._segment.floats, self._tables.ticket(ticket)
        other = words[at + Ticket.OTHER]
        return explain(
            words[at + Ticket.REASON],
            floats[at + Ticket.NEED_MB],
            floats[at + Ticket.FREE_MB],
            floats[at + Ticket.COMING_MB],
            floats[at + Ticket.SECONDS],
            self._tables.tag_of(other - 1) if other else None,
            device_rows(words[at + Ticket.ON]),
        )

    def expected_wait_s(self, ticket: int) -> float:
        """Return in how many seconds a waiter is expected to have its copy, see `policy.sharing`."""
        words, at, now = self._segment.words, self._tables.ticket(ticket), time.monotonic_ns()
        copies, model = self.read_copies(), words[at + Ticket.MODEL]
        models = {row: self._model(row, copies, now) for row in {model, *copies.shared, *copies.owned}}
        rank, seen = words[at + Ticket.RANK], seen_so_far(models.values())
        ahead = sum(one.model == model and one.rank < rank and not one.preload for one in self._waiters())
        reason, seconds = words[at + Ticket.REASON], self._segment.floats[at + Ticket.SECONDS]
        return expected_wait_s(models[model], words[at + Ticket.MEMBER], ahead, reason, seconds, seen)

    def _note_wait(self, t: Transaction, ticket: int, why: Why, first: bool) -> None:
        words, at = self._segment.words, self._tables.ticket(ticket)
        # Mostly nothing has changed, and there are many.
        if words[at + Ticket.REASON] != why.reason or words[at + Ticket.ON] != device_bits(why.devices):
            cause = _cause(why)
            if cause.reason == Reason.RETURNING and words[at + Ticket.REASON] == Reason.UNLOADING:
                # It is the memory of the same copies.
                cause = cause._replace(other=words[at + Ticket.OTHER])
            self._namespace.transitions.tickets.set_reason(t, ticket, cause)
            if cause.reason in OTHERS_END:
                self._namespace.transitions.tickets.warn(t, ticket, self.sentence(ticket))
        if first and not words[at + Ticket.BLOCKED_AT]:
            self._namespace.transitions.tickets.block(t, ticket)


def _cause(why: Why) -> Cause:
    other = 0 if why.other is None else why.other + 1
    return Cause(why.reason, why.need_mb, why.free_mb, why.coming_mb, why.seconds, other, device_bits(why.devices))
