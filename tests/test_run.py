"""`mpmm run`: real programs on leases, started by a real command line."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import (
    NewGate,
    NewManager,
    NewProcess,
    acquire,
    has_ended,
    import_path,
    learn,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Gate, Loads
from patience import DEADLINE_S

from mpmm.cli import main
from mpmm.errors import ClosedError
from mpmm.model_manager import ModelManager
from mpmm.shared_state.snapshot import InstanceInfo, find_namespaces, read_snapshot

Start = Callable[..., subprocess.Popen[str]]

SOON_S = 1.5
# One device of 16 GB, by accounting.
SIXTEEN_GB: dict[str, Any] = {"memory_source": "booked", "fallback_memory_mb": 16000.0, "slack_percentage": 0.1}


@pytest.fixture
def start(namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts `mpmm run` in the namespace, and kills what still runs at the end."""
    monkeypatch.setenv("PYTHONPATH", import_path())
    started: list[subprocess.Popen[str]] = []

    def begin(mb: float, *program: object, options: tuple[str, ...] = (), **arguments: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mpmm.cli", "run", "--mb", str(mb), "--namespace", namespace, *options, "--"]
        process = subprocess.Popen(
            [*command, *(str(argument) for argument in program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **arguments,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def until(gate: Gate, began: Gate | None = None) -> tuple[str, ...]:
    """Return a program, one process, that opens a gate and ends when another one is opened."""
    opening = f"printf 1 > {began._path}; " if began is not None else ""
    return "sh", "-c", f"{opening}exec head -c 1 {gate._path}"


def leases(namespace: str) -> list[InstanceInfo]:
    """Return the leases that are held."""
    return [copy for copy in read_snapshot(namespace).instances if copy.state == "leased"]


def test_two_programs_of_6_gb_and_a_model_of_8_gb_take_turns_on_16_gb(
    namespace: str, new_process: NewProcess, start: Start, new_gate: NewGate
) -> None:
    worker = new_process(**SIXTEEN_GB)
    worker.call(learn, model=8000)
    worker.call(acquire, "model", Loads("model"))
    began, go = [new_gate(), new_gate()], [new_gate(), new_gate()]
    first = start(6000, *until(go[0], began[0]))
    began[0].wait()
    second = start(6000, *until(go[1], began[1]))
    wait_until(lambda: waiting(namespace, "sh"), "the second program waits")
    assert not began[1].is_open()
    # Idle, the model makes room for the second program.
    worker.call(release)
    began[1].wait()
    assert [lease.reserved_mb for lease in leases(namespace)] == [6000, 6000]
    worker.send(acquire, "model", Loads("model"))
    wait_until(lambda: waiting(namespace, "model"), "the model waits in turn")
    assert problems(namespace) == []
    go[0].open()
    assert first.wait(DEADLINE_S) == 0
    worker.result(SOON_S)
    assert [lease.reserved_mb for lease in leases(namespace)] == [6000]
    go[1].open()
    assert second.wait(DEADLINE_S) == 0
    snapshot = read_snapshot(namespace)
    assert [(copy.tag, copy.state) for copy in snapshot.instances] == [("model", "active")]
    assert problems(namespace) == []


def test_killed_with_minus_9_its_program_goes_too_and_its_lease_is_back_within_a_second(
    namespace: str, new_process: NewProcess, start: Start, new_gate: NewGate
) -> None:
    worker = new_process(**SIXTEEN_GB)
    worker.call(learn, model=12000)
    began = new_gate()
    run = start(6000, *until(new_gate(), began))
    began.wait()
    wait_until(lambda: leases(namespace)[0].program, "it is known which process uses the memory")
    program = psutil.Process(leases(namespace)[0].program)
    worker.send(acquire, "model", Loads("model"))
    wait_until(lambda: waiting(namespace, "model"), "the model waits")
    run.kill()
    killed = time.monotonic()
    worker.result(SOON_S)
    print(f"the lease was back after {time.monotonic() - killed:.2f} s")
    # It has closed its files by now, but may be a moment from its end.
    wait_until(lambda: has_ended(program), "its program has ended")
    assert problems(namespace) == []


def test_a_child_that_outlives_the_killed_program_keeps_the_lease(
    namespace: str, new_process: NewProcess, start: Start, new_gate: NewGate
) -> None:
    worker = new_process(**SIXTEEN_GB)
    worker.call(learn, model=12000)
    began, go = new_gate(), new_gate()
    # The shell dies with `mpmm run`; its child, whose parent it is, does not.
    run = start(6000, "sh", "-c", f"sh -c 'printf 1 > {began._path}; exec head -c 1 {go._path}'; true")
    began.wait()
    run.kill()
    run.wait(DEADLINE_S)
    worker.send(acquire, "model", Loads("model"))
    wait_until(lambda: any(ticket.waited_s > SOON_S for ticket in waiting(namespace)), "the model waits for long")
    assert [lease.reserved_mb for lease in leases(namespace)] == [6000]
    go.open()
    worker.result(SOON_S)
    assert leases(namespace) == []


def test_a_child_that_was_started_without_the_programs_descriptors_lives_on_without_the_lease(
    namespace: str, new_manager: NewManager, start: Start, new_gate: NewGate
) -> None:
    manager = new_manager()
    began, go, ended = new_gate(), new_gate(), new_gate()
    child = f"printf 1 > {began._path}; head -c 1 {go._path}; printf 1 > {ended._path}"
    program = f"import subprocess; subprocess.run(['sh', '-c', {child!r}])"
    run = start(900, sys.executable, "-c", program)
    began.wait()
    run.kill()
    with manager.reserve(900, timeout_seconds=DEADLINE_S):
        # As `mpmm run --help` says.
        assert not ended.is_open()
        go.open()
        ended.wait()


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 128 + signal.SIGTERM), ("kill -9 $$", 137)]
)
def test_the_exit_status_is_the_programs(namespace: str, start: Start, script: str, status: int) -> None:
    run = start(100, "sh", "-c", script)
    assert run.wait(DEADLINE_S) == status
    # It was the only member, and has left nothing behind.
    assert find_namespaces() == []


def test_a_program_is_told_its_share_of_the_devices(
    new_manager: NewManager, start: Start, new_device: Callable[..., Any]
) -> None:
    manager = new_manager(fallback_memory_mb=6000)
    script = "echo $MPMM_LEASE_MB $MPMM_DEVICES $MPMM_MEMORY_FRACTION"
    told, _ = start(1000, "sh", "-c", script).communicate(timeout=DEADLINE_S)
    assert told.split() == ["1000", "booked", "0.166"]
    with ModelManager(namespace="two", memory_source=new_device(1000, 2000)) as two, two.reserve(1200, span=2) as lease:
        shares = lease.environment()
        assert shares["MPMM_MEMORY_FRACTION"] == "0.600"
        assert len(shares["MPMM_DEVICES"].split(",")) == 2
    with pytest.raises(ClosedError):
        lease.environment()
    with manager.reserve(0.5) as tiny:
        assert tiny.environment()["MPMM_MEMORY_FRACTION"] == "0.000"
    assert "MPMM_MEMORY_FRACTION" not in tiny.environment()


def test_the_standard_streams_are_the_programs(new_manager: NewManager, start: Start) -> None:
    new_manager()
    run = start(100, "sh", "-c", "read line; echo got $line; echo trouble >&2")
    assert run.communicate("a line\n", DEADLINE_S) == ("got a line\n", "trouble\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_program_which_decides_what_becomes_of_it(
    namespace: str, start: Start, number: signal.Signals
) -> None:
    script = f"import signal, sys; signal.signal({int(number)}, lambda *_: sys.exit(9)); print('ready', flush=True)"
    run = start(100, sys.executable, "-c", f"{script}; signal.pause()")
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    run.send_signal(number)
    assert run.wait(DEADLINE_S) == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_and_takes_it_out_of_the_queue(
    namespace: str, new_manager: NewManager, start: Start, number: signal.Signals
) -> None:
    manager = new_manager()
    with manager.reserve(900):
        run = start(200, "true", options=("--name", "patient"))
        wait_until(lambda: waiting(namespace, "patient"), "it waits")
        run.send_signal(number)
        assert run.wait(DEADLINE_S) == 128 + number
        snapshot = read_snapshot(namespace)
        assert (snapshot.tickets, len(snapshot.members)) == ((), 1)


def run_patched(namespace: str, patches: str, *program: str) -> subprocess.CompletedProcess[str]:
    """Do what `mpmm run` does, in a process whose script first patches what `run_on_lease` uses."""
    imports = """
import os, signal, subprocess, sys, threading
from mpmm.interpreter.thread_starts import start_thread
from mpmm.model_manager import run_command
"""
    where = f"name='it', namespace={namespace!r}, root=None, wait_seconds={DEADLINE_S}"
    script = f"{imports}{patches}\nsys.exit(run_command.run_on_lease({program!r}, 10.0, {where}))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_S)


# Told to end just before its program starts.
TOLD_TO_END = """
popen = subprocess.Popen

def be_told_to_end_and_start(command, **options):
    if command[0] == "sh":
        os.kill(os.getpid(), signal.SIGTERM)
    return popen(command, **options)

subprocess.Popen = be_told_to_end_and_start
"""
# As threads of mpmm are started during the wait for the lease.
STARTS_A_THREAD = """
from mpmm.model_manager.manager import ModelManager

reserve = ModelManager.reserve

def start_a_thread_and_reserve(*arguments, **options):
    start_thread(threading.Thread(target=threading.Event().wait, daemon=True))
    return reserve(*arguments, **options)

ModelManager.reserve = start_a_thread_and_reserve
"""


@pytest.mark.usefixtures("start")
@pytest.mark.parametrize("threads", ["of mpmm", "of libraries"])
def test_a_signal_reaches_the_program_and_no_thread_takes_it(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    new_manager()
    patches = TOLD_TO_END
    if threads == "of mpmm":
        patches += STARTS_A_THREAD
        # NumPy, which this script imports too early, starts none.
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    done = run_patched(namespace, patches, "sh", "-c", "while :; do sleep 0.01; done")
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.usefixtures("start")
def test_a_program_that_ends_unnoticed_because_a_thread_has_taken_the_signal_is_seen_soon(
    namespace: str, new_manager: NewManager
) -> None:
    new_manager()
    patches = """
class Popen(subprocess.Popen):
    has_ended = False

    def poll(self):
        if self.has_ended:
            return super().poll()
        # It ends just after this look, and a thread takes the signal that says so.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        signal.sigwait({signal.SIGCHLD})
        self.has_ended = True

subprocess.Popen = Popen
"""
    assert run_patched(namespace, patches, "sh", "-c", "exit 7").returncode == 7


def test_memory_that_is_not_to_be_had_is_said_and_nothing_runs(
    namespace: str, new_manager: NewManager, start: Start, tmp_path: Path
) -> None:
    manager = new_manager()
    marker = tmp_path / "marker"
    too_large = start(1001, "touch", marker)
    assert (too_large.wait(DEADLINE_S), too_large.communicate()[1].count("it can never be granted")) == (125, 1)
    with manager.reserve(900):
        too_late = start(200, "touch", marker, options=("--wait", "1"))
        assert (too_late.wait(DEADLINE_S), too_late.communicate()[1].count("last reason: leased")) == (125, 1)
    assert not marker.exists()


def test_a_program_that_is_not_there_or_cannot_be_run_is_said(
    namespace: str, new_manager: NewManager, start: Start, tmp_path: Path
) -> None:
    new_manager()
    (tmp_path / "data").touch()
    missing, data = start(10, tmp_path / "missing"), start(10, tmp_path / "data")
    assert (missing.wait(DEADLINE_S), data.wait(DEADLINE_S)) == (127, 126)
    assert "cannot run" in missing.communicate()[1]
    assert leases(namespace) == []


def test_without_a_program_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["run", "--mb", "1"], ["run", "--mb", "1", "--"], ["list", "--", "x"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "after `--`" in capsys.readouterr().err


@pytest.mark.usefixtures("start")
def test_a_key_that_interrupts_reaches_the_program_once(namespace: str, new_manager: NewManager) -> None:
    new_manager()
    counting = (
        "import signal, time; seen = []; signal.signal(signal.SIGINT, lambda *_: seen.append(1)); print('ready', "
        "flush=True)\nwhile not seen: time.sleep(0.01)\ntime.sleep(0.3); print('interrupts:', len(seen), flush=True)"
    )
    command = ["run", "--mb", "100", "--namespace", namespace, "--", sys.executable, "-c", counting]
    with at_terminal(command) as (pid, terminal):
        shown = read_until(terminal, b"ready")
        terminal.write(b"\x03")
        shown += read_until(terminal, b"interrupts:")
        shown += read_until(terminal, b"\n")
        assert b"interrupts: 1" in shown
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.usefixtures("start")
@pytest.mark.parametrize("columns", [60, 200])
@pytest.mark.parametrize("coloured", [True, False])
def test_on_a_terminal_it_says_what_it_waits_for(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, columns: int, coloured: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if coloured else "1")
    manager = new_manager()
    command = ["run", "--mb", "200", "--namespace", namespace, "--name", "mine", "--", "true"]
    with manager.reserve(900, name="first"), at_terminal(command, columns) as (pid, terminal):
        text = read_until(terminal, b" s)", b"\r\n").decode()
    assert text.count("\x1b[33m") == text.count("\x1b[0m") == (text.count("\r\n") if coloured else 0)
    lines = re.sub("\x1b\\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= columns
    assert (len(lines) > 1, all(line.startswith("  ") for line in lines[1:])) == (columns == 60, True)
    said = " ".join(line.strip() for line in lines)
    assert re.fullmatch(
        rf"mpmm {namespace}: pid {pid} has waited [1-4] s for mine, which waits: needs 200 MB, 100 free, and the "
        rf"leases that are held leave too little room \(pid {os.getpid()} leases 900 MB as first for \d+ s\)",
        said,
    )


def test_a_starter_that_ignores_the_ends_of_its_children_is_told_how_the_program_ended(
    start: Start, new_manager: NewManager
) -> None:
    new_manager()
    run = start(100, "sh", "-c", "exit 3", preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert run.wait(DEADLINE_S) == 3


@pytest.mark.usefixtures("start")
def test_a_terminal_that_is_lost_ends_the_program(namespace: str, new_manager: NewManager) -> None:
    new_manager()
    with at_terminal(["run", "--mb", "100", "--namespace", namespace, "--", "sleep", "60"]) as (pid, terminal):
        wait_until(lambda: [lease for lease in leases(namespace) if lease.program], "it runs")
        terminal.close()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert leases(namespace) == []


@contextlib.contextmanager
def at_terminal(command: list[str], columns: int = 80) -> Iterator[tuple[int, io.FileIO]]:
    """Start a command in a terminal of its own; give its pid, which is to be waited for, and the terminal's end."""
    pid, terminal = pty.fork()
    if pid == 0:
        # `nohup`, under which the tests may run, has it ignored.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        # Without the width that readline, which pytest imports, has put into the environment behind Python's back.
        os.execve(sys.executable, [sys.executable, "-m", "mpmm.cli", *command], dict(os.environ))
    with io.FileIO(terminal, "r+") as opened:
        try:
            yield pid, opened
        finally:
            # It was waited for, unless the test has failed.
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def read_all(terminal: io.FileIO) -> str:
    """Return what a terminal shows until its command has ended."""
    shown = b""
    # Linux ends a terminal by an error.
    with contextlib.suppress(OSError):
        while select.select([terminal], [], [], DEADLINE_S)[0] and (part := terminal.read(4096)):
            shown += part
    return shown.decode()


def read_until(terminal: io.FileIO, *wanted: bytes) -> bytes:
    """Return what a terminal shows, up to and including one thing after the other."""
    shown, begin = b"", 0
    for one in wanted:
        while (at := shown.find(one, begin)) < 0:
            assert select.select([terminal], [], [], DEADLINE_S)[0], f"{one!r} did not appear after {shown!r}"
            shown += terminal.read(1) or b""
        begin = at + len(one)
    return shown
