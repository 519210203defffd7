"""What a snapshot and typed reads show of the segment's words; states mean the same everywhere."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import fields, replace
from enum import IntEnum
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
from harness import NewManager
from random_tables import SECOND_NS, RandomTables

from mpmm.errors import LayoutMismatchError, LockTimeoutError
from mpmm.policy.view import Reason
from mpmm.shared_state.columns import DeviceColumns, InstanceColumns, ModelColumns, TicketColumns
from mpmm.shared_state.durations import LONGEST_NS
from mpmm.shared_state.events import Cause, EventKind, placed
from mpmm.shared_state.layout import Device, Event, Header, Instance, Member, Model, Observation, Pin, Ticket
from mpmm.shared_state.liveness import pid_namespace
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.reads.queue import CAN_READ_UNLOCKED
from mpmm.shared_state.rows import DeviceRow, HeaderRow, InstanceRow, MemberRow, ModelRow, Row, TicketRow
from mpmm.shared_state.segment import Segment, UnfinishedSegment, segment_name
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import (
    DeadMakerError,
    EventChoice,
    InstanceInfo,
    MemberInfo,
    ModelInfo,
    PinInfo,
    Snapshot,
    TicketInfo,
    decode,
    find_lost_namespaces,
    find_namespaces,
    read_snapshot,
)
from mpmm.shared_state.snapshot.decode import _Decoder
from mpmm.shared_state.snapshot.kinds import PLACE
from mpmm.shared_state.states import InstanceState, MemberState, ModelState, TicketState
from mpmm.shared_state.transaction import float_bits

# What `decode` computes fields from, or nobody outside needs.
COMPUTED = {
    Member: {"STATE", "PEAK_MB", "SHARES", "MEASURES"},
    Model: {"ESTIMATE_MB", "KNOWN", "KEEP_ALIVE", "USED_AT"},
    Instance: {"DEVICES", "SHARES"},
    Ticket: {"RANK", "MEMBER", "DEADLINE"},
    Pin: set(),
}
NOT_SHOWN = {
    Member: {"BELL", "LOCK"},
    Model: {"SUPERSEDED", "EVENTS_BEFORE"},
    Instance: {"LOADED_AT", "HAS_SERVER"},
    Ticket: {"SIGNAL", "NESTED", "OVERTAKEN", "WARNED", "STEADY"},
    Pin: {"STATE"},
}


def words_of(row: type[Any]) -> dict[str, int]:
    """Return the places of a row's fields by name: what the class lists before the row's length."""
    names = list(vars(row))
    listed = [name for name in names[: names.index("WORDS")] if name.isupper() and not name.endswith("_BYTES")]
    return {name: getattr(row, name) for name in listed}


@pytest.mark.parametrize(
    ("row", "record"),
    [(Member, MemberInfo), (Model, ModelInfo), (Instance, InstanceInfo), (Ticket, TicketInfo), (Pin, PinInfo)],
    ids=lambda one: one.__name__,
)
def test_every_word_of_a_row_is_shown_or_known_to_be_left_out(row: type[Any], record: type[Any]) -> None:
    declared = {field.metadata[PLACE] for field in fields(record) if PLACE in field.metadata}
    shown = {name for name, place in words_of(row).items() if place in declared}
    assert not shown & NOT_SHOWN[row]
    assert shown | COMPUTED[row] | NOT_SHOWN[row] == set(words_of(row))


@pytest.mark.parametrize("row", [Header, Member, Model, Instance, Ticket, Pin, Event], ids=lambda one: one.__name__)
def test_no_two_fields_of_a_row_begin_at_one_word(row: type[Any]) -> None:
    places = words_of(row)
    assert len(set(places.values())) == len(places)


@pytest.mark.parametrize(
    ("states", "row"),
    [(MemberState, Member), (ModelState, Model), (InstanceState, Instance), (TicketState, Ticket)],
    ids=lambda one: one.__name__,
)
def test_a_state_has_the_number_that_the_layout_gives_its_name(states: type[IntEnum], row: type[Any]) -> None:
    assert {state.name: state.value for state in states} == {state.name: getattr(row, state.name) for state in states}
    assert sorted(states) == list(range(len(states)))


@pytest.mark.parametrize(
    ("reads", "row"),
    [
        *((HeaderRow, Header), (MemberRow, Member), (ModelRow, Model)),
        *((InstanceRow, Instance), (TicketRow, Ticket), (DeviceRow, Device)),
    ],
    ids=lambda one: one.__name__,
)
def test_a_typed_read_is_of_the_word_that_the_layout_gives_its_name(reads: type[Row], row: type[Any]) -> None:
    places = {name: field.place for name, field in vars(reads).items() if hasattr(field, "place")}
    places.pop("device_bits", None)  # the same word as `devices`, not taken apart
    assert places
    assert places == {name: getattr(row, name.upper()) for name in places}


@pytest.mark.parametrize(
    ("columns", "row"),
    [(ModelColumns, Model), (InstanceColumns, Instance), (TicketColumns, Ticket), (DeviceColumns, Device)],
    ids=lambda one: one.__name__,
)
def test_a_column_has_the_word_of_each_row_that_the_layout_gives_its_name(columns: type[Any], row: type[Any]) -> None:
    names = [name for name in vars(columns) if not name.startswith("_")]
    rows = np.arange(3 * row.WORDS, dtype=np.uint64).reshape(3, row.WORDS)
    for name in names:
        found = getattr(columns(rows), name)
        assert found.dtype == (np.float64 if name.endswith(("mb", "_s")) else np.uint64)
        assert found.view(np.uint64).tolist() == [place * row.WORDS + getattr(row, name.upper()) for place in range(3)]
        assert getattr(columns, name) is vars(columns)[name], "what it is, asked of the class"


def test_both_clocks_of_a_look_are_read_at_its_beginning(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_manager()
    offset_s = time.time() - time.monotonic()
    real, late_s = _Decoder._devices, 60.0

    def devices(*arguments: Any) -> Any:
        found = real(*arguments)
        # The rest of the look takes place a minute later.
        later = time.time() + late_s
        monkeypatch.setattr(time, "time", lambda: later)
        return found

    monkeypatch.setattr(_Decoder, "_devices", devices)
    snapshot = read_snapshot(namespace)
    assert snapshot.taken_wall_s - snapshot.taken_s == pytest.approx(offset_s, abs=late_s / 2)


def test_a_copy_with_seats_is_idle_since_the_last_of_its_users_gave_it_back() -> None:
    made = RandomTables(0)
    transitions = made.transitions
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        with made.namespace.transaction() as t:
            model = transitions.models.claim(t, "shared", b"shared")
            transitions.models.set_users(t, model, 3)
            row = transitions.loads.begin(t, model, 1, 1, 100.0, alone=False)
            transitions.loads.end(t, row, b"handle", 100.0, 0, False)
        # The seats are free from the load on, the copy itself has a user for ten seconds.
        made.now += 10 * SECOND_NS
        with made.namespace.transaction() as t:
            transitions.holds.release(t, row)
        made.now += 5 * SECOND_NS
        (copy,) = read_snapshot(made.namespace.name).copies
    assert (copy.state, copy.seats, copy.for_s) == ("idle", 2, 5)


def test_an_event_without_a_reason_has_none_of_the_figures_of_the_event_that_was_there_before() -> None:
    made = RandomTables(0)
    cause = Cause(Reason.MEMORY, 1.0, 2.0, 3.0, 4.0, 1, 1)
    with closing(made):
        capacity = made.layout.events.capacity
        with made.namespace.transaction() as t:
            for _ in range(capacity):
                t.event(EventKind.WAITS, 1, cause=cause)
            for _ in range(capacity // 2):
                t.event(EventKind.QUEUED, 1)
        events = read_snapshot(made.namespace.name).events
    figures = [(one.kind, one.need_mb, one.free_mb, one.coming_mb, one.seconds, one.on) for one in events]
    assert figures[0] == ("waits", 1.0, 2.0, 3.0, 4.0, (0,))
    assert figures[-1] == ("queued", None, None, None, None, ())


def test_a_typed_read_of_an_event_has_its_cause() -> None:
    made = RandomTables(0)
    cause = Cause(Reason.CHEAPEST_RELOAD, 1.5, 2.5, 3.5, 4.5, 3, 6)
    with closing(made):
        with made.namespace.transaction() as t:
            first = made.namespace.segment.words[Header.EVENTS]
            t.event(placed(EventKind.LOAD_BEGAN, 2**31 + 1), 2, 4, 9, 100.0, cause)
            t.event(EventKind.HIT, 2, 0)
        capacity = made.layout.events.capacity
        decided, other = (made.tables.events[(first + number) % capacity] for number in (0, 1))
        assert (decided.kind, decided.cause, decided.instance, decided.sequence) == (
            *(EventKind.LOAD_BEGAN, cause, 3, first + 1),
        )
        assert (other.kind, other.cause, other.instance, other.sequence) == (EventKind.HIT, None, None, first + 2)


def test_a_typed_read_of_an_observation_has_its_copies_and_readings() -> None:
    made = RandomTables(0)
    with closing(made):
        with made.namespace.transaction() as t:
            for mb in (10.0, 20.0, 30.0):
                made.transitions.estimates.observe(t, [(70000, 2), (5, 65535)], mb, 0)
        (row,) = made.tables.used_rows(made.layout.observations)
        found = made.tables.observations[row]
        assert (found.pairs, found.readings, found.device) == ([(5, 65535), (70000, 2)], [10.0, 20.0, 30.0], 1)


def test_events_that_were_rolled_back_are_not_shown_and_have_taken_the_places_of_the_oldest() -> None:
    made = RandomTables(0)
    with closing(made):
        with made.namespace.transaction() as t:
            for _ in range(made.layout.events.capacity):
                t.event(EventKind.WAITS, 1)
        written = int(made.namespace.segment.words[Header.EVENTS])
        shown = {}
        for undone in (0, 1, 2):
            with suppress(RuntimeError), made.namespace.transaction() as t:
                for _ in range(undone):
                    t.event(EventKind.QUEUED, 1)
                raise RuntimeError
            shown[undone] = [one.sequence for one in read_snapshot(made.namespace.name).events]
        first = written - made.layout.events.capacity + 2
        every = list(range(first, written + 1))
    assert shown == {0: every, 1: every, 2: every[1:]}


def test_all_events_are_shown_or_those_after_a_number_or_none() -> None:
    made = RandomTables(0)
    with closing(made):
        name, written = made.namespace.name, int(made.namespace.segment.words[Header.EVENTS])
        assert 3 < written < made.layout.events.capacity - 2
        every = list(range(1, written + 1))
        assert [one.sequence for one in read_snapshot(name).events] == every
        assert [one.sequence for one in decoded(made).events] == every
        for after in (0, 1, written - 1, written):
            chosen = read_snapshot(name, choice=EventChoice(after=after)).events
            assert [one.sequence for one in chosen] == every[after:]
        assert read_snapshot(name, events=False).events == decoded(made, with_events=False).events == ()


def test_the_newest_events_of_each_kind_and_reason_are_chosen_wherever_they_are_placed() -> None:
    made = RandomTables(0)
    with closing(made):
        with made.namespace.transaction() as t:
            first = made.namespace.segment.words[Header.EVENTS] + 1
            for devices in (0b1, 0b10, 0b1000, 0b100):
                for reason in (Reason.FITS, Reason.TIGHTEST):
                    t.event(placed(EventKind.LOAD_BEGAN, devices), cause=Cause(reason))
        events = read_snapshot(made.namespace.name, choice=EventChoice(newest_of_each=2)).events
        found = [(one.sequence - first, one.devices, one.reason) for one in events if one.kind == "load_began"]
    fits, tightest = int(Reason.FITS), int(Reason.TIGHTEST)
    assert found == [(4, (3,), fits), (5, (3,), tightest), (6, (2,), fits), (7, (2,), tightest)]


@pytest.mark.parametrize("accounting_only", [False, True])
def test_what_is_used_is_what_was_measured_or_else_what_copies_have_that_are_loaded(accounting_only: bool) -> None:
    made = RandomTables(0, devices=3)
    loads, leases = made.transitions.loads, made.transitions.leases
    with closing(made):
        with made.namespace.transaction() as t:
            made.transitions.members.lead(t, 0, b"made up", (False, False, accounting_only))
            model = made.claim_model(t)
            for devices, handle in ((0b1, b"one"), (0b11, b"both")):
                row = loads.begin(t, model, 1, devices, 100.0, alone=False)
                loads.end(t, row, handle, 80.0, 0, False)
            loads.begin(t, model, 1, 0b1, 1000.0, alone=False)
            leases.begin(t, leases.claim(t, b"lease", 7.0), 1, 0b1, 7.0)
            made.transitions.devices.sample(t, 0, 33.0, t.now)
        found = [device.used_mb for device in read_snapshot(made.namespace.name).devices]
    assert found == ([120.0, 40.0, 0.0] if accounting_only else [33.0, None, None])


def test_of_why_a_waiter_waits_the_last_event_is_chosen_in_any_case() -> None:
    made = RandomTables(0)
    with closing(made):
        with made.namespace.transaction() as t:
            model = made.claim_model(t)
            for _ in range(2):
                made.transitions.tickets.enqueue(t, model, 1, 1, 100.0, LONGEST_NS)
        waiters = [one.number for one in read_snapshot(made.namespace.name).tickets]
        with made.namespace.transaction() as t:
            for number in (*waiters, *waiters, 99):
                t.event(EventKind.WAITS, model + 1, ticket=number + 1)
        found = {}
        for count in (0, 1, 3):
            chosen = EventChoice(newest_of_each=count)
            events = read_snapshot(made.namespace.name, choice=chosen).events
            found[count] = [one.ticket for one in events if one.kind == "waits"]
    assert found == {0: waiters, 1: [*waiters, 99], 3: [*waiters, 99]}


@pytest.mark.parametrize("junk", [0, 99, 2**63])
def test_a_waiter_that_is_no_members_is_shown_without_a_process(junk: int) -> None:
    made = RandomTables(0)
    with closing(made):
        with made.namespace.transaction() as t:
            row = made.transitions.tickets.enqueue(t, made.claim_model(t), 1, 1, 100.0, LONGEST_NS)
        segment, at = made.namespace.segment, made.tables.ticket(row) + Ticket.MEMBER
        copied = bytearray(segment.copy())
        (waiter,) = decode(copied, segment.layout, "n", segment.name).tickets
        assert waiter.pid == made.tables.members[1].pid
        copied[8 * at : 8 * at + 8] = junk.to_bytes(8, "little")
        (waiter,) = decode(copied, segment.layout, "n", segment.name).tickets
        assert waiter.pid == 0


def test_the_last_samples_of_a_device_are_shown_with_their_ages_the_oldest_first() -> None:
    made = RandomTables(0)
    kept = Device.RING_LENGTH
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        for number in range(kept + 3):
            made.now += SECOND_NS
            with made.namespace.transaction() as t:
                assert made.transitions.devices.sample(t, 0, float(number), made.now)
        made.now += SECOND_NS // 2
        device = read_snapshot(made.namespace.name).devices[0]
    assert device.samples == tuple((kept - place - 0.5, float(3 + place)) for place in range(kept))


def test_a_request_comes_after_another_one_that_is_earlier_and_for_use_of_the_same_model() -> None:
    made = RandomTables(0)
    tickets, hand_over = made.transitions.tickets, made.transitions.hand_over
    after = made.namespace.reads.queue.comes_after_another
    with closing(made):
        with made.namespace.transaction() as t:
            a, b = (made.transitions.models.claim(t, tag, tag.encode()) for tag in ("a", "b"))
            first, of_b, preload, last = [
                tickets.enqueue(t, model, 1, 1, 100.0, LONGEST_NS, wanted)
                for model, wanted in ((a, 0), (b, 0), (a, 2), (a, 0))
            ]
        assert [after(row) for row in (first, of_b, preload, last)] == [False, False, True, True]
        with made.namespace.transaction() as t:
            hand_over.leave_queue(t, preload)
        assert [after(row) for row in (first, last)] == [False, True], "they are just two"
        with made.namespace.transaction() as t:
            hand_over.leave_queue(t, first)
            preload = tickets.enqueue(t, a, 1, 2, 100.0, LONGEST_NS, 2)
            new = tickets.enqueue(t, a, 1, 1, 100.0, LONGEST_NS)
        assert [after(row) for row in (last, preload, new)] == [False, True, True]
        with made.namespace.transaction() as t:
            hand_over.leave_queue(t, last)
        assert [after(row) for row in (preload, new)] == [False, False], "a preload is not for use"


@pytest.mark.parametrize("happens", ["nothing", "a change", "changes without end", "a change is open"])
def test_what_is_read_without_the_lock_stood_there_together_and_was_committed(happens: str) -> None:
    made = RandomTables(0)
    words, looks = made.namespace.segment.words, list[int]()

    def look() -> int:
        looks.append(words[Header.LOADS])
        if happens == "changes without end" or (happens == "a change" and len(looks) == 1):
            with made.namespace.transaction() as t:
                t.add(Header.LOADS, 1)
        return looks[-1]

    with closing(made):
        before = words[Header.LOADS]
        read = made.namespace.reads.queue.unlocked
        if happens == "a change is open":
            with made.namespace.transaction():
                found = read(look)
            assert looks == []
        else:
            found = read(look)
        expected = {"nothing": before, "a change": before + 1}
        assert found == (expected.get(happens) if CAN_READ_UNLOCKED else None)


def test_a_copy_that_was_made_while_a_transaction_stored_is_made_again() -> None:
    made = RandomTables(0)
    copy_in_use, stores = Segment.copy_in_use, list[bool]()

    def copy_while_it_stores(segment: Segment, **options: Any) -> bytearray:
        """Read one word, the first time, after a store, and all others, with the undo log, before it."""
        copied = copy_in_use(segment, **options)
        if stores:
            stores.pop()
            t.add(Header.LOADS, 1000)
            at = 8 * Header.LOADS
            copied[at : at + 8] = copy_in_use(segment, **options)[at : at + 8]
        return copied

    with closing(made), mock.patch.object(Segment, "copy_in_use", copy_while_it_stores):
        for _ in range(6):
            with made.namespace.transaction() as t:
                committed = made.namespace.segment.words[Header.LOADS]
                t.add(Header.HITS, 1)
                stores.append(True)
                assert read_snapshot(made.namespace.name).loads == committed, "what is open counts as undone"
                assert not stores


# ---- which namespaces there are, and whether one can be read -----------------------------------------------------

READ = "mpmm.shared_state.snapshot.read"


class Clock:
    """Stands in for `time`; only sleeps let time pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return int(self.now * 1e9)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now = round(self.now + seconds, 6)


@contextmanager
def without_segments(root: Path, *names: str) -> Iterator[None]:
    """Move the segments of namespaces away for a while."""
    segments = [Path("/dev/shm", segment_name(root, name)) for name in names]
    for segment in segments:
        segment.rename(segment.with_name(f"{segment.name}.aside"))
    try:
        yield
    finally:
        for segment in segments:
            segment.with_name(f"{segment.name}.aside").rename(segment)


def test_the_namespaces_of_a_root_are_listed_by_name_and_those_without_a_segment_apart(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert (find_namespaces(root), find_lost_namespaces(root)) == ([], [])
    with ExitStack() as stack:
        for name in ("b", "a", "d", "c"):
            stack.callback(Namespace.join(name, root=root).leave)
        (root / "nobodys").mkdir()
        (root / "lost+found").mkdir()
        (root / "file").touch()
        assert (find_namespaces(root), find_lost_namespaces(root)) == (["a", "b", "c", "d"], [])
        with without_segments(root, "d", "a", "b"):
            assert (find_namespaces(root), find_lost_namespaces(root)) == (["c"], ["a", "b", "d"])
        with pytest.raises(FileNotFoundError, match="there is no namespace 'another'"):
            read_snapshot("another", root)
        with pytest.raises(FileNotFoundError, match="namespace 'nobodys' has no segment"):
            read_snapshot("nobodys", root)
        (root / "nobodys").rmdir()
        (root / "lost+found").rmdir()
        (root / "file").unlink()


@pytest.mark.parametrize(
    ("joins_until", "members_until", "slept", "lost"),
    [
        *((0.0, 9.0, 0, True), (0.01, 9.0, 2, True), (9.0, 9.0, 100, True)),
        *((9.0, 0.01, 2, False), (9.0, 0.0, 0, False), (0.0, 0.0, 0, False)),
    ],
)
def test_a_segment_counts_as_lost_once_whoever_joins_or_leaves_has_finished_or_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joins_until: float, members_until: float, slept: int, lost: bool
) -> None:
    """joins_until, members_until: how long a process joins or leaves, and how long a member lives, in seconds."""
    clock = Clock()

    def is_locked(path: Path) -> bool:
        return clock.now < (joins_until if path.name == "lifecycle.lock" else members_until)

    root = tmp_path / "root"
    with ExitStack() as stack:
        stack.callback(Namespace.join("one", root=root).leave)
        with without_segments(root, "one"), monkeypatch.context() as patched:
            patched.setattr(f"{READ}.time", clock)
            patched.setattr(f"{READ}.is_locked", is_locked)
            found = find_lost_namespaces(root)
    assert (found, clock.slept) == (["one"] if lost else [], [0.005] * slept)


@pytest.mark.parametrize(
    ("places", "locked", "has_members", "opened", "error", "said"),
    [
        ([(1, 1), (1, 1)], False, False, 2, DeadMakerError, "is unfinished: the process that made it has died"),
        ([(1, 1), (1, 2), (1, 2)], False, False, 3, DeadMakerError, "is unfinished"),
        ([None, None, (1, 2)], False, False, 4, FileNotFoundError, "has no segment"),
        (
            [(1, 1), (1, 1)],
            False,
            True,
            2,
            LayoutMismatchError,
            "read namespace 'begun': found an empty segment",
        ),
        ([(1, 1)], True, False, 1, FileNotFoundError, "is being made$"),
        ([(1, 1)], None, False, 1, FileNotFoundError, "is being made, or its maker was killed$"),
    ],
)
def test_a_segment_that_was_not_finished_is_being_made_or_its_maker_has_died(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    places: list[tuple[int, int] | None],
    locked: bool | None,
    has_members: bool,
    opened: int,
    error: type[Exception],
    said: str,
) -> None:
    """places: which segment is found after each look into it."""
    looks = [*([UnfinishedSegment("an empty segment", "an initialised one")] * len(places)), None]
    (tmp_path / "begun").mkdir(mode=0o700)
    tmp_path.chmod(0o700)
    with monkeypatch.context() as patched, mock.patch.object(Segment, "open", side_effect=looks) as opens:
        patched.setattr(f"{READ}.identity_of", mock.Mock(side_effect=places))
        patched.setattr(f"{READ}.is_locked_as", lambda path, _: locked if path.name == "lifecycle.lock" else False)
        patched.setattr(f"{READ}.is_locked", lambda _: has_members)
        if has_members:
            (tmp_path / "begun" / "m0.lock").touch()
        with pytest.raises(error, match=said) as caught:
            read_snapshot("begun", tmp_path)
    assert caught.type is error
    assert opens.call_count == opened


def test_one_copy_is_enough_between_transactions_and_two_that_are_equal_within_one() -> None:
    made = RandomTables(0)
    copy_in_use, copies = Segment.copy_in_use, list[bool]()

    def copy(segment: Segment, **options: Any) -> bytearray:
        copies.append(options["events"])
        return copy_in_use(segment, **options)

    with closing(made), mock.patch.object(Segment, "copy_in_use", copy):
        read_snapshot(made.namespace.name)
        assert copies == [True]
        with made.namespace.transaction() as t:
            t.add(Header.HITS, 1)
            assert read_snapshot(made.namespace.name, events=False).torn_words == 1
        assert copies == [True, False, False]


@pytest.mark.parametrize("happens", ["the lock is free", "the lock is not free", "the lock file was removed"])
def test_a_copy_is_made_with_the_lock_if_writers_leave_no_gap_for_one(
    monkeypatch: pytest.MonkeyPatch, happens: str
) -> None:
    made, clock = RandomTables(0), Clock()
    words, copy_in_use = made.namespace.segment.words, Segment.copy_in_use
    copies: list[bytearray | None] = []

    def copy(segment: Segment, *, events: bool = True, into: bytearray | None = None) -> bytearray:
        copies.append(into)
        found = copy_in_use(segment, events=events, into=into)
        if into is None:
            words[Header.CHANGE] += 2
            words[Header.LOADS] += 1
        return found

    lock = mock.Mock()
    if happens == "the lock is not free":
        lock.exclusive.side_effect = LockTimeoutError("busy")
    lock_file = mock.Mock(return_value=lock)
    if happens == "the lock file was removed":
        lock_file.side_effect = FileNotFoundError
    with closing(made):
        with monkeypatch.context() as patched:
            patched.setattr(f"{READ}.time", clock)
            patched.setattr(Segment, "copy_in_use", copy)
            patched.setattr(Segment, "lock_file", lambda _: lock_file())
            loads = read_snapshot(made.namespace.name).loads
        assert copies[:12] == [None] * 12
        assert clock.slept == [0.0001 * (number % 7) for number in range(12)]
        if happens == "the lock file was removed":
            assert (len(copies), loads) == (12, 11)
            assert not lock.mock_calls
        else:
            assert (len(copies), loads) == (13, 12)
            assert lock.mock_calls == [mock.call.exclusive(0.5), mock.call.close()]
        words[Header.LOADS] = 0


# ---- what is computed from several words -------------------------------------------------------------------------


def decoded(made: RandomTables, words: dict[int, int] | None = None, **options: Any) -> Snapshot:
    """Return a snapshot of a namespace as if some of its words had other values."""
    segment = made.namespace.segment
    copied = bytearray(segment.copy())
    for word, value in (words or {}).items():
        copied[8 * word : 8 * word + 8] = value.to_bytes(8, "little")
    return decode(copied, segment.layout, "n", segment.name, **options)


@pytest.mark.parametrize(
    ("status", "held", "stopped"),
    [
        *((psutil.STATUS_STOPPED, True, True), (psutil.STATUS_TRACING_STOP, True, True)),
        *((psutil.STATUS_SLEEPING, True, False), (psutil.NoSuchProcess(1), True, False), (ValueError(), True, False)),
        *((OverflowError(), True, False), (psutil.STATUS_STOPPED, False, False), (psutil.STATUS_STOPPED, None, False)),
    ],
    ids=str,
)
def test_the_holder_of_the_lock_is_shown_as_stopped_if_it_has_the_lock_and_is(
    status: str | Exception, held: bool | None, stopped: bool
) -> None:
    made = RandomTables(0)
    outcome: Any = [status]
    with closing(made), mock.patch("psutil.Process") as process:
        process.return_value.status.side_effect = outcome
        words = {Header.LOCK_HOLDER: 4321, Header.PID_NAMESPACE: pid_namespace()}
        found = decoded(made, words, held=held).lock
        assert (found.holder_stopped, found.held) == (stopped, held)
        assert process.mock_calls[:1] == ([mock.call(4321)] if held else [])
        # In another container it may be the number of another process.
        for other in (0, pid_namespace() + 1):
            assert not decoded(made, {**words, Header.PID_NAMESPACE: other}, held=held).lock.holder_stopped


def test_a_waiters_time_left_ends_with_its_deadline() -> None:
    made = RandomTables(0)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        with made.namespace.transaction() as t:
            for deadline_ns in (made.now + SECOND_NS, made.now - SECOND_NS, LONGEST_NS - 1, LONGEST_NS):
                made.transitions.tickets.enqueue(t, made.claim_model(t), 1, 1, 100.0, deadline_ns)
        found = {one.row: one.time_left_s for one in decoded(made).tickets}
    assert (found[0], found[1], found[3]) == (1.0, -1.0, math.inf)
    assert found[2] == pytest.approx((LONGEST_NS - made.now) / 1e9)


def test_idle_copies_are_kept_as_long_as_the_word_says() -> None:
    made = RandomTables(0)
    with closing(made):
        with made.namespace.transaction() as t:
            row = made.claim_model(t)
        word = made.tables.model(row) + Model.KEEP_ALIVE
        kept = {}
        for value in (0, 1, 2 * SECOND_NS + 1, LONGEST_NS, LONGEST_NS + 1):
            kept[value] = next(one.keep_alive_s for one in decoded(made, {word: value}).models if one.row == row)
    longest_s = pytest.approx(LONGEST_NS / 1e9)
    assert kept == {0: None, 1: 0.0, 2 * SECOND_NS + 1: 2.0, LONGEST_NS: longest_s, LONGEST_NS + 1: math.inf}


def test_the_budget_for_suspended_copies_is_the_chosen_one_or_else_the_creators_share() -> None:
    made = RandomTables(0)
    names = [field.name for field in fields(Settings)]
    word = Header.SETTINGS + names.index("suspend_budget_mb")
    with closing(made):
        share = {Header.HOST_SHARE_MB: float_bits(77.0)}
        assert decoded(made, {**share, word: float_bits(5.0)}).suspend_budget_mb == 5.0
        assert decoded(made, {**share, word: float_bits(math.inf)}).suspend_budget_mb == 77.0


def test_junk_in_counts_and_lengths_is_shown_as_far_as_there_are_words() -> None:
    made = RandomTables(0)
    most = 2**64 - 1
    with closing(made):
        with made.namespace.transaction() as t:
            model = made.claim_model(t)
            made.transitions.estimates.observe(t, [(1, 1)], 10.0)
        device, observation = made.tables.device(0), made.layout.observations.base
        junk = decoded(
            made,
            {
                device + Device.RETURN_COUNT: most,
                observation + Observation.PAIRS_USED: most,
                observation + Observation.COUNT: most,
                made.tables.model(model) + Model.TAG: most,
                made.tables.member(1): 99,
            },
        )
    assert len(junk.devices[0].returns_mb) == Device.RETURNS_LENGTH
    assert len(junk.observations[0].readings_mb) == Observation.READINGS_KEPT
    assert len(next(one.tag for one in junk.models if one.row == model).encode("utf-8", "surrogateescape")) == 1024
    assert [one.kind for one in junk.members if one.slot == 1] == ["worker"]


def test_the_collector_is_left_as_it_was_found() -> None:
    made = RandomTables(0)
    enabled = []
    with closing(made):
        for collects in (False, True):
            (gc.enable if collects else gc.disable)()
            try:
                decoded(made)
                enabled.append(gc.isenabled())
            finally:
                gc.enable()
    assert enabled == [False, True]


@pytest.mark.parametrize(
    ("states", "shown"),
    [
        ({}, ("idle", 60, 4.0, None)),
        ({1: "active"}, ("active", 60, 5.0, 101)),
        ({1: "active", 2: "active"}, ("active", 60, 6.0, 102)),
        ({0: "active", 1: "active"}, ("active", 60, 5.0, 101)),
        ({0: "unloading", 1: "active"}, ("unloading", 60, 4.0, 100)),
        ({0: "active"}, ("active", 60, 4.0, 100)),
    ],
)
def test_a_copy_with_seats_is_shown_with_the_user_that_has_held_it_for_longest(
    states: dict[int, str], shown: tuple[str, int, float, int | None]
) -> None:
    """states: of the copy's own row, 0, and of its seats; idle otherwise."""
    made = RandomTables(0)
    with closing(made):
        with made.namespace.transaction() as t:
            made.transitions.loads.begin(t, made.claim_model(t), 1, 1, 100.0, alone=False)
        snapshot = decoded(made)
    (copy,) = snapshot.instances
    rows = [
        replace(
            copy,
            row=row,
            state=states.get(row, "idle"),
            holder=100 + row if row in states else None,
            seat_of=0 if row else None,
            seats=0 if row else 2,
            uses=10 * (row + 1),
            for_s=4.0 + row,
        )
        for row in range(3)
    ]
    (found,) = replace(snapshot, instances=tuple(rows)).copies
    assert (found.state, found.uses, found.for_s, found.holder) == shown
    alone = replace(rows[0], seats=0)
    assert replace(snapshot, instances=(alone,)).copies == (alone,)
