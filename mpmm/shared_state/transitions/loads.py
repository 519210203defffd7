"""Loads: from a reservation to an instance that its loader holds, or to a failure."""

from __future__ import annotations

from collections.abc import Sequence

from mpmm.shared_state.events import Cause, EventKind, placed
from mpmm.shared_state.layout import Header, Instance, Member, Model
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.isolation import Isolation
from mpmm.shared_state.transitions.ledgers import Ledgers
from mpmm.shared_state.transitions.models import Models
from mpmm.shared_state.transitions.part import Actor, Part
from mpmm.shared_state.transitions.seats import Seats
from mpmm.shared_state.transitions.twins import Twins

__all__ = ["Loads"]


class Loads(Part):
    """The transitions of instances that are loaded."""

    def __init__(
        self,
        tables: Tables,
        actor: Actor,
        models: Models,
        isolation: Isolation,
        instances: Instances,
        twins: Twins,
        seats: Seats,
        ledgers: Ledgers,
    ) -> None:
        super().__init__(tables, actor)
        self._models = models
        self._isolation = isolation
        self._instances = instances
        self._twins = twins
        self._seats = seats
        self._ledgers = ledgers

    def begin(
        self,
        t: Transaction,
        model: int,
        member: int,
        devices: int,
        need_mb: float,
        alone: bool,
        cause: Cause | None = None,
        ticket: int = 0,
    ) -> int:
        """Reserve memory for an instance that a member (slot) is about to load; return its row. Raises TableFullError.

        devices: bits; several devices take equal shares.
        ticket: number plus one of the ticket that waited for it, for the event.
        """
        row = self._instances.new_row(t, model, member, devices)
        at = self._tables.instance(row)
        # For display, until `end` corrects it; while it is LOADING, admission counts RESERVED_MB.
        self._instances.set_mb(t, row, need_mb)
        t.set_float(at + Instance.RESERVED_MB, need_mb)
        self._instances.change_state(t, row, Instance.LOADING)
        # So that a model that loads for the first time does not count as the longest unused one.
        t.set(self._tables.model(model) + Model.USED_AT, t.now)
        if alone:
            self._isolation.begin(t, row)
        t.event(placed(EventKind.LOAD_BEGAN, devices), model + 1, row + 1, ticket, need_mb, cause)
        return row

    def link_server(self, t: Transaction, row: int, slot: int) -> None:
        """Tie a loading instance to the model server (member slot) that will keep its memory."""
        # Both ways: the server's death frees the instance, and the server's measured memory is the instance's.
        t.set(self._tables.instance(row) + Instance.SERVER, slot + 1)
        t.set(self._tables.member(slot) + Member.INSTANCE, row + 1)

    def end(
        self,
        t: Transaction,
        row: int,
        handle: bytes,
        mb: float,
        server: int,
        has_server: bool,
        shares_mb: Sequence[float] = (),
    ) -> bool:
        """End a load: its loader holds the instance. Return whether it is a twin, so that another row has its memory.

        handle: empty for an object, which its loader owns from now on.
        mb: what the instance takes, as far as known. shares_mb: what it takes of each device, if it spans several;
            empty: equal shares.
        server: reference to the member that keeps the memory, or 0.
        """
        at = self._tables.instance(row)
        words = self._segment.words
        model = words[at + Instance.MODEL]
        began = words[at + Instance.SINCE]
        is_twin = bool(handle) and bool(self._twins.of(handle, row))
        if is_twin:
            # The other row has the memory; counted twice, it would block memory that is free. (I7)
            mb, shares_mb = 0.0, ()
        # This also ends STEADY, and sets SINCE, from which the hold is measured.
        self._instances.change_state(t, row, Instance.ACTIVE)
        now = words[at + Instance.SINCE]
        t.set(at + Instance.LOADED_AT, now)
        t.set(at + Instance.USES, 1)
        t.set(at + Instance.SERVER, server)
        t.set(at + Instance.HAS_SERVER, int(has_server))
        self._instances.set_mb(t, row, mb, shares_mb)
        # From here on MB counts; one transaction changes both, so the memory is never counted twice or not at all.
        t.set_float(at + Instance.RESERVED_MB, 0.0)
        if handle:
            t.set_text(at + Instance.HANDLE, handle)
        else:
            # An object exists only in its loader's memory, so no other member ever gets it. (M2)
            t.set(at + Instance.OWNER, words[at + Instance.HOLDER])
        t.add(Header.LOADS, 1)
        row_of_model = self._tables.model(model)
        t.add(row_of_model + Model.LOADS, 1)
        # The next loader is expected to return the same kind as this one; the policy plans copies by that.
        t.set(row_of_model + Model.SHARES, int(bool(handle)))
        self._models.forget_failures(t, model)
        t.set(row_of_model + Model.LOAD_S, self._smoothed(row_of_model + Model.LOAD_S, (now - began) / 1e9))
        self._isolation.note_change(t, row)
        t.event(EventKind.LOAD_ENDED, model + 1, row + 1, value=(now - began) / 1e9)
        self._seats.add(t, row)
        return is_twin

    def fail(self, t: Transaction, row: int) -> None:
        """Free the row of a failed load that has taken no memory, or whose memory is expected back already."""
        # Before the row is freed, which changes SINCE.
        t.event(EventKind.LOAD_FAILED, self._model_reference(row), row + 1, value=self._for_s(t, row))
        t.add(Header.FAILED_LOADS, 1)
        self._instances.free_row(t, row)

    def give_up(self, t: Transaction, row: int) -> None:
        """End a load that takes too long; this member unloads the server that the load may have started."""
        # This leaves the row free if no server was started, else UNLOADING, with the stuck loader as HOLDER.
        self.abandon(t, row)
        at = self._tables.instance(row)
        if self._segment.words[at + Instance.STATE] == Instance.UNLOADING:
            t.set(at + Instance.HOLDER, self._actor.slot + 1)
            self._ring(t, self._actor.slot)

    def abandon(self, t: Transaction, row: int) -> None:
        """Give up another member's load. A model server that the load has started has to be unloaded.

        The loader stays its HOLDER; the caller sets a living one.
        """
        at = self._tables.instance(row)
        server = self._segment.words[at + Instance.SERVER]
        if not server:
            # What it has loaded, possibly all that was reserved, is freed when the loader's remains are, an exception
            # or a dying server: soon, but not at once.
            self._ledgers.expect_back(t, row)
            self.fail(t, row)
            return
        t.add(Header.FAILED_LOADS, 1)
        t.event(EventKind.LOAD_FAILED, self._model_reference(row), row + 1, value=self._for_s(t, row))
        # An UNLOADING row must not run alone (D3), and others may wait for its devices.
        self._isolation.end(t, row)
        # The loader would have stored the handle at the end; without it no member could reach the server to end it.
        t.set_text(at + Instance.HANDLE, self._tables.text(self._tables.member(server - 1) + Member.NAME))
        t.set_float(at + Instance.RESERVED_MB, 0.0)
        self._instances.change_state(t, row, Instance.UNLOADING)
