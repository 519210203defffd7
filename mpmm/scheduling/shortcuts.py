"""What a plan would decide, where that is known without one.

A plan reads every row, so the warm path does without one where the plan is known beforehand:

Q1  An idle copy may be taken at once although others wait (`may_take`) if nobody waits for its model, nothing runs
    alone or waits to, and the time for which each blocked waiter may be overtaken is not over. The plan would grant the
    copy to a newcomer: no waiter ahead can use it, and `_grant_idle` stops, or keeps copies back, only for a waiter
    that isolates or is due. It moves nobody else: what is idle only becomes less by it.
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

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mpmm.policy.fairness import rank_ns
from mpmm.policy.sharing import served_in_s
from mpmm.policy.view import Reason
from mpmm.scheduling.views import Views
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Header, Instance, Model, Ticket, device_bits
from mpmm.shared_state.namespace import Namespace

__all__ = ["CALLED_UP_FOR_NS", "Shortcuts"]

# Above that NumPy reads the rows of waiters in less time than single words take.
FEW_WAITERS = 16
# Waits that no copy of another model ends by becoming idle.
QUIET_REASONS = frozenset({Reason.LEASED, Reason.FOREIGN, Reason.PINNED, Reason.SHARING, Reason.COPIES})
# Waits for a copy of the own model.
SHARED_REASONS = frozenset({Reason.SHARING, Reason.COPIES})
# Waits of the head of the queue, for which room is kept.
HEAD_REASONS = frozenset({Reason.IN_USE, Reason.UNLOADING, Reason.RETURNING})
# Waits for which nothing is kept, and nobody else stands back.
HELD_UP_REASONS = frozenset({Reason.BEHIND, Reason.OUTRANKED, Reason.SHARING, Reason.COPIES})
# So long before its end a tenure was the reason to call a waiter up, see `mpmm.model_manager.tenure`.
CALLED_UP_FOR_NS = 6_000_000
_WAITER_FIELDS = (
    *(Ticket.RANK, Ticket.PRIORITY, Ticket.MODEL, Ticket.DEADLINE),
    *(Ticket.HEAD_OF_LINE_AT, Ticket.PRELOAD, Ticket.USABLE_ON),
)


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


class Shortcuts:
    """Answers of a plan without the plan. Methods need the lock, unless they say otherwise."""

    def __init__(self, namespace: Namespace, views: Views) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._segment = namespace.segment
        self._layout = namespace.segment.layout
        self._views = views

    def all_isolated(self) -> bool:
        """Tell whether a copy runs alone on every device."""
        isolated = self._segment.words[Header.ISOLATED]
        return bool(isolated) and isolated == device_bits(self._tables.used_rows(self._layout.devices))

    def first_user(self, model: int, devices: int) -> tuple[int, int] | None:
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
            # NEWEST_TICKET may name a row that is free by now, or answered, while an older ticket waits.
            if words[at + Ticket.STATE] == Ticket.WAITING:
                usable_on = words[at + Ticket.USABLE_ON]
                wants = words[at + Ticket.MODEL] == model and not words[at + Ticket.PRELOAD]
                wants = wants and not (usable_on and devices & ~usable_on)
                return (row, 0) if wants and words[at + Ticket.DEADLINE] > now else None
        waiting = [one for one in self.waiting() if one.deadline > now]
        wanting = [
            one
            for one in waiting
            if one.model == model and not one.preload and not (one.usable_on and devices & ~one.usable_on)
        ]
        # One of class 0, of an unknown model, goes first, whatever its rank: only a plan says what that means for this.
        if not wanting or (len(wanting) < len(waiting) and not all(one.priority for one in waiting)):
            return None
        first = min(wanting, key=lambda one: one.rank)
        blocked = [one for one in waiting if one.blocked_at]
        if not blocked or first.rank <= min(one.rank for one in blocked):
            return first.row, 0
        bound_ns = to_ns(self._namespace.settings.max_overtake_seconds)
        # Its time is over: what comes free is kept for the head of the line from here on.
        if now - min(one.blocked_at for one in blocked) >= bound_ns:
            return None
        return first.row, min(blocked, key=lambda one: one.rank).model + 1

    def waiting(self) -> list[_Waiter]:
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
        waiting = self.waiting()
        if self.isolation_matters(waiting):
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
        if self.all_isolated():
            return Cause(Reason.BEHIND)
        # An unknown model would come before known ones.
        if words[Header.ISOLATED] or words[at + Model.FAILURES] or not self._views.is_known(model):
            return None
        now = time.monotonic_ns()
        waiting = self.waiting()
        ahead = {
            words[self._tables.ticket(one.row) + Ticket.REASON]
            for one in waiting
            if one.blocked_at and one.priority <= 1 and one.rank <= rank_ns(now, 0) and one.deadline > now
        }
        in_use, idle = words[at + Model.ACTIVE], words[at + Model.IDLE]
        if not (in_use or idle or words[at + Model.LOADING]) and len(self._tables.used_rows(self._layout.devices)) == 1:
            return Cause(Reason.BEHIND) if Reason.DRAINING in ahead else None
        if idle or not in_use or not words[at + Model.SHARES] or self.isolation_matters(waiting):
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
        measured = words[Header.SOURCE_ACCOUNTING_ONLY] or words[Header.SOURCE_MEASURES_PROCESSES]
        if words[Header.WAITING] != waiting or words[Header.ISOLATED] or not (measured or self._views.is_known(model)):
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

    def _is_for_all(self, at: int) -> bool:
        """Tell whether a used row is that of a copy that any process can have, now or after somebody else."""
        words = self._segment.words
        return words[at] in (Instance.ACTIVE, Instance.IDLE, Instance.LOADING) and not (
            words[at + Instance.OWNER] or words[at + Instance.UNLOAD_ON_RELEASE]
        )

    def _newest_waits_for_a_copy(self, model: int) -> bool:
        """Tell whether the ticket that was taken last waits for a copy that others of this model have."""
        words = self._segment.words
        at = self._tables.ticket(words[Header.NEWEST_TICKET])
        return bool(
            words[at] == Ticket.WAITING
            and words[at + Ticket.MODEL] == model
            and words[at + Ticket.REASON] in SHARED_REASONS
            and not (words[at + Ticket.PRELOAD] or words[at + Ticket.USABLE_ON] or words[at + Ticket.HEAD_OF_LINE_AT])
        )

    def _is_left_to_another(self, model: int) -> bool:
        """Tell whether what is idle of a model is another process's for the rest of its tenure.

        Then a waiter was called up a moment ago, which looks for itself at the end of the tenure, and stands before any
        newcomer: a plan now would only cut the tenure short.
        """
        words, now = self._segment.words, time.monotonic_ns()
        called_up = (
            words[self._tables.ticket(one.row) + Ticket.CALLED_UP] for one in self.waiting() if one.model == model
        )
        return any(now - CALLED_UP_FOR_NS < at <= now for at in called_up)

    def moves_nobody(self, instance: int) -> bool:
        """Tell whether it is known without a plan that the release of a copy serves no waiter; see Q2 above."""
        words = self._segment.words
        at = self._tables.instance(instance)
        model = self._tables.model(words[at + Instance.MODEL])
        if not words[Header.WAITING] or words[model + Model.WAITING] or words[at + Instance.UNLOAD_ON_RELEASE]:
            return False
        waiting = self.waiting()
        if any(one.blocked_at for one in waiting) or self.isolation_matters(waiting):
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

    def isolation_matters(self, waiting: Sequence[_Waiter]) -> bool:
        """Tell whether a copy runs alone somewhere, or one of these waits to."""
        words = self._segment.words
        if words[Header.ISOLATED]:
            return True
        if words[Header.SOURCE_ACCOUNTING_ONLY] or words[Header.SOURCE_MEASURES_PROCESSES]:
            return False
        return any(not self._views.is_known(one.model) for one in waiting)

    def beside_isolation(self, instance: int) -> bool:
        """Tell whether a copy lies where another one runs alone, so that it may not be used."""
        words = self._segment.words
        isolated = words[Header.ISOLATED]
        return bool(isolated and isolated & words[self._tables.instance(instance) + Instance.DEVICES])
