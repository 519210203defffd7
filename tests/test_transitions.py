"""The rules that every change of the rows must keep, checked after each of many random changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
from harness import NOBODYS_PID, scaled
from random_operations import end_suspension, fail_suspension, resume, step, suspend
from random_tables import SECOND_NS, SERVERS, WORKERS, RandomTables

from mpmm.policy.view import Reason
from mpmm.shared_state.durations import LONGEST_NS
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.layout import Event, Header, Instance, Member, Observation, Pin, Ticket
from mpmm.shared_state.transaction import Transaction

STEPS = 300
# Of a suspension and of a resume.
ENDS = [(Instance.SUSPENDING, Instance.SUSPENDED), (Instance.RESUMING, Instance.ACTIVE)]
TO_DO = (Instance.UNLOADING, Instance.SUSPENDING)
# Events that say what has become of a copy, by the beginning of their names.
OF_STATES = ("LOAD_", "UNLOAD_BEGAN", "UNLOAD_ENDED", "SUSPEND_", "RESUME_", "LEASE")


@dataclass(frozen=True)
class Said:
    """The fields of a copy's or a lease's row."""

    state: int
    holder: int | None
    seats: int
    mb: float
    reserved_mb: float
    model: int
    handle: bytes
    is_lost: bool

    @property
    def doer(self) -> int | None:
        """The member that is to unload or suspend it, and can begin with that; None if there is nothing to do."""
        return self.holder if self.state in TO_DO and not self.seats else None


def copies_of(made: RandomTables) -> dict[tuple[int, int], Said]:
    """Return what all rows say, by row and generation."""
    rows = {row: made.tables.instances[row] for row in made.tables.used_rows(made.layout.instances)}
    return {
        (row, one.generation): Said(
            *(one.state, one.holder, one.seats, one.mb, one.reserved_mb, one.model),
            made.tables.text(made.tables.instance(row) + Instance.HANDLE),
            made.namespace.segment.words[made.tables.instance(row) + Instance.UNLOAD_ON_RELEASE] == Instance.LOST,
        )
        for row, one in rows.items()
    }


def bells_of(made: RandomTables) -> list[int]:
    """Return how often each member has been woken to look for something to do."""
    return [made.namespace.segment.words[made.tables.member(slot) + Member.BELL] for slot in WORKERS]


@dataclass(frozen=True)
class Told:
    """An event. model, row: -1 for none; ticket: its number, -1 for none."""

    kind: EventKind
    model: int
    row: int
    ticket: int
    value: float


def events_after(made: RandomTables, count: int) -> list[Told]:
    """Return the events but for the first `count`."""
    words, floats, events = made.namespace.segment.words, made.namespace.segment.floats, made.layout.events
    starts = (events.base + number % events.capacity * Event.WORDS for number in range(count, words[Header.EVENTS]))
    return [
        Told(
            EventKind(words[at + Event.KIND] & 0xFF),
            words[at + Event.MODEL] - 1,
            words[at + Event.INSTANCE] - 1,
            words[at + Event.TICKET] - 1,
            floats[at + Event.VALUE],
        )
        for at in starts
    ]


def tickets_of(made: RandomTables) -> dict[int, int]:
    """Return the model of each ticket, by number."""
    rows = map(made.tables.ticket, made.tables.used_rows(made.layout.tickets))
    words = made.namespace.segment.words
    return {words[at + Ticket.NUMBER]: words[at + Ticket.MODEL] for at in rows}


def pins_of(made: RandomTables) -> set[tuple[int, int]]:
    """Return which models are pinned, and by which members: -1 for the namespace."""
    rows = map(made.tables.pin, made.tables.used_rows(made.layout.pins))
    words = made.namespace.segment.words
    return {(words[at + Pin.MODEL], words[at + Pin.MEMBER] - 1) for at in rows}


def estimates_of(made: RandomTables) -> dict[int, float]:
    """Return the estimates of models that are known."""
    rows = ((row, made.tables.models[row]) for row in made.tables.used_rows(made.layout.models))
    return {row: one.estimate_mb for row, one in rows if one.known}


def moves_of(made: RandomTables) -> dict[int | None, tuple[int, int]]:
    """Return how often copies of each model (row) were suspended and resumed; None stands for all models."""
    words = made.namespace.segment.words
    found: dict[int | None, tuple[int, int]] = {None: (words[Header.SUSPENDS], words[Header.RESUMES])}
    for row in range(made.layout.models.capacity):
        found[row] = (made.tables.models[row].suspends, made.tables.models[row].resumes)
    return found


# ---- what seldom happens ---------------------------------------------------------------------------------


def load_twin(made: RandomTables, t: Transaction) -> None:
    """End a load with the handle of another copy."""
    row, of = made.some(Instance.LOADING), made.some(Instance.ACTIVE, Instance.IDLE)
    if row is None or of is None or made.tables.instances[row].server is not None:
        return
    handle = made.tables.text(made.tables.instance(of) + Instance.HANDLE)
    if handle and made.tables.instances[of].unload_on_release != Instance.LOST:
        made.transitions.loads.end(t, row, handle, 70.0, 0, False)


def drop(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.SUSPENDED)
    if row is not None:
        made.transitions.suspensions.drop(t, row, made.chance.choice(WORKERS))


def cancel(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.RESUMING)
    if row is not None:
        made.transitions.suspensions.cancel(t, row)


def turn_back(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.RESUMING)
    if row is not None:
        made.transitions.suspensions.turn_back(t, row, made.chance.choice(WORKERS) + 1)


def hand_over(made: RandomTables, t: Transaction) -> None:
    row = made.some(*TO_DO)
    if row is None or made.tables.instances[row].owner is not None:
        return
    slot = made.chance.choice(WORKERS)
    if made.tables.instances[row].state == Instance.SUSPENDING:
        made.transitions.suspensions.hand_over(t, row, slot)
    elif not made.tables.instances[row].seats:
        made.transitions.unloads.hand_over(t, row, slot)


def give_up(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.LOADING)
    if row is not None:
        made.transitions.loads.give_up(t, row)


def die(made: RandomTables) -> None:
    """Let a process end by itself, another than ours, and a new one come."""
    slot = made.chance.choice((*WORKERS[1:], *SERVERS))
    kind, done = made.tables.members[slot].state, False
    while not done:
        with made.namespace.transaction() as t:
            done = made.transitions.members.reap(t, slot)
    with made.namespace.transaction() as t:
        made.transitions.members.join(t, slot, kind, NOBODYS_PID + slot, slot, b"another")


SELDOM: list[Callable[[RandomTables, Transaction], None]] = [load_twin, drop, cancel, turn_back, hand_over, give_up]
OF_SUSPENSION = [suspend, suspend, end_suspension, fail_suspension, resume, resume]


def change(made: RandomTables) -> bool:
    """Make a random change, often one of those that `step` makes seldom or never; return whether a process has died."""
    chosen = made.chance.random()
    if chosen < 0.6:
        step(made)
    elif chosen < 0.97:
        made.do(partial(made.chance.choice([*SELDOM, *OF_SUSPENSION]), made))
    else:
        die(made)
        return True
    return False


# ---- what is owed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """The rows before and after one change, and the members that it has woken."""

    before: dict[tuple[int, int], Said]
    after: dict[tuple[int, int], Said]
    woken: list[int]
    isolated: int
    has_died: bool
    moves_before: dict[int | None, tuple[int, int]]
    moves_after: dict[int | None, tuple[int, int]]
    tickets: dict[int, int]
    pins_before: set[tuple[int, int]]
    pins_after: set[tuple[int, int]]
    estimates: dict[int, float]
    events: list[Told]


# Of every other seed nothing is suspended.
@pytest.fixture(scope="module", params=range(1, 2 * scaled(20), 2))
def changes(request: Any) -> list[Change]:
    """Many random changes, one after the other."""
    made, found = RandomTables(request.param), []
    # Of all tickets so far: their numbers are never given again.
    tickets: dict[int, int] = {}
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        for _ in range(STEPS):
            before, bells, moves = copies_of(made), bells_of(made), moves_of(made)
            pins = pins_of(made)
            isolated, told = (made.namespace.segment.words[word] for word in (Header.ISOLATED, Header.EVENTS))
            has_died = change(made)
            woken = [slot for slot, rung in zip(WORKERS, bells_of(made), strict=True) if rung != bells[slot]]
            events = events_after(made, told)
            tickets.update(tickets_of(made))
            found.append(
                Change(
                    *(before, copies_of(made), woken, isolated, has_died, moves, moves_of(made)),
                    *(tickets, pins, pins_of(made), estimates_of(made), events),
                )
            )
    return found


def test_whoever_gets_something_to_unload_or_to_suspend_is_woken(changes: list[Change]) -> None:
    for one in changes:
        for row, copy in one.after.items():
            was = one.before.get(row)
            if copy.doer is not None and (was is None or (was.doer, was.state) != (copy.doer, copy.state)):
                assert copy.doer in one.woken, f"{was} has become {copy}"


def test_a_resume_reserves_what_the_copy_took_before_it_was_suspended(changes: list[Change]) -> None:
    had_mb: dict[tuple[int, int], float] = {}
    for one in changes:
        for row, copy in one.after.items():
            state, was = copy.state, one.before.get(row)
            if was is None or was.state == state:
                continue
            if was.state == Instance.IDLE and state == Instance.SUSPENDING:
                had_mb[row] = was.mb
            elif state == Instance.RESUMING:
                assert (copy.mb, copy.reserved_mb) == (had_mb[row], had_mb[row])
            elif state == Instance.SUSPENDED:
                assert (copy.mb, copy.reserved_mb) == (0.0, 0.0), "nothing of it is left on the device"


def test_every_suspension_and_every_resume_is_counted_once(changes: list[Change]) -> None:
    for one in changes:
        expected = {model: list(counts) for model, counts in one.moves_before.items()}
        for row, copy in one.after.items():
            was = one.before[row].state if row in one.before else Instance.FREE
            for number, end in enumerate(ENDS):
                for model in (None, copy.model):
                    expected[model][number] += (was, copy.state) == end
        assert one.moves_after == {model: tuple(counts) for model, counts in expected.items()}


def test_an_event_names_the_copy_whose_state_has_changed_and_its_model(changes: list[Change]) -> None:
    for one in changes:
        before, after = ({row: copy for (row, _), copy in rows.items()} for rows in (one.before, one.after))
        for told in one.events:
            was, became = before.get(told.row), after.get(told.row)
            if told.kind.name.startswith(OF_STATES):
                assert (was and was.state) != (became and became.state), f"{told}, which was {was}"
            if told.row >= 0:
                assert told.model in {copy.model for copy in (was, became) if copy is not None}, told


def test_an_event_names_the_waiter_that_it_is_about_and_its_model(changes: list[Change]) -> None:
    told = [(one, event) for one in changes for event in one.events if event.ticket >= 0]
    # Those that came and went in one change were not there to be asked.
    models = [(event, one.tickets[event.ticket]) for one, event in told if event.ticket in one.tickets]
    assert len(models) > len(told) / 2
    for event, model in models:
        assert event.model == model, event


@pytest.mark.parametrize("kind", [EventKind.LEFT, EventKind.REAPED])
def test_an_event_names_the_process_that_has_gone_and_the_row_of_a_newcomer(kind: EventKind) -> None:
    made, slot = RandomTables(0), 2
    with closing(made):
        members, pid = made.transitions.members, made.tables.members[slot].pid
        told = made.namespace.segment.words[Header.EVENTS]
        with made.namespace.transaction() as t:
            assert (members.leave if kind == EventKind.LEFT else members.reap)(t, slot)
            members.join(t, slot, Member.WORKER, NOBODYS_PID + 100, slot, b"another")
        events = [(event.kind, event.value) for event in events_after(made, told)]
    assert events == [(kind, pid), (EventKind.JOINED, slot)]


def test_an_event_names_what_is_pinned_and_by_whom(changes: list[Change]) -> None:
    for one in changes:
        for kind, expected in (
            (EventKind.PINNED, one.pins_after - one.pins_before),
            (EventKind.UNPINNED, one.pins_before - one.pins_after),
        ):
            assert {(event.model, event.value) for event in one.events if event.kind == kind} == expected


def test_an_event_names_the_model_of_an_estimate(changes: list[Change]) -> None:
    for one in changes:
        for event in one.events:
            if event.kind == EventKind.ESTIMATED:
                assert one.estimates[event.model] == event.value


def test_twins_stand_for_one_memory_until_the_last_of_them_goes(changes: list[Change]) -> None:
    def by_handle(copies: dict[tuple[int, int], Said]) -> dict[bytes, list[Said]]:
        found: dict[bytes, list[Said]] = {}
        for copy in copies.values():
            # All servers of abandoned loads have one name here. A copy that has lost its server is no twin of one with
            # a new server of the same name.
            alike = copy.handle.startswith(b"h") and not copy.is_lost
            if alike and copy.state in (Instance.ACTIVE, Instance.IDLE, Instance.UNLOADING):
                found.setdefault(copy.handle, []).append(copy)
        return found

    for one in changes:
        before, after = by_handle(one.before), by_handle(one.after)
        for handle, copies in after.items():
            assert sum(copy.mb > 0 for copy in copies) <= 1, copies
            # With a server its memory goes. Where one runs alone, the memory of others is not moved.
            if handle in before and len(copies) < len(before[handle]) and not (one.has_died or one.isolated):
                assert sum(copy.mb for copy in copies) == sum(copy.mb for copy in before[handle])


# ---- means -----------------------------------------------------------------------------------------------


def test_an_unusual_load_changes_little_of_how_long_the_loads_of_a_model_take() -> None:
    made = RandomTables(0)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        found = []
        for handle, load_s in ((b"one", 10), (b"two", 20)):
            with made.namespace.transaction() as t:
                model = made.transitions.models.claim(t, "m0", b"m0")
                row = made.transitions.loads.begin(t, model, 0, 1, 100.0, alone=False)
            made.now += load_s * SECOND_NS
            with made.namespace.transaction() as t:
                made.transitions.loads.end(t, row, handle, 100.0, 0, False)
            found.append(made.tables.models[model].load_s)
        assert found == [10.0, 11.0]


# ---- readings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(scaled(4)))
def test_each_configuration_keeps_its_newest_readings_until_others_need_its_row(seed: int) -> None:
    """Some configurations, of as many models or on the same device as others, and too many for the table at times."""
    made = RandomTables(seed)
    chance, capacity = made.chance, made.layout.observations.capacity
    configurations = [
        (copies, device) for copies in ([(7, 1)], [(7, 2)], [(9, 1)], [(7, 1), (9, 1)]) for device in (None, 0)
    ]
    # Last comes the one that was seen last.
    kept: dict[Any, deque[float]] = {}
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        for _ in range(STEPS):
            made.now += 1
            # Some are observed so often that their oldest readings are dropped.
            copies, device = chance.choice(configurations[: chance.choice([1, 2, capacity, 8])])
            mb = float(made.now % 1000)
            with made.namespace.transaction() as t:
                made.transitions.estimates.observe(t, chance.sample(copies, len(copies)), mb, device)
            key = (tuple(copies), 0 if device is None else device + 1)
            readings = kept.pop(key, deque(maxlen=Observation.READINGS_KEPT))
            if len(kept) == capacity:
                del kept[next(iter(kept))]
            kept[key] = readings
            readings.append(mb)
            rows = [made.tables.observations[row] for row in made.tables.used_rows(made.layout.observations)]
            found = {(tuple(row.pairs), row.device): sorted(row.readings) for row in rows}
            assert len(rows) == len(found)
            assert found == {key: sorted(values) for key, values in kept.items()}


# ---- wake-ups --------------------------------------------------------------------------------------------


def test_a_warning_says_once_which_process_waits(caplog: pytest.LogCaptureFixture) -> None:
    made = RandomTables(0)
    tickets = made.transitions.tickets
    with closing(made):
        pids = [made.tables.members[slot].pid for slot in WORKERS]
        with made.namespace.transaction() as t:
            model = made.claim_model(t)
            rows = [tickets.enqueue(t, model, slot, 1, 100.0, LONGEST_NS) for slot in (2, 0, 1)]
        with made.attempt() as t:
            tickets.warn(t, rows[0], "waits")
        assert caplog.messages == [], "the plan was undone"
        for row in (*rows, *rows):
            with made.namespace.transaction() as t:
                tickets.warn(t, row, "waits")
        assert [text.partition(" of ")[2] for text in caplog.messages] == [
            f"pid {pids[slot]} waits" for slot in (2, 0, 1)
        ]


def test_each_waiter_finds_in_its_row_what_it_was_told() -> None:
    made = RandomTables(1, devices=3)
    tickets = made.transitions.tickets
    with closing(made):
        with made.namespace.transaction() as t:
            rows = [tickets.enqueue(t, made.claim_model(t), slot, 1, 100.0, LONGEST_NS) for slot in (0, 1, 2, 0)]
            causes = {row: Cause(Reason.UNLOADING, 0.0, row + 0.1, row + 0.2, row + 0.3, row + 1, 5) for row in rows}
            for row in sorted(rows, key=lambda _: made.chance.random()):
                tickets.set_reason(t, row, causes[row])
        for row, cause in causes.items():
            told = made.tables.tickets[row]
            assert (told.reason, told.free_mb, told.coming_mb) == (cause.reason, cause.free_mb, cause.coming_mb)
            assert (told.seconds, told.other, told.on) == (cause.seconds, cause.other - 1, [0, 2])
