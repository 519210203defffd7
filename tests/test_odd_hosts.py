"""Unusual hosts and programs.

They lack shared memory, /proc, space, rights, a working directory or a main file, or change process-wide settings.

Either everything works there, or an MpmmError says at once what is missing, who owns it, and what to change.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from containers import NOBODY, as_nobody, as_root, can_unshare, run_unshared
from harness import import_path

from mpmm import ModelManager, MultiProcessShared
from mpmm.cli import main
from mpmm.errors import RuntimeDirectoryError, SegmentAllocationError
from mpmm.multi_process_shared.registry import leave_all_registries
from mpmm.multi_process_shared.rpc import sockets
from mpmm.shared_state import segment as segment_module
from mpmm.shared_state.file_errors import file_error
from mpmm.shared_state.leftovers import prune
from mpmm.shared_state.lock_file import LockFile, write_once
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.segment import Segment, segment_name
from mpmm.shared_state.snapshot import find_lost_namespaces, find_namespaces, read_snapshot

PROGRAM = """
import os, sys
from mpmm import ModelManager, MultiProcessShared

class Detector:
    def predict(self, number):
        return 2 * number

def serve():
    MultiProcessShared(Detector, tag="detector-1", spawn_process=True, always_proxy=True).acquire()
    return "detector-1"

if __name__ == "__main__":
    with ModelManager(namespace="odd", memory_source="booked") as manager, manager.model("detector", serve) as handle:
        print(MultiProcessShared(Detector, tag=handle, always_proxy=True).acquire().predict(21))
"""


# ---- files of others --------------------------------------------------------------------------------------------

LOOKS: dict[str, Callable[[Path], object]] = {
    "list": find_namespaces,
    "lost": find_lost_namespaces,
    "inspect": lambda root: read_snapshot("n", root),
    "prune": prune,
    "join": lambda root: Namespace.join("n", root=root),
    "join below": lambda root: Namespace.join("n", root=root / "below"),
    "lock": lambda root: LockFile(root / "n" / "alive.lock"),
    "token": lambda root: write_once(root / "token", "text"),
}


@as_root
@pytest.mark.parametrize("look", LOOKS)
def test_another_user_is_told_whose_files_these_are_and_what_to_set(runtime_root: Path, look: str) -> None:
    (runtime_root / "n").mkdir(mode=0o700, parents=True)
    runtime_root.chmod(0o700)
    answer = as_nobody(lambda: LOOKS[look](runtime_root))
    assert answer.startswith("RuntimeDirectoryError("), answer
    assert f"{runtime_root} " in answer
    assert "belongs to uid 0" in answer
    assert str(NOBODY) in answer
    assert "MPMM_RUNTIME_DIR" in answer
    (runtime_root / "n").rmdir()


@as_root
def test_commands_say_so_too(runtime_root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime_root.mkdir(mode=0o700, exist_ok=True)
    below = str(runtime_root / "below")
    for command in (["list"], ["inspect"], ["inspect", "n"], ["prune"], ["check", "--health"], ["ps"]):
        assert as_nobody(lambda command=command: main(["--runtime-root", below, *command])) == "2"  # type: ignore[misc]  # mypy has no type for a lambda's default
        said = capfd.readouterr().err
        assert f"{runtime_root} belongs to uid 0 (root), and this process runs as uid {NOBODY}" in said, command
        assert "Errno" not in said


@as_root
@pytest.mark.parametrize("made", ["lock", "segment"])
def test_a_file_of_another_user_in_a_folder_of_ones_own(runtime_root: Path, made: str) -> None:
    runtime_root.mkdir(mode=0o700, exist_ok=True)
    path = runtime_root / "file.lock"
    if made == "segment":
        path = Path("/dev/shm") / segment_name(runtime_root, "n")
    path.touch(mode=0o600)
    os.chown(runtime_root, NOBODY, -1)
    try:
        answer = as_nobody(lambda: LockFile(path) if made == "lock" else Segment.open(path.name))
        assert f"{path} belongs to uid 0 (root), and this process runs as uid {NOBODY}" in answer
    finally:
        os.chown(runtime_root, 0, -1)
        path.unlink()


@as_root
def test_a_folder_of_ones_own_without_rights_asks_for_its_mode(runtime_root: Path) -> None:
    own = runtime_root.with_name(f"{runtime_root.name}-own")
    own.mkdir(mode=0o500)
    os.chown(own, NOBODY, -1)
    try:
        assert "change its mode (0500)" in as_nobody(lambda: Namespace.join("n", root=own / "below"))
    finally:
        own.rmdir()


def test_what_passes_or_is_missing_keeps_the_words_of_the_system() -> None:
    for error in (
        FileNotFoundError(2, "No such file"),
        OSError(24, "Too many open files"),
        BlockingIOError(11, "Later"),
    ):
        assert file_error(error, "/somewhere") is error
    told = RuntimeDirectoryError("told", path="/somewhere")
    assert file_error(told, "/elsewhere") is told


# ---- hosts without something ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "what"),
    [(2, "has no /dev/shm"), (30, "read-only"), (13, "this user"), (27, "ulimit -f"), (28, "free or enlarge /dev/shm")],
)
def test_shared_memory_that_is_refused_is_one_error_and_leaves_nothing(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch, number: int, what: str
) -> None:
    def refuse(name: str, size: int) -> object:
        raise OSError(number, os.strerror(number), f"/{name}")

    monkeypatch.setattr(segment_module, "_shared_memory", refuse)
    with pytest.raises(SegmentAllocationError, match=what):
        Namespace.join("n", root=runtime_root)
    assert not (runtime_root / "n").exists()


@can_unshare
def test_without_shared_memory_at_all_the_first_call_says_so_and_looks_find_nothing() -> None:
    answer = run_unshared(
        ["--mount"],
        """
        import subprocess, tempfile
        from mpmm import ModelManager, SegmentAllocationError
        from mpmm.cli import main

        empty = tempfile.mkdtemp()
        for name in ("null", "urandom"):
            open(f"{empty}/{name}", "w").close()
            subprocess.run(["mount", "--bind", f"/dev/{name}", f"{empty}/{name}"], check=True)
        subprocess.run(["mount", "--rbind", empty, "/dev"], check=True)
        try:
            ModelManager(namespace="n", memory_source="booked")
        except SegmentAllocationError as error:
            print("mount a tmpfs there" in str(error), main(["list"]), main(["prune"]))
        subprocess.run(["umount", "-R", "/dev"], check=True)
        subprocess.run(["umount", f"{empty}/null", f"{empty}/urandom"], check=True)
        subprocess.run(["rm", "-r", empty], check=True)
        """,
    )
    assert answer.splitlines()[-1] == "True 0 0"


@can_unshare
def test_without_proc_the_first_call_says_so_and_leaves_nothing(runtime_root: Path) -> None:
    answer = run_unshared(
        ["--mount"],
        """
        import os, subprocess
        from mpmm import ModelManager, RuntimeDirectoryError

        subprocess.run(["mount", "-t", "tmpfs", "none", "/proc"], check=True)
        before = set(os.listdir("/dev/shm"))
        try:
            ModelManager(namespace="n", memory_source="booked")
        except RuntimeDirectoryError as error:
            print(error.path, set(os.listdir("/dev/shm")) - before)
        """,
    )
    assert answer == "/proc set()"
    assert not (runtime_root / "n").exists()


@can_unshare
@pytest.mark.parametrize("limit", ["nr_inodes=4", "nr_inodes=11", "size=4k"])
def test_a_runtime_directory_without_room_says_which_file_had_none(tmp_path: Path, limit: str) -> None:
    answer = run_unshared(
        ["--mount"],
        f"""
        import os, subprocess, sys
        subprocess.run(["mount", "-t", "tmpfs", "-o", "{limit}", "none", "{tmp_path}"], check=True)
        environment = {{**os.environ, "MPMM_RUNTIME_DIR": "{tmp_path}/root", "MPMM_ZYGOTE": "0"}}
        done = subprocess.run([sys.executable, "-"], env=environment, input={PROGRAM!r}, capture_output=True, text=True)
        print(done.stderr)
        """,
    )
    # In a server or here: the text of a server's error also comes last.
    last = answer.splitlines()[-1]
    assert last.startswith(f"mpmm.errors.RuntimeDirectoryError: {tmp_path}/root/"), answer
    assert "free space" in last


# ---- programs without something ---------------------------------------------------------------------------------


@pytest.fixture
def folder_that_is_removed(tmp_path: Path) -> Iterator[Path]:
    """A folder for a program that removes it as the first thing it does."""
    folder = tmp_path / "removed"
    folder.mkdir()
    yield folder
    assert not folder.exists()


def run_program(program: str, *arguments: str, folder: Path | None = None, **environment: str) -> str:
    """Run a Python program; return the last line that it says, on either stream."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        cwd=folder,
        # Where the working directory was removed and stands on the path, Python 3.13.0 fails to import anything.
        env={**os.environ, "PYTHONPATH": import_path(), "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_a_program_whose_working_directory_was_removed_can_start_no_server_and_is_told_so(
    folder_that_is_removed: Path,
) -> None:
    said = run_program(f"import os; os.rmdir(os.getcwd()){PROGRAM}", folder=folder_that_is_removed)
    assert said.startswith(
        "mpmm.errors.ServerStartError: a model server for 'detector-1' begins in the working directory"
    )


def test_a_relative_runtime_directory_below_a_removed_one_is_an_error_that_says_so(
    folder_that_is_removed: Path,
) -> None:
    program = "import os; os.rmdir(os.getcwd()); from mpmm import ModelManager; ModelManager(namespace='n')"
    said = run_program(program, folder=folder_that_is_removed, MPMM_RUNTIME_DIR="relative")
    assert said.startswith("mpmm.errors.RuntimeDirectoryError: the runtime directory 'relative' is relative to")


def of_a_zip(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "program.pyz", "w") as archive:
        archive.writestr("__main__.py", PROGRAM)
    return [str(folder / "program.pyz")]


def of_a_package(folder: Path) -> list[str]:
    (folder / "odd_package").mkdir()
    (folder / "odd_package" / "__init__.py").touch()
    (folder / "odd_package" / "__main__.py").write_text(PROGRAM)
    return ["-m", "odd_package"]


def of_a_script_that_is_gone(folder: Path) -> list[str]:
    (folder / "program.py").write_text(f"import os\nos.unlink(__file__)\n{PROGRAM}")
    return [str(folder / "program.py")]


MAIN_MODULES: dict[str, Callable[[Path], list[str]]] = {
    "standard input": lambda _: ["-"],
    "command line": lambda _: ["-c", PROGRAM],
    "zip archive": of_a_zip,
    "package": of_a_package,
    "script that is gone": of_a_script_that_is_gone,
}


@pytest.mark.parametrize("switch", ["0", "1"], ids=["spawn", "zygote"])
@pytest.mark.parametrize("kind", MAIN_MODULES)
def test_servers_have_what_a_main_module_defines_that_they_cannot_import(
    tmp_path: Path, kind: str, switch: str
) -> None:
    pytest.importorskip("cloudpickle", reason="needs cloudpickle")
    done = subprocess.run(
        [sys.executable, *MAIN_MODULES[kind](tmp_path)],
        input=PROGRAM,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": import_path(), "MPMM_ZYGOTE": switch},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("42\n", "")


# ---- programs that set something for all that is in them ---------------------------------------------------------

SETTINGS = """
import contextlib, os, signal, socket, time
import psutil
from mpmm import ModelManager, ModelServerError, MultiProcessShared

{setting}

class Detector:
    def slow(self, numbers):
        time.sleep(0.6)
        return sum(numbers)

    def pid_and_sigpipe(self):
        return os.getpid(), signal.getsignal(signal.SIGPIPE).name

def serve():
    MultiProcessShared(Detector, tag="detector-1", spawn_process=True, always_proxy=True).acquire()
    return "detector-1"

if __name__ == "__main__":
    with ModelManager(namespace="odd", memory_source="booked") as manager, manager.model("detector", serve) as handle:
        detector = MultiProcessShared(Detector, tag=handle, always_proxy=True).acquire()
        {use}
"""


def run_settings(setting: str, use: str, switch: str = "1", *options: str) -> tuple[int, str, str]:
    """Run a program that sets something and then uses a model server; return how it ends and what it says."""
    done = subprocess.run(
        [sys.executable, *options, "-c", SETTINGS.format(setting=setting, use=use)],
        env={**os.environ, "PYTHONPATH": import_path(), "MPMM_ZYGOTE": switch},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def cloudpickle() -> None:
    pytest.importorskip("cloudpickle", reason="needs cloudpickle")


@pytest.mark.usefixtures("cloudpickle")
@pytest.mark.parametrize("switch", ["0", "1"], ids=["spawn", "zygote"])
@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_default_time_limit_of_sockets_is_none_for_calls_of_model_servers(seconds: float, switch: str) -> None:
    """As programs set it that download: a call longer than that said that its server had ended."""
    use = "print(detector.slow(range(3)), detector.slow([b''] * 0 + [1] * 100_000))"
    assert run_settings(f"socket.setdefaulttimeout({seconds})", use, switch) == (0, "3 100000\n", "")


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_nor_is_it_one_for_the_sockets_of_servers(seconds: float) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        one, other = sockets.pair()
        for end in (one, other):
            with sockets.duplicate(end.fileno()) as copy:
                assert (copy.gettimeout(), end.gettimeout()) == (None, None)
            assert os.get_blocking(end.fileno())
            end.close()
    finally:
        socket.setdefaulttimeout(before)


@pytest.mark.usefixtures("cloudpickle")
@pytest.mark.parametrize("switch", ["0", "1"], ids=["spawn", "zygote"])
def test_a_server_that_dies_is_an_error_also_where_sigpipe_ends_the_program(switch: str) -> None:
    use = """pid, found = detector.pid_and_sigpipe()
        print(found)
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        for numbers in ([1], [1] * 100_000):
            try:
                detector.slow(numbers)
            except ModelServerError:
                print("gone")"""
    setting = "signal.signal(signal.SIGPIPE, signal.SIG_DFL)"
    # The server has the program's main module, too, but answers clients that may go.
    assert run_settings(setting, use, switch) == (0, "SIG_IGN\ngone\ngone\n", "")


def test_a_write_to_a_pipe_without_reader_is_an_error_alone() -> None:
    program = """
    import os, signal
    from mpmm.interpreter.sigpipe import without_sigpipe

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    reader, writer = os.pipe()
    os.close(reader)
    for _ in range(2):
        try:
            with without_sigpipe():
                os.write(writer, b"text")
        except BrokenPipeError:
            print(signal.sigpending(), signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
    os.write(writer, b"text")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGPIPE, "set() set()\n" * 2)


@pytest.mark.usefixtures("cloudpickle")
@pytest.mark.parametrize(
    "options", [("-W", "error", "-X", "dev"), ("-X", "warn_default_encoding", "-W", "error"), ("-bb",)]
)
def test_nothing_of_ours_is_worth_a_warning(options: tuple[str, ...]) -> None:
    use = "print(detector.slow(range(3)), manager.tickets())"
    assert run_settings("", use, "0", *options) == (0, "3 []\n", "")


@pytest.mark.usefixtures("cloudpickle")
def test_an_interpreter_that_is_not_there_is_named() -> None:
    setting = "import multiprocessing; multiprocessing.set_executable('/no/python')"
    status, _, said = run_settings(setting, "pass", "0")
    assert status == 1
    assert "there is no interpreter at '/no/python'" in said.splitlines()[-1]


@pytest.mark.parametrize(
    "call", ["manager.release_model('a', handle)", "ModelManager(namespace='odd')", "manager.pin('a')"]
)
def test_a_finalizer_at_the_very_end_of_the_interpreter_joins_nothing_again(runtime_root: Path, call: str) -> None:
    program = f"""
    from mpmm import ClosedError, ModelManager

    class Last:
        def __del__(self):
            try:
                {call}
            except ClosedError as error:
                print(error)

    manager = ModelManager(namespace="odd", memory_source="booked")
    handle = manager.acquire_model("a", lambda: "a handle")
    last = Last()
    """
    assert run_program(program) == "the interpreter is ending, and this process has left namespace 'odd'"
    assert not (runtime_root / "odd").exists()


@as_root
def test_a_process_that_drops_its_rights_after_a_fork_is_one_of_the_other_user(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As workers of gunicorn with `--user` and `--preload` do."""
    # The one test that needs the folder that is the default.
    tag = f"of-{os.getpid()}"
    monkeypatch.delenv("MPMM_RUNTIME_DIR")
    own = Path(f"/tmp/mpmm-{NOBODY}")

    def use() -> tuple[object, ...]:
        with manager.model("a", lambda: "a handle") as handle:
            folders = sorted(path.name for path in own.iterdir())
        served: Any = MultiProcessShared(dict, f"{tag}-other", always_proxy=True).acquire()
        answer = served.get("key", 42)
        MultiProcessShared(dict, f"{tag}-other").unsafe_hard_delete()
        manager.shutdown()
        leave_all_registries()
        return handle, tag in folders, answer, own.joinpath(tag).exists()

    with ModelManager(namespace=tag, memory_source="booked") as manager:
        MultiProcessShared(dict, tag, always_proxy=True).acquire()
        with manager.model("a", lambda: "a handle"):
            answer = as_nobody(use)
        MultiProcessShared(dict, tag).unsafe_hard_delete()
    assert answer == "('a handle', True, 42, False)"


@pytest.mark.usefixtures("cloudpickle")
def test_a_main_module_without_a_spec_is_a_script() -> None:
    """As the debugger leaves it, and multiprocessing cannot bear it."""
    setting = "import sys; vars(sys.modules['__main__']).pop('__spec__', None)"
    assert run_settings(setting, "print(detector.slow([1, 2]))") == (0, "3\n", "")


WITHOUT_STANDARD_DESCRIPTORS = """
import os, sys
from pathlib import Path
from mpmm import ModelManager, MultiProcessShared

class Detector:
    def predict(self, number):
        print("predicts", flush=True)
        print("warns", file=sys.stderr, flush=True)
        return 2 * number

def serve():
    MultiProcessShared(Detector, tag="detector-1", spawn_process=True, always_proxy=True).acquire()
    return "detector-1"

def use():
    with manager.model("detector", serve) as handle:
        answer = MultiProcessShared(Detector, tag=handle, always_proxy=True).acquire().predict(21)
    # As a C library warns.
    for standard in 1, 2:
        os.write(standard, b"warns" * 100)
    with manager.model("other", lambda: "a handle"):
        return answer, [os.readlink(f"/proc/self/fd/{standard}") for standard in range(3)]

if __name__ == "__main__":
    if sys.argv[2] == "later":
        manager = ModelManager(namespace="odd", memory_source="booked")
    for standard in range(3):
        os.close(standard)
    if sys.argv[2] == "before":
        manager = ModelManager(namespace="odd", memory_source="booked")
    answer = use()
    manager.shutdown()
    Path(sys.argv[1]).write_text(str(answer))
"""


@pytest.mark.parametrize("switch", ["0", "1"], ids=["spawn", "zygote"])
@pytest.mark.parametrize("closed", ["before", "later"])
def test_no_file_of_ours_is_ever_a_standard_output(tmp_path: Path, closed: str, switch: str) -> None:
    """As some daemons are started, or close them: a server's output used to go into the segment, or a lock file."""
    program, answer = tmp_path / "program.py", tmp_path / "answer"
    program.write_text(WITHOUT_STANDARD_DESCRIPTORS)
    subprocess.run(
        [sys.executable, program, answer, closed],
        env={**os.environ, "PYTHONPATH": import_path(), "MPMM_ZYGOTE": switch},
        timeout=60,
        check=True,
    )
    assert answer.read_text() == "(42, ['/dev/null', '/dev/null', '/dev/null'])"


@pytest.mark.parametrize("closed", [(), (0,), (1, 2), (0, 1, 2)])
def test_standard_descriptors_that_are_closed_are_nothing_and_others_stay(closed: tuple[int, ...]) -> None:
    program = f"""
    import os
    from mpmm.interpreter.standard_descriptors import keep_standard_descriptors
    was = [os.readlink(f"/proc/self/fd/{{fd}}") for fd in range(3)]
    said = os.dup(1)
    for fd in {closed}:
        os.close(fd)
    for _ in range(2):
        keep_standard_descriptors()
        now = [os.readlink(f"/proc/self/fd/{{fd}}") for fd in range(3)]
        assert now == ["/dev/null" if fd in {closed} else was[fd] for fd in range(3)], now
        assert all(map(os.get_inheritable, range(3)))
        assert os.dup(said) == said + 1
        os.close(said + 1)
    os.write(said, b"as expected")
    """
    assert run_program(program) == "as expected"


@pytest.mark.parametrize("call", ["manager.acquire_model('a', str)", "manager.shutdown()"])
def test_a_program_that_closes_what_it_has_not_opened_is_told_so(runtime_root: Path, call: str) -> None:
    """As python-daemon does, which closes all descriptors, and does not fork first where init has started it."""
    program = f"""
    import logging, os
    from mpmm import ModelManager
    logging.disable()
    manager = ModelManager(namespace="odd", memory_source="booked")
    with manager.model("a", lambda: "a handle"):
        pass
    os.closerange(3, 1000)
    try:
        {call}
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}", flush=True)
    os._exit(0)
    """
    said = run_program(program)
    prune(runtime_root)
    assert said.startswith("RuntimeDirectoryError: this process has lost the lock on /")
    assert "some code in it has closed descriptors that it does not own" in said


@pytest.mark.parametrize("switch", ["0", "1"], ids=["spawn", "zygote"])
def test_an_exit_code_that_nobody_tells_is_not_made_up(switch: str) -> None:
    """Where SIGCHLD is ignored, the kernel tells the end of a child, and not how it ended."""
    program = """
    import functools, os, signal
    from mpmm import MultiProcessShared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    MultiProcessShared(functools.partial(os._exit, 7), "it", spawn_process=True).acquire()
    """
    why = {"0": "(this program ignores SIGCHLD, or something else in it has waited for all children)"}
    text = f"Shared Server Process died unexpectedly {why.get(switch, 'with exit code 7')} while it made 'it'"
    assert run_program(program, MPMM_ZYGOTE=switch) == f"mpmm.errors.ServerStartError: {text}"
