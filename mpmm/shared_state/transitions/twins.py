"""Twins: instances that share one handle, and its memory, because their loaders have returned the same handle."""

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
        """Return the instances other than `row`, in use or idle, that have this handle."""
        words, tables = self._segment.words, self._tables
        rows = tables.view(self._layout.instances)
        # Most handles have the same length, and differ at the end: with a thousand of them, this takes 10 us.
        last = -(-len(handle) // 8)
        last_word = int.from_bytes(handle[8 * (last - 1) :], "little")
        alike = (rows[:, Instance.HANDLE] == len(handle)) & (rows[:, Instance.HANDLE + last] == np.uint64(last_word))
        # A seat is no twin: it depends on its copy, which keeps the memory while a seat is in use.
        alike &= rows[:, Instance.SEAT_OF] == 0
        return [
            other
            for other in np.flatnonzero(alike).tolist()
            if other != row
            and words[tables.instance(other)] in (Instance.ACTIVE, Instance.IDLE)
            # The memory of a LOST one is gone: a new server of the same name belongs to another copy.
            and words[tables.instance(other) + Instance.UNLOAD_ON_RELEASE] != Instance.LOST
            and tables.text(tables.instance(other) + Instance.HANDLE) == handle
        ]

    def any_of(self, row: int) -> bool:
        """Tell whether an instance has twins; for its holder without the lock."""
        handle = self._tables.text(self._tables.instance(row) + Instance.HANDLE)
        return bool(handle) and bool(self.of(handle, row))

    def any_of_all(self) -> set[int]:
        """Return the instances, in use or idle, for which `any_of` is true.

        With a thousand instances this takes 0.1 ms, a call for each would take 10.
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
        """Tell whether the unload of this row must unload its handle, because no twin is left.

        Of twins that are unloaded at the same time, the last one in the table does that. If this returns False, the
        caller must free the row in the same transaction, because the answers for its twins depend on the rows in use.
        """
        handle = self._tables.text(self._tables.instance(row) + Instance.HANDLE)
        return bool(handle) and not self.of(handle, row) and self._unloaded_after(row, handle) is None

    def _unloaded_after(self, row: int, handle: bytes) -> int | None:
        """Return a twin in mid-unload that is unloaded after this row, None if there is none."""
        words, tables = self._segment.words, self._tables
        for other in tables.rows_where(self._layout.instances, Instance.STATE, Instance.UNLOADING):
            at = tables.instance(other)
            # A twin whose seats are in use is unloaded after those, and so last.
            is_later = other != row and (other > row or words[at + Instance.SEATS])
            # One that has lost its server does not end a new server of the same name, see `of`.
            is_later = is_later and words[at + Instance.UNLOAD_ON_RELEASE] != Instance.LOST
            if is_later and tables.text(at + Instance.HANDLE) == handle:
                return other
        return None

    def leave_to_last(self, t: Transaction, row: int) -> None:
        """Before a row in mid-unload is freed, pass its memory on to the twin whose unload ends the server, if any."""
        words, at = self._segment.words, self._tables.instance(row)
        handle = self._tables.text(at + Instance.HANDLE)
        last = self._unloaded_after(row, handle) if handle and self._segment.floats[at + Instance.MB] else None
        # Not where another instance runs alone, as in `part`, because the twin's seats may be in use.
        if last is not None and not words[Header.ISOLATED] & words[at + Instance.DEVICES]:
            self._leave_memory(t, row, last)

    def part(self, t: Transaction, row: int, twins: list[int], evicted: bool) -> list[int]:
        """Before an instance with twins is unloaded, choose the twins to unload with it, and pass its memory on.

        When it is evicted, twins that are idle and not pinned are unloaded, too, because only the last one's unload
        frees memory; the memory is passed on to a twin that stays, or to the last one. Return the twins to unload,
        lowest row first.
        """
        words, floats, tables = self._segment.words, self._segment.floats, self._tables
        stays = [
            twin
            for twin in twins
            if tables.is_in_use(twin)
            or not evicted
            or words[tables.model(words[tables.instance(twin) + Instance.MODEL]) + Model.PINS]
        ]
        # In row order, by which `unloads_handle` decides which of them is the last.
        going = sorted({row, *twins} - set(stays))
        # One of the rows has the memory, or none if that is not known yet. (I7)
        bears = next((one for one in (row, *twins) if floats[tables.instance(one) + Instance.MB]), row)
        successor = stays[0] if stays else going[-1]
        # An instance in use must not move to a device where another one runs alone.
        isolated = words[Header.ISOLATED] & words[tables.instance(bears) + Instance.DEVICES]
        if bears in going and bears != successor and not isolated:
            self._leave_memory(t, bears, successor)
        return [twin for twin in going if twin != row]

    def _leave_memory(self, t: Transaction, row: int, to: int) -> None:
        """Move the memory of a twin that is unloaded, and its server, to another one."""
        # Before its DEVICES change, because they tell which device rows refer to it. (D3)
        self._isolation.end(t, to)
        words, floats = self._segment.words, self._segment.floats
        at, successor = self._tables.instance(row), self._tables.instance(to)
        # The devices first, because their number decides how the memory is split.
        t.set(successor + Instance.DEVICES, words[at + Instance.DEVICES])
        self._seats.move(t, to)
        self._instances.set_mb(t, to, floats[at + Instance.MB], [mb for _, mb in self._tables.shares_of(row)])
        t.set(successor + Instance.LOADED_AT, words[at + Instance.LOADED_AT])
        server = words[at + Instance.SERVER]
        if server:
            # Both ways: a server's death frees the instance that refers to it, and its figure becomes that one's MB.
            t.set(successor + Instance.SERVER, server)
            t.set(self._tables.member(server - 1) + Member.INSTANCE, to + 1)
            t.set(at + Instance.SERVER, 0)
        # Only one of them may have it (I7), and when this row is freed, its MB would be expected back.
        self._instances.set_mb(t, row, 0.0)
