"""What a published sample changes in members and in their servers' figures, word by word."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from harness import NOBODYS_PID
from row_changes import SECOND_NS, RowChanges
from row_changes import it as it  # the fixture

from mpmm.memory.listed_pids import ListedPids
from mpmm.memory.samples import SharedSamples
from mpmm.policy.suspension import Way
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Device, Header
from mpmm.shared_state.namespace import Namespace
from mpmm.sources import DeviceInfo, DeviceSample

WORKER, SERVER, OTHER = (NOBODYS_PID + slot for slot in (1, 3, 4))
STRANGER = NOBODYS_PID + 77


def sees(it: RowChanges, devices: tuple[int, ...] = (0, 1, 2)) -> SharedSamples:
    """Return the samples of a process that sees some of the devices, by indices of its own: one more than the rows."""
    samples = SharedSamples(it.namespace, Scheduler(it.namespace))
    source: Any = SimpleNamespace(
        name="made up", measures_processes=True, frees_late=False, cheap=True, sample=None, devices=None, close=None
    )
    infos = [DeviceInfo(row + 1, f"uuid-{row}", "gpu", 9000.0 - row) for row in devices]
    samples.describe(source, infos)
    it.wait(1)
    return samples


def sample(
    it: RowChanges,
    row: int,
    processes: dict[int, float],
    *,
    used_mb: float | None = 1500.0,
    ago_s: float = 0.0,
    known: bool = True,
) -> DeviceSample:
    """Return a sample of a device (row)."""
    taken = it.now - int(ago_s * SECOND_NS)
    return DeviceSample(row + 1, used_mb, taken, processes, done_ns=taken, processes_known=known)


def of_members(changes: str) -> list[str]:
    """Return what has changed of members and instances alone."""
    return [line for line in changes.splitlines() if line.startswith(("member", "instance"))]


def of_all(it: RowChanges, mb: float = 30.0, **of_last: Any) -> list[DeviceSample]:
    """Return samples of all devices that show a worker on the second one. of_last: what is special about the last."""
    return [
        sample(it, 0, {OTHER: 200.0}),
        sample(it, 1, {SERVER: 510.0, **({WORKER: mb} if mb else {})}),
        sample(it, 2, {OTHER: 300.0}, **of_last),
    ]


Case = tuple[str, Callable[[RowChanges], list[DeviceSample]], list[str]]
MEASURED = ["member 3: MEASURED_MB=520 PEAK_MB=520", "instance 1: MB=520"]
# Of all workers: each might have memory on the device that does not tell.
UNKNOWN = [f"member {slot}: MEASURED_MB=nan" for slot in range(3)]
NOTHING = ["member 3: MEASURED_MB=0", "instance 1: MB=0"]
CASES: list[Case] = [
    (
        "a server and a worker on one device",
        lambda it: [
            *of_all(it)[::2],
            sample(it, 1, {SERVER: 520.0, WORKER: 30.0, STRANGER: 200.0}),
        ],
        ["member 1: MEASURED_MB=30 PEAK_MB=30", *MEASURED],
    ),
    ("a worker on one of its devices alone", lambda it: of_all(it)[1:2], []),
    ("a worker that is still on no list", lambda it: of_all(it, 0.0), []),
    ("a worker, and a device without a figure", lambda it: of_all(it, used_mb=None, known=False), UNKNOWN),
    ("a worker, and a list that may lack it", lambda it: of_all(it, known=False), UNKNOWN),
    ("lists one of which may lack a worker", lambda it: of_all(it, 0.0, known=False), UNKNOWN),
    (
        "both devices of a copy that spans them",
        lambda it: [sample(it, 0, {OTHER: 210.0}), sample(it, 2, {OTHER: 320.0})],
        [
            "member 4: MEASURED_MB=530 PEAK_MB=530 SHARES=210 SHARES[1]=320",
            "instance 2: MB=530 SHARES=210 SHARES[1]=320",
        ],
    ),
    ("one device of a copy that spans two", lambda it: [sample(it, 0, {OTHER: 210.0})], []),
    ("another device than that of the copy", lambda it: [sample(it, 2, {SERVER: 60.0})], []),
    ("a list without the server", lambda it: [sample(it, 1, {})], NOTHING),
    ("a list that may lack it", lambda it: [sample(it, 1, {}, known=False)], ["member 3: MEASURED_MB=nan"]),
    ("a list of another device", lambda it: [sample(it, 0, {})], []),
    ("a figure that could not be read", lambda it: [sample(it, 1, {SERVER: 520.0}, used_mb=None)], MEASURED),
    ("a figure that is older than the last one", lambda it: [sample(it, 1, {SERVER: 520.0}, ago_s=60)], []),
    ("a device that nobody has described", lambda it: [sample(it, 7, {SERVER: 520.0})], []),
]


@pytest.mark.parametrize(("make", "changed"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_sample_counts_for_the_devices_that_it_is_of(
    it: RowChanges, make: Callable[[RowChanges], list[DeviceSample]], changed: list[str]
) -> None:
    it.active(server=3)
    it.active(handle=b"wide", server=4, devices=(0, 2))
    samples = sees(it)
    first = {0: {OTHER: 200.0}, 1: {SERVER: 510.0}, 2: {OTHER: 300.0}}
    samples.publish([sample(it, row, processes, used_mb=900.0) for row, processes in first.items()])
    it.wait(5)
    published = make(it)
    assert of_members(it.changes_of(lambda: samples.publish(published))) == changed


def test_a_worker_whose_memory_was_unknown_has_none_once_all_lists_lack_it(it: RowChanges) -> None:
    it.active(server=3)
    it.active(handle=b"wide", server=4, devices=(0, 2))
    samples, worker = sees(it), it.tables.members[1]
    for published, mb in (
        (of_all(it), 30.0),
        (of_all(it, 0.0, known=False), math.nan),
        (of_all(it, 0.0, used_mb=None, known=False), math.nan),
        (of_all(it, 0.0), 0.0),
    ):
        it.wait(1)
        samples.publish([replace(one, taken_ns=it.now, done_ns=it.now) for one in published])
        assert worker.measured_mb == pytest.approx(mb, nan_ok=True)


def test_waiters_are_planned_for_where_a_sample_shows_more_room_and_nowhere_else(it: RowChanges) -> None:
    samples, planned = sees(it), []
    figures: list[tuple[float | None, bool]] = [
        *((None, False), (None, False), (1500.0, True), (1500.0, False), (1499.5, False), (1498.5, True)),
        *((1600.0, False), (None, False), (1600.0, False)),
    ]
    with mock.patch.object(Scheduler, "advance", side_effect=lambda t: planned.append(t)):
        for used_mb, shows_more in figures:
            planned.clear()
            it.wait(1)
            samples.publish([sample(it, 1, {}, used_mb=used_mb)])
            assert bool(planned) == shows_more, used_mb


def test_processes_are_known_once_a_sample_shows_one_of_ours(it: RowChanges) -> None:
    it.poke(Header.SOURCE_MEASURES_PROCESSES, 0)
    samples = sees(it)
    shown: list[tuple[dict[int, float], int]] = [({}, 0), ({STRANGER: 100.0}, 0), ({WORKER: 30.0}, 1)]
    for processes, known in shown:
        samples.publish([sample(it, 1, processes)])
        it.wait(1)
        assert it.words[Header.SOURCE_MEASURES_PROCESSES] == known


@pytest.mark.parametrize(("done_ago_s", "contradicts"), [(None, False), (0.5, False), (1.5, True)])
def test_a_figure_below_what_a_copy_had_for_certain_shows_that_its_server_may_be_dead(
    it: RowChanges, done_ago_s: float | None, contradicts: bool
) -> None:
    """The unload begins one second before the figure is published; a sample that does not say may end only then."""
    it.poke(Header.SOURCE_MEASURES_PROCESSES, 0)
    row, samples = it.idle(server=3, devices=(1,)), sees(it)
    samples.publish([sample(it, 1, {}, used_mb=500.0)])
    it.wait(10)
    it.do(lambda t: it.to.unloads.begin(t, row, 2, False), after_s=1)
    done_ns = 0 if done_ago_s is None else it.now - int(done_ago_s * SECOND_NS)
    with mock.patch.object(Namespace, "reap_if_dead", return_value=False) as reaps:
        samples.publish([replace(sample(it, 1, {}, used_mb=100.0, ago_s=2.0), done_ns=done_ns)])
    assert [call.args[1] for call in reaps.call_args_list] == ([3] if contradicts else [])


def test_a_load_that_runs_alone_no_longer_does_once_processes_are_shown(it: RowChanges) -> None:
    it.poke(Header.SOURCE_MEASURES_PROCESSES, 0)
    row = it.loading(devices=(1,))
    it.do(lambda t: it.to.isolation.begin(t, row))
    samples = sees(it)
    shown: list[tuple[dict[int, float], int | None]] = [({STRANGER: 100.0}, row), ({WORKER: 30.0}, None)]
    for processes, isolated in shown:
        samples.publish([sample(it, 1, processes)])
        it.wait(1)
        assert it.tables.devices[1].isolated == isolated


@pytest.mark.parametrize(
    ("name", "seen", "known"), [("made up", None, 1), ("another", None, 0), ("another", True, 1), ("made up", False, 0)]
)
def test_a_new_leader_relies_on_what_others_have_seen_of_the_same_source(
    it: RowChanges, name: str, seen: bool | None, known: int
) -> None:
    assert it.words[Header.SOURCE_MEASURES_PROCESSES] == 1
    source: Any = SimpleNamespace(name=name, measures_processes=True, process_knowledge=seen, frees_late=False)
    infos = [DeviceInfo(row + 1, f"uuid-{row}", "gpu", 9000.0 - row) for row in range(3)]
    SharedSamples(it.namespace, Scheduler(it.namespace)).describe(source, infos, next_in_line=())
    assert it.words[Header.SOURCE_MEASURES_PROCESSES] == known


def test_what_a_process_sees_is_named_only_where_there_are_other_devices(namespace: str) -> None:
    joined = Namespace.join(namespace)
    there: Any = SimpleNamespace(namespace=joined, wait=lambda seconds: None)
    first = sees(there, (0,))
    assert first.visible_bits() == 0
    every, second = sees(there, (0, 1)), sees(there, (1,))
    assert (first.visible_bits(), second.visible_bits(), every.visible_bits()) == (0b01, 0b10, 0)
    joined.leave()


def test_a_server_that_has_ended_is_no_other_program_for_as_long_as_its_memory_may_take_to_come_back(
    it: RowChanges,
) -> None:
    pids = ListedPids(it.namespace)
    assert set(pids.to_measure()) == {SERVER, OTHER}
    it.do(lambda t: it.to.members.reap(t, 3), 0)
    unrelated = []
    for ns in (0, 20 * SECOND_NS, 1):
        it.now += ns
        assert set(pids.to_measure()) == {OTHER}
        unrelated.append(pids.unrelated({SERVER: 1.0, OTHER: 1.0, STRANGER: 1.0}))
    assert unrelated == [{STRANGER}, {STRANGER}, {STRANGER, SERVER}]


ENGINE, PART, ORPHAN, PROGRAM, TOOL = (NOBODYS_PID + number for number in (81, 82, 83, 84, 85))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """The parent of each process, and when it started: a server has an engine of two processes, and more."""
    processes = {
        **{ENGINE: (SERVER, 5), PART: (ENGINE, 6), ORPHAN: (SERVER, 7)},
        # A server that another one has started, and programs of a worker, one of which a server has started.
        **{OTHER: (ENGINE, 8), PROGRAM: (WORKER, 9), TOOL: (PROGRAM, 10), WORKER: (SERVER, 1)},
    }
    root = "mpmm.sources.process_tree."
    monkeypatch.setattr(root + "_parent_of", lambda pid: processes.get(pid, (None, 0))[0])
    monkeypatch.setattr(root + "_children", lambda pid: [child for child, (of, _) in processes.items() if of == pid])
    monkeypatch.setattr("mpmm.memory.listed_pids.start_time", lambda pid: processes.get(pid, (0, 0))[1])
    return processes


def test_what_a_server_has_started_counts_as_its_own_once(it: RowChanges, started: dict[int, tuple[int, int]]) -> None:
    it.active(server=3)
    samples = sees(it)
    listed = {SERVER: 20.0, ENGINE: 300.0, PART: 40.0, OTHER: 7.0, WORKER: 5.0, TOOL: 100.0, STRANGER: 200.0}
    changes = it.changes_of(
        lambda: samples.publish([sample(it, 0, {}), sample(it, 1, listed), sample(it, 2, {})])
    ).splitlines()
    assert "member 3: MEASURED_MB=360 PEAK_MB=360" in changes and "instance 1: MB=360" in changes
    assert "member 4: MEASURED_MB=7 PEAK_MB=7" in changes and "member 1: MEASURED_MB=5 PEAK_MB=5" in changes
    assert it.tables.devices[1].unrelated_mb == 300, "a worker's programs, and the stranger"


def test_a_server_is_listed_if_only_its_engine_is_and_shows_that_processes_are_known(
    it: RowChanges, started: dict[int, tuple[int, int]]
) -> None:
    it.poke(Header.SOURCE_MEASURES_PROCESSES, 0)
    it.active(server=3)
    samples = sees(it)
    samples.publish([sample(it, 1, {ENGINE: 300.0})])
    assert it.words[Header.SOURCE_MEASURES_PROCESSES] == 1
    assert it.tables.members[3].measured_mb == 300


def test_a_process_whose_parent_has_ended_stays_the_servers_for_as_long_as_it_is_that_process(
    it: RowChanges, started: dict[int, tuple[int, int]]
) -> None:
    it.active(server=3)
    samples = sees(it)

    def measured() -> tuple[float, float]:
        it.wait(1)
        samples.server_pids()
        samples.publish([sample(it, 1, {ORPHAN: 300.0})])
        return it.tables.members[3].measured_mb, it.tables.devices[1].unrelated_mb

    assert measured() == (300, 0)
    started[ORPHAN] = 1, 7
    assert measured() == (300, 0)
    del started[ORPHAN]
    assert measured() == (300, 0), "it has ended since the sample"
    started[ORPHAN] = 1, 70
    assert measured() == (0, 300), "another process has its pid"


def test_what_a_server_has_started_is_no_other_program_while_its_memory_may_come_back(
    it: RowChanges, started: dict[int, tuple[int, int]]
) -> None:
    samples = sees(it)

    def unrelated_mb() -> float:
        it.wait(1)
        samples.server_pids()
        samples.publish([sample(it, 1, {ORPHAN: 300.0})])
        return it.tables.devices[1].unrelated_mb

    assert unrelated_mb() == 0
    it.do(lambda t: it.to.members.reap(t, 3), 0)
    started[ORPHAN] = 1, 7
    assert unrelated_mb() == 0
    it.wait(20)
    assert unrelated_mb() == 300


def test_nothing_is_looked_up_while_only_members_are_listed(it: RowChanges, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = SimpleNamespace(measures_processes=True, ignores_names=True)
    samples, asks = sees(it), mock.Mock(return_value=[])
    samples._source = source
    for name in ("_parent_of", "_children", "_stat_of"):
        monkeypatch.setattr(f"mpmm.sources.process_tree.{name}", asks)
    samples.server_pids()
    samples.publish([sample(it, 1, {SERVER: 520.0, WORKER: 30.0})])
    asks.assert_not_called()


@pytest.mark.parametrize(
    ("ignores", "knowledge", "named"),
    [(True, True, False), (True, False, False), (True, None, True), (False, True, True)],
)
def test_what_servers_have_started_is_named_to_sources_that_need_it(
    ignores: bool, knowledge: bool | None, named: bool, it: RowChanges, started: dict[int, tuple[int, int]]
) -> None:
    samples = sees(it)
    source: Any = SimpleNamespace(measures_processes=True, process_knowledge=knowledge, ignores_names=ignores)
    samples._source = source
    assert set(samples.server_pids()) == {SERVER, OTHER, *((ENGINE, PART, ORPHAN) if named else ())}


@pytest.mark.parametrize("state", ["active", "idle", "suspended"])
def test_a_copy_whose_servers_other_processes_have_its_memory_is_not_suspended_by_a_checkpoint(
    state: str, it: RowChanges, started: dict[int, tuple[int, int]]
) -> None:
    row = it.active(server=3)
    it.do(lambda t: it.to.suspensions.note_way(t, row, Way.CHECKPOINT))
    if state != "active":
        it.do(lambda t: it.to.holds.release(t, row))
    if state == "suspended":
        it.do(lambda t: it.to.suspensions.begin(t, row, 2, False))
        it.do(lambda t: it.to.suspensions.end(t, row))
    samples = sees(it)
    samples.publish([sample(it, 1, {SERVER: 20.0, ENGINE: 0.0})])
    assert it.tables.instances[row].way == Way.CHECKPOINT
    it.wait(1)
    samples.publish([sample(it, 1, {SERVER: 20.0, ENGINE: 300.0}, used_mb=1800.0)])
    assert samples.is_spread(SERVER) and not samples.is_spread(OTHER)
    # One that is suspended already needs the way by which it was, and still counts with what is left on the device.
    assert it.tables.instances[row].way == (Way.CHECKPOINT if state == "suspended" else Way.NONE)
    assert it.tables.instances[row].mb == 320


def test_devices_that_gave_way_are_forgotten_and_the_lock_is_not_taken_for_nothing(it: RowChanges) -> None:
    samples, at = sees(it), [it.tables.device(row) for row in range(3)]

    def forgotten() -> str | None:
        before = it.words[Header.CHANGE]
        changes = it.changes_of(samples.forget_stated_devices)
        return None if it.words[Header.CHANGE] == before else changes

    assert forgotten() is None, "all are measured"
    for row in (1, 2):
        it.poke(at[row] + Device.MEASURED, 0)
    it.poke(at[0] + Device.TOTAL_MB, 0.0)
    assert forgotten() is None, "none has given way"
    it.poke(at[2] + Device.TOTAL_MB, 0.0)
    assert forgotten() is None, "a copy lies there"
    it.poke(at[0] + Device.MEASURED, 0)
    assert forgotten() == "device 0: STATE=0"


def test_each_process_knows_devices_by_its_own_indices(it: RowChanges) -> None:
    some, every = sees(it, (1, 2)), sees(it)
    assert (some.rows(), every.rows()) == ([1, 2], [0, 1, 2])
    assert (some.visible_bits(), every.visible_bits()) == (0b110, 0)
    chosen: list[tuple[list[int | str], int]] = [
        ([2], 0b10),
        (["uuid-2"], 0b100),
        ([2, "uuid-2"], 0b110),
        ([3, 2], 0b110),
        ([], 0),
    ]
    for names, bits in chosen:
        assert some.bits_of(names) == bits
    others: list[int | str] = [1, 4, "uuid-0", "no such", True]
    for nothing in others:
        with pytest.raises(ValueError, match=r"is not among the devices of this process: 2 \(uuid-1\), 3 \(uuid-2\)"):
            some.bits_of([nothing])
    placement = some.placement_of(0b111, 600.0)
    assert (placement.indices, placement.uuids, placement.mb) == ((2, 3), ("uuid-0", "uuid-1", "uuid-2"), 600.0)
