"""Ctrl-C in a command: it ends by the signal, says nothing, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import NewManager, files_in, import_path, segments_of, wait_until, waiting
from loaders import Loads
from patience import DEADLINE_S
from test_run import at_terminal, read_all, read_until

import mpmm.cli
from mpmm.cli import main
from mpmm.shared_state.snapshot import find_namespaces, read_snapshot

# What a script that a package installer writes does with the entry point of setup.cfg.
SCRIPT = "import sys; from mpmm.cli import as_program; sys.exit(as_program())"
NEVER_LOADED = "import time\n\ndef load():\n    print('loads', flush=True)\n    time.sleep(1000)\n"


def start(*arguments: str, how: tuple[str, ...] = ("-m", "mpmm"), path: Path | None = None) -> subprocess.Popen[str]:
    """Start a command that SIGINT reaches even if the tests run in the background, where a shell has it ignored."""
    return subprocess.Popen(
        [sys.executable, *how, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": import_path(*[path] if path else [])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupted(command: subprocess.Popen[str]) -> None:
    """Interrupt a command; fail unless the signal has ended it without a word."""
    try:
        command.send_signal(signal.SIGINT)
        assert command.communicate(timeout=DEADLINE_S) == ("", "")
        assert command.returncode == -signal.SIGINT
    finally:
        command.kill()
        command.communicate()


@pytest.mark.parametrize("how", [("-m", "mpmm"), ("-m", "mpmm.cli"), ("-c", SCRIPT)], ids=str)
def test_a_preload_that_waits_leaves_the_queue_and_the_namespace(
    how: tuple[str, ...], namespace: str, new_manager: NewManager
) -> None:
    with new_manager().reserve(950):
        command = start("preload", "wanted", "builtins:object", "--expect-mb", "200", how=how)
        wait_until(lambda: waiting(namespace, "wanted"), "it waits")
        interrupted(command)
        snapshot = read_snapshot(namespace)
        assert (snapshot.tickets, [member.pid for member in snapshot.members]) == ((), [os.getpid()])
        assert snapshot.reaps == 0


def test_an_unload_that_waits_leaves_the_namespace(namespace: str, new_manager: NewManager) -> None:
    with new_manager().model("held", Loads()):
        command = start("unload", "held", "--wait", "inf")
        wait_until(lambda: any(one.unload_on_release for one in read_snapshot(namespace).instances), "it waits")
        interrupted(command)
        snapshot = read_snapshot(namespace)
        assert ([member.pid for member in snapshot.members], snapshot.reaps) == ([os.getpid()], 0)


def test_the_last_process_of_a_namespace_leaves_nothing_behind(
    namespace: str, new_manager: NewManager, runtime_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "never_loaded.py").write_text(NEVER_LOADED)
    manager = new_manager()
    command = start("preload", "wanted", "never_loaded:load", path=tmp_path)
    assert command.stdout is not None
    assert command.stdout.readline() == "loads\n"
    manager.shutdown()
    assert find_namespaces() == [namespace]
    interrupted(command)
    assert (find_namespaces(), segments_of(runtime_root), files_in(runtime_root)) == ([], set(), [])


def test_the_question_of_a_reset_is_no_traceback(namespace: str, new_manager: NewManager) -> None:
    new_manager()
    with at_terminal(["reset", namespace]) as (pid, terminal):
        read_until(terminal, b"[y/N] ")
        os.kill(pid, signal.SIGINT)
        assert read_all(terminal).strip() == ""
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT
    assert read_snapshot(namespace).resets == 0


def test_main_leaves_interrupts_to_the_program_that_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    hook, handler = sys.excepthook, signal.getsignal(signal.SIGINT)
    monkeypatch.setitem(mpmm.cli._COMMANDS, "list", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(["list"])
    monkeypatch.setattr(sys, "argv", ["mpmm", "list"])
    with pytest.raises(KeyboardInterrupt):
        main()
    assert (sys.excepthook, signal.getsignal(signal.SIGINT)) == (hook, handler)
