"""An exception at the end of a load, a signal handler's say: what becomes of the object depends on its row."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from harness import NewManager, copies_of, problems, wait_until
from loaders import Weights
from patience import DEADLINE_S

from mpmm.errors import LockTimeoutError
from mpmm.model_manager import ModelManager
from mpmm.model_manager.deferred import NOW_S


class Once:
    """Stands in for a function: raises an exception at the first call for which `when()` is true, then calls it."""

    def __init__(self, function: Callable[..., Any], error: BaseException, when: Callable[[], bool]) -> None:
        self._function = function
        self._error: BaseException | None = error
        self._when = when

    @property
    def has_raised(self) -> bool:
        """Tell whether the exception has come."""
        return self._error is None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise the exception, or call the function."""
        if self._error is not None and self._when():
            error, self._error = self._error, None
            raise error
        return self._function(*args, **kwargs)


class LoadsWeights:
    """A loader of objects that remembers them, weakly, and which of them were told to unload."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Weights]] = []
        self.unloaded: list[int] = []

    def __call__(self) -> Weights:
        """Return a new object."""
        number = len(self.made)
        unloaded = self.unloaded

        class Remembered(Weights):
            def unload_model(self) -> None:
                unloaded.append(number)
                super().unload_model()

        weights = Remembered("a")
        self.made.append(weakref.ref(weights))
        return weights

    def are_gone(self) -> bool:
        """Tell whether none of the objects lives."""
        gc.collect()
        return all(made() is None for made in self.made)


def acquire(manager: ModelManager, loads: Callable[[], Any]) -> None:
    manager.acquire_model("a", loads)


def preload(manager: ModelManager, loads: Callable[[], Any]) -> None:
    manager.preload("a", loads)


def enter(manager: ModelManager, loads: Callable[[], Any]) -> None:
    with manager.model("a", loads):
        raise AssertionError("the exception comes before the block")


def enter_in_loop(manager: ModelManager, loads: Callable[[], Any]) -> None:
    async def hold() -> None:
        async with manager.model_async("a", loads):
            raise AssertionError("the exception comes before the block")

    asyncio.run(asyncio.wait_for(hold(), DEADLINE_S))


WAYS = pytest.mark.parametrize("way", [acquire, preload, enter, enter_in_loop])
Way = Callable[[ModelManager, Callable[[], Any]], None]


# Exceptions of signal handlers do not reach the threads of event loops, but others may.
@pytest.mark.parametrize(
    ("error", "limit_s"),
    [(InterruptedError, None), (InterruptedError, 600.0), (MemoryError, None)],
    ids=["error", "error with a time limit", "out of memory"],
)
@WAYS
def test_an_object_whose_load_was_recorded_before_an_exception_is_idle_and_never_told_to_unload(
    way: Way,
    error: type[Exception],
    limit_s: float | None,
    namespace: str,
    new_manager: NewManager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = new_manager(**({} if limit_s is None else {"load_timeout_seconds": limit_s}))
    loads = LoadsWeights()
    report = Once(lambda *_: None, error(), lambda: True)
    monkeypatch.setattr("mpmm.model_manager.load.report_model_count", report)
    with pytest.raises(error):
        way(manager, loads)
    wait_until(lambda: [copy.state for copy in copies_of(namespace, "a")] == ["idle"], "the copy is idle")
    with manager.model("a", loads) as copy:
        assert not copy.unloaded
    assert (loads.unloaded, len(loads.made)) == ([], 1)
    assert problems(namespace) == []


def interrupt_recording(manager: ModelManager, monkeypatch: pytest.MonkeyPatch) -> Once:
    """Have an exception end the next transaction that records an object, which is thereby undone."""
    session = manager._connected()
    advance = Once(session.scheduler.advance, InterruptedError(), lambda: session.held.has_any)
    monkeypatch.setattr(session.scheduler, "advance", advance)
    return advance


@WAYS
def test_an_object_whose_record_was_undone_is_unloaded_and_not_kept(
    way: Way, namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, loads = new_manager(), LoadsWeights()
    interrupt_recording(manager, monkeypatch)
    with pytest.raises(InterruptedError):
        way(manager, loads)
    assert loads.unloaded == [0]
    wait_until(lambda: not copies_of(namespace, "a"), "the row is free")
    wait_until(loads.are_gone, "nothing keeps the object")
    session = manager._connected()
    assert (session.owned.all(), session.held.has_any) == ([], False)
    with manager.model("a", loads) as copy:
        assert not copy.unloaded
    assert problems(namespace) == []


def test_an_object_is_not_kept_if_an_exception_comes_while_it_is_recorded(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, loads = new_manager(), LoadsWeights()
    owned = manager._connected().owned
    monkeypatch.setattr(owned, "add_seats", Once(owned.add_seats, KeyboardInterrupt(), lambda: True))
    with pytest.raises(KeyboardInterrupt):
        manager.acquire_model("a", loads)
    assert loads.unloaded == [0]
    wait_until(loads.are_gone, "nothing keeps the object")
    assert (owned.all(), copies_of(namespace, "a")) == ([], [])


def raise_again(manager: ModelManager, monkeypatch: pytest.MonkeyPatch, undone: Once) -> None:
    """Have a second exception come as soon as the first one is handled."""
    held = manager._connected().held
    monkeypatch.setattr(held, "is_loaded", Once(held.is_loaded, KeyboardInterrupt(), lambda: undone.has_raised))


def refuse_the_lock(manager: ModelManager, monkeypatch: pytest.MonkeyPatch, undone: Once) -> None:
    """Have the lock be taken for too long as soon as the first exception is handled."""
    namespace = manager._connected().namespace
    transaction = namespace.transaction

    def refuse(timeout_s: float | None = None) -> Any:
        if undone.has_raised and timeout_s == NOW_S and not refused:
            refused.append(timeout_s)
            raise LockTimeoutError("taken", path="", timeout_seconds=NOW_S, holder_pid=0)
        return transaction(timeout_s)

    refused: list[float] = []
    monkeypatch.setattr(namespace, "transaction", refuse)


@pytest.mark.parametrize("trouble", [raise_again, refuse_the_lock])
def test_what_a_call_cannot_unload_itself_after_an_exception_is_unloaded_by_a_thread(
    trouble: Callable[[ModelManager, pytest.MonkeyPatch, Once], None],
    namespace: str,
    new_manager: NewManager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager, loads = new_manager(), LoadsWeights()
    trouble(manager, monkeypatch, interrupt_recording(manager, monkeypatch))
    with suppress(InterruptedError, KeyboardInterrupt):
        manager.acquire_model("a", loads)
        raise AssertionError("no exception")
    wait_until(lambda: not copies_of(namespace, "a"), "the row is free")
    wait_until(lambda: loads.unloaded == [0], "it is told to unload, once")
    wait_until(loads.are_gone, "nothing keeps the object")
    assert (manager._connected().owned.all(), problems(namespace)) == ([], [])


def test_an_object_that_another_thread_unloads_meanwhile_is_not_told_twice(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, loads = new_manager(), LoadsWeights()

    def reset(*_: object) -> bool:
        manager.force_reset()
        wait_until(lambda: not copies_of(namespace, "a"), "another thread has unloaded it")
        return True

    report = Once(lambda *_: None, KeyboardInterrupt(), reset)
    monkeypatch.setattr("mpmm.model_manager.load.report_model_count", report)
    with pytest.raises(KeyboardInterrupt):
        manager.acquire_model("a", loads)
    wait_until(loads.are_gone, "nothing keeps the object")
    assert (loads.unloaded, problems(namespace)) == ([0], [])
