"""Loads: from a reservation to an instance that its loader holds, or to nothing."""

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

        devices: bits; where there are several, each takes an equal share.
        ticket: number plus one of the one that waited for it, for the event.
        """
        row = self._instances.new_row(t, model, member, devices)
        at = self._tables.instance(row)
        # For people, and for the figure that `end` corrects; while it is LOADING, admission counts RESERVED_MB.
        self._instances.set_mb(t, row, need_mb)
        t.set_float(at + Instance.RESERVED_MB, need_mb)
        self._instances.change_state(t, row, Instance.LOADING)
        # So that the row of a model that is being loaded for the first time is not the oldest unused one.
        t.set(self._tables.model(model) + Model.USED_AT, t.now)
        if alone:
            self._isolation.begin(t, row)
        t.event(placed(EventKind.LOAD_BEGAN, devices), model + 1, row + 1, ticket, need_mb, cause)
        return row

    def link_server(self, t: Transaction, row: int, slot: int) -> None:
        """Tie a loading instance to the model server (member slot) that is going to keep its memory."""
        # Both ways: the server's death frees the instance, and what is measured of the server is the instance's.
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
        """A load is done, its loader holds the instance. Return whether it is a twin, so that its memory is another's.

        handle: empty for an object, which belongs to the loader from now on.
        mb: what the instance takes as far as known. shares_mb: of each device, where it spans several; empty: all the
            same.
        server: reference to the member that keeps the memory, or 0.
        """
        at = self._tables.instance(row)
        words = self._segment.words
        model = words[at + Instance.MODEL]
        began = words[at + Instance.SINCE]
        is_twin = bool(handle) and bool(self._twins.of(handle, row))
        if is_twin:
            # The other one has it in its row. Counted twice, it would take up room that is free. (I7)
            mb, shares_mb = 0.0, ()
        # This ends what it had STEADY, too, and sets SINCE, from which the hold is measured.
        self._instances.change_state(t, row, Instance.ACTIVE)
        now = words[at + Instance.SINCE]
        t.set(at + Instance.LOADED_AT, now)
        t.set(at + Instance.USES, 1)
        t.set(at + Instance.SERVER, server)
        t.set(at + Instance.HAS_SERVER, int(has_server))
        self._instances.set_mb(t, row, mb, shares_mb)
        # Its memory is MB from here on; the same transaction takes both, so it is never counted twice or not at all.
        t.set_float(at + Instance.RESERVED_MB, 0.0)
        if handle:
            t.set_text(at + Instance.HANDLE, handle)
        else:
            # An object exists in its loader's memory alone, so from here on nobody else is given it. (M2)
            t.set(at + Instance.OWNER, words[at + Instance.HOLDER])
        t.add(Header.LOADS, 1)
        row_of_model = self._tables.model(model)
        t.add(row_of_model + Model.LOADS, 1)
        # What the last loader returned is what the next one is expected to: by this the policy plans copies.
        t.set(row_of_model + Model.SHARES, int(bool(handle)))
        self._models.forget_failures(t, model)
        t.set(row_of_model + Model.LOAD_S, self._smoothed(row_of_model + Model.LOAD_S, (now - began) / 1e9))
        self._isolation.note_change(t, row)
        t.event(EventKind.LOAD_ENDED, model + 1, row + 1, value=(now - began) / 1e9)
        self._seats.add(t, row)
        return is_twin

    def fail(self, t: Transaction, row: int) -> None:
        """A load came to nothing that has taken no memory, or whose memory is expected back: free the row."""
        # Before the row is free, which sets SINCE anew.
        t.event(EventKind.LOAD_FAILED, self._model_reference(row), row + 1, value=self._for_s(t, row))
        t.add(Header.FAILED_LOADS, 1)
        self._instances.free_row(t, row)

    def give_up(self, t: Transaction, row: int) -> None:
        """End a load that takes too long; this member unloads the server that it may have started."""
        # It leaves the row free if no server was started, else UNLOADING, with the stuck loader as HOLDER.
        self.abandon(t, row)
        at = self._tables.instance(row)
        if self._segment.words[at + Instance.STATE] == Instance.UNLOADING:
            t.set(at + Instance.HOLDER, self._actor.slot + 1)
            self._ring(t, self._actor.slot)

    def abandon(self, t: Transaction, row: int) -> None:
        """Another member than its loader gives up a load. A model server that the load has started is to be unloaded.

        Its HOLDER is still the loader then; the caller names one that lives.
        """
        at = self._tables.instance(row)
        server = self._segment.words[at + Instance.SERVER]
        if not server:
            # What it has loaded goes with what is left of it, an exception or a server that is dying: soon, but not at
            # once, and it may have been all that was reserved.
            self._ledgers.expect_back(t, row)
            self.fail(t, row)
            return
        t.add(Header.FAILED_LOADS, 1)
        t.event(EventKind.LOAD_FAILED, self._model_reference(row), row + 1, value=self._for_s(t, row))
        # UNLOADING it may not run alone any more (D3), and others may wait for its devices.
        self._isolation.end(t, row)
        # The loader would have written the handle at the end. Without it nobody could reach the server to end it.
        t.set_text(at + Instance.HANDLE, self._tables.text(self._tables.member(server - 1) + Member.NAME))
        t.set_float(at + Instance.RESERVED_MB, 0.0)
        self._instances.change_state(t, row, Instance.UNLOADING)
