"""Figures of single processes and of the whole device: no memory is given away twice."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from crash_lab import Lab
from crash_lab import lab as lab  # the fixture
from harness import NOBODYS_PID

from mpmm.memory.listed_pids import ListedPids
from mpmm.memory.samples import SharedSamples
from mpmm.scheduling import Scheduler
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Device, Member
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources import DeviceInfo, DeviceSample

SERVER, PID = 1, NOBODYS_PID


class MeasuringSource:
    """A device of 1 000 MB whose figures the test makes up."""

    name = "made up"
    measures_processes = True
    process_knowledge: bool | None = True
    frees_late = False
    cheap = True

    def devices(self) -> tuple[DeviceInfo, ...]:
        return (DeviceInfo(0, "made-up-0", "made up", 1000.0),)

    def sample(self, server_pids: object) -> tuple[DeviceSample, ...]:
        return ()

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def samples(namespace: str) -> Iterator[SharedSamples]:
    """The samples of a namespace with one model server, and no leader that would find out that it does not live."""
    joined = Namespace.join(namespace)
    samples = SharedSamples(joined, Scheduler(joined))
    source = MeasuringSource()
    samples.describe(source, source.devices(), ())
    with joined.transaction() as t:
        joined.transitions.members.join(t, SERVER, Member.SERVER, PID, 1, b"server")
    yield samples
    joined.leave()


def sample(used_mb: float, taken_ns: int, process_mb: float) -> list[DeviceSample]:
    return [DeviceSample(0, used_mb, taken_ns, {PID: process_mb})]


def unload(joined: Namespace, before_the_sample: bool, samples: SharedSamples) -> None:
    """Load and unload a copy of 100 MB that the server keeps; a sample comes before the unload begins or during it."""
    transitions = joined.transitions
    with joined.transaction() as t:
        model = transitions.models.claim(t, "a", b"a")
        row = transitions.loads.begin(t, model, joined.slot, 1, 100.0, alone=False)
        transitions.loads.link_server(t, row, SERVER)
        transitions.loads.end(t, row, b"handle", 100.0, SERVER + 1, True)
        transitions.holds.release(t, row)
    if before_the_sample:
        samples.publish(sample(500.0, time.monotonic_ns(), 100.0))
    with joined.transaction() as t:
        transitions.unloads.begin(t, row, joined.slot, evicted=True)
    if not before_the_sample:
        # The server is gone by now, and the figure knows it.
        samples.publish(sample(400.0, time.monotonic_ns(), 0.0))
    with joined.transaction() as t:
        transitions.unloads.end(t, row)


def committed_mb(samples: SharedSamples) -> float:
    """Return what admission counts as taken of the device."""
    with samples._namespace.transaction():
        view = samples._scheduler.device_views(samples._scheduler.read_copies())[0]
    return view.used_mb + view.reserved_mb


@pytest.mark.parametrize("before_the_sample", [True, False], ids=["before", "during"])
def test_unloaded_memory_is_taken_off_once(samples: SharedSamples, before_the_sample: bool) -> None:
    unload(samples._namespace, before_the_sample, samples)
    assert committed_mb(samples) == 400.0


@pytest.mark.parametrize(
    ("knowledge", "name", "pid", "shows"),
    [
        (None, "made up", PID, True),
        (True, "made up", PID, True),
        (False, "made up", PID, False),
        (None, "another", PID, False),
        (None, "made up", PID + 100, False),
    ],
    ids=["it may show", "it knows", "it does not tell", "others lead with another source", "a stranger's"],
)
def test_a_figure_of_a_process_of_ours_shows_that_the_source_knows_them(
    samples: SharedSamples, knowledge: bool | None, name: str, pid: int, shows: bool
) -> None:
    joined, source = samples._namespace, MeasuringSource()
    source.process_knowledge = knowledge
    samples.describe(source, source.devices(), ())
    with joined.transaction() as t:
        joined.transitions.members.lead(t, joined.slot, name.encode(), (False, False, False))
    samples.publish([DeviceSample(0, 500.0, time.monotonic_ns(), {pid: 100.0})])
    assert joined.tables.header.source_measures_processes is shows


def test_a_sample_that_is_too_old_for_the_device_is_too_old_for_its_processes(samples: SharedSamples) -> None:
    joined = samples._namespace
    began = time.monotonic_ns()
    unload(joined, True, samples)
    measured = joined.tables.member(SERVER) + Member.MEASURED_MB
    assert joined.segment.floats[measured] == 100.0
    samples.publish(sample(900.0, began, 300.0))
    assert joined.segment.floats[measured] == 100.0
    assert committed_mb(samples) == 400.0
    samples.publish(sample(700.0, time.monotonic_ns(), 300.0))
    assert joined.segment.floats[measured] == 300.0
    assert not math.isnan(joined.segment.floats[joined.tables.device(0) + Device.USED_MB])


def test_the_last_figures_of_a_device_are_kept_in_their_order(samples: SharedSamples) -> None:
    count = Device.RING_LENGTH + 3
    for number in range(count):
        samples.publish(sample(float(number), time.monotonic_ns(), 0.0))
    kept = read_snapshot(samples._namespace.name).devices[0].samples
    assert [mb for _, mb in kept] == [float(number) for number in range(3, count)]


def test_a_peak_is_the_highest_figure_in_the_window(samples: SharedSamples) -> None:
    joined, now = samples._namespace, time.monotonic_ns()
    before_it = now - to_ns(joined.settings.peak_window_seconds) - 1
    for used_mb, taken_ns in ((950.0, before_it), (800.0, now), (300.0, now + 1)):
        samples.publish(sample(used_mb, taken_ns, 0.0))
    device = read_snapshot(joined.name).devices[0]
    assert (device.used_mb, device.peak_mb, device.peak_since_start_mb) == (300.0, 800.0, 950.0)


def test_a_load_that_runs_alone_knows_nothing_of_the_figure_before_another_one(samples: SharedSamples) -> None:
    joined = samples._namespace
    transitions, device = joined.transitions, joined.tables.devices[0]

    def begin() -> int:
        with joined.transaction() as t:
            return transitions.loads.begin(t, transitions.models.claim(t, "a", b"a"), joined.slot, 1, 100.0, alone=True)

    row = begin()
    samples.publish(sample(300.0, time.monotonic_ns(), 0.0))
    with joined.transaction() as t:
        transitions.isolation.set_baseline(t, row)
    assert device.baseline_mb == 300.0
    with joined.transaction() as t:
        transitions.loads.fail(t, row)
    begin()
    assert math.isnan(device.baseline_mb)


def test_a_process_starts_without_the_figures_of_the_one_that_had_its_row(samples: SharedSamples) -> None:
    joined = samples._namespace
    for leaves in (joined.transitions.members.leave, joined.transitions.members.reap):
        samples.publish(sample(500.0, time.monotonic_ns(), 100.0))
        server = joined.tables.members[SERVER]
        assert (server.measured_mb, server.peak_mb) == (100.0, 100.0)
        with joined.transaction() as t:
            assert leaves(t, SERVER)
        with joined.transaction() as t:
            joined.transitions.members.join(t, SERVER, Member.SERVER, PID, 2, b"another")
        assert math.isnan(server.measured_mb)
        assert server.peak_mb == 0.0


def note(lab: Lab, used_mb: float, taken_ns: int | None = None) -> None:
    """Note a sample of the first device, by default one that was asked for just now."""
    lab.do(lambda t, tr: tr.devices.sample(t, 0, used_mb, taken_ns or time.monotonic_ns()))


def test_an_unload_notes_the_figure_that_stood_then_if_there_was_one(lab: Lab) -> None:
    noted_mb = []
    for figure_mb in (None, 490.0, 0.0):
        if figure_mb is not None:
            note(lab, figure_mb)
        row = lab.unloading("a")
        with lab.namespace.transaction() as t:
            lab.namespace.transitions.unloads.end(t, row)
        noted_mb.append(lab.namespace.transitions.ledgers.read(0).returns[-1].before_mb)
    assert math.isnan(noted_mb.pop(0)), "nobody had read a figure"
    assert noted_mb == [490.0, 0.0]


@pytest.mark.parametrize("state", ["loading", "resuming", "active"])
@pytest.mark.parametrize("devices", [1, 3], ids=["one device", "two devices"])
def test_people_see_as_taken_what_admission_counts(lab: Lab, state: str, devices: int) -> None:
    """Also memory that a server has taken beyond its reservation, as long as the source measures processes."""
    first = lab.resuming("a", server=True) if state == "resuming" else None
    model = lab.model("a")
    with lab.namespace.transaction() as t:
        tr = lab.namespace.transitions
        row = first if first is not None else tr.loads.begin(t, model, lab.victim, devices, 100.0, alone=False)
        if first is None:
            tr.loads.link_server(t, row, lab.server)
        if state == "active":
            tr.loads.end(t, row, b"h", 100.0, lab.server + 1, True)
    for knows in (True, False):
        with lab.namespace.transaction() as t:
            tr.members.lead(t, 0, b"test", (knows, False, False))
            tr.measurements.measure(t, lab.server, {0: 300.0, 1: 150.0})
            scheduler = Scheduler(lab.namespace)
            views = scheduler.device_views(scheduler.read_copies())
        shown = [device.committed_mb for device in read_snapshot(lab.namespace.name).devices]
        assert shown == pytest.approx([view.used_mb + view.reserved_mb for view in views])
        if knows and state != "active":
            assert shown[0] == 300.0


def test_the_program_of_a_lease_is_known_where_its_holder_is(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    row, pids = lab.leased(), ListedPids(lab.namespace)
    assert pids.leases() == {}, "nobody has said which it is"
    lab.do(lambda t, tr: tr.leases.link_program(t, row, PID))
    assert pids.leases() == {row: PID}
    # In another container it may be anybody's pid.
    monkeypatch.setattr("mpmm.memory.listed_pids.pid_namespace", lambda: 4711)
    for is_here in (True, False):
        monkeypatch.setattr("mpmm.memory.listed_pids.is_member_here", lambda tables, slot, found=is_here: found)
        assert ListedPids(lab.namespace).leases() == ({row: PID} if is_here else {})


@pytest.mark.parametrize(("here", "apart"), [(None, False), (4711, True), (0, False)], ids=["same", "other", "unknown"])
def test_members_are_known_to_be_apart_where_this_process_is_in_another_container(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, here: int | None, apart: bool
) -> None:
    if here is not None:
        monkeypatch.setattr("mpmm.memory.listed_pids.pid_namespace", lambda: here)
    assert ListedPids(lab.namespace).are_apart() is apart


def test_a_device_that_takes_the_row_of_another_begins_anew(lab: Lab) -> None:
    def figures() -> list[dict[str, Any]]:
        shown = [asdict(device) for device in read_snapshot(lab.namespace.name).devices]
        return [{name: value for name, value in one.items() if name not in ("name", "uuid")} for one in shown]

    new = figures()
    lab.do(lambda t, tr: tr.pins.pin(t, lab.namespace.transitions.models.claim(t, "b", b"b"), -1))
    for number in range(2):
        with lab.namespace.transaction() as t:
            lab.namespace.transitions.devices.sample(t, number, 400.0, time.monotonic_ns())
    row = lab.unloading("a")
    lab.do(lambda t, tr: tr.unloads.end(t, row))
    assert all(one != other for one, other in zip(figures(), new, strict=True))
    words = list(lab.words[lab.layout.pins.base : lab.layout.pins.end])
    lab.do(lambda t, tr: tr.devices.describe(t, [(b"uuid-2", b"gpu 2", 1000.0), (b"uuid-3", b"gpu 3", 1000.0)], True))
    assert figures() == new
    assert list(lab.words[lab.layout.pins.base : lab.layout.pins.end]) == words


def test_what_a_suspended_copy_keeps_on_its_device_is_no_other_programs(lab: Lab) -> None:
    """Its memory may be on its way while a sample is taken, and what is left of it is what its server has."""
    row = lab.suspended("a", server=True)
    lab.do(lambda t, tr: tr.measurements.measure(t, lab.server, {0: 50.0}))
    external_mb = []
    for taken_ns in (lab.tables.instances[row].since - 1, time.monotonic_ns()):
        note(lab, 400.0, taken_ns)
        external_mb.append(read_snapshot(lab.namespace.name).devices[0].external_mb)
    assert external_mb == [400.0, 350.0]


def test_what_a_source_that_tells_no_processes_has_told_before_says_nothing(lab: Lab) -> None:
    row = lab.active("a", server=True)
    lab.do(lambda t, tr: tr.measurements.measure(t, lab.server, {0: 300.0}))
    ledgers = lab.namespace.transitions.ledgers
    assert ledgers.measured_share(row, 0) == 300.0
    lab.do(lambda t, tr: tr.members.lead(t, 0, b"another", (False, False, False)))
    assert ledgers.measured_share(row, 0) is None


def test_a_figure_below_what_is_certain_contradicts_it_and_the_same_one_does_not(lab: Lab) -> None:
    note(lab, 400.0)
    lab.idle("a")
    note(lab, 490.0)
    now = time.monotonic_ns()
    with lab.namespace.transaction():
        is_contradicted = lab.namespace.transitions.ledgers.is_contradicted
        assert [is_contradicted(0, used_mb, now, now) for used_mb in (489.0, 490.0, 491.0)] == [True, False, False]


@pytest.mark.parametrize("is_linked", [False, True], ids=["nobody knows its program", "its program is not measured"])
def test_what_a_lease_has_taken_of_its_memory_is_no_other_programs(lab: Lab, is_linked: bool) -> None:
    note(lab, 400.0)
    row = lab.leased()
    if is_linked:
        lab.do(lambda t, tr: tr.leases.link_program(t, row, NOBODYS_PID))
        lab.do(lambda t, tr: tr.members.lead(t, 0, b"another source", (False, False, False)))
    external_mb = []
    for used_mb in (400.0, 470.0, 500.0):
        note(lab, used_mb)
        external_mb.append(read_snapshot(lab.namespace.name).devices[0].external_mb)
    assert external_mb == [400.0, 400.0, 430.0], "the lease is for 70 MB"
