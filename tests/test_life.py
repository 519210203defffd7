"""What shows that a server lives though its life lock's file is gone: an address of the kernel."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from crash_lab import run_in_child

from mpmm.multi_process_shared import life as life_module
from mpmm.multi_process_shared.life import LifeLock, address_for, wait_for_answer
from mpmm.multi_process_shared.rpc import sockets


@pytest.fixture
def address(tmp_path: Path) -> bytes:
    made = address_for(str(tmp_path), "it")
    assert made is not None
    return made


@pytest.fixture
def life(tmp_path: Path, address: bytes) -> Iterator[LifeLock]:
    lock = LifeLock(tmp_path / "it.life")
    lock.listen_at(address)
    yield lock
    lock.close()


def never() -> bool:
    return False


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def wait_for_a_caller(life: LifeLock) -> None:
    [listener] = life.listeners
    assert select.select([listener], [], [], 10)[0]


def test_an_address_is_that_of_a_name_below_a_root_even_if_the_root_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    addresses = [address_for(str(folder), name) for folder in (root, other) for name in ("it", "other")]
    assert len(set(addresses)) == 4
    root.mkdir()
    link = tmp_path / "link"
    link.symlink_to(root)
    assert address_for(str(root), "it") == address_for(str(link), "it") == addresses[0]
    monkeypatch.setattr(os, "getuid", lambda: 5)
    assert address_for(str(root), "it") != addresses[0]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert address_for(str(root), "it") is None


def test_who_does_not_find_the_file_waits_until_the_owner_has_looked_for_it(life: LifeLock, address: bytes) -> None:
    asking, answers = in_thread(lambda: wait_for_answer(address, never))
    wait_for_a_caller(life)
    has_looked = threading.Event()

    def looks() -> bool:
        has_looked.set()
        return False

    # Others may ask before the owner answers; one that has looked in vain is in the queue.
    another, others = in_thread(lambda: wait_for_answer(address, looks))
    assert has_looked.wait(10)
    time.sleep(2 * life_module.LOOK_MS / 1000)
    assert answers == others == []
    with life.answering():
        pass
    for thread in (asking, another):
        thread.join(10)
    assert answers == others == [True]
    with life.answering():
        pass


def test_nobody_is_waited_for_once_the_owner_stops_listening(life: LifeLock, address: bytes) -> None:
    life.stop_listening()
    assert life.listeners == []
    assert wait_for_answer(address, never) is False
    life.stop_listening()
    with life.answering():
        pass
    assert life.fd >= 0
    life.listen_at(address)
    asking, answers = in_thread(lambda: wait_for_answer(address, never))
    wait_for_a_caller(life)
    life.close()
    asking.join(10)
    assert answers == [True]
    assert wait_for_answer(address, never) is False


def test_where_there_are_no_such_addresses_only_the_file_counts(tmp_path: Path) -> None:
    life = LifeLock(tmp_path / "it.life")
    life.listen_at(None)
    assert life.listeners == []
    assert wait_for_answer(None, never) is False
    life.close()


def test_the_first_of_two_servers_is_waited_for(life: LifeLock, tmp_path: Path, address: bytes) -> None:
    second = LifeLock(tmp_path / "second.life")
    second.listen_at(address)
    assert second.listeners == []
    second.close()
    asking, answers = in_thread(lambda: wait_for_answer(address, never))
    wait_for_a_caller(life)
    with life.answering():
        pass
    asking.join(10)
    assert answers == [True]


def test_who_waits_gives_up_once_there_is_something_to_be_found(life: LifeLock, address: bytes) -> None:
    looks = iter([False, False, True])
    assert wait_for_answer(address, lambda: next(looks)) is True
    assert list(looks) == []


def test_a_process_of_another_user_that_listens_is_not_believed(
    life: LifeLock, address: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uid in (os.getuid() + 1, None):
        monkeypatch.setattr(life_module, "peer_uid", lambda fd, uid=uid: uid)
        assert wait_for_answer(address, never) is False


def test_a_dead_owner_is_not_waited_for_though_a_child_has_its_descriptor(
    life: LifeLock, address: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: list[str | Exception] = []

    class Found:
        def __init__(self, pid: int) -> None:
            assert pid == 7

        def status(self) -> str:
            status = statuses.pop()
            if isinstance(status, Exception):
                raise status
            return status

    def waits(owner: int | None, *says: str | Exception) -> bool:
        statuses[:] = says
        looks = iter([False, True])
        monkeypatch.setattr(life_module, "peer_pid", lambda fd: owner)
        return wait_for_answer(address, lambda: next(looks))

    monkeypatch.setattr(psutil, "Process", Found)
    assert not waits(7, psutil.STATUS_ZOMBIE)
    assert not waits(7, psutil.NoSuchProcess(7))
    assert waits(7, psutil.AccessDenied(7))
    assert waits(7, psutil.STATUS_SLEEPING)
    # Its pid is not known here.
    assert waits(None)
    assert statuses == []


def test_who_finds_too_long_a_queue_does_not_wait(
    tmp_path: Path, address: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "BACKLOG", 0)
    life = LifeLock(tmp_path / "it.life")
    life.listen_at(address)
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(address)
        assert wait_for_answer(address, never) is False
    life.close()


def test_a_forked_child_does_not_keep_the_address(life: LifeLock, address: bytes) -> None:
    def look() -> None:
        assert life.listeners == []
        os._exit(0)

    assert run_in_child(look) == 0
    with life.answering():
        pass
    [listener] = life.listeners
    assert listener.fileno() >= 0


def test_one_that_comes_while_the_files_are_looked_after_waits_for_the_next_look(
    life: LifeLock, address: bytes
) -> None:
    first, first_answers = in_thread(lambda: wait_for_answer(address, never))
    wait_for_a_caller(life)
    with life.answering():
        second, second_answers = in_thread(lambda: wait_for_answer(address, never))
        wait_for_a_caller(life)
        time.sleep(3 * life_module.LOOK_MS / 1000)
        assert first_answers == []
    first.join(10)
    time.sleep(3 * life_module.LOOK_MS / 1000)
    assert (first_answers, second_answers) == ([True], [])
    with life.answering():
        pass
    second.join(10)
    assert second_answers == [True]


def test_who_cannot_answer_says_so_unless_there_is_nobody_left_to_wait_for(life: LifeLock) -> None:
    class Failing:
        def __init__(self, stops: bool) -> None:
            self.stops = stops

        def accept(self) -> None:
            if self.stops:
                life._listener = None
            raise OSError(errno.EMFILE, "Too many open files")

    [listener] = life.listeners
    failing: Any = Failing(stops=False)
    life._listener = failing
    with pytest.raises(OSError, match="Too many open files"), life.answering():
        raise AssertionError("it looks")
    failing.stops = True
    with life.answering():
        pass
    listener.close()


class StopsMeanwhile(LifeLock):
    """A life lock that another thread stops listening with right after this one has looked for the listener."""

    stops = False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name == "_listener" and found is not None and self.stops:
            super().__setattr__("_listener", None)
            found.close()
        return found


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_thread_that_stops_listening_does_not_end_the_one_that_answers(
    tmp_path: Path, address: bytes, is_asked: bool
) -> None:
    life = StopsMeanwhile(tmp_path / "it.life")
    life.listen_at(address)
    with socket.socket(socket.AF_UNIX) as one:
        if is_asked:
            one.connect(address)
        life.stops = True
        with life.answering():
            pass
        assert life.listeners == []
        life.stops = False
        life.listen_at(address)
        life.stops = True
        [listener] = life.listeners
        # `wait` refuses it with the ValueError that its caller expects.
        assert listener.fileno() < 0
    life.close()
