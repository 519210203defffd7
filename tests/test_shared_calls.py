"""Shared objects between real processes: what is sent, what comes back, and over which connections."""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from counters import (
    ChangesItsText,
    Counter,
    KeepsWhatItWasGiven,
    Lazy,
    NeedsTwo,
    NoSuchWeights,
    remember_tag,
)
from crash_lab import run_in_child
from harness import import_path
from patience import DEADLINE_S
from shared_workers import (
    LAST_CLIENT_S,
    Client,
    NotesThatNobodyIsLeft,
    call_pickled,
    descriptors_left_by_a_host,
    holds_for,
    is_running,
    shared,
    wait_until,
)
from shared_workers import new_worker as new_worker  # the fixture
from shared_workers import path as path  # the fixture
from shared_workers import proxy as proxy  # the fixture

from mpmm.errors import (
    ModelServerError,
    RemoteCallError,
    ServerStartError,
    SharedObjectReleasedError,
)
from mpmm.multi_process_shared import SharedProxy, server_pid
from mpmm.multi_process_shared.client import ServerLink
from mpmm.multi_process_shared.context import ServerContext, serving_for
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.registry import registry_for
from mpmm.multi_process_shared.rpc import sockets
from mpmm.shared_state.lock_file import LockFile

WITHOUT_CLOUDPICKLE = (
    "import importlib.util\n"
    "find_spec = importlib.util.find_spec\n"
    "importlib.util.find_spec = lambda name, *more: None if name == 'cloudpickle' else find_spec(name, *more)\n"
)


@pytest.mark.parametrize(
    ("package", "first"),
    [("cloudpickle", ""), ("apache_beam", f"{WITHOUT_CLOUDPICKLE}import apache_beam\n")],
    ids=["package", "the copy in Beam"],
)
def test_classes_of_a_main_that_cannot_be_imported_go_through_cloudpickle(path: str, package: str, first: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    script = (
        f"{first}import sys\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "class Typed:\n"
        "    def answer(self): return 42\n"
        "handle = MultiProcessShared(Typed, 'it', path=sys.argv[1], spawn_process=True)\n"
        "print(handle.acquire().answer())\n"
        "handle.unsafe_hard_delete()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    assert done.stdout == "42\n", done.stderr
    # Beam writes warnings of its own.
    assert first or not done.stderr


def test_a_server_context_reaches_the_server_and_its_lock_keeps_it_alive(
    path: str, tmp_path: Path, new_worker: Callable[[], Client]
) -> None:
    lock_path, note = tmp_path / "members.lock", tmp_path / "note"
    member = LockFile(lock_path)
    assert member.try_shared()
    context = ServerContext(
        alive_lock=str(lock_path),
        environment=(("MPMM_TEST_CONTEXT", "yes"),),
        on_start=remember_tag,
        on_last=NotesThatNobodyIsLeft(lock_path, note),
    )
    with serving_for(context):
        proxy = shared(path, spawn_process=True).acquire()
    pid = proxy.pid()
    assert proxy.environment("MPMM_TEST_CONTEXT") == "yes"
    assert proxy.environment("STARTED_FOR") == "it"
    registry_for(path).leave()
    # The place is free, but the further lock is not: the server goes on through more than one of its looks.
    assert holds_for(2.2, lambda: is_running(pid))
    assert not note.exists()
    member.close()
    wait_until(lambda: not is_running(pid), LAST_CLIENT_S, lambda: "the server still runs")
    assert note.read_text() == "free=True"


def test_exceptions_arrive_as_themselves_with_the_remote_traceback(proxy: Any) -> None:
    with pytest.raises(KeyError, match="missing key") as caught:
        proxy.raises_key_error()
    assert "in raises_key_error" in str(caught.value.__cause__)


def test_what_cannot_be_sent_back_is_a_clear_error(proxy: Any) -> None:
    with pytest.raises(RemoteCallError, match=r"CannotBeMadeAgain: leftright") as caught:
        proxy.raises_what_does_not_unpickle()
    assert "in raises_what_does_not_unpickle" in str(caught.value)
    with pytest.raises(RemoteCallError, match="SystemExit: 3"):
        proxy.leaves()
    assert proxy.increment() == 1


def test_exceptions_with_an_init_of_their_own_arrive_as_themselves(proxy: Any) -> None:
    with pytest.raises(NeedsTwo) as two:
        proxy.raises_needs_two()
    assert (two.value.args, two.value.left, str(two.value)) == (("leftright",), "left", "leftright")
    assert "in raises_needs_two" in str(two.value.__cause__)
    with pytest.raises(ChangesItsText) as changed:
        proxy.raises_changed_text()
    assert str(changed.value) == "code 5"
    with pytest.raises(KeepsWhatItWasGiven) as kept:
        proxy.raises_what_it_was_given()
    assert kept.value.args == ("it cannot be sent",)
    with pytest.raises(NoSuchWeights) as missing:
        proxy.raises_os_error()
    assert (missing.value.errno, missing.value.filename) == (2, "/models/resnet")
    assert str(missing.value) == "[Errno 2] no weights: '/models/resnet'"


def test_whoever_connects_and_proves_nothing_holds_no_thread(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_TIMEOUT_S", 0.2)
    proxy = shared(path, always_proxy=True).acquire()
    host = find_host(registry_for(path), "it")
    assert host is not None
    before = len(host._connections)
    unproven = []
    for said in (b"", b"half a nonce"):
        peer = socket.socket(socket.AF_UNIX)
        with sockets._short_address(registry_for(path).path, host.record.socket_name) as address:
            peer.connect(address)
        peer.sendall(said)
        unproven.append(peer)
    for peer in unproven:
        peer.settimeout(DEADLINE_S)
        assert peer.recv(1) == b""
        peer.close()
    wait_until(lambda: len(host._connections) == before, DEADLINE_S, lambda: "a connection was left open")
    assert proxy.increment() == 1


def test_a_worker_of_loky_starts_a_server(path: str, tmp_path: Path) -> None:
    pytest.importorskip("joblib", reason="needs loky, which comes with joblib")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from joblib import Parallel, delayed\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "def start(path, zygote):\n"
        "    os.environ['MPMM_ZYGOTE'] = zygote\n"
        "    handle = MultiProcessShared(dict, f'it {zygote}', path=path, spawn_process=True)\n"
        "    found = handle.acquire().get(1, 42)\n"
        "    handle.unsafe_hard_delete()\n"
        "    return found\n"
        "if __name__ == '__main__':\n"
        "    print(Parallel(2)(delayed(start)(f'{sys.argv[1]}', zygote) for zygote in '01'))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), path],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        env={**os.environ, "PYTHONPATH": import_path()},
    )
    assert done.stdout == "[42, 42]\n", done.stderr


def test_a_server_finds_a_module_that_its_starter_found_in_a_folder_which_is_off_the_path_by_now(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "app folder"
    (folder / "mpmm_test_app").mkdir(parents=True)
    (folder / "mpmm_test_app" / "__init__.py").write_text("")
    (folder / "mpmm_test_app" / "models.py").write_text("class Model:\n    def answer(self): return 42\n")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(folder))
        models = importlib.import_module("mpmm_test_app.models")
    assert str(folder) not in sys.path
    for number, zygote in enumerate("01"):
        monkeypatch.setenv("MPMM_ZYGOTE", zygote)
        for constructor in (models.Model, functools.partial(models.Model)):
            proxy = shared(path, f"{number} {type(constructor)}", constructor, spawn_process=True).acquire()
            assert proxy.answer() == 42


class ImportsNothing:
    """A constructor that looks for a module that is not there."""

    def __call__(self) -> Any:
        return importlib.import_module("mpmm_no_such_module")


def test_a_module_that_a_server_does_not_find_is_an_error_that_says_where_it_looked(path: str) -> None:
    with pytest.raises(ServerStartError, match=r"(?s)No module named 'mpmm_no_such_module'.*sys.path there: \["):
        shared(path, "it", ImportsNothing(), spawn_process=True).acquire()


def test_arguments_that_cannot_be_pickled_leave_the_proxy_usable(proxy: Any) -> None:
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        proxy.increment(lambda: 1)
    assert proxy.increment(5) == 5


def test_only_public_methods_can_be_called(proxy: Any) -> None:
    for name in ("count", "_private", "no_such_method", "__len__"):
        with pytest.raises(AttributeError, match=name):
            getattr(proxy, name)
    use = proxy._mpmm_use
    with pytest.raises(AttributeError, match="_private"):
        use.link.ask(use.token, "_private", (), {})
    with pytest.raises(AttributeError, match="__call__"):
        proxy()


def take_turns(pets: list[Callable[[], Any]]) -> Any:
    """Make a shared object of another class each time."""
    return pets.pop(0)()


@pytest.mark.parametrize("spawn", [False, True])
def test_methods_that_an_object_gains_are_found_by_those_who_know_it_already(path: str, spawn: bool) -> None:
    lazy = shared(path, constructor=Lazy, always_proxy=True, spawn_process=spawn)
    first = lazy.acquire()
    with pytest.raises(AttributeError, match="no public method 'predict'"):
        _ = first.predict
    first.load()
    assert (lazy.acquire().predict(4), first.predict(5)) == (8, 10)
    with pytest.raises(AttributeError, match="no public method 'other'"):
        _ = first.other


def test_the_methods_of_an_object_that_is_made_again_as_another_class_are_found(path: str) -> None:
    turns = shared(path, constructor=functools.partial(take_turns, [Lazy, Counter]), always_proxy=True)
    first = turns.acquire()
    first.load()
    turns.release(first)
    assert turns.acquire().increment() == 1


def test_a_long_call_in_one_thread_does_not_block_another(proxy: Any) -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(proxy.wait_until_open()))
    thread.start()
    proxy.open()
    thread.join(DEADLINE_S)
    assert results == [True]


def test_a_threads_connection_ends_with_the_thread(path: str) -> None:
    proxy = shared(path, always_proxy=True).acquire()
    host = find_host(registry_for(path), "it")
    assert host is not None
    before = len(host._connections)
    thread = threading.Thread(target=proxy.increment)
    thread.start()
    thread.join(DEADLINE_S)
    wait_until(lambda: len(host._connections) == before, DEADLINE_S, lambda: "a connection was left open")


def test_a_server_that_lives_and_cannot_be_reached_is_an_error_after_some_attempts(proxy: Any) -> None:
    proxy._mpmm_use.link.forget_after_fork()
    with patch.object(ServerLink, "connect", side_effect=ConnectionRefusedError("full")) as connect:
        with pytest.raises(ModelServerError, match=r"lives but could not be reached in 6 attempts"):
            proxy.increment()
        assert connect.call_count == 6
    assert proxy.increment() == 1


def test_a_host_that_was_short_of_descriptors_takes_clients_again(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, accept = shared(path, always_proxy=True).acquire(), sockets.accept

    def be_short_first(listener: Any) -> Any:
        monkeypatch.setattr(sockets, "accept", accept)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(sockets, "accept", be_short_first)
    outcome: list[int] = []
    # From another thread, which has no connection yet; a daemon, so that an unanswered call does not delay the end.
    thread = threading.Thread(target=lambda: outcome.append(proxy.increment()), daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert outcome == [1]


def test_a_host_leaves_no_thread_and_no_descriptor(path: str, new_worker: Callable[[], Client]) -> None:
    worker = new_worker()
    assert worker.do(descriptors_left_by_a_host, path) == 0
    assert worker.leave() == 0


def test_a_pickled_proxy_connects_from_another_process(proxy: Any, new_worker: Callable[[], Client]) -> None:
    assert new_worker().do(call_pickled, pickle.dumps(proxy)) == 1
    assert proxy.increment() == 2


def test_a_pickled_proxy_goes_to_its_own_server_over_the_connection_that_there_is(path: str) -> None:
    proxy = shared(path, spawn_process=True).acquire()
    pickled = pickle.dumps(proxy)
    with patch.object(ServerLink, "connect", side_effect=AssertionError("connected again")):
        assert pickle.loads(pickled).increment() == 1
    proxy.unsafe_hard_delete()
    another = shared(path, spawn_process=True).acquire()
    with pytest.raises(ModelServerError, match="is gone"):
        pickle.loads(pickled).increment()
    assert another.increment() == 1
    another.unsafe_hard_delete()


def test_a_child_neither_uses_nor_ends_the_object_that_its_parent_has(path: str) -> None:
    """A handler of a signal may have forked between the look for the host and its use."""
    proxy = shared(path).acquire()
    host = find_host(registry_for(path), "it")
    assert host is not None

    def use() -> None:
        with pytest.raises(ModelServerError):
            host.acquire()
        host.hard_delete()
        host.end()

    assert run_in_child(use) == 0
    assert proxy.increment() == 1
    assert server_pid("it", path=path) == os.getpid()
    # Over a connection, as from other processes.
    assert shared(path, always_proxy=True).acquire().increment() == 2
    for _ in range(2):
        host.hard_delete()
    assert server_pid("it", path=path) is None


class Sleeps:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sleep(self) -> None:
        self.asked.append("sleep")

    def wake_up(self) -> None:
        self.asked.append("wake up")


def test_an_object_sleeps_once_until_it_is_woken_and_not_at_all_once_it_is_released(path: str) -> None:
    handle = shared(path, "it", Sleeps)
    proxy = handle.acquire()
    host = find_host(registry_for(path), "it")
    assert host is not None
    for move in (host.wake_up, host.sleep, host.sleep, host.wake_up, host.wake_up, host.sleep):
        move()
    assert proxy.asked == ["sleep", "wake up", "sleep"]
    handle.release(proxy)
    host.sleep()
    proxy = handle.acquire()
    host.wake_up()
    assert proxy.asked == [], "a new object is awake"


def test_the_process_that_has_the_object_uses_it_directly(path: str) -> None:
    handle = shared(path)
    proxy = handle.acquire()
    assert isinstance(proxy, SharedProxy)
    assert proxy.count == 0
    assert proxy.returns_generator() is not None
    handle.release(proxy)
    with pytest.raises(SharedObjectReleasedError):
        _ = proxy.count


def test_a_later_acquire_needs_no_new_connection(proxy: Any, path: str) -> None:
    with patch.object(ServerLink, "connect", side_effect=AssertionError("connected again")):
        assert shared(path, always_proxy=True).acquire().increment() == 1
