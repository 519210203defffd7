"""The ledger of a device: each of its rules, and random work on a device whose truth is known."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from crash_lab import Lab
from harness import NOBODYS_PID
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mpmm.memory.samples import SharedSamples
from mpmm.policy.admission import free_mb
from mpmm.policy.ledger import HIDDEN_NS, TRUST_ACCOUNTS_NS, Entry, Figure, Ledger, Return, expire, settle
from mpmm.policy.view import DeviceView
from mpmm.scheduling import Scheduler
from mpmm.shared_state import transaction as transaction_module
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Capacities, Instance, Member
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources import DeviceInfo, DeviceSample

MS = 1_000_000
GIVE_UP_NS = 5_000_000_000
TOTAL_MB, SLACK = 10_000.0, 0.1
LIMIT_MB = TOTAL_MB * (1 - SLACK)
SMALL = Capacities(members=32, models=8, instances=64, tickets=4, pins=1, devices=1, observations=4, events=64)


def after(ledger: Ledger, used_mb: float, *entries: Entry, at_ms: int = 1000, now_ms: int | None = None) -> Ledger:
    """Return the ledger after a sample that was taken within a millisecond and published at `now_ms`."""
    figure = Figure(used_mb, at_ms * MS, (at_ms + 1) * MS)
    return settle(ledger, figure, entries, (at_ms if now_ms is None else now_ms) * MS, GIVE_UP_NS)


def resident(mb: float) -> Entry:
    return Entry(mb, mb)


def in_flight(mb: float) -> Entry:
    return Entry(0.0, mb)


def test_a_quiet_device_tells_exactly_what_is_external() -> None:
    found = after(Ledger(), 480.0)
    assert (found.external_mb, found.external_least_mb) == (480.0, 480.0)
    found = after(found, 4480.0, resident(4000.0))
    assert (found.external_mb, found.external_least_mb) == (480.0, 480.0)


def test_a_load_in_progress_explains_what_the_figure_has_grown_by() -> None:
    known = after(Ledger(), 480.0)
    for seen_mb in (480.0, 2000.0, 3480.0):
        assert after(known, seen_mb, in_flight(3000.0)).external_mb == 480.0
    assert after(known, 4000.0, in_flight(3000.0)).external_mb == 1000.0, "no load explains the last 520 MB"
    assert after(known, 400.0, in_flight(3000.0)).external_mb == 400.0, "external memory was given back"


def test_the_end_of_a_load_changes_nothing_that_is_committed() -> None:
    known = after(Ledger(), 480.0)
    during = after(known, 3480.0, in_flight(3000.0))
    assert after(during, 3480.0, resident(3000.0)).external_mb == during.external_mb == 480.0


def test_the_first_figure_is_taken_for_external_where_a_load_could_explain_it() -> None:
    assert after(Ledger(), 3000.0, in_flight(3000.0)).external_mb == 3000.0


def test_growth_of_instances_is_not_certain_to_be_others_memory() -> None:
    known = after(Ledger(), 480.0)
    grown = after(known, 5480.0, resident(4000.0))
    assert (grown.external_mb, grown.external_least_mb) == (1480.0, 480.0)
    assert after(grown, 1480.0).external_least_mb == 1480.0, "the empty device tells"


def test_what_is_measured_by_itself_leaves_the_rest_certain() -> None:
    grown = after(after(Ledger(), 480.0), 5480.0, Entry(4000.0, 4000.0, measured=True))
    assert (grown.external_mb, grown.external_least_mb) == (1480.0, 1480.0)


def test_listed_processes_of_others_are_external_although_a_lease_could_explain_them() -> None:
    known = after(Ledger(), 0.0)
    found = settle(known, Figure(500.0, 1000, 1001, others_mb=500.0), [in_flight(600.0)], 1001, GIVE_UP_NS)
    assert (found.external_mb, found.external_least_mb) == (500.0, 500.0)


def awaited(*returns: Return, external_mb: float = 0.0) -> Ledger:
    return Ledger(external_mb, external_mb, returns)


def test_freed_memory_counts_until_a_sample_from_after_the_unload_shows_it() -> None:
    waits = awaited(Return(2000 * MS, 3000.0, 3000.0))
    assert after(waits, 0.0, at_ms=1999).returning_mb == 3000.0, "that sample says nothing about it"
    assert after(waits, 3000.0, at_ms=2001).returning_mb == 3000.0
    assert after(waits, 100.0, at_ms=2001).returning_mb == 0.0, "nine tenths count as all of it"
    assert after(waits, 1200.0, at_ms=2001).returning_mb == 1200.0, "no more than that can still be in use"


def test_a_load_that_could_hide_freed_memory_delays_it_for_a_moment_only() -> None:
    waits = awaited(Return(2000 * MS, 3000.0))
    hidden = after(waits, 3000.0, in_flight(4000.0), at_ms=2100)
    assert hidden.returning_mb == 3000.0
    trusted_ms = 2000 + HIDDEN_NS // MS
    assert after(hidden, 3000.0, in_flight(4000.0), at_ms=trusted_ms - 1).returning_mb == 3000.0
    late = after(hidden, 3000.0, in_flight(4000.0), at_ms=trusted_ms)
    assert (late.returning_mb, late.written_off_mb, late.external_mb) == (0.0, 0.0, 0.0)


def test_a_figure_that_has_fallen_shows_it_although_a_load_is_in_progress() -> None:
    waits = awaited(Return(2000 * MS, 3000.0, 8000.0), external_mb=1000.0)
    assert after(waits, 5000.0, resident(2000.0), in_flight(4000.0), at_ms=2001).returning_mb == 0.0


def test_two_unloads_need_the_figure_to_fall_by_both() -> None:
    waits = awaited(Return(2000 * MS, 3000.0, 8000.0), Return(2001 * MS, 2000.0, 8000.0), external_mb=1000.0)
    found = after(waits, 5000.0, resident(2000.0), in_flight(4000.0), at_ms=2002)
    assert [one.mb for one in found.returns] == [2000.0]


@pytest.mark.parametrize("in_use_mb", [30.0, 100.0, 101.0, 150.0, 200.0])
def test_all_that_can_still_be_in_use_is_awaited_of_what_went_last(in_use_mb: float) -> None:
    waits = awaited(Return(2000 * MS, 100.0), Return(2001 * MS, 100.0))
    found = after(waits, in_use_mb, at_ms=2002)
    assert [one.mb for one in reversed(found.returns)] == [
        mb for mb in (min(100.0, in_use_mb), in_use_mb - 100) if mb > 0
    ]


def test_memory_that_never_comes_back_is_written_off_and_counts_as_external() -> None:
    waits = awaited(Return(2000 * MS, 3000.0))
    assert after(waits, 3000.0, at_ms=6999).returning_mb == 3000.0
    lost = after(waits, 3000.0, at_ms=7000)
    assert (lost.returning_mb, lost.written_off_mb, lost.external_mb) == (0.0, 3000.0, 3000.0)


def test_a_source_that_does_not_answer_holds_up_nobody() -> None:
    waits = awaited(Return(2000 * MS, 3000.0))
    soon, later = 2000 * MS + TRUST_ACCOUNTS_NS - 1, 2000 * MS + TRUST_ACCOUNTS_NS
    assert expire(waits, 1999 * MS, soon, GIVE_UP_NS) is waits
    assert expire(waits, 1999 * MS, later, GIVE_UP_NS).returning_mb == 0.0
    for sampled_ms in (2000, 2001):
        assert expire(waits, sampled_ms * MS, later, GIVE_UP_NS) is waits, (
            "a sample from after the unload contradicts the accounts"
        )


def test_a_source_that_falls_silent_after_it_has_contradicted_the_accounts_holds_up_nobody_for_ever() -> None:
    waits = awaited(Return(2000 * MS, 3000.0))
    gives_up = 2000 * MS + GIVE_UP_NS
    assert expire(waits, 2001 * MS, gives_up - 1, GIVE_UP_NS) is waits
    assert expire(waits, 2001 * MS, gives_up, GIVE_UP_NS).returning_mb == 0.0
    sampled = gives_up - TRUST_ACCOUNTS_NS + 1
    assert expire(waits, sampled, gives_up, GIVE_UP_NS) is waits, "the next sample decides"


def test_what_is_on_no_list_any_more_may_still_be_there_until_its_unload_has_ended() -> None:
    lab = Lab("ledger")
    # It lists processes, and freed memory shows up late.
    lab.do(lambda t, tr: tr.members.lead(t, 0, b"test", (True, True, False)))
    copy = lab.idle("a", server=True)

    def sample(used_mb: float, *listed_mb: float) -> float:
        """Note a sample with what it lists of the server, if that; return what is free then."""
        lab.do(lambda t, tr: tr.measurements.measure(t, lab.server, dict(enumerate(listed_mb))))
        lab.do(lambda t, tr: tr.devices.sample(t, 0, used_mb, time.monotonic_ns()))
        snapshot = read_snapshot("ledger", events=False)
        return snapshot.devices[0].limit_mb - snapshot.devices[0].committed_mb

    assert sample(600.0, 600.0) == 300.0
    lab.do(lambda t, tr: tr.unloads.begin(t, copy, lab.victim, evicted=True))
    assert sample(600.0) == 300.0
    assert read_snapshot("ledger").devices[0].external_mb == 0.0
    lab.do(lambda t, tr: tr.unloads.end(t, copy))
    assert sample(0.0) == 900.0
    assert lab.problems() == []
    lab.namespace.leave()


def test_returns_beyond_the_table_are_awaited_together() -> None:
    full = awaited(Return(1, 10.0, 100.0), Return(2, 20.0, 100.0)).awaiting(Return(3, 30.0, 90.0), 2)
    assert full.returns == (Return(1, 10.0, 100.0), Return(3, 50.0, 100.0))


def test_what_goes_takes_along_what_the_figure_was_short_of() -> None:
    short = after(awaited(external_mb=300.0), 4300.0, resident(4000.0), resident(3900.0))
    assert short.external_mb == -3600.0, "one of the two is gone, and nobody has said so"
    gone = short.awaiting(Return(900 * MS, 3900.0), 8)
    assert (gone.external_mb, gone.returning_mb) == (0.0, 3900.0)
    assert short.awaiting(Return(900 * MS, 1000.0), 8).external_mb == -2600.0
    assert awaited(external_mb=300.0).awaiting(Return(900 * MS, 3900.0), 8).external_mb == 300.0


@dataclass
class Loaded:
    """The truth about one instance: its row, what it will take, what it has, and its server where there is one.

    died: the server has, and whoever may know that has not looked yet.
    """

    row: int
    mb: float
    has_mb: float = 0.0
    slot: int | None = None
    died: bool = False


class Source:
    """One device; the machine makes up its figures."""

    name = "made up"
    frees_late = True
    cheap = True

    def __init__(self, measures_processes: bool) -> None:
        self.measures_processes = measures_processes

    def devices(self) -> tuple[DeviceInfo, ...]:
        return (DeviceInfo(0, "made-up-0", "made up", TOTAL_MB),)

    def sample(self, server_pids: object) -> tuple[DeviceSample, ...]:
        return ()

    def close(self) -> None:
        """Nothing is open."""


class DeviceAndBooks(RuleBasedStateMachine):
    """Loads, unloads, others' memory and samples in any order; freed memory lingers, and samples take their time."""

    has_servers: ClassVar[bool]
    measures_processes: ClassVar[bool]
    lists_all: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = time.monotonic_ns()
        clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("_")})
        clock.monotonic_ns = lambda: self.now
        vars(transaction_module)["time"] = clock
        self.namespace = Namespace.join("ledger", root=Path(self.folder.name) / "run", capacities=SMALL)
        self.samples = SharedSamples(self.namespace, Scheduler(self.namespace))
        source = Source(self.measures_processes)
        self.samples.describe(source, source.devices(), ())
        # There are no lock files: the machine knows which members live.
        vars(self.namespace)["member_is_alive"] = self.lives
        self.external_mb = self.least_external_mb = 500.0
        self.loading: list[Loaded] = []
        self.idle: list[Loaded] = []
        self.unloading: list[Loaded] = []
        self.lingering: list[tuple[int, float]] = []  # (until when, MB)
        self.servers = 0
        self.begun: int | None = None  # when the sample in progress was
        self.read: tuple[float, dict[int, float], int] | None = None  # its figures, and when they were read
        self.begin_sample()
        self.read_figures()
        self.publish()

    def teardown(self) -> None:
        self.namespace.leave()
        vars(transaction_module)["time"] = time
        self.folder.cleanup()

    # ---- the truth ----

    @property
    def ours_mb(self) -> float:
        """The memory of instances, and memory of ended ones that is not free yet."""
        copies = (*self.loading, *self.idle, *self.unloading)
        return sum(copy.has_mb for copy in copies) + self.lingering_mb

    @property
    def lingering_mb(self) -> float:
        return sum(mb for until, mb in self.lingering if until > self.now)

    @property
    def used_mb(self) -> float:
        return self.external_mb + self.ours_mb

    def view(self) -> DeviceView:
        scheduler = self.samples._scheduler
        with self.namespace.transaction():
            return scheduler.device_views(scheduler.read_copies())[0]

    def lives(self, slot: int) -> bool:
        """Tell what a look at a member's lock file would."""
        copies = (*self.loading, *self.idle, *self.unloading)
        return not any(copy.died and copy.slot == slot for copy in copies)

    # ---- what happens ----

    @rule(ms=st.integers(1, 400))
    def time_passes(self, ms: int) -> None:
        self.now += ms * MS

    @rule(mb=st.sampled_from([700.0, 1500.0, 2600.0, 4100.0]))
    def load(self, mb: float) -> None:
        """Begin to load if admission allows it. That it does must be safe, whatever happens then."""
        if free_mb(self.view(), SLACK) < mb:
            return
        full_mb = sum(copy.mb for copy in (*self.loading, *self.idle, *self.unloading) if not copy.died)
        will_be = full_mb + self.lingering_mb + mb + self.least_external_mb
        # The slack is there for what is not exact: a tenth of the memory that is awaited may be missing.
        assert will_be <= TOTAL_MB, "the manager has given away more than there is"
        with self.namespace.transaction() as t:
            transitions = self.namespace.transitions
            model = transitions.models.claim(t, f"m{mb:.0f}", b"m%d" % mb)
            if not self.namespace.segment.words[self.namespace.tables.model(model) + 3]:
                transitions.estimates.estimate(t, model, mb, measured=False)
            copy = Loaded(transitions.loads.begin(t, model, self.namespace.slot, 1, mb, alone=False), mb)
            if self.has_servers:
                copy.slot = next(iter(self.namespace.tables.free_members()))
                # A name of its own: a load that fails has it for its handle, and copies of one handle are one memory.
                self.servers += 1
                name = b"server %d" % self.servers
                transitions.members.join(t, copy.slot, Member.SERVER, NOBODYS_PID + copy.slot, 1, name)
                transitions.loads.link_server(t, copy.row, copy.slot)
        self.loading.append(copy)

    @rule(which=st.integers(0, 9), part=st.floats(0, 1))
    @precondition(lambda self: self.loading)
    def allocate(self, which: int, part: float) -> None:
        copy = self.loading[which % len(self.loading)]
        if not copy.died:
            copy.has_mb = max(copy.has_mb, part * copy.mb)

    @rule(which=st.integers(0, 9))
    @precondition(lambda self: self.loading)
    def end_load(self, which: int) -> None:
        copy = self.loading[which % len(self.loading)]
        if copy.died:
            # Its loader is told, and lets the load fail.
            return
        self.loading.remove(copy)
        copy.has_mb = copy.mb
        with self.namespace.transaction() as t:
            server = 0 if copy.slot is None else copy.slot + 1
            self.namespace.transitions.loads.end(t, copy.row, b"h%d" % copy.row, copy.mb, server, bool(server))
            self.namespace.transitions.holds.release(t, copy.row)
        self.idle.append(copy)

    @rule(which=st.integers(0, 9), lingers_ms=st.integers(0, 900))
    @precondition(lambda self: self.loading)
    def fail_load(self, which: int, lingers_ms: int) -> None:
        """A load fails; the memory that it has taken belongs to its server, which is ended or lingers."""
        copy = self.loading.pop(which % len(self.loading))
        with self.namespace.transaction() as t:
            self.namespace.transitions.loads.give_up(t, copy.row)
        if self.namespace.tables.instances[copy.row].state == Instance.UNLOADING:
            self.unloading.append(copy)
        else:
            self.lingering.append((self.now + lingers_ms * MS, copy.has_mb))

    @rule(which=st.integers(0, 9))
    @precondition(lambda self: self.idle)
    def begin_unload(self, which: int) -> None:
        copy = self.idle.pop(which % len(self.idle))
        with self.namespace.transaction() as t:
            self.namespace.transitions.unloads.begin(t, copy.row, self.namespace.slot, evicted=True)
        self.unloading.append(copy)

    @rule(which=st.integers(0, 9), lingers_ms=st.integers(0, 900))
    @precondition(lambda self: self.unloading)
    def end_unload(self, which: int, lingers_ms: int) -> None:
        copy = self.unloading.pop(which % len(self.unloading))
        self.lingering.append((self.now + lingers_ms * MS, copy.has_mb))
        with self.namespace.transaction() as t:
            self.namespace.transitions.unloads.end(t, copy.row)
            self._end_server(t, copy)

    def _end_server(self, t: transaction_module.Transaction, copy: Loaded) -> None:
        if copy.slot is not None and self.namespace.tables.member_in_use(copy.slot):
            self.namespace.transitions.members.leave(t, copy.slot)

    @rule(which=st.integers(0, 9), lingers_ms=st.integers(0, 100))
    @precondition(lambda self: self.has_servers and (self.loading or self.idle or self.unloading))
    def server_dies(self, which: int, lingers_ms: int) -> None:
        """A server dies by itself, or is told to, before anybody notes that."""
        copies = (*self.loading, *self.idle, *self.unloading)
        copy = copies[which % len(copies)]
        if not copy.died:
            self.lingering.append((self.now + lingers_ms * MS, copy.has_mb))
            copy.died, copy.has_mb = True, 0.0

    @rule()
    @precondition(lambda self: self.has_servers)
    def reap(self) -> None:
        """The leader checks which members live."""
        self.namespace.reap_dead_members()
        self._see_who_was_reaped()

    def _see_who_was_reaped(self) -> None:
        tables = self.namespace.tables
        self.idle = [one for one in self.idle if not one.died or one.slot is None or tables.member_in_use(one.slot)]
        for copy in (*self.loading, *self.unloading):
            if copy.died and copy.slot is not None and not tables.member_in_use(copy.slot):
                # Another server may have the slot from here on.
                copy.slot = None

    @rule(mb=st.floats(0, 3000))
    def others_change(self, mb: float) -> None:
        self.external_mb = min(mb, max(0.0, TOTAL_MB - self.ours_mb))
        self.least_external_mb = min(self.least_external_mb, self.external_mb)

    @rule()
    @precondition(lambda self: self.begun is None)
    def begin_sample(self) -> None:
        self.begun = self.now

    @rule()
    @precondition(lambda self: self.begun is not None and self.read is None)
    def read_figures(self) -> None:
        copies = (*self.loading, *self.idle, *self.unloading)
        listed = {NOBODYS_PID + c.slot: c.has_mb for c in copies if c.slot is not None and c.has_mb}
        self.read = (self.used_mb, listed, self.now)

    @rule()
    @precondition(lambda self: self.read is not None)
    def publish(self) -> None:
        assert self.read is not None and self.begun is not None
        used_mb, listed, done = self.read
        self.now += 1
        if not self.measures_processes:
            listed = {}
        self.samples.publish([DeviceSample(0, used_mb, self.begun, listed, self.lists_all, done_ns=done + 1)])
        self._see_who_was_reaped()
        self.begun = self.read = None

    @rule()
    @precondition(lambda self: not self.loading and not self.unloading)
    def rest(self) -> None:
        """A second after the last change, and after a sample, the accounts say what is true."""
        self.reap()
        self.now += TRUST_ACCOUNTS_NS
        if self.read is not None:
            self.publish()
        self.begun = self.read = None
        for step in (self.begin_sample, self.read_figures, self.publish):
            step()
        self.least_external_mb = self.external_mb
        view = self.view()
        assert view.used_mb + view.reserved_mb == pytest.approx(self.used_mb, abs=0.01)
        if not self.idle and not view.returning_mb:
            assert view.external_least_mb == pytest.approx(self.external_mb, abs=0.01)

    @rule()
    def source_hangs(self) -> None:
        """Without a sample the accounts still come to rest."""
        self.now += TRUST_ACCOUNTS_NS
        with self.namespace.transaction() as t:
            self.namespace.transitions.ledgers.expire(t)

    @invariant()
    def the_books_are_in_order(self) -> None:
        snapshot = read_snapshot("ledger", Path(self.folder.name) / "run", events=False)
        # (The machine's clock is ahead of the snapshot's.)
        assert [line for line in check_invariants(snapshot) if not line.startswith("D1")] == []
        words, layout = self.namespace.segment.words, self.namespace.segment.layout
        assert len(self.namespace.tables.used_rows(layout.instances)) == sum(
            map(len, (self.loading, self.idle, self.unloading))
        )
        view = self.view()
        assert math.isfinite(view.used_mb) and view.reserved_mb >= 0
        assert not any(words[self.namespace.tables.instance(copy.row)] != Instance.LOADING for copy in self.loading)


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[DeviceAndBooks]:
    """A device and its ledger, with servers that a source lists all, in part, or not (the parameter)."""

    class Machine(DeviceAndBooks):
        has_servers, measures_processes, lists_all = True, request.param != "none", request.param == "all"

    machine = Machine()
    yield machine
    machine.teardown()


@pytest.mark.parametrize("machine", ["none", "some", "all"], indirect=True)
def test_memory_of_a_server_that_is_gone_before_its_copy_is_given_away_once(machine: DeviceAndBooks) -> None:
    def sample() -> None:
        machine.time_passes(1)
        machine.begin_sample()
        machine.read_figures()
        machine.publish()

    for mb in (2600.0, 1500.0):
        machine.load(mb)
        machine.time_passes(1)
        machine.end_load(0)
    sample()
    machine.begin_unload(0)
    machine.server_dies(1, 0)
    assert machine.unloading[0].died
    # A load that could explain any figure from here on.
    machine.load(2600.0)
    sample()
    machine.end_unload(0, 0)
    # After that the load is believed to be all there is to see.
    machine.time_passes(1 + HIDDEN_NS // MS)
    sample()
    in_sum_mb = machine.view().used_mb + machine.view().reserved_mb
    assert in_sum_mb >= machine.external_mb + 1500.0 + 2600.0, "the end of the unload has given it back once more"


@pytest.mark.parametrize("machine", ["none", "some", "all"], indirect=True)
def test_a_server_that_is_killed_is_reaped_before_a_figure_is_read_that_lacks_it(
    machine: DeviceAndBooks,
) -> None:
    machine.load(2600.0)
    machine.time_passes(1)
    machine.end_load(0)
    machine.rest()
    machine.load(1500.0)
    machine.server_dies(1, 0)
    assert machine.idle[0].died
    machine.time_passes(1)
    machine.begin_sample()
    machine.read_figures()
    machine.publish()
    # A list of all processes says already that it has nothing.
    assert machine.idle == [] or machine.lists_all, "nobody has looked whether it lives"
    assert machine.view().used_mb + machine.view().reserved_mb >= machine.external_mb + 1500.0


@pytest.mark.parametrize("machine", ["none", "some", "all"], indirect=True)
@pytest.mark.parametrize("noticed", [False, True], ids=["", "reaped"])
def test_what_a_load_has_taken_that_failed_is_given_away_once_it_is_free(
    machine: DeviceAndBooks, noticed: bool
) -> None:
    machine.load(4100.0)
    machine.allocate(0, 0.8)
    machine.server_dies(0, 400)
    if noticed:
        machine.reap()
    machine.fail_load(0, 0)
    if machine.unloading:
        machine.end_unload(0, 0)
    assert machine.lingering_mb > 3000.0
    assert free_mb(machine.view(), SLACK) <= LIMIT_MB - machine.used_mb
    machine.time_passes(401)
    machine.rest()
    assert free_mb(machine.view(), SLACK) == pytest.approx(LIMIT_MB - machine.external_mb)


@pytest.mark.parametrize("machine", ["some", "all"], indirect=True)
def test_a_figure_from_the_middle_of_a_load_does_not_say_what_the_copy_takes(machine: DeviceAndBooks) -> None:
    machine.load(1500.0)
    machine.time_passes(1)
    machine.begin_sample()
    machine.allocate(0, 0.05)
    machine.read_figures()
    machine.time_passes(1)
    machine.end_load(0)
    machine.publish()
    assert free_mb(machine.view(), SLACK) == pytest.approx(LIMIT_MB - machine.external_mb - 1500.0)
    machine.rest()
    assert free_mb(machine.view(), SLACK) == pytest.approx(LIMIT_MB - machine.external_mb - 1500.0)


def test_what_an_object_has_loaded_whose_load_failed_is_given_away_once_it_is_free() -> None:
    class Machine(DeviceAndBooks):
        has_servers, measures_processes, lists_all = False, False, False

    machine = Machine()
    try:
        machine.load(4100.0)
        machine.allocate(0, 0.8)
        machine.fail_load(0, 400)
        assert free_mb(machine.view(), SLACK) <= LIMIT_MB - machine.used_mb
        machine.time_passes(401)
        machine.rest()
        assert free_mb(machine.view(), SLACK) == pytest.approx(LIMIT_MB - machine.external_mb)
    finally:
        machine.teardown()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("has_servers", "measures_processes", "lists_all"),
    [(False, False, False), (True, False, False), (True, True, True), (True, True, False)],
    ids=["objects, whole device", "servers, whole device", "processes", "some processes"],
)
def test_random_work_agrees_with_a_device_whose_truth_is_known(
    has_servers: bool, measures_processes: bool, lists_all: bool
) -> None:
    steps = int(os.environ.get("MPMM_TEST_STEPS", "50"))
    examples = int(os.environ.get("MPMM_TEST_EXAMPLES", "30"))

    class Machine(DeviceAndBooks):
        pass

    Machine.has_servers, Machine.measures_processes, Machine.lists_all = has_servers, measures_processes, lists_all
    Machine.TestCase.settings = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, transaction_module, "time", time)
        Machine.TestCase("runTest").runTest()
