"""A plan's decisions, where they are known without one.

A plan reads every row, so the warm path does without it where its outcome is known beforehand:

Q1  A newcomer may take an idle copy at once although others wait (`may_take`) if no request waits for its model, no
    copy runs alone or is about to, and every head of the line may still be overtaken. The plan would grant it the copy:
    no waiter ahead can use it, and `_grant_idle` keeps copies back only for a waiter that is to run alone, or that may
    no longer be overtaken. Other decisions stay as they are, because less is idle than before.
Q2  The release of a copy whose model no request waits for needs no plan (`moves_nobody`) if no waiter is the head of
    the line, no copy runs alone or is about to, and an idle copy of another model changes nothing for any waiter. That
    holds for waiters that wait until leases or other programs give memory back (LEASED and EXTERNAL: too little would
    be free even if all copies were unloaded), for a copy of their own model (SHARING, COPIES), or, as a lease, behind a
    waiter for leases; and for PINNED, if the released copy's model is pinned, because it is not unloaded for them. Such
    waits also change with time, and with each hold that is measured, from which a plan estimates how long others may
    take (SHARING): the leader plans for that at each poll.
Q3  A newcomer for a model whose copies are all in use, and usable by every process, can only wait for one of them
    (`known_wait`) if there are as many copies as there may be, or if they serve it sooner than a load would. This is
    known if all waiters want this model, the newest of them was told the same, no copy runs alone or is about to, and
    no load of the model has failed. A newcomer at the end of the queue changes nothing for the others. A copy that is
    idle during another process's tenure (`mpmm.model_manager.tenure`) counts as in use.
Q4  A newcomer waits behind the head of the queue (`known_wait`, too) if no copy may be used or loaded beside that: if a
    copy runs alone on every device; or the only device is drained for the head, and the newcomer's model has no copy;
    or the head waits for memory, and the newcomer's model has copies that every process can use, none of them idle
    except in a tenure, so that no other copy would be loaded beside the memory that is kept for the head. If none is
    kept yet, because nothing could be unloaded for the head, this is known only if all waiters want the newcomer's
    model. In the first two cases, only if its model is within the limit of each device: otherwise a plan may refuse it.
Q5  A waiter that leaves changes nothing for the others (`holds_up_nobody`) if it waited behind another one, or for a
    copy of its own model that it can use, and none is idle: nothing was kept for it, and waiters behind it only move
    up. An idle copy of the model may be evicted for others once fewer requests wait for it. And where another one waits
    to load a further copy of the model, it may rather wait for those in use then, and not hold up others any more. So
    may one whose model has no figures of its own yet, and is judged by those of the models that are in use or waited
    for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from operator import attrgetter

from mpmm.policy.fairness import rank_ns
from mpmm.policy.sharing import served_in_s
from mpmm.policy.view import Reason
from mpmm.scheduling.views import FOR_A_COPY, Views
from mpmm.shared_state.core import is_compiled
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.events import Cause
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.reads.instances import HeldCopy
from mpmm.shared_state.reads.models import ModelFigures
from mpmm.shared_state.reads.queue import Waiter

__all__ = ["CALLED_UP_FOR_NS", "Shortcuts"]

# Waits that do not end when a copy of another model becomes idle.
QUIET_REASONS = frozenset({Reason.LEASED, Reason.EXTERNAL, Reason.PINNED, Reason.SHARING, Reason.COPIES})
# Waits of the head of the queue for which room is kept.
HEAD_REASONS = frozenset({Reason.IN_USE, Reason.UNLOADING, Reason.RETURNING})
# Waits for which nothing is kept, and which hold up no other waiter.
HELD_UP_REASONS = frozenset({Reason.BEHIND, Reason.OUTRANKED, Reason.SHARING, Reason.COPIES})
# The time from the call-up of a waiter to the end of the tenure, see `mpmm.model_manager.tenure`.
CALLED_UP_FOR_NS = 1_500_000 if is_compiled() else 6_000_000
_RANK = attrgetter("rank")


class Shortcuts:
    """A plan's answers without the plan. Methods need the lock, unless they say otherwise."""

    def __init__(self, namespace: Namespace, views: Views) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._layout = namespace.segment.layout
        self._views = views
        self._queue = namespace.reads.queue
        self._instances = namespace.reads.instances
        self._models = namespace.reads.models
        self._devices = namespace.reads.devices
        # Answers that shared state has ready.
        self.waiting = self._queue.waiting
        self.must_queue = self._queue.anybody_waits
        self.may_have_to_wait = self._queue.waits_for_tag
        self.all_isolated = self._devices.all_isolated
        self.beside_isolation = self._devices.isolated_under

    def first_user(self, model: int, devices: int) -> tuple[int, int] | None:
        """Return the first waiter for a model's copy on devices (bits), and a reference to the model of the waiter that
        it overtakes, or 0.

        None if there is no such waiter, or if it takes a plan to find out whether it may overtake.
        """
        if not self._queue.waits_for(model):
            return None
        # Usually there is only one waiter, and then no other has to be looked for.
        only = self._queue.only_one()
        if only is not None:
            return (only, 0) if self._queue.can_use(only, model, devices) else None
        now = time.monotonic_ns()
        # Waiters past their deadline are about to leave, see `Views.queue_order`.
        waiting = [one for one in self.waiting() if one.deadline > now]
        wanting = [one for one in waiting if one.can_use(model, devices)]
        # A waiter of class 0, for an unknown model, comes first, whatever its rank: only a plan tells what follows.
        if not wanting or (len(wanting) < len(waiting) and not all(one.priority for one in waiting)):
            return None
        first = min(wanting, key=_RANK)
        heads = [one for one in waiting if one.head_of_line_at]
        # No waiter is overtaken, so no limit applies.
        if not heads or first.rank <= min(one.rank for one in heads):
            return first.row, 0
        bound_ns = to_ns(self._namespace.settings.max_overtake_seconds)
        # The time to overtake is over: from now on copies that become idle are kept for the head of the line.
        if now - min(one.head_of_line_at for one in heads) >= bound_ns:
            return None
        return first.row, min(heads, key=_RANK).model + 1

    def may_take(self, instance: int) -> bool:
        """Tell whether a newcomer may take an idle copy at once although others wait; False if only a plan can tell.

        See Q1 above.
        """
        if self._queue.waits_for(self._instances.held(instance).model):
            return False
        waiting = self.waiting()
        if self.isolation_matters(waiting):
            return False
        oldest_ns = time.monotonic_ns() - self._namespace.settings.max_overtake_seconds * 1e9
        return all(not one.head_of_line_at or one.head_of_line_at > oldest_ns for one in waiting)

    def may_know_the_wait(self, tag: str) -> bool:
        """Tell whether `known_wait` is worth a transaction: requests wait, or copies of the model are in use.

        This is a guess, which needs no lock.
        """
        row = self._tables.model_row(tag)
        # A wrong guess costs a transaction that finds nothing, or a plan: no answer depends on it.
        return row is not None and (self._queue.anybody_waits() or self._models.in_use(row))

    def known_wait(self, model: int) -> Cause | None:
        """Return why a newcomer for a model waits, in the queue's last place; None if only a plan can tell.

        For a newcomer that may use any device and holds nothing else. See Q3 and Q4 above.
        """
        figures = self._models.figures(model)
        return self._waits_for_a_copy(model, figures) or self._waits_behind(model, figures)

    def _waits_behind(self, model: int, figures: ModelFigures) -> Cause | None:
        """Return that a newcomer for a model waits behind another one, None if only a plan can tell; see Q4."""
        if self.all_isolated():
            return None if self._may_be_refused(model) else Cause(Reason.BEHIND)
        # An unknown model would come before known ones.
        if self._devices.anything_runs_alone() or figures.failures or not self._views.is_known(model):
            return None
        now = time.monotonic_ns()
        waiting = self.waiting()
        ahead = {
            one.reason
            for one in waiting
            if one.head_of_line_at and one.priority <= 1 and one.rank <= rank_ns(now, 0) and one.deadline > now
        }
        # Without copies, a plan could only load one; with them, it might hand one over.
        has_copies = figures.active or figures.idle or figures.loading
        if not has_copies and len(self._tables.used_rows(self._layout.devices)) == 1:
            return Cause(Reason.BEHIND) if Reason.DRAINING in ahead and not self._may_be_refused(model) else None
        if not (figures.active or figures.idle) or not figures.shares or self.isolation_matters(waiting):
            return None
        # A process that cannot use the copies might be allowed to load its own.
        if (figures.idle and not self._is_left_to_another(model)) or not self._models.copies_serve_everybody(model):
            return None
        may_wait_for_memory = Reason.MEMORY in ahead and not self._queue.waits_for_others_than(model)
        return Cause(Reason.BEHIND) if ahead & HEAD_REASONS or may_wait_for_memory else None

    def _may_be_refused(self, model: int) -> bool:
        """Tell whether a model may need more than a device can ever give; a plan tells whether it does."""
        size = self._models.size(model)
        if not (size.known or size.expect_mb) or (size.known and size.fitted):
            # It is tried on a whole device at most.
            return False
        need_mb, devices = self._views.need_mb(model), self._tables.used_rows(self._layout.devices)
        return any(need_mb > self._views.limit_mb(device) for device in devices)

    def holds_up_nobody(self, ticket: int) -> bool:
        """Tell whether it is known without a plan that a waiter's leaving serves no other waiter; see Q5 above."""
        if not self._queue.is_waiting(ticket):
            return False
        told = self._queue.told(ticket)
        if told.reason not in HELD_UP_REASONS or (told.reason == Reason.COPIES and told.head_of_line):
            return False
        model = self._tables.tickets[ticket].model
        figures = self._models.figures(model)
        if figures.idle:
            return False
        if figures.active or figures.loading:
            mates = (one.reason for one in self.waiting() if one.model == model and one.row != ticket)
            return FOR_A_COPY.issuperset(mates)
        if figures.waiting > 1 or not figures.load_s:
            return True
        others = (self._models.figures(other) for other in {one.model for one in self.waiting()})
        return all(other.load_s and other.hold_s for other in others)

    def _waits_for_a_copy(self, model: int, figures: ModelFigures) -> Cause | None:
        """Return that a newcomer for a model waits for one of its copies, None if only a plan can tell; see Q3."""
        if not (figures.active or figures.idle) or figures.failures or not figures.shares:
            return None
        # A plan grants an idle copy that no tenure keeps to the first waiter.
        if figures.idle and not self._is_left_to_another(model):
            return None
        if self._queue.waits_for_others_than(model) or self._devices.anything_runs_alone():
            return None
        # The newcomer would have to run alone, on a device that is drained for it.
        if self._devices.only_whole_devices_are_measured() and not self._views.is_known(model):
            return None
        if figures.waiting and not self._newest_waits_for_a_copy(model):
            return None
        if not self._models.copies_serve_everybody(model):
            return None
        places = figures.active + figures.idle
        copies = places - figures.seats
        copies_coming = copies + figures.loading
        if copies_coming >= self._namespace.settings.max_model_copies:
            return Cause(Reason.COPIES)
        # Each copy that is being loaded adds as many places as each loaded one has.
        seconds = served_in_s(figures.hold_s, figures.hold_s, figures.waiting, copies_coming * places / copies)
        return Cause(Reason.SHARING, seconds=seconds) if 0 < seconds < figures.load_s else None

    def _newest_waits_for_a_copy(self, model: int) -> bool:
        """Tell whether the newest ticket waits for a copy of this model that is in use."""
        newest = self._queue.newest()
        return (
            newest is not None
            and newest.model == model
            and newest.reason in FOR_A_COPY
            # The reason of a ticket with special wishes, or for which room is kept, does not hold for a newcomer.
            and not (newest.preload or newest.usable_on or newest.head_of_line_at)
        )

    def _is_left_to_another(self, model: int) -> bool:
        """Tell whether an idle copy of a model is another process's for the rest of its tenure.

        Then a waiter was called up a moment ago. It looks for itself at the end of the tenure, and comes before any
        newcomer: a plan now would only cut the tenure short.
        """
        now = time.monotonic_ns()
        return any(one.model == model and now - CALLED_UP_FOR_NS < one.called_up <= now for one in self.waiting())

    def moves_nobody(self, copy: HeldCopy) -> bool:
        """Tell whether it is known without a plan that the release of a copy serves no waiter; see Q2 above."""
        if not self._queue.anybody_waits() or self._queue.waits_for(copy.model) or copy.unload_on_release:
            return False
        waiting = self.waiting()
        if any(one.head_of_line_at for one in waiting) or self.isolation_matters(waiting):
            return False
        behind = [one for one in waiting if one.reason == Reason.BEHIND]
        if behind and not self._are_behind_a_lease(behind, [one for one in waiting if one.reason == Reason.LEASED]):
            return False
        return (QUIET_REASONS | {Reason.BEHIND}).issuperset(one.reason for one in waiting)

    def _are_behind_a_lease(self, behind: list[Waiter], for_leases: list[Waiter]) -> bool:
        """Tell whether these are leases, behind one that waits for leases to end."""
        # Otherwise they wait behind a waiter that an idle copy may serve, and move up with it.
        if not for_leases:
            return False
        first = min(one.rank for one in for_leases)
        return all(one.rank > first and self._models.is_lease(one.model) for one in behind)

    def isolation_matters(self, waiting: Sequence[Waiter]) -> bool:
        """Tell whether a copy runs alone on some device, or one of these waiters has to."""
        if self._devices.anything_runs_alone():
            return True
        if not self._devices.only_whole_devices_are_measured():
            return False
        return any(not self._views.is_known(one.model) for one in waiting)
