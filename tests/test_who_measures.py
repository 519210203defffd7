"""Processes of one namespace with different memory sources: which one leads, and which one describes the devices."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from device import SimulatedDevice
from harness import (
    NOBODYS_PID,
    NewDevice,
    NewManager,
    NewProcess,
    Process,
    Seat,
    acquire,
    copies_of,
    leader_pid,
    learn,
    problems,
    release,
    stop_outside_of_transactions,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject
from patience import DEADLINE_S
from random_tables import SECOND_NS, RandomTables

from mpmm import cli
from mpmm.memory.samples import SharedSamples
from mpmm.model_manager import leader as leader_module
from mpmm.model_manager.leader import DEPUTIES
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Member
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.poll_claims import claim_late_looks
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources import Measures, MemorySource, what_it_measures
from mpmm.sources.booked import BookedSource

TOTAL_MB = 16000.0
# A source of the caller's own, because a namespace that was made for the source `booked` has that alone.
BLIND: dict[str, Any] = {"memory_source": BookedSource(TOTAL_MB), "default_estimate_mb": 1000.0}


def device_names(namespace: str) -> list[str]:
    return [device.uuid for device in read_snapshot(namespace).devices]


def leads(namespace: str, process: Process) -> bool:
    return leader_pid(read_snapshot(namespace)) == process.pid


def source_of(seat: Seat) -> str:
    """Return the name of the source that the process reads."""
    return str(seat.manager._connected().source.name)


class TellsProcesses(SimulatedDevice):
    """A device whose source knows single processes."""

    name = "by process"
    measures_processes = True


def test_what_a_source_measures_is_ranked(new_device: NewDevice, tmp_path: Path) -> None:
    order: list[MemorySource] = [BookedSource(1.0), new_device(1.0), TellsProcesses(tmp_path / "other", 1.0)]
    assert [what_it_measures(source) for source in order] == [Measures.NOTHING, Measures.DEVICES, Measures.PROCESSES]
    assert Measures.UNKNOWN < Measures.NOTHING < Measures.DEVICES < Measures.PROCESSES


def test_a_process_that_cannot_measure_uses_the_devices_of_those_that_can(
    namespace: str, new_process: NewProcess, new_device: NewDevice
) -> None:
    device = new_device(TOTAL_MB)
    sees, blind = new_process(memory_source=device), new_process(**BLIND)
    assert blind.call(source_of) == "booked"
    sees.call(learn, x=9000, y=9000)
    sees.call(acquire, "x", LoadsObject("x", device=device, mb=9000))
    assert device_names(namespace) == ["sim-0"]
    blind.send(acquire, "y", LoadsObject("y", device=device, mb=9000))
    wait_until(lambda: waiting(namespace, "y"), "there is no room beside x")
    sees.call(release)
    blind.result()
    assert copies_of(namespace, "x") == []
    assert (device.used_mb(), device_names(namespace)) == (9000, ["sim-0"])
    assert leads(namespace, sees)
    assert problems(namespace) == []


def test_the_lead_goes_to_the_process_that_can_measure(
    namespace: str, new_process: NewProcess, new_device: NewDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The blind leave it the lead however long a busy machine keeps it from taking it.
    monkeypatch.setattr(leader_module, "BETTER_LEADS_WITHIN_S", DEADLINE_S)
    device = new_device(TOTAL_MB)
    first = new_process(memory_source=device)
    blind = [new_process(**BLIND) for _ in range(4)]
    last = new_process(memory_source=device)
    first.kill()
    wait_until(lambda: leader_pid(read_snapshot(namespace)) not in (None, first.pid), "somebody leads", 5)
    assert leads(namespace, last)
    assert not any(leads(namespace, one) for one in blind)
    assert (device_names(namespace), read_snapshot(namespace).source) == (["sim-0"], "simulated")
    assert problems(namespace) == []


def test_where_only_the_blind_are_left_one_leads_by_the_accounts_and_the_last_figures_stand(
    namespace: str, new_process: NewProcess, new_device: NewDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    device = new_device(TOTAL_MB)
    sees = new_process(memory_source=device)
    blind, other = new_process(**BLIND), new_process(**BLIND)
    sees.call(learn, x=9000, y=9000)
    other.call(acquire, "x", LoadsObject("x", device=device, mb=9000))
    wait_until(lambda: read_snapshot(namespace).devices[0].used_mb == 9000, "x is seen")
    sees.kill()
    wait_until(lambda: leads(namespace, blind) or leads(namespace, other), "one of the blind leads", 6)
    assert device_names(namespace) == ["sim-0"]
    assert read_snapshot(namespace).devices[0].used_mb == 9000
    wait_until(lambda: sees.pid not in [member.pid for member in read_snapshot(namespace).members], "it is reaped", 6)
    blind.send(acquire, "y", LoadsObject("y", device=device, mb=9000))
    wait_until(lambda: waiting(namespace, "y"), "there is no room beside x")
    other.call(release)
    blind.result()
    assert (device.used_mb(), copies_of(namespace, "x")) == (9000, [])
    cli.main(["inspect", namespace])
    assert "ATTENTION: memory is no longer measured" in capsys.readouterr().out
    # One that comes later has devices to describe, and takes the lead.
    newcomer = new_process(memory_source=device)
    wait_until(lambda: leads(namespace, newcomer), "the newcomer leads", 5)
    wait_until(lambda: not read_snapshot(namespace).accounting_only, "its figures count")
    assert device_names(namespace) == ["sim-0"]
    assert problems(namespace) == []


@pytest.mark.parametrize("used", [False, True], ids=["nothing loaded", "a copy loaded by accounting"])
def test_a_process_that_can_measure_takes_the_lead_from_one_that_cannot(
    namespace: str, new_process: NewProcess, new_device: NewDevice, used: bool
) -> None:
    device = new_device(TOTAL_MB)
    blind, other = new_process(**BLIND), new_process(**BLIND)
    wait_until(lambda: leads(namespace, blind), "the first one leads")
    if used:
        blind.call(acquire, "x", LoadsObject("x", device=device, mb=1000))
    sees = new_process(memory_source=device)
    wait_until(lambda: leads(namespace, sees), "the one that can measure leads", 5)
    assert "sim-0" in device_names(namespace)
    # Copies loaded from now on are on the measured device.
    other.call(acquire, "y", Loads("y"))
    (copy,) = copies_of(namespace, "y")
    assert read_snapshot(namespace).devices[copy.device].uuid == "sim-0" or not used
    if used:
        blind.call(release)
        blind.call(reset)
    wait_until(lambda: device_names(namespace) == ["sim-0"], "the stated device is gone", 5)
    assert problems(namespace) == []


def reset(seat: Seat) -> None:
    """Unload everything."""
    seat.manager.force_reset()


def test_a_stopped_process_that_could_measure_more_does_not_keep_the_lead_from_others(
    namespace: str, new_process: NewProcess, new_device: NewDevice
) -> None:
    device = new_device(TOTAL_MB)
    leader, sees, blind = new_process(memory_source=device), new_process(memory_source=device), new_process(**BLIND)
    sees.stop()
    leader.kill()
    wait_until(lambda: leads(namespace, blind), "the blind one leads", 8)
    sees.resume()
    wait_until(lambda: leads(namespace, sees), "the other one leads once it can", 10)
    assert device_names(namespace) == ["sim-0"]
    assert problems(namespace) == []


def test_a_lead_that_stopped_processes_do_not_take_is_taken_back_by_one_that_is_not_next_in_line(
    namespace: str,
    new_process: NewProcess,
    new_manager: NewManager,
    new_device: NewDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = new_device(TOTAL_MB)
    leader, *seeing = (new_process(memory_source=device) for _ in range(2 + DEPUTIES))
    blind = new_manager(**BLIND)._connected().leader
    for process in seeing:
        stop_outside_of_transactions(process, namespace)
    leader.kill()
    wait_until(lambda: blind.leading, "the blind one leads")
    for name in ("RESERVE_TICK_S", "RESERVE_REST_S"):
        monkeypatch.setattr(leader_module, name, 1000.0)
    wait_until(lambda: not blind.leading, "it offers the lead")
    wait_until(lambda: blind.leading, "it takes the lead back")
    for process in seeing:
        process.resume()


def break_describe(seat: Seat) -> None:
    """Let this process fail when it is to lead, after it has taken the leader's lock."""

    def fail(*arguments: object) -> None:
        raise OSError("the driver does not answer")

    seat.manager._connected().samples.describe = fail


def test_a_process_that_cannot_describe_its_devices_does_not_keep_the_lead_from_others(
    namespace: str, new_process: NewProcess, tmp_path: Path
) -> None:
    device = SimulatedDevice(tmp_path / "device", TOTAL_MB)
    leader, fails, works = (new_process(memory_source=device) for _ in range(3))
    fails.call(break_describe)
    leader.kill()
    wait_until(lambda: leads(namespace, works), "the one that can leads", 5)
    assert problems(namespace) == []


def test_one_process_at_a_time_looks_at_a_device(namespace: str, new_manager: NewManager) -> None:
    tables = new_manager(poll_interval=3600)._connected().namespace.tables
    [row] = [device.row for device in read_snapshot(namespace).devices]
    hour_ns, moment_ns = 3600 * 10**9, 10**7
    assert not claim_late_looks(tables, [row], hour_ns, hour_ns), "somebody has just looked"
    wait_until(lambda: claim_late_looks(tables, [row], 0, hour_ns), "the last look is too long ago")
    assert not claim_late_looks(tables, [row], 0, hour_ns), "somebody is about to look"
    wait_until(lambda: claim_late_looks(tables, [row], 0, moment_ns), "who was about to look may have died")


def test_devices_that_were_only_stated_go_one_by_one_as_nothing_lies_there_any_more() -> None:
    made = RandomTables(0, devices=3)
    with closing(made):
        transitions, samples = made.transitions, SharedSamples(made.namespace, Scheduler(made.namespace))
        with made.namespace.transaction() as t:
            transitions.devices.describe(t, [(b"stated-0", b"", 1.0), (b"stated-1", b"", 1.0)], True, measured=False)
            leases = [
                transitions.leases.begin(t, transitions.leases.claim(t, b"lease", 1.0), 0, bits, 1.0) for bits in (1, 2)
            ]
            transitions.devices.describe(t, [(b"measured", b"", 1.0)], replace=True)
        for left, lease in ((1, leases[0]), (0, leases[1])):
            samples.forget_stated_devices()
            assert len(made.tables.used_rows(made.layout.devices)) == 2 + left, "something lies there"
            with made.namespace.transaction() as t:
                transitions.leases.end(t, lease)
            samples.forget_stated_devices()
            assert len(made.tables.used_rows(made.layout.devices)) == 1 + left


def test_who_measures_nothing_states_devices_until_measured_ones_are_known(
    namespace: str, new_device: NewDevice
) -> None:
    blind, sees = Namespace.join(namespace), Namespace.join(namespace)
    try:
        stated, device = BookedSource(1000.0), new_device(TOTAL_MB)
        # It has said what it can do, and described nothing yet.
        with sees.transaction() as t:
            sees.transitions.members.note_source(t, sees.slot, Measures.DEVICES)
        first, second = (SharedSamples(one, Scheduler(one)) for one in (blind, sees))
        first.describe(stated, stated.devices(), next_in_line=())
        assert device_names(namespace) == [stated.devices()[0].uuid]
        second.describe(device, device.devices(), next_in_line=())
        assert device_names(namespace) == ["sim-0"]
        first.describe(stated, stated.devices())
        assert device_names(namespace) == ["sim-0"]
    finally:
        sees.leave()
        blind.leave()


def test_a_newcomer_is_not_taken_to_measure_what_the_last_one_in_its_row_did() -> None:
    made = RandomTables(0)
    with closing(made):
        members = made.transitions.members
        with made.namespace.transaction() as t:
            members.note_source(t, 1, Measures.PROCESSES)
            assert members.reap(t, 1)
            members.join(t, 1, Member.WORKER, NOBODYS_PID, 1, b"newcomer")
        assert made.tables.members[1].measures == Measures.UNKNOWN


def test_how_long_a_process_leads_is_counted_from_when_it_took_the_lead() -> None:
    made = RandomTables(0)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        found = []
        for slot in (0, 1):
            with made.namespace.transaction() as t:
                made.transitions.members.lead(t, slot, b"made up", (False, False, True))
            made.now += 5 * SECOND_NS
            found.append(read_snapshot(made.namespace.name).leader_for_s)
        assert found == [5.0, 5.0]
