"""Where the rows of the tables lie, and which of them are in use. Nothing here changes a segment.

Searches read the part of a table that was ever in use, as NumPy arrays: a few microseconds for some dozens of rows,
0.1 ms for some thousands. They need the lock, because otherwise rows change under them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mpmm.errors import TableFullError
from mpmm.shared_state.columns import DeviceColumns, InstanceColumns, ModelColumns, TicketColumns
from mpmm.shared_state.layout import Instance, Member, Model, Pin, Table, Ticket
from mpmm.shared_state.rows import (
    DeviceRow,
    EventRow,
    HeaderRow,
    InstanceRow,
    MemberRow,
    ModelRow,
    ObservationRow,
    Rows,
    TicketRow,
)
from mpmm.shared_state.segment import Segment

__all__ = ["TableRows"]

FEW_ROWS = 64


class TableRows:
    """Row arithmetic and searches. A *row* is an index into a table; `member(row)` etc. is its first word."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        layout = segment.layout
        self._members, self._models = layout.members, layout.models
        self._instances, self._tickets, self._devices = layout.instances, layout.tickets, layout.devices
        self._pins = layout.pins
        #: Typed reads, see `rows`.
        self.header = HeaderRow(segment, 0)
        self.members = Rows(segment, layout.members, MemberRow)
        self.models = Rows(segment, layout.models, ModelRow)
        self.instances = Rows(segment, layout.instances, InstanceRow)
        self.tickets = Rows(segment, layout.tickets, TicketRow)
        self.devices = Rows(segment, layout.devices, DeviceRow)
        self.observations = Rows(segment, layout.observations, ObservationRow)
        self.events = Rows(segment, layout.events, EventRow)

    def member(self, row: int) -> int:
        """First word of a member row."""
        return self._members.base + row * Member.WORDS

    def model(self, row: int) -> int:
        """First word of a model row."""
        return self._models.base + row * Model.WORDS

    def instance(self, row: int) -> int:
        """First word of an instance row."""
        return self._instances.base + row * Instance.WORDS

    def ticket(self, row: int) -> int:
        """First word of a ticket row."""
        return self._tickets.base + row * Ticket.WORDS

    def pin(self, row: int) -> int:
        """First word of a pin row."""
        return self._pins.base + row * Pin.WORDS

    def device(self, row: int) -> int:
        """First word of a device row."""
        return self._devices.base + row * self._devices.words

    def view(self, table: Table) -> npt.NDArray[np.uint64]:
        """Return the live rows of a table that may be in use, see `Segment.view`."""
        rows = self.segment.view(table)
        # Rows are taken lowest first, so no row beyond that was ever in use. (H5)
        return rows[: self.segment.words[table.end_word]] if table.end_word else rows

    def model_columns(self) -> ModelColumns:
        """Return the models table by columns."""
        return ModelColumns(self.view(self._models))

    def instance_columns(self) -> InstanceColumns:
        """Return the instances table by columns."""
        return InstanceColumns(self.view(self._instances))

    def ticket_columns(self) -> TicketColumns:
        """Return the tickets table by columns."""
        return TicketColumns(self.view(self._tickets))

    def device_columns(self) -> DeviceColumns:
        """Return the devices table by columns."""
        return DeviceColumns(self.view(self._devices))

    def text(self, word: int) -> bytes:
        """Return the bytes of the text field that begins at `word`."""
        words = self.segment.words
        # Read once: without the lock it may change, and slice and cut need the same length.
        length = words[word]
        # Whole words, then the cut: the last one may end in bytes of an older, longer text.
        return words[word + 1 : word + 1 + (length + 7) // 8].tobytes()[:length]

    def string(self, word: int) -> str:
        """Return a text field as str."""
        # Tags may be any bytes: what is no UTF-8 must give the same bytes again when the tag is looked up.
        return self.text(word).decode("utf-8", "surrogateescape")

    def used_rows(self, table: Table) -> list[int]:
        """Return the rows of a table whose first word is not 0."""
        column = self._short_column(table, 0)
        if column is not None:
            return [row for row, state in enumerate(column) if state]
        # The first word of every kind of row is its state, and FREE is 0.
        rows: list[int] = np.flatnonzero(self.view(table)[:, 0]).tolist()
        return rows

    def free_row(self, table: Table) -> int:
        """Return a row whose first word is 0. Raises TableFullError."""
        states = self.view(table)[:, 0]
        # The lowest one, so that the part of the table that searches read stays short. FREE is 0, the lowest state.
        row = int(np.argmin(states)) if len(states) else 0
        # No row below the end word is free: the table grows by one, and the caller stores the new end.
        if not len(states) or states[row]:
            row = len(states)
        if row == table.capacity:
            raise TableFullError(
                f"the {table.name} table is full: all {table.capacity} rows are in use; "
                f"create the namespace with a larger Capacities.{table.name}",
                table=table.name,
                capacity=table.capacity,
                setting=f"Capacities.{table.name}",
            )
        return row

    def used_members(self) -> list[int]:
        """Return the slots in use."""
        return self.used_rows(self._members)

    def measures_of_workers(self) -> dict[int, int]:
        """Return how much each worker can measure (`Measures`), by slot, lowest first."""
        words, members = self.segment.words, self._members
        first = members.base + Member.MEASURES
        workers = self.rows_where(members, Member.STATE, Member.WORKER)
        return {slot: words[first + slot * members.words] for slot in workers}

    def free_members(self) -> Iterator[int]:
        """Return the free slots, lowest first."""
        states = self.view(self._members)[:, 0]
        # All of them, because another process may still hold a free row's lock file.
        return itertools.chain(np.flatnonzero(states == 0).tolist(), range(len(states), self._members.capacity))

    def member_in_use(self, slot: int) -> bool:
        """Tell whether a slot is in use."""
        return bool(self.segment.words[self.member(slot)])

    def rows_where(self, table: Table, field: int, value: int) -> list[int]:
        """Return the used rows of a table in which a field has a value."""
        column = self._short_column(table, field)
        if column is not None:
            words, base = self.segment.words, table.base
            # The state last, and only for rows that match, which usually are few.
            return [row for row, found in enumerate(column) if found == value and words[base + row * table.words]]
        # The state, too, because free rows keep their last values.
        rows = self.view(table)
        found: list[int] = np.flatnonzero((rows[:, field] == value) & (rows[:, 0] != 0)).tolist()
        return found

    def _short_column(self, table: Table, field: int) -> list[int] | None:
        """Return a field of all rows that may be in use, if they are few; None if NumPy is faster.

        For 16 rows this takes 0.7 us instead of NumPy's 3.3, and 10 us less with cold caches, as in a process that has
        just been woken.
        """
        # A strided slice copies one word of each row in a single step.
        count = self.segment.words[table.end_word] if table.end_word else table.capacity
        if count > FEW_ROWS:
            return None
        first = table.base + field
        column: list[int] = self.segment.words[first : first + count * table.words : table.words].tolist()
        return column
