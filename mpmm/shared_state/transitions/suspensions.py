"""Suspends instances to the host's memory, and resumes them.

                                    IDLE ──begin──> SUSPENDING ──end──> SUSPENDED ──begin_resume──> RESUMING
                                                     │      ^                │  ^                    │  │  │
                                                    fail    └───────────── turn_back ────────────────┘  │  │
                                                     v                       v  └─────── cancel ────────┘  │
    free <──────── end_unload ──────────────────── UNLOADING <───── drop ────┘                             │
                                                     ^──────────────────── fail ───────────────────────────┤
    ACTIVE <───────────────────────────────────────── end_resume ──────────────────────────────────────────┘

A SUSPENDING copy still has its memory on the device, and the host memory that it is going to take already counts in the
host's ledger. When it is SUSPENDED, its device memory is awaited until a figure shows that it is free, as after an
unload; what its server is measured to keep there becomes its MB. A RESUMING copy is accounted for like a load: it has
reserved what it had.

If a HOLDER dies, the operation is lost, not the copy: a successor suspends the copy, whatever state it is in. Both ways
of suspending (`mpmm.suspend`) may be asked to do what is already done.
"""

from __future__ import annotations

from functools import partial

from mpmm.policy.suspension import Unsuspendable, Way
from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause, EventKind, placed
from mpmm.shared_state.layout import Header, Instance, Member, Model
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.instances import Instances
from mpmm.shared_state.transitions.isolation import Isolation
from mpmm.shared_state.transitions.ledgers import Ledgers
from mpmm.shared_state.transitions.part import Actor, Part
from mpmm.shared_state.transitions.seats import Seats
from mpmm.text.printable import printable_logger

__all__ = ["Suspensions"]

_LOG = printable_logger("mpmm")


class Suspensions(Part):
    """The transitions of instances that are suspended and resumed."""

    def __init__(
        self,
        tables: Tables,
        actor: Actor,
        ledgers: Ledgers,
        isolation: Isolation,
        instances: Instances,
        seats: Seats,
    ) -> None:
        super().__init__(tables, actor)
        self._ledgers = ledgers
        self._isolation = isolation
        self._instances = instances
        self._seats = seats

    def note_way(self, t: Transaction, row: int, way: int) -> None:
        """Record how a copy that has just been loaded can be suspended."""
        t.set(self._tables.instance(row) + Instance.WAY, way)

    def end_checkpoints(self, t: Transaction, server: int) -> None:
        """Record that the driver cannot suspend the copy of a server (slot), because other processes have its memory.

        The driver's checkpoint moves the memory of one process. A copy that is suspended, or about to be, or resumed,
        stays as it is.
        """
        words = self._segment.words
        row = words[self._tables.member(server) + Member.INSTANCE]
        at = self._tables.instance(row - 1) if row else 0
        serves = row and words[at + Instance.SERVER] == server + 1
        if serves and words[at] in (Instance.ACTIVE, Instance.IDLE) and words[at + Instance.WAY] == Way.CHECKPOINT:
            t.set(at + Instance.WAY, Way.NONE)

    def expect(self, t: Transaction, model: int, suspend_s: float, resume_s: float) -> None:
        """Record how long a model (row) took to suspend and to resume in an earlier run, 0 unknown."""
        at = self._tables.model(model)
        for word, seconds in ((at + Model.SUSPEND_S, suspend_s), (at + Model.RESUME_S, resume_s)):
            if seconds and self._segment.floats[word] != seconds:
                t.set_float(word, seconds)

    def begin(self, t: Transaction, row: int, suspender: int, evicted: bool, cause: Cause | None = None) -> None:
        """Take an idle copy without twins out of use; its owner, or else a member (slot), suspends it.

        None of its seats may be in use; they are freed, and made again when it is resumed.
        """
        at, words, floats = self._tables.instance(row), self._segment.words, self._segment.floats
        if words[at] != Instance.IDLE or not words[at + Instance.WAY] or self._tables.is_in_use(row):
            raise self._tables.surprise("the copy", at)
        self._seats.close(t, row)
        owner, mb = words[at + Instance.OWNER], floats[at + Instance.MB]
        # Before the state changes, because only IDLE rows may be in the idle list. (M2)
        if not owner:
            t.set_all(self._instances.unlinked(at))
        self._instances.change_state(t, row, Instance.SUSPENDING)
        t.set(at + Instance.HOLDER, owner or suspender + 1)
        # What its resume has to reserve, because MB becomes 0; and what it is about to take of the host, counted from
        # now on, so that two suspensions do not count on the same host memory.
        t.set_float(at + Instance.DEVICE_MB, mb)
        t.set_float(at + Instance.HOST_MB, mb)
        if evicted:
            t.add(Header.EVICTIONS, 1)
            t.add(self._model(row) + Model.EVICTIONS, 1)
        t.event(EventKind.SUSPEND_BEGAN, self._model_reference(row), row + 1, value=mb, cause=cause)
        self._ring(t, words[at + Instance.HOLDER] - 1)

    def end(self, t: Transaction, row: int) -> None:
        """End a suspension: the copy's memory is in the host, and its device memory is expected back."""
        at, words = self._tables.instance(row), self._segment.words
        if words[at] != Instance.SUSPENDING:
            raise self._tables.surprise("the copy", at)
        model, taken_s = self._model(row), self._for_s(t, row)
        # Before MB, which is expected back, is set to 0.
        self._ledgers.expect_back(t, row)
        self._instances.set_mb(t, row, 0.0)
        t.set(at + Instance.HOLDER, 0)
        self._instances.change_state(t, row, Instance.SUSPENDED)
        self._isolation.note_change(t, row)
        t.add(Header.SUSPENDS, 1)
        t.add(model + Model.SUSPENDS, 1)
        t.set(model + Model.SUSPEND_S, self._smoothed(model + Model.SUSPEND_S, taken_s))
        t.event(EventKind.SUSPEND_ENDED, self._model_reference(row), row + 1, value=taken_s)
        self._drop_if_asked(t, row)

    def begin_resume(self, t: Transaction, row: int, member: int, cause: Cause | None = None, ticket: int = 0) -> None:
        """Reserve what a suspended copy had on its device; a member (slot) resumes it.

        ticket: number plus one of the ticket that waited for it, for the event.
        """
        at, floats = self._tables.instance(row), self._segment.floats
        if self._segment.words[at] != Instance.SUSPENDED:
            raise self._tables.surprise("the copy", at)
        mb = floats[at + Instance.DEVICE_MB]
        self._instances.change_state(t, row, Instance.RESUMING)
        t.set(at + Instance.HOLDER, member + 1)
        # As for a load, admission counts the reservation, because no figure shows yet what the resume will take.
        self._instances.set_mb(t, row, mb)
        t.set_float(at + Instance.RESERVED_MB, mb)
        # So that a model that is about to be used does not count as the longest unused one.
        t.set(self._model(row) + Model.USED_AT, t.now)
        kind = placed(EventKind.RESUME_BEGAN, self._segment.words[at + Instance.DEVICES])
        t.event(kind, self._model_reference(row), row + 1, ticket, mb, cause)

    def end_resume(self, t: Transaction, row: int) -> None:
        """End a resume: the copy is on its device again, and its HOLDER has it."""
        at, words = self._tables.instance(row), self._segment.words
        if words[at] != Instance.RESUMING:
            raise self._tables.surprise("the copy", at)
        model, taken_s = self._model(row), self._for_s(t, row)
        # All three words, because they are 0 in ACTIVE rows. (I3, I8)
        self._leave_host(t, row)
        self._instances.change_state(t, row, Instance.ACTIVE)
        # Earlier figures do not show the copy.
        t.set(at + Instance.LOADED_AT, t.now)
        t.set(at + Instance.USES, words[at + Instance.USES] + 1)
        self._isolation.note_change(t, row)
        t.add(Header.RESUMES, 1)
        t.add(model + Model.RESUMES, 1)
        t.set(model + Model.RESUME_S, self._smoothed(model + Model.RESUME_S, taken_s))
        t.event(EventKind.RESUME_ENDED, self._model_reference(row), row + 1, value=taken_s)
        self._seats.add(t, row)

    def cancel(self, t: Transaction, row: int) -> None:
        """Take back a resume that was allowed but has not begun."""
        at = self._tables.instance(row)
        if self._segment.words[at] != Instance.RESUMING:
            raise self._tables.surprise("the copy", at)
        t.event(EventKind.RESUME_GIVEN_UP, self._model_reference(row), row + 1, value=self._for_s(t, row))
        # The device was not touched, so nothing of the reservation is expected back.
        t.set_float(at + Instance.RESERVED_MB, 0.0)
        self._instances.set_mb(t, row, 0.0)
        t.set(at + Instance.HOLDER, 0)
        self._instances.change_state(t, row, Instance.SUSPENDED)
        self._drop_if_asked(t, row)

    def turn_back(self, t: Transaction, row: int, suspender: int) -> None:
        """Turn a resume that its HOLDER cannot finish back: a member (reference) suspends the copy again."""
        at = self._tables.instance(row)
        if self._segment.words[at] != Instance.RESUMING:
            raise self._tables.surprise("the copy", at)
        t.event(EventKind.RESUME_GIVEN_UP, self._model_reference(row), row + 1, value=self._for_s(t, row))
        # MB stays: part of the copy may be on the device by now, and the suspension gives that back.
        t.set_float(at + Instance.RESERVED_MB, 0.0)
        self._instances.change_state(t, row, Instance.SUSPENDING)
        t.set(at + Instance.HOLDER, self._segment.words[at + Instance.OWNER] or suspender)
        self._ring(t, self._segment.words[at + Instance.HOLDER] - 1)

    def hand_over(self, t: Transaction, row: int, suspender: int) -> None:
        """Have another member (slot) suspend a copy, because its HOLDER is dead."""
        at = self._tables.instance(row)
        if self._segment.words[at] != Instance.SUSPENDING or self._segment.words[at + Instance.OWNER]:
            raise self._tables.surprise("the copy", at)
        t.set(at + Instance.HOLDER, suspender + 1)
        # The new HOLDER's time begins now.
        t.set(at + Instance.SINCE, t.now)
        self._ring(t, suspender)

    def fail(self, t: Transaction, row: int, why: Unsuspendable | None, unloader: int = 0) -> None:
        """Have a copy unloaded whose suspension or resume failed, because its contents are uncertain.

        why: why the model's copies are not suspended from now on; None: they may be, because the copy is not at fault.
        unloader: reference to the member that unloads it, 0 for its HOLDER.
        """
        at, words = self._tables.instance(row), self._segment.words
        state = words[at]
        if state not in (Instance.SUSPENDING, Instance.RESUMING):
            raise self._tables.surprise("the copy", at)
        # By the state before it becomes UNLOADING.
        kind = EventKind.SUSPEND_FAILED if state == Instance.SUSPENDING else EventKind.RESUME_FAILED
        t.event(kind, self._model_reference(row), row + 1, value=self._for_s(t, row))
        t.add(Header.SUSPEND_FAILURES, 1)
        # The process that was to resume it may be stopped, and not have read that yet. (T2)
        self._instances.requeue_waiters(t, row)
        # HOST_MB stays until the row is free, because the host gets its memory back only when the process ends. (I8)
        t.set_float(at + Instance.DEVICE_MB, 0.0)
        t.set_float(at + Instance.RESERVED_MB, 0.0)
        self._instances.change_state(t, row, Instance.UNLOADING)
        t.set(at + Instance.HOLDER, words[at + Instance.OWNER] or unloader or words[at + Instance.HOLDER])
        if why is not None:
            t.set(self._model(row) + Model.UNSUSPENDABLE, why)
            shown = self._tables.shown(words[at + Instance.MODEL])
            # Read now, because after the transaction the row may be another tag's.
            reason = why.name.lower().replace("_", " ")
            t.after.append(partial(_LOG.warning, "mpmm: %s is not suspended any more: %s", shown, reason))
        self._ring(t, words[at + Instance.HOLDER] - 1)

    def drop(self, t: Transaction, row: int, unloader: int, cause: Cause | None = None) -> None:
        """Have a suspended copy unloaded by its owner, or else by a member (slot)."""
        at, words = self._tables.instance(row), self._segment.words
        if words[at] != Instance.SUSPENDED:
            raise self._tables.surprise("the copy", at)
        # It will not be resumed, so its resume has nothing to reserve.
        t.set_float(at + Instance.DEVICE_MB, 0.0)
        self._instances.change_state(t, row, Instance.UNLOADING)
        t.set(at + Instance.HOLDER, words[at + Instance.OWNER] or unloader + 1)
        mb = self._segment.floats[at + Instance.MB]
        t.event(EventKind.UNLOAD_BEGAN, self._model_reference(row), row + 1, value=mb, cause=cause)
        self._ring(t, words[at + Instance.HOLDER] - 1)

    def _drop_if_asked(self, t: Transaction, row: int) -> None:
        if not self._segment.words[self._tables.instance(row) + Instance.UNLOAD_ON_RELEASE]:
            return
        unloader = self._actor.slot
        if unloader < 0:
            # This process is a newcomer that reaps, without a row of its own yet. If the chosen worker is dead, too,
            # its own reaping finds a successor.
            unloader = next(iter(self._tables.rows_where(self._layout.members, Member.STATE, Member.WORKER)), -1)
        if unloader < 0:
            # No member is left to unload it. Its memory is freed when the last process ends.
            self._instances.free_row(t, row)
        else:
            self.drop(t, row, unloader, Cause(Reason.ASKED))

    def _leave_host(self, t: Transaction, row: int) -> None:
        at = self._tables.instance(row)
        for word in (Instance.RESERVED_MB, Instance.DEVICE_MB, Instance.HOST_MB):
            t.set_float(at + word, 0.0)

    def _model(self, row: int) -> int:
        """Return the first word of an instance's model row."""
        return self._tables.model(self._segment.words[self._tables.instance(row) + Instance.MODEL])
