"""Promises of half a sentence: no wait at all, shutdown by another thread, odd exceptions, forgotten managers."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from harness import NewManager, NewProcess, Seat, acquire, copies_of, learn, problems, release, wait_until
from loaders import LoadsObject
from patience import DEADLINE_S, Stopwatch

from mpmm.errors import AcquireTimeoutError, ClosedError, NotAcquiredError
from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.shared_state.layout import Capacities
from mpmm.shared_state.snapshot import find_namespaces, read_snapshot


class Thing:
    """A model that counts its unloads."""

    unloaded = 0

    def unload_model(self) -> None:
        type(self).unloaded += 1


@pytest.fixture(autouse=True)
def _counting_anew() -> None:
    Thing.unloaded = 0


# ---- a time limit of 0 --------------------------------------------------------------------------------------


def test_no_wait_gets_what_is_free(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(wait_timeout_seconds=0)
    learn(Seat(manager), a=400)
    manager.reserve(100, timeout_seconds=0).release()
    with manager.model("a", Thing) as first, manager.model("b", Thing) as second:
        assert first is not second
    with manager.model("a", Thing) as again:
        assert again is first
    assert manager.preload("d", Thing, timeout_seconds=0) == 1
    assert asyncio.run(_hold_in_loop(manager)) == "held"
    assert problems(namespace) == []


async def _hold_in_loop(manager: ModelManager) -> str:
    async with manager.model_async("c", Thing):
        return "held"


def test_no_wait_for_what_is_not_free(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(wait_timeout_seconds=0, max_model_copies=1)
    learn(Seat(manager), a=500, b=600)
    taken = manager.acquire_model("a", Thing)
    watch = Stopwatch()
    with pytest.raises(AcquireTimeoutError, match="timeout_seconds"):
        manager.reserve(600, timeout_seconds=0)
    # In a thread of its own, or it would be a deadlock.
    outcomes: list[Any] = []
    for call in (
        lambda: manager.acquire_model("a", Thing),
        lambda: manager.acquire_model("b", Thing),
        lambda: manager.preload("b", Thing, timeout_seconds=0),
        lambda: asyncio.run(_hold_b_in_loop(manager)),
    ):
        thread = threading.Thread(target=_note_outcome, args=(call, outcomes))
        thread.start()
        thread.join()
    assert outcomes == [AcquireTimeoutError] * 4
    assert watch.calm_s() < 2
    snapshot = read_snapshot(namespace)
    assert snapshot.waiting == 0
    assert [copy.state for copy in snapshot.instances] == ["active"]
    manager.release_model("a", taken)
    assert problems(namespace) == []


async def _hold_b_in_loop(manager: ModelManager) -> None:
    async with manager.model_async("b", Thing):
        pass


#: Each asks for 600 MB and waits for nothing.
UNDISTURBING: dict[str, Callable[[ModelManager], object]] = {
    "acquire_model": lambda manager: manager.acquire_model("b", Thing),
    "model_async": lambda manager: asyncio.run(_hold_b_in_loop(manager)),
    "preload": lambda manager: manager.preload("b", Thing, timeout_seconds=0),
    "reserve": lambda manager: manager.reserve(600, timeout_seconds=0),
}


@pytest.mark.parametrize("request_b", UNDISTURBING.values(), ids=UNDISTURBING)
def test_no_wait_evicts_nothing(
    namespace: str, new_manager: NewManager, request_b: Callable[[ModelManager], object]
) -> None:
    manager = new_manager(wait_timeout_seconds=0)
    learn(Seat(manager), a=500, b=600)
    with manager.model("a", Thing) as first:
        pass
    with pytest.raises(AcquireTimeoutError, match="not_free: gets nothing: idle copies of a would have to be evicted"):
        request_b(manager)
    with manager.model("a", Thing) as again:
        assert again is first
    snapshot = read_snapshot(namespace)
    assert (snapshot.waiting, snapshot.evictions, snapshot.timeouts, Thing.unloaded) == (0, 0, 1, 0)
    assert problems(namespace) == []


def test_no_wait_has_no_other_copy_of_the_model_exchanged(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(wait_timeout_seconds=0, max_model_copies=1), new_process()
    other.call(acquire, "a", LoadsObject("a"))
    other.call(release)
    with pytest.raises(AcquireTimeoutError, match="not_free: gets nothing: idle copies of a would have to be evicted"):
        manager.acquire_model("a", Thing)
    assert [copy.state for copy in copies_of(namespace, "a")] == ["idle"]
    assert problems(namespace) == []


@pytest.mark.parametrize("capacities", [Capacities(models=1), Capacities(instances=1)], ids=["models", "copies"])
@pytest.mark.parametrize("ask", ["acquire", "reserve", "preload", "preload if_free"])
def test_no_wait_makes_no_room_in_a_table(
    namespace: str, new_manager: NewManager, capacities: Capacities, ask: str
) -> None:
    manager = new_manager(wait_timeout_seconds=0, capacities=capacities)
    with manager.model("a", Thing) as first:
        pass
    if ask == "preload if_free":
        assert manager.preload("b", Thing, if_free=True) == 0
    else:
        with pytest.raises(AcquireTimeoutError, match="row in the table of"):
            if ask == "acquire":
                manager.acquire_model("b", Thing)
            elif ask == "reserve":
                manager.reserve(10, timeout_seconds=0)
            else:
                manager.preload("b", Thing, timeout_seconds=0)
    with manager.model("a", Thing) as again:
        assert again is first
    assert (read_snapshot(namespace).evictions, problems(namespace)) == (0, [])


def test_no_wait_makes_no_room_for_a_second_turn_of_a_loader(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(wait_timeout_seconds=0)
    with manager.model("a", Thing) as first:
        pass

    def fail_for_memory() -> Thing:
        raise MemoryError("no room")

    for call in (
        lambda: manager.acquire_model("b", fail_for_memory),
        lambda: manager.preload("b", fail_for_memory, if_free=True, timeout_seconds=60),
    ):
        with pytest.raises(MemoryError, match="no room"):
            call()
    with manager.model("a", Thing) as again:
        assert again is first
    assert (read_snapshot(namespace).evictions, problems(namespace)) == (0, [])


def _note_outcome(call: Callable[[], object], outcomes: list[Any]) -> None:
    try:
        outcomes.append(call())
    except BaseException as error:
        outcomes.append(type(error))


# ---- a shutdown by another thread ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["acquire_model", "preload", "model_async"])
def test_a_load_that_a_shutdown_overtakes_is_a_closed_error(new_manager: NewManager, way: str) -> None:
    manager = new_manager()
    loading, go_on = threading.Event(), threading.Event()

    def load() -> Thing:
        loading.set()
        assert go_on.wait(DEADLINE_S)
        return Thing()

    async def in_loop() -> None:
        async with manager.model_async("a", load):
            pass

    outcomes: list[Any] = []
    calls: dict[str, Callable[[], object]] = {
        "acquire_model": lambda: manager.acquire_model("a", load),
        "preload": lambda: manager.preload("a", load),
        "model_async": lambda: asyncio.run(in_loop()),
    }
    thread = threading.Thread(target=_note_outcome, args=(calls[way], outcomes))
    thread.start()
    assert loading.wait(DEADLINE_S)
    manager.shutdown()
    go_on.set()
    thread.join(DEADLINE_S)
    assert outcomes == [ClosedError]
    # No caller gets the loaded object, so it is unloaded.
    assert Thing.unloaded == 1


def test_an_error_of_the_loader_stays_its_own_while_a_shutdown_goes_on(new_manager: NewManager) -> None:
    manager = new_manager()

    def load() -> Thing:
        manager.shutdown()
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        manager.acquire_model("a", load)


def test_whatever_threads_do_at_a_shutdown_ends_with_a_closed_error(new_manager: NewManager) -> None:
    seen: Counter[str] = Counter()
    for turn in range(12):
        manager = new_manager(namespace=f"turn-{turn}")
        threads = [threading.Thread(target=_until_it_ends, args=(call, seen)) for call in _calls_without_end(manager)]
        for thread in threads:
            thread.start()
        time.sleep(0.004 * (turn % 6))
        manager.shutdown()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
    assert set(seen) <= {"ClosedError"}, seen


def _calls_without_end(manager: ModelManager) -> list[Callable[[], object]]:
    def load() -> Thing:
        time.sleep(0.0005)
        return Thing()

    def hold() -> None:
        with manager.model("held", load):
            pass

    def pin() -> None:
        manager.pin("p")
        try:
            manager.unpin("p")
        except NotAcquiredError:
            # The last one to leave has unpinned everything.
            raise ClosedError("unpinned") from None

    return [
        hold,
        lambda: manager.reserve(10).release(),
        lambda: manager.preload("p", load, copies=2),
        pin,
        lambda: (manager.tickets(), manager.all_models()),
        lambda: manager.release_model("n", manager.acquire_model("n", load)),
    ]


def _until_it_ends(call: Callable[[], object], seen: Counter[str]) -> None:
    while True:
        try:
            call()
        except BaseException as error:
            seen[f"{type(error).__name__}{'' if isinstance(error, ClosedError) else f': {error}'}"] += 1
            return


# ---- exceptions that Python itself uses ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, GeneratorExit, KeyboardInterrupt, RuntimeError])
def test_any_exception_leaves_our_blocks_as_itself(
    kind: type[BaseException], namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    raised = kind("mine")
    blocks: list[Callable[[], AbstractContextManager[Any]]] = [
        lambda: manager.model("a", Thing),
        lambda: manager.reserve(10),
        lambda: ModelManager(memory_source="booked"),
    ]
    for block in blocks:
        with pytest.raises(kind) as caught, block():
            raise raised
        assert caught.value is raised

    @manager.uses("a", Thing)
    def use(model: Thing) -> None:
        raise raised

    with pytest.raises(kind) as caught:
        use()
    assert caught.value is raised
    assert asyncio.run(_raise_in_loop(manager, raised)) is raised
    assert read_snapshot(namespace).active == 0
    assert problems(namespace) == []


async def _raise_in_loop(manager: ModelManager, error: BaseException) -> BaseException:
    try:
        async with manager.model_async("a", Thing):
            raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, GeneratorExit])
def test_any_exception_leaves_loaders_and_constructors_as_itself(
    kind: type[BaseException], namespace: str, new_manager: NewManager
) -> None:
    raised = kind("mine")

    def fail() -> Thing:
        raise raised

    manager = new_manager()
    with pytest.raises(kind) as caught:
        manager.acquire_model("a", fail)
    assert caught.value is raised
    with pytest.raises(kind) as caught:
        MultiProcessShared(fail, tag="a").acquire()
    assert caught.value is raised
    assert read_snapshot(namespace).instances == ()


def test_a_generator_that_ends_inside_a_block_gives_the_copy_back(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()

    def batches() -> Generator[int, None, None]:
        with manager.model("a", Thing), manager.reserve(10):
            yield from range(3)

    assert list(batches()) == [0, 1, 2]
    left = batches()
    next(left)
    left.close()
    assert read_snapshot(namespace).active == 0
    assert [copy.state for copy in read_snapshot(namespace).instances] == ["idle"]


# ---- managers without references ----------------------------------------------------------------------------


def test_what_is_held_outlives_its_manager(namespace: str, new_process: NewProcess) -> None:
    process = new_process()
    process.call(_hold_and_forget)
    # Nothing that the collector does takes it away.
    process.call(_collect)
    assert [copy.state for copy in read_snapshot(namespace).instances] == ["active"]
    assert process.call(_take_back) == 0
    assert [copy.state for copy in read_snapshot(namespace).instances] == ["idle"]


_forgotten: dict[str, Any] = {}


def _hold_and_forget(seat: Seat) -> None:
    assert seat.manager is not None
    _forgotten["arguments"] = {"namespace": seat.manager.namespace, "memory_source": "booked"}
    _forgotten["copy"] = seat.manager.acquire_model("a", Thing)
    seat.manager = None


def _collect(_: Seat | None = None) -> None:
    """Collect garbage, and wait until managers among it have left."""
    gc.collect()
    deadline = time.monotonic() + DEADLINE_S
    while any(thread.name == "mpmm-shutdown" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)


def _take_back(seat: Seat) -> int:
    seat.manager = ModelManager(**_forgotten.pop("arguments"))
    seat.manager.release_model("a", _forgotten.pop("copy"))
    return Thing.unloaded


def test_blocks_of_a_manager_that_only_they_refer_to(new_manager: NewManager) -> None:
    arguments: dict[str, Any] = {"namespace": "fleeting", "memory_source": "booked", "slack_percentage": 0.0}
    with ModelManager(**arguments).model("a", Thing):
        _collect()
        assert [copy.state for copy in read_snapshot("fleeting").instances] == ["active"]
    wait_until(lambda: "fleeting" not in find_namespaces(), "the manager is gone")
    with ModelManager(**arguments).reserve(900):
        _collect()
        assert [copy.state for copy in read_snapshot("fleeting").instances] == ["leased"]
    wait_until(lambda: "fleeting" not in find_namespaces(), "the manager is gone")
    asyncio.run(_hold_fleeting(arguments))
    wait_until(lambda: "fleeting" not in find_namespaces(), "the manager is gone")


async def _hold_fleeting(arguments: dict[str, Any]) -> None:
    async with ModelManager(**arguments).model_async("a", Thing):
        _collect()
        assert [copy.state for copy in read_snapshot("fleeting").instances] == ["active"]


def test_nothing_keeps_what_variables_referred_to(new_manager: NewManager) -> None:
    manager = new_manager()
    kept: list[weakref.ref[Thing]] = []

    def load() -> Thing:
        unrelated = Thing()
        kept.append(weakref.ref(unrelated))
        # The background thread, which looks at where all threads are.
        looking = threading.Thread(target=manager._connected().reconciler.reconcile)
        looking.start()
        looking.join()
        return Thing()

    gc.disable()
    try:
        with manager.model("a", load):
            # The manager's own background thread may be looking at this moment.
            wait_until(lambda: kept[0]() is None, "nothing keeps it")
    finally:
        gc.enable()
