"""What a snapshot and typed reads show of the words of the segment, and that states mean the same everywhere."""

from __future__ import annotations

import time
from dataclasses import fields
from enum import IntEnum
from typing import Any

import pytest
from harness import NewManager

from mpmm.shared_state.layout import Device, Header, Instance, Member, Model, Pin, Ticket
from mpmm.shared_state.rows import DeviceRow, HeaderRow, InstanceRow, MemberRow, ModelRow, Row, TicketRow
from mpmm.shared_state.snapshot import InstanceInfo, MemberInfo, ModelInfo, PinInfo, TicketInfo, read_snapshot
from mpmm.shared_state.snapshot.decode import _Decoder
from mpmm.shared_state.snapshot.kinds import PLACE
from mpmm.shared_state.states import InstanceState, MemberState, ModelState, TicketState

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
    Model: {"SUPERSEDED"},
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
