"""Calls from signal handlers and finalizers, in the middle of other calls of the same thread."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import call_in_thread, files_in, returned_frame, segments_of, wait_until

from mpmm import ReentrantCallError
from mpmm.interpreter.thread_frames import innermost_frames
from mpmm.model_manager import ModelManager
from mpmm.model_manager.operations import Operation, ended_calls
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.snapshot import read_snapshot

# Prints how each child ended that was sent a signal at some moment of its loop.
SHUTS_DOWN_ON_SIGTERM = """
import os, random, signal, sys, time
from mpmm import ModelManager

def on_sigterm(number, frame):
    manager.shutdown()
    sys.exit(0)

children = {}
for _ in range(10):
    ready, says_ready = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ready)
        manager = ModelManager(
            namespace="test", memory_source="booked", fallback_memory_mb=1000.0, default_estimate_mb=100.0
        )
        signal.signal(signal.SIGTERM, on_sigterm)
        os.write(says_ready, b"1")
        os.close(says_ready)
        while True:
            tag = f"tag-{random.randrange(4)}"
            manager.release_model(tag, manager.acquire_model(tag, lambda: f"handle-{random.random()}"))
    os.close(says_ready)
    children[pid] = ready
for ready in children.values():
    os.read(ready, 1)
for pid in children:
    time.sleep(random.uniform(0.0, 0.02))
    os.kill(pid, signal.SIGTERM)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


@pytest.mark.parametrize("options", [[], ["-O"]], ids=["python", "python -O"])
def test_shutdown_by_signal_handler(runtime_root: Path, options: list[str]) -> None:
    for _ in range(2):
        command = [sys.executable, *options, "-c", SHUTS_DOWN_ON_SIGTERM]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr) == (f"{[0] * 10}\n", "")
        assert not segments_of(runtime_root)
        assert not files_in(runtime_root)


class GivesBack:
    """Garbage that gives a copy back when it is collected, as people write it for what they hold in a cache."""

    def __init__(self, manager: ModelManager, tag: str, copy: Any) -> None:
        self.itself = self
        self._manager, self._tag, self._copy = manager, tag, copy

    def __del__(self) -> None:
        self._manager.release_model(self._tag, self._copy)


def test_finalizers_give_copies_back(new_manager: Callable[..., ModelManager], monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    manager = new_manager(fallback_memory_mb=3200.0)
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for number in range(60):
            tag = f"tag-{number % 5}"
            copy = manager.acquire_model(tag, partial("handle-{}".format, number))
            GivesBack(manager, tag, copy)
            with manager.model("other", lambda: "other"):
                pass
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    wait_until(lambda: not read_snapshot("test").active, "all were given back", 5)
    assert not failed
    assert check_invariants(read_snapshot("test")) == []


def in_the_middle(manager: ModelManager, call: Callable[[], Any]) -> Any:
    """Return what a call in a signal handler returns, or raises, in the middle of a transaction of its thread."""
    outcome: list[Any] = []

    def on_signal(number: int, frame: Any) -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with manager._connected().namespace.transaction():
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: outcome, "the handler has run")
    finally:
        signal.signal(signal.SIGUSR1, before)
    return outcome[0]


def test_what_gives_back_works_in_the_middle_of_a_transaction(new_manager: Callable[..., ModelManager]) -> None:
    manager = new_manager()
    copy = manager.acquire_model("a", lambda: "handle")
    lease = manager.reserve(100)
    manager.pin("a")
    assert in_the_middle(manager, lambda: manager.release_model("a", copy)) is None
    assert in_the_middle(manager, lease.release) is None
    assert in_the_middle(manager, lambda: manager.unpin("a")) is None

    def is_back() -> bool:
        snapshot = read_snapshot("test")
        return [i.state for i in snapshot.instances] == ["idle"] and not snapshot.pins

    wait_until(is_back, "all is given back", 2)


def test_block_ends_in_the_middle_of_a_transaction(new_manager: Callable[..., ModelManager]) -> None:
    manager = new_manager()
    block = manager.model("a", lambda: "handle")
    block.__enter__()
    assert in_the_middle(manager, lambda: block.__exit__(None, None, None)) is None
    wait_until(lambda: not read_snapshot("test").active, "it is given back", 2)


def test_other_calls_are_refused_in_the_middle_of_a_transaction(new_manager: Callable[..., ModelManager]) -> None:
    manager = new_manager()
    manager.acquire_model("a", lambda: "handle")
    calls: list[Callable[[], Any]] = [
        lambda: manager.acquire_model("a", lambda: "handle"),
        lambda: manager.model("a", lambda: "handle").__enter__(),
        lambda: manager.reserve(100),
        lambda: manager.preload("b", lambda: "handle of b"),
        lambda: manager.pin("a"),
        lambda: manager.tickets(),
        lambda: manager.all_models(),
    ]
    for call in calls:
        refused = in_the_middle(manager, call)
        assert isinstance(refused, ReentrantCallError), refused
        assert "signal handler" in str(refused)
    assert check_invariants(read_snapshot("test")) == []
    assert not read_snapshot("test").tickets


def test_shutdown_in_the_middle_of_a_transaction_waits_for_its_end(new_manager: Callable[..., ModelManager]) -> None:
    manager = new_manager()
    assert in_the_middle(manager, manager.shutdown) is None
    wait_until(lambda: not any(t.name == "mpmm-shutdown" for t in threading.enumerate()), "it has left", 5)
    assert manager._attachment.session is None


def test_a_call_whose_thread_goes_on_during_the_look_at_it_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with call_in_thread() as (frame, thread):
        operation = Operation(frame)
        operation.thread = thread
        # A function that the thread was in when its stack was taken, and has left since.
        looks = iter([{thread: returned_frame()}])
        with monkeypatch.context() as patched:
            patched.setattr(
                "mpmm.model_manager.operations.innermost_frames",
                lambda threads: next(looks, None) or innermost_frames(threads),
            )
            assert ended_calls({operation}) == []
    assert ended_calls({operation}) == [operation]
