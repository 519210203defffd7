"""An exception at any bytecode of a call of a shared object leaves nothing behind; see `test_interrupt_points`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from interrupt_points import Points
from patience import DEADLINE_S
from payload_store import Store

from mpmm import ModelServerError
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.multi_process_shared.client import _known
from mpmm.multi_process_shared.registry import registry_for

# An exception in a finalizer, such as that of a lock file, does not reach the program; Python reports it as such.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class SharedPoints(Points):
    """The points of operations on a shared object: after each, it can be had, asked and given back again."""

    def __init__(self, step: int, spawn: bool = True) -> None:
        super().__init__(step)
        self.shared = MultiProcessShared(Store, tag="store", always_proxy=spawn, spawn_process=spawn)
        #: What else is wrong after a point.
        self.also_wrong: Callable[[], list[str]] = list

    def use(self) -> None:
        """Acquire, call, release."""
        proxy = self.shared.acquire()
        try:
            proxy.pid()
        finally:
            # An exception from the call is one of the points, and not to be followed by another.
            sys.settrace(None)
            self.shared.release(proxy)

    def go_on(self) -> None:
        """Use it, and so does another thread."""
        self.use_for_certain()
        used = threading.Event()

        def use_too() -> None:
            self.use_for_certain()
            used.set()

        threading.Thread(target=use_too, daemon=True).start()
        assert used.wait(DEADLINE_S), "another thread cannot use it"

    def use_for_certain(self) -> None:
        """Use it; its server may have been told to end by the point before."""
        try:
            self.use()
        except ModelServerError:
            # It had been told to end, which it may do at the first use as well as a moment later.
            self.use()

    def left(self) -> list[str]:
        """Return what keeps others from the tag, and what the test looks for."""
        registry = registry_for(None)
        try:
            with registry.tag_lock("store", 0.0):
                pass
        except TimeoutError as error:
            return [str(error)]
        return self.also_wrong()


@pytest.fixture
def shared(runtime_root: Path) -> Iterator[Callable[..., SharedPoints]]:
    """Makes points of a shared object, which is deleted in the end; there must not have been a failure."""
    made: list[SharedPoints] = []

    def make(step: int, **arguments: Any) -> SharedPoints:
        made.append(SharedPoints(step, **arguments))
        return made[-1]

    yield make
    for one in made:
        one.shared.unsafe_hard_delete()
        one.conclude()


@pytest.mark.parametrize("spawn", [True, False], ids=["server", "own process"])
def test_use_of_shared_object(shared: Callable[..., SharedPoints], spawn: bool) -> None:
    one = shared(11, spawn=spawn)
    # Or the object would be made anew each time.
    kept = one.shared.acquire()
    one(one.use)
    one.shared.release(kept)


def test_first_use_of_shared_object(shared: Callable[..., SharedPoints]) -> None:
    one = shared(11)
    kept = one.shared.acquire()
    one(one.use, _known.clear)
    one.shared.release(kept)


def test_large_call(shared: Callable[..., SharedPoints]) -> None:
    one = shared(23)
    proxy = one.shared.acquire()
    payload = bytes(3 << 20)

    def call() -> None:
        assert len(proxy.echo(payload)) == len(payload)

    call()
    one(call)
    one.shared.release(proxy)


def test_result_that_stays_in_the_server(shared: Callable[..., SharedPoints]) -> None:
    one = shared(11)
    proxy = one.shared.acquire()
    kept = proxy.lend()

    def wrong() -> list[str]:
        """Tell if the server keeps what an interrupted call has not received, or has dropped what came before."""
        number = proxy.number_lent()
        return [] if (number, kept.name) == (1, "lent") else [f"the server keeps {number} results"]

    one.also_wrong = wrong
    one(lambda: proxy.lend().name)
    one.also_wrong = list
    one.shared.release(proxy)


def test_start_of_server(shared: Callable[..., SharedPoints]) -> None:
    one = shared(397)
    one(one.use, one.shared.unsafe_hard_delete)


def test_end_of_server(shared: Callable[..., SharedPoints]) -> None:
    one = shared(101)
    one(one.shared.unsafe_hard_delete, one.use_for_certain)
