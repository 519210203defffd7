"""Twins: instances that stand for one handle, and for one memory, because their loaders have returned the same."""

from __future__ import annotations

import numpy as np

from mpmm.shared_state.layout import Header, Instance, Member, Model
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.isolation import Isolation
from mpmm.shared_state.transitions.part import Actor, Part
from mpmm.shared_state.transitions.seats import Seats

__all__ = ["Twins"]


class Twins(Part):
    """The transitions of twins, and how they are found."""

    def __init__(self, tables: Tables, actor: Actor, isolation: Isolation, instances: Instances, seats: Seats) -> None:
        super().__init__(tables, actor)
        self._isolation = isolation
        self._instances = instances
        self._seats = seats

    def of(self, handle: bytes, row: int) -> list[int]:
        """Return the other instances, in use or idle, that stand for the same handle as a row does, or is to."""
        words, tables = self._segment.words, self._tables
        rows = tables.view(self._layout.instances)
        # Handles are mostly as long as one another, and differ at their end: with a thousand of them, 10 us.
        last = -(-len(handle) // 8)
        last_word = int.from_bytes(handle[8 * (last - 1) :], "little")
        alike = (rows[:, Instance.HANDLE] == len(handle)) & (rows[:, Instance.HANDLE + last] == np.uint64(last_word))
        # A seat is no twin: it goes with its copy, and what is in use of that keeps the memory.
        alike &= rows[:, Instance.SEAT_OF] == 0
        return [
            other
            for other in np.flatnonzero(alike).tolist()
            if other != row
            and words[tables.instance(other)] in (Instance.ACTIVE, Instance.IDLE)
            # What that stood for is gone: a new server of the same name is another copy's.
            and words[tables.instance(other) + Instance.UNLOAD_ON_RELEASE] != Instance.LOST
            and tables.text(tables.instance(other) + Instance.HANDLE) == handle
        ]

    def any_of(self, row: int) -> bool:
        """Tell whether others stand for the same handle as a row does; for its holder without the lock."""
        handle = self._tables.text(self._tables.instance(row) + Instance.HANDLE)
        return bool(handle) and bool(self.of(handle, row))

    def any_of_all(self) -> set[int]:
        """Return the instances, in use or idle, for which `any_of` is true.

        With a thousand instances it takes 0.1 ms, where a call for each takes 10.
        """
        tables = self._tables
        rows = tables.view(self._layout.instances)
        state, lengths = rows[:, Instance.STATE], rows[:, Instance.HANDLE].astype(np.intp)
        there = ((state == Instance.ACTIVE) | (state == Instance.IDLE)) & (lengths > 0)
        # As in `of`.
        there &= (rows[:, Instance.SEAT_OF] == 0) & (rows[:, Instance.UNLOAD_ON_RELEASE] != Instance.LOST)
        chosen = np.flatnonzero(there)
        if len(chosen) < 2:
            return set()
        ends = rows[chosen, Instance.HANDLE + (lengths[chosen] + 7) // 8]
        order = np.lexsort((ends, lengths[chosen]))
        same = (np.diff(ends[order]) == 0) & (np.diff(lengths[chosen][order]) == 0)
        alike = np.append(same, False) | np.append(False, same)
        return {row for row in chosen[order[alike]].tolist() if self.any_of(row)}

    def unloads_handle(self, row: int) -> bool:
        """Tell whether the unload of this row is the one that unloads its handle: no twin is left.

        Of twins that are unloaded at the same time it is the last one in the table. Where it is not this one, the row
        has to be freed in the transaction that has asked: what another one is told goes by the rows as they are then.
        """
        handle = self._tables.text(self._tables.instance(row) + Instance.HANDLE)
        return bool(handle) and not self.of(handle, row) and self._unloaded_after(row, handle) is None

    def _unloaded_after(self, row: int, handle: bytes) -> int | None:
        """Return a twin in mid-unload whose unload comes after that of a row, None if there is none."""
        words, tables = self._segment.words, self._tables
        for other in tables.rows_where(self._layout.instances, Instance.STATE, Instance.UNLOADING):
            at = tables.instance(other)
            # One whose seats are in use is unloaded after them, and so the last.
            is_later = other != row and (other > row or words[at + Instance.SEATS])
            # What has lost its server does not end that of its successor, see `of`.
            is_later = is_later and words[at + Instance.UNLOAD_ON_RELEASE] != Instance.LOST
            if is_later and tables.text(at + Instance.HANDLE) == handle:
                return other
        return None

    def leave_to_last(self, t: Transaction, row: int) -> None:
        """Before a row in mid-unload is freed, leave its memory to the twin whose unload ends the server, if any."""
        words, at = self._segment.words, self._tables.instance(row)
        handle = self._tables.text(at + Instance.HANDLE)
        last = self._unloaded_after(row, handle) if handle and self._segment.floats[at + Instance.MB] else None
        # As in `part`: its seats may be in use.
        if last is not None and not words[Header.ISOLATED] & words[at + Instance.DEVICES]:
            self._leave_memory(t, row, last)

    def part(self, t: Transaction, row: int, twins: list[int], evicted: bool) -> list[int]:
        """Before an instance with twins is unloaded, settle which of these go with it, and which one has the memory.

        When it is evicted, those that are idle and not pinned go, since only the last one's unload frees anything;
        memory that is to stay is moved to a twin that stays. Return the twins that go, lowest row first.
        """
        words, floats, tables = self._segment.words, self._segment.floats, self._tables
        stays = [
            twin
            for twin in twins
            if tables.is_in_use(twin)
            or not evicted
            or words[tables.model(words[tables.instance(twin) + Instance.MODEL]) + Model.PINS]
        ]
        # In the order of rows, by which `unloads_handle` decides which of them is the last.
        going = sorted({row, *twins} - set(stays))
        # One of the rows has the memory, or none if it is not known yet. (I7)
        bears = next((one for one in (row, *twins) if floats[tables.instance(one) + Instance.MB]), row)
        successor = stays[0] if stays else going[-1]
        # Where another instance runs alone, none that is in use may come to lie.
        isolated = words[Header.ISOLATED] & words[tables.instance(bears) + Instance.DEVICES]
        if bears in going and bears != successor and not isolated:
            self._leave_memory(t, bears, successor)
        return [twin for twin in going if twin != row]

    def _leave_memory(self, t: Transaction, row: int, to: int) -> None:
        """Let a twin that stays stand for the memory of one that goes, and for its server."""
        # Before its DEVICES change, by which the devices' rows are found that name it. (D3)
        self._isolation.end(t, to)
        words, floats = self._segment.words, self._segment.floats
        at, successor = self._tables.instance(row), self._tables.instance(to)
        # The devices first: how the memory is shared out goes by how many there are.
        t.set(successor + Instance.DEVICES, words[at + Instance.DEVICES])
        self._seats.move(t, to)
        self._instances.set_mb(t, to, floats[at + Instance.MB], [mb for _, mb in self._tables.shares_of(row)])
        t.set(successor + Instance.LOADED_AT, words[at + Instance.LOADED_AT])
        server = words[at + Instance.SERVER]
        if server:
            # Both ways: a server's death frees the instance that names it, and its figure is that instance's MB.
            t.set(successor + Instance.SERVER, server)
            t.set(self._tables.member(server - 1) + Member.INSTANCE, to + 1)
            t.set(at + Instance.SERVER, 0)
        # Only one of them may have it (I7), and this row is about to go: what it had by then would be awaited as coming
        # back.
        self._instances.set_mb(t, row, 0.0)
