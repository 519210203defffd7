"""Processes that use shared objects on a test's orders, and the objects that they share."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from counters import (
    Counter,
    SlowToConstruct,
)
from patience import DEADLINE_S, Stopwatch

from mpmm.multi_process_shared import MultiProcessShared
from mpmm.multi_process_shared.context import attach_namespace
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.registry import registry_for
from mpmm.shared_state.lock_file import LockFile

# How soon after its last client's end a server must have ended; it probes once a second.
LAST_CLIENT_S = 10.0


class Attachable:
    """An object that shares its state by itself, like a model manager."""

    attach_in_place = True
    made: ClassVar[int] = 0
    resets: ClassVar[int] = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.namespace = attach_namespace()

    def force_reset(self) -> None:
        type(self).resets += 1


class NotesThatNobodyIsLeft:
    """Notes in a file that it was called, and whether the lock is free for a process that cleans up."""

    def __init__(self, lock: Path, note: Path) -> None:
        self.lock = lock
        self.note = note

    def __call__(self) -> None:
        self.note.write_text(f"free={LockFile(self.lock).try_exclusive()}")


# What workers do; the first argument is the worker's memory.


def acquire(memory: dict[str, Any], tag: str, path: str, spawn: bool = True) -> int:
    memory[tag] = MultiProcessShared(Counter, tag, path=path, always_proxy=True, spawn_process=spawn).acquire()
    return int(memory[tag].pid())


def increment(memory: dict[str, Any], tag: str) -> int:
    return int(memory[tag].increment())


def acquire_slow(memory: dict[str, Any], constructor: SlowToConstruct, tag: str, path: str) -> int:
    return int(MultiProcessShared(constructor, tag, path=path, spawn_process=True).acquire().increment())


def attach(memory: dict[str, Any], tag: str, path: str) -> tuple[int, bool]:
    handle = MultiProcessShared(Attachable, tag, path=path, always_proxy=True)
    first, second = handle.acquire(), handle.acquire()
    return Attachable.made, first is second


def call_pickled(memory: dict[str, Any], pickled: bytes) -> int:
    return int(pickle.loads(pickled).increment())


def descriptors_left_by_a_host(memory: dict[str, Any], path: str) -> int:
    """Host an object for several threads, delete it, wait until its threads end, and count the descriptors left."""

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("mpmm-host-")]

    def use(proxy: Any) -> None:
        proxy.increment()
        gate.wait(DEADLINE_S)
        # Long enough for the host to start another thread for the next client.
        time.sleep(0.05)

    # The first object opens what a process needs once.
    shared(path, tag="another", always_proxy=True).acquire().unsafe_hard_delete()
    wait_until(lambda: not threads(), DEADLINE_S, lambda: str(threads()))
    before = len(os.listdir("/proc/self/fd"))
    proxy = shared(path, always_proxy=True).acquire()
    gate = threading.Barrier(6)
    clients = [threading.Thread(target=use, args=(proxy,)) for _ in range(gate.parties)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(DEADLINE_S)
    assert proxy.increment() == 7
    proxy.unsafe_hard_delete()
    wait_until(lambda: not threads(), DEADLINE_S, lambda: str(threads()))
    del proxy
    gc.collect()
    return len(os.listdir("/proc/self/fd")) - before


def run_forked_starter(memory: dict[str, Any], tag: str, path: str) -> int | None:
    """Let a child that multiprocessing forks start a server and leave; return its exit code."""
    child = multiprocessing.get_context("fork").Process(target=acquire, args=({}, tag, path))
    child.start()
    child.join(DEADLINE_S)
    return child.exitcode


# Its processes have imported this module when they start.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


class Client:
    """A process that follows orders until it is ordered to leave or is killed."""

    def __init__(self) -> None:
        self.ours, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_obey, args=(theirs,))
        self.process.start()
        theirs.close()

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        self.ours.send((function, args))

    def answer(self) -> Any:
        watch = Stopwatch()
        while not self.ours.poll(left_s := watch.left_s(DEADLINE_S)):
            assert left_s, "the worker does not answer"
        failed, value = self.ours.recv()
        assert not failed, value
        return value

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        self.begin(function, *args)
        return self.answer()

    def leave(self) -> int | None:
        self.ours.send(None)
        self.process.join(DEADLINE_S)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        # Not `join`, which waits for the end of a pipe that a forked child of the worker keeps open.
        wait_until(lambda: not self.process.is_alive(), DEADLINE_S, lambda: "the worker survives SIGKILL")


def _obey(theirs: Connection) -> None:
    memory: dict[str, Any] = {}
    while (order := theirs.recv()) is not None:
        function, args = order
        try:
            theirs.send((False, function(memory, *args)))
        except Exception:
            theirs.send((True, traceback.format_exc()))


@pytest.fixture
def new_worker() -> Iterator[Callable[[], Client]]:
    workers: list[Client] = []

    def make() -> Client:
        workers.append(Client())
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()
        worker.ours.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """A folder for one registry, which must be empty once this process has left the registry, too."""
    folder = tmp_path / "p"
    folder.mkdir()
    yield str(folder)
    registry = registry_for(str(folder))
    # This process would serve its own object to its end; spawned servers must end by themselves.
    if (host := find_host(registry, "it")) is not None:
        host.hard_delete()
    registry.leave()
    wait_until(lambda: not any(folder.iterdir()), LAST_CLIENT_S, lambda: f"left behind: {sorted(folder.rglob('*'))}")


def wait_until(condition: Callable[[], bool], deadline_s: float, what: Callable[[], str] = lambda: "") -> None:
    watch = Stopwatch()
    while not condition():
        assert watch.s() < deadline_s or watch.calm_s() < deadline_s, what()
        time.sleep(0.01)


def holds_for(duration_s: float, condition: Callable[[], bool]) -> bool:
    """Tell whether the condition stays true; uses real time, which is what the test is about."""
    end = time.monotonic() + duration_s
    while condition():
        if time.monotonic() >= end:
            return True
        time.sleep(0.05)
    return False


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        # An orphan's zombie stays if no init reaps it.
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def shared(path: str, tag: str = "it", constructor: Callable[[], Any] = Counter, **options: Any) -> Any:
    return MultiProcessShared(constructor, tag, path=path, **options)


# Calls.


@pytest.fixture(params=[False, True], ids=["hosted", "spawned"])
def proxy(request: pytest.FixtureRequest, path: str) -> Any:
    return shared(path, always_proxy=True, spawn_process=request.param).acquire()
