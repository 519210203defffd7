"""Administration by hand: unloading one model, pinning it for all, changing the settings of a living namespace."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    NewGate,
    NewManager,
    NewProcess,
    Process,
    Seat,
    acquire,
    copies_of,
    learn,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject, LoadsServer, Weights, served

from mpmm.cli import main
from mpmm.errors import DeadlockError, InvalidArgumentError, NotAcquiredError, UnloadTimeoutError
from mpmm.model_manager import ModelManager
from mpmm.policy.view import Reason
from mpmm.shared_state.settings import CHANGEABLE
from mpmm.shared_state.snapshot import read_snapshot

Capture = pytest.CaptureFixture[str]


def use(manager: ModelManager, tag: str, loader: Callable[[], object]) -> None:
    with manager.model(tag, loader):
        pass


def load_idle(process: Process, tag: str, loader: Callable[[], object]) -> None:
    process.call(acquire, tag, loader)
    process.call(release)


# ---- unload ----------------------------------------------------------------------------------------------------


def test_unload_ends_every_copy_wherever_it_is_and_leaves_other_models(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process()
    use(manager, "a", LoadsObject())
    load_idle(other, "a", LoadsObject())
    use(manager, "b", LoadsObject())
    assert manager.unload("a") == 2
    assert copies_of(namespace, "a") == []
    assert len(copies_of(namespace, "b")) == 1
    assert manager.unload("a") == 0
    assert manager.unload("never heard of") == 0
    gone = [event for event in read_snapshot(namespace).events if event.kind == "unload_began"]
    assert {event.reason for event in gone} == {Reason.ASKED}
    assert read_snapshot(namespace).evictions == 0
    assert problems(namespace) == []


def test_a_copy_in_use_stays_with_its_holder_and_nobody_else_gets_it(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, holder, waiter = new_manager(), new_process(), new_process()
    holder.call(acquire, "a", Loads("first"))
    assert manager.unload("a", timeout_seconds=0) == 1
    assert manager.unload("a", timeout_seconds=0) == 0
    (copy,) = copies_of(namespace, "a")
    assert (copy.state, copy.unload_on_release) == ("active", True)
    assert [e.reason for e in read_snapshot(namespace).events if e.kind == "unload_on_release"] == [Reason.ASKED]
    # There is room for another copy, so no request waits for the first one.
    waiter.call(acquire, "a", Loads("second"))
    assert [copy.unload_on_release for copy in copies_of(namespace, "a")] == [True, False]
    holder.call(release)
    wait_until(lambda: [copy.unload_on_release for copy in copies_of(namespace, "a")] == [False], "it is unloaded")
    assert problems(namespace) == []


def test_unload_waits_for_those_in_use_and_says_how_many_are_left(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, holder = new_manager(), new_process()
    holder.call(acquire, "a", LoadsObject())
    with pytest.raises(UnloadTimeoutError, match="1 of 1 copies are still there") as caught:
        manager.unload("a", timeout_seconds=0.05)
    assert (caught.value.tag, caught.value.left) == ("a", 1)
    with manager.model("b", LoadsObject()):
        with pytest.raises(DeadlockError, match="this thread itself holds"):
            manager.unload("b")
        assert not copies_of(namespace, "b")[0].unload_on_release
        assert manager.unload("b", timeout_seconds=0) == 1
    wait_until(lambda: not copies_of(namespace, "b"), "it is unloaded when the block ends")
    assert problems(namespace) == []


def test_a_copy_that_is_being_loaded_serves_its_loader_once(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_gate: NewGate
) -> None:
    manager, loader = new_manager(), new_process()
    go = new_gate()
    loader.send(acquire, "a", LoadsObject("a", go=go))
    wait_until(lambda: [copy.state for copy in copies_of(namespace, "a")] == ["loading"], "it loads")
    assert manager.unload("a", timeout_seconds=0) == 1
    go.open()
    loader.result()
    assert [(copy.state, copy.unload_on_release) for copy in copies_of(namespace, "a")] == [("active", True)]
    loader.call(release)
    wait_until(lambda: not copies_of(namespace, "a"), "it is unloaded")
    assert problems(namespace) == []


def test_a_pinned_copy_in_a_server_is_unloaded_by_one_who_joins_at_a_prompt(
    namespace: str, new_process: NewProcess, capsys: Capture
) -> None:
    process = new_process()
    load_idle(process, "a", LoadsServer("a"))
    assert main(["pin", "a"]) == 0
    assert served(copies_of(namespace, "a")[0].handle or "") is not None
    assert main(["unload", "a"]) == 0
    assert "a: 1 unloaded" in capsys.readouterr().out
    assert copies_of(namespace, "a") == []
    assert main(["unload", "a"]) == 1
    assert "no copy is loaded" in capsys.readouterr().out
    process.call(acquire, "b", Loads("b"))
    assert main(["unload", "b", "--wait", "0.01", "--namespace", namespace]) == 1
    assert "1 of 1 copies are still there" in capsys.readouterr().err
    # The guest of each command has left.
    assert [member.kind for member in read_snapshot(namespace).members] == ["worker"]
    assert problems(namespace) == []


def test_a_death_of_the_holder_unloads_what_was_to_go(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, holder = new_manager(), new_process()
    holder.call(acquire, "a", Loads("a"))
    manager.unload("a", timeout_seconds=0)
    holder.kill()
    wait_until(lambda: not copies_of(namespace, "a"), "the survivor unloads it")
    assert problems(namespace) == []


# ---- pins of the namespace --------------------------------------------------------------------------------------


def test_a_pin_for_all_outlives_its_process_and_keeps_copies_from_eviction(
    namespace: str, new_manager: NewManager, new_process: NewProcess, capsys: Capture
) -> None:
    manager, other = new_manager(fallback_memory_mb=200), new_process()
    other.call(pin_for_all, "a")
    other.call(pin_for_all, "a")
    assert [(pin.tag, pin.member) for pin in read_snapshot(namespace).pins] == [("a", None)]
    other.kill()
    use(manager, "a", Loads("a"))
    for tag in "bc":
        use(manager, tag, Loads(tag))
    assert [copy.tag for copy in read_snapshot(namespace).instances if copy.state == "idle"] == ["a", "c"]
    with pytest.raises(NotAcquiredError, match="this process has no pin"):
        manager.unpin("a")
    assert main(["unpin", "a"]) == 0
    assert main(["unpin", "a"]) == 2
    assert "has no pin on it" in capsys.readouterr().err
    assert read_snapshot(namespace).pins == ()
    assert problems(namespace) == []


def pin_for_all(seat: Seat, tag: str) -> None:
    seat.manager.pin(tag, for_all=True)


# ---- settings ---------------------------------------------------------------------------------------------------


def test_settings_change_for_all_processes_at_once(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(fallback_memory_mb=200, slack_percentage=0.0), new_process()
    learn(Seat(manager), a=150)
    assert manager.settings["slack_percentage"] == 0.0
    manager.update_settings(slack_percentage=0.5, idle_ttl_seconds=60, poll_interval=0.1)
    assert other.call(its_settings)["slack_percentage"] == 0.5
    assert read_snapshot(namespace).settings.idle_ttl_seconds == 60
    with pytest.raises(MemoryError, match=r"limit of .* is 100 MB"):
        other.call(acquire, "a", Loads("a"))
    other.call(change_settings, slack_percentage=0.1, idle_ttl_seconds=None)
    assert math.isinf(read_snapshot(namespace).settings.idle_ttl_seconds)
    use(manager, "a", Loads("a"))
    assert set(manager.settings) == set(CHANGEABLE)
    assert problems(namespace) == []


def its_settings(seat: Seat) -> dict[str, float | None]:
    found: dict[str, float | None] = seat.manager.settings
    return found


def change_settings(seat: Seat, **changes: float | None) -> None:
    seat.manager.update_settings(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slack_percentage": 2.0, "poll_interval": 0.3}, "slack_percentage=2.0: expected a fraction"),
        ({"poll_interval": None}, "poll_interval=None: expected seconds"),
        ({"min_model_copies": 1.5}, "a whole number"),
        ({"max_speed": 1}, "'max_speed': expected one of slack_percentage"),
        ({"wait_timeout_seconds": 3}, "cannot be changed at run time: it is each manager's own"),
        ({"memory_budget_mb": 3}, "slack_percentage sets the limit"),
    ],
)
def test_settings_that_cannot_be_change_nothing(
    namespace: str, new_manager: NewManager, changes: dict[str, float], said: str
) -> None:
    manager = new_manager()
    before = read_snapshot(namespace).settings
    with pytest.raises(InvalidArgumentError, match=said):
        manager.update_settings(**changes)
    assert read_snapshot(namespace).settings == before


def test_a_waiter_is_served_by_a_setting_that_changes(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, waiter = new_manager(fallback_memory_mb=200, slack_percentage=0.4), new_process()
    taken = manager.acquire_model("a", Loads("a"))
    waiter.send(acquire, "b", Loads("b"))
    wait_until(lambda: waiting(namespace, "b"), "there is no room")
    manager.update_settings(slack_percentage=0.0)
    waiter.result()
    manager.release_model("a", taken)


def test_fewer_copies_are_allowed_than_there_are(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, holder = new_manager(), new_process()
    first, second = manager.acquire_model("a", Weights), manager.acquire_model("a", Weights)
    third = manager.acquire_model("a", Weights)
    holder.call(acquire, "a", Loads("fourth"))
    manager.release_model("a", first)
    manager.update_settings(max_model_copies=2)
    assert problems(namespace) == []
    wait_until(lambda: len(copies_of(namespace, "a")) == 3, "the idle one is unloaded")
    assert sum(copy.unload_on_release for copy in copies_of(namespace, "a")) == 1
    manager.release_model("a", second)
    manager.release_model("a", third)
    wait_until(lambda: len(copies_of(namespace, "a")) == 2, "one of those in use is unloaded")
    assert problems(namespace) == []


def test_of_pinned_copies_none_is_too_many(namespace: str, new_manager: NewManager, new_process: NewProcess) -> None:
    manager, other = new_manager(), new_process()
    for tag in "ab":
        assert manager.preload(tag, Weights, copies=3) == 3
    held = manager.acquire_model("a", Weights)
    other.call(pin, "a")
    manager.update_settings(max_model_copies=1)
    wait_until(lambda: len(copies_of(namespace, "b")) == 1, "those that are not pinned are unloaded")
    manager.release_model("a", held)
    assert [copy.state for copy in copies_of(namespace, "a")] == ["idle"] * 3
    assert manager.preload("a", Weights, copies=4) == 0, "and there is no further one"
    assert problems(namespace) == []


def pin(seat: Seat, tag: str) -> None:
    seat.manager.pin(tag)


def test_settings_at_a_prompt(namespace: str, new_manager: NewManager, capsys: Capture) -> None:
    manager = new_manager(slack_percentage=0.2)
    assert main(["settings"]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert (shown["slack_percentage"], shown["max_model_copies"]) == ("0.2", "none")
    assert shown["wait_timeout_seconds"].endswith("(each manager has its own)")
    assert main(["settings", "set", "max_model_copies", "3"]) == 0
    assert main(["settings", "--namespace", namespace, "set", "slack_percentage", "0.3"]) == 0
    assert capsys.readouterr().out.splitlines() == ["max_model_copies 3", "slack_percentage 0.3"]
    assert (manager.settings["max_model_copies"], manager.settings["slack_percentage"]) == (3, 0.3)
    assert main(["settings", "set", "max_model_copies", "none"]) == 0
    assert manager.settings["max_model_copies"] is None
    assert main(["settings", "set", "default_estimate_mb", "2g"]) == 0
    assert manager.settings["default_estimate_mb"] == 2048
    for words in (["set", "slack_percentage"], ["set", "slack_percentage", "lots"], ["set", "nonsense", "1"]):
        assert main(["settings", *words]) == 2


def test_a_newcomer_and_a_pickled_manager_take_the_changed_settings_over(
    new_manager: NewManager, new_process: NewProcess, caplog: pytest.LogCaptureFixture
) -> None:
    manager = new_manager(poll_interval=0.2)
    manager.update_settings(poll_interval=0.3)
    newcomer = new_process(poll_interval=0.2)
    assert newcomer.call(its_settings)["poll_interval"] == 0.3
    assert not [record for record in caplog.records if "chosen by the creator" in record.getMessage()]


# ---- preload at a prompt ----------------------------------------------------------------------------------------


def test_a_model_is_preloaded_at_a_prompt_and_stays_when_that_ends(
    namespace: str, new_process: NewProcess, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = new_process()
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["preload", "a", "test_administration:load_in_server", "--pin"]) == 0
    assert "a: 1 loaded, pinned for all" in capsys.readouterr().out
    (copy,) = copies_of(namespace, "a")
    assert (copy.state, copy.owner) == ("idle", None)
    assert process.call(acquire, "a") == copy.handle
    process.call(release)
    assert main(["preload", "b", "test_administration:Weights"]) == 2
    assert "expected a handle" in capsys.readouterr().err
    for loader in ("nonsense", "no_such_module:f", "test_administration:nothing", "test_administration:Capture.x"):
        assert main(["preload", "b", loader]) == 2
    assert copies_of(namespace, "b") == []
    assert problems(namespace) == []


def load_in_server() -> str:
    return LoadsServer("a")()
