"""Models in event loops, the decorator, and pickled managers."""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from harness import (
    NewGate,
    NewManager,
    NewProcess,
    acquire,
    copies_of,
    force_reset,
    in_thread,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Gate, LoadFails, Loads, LoadsObject, Weights
from patience import DEADLINE_S, Stopwatch

from mpmm.errors import (
    AcquireTimeoutError,
    ClosedError,
    InvalidArgumentError,
    LockTimeoutError,
    ModelTooLargeError,
    NamespaceResetError,
    NoEventLoopError,
)
from mpmm.model_manager import ModelManager
from mpmm.model_manager.async_acquire import TRANSACTIONS_AT_A_TIME, AsyncAcquire, Watcher, _threads_of
from mpmm.model_manager.release import give_back_hold
from mpmm.shared_state import futex
from mpmm.shared_state.snapshot import Snapshot, read_snapshot


def run(coroutine: Any) -> Any:
    """Run a coroutine; an AssertionError if that takes long."""

    async def in_time() -> Any:
        return await asyncio.wait_for(coroutine, DEADLINE_S)

    return asyncio.run(in_time())


async def until(condition: Callable[[], object]) -> None:
    """Let others run until `condition()` is true."""
    watch = Stopwatch()
    while not condition():
        assert watch.calm_s() < DEADLINE_S
        await asyncio.sleep(0.002)


def settled(namespace: str) -> Snapshot:
    """Return the state once nobody waits, holds or loads, and assert that it is sound."""
    wait_until(
        lambda: not (s := read_snapshot(namespace, events=False)).tickets and not s.active and not s.loading,
        "nothing is going on",
    )
    assert problems(namespace) == []
    return read_snapshot(namespace)


def test_an_idle_copy_is_taken_and_given_back_by_the_loops_own_thread(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager()
    manager.preload("a", Loads())

    async def use() -> None:
        monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"{thread} was started"))
        for block in (manager.model_async("a", Loads()), manager.model_async("a", Loads(), priority=1)):
            async with block:
                assert [copy.state for copy in copies_of(namespace, "a")] == ["active"]
            assert [copy.state for copy in copies_of(namespace, "a")] == ["idle"]

    run(use())


def test_a_block_in_a_loop_begins_once(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()

    async def use() -> None:
        block = manager.model_async("a", Loads())
        async with block:
            with pytest.raises(InvalidArgumentError, match="once for each block"):
                await block.__aenter__()
        with pytest.raises(InvalidArgumentError, match="once for each block"):
            await block.__aenter__()

    run(use())
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]


@contextmanager
def lock_taken(manager: ModelManager) -> Iterator[None]:
    """The lock is taken by another thread for the length of a `with` block."""
    taken, enough = threading.Event(), threading.Event()

    def take() -> None:
        with manager._connected().namespace.transaction():
            taken.set()
            assert enough.wait(DEADLINE_S)

    thread = threading.Thread(target=take)
    thread.start()
    assert taken.wait(DEADLINE_S)
    try:
        yield
    finally:
        enough.set()
        thread.join()


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, whose coming by is nothing to wait for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# The collector closes the coroutine, whose block can await nothing then; Python reports that it tries.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_block_that_is_dropped_while_the_lock_is_taken_gives_its_copy_back(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    loop = asyncio.new_event_loop()

    async def hold() -> None:
        async with manager.model_async("a", Loads()):
            await asyncio.sleep(DEADLINE_S)

    held = loop.create_task(hold())
    loop.run_until_complete(until_held(namespace))
    loop.close()
    # So that there is one that takes the work at once.
    _threads_of(manager._connected()).transactions.submit(int).result()
    with lock_taken(manager):
        # asyncio's message about a pending task that is garbage-collected.
        held._log_destroy_pending = False  # type: ignore[attr-defined]  # private to asyncio
        del held
        gc.collect()
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]


def test_a_copy_that_could_not_be_given_back_in_time_is_answered_for_still(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    session = manager._connected()
    block: Any = manager.model("a", Loads())
    block.__enter__()
    operation = block._operation
    assert operation is not None
    held = operation.held
    assert held is not None
    with lock_taken(manager), pytest.raises(LockTimeoutError):
        give_back_hold(session, operation, held, "a", 0.01)
    session.abandon(operation)
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]


async def until_held(namespace: str) -> None:
    await until(lambda: read_snapshot(namespace, events=False).active)


@pytest.mark.parametrize("loader", [Loads, LoadsObject])
def test_a_cancelled_task_gives_back_its_own_seat(
    namespace: str, new_manager: NewManager, new_gate: NewGate, loader: type[Loads]
) -> None:
    manager, began, go = new_manager(max_model_copies=1), new_gate(), new_gate()
    entered, leave = threading.Event(), threading.Event()
    load = loader(began=began, go=go)

    async def wants() -> None:
        async with manager.model_async("a", load, users=2):
            pytest.fail("it was cancelled")

    def hold() -> None:
        with manager.model("a", load, users=2):
            entered.set()
            assert leave.wait(DEADLINE_S)

    async def main() -> None:
        task = asyncio.create_task(wants())
        await until(began.is_open)
        thread, outcome = in_thread(hold)
        go.open()
        # The loop does not hear of the end of the load meanwhile.
        assert entered.wait(DEADLINE_S)
        holds = manager._connected().held.holds
        _, kept = holds
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: len(holds) == 1)
        assert list(holds) == [kept]
        leave.set()
        await asyncio.to_thread(thread.join)
        assert outcome == [None]

    run(main())
    assert {copy.state for copy in settled(namespace).instances} == {"idle"}


def loop_of_a_task_that_waits(
    namespace: str, manager: ModelManager, loads: Loads, began: Gate
) -> tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]:
    """Return a loop that has stopped while its task waits for model a, or loads it, and the task."""

    async def wants() -> None:
        async with manager.model_async("a", loads):
            pytest.fail("its loop is closed")

    loop = asyncio.new_event_loop()
    task = loop.create_task(wants())
    loop.run_until_complete(until(lambda: waiting(namespace, "a") or began.is_open()))
    return loop, task


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("meanwhile", ["waits", "loads"])
def test_what_a_thread_has_got_for_a_task_goes_back_if_the_loop_is_closed_before_it_hears_of_it(
    namespace: str, new_manager: NewManager, new_gate: NewGate, meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, began, go = new_manager(max_model_copies=1), new_gate(), new_gate()
    held = manager.acquire_model("a", Loads()) if meanwhile == "waits" else None
    loop, task = loop_of_a_task_that_waits(namespace, manager, Loads(began=began, go=go), began)
    heard, tells = threading.Event(), loop.call_soon_threadsafe

    def hear(*arguments: Any, **options: Any) -> Any:
        told = tells(*arguments, **options)
        heard.set()
        return told

    # The loop has stopped, so what a thread tells it stays where it is.
    monkeypatch.setattr(loop, "call_soon_threadsafe", hear)
    go.open()
    if held is not None:
        manager.release_model("a", held)
    assert heard.wait(DEADLINE_S)
    loop.close()
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]
    # As above.
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # private to asyncio


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("meanwhile", ["waits", "loads"])
def test_what_a_task_gets_whose_loop_was_closed_goes_back(
    namespace: str, new_manager: NewManager, new_gate: NewGate, meanwhile: str
) -> None:
    manager, began, go = new_manager(max_model_copies=1), new_gate(), new_gate()
    held = manager.acquire_model("a", Loads()) if meanwhile == "waits" else None
    loop, task = loop_of_a_task_that_waits(namespace, manager, Loads(began=began, go=go), began)
    loop.close()
    go.open()
    if held is not None:
        manager.release_model("a", held)
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]
    # As above.
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # private to asyncio


@pytest.mark.usefixtures("uncollected")
def test_what_a_task_holds_whose_loop_was_closed_goes_back_though_no_collector_comes_by(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()

    held = asyncio.Event()

    async def holds() -> None:
        async with manager.model_async("a", Loads()):
            held.set()
            await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    task = loop.create_task(holds())
    loop.run_until_complete(held.wait())
    # As above.
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # private to asyncio
    loop.close()
    del task, loop
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]


@pytest.mark.usefixtures("uncollected")
def test_what_a_task_holds_goes_back_though_its_loop_was_closed_before_it_was_dropped(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    collected = threading.Event()

    held = asyncio.Event()

    async def holds() -> None:
        async with manager.model_async("a", Loads()):
            held.set()
            await asyncio.Event().wait()

    def note(phase: str, _: object) -> None:
        if phase == "stop":
            collected.set()

    loop = asyncio.new_event_loop()
    task = loop.create_task(holds())
    loop.run_until_complete(held.wait())
    # As above.
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # private to asyncio
    gc.callbacks.append(note)
    try:
        loop.close()
        assert collected.wait(DEADLINE_S)
    finally:
        gc.callbacks.remove(note)
    assert read_snapshot(namespace).active
    del task, loop
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]


@pytest.mark.usefixtures("uncollected")
def test_the_thread_that_has_waited_for_a_task_keeps_nothing_of_it(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpmm.model_manager.async_acquire.LINGER_S", 2 * DEADLINE_S)
    manager = new_manager(max_model_copies=1)
    others = manager.acquire_model("a", Loads())

    async def waits() -> None:
        # As if an exception had ended the block before it gave anything back.
        await manager.model_async("a", Loads()).__aenter__()

    async def main() -> None:
        task = asyncio.create_task(waits())
        await until(lambda: waiting(namespace, "a"))
        manager.release_model("a", others)
        await task

    run(main())
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]
    assert any(thread.name == "mpmm-watcher" for thread in threading.enumerate()), "it has ended already"


def test_what_is_held_after_its_loop_was_closed_is_held_as_long_as_somebody_can_give_it_back(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager()
    block = manager.model_async("a", Loads())
    collected, collect = threading.Event(), gc.collect

    def note() -> int:
        found = collect()
        collected.set()
        return found

    monkeypatch.setattr(gc, "collect", note)
    asyncio.run(block.__aenter__())
    assert collected.wait(DEADLINE_S)
    assert read_snapshot(namespace).active == 1
    asyncio.run(block.__aexit__(None, None, None))
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]


def test_what_a_cancelled_task_had_is_given_back_by_another_thread_than_the_loops(
    namespace: str, new_manager: NewManager, new_gate: NewGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, began, go = new_manager(), new_gate(), new_gate()
    undone_by = []
    undo = AsyncAcquire._undo_load

    def undo_load(acquire: AsyncAcquire, value: Any = None) -> None:
        # First, as everything may seem settled before `undo` has returned.
        undone_by.append(threading.current_thread())
        undo(acquire, value)

    monkeypatch.setattr(AsyncAcquire, "_undo_load", undo_load)

    async def wants() -> None:
        async with manager.model_async("a", Loads(began=began, go=go)):
            pytest.fail("it was cancelled")

    async def main() -> None:
        task = asyncio.create_task(wants())
        await until(began.is_open)
        go.open()
        # In the loop's thread, which does not hear of the end of the load meanwhile.
        wait_until(lambda: read_snapshot(namespace, events=False).active, "it is loaded")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert [copy.state for copy in settled(namespace).instances] == ["idle"]
    assert threading.main_thread() not in undone_by
    assert len(undone_by) == 1


def test_a_task_that_is_cancelled_while_no_thread_is_free_to_leave_the_queue_leaves_it_later(
    namespace: str, new_manager: NewManager
) -> None:
    holder = new_manager(max_model_copies=1)
    holder.acquire_model("a", Loads())
    manager = new_manager(max_model_copies=1, wait_timeout_seconds=0.2)
    transactions = _threads_of(manager._connected()).transactions
    enough = threading.Event()

    async def wants() -> None:
        async with manager.model_async("a", Loads()):
            pytest.fail("it waits")

    async def main() -> None:
        task = asyncio.create_task(wants())
        await until(lambda: waiting(namespace, "a"))
        for _ in range(TRANSACTIONS_AT_A_TIME):
            transactions.submit(enough.wait)
        await until(lambda: transactions._executor()._work_queue.qsize() == 1)
        task.cancel()
        kept = await asyncio.gather(task, return_exceptions=True)
        enough.set()
        await until(lambda: not waiting(namespace))
        assert [type(error) for error in kept] == [asyncio.CancelledError]

    run(main())


def test_a_row_that_is_watched_again_is_counted_once(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(max_model_copies=1)
    manager.acquire_model("a", Loads("handle"))
    new_process().send(acquire, "a")
    wait_until(lambda: waiting(namespace, "a"), "another process waits")
    session, row = manager._connected(), waiting(namespace, "a")[0].row
    watcher = Watcher()
    for _ in range(2):
        assert watcher.watch(session, row, float("inf"), lambda outcome: None)
    assert session._waiting
    watcher.forget(row)
    assert not session._waiting


def test_a_block_loads_holds_and_reuses(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()

    async def use() -> list[str]:
        used = []
        for _ in range(2):
            async with manager.model_async("a", Loads()) as handle:
                used.append(handle)
                assert read_snapshot(namespace).active == 1
            assert read_snapshot(namespace).active == 0
        return used

    first, second = run(use())
    assert first == second
    assert (settled(namespace).loads, settled(namespace).hits) == (1, 1)


def test_many_tasks_wait_in_few_threads(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=100, max_model_copies=1)
    served = []

    async def one(number: int) -> None:
        async with manager.model_async("a", Loads()):
            served.append(number)
            await asyncio.sleep(0)

    async def everybody() -> int:
        async with manager.model_async("a", Loads()):
            tasks = [asyncio.create_task(one(number)) for number in range(300)]
            await until(lambda: read_snapshot(namespace, events=False).waiting == 300)
            threads = threading.active_count()
        await asyncio.gather(*tasks)
        return threads

    before = threading.active_count()
    # Two for transactions, one for the load, three that watch.
    assert run(everybody()) - before <= 6
    assert sorted(served) == list(range(300))
    assert settled(namespace).loads == 1


def test_tasks_and_other_processes_hand_over_to_one_another(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(fallback_memory_mb=100), new_process()
    other.call(acquire, "a")

    async def use() -> str:
        task = asyncio.create_task(hold())
        await until(lambda: waiting(namespace, "a"))
        other.call(release)
        return await task

    async def hold() -> str:
        async with manager.model_async("a", Loads()) as handle:
            other.send(acquire, "a")
            await until(lambda: waiting(namespace, "a"))
            return str(handle)

    assert run(use()) == other.result()
    other.call(release)
    assert settled(namespace).loads == 1


def test_the_loop_goes_on_while_a_loader_runs(new_manager: NewManager, new_gate: NewGate) -> None:
    manager, began, go = new_manager(), new_gate(), new_gate()

    async def load() -> str:
        async with manager.model_async("a", Loads(began=began, go=go)) as handle:
            return str(handle)

    async def main() -> str:
        task = asyncio.create_task(load())
        await until(began.is_open)
        go.open()
        return await task

    assert run(main()).startswith("handle-")


def test_an_object_is_reused_by_its_own_process(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()

    async def use() -> list[Weights]:
        found = []
        for _ in range(2):
            async with manager.model_async("a", LoadsObject()) as model:
                found.append(model)
        return found

    first, second = run(use())
    assert first is second


def test_a_task_that_is_cancelled_leaves_the_queue(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=100)

    async def use() -> None:
        async with manager.model_async("held", Loads()):
            task = asyncio.create_task(want())
            await until(lambda: waiting(namespace, "a"))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not waiting(namespace, "a"))

    async def want() -> None:
        async with manager.model_async("a", Loads()):
            pytest.fail("it was cancelled")

    run(use())
    settled(namespace)


@pytest.mark.parametrize("steps", range(6))
def test_a_task_can_be_cancelled_at_any_await(steps: int, namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=100)

    async def want() -> None:
        async with manager.model_async("a", Loads()):
            await asyncio.sleep(0)

    async def use() -> None:
        async with manager.model_async("held", Loads()):
            waits = asyncio.create_task(want())
            for _ in range(steps):
                await asyncio.sleep(0)
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
        loads = asyncio.create_task(want())
        for _ in range(steps):
            await asyncio.sleep(0.0005)
        loads.cancel()
        await asyncio.gather(loads, return_exceptions=True)

    run(use())
    settled(namespace)


def test_a_load_goes_on_when_its_task_is_cancelled(namespace: str, new_manager: NewManager, new_gate: NewGate) -> None:
    manager, began, go = new_manager(), new_gate(), new_gate()

    async def load() -> None:
        async with manager.model_async("a", Loads(began=began, go=go)):
            pytest.fail("it was cancelled")

    async def main() -> None:
        task = asyncio.create_task(load())
        await until(began.is_open)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert read_snapshot(namespace).loading == 1
        go.open()

    run(main())
    [copy] = settled(namespace).instances
    assert copy.state == "idle"


def test_errors_arrive_as_from_acquire_model(namespace: str, new_manager: NewManager, new_process: NewProcess) -> None:
    manager, impatient = new_manager(fallback_memory_mb=100), new_manager(wait_timeout_seconds=0.2)
    manager._estimator.set_initial_estimate("huge", 500)

    async def use(tag: str, loader: Callable[[], Any], by: ModelManager = manager) -> None:
        async with by.model_async(tag, loader):
            pytest.fail("there is nothing to be had")

    with pytest.raises(OSError, match="no such file"):
        run(use("a", LoadFails()))
    with pytest.raises(ModelTooLargeError, match="'huge' needs 500 MB"):
        run(use("huge", Loads()))
    with manager.model("held", Loads()), pytest.raises(AcquireTimeoutError, match="wait_timeout_seconds"):
        run(use("a", Loads(), impatient))
    with pytest.raises(InvalidArgumentError, match="no coroutine function"):
        run(use("a", _fails_inside))  # type: ignore[arg-type]  # returns nothing
    with pytest.raises(InvalidArgumentError, match="no coroutine"), manager.model("another", _coroutine):
        pytest.fail("it was no callable")
    with pytest.raises(InvalidArgumentError, match="model tag ''"):
        run(use("", Loads()))
    with pytest.raises(ZeroDivisionError):
        run(_fails_inside(manager))
    assert settled(namespace).timeouts == 1


@pytest.mark.parametrize(
    "kind", [StopIteration, StopAsyncIteration, GeneratorExit, SystemExit, asyncio.CancelledError, RecursionError]
)
def test_whatever_a_loader_raises_ends_the_wait_for_it(
    namespace: str, new_manager: NewManager, kind: type[BaseException]
) -> None:
    """StopIteration above all, of a loader's `next()`: a future cannot carry it, and the task waited for ever."""
    manager, error = new_manager(), kind("text")

    def fail() -> Any:
        raise error

    async def use() -> None:
        async with manager.model_async("a", fail):
            pytest.fail("there is nothing to be had")

    if kind is StopIteration:
        with pytest.raises(RuntimeError, match="the loader of model 'a' raised StopIteration") as caught:
            run(use())
        assert caught.value.__cause__ is error
    else:
        # `asyncio.wait_for` tells no more of a cancelled task before Python 3.11.
        with pytest.raises(kind, match=None if kind is asyncio.CancelledError else "text"):
            run(use())
    found = settled(namespace)
    assert (found.instances, found.failed_loads) == ((), 1)


async def _coroutine() -> None:
    pytest.fail("nobody awaits a loader")


async def _fails_inside(manager: ModelManager) -> None:
    async with manager.model_async("a", Loads()):
        raise ZeroDivisionError


def test_a_reset_and_a_shutdown_end_the_wait(namespace: str, new_manager: NewManager, new_process: NewProcess) -> None:
    other = new_process(fallback_memory_mb=100)
    other.call(acquire, "held")
    manager = new_manager()

    async def want(end: Callable[[], Any]) -> None:
        async def wait() -> None:
            async with manager.model_async("a", Loads()):
                pytest.fail("there is no room")

        task = asyncio.create_task(wait())
        await until(lambda: waiting(namespace, "a"))
        end()
        await task

    with pytest.raises(NamespaceResetError):
        run(want(lambda: other.call(force_reset)))
    other.call(acquire, "held")
    watch = Stopwatch()
    with pytest.raises(ClosedError):
        run(want(manager.shutdown))
    assert watch.calm_s() < 4


def test_where_the_kernel_cannot_wait_for_several_words(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(futex, "_SYSCALL_WAITV", 100_000)
    test_many_tasks_wait_in_few_threads(namespace, new_manager)


def test_a_decorated_function_is_given_the_model(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()

    @manager.uses("a", Loads())
    def detect(image: str, *, model: str) -> tuple[str, str]:
        """Find things."""
        assert read_snapshot(namespace).active == 1
        return image, model

    @manager.uses("a", Loads(), argument="detector")
    async def detect_later(image: str, detector: str) -> tuple[str, str]:
        return image, detector

    image, handle = detect("x")
    assert run(detect_later("y")) == ("y", handle)
    assert image == "x"
    assert (detect.__name__, detect.__doc__) == ("detect", "Find things.")
    assert list(inspect.signature(detect).parameters) == ["image"]
    assert list(inspect.signature(detect_later).parameters) == ["image"]
    assert inspect.iscoroutinefunction(detect_later)
    assert settled(namespace).active == 0
    with pytest.raises(InvalidArgumentError, match="no parameter 'model'"):
        manager.uses("a", Loads())(lambda image: image)


def test_a_pickled_manager_is_one_of_the_same_namespace(new_manager: NewManager) -> None:
    manager = new_manager(idle_ttl_seconds=60)
    with pickle.loads(pickle.dumps(manager)) as copy:
        assert copy.namespace == manager.namespace
        assert copy._attachment.settings == manager._attachment.settings
        held = manager.acquire_model("a", Loads())
        manager.release_model("a", held)
        assert copy.acquire_model("a", Loads()) == held
        copy.release_model("a", held)


def test_a_loop_of_another_library_is_refused_before_anything_is_taken(new_manager: NewManager) -> None:
    manager = new_manager()
    manager.release_model("a", manager.acquire_model("a", Loads()))
    with pytest.raises(NoEventLoopError, match=r"model_async\('a'\) was entered where no event loop of asyncio runs"):
        # As a loop drives a coroutine.
        manager.model_async("a", Loads()).__aenter__().send(None)
    assert (len(manager._connected().operations), manager._connected().held.has_any) == (0, False)
