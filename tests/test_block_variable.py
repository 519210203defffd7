"""A variable of a block has its value inside of the block alone, whatever has ended the block."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
from interrupt_points import Interrupted, points_of

from mpmm.interpreter.block_variable import BlockVariable
from mpmm.memory.placement import Placement, current_placement, place_for_good, placed


@pytest.fixture
def variable() -> BlockVariable[str]:
    return BlockVariable("a variable")


def test_blocks_add_up_and_end(variable: BlockVariable[str]) -> None:
    assert (variable.all(), variable.innermost()) == ((), None)
    with variable.set_inside("a"):
        with pytest.raises(ValueError, match="failed"), variable.set_inside("b"):
            assert (variable.all(), variable.innermost()) == (("a", "b"), "b")
            raise ValueError("failed")
        assert (variable.all(), variable.innermost()) == (("a",), "a")
    assert (variable.all(), variable.innermost()) == ((), None)


def test_a_block_that_never_comes_to_its_end_leaves_nothing(variable: BlockVariable[str]) -> None:
    with variable.set_inside("a"):
        variable.set_inside("b").__enter__()
        assert variable.all() == ("a",)
        with variable.set_inside("c"):
            assert variable.all() == ("a", "c")
        assert variable.all() == ("a",)
    assert variable.all() == ()


def test_an_exception_at_any_bytecode_leaves_nothing(variable: BlockVariable[str]) -> None:
    def blocks() -> None:
        with variable.set_inside("a"), variable.set_inside("b"):
            assert variable.all() == ("a", "b")

    points, left = 0, []
    for at, interruption in points_of(blocks, lambda: None, 1, []):
        try:
            with interruption:
                blocks()
        except (KeyboardInterrupt, Interrupted):
            points += 1
        interruption.forget()
        if variable.all():
            left.append((at, interruption.where))
    assert left == []
    assert points > 50


def test_a_task_that_a_block_has_started_has_its_value_until_the_block_ends(variable: BlockVariable[str]) -> None:
    async def main() -> tuple[str | None, str | None]:
        seen, ended = asyncio.Event(), asyncio.Event()

        async def look() -> tuple[str | None, str | None]:
            before = variable.innermost()
            seen.set()
            await ended.wait()
            return before, variable.innermost()

        with variable.set_inside("a"):
            task = asyncio.create_task(look())
            await seen.wait()
        ended.set()
        return await task

    assert asyncio.run(main()) == ("a", None)


def test_a_value_for_good_stays_in_its_thread() -> None:
    first, second = (Placement((), ()) for _ in range(2))
    found: list[Placement | None] = []

    def serve() -> None:
        place_for_good(first)
        found.append(current_placement())
        with placed(second):
            found.append(current_placement())
        found.append(current_placement())

    thread = threading.Thread(target=contextvars.Context().run, args=(serve,))
    thread.start()
    thread.join()
    assert found[0] is first
    assert found[1] is second
    assert found[2] is first
    assert current_placement() is None
