"""What the rows of a live segment say about models, copies and members; `table_rows` finds them. Read only."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from mpmm.errors import InvalidArgumentError, SegmentCorruptError
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Device, Instance, Member, Model, Pin, Ticket, device_rows
from mpmm.shared_state.segment import Segment
from mpmm.shared_state.signal_words import Signal
from mpmm.shared_state.table_rows import TableRows
from mpmm.text.arguments import encoded_text
from mpmm.text.display_names import display_name, shown_tag

__all__ = ["Tables", "encode_text", "encoded_handle", "fit_text"]


def encode_text(text: str, max_bytes: int, what: str) -> bytes:
    """Return `text` as `mpmm.text.arguments.encoded_text` does.

    Raises InvalidArgumentError if it is no str, empty, longer than `max_bytes`, or has a lone surrogate.
    """
    encoded = encoded_text(what, text)
    if not encoded:
        raise InvalidArgumentError(f"{what} '': expected a str that is not empty")
    if len(encoded) > max_bytes:
        raise InvalidArgumentError(f"{what} {text[:40]!r}… has {len(encoded)} bytes; the limit is {max_bytes}")
    return encoded


def encoded_handle(value: object) -> bytes:
    """Return what a loader has returned as the row of a copy has it; empty if it is no handle, but an object.

    That is any value but a str, and a str that no row can have: an empty one, a very long one, and one with a lone
    surrogate.
    """
    if isinstance(value, str):
        with suppress(InvalidArgumentError):
            return encode_text(value, Instance.HANDLE_BYTES, "handle")
    return b""


def fit_text(text: str, max_bytes: int) -> bytes:
    """Return `text` as UTF-8, cut to `max_bytes`; for names that only humans read."""
    return text.encode("utf-8", "replace")[:max_bytes]


class Tables(TableRows):
    """The tables of a segment, with the questions that need several words of a row, or several rows."""

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment)
        #: tag -> (row, generation); a hint that model_row() checks against the segment.
        self.rows_of_tags: dict[str, tuple[int, int]] = {}

    def surprise(self, what: str, at: int) -> SegmentCorruptError:
        """Return the error for a row, beginning at word `at`, whose state must not occur here."""
        name = self.segment.name
        return SegmentCorruptError(
            f"{what} at word {at} of segment {name} is in state {self.segment.words[at]}, which does not allow this "
            "change: another program has written into the segment, or mpmm has a defect (`mpmm check` tells); nothing "
            "was changed",
            name=name,
        )

    def close(self) -> None:
        """Drop everything that refers to the segment."""
        self.rows_of_tags.clear()

    def on_device(self, row: int) -> list[int]:
        """Return the instance rows, in any state, that lie on a device; without seats, which have no memory."""
        rows = self.view(self._instances)
        here = (rows[:, Instance.DEVICES] & np.uint64(1 << row) != 0) & (rows[:, Instance.SEAT_OF] == 0)
        # A free row keeps the devices of its last copy, so check the state, too.
        found: list[int] = np.flatnonzero(here & (rows[:, 0] != 0)).tolist()
        return found

    def seats_of(self, row: int) -> list[int]:
        """Return the rows of the seats of a copy (row)."""
        # Usually there are none, and a search of the whole table costs more than everything else.
        if not self.segment.words[self.instance(row) + Instance.SEATS]:
            return []
        return self.rows_where(self._instances, Instance.SEAT_OF, row + 1)

    def copy_of(self, row: int) -> int:
        """Return the row of the copy that a row stands for: its own, unless it is a seat."""
        return (self.segment.words[self.instance(row) + Instance.SEAT_OF] or row + 1) - 1

    def is_in_use(self, row: int) -> bool:
        """Tell whether a copy (row) is in use, in its own row or in one of its seats."""
        words = self.segment.words
        return any(words[self.instance(one)] == Instance.ACTIVE for one in (row, *self.seats_of(row)))

    def idle_copies(self) -> list[int]:
        """Return the rows of idle copies none of whose seats is in use."""
        idle = self.rows_where(self._instances, Instance.STATE, Instance.IDLE)
        return [row for row in idle if self.copy_of(row) == row and not self.is_in_use(row)]

    def idle_since(self, row: int) -> int:
        """Return when an idle copy (row) was last given back."""
        words = self.segment.words
        return max(words[self.instance(one) + Instance.SINCE] for one in (row, *self.seats_of(row)))

    def shares_of(self, row: int) -> list[tuple[int, float]]:
        """Return the devices that an instance lies on, with its MB on each."""
        words, floats, at = self.segment.words, self.segment.floats, self.instance(row)
        rows = device_rows(words[at + Instance.DEVICES])
        # SHARES is not written for a single device, and may be left over from an earlier copy in this row.
        if len(rows) == 1:
            return [(rows[0], floats[at + Instance.MB])]
        return [(device, floats[at + Instance.SHARES + number]) for number, device in enumerate(rows)]

    def server_shares_mb(self, slot: int, span: int) -> tuple[float, ...]:
        """Return how many MB a server (slot) takes on each of its instance's `span` devices, lowest device first."""
        floats, at = self.segment.floats, self.member(slot)
        if span == 1:
            return (floats[at + Member.MEASURED_MB],)
        return tuple(floats[at + Member.SHARES : at + Member.SHARES + span])

    def tag_of(self, row: int) -> str:
        """Return the tag of a model row."""
        return self.string(self.model(row) + Model.TAG)

    def shown(self, row: int) -> str:
        """Return how a model row is shown to people: its tag, and its name if it has one."""
        tag = self.tag_of(row)
        # The row's name first, because `mpmm inspect` shows that; this process may know one that is not there yet.
        return shown_tag(tag, self.string(self.model(row) + Model.NAME) or display_name(tag))

    def shown_for(self, tag: str) -> str:
        """Return how a tag is shown to people, whether it has a row or not. Without the lock."""
        try:
            row = self.model_row(tag)
            return shown_tag(tag, display_name(tag)) if row is None else self.shown(row)
        except ValueError:
            # Another thread has left the namespace; the error that the caller is about to raise is more useful.
            return shown_tag(tag, display_name(tag))

    def called(self, tag: str) -> str:
        """Return a tag as errors show it: in quotes, or with its name if it has one."""
        # The error may be about an argument that is no tag at all.
        shown = self.shown_for(tag) if isinstance(tag, str) else tag
        return repr(tag) if shown == tag else shown

    def handle_of(self, row: int) -> str:
        """Return the handle of an instance row, empty for an object."""
        return self.string(self.instance(row) + Instance.HANDLE)

    def device_name(self, row: int) -> str:
        """Return the name of a device, for people."""
        return self.string(self.device(row) + Device.NAME)

    def device_uuid(self, row: int) -> bytes:
        """Return the bytes that identify a device."""
        return self.text(self.device(row) + Device.UUID)

    def bell(self, slot: int) -> Signal:
        """Return the bell of a member."""
        return Signal(self.segment, self.member(slot) + Member.BELL)

    def wake_all_with_news(self) -> None:
        """Wake the waiters that have an answer or were called up, and members that have to unload or suspend something.

        In case the process that changed their words was stopped, or died, before it woke them: waking them is all that
        is missing. Without the lock.
        """
        words, layout = self.segment.words, self.segment.layout
        for row in self.used_rows(layout.tickets):
            at = self.ticket(row)
            if words[at] != Ticket.WAITING or words[at + Ticket.CALLED_UP]:
                Signal(self.segment, at + Ticket.SIGNAL).wake()
        for state in (Instance.UNLOADING, Instance.SUSPENDING):
            for row in self.rows_where(layout.instances, Instance.STATE, state):
                holder = words[self.instance(row) + Instance.HOLDER]
                # Read without the lock, so it may have any value.
                if 0 < holder <= layout.members.capacity:
                    self.bell(holder - 1).wake()

    def model_row(self, tag: str) -> int | None:
        """Return the row of a tag, or None."""
        words = self.segment.words
        hint = self.rows_of_tags.get(tag)
        if hint is not None:
            row, generation = hint
            at = self._models.base + row * Model.WORDS
            # STATE, too, because a freed row keeps its generation until it is taken again.
            if words[at + Model.GENERATION] == generation and words[at + Model.STATE]:
                return row
            # The row was freed, and may be another tag's by now; this tag may have a new one.
        try:
            wanted = tag.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            # No model can have such a tag, see `encode_text`.
            return None
        models = self.view(self._models)
        # By length first: it is one word, and rules out most tags before any text is read. A lease is no tag, even if
        # it has the same name.
        candidates = np.flatnonzero((models[:, Model.STATE] == Model.MODEL) & (models[:, Model.TAG] == len(wanted)))
        for row in candidates.tolist():
            # Read before the text: without the lock, another model may take the row right after the text was read, and
            # a hint with that model's generation would lead this tag to the wrong row for good.
            generation = words[self.model(row) + Model.GENERATION]
            if self.text(self.model(row) + Model.TAG) == wanted:
                # New tags for every run, as Beam makes them, would otherwise fill the memory of a long-lived process.
                if len(self.rows_of_tags) > 4 * self._models.capacity:
                    self.rows_of_tags.clear()
                self.rows_of_tags[tag] = (row, generation)
                return int(row)
        return None

    def pin_row(self, model: int, member: int) -> int | None:
        """Return the row of a member's (reference) pin on a model, or None."""
        # By member first: a member has few pins, while a model may have one from each member.
        pins = self.rows_where(self._pins, Pin.MEMBER, member)
        return next((row for row in pins if self.segment.words[self.pin(row) + Pin.MODEL] == model), None)

    def kept_ns(self, model: int, idle_ttl_seconds: float) -> int:
        """Return how long an idle copy of a model is kept, `LONGEST_NS` for ever, regardless of pins."""
        # The segment stores it plus one, because 0 ns is a valid choice: unload at once.
        word = self.segment.words[self.model(model) + Model.KEEP_ALIVE]
        return int(word) - 1 if word else to_ns(idle_ttl_seconds)

    def model_rows(self) -> list[int]:
        """Return the rows of tags, not those of leases."""
        return self.rows_where(self._models, Model.STATE, Model.MODEL)
