"""A quiet start: while an engine sizes itself by the free memory, nothing else is loaded or unloaded on its device."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pytest
from device import SimulatedDevice
from harness import (
    NewDevice,
    NewGate,
    NewManager,
    NewProcess,
    Process,
    Seat,
    acquire,
    copies_of,
    in_thread,
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
from mpmm.commands.parser import make_parser
from mpmm.memory.placement import Placement, current_placement, fraction_of, with_share
from mpmm.memory.samples import SharedSamples
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.observability.completion import completion, man_page
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
    # Copies on the device may be used.
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


# ---- what an engine is told ----------------------------------------------------------------------------------------

SHARE = ("MPMM_LEASE_MB", "MPMM_DEVICES", "MPMM_MEMORY_FRACTION")


def share_here() -> tuple[str | None, ...]:
    """Return what the environment of this process says."""
    return tuple(map(os.environ.get, SHARE))


class Engine:
    """Sizes itself while it is constructed, by what it is told then."""

    def __init__(self) -> None:
        self._environment = share_here()
        self._placement = current_placement()

    def told(self) -> tuple[tuple[str | None, ...], Placement, float | None, float | None]:
        """Return what was in the environment, and where and how much the copy was placed."""
        assert self._placement is not None
        return self._environment, self._placement, self._placement.mb, self._placement.memory_fraction


@dataclass(frozen=True)
class LoadsEngine:
    """A loader that starts an engine in a process of its own, or hosts it in this one."""

    tag: str
    spawn: bool = True

    def __call__(self) -> str:
        """Start it."""
        shared: MultiProcessShared[Engine] = MultiProcessShared(
            Engine, tag=self.tag, always_proxy=True, spawn_process=self.spawn
        )
        shared.acquire()
        return self.tag


def told(handle: str) -> Any:
    """Return what the engine behind a handle was told."""
    shared: MultiProcessShared[Any] = MultiProcessShared(lambda: None, tag=handle, always_proxy=True)
    proxy = shared.acquire()
    found = proxy.told()
    shared.release(proxy)
    return found


@pytest.mark.parametrize("zygote", ["1", "0"], ids=["forked", "spawned"])
def test_an_engine_in_a_model_server_is_told_its_share_before_it_is_made(
    new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, zygote: str
) -> None:
    monkeypatch.setenv("MPMM_ZYGOTE", zygote)
    manager = new_manager()
    # The first one has a warm process import what the others need.
    for number, mb in enumerate((250, 400, 100)):
        tag = f"engine-{number}"
        with manager.model(tag, LoadsEngine(f"{tag}-1"), steady=True, expect_mb=mb) as handle:
            environment, placement, reserved_mb, fraction = told(handle)
            assert environment == (str(mb), "booked", f"{mb / 1000:.3f}")
            assert (reserved_mb, fraction) == (mb, mb / 1000)
            assert placement == Placement((0,), ("booked",))
    assert share_here() == (None, None, None)


def test_every_way_to_load_tells_the_share(new_manager: NewManager) -> None:
    manager = new_manager()

    async def use_in_loop() -> None:
        async with manager.model_async("a", LoadsEngine("a-1"), steady=True, expect_mb=250) as handle:
            assert told(handle)[0][0] == "250"

    asyncio.run(use_in_loop())
    assert manager.preload("b", LoadsEngine("b-1"), steady=True, expect_mb=100) == 1
    assert told("b-1")[0][0] == "100"
    use = manager.uses("c", LoadsEngine("c-1"), steady=True, expect_mb=50)(lambda model: told(model)[0][0])
    assert use() == "50"


def test_servers_of_other_loads_are_told_nothing(new_manager: NewManager, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = new_manager()
    with manager.model("a", LoadsEngine("a-1"), expect_mb=250) as handle:
        assert told(handle) == ((None, None, None), Placement((0,), ("booked",)), 250, 0.25)
    # Unless they would take what is said of this process for theirs.
    monkeypatch.setenv("MPMM_LEASE_MB", "999")
    with manager.model("b", LoadsEngine("b-1"), expect_mb=150) as handle:
        assert told(handle)[0] == ("150", "booked", "0.150")


@pytest.mark.parametrize("zygote", ["1", "0"], ids=["forked", "spawned"])
def test_what_is_not_known_of_a_share_is_not_told_of_the_one_around_it(
    new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, zygote: str
) -> None:
    """A server in `mpmm run` on a device of unknown size has no fraction, and not that of the program."""
    monkeypatch.setenv("MPMM_ZYGOTE", zygote)
    for name, value in zip(SHARE, ("999", "elsewhere", "0.900"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(SharedSamples, "memory_fraction", lambda *of: None)
    manager = new_manager()
    with manager.model("a", LoadsEngine("a-1"), expect_mb=150) as handle:
        assert told(handle)[0] == ("150", "booked", None)
    with manager.reserve(100) as lease:
        program = with_share(os.environ, lease.environment())
        assert [program.get(name) for name in SHARE] == ["100", "booked", None]
        assert program["MPMM_ZYGOTE"] == zygote


def test_a_program_that_a_loader_starts_has_nothing_of_the_share_around_it(
    new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the way that the documentation shows, in `mpmm run` on a device of unknown size."""
    manager = new_manager()
    outer = dict(zip(SHARE, ("999", "elsewhere", "0.900"), strict=True))
    say = [sys.executable, "-c", f"import os; print([os.environ.get(name) for name in {SHARE!r}])"]
    said = []

    def load() -> str:
        placement = current_placement()
        assert placement is not None
        program = subprocess.run(
            say, env={**os.environ, **placement.environment()}, capture_output=True, text=True, check=True
        )
        said.append(program.stdout.strip())
        return uuid4().hex

    with manager.model("known", load, expect_mb=150):
        pass
    monkeypatch.setattr(SharedSamples, "memory_fraction", lambda *of: None)
    with manager.model("unknown outside", load, expect_mb=150):
        pass
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    with manager.model("unknown within", load, expect_mb=150):
        pass
    assert said == ["['150', 'booked', '0.150']", "['150', 'booked', None]", "['150', 'booked', '']"]


def test_a_load_inside_of_another_ones_loader_has_its_own_share(new_manager: NewManager, new_device: NewDevice) -> None:
    manager, inner = new_manager(memory_source=new_device(1000, 1000)), []

    def load() -> str:
        with manager.model("inner", LoadsEngine("inner-1"), devices=[1], expect_mb=100) as handle:
            inner.append(told(handle)[0])
        return LoadsEngine("outer-1")()

    with manager.model("outer", load, devices=[0], steady=True, expect_mb=300) as handle:
        assert told(handle)[0] == ("300", "sim-0", "0.300")
    assert inner == [("100", "sim-1", "0.100")]


@pytest.mark.parametrize("hosts", [False, True], ids=["object", "hosted here"])
def test_a_loader_in_the_process_asks_for_its_share_and_other_threads_notice_nothing(
    new_manager: NewManager, hosts: bool
) -> None:
    manager, seen = new_manager(), []

    def load() -> object:
        thread, outcome = in_thread(lambda: (share_here(), current_placement()))
        thread.join()
        seen.append((share_here(), outcome))
        placement = current_placement()
        assert placement is not None
        assert (placement.mb, placement.memory_fraction) == (250, 0.25)
        assert placement.environment() == dict(zip(SHARE, ("250", "booked", "0.250"), strict=True))
        return LoadsEngine("a-1", spawn=False)() if hosts else Engine()

    with manager.model("a", load, steady=True, expect_mb=250) as engine:
        environment, placement, reserved_mb, _ = told(engine) if hosts else engine.told()
    nothing = (None, None, None)
    assert (environment, placement, reserved_mb) == (nothing, Placement((0,), ("booked",)), 250)
    assert seen == [(nothing, [(nothing, None)])]
    assert current_placement() is None


def test_the_share_of_a_copy_on_several_devices_is_that_of_each(new_manager: NewManager, new_device: NewDevice) -> None:
    manager = new_manager(memory_source=new_device(1000, 2000))
    with manager.model("a", LoadsEngine("a-1"), steady=True, span=2, expect_mb=1200) as handle:
        environment, _, reserved_mb, fraction = told(handle)
    assert (environment[0], environment[2]) == ("1200", "0.600")
    assert (reserved_mb, fraction) == (1200, 0.6)
    assert len(str(environment[1]).split(",")) == 2
    with manager.reserve(300) as lease:
        assert (lease.placement.mb, lease.environment()) == (300, lease.placement.environment())


def test_a_share_that_is_not_known_is_not_told() -> None:
    assert fraction_of(100, []) is None
    assert fraction_of(100, [0.0]) is None
    assert fraction_of(100, [math.nan]) is None
    assert fraction_of(100, [1000, 0.0]) is None
    assert fraction_of(0.5, [0.5]) == 1.0
    assert fraction_of(299.9, [1000]) == 0.299
    assert fraction_of(600, [1000, 2000]) == 0.3
    assert fraction_of(3000, [1000, 2000]) == 1.0
    assert Placement((), ()).environment() == {"MPMM_DEVICES": ""}


# ---- at a prompt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ((), 0.0),
        (("--steady",), math.inf),
        (("--steady", "--priority", "3"), math.inf),
        (("--steady", "30"), 30.0),
        (("--steady=30",), 30.0),
        (("--steady", "inf"), math.inf),
    ],
    ids=str,
)
def test_the_program_is_never_taken_for_the_seconds(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], seconds: float
) -> None:
    called: list[Any] = []

    def run_on_lease(program: list[str], mb: float, *, steady_seconds: float, **_: Any) -> int:
        called.append((program, mb, steady_seconds))
        return 0

    monkeypatch.setattr("mpmm.model_manager.run_command.run_on_lease", run_on_lease)
    assert main(["run", "--namespace", "a", "--mb", "1GiB", *options, "--", "90", "--steady", "5"]) == 0
    assert called == [(["90", "--steady", "5"], 1024, seconds)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steady=30", "prog"), "unrecognized arguments: prog; write the program and its arguments after `--`"),
        (("--steady", "30", "prog"), "unrecognized arguments: prog; write the program and its arguments after `--`"),
        (("--steady", "prog"), "--steady: 'prog': expected seconds, or nothing; write the program and its arguments"),
        (("--steady",), "needs a program after `--`"),
        (("--steady=", "--", "prog"), "--steady: '': expected seconds, or nothing"),
    ],
    ids=str,
)
def test_a_program_without_the_dashes_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "--mb", "1", *arguments])
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_without_a_number_the_quiet_lasts_as_long_as_the_program(
    namespace: str, new_manager: NewManager, start: Start
) -> None:
    new_manager(fallback_memory_mb=16000)
    program = start(1000, "cat", options=("--steady",))
    wait_until(lambda: read_snapshot(namespace).steady_devices, "it runs")
    program.communicate(timeout=DEADLINE_S)
    wait_until(lambda: not read_snapshot(namespace).steady_devices, "its end ends the quiet")


def test_a_shell_may_complete_another_option_where_the_seconds_are_left_out() -> None:
    parser = make_parser()
    assert "--steady" not in completion(parser, "bash").partition("case $1 in")[0]
    assert "-l steady -x" not in completion(parser, "fish")
    assert r"\fB\-\-steady\fR [\fISECONDS\fR]" in man_page(parser, "0")
