"""Several users of one copy at a time: seats are acquired like copies, and its memory counts once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from device import SimulatedDevice
from harness import (
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
from loaders import Loads, LoadsObject, LoadsServer, served
from patience import DEADLINE_S
from sleepers import LoadsSleeper, MakesSleeper

import mpmm.model_manager.unload as unload_module
from mpmm import AcquireTimeoutError, InvalidArgumentError, NamespaceResetError, NotAcquiredError, TableFullError
from mpmm.beam.run_inference import options_of_handler, replacements
from mpmm.cli import main
from mpmm.model_manager.unload import Unloads
from mpmm.observability.dashboard.history import Recorder
from mpmm.observability.listing import copies_of as listed
from mpmm.policy.plan import make_plan
from mpmm.policy.sharing import expected_wait_s, waiting_is_sooner
from mpmm.policy.view import (
    BusyInstance,
    DeviceView,
    Evict,
    Grant,
    IdleInstance,
    ModelView,
    Reason,
    Rules,
    TicketView,
    View,
    Wait,
)
from mpmm.shared_state.layout import MOST_USERS, Capacities
from mpmm.shared_state.snapshot import InstanceInfo, read_snapshot


def use(seat: Seat, tag: str, users: int | None = None, loader: Callable[[], Any] | None = None) -> Any:
    """Acquire and keep a copy that several may use at a time; return a handle, or an object's class."""
    copy = seat.manager.acquire_model(tag, loader or Loads(tag), users=users)
    seat.held.append((tag, copy))
    return copy if isinstance(copy, str) else type(copy).__name__


def unload(seat: Seat, tag: str) -> int:
    """Ask for an unload, and do not wait for it."""
    return int(seat.manager.unload(tag, timeout_seconds=0))


def release_first(seat: Seat) -> None:
    """Release the copy that was acquired first."""
    seat.manager.release_model(*seat.held.pop(0))


def call_served(seat: Seat, handle: str) -> int:
    """Return the pid of the server of a handle, from its object."""
    return int(served(handle).pid())


def copy_of(namespace: str, tag: str) -> InstanceInfo:
    """Return the only copy of a tag, with its seats in one."""
    (copy,) = (copy for copy in read_snapshot(namespace).copies if copy.tag == tag)
    return copy


def uses(namespace: str, tag: str = "a") -> tuple[str, int, int]:
    """Return state, users and possible users of the only copy of a tag."""
    copy = copy_of(namespace, tag)
    return copy.state, copy.held, copy.seats + 1


# ---- taking and giving back --------------------------------------------------------------------------------


def test_so_many_processes_use_one_copy_and_the_next_one_gets_the_first_seat_that_comes_free(
    namespace: str, new_process: NewProcess
) -> None:
    first, second, third, late = (new_process(max_model_copies=1) for _ in range(4))
    handle = first.call(use, "a", 3)
    assert (second.call(use, "a"), third.call(use, "a", 3)) == (handle, handle)
    late.send(use, "a", 3)
    wait_until(lambda: waiting(namespace, "a"), "all seats are taken")
    assert Reason(waiting(namespace, "a")[0].reason) == Reason.COPIES
    assert uses(namespace) == ("active", 3, 3)
    assert problems(namespace) == []
    second.call(release)
    assert late.result() == handle
    assert (model_of(namespace, "a").loads, model_of(namespace, "a").copies) == (1, 1)
    for process in (first, third, late):
        process.call(release)
    assert uses(namespace) == ("idle", 0, 3)
    assert problems(namespace) == []


def test_a_copy_has_one_user_if_nobody_says_otherwise_and_the_last_word_counts_for_the_next_load(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    seat = Seat(manager)
    use(seat, "one")
    assert [copy.seats for copy in copies_of(namespace, "one")] == [0]
    # By preload, in a block, by a decorated function, by a task.
    manager.preload("a", Loads(), users=2)
    with manager.model("b", Loads(), users=3):
        assert uses(namespace, "b") == ("active", 1, 3)
    manager.uses("c", Loads(), users=4)(lambda *, model: None)()

    async def task() -> None:
        async with manager.model_async("d", Loads(), users=5):
            pass

    asyncio.run(task())
    assert [uses(namespace, tag) for tag in "acd"] == [("idle", 0, 2), ("idle", 0, 4), ("idle", 0, 5)]
    assert manager.unload("a") == 1
    # Nobody says anything: as before.
    manager.preload("a", Loads())
    assert uses(namespace) == ("idle", 0, 2)
    assert manager.unload("a") == 1
    manager.preload("a", Loads(), users=1)
    assert uses(namespace) == ("idle", 0, 1)
    assert problems(namespace) == []


@pytest.mark.parametrize("makes", [Loads, LoadsObject], ids=["handle", "object"])
def test_two_threads_hold_one_copy_at_a_time_and_a_third_waits(
    makes: Callable[..., Loads], namespace: str, new_manager: NewManager
) -> None:
    manager, impatient = new_manager(max_model_copies=1), new_manager(wait_timeout_seconds=0.2)
    together = threading.Barrier(2)

    def hold() -> Any:
        with manager.model("a", makes(), users=2) as found:
            together.wait(DEADLINE_S)
            assert uses(namespace) == ("active", 2, 2)
            together.wait(DEADLINE_S)
            return found

    with ThreadPoolExecutor(2) as pool:
        one, other = [held.result() for held in [pool.submit(hold), pool.submit(hold)]]
    assert one is other or (makes is Loads and one == other)
    first = manager.acquire_model("a", makes())
    assert manager.acquire_model("a", makes()) == first
    with pytest.raises(AcquireTimeoutError):
        impatient.acquire_model("a", makes())
    manager.release_model("a", first)
    manager.release_model("a", first)
    with pytest.raises(NotAcquiredError):
        manager.release_model("a", first)
    assert uses(namespace) == ("idle", 0, 2)
    assert manager.unload("a") == 1
    assert copies_of(namespace, "a") == [] and getattr(first, "unloaded", True)
    # The rows of the seats are others' now.
    with manager.model("b", makes("b"), users=2) as whole, manager.model("b", makes("b")) as seat:
        assert whole == seat != first
    assert problems(namespace) == []


def test_a_task_waits_for_a_seat_like_for_a_copy(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(max_model_copies=1)
    running, most = 0, 0

    async def use_once() -> None:
        nonlocal running, most
        async with manager.model_async("a", Loads(), users=3):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.002)
            running -= 1

    async def use_all() -> None:
        async with manager.model_async("a", Loads(), users=3):
            pass
        await asyncio.gather(*(use_once() for _ in range(12)))

    asyncio.run(use_all())
    assert (most, model_of(namespace, "a").loads, uses(namespace)) == (3, 1, ("idle", 0, 3))
    assert problems(namespace) == []


# ---- memory and eviction -----------------------------------------------------------------------------------


def test_memory_is_counted_once_and_the_copy_is_evicted_once_nobody_uses_it(
    namespace: str, new_process: NewProcess
) -> None:
    first, second, other = (new_process() for _ in range(3))
    first.call(learn, a=600, big=700)
    first.call(use, "a", 2)
    second.call(use, "a", 2)
    snapshot = read_snapshot(namespace)
    assert (snapshot.devices[0].used_mb, snapshot.devices[0].committed_mb) == (600, 600)
    assert sorted(copy.mb for copy in snapshot.instances) == [0, 600]
    other.send(acquire, "big")
    wait_until(lambda: waiting(namespace, "big"), "it does not fit beside the other one")
    first.call(release)
    # Whichever of the two rows that is: the other user still has the memory.
    assert (uses(namespace), len(waiting(namespace, "big"))) == (("active", 1, 2), 1)
    assert Reason(waiting(namespace, "big")[0].reason) == Reason.IN_USE
    second.call(release)
    other.result()
    snapshot = read_snapshot(namespace)
    assert [(copy.tag, copy.mb) for copy in snapshot.instances] == [("big", 700)]
    assert (snapshot.evictions, snapshot.devices[0].used_mb) == (1, 700)
    assert problems(namespace) == []


def test_running_out_of_memory_and_keep_alive_leave_alone_what_is_in_use(
    namespace: str, new_process: NewProcess
) -> None:
    first, second = (new_process(poll_interval=0.02) for _ in range(2))
    first.call(use, "a", 2)
    second.call(use, "a", 2)
    first.call(release)
    first.call(make_room)
    assert uses(namespace) == ("active", 1, 2)
    first.call(use_shortly)
    assert uses(namespace) == ("active", 1, 2)
    second.call(release)
    wait_until(lambda: not copies_of(namespace, "a"), "nobody keeps it")
    assert problems(namespace) == []


def make_room(seat: Seat) -> None:
    """Have unloaded what is idle, as after a load that has run out of memory."""
    seat.manager._connected().out_of_memory.make_room(1)


def use_shortly(seat: Seat) -> None:
    """Use a copy that is not to be kept afterwards."""
    with seat.manager.model("a", Loads(), keep_alive_seconds=0):
        pass


SMALL = Rules(0.0, 10.0, 1, 2.0, isolate_unknown=False)


def view(idle: tuple[IdleInstance, ...], busy: tuple[BusyInstance, ...], *tickets: TicketView) -> View:
    """Return a view of a full device of 1000 MB, with model 1 of 600 MB on it; tickets are for that or model 0."""
    models = {
        0: ModelView(0, True, 700.0, 0, {}, 1),
        1: ModelView(1, True, 600.0, 1, {}, 1, users=2.0),
    }
    device = DeviceView(0, 1000.0, 600.0, 0.0, 0.0, 0.0)
    return View(100.0, SMALL, models, idle, tickets, (device,), busy=busy)


def test_a_wait_for_copies_that_several_use_is_as_much_shorter() -> None:
    ticket = TicketView(1, 1, 1, 1, 2, 99.0)
    model = ModelView(1, True, 600.0, 1, {}, 1, shares=True, load_s=2.0, hold_s=1.0)
    assert waiting_is_sooner(model, ticket, 3, 100.0) is None, "four holds take longer than a load"
    assert waiting_is_sooner(replace(model, users=4.0), ticket, 3, 100.0) == 1.0
    assert expected_wait_s(replace(model, users=4.0), 2, 3, Reason.SHARING, 0.0) == 1.0


def test_a_plan_that_gives_a_seat_away_does_not_evict_the_copy() -> None:
    copy = IdleInstance(4, 1, 0, 600.0, 50.0)
    seat = IdleInstance(5, 1, 0, 0.0, 60.0, place_in=4)
    needs_room, wants_seat = TicketView(1, 1, 1, 0, 1, 99.0, rank=1), TicketView(2, 2, 1, 1, 2, 99.0, rank=2)
    (evicts,) = make_plan(view((seat, copy), (), needs_room)).decisions
    assert isinstance(evicts, Evict) and evicts.instances == (4,)
    decisions = make_plan(view((seat, copy), (), needs_room, wants_seat)).decisions
    assert Grant(2, 5) in decisions and not any(isinstance(one, Evict) for one in decisions)
    # The wait is for memory in use by copies whose free seats are kept only for the head of the line.
    busy = BusyInstance(4, 1, 0, 600.0, 1.0)
    place = IdleInstance(4, 1, 0, 0.0, 50.0, place_in=4)
    (waits,) = make_plan(view((place,), (busy,), needs_room)).decisions
    assert isinstance(waits, Wait) and waits.reason == Reason.IN_USE
    due = TicketView(1, 1, 1, 0, 1, 90.0, head_since_s=91.0, rank=1)
    decisions = make_plan(view((place,), (busy,), due, wants_seat)).decisions
    assert not any(isinstance(one, Grant) for one in decisions)


# ---- the copy goes -----------------------------------------------------------------------------------------


def test_an_unload_that_is_asked_for_waits_for_all_users_and_nobody_else_comes_in(
    namespace: str, new_process: NewProcess
) -> None:
    first, second = (new_process(poll_interval=0.02) for _ in range(2))
    handle = first.call(use, "a", 3)
    first.call(use, "a", 3)
    second.call(use, "a", 3)
    second.call(unload, "a")
    assert [copy.unload_on_release for copy in copies_of(namespace, "a")] == [True, True, True]
    first.call(release)
    assert (uses(namespace)[1:], problems(namespace)) == ((2, 2), [])
    assert second.call(use, "a", 3) != handle, "the old copy is nobody's any more"
    first.call(release)
    second.call(release_first)
    wait_until(lambda: len(copies_of(namespace, "a")) == 3, "only the new one is left, with its seats")
    assert (uses(namespace), problems(namespace)) == (("active", 1, 3), [])
    # One whose own row is idle, and not its seat.
    handle = first.call(use, "b", 2)
    second.call(use, "b", 2)
    first.call(release)
    assert first.call(unload, "b") == 1
    assert (uses(namespace, "b"), problems(namespace)) == (("unloading", 1, 2), [])
    assert first.call(use, "b", 2) != handle
    first.call(release)
    second.kill()
    wait_until(lambda: len(copies_of(namespace, "b")) == 2, "its last user is dead, so it goes")
    assert (uses(namespace, "b"), problems(namespace)) == (("idle", 0, 2), [])


def test_the_death_of_a_user_frees_its_seat_and_only_that(namespace: str, new_process: NewProcess) -> None:
    first, second, late = (new_process(max_model_copies=1, poll_interval=0.02) for _ in range(3))
    handle = first.call(use, "a", 2)
    second.call(use, "a", 2)
    late.send(use, "a", 2)
    wait_until(lambda: waiting(namespace, "a"), "both seats are taken")
    second.kill()
    assert late.result() == handle
    assert (uses(namespace), problems(namespace)) == (("active", 2, 2), [])
    late.call(release)
    first.kill()
    wait_until(lambda: uses(namespace) == ("idle", 0, 2), "the loader's death frees the other one")
    assert problems(namespace) == []


def test_the_death_of_a_server_takes_all_seats(namespace: str, new_process: NewProcess) -> None:
    first, second = (new_process(poll_interval=0.02) for _ in range(2))
    handle = first.call(use, "a", 3, LoadsServer(f"{namespace}-served"))
    assert second.call(use, "a", 3) == handle
    (server,) = (member.pid for member in read_snapshot(namespace).members if member.kind == "server")
    assert first.call(call_served, handle) == second.call(call_served, handle) == server
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: len(copies_of(namespace, "a")) == 2, "its idle seat is gone")
    assert problems(namespace) == []
    assert second.call(use, "a", 3) != handle, "a new copy"
    first.call(release)
    second.call(release_first)
    wait_until(lambda: len(copies_of(namespace, "a")) == 3, "the lost ones are forgotten")
    assert (uses(namespace), problems(namespace)) == (("active", 1, 3), [])


def test_what_an_owner_has_goes_with_it(namespace: str, new_process: NewProcess) -> None:
    leaves, dies, other = (new_process(poll_interval=0.02) for _ in range(3))
    for number, owner in enumerate((leaves, dies), start=1):
        owner.call(use, "a", 3, LoadsObject())
        owner.call(use, "a", 3, LoadsObject())
        assert [copy.held for copy in read_snapshot(namespace).copies] == [2] * number
    assert other.call(use, "a", 2, LoadsObject()) == "Weights", "one of its own"
    leaves.call(shut_down)
    assert (len(copies_of(namespace, "a")), problems(namespace)) == (5, [])
    dies.kill()
    wait_until(lambda: len(copies_of(namespace, "a")) == 2, "only the other one's are left")
    assert (uses(namespace), problems(namespace)) == (("active", 1, 2), [])


def test_an_object_is_unloaded_once_when_its_process_leaves(new_manager: NewManager) -> None:
    manager, unloads = new_manager(), []

    class Counted:
        def unload_model(self) -> None:
            unloads.append(self)

    with manager.model("a", Counted, users=4), manager.model("a", Counted):
        pass
    manager.shutdown()
    assert len(unloads) == 1


def test_a_reset_takes_all_seats_away(namespace: str, new_process: NewProcess) -> None:
    first, second = (new_process() for _ in range(2))
    first.call(use, "a", 3)
    second.call(use, "a", 3)
    first.call(force_reset)
    wait_until(lambda: not copies_of(namespace, "a"), "all are gone")
    assert problems(namespace) == []
    for process in (first, second):
        with pytest.raises(NamespaceResetError):
            process.call(release)
    first.call(use, "a", 3)
    assert (uses(namespace), problems(namespace)) == (("active", 1, 3), [])


def test_a_suspended_copy_has_no_seats_and_gets_them_back(
    namespace: str, new_manager: NewManager, tmp_path: Path
) -> None:
    manager = new_manager(suspend_budget_mb=2000.0)
    for makes in (MakesSleeper(tmp_path), LoadsSleeper(f"{namespace}-s", MakesSleeper(tmp_path))):
        manager.preload("a", makes, users=3)
        copy = manager.acquire_model("a", makes)
        assert manager.suspend("a") == 0, "it is in use"
        manager.release_model("a", copy)
        assert manager.suspend("a") == 1
        assert (uses(namespace), problems(namespace)) == (("suspended", 0, 1), [])
        assert [manager.acquire_model("a", makes) for _ in range(3)] == [copy] * 3
        assert (uses(namespace), problems(namespace)) == (("active", 3, 3), [])
        for _ in range(3):
            manager.release_model("a", copy)
        assert manager.suspend("a") == 1 and manager.resume("a") == 1
        assert (uses(namespace), problems(namespace)) == (("idle", 0, 3), [])
        assert manager.unload("a") == 1


def test_where_two_loads_return_one_handle_its_last_user_keeps_the_memory(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    learn(Seat(manager), a=400, big=700)

    def loader() -> str:
        return "same handle"

    held = [manager.acquire_model("a", loader, users=2) for _ in range(3)]
    wait_until(lambda: model_of(namespace, "a").copies == 2, "the third one has loaded")
    snapshot = read_snapshot(namespace)
    assert (snapshot.devices[0].used_mb, problems(namespace)) == (400, [])
    for handle in held:
        manager.release_model("a", handle)
    with manager.model("big", Loads()):
        assert copies_of(namespace, "a") == []
    assert (read_snapshot(namespace).devices[0].used_mb, problems(namespace)) == (700, [])


@pytest.mark.parametrize("given_back", ["later", "meanwhile"])
def test_the_memory_and_the_server_of_twins_stay_until_the_last_seat_is_given_back(
    given_back: str, namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, ended = new_manager(), []
    learn(Seat(manager), a=400, b=400)
    monkeypatch.setattr(Unloads, "_unload_handle", lambda self, handle, slot, pid: ended.append(handle))
    own, seat, twin = (manager.model(tag, lambda: "same handle", users=2) for tag in "aab")
    for block in (own, seat, twin):
        block.__enter__()
    own.__exit__(None, None, None)
    assert manager.unload("a", timeout_seconds=0) == 1
    twin.__exit__(None, None, None)
    if given_back == "meanwhile":
        # When the twin's unload has been told that it is not the last one.
        monkeypatch.setattr(unload_module, "says_more", lambda log: end_first(seat, namespace))
    assert manager.unload("b") == 1
    if given_back == "later":
        snapshot = read_snapshot(namespace)
        assert (snapshot.devices[0].used_mb, {copy.tag for copy in snapshot.copies}) == (400, {"a"})
        assert (ended, problems(namespace)) == ([], [])
        seat.__exit__(None, None, None)
    wait_until(lambda: not copies_of(namespace, "a"), "nobody uses it")
    assert ended == ["same handle"]
    assert (read_snapshot(namespace).devices[0].used_mb, problems(namespace)) == (0, [])


def end_first(seat: Any, namespace: str) -> bool:
    """Give the seat of a model back, and return once that has been unloaded; nothing the second time."""
    if len(copies_of(namespace, "a")) == 2:
        seat.__exit__(None, None, None)
        wait_until(lambda: not copies_of(namespace, "a"), "the copy is unloaded after its last user")
    return False


# ---- the tables --------------------------------------------------------------------------------------------


def test_a_full_table_leaves_fewer_seats_and_a_load_takes_the_row_of_an_idle_one(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(capacities=Capacities(instances=4))
    first = manager.acquire_model("a", Loads(), users=MOST_USERS)
    assert manager.acquire_model("a", Loads()) == first
    assert (uses(namespace), problems(namespace)) == (("active", 2, 4), [])
    with manager.model("b", Loads(), users=2), manager.model("c", Loads(), users=2):
        assert (uses(namespace), uses(namespace, "b")) == (("active", 2, 2), ("active", 1, 1))
        assert problems(namespace) == []


def test_where_the_log_has_no_room_for_a_seat_the_load_has_not_happened(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    learn(Seat(manager), a=100)
    transaction = manager._connected().namespace.transaction()
    # So that the second or third of the seats fails, and then with enough for all.
    for words in (150, 160, 170):
        transaction._undo_capacity = words
        with pytest.raises(TableFullError, match="undo log"):
            manager.acquire_model("a", Loads(), users=4)
        assert (copies_of(namespace, "a"), problems(namespace)) == ([], [])
    transaction._undo_capacity = 1000
    manager.acquire_model("a", Loads(), users=4)
    assert uses(namespace) == ("active", 1, 4)


def test_a_limit_of_copies_counts_no_seats(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(max_model_copies=2)
    assert manager.preload("a", Loads(), copies=2, users=3) == 2
    assert manager.preload("a", Loads(), copies=5) == 0
    assert (model_of(namespace, "a").copies, model_of(namespace, "a").idle) == (2, 6)
    manager.update_settings(max_model_copies=1)
    wait_until(lambda: len(copies_of(namespace, "a")) == 3, "one of them goes, with its seats")
    assert problems(namespace) == []


def test_people_see_one_copy_and_how_many_use_it(
    namespace: str, new_manager: NewManager, capsys: pytest.CaptureFixture[str], runtime_root: Path
) -> None:
    manager = new_manager()
    with manager.model("a", Loads(), users=3), manager.model("a", Loads()):
        (shown,) = listed(read_snapshot(namespace))
        assert (shown.state, shown.held, shown.users) == ("active", 2, 3)
        for command in ("inspect", "ps"):
            assert main([command, namespace]) == 0
            assert "active, 2 of 3 users" in capsys.readouterr().out
        assert main(["metrics", namespace]) == 0
        assert 'model="a",state="active"} 1' in capsys.readouterr().out
        inspected = json.loads(as_json_text(capsys, namespace))
        assert sorted((one["held"], one["seats"]) for one in inspected["instances"]) == [(0, 0), (1, 0), (2, 2)]


def as_json_text(capsys: pytest.CaptureFixture[str], namespace: str) -> str:
    """Return what `mpmm inspect --json` says."""
    assert main(["inspect", namespace, "--json"]) == 0
    return capsys.readouterr().out


def test_the_timeline_has_a_lane_for_each_user_and_none_for_seats_that_are_free(
    new_manager: NewManager, namespace: str
) -> None:
    manager, recorder = new_manager(), Recorder(namespace, None)

    def shown(*kinds: str) -> list[tuple[int, str, bool]]:
        recorder.look()
        # Number, tag, lane, kind, begin and end.
        spans = [span for span in recorder.state("", 0, 60.0)["spans"] if span[3] in kinds]
        return sorted((span[2], span[3], span[5] is None) for span in spans)

    first, second = (manager.acquire_model("a", Loads("handle"), users=8) for _ in range(2))
    assert shown("hold", "stay") == [(1, "hold", True), (1, "stay", True), (2, "hold", True), (2, "stay", True)]
    manager.release_model("a", second)
    manager.release_model("a", first)
    assert shown("stay") == [(1, "stay", True), (2, "stay", False)]


# ---- by others' requests -----------------------------------------------------------------------------------


class Handler:
    """A model handler of Beam, as far as that matters here."""

    mpmm_users = 3


class WithRunInference:
    """Beam's module, as far as that matters here."""

    made: SimpleNamespace

    class _RunInferenceDoFn:
        def _load_model(self, side_input_model_path: Any = None) -> Any:
            return WithRunInference.made


class Wrapping:
    """A handler around another one."""

    def __init__(self, base: Any) -> None:
        self._base = base


def test_a_handler_says_how_many_use_its_model_at_a_time(namespace: str, new_manager: NewManager) -> None:
    assert options_of_handler(Wrapping(Wrapping(Handler()))) == {"users": 3}
    assert options_of_handler(Wrapping(object())) == {}
    manager = new_manager()
    transform = SimpleNamespace(
        _model=None, _model_handler=Wrapping(Handler()), _load_model_at_runtime=True, use_model_manager=True
    )
    replaced = {name: new for _, name, new in replacements(WithRunInference)}  # type: ignore[arg-type]  # as a module is
    WithRunInference.made = SimpleNamespace(models=manager, model_tag="a")
    assert replaced["_load_model"](transform) is WithRunInference.made
    # As Beam asks for it.
    handle = manager.acquire_model("a", Loads())
    assert manager.acquire_model("a", Loads()) == handle
    assert uses(namespace) == ("active", 2, 3)
    with pytest.raises(InvalidArgumentError, match="users="):
        manager.set_request_defaults("a", users=0)


@dataclass(frozen=True)
class Takes:
    """A loader that takes memory of a device, and returns a handle that any process can use."""

    device: SimulatedDevice
    mb: float

    def __call__(self) -> str:
        self.device.allocate(self.mb)
        return "handle"


def test_what_must_run_alone_is_used_by_one_until_it_is_measured(
    namespace: str, new_process: NewProcess, new_device: Callable[..., SimulatedDevice]
) -> None:
    device = new_device(1000.0)
    first, second = (new_process(monitor=None, memory_source=device) for _ in range(2))
    first.call(use, "a", 2, Takes(device, 300.0))
    assert read_snapshot(namespace).isolated is not None
    second.send(use, "a", 2)
    wait_until(lambda: waiting(namespace, "a"), "it runs alone")
    assert (uses(namespace), problems(namespace)) == (("active", 1, 2), [])
    first.call(release)
    second.result()
    assert (uses(namespace), problems(namespace)) == (("active", 1, 2), [])
    assert model_of(namespace, "a").estimate_mb == pytest.approx(300.0, abs=1.0)
