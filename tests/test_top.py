"""`mpmm top`: what is on the screen, in a real terminal of changing size."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from processes import Loads, Process, acquire, wait_until, waiting

from mpmm.cli import main
from mpmm.model_manager import ModelManager
from mpmm.shared_state.snapshot import Snapshot, read_snapshot

rich_console = pytest.importorskip("rich.console", reason="needs the extra cli")
from mpmm.show.top import History, screen  # noqa: E402  # needs rich

NewManager = Callable[..., ModelManager]
NewProcess = Callable[..., Process]
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def busy(namespace: str, new_manager: NewManager, new_process: NewProcess) -> ModelManager:
    """A model that is held, and one who waits for its room."""
    manager = new_manager(fallback_memory_mb=100, wait_timeout_seconds=60)
    manager.acquire_model("held", Loads())
    waiter = new_process(wait_timeout_seconds=60)
    waiter.send(acquire, "wanted")
    wait_until(lambda: waiting(namespace, "wanted"), "somebody waits")
    return manager


def drawn(snapshot: Snapshot, width: int, height: int) -> list[str]:
    """Return the lines of a screen of that size."""
    history = History()
    history.add(snapshot)
    console = rich_console.Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(screen(snapshot, history, width, height))
    return str(console.file.getvalue()).splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (60, 15)])
def test_the_screen_fits_the_terminal(width: int, height: int, busy: ModelManager, namespace: str) -> None:
    lines = drawn(read_snapshot(namespace), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert f"namespace {namespace}" in text
    assert "100 of 100 MB" in text
    assert "wanted" in text


def test_a_large_screen_has_everything(busy: ModelManager, namespace: str) -> None:
    text = "\n".join(drawn(read_snapshot(namespace), 200, 60))
    for title in ("memory", "waiting", "copies", "models", "last evictions"):
        assert title in text
    assert "waits: needs 100 MB, 0 free" in text
    assert "all well" in text


def test_rows_that_do_not_fit_are_counted(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    many = replace(snapshot, tickets=snapshot.tickets * 50)
    lines = drawn(many, 120, 40)
    assert len(lines) <= 40
    [title] = [line for line in lines if line.startswith("waiting (")]
    shown = sum("wanted" in line and "in_use" in line for line in lines)
    assert title.startswith(f"waiting (… and {50 - shown} more)")


def test_the_history_is_a_line_of_blocks(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    [device] = snapshot.devices
    history = History()
    for used_mb in (0.0, 50.0, 100.0):
        history.add(replace(snapshot, devices=(replace(device, used_mb=used_mb),)))
    assert history.line(device, 5) == "   ▄█"
    assert history.line(device, 2) == "▄█"
    before = History()
    before.add(replace(snapshot, devices=(replace(device, samples=((2.0, 100.0), (1.0, 0.0))),)))
    assert before.line(device, 3) == "█ █"


def test_it_runs_in_a_terminal_and_ends_with_q(busy: ModelManager, namespace: str) -> None:
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        before = termios.tcgetattr(theirs)
        command = [sys.executable, "-m", "mpmm.cli", "top", "--interval", "0.05", namespace]
        terminal = {**os.environ, "TERM": "xterm"}
        for name in ("COLUMNS", "LINES"):
            terminal.pop(name, None)
        top = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=terminal)
        try:
            read_until(ours, "wanted")
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
            read_until(ours, "is in use, for about")
            os.write(ours, b"xq")
            read_until(ours, "\x1b[?1049l")
            assert top.wait(20) == 0
        finally:
            top.kill()
            top.wait()
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def read_until(descriptor: int, text: str) -> None:
    """Read from a terminal until some text is there."""
    seen, deadline = "", time.monotonic() + 20
    while text not in seen and text not in _ESCAPES.sub("", seen):
        assert time.monotonic() < deadline, seen[-2000:]
        if select.select([descriptor], [], [], 0.1)[0]:
            seen += os.read(descriptor, 65536).decode("utf-8", "replace")


def test_without_the_library_it_says_what_to_install(
    busy: ModelManager, namespace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "mpmm.show.top")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["top", namespace]) == 2
    assert capsys.readouterr().err == "mpmm: this needs rich; pip install 'mpmm[cli]' brings it\n"


def test_what_is_asked_for_must_be_there(runtime_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "nowhere"]) == 2
    assert "there is no namespace 'nowhere'" in capsys.readouterr().err
    assert main(["top", "nowhere", "--interval", "0"]) == 2
    assert "expected seconds from 0.05" in capsys.readouterr().err
