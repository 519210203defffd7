"""What the words of a row mean: the kinds with which the fields of `records` are declared.

A kind, given the place of a word in its row, is the metadata of a record's field. With it, `decode` reads the whole
column, one value for each row. `decode` computes a field without a kind from several words, or from other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from mpmm.shared_state.layout import Ticket, device_rows

__all__ = [
    "PLACE",
    "READ",
    "Rows",
    "age",
    "age_or_none",
    "amount_or_none",
    "devices",
    "flag",
    "number",
    "number_or_none",
    "preload",
    "reference",
    "state",
    "tag",
    "tag_of_reference",
    "text",
    "text_or_none",
    "wall",
    "word",
    "word_or_none",
]

# Keys of a field's metadata: how its column is read, and the place of its first word in the row.
READ = "read"
PLACE = "place"

# No text field is longer than this. A greater length is junk, and must not turn the whole segment into a string.
_MOST_TEXT_BYTES = 8 * 128


@dataclass(frozen=True)
class Rows:
    """Rows of one table in a copy of a segment.

    starts: the first word of each. now_ns: when the copy was made. tags: model row -> tag.
    """

    starts: list[int]
    words: memoryview
    floats: memoryview[float]
    data: bytearray
    now_ns: int
    tags: dict[int, str]

    def words_at(self, place: int) -> list[int]:
        """Return the word at this place of each row."""
        words = self.words
        return [words[start + place] for start in self.starts]

    def floats_at(self, place: int) -> list[float]:
        """Return the float at this place of each row."""
        floats = self.floats
        return [floats[start + place] for start in self.starts]

    def age(self, then_ns: int) -> float:
        """Return how many seconds before the copy something happened, below 0 for the future."""
        # Relative to one moment, so that times within a snapshot can be compared.
        return (self.now_ns - then_ns) / 1e9

    def text_at(self, word: int) -> str:
        """Return the text that begins at a word of the segment."""
        length = min(self.words[word], _MOST_TEXT_BYTES)
        # surrogateescape: tags may be any bytes, and what is no UTF-8 must convert back to the same bytes.
        return bytes(self.data[8 * (word + 1) : 8 * (word + 1) + length]).decode("utf-8", "surrogateescape")


Metadata = dict[str, Any]


def _kind(place: int, read: Callable[[Rows], list[Any]]) -> Metadata:
    return {PLACE: place, READ: read}


def word(place: int) -> Metadata:
    """Declare a whole number."""
    return _kind(place, lambda rows: rows.words_at(place))


def word_or_none(place: int) -> Metadata:
    """Declare a whole number where 0 means none."""
    return _kind(place, lambda rows: [found or None for found in rows.words_at(place)])


def preload(place: int) -> Metadata:
    """Declare how many copies a preload wants: one, if it only resumes one."""
    return _kind(place, lambda rows: [1 if found == Ticket.ONLY_RESUMES else found for found in rows.words_at(place)])


def flag(place: int) -> Metadata:
    """Declare a bool: a word that is not 0."""
    # Not `== 1`: some flags have further values, such as UNLOAD_ON_RELEASE.
    return _kind(place, lambda rows: [found != 0 for found in rows.words_at(place)])


def reference(place: int) -> Metadata:
    """Declare the row that a word refers to: the word holds that row plus one, 0 for none."""
    # Plus one, because a new segment is all zeros, and a word that was never written must not refer to row 0.
    return _kind(place, lambda rows: [found - 1 if found else None for found in rows.words_at(place)])


def state(place: int, states: type[IntEnum]) -> Metadata:
    """Declare a state by its name; a number without one is shown as it is."""
    names = {one.value: one.name.lower() for one in states}
    # Not an error, because a snapshot must show what is wrong.
    return _kind(place, lambda rows: [names.get(found) or f"state {found}" for found in rows.words_at(place)])


def devices(place: int) -> Metadata:
    """Declare the rows of the devices whose bits are set."""
    return _kind(place, lambda rows: [tuple(device_rows(found)) for found in rows.words_at(place)])


def tag(place: int) -> Metadata:
    """Declare the tag of the model whose row a word holds, empty if that row is free."""
    # A row that refers to a free one breaks an invariant, which `check` reports; here it has no tag.
    return _kind(place, lambda rows: [rows.tags.get(found, "") for found in rows.words_at(place)])


def tag_of_reference(place: int) -> Metadata:
    """Declare the tag of the model that a word refers to, None for none."""
    # 0 becomes -1, which is no row and has no tag.
    return _kind(place, lambda rows: [rows.tags.get(found - 1) for found in rows.words_at(place)])


def age(place: int) -> Metadata:
    """Declare how many seconds ago something happened."""
    return _kind(place, lambda rows: [rows.age(found) for found in rows.words_at(place)])


def age_or_none(place: int) -> Metadata:
    """Declare how many seconds ago something happened, None if it never did."""
    # 0 stands for never, not for the start of the machine's clock.
    return _kind(place, lambda rows: [rows.age(found) if found else None for found in rows.words_at(place)])


def wall(place: int) -> Metadata:
    """Declare a moment as Unix time."""
    # Not as an age, because wall clocks may be set; only for people.
    return _kind(place, lambda rows: [found / 1e9 for found in rows.words_at(place)])


def number(place: int) -> Metadata:
    """Declare a float."""
    return _kind(place, lambda rows: rows.floats_at(place))


def number_or_none(place: int) -> Metadata:
    """Declare a float that is None if the segment has nan, for unknown."""
    # JSON has no nan, and a reader would take 0 for a figure.
    return _kind(place, lambda rows: [None if math.isnan(found) else found for found in rows.floats_at(place)])


def amount_or_none(place: int) -> Metadata:
    """Declare a float where 0 means none."""
    return _kind(place, lambda rows: [found or None for found in rows.floats_at(place)])


def text(place: int) -> Metadata:
    """Declare a text."""
    return _kind(place, lambda rows: [rows.text_at(start + place) for start in rows.starts])


def text_or_none(place: int) -> Metadata:
    """Declare a text that is None if it is empty."""
    return _kind(place, lambda rows: [rows.text_at(start + place) or None for start in rows.starts])
