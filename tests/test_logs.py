"""The log lines about loads, evictions and long waits, and what errors say about the holders of awaited copies."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import NewManager, NewProcess, Seat, acquire, attach, learn, release, wait_until, waiting
from loaders import Loads, LoadsObject
from patience import DEADLINE_S

from mpmm import AcquireTimeoutError, sources
from mpmm.model_manager.waits import WARN_AFTER_S, WaitWarning, decision
from mpmm.shared_state.events import EventKind
from mpmm.sources.base import unavailable

Log = pytest.LogCaptureFixture


def preload(seat: Seat, tag: str) -> None:
    """Have a copy at one's disposal."""
    seat.manager.preload(tag, Loads(tag))


def wait_in_line(namespace: str, count: int) -> bool:
    """Tell whether this number of requests waits."""
    return len(waiting(namespace)) == count


def said(caplog: Log) -> list[str]:
    """Return what the log has of this package."""
    return [record.getMessage() for record in caplog.records if record.name.split(".")[0] == "mpmm"]


def test_loads_and_evictions_are_said_with_figures_and_reasons(
    namespace: str, new_manager: NewManager, caplog: Log
) -> None:
    manager, pid = new_manager(fallback_memory_mb=150.0), os.getpid()
    with caplog.at_level(logging.INFO, "mpmm"):
        manager.release_model("a", manager.acquire_model("a", LoadsObject()))
        manager.release_model("b", manager.acquire_model("b", LoadsObject()))
    lines = said(caplog)
    begin = f"mpmm {namespace}: pid {pid} "
    assert f"{begin}begins to load a, 100 MB reserved on device 0: it loads: needs 100 MB, 150 free" in lines
    [evicted] = [line for line in lines if line.startswith(f"{begin}unloads a, 100 MB: it ")]
    assert "for b, which needs 100 MB" in evicted
    assert f"{begin}unloaded a" in lines
    loaded = [line for line in lines if re.fullmatch(rf"{begin}loaded [ab] in \d+\.\d s: 100 MB on device 0", line)]
    assert [line.removeprefix(f"{begin}loaded ")[0] for line in loaded] == ["a", "b"]
    order = [lines.index(line) for line in (loaded[0], evicted, f"{begin}unloaded a", loaded[1])]
    assert order == sorted(order)


def test_what_a_reset_unloads_is_said_with_the_reason(namespace: str, new_manager: NewManager, caplog: Log) -> None:
    manager = new_manager()
    manager.release_model("a", manager.acquire_model("a", LoadsObject()))
    with caplog.at_level(logging.INFO, "mpmm"):
        manager.force_reset()
    expected = "unloads a, 100 MB: it is unloaded because `mpmm reset` or `force_reset` unloads everything"
    assert [line for line in said(caplog) if " unloads " in line] == [f"mpmm {namespace}: pid {os.getpid()} {expected}"]
    assert decision(manager._connected().namespace, EventKind.UNLOAD_BEGAN, 0).startswith("is unloaded because")
    # The next copy in the row has been told nothing yet.
    manager.acquire_model("b", LoadsObject())
    assert decision(manager._connected().namespace, EventKind.UNLOAD_BEGAN, 0) == ""


def test_a_load_that_fails_is_said(namespace: str, new_manager: NewManager, caplog: Log) -> None:
    def fails() -> object:
        raise RuntimeError("no such file")

    with caplog.at_level(logging.INFO, "mpmm"), pytest.raises(RuntimeError):
        new_manager().acquire_model("a", fails)
    expected = rf"mpmm {namespace}: pid {os.getpid()} failed to load a after \d+\.\d s: RuntimeError"
    assert any(re.fullmatch(expected, line) for line in said(caplog))


def test_the_warm_path_says_nothing(new_manager: NewManager, caplog: Log) -> None:
    manager = new_manager()
    manager.release_model("a", manager.acquire_model("a", LoadsObject()))
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "mpmm"):
        for _ in range(3):
            manager.release_model("a", manager.acquire_model("a", LoadsObject()))
    assert said(caplog) == []


def test_a_long_wait_is_said_with_its_reason_and_the_holders(
    namespace: str, new_manager: NewManager, new_process: NewProcess, caplog: Log
) -> None:
    assert WARN_AFTER_S == (5.0, 30.0, 120.0)
    manager, holder = new_manager(fallback_memory_mb=100.0), new_process()
    holder.call(acquire, "held", Loads("held"))
    # Each is later than the one before by as much as that, because those that a busy machine is late for are left out.
    manager._connected().warn_after_s = tuple(0.05 * 2**number for number in range(10))
    with caplog.at_level(logging.WARNING, "mpmm"):
        waiter = threading.Thread(target=lambda: manager.release_model("b", manager.acquire_model("b", LoadsObject())))
        waiter.start()
        try:
            wait_until(lambda: len(said(caplog)) >= 2, "it was said twice")
        finally:
            holder.call(release)
            waiter.join(DEADLINE_S)
    assert len(said(caplog)) <= 10
    for line in said(caplog):
        assert re.match(
            rf"mpmm {namespace}: pid {os.getpid()} has waited \d+ s for b, which waits: needs 100 MB, 0 free", line
        )
        assert re.search(rf" \(pid {holder.pid} holds held for \d+ s\)$", line)


def test_the_first_in_line_for_a_model_says_for_all_what_they_wait_for(
    namespace: str, new_manager: NewManager, new_process: NewProcess, caplog: Log
) -> None:
    manager, holder = new_manager(fallback_memory_mb=100.0), new_process()
    holder.call(acquire, "held", Loads("held"))
    # Nobody says a preload, so a request behind one is the first.
    early = new_process()
    early.send(preload, "b")
    wait_until(lambda: waiting(namespace, "b"), "the preload waits")
    session = manager._connected()

    def says(row: int) -> WaitWarning:
        return WaitWarning(session.namespace, session.scheduler, (600.0, 1200.0), row)

    for tag in ("b", "b", "b", "c"):
        count = len(waiting(namespace)) + 1
        new_process().send(acquire, tag, Loads(tag))
        wait_until(partial(wait_in_line, namespace, count), "one more waits")
    _, first, second, third = sorted(waiting(namespace, "b"), key=lambda ticket: ticket.number)
    [of_another] = waiting(namespace, "c")
    assert [math.ceil(says(ticket.row).in_s() / 600) for ticket in (first, second, third, of_another)] == [1, 2, 2, 1]
    for ticket in (first, of_another):
        says(ticket.row).say()
    of_b, of_c = said(caplog)
    assert re.search(rf"\(pid {holder.pid} holds held for \d+ s\); 3 more requests wait for it$", of_b)
    assert "more request" not in of_c
    # With one time only it is the last chance.
    assert WaitWarning(session.namespace, session.scheduler, (600.0,), third.row).in_s() < 600


def test_a_task_that_waits_long_is_said_too(
    namespace: str, new_manager: NewManager, new_process: NewProcess, caplog: Log
) -> None:
    manager, holder = new_manager(fallback_memory_mb=100.0), new_process()
    holder.call(acquire, "held", Loads("held"))
    manager._connected().warn_after_s = (0.05,)

    async def use() -> None:
        async with manager.model_async("b", LoadsObject()):
            pass

    async def wait() -> None:
        task = asyncio.create_task(use())
        while not said(caplog):
            await asyncio.sleep(0.01)
        holder.call(release)
        await task

    with caplog.at_level(logging.WARNING, "mpmm"):
        asyncio.run(asyncio.wait_for(wait(), DEADLINE_S))
    [line] = said(caplog)
    assert f"(pid {holder.pid} holds held for " in line


def test_a_preload_that_waits_is_no_trouble(
    namespace: str, new_manager: NewManager, new_process: NewProcess, caplog: Log
) -> None:
    manager, holder = new_manager(fallback_memory_mb=100.0), new_process()
    holder.call(acquire, "held", Loads("held"))
    manager._connected().warn_after_s = (0.05,)
    with caplog.at_level(logging.WARNING, "mpmm"), pytest.raises(AcquireTimeoutError):
        manager.preload("b", LoadsObject(), timeout_seconds=0.3)
    assert said(caplog) == []


def test_the_error_of_a_time_out_names_the_holders(namespace: str, new_process: NewProcess) -> None:
    one, other, waiter = (new_process(fallback_memory_mb=200.0) for _ in range(3))
    waiter.call(learn, c=150)
    one.call(acquire, "a", Loads("a"))
    other.call(acquire, "b", Loads("b"))
    waiter.call(attach, namespace=namespace, wait_timeout_seconds=0.1, memory_source="booked")
    with pytest.raises(AcquireTimeoutError) as caught:
        waiter.call(acquire, "c")
    for holder, tag in ((one, "a"), (other, "b")):
        assert re.search(rf"pid {holder.pid} holds {tag} for \d+ s", str(caught.value))
    assert "itself" not in str(caught.value)


def test_who_waits_for_itself_is_told_so(new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=250.0)
    manager.acquire_model("a", LoadsObject())

    def another_thread() -> None:
        with pytest.raises(AcquireTimeoutError) as caught:
            manager.reserve(200, timeout_seconds=0.1)
        errors.append(str(caught.value))

    errors: list[str] = []
    thread = threading.Thread(target=another_thread)
    thread.start()
    thread.join(DEADLINE_S)
    assert re.search(rf"this process itself has all of it: pid {os.getpid()} holds a for \d+ s", errors[0])


def test_that_there_is_no_gpu_is_said_once_for_a_namespace(
    namespace: str, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    makers = sources._makers

    def without_gpus(*arguments: Any) -> dict[str, Callable[[], Any]]:
        def none() -> Any:
            raise unavailable("nvml", "no driver")

        return {**makers(*arguments), **dict.fromkeys(("nvml", "nvidia-smi", "amdsmi"), none)}

    monkeypatch.setattr(sources, "_makers", without_gpus)
    monkeypatch.delenv(sources.SOURCE_VARIABLE, raising=False)
    log = tmp_path / "log"
    for _ in range(3):
        process = new_process(attached=False)
        process.call(log_to, log)
        process.call(attach, namespace=namespace, memory_source="auto")
        process.call(acquire, "m", Loads("m"))
        process.call(release)
    assert log.read_text().count("No GPU memory to measure (nvml: no driver; ") == 1
    assert "memory_source='host'" in log.read_text()


def log_to(seat: object, path: Path) -> None:
    """Have a process write its log into a file."""
    logging.getLogger("mpmm").addHandler(logging.FileHandler(path))
