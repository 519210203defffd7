"""A process dies at every store of every operation that writes the segment.

Each *transition* (a public method of a part of `Transitions`) is run in a forked child that keeps an image of the
segment before its first, second, … n-th store: what a child that is killed there leaves. Some children are in fact
killed, with SIGKILL, and must have left that image bit by bit. From each image another process takes the lock, and must
find the words as they were before the operation or as they are after it, bit by bit. The list of operations comes from
the classes, so that a transition without a scenario fails the test.

Then the same for whole calls of the manager, where the survivor must also be able to go on; and the creation of a
namespace, and the calls that make and remove files, are killed at every store indeed, since an image has no files.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import CRASH_POINTS

import mpmm
from mpmm import ModelManager
from mpmm.model_manager import acquire
from mpmm.model_manager.session import Session
from mpmm.policy.suspension import Unsuspendable, Way
from mpmm.policy.view import Reason
from mpmm.shared_state.core import CORE_VARIABLE
from mpmm.shared_state.events import Cause
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Capacities, Device, Event, Header, Member, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import Segment
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction, TransactionLock
from mpmm.shared_state.transitions import Transitions
from mpmm.shared_state.transitions.part import Part

Operation = Callable[[Transaction, Transitions], object]

SMALL = Capacities(members=6, models=4, instances=6, tickets=6, pins=4, devices=2, observations=3, events=32, undo=4096)
FROZEN_NS = 10**15  # the children's clock: a second run of an operation stores the same times
KILLED = -signal.SIGKILL


class KillAt:
    """Words that kill the process at the n-th store, before it is made."""

    def __init__(self, words: Any, store: int) -> None:
        self._words = words
        self._left = store

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._words[index] = value

    def release(self) -> None:
        self._words.release()


class KeepImages:
    """Words of which an image is kept before each store."""

    def __init__(self, words: Any, segment: Segment, path: Path) -> None:
        self._words = words
        self._segment = segment
        # The file lasts until the process ends.
        self._images = path.open("wb", buffering=0)

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._images.write(self._segment.copy())
        self._words[index] = value

    def release(self) -> None:
        self._words.release()


def images_in(path: Path, size: int) -> list[bytes]:
    """Return the images that `KeepImages` has written: the n-th is of the time before the n-th store."""
    kept = path.read_bytes()
    # The end of the process may have cut another thread off in the last one.
    return [kept[at : at + size] for at in range(0, len(kept) - size + 1, size)]


def some_of(stores: int) -> set[int]:
    """Return some of the store numbers 1 to `stores`: the first, the last, and one that lies between them."""
    return {1, (stores + 1) // 2, stores}


def run_in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child; return its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Lab:
    """A namespace whose state can be saved, restored and compared, and in which children die."""

    def __init__(self, name: str) -> None:
        self.namespace = Namespace.join(name, capacities=SMALL, settings=Settings(memory_return_seconds=0.0))
        self.segment = self.namespace.segment
        self.words = self.segment.words
        self.layout = self.segment.layout
        self.tables = self.namespace.tables
        self.do(self._populate)

    def _populate(self, t: Transaction, tr: Transitions) -> None:
        tr.devices.describe(t, [(b"uuid-0", b"gpu 0", 1000.0), (b"uuid-1", b"gpu 1", 1000.0)])
        tr.members.lead(t, 0, b"test", (True, False, False))
        tr.members.join(t, self.victim, Member.WORKER, 4242, 1, b"victim")
        tr.members.join(t, self.server, Member.SERVER, 4243, 2, b"server of a")

    victim = 1
    server = 2

    def do(self, operation: Operation) -> Any:
        """Run an operation in this process."""
        with self.namespace.transaction() as t:
            return operation(t, self.namespace.transitions)

    def model(self, tag: str = "a", known: bool = True) -> int:
        """Make a model row."""
        row: int = self.do(lambda t, tr: tr.models.claim(t, tag, tag.encode()))
        if known:
            self.do(lambda t, tr: tr.estimates.estimate(t, row, 100.0, measured=False))
        return row

    def loading(self, tag: str = "a", alone: bool = False) -> int:
        """Make an instance that the victim loads."""
        model = self.model(tag)
        row: int = self.do(lambda t, tr: tr.loads.begin(t, model, self.victim, 1, 100.0, alone))
        return row

    def active(self, tag: str = "a", handle: bytes = b"h", server: bool = False, alone: bool = False) -> int:
        """Make an instance that the victim holds."""
        row = self.loading(tag, alone)
        if server:
            self.do(lambda t, tr: tr.loads.link_server(t, row, self.server))
        kept = self.server + 1 if server else 0
        self.do(lambda t, tr: tr.loads.end(t, row, handle, 90.0, kept, server))
        return row

    def idle(self, tag: str = "a", handle: bytes = b"h", server: bool = False) -> int:
        """Make an idle instance."""
        row = self.active(tag, handle, server)
        self.do(lambda t, tr: tr.holds.release(t, row))
        return row

    def unloading(self, tag: str = "a") -> int:
        """Make an instance that the victim unloads."""
        row = self.idle(tag)
        self.do(lambda t, tr: tr.unloads.begin(t, row, self.victim, evicted=True))
        return row

    def sleeper(self, tag: str = "a", server: bool = False, handle: bytes = b"h") -> int:
        """Make an idle instance that can be suspended."""
        row = self.idle(tag, handle, server)
        self.do(lambda t, tr: tr.suspensions.note_way(t, row, Way.COOPERATIVE))
        return row

    def suspending(self, tag: str = "a", server: bool = False) -> int:
        """Make an instance that the victim suspends."""
        row = self.sleeper(tag, server)
        self.do(lambda t, tr: tr.suspensions.begin(t, row, self.victim, evicted=True))
        return row

    def suspended(self, tag: str = "a", server: bool = False) -> int:
        """Make a suspended instance."""
        row = self.suspending(tag, server)
        self.do(lambda t, tr: tr.suspensions.end(t, row))
        return row

    def resuming(self, tag: str = "a", server: bool = False) -> int:
        """Make an instance that the victim resumes."""
        row = self.suspended(tag, server)
        self.do(lambda t, tr: tr.suspensions.begin_resume(t, row, self.victim))
        return row

    def ticket(self, tag: str = "a", known: bool = True) -> int:
        """Let the victim wait."""
        model = self.model(tag, known)
        row: int = self.do(lambda t, tr: tr.tickets.enqueue(t, model, self.victim, 1, 100.0, 2**62))
        return row

    def lease_ticket(self) -> int:
        """Let the victim wait for a lease."""
        row: int = self.do(
            lambda t, tr: tr.tickets.enqueue(t, tr.leases.claim(t, b"lease", 70.0), self.victim, 1, 70.0, 2**62)
        )
        return row

    def lease(self) -> int:
        """Make the model row of a lease that the victim waits for."""
        row = self.lease_ticket()
        return int(self.words[self.tables.ticket(row) + Ticket.MODEL])

    def leased(self) -> int:
        """Make a lease that the victim holds."""
        ticket = self.lease_ticket()
        row: int = self.do(lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 70.0, alone=False))
        self.do(lambda t, tr: tr.hand_over.consume_answer(t, ticket))
        return row

    def without_pids(self, image: bytes) -> bytes:
        """Return an image without what tells one child from the next: who held the lock, who made the events."""
        copied = bytearray(image)
        words, events = memoryview(copied).cast("Q"), self.layout.events
        for word in (Header.LOCK_HOLDER, Header.LOCK_TAKEN, *range(events.base + Event.PID, events.end, Event.WORDS)):
            words[word] = 0
        return bytes(copied)

    def save(self) -> bytes:
        """Return the whole segment."""
        return self.segment.copy()

    def restore(self, saved: bytes) -> None:
        """Put the segment back."""
        self.words[:] = memoryview(saved).cast("Q")

    def comparable(self) -> bytes:
        """Return the state without what is written raw or outside of what an operation promises."""
        copied = bytearray(self.segment.copy())
        words = memoryview(copied).cast("Q")
        for word in (Header.CHANGE, Header.LOCK_HOLDER, Header.LOCK_TAKEN, Header.ROLLBACKS):
            words[word] = 0
        for table in (self.layout.undo, self.layout.events):
            copied[8 * table.base : 8 * table.end] = bytes(8 * (table.end - table.base))
        # A rolled-back event may stand in the ring, but the number of events does not count it.
        return bytes(copied)

    def images(self, operation: Operation | None, path: Path) -> list[bytes]:
        """Run an operation (None: only the recovery) in a child; return an image of the time before each store."""
        assert self.child(operation, lambda words: KeepImages(words, self.segment, path)) == 0
        return images_in(path, self.layout.size_bytes)

    def killed_at(self, operation: Operation | None, store: int) -> bytes:
        """Run an operation (None: only the recovery) in a child that is killed at a store; return what it leaves."""
        assert self.child(operation, lambda words: KillAt(words, store)) == KILLED
        return self.save()

    def child(self, operation: Operation | None, wrap: Callable[[Any], Any]) -> int:
        """Run an operation (None: only the recovery) in a child whose stores go through `wrap(words)`."""

        def action() -> None:
            time.monotonic_ns = lambda: FROZEN_NS
            lock = TransactionLock(self.segment, 5.0)
            lock.intercept_stores(wrap)
            tables = Tables(self.segment)
            actor = _Actor(self.victim, self.namespace.settings)
            with lock() as t:
                if operation is not None:
                    operation(t, Transitions(tables, actor))

        return run_in_child(action)

    def recover(self) -> None:
        """Take the lock, as the next process does, and change nothing."""
        with self.namespace.transaction():
            pass

    def problems(self) -> list[str]:
        """Check the invariants."""
        return check_invariants(read_snapshot(self.namespace.name))


@dataclass(frozen=True)
class _Actor:
    """A member that is no process."""

    slot: int
    settings: Settings
    name: str = "lab"


def scenarios() -> dict[str, Callable[[Lab], Operation]]:
    """Return how to prepare each transition, under its name; several for one transition as `name/variant`."""

    def claimed_when_full(lab: Lab) -> Operation:
        for tag in "abcd":
            lab.model(tag)
        return lambda t, tr: tr.models.claim(t, "new", b"new")

    def reaped(lab: Lab) -> Operation:
        lab.idle("a", b"", server=False)  # owned by the victim
        lab.active("a", b"h1", server=False)
        loading = lab.loading("b")
        lab.do(lambda t, tr: tr.loads.link_server(t, loading, lab.server))
        lab.unloading("c")
        lab.ticket("a")
        lab.do(lambda t, tr: tr.members.lead(t, lab.victim, b"test", (True, False, False)))
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def reaped_isolated(lab: Lab) -> Operation:
        lab.loading("a", alone=True)
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def reaped_with_answers(lab: Lab) -> Operation:
        lab.idle("a")
        waiting = lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.grant(t, waiting, 0))
        allowed = lab.ticket("b")
        lab.do(lambda t, tr: tr.hand_over.allow_load(t, allowed, 1, 50.0, alone=False))
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def reaped_server(lab: Lab) -> Operation:
        lab.idle("a", server=True)
        return lambda t, tr: tr.members.reap(t, lab.server)

    def reset_all(lab: Lab) -> Operation:
        lab.idle("a")
        lab.active("a")
        lab.loading("b")
        lab.ticket("c")
        lab.do(lambda t, tr: tr.models.note_failure(t, 1))
        return lambda t, tr: tr.reset(t)

    def granted(lab: Lab) -> Operation:
        lab.idle("a", b"h1")
        copy = lab.idle("a", b"h2")
        ticket = lab.ticket("a")
        return lambda t, tr: tr.hand_over.grant(t, ticket, copy)

    def passed_on(lab: Lab) -> Operation:
        copy = lab.idle("a")
        lab.do(lambda t, tr: tr.holds.take_idle(t, copy, Lab.victim + 1))
        ticket = lab.ticket("a")
        return lambda t, tr: tr.hand_over.from_holder(t, ticket, copy, Cause(Reason.IDLE_COPY))

    def answered(lab: Lab) -> Operation:
        copy, ticket = lab.idle("a"), lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.grant(t, ticket, copy))
        return lambda t, tr: tr.hand_over.consume_answer(t, ticket)

    def left_with_load(lab: Lab) -> Operation:
        ticket = lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 50.0, alone=True))
        return lambda t, tr: tr.hand_over.leave_queue(t, ticket)

    def left_with_grant(lab: Lab) -> Operation:
        copy, ticket = lab.idle("a"), lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.grant(t, ticket, copy))
        return lambda t, tr: tr.hand_over.leave_queue(t, ticket)

    def released_between_idle(lab: Lab) -> Operation:
        lab.idle("a", b"h1")
        copy = lab.active("a", b"h2")
        return lambda t, tr: tr.holds.release(t, copy)

    def released_alone(lab: Lab) -> Operation:
        copy = lab.active("a", alone=True)
        return lambda t, tr: tr.holds.release(t, copy)

    def released_doomed(lab: Lab) -> Operation:
        copy = lab.active("a", server=True)
        lab.do(lambda t, tr: tr.members.reap(t, lab.server))
        return lambda t, tr: tr.holds.release(t, copy)

    def given_up_with_server(lab: Lab) -> Operation:
        copy = lab.loading("a", alone=True)
        lab.do(lambda t, tr: tr.loads.link_server(t, copy, lab.server))
        return lambda t, tr: tr.loads.give_up(t, copy)

    def discarded_promised(lab: Lab) -> Operation:
        copy, ticket = lab.idle("a"), lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.grant(t, ticket, copy))
        return lambda t, tr: tr.holds.discard(t, copy)

    def sampled_after_load(lab: Lab) -> Operation:
        lab.active("a")
        lab.do(lambda t, tr: tr.devices.sample(t, 0, 10.0, 5))
        now = time.monotonic_ns()
        return lambda t, tr: tr.devices.sample(t, 0, 200.0, now)

    def returning(lab: Lab) -> int:
        """Let the memory of a copy be awaited that has ended while a figure of 500 MB stood."""
        copy = lab.unloading("a")
        lab.do(lambda t, tr: tr.members.lead(t, 0, b"test", (False, True, False)))
        lab.do(lambda t, tr: tr.devices.sample(t, 0, 500.0, 5))
        lab.do(lambda t, tr: tr.unloads.end(t, copy))
        return time.monotonic_ns()

    def returned(lab: Lab) -> Operation:
        now = returning(lab)
        return lambda t, tr: tr.devices.sample(t, 0, 400.0, now)

    def returned_late(lab: Lab) -> Operation:
        now = returning(lab)
        lab.do(lambda t, tr: t.set(lab.tables.device(0) + Device.RETURNS, 1))
        return lambda t, tr: tr.devices.sample(t, 0, 501.0, now)

    def not_sampled_since(lab: Lab) -> Operation:
        returning(lab)
        lab.do(lambda t, tr: t.set(lab.tables.device(0) + Device.RETURNS, 6))
        return lambda t, tr: tr.ledgers.expire(t)

    def observed_again(lab: Lab) -> Operation:
        lab.do(lambda t, tr: tr.estimates.observe(t, [(7, 1), (9, 2)], 10.0))
        return lambda t, tr: tr.estimates.observe(t, [(9, 2), (7, 1)], 11.0)

    def observed_when_full(lab: Lab) -> Operation:
        for generation in (7, 8, 9):
            lab.do(lambda t, tr, g=generation: tr.estimates.observe(t, [(g, 1)], 10.0))  # type: ignore[misc]  # mypy has no type for a lambda's default
        return lambda t, tr: tr.estimates.observe(t, [(10, 1)], 11.0)

    def allowed_lease(lab: Lab) -> Operation:
        ticket = lab.lease_ticket()
        return lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 70.0, alone=False)

    def granted_lease(lab: Lab) -> int:
        ticket = lab.lease_ticket()
        lab.do(lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 70.0, alone=False))
        return ticket

    def refused_lease(lab: Lab) -> int:
        ticket = lab.lease_ticket()
        lab.do(lambda t, tr: tr.tickets.refuse(t, ticket))
        return ticket

    def pinned(lab: Lab) -> int:
        model = lab.model()
        return int(lab.do(lambda t, tr: tr.pins.pin(t, model, lab.victim)))

    def reaped_with_pins(lab: Lab) -> Operation:
        pinned(lab)
        other = lab.model("b")
        lab.do(lambda t, tr: tr.pins.pin(t, other, lab.victim))
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def preloading(lab: Lab) -> int:
        model = lab.model(known=False)
        return int(lab.do(lambda t, tr: tr.tickets.enqueue(t, model, lab.victim, 2, 100.0, 2**62, 3)))

    def reaped_with_leases(lab: Lab) -> Operation:
        lab.leased()
        granted_lease(lab)
        lab.lease_ticket()
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def measured(lab: Lab) -> Operation:
        lab.idle("a", server=True)
        return lambda t, tr: tr.measurements.measure(t, lab.server, {0: 77.0})

    def spanning(lab: Lab) -> int:
        model = lab.model()
        row: int = lab.do(lambda t, tr: tr.loads.begin(t, model, lab.victim, 3, 100.0, alone=True))
        lab.do(lambda t, tr: tr.loads.link_server(t, row, lab.server))
        lab.do(lambda t, tr: tr.loads.end(t, row, b"h", 90.0, lab.server + 1, True, shares_mb=(60.0, 30.0)))
        return row

    def measured_on_two(lab: Lab) -> Operation:
        spanning(lab)
        return lambda t, tr: tr.measurements.measure(t, lab.server, {0: 77.0, 1: 11.0})

    def reaped_spanning(lab: Lab) -> Operation:
        spanning(lab)
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def twin_loaded(lab: Lab) -> Operation:
        lab.idle("a", b"h")
        copy = lab.loading("b")
        return lambda t, tr: tr.loads.end(t, copy, b"h", 80.0, 0, False)

    def twins_evicted(lab: Lab) -> Operation:
        copy = lab.active("a", b"h", server=True)
        lab.idle("b", b"h")
        lab.do(lambda t, tr: tr.holds.release(t, copy))
        return lambda t, tr: tr.unloads.begin(t, copy, Lab.victim, evicted=True)

    def twin_in_use(lab: Lab) -> int:
        copy = lab.idle("a", b"h", server=True)
        lab.active("b", b"h")
        return copy

    def told_to_go(lab: Lab) -> int:
        """Make a copy in use that is to be unloaded, whose memory a twin takes over."""
        copy = lab.active("a", b"h", server=True)
        lab.idle("b", b"h")
        lab.do(lambda t, tr: tr.unloads.ask(t, copy, lab.victim))
        return copy

    def steady_ticket(lab: Lab) -> int:
        model = lab.model()
        return int(lab.do(lambda t, tr: tr.tickets.enqueue(t, model, lab.victim, 1, 50.0, 2**62, steady=True)))

    def steady_load(lab: Lab) -> int:
        """Make a load beside which a copy has to wait for its unload."""
        lab.unloading("b")
        ticket = steady_ticket(lab)
        row: int = lab.do(lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 50.0, alone=False))
        lab.do(lambda t, tr: tr.hand_over.consume_answer(t, ticket))
        return row

    def failed_before(lab: Lab) -> Operation:
        model = lab.model()
        lab.do(lambda t, tr: tr.models.note_failure(t, model))
        copy = lab.loading()
        return lambda t, tr: tr.loads.end(t, copy, b"handle", 80.0, 0, False)

    def led_by_the_books(lab: Lab) -> Operation:
        returning(lab)
        return lambda t, tr: tr.members.lead(t, Lab.victim, b"booked", (False, False, True))

    def described_instead_of_stated(lab: Lab) -> Operation:
        lab.do(lambda t, tr: tr.devices.describe(t, [(b"uuid-0", b"gpu 0", 1000.0)], measured=False))
        lab.idle("a")
        return lambda t, tr: tr.devices.describe(t, [(b"uuid-1", b"gpu 1", 2000.0)], replace=True)

    def stated_device_forgotten(lab: Lab) -> Operation:
        lab.do(lambda t, tr: tr.devices.describe(t, [(b"uuid-1", b"gpu 1", 1000.0)], measured=False))
        return lambda t, tr: tr.devices.forget_stated(t, 1)

    def reaped_while_it_moves(prepare: Callable[[Lab], int]) -> Callable[[Lab], Operation]:
        def scenario(lab: Lab) -> Operation:
            prepare(lab)
            return lambda t, tr: tr.members.reap(t, lab.victim)

        return scenario

    def server_reaped(prepare: Callable[..., int]) -> Callable[[Lab], Operation]:
        def scenario(lab: Lab) -> Operation:
            prepare(lab, server=True)
            return lambda t, tr: tr.members.reap(t, lab.server)

        return scenario

    def told_to_resume(lab: Lab) -> int:
        copy, ticket = lab.suspended("a"), lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.allow_resume(t, ticket, copy))
        return ticket

    def dropped(lab: Lab) -> int:
        copy = lab.suspended("a")
        lab.do(lambda t, tr: tr.suspensions.drop(t, copy, Lab.victim))
        return copy

    def doomed(lab: Lab) -> int:
        copy = lab.suspending("a")
        lab.do(lambda t, tr: tr.unloads.ask(t, copy, Lab.victim))
        return copy

    def allowed_to_resume(lab: Lab) -> Operation:
        copy, ticket = lab.suspended("a"), lab.ticket("a")
        return lambda t, tr: tr.hand_over.allow_resume(t, ticket, copy)

    def reset_suspended(lab: Lab) -> Operation:
        lab.suspended("a")
        lab.suspending("b")
        lab.resuming("c")
        return lambda t, tr: tr.reset(t)

    def measured_suspended(lab: Lab) -> Operation:
        lab.suspended("a", server=True)
        return lambda t, tr: tr.measurements.measure(t, lab.server, {0: 5.0})

    def on(prepare: Callable[[Lab], int], operate: Callable[[Transaction, Transitions, int], object]) -> Any:
        def scenario(lab: Lab) -> Operation:
            row = prepare(lab)
            return lambda t, tr: operate(t, tr, row)

        return scenario

    return {
        "members.join": lambda lab: lambda t, tr: tr.members.join(t, 4, Member.WORKER, 4444, 3, b"newcomer"),
        "members.leave": on(
            lambda lab: lab.active() and lab.ticket(), lambda t, tr, _: tr.members.leave(t, Lab.victim)
        ),
        "members.reap": reaped,
        "members.reap/isolated": reaped_isolated,
        "members.reap/answered": reaped_with_answers,
        "members.reap/server": reaped_server,
        "members.reap/leases": reaped_with_leases,
        "members.reap/pins": reaped_with_pins,
        "members.lead": lambda lab: lambda t, tr: tr.members.lead(t, Lab.victim, b"nvml", (True, True, False)),
        "members.lead/by the books": led_by_the_books,
        "members.note_source": lambda lab: lambda t, tr: tr.members.note_source(t, Lab.victim, 2),
        "members.note_poll": lambda lab: lambda t, tr: tr.members.note_poll(t, False),
        "members.note_processes": lambda lab: lambda t, tr: tr.members.note_processes(t, False),
        "members.ring": lambda lab: lambda t, tr: tr.members.ring(t, Lab.victim),
        "models.claim": lambda lab: lambda t, tr: tr.models.claim(t, "new", b"new"),
        "models.claim/recycling": claimed_when_full,
        "estimates.estimate": on(
            lambda lab: lab.ticket(known=False), lambda t, tr, _: tr.estimates.estimate(t, 0, 123.5, measured=True)
        ),
        "estimates.estimate/of a preload": on(
            preloading, lambda t, tr, _: tr.estimates.estimate(t, 0, 123.5, measured=True)
        ),
        "estimates.expect": on(lambda lab: lab.ticket(known=False), lambda t, tr, _: tr.estimates.expect(t, 0, 123.5)),
        "models.keep_alive": on(Lab.model, lambda t, tr, row: tr.models.keep_alive(t, row, 5)),
        "estimates.record_out_of_memory": on(Lab.model, lambda t, tr, row: tr.estimates.record_out_of_memory(t, row)),
        "models.note_failure": on(Lab.model, lambda t, tr, row: tr.models.note_failure(t, row)),
        "loads.end/after failures": failed_before,
        "estimates.record_out_of_memory/loading": on(
            Lab.model, lambda t, tr, row: tr.estimates.record_out_of_memory(t, row, 700.0, loading=True)
        ),
        "pins.pin": on(Lab.model, lambda t, tr, row: tr.pins.pin(t, row, Lab.victim)),
        "pins.pin/for all": on(Lab.model, lambda t, tr, row: tr.pins.pin(t, row, -1)),
        "models.supersede": on(Lab.model, lambda t, tr, row: tr.models.supersede(t, row, True)),
        "pins.unpin": on(pinned, lambda t, tr, row: tr.pins.unpin(t, row)),
        "tickets.answer_enough": on(preloading, lambda t, tr, row: tr.tickets.answer_enough(t, row)),
        "tickets.enqueue/preload": on(
            Lab.model, lambda t, tr, row: tr.tickets.enqueue(t, row, Lab.victim, 2, 9.0, 2**62, 3)
        ),
        "tickets.enqueue/nested": on(
            Lab.model, lambda t, tr, row: tr.tickets.enqueue(t, row, Lab.victim, 0, 9.0, 2**62, nested=True)
        ),
        "tickets.enqueue": on(Lab.model, lambda t, tr, row: tr.tickets.enqueue(t, row, Lab.victim, 0, math.nan, 2**62)),
        "tickets.enqueue/known to wait": on(
            Lab.model,
            lambda t, tr, row: tr.tickets.enqueue(t, row, Lab.victim, 1, 9.0, 2**62, cause=Cause(6, seconds=0.5)),
        ),
        "models.note_demand": on(Lab.model, lambda t, tr, row: tr.models.note_demand(t, row, 0.5, 7, 10**9)),
        "tickets.set_reason": on(
            Lab.ticket, lambda t, tr, row: tr.tickets.set_reason(t, row, Cause(3, 100.0, 50.0, 60.0, 0.5, 1, 1))
        ),
        "tickets.warn": on(Lab.ticket, lambda t, tr, row: tr.tickets.warn(t, row, "waits")),
        "tickets.block": on(Lab.ticket, lambda t, tr, row: tr.tickets.block(t, row)),
        "tickets.call_up": on(Lab.ticket, lambda t, tr, row: tr.tickets.call_up(t, row)),
        "tickets.let_pass": on(Lab.ticket, lambda t, tr, row: tr.tickets.let_pass(t, row)),
        "hand_over.grant": granted,
        "hand_over.from_holder": passed_on,
        "hand_over.allow_load": on(
            Lab.ticket, lambda t, tr, row: tr.hand_over.allow_load(t, row, 1, 50.0, alone=False)
        ),
        "hand_over.allow_load/alone": on(
            Lab.ticket, lambda t, tr, row: tr.hand_over.allow_load(t, row, 1, 50.0, alone=True)
        ),
        "hand_over.allow_load/lease": allowed_lease,
        "hand_over.allow_load/steady": on(
            steady_ticket, lambda t, tr, row: tr.hand_over.allow_load(t, row, 1, 50.0, alone=False)
        ),
        "isolation.end_steady": on(steady_load, lambda t, tr, row: tr.isolation.end_steady(t, row)),
        "loads.end/steady": on(steady_load, lambda t, tr, row: tr.loads.end(t, row, b"h2", 50.0, 0, False)),
        "tickets.refuse": on(Lab.ticket, lambda t, tr, row: tr.tickets.refuse(t, row)),
        "hand_over.consume_answer": answered,
        "hand_over.consume_answer/refused lease": on(
            refused_lease, lambda t, tr, row: tr.hand_over.consume_answer(t, row)
        ),
        "hand_over.leave_queue/lease": on(Lab.lease_ticket, lambda t, tr, row: tr.hand_over.leave_queue(t, row)),
        "hand_over.leave_queue/lease granted": on(granted_lease, lambda t, tr, row: tr.hand_over.leave_queue(t, row)),
        "leases.claim": lambda lab: (
            lambda t, tr: tr.tickets.enqueue(t, tr.leases.claim(t, b"l", 70.0), Lab.victim, 1, 70.0, 9)
        ),
        "leases.begin": on(Lab.lease, lambda t, tr, row: tr.leases.begin(t, row, Lab.victim, 1, 70.0)),
        "leases.link_program": on(Lab.leased, lambda t, tr, row: tr.leases.link_program(t, row, 4711)),
        "leases.measure_program": on(Lab.leased, lambda t, tr, row: tr.leases.measure_program(t, row, 33.0)),
        "leases.end": on(Lab.leased, lambda t, tr, row: tr.leases.end(t, row)),
        "hand_over.leave_queue": on(Lab.ticket, lambda t, tr, row: tr.hand_over.leave_queue(t, row)),
        "hand_over.leave_queue/told to load": left_with_load,
        "hand_over.leave_queue/granted": left_with_grant,
        "loads.begin": on(Lab.model, lambda t, tr, row: tr.loads.begin(t, row, Lab.victim, 1, 100.0, alone=False)),
        "isolation.set_baseline": on(
            lambda lab: lab.loading(alone=True), lambda t, tr, row: tr.isolation.set_baseline(t, row)
        ),
        "loads.link_server": on(Lab.loading, lambda t, tr, row: tr.loads.link_server(t, row, Lab.server)),
        "loads.end": on(Lab.loading, lambda t, tr, row: tr.loads.end(t, row, b"handle", 80.0, 0, False)),
        "loads.end/object": on(Lab.loading, lambda t, tr, row: tr.loads.end(t, row, b"", 80.0, 0, False)),
        "loads.fail": on(Lab.loading, lambda t, tr, row: tr.loads.fail(t, row)),
        "loads.give_up": on(Lab.loading, lambda t, tr, row: tr.loads.give_up(t, row)),
        "loads.give_up/server": given_up_with_server,
        "holds.activate": on(Lab.idle, lambda t, tr, row: tr.holds.activate(t, row, Lab.victim + 1)),
        "holds.take_idle": on(Lab.idle, lambda t, tr, row: tr.holds.take_idle(t, row, Lab.victim + 1)),
        "holds.release": released_between_idle,
        "holds.release/not used": on(Lab.active, lambda t, tr, row: tr.holds.release(t, row, used=False)),
        "holds.release/alone": released_alone,
        "holds.release/doomed": released_doomed,
        "isolation.end": on(lambda lab: lab.active(alone=True), lambda t, tr, row: tr.isolation.end(t, row)),
        "unloads.begin": on(Lab.idle, lambda t, tr, row: tr.unloads.begin(t, row, Lab.victim, evicted=True)),
        "unloads.ask": on(Lab.idle, lambda t, tr, row: tr.unloads.ask(t, row, Lab.victim)),
        "unloads.ask/in use": on(Lab.active, lambda t, tr, row: tr.unloads.ask(t, row, Lab.victim)),
        "unloads.ask/loading": on(Lab.loading, lambda t, tr, row: tr.unloads.ask(t, row, Lab.victim)),
        "holds.release/asked to go": on(told_to_go, lambda t, tr, row: tr.holds.release(t, row)),
        "members.set_settings": lambda lab: lambda t, tr: tr.members.set_settings(t, Settings(slack_percentage=0.3)),
        "loads.end/twin": twin_loaded,
        "unloads.begin/twins idle": twins_evicted,
        "unloads.begin/twin in use": on(twin_in_use, lambda t, tr, row: tr.unloads.begin(t, row, Lab.victim, True)),
        "unloads.hand_over": on(Lab.unloading, lambda t, tr, row: tr.unloads.hand_over(t, row, 0)),
        "unloads.note_late": on(Lab.unloading, lambda t, tr, row: tr.unloads.note_late(t, row)),
        "unloads.end": on(Lab.unloading, lambda t, tr, row: tr.unloads.end(t, row)),
        "holds.discard": on(Lab.active, lambda t, tr, row: tr.holds.discard(t, row)),
        "holds.discard/promised": discarded_promised,
        "reset": reset_all,
        "reset/lease granted": on(granted_lease, lambda t, tr, _: tr.reset(t)),
        "devices.describe": lambda lab: (
            lambda t, tr: tr.devices.describe(t, [(b"uuid-0", b"gpu 0", 2000.0), (b"uuid-1", b"gpu 1", 2000.0)])
        ),
        "devices.describe/others": lambda lab: (
            lambda t, tr: tr.devices.describe(t, [(b"uuid-0", b"gpu 0", 2000.0), (b"mig", b"m", 9.0)], replace=True)
        ),
        "devices.describe/instead of stated ones": described_instead_of_stated,
        "devices.forget_stated": stated_device_forgotten,
        "devices.note_try": lambda lab: lambda t, tr: tr.devices.note_try(t, 0, 10**9),
        "devices.note_unrelated": lambda lab: lambda t, tr: tr.devices.note_unrelated(t, 0, 55.0),
        "measurements.set_measured_mb": on(
            Lab.active, lambda t, tr, row: tr.measurements.set_measured_mb(t, row, 66.0)
        ),
        "loads.begin/spanning": on(
            Lab.model, lambda t, tr, row: tr.loads.begin(t, row, Lab.victim, 3, 90.0, alone=True)
        ),
        "measurements.measure/spanning": measured_on_two,
        "members.reap/spanning": reaped_spanning,
        "devices.sample": sampled_after_load,
        "devices.sample/returned": returned,
        "devices.sample/written off": returned_late,
        "ledgers.expire": not_sampled_since,
        "measurements.measure": measured,
        "devices.reset_peaks": lambda lab: lambda t, tr: tr.devices.reset_peaks(t),
        "estimates.observe": observed_again,
        "estimates.observe/recycling": observed_when_full,
        "estimates.note_solution": lambda lab: lambda t, tr: tr.estimates.note_solution(t, 5),
        "suspensions.note_way": on(Lab.idle, lambda t, tr, row: tr.suspensions.note_way(t, row, Way.COOPERATIVE)),
        "suspensions.expect": on(Lab.model, lambda t, tr, row: tr.suspensions.expect(t, row, 1.5, 0.5)),
        "suspensions.begin": on(Lab.sleeper, lambda t, tr, row: tr.suspensions.begin(t, row, Lab.victim, True)),
        "suspensions.end": on(Lab.suspending, lambda t, tr, row: tr.suspensions.end(t, row)),
        "suspensions.fail": on(
            Lab.suspending, lambda t, tr, row: tr.suspensions.fail(t, row, Unsuspendable.SUSPEND_FAILED)
        ),
        "suspensions.fail/resuming": on(Lab.resuming, lambda t, tr, row: tr.suspensions.fail(t, row, None, 1)),
        "hand_over.allow_resume": allowed_to_resume,
        "suspensions.begin_resume": on(Lab.suspended, lambda t, tr, row: tr.suspensions.begin_resume(t, row, 1)),
        "suspensions.end_resume": on(Lab.resuming, lambda t, tr, row: tr.suspensions.end_resume(t, row)),
        "suspensions.cancel": on(Lab.resuming, lambda t, tr, row: tr.suspensions.cancel(t, row)),
        "suspensions.turn_back": on(Lab.resuming, lambda t, tr, row: tr.suspensions.turn_back(t, row, 1)),
        "suspensions.hand_over": on(Lab.suspending, lambda t, tr, row: tr.suspensions.hand_over(t, row, 0)),
        "suspensions.drop": on(Lab.suspended, lambda t, tr, row: tr.suspensions.drop(t, row, Lab.victim)),
        "unloads.end/suspended before": on(dropped, lambda t, tr, row: tr.unloads.end(t, row)),
        "suspensions.end/doomed": on(doomed, lambda t, tr, row: tr.suspensions.end(t, row)),
        "unloads.ask/suspended": on(Lab.suspended, lambda t, tr, row: tr.unloads.ask(t, row, Lab.victim)),
        "hand_over.leave_queue/told to resume": on(told_to_resume, lambda t, tr, row: tr.hand_over.leave_queue(t, row)),
        "reset/suspended": reset_suspended,
        "reset/told to resume": on(told_to_resume, lambda t, tr, _: tr.reset(t)),
        "members.reap/told to resume": reaped_while_it_moves(told_to_resume),
        "members.reap/suspending": reaped_while_it_moves(Lab.suspending),
        "members.reap/resuming": reaped_while_it_moves(Lab.resuming),
        "members.reap/server suspending": server_reaped(Lab.suspending),
        "members.reap/server suspended": server_reaped(Lab.suspended),
        "members.reap/server resuming": server_reaped(Lab.resuming),
        "measurements.measure/suspended": measured_suspended,
    }


# What parts of `Transitions` do for one another: no change by itself that leaves the invariants as they are to be.
STEPS = {
    "tickets.answer",
    "tickets.stop_waiting",
    "tickets.wait_again",
    "models.take_row",
    "models.forget_failures",
    "estimates.raise_to",
    "ledgers.expect_back",
    "ledgers.await_nothing",
    "ledgers.settle",
    "isolation.begin",
    "isolation.begin_steady",
    "isolation.note_change",
    "twins.part",
    "loads.abandon",
    "leases.forget_spent",
    "hand_over.reset",
    "hand_over.take_back",
}


def transitions_of(transitions: Transitions) -> set[str]:
    """Return every public method of `Transitions` and of its parts that takes a transaction."""
    parts = {f"{name}.": part for name, part in vars(transitions).items() if isinstance(part, Part)}
    return {
        prefix + name
        for prefix, part in {"": transitions, **parts}.items()
        for name, method in inspect.getmembers(part, inspect.ismethod)
        if not prefix.startswith("_") and not name.startswith("_") and "t" in inspect.signature(method).parameters
    }


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))
    lab = Lab("lab")
    yield lab
    lab.namespace.leave()


def test_every_transition_has_a_scenario(lab: Lab) -> None:
    assert {name.partition("/")[0] for name in scenarios()} == transitions_of(lab.namespace.transitions) - STEPS


def test_nobody_takes_a_step_of_a_transition_from_outside() -> None:
    package = Path(mpmm.__file__).parent
    step = re.compile(rf"transitions\.({'|'.join(map(re.escape, STEPS))})\(")
    inside = package / "shared_state" / "transitions"
    assert [
        path for path in package.rglob("*.py") if inside not in path.parents and step.search(path.read_text())
    ] == []


@pytest.mark.parametrize("name", scenarios())
def test_death_at_any_store_leaves_before_or_after(
    lab: Lab, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    operation = scenarios()[name](lab)
    assert lab.problems() == []
    saved, before = lab.save(), lab.comparable()
    images = lab.images(operation, tmp_path / "images")
    after = lab.comparable()
    assert lab.problems() == []
    assert after != before, "the scenario changes nothing"
    done = []
    for store, image in enumerate(images, 1):
        lab.restore(image)
        lab.recover()
        state = lab.comparable()
        assert state in (before, after), f"store {store} of {name} left something in between"
        done.append(state == after)
    # One store empties the log: whoever dies before it leaves the old state, whoever dies after it the new one.
    assert not done[0] and done == sorted(done)
    assert lab.problems() == []
    for store in some_of(len(images)):
        lab.restore(saved)
        left = lab.killed_at(operation, store)
        assert lab.without_pids(left) == lab.without_pids(images[store - 1]), f"killed at store {store}"
        lab.recover()
        assert lab.comparable() == (after if done[store - 1] else before)
    record_property(CRASH_POINTS, len(images))


@pytest.mark.parametrize("name", ["reset", "members.reap", "loads.end", "hand_over.from_holder"])
def test_death_at_any_store_of_the_recovery_leaves_before(
    lab: Lab, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    operation = scenarios()[name](lab)
    before = lab.comparable()
    images = lab.images(operation, tmp_path / "images")
    died = 0
    # The two last stores are the commit's, so the death before them leaves the longest log.
    for died_at in (len(images) - 1, len(images) // 2, 3):
        torn = images[died_at - 1]
        lab.restore(torn)
        recovery = lab.images(None, tmp_path / "recovery")
        assert lab.comparable() == before
        for store, image in enumerate(recovery, 1):
            lab.restore(image)
            lab.recover()
            assert lab.comparable() == before, f"recovery store {store} after store {died_at}"
        for store in some_of(len(recovery)):
            lab.restore(torn)
            left = lab.killed_at(None, store)
            assert lab.without_pids(left) == lab.without_pids(recovery[store - 1])
            lab.recover()
            assert lab.comparable() == before
        died += len(recovery)
    assert lab.problems() == []
    record_property(CRASH_POINTS, died)


class RaiseAt(KillAt):
    """Words that raise an exception at the n-th store, as a signal handler or a full memory would."""

    error: BaseException = KeyboardInterrupt("in the middle of a transaction")

    def __setitem__(self, index: int, value: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise self.error
        self._words[index] = value


def lock_and_run(lock: TransactionLock, transitions: Transitions, operation: Operation) -> None:
    with lock() as t:
        operation(t, transitions)


def raises(error: BaseException, action: Callable[[], object]) -> bool:
    """Tell whether `action` ends with this very exception; any other one passes through."""
    try:
        action()
    except BaseException as caught:
        if caught is not error:
            raise
        return True
    return False


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("now"), MemoryError("now")], ids=lambda error: type(error).__name__
)
def test_an_exception_at_any_store_is_rolled_back_and_reaches_the_caller(
    lab: Lab,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: FROZEN_NS)
    monkeypatch.setattr(RaiseAt, "error", error)
    clean = lab.save()
    lock = TransactionLock(lab.segment, 5.0)
    transitions = Transitions(lab.tables, _Actor(lab.victim, lab.namespace.settings))
    raised = 0
    for name, scenario in scenarios().items():
        lab.restore(clean)
        lab.tables.close()
        operation = scenario(lab)
        saved, before = lab.save(), lab.comparable()
        lock.intercept_stores(lambda words: words)
        with lock() as t:
            operation(t, transitions)
        after = lab.comparable()
        store, finished = 0, False
        while not finished:
            store += 1
            lab.restore(saved)
            lock.intercept_stores(lambda words, store=store: RaiseAt(words, store))  # type: ignore[misc]  # mypy has no type for a lambda's default
            finished = not raises(error, partial(lock_and_run, lock, transitions, operation))
            assert not lock.held_by_this_thread()
            lab.recover()
            assert lab.comparable() in (before, after), f"{name}, store {store}"
        raised += store - 1
    record_property(CRASH_POINTS, raised)
    lock.close()
    lab.restore(clean)


# ---- whole calls of the manager ---------------------------------------------------------------------------------


class SteadyMonitor:
    """A monitor whose device is always half full."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def refresh(self) -> None: ...

    def reset_peak(self) -> None: ...

    def get_stats(self) -> tuple[float, float, float]:
        return 100.0, 100.0, 1000.0


def new_manager() -> ModelManager:
    return ModelManager(
        SteadyMonitor(), namespace="calls", capacities=SMALL, slack_percentage=0.0, wait_timeout_seconds=30.0
    )


def call_acquire_warm(manager: ModelManager) -> None:
    manager.acquire_model("warm", lambda: "never")


def call_acquire_and_load(manager: ModelManager) -> None:
    manager.acquire_model("cold", lambda: "cold handle")


def call_acquire_object(manager: ModelManager) -> None:
    manager.acquire_model("cold", object)


def call_acquire_evicting(manager: ModelManager) -> None:
    manager.acquire_model("big", lambda: "big handle")


def call_acquire_unknown(manager: ModelManager) -> None:
    manager.acquire_model("unknown", lambda: "unknown handle")


def call_failing_load(manager: ModelManager) -> None:
    with pytest.raises(ZeroDivisionError):
        manager.acquire_model("cold", lambda: 1 // 0)


def call_too_large(manager: ModelManager) -> None:
    with pytest.raises(MemoryError):
        manager.acquire_model("huge", lambda: "never")


def call_acquire_and_release(manager: ModelManager) -> None:
    manager.release_model("warm", manager.acquire_model("warm", lambda: "never"))


def call_load_and_release_unknown(manager: ModelManager) -> None:
    manager.release_model("unknown", manager.acquire_model("unknown", lambda: "unknown handle"))


def call_reserve(manager: ModelManager) -> None:
    manager.reserve(200)


def call_reserve_evicting_and_give_back(manager: ModelManager) -> None:
    with manager.reserve(700):
        pass


def call_reserve_too_much(manager: ModelManager) -> None:
    with pytest.raises(MemoryError):
        manager.reserve(5000)


def call_pin_and_unpin(manager: ModelManager) -> None:
    manager.pin("warm")
    manager.unpin("warm")


def call_preload(manager: ModelManager) -> None:
    # The copy that an earlier child had loaded may be there.
    assert manager.preload("warm", lambda: "second handle", copies=2) <= 1


def call_load_out_of_memory(manager: ModelManager) -> None:
    attempts = iter((MemoryError("at first"), None))
    # Earlier children have raised it.
    manager._estimator.set_initial_estimate("cold", 100.0)

    def load() -> str:
        error = next(attempts)
        if error is not None:
            raise error
        return "cold handle"

    manager.acquire_model("cold", load)


def call_reset(manager: ModelManager) -> None:
    manager.force_reset()


def call_shutdown(manager: ModelManager) -> None:
    manager.shutdown()


CALLS = [call for name, call in sorted(globals().items()) if name.startswith("call_")]
# They remove files, which no image has.
KILLED_AT_EVERY_STORE = {call_shutdown}


class Survivor:
    """The manager of this process, which cleans up after children and uses its own copy again."""

    def __init__(self) -> None:
        self.manager = new_manager()
        for tag, mb in (("warm", 300.0), ("cold", 100.0), ("big", 800.0), ("huge", 5000.0)):
            self.manager._estimator.set_initial_estimate(tag, mb)
        self.worker = self.manager._connected()
        self.use()
        self._segment = self.worker.namespace.segment
        # What it knows of its copies when the children's images are made.
        self._own = {name: copy(getattr(self.worker.held, name)) for name in ("_objects", "_rows_of_model", "_handles")}
        self._image = self._segment.copy()

    def use(self) -> None:
        with self.manager.model("warm", lambda: "warm handle"):
            pass

    def restore(self, image: bytes | None = None) -> None:
        """Go back to the beginning, or to what a child has left."""
        self._segment.words[:] = memoryview(image or self._image).cast("Q")
        self.worker.namespace.tables.close()
        for name, known in self._own.items():
            setattr(self.worker.held, name, copy(known))

    def child(self, call: Callable[[ModelManager], None], wrap: Callable[[Any], Any]) -> int:
        """Make a call in a child whose stores go through `wrap(words)`."""

        def action() -> None:
            manager = new_manager()
            manager._connected().namespace.lock.intercept_stores(wrap)
            call(manager)

        status = run_in_child(action)
        assert status in (0, KILLED)
        return status

    def go_on(self, what: str) -> None:
        """Clean up as any survivor does; nothing of the child may be left, and the own copy can be used."""
        self.worker.namespace.reap_dead_members()
        self.worker.unloads.unload_assigned()
        snapshot = read_snapshot("calls")
        assert check_invariants(snapshot) == [], what
        assert [member.pid for member in snapshot.members] == [os.getpid()], what
        assert not snapshot.tickets, what
        assert not [copy for copy in snapshot.instances if copy.state != "idle"], what
        assert {model.estimate_mb for model in snapshot.models if model.tag == "warm"} == {300.0}
        self.use()


@pytest.fixture
def survivor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Survivor]:
    monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))
    # The children are told apart from the survivor by what they do in the foreground alone.
    start = "mpmm.model_manager.background.BackgroundThread.start"
    monkeypatch.setattr(start, lambda thread: thread._leader.lead_if_free(1.0))
    # These models are in no cycle, and a collection takes 0.1 s in a process that has imported Beam.
    monkeypatch.setattr("mpmm.model_manager.unload.gc.collect", lambda: 0)
    sleep = acquire._sleep

    def unload_and_sleep(session: Session, row: int, deadline: float) -> int | None:
        session.unloads.unload_assigned()
        return sleep(session, row, deadline)

    monkeypatch.setattr(acquire, "_sleep", unload_and_sleep)
    survivor = Survivor()
    yield survivor
    survivor.manager.shutdown()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.removeprefix("call_"))
def test_death_at_any_store_of_a_call_costs_the_others_nothing(
    call: Callable[[ModelManager], None],
    survivor: Survivor,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    path = tmp_path / "images"
    assert survivor.child(call, lambda words: KeepImages(words, survivor.worker.namespace.segment, path)) == 0
    images = images_in(path, survivor.worker.namespace.segment.layout.size_bytes)
    survivor.go_on("ended")
    if call not in KILLED_AT_EVERY_STORE:
        for store, image in enumerate(images, 1):
            survivor.restore(image)
            survivor.go_on(f"image of store {store}")
    killed = set()
    for store in range(1, len(images) + 1) if call in KILLED_AT_EVERY_STORE else sorted(some_of(len(images))):
        survivor.restore()
        status = survivor.child(call, lambda words, store=store: KillAt(words, store))  # type: ignore[misc]  # mypy has no type for a lambda's default
        survivor.go_on(f"killed at store {store}")
        if status == KILLED:
            killed.add(store)
    # Not every run of a call makes as many stores as the first one, because they go by the clock.
    assert {1, (len(images) + 1) // 2} <= killed
    record_property(CRASH_POINTS, len(images))


def test_kill_at_any_store_of_the_creation_leaves_a_namespace_that_the_next_one_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))
    # What counts the stores is no memory for the compiled core, which makes none of a creation's.
    monkeypatch.setenv(CORE_VARIABLE, "python")
    original = Segment.__init__
    store = 0
    while True:
        store += 1

        def action(store: int = store) -> None:
            def counting(self: Segment, *arguments: Any) -> None:
                original(self, *arguments)
                self.words = KillAt(self.words, store)  # type: ignore[assignment]  # behaves like it

            monkeypatch.setattr(Segment, "__init__", counting)
            Namespace.join("born", capacities=SMALL)

        status = run_in_child(action)
        joined = Namespace.join("born", capacities=SMALL)
        assert joined.settings == Settings()
        snapshot = read_snapshot("born")
        assert check_invariants(snapshot) == []
        assert [member.pid for member in snapshot.members] == [os.getpid()]
        joined.leave()
        assert not RuntimeDirectory("born").path.exists()
        if status == 0:
            break
        assert status == KILLED
    assert store > 40
    record_property(CRASH_POINTS, store - 1)


def test_events_of_a_rolled_back_transaction_are_not_shown(lab: Lab, tmp_path: Path) -> None:
    operation = scenarios()["holds.take_idle"](lab)
    before = [event.sequence for event in read_snapshot("lab").events]
    images = lab.images(operation, tmp_path / "images")
    ended, after = lab.save(), [*before, before[-1] + 1]
    assert [event.sequence for event in read_snapshot("lab").events] == after
    for image in images:
        lab.restore(image)
        lab.recover()
        assert [event.sequence for event in read_snapshot("lab").events] in (before, after)
    lab.restore(ended)
    table = lab.layout.events
    assert lab.words[table.base + Event.SEQUENCE] != 0
