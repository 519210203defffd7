"""Random calls of several pretend processes against a small model of what the manager promises.

The pretend processes are members of one namespace in this process, each with a manager's code of its own; some of
them vanish: their member lock is dropped, as the kernel does for a dead process, and everything they had must be
reclaimed. Model servers are members, too, and also vanish; loads are abandoned, at times before their loader knows
of them. The model is a handful of dicts. Hypothesis prints a shrunk list of calls if the two disagree.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import wait_until
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mpmm.model_manager.administration import unload_model
from mpmm.scheduling import Scheduler
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Capacities, Instance, Member, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot

TAGS = {"a": 300.0, "b": 400.0, "c": 900.0, "d": 100.0}
# How many may use a copy at a time.
USERS = {"b": 2, "d": 3}
TOTAL_MB = 1000.0
MOST_PROCESSES = 4
MOST_COPIES = 2
MOST_SERVERS = 3
CAPACITIES = Capacities(members=8, models=24, instances=12, tickets=16, devices=1, observations=2, events=64, undo=4096)


@dataclass
class Pretend:
    """A pretend process: a member, the tickets it waits on, the rows it loads, holds, has leased and unloads."""

    namespace: Namespace
    scheduler: Scheduler
    tickets: list[int] = field(default_factory=list)
    loading: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    leased: list[int] = field(default_factory=list)

    @property
    def owned_rows(self) -> list[int]:
        return self.loading + self.held + self.leased


class Promises(RuleBasedStateMachine):
    """Drives transitions and policy as the manager does, one step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="mpmm-")
        self.processes: list[Pretend] = []
        self.servers: list[Namespace] = []
        self.keep = self._join()
        namespace = self.keep.namespace
        with namespace.transaction() as t:
            namespace.transitions.devices.describe(t, [(b"gpu-0", b"gpu", TOTAL_MB)])
            namespace.transitions.members.lead(t, namespace.slot, b"booked", (False, False, True))
            for tag, mb in TAGS.items():
                row = namespace.transitions.models.claim(t, tag, tag.encode())
                namespace.transitions.estimates.estimate(t, row, mb, measured=False)
                if tag in USERS:
                    namespace.transitions.models.set_users(t, row, USERS[tag])

    def teardown(self) -> None:
        for server in self.servers:
            server.leave()
        for process in reversed(self.processes):
            process.namespace.leave()
        assert not os.path.exists(f"/dev/shm/{self.keep.namespace.segment.name}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _member(self, kind: int) -> Namespace:
        return Namespace.join(
            "promises",
            root=Path(self.folder) / "run",
            capacities=CAPACITIES,
            settings=Settings(slack_percentage=0.0, max_model_copies=MOST_COPIES),
            kind=kind,
        )

    def _join(self) -> Pretend:
        namespace = self._member(Member.WORKER)
        process = Pretend(namespace, Scheduler(namespace))
        self.processes.append(process)
        return process

    def _pick(self, number: int) -> Pretend:
        return self.processes[number % len(self.processes)]

    @rule()
    @precondition(lambda self: len(self.processes) < MOST_PROCESSES)
    def join(self) -> None:
        self._join()

    @rule(who=st.integers(0, 99), tag=st.sampled_from(sorted(TAGS)), preload=st.sampled_from((0, 0, 0, 1, 2)))
    def ask(self, who: int, tag: str, preload: int) -> None:
        process = self._pick(who)
        namespace = process.namespace
        if sum(len(other.tickets) for other in self.processes) >= CAPACITIES.tickets:
            return
        with namespace.transaction() as t:
            model = namespace.tables.model_row(tag)
            assert model is not None
            priority = 2 if preload else 1
            row = namespace.transitions.tickets.enqueue(t, model, namespace.slot, priority, TAGS[tag], 2**62, preload)
            process.scheduler.advance(t)
        process.tickets.append(row)

    @rule(who=st.integers(0, 99), mb=st.sampled_from((100.0, 500.0, 1000.0)))
    def ask_for_a_lease(self, who: int, mb: float) -> None:
        process = self._pick(who)
        namespace = process.namespace
        if sum(len(other.tickets) for other in self.processes) >= CAPACITIES.tickets:
            return
        with namespace.transaction() as t:
            model = namespace.transitions.leases.claim(t, b"lease", mb)
            row = namespace.transitions.tickets.enqueue(t, model, namespace.slot, 1, mb, 2**62)
            process.scheduler.advance(t)
        process.tickets.append(row)

    @rule(who=st.integers(0, 99))
    def end_a_lease(self, who: int) -> None:
        process = self._pick(who)
        if process.leased:
            with process.namespace.transaction() as t:
                process.namespace.transitions.leases.end(t, process.leased.pop(0))
                process.scheduler.advance(t)

    @rule(who=st.integers(0, 99), tag=st.sampled_from(sorted(USERS)))
    def ask_for_an_unload(self, who: int, tag: str) -> None:
        process = self._pick(who)
        unload_model(process.namespace, process.scheduler, tag)

    @rule(who=st.integers(0, 99), tag=st.sampled_from(sorted(TAGS)))
    def pin_or_unpin(self, who: int, tag: str) -> None:
        process = self._pick(who)
        namespace = process.namespace
        with namespace.transaction() as t:
            model = namespace.tables.model_row(tag)
            assert model is not None
            row = namespace.tables.pin_row(model, namespace.reference)
            if row is None:
                namespace.transitions.pins.pin(t, model, namespace.slot)
            else:
                namespace.transitions.pins.unpin(t, row)
                process.scheduler.advance(t)

    @rule(who=st.integers(0, 99))
    def act_on_answers(self, who: int) -> None:
        process = self._pick(who)
        namespace = process.namespace
        words, tables = namespace.segment.words, namespace.tables
        for row in list(process.tickets):
            at = tables.ticket(row)
            state, instance = words[at + Ticket.STATE], words[at + Ticket.INSTANCE] - 1
            if state == Ticket.WAITING:
                continue
            preload = words[at + Ticket.PRELOAD]
            with namespace.transaction() as t:
                namespace.transitions.hand_over.consume_answer(t, row)
            process.tickets.remove(row)
            if preload and state in (Ticket.ENOUGH, Ticket.REFUSED):
                continue
            assert state == Ticket.LOAD or (state == Ticket.GRANTED and not preload)
            assert not any(instance in other.owned_rows for other in self.processes), "one copy for two"
            if state == Ticket.LOAD:
                process.loading.append(instance)
            elif words[tables.instance(instance)] == Instance.LEASED:
                process.leased.append(instance)
            else:
                process.held.append(instance)

    @rule(who=st.integers(0, 99), handle=st.booleans(), served=st.booleans())
    def finish_a_load(self, who: int, handle: bool, served: bool) -> None:
        process = self._pick(who)
        if not process.loading:
            return
        row = process.loading.pop(0)
        server = self._serve(row) if handle and served else 0
        with process.namespace.transaction() as t:
            mb = process.namespace.segment.floats[process.namespace.tables.instance(row) + Instance.MB]
            process.namespace.transitions.loads.end(t, row, b"h%d" % row if handle else b"", mb, server, bool(server))
            process.scheduler.advance(t)
        process.held.append(row)

    @rule(who=st.integers(0, 99))
    def fail_a_load(self, who: int) -> None:
        process = self._pick(who)
        if process.loading:
            with process.namespace.transaction() as t:
                process.namespace.transitions.loads.fail(t, process.loading.pop(0))
                process.scheduler.advance(t)

    def _serve(self, row: int) -> int:
        """Return a reference to the new server of a copy, 0 if there are enough of them."""
        words, tables = self.keep.namespace.segment.words, self.keep.namespace.tables
        serving = {words[tables.instance(row) + Instance.SERVER] for row in range(CAPACITIES.instances)}
        for server in [server for server in self.servers if server.reference not in serving]:
            self.servers.remove(server)
            server.leave()
        if len(self.servers) == MOST_SERVERS:
            return 0
        self.servers.append(self._member(Member.SERVER))
        return self.servers[-1].reference

    @rule(which=st.integers(0, 99))
    @precondition(lambda self: self.servers)
    def lose_a_server(self, which: int) -> None:
        server = self.servers.pop(which % len(self.servers))
        server.forget_after_fork()
        wait_until(lambda: self.keep.namespace.reap_dead_members() == 1, "the dead are found")
        with self.keep.namespace.transaction() as t:
            self.keep.scheduler.advance(t)

    @rule(which=st.integers(0, 99))
    def give_up_a_load(self, which: int) -> None:
        """A load has taken too long, for the leader; its loader may be about to begin, or at it."""
        namespace = self.keep.namespace
        rows = namespace.tables.rows_where(namespace.segment.layout.instances, Instance.STATE, Instance.LOADING)
        if rows:
            row = rows[which % len(rows)]
            with namespace.transaction() as t:
                namespace.transitions.loads.give_up(t, row)
                self.keep.scheduler.advance(t)
            for process in self.processes:
                if row in process.loading:
                    process.loading.remove(row)

    @rule(who=st.integers(0, 99), used=st.booleans())
    def release(self, who: int, used: bool) -> None:
        process = self._pick(who)
        if process.held:
            with process.namespace.transaction() as t:
                process.scheduler.release(t, process.held.pop(0), used)

    @rule(who=st.integers(0, 99))
    def find_the_server_dead(self, who: int) -> None:
        process = self._pick(who)
        words, tables = process.namespace.segment.words, process.namespace.tables
        for row in process.held:
            if words[tables.instance(row) + Instance.UNLOAD_ON_RELEASE]:
                process.held.remove(row)
                with process.namespace.transaction() as t:
                    process.namespace.transitions.holds.discard(t, row)
                    process.scheduler.advance(t)
                return

    @rule(who=st.integers(0, 99))
    def unload_what_is_asked(self, who: int) -> None:
        process = self._pick(who)
        namespace = process.namespace
        with namespace.transaction() as t:
            for row in self._unloading(process):
                namespace.transitions.unloads.end(t, row)
            process.scheduler.advance(t)

    @rule(who=st.integers(0, 99))
    def give_up_waiting(self, who: int) -> None:
        process = self._pick(who)
        if process.tickets:
            with process.namespace.transaction() as t:
                process.namespace.transitions.hand_over.leave_queue(t, process.tickets.pop(0))
                process.scheduler.advance(t)

    @rule(who=st.integers(0, 99))
    @precondition(lambda self: len(self.processes) > 1)
    def vanish(self, who: int) -> None:
        process = self.processes[1 + who % (len(self.processes) - 1)]
        self.processes.remove(process)
        process.namespace.forget_after_fork()  # closes its locks, as its death would
        # Mostly at once. But a program that another thread of this process starts has copies of all descriptors until
        # it runs, and as long as it has one of the lock, the dead look alive.
        wait_until(lambda: self.keep.namespace.reap_dead_members() == 1, "the dead are found")
        with self.keep.namespace.transaction() as t:
            self.keep.scheduler.advance(t)

    @rule(who=st.integers(0, 99))
    def reset(self, who: int) -> None:
        process = self._pick(who)
        with process.namespace.transaction() as t:
            process.namespace.transitions.reset(t)
        for other in self.processes:
            other.loading.clear()
            other.held.clear()
            with other.namespace.transaction() as t:
                for row in other.tickets:
                    state = other.namespace.segment.words[other.namespace.tables.ticket(row)]
                    # A preload that was answered has nothing that could be taken away.
                    assert state in (Ticket.RESET, Ticket.ENOUGH, Ticket.REFUSED)
                    other.namespace.transitions.hand_over.consume_answer(t, row)
            other.tickets.clear()

    def _unloading(self, process: Pretend) -> list[int]:
        namespace = process.namespace
        words, tables = namespace.segment.words, namespace.tables
        rows = tables.rows_where(namespace.segment.layout.instances, Instance.HOLDER, namespace.reference)
        return [
            row
            for row in rows
            if words[tables.instance(row)] == Instance.UNLOADING and not words[tables.instance(row) + Instance.SEATS]
        ]

    @invariant()
    def the_books_are_right(self) -> None:
        snapshot = read_snapshot("promises", Path(self.folder) / "run", events=False)
        assert check_invariants(snapshot) == []
        by_slot = {process.namespace.slot: process for process in self.processes}
        promised = {ticket.instance for ticket in snapshot.tickets}
        for copy in snapshot.instances:
            if copy.state in ("active", "loading", "leased") and copy.row not in promised:
                assert copy.holder is not None
                assert copy.row in by_slot[copy.holder].owned_rows
        for copy in snapshot.instances:
            seats = [seat for seat in snapshot.instances if seat.seat_of == copy.row]
            assert len(seats) < USERS.get(copy.tag, 1)
        told = [row for process in self.processes for row in process.owned_rows]
        assert len(told) == len(set(told))
        accounted = sum(copy.reserved_mb if copy.state == "leased" else copy.mb for copy in snapshot.instances)
        assert accounted <= TOTAL_MB, "more is accounted for than there is"

    @invariant()
    def somebody_can_always_go_on(self) -> None:
        """If no process holds, loads, unloads or has pinned anything, none waits, except for answers not read yet."""
        snapshot = read_snapshot("promises", Path(self.folder) / "run", events=False)
        if not snapshot.pins and all(copy.state == "idle" for copy in snapshot.instances):
            assert not [ticket for ticket in snapshot.tickets if ticket.state == "waiting"]


@pytest.mark.timeout(300)
def test_random_calls_agree_with_the_model_of_what_is_promised() -> None:
    steps = int(os.environ.get("MPMM_TEST_STEPS", "40"))
    examples = int(os.environ.get("MPMM_TEST_EXAMPLES", "40"))
    Promises.TestCase.settings = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    Promises.TestCase("runTest").runTest()


@pytest.fixture
def promises() -> Iterator[Promises]:
    """The machine, for walks that are rare at random."""
    machine = Promises()
    yield machine
    machine.the_books_are_right()
    machine.somebody_can_always_go_on()
    machine.teardown()


def test_a_copy_whose_server_died_in_use_is_passed_to_nobody(promises: Promises) -> None:
    promises.ask(0, "a", 0)
    promises.act_on_answers(0)
    promises.finish_a_load(0, handle=True, served=True)
    promises.lose_a_server(0)
    promises.the_books_are_right()
    # Its memory is free, and taken again, so a request for the model waits.
    promises.ask_for_a_lease(0, TOTAL_MB)
    promises.act_on_answers(0)
    promises.join()
    promises.ask(1, "a", 0)
    promises.act_on_answers(1)
    assert promises.processes[1].owned_rows == []
    promises.release(0, used=True)
    promises.act_on_answers(1)
    assert promises.processes[1].owned_rows == []
    promises.end_a_lease(0)
    promises.act_on_answers(1)
    assert len(promises.processes[1].loading) == 1


def test_an_idle_copy_goes_with_its_server(promises: Promises) -> None:
    promises.ask(0, "c", 0)
    promises.act_on_answers(0)
    promises.finish_a_load(0, handle=True, served=True)
    promises.release(0, used=True)
    promises.lose_a_server(0)
    promises.the_books_are_right()
    promises.ask(0, "c", 0)
    promises.act_on_answers(0)
    assert len(promises.keep.loading) == 1


def test_a_copy_of_a_dead_server_that_a_waiter_was_just_given_is_unloaded_on_release(promises: Promises) -> None:
    promises.ask(0, "c", 0)
    promises.act_on_answers(0)
    promises.finish_a_load(0, handle=True, served=True)
    promises.join()
    promises.ask(1, "c", 0)
    promises.release(0, used=True)
    promises.lose_a_server(0)
    promises.act_on_answers(1)
    assert len(promises.processes[1].held) == 1
    promises.ask(0, "c", 0)
    promises.find_the_server_dead(1)
    promises.act_on_answers(0)
    assert len(promises.keep.loading) == 1
    assert promises.processes[1].owned_rows == []


def test_a_load_that_is_given_up_before_its_loader_woke_is_allowed_anew(promises: Promises) -> None:
    promises.ask(0, "c", 0)
    promises.give_up_a_load(0)
    promises.the_books_are_right()
    promises.join()
    promises.ask(1, "c", 0)
    for who in (0, 1):
        promises.act_on_answers(who)
    # The first one, which has not lost its place, and not both.
    assert [len(process.loading) for process in promises.processes] == [1, 0]


def test_preloads_that_wait_are_given_no_copy(promises: Promises) -> None:
    promises.ask(0, "a", 0)
    promises.act_on_answers(0)
    promises.finish_a_load(0, handle=True, served=False)
    promises.ask_for_a_lease(0, TOTAL_MB - TAGS["a"])
    promises.act_on_answers(0)
    promises.ask(0, "a", 2)
    promises.release(0, used=True)
    promises.act_on_answers(0)
    assert len(promises.keep.tickets) == 1
    promises.end_a_lease(0)
    promises.act_on_answers(0)
    assert len(promises.keep.loading) == 1


def test_an_idle_copy_finds_its_waiter_far_back_in_the_queue(
    promises: Promises, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpmm.scheduling.views.QUEUE_PART", 2)
    promises.ask(0, "a", 0)
    promises.act_on_answers(0)
    promises.finish_a_load(0, handle=True, served=False)
    promises.ask_for_a_lease(0, TOTAL_MB - TAGS["a"])
    promises.act_on_answers(0)
    for _ in range(4):
        promises.ask(0, "c", 0)
    promises.join()
    promises.ask(1, "a", 0)
    with promises.keep.namespace.transaction() as t:
        promises.keep.namespace.transitions.holds.release(t, promises.keep.held.pop(0))
        # By the plan, which looks at the first two waiters, and at those for which there is a copy.
        promises.keep.scheduler.advance(t)
    promises.act_on_answers(1)
    assert len(promises.processes[1].held) == 1
