"""An error keeps none of the callers alive that it went through, with no garbage collector either.

A frame that raises an exception that is in one of its variables is in the exception's traceback, so they keep each other,
and all frames up to the one that catches it: with the models, managers and loaders in their variables.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
from harness import NewManager, waiting
from loaders import Loads
from shared_workers import new_worker as new_worker  # the fixture
from shared_workers import path as path  # the fixture
from shared_workers import proxy as proxy  # the fixture

from mpmm.errors import ClosedError, SourceUnavailableError
from mpmm.sources import nvidia_smi


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


def test_the_end_of_a_wait_in_a_loop(namespace: str, new_manager: NewManager, lets_go: LetsGo) -> None:
    manager = new_manager(max_model_copies=1)
    manager.acquire_model("a", Loads())

    async def main() -> None:
        async def use() -> bool:
            # In the task itself: that a task ends with an error has it keep its frames, whoever raised it.
            kept: weakref.WeakSet[Kept] = weakref.WeakSet()

            async def caller() -> None:
                own = Kept()
                kept.add(own)
                try:
                    async with manager.model_async("a", Loads()):
                        pytest.fail("it is in use")
                except ClosedError:
                    pass

            await caller()
            return not kept

        gc.collect()
        gc.disable()
        task = asyncio.create_task(use())
        while not waiting(namespace, "a"):
            await asyncio.sleep(0.002)
        await asyncio.to_thread(manager.shutdown)
        assert await task

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

    def fails() -> NoReturn:
        raise LookupError

    def change() -> None:
        with namespace.transaction() as t:
            t.after += [fails, fails]

    assert lets_go(change, LookupError)


def test_what_a_program_of_the_driver_fails_with(monkeypatch: pytest.MonkeyPatch, lets_go: LetsGo) -> None:
    def fail(command: list[str], *_: Any) -> NoReturn:
        raise subprocess.CalledProcessError(9, command, "no driver")

    monkeypatch.setattr(nvidia_smi, "_output", fail)
    assert lets_go(nvidia_smi.NvidiaSmiSource, SourceUnavailableError)
