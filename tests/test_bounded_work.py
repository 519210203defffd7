"""However much a dead process leaves behind, it is reclaimed in steps that each fit into the undo log."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading

import pytest
from harness import NewManager, NewProcess, Seat, problems, wait_until

from mpmm import Capacities, InvalidArgumentError, LoadTimeoutError, ModelManager, MpmmError
from mpmm.shared_state.layout import STEP_WORDS
from mpmm.shared_state.snapshot import read_snapshot

# The smallest log in which every single step of these tests fits, and by far not all of them together.
SHORT = Capacities(undo=2048)
MANY = 120


def hold_many(seat: Seat, count: int) -> None:
    """Hold `count` copies."""
    for number in range(count):
        seat.manager.acquire_model(f"model-{number}", lambda number=number: f"handle-{number}")


def test_the_undo_log_follows_from_the_tables() -> None:
    small = Capacities(members=8, models=8, instances=8, tickets=8, pins=8, devices=1)
    assert 2 * STEP_WORDS < small.undo < Capacities().undo
    assert Capacities(undo=4096).undo == 4096
    with pytest.raises(InvalidArgumentError, match="undo"):
        Capacities(undo=-1)


def test_a_lease_that_ends_beside_many_waiters_ends_and_all_are_served(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=SHORT, fallback_memory_mb=2000.0, slack_percentage=0.0, default_estimate_mb=1.0)
    lease = manager.reserve(2000)

    async def one(number: int) -> None:
        async with manager.model_async(f"model-{number}", lambda: f"handle-{number}"):
            pass

    async def run() -> None:
        tasks = [asyncio.create_task(one(number)) for number in range(MANY // 2)]
        while read_snapshot(namespace).waiting < len(tasks):
            await asyncio.sleep(0.02)
        await asyncio.to_thread(lease.release)
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert not lease.is_held
    assert problems(namespace) == []


def test_what_a_killed_process_held_is_taken_back_however_much_it_is(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    settings = {"capacities": SHORT, "fallback_memory_mb": 2000.0, "default_estimate_mb": 1.0}
    holder = new_process(**settings)
    holder.call(hold_many, MANY)
    new_manager(**settings)
    holder.kill()
    # In several steps, the last of which frees the row of the process.
    wait_until(lambda: [member.pid for member in read_snapshot(namespace).members] == [os.getpid()], "it is reaped", 10)
    assert all(copy.state != "active" for copy in read_snapshot(namespace).instances)
    assert problems(namespace) == []


def wait_many(seat: Seat, count: int) -> None:
    """Begin to wait for `count` models, in a thread."""

    async def wait() -> None:
        blocks = [seat.manager.model_async(f"model-{number}", str) for number in range(count)]
        await asyncio.gather(*(block.__aenter__() for block in blocks))

    threading.Thread(target=lambda: asyncio.run(wait()), daemon=True).start()


def test_a_killed_process_with_many_waiters_keeps_no_newcomer_out(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    settings = {"capacities": SHORT, "fallback_memory_mb": 2000.0, "slack_percentage": 0.0}
    manager = new_manager(**settings)
    lease = manager.reserve(2000)
    crowd = new_process(**settings)
    crowd.call(wait_many, 3 * MANY)
    wait_until(lambda: read_snapshot(namespace).waiting == 3 * MANY, "all wait")
    crowd.kill()
    new_process(**settings)
    wait_until(
        lambda: all(member.pid != crowd.pid for member in read_snapshot(namespace).members), "it is reaped at last", 10
    )
    assert not read_snapshot(namespace).tickets, "they are taken out of the queue"
    lease.release()
    assert problems(namespace) == []


def test_a_reset_of_many_copies_takes_as_many_transactions_as_it_needs(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=SHORT, fallback_memory_mb=2000.0, default_estimate_mb=1.0)
    for number in range(MANY):
        # Mypy has no type for the lambda's default.
        manager.acquire_model(f"model-{number}", lambda number=number: f"handle-{number}")  # type: ignore[misc]  # mypy has no type for a lambda's default
    manager.force_reset()
    assert read_snapshot(namespace).instances == ()
    assert problems(namespace) == []


def test_many_loads_past_their_time_limit_are_given_up(
    namespace: str, new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = new_manager(
        capacities=SHORT,
        fallback_memory_mb=2000.0,
        default_estimate_mb=1.0,
        poll_interval=0.05,
        load_timeout_seconds=600.0,
    )
    go, begun, errors = threading.Event(), list[int](), list[MpmmError]()

    def load(number: int) -> None:
        def loader() -> bool:
            begun.append(number)
            return go.wait()

        try:
            manager.acquire_model(f"model-{number}", loader)
        except MpmmError as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(number,), daemon=True) for number in range(2 * MANY)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(begun) == 2 * MANY, "all load")
    # Only now, so that the time of all of them is over at once.
    manager.update_settings(load_timeout_seconds=0.01)
    wait_until(lambda: not read_snapshot(namespace).loading, "they are given up")
    go.set()
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [LoadTimeoutError] * 2 * MANY
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert problems(namespace) == []


def test_a_lease_keeps_the_manager_that_nothing_else_refers_to(namespace: str, new_manager: NewManager) -> None:
    settings = {"namespace": namespace, "memory_source": "booked", "fallback_memory_mb": 1000.0}
    with ModelManager(**settings).reserve(800) as lease:  # type: ignore[arg-type]  # values of a dict
        gc.collect()
        assert lease.is_held
        assert lease._session.managers == 1
