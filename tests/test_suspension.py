"""Suspended instances: an eviction that can be undone, cooperatively. Objects, handles, failures, deaths, budgets."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
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
    learn,
    model_of,
    problems,
    release,
    scaled,
    stop_outside_of_transactions,
    stop_process,
    wait_until,
    waiting,
)
from loaders import Gate, Loads, LoadsObject
from patience import DEADLINE_S
from sleepers import CarefulSleeper, LoadsSleeper, MakesSleeper, pretend_load_s, steps

from mpmm import ModelManager, cli
from mpmm.errors import AcquireTimeoutError, ClosedError, InvalidArgumentError, MpmmError, SuspendTimeoutError
from mpmm.observability.findings import findings
from mpmm.policy.suspension import Unsuspendable
from mpmm.policy.view import Reason
from mpmm.shared_state.layout import Instance, Model
from mpmm.shared_state.snapshot import Snapshot, read_snapshot
from mpmm.sources import DeviceInfo, DeviceSample
from mpmm.sources.host_memory import host_memory_mb
from mpmm.suspend.suspender import HOST_RESERVE, Suspender

# As accounted: a load of it is worth a suspension of 600 MB.
LONG_S = 20.0

# ---- a process and its objects ---------------------------------------------------------------------------------


def use(manager: ModelManager, tag: str, loader: Callable[[], Any], load_s: float = LONG_S) -> Any:
    """Have a copy loaded, or whatever, and given back; its loads take long by accounting."""
    with manager.model(tag, loader) as copy:
        pass
    pretend_load_s(manager, tag, load_s)
    return copy


def states(namespace: str, tag: str) -> list[str]:
    return [copy.state for copy in copies_of(namespace, tag)]


def await_states(namespace: str, tag: str, *expected: str) -> None:
    wait_until(lambda: tuple(states(namespace, tag)) == expected, f"{tag} is {expected}")


def host_mb(snapshot: Snapshot) -> float:
    return sum(copy.host_mb for copy in snapshot.instances)


@pytest.fixture
def manager(new_manager: NewManager) -> ModelManager:
    manager = new_manager(suspend_budget_mb=2000.0)
    for tag in "abcd":
        manager._estimator.set_initial_estimate(tag, 600.0)
    return manager


def test_an_evicted_object_sleeps_and_is_the_same_one_when_it_is_asked_for(
    manager: ModelManager, tmp_path: Path
) -> None:
    first = use(manager, "a", MakesSleeper(tmp_path))
    use(manager, "b", MakesSleeper(tmp_path))
    snapshot = read_snapshot(manager.namespace)
    assert states(manager.namespace, "a") == ["suspended"]
    assert (host_mb(snapshot), snapshot.suspends, snapshot.evictions) == (600.0, 1, 1)
    assert next(copy for copy in snapshot.instances if copy.tag == "a").device_mb == 600.0
    with manager.model("a", Loads()) as again:
        assert again is first
        assert states(manager.namespace, "a") == ["active"]
    snapshot = read_snapshot(manager.namespace)
    assert (snapshot.loads, snapshot.resumes, snapshot.suspends) == (2, 1, 2)
    assert (steps(tmp_path, "sleep"), steps(tmp_path, "wake")) == (2, 1)
    assert states(manager.namespace, "b") == ["suspended"]
    assert problems(manager.namespace) == []
    kinds = [event.kind for event in snapshot.events if event.tag == "a"]
    assert [kind for kind in kinds if kind.startswith(("suspend", "resume"))] == [
        "suspend_began",
        "suspend_ended",
        "resume_began",
        "resume_ended",
    ]


def test_where_a_load_is_as_quick_a_copy_is_unloaded(manager: ModelManager, tmp_path: Path) -> None:
    use(manager, "a", MakesSleeper(tmp_path), load_s=0.1)
    use(manager, "b", MakesSleeper(tmp_path))
    assert states(manager.namespace, "a") == [] and steps(tmp_path, "sleep") == 0


def test_the_policy_is_told_which_copies_would_be_suspended(new_manager: NewManager, tmp_path: Path) -> None:
    manager = new_manager(suspend_budget_mb=1000.0, fallback_memory_mb=3000, default_estimate_mb=600.0)
    use(manager, "slow", MakesSleeper(tmp_path))
    use(manager, "quick", MakesSleeper(tmp_path), load_s=0.1)
    use(manager, "unable", Loads())
    session = manager._connected()

    def told() -> list[str]:
        with session.namespace.transaction():
            view = session.scheduler.read_view()
            return [session.namespace.tables.tag_of(one.model) for one in view.idle if one.suspendable]

    assert told() == ["slow"]
    # A copy in the host that is worth as much is not dropped for it.
    assert manager.suspend("quick") == 1
    manager.update_settings(suspend_budget_mb=700.0)
    assert told() == ["slow"], "the other one is worth nothing"
    manager.update_settings(suspend_budget_mb=500.0)
    assert told() == []


def test_where_little_is_saved_in_all_only_what_is_clearly_quicker_to_bring_back_is_suspended(
    new_manager: NewManager, tmp_path: Path
) -> None:
    manager = new_manager(suspend_budget_mb=9000.0, fallback_memory_mb=9000, default_estimate_mb=600.0)
    # By the estimate a suspension and a resume take 0.25 s.
    use(manager, "small", MakesSleeper(tmp_path), load_s=0.5)
    use(manager, "clear", MakesSleeper(tmp_path), load_s=1.1)
    session = manager._connected()
    tables, transitions = session.namespace.tables, session.namespace.transitions

    def told() -> set[str]:
        with session.namespace.transaction():
            view = session.scheduler.read_view()
            return {tables.tag_of(one.model) for one in view.idle if one.suspendable}

    assert told() == {"small", "clear"}
    # Most of what loads take is that of a model of which nothing is saved, as it takes as long to suspend it.
    use(manager, "large", MakesSleeper(tmp_path), load_s=40.0)
    with session.namespace.transaction() as t:
        large = tables.model_row("large")
        assert large is not None
        transitions.suspensions.expect(t, large, 30.0, 10.0)
    assert told() == {"clear"}
    # A model that cannot be suspended for another reason does not count for the saved share.
    with session.namespace.transaction() as t:
        t.set(tables.model(large) + Model.UNSUSPENDABLE, Unsuspendable.TIMED_OUT)
    assert told() == {"small", "clear"}
    with session.namespace.transaction() as t:
        t.set(tables.model(large) + Model.UNSUSPENDABLE, 0)
    assert manager.suspend("small") == 1, "by hand it need not pay"


def test_the_policy_is_told_of_many_copies_without_a_search_for_twins_of_each(
    new_manager: NewManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager(suspend_budget_mb=1000.0)
    for tag in "abc":
        use(manager, tag, MakesSleeper(tmp_path))
        use(manager, f"server of {tag}", LoadsSleeper(f"{manager.namespace}-{tag}", MakesSleeper(tmp_path)))
    twins = LoadsSleeper(f"{manager.namespace}-twin", MakesSleeper(tmp_path))
    use(manager, "one", twins)
    use(manager, "other", twins)
    session, searched = manager._connected(), list[int]()
    suspension, of_one = session.scheduler.suspension, session.namespace.transitions.twins.any_of

    def any_of(row: int) -> bool:
        searched.append(row)
        return of_one(row)

    with session.namespace.transaction():
        rows = session.namespace.tables.idle_copies()
        monkeypatch.setattr(session.namespace.transitions.twins, "any_of", any_of)
        kept = suspension.kept_of(rows)
        assert sorted(searched) == sorted(set(rows) - kept) and len(searched) == 2, "the twins"
        assert kept == {row for row in rows if suspension.can_be_suspended(row)} and len(kept) == 6


def test_a_budget_of_nothing_turns_it_off(new_manager: NewManager, tmp_path: Path) -> None:
    manager = new_manager(suspend_budget_mb=0.0, default_estimate_mb=600.0)
    use(manager, "a", MakesSleeper(tmp_path))
    use(manager, "b", MakesSleeper(tmp_path))
    assert states(manager.namespace, "a") == [] and steps(tmp_path, "sleep") == 0
    assert manager.suspend("b") == 0


def test_the_budget_is_half_of_what_the_host_has_left_unless_it_is_chosen(new_manager: NewManager) -> None:
    manager = new_manager()
    assert read_snapshot(manager.namespace).suspend_budget_mb > 100.0


def test_what_the_host_has_no_room_for_makes_the_oldest_go(new_manager: NewManager, tmp_path: Path) -> None:
    manager = new_manager(suspend_budget_mb=1300.0, default_estimate_mb=600.0)
    for tag in "abcd":
        use(manager, tag, MakesSleeper(tmp_path))
    # The copy evicted for the last one may still be unloading.
    wait_until(lambda: host_mb(read_snapshot(manager.namespace)) == 1200.0, "the others are gone")
    snapshot = read_snapshot(manager.namespace)
    suspended = sorted(copy.tag for copy in snapshot.instances if copy.state == "suspended")
    assert len(suspended) == 2
    assert "d" not in suspended
    (dropped,) = [event for event in snapshot.events if event.reason == Reason.HOST_FULL]
    assert {dropped.tag, dropped.other, *suspended} == set("abc")
    assert dropped.other in suspended, "it had to go for this one"
    assert problems(manager.namespace) == []


def test_by_hand_a_copy_is_suspended_and_resumed(manager: ModelManager, tmp_path: Path) -> None:
    use(manager, "a", MakesSleeper(tmp_path))
    assert manager.suspend("a") == 1
    assert states(manager.namespace, "a") == ["suspended"]
    assert manager.suspend("a") == 0
    assert manager.resume("a") == 1
    assert states(manager.namespace, "a") == ["idle"]
    assert manager.resume("a") == 0
    assert manager.suspend("nothing") == manager.resume("nothing") == 0
    assert problems(manager.namespace) == []


def test_a_preload_can_leave_copies_suspended(manager: ModelManager, tmp_path: Path) -> None:
    assert manager.preload("a", MakesSleeper(tmp_path), state="suspended") == 1
    assert states(manager.namespace, "a") == ["suspended"]
    assert manager.preload("a", Loads("not to be called"), state="suspended") == 0
    with manager.model("a", Loads("not to be called")):
        assert states(manager.namespace, "a") == ["active"]
    assert manager.preload("b", Loads(), state="suspended") == 1
    assert states(manager.namespace, "b") == ["idle"]
    with pytest.raises(InvalidArgumentError, match="'asleep'"):
        manager.preload("c", Loads("not to be called"), state="asleep")
    assert problems(manager.namespace) == []


def test_a_copy_that_has_no_way_or_is_in_use_is_not_suspended(manager: ModelManager, tmp_path: Path) -> None:
    use(manager, "a", Loads())
    assert manager.suspend("a") == 0
    with manager.model("b", MakesSleeper(tmp_path)):
        assert manager.suspend("b") == 0


class AsyncSleeper:
    """Has the methods, but as coroutine functions."""

    async def sleep(self) -> None:
        """Give nothing up, unless it is awaited."""

    async def wake_up(self) -> None:
        """Take nothing, unless it is awaited."""


def test_an_object_whose_methods_are_coroutine_functions_is_not_suspended(
    manager: ModelManager, caplog: pytest.LogCaptureFixture
) -> None:
    use(manager, "a", AsyncSleeper)
    assert "AsyncSleeper is not suspended cooperatively" in caplog.text
    assert manager.suspend("a") == 0
    assert states(manager.namespace, "a") == ["idle"]


def test_a_suspension_that_waits_for_a_quiet_start_is_not_overdue(
    manager: ModelManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpmm.suspend.suspender.limit_s", lambda mb: 0.05)
    use(manager, "a", MakesSleeper(tmp_path))
    with manager.reserve(100, name="quiet", steady=True) as lease:
        assert manager.suspend("a", timeout_seconds=0) == 1, "it is going to sleep"
        time.sleep(0.2)
        manager._connected().suspender.end_overdue()
        assert states(manager.namespace, "a") == ["suspending"]
        monkeypatch.setattr("mpmm.observability.findings.limit_s", lambda mb: 0.05)
        said = [finding.text for finding in findings(read_snapshot(manager.namespace))]
        assert not any("has been suspending" in text for text in said), said
        monkeypatch.undo()
        lease.settled()
        await_states(manager.namespace, "a", "suspended")
    assert not model_of(manager.namespace, "a").unsuspendable


@pytest.mark.parametrize("way", ["fail", "exit"])
def test_a_model_that_cannot_sleep_is_unloaded_and_not_asked_again(
    manager: ModelManager, tmp_path: Path, way: str
) -> None:
    (tmp_path / f"{way}_sleep").touch()
    use(manager, "a", MakesSleeper(tmp_path))
    assert manager.suspend("a") == 0
    await_states(manager.namespace, "a")
    assert model_of(manager.namespace, "a").unsuspendable == Unsuspendable.SUSPEND_FAILED
    snapshot = read_snapshot(manager.namespace)
    assert snapshot.suspend_failures == 1
    said = [finding.text for finding in findings(snapshot)]
    assert "a is unloaded instead of suspended, because an attempt to suspend it failed" in said
    (tmp_path / f"{way}_sleep").unlink()
    use(manager, "a", MakesSleeper(tmp_path))
    assert manager.suspend("a") == 0 and states(manager.namespace, "a") == ["idle"]


@pytest.mark.parametrize("way", ["fail", "exit"])
def test_a_copy_that_cannot_wake_up_is_unloaded_and_loaded_anew(
    manager: ModelManager, tmp_path: Path, way: str
) -> None:
    first = use(manager, "a", MakesSleeper(tmp_path))
    manager.suspend("a")
    (tmp_path / f"{way}_wake").touch()
    with manager.model("a", MakesSleeper(tmp_path)) as second:
        assert second is not first
    assert model_of(manager.namespace, "a").unsuspendable == Unsuspendable.RESUME_FAILED
    await_states(manager.namespace, "a", "idle")
    assert host_mb(read_snapshot(manager.namespace)) == 0.0
    assert problems(manager.namespace) == []


@pytest.mark.parametrize("spawn", [None, False, True], ids=["object", "served here", "server"])
def test_a_copy_that_finds_no_memory_as_it_wakes_up_is_loaded_anew_and_its_model_suspended_again(
    manager: ModelManager, tmp_path: Path, spawn: bool | None
) -> None:
    handles = iter(("first", "second"))

    def loader() -> Any:
        makes = MakesSleeper(tmp_path)
        return makes() if spawn is None else LoadsSleeper(next(handles), makes, spawn)()

    first = use(manager, "a", loader)
    assert manager.suspend("a") == 1
    (tmp_path / "crowd_wake").touch()
    with manager.model("a", loader) as second:
        assert second != first
    await_states(manager.namespace, "a", "idle")
    assert manager.suspend("a") == 1
    assert problems(manager.namespace) == []


def test_a_suspension_that_hangs_has_a_limit_and_holds_up_nobody_else(
    manager: ModelManager, tmp_path: Path, new_gate: NewGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpmm.suspend.suspender.limit_s", lambda mb: 0.3)
    hang = new_gate()
    use(manager, "a", MakesSleeper(tmp_path, hang=hang))
    (tmp_path / "hang_sleep").touch()
    suspending = threading.Thread(target=manager.suspend, args=("a",))
    suspending.start()
    # Not the state, which may be over before a busy machine lets us look at it.
    wait_until((tmp_path / "hangs_sleep").exists, "it is being suspended")
    manager._estimator.set_initial_estimate("small", 100.0)
    with manager.model("small", Loads()):
        pass
    suspending.join()
    await_states(manager.namespace, "a")
    assert model_of(manager.namespace, "a").unsuspendable == Unsuspendable.TIMED_OUT
    hang.open()


def test_a_reset_takes_suspended_copies_too(manager: ModelManager, tmp_path: Path) -> None:
    use(manager, "a", MakesSleeper(tmp_path))
    manager.suspend("a")
    manager.force_reset()
    await_states(manager.namespace, "a")
    assert host_mb(read_snapshot(manager.namespace)) == 0.0


# ---- handles and processes -------------------------------------------------------------------------------------


def test_a_server_that_one_process_has_suspended_another_one_resumes(
    namespace: str, new_process: NewProcess, tmp_path: Path
) -> None:
    one, two = new_process(suspend_budget_mb=2000.0), new_process(suspend_budget_mb=2000.0)
    one.call(learn, a=600.0, b=600.0)
    loader = LoadsSleeper("sleeper", MakesSleeper(tmp_path), spawn=True)
    one.call(acquire, "a", loader)
    one.call(release)
    one.call(let_loads_take_long, "a")
    two.call(acquire, "b", Loads())
    assert states(namespace, "a") == ["suspended"]
    two.call(release)
    assert two.call(acquire, "a", Loads()) == "sleeper"
    assert (steps(tmp_path, "sleep"), steps(tmp_path, "wake")) == (1, 1)
    assert read_snapshot(namespace).loads == 2
    assert problems(namespace) == []


def let_loads_take_long(seat: Seat, tag: str) -> None:
    pretend_load_s(seat.manager, tag, LONG_S)


def test_a_loader_that_returns_the_handle_of_a_suspended_copy_has_it_resumed(
    manager: ModelManager, tmp_path: Path
) -> None:
    loader = LoadsSleeper("same", MakesSleeper(tmp_path))
    use(manager, "a", loader)
    assert manager.suspend("a") == 1
    with manager.model("b", loader) as handle:
        assert handle == "same"
        assert (steps(tmp_path, "sleep"), steps(tmp_path, "wake")) == (1, 1)
    assert states(manager.namespace, "a") == ["idle"]
    assert problems(manager.namespace) == []


def test_so_it_is_if_that_copy_is_suspended_just_before_the_load_ends(
    manager: ModelManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, wake, moved = LoadsSleeper("same", MakesSleeper(tmp_path)), Suspender.wake, list[Any]()
    use(manager, "a", loader)

    def wake_and_have_it_suspended(self: Suspender, *arguments: Any) -> None:
        wake(self, *arguments)
        if not moved:
            thread, outcome = in_thread(lambda: manager.suspend("a"))
            thread.join()
            moved.extend(outcome)

    monkeypatch.setattr(Suspender, "wake", wake_and_have_it_suspended)
    with manager.model("b", loader):
        assert moved == [1]
        # The first time, it has made room for the load.
        assert (steps(tmp_path, "sleep"), steps(tmp_path, "wake")) == (2, 2)
        assert states(manager.namespace, "a") == ["idle"]
    assert problems(manager.namespace) == []


def test_a_suspended_copy_whose_server_dies_is_gone_from_the_host(
    namespace: str, new_process: NewProcess, tmp_path: Path
) -> None:
    process = new_process(suspend_budget_mb=2000.0)
    process.call(acquire, "a", LoadsSleeper("lost", MakesSleeper(tmp_path), spawn=True))
    process.call(release)
    assert process.call(suspend, "a") == 1
    server = next(member for member in read_snapshot(namespace).members if member.kind == "server")
    os.kill(server.pid, signal.SIGKILL)
    await_states(namespace, "a")
    assert host_mb(read_snapshot(namespace)) == 0.0


def suspend(seat: Seat, tag: str) -> int:
    return int(seat.manager.suspend(tag))


def resume(seat: Seat, tag: str) -> int:
    return int(seat.manager.resume(tag))


@pytest.mark.parametrize("step", ["sleep", "wake"])
def test_who_dies_in_the_middle_leaves_a_copy_that_the_heir_suspends(
    namespace: str, new_process: NewProcess, tmp_path: Path, new_gate: NewGate, step: str
) -> None:
    hang = new_gate()
    successor, victim = new_process(suspend_budget_mb=2000.0), new_process(suspend_budget_mb=2000.0)
    successor.call(acquire, "a", LoadsSleeper("kept", MakesSleeper(tmp_path, hang=hang), spawn=True))
    successor.call(release)
    if step == "wake":
        assert successor.call(suspend, "a") == 1
    (tmp_path / f"hang_{step}").touch()
    victim.send(suspend if step == "sleep" else resume, "a")
    moving = "suspending" if step == "sleep" else "resuming"
    wait_until(lambda: states(namespace, "a") == [moving], moving)
    victim.kill()
    (tmp_path / f"hang_{step}").unlink()
    hang.open()
    await_states(namespace, "a", "suspended")
    assert problems(namespace) == []
    assert successor.call(acquire, "a", Loads()) == "kept"


def test_a_resume_whose_end_is_undone_is_given_up(
    manager: ModelManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(manager, "a", MakesSleeper(tmp_path))
    assert manager.suspend("a") == 1
    session = manager._connected()
    advance, interrupts = session.scheduler.advance, iter([True])

    def interrupted(*args: Any, **kwargs: Any) -> None:
        advance(*args, **kwargs)
        in_use = any(copy.state == Instance.ACTIVE for _, copy in session.suspender._instances_of("a"))
        if in_use and next(interrupts, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(session.scheduler, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        manager.acquire_model("a", Loads("not to be called"))
    await_states(manager.namespace, "a", "suspended")
    assert model_of(manager.namespace, "a").unsuspendable == 0
    assert (steps(tmp_path, "sleep"), problems(manager.namespace)) == (2, [])


class TooLate(Exception):
    """Raised by the handler of a time limit that the program has set itself."""


def resume_too_late(seat: Seat, tag: str) -> str:
    """Resume a model, with a time limit that ends while it wakes up; return what that raises."""

    def end(*_: object) -> None:
        raise TooLate

    signal.signal(signal.SIGUSR2, end)
    try:
        return str(seat.manager.resume(tag))
    except TooLate:
        return "too late"


def test_what_a_signal_handler_raises_is_the_programs_and_no_failure_of_the_model(
    namespace: str, new_process: NewProcess, tmp_path: Path, new_gate: NewGate
) -> None:
    hang, process = new_gate(), new_process(suspend_budget_mb=2000.0)
    process.call(acquire, "a", MakesSleeper(tmp_path, hang=hang))
    process.call(release)
    assert process.call(suspend, "a") == 1
    (tmp_path / "hang_wake").touch()
    process.send(resume_too_late, "a")
    await_states(namespace, "a", "resuming")
    wait_until((tmp_path / "hangs_wake").exists, "it wakes up")
    process.signal(signal.SIGUSR2)
    assert process.result() == "too late"
    hang.open()
    await_states(namespace, "a", "suspended")
    assert model_of(namespace, "a").unsuspendable == 0


@pytest.mark.parametrize("spawn", [None, False, True], ids=["object", "served here", "server"])
def test_an_object_whose_resume_is_interrupted_is_asleep_in_the_end(
    namespace: str, new_process: NewProcess, tmp_path: Path, new_gate: NewGate, spawn: bool | None
) -> None:
    hang, process = new_gate(), new_process(suspend_budget_mb=2000.0)
    makes = MakesSleeper(tmp_path, hang=hang, kind=CarefulSleeper)
    process.call(acquire, "a", makes if spawn is None else LoadsSleeper("kept", makes, spawn))
    process.call(release)
    assert process.call(suspend, "a") == 1
    (tmp_path / "hang_wake").touch()
    process.send(resume, "a")
    wait_until((tmp_path / "hangs_wake").exists, "it wakes up")
    process.signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        process.result()
    await_states(namespace, "a", "suspending")
    # It continues to wake up in a thread for which no caller waits any more.
    hang.open()
    await_states(namespace, "a", "suspended")
    assert (steps(tmp_path, "wake"), steps(tmp_path, "sleep")) == (1, 2)
    assert problems(namespace) == []


def test_who_is_stopped_in_the_middle_is_waited_for_only_so_long(
    namespace: str, new_process: NewProcess, tmp_path: Path, new_gate: NewGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = tmp_path / "stopped"
    # In all processes, but not before the victim is stopped: it would give up by itself.
    monkeypatch.setattr("mpmm.suspend.suspender.limit_s", lambda mb: 0.5 if stopped.exists() else DEADLINE_S)
    hang = new_gate()
    leader, victim = new_process(suspend_budget_mb=2000.0), new_process(suspend_budget_mb=2000.0)
    leader.call(acquire, "a", LoadsSleeper("stuck", MakesSleeper(tmp_path, hang=hang), spawn=True))
    leader.call(release)
    (tmp_path / "hang_sleep").touch()
    victim.send(suspend, "a")
    wait_until(lambda: states(namespace, "a") == ["suspending"], "it is being suspended")
    victim.stop()
    stopped.touch()
    await_states(namespace, "a")
    assert model_of(namespace, "a").unsuspendable == 0, "it is not the model's fault"
    hang.open()
    victim.resume()
    assert victim.result() == 0
    assert problems(namespace) == []


def test_who_is_stopped_before_it_hears_of_a_resume_waits_again_and_loads(
    namespace: str,
    new_manager: NewManager,
    new_process: NewProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager, victim = new_manager(suspend_budget_mb=2000.0), new_process()
    learn(Seat(manager), a=600)
    victim.call(acquire, "a", MakesSleeper(tmp_path))
    victim.call(release)
    assert victim.call(suspend, "a") == 1
    lease = manager.reserve(600.0)
    victim.send(acquire, "a", MakesSleeper(tmp_path))
    wait_until(lambda: waiting(namespace, "a"), "it waits for memory")
    stop_outside_of_transactions(victim, namespace)
    lease.release()
    assert states(namespace, "a") == ["resuming"]
    # Only for the leader, which is this process.
    monkeypatch.setattr("mpmm.suspend.suspender.limit_s", lambda mb: 0.2)
    await_states(namespace, "a", "unloading")
    assert problems(namespace) == []
    assert len(waiting(namespace, "a")) == 1
    victim.resume()
    victim.result()
    await_states(namespace, "a", "active")
    snapshot = read_snapshot(namespace)
    assert (snapshot.loads, snapshot.resumes, snapshot.suspend_failures) == (2, 0, 1)
    assert model_of(namespace, "a").unsuspendable == 0, "it is not the model's fault"
    victim.call(release)
    assert problems(namespace) == []


def test_a_server_that_is_stopped_is_waited_for_only_so_long_and_that_is_no_fault_of_its_model(
    namespace: str, new_process: NewProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpmm.suspend.suspender.limit_s", lambda mb: 0.5)
    process = new_process(suspend_budget_mb=2000.0)
    process.call(acquire, "a", LoadsSleeper("stopped", MakesSleeper(tmp_path), spawn=True))
    process.call(release)
    server = next(member for member in read_snapshot(namespace).members if member.kind == "server")
    stop_process(server.pid)
    assert process.call(suspend, "a") == 0
    await_states(namespace, "a")
    assert model_of(namespace, "a").unsuspendable == 0
    assert problems(namespace) == []


def test_a_process_that_was_stopped_for_longer_than_a_suspension_may_take_does_not_blame_the_model(
    namespace: str, new_process: NewProcess, tmp_path: Path, new_gate: NewGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpmm.suspend.suspender.limit_s", lambda mb: 3.0)
    hang, process = new_gate(), new_process(suspend_budget_mb=2000.0)
    process.call(acquire, "a", MakesSleeper(tmp_path, hang=hang))
    process.call(release)
    (tmp_path / "hang_sleep").touch()
    process.send(suspend, "a")
    wait_until((tmp_path / "hangs_sleep").exists, "it goes to sleep")
    process.stop()
    time.sleep(4.0)
    process.resume()
    assert process.result() == 0
    await_states(namespace, "a")
    assert model_of(namespace, "a").unsuspendable == 0
    hang.open()


def work_on(seat: Seat, folder: Path, seed: int) -> None:
    """Use, suspend and resume models at random, until killed."""
    rng, made = random.Random(seed), 0
    while True:
        tag, made = rng.choice("abc"), made + 1
        with contextlib.suppress(MpmmError):
            choice = rng.random()
            if choice < 0.2:
                seat.manager.suspend(tag)
            elif choice < 0.4:
                seat.manager.resume(tag, timeout_seconds=2.0)
            else:
                handle = f"{tag}-{os.getpid()}-{made}"
                with seat.manager.model(tag, LoadsSleeper(handle, MakesSleeper(folder), spawn=True)):
                    pass
                pretend_load_s(seat.manager, tag, LONG_S)


def test_random_deaths_leave_nothing_wrong_in_the_books(
    namespace: str, new_process: NewProcess, new_manager: NewManager, tmp_path: Path
) -> None:
    rng = random.Random(20)
    manager = new_manager(namespace=namespace, suspend_budget_mb=1100.0)
    for tag in "abc":
        manager._estimator.set_initial_estimate(tag, 500.0)
    crew: list[Process] = []
    for turn in range(scaled(10)):
        crew = [process for process in crew if not process.killed]
        while len(crew) < 2:
            process = new_process(suspend_budget_mb=1100.0)
            process.send(work_on, tmp_path, 100 * turn + len(crew))
            crew.append(process)
        time.sleep(rng.uniform(0.05, 0.5))
        assert problems(namespace) == []
        if turn % 2:
            rng.choice(crew).kill()
        else:
            servers = [member.pid for member in read_snapshot(namespace).members if member.kind == "server"]
            for pid in servers[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    for process in crew:
        process.kill()
    wait_until(
        lambda: all(copy.state in ("idle", "suspended") for copy in read_snapshot(namespace).instances),
        "all is at rest",
    )
    snapshot = read_snapshot(namespace)
    assert problems(namespace) == []
    assert host_mb(snapshot) == 500.0 * sum(copy.state == "suspended" for copy in snapshot.instances) <= 1100.0
    for tag in "abc":
        with manager.model(tag, Loads()):
            pass


def test_who_gives_up_waiting_for_a_resume_leaves_it_suspended(manager: ModelManager, tmp_path: Path) -> None:
    use(manager, "a", MakesSleeper(tmp_path))
    manager.suspend("a")
    with manager.reserve(900.0), pytest.raises(AcquireTimeoutError):
        manager.resume("a", timeout_seconds=0.1)
    assert states(manager.namespace, "a") == ["suspended"]
    assert manager.resume("a") == 1


def test_all_copies_are_resumed_each_where_it_lies_and_none_is_loaded(
    new_manager: NewManager, new_device: NewDevice, tmp_path: Path
) -> None:
    device = new_device(1000.0, 1000.0)
    manager = new_manager(memory_source=device, suspend_budget_mb=3000.0)
    learn(Seat(manager), a=600)
    for index in (0, 1):
        assert manager.preload("a", MakesSleeper(tmp_path), devices=[index]) == 1
    assert manager.suspend("a") == 2
    with manager.reserve(900.0, devices=[1]), pytest.raises(AcquireTimeoutError, match="leased"):
        manager.resume("a", timeout_seconds=0.1)
    assert sorted(states(manager.namespace, "a")) == ["idle", "suspended"], "the one beside the lease stays"
    assert manager.suspend("a") == 1
    with manager.reserve(500.0, devices=[0]) as lease:
        thread, outcome = in_thread(lambda: manager.resume("a"))
        await_states(manager.namespace, "a", "suspended", "idle")
        wait_until(lambda: waiting(manager.namespace, "a"), "the other one waits for the lease to end")
        lease.release()
    thread.join()
    assert outcome == [2]
    snapshot = read_snapshot(manager.namespace)
    assert (snapshot.loads, states(manager.namespace, "a")) == (2, ["idle", "idle"])
    assert problems(manager.namespace) == []


def test_of_two_processes_that_resume_a_model_each_copy_is_resumed_once(
    namespace: str, new_process: NewProcess, tmp_path: Path
) -> None:
    processes = [new_process(suspend_budget_mb=2000.0) for _ in range(2)]
    processes[0].call(learn, a=100)
    processes[0].call(preload_sleepers, tmp_path, 6)
    for _ in range(scaled(5)):
        assert processes[0].call(suspend, "a") == 6
        for process in processes:
            process.send(resume, "a")
        assert sum(process.result() for process in processes) == 6
        snapshot = read_snapshot(namespace)
        assert (snapshot.loads, snapshot.tickets, problems(namespace)) == (6, (), [])
        assert {copy.state for copy in snapshot.instances} == {"idle"}


def preload_sleepers(seat: Seat, folder: Path, copies: int) -> None:
    """Load copies of the model that any process can use."""
    made = iter(range(copies))
    assert seat.manager.preload("a", lambda: LoadsSleeper(f"a-{next(made)}", MakesSleeper(folder))(), copies=copies)


def test_who_unloads_a_model_or_lets_it_expire_means_its_suspended_copies_too(
    new_manager: NewManager, tmp_path: Path
) -> None:
    manager = new_manager(suspend_budget_mb=2000.0)
    use(manager, "a", MakesSleeper(tmp_path))
    assert manager.suspend("a") == 1
    assert manager.unload("a") == 1
    assert states(manager.namespace, "a") == []
    use(manager, "a", MakesSleeper(tmp_path))
    assert manager.suspend("a") == 1
    manager.update_settings(idle_ttl_seconds=0.05)
    await_states(manager.namespace, "a")
    assert problems(manager.namespace) == []


@pytest.mark.parametrize("options", [{}, {"keep_alive_seconds": 0.01}], ids=["setting", "request"])
def test_a_suspended_copy_for_which_a_request_waits_does_not_expire(
    manager: ModelManager, tmp_path: Path, options: dict[str, Any]
) -> None:
    first = use(manager, "a", MakesSleeper(tmp_path))
    other = manager.acquire_model("e", Loads(), keep_alive_seconds=0.01)
    assert manager.suspend("a") == 1
    lease = manager.reserve(600.0)
    thread, outcome = in_thread(lambda: manager.acquire_model("a", MakesSleeper(tmp_path), **options))
    wait_until(lambda: waiting(manager.namespace, "a"), "it waits for memory")
    if not options:
        manager.update_settings(idle_ttl_seconds=0.01)
    manager.release_model("e", other)
    # In the same transaction as what else has expired.
    await_states(manager.namespace, "e")
    assert states(manager.namespace, "a") == ["suspended"]
    lease.release()
    thread.join()
    assert outcome == [first]
    assert model_of(manager.namespace, "a").loads == 1
    manager.release_model("a", first)
    await_states(manager.namespace, "a")
    assert problems(manager.namespace) == []


def test_a_suspended_object_expires_though_another_process_waits_for_one_of_its_own(
    manager: ModelManager, new_process: NewProcess, tmp_path: Path
) -> None:
    use(manager, "a", MakesSleeper(tmp_path))
    assert manager.suspend("a") == 1
    other = new_process()
    with manager.reserve(600.0):
        other.send(acquire, "a", LoadsObject())
        wait_until(lambda: waiting(manager.namespace, "a"), "it waits for memory")
        manager.update_settings(idle_ttl_seconds=0.01)
        await_states(manager.namespace, "a")
    other.result()
    assert problems(manager.namespace) == []


def test_where_the_host_runs_short_of_memory_suspended_copies_go(
    manager: ModelManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(manager, "a", MakesSleeper(tmp_path))
    assert manager.suspend("a") == 1
    monkeypatch.setattr("mpmm.suspend.suspender.host_memory_left_mb", lambda: 1.0)
    await_states(manager.namespace, "a")
    gone = [event.reason for event in read_snapshot(manager.namespace).events if event.kind == "unload_began"]
    assert gone == [Reason.HOST_SHORT]


def test_what_the_host_has_no_room_for_any_more_is_not_suspended_unless_a_budget_was_chosen(
    new_manager: NewManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager(default_estimate_mb=600.0)
    use(manager, "a", MakesSleeper(tmp_path))
    room = HOST_RESERVE * host_memory_mb()
    monkeypatch.setattr("mpmm.suspend.suspender.host_memory_left_mb", lambda: room + 599.0)
    assert manager.suspend("a") == 0 and states(manager.namespace, "a") == ["idle"]
    use(manager, "b", MakesSleeper(tmp_path))
    await_states(manager.namespace, "a")
    assert (steps(tmp_path, "sleep"), model_of(manager.namespace, "a").unsuspendable) == (0, 0)
    manager.update_settings(suspend_budget_mb=1000.0)
    assert manager.suspend("b") == 1
    assert problems(manager.namespace) == []


def test_how_long_it_takes_is_kept_from_run_to_run(new_manager: NewManager, tmp_path: Path) -> None:
    path, chosen = tmp_path / "estimates", {"suspend_budget_mb": 2000.0, "memory_source": SteadySource()}
    first = new_manager(estimates_path=path, **chosen)
    first._estimator.set_initial_estimate("a", 600.0)
    use(first, "a", MakesSleeper(tmp_path))
    assert first.suspend("a") == first.resume("a") == 1
    learnt = model_of(first.namespace, "a")
    first.shutdown()
    second = new_manager(estimates_path=path, **chosen)
    with second.model("a", MakesSleeper(tmp_path)):
        known = model_of(second.namespace, "a")
    assert (known.suspend_s, known.resume_s) == (learnt.suspend_s, learnt.resume_s)
    assert known.suspend_s > 0 and known.resume_s > 0


class SteadySource:
    """A source of memory figures that always says the same."""

    name = "steady"
    measures_processes = False
    frees_late = False
    cheap = True

    def devices(self) -> tuple[DeviceInfo, ...]:
        return (DeviceInfo(0, "steady-0", "steady", 1000.0),)

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        return (DeviceSample(0, 0.0, time.monotonic_ns(), {}),)

    def close(self) -> None: ...


# ---- beside something that starts undisturbed ------------------------------------------------------------------


def start_quietly(seat: Seat, go: Gate) -> None:
    """Load an engine that has its device undisturbed until the gate opens."""
    seat.held.append(("engine", seat.manager.acquire_model("engine", LoadsObject("engine", go=go), steady=True)))


@pytest.fixture
def engine(namespace: str, manager: ModelManager, new_process: NewProcess, new_gate: NewGate, tmp_path: Path) -> Gate:
    """A gate that lets the load of an engine end, which began when a copy of `a` was idle."""
    manager._estimator.set_initial_estimate("engine", 100.0)
    use(manager, "a", MakesSleeper(tmp_path))
    go = new_gate()
    new_process().send(start_quietly, go)
    wait_until(lambda: read_snapshot(namespace).steady_devices, "the engine starts")
    return go


def test_a_suspension_beside_something_that_starts_undisturbed_is_waited_for(
    manager: ModelManager, engine: Gate
) -> None:
    assert manager.suspend("a", timeout_seconds=0) == 1
    thread, outcome = in_thread(lambda: manager.suspend("a"))
    thread.join()
    assert outcome == [0], "it is no longer idle"
    await_states(manager.namespace, "a", "suspending")
    engine.open()
    await_states(manager.namespace, "a", "suspended")
    assert problems(manager.namespace) == []


def test_who_waits_for_such_a_suspension_is_told_what_for(
    manager: ModelManager, engine: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    manager._connected().warn_after_s = (0.01,)
    thread, outcome = in_thread(lambda: manager.suspend("a"))
    wait_until(lambda: caplog.records, "the log says it")
    assert "for a to be suspended, which waits: engine is starting" in caplog.records[-1].getMessage()
    engine.open()
    thread.join()
    assert (outcome, states(manager.namespace, "a")) == ([1], ["suspended"])


def test_who_gives_up_waiting_for_such_a_suspension_is_told_and_it_is_made_later(
    manager: ModelManager, engine: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SuspendTimeoutError, match=r"1 of 1 copies .* which waits: engine is starting") as caught:
        manager.suspend("a", timeout_seconds=0.05)
    assert (caught.value.tag, caught.value.left) == ("a", 1)
    assert caught.value.waited_seconds >= 0.05
    engine.open()
    await_states(manager.namespace, "a", "suspended")


def test_a_command_that_gives_up_waiting_for_such_a_suspension_says_so(
    manager: ModelManager, engine: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["suspend", "a", "--wait", "0.05"]) == 1
    assert "yet to be suspended, which waits: engine is starting, and until it has," in capsys.readouterr().err
    engine.open()
    await_states(manager.namespace, "a", "suspended")


def test_a_shutdown_ends_the_wait_for_such_a_suspension(
    new_manager: NewManager, manager: ModelManager, engine: Gate, namespace: str
) -> None:
    thread, outcome = in_thread(lambda: manager.suspend("a"))
    await_states(namespace, "a", "suspending")
    manager.shutdown()
    thread.join()
    assert isinstance(outcome[0], ClosedError)
    engine.open()


# ---- what people see -------------------------------------------------------------------------------------------


def test_it_is_done_and_shown_at_the_command_line(
    manager: ModelManager, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use(manager, "a", MakesSleeper(tmp_path))
    assert cli.main(["suspend", "a"]) == 0
    assert cli.main(["suspend", "b"]) == 1
    assert "1 copy of a suspended" in capsys.readouterr().out
    cli.main(["inspect"])
    shown = capsys.readouterr().out
    assert "suspended 1, resumed 0, failed 0, host memory 600 of 2000 MB" in shown
    assert "is suspended because `suspend` asked for it" in shown
    with manager.model("a", Loads()):
        cli.main(["inspect"])
    assert "to resume: needs" in capsys.readouterr().out
    cli.main(["metrics"])
    shown = capsys.readouterr().out
    assert "mpmm_model_resumes_total{" in shown and "mpmm_host_budget_bytes{" in shown
    assert manager.suspend("a") == 1
    assert cli.main(["resume", "a"]) == 0


def test_what_cannot_be_moved_at_the_command_line_is_said(
    manager: ModelManager, new_process: NewProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["suspend", "a"]) == cli.main(["resume", "a"]) == 1
    assert capsys.readouterr().err == "mpmm: no copy is loaded\nmpmm: no copy is suspended\n"
    owner = new_process()
    owner.call(acquire, "a", MakesSleeper(tmp_path))
    assert cli.main(["suspend", "a"]) == 1
    assert capsys.readouterr().err == "mpmm: no copy is idle: 1 active\n"
    owner.call(release)
    assert cli.main(["suspend", "a"]) == 0
    assert cli.main(["resume", "a"]) == cli.main(["suspend", "a"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"mpmm: 1 copy is still suspended as objects of pid {owner.pid}, which alone can resume them: at its next "
        "request for the model, or by `resume` of its own manager",
        "mpmm: 1 copy is suspended already",
    ]
    assert owner.call(resume, "a") == 1
    with manager.model("b", LoadsSleeper("b-1", MakesSleeper(tmp_path))):
        pass
    assert cli.main(["suspend", "b"]) == 0
    capsys.readouterr()
    with manager.reserve(900.0):
        assert cli.main(["resume", "b", "--wait", "0.05"]) == 1
    assert "b after 0." in capsys.readouterr().err
    assert cli.main(["resume", "b"]) == 0


def test_what_has_failed_to_move_at_the_command_line_is_said(
    manager: ModelManager, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tag in "ba":
        with manager.model(tag, LoadsSleeper(f"{tag}-1", MakesSleeper(tmp_path))):
            pass
        if tag == "b":
            assert manager.suspend(tag) == 1
    for step in ("sleep", "wake"):
        (tmp_path / f"fail_{step}").touch()
    capsys.readouterr()
    assert cli.main(["suspend", "a"]) == 1
    failed = "its copies are unloaded instead of suspended, because an attempt to suspend it failed"
    assert failed in capsys.readouterr().err
    with manager.model("a", Loads()):
        pass
    assert cli.main(["suspend", "a"]) == 1
    assert failed in capsys.readouterr().err
    assert cli.main(["resume", "b"]) == 1
    failed = "no copy is suspended: they are unloaded instead, because an attempt to resume it failed"
    assert failed in capsys.readouterr().err


def test_a_trace_has_spans_for_both_directions(manager: ModelManager, tmp_path: Path) -> None:
    use(manager, "a", MakesSleeper(tmp_path))
    manager.suspend("a")
    manager.resume("a")
    path = tmp_path / "trace.json"
    assert cli.main(["trace", "-o", str(path)]) == 0
    spans = {event["name"] for event in json.loads(path.read_text()) if event["ph"] == "X"}
    assert {"suspend a", "resume a"} <= spans
