"""The requester's side of the fork server, in this process: what is asked of which zygote, and how a server ends."""

from __future__ import annotations

import ast
import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import in_child, open_descriptors

from mpmm.errors import LockTimeoutError
from mpmm.multi_process_shared.forkserver import client
from mpmm.multi_process_shared.forkserver.client import ForkedServer, _ForkedPopen, order_server
from mpmm.multi_process_shared.forkserver.orders import (
    BORN,
    ENDED,
    WAIT,
    Descriptor,
    ForkOrder,
    Order,
    hand_over,
    receive_descriptors,
    send,
    take_over,
)
from mpmm.multi_process_shared.registry import LIVES_BY_VARIABLE, ServerRegistry
from mpmm.multi_process_shared.rpc import sockets
from mpmm.multi_process_shared.server_process import ServerPlan
from mpmm.shared_state.lock_file import LockFile

pytestmark = pytest.mark.skipif(not client._has_pidfd(), reason="needs descriptors of processes")
PLAN = ServerPlan("/", "it", (), (1, None), (), b"", b"")
NOW = 1000.0


@pytest.fixture
def ends() -> Iterator[tuple[Any, Any]]:
    """Both ends of a connection: the requester's and the zygote's."""
    ours, theirs = Pipe()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def child() -> Iterator[int]:
    """The pid of a child that waits to be ended."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while True:
            signal.pause()
    yield pid
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def end_of(pid: int) -> None:
    """Wait until a child has ended, and leave it a zombie."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


# Orders.


def test_a_hook_is_called_once_however_often_it_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_preload_hooks", [])
    for name in ("a:b", "c:d", "a:b"):
        client.add_preload_hook(name)
    assert client._preload_hooks == ["a:b", "c:d"]
    for _ in range(2):
        client.remove_preload_hook("a:b")
    assert client._preload_hooks == ["c:d"]


def test_an_order_says_all_that_a_server_needs_and_its_process_is_a_child(
    ends: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, child: int, tmp_path: Path
) -> None:
    ours, theirs = ends
    monkeypatch.setattr(client, "_is_possible", lambda: True)
    monkeypatch.setattr(client, "_reach_zygote", lambda registry: ours)
    monkeypatch.setattr(client, "_preload_hooks", ["a:b"])
    send(theirs, WAIT, 0)
    send(theirs, BORN, child)
    with (tmp_path / "report").open("wb") as file:
        report: Any = file
        server = order_server(ServerRegistry(tmp_path), PLAN, {"dir": "/"}, report, "name")
    assert isinstance(server, ForkedServer)
    message = theirs.recv_bytes()
    descriptors = receive_descriptors(theirs, 3)
    assert pickle.loads(message) == ForkOrder(PLAN, {"dir": "/"}, dict(os.environ), ("a:b",))
    assert os.readlink(f"/proc/self/fd/{descriptors[0].fd}") == str(tmp_path / "report")
    for descriptor in descriptors:
        descriptor.close()
    assert (server.name, server.daemon) == ("name", False)
    server.start()
    assert server.pid == child
    assert server in multiprocessing.active_children()
    server.terminate()
    end_of(child)
    send(theirs, ENDED, 7)
    server.join()
    assert (server.exitcode, ours.closed) == (7, True)
    server.close()


def test_an_order_that_cannot_be_given_is_none_and_is_not_tried_again_soon_if_the_zygote_stands_still(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: NOW))
    monkeypatch.setattr(client, "_is_possible", lambda: True)
    nothing: Any = None

    def order_with(error: BaseException) -> float:
        def fail(registry: Any) -> Any:
            raise error

        monkeypatch.setattr(client, "_reach_zygote", fail)
        monkeypatch.setattr(client, "_avoid_until", 0.0)
        caplog.clear()
        assert order_server(nothing, PLAN, {}, nothing, "name") is None
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        return client._avoid_until

    for error in (
        OSError("full"),
        TimeoutError(),
        AuthenticationError(),
        LockTimeoutError("held", path="/", timeout_seconds=1.0),
        subprocess.TimeoutExpired("zygote", 1.0),
    ):
        assert order_with(error) == NOW + client.AVOID_S, error
    for gone in (ConnectionRefusedError(), BrokenPipeError(), EOFError()):
        assert order_with(gone) == 0.0, gone
    with pytest.raises(ValueError, match="not foreseen"):
        order_with(ValueError("not foreseen"))
    monkeypatch.setattr(client, "_is_possible", lambda: False)
    assert order_server(nothing, PLAN, {}, nothing, "name") is None


def test_an_order_that_is_interrupted_leaves_no_connection(
    ends: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = ends

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "_is_possible", lambda: True)
    monkeypatch.setattr(client, "_reach_zygote", lambda registry: ours)
    monkeypatch.setattr(client, "_send_streams", interrupt)
    nothing: Any = None
    with pytest.raises(KeyboardInterrupt):
        order_server(nothing, PLAN, {}, nothing, "name")
    assert ours.closed


def test_servers_are_forked_where_that_is_possible_wanted_and_has_not_failed_lately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: NOW))
    for switch, platform, avoid_until, has_pidfd, possible in (
        (None, "linux", NOW, True, True),
        ("1", "linux", NOW, True, True),
        ("0", "linux", NOW, True, False),
        (None, "darwin", NOW, True, False),
        (None, "linux", NOW + 0.1, True, False),
        (None, "linux", NOW, False, False),
    ):
        if switch is None:
            monkeypatch.delenv("MPMM_ZYGOTE", raising=False)
        else:
            monkeypatch.setenv("MPMM_ZYGOTE", switch)
        monkeypatch.setattr(client, "_avoid_until", avoid_until)
        monkeypatch.setattr(client, "_has_pidfd", lambda has_pidfd=has_pidfd: has_pidfd)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "platform", platform)
            assert client._is_possible() is possible, (switch, platform, avoid_until, has_pidfd)


def test_descriptors_of_processes_need_python_and_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    has_pidfd: Callable[[], bool] = client._has_pidfd.__wrapped__
    before = open_descriptors()
    assert has_pidfd() is True
    assert not open_descriptors() - before

    def refuse(pid: int) -> int:
        raise OSError("the kernel is too old")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pidfd_open", refuse)
        assert has_pidfd() is False
        patched.delattr(os, "pidfd_open")
        assert has_pidfd() is False
    monkeypatch.delattr(signal, "pidfd_send_signal")
    assert has_pidfd() is False


def test_a_server_is_given_the_streams_that_a_program_started_here_would_inherit(
    ends: tuple[Any, Any], tmp_path: Path
) -> None:
    def send_from(closed: tuple[int, ...], taken: tuple[int, ...]) -> list[str]:
        files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("report", "out", "err", "other")]
        os.dup2(files[1], 1)
        os.dup2(files[2], 2)
        for number in closed:
            os.close(number)
        for number in taken:
            # A file that the program has opened since, as Python does.
            os.dup2(files[3], number, inheritable=False)
        report: Any = SimpleNamespace(fileno=lambda: files[0])
        before = open_descriptors()
        client._send_streams(ends[0], report)
        found = [os.path.basename(os.readlink(f"/proc/self/fd/{one.fd}")) for one in receive_descriptors(ends[1], 3)]
        assert len(open_descriptors() - before) == 3
        return found

    for closed, taken, expected in (
        ((), (), ["report", "out", "err"]),
        ((1,), (), ["report", "null", "err"]),
        ((2,), (), ["report", "out", "null"]),
        ((1,), (1,), ["report", "null", "err"]),
        ((1, 2), (2,), ["report", "null", "null"]),
    ):
        assert in_child(lambda closed=closed, taken=taken: send_from(closed, taken)) == expected, (closed, taken)  # type: ignore[misc]  # the defaults have no type


# Orders on their way.


def test_an_order_arrives_whole_and_the_process_that_passes_it_on_keeps_nothing(ends: tuple[Any, Any]) -> None:
    requester, requesters = Pipe()
    before = open_descriptors()
    server = os.pipe()
    preparation = {"dir": "/", "sys_path": ["a", "/b"], "sys_argv": ["program"]}
    message = pickle.dumps(ForkOrder(PLAN, preparation, {"A": "1", "SHLVL": "2"}, ("a:b",)))
    order = Order(message, requesters, [Descriptor(fd) for fd in (*server, os.open(os.devnull, os.O_RDONLY))])
    hand_over(ends[0], "fork", order)
    assert requesters.closed
    assert not open_descriptors() - before
    what, arrived_message = ends[1].recv()
    arrived = take_over(ends[1], arrived_message)
    assert (what, arrived.order) == ("fork", order.order)
    send(arrived.requester, BORN, 5)
    assert json.loads(requester.recv_bytes()) == [BORN, 5]
    os.write(arrived.descriptors[1].fd, b"x")
    assert os.read(arrived.descriptors[0].fd, 10) == b"x"
    kind = arrived.kind
    assert (kind.sys_path, kind.environment, kind.preload_hooks) == (("/a", "/b"), (("A", "1"),), ("a:b",))
    assert (kind.directory, kind.arguments, kind.pinned) == ("/", ("program",), ())
    arrived.close()
    requester.close()
    assert not open_descriptors() - before


def test_an_order_without_all_of_its_descriptors_is_none_and_keeps_none(ends: tuple[Any, Any]) -> None:
    before = open_descriptors()
    with open(os.devnull, "rb") as file, sockets.duplicate(ends[0].fileno()) as ours:
        socket.send_fds(ours, [b"!"], [file.fileno()] * 2)
    with pytest.raises(EOFError) as error:
        receive_descriptors(ends[1], 3)
    assert not open_descriptors() - before
    assert error.tb is not None


# The process.


@pytest.fixture
def server(ends: tuple[Any, Any], child: int) -> Iterator[_ForkedPopen]:
    """A server as multiprocessing sees it."""
    popen = _ForkedPopen(child, ends[0])
    yield popen
    popen.close()


def test_a_server_runs_until_it_has_ended_and_its_exit_code_is_asked_for_once(
    server: _ForkedPopen, ends: tuple[Any, Any], child: int
) -> None:
    assert (server.poll(), server.wait(0), server.wait(0.001), server.returncode) == (None,) * 4
    send(ends[1], ENDED, 0)
    assert server.poll() is None, "it has not ended, whatever is said"
    os.kill(child, signal.SIGKILL)
    assert server.wait() == 0
    assert (server.poll(), server.wait(0), server.returncode) == (0, 0, 0)
    assert ends[0].closed


def test_a_server_may_be_waited_for_as_by_waitpid(server: _ForkedPopen, ends: tuple[Any, Any]) -> None:
    send(ends[1], ENDED, -9)
    server.kill()
    assert server.poll(0) == -9


def test_an_exit_code_that_nobody_tells_in_time_is_unknown(
    server: _ForkedPopen, ends: tuple[Any, Any], child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "EXIT_CODE_TIMEOUT_S", 0.0)
    server.terminate()
    end_of(child)
    assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT).si_status == signal.SIGTERM  # type: ignore[union-attr]  # it has ended
    assert server.poll() == client.UNKNOWN_EXIT_CODE
    assert ends[0].closed


def test_an_exit_code_is_unknown_where_the_zygote_has_ended(
    server: _ForkedPopen, ends: tuple[Any, Any], child: int
) -> None:
    ends[1].close()
    server.kill()
    end_of(child)
    assert server.poll() == client.UNKNOWN_EXIT_CODE


def test_a_server_that_has_ended_is_sent_no_signal(server: _ForkedPopen, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def note(fd: int, number: int) -> None:
        sent.append(number)
        raise ProcessLookupError

    monkeypatch.setattr(signal, "pidfd_send_signal", note)
    server.terminate()
    server.kill()
    assert sent == [signal.SIGTERM, signal.SIGKILL]
    server.returncode = 0
    server.terminate()
    assert len(sent) == 2


def test_a_server_that_is_not_needed_any_more_keeps_no_descriptor(ends: tuple[Any, Any], child: int) -> None:
    before = open_descriptors()
    server = _ForkedPopen(child, ends[0])
    assert len(open_descriptors() - before) == 1
    server.close()
    assert ends[0].closed
    assert not open_descriptors() - before


# Which zygote.


def zygote_name(monkeypatch: pytest.MonkeyPatch, registry: ServerRegistry, **variables: str) -> str:
    """Return the name of the zygote's life file with these environment variables."""
    with monkeypatch.context() as patched:
        for name, value in variables.items():
            patched.setenv(name, value)
        path = client._life_path(registry)
    assert path.parent == registry.path / "zygote"
    return path.name


def test_interpreters_that_start_in_different_ways_have_different_zygotes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    registry = ServerRegistry(tmp_path)
    itself = zygote_name(monkeypatch, registry)
    assert (len(itself), itself[12:]) == (17, ".life")
    for same in ({"PYTHONPATH": "/elsewhere"}, {"OTHER": "1"}, {"MY_LD_PATH": "1"}, {"MPMM_DEVICES": "1"}):
        assert zygote_name(monkeypatch, registry, **same) == itself, same
    others = [
        zygote_name(monkeypatch, registry, **other)
        for other in (
            {"LD_PRELOAD": "/lib"},
            {"LD_PRELOAD": "/other"},
            {"MALLOC_ARENA_MAX": "1"},
            {"GLIBC_TUNABLES": "a"},
            {"PYTHONHASHSEED": "1"},
        )
    ]
    monkeypatch.setattr(client, "_kernel_namespaces", lambda: ["another container"])
    others.append(zygote_name(monkeypatch, registry))
    monkeypatch.setattr(sys, "executable", "/another/python")
    others.append(zygote_name(monkeypatch, registry))
    assert len({itself, *others}) == 8


def test_containers_are_told_apart_as_far_as_the_kernel_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def readlink(path: str) -> str:
        asked.append(path)
        if path.endswith("/net"):
            raise PermissionError
        return path.rpartition("/")[2]

    monkeypatch.setattr(os, "readlink", readlink)
    assert client._kernel_namespaces() == ["pid", "mnt", "user"]
    assert [path.rpartition("/")[2] for path in asked] == ["pid", "mnt", "net", "user"]


def test_a_zygote_is_called_if_it_lives_and_else_started_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    life = tmp_path / "zygote" / "a.life"
    done: list[Any] = []
    lives = [True]
    fails: list[Exception] = []

    def dial(registry: Any, path: Path) -> Any:
        done.append("dial")
        if fails:
            raise fails.pop()
        return "connection"

    def start(registry: Any, path: Path) -> None:
        done.append("start")
        assert not LockFile(path.with_suffix(".lock")).try_exclusive(), "two may start one at the same time"

    exclusive = LockFile.exclusive

    def exclusively(lock: LockFile, timeout_seconds: float) -> Any:
        done.append(timeout_seconds)
        return exclusive(lock, timeout_seconds)

    monkeypatch.setattr(client, "_life_path", lambda registry: life)
    monkeypatch.setattr(client, "is_locked", lambda path: lives.pop(0))
    monkeypatch.setattr(client, "_dial", dial)
    monkeypatch.setattr(client, "_start_zygote", start)
    monkeypatch.setattr(LockFile, "exclusive", exclusively)
    nothing: Any = None
    # The answers to whether it lives, how calling it fails, and what is done.
    limit = client.START_TIMEOUT_S
    for answers, failures, expected in (
        ([True], [], ["dial"]),
        ([False, False], [], [limit, "start", "dial"]),
        ([False, True], [], [limit, "dial"]),
        ([True, False], [ConnectionRefusedError()], ["dial", limit, "start", "dial"]),
        ([True, True], [FileNotFoundError()], ["dial", limit, "dial"]),
        ([True, True], [EOFError()], ["dial", limit, "dial"]),
        ([True, True], [ValueError()], ["dial", limit, "dial"]),
    ):
        lives[:], fails[:] = answers, failures
        done.clear()
        assert client._reach_zygote(nothing) == "connection"  # type: ignore[comparison-overlap]  # what `dial` returns
        assert (done, lives, fails) == (expected, [], [])
    assert stat.S_IMODE(life.parent.stat().st_mode) == 0o700
    for first, second, error in (
        (TimeoutError(), None, TimeoutError),
        (ValueError("no JSON"), ValueError("no JSON"), OSError),
        (ConnectionRefusedError(), ConnectionRefusedError(), ConnectionRefusedError),
    ):
        lives[:], fails[:] = [True, True], [one for one in (second, first) if one is not None]
        with pytest.raises(error):
            client._reach_zygote(nothing)


def test_a_zygote_is_called_at_the_place_that_its_life_file_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(sockets, "dial", lambda *arguments: called.append(arguments))
    registry: Any = SimpleNamespace(key=lambda: b"key")
    life = tmp_path / "a.life"
    life.write_text(json.dumps({"pid": 17, "socket": "/some/where/a.socket"}))
    client._dial(registry, life)
    assert called == [(Path("/some/where"), "a.socket", b"key", client.ANSWER_TIMEOUT_S)]
    monkeypatch.setattr(client, "_life_path", lambda registry: life)
    assert client.zygote_pid(registry) is None
    with contextlib.closing(LockFile(life)) as lock:
        assert lock.try_exclusive()
        assert client.zygote_pid(registry) == 17
        life.write_text("half")
        assert client.zygote_pid(registry) is None


def test_a_zygote_is_started_like_this_interpreter_and_tied_to_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []

    def run(command: list[str], **options: Any) -> Any:
        started.append((command, options))
        return SimpleNamespace(returncode=len(started) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", ["", "/a", None])
    monkeypatch.setenv(LIVES_BY_VARIABLE, "[]")
    monkeypatch.setenv("MPMM_TEST_KEPT", "1")
    monkeypatch.chdir(tmp_path)
    registry = ServerRegistry(tmp_path)
    client._start_zygote(registry, tmp_path / "a.life")
    ((command, options),) = started
    assert ast.literal_eval(command[-1]) == [str(tmp_path), "/a"]
    assert command[-4:-1] == ["mpmm.multi_process_shared.forkserver.zygote", str(tmp_path), str(tmp_path / "a.life")]
    assert (command[0], command[-6]) == (sys.executable, "-c")
    environment = options.pop("env")
    assert environment == {name: value for name, value in os.environ.items() if name != LIVES_BY_VARIABLE}
    assert environment["MPMM_TEST_KEPT"] == "1"
    nowhere = subprocess.DEVNULL
    assert options == {
        **dict.fromkeys(("stdin", "stdout", "stderr"), nowhere),
        "start_new_session": True,
        "timeout": client.START_TIMEOUT_S,
        "check": False,
    }
    with pytest.raises(OSError, match="exit code 1"):
        client._start_zygote(registry, tmp_path / "a.life")
