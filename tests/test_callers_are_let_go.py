"""An error keeps none of the callers alive that it went through, with no garbage collector either.

A frame that raises an exception that is in one of its variables is in the exception's traceback, so they keep each
other, and all frames up to the one that catches it: with the models, managers and loaders in their variables.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn

import pytest
from harness import NewManager
from loaders import Loads
from patience import DEADLINE_S, Stopwatch
from shared_workers import new_worker as new_worker  # the fixture
from shared_workers import path as path  # the fixture
from shared_workers import proxy as proxy  # the fixture

from mpmm.errors import (
    AcquireTimeoutError,
    ClosedError,
    InvalidArgumentError,
    LeaseTooLargeError,
    ModelTooLargeError,
    NotAcquiredError,
    SourceUnavailableError,
)
from mpmm.model_manager import ModelManager
from mpmm.sources import nvidia_smi
from mpmm.sources.timeouts import answer_within


class Kept:
    """What a caller's variable refers to."""


LetsGo = Callable[[Callable[[], object], type[BaseException]], bool]


@pytest.fixture
def lets_go() -> Iterator[LetsGo]:
    """Tells whether a caller is gone once it has caught what a call raises, although nothing collects garbage."""

    def is_gone(call: Callable[[], object], raises: type[BaseException]) -> bool:
        kept: weakref.WeakSet[Kept] = weakref.WeakSet()

        def caller() -> None:
            own = Kept()
            kept.add(own)
            try:
                call()
            except raises:
                return
            pytest.fail("nothing was raised")

        gc.collect()
        gc.disable()
        caller()
        return not kept

    yield is_gone
    gc.enable()


def test_what_a_method_in_a_server_raises(proxy: Any, lets_go: LetsGo) -> None:
    assert lets_go(proxy.raises_key_error, KeyError)


def fail() -> NoReturn:
    raise LookupError


def fail_in_use(manager: ModelManager, tag: str) -> None:
    with manager.model(tag, Loads()):
        raise LookupError


@pytest.mark.parametrize(
    ("use", "raises"),
    [
        pytest.param(lambda manager: manager.acquire_model("fails", fail), LookupError, id="load"),
        pytest.param(lambda manager: fail_in_use(manager, "b"), LookupError, id="use"),
        pytest.param(lambda manager: manager.acquire_model("used", Loads()), AcquireTimeoutError, id="wait"),
        pytest.param(
            lambda manager: manager.acquire_model("a", Loads(), expect_mb=1e9), ModelTooLargeError, id="too large"
        ),
        pytest.param(lambda manager: manager.reserve(1e9), LeaseTooLargeError, id="lease"),
        pytest.param(lambda manager: manager.reserve(999), AcquireTimeoutError, id="wait for lease"),
        pytest.param(lambda manager: manager.preload("fails", fail), LookupError, id="preload"),
        pytest.param(lambda manager: manager.release_model("a", "not held"), NotAcquiredError, id="release"),
        pytest.param(lambda manager: manager.acquire_model("\ud800", Loads()), InvalidArgumentError, id="odd tag"),
    ],
)
def test_what_a_call_of_a_manager_raises(
    new_manager: NewManager, lets_go: LetsGo, use: Callable[[ModelManager], object], raises: type[BaseException]
) -> None:
    manager = new_manager(fallback_memory_mb=1000.0, wait_timeout_seconds=0.1, max_model_copies=1)
    manager.acquire_model("used", Loads())
    assert lets_go(lambda: use(manager), raises)


async def closes(manager: ModelManager) -> None:
    task = asyncio.create_task(asyncio.to_thread(manager.shutdown))
    try:
        async with manager.model_async("used", Loads()):
            pytest.fail("it is in use")
    finally:
        await task


async def in_block(manager: ModelManager, tag: str, loader: Callable[[], Any], **options: Any) -> None:
    async with manager.model_async(tag, loader, **options):
        raise LookupError


@pytest.mark.parametrize(
    ("use", "raises"),
    [
        pytest.param(lambda manager: in_block(manager, "fails", fail), LookupError, id="load"),
        pytest.param(lambda manager: in_block(manager, "b", Loads()), LookupError, id="use"),
        pytest.param(lambda manager: in_block(manager, "used", Loads()), AcquireTimeoutError, id="wait"),
        pytest.param(
            lambda manager: in_block(manager, "a", Loads(), expect_mb=1e9), ModelTooLargeError, id="too large"
        ),
        pytest.param(closes, ClosedError, id="shutdown"),
    ],
)
def test_what_a_task_is_told(
    new_manager: NewManager, use: Callable[[ModelManager], Awaitable[None]], raises: type[BaseException]
) -> None:
    wait_s = 40.0 if raises is ClosedError else 0.1
    manager = new_manager(fallback_memory_mb=1000.0, wait_timeout_seconds=wait_s, max_model_copies=1)
    manager.acquire_model("used", Loads())

    async def main() -> None:
        kept: weakref.WeakSet[Kept] = weakref.WeakSet()

        # In one task, because a task that ends with an error keeps its frames.
        async def caller() -> None:
            own = Kept()
            kept.add(own)
            try:
                await use(manager)
            except raises:
                return
            pytest.fail("nothing was raised")

        gc.collect()
        gc.disable()
        await caller()
        # The loop, or a thread, may be about to let go of the last step.
        watch = Stopwatch()
        while kept and watch.calm_s() < 2.0:
            await asyncio.sleep(0.002)
        assert not kept

    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_what_an_unload_raises_in_a_shutdown(new_manager: NewManager, lets_go: LetsGo) -> None:
    class Ends:
        def unload_model(self) -> NoReturn:
            raise SystemExit(3)

    manager = new_manager()
    with manager.model("a", Ends):
        pass
    assert lets_go(manager.shutdown, SystemExit)


def test_what_a_call_after_a_transaction_raises(new_manager: NewManager, lets_go: LetsGo) -> None:
    namespace = new_manager()._connected().namespace

    def change() -> None:
        with namespace.transaction() as t:
            t.after += [fail, fail]

    assert lets_go(change, LookupError)


def test_what_something_fails_with_that_has_a_time_limit(lets_go: LetsGo) -> None:
    assert lets_go(lambda: answer_within(fail, DEADLINE_S, "asks"), LookupError)


def test_what_a_program_of_the_driver_fails_with(monkeypatch: pytest.MonkeyPatch, lets_go: LetsGo) -> None:
    def fail_with_status(command: list[str], *_: Any) -> NoReturn:
        raise subprocess.CalledProcessError(9, command, "no driver")

    monkeypatch.setattr(nvidia_smi, "_output", fail_with_status)
    assert lets_go(nvidia_smi.NvidiaSmiSource, SourceUnavailableError)
