"""Reads about instances: which copy is idle, which member holds it, and all rows in use for a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpmm.shared_state.layout import Instance, Model
from mpmm.shared_state.tables import Tables

__all__ = ["HeldCopy", "InstanceReads", "UsedInstance"]

# States of instances that a member will release.
_RELEASED = (Instance.ACTIVE, Instance.LOADING, Instance.RESUMING)


@dataclass(slots=True)
class HeldCopy:
    """What a release needs to know of a copy.

    devices: bits. owner: reference to the only member that can use it, or 0.
    """

    model: int
    owner: int
    devices: int
    unload_on_release: int


@dataclass(slots=True)
class UsedInstance:
    """A row in use, as a plan sees it.

    holder, owner: references to members. device: one of its devices, of which it takes `mb`; other_shares: the others,
    with the MB that it takes of each. since_ns: when its state changed last. to_go: it is in use, or about to be, and
    will be unloaded when it is released. seat_of: of a seat, the row of its copy; seats: how many this copy has.
    """

    row: int
    state: int
    model: int
    pinned: bool
    holder: int
    owner: int
    has_server: bool
    device_bits: int
    device: int
    mb: float
    other_shares: tuple[tuple[int, float], ...]
    reserved_mb: float
    since_ns: int
    to_go: bool
    unload_late: bool
    steady: bool
    seat_of: int | None
    seats: int


class InstanceReads:
    """Reads about instances (rows). Methods need the lock, unless they say otherwise."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._words = tables.segment.words
        self._floats = tables.segment.floats
        self._instances = tables.segment.layout.instances

    def first_idle(self, model: int, usable_on: int = 0) -> int | None:
        """Return the row of the shared copy of a model that became idle last, None if none is idle.

        usable_on: bits of the devices on which it must lie, 0 for all.
        """
        words, tables = self._words, self._tables
        # The list is of shared copies, newest first (M2), so without `usable_on` its head is the answer.
        head = words[tables.model(model) + Model.IDLE_HEAD]
        while head:
            at = tables.instance(head - 1)
            if not usable_on or not words[at + Instance.DEVICES] & ~usable_on:
                return head - 1
            head = words[at + Instance.NEXT]
        return None

    def is_idle(self, row: int, generation: int = 0, usable_on: int = 0) -> bool:
        """Tell whether a row is that of an idle copy: of this generation, unless that is 0, and only on the devices
        `usable_on` (bits), unless those are 0."""
        words, at = self._words, self._tables.instance(row)
        return (
            words[at] == Instance.IDLE
            and (not generation or words[at + Instance.GENERATION] == generation)
            and not (usable_on and words[at + Instance.DEVICES] & ~usable_on)
        )

    def is_unused(self, row: int) -> bool:
        """Tell whether a row is that of an idle copy of which no seat is in use."""
        return self.is_idle(row) and not self._tables.is_in_use(row)

    def is_suspended(self, row: int) -> bool:
        """Tell whether a row is that of a suspended copy."""
        return self._words[self._tables.instance(row)] == Instance.SUSPENDED

    def is_held(self, row: int, generation: int, member: int) -> bool:
        """Tell whether a member (reference) holds the copy of this generation."""
        words, at = self._words, self._tables.instance(row)
        return (
            words[at] == Instance.ACTIVE
            and words[at + Instance.GENERATION] == generation
            and words[at + Instance.HOLDER] == member
        )

    def is_still(self, row: int, generation: int) -> bool:
        """Tell whether a row still is that of the copy of this generation; without the lock for its holder, or a caller
        that has seen it."""
        return self._words[self._tables.instance(row) + Instance.GENERATION] == generation

    def use(self, row: int) -> tuple[int, int]:
        """Return the generation of a copy, and how often it was used, which together identify a hold; for its holder
        without the lock."""
        words, at = self._words, self._tables.instance(row)
        return words[at + Instance.GENERATION], words[at + Instance.USES]

    def held(self, row: int) -> HeldCopy:
        """Return what a release needs to know of a copy."""
        words, at = self._words, self._tables.instance(row)
        return HeldCopy(
            words[at + Instance.MODEL],
            words[at + Instance.OWNER],
            words[at + Instance.DEVICES],
            words[at + Instance.UNLOAD_ON_RELEASE],
        )

    def named_server(self, row: int) -> bool:
        """Tell whether a copy's handle named a server when it was loaded; for its holder without the lock."""
        return self._words[self._tables.instance(row) + Instance.HAS_SERVER] != 0

    def server(self, row: int) -> int | None:
        """Return the slot of a copy's server, None if unknown; for its holder without the lock."""
        # Read once: when the server dies, it becomes 0, even while a holder reads it without the lock.
        server = self._words[self._tables.instance(row) + Instance.SERVER]
        return server - 1 if server else None

    def in_use(self) -> Iterator[UsedInstance]:
        """Yield the rows in use: copies of models, and leases."""
        words, floats, tables = self._words, self._floats, self._tables
        # By words, not by `tables.instances`: each plan calls this with the lock held, and a typed row costs 2 us.
        for row in tables.used_rows(self._instances):
            at = tables.instance(row)
            # One slice for nine words: it takes half the time of single reads.
            state, model, _, holder, owner, server, bits, seat_of, seats = words[at : at + Instance.MB]
            mb = floats[at + Instance.MB]
            other_shares: tuple[tuple[int, float], ...] = ()
            device = bits.bit_length() - 1
            # More than one bit: SHARES has its MB on each device, and MB is their sum.
            if bits & (bits - 1):
                (device, mb), *others = tables.shares_of(row)
                other_shares = tuple(others)
            yield UsedInstance(
                row,
                state,
                model,
                words[tables.model(model) + Model.PINS] != 0,
                holder,
                owner,
                server != 0,
                bits,
                device,
                mb,
                other_shares,
                floats[at + Instance.RESERVED_MB],
                words[at + Instance.SINCE],
                state in _RELEASED and words[at + Instance.UNLOAD_ON_RELEASE] != 0,
                words[at + Instance.UNLOAD_LATE] != 0,
                words[at + Instance.STEADY] != 0,
                seat_of - 1 if seat_of else None,
                seats,
            )
