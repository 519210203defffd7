"""Models used by one thread during the use, or the load, of others: what cannot work raises an error at once."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import (
    NewDevice,
    NewGate,
    NewManager,
    NewProcess,
    Seat,
    copies_of,
    learn,
    model_of,
    problems,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject
from policy_views import A, B, model, ticket, view
from sleepers import MakesSleeper

from mpmm import ModelManager
from mpmm.errors import DeadlockError
from mpmm.model_manager.lease import Lease
from mpmm.policy.plan import make_plan
from mpmm.policy.view import BusyInstance, Load
from mpmm.shared_state.snapshot import read_snapshot


def test_a_nested_ticket_does_not_wait_to_run_alone() -> None:
    nested = replace(ticket(1, A, priority=0), nested=True)
    state = view([model(A, known=False)], [nested], busy=(BusyInstance(5, B, 0, 100, 9.0),))
    [decision] = make_plan(state).decisions
    assert isinstance(decision, Load)
    assert not decision.alone


def test_two_unknown_models_can_be_nested_where_only_the_whole_device_is_measured(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    began = time.monotonic()
    with manager.model("a", LoadsObject("a", device=device, mb=300)):
        assert read_snapshot(namespace).isolated is not None
        with manager.model("b", LoadsObject("b", device=device, mb=200)):
            assert read_snapshot(namespace).isolated is None
            assert model_of(namespace, "a").estimate_mb == 300, "measured when its thread asked for another one"
            assert problems(namespace) == []
    assert time.monotonic() - began < 10
    # The other one has not been measured alone, so it is, later.
    assert model_of(namespace, "b").estimate_mb in (None, 200)
    assert problems(namespace) == []


def test_without_blocks_too(namespace: str, new_manager: NewManager, new_device: NewDevice) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    one = manager.acquire_model("a", LoadsObject("a", device=device, mb=300))
    two = manager.acquire_model("b", LoadsObject("b", device=device, mb=200))
    assert model_of(namespace, "a").estimate_mb == 300
    manager.release_model("b", two)
    manager.release_model("a", one)
    assert problems(namespace) == []


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_loader_can_use_another_model(
    known: bool, namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    if known:
        learn(Seat(manager), outer=300, inner=200)

    def load() -> Any:
        with manager.model("inner", LoadsObject("inner", device=device, mb=200)):
            return LoadsObject("outer", device=device, mb=300)()

    with manager.model("outer", load):
        assert problems(namespace) == []
    assert (model_of(namespace, "outer").loads, model_of(namespace, "inner").loads) == (1, 1)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_loader_that_uses_its_own_tag_is_told_so_at_once(
    known: bool, namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    manager = new_manager(memory_source=new_device(1000), max_model_copies=1)
    if known:
        learn(Seat(manager), a=300)

    def load() -> Any:
        with manager.model("a", Loads("never")):
            return "handle"

    began = time.monotonic()
    with pytest.raises(DeadlockError, match="'a'") as caught:
        manager.acquire_model("a", load)
    assert time.monotonic() - began < 10
    assert (caught.value.tag, caught.value.held) == ("a", ("a",))
    assert (read_snapshot(namespace).tickets, read_snapshot(namespace).instances) == ((), ())
    assert problems(namespace) == []


def test_a_loader_that_starts_quietly_is_told_at_once_that_nothing_else_loads_meanwhile(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    refused: list[DeadlockError] = []

    def load() -> str:
        with pytest.raises(
            DeadlockError, match=r"'inner' .*outer is starting.*holds, or is loading, 'outer'"
        ) as caught:
            manager.acquire_model("inner", Loads("never"))
        refused.append(caught.value)
        return "handle"

    began = time.monotonic()
    with manager.model("outer", load, steady=True), manager.model("inner", Loads("in time")) as inner:
        assert inner.startswith("in time")
    assert time.monotonic() - began < 10
    assert [error.held for error in refused] == [("outer",)]
    assert problems(namespace) == []


#: Cases in which a quietly starting loader would wait for itself, while there is an idle copy that can be suspended.
WAITS_FOR_ITSELF: dict[str, Callable[[ModelManager], object]] = {
    "reserve": lambda manager: manager.reserve(10, name="inner"),
    "unload": lambda manager: manager.unload("idle"),
    "suspend": lambda manager: manager.suspend("idle"),
    "preload": lambda manager: manager.preload("inner", Loads("never")),
    "resume": lambda manager: manager.resume("asleep"),
}


@pytest.mark.parametrize("ask", WAITS_FOR_ITSELF.values(), ids=WAITS_FOR_ITSELF)
def test_a_loader_that_starts_quietly_and_would_have_something_come_or_go_there_is_told_at_once(
    namespace: str, new_manager: NewManager, tmp_path: Path, ask: Callable[[ModelManager], object]
) -> None:
    manager, refused = new_manager(suspend_budget_mb=2000.0), []
    for tag in ("idle", "asleep"):
        with manager.model(tag, MakesSleeper(tmp_path)):
            pass
    assert manager.suspend("asleep") == 1

    def load() -> str:
        with pytest.raises(DeadlockError, match="outer") as caught:
            ask(manager)
        refused.append(caught.value)
        return "handle"

    began = time.monotonic()
    with manager.model("outer", load, steady=True):
        assert [copy.state for tag in ("idle", "asleep") for copy in copies_of(namespace, tag)] == ["idle", "suspended"]
        assert read_snapshot(namespace).tickets == ()
    assert time.monotonic() - began < 10
    assert [error.held for error in refused] == [("outer",)]
    assert problems(namespace) == []


def test_a_loader_that_starts_quietly_may_suspend_what_has_nothing_idle_there(
    namespace: str, new_manager: NewManager, tmp_path: Path
) -> None:
    manager = new_manager(suspend_budget_mb=2000.0)
    for tag in ("asleep", "cannot"):
        with manager.model(tag, MakesSleeper(tmp_path) if tag == "asleep" else Loads()):
            pass
    assert manager.suspend("asleep") == 1

    def load() -> str:
        assert [manager.suspend(tag) for tag in ("asleep", "cannot", "unknown")] == [0, 0, 0], "nothing is waited for"
        return "handle"

    with manager.model("outer", load, steady=True):
        assert problems(namespace) == []


def prepare(seat: Seat, folder: Path) -> None:
    """Have an idle copy, and a suspended one."""
    for tag in ("idle", "asleep"):
        with seat.manager.model(tag, MakesSleeper(folder)):
            pass
    assert seat.manager.suspend("asleep") == 1


def ask_beside_own_lease(seat: Seat, how: str) -> float:
    """Ask for what a lease of the only thread of this process keeps from happening; return after how many seconds."""
    with seat.manager.reserve(100, name="quiet", steady=True):
        began = time.monotonic()
        with pytest.raises(DeadlockError, match=r"this thread itself .* lease 'quiet'") as caught:
            WAITS_FOR_ITSELF[how](seat.manager)
        assert caught.value.held == ("quiet",)
        return time.monotonic() - began


@pytest.mark.parametrize("how", WAITS_FOR_ITSELF)
def test_the_only_thread_of_a_program_is_told_at_once_that_it_has_not_settled_its_lease(
    namespace: str, new_process: NewProcess, tmp_path: Path, how: str
) -> None:
    process = new_process(suspend_budget_mb=2000.0)
    process.call(prepare, tmp_path)
    assert process.call(ask_beside_own_lease, how) < 10
    snapshot = read_snapshot(namespace)
    assert sorted(copy.state for copy in snapshot.instances) == ["idle", "suspended"] and snapshot.tickets == ()
    assert problems(namespace) == []


def ask_while_an_unload_ends(seat: Seat, how: str) -> float:
    """Ask for the same while a thread that has unloaded something is about to end."""
    unloading = threading.Thread(target=time.sleep, args=(0.3,), name="mpmm-unload")
    unloading.start()
    took = ask_beside_own_lease(seat, how)
    unloading.join()
    return took


@pytest.mark.parametrize("how", WAITS_FOR_ITSELF)
def test_a_thread_that_has_unloaded_something_and_is_about_to_end_is_no_other_thread(
    new_process: NewProcess, tmp_path: Path, how: str
) -> None:
    process = new_process(suspend_budget_mb=2000.0)
    process.call(prepare, tmp_path)
    assert process.call(ask_while_an_unload_ends, how) < 10


def ask_beside_a_lease_that_another_thread_settles(seat: Seat, how: str) -> None:
    """Ask for the same, while another thread has the lease, and settles it once this one waits."""
    namespace, lease = seat.manager.namespace, seat.manager.reserve(100, name="quiet", steady=True)

    def settle() -> None:
        leaving = ("suspending", "unloading")
        wait_until(
            lambda: waiting(namespace) or any(copy.state in leaving for copy in read_snapshot(namespace).instances),
            "the first thread waits",
        )
        lease.settled()

    settler = threading.Thread(target=settle)
    settler.start()
    made = WAITS_FOR_ITSELF[how](seat.manager)
    settler.join()
    for one in (made, lease):
        if isinstance(one, Lease):
            one.release()


@pytest.mark.parametrize("how", WAITS_FOR_ITSELF)
def test_a_lease_that_another_thread_may_settle_is_waited_for(
    namespace: str, new_process: NewProcess, tmp_path: Path, how: str
) -> None:
    process = new_process(suspend_budget_mb=2000.0)
    process.call(prepare, tmp_path)
    process.call(ask_beside_a_lease_that_another_thread_settles, how)
    assert problems(namespace) == []


def test_a_loader_that_starts_quietly_may_ask_without_waiting_or_on_another_device(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    manager = new_manager(memory_source=new_device(1000, 1000))
    learn(Seat(manager), outer=100, here=100, there=100)
    for tag, index in (("here", 0), ("there", 1)):
        manager.preload(tag, Loads(tag), devices=[index])

    def load() -> str:
        assert manager.unload("here", timeout_seconds=0) == manager.unload("there") == 1
        manager.reserve(10).release()
        return "handle"

    with manager.model("outer", load, steady=True, devices=[0]):
        wait_until(lambda: not copies_of(namespace, "here"), "it is unloaded now")
    assert problems(namespace) == []


def test_a_lease_for_which_only_its_own_copies_leave_no_room_is_told_at_once(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    learn(Seat(manager), a=700)
    with manager.model("a", Loads("a")):
        with pytest.raises(DeadlockError, match=r"lease 'inner' of 600 MB waits: .* in use") as caught:
            manager.reserve(600, name="inner")
        assert (caught.value.held, read_snapshot(namespace).tickets) == (("a",), ())
        manager.reserve(300).release()
    assert problems(namespace) == []


def test_a_loader_that_runs_alone_has_a_lease_beside_it(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)

    def load() -> str:
        assert read_snapshot(namespace).isolated is not None
        manager.reserve(100).release()
        assert read_snapshot(namespace).isolated is None
        return "handle"

    with manager.model("outer", load):
        assert problems(namespace) == []


def test_a_loader_that_starts_quietly_waits_for_another_device_to_open(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate
) -> None:
    device, began, go = new_device(1000, 1000), new_gate(), new_gate()
    manager, elsewhere = new_manager(memory_source=device), new_process(memory_source=device)
    learn(Seat(manager), outer=300, other=300, inner=300)

    def open_the_other_one() -> None:
        wait_until(lambda: waiting(namespace, "inner"), "it waits")
        go.open()

    def load() -> str:
        elsewhere.send(start_quietly, "other", Loads(began=began, go=go))
        began.wait()
        opener = threading.Thread(target=open_the_other_one)
        opener.start()
        with manager.model("inner", Loads("beside")) as inner:
            opener.join()
            return str(inner)

    with manager.model("outer", load, steady=True) as outer:
        assert outer.startswith("beside")
    elsewhere.result()
    assert problems(namespace) == []


def start_quietly(seat: Seat, tag: str, loader: Loads) -> None:
    seat.held.append((tag, seat.manager.acquire_model(tag, loader, steady=True)))


def test_nested_use_of_the_only_copy_there_may_be_is_told_at_once(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(max_model_copies=1)
    with manager.model("a", Loads("a")):
        with pytest.raises(DeadlockError, match="max_model_copies") as caught, manager.model("a", Loads("a")):
            raise AssertionError("it cannot be had")
        assert pickle.loads(pickle.dumps(caught.value)).held == ("a",)
    # It works again once it is idle.
    with manager.model("a", Loads("a")):
        assert problems(namespace) == []


def test_nested_use_of_the_only_copy_that_fits_is_told_at_once(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=1000.0)
    learn(Seat(manager), a=100)
    with manager.model("a", Loads("a")):
        # It has turned out to need more than there is, so no other one can be loaded.
        learn(Seat(manager), a=9000)
        load_s = model_of(namespace, "a").load_s
        wait_until(lambda: copies_of(namespace, "a")[0].for_s > 2 * load_s, "a wait for it is no sooner than a load")
        only = "another one would need 9000 MB, but the largest device takes only 1000"
        with pytest.raises(DeadlockError, match=only), manager.model("a", Loads("a")):
            raise AssertionError("it cannot be had")
    assert problems(namespace) == []


def test_room_that_only_its_own_copy_takes_is_told_at_once(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    learn(Seat(manager), a=700, b=600, c=200)
    with manager.model("a", Loads("a")):
        with pytest.raises(DeadlockError) as caught, manager.model("b", Loads("b")):
            raise AssertionError("it cannot be had")
        assert caught.value.held == ("a",)
        with manager.model("c", Loads("c")):
            assert problems(namespace) == []


def test_what_another_thread_holds_is_waited_for(namespace: str, new_manager: NewManager) -> None:
    manager, impatient = new_manager(max_model_copies=1), new_manager(wait_timeout_seconds=0.5)
    one = manager.acquire_model("a", Loads("a"))
    # Acquired without a block, it may be released by any thread.
    with pytest.raises(TimeoutError):
        impatient.acquire_model("a", Loads("a"))
    manager.release_model("a", one)
    assert problems(namespace) == []
