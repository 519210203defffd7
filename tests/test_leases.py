"""Leases: memory for anything, admitted like a load and counted until it is given back."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from device import SimulatedDevice
from harness import (
    NewDevice,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    force_reset,
    learn,
    model_of,
    problems,
    release,
    shut_down,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject
from patience import Stopwatch

from mpmm.cli import main
from mpmm.errors import (
    AcquireTimeoutError,
    ClosedError,
    InvalidArgumentError,
    LeaseTooLargeError,
    NamespaceResetError,
    TableFullError,
)
from mpmm.observability.trace_writer import recent_trace
from mpmm.shared_state.layout import Capacities
from mpmm.shared_state.snapshot import FORGOTTEN, InstanceInfo, read_snapshot
from mpmm.shared_state.transitions.models import NAMES_KEPT
from mpmm.sources import DeviceSample

Capture = pytest.CaptureFixture[str]

SOON_S = 1.5


def reserve(seat: Seat, mb: float, name: str = "lease", timeout_seconds: float | None = None) -> None:
    """Get a lease and keep it."""
    seat.held.append((name, seat.manager.reserve(mb, name=name, timeout_seconds=timeout_seconds)))


def give_back(seat: Seat) -> None:
    """Release the lease that was got last."""
    seat.held.pop()[1].release()


def release_in_forked_child(seat: Seat) -> int:
    """Have a forked child release the lease of this process; return its exit status."""
    pid = os.fork()
    if pid == 0:
        seat.held[-1][1].release()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def allocate(seat: Seat, device: SimulatedDevice, mb: float) -> None:
    """Take memory that no model has."""
    device.allocate(mb)


def name_program(seat: Seat, pid: int) -> None:
    """Say which process uses the memory of the lease."""
    seat.held[-1][1].used_by(pid)


def start_child(seat: Seat, device: SimulatedDevice, mb: float) -> int:
    """Start a process that takes memory, and return its pid once it has."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        device.allocate(mb)
        os.write(theirs, b"1")
        signal.pause()
    os.read(ours, 1)
    return pid


def leases(namespace: str) -> list[InstanceInfo]:
    """Return the leases that are held."""
    return [copy for copy in read_snapshot(namespace).instances if copy.state == "leased"]


class MeasuringDevice(SimulatedDevice):
    """A simulated device that tells what single processes take."""

    measures_processes = True

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        taking: dict[int, float] = {}
        for name in os.listdir(self._folder / "0"):
            _, pid, mb, _ = name.split("_")
            taking[int(pid)] = taking.get(int(pid), 0.0) + float(mb)
        [sample] = super().sample(server_pids)
        return (DeviceSample(0, sample.used_mb, sample.taken_ns, taking),)


def test_a_lease_counts_as_used_until_it_is_released(namespace: str, new_manager: NewManager) -> None:
    manager, impatient = new_manager(), new_manager(wait_timeout_seconds=0.2)
    learn(Seat(manager), a=100)
    lease = manager.reserve(950, name="training")
    assert lease.is_held
    [device] = read_snapshot(namespace).devices
    assert (device.used_mb, device.reserved_mb) == (0, 950)
    with pytest.raises(AcquireTimeoutError, match="last reason: leased"):
        impatient.acquire_model("a", Loads())
    assert problems(namespace) == []
    lease.release()
    assert not lease.is_held
    manager.release_model("a", manager.acquire_model("a", Loads()))
    assert leases(namespace) == []
    assert problems(namespace) == []


def test_a_lease_ends_with_its_block_whatever_happens_in_it(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with pytest.raises(OSError, match="disk"), manager.reserve(100) as lease:
        raise OSError("disk")
    assert not lease.is_held
    lease.release()
    snapshot = read_snapshot(namespace)
    assert (snapshot.instances, snapshot.models) == ((), ())
    assert [event.kind for event in snapshot.events][-2:] == ["leased", "lease_ended"]


def test_a_lease_that_nothing_refers_to_ends_and_says_so(
    namespace: str, new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = new_manager()
    kept = manager.reserve(100, name="kept")
    manager.reserve(300, name="dropped")
    wait_until(lambda: [lease.reserved_mb for lease in leases(namespace)] == [100], "the dropped one has ended", 2)
    wait_until(lambda: "lease 'dropped' of 300 MB was collected before it was released" in caplog.text, "it is said", 2)
    assert kept.is_held
    kept.release()
    del kept
    assert leases(namespace) == []
    assert "'kept'" not in caplog.text
    assert problems(namespace) == []


def test_leases_of_one_name_are_two_and_have_nothing_to_do_with_a_model_of_that_name(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    handle = manager.acquire_model("x", Loads())
    with manager.reserve(300, name="x"), manager.reserve(400, name="x"):
        assert sorted(lease.reserved_mb for lease in leases(namespace)) == [300, 400]
        assert manager.all_models("x") == [handle]
        assert problems(namespace) == []
    manager.release_model("x", handle)
    assert manager._estimator.get_estimate("x") == 100


def test_idle_copies_are_evicted_for_a_lease_and_active_ones_are_waited_for(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(fallback_memory_mb=300), new_process()
    manager.release_model("idle", manager.acquire_model("idle", Loads()))
    held = manager.acquire_model("held", Loads())
    other.call(reserve, 200)
    assert copies_of(namespace, "idle") == []
    other.call(give_back)
    other.send(reserve, 250)
    wait_until(lambda: waiting(namespace, "lease"), "the lease waits")
    assert len(copies_of(namespace, "held")) == 1
    manager.release_model("held", held)
    other.result()
    assert copies_of(namespace, "held") == []
    assert read_snapshot(namespace).evictions == 2
    assert problems(namespace) == []


def test_who_waits_behind_a_lease_does_not_overtake_it(namespace: str, new_process: NewProcess) -> None:
    holder, tenant, newcomer = (new_process(fallback_memory_mb=300) for _ in range(3))
    holder.call(acquire, "held")
    tenant.send(reserve, 300, "tenant")
    wait_until(lambda: waiting(namespace, "tenant"), "the lease waits")
    newcomer.send(acquire, "small")
    wait_until(lambda: waiting(namespace, "small"), "the newcomer stands behind it")
    holder.call(release)
    tenant.result()
    assert not newcomer.has_result()
    tenant.call(give_back)
    newcomer.result()


def test_who_waits_for_a_lease_to_end_holds_up_no_model_but_lets_no_lease_pass_that_delays_it(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    tenant, second, third = (new_process(max_overtake_seconds=0.1) for _ in range(3))
    tenant.call(reserve, 700)
    second.send(reserve, 980, "second")
    wait_until(lambda: any(ticket.waited_s > 0.2 for ticket in waiting(namespace)), "the second lease waits for long")
    manager = new_manager()
    for tag in "aab":
        manager.release_model(tag, manager.acquire_model(tag, Loads()))
    assert model_of(namespace, "a").loads == 1
    third.send(reserve, 50, "third")
    wait_until(lambda: waiting(namespace, "third"), "the third lease waits")
    assert [ticket.tag for ticket in waiting(namespace)] == ["second", "third"]
    tenant.call(give_back)
    second.result()
    second.call(give_back)
    third.result()
    assert problems(namespace) == []


def test_a_small_lease_goes_before_a_large_one_that_it_does_not_delay(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    tenant, large, small = (new_process(max_overtake_seconds=0.1) for _ in range(3))
    tenant.call(reserve, 700)
    large.send(reserve, 800, "large")
    wait_until(lambda: any(ticket.waited_s > 0.2 for ticket in waiting(namespace)), "the large lease waits for long")
    small.call(reserve, 50, "small")
    tenant.call(give_back)
    large.result()
    assert problems(namespace) == []


def test_a_stream_of_small_leases_does_not_starve_a_large_one(namespace: str, new_process: NewProcess) -> None:
    first, large, second = (new_process(max_overtake_seconds=0.2) for _ in range(3))
    first.call(reserve, 450)
    large.send(reserve, 800, "large")
    wait_until(lambda: waiting(namespace, "large"), "the large lease waits")
    holder, other = first, second
    watch = Stopwatch()
    for number in itertools.count():
        other.send(reserve, 450, f"small-{number}")
        wait_until(lambda: other.has_result() or waiting(namespace, f"small-{number}"), "it is decided")  # noqa: B023  # used at once
        holder.call(give_back)
        wait_until(lambda: other.has_result() or large.has_result(), "one of them goes on")  # noqa: B023  # used at once
        if large.has_result():
            break
        assert watch.left_s(5.0), (
            f"{number} small leases went before the large one, which has waited for 0.2 s long since"
        )
        other.result()
        holder, other = other, holder
    large.result()
    large.call(give_back)
    other.result()


def test_a_lease_that_can_never_fit_is_refused_at_once(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with pytest.raises(LeaseTooLargeError, match=r"lease 'huge' of 1001 MB: the limit of .* is 1000 MB") as caught:
        manager.reserve(1001, name="huge")
    assert isinstance(caught.value, MemoryError)
    assert (caught.value.need_mb, caught.value.limit_mb) == (1001, 1000)
    assert (read_snapshot(namespace).models, read_snapshot(namespace).tickets) == ((), ())


def test_a_lease_is_waited_for_no_longer_than_asked(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with manager.reserve(900), pytest.raises(AcquireTimeoutError, match=r"'second' of 200 MB: .*last reason: leased"):
        manager.reserve(200, name="second", timeout_seconds=0.1)
    assert (read_snapshot(namespace).models, read_snapshot(namespace).tickets) == ((), ())


@pytest.mark.parametrize("mb", [0, -1, math.inf, math.nan, "6000", True])
def test_an_impossible_amount_is_refused(namespace: str, new_manager: NewManager, mb: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a number of MB"):
        new_manager().reserve(mb)
    assert read_snapshot(namespace).models == ()


@pytest.mark.parametrize("timeout_seconds", [-1, math.nan, "soon"])
def test_an_impossible_time_out_is_refused(namespace: str, new_manager: NewManager, timeout_seconds: Any) -> None:
    manager = new_manager()
    with pytest.raises(InvalidArgumentError, match="timeout_seconds"):
        manager.reserve(1, timeout_seconds=timeout_seconds)
    with pytest.raises(InvalidArgumentError, match="timeout_seconds"):
        manager.preload("a", Loads(), timeout_seconds=timeout_seconds)
    assert read_snapshot(namespace).models == ()


def test_a_full_table_is_an_error_that_changes_nothing(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=Capacities(models=2))
    with manager.reserve(1), manager.reserve(1):
        before = read_snapshot(namespace)
        with pytest.raises(TableFullError, match="models"):
            manager.reserve(1)
        assert read_snapshot(namespace).next_ticket == before.next_ticket
    # Leases are no tags: the rows are free again.
    with manager.reserve(1), manager.reserve(1):
        pass


def test_the_lease_of_a_dead_process_goes_to_the_next_who_waits(namespace: str, new_process: NewProcess) -> None:
    victim, other = new_process(), new_process()
    victim.call(reserve, 900, "victim")
    other.send(reserve, 850)
    wait_until(lambda: waiting(namespace, "lease"), "the other one waits")
    victim.kill()
    other.result(SOON_S)
    assert [lease.tag for lease in leases(namespace)] == ["lease"]
    assert problems(namespace) == []


def test_a_process_that_dies_while_it_waits_for_a_lease_holds_up_nobody(
    namespace: str, new_process: NewProcess
) -> None:
    holder, victim, other = (new_process(max_overtake_seconds=0.01) for _ in range(3))
    holder.call(reserve, 900, "holder")
    victim.send(reserve, 1000, "victim")
    wait_until(lambda: any(ticket.waited_s > 0.01 for ticket in waiting(namespace)), "the victim waits")
    other.send(reserve, 50, "other")
    wait_until(lambda: waiting(namespace, "other"), "the other one stands behind it")
    victim.kill()
    other.result(SOON_S)
    assert [model.tag for model in read_snapshot(namespace).models] == ["holder", "other"]
    assert problems(namespace) == []


def test_a_lease_ends_with_the_shutdown_of_its_process(namespace: str, new_process: NewProcess) -> None:
    tenant, other = new_process(), new_process()
    tenant.call(reserve, 900)
    tenant.call(shut_down)
    other.call(reserve, 900)
    tenant.call(give_back)
    assert len(leases(namespace)) == 1


def test_a_forked_child_has_no_part_in_the_lease_of_its_parent(namespace: str, new_process: NewProcess) -> None:
    tenant = new_process()
    tenant.call(reserve, 900)
    assert tenant.call(release_in_forked_child) == 0
    assert len(leases(namespace)) == 1
    tenant.call(give_back)
    assert leases(namespace) == []


def test_a_lease_has_no_descriptor_and_no_environment_after_the_shutdown(new_manager: NewManager) -> None:
    manager = new_manager()
    lease = manager.reserve(100)
    os.close(lease.descriptor())
    manager.shutdown()
    for call in (lease.descriptor, lease.environment):
        with pytest.raises(ClosedError, match="has left the namespace"):
            call()
    lease.settled()
    lease.used_by(os.getpid())
    lease.release()
    assert not lease.is_held


def test_a_reset_leaves_leases_alone_but_sends_those_away_who_wait_for_one(
    namespace: str, new_process: NewProcess
) -> None:
    tenant, waiter, other = new_process(), new_process(), new_process()
    tenant.call(reserve, 900)
    waiter.send(reserve, 800, "waiter")
    wait_until(lambda: waiting(namespace, "waiter"), "somebody waits for a lease")
    other.call(force_reset)
    with pytest.raises(NamespaceResetError, match="waiter"):
        waiter.result()
    assert [lease.reserved_mb for lease in leases(namespace)] == [900]
    assert problems(namespace) == []


def test_an_unknown_model_is_profiled_beside_a_lease(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    with manager.reserve(400), manager.model("unknown", LoadsObject("u", device=device, mb=300)):
        assert read_snapshot(namespace).isolated is not None
        assert problems(namespace) == []
    assert model_of(namespace, "unknown").estimate_mb == 300


def test_what_the_program_of_a_lease_is_measured_to_take_is_not_counted_twice(
    namespace: str, new_process: NewProcess, tmp_path: Path
) -> None:
    device = MeasuringDevice(tmp_path / "device", 1000)
    tenant = new_process(memory_source=device, poll_interval=0.05)
    tenant.call(learn, small=100)
    tenant.call(reserve, 600)
    program = new_process(attached=False)
    program.call(allocate, device, 500)
    wait_until(lambda: read_snapshot(namespace).devices[0].used_mb == 500, "the figure shows the program")
    assert read_snapshot(namespace).devices[0].reserved_mb == 600
    tenant.call(name_program, program.pid)
    wait_until(lambda: read_snapshot(namespace).devices[0].reserved_mb == 100, "the program is part of the figure")
    [lease] = leases(namespace)
    assert (lease.reserved_mb, lease.mb, lease.program) == (600, 500, program.pid)
    assert problems(namespace) == []


def test_what_a_program_has_started_is_its_own_and_two_leases_of_one_program_share_its_memory(
    namespace: str, new_process: NewProcess, tmp_path: Path
) -> None:
    device = MeasuringDevice(tmp_path / "device", 1000)
    tenant = new_process(memory_source=device, poll_interval=0.05)
    program = new_process(attached=False)
    tenant.call(reserve, 300)
    tenant.call(name_program, program.pid)
    tenant.call(reserve, 400)
    tenant.call(name_program, program.pid)
    child = program.call(start_child, device, 500)
    try:
        wait_until(lambda: read_snapshot(namespace).devices[0].reserved_mb == 200, "what the child takes comes off")
        assert sorted(lease.mb for lease in leases(namespace)) == [200, 300]
        assert read_snapshot(namespace).devices[0].used_mb == 500
    finally:
        os.kill(child, signal.SIGKILL)


def test_inspect_shows_leases_apart_from_models_and_copies(
    namespace: str, new_manager: NewManager, capsys: Capture
) -> None:
    manager = new_manager()
    with manager.reserve(600, name="training") as lease, manager.model("detector", Loads()):
        lease.used_by(4711)
        assert main(["inspect", namespace]) == 0
        text = capsys.readouterr().out
        sections = dict(part.split(":\n", 1) for part in text.split("\n\n")[1:] if ":\n" in part)
        assert "training" in sections["leases"]
        assert "4711" in sections["leases"]
        assert "600" in sections["leases"]
        assert "training" not in sections["models"] + sections["copies"]
        assert "detector" in sections["models"]
        assert main(["inspect", "--json", namespace]) == 0
        found = json.loads(capsys.readouterr().out)
        [row] = [copy for copy in found["instances"] if copy["state"] == "leased"]
        assert (row["tag"], row["reserved_mb"], row["program"]) == ("training", 600, 4711)
        assert [model["kind"] for model in found["models"]] == ["lease", "model"]
        assert main(["check", namespace]) == 0


def test_the_estimates_of_a_deserted_namespace_are_kept_but_not_its_leases(
    namespace: str, new_process: NewProcess
) -> None:
    tenant = new_process()
    tenant.call(learn, a=123)
    tenant.call(reserve, 900)
    tenant.kill()
    new_process()
    assert [(model.tag, model.estimate_mb) for model in read_snapshot(namespace).models] == [("a", 123)]
    assert problems(namespace) == []


def test_events_of_ended_leases_never_have_the_names_of_those_that_have_their_rows_now(
    namespace: str, new_manager: NewManager, capsys: Capture
) -> None:
    manager = new_manager(capacities=Capacities(models=2))
    with manager.reserve(100, name="first"):
        pass
    with manager.reserve(200, name="second"):
        pass
    manager.release_model("third", manager.acquire_model("third", Loads()))
    names = {event.value: event.tag for event in read_snapshot(namespace).events if event.kind == "leased"}
    # The name of the second has been there for long enough; the row of the first has been taken again.
    assert names == {100.0: FORGOTTEN, 200.0: "second"}
    assert main(["events", namespace, "--model", "third"]) == 0
    assert "leases 100" not in capsys.readouterr().out
    spans = [event["name"] for event in recent_trace(namespace) if event.get("cat") == "lease"]
    assert sorted(spans) == [f"lease {FORGOTTEN}", "lease second"]
    assert problems(namespace) == []


def test_events_of_ended_leases_keep_their_names_as_long_as_rows_suffice(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    for round in range(3):
        for number in range(NAMES_KEPT // 2):
            with manager.reserve(100 + number, name=f"lease {number}"):
                manager.release_model("model", manager.acquire_model("model", Loads()))
        assert read_snapshot(namespace).table_ends["models"] <= NAMES_KEPT, round
    events = [event for event in read_snapshot(namespace).events if event.kind == "leased"]
    assert {(event.value, event.tag) for event in events} == {
        (100.0 + number, f"lease {number}") for number in range(NAMES_KEPT // 2)
    }


def test_rows_of_ended_leases_are_taken_again_before_the_table_grows_for_ever(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    for number in range(3 * NAMES_KEPT):
        with manager.reserve(100, name=f"lease {number}"):
            pass
    assert read_snapshot(namespace).table_ends["models"] == NAMES_KEPT


def test_events_of_a_model_that_had_to_leave_a_full_table_have_no_other_models_name(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(capacities=Capacities(models=1))
    for tag in ("before", "after"):
        manager.release_model(tag, manager.acquire_model(tag, Loads()))
        manager.unload(tag)
    loaded = [event.tag for event in read_snapshot(namespace).events if event.kind == "load_began"]
    assert loaded == [FORGOTTEN, "after"]
