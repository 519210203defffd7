"""Everything that can happen to the shared state, one method each.

A transition is called inside a transaction, changes rows so that the invariants of `layout.py` hold again at
the transaction's end, writes its event, and arranges the wake-ups that follow from it. It decides nothing:
callers have asked the policy. What a caller got wrong is an assertion here, because the public API has
checked it before.

    instance:   begin_load ──> LOADING ──end_load──> ACTIVE <──grab/grant── IDLE
                                  │                    └──────release──────> │
                               fail_load                               begin_unload
                                  v                                          v
                                 free <──────────end_unload───────────── UNLOADING

    lease:      begin_lease ──> LEASED ──end_lease──> free

Those of suspended copies are in `suspensions.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mpmm.display_names import display_name
from mpmm.errors import TableFullError
from mpmm.policy.fairness import rank_ns
from mpmm.policy.ledger import Entry, Figure, Ledger, Return, expire, settle
from mpmm.policy.view import Reason
from mpmm.printable import printable_logger
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.events import Cause, EventKind, placed
from mpmm.shared_state.futex import wake_all
from mpmm.shared_state.layout import (
    MOST_SPANNED,
    Device,
    Header,
    Instance,
    Member,
    Model,
    Observation,
    Pin,
    Table,
    Ticket,
    device_rows,
)
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.suspensions import Suspensions
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction, float_bits

if TYPE_CHECKING:
    from mpmm.shared_state.namespace import Namespace

__all__ = ["ESTIMATE_TOLERANCE", "SMOOTHING", "Transitions"]

_LOG = printable_logger("mpmm")

# A measured footprint that differs by less than this from the estimate changes nothing.
ESTIMATE_TOLERANCE = 0.01
# Weight of the newest load or hold in the mean: the last ten count.
SMOOTHING = 0.1

# Counters of the model row that go with an instance's state.
_MODEL_COUNTERS = {
    Instance.LOADING: (Model.LOADING,),
    Instance.ACTIVE: (Model.LOADED, Model.ACTIVE),
    Instance.IDLE: (Model.LOADED, Model.IDLE),
    Instance.UNLOADING: (Model.UNLOADING,),
    Instance.SUSPENDING: (Model.SUSPENDED,),
    Instance.SUSPENDED: (Model.SUSPENDED,),
    Instance.RESUMING: (Model.LOADING,),
}
_HEADER_COUNTERS = {
    Instance.LOADING: Header.LOADING,
    Instance.RESUMING: Header.LOADING,
    Instance.ACTIVE: Header.ACTIVE,
}
# A copy in one of these goes with its server at once: nobody uses it, and what is done with it has come to its end.
_GO_WITH_SERVER = (Instance.IDLE, Instance.SUSPENDING, Instance.SUSPENDED, Instance.RESUMING)


class Transitions:
    """The transitions of one namespace, done by one of its members. Every method needs the lock."""

    def __init__(self, tables: Tables, namespace: Namespace) -> None:
        self.tables = tables
        self.segment = tables.segment
        self.layout = tables.segment.layout
        self._namespace = namespace
        self.suspensions = Suspensions(self)

    @property
    def member(self) -> int:
        """Slot of the member that makes them."""
        return self._namespace.slot

    # ---- members -------------------------------------------------------------------------------------------

    def join(self, t: Transaction, slot: int, kind: int, pid: int, started_wall_ns: int, name: bytes) -> None:
        """Fill the row of a new member, whose lock file it already holds."""
        at = self.tables.member(slot)
        self._grow(t, self.layout.members, slot)
        t.set(at + Member.PID, pid)
        t.set(at + Member.STARTED_WALL, started_wall_ns)
        t.set(at + Member.GENERATION, self._next_generation(t))
        t.set(at + Member.ATTACHED, t.now)
        t.set(at + Member.INSTANCE, 0)
        t.set(at + Member.MEASURES, 0)
        t.set_float(at + Member.MEASURED_MB, math.nan)
        t.set_float(at + Member.PEAK_MB, 0.0)
        t.set_text(at + Member.NAME, name)
        t.set(at + Member.STATE, kind)
        t.event(EventKind.JOINED, value=slot)

    def leave(self, t: Transaction, slot: int) -> bool:
        """Take back what a member that goes in good order still has, and free its row.

        Return False if the transaction has become long first: another call in a new transaction goes on.
        """
        if not self._take_back(t, slot):
            return False
        t.set(self.tables.member(slot) + Member.STATE, Member.FREE)
        t.event(EventKind.LEFT, value=slot)
        return True

    def reap_member(self, t: Transaction, slot: int) -> bool:
        """Take back all that a dead member had, and free its row; return False if there is more to do, see `leave`."""
        if self._was_ended(slot):
            # No more is to be counted than for one that leaves by itself.
            return self.leave(t, slot)
        if not self._take_back(t, slot):
            return False
        t.set(self.tables.member(slot) + Member.STATE, Member.FREE)
        t.add(Header.REAPS, 1)
        t.event(EventKind.REAPED, value=slot)
        return True

    def _was_ended(self, slot: int) -> bool:
        """Tell whether a dead member is a model server whose copy was unloaded, or is being unloaded."""
        words, tables = self.segment.words, self.tables
        served = tables.rows_where(self.layout.instances, Instance.SERVER, slot + 1)
        is_server = words[tables.member(slot) + Member.STATE] == Member.SERVER
        return is_server and all(words[tables.instance(row)] == Instance.UNLOADING for row in served)

    def lead(
        self, t: Transaction, slot: int, source: bytes, flags: tuple[bool, bool, bool], counts_named: bool = False
    ) -> None:
        """Record who polls, with what: flags are (measures processes, settles late, books only).

        counts_named: the source's figure holds nothing but the processes that it is asked about.
        """
        t.set(Header.LEADER, slot + 1)
        t.set(Header.LEADER_SINCE, t.now)
        t.set(Header.POLLED, t.now)
        t.add(Header.LEADERS, 1)
        t.set_text(Header.SOURCE_NAME, source)
        for word, flag in zip(
            (Header.SOURCE_MEASURES_PROCESSES, Header.SOURCE_SETTLES_LATE, Header.SOURCE_BOOKS_ONLY), flags, strict=True
        ):
            t.set(word, int(flag))
        t.set(Header.SOURCE_COUNTS_NAMED, int(counts_named))
        if flags[2]:
            self._go_by_the_books(t)
        t.event(EventKind.LEADER, value=slot)

    def _go_by_the_books(self, t: Transaction) -> None:
        """From now on nobody measures, so what only a sample would have settled is settled."""
        for device in self.tables.used_rows(self.layout.devices):
            if self.segment.words[self.tables.device(device) + Device.RETURN_COUNT]:
                self._write_ledger(t, device, replace(self.read_ledger(device), returns=()))

    def note_source(self, t: Transaction, slot: int, measures: int) -> None:
        """Record how much a member can measure (`Measures`), for others to know whether to leave it the lead."""
        t.set(self.tables.member(slot) + Member.MEASURES, measures)

    def note_poll(self, t: Transaction, knows_processes: bool | None = None) -> None:
        """Record that a poll is done: the leader is neither dead nor stuck.

        knows_processes: what the leader's source has shown of that; None while it has shown nothing, and from others.
        """
        t.set(Header.POLLED, t.now)
        self.note_processes(t, knows_processes)

    def note_processes(self, t: Transaction, known: bool | None) -> None:
        """Record that the source has shown what a process of ours takes (True), or that it does not tell (False).

        None changes nothing: what one process has seen holds for others that have not seen anything yet.
        """
        if known not in (None, bool(self.segment.words[Header.SOURCE_MEASURES_PROCESSES])):
            t.set(Header.SOURCE_MEASURES_PROCESSES, int(bool(known)))

    def ring(self, t: Transaction, slot: int) -> None:
        """Wake the keeper of a member: it has something to unload, or should look around."""
        self._wake(t, self.tables.member(slot) + Member.BELL)

    def set_settings(self, t: Transaction, settings: Settings) -> None:
        """Change the parameters of the namespace, and wake all workers, which follow.

        The caller sees to it that M6 holds with the new `max_model_copies`.
        """
        words = [(Header.SETTINGS + number, float_bits(value)) for number, value in enumerate(astuple(settings))]
        # The last store, so that nobody takes half of them for all.
        t.set_all([*words, (Header.SETTINGS_CHANGED, t.now)])
        t.event(EventKind.SETTINGS)
        for slot in self.tables.rows_where(self.layout.members, Member.STATE, Member.WORKER):
            self.ring(t, slot)

    def _take_back(self, t: Transaction, slot: int) -> bool:
        """Take back what a member has; return False if the transaction has become long before all of it was.

        What was taken back is not found again, so the next call goes on where this one has stopped.
        """
        words, tables = self.segment.words, self.tables
        reference = slot + 1
        if words[Header.LEADER] == reference:
            t.set(Header.LEADER, 0)
        for row in tables.rows_where(self.layout.tickets, Ticket.MEMBER, reference):
            self.leave_queue(t, row)
            if t.is_long:
                return False
        for row in tables.rows_where(self.layout.pins, Pin.MEMBER, reference):
            self.unpin(t, row)
            if t.is_long:
                return False
        for row in tables.rows_where(self.layout.instances, Instance.OWNER, reference):
            self._drop(t, row)
            if t.is_long:
                return False
        for row in tables.rows_where(self.layout.instances, Instance.SERVER, reference):
            self._lose_server(t, row)
            if t.is_long:
                return False
        for row in tables.rows_where(self.layout.instances, Instance.HOLDER, reference):
            if t.is_long:
                return False
            state = words[tables.instance(row) + Instance.STATE]
            if state == Instance.ACTIVE:
                self.release(t, row)
            elif state == Instance.LOADING:
                self._abandon_load(t, row)
            elif state == Instance.LEASED:
                self.end_lease(t, row)
            elif state == Instance.RESUMING:
                self.suspensions.turn_back(t, row, reference)
        # What it was unloading or suspending, and what has just become so, somebody living has to finish.
        heir = self._heir(reference)
        for row in tables.rows_where(self.layout.instances, Instance.HOLDER, reference):
            if t.is_long:
                return False
            if heir and words[tables.instance(row)] == Instance.SUSPENDING:
                self.suspensions.hand_over(t, row, heir - 1)
            elif heir:
                self.hand_unload_over(t, row, heir - 1)
            else:
                self._drop(t, row)
        return True

    def _heir(self, reference: int) -> int:
        """Return a worker that takes over the duties of the member `reference`: this process, if it stays."""
        if self._namespace.reference not in (0, reference):
            return self._namespace.reference
        workers = self.tables.rows_where(self.layout.members, Member.STATE, Member.WORKER)
        return next((slot + 1 for slot in workers if slot + 1 != reference), 0)

    def _lose_server(self, t: Transaction, row: int) -> None:
        """The process behind a handle is gone, and its memory with it."""
        at = self.tables.instance(row)
        state = self.segment.words[at + Instance.STATE]
        t.event(EventKind.LOST, self._model_reference(row), row + 1, value=self.segment.floats[at + Instance.MB])
        if state in _GO_WITH_SERVER:
            self._drop(t, row)
            return
        if state != Instance.LOADING:
            self._expect_back(t, row)
            self._set_mb(t, row, 0.0)
        t.set(at + Instance.SERVER, 0)
        t.set(at + Instance.DOOMED, Instance.LOST)

    def _abandon_load(self, t: Transaction, row: int) -> None:
        """A load is given up by others than its loader. A model server that it has started is to be unloaded."""
        at = self.tables.instance(row)
        server = self.segment.words[at + Instance.SERVER]
        if not server:
            self.fail_load(t, row)
            return
        t.add(Header.FAILED_LOADS, 1)
        t.event(EventKind.LOAD_FAILED, self._model_reference(row), row + 1)
        self.end_isolation(t, row)
        t.set_text(at + Instance.HANDLE, self.tables.text(self.tables.member(server - 1) + Member.NAME))
        t.set_float(at + Instance.RESERVED_MB, 0.0)
        self._change_state(t, row, Instance.UNLOADING)

    # ---- models --------------------------------------------------------------------------------------------

    def claim_model(self, t: Transaction, tag: str, encoded: bytes) -> int:
        """Return the row of a tag, made if need be; the oldest unused tag goes when the table is full.

        Raises TableFullError when every row has instances or waiters; `Scheduler.make_room_for_model` changes that.
        """
        row = self.tables.model_row(tag)
        if row is None:
            row = self._take_model_row(t, encoded)
            t.set(self.tables.model(row) + Model.STATE, Model.MODEL)
        name = display_name(tag).encode()
        if name and self.tables.text(self.tables.model(row) + Model.NAME) != name:
            t.set_text(self.tables.model(row) + Model.NAME, name)
        return row

    def estimate(
        self, t: Transaction, row: int, mb: float, measured: bool, sd_mb: float = 0.0, forget_bound: bool = False
    ) -> None:
        """Set what a copy of the model is expected to take; its waiters lose the priority of the unknown.

        measured: read from processes. sd_mb: standard deviation of the figure, 0 for one that is taken for exact.
        forget_bound: it counts although the model has run out of memory with more than that free, see `run_out`.
        """
        at = self.tables.model(row)
        if forget_bound:
            t.set_float(at + Model.AT_LEAST_MB, 0.0)
        if not self.segment.words[at + Model.KNOWN]:
            self._tell_waiters(t, row, mb)
        t.set_float(at + Model.ESTIMATE_MB, mb)
        t.set(at + Model.KNOWN, 1)
        t.set(at + Model.MEASURED, int(measured))
        t.set_float(at + Model.SD_MB, sd_mb)
        t.event(EventKind.ESTIMATED, row + 1, value=mb)

    def expect(self, t: Transaction, row: int, mb: float) -> None:
        """Take the model for `mb`, as a user says, until it is measured; where nothing is, from now on."""
        words, floats, at = self.segment.words, self.segment.floats, self.tables.model(row)
        if floats[at + Model.EXPECT_MB] == mb:
            return
        t.set_float(at + Model.EXPECT_MB, mb)
        if not words[at + Model.KNOWN]:
            self._tell_waiters(t, row, mb)
        elif words[Header.SOURCE_BOOKS_ONLY] and not words[at + Model.MEASURED]:
            self.estimate(t, row, mb, measured=False)

    def keep_alive(self, t: Transaction, row: int, word: int) -> None:
        """Keep the idle copies of a model for so long from now on, see `Model.KEEP_ALIVE`."""
        t.set(self.tables.model(row) + Model.KEEP_ALIVE, word)

    def _tell_waiters(self, t: Transaction, row: int, mb: float) -> None:
        """Let a model's waiters know what it takes; they lose the priority of the unknown."""
        for ticket in map(self.tables.ticket, self.tables.rows_where(self.layout.tickets, Ticket.MODEL, row)):
            if not self.segment.words[ticket + Ticket.PRIORITY]:
                t.set(ticket + Ticket.PRIORITY, 1)
            t.set_float(ticket + Ticket.NEED_MB, mb)

    def run_out(self, t: Transaction, row: int, at_least_mb: float = 0.0, loading: bool = False) -> None:
        """Record that a copy of the model needed more memory than there was: more than `at_least_mb`, 0 if unknown.

        loading: a load did. Then an estimate that is not above that, and was not read from a process, is wrong: the
        model is unknown again, so that the copy that loads next is measured.
        """
        words, floats, at = self.segment.words, self.segment.floats, self.tables.model(row)
        estimate = floats[at + Model.ESTIMATE_MB] if words[at + Model.KNOWN] else math.nan
        t.add(Header.OUT_OF_MEMORY, 1)
        t.event(EventKind.OUT_OF_MEMORY, row + 1, value=estimate)
        if at_least_mb > floats[at + Model.AT_LEAST_MB]:
            t.set_float(at + Model.AT_LEAST_MB, at_least_mb)
        if loading and estimate <= at_least_mb and not words[at + Model.MEASURED]:
            t.set(at + Model.KNOWN, 0)
            t.set_float(at + Model.ESTIMATE_MB, math.nan)
            t.set_float(at + Model.SD_MB, 0.0)

    def note_failure(self, t: Transaction, row: int) -> None:
        """Record that a load of the model has failed by its own fault."""
        at = self.tables.model(row)
        t.add(at + Model.FAILURES, 1)
        t.set(at + Model.FAILED_AT, t.now)

    def _forget_failures(self, t: Transaction, row: int) -> None:
        at = self.tables.model(row)
        if self.segment.words[at + Model.FAILURES]:
            t.set(at + Model.FAILURES, 0)
            t.set(at + Model.FAILED_AT, 0)

    def pin(self, t: Transaction, model: int, member: int) -> int:
        """Keep the idle copies of a model from eviction for a member (slot); return the row. Raises TableFullError.

        member: -1 for a pin that is the namespace's.
        """
        row = self._take_row(t, self.layout.pins)
        at = self.tables.pin(row)
        t.set(at + Pin.MODEL, model)
        t.set(at + Pin.MEMBER, member + 1)
        t.set(at + Pin.SINCE, t.now)
        t.set(at + Pin.STATE, 1)
        t.add(self.tables.model(model) + Model.PINS, 1)
        t.event(EventKind.PINNED, model + 1, value=member)
        return row

    def supersede(self, t: Transaction, row: int, superseded: bool) -> None:
        """Note whether another model has taken the place of this one."""
        if bool(self.segment.words[self.tables.model(row) + Model.SUPERSEDED]) != superseded:
            t.set(self.tables.model(row) + Model.SUPERSEDED, int(superseded))

    def unpin(self, t: Transaction, row: int) -> None:
        """End a pin."""
        at = self.tables.pin(row)
        model = self.segment.words[at + Pin.MODEL]
        t.set(at + Pin.STATE, 0)
        t.add(self.tables.model(model) + Model.PINS, -1)
        t.set(self.tables.model(model) + Model.USED_AT, t.now)
        t.event(EventKind.UNPINNED, model + 1, value=self.segment.words[at + Pin.MEMBER] - 1)

    def _take_model_row(self, t: Transaction, encoded: bytes) -> int:
        """Return a row that is empty but for its name, for the caller to set its state. Raises TableFullError."""
        try:
            row = self._take_row(t, self.layout.models)
        except TableFullError:
            row = self._oldest_unused_model()
            if row < 0:
                raise
        at = self.tables.model(row)
        for word in range(Model.STATE, Model.TAG):
            t.set(at + word, 0)
        t.set(at + Model.GENERATION, self._next_generation(t))
        t.set_float(at + Model.ESTIMATE_MB, math.nan)
        t.set(at + Model.USED_AT, t.now)
        t.set_text(at + Model.TAG, encoded)
        t.set_text(at + Model.NAME, b"")
        return row

    def note_demand(self, t: Transaction, row: int, gap_s: float, requests: int, counted_ns: int) -> None:
        """Record how often a model is asked for, as counted up to now."""
        at = self.tables.model(row)
        t.set_all(
            (
                (at + Model.GAP_S, float_bits(gap_s)),
                (at + Model.REQUESTS, requests),
                (at + Model.REQUESTED_AT, counted_ns),
            )
        )

    def _oldest_unused_model(self) -> int:
        rows = self.tables.view(self.layout.models)
        busy = rows[:, Model.LOADED] + rows[:, Model.LOADING] + rows[:, Model.UNLOADING] + rows[:, Model.WAITING]
        free = (busy + rows[:, Model.SUSPENDED] + rows[:, Model.PINS] == 0) & (rows[:, Model.STATE] == Model.MODEL)
        unused = np.flatnonzero(free)
        return int(unused[np.argmin(rows[unused, Model.USED_AT])]) if len(unused) else -1

    # ---- tickets -------------------------------------------------------------------------------------------

    def enqueue(
        self,
        t: Transaction,
        model: int,
        member: int,
        priority: int,
        need_mb: float,
        deadline_ns: int,
        preload: int = 0,
        devices: int = 0,
        tied: int = 0,
        span: int = 1,
        nested: bool = False,
        cause: Cause | None = None,
        urgency: int = 0,
        steady: bool = False,
    ) -> int:
        """Let a member (slot) wait for a model; return the ticket's row. Raises TableFullError.

        preload: above 0, it waits for a load that brings the copies it can use to that number, not for one to use.
        devices, tied: bits of the devices where it may load, and on which a copy is of use; 0 for all.
        span: how many devices what it loads lies on. nested: it is not to run alone, as its thread holds another.
        cause: why it waits, where that is known without a plan. urgency: see `policy.fairness`.
        steady: nothing else is to be loaded or unloaded where it loads.
        """
        words, tables = self.segment.words, self.tables
        row = self._take_row(t, self.layout.tickets)
        at, model_at, number = tables.ticket(row), tables.model(model), words[Header.NEXT_TICKET]
        why = cause or Cause(0)
        t.set_all(
            (
                (Header.NEXT_TICKET, number + 1),
                (Header.NEWEST_TICKET, row),
                (at + Ticket.NUMBER, number),
                (at + Ticket.PRIORITY, priority),
                (at + Ticket.MODEL, model),
                (at + Ticket.MEMBER, member + 1),
                (at + Ticket.INSTANCE, 0),
                (at + Ticket.ENQUEUED, t.now),
                (at + Ticket.DEADLINE, deadline_ns),
                (at + Ticket.REASON, why.reason),
                (at + Ticket.NEED_MB, float_bits(need_mb)),
                (at + Ticket.PRELOAD, preload),
                (at + Ticket.BLOCKED_AT, 0),
                (at + Ticket.FREE_MB, float_bits(why.free_mb)),
                (at + Ticket.COMING_MB, float_bits(why.coming_mb)),
                (at + Ticket.SECONDS, float_bits(why.seconds)),
                (at + Ticket.OTHER, why.other),
                (at + Ticket.ON, why.on),
                (at + Ticket.DEVICES, devices),
                (at + Ticket.TIED, tied),
                (at + Ticket.SPAN, span),
                (at + Ticket.NESTED, int(nested)),
                (at + Ticket.PASSED, 0),
                (at + Ticket.WARNED, 0),
                (at + Ticket.CALLED_UP, 0),
                (at + Ticket.RANK, rank_ns(t.now, urgency)),
                (at + Ticket.STEADY, int(steady)),
                (at + Ticket.STATE, Ticket.WAITING),
                (model_at + Model.WAITING, words[model_at + Model.WAITING] + 1),
                (Header.WAITING, words[Header.WAITING] + 1),
            )
        )
        t.event(EventKind.QUEUED, model + 1, ticket=number + 1, value=need_mb)
        if cause is not None:
            t.event(EventKind.WAITS, model + 1, ticket=number + 1, cause=cause)
        return row

    def call_up(self, t: Transaction, row: int) -> None:
        """Wake a waiter, which has no answer yet, to look for itself in a moment; see `mpmm.model_manager.tenure`."""
        t.set(self.tables.ticket(row) + Ticket.CALLED_UP, t.now)
        self._wake(t, self.tables.ticket(row) + Ticket.SIGNAL)

    def set_reason(self, t: Transaction, row: int, cause: Cause) -> None:
        """Record why a ticket waits."""
        at = self.tables.ticket(row)
        words = self.segment.words
        t.set_all(
            (
                (at + Ticket.REASON, cause.reason),
                (at + Ticket.FREE_MB, float_bits(cause.free_mb)),
                (at + Ticket.COMING_MB, float_bits(cause.coming_mb)),
                (at + Ticket.SECONDS, float_bits(cause.seconds)),
                (at + Ticket.OTHER, cause.other),
                (at + Ticket.ON, cause.on),
            )
        )
        waited = (t.now - words[at + Ticket.ENQUEUED]) / 1e9
        ticket = words[at + Ticket.NUMBER] + 1
        t.event(EventKind.WAITS, words[at + Ticket.MODEL] + 1, ticket=ticket, value=waited, cause=cause)

    def warn(self, t: Transaction, row: int, why: str) -> None:
        """Say in the log, once for each ticket, that nothing which the manager can unload would serve it."""
        at = self.tables.ticket(row)
        if not self.segment.words[at + Ticket.WARNED]:
            t.set(at + Ticket.WARNED, 1)
            pid = self.segment.words[self.tables.member(self.segment.words[at + Ticket.MEMBER] - 1) + Member.PID]
            tag = self.tables.tag_of(self.segment.words[at + Ticket.MODEL])
            t.after.append(partial(_LOG.warning, "mpmm %s: %s of pid %d %s", self._namespace.name, tag, pid, why))

    def block(self, t: Transaction, row: int) -> None:
        """Record that from now on a ticket is the first one for whom there is no room."""
        t.set(self.tables.ticket(row) + Ticket.BLOCKED_AT, t.now)

    def let_pass(self, t: Transaction, row: int) -> None:
        """Record that a load was let past a ticket, which happens once; it is blocked anew when that has ended."""
        at = self.tables.ticket(row)
        t.set_all(((at + Ticket.PASSED, 1), (at + Ticket.BLOCKED_AT, 0)))

    def grant(self, t: Transaction, row: int, instance: int, cause: Cause | None = None) -> None:
        """Hand an idle instance to a waiter and wake it."""
        at = self.tables.ticket(row)
        model = self.segment.words[at + Ticket.MODEL]
        self.activate(t, instance, self.segment.words[at + Ticket.MEMBER])
        t.set(at + Ticket.INSTANCE, instance + 1)
        self._answer(t, row, Ticket.GRANTED)
        waited = (t.now - self.segment.words[at + Ticket.ENQUEUED]) / 1e9
        t.event(EventKind.GRANTED, model + 1, instance + 1, self.segment.words[at + Ticket.NUMBER] + 1, waited, cause)

    def pass_on(self, t: Transaction, row: int, instance: int, cause: Cause, used: bool = True) -> None:
        """Hand an active copy from its holder straight to a waiter (ticket's row) and wake it: `release` and `grant`.

        For a copy that may be taken over: not doomed, not alone, owned by nobody or by the waiter. used: see `release`.
        Done in one go, it takes half the time of the two, and a waiter waits for every microsecond of it.
        """
        words, tables = self.segment.words, self.tables
        at, ticket = tables.instance(instance), tables.ticket(row)
        if words[at + Instance.STATE] != Instance.ACTIVE:
            raise tables.surprise("the copy", at)
        if words[ticket + Ticket.STATE] != Ticket.WAITING:
            raise tables.surprise("the ticket", ticket)
        model_row = words[at + Instance.MODEL]
        model = tables.model(model_row)
        held = (t.now - words[at + Instance.SINCE]) / 1e9
        waited = (t.now - words[ticket + Ticket.ENQUEUED]) / 1e9
        number = words[ticket + Ticket.NUMBER]
        t.next_event(EventKind.RELEASED, model_row + 1, instance + 1, value=held)
        granted = t.next_event(EventKind.GRANTED, model_row + 1, instance + 1, number + 1, waited, cause, ahead=1)
        signal = ticket + Ticket.SIGNAL
        t.set_all(
            (
                granted,
                (at + Instance.SINCE, t.now),
                (at + Instance.HOLDER, words[ticket + Ticket.MEMBER]),
                (at + Instance.USES, words[at + Instance.USES] + 1),
                (model + Model.HITS, words[model + Model.HITS] + 1),
                (model + Model.WAITING, words[model + Model.WAITING] - 1),
                (model + Model.HOLD_S, self._hold_mean(model, held, used)),
                (Header.HITS, words[Header.HITS] + 1),
                (Header.WAITING, words[Header.WAITING] - 1),
                (ticket + Ticket.INSTANCE, instance + 1),
                (ticket + Ticket.STATE, Ticket.GRANTED),
                (signal, words[signal] + 1),
            )
        )
        t.after.append(partial(wake_all, self.segment.address + 8 * signal))

    def allow_load(
        self, t: Transaction, row: int, devices: int, need_mb: float, alone: bool, cause: Cause | None = None
    ) -> int:
        """Reserve memory for a waiter and tell it to load; return the instance's row. Raises TableFullError.

        devices: bits; where there are several, each takes an equal share.

        For whom waits for a lease, the reservation is all there is to it: it has the lease then.
        """
        at = self.tables.ticket(row)
        words = self.segment.words
        model, member = words[at + Ticket.MODEL], words[at + Ticket.MEMBER] - 1
        number = words[at + Ticket.NUMBER] + 1
        if words[self.tables.model(model)] == Model.LEASE:
            instance, answer = self.begin_lease(t, model, member, devices, need_mb, cause, number), Ticket.GRANTED
        else:
            instance, answer = self.begin_load(t, model, member, devices, need_mb, alone, cause, number), Ticket.LOAD
        if words[at + Ticket.STEADY]:
            t.set(self.tables.instance(instance) + Instance.STEADY, 1)
            t.set(Header.STEADY, words[Header.STEADY] | devices)
        t.set(at + Ticket.INSTANCE, instance + 1)
        self._answer(t, row, answer)
        return instance

    def end_steady(self, t: Transaction, row: int) -> None:
        """Let loads and unloads go on where a copy or lease had it quiet; nothing if it had not.

        Copies that are to be unloaded there have had to wait for that: their time begins now, and all workers look.
        """
        words, tables, at = self.segment.words, self.tables, self.tables.instance(row)
        if not words[at + Instance.STEADY]:
            return
        devices = words[at + Instance.DEVICES]
        t.set(at + Instance.STEADY, 0)
        t.set(Header.STEADY, words[Header.STEADY] & ~devices)
        held_back = (Instance.UNLOADING, Instance.SUSPENDING)
        for held in tables.used_rows(self.layout.instances):
            if words[tables.instance(held)] in held_back and words[tables.instance(held) + Instance.DEVICES] & devices:
                t.set(tables.instance(held) + Instance.SINCE, t.now)
        for slot in tables.rows_where(self.layout.members, Member.STATE, Member.WORKER):
            self.ring(t, slot)

    def refuse(self, t: Transaction, row: int, cause: Cause | None = None) -> None:
        """Tell a waiter that its model can never fit."""
        at = self.tables.ticket(row)
        words = self.segment.words
        t.event(
            EventKind.REFUSED,
            words[at + Ticket.MODEL] + 1,
            ticket=words[at + Ticket.NUMBER] + 1,
            value=self.segment.floats[at + Ticket.NEED_MB],
            cause=cause,
        )
        self._answer(t, row, Ticket.REFUSED)

    def dismiss(self, t: Transaction, row: int) -> None:
        """Tell a preload that no further copy is wanted."""
        self._answer(t, row, Ticket.ENOUGH)

    def take_answer(self, t: Transaction, row: int) -> None:
        """Free the row of a ticket whose answer its waiter has read and now acts upon."""
        at = self.tables.ticket(row)
        if self.segment.words[at] in (Ticket.FREE, Ticket.WAITING):
            raise self.tables.surprise("the ticket", at)
        t.set(at + Ticket.STATE, Ticket.FREE)
        self._forget_spent_lease(t, self.segment.words[at + Ticket.MODEL])

    def leave_queue(self, t: Transaction, row: int) -> None:
        """Take a ticket out whose waiter gave up or died; what it was just given goes back."""
        at = self.tables.ticket(row)
        words = self.segment.words
        state, given = words[at + Ticket.STATE], words[at + Ticket.INSTANCE]
        if state == Ticket.WAITING:
            self._stop_waiting(t, row)
        waited = (t.now - words[at + Ticket.ENQUEUED]) / 1e9
        t.event(EventKind.LEFT_QUEUE, words[at + Ticket.MODEL] + 1, ticket=words[at + Ticket.NUMBER] + 1, value=waited)
        t.set(at + Ticket.STATE, Ticket.FREE)
        if state == Ticket.GRANTED:
            self._take_back_grant(t, given - 1)
        elif state == Ticket.LOAD:
            self._take_back_permission(t, given - 1)
        self._forget_spent_lease(t, words[at + Ticket.MODEL])

    def _take_back_grant(self, t: Transaction, instance: int) -> None:
        """Take back what was granted to a waiter that has not acted upon it."""
        if self.segment.words[self.tables.instance(instance)] == Instance.LEASED:
            self.end_lease(t, instance)
        else:
            self.release(t, instance)

    def _take_back_permission(self, t: Transaction, instance: int) -> None:
        """Take back what a waiter was told to load or to resume, and has not begun with."""
        if self.segment.words[self.tables.instance(instance)] == Instance.RESUMING:
            self.suspensions.cancel(t, instance)
        else:
            self.fail_load(t, instance)

    def _answer(self, t: Transaction, row: int, state: int) -> None:
        self._stop_waiting(t, row)
        at = self.tables.ticket(row)
        t.set(at + Ticket.STATE, state)
        self._wake(t, at + Ticket.SIGNAL)

    def _stop_waiting(self, t: Transaction, row: int) -> None:
        model = self.segment.words[self.tables.ticket(row) + Ticket.MODEL]
        t.add(self.tables.model(model) + Model.WAITING, -1)
        t.add(Header.WAITING, -1)

    # ---- leases --------------------------------------------------------------------------------------------

    def claim_lease(self, t: Transaction, encoded: bytes, mb: float) -> int:
        """Return a new model row that stands for a lease, to be waited for like a model. Raises TableFullError."""
        row = self._take_model_row(t, encoded)
        at = self.tables.model(row)
        t.set_float(at + Model.ESTIMATE_MB, mb)
        t.set(at + Model.KNOWN, 1)
        t.set(at + Model.STATE, Model.LEASE)
        return row

    def begin_lease(
        self,
        t: Transaction,
        model: int,
        member: int,
        devices: int,
        mb: float,
        cause: Cause | None = None,
        ticket: int = 0,
    ) -> int:
        """Give a member (slot) the lease that a model row stands for; return the row. Raises TableFullError.

        ticket: number plus one of the one that waited for it, for the event.
        """
        row = self._new_instance(t, model, member, devices)
        at = self.tables.instance(row)
        t.set_float(at + Instance.RESERVED_MB, mb)
        self._change_state(t, row, Instance.LEASED)
        self._reconfigure(t, row)
        t.event(placed(EventKind.LEASED, devices), model + 1, row + 1, ticket, mb, cause)
        return row

    def link_program(self, t: Transaction, row: int, pid: int) -> None:
        """Record which process uses the memory of a lease, so that what it takes is not counted twice."""
        t.set(self.tables.instance(row) + Instance.PROGRAM, pid)

    def measure_program(self, t: Transaction, row: int, mb: float) -> None:
        """Record what the process that uses the memory of a lease takes at present."""
        t.set_float(self.tables.instance(row) + Instance.MB, mb)

    def end_lease(self, t: Transaction, row: int) -> None:
        """The memory of a lease is free for others; its name is forgotten."""
        at = self.tables.instance(row)
        words = self.segment.words
        if words[at + Instance.STATE] != Instance.LEASED:
            raise self.tables.surprise("the copy", at)
        model = words[at + Instance.MODEL]
        t.event(EventKind.LEASE_ENDED, model + 1, row + 1, value=(t.now - words[at + Instance.SINCE]) / 1e9)
        self._change_state(t, row, Instance.FREE)
        self._reconfigure(t, row)
        self._forget_spent_lease(t, model)

    def _forget_spent_lease(self, t: Transaction, model: int) -> None:
        """Free a lease's model row once nobody waits for the lease or has it; a model's row stays."""
        if self.segment.words[self.tables.model(model)] != Model.LEASE:
            return
        waiting = self.tables.rows_where(self.layout.tickets, Ticket.MODEL, model)
        held = self.tables.rows_where(self.layout.instances, Instance.MODEL, model)
        if not waiting and not held:
            t.set(self.tables.model(model) + Model.STATE, Model.FREE)

    # ---- instances -----------------------------------------------------------------------------------------

    def begin_load(
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
        """Book a copy that a member (slot) is about to load; return its row. Raises TableFullError.

        devices: bits; where there are several, each takes an equal share.
        ticket: number plus one of the one that waited for it, for the event.
        """
        row = self._new_instance(t, model, member, devices)
        at = self.tables.instance(row)
        self._set_mb(t, row, need_mb)
        t.set_float(at + Instance.RESERVED_MB, need_mb)
        self._change_state(t, row, Instance.LOADING)
        t.set(self.tables.model(model) + Model.USED_AT, t.now)
        if alone:
            if self.segment.words[Header.ISOLATED] & devices:
                raise self.tables.surprise("the copy to be loaded alone", at)
            t.set(Header.ISOLATED, self.segment.words[Header.ISOLATED] | devices)
            for device in map(self.tables.device, device_rows(devices)):
                t.set(device + Device.ISOLATED, row + 1)
                t.set_float(device + Device.BASELINE_MB, math.nan)
            t.event(EventKind.ISOLATION_BEGAN, model + 1, row + 1)
        t.event(placed(EventKind.LOAD_BEGAN, devices), model + 1, row + 1, ticket, need_mb, cause)
        return row

    def _new_instance(self, t: Transaction, model: int, member: int, devices: int) -> int:
        """Return a row that a member (slot) holds, for the caller to set its state. Raises TableFullError."""
        row = self._take_row(t, self.layout.instances)
        at = self.tables.instance(row)
        if not 0 < devices.bit_count() <= MOST_SPANNED:
            raise self.tables.surprise(f"of {devices.bit_count()} devices the copy", at)
        t.set_all([(at + word, 0) for word in range(Instance.STATE, Instance.HANDLE + 1)])
        t.set(at + Instance.MODEL, model)
        t.set(at + Instance.GENERATION, self._next_generation(t))
        t.set(at + Instance.HOLDER, member + 1)
        t.set(at + Instance.DEVICES, devices)
        return row

    def _set_mb(self, t: Transaction, row: int, mb: float, shares_mb: Sequence[float] = ()) -> None:
        """Set what a copy takes; of each device as much as of the others, where `shares_mb` does not say."""
        at = self.tables.instance(row)
        self._update_float(t, at + Instance.MB, mb)
        span = self.segment.words[at + Instance.DEVICES].bit_count()
        if span > 1:
            for number, share_mb in enumerate(shares_mb or [mb / span] * span):
                self._update_float(t, at + Instance.SHARES + number, share_mb)

    def _update_float(self, t: Transaction, word: int, value: float) -> None:
        # Mostly nothing has changed, and each sample has a figure for every process.
        if self.segment.floats[word] != value:
            t.set_float(word, value)

    def correct(self, t: Transaction, row: int, mb: float) -> None:
        """Record what a copy takes by a measurement of the whole device."""
        self._set_mb(t, row, mb)

    def _reconfigure(self, t: Transaction, row: int) -> None:
        """Record on an instance's devices that from now on other copies are loaded there."""
        for device in device_rows(self.segment.words[self.tables.instance(row) + Instance.DEVICES]):
            t.set(self.tables.device(device) + Device.CONFIGURED_AT, t.now)

    def set_baseline(self, t: Transaction, row: int) -> None:
        """Record the memory in use on its devices just before an isolated load, and forget older peaks."""
        devices = self.segment.words[self.tables.instance(row) + Instance.DEVICES]
        for device in map(self.tables.device, device_rows(devices)):
            t.set_float(device + Device.BASELINE_MB, self.segment.floats[device + Device.USED_MB])
        self.reset_peaks(t, devices)

    def link_server(self, t: Transaction, row: int, slot: int) -> None:
        """Tie a loading copy to the model server (member slot) that is going to keep its memory."""
        t.set(self.tables.instance(row) + Instance.SERVER, slot + 1)
        t.set(self.tables.member(slot) + Member.INSTANCE, row + 1)

    def end_load(
        self,
        t: Transaction,
        row: int,
        handle: bytes,
        mb: float,
        server: int,
        has_server: bool,
        shares_mb: Sequence[float] = (),
    ) -> bool:
        """A load is done, its loader holds the copy. Return whether it is a twin, so that its memory is another's.

        handle: empty for an object, which belongs to the loader from now on.
        mb: what the copy takes as far as known. shares_mb: of each device, where it spans several; empty: all the same.
        server: reference to the member that keeps the memory, or 0.
        """
        at = self.tables.instance(row)
        words = self.segment.words
        model = words[at + Instance.MODEL]
        began = words[at + Instance.SINCE]
        is_twin = bool(handle) and bool(self.twins_of(handle, row))
        if is_twin:
            mb, shares_mb = 0.0, ()
        self._change_state(t, row, Instance.ACTIVE)
        now = words[at + Instance.SINCE]
        t.set(at + Instance.LOADED_AT, now)
        t.set(at + Instance.USES, 1)
        t.set(at + Instance.SERVER, server)
        t.set(at + Instance.HAS_SERVER, int(has_server))
        self._set_mb(t, row, mb, shares_mb)
        t.set_float(at + Instance.RESERVED_MB, 0.0)
        if handle:
            t.set_text(at + Instance.HANDLE, handle)
        else:
            t.set(at + Instance.OWNER, words[at + Instance.HOLDER])
        t.add(Header.LOADS, 1)
        row_of_model = self.tables.model(model)
        t.add(row_of_model + Model.LOADS, 1)
        t.set(row_of_model + Model.SHARES, int(bool(handle)))
        self._forget_failures(t, model)
        t.set(row_of_model + Model.LOAD_S, self._smoothed(row_of_model + Model.LOAD_S, (now - began) / 1e9))
        self._reconfigure(t, row)
        t.event(EventKind.LOAD_ENDED, model + 1, row + 1, value=(now - began) / 1e9)
        return is_twin

    def twins_of(self, handle: bytes, row: int) -> list[int]:
        """Return the other instances, in use or idle, that stand for the same handle as a row does, or is to."""
        words, tables = self.segment.words, self.tables
        rows = tables.view(self.layout.instances)
        # Handles are mostly as long as one another, and differ at their end: with a thousand of them, 10 us.
        last = -(-len(handle) // 8)
        last_word = int.from_bytes(handle[8 * (last - 1) :], "little")
        alike = (rows[:, Instance.HANDLE] == len(handle)) & (rows[:, Instance.HANDLE + last] == np.uint64(last_word))
        return [
            other
            for other in np.flatnonzero(alike).tolist()
            if other != row
            and words[tables.instance(other)] in (Instance.ACTIVE, Instance.IDLE)
            and tables.text(tables.instance(other) + Instance.HANDLE) == handle
        ]

    def unloads_handle(self, row: int) -> bool:
        """Tell whether the unload of this row is the one that unloads its handle: no twin is left.

        Of twins that are unloaded at the same time it is the last one in the table.
        """
        at, tables = self.tables.instance(row), self.tables
        handle = tables.text(at + Instance.HANDLE)
        going = (
            other
            for other in tables.rows_where(self.layout.instances, Instance.STATE, Instance.UNLOADING)
            if other > row and tables.text(tables.instance(other) + Instance.HANDLE) == handle
        )
        return bool(handle) and not self.twins_of(handle, row) and next(going, None) is None

    def _leave_memory(self, t: Transaction, row: int, to: int) -> None:
        """Let a twin that stays stand for the memory of one that goes, and for its server."""
        self.end_isolation(t, to)
        words, floats, at, heir = self.segment.words, self.segment.floats, *map(self.tables.instance, (row, to))
        t.set(heir + Instance.DEVICES, words[at + Instance.DEVICES])
        self._set_mb(t, to, floats[at + Instance.MB], [mb for _, mb in self.tables.shares_of(row)])
        t.set(heir + Instance.LOADED_AT, words[at + Instance.LOADED_AT])
        server = words[at + Instance.SERVER]
        if server:
            t.set(heir + Instance.SERVER, server)
            t.set(self.tables.member(server - 1) + Member.INSTANCE, to + 1)
            t.set(at + Instance.SERVER, 0)
        self._set_mb(t, row, 0.0)

    def fail_load(self, t: Transaction, row: int) -> None:
        """A load came to nothing: free the row and its reservation."""
        at = self.tables.instance(row)
        taken = (t.now - self.segment.words[at + Instance.SINCE]) / 1e9
        t.event(EventKind.LOAD_FAILED, self._model_reference(row), row + 1, value=taken)
        t.add(Header.FAILED_LOADS, 1)
        self._drop(t, row)

    def give_up_load(self, t: Transaction, row: int) -> None:
        """End a load that takes too long; this member unloads the server that it may have started."""
        self._abandon_load(t, row)
        at = self.tables.instance(row)
        if self.segment.words[at + Instance.STATE] == Instance.UNLOADING:
            t.set(at + Instance.HOLDER, self._namespace.reference)
            self.ring(t, self._namespace.slot)

    def activate(self, t: Transaction, row: int, holder: int, *further: tuple[int, int]) -> None:
        """Make an idle copy active for a member (reference), and count a hit; `further` changes go with that.

        This and `release` are the warm path: their changes are stored in one go.
        """
        at = self.tables.instance(row)
        words = self.segment.words
        if words[at + Instance.STATE] != Instance.IDLE:
            raise self.tables.surprise("the copy", at)
        model = self.tables.model(words[at + Instance.MODEL])
        changes = [
            (at + Instance.STATE, Instance.ACTIVE),
            (at + Instance.SINCE, t.now),
            (at + Instance.HOLDER, holder),
            (at + Instance.USES, words[at + Instance.USES] + 1),
            (model + Model.IDLE, words[model + Model.IDLE] - 1),
            (model + Model.ACTIVE, words[model + Model.ACTIVE] + 1),
            (model + Model.HITS, words[model + Model.HITS] + 1),
            (Header.ACTIVE, words[Header.ACTIVE] + 1),
            (Header.HITS, words[Header.HITS] + 1),
            *further,
        ]
        if not words[at + Instance.OWNER]:
            changes += self._unlinked(at)
        t.set_all(changes)

    def grab(self, t: Transaction, row: int, holder: int) -> None:
        """Give an idle copy to a member (reference) that did not have to wait."""
        self.activate(t, row, holder, t.next_event(EventKind.HIT, self._model_reference(row), row + 1))

    def release(self, t: Transaction, row: int, used: bool = True) -> None:
        """An active copy is free again: idle, or to be unloaded if it is doomed. Ends its isolation.

        used: False if it was only loaded, so that the time it was held teaches nothing.
        """
        at = self.tables.instance(row)
        words = self.segment.words
        if words[at + Instance.STATE] != Instance.ACTIVE:
            raise self.tables.surprise("the copy", at)
        if words[Header.ISOLATED]:
            self.end_isolation(t, row)
        held = (t.now - words[at + Instance.SINCE]) / 1e9
        event = t.next_event(EventKind.RELEASED, words[at + Instance.MODEL] + 1, row + 1, value=held)
        doomed, holder = words[at + Instance.DOOMED], words[at + Instance.HOLDER]
        if doomed == Instance.LOST:
            t.set_all((event,))
            if words[at + Instance.HAS_SERVER] and not words[at + Instance.SERVER]:
                self._drop(t, row)
            else:
                self._change_state(t, row, Instance.UNLOADING)
                self.ring(t, holder - 1)
            return
        model = self.tables.model(words[at + Instance.MODEL])
        changes = [
            event,
            (at + Instance.STATE, Instance.IDLE),
            (at + Instance.SINCE, t.now),
            (at + Instance.HOLDER, 0),
            (model + Model.ACTIVE, words[model + Model.ACTIVE] - 1),
            (model + Model.IDLE, words[model + Model.IDLE] + 1),
            (model + Model.HOLD_S, self._hold_mean(model, held, used)),
            (Header.ACTIVE, words[Header.ACTIVE] - 1),
        ]
        if not words[at + Instance.OWNER]:
            changes += self._pushed(at, row)
        t.set_all(changes)
        if doomed:
            self.begin_unload(t, row, holder - 1, evicted=False, cause=Cause(Reason.ASKED))

    def runs_alone(self, row: int) -> bool:
        """Tell whether a copy has its devices to itself, to be measured."""
        devices = self.segment.words[self.tables.instance(row) + Instance.DEVICES]
        return any(
            self.segment.words[self.tables.device(device) + Device.ISOLATED] == row + 1
            for device in device_rows(devices & self.segment.words[Header.ISOLATED])
        )

    def end_isolation(self, t: Transaction, row: int) -> None:
        """A copy does not run alone any more; nothing if it did not."""
        if not self.runs_alone(row):
            return
        devices = self.segment.words[self.tables.instance(row) + Instance.DEVICES]
        for device in device_rows(devices):
            t.set(self.tables.device(device) + Device.ISOLATED, 0)
        t.set(Header.ISOLATED, self.segment.words[Header.ISOLATED] & ~devices)
        t.event(EventKind.ISOLATION_ENDED, self._model_reference(row), row + 1)

    def begin_unload(self, t: Transaction, row: int, unloader: int, evicted: bool, cause: Cause | None = None) -> None:
        """Take an idle copy out of use; a member (slot) unloads it, its owner if it has one.

        Of several that stand for one handle, the memory comes back with the last. So when one is evicted, those that
        are idle and not pinned go with it, and with the others its memory stays.
        """
        at, words, tables = self.tables.instance(row), self.segment.words, self.tables
        handle = b"" if words[at + Instance.OWNER] else tables.text(at + Instance.HANDLE)
        twins = self.twins_of(handle, row) if handle else []
        if twins:
            stays = [
                twin
                for twin in twins
                if words[tables.instance(twin)] == Instance.ACTIVE
                or not evicted
                or words[tables.model(words[tables.instance(twin) + Instance.MODEL]) + Model.PINS]
            ]
            going = sorted({row, *twins} - set(stays))
            bears = next((one for one in (row, *twins) if self.segment.floats[tables.instance(one) + Instance.MB]), row)
            heir = stays[0] if stays else going[-1]
            # Where another copy runs alone, none that is in use may come to lie.
            isolated = words[Header.ISOLATED] & words[tables.instance(bears) + Instance.DEVICES]
            if bears in going and bears != heir and not isolated:
                self._leave_memory(t, bears, heir)
            for twin in going:
                if twin != row:
                    self._begin_one_unload(t, twin, unloader, evicted, cause)
        self._begin_one_unload(t, row, unloader, evicted, cause)

    def _begin_one_unload(self, t: Transaction, row: int, unloader: int, evicted: bool, cause: Cause | None) -> None:
        at = self.tables.instance(row)
        words = self.segment.words
        if words[at + Instance.STATE] != Instance.IDLE:
            raise self.tables.surprise("the copy", at)
        owner = words[at + Instance.OWNER]
        if not owner:
            t.set_all(self._unlinked(at))
        self._change_state(t, row, Instance.UNLOADING)
        t.set(at + Instance.HOLDER, owner or unloader + 1)
        if evicted:
            t.add(Header.EVICTIONS, 1)
            t.add(self.tables.model(words[at + Instance.MODEL]) + Model.EVICTIONS, 1)
        mb = self.segment.floats[at + Instance.MB]
        t.event(EventKind.UNLOAD_BEGAN, self._model_reference(row), row + 1, value=mb, cause=cause)
        self.ring(t, words[at + Instance.HOLDER] - 1)

    def unload(self, t: Transaction, row: int, unloader: int) -> None:
        """Have a copy unloaded because somebody asks for it: at once where it is idle, else when it is given back.

        unloader: the member (slot) that unloads a handle; an object is its owner's to unload. A pin does not keep it.
        """
        at = self.tables.instance(row)
        if self.segment.words[at + Instance.STATE] == Instance.IDLE:
            self.begin_unload(t, row, unloader, evicted=False, cause=Cause(Reason.ASKED))
        elif self.segment.words[at + Instance.STATE] == Instance.SUSPENDED:
            self.suspensions.drop(t, row, unloader, Cause(Reason.ASKED))
        elif not self.segment.words[at + Instance.DOOMED]:
            t.set(at + Instance.DOOMED, Instance.ASKED)
            mb = self.segment.floats[at + Instance.MB]
            t.event(EventKind.DOOMED, self._model_reference(row), row + 1, value=mb, cause=Cause(Reason.ASKED))

    def hand_unload_over(self, t: Transaction, row: int, unloader: int) -> None:
        """Have another member (slot) unload a handle, because its HOLDER is dead or has not done so in time.

        The former HOLDER may be at work on it still: whichever of them ends the unload first frees the row, and the
        other one finds that it is gone.
        """
        at = self.tables.instance(row)
        words = self.segment.words
        if words[at + Instance.STATE] != Instance.UNLOADING or words[at + Instance.OWNER]:
            raise self.tables.surprise("the copy", at)
        t.set(at + Instance.HOLDER, unloader + 1)
        t.set(at + Instance.HANDED_AT, t.now)
        self.ring(t, unloader)

    def unload_is_late(self, t: Transaction, row: int) -> None:
        """Record that the memory of a copy in mid-unload is not to be counted on any more."""
        at = self.tables.instance(row)
        if self.segment.words[at + Instance.STATE] != Instance.UNLOADING:
            raise self.tables.surprise("the copy", at)
        t.set(at + Instance.UNLOAD_LATE, 1)

    def end_unload(self, t: Transaction, row: int) -> None:
        """An unload is done: free the row, and expect its memory back."""
        at = self.tables.instance(row)
        if self.segment.words[at + Instance.STATE] != Instance.UNLOADING:
            raise self.tables.surprise("the copy", at)
        t.event(
            EventKind.UNLOAD_ENDED, self._model_reference(row), row + 1, value=self.segment.floats[at + Instance.MB]
        )
        self._drop(t, row)

    def discard(self, t: Transaction, row: int) -> None:
        """Free the row of an active copy whose server is dead."""
        at = self.tables.instance(row)
        if self.segment.words[at + Instance.STATE] != Instance.ACTIVE:
            raise self.tables.surprise("the copy", at)
        t.event(
            EventKind.LOST,
            self._model_reference(row),
            row + 1,
            value=self.segment.floats[self.tables.instance(row) + Instance.MB],
        )
        self._drop(t, row)

    def reset(self, t: Transaction, before: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Empty queue and memory: waiters are told, idle copies unloaded, the rest doomed or given up.

        Leases stay: what a program outside takes is not ours to unload.

        Return None when all is done. Else the transaction has become long: another call, in a new one, goes on. It is
        given what this one has returned as `before`: the ticket number and the generation from which on rows are newer
        than the reset, and stay.
        """
        words, tables = self.segment.words, self.tables
        if before is None:
            before = words[Header.NEXT_TICKET], words[Header.NEXT_GENERATION]
        newer_ticket, newer_generation = before
        for row in tables.used_rows(self.layout.tickets):
            at = tables.ticket(row)
            if t.is_long:
                return before
            if words[at + Ticket.NUMBER] >= newer_ticket:
                continue
            state, given = words[at + Ticket.STATE], words[at + Ticket.INSTANCE]
            if state == Ticket.WAITING:
                self._answer(t, row, Ticket.RESET)
            elif state in (Ticket.GRANTED, Ticket.LOAD):
                # The waiter has not acted upon it yet: take back what it was given, and tell it.
                t.set(at + Ticket.INSTANCE, 0)
                t.set(at + Ticket.STATE, Ticket.RESET)
                self._wake(t, at + Ticket.SIGNAL)
                if state == Ticket.GRANTED:
                    self._take_back_grant(t, given - 1)
                else:
                    self._take_back_permission(t, given - 1)
        for row in tables.used_rows(self.layout.instances):
            at = tables.instance(row)
            if t.is_long:
                return before
            if words[at + Instance.GENERATION] >= newer_generation:
                continue
            if words[at + Instance.STATE] == Instance.ACTIVE:
                # Whoever holds it is told so when it releases: the row will be gone.
                self.end_isolation(t, row)
                self._change_state(t, row, Instance.IDLE)
                t.set(at + Instance.HOLDER, 0)
                if not words[at + Instance.OWNER]:
                    t.set_all(self._pushed(at, row))
            if words[at + Instance.STATE] == Instance.IDLE:
                self.begin_unload(t, row, self._namespace.slot, evicted=False)
            elif words[at + Instance.STATE] == Instance.LOADING:
                self.give_up_load(t, row)
            elif words[at + Instance.STATE] == Instance.SUSPENDED:
                self.suspensions.drop(t, row, self._namespace.slot)
            elif words[at + Instance.STATE] in (Instance.SUSPENDING, Instance.RESUMING):
                self.suspensions.fail(t, row, None, self._namespace.reference)
        for row in np.flatnonzero(tables.view(self.layout.models)[:, Model.FAILURES]).tolist():
            self._forget_failures(t, row)
        t.add(Header.RESETS, 1)
        t.event(EventKind.RESET)
        return None

    def _change_state(self, t: Transaction, row: int, state: int) -> None:
        at = self.tables.instance(row)
        words = self.segment.words
        old = words[at + Instance.STATE]
        model = self.tables.model(words[at + Instance.MODEL])
        self.end_steady(t, row)
        gone, come = set(_MODEL_COUNTERS.get(old, ())), set(_MODEL_COUNTERS.get(state, ()))
        for counter in gone - come:
            t.add(model + counter, -1)
        for counter in come - gone:
            t.add(model + counter, 1)
        if old in _HEADER_COUNTERS:
            t.add(_HEADER_COUNTERS[old], -1)
        if state in _HEADER_COUNTERS:
            t.add(_HEADER_COUNTERS[state], 1)
        t.set(at + Instance.STATE, state)
        t.set(at + Instance.SINCE, t.now)

    def _drop(self, t: Transaction, row: int) -> None:
        """Free an instance row in whatever state it is; its memory, if it had any, is on its way back."""
        at = self.tables.instance(row)
        words = self.segment.words
        state = words[at + Instance.STATE]
        if state == Instance.IDLE and not words[at + Instance.OWNER]:
            t.set_all(self._unlinked(at))
        self.end_isolation(t, row)
        for ticket in self.tables.rows_where(self.layout.tickets, Ticket.INSTANCE, row + 1):
            # The copy was handed over or promised, and died before its waiter woke: back into the queue.
            self._wait_again(t, ticket)
        if state not in (Instance.LOADING, Instance.RESUMING):
            self._expect_back(t, row)
        self._change_state(t, row, Instance.FREE)
        self._reconfigure(t, row)
        t.set(self.tables.model(words[at + Instance.MODEL]) + Model.USED_AT, t.now)

    def _wait_again(self, t: Transaction, ticket: int) -> None:
        at = self.tables.ticket(ticket)
        t.set(at + Ticket.INSTANCE, 0)
        t.set(at + Ticket.STATE, Ticket.WAITING)
        t.add(self.tables.model(self.segment.words[at + Ticket.MODEL]) + Model.WAITING, 1)
        t.add(Header.WAITING, 1)

    def _expect_back(self, t: Transaction, row: int) -> None:
        """Account for the memory of a copy that is gone: it is awaited until a sample shows that it is free."""
        words, floats = self.segment.words, self.segment.floats
        if words[Header.SOURCE_BOOKS_ONLY]:
            return
        for number, mb in self.tables.shares_of(row):
            if mb > 0:
                device = self.tables.device(number)
                before_mb = floats[device + Device.USED_MB] if words[device + Device.SAMPLED] else math.nan
                ledger = self.read_ledger(number)
                self._write_ledger(t, number, ledger.awaiting(Return(t.now, mb, before_mb), Device.RETURNS_LENGTH))

    def _pushed(self, at: int, row: int) -> list[tuple[int, int]]:
        """Return the changes that put a shared copy (first word, row) at the head of its model's idle list."""
        head_word = self.tables.model(self.segment.words[at + Instance.MODEL]) + Model.IDLE_HEAD
        head = self.segment.words[head_word]
        changes = [(at + Instance.NEXT, head), (at + Instance.PREVIOUS, 0), (head_word, row + 1)]
        if head:
            changes.append((self.tables.instance(head - 1) + Instance.PREVIOUS, row + 1))
        return changes

    def _unlinked(self, at: int) -> list[tuple[int, int]]:
        """Return the changes that take a shared copy (first word) out of its model's idle list."""
        words = self.segment.words
        following, previous = words[at + Instance.NEXT], words[at + Instance.PREVIOUS]
        if previous:
            changes = [(self.tables.instance(previous - 1) + Instance.NEXT, following)]
        else:
            changes = [(self.tables.model(words[at + Instance.MODEL]) + Model.IDLE_HEAD, following)]
        if following:
            changes.append((self.tables.instance(following - 1) + Instance.PREVIOUS, previous))
        return changes

    # ---- devices -------------------------------------------------------------------------------------------

    def describe_devices(
        self,
        t: Transaction,
        devices: Sequence[tuple[bytes, bytes, float]],
        replace: bool = False,
        measured: bool = True,
    ) -> list[int]:
        """Give each of the devices, (uuid, name, total MB), a row; return the rows. Figures of one that stays are kept.

        replace: rows of other devices are freed; else they stay, because other processes may see other devices.
        measured: the caller's source can measure them. Then one that has only been stated so far, and has copies that
            must really lie on one of these, stays for those copies and takes no further ones.
        Raises TableFullError when there are more devices than rows.
        """
        table = self.layout.devices
        there = {self.tables.text(self.tables.device(row) + Device.UUID): row for row in self.tables.used_rows(table)}
        if replace:
            for uuid, row in list(there.items()):
                if uuid not in {uuid for uuid, _, _ in devices} and not self._is_in_use(row):
                    t.set(self.tables.device(row) + Device.STATE, 0)
                    del there[uuid]
                elif uuid not in {uuid for uuid, _, _ in devices} and measured and self._is_only_stated(row):
                    t.set_float(self.tables.device(row) + Device.TOTAL_MB, 0.0)
        free = [row for row in range(table.capacity) if row not in there.values()]
        new = [uuid for uuid, _, _ in devices if uuid not in there]
        if len(new) > len(free):
            raise TableFullError(
                f"the source reports {len(devices)} devices, the devices table has {table.capacity} rows; "
                "create the namespace with a larger Capacities.devices",
                table="devices",
                capacity=table.capacity,
                setting="Capacities.devices",
            )
        there.update(zip(new, free, strict=False))
        for uuid, name, total_mb in devices:
            at = self.tables.device(there[uuid])
            if uuid in new:
                t.set_all([(at + word, 0) for word in range(Device.STATE, Device.UUID)])
                t.set_text(at + Device.UUID, uuid)
                t.set_text(at + Device.NAME, name)
                t.set_float(at + Device.EXTERNAL_MB, math.nan)
                t.set_float(at + Device.EXTERNAL_LEAST_MB, math.nan)
                t.set(at + Device.CONFIGURED_AT, t.now)
                t.set(at + Device.STATE, 1)
            t.set_float(at + Device.TOTAL_MB, total_mb)
            t.set(at + Device.MEASURED, int(measured))
        return [there[uuid] for uuid, _, _ in devices]

    def forget_stated_device(self, t: Transaction, row: int) -> None:
        """Free the row of a device without a total, once nothing lies there any more; see `describe_devices`."""
        if self._is_only_stated(row) and not self._is_in_use(row):
            t.set(self.tables.device(row) + Device.STATE, 0)

    def _is_only_stated(self, device: int) -> bool:
        return not self.segment.words[self.tables.device(device) + Device.MEASURED]

    def _is_in_use(self, device: int) -> bool:
        return bool(self.tables.on_device(device))

    def note_try(self, t: Transaction, row: int, taken_ns: int) -> None:
        """Record that somebody has tried to take a figure of a device."""
        t.set(self.tables.device(row) + Device.TRIED, taken_ns)

    def note_foreign(self, t: Transaction, row: int, mb: float) -> None:
        """Record what processes that are not the namespace's take of a device; to be called before `sample`."""
        t.set_float(self.tables.device(row) + Device.FOREIGN_MB, mb)

    def is_news(self, row: int, taken_ns: int) -> bool:
        """Tell whether a sample that was begun at `taken_ns` is later than what is known of a device."""
        return taken_ns >= self.segment.words[self.tables.device(row) + Device.SAMPLED]

    def sample(self, t: Transaction, row: int, used_mb: float, taken_ns: int, done_ns: int = 0) -> bool:
        """Record a device's figure that was asked for at `taken_ns`; return False if it is too old to say anything.

        To be called after `measure` for the processes of the same sample.
        done_ns: when the figure was there, 0 for now.
        """
        if not self.is_news(row, taken_ns):
            return False
        floats = self.segment.floats
        at = self.tables.device(row)
        t.set_float(at + Device.USED_MB, used_mb)
        t.set(at + Device.SAMPLED, taken_ns)
        slot = self.segment.words[at + Device.RING_NEXT]
        entry = at + Device.RING + 2 * slot
        t.set(entry, taken_ns)
        t.set_float(entry + 1, used_mb)
        t.set(at + Device.RING_NEXT, (slot + 1) % Device.RING_LENGTH)
        t.set_float(at + Device.PEAK_MB, self.peak_since(row, self.segment.words[at + Device.PEAK_RESET]))
        if used_mb > floats[at + Device.HIGHEST_MB]:
            t.set_float(at + Device.HIGHEST_MB, used_mb)
        self._settle(t, row, Figure(used_mb, taken_ns, done_ns or t.now, floats[at + Device.FOREIGN_MB]))
        return True

    def measure(self, t: Transaction, slot: int, on_devices: Mapping[int, float], taken_ns: int | None = None) -> None:
        """Record the memory of one process, by device, and with it what the copy of a model server takes.

        taken_ns: when the figure was asked for, None for now. One from before a copy was suspended or resumed says
        nothing of it.
        """
        words, floats = self.segment.words, self.segment.floats
        at = self.tables.member(slot)
        row = words[at + Member.INSTANCE]
        instance = self.tables.instance(row - 1) if row else 0
        serves = instance and words[instance + Instance.SERVER] == slot + 1
        # What a model server has elsewhere than where it was sent is in no reservation.
        devices = device_rows(words[instance + Instance.DEVICES]) if serves else list(on_devices)
        shares_mb = [on_devices.get(device, 0.0) for device in devices]
        mb = math.fsum(shares_mb)
        self._update_float(t, at + Member.MEASURED_MB, mb)
        if mb > floats[at + Member.PEAK_MB]:
            t.set_float(at + Member.PEAK_MB, mb)
        if not serves:
            return
        if len(shares_mb) > 1:
            for number, share_mb in enumerate(shares_mb):
                self._update_float(t, at + Member.SHARES + number, share_mb)
        state = words[instance + Instance.STATE]
        if state == Instance.SUSPENDED and not self._is_from_before(taken_ns, words[instance + Instance.SINCE]):
            # What it keeps there, its context say.
            self._set_mb(t, row - 1, mb, shares_mb)
        if words[instance + Instance.WAY] and self._is_from_before(taken_ns, words[instance + Instance.LOADED_AT]):
            return
        if state in (Instance.ACTIVE, Instance.IDLE):
            self._set_mb(t, row - 1, mb, shares_mb)
            # Of what spans several devices each has to have room for the largest share.
            self._raise_estimate(t, words[instance + Instance.MODEL], max(shares_mb) * len(shares_mb))

    @staticmethod
    def _is_from_before(taken_ns: int | None, event_ns: int) -> bool:
        return taken_ns is not None and taken_ns < event_ns

    def _raise_estimate(self, t: Transaction, model: int, mb: float) -> None:
        """Let a model be taken for what one of its servers takes, before another load goes by less."""
        at = self.tables.model(model)
        known_mb = self.segment.floats[at + Model.ESTIMATE_MB] if self.segment.words[at + Model.KNOWN] else 0.0
        if mb > known_mb * (1.0 + ESTIMATE_TOLERANCE):
            self.estimate(t, model, mb, measured=True)

    def reset_peaks(self, t: Transaction, devices: int | None = None) -> None:
        """Let the peaks of these devices (bits), or of all, begin anew at the present figures."""
        now = t.now
        for row in self.tables.used_rows(self.layout.devices) if devices is None else device_rows(devices):
            at = self.tables.device(row)
            t.set(at + Device.PEAK_RESET, now)
            t.set_float(at + Device.PEAK_MB, self.segment.floats[at + Device.USED_MB])

    def peak_since(self, row: int, since_ns: int) -> float:
        """Return the highest figure of a device in the window, or since `since_ns` if that is later."""
        at = self.tables.device(row)
        oldest = time.monotonic_ns() - to_ns(self._namespace.settings.peak_window_seconds)
        ring = at + Device.RING
        end = ring + 2 * Device.RING_LENGTH
        times = np.array(self.segment.words[ring:end:2])
        figures = np.array(self.segment.floats[ring + 1 : end : 2])
        recent = figures[(times >= max(oldest, since_ns)) & (times > 0)]
        return float(recent.max()) if len(recent) else self.segment.floats[at + Device.USED_MB]

    # ---- the devices' ledgers, see `policy.ledger` -----------------------------------------------------------

    def read_ledger(self, device: int) -> Ledger:
        """Return the ledger of a device (row)."""
        words, floats, at = self.segment.words, self.segment.floats, self.tables.device(device)
        first = at + Device.RETURNS
        entries = range(first, first + words[at + Device.RETURN_COUNT] * Device.RETURN_WORDS, Device.RETURN_WORDS)
        returns = tuple(Return(words[entry], floats[entry + 1], floats[entry + 2]) for entry in entries)
        return Ledger(floats[at + Device.EXTERNAL_MB], floats[at + Device.EXTERNAL_LEAST_MB], returns)

    def _write_ledger(self, t: Transaction, device: int, ledger: Ledger) -> None:
        at = self.tables.device(device)
        changes = [
            (at + Device.EXTERNAL_MB, float_bits(ledger.external_mb)),
            (at + Device.EXTERNAL_LEAST_MB, float_bits(ledger.external_least_mb)),
            (at + Device.RETURNING_MB, float_bits(ledger.returning_mb)),
            (at + Device.RETURN_COUNT, len(ledger.returns)),
        ]
        entry = at + Device.RETURNS
        for one in ledger.returns:
            changes += [(entry, one.ended_ns), (entry + 1, float_bits(one.mb)), (entry + 2, float_bits(one.before_mb))]
            entry += Device.RETURN_WORDS
        t.set_all(changes)

    def expire_returns(self, t: Transaction) -> None:
        """Stop waiting for memory that no sample tells about: a source that does not answer holds up nobody."""
        words = self.segment.words
        give_up_ns = self._give_up_ns()
        for device in self.tables.used_rows(self.layout.devices):
            at = self.tables.device(device)
            if words[at + Device.RETURN_COUNT]:
                ledger = self.read_ledger(device)
                left = expire(ledger, words[at + Device.SAMPLED], t.now, give_up_ns)
                if left is not ledger:
                    self._write_ledger(t, device, left)

    def _settle(self, t: Transaction, device: int, figure: Figure) -> None:
        """Let a sample correct a device's ledger."""
        before = self.read_ledger(device)
        late = bool(self.segment.words[Header.SOURCE_SETTLES_LATE])
        after = settle(before, figure, self._entries(device, figure), t.now, self._give_up_ns(), late)
        self._write_ledger(t, device, after)
        if after.written_off_mb:
            t.add_float(Header.WRITTEN_OFF, after.written_off_mb)
            t.event(EventKind.WRITTEN_OFF, value=after.written_off_mb)
            t.after.append(
                partial(
                    _LOG.warning,
                    "mpmm %s: %.0f MB of %.0f MB that were unloaded did not come back in time and are written off; "
                    "memory_return_seconds sets the limit",
                    self._namespace.name,
                    after.written_off_mb,
                    before.returning_mb,
                )
            )

    def _give_up_ns(self) -> int:
        return to_ns(self._namespace.settings.memory_return_seconds)

    def _entries(self, device: int, figure: Figure) -> list[Entry]:
        """Return what each instance and lease on a device may have had of it when a sample was taken."""
        return [self._entry(row, device, figure) for row in self.tables.on_device(device)]

    def _entry(self, row: int, device: int, figure: Figure) -> Entry:
        words, floats, at = self.segment.words, self.segment.floats, self.tables.instance(row)
        state, span = words[at + Instance.STATE], words[at + Instance.DEVICES].bit_count()
        if state == Instance.LEASED:
            if words[at + Instance.PROGRAM] and words[Header.SOURCE_MEASURES_PROCESSES]:
                mb = floats[at + Instance.MB] / span
                return Entry(mb, mb, True)
            # What a lease's program takes may come and go at any time.
            return Entry(0.0, floats[at + Instance.RESERVED_MB] / span)
        measured_mb = self.measured_share(row, device)
        if measured_mb is not None:
            return Entry(measured_mb, measured_mb, True)
        if words[Header.SOURCE_COUNTS_NAMED]:
            # It is in memory, but in none of the processes that the figure is about.
            return Entry(0.0, 0.0, True)
        if state in (Instance.LOADING, Instance.RESUMING):
            began_later = words[at + Instance.SINCE] > figure.done_ns
            return Entry(0.0, 0.0 if began_later else floats[at + Instance.RESERVED_MB] / span)
        mb = dict(self.tables.shares_of(row))[device]
        loaded = 0 < words[at + Instance.LOADED_AT] <= figure.taken_ns
        going = state in (Instance.UNLOADING, Instance.SUSPENDING)
        leaves = going and words[at + Instance.SINCE] <= figure.done_ns
        return Entry(mb if loaded and not leaves else 0.0, mb)

    def measured_share(self, row: int, device: int) -> float | None:
        """Return what the source has measured that an instance's server takes of a device; None if it does not tell."""
        words, floats, at = self.segment.words, self.segment.floats, self.tables.instance(row)
        server = words[at + Instance.SERVER]
        if not server or not words[Header.SOURCE_MEASURES_PROCESSES]:
            return None
        member = self.tables.member(server - 1)
        if words[member + Member.INSTANCE] != row + 1 or math.isnan(floats[member + Member.MEASURED_MB]):
            return None
        devices = device_rows(words[at + Instance.DEVICES])
        word = Member.SHARES + devices.index(device) if len(devices) > 1 else Member.MEASURED_MB
        return floats[member + word]

    # ---- observations --------------------------------------------------------------------------------------

    def observe(
        self, t: Transaction, copies: Sequence[tuple[int, int]], reading_mb: float, device: int | None = None
    ) -> None:
        """Add a reading of the memory that these (model generation, copies) took together on a device (row).

        A configuration of more than `Observation.PAIRS_LENGTH` models is not kept. When the table is full the
        configuration that was seen longest ago makes room.
        """
        pairs = sorted(generation << 16 | count for generation, count in copies)
        if not 0 < len(pairs) <= Observation.PAIRS_LENGTH:
            return
        table = self.layout.observations
        rows = self.tables.view(table)
        reference = 0 if device is None else device + 1
        same = (rows[:, Observation.PAIRS_USED] == len(pairs)) & (rows[:, Observation.DEVICE] == reference)
        candidates = np.flatnonzero((rows[:, Observation.STATE] == 1) & same)
        wanted = np.array(pairs, dtype=np.uint64)
        first = Observation.PAIRS
        for candidate in candidates.tolist():
            if np.array_equal(rows[candidate, first : first + len(pairs)], wanted):
                row = candidate
                break
        else:
            row = int(np.argmin(np.where(rows[:, Observation.STATE] == 0, 0, rows[:, Observation.UPDATED])))
            at = table.base + row * Observation.WORDS
            t.set(at + Observation.COUNT, 0)
            t.set(at + Observation.NEXT, 0)
            t.set(at + Observation.PAIRS_USED, len(pairs))
            t.set(at + Observation.DEVICE, reference)
            for offset, pair in enumerate(pairs):
                t.set(at + first + offset, pair)
            t.set(at + Observation.STATE, 1)
        at = table.base + row * Observation.WORDS
        words = self.segment.words
        slot = words[at + Observation.NEXT]
        t.set_float(at + Observation.READINGS + slot, reading_mb)
        t.set(at + Observation.NEXT, (slot + 1) % Observation.READINGS_KEPT)
        t.set(at + Observation.COUNT, min(words[at + Observation.COUNT] + 1, Observation.READINGS_KEPT))
        t.set(at + Observation.UPDATED, t.now)
        t.add(Header.OBSERVATIONS_MADE, 1)

    def note_solution(self, t: Transaction, observations_made: int) -> None:
        """Record which observations the last solution has seen."""
        t.set(Header.SOLVED_AT, observations_made)

    # ---- helpers -------------------------------------------------------------------------------------------

    def _hold_mean(self, model: int, held: float, used: bool) -> int:
        """Return the word for the mean time that copies of a model (first word) are held."""
        word = model + Model.HOLD_S
        return self._smoothed(word, held) if used else self.segment.words[word]

    def _smoothed(self, word: int, seconds: float) -> int:
        """Return the word for a decaying mean of durations, to which `seconds` is added."""
        old = self.segment.floats[word]
        return float_bits(old + SMOOTHING * (seconds - old) if old else max(seconds, 1e-9))

    def _model_reference(self, row: int) -> int:
        return int(self.segment.words[self.tables.instance(row) + Instance.MODEL]) + 1

    def _take_row(self, t: Transaction, table: Table) -> int:
        """Return a free row for the caller to fill. Raises TableFullError."""
        row = self.tables.free_row(table)
        self._grow(t, table, row)
        return row

    def _grow(self, t: Transaction, table: Table, row: int) -> None:
        if row >= self.segment.words[table.end_word]:
            t.set(table.end_word, row + 1)

    def _next_generation(self, t: Transaction) -> int:
        generation = int(self.segment.words[Header.NEXT_GENERATION])
        t.set(Header.NEXT_GENERATION, generation + 1)
        return generation

    def _wake(self, t: Transaction, word: int) -> None:
        t.add(word, 1)
        t.after.append(partial(wake_all, self.segment.address + 8 * word))
