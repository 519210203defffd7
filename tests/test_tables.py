"""How rows are found, in short tables without NumPy and in longer ones with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from unittest import mock

import pytest
from harness import NOBODYS_PID

from mpmm.errors import InvalidArgumentError, SegmentCorruptError, TableFullError
from mpmm.shared_state.layout import Capacities, Header, Instance, Member, Model, Pin, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.table_rows import FEW_ROWS
from mpmm.shared_state.tables import encode_text, fit_text
from mpmm.text.display_names import set_display_name

ROWS = 3 * FEW_ROWS
_names = itertools.count()


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    joined = Namespace.join(f"tables{next(_names)}", capacities=Capacities(pins=ROWS, members=ROWS, instances=4))
    yield joined
    joined.leave()


def pin_rows(namespace: Namespace, count: int) -> None:
    """Use several rows, each for a model of its own, and free every third one again."""
    tables, pins = namespace.tables, namespace.segment.layout.pins
    with namespace.transaction() as t:
        for row in range(count):
            t.set_all(
                [
                    (tables.pin(row) + Pin.STATE, int(row % 3 != 2)),
                    (tables.pin(row) + Pin.MODEL, row // 2),
                    (tables.pin(row) + Pin.MEMBER, row),
                ]
            )
        t.set(pins.end_word, count)


@pytest.mark.parametrize("count", [0, 1, 2, 3, FEW_ROWS - 1, FEW_ROWS, FEW_ROWS + 1, ROWS - 1, ROWS])
def test_rows_are_found_in_tables_of_any_length(namespace: Namespace, count: int) -> None:
    tables, pins = namespace.tables, namespace.segment.layout.pins
    pin_rows(namespace, count)
    used = [row for row in range(count) if row % 3 != 2]
    assert tables.used_rows(pins) == used
    assert len(tables.view(pins)) == count
    for model in (0, 1, count // 2, count):
        assert tables.rows_where(pins, Pin.MODEL, model) == [row for row in used if row // 2 == model]
    # In free rows there are fields left.
    assert tables.rows_where(pins, Pin.MEMBER, 2) == []
    for row in (0, 1, 2, 3, count - 1):
        if row in used:
            assert tables.pin_row(row // 2, row) == row
            assert tables.pin_row(row // 2 + 1, row) is None
    free = 2 if count > 2 else count
    assert tables.free_row(pins) == free
    with namespace.transaction() as t:
        t.set_all([(tables.pin(row) + Pin.STATE, 1) for row in range(count)])
    if count < ROWS:
        assert tables.free_row(pins) == count
    else:
        with pytest.raises(TableFullError, match=f"all {ROWS} rows are in use") as caught:
            tables.free_row(pins)
        assert (caught.value.table, caught.value.capacity, caught.value.setting) == ("pins", ROWS, "Capacities.pins")
    with namespace.transaction() as t:
        t.set_all([(tables.pin(row) + Pin.STATE, 0) for row in range(count)])


@pytest.mark.parametrize("count", [2, FEW_ROWS, FEW_ROWS + 1, ROWS])
def test_members_are_found_by_their_slots(namespace: Namespace, count: int) -> None:
    tables, members = namespace.tables, namespace.segment.layout.members
    with namespace.transaction() as t:
        for slot in range(1, count):
            kind = Member.SERVER if slot % 2 else Member.FREE
            at = tables.member(slot)
            t.set_all([(at + Member.STATE, kind), (at + Member.PID, NOBODYS_PID + slot)])
        t.set(members.end_word, count)
    used = [0, *range(1, count, 2)]
    assert tables.used_members() == used
    assert [slot for slot in range(ROWS) if tables.member_in_use(slot)] == used
    assert list(tables.free_members()) == [slot for slot in range(ROWS) if slot not in used]
    with namespace.transaction() as t:
        t.set_all([(tables.member(slot) + Member.STATE, Member.FREE) for slot in used[1:]])


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 31])
def test_a_text_is_read_as_long_as_it_is_whatever_was_there_before(namespace: Namespace, length: int) -> None:
    tables, text = namespace.tables, bytes(range(1, 32))[:length]
    before = tables.text(Header.SOURCE_NAME)
    with namespace.transaction() as t:
        t.set_text(Header.SOURCE_NAME, b"x" * Header.SOURCE_NAME_BYTES)
        t.set_text(Header.SOURCE_NAME, text)
    assert tables.text(Header.SOURCE_NAME) == text
    assert tables.string(Header.SOURCE_NAME) == text.decode()
    with namespace.transaction() as t:
        t.set_text(Header.SOURCE_NAME, b"\xff")
    assert tables.string(Header.SOURCE_NAME) == "\udcff"
    with namespace.transaction() as t:
        t.set_text(Header.SOURCE_NAME, before)


def test_errors_name_a_tag_in_quotes_or_by_its_name(namespace: Namespace) -> None:
    tables, tag, named = namespace.tables, "a tag of test_tables", "another tag of test_tables"
    set_display_name(named, "what people call it")
    with namespace.transaction() as t:
        for one in (tag, named):
            namespace.transitions.models.claim(t, one, one.encode())
    assert tables.called(tag) == repr(tag)
    assert tables.called(named) == tables.shown_for(named) != repr(named)
    assert tables.called(5) == "5", "a caller may have passed no tag at all"  # type: ignore[arg-type]  # On purpose.


def test_a_tag_is_found_as_long_as_its_row_is_its_own(namespace: Namespace) -> None:
    tables, models = namespace.tables, namespace.transitions.models
    with namespace.transaction() as t:
        rows = [models.claim(t, tag, tag.encode()) for tag in ("one", "two", "three")]
        lease = namespace.transitions.leases.claim(t, b"four", 1.0)
        ticket = namespace.transitions.tickets.enqueue(t, lease, 0, 1, 1.0, 2**62)
    assert [tables.model_row(tag) for tag in ("one", "two", "three")] == rows
    assert [tables.model_row(tag) for tag in ("four", "On", "onE", "", "\ud800")] == [None] * 5
    assert tables.model_rows() == rows
    assert [tables.tag_of(row) for row in rows] == ["one", "two", "three"]
    generation = namespace.segment.words[tables.model(rows[0]) + Model.GENERATION]
    with namespace.transaction() as t:
        # The row is another tag's now.
        t.set(tables.model(rows[0]) + Model.GENERATION, generation + 100)
        t.set_text(tables.model(rows[0]) + Model.TAG, b"new")
    assert (tables.model_row("one"), tables.model_row("new")) == (None, rows[0])
    with namespace.transaction() as t:
        t.set(tables.model(rows[1]), 0)
        namespace.transitions.hand_over.leave_queue(t, ticket)
    assert tables.model_row("two") is None


def test_a_bell_is_the_word_of_its_member_and_is_woken_where_it_is_mapped(namespace: Namespace) -> None:
    tables, segment = namespace.tables, namespace.segment
    with namespace.transaction() as t:
        t.set(tables.member(2) + Member.BELL, 41)
    bell = tables.bell(2)
    word = tables.member(2) + Member.BELL
    assert (bell.word, bell.address, bell.seen()) == (word, segment.address + 8 * word, 41)
    module = "mpmm.shared_state.signal_words"
    with mock.patch(f"{module}.wake_all") as wakes, mock.patch(f"{module}.wait_for_change") as waits:
        bell.wait(41, 0.25)
        bell.wake()
    assert wakes.mock_calls == [mock.call(bell.address)]
    assert waits.mock_calls == [mock.call(mock.ANY, bell.address, 41, 0.25)]
    assert waits.mock_calls[0].args[0]() == 41


def test_workers_are_listed_with_what_they_can_measure(namespace: Namespace) -> None:
    members = namespace.transitions.members
    with namespace.transaction() as t:
        for slot, kind in ((1, Member.SERVER), (3, Member.WORKER), (4, Member.GUEST)):
            members.join(t, slot, kind, NOBODYS_PID, 1, b"one")
            members.note_source(t, slot, slot)
    mine = namespace.slot
    measures = namespace.tables.members[mine].measures
    assert namespace.tables.measures_of_workers() == {mine: measures, 3: 3}
    assert [namespace.tables.member_in_use(slot) for slot in (mine, 1, 2, 3)] == [True, True, False, True]
    with namespace.transaction() as t:
        for slot in (1, 3, 4):
            members.leave(t, slot)


def test_a_tag_takes_as_many_bytes_as_its_field_has() -> None:
    assert encode_text("é", 2, "tag") == "é".encode()
    for impossible in ("", "éa", "\ud800"):
        with pytest.raises(InvalidArgumentError, match="tag "):
            encode_text(impossible, 2, "tag")
    assert [fit_text("añb", most) for most in (0, 2, 3, 9)] == [b"", b"a\xc3", "añ".encode(), "añb".encode()]


def test_people_see_the_name_that_the_row_has_or_else_the_one_that_this_process_has(namespace: Namespace) -> None:
    tables, models = namespace.tables, namespace.transitions.models
    set_display_name("known here", "here")
    set_display_name("no row", "somewhere")
    with namespace.transaction() as t:
        rows = [models.claim(t, tag, tag.encode()) for tag in ("plain", "known here", "by row")]
        for row, name in ((rows[1], b""), (rows[2], b"there")):
            t.set_text(tables.model(row) + Model.NAME, name)
    shown = ["plain", "here [known here]", "there [by row]"]
    assert [tables.shown(row) for row in rows] == shown
    assert [tables.shown_for(tag) for tag in ("plain", "known here", "by row")] == shown
    assert [tables.called(tag) for tag in ("plain", "by row", "no row")] == ["'plain'", shown[2], "somewhere [no row]"]
    with namespace.transaction() as t:
        t.set_text(tables.model(rows[1]) + Model.NAME, b"row")
    assert tables.shown(rows[1]) == "row [known here]"
    with mock.patch.object(type(tables), "model_row", side_effect=ValueError):
        # As after another thread has left the namespace.
        assert [tables.shown_for(tag) for tag in ("plain", "known here")] == shown[:2]
    for tag in ("known here", "no row"):
        set_display_name(tag, "")
    tables.close()
    assert tables.rows_of_tags == {}


def test_rows_of_tags_are_remembered_for_some_times_as_many_tags_as_there_are_rows(namespace: Namespace) -> None:
    tables = namespace.tables
    most = 4 * namespace.segment.layout.models.capacity
    with namespace.transaction() as t:
        rows = [namespace.transitions.models.claim(t, tag, tag.encode()) for tag in ("one", "two")]
    tables.rows_of_tags.clear()
    tables.rows_of_tags.update((f"old {number}", (0, 0)) for number in range(most))
    assert tables.model_row("one") == rows[0]
    assert len(tables.rows_of_tags) == most + 1
    assert tables.model_row("two") == rows[1]
    assert list(tables.rows_of_tags) == ["two"]
    with mock.patch.object(type(tables), "view", side_effect=AssertionError):
        assert tables.model_row("two") == rows[1], "without a search"


def test_the_error_for_a_row_in_an_impossible_state_says_where_it_is(namespace: Namespace) -> None:
    at = namespace.tables.ticket(2)
    error = namespace.tables.surprise("the ticket", at)
    assert isinstance(error, SegmentCorruptError)
    assert str(error).startswith(f"the ticket at word {at} of segment {namespace.segment.name} is in state 0, which")
    assert error.name == namespace.segment.name


@pytest.mark.parametrize(
    ("ticket", "instance", "wakes"),
    [
        ((0, 5), (Instance.IDLE, 1), ""),
        ((Ticket.WAITING, 0), (0, 1), ""),
        ((Ticket.WAITING, 5), (Instance.ACTIVE, 1), "ticket"),
        ((Ticket.GRANTED, 0), (Instance.UNLOADING, 3), "ticket 2"),
        ((Ticket.RESET, 5), (Instance.SUSPENDING, ROWS), f"ticket {ROWS - 1}"),
        ((0, 0), (Instance.RESUMING, 1), ""),
        ((0, 0), (Instance.UNLOADING, 0), ""),
        ((0, 0), (Instance.SUSPENDING, ROWS + 1), ""),
        ((0, 0), (Instance.UNLOADING, 1), "0"),
    ],
)
def test_all_are_woken_that_have_news_or_something_to_do(
    namespace: Namespace, ticket: tuple[int, int], instance: tuple[int, int], wakes: str
) -> None:
    """ticket: state, and when it was called up. instance: state and holder. wakes: the ticket, and slots of members."""
    tables, layout = namespace.tables, namespace.segment.layout
    at, place = tables.ticket(1), tables.instance(2)
    words = [(at, ticket[0]), (at + Ticket.CALLED_UP, ticket[1])]
    words += [(place, instance[0]), (place + Instance.HOLDER, instance[1])]
    words += [(layout.tickets.end_word, 2), (layout.instances.end_word, 3)]
    with namespace.transaction() as t:
        t.set_all(words)
    with mock.patch("mpmm.shared_state.signal_words.wake_all") as wake:
        tables.wake_all_with_news()
    expected = [
        at + Ticket.SIGNAL if one == "ticket" else tables.member(int(one)) + Member.BELL for one in wakes.split()
    ]
    assert [call.args for call in wake.mock_calls] == [(namespace.segment.address + 8 * word,) for word in expected]
    with namespace.transaction() as t:
        t.set_all([(at, 0), (place, 0)])
