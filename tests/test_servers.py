"""Model servers as processes of the program that started them: their imports, open files, output, and signals."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import files_in, import_path, wait_until
from patience import DEADLINE_S, Stopwatch
from pets import (
    Cats,
    Dogs,
    ForksAndComesBack,
    ForksChildren,
    Lions,
    LongNative,
    NotesSignals,
    Speaker,
    TakesSigterm,
    UsesManager,
    make_cats,
    make_dogs,
)

from mpmm import cli
from mpmm.errors import InvalidArgumentError, ModelServerError, ServerStartError
from mpmm.multi_process_shared import MultiProcessShared, output, server_pid, unload
from mpmm.multi_process_shared import registry as registry_module
from mpmm.multi_process_shared.identity import name_of_constructor
from mpmm.multi_process_shared.registry import leave_all_registries, registry_for
from mpmm.shared_state.runtime_dir import SERVERS_LOG
from mpmm.shared_state.snapshot import read_snapshot

# A server looks once a second whether a client is left.
LAST_CLIENT_S = 10.0


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(params=["fork", "spawn"])
def start_method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How servers are started, in this process and those that it starts."""
    monkeypatch.setenv("MPMM_ZYGOTE", "1" if request.param == "fork" else "0")
    return str(request.param)


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script as a program; its output is read to the end."""

    def run(text: str, *arguments: str, deadline_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "program.py"
        script.write_text(textwrap.dedent(text))
        return subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=deadline_s,
            env={**os.environ, "PYTHONPATH": import_path()},
        )

    return run


# Managers in servers.

MANAGER_AT_MODULE_LEVEL = """
    import sys
    from mpmm import ModelManager, MultiProcessShared

    manager = ModelManager(namespace="test", memory_source="booked")


    class Detector:
        def predict(self, x):
            return 2 * x

        def has_child(self):
            import multiprocessing, time
            child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
            child.start()
            return child.pid

        def joins(self):
            with manager.model("part", lambda: "a handle") as part:
                return part


    def load():
        MultiProcessShared(Detector, tag="detector", spawn_process=True, always_proxy=True).acquire()
        return "detector"
"""


def test_a_manager_at_module_level_does_not_keep_its_server_alive(
    run_script: Callable[..., Any], start_method: str, runtime_root: Path
) -> None:
    done = run_script(
        MANAGER_AT_MODULE_LEVEL
        + """
    if __name__ == "__main__":
        with manager.model("detector", load) as handle:
            proxy = MultiProcessShared(Detector, tag=handle, always_proxy=True).acquire()
            members = manager._connected().namespace.tables.used_members()
            print(proxy.predict(21), len(members))
    """
    )
    assert (done.stdout, done.returncode) == ("42 2\n", 0), done.stderr
    wait_until(lambda: not files_in(runtime_root), "the server and its folder are gone", LAST_CLIENT_S)


# In the program, and in its server, which imports it. `Guest.looks` tells how often the manager in the server has come
# to the point at which a worker leads if no process does.
LOOKS_FOR_LEADER = """
    import os, time
    from mpmm.model_manager import leader
    from mpmm.shared_state.snapshot import read_snapshot

    leader.DEPUTY_TICK_S = leader.DEPUTY_REST_S = leader.RESERVE_TICK_S = leader.RESERVE_REST_S = 0.02
    looks, elect = [], leader.Leader.elect


    def look(self):
        elect(self)
        looks.append(self)


    leader.Leader.elect = look


    class Guest(Detector):
        def looks(self):
            return len(looks)


    def load():
        MultiProcessShared(Guest, tag="detector", spawn_process=True, always_proxy=True).acquire()
        return "detector"


    def who_leads():
        found = read_snapshot("test")
        return [(member.kind, member.pid) for member in found.members if member.slot == found.leader]


    def leads_after_looks(proxy):
        '''Tell who leads once the guest has begun and ended ten looks from now on.'''
        until = proxy.looks() + 11
        while proxy.looks() < until:
            time.sleep(0.005)
        return who_leads()
"""


def test_a_manager_that_is_used_in_a_server_joins_but_neither_leads_nor_counts_as_a_worker(
    run_script: Callable[..., Any], start_method: str, runtime_root: Path
) -> None:
    done = run_script(
        MANAGER_AT_MODULE_LEVEL
        + LOOKS_FOR_LEADER
        + """
    if __name__ == "__main__":
        with manager.model("detector", load) as handle:
            proxy = MultiProcessShared(Guest, tag=handle, always_proxy=True).acquire()
            print(proxy.joins())
            print(sorted(member.kind for member in read_snapshot("test").members))
            led = who_leads()
            # The leader gives up its place, which only a worker may take: there is none.
            manager._connected().background.stop()
            print(led == leads_after_looks(proxy) == [("worker", manager._connected().namespace.pid)])
            # But a worker that joins takes it at once.
            child = os.fork()
            if not child:
                manager.all_models()
                leads = who_leads() == [("worker", os.getpid())]
                manager.shutdown()
                os._exit(0 if leads else 1)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            # It has left, and again the place is free.
            print(leads_after_looks(proxy), proxy.joins())
    """
    )
    expected = "a handle\n['guest', 'server', 'worker']\nTrue\n0\n[] a handle\n"
    assert (done.stdout, done.returncode) == (expected, 0), done.stderr
    wait_until(lambda: not files_in(runtime_root), "the server and its folder are gone", LAST_CLIENT_S)


def test_a_child_that_imports_the_program_does_not_keep_its_server_alive(
    run_script: Callable[..., Any], start_method: str, runtime_root: Path
) -> None:
    done = run_script(
        MANAGER_AT_MODULE_LEVEL
        + """
    from mpmm.shared_state.snapshot import read_snapshot
    import os, pathlib, time

    pathlib.Path(f"{__file__}.{os.getpid()}").touch()

    if __name__ == "__main__":
        with manager.model("detector", load) as handle:
            proxy = MultiProcessShared(Detector, tag=handle, always_proxy=True).acquire()
            imported = pathlib.Path(f"{__file__}.{proxy.has_child()}")
            while not imported.exists():
                time.sleep(0.02)
            time.sleep(0.3)
            print(sorted(member.kind for member in read_snapshot("test").members))
    """
    )
    assert (done.stdout, done.returncode) == ("['server', 'worker']\n", 0), done.stderr
    wait_until(lambda: not files_in(runtime_root), "the server, its child and its folder are gone", LAST_CLIENT_S)


def test_a_manager_in_a_server_joins_again_when_the_namespace_was_removed(new_manager: Callable[..., Any]) -> None:
    proxy: Any = MultiProcessShared(UsesManager, "it", spawn_process=True, always_proxy=True).acquire()
    first = new_manager()
    assert not proxy.attached()
    assert proxy.use() == "a handle"
    assert {member.kind for member in read_snapshot("test").members} == {"worker", "guest"}
    first.shutdown()
    second = new_manager()
    assert second.all_models() == {}
    assert proxy.use() == "a handle"
    assert {member.kind for member in read_snapshot("test").members} == {"worker", "guest"}
    assert len(second.all_models("part")) == 1
    unload("it")


# Without a main guard.


def test_loading_at_module_level_without_a_main_guard_is_an_error_at_once(
    run_script: Callable[..., Any], start_method: str
) -> None:
    watch = Stopwatch()
    done = run_script(
        MANAGER_AT_MODULE_LEVEL
        + """
    with manager.model("detector", load) as handle:
        pass
    """
    )
    assert done.returncode == 1
    assert "ServerStartError" in done.stderr
    assert 'if __name__ == "__main__":' in done.stderr
    assert watch.calm_s() < DEADLINE_S / 2


@pytest.mark.parametrize("tag", ["'it'", "str(os.getpid())"], ids=["same tag", "another tag"])
@pytest.mark.parametrize("spawn", [True, False], ids=["to spawn", "to host"])
def test_acquiring_at_module_level_without_a_main_guard_is_an_error_at_once(
    run_script: Callable[..., Any], start_method: str, tag: str, spawn: bool
) -> None:
    done = run_script(
        f"""
        import os
        from mpmm.multi_process_shared import MultiProcessShared
        if __name__ != "__main__":
            MultiProcessShared(dict, {tag}, spawn_process={spawn}).acquire()
        MultiProcessShared(dict, {tag}, spawn_process=True).acquire()
        """
    )
    assert done.returncode == 1
    assert "mpmm.errors.ServerStartError: Shared Server Process crashed: the main module failed" in done.stderr
    assert 'if __name__ == "__main__":' in done.stderr


def test_a_main_module_that_fails_in_the_server_says_so_to_the_starter(
    run_script: Callable[..., Any], start_method: str
) -> None:
    done = run_script(
        """
        from mpmm.multi_process_shared import MultiProcessShared
        if __name__ != "__main__":
            print("said before")
            raise LookupError("no configuration in a server")
        try:
            MultiProcessShared(dict, "it", spawn_process=True).acquire()
        except RuntimeError as error:
            print(type(error).__name__, "LookupError: no configuration in a server" in str(error))
        """
    )
    assert sorted(done.stdout.splitlines()) == ["ServerStartError True", "said before"]
    assert (done.stderr, done.returncode) == ("", 0)


# Output.


@pytest.fixture
def client() -> Iterator[Any]:
    """Keeps the registry, and with it the servers in it, while a program comes and goes."""
    registry = registry_for(None)
    registry.join()
    yield registry
    leave_all_registries()


def start_speaker(run_script: Callable[..., Any]) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = run_script(
        f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pets import Speaker
        from mpmm.multi_process_shared import MultiProcessShared
        if __name__ == "__main__":
            proxy = MultiProcessShared(Speaker, "it", spawn_process=True, always_proxy=True).acquire()
            proxy.say("hello")
            print(proxy.pid())
        """
    )
    return done


def test_a_server_does_not_keep_its_starters_pipes_open(
    run_script: Callable[..., Any], start_method: str, client: Any
) -> None:
    # Else this would not end before the server does, and that lives for our sake.
    done = start_speaker(run_script)
    said, pid = done.stdout.split()
    assert (said, done.returncode) == ("hello", 0), done.stderr
    assert "hello on stderr" in done.stderr
    assert server_pid("it") == int(pid)
    unload("it")


def bytes_of(paths: Iterable[Path]) -> int:
    """Return the size of files, some of which may be given another name meanwhile."""
    found = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


def text_of(paths: Iterable[Path]) -> str:
    """Return what files say, some of which may be given another name meanwhile."""
    found = ""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found += path.read_text()
    return found


def test_what_a_server_says_after_its_starters_end_is_in_a_file_of_bounded_length(
    run_script: Callable[..., Any], start_method: str, client: Any
) -> None:
    start_speaker(run_script)
    log = client.path / SERVERS_LOG
    wait_until(log.exists, "the server has turned to its log")
    proxy: Any = MultiProcessShared(Speaker, "it", always_proxy=True).acquire()
    pid = proxy.pid()
    proxy.say("still here")
    assert "still here\n" in log.read_text()
    assert "still here on stderr\n" in log.read_text()
    assert f"pid {pid}, which serves 'it', writes its output here" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    for _ in range(3):
        proxy.say_much(2)
        # Between the two looks it may be given its other name.
        wait_until(lambda: bytes_of([log]) < output.LOG_BYTES and log.exists(), "a new file was begun")
    # What it says just as it turns to the new file is in the old one: at most twice as much as at other times.
    assert bytes_of(client.path.glob("servers.log*")) < 5 * output.LOG_BYTES
    proxy.say("the end")
    # It may turn to a new file right after that.
    assert "the end\n" in text_of(client.path.glob("servers.log*"))
    unload("it")


def test_inspect_names_the_log_of_servers_once_there_is_one(
    new_manager: Callable[..., Any], capsys: pytest.CaptureFixture[str], client: Any
) -> None:
    new_manager()
    assert cli.main(["inspect", "test"]) == 0
    assert SERVERS_LOG not in capsys.readouterr().out
    (client.path / SERVERS_LOG).write_text("said\n")
    assert cli.main(["inspect", "test"]) == 0
    out = capsys.readouterr().out
    assert f"output of model servers that outlived the processes that started them: {client.path / SERVERS_LOG}" in out


def test_records_of_level_info_reach_the_starters_stderr(start_method: str, capfd: pytest.CaptureFixture[str]) -> None:
    proxy: Any = MultiProcessShared(Speaker, "it", spawn_process=True, always_proxy=True).acquire()
    proxy.say_through_logging("loaded 3 layers")
    assert capfd.readouterr().err == "INFO:a.library:loaded 3 layers\n"
    proxy.say_through_own_logging("loaded 4 layers")
    assert capfd.readouterr().err == "mine: loaded 4 layers\n"
    unload("it")


# Signals.


def test_sigterm_ends_a_server_in_the_middle_of_a_native_constructor(
    start_method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEGAN", str(tmp_path / "began"))
    ended_at_signal_in(LongNative, tmp_path / "began")


def ended_at_signal_in(constructor: Callable[[], Any], began: Path) -> None:
    """Start a server, send it SIGTERM once its constructor runs, and see it end."""
    import threading

    failures: list[BaseException] = []

    def start() -> None:
        try:
            MultiProcessShared(constructor, "it", spawn_process=True).acquire()
        except ServerStartError as error:
            failures.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    wait_until(lambda: began.exists() and began.read_text(), "the constructor runs")
    pid = int(began.read_text())
    os.kill(pid, signal.SIGTERM)
    try:
        wait_until(lambda: not is_running(pid), "the server ended")
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
        thread.join(DEADLINE_S)
    assert "exit code 143" in str(failures[0])


def test_sigterm_ends_a_server_whose_constructor_has_a_handler_of_its_own(
    start_method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEGAN", str(tmp_path / "began"))
    ended_at_signal_in(TakesSigterm, tmp_path / "began")


def test_sigterm_ends_a_server_while_it_imports_a_main_module_that_takes_the_signal(
    run_script: Callable[..., Any], start_method: str, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = tmp_path / "began"
    done = run_script(
        f"""
        import os, pathlib, signal, threading, time
        from mpmm.multi_process_shared import MultiProcessShared
        began = pathlib.Path({str(began)!r})
        if __name__ != "__main__":
            signal.signal(signal.SIGTERM, lambda *_: None)
            began.write_text(str(os.getpid()))
            while True:
                time.sleep(60)

        def end():
            while not began.exists() or not began.read_text():
                time.sleep(0.01)
            os.kill(int(began.read_text()), signal.SIGTERM)

        threading.Thread(target=end).start()
        MultiProcessShared(dict, "it", spawn_process=True).acquire()
        """
    )
    assert "exit code 143" in done.stderr


def test_sigterm_ends_a_server_whose_main_module_ignores_the_signal_while_its_object_is_made(
    run_script: Callable[..., Any], start_method: str, tmp_path: Path
) -> None:
    began = tmp_path / "began"
    done = run_script(
        f"""
        import os, pathlib, signal, threading, time
        from mpmm.multi_process_shared import MultiProcessShared
        began = pathlib.Path({str(began)!r})
        if __name__ != "__main__":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

        class Slow:
            def __init__(self):
                began.write_text(str(os.getpid()))
                time.sleep({DEADLINE_S})

        def end():
            while not began.exists() or not began.read_text():
                time.sleep(0.01)
            os.kill(int(began.read_text()), signal.SIGTERM)

        if __name__ == "__main__":
            threading.Thread(target=end).start()
            MultiProcessShared(Slow, "it", spawn_process=True).acquire()
        """,
        deadline_s=2 * DEADLINE_S,
    )
    assert "exit code 143" in done.stderr


def test_servers_that_end_together_with_the_last_client_do_not_wait_for_each_other(runtime_root: Path) -> None:
    tags = [f"server-{number}" for number in range(6)]
    proxies: list[Any] = [MultiProcessShared(Cats, tag, spawn_process=True, always_proxy=True) for tag in tags]
    for proxy in proxies:
        proxy.acquire()
    pids = [pid for tag in tags if (pid := server_pid(tag)) is not None]
    assert len(pids) == len(tags)
    watch = Stopwatch()
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    leave_all_registries()
    # The registry's folder goes last. If each waited for the next one to end, this would take two seconds for each.
    wait_until(lambda: not files_in(runtime_root), "the last one removed it")
    assert watch.calm_s() < registry_module.DYING_TIMEOUT_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_arrives_as_the_main_thread_falls_asleep_ends_the_server(start_method: str, number: int) -> None:
    """Such a signal was lost: Python notes it after the last bytecode, and nothing interrupts the wait again."""
    proxy: Any = MultiProcessShared(NotesSignals, "it", spawn_process=True, always_proxy=True).acquire()
    pid = proxy.pid()
    # The kernel gives it to another thread than the main one, which continues to sleep.
    with contextlib.suppress(ModelServerError):
        # It may be gone before it has answered.
        proxy.send_to_a_thread(number)
    wait_until(lambda: not is_running(pid), "the server ended")


def test_sigterm_to_a_child_of_a_server_ends_the_child_alone(start_method: str) -> None:
    proxy: Any = MultiProcessShared(ForksChildren, "it", spawn_process=True, always_proxy=True).acquire()
    for _ in range(3):
        assert proxy.end_child() == -signal.SIGTERM
    assert server_pid("it") is not None
    unload("it")


CHILD_ENDS = [("returns", 0), ("exits", 3), ("says", 1), ("raises", 1)]


@pytest.mark.parametrize(("child", "status"), CHILD_ENDS)
def test_a_child_that_a_constructor_forks_is_no_second_server(start_method: str, child: str, status: int) -> None:
    """It made a server of its own, or reported a failure, and took the socket of its parent away."""
    constructor = functools.partial(ForksAndComesBack, child)
    proxy: Any = MultiProcessShared(constructor, "it", spawn_process=True, always_proxy=True).acquire()
    assert proxy.forked_before() == status
    leave_all_registries()
    again: Any = MultiProcessShared(constructor, "it", spawn_process=True, always_proxy=True).acquire()
    assert again.fork(child) == status
    unload("it")


@pytest.mark.parametrize("spawn", [False, True], ids=["hosted", "spawned"])
@pytest.mark.parametrize(("child", "status"), CHILD_ENDS)
def test_a_child_that_a_call_forks_ends_with_the_call(
    spawn: bool, child: str, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """It followed the threads that answer for ever, and its parent waited for it."""
    proxy: Any = MultiProcessShared(ForksAndComesBack, "it", spawn_process=spawn, always_proxy=True).acquire()
    for _ in range(3):
        assert proxy.fork(child) == status
    assert proxy.forked_before() == -1
    MultiProcessShared(ForksAndComesBack, "it").unsafe_hard_delete()
    said = {"raises": "ValueError: in the child", "says": "a farewell"}.get(child, "")
    wait_until(lambda: said in capfd.readouterr().err, "the child has said why it ended")


@pytest.mark.parametrize(("closed", "opened"), [((), 0), ((1,), 0), ((2,), 0), ((0, 1, 2), 0), ((1, 2), 2)], ids=str)
def test_where_its_starter_has_no_standard_stream_a_server_has_none_of_its_descriptors(
    tmp_path: Path, start_method: str, closed: tuple[int, ...], opened: int
) -> None:
    """A daemon has closed its own: then those of the next files are called 0, 1 and 2, such as locks of mpmm.

    opened: so many files its program opens before that.
    """
    script, answer, own = tmp_path / "program.py", tmp_path / "answer", tmp_path / "own"
    script.write_text(
        textwrap.dedent(
            f"""
            import os
            files = [open({str(own)!r}, "a") for _ in range({opened})] if __name__ == "__main__" else []
            from pathlib import Path
            from mpmm.multi_process_shared import MultiProcessShared, unload
            class Speaks:
                def __init__(self):
                    print("printed", flush=True)
                    self.wrote = [os.write(number, b"written") for number in (1, 2)]
                def look(self):
                    streams = [os.readlink(f"/proc/self/fd/{{number}}") for number in (0, 1, 2)]
                    return self.wrote, streams, [os.get_inheritable(number) for number in (0, 1, 2)]
            if __name__ == "__main__":
                proxy = MultiProcessShared(Speaks, "it", spawn_process=True, always_proxy=True).acquire()
                Path({str(answer)!r}).write_text(repr(proxy.look()))
                unload("it")
            """
        )
    )
    # With other standard streams than those of this process, which may be anything.
    files = [tmp_path / "input", tmp_path / "output", tmp_path / "errors"]
    for file in files:
        file.touch()
    redirections = " ".join(
        f"{number}>&-" if number in closed else f"{number}<>{file}" for number, file in enumerate(files)
    )
    environment = {**os.environ, "PYTHONPATH": import_path()}
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, str(script)]
    assert subprocess.run(command, env=environment, timeout=DEADLINE_S, check=False).returncode == 0
    streams = [str(files[number]) if number and number not in closed else os.devnull for number in (0, 1, 2)]
    assert answer.read_text() == repr(([7, 7], streams, [True] * 3))
    assert files[1].read_text() == ("" if 1 in closed else "printed\nwritten")
    assert files[2].read_text() == ("" if 2 in closed else "written")
    assert not opened or own.read_text() == ""


def test_a_spawned_server_that_has_died_is_no_zombie_once_its_starter_acquires_another_ones_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MPMM_ZYGOTE", "0")
    dies, lives = (MultiProcessShared(Cats, tag, spawn_process=True, always_proxy=True) for tag in ("a", "b"))
    dies.acquire()
    proxy: Any = lives.acquire()
    pid = server_pid("a")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    # All its threads have ended; a process is a zombie as soon as the first one has.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert lives.acquire() is not proxy
    assert not psutil.pid_exists(pid)
    for tag in ("a", "b"):
        unload(tag)


def test_a_spawned_server_has_a_session_of_its_own(start_method: str) -> None:
    proxy: Any = MultiProcessShared(NotesSignals, "it", spawn_process=True, always_proxy=True).acquire()
    assert os.getsid(proxy.pid()) == proxy.pid()
    unload("it")


# Tags.


def name_of(constructor: Any) -> str:
    return str(getattr(constructor, "__name__", type(constructor).__name__))


def pets(constructor: Any, spawn: bool = False, tag: str = "pets") -> Any:
    return MultiProcessShared(constructor, tag, spawn_process=spawn, always_proxy=True).acquire()


@pytest.mark.parametrize("spawn", [False, True], ids=["hosted", "spawned"])
@pytest.mark.parametrize(
    ("first", "second"), [(Cats, Dogs), (make_cats, make_dogs), (make_cats, Dogs), (Cats, Lions)], ids=name_of
)
def test_a_tag_of_another_constructor_is_an_error_that_names_both(first: Any, second: Any, spawn: bool) -> None:
    assert pets(first, spawn).says() == "meow"
    with pytest.raises(InvalidArgumentError, match=rf"'pets'.*{first.__qualname__}.*{second.__qualname__}"):
        pets(second, spawn)
    assert pets(first).says() == "meow"
    MultiProcessShared(first, "pets").unsafe_hard_delete()
    assert pets(second).says() in ("woof", "meow")
    unload("pets")


@pytest.mark.parametrize("spawn", [False, True], ids=["hosted", "spawned"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Cats, lambda: None),
        (lambda: Cats(), Dogs),
        (make_cats, Cats),
        (Cats, make_cats),
        (Lions, Cats),
        (functools.partial(Cats), Dogs),
        (Cats, Cats),
    ],
    ids=name_of,
)
def test_constructors_that_may_mean_the_same_share_a_tag(first: Any, second: Any, spawn: bool) -> None:
    if spawn and "lambda" in name_of(first):
        pytest.importorskip("cloudpickle", reason="needs cloudpickle")
    assert pets(first, spawn).says() == "meow"
    assert pets(second, spawn).says() == "meow"
    unload("pets")


def test_a_class_of_the_same_name_in_another_module_is_another_one() -> None:
    namesake = type("Cats", (), {"__module__": "zoo", "says": lambda self: "hiss"})
    assert pets(Cats).says() == "meow"
    with pytest.raises(InvalidArgumentError, match=r"class pets:Cats has made.*one that class zoo:Cats makes"):
        pets(namesake)
    unload("pets")


def test_the_method_of_an_object_has_no_name_of_its_own_and_a_function_of_a_module_has_one() -> None:
    assert name_of_constructor(Cats().says) == ""
    assert name_of_constructor(os.getpid) == "function posix:getpid"


def test_a_class_of_the_main_module_is_that_of_the_servers_main_module(
    run_script: Callable[..., Any], start_method: str
) -> None:
    done = run_script(
        """
        from mpmm.multi_process_shared import MultiProcessShared
        class Cats:
            def says(self): return "meow"
            def other(self): return MultiProcessShared(Cats, "pets", always_proxy=True).acquire().says()
        class Dogs: pass
        if __name__ == "__main__":
            proxy = MultiProcessShared(Cats, "pets", spawn_process=True, always_proxy=True).acquire()
            print(MultiProcessShared(Cats, "pets").acquire().other())
            try:
                MultiProcessShared(Dogs, "pets").acquire()
            except ValueError as error:
                print(error)
        """
    )
    first, second = done.stdout.splitlines()
    assert first == "meow"
    assert "class __mp_main__:Cats" in second
    assert "class __main__:Dogs" in second


@pytest.mark.parametrize("constructor", [Cats, lambda: Cats()], ids=["named", "lambda"])
def test_a_tag_of_another_namespace_is_an_error_that_names_both(
    new_manager: Callable[..., Any], constructor: Any
) -> None:
    if constructor is not Cats:
        pytest.importorskip("cloudpickle", reason="needs cloudpickle")
    first, second = new_manager(namespace="project-a"), new_manager(namespace="project-b")

    def load() -> str:
        pets(constructor, True)
        return "pets"

    with first.model("pets", load) as handle:
        with pytest.raises(InvalidArgumentError, match=r"'pets'.*project-a.*project-b"):
            second.acquire_model("pets", load)
        assert pets(lambda: None, tag=handle).says() == "meow"
        # One that belongs to no namespace is for all to use.
        pets(Dogs, True, tag="others")
        with second.model("others", lambda: pets(Dogs, tag="others") and "others") as other:
            assert other == "others"
    for tag in ("pets", "others"):
        unload(tag)


# Handles whose servers are gone.


@pytest.mark.parametrize("spawn", [False, True], ids=["as Beam does", "to spawn"])
def test_a_handle_whose_server_has_just_died_is_an_error_and_never_a_new_object(
    new_manager: Callable[..., Any], start_method: str, spawn: bool
) -> None:
    manager = new_manager()

    def load() -> str:
        pets(Cats, True, tag="handle")
        return "handle"

    handle = manager.acquire_model("cats", load)
    proxy = pets(lambda: None, tag=handle)
    pid = server_pid(handle)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ModelServerError):
        proxy.says()
    for _ in range(3):
        with pytest.raises(ModelServerError, match=r"'handle' \(namespace test\) is gone"):
            pets(lambda: None, spawn, tag=handle)
    assert server_pid(handle) is None
    manager.release_model("cats", handle)
    # A loader may well use the same tag again.
    with manager.model("cats", load) as again:
        assert pets(lambda: None, tag=again).says() == "meow"


def test_a_handle_that_was_unloaded_is_an_error_until_its_user_deletes_it(new_manager: Callable[..., Any]) -> None:
    manager = new_manager()
    with manager.model("cats", lambda: pets(Cats, True, tag="handle") and "handle"):
        pass
    manager.force_reset()
    wait_until(lambda: server_pid("handle") is None, "unloaded")
    with pytest.raises(ModelServerError, match="'handle'"):
        pets(lambda: None, tag="handle")
    MultiProcessShared(Cats, "handle").unsafe_hard_delete()
    assert pets(Cats, tag="handle").says() == "meow"
    unload("handle")


def test_so_many_handles_are_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MOST_HANDLES", 8)
    registry = registry_for(None)
    registry.join()
    for number in range(40):
        registry.remember_handle(f"tag {number}", ("test",))
        assert registry.namespaces_of_handle(f"tag {number}") == ("test",)
    assert len(list((registry.path / registry_module.HANDLES).iterdir())) <= 8
    assert registry.namespaces_of_handle("tag 0") == ()
