"""The bridge between policy and shared state: read a view, ask for a plan, write it down.

Whoever changes something that waiters may be waiting for calls `Scheduler.advance` in the same transaction: a
release, the end of a load or of an unload, a new sample, a reaped member. There is no scheduling process.

A plan reads every row, so the warm path does without one where the plan is known beforehand:

Q1  An idle copy may be taken at once although others wait (`may_take`) if nobody waits for its model, nothing runs
    alone or waits to, and the time for which each blocked waiter may be overtaken is not over. The plan would grant the
    copy to a newcomer: no waiter ahead can use it, and `_hand_out` stops, or keeps copies back, only for a waiter that
    isolates or is due. It moves nobody else: what is idle only becomes less by it.
Q2  A release of a copy whose model nobody waits for needs no plan (`moves_nobody`) if no waiter is blocked, nothing
    runs alone or waits to, and every waiter waits for what an idle copy of another model does not change: for leases
    or other programs to leave room (LEASED and FOREIGN: too little even if all copies went), for a copy of its own
    model (SHARING, COPIES), or, as a lease, behind one that waits for leases. PINNED belongs to these if the model
    is pinned: its copy makes no room then. Time changes such waits, too, and so does each hold that is measured, from
    which it is guessed how long others may take (SHARING); for that the leader plans at each poll.
Q3  A newcomer for a model whose copies are all in use, and all usable by any process, can only wait for one of them
    (`known_wait`), if there are as many copies as there may be, or if they serve it sooner than a load would. This is
    known where everybody who waits wants this model, the newest of them was told the same, nothing runs alone or waits
    to, and no load of the model has failed. Nobody else is moved by a newcomer at the end of the queue. A copy that is
    idle during another process's tenure (`mpmm.model_manager.tenure`) counts as one in use.
Q4  A newcomer waits behind the head of the queue (`known_wait`, too) where nothing may be used or loaded beside that:
    something runs alone on every device; or the only device is drained for the head, and there is no copy of the
    newcomer's model; or the head waits for room, and that model has copies that every process can use, none of them
    idle, so that another one would not be loaded beside the room that is kept for the head.
Q5  A waiter that leaves moves nobody (`holds_up_nobody`) if it stood behind another one, or waited for a copy of its
    own model: it kept no room, and those behind it only move up.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mpmm.errors import TableFullError
from mpmm.policy.backoff import back_off_s
from mpmm.policy.demand import Demand
from mpmm.policy.fairness import UNKNOWN_FIRST, rank_ns
from mpmm.policy.out_of_memory import MORE_MB
from mpmm.policy.plan import make_plan
from mpmm.policy.reasons import explain
from mpmm.policy.sharing import expected_wait_s, remaining_s, seen_so_far, served_in_s
from mpmm.policy.suspension import resume_s
from mpmm.policy.view import (
    BusyInstance,
    Decision,
    DeviceView,
    Evict,
    Grant,
    IdleInstance,
    Load,
    ModelView,
    PlacedInstance,
    Reason,
    Refuse,
    Resume,
    Rules,
    Satisfied,
    SuspendedInstance,
    TicketView,
    View,
    Wait,
    Why,
)
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.events import Cause
from mpmm.shared_state.futex import wake_one, yield_processor
from mpmm.shared_state.layout import Device, Header, Instance, Model, Ticket, device_bits, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction
from mpmm.suspend.books import SuspensionBooks

__all__ = ["CALLED_UP_FOR_NS", "Copies", "Scheduler"]

# Less than this is no news for those who wait; the next poll of the leader has them planned for anyway.
LEAST_ROOM_MB = 1.0
# So many waiters are looked at in one step.
QUEUE_PART = 32
FEW_WAITERS = 16
# Waits that no copy of another model ends by becoming idle.
QUIET_REASONS = frozenset({Reason.LEASED, Reason.FOREIGN, Reason.PINNED, Reason.SHARING, Reason.COPIES})
# Waits for a copy of the own model.
SHARED_REASONS = frozenset({Reason.SHARING, Reason.COPIES})
# So long before its end a tenure was the reason to call a waiter up, see `mpmm.model_manager.tenure`.
CALLED_UP_FOR_NS = 1_500_000
# Waits of the head of the queue, for which room is kept.
HEAD_REASONS = frozenset({Reason.IN_USE, Reason.UNLOADING, Reason.RETURNING})
# Waits for which nothing is kept, and nobody else stands back.
HELD_UP_REASONS = frozenset({Reason.BEHIND, Reason.OUTRANKED, Reason.SHARING, Reason.COPIES})
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


def _counts() -> defaultdict[int, defaultdict[int, int]]:
    return defaultdict(lambda: defaultdict(int))


@dataclass
class Copies:
    """What the instance rows say: copies by model (loaded ones shared, or owned by member; loading by member), MB and
    copies in mid-unload by device. `booked_mb` is what all but the loading ones take, `reserved_mb` what loads in
    progress and leases may take, or take already where that is more."""

    idle: list[IdleInstance] = field(default_factory=list)
    busy: list[BusyInstance] = field(default_factory=list)
    leases: list[PlacedInstance] = field(default_factory=list)
    suspended: list[SuspendedInstance] = field(default_factory=list)
    suspending: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    shared: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    owned: defaultdict[int, defaultdict[int, int]] = field(default_factory=_counts)
    loading: defaultdict[int, defaultdict[int, int]] = field(default_factory=_counts)
    leaving: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    newest_load: dict[int, int] = field(default_factory=dict)
    newest_hold: dict[int, int] = field(default_factory=dict)
    unloading: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    booked_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    reserved_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    unloading_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    leased_mb: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    steady: dict[int, int] = field(default_factory=dict)


class _Waiter(NamedTuple):
    """What the way of a release looks at in a ticket's row."""

    row: int
    rank: int
    priority: int
    model: int
    deadline: int
    blocked_at: int
    preload: int
    usable_on: int


_WAITER_FIELDS = (
    *(Ticket.RANK, Ticket.PRIORITY, Ticket.MODEL, Ticket.DEADLINE),
    *(Ticket.BLOCKED_AT, Ticket.PRELOAD, Ticket.TIED),
)


_ROOM_FIELDS = [Device.EXTERNAL_MB, Device.EXTERNAL_LEAST_MB, Device.RETURNING_MB]


class Scheduler:
    """Plans for one namespace. Methods need the lock."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._segment = namespace.segment
        self._layout = namespace.segment.layout
        self._makes_way_from = 0.0
        self.suspension = SuspensionBooks(namespace, lambda model: self.rate(model))
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
            # Nobody in this part of the queue is left, so the rest moves up.

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

    def _requests(self, model: int) -> int:
        words, at = self._segment.words, self._tables.model(model)
        counts = (Model.HITS, Model.LOADS, Model.RESUMES, Model.LOADING, Model.WAITING)
        return sum(words[at + count] for count in counts)

    def _demand(self, model: int) -> Demand:
        words, at = self._segment.words, self._tables.model(model)
        gap_s = self._segment.floats[at + Model.GAP_S]
        return Demand(gap_s, words[at + Model.REQUESTS], words[at + Model.REQUESTED_AT] / 1e9)

    def rate(self, model: int) -> float:
        """Return how often a model (row) is asked for, per second."""
        now_s = time.monotonic_ns() / 1e9
        return self._demand(model).counted(self._requests(model), now_s).per_second(now_s)

    def _all_isolated(self) -> bool:
        """Tell whether a copy runs alone on every device."""
        isolated = self._segment.words[Header.ISOLATED]
        return bool(isolated) and isolated == device_bits(self._tables.used_rows(self._layout.devices))

    def _first_user(self, model: int, devices: int) -> tuple[int, int] | None:
        """Return the first waiter for a model's copy on devices (bits), and a reference to the model of whom he passes,
        or 0.

        None if there is no such waiter, or if it takes a plan to find out whether he may pass.
        """
        now = time.monotonic_ns()
        words = self._segment.words
        if not words[self._tables.model(model) + Model.WAITING]:
            return None
        if words[Header.WAITING] == 1:
            # Mostly it is the newest, and then nobody else has to be looked for.
            row = words[Header.NEWEST_TICKET]
            at = self._tables.ticket(row)
            if words[at + Ticket.STATE] == Ticket.WAITING:
                usable_on = words[at + Ticket.TIED]
                wants = words[at + Ticket.MODEL] == model and not words[at + Ticket.PRELOAD]
                wants = wants and not (usable_on and devices & ~usable_on)
                return (row, 0) if wants and words[at + Ticket.DEADLINE] > now else None
        waiting = [one for one in self._waiters() if one.deadline > now]
        wanting = [
            one
            for one in waiting
            if one.model == model and not one.preload and not (one.usable_on and devices & ~one.usable_on)
        ]
        if not wanting or (len(wanting) < len(waiting) and not all(one.priority for one in waiting)):
            return None
        first = min(wanting, key=lambda one: one.rank)
        blocked = [one for one in waiting if one.blocked_at]
        if not blocked or first.rank <= min(one.rank for one in blocked):
            return first.row, 0
        bound_ns = to_ns(self._namespace.settings.max_overtake_seconds)
        if now - min(one.blocked_at for one in blocked) >= bound_ns:
            return None
        return first.row, min(blocked, key=lambda one: one.rank).model + 1

    def _waiters(self) -> list[_Waiter]:
        """Return the waiters in any order; few ones without NumPy, which takes most of the time of a hand-over then."""
        layout, words = self._layout.tickets, self._segment.words
        rows = self._tables.rows_where(layout, Ticket.STATE, Ticket.WAITING)
        if len(rows) > FEW_WAITERS:
            fields = self._tables.view(layout)[rows][:, list(_WAITER_FIELDS)].tolist()
            return [_Waiter(row, *values) for row, values in zip(rows, fields, strict=True)]
        starts = [self._tables.ticket(row) for row in rows]
        return [
            _Waiter(row, *(words[at + field] for field in _WAITER_FIELDS)) for row, at in zip(rows, starts, strict=True)
        ]

    def _queue_order(self) -> npt.NDArray[np.intp]:
        """Return the rows of waiters in the queue's order. Those whose deadline has passed are about to leave."""
        rows = self._tables.view(self._layout.tickets)
        now = time.monotonic_ns()
        waiting = np.flatnonzero(rows[:, Ticket.STATE] == Ticket.WAITING)
        waiting = waiting[rows[waiting, Ticket.DEADLINE] > now]
        priorities = rows[waiting, Ticket.PRIORITY]
        # The rule of `policy.fairness.effective_priority`, for all at once.
        bound_ns = to_ns(UNKNOWN_FIRST * self._namespace.settings.max_overtake_seconds)
        promoted = (priorities == 1) & (rows[waiting, Ticket.ENQUEUED] + np.uint64(bound_ns) <= now)
        priorities = np.where(promoted, 0, priorities)
        ordered: npt.NDArray[np.intp] = waiting[
            np.lexsort((rows[waiting, Ticket.NUMBER], rows[waiting, Ticket.RANK], priorities))
        ]
        return ordered

    def _answered_all(self, view: View) -> bool:
        words = self._segment.words
        return all(words[self._tables.ticket(ticket.row)] != Ticket.WAITING for ticket in view.tickets)

    def must_queue(self) -> bool:
        """Tell whether a newcomer may not simply take an idle copy: somebody waits."""
        return bool(self._segment.words[Header.WAITING])

    def may_take(self, instance: int) -> bool:
        """Tell whether a newcomer may take an idle copy at once although others wait; False if it takes a plan to know.

        See Q1 above.
        """
        words = self._segment.words
        if words[self._tables.model(words[self._tables.instance(instance) + Instance.MODEL]) + Model.WAITING]:
            return False
        waiting = self._waiters()
        if self._isolation_matters(waiting):
            return False
        oldest_ns = time.monotonic_ns() - self._namespace.settings.max_overtake_seconds * 1e9
        return all(not one.blocked_at or one.blocked_at > oldest_ns for one in waiting)

    def may_have_to_wait(self, tag: str) -> bool:
        """Tell whether a newcomer for a model had likely better queue at once than look for an idle copy first.

        A guess, which needs no lock.
        """
        words = self._segment.words
        if not words[Header.WAITING]:
            return False
        row = self._tables.model_row(tag)
        return row is not None and bool(words[self._tables.model(row) + Model.WAITING])

    def may_know_the_wait(self, tag: str) -> bool:
        """Tell whether `known_wait` is worth a transaction: somebody waits, or has a copy of the model.

        A guess, which needs no lock.
        """
        words, row = self._segment.words, self._tables.model_row(tag)
        return row is not None and bool(words[Header.WAITING] or words[self._tables.model(row) + Model.ACTIVE])

    def known_wait(self, model: int) -> Cause | None:
        """Return why a newcomer for a model waits, in the queue's last place; None if it takes a plan to know.

        For one that may go anywhere and holds nothing else. See Q3 and Q4 above.
        """
        return self._waits_for_a_copy(model) or self._waits_behind(model)

    def _waits_behind(self, model: int) -> Cause | None:
        """Return that a newcomer for a model waits behind another one, None if it takes a plan to know; see Q4."""
        words, at = self._segment.words, self._tables.model(model)
        if self._all_isolated():
            return Cause(Reason.BEHIND)
        # An unknown model would come before known ones.
        if words[Header.ISOLATED] or words[at + Model.FAILURES] or not self.is_known(model):
            return None
        now = time.monotonic_ns()
        waiting = self._waiters()
        ahead = {
            words[self._tables.ticket(one.row) + Ticket.REASON]
            for one in waiting
            if one.blocked_at and one.priority <= 1 and one.rank <= rank_ns(now, 0) and one.deadline > now
        }
        in_use, idle = words[at + Model.ACTIVE], words[at + Model.IDLE]
        if not (in_use or idle or words[at + Model.LOADING]) and len(self._tables.used_rows(self._layout.devices)) == 1:
            return Cause(Reason.BEHIND) if Reason.DRAINING in ahead else None
        if idle or not in_use or not words[at + Model.SHARES] or self._isolation_matters(waiting):
            return None
        return Cause(Reason.BEHIND) if ahead & HEAD_REASONS else None

    def holds_up_nobody(self, ticket: int) -> bool:
        """Tell whether it is known without a plan that nobody is moved if a waiter leaves; see Q5 above."""
        words, at = self._segment.words, self._tables.ticket(ticket)
        return words[at] == Ticket.WAITING and words[at + Ticket.REASON] in HELD_UP_REASONS

    def _waits_for_a_copy(self, model: int) -> Cause | None:
        """Return that a newcomer for a model waits for one of its copies, None if it takes a plan to know; see Q3."""
        words, floats, at = self._segment.words, self._segment.floats, self._tables.model(model)
        waiting, active, loading = (words[at + word] for word in (Model.WAITING, Model.ACTIVE, Model.LOADING))
        hold_s, load_s = floats[at + Model.HOLD_S], floats[at + Model.LOAD_S]
        idle = words[at + Model.IDLE]
        if not (active or idle) or words[at + Model.FAILURES] or not words[at + Model.SHARES]:
            return None
        if idle and not self._is_left_to_another(model):
            return None
        measured = words[Header.SOURCE_BOOKS_ONLY] or words[Header.SOURCE_MEASURES_PROCESSES]
        if words[Header.WAITING] != waiting or words[Header.ISOLATED] or not (measured or self.is_known(model)):
            return None
        if waiting and not self._newest_waits_for_a_copy(model):
            return None
        copies = map(self._tables.instance, self._tables.rows_where(self._layout.instances, Instance.MODEL, model))
        if any(words[one] and not self._is_for_all(one) for one in copies):
            return None
        copies_coming = active + idle + loading
        if copies_coming >= self._namespace.settings.max_model_copies:
            return Cause(Reason.COPIES)
        seconds = served_in_s(hold_s, hold_s, waiting, copies_coming)
        return Cause(Reason.SHARING, seconds=seconds) if 0 < seconds < load_s else None

    def _is_left_to_another(self, model: int) -> bool:
        """Tell whether what is idle of a model is another process's for the rest of its tenure.

        Then a waiter was called up a moment ago, which looks for itself at the end of the tenure, and stands before any
        newcomer: a plan now would only cut the tenure short.
        """
        words, now = self._segment.words, time.monotonic_ns()
        called_up = (
            words[self._tables.ticket(one.row) + Ticket.CALLED_UP] for one in self._waiters() if one.model == model
        )
        return any(now - CALLED_UP_FOR_NS < at <= now for at in called_up)

    def _is_for_all(self, at: int) -> bool:
        """Tell whether a used row is that of a copy that any process can have, now or after somebody else."""
        words = self._segment.words
        return words[at] in (Instance.ACTIVE, Instance.IDLE, Instance.LOADING) and not (
            words[at + Instance.OWNER] or words[at + Instance.DOOMED]
        )

    def _newest_waits_for_a_copy(self, model: int) -> bool:
        """Tell whether the ticket that was taken last waits for a copy that others of this model have."""
        words = self._segment.words
        at = self._tables.ticket(words[Header.NEWEST_TICKET])
        return bool(
            words[at] == Ticket.WAITING
            and words[at + Ticket.MODEL] == model
            and words[at + Ticket.REASON] in SHARED_REASONS
            and not (words[at + Ticket.PRELOAD] or words[at + Ticket.TIED] or words[at + Ticket.BLOCKED_AT])
        )

    def _moves_nobody(self, instance: int) -> bool:
        """Tell whether it is known without a plan that the release of a copy serves no waiter; see Q2 above."""
        words = self._segment.words
        at = self._tables.instance(instance)
        model = self._tables.model(words[at + Instance.MODEL])
        if not words[Header.WAITING] or words[model + Model.WAITING] or words[at + Instance.DOOMED]:
            return False
        waiting = self._waiters()
        if any(one.blocked_at for one in waiting) or self._isolation_matters(waiting):
            return False
        reasons = {one.row: words[self._tables.ticket(one.row) + Ticket.REASON] for one in waiting}
        behind = [one for one in waiting if reasons[one.row] == Reason.BEHIND]
        if behind and not self._are_behind_a_lease(behind, [one for one in waiting if one not in behind], reasons):
            return False
        return (QUIET_REASONS | {Reason.BEHIND}).issuperset(reasons.values())

    def _are_behind_a_lease(self, behind: list[_Waiter], others: list[_Waiter], reasons: Mapping[int, int]) -> bool:
        """Tell whether these are leases, behind one that waits for leases to end."""
        words = self._segment.words
        ranks = [one.rank for one in others if reasons[one.row] == Reason.LEASED]
        if not ranks:
            return False
        first = min(ranks)
        return all(one.rank > first and words[self._tables.model(one.model)] == Model.LEASE for one in behind)

    def _isolation_matters(self, waiting: Sequence[_Waiter]) -> bool:
        """Tell whether a copy runs alone somewhere, or one of these waits to."""
        words = self._segment.words
        if words[Header.ISOLATED]:
            return True
        if words[Header.SOURCE_BOOKS_ONLY] or words[Header.SOURCE_MEASURES_PROCESSES]:
            return False
        return any(not self.is_known(one.model) for one in waiting)

    def beside_isolation(self, instance: int) -> bool:
        """Tell whether a copy lies where another one runs alone, so that it may not be used."""
        words = self._segment.words
        isolated = words[Header.ISOLATED]
        return bool(isolated and isolated & words[self._tables.instance(instance) + Instance.DEVICES])

    def read_view(self) -> View:
        """Return what the policy may look at."""
        words, settings = self._segment.words, self._namespace.settings
        copies = self.read_copies()
        now = time.monotonic_ns()
        tickets = self._tickets(Counter(copy.model for copy in copies.idle))
        wanted = {ticket.model for ticket in tickets} | {copy.model for copy in copies.busy}
        wanted |= set(copies.shared) | set(copies.owned) | {copy.model for copy in copies.suspended}
        return View(
            now_s=now / 1e9,
            rules=Rules(
                slack_percentage=settings.slack_percentage,
                eviction_cooldown_seconds=settings.eviction_cooldown_seconds,
                min_model_copies=int(settings.min_model_copies),
                max_overtake_seconds=settings.max_overtake_seconds,
                # Alone on the device is the way to measure where only the whole device is measured.
                isolate_unknown=not words[Header.SOURCE_BOOKS_ONLY] and not words[Header.SOURCE_MEASURES_PROCESSES],
                max_model_copies=settings.max_model_copies,
            ),
            models={model: self._model(model, copies, now) for model in wanted},
            idle=tuple(sorted(copies.idle, key=lambda copy: -copy.idle_since_s)),
            tickets=tickets,
            devices=self.device_views(copies),
            busy=tuple(copies.busy),
            leases=tuple(copies.leases),
            suspended=tuple(sorted(copies.suspended, key=lambda copy: -copy.since_s)),
        )

    def read_copies(self) -> Copies:
        """Return what the instance rows say, in one pass over those in use."""
        words, floats, tables = self._segment.words, self._segment.floats, self._tables
        now = time.monotonic_ns()
        copies = Copies()
        for row in tables.used_rows(self._layout.instances):
            at = tables.instance(row)
            state, model, _, holder, owner, server, devices = words[at : at + Instance.MB]
            mb, reserved = floats[at + Instance.MB], floats[at + Instance.RESERVED_MB]
            since = words[at + Instance.SINCE]
            pinned = bool(words[tables.model(model) + Model.PINS])
            device = devices.bit_length() - 1
            other_shares: tuple[tuple[int, float], ...] = ()
            if devices & (devices - 1):
                (device, mb), *others = tables.shares_of(row)
                other_shares = tuple(others)
            if words[at + Instance.STEADY]:
                copies.steady.update(dict.fromkeys(device_rows(devices), model))
            if state == Instance.LEASED:
                # Not a copy of a model, but a reservation.
                self._share_out(copies.reserved_mb, device, other_shares, max(reserved, floats[at + Instance.MB]))
                self._share_out(copies.leased_mb, device, other_shares, reserved)
                share_mb = reserved / (1 + len(other_shares))
                shares = tuple((other, share_mb) for other, _ in other_shares)
                copies.leases.append(PlacedInstance(row, model, device, share_mb, other_shares=shares))
                continue
            leaves = state in (Instance.ACTIVE, Instance.LOADING, Instance.RESUMING) and words[at + Instance.DOOMED]
            copies.leaving[model] += bool(leaves)
            if state in (Instance.LOADING, Instance.RESUMING):
                copies.loading[model][holder] += not leaves
                copies.newest_load[model] = max(since, copies.newest_load.get(model, 0))
                free_in_s = self._free_in_s(model, since, now, loading=True)
                copies.busy.append(
                    BusyInstance(row, model, device, mb, free_in_s, pinned, holder, True, other_shares=other_shares)
                )
            else:
                copies.booked_mb[device] += mb
                for other, share_mb in other_shares:
                    copies.booked_mb[other] += share_mb
            if state == Instance.SUSPENDED:
                copies.suspended.append(self._suspended(row, model, device, other_shares, since, owner))
                continue
            if state == Instance.SUSPENDING:
                copies.suspending[model] += 1
            if state in (Instance.UNLOADING, Instance.SUSPENDING):
                # The memory of an unload that is late is in use, and nobody counts on it.
                late = words[at + Instance.UNLOAD_LATE]
                for other, share_mb in () if late else ((device, mb), *other_shares):
                    copies.unloading[other] += 1
                    copies.unloading_mb[other] += share_mb
            elif state in (Instance.ACTIVE, Instance.IDLE) and owner:
                copies.owned[model][owner] += not leaves
            elif state in (Instance.ACTIVE, Instance.IDLE):
                copies.shared[model] += not leaves
            if state == Instance.IDLE:
                copies.idle.append(
                    IdleInstance(row, model, device, mb, since / 1e9, owner or None, pinned, other_shares=other_shares)
                )
            elif state == Instance.ACTIVE:
                copies.newest_hold[model] = max(since, copies.newest_hold.get(model, 0))
                free_in_s = self._free_in_s(model, since, now, loading=False)
                copies.busy.append(
                    BusyInstance(row, model, device, mb, free_in_s, pinned, owner or None, other_shares=other_shares)
                )
            if reserved and server:
                self._add_load(copies, row, device, other_shares, reserved)
            elif reserved:
                self._share_out(copies.reserved_mb, device, other_shares, reserved)
        return copies

    def _suspended(
        self, row: int, model: int, device: int, other_shares: Sequence[tuple[int, float]], since_ns: int, owner: int
    ) -> SuspendedInstance:
        share_mb = self._segment.floats[self._tables.instance(row) + Instance.DEVICE_MB] / (1 + len(other_shares))
        others = tuple((other, share_mb) for other, _ in other_shares)
        resumes_in_s = resume_s(self.suspension.movable(row))
        return SuspendedInstance(
            row, model, device, share_mb, since_ns / 1e9, owner or None, resumes_in_s, other_shares=others
        )

    @staticmethod
    def _share_out(
        figures: dict[int, float], device: int, other_shares: Sequence[tuple[int, float]], mb: float
    ) -> None:
        """Add an equal share to the figures of all devices of a copy."""
        share_mb = mb / (1 + len(other_shares))
        figures[device] += share_mb
        for other, _ in other_shares:
            figures[other] += share_mb

    def _add_load(
        self, copies: Copies, row: int, device: int, other_shares: Sequence[tuple[int, float]], reserved: float
    ) -> None:
        """Add what a load in progress was allowed, or what its server has taken already, where that is more."""
        share_mb = reserved / (1 + len(other_shares))
        for other in (device, *(other for other, _ in other_shares)):
            copies.reserved_mb[other] += max(
                share_mb, self._namespace.transitions.ledgers.measured_share(row, other) or 0.0
            )

    def _free_in_s(self, model: int, since_ns: int, now_ns: int, loading: bool) -> float:
        """Return when an instance that is held, or being loaded, is expected to be idle, judged by how long that takes
        on average and how long it has taken already."""
        floats, at = self._segment.floats, self._tables.model(model)
        hold_s, load_s, elapsed_s = floats[at + Model.HOLD_S], floats[at + Model.LOAD_S], (now_ns - since_ns) / 1e9
        return hold_s + remaining_s(load_s, elapsed_s) if loading else remaining_s(hold_s, elapsed_s)

    def device_views(self, copies: Copies) -> tuple[DeviceView, ...]:
        """Return what the ledgers of all devices say."""
        words, floats, tables = self._segment.words, self._segment.floats, self._tables
        late = words[Header.SOURCE_SETTLES_LATE]
        views = []
        for row in tables.used_rows(self._layout.devices):
            at = tables.device(row)
            external, least = floats[at + Device.EXTERNAL_MB], floats[at + Device.EXTERNAL_LEAST_MB]
            if math.isnan(external):
                # It has never been measured. (Where nobody measures it any more, the last figure still counts.)
                external = least = 0.0
            returning = floats[at + Device.RETURNING_MB] if late else 0.0
            views.append(
                DeviceView(
                    device=row,
                    total_mb=floats[at + Device.TOTAL_MB],
                    used_mb=external + copies.booked_mb[row] + returning,
                    reserved_mb=copies.reserved_mb[row],
                    unloading_mb=copies.unloading_mb[row],
                    returning_mb=returning,
                    leased_mb=copies.leased_mb[row],
                    external_mb=external,
                    external_least_mb=least,
                    isolated=bool(words[Header.ISOLATED] >> row & 1),
                    unloading=copies.unloading[row],
                    steady=copies.steady.get(row),
                )
            )
        return tuple(views)

    def need_mb(self, model: int) -> float:
        """Return what has to be free for a copy of a model: what it is expected to take, but above its bound."""
        bound_mb = self._segment.floats[self._tables.model(model) + Model.AT_LEAST_MB]
        expected_mb = self.expected_mb(model)
        return max(expected_mb, bound_mb + MORE_MB) if bound_mb else expected_mb

    def expected_mb(self, model: int) -> float:
        """Return what a copy of a model takes once it is loaded, as far as known.

        That is its estimate, else what its users say, else the default.
        """
        floats, at = self._segment.floats, self._tables.model(model)
        if self._segment.words[at + Model.KNOWN]:
            return floats[at + Model.ESTIMATE_MB]
        return floats[at + Model.EXPECT_MB] or self._namespace.settings.default_estimate_mb

    def is_known(self, model: int) -> bool:
        """Tell whether there is an estimate of a model, or a user's word, so that it need not be measured alone."""
        at = self._tables.model(model)
        return bool(self._segment.words[at + Model.KNOWN] or self._segment.floats[at + Model.EXPECT_MB])

    def room(self) -> list[float]:
        """Return the figures, in MB, of which a smaller one means more room: for each device, and of all copies."""
        devices = self._tables.view(self._layout.devices).view(np.float64)[:, _ROOM_FIELDS]
        copies = self._tables.view(self._layout.instances).view(np.float64)[:, Instance.MB]
        return [*devices.ravel().tolist(), float(copies.sum())]

    def shows_more_room(self, before: list[float]) -> bool:
        """Tell whether there is more room than when `room` said `before`, or its figures cannot be compared."""
        return not all(now > was - LEAST_ROOM_MB for now, was in zip(self.room(), before, strict=True))

    def used_mb(self, device: int, copies: Copies) -> float:
        """Return the memory in use: the last figure, or the books where nothing can be measured."""
        if self._segment.words[Header.SOURCE_BOOKS_ONLY]:
            return copies.booked_mb[device]
        return self._segment.floats[self._tables.device(device) + Device.USED_MB]

    def limit_mb(self, device: int) -> float:
        """Return how much of a device may be in use."""
        total = self._segment.floats[self._tables.device(device) + Device.TOTAL_MB]
        return total * (1.0 - self._namespace.settings.slack_percentage)

    def _model(self, model: int, copies: Copies, now_ns: int) -> ModelView:
        at = self._tables.model(model)
        words, floats = self._segment.words, self._segment.floats
        return ModelView(
            model=model,
            known=self.is_known(model),
            need_mb=self.need_mb(model),
            shared=copies.shared[model],
            owned=copies.owned[model],
            waiting=words[at + Model.WAITING],
            loading=copies.loading[model],
            shares=bool(words[at + Model.SHARES]),
            load_s=floats[at + Model.LOAD_S],
            hold_s=floats[at + Model.HOLD_S],
            loading_for_s=(now_ns - copies.newest_load.get(model, now_ns)) / 1e9,
            held_for_s=(now_ns - copies.newest_hold.get(model, now_ns)) / 1e9,
            rate=self._demand(model).counted(self._requests(model), now_ns / 1e9).per_second(now_ns / 1e9),
            lease=words[at] == Model.LEASE,
            failures=words[at + Model.FAILURES],
            failed_ago_s=(now_ns - words[at + Model.FAILED_AT]) / 1e9,
            leaving=copies.leaving[model],
            superseded=bool(words[at + Model.SUPERSEDED]),
            suspending=copies.suspending[model],
            resume_s=floats[at + Model.RESUME_S],
        )

    def _tickets(self, idle_of_model: Mapping[int, int]) -> tuple[TicketView, ...]:
        """Return the first waiters of the queue, and the first ones of every model that has idle copies.

        Others can get nothing before these have got something, so a thousand waiters cost no more than thirty.
        """
        rows = self._tables.view(self._layout.tickets)
        order = self._queue_order()
        chosen = order[:QUEUE_PART].tolist()
        if len(order) > QUEUE_PART:
            # Those whose loads fail hold up nobody, however many they are.
            failing = self._tables.view(self._layout.models)[:, Model.FAILURES] > 0
            if failing.any():
                order = order[np.argsort(failing[rows[order, Ticket.MODEL]], kind="stable")]
                chosen = order[:QUEUE_PART].tolist()
            rest = order[QUEUE_PART:]
            models = rows[rest, Ticket.MODEL]
            for model, idle in idle_of_model.items():
                # Twice as many as there are copies: a copy may be of no use to its first waiter's process.
                chosen += rest[models == model][: 2 * idle].tolist()
        fields = [
            *(Ticket.NUMBER, Ticket.PRIORITY, Ticket.MODEL, Ticket.MEMBER, Ticket.ENQUEUED, Ticket.PRELOAD),
            *(
                Ticket.BLOCKED_AT,
                Ticket.DEVICES,
                Ticket.TIED,
                Ticket.SPAN,
                Ticket.NESTED,
                Ticket.PASSED,
                Ticket.RANK,
                Ticket.STEADY,
            ),
        ]
        found = zip(chosen, rows[chosen][:, fields].tolist(), strict=True)
        return tuple(_ticket_view(row, *values) for row, values in found)

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

    def _is_idle(self, instance: int) -> bool:
        return bool(self._segment.words[self._tables.instance(instance)] == Instance.IDLE)

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

    def backs_off_for_s(self, ticket: int) -> float:
        """Return in how many seconds a waiter's back-off ends, `inf` if it waits for something else; without the lock.

        Nothing else may happen then, so it has to see to it that it is looked at.
        """
        words, at = self._segment.words, self._tables.ticket(ticket)
        if words[at + Ticket.REASON] != Reason.BACKING_OFF:
            return math.inf
        model = self._tables.model(words[at + Ticket.MODEL])
        ago_s = (time.monotonic_ns() - words[model + Model.FAILED_AT]) / 1e9
        return max(0.0, back_off_s(words[model + Model.FAILURES]) - ago_s)

    def called_up_at(self, ticket: int) -> int:
        """Return when a waiter was called up last (monotonic, ns), 0 if it was not; without the lock."""
        return int(self._segment.words[self._tables.ticket(ticket) + Ticket.CALLED_UP])

    def is_model_idle(self, ticket: int) -> bool:
        """Tell whether a copy of the model that a ticket is for is idle; without the lock."""
        words = self._segment.words
        return bool(words[self._tables.model(words[self._tables.ticket(ticket) + Ticket.MODEL]) + Model.IDLE])

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


def _ticket_view(
    row: int,
    number: int,
    priority: int,
    model: int,
    member: int,
    enqueued_ns: int,
    preload: int,
    blocked_ns: int,
    devices: int,
    usable_on: int,
    span: int,
    nested: int,
    passed: int,
    rank: int,
    steady: int,
) -> TicketView:
    return TicketView(
        row,
        number,
        priority,
        model,
        member,
        enqueued_ns / 1e9,
        preload,
        blocked_ns / 1e9 if blocked_ns else None,
        tuple(device_rows(devices)) if devices else (),
        tuple(device_rows(usable_on)) if usable_on else (),
        span,
        bool(nested),
        bool(passed),
        rank,
        bool(steady),
    )


def _cause(why: Why) -> Cause:
    other = 0 if why.other is None else why.other + 1
    return Cause(why.reason, why.need_mb, why.free_mb, why.coming_mb, why.seconds, other, device_bits(why.devices))
