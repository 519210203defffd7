"""A quiet start: while an engine sizes itself by what is free, nothing else comes or goes on its device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from device import SimulatedDevice
from harness import (
    NewGate,
    NewManager,
    NewProcess,
    Process,
    Seat,
    acquire,
    copies_of,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Gate, Loads, LoadsObject
from patience import DEADLINE_S
from policy_views import A, B, device, model, ticket, view
from test_run import Start
from test_run import start as start  # the fixture

from mpmm.cli import main
from mpmm.policy.plan import make_plan
from mpmm.policy.view import BusyInstance, Load, Reason, Wait
from mpmm.shared_state.snapshot import read_snapshot


def acquire_steadily(seat: Seat, tag: str, loader: Callable[[], object]) -> None:
    seat.held.append((tag, seat.manager.acquire_model(tag, loader, steady=True)))


def reason_of(namespace: str, tag: str) -> int | None:
    """Return why the first waiter for a model waits."""
    return next((one.reason for one in waiting(namespace, tag)), None)


def load_steadily(namespace: str, process: Process, go: Gate) -> None:
    process.send(acquire_steadily, "engine", LoadsObject("engine", go=go))
    wait_until(lambda: [copy.steady for copy in copies_of(namespace, "engine")] == [True], "it loads quietly")


def test_nothing_else_loads_or_unloads_while_copies_are_used(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_gate: NewGate
) -> None:
    manager, engine, other = new_manager(poll_interval=0.03), new_process(), new_process()
    with manager.model("idle", Loads()):
        pass
    go = new_gate()
    load_steadily(namespace, engine, go)
    other.send(acquire, "new")
    wait_until(lambda: reason_of(namespace, "new") == Reason.QUIET, "another load waits, though there is room")
    # What there is may be used.
    with manager.model("idle", Loads(), keep_alive_seconds=0):
        pass
    assert manager.unload("idle", timeout_seconds=0) in (0, 1)
    snapshot = read_snapshot(namespace)
    assert snapshot.steady_devices == (0,)
    assert [copy.state for copy in snapshot.instances if copy.tag == "idle"] == ["unloading"]
    for _ in range(3):
        manager._connected().unloads.unload_assigned()
    assert len(copies_of(namespace, "idle")) == 1
    assert problems(namespace) == []
    go.open()
    engine.result()
    other.result()
    wait_until(lambda: not copies_of(namespace, "idle"), "what had to wait is unloaded now")
    assert read_snapshot(namespace).steady_devices == ()
    assert problems(namespace) == []


def test_a_quiet_start_waits_for_what_has_begun_and_nobody_behind_it_begins(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_gate: NewGate
) -> None:
    manager = new_manager()
    loading, engine, later = new_process(), new_process(), new_process()
    go = new_gate()
    loading.send(acquire, "first", LoadsObject("first", go=go))
    wait_until(lambda: copies_of(namespace, "first"), "another one loads")
    engine.send(acquire_steadily, "engine", Loads())
    wait_until(lambda: reason_of(namespace, "engine") == Reason.RESTLESS, "the engine waits for that")
    later.send(acquire, "later")
    wait_until(lambda: reason_of(namespace, "later") == Reason.QUIET, "and the next one for the engine")
    go.open()
    for process in (loading, engine, later):
        process.result()
    assert [copy.state for copy in read_snapshot(namespace).instances] == ["active"] * 3
    manager.shutdown()


def test_a_lease_is_quiet_until_it_has_settled(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process()
    with manager.reserve(300, steady=True) as lease:
        other.send(acquire, "new")
        wait_until(lambda: reason_of(namespace, "new") == Reason.QUIET, "a load waits")
        lease.settled()
        other.result()
        lease.settled()
        assert problems(namespace) == []
    other.call(release)
    with manager.reserve(300, steady=True):
        other.send(acquire, "another")
        wait_until(lambda: reason_of(namespace, "another") == Reason.QUIET, "a load waits")
    other.result()
    assert problems(namespace) == []


def test_the_death_of_an_engine_ends_its_quiet(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_gate: NewGate
) -> None:
    manager, engine = new_manager(), new_process()
    load_steadily(namespace, engine, new_gate())
    engine.kill()
    with manager.model("new", Loads()):
        assert read_snapshot(namespace).steady_devices == ()
    assert problems(namespace) == []


def test_other_devices_go_on(
    namespace: str, new_process: NewProcess, new_device: Callable[..., SimulatedDevice], new_gate: NewGate
) -> None:
    source = new_device(1000, 1000)
    engine, other = new_process(memory_source=source), new_process(memory_source=source)
    for process, tag in ((engine, "engine"), (other, "new")):
        process.call(learn_100, tag)
    go = new_gate()
    load_steadily(namespace, engine, go)
    other.call(acquire, "new")
    places = {copy.tag: copy.device for copy in read_snapshot(namespace).instances}
    assert places["new"] != places["engine"]
    go.open()
    engine.result()


def learn_100(seat: Seat, tag: str) -> None:
    seat.manager._estimator.set_initial_estimate(tag, 100)


def test_a_program_starts_quietly_for_as_long_as_it_says(
    namespace: str, new_manager: NewManager, new_process: NewProcess, start: Start
) -> None:
    new_manager(fallback_memory_mb=16000)
    other = new_process()
    program = start(1000, "cat", options=("--steady", "600"))
    wait_until(lambda: read_snapshot(namespace).steady_devices, "it runs")
    other.send(acquire, "new")
    wait_until(lambda: reason_of(namespace, "new") == Reason.QUIET, "a load waits")
    program.communicate(timeout=DEADLINE_S)
    other.result()
    # That is over before the program is.
    program = start(1000, "cat", options=("--steady", "0.2"))
    wait_until(lambda: any(copy.state == "leased" for copy in read_snapshot(namespace).instances), "it runs")
    other.call(acquire, "newer")
    assert program.poll() is None
    assert main(["run", "--mb", "1", "--steady", "-1", "--", "true"]) == 125
    assert problems(namespace) == []


def test_the_plan_prefers_a_calm_device_and_keeps_others_away() -> None:
    engine = replace(ticket(1, A), steady=True)
    loading = BusyInstance(5, B, 0, 100.0, 1.0, loading=True)
    plan = make_plan(
        view(
            [model(A, 300), model(B, 100)],
            [engine, ticket(2, B, waited=0.1)],
            devices=[device(0), device(1, used=400)],
            busy=(loading,),
        )
    )
    first, *rest = plan.decisions
    assert isinstance(first, Load)
    assert first.devices == (1,)
    assert all(not isinstance(one, Load) or 1 not in one.devices for one in rest)
    # With one device it waits, and has the next one wait.
    plan = make_plan(
        view([model(A, 300), model(B, 100)], [engine, ticket(2, B, waited=0.1)], devices=[device(0)], busy=(loading,))
    )
    assert next(one.reason for one in plan.decisions if isinstance(one, Wait)) == Reason.RESTLESS
    assert not [one for one in plan.decisions if isinstance(one, Load)]
