"""Shortcuts answer without a plan in exactly the cases that Q1 to Q5 of `mpmm.scheduling.shortcuts` name.

`test_without_a_plan` checks that the answers are right. Whether there is an answer, which saves the plan, is compared
here with the rules as statements about the rows, after each of many random operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import closing
from unittest import mock

import pytest
from harness import scaled
from random_operations import step
from random_tables import SECOND_NS, RandomTables
from reference_view import MORE_MB, Reference

from mpmm.policy.fairness import rank_ns
from mpmm.policy.plan import make_plan
from mpmm.policy.view import Reason
from mpmm.scheduling import CALLED_UP_FOR_NS, Scheduler
from mpmm.shared_state.durations import LONGEST_NS
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Header, Instance, Model, Ticket
from mpmm.shared_state.rows import TicketRow
from mpmm.shared_state.transaction import Transaction

STEPS = 80
FOR_A_COPY = {Reason.SHARING, Reason.COPIES}
FOR_MEMORY_ON_ITS_WAY = {Reason.IN_USE, Reason.UNLOADING, Reason.RETURNING}
OTHERS_END = {Reason.LEASED, Reason.EXTERNAL, Reason.PINNED} | FOR_A_COPY


class Rules(Reference):
    """The rules as statements about the rows."""

    def all_waiting(self) -> list[TicketRow]:
        """The waiters, including those whose deadline has passed."""
        tickets = [self.tables.tickets[row] for row in self._used(self.layout.tickets)]
        return [one for one in tickets if one.state == Ticket.WAITING]

    def wants(self, ticket: TicketRow, model: int, devices: int) -> bool:
        """Whether a copy of a model on these devices serves a waiter."""
        return ticket.model == model and not ticket.preload and not (ticket.usable_on and devices & ~ticket.usable_on)

    def is_known(self, model: int) -> bool:
        """Whether something is known of a model's size."""
        return self.tables.models[model].known or self.tables.models[model].expect_mb > 0

    def isolated(self) -> list[bool]:
        """Of each device, whether something runs alone on it."""
        return [self.tables.devices[row].isolated is not None for row in self._used(self.layout.devices)]

    def somebody_is_to_run_alone(self) -> bool:
        """Whether isolation, begun or due, decides before anything else."""
        due = self.isolates_unknown() and any(not self.is_known(one.model) for one in self.all_waiting())
        return any(self.isolated()) or due

    def is_over(self, since_ns: int) -> bool:
        """Whether a head of the line may not be overtaken any more."""
        return self.now - since_ns >= self.settings.max_overtake_seconds * SECOND_NS

    def first_user(self, model: int, devices: int) -> tuple[int, int] | None:
        """The first waiter that a copy serves, and the waiter that it overtakes."""
        waiting = [one for one in self.all_waiting() if one.deadline > self.now]
        wanting = [one for one in waiting if self.wants(one, model, devices)]
        others = [one for one in waiting if one not in wanting]
        if not wanting or (others and any(one.priority == 0 for one in waiting)):
            return None
        first = min(wanting, key=lambda one: one.rank)
        heads = [one for one in waiting if one.head_of_line_at]
        passed = [one for one in heads if one.rank < first.rank]
        if not passed:
            return self.row_of(first), 0
        if any(self.is_over(one.head_of_line_at) for one in heads):
            return None
        return self.row_of(first), min(heads, key=lambda one: one.rank).model + 1

    def row_of(self, ticket: TicketRow) -> int:
        """The index of a ticket's row."""
        return (ticket.at - self.layout.tickets.base) // self.layout.tickets.words

    def may_take(self, row: int) -> bool:
        """Q1."""
        waiting = self.all_waiting()
        wanted = any(one.model == self.rows[row].model for one in waiting)
        over = any(one.head_of_line_at and self.is_over(one.head_of_line_at) for one in waiting)
        return not wanted and not self.somebody_is_to_run_alone() and not over

    def moves_nobody(self, row: int) -> bool:
        """Q2."""
        waiting, one = self.all_waiting(), self.rows[row]
        if not waiting or one.unload_on_release or any(other.model == one.model for other in waiting):
            return False
        if self.somebody_is_to_run_alone() or any(other.head_of_line_at for other in waiting):
            return False
        for_leases = [other.rank for other in waiting if other.reason == Reason.LEASED]
        for other in waiting:
            if other.reason == Reason.BEHIND:
                is_lease = self.tables.models[other.model].state == Model.LEASE
                if not for_leases or not is_lease or other.rank <= min(for_leases):
                    return False
            elif other.reason not in OTHERS_END:
                return False
        return True

    def keeps(self, row: int, call_up: bool) -> tuple[bool, set[int]]:
        """Whether a holder may give a copy back and have it left idle for itself, and which waiters are called up."""
        one, waiting = self.rows[row], self.all_waiting()
        if any(other.model != one.model for other in waiting) or any(self.isolated()):
            return False, set()
        if one.unload_on_release or one.owner is not None:
            return False, set()
        first, passed = self.first_user(one.model, one.device_bits) or (None, 0)
        if first is None or passed:
            return not call_up, set()
        return True, {first} if call_up or not self.tables.tickets[first].called_up else set()

    def held(self) -> list[int]:
        """The rows in use while a request waits."""
        return [row for row, one in self.rows.items() if one.state == Instance.ACTIVE] if self.all_waiting() else []

    def called_up(self) -> dict[int, int]:
        """When each waiter was called up."""
        return {self.row_of(one): one.called_up for one in self.all_waiting()}

    def goes_to_first_user(self, row: int) -> bool:
        """Whether the release of a copy hands it to the first waiter that it serves."""
        one, isolated = self.rows[row], [number for number, alone in enumerate(self.isolated()) if alone]
        if one.unload_on_release or set(one.devices) & set(isolated):
            return False
        first = self.first_user(one.model, one.device_bits)
        return first is not None and one.owner in (None, self.tables.tickets[first[0]].member)

    def serves_everybody(self, model: int) -> bool:
        """Whether every process can have each of a model's rows of instances."""
        rows = [one for one in self.rows.values() if one.model == model]
        stay = (Instance.ACTIVE, Instance.IDLE, Instance.LOADING)
        return all(one.state in stay and one.owner is None and not one.unload_on_release for one in rows)

    def is_kept(self, model: int) -> bool:
        """Whether what is idle of a model is in another process's tenure."""
        called = [one.called_up for one in self.all_waiting() if one.model == model]
        return any(self.now - CALLED_UP_FOR_NS < at <= self.now for at in called)

    def known_wait(self, row: int) -> tuple[Reason, float] | None:
        """Q3, and Q4 where it does not hold."""
        model, waiting = self.tables.models[row], self.all_waiting()
        can_be_had = bool(model.active or model.idle) and (not model.idle or self.is_kept(row))
        can_be_had = can_be_had and model.shares and self.serves_everybody(row)
        only_this = all(one.model == row for one in waiting)
        quiet = not model.failures and not any(self.isolated())
        if can_be_had and only_this and quiet and not (self.isolates_unknown() and not self.is_known(row)):
            found = self._for_a_copy(row, waiting)
            if found is not None:
                return found
        if all(self.isolated()):
            return None if self.may_be_refused(row) else (Reason.BEHIND, 0.0)
        if not quiet or not self.is_known(row):
            return None
        before = [one for one in waiting if one.priority <= 1 and one.rank <= rank_ns(self.now, 0)]
        heads = {one.reason for one in before if one.head_of_line_at and one.deadline > self.now}
        if not (model.active or model.idle or model.loading) and len(self.isolated()) == 1:
            is_drained = Reason.DRAINING in heads and not self.may_be_refused(row)
            return (Reason.BEHIND, 0.0) if is_drained else None
        for_memory = FOR_MEMORY_ON_ITS_WAY | ({Reason.MEMORY} if only_this else set())
        behind = can_be_had and not self.somebody_is_to_run_alone() and heads & for_memory
        return (Reason.BEHIND, 0.0) if behind else None

    def may_be_refused(self, row: int) -> bool:
        """Whether a device could not take a model, whose size is known, even with nothing else there."""
        model = self.tables.models[row]
        limits = [self.tables.devices[one].total_mb for one in self._used(self.layout.devices)]
        if not self.is_known(row) or (model.known and self.has_fitted(model)):
            return False
        need_mb = model.estimate_mb if model.known else model.expect_mb
        if model.at_least_mb:
            need_mb = max(need_mb, model.at_least_mb + MORE_MB)
        return need_mb > (1.0 - self.settings.slack_percentage) * min(limits)

    def _for_a_copy(self, row: int, waiting: list[TicketRow]) -> tuple[Reason, float] | None:
        model, mine = self.tables.models[row], [one for one in waiting if one.model == row]
        if mine:
            newest = max(mine, key=lambda one: one.number)
            is_newest = self.words[Header.NEWEST_TICKET] == self.row_of(newest)
            special = newest.preload or newest.usable_on or newest.head_of_line_at
            if not is_newest or special or newest.reason not in FOR_A_COPY:
                return None
        places = model.active + model.idle
        copies = places - model.seats
        coming = copies + model.loading
        if coming >= self.settings.max_model_copies:
            return Reason.COPIES, 0.0
        seconds = model.hold_s * (1 + len(mine)) / (coming * places / copies)
        return (Reason.SHARING, seconds) if 0 < seconds < model.load_s else None


def check(made: RandomTables, scheduler: Scheduler) -> None:
    """Compare all that is known without a plan, about each row, with the rules."""
    check_answers(made, scheduler)
    # So that a call shows which comes now.
    made.now += 1
    rules = Rules(made.namespace, made.now)
    for row, call_up in itertools.product(rules.held(), (False, True)):
        expected = rules.keeps(row, call_up)
        with made.attempt() as t:
            kept = scheduler.keep(t, row, True, call_up)
            called = {ticket for ticket, at in rules.called_up().items() if at == made.now}
            assert (kept, called) == expected
            assert (made.tables.instances[row].state == Instance.IDLE) == kept
        without_plan = rules.goes_to_first_user(row) or rules.moves_nobody(row)
        with made.attempt() as t, mock.patch("mpmm.scheduling.scheduler.make_plan", wraps=make_plan) as planned:
            scheduler.release(t, row)
            assert not (without_plan and planned.called)


def check_answers(made: RandomTables, scheduler: Scheduler) -> None:
    """Compare what needs no change of the rows."""
    shortcuts, tables = scheduler.shortcuts, made.tables
    with made.namespace.transaction():
        rules = Rules(made.namespace, made.now)
        for row, one in rules.rows.items():
            if one.state == Instance.IDLE:
                assert shortcuts.may_take(row) == rules.may_take(row)
            elif one.state == Instance.ACTIVE:
                assert shortcuts.moves_nobody(made.namespace.reads.instances.held(row)) == rules.moves_nobody(row)
                first = shortcuts.first_user(one.model, one.device_bits)
                assert first == rules.first_user(one.model, one.device_bits)
        for model in tables.model_rows():
            cause, known = shortcuts.known_wait(model), rules.known_wait(model)
            assert (cause and cause.reason) == (known and known[0])
            if cause is not None and known is not None:
                assert cause.seconds == pytest.approx(known[1])
        for ticket in rules.all_waiting():
            moves_up = ticket.reason in {Reason.BEHIND, Reason.OUTRANKED, *FOR_A_COPY}
            # It can use none of the copies, so others may be kept for it.
            moves_up = moves_up and not (ticket.reason == Reason.COPIES and ticket.head_of_line_at)
            wanted = tables.models[ticket.model]
            mates = [one for one in rules.all_waiting() if one.model == ticket.model and one.at != ticket.at]
            if wanted.active or wanted.loading:
                changes_nothing = all(mate.reason in FOR_A_COPY for mate in mates)
            else:
                models = [tables.models[one.model] for one in rules.all_waiting()]
                changes_nothing = bool(mates) or not wanted.load_s or all(one.load_s and one.hold_s for one in models)
            expected = moves_up and not wanted.idle and changes_nothing
            assert shortcuts.holds_up_nobody(rules.row_of(ticket)) == expected


@pytest.mark.parametrize("seed", range(scaled(40)))
def test_what_the_rules_name_is_known_without_a_plan(seed: int) -> None:
    made = RandomTables(seed)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        scheduler = Scheduler(made.namespace)
        for _ in range(STEPS):
            step(made)
            check(made, scheduler)


def lease_before_another(made: RandomTables, t: Transaction, model: int) -> None:
    """A lease that is behind no other stands before the one that waits for leases, and a copy is in use."""
    hold(made, t, model)
    wait_for_leases(made, t, Reason.BEHIND, Reason.LEASED)


def lease_behind_another(made: RandomTables, t: Transaction, model: int) -> None:
    """The same the other way about."""
    hold(made, t, model)
    wait_for_leases(made, t, Reason.LEASED, Reason.BEHIND)


def head_without_hurry(made: RandomTables, t: Transaction, model: int) -> None:
    """The head of the queue is less urgent than a newcomer, which comes before it."""
    hold(made, t, model)
    block(made, t, Reason.IN_USE, urgency=-1)


def head_in_a_hurry(made: RandomTables, t: Transaction, model: int) -> None:
    """The head of the queue comes before a newcomer."""
    hold(made, t, model)
    block(made, t, Reason.IN_USE, urgency=0)


def head_that_is_about_to_leave(made: RandomTables, t: Transaction, model: int) -> None:
    """The head of the queue is at its deadline."""
    hold(made, t, model)
    block(made, t, Reason.IN_USE, urgency=0, deadline=made.now)


def head_that_preloads(made: RandomTables, t: Transaction, model: int) -> None:
    """The head of the queue is a preload, which a newcomer comes before."""
    hold(made, t, model)
    block(made, t, Reason.IN_USE, urgency=0, preload=1)


def head_without_memory(made: RandomTables, t: Transaction, model: int) -> None:
    """The head of the queue waits for whatever may come free, and wants another model than a newcomer."""
    hold(made, t, model)
    block(made, t, Reason.MEMORY, urgency=0)


def copy_beside_which_the_last_loader_made_an_object(made: RandomTables, t: Transaction, model: int) -> None:
    """The only copy is a handle, but the next one is expected to be an object again, as the last one was."""
    hold(made, t, model)
    row = made.transitions.loads.begin(t, model, 1, 1, 100.0, alone=False)
    made.transitions.loads.end(t, row, b"", 100.0, 0, False)
    made.transitions.holds.release(t, row)
    made.transitions.unloads.begin(t, row, 1, False, Cause(Reason.BY_HAND))
    made.transitions.unloads.end(t, row)
    made.transitions.tickets.enqueue(t, model, 2, 1, 100.0, LONGEST_NS, cause=Cause(Reason.SHARING))
    # A load takes so long that any wait ends sooner.
    t.set_float(made.tables.model(model) + Model.LOAD_S, 1000.0)


def preload_that_waits_for_a_copy(made: RandomTables, t: Transaction, model: int) -> None:
    """The last one of the queue was told to wait for a copy, but wants none to use, as a newcomer does."""
    hold(made, t, model)
    made.transitions.tickets.enqueue(t, model, 2, 2, 100.0, LONGEST_NS, 2, cause=Cause(Reason.SHARING))
    t.set_float(made.tables.model(model) + Model.HOLD_S, 1.0)
    # A load would take so long that any wait is sooner.
    t.set_float(made.tables.model(model) + Model.LOAD_S, 1000.0)


def drained_device(made: RandomTables, t: Transaction, model: int) -> None:
    """The device is drained, and the model has no copy."""
    block(made, t, Reason.DRAINING, urgency=0)


def drained_device_that_is_too_small(made: RandomTables, t: Transaction, model: int) -> None:
    """The device is drained, and the model could never be loaded."""
    made.transitions.estimates.estimate(t, model, 1e6, measured=False)
    block(made, t, Reason.DRAINING, urgency=0)


def drained_device_for_one_that_has_grown(made: RandomTables, t: Transaction, model: int) -> None:
    """The device is drained, and the model has run there, and taken more than the limit."""
    made.transitions.estimates.estimate(t, model, 1e6, measured=True)
    block(made, t, Reason.DRAINING, urgency=0)


def drained_device_beside_a_load(made: RandomTables, t: Transaction, model: int) -> None:
    """The device is drained, and the model's first copy is being loaded."""
    made.transitions.loads.begin(t, model, 1, 1, 100.0, alone=False)
    block(made, t, Reason.DRAINING, urgency=0)


def drained_device_beside_an_idle_copy(made: RandomTables, t: Transaction, model: int) -> None:
    """The device is drained, and the model's only copy is not in use."""
    made.transitions.holds.release(t, hold(made, t, model))
    block(made, t, Reason.DRAINING, urgency=0)


def idle_copy_of_a_tenure_behind_a_head(made: RandomTables, t: Transaction, model: int) -> None:
    """The model's only copy is idle, but left to a waiter that was called up, and memory is kept for the head."""
    made.transitions.holds.release(t, hold(made, t, model))
    ticket = made.transitions.tickets.enqueue(t, model, 2, 1, 100.0, LONGEST_NS, cause=Cause(Reason.SHARING))
    made.transitions.tickets.call_up(t, ticket)
    block(made, t, Reason.IN_USE, urgency=0)


def load_behind_a_head(made: RandomTables, t: Transaction, model: int) -> None:
    """Another copy is being loaded after the first one was unloaded, and memory is kept for the head."""
    row = hold(made, t, model)
    made.transitions.holds.release(t, row)
    made.transitions.unloads.begin(t, row, 1, False, Cause(Reason.BY_HAND))
    made.transitions.unloads.end(t, row)
    made.transitions.loads.begin(t, model, 1, 1, 100.0, alone=False)
    block(made, t, Reason.IN_USE, urgency=0)


def waiter_behind_one_whose_model_was_never_held(made: RandomTables, t: Transaction, model: int) -> None:
    """All waiters' models were loaded before, but one of them has no figure for how long a copy is held."""
    block(made, t, Reason.IN_USE, urgency=0)
    made.transitions.estimates.estimate(t, model, 100.0, measured=True)
    made.transitions.tickets.enqueue(t, model, 2, 1, 100.0, LONGEST_NS, cause=Cause(Reason.BEHIND))
    other = made.transitions.models.claim(t, "other", b"other")
    for row in (model, other):
        t.set_float(made.tables.model(row) + Model.LOAD_S, 1.0)
    t.set_float(made.tables.model(model) + Model.HOLD_S, 1.0)


def hold(made: RandomTables, t: Transaction, model: int) -> int:
    """Let a worker hold a copy of a model, which no other can use meanwhile; return its row."""
    made.transitions.models.set_users(t, model, 1)
    row = made.transitions.loads.begin(t, model, 1, 1, 100.0, alone=False)
    made.transitions.loads.end(t, row, b"a handle", 100.0, 0, False)
    return row


def wait_for_leases(made: RandomTables, t: Transaction, *reasons: Reason) -> None:
    """Let a worker wait for one lease after the other, for these reasons."""
    for reason in reasons:
        made.now += SECOND_NS
        lease = made.transitions.leases.claim(t, b"lease", 90.0)
        made.transitions.tickets.enqueue(t, lease, 0, 1, 90.0, LONGEST_NS, cause=Cause(reason))


def block(
    made: RandomTables, t: Transaction, reason: Reason, urgency: int, preload: int = 0, deadline: int = LONGEST_NS
) -> None:
    """Let a request for another model wait at the head of the queue."""
    other = made.transitions.models.claim(t, "other", b"other")
    made.transitions.estimates.estimate(t, other, 100.0, measured=True)
    asked = (other, 2, 2 if preload else 1, 100.0, deadline, preload)
    ticket = made.transitions.tickets.enqueue(t, *asked, cause=Cause(reason), urgency=urgency)
    made.transitions.tickets.block(t, ticket)


@pytest.mark.parametrize("called_up", [True, False])
def test_a_newcomer_leaves_an_idle_copy_to_one_that_was_called_up_just_now(called_up: bool) -> None:
    """A plan would take the copy from the process whose tenure it is."""
    made = RandomTables(0, devices=1)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        with made.namespace.transaction() as t:
            model = made.transitions.models.claim(t, "m0", b"m0")
            made.transitions.models.set_users(t, model, 1)
            row = made.transitions.loads.begin(t, model, 1, 1, 100.0, alone=False)
        made.now += 10 * SECOND_NS
        with made.namespace.transaction() as t:
            made.transitions.loads.end(t, row, b"a handle", 100.0, 0, False)
        made.now += SECOND_NS
        with made.namespace.transaction() as t:
            made.transitions.holds.release(t, row)
            ticket = made.transitions.tickets.enqueue(t, model, 2, 1, 100.0, LONGEST_NS, cause=Cause(Reason.SHARING))
            if called_up:
                made.transitions.tickets.call_up(t, ticket)
        made.now += CALLED_UP_FOR_NS - 1
        with made.namespace.transaction():
            cause = Scheduler(made.namespace).known_wait(model)
        assert (cause is not None and cause.reason == Reason.SHARING) == called_up


@pytest.mark.parametrize(
    "arrange",
    [
        *(lease_before_another, lease_behind_another, head_without_hurry, head_in_a_hurry, head_without_memory),
        *(head_that_is_about_to_leave, head_that_preloads, preload_that_waits_for_a_copy),
        *(drained_device, drained_device_beside_a_load, drained_device_beside_an_idle_copy),
        *(drained_device_that_is_too_small, drained_device_for_one_that_has_grown),
        *(idle_copy_of_a_tenure_behind_a_head, load_behind_a_head, waiter_behind_one_whose_model_was_never_held),
        copy_beside_which_the_last_loader_made_an_object,
    ],
)
def test_what_the_rules_name_is_known_in_cases_that_chance_hardly_finds(
    arrange: Callable[[RandomTables, Transaction, int], None],
) -> None:
    made = RandomTables(0, devices=1)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        with made.namespace.transaction() as t:
            arrange(made, t, made.transitions.models.claim(t, "m0", b"m0"))
        check(made, Scheduler(made.namespace))
