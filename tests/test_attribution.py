"""Attribution of memory to copies: read from processes where possible, else inferred from the rest, never both."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from containers import can_unshare
from device import SimulatedDevice
from devices.process_state import lives
from devices.simulated_gpu import SimulatedGpus
from harness import (
    NewDevice,
    NewGpus,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    import_path,
    learn,
    model_of,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject, LoadsServer, MakesServed, Weights

from mpmm import InvalidArgumentError, ModelManager, ModelServerError
from mpmm.model_manager.session import Session
from mpmm.multi_process_shared import stop_server
from mpmm.policy.suspension import Way
from mpmm.policy.view import Reason
from mpmm.shared_state.layout import Header, Member
from mpmm.shared_state.liveness import is_member_here
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources import DeviceSample


@dataclass(frozen=True)
class LoadsHere:
    """A loader of an object that takes memory in its loader's own process."""

    gpus: SimulatedGpus
    mb: float

    def __call__(self) -> Any:
        """Load on the first device."""
        self.gpus.allocate(self.mb, 0)
        return Weights()


@pytest.mark.parametrize("mb", [150.0, 777.0])
def test_one_load_tells_what_a_server_takes_whatever_else_is_on_the_device(
    mb: float, namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(2000, reserved_mb=50)
    gpus.pretend(1, 130, 0)
    manager = new_manager(memory_source="nvml", default_estimate_mb=800)
    with manager.model("other", LoadsServer("other", MakesServed(gpus, 90))):
        manager.release_model("a", manager.acquire_model("a", LoadsServer("a", MakesServed(gpus, mb))))
    found = model_of(namespace, "a")
    assert found.estimate_mb == pytest.approx(mb, rel=0.02)
    assert (found.measured, found.sd_mb) == (True, 0)
    # Only the first one was alone, and only until the driver had shown what it takes.
    alone = {event.tag for event in read_snapshot(namespace).events if event.reason == Reason.ALONE}
    assert alone == {"other"}


def test_what_a_process_has_grown_by_is_what_its_own_model_takes(
    namespace: str, new_process: NewProcess, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(2000)
    process = new_process(memory_source="nvml")
    for tag, mb in {"a": 210.0, "b": 330.0}.items():
        process.call(acquire, tag, LoadsHere(gpus, mb))
        found = model_of(namespace, tag)
        assert (found.estimate_mb, found.measured) == (mb, True)
        assert found.sd_mb > 0, "less sure than what a process of its own tells"


def test_what_is_measured_by_itself_is_no_part_of_readings_of_the_rest(
    namespace: str, new_process: NewProcess, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(2000, reserved_mb=50)
    gpus.pretend(1, 130, 0)
    process = new_process(memory_source="nvml", poll_interval=0.05)
    process.call(acquire, "server", LoadsServer("server", MakesServed(gpus, 270)))
    process.call(acquire, "object", LoadsHere(gpus, 310))

    def observed() -> list[tuple[dict[str, int], set[float]]]:
        return [(one.instances, set(one.readings_mb)) for one in read_snapshot(namespace).observations]

    wait_until(lambda: observed() == [({"object": 1}, {360.0})], "what the driver keeps and the object are left")


def test_two_unknown_models_are_measured_at_the_same_time(
    namespace: str, new_process: NewProcess, new_device: NewDevice
) -> None:
    device = new_device(1000, 1000)
    first, second = new_process(memory_source=device), new_process(memory_source=device)
    first.call(acquire, "a", LoadsObject("a", device=device, mb=111, index=0))
    second.call(acquire, "b", LoadsObject("b", device=device, mb=222, index=1))
    assert None not in [one.isolated for one in read_snapshot(namespace).devices]
    first.call(release)
    second.call(release)
    assert [model_of(namespace, tag).estimate_mb for tag in "ab"] == [111, 222]
    assert problems(namespace) == []


def test_room_for_one_is_made_on_all_devices_of_a_copy_that_spans_several(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000, 1000)
    manager = new_manager(memory_source="nvml", default_estimate_mb=600)
    wide = LoadsServer("wide", MakesServed(gpus, 300))
    manager.release_model("wide", manager.acquire_model("wide", wide, span=2))
    learn(Seat(manager), tall=900)
    with manager.model("tall", LoadsServer("tall", MakesServed(gpus, 900)), devices=[0]):
        assert copies_of(namespace, "wide") == []
        assert [gpus.used_mb(number) for number in (0, 1)] == [900, 0]
    assert problems(namespace) == []


def test_a_manager_that_selects_devices_uses_no_others(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000, 500, 700)
    manager = new_manager(memory_source=device, devices=[2, "sim-1"])
    assert manager._monitor.get_stats() == (0, 0, 1200)
    assert [one.uuid for one in read_snapshot(namespace).devices] == ["sim-1", "sim-2"]
    with pytest.raises(InvalidArgumentError, match="0 is not among the devices"):
        manager.acquire_model("a", Loads(), devices=[0])


# ---- containers that share one state -----------------------------------------------------------------------------


class OneContainer(SimulatedDevice):
    """A device as seen in a container: the memory in use as a whole, and only the container's own processes."""

    name = "by process"
    measures_processes = True

    def __init__(self, folder: Path, mb: float, container: str) -> None:
        super().__init__(folder, mb)
        self._container = folder / container
        self._container.mkdir(exist_ok=True)

    def allocate(self, mb: float, index: int = 0) -> Path:
        """Take memory for this process, which so is in the container."""
        (self._container / str(os.getpid())).touch()
        return super().allocate(mb, index)

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure; the list of processes claims to be complete."""
        taken, mine = time.monotonic_ns(), dict[int, float]()
        for name in os.listdir(self._folder / "0"):
            kind, pid, mb, _ = name.split("_")
            if kind == "of" and lives(int(pid)) and (self._container / pid).exists():
                mine[int(pid)] = mine.get(int(pid), 0.0) + float(mb)
        return (DeviceSample(0, self.used_mb(), taken, mine, processes_known=True, done_ns=time.monotonic_ns()),)


def refresh(seat: Seat) -> None:
    """Have a process take a sample."""
    assert seat.manager._monitor.refresh()


def set_apart(seat: Seat) -> None:
    """Note in the namespace that there are members in several containers."""
    namespace = seat.manager._connected().namespace
    with namespace.transaction() as t:
        t.set(Header.PID_NAMESPACE, 0)
    assert all(is_member_here(namespace.tables, slot) for slot in namespace.tables.used_members())


def test_two_containers_that_see_their_own_processes_only_give_nothing_away_twice(
    namespace: str, new_process: NewProcess, tmp_path: Path
) -> None:
    sources = [OneContainer(tmp_path / "device", 1000, name) for name in ("one", "two")]
    one, two = (new_process(memory_source=source, poll_interval=3600) for source in sources)
    one.call(set_apart)
    one.call(learn, a=300, b=300, c=500, d=350)
    for process, source, tag in ((one, sources[0], "a"), (two, sources[1], "b")):
        process.call(acquire, tag, LoadsServer(tag, MakesServed(source, 300)))
    for process, tag in ((one, "a"), (two, "b")) * 3:
        process.call(refresh)
        snapshot = read_snapshot(namespace)
        servers = {member.slot: member.measured_mb for member in snapshot.members if member.kind == "server"}
        # Unknown, and not 0.
        measured = {copy.tag: servers[copy.server] for copy in snapshot.instances if copy.server is not None}
        assert measured == {other: 300 if other == tag else None for other in "ab"}
        assert [(copy.tag, copy.mb) for copy in snapshot.instances] == [("a", 300), ("b", 300)]
        [device] = snapshot.devices
        assert (device.used_mb, device.committed_mb, device.external_mb) == (600, 600, 0)
    two.send(acquire, "c", LoadsServer("c", MakesServed(sources[1], 500)))
    wait_until(lambda: waiting(namespace, "c"), "there is no room beside both")
    for process in (one, one):
        process.call(refresh)
        assert waiting(namespace, "c")
    # An idle copy of the other container frees what it takes.
    one.call(release)
    two.result()
    assert sorted(copy.tag for copy in read_snapshot(namespace).instances) == ["b", "c"]
    assert sources[0].used_mb() == 800
    assert problems(namespace) == []


def load_idle(manager: ModelManager, device: SimulatedDevice) -> tuple[Session, int, int]:
    """Load a model of 300 MB into a server and release it; return session, row, and the server's pid."""
    manager.release_model("a", manager.acquire_model("a", LoadsServer("a", MakesServed(device, 300))))
    session = manager._connected()
    snapshot = read_snapshot(manager.namespace)
    [copy], [server] = snapshot.instances, [member for member in snapshot.members if member.kind == "server"]
    assert server.measured_mb == 300
    return session, copy.row, server.pid


def expect_nothing_given_away_twice(namespace: str) -> None:
    [device] = read_snapshot(namespace).devices
    assert (device.used_mb, device.external_mb) == (0, 0), "what is below 0 would be given away a second time"


def test_a_source_that_has_shown_no_process_yet_does_not_vouch_for_memory_that_goes(
    namespace: str, new_manager: NewManager, tmp_path: Path
) -> None:
    source = OneContainer(tmp_path / "device", 1000, "one")
    session, row, _ = load_idle(new_manager(memory_source=source, poll_interval=3600), source)
    state = session.namespace
    # The server has given its memory back, and this process has not noted that yet.
    session.unloads.begin([row], sys._getframe())
    with state.transaction() as t:
        state.transitions.unloads.begin(t, row, state.slot, evicted=True)
    now = time.monotonic_ns()
    session.samples.publish([DeviceSample(0, 0.0, now, {}, processes_known=False, done_ns=now)])
    expect_nothing_given_away_twice(namespace)
    session.unloads.end(row)
    session.unloads.unload_assigned()
    assert problems(namespace) == []


def test_a_copy_that_was_suspended_while_a_sample_was_taken_has_nothing_for_certain(
    namespace: str, new_manager: NewManager, tmp_path: Path
) -> None:
    source = OneContainer(tmp_path / "device", 1000, "one")
    session, row, pid = load_idle(new_manager(memory_source=source, poll_interval=3600), source)
    state, began = session.namespace, time.monotonic_ns()
    with state.transaction() as t:
        state.transitions.suspensions.note_way(t, row, Way.CHECKPOINT)
        state.transitions.suspensions.begin(t, row, state.slot, evicted=True)
        state.transitions.suspensions.end(t, row)
    session.samples.publish([DeviceSample(0, 0.0, began, {pid: 300.0}, True, done_ns=time.monotonic_ns())])
    expect_nothing_given_away_twice(namespace)
    with state.transaction() as t:
        state.transitions.suspensions.drop(t, row, state.slot)
    session.unloads.unload_assigned()
    assert problems(namespace) == []


def test_an_unload_kills_no_process_that_has_the_number_of_a_server_in_another_container(
    new_manager: NewManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = OneContainer(tmp_path / "device", 1000, "one")
    session, row, pid = load_idle(new_manager(memory_source=source, poll_interval=3600), source)
    state, tables = session.namespace, session.namespace.tables
    server = tables.instances[row].server
    assert server is not None
    monkeypatch.setattr(stop_server, "KILL_TIMEOUT_S", 0.1)
    with subprocess.Popen(["sleep", "60"]) as unrelated:
        try:
            with state.transaction() as t:
                t.set(Header.PID_NAMESPACE, 0)
                t.set(tables.member(server) + Member.PID, unrelated.pid)
            with pytest.raises(ModelServerError, match="runs in another pid namespace"):
                session.unloads._unload_handle("a", server, unrelated.pid)
            assert unrelated.poll() is None
        finally:
            unrelated.kill()
            with state.transaction() as t:
                t.set(tables.member(server) + Member.PID, pid)


IN_A_CONTAINER = """
    import os, sys
    from mpmm import ModelManager

    manager = ModelManager(namespace=sys.argv[1], memory_source="booked")
    manager.acquire_model("inner", lambda: "handle")
    print(os.getpid(), flush=True)
    sys.stdin.read()
    manager.shutdown()
"""


class ListsInit(SimulatedDevice):
    """A device on which the process with number 1, out here, has memory."""

    name = "by process"
    measures_processes = True

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        taken = time.monotonic_ns()
        return (DeviceSample(0, 600.0, taken, {1: 600.0, os.getpid(): 0.0}, done_ns=time.monotonic_ns()),)


@can_unshare
def test_the_memory_of_a_process_is_not_taken_for_that_of_one_with_its_number_in_a_container(
    namespace: str, new_manager: NewManager, tmp_path: Path
) -> None:
    manager = new_manager(memory_source=ListsInit(tmp_path / "device", 1000), poll_interval=3600)
    script = ["-c", textwrap.dedent(IN_A_CONTAINER), namespace]
    inner = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, *script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    try:
        assert inner.stdout is not None
        assert inner.stdout.readline() == "1\n", "as the first process in there it has the number of ours out here"
        assert manager._monitor.refresh()
        session = manager._connected()
        seen = {member.pid: member.measured_mb for member in read_snapshot(namespace).members}
        assert seen[1] is None and seen[os.getpid()] == 0
        tables = session.namespace.tables
        here = {tables.members[slot].pid for slot in tables.used_members() if is_member_here(tables, slot)}
        assert here == {os.getpid()}
        # The other one is an unrelated program.
        assert read_snapshot(namespace).devices[0].unrelated_mb == 600
    finally:
        inner.communicate(timeout=60)
    assert problems(namespace) == []
