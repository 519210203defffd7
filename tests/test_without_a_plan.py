"""Without a plan, the warm path does what a plan would have done: Q1 to Q5 of `mpmm.scheduling.shortcuts`."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from harness import NOBODYS_PID, NewManager, Seat, acquire, learn, problems, release, wait_until, waiting
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from loaders import Loads

from mpmm.policy.plan import Plan, make_plan
from mpmm.policy.view import Decision, Evict, Grant, Reason, Satisfied, View, Wait
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Capacities, Header, Instance, Member, Model, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transaction import Transaction

SMALL = Capacities(
    members=4, models=24, instances=5, tickets=24, pins=8, devices=2, observations=2, events=64, undo=8192
)
SIZES_MB = (100.0, 200.0, 300.0, 450.0)
MOST_WAITERS = 12
STEP_NS = 10_000_000
# Why the head of the queue waits for room: which of these it is changes nothing for those behind it.
_ROOMLESS = {Reason.IN_USE: Reason.MEMORY}
# Any of these may be named as the reason for too little memory: pinned copies, leases, and requests in front.
_NAMED_EITHER_WAY = {Reason.PINNED, Reason.LEASED, Reason.BEHIND}
_names = itertools.count()


class _Undo(Exception):
    """Ends a transaction that was only an attempt."""


class Host:
    """A namespace with two members, on which loads and unloads end at once."""

    def __init__(self, overtaken_s: float, copies: float, flags: tuple[bool, bool, bool]) -> None:
        chosen = Settings(slack_percentage=0.0, max_overtake_seconds=overtaken_s, max_model_copies=copies)
        self.namespace = Namespace.join(f"plan{next(_names)}", capacities=SMALL, settings=chosen)
        self.scheduler = Scheduler(self.namespace)
        self.words, self.tables = self.namespace.segment.words, self.namespace.tables
        self.layout = self.namespace.segment.layout
        self.objects = False
        with self.namespace.transaction() as t:
            transitions = self.namespace.transitions
            transitions.devices.describe(t, [(b"uuid", b"gpu", 1000.0)])
            transitions.members.lead(t, self.namespace.slot, b"made up", flags)
            transitions.members.join(t, 1, Member.WORKER, NOBODYS_PID, 1, b"another")

    def model(self, t: Transaction, number: int) -> int:
        """Return the row of a model; of every fourth nothing is known."""
        tag = f"m{number}"
        row = self.namespace.transitions.models.claim(t, tag, tag.encode())
        if number % 4 != 3:
            self.namespace.transitions.estimates.estimate(t, row, SIZES_MB[number % 4], measured=False)
        return row

    def ask(self, number: int, member: int, preload: int = 0) -> None:
        """Let a member wait for a model."""
        with self.namespace.transaction() as t:
            row = self.model(t, number)
            self.wait(t, row, member, preload)
            self.scheduler.advance(t)

    def wait(self, t: Transaction, model: int, member: int, preload: int = 0) -> int:
        """Make a ticket."""
        known = self.words[self.tables.model(model) + Model.KNOWN]
        priority = 2 if preload else 1 if known else 0
        need_mb = self.scheduler.need_mb(model)
        return self.namespace.transitions.tickets.enqueue(t, model, member, priority, need_mb, 2**62, preload)

    def lease(self, mb: float) -> None:
        """Wait for a lease."""
        with self.namespace.transaction() as t:
            row = self.namespace.transitions.leases.claim(t, b"lease", mb)
            self.namespace.transitions.tickets.enqueue(t, row, 0, 1, mb, 2**62)
            self.scheduler.advance(t)

    def in_state(self, state: int) -> list[int]:
        """Return the instances in a state."""
        return self.tables.rows_where(self.layout.instances, Instance.STATE, state)

    def settle(self) -> None:
        """End all that goes on by itself, until nothing is left to do."""
        transitions = self.namespace.transitions
        for _ in range(6):
            with self.namespace.transaction() as t:
                for ticket in self.tables.used_rows(self.layout.tickets):
                    at = self.tables.ticket(ticket)
                    state, instance = self.words[at], self.words[at + Ticket.INSTANCE] - 1
                    if state == Ticket.WAITING:
                        continue
                    transitions.hand_over.consume_answer(t, ticket)
                    if state == Ticket.LOAD:
                        handle = b"" if self.objects else b"h%d" % self.words[at + Ticket.NUMBER]
                        transitions.loads.end(t, instance, handle, 100.0, 0, False)
                for row in self.in_state(Instance.UNLOADING):
                    transitions.unloads.end(t, row)
                self.scheduler.advance(t)
            if not any(not isinstance(one, Wait) for one in self.decisions()):
                return

    def decisions(self) -> tuple[Decision, ...]:
        """Return what a plan would do now."""
        return make_plan(self.scheduler.read_view()).decisions

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Transaction]:
        """A transaction that is rolled back."""
        with contextlib.suppress(_Undo), self.namespace.transaction() as t:
            yield t
            raise _Undo

    def check_takes(self) -> int:
        """Compare Q1 with the plan, for each idle copy and each member that could take it; return how often it held."""
        held = 0
        # Loads for which the table of copies has no row.
        stuck = {one.ticket for one in self.decisions() if not isinstance(one, Wait)}
        for row in self.in_state(Instance.IDLE):
            at = self.tables.instance(row)
            if not self.words[Header.WAITING] or not self.scheduler.may_take(row):
                continue
            held += 1
            model, owner = self.words[at + Instance.MODEL], self.words[at + Instance.OWNER]
            with self.attempt() as t:
                ticket = self.wait(t, model, owner - 1 if owner else 0)
                done = [one for one in self.decisions() if not isinstance(one, Wait)]
                granted = [one for one in done if one.ticket not in stuck]
                assert len(granted) == 1
                assert isinstance(granted[0], Grant)
                assert granted[0].ticket == ticket
                assert self.words[self.tables.instance(granted[0].instance) + Instance.MODEL] == model
        return held

    def check_releases(self) -> int:
        """Compare Q2 with the plan, for each copy in use; return how often it held."""
        held = 0
        for row in self.in_state(Instance.ACTIVE):
            if not self.scheduler.shortcuts.moves_nobody(self.namespace.reads.instances.held(row)):
                continue
            held += 1
            with self.attempt() as t:
                # Not as used: a hold teaches how long one of which nothing is known may take, and so which wait for a
                # copy (SHARING) is too long. The leader plans for that.
                self.namespace.transitions.holds.release(t, row, used=False)
                for one in self.decisions():
                    at = self.tables.ticket(one.ticket)
                    assert isinstance(one, Wait)
                    assert not one.first
                    told = Reason(self.words[at + Ticket.REASON])
                    assert told == one.reason or {told, one.reason} <= _NAMED_EITHER_WAY
        return held

    def check_waits(self) -> Counter[int]:
        """Compare Q3 and Q4 with the plan, for each model and member; return how often it held, by reason."""
        held: Counter[int] = Counter()
        before = {one.ticket: (type(one), one.why.reason) for one in self.decisions() if not isinstance(one, Satisfied)}
        for model, member in itertools.product(self.tables.model_rows(), (0, 1)):
            cause = self.scheduler.known_wait(model)
            if cause is None:
                continue
            held[cause.reason] += 1
            with self.attempt() as t:
                ticket = self.wait(t, model, member)
                after = {one.ticket: one for one in self.decisions() if not isinstance(one, Satisfied)}
                newcomers = after.pop(ticket, None)
                if newcomers is None:
                    # Behind: the plan says nothing of it. For a copy that is wanted now, the head waits no more.
                    assert cause.reason == Reason.BEHIND
                    told = {
                        row: (type(one), _ROOMLESS.get(one.why.reason, one.why.reason))
                        for row, one in after.items()
                        # The head may rather evict another copy, now that somebody wants the one that it waits for: the
                        # release of that, or the leader's next poll, plans for it.
                        if (type(one), before[row]) != (Evict, (Wait, Reason.IN_USE))
                    }
                    assert told == {
                        row: (kind, _ROOMLESS.get(why, why)) for row, (kind, why) in before.items() if row in told
                    }
                    assert before.keys() == after.keys()
                    continue
                assert isinstance(newcomers, Wait)
                named = {newcomers.reason, cause.reason}
                assert len(named) == 1 or named <= _NAMED_EITHER_WAY
                assert not newcomers.first
                assert newcomers.why.seconds == pytest.approx(cause.seconds)
                assert {one.ticket: (type(one), one.why.reason) for one in after.values()} == before
        return held

    def check_leaves(self) -> Counter[int]:
        """Compare Q5 with the plan, for each waiter; return how often it held, by reason."""
        held: Counter[int] = Counter()
        decisions = [one for one in self.decisions() if not isinstance(one, Satisfied)]
        if not all(isinstance(one, Wait) for one in decisions):
            # The table of copies has no row for a load. Then it does not matter which request would load.
            return held
        for ticket in self.tables.rows_where(self.layout.tickets, Ticket.STATE, Ticket.WAITING):
            if not self.scheduler.holds_up_nobody(ticket):
                continue
            held[self.words[self.tables.ticket(ticket) + Ticket.REASON]] += 1
            with self.attempt() as t:
                self.namespace.transitions.hand_over.leave_queue(t, ticket)
                # For what they wait may have another name then; the next poll of the leader tells them.
                assert all(isinstance(one, Wait | Satisfied) for one in self.decisions())
        return held


MODELS = st.integers(0, 4)
NOTHING = st.just(0)
OPERATIONS = st.one_of(
    st.tuples(st.just("ask"), MODELS, st.integers(0, 1)),
    st.tuples(st.just("ask"), MODELS, st.integers(0, 1)),
    st.tuples(st.just("lease"), st.sampled_from([100.0, 400.0, 700.0, 1000.0]), NOTHING),
    st.tuples(st.just("lease"), st.sampled_from([100.0, 400.0, 700.0, 1000.0]), NOTHING),
    st.tuples(st.just("release"), st.integers(0, 2), NOTHING),
    st.tuples(st.just("release"), st.integers(0, 2), NOTHING),
    st.tuples(st.just("end lease"), st.integers(0, 1), NOTHING),
    st.tuples(st.just("preload"), MODELS, st.integers(1, 3)),
    st.tuples(st.just("pin"), MODELS, NOTHING),
    st.tuples(st.just("others"), st.sampled_from([0.0, 300.0, 800.0]), NOTHING),
    st.tuples(st.just("objects"), st.booleans(), NOTHING),
)


def carry_out(host: Host, operation: tuple[Any, ...]) -> None:
    """Do one operation, if it is possible."""
    kind, argument, further = operation
    namespace = host.namespace
    waits = len(host.tables.rows_where(host.layout.tickets, Ticket.STATE, Ticket.WAITING))
    if kind == "ask" and waits < MOST_WAITERS:
        host.ask(argument, further)
    elif kind == "preload" and waits < MOST_WAITERS:
        host.ask(argument, 0, further)
    elif kind == "lease" and waits < MOST_WAITERS:
        host.lease(argument)
    elif kind == "objects":
        host.objects = argument
    elif kind in ("release", "end lease"):
        rows = host.in_state(Instance.ACTIVE if kind == "release" else Instance.LEASED)
        if argument < len(rows):
            with namespace.transaction() as t:
                if kind == "release":
                    host.scheduler.release(t, rows[argument])
                else:
                    namespace.transitions.leases.end(t, rows[argument])
                    host.scheduler.advance(t)
    elif kind == "pin":
        with namespace.transaction() as t:
            row = host.model(t, argument)
            pin = host.tables.pin_row(row, namespace.reference)
            if pin is None:
                namespace.transitions.pins.pin(t, row, namespace.slot)
            else:
                namespace.transitions.pins.unpin(t, pin)
            host.scheduler.advance(t)
    elif kind == "others":
        with namespace.transaction() as t:
            namespace.transitions.devices.note_unrelated(t, 0, argument)
            host.scheduler.advance(t)


@settings(
    max_examples=25,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(
    operations=st.lists(OPERATIONS, min_size=8, max_size=25),
    overtaken_s=st.sampled_from([0.0, 60.0]),
    copies=st.sampled_from([1.0, 2.0, 100.0]),
    flags=st.sampled_from([(False, False, True), (True, False, False), (False, False, False)]),
)
@example(  # The head of the line, of an unknown model, is judged by the times of the model of one that leaves.
    operations=[
        *[("pin", 3, 0), ("pin", 3, 0), ("objects", False, 0), ("preload", 0, 1), ("ask", 3, 1), ("preload", 1, 1)],
        *[("objects", False, 0), ("end lease", 1, 0), ("ask", 4, 1), ("end lease", 0, 0), ("lease", 100.0, 0)],
        *[("lease", 1000.0, 0), ("release", 2, 0), ("pin", 1, 0), ("ask", 3, 1), ("pin", 2, 0), ("preload", 0, 3)],
        *[("release", 2, 0), ("release", 0, 0), ("release", 2, 0), ("preload", 1, 3), ("objects", True, 0)],
        ("preload", 1, 3),
    ],
    overtaken_s=60.0,
    copies=100.0,
    flags=(True, False, False),
)
@example(  # The idle copy is kept for a lease that is due.
    operations=[("ask", 0, 0), ("ask", 1, 0), ("release", 0, 0), ("lease", 1000.0, 0)],
    overtaken_s=0.0,
    copies=100.0,
    flags=(False, False, True),
)
@example(  # The device is drained for a model that has to run alone.
    operations=[("ask", 0, 0), ("ask", 1, 0), ("release", 0, 0), ("ask", 3, 0)],
    overtaken_s=60.0,
    copies=100.0,
    flags=(False, False, False),
)
@example(  # What is idle of the model of one that leaves may go for the head of the line then.
    operations=[
        *[("lease", 400.0, 0), ("preload", 4, 2), ("preload", 4, 3), ("ask", 0, 1), ("lease", 400.0, 0)],
        *[("release", 2, 0), ("ask", 0, 1), ("ask", 0, 0), ("release", 1, 0), ("objects", False, 0)],
        *[("ask", 4, 0), ("release", 0, 0)],
    ],
    overtaken_s=0.0,
    copies=2.0,
    flags=(False, False, True),
)
@example(  # A lease waits for a row in the table of copies.
    operations=[("ask", 0, 0), *[("lease", 100.0, 0)] * 5],
    overtaken_s=60.0,
    copies=100.0,
    flags=(False, False, True),
)
@example(  # A lease that would fit beside one that is too large waits for a row.
    operations=[
        *[("lease", 400.0, 0), ("ask", 4, 0), ("lease", 700.0, 0), ("ask", 4, 0), ("preload", 2, 2), ("ask", 1, 0)],
        *[("preload", 0, 1), ("release", 1, 0), ("lease", 100.0, 0)],
    ],
    overtaken_s=0.0,
    copies=100.0,
    flags=(True, False, False),
)
@example(  # A first hold ends, which shortens what is expected of another model's.
    operations=[("preload", 0, 1), ("ask", 3, 0), ("preload", 1, 3), ("release", 0, 0), ("pin", 1, 0), ("ask", 1, 0)],
    overtaken_s=0.0,
    copies=2.0,
    flags=(False, False, True),
)
@example(  # Of two leases that wait for what is pinned, the second one is told so, or that it stands behind the first.
    operations=[
        *[("preload", 2, 1), ("ask", 1, 1), ("release", 0, 0), ("release", 2, 0), ("objects", True, 0)],
        *[("objects", False, 0), ("ask", 4, 0), ("release", 0, 0), ("end lease", 1, 0), ("ask", 0, 0)],
        *[("release", 0, 0), ("release", 1, 0), ("others", 800.0, 0), ("pin", 4, 0), ("lease", 1000.0, 0)],
        *[("release", 2, 0), ("others", 800.0, 0), ("ask", 2, 1), ("lease", 1000.0, 0), ("ask", 4, 1)],
        *[("lease", 700.0, 0), ("ask", 1, 0), ("others", 0.0, 0), ("ask", 1, 1), ("others", 800.0, 0)],
    ],
    overtaken_s=60.0,
    copies=100.0,
    flags=(False, False, False),
)
@example(  # Waiters for one of two copies, each of which is free again sooner than another one would be loaded.
    operations=[
        *[("ask", 0, 0), ("ask", 0, 1), ("release", 0, 0), ("release", 0, 0)],
        *[("ask", 0, 0), ("ask", 0, 1), ("ask", 0, 0), ("ask", 0, 1), ("ask", 0, 1)],
    ],
    overtaken_s=60.0,
    copies=100.0,
    flags=(False, False, True),
)
@example(  # Waiters for the only copy there may be.
    operations=[("ask", 0, 0), ("ask", 0, 1), ("ask", 0, 0), ("release", 0, 0), ("ask", 0, 1)],
    overtaken_s=0.0,
    copies=1.0,
    flags=(False, False, True),
)
def test_what_is_done_without_a_plan_is_what_the_plan_does(
    operations: list[tuple[Any, ...]], overtaken_s: float, copies: float, flags: tuple[bool, bool, bool]
) -> None:
    # Time alone changes plans, so it stands still while two are compared.
    now_ns = time.monotonic_ns()
    with mock.patch("time.monotonic_ns", side_effect=lambda: now_ns):
        host = Host(overtaken_s, copies, flags)
        try:
            for operation in operations:
                carry_out(host, operation)
                now_ns += STEP_NS
                host.settle()
                host.check_takes()
                host.check_releases()
                host.check_waits()
                host.check_leaves()
        finally:
            host.namespace.leave()


@pytest.mark.parametrize("waits", ["a lease", "a model"])
def test_hits_beside_one_that_cannot_be_served_make_no_plan(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, waits: str
) -> None:
    manager = new_manager(fallback_memory_mb=1000, poll_interval=30.0)
    learn(Seat(manager), big=900)
    for tag in ("a", "b"):
        manager.release_model(tag, manager.acquire_model(tag, Loads(tag)))
    lease = manager.reserve(700, name="held")
    seat = Seat(manager)

    def wait() -> None:
        if waits == "a lease":
            manager.reserve(800, name="waits").release()
        else:
            acquire(seat, "big", Loads("big"))
            release(seat)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: waiting(namespace), "somebody waits")
    plans: list[object] = []

    def counted(view: View) -> Plan:
        plans.append(view)
        return make_plan(view)

    monkeypatch.setattr("mpmm.scheduling.scheduler.make_plan", counted)
    copies = {tag: manager.acquire_model(tag, Loads("not to be called")) for tag in ("a", "b")}
    for tag, copy in copies.items():
        manager.release_model(tag, copy)
    assert plans == []
    assert read_snapshot(namespace).hits == 2
    lease.release()
    thread.join()
    assert plans
    assert problems(namespace) == []


@pytest.mark.parametrize("leaver", [0, 1])
def test_who_is_called_up_and_leaves_has_the_next_one_called_up(leaver: int) -> None:
    host = Host(60.0, 1.0, (False, False, True))
    try:
        for _ in range(4):
            host.ask(0, 0)
            host.settle()
        tickets, transitions = host.tables.tickets, host.namespace.transitions
        in_order = sorted(
            host.tables.rows_where(host.layout.tickets, Ticket.STATE, Ticket.WAITING),
            key=lambda row: host.words[host.tables.ticket(row) + Ticket.NUMBER],
        )
        assert len(in_order) == 3
        with host.namespace.transaction() as t:
            transitions.tickets.call_up(t, in_order[leaver])
        with host.namespace.transaction() as t:
            assert host.scheduler.holds_up_nobody(in_order[leaver])
            transitions.hand_over.leave_queue(t, in_order[leaver])
        left = [row for row in in_order if row != in_order[leaver]]
        assert [bool(tickets[row].called_up) for row in left] == [True, False]
    finally:
        host.namespace.leave()
