"""What is known without a plan is known in every case that Q1 to Q5 of `mpmm.scheduling.shortcuts` name, and no other.

`test_without_a_plan` holds the answers right. That they are given at all, which saves the plan, is compared here with
the rules as statements about the rows, after each of many random operations.
"""

from __future__ import annotations

import itertools
from contextlib import closing
from unittest import mock

import pytest
from harness import scaled
from random_tables import SECOND_NS, RandomTables
from reference_view import Reference

from mpmm.policy.fairness import rank_ns
from mpmm.policy.view import Reason
from mpmm.scheduling import CALLED_UP_FOR_NS, Scheduler
from mpmm.shared_state.layout import Header, Instance, Model, Ticket
from mpmm.shared_state.rows import TicketRow

STEPS = 80
FOR_A_COPY = {Reason.SHARING, Reason.COPIES}
FOR_MEMORY_ON_ITS_WAY = {Reason.IN_USE, Reason.UNLOADING, Reason.RETURNING}
OTHERS_END = {Reason.LEASED, Reason.EXTERNAL, Reason.PINNED} | FOR_A_COPY


class Rules(Reference):
    """The rules as statements about the rows."""

    def all_waiting(self) -> list[TicketRow]:
        """Those who wait, also those whose deadline has passed."""
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
        """The first waiter whom a copy serves, and whom it overtakes."""
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
        """The rows in use while somebody waits."""
        return [row for row, one in self.rows.items() if one.state == Instance.ACTIVE] if self.all_waiting() else []

    def called_up(self) -> dict[int, int]:
        """When each waiter was called up."""
        return {self.row_of(one): one.called_up for one in self.all_waiting()}

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
            return Reason.BEHIND, 0.0
        if not quiet or not self.is_known(row):
            return None
        before = [one for one in waiting if one.priority <= 1 and one.rank <= rank_ns(self.now, 0)]
        heads = {one.reason for one in before if one.head_of_line_at and one.deadline > self.now}
        if not (model.active or model.idle or model.loading) and len(self.isolated()) == 1:
            return (Reason.BEHIND, 0.0) if Reason.DRAINING in heads else None
        for_memory = FOR_MEMORY_ON_ITS_WAY | ({Reason.MEMORY} if only_this else set())
        behind = can_be_had and not self.somebody_is_to_run_alone() and heads & for_memory
        return (Reason.BEHIND, 0.0) if behind else None

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


@pytest.mark.parametrize("seed", range(scaled(120)))
def test_what_the_rules_name_is_known_without_a_plan(seed: int) -> None:
    made = RandomTables(seed)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        scheduler = Scheduler(made.namespace)
        shortcuts = scheduler.shortcuts
        for _ in range(STEPS):
            made.step()
            with made.namespace.transaction():
                rules = Rules(made.namespace, made.now)
                for row, one in rules.rows.items():
                    if one.state == Instance.IDLE:
                        assert shortcuts.may_take(row) == rules.may_take(row)
                    elif one.state == Instance.ACTIVE:
                        copy = made.namespace.reads.instances.held(row)
                        assert shortcuts.moves_nobody(copy) == rules.moves_nobody(row)
                        assert shortcuts.first_user(one.model, one.device_bits) == rules.first_user(
                            one.model, one.device_bits
                        )
                for model in made.tables.used_rows(made.layout.models):
                    if made.tables.models[model].state == Model.MODEL:
                        cause, known = shortcuts.known_wait(model), rules.known_wait(model)
                        assert (cause and cause.reason) == (known and known[0])
                        if cause is not None and known is not None:
                            assert cause.seconds == pytest.approx(known[1])
                for ticket in rules.all_waiting():
                    moves_up = ticket.reason in {Reason.BEHIND, Reason.OUTRANKED, *FOR_A_COPY}
                    assert shortcuts.holds_up_nobody(rules.row_of(ticket)) == moves_up
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
