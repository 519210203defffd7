"""What is unloaded if a table of the segment has no free row: compared with a statement of the rule, on random rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from unittest import mock

import pytest
from harness import scaled
from random_operations import step
from random_tables import RandomTables
from reference_view import Reference

from mpmm.scheduling import Scheduler
from mpmm.scheduling.table_rows import TableRows
from mpmm.shared_state.layout import Instance, Model, Ticket
from mpmm.shared_state.transaction import Transaction

STEPS = 60


def changed_by(made: RandomTables, action: Callable[[Transaction], bool]) -> tuple[bool, set[int]]:
    """Return what an action returns, and which rows of instances it changes the state of; undo it."""
    before = Reference(made.namespace, made.now)
    states = {row: one.state for row, one in before.rows.items()}
    with made.attempt() as t:
        found = action(t)
        changed = {row for row, state in states.items() if made.tables.instances[row].state != state}
    return found, changed


def oldest(reference: Reference, rows: list[int]) -> list[int]:
    """Return the row of which the state changed longest ago, alone."""
    return [min(rows, key=lambda row: reference.rows[row].since)] if rows else []


def unused(reference: Reference) -> list[int]:
    """Return the idle copies without a user."""
    return [row for row, one in reference.copies.items() if one.state == Instance.IDLE and not reference.users(row)]


def suspended(reference: Reference) -> list[int]:
    """Return the suspended copies that may be dropped."""
    copies = reference.copies.items()
    return [row for row, one in copies if one.state == Instance.SUSPENDED and not reference.pinned(row)]


def with_seats(reference: Reference, rows: list[int]) -> set[int]:
    """Return copies and their seats, which go with them."""
    return {place for row in rows for place in reference.places[row]}


def goes_for_an_instance(reference: Reference) -> tuple[bool, set[int]]:
    """Say what goes for want of a row for a copy."""
    going = [one for one in reference.copies.values() if one.state == Instance.UNLOADING]
    if any(not one.unload_late and not one.seats for one in going):
        return True, set()
    may_go = [row for row in unused(reference) if not reference.pinned(row)]
    victims = oldest(reference, suspended(reference)) or oldest(reference, may_go)
    return bool(victims), with_seats(reference, victims)


def goes_for_a_model(reference: Reference) -> tuple[bool, set[int]]:
    """Say what goes for want of a row for a model."""
    tables = reference.tables
    models = {row: tables.models[row] for row in tables.used_rows(reference.layout.models)}
    late = {one.model for one in reference.copies.values() if one.state == Instance.UNLOADING and one.unload_late}
    unwanted = {
        row
        for row, one in models.items()
        if one.state == Model.MODEL and not (one.active or one.loading or one.waiting or one.pins or row in late)
    }
    in_host = {
        one.model
        for one in reference.copies.values()
        if one.state in (Instance.SUSPENDING, Instance.SUSPENDED) and one.model in unwanted
    }
    if any(not models[row].idle for row in unwanted - in_host):
        return True, set()
    if in_host:
        return True, set(
            oldest(reference, [row for row in suspended(reference) if reference.rows[row].model in in_host])
        )
    if not unwanted:
        return False, set()
    idle = {row: [copy for copy in unused(reference) if reference.rows[copy].model == row] for row in unwanted}
    model = min(unwanted, key=lambda row: max(reference.rows[copy].since for copy in idle[row]))
    return True, with_seats(reference, idle[model])


def _make_room(rows: TableRows, ticket: int, t: Transaction) -> bool:
    return rows.make_room_for_instance(t, ticket)


@pytest.mark.parametrize("seed", range(scaled(60)))
def test_for_want_of_a_row_goes_what_is_wanted_least(seed: int) -> None:
    made = RandomTables(seed)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        rows = Scheduler(made.namespace).table_rows
        for _ in range(STEPS):
            step(made)
            if made.chance.random() < 0.1:
                made.come_to_rest()
            reference = Reference(made.namespace, made.now)
            idle = [row for row, one in reference.rows.items() if one.state == Instance.IDLE]
            free = oldest(reference, [row for row in idle if reference.rows[row].seat_of is not None])
            assert changed_by(made, rows.free_seat) == (bool(free), set(free))
            assert changed_by(made, lambda t: rows.make_room_for_model(t, 1)) == goes_for_a_model(reference)
            waiting = made.tables.rows_where(made.layout.tickets, Ticket.STATE, Ticket.WAITING)
            if waiting:
                ticket = waiting[0]
                expected = goes_for_an_instance(reference)
                assert changed_by(made, partial(_make_room, rows, ticket)) == expected
