"""Shared objects between real processes: releases, hard deletes, unloads, and objects that attach."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counters import (
    SlowToConstruct,
)
from harness import stop_process
from patience import DEADLINE_S
from shared_workers import Attachable, Client, acquire, acquire_slow, attach, is_running, shared
from shared_workers import new_worker as new_worker  # the fixture
from shared_workers import path as path  # the fixture
from shared_workers import proxy as proxy  # the fixture

from mpmm.errors import (
    ModelServerError,
    NotAcquiredError,
    SharedObjectReleasedError,
)
from mpmm.multi_process_shared import server_pid, unload
from mpmm.multi_process_shared.context import namespace_of
from mpmm.multi_process_shared.registry import registry_for

# Releases and deletes.


def test_the_last_release_drops_the_object_but_not_the_server(path: str) -> None:
    handle = shared(path, spawn_process=True)
    first, second = handle.acquire(), handle.acquire()
    pid = first.pid()
    first.increment()
    handle.release(first)
    with pytest.raises(SharedObjectReleasedError, match="released"):
        first.increment()
    with pytest.raises(SharedObjectReleasedError):
        handle.release(first)
    assert second.increment() == 2
    handle.release(second)
    third = handle.acquire()
    assert (third.increment(), third.pid()) == (1, pid)


@pytest.mark.parametrize("always_proxy", [False, True])
def test_releasing_after_a_hard_delete_is_no_error(path: str, always_proxy: bool) -> None:
    handle = shared(path, always_proxy=always_proxy)
    proxy = handle.acquire()
    handle.unsafe_hard_delete()
    with pytest.raises(ModelServerError, match=r"deleted|gone|ended"):
        proxy.increment()
    handle.release(proxy)
    with pytest.raises(SharedObjectReleasedError):
        proxy.increment()
    with pytest.raises(SharedObjectReleasedError):
        handle.release(proxy)


def test_a_released_proxy_says_so_whatever_it_is_asked_for(proxy: Any, path: str) -> None:
    shared(path).release(proxy)
    for name in ("increment", "no_such_method"):
        with pytest.raises(SharedObjectReleasedError):
            getattr(proxy, name)


def test_releasing_something_else_is_refused(path: str) -> None:
    with pytest.raises(NotAcquiredError, match="it"):
        shared(path).release(object())


def test_a_hard_delete_of_nothing_does_nothing(path: str) -> None:
    shared(path).unsafe_hard_delete()
    assert server_pid("it", path=path) is None
    assert not unload("it", path=path)


def test_a_hard_delete_through_an_old_proxy_leaves_the_next_object_alone(path: str) -> None:
    old = shared(path, always_proxy=True).acquire()
    shared(path).unsafe_hard_delete()
    new = shared(path, always_proxy=True).acquire()
    assert new.increment() == 1
    old.unsafe_hard_delete()
    assert new.increment() == 2
    with pytest.raises(ModelServerError):
        old.increment()


def test_unload_returns_when_the_server_is_gone(proxy: Any, path: str) -> None:
    pid = proxy.pid()
    assert server_pid("it", path=path) == pid
    assert unload("it", path=path)
    assert pid == os.getpid() or not is_running(pid)
    assert server_pid("it", path=path) is None
    assert {entry.name for entry in registry_for(path).path.iterdir()} - {"zygote"} == {"alive.lock", "key"}
    assert not unload("it", path=path)
    with pytest.raises(ModelServerError):
        proxy.increment()


def test_unload_reaches_an_object_that_another_process_serves(path: str, new_worker: Callable[[], Client]) -> None:
    worker = new_worker()
    assert worker.do(acquire, "it", path, False) == server_pid("it", path=path)
    assert unload("it", path=path)
    assert server_pid("it", path=path) is None
    assert worker.do(acquire, "it", path, False) == worker.process.pid


def test_unload_kills_a_server_that_does_not_answer(path: str) -> None:
    pid = shared(path, spawn_process=True).acquire().pid()
    stop_process(pid)
    assert unload("it", path=path, timeout_seconds=0.2)
    assert not is_running(pid)


def test_unload_does_not_kill_a_worker_that_serves_beside_other_work(
    path: str, new_worker: Callable[[], Client]
) -> None:
    worker = new_worker()
    pid = worker.do(acquire, "it", path, False)
    stop_process(pid)
    try:
        with pytest.raises(ModelServerError, match=str(pid)):
            unload("it", path=path, timeout_seconds=0.2)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_unload_kills_a_server_that_is_still_starting(
    path: str, tmp_path: Path, new_worker: Callable[[], Client]
) -> None:
    starter = new_worker()
    starter.begin(acquire_slow, SlowToConstruct(tmp_path), "it", path)
    pid = int((tmp_path / "began").read_text())
    assert unload("it", path=path)
    assert not is_running(pid)
    with pytest.raises(AssertionError, match="exit code -9"):
        starter.answer()
    assert starter.leave() == 0


# Attach in place.


def test_an_object_that_attaches_is_made_once_in_each_process_and_served_by_none(
    path: str, new_worker: Callable[[], Client]
) -> None:
    made = Attachable.made
    handle = shared(path, "model/manager", Attachable, always_proxy=True)
    mine = handle.acquire()
    assert type(mine) is Attachable
    assert mine.namespace == (namespace_of("model/manager"), registry_for(path).root)
    for worker in (new_worker(), new_worker()):
        assert worker.do(attach, "model/manager", path) == (1, True)
    assert handle.acquire() is mine
    assert Attachable.made == made + 1
    assert server_pid("model/manager", path=path) is None
    handle.release(mine)
    handle.release(mine)
    with pytest.raises(NotAcquiredError):
        handle.release(mine)
    assert handle.acquire() is not mine


def test_an_object_that_attaches_is_not_spawned_either(path: str) -> None:
    mine = shared(path, "it", Attachable, spawn_process=True).acquire()
    assert type(mine) is Attachable
    assert server_pid("it", path=path) is None


def test_a_hard_delete_of_an_attached_object_resets_it(path: str) -> None:
    handle = shared(path, "it", Attachable)
    mine, resets = handle.acquire(), Attachable.resets
    handle.unsafe_hard_delete()
    assert Attachable.resets == resets + 1
    assert handle.acquire() is not mine


def test_a_forked_child_attaches_anew(path: str) -> None:
    handle = shared(path, "it", Attachable)
    mine = handle.acquire()

    def in_child() -> None:
        assert handle.acquire() is not mine

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(DEADLINE_S)
    assert child.exitcode == 0


def test_a_tag_may_turn_from_an_attached_object_into_a_served_one(path: str) -> None:
    attached = shared(path, "it", Attachable)
    attached.release(attached.acquire())
    assert shared(path, always_proxy=True).acquire().increment() == 1
    assert not registry_for(path).attach_marker("it").exists()


def test_namespaces_of_different_tags_differ() -> None:
    assert namespace_of("model_manager") == "mps.model_manager"
    names = [namespace_of(tag) for tag in ("a/b", "a_b", "a.b", "x" * 100, "x" * 101, "x" * 59 + "/")]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 64 for name in names)
